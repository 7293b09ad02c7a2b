from typing import Literal

import pytest
import torch
from torch import nn

from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian import PARAMETRIZATIONS, SCHEDULES
from osmose.gaussian.draws import StepDraws
from osmose.gaussian.parametrization import EDMParametrization, VParametrization
from osmose.gaussian.schedule import CosineSchedule, LinearSchedule, StraightSchedule, TrigSchedule, VarianceExploding
from osmose.methods.diffusion import DDPMConfig, EDMConfig
from osmose.methods.messages import Batch
from osmose.methods.times import LogNormalTimes, UniformTimes
from osmose.networks.base import NetworkConfig
from osmose.networks.mlp import MLPConfig
from osmose.networks.unet import UNetConfig

IMAGES = DataSpec(kind="image", shape=(1, 8, 8), range=(0.0, 1.0), shift=(0.5,), scale=(0.5,), num_classes=3)
POINTS = DataSpec(kind="points", shape=(2,))
UNET = UNetConfig(channels=8, mult=(1, 2), blocks=1, attention=(4,))


class Optimal(nn.Module):
    """The noise that minimises L_simple for data N(0, s2) on the linear schedule: sqrt(1 - abar) x / m."""

    def __init__(self, s2):
        super().__init__()
        self.s2 = s2
        self.abar = (1 - LinearSchedule().betas).cumprod(0)
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x, label, condition=None):  # noqa: ARG002
        abar = self.abar[label.round().long()].float()[:, None]
        return (1 - abar).sqrt() * x / (abar * self.s2 + 1 - abar)


class OptimalConfig(NetworkConfig):
    kind: Literal["optimal"] = "optimal"
    s2: float

    def build(self, event_shape, *, num_classes=None):  # noqa: ARG002
        return Optimal(self.s2)


def perturbed(model, amount=0.1):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return model


