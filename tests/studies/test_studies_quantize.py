"""The studies of quantization and of accelerations put together: their quick forms, and what their claims name."""

import pytest

from osmose.studies.compose import COMPOSED, Compose
from osmose.studies.quantize import PLACES, QuantizeStudy
from osmose.studies.running import run_study


def test_the_quick_form_of_quantize(tmp_path):
    outcome = run_study("quantize", tmp_path / "study", quick=True, progress=False)
    assert not outcome.failures
    rows = {(row["cell"], row["labels"].get("fp32", "")): row["values"] for row in outcome.results["rows"]}
    assert rows["real", ""]["deviation"]["mean"] == 0
    assert 0 < rows["bf16", ""]["deviation"]["mean"] < rows["six", ""]["deviation"]["mean"]
    assert [rows["steps", place]["steps"]["mean"] for place in PLACES[:4]] == [0, 4, 4, 4]
    assert rows["steps", "none"]["deviation"]["mean"] > 0
    assert outcome.results["claims"][0]["verdict"] == "reproduced"  # sizes are facts
    assert (tmp_path / "study" / "quantize.png").is_file()


@pytest.mark.filterwarnings("default")
def test_the_quick_form_of_compose(tmp_path):
    outcome = run_study("compose", tmp_path / "study", quick=True, progress=False)
    assert not outcome.failures
    rows = {(row["cell"], row["labels"]["with_"]): row["values"] for row in outcome.results["rows"]}
    assert set(rows) == {(name, which) for name in COMPOSED for which in ("neither", "first", "second", "both")}
    assert rows["tract", "neither"]["nfe"]["mean"] == 7
    assert rows["tract", "both"]["nfe"]["mean"] == 1
    assert rows["blocks", "both"]["nfe"]["mean"] == 4
    assert rows["surrogate", "first"]["nfe"]["mean"] < rows["surrogate", "neither"]["nfe"]["mean"]
    assert {claim["verdict"] for claim in outcome.results["claims"]} == {"inconclusive"}


@pytest.mark.parametrize("kind", [QuantizeStudy, Compose])
def test_claims_name_cells_that_there_are(kind):
    for quick in (False, True):
        study = kind(quick)
        names = {cell.name for cell in study.cells()}
        assert all(set(claim.cells) <= names for claim in study.claims())
        assert all(set(cell.uses) <= names for cell in study.cells())
