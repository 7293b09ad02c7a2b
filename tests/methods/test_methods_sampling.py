import itertools
import math
from contextlib import nullcontext

import pytest
import torch

from osmose.configuration import ConfigError
from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian import SOLVERS
from osmose.gaussian.draws import SampleDraws, StepDraws
from osmose.gaussian.parametrization import EDMParametrization
from osmose.gaussian.schedule import CosineSchedule, LinearSchedule
from osmose.gaussian.solvers import DDIM, Ancestral
from osmose.methods.diffusion import DDPMConfig, EDMConfig, IDDPMConfig
from osmose.methods.messages import Batch
from osmose.networks.mlp import MLPConfig
from osmose.networks.unet import UNetConfig

IMAGES = DataSpec(kind="image", shape=(1, 8, 8), range=(0.0, 1.0), shift=(0.5,), scale=(0.5,), num_classes=3)
DIGITS = DataSpec(kind="image", shape=(1, 8, 8), range=(0.0, 16.0), levels=17, shift=(8.0,), scale=(8.0,))
POINTS = DataSpec(kind="points", shape=(2,), shift=(1.0, -2.0), scale=(2.0, 0.5))
UNET = UNetConfig(channels=8, mult=(1, 2), blocks=1, attention=(4,), dropout=0.3)
MLP = MLPConfig(width=16, depth=1)
STOCHASTIC = [DDIM(eta=1.0), DDIM(eta=0.5), Ancestral()]


def perturbed(model, amount=0.05):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model():
    return perturbed(DDPMConfig(network=UNET).build(IMAGES))


@pytest.fixture(scope="module")
def conditional():
    return perturbed(DDPMConfig(network=UNET, conditional=True).build(IMAGES), 0.2)


@pytest.mark.parametrize("solver", STOCHASTIC, ids=lambda s: f"{s.kind}{getattr(s, 'eta', '')}")
def test_the_same_seed_gives_the_same_samples_whatever_the_batch_size(model, solver):
    want = model.sample(7, num_steps=20, solver=solver, seed=5, batch_size=7).data
    assert want.std() > 0.05
    for batch_size in (1, 3, None):
        got = model.sample(7, num_steps=20, solver=solver, seed=5, batch_size=batch_size).data
        assert (got - want).abs().max() < 1e-4
    # Fewer samples are the first of more.
    assert (model.sample(4, num_steps=20, solver=solver, seed=5).data - want[:4]).abs().max() < 1e-4
    assert torch.equal(model.sample(7, num_steps=20, solver=solver, seed=5, batch_size=7).data, want)
    assert (model.sample(7, num_steps=20, solver=solver, seed=6).data - want).abs().max() > 0.1
    assert (want[0] - want[1]).abs().max() > 0.1


def test_edm_samples_do_not_depend_on_the_batch_size_either():
    model = perturbed(EDMConfig(network=UNET).build(IMAGES))
    want = model.sample(5, seed=2).data
    assert (model.sample(5, seed=2, batch_size=2).data - want).abs().max() < 1e-4


