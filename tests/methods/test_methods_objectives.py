import itertools
import json
import math
import weakref
from typing import Literal

import pytest
import torch
from torch import nn

from osmose.configuration import ConfigError
from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian import PARAMETRIZATIONS, SCHEDULES
from osmose.gaussian.chain import LevelDecoder, ReverseChain, reverse_step
from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.gaussian.draws import StepDraws
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.parametrization import EpsParametrization, VParametrization, noised
from osmose.gaussian.schedule import CosineSchedule, LinearSchedule, TrigSchedule
from osmose.methods import OBJECTIVES, TIME_SAMPLERS, objectives
from osmose.methods.diffusion import DDPMConfig, EDMConfig, IDDPMConfig
from osmose.methods.messages import Batch
from osmose.methods.objectives import HybridObjective, Problem, SimpleObjective, TiltedObjective, VLBObjective
from osmose.methods.times import LogNormalTimes
from osmose.networks.base import NetworkConfig
from osmose.networks.mlp import MLPConfig
from osmose.networks.unet import UNetConfig

LEVELS = DataSpec(kind="image", shape=(1, 4, 4), range=(0.0, 16.0), levels=17, shift=(8.0,), scale=(8.0,))
POINTS = DataSpec(kind="points", shape=(2,))
MLP = MLPConfig(width=16, depth=1)
UNET = UNetConfig(channels=8, mult=(1,), blocks=1, attention=())
T = 60
LINEAR = LinearSchedule(num_steps=T)
TILTS = ["mean", "algorithm3", "author-code", "iwae", "iwae-simple", 0.3, -0.01, 0.0, 2]


def perturbed(model, amount=0.1):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return model


def build(spec=LEVELS, **parts):
    """A small model with weights that are not zero, the same each time."""
    torch.manual_seed(0)
    parts = {"network": MLP, "schedule": LINEAR, **parts}
    return perturbed(DDPMConfig(**parts).build(spec))


def batch_of(count, spec=LEVELS, seed=0):
    """Items on the levels of the data, model units."""
    generator = torch.Generator().manual_seed(seed)
    return Batch((torch.randn(count, *spec.shape, generator=generator) * 3).round().clamp(-8, 8) / 8)


def draws_of(count, seed=4):
    return StepDraws(seed, 9, 0, count, count)


def what_is_drawn(model, count, draws=1):
    """The times and noises of `loss` with `draws_of(count)`."""
    source = draws_of(count)
    t, _ = model.times.draw(source)
    first = source.normal(model.spec.shape)
    return t, [first, *(source.branch("noise", i).normal(model.spec.shape) for i in range(1, draws))]


def errors(model, batch, t, noises):
    """Mean over dimensions of (F - F*)^2 for each noise, (k, B), written out with the table of the parametrization."""
    level = model.schedule.level(t)
    at = lambda value: torch.as_tensor(value).float().expand(len(t)).view(-1, *(1,) * len(model.spec.shape))  # noqa: E731
    c = model.config.parametrization.coefficients(level)
    found = []
    for eps in noises:
        x_t = at(level.alpha) * batch.x0 + at(level.sigma) * eps
        F = model.networks()[0](at(c.c_in) * x_t, model.schedule.label(level).float(), batch.condition)
        target = at(c.target_x0) * batch.x0 + at(c.target_eps) * eps
        found.append((F - target).square().flatten(1).mean(1))
    return torch.stack(found)


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def problem_of(model, variance="fixed_small", num_levels=17):
    """What the model's objective is given."""
    chain = ReverseChain(TimeGrid.of(model.schedule, model.schedule.native_steps))
    return Problem(model.denoiser, variance, chain, LevelDecoder(-1.0, 1.0, num_levels))


# --- simple ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parametrization", list(PARAMETRIZATIONS.entries))
@pytest.mark.parametrize("spec", [LEVELS, POINTS], ids=["levels", "points"])
def test_simple_is_the_squared_error_of_the_output_bit_for_bit(parametrization, spec):
    for schedule in (LINEAR, TrigSchedule()) if parametrization != "eps" else (LINEAR,):
        model = build(spec, schedule=schedule, parametrization=parametrization)
        assert model.config.objective == SimpleObjective()
        batch = batch_of(6, spec)
        terms = model.loss(batch, draws_of(6))
        t, noises = what_is_drawn(model, 6)
        assert torch.equal(terms.t, t)
        assert torch.equal(terms.per_item, errors(model, batch, t, noises)[0])
        assert terms.parts == {}


# --- the bound ------------------------------------------------------------------------------------------------------


