"""Quantisation of runs: ranges by sampling, training with rounded weights, precision by step, integers in OpenVINO."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd import forward_ad

from osmose.acceleration import quantization, ranges
from osmose.acceleration.plan import plan
from osmose.acceleration.precision import Switch, deviation, drawn, intervals, labels_of, search
from osmose.acceleration.quantization import Quantization, quantize
from osmose.acceleration.quantization_plan import QuantizationConfig
from osmose.acceleration.teaching import taught_config
from osmose.acceleration.tutoring import Tutored
from osmose.configuration import ConfigError
from osmose.errors import UserError
from osmose.gaussian.draws import StepDraws
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.schedule import VarianceExploding
from osmose.gaussian.solvers import DDIM
from osmose.methods.messages import Batch
from osmose.networks import graphs
from osmose.networks.experts import Experts
from osmose.networks.integers import IntegerLayer
from osmose.networks.quantized import BF16
from osmose.training.run import Run, load
from osmose.training.runtime import networks_of
from osmose.training.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("default")
UNET = {"network.channels": 8, "network.mult": [1, 2], "network.attention": [4], "network.blocks": 1}
UNET |= {"sampling.num_steps": 4, "training.batch_size": 8}
MLP = {"network": "mlp", "network.width": 16, "network.depth": 2, "sampling.num_steps": 5}
QUICK = {"items": 8, "weight_bits": 7}


@pytest.fixture(autouse=True)
def without_graphs(request, monkeypatch):
    """Graphs take seconds to write: only tests that ask for them have them."""
    if "real_graphs" not in request.fixturenames:
        monkeypatch.setattr(quantization, "why_not", lambda *_: "not here")


@pytest.fixture
def real_graphs():
    """What OpenVINO computes."""
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def unet(tmp_path_factory, made):
    return made(tmp_path_factory.mktemp("unet") / "run", "edm", UNET)


@pytest.fixture(scope="module")
def mlp(tmp_path_factory, made):
    return made(tmp_path_factory.mktemp("mlp") / "run", "ddpm", MLP)


def found(folder):
    return json.loads((folder / "quantization.json").read_text())


def test_a_run_of_integers_is_a_run(tmp_path, unet):
    run = quantize(unet, tmp_path / "q", progress=False, **QUICK)
    told, names = found(tmp_path / "q"), {}
    for layer in told["layers"]:
        names[layer["name"]] = layer
        assert 0 < layer["error"] < 0.1
    assert "conv_in" not in names
    assert "conv_out" not in names
    assert names["time_embedding.linear_1"]["inputs"] == "float"
    assert names["down_blocks.0.resnets.0.time_emb_proj"]["inputs"] == "float"
    assert names["mid_block.resnets.0.conv1"]["inputs"] == "static"
    assert len(names["up_blocks.0.resnets.0.conv_shortcut"]["scale"]) == 2  # the two halves that are joined
    assert 0 < told["deviation"] < 0.3
    assert run.config.parent.sha256 == unet.hash()
    assert run.weights.stat().st_size < 0.5 * unet.weights.stat().st_size
    assert (tmp_path / "q" / "samples" / "beside.png").is_file()
    # Weights and samples are the same when they are read again.
    one, other = run.model(), load(tmp_path / "q", runtime="torch")
    assert torch.equal(one.sample(4, seed=1).data, other.sample(4, seed=1).data)
    stored = load_file(run.weights)
    assert stored["denoiser.network.mid_block.resnets.0.conv1.weight"].dtype is torch.int8
    # And the same quantisation is the same.
    again = quantize(unet, tmp_path / "again", progress=False, **QUICK)
    assert again.hash() == run.hash()


def test_weights_of_another_network_are_refused(tmp_path, unet):
    run = quantize(unet, tmp_path / "q", progress=False, **QUICK)
    stored = load_file(run.weights)
    name = "denoiser.network.mid_block.resnets.0.conv1.weight_scale"
    save_file({key: value for key, value in stored.items() if key != name}, run.weights)
    with pytest.raises(UserError, match=f"has no tensor '{name}'"):
        run.model()


def test_ranges_hold_what_the_sampler_meets(unet):
    model = unet.model()
    network, shape = model.denoiser.network, model.spec.shape
    sees = ranges.inner(network, shape, model.device)
    assert sees.between[0] == "down_blocks.0.resnets.0.conv1"
    assert {"time_embedding.linear_1", "mid_block.resnets.1.time_emb_proj"} <= set(sees.told)
    assert len(sees.between) + len(sees.told) == len(ranges.layers_of(network)) - 2
    seen = []
    name = "mid_block.resnets.0.conv2"
    network.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    observer = ranges.Observer((16,), 1)
    ranges.run_through(model, "sampler", 8, 0, None)
    for x in seen:
        observer.see(x)
    assert len(seen) == 7  # Heun's evaluations in 4 steps, each with its share of the values
    assert len({len(values) for values in observer.values[0]}) == 1
    values = torch.cat([x.flatten() for x in seen])
    assert float(observer.smallest) == float(values.min())
    assert float(observer.largest) == float(values.max())
    low, high = observer.ranges(8)
    assert float(values.min()) <= float(low) <= 0 <= float(high) <= float(values.max())


def test_few_values_far_out_are_left_there():
    observer = ranges.Observer((1,), 1)
    x = torch.randn(40, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    observer.see(x)
    few, many = observer.ranges(4)[1], observer.ranges(8)[1]
    assert few < 0.85 * x.max()  # the fewer integers, the more it pays to leave out what is rare
    assert few < many <= x.max()


def test_other_sources_are_other_ranges(mlp):
    dataset = mlp.config.data.load()
    widths = {}
    for source in ("sampler", "forward", "noise", "data"):
        model = mlp.model()
        layer, seen = model.denoiser.network.stem, []
        layer.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].std().item()))
        ranges.run_through(model, source, 16, 0, dataset)
        assert len(seen) == 5
        widths[source] = seen
    assert max(widths["noise"]) - min(widths["noise"]) < 0.2  # at one time alone
    assert max(widths["data"]) < min(widths["noise"])
    assert widths["forward"][0] == pytest.approx(widths["noise"][0], abs=0.1)


def test_zeros_alone_are_said_and_nothing_at_all_is_refused(unet):
    model = unet.model()
    wrapped = Quantization(unet.folder, unet, QuantizationConfig(**QUICK))
    rounded = wrapped._with(wrapped._layers(model), "rounded")
    network = model.denoiser.network
    forms = [quantization._rounded_layers(rounded.denoiser.network)]

    def nothing_but_zeros():
        for name, layer in ranges.layers_of(network).items():
            if name in forms[0]:
                conv = isinstance(layer, nn.Conv2d)
                layer(torch.zeros(1, layer.in_channels, 4, 4) if conv else torch.zeros(1, layer.in_features))

    with pytest.warns(UserWarning, match="was given nothing but zeros in calibration"):
        ranges.observe([network], forms, nothing_but_zeros)
    with pytest.raises(UserError, match="was never evaluated"):
        ranges.observe([network], forms, lambda: None)


def test_biases_take_the_mean_error(unet):
    model = unet.model()
    made = Quantization(unet.folder, unet, QuantizationConfig(items=8, weight_bits=3))
    rounded = made._with(made._layers(model), "rounded")
    networks, forms = [model.denoiser.network], [quantization._rounded_layers(rounded.denoiser.network)]

    def run():
        ranges.run_through(model, "sampler", 8, 0, None)

    ranges.observe(networks, forms, run)
    before = ranges.layer_errors(networks, forms, run)[0]
    ranges.correct_biases(forms, [before])
    after = ranges.layer_errors(networks, forms, run)[0]
    assert any(float(error.mean.abs().max()) > 1e-3 for error in before.values())
    for name, error in after.items():
        assert float(error.mean.abs().max()) < 1e-4
        assert error.relative == pytest.approx(before[name].left, rel=1e-3, abs=1e-5)
        assert error.relative <= before[name].relative * (1 + 1e-6)


def test_layers_keep_their_bounds_on_what_calibration_meets(tmp_path, unet):
    """No output is farther off than half steps and what lies beyond the ranges allow, of inputs and of weights."""
    run = quantize(unet, tmp_path / "q", progress=False, **QUICK)
    real, whole = unet.model(), run.model()
    layers = {name: m for name, m in whole.denoiser.network.named_modules() if isinstance(m, IntegerLayer)}
    seen, inside = {}, ranges.layers_of(real.denoiser.network)
    for name in layers:
        inside[name].register_forward_hook(
            lambda _, x, out, name=name: seen.setdefault(name, []).append((x[0], out.clone()))
        )
    ranges.run_through(real, "sampler", 4, 1, None)
    assert seen.keys() == layers.keys()

    def off(value, scale, zero, limits):
        """Half a step, and what lies beyond the ends of the range."""
        low, high = ((end - zero) * scale for end in limits)
        return scale / 2 + (value - high).clamp(min=0) + (low - value).clamp(min=0)

    with torch.no_grad():
        for name, layer in layers.items():
            weight, steps = inside[name].weight, layer.weight_scale
            columns = zip(weight.split(layer.columns, 1), steps, strict=True)
            of_weights = torch.cat([off(w, layer.broadcast(s, w), 0.0, layer.weight_limits) for w, s in columns], 1)
            assert bool(((layer.real_weight() - weight).abs() <= of_weights * 1.001 + 1e-6).all())
            for x, out in seen[name]:
                of_inputs = torch.zeros_like(x)
                if layer.form.inputs == "static":
                    parts = zip(x.split(layer.parts, layer.axis), layer.scale, layer.zero.float(), strict=True)
                    of_inputs = torch.cat([off(p, s, z, layer.limits) for p, s, z in parts], layer.axis)
                bias = layer.bias - inside[name].bias  # the mean error, which was taken into it
                error = (layer(x) - out).movedim(layer.axis, -1) - bias
                bound = layer.apply_map(of_inputs, weight.abs(), None)
                bound = bound + layer.apply_map(x.abs() + of_inputs, of_weights, None)
                assert bool((error.abs() <= bound.movedim(layer.axis, -1) * 1.001 + 1e-4).all())


def test_a_teacher_that_is_the_student_teaches_nothing(mlp):
    model, dataset = mlp.model(), mlp.config.data.load()
    model.train()
    batch = Batch.of(dataset, "train", torch.arange(6), False, "cpu")

    def gradients(weight, teacher):
        lesson = Tutored(model, teacher, weight).train()
        model.zero_grad()
        terms = lesson(batch, StepDraws(0, 0, 0, 6, 6))
        terms.per_item.mean().backward()
        lesson.end()
        return terms.parts["distillation"], [p.grad.clone() for p in model.parameters()]

    distance, with_lesson = gradients(1.0, mlp.model())
    assert torch.equal(distance, torch.zeros(6))
    assert all(torch.equal(a, b) for a, b in zip(with_lesson, gradients(0.0, mlp.model())[1], strict=True))
    other = mlp.model()
    with torch.no_grad():
        other.denoiser.network.stem.weight.mul_(1.1)
    distance, moved = gradients(1.0, other)
    assert bool((distance > 0).all())
    assert not all(torch.equal(a, b) for a, b in zip(with_lesson, moved, strict=True))


def test_training_moves_rounded_weights_and_continues_where_it_was_stopped(tmp_path, mlp, made, monkeypatch):
    few = {"inputs": "static", "bits": 4, "items": 8, "weight_bits": 3}
    tuning = {"steps": 30, "lr": 1e-3, "batch_size": 16}
    whole = quantize(mlp, tmp_path / "whole", progress=False, tuning=tuning, **few)
    alone = quantize(mlp, tmp_path / "alone", progress=False, **few)
    assert whole.hash() != alone.hash()
    (first, *_), (last, *_) = (
        [layer["scale"] for layer in found(tmp_path / name)["layers"] if "scale" in layer]
        for name in ("alone", "whole")
    )
    assert first != last  # what is said of layers is what they are after training
    log = whole.metrics()
    assert log[-1]["step"] == 30
    assert "distillation" in log[0]
    checked = [line["validation_loss"] for line in log if "validation_loss" in line]
    assert checked[-1] < checked[0]
    # Stopped in the middle, and taken up again.
    from osmose.training import trainer

    advance = trainer.Trainer.advance

    def stopping(self, stopped):
        if self.step == 12:
            stopped.append(15)
        advance(self, stopped)

    begun = Quantization.begin(tmp_path / "stopped", mlp, QuantizationConfig(tuning=tuning, **few))
    monkeypatch.setattr(trainer.Trainer, "advance", stopping)
    assert not begun.carry_out(mlp.config.data.load(), progress=False)
    monkeypatch.setattr(trainer.Trainer, "advance", advance)
    with pytest.raises(UserError, match="a quantization that is not finished; osmose quantize RUN --out"):
        Run.open(tmp_path / "stopped")
    with pytest.raises(UserError, match=r"stopped: is made from another run, 'run', than .*other"):
        quantize(made(tmp_path / "other", "ddpm", MLP | {"network.depth": 1}), tmp_path / "stopped", resume=True)
    again = quantize(mlp, tmp_path / "stopped", resume=True, progress=False)
    assert again.hash() == whole.hash()


def test_steps_at_both_ends(tmp_path, mlp, made):
    few = made(tmp_path / "few", "ddpm", {**MLP, "sampling.num_steps": 4})
    right = drawn(few.model(), 6, 3)

    def samples(name, **options):
        run = quantize(few, tmp_path / name, progress=False, bits=4, **QUICK, **options)
        return run, drawn(run.model(), 6, 3)

    low = samples("low")[1]
    assert torch.equal(samples("none", ends=0)[1], low)
    whole, all_high = samples("all", ends=2)  # of four steps, all
    assert torch.equal(all_high, right)
    assert not [layer for layer in whole.model().modules() if isinstance(layer, IntegerLayer)]
    one, mixed = samples("one", ends=1)
    model, calls = one.model(), []
    assert isinstance(model.denoiser.network, Experts)
    for index, part in enumerate(model.denoiser.network.parts):
        part.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    assert torch.equal(drawn(model, 6, 3), mixed)
    assert calls == [0, 1, 1, 0]  # 2 k of the one, N - 2 k of the other
    assert not torch.equal(mixed, low)
    assert not torch.equal(mixed, right)
    assert torch.equal(samples("named", at=[4, 1])[1], mixed)
    with pytest.raises(UserError, match="at: there is no step 5; they are 1 to 4"):
        samples("no", at=[5])
    with pytest.raises(UserError, match="ends: 3 steps at each end are more than the 5 steps of the chain"):
        quantize(mlp, tmp_path / "many", progress=False, ends=3, **QUICK)


def test_intervals_lie_half_way_between_labels():
    assert intervals([10.0, 8.0, 6.0, 4.0], [10.0, 4.0]) == ((9.0, 5.0), (0, 1, 0))
    assert intervals([1.0, 2.0, 3.0], [1.0]) == ((1.5,), (1, 0))
    assert intervals([1.0, 2.0], []) == ((), (1,))
    edges, owners = intervals([10.0, 8.0, 6.0, 4.0], [10.0, 4.0])
    parts = Experts([nn.Identity(), nn.Identity()], edges, owners)
    assert parts.owner(torch.tensor([10.0, 8.0, 6.0, 4.0])).tolist() == [0, 1, 1, 0]


class Erring(nn.Module):
    """A network that is off by so much at each label."""

    def __init__(self, network, error):
        super().__init__()
        self.network, self.error = network, error

    def forward(self, x, label, condition=None):
        return self.network(x, label, condition) + self.error(float(label[0]))


def test_precision_goes_where_errors_are(mlp):
    model = mlp.model()
    labels = labels_of(model)
    assert len(labels) == 5
    bad = {labels[1]: 0.3, labels[3]: 0.1}
    low = Erring(mlp.model().denoiser.network, lambda label: bad.get(label, 0.02))
    all_low = search(model, [low], budget=10.0, items=8)
    assert all_low.high == ()
    assert all_low.deviation == all_low.low < 10
    found_ = search(model, [low], budget=0.9 * all_low.groups[1].deviation, items=8)
    assert found_.high == (labels[1],)
    assert found_.deviation <= 0.9 * all_low.groups[1].deviation
    assert [group.labels for group in found_.groups] == [(label,) for label in labels]
    pairs = search(model, [low], budget=10.0, items=8, most_groups=3)
    assert [group.labels for group in pairs.groups] == [tuple(labels[:2]), tuple(labels[2:4]), (labels[4],)]
    everything = search(model, [low], budget=1e-9, items=8)
    assert everything.high == tuple(labels)
    assert everything.deviation == 0.0
    # Where high precision is not exact, no choice keeps a small budget, and it is said what is left.
    right = drawn(model, 8, 0) + 0.1
    assert search(model, [low], budget=1e-9, items=8, right=right).deviation == pytest.approx(
        deviation(right - 0.1, right), rel=1e-4
    )
    assert not isinstance(model.denoiser.network, Switch)  # it is left as it was


def test_errors_of_steps_reach_the_end_as_the_chain_takes_them_there():
    """Of a linear denoiser a x, an error e at step i ends as e B_i prod over later j of (A_j + B_j a_j)."""
    grid = TimeGrid.of(VarianceExploding(), 8)
    levels = grid.levels
    variance = 0.25

    def slope(level):
        return variance * level.alpha / (variance * level.alpha**2 + level.sigma**2)

    def ends(step, error):
        calls = []

        def denoise(x, level):
            calls.append(level)
            return slope(level) * x + (error if len(calls) - 1 == step else 0.0)

        x = torch.ones(1, 1, dtype=torch.float64) * levels[0].sigma
        for state in DDIM().run(denoise, x, grid, lambda: torch.zeros(1, 1, dtype=torch.float64)):
            x = state.x
        return float(x)

    clean = ends(-1, 0.0)
    for step in (0, 3, 7):
        # x_next = A x + B x0 with A = sigma' / sigma and B = alpha' - alpha A.
        def parts(i):
            a = levels[i + 1].sigma / levels[i].sigma
            return a, levels[i + 1].alpha - levels[i].alpha * a

        gain = parts(step)[1]
        for later in range(step + 1, 8):
            a, b = parts(later)
            gain *= a + b * slope(levels[later])
        assert ends(step, 0.01) - clean == pytest.approx(0.01 * gain, rel=1e-9)


def test_deviation_is_in_deviations_of_the_right_ones():
    right = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    assert deviation(right + 0.2, right) == pytest.approx(0.2, rel=0.05)
    assert deviation(5 * right, 5 * right) == 0.0


def test_experts_are_quantized_part_by_part(tmp_path, made):
    parts = [{"kind": "mlp", "width": 16, "depth": 1}] * 2
    blocks = made(
        tmp_path / "blocks", "edm",
        {"network": {"kind": "experts", "parts": parts, "edges": [0.0]}, "sampling.num_steps": 6},
    )  # fmt: skip
    run = quantize(blocks, tmp_path / "q", progress=False, **QUICK)
    assert [type(holder) for holder, _, _ in networks_of(run.model())] == [nn.ModuleList] * 2
    assert {layer["network"] for layer in found(tmp_path / "q")["layers"]} == {0, 1}
    with pytest.raises(UserError, match="experts share the steps among themselves already"):
        quantize(blocks, tmp_path / "no", ends=1, progress=False, **QUICK)
    # They are taught as a whole: each item by the part that it belongs to.
    tuned = quantize(blocks, tmp_path / "t", progress=False, tuning={"steps": 2, "batch_size": 8}, **QUICK)
    assert tuned.hash() != run.hash()


def test_students_are_quantized_for_every_grid(tmp_path, mlp):
    from osmose.acceleration.distill import distill

    said = {"schedule": [4, 2, 1], "steps": 2, "training.batch_size": 8, "parametrization": "v"}
    students = distill(mlp, tmp_path / "students", progress=False, **said)
    run = quantize(students, tmp_path / "q", progress=False, ends=0, **QUICK)
    model = run.model()
    assert [len([m for m in s.modules() if isinstance(m, IntegerLayer)]) > 0 for s in model.students] == [True, True]
    for steps in (1, 2):
        assert model.sample(2, num_steps=steps).nfe == steps


def test_bf16_is_half_the_size(tmp_path, unet):
    run = quantize(unet, tmp_path / "half", to="bf16", progress=False)
    assert isinstance(run.model().denoiser.network, BF16)
    assert run.weights.stat().st_size < 0.6 * unet.weights.stat().st_size
    assert 0 < found(tmp_path / "half")["deviation"] < 0.1
    mixed = quantize(unet, tmp_path / "mixed", ends=1, high="bf16", progress=False, **QUICK)
    assert isinstance(mixed.model().denoiser.network.parts[0], BF16)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 9}, "bits"),
        ({"weight_bits": 1}, "weight_bits"),
        ({"items": 0}, "items"),
        ({"ends": 1, "budget": 0.1}, "budget: given, and ends too"),
        ({"to": "bf16", "bits": 4}, "bits: given, and is of int8"),
        ({"to": "bf16", "items": 3}, "items: given, and is of int8"),
        ({"high": "bf16"}, "high: bf16 given, and no step is in high precision"),
        ({"keep": ["nothing*"]}, "keep: 'nothing\\*' matches no layer; they are blocks.0"),
        ({"keep": ["*"]}, "no layer is left to quantize"),
        ({"ends": 3}, "ends: 3 steps at each end are more than the 5 steps"),
    ],
)
def test_refusals_write_nothing(tmp_path, mlp, options, said):
    with pytest.raises((UserError, ConfigError), match=said):
        Quantization.begin(tmp_path / "q", mlp, QuantizationConfig.parse(options))
    assert not (tmp_path / "q").exists()


def test_runs_that_cannot_be_quantized_are_named(tmp_path, made, mlp):
    other = made(tmp_path / "gaussian", "gaussian", {})
    with pytest.raises(UserError, match="a run of gaussian cannot be quantized; those of ddpm, iddpm, edm"):
        quantize(other, tmp_path / "q", progress=False)
    other = made(tmp_path / "implicit", "edm", {"network": "implicit", "network.width": 8})
    with pytest.raises(UserError, match="network: a Implicit has no graph here"):
        quantize(other, tmp_path / "q", progress=False)
    twice = quantize(mlp, tmp_path / "once", progress=False, **QUICK)
    with pytest.raises(UserError, match="is quantized already"):
        quantize(twice, tmp_path / "q", progress=False)
    for refused in (
        lambda: Trainer(twice, mlp.config.data.load()),
        lambda: plan(twice.config, twice.as_parent(), "tract", {"schedule": [4, 1]}),
        lambda: taught_config(twice.config, twice.as_parent(), "scd", {}, 0.5),
    ):
        with pytest.raises(UserError, match=r"once: is quantized, and .*; take the run that it was made from"):
            refused()
    with pytest.raises(UserError, match="no quantization was begun here"):
        Quantization.open(tmp_path / "nothing", mlp)
    assert not (tmp_path / "q").exists()


@pytest.mark.usefixtures("real_graphs")
def test_openvino_computes_the_integers(tmp_path, mlp, monkeypatch):
    run = quantize(mlp, tmp_path / "q", progress=False, **QUICK)
    assert found(tmp_path / "q")["computed_by"] == "openvino"
    whole, emulated = run.model(runtime="auto"), run.model()
    network = whole.denoiser.network
    assert isinstance(network, graphs.Graph)
    assert not network.compiled.get_property("ENABLE_CPU_PINNING")  # several processes would share one core
    layers = [op.get_rt_info()["runtimePrecision"].astype(str) for op in network.compiled.get_runtime_model().get_ops()
              if op.get_rt_info()["layerType"].astype(str) == "FullyConnected"]  # fmt: skip
    assert any(kind in ("u8", "i8") for kind in layers)
    x, label = torch.randn(40, *whole.spec.shape), torch.full((40,), 300.0)
    one, other = network(x, label), emulated.denoiser.network(x, label)
    # A value on the border of two integers may fall to either side.
    assert (one - other).norm() < 0.01 * other.norm()
    assert torch.equal(whole.sample(4, seed=1).data, load(run.folder).sample(4, seed=1).data)
    with pytest.raises(UserError, match="openvino has no derivatives"):
        network(x.clone().requires_grad_(), label)
    with forward_ad.dual_level(), pytest.raises(UserError, match="openvino has no derivatives"):
        network(forward_ad.make_dual(x, torch.ones_like(x)), label)
    copy.deepcopy(run.model())  # what looks into a model has torch's
    # Eight bits of weights would overflow here without VNNI: torch computes them, and it is said.
    for layer in whole.modules():
        assert not (isinstance(layer, IntegerLayer) and layer.form.weight_bits == 8)
    monkeypatch.setattr(graphs, "overflows", lambda _: True)
    with pytest.warns(UserWarning, match="no VNNI.*its integers are computed as float32 numbers, no faster"):
        fallen = run.model(runtime="auto")
    assert torch.equal(fallen.sample(4, seed=1).data, emulated.sample(4, seed=1).data)
    with pytest.raises(UserError, match="no VNNI"):
        run.model(runtime="openvino")
    monkeypatch.undo()
    # Graphs of other weights are not used.
    stored = load_file(run.weights)
    state = {name: (value * 2 if name.endswith("stem.bias") else value) for name, value in stored.items()}
    save_file(state, run.weights)
    with pytest.warns(UserWarning, match="the run has no graphs of its weights"):
        run.model(runtime="auto")


def test_weights_have_seven_bits_where_the_processor_has_no_vnni(tmp_path, mlp, monkeypatch):
    for have, bits in ((frozenset({"avx2"}), 7), (frozenset({"avx2", "vnni"}), 8)):
        for module in (graphs, quantization):
            monkeypatch.setattr(module, "instructions", lambda have=have: have)
        made = Quantization.begin(tmp_path / str(bits), mlp, QuantizationConfig(items=4))
        assert made.config.weight_bits == bits
        assert graphs.overflows(made._with(made._layers(mlp.model()), "integers")) is False
    whole = Quantization(tmp_path, mlp, QuantizationConfig(weight_bits=8))
    network = whole._with(whole._layers(mlp.model()), "integers").denoiser.network
    monkeypatch.setattr(graphs, "instructions", lambda: frozenset({"avx2"}))
    assert graphs.overflows(network)
