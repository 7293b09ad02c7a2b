import pytest
import torch

from osmose.data.dataset import DataConfig
from osmose.errors import UserError
from osmose.gaussian.derivatives import jacobian, products, with_divergence
from osmose.methods.messages import Batch
from osmose.networks import NETWORKS
from osmose.networks.conservative import Conservative
from osmose.training.recipes import checked, recipe, train

SMALL = {
    "mlp": ((5,), {"kind": "mlp", "width": 16, "depth": 2}),
    "unet": ((1, 4, 4), {"kind": "unet", "channels": 8, "mult": [1, 2], "blocks": 1, "attention": [2]}),
    "dit": ((1, 4, 4), {"kind": "dit", "width": 16, "depth": 2, "heads": 2, "patch": 2}),
    "uvit": ((1, 4, 4), {"kind": "uvit", "width": 16, "depth": 2, "heads": 2, "patch": 2}),
}


def built(shape, inner, **options):
    torch.manual_seed(0)
    network = NETWORKS.parse({"kind": "conservative", "network": inner}).build(shape, **options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network.double()


@pytest.mark.parametrize("name", list(SMALL))
def test_its_jacobian_is_symmetric_whatever_the_weights(name):
    shape, inner = SMALL[name]
    network = built(shape, inner)
    x = torch.randn(2, *shape, dtype=torch.float64)
    label = torch.tensor([3.0, 800.0], dtype=torch.float64)
    with torch.inference_mode():
        value, whole = jacobian(lambda x: network(x, label), x)
        assert torch.allclose(network(x, label), value, atol=1e-12)
    assert float((whole - whole.mT).square().sum() / whole.square().sum()) < 1e-24
    assert float(whole.square().sum()) > 1e-6
    pushed, pulled = products(lambda x: network(x, label), x, torch.randn_like(x))
    assert torch.allclose(pushed, pulled, atol=1e-10)
    # It is the gradient of the sum of the other network's values.
    x = x.requires_grad_()
    (want,) = torch.autograd.grad(network.network(x, label).sum(), x)
    assert torch.allclose(want, value, atol=1e-12)


def test_it_begins_at_nothing_and_learns_and_is_told_classes():
    network = NETWORKS.parse({"kind": "conservative"}).build((3,), num_classes=2)
    assert type(network.network).__name__ == "MLP"
    x, label, classes = torch.randn(4, 3), torch.full((4,), 5.0), torch.tensor([0, 1, 0, 1])
    assert not network(x, label, classes).any()
    network(x, label, classes).sub(x).square().sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
    with torch.no_grad():
        out = network(x, label, classes)
    assert not out.requires_grad


def test_a_run_of_it_trains_samples_and_has_a_symmetric_score(tmp_path):
    data = DataConfig(source="toy:two-moons", num_points=200)
    changes = {"network": {"kind": "conservative", "network": {"kind": "mlp", "width": 16, "depth": 1}}}
    short = {"training.steps": 3, "training.batch_size": 16, "training.preview_samples": 4}
    run = train("edm", data, tmp_path / "run", progress=False, **changes, **short)
    model = run.model()
    assert isinstance(model.denoiser.network, Conservative)
    drawn = model.sample(5, num_steps=3, seed=0)
    assert drawn.data.isfinite().all()
    x = Batch.of(data.load(), "train", torch.arange(4), False, "cpu").x0
    _, whole = jacobian(lambda y: model.score_field().score(y, 0.5), x)
    assert torch.allclose(whole, whole.mT, atol=1e-4)
    with torch.inference_mode():
        assert with_divergence(model.score_field().at(0.5), x, None)[1].isfinite().all()


def test_refused():
    digits = DataConfig(source="digits")
    config = recipe("iddpm", digits, digits.load(), 0, {"network": "conservative"})
    with pytest.raises(UserError, match=r"conservative gives the gradient of one energy.*use variance=fixed_small"):
        config.method.build(config.spec)
    ours = {"network": "conservative", "training.compile": True}
    with pytest.raises(UserError, match=r"training.compile: true given, but a network that is conservative is differ"):
        checked(recipe("edm", digits, digits.load(), 0, ours))
    linear = {"kind": "conservative", "network": {"kind": "mlp", "linear": True}}
    with pytest.raises(UserError, match=r"network.network: a network with a linear prediction of its own"):
        NETWORKS.parse(linear).build((3,))