def test_ddim_written_by_hand_from_the_first_noise(model):
    model.eval()
    with torch.no_grad():
        options = model.sampling(num_steps=4, solver="ddim", clip=False)
        got, nfe = model.generate(SampleDraws(5, 0, 3), options, None, lambda *_: None)
        want = SampleDraws(5, 0, 3).normal((1, 8, 8))
        abar = torch.cat([torch.ones(1), (1 - model.schedule.betas).cumprod(0).float()])
        for t, s in itertools.pairwise([1000, 667, 334, 1, 0]):
            eps = model.networks()[0](want, torch.full((3,), t - 1.0))
            x0 = (want - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
            want = abar[s].sqrt() * x0 + (1 - abar[s]).sqrt() * eps
    assert nfe == 4
    assert (got - want).abs().max() < 1e-3 * want.abs().max()


@pytest.mark.parametrize("kind", list(SOLVERS.entries))
@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_work_is_counted(kind, num_steps):
    trig = DDPMConfig(network=MLP, schedule="trig", parametrization="v")
    for config in (DDPMConfig(network=MLP), EDMConfig(network=MLP), trig):
        model = config.build(POINTS)
        calls, steps = [], []
        model.networks()[0].register_forward_hook(lambda _, inputs, __, calls=calls: calls.append(len(inputs[0])))
        on_step = lambda *done, steps=steps: steps.append(done)  # noqa: E731
        samples = model.sample(5, num_steps=num_steps, solver=kind, batch_size=2, on_step=on_step)
        assert samples.data.shape == (5, 2)
        assert sum(calls) == 5 * samples.nfe
        assert samples.nfe == SOLVERS.parse(kind).evaluations(num_steps)
        assert steps == [(i, 3 * num_steps) for i in range(1, 3 * num_steps + 1)]
        assert samples.seconds > 0
        assert samples.condition is None


def test_samples_are_plain_float32_in_data_units(model):
    samples = model.sample(3, num_steps=2)
    assert samples.data.dtype == torch.float32
    assert samples.data.device.type == "cpu"
    assert not samples.data.is_inference()
    assert not samples.data.requires_grad
    assert samples.data.min() >= 0
    assert samples.data.max() <= 1


def test_digits_are_on_their_levels():
    data = perturbed(DDPMConfig(network=UNET).build(DIGITS), 0.2).sample(4, num_steps=5).data
    assert data.min() >= 0
    assert data.max() <= 16
    assert torch.equal(data, data.round())
    assert len(data.unique()) > 3


def test_clipping_is_of_the_estimate():
    wild = perturbed(DDPMConfig(network=UNET).build(IMAGES), 0.3)
    run = lambda **options: wild.generate(  # noqa: E731
        SampleDraws(0, 0, 4), wild.sampling(num_steps=5, **options), None, lambda *_: None
    )[0]
    assert run(clip=True).abs().max() <= 1
    assert run(clip=False).abs().max() > 1
    # Data without a range has nothing to clip to.
    free = perturbed(DDPMConfig(network=MLP).build(POINTS), 0.3)
    assert torch.equal(free.sample(4, num_steps=5, clip=True).data, free.sample(4, num_steps=5, clip=False).data)


def test_an_untrained_edm_model_samples_the_gaussian_of_its_data():
    # With F = 0 the denoiser is that of N(0, sigma_data^2): EDM's preconditioning is the Gaussian's posterior mean.
    spec = DataSpec(kind="points", shape=(50,), shift=(3.0,), scale=(2.0,))
    model = EDMConfig(network=MLP, parametrization=EDMParametrization(sigma_data=0.6)).build(spec)
    data = model.sample(200, seed=1, num_steps=40).data
    assert data.mean().item() == pytest.approx(3, abs=0.05)
    assert data.std().item() == pytest.approx(2 * 0.6, rel=0.03)
    stochastic = model.sample(200, seed=1, num_steps=200, solver="ancestral").data
    assert stochastic.std().item() == pytest.approx(2 * 0.6, rel=0.05)


def test_decoding_is_per_channel():
    model = EDMConfig(network=MLP, parametrization=EDMParametrization(sigma_data=1.0)).build(POINTS)
    data = model.sample(3000, num_steps=30).data
    assert torch.allclose(data.mean(0), torch.tensor([1.0, -2.0]), atol=0.15)
    assert torch.allclose(data.std(0), torch.tensor([2.0, 0.5]), rtol=0.08)


def test_sampling_evaluates_and_puts_back():
    model = perturbed(DDPMConfig(network=UNET).build(IMAGES))
    for mode in (True, False):
        model.train(mode)
        first = model.sample(2, num_steps=3).data
        assert torch.equal(model.sample(2, num_steps=3).data, first)  # dropout is off
        assert model.training is mode
        assert model.denoiser.network.training is mode

    class StopError(Exception):
        pass

    def stop(*_):
        raise StopError

    model.train()
    with pytest.raises(StopError):
        model.sample(2, num_steps=3, on_step=stop)
    assert model.training


def test_batches_stream(model):
    parts = list(model.stream(5, num_steps=2, batch_size=2))
    assert [len(part.data) for part in parts] == [2, 2, 1]
    whole = model.sample(5, num_steps=2, batch_size=2)
    assert torch.equal(torch.cat([part.data for part in parts]), whole.data)


def test_classes(conditional):
    default = conditional.sample(5, num_steps=5)
    assert default.condition.tolist() == [0, 1, 2, 0, 1]
    given = conditional.sample(5, num_steps=5, condition=torch.tensor([0, 1, 2, 0, 1]), batch_size=2)
    assert given.condition.tolist() == [0, 1, 2, 0, 1]
    assert (given.data - default.data).abs().max() < 1e-4
    ones = conditional.sample(5, num_steps=5, condition=1)
    assert ones.condition.tolist() == [1] * 5
    same = (ones.data - default.data).abs().flatten(1).max(1).values
    assert bool((same[[1, 4]] < 1e-4).all())
    assert bool((same[[0, 2, 3]] > 1e-3).all())
    assert torch.equal(conditional.sample(2, num_steps=5, condition=[1, 1]).condition, torch.tensor([1, 1]))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (3, r"condition: class 3 is not in 0\.\.2"),
        (-1, r"condition: class -1 is not in 0\.\.2"),
        (torch.tensor([0, 1, 7, 2]), r"class 7 is not in 0\.\.2"),
        (torch.tensor([0, 1]), r"condition: \(2,\) classes given for 4 samples"),
        (torch.zeros(4, 1), r"condition: \(4, 1\) classes given for 4 samples"),
    ],
)
def test_classes_are_checked(conditional, condition, message):
    with pytest.raises(UserError, match=message):
        conditional.sample(4, num_steps=2, condition=condition)


