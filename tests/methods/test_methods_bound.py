import json
import math
from typing import Literal

import pytest
import torch
from torch import nn

from osmose.analysis.likelihood import Likelihood, likelihood, write_likelihood
from osmose.data.dataset import Dataset, DataSpec
from osmose.errors import UserError
from osmose.gaussian.chain import LevelDecoder, ReverseChain
from osmose.gaussian.draws import SampleDraws
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.oracles import MixtureDenoiser
from osmose.gaussian.schedule import CosineSchedule, LinearSchedule, VarianceExploding
from osmose.methods.diffusion import DDPMConfig, EDMConfig
from osmose.methods.messages import Batch
from osmose.methods.objectives import Problem, SimpleObjective, VLBObjective
from osmose.networks.base import NetworkConfig
from osmose.networks.mlp import MLPConfig

LEVELS = DataSpec(kind="image", shape=(1, 4, 4), range=(0.0, 16.0), levels=17, shift=(8.0,), scale=(8.0,))
CLASSES = LEVELS.replace(num_classes=3)
POINTS = DataSpec(kind="points", shape=(2,))
PICTURES = DataSpec(kind="image", shape=(1, 4, 4), range=(0.0, 1.0), shift=(0.5,), scale=(0.5,))
MLP = MLPConfig(width=16, depth=1, dropout=0.2)
T = 50
LINEAR = LinearSchedule(num_steps=T)


