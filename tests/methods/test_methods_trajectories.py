"""How samples come about: what every method that goes by steps tells of them."""

from __future__ import annotations

import pytest
import torch

from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.methods import METHODS
from osmose.methods.base import GenerativeModel

PLANE = DataSpec(kind="points", shape=(2,))
COUNTS = DataSpec(kind="image", shape=(1, 2, 2), range=(0, 16), levels=17, shift=(8.0,), scale=(8.0,))
MLP = {"kind": "mlp", "width": 8, "depth": 1}

STEPWISE = [
    ("ddpm", PLANE, {"schedule": {"kind": "linear", "num_steps": 50}}),
    ("edm", PLANE, {}),
    ("interpolant", PLANE, {}),
    ("bridge", PLANE, {}),
    ("blackout", COUNTS, {}),
]


def build(kind: str, spec: DataSpec, options: dict) -> GenerativeModel:
    torch.manual_seed(0)
    kept = METHODS.resolve(kind)
    config = kept.parse({**kept.recipe(spec, 1.0), "network": MLP, **options})
    return config.build(spec).eval()


@pytest.mark.parametrize(("kind", "spec", "options"), STEPWISE, ids=[kind for kind, *_ in STEPWISE])
def test_the_last_state_is_the_sample_and_all_batches_have_the_same_states(kind, spec, options):
    model = build(kind, spec, options)
    told = []
    found = model.trajectories(5, seed=4, batch_size=2, num_steps=6, on_step=lambda done, of: told.append((done, of)))
    assert found.done == tuple(range(7))
    assert found.states.shape == (5, 7, *spec.shape)
    assert torch.equal(spec.decode(found.states[:, -1]), model.sample(5, seed=4, batch_size=2, num_steps=6).data)
    assert told == [(k, 18) for k in range(1, 19)]
    few = model.trajectories(5, most=3, seed=4, batch_size=2, num_steps=6)
    assert few.done == (0, 3, 6)
    assert torch.equal(few.states, found.states[:, ::3])


def test_states_of_noise_have_the_variance_of_one():
    model = build("edm", PLANE, {})
    found = model.trajectories(2000, num_steps=5)
    assert float(found.states[:, 0].std()) == pytest.approx(1, abs=0.05)


def test_blackout_begins_without_anything_and_its_counts_are_whole():
    model = build("blackout", COUNTS, {})
    states = COUNTS.to_levels(model.trajectories(8, num_steps=5).states.flatten(0, 1)).unflatten(0, (8, 6))
    assert int(states[:, 0].abs().max()) == 0
    assert bool((states.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("most", [1, 0])
def test_a_trajectory_has_two_states(most):
    with pytest.raises(UserError, match=f"most: {most} is not valid"):
        build("edm", PLANE, {}).trajectories(2, most=most)


def test_what_is_drawn_at_once_has_no_trajectory():
    config = METHODS.resolve("gaussian")
    model = config.parse(config.recipe(PLANE, 1.0)).build(PLANE)
    with pytest.raises(UserError, match="gaussian draws its samples at once, without states in between"):
        model.trajectories(2)
