"""The code on the pages runs."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from osmose.configuration import Entry
from osmose.methods import METHODS
from osmose.studies import STUDIES

ROOT = Path(__file__).parent.parent


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


def test_the_readme_s_ten_lines(tmp_path, monkeypatch, capsys):
    (code,) = blocks("README.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    quick = code.replace('"steps": 1500', '"steps": 4, "preview_samples": 4, "validation_items": 8')
    quick = quick.replace("sample(500, seed=1)", "sample(100, num_steps=2, seed=1)")
    quick = quick.replace("num_steps=18", "num_steps=2")
    assert quick != code, "the page's numbers have changed: shorten the new ones here"
    exec(compile(quick, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "torch.Size([64, 1, 8, 8]) 3" in out
    assert "fd_clf" in out


def test_a_method_is_one_file_and_one_line(tmp_path, monkeypatch):
    module, line = blocks("CONTRIBUTING.md")
    file = tmp_path / "mean.py"
    file.write_text(module)
    spec = importlib.util.spec_from_file_location("osmose.methods.mean", file)
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "osmose.methods.mean", loaded)
    spec.loader.exec_module(loaded)
    kind, (target, summary) = next(iter(eval("{" + line + "}").items()))
    monkeypatch.setitem(METHODS.entries, kind, type(METHODS.entries["ddpm"])(target, summary))

    from osmose.cli.main import main

    run = str(tmp_path / "run")
    main(["train", "mean", "--data", "digits", "--out", run, "--steps", "40", "--lr", "0.1", "--quiet"])
    main(["sample", run, "-n", "4", "--out", str(tmp_path / "mean.png")])
    main(["evaluate", run, "-n", "100", "--quiet"])
    assert (tmp_path / "mean.png").stat().st_size > 0
    assert (tmp_path / "run" / "evaluation.json").is_file()


def test_a_study_is_one_file_and_one_line(tmp_path, monkeypatch):
    (code,) = blocks("docs/studies.md")
    file = tmp_path / "width.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("osmose.studies.width", file)
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "osmose.studies.width", loaded)
    spec.loader.exec_module(loaded)
    monkeypatch.setitem(STUDIES.entries, "width", Entry("osmose.studies.width:Width", "widths"))

    from osmose.cli.main import main

    main(["study", "width", "--quick", "--jobs", "1", "--quiet", "--out", str(tmp_path / "out")])
    assert "128 units score lower than 32" in (tmp_path / "out" / "README.md").read_text()


PAGES = ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
