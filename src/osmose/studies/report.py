"""A study's report: results.json for machines, README.md for people, pictures."""

from __future__ import annotations

import datetime
import inspect
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import osmose
from osmose.data.dataset import DataConfig
from osmose.studies.progress import duration
from osmose.studies.study import Cell, Results, Study
from osmose.training import files
from osmose.training.run import versions

#: Data that need no files: the others are looked for under --data-root.
_ALWAYS_THERE = ("digits", "toy")


def write_report(
    study: Study,
    name: str,
    folder: Path,
    cells: Sequence[Cell],
    results: Results,
    measured: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, Any], list[Path]]:
    """Write results.json, README.md and the figures.

    Args:
        study: what was studied.
        name: what it is called on the command line.
        folder: where to write.
        cells: its configurations.
        results: all rows.
        measured: the content of every measurement file.

    Returns:
        The content of results.json, and the paths written.
    """
    command = f"osmose study {name}{' --quick' if study.quick else ''}"
    if any(_source(cell) not in _ALWAYS_THERE for cell in cells):
        command += " --data-root ROOT"
    command += f" --out studies/{name}{'-quick' if study.quick else ''}"
    values = {
        "study": name,
        "title": study.title,
        "source": study.source,
        "form": "quick" if study.quick else "full",
        "command": command,
        "seeds": list(results.seeds),
        "claims": _claims(study, results),
        "rows": _rows(results),
        "cells": [_cell(cell, [m for m in measured if m["cell"] == cell.name]) for cell in cells],
        "cpu_seconds": round(sum(m[part]["cpu_seconds"] for m in measured for part in ("training", "measuring")), 1),
        "resumed": sum(m["training"]["from_step"] > 0 for m in measured),
        "machine": _machine(sorted({str(m["device"]) for m in measured})),
        "versions": versions(),
        "commits": {"cells": sorted({m["commit"] for m in measured}, key=str), "report": commit()},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    paths = [folder / "results.json", folder / "README.md"]
    pictures = study.figures(results)
    for stem, figure in pictures.items():
        paths.append(folder / f"{stem}.png")
        files.write_figure(paths[-1], figure)
    files.write_bytes(paths[1], _markdown(study, values, study.tables(results), list(pictures)).encode())
    files.write_json(paths[0], values)
    return values, paths


def _claims(study: Study, results: Results) -> list[dict[str, Any]]:
    found = []
    for claim in study.claims():
        if set(claim.cells) <= set(results.rows):
            finding = claim.check(results)
            found.append(
                {"claim": claim.text, "verdict": finding.verdict, "evidence": finding.evidence, "cells": [*claim.cells]}
            )
    return found


def _rows(results: Results) -> list[dict[str, Any]]:
    return [
        {"cell": cell, "labels": labels, "values": {metric: _summary(values) for metric, values in metrics.items()}}
        for cell in results.rows
        for labels, metrics in results.groups(cell)
    ]


def _summary(values: np.ndarray) -> dict[str, Any]:
    std = _short(values.std(ddof=1)) if len(values) > 1 else None
    return {"mean": _short(values.mean()), "std": std, "per_seed": [_short(value) for value in values]}


def _short(value: float) -> float:
    """Six digits; of a count all of them."""
    value = float(value)
    return value if value.is_integer() else float(f"{value:.6g}")


def _cell(cell: Cell, measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "name": cell.name,
        "note": cell.note,
        "method": cell.method,
        "data": _data(cell),
        "uses": list(cell.uses),
        "changes": dict(cell.changes),
        "settings": dict(cell.settings),
        "config": f"configs/{cell.name}.json",
        "cpu_seconds": {
            part: round(sum(m[part]["cpu_seconds"] for m in measured), 1) for part in ("training", "measuring")
        },
    }


def _data(cell: Cell) -> str:
    if isinstance(cell.data, str):
        return cell.data
    small = f", downsample={cell.data.downsample}" if cell.data.downsample else ""
    kind, _, place = cell.data.source.partition(":")  # a table that a study made lies in the temporary folder
    return f"{kind}:{Path(place).name}{small}" if place.startswith("/") else f"{cell.data.source}{small}"


def _source(cell: Cell) -> str:
    data = cell.data.source if isinstance(cell.data, DataConfig) else cell.data
    return data.partition(":")[0]


def _machine(devices: Sequence[str]) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    processor = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads_per_cell": 1,
        "devices": list(devices),
    }


