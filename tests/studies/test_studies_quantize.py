"""The studies of quantization and of accelerations put together: what their quick forms measure, what claims name."""

import pytest

from osmose.studies.compose import COMPOSED, Compose
from osmose.studies.quantize import PLACES, QuantizeStudy


def quantize_measures(results):
    """The quick form's rows, which `test_studies_processes` has run."""
    rows = {(row["cell"], row["labels"].get("fp32", "")): row["values"] for row in results["rows"]}
    assert rows["real", ""]["deviation"]["mean"] == 0
    assert 0 < rows["bf16", ""]["deviation"]["mean"] < rows["six", ""]["deviation"]["mean"]
    assert [rows["steps", place]["steps"]["mean"] for place in PLACES[:5]] == [0, 4, 4, 4, 4]
    assert rows["steps", "none"]["deviation"]["mean"] > rows["steps", "worst 4"]["deviation"]["mean"]
    assert results["claims"][0]["verdict"] == "reproduced"  # sizes are facts


def compose_measures(results):
    """As `quantize_measures`."""
    rows = {(row["cell"], row["labels"]["with_"]): row["values"] for row in results["rows"]}
    whiches = {name: ("neither", "first", "second", "both", *(["runtime"] * (name != "blocks"))) for name in COMPOSED}
    assert set(rows) == {(name, which) for name, own in whiches.items() for which in own}
    assert rows["tract", "neither"]["nfe"]["mean"] == 6
    assert rows["tract", "both"]["nfe"]["mean"] == 1
    assert rows["blocks", "both"]["nfe"]["mean"] == 4
    assert rows["surrogate", "first"]["nfe"]["mean"] < rows["surrogate", "neither"]["nfe"]["mean"]
    assert {claim["verdict"] for claim in results["claims"]} == {"inconclusive"}


@pytest.mark.parametrize("kind", [QuantizeStudy, Compose])
def test_claims_name_cells_that_there_are(kind):
    for quick in (False, True):
        study = kind(quick)
        names = {cell.name for cell in study.cells()}
        assert all(set(claim.cells) <= names for claim in study.claims())
        assert all(set(cell.uses) <= names for cell in study.cells())
