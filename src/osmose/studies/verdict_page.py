"""All claims of finished studies on one page: what was claimed, what was found, and the command that shows it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from osmose.errors import UserError
from osmose.training import files

#: What stands above the table in a page is left as it is; the line that it begins with.
MARK = "<!-- verdicts: osmose verdicts -->"
_ORDER = ("reproduced", "not reproduced", "inconclusive")


def finished(folder: Path) -> list[dict[str, Any]]:
    """The results of each finished study in full form under a folder, by name.

    Raises:
        UserError: there is none.
    """
    found = []
    for path in sorted(folder.glob("*/results.json")):
        values = files.read_json(path)
        if isinstance(values, dict) and {"study", "claims", "command", "form"} <= values.keys():
            found.append(values)
    full = [values for values in found if values["form"] == "full"]
    if not full:
        raise UserError(f"{folder}: holds no finished study (NAME/results.json in full form); run osmose study NAME")
    return full


def counts(results: list[dict[str, Any]]) -> dict[str, int]:
    """How many claims have each verdict."""
    verdicts = [claim["verdict"] for values in results for claim in values["claims"]]
    return {verdict: verdicts.count(verdict) for verdict in _ORDER}


def table(results: list[dict[str, Any]], where: str = ".") -> str:
    """The page's lines: for each study what was published, its command, and a row for each claim.

    Args:
        results: see `finished`.
        where: the way from the page to the folder of the studies.
    """
    root = "" if where == "." else f"{where}/"
    total = counts(results)
    said = ", ".join(f"{number} {verdict}" for verdict, number in total.items())
    lines = [MARK, "", f"## All verdicts: {said}", ""]
    for values in results:
        own = counts([values])
        lines += [
            f"### [{values['study']}]({root}{values['study']}): {values['title']}",
            "",
            f"Theirs: {values['source']}.",
            "",
            f"`{values['command']}` ({len(values['seeds'])} seeds; "
            + ", ".join(f"{number} {verdict}" for verdict, number in own.items() if number)
            + ")",
            "",
            "| verdict | claim | ours |",
            "|---|---|---|",
        ]
        for claim in values["claims"]:
            cells = (claim["verdict"], claim["claim"], claim["evidence"])
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def write_page(folder: Path, page: Path) -> list[dict[str, Any]]:
    """Write the table of a folder's studies into a page, below what stands above the mark there.

    Raises:
        UserError: no finished study.
    """
    results = finished(folder)
    text = page.read_text() if page.is_file() else ""
    above = text.partition(MARK)[0].rstrip()
    files.write_bytes(
        page, (f"{above}\n\n" if above else "").encode() + table(results, os.path.relpath(folder, page.parent)).encode()
    )
    return results
