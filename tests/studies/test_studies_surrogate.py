"""The study of surrogates: what is run and measured, and what each claim reads and decides, on numbers made up.

Rows are written down by hand, since measuring needs trained pairs; at the end one tiny pair is measured, whose rows are
those. The numbers of the seeds differ by a common factor, so that of two values of which one is above the other by ever
so little it is so in every seed, and a claim is decided.
"""

import io
import itertools
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch

import osmose
from osmose.acceleration.hand_over import REPEATS, HandOver, hand_overs
from osmose.acceleration.surrogate import Pair
from osmose.data.dataset import DataConfig, Dataset, DataSpec
from osmose.metrics.evaluate import score_samples
from osmose.studies import surrogate
from osmose.studies.study import Results, Row, Trained
from osmose.studies.surrogate import SurrogateStudy
from osmose.studies.verdicts import mean_and_spread
from osmose.training.recipes import checked, recipe

NAMES = ("gaussian", "class-means", "vae", "flow", "sngan", "ddpm-small")
#: Steps of the ancestral chain; DPM-Solver++ takes `FAST`, and alone also fewer.
LONG = {"digits": 200, "fashion-mnist": 100}
QUICK = {"digits": 20}
FAST, FEWER = 20, (2, 5, 10, 15)
TIMES = ("0", "0.1", "0.25", "0.5", "0.75")
CHAIN = ("nfe", "fd_clf", "clf_score", "fd_clf_real")
PAIR = (*CHAIN, "speed")
#: What the seeds' numbers are multiplied with; a speed, which is compared with a number, has no partner that moves too.
COMMON = (1.0, 1.25, 0.75)
SPEEDS = (1.0, 1.00001, 0.99999)

# ---------------------------------------------------------------------------------------------------------- the rows


@lru_cache
def forms(quick=False):
    """The rows of each cell: labels and names of metrics."""
    found = {}
    for data, steps in (QUICK if quick else LONG).items():
        alone = [("ancestral", steps), *(("dpmpp-2m", count) for count in (*FEWER, FAST))]
        found[f"{data}-ddpm"] = [({"solver": way, "steps": k, "t_mid": "none"}, CHAIN) for way, k in alone]
        found |= {f"{data}-{name}": [] for name in NAMES}
        both = [
            (
                {"solver": way, "steps": k, "t_mid": t},
                (*PAIR, "distance", "floor") if way == "ancestral" and t != "0" else PAIR,
            )
            for way, k in (("ancestral", steps), ("dpmpp-2m", FAST))
            for t in TIMES
        ]
        found |= {f"{data}-with-{name}": both for name in NAMES}
    return found


def at(cell, metric, **labels):
    """A place in the results."""
    return cell, metric, frozenset(labels.items())


@lru_cache
def places(quick):
    """All places there are."""
    return {at(cell, metric, **own) for cell, form in forms(quick).items() for own, names in form for metric in names}


def pair(data, name, t, metric="fd_clf", solver="ancestral"):
    steps = LONG[data] if solver == "ancestral" else FAST
    return at(f"{data}-with-{name}", metric, solver=solver, steps=steps, t_mid=f"{t:g}")


def alone(data, solver="ancestral", steps=None, metric="fd_clf"):
    return at(f"{data}-ddpm", metric, solver=solver, steps=steps or LONG[data], t_mid="none")


@lru_cache
def background(others, quick):
    """Rows of every cell and seed, with numbers that are far apart, all low or all high."""
    numbers = {"apart": itertools.count(10.0), "low": itertools.repeat(1e-3), "high": itertools.repeat(1e6)}[others]
    rows = {}  # shared by all worlds, which put other rows in place of these
    for cell, form in forms(quick).items():
        means = [(labels, {metric: next(numbers) for metric in metrics}) for labels, metrics in form]
        rows[cell] = [
            [Row(labels, {metric: spread(metric, mean)[seed] for metric, mean in own.items()}) for labels, own in means]
            for seed in range(1 if quick else 3)
        ]
    return rows


