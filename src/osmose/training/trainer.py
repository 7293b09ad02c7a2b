"""The training loop. It knows `GenerativeModel`, never a particular method."""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from osmose.data.batches import BatchOrder
from osmose.data.dataset import Dataset
from osmose.data.pictures import has_picture, picture
from osmose.errors import UserError
from osmose.gaussian.draws import StepDraws, mix, seeded
from osmose.methods import COMPOSED
from osmose.methods.base import GenerativeModel
from osmose.methods.messages import Batch, LossTerms
from osmose.networks.processor import instructions
from osmose.training import files
from osmose.training.checkpoint import Checkpoints
from osmose.training.config import RunConfig
from osmose.training.ema import EMA
from osmose.training.optimizers import Work
from osmose.training.progress import Progress
from osmose.training.run import Run
from osmose.training.signals import stopping_on_signal
from osmose.training.window import Window

#: The step whose random numbers validation uses: always the same, and none that training takes.
_VALIDATION = -1


class DivergedError(RuntimeError):
    """The loss or its gradient is no longer a number."""


class Trainer:
    """Trains the model of a run on a data set, from its newest checkpoint or from the start.

    Works under `torchrun` and `accelerate launch`: the batch is shared among the processes, and one process and many
    follow the same loss curve.

    Attributes:
        asked: whether a signal has asked to stop, be it in the last step.

    Args:
        run: the run, new or begun.
        dataset: its data.
        model: the run's model, where it needs more than its configuration says (a teacher); built afresh if None.
        lesson: called in the place of the model to train it, where its loss is not all that it learns from; a module
            of which the model is a part.
        progress: shows how far it is.

    Raises:
        UserError: the data are not those that the run names, or the batch cannot be shared out.
    """

    def __init__(
        self,
        run: Run,
        dataset: Dataset,
        *,
        model: GenerativeModel | None = None,
        lesson: nn.Module | None = None,
        progress: Progress | None = None,
    ):
        from accelerate import Accelerator  # half a second to import: only where training happens
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs

        self.run, self.dataset, self.config, self.seed = run, dataset, run.config.training, run.config.seed
        if dataset.identity.sha256 != run.config.identity.sha256:
            raise UserError(f"data: {dataset.source!r} is not the data this run was made with (its hash differs)")
        if run.config.method.kind in COMPOSED:
            raise UserError(f"{run.folder}: {run.config.method.kind} is put together, not trained: nothing to continue")
        run.require_real("has nothing to train")
        AcceleratorState._reset_state()  # accelerate keeps the precision of the first run in a process for all others
        model = model if model is not None else built(run.config)
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        # Without the word `cpu` accelerate would take processes that have no GPU for lonely ones.
        self.accelerator = Accelerator(
            mixed_precision=chosen_precision(self.config.precision),
            cpu=several and not torch.cuda.is_available(),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=model.idle_parameters)],
        )
        self.device, world = self.accelerator.device, self.accelerator.num_processes
        self.config.require(world)
        self.micro = self.config.batch_size // self.config.accumulate
        self.share = self.micro // world

        self.model = model.to(self.device)
        channels_last = self.config.channels_last
        if channels_last if channels_last is not None else self.device.type == "cuda":
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.checkpoints = Checkpoints(run, self.config.keep_checkpoints)
        if not self.checkpoints.all():
            if run.weights.is_file() and self.is_main:
                raise UserError(
                    f"{run.folder}: has weights and no checkpoints to go on from: it was put together, or they were "
                    "deleted; train a new run"
                )
            with torch.no_grad():
                self.model.prepare(self._items())
                if dataset.start is not None:
                    self.model.keep_starts(dataset.start.spec.encode(dataset.start.held_out))
        self.ema = EMA(self.model, self.config.ema)
        self.optimizer = self.config.optimizer.build(self.model, self.config)
        self.window = Window()
        state = self.checkpoints.restore(self.model, self.ema, self.optimizer)
        self.step = int(state["step"])
        self.asked = False
        if self.is_main and "window" in state:  # the sums are over all processes: one takes them up again
            self.window.sums = torch.tensor(state["window"], dtype=torch.float64)
            self.window.parts = list(state.get("parts", []))
        if self.config.compile:
            for network in self.model.networks():
                network.compile()
        trains = any(parameter.requires_grad for parameter in self.model.parameters())
        lesson = self.model if lesson is None else lesson
        self.parallel = self.accelerator.prepare_model(lesson) if trains else lesson
        self.order = BatchOrder(len(dataset.train), self.config.batch_size, mix(self.seed, "data"))
        self.start_order = self.order
        if dataset.start is not None and not dataset.paired:
            num_starts = len(dataset.start.train)
            self.start_order = BatchOrder(num_starts, self.config.batch_size, mix(self.seed, "start"))
        self.progress = progress if progress and self.is_main else Progress(show=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return bool(self.accelerator.is_main_process)

    def fit(self) -> bool:
        """Train to the last step; return False when a signal asked to stop before (the state is then saved).

        Raises:
            DivergedError: gradient, loss or weights are not finite; the last good checkpoint is named.
            UserError: the disk is full; the last checkpoint is unchanged.
        """
        self.begin()
        with stopping_on_signal() as stopped, torch.random.fork_rng(), self.progress:
            if not self.config.steps and not self.checkpoints.all():  # `prepare` was all there is to do
                self._log(self.validate())
                self.preview()
                self.save()
            while self.step < self.config.steps:
                self.advance(stopped)
                if self.asked and self.step < self.config.steps:
                    return False
        return True

    def begin(self) -> None:
        """Make the run's folder what it was at this step, once, before the first `advance`."""
        if self.is_main:
            self.run.rewind(self.step)
            if self.checkpoints.all():  # whoever wrote the newest may have been killed before it did the rest
                self.checkpoints.prune()
                self.run.write_weights(self.ema.state_dict())
        self.accelerator.wait_for_everyone()  # the others may be about to read what was written
        self.progress.start(self.step, self.config.steps, self.config.batch_size)

    def advance(self, stopped: list[int]) -> None:
        """One step, and what is due after it: logs, validation, a preview, a checkpoint.

        Where a signal has come, as `stopped` says, `asked` is set and everything is saved.

        Raises:
            DivergedError: as `fit`.
        """
        started = time.perf_counter()
        grad_norm = self.optimise(self.window)
        self.step += 1
        self.window.seconds += time.perf_counter() - started
        self.window.grad_norm = grad_norm
        self.progress.advance(self.window)
        if self.step % self.config.log_every == 0:
            noted = self.model.report()
            self._log(self.window.drain(self._summed) | noted, lr=self.config.lr_at(self.step - 1))
        last, self.asked = self.step == self.config.steps, self._agreed(stopped)
        if last or self.step % self.config.validate_every == 0:
            self._log(self.validate())
        if last or self.step % self.config.preview_every == 0:
            self.preview()
        if last or self.asked or self.step % self.config.checkpoint_every == 0:
            self.save()

    def optimise(self, window: Window) -> float:
        """One optimisation step; the norm of its gradient, 0 where the optimizer needs none."""
        self.parallel.train()
        parts, value, norm = self._parts(), 0.0, 0.0
        # The noise as it is before the losses draw it, for those that look at the batch again.
        kept = [(batch, draws.again()) for batch, draws in parts] if self.optimizer.evaluates else []
        for index, (batch, draws) in enumerate(parts):
            terms = self._learn(batch, draws, final=index == len(parts) - 1)
            window.add(terms)
            value += float(terms.per_item.detach().cpu().double().mean()) / len(parts)
        if self.optimizer.by_gradient:
            clip = self.config.clip_grad or float("inf")
            norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip))
        if self.optimizer.evaluates:  # on all processes: they have to decide alike
            value = self._mean(value)
        if not math.isfinite(norm if self.optimizer.by_gradient else value):
            bad = ~terms.per_item.detach().isfinite().cpu()  # of the batch, those that are to blame, if it shows
            times = terms.t[bad] if terms.t is not None and bool(bad.any()) else terms.t
            self._diverged("the loss is no longer finite", self.step + 1, times)
        work = Work(
            value=value,
            loss=lambda: self._loss(kept),
            regressions=lambda: (self.model.regression(batch, draws.again()) for batch, draws in kept),
            summed=lambda sums: self._summed(sums).to(sums.device),
            seed=mix(self.seed, "optimizer", self.step),
        )
        window.notes = self.optimizer.advance(self.config.lr_at(self.step), work)
        self.ema.update()
        with torch.no_grad(), self.accelerator.autocast():
            self.model.after_step(parts)
        return norm

    def _parts(self) -> list[tuple[Batch, StepDraws]]:
        """This process's share of the step's batch, in micro-batches, each with its randomness."""
        items, starts = self.order.indices(self.step), self.start_order.indices(self.step)
        parts: list[tuple[Batch, StepDraws]] = []
        for index in range(self.config.accumulate):
            start = index * self.micro + self.accelerator.process_index * self.share
            draws = StepDraws(self.seed, self.step, start, start + self.share, self.config.batch_size, self.device)
            own = slice(start, start + self.share)
            parts.append((self._batch(items[own], draws, starts[own]), draws))
        return parts

    def _learn(self, batch: Batch, draws: StepDraws, final: bool) -> LossTerms:
        """The losses of a micro-batch, and their gradient where the optimizer needs it."""
        torch.manual_seed(mix(self.seed, "dropout", self.step, draws.start))
        if not self.optimizer.by_gradient:
            with torch.no_grad(), self.accelerator.autocast():
                return self.model.loss(batch, draws)
        with contextlib.nullcontext() if final else self.accelerator.no_sync(self.parallel):
            with self.accelerator.autocast():
                terms: LossTerms = self.parallel(batch, draws)
            self.accelerator.backward(terms.per_item.mean() / self.config.accumulate)
        return terms

    def _loss(self, parts: list[tuple[Batch, StepDraws]]) -> float:
        """The mean loss of the step's batch over all processes, at the weights as they are, with the step's noise."""
        value = 0.0
        with torch.no_grad(), self.accelerator.autocast():
            for batch, draws in parts:
                terms = self.model.loss_again(batch, draws.again())
                value += float(terms.per_item.cpu().double().mean()) / len(parts)
        return self._mean(value)

    def _mean(self, value: float) -> float:
        """The mean over all processes."""
        return float(self._summed(torch.tensor(value, dtype=torch.float64))) / self.accelerator.num_processes

    def _items(self) -> Iterator[Batch]:
        """The training part in batches, with its classes where there are any."""
        for part in torch.arange(len(self.dataset.train)).split(1024):
            batch = Batch.of(self.dataset, "train", part, conditional=True, device=self.device)
            yield batch
            if self.config.flip:  # it is trained on both
                yield replace(batch, x0=batch.x0.flip(-1))

    def _batch(self, items: Tensor, draws: StepDraws | None, starts: Tensor | None = None) -> Batch:
        batch = Batch.of(self.dataset, "train", items, self.run.config.method.conditional, self.device)
        if self.dataset.start is not None and starts is not None:
            start = self.dataset.start.spec.encode(self.dataset.start.train[starts].to(self.device))
            batch = replace(batch, start=start)
        if draws is not None and self.config.flip:  # of pairs, both
            mirrored = (draws.uniform() < 0.5).to(self.device).view(-1, *(1,) * (batch.x0.ndim - 1))
            x0 = torch.where(mirrored, batch.x0.flip(-1), batch.x0)
            begin = None if batch.start is None else torch.where(mirrored, batch.start.flip(-1), batch.start)
            batch = replace(batch, x0=x0, start=begin)
        return batch

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Loss of the averaged weights on held-out items, in all, by quartile of t, in parts; always the same noise."""
        window = Window()
        with self.ema.applied():
            self.model.eval()
            for batch, draws in validation_batches(self.run.config, self.dataset, self.device):
                with self.accelerator.autocast():
                    window.add(self.model.loss(batch, draws))
        for complaint in self.model.complaints():
            self.progress.note(f"note: {complaint}")
        return {f"validation_{name}": value for name, value in window.losses(lambda sums: sums).items()}

    def preview(self) -> None:
        """Write a grid of samples of the averaged weights to samples/; the same noise every time."""
        if not self.is_main or not self.config.preview_samples or not has_picture(self.run.config.spec):
            return
        path = self.run.folder / "samples" / f"step_{self.step:08d}.png"
        with self.ema.applied():
            with warnings.catch_warnings():  # validation says what there is to complain of
                warnings.simplefilter("ignore")
                samples = self.model.sample(self.config.preview_samples, seed=self.seed)
            real, at = self.dataset.train[:2000], self.dataset.train_times
            at = None if at is None else at[:2000]
            grid = picture(samples.data, self.run.config.spec, real, samples.times, at)
            with files.replacing(path) as temporary:
                grid.save(temporary, format="png")
            self.progress.note(f"samples: {path}")

    def save(self) -> None:
        """Write a checkpoint, then the weights to sample with.

        Raises:
            DivergedError: a weight or a logged loss is not finite; nothing is written.
        """
        if not all(bool(value.isfinite().all()) for value in self.model.parameters()):
            self._diverged("a weight is no longer finite", self.step)
        window = self._summed(self.window.sums)
        if not bool(window.isfinite().all()):
            self._diverged("the loss, or a part of it, is no longer finite", self.step)
        if self.is_main:
            more = {"window": window.tolist(), "parts": self.window.parts}
            self.checkpoints.save(self.step, self.model, self.ema, self.optimizer, **more)
            self.run.write_weights(self.ema.state_dict())
        self.accelerator.wait_for_everyone()

    def _log(self, values: dict[str, Any], **more: Any) -> None:
        line = {"step": self.step, "epoch": round(self.order.epoch(self.step), 4), **values, **more}
        for name, value in values.items():
            if not math.isfinite(value):
                self._diverged(f"{name} is no longer finite", self.step)
        if self.is_main:
            self.run.log(line)
            self.progress.log(line, self.run.folder if self.config.tensorboard else None)

    def _agreed(self, stopped: list[int]) -> bool:
        """Whether any process was asked to stop; all get the same answer, so that all leave at the same step."""
        if self.accelerator.num_processes == 1:
            return bool(stopped)
        flag = torch.tensor([float(bool(stopped))], device=self.device)
        return bool(self.accelerator.reduce(flag).item() > 0)

    def _summed(self, sums: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.accelerator.num_processes == 1:
            return sums
        return self.accelerator.reduce(sums.to(self.device)).cpu()

    def _diverged(self, what: str, step: int, t: Tensor | None = None) -> None:
        saved = self.checkpoints.all()
        times = "" if t is None else f" (last batch: t from {t.min():.3f} to {t.max():.3f}, median {t.median():.3f})"
        raise DivergedError(
            f"{what} at step {step}{times}; last good checkpoint: "
            f"{saved[-1] if saved else 'none yet'}; a lower learning rate or a smaller training.clip_grad usually helps"
        )


def validation_batches(
    config: RunConfig, dataset: Dataset, device: torch.device | str = "cpu"
) -> Iterator[tuple[Batch, StepDraws]]:
    """The held-out items that a run is validated on, in batches, with the randomness that each has every time."""
    held_out, training = dataset.held_out, config.training
    count, size = min(training.validation_items, len(held_out)), training.batch_size // training.accumulate
    items = torch.randperm(len(held_out), generator=seeded(config.seed, "validation"))[:count]
    begin = dataset.start
    starts = items
    if begin is not None and not dataset.paired:
        shuffled = torch.randperm(len(begin.held_out), generator=seeded(config.seed, "validation", "start"))
        starts = shuffled[torch.arange(count) % len(shuffled)]
    for start in range(0, count, size):
        part = items[start : start + size]
        draws = StepDraws(config.seed, _VALIDATION, start, start + len(part), count, device)
        batch = Batch.of(dataset, "held-out", part, config.method.conditional, device)
        if begin is not None:
            start_items = begin.spec.encode(begin.held_out[starts[start : start + size]].to(device))
            batch = replace(batch, start=start_items)
        yield batch, draws


def built(config: RunConfig) -> GenerativeModel:
    """The model of a run as it is before training: its weights follow from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(config.seed, "weights"))
        return config.method.build(config.spec)


def chosen_precision(wanted: str) -> str:
    """What accelerate calls the precision that `training.precision` means on this machine: "no" (float32) or "bf16"."""
    if wanted != "auto":
        return "bf16" if wanted == "bf16" else "no"
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    return "bf16" if "bf16" in instructions() else "no"  # emulated it is far slower than float32
