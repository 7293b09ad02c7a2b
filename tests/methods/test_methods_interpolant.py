"""Interpolants as a method: defaults, refusals, what the loss is least at, and where samplers arrive with an oracle."""

import math

import pytest
import torch

from osmose.configuration import ConfigError
from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.draws import SampleDraws, StepDraws
from osmose.gaussian.parametrization import column
from osmose.interpolants import PATHS
from osmose.interpolants.fields import LEARNED
from osmose.interpolants.oracles import GaussianMixture, MixturePath
from osmose.methods import METHODS
from osmose.methods.interpolant import InterpolantConfig
from osmose.methods.messages import Batch
from osmose.networks.mlp import MLPConfig

MLP = MLPConfig(width=16, depth=1)
PLANE = DataSpec(kind="points", shape=(2,))
FROM = PLANE.replace(start=PLANE.to_json())
# Both ends have units of their own.
BEFORE = DataSpec(kind="points", shape=(2,), shift=(1.0, -2.0), scale=(0.5, 3.0), num_classes=2)
AFTER = DataSpec(kind="points", shape=(2,), shift=(10.0, 20.0), scale=(4.0, 2.0), num_classes=3, start=BEFORE)
PIXELS = DataSpec(kind="image", shape=(1, 2, 2), range=(0.0, 16.0), levels=17, shift=(8.0,), scale=(8.0,))
ONE_SIDED = ["one-sided-linear", "one-sided-trig", "one-sided-vp"]
TWO_SIDED = ["linear", "trig", "encdec"]
STILL = {"kind": "linear", "gamma": "none"}
CAP = 1e-4


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


RHO0 = GaussianMixture(
    f64([[-1.5, 0.5], [1.0, 1.0]]), f64([[[0.5, 0.2], [0.2, 0.4]], [[0.3, -0.1], [-0.1, 0.6]]]), f64([0.3, 0.7])
)
RHO1 = GaussianMixture(
    f64([[1.5, 0.0], [-1.0, -1.0]]), f64([[[0.3, 0.1], [0.1, 0.4]], [[0.4, -0.2], [-0.2, 0.5]]]), f64([0.6, 0.4])
)


def build(spec=PLANE, noise=0.0, **parts):
    """A model whose network says 0, or with weights that are not zero, the same each time."""
    torch.manual_seed(0)
    kind = "one-sided-linear" if spec.start is None else "linear"
    model = InterpolantConfig(**{"network": MLP, "path": kind, **parts}).build(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model.eval()


def spec_of(path):
    return PLANE if PATHS.parse(path).one_sided else FROM


def oracle(model, law=RHO1, start=RHO0, shift=0.0):
    """Put what is known in closed form in the place of the network; what it was asked at is kept in the list returned.

    Laws are those of the model's units.
    """
    path, asked = model.config.path, []
    true = MixturePath(path, law, None if path.one_sided or path.mirror else start)

    def outputs(x, t, _condition):
        asked.append(x.detach())
        t = t.double()
        t = t[0] if bool((t == t[0]).all()) else t
        flat, names = x.flatten(1), LEARNED[model.learned]
        fields = true.fields(t, flat)
        c = path.at(t)
        drift = true.drift(t, flat)
        known = [
            drift
            if name == "v"
            else column(c.alpha, flat) * fields.eta1 - column(c.beta, flat) * fields.eta0
            if name == "w"
            else getattr(fields, name)
            for name in names
        ]
        return tuple(value.view_as(x) + shift for value in known)

    model._outputs = outputs
    return asked


def says(model, *values):
    """Let the network say the same everywhere."""

    def outputs(x, t, _condition):  # noqa: ARG001
        return tuple(torch.as_tensor(value).to(x).expand_as(x) for value in values)

    model._outputs = outputs


def steps_of(count, seed=0):
    return StepDraws(seed, 0, 0, count, count)


def items(law, count, seed):
    return law.sample(count, torch.Generator().manual_seed(seed)).float()


def z_scores(rows):
    """How many standard errors each column's mean is from 0."""
    rows = rows.double()
    return rows.mean(0) / (rows.std(0) / math.sqrt(len(rows))).clamp(min=1e-12)


def apart(x, y):
    """Distances of all x (n, D) from all y (m, D), (n, m)."""
    return (x[:, None] - y).norm(dim=2)


def off(samples, law):
    """The largest z-score of mean and second moments against a law."""
    centred = samples.double() - law.mean
    products = (centred[:, :, None] * centred[:, None, :] - law.covariance).flatten(1)
    return float(z_scores(torch.cat([centred, products], 1)).abs().max())


# --- what suits the data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "path", "learned"),
    [(PLANE, "one-sided-linear", "b"), (FROM, "linear", "b-eta"), (AFTER, "linear", "b-eta")],
)
def test_the_recipe_follows_the_data(spec, path, learned):
    config = METHODS.parse({"kind": "interpolant", **InterpolantConfig.recipe(spec, 1.0)})
    assert (config.path.kind, config.learn, config.learned) == (path, None, learned)
    assert (config.coupling, config.cap, config.network.kind) == ("independent", CAP, "mlp")
    sampling = config.sampling
    assert (sampling.num_steps, sampling.solver, sampling.epsilon, sampling.direction) == (50, "heun", 0, "forward")
    assert (sampling.follow, sampling.denoise) == (None, False)
    assert METHODS.parse(config.to_json()) == config
    assert config.build(spec).learned == learned