def test_classes_need_a_model_and_data_with_classes(model):
    with pytest.raises(UserError, match="trained without classes"):
        model.sample(2, num_steps=2, condition=1)
    with pytest.raises(UserError, match=r"method\.conditional: true needs data with classes"):
        DDPMConfig(network=UNET, conditional=True).build(DIGITS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_step": 5}, ConfigError, "num_step: unknown field; did you mean 'num_steps'"),
        ({"solver": "huen"}, ConfigError, "solver.*'huen'; did you mean 'heun'"),
        ({"solver.etta": 0.5}, ConfigError, "etta: unknown field; did you mean 'eta'"),
        ({"solver.eta": 1.5}, ConfigError, r"solver\.eta.*less than or equal to 1"),
        ({"spacing": "evn"}, ConfigError, "spacing: 'evn'"),
        ({"num_steps": 0}, ConfigError, "num_steps: 0.*greater than or equal to 1"),
        ({"num_steps": 1001}, UserError, "num_steps: 1001 is more than the 1000 steps"),
        ({"num_steps": 900, "spacing": "quadratic"}, UserError, "different steps of 1000 for 900"),
        ({"seed": -1}, UserError, "seed: -1 is not valid"),
        ({"seed": 2**63}, UserError, "seed: 9223372036854775808 is not valid"),
        ({"batch_size": 0}, UserError, "batch_size: 0 is not valid"),
    ],
)
def test_refused_options(model, options, error, message):
    with pytest.raises(error, match=message):
        model.sample(2, **options)


@pytest.mark.parametrize("count", [0, -4])
def test_at_least_one_sample(model, count):
    with pytest.raises(UserError, match=f"num_samples: {count} is not valid: must be at least 1"):
        model.sample(count)


def test_the_largest_seed_works(model):
    assert model.sample(1, seed=2**63 - 1, num_steps=1).data.shape == (1, 1, 8, 8)


def test_options_leave_the_model_as_it_was(model):
    before = model.config.to_json()
    changed = model.sampling(num_steps=7, solver="heun", spacing=None)
    assert (changed.num_steps, changed.solver.kind, changed.spacing) == (7, "heun", "even")
    assert model.config.to_json() == before
    assert model.sampling(**{"solver.eta": 0.25}).solver == DDIM(eta=0.25)


