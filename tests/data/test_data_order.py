import pytest
import torch

from osmose.data.batches import BatchOrder
from osmose.data.splitting import permutation, split_indices
from osmose.errors import UserError

CASES = [(10, 4), (10, 10), (7, 20), (1, 3), (100, 1), (64, 16)]


@pytest.mark.parametrize(("num_items", "batch_size"), CASES)
def test_every_epoch_covers_every_item_once(num_items, batch_size):
    order = BatchOrder(num_items, batch_size, seed=3)
    num_epochs = 6
    steps = -(-num_epochs * num_items // batch_size)
    batches = [order.indices(step) for step in range(steps)]
    assert all(batch.shape == (batch_size,) and batch.dtype == torch.int64 for batch in batches)
    stream = torch.cat(batches)[: num_epochs * num_items].view(num_epochs, num_items)
    assert torch.equal(stream.sort(dim=1).values, torch.arange(num_items).expand(num_epochs, -1))


@pytest.mark.parametrize(("num_items", "batch_size"), CASES)
def test_a_batch_depends_on_seed_and_step_alone(num_items, batch_size):
    forward = BatchOrder(num_items, batch_size, seed=3)
    expected = [forward.indices(step) for step in range(30)]
    other = BatchOrder(num_items, batch_size, seed=3)
    for step in [29, 0, 17, 17, 3, 28, 1, 16]:
        assert torch.equal(other.indices(step), expected[step])
        assert torch.equal(BatchOrder(num_items, batch_size, seed=3).indices(step), expected[step])


def test_the_batch_size_cuts_the_same_stream_differently():
    small, large = BatchOrder(10, 3, seed=0), BatchOrder(10, 12, seed=0)
    assert torch.equal(torch.cat([small.indices(step) for step in range(4)]), large.indices(0))


def test_epochs_and_seeds_differ():
    orders = {(seed, epoch): BatchOrder(50, 50, seed).indices(epoch) for seed in range(4) for epoch in range(4)}
    distinct = {tuple(order.tolist()) for order in orders.values()}
    assert len(distinct) == 16
    assert not torch.equal(BatchOrder(50, 50, 1).indices(0), BatchOrder(50, 50, 2**32 + 1).indices(0))


def test_writing_into_a_batch_does_not_change_the_order():
    order = BatchOrder(10, 4, seed=0)
    before = order.indices(0).clone()
    order.indices(0).zero_()
    assert torch.equal(order.indices(0), before)


def test_epoch_counts_passes_over_the_data():
    order = BatchOrder(10, 4, seed=0)
    assert [order.epoch(step) for step in (0, 5, 10)] == [0.0, 2.0, 4.0]


def test_a_late_step_is_as_cheap_as_the_first():
    order = BatchOrder(10, 4, seed=0)
    assert order.indices(10**12).shape == (4,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 4), "num_items: 0 is not valid"), ((4, 0), "batch_size: 0 is not valid")],
)
def test_empty_orders_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        BatchOrder(*arguments, seed=0)


def test_negative_steps_are_refused():
    with pytest.raises(UserError, match="step: -1 is not valid"):
        BatchOrder(4, 2, seed=0).indices(-1)


def test_permutations_are_uniform_over_keys():
    first = torch.stack([permutation(5, "test", seed) for seed in range(3000)])
    counts = torch.stack([first[:, place].bincount(minlength=5) for place in range(5)])
    assert (counts - 600).abs().max() < 5 * (3000 * 0.2 * 0.8) ** 0.5


@pytest.mark.parametrize(
    ("num_items", "share", "num_held_out"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.99, 9), (1000, 0.1, 100), (3, 0.1, 1)]
)
def test_split_covers_all_and_leaves_no_part_empty(num_items, share, num_held_out):
    train, held_out = split_indices(num_items, share, seed=5)
    assert len(held_out) == num_held_out
    assert torch.cat([train, held_out]).sort().values.tolist() == list(range(num_items))
    again, _ = split_indices(num_items, share, seed=5)
    assert torch.equal(train, again)