@pytest.mark.parametrize(
    ("path", "learned"),
    [
        ("one-sided-trig", "b"),
        ("one-sided-vp", "w"),
        ("mirror", "eta"),
        ("trig-vp", "b-eta"),
        ("encdec", "b-eta"),
        (STILL, "b"),
        ({"kind": "trig", "gamma": "none"}, "b"),
    ],
)
def test_what_is_learned_follows_the_path(path, learned):
    path = {"kind": path, "gamma": {"kind": "brownian", "a": 0.5}} if path == "trig-vp" else path
    config = InterpolantConfig(network=MLP, path=path)
    assert config.learned == learned
    assert config.replace(learn="b").learned == "b"
    model = config.build(spec_of(path))
    said = []
    model.network.register_forward_hook(lambda _, __, out: said.append(out))
    model.probe(3)
    assert said[0].shape == (3, 2 * len(LEARNED[learned]))


@pytest.mark.parametrize("path", [*ONE_SIDED, *TWO_SIDED, "mirror"])
def test_the_network_is_told_x_and_a_thousand_times_t(path):
    model, seen = build(spec_of(path), path=path), []
    model.network.register_forward_pre_hook(lambda _, given: seen.append(given))
    x1, start = items(RHO1, 30, 0), items(RHO0, 30, 1)
    terms = model.loss(Batch(x1, None, None if path in ONE_SIDED else start), steps_of(30))
    x, label, condition = seen[0]
    assert condition is None
    assert len(x) in (30, 60)
    torch.testing.assert_close(label[:30], (1000 * terms.t).float())
    torch.testing.assert_close(label[-30:], (1000 * terms.t).float())
    assert bool(((terms.t >= CAP) & (terms.t <= 1 - CAP)).all())
    assert terms.t.max() - terms.t.min() > 0.8
    # The mean over both signs of the noise is what the path has without it.
    c = model.config.path.at(terms.t)
    if len(x) == 60:
        middle = c.alpha[:, None] * start + c.beta[:, None] * x1
        torch.testing.assert_close((x[:30] + x[30:]) / 2, middle.float(), atol=1e-5, rtol=1e-5)
        noise = ((x[:30] - x[30:]) / 2 / c.gamma[:, None].float()).flatten()
        assert 0.7 < float(noise.std()) < 1.3


# --- what is refused ------------------------------------------------------------------------------------------------


def refusal(use):
    with pytest.raises(UserError) as error:
        use()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("spec", "parts", "message"),
    [
        (FROM, {"path": "one-sided-trig"}, "path: one-sided-trig begins with noise, and --source names data"),
        (FROM, {"path": "one-sided-linear"}, "take linear"),
        (PLANE, {"path": "mirror"}, "path: mirror begins with items of the data; name them as --source, too"),
        (PLANE, {"learn": "b-eta"}, "learn: 'b-eta' is not for one-sided-linear"),
        (PLANE, {"learn": "v-s"}, "learn: 'v-s' is not for one-sided-linear"),
        (FROM, {"learn": "eta"}, "learn: 'eta' alone leaves the velocity of linear unknown; learn b-eta"),
        (FROM, {"path": STILL, "learn": "b-eta"}, "learn: 'b-eta' asks for the noise of linear, whose gamma is none"),
        (FROM, {"learn": "b", "sampling": {"epsilon": 1.0}}, "only b was learned has none; learn b-eta, or take the"),
        (FROM, {"path": STILL, "sampling": {"epsilon": 0.1}}, "give the path a gamma and learn b-eta, or take the ODE"),
        (FROM, {"path": "mirror", "learn": "b", "sampling": {"epsilon": 1.0}}, "an SDE needs the score"),
        (FROM, {"network": MLPConfig(width=16, linear=True)}, "network: mlp stands on the best linear prediction"),
        (PLANE, {"conditional": True}, "method.conditional: true needs data with classes"),
    ],
)
def test_what_does_not_fit_the_data_or_the_path_is_refused(spec, parts, message):
    assert message in refusal(lambda: build(spec, **parts))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "liner"}, "path.kind: unknown path 'liner'; did you mean 'linear'?"),
        ({"path": {"kind": "linear", "gamma": "brown"}}, "path.gamma.kind: unknown gamma 'brown'"),
        ({"path": {"kind": "linear", "gamma": {"kind": "brownian", "a": 0}}}, "path.gamma.a: 0 is not valid"),
        ({"path": {"kind": "mirror", "gamma": "none"}}, "path.gamma: without noise a mirror is a path that stands"),
        ({"path": {"kind": "encdec", "gamma": "none"}}, "path.gamma: without noise encdec passes through a single"),
        ({"path": {"kind": "trig-vp", "gamma": "sine"}}, "path.gamma: reaches 1, and trig-vp has room below 1 only"),
        ({"path": {"kind": "one-sided-vp", "gamma": "sine"}}, "path.gamma: unknown field"),
        ({"learn": "v"}, "learn: 'v' is not valid: should be 'b', 'b-eta', 'v-eta', 'b-s', 'v-s', 'eta' or 'w'"),
        ({"coupling": "optimal"}, "coupling: 'optimal' is not valid: should be 'independent' or 'ot'"),
        ({"cap": 0}, "cap: 0 is not valid: should be greater than 0"),
        ({"cap": 0.1}, "cap: 0.1 is not valid: should be less than 0.1"),
        ({"sampling": {"epsilon": -1}}, "sampling.epsilon: -1 is not valid: should be greater than or equal to 0"),
        ({"sampling": {"epsilon": math.inf}}, "sampling.epsilon: inf is not valid: should be a finite number"),
        ({"sampling": {"num_steps": 0}}, "sampling.num_steps: 0 is not valid"),
        ({"sampling": {"solver": "ddim"}}, "sampling.solver: 'ddim' is not valid: should be 'euler', "),
        ({"sampling": {"direction": "sideways"}}, "sampling.direction: 'sideways' is not valid: should be 'forward'"),
        ({"schedule": "linear"}, "schedule: unknown field"),
    ],
)
def test_values_are_refused(values, message):
    whole = {"kind": "interpolant", "network": "mlp", "path": "linear", **values}
    with pytest.raises(ConfigError) as error:
        METHODS.parse(whole)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "parts", "options", "message"),
    [
        (FROM, {}, {"solver": "rk4", "epsilon": 1}, "solver: 'rk4' is for the ODE; take heun where epsilon > 0"),
        (PLANE, {}, {"solver": "rk4", "epsilon": 1}, "solver: 'rk4' is for the ODE"),
        (FROM, {"learn": "b"}, {"epsilon": 0.1}, "an SDE needs the score"),
        (FROM, {"path": STILL}, {"epsilon": 0.1}, "give the path a gamma and learn b-eta"),
        (PLANE, {}, {"epsilon": -0.5}, "epsilon: -0.5 is not valid: should be greater than or equal to 0"),
        (PLANE, {}, {"direction": "backward"}, "direction: backward ends in noise here; a run with --source goes"),
        (PLANE, {}, {"direction": "back"}, "direction: 'back' is not valid: should be 'forward' or 'backward'"),
        (FROM, {}, {"direction": "backward"}, "direction: backward begins with items of the data: give them, with --"),
        (PLANE, {}, {"num_steps": 0}, "num_steps: 0 is not valid"),
        (PLANE, {}, {"spacing": "karras"}, "spacing: unknown field"),
        (PLANE, {}, {"start": torch.zeros(3, 2)}, "start: samples of interpolant do not begin with data here"),
        (FROM, {}, {"start": torch.zeros(2, 2)}, "start: shape (2, 2) given for 3 samples; (3, 2) is right"),
        (FROM, {}, {"start": torch.zeros(3, 1)}, "start: shape (3, 1) given for 3 samples; (3, 2) is right"),
        (FROM, {}, {"start": torch.full((3, 2), math.nan)}, "start: holds NaN or infinity"),
        (FROM, {}, {"condition": 0}, "condition: this model was trained without classes"),
    ],
)
def test_ways_to_sample_are_refused(spec, parts, options, message):
    assert message in refusal(lambda: build(spec, **parts).sample(3, **options))


