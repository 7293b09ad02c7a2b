"""From a diffusion run and something cheaper to a run that starts its chain in the middle (`methods.surrogate`)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.methods.base import MethodConfig
from osmose.methods.surrogate import LowResolutionSource, RunSource, Source, StoredSource, Surrogate, SurrogateConfig
from osmose.metrics.admission import admit, read_samples
from osmose.training import files
from osmose.training.config import RunConfig
from osmose.training.run import Run, load_weights, require_free


class Pair:
    """A diffusion run and a surrogate that fit each other, put together but not written yet.

    Args:
        run: the diffusion.
        partner: a run folder, or an .npz of samples in data units.
        **sampling: of the pair's sampling configuration: `t_mid` (1 if not said), `num_steps`, `solver`, `spacing`,
            `clip`; what is not said is as in `run`.

    Attributes:
        name: of the diffusion's folder.
        config: of the run that `write` makes.
        model: the pair, with its weights, in evaluation mode.

    Raises:
        UserError: runs on different data or of other shapes, a diffusion without a chain, samples of the wrong shape or
            units, options that are refused; the message names both sides.
    """

    def __init__(self, run: Run | Path | str, partner: Path | str, **sampling: Any):
        self.run = run if isinstance(run, Run) else Run.open(run)
        self.name = self.run.folder.resolve().name
        partner = Path(partner)
        weights = {f"chain.{name}": value for name, value in _weights(self.run).items()}
        if partner.is_file() and partner.suffix != ".npz":
            raise UserError(f"--with: {partner} is neither a run folder nor an .npz of samples")
        if partner.suffix == ".npz":
            source, more = _stored(partner, self.run.config.spec)
            weights["generator.samples"] = more
        else:
            other = Run.open(partner)
            weights |= {f"generator.model.{name}": value for name, value in _weights(other).items()}
            source = _source(self.run, other)
        self._require_same_condition(partner, getattr(source, "method", None))
        self.weights = weights
        self.config = self._config(source, sampling)
        with torch.random.fork_rng(devices=[]):
            try:
                model = self.config.method.build(self.config.spec)
            except UserError as error:
                hint = "; RUN is the diffusion, and --with names the surrogate" if "be entered" in str(error) else ""
                raise UserError(f"{error}{hint}") from None
        assert isinstance(model, Surrogate)
        load_weights(model, weights, partner)
        self.model: Surrogate = model.eval()

    def _require_same_condition(self, partner: Path, method: MethodConfig | None) -> None:
        """Refuse a pair of which one is told classes and the other is not.

        Raises:
            UserError: naming both, and the way out.
        """
        ours, theirs = self.run.config.method.conditional, method is not None and method.conditional
        if ours == theirs:
            return
        told, not_told = (self.run.folder, partner) if ours else (partner, self.run.folder)
        way = "train both with --conditional, or neither"
        if method is None:
            way = "stored samples go with a run that was trained without --conditional"
        raise UserError(f"--with: {told} is told the class of each sample and {not_told} is not; {way}")

    def _config(self, source: Source, sampling: Mapping[str, Any]) -> RunConfig:
        config = self.run.config
        own = config.method.sampling.to_json()
        method = SurrogateConfig.parse(
            {
                "chain": config.method.to_json(),
                "generator": source.to_json(),
                "conditional": config.method.conditional,
                "sampling": own if "num_steps" in own else {},  # a method without a chain is refused when it is built
            }
        )
        said = {f"sampling.{name}": value for name, value in sampling.items() if value is not None}
        method = method.replace(**said)
        changed: RunConfig = config.model_copy(update={"method": method, "parent": self.run.as_parent()})
        return changed

    def replace(self, **sampling: Any) -> None:
        """Change how the pair samples (`t_mid=0.3`).

        Raises:
            UserError: a value that is refused.
        """
        self.model.sampling(**sampling)
        method = self.config.method.replace(**{f"sampling.{name}": value for name, value in sampling.items()})
        self.config = self.config.model_copy(update={"method": method})
        self.model.config = method

    def write(self, out: Path | str) -> Run:
        """Make the run folder, in one step.

        Raises:
            UserError: there is something at `out` already, or it cannot be written.
        """
        out = Path(out)
        require_free(out)
        if out.is_dir():
            out.rmdir()  # empty: a folder cannot take the place of another on every system
        with files.replacing(out) as temporary:
            Run.create(temporary, self.config).write_weights(self.weights)
        return Run.open(out)


def surrogate(run: Run | Path | str, partner: Path | str, out: Path | str, *, t_mid: float, **sampling: Any) -> Run:
    """Put a diffusion run and a surrogate together in a new run folder; see `Pair`.

    Raises:
        UserError: as `Pair`; nothing has been written then.
    """
    require_free(Path(out))
    return Pair(run, partner, t_mid=t_mid, **sampling).write(out)


def _weights(run: Run) -> dict[str, Tensor]:
    run.model()  # refuses a folder without weights, or with others
    return files.read_tensors(run.weights)


def _source(run: Run, other: Run) -> Source:
    """The kind of source that another run is for `run`.

    Raises:
        UserError: data, shape or range differ; both are named.
    """
    ours, theirs = run.config, other.config
    origin = {"origin": other.folder.resolve().name, "sha256": other.hash()}
    if theirs.identity.sha256 == ours.identity.sha256:
        return RunSource.parse({"method": theirs.method.to_json(), **origin})
    small, large = theirs.data.downsample, ours.data.downsample
    factor = (small or 1) // (large or 1)
    if factor > 1 and theirs.identity.full_sha256 == (ours.identity.full_sha256 or ours.identity.sha256):
        spec = theirs.spec.to_json()
        values = {"method": theirs.method.to_json(), "spec": spec, "factor": factor}
        return LowResolutionSource.parse({**values, **origin})
    for name, here, there in (
        ("source", ours.identity.source, theirs.identity.source),
        ("shape", ours.spec.shape, theirs.spec.shape),
        ("range", ours.spec.range, theirs.spec.range),
    ):
        if here != there:
            raise UserError(
                f"--with: {other.folder} was trained on data of another {name}, {there}, than {run.folder}, {here}"
            )
    raise UserError(f"--with: {other.folder} was trained on other data than {run.folder} (their hashes differ)")


def _stored(path: Path, spec: DataSpec) -> tuple[Source, Tensor]:
    """Samples of a file as a source, and the samples.

    Raises:
        UserError: unreadable, of the wrong shape, units or range, or with NaN.
    """
    content = np.ascontiguousarray(read_samples(path))
    try:
        samples = admit(torch.from_numpy(content), spec).float()
    except UserError as error:
        raise UserError(f"--with: {path}: {error}") from None
    sha256 = hashlib.sha256(content.tobytes()).hexdigest()
    return StoredSource(origin=path.name, sha256=sha256, count=len(samples)), samples
