"""The studies of few steps: what each claim reads and decides, on numbers made up, and the cells that they need."""

import pytest

from osmose.studies import STUDIES
from osmose.studies.planning import cells_of
from osmose.studies.study import Results, Row

NAMES = ("few-step", "scm-ablation", "dsno-ablation")
#: What seeds have in common: of two values that differ in every seed alike, a claim is decided.
FACTORS = (1.0, 1.25, 0.75)
METRICS = ("score", "rmse", "rmse_train", "rmse_path", "diverged", "score_real", "nfe", "seconds_per_sample",
           "training_seconds")  # fmt: skip
EQUAL = 5.0


def rows_of(cell, value, only=None):
    """Rows as the study would measure them, with one value in all metrics, and of recall what is as good."""
    settings = cell.settings
    solvers = {"ddim": settings["counts"], **settings["solvers"]} if settings.get("solvers") else {}
    labels = [{"steps": n, "solver": name} for name, counts in solvers.items() for n in counts]
    labels = labels or [{"steps": n} for n in settings["counts"]]
    rows = []
    for factor in FACTORS:
        own = []
        for label in labels:
            here = factor * (value if only is None or label["steps"] == only else EQUAL)
            values = dict.fromkeys(METRICS, here)
            values |= dict.fromkeys(settings.get("more", ()), factor**2 * EQUAL**2 / here)
            own.append(Row(label, values))
        rows.append(own)
    return rows


def results(study, cell=None, value=EQUAL, only=None):
    made = {
        c.name: rows_of(c, value if c.name == cell else EQUAL, only if c.name == cell else None) for c in study.cells()
    }
    return Results((0, 1, 2), made)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_cells_fit_each_other_and_the_claims(name, quick):
    study = STUDIES.resolve(name)(quick)
    cells = cells_of(study)
    assert {cell.name.split("-")[0] for cell in cells} == (
        {"checkerboard"} if quick else {"checkerboard", "digits", "fashion"}
    )
    for cell in cells:
        if cell.starts_from:
            steps = cell.changes["steps"]
            alike = [c.changes["steps"] for c in cells if c.starts_from and c.data == cell.data]
            assert set(alike) == {steps}  # equal updates on each data set


@pytest.mark.parametrize("name", NAMES)
def test_every_claim_is_decided_by_the_first_of_its_cells(name):
    """A claim holds if its first cell is better, and does not if that is worse."""
    study = STUDIES.resolve(name)(False)
    claims = study.claims()
    assert len({claim.text for claim in claims}) == len(claims) > 10
    for claim in claims:
        only = 2 if len(claim.cells) == 1 else None  # of one cell two steps are held against one
        better, worse = (results(study, claim.cells[0], value, only) for value in (EQUAL / 10, EQUAL * 10))
        assert claim.check(better).verdict == "reproduced", claim.text
        assert claim.check(worse).verdict == "not reproduced", claim.text
        assert claim.text.split(",")[0].split(":")[0] in {"checkerboard", "digits", "fashion-mnist"}


@pytest.mark.parametrize("name", NAMES)
def test_equal_cells_are_not_better(name):
    """Ten per cent are allowed where the text says so, and nothing else."""
    study = STUDIES.resolve(name)(False)
    found = results(study)
    for claim in study.claims():
        lenient = "10 %" in claim.text or "90 %" in claim.text
        assert claim.check(found).verdict == ("reproduced" if lenient else "not reproduced"), claim.text


@pytest.mark.parametrize("name", NAMES)
def test_tables_and_figures_show_every_row(name):
    study = STUDIES.resolve(name)(False)
    found = results(study)
    lines = [line for table in study.tables(found).values() for line in table]
    assert len(lines) == sum(len(found.groups(cell)) for cell in found.rows)
    assert study.figures(found)
