import itertools
import math

import pytest
import torch

from osmose.errors import UserError
from osmose.gaussian.parametrization import column
from osmose.interpolants import PATHS
from osmose.interpolants.fields import (
    LEARNED,
    Fields,
    check_learned,
    eta_of_score,
    has_score,
    noise_velocity,
    one_sided_of_b,
    one_sided_of_w,
    read,
    require_score,
    score_of_eta,
)
from osmose.interpolants.oracles import GaussianMixture, MixturePath
from osmose.interpolants.paths import LinearPath, QuadraticGamma


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


RHO0 = GaussianMixture(
    f64([[-2.0, 0.5], [1.0, 1.0]]), f64([[[0.5, 0.2], [0.2, 0.4]], [[0.3, -0.1], [-0.1, 0.6]]]), f64([0.3, 0.7])
)
RHO1 = GaussianMixture(
    f64([[2.0, 0.0], [0.0, 2.0], [-1.0, -1.0]]),
    f64([[[0.3, 0.1], [0.1, 0.2]], [[0.5, 0.0], [0.0, 0.1]], [[0.2, -0.1], [-0.1, 0.3]]]),
    f64([0.5, 0.2, 0.3]),
)


def oracle(path):
    path = PATHS.parse(path) if isinstance(path, str) else path
    return MixturePath(path, RHO1, None if path.one_sided or path.mirror else RHO0)


def allowed(path):
    for learn in LEARNED:
        try:
            check_learned(learn, path)
        except UserError:
            continue
        yield learn


TWO_SIDED = ("linear", "trig", "trig-vp", "encdec")
CASES = [(kind, learn) for kind in PATHS.entries for learn in allowed(PATHS.parse(kind))]
FIELDS = ("b", "s", "eta", "eta0", "eta1")


def outputs(learn, known, drift, c=None):
    values = {"v": drift, "b": known.b, "s": known.s, "eta": known.eta}
    if learn == "w":
        values["w"] = column(c.alpha, known.eta1) * known.eta1 - column(c.beta, known.eta0) * known.eta0
    return [values[name] for name in LEARNED[learn]]


def compared(got, want):
    """Names of the fields that are known, after seeing that they are right."""
    names = {name for name in FIELDS if getattr(got, name) is not None}
    for name in names:
        assert torch.allclose(getattr(got, name), getattr(want, name), rtol=1e-8, atol=1e-8), name
    return names


def test_what_may_be_learned():
    assert sorted(set(CASES)) == sorted(
        [(kind, learn) for kind in TWO_SIDED for learn in LEARNED if learn not in ("eta", "w")]
        + [(kind, learn) for kind in PATHS.entries if "one-sided" in kind for learn in ("b", "w")]
        + [("mirror", learn) for learn in LEARNED if learn != "w"]
    )
    assert list(allowed(LinearPath(gamma="none"))) == ["b"]


@pytest.mark.parametrize(("kind", "learn"), CASES)
def test_fields_that_are_read_are_the_true_ones(kind, learn):
    true, x = oracle(kind), randn(5, 2)
    for t in (0.2, 0.7, f64([0.1, 0.3, 0.45, 0.2, 0.05]), f64([0.6, 0.9, 0.55, 0.8, 0.7])):
        want = true.fields(t, x)
        got = read(learn, true.path, true.path.at(t), x, outputs(learn, want, true.drift(t, x), true.path.at(t)))
        late = float(torch.as_tensor(t).max()) > 0.5
        wanted = {"b"} if learn == "b" and not true.path.one_sided else set(FIELDS)
        if kind == "encdec" and learn != "b":
            wanted -= {"eta0"} if late else {"eta1"}
        assert compared(got, want) == wanted


# What is known at t = 0 and at t = 1, where some fields have no value that follows from what was learned.
ALL = set(FIELDS)
AT_THE_ENDS = {
    "linear": {
        "b": ({"b"}, {"b"}),
        "b-eta": ({"b", "eta", "eta0"}, {"b", "eta", "eta1"}),
        "v-eta": ({"eta", "eta0", "eta1"}, {"eta", "eta0", "eta1"}),
        "b-s": (ALL, ALL),
        "v-s": (ALL, ALL),
    },
    "encdec": {  # gamma gamma' is 0 at its ends, and so is gamma' eta
        "b": ({"b", "eta0"}, {"b", "eta1"}),
        "b-eta": ({"b", "eta", "eta0"}, {"b", "eta", "eta1"}),
        "v-eta": ({"b", "eta", "eta0"}, {"b", "eta", "eta1"}),
        "b-s": (ALL - {"eta1"}, ALL - {"eta0"}),
        "v-s": (ALL - {"eta1"}, ALL - {"eta0"}),
    },
    "mirror": {
        "b": ({"b"}, {"b"}),
        "b-eta": (ALL - {"s"}, ALL - {"s"}),
        "v-eta": (ALL - {"s", "b"}, ALL - {"s", "b"}),
        "b-s": (ALL, ALL),
        "v-s": (ALL, ALL),
        "eta": (ALL - {"s", "b"}, ALL - {"s", "b"}),
    },
    "one-sided-linear": {"b": (ALL, ALL - {"s"}), "w": (ALL, ALL - {"s"})},
    "one-sided-vp": {"b": (ALL, ALL), "w": (ALL, ALL - {"s", "b"})},
}
AT_THE_ENDS["trig"] = AT_THE_ENDS["trig-vp"] = AT_THE_ENDS["linear"]
AT_THE_ENDS["one-sided-trig"] = AT_THE_ENDS["one-sided-linear"]