def spread(metric, mean):
    return [mean * factor for factor in (SPEEDS if metric == "speed" else COMMON)]


def world(given=None, others="apart", quick=False):
    """Results with `given` values at their places: means over seeds, or a tuple with one value for each seed."""
    given, rows = given or {}, dict(background(others, quick))
    assert given.keys() <= places(quick), f"no such places: {given.keys() - places(quick)}"
    for cell in {cell for cell, *_ in given}:
        rows[cell] = [[_changed(cell, row, given, seed) for row in own] for seed, own in enumerate(rows[cell])]
    return Results(tuple(range(1 if quick else 3)), rows)


def _changed(cell, row, given, seed):
    labels, values = frozenset(row.labels.items()), dict(row.values)
    for metric in values:
        value = given.get((cell, metric, labels))
        if value is not None:
            values[metric] = value[seed] if isinstance(value, tuple) else spread(metric, value)[seed]
    return Row(row.labels, values)


# -------------------------------------------------------------------------------------------------------- the claims


def across(base, changes):
    """It holds, and with any one of these numbers changed it does not."""
    return [(base, True), *((base | {place: value}, False) for place, value in changes.items())]


def below(a, b, allowed=1.0):
    """`a` is less than `allowed` times `b`."""
    base = {a: 0.999 * allowed, b: 1.0}
    return [*across(base, {a: 1.001 * allowed, b: 0.998}), (base | {a: allowed}, False)]


def beats_both(data, name):
    whole, own = alone(data), pair(data, name, 0)
    inner = [pair(data, name, t) for t in (0.25, 0.5, 0.75)]
    for best in inner:
        base = dict.fromkeys(inner, 3.0) | {best: 0.999, whole: 1.0, own: 1.0}
        yield from across(base, {best: 1.001, whole: 0.998, own: 0.998})
        yield base | {place: 0.9995 for place in inner if place != best}, True
        # None is good enough, whichever it is.
        yield dict.fromkeys(inner, 1.001) | {whole: 1.0, own: 1.0}, False
        yield base | {own: 1.1, best: 1.05}, False
        yield base | {whole: 1.1, best: 1.05}, False


def auto(data, name):
    """The time that `choose` takes, for distances, floors and scores of the times in their order."""
    times, ones = (0.1, 0.25, 0.5, 0.75), (1, 1, 1, 1)
    good, bad = 1.099, 1.101
    for distances, floors, scores, whole, holds in (
        # Twice the floor is near enough, from 0.5 on; only the score there counts.
        ((9, 3, 2, 1), ones, (8, 8, good, 8), 1, True),
        ((9, 3, 2, 1), ones, (1, 1, bad, 1), 1, False),
        ((9, 3, 2, 1), ones, (8, 8, bad, 8), 1, False),
        ((9, 3, 2, 1), ones, (8, 8, good, 8), 0.998, False),
        ((1, 3, 2, 1), ones, (8, 8, good, 8), 1, True),
        # Not any more at 0.5: 0.75 is taken.
        ((9, 3, 2.001, 1), ones, (8, 8, good, 8), 1, False),
        ((9, 3, 2, 1), (1, 1, 0.999, 1), (8, 8, good, 8), 1, False),
        ((9, 3, 2.001, 1), ones, (8, 8, 8, good), 1, True),
        ((9, 3, 2.001, 1), ones, (8, 8, 8, bad), 1, False),
        # From 0.25 on.
        ((9, 2, 1, 1), ones, (8, good, 8, 8), 1, True),
        ((9, 2, 1, 1), ones, (8, bad, 8, 8), 1, False),
        ((9, 2.001, 1, 1), ones, (8, good, 8, 8), 1, False),
        ((9, 2, 1, 1), (1, 0.999, 1, 1), (8, good, 8, 8), 1, False),
        # From 0.1 on.
        ((2, 1, 1, 1), ones, (good, 8, 8, 8), 1, True),
        ((2, 1, 1, 1), ones, (bad, 8, 8, 8), 1, False),
        ((2.001, 1, 1, 1), ones, (good, 8, 8, 8), 1, False),
        ((2, 1, 1, 1), (0.999, 1, 1, 1), (good, 8, 8, 8), 1, False),
        # None, and then there is nothing to compare.
        ((1, 1, 1, 2), ones, (8, 8, 8, 8), 1, False),
        ((1, 1, 1, 2.001), ones, (8, 8, 8, 8), 1, None),
        ((1, 1, 1, 2), (1, 1, 1, 0.999), (8, 8, 8, 8), 1, None),
    ):
        values = {alone(data): whole}
        for metric, numbers in (("distance", distances), ("floor", floors), ("fd_clf", scores)):
            values |= {pair(data, name, t, metric): value for t, value in zip(times, numbers, strict=True)}
        yield values, holds