def batch_of(spec, count, *, std=1.0, condition=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batch(std * torch.randn(count, *spec.shape, generator=generator), condition)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("num_steps", [1000, 50])
def test_ddpm_loss_is_l_simple_bit_for_bit(conditional, num_steps):
    schedule = LinearSchedule(num_steps=num_steps)
    model = perturbed(DDPMConfig(network=UNET, schedule=schedule, conditional=conditional).build(IMAGES))
    condition = torch.arange(6) % 3 if conditional else None
    batch = batch_of(IMAGES, 6, condition=condition)
    terms = model.loss(batch, StepDraws(4, 9, 0, 6, 6))

    draws = StepDraws(4, 9, 0, 6, 6)
    k = (draws.uniform() * num_steps).floor().long() + 1
    eps = draws.normal((1, 8, 8))
    abar = (1 - torch.linspace(0.1 / num_steps, 20 / num_steps, num_steps, dtype=torch.float64)).cumprod(0)[k - 1]
    column = lambda value: value.float().view(-1, 1, 1, 1)  # noqa: E731
    x_t = column(abar.sqrt()) * batch.x0 + column((1 - abar).sqrt()) * eps
    label = ((k - 1) * 1000 / num_steps).float()
    want = (eps - model.networks()[0](x_t, label, condition)).square().flatten(1).mean(1)
    assert torch.equal(terms.per_item, want)
    assert torch.equal(terms.t, k.double() / num_steps)
    assert terms.per_item.shape == (6,)
    assert terms.per_item.requires_grad
    assert model(batch, StepDraws(4, 9, 0, 6, 6)).per_item.equal(terms.per_item)


def test_edm_loss_is_karras_weighted_loss():
    sigma_data = 0.7
    config = EDMConfig(network=UNET, parametrization=EDMParametrization(sigma_data=sigma_data))
    model = perturbed(config.build(IMAGES))
    batch = batch_of(IMAGES, 64, std=sigma_data)
    terms = model.loss(batch, StepDraws(0, 0, 0, 64, 64))
    draws = StepDraws(0, 0, 0, 64, 64)
    u = draws.uniform()
    log_sigma = (-1.2 + 1.2 * torch.special.ndtri(u)).clamp(torch.tensor(0.002).log(), torch.tensor(80.0).log())
    sigma = log_sigma.exp().float()
    noise = draws.normal((1, 8, 8)) * sigma.view(-1, 1, 1, 1)
    at = lambda value: value.view(-1, 1, 1, 1)  # noqa: E731
    total = sigma**2 + sigma_data**2
    y = batch.x0 + noise
    F = model.networks()[0](y / at(total.sqrt()), 100 * sigma.log() / 4)
    D = at(sigma_data**2 / total) * y + at(sigma * sigma_data / total.sqrt()) * F
    weight = total / (sigma * sigma_data) ** 2
    want = weight * (D - batch.x0).square().flatten(1).mean(1)
    assert torch.allclose(terms.per_item, want, rtol=2e-3)
    # The denoiser is the same D.
    level = model.schedule.level(terms.t)
    assert torch.allclose(model.denoiser(y, level), D, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("s2", "want"), [(1.0, 0.27551), (0.25, 0.17305)])
def test_the_minimum_of_l_simple_on_gaussian_data(s2, want):
    spec = DataSpec(kind="points", shape=(400,))
    model = DDPMConfig(network=OptimalConfig(s2=s2), times=UniformTimes(stratified=True)).build(spec)
    batch = batch_of(spec, 4000, std=s2**0.5)
    terms = model.loss(batch, StepDraws(0, 0, 0, 4000, 4000))
    assert terms.per_item.mean().item() == pytest.approx(want, rel=4e-3)
    abar = model.denoiser.network.abar
    exact = abar * s2 / (abar * s2 + 1 - abar)
    assert exact.mean().item() == pytest.approx(want, abs=6e-6)
    k = (terms.t * 1000).round().long()
    by_step = torch.zeros(1000, dtype=torch.float64).index_add(0, k - 1, terms.per_item.double()) / 4
    # Each is a mean of 1600 squares: a relative error of about sqrt(2 / 1600) = 0.035.
    assert ((by_step - exact) / exact).abs().max() < 0.2
    assert ((by_step - exact) / exact).mean().abs() < 0.005
    # It is a minimum: another scale of the same network does worse.
    model.denoiser.network.s2 = 2 * s2
    assert model.loss(batch, StepDraws(0, 0, 0, 4000, 4000)).per_item.mean() > terms.per_item.mean() + 1e-3


@pytest.mark.parametrize("schedule", list(SCHEDULES.entries))
@pytest.mark.parametrize("parametrization", list(PARAMETRIZATIONS.entries))
def test_an_untrained_network_has_the_loss_of_answering_zero(schedule, parametrization):
    if parametrization == "eps" and schedule in ("trig", "straight"):
        with pytest.raises(UserError, match="'eps' cannot recover x0"):
            DDPMConfig(network=UNET, schedule=schedule, parametrization=parametrization).build(IMAGES)
        return
    kind = {"kind": "edm", "sigma_data": 1.0} if parametrization == "edm" else parametrization
    times = LogNormalTimes() if schedule == "ve" else UniformTimes()
    model = DDPMConfig(network=UNET, schedule=schedule, parametrization=kind, times=times).build(IMAGES)
    terms = model.loss(batch_of(IMAGES, 600), StepDraws(0, 0, 0, 600, 600))
    level = model.schedule.level(terms.t)
    want = {"v": (level.alpha**2 + level.sigma**2).mean().item()}.get(parametrization, 1.0)
    assert terms.per_item.mean().item() == pytest.approx(want, rel=0.03)
    assert bool(terms.per_item.isfinite().all())


@pytest.mark.parametrize("config", [DDPMConfig(network=UNET), EDMConfig(network=UNET)])
@pytest.mark.parametrize("stratified", [False, True])
def test_a_batch_may_be_cut(config, stratified):
    model = perturbed(config.replace(**{"times.stratified": stratified}).build(IMAGES))
    batch = batch_of(IMAGES, 10)
    whole = model.loss(batch, StepDraws(2, 3, 0, 10, 10))
    parts = [model.loss(Batch(batch.x0[a:b]), StepDraws(2, 3, a, b, 10)) for a, b in ((0, 4), (4, 5), (5, 10))]
    assert torch.equal(torch.cat([part.t for part in parts]), whole.t)
    assert torch.allclose(torch.cat([part.per_item for part in parts]), whole.per_item, rtol=1e-4)


def test_the_loss_does_not_touch_the_global_generator():
    model = DDPMConfig(network=MLPConfig(width=8)).build(POINTS)
    state = torch.get_rng_state()
    model.loss(batch_of(POINTS, 5), StepDraws(0, 0, 0, 5, 5))
    model.sample(3, num_steps=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule(num_steps=40)], ids=lambda s: s.kind)
