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
from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field, model_validator

from osmose.configuration import Config, ConfigError
from osmose.errors import UserError
from osmose.gaussian.draws import mix
from osmose.methods.sharing import Partition, Shareable
from osmose.networks.base import StackConfig
from osmose.training.config import RunConfig

if TYPE_CHECKING:
    from osmose.methods.base import MethodConfig

    class ShareableMethod(MethodConfig, Shareable):
        """A method's configuration whose noise can be shared out."""


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
        try:
            method.require_whole()
            method.edges(1, self.partition)
        except ConfigError as error:
            raise ConfigError(error.path or "whole", error.reason) from None
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
    def method(self) -> ShareableMethod:
        """Of the whole run."""
        method = self.whole.method
        if not isinstance(method, Shareable):
            raise ConfigError("whole", f"{method.kind} has no blocks; edm, masked and token-diffusion have")
        return cast("ShareableMethod", method)

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
        """Where intervals of noise meet, ascending, with both ends: B + 1 numbers."""
        return self.method.edges(self.count, self.partition)

    def interval(self, block: int) -> tuple[float, float]:
        """What a block owns, of sigma or of what the method has in its place."""
        edges = self.edges()[::-1]
        return edges[block + 1], edges[block]

    def widened(self, block: int) -> tuple[float, float]:
        """What a block is trained on: wider, and kept between the ends."""
        edges = self.edges()
        low, high = self.method.widened(*self.interval(block), self.overlap)
        return max(low, edges[0]), min(high, edges[-1])

    def member(self, block: int) -> RunConfig:
        """The run that trains a block. Of a single block it is the whole."""
        if self.count == 1:
            return self.whole
        method, (low, high) = self.method, self.widened(block)
        limits = method.restricted(None if block == self.count - 1 else low, None if block == 0 else high)
        network = method.network
        if isinstance(network, StackConfig):
            network = network.replace(depth=self.split[block] if self.split else network.depth // self.count)
        return RunConfig.parse(
            self.whole.to_json()
            | {
                "method": method.to_json() | limits | {"network": network.to_json()},
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
        labels = [method.label_at(edge) for edge in self.edges()[-2:0:-1]]
        network = {
            "kind": "experts",
            "parts": [part.network.to_json() for part in parts if isinstance(part, Shareable)],
            "edges": labels,
        }
        return RunConfig.parse(self.whole.to_json() | {"method": method.to_json() | {"network": network}})
