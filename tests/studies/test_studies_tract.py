"""The studies of TRACT: what is trained and measured, and what each claim reads and decides, on numbers made up.

Cells, rows and sentences are written down by hand. The numbers of the seeds differ by a common factor, so that of two
values of which one is above the other by ever so little it is so in every seed, and a claim is decided. Nothing is
trained but one tiny teacher and its students, at the end.
"""

import dataclasses
import io
import itertools
import math
import re
from fractions import Fraction
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import osmose
from osmose.acceleration.plan import plan
from osmose.data.dataset import DataConfig, Dataset, DataSpec
from osmose.metrics.evaluate import score_samples
from osmose.studies import STUDIES, few_steps
from osmose.studies.few_steps import FewSteps
from osmose.studies.study import Results, Row, Trained
from osmose.studies.tract import Tract
from osmose.studies.tract_ema import TractEMA
from osmose.studies.tract_phases import TractPhases
from osmose.studies.verdicts import mean_and_spread
from osmose.training.config import Parent
from osmose.training.files import read_tensors
from osmose.training.recipes import checked, recipe

KINDS = (Tract, TractPhases, TractEMA)
FORMS = [pytest.param(kind, quick, id=f"{kind.__name__}{'-quick' * quick}") for kind in KINDS for quick in (0, 1)]
SOURCES = {"checkerboard": "toy:checkerboard", "digits": "digits", "fashion-mnist": "fashion-mnist"}
#: Updates in all; the last are the main ones.
BUDGETS = {"checkerboard": (400, 1500), "digits": (500, 2000), "fashion-mnist": (400,)}
QUICK = {"checkerboard": (20,)}
#: Students of two steps and more: what btd has used of its updates when it is there.
SHARES = {2: 0.9, 4: 0.8, 8: 0.7}
#: Students of images that are held against twice a teacher in so many steps.
NEAR = {
    "digits": [("64-btd-both-2000", "teacher", 1024), ("edm-tract-1-average-2000", "edm", 40)],
    "fashion-mnist": [("btd-decay-400", "teacher", 128)],
}
#: Of the two other studies: data, updates in all, and in each phase.
SMALL = ("checkerboard",)
TOTAL, EACH = {False: 1200, True: 20}, {False: 240, True: 2}
SCHEDULES = {
    1: [1024, 1],
    2: [1024, 32, 1],
    3: [1024, 128, 16, 1],
    5: [1024, 256, 64, 16, 4, 1],
    10: [1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1],
}
SELF, INFERENCE = ("0", "0.1", "0.5", "0.9", "0.99"), {"0": 0.0, "1e-06": 1e-6, "0.1": 0.1}
METRICS = ("score", "score_real", "rmse", "nfe", "seconds_per_sample", "training_seconds")
#: What the seeds' numbers are multiplied with.
COMMON = (1.0, 1.25, 0.75)
#: What a value is that no claim, or not the claim that is looked at, is about.
OTHERS = ("apart", "low", "high")


# ---------------------------------------------------------------------------------------------------------- the rows


@lru_cache
def steps_of(kind, quick=False):
    """The numbers of steps of the rows of each cell."""
    found = {}
    if kind is not Tract:
        for data in SMALL:
            found[f"{data}-teacher"] = (1, 1024)
            if kind is TractPhases:
                names = ["total-btd", *(f"{way}-{phases}" for way in ("total", "each") for phases in SCHEDULES)]
            else:
                names = [*(f"self-{decay}" for decay in SELF), *(f"inference-{name}" for name in INFERENCE)]
            found |= {f"{data}-{name}": (1,) for name in names}
        return found
    for data, budgets in (QUICK if quick else BUDGETS).items():
        small, main = data != "fashion-mnist", budgets[-1]
        found[f"{data}-teacher"] = (1, 2, 4, 8, 32, 128, *((1024,) if small else ()))
        for budget in budgets:
            ways = ("decay", "average", *(("both", "neither") if small and budget == main else ()))
            found |= {f"{data}-btd-{way}-{budget}": (1, 2, 4, 8) for way in ways}
            found |= {f"{data}-tract-2-{way}-{budget}": (1, 32) for way in (ways if small else ("average",))}
            found[f"{data}-tract-1-average-{budget}"] = (1,)
        found |= {f"{data}-tract-2-to-{count}-{main}": (count,) for count in SHARES}
        if small:
            found |= {f"{data}-64-btd-both-{main}": (1, 2, 4, 8), f"{data}-64-tract-2-both-{main}": (1, 8)}
            found[f"{data}-edm"] = (1, 2, 4, 8, 40)
            found |= {f"{data}-edm-tract-{phases}-average-{main}": (1,) for phases in (1, 2)}
    return found


class Place(NamedTuple):
    """A place in the results."""

    cell: str
    steps: int = 1
    metric: str = "score"


def numbers(others):
    """What stands at one place after the other: far apart, all very low, or all very high."""
    return {"apart": itertools.count(10.0), "low": itertools.repeat(-1e3), "high": itertools.repeat(1e6)}[others]


