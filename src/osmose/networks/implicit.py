r"""A coordinate MLP that becomes the denoiser of one input by being fitted to it (arXiv 2303.00800).

n_psi(p, t) is a value at the coordinates p in [-1, 1]^d; it never sees the input x. Instead, of each input, psi takes K
steps of gradient descent from what is shared, on the noisy reconstruction

    l(psi) = mean over values of (W (n_psi - x))^2,      psi <- psi - rate clip(grad l, -1, 1),

and what n_psi then says is the output. W is the identity, or what `whiten` is set to: a model of functions weighs modes
by the inverse of their noise. The training loss is differentiated through these steps, to second order; with
`first_order` their gradients count as constants, which is cheaper and another method.

A layer is z <- sin(w0 z) exp(-envelope z^2) of an affine map, with the network's input besides its output. w0 has to
suit the grid: 30 (published, for images) is too fast for 32 points.

Fitted are all weights (`adapt=weights`, the published code), each input with a copy of its own, or one shift for each
unit (`adapt=modulation`, the published paper), with shared weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from osmose.configuration import ConfigError
from osmose.errors import UserError
from osmose.networks.base import Differentiating, Everywhere, NetworkConfig, coordinates
from osmose.networks.layers import Classes


class ImplicitConfig(NetworkConfig):
    """Coordinate MLP with inner gradient steps; the defaults suit small grids and a CPU, not the published sizes."""

    kind: Literal["implicit"] = "implicit"
    width: int = Field(64, ge=1)
    depth: int = Field(3, ge=1, description="hidden layers")
    w0: float = Field(10.0, gt=0, description="frequency of the activation; published: 30")
    envelope: float = Field(1.0, ge=0, description="of the activation, exp(-envelope z^2); published: 10")
    inner_steps: int = Field(3, ge=0, description="K; each costs about as much as a training step without any")
    inner_lr: float = Field(0.05, gt=0, description="rate of the inner steps; with meta_sgd the largest at the start")
    meta_sgd: bool = Field(True, description="learn a rate in [0, 1] for everything that is adapted")
    first_order: bool = Field(False, description="take the inner gradients for constants")
    adapt: Literal["weights", "modulation"] = Field("weights", description="what the inner steps change")
    y_input: bool = Field(
        False, description="tell the network the input at its point as well; makes the inner steps idle, as published"
    )
    chunk: int = Field(32, ge=1, description="inputs that are fitted at a time; memory is that of as many copies")

    @model_validator(mode="after")
    def _sees_the_input(self) -> ImplicitConfig:
        if not self.inner_steps and not self.y_input:
            raise ConfigError("inner_steps", "0 without y_input never sees the input; take at least 1, or y_input=true")
        return self

    def build(self, event_shape: tuple[int, ...], *, num_classes: int | None = None, num_outputs: int = 1) -> nn.Module:
        return Implicit(self, event_shape, num_classes, num_outputs)


class _Field(nn.Module):
    """n_psi: inputs (P, d_in) of points to values (P, outputs)."""

    def __init__(self, config: ImplicitConfig, inputs: int, outputs: int):
        super().__init__()
        self.w0, self.envelope = config.w0, config.envelope
        sizes = [inputs] + [config.width + inputs] * config.depth
        self.layers = nn.ModuleList(nn.Linear(size, config.width) for size in sizes[:-1])
        self.head = nn.Linear(sizes[-1], outputs)
        self.shifts = nn.Parameter(torch.zeros(config.depth, config.width)) if config.adapt == "modulation" else None
        for index, layer in enumerate([*self.layers, self.head]):
            assert isinstance(layer, nn.Linear)
            bound = 1 / inputs if index == 0 else math.sqrt(6 / layer.in_features) / config.w0
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)

    def forward(self, inputs: Tensor, first: Tensor | None = None) -> Tensor:
        """`first` (width,) is added before the activation of the first layer."""
        h = inputs
        for index, layer in enumerate(self.layers):
            z = layer(h)
            if self.shifts is not None:
                z = z + self.shifts[index]
            if first is not None and index == 0:
                z = z + first
            h = torch.cat([(self.w0 * z).sin() * (-self.envelope * z.square()).exp(), inputs], -1)
        out: Tensor = self.head(h)
        return out


class Implicit(nn.Module, Everywhere, Differentiating):
    """See `ImplicitConfig`.

    Attributes:
        whiten: W, a linear map of values (outputs, *grid) of one input, on whatever grid they are.

    Raises:
        UserError: flat events.
    """

    def __init__(
        self, config: ImplicitConfig, event_shape: tuple[int, ...], num_classes: int | None = None, num_outputs: int = 1
    ):
        super().__init__()
        if len(event_shape) < 2:
            raise UserError(
                f"network: an implicit one needs values on a grid (channels, points ...), not events of {event_shape}"
            )
        if num_outputs > 1:
            raise UserError(f"network: implicit is fitted to its input, and has one output; {num_outputs} asked for")
        self.config, self.event_shape = config, tuple(event_shape)
        channels, axes = event_shape[0], len(event_shape) - 1
        self.field = _Field(config, axes + 1 + (channels if config.y_input else 0), channels)
        self.classes = Classes(num_classes, config.width) if num_classes else None
        if self.classes is not None:
            nn.init.zeros_(self.classes.weight)
        self.rates = nn.ParameterDict()
        if config.meta_sgd:
            for name, value in self._own().items():
                start = torch.empty_like(value).uniform_(config.inner_lr / 20, config.inner_lr)
                self.rates[name.replace(".", "/")] = nn.Parameter(start)
        self.whiten: Callable[[Tensor], Tensor] = _same

    def _own(self) -> dict[str, Tensor]:
        """What the inner steps change, as it is shared."""
        names = dict(self.field.named_parameters())
        return {"shifts": names["shifts"]} if self.config.adapt == "modulation" else dict(names)

    def forward(
        self, x: Tensor, label: Tensor, condition: Tensor | None = None, points: Tensor | None = None
    ) -> Tensor:
        """X (B, C, *grid), label (B,), condition (B,) or None -> (B, C, *grid); or (B, C, P) at points (P, d).

        Raises:
            UserError: another number of channels or axes; points, which are in [0, 1], for a network with `y_input`,
                which knows no input there.
        """
        if points is not None and self.config.y_input:
            raise UserError("points: a network with y_input is told its input at each, and has it on its grid alone")
        if x.ndim != len(self.event_shape) + 1 or x.shape[1] != self.event_shape[0]:
            raise UserError(f"network: built for events {self.event_shape}; {tuple(x.shape[1:])} given")
        # Samplers work in inference mode, in which nothing has a gradient.
        outside = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(outside):  # inner steps take their gradients anyway
            if x.is_inference():
                x, label = x.clone(), label.clone()
                condition = None if condition is None else condition.clone()
            own = (2 * coordinates(tuple(x.shape[2:]), self.offset) - 1).to(x)
            asked = None if points is None else (2 * points - 1).to(x)
            told = [x, label.to(x) / 500 - 1]
            if self.classes is not None and condition is not None:
                told.append(self.classes(condition))

            def fitted(x: Tensor, time: Tensor, first: Tensor | None = None) -> Tensor:
                return self._fitted(own, asked, x, time, first)

            out: Tensor = vmap(fitted, chunk_size=self.config.chunk)(*told)
            return out

    def _fitted(self, points: Tensor, asked: Tensor | None, x: Tensor, time: Tensor, first: Tensor | None) -> Tensor:
        """What the network says, fitted to one input (C, *grid) at its points: there, or where it is asked."""
        config = self.config
        inputs = torch.cat([points, time.expand(len(points), 1)], 1)
        if config.y_input:
            inputs = torch.cat([inputs, x.flatten(1).T], 1)

        def values(own: dict[str, Tensor]) -> Tensor:
            out = functional_call(self.field, own, (inputs, first))
            return out.T.reshape(x.shape)

        own = self._own()
        for _ in range(config.inner_steps):
            slopes = grad(lambda own: self.whiten(values(own) - x).square().mean())(own)
            if config.first_order:
                slopes = {name: slope.detach() for name, slope in slopes.items()}
            own = {name: value - self._rate(name) * slopes[name].clamp(-1, 1) for name, value in own.items()}
        if asked is None:
            return values(own)
        elsewhere: Tensor = functional_call(self.field, own, (torch.cat([asked, time.expand(len(asked), 1)], 1), first))
        return elsewhere.T

    def _rate(self, name: str) -> Tensor | float:
        return self.rates[name.replace(".", "/")].clamp(0, 1) if self.config.meta_sgd else self.config.inner_lr


def _same(x: Tensor) -> Tensor:
    return x