def commit() -> str | None:
    """The commit of the checkout that holds this package, with a word on changes since, or None outside of one."""
    source = Path(osmose.__file__).parent

    def git(*words: str) -> str | None:
        try:
            said = subprocess.run(
                ["git", "--no-optional-locks", "-C", str(source), *words], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return said.stdout.strip() if said.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:  # installed, perhaps into another project's checkout
        return None
    head = git("rev-parse", "HEAD")
    return f"{head} with uncommitted changes" if head and git("status", "--porcelain", "--", ".") else head


def _markdown(study: Study, values: Mapping[str, Any], tables: Mapping[str, Any], pictures: Sequence[str]) -> str:
    seeds = values["seeds"]
    lines = [f"# {study.title}", ""]
    if study.quick:
        lines += ["> **Quick form.** It shows that the machinery runs; its numbers prove nothing.", ""]
    lines += [inspect.getdoc(study) or "", "", f"Source: {study.source}", "", "## Claims", ""]
    verdicts = Counter(claim["verdict"] for claim in values["claims"])
    lines += [f"{', '.join(f'{count} {verdict}' for verdict, count in verdicts.items())}.", ""]
    lines += _table(
        [
            {
                "verdict": f"**{claim['verdict']}**",
                "claim": claim["claim"],
                "evidence": claim["evidence"],
                "configurations": ", ".join(f"[{cell}](configs/{cell}.json)" for cell in claim["cells"]),
            }
            for claim in values["claims"]
        ]
    )
    lines += [
        "",
        "Verdicts rest on the differences seed by seed: *reproduced* means that their whole 95 % interval (Student's "
        "t) is on the claimed side, *not reproduced* that it is on the other, *inconclusive* that it is on both. "
        '"A against B" is of a claim that A is below B, or, where a difference is allowed, that they are that near.',
    ]
    for picture in pictures:
        lines += ["", f"![{picture.replace('-', ' ').replace('_', ' ')}]({picture}.png)"]
    for heading, rows in tables.items():
        lines += ["", f"## {heading}", "", *_table(rows)]
    count = f"Mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "One seed"
    lines += ["", f"{count}.", "", "## Configurations", ""]
    trained = [cell["changes"] for cell in values["cells"] if cell["method"]]
    shared = {
        name: value
        for name, value in (trained[0] if trained else {}).items()
        if all(value == c.get(name) for c in trained)
    }
    if shared:
        lines += [f"Instead of the recipe, all have {_listed(shared)}.", ""]
    lines += _table([_described(cell, shared) for cell in values["cells"]])
    first = values["cells"][0]["name"]
    command = values["command"]
    lines += ["", "## Run it again", "", f"    {command}", "", "one configuration, one seed:", ""]
    lines += [f"    {command} --only {first}/{seeds[0]}", ""]
    return "\n".join([*lines, *_made(values)]) + "\n"


def _described(cell: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, str]:
    """A cell as a row of a table; nested settings are left to results.json."""
    own = {name: value for name, value in cell["changes"].items() if name not in shared}
    settings = {name: value for name, value in cell["settings"].items() if not isinstance(value, dict | list | tuple)}
    trained = f"{cell['method']} on {cell['data']}" if cell["method"] else f"nothing ({cell['data']})"
    return {
        "configuration": f"[{cell['name']}]({cell['config']})",
        "trained": trained + "".join(f"; uses {name}" for name in cell["uses"]),
        "instead of the recipe": _listed(own),
        "measured with": _listed(settings),
        "note": cell["note"],
        "CPU seconds": f"{sum(cell['cpu_seconds'].values()):.0f}",
    }


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in values.items())


def _made(values: Mapping[str, Any]) -> list[str]:
    machine = values["machine"]
    resumed = f" ({values['resumed']} runs were interrupted: of these only the last part)" if values["resumed"] else ""
    return [
        f"{duration(values['cpu_seconds'])} of CPU time in all{resumed}, one thread for each configuration and seed, "
        f"on {machine['processor']} ({machine['cores']} cores), device {', '.join(machine['devices'])}; seeds "
        f"{', '.join(map(str, values['seeds']))}; {', '.join(f'{k} {v}' for k, v in values['versions'].items())}; "
        f"{_commits(values['commits'])}; {values['date']}. All numbers are in [results.json](results.json)."
    ]


def _commits(known: Mapping[str, Any]) -> str:
    cells = [commit for commit in known["cells"] if commit is not None]
    said = f"commit {', '.join(cells)}" if cells else "measured with a copy of the code outside of a checkout"
    return said if known["report"] is None or cells == [known["report"]] else f"{said}, reported at {known['report']}"


def _table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """A Markdown table; columns that are empty throughout are left out."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if any(row.get(name) for row in rows)]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(names), f"|{'---|' * len(names)}", *(line([row.get(name, "") for name in names]) for row in rows)]