def test_uniform_times_hit_every_step_alike(schedule):
    T = schedule.native_steps
    sampler = UniformTimes(stratified=True).build(schedule)
    t, weight = sampler.draw(StepDraws(0, 0, 0, 3 * T, 3 * T))
    assert weight is None
    assert t.dtype == torch.float64
    steps = torch.tensor([k / T for k in range(1, T + 1)], dtype=torch.float64)
    values, counts = t.unique(return_counts=True)
    assert torch.equal(values, steps)
    assert bool((counts == 3).all())
    t, _ = UniformTimes().build(schedule).draw(StepDraws(0, 0, 0, 200 * T, 200 * T))
    values, counts = t.unique(return_counts=True)
    assert torch.equal(values, steps)
    assert ((counts - 200) ** 2 / 200).sum().item() == pytest.approx(T - 1, abs=6 * (2 * T) ** 0.5)  # chi squared


def test_uniform_times_at_the_ends_of_the_unit_interval():
    u = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for T in (1000, 1024, 4000, 37):
        schedule = CosineSchedule(num_steps=T)
        assert torch.equal(UniformTimes().times(u, schedule), torch.tensor([1 / T, 1.0], dtype=torch.float64))
    assert torch.equal(UniformTimes().times(u, StraightSchedule()), u)


@pytest.mark.parametrize("schedule", [VarianceExploding(), LinearSchedule(), TrigSchedule()], ids=lambda s: s.kind)
@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.4, 0.5)])
def test_log_normal_times_have_normal_quantiles(schedule, mean, std):
    u = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    t = LogNormalTimes(mean=mean, std=std).times(u, schedule)
    log_ratio = (schedule.sigma(t) / schedule.alpha(t)).log()
    want = mean + std * torch.distributions.Normal(0.0, 1.0).icdf(u)
    assert torch.allclose(log_ratio, want, rtol=1e-6, atol=1e-6)
    ends = LogNormalTimes(mean=mean, std=std).times(torch.tensor([0.0, 1.0], dtype=torch.float64), schedule)
    T = schedule.native_steps
    assert torch.allclose(ends, torch.tensor([1 / T if T else 0.0, 1.0], dtype=torch.float64), atol=1e-7)


def test_log_normal_draws_have_edm_s_law():
    schedule = VarianceExploding()
    t, _ = LogNormalTimes().build(schedule).draw(StepDraws(0, 0, 0, 20_000, 20_000))
    log_sigma = schedule.sigma(t).log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.04)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.03)


def test_the_denoiser_is_trained_to_the_posterior_mean():
    # One weight to learn: F = w x at a single noise level. Least squares gives w = E[x F*] / E[x^2].
    level = TrigSchedule().level(torch.full((200_000,), 0.3, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 200_000, 1, generator=generator, dtype=torch.float64).unbind(0)
    x0 = 0.6 * x0
    alpha, sigma = level.alpha[0].item(), level.sigma[0].item()
    x = alpha * x0 + sigma * eps
    for parametrization in (VParametrization(), EDMParametrization(sigma_data=0.5)):
        c = parametrization.coefficients(type(level)(*(value[0].item() for value in level)))
        target = c.target_x0 * x0 + c.target_eps * eps
        weight = ((x * target).mean() / (x * x).mean()).item()
        gain = c.c_skip + c.c_out * weight
        assert gain == pytest.approx(alpha * 0.36 / (alpha**2 * 0.36 + sigma**2), rel=0.02)