def test_what_lies_outside_the_range_of_the_data_to_begin_with_is_refused():
    model = build(PIXELS.replace(start=PIXELS.replace(range=(0.0, 4.0)).to_json()))
    message = refusal(lambda: model.sample(1, start=torch.full((1, 1, 2, 2), 5.0)))
    assert message == "start: has values from 5 to 5; the model's data are in (0.0, 4.0)"
    backward = {"start": torch.full((1, 1, 2, 2), 17.0), "direction": "backward"}
    assert refusal(lambda: model.sample(1, **backward)).endswith("the model's data are in (0.0, 16.0)")


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (FROM, {}, "interpolant: the density of the data to begin with is unknown"),
        (PLANE, {"variance": "fixed_small"}, "variance: the ODE of interpolant has none to choose"),
        (PLANE, {"clip": False}, "clip: the ODE of interpolant has none to choose"),
    ],
)
def test_a_likelihood_is_refused(spec, options, message):
    batch = Batch(torch.zeros(2, 2))
    assert message in refusal(lambda: build(spec).bound(batch, SampleDraws(0, 0, 2), lambda *_: None, **options))


# --- what it learns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_loss_of_a_one_sided_line_is_that_of_flow_matching(noise):
    model, x1 = build(noise=noise), items(RHO1, 64, 0)
    terms = model.loss(Batch(x1), steps_of(64))
    draws = steps_of(64)
    t = CAP + (1 - 2 * CAP) * draws.stratified()
    x0, at = draws.normal((2,)), t.float()[:, None]
    out = model.network((1 - at) * x0 + at * x1, (1000 * t).float(), None)
    torch.testing.assert_close(terms.per_item, (out - (x1 - x0)).square().mean(1), rtol=1e-4, atol=1e-6)
    assert torch.equal(terms.t, t)
    assert terms.per_item.requires_grad
    assert set(terms.parts) == {"b"}
    assert not terms.parts["b"].requires_grad
    assert (noise == 0) == bool((out == 0).all())


CASES = [
    ("one-sided-linear", "b"),
    ("one-sided-linear", "w"),
    ("one-sided-trig", "b"),
    ("one-sided-vp", "w"),
    (STILL, "b"),
    ("linear", "b"),
    ("linear", "b-eta"),
    ("trig", "v-eta"),
    ("linear", "b-s"),
    ("encdec", "v-s"),
    ("mirror", "eta"),
]