def test_fixed_large_warns_and_fixed_small_does_not(model, recwarn):
    with pytest.warns(UserWarning, match="fixed_large variance with 5 of 1000 steps"):
        model.sample(1, num_steps=5, solver={"kind": "ancestral", "variance": "fixed_large"})
    recwarn.clear()
    model.sample(1, num_steps=5, solver="ancestral")
    assert not recwarn.list


def test_sampling_comes_before_training_without_harm():
    # Tables first made inside inference mode must still serve the loss.
    model = DDPMConfig(network=MLP, schedule=LinearSchedule(num_steps=321)).build(POINTS)
    model.sample(2, num_steps=3)
    model.loss(Batch(torch.randn(4, 2)), StepDraws(0, 0, 0, 4, 4)).per_item.mean().backward()
    assert math.isfinite(float(model.networks()[0].head[-1].weight.grad.sum()))


# --- a learned variance ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned():
    return perturbed(IDDPMConfig(network=UNET, schedule=CosineSchedule(num_steps=200)).build(DIGITS))


def test_a_learned_variance_is_sampled_from_by_default(learned):
    want = learned.sample(5, num_steps=20, seed=2)
    assert (want.nfe, tuple(want.data.shape)) == (20, (5, 1, 8, 8))
    assert torch.equal(want.data, want.data.round())
    assert torch.equal(learned.sample(5, num_steps=20, seed=2, **{"solver.variance": "learned_range"}).data, want.data)
    assert torch.equal(learned.sample(5, num_steps=20, seed=2, batch_size=2).data, want.data)
    for variance in ("fixed_small", "fixed_large"):
        solver = {"kind": "ancestral", "variance": variance}
        with pytest.warns(UserWarning, match="leaves noise") if variance == "fixed_large" else nullcontext():
            assert not torch.equal(learned.sample(5, num_steps=20, seed=2, solver=solver).data, want.data)


@pytest.mark.parametrize(("v", "variance"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_at_the_ends_of_its_range_it_is_a_fixed_variance(v, variance):
    config = IDDPMConfig(network=MLP, schedule=CosineSchedule(num_steps=200), sampling={"num_steps": 200})
    model = perturbed(config.build(DIGITS), 0.2)
    with torch.no_grad():  # the second half of the outputs is v
        model.networks()[0].head[-1].weight[64:] = 0
        model.networks()[0].head[-1].bias[64:] = v
    run = lambda kind: model.generate(  # noqa: E731
        SampleDraws(0, 0, 4), model.sampling(solver={"kind": "ancestral", "variance": kind}), None, lambda *_: None
    )[0]
    assert torch.allclose(run("learned_range"), run(variance), atol=1e-4)
    assert not torch.allclose(run("learned_range"), run({"fixed_small": "fixed_large"}.get(variance, "fixed_small")))


@pytest.mark.parametrize("kind", list(SOLVERS.entries))
def test_a_model_with_a_learned_variance_takes_every_solver(learned, kind):
    samples = learned.sample(3, num_steps=4, solver=kind)
    assert samples.data.min() >= 0
    assert samples.data.max() <= 16
    assert samples.nfe == SOLVERS.parse(kind).evaluations(4)


def test_a_learned_variance_needs_a_model_that_has_learned_one(model):
    message = (
        "solver.variance: learned_range needs a model with a learned variance (train with variance=learned_range "
        "objective=hybrid); this one has 'fixed_small'"
    )
    solver = Ancestral(variance="learned_range")
    with pytest.raises(UserError) as refusal:
        model.sample(2, num_steps=2, solver=solver)
    assert str(refusal.value) == message
    # Before training, not after.
    with pytest.raises(UserError) as refusal:
        DDPMConfig(network=MLP, sampling={"solver": solver}).build(DIGITS)
    assert str(refusal.value) == f"sampling.{message}"
