r"""The Schroedinger bridge: the process of least energy between two laws (arXiv 2303.08797, section 5.2).

Of all processes dX = u dt + sqrt(2 epsilon) dW between the two laws it has the least int E|u|^2 dt. It is the saddle
point

    max over I, min over u of  int E[ |u|^2 / 2 - (I' + (gamma' - epsilon / gamma) z) . u ] dt

with x0, x1 and z independent, where u = b + epsilon s of the path I for any I. So b and s are learned by their losses
(in `between`), on a path that a second network bends so that their u has less energy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.draws import Draws
from osmose.gaussian.parametrization import column
from osmose.interpolants.fields import Fields
from osmose.interpolants.transport import Epsilon, FieldsAt
from osmose.methods.between import Between, Learned, Meeting, PathConfig, PathSampling
from osmose.methods.messages import Batch, LossTerms
from osmose.networks.presets import network_for

#: Functions of time that a bridge's path is bent by, an even number.
_BENDS = 4
#: The path has to follow more slowly than the fields, which have to be those of the path: at the same rate both turn
#: around the saddle point.
_PACE = 0.2


class BridgeSampling(PathSampling):
    """How samples are carried along a bridge."""

    epsilon: float | None = Field(None, ge=0, description="noise of the SDE; null is the bridge's own, 0 the ODE")


class BridgeConfig(PathConfig):
    """The process of least energy between two laws, among all with one noise."""

    kind: Literal["bridge"] = "bridge"
    epsilon: float = Field(0.5, ge=0, description="noise of the process, sqrt(2 epsilon) dW; 0 is optimal transport")
    sampling: BridgeSampling = BridgeSampling()

    @classmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:  # noqa: ARG003
        return {"network": network_for(spec.shape), "path": {"kind": "linear"}}

    @property
    def learned(self) -> Learned:
        """Both fields of which u is the sum: a denoiser would be divided by gamma."""
        return "b-s"

    def build(self, spec: DataSpec) -> Bridge:
        return Bridge(self, spec)


class Bridge(Between):
    """The fields of a path that is bent towards the bridge.

    The bend is t (1 - t) sum_k P_k(2 t - 1) f_k(x0, x1) with Legendre polynomials P_k, so that its slope is exact and
    both ends stay where they are.

    Attributes:
        bend: a network of the kind of `network`, told (x0, x1) below each other; its outputs are the f_k.
    """

    config: BridgeConfig

    def __init__(self, config: BridgeConfig, spec: DataSpec):
        super().__init__(config, spec)
        path = config.path
        if spec.paired:
            raise UserError("data.paired: true is not for a bridge, whose ends are drawn independently of each other")
        if path.one_sided or path.mirror or not path.noisy:
            raise UserError(
                f"path: {path.kind} cannot become a bridge, which needs two ends that do not depend on each other, and "
                "noise between them; take linear"
            )
        both, classes = (2 * spec.shape[0], *spec.shape[1:]), spec.num_classes if config.conditional else None
        self.bend = config.network.build(both, num_classes=classes, num_outputs=_BENDS // 2)

    @property
    def not_compiled(self) -> str:
        return "the path of a bridge is bent by the gradient of its field in x_t; take training.compile=false"

    def networks(self) -> list[nn.Module]:
        return [self.network, self.bend]

    def _bent(self, meeting: Meeting) -> Meeting:
        """The same meeting on the bent path."""
        ends = torch.cat([meeting.x0, meeting.x1], dim=1)
        outs = self.bend(ends, torch.zeros(len(ends), device=ends.device), meeting.condition).float()
        place, slope = meeting.place, meeting.slope
        shape, slopes = _bends(meeting.t)
        for k, out in enumerate(outs.chunk(_BENDS, dim=1)):
            place = place + column(_PACE * shape[k], out) * out
            slope = slope + column(_PACE * slopes[k], out) * out
        return meeting._replace(place=place, slope=slope)

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:
        bent = self._bent(self._meet(batch, draws))
        parts = self._regress(bent._replace(place=bent.place.detach(), slope=bent.slope.detach()))
        energy = -2 * self._objective(bent)
        total = torch.stack(list(parts.values())).sum(0) + energy / 2
        return LossTerms(total, bent.t, {name: part.detach() for name, part in (parts | {"energy": energy}).items()})

    def _objective(self, bent: Meeting) -> Tensor:
        """|u|^2 / 2 - (I' + (gamma' - epsilon / gamma) z) . u, a mean over values and both signs of z, (B,).

        At its minimum in u it is -E|u|^2 / 2. Only the path gets its gradient.
        """
        epsilon, c = self.config.epsilon, bent.c
        with _still(self.network):
            b, s = (out.chunk(len(bent.signs)) for out in self._outputs_at(bent))
        push = column((c.gamma_gamma_dot - epsilon) / c.gamma, bent.z) * bent.z
        values = []
        for sign, one, other in zip(bent.signs, b, s, strict=True):
            u = one + epsilon * other
            values.append(u.square() / 2 - (bent.slope + sign * push) * u)
        return torch.stack(values).flatten(2).mean((0, 2))

    def fields_at(self, condition: Tensor | None = None) -> FieldsAt:
        straight = super().fields_at(condition)

        def at(t: float, x: Tensor) -> Fields:
            fields = straight(t, x)
            # Of a bent path the ends do not follow from b and s.
            return Fields(fields.b, fields.s, fields.eta)

        return at

    def _noise(self, sampling: PathSampling) -> tuple[Epsilon, bool]:
        assert isinstance(sampling, BridgeSampling)
        return Epsilon(self.config.epsilon if sampling.epsilon is None else sampling.epsilon), False


def _bends(t: Tensor) -> tuple[Tensor, Tensor]:
    """The bends t (1 - t) P_k(2 t - 1) and their slopes for k = 0, 1, ..., each (_BENDS, B), float64."""
    u, form = 2 * t - 1, (t * (1 - t), 1 - 2 * t)
    values, slopes = [torch.ones_like(u), u], [torch.zeros_like(u), 2 * torch.ones_like(u)]
    for k in range(1, _BENDS - 1):
        values.append(((2 * k + 1) * u * values[k] - k * values[k - 1]) / (k + 1))
        slopes.append(((2 * k + 1) * (2 * values[k] + u * slopes[k]) - k * slopes[k - 1]) / (k + 1))
    value, slope = torch.stack(values), torch.stack(slopes)
    return form[0] * value, form[1] * value + form[0] * slope


@contextmanager
def _still(network: nn.Module) -> Iterator[None]:
    """What is computed inside has no gradient in the network's parameters."""
    wanting = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
