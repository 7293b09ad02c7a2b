"""The study of blocks: its quick form through the library, and cells that are trained in blocks."""

import json

import pytest

from osmose.acceleration.blocks import Blocks
from osmose.studies.blocks import BlocksStudy, exact_rows
from osmose.studies.running import run_study


def test_the_quick_form_and_that_it_goes_on(tmp_path):
    outcome = run_study("blocks", tmp_path / "study", quick=True, progress=False)
    assert not outcome.failures
    values = outcome.results
    assert [claim["verdict"] for claim in values["claims"]] == ["inconclusive"] * 2  # one seed decides nothing
    plan = Blocks.open(tmp_path / "study" / "runs" / "b2-0").plan
    assert (plan.count, plan.whole.training.steps, plan.overlap) == (2, 6, 0.05)
    rows = {row["cell"]: row["values"] for row in values["rows"] if row["labels"].get("grid") == "training"}
    assert rows["b1"]["passes"]["mean"] == 2 * rows["b2"]["passes"]["mean"] == 16
    assert 0.5 < rows["b2"]["bytes"]["mean"] / rows["b1"]["bytes"]["mean"] < 0.65
    assert (tmp_path / "study" / "blocks.png").is_file()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / "measurements").iterdir()}
    run_study("blocks", tmp_path / "study", quick=True, progress=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / "measurements").iterdir()} == before
    # Of another plan it is trained again.
    path = tmp_path / "study" / "runs" / "b2-0" / "blocks.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"overlap": 0.2}))
    (tmp_path / "study" / "measurements" / "b2-0.json").unlink()
    assert not run_study("blocks", tmp_path / "study", quick=True, progress=False).failures
    assert Blocks.open(tmp_path / "study" / "runs" / "b2-0").plan.overlap == 0.05


def test_the_printed_sign_is_wrong():
    begin, right, printed = (row.values["left"] for row in exact_rows(50))
    assert begin == pytest.approx(80)
    assert right == pytest.approx(0, abs=1e-12)
    assert printed > 1e5
    # From sigma = 2 a step to 1 ends at 3.
    assert 2 * (1 + (2 - 1) / 2) == 3


def test_all_cells_can_be_cut_and_all_claims_name_them():
    study = BlocksStudy()
    names = {cell.name for cell in study.cells()}
    assert all(set(claim.cells) <= names for claim in study.claims())
    assert {f"b{count}" for count in (1, 2, 3, 4, 6)} < names