@pytest.mark.parametrize(("path", "learn"), CASES, ids=lambda v: v if isinstance(v, str) else "linear-none")
def test_the_loss_is_least_at_the_oracle(path, learn):
    size, spec = 6000, spec_of(path)
    model = build(spec, path=path, learn=learn)
    start = None if spec is PLANE else items(RHO0, size, 1)
    batch = Batch(items(RHO1, size, 0), None, start)

    def gradients(shift):
        """Of each item's loss in shifts of every output that are 1, x, and products with t; (size, 10) each."""
        asked, given = oracle(model, shift=shift), []
        inner = model._outputs

        def outputs(x, t, condition):
            given.extend(out.requires_grad_() for out in inner(x, t, condition))
            return tuple(given)

        model._outputs = outputs
        terms = model.loss(batch, steps_of(size))
        assert list(terms.parts) == list(LEARNED[learn])
        torch.testing.assert_close(sum(terms.parts.values()), terms.per_item.detach())
        found = torch.autograd.grad(terms.per_item.sum(), given)
        x = asked[0]
        late = (2 * terms.t - 1).float().repeat(len(x) // size)[:, None]  # what is wrong early and late may cancel
        return [
            torch.cat([g, g * x, g * x.flip(1), g * late, g * late * x], 1).view(-1, size, 10).sum(0)  # over the signs
            for g in found
        ]

    for gradient in gradients(0.0):
        assert float(z_scores(gradient).abs().max()) < 4.5
    for gradient in gradients(0.3):
        # Of a sum over values; the mean loss of two values has the slope 2 * 0.3 / 2 in each.
        assert gradient[:, :2].mean(0).tolist() == pytest.approx([0.3, 0.3], abs=0.12)


def test_the_infinite_variance_of_the_noise_is_left_out():
    # Near the ends gamma' is 50: the square of what b is to be would be 2,500 there.
    model = build(FROM, learn="b-eta")
    oracle(model)
    terms = model.loss(Batch(items(RHO1, 4000, 0), None, items(RHO0, 4000, 1)), steps_of(4000))
    assert float(terms.parts["b"].abs().max()) < 100
    assert float(terms.per_item.std()) < 10


def test_the_loss_is_of_the_items_whatever_the_cut():
    for spec, path, learn in (
        (PLANE, "one-sided-linear", "b"),
        (FROM, "linear", "b-eta"),
        (FROM, "linear", "v-s"),
        (FROM, "mirror", "eta"),
    ):
        model = build(spec, noise=0.1, path=path, learn=learn)
        x1, start = items(RHO1, 12, 0), None if spec is PLANE else items(RHO0, 12, 1)
        whole = model.loss(Batch(x1, None, start), StepDraws(2, 5, 0, 12, 12))
        again = model.loss(Batch(x1, None, start), StepDraws(2, 5, 0, 12, 12))
        assert torch.equal(whole.per_item, again.per_item)
        other = model.loss(Batch(x1, None, start), StepDraws(2, 6, 0, 12, 12))
        assert not torch.equal(whole.per_item, other.per_item)
        for a, b in ((0, 5), (5, 6), (6, 12)):
            part = Batch(x1[a:b], None, None if start is None else start[a:b])
            terms = model.loss(part, StepDraws(2, 5, a, b, 12))
            torch.testing.assert_close(terms.per_item, whole.per_item[a:b])
            assert torch.equal(terms.t, whole.t[a:b])


def test_a_network_that_is_fitted_to_gaussian_data_has_nothing_left_to_learn():
    law = GaussianMixture(f64([[0.7, -0.4]]), f64([[[1.5, 0.6], [0.6, 0.8]]]))
    whitened = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whitened = whitened - whitened.mean(0)
    whitened = torch.linalg.solve(torch.linalg.cholesky(whitened.T @ whitened / 2000), whitened.T).T
    x1 = (whitened @ torch.linalg.cholesky(law.covariances[0]).T + law.means[0]).float()  # has exactly those moments
    x = items(law, 50, 1)
    for path, learn in (("one-sided-linear", "b"), ("one-sided-trig", "w"), ("one-sided-vp", "w")):
        model = build(path=path, learn=learn, network=MLPConfig(width=16, depth=1, linear=True))
        model.prepare([Batch(x1[:700]), Batch(x1[700:])])
        true = MixturePath(model.config.path, law)
        for t in (0.01, 0.3, 0.5, 0.9):
            with torch.no_grad():
                got, want = model.fields_at()(t, x), true.fields(t, x)
            for name in ("b", "s", "eta1"):
                scale = float(getattr(want, name).abs().max())
                torch.testing.assert_close(getattr(got, name), getattr(want, name), atol=5e-3 * scale, rtol=0)


# --- which start goes with which item -------------------------------------------------------------------------------


def beginnings(model, batch, draws):
    """The x0 of every item, from what the network was shown on a path without noise between the ends."""
    seen = []
    model.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    t = model.loss(batch, draws).t[:, None]
    inside = (t < 0.9).flatten()  # later, little of it is left
    return ((seen[0] - t * batch.x0) / (1 - t)).float(), inside


@pytest.mark.parametrize("source", [True, False])
def test_optimal_transport_in_one_dimension_sorts(source):
    line = DataSpec(kind="points", shape=(1,))
    spec = line.replace(start=line.to_json()) if source else line
    parts = {"path": STILL if source else "one-sided-linear"}
    x1 = torch.randn(40, 1, generator=torch.Generator().manual_seed(0)) + 1
    start = torch.randn(40, 1, generator=torch.Generator().manual_seed(1)) if source else None
    batch = Batch(x1, None, start)
    plain, inside = beginnings(build(spec, **parts), batch, steps_of(40))
    paired, _ = beginnings(build(spec, **parts, coupling="ot"), batch, steps_of(40))
    if source:
        torch.testing.assert_close(plain[inside], start[inside], atol=1e-4, rtol=1e-4)
    else:  # it is the noise
        draws = steps_of(40)
        draws.stratified()
        start = draws.normal((1,))
        torch.testing.assert_close(plain[inside], start[inside], atol=1e-4, rtol=1e-4)
    want = torch.empty_like(start)
    want[x1[:, 0].argsort()] = start[start[:, 0].argsort()]
    torch.testing.assert_close(paired[inside], want[inside], atol=1e-4, rtol=1e-4)
    assert (want - x1).square().mean() < 0.8 * (start - x1).square().mean()


def test_optimal_transport_keeps_to_the_classes():
    spec = PLANE.replace(start=PLANE.to_json(), num_classes=3)
    x1, start, classes = items(RHO1, 60, 0), items(RHO0, 60, 1), torch.arange(60) % 3
    found = {}
    for coupling in ("independent", "ot"):
        model = build(spec, path=STILL, conditional=True, coupling=coupling, cap=0.05)
        found[coupling], _ = beginnings(model, Batch(x1, classes, start), steps_of(60))
    torch.testing.assert_close(found["independent"], start, atol=1e-4, rtol=1e-4)
    nearest = apart(found["ot"], start).argmin(1)
    torch.testing.assert_close(found["ot"], start[nearest], atol=1e-4, rtol=1e-4)
    assert sorted(nearest.tolist()) == list(range(60))
    assert torch.equal(classes[nearest], classes)
    assert not torch.equal(nearest, torch.arange(60))
    assert (found["ot"] - x1).square().mean() < 0.8 * (start - x1).square().mean()
    unsorted, _ = beginnings(build(FROM, path=STILL, coupling="ot", cap=0.05), Batch(x1, None, start), steps_of(60))
    assert (unsorted - x1).square().mean() < (found["ot"] - x1).square().mean() - 1e-3


# --- where samples arrive -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "learn", "options"),
    [
        ("one-sided-linear", "b", {}),
        ("one-sided-linear", "b", {"epsilon": 0.5, "denoise": False}),
        ("one-sided-linear", "b", {"epsilon": 2.0, "follow": True}),
        ("one-sided-trig", "w", {"solver": "rk4", "num_steps": 20}),
        ("one-sided-vp", "w", {"num_steps": 60}),
        ("linear", "b-eta", {}),
        ("linear", "b-eta", {"epsilon": 1.0, "denoise": False}),
        ("linear", "v-s", {"epsilon": 1.0, "follow": True, "num_steps": 60}),
        ("trig", "v-eta", {"epsilon": 0.5, "follow": True}),
        ("linear", "b", {"solver": "euler", "num_steps": 150}),
        (STILL, "b", {}),
    ],
    ids=str,
)
def test_samples_of_an_oracle_have_the_moments_of_the_data(path, learn, options):
    size, spec = 2500, spec_of(path)
    model = build(spec, path=path, learn=learn)
    oracle(model)
    start = {} if spec is PLANE else {"start": items(RHO0, size, 3)}
    samples = model.sample(size, batch_size=size, seed=1, **start, **options).data
    assert off(samples, RHO1) < 4.5
    assert off(samples, RHO0) > 20
    if start and "epsilon" in options:  # a seed of its own gives others from the same start
        other = model.sample(size, batch_size=size, seed=2, **start, **options).data
        assert (other - samples).square().mean() > 0.05
    elif start:
        assert torch.equal(model.sample(size, batch_size=size, seed=2, **start, **options).data, samples)


