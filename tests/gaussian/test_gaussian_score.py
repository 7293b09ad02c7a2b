import math

import pytest
import torch

from osmose.errors import UserError
from osmose.gaussian import SCHEDULES
from osmose.gaussian.density import log_density
from osmose.gaussian.derivatives import signs_like, with_divergence
from osmose.gaussian.oracles import GaussianDenoiser
from osmose.gaussian.schedule import VarianceExploding
from osmose.gaussian.score import score_field

MEAN = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.5, 0.4, 0.0], [0.4, 0.6, 0.1], [0.0, 0.1, 0.05]], dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)


def law(ratio):
    return torch.distributions.MultivariateNormal(MEAN, COVARIANCE + ratio**2 * EYE)


def field_on(kind):
    return score_field(GaussianDenoiser(MEAN, COVARIANCE), SCHEDULES.parse(kind))


@pytest.mark.parametrize("kind", list(SCHEDULES.entries))
def test_the_score_is_that_of_the_noisy_law_whatever_the_schedule(kind):
    field = field_on(kind)
    assert 0 < field.lowest < 0.05
    assert field.highest > 10
    y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    for ratio in (0.05, 0.7, 10.0):
        (want,) = torch.autograd.grad(law(ratio).log_prob(y).sum(), y)
        got = field.score(y, ratio)
        assert torch.allclose(got, want, rtol=1e-6)
        assert torch.allclose(field.noise(y, ratio), -ratio * want, rtol=1e-6)
        score, divergence = with_divergence(lambda y, r=ratio: field.score(y, r), y, None)
        assert torch.allclose(score, want, rtol=1e-6)
        assert torch.allclose(divergence, -(COVARIANCE + ratio**2 * EYE).inverse().trace().expand(1, 5), rtol=1e-6)
    mixed = torch.tensor([0.05, 0.7, 10.0, 0.7, 0.05], dtype=torch.float64)
    rows = torch.stack([field.score(y[i : i + 1], float(r))[0] for i, r in enumerate(mixed)])
    assert torch.allclose(field.score(y, mixed), rows, rtol=1e-9)


def test_a_ratio_that_it_was_not_made_for_is_refused():
    field = field_on("ve")
    field.require(0.002)
    field.require(80.0)
    with pytest.raises(UserError, match=r"ratios: 0.001 is not valid: .* trained at are 0.002 to 80"):
        field.require(0.001)
    assert torch.allclose(field.ratios(3), torch.tensor([0.002, 0.4, 80.0], dtype=torch.float64))


@pytest.mark.parametrize("kind", ["ve", "linear", "trig"])
def test_the_density_is_the_closed_form(kind):
    field = field_on(kind)
    y = MEAN + torch.randn(6, 3, generator=torch.Generator().manual_seed(3)).double()
    # Samples begin with N(0, prior_std^2); the exact law there has the data's mean and covariance besides.
    prior = torch.distributions.Normal(0, field.prior_std)
    for ratio in (field.lowest, 0.5):
        found = log_density(field, y, ratio, tolerance=1e-7)
        wrong = law(field.highest).log_prob(found.end) - prior.log_prob(found.end).sum(1)
        assert torch.allclose(found.log_p + wrong, law(ratio).log_prob(y), atol=2e-5)
        assert float(wrong.abs().max()) > 1e-4


def test_the_error_of_the_steps_is_told():
    field = field_on("ve")
    y = MEAN + torch.randn(8, 3, generator=torch.Generator().manual_seed(4)).double()
    fine = log_density(field, y, tolerance=1e-8)
    assert bool((fine.probe_error == 0).all())
    for tolerance in (1e-3, 1e-4, 1e-5):
        found = log_density(field, y, tolerance=tolerance)
        off = (found.log_p - fine.log_p).abs()
        assert bool((off <= found.solver_error).all())
        assert float(found.solver_error.max()) < 300 * tolerance
        assert bool((found.evaluations < fine.evaluations).all())


def test_an_item_s_density_does_not_depend_on_the_others():
    field = field_on("linear")
    y = MEAN + torch.randn(5, 3, generator=torch.Generator().manual_seed(5)).double()
    whole = log_density(field, y)
    alone = [log_density(field, y[i : i + 1]) for i in range(5)]
    assert whole.evaluations.tolist() == [int(one.evaluations) for one in alone]
    assert torch.allclose(whole.log_p, torch.cat([one.log_p for one in alone]), rtol=1e-10)
    classes = torch.arange(5)
    seen = []

    def estimate(y, ratios, condition):
        seen.append(condition)
        return field.estimate(y, ratios, None) + 0 * condition[:, None]

    given = log_density(type(field)(estimate, field.lowest, field.highest, field.prior_std, classes), y)
    assert torch.equal(given.log_p, whole.log_p)
    assert any(len(condition) < 5 for condition in seen)  # items that have arrived are asked no more
    assert torch.equal(seen[0], classes)


def test_probes_estimate_the_same_density():
    field = field_on("ve")
    y = MEAN + torch.randn(4, 3, generator=torch.Generator().manual_seed(6)).double()
    exact = log_density(field, y, tolerance=1e-5)
    found = log_density(field, y, signs=signs_like(y, 60, torch.Generator().manual_seed(7)), tolerance=1e-4)
    assert bool((found.probe_error > 0).all())
    assert bool(((found.log_p - exact.log_p).abs() < 4 * found.probe_error).all())
    one = log_density(field, y, signs=signs_like(y, 1, torch.Generator()))
    assert bool(one.probe_error.isnan().all())


def test_refused():
    field = field_on("ve")
    with pytest.raises(UserError, match=r"tolerance: 0 is not valid: must be between 1e-9 and 0.1"):
        log_density(field, MEAN[None], tolerance=0.0)
    with pytest.raises(UserError, match="ratio: 100 is not valid"):
        log_density(field, MEAN[None], 100.0)

    def broken(y, _ratios, _condition):
        return y * math.nan

    made = type(field)(broken, 0.01, 1.0, 1.0)
    with pytest.raises(UserError, match="likelihood: the network answers with NaN or infinity along the flow"):
        log_density(made, MEAN[None])

    def noise(y, _ratios, _condition):  # no function of y that could be followed
        return (1e6 * y).sin() * 1e3

    rough = type(score_field(GaussianDenoiser(MEAN, COVARIANCE), VarianceExploding()))(noise, 0.01, 1.0, 1.0)
    with pytest.raises(UserError, match="tolerance: 1e-06 cannot be reached: steps of the ODE become too short"):
        log_density(rough, MEAN[None] + math.pi, tolerance=1e-6)
