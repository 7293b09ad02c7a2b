"""The committed results: what the studies say of these numbers now is what was committed with them.

A full form takes an hour; its claims, tables and pictures are asked here on the numbers of the last one.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from osmose.studies import STUDIES
from osmose.studies.study import Results, Row

COMMITTED = Path(__file__).parents[2] / "studies"


@pytest.fixture(scope="module", params=sorted(path.parent.name for path in COMMITTED.glob("*/results.json")))
def committed(request):
    """A study in full, its results, and what was written about them."""
    said = json.loads((COMMITTED / request.param / "results.json").read_text())
    return STUDIES.resolve(request.param)(False), _results(said), said


class Watched(Results):
    """Results that know which cells were looked at."""

    def groups(self, cell):
        self.__dict__.setdefault("seen", set()).add(cell)
        return super().groups(cell)


def _results(said):
    rows = {row["cell"]: [[] for _ in said["seeds"]] for row in said["rows"]}
    for row in said["rows"]:
        for place, seed in enumerate(rows[row["cell"]]):
            values = {name: np.nan if v is None else v["per_seed"][place] for name, v in row["values"].items()}
            seed.append(Row(row["labels"], values))
    return Watched(tuple(said["seeds"]), rows)


def test_every_study_is_committed():
    assert {path.parent.name for path in COMMITTED.glob("*/results.json")} == set(STUDIES.entries)


def test_claims_come_to_the_verdicts_that_are_committed(committed):
    study, results, said = committed
    found = {claim.text: claim.check(results).verdict for claim in study.claims()}
    assert found == {claim["claim"]: claim["verdict"] for claim in said["claims"]}


def test_claims_look_at_the_configurations_that_they_name_and_at_all_of_these(committed):
    study, results, _ = committed
    for claim in study.claims():
        results.__dict__["seen"] = set()
        claim.check(results)
        assert results.seen == set(claim.cells), claim.text


def test_tables_and_pictures_can_be_made_of_them(committed):
    study, results, said = committed
    page = (COMMITTED / said["study"] / "README.md").read_text()
    for heading, lines in study.tables(results).items():
        assert heading in page
        assert lines
    for stem, figure in study.figures(results).items():
        assert (COMMITTED / said["study"] / f"{stem}.png").is_file()
        plt.close(figure)