def expected():
    """The claims that there should be: words of the text, and cases: values of what it compares, whether it holds."""
    for data, steps in LONG.items():
        whole = alone(data)
        for name in NAMES:
            fd = {t: pair(data, name, t) for t in map(float, TIMES)}
            for t, least in ((0.25, 1.5), (0.5, 1.2)) if name == "ddpm-small" else ((0.25, 3), (0.5, 1.7)):
                speed = pair(data, name, t, "speed")
                base = {speed: 1.001 * least, fd[t]: 1.099, whole: 1.0}
                yield (
                    (f"{data}: {name} at t_mid = {t:g}:", f"more than {least:g} times as fast", "at a loss below 10 %"),
                    across(base, {speed: 0.999 * least, fd[t]: 1.101, whole: 0.998}),
                )
            yield (
                (f"{data}: {name}, some t_mid", f"the pair beats (1) the chain and (2) {name}"),
                [*beats_both(data, name)],
            )
            if name != "ddpm-small":
                yield (
                    (f"{data}: DPM-Solver++", f"{name} and the lower half of 20 steps beat 10 steps of the chain"),
                    below(pair(data, name, 0.5, solver="dpmpp-2m"), alone(data, "dpmpp-2m", 10)),
                )
            yield (
                (f"{data}: {name} at the t_mid that auto takes is less than 10 % worse",),
                [*auto(data, name)],
            )
            if name == "sngan":
                yield (
                    (f"{data}: {name}: the best t_mid is inside: 0.5", "(1) 0.25 and (2) the whole chain"),
                    across(
                        {fd[0.5]: 0.999, fd[0.25]: 1.0, whole: 1.0}, {fd[0.5]: 1.001, fd[0.25]: 0.998, whole: 0.998}
                    ),
                )
            if name not in ("gaussian", "class-means"):
                yield (
                    (f"{data}: at t_mid = 0.25 {name} is a better surrogate than the fitted Gaussian",),
                    below(fd[0.25], pair(data, "gaussian", 0.25)),
                )
        yield (
            (f"{data}: the Gaussian at t_mid = 0.1 is worse than the Gaussian itself",),
            below(pair(data, "gaussian", 0), pair(data, "gaussian", 0.1)),
        )
        yield (
            (f"{data}: 20 steps of DPM-Solver++ alone are less than 10 % worse", f"sngan before half of {steps}"),
            below(alone(data, "dpmpp-2m", 20), pair(data, "sngan", 0.5), 1.1),
        )


EXPECTED = list(expected())
VERDICTS = {True: "reproduced", False: "not reproduced", None: "inconclusive"}


def claim(words):
    """The claim whose text begins with the first of these words and has the others."""
    first, *others = words
    (found,) = (
        c for c in SurrogateStudy().claims() if c.text.startswith(first) and all(word in c.text for word in others)
    )
    return found


@pytest.mark.parametrize(("words", "cases"), [pytest.param(*case, id=": ".join(case[0])) for case in EXPECTED])
def test_a_claim_decides_what_its_sentence_says(words, cases):
    found = claim(words)
    for values, holds in cases:
        # Whatever stands at all other places: the other data, surrogates, solvers, times and metrics.
        for others in ("apart", "low", "high"):
            finding = found.check(world(values, others))
            assert finding.verdict == VERDICTS[holds], (others, values, finding.evidence)