@lru_cache
def background(kind, quick, others, seeds):
    own = numbers(others)
    rows = {}  # shared by all worlds, which put other rows in place of these
    for cell, counts in steps_of(kind, quick).items():
        means = [(count, {metric: next(own) for metric in METRICS}) for count in counts]
        rows[cell] = [
            [Row({"steps": count}, {m: value * factor for m, value in values.items()}) for count, values in means]
            for factor in COMMON[:seeds]
        ]
    return rows


def world(kind, given=None, quick=False, others="apart", seeds=3):
    """Results with `given` values at their places: means over seeds, or a tuple with one value for each seed."""
    given, rows = dict(given or {}), dict(background(kind, bool(quick), others, seeds))
    for place, value in given.items():
        assert place.metric in METRICS
        assert place.steps in steps_of(kind, bool(quick))[place.cell]
        own = value if isinstance(value, tuple) else tuple(value * factor for factor in COMMON)
        rows[place.cell] = [
            [
                Row(row.labels, {**row.values, place.metric: own[seed]}) if row.labels["steps"] == place.steps else row
                for row in old
            ]
            for seed, old in enumerate(rows[place.cell])
        ]
    return Results(tuple(range(seeds)), rows)


# -------------------------------------------------------------------------------------------------------- the claims


class Sentence(NamedTuple):
    """That `a` is below `factor` times `b`, and what the two cells differ in, None where one is a teacher."""

    a: Place
    b: Place
    differ: set[str] | None
    factor: float = 1.0


ALIKE, WAY = {"method", "schedule"}, {"ema_residual", "training.decay"}


def tract_sentences(quick):
    for data, budgets in (QUICK if quick else BUDGETS).items():
        for budget in budgets:
            yield from at_every_budget(data, budget)
        yield from at_the_main_budget(data, budgets[-1])


def at_every_budget(data, budget):
    def of(name, metric="score"):
        return Place(f"{data}-{name}-{budget}", 1, metric)

    teacher, two, near = Place(f"{data}-teacher"), of("tract-2-average"), of("tract-2-average", "rmse")
    found = {
        "TRACT in two phases (average) beats btd as published (decay)": (two, of("btd-decay"), ALIKE | WAY),
        "TRACT in two phases beats btd trained alike (average)": (two, of("btd-average"), ALIKE),
        "the same of the distance to the teacher": (near, of("btd-average", "rmse"), ALIKE),
        "btd: average beats decay": (of("btd-average"), of("btd-decay"), WAY),
        "TRACT in two phases beats TRACT in one": (two, of("tract-1-average"), {"schedule"}),
        "tract-2-average beats the teacher in 1 step": (two, teacher, None),
        "btd-decay beats the teacher in 1 step": (of("btd-decay"), teacher, None),
    }
    if data != "fashion-mnist":
        decayed = of("tract-2-decay")
        found |= {
            "both with decay, TRACT in two phases beats btd": (decayed, of("btd-decay"), ALIKE),
            "TRACT in two phases: average beats decay": (two, decayed, WAY),
        }
    for text, sentence in found.items():
        yield f"{data}, {budget} updates, 1 step: {text}", Sentence(*sentence)


def at_the_main_budget(data, budget):
    def of(name, steps=1):
        return Place(f"{data}-{name}-{budget}", steps)

    for count in SHARES:
        yield (
            f"{data}, {count} steps, equal updates: TRACT beats btd trained alike",
            Sentence(of(f"tract-2-to-{count}", count), of("btd-average", count), ALIKE | {"steps", "uses"}),
        )
    for student, teacher, steps in NEAR.get(data, ()):
        yield (
            f"{data}: {student} scores in 1 step below twice {teacher} in {steps}",
            Sentence(Place(f"{data}-{student}"), Place(f"{data}-{teacher}", steps), None, 2.0),
        )
    if data == "fashion-mnist":
        return
    fewer, better = {"schedule"}, "are a better beginning than 1024"
    two, edm, one = of("tract-2-average"), of("edm-tract-2-average"), of("edm-tract-1-average")
    found = {
        f"btd: 64 steps of the teacher {better}": (of("64-btd-both"), of("btd-both"), fewer),
        f"TRACT: 64 steps {better}": (of("64-tract-2-both"), of("tract-2-both"), fewer),
        "from 64 steps TRACT in two phases beats btd": (of("64-tract-2-both"), of("64-btd-both"), ALIKE),
        "two phases of an EDM teacher beat two of the VP one": (edm, two, fewer | {"solver", "weight", "uses"}),
        "EDM teacher: two phases beat one": (edm, one, fewer),
    }
    for name in ("btd", "tract-2"):
        average, both, decay, neither = (of(f"{name}-{way}") for way in ("average", "both", "decay", "neither"))
        found |= {
            f"{name}: averaging pays without decay": (average, neither, {"ema_residual"}),
            f"{name}: averaging pays on top of decay": (both, decay, {"ema_residual"}),
            f"{name}: decay pays without averaging": (decay, neither, {"training.decay"}),
        }
    for text, sentence in found.items():
        yield f"{data}, {budget} updates, 1 step: {text}", Sentence(*sentence)


