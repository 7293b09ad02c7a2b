"""The committed studies on numbers that were made up: each claim reads what its sentence names and decides on it.

Nothing is trained. The studies' own `measure` says which rows there are; their values are far apart and above 10, but
for the few that a claim is about: these are close to each other, so that a check that reads any other value, or
compares them the other way around, comes to another verdict.
"""

import itertools
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from osmose.data.dataset import DataConfig
from osmose.studies import architectures, objectives, vlb
from osmose.studies.architectures import NETWORKS, Architectures
from osmose.studies.measures import noise_under
from osmose.studies.objectives import Objectives
from osmose.studies.short_chain import ShortChain
from osmose.studies.study import Results, Row
from osmose.studies.train_steps import TrainSteps
from osmose.studies.verdicts import mean_and_spread
from osmose.studies.vlb import VLB
from osmose.training.recipes import recipe

STUDIES = (Objectives, VLB, ShortChain, Architectures, TrainSteps)
BOTH = ("digits", "fashion-mnist")
#: Parameters and the published "M" of the full networks.
PUBLISHED = {
    "ddpm-cifar10": (35_746_307, 34.21),
    "deepres1": (24_275_587, 23.27),
    "shallowres2": (25_838_595, 24.76),
    "shallowres1": (17_714_563, 17.02),
    "mbconv64": (12_001_859, 11.51),
    "mbconv96": (26_831_715, 25.68),
}

# ---------------------------------------------------------------------------------------------------------- the rows


def measured(study, cell, asked=None):
    """What a study measures on a cell, where each measurement gives a number that says what it was asked for."""

    def scores(_, metrics, **options):
        if asked is not None:
            asked.append(options)
        fd = 5.0 if options.get("solver") == "ddim" else 4.0
        return {"nfe": 1.0} | dict.fromkeys(metrics, fd) | {f"{name}_real": 0.5 for name in metrics}

    every, steps = (cell.changes.get(f"training.{name}", 1) for name in ("validate_every", "steps"))
    lines = [{"step": step, "validation_loss": 1.0} for step in range(every, steps + 1, every)]
    config = SimpleNamespace(method=SimpleNamespace(variance=cell.changes.get("variance", "fixed_small")))
    run = SimpleNamespace(config=config, metrics=lambda: [{"step": 1, "loss": 9.0}, *lines])
    with pytest.MonkeyPatch.context() as patch:
        for module in (objectives, vlb):
            patch.setattr(module, "bound", _bound)
            patch.setattr(module, "noise_under", _noise)
        for module in (objectives, architectures):
            patch.setattr(module, "step_seconds", _seconds)
        patch.setattr(architectures, "_full_size", _full_rows)
        return study.measure(SimpleNamespace(cell=cell, seed=0, dataset=None, scores=scores, run=run))


def _bound(_trained, variance=None, *_items, **_options):
    return {"bits_per_dim": {None: 1.0, "fixed_small": 2.0, "fixed_large": 3.0}[variance], "eps_error": 0.1}


def _noise(_, changes, **__):
    return SimpleNamespace(variance=1.0 if changes.get("times") == "loss-aware" else 2.0)


def _seconds(*arguments, **_):
    *_, changes = arguments
    return {name: 1.0 + index for index, name in enumerate(changes)}


def _full_rows(**_):
    names = ("parameters", "published_unit", "macs", "images_per_second", "activation_mib")
    return [Row({"network": name}, dict.fromkeys(names, 1.0)) for name in NETWORKS]


@lru_cache
def forms(kind, quick=False):
    """The rows of each cell: labels and names of metrics."""
    study = kind(quick)
    return {cell.name: [(dict(r.labels), list(r.values)) for r in measured(study, cell)] for cell in study.cells()}


def at(cell, metric, **labels):
    """A place in the results."""
    return cell, metric, frozenset(labels.items())


