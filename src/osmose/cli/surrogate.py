"""`osmose surrogate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, Suppress, arg

from osmose.cli.command import Result, quiet_warnings, sampling_options
from osmose.errors import UserError
from osmose.training.progress import sampling_bar

if TYPE_CHECKING:
    from osmose.acceleration.surrogate import Pair
    from osmose.data.dataset import Dataset


@dataclass
class Surrogate:
    """Start a diffusion in the middle: rough samples of something cheap, noised to t_mid and finished by the diffusion.

    The surrogate is another run on the same data (gaussian, class-means, vae, flow, sngan, or a diffusion), a diffusion
    on the same images made smaller (train --downsample 2), or an .npz of samples. Nothing is trained; the result is a
    run of its own, which samples with the steps of the chain that lie below t_mid. `osmose analyze surrogate` shows
    what each t_mid costs and gives.
    """

    model: Annotated[Positional[Path], arg(metavar="RUN", help="a run folder of ddpm, iddpm or edm")]
    partner: Annotated[Path | None, arg(name="with", metavar="RUN2|FILE.npz", help="the surrogate; required")] = None
    t_mid: Annotated[
        str, arg(help="where to enter the chain: a time from 0 (data) to 1 (noise), a step number above 1, or auto")
    ] = "0.5"
    out: Annotated[Path | None, arg(metavar="RUN3", help="the run folder to make; required")] = None
    steps: Annotated[int | None, arg(help="solver steps of the whole chain; as in RUN if not given")] = None
    solver: Annotated[str | None, arg(help="ancestral, ddim, heun or dpmpp-2m; as in RUN if not given")] = None
    threshold: Annotated[
        float | None,
        arg(help="for auto: distance that passes for data, in distances between real data; 2 if not given"),
    ] = None
    num: Annotated[int | None, arg(aliases=["-n"], help="for auto: samples to compare; 500 if not given")] = None
    data_root: Annotated[Path | None, arg(help="for auto: where the data lie, if not where the run found them")] = None
    seed: Annotated[int, arg(help="for auto: of the samples that are compared")] = 0
    device: Annotated[str, arg(help="for auto: cpu, cuda or mps; auto takes the fastest there is")] = "auto"
    threads: Annotated[int | None, arg(help="for auto: CPU threads; all cores if not given")] = None
    quiet: Annotated[bool, arg(help="no progress")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False
    overrides: Suppress[dict[str, Any]] = field(default_factory=dict)

    def run(self) -> Result:
        """Put together, choose, write."""
        if self.out is None:
            raise UserError("--out: required: the run folder to make")
        auto = self.t_mid == "auto"
        for name in ("threshold", "num", "data_root"):
            if not auto and getattr(self, name) is not None:
                raise UserError(f"--{name.replace('_', '-')}: is for --t-mid auto alone")
        import torch

        from osmose.acceleration.hand_over import THRESHOLD, choose, hand_overs, times_for
        from osmose.cli.devices import device
        from osmose.training.run import require_free

        require_free(self.out)
        pair = opened(self.model, self.partner, self.overrides, self.steps, self.solver)
        lines, values = [], {}
        if auto:
            threshold = THRESHOLD if self.threshold is None else positive("threshold", self.threshold)
            n = min(500, pair.model.most or 500) if self.num is None else self.num
            if self.threads is not None:
                torch.set_num_threads(int(positive("threads", self.threads)))
            pair.model.to(device(self.device))
            data, times = real_data(pair, self.data_root), times_for(pair)
            with quiet_warnings(), sampling_bar("comparing", not (self.quiet or self.json)) as on_step:
                found = hand_overs(pair, data, times, n=n, seed=self.seed, on_step=on_step)
            chosen = choose(found, threshold)
            if chosen is None:
                last = found[-1]
                raise UserError(
                    "--t-mid: auto finds no time from which the surrogate passes for data: at the last, "
                    f"{last.t_mid:g}, its distance is {last.distance:.3g} where that of data is {last.floor:.3g}; "
                    "raise --threshold"
                )
            at = next(one for one in found if one.t_mid == chosen)
            lines.append(
                f"t_mid = {chosen:g}: there and above, the surrogate is at most {threshold:g} times as far from data "
                f"as data are ({at.distance:.3g} against {at.floor:.3g}, n = {n})"
            )
            values = {"hand_overs": [vars(one) for one in found], "threshold": threshold}
        else:
            chosen = time_of(self.t_mid, pair, ", or auto")
        pair.replace(t_mid=chosen)
        made = pair.write(self.out)
        sampling = pair.config.method.sampling
        lines.append(f"wrote {made.folder}: {described(pair, chosen)}")
        return Result(
            {"out": str(made.folder), "t_mid": chosen, "sampling": sampling.to_json(), **values},
            lines,
            f"osmose compare {self.model} {made.folder} --out comparison",
        )


def opened(run: Path, partner: Path | None, overrides: dict[str, Any], steps: int | None, solver: str | None) -> Pair:
    """The pair that the arguments name."""
    if partner is None:
        raise UserError("--with: required: the surrogate, a run folder or an .npz of samples")
    from osmose.acceleration.surrogate import Pair

    return Pair(run, partner, **sampling_options(overrides, num_steps=steps, solver=solver))


def real_data(pair: Pair, root: Path | None) -> Dataset:
    """The data of the pair."""
    from osmose.training.run import data_of

    with quiet_warnings():
        return data_of(pair.run, root)


def time_of(text: str, pair: Pair, other: str = "") -> float:
    """A time of entry from what the user wrote: a time, or a step number where it is above 1.

    Raises:
        UserError: neither; `other` says what else would have been right.
    """
    try:
        value = float(text)
    except ValueError:
        right = f"a time from 0 to 1, or a step number{other}"
        raise UserError(f"--t-mid: {text!r} is not valid: should be {right}") from None
    if not value > 1:
        return value
    total = pair.model.chain.schedule.native_steps
    if total is None:
        raise UserError(f"--t-mid: {text} is not valid: the chain has no step numbers; give a time from 0 to 1")
    if value > total or value != int(value):
        raise UserError(f"--t-mid: {text} is not valid: should be a time from 0 to 1, or a step number up to {total}")
    return value / total


def positive(name: str, value: float) -> float:
    """The value, which must be above 0."""
    if not 0 < value < float("inf"):
        raise UserError(f"--{name}: {value} is not valid: must be above 0")
    return value


def described(pair: Pair, t: float) -> str:
    """What the pair does, in words."""
    generator, chain = pair.model.config.generator, pair.model.chain
    if t == 0:
        return f"the samples of {generator.origin}, and no step of the chain"
    sampling = pair.model.sampling(t_mid=t)
    level = chain.entry(t, sampling)
    total = chain.schedule.native_steps
    place = f" (step {round(level.t * total)} of {total})" if total else ""
    left = pair.model.generator.left_at(level, sampling)
    handed = f", left at t = {left.t:.4g} of their own chain," if left else ""
    return (
        f"samples of {generator.origin}{handed} enter the chain of {pair.name} at t = {level.t:.4g}{place}, where "
        f"sigma / alpha is {level.sigma / level.alpha if level.alpha else float('inf'):.3g}"
    )
