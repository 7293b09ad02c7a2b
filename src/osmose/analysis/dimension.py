r"""How many degrees of freedom the data have around a point, read off a model's field (local intrinsic dimension).

Of D values some k vary along the data, the others do not. What a field says of k at the noise-to-signal ratio r, in the
coordinates of `gaussian.score` (y = x0 + r eps, D(y, r) the denoised, J its Jacobian):

=============== ====================================================================================================
flipd           tr J + |D - x|^2 / r^2 at the point x itself: d log p_r / d log r = k - D (arXiv 2406.03537)
normal-bundle   scores at copies of x with noise r point back to the data: their matrix has D - k large singular values,
                up to the largest gap (arXiv 2212.12611)
rank            singular values of J at x above 1/2: the denoiser keeps what is along the data
flow            singular values of the flow's derivative from noise to r, which rise with r off the data, not along it:
                slopes of their logarithms below 1/2, over half a decade (after arXiv 2402.03845)
lidl            the slope of log p_r(x) against log r itself, each by the ODE (arXiv 2206.14882)
=============== ====================================================================================================

and what the training items say without a model: `kde` (flipd of the exact score of the items, a weighted mean), `lpca`
and `mle` of the nearest neighbours (scikit-dimension). A gauge field, which changes no sample, changes flipd, the
normal bundle and the rank, and not what follows the flow (`gaussian.oracles.RotatedDenoiser`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from osmose.errors import UserError, nearest
from osmose.gaussian.density import log_density
from osmose.gaussian.derivatives import EXACT, MOST, jacobian, pulled_back, signs_like, with_divergence
from osmose.gaussian.draws import seeded
from osmose.gaussian.score import ScoreField
from osmose.methods.messages import OnStep

#: Copies of a point for each of its values: the matrix of scores has so many rows.
COPIES = 4
_COPIES_AT_A_TIME = 1024
#: Between Jacobians of the flow in log r; its path takes two steps of four evaluations in each.
_STEP = 0.2
#: Over how much of log r slopes of singular values are taken: half a decade.
_WINDOW = math.log(10) / 2
_NEIGHBOURS = 100
#: Values of the matrix of distances of `kde` at a time.
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Problem:
    """Points, and what is asked about them.

    Attributes:
        field: of the model, given the points' classes.
        points: model units, (n, *event).
        items: of the training part, model units, (N, *event).
        ratios: rising noise-to-signal ratios, float64 (R,).
        probes: Hutchinson's; None for exact traces.
        seed: of everything random.
    """

    field: ScoreField
    points: Tensor
    items: Tensor
    ratios: Tensor
    probes: int | None
    seed: int

    @property
    def dimension(self) -> int:
        """D."""
        return self.points[0].numel()

    def signs(self) -> Tensor | None:
        """The same signs for every ratio."""
        if self.probes is None:
            return None
        return signs_like(self.points, self.probes, seeded(self.seed, "dimension", "signs"))


@dataclass(frozen=True)
class Estimates:
    """Of one estimator.

    Attributes:
        values: (n, R), NaN where it says nothing; (n, 1) of one that knows no ratio.
        spectra: singular values that it counts, (n, R, D), or None.
        by_ratio: whether it knows ratios.
    """

    values: Tensor
    spectra: Tensor | None = None
    by_ratio: bool = True


def choose(names: Sequence[str] | None, dimension: int, conditional: bool = False) -> list[str]:
    """The estimators to run: those named, or those that such data can afford.

    What looks at the training items alone (kde, lpca, mle) knows no classes: it is not among the default ones of a
    model that is told them.

    Raises:
        UserError: a name that is none, or one that such data cannot afford.
    """
    if names is None:
        found = ["flipd"]
        if 1 < dimension <= EXACT:
            found.append("normal-bundle")
        if dimension <= EXACT:
            found += ["rank", "flow"]
        return found if conditional else [*found, "kde"]
    for name in names:
        if name not in ESTIMATORS:
            raise UserError(f"estimators: {name!r} is not valid; {nearest(name, ESTIMATORS)}")
        if name in ("rank", "flow") and dimension > MOST:
            raise UserError(
                f"estimators: {name} needs whole Jacobians, of at most {MOST} values an item, and these have "
                f"{dimension}; take flipd, with --probes"
            )
        if name == "normal-bundle" and dimension == 1:
            raise UserError("estimators: normal-bundle looks for a gap among singular values, and of one value is one")
        if name == "normal-bundle" and dimension > 3 * MOST:
            raise UserError(
                f"estimators: normal-bundle needs a matrix of {COPIES * dimension} x {dimension} for each point; take "
                "flipd, with --probes"
            )
    return list(dict.fromkeys(names))


def estimate(name: str, problem: Problem, on_step: OnStep) -> Estimates:
    """Run an estimator of `ESTIMATORS`; `on_step` is called with the parts done and all of them.

    Raises:
        UserError: what it says is no number at some point; see the estimators for others.
    """
    found = ESTIMATORS[name](problem, on_step)
    if bool(found.values.isinf().any()) or (name != "flow" and bool(found.values.isnan().any())):
        raise UserError(f"{name}: is not finite at some points: the run's network answers with NaN or infinity there")
    return found


def flipd(problem: Problem, on_step: OnStep) -> Estimates:
    """The trace of J, plus |D - x|^2 / r^2."""
    signs, columns = problem.signs(), []
    for index, ratio in enumerate(problem.ratios.tolist()):
        value, trace = with_divergence(problem.field.at(ratio), problem.points, signs)
        off = (value - problem.points).flatten(1).cpu().double().square().sum(1)
        columns.append(trace.mean(0) + off / ratio**2)
        on_step(index + 1, len(problem.ratios))
    return Estimates(torch.stack(columns, 1))


def by_pixel(problem: Problem, ratio: float) -> Tensor:
    """What each value of a point adds to flipd, float64 (n, *event)."""
    signs = problem.signs()
    if signs is None:
        value, whole = jacobian(problem.field.at(ratio), problem.points)
        diagonal = whole.diagonal(dim1=1, dim2=2).view_as(value)
    else:
        found = [pulled_back(problem.field.at(ratio), problem.points, v) for v in signs]
        value = found[0][0]
        diagonal = torch.stack([pulled * v for (_, pulled), v in zip(found, signs, strict=True)]).mean(0)
    return (diagonal + (value - problem.points).square() / ratio**2).cpu().double()


def normal_bundle(problem: Problem, on_step: OnStep) -> Estimates:
    """D minus the place of the largest gap among singular values of scores around each point."""
    count, D = COPIES * problem.dimension, problem.dimension
    generator = seeded(problem.seed, "dimension", "copies")
    values, spectra = [], []
    for index, ratio in enumerate(problem.ratios.tolist()):
        rows = []
        for k, point in enumerate(problem.points):
            noise = torch.randn(count, *point.shape, generator=generator, dtype=point.dtype).to(point.device)
            field, condition = problem.field, problem.field.condition
            if condition is not None:
                field = field.given(condition[k].expand(count))
            scores = []
            with torch.no_grad():
                for part in torch.arange(count).split(_COPIES_AT_A_TIME):
                    own = field if field.condition is None else field.given(field.condition[part.to(point.device)])
                    scores.append(own.score(point + ratio * noise[part.to(point.device)], ratio).flatten(1).cpu())
            rows.append(torch.linalg.svdvals(torch.cat(scores).double()))
        spectrum = torch.stack(rows)
        values.append(D - 1 - (spectrum[:, :-1] - spectrum[:, 1:]).argmax(1).double())
        spectra.append(spectrum)
        on_step(index + 1, len(problem.ratios))
    return Estimates(torch.stack(values, 1), torch.stack(spectra, 1))


def rank(problem: Problem, on_step: OnStep) -> Estimates:
    """Singular values of J above 1/2."""
    spectra = []
    for index, ratio in enumerate(problem.ratios.tolist()):
        _, whole = jacobian(problem.field.at(ratio), problem.points)
        spectra.append(torch.linalg.svdvals(whole.cpu().double()))
        on_step(index + 1, len(problem.ratios))
    spectrum = torch.stack(spectra, 1)
    return Estimates((spectrum > 0.5).sum(2).double(), spectrum)


def flow(problem: Problem, on_step: OnStep) -> Estimates:
    """Slopes below 1/2 of the logarithms of singular values of the flow's derivative, over half a decade above r.

    Where the run ends before, over what there is; NaN at its largest ratio, above which there is nothing.
    """
    field, ratios = problem.field, problem.ratios
    wanted = torch.cat([ratios.log(), ratios.log() + _WINDOW]).unique()
    taus, values = flow_singular_values(field, problem.points, wanted, on_step)
    counts, spectra = [], []
    for ratio in ratios.log().tolist():
        low = int((taus - ratio).abs().argmin())
        high = int((taus - (ratio + _WINDOW)).abs().argmin())
        slope = (values[:, high] - values[:, low]) / (taus[high] - taus[low])
        count = (slope < 0.5).sum(1).double()
        counts.append(count if high > low else torch.full_like(count, math.nan))
        spectra.append(values[:, low])
    return Estimates(torch.stack(counts, 1), torch.stack(spectra, 1).exp())


def flow_singular_values(
    field: ScoreField, x: Tensor, wanted: Tensor, on_step: OnStep | None = None
) -> tuple[Tensor, Tensor]:
    r"""Logarithms of the singular values of Y(r) = d y(r) / d y(highest) along the flow through x, the largest first.

    The path is followed from x at the lowest ratio to the highest by the rule of Runge and Kutta, and Y back along it,
    dY / d(log r) = (1 - J) Y: over each interval by the exponential of the mean of its ends, of second order (Magnus),
    which is exact where the Jacobians commute and their mean is.

    Args:
        field: see `ScoreField`.
        x: shape (n, *event).
        wanted: values of log r, float64, rising; those outside the field's range are left out.
        on_step: called with Jacobians done and in all.

    Returns:
        The values of log r, (K,), and (n, K, D) float64.
    """
    start, end = math.log(field.lowest), math.log(field.highest)
    inside = wanted[(wanted > start + 1e-9) & (wanted < end - 1e-9)].tolist()
    grid, kept = [start], [0]
    for low, high in itertools.pairwise([start, *inside, end]):  # every mark, and between them no step beyond _STEP
        parts = max(1, math.ceil((high - low) / _STEP))
        grid += [low + (high - low) * (k + 1) / parts for k in range(parts - 1)] + [high]
        kept.append(len(grid) - 1)
    states = [x]
    with torch.no_grad():
        for low, high in itertools.pairwise(grid):
            y, h = states[-1], (high - low) / 2
            for tau in (low, low + h):
                y = _runge_kutta(field, y, tau, h)
            states.append(y)
    D = x[0].numel()
    identity = torch.eye(D, dtype=torch.float64)

    def slope(index: int) -> Tensor:
        ratio = math.exp(grid[index])
        _, whole = jacobian(field.at(ratio), states[index])
        return identity - whole.cpu().double()

    Y = identity.expand(len(x), D, D)
    after = slope(len(grid) - 1)
    found = {len(grid) - 1: torch.zeros(len(x), D, dtype=torch.float64)}
    for index in range(len(grid) - 2, -1, -1):
        here = slope(index)
        Y = torch.linalg.matrix_exp((grid[index] - grid[index + 1]) * (here + after) / 2) @ Y
        found[index], after = torch.linalg.svdvals(Y).clamp(min=1e-300).log(), here
        if on_step is not None:
            on_step(len(grid) - 1 - index, len(grid) - 1)
    return (
        torch.tensor([grid[index] for index in kept], dtype=torch.float64),
        torch.stack([found[index] for index in kept], 1),
    )


def _runge_kutta(field: ScoreField, y: Tensor, tau: float, h: float) -> Tensor:
    def slope(at: float, y: Tensor) -> Tensor:
        return y - field.denoised(y, math.exp(at))

    a = slope(tau, y)
    b = slope(tau + h / 2, y + h / 2 * a)
    c = slope(tau + h / 2, y + h / 2 * b)
    d = slope(tau + h, y + h * c)
    return y + h / 6 * (a + 2 * b + 2 * c + d)


def lidl(problem: Problem, on_step: OnStep) -> Estimates:
    """D plus the slope of log p_r(x) in log r, by differences between neighbouring ratios."""
    if len(problem.ratios) < 2:
        raise UserError("ratios: lidl takes a slope, and needs at least 2")
    signs, columns = problem.signs(), []
    for index, ratio in enumerate(problem.ratios.tolist()):
        columns.append(log_density(problem.field, problem.points, ratio, signs=signs).log_p)
        on_step(index + 1, len(problem.ratios))
    (slope,) = torch.gradient(torch.stack(columns, 1), spacing=(problem.ratios.log(),), dim=1)
    return Estimates(problem.dimension + slope)


def kde(problem: Problem, on_step: OnStep) -> Estimates:
    """Mean of |x - x_i|^2 / r^2 over the training items, with weights exp(-|x - x_i|^2 / 2 r^2)."""
    queries, items = (values.flatten(1).cpu().double() for values in (problem.points, problem.items))
    rows = []
    size = max(1, _BLOCK // (len(items) * len(problem.ratios)))
    for part in queries.split(size):
        squares = torch.cdist(part, items, compute_mode="donot_use_mm_for_euclid_dist").square()
        # Not the point itself, where it is one of the items.
        squares = torch.where(squares == 0, math.inf, squares)
        scaled = squares[:, None] / problem.ratios[:, None] ** 2
        weights = torch.softmax(-scaled / 2, 2)
        rows.append((weights * torch.where(scaled.isinf(), 0.0, scaled)).sum(2))
        on_step(len(rows), -(-len(queries) // size))
    return Estimates(torch.cat(rows))


def _neighbours(name: str, problem: Problem, on_step: OnStep) -> Estimates:
    """Lpca or mle of the nearest training items of each point, by scikit-dimension.

    Raises:
        UserError: it is not installed, or there are too few items.
    """
    try:
        import skdim
    except ImportError:
        raise UserError(f"{name} needs the package scikit-dimension: pip install 'osmose[dimension]'") from None
    from sklearn.neighbors import NearestNeighbors

    queries, items = (values.flatten(1).cpu().double().numpy() for values in (problem.points, problem.items))
    count = min(_NEIGHBOURS, len(items) - 1)
    if count < 3:
        raise UserError(f"{name}: {len(items)} training items are too few for neighbours")
    distances, places = NearestNeighbors(n_neighbors=count + 1).fit(items).kneighbors(queries)
    # Not the point itself, where it is one of the items: the nearest is dropped then, the farthest otherwise.
    own = distances[:, 0] == 0
    distances = np.where(own[:, None], distances[:, 1:], distances[:, :-1])
    places = np.where(own[:, None], places[:, 1:], places[:, :-1])
    if name == "mle":
        fitted = skdim.id.MLE().fit(items, precomputed_knn_arrays=(distances, places), n_neighbors=count)
        values = np.asarray(fitted.dimension_pw_, dtype=np.float64)
    else:
        values = np.array([skdim.id.lPCA().fit(items[row]).dimension_ for row in places], dtype=np.float64)
    on_step(1, 1)
    return Estimates(torch.from_numpy(values)[:, None], by_ratio=False)


def lpca(problem: Problem, on_step: OnStep) -> Estimates:
    """Principal components of the nearest training items of each point."""
    return _neighbours("lpca", problem, on_step)


def mle(problem: Problem, on_step: OnStep) -> Estimates:
    """Distances of the nearest training items of each point, by the likelihood of a Poisson process."""
    return _neighbours("mle", problem, on_step)


#: All of them, by name.
ESTIMATORS: dict[str, Callable[[Problem, OnStep], Estimates]] = {
    "flipd": flipd,
    "normal-bundle": normal_bundle,
    "rank": rank,
    "flow": flow,
    "lidl": lidl,
    "kde": kde,
    "lpca": lpca,
    "mle": mle,
}
