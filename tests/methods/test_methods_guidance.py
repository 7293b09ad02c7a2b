"""Classes that are not always told, and estimates that stress them."""

import pytest
import torch

from osmose.configuration import ConfigError
from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.denoiser import Conditioned
from osmose.gaussian.draws import StepDraws
from osmose.methods import METHODS
from osmose.methods.messages import Batch

SPEC = DataSpec(kind="points", shape=(2,), num_classes=3)
MLP = {"kind": "mlp", "width": 16, "depth": 1}


def built(kind="edm", **options):
    torch.manual_seed(0)
    values = {"kind": kind, "network": MLP, "conditional": True, "label_dropout": 0.2} | options
    model = METHODS.parse(values).build(SPEC)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("kind", ["edm", "ddpm"])
def test_guided_estimates_are_the_formula(kind):
    model = built(kind)
    level = model.schedule.level(torch.tensor([0.3, 0.6, 0.9]))
    x, condition = torch.randn(3, 2, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2])
    told, untold = (model.denoiser(x, level, c) for c in (condition, None))
    for g in (0.5, 1.0, 3.0):
        guided = Conditioned(model.denoiser, condition, None, g)
        torch.testing.assert_close(guided(x, level), untold + g * (told - untold))
        assert guided.calls == 2
    limited = Conditioned(model.denoiser, condition, (-0.1, 0.1), 3.0)(x, level)
    torch.testing.assert_close(limited, (untold + 3 * (told - untold)).clamp(-0.1, 0.1))


def test_guidance_of_one_is_none_and_others_cost_twice():
    model = built()
    plain, one, more = (model.sample(6, num_steps=4, guidance=g) for g in (None, 1.0, 2.0))
    torch.testing.assert_close(plain.data, one.data)
    assert (plain.data - more.data).abs().max() > 1e-3
    assert (plain.nfe, one.nfe, more.nfe) == (7, 14, 14)


def test_a_learned_variance_is_that_of_the_class():
    spec = DataSpec(kind="image", shape=(1, 4, 4), range=(0, 4), levels=5, shift=(2.0,), scale=(2.0,), num_classes=3)
    torch.manual_seed(0)
    values = {"kind": "iddpm", "network": MLP, "conditional": True, "label_dropout": 0.2}
    model = METHODS.parse(values).build(spec)
    assert model.eval().sample(3, num_steps=3, guidance=2.0).nfe == 6


def test_in_training_so_many_items_are_not_told_their_class():
    model = built(label_dropout=0.3)
    seen = []
    model.denoiser.network.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    batch = Batch(torch.zeros(4000, 2), torch.arange(4000) % 3)
    losses = [model.train().loss(batch, StepDraws(0, 0, 0, 4000, 4000)).per_item for _ in range(2)]
    hidden = seen[0] < 0
    assert float(hidden.double().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(seen[0][~hidden], batch.condition[~hidden])
    assert torch.equal(*losses)
    # Validation tells all of them, and what is drawn besides is as without.
    model.eval().loss(batch, StepDraws(0, 0, 0, 4000, 4000))
    assert torch.equal(seen[2], batch.condition)
    other = built(label_dropout=0.0).train().loss(batch, StepDraws(0, 0, 0, 4000, 4000)).per_item
    torch.testing.assert_close(other[~hidden], losses[0][~hidden])


def test_what_is_refused():
    with pytest.raises(ConfigError, match=r"label_dropout: 0.2 needs conditional=true: no class is told"):
        METHODS.parse({"kind": "edm", "network": MLP, "label_dropout": 0.2})
    with pytest.raises(
        UserError, match=r"guidance: 2 needs a run that can do without classes: train with --conditional"
    ):
        built(label_dropout=0.0).sample(2, guidance=2.0)
    with pytest.raises(ConfigError, match="guidance: 0 is not valid"):
        built().sample(2, guidance=0)
    with pytest.raises(ConfigError, match="guidance: unknown field"):
        METHODS.parse({"kind": "dspd", "network": {"kind": "rnn"}, "sampling": {"guidance": 2.0}})
