"""What training in blocks will be, decided before it begins: how many, of which layers, for which noise.

**Who owns which noise.** The law of training noise, log sigma ~ N(mean, std^2), is cut between sigma_min and sigma_max
into intervals of equal mass (or of equal length in log sigma, or in sigma). In training an interval is wider, by
`overlap` of its length in log sigma on each side; the outermost keep what the law has beyond their ends. In sampling
each sigma has one owner.

A stack of residual layers (dit, mlp) is cut into shorter ones, of which the first have the highest noise. Other
networks (a UNet) are not slices of anything: every block has one of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from osmose.configuration import Config, ConfigError
from osmose.errors import UserError
from osmose.gaussian.draws import mix
from osmose.gaussian.schedule import Level, VarianceExploding
from osmose.methods.diffusion import DiffusionConfig
from osmose.methods.times import LogNormalTimes
from osmose.networks.base import StackConfig
from osmose.training.config import RunConfig

Partition = Literal["equal-mass", "equal-log", "equal-sigma"]


class BlocksPlan(Config):
    """All that is decided before the first block is trained: blocks.json.

    Blocks are counted from the highest noise.
    """

    format: Literal["osmose-blocks-1"] = "osmose-blocks-1"
    count: int = Field(ge=1, description="B, the blocks")
    partition: Partition = Field("equal-mass", description="what intervals of noise are equal in")
    overlap: float = Field(0.05, ge=0, description="gamma: how much wider a block's noise is in training, on each side")
    split: tuple[int, ...] = Field((), description="layers of each block; equal if not given; of stacks alone")
    whole: RunConfig = Field(description="the run that is cut: what training from end to end would be")

    @model_validator(mode="after")
    def _can_be_cut(self) -> BlocksPlan:
        method, layers = self.method, self.layers
        if not isinstance(method.schedule, VarianceExploding) or not isinstance(method.times, LogNormalTimes):
            raise ConfigError("whole", "blocks share noise levels of edm: schedule ve and times log-normal")
        if method.times.lowest is not None or method.times.highest is not None:
            raise ConfigError("whole", "times.lowest and times.highest are what blocks are given")
        if layers is None and self.split:
            raise ConfigError("split", f"{method.network.kind} is no stack of layers; every block has a whole one")
        if layers is not None and self.count > layers:
            raise ConfigError("count", f"{self.count} blocks of {layers} layers; take at most as many")
        if layers is not None and not self.split and layers % self.count:
            raise ConfigError(
                "count", f"{layers} layers do not fall into {self.count} equal blocks; say split, or another depth"
            )
        if self.split and (len(self.split) != self.count or sum(self.split) != layers or min(self.split) < 1):
            raise ConfigError("split", f"{self.split} is not valid: {self.count} numbers from 1 whose sum is {layers}")
        return self

    @property
    def method(self) -> DiffusionConfig:
        """Of the whole run."""
        method = self.whole.method
        if not isinstance(method, DiffusionConfig):
            raise ConfigError("whole", f"{method.kind} has no blocks; edm has")
        return method

    @property
    def layers(self) -> int | None:
        """Of the whole network, where it is a stack; None where every block has a whole one."""
        network = self.method.network
        return network.depth if isinstance(network, StackConfig) else None

    def require(self, blocks: Sequence[int]) -> None:
        """Refuse blocks that there are not.

        Raises:
            UserError: naming the first.
        """
        for block in blocks:
            if not 0 <= block < self.count:
                raise UserError(f"only: there is no block {block}; they are 0 to {self.count - 1}")

    def edges(self) -> list[float]:
        """Where intervals of sigma meet, ascending, with both ends: B + 1 numbers."""
        schedule, law = self.method.schedule, self.method.times
        assert isinstance(schedule, VarianceExploding)
        assert isinstance(law, LogNormalTimes)
        low, high = schedule.sigma_min, schedule.sigma_max
        shares = [i / self.count for i in range(1, self.count)]
        if self.partition == "equal-mass":
            first, last = law.share_below(low), law.share_below(high)
            inner = [law.ratio_at(first + share * (last - first)) for share in shares]
        elif self.partition == "equal-log":
            inner = [low * (high / low) ** share for share in shares]
        else:
            inner = [low + share * (high - low) for share in shares]
        return [low, *inner, high]

    def interval(self, block: int) -> tuple[float, float]:
        """The sigmas that a block owns."""
        edges = self.edges()[::-1]
        return edges[block + 1], edges[block]

    def widened(self, block: int) -> tuple[float, float]:
        """The sigmas that a block is trained on: wider, and kept between sigma_min and sigma_max."""
        (low, high), edges = self.interval(block), self.edges()
        factor = (high / low) ** self.overlap
        return max(low / factor, edges[0]), min(high * factor, edges[-1])

    def member(self, block: int) -> RunConfig:
        """The run that trains a block. Of a single block it is the whole."""
        if self.count == 1:
            return self.whole
        method, (low, high) = self.method, self.widened(block)
        times = method.times.replace(
            lowest=None if block == self.count - 1 else low, highest=None if block == 0 else high
        )
        network = method.network
        if isinstance(network, StackConfig):
            network = network.replace(depth=self.split[block] if self.split else network.depth // self.count)
        return RunConfig.parse(
            self.whole.to_json()
            | {
                "method": method.to_json() | {"times": times.to_json(), "network": network.to_json()},
                # By itself a block draws nothing worth looking at.
                "training": self.whole.training.to_json() | {"preview_samples": 0},
                "seed": self.whole.seed if block == 0 else mix(self.whole.seed, "block", block),
            }
        )

    def merged(self) -> RunConfig:
        """The run of all blocks together."""
        if self.count == 1:
            return self.whole
        method = self.method
        parts = [self.member(block).method for block in range(self.count)]
        labels = [float(method.schedule.label(Level(0.0, 1.0, sigma))) for sigma in self.edges()[-2:0:-1]]
        network = {
            "kind": "experts",
            "parts": [part.network.to_json() for part in parts if isinstance(part, DiffusionConfig)],
            "edges": labels,
        }
        return RunConfig.parse(self.whole.to_json() | {"method": method.to_json() | {"network": network}})