@pytest.mark.parametrize(("kind", "learn"), CASES)
def test_limits_at_the_ends_are_true_or_unknown(kind, learn):
    true, x = oracle(kind), randn(4, 2)
    for t, known in zip((0.0, 1.0), AT_THE_ENDS[kind][learn], strict=True):
        want = true.fields(t, x)
        assert all(getattr(want, name).isfinite().all() for name in FIELDS)
        got = read(learn, true.path, true.path.at(t), x, outputs(learn, want, true.drift(t, x), true.path.at(t)))
        assert compared(got, want) == known
        # A batch of which one item is at an end knows no more than that item does.
        times = f64([t, 0.3, 0.3, 0.3]) if t == 0 else f64([t, 0.7, 0.7, 0.7])
        want = true.fields(times, x)
        got = read(
            learn, true.path, true.path.at(times), x, outputs(learn, want, true.drift(times, x), true.path.at(times))
        )
        mixed = compared(got, want)
        assert mixed <= known
        assert mixed >= known - ({"eta0", "eta1"} if learn in ("b", "b-eta") else set())


@pytest.mark.parametrize("kind", [kind for kind in PATHS.entries if "one-sided" in kind])
def test_an_error_of_w_is_magnified_nowhere(kind):
    true, x, error = oracle(kind), randn(4, 2), 0.01
    for t in (0.0, 1e-4, 0.3, 0.9, 1 - 1e-4):
        want, c = true.fields(t, x), true.path.at(t)
        (w,) = outputs("w", want, None, c)
        got = read("w", true.path, c, x, [w + error])
        for name in ("eta", "eta1"):
            assert float((getattr(got, name) - getattr(want, name)).abs().max()) <= math.sqrt(2) * error + 1e-12
    # At t = 0 x is the noise, whatever a network says.
    off = read("w", true.path, true.path.at(0.0), x, [w + 1])
    assert torch.equal(off.eta, x)
    assert float(true.fields(0.0, x).b[0, 0]) == pytest.approx(
        float(true.path.at(0.0).alpha_dot * x[0, 0] + true.path.at(0.0).beta_dot * RHO1.mean[0]), abs=1e-12
    )


def test_a_path_without_noise_knows_its_ends_from_the_velocity():
    true, x = oracle(LinearPath(gamma="none")), randn(5, 2)
    want = true.fields(0.4, x)
    assert compared(read("b", true.path, true.path.at(0.4), x, [want.b]), want) == {"b", "eta0", "eta1"}


def test_a_gamma_of_finite_slope_has_no_velocity_at_the_ends():
    true, x = oracle(LinearPath(gamma=QuadraticGamma())), randn(5, 2)
    for t in (0.0, 1.0):
        want = true.fields(t, x)
        got = read("v-eta", true.path, true.path.at(t), x, [true.drift(t, x), want.eta])
        assert compared(got, want) == ALL - {"s"}
        assert torch.equal(got.b, true.drift(t, x))


@pytest.mark.parametrize("kind", ["linear", "trig", "trig-vp"])
def test_the_ends_add_up_to_x_and_to_the_velocity_whatever_was_learned(kind):
    path, t = PATHS.parse(kind), f64([0.05, 0.3, 0.5, 0.9])
    c, x, b, eta = path.at(t), *randn(3, 4, 2, 3)
    got = read("b-eta", path, c, x, [b, eta])
    alpha, beta, gamma, alpha_dot, beta_dot, product = (
        getattr(c, name)[:, None, None]
        for name in ("alpha", "beta", "gamma", "alpha_dot", "beta_dot", "gamma_gamma_dot")
    )
    assert torch.allclose(alpha * got.eta0 + beta * got.eta1 + gamma * eta, x, atol=1e-12)
    assert torch.allclose(alpha_dot * got.eta0 + beta_dot * got.eta1 + product / gamma * eta, b, atol=1e-11)
    # The other ways in lead to the same.
    v, s = b - product / gamma * eta, -eta / gamma
    for learn, given in (("v-eta", [v, eta]), ("b-s", [b, s]), ("v-s", [v, s])):
        same = read(learn, path, c, x, given)
        assert all(torch.allclose(getattr(same, name), getattr(got, name), atol=1e-11) for name in FIELDS)