def phase_sentences(quick):
    words = {1: "one", 3: "three", 5: "five", 10: "ten"}
    total, each = TOTAL[quick], EACH[quick]
    for data in SMALL:
        for phases, word in words.items():
            for way, text, differ in (
                ("total", f"{total} updates in all", {"schedule"}),
                ("each", f"{each} updates a phase", {"schedule", "steps"}),
            ):
                yield (
                    f"{data}, {text}: two phases beat {word}",
                    Sentence(Place(f"{data}-{way}-2"), Place(f"{data}-{way}-{phases}"), differ),
                )
        yield (
            f"{data}, {total} updates in all, ten phases: btd beats TRACT",
            Sentence(Place(f"{data}-total-btd"), Place(f"{data}-total-10"), {"method"}),
        )


def average_sentences(_quick):
    for data in SMALL:
        base = Place(f"{data}-self-0.5")
        for decay in ("0", "0.1", "0.9", "0.99"):
            yield f"{data}: mu_S = 0.5 beats {decay}", Sentence(base, Place(f"{data}-self-{decay}"), {"ema_self"})
        yield (
            f"{data}: mu_S = 0.9 beats 0.99",
            Sentence(Place(f"{data}-self-0.9"), Place(f"{data}-self-0.99"), {"ema_self"}),
        )
        for name in INFERENCE:
            yield (
                f"{data}: the inference average with rho = 0.001 beats rho = {name}",
                Sentence(base, Place(f"{data}-inference-{name}"), {"ema_residual"}),
            )


SENTENCES = {Tract: tract_sentences, TractPhases: phase_sentences, TractEMA: average_sentences}


@lru_cache
def expected(kind, quick):
    return dict(SENTENCES[kind](bool(quick)))


@lru_cache
def claims(kind, quick):
    return {claim.text: claim for claim in kind(bool(quick)).claims()}


EVERY = [
    pytest.param(kind, quick, text, id=f"{kind.__name__}{'-quick' * quick}: {text}")
    for kind in KINDS
    for quick in (0, 1)
    for text in expected(kind, quick)
]


@pytest.mark.parametrize(("kind", "quick", "text"), EVERY)
def test_a_claim_decides_what_its_sentence_says(kind, quick, text):
    """The claims of the quick form too, given three seeds."""
    a, b, _, factor = expected(kind, quick)[text]
    claim = claims(kind, quick)[text]
    for values, verdict in (
        ({a: 0.999 * factor, b: 1.0}, "reproduced"),
        ({a: 1.001 * factor, b: 1.0}, "not reproduced"),
        ({a: 0.999 * factor, b: 0.998}, "not reproduced"),
        ({a: factor, b: 1.0}, "not reproduced"),
        ({a: (0.9 * factor, 1.1 * factor, factor), b: (1.0, 1.0, 1.0)}, "inconclusive"),
        ({a: (factor, factor, factor), b: (0.9, 1.2, 1.0)}, "inconclusive"),
        # Seed by seed: the others' order would decide nothing.
        ({a: (4.9 * factor, 0.9 * factor, 1.9 * factor), b: (5.0, 1.0, 2.0)}, "reproduced"),
    ):
        # Whatever stands at all other places: other data, budgets, ways, steps and metrics.
        for others in OTHERS:
            finding = claim.check(world(kind, values, quick, others))
            assert finding.verdict == verdict, (others, values, finding.evidence)
    assert list(claim.cells) == [a.cell, b.cell]


@pytest.mark.parametrize(("kind", "quick"), FORMS)
def test_every_claim_is_among_these(kind, quick):
    texts = [claim.text for claim in kind(bool(quick)).claims()]
    assert sorted(texts) == sorted(expected(kind, quick))
    assert len(set(texts)) == len(texts)
    assert all(set(claim.cells) <= set(steps_of(kind, bool(quick))) for claim in claims(kind, quick).values())


def test_so_many_claims():
    """By hand: nine at each budget, 14 and 16 more at the main ones, and of Fashion-MNIST 7 and 4; nine; eight."""
    assert [len(expected(kind, 0)) for kind in KINDS] == [4 * 9 + 14 + 16 + 7 + 4, 9, 8]


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_of_the_quick_form_decides_nothing(kind):
    results = world(kind, quick=True, seeds=1)
    assert kind(quick=True).seeds() == (0,)
    assert {claim.check(results).verdict for claim in claims(kind, 1).values()} == {"inconclusive"}


# --------------------------------------------------------------------------------------------------------- the cells


@lru_cache
def cells(kind, quick):
    return {cell.name: cell for cell in kind(bool(quick)).cells()}


def named(kind, quick, name):
    """What is said of a cell, with its method and teacher, and the usual self-teacher, which btd does without."""
    cell = cells(kind, quick)[name]
    return {"ema_self": 0.5} | dict(cell.changes) | {"method": cell.method, "uses": cell.uses}