def term_by_hand(schedule, k, x0, x0_hat, variance, share=None):
    """L_{k-1} in bits per dimension with torch's distributions."""
    levels = [*TimeGrid.of(schedule, schedule.native_steps).levels[::-1]]  # clean data first
    step = reverse_step(levels[k], levels[k - 1])
    small = step.btilde if k > 1 else reverse_step(levels[2], levels[1]).btilde
    if variance == "learned_range":
        var = (share * math.log(step.beta) + (1 - share) * math.log(small)).exp()
    else:
        large = step.beta if k > 1 else small
        var = torch.full_like(x0, small if variance == "fixed_small" else large)
    if k > 1:
        q, p = (
            torch.distributions.Normal(step.pull * mean, std)
            for mean, std in ((x0, math.sqrt(step.btilde)), (x0_hat, var.sqrt()))
        )
        return float(torch.distributions.kl_divergence(q, p).mean()) / math.log(2)
    return float(LevelDecoder(-1.0, 1.0, 17).nll(x0, x0_hat, var.log()).mean()) / math.log(2)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("schedule", [LINEAR, CosineSchedule(num_steps=T)], ids=lambda s: s.kind)
def test_vlb_is_t_times_the_term_in_bits(variance, schedule):
    model = build(schedule=schedule, variance=variance, objective="vlb", parametrization="x0")
    batch = batch_of(T)
    t = torch.arange(1, T + 1).double() / T
    noise = torch.randn(T, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    terms = VLBObjective().losses(problem_of(model, variance), batch, t, [noise].__getitem__)
    level = schedule.level(t)
    x0_hat, share = model.denoiser.with_variance(noised(batch.x0, noise, level), level)
    assert (share is not None) == (variance == "learned_range")
    for k in (1, 2, 3, 30, T):
        row = [None if v is None else v[k - 1].detach().double() for v in (batch.x0, x0_hat, share)]
        want = T * term_by_hand(schedule, k, row[0], row[1], variance, row[2])
        assert terms.per_item[k - 1].item() == pytest.approx(want, rel=2e-4), k
    assert torch.equal(terms.t, t)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_with_a_fixed_variance_vlb_is_the_weighted_error_of_the_noise(variance):
    model = build(variance=variance, objective="vlb")
    k = torch.arange(2, T + 1)
    batch = batch_of(T - 1)
    noise = torch.randn(T - 1, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    got = VLBObjective().losses(problem_of(model, variance), batch, k.double() / T, [noise].__getitem__).per_item
    beta = LINEAR.betas
    abar = (1 - beta).cumprod(0)
    btilde = beta[1:] * (1 - abar[:-1]) / (1 - abar[1:])
    sigma2 = btilde if variance == "fixed_small" else beta[1:]
    c = beta[1:] ** 2 / (2 * sigma2 * (1 - beta[1:]) * (1 - abar[1:]))
    constant = 0.5 * (btilde / sigma2 - 1 - (btilde / sigma2).log())
    error = errors(model, batch, k.double() / T, [noise])[0].double()
    torch.testing.assert_close(got.double(), T / math.log(2) * (c * error + constant), rtol=1e-4, atol=1e-5)


def test_the_loss_of_a_model_is_its_objective():
    for objective, variance in (("vlb", "fixed_large"), ("vlb", "learned_range"), ("hybrid", "learned_range")):
        model, batch = build(objective=objective, variance=variance), batch_of(6)
        t, noises = what_is_drawn(model, 6)
        want = OBJECTIVES.parse(objective).losses(problem_of(model, variance), batch, t, noises.__getitem__)
        got = model.loss(batch, draws_of(6))
        assert torch.equal(got.per_item, want.per_item)
        assert torch.equal(got.t, want.t)
        assert {name: part.tolist() for name, part in got.parts.items()} == {
            name: part.tolist() for name, part in want.parts.items()
        }


def test_a_continuous_law_of_times_trains_the_steps_that_the_chain_has():
    times = LogNormalTimes(mean=-0.4, std=1.0)
    for objective in ("vlb", "hybrid"):
        model = build(objective=objective, variance="learned_range", times=times)
        batch, seen = batch_of(50), []
        model.networks()[0].register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[1]))
        terms = model.loss(batch, draws_of(50))
        t, _ = what_is_drawn(model, 50)
        k = (t * T).round().clamp(min=1)
        assert not torch.equal(t, k / T)
        assert torch.allclose(seen[0].double(), (k - 1) * 1000 / T)
        assert bool(terms.per_item.isfinite().all())