@pytest.mark.parametrize("kind", [kind for kind in PATHS.entries if "one-sided" in kind])
def test_one_sided_conversions_are_inverse_to_each_other(kind):
    path, t = PATHS.parse(kind), f64([0.05, 0.3, 0.5, 0.9])
    c, x, b = path.at(t), *randn(2, 4, 2, 3)
    one = one_sided_of_b(c, x, b)
    back = one_sided_of_w(c, x, column(c.alpha, x) * one.eta1 - column(c.beta, x) * one.eta)
    assert all(torch.allclose(getattr(one, name), getattr(back, name), atol=1e-11) for name in FIELDS)
    # The score by the formula of the literature (willisma/SiT).
    alpha, beta, alpha_dot, beta_dot = (
        getattr(c, name)[:, None, None] for name in ("alpha", "beta", "alpha_dot", "beta_dot")
    )
    s = (beta * b - beta_dot * x) / (alpha * (alpha * beta_dot - alpha_dot * beta))
    assert torch.allclose(one.s, s, atol=1e-11)
    assert torch.allclose(alpha * one.eta + beta * one.eta1, x, atol=1e-12)
    assert one.eta0 is one.eta


def test_vp_velocity_at_the_end_is_score_and_data():
    true, x = oracle("one-sided-vp"), randn(4, 2)
    for t in (0.5, 1.0):
        want = true.fields(t, x)
        assert torch.allclose(want.b, t * want.s + want.eta1, atol=1e-12)


def test_score_and_denoiser_are_inverse_to_each_other():
    eta, width = randn(3, 2), f64([0.1, 0.5, 2.0])
    assert torch.allclose(eta_of_score(score_of_eta(eta, width), width), eta)
    assert torch.allclose(score_of_eta(eta, width), -eta / width[:, None])
    assert score_of_eta(eta, f64([0.1, 0.0, 1.0])) is None
    c = LinearPath().at(f64([0.2, 0.5, 0.7]))
    assert torch.allclose(noise_velocity(c, eta, None), noise_velocity(c, None, score_of_eta(eta, c.gamma)))
    assert noise_velocity(c, None, None) is None


def test_fields_keep_the_dtype_of_a_batch_of_any_shape():
    x, b, eta = randn(3, 4, 1, 3, 3).float()
    for path, learn, given in (
        ("linear", "b-eta", [b, eta]),
        ("one-sided-vp", "b", [b]),
        ("one-sided-trig", "w", [eta]),
        ("mirror", "eta", [eta]),
    ):
        path = PATHS.parse(path)
        one = read(learn, path, path.at(0.3), x, given)
        many = read(learn, path, path.at(torch.full((4,), 0.3)), x, given)
        for name in FIELDS:
            assert getattr(one, name).dtype == torch.float32
            assert getattr(one, name).shape == x.shape
            assert torch.allclose(getattr(one, name), getattr(many, name), atol=1e-5)


def test_what_does_not_fit_is_refused():
    for learn, path, message in (
        ("b-s", "one-sided-vp", "all its fields follow from b, or from w"),
        ("eta", "one-sided-vp", "all its fields follow from b, or from w"),
        ("w", "linear", "leaves the noise of linear unknown; learn b-eta"),
        ("eta", "linear", "leaves the velocity of linear unknown"),
        ("b-eta", LinearPath(gamma="none"), "whose gamma is none; learn b"),
        ("b_eta", "linear", "did you mean 'b-eta'"),
    ):
        with pytest.raises(UserError, match=message):
            check_learned(learn, PATHS.parse(path))
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter"):
        read("b-eta", LinearPath(), LinearPath().at(0.5), x, [x])
    with pytest.raises(ValueError, match=r"eta has shape \(2, 2\), and x has \(2, 3\)"):
        read("b-eta", LinearPath(), LinearPath().at(0.5), x, [x, x[:, :2]])


def test_an_sde_needs_a_score():
    for kind, learn in itertools.chain(CASES, [(LinearPath(gamma="none"), "b")]):
        path = PATHS.parse(kind)
        scored = path.one_sided or learn != "b"
        assert has_score(learn, path) == scored
        if scored:
            require_score(learn, path)
        else:
            with pytest.raises(UserError, match=r"only b was learned has none; .*learn b-eta, or take the ODE"):
                require_score(learn, path)
    assert Fields(b=torch.zeros(1)).s is None