def differences(a, b):
    return {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}


@pytest.mark.parametrize(("kind", "quick"), FORMS)
def test_the_cells_and_their_rows(kind, quick):
    own, rows = cells(kind, quick), steps_of(kind, bool(quick))
    assert {name: tuple(cell.settings["counts"]) for name, cell in own.items()} == rows
    for name, cell in own.items():
        (data,) = (data for data in SOURCES if name.startswith(data))
        assert cell.data == SOURCES[data]
        assert cell.settings["metric"] == ("energy" if data == "checkerboard" else "fd_clf")
        sampling = cell.settings.get("sampling")
        if not cell.uses:
            full = {"ddpm": {"num_steps": 1024, "solver": "ddim"}, "edm": {"num_steps": 40, "solver": "heun"}}
            assert sampling == full[cell.method]
            continue
        assert sampling is None
        assert cell.method in ("tract", "btd")
        teacher = f"{data}-edm" if "edm" in name else f"{data}-teacher"
        before = (f"{data}-tract-2-average-{name.split('-')[-1]}",) if "-to-" in name else ()
        assert cell.uses == (*before, teacher)


def test_the_quick_form_is_smaller():
    for kind in KINDS:
        for name, cell in cells(kind, 1).items():
            full = cells(kind, 0)[re.sub("-20$", "-1500", name) if kind is Tract else name]
            said = dict(cell.changes), dict(full.changes)
            sizes = {"steps", "network.width", "training.batch_size", "training.steps"}
            assert differences(*said) <= sizes | {"training.preview_samples"}
            assert all(said[0][size] < said[1][size] for size in sizes & differences(*said))
            assert cell.settings["n"] < full.settings["n"]
            assert (cell.method, cell.data) == (full.method, full.data)


def students(kind, quick):
    """Sentences of two students, but for those on where to begin, which are looked at alone."""
    for text, sentence in expected(kind, quick).items():
        if sentence.differ is not None and "better beginning" not in text:
            yield text, sentence


@pytest.mark.parametrize(("kind", "quick"), FORMS)
def test_students_differ_in_what_the_sentence_names(kind, quick):
    for text, (a, b, differ, _) in students(kind, quick):
        assert differences(*(named(kind, quick, place.cell) for place in (a, b))) == differ, text


@pytest.mark.parametrize("quick", [0, 1])
def test_beginnings_differ_in_the_schedule_alone(quick):
    for text, claim in claims(Tract, quick).items():
        if "better beginning" in text:
            assert differences(*(named(Tract, quick, cell) for cell in claim.cells)) == {"schedule"}, text


@pytest.mark.parametrize(("kind", "quick"), FORMS)
def test_what_is_compared_is_measured_alike(kind, quick):
    for text, claim in claims(kind, quick).items():
        own = [cells(kind, quick)[name].settings for name in claim.cells]
        assert all(differences(settings, own[0]) <= {"counts", "sampling"} for settings in own), text


@pytest.mark.parametrize("quick", [0, 1])
def test_the_four_ways(quick):
    ways = {"neither": (0, "none"), "decay": (0, "linear"), "average": (1e-3, "none"), "both": (1e-3, "linear")}
    found = set()
    for name, cell in cells(Tract, quick).items():
        if cell.uses:
            (way,) = [way for way in ways if way in name] or ["average"]
            assert (cell.changes["ema_residual"], cell.changes["training.decay"]) == ways[way], name
            found.add(way)
    assert found == set(ways)
    for kind in (TractPhases, TractEMA):
        for name, cell in cells(kind, quick).items():
            if cell.uses:
                assert cell.changes["training.decay"] == "none"
                assert (cell.changes["ema_residual"] == 1e-3) == ("inference" not in name)


@pytest.mark.parametrize("quick", [0, 1])
def test_lengths_and_schedules_of_the_phases(quick):
    for data in SMALL:
        for phases, schedule in SCHEDULES.items():
            for way, steps in (("total", TOTAL[quick]), ("each", phases * EACH[quick])):
                changes = cells(TractPhases, quick)[f"{data}-{way}-{phases}"].changes
                assert (changes["schedule"], changes["steps"]) == (schedule, steps)
        control = cells(TractPhases, quick)[f"{data}-total-btd"]
        assert (control.method, control.changes["schedule"]) == ("btd", SCHEDULES[10])


@pytest.mark.parametrize("quick", [0, 1])
def test_averages_are_what_the_names_of_their_cells_say(quick):
    for data in SMALL:
        base = named(TractEMA, quick, f"{data}-self-0.5")
        assert (base["schedule"], base["steps"], base["ema_residual"]) == ([1024, 32, 1], TOTAL[quick], 1e-3)
        for decay in SELF:
            assert named(TractEMA, quick, f"{data}-self-{decay}") == base | {"ema_self": float(decay)}
        for name, residual in INFERENCE.items():
            own = named(TractEMA, quick, f"{data}-inference-{name}")
            assert own == base | {"ema_residual": residual}
            said = float(re.search("mu_I = ([^,]+),", cells(TractEMA, quick)[f"{data}-inference-{name}"].note)[1])
            assert said == pytest.approx(residual ** (2 / TOTAL[quick]), rel=1e-4)