@pytest.mark.parametrize(("words", "cases"), [pytest.param(*case, id=": ".join(case[0])) for case in EXPECTED])
def test_every_number_of_a_sentence_can_turn_its_verdict(words, cases):
    named = {place for values, _ in cases for place in values}
    turned = set()
    for (values, holds), (others, hold) in itertools.combinations(cases, 2):
        differing = {place for place in named if values.get(place) != others.get(place)}
        if holds != hold and len(differing) == 1:
            turned |= differing
    assert turned == named, f"{words}: the cases of this test leave out {named - turned}"


def test_a_claim_names_the_cells_that_it_compares():
    compared = {words: {cell for values, _ in cases for cell, *_ in values} for words, cases in EXPECTED}
    assert {words: set(claim(words).cells) for words in compared} == compared


def test_every_claim_is_among_these():
    texts = [claim(words).text for words, _ in EXPECTED]
    assert sorted(texts) == sorted(c.text for c in SurrogateStudy().claims())
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("data", LONG)
def test_some_time_is_the_best_on_the_other_seeds(data):
    check = claim((f"{data}: vae, some t_mid",)).check
    inner = {0.25: (2.0, 2.0, 2.0), 0.5: (0.2, 1.5, 1.75), 0.75: (1.0, 0.9, 0.9)}
    # Sums of the other two seeds, 0.5 against 0.75: 3.25 and 1.8, 1.95 and 1.9, 1.7 and 1.9.
    values = {pair(data, "vae", t): scores for t, scores in inner.items()}
    found = (1.0, 0.9, 1.75)
    places = alone(data), pair(data, "vae", 0)
    for share, other, verdict in (
        (1.001, 1.001, "reproduced"),
        (0.999, 1.001, "not reproduced"),
        (1.001, 0.999, "not reproduced"),
    ):
        both = {place: tuple(x * score for score in found) for place, x in zip(places, (share, other), strict=True)}
        for early in (0.01, 9.0):  # 0.1 is none of the three
            finding = check(world(values | both | {pair(data, "vae", 0.1): early}))
            assert finding.verdict == verdict
            assert finding.evidence.startswith("t_mid 0.75, 0.75, 0.5: ")


@pytest.mark.parametrize("data", LONG)
def test_auto_takes_a_time_for_each_seed(data):
    times = {0.1: (9, 1, 9), 0.25: (9, 2, 1), 0.5: (2, 1, 1), 0.75: (1, 2, 2.5)}
    scores = {0.1: (10, 24, 12), 0.25: (20, 21, 22), 0.5: (30, 31, 32), 0.75: (28, 41, 27)}
    values = {alone(data): (50, 51, 52)}
    for t, distances in times.items():
        values |= {
            pair(data, "flow", t): scores[t],
            pair(data, "flow", t, "distance"): distances,
            pair(data, "flow", t, "floor"): (1, 1, 1),
        }
    check = claim((f"{data}: flow at the t_mid that auto takes",)).check
    # 0.5; 0.1, at every time within twice the floor; none, since the last time is too far.
    finding = check(world(values))
    assert (finding.verdict, finding.evidence) == ("inconclusive", "auto takes 0.5, 0.1, none")
    # Floors of their own: the first and the third pass at 0.75, and not at 0.5. Scores are then 28, 24 and 27.
    values |= {pair(data, "flow", 0.75, "floor"): (1, 1, 1.25), pair(data, "flow", 0.5, "floor"): (0.9, 1, 0.4)}
    # Each seed's is compared with the chain of the same seed.
    for chain, share, verdict in (
        ((28, 24, 27), 1.099, "reproduced"),
        ((28, 24, 27), 1.101, "not reproduced"),
        ((24, 27, 28), 1.099, "inconclusive"),
    ):
        finding = check(world(values | {alone(data): tuple(score / share for score in chain)}))
        assert finding.verdict == verdict
        assert finding.evidence.startswith("auto takes 0.75, 0.1, 0.75: ")


