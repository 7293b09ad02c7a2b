import math
from typing import Literal

import pytest
import torch

from osmose.configuration import Config, ConfigError
from osmose.errors import UserError
from osmose.interpolants import GAMMAS, PATHS
from osmose.interpolants.paths import (
    BrownianGamma,
    Coefficients,
    EncDecPath,
    Gamma,
    GammaChoice,
    LinearPath,
    MirrorPath,
    OneSidedVPPath,
    Path,
    SineGamma,
    TrigPath,
    TrigVPPath,
    check_gamma,
    check_path,
    interpolate,
)

every_path = pytest.mark.parametrize("kind", list(PATHS.entries))
INSIDE = torch.linspace(0.01, 0.99, 197, dtype=torch.float64)


def slope_of(value, t):
    if not value.requires_grad:  # a constant
        return torch.zeros_like(t)
    return torch.autograd.grad(value.sum(), t, retain_graph=True)[0]


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@every_path
def test_every_registered_path_is_an_interpolant(kind):
    check_path(PATHS.parse(kind))


@pytest.mark.parametrize("kind", list(GAMMAS.entries))
def test_every_registered_gamma_vanishes_at_the_ends_exactly(kind):
    gamma = GAMMAS.parse(kind)
    check_gamma(gamma)
    values, products = gamma.at(f64(0, 1))
    assert values.tolist() == [0, 0]
    a = gamma.a if kind == "brownian" else 0.0
    assert products.tolist() == pytest.approx([a / 2, -a / 2], abs=1e-15)


def test_the_gammas_have_the_values_of_their_formulas():
    t = 0.3
    wanted = {"none": 0.0, "brownian": math.sqrt(0.21), "quadratic": 0.21, "sine": math.sin(0.3 * math.pi) ** 2}
    assert {kind: float(GAMMAS.parse(kind).at(t)[0]) for kind in GAMMAS.entries} == pytest.approx(wanted, abs=1e-15)
    assert float(BrownianGamma(a=3.0).at(t)[0]) == pytest.approx(math.sqrt(0.63), abs=1e-15)
    for kind in GAMMAS.entries:  # by autograd, not by the differences that the check itself takes
        t = INSIDE.clone().requires_grad_()
        value, product = GAMMAS.parse(kind).at(t)
        assert torch.allclose(product, slope_of(value**2 / 2, t), atol=1e-12)


def test_the_paths_have_the_values_of_the_table():
    t, turn = 0.3, 0.3 * math.pi / 2
    rest = math.sqrt(1 - 0.21)
    wanted = {
        "linear": (0.7, 0.3, math.sqrt(0.21)),
        "trig": (math.cos(turn), math.sin(turn), math.sqrt(0.21)),
        "trig-vp": (math.cos(turn) * rest, math.sin(turn) * rest, math.sqrt(0.21)),
        "encdec": (math.cos(0.3 * math.pi) ** 2, 0.0, math.sin(0.3 * math.pi) ** 2),
        "one-sided-linear": (0.7, 0.3, 0.0),
        "one-sided-trig": (math.cos(turn), math.sin(turn), 0.0),
        "one-sided-vp": (math.sqrt(0.91), 0.3, 0.0),
        "mirror": (0.0, 1.0, math.sqrt(0.21)),
    }
    for kind in PATHS.entries:
        c = PATHS.parse(kind).at(t)
        assert (float(c.alpha), float(c.beta), float(c.gamma)) == pytest.approx(wanted[kind], abs=1e-14), kind
    late = EncDecPath().at(0.8)
    assert (float(late.alpha), float(late.beta)) == pytest.approx((0.0, math.cos(0.8 * math.pi) ** 2), abs=1e-14)


@every_path
def test_derivatives_are_those_of_autograd(kind):
    t = INSIDE.clone().requires_grad_()
    c = PATHS.parse(kind).at(t)
    pairs = ((c.alpha, c.alpha_dot), (c.beta, c.beta_dot), (c.gamma**2 / 2, c.gamma_gamma_dot))
    for value, slope in (*pairs, (c.alpha**2 / 2, c.alpha_alpha_dot)):
        assert torch.allclose(slope, slope_of(value, t), atol=1e-11)


