"""DiffusionBlocks: a denoiser in blocks, each trained by itself on noise levels of its own (arXiv 2506.14202).

    RUN/blocks.json            the plan, written first
    RUN/blocks/0/              the run that trains block 0, of the highest noise: a run like any other
    RUN/blocks/1/ ...
    RUN/config.json            once all blocks are trained: a run whose network is all of them (`networks.experts`),
    RUN/model.safetensors      with their weights
    RUN/metrics.jsonl          and their logs, one after the other
    RUN/samples/blocks.png     what they draw together

Nothing passes between blocks: each has its own input, embedding of time and head, optimizer, average, count of steps
and stream of random numbers. It is the same whether they are trained one after the other, in turns, or by workers that
never talk, on other days or machines (`merge`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from osmose.acceleration.blocks_plan import BlocksPlan
from osmose.configuration import ConfigError
from osmose.data.dataset import Dataset
from osmose.data.pictures import has_picture, picture
from osmose.errors import UserError
from osmose.gaussian.draws import seeded
from osmose.training import files
from osmose.training.checkpoint import Checkpoints
from osmose.training.config import RunConfig
from osmose.training.progress import Progress
from osmose.training.recipes import checked
from osmose.training.run import Run, require_free, versions
from osmose.training.signals import stopping_on_signal
from osmose.training.trainer import DivergedError, Trainer, built

Order = Literal["sequential", "interleaved"]
#: What a worker of several is told of the others.
_WORKERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Samples in the picture of all blocks together.
_SHOWN = 36


class Blocks:
    """Blocks in their folder, begun or about to begin.

    Attributes:
        folder: of the run that is made.
        plan: what is to be done.
    """

    def __init__(self, folder: Path, plan: BlocksPlan):
        self.folder, self.plan = folder, plan

    @classmethod
    def begin(cls, folder: Path | str, plan: BlocksPlan) -> Blocks:
        """Make a new folder with its blocks.json.

        Several workers may begin the same.

        Raises:
            UserError: something is there already; parts that do not fit each other or the data.
        """
        folder = Path(folder)
        for block in range(plan.count):
            checked(plan.member(block))
        with contextlib.suppress(UserError):
            if int(os.environ.get("WORLD_SIZE", "1")) > 1 and cls.open(folder).plan == plan:  # another worker's
                return cls(folder, plan)
        require_free(folder)
        files.write_json(folder / "blocks.json", plan.to_json())
        return cls(folder, plan)

    @classmethod
    def open(cls, folder: Path | str) -> Blocks:
        """Take up what is in a folder.

        Raises:
            UserError: no blocks were begun there.
        """
        folder = Path(folder)
        if not (folder / "blocks.json").is_file():
            raise UserError(f"{folder}: no blocks were begun here (it has no blocks.json)")
        try:
            return cls(folder, BlocksPlan.parse(files.read_json(folder / "blocks.json")))
        except ConfigError as error:
            raise UserError(f"{folder / 'blocks.json'}: not written by osmose ({error})") from None

    @property
    def has_picture(self) -> bool:
        """Whether samples of all blocks together are drawn."""
        return has_picture(self.plan.whole.spec)

    @property
    def finished(self) -> bool:
        """Whether the run that is made is whole."""
        return (self.folder / "config.json").is_file()

    def run(self, block: int) -> Run:
        """The run of a block, made if it is not there."""
        folder = self.folder / "blocks" / str(block)
        if (folder / "config.json").is_file():
            return Run.open(folder)
        return Run.create(folder, self.plan.member(block))

    def missing(self) -> list[int]:
        """Blocks that are not trained to the end."""
        return [block for block in range(self.plan.count) if not self._trained(block)]

    def _trained(self, block: int) -> bool:
        folder = self.folder / "blocks" / str(block)
        if not (folder / "config.json").is_file():
            return False
        run = Run.open(folder)
        saved = Checkpoints(run, 1).all()
        done = bool(saved) and int(saved[-1].name.removeprefix("step_")) == run.config.training.steps
        return done and run.weights.is_file()

    def carry_out(
        self, dataset: Dataset, only: Sequence[int] = (), order: Order = "sequential", progress: bool = True
    ) -> bool:
        """Train what is missing, and put all blocks together once none is.

        Under torchrun every worker trains blocks of its own and hears nothing of the others.

        Args:
            dataset: the data.
            only: blocks to train here; all if there are none.
            order: one after the other, or in turns, a block drawn at random for each step.
            progress: show progress bars.

        Returns:
            False when a signal asked to stop before the end (the state is then saved).

        Raises:
            DivergedError: a loss is not finite; the block is named.
            UserError: other data, a full disk, a block that there is not.
        """
        self.plan.require(only)
        if self.finished:
            return True
        workers, worker = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        own = list(only or range(self.plan.count))[worker::workers]
        with _alone():
            train = self._in_turns if order == "interleaved" else self._one_by_one
            if not train(own, dataset, progress):
                return False
            if not self.missing():
                self._put_together(dataset)
        return True

    def _trainer(self, block: int, dataset: Dataset, progress: bool) -> Trainer:
        return Trainer(self.run(block), dataset, progress=Progress(progress, self._label(block)))

    def _label(self, block: int) -> str:
        return f"block {block} of {self.plan.count}"

    def _one_by_one(self, own: Sequence[int], dataset: Dataset, progress: bool) -> bool:
        for index, block in enumerate(own):
            trainer = self._trainer(block, dataset, progress)
            try:
                done = trainer.fit()
            except DivergedError as error:
                raise DivergedError(f"{self._label(block)}: {error}") from None
            if not done or (trainer.asked and index + 1 < len(own)):
                return False
        return True

    def _in_turns(self, own: Sequence[int], dataset: Dataset, progress: bool) -> bool:
        trainers = {block: self._trainer(block, dataset, progress=False) for block in own}
        bar, training = Progress(progress, "blocks in turns"), self.plan.whole.training
        for trainer in trainers.values():
            trainer.begin()
        bar.start(sum(t.step for t in trainers.values()), training.steps * len(own), training.batch_size)
        with stopping_on_signal() as stopped, torch.random.fork_rng(), bar:
            while left := [block for block, trainer in trainers.items() if trainer.step < training.steps]:
                done = sum(trainer.step for trainer in trainers.values())
                drawn = torch.randint(len(left), (1,), generator=seeded(self.plan.whole.seed, "turn", done))
                block = left[int(drawn)]
                try:
                    trainers[block].advance(stopped)
                except DivergedError as error:
                    raise DivergedError(f"{self._label(block)}: {error}") from None
                bar.advance(trainers[block].window)
                if trainers[block].asked and (len(left) > 1 or trainers[block].step < training.steps):
                    for trainer in trainers.values():
                        trainer.save()
                    return False
        return True

    def _put_together(self, dataset: Dataset) -> None:
        """Write the run of all blocks; config.json, which makes it one, comes last."""
        weights: dict[str, Tensor] = {}
        lines: list[dict[str, Any]] = []
        prefix = _prefix(self.plan.member(0))
        for block in range(self.plan.count):
            run, own = self.run(block), {}
            for name, value in files.read_tensors(run.weights).items():
                inner = name.removeprefix(prefix)
                within = self.plan.count > 1 and inner != name
                own[f"{prefix}parts.{block}.{inner}" if within else name] = value
            weights |= own
            before = block * self.plan.whole.training.steps
            lines += [{**line, "step": before + line["step"], "block": block} for line in run.metrics()]
        config: RunConfig = self.plan.merged().replace(versions=versions())
        run = Run(self.folder, config)
        files.write_bytes(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        run.write_weights(weights)
        if has_picture(config.spec):
            samples = run.model().sample(_SHOWN, seed=config.seed)
            grid = picture(samples.data, config.spec, dataset.train[:2000])
            with files.replacing(self.folder / "samples" / "blocks.png") as temporary:
                grid.save(temporary, format="png")
        files.write_json(self.folder / "config.json", config.to_json())


def merge(folders: Sequence[Path | str], out: Path | str, dataset: Dataset) -> Run:
    """Put blocks together that were trained in several folders, by one plan.

    Args:
        folders: of runs that were begun alike, each with some of the blocks trained.
        out: the folder to make.
        dataset: the data, for the picture.

    Raises:
        UserError: folders of other plans; a block that is trained in none of them, or differently in two.
    """
    if not folders:
        raise UserError("RUN: name the folders whose blocks are to be put together")
    found = [Blocks.open(folder) for folder in folders]
    plan, out = found[0].plan, Path(out)
    for other in found[1:]:
        if other.plan.whole.identity != plan.whole.identity:
            raise UserError(f"{other.folder}: its data are not those of {found[0].folder}")
        if _without_place(other.plan) != _without_place(plan):
            raise UserError(f"{other.folder}: was begun otherwise than {found[0].folder} (their blocks.json differ)")
    missing = set(range(plan.count)).intersection(*(blocks.missing() for blocks in found))
    if missing:
        names = ", ".join(map(str, sorted(missing)))
        raise UserError(
            f"number {names} of the blocks 0 to {plan.count - 1} is trained in none of the folders; train with --only"
        )
    source = {}
    for block in range(plan.count):
        owners = [blocks for blocks in found if block not in blocks.missing()]
        if len({blocks.run(block).hash() for blocks in owners}) > 1:
            raise UserError(
                f"block {block} is trained in {owners[0].folder} and in {owners[1].folder}, and differs; leave one out"
            )
        source[block] = owners[0].run(block).folder
    require_free(out)
    with files.replacing(out) as temporary:
        temporary.mkdir()
        files.write_json(temporary / "blocks.json", plan.to_json())
        for block, folder in source.items():
            shutil.copytree(folder, temporary / "blocks" / str(block))
        Blocks(temporary, plan)._put_together(dataset)
    return Run.open(out)


def _prefix(config: RunConfig) -> str:
    """What the names of a network's tensors begin with in a model."""
    model = built(config)
    (network,) = model.networks()
    return next(name for name, module in model.named_modules() if module is network) + "."


def _without_place(plan: BlocksPlan) -> dict[str, Any]:
    """A plan without what differs between machines."""
    values = plan.to_json()
    values["whole"]["data"].pop("root", None)
    values["whole"]["versions"] = {}
    return values


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Work as if there were no other workers, on this worker's own device."""
    kept = {name: os.environ.pop(name) for name in _WORKERS if name in os.environ}
    if torch.cuda.is_available() and "LOCAL_RANK" in kept:
        torch.cuda.set_device(int(kept["LOCAL_RANK"]))
    try:
        yield
    finally:
        os.environ.update(kept)