def used_up_to(kind, quick, place):
    """Updates when the student of so many steps is there; those that a student's own teacher has taken count too."""
    cell = cells(kind, quick)[place.cell]
    schedule = cell.changes["schedule"]
    own = Fraction(cell.changes["steps"] * schedule.index(place.steps), len(schedule) - 1)
    return own + sum(used_up_to(kind, quick, Place(before, schedule[0])) for before in cell.uses[:-1])


@pytest.mark.parametrize(("kind", "quick"), FORMS)
def test_students_that_are_compared_have_equal_updates_and_batches(kind, quick):
    for text, (a, b, differ, _) in expected(kind, quick).items():
        if differ is None:
            continue
        own = [cells(kind, quick)[place.cell].changes for place in (a, b)]
        assert own[0]["training.batch_size"] == own[1]["training.batch_size"], text
        if " updates a phase:" in text:
            assert {Fraction(said["steps"], len(said["schedule"]) - 1) for said in own} == {EACH[quick]}, text
        else:
            total = re.search(r" (\d+) updates", text)
            updates = {used_up_to(kind, quick, place) for place in (a, b)}
            assert len(updates) == 1, text
            assert total is None or updates == {int(total[1])}, text


@pytest.mark.parametrize("quick", [0, 1])
def test_updates_on_the_way_to_a_few_steps(quick):
    for data, budgets in (QUICK if quick else BUDGETS).items():
        main = budgets[-1]
        assert used_up_to(Tract, quick, Place(f"{data}-tract-2-average-{main}", 32)) == Fraction(main, 2)
        for count, share in SHARES.items():
            name = f"{data}-tract-2-to-{count}-{main}"
            cell = cells(Tract, quick)[name]
            used = used_up_to(Tract, quick, Place(name, count))
            assert used == Fraction(main, 2) + cell.changes["steps"] == round(share * main)
            assert used == used_up_to(Tract, quick, Place(f"{data}-btd-average-{main}", count))
            assert cell.changes["schedule"] == [32, count]
            assert f" {used} updates" in cell.note


# ---------------------------------------------------------------------------------------------------------- the plans


def stand_in(data):
    """A few items of the data's size; configurations need no more."""
    draw = torch.Generator().manual_seed(0)
    if data == "checkerboard":
        spec = DataSpec(kind="points", shape=(2,), range=None, levels=None, shift=(0.0, 0.0), scale=(2.0, 2.0))
        items = torch.randn(64, 2, generator=draw)
    else:
        side, top = {"digits": (8, 16), "fashion-mnist": (28, 255)}[data]
        half = (top / 2,)
        spec = DataSpec(kind="image", shape=(1, side, side), range=(0, top), levels=top + 1, shift=half, scale=half)
        items = torch.randint(0, top + 1, (64, 1, side, side), generator=draw).to(torch.uint8)
    labels = torch.arange(64) % 10
    return Dataset(SOURCES[data], spec.replace(num_classes=10), items, items[:8], "none", labels, labels[:8])


@lru_cache
def planned(kind, quick):
    """What is decided of each cell before anything is trained: a run's configuration, or a distillation's plan.

    Of points, in the study that has other data too, in the quick form alone.
    """
    datasets, made, configs = {data: stand_in(data) for data in SOURCES}, {}, {}
    for name, cell in cells(kind, quick).items():
        (data,) = (data for data in SOURCES if name.startswith(data))
        if kind is Tract and data == "checkerboard" and not quick:
            continue
        if not cell.uses:
            config = recipe(cell.method, DataConfig(source=cell.data), datasets[data], 0, cell.changes)
            made[name] = configs[name] = checked(config)
        else:
            parent = Parent(folder=cell.uses[0], sha256="0" * 64)
            made[name] = plan(configs[cell.uses[0]], parent, cell.method, cell.changes)
            configs[name] = made[name].result()
    return made


