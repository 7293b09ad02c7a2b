"""Methods whose noise can be shared out among networks that are trained apart: DiffusionBlocks, arXiv 2506.14202.

A method has a coordinate of noise that rises from the data on: sigma, or the time. It says where it is cut into
intervals, what learning one of them alone is, and the label of its network at an edge.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

from osmose.configuration import ConfigError
from osmose.gaussian.schedule import Level, VarianceExploding
from osmose.methods.times import LogNormalTimes
from osmose.networks.base import NetworkConfig

Partition = Literal["equal-mass", "equal-log", "equal-sigma"]


class Shareable(ABC):
    """What a method's configuration has where its noise can be shared out."""

    if TYPE_CHECKING:  # not for pydantic, which would take it for a field of its own
        network: NetworkConfig

    @abstractmethod
    def require_whole(self) -> None:
        """Refuse a configuration whose noise is limited already, or has no law that could be cut.

        Raises:
            ConfigError: naming the field.
        """

    @abstractmethod
    def edges(self, count: int, partition: Partition) -> list[float]:
        """Where so many intervals meet, ascending, with both ends: count + 1 numbers.

        Raises:
            ConfigError: a partition that is none of this coordinate.
        """

    @abstractmethod
    def widened(self, low: float, high: float, share: float) -> tuple[float, float]:
        """An interval that is wider by a share of its length on each side, without limits."""

    @abstractmethod
    def restricted(self, lowest: float | None, highest: float | None) -> dict[str, Any]:
        """Fields of the configuration that learns what lies between, and beyond the ends that are not given."""

    @abstractmethod
    def label_at(self, edge: float) -> float:
        """The label of the network at a place of the coordinate."""


class SharedSigma(Shareable):
    """Of Gaussian noise whose logarithm is normal: intervals of sigma, whose length is that of log sigma."""

    if TYPE_CHECKING:
        schedule: Any
        times: Any

    def _law(self) -> tuple[VarianceExploding, LogNormalTimes]:
        if not isinstance(self.schedule, VarianceExploding) or not isinstance(self.times, LogNormalTimes):
            raise ConfigError("", "blocks share noise levels of edm: schedule ve and times log-normal")
        return self.schedule, self.times

    def require_whole(self) -> None:
        _, law = self._law()
        if law.lowest is not None or law.highest is not None:
            raise ConfigError("", "times.lowest and times.highest are what blocks are given")

    def edges(self, count: int, partition: Partition) -> list[float]:
        schedule, law = self._law()
        low, high = schedule.sigma_min, schedule.sigma_max
        shares = [i / count for i in range(1, count)]
        if partition == "equal-mass":
            first, last = law.share_below(low), law.share_below(high)
            inner = [law.ratio_at(first + share * (last - first)) for share in shares]
        elif partition == "equal-log":
            inner = [low * (high / low) ** share for share in shares]
        else:
            inner = [low + share * (high - low) for share in shares]
        return [low, *inner, high]

    def widened(self, low: float, high: float, share: float) -> tuple[float, float]:
        factor = (high / low) ** share
        return low / factor, high * factor

    def restricted(self, lowest: float | None, highest: float | None) -> dict[str, Any]:
        _, law = self._law()
        return {"times": law.replace(lowest=lowest, highest=highest).to_json()}

    def label_at(self, edge: float) -> float:
        schedule, _ = self._law()
        return float(schedule.label(Level(0.0, 1.0, edge)))