@every_path
def test_coefficients_have_the_shape_of_t_and_are_exact_at_the_ends(kind):
    path = PATHS.parse(kind)
    assert all(v.shape == () and v.dtype == torch.float64 for v in vars(path.at(0.25)).values())
    ends = path.at(f64(0, 1))
    assert all(v.shape == (2,) for v in vars(ends).values())
    assert ends.alpha.tolist() == ([0, 0] if path.mirror else [1, 0])
    assert ends.beta.tolist() == ([1, 1] if path.mirror else [0, 1])


@pytest.mark.parametrize("kind", ["trig-vp", "one-sided-trig", "one-sided-vp"])
def test_unit_variance_is_kept(kind):
    c = PATHS.parse(kind).at(INSIDE)
    assert torch.allclose(c.alpha**2 + c.beta**2 + c.gamma**2, torch.ones_like(INSIDE), atol=1e-14)


def test_vp_has_a_finite_product_where_its_slope_is_infinite():
    c = OneSidedVPPath().at(1.0)
    assert float(c.alpha_dot) == -math.inf
    assert float(c.alpha_alpha_dot) == -1


def test_width_is_the_factor_of_the_gaussian_noise():
    for kind, wanted in (("linear", 0.5), ("one-sided-linear", 0.5), ("mirror", 0.5)):
        path = PATHS.parse(kind)
        assert float(path.width(path.at(0.5))) == wanted
        assert path.noisy
    assert not LinearPath(gamma="none").noisy


def test_configurations_survive_json_and_are_changed_by_name():
    path = PATHS.parse({"kind": "linear", "gamma": {"kind": "brownian", "a": 2.0}})
    assert PATHS.parse(path.to_json()) == path
    assert path.replace(**{"gamma.a": 3.0}).gamma == BrownianGamma(a=3.0)
    assert path.replace(gamma="sine").gamma == SineGamma()
    assert PATHS.parse("encdec").gamma == SineGamma()
    assert PATHS.parse("mirror").gamma == BrownianGamma(a=1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "encdec", "gamma": "none"}, "gamma: without noise encdec"),
        ({"kind": "mirror", "gamma": "none"}, "gamma: without noise a mirror"),
        ({"kind": "trig-vp", "gamma": {"kind": "brownian", "a": 4.5}}, "gamma: reaches 1.061"),
        ({"kind": "trig-vp", "gamma": "sine"}, "gamma: reaches 1, and"),
        ({"kind": "linear", "gamma": {"kind": "brownian", "a": 0}}, "gamma.a: 0 is not valid"),
        ({"kind": "one-sided-vp", "gamma": "sine"}, "gamma: unknown field"),
        ({"kind": "lienar"}, "did you mean 'linear'"),
    ],
)
def test_paths_that_are_none_are_refused_in_one_line(values, message):
    with pytest.raises(ConfigError) as caught:
        PATHS.parse(values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_trig_vp_takes_any_gamma_below_one():
    check_path(TrigVPPath(gamma=BrownianGamma(a=3.9)))


@every_path
def test_times_outside_are_refused(kind):
    for t in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="outside"):
            PATHS.parse(kind).at(t)


class Bumped(Gamma):
    kind: Literal["bumped"] = "bumped"
    floor: float = 0.0
    factor: float = 1.0
    sign: float = 1.0

    def at(self, t):
        gamma, product = SineGamma().at(t)
        return self.sign * gamma + self.floor, self.factor * product


