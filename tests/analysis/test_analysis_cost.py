"""Operations are counted exactly, times are those of whole steps, and nothing measured is changed."""

import pytest
import torch

from osmose.analysis import cost
from osmose.analysis.cost import cost_of, macs_of, num_parameters, seconds_per_step
from osmose.data.dataset import DataSpec
from osmose.methods import METHODS
from osmose.networks import NETWORKS
from osmose.training.config import TrainingConfig
from osmose.training.optimizers import Adam


def model_of(network, shape, **values):
    spec = DataSpec(kind="image" if len(shape) == 3 else "points", shape=shape, num_classes=3)
    return METHODS.resolve("ddpm").parse({"network": network, **values}).build(spec)


MLP = {"kind": "mlp", "width": 16, "depth": 2, "dropout": 0.5}
UNET = {"kind": "unet", "channels": 8, "mult": [1, 2], "blocks": 1, "attention": [4], "dropout": 0.5}

#: Billions of multiply-adds for an image of 32x32, as published, and as computed.
PUBLISHED = {
    "ddpm-cifar10": (6.22, 5_781_454_848),
    "deepres1": (4.20, 3_755_737_088),
    "shallowres2": (6.17, 5_753_405_440),
    "shallowres1": (4.20, 3_777_232_896),
    "mbconv64": (1.39, 1_281_859_584),
    "mbconv96": (3.04, 2_794_125_312),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_operations_of_published_networks(name):
    model, config = model_of({"kind": name, "channels": 4}, (3, 32, 32)), NETWORKS.parse(name)
    with torch.device("meta"):  # counted without being computed
        model.denoiser.network = config.build((3, 32, 32))
    macs = macs_of(model)
    published, computed = PUBLISHED[name]
    assert macs == computed
    # Upsampling and its convolution are one transposed convolution: 16 instead of 36 for each input pixel.
    widths = [config.channels * mult for mult in config.mult]
    saved = sum(20 * (32 >> level) ** 2 * widths[level] ** 2 for level in range(1, len(widths)))
    assert round((macs + saved) / 1e9, 2) == published


def test_operations_by_hand():
    model = model_of(MLP, (2,))
    embedding, stem, blocks, head = 2 * 16**2, 2 * 16, 2 * 2 * 16**2, 16 * 2
    assert macs_of(model) == embedding + stem + blocks + head
    assert cost_of(model, batch_size=5, repeats=1).macs == macs_of(model)


@pytest.mark.parametrize("network", [MLP, UNET], ids=["mlp", "unet"])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_measured_is_changed(network, conditional, training):
    shape = (1, 8, 8) if network is UNET else (2,)
    model = model_of(network, shape, conditional=conditional).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    told = cost_of(model, batch_size=4, repeats=1)
    step = seconds_per_step(model, TrainingConfig(batch_size=4, accumulate=2, clip_grad=None), repeats=1)
    assert told.parameters == num_parameters(model) == sum(value.numel() for value in model.parameters())
    assert told.seconds > 0
    assert step.seconds > 0
    assert step.items == 2
    assert model.training is training
    assert all(value.grad is None for value in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where a test says so."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(cost, "time", clock)
    advance = Adam.advance

    def update(*given, **options):
        clock.now += 0.05
        return advance(*given, **options)

    monkeypatch.setattr(Adam, "advance", update)
    return clock


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "items", "seconds"),
    [
        (4, 1, 4, 4 * 0.1 + 0.05),
        (6, 1, 6, 6 * 0.1 + 0.05),  # not only powers of two
        (64, 1, 8, 64 * 0.1 + 0.05),  # 16 would take more than a second: 8 are measured
        (64, 16, 4, 64 * 0.1 + 0.05),  # 16 passes of 4, one update
    ],
)
def test_a_step_is_its_passes_and_one_update(clock, monkeypatch, batch_size, accumulate, items, seconds):
    model = model_of(MLP, (2,))
    backward = torch.Tensor.backward

    def slow_backward(loss, *given):
        clock.now += 0.07 * clock.items
        return backward(loss, *given)

    def forward(_, given, __):
        clock.items = len(given[0])
        clock.now += 0.03 * clock.items

    monkeypatch.setattr(torch.Tensor, "backward", slow_backward)
    model.networks()[0].register_forward_hook(forward)  # the copy that is trained keeps it
    step = seconds_per_step(model, TrainingConfig(batch_size=batch_size, accumulate=accumulate))
    assert step.items == items
    assert step.seconds == pytest.approx(seconds)


def test_an_evaluation_is_shared_by_its_items(clock):
    model = model_of(MLP, (2,))
    seen = []

    def forward(_, given, __):
        seen.append(len(given[0]))
        clock.now += 0.2 + 0.1 * len(given[0])

    model.networks()[0].register_forward_hook(forward)
    assert cost_of(model, batch_size=3).seconds == pytest.approx((0.2 + 0.1 * 3) / 3)
    assert cost_of(model, batch_size=50).seconds == pytest.approx((0.2 + 0.1 * 4) / 4)  # 8 might take too long
    assert max(seen) == 4


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_step_is_in_the_precision_of_training(precision, dtype):
    model = model_of(MLP, (2,))
    seen = []
    model.denoiser.network.stem.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    assert seconds_per_step(model, TrainingConfig(batch_size=2, precision=precision)).precision == precision
    assert set(seen) == {dtype}


def test_data_are_such_as_training_sees(monkeypatch):
    spec = DataSpec(kind="image", shape=(1, 8, 8), range=(0, 16), levels=17, shift=(8,), scale=(8,))
    model = METHODS.resolve("ddpm").parse({"network": UNET}).build(spec)
    seen = []
    loss = type(model).loss

    def watched(self, batch, draws):
        seen.append(batch.x0)
        return loss(self, batch, draws)

    monkeypatch.setattr(type(model), "loss", watched)
    seconds_per_step(model, TrainingConfig(batch_size=4), repeats=1)
    values = torch.cat(seen)
    assert float(values.min()) >= -1
    assert float(values.max()) <= 1
    assert torch.allclose((values * 8).round(), values * 8, atol=1e-5)
