"""`osmose complete`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, Suppress, arg

from osmose.cli.command import Result, at_least, keep_inputs, quiet_warnings, sampling_options
from osmose.errors import UserError
from osmose.training.progress import sampling_bar

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
#: Items in a picture, a row each, and the colour of what is unknown.
_ROWS, _TINT = 12, (70, 110, 160)


@dataclass
class Complete:
    """Draw whole items from scattered values of them.

    FILE is an .npz whose array (`known`, `samples` or `x`) has items of the run's data, NaN where nothing is known, or
    whole ones (an image, too) of which --keep says what share of the points is shown to the model. Writes an .npz with
    `known` (n, ...) and `samples` (n, SAMPLES, ...), or a picture: a row for each item, what is known and what was
    made of it, and the truth where it is known; of text a .txt. Tables of series with a time column are filled by
    osmose impute.
    """

    model: Annotated[Positional[Path], arg(metavar="RUN", help="a run folder, of fdp, dspd, cspd or of text")]
    file: Annotated[Positional[Path], arg(metavar="FILE", help="what is known: .npz or an image")]
    samples: Annotated[int, arg(help="completions of each item")] = 5
    keep: Annotated[
        float | None, arg(help="share of the points of whole items that is known, chosen at random; all that is there")
    ] = None
    out: Annotated[Path, arg(help="where to write: .png, .jpg, .webp, .npz, of text .txt")] = Path("completed.png")
    steps: Annotated[int | None, arg(help="solver steps; the method's own number if not given")] = None
    solver: Annotated[str | None, arg(help="of the method: of fdp posterior, em, pf-ode, pc")] = None
    label: Annotated[int | None, arg(help="class of all items (conditional models)")] = None
    seed: Annotated[int, arg(help="same seed, same samples")] = 0
    batch_size: Annotated[int | None, arg(help="samples computed together")] = None
    device: Annotated[str, arg(help="cpu, cuda or mps; auto takes the fastest there is")] = "auto"
    quiet: Annotated[bool, arg(help="no progress")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False
    overrides: Suppress[dict[str, Any]] = field(default_factory=dict)

    def run(self) -> Result:
        """Complete, write, answer."""
        import numpy as np
        import torch

        from osmose.cli.devices import device
        from osmose.data.arrays import load_known
        from osmose.data.pictures import has_picture
        from osmose.data.text import texts
        from osmose.gaussian.draws import seeded
        from osmose.training import files
        from osmose.training.run import Run

        suffix = self.out.suffix.lower()
        if suffix not in (*_PICTURES, ".npz", ".txt"):
            raise UserError(f"--out: {self.out} is not valid: should end in .npz, .txt, {', '.join(_PICTURES)}")
        keep_inputs([self.out], self.file)
        at_least(self, 1, "samples")
        if self.keep is not None and not 0 <= self.keep < 1:
            raise UserError(f"--keep: {self.keep} is not valid: must be at least 0 and below 1")
        model = Run.open(self.model).model(device(self.device))
        options = sampling_options(self.overrides, num_steps=self.steps, solver=self.solver)
        if options.get("at") is not None:
            raise UserError("at: whole items are completed; osmose sample looks at points")
        form = model.ends(model.sampling(**options))[1]
        if (form.alphabet is not None) != (suffix == ".txt") and suffix != ".npz":
            goes = (
                "text goes to a .txt or an .npz" if form.alphabet is not None else f"{form.kind} does not go to a .txt"
            )
            raise UserError(f"--out: {self.out} is not valid: {goes}")
        if suffix in _PICTURES and (form.kind != "image" or not has_picture(form)):
            raise UserError(f"--out: {self.out} is not valid: {form.kind} of shape {form.shape} go to an .npz")
        whole = known = load_known(self.file, form)
        if form.alphabet is not None and bool((known.nan_to_num() != known.nan_to_num().round()).any()):
            raise UserError(f"FILE: {self.file}: codes of characters are whole numbers, 0 to {len(form.alphabet) - 1}")
        if suffix in _PICTURES:
            whole = known = known[:_ROWS]
        if self.keep is not None:
            # A point is known in all channels or in none.
            lot = torch.rand(len(known), 1, *form.shape[1:], generator=seeded(self.seed, "keep"))
            known = torch.where(lot < self.keep, known, torch.nan)
        if not bool(known.isnan().any()):
            raise UserError(
                f"FILE: {self.file} has no unknown value; nothing to complete (--keep 0.2 hides most of them)"
            )
        times = None if form.series is None else self._times(form, len(known))
        if times is not None:
            times = times.repeat_interleave(self.samples, 0)
        count = len(known) * self.samples
        repeated = known.repeat_interleave(self.samples, 0)
        with quiet_warnings(), sampling_bar("completing", not (self.quiet or self.json)) as on_step:
            made = model.sample(
                count,
                known=repeated,
                times=times,
                condition=self.label,
                seed=self.seed,
                batch_size=self.batch_size,
                on_step=on_step,
                **options,
            )
        drawn = made.data.unflatten(0, (len(known), self.samples))
        if suffix == ".txt":
            lines = texts(drawn.flatten(0, 1), form)
            files.write_bytes(self.out, ("\n\n".join(lines) + "\n").encode())
        elif suffix == ".npz":
            with files.replacing(self.out) as temporary, temporary.open("wb") as file:
                np.savez(file, known=known.numpy(), samples=drawn.numpy())
        else:
            self._draw(known, drawn, None if bool(whole.isnan().any()) else whole, form)
        values = {
            "out": str(self.out),
            "items": len(known),
            "samples": self.samples,
            "nfe": made.nfe,
            "seed": self.seed,
        }
        first = f"wrote {self.out}: {len(known)} items, {self.samples} completions of {made.nfe} evaluations each"
        return Result(values | {"seed": self.seed}, [first], model.config.use.format(run=self.model))

    def _times(self, form: Any, count: int) -> Any:
        """Times of the series of FILE, float64 (n, L): its own, or those that all series of the run have."""
        from osmose.data.arrays import load_times

        found = load_times(self.file, count)
        if found is None and not form.series.regular:
            raise UserError(f"FILE: {self.file} has no array times, and series of this run have times of their own")
        return form.some_times(count) if found is None else found

    def _draw(self, known: Any, drawn: Any, truth: Any, form: Any) -> None:
        """A row for each item: what is known, tinted where nothing is, the completions, and the truth if there is."""
        import torch

        from osmose.data.dataset import DataSpec
        from osmose.data.pictures import image_grid
        from osmose.training import files

        last = [] if truth is None else [truth[:, None]]
        rows = torch.cat([known.nan_to_num()[:, None], drawn, *last], 1)
        image = image_grid(rows.flatten(0, 1), form, columns=rows.shape[1]).convert("RGB")
        unknown = torch.zeros(len(rows), rows.shape[1], 1, *known.shape[2:])
        unknown[:, 0] = known.isnan().any(1, keepdim=True)
        mask = DataSpec(kind="image", shape=(1, *known.shape[2:]), range=(0, 1))
        where = image_grid(unknown.flatten(0, 1), mask, columns=rows.shape[1]).point(lambda value: 255 * (value > 200))
        image.paste(_TINT, mask=where)
        suffix = self.out.suffix.lower()
        with files.replacing(self.out) as temporary:
            image.save(temporary, format="jpeg" if suffix in (".jpg", ".jpeg") else suffix[1:])