def test_one_seed_of_the_quick_form_decides_nothing():
    claims, results = SurrogateStudy(quick=True).claims(), world(quick=True)
    assert len(claims) == len(EXPECTED) // 2
    assert all(set(c.cells) <= set(results.rows) for c in claims)
    assert {c.check(results).verdict for c in claims} == {"inconclusive"}


# --------------------------------------------------------------------------------------------------------- the cells


def cells(quick=False):
    return {cell.name: cell for cell in SurrogateStudy(quick).cells()}


def test_which_cells_there_are():
    assert list(cells()) == list(forms())
    for name, cell in cells().items():
        data, kind = next((d, name.removeprefix(f"{d}-")) for d in LONG if name.startswith(f"{d}-"))
        if kind.startswith("with-"):
            assert (cell.method, cell.data) == (None, data)
            assert cell.uses == (f"{data}-ddpm", f"{data}-{kind.removeprefix('with-')}")
            assert all(cells()[used].method is not None for used in cell.uses)
            assert not cell.changes
        else:
            assert cell.uses == ()
            assert cell.method == ("ddpm" if kind == "ddpm-small" else kind)
            assert cell.data == (DataConfig(source=data, downsample=2) if kind == "ddpm-small" else data)
    for data, n in (("digits", 800), ("fashion-mnist", 300)):
        own = {name: cell for name, cell in cells().items() if name.startswith(data)}
        assert own[f"{data}-ddpm-small"].changes == own[f"{data}-ddpm"].changes
        chain = own[f"{data}-ddpm"].settings
        assert chain["n"] == n
        assert chain["counts"] == {"ancestral": [LONG[data]], "dpmpp-2m": [*FEWER, FAST]}
        for name in NAMES:
            assert own[f"{data}-{name}"].settings == {}
            settings = own[f"{data}-with-{name}"].settings
            assert settings["n"] == n
            assert settings["solvers"] == {"ancestral": LONG[data], "dpmpp-2m": FAST}
            assert settings["times"] == [float(t) for t in TIMES]
            assert settings["repeats"] == REPEATS  # so that it is measured again where these are changed


def test_the_quick_form_is_the_digits_smaller():
    whole, quick = cells(), cells(quick=True)
    assert list(quick) == [name for name in whole if name.startswith("digits-")] == list(forms(quick=True))
    for name, cell in quick.items():
        full = whole[name]
        assert (cell.method, cell.data, cell.uses) == (full.method, full.data, full.uses)
        assert cell.settings.keys() == full.settings.keys()
        assert cell.settings.get("times") == full.settings.get("times")
        if cell.settings:
            assert all(cell.settings[key] < full.settings[key] for key in ("n", "timed"))
        if cell.uses:
            short, long = (which.settings["solvers"] for which in (cell, full))
            assert short.keys() == long.keys()
            assert short["ancestral"] < long["ancestral"]
        if cell.method not in (None, "gaussian", "class-means"):
            assert cell.changes["training.steps"] <= 40
    short, full = (SurrogateStudy(quick).claims() for quick in (True, False))
    assert [c.cells for c in short] == [c.cells for c in full if c.text.startswith("digits: ")]
    assert all(c.text.startswith("digits: ") for c in short)


@pytest.fixture(scope="module")
def digits():
    return DataConfig(source="digits").load()