@pytest.mark.parametrize("options", [{}, {"epsilon": 1.0, "denoise": False}, {"epsilon": 2.0, "follow": True}], ids=str)
def test_samples_that_go_backward_have_the_moments_of_the_source(options):
    size, model = 2500, build(FROM)
    oracle(model)
    start = items(RHO1, size, 3)
    samples = model.sample(size, batch_size=size, start=start, direction="backward", **options).data
    assert off(samples, RHO0) < 4.5
    assert off(samples, RHO1) > 20


@pytest.mark.parametrize("kind", TWO_SIDED)
def test_forward_then_backward_returns_the_start(kind):
    model = build(AFTER, path=kind)
    oracle(model)
    start = BEFORE.decode(items(RHO0, 200, 3))
    there = model.sample(200, start=start, num_steps=100, solver="rk4")
    back = model.sample(200, start=there.data, num_steps=100, solver="rk4", direction="backward")
    assert there.nfe == back.nfe == 400
    error = BEFORE.encode(back.data) - BEFORE.encode(start)
    assert float(error.abs().max()) < 2e-3
    assert (AFTER.encode(there.data) - BEFORE.encode(start)).square().mean() > 0.3  # it went somewhere
    assert off(AFTER.encode(there.data), RHO1) < 4.5


def test_a_mirror_returns_its_input_by_the_ode_and_others_of_the_law_by_the_sde():
    size, model = 2000, build(FROM, path="mirror")
    oracle(model)
    start = items(RHO1, size, 3)
    for direction in ("forward", "backward"):
        options = {"start": start, "batch_size": size, "direction": direction, "num_steps": 20}
        same = model.sample(size, solver="rk4", **options).data
        torch.testing.assert_close(same, start, atol=1e-3, rtol=0)
        others = model.sample(size, epsilon=1.0, denoise=False, **options).data
        assert (others - start).square().mean() > 0.2
        assert off(others, RHO1) < 4.5