def test_a_gamma_of_the_user_s_is_checked():
    check_gamma(Bumped())
    with pytest.raises(ConfigError, match=r"^gamma: 0.1 at t = 0 is not valid: must be 0$"):
        check_gamma(Bumped(floor=0.1))
    with pytest.raises(ConfigError, match="must be at least 0"):
        check_gamma(Bumped(sign=-1.0))
    with pytest.raises(ConfigError, match=r"gamma gamma'.*have the slope"):
        check_gamma(Bumped(factor=2.0))

    class Holder(Config):
        gamma: GammaChoice
        path: TrigPath = TrigPath()

    assert Holder(gamma="quadratic").gamma.kind == "quadratic"
    with pytest.raises(ValueError, match=r"gamma: 0.1 at t = 0"):  # a part of a path, refused with it
        LinearPath(gamma=Bumped(floor=0.1))


class Own(Path):
    kind: Literal["own"] = "own"
    start: float = 1.0
    end: float = 1.0
    slope: float = 1.0
    noise: float = 1.0
    floor: float = 0.0

    def at(self, t):
        c = LinearPath().at(t)
        alpha, beta = self.start * c.alpha, self.end * c.beta
        gamma, product = self.noise * c.gamma + self.floor, self.noise**2 * c.gamma_gamma_dot
        alpha_dot, beta_dot = self.start * self.slope * c.alpha_dot, self.end * self.slope * c.beta_dot
        return Coefficients(c.t, alpha, beta, gamma, alpha_dot, beta_dot, alpha * alpha_dot, product)


class OwnOneSided(Own):
    one_sided = True


class OwnMirror(Own):
    mirror = True


class Crossing(Path):
    kind: Literal["crossing"] = "crossing"

    def at(self, t):
        t = torch.as_tensor(t, dtype=torch.float64)
        first, none = t < 0.5, torch.zeros_like(t)
        bend, slope = (1 - 2 * t) ** 2, -4 * (1 - 2 * t)
        alpha, beta = torch.where(first, bend, none), torch.where(first, none, bend)
        alpha_dot, beta_dot = torch.where(first, slope, none), torch.where(first, none, slope)
        return Coefficients(t, alpha, beta, none, alpha_dot, beta_dot, alpha * alpha_dot, none)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (Own(start=0.9), "alpha: 0.9 at t = 0 is not valid: must be 1"),
        (Own(end=1.1), "beta: 1.1 at t = 1 is not valid: must be 1"),
        (Own(floor=0.2), "gamma: 0.2 at t = 0 is not valid: must be 0"),
        (Own(noise=-1.0), "gamma: -"),
        (Own(slope=2.0), "alpha_dot: -2 at t = 0.0137 is not valid: the values there have the slope -1"),
        (OwnOneSided(), "gamma: 0.5 is not valid: must be 0 on a one-sided path"),
        (OwnMirror(), "alpha: 1 at t = 0 is not valid: must be 0"),
        (Crossing(), "alpha^2 + beta^2 + gamma^2: 0 at t = 0.5"),
    ],
)
def test_a_path_of_the_user_s_is_checked(path, message):
    check_path(Own())
    with pytest.raises(ConfigError) as caught:
        check_path(path)
    assert str(caught.value).startswith(message)


def test_the_ends_of_an_interpolant_are_its_items():
    x0, x1, z = torch.randn(3, 4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kind in PATHS.entries:
        path = PATHS.parse(kind)
        noise = None if path.one_sided else z
        start, end = (interpolate(path.at(t), x0, x1, noise) for t in (0.0, 1.0))
        assert torch.equal(start, x1 if path.mirror else x0)
        assert torch.equal(end, x1)
    got = interpolate(LinearPath().at(f64(0.0, 0.5, 0.5, 1.0)), x0, x1, z)
    assert torch.allclose(got[1], 0.5 * (x0[1] + x1[1] + z[1]))
    assert interpolate(LinearPath().at(0.5), x0.float(), x1.float(), z.float()).dtype == torch.float32


def test_items_of_other_shapes_are_refused():
    c, x = MirrorPath().at(0.5), torch.zeros(4, 3)
    with pytest.raises(UserError, match=r"x0: shape \(4, 2\) is not x1's \(4, 3\)"):
        interpolate(c, torch.zeros(4, 2), x, x)
    with pytest.raises(UserError, match="z: shape"):
        interpolate(c, x, x, torch.zeros(3, 3))