@pytest.mark.parametrize(("kind", "quick"), FORMS)
def test_all_else_of_the_students_is_equal(kind, quick):
    for name, own in planned(kind, quick).items():
        cell = cells(kind, quick)[name]
        if not cell.uses:
            continue
        lengths = [phase.training.steps for phase in own.phases]
        assert sum(lengths) == cell.changes["steps"]
        assert max(lengths) - min(lengths) <= 1
        assert own.warm_start
        for phase, method, length in zip(own.phases, own.methods, lengths, strict=True):
            training = phase.training
            assert (training.lr, training.warmup, training.precision) == (1e-3, length // 20, "fp32")
            assert (training.clip_grad, training.weight_decay) == (1.0, 0.0)
            assert training.ema == pytest.approx(cell.changes["ema_residual"] ** (1 / length))
            assert method.weight == ("v" if "edm" in name else "truncated-snr")
            if cell.method == "tract":
                assert method.ema_self == cell.changes.get("ema_self", 0.5)
            assert method.solver == ("heun" if "edm" in name and phase is own.phases[0] else "ddim")
            # Points have no range.
            assert method.clip == ("edm" not in name and "checkerboard" not in name)


@pytest.mark.parametrize(("kind", "quick"), FORMS)
def test_teachers(kind, quick):
    made = planned(kind, quick)
    for name in made:
        if name.endswith("-teacher"):
            method = made[name].method
            assert (method.kind, method.schedule.kind, method.parametrization.kind) == ("ddpm", "trig", "v")
        elif name.endswith("-edm"):
            teacher = made[name.replace("-edm", "-teacher")]
            assert made[name].method.kind == "edm"
            assert made[name].method.network == teacher.method.network
            assert made[name].training == teacher.training


@pytest.mark.parametrize(("kind", "name"), [(Tract, "tract"), (TractPhases, "tract-phases"), (TractEMA, "tract-ema")])
def test_the_studies_are_found_by_name(kind, name):
    assert STUDIES.resolve(name) is kind


# ---------------------------------------------------------------------------------------------------------- measuring


class Stand:
    """Stands for a model; its samples are the number of steps that they were asked for in."""

    def __init__(self):
        self.asked = []

    def sample(self, n, **sampling):
        self.asked.append({"n": n, **sampling})
        return SimpleNamespace(data=torch.full((n, 2), float(sampling["num_steps"])), nfe=7, seconds=n / 8)


@pytest.mark.parametrize(("kind", "quick"), FORMS)
def test_rows_are_measured_as_their_labels_say(kind, quick, monkeypatch, tmp_path):
    scored, floor = [], 0.5 if quick else None

    def score(samples, dataset, *, seed, metrics):
        scored.append((len(samples), dataset, seed, metrics))
        return [SimpleNamespace(value=-0.25 * float(samples[0, 0]), floor=floor)]

    monkeypatch.setattr(few_steps, "score_samples", score)
    dataset = SimpleNamespace(
        spec=DataSpec(kind="points", shape=(2,), range=None, levels=None, shift=(1.0, 1.0), scale=(2.0, 2.0))
    )
    runs = {}
    for index, (name, cell) in enumerate(cells(kind, quick).items()):
        # Each with seconds of its own; the phase is the one to 32 steps where another student goes on from there.
        lines = [{"step": 1, "seconds": 2.0**-index, "phase": 1}, {"step": 2, "validation_loss": 1.0, "phase": 1}]
        folder = tmp_path / name
        folder.mkdir()
        config = SimpleNamespace(method=SimpleNamespace(num_steps=1024, grids=[32, 1]))
        runs[name] = SimpleNamespace(
            folder=folder, metrics=lambda lines=lines: lines, seconds=2.0**-index, config=config
        )
        scored.clear()
        model = Stand()
        trained = SimpleNamespace(
            cell=cell, seed=5, dataset=dataset, run=runs[name], model=model, of={u: runs[u] for u in cell.uses}.get
        )
        rows = kind(bool(quick)).measure(trained)

        counts, n, paired = steps_of(kind, bool(quick))[name], cell.settings["n"], cell.settings["paired"]
        assert [row.labels for row in rows] == [{"steps": count} for count in counts]
        sampling = cell.settings.get("sampling", {})
        first = [{"n": paired, "seed": 5, **sampling}] if sampling else []
        assert model.asked == first + [{"n": n, "seed": 5, **sampling, "num_steps": count} for count in counts]
        assert scored == [(n, dataset, 5, [cell.settings["metric"]])] * len(counts)
        scale, full = 1000 if "checkerboard" in name else 1, 40 if "edm" in name else 1024
        before = cell.uses[:-1]
        assert len(before) == ("-to-" in name)
        for row, count in zip(rows, counts, strict=True):
            assert row.values == {
                "score": -0.25 * scale * count,
                "score_real": scale * (floor or 0.0),
                "rmse": (full - count) / 2,
                "nfe": 7.0,
                "seconds_per_sample": 0.125,
                "training_seconds": sum(runs[own].seconds for own in (name, *before)),
            }
        assert (folder / "full.safetensors").is_file() == bool(sampling)


def test_the_rows_of_a_teacher_in_full_are_no_distance_away():
    for kind in KINDS:
        for name, cell in cells(kind, 0).items():
            if not cell.uses and "fashion" not in name:
                assert cell.settings["counts"][-1] == cell.settings["sampling"]["num_steps"]


class School(FewSteps):
    """A teacher of eight steps."""

    title, source, full = "A school", "nowhere", 8

    def cells(self):
        teacher = self.teacher("checkerboard", (1, 4, 8))
        short = {"training.validation_items": 64, "training.preview_samples": 4}
        few = {"schedule": [8, 4], "steps": 2, "ema_residual": 0.0, **short}
        made = [
            dataclasses.replace(teacher, changes={**teacher.changes, "training.steps": 2, **short}),
            self.student("checkerboard", "few", "tract", few, (4,), "few"),
            self.student("checkerboard", "two", "btd", few | {"schedule": [4, 2]}, (2,), "two", "few", "teacher"),
        ]
        # Fewer are compared with the teacher than scored, as of Fashion-MNIST.
        return [dataclasses.replace(cell, settings={**cell.settings, "n": 48, "paired": 16}) for cell in made]

    def claims(self):
        return []


def test_a_real_teacher_and_its_students(tmp_path):
    study, runs, models, rows = School(quick=True), {}, {}, {}
    dataset = DataConfig(source="toy:checkerboard", num_points=400).load()
    for index, cell in enumerate(study.cells()):
        if not cell.uses:
            data = DataConfig(source=cell.data, num_points=400)
            run = osmose.train(cell.method, data, tmp_path / cell.name, progress=False, **cell.changes)
        else:
            used = runs[cell.uses[0]]
            run = osmose.distill(used, tmp_path / cell.name, method=cell.method, progress=False, **cell.changes)
        run.log({"step": 5, "phase": 1, "seconds": (1e6, 1e4, 100.0)[index]})
        runs[cell.name], models[cell.name] = run, run.model()
        used = {name: runs[name] for name in cell.uses}
        made = study.measure(Trained(cell, 3, dataset, torch.device("cpu"), run, used))
        rows[cell.name] = {row.labels["steps"]: row.values for row in made}

    teacher, few, two = (f"checkerboard-{name}" for name in ("teacher", "few", "two"))
    full = models[teacher].sample(16, seed=3, num_steps=8, solver="ddim").data
    assert torch.equal(read_tensors(runs[teacher].folder / "full.safetensors")["samples"], full)
    assert [list(rows[name]) for name in (teacher, few, two)] == [[1, 4, 8], [4], [2]]
    for name in (teacher, few, two):
        how = {"solver": "ddim"} if name == teacher else {}
        for count, values in rows[name].items():
            samples = models[name].sample(48, seed=3, num_steps=count, **how).data
            (score,) = score_samples(samples, dataset, seed=3, metrics=["energy"])
            apart = (dataset.spec.encode(samples[:16]) - dataset.spec.encode(full)).square().mean().sqrt()
            known = {"score": 1000 * score.value, "score_real": 1000 * score.floor, "nfe": count}
            assert {key: values[key] for key in known} == pytest.approx(known, rel=1e-5)
            if (name, count) == (teacher, 8):
                assert values["rmse"] == pytest.approx(0, abs=1e-5)
            else:
                assert values["rmse"] == pytest.approx(float(apart), rel=1e-5)
                assert values["rmse"] > 1e-3
            assert values["training_seconds"] == pytest.approx({teacher: 1e6, few: 1e4, two: 1e4 + 100}[name], abs=50)
            assert values["seconds_per_sample"] > 0


def test_seconds_are_those_of_the_updates_that_were_used(monkeypatch, tmp_path):
    """Of tract-2-average only the first phase is on the way to eight steps."""
    score = SimpleNamespace(value=1.0, floor=1.0)
    monkeypatch.setattr(few_steps, "score_samples", lambda *_, **__: [score])
    monkeypatch.setattr(few_steps, "paired_rmse", lambda *_: 1.0)
    monkeypatch.setattr(few_steps.files, "read_tensors", lambda _: {"samples": torch.zeros(4, 2)})
    cell = cells(Tract, 0)["digits-tract-2-to-8-2000"]
    both = [{"step": 1000, "phase": 1, "seconds": 10.0}, {"step": 2000, "phase": 2, "seconds": 100.0}]
    config = SimpleNamespace(method=SimpleNamespace(num_steps=1024, grids=[32, 1]))
    before = SimpleNamespace(folder=tmp_path, metrics=lambda: both, config=config)
    own = SimpleNamespace(folder=tmp_path, metrics=lambda: [{"step": 400, "phase": 1, "seconds": 4.0}])
    trained = SimpleNamespace(
        cell=cell, seed=0, run=own, model=Stand(), of=lambda _: before, dataset=SimpleNamespace(spec=None)
    )
    (row,) = Tract().measure(trained)
    assert row.values["training_seconds"] == 14


# ------------------------------------------------------------------------------------------------ tables and figures


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize(("kind", "quick"), FORMS)
def test_tables(kind, quick, others):
    seeds = 1 if quick else 3
    results = world(kind, quick=quick, others=others, seeds=seeds)
    tables = kind(bool(quick)).tables(results)
    wanted = {}
    for data in SOURCES:
        lines = [
            {
                "configuration": cell.removeprefix(f"{data}-"),
                "steps": str(count),
                "energy x 1000" if data == "checkerboard" else "fd_clf": mean_and_spread(value("score")),
                "RMSE to the teacher": mean_and_spread(value("rmse")),
                "nfe": f"{value('nfe').mean():g}",
                "ms a sample": f"{1000 * value('seconds_per_sample').mean():.3g}",
                "training, s": f"{value('training_seconds').mean():.0f}" if count == min(counts) else "",
            }
            for cell, counts in steps_of(kind, bool(quick)).items()
            if cell.startswith(data)
            for count in counts
            for value in [lambda metric, cell=cell, count=count: results.values(cell, metric, steps=count)]
        ]
        if lines:
            floor = mean_and_spread(results.values(f"{data}-teacher", "score_real", steps=1))
            wanted[f"{data} (real data: {floor})"] = lines
    assert tables == wanted


LINES = {
    "teacher": {"teacher": (1, 2, 4, 8, 32, 128, 1024)},
    "btd, decay": {"btd-decay-{}": (1, 2, 4, 8)},
    "btd, average": {"btd-average-{}": (1, 2, 4, 8)},
    "TRACT, two phases, average": {
        "tract-2-average-{}": (1, 32), "tract-2-to-2-{}": (2,), "tract-2-to-4-{}": (4,), "tract-2-to-8-{}": (8,)
    },
    "TRACT, one phase": {"tract-1-average-{}": (1,)},
    "btd from 64 steps": {"64-btd-both-{}": (1, 2, 4, 8)},
    "TRACT from 64 steps": {"64-tract-2-both-{}": (1, 8)},
}  # fmt: skip


def drawn(panel):
    """The lines of a panel that have a name, without seeds."""
    lines = {line.get_label(): line for line in panel.lines if not line.get_label().startswith("_")}
    return {name: (list(line.get_xdata()), list(line.get_ydata())) for name, line in lines.items()}


@pytest.mark.parametrize("quick", [0, 1])
def test_the_figures_of_tract(quick):
    gone = Place("checkerboard-teacher", 32)
    for values in ({}, {gone: -0.5}):
        results = world(Tract, values, quick)
        figures = Tract(bool(quick)).figures(results)
        budgets = QUICK if quick else BUDGETS
        assert list(figures) == [f"{data}-score-against-steps" for data in budgets]
        for (data, own), figure in zip(budgets.items(), figures.values(), strict=True):
            for panel, metric in zip(figure.axes, ("score", "rmse"), strict=True):
                lines = drawn(panel)
                if metric == "score":
                    floor = results.values(f"{data}-teacher", "score_real", steps=1).mean()
                    assert lines.pop("real data")[1] == pytest.approx([floor, floor])
                wanted = [name for name in LINES if data != "fashion-mnist" or "from 64" not in name]
                assert list(lines) == wanted
                for name in wanted:
                    means = {
                        count: results.values(cell, metric, steps=count).mean()
                        for part, counts in LINES[name].items()
                        for cell in [f"{data}-{part.format(own[-1])}"]
                        for count in counts
                        if count in steps_of(Tract, bool(quick))[cell] and (Place(cell, count, metric) not in values)
                    }
                    assert lines[name][0] == sorted(means)
                    assert lines[name][1] == pytest.approx([means[count] for count in sorted(means)])


@pytest.mark.parametrize("quick", [0, 1])
def test_the_figure_of_the_phases(quick):
    results = world(TractPhases, quick=quick)
    (figure,) = TractPhases(bool(quick)).figures(results).values()
    for data, panel in zip(SMALL, figure.axes, strict=True):

        def score(name, data=data):
            return results.values(f"{data}-{name}", "score", steps=1).mean()

        lines = drawn(panel)
        for way, text in (("total", f"{TOTAL[quick]} updates in all"), ("each", f"{EACH[quick]} updates a phase")):
            assert lines.pop(text) == (list(SCHEDULES), pytest.approx([score(f"{way}-{p}") for p in SCHEDULES]))
        assert lines == {"btd, in all": ([10], pytest.approx([score("total-btd")]))}
        assert panel.get_title().startswith(data)


@pytest.mark.parametrize("quick", [0, 1])
def test_the_figure_of_the_averages(quick):
    results = world(TractEMA, quick=quick)
    (figure,) = TractEMA(bool(quick)).figures(results).values()
    own = [f"self-{decay}" for decay in SELF], ["inference-0", "inference-1e-06", "self-0.5", "inference-0.1"]
    ticks = SELF, ("0", "1e-06", "0.001", "0.1")
    for names, said, panel in zip(own, ticks, figure.axes, strict=True):
        assert [tick.get_text() for tick in panel.get_xticklabels()] == list(said)
        assert drawn(panel) == {
            data: (
                list(range(len(names))),
                pytest.approx([results.values(f"{data}-{name}", "score", steps=1).mean() for name in names]),
            )
            for data in SMALL
        }


@pytest.mark.filterwarnings("ignore:Data has no positive values")
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_made_of_negative_scores_too(kind, every):
    """Of energy distances some may be negative, or all."""
    rows = steps_of(kind, True)
    given = {Place(cell, count): -0.5 for cell in itertools.islice(rows, 0, None, every) for count in rows[cell]}
    for figure in kind(quick=True).figures(world(kind, given, True, seeds=1)).values():
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=30)
        assert file.getbuffer().nbytes > 1000
        assert all(0 < limit < math.inf for panel in figure.axes for limit in panel.get_ylim())
