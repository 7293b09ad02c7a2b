"""Networks that share the labels of time among them: each answers for an interval of its own.

Of DiffusionBlocks (arXiv 2506.14202) they are the blocks. Nothing is shared: every part is a network with an input, an
embedding of time and a head of its own, and an item is seen by one of them alone.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from osmose.configuration import ConfigError
from osmose.networks import NETWORKS
from osmose.networks.base import NetworkConfig

PartChoice = Annotated[SerializeAsAny[NetworkConfig], BeforeValidator(NETWORKS.parse)]


class ExpertsConfig(NetworkConfig):
    """Networks, and the labels at which one takes over from the next."""

    kind: Literal["experts"] = "experts"
    parts: tuple[PartChoice, ...] = Field(min_length=1, description="that of the largest labels first")
    edges: tuple[float, ...] = Field((), description="labels between them, descending; an edge is the larger part's")
    owners: tuple[int, ...] | None = Field(
        None, description="which part answers in each interval between edges; null: one after the other"
    )

    @model_validator(mode="after")
    def _coherent(self) -> ExpertsConfig:
        if self.owners is None and len(self.edges) != len(self.parts) - 1:
            raise ConfigError("edges", f"{len(self.edges)} given for {len(self.parts)} parts; one less than parts")
        if self.owners is not None and len(self.owners) != len(self.edges) + 1:
            raise ConfigError("owners", f"{len(self.owners)} given for {len(self.edges)} edges; one more than edges")
        if self.owners is not None and set(self.owners) != set(range(len(self.parts))):
            raise ConfigError("owners", f"{self.owners} is not valid: has to name each of {len(self.parts)} parts")
        if any(not above > below for above, below in pairwise(self.edges)):
            raise ConfigError("edges", f"{self.edges} is not valid: have to descend")
        return self

    def build(self, event_shape: tuple[int, ...], *, num_classes: int | None = None, num_outputs: int = 1) -> nn.Module:
        parts = [part.build(event_shape, num_classes=num_classes, num_outputs=num_outputs) for part in self.parts]
        return Experts(parts, self.edges, self.owners)


class Experts(nn.Module):
    """See `ExpertsConfig`."""

    edges: Tensor
    owners: Tensor

    def __init__(self, parts: list[nn.Module], edges: tuple[float, ...], owners: tuple[int, ...] | None = None):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        order = torch.tensor(owners if owners is not None else range(len(parts)))
        self.register_buffer("owners", order, persistent=False)
        # Ascending, so that the place of a label counts parts from the last.
        self.register_buffer("edges", torch.tensor(edges[::-1], dtype=torch.float32), persistent=False)

    def owner(self, label: Tensor) -> Tensor:
        """Which part answers for each label, int64 (B,)."""
        return self.owners[len(self.edges) - torch.bucketize(label.float(), self.edges, right=True)]

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        """X (B, *event), label (B,), condition (B,) or None -> (B, outputs, ...)."""
        owner = self.owner(label)
        present = owner.unique().tolist()
        if len(present) <= 1:  # as always in sampling; none of no items
            whole: Tensor = self.parts[present[0] if present else 0](x, label, condition)
            return whole
        result: Tensor | None = None
        for index in present:
            rows = (owner == index).nonzero()[:, 0]
            out = self.parts[index](x[rows], label[rows], None if condition is None else condition[rows])
            result = out.new_zeros(len(x), *out.shape[1:]) if result is None else result
            result = result.index_copy(0, rows, out)
        assert result is not None
        return result
