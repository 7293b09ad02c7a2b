"""Derivatives of fields on noisy data: divergences, whole Jacobians, and products with them.

A field maps a batch (B, *event) to a batch of the same shape, each item by itself. All derivatives are taken in reverse
mode, which every network of torch has; those that fuse attention are computed without the fusion, which has no second
derivative. They may be called in inference mode.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from osmose.errors import UserError

Field = Callable[[Tensor], Tensor]

#: Values of an event up to which traces and Jacobians are exact when nothing is said.
EXACT = 64
#: Values of an event up to which a whole Jacobian is computed: one backward pass for each, and D x D numbers an item.
MOST = 1024


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Where derivatives may be taken, whatever the caller's mode, twice too."""
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def signs_like(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random signs for Hutchinson's estimates, (count, *x.shape), drawn on the CPU.

    Raises:
        UserError: none are asked for.
    """
    if count < 1:
        raise UserError(f"probes: {count} is not valid: Hutchinson's estimate needs at least 1")
    drawn = torch.randint(0, 2, (count, *x.shape), generator=generator)
    return (2 * drawn - 1).to(x)


def probes_for(asked: int | Literal["exact"] | None, dimension: int, usual: int) -> int | None:
    """How many of Hutchinson's probes to take; None for exact traces and whole Jacobians.

    Args:
        asked: a number, "exact", or None: exact up to `EXACT` values an item, and `usual` beyond.
        dimension: values in an item.
        usual: probes.

    Raises:
        UserError: no probes, or an item that is too large to be exact; the message says the limit and what to use.
    """
    if asked == "exact":
        require_exact(dimension)
        return None
    if asked is None:
        return None if dimension <= EXACT else usual
    if asked < 1:
        raise UserError(f"probes: {asked} is not valid: must be at least 1, or exact")
    return asked


def require_exact(dimension: int) -> None:
    """Refuse a Jacobian that is too large to be computed.

    Raises:
        UserError: saying the limit, and what to use.
    """
    if dimension > MOST:
        raise UserError(
            f"probes: exact needs a Jacobian of {dimension} x {dimension}, and at most {MOST} values an item are "
            "affordable; take Hutchinson's estimate, --probes 32"
        )


def with_divergence(field: Field, x: Tensor, signs: Sequence[Tensor] | Tensor | None) -> tuple[Tensor, Tensor]:
    """The field at x, and its divergence by each probe, float64.

    Args:
        field: see the module's text.
        x: shape (B, *event).
        signs: random signs of x's shape, one for each estimate of Hutchinson's, v . J v; None for the exact divergence.

    Returns:
        The field, (B, *event), and divergences (probes, B); one row of the exact one.

    Raises:
        ValueError: a field that hides its derivative from autograd.
    """
    with differentiable():
        x, value = _start(field, x)
        if signs is not None:
            pulled = [torch.autograd.grad(value, x, v, retain_graph=True)[0] * v for v in signs]
            return value.detach(), torch.stack(pulled).flatten(2).cpu().double().sum(2)
        total = torch.zeros(1, len(x), dtype=torch.float64)
        for i, row in enumerate(_rows(value, x)):
            total[0] += row[:, i].cpu()
    return value.detach(), total


def pulled_back(field: Field, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The field at x, and J^T v there, both of x's shape (B, *event).

    Raises:
        ValueError: a field that hides its derivative from autograd.
    """
    with differentiable():
        x, value = _start(field, x)
        (pulled,) = torch.autograd.grad(value, x, v)
    return value.detach(), pulled


def jacobian(field: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    """The field at x (B, *event), and its Jacobian there, entry (b, i, j) = d field_i / d x_j: (B, D, D).

    Raises:
        UserError: more than `MOST` values in an event.
        ValueError: a field that hides its derivative from autograd.
    """
    require_exact(math.prod(x.shape[1:]))
    with differentiable():
        x, value = _start(field, x)
        rows = torch.stack(list(_rows(value, x)), 1)
    return value.detach(), rows


def products(field: Field, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """J v and J^T v at x, both of x's shape (B, *event).

    J v is the derivative of u -> J^T u, which is linear, along v: two backward passes.

    Raises:
        ValueError: a field that hides its derivative from autograd.
        UserError: a field that cannot be differentiated twice.
    """
    with differentiable():
        x, value = _start(field, x)
        u = torch.zeros_like(value, requires_grad=True)
        try:
            (pulled,) = torch.autograd.grad(value, x, u, create_graph=True)
            (pushed,) = torch.autograd.grad(pulled, u, v, retain_graph=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"network: cannot be differentiated twice ({reason})") from None
        (pulled,) = torch.autograd.grad(value, x, v)
    return pushed, pulled


def _start(field: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    value = field(x)
    if not value.requires_grad:
        raise ValueError("the field has no gradient in x; is it computed without autograd?")
    if value.shape != x.shape:
        raise ValueError(f"the field has shape {tuple(value.shape)}, and x has {tuple(x.shape)}")
    return x, value


def _rows(value: Tensor, x: Tensor) -> Iterator[Tensor]:
    """Rows of the Jacobian, (B, D) each."""
    flat = value.flatten(1)
    for i in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)
        yield row.flatten(1)