def world(kind, given=None, quick=False):
    """Results with `given` values at their places, and 10, 11, 12, ... at all others.

    The seeds differ by what they have in common, so that differences seed by seed are exact.
    """
    given, places = dict(given or {}), itertools.count(10)
    common = (0.0, 0.125, -0.125) if not quick else (0.0,)
    rows = {name: [[] for _ in common] for name in forms(kind, quick)}
    for name, form in forms(kind, quick).items():
        for labels, metrics in form:
            means = {metric: (next(places), given.pop(at(name, metric, **labels), None)) for metric in metrics}
            for seed, shift in enumerate(common):
                # A share that is compared with a number has no partner that its spread would cancel against.
                shifts = {metric: 1e-6 * shift if metric == "noise_left" else shift for metric in metrics}
                values = {m: shifts[m] + (away if own is None else own) for m, (away, own) in means.items()}
                rows[name][seed].append(Row(labels, values))
    assert not given, "no such places"
    return Results(tuple(range(len(common))), rows)


# -------------------------------------------------------------------------------------------------------- the claims


def below(*places):
    """Each place is below the next; not so where two neighbours are exchanged."""
    values = [1 + 0.01 * index for index in range(len(places))]
    cases = [(values, True)]
    for index in range(len(places) - 1):
        changed = list(values)
        changed[index : index + 2] = reversed(changed[index : index + 2])
        cases.append((changed, False))
    return [(dict(zip(places, case, strict=True)), holds) for case, holds in cases]


def within_of(a, b, allowed, level=2.0):
    """`a` and `b`, which is at `level`, differ by at most `allowed`, on either side."""
    factors = ((0.999, True), (-0.999, True), (1.001, False), (-1.001, False))
    return [({a: level + factor * allowed, b: level}, holds) for factor, holds in factors]


def under(place, limit):
    return [({place: limit * factor}, factor < 1) for factor in (0.99, 1.01)]


def where(values, cases):
    return [(values | case, holds) for case, holds in cases]


def objective_claims():
    for data in BOTH:

        def fd(name, data=data):
            return at(f"{data}-{name}", "fd_clf")

        def error(name, data=data):
            return at(f"{data}-{name}", "eps_error")

        def pays(name, data=data, fd=fd):
            lengths = ["plain", "plain-2x", "plain-3x"]
            time = at(f"{data}-time", "time", variant=name)
            return [
                case
                for ratio, run in enumerate(lengths, 1)
                for case in where({time: ratio} | {fd(other): 20 for other in lengths}, below(fd(name), fd(run)))
            ]

        run, printed, aware = "author-code", "algorithm3", "loss-aware"
        # plain - mean is more than half of plain - run: 3 is in the middle of 1 and 5
        half = {fd(run): 1, fd("mean"): 3, fd("plain"): 5}
        gains = [
            (half | {place: half[place] + change}, holds)
            for place, sign in ((fd(run), 1), (fd("mean"), -1), (fd("plain"), 1))
            for change, holds in ((0.02 * sign, True), (-0.02 * sign, False))
        ]
        yield from {
            (data, "as run samples better than DDPM at equal"): below(fd(run), fd("plain")),
            (data, "as printed samples better than DDPM at equal"): below(fd(printed), fd("plain")),
            (data, "L_simple within 0.5 %"): within_of(error(run), error("mean"), 0.01),
            (data, "fd_clf within 5 %"): within_of(fd(run), fd("mean"), 0.1),
            (data, "gains more than half as much"): gains,
            (data, "as printed samples better than the average"): below(fd(printed), fd("mean")),
            (data, "as run samples better than DDPM trained for the same time"): pays(run),
            (data, "as printed samples better than DDPM trained for the same time"): pays(printed),
            (data, "the average of two noises samples better than DDPM trained for the same time"): pays("mean"),
            (data, "two noises lowers held-out L_simple"): below(error("mean"), error("plain")),
            (data, "a doubled batch lowers held-out L_simple"): below(error("batch-2x"), error("plain")),
            (data, "a doubled batch lowers L_simple more than two noises"): below(error("batch-2x"), error("mean")),
            (data, "sign of IWAE samples better than the printed"): below(fd("iwae-simple"), fd(printed)),
            (data, "importance sampling of t samples better at equal steps"): below(fd(aware), fd("plain")),
            (data, "importance sampling of t lowers held-out L_simple"): below(error(aware), error("plain")),
            (data, "importance sampling of t samples better than DDPM trained for the same time"): pays(aware),
            (data, "'+2' adds nothing"): within_of(error("loss-aware-2"), error(aware), 0.02),
            (data, "without debiasing, importance sampling raises"): below(error("plain"), error("not-debiased")),
            (data, "samples better without debiasing"): below(fd("not-debiased"), fd(aware)),
            (data, "as run improves importance sampling"): below(fd("loss-aware-author-code"), fd(aware)),
            (data, "as printed improves importance sampling"): below(fd("loss-aware-algorithm3"), fd(aware)),
        }.items()


