"""`osmose train blocks`, `osmose blocks merge`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from osmose.cli.command import Result, quiet_warnings, whole_numbers
from osmose.cli.train import Train
from osmose.errors import UserError

#: Those whose noise can be shared out.
_METHODS = ("edm", "masked", "token-diffusion")
_OVERLAP_OF_TEXT = 0.1


@dataclass
class TrainBlocks(Train):
    """Train a denoiser in blocks that know nothing of each other, each on noise levels of its own (DiffusionBlocks).

    A stack of layers (--network dit, mlp or those of text) is cut into --blocks shorter ones; of other networks every
    block has a whole one. Only one block's weights, gradients and optimizer are in memory at a time. --steps and all
    else of training hold for each block. The result samples like any run of its method, a step through one block.

    Under torchrun every worker trains blocks of its own. --only trains some of them; what was trained on other machines
    is put together by osmose blocks merge. Everything else is as in osmose train.
    """

    method: Annotated[Positional[str | None], arg(metavar="METHOD", help="edm; masked or token-diffusion for text")] = (
        None
    )
    blocks: Annotated[int | None, arg(help="how many; required")] = None
    overlap: Annotated[
        float | None,
        arg(help="how much wider a block's noise is in training, in its lengths; 0.05, of text 0.1"),
    ] = None
    partition: Annotated[
        str | None, arg(help="what intervals are equal in: equal-mass, equal-log or equal-sigma; equal-mass")
    ] = None
    split: Annotated[str | None, arg(metavar="N,N,...", help="layers of each block, highest noise first; equal")] = None
    order: Annotated[str, arg(help="sequential, or interleaved: a block drawn at random for each step")] = "sequential"
    only: Annotated[str | None, arg(metavar="B,B,...", help="blocks to train here, counted from 0; all")] = None

    def _start(self, out: Path) -> Result:
        from osmose.acceleration.blocks import Blocks
        from osmose.acceleration.blocks_plan import BlocksPlan
        from osmose.configuration import ConfigError
        from osmose.training.run import require_free

        if self.method not in (None, *_METHODS):
            raise UserError(
                f"METHOD: {self.method!r} is not valid: blocks share the noise of edm, or of masked and "
                "token-diffusion, which are for text"
            )
        if self.init is not None:
            raise UserError("--init: given, and blocks begin with fresh weights")
        if self.blocks is None:
            raise UserError("--blocks: required: how many")
        self._require_order()
        only = _numbers("only", self.only)
        self.method = self.method or "edm"
        changes = self._changes()
        self._require_data(changes)
        require_free(out)
        data, dataset = self._data(changes)
        if dataset.spec.kind == "image" and not {"network", "network.kind"} & set(changes):
            changes["network.kind"] = "dit"
        given: dict[str, Any] = {"count": self.blocks, "overlap": self.overlap, "partition": self.partition}
        if self.overlap is None and self.method != "edm":
            given["overlap"] = _OVERLAP_OF_TEXT
        given["split"] = _numbers("split", self.split)
        said = {name: value for name, value in given.items() if value is not None}
        whole = self._config(data, dataset, changes)
        try:
            plan = BlocksPlan.parse(said | {"whole": whole.to_json()})
        except ConfigError as error:
            raise UserError(f"blocks: {str(error).removeprefix('whole: ').removeprefix('count: ')}") from None
        plan.require(only or [])
        return self._carry_out(Blocks.begin(out, plan), dataset, only)

    def _resume(self, out: Path) -> Result:
        from osmose.acceleration.blocks import Blocks
        from osmose.training.run import Run, data_of

        said = self._changes()
        for name in ("blocks", "overlap", "partition", "split"):
            if getattr(self, name) is not None:
                said[name] = getattr(self, name)
        for name in said:
            if name != "data.root":
                raise UserError(f"{name}: given, but {out} is continued by its own settings; resume without it")
        self._require_order()
        blocks = Blocks.open(out)
        dataset = data_of(Run(out, blocks.plan.whole), self.data_root)
        return self._carry_out(blocks, dataset, _numbers("only", self.only))

    def _require_order(self) -> None:
        if self.order not in ("sequential", "interleaved"):
            raise UserError(f"--order: {self.order!r} is not valid: should be sequential or interleaved")

    def _carry_out(self, blocks: Any, dataset: Any, only: list[int] | None) -> Result:
        import torch

        from osmose.training.trainer import DivergedError

        if self.threads:
            torch.set_num_threads(self.threads)
        again = f"osmose train blocks --out {self.out} --resume"
        order: Any = self.order
        try:
            show = not (self.quiet or self.json)
            finished = blocks.carry_out(dataset, only or [], order, progress=show)
        except DivergedError as error:
            print(f"osmose: {error}", file=sys.stderr)
            return Result({"run": str(self.out), "error": str(error)}, status=1)
        values = {"run": str(self.out), "blocks": blocks.plan.count, "missing": blocks.missing()}
        if not finished:
            return Result(values | {"finished": False}, ["stopped; everything is saved"], again, status=130)
        if values["missing"]:
            names = ", ".join(map(str, values["missing"]))
            line = (
                f"wrote {self.out}/blocks; not trained yet: number {names} of 0 to {blocks.plan.count - 1}; train them "
                "here, or elsewhere and merge"
            )
            return Result(values | {"finished": False}, [line], again)
        edges = ", ".join(f"{edge:.4g}" for edge in blocks.plan.edges())
        what = "time" if blocks.plan.whole.method.kind == "masked" else "sigma"
        together = f"; together: {self.out}/samples/blocks.png" if blocks.has_picture else ""
        lines = [f"wrote {self.out}: {blocks.plan.count} blocks, {what} {edges}{together}"]
        return Result(values | {"finished": True}, lines, f"osmose evaluate {self.out}")


@dataclass
class Merge:
    """Put blocks together that were trained in several folders, on other days or machines.

    All folders have to be begun by the same `osmose train blocks`, each with --only some of the blocks.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN", help="folders with some of the blocks")]
    out: Annotated[Path | None, arg(metavar="RUN2", help="the run folder to make; required")] = None
    data_root: Annotated[Path | None, arg(help="where the data lie, if not where the runs found them")] = None
    json: Annotated[bool, arg(help="print the result as JSON")] = False

    def run(self) -> Result:
        """Check, copy, answer."""
        from osmose.acceleration.blocks import Blocks, merge
        from osmose.training.run import Run, data_of

        if self.out is None:
            raise UserError("--out: required: the run folder to make")
        if not self.runs:
            raise UserError("RUN: required: the folders whose blocks are to be put together")
        first = Blocks.open(self.runs[0])
        with quiet_warnings():
            dataset = data_of(Run(first.folder, first.plan.whole), self.data_root)
            merge(self.runs, self.out, dataset)
        values = {"run": str(self.out), "blocks": first.plan.count}
        line = f"wrote {self.out}: {first.plan.count} blocks of {len(self.runs)} folders"
        return Result(values, [line], f"osmose evaluate {self.out}")


def _numbers(name: str, text: str | None) -> list[int] | None:
    return None if text is None else whole_numbers(f"--{name}", text, "0,2")
