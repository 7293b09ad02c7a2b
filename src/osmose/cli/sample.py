"""`osmose sample`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, Suppress, arg

from osmose.cli.command import Result, angles, quiet_warnings, sampling_options
from osmose.errors import UserError
from osmose.training.progress import sampling_bar

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
#: A picture of more samples than this helps nobody and may not fit in memory.
_MOST_IN_PICTURE = 10_000
#: States of each trajectory in a picture.
_COLUMNS = 11


@dataclass
class Sample:
    """Draw samples from a run.

    A picture (.png, .jpg, .webp) shows a grid of images or a scatter of points; an .npz holds the array `samples` in
    the data's own units (8-bit images as uint8) and is written batch by batch, however many samples are asked for.
    Further options of the method are set by name: spacing=karras clip=false solver.eta=0.5.

    A model between two data sets translates the items of --from, an .npz, a .csv or an image; without it samples begin
    with held-out items of the first one. direction=backward goes the other way.

    --trajectory writes how samples come about: a .png with some states of each, or an .npz with all `states`
    (n, states, ...) in the model's units from the beginning to the sample, the steps `done` at each, and the `shift`
    and `scale` of the data's own units, states scale + shift.

    Series are drawn at the times of training items, or at --times; a .csv has a row for each time of each, with its
    number in the column `sample`. Text is written to a .txt.

    Other functions (fdp) are looked at on a finer grid with --resolution, or at any points with --at: the first axis
    from top to bottom, the second from left to right, pixel i of n at (i + 1/2) / n (with basis=fourier at i / n);
    `samples` is then (n, channels, points).
    """

    model: Annotated[Positional[Path], arg(metavar="RUN", help="a run folder")]
    num: Annotated[
        int | None, arg(aliases=["-n"], help="how many samples; 64 if not given, or as many as --from holds")
    ] = None
    out: Annotated[Path, arg(help="where to write: .png, .jpg, .webp, .npz; of series .csv, of text .txt")] = Path(
        "samples.png"
    )
    steps: Annotated[int | None, arg(help="solver steps; the method's own number if not given")] = None
    solver: Annotated[str | None, arg(help="of the method: ddim, dpmpp-2m, bridge, euler ..., see the README")] = None
    t_mid: Annotated[
        str | None, arg(metavar="X[,X,...]", help="angles of a consistency model's steps but the first; 1.1 for two")
    ] = None
    from_: Annotated[
        Path | None,
        arg(name="from", metavar="FILE", help="items to translate: .npz, .csv or an image (interpolant, bridge)"),
    ] = None
    resolution: Annotated[int | None, arg(help="points along the last axis, of fdp with uvit or implicit")] = None
    at: Annotated[
        Path | None,
        arg(metavar="FILE", help="points to look at functions at (fdp): a .csv with a column in [0, 1] for each axis"),
    ] = None
    times: Annotated[
        str | None, arg(metavar="T,T,...|FROM:TO:COUNT", help="times of series; those of training items if not given")
    ] = None
    trajectory: Annotated[bool, arg(help="write how samples come about, step by step")] = False
    label: Annotated[
        int | None, arg(help="class of all samples (conditional models); all classes in turn if not given")
    ] = None
    seed: Annotated[int, arg(help="same seed, same samples, whatever the batch size")] = 0
    batch_size: Annotated[int | None, arg(help="samples computed together")] = None
    device: Annotated[str, arg(help="cpu, cuda or mps; auto takes the fastest there is")] = "auto"
    runtime: Annotated[
        str, arg(help="torch or openvino (faster on CPUs); auto is openvino for quantized runs, else torch")
    ] = "auto"
    quiet: Annotated[bool, arg(help="no progress")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False
    overrides: Suppress[dict[str, Any]] = field(default_factory=dict)

    def run(self) -> Result:
        """Sample and write."""
        import torch

        from osmose.cli.arrays import write_stream
        from osmose.cli.devices import where
        from osmose.cli.tables import read_times, write_series
        from osmose.data.arrays import load_coordinates
        from osmose.data.pictures import picture, require_picture
        from osmose.data.text import texts
        from osmose.training import files
        from osmose.training.run import Run

        suffix = self.out.suffix.lower()
        if suffix not in (*_PICTURES, ".npz", ".csv", ".txt"):
            raise UserError(f"--out: {self.out} is not valid: should end in .npz, .csv, .txt, {', '.join(_PICTURES)}")
        if self.out.is_dir():
            raise UserError(f"--out: {self.out} is a folder")
        with quiet_warnings():
            model = Run.open(self.model).model(*where(self.device, self.runtime))
        mids = None if self.t_mid is None else angles(self.t_mid)
        points = None if self.at is None else load_coordinates(self.at)
        options = sampling_options(
            self.overrides,
            num_steps=self.steps,
            solver=self.solver,
            t_mid=mids,
            resolution=self.resolution,
            at=points,
        )
        begin, form = model.ends(model.sampling(**options))  # refuses before anything is created
        start = None if self.from_ is None else self._items(begin, model.config.kind)
        if suffix == ".csv" and form.series is None:
            raise UserError(f"--out: {self.out} is not valid: .csv is for series; write {form.kind} to an .npz")
        if suffix == ".txt" and form.alphabet is None:
            raise UserError(f"--out: {self.out} is not valid: .txt is for text; write {form.kind} to an .npz")
        if suffix in _PICTURES and form.alphabet is not None:
            raise UserError(f"--out: {self.out} is not valid: text goes to a .txt or an .npz")
        if suffix in _PICTURES:
            require_picture(form)
        num = (64 if start is None else len(start)) if self.num is None else self.num
        if suffix in _PICTURES and num > _MOST_IN_PICTURE:
            raise UserError(f"--num: {num} samples do not fit in a picture; write them to an .npz")
        asked = {"seed": self.seed, "condition": self.label, "batch_size": self.batch_size, **options}
        asked["start"] = None if start is None else start[:num]
        if self.times is not None:
            asked["times"] = read_times(self.times)
        if self.trajectory:
            return self._trajectories(model, suffix, num, form, asked)
        with quiet_warnings(), sampling_bar("sampling", not (self.quiet or self.json)) as on_step:
            parts = model.stream(num, on_step=on_step, **asked)
            if suffix == ".npz":
                nfe, seconds = write_stream(self.out, parts, num, form)
            else:
                drawn = list(parts)
                nfe, seconds = drawn[0].nfe, sum(part.seconds for part in drawn)
                data = torch.cat([part.data for part in drawn])
                at = None if drawn[0].times is None else torch.cat([p.times for p in drawn if p.times is not None])
                if suffix == ".txt":
                    files.write_bytes(self.out, ("\n\n".join(texts(data, form)) + "\n").encode())
                    return self._result(num, nfe, seconds)
                if suffix == ".csv":
                    assert form.series is not None
                    at = form.some_times(num) if at is None else at
                    assert at is not None
                    write_series(self.out, data, at, form.series)
                    return self._result(num, nfe, seconds)
                image = picture(data, form, times=at)
                with files.replacing(self.out) as temporary:
                    image.save(temporary, format="jpeg" if suffix in (".jpg", ".jpeg") else suffix[1:])
        return self._result(num, nfe, seconds)

    def _result(self, num: int, nfe: int, seconds: float) -> Result:
        values = {"out": str(self.out), "n": num, "nfe": nfe, "seconds": round(seconds, 3), "seed": self.seed}
        rate = f"{num / seconds:.1f} samples/s" if seconds else ""
        return Result(
            values,
            [f"wrote {self.out}: {num} samples, {nfe} network evaluations each, {seconds:.1f} s ({rate})"],
            f"osmose evaluate {self.model}",
        )

    def _items(self, form: Any, kind: str) -> Any:
        """What --from holds, when the model has a use for it."""
        from osmose.data.arrays import load_items

        assert self.from_ is not None
        if form is None:
            raise UserError(
                f"--from: samples of {kind} do not begin with data here; train interpolant or bridge with --source"
            )
        items = load_items(self.from_, form)
        if self.num is not None and self.num > len(items):
            raise UserError(f"--num: {self.num} is more than the {len(items)} items of --from")
        return items

    def _trajectories(self, model: Any, suffix: str, num: int, form: Any, asked: dict[str, Any]) -> Result:
        import numpy as np

        from osmose.acceleration.trajectory_pictures import most_drawn, picture_of
        from osmose.training import files

        if suffix not in (".npz", ".png"):
            raise UserError(f"--out: {self.out} is not valid: trajectories are written to .npz or .png")
        whole = suffix == ".npz"
        count = num if whole else min(num, most_drawn(form))
        if asked["start"] is not None:
            asked["start"] = asked["start"][:count]
        with quiet_warnings(), sampling_bar("sampling", not (self.quiet or self.json)) as on_step:
            paths = model.trajectories(count, most=None if whole else _COLUMNS, on_step=on_step, **asked)
        if whole:
            shift, scale = np.array(form.shift), np.array(form.scale)
            with files.replacing(self.out) as temporary, temporary.open("wb") as file:
                np.savez(file, states=paths.states.numpy(), done=np.array(paths.done), shift=shift, scale=scale)
        else:
            labels = [f"step {done}" for done in paths.done]
            files.write_bytes(self.out, picture_of(paths.states, labels, form))
        wrote = f"wrote {self.out}: {count} trajectories of {len(paths.done)} states"
        return Result({"out": str(self.out), "n": count, "seed": self.seed}, [wrote], f"osmose evaluate {self.model}")