def vlb_claims():
    for data in BOTH:

        def bits(name, data=data):
            return at(f"{data}-{name}", "bits_per_dim")

        def value(name, metric, data=data):
            return at(f"{data}-{name}", metric)

        limit, number = (0.06, "6%") if data == "digits" else (0.25, "25%")
        large = value("simple", "bits_fixed_large")
        either = [
            ({bits("hybrid"): 1, bits("simple"): small, large: other}, small > 1 < other)
            for small, other in ((1.01, 1.01), (1.01, 0.99), (0.99, 1.01))
        ]
        yield from {
            (data, f"less than {number} of L_vlb's gradient variance, late"): under(
                value("simple", "noise_left"), limit
            ),
            (data, f"less than {number} of L_vlb's gradient variance, early"): under(
                value("simple-short", "noise_left"), limit
            ),
            (data, "importance sampling lowers the bits"): below(bits("vlb-loss-aware"), bits("vlb")),
            (data, "L_hybrid has fewer bits per dimension than L_simple"): either,
            (data, "fewer bits than L_hybrid"): below(bits("vlb-loss-aware"), bits("hybrid")),
            (data, "L_hybrid samples better than L_vlb"): below(
                value("hybrid", "fd_ancestral"), value("vlb-loss-aware", "fd_ancestral")
            ),
            (data, "L_hybrid samples like L_simple: fd_clf with DDIM within 10 %"): within_of(
                value("hybrid", "fd_ddim"), value("simple", "fd_ddim"), 0.2
            ),
            (data, "does nothing for L_hybrid (published): bits within 1 %"): within_of(
                bits("hybrid-loss-aware"), bits("hybrid"), 0.02
            ),
            (data, "clipping gradients lowers the bits"): below(bits("vlb-clipped"), bits("vlb")),
        }.items()


def short_chain_claims():
    for data in BOTH:

        def fd(way, steps=100, clip="yes", cell=f"{data}-t100-simple"):
            return at(cell, "fd_clf", variance=way, steps=steps, clip=clip)

        learned, long = f"{data}-t100-hybrid", f"{data}-t1000-simple"
        small, large = "fixed_small", "fixed_large"
        yield from {
            (data, "all steps, clipped: fixed_small is better"): below(fd(small), fd(large)),
            (data, "all steps, not clipped: fixed_small is better"): below(fd(small, clip="no"), fd(large, clip="no")),
            (data, "all steps: DDIM is better than fixed_large"): below(fd("ddim"), fd(large)),
            (data, "better without clipping"): below(fd(large, clip="no"), fd(large)),
            (data, "10 steps: (1) DDIM beats fixed_small"): below(fd("ddim", 10), fd(small, 10), fd(large, 10)),
            (data, "10 steps: learned_range"): below(
                fd("learned_range", 10, cell=learned), fd(large, 10, cell=learned)
            ),
            (data, "not clipped: T = 100 is worse"): below(fd(large, 1000, "no", cell=long), fd(large, 100, "no")),
        }.items()
        for way in (small, large, "ddim"):
            yield (
                (data, f"scores within 25 % of T = 1000 strided to 100 steps, with {way}"),
                within_of(fd(way), fd(way, cell=long), 0.5),
            )


