"""`osmose study`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from osmose.cli.command import Result
from osmose.studies import STUDIES

if TYPE_CHECKING:
    from osmose.studies.running import Outcome


@dataclass
class Study:
    """Run a table or figure of a paper again, and say which of its claims hold here.

    A study is a list of configurations, each run with several seeds, what is measured on them, and claims with the
    check that decides them. Only what is missing is run, so the same command continues after an interruption. The
    folder then holds README.md (verdicts with their evidence, tables, pictures), results.json, the configurations and
    the runs, which `osmose sample` and `osmose evaluate` take like any other. Without NAME the studies are listed.
    """

    name: Annotated[Positional[str | None], arg(metavar="NAME", help=f"one of: {', '.join(STUDIES.entries)}")] = None
    quick: Annotated[bool, arg(help="a short form that shows that everything works and proves nothing")] = False
    out: Annotated[
        Path | None, arg(metavar="FOLDER", help="the study's folder; studies/NAME (studies/NAME-quick) if not given")
    ] = None
    data_root: Annotated[
        Path | None, arg(help="folder that holds mnist/, fashion-mnist/ or cifar10/ ($OSMOSE_DATA_ROOT)")
    ] = None
    jobs: Annotated[
        int | None, arg(help="processes, of one thread each; one for each core if not given, one where there is a GPU")
    ] = None
    only: Annotated[
        str | None,
        arg(metavar="CELL[/SEED]", help="run this configuration alone, anew if it is there, and print its rows"),
    ] = None
    list: Annotated[bool, arg(help="list the studies")] = False
    quiet: Annotated[bool, arg(help="no progress")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False

    def run(self) -> Result:
        """Run what is missing, report."""
        if self.list or self.name is None:
            width = max(map(len, STUDIES.entries))
            lines = [f"{name:<{width}}  {entry.summary}" for name, entry in STUDIES.entries.items()]
            values = {"studies": {name: entry.summary for name, entry in STUDIES.entries.items()}}
            return Result(values, lines, f"osmose study {next(iter(STUDIES.entries))} --quick")
        from osmose.cli.devices import device
        from osmose.studies.running import default_folder, run_study

        where = device("auto")
        jobs = self.jobs if self.jobs is not None else 1 if where.type != "cpu" else os.cpu_count() or 1
        folder = self.out or default_folder(self.name, self.quick)
        try:
            outcome = run_study(
                self.name,
                folder,
                quick=self.quick,
                data_root=self.data_root,
                jobs=jobs,
                only=self.only,
                device=where,
                progress=not (self.quiet or self.json),
            )
        except KeyboardInterrupt:
            said = f"stopped; what was finished is kept in {folder}, and the same command continues"
            return Result({"folder": str(folder), "finished": False}, [said], status=130)
        return self._answer(outcome)

    def _answer(self, outcome: Outcome) -> Result:
        values: dict[str, Any] = {"folder": str(outcome.folder), "finished": not outcome.failures}
        lines: Any = []
        following = None
        root = f" --data-root {self.data_root}" if self.data_root else ""
        again = f"osmose study {self.name}{' --quick' if self.quick else ''}{root}"
        if self.only:
            values["rows"] = outcome.rows
            for row in outcome.rows:
                told = [f"{name} {value}" for name, value in row["labels"].items()]
                told += [f"{name} {value:.6g}" for name, value in row["values"].items()]
                lines.append(f"{row['cell']}/{row['seed']}: {', '.join(told)}")
            following = f"{again} --out {outcome.folder}"
        elif outcome.results is not None:
            values["results"] = outcome.results
            for claim in outcome.results["claims"]:
                lines += [f"{claim['verdict'].upper()}: {claim['claim']}", f"    {claim['evidence']}"]
            lines.append("wrote " + ", ".join(map(str, outcome.wrote)))
            cell = f"{outcome.results['cells'][0]['name']}/{outcome.results['seeds'][0]}"
            following = f"{again} --out {outcome.folder} --only {cell}"
        if outcome.failures:
            values["failures"] = outcome.failures
            lines += [f"failed: {failure}" for failure in outcome.failures]
            lines.append(
                "the rest is kept; the same command tries these again, and writes the report once none is missing"
            )
        return Result(values, lines, following, status=1 if outcome.failures else 0)
