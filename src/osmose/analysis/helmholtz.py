r"""The part of a field that samples and densities depend on: its gradient part under the noisy data.

In L2(p_r) every field is, in one way only, s = grad phi + g with div(p_r g) = 0 (Helmholtz and Hodge, with weights): g
changes no marginal, and is orthogonal to all gradients (arXiv 2402.03845). grad phi is what is nearest to s in the mean
over p_r among gradients, so it is learned by regression: a conservative network (`networks.conservative`) is taught the
run's own denoiser on noisy data. What it does not reach holds g and its own error of fitting; a free network of the
same kind, taught alike, says how large that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.gaussian.draws import seeded
from osmose.gaussian.parametrization import EDMParametrization, column
from osmose.gaussian.schedule import Level, VarianceExploding
from osmose.gaussian.score import ScoreField, score_field
from osmose.methods.messages import OnStep
from osmose.networks import NETWORKS
from osmose.networks.conservative import ConservativeConfig
from osmose.networks.presets import network_for
from osmose.training.ema import EMA

_LR, _WARMUP = 2e-3, 0.05
#: Weights are averaged over about the last tenth of the steps.
_RECENT = 10


@dataclass(frozen=True)
class Split:
    """What two networks learned of a field.

    Attributes:
        gradient: grad phi, of a conservative one.
        free: of a free one, which has no reason to leave anything out.
    """

    gradient: ScoreField
    free: ScoreField


def split(
    field: ScoreField,
    items: Tensor,
    condition: Tensor | None,
    num_classes: int | None,
    ratios: tuple[float, float],
    *,
    steps: int,
    batch_size: int = 128,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Split:
    """Teach a conservative and a free network what a field says of noisy items.

    Args:
        field: of the run.
        items: model units, (N, *event), of the training part.
        condition: their classes, or None.
        num_classes: of a field that is told them.
        ratios: the smallest and the largest, between which the logarithm is drawn evenly.
        steps: of each network.
        batch_size: items of a step.
        seed: of weights, items and noise.
        on_step: called with the steps done and in all.
    """
    shape = tuple(items.shape[1:])
    spread = float(items[:: max(1, len(items) // 2000)].square().mean().sqrt())
    found = []
    for index, conservative in enumerate((True, False)):
        config = ConservativeConfig() if conservative else NETWORKS.parse(network_for(shape))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = config.build(shape, num_classes=num_classes).to(items.device)
        schedule = VarianceExploding(sigma_min=ratios[0], sigma_max=ratios[1])
        student = NetworkDenoiser(network, schedule, EDMParametrization(sigma_data=round(spread, 3)))

        def report(done: int, index: int = index) -> None:
            if on_step is not None:
                on_step(index * steps + done, 2 * steps)

        _teach(student, field, items, condition, ratios, steps, batch_size, seed, report)
        found.append(score_field(student, schedule))
    return Split(*found)


def _teach(
    student: NetworkDenoiser,
    field: ScoreField,
    items: Tensor,
    condition: Tensor | None,
    ratios: tuple[float, float],
    steps: int,
    batch_size: int,
    seed: int,
    report: Callable[[int], None],
) -> None:
    generator = seeded(seed, "helmholtz")
    parameters = list(student.parameters())
    optimizer = torch.optim.Adam(parameters, lr=_LR)
    average = EMA(student, max(0.0, 1 - _RECENT / steps))
    low, high = (math.log(ratio) for ratio in ratios)
    student.train()
    with torch.inference_mode(False), torch.enable_grad():
        for step in range(steps):
            rows = torch.randint(len(items), (batch_size,), generator=generator)
            u = torch.rand(batch_size, generator=generator, dtype=torch.float64)
            noise = torch.randn(batch_size, *items.shape[1:], generator=generator).to(items)
            r = (low + (high - low) * u).exp()
            y = items[rows.to(items.device)] + column(r, noise) * noise
            classes = None if condition is None else condition[rows.to(condition.device)]
            level = Level(torch.zeros_like(r), torch.ones_like(r), r)
            with torch.no_grad():
                wanted = field.given(classes).denoised(y, r)
                c = student.parametrization.coefficients(level)
                target = (wanted - column(c.c_skip, y) * y) / column(c.c_out, y)
            loss = (student.output(y, level, classes) - target).square().mean()
            for group in optimizer.param_groups:
                group["lr"] = _LR * min(1.0, (step + 1) / (_WARMUP * steps)) * (1 - step / steps) ** 0.5
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            average.update()
            report(step + 1)
    student.load_state_dict(average.state_dict())
    student.eval().requires_grad_(False)