def architecture_claims():
    def full(name, metric):
        return at("full-size", metric, network=name)

    parameters = {full(name, "parameters"): count for name, (count, _) in PUBLISHED.items()}
    printed = {full(name, "published_unit"): million for name, (_, million) in PUBLISHED.items()}
    macs, base = (full(name, "macs") for name in ("mbconv96", "ddpm-cifar10"))
    speeds = {name: full(name, "images_per_second") for name in PUBLISHED}
    yield from {
        ("the six", "the published numbers of parameters, one by one"): [
            (parameters, True),
            *((parameters | {place: parameters[place] + by}, False) for place in parameters for by in (-1, 1)),
        ],
        ("the published M", "is 2^20 with the frozen table"): [
            (printed | {place: printed[place] + by}, abs(by) < 0.005)
            for place in printed
            for by in (-0.0051, -0.0049, 0.0049, 0.0051)
        ],
        ("mbconv96", "about half the multiply-adds"): [
            ({macs: share, base: 1}, 0.4 < share < 0.6) for share in (0.39, 0.41, 0.59, 0.61)
        ],
        ("mbconv96 is slower", "0.77"): below(speeds["mbconv96"], speeds["ddpm-cifar10"]),
        ("mbconv64 is faster", "1.23"): below(speeds["ddpm-cifar10"], speeds["mbconv64"]),
    }.items()
    for data, steps in (("digits", 240), ("fashion-mnist", 90)):

        def loss(name, step, data=data):
            return at(f"{data}-{name}", "loss", steps=step)

        def time(name, data=data):
            return at(f"{data}-time", "milliseconds", network=name)

        for text, a, b in (
            ("two blocks a level reach a lower loss than one", "ddpm-cifar10", "deepres1"),
            ("without the lowest level reaches a lower loss", "shallowres2", "ddpm-cifar10"),
            ("mbconv96 reaches a lower loss than ddpm-cifar10", "mbconv96", "ddpm-cifar10"),
        ):
            yield (data, text, "at equal steps"), below(loss(a, steps), loss(b, steps))
            # When the quickest is through, a has done a fifth of its steps and b a third.
            times = {time("shallowres1"): 1, time(a): 5, time(b): 3}
            yield (data, text, "at equal time"), where(times, below(loss(a, steps // 5), loss(b, steps // 3)))


def train_step_claims():
    def fd(cell, sampler="DDIM"):
        return at(cell, "fd_clf", sampler=sampler)

    large = "fixed_large"
    yield from {
        ("Digits, T = 1000", "falls"): below(*(fd(f"digits-{steps}") for steps in (3000, 2000, 1000))),
        ("Fashion-MNIST, T = 1000", "falls"): below(*(fd(f"fashion-{steps}") for steps in (300, 200, 100))),
        ("Digits, T = 100", "less than 5 %"): within_of(
            fd("digits-t100-3000", large), fd("digits-t100-2000", large), 0.1
        ),
        ("Digits, T = 100, the same weights", "`fixed_small` scores lower"): below(
            fd("digits-t100-3000", "fixed_small"), fd("digits-t100-3000", large)
        ),
        ("Digits, all of the training", "within 1"): within_of(fd("digits-3000"), fd("digits-t100-3000"), 1, level=5),
    }.items()


EXPECTED = {
    Objectives: objective_claims,
    VLB: vlb_claims,
    ShortChain: short_chain_claims,
    Architectures: architecture_claims,
    TrainSteps: train_step_claims,
}


def expected(kind):
    """The claims that there should be, as (words of the text, cases): those whose configurations are all there."""
    cells = {cell.name for cell in kind().cells()}
    return [
        (words, cases)
        for words, cases in EXPECTED[kind]()
        if {cell for values, _ in cases for cell, *_ in values} <= cells
    ]


def claim(kind, words):
    """The claim whose text begins with the first of these words and has the others."""
    first, *others = words
    (found,) = (c for c in kind().claims() if c.text.startswith(first) and all(word in c.text for word in others))
    return found


@pytest.mark.parametrize(
    ("kind", "words", "cases"),
    [pytest.param(kind, *case, id=": ".join(case[0])) for kind in STUDIES for case in expected(kind)],
)
def test_a_claim_decides_what_its_sentence_says(kind, words, cases):
    found = claim(kind, words)
    for values, holds in cases:
        finding = found.check(world(kind, values))
        assert finding.verdict == ("reproduced" if holds else "not reproduced"), (values, finding.evidence)
    assert set(found.cells) == {cell for values, _ in cases for cell, *_ in values}


@pytest.mark.parametrize("kind", STUDIES)
def test_every_claim_is_among_these(kind):
    texts = [claim(kind, words).text for words, _ in expected(kind)]
    assert sorted(texts) == sorted(c.text for c in kind().claims())
    assert len(set(texts)) == len(texts)
    assert all(set(c.cells) <= set(forms(kind)) for c in kind().claims())


@pytest.mark.parametrize("kind", STUDIES)
def test_one_seed_of_the_quick_form_decides_no_comparison(kind):
    results = world(kind, quick=True)
    claims = [c for c in kind(quick=True).claims() if set(c.cells) <= set(results.rows)]
    assert claims
    findings = [c.check(results) for c in claims if c.cells != ["full-size"]]
    assert {finding.verdict for finding in findings} == {"inconclusive"}


# ----------------------------------------------------------------------------------- equal time, by hand


@pytest.mark.parametrize(
    ("data", "ratio", "reached"),
    [
        ("digits", 0.9, 8.0),  # no shorter run: the first
        ("digits", 1, 8.0),
        ("digits", 2**0.5, 7.0),  # in the middle of the logarithms
        ("digits", 2, 6.0),
        ("digits", 6**0.5, 5.5),
        ("digits", 3, 5.0),
        ("digits", 3.1, 5.0),  # no longer run: the last
        ("fashion-mnist", 2**0.5, 7.0),
    ],
)
def test_what_plain_reaches_in_a_time(data, ratio, reached):
    lengths = {"plain": 8, "plain-2x": 6, "plain-3x": 5}
    values = {at(f"{data}-{name}", "sw2"): value for name, value in lengths.items()}
    found = objectives._plain_at(world(Objectives, values), data, "sw2", ratio)
    assert found == pytest.approx(reached + np.array([0, 0.125, -0.125]), abs=1e-12)


def test_the_loss_when_the_quickest_network_is_through():
    study, losses = Architectures(), {}
    for name in PUBLISHED:
        # From 2 after the first 16 steps down to 1 after all 240, straight in the logarithm of steps.
        losses |= {at(f"digits-{name}", "loss", steps=16 * k): 2 - np.log(k) / np.log(15) for k in range(1, 16)}
    speeds = zip(PUBLISHED, (5, 10, 8, 15, 20, 100), strict=True)
    times = {at("digits-time", "milliseconds", network=name): value for name, value in speeds}
    results = world(Architectures, losses | times)
    reached = [study._at_equal_time(results, "digits", name) for name in PUBLISHED]
    for seed, shift in enumerate((0, 0.125, -0.125)):
        # 12 steps of the last are before the first validation, at 16
        steps = np.array([240, 120, 150, 80, 60, 16])
        expected = 2 - np.log(steps / 16) / np.log(15) + shift
        assert [values[seed] for values in reached] == pytest.approx(expected, abs=1e-12)


# ------------------------------------------------------------------------------------------- measuring


def test_what_is_measured_stands_under_its_name():
    def row(kind, name):
        (cell,) = (cell for cell in kind().cells() if cell.name == name)
        (found,) = measured(kind(), cell)
        return dict(found.values)

    bits = {"bits_per_dim": 1, "eps_error": 0.1}
    samples = {"fd_ancestral": 4, "fd_ddim": 5, "fd_real": 0.5}
    assert row(VLB, "digits-simple") == {"noise_left": 0.5} | bits | {"bits_fixed_large": 3} | samples
    assert row(VLB, "digits-hybrid") == bits | samples
    assert row(VLB, "digits-simple-short") == {"noise_left": 0.5}
    scores = {"fd_clf": 4, "fd_clf_real": 0.5, "sw2": 4, "eps_error": 0.1, "bits_small": 2, "bits_large": 3}
    noises = {"plain": 1, "mean": 1, "loss-aware": 0.5, "loss-aware-2": 0.5}
    assert row(Objectives, "digits-mean") == scores
    assert row(Objectives, "digits-plain") == scores | {f"noise of {name}": value for name, value in noises.items()}
    assert forms(Objectives)["digits-time"][0] == ({"variant": "plain"}, ["time", "milliseconds"])
    timed = [labels["variant"] for labels, _ in forms(Objectives)["fashion-mnist-time"]]
    assert timed == [name for name in objectives.VARIANTS if name not in ("plain-2x", "plain-3x")]
    assert [labels for labels, _ in forms(Architectures)["fashion-mnist-mbconv64"]] == [
        {"steps": steps} for steps in range(6, 91, 6)
    ]


@pytest.mark.parametrize("cell", ShortChain().cells(), ids=lambda cell: cell.name)
def test_a_short_chain_is_sampled_as_its_labels_say(cell):
    asked = []
    rows = measured(ShortChain(), cell, asked)
    said = [
        {
            "variance": options["solver"].get("variance", options["solver"]["kind"]),
            "steps": options["num_steps"],
            "clip": "yes" if options["clip"] else "no",
        }
        for options in asked
    ]
    assert [row.labels for row in rows] == said
    assert len({tuple(labels.values()) for labels in said}) == len(said)


def test_the_samplers_of_a_longer_training_are_what_they_are_called():
    for cell in TrainSteps().cells():
        asked = []
        rows = measured(TrainSteps(), cell, asked)
        count = 10 if cell.name.startswith("fashion") else 50
        known = {"DDIM": {"num_steps": count, "solver": "ddim"}} | {
            way: {"num_steps": 100, "solver": {"kind": "ancestral", "variance": way}}
            for way in ("fixed_large", "fixed_small")
        }
        assert asked == [known[row.labels["sampler"]] for row in rows]


def test_the_full_networks_are_counted_in_the_published_unit(monkeypatch):
    counts = (count for count, _ in PUBLISHED.values())
    monkeypatch.setattr(architectures.DDPMConfig, "build", lambda config, _: SimpleNamespace(config=config))
    monkeypatch.setattr(architectures, "num_parameters", lambda _: next(counts))
    monkeypatch.setattr(architectures, "macs_of", lambda _: 1)
    monkeypatch.setattr(architectures, "_kept", lambda _, items: 100 + items * 2**20)
    monkeypatch.setattr(architectures, "_learn", lambda *_: None)
    monkeypatch.setattr(architectures, "time", SimpleNamespace(process_time=itertools.count().__next__))
    rows = architectures._full_size(rounds=2, items=3)
    assert [row.labels["network"] for row in rows] == list(PUBLISHED)
    for row, (count, million) in zip(rows, PUBLISHED.values(), strict=True):
        assert row.values["parameters"] == count
        assert row.values["published_unit"] == pytest.approx(million, abs=0.005)
        assert (row.values["images_per_second"], row.values["activation_mib"]) == (3, 1)


def test_a_law_of_times_that_has_not_been_learned_is_not_compared():
    data = DataConfig(source="digits")
    dataset = data.load()
    network = {"network": "mlp", "network.width": 8, "network.depth": 1}
    short = {"schedule": "cosine", "schedule.num_steps": 20, "sampling.num_steps": 5, "training.batch_size": 64}
    config = recipe("ddpm", data, dataset, 0, network | short)
    torch.manual_seed(0)
    model = config.method.build(config.spec)
    trained = SimpleNamespace(run=SimpleNamespace(config=config), model=model, dataset=dataset, seed=0)

    # 3 batches of 64 are fewer than 10 losses of each of 20 steps; 30 are enough
    with pytest.raises(ValueError, match="not been learned after 1 batches; give it more"):
        noise_under(trained, {"objective": "vlb", "times": "loss-aware"}, batches=2, warmup=1)
    aware = noise_under(trained, {"objective": "vlb", "times": "loss-aware"}, batches=40, warmup=30)
    uniform = noise_under(trained, {"objective": "vlb", "times": "uniform"}, batches=40, warmup=0)
    assert 0 < aware.variance < 0.9 * uniform.variance


# ---------------------------------------------------------------------------------- tables and figures


def table(kind, heading, given=None):
    """A table's lines by what their first column says."""
    results = world(kind, given)
    lines = kind().tables(results)[heading]
    return results, {next(iter(line.values())): line for line in lines}


@pytest.mark.parametrize("data", BOTH)
def test_the_table_of_the_objectives(data):
    time = at(f"{data}-time", "time", variant="mean")
    results, lines = table(Objectives, data, {time: 2, at(f"{data}-plain", "fd_clf_real"): 0.5})
    names = [cell.name.removeprefix(f"{data}-") for cell in Objectives().cells() if cell.name.startswith(data)]
    assert list(lines) == [*names[:-1], "real data"]
    for name in names[:-1]:
        for metric in ("fd_clf", "sw2", "eps_error", "bits_small", "bits_large"):
            assert lines[name][metric] == mean_and_spread(results.values(f"{data}-{name}", metric))
        known = results.groups(f"{data}-plain")[0][1]
        noise = known.get(f"noise of {name}")
        assert lines[name]["gradient noise"] == ("" if noise is None else mean_and_spread(noise))
    assert lines["mean"]["time"] == lines["plain-2x"]["time"] == "2.00"
    assert lines["plain"]["time"] == "1.00"
    for metric in ("fd_clf", "eps_error"):
        assert lines["mean"][f"plain's {metric} at that time"] == lines["plain-2x"][metric]
        assert lines["plain"][f"plain's {metric} at that time"] == lines["plain"][metric]
    assert lines["real data"] == {"variant": "real data", "fd_clf": "0.50 ± 0.12"}


@pytest.mark.parametrize("data", BOTH)
def test_the_table_of_the_bound(data):
    results, lines = table(VLB, data, {at(f"{data}-simple", "fd_real"): 0.5})
    for name, line in list(lines.items())[:-1]:
        known = results.groups(f"{data}-{name}")[0][1]
        for metric in ("bits_per_dim", "bits_fixed_large", "eps_error", "fd_ancestral", "fd_ddim", "noise_left"):
            expected = mean_and_spread(known[metric]) if metric in known else ""
            assert line[metric.replace("_", " ")] == expected
    assert f"{data}-vlb" in results.rows
    assert "vlb" in lines
    assert ("simple-short" in lines) == (data == "digits")
    assert lines["real data"] == {"variant": "real data", "fd ancestral": "0.50 ± 0.12", "fd ddim": "0.50 ± 0.12"}


def test_the_tables_of_the_architectures():
    places = {"parameters": 35_746_307, "published_unit": 34.21, "macs": 6.2e9, "images_per_second": 2}
    given = {at("full-size", metric, network="ddpm-cifar10"): value for metric, value in places.items()}
    given |= {at("full-size", "images_per_second", network="mbconv64"): 3}
    given |= {at("full-size", "activation_mib", network="ddpm-cifar10"): 7}
    _, lines = table(Architectures, "Full size, 3x32x32", given)
    assert list(lines) == list(PUBLISHED)
    assert lines["ddpm-cifar10"] == {
        "network": "ddpm-cifar10",
        "parameters": "35,746,307",
        "in 10^6": "35.75",
        "as published (2^20, with table)": "34.21",
        "multiply-adds, 10^9": "6.20",
        "images/s, training": "2.00 ± 0.12",
        "relative speed": "1 ± 0",
        "published": "1.00",
        "activations, MiB per image": "7.0",
    }
    speeds = np.array([3, 3.125, 2.875]) / [2, 2.125, 1.875]
    assert lines["mbconv64"]["relative speed"] == mean_and_spread(speeds)
    assert [line["published"] for line in lines.values()] == ["1.00", "1.50", "1.15", "1.74", "1.23", "0.77"]
    for data, steps in (("digits", 240), ("fashion-mnist", 90)):
        times = {at(f"{data}-time", "milliseconds", network=name): 5 for name in PUBLISHED} | {
            at(f"{data}-time", "milliseconds", network="shallowres1"): 1
        }
        results, lines = table(Architectures, f"Small siblings on {data}", times)
        assert list(lines) == list(PUBLISHED)
        for name, line in lines.items():
            last, fifth = (results.values(f"{data}-{name}", "loss", steps=step) for step in (steps, steps // 5))
            assert line["loss at equal steps"] == mean_and_spread(last)
            assert line["loss at equal time"] == mean_and_spread(last if name == "shallowres1" else fifth)
            assert line["ms per step"] == ("1.00 ± 0.12" if name == "shallowres1" else "5.00 ± 0.12")


@pytest.mark.parametrize("kind", [ShortChain, TrainSteps])
def test_a_table_of_all_rows(kind):
    results = world(kind)
    (lines,) = kind().tables(results).values()
    places = [(cell, labels, metrics) for cell, form in forms(kind).items() for labels, metrics in form]
    assert len(lines) == len(places)
    for line, (cell, labels, metrics) in zip(lines, places, strict=True):
        values = {metric: mean_and_spread(results.values(cell, metric, **labels)) for metric in metrics}
        assert line == {"configuration": cell} | {name: str(label) for name, label in labels.items()} | values


def lines_of(panel):
    """Labelled lines of a panel: (x, y) by label."""
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines}
    return {label: points for label, points in drawn.items() if not label.startswith("_")}


def close(points, expected):
    return all(a == pytest.approx(b) for a, b in zip(points, expected, strict=True))


def test_the_figure_of_the_objectives():
    results = world(Objectives, {at("digits-time", "time", variant="mean"): 2})
    (figure,) = Objectives().figures(results).values()
    drawn = lines_of(figure.axes[0])
    runs = ("digits-plain", "digits-plain-2x", "digits-plain-3x")
    assert close(drawn["plain, longer"], ([1, 2, 3], [results.values(run, "fd_clf").mean() for run in runs]))
    assert close(drawn["mean"], ([2], [results.values("digits-mean", "fd_clf").mean()]))
    assert [panel.get_title() for panel in figure.axes] == list(BOTH)


def test_the_figure_of_the_bound():
    results = world(VLB)
    (figure,) = VLB().figures(results).values()
    drawn = lines_of(figure.axes[1])
    values = [results.values("fashion-mnist-vlb", metric).mean() for metric in ("bits_per_dim", "fd_ancestral")]
    assert close(drawn["vlb"], ([values[0]], [values[1]]))
    assert list(drawn) == ["simple", "hybrid", "vlb", "vlb-loss-aware", "real data"]


def test_the_figures_of_the_short_chain():
    results = world(ShortChain)
    figures = ShortChain().figures(results)
    assert list(figures) == ["digits-score-against-steps", "fashion-mnist-score-against-steps"]
    panel = figures["digits-score-against-steps"].axes[1]
    assert panel.get_title() == "digits-t100-hybrid"
    counts = [10, 20, 50, 100]
    for way, points in list(lines_of(panel).items())[:-1]:
        labels = [{"variance": way, "steps": count, "clip": "yes"} for count in counts]
        means = [results.values("digits-t100-hybrid", "fd_clf", **own).mean() for own in labels]
        assert close(points, (counts, means))


def test_the_figures_of_the_architectures():
    results = world(Architectures, {at("digits-time", "milliseconds", network="deepres1"): 500})
    figures = Architectures().figures(results)
    assert list(figures) == ["digits-loss", "fashion-mnist-loss"]
    by_step, by_time = (lines_of(panel)["deepres1"] for panel in figures["digits-loss"].axes)
    steps = list(range(16, 241, 16))
    losses = [results.values("digits-deepres1", "loss", steps=step).mean() for step in steps]
    assert close(by_step, (steps, losses))
    assert close(by_time, ([step / 2 for step in steps], losses))


def test_the_figure_of_longer_training():
    results = world(TrainSteps)
    (figure,) = TrainSteps().figures(results).values()
    drawn = lines_of(figure.axes[0])
    assert list(drawn) == [
        "T = 1000, DDIM",
        "T = 100, fixed_large",
        "T = 100, fixed_small",
        "T = 100, DDIM",
        "real data",
    ]
    for label, family in (("T = 1000, DDIM", "digits"), ("T = 100, fixed_small", "digits-t100")):
        scores = [
            results.values(f"{family}-{n}", "fd_clf", sampler=label.split(", ")[1]).mean() for n in (1000, 2000, 3000)
        ]
        assert close(drawn[label], ([1000, 2000, 3000], scores))


@pytest.mark.parametrize("kind", STUDIES)
def test_the_quick_form_has_tables_and_figures(kind):
    study, results = kind(quick=True), world(kind, quick=True)
    assert all(study.tables(results).values())
    assert study.figures(results)