def test_ends_have_their_own_units():
    model = build(AFTER, path=STILL)
    says(model, 0.0)  # everything stays where it is, in the model's units
    x = torch.tensor([[3.0, -7.0], [0.5, 100.0]])
    torch.testing.assert_close(model.sample(2, start=x).data, AFTER.decode(BEFORE.encode(x)))
    torch.testing.assert_close(model.sample(2, start=x, direction="backward").data, BEFORE.decode(AFTER.encode(x)))
    assert [s and s.shift for s in model.ends(model.sampling())] == [BEFORE.shift, AFTER.shift]
    assert [s and s.shift for s in model.ends(model.sampling(direction="backward"))] == [AFTER.shift, BEFORE.shift]
    assert build(PLANE).ends(build(PLANE).sampling()) == (None, PLANE)


def test_an_sde_may_end_with_the_estimate_of_the_data():
    model, steps = build(FROM), []
    oracle(model)
    start = items(RHO0, 10, 0)
    options = {"start": start, "epsilon": 1.0, "num_steps": 6, "denoise": True}
    done = model.sample(10, **options, on_step=lambda *n: steps.append(n))
    plain = model.sample(10, start=start, epsilon=1.0, num_steps=6)
    assert (done.nfe, plain.nfe) == (11, 12)
    assert steps == [(k, 6) for k in range(1, 7)]
    asked = oracle(model)
    again = model.sample(10, **options)
    assert torch.equal(again.data, done.data)
    assert len(asked) == 11
    true = MixturePath(model.config.path, RHO1, RHO0)
    t = CAP + (1 - 2 * CAP) * 5 / 6
    torch.testing.assert_close(done.data, true.fields(t, asked[-1]).eta1, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(done.data, plain.data, atol=1e-2)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_noise_may_follow_the_path(direction):
    # Where nothing drives x, its variance is that of the noise: 2 int epsilon dt, and int gamma dt is pi / 8.
    size, model = 3000, build(FROM)
    says(model, 0.0, 0.0)
    options = {"start": torch.zeros(size, 2), "batch_size": size, "num_steps": 40, "denoise": False, "epsilon": 0.7}
    for follow, want in ((False, 1.4), (True, 1.4 * math.pi / 8)):
        x = model.sample(size, direction=direction, follow=follow, **options).data.double()
        assert float(z_scores(x.square() - want).abs().max()) < 4.5
        assert float(z_scores(x).abs().max()) < 4.5


@pytest.mark.parametrize(
    ("solver", "nfe"), [("euler", 7), ("heun", 14), ("heun-noise-first", 14), ("rk4", 28)], ids=str
)
def test_evaluations_are_counted(solver, nfe):
    for spec in (PLANE, FROM):
        model, asked = build(spec), []
        model.network.register_forward_pre_hook(lambda _, given, asked=asked: asked.append(given[1]))
        assert model.sample(3, num_steps=7, solver=solver).nfe == nfe
        assert len(asked) == nfe
        label = torch.stack(asked)[:, 0]
        assert float(label.min()) == pytest.approx(1000 * CAP)
        assert float(label.max()) < 1000


def test_samples_are_the_same_whatever_the_batch_size():
    for spec, options in ((PLANE, {}), (PLANE, {"epsilon": 1.0}), (FROM, {}), (FROM, {"epsilon": 0.5})):
        model = build(spec, noise=0.3)
        model.keep_starts(items(RHO0, 50, 0))
        want = model.sample(9, seed=3, batch_size=9, num_steps=4, **options).data
        for size in (1, 4, None):
            got = model.sample(9, seed=3, batch_size=size, num_steps=4, **options).data
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert (model.sample(9, seed=4, num_steps=4, **options).data - want).abs().max() > 0.1


def test_samples_begin_with_the_starts_that_are_kept():
    model = build(AFTER, path=STILL)
    says(model, 0.0)
    kept = items(RHO0, 7, 0)
    model.keep_starts(kept)
    samples = AFTER.encode(model.sample(200, num_steps=1, solver="euler").data)
    distance = apart(samples, kept)
    assert float(distance.min(1).values.max()) < 1e-4
    counts = torch.bincount(distance.argmin(1), minlength=7)
    assert int(counts.max() - counts.min()) <= 2  # each once before any comes again
    assert not torch.equal(AFTER.encode(model.sample(200, seed=1, num_steps=1, solver="euler").data), samples)
    # They are of the state, so that a model that is loaded begins with them as well.
    other = build(AFTER, path=STILL)
    says(other, 0.0)
    other.load_state_dict(model.state_dict())
    assert torch.equal(AFTER.encode(other.sample(200, num_steps=1, solver="euler").data), samples)
    # And a loss that is given none takes them.
    other.train()
    seen = []
    other._outputs = lambda x, t, condition: seen.append((x, t)) or (x,)  # noqa: ARG005
    x1 = items(RHO1, 40, 1)
    other.loss(Batch(x1), steps_of(40))
    x, t = seen[0]
    x0 = ((x - t[:, None] * x1) / (1 - t[:, None]))[t < 0.9].float()
    assert float(apart(x0, kept).min(1).values.max()) < 1e-4


def test_no_more_starts_are_kept_than_an_item_s_size_allows():
    for side, most in ((2, 4096), (1024, 1024)):
        spec = DataSpec(kind="points", shape=(side,))
        model = build(spec.replace(start=spec.to_json()), path=STILL)
        assert model.starts.shape == (most, side)
        many = torch.arange(5000.0)[:, None].expand(5000, side)
        model.keep_starts(many)
        assert len(model.starts[:, 0].unique()) == most
        few = torch.arange(30.0)[:, None].expand(30, side)
        model.keep_starts(few)
        assert torch.bincount(model.starts[:, 0].long(), minlength=30).min() >= most // 30
    assert build(PLANE).starts.shape == (0, 2)


# --- classes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [True, False])
def test_classes_reach_the_network(source):
    spec = AFTER if source else AFTER.replace(start=None)
    model, seen = build(spec, noise=0.3, conditional=True), []
    handle = model.network.register_forward_pre_hook(lambda _, given: seen.append(given[2].tolist()))
    samples = model.sample(5, num_steps=2, condition=torch.tensor([0, 2, 1, 1, 0]))
    assert seen == [[0, 2, 1, 1, 0]] * 4
    handle.remove()
    assert samples.condition.tolist() == [0, 2, 1, 1, 0]
    other = model.sample(5, num_steps=2, condition=torch.tensor([0, 2, 1, 1, 2]))
    assert torch.equal(other.data[:4], samples.data[:4])
    assert not torch.equal(other.data[4], samples.data[4])
    assert model.sample(5, num_steps=2).condition.tolist() == [0, 1, 2, 0, 1]
    x1, start = items(RHO1, 4, 0), items(RHO0, 4, 1) if source else None
    losses = [model.loss(Batch(x1, torch.tensor(c), start), steps_of(4)).per_item for c in ([0, 1, 2, 0], [0, 1, 2, 1])]
    torch.testing.assert_close(losses[0][:3], losses[1][:3])
    assert losses[0][3] != losses[1][3]
    if source:
        there = [model.sample(3, start=BEFORE.decode(start[:3]), condition=c, num_steps=2).data for c in (0, 1)]
        assert not torch.allclose(*there)
    else:
        found = [
            model.bound(Batch(x1, torch.full((4,), c)), SampleDraws(0, 0, 4), lambda *_: None, num_steps=2)
            for c in (0, 1)
        ]
        assert not torch.allclose(found[0].steps, found[1].steps)
    model.probe(2)


# --- densities ------------------------------------------------------------------------------------------------------


def negative_log_density(model, x, draws=None, num_steps=20):
    """Of each item, nats per value."""
    told = []
    with torch.inference_mode():  # as in `analyze likelihood`
        draws = draws or SampleDraws(3, 0, len(x))
        terms = model.bound(Batch(x), draws, lambda *n: told.append(n), num_steps=num_steps)
    assert terms.steps.shape == (len(x), num_steps)
    assert terms.t.shape == (num_steps,)
    assert 0 < terms.t[0] < terms.t[-1] < 1
    assert told[-1] == (num_steps, num_steps)
    return (terms.prior + terms.steps.sum(1)), terms


@pytest.mark.parametrize("path", ONE_SIDED)
@pytest.mark.parametrize("law", [GaussianMixture(RHO1.means[:1], RHO1.covariances[:1]), RHO1], ids=["one", "mixture"])
def test_the_density_of_an_oracle_is_exact(path, law):
    spec = DataSpec(kind="points", shape=(2,), shift=(5.0, -1.0), scale=(3.0, 0.25))
    model = build(spec, path=path, learn="w" if path == "one-sided-vp" else "b")
    oracle(model, law)
    x = items(law, 40, 0)
    got, terms = negative_log_density(model, x, num_steps=50)
    want = (math.log(3) + math.log(0.25) - law.log_prob(x)) / 2  # in the data's units
    torch.testing.assert_close(got, want, atol=5e-3, rtol=0)
    assert terms.is_density
    assert terms.x0_error is None
    assert terms.eps_error is None
    # The prior is the density of where the ODE ends, which is noise.
    assert float(terms.prior.mean()) == pytest.approx(
        0.5 * math.log(2 * math.pi * math.e) + math.log(0.75) / 2, abs=0.3
    )


def test_the_divergence_of_many_values_is_estimated():
    size = 20
    spec = DataSpec(kind="points", shape=(size,))
    # Of independent values Hutchinson's estimate with random signs has no error.
    law = GaussianMixture(torch.linspace(-1, 1, size)[None], torch.diag(torch.linspace(0.3, 2, size))[None])
    model = build(spec)
    asked = oracle(model, law)
    x = items(law, 30, 0)
    got, _ = negative_log_density(model, x)
    torch.testing.assert_close(got, -law.log_prob(x) / size, atol=2e-3, rtol=0)
    assert len(asked) == 4 * 20
    # Of others it has, and none in the mean.
    root = torch.eye(size).double() + 0.15 * torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    law = GaussianMixture(torch.zeros(1, size), (root @ root.T)[None])
    oracle(model, law)
    x = items(law, 1, 0).expand(1500, size)
    got, _ = negative_log_density(model, x)
    assert float(got.std()) > 0.01
    assert float(z_scores((got + law.log_prob(x) / size)[:, None]).abs()) < 4.5


def test_levels_are_dequantised():
    law = GaussianMixture(f64([[0.1, -0.2, 0.3, 0.0]]), 0.2 * torch.eye(4)[None].double())
    model = build(PIXELS)
    oracle(model, law)
    x = PIXELS.encode(PIXELS.decode(items(law, 60, 0).view(60, 1, 2, 2)))
    got, terms = negative_log_density(model, x)
    assert not terms.is_density
    u = torch.special.ndtr(SampleDraws(3, 0, 60).normal((1, 2, 2)).double())
    step = 1 / 8  # of 17 levels in [-1, 1]
    want = -law.log_prob((x + (u - 0.5) * step).flatten(1)) / 4 - math.log(step)
    torch.testing.assert_close(got, want, atol=5e-3, rtol=0)


def test_the_probabilities_of_all_levels_sum_to_1():
    spec = DataSpec(kind="image", shape=(1, 1, 1), range=(0.0, 30.0), levels=31, shift=(15.0,), scale=(15.0,))
    law = GaussianMixture(f64([[-0.4], [0.3]]), f64([[[0.01]], [[0.02]]]), f64([0.4, 0.6]))
    model = build(spec, path="one-sided-trig")
    oracle(model, law)
    x = spec.from_levels(torch.arange(31)[:, None, None, None]).repeat_interleave(40, 0)
    got, _ = negative_log_density(model, x, num_steps=60)
    chance = got.neg().exp().view(31, 40)
    error = float((chance.var(1) / 40).sum().sqrt())
    assert error < 0.02
    assert abs(float(chance.mean(1).sum()) - 1) < 4 * error + 2e-3


@pytest.mark.parametrize(
    ("path", "learn", "follows"),
    [
        ("encdec", "b-eta", True),
        ({"kind": "linear", "gamma": "quadratic"}, "v-eta", True),
        ({"kind": "linear", "gamma": "sine"}, "b-s", False),
        ("linear", "b-eta", False),
        ("one-sided-linear", "b", True),
    ],
    ids=str,
)
def test_noise_follows_the_path_where_an_error_of_the_denoiser_would_be_infinite(path, learn, follows):
    kind = path if isinstance(path, str) else path["kind"]
    model = build(PLANE if kind.startswith("one-sided") else FROM, noise=0.1, path=path, learn=learn)
    options = {"epsilon": 1.0, "num_steps": 6, "seed": 3}
    made = model.sample(20, **options).data
    assert torch.equal(made, model.sample(20, follow=follows, **options).data)
    assert not torch.equal(made, model.sample(20, follow=not follows, **options).data)
    if path == "encdec":
        assert float(made.abs().max()) < 100 < float(model.sample(20, follow=False, **options).data.abs().max())


@pytest.mark.parametrize("path", ONE_SIDED)
def test_a_small_error_of_the_network_stays_small(path):
    """From noise, where the data could follow from the noise by a division by t only."""
    model = build(path=path, learn="w")
    oracle(model, shift=0.02)
    samples = items(RHO1, 4000, 5)
    for options in ({"num_steps": 1, "solver": "euler"}, {"num_steps": 4, "solver": "euler"}, {"num_steps": 50}):
        made = model.sample(4000, **options).data
        assert float(made.abs().mean()) < 1.3 * float(samples.abs().mean())


def test_pairs_are_not_paired_anew():
    with pytest.raises(UserError, match=r"coupling: ot would pair anew what data\.paired has paired"):
        build(FROM.replace(paired=True), coupling="ot")
    assert build(FROM.replace(paired=True)).spec.paired
    with pytest.raises(ConfigError, match="pairs need data to begin with"):
        PLANE.replace(paired=True)


def test_items_that_are_translated_need_a_class():
    model = build(AFTER, conditional=True)
    says(model, torch.zeros(2), torch.zeros(2))
    start = BEFORE.decode(torch.zeros(3, 2))
    with pytest.raises(UserError, match=r"condition: required \(--label\) with given items"):
        model.sample(3, start=start)
    assert model.sample(3, start=start, condition=2, num_steps=2).condition.tolist() == [2, 2, 2]


def test_a_noise_that_is_none_follows_nothing():
    with pytest.raises(ConfigError, match="follow: true has nothing to say where epsilon is 0"):
        build(FROM).sample(2, follow=True)


def test_a_path_of_one_s_own_is_looked_at():
    class Wrong(type(PATHS.parse("linear"))):
        def _mixture(self, t):
            alpha, beta, alpha_dot, beta_dot = super()._mixture(t)
            return alpha, beta + 0.1 * t, alpha_dot, beta_dot + 0.1

    with pytest.raises(ConfigError, match=r"beta: 1\.1 at t = 1 is not valid: must be 1"):
        build(FROM, path=Wrong())


@pytest.mark.parametrize("kind", ONE_SIDED)
def test_the_score_of_its_data_under_noise_is_that_of_its_fields(kind):
    # Data N(0, c): all fields are multiples of x, and E[x1 | y] = c / (c + r^2) y at y = x1 + r z.
    c = 0.7
    model = build(path=kind)
    path = model.config.path

    def outputs(x, t, _condition):
        at = path.at(t)
        size = at.alpha**2 + at.beta**2 * c
        noise, data = at.alpha / size, at.beta * c / size
        exact = noise * at.alpha_dot + data * at.beta_dot if model.learned == "b" else at.alpha * data - at.beta * noise
        return (column(exact, x) * x,)

    model._outputs = outputs
    field = model.score_field()
    y = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert field.lowest < 0.02
    assert field.highest > 50
    for ratio in (0.02, 0.5, 30.0):
        assert torch.allclose(field.denoised(y, ratio), c / (c + ratio**2) * y, rtol=1e-6, atol=1e-9)
        assert torch.allclose(field.score(y, ratio), -y / (c + ratio**2), rtol=1e-5)
    assert field.prior_std == pytest.approx((1 + field.highest**2) ** 0.5, rel=1e-2)


def test_what_has_no_score_says_so():
    paired = build(coupling="ot")
    with pytest.raises(
        UserError, match="interpolant: coupling=ot pairs noise with data, and what is learned then is no"
    ):
        paired.score_field()
    linear = build(path="linear")
    with pytest.raises(UserError, match="interpolant: the noise of linear is not all that is between its ends"):
        linear.score_field()