@pytest.mark.parametrize("data", LONG)
def test_what_is_trained_is_a_configuration(data, digits):
    """The cells of Fashion-MNIST are put together for images of its size; the images are not needed."""
    images = torch.randint(0, 256, (64, 1, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    spec = DataSpec(kind="image", shape=(1, 28, 28), range=(0, 255), levels=256, shift=(127.5,), scale=(127.5,))
    labels = torch.arange(64) % 10
    large = Dataset(data, spec.replace(num_classes=10), images, images[:8], "none", labels, labels[:8])
    dataset = digits if data == "digits" else large
    for name, cell in cells().items():
        if name.startswith(data) and cell.method is not None:
            small = isinstance(cell.data, DataConfig)
            config = cell.data if small else DataConfig(source=data)
            given = dataset.downsampled(2) if small else dataset
            made = checked(recipe(cell.method, config, given, 0, cell.changes))
            assert made.method.kind == cell.method
            side = dataset.spec.shape[1] // (2 if small else 1)
            assert made.spec.shape == (1, side, side)
            for change, value in cell.changes.items():
                if change.startswith("training."):
                    assert getattr(made.training, change.removeprefix("training.")) == value


# ---------------------------------------------------------------------------------------------------------- measuring


class Stand:
    """Stands for a model; notes what it is asked for, and gives samples that say how they were made."""

    def __init__(self, asked, **known):
        self.asked, self.known = asked, known

    def to(self, device):
        self.known["device"] = device
        return self

    def sample(self, n, *, seed, **sampling):
        said = {"n": n, "seed": seed, **self.known, **sampling}
        self.asked.append(said)
        return SimpleNamespace(data=said, nfe=len(self.asked))


@pytest.mark.parametrize("quick", [True, False])
def test_rows_are_measured_as_their_labels_say(monkeypatch, quick):
    asked, timed, near = [], [], []

    def scores(data, dataset, *, metrics, seed):
        assert data is asked[-1]
        assert (dataset, sorted(metrics), seed) == ("data", ["clf_score", "fd_clf"], 4)
        values = {"fd_clf": (10.0 + len(asked), 0.5), "clf_score": (3.0 + len(asked), None)}
        return [SimpleNamespace(name=name, value=values[name][0], floor=values[name][1]) for name in metrics]

    def distances(pair, dataset, times, *, n, seed):
        near.extend((t, dataset, n, seed, dict(pair.model.known)) for t in times)
        return [HandOver(t, 100 + t, 10 + t) for t in times]

    def speed(pair, t, n):
        timed.append((pair.model.known["solver"], t, n))
        return 2 + t

    def put_together(chain, other, **sampling):
        assert (chain.folder, other) == cell.uses
        return SimpleNamespace(model=Stand(asked, **sampling))

    monkeypatch.setattr(surrogate, "Pair", put_together)
    monkeypatch.setattr(surrogate, "score_samples", scores)
    monkeypatch.setattr(surrogate, "hand_overs", distances)
    monkeypatch.setattr(surrogate, "_speed", speed)
    for name, cell in cells(quick).items():
        asked.clear(), timed.clear(), near.clear()
        trained = SimpleNamespace(
            cell=cell, seed=4, dataset="data", device="here", model=Stand(asked), of=lambda f: SimpleNamespace(folder=f)
        )
        rows = SurrogateStudy(quick).measure(trained)
        assert [(row.labels, set(row.values)) for row in rows] == [(own, set(m)) for own, m in forms(quick)[name]]
        assert len(asked) == len(rows)
        for count, (row, said) in enumerate(zip(rows, asked, strict=True), 1):
            n = cell.settings["n"]
            own = {"n": n, "seed": 4, "solver": row.labels["solver"], "num_steps": row.labels["steps"]}
            scored = {"nfe": count, "fd_clf": 10 + count, "clf_score": 3 + count, "fd_clf_real": 0.5}
            if row.labels["t_mid"] == "none":
                assert said == own
                assert row.values == scored
            else:
                t = float(row.labels["t_mid"])
                assert said == own | {"t_mid": t, "device": "here"}
                both = {"distance": 100 + t, "floor": 10 + t} if t and own["solver"] == "ancestral" else {}
                assert row.values == scored | {"speed": 2 + t} | both
        if cell.uses:
            each = [(row.labels["solver"], float(row.labels["t_mid"]), cell.settings["timed"]) for row in rows]
            assert timed == each
            known = {"num_steps": cell.settings["solvers"]["ancestral"], "solver": "ancestral", "device": "here"}
            assert near == [(float(t), "data", n, 4, known) for t in TIMES[1:]]


@pytest.mark.parametrize(("device", "clock"), [("cpu", "process_time"), ("cuda", "perf_counter")])
def test_speed_is_the_best_of_two_turns_of_chain_and_pair(monkeypatch, device, clock):
    clocks, asked = {"process_time": 100.0, "perf_counter": 100.0}, []

    def takes(who, seconds):
        left = iter(seconds)

        def sample(n, **sampling):
            for index, name in enumerate(clocks):
                clocks[name] += next(left) if name == clock else 7 * index
            asked.append((who, n, sampling))

        return sample

    own = {"num_steps": 20, "solver": {"kind": "dpmpp-2m"}, "clip": True}
    model = SimpleNamespace(
        device=torch.device(device),
        config=SimpleNamespace(sampling=SimpleNamespace(of_chain=lambda: own)),
        chain=SimpleNamespace(sample=takes("chain", (8.0, 6.0))),
        sample=takes("pair", (4.0, 5.0)),
    )
    read = {name: lambda name=name: clocks[name] for name in clocks}
    monkeypatch.setattr(surrogate, "time", SimpleNamespace(**read))
    assert surrogate._speed(SimpleNamespace(model=model), 0.25, 7) == 1.5
    assert asked == [("chain", 7, own), ("pair", 7, {"t_mid": 0.25})] * 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tiny = {"network": "mlp", "network.width": 16, "training.steps": 3, "training.batch_size": 16}
    return {
        "digits-ddpm": osmose.train("ddpm", "digits", folder / "ddpm", progress=False, **tiny),
        "digits-gaussian": osmose.train("gaussian", "digits", folder / "gaussian", progress=False),
    }


def test_a_real_pair_has_these_rows(runs, digits):
    rows = {}
    for name in ("digits-ddpm", "digits-gaussian", "digits-with-gaussian"):
        cell = cells(quick=True)[name]
        used = {other: runs[other] for other in cell.uses}
        trained = Trained(cell, 0, digits, torch.device("cpu"), runs.get(name), used)
        rows[name] = SurrogateStudy(quick=True).measure(trained)
        form = [(labels, set(metrics)) for labels, metrics in forms(quick=True)[name]]
        assert [(row.labels, set(row.values)) for row in rows[name]] == form
    assert [row.values["nfe"] for row in rows["digits-ddpm"]] == [20, *FEWER, FAST]
    pairs = rows["digits-with-gaussian"]
    assert [row.values["nfe"] for row in pairs] == [0, *FEWER] * 2
    assert len({row.values["fd_clf_real"] for own in rows.values() for row in own}) == 1
    assert all(row.values["speed"] > 0 for row in pairs)
    assert pairs[0].values["fd_clf"] == pairs[5].values["fd_clf"]  # the surrogate alone, whatever the solver
    # One of them by hand.
    own = Pair(runs["digits-ddpm"], runs["digits-gaussian"].folder, num_steps=20, solver="ancestral")
    samples = own.model.sample(100, seed=0, t_mid=0.5)
    known = {score.name: score.value for score in score_samples(samples.data, digits, metrics=["fd_clf", "clf_score"])}
    (near,) = hand_overs(own, digits, [0.5], n=100, seed=0)
    known |= {"distance": near.distance, "floor": near.floor}
    assert {name: pairs[3].values[name] for name in known} == pytest.approx(known, rel=1e-4)
    results = Results((0,), {name: [own] for name, own in rows.items()})
    assert results.values("digits-with-gaussian", "speed", solver="ancestral", t_mid="0.5").shape == (1,)


@pytest.mark.parametrize("data", LONG)
def test_times_and_steps_belong_to_the_chain(runs, data):
    """A share of the steps at each time, and the chain alone runs the numbers of steps that pairs of 20 take."""
    settings = cells()[f"{data}-with-gaussian"].settings
    for solver, steps in settings["solvers"].items():
        own = Pair(runs["digits-ddpm"], runs["digits-gaussian"].folder, num_steps=steps, solver=solver).model
        taken = [own.sample(1, seed=0, t_mid=t).nfe for t in settings["times"]]
        assert taken == [steps * t for t in settings["times"]]
        assert own.config.sampling.of_chain() == own.chain.sampling(num_steps=steps, solver=solver).to_json()
    counts = [row["steps"] for row, _ in forms()[f"{data}-ddpm"] if row["solver"] == "dpmpp-2m"]
    assert counts == [*taken[1:], FAST]


# ------------------------------------------------------------------------------------------------ tables and figures


def titles(data, steps):
    return [f"{data}, ancestral, K = {steps}", f"{data}, dpmpp-2m, K = {FAST}"]


@pytest.mark.parametrize("quick", [False, True])
def test_tables(quick):
    results = world(quick=quick)
    tables = SurrogateStudy(quick).tables(results)
    assert list(tables) == [
        title for data, steps in (QUICK if quick else LONG).items() for title in titles(data, steps)
    ]

    def line(cell, labels, first, columns):
        values = {title: results.values(cell, metric, **labels) for title, metric in columns.items()}
        return first | {title: mean_and_spread(own) for title, own in values.items()}

    chain = {"evaluations": "nfe", "fd_clf": "fd_clf", "clf_score": "clf_score"}
    both = chain | {"speed": "speed"}
    near = {"distance at t_mid": "distance", "floor": "floor"}
    for heading, lines in tables.items():
        data, solver, steps = heading.split(", ")
        expected = []
        for name in NAMES:
            for t in TIMES:
                labels = {"solver": solver, "steps": int(steps.removeprefix("K = ")), "t_mid": t}
                columns = both | near if solver == "ancestral" and t != "0" else both
                expected.append(line(f"{data}-with-{name}", labels, {"surrogate": name, "t_mid": t}, columns))
        for labels, _ in forms(quick)[f"{data}-ddpm"]:
            if labels["solver"] == solver:
                first = {"surrogate": "-", "t_mid": f"none, K = {labels['steps']}"}
                expected.append(line(f"{data}-ddpm", labels, first, chain))
        floor = results.groups(f"{data}-ddpm")[0][1]["fd_clf_real"]
        assert lines == [*expected, {"surrogate": "real data", "fd_clf": mean_and_spread(floor)}]
        assert len(lines) == 30 + (1 if solver == "ancestral" else 5) + 1


def test_columns_of_a_table_begin_with_what_is_looked_for():
    first = SurrogateStudy().tables(world())["digits, ancestral, K = 200"][0]
    assert list(first)[:5] == ["surrogate", "t_mid", "evaluations", "speed", "fd_clf"]


@pytest.mark.parametrize("quick", [False, True])
def test_figures(quick):
    results = world(quick=quick)
    figures = SurrogateStudy(quick).figures(results)
    plans = QUICK if quick else LONG
    assert list(figures) == [f"{data}-score-against-t-mid" for data in plans]
    for (data, long), figure in zip(plans.items(), figures.values(), strict=True):
        figure.savefig(io.BytesIO(), format="png", dpi=30)
        assert [panel.get_title() for panel in figure.axes] == titles(data, long)
        assert [panel.get_legend() is not None for panel in figure.axes] == [True, False]
        for panel, solver, steps in zip(figure.axes, ("ancestral", "dpmpp-2m"), (long, FAST), strict=True):
            lines = {line.get_label(): line for line in panel.lines if not line.get_label().startswith("_")}
            assert list(lines) == [*NAMES, "real data"]
            # A line of means and, at each of six places, the seeds.
            assert len(panel.lines) == len(NAMES) * (1 + 6) + 1
            assert (panel.get_yscale(), panel.get_ylabel()) == ("log", "fd_clf")
            whole = results.values(f"{data}-ddpm", "fd_clf", solver=solver, steps=steps).mean()
            for name in NAMES:
                means = [results.values(f"{data}-with-{name}", "fd_clf", solver=solver, t_mid=t).mean() for t in TIMES]
                assert list(lines[name].get_xdata()) == [0, 0.1, 0.25, 0.5, 0.75, 1]
                assert list(lines[name].get_ydata()) == pytest.approx([*means, whole])
            floor = results.groups(f"{data}-ddpm")[0][1]["fd_clf_real"].mean()
            assert list(lines["real data"].get_ydata()) == pytest.approx([floor, floor])