def build(spec=LEVELS, cls=DDPMConfig, **parts):
    """A small model with weights that are not zero, the same each time."""
    torch.manual_seed(0)
    parts = {"network": MLP, **({"schedule": LINEAR} if cls is DDPMConfig else {}), **parts}
    model = cls(**parts).build(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


LEARNED = {"variance": "learned_range", "objective": "hybrid"}


def items_of(count, spec=LEVELS, seed=0):
    """Data on its levels, data units."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, *spec.shape, generator=generator) * 3 + 8).round().clamp(0, 16)


def dataset_of(spec=LEVELS, train=12, held_out=9):
    labels = torch.arange(train + held_out) % 3 if spec.num_classes else None
    x = items_of(train + held_out, spec)
    return Dataset(
        source="test",
        spec=spec,
        train=x[:train],
        held_out=x[train:],
        split="by position",
        train_labels=None if labels is None else labels[:train],
        held_out_labels=None if labels is None else labels[train:],
    )


class Fixed:
    """Draws that give the same noise again and again."""

    def __init__(self, noise):
        self.noise, self.count = noise, len(noise)

    def normal(self, event_shape):
        assert self.noise.shape[1:] == event_shape
        return self.noise


def bound(model, x0, draws=None, on_step=lambda *_: None, **options):
    with torch.inference_mode():
        return model.bound(Batch(x0), draws or SampleDraws(3, 0, len(x0)), on_step, **options)


# --- what the bound is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("schedule", [LINEAR, CosineSchedule(num_steps=T)], ids=lambda s: s.kind)
def test_it_is_the_mean_of_the_vlb_objective_over_all_times(variance, schedule):
    learned = {"objective": "vlb"} if variance == "learned_range" else {}
    model = build(schedule=schedule, variance=variance, parametrization="v", **learned)
    x0 = model.spec.encode(items_of(5))
    noise = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    got = bound(model, x0, Fixed(noise), clip=False)
    chain = ReverseChain(TimeGrid.of(schedule, T))
    problem = Problem(model.denoiser, variance, chain, LevelDecoder(-1.0, 1.0, 17))
    summands = []
    for k in range(1, T + 1):
        t = torch.full((5,), k / T, dtype=torch.float64)
        terms = VLBObjective().losses(problem, Batch(x0), t, [noise].__getitem__).per_item
        assert torch.allclose(got.steps[:, k - 1] * T / math.log(2), terms.double(), rtol=1e-4, atol=1e-6)
        summands.append(terms.double())
    assert torch.allclose(torch.stack(summands).mean(0), got.steps.sum(1) / math.log(2), rtol=1e-5)
    assert torch.equal(got.t, torch.tensor([k / T for k in range(1, T + 1)], dtype=torch.float64))
    assert torch.allclose(got.prior, chain.prior_term(x0.double(), 1.0))
    assert {value.dtype for value in (got.t, got.prior, got.steps, got.x0_error, got.eps_error)} == {torch.float64}
    assert got.steps.shape == got.x0_error.shape == got.eps_error.shape == (5, T)


def test_its_noise_error_is_l_simple_whatever_the_parametrization():
    x0 = LEVELS.encode(items_of(5))
    noise = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    for parametrization in ("eps", "v", "x0"):
        model = build(parametrization=parametrization)
        got = bound(model, x0, Fixed(noise), clip=True)
        for k in (1, 7, T):
            level = model.schedule.level(torch.full((5,), k / T, dtype=torch.float64))
            x_t = level.alpha.float()[0] * x0 + level.sigma.float()[0] * noise
            x0_hat = model.denoiser(x_t, level)
            eps_hat = (x_t - level.alpha[0].float() * x0_hat) / level.sigma[0].float()
            want = (noise - eps_hat).square().flatten(1).mean(1).double()
            assert torch.allclose(got.eps_error[:, k - 1], want, rtol=2e-3)
            kept = (x0 - x0_hat.clamp(-1, 1)).square().flatten(1).mean(1).double()
            assert torch.allclose(got.x0_error[:, k - 1], kept, rtol=1e-4)
        if parametrization == "eps":
            problem = Problem(model.denoiser, "fixed_small", None, None)
            t = torch.full((5,), 7 / T, dtype=torch.float64)
            loss = SimpleObjective().losses(problem, Batch(x0), t, [noise].__getitem__).per_item
            assert torch.allclose(got.eps_error[:, 6], loss.double(), rtol=1e-4)


def test_every_step_has_a_noise_of_its_own():
    model, seen = build(), []
    model.networks()[0].register_forward_pre_hook(lambda _, given: seen.append(given))
    x0, steps = LEVELS.encode(items_of(3)), []
    bound(model, x0, on_step=lambda *done: steps.append(done))
    assert steps == [(k, T) for k in range(1, T + 1)]
    assert [len(x) for x, _, _ in seen] == [3] * T
    assert [float(label[0]) for _, label, _ in seen] == pytest.approx([(k - 1) * 1000 / T for k in range(1, T + 1)])
    levels = [model.schedule.level(k / T) for k in range(1, T + 1)]
    noises = [(x - float(at.alpha) * x0) / float(at.sigma) for (x, _, _), at in zip(seen, levels, strict=True)]
    flat = torch.stack(noises).flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(T)).abs().max() < 0.65
    assert flat.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_another_variance_can_be_asked_for(variance):
    x0 = LEVELS.encode(items_of(4))
    learned = build(**LEARNED)
    own, other = bound(learned, x0), bound(learned, x0, variance=variance)
    assert not torch.allclose(own.steps, other.steps, rtol=1e-2)
    assert torch.equal(own.x0_error, other.x0_error)
    # It is what the same mean has in a model with that variance.
    plain = build(variance=variance)
    weights = learned.networks()[0].state_dict()
    plain.networks()[0].load_state_dict({k: v[:16] if k.startswith("head.2.") else v for k, v in weights.items()})
    assert torch.allclose(bound(plain, x0).steps, other.steps, rtol=1e-4, atol=1e-9)
    assert torch.equal(bound(learned, x0, variance="learned_range").steps, own.steps)


def test_clipping_keeps_the_estimate_in_the_data_s_range():
    model, x0 = build(), LEVELS.encode(items_of(6))
    clipped, free = bound(model, x0), bound(model, x0, clip=False)
    assert torch.equal(clipped.eps_error, free.eps_error)
    assert bool((clipped.x0_error <= free.x0_error).all())
    assert clipped.x0_error.max() <= 4
    assert free.x0_error.max() > 10
    assert bool((clipped.steps[:, 1:].sum(1) < free.steps[:, 1:].sum(1)).all())


@pytest.mark.parametrize("num_steps", [1, 2, 10, T])
def test_fewer_steps_are_the_strided_chain(num_steps):
    model, x0, seen = build(), LEVELS.encode(items_of(4)), []
    model.networks()[0].register_forward_pre_hook(lambda _, given: seen.append(float(given[1][0])))
    got = bound(model, x0, num_steps=num_steps)
    want = [1 + round(i * (T - 1) / (num_steps - 1)) for i in range(num_steps)] if num_steps > 1 else [T]
    assert torch.equal(got.t, torch.tensor(want, dtype=torch.float64) / T)
    assert seen == pytest.approx([(k - 1) * 1000 / T for k in want])
    assert got.steps.shape == (4, num_steps)
    assert bool(got.steps.isfinite().all())


def test_a_continuous_schedule_has_a_bound_of_a_thousand_steps():
    model, steps = build(cls=EDMConfig, network=MLPConfig(width=8, depth=1)), []
    got = bound(model, LEVELS.encode(items_of(2)), on_step=lambda *done: steps.append(done))
    assert got.steps.shape == (2, 1000)
    assert steps[-1] == (1000, 1000)
    assert bool(got.steps.isfinite().all())
    # L_T is all but nothing at a noise of 80.
    assert got.prior.max() < 1e-4


def test_classes_are_told():
    model = build(CLASSES, conditional=True)
    x0 = LEVELS.encode(items_of(3))
    totals = []
    for classes in ([0, 1, 2], [2, 1, 0]):
        with torch.inference_mode():
            batch = Batch(x0, torch.tensor(classes))
            totals.append(model.bound(batch, SampleDraws(3, 0, 3), lambda *_: None).steps.sum(1))
    assert totals[0][1] == pytest.approx(totals[1][1].item(), rel=1e-5)
    assert not torch.allclose(totals[0][[0, 2]], totals[1][[0, 2]], rtol=1e-4)


# --- what it is good for --------------------------------------------------------------------------------------------

#: The law of every pixel, over the levels -1, -1/2, 0, 1/2, 1.
LAW = torch.tensor([0.35, 0.05, 0.1, 0.2, 0.3], dtype=torch.float64)
FIVE = DataSpec(kind="image", shape=(1, 4, 4), range=(0.0, 4.0), levels=5, shift=(2.0,), scale=(2.0,))


class OracleNetwork(nn.Module):
    """E[x0 | x_t] of independent pixels with the law `LAW`, or of a Gaussian of the same mean and variance."""

    def __init__(self, schedule, exact, scale):
        super().__init__()
        self.schedule, self.scale = schedule, scale
        self.unused = nn.Parameter(torch.zeros(()))
        centres = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
        mean = LAW @ centres[:, 0]
        std = float((LAW @ centres[:, 0].square() - mean**2).sqrt())
        if exact:
            self.denoiser = MixtureDenoiser(centres, 0.0, LAW)
        else:
            self.denoiser = MixtureDenoiser(mean.view(1, 1), std, torch.ones(1, dtype=torch.float64))

    def forward(self, x, label, condition=None):  # noqa: ARG002
        steps = self.schedule.native_steps
        t = (round(float(label[0]) * steps / 1000) + 1) / steps
        assert bool((label == label[0]).all())
        level = type(self.schedule.level(t))(*(float(value) for value in self.schedule.level(t)))
        return (self.scale * self.denoiser(x.double().view(-1, 1), level)).view_as(x).to(x)


class Oracle(NetworkConfig):
    kind: Literal["oracle"] = "oracle"
    exact: bool = True
    scale: float = 1.0
    num_steps: int = T

    def build(self, event_shape, *, num_classes=None, num_outputs=1):  # noqa: ARG002
        return OracleNetwork(LinearSchedule(num_steps=self.num_steps), self.exact, self.scale)


def five_of(count):
    """Items with the law `LAW`, model units."""
    x = torch.multinomial(LAW, count * 16, replacement=True, generator=torch.Generator().manual_seed(0))
    return FIVE.encode(x.view(count, 1, 4, 4).float())


def test_coarser_chains_cost_bits():
    # All from t = 1 to the quietest step; what that leaves to the decoder depends on its variance.
    model, x0 = build(FIVE, network=Oracle(), parametrization="x0"), five_of(50)
    totals = [bound(model, x0, num_steps=n).steps[:, 1:].sum(1).mean().item() for n in (T, 20, 5, 2)]
    assert totals == sorted(totals)
    assert totals[-1] > totals[0] + 0.5


def test_the_bound_lies_above_the_entropy_and_better_denoisers_are_nearer():
    x0 = five_of(20)
    # The surprise of the pixels drawn, whose mean is the entropy.
    surprise = -LAW[(2 * x0 + 2).long()].log2().mean().item()
    assert surprise == pytest.approx(-(LAW * LAW.log2()).sum().item(), abs=0.15)
    found = []
    for network in (Oracle(num_steps=1000), Oracle(num_steps=1000, exact=False), Oracle(num_steps=1000, scale=0.9)):
        model = build(FIVE, network=network, parametrization="x0", schedule=LinearSchedule())
        got = bound(model, x0)
        found.append(((got.prior + got.steps.sum(1)).mean() / math.log(2)).item())
    assert surprise < found[0] < surprise + 0.08
    assert found[0] + 0.5 < min(found[1:])


# --- over a data set ------------------------------------------------------------------------------------------------


def test_the_numbers_belong_together():
    model, seen = build(), []
    result = likelihood(model, dataset_of(), batch_size=4, on_step=lambda *done: seen.append(done))
    assert isinstance(result, Likelihood)
    assert result.per_item.shape == (9,)
    assert result.terms.shape == result.t.shape == result.distortion.shape == result.eps_error.shape == (T,)
    assert result.bits == pytest.approx(result.per_item.mean().item())
    assert result.bits == pytest.approx(result.prior + result.terms.sum().item(), rel=1e-9)
    assert result.standard_error == pytest.approx(result.per_item.std().item() / 3, rel=1e-9)
    # Decoding goes from noise to data: the first estimate costs L_T, the last all but what the decoder adds.
    later = [result.prior + sum(result.terms[k:].tolist()) for k in range(1, T + 1)]
    assert result.rate.tolist() == pytest.approx(later, rel=1e-9)
    assert result.rate[-1] == result.prior
    assert result.rate[0].item() + result.terms[0].item() == pytest.approx(result.bits, rel=1e-9)
    assert seen == [(i, 3 * T) for i in range(1, 3 * T + 1)]
    assert result.conditions == {
        "part": "held-out",
        "n": 9,
        "num_steps": T,
        "variance": "fixed_small",
        "clip": True,
        "seed": 0,
        "levels": 17,
    }


def test_bits_are_nats_over_log_2_of_the_items_as_the_model_sees_them():
    model, data = build(), dataset_of()
    result = likelihood(model, data, seed=3, num_steps=5)
    each = {}
    for row, x in enumerate(model.spec.encode(data.held_out)):
        # The noise of an item goes by its place among those chosen, the same for any batch.
        for place in range(9):
            got = bound(model, x[None], SampleDraws(3, place, 1), num_steps=5)
            each[row, place] = (got.prior + got.steps.sum(1)).item() / math.log(2)
    rows = [min(range(9), key=lambda row: abs(each[row, p] - result.per_item[p].item())) for p in range(9)]
    assert sorted(rows) == list(range(9))
    assert [each[row, p] for p, row in enumerate(rows)] == pytest.approx(result.per_item.tolist(), rel=1e-5)


def test_the_batch_size_changes_nothing_and_the_seed_everything():
    model, data = build(**LEARNED), dataset_of()
    want = likelihood(model, data, batch_size=9)
    for batch_size in (1, 4, 256):
        got = likelihood(model, data, batch_size=batch_size)
        torch.testing.assert_close(got.per_item, want.per_item, rtol=1e-4, atol=0)
        torch.testing.assert_close(got.terms, want.terms, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(got.distortion, want.distortion, rtol=1e-4, atol=0)
    again = likelihood(model, data, batch_size=9)
    assert torch.equal(again.per_item, want.per_item)
    other = likelihood(model, data, batch_size=9, seed=1)
    assert not torch.allclose(other.per_item.sort().values, want.per_item.sort().values, rtol=1e-4)


def test_parts_and_subsets():
    model, data = build(CLASSES, conditional=True), dataset_of(CLASSES)
    options = {"num_steps": 3}
    assert len(likelihood(model, data, **options).per_item) == 9
    assert len(likelihood(model, data, part="train", **options).per_item) == 12
    few = likelihood(model, data, n=4, **options)
    assert few.conditions["n"] == 4
    # A subset is the first of the whole in the seed's order, with the same noise.
    whole = likelihood(model, data, **options).per_item
    torch.testing.assert_close(few.per_item, whole[:4], rtol=1e-5, atol=0)
    assert likelihood(model, data, n=9, **options).per_item.equal(whole)
    # An item keeps its class: with the labels of others the numbers are others.
    mixed = Dataset(**{**data.__dict__, "held_out_labels": data.held_out_labels.roll(1)})
    assert not torch.allclose(likelihood(model, mixed, **options).per_item, whole, rtol=1e-4)


def test_a_seed_chooses_the_items_and_they_keep_their_classes(monkeypatch):
    model, data = build(CLASSES, conditional=True), dataset_of(CLASSES)
    own, seen, found = model.bound, [], []

    def spy(batch, *args, **options):
        seen.extend(zip(batch.x0, batch.condition.tolist(), strict=True))
        found.append(own(batch, *args, **options))
        return found[-1]

    monkeypatch.setattr(model, "bound", spy)
    chosen = []
    for seed in range(4):
        seen.clear()
        found.clear()
        result = likelihood(model, data, n=5, num_steps=3, seed=seed, batch_size=2)
        every = model.spec.encode(data.held_out)
        rows = [next(row for row in range(9) if torch.equal(every[row], x)) for x, _ in seen]
        assert [label for _, label in seen] == data.held_out_labels[rows].tolist()
        assert len(set(rows)) == 5
        chosen.append(tuple(rows))
        assert torch.allclose(result.distortion, torch.cat([terms.x0_error for terms in found]).mean(0).sqrt())
        assert torch.allclose(result.eps_error, torch.cat([terms.eps_error for terms in found]).mean(0))
    assert len(set(chosen)) == 4


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_is_evaluated_and_put_back(mode):
    model, data = build().train(mode), dataset_of()
    state = torch.get_rng_state()
    first = likelihood(model, data, num_steps=3)
    assert torch.equal(likelihood(model, data, num_steps=3).per_item, first.per_item)  # dropout is off
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training is model.networks()[0].training is mode
    with pytest.raises(UserError):
        likelihood(model, data, num_steps=T + 1)
    assert model.training is model.networks()[0].training is mode


@pytest.mark.parametrize("num_steps", [1, 7])
def test_files(tmp_path, num_steps, recwarn):
    result = likelihood(build(**LEARNED), dataset_of(), num_steps=num_steps)
    paths = write_likelihood(result, tmp_path / "new")
    assert [path.name for path in paths] == ["likelihood.json", "likelihood.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["likelihood.json", "likelihood.png"]
    stored = json.loads(paths[0].read_text())
    assert stored == json.loads(json.dumps(result.to_json()))
    assert stored["bits_per_dim"] == result.bits
    assert stored["decoder"] + stored["transitions"] + stored["prior"] == pytest.approx(stored["bits_per_dim"])
    assert len(stored["terms"]) == len(stored["t"]) == len(stored["distortion"]) == len(stored["eps_error_by_t"])
    assert stored["num_steps"] == len(stored["t"]) == num_steps
    assert stored["eps_error"] == pytest.approx(sum(stored["eps_error_by_t"]) / num_steps)
    assert stored["levels"] == 17
    assert stored["variance"] == "learned_range"
    assert not recwarn.list


def test_one_item_has_no_standard_error():
    data = dataset_of(held_out=1)
    with pytest.raises(UserError, match=r"^part: 'held-out' has 1 item, and a standard error needs at least 2$"):
        likelihood(build(), data, num_steps=2)


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "test"}, "part: 'test' is not valid: should be train or held-out"),
        ({"n": 1}, "n: 1 is not valid: must be between 2 and the 9 held-out items"),
        ({"n": 10}, "n: 10 is not valid: must be between 2 and the 9 held-out items"),
        ({"n": 13, "part": "train"}, "n: 13 is not valid: must be between 2 and the 12 train items"),
        ({"num_steps": T + 1}, f"num_steps: {T + 1} is more than the {T} steps that the schedule has"),
        ({"num_steps": 0}, "num_steps: 0 is not valid: must be at least 1"),
        ({"num_steps": -3}, "num_steps: -3 is not valid: must be at least 1"),
        (
            {"variance": "learned_range"},
            "variance: learned_range needs a model with a learned variance (train with variance=learned_range "
            "objective=hybrid); this one has 'fixed_small'",
        ),
        (
            {"variance": "fixed_smal"},
            "variance: 'fixed_smal' is not valid: should be 'fixed_small', 'fixed_large' or 'learned_range'",
        ),
        ({"batch_size": 0}, "batch_size: 0 is not valid: must be at least 1"),
    ],
)
def test_refused(options, message):
    with pytest.raises(UserError) as refusal:
        likelihood(build(), dataset_of(), **options)
    assert str(refusal.value) == message


@pytest.mark.parametrize("spec", [POINTS, PICTURES], ids=["points", "pictures"])
def test_data_without_levels_have_no_bits(spec):
    model = build(spec)
    with pytest.raises(UserError) as refusal:
        bound(model, torch.zeros(2, *spec.shape))
    assert str(refusal.value).startswith("likelihood: bits per dimension need data with a known number of levels (256")
    assert "\n" not in str(refusal.value)


def test_a_method_without_a_bound_says_which_have_one():
    from osmose.methods.base import GenerativeModel

    with pytest.raises(UserError, match="ddpm: has no likelihood bound; ddpm, iddpm, edm, blackout"):
        GenerativeModel.bound(build(), Batch(torch.zeros(1, 1, 4, 4)), SampleDraws(0, 0, 1), lambda *_: None)


def test_a_variance_exploding_schedule_needs_no_steps_of_its_own():
    model = build(cls=EDMConfig, schedule=VarianceExploding(sigma_max=10.0), network=MLPConfig(width=8, depth=1))
    assert likelihood(model, dataset_of(), num_steps=12).terms.shape == (12,)


def test_levels_that_lie_at_different_values_in_different_channels_are_refused():
    colour = LEVELS.replace(shape=(2, 4, 4), shift=(8.0, 8.0), scale=(8.0, 8.0))
    batch = Batch(torch.zeros(2, 2, 4, 4))
    build(colour).bound(batch, SampleDraws(0, 0, 2), lambda *_: None, num_steps=2)
    uneven = build(colour.replace(scale=(8.0, 4.0)))
    with pytest.raises(UserError, match="the same in all channels"):
        uneven.bound(batch, SampleDraws(0, 0, 2), lambda *_: None, num_steps=2)