# --- hybrid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.001, 0.3])
def test_hybrid_is_simple_and_the_weighted_bound(weight):
    model, batch = build(variance="learned_range", objective={"kind": "hybrid", "vlb_weight": weight}), batch_of(6)
    terms = model.loss(batch, draws_of(6))
    t, noises = what_is_drawn(model, 6)
    mean, _ = model.denoiser.outputs(noised(batch.x0, noises[0], model.schedule.level(t)), model.schedule.level(t))
    simple = (mean - noises[0]).square().flatten(1).mean(1)
    vlb = VLBObjective().losses(problem_of(model, "learned_range"), batch, t, noises.__getitem__).per_item
    assert torch.equal(terms.parts["simple"], simple)
    assert torch.allclose(terms.parts["vlb"], vlb, rtol=1e-6)
    assert torch.allclose(terms.per_item, simple + weight * vlb, rtol=1e-6)
    assert not any(part.requires_grad for part in terms.parts.values())


def test_the_published_weight_is_a_thousandth_of_the_number_of_steps():
    # The bound is T L_t, so lambda = 0.001 makes the summand mse_t + (T / 1000) L_t.
    assert HybridObjective().vlb_weight == 0.001
    model, batch = build(variance="learned_range", objective="hybrid"), batch_of(1)
    noise = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([0.5], dtype=torch.float64)
    terms = HybridObjective().losses(problem_of(model, "learned_range"), batch, t, [noise].__getitem__)
    level = model.schedule.level(t)
    x0_hat, share = model.denoiser.with_variance(noised(batch.x0, noise, level), level)
    row = [value[0].detach().double() for value in (batch.x0, x0_hat, share)]
    bits = term_by_hand(LINEAR, T // 2, row[0], row[1], "learned_range", row[2])
    assert terms.per_item.item() - terms.parts["simple"].item() == pytest.approx(T / 1000 * bits, rel=1e-3)


class Towers(nn.Module):
    """A network whose outputs share nothing."""

    def __init__(self, shape, count):
        super().__init__()
        self.towers = nn.ModuleList(MLPConfig(width=8, depth=1).build(shape) for _ in range(count))

    def forward(self, x, label, condition=None):
        return torch.cat([tower(x, label, condition) for tower in self.towers], 1)


class TowersConfig(NetworkConfig):
    kind: Literal["towers"] = "towers"

    def build(self, event_shape, *, num_classes=None, num_outputs=1):  # noqa: ARG002
        return Towers(event_shape, num_outputs)


def test_in_hybrid_the_bound_teaches_the_variance_alone():
    network, batch = TowersConfig(), batch_of(8)
    models = {
        "simple": build(network=network),
        "hybrid": build(network=network, variance="learned_range", objective="hybrid"),
        "vlb": build(network=network, variance="learned_range", objective="vlb"),
    }
    weights = models["hybrid"].networks()[0].state_dict()
    for model in models.values():
        network = model.networks()[0]
        network.load_state_dict({name: weights[name] for name in network.state_dict()})
    found = {name: gradients(model, model.loss(batch, draws_of(8)).per_item.sum()) for name, model in models.items()}
    mean = [name for name in found["simple"] if name.startswith("denoiser.network.towers.0.")]
    assert set(mean) == set(found["simple"])
    variance = [name for name in found["hybrid"] if ".towers.1." in name]
    assert len(mean) == len(variance) > 5
    for name in mean:
        assert torch.equal(found["hybrid"][name], found["simple"][name])
        assert not torch.allclose(found["vlb"][name], found["simple"][name])
    assert any(bool((found["simple"][name] != 0).any()) for name in mean)
    for name in variance:
        assert torch.allclose(found["hybrid"][name], 0.001 * found["vlb"][name], rtol=1e-4, atol=1e-9)
    assert any(bool((found["hybrid"][name] != 0).any()) for name in variance)


@pytest.mark.parametrize(
    "network", [MLP, UNetConfig(channels=8, mult=(1,), blocks=1, attention=())], ids=["mlp", "unet"]
)
def test_the_two_halves_of_one_head_are_told_apart(network):
    # The first half of the channels is the mean: its rows of the head learn what they would without the bound.
    model, batch = build(network=network, variance="learned_range", objective="hybrid"), batch_of(8)
    full = gradients(model, model.loss(batch, draws_of(8)).per_item.sum())
    t, noises = what_is_drawn(model, 8)
    level = model.schedule.level(t)
    mean, share = model.denoiser.outputs(noised(batch.x0, noises[0], level), level)
    assert mean.shape == share.shape == batch.x0.shape
    alone = gradients(model, (mean - noises[0]).square().flatten(1).mean(1).sum())
    (weight, bias) = [name for name in full if len(full[name]) == {"mlp": 32, "unet": 2}[network.kind]][-2:]
    for name in (weight, bias):
        half = len(full[name]) // 2
        assert torch.allclose(full[name][:half], alone[name][:half], rtol=1e-5, atol=1e-7)
        assert bool((alone[name][half:] == 0).all())
        assert bool((full[name][half:] != 0).any())


# --- tilted ---------------------------------------------------------------------------------------------------------


def tilted(tilt, draws, **options):
    return {"kind": "tilted", "tilt": tilt, "noise_draws": draws, **options}


@pytest.mark.parametrize("tilt", TILTS)
@pytest.mark.parametrize("two_pass", [False, True])
def test_one_noise_is_simple_bit_for_bit(tilt, two_pass):
    batch, models = batch_of(6), [build(), build(objective=tilted(tilt, 1, two_pass=two_pass))]
    losses = [model.loss(batch, draws_of(6)) for model in models]
    assert torch.equal(losses[0].per_item, losses[1].per_item)
    assert torch.equal(losses[0].t, losses[1].t)
    a, b = (gradients(m, loss.per_item.mean()) for m, loss in zip(models, losses, strict=True))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(losses[1].parts["plain"], losses[0].per_item)
    assert torch.allclose(losses[1].parts["tilted"], losses[0].per_item, rtol=1e-4)
    assert bool((losses[1].parts["max_weight"] == 1).all())
    assert bool((losses[1].parts["spread"] == 0).all())


@pytest.mark.parametrize("tilt", ["mean", 0.0, 0])
def test_tilt_mean_is_the_mean_of_the_losses(tilt):
    model, batch = build(objective=tilted(tilt, 5)), batch_of(6)
    terms = model.loss(batch, draws_of(6))
    each = errors(model, batch, *what_is_drawn(model, 6, 5))
    assert torch.allclose(terms.per_item, each.mean(0), rtol=1e-6)
    assert torch.allclose(terms.parts["tilted"], each.mean(0), rtol=1e-6)
    assert torch.allclose(terms.parts["max_weight"], torch.full((6,), 0.2))
    # The k noises of an item differ, and so do those of different items.
    assert len(each.flatten().unique()) == 30


@pytest.mark.parametrize("tilt", TILTS)
def test_the_weights_are_a_softmax_over_the_noises_of_each_item(tilt):
    k, D = 3, 16
    model, batch = build(objective=tilted(tilt, k)), batch_of(6)
    terms = model.loss(batch, draws_of(6))
    t, noises = what_is_drawn(model, 6, k)
    each = errors(model, batch, t, noises).detach().double()
    beta = LINEAR.betas[(t * T).round().long() - 1]
    abar = (1 - LINEAR.betas).cumprod(0)[(t * T).round().long() - 1]
    before = torch.where(t > 1 / T, abar / (1 - beta), (1 - LINEAR.betas[0]).expand(6))
    small = beta * (1 - before) / (1 - abar)
    c = beta**2 / (2 * small * (1 - beta) * (1 - abar))
    assert t.min() > 1 / T
    tau = {"mean": 0.0, "algorithm3": 1.0, "author-code": 1 / D, "iwae-simple": -1.0, "iwae": -c}.get(tilt, tilt)
    offset = torch.zeros(k, 6).double()
    if tilt == "iwae":
        squares = torch.stack([eps.square().flatten(1).sum(1) for eps in noises]).double()
        offset = beta * squares / (2 * (1 - abar))
    w = torch.softmax(tau * D * each + offset, 0)
    assert torch.allclose(terms.per_item.double(), (w * each).sum(0), rtol=1e-4)
    assert torch.allclose(terms.parts["max_weight"].double(), w.max(0).values, rtol=1e-4)
    assert torch.allclose(terms.parts["plain"].double(), each.mean(0), rtol=1e-5)
    spread = each.std(0, correction=0) / each.mean(0)
    assert torch.allclose(terms.parts["spread"].double(), spread, rtol=1e-3)
    assert not any(part.requires_grad for part in terms.parts.values())


@pytest.mark.parametrize("tilt", ["algorithm3", "author-code", "iwae-simple", 0.3, -0.1])
def test_its_gradient_is_that_of_the_tilted_loss(tilt):
    model, batch = build(objective=tilted(tilt, 4)), batch_of(6)
    terms = model.loss(batch, draws_of(6))
    got = gradients(model, terms.per_item.sum())
    each = errors(model, batch, *what_is_drawn(model, 6, 4))
    tau = 16 * {"algorithm3": 1.0, "author-code": 1 / 16, "iwae-simple": -1.0}.get(tilt, tilt)
    F_tau = ((tau * each).exp().mean(0).log()) / tau
    want = gradients(model, F_tau.sum())
    assert torch.allclose(terms.parts["tilted"], F_tau, rtol=1e-4)
    for name, gradient in want.items():
        assert torch.allclose(got[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max())), name
    # Without holding the weights fixed it would be another method's.
    each = errors(model, batch, *what_is_drawn(model, 6, 4))
    wrong = gradients(model, (torch.softmax(tau * each, 0) * each).sum())
    assert any(not torch.allclose(got[name], wrong[name], rtol=1e-2, atol=1e-4) for name in got)


@pytest.mark.parametrize("tilt", TILTS)
def test_identical_noises_weigh_alike(tilt):
    model, batch = build(), batch_of(6)
    t, (eps,) = what_is_drawn(model, 6)
    objective = TiltedObjective(noise_draws=3, tilt=tilt)
    terms = objective.losses(problem_of(model), batch, t, lambda index: eps)  # noqa: ARG005
    assert torch.allclose(terms.parts["max_weight"], torch.full((6,), 1 / 3))
    assert torch.allclose(terms.per_item, errors(model, batch, t, [eps])[0], rtol=1e-6)
    assert torch.allclose(terms.parts["tilted"], terms.per_item, rtol=1e-3)


class Linear(nn.Module):
    """F = scale x."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x, label, condition=None):  # noqa: ARG002
        return self.scale * x


class Half(LinearSchedule):
    """A single step at abar = 1 / 2."""

    kind: Literal["half"] = "half"

    def _betas(self):
        return torch.full((self.num_steps,), 0.5, dtype=torch.float64)


def half_way(scale, count, dimension):
    """Data N(0, I) half way to noise, with F = scale x for the noise; the noises of up to eight draws."""
    denoiser = NetworkDenoiser(Linear(scale), Half(num_steps=1), EpsParametrization())
    x = torch.randn(9, count, dimension, generator=torch.Generator().manual_seed(0))
    t = torch.ones(count, dtype=torch.float64)
    return Problem(denoiser, "fixed_small", None, None), Batch(x[0]), t, x[1:].__getitem__


@pytest.mark.parametrize(
    ("tilt", "want"),
    [
        ("algorithm3", [31.97, 34.12, 35.92, 37.39]),
        ("iwae-simple", [31.97, 29.83, 28.28, 27.14]),
        ("mean", [31.97] * 4),
    ],
)
def test_the_tilted_loss_moves_with_the_number_of_noises(tilt, want):
    # With the best predictor of 64 standard normal values: eps_hat = sqrt(1 - abar) x.
    given = half_way(0.5**0.5, 15_000, 64)
    found = []
    for k in (1, 2, 4, 8):
        terms = TiltedObjective(noise_draws=k, tilt=tilt).losses(*given)
        found.append(64 * terms.parts["tilted"].mean().item())
    assert found == pytest.approx(want, abs=0.15)
    steps = [b - a for a, b in itertools.pairwise(found)]
    if tilt != "mean":
        assert all(step > 0.5 if tilt == "algorithm3" else step < -0.5 for step in steps)


@pytest.mark.parametrize(("tilt", "ratio"), [("mean", 1.0), ("algorithm3", 1.08), ("iwae-simple", 0.90)])
def test_a_tilt_biases_what_is_learned(tilt, ratio):
    # The best linear predictor of the noise of 2 values from two draws, relative to the posterior mean's.
    problem, *given = half_way(0.0, 100_000, 2)
    scale = problem.denoiser.network.scale
    low, high = 0.4, 1.1
    for _ in range(10):  # the gradient of the expected F_tau vanishes once
        with torch.no_grad():
            scale.fill_((low + high) / 2)
        scale.grad = None
        TiltedObjective(noise_draws=2, tilt=tilt).losses(problem, *given).per_item.mean().backward()
        low, high = (low, scale.item()) if scale.grad > 0 else (scale.item(), high)
    assert scale.item() / 0.5**0.5 == pytest.approx(ratio, abs=0.015)


@pytest.mark.parametrize("tilt", ["algorithm3", "iwae-simple", 1e6, -1e6])
def test_large_losses_do_not_overflow(tilt):
    # F = 100 x on 2 values: l is around 1e4.
    problem, *given = half_way(100.0, 200, 2)
    terms = TiltedObjective(noise_draws=4, tilt=tilt).losses(problem, *given)
    each = TiltedObjective(noise_draws=4).losses(problem, *given)
    assert each.per_item.median() > 5e3
    assert all(bool(v.isfinite().all()) for v in (terms.per_item, *terms.parts.values()))
    # So large a spread leaves the largest, or the smallest, alone.
    sign = 1 if tilt in ("algorithm3", 1e6) else -1
    assert (sign * (terms.per_item - each.per_item) >= -1e-3 * each.per_item).all()
    assert terms.parts["max_weight"].median() == 1
    terms.per_item.mean().backward()
    assert bool(problem.denoiser.network.scale.grad.isfinite())


class Expressed(nn.Module):
    """One denoiser, E[x0 | x_t] = tanh(x_t) / 2, as the network of any parametrization on a discrete schedule."""

    def __init__(self, schedule, parametrization):
        super().__init__()
        self.schedule, self.parametrization = schedule, parametrization

    def forward(self, x, label, condition=None):  # noqa: ARG002
        steps = self.schedule.native_steps
        level = self.schedule.level((label.double() * steps / 1000 + 1) / steps)
        c = [torch.as_tensor(v).double().expand(len(x))[:, None] for v in self.parametrization.coefficients(level)[:3]]
        x_t = x / c[0]
        return (x_t.tanh() / 2 - c[1] * x_t) / c[2]


@pytest.mark.parametrize("parametrization", list(PARAMETRIZATIONS.entries))
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("k", [2, 10, 300])
def test_iwae_weights_are_the_importance_ratios_in_any_parametrization(parametrization, variance, k):
    schedule, parametrization = LinearSchedule(), PARAMETRIZATIONS.parse(parametrization)
    denoiser = NetworkDenoiser(Expressed(schedule, parametrization), schedule, parametrization)
    grid = TimeGrid.of(schedule, 1000)
    problem = Problem(denoiser, variance, ReverseChain(grid), None)
    generator = torch.Generator().manual_seed(k)
    x0, *noises = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64).unbind(0)
    t, s = grid.levels[-1 - k], grid.levels[-k]
    objective = TiltedObjective(noise_draws=3, tilt="iwae")
    terms = objective.losses(problem, Batch(x0), torch.full((5,), k / 1000).double(), noises.__getitem__)

    step = reverse_step(t, s)
    std = math.sqrt(step.btilde if variance == "fixed_small" else step.beta)
    p_of, q_of = (lambda mean, std=std: torch.distributions.Normal(mean, std) for std in (std, math.sqrt(step.beta)))
    log_ratio, each = [], []
    for eps in noises:
        x_t = t.alpha * x0 + t.sigma * eps
        x0_hat = x_t.tanh() / 2
        ratio = 0.0
        # The mean over q(x_s | x_t, x0) of something quadratic: three nodes of Gauss and Hermite are exact.
        for z, weight in ((-math.sqrt(3), 1 / 6), (0.0, 2 / 3), (math.sqrt(3), 1 / 6)):
            x_s = step.keep * x_t + step.pull * x0 + math.sqrt(step.btilde) * z
            log_p = p_of(step.keep * x_t + step.pull * x0_hat).log_prob(x_s)
            ratio = ratio + weight * (log_p - q_of(t.alpha / s.alpha * x_s).log_prob(x_t)).sum(1)
        log_ratio.append(ratio)
        c = parametrization.coefficients(t)
        each.append(((x0 - x0_hat) / c.c_out).square().mean(1))
    w, each = torch.softmax(torch.stack(log_ratio), 0), torch.stack(each)
    assert (w.max(0).values - w.min(0).values).min() > {2: 0.1, 10: 0.02, 300: 1e-4}[k]
    assert torch.allclose(terms.parts["max_weight"], w.max(0).values, rtol=1e-5)
    assert torch.allclose(terms.per_item, (w * each).sum(0), rtol=1e-5)


# --- two passes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tilt", ["mean", "algorithm3", "iwae", "iwae-simple"])
def test_two_passes_are_one(dropout, tilt):
    batch, found = batch_of(6), []
    for two_pass in (False, True):
        network = MLPConfig(width=16, depth=1, dropout=dropout)
        model = build(network=network, objective=tilted(tilt, 4, two_pass=two_pass)).train()
        torch.manual_seed(5)
        terms = model.loss(batch, draws_of(6))
        after = torch.get_rng_state()
        found.append((terms, gradients(model, terms.per_item.mean())))
        assert torch.equal(torch.get_rng_state(), after)
    (one, grads), (two, again) = found
    assert torch.equal(one.per_item, two.per_item)
    assert all(torch.equal(one.parts[name], two.parts[name]) for name in one.parts)
    for name, gradient in grads.items():
        assert torch.allclose(again[name], gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max()))
    if dropout:  # it is on, and new for each draw
        torch.manual_seed(6)
        assert not torch.equal(model.loss(batch, draws_of(6)).per_item, two.per_item)


class Watched(nn.Module):
    """A network that knows how many of its activations are alive, and how many were at most."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.alive = self.peak = self.calls = 0

    def watch(self, x):
        self.alive += 1
        self.peak = max(self.peak, self.alive)
        weakref.finalize(x, self.forget)
        return x

    def forget(self):
        self.alive -= 1

    def forward(self, x, label, condition=None):  # noqa: ARG002
        self.calls += 1
        h = x
        for _ in range(5):  # each tanh keeps its result for the backward pass
            h = self.watch(torch.tanh(self.linear(h.unsqueeze(-1)).squeeze(-1)))
        return h


def test_two_passes_hold_the_activations_of_one_draw():
    peaks, calls = {}, {}
    for two_pass in (False, True):
        for k in (1, 2, 8):
            network = Watched()
            problem = Problem(NetworkDenoiser(network, LINEAR, EpsParametrization()), "fixed_small", None, None)
            objective = TiltedObjective(noise_draws=k, tilt="algorithm3", two_pass=two_pass)
            x = torch.randn(9, 4, 2, generator=torch.Generator().manual_seed(0))
            t = torch.full((4,), 0.5, dtype=torch.float64)
            objective.losses(problem, Batch(x[0]), t, x[1:].__getitem__).per_item.mean().backward()
            peaks[two_pass, k], calls[two_pass, k] = network.peak, network.calls
            assert network.alive == 0
    assert peaks[False, 8] > 3.5 * peaks[False, 2] > 6 * peaks[False, 1]
    assert peaks[True, 1] == peaks[True, 2] == peaks[True, 8] <= 5
    assert [calls[False, k] for k in (1, 2, 8)] == [1, 2, 8]
    assert [calls[True, k] for k in (1, 2, 8)] == [2, 4, 16]


def test_the_second_pass_is_told_the_device_whose_random_state_it_repeats(monkeypatch):
    # torch looks for it among the tensors that the function is given: without one, dropout on a GPU would differ.
    given, checkpoint = [], objectives.checkpoint

    def spy(function, *args, **options):
        given.append(args)
        return checkpoint(function, *args, **options)

    monkeypatch.setattr(objectives, "checkpoint", spy)
    batch = batch_of(3)
    build(objective=tilted("mean", 2, two_pass=True)).loss(batch, draws_of(3))
    assert len(given) == 2
    assert all(any(isinstance(arg, torch.Tensor) and arg.device == batch.x0.device for arg in args) for args in given)


# --- everything with everything -------------------------------------------------------------------------------------


def refusal_of(objective, times, parametrization, schedule, variance, levels):
    """Part of the line that refuses a combination, one of several where several apply; None for one that works."""
    continuous = schedule not in ("linear", "scaled-linear", "cosine")
    bound = objective in ("vlb", "hybrid")
    reasons = [
        ("'eps' cannot recover x0 at t = 1", parametrization == "eps" and schedule in ("trig", "straight")),
        ("'loss-aware' remembers losses step by step", times == "loss-aware" and continuous),
        ("learned_range is taught by the bound alone", variance == "learned_range" and not bound),
        (f"hybrid teaches the variance, and {variance!r}", variance != "learned_range" and objective == "hybrid"),
        (f"objective: {objective} needs a schedule with steps", bound and continuous),
        (f"objective: {objective} counts bits per dimension", bound and not levels),
        ("objective.tilt: iwae needs a schedule with steps", objective == "iwae" and continuous),
    ]
    return [reason for reason, applies in reasons if applies]


@pytest.mark.parametrize("times", list(TIME_SAMPLERS.entries))
@pytest.mark.parametrize("objective", [*OBJECTIVES.entries, "iwae"])
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_every_combination_takes_a_step_or_is_refused_in_one_line(objective, times, variance):
    taken = 0
    for parametrization, schedule in itertools.product(PARAMETRIZATIONS.entries, SCHEDULES.entries):
        parts = {
            "network": MLPConfig(width=8, depth=1),
            "parametrization": parametrization,
            "schedule": {"kind": schedule, "num_steps": T}
            if schedule in ("linear", "scaled-linear", "cosine")
            else schedule,
            "times": times,
            "variance": variance,
            "objective": tilted("iwae", 2) if objective == "iwae" else objective,
        }
        spec = POINTS if objective in ("simple", "tilted") else LEVELS
        expected = refusal_of(objective, times, parametrization, schedule, variance, spec is LEVELS)
        if expected:
            with pytest.raises(UserError) as refusal:
                DDPMConfig(**parts).build(spec)
            assert "\n" not in str(refusal.value)
            assert any(reason in str(refusal.value) for reason in expected), (parts, str(refusal.value))
            continue
        model = perturbed(DDPMConfig(**parts).build(spec), 0.02).train()
        batch, draws = batch_of(4, spec), draws_of(4)
        before = [parameter.clone() for parameter in model.parameters()]
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        terms = model.loss(batch, draws)
        assert terms.per_item.shape == (4,)
        terms.per_item.mean().backward()
        optimizer.step()
        with torch.no_grad():
            model.after_step([(batch, draws)])
        assert bool(terms.per_item.isfinite().all())
        assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert bool(model.loss(batch, draws).per_item.isfinite().all())
        taken += 1
    legal = (variance == "learned_range") == (objective == "hybrid") or objective == "vlb"
    assert (taken > 0) == legal


@pytest.mark.parametrize("objective", ["vlb", "hybrid"])
def test_bits_need_levels(objective):
    for spec in (POINTS, DataSpec(kind="image", shape=(1, 4, 4), range=(0.0, 1.0), shift=(0.5,), scale=(0.5,))):
        assert refusal_of(objective, "uniform", "x0", "linear", "learned_range", levels=False)
        with pytest.raises(UserError, match=f"objective: {objective} counts bits per dimension, which needs data with"):
            DDPMConfig(network=MLP, schedule=LINEAR, objective=objective, variance="learned_range").build(spec)


def test_every_objective_is_tested_here():
    assert set(OBJECTIVES.entries) == {"simple", "vlb", "hybrid", "tilted"}


class OneHead(NetworkConfig):
    kind: Literal["one-head"] = "one-head"

    def build(self, event_shape, *, num_classes=None, num_outputs=1):  # noqa: ARG002
        return MLP.build(event_shape)


def test_a_learned_variance_needs_a_network_with_a_second_output():
    with pytest.raises(UserError) as refusal:
        IDDPMConfig(network=OneHead()).build(LEVELS)
    message = str(refusal.value)
    assert message.startswith(
        "variance: learned_range needs a network with two outputs for each value, 2 channels here"
    )
    assert "this one gives 1: use variance=fixed_small" in message
    assert "\n" not in message
    # It is an ordinary network otherwise.
    assert DDPMConfig(network=OneHead()).build(LEVELS).loss(batch_of(2), draws_of(2)).per_item.shape == (2,)


@pytest.mark.parametrize(
    "network", [MLP, UNetConfig(channels=8, mult=(1,), blocks=1, attention=())], ids=["mlp", "unet"]
)
def test_a_learned_variance_starts_half_way(network):
    # All outputs are 0 at first, and w = (v + 1) / 2.
    model = IDDPMConfig(network=network).build(LEVELS)
    x_t, level = torch.randn(2, 1, 4, 4), model.schedule.level(torch.tensor([0.3, 1.0]))
    x0_hat, share = model.denoiser.with_variance(x_t, level)
    assert torch.equal(share, torch.full_like(x_t, 0.5))
    assert torch.equal(x0_hat, model.denoiser(x_t, level))
    assert torch.equal(model.denoiser.output(x_t, level), torch.zeros_like(x_t))
    plain = DDPMConfig(network=network).build(LEVELS)
    assert plain.denoiser.with_variance(x_t, level)[1] is None


def test_improved_ddpm_s_published_settings():
    config = IDDPMConfig(network=MLP)
    assert config.schedule == CosineSchedule(num_steps=4000)
    assert (config.objective, config.variance) == (HybridObjective(vlb_weight=0.001), "learned_range")
    assert (config.sampling.solver.kind, config.sampling.solver.variance) == ("ancestral", "learned_range")
    assert config.parametrization == EpsParametrization()


@pytest.mark.parametrize(
    "config",
    [
        IDDPMConfig(network=MLP),
        DDPMConfig(network=MLP, objective=TiltedObjective(noise_draws=3, tilt="iwae", two_pass=True)),
        DDPMConfig(network=MLP, objective=TiltedObjective(tilt=-0.25)),
        EDMConfig(network=MLP, parametrization=VParametrization(), objective={"kind": "tilted", "tilt": 1}),
    ],
)
def test_json_and_back(config):
    again = type(config).parse(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert type(again.objective) is type(config.objective)
    assert again.replace(variance="fixed_large").objective == config.objective


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "hybird"}, "unknown objective 'hybird'; did you mean 'hybrid'"),
        ({"kind": "hybrid", "vlb_weight": 0}, "vlb_weight: 0 is not valid: should be greater than 0"),
        ({"kind": "hybrid", "vlb_weight": math.nan}, "vlb_weight: nan is not valid: should be"),
        ({"kind": "simple", "vlb_weight": 0.1}, "vlb_weight: unknown field"),
        ({"kind": "tilted", "noise_draws": 0}, "noise_draws: 0 is not valid: should be greater than or equal to 1"),
        ({"kind": "tilted", "noise_draws": 2.5}, r"noise_draws: 2\.5 is not valid: should be a valid integer"),
        (
            {"kind": "tilted", "tilt": "iwea"},
            "^tilt: 'iwea' is not valid: should be a finite number, or did you mean 'iwae'",
        ),
        ({"kind": "tilted", "tilt": "inf"}, r"^tilt: 'inf' is not valid: should be a finite number"),
        ({"kind": "tilted", "tilt": math.inf}, r"^tilt: inf is not valid: should be a finite number"),
        ({"kind": "tilted", "tilt": math.nan}, r"^tilt: nan is not valid: should be a finite number"),
        ({"kind": "tilted", "tilt": [1]}, r"^tilt: \[1\] is not valid: should be a finite number"),
        ({"kind": "tilted", "tilt": True}, r"^tilt: True is not valid: should be a finite number"),
    ],
)
def test_refused(values, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        OBJECTIVES.parse(values)
    assert "\n" not in str(refusal.value)
