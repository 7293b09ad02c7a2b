"""`osmose verdicts`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from osmose.cli.command import Result


@dataclass
class Verdicts:
    """All claims of finished studies on one page: claim, what was found, verdict, and the command that shows it.

    Reads NAME/results.json of every study in full form under FOLDER, and writes the table into README.md there, below
    whatever stands above it.
    """

    folder: Annotated[Positional[Path], arg(metavar="FOLDER", help="where the studies' folders are")] = Path("studies")
    out: Annotated[Path | None, arg(metavar="FILE", help="the page; FOLDER/README.md if not given")] = None
    json: Annotated[bool, arg(help="print the result as JSON")] = False

    def run(self) -> Result:
        """Collect, write, answer."""
        from osmose.studies.verdict_page import counts, write_page

        page = self.out or self.folder / "README.md"
        results = write_page(self.folder, page)
        claims = [
            {"study": values["study"], "command": values["command"], "theirs": values["source"], **claim}
            for values in results
            for claim in values["claims"]
        ]
        total = counts(results)
        said = ", ".join(f"{number} {verdict}" for verdict, number in total.items())
        return Result(
            {"counts": total, "claims": claims, "wrote": str(page)},
            [f"{len(claims)} claims of {len(results)} studies: {said}", f"wrote {page}"],
            f"osmose study {results[0]['study']} --quick",
        )
