from collections import Counter, deque

import pytest
import torch

from osmose.configuration import ConfigError
from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian import SCHEDULES
from osmose.gaussian.draws import StepDraws
from osmose.gaussian.schedule import CosineSchedule, LinearSchedule, VarianceExploding
from osmose.methods import TIME_SAMPLERS
from osmose.methods.diffusion import DDPMConfig
from osmose.methods.times import LogNormalTimes, LossAwareTimes, UniformTimes
from osmose.networks.mlp import MLPConfig

T = 40


def table_of(T=T, seed=0):
    """A loss for each step, over two orders of magnitude."""
    return (4.6 * torch.rand(T, generator=torch.Generator().manual_seed(seed))).exp() / 100


def times_of(steps, T=T):
    return torch.as_tensor(steps, dtype=torch.float64) / T


def sampler_of(table=None, *, schedule=None, **options):
    """A sampler in training mode that has seen the losses (T, H) of a table, if one is given."""
    options = {"history": 1 if table is None or table.ndim == 1 else table.shape[1], **options}
    sampler = LossAwareTimes(**options).build(schedule or CosineSchedule(num_steps=T)).train()
    if table is not None:
        for losses in table.view(T, -1).unbind(1):
            sampler.observe(times_of(range(1, T + 1)), losses)
        sampler.commit()
        assert sampler.active
    return sampler


def steps_of(t):
    steps = (t * T).round().long()
    assert torch.equal(steps.double() / T, t)
    return steps


class Given:
    """Draws with the uniform values that a test gives."""

    def __init__(self, u):
        self.u = torch.as_tensor(u, dtype=torch.float64)

    def uniform(self):
        return self.u


GRID = Given((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000)

# --- the law --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.001, 0.3, 1.0])
def test_the_law_is_the_root_mean_square_of_the_last_losses(share):
    table = table_of(T * 5).view(T, 5)
    p = sampler_of(table, uniform_share=share).probabilities()
    size = [sum(float(loss) ** 2 for loss in losses) ** 0.5 for losses in table]
    want = torch.tensor([(1 - share) * s / sum(size) + share / T for s in size], dtype=torch.float64)
    assert p.dtype == torch.float64
    torch.testing.assert_close(p, want, rtol=1e-12, atol=0)
    assert p.sum().item() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("share", [0.001, 0.5, 1.0])
def test_the_weighted_loss_has_the_uniform_mean_whatever_the_law(share):
    sampler, losses = sampler_of(table_of(), uniform_share=share), table_of(seed=1).double()
    t, weight = sampler.draw(GRID)
    weights = torch.zeros(T, dtype=torch.float64).scatter_(0, steps_of(t) - 1, weight)
    assert bool((weights > 0).all())
    # Exactly, summed over the law, for losses that are not those the law was learned from.
    assert (sampler.probabilities() * weights * losses).sum().item() == pytest.approx(losses.mean().item(), rel=1e-13)
    # And for what is drawn.
    assert (weight * losses[steps_of(t) - 1]).mean().item() == pytest.approx(losses.mean().item(), rel=1e-3)


def test_known_losses_are_drawn_without_any_variance():
    losses = table_of()
    sampler = sampler_of(losses, uniform_share=1e-12)
    t, weight = sampler.draw(StepDraws(0, 0, 0, 100, 100))
    weighted = weight * losses[steps_of(t) - 1]
    assert weighted.tolist() == pytest.approx([losses.double().mean().item()] * 100, rel=1e-9)
    assert losses[steps_of(t) - 1].std() > 0.1


def test_steps_are_drawn_by_the_inverse_distribution_function():
    sampler = sampler_of(table_of())
    p = sampler.probabilities()
    t, _ = sampler.draw(GRID)
    steps = steps_of(t)
    assert bool((steps[1:] >= steps[:-1]).all())
    assert (steps.bincount(minlength=T + 1)[1:] - 1_000_000 * p).abs().max() <= 1 + 1e-6
    below = p.cumsum(0)[:-1]
    assert steps_of(sampler.draw(Given(below + 1e-12))[0]).tolist() == list(range(2, T + 1))
    assert steps_of(sampler.draw(Given(below - 1e-12))[0]).tolist() == list(range(1, T))


def test_draws_at_the_ends_of_the_unit_interval():
    ends, short = Given([0.0, 1 - 2.0**-53]), 0
    for seed in range(20):
        sampler = sampler_of(table_of(seed=seed))
        assert steps_of(sampler.draw(ends)[0]).tolist() == [1, T]
        short += bool(sampler.probabilities().cumsum(0)[-1] <= ends.u[1])
    assert short > 0  # the rounded sum of some laws ends before the largest u


def test_a_share_of_one_is_the_uniform_law():
    schedule = CosineSchedule(num_steps=32)  # k/32 is exact: values at the very edges of the steps, too
    sampler = LossAwareTimes(history=1, uniform_share=1.0).build(schedule)
    sampler.observe(times_of(range(1, 33), 32), table_of(32))
    sampler.commit()
    u = Given(torch.arange(64, dtype=torch.float64) / 64)
    t, weight = sampler.draw(u)
    assert torch.equal(t, UniformTimes().build(schedule).draw(u)[0])
    assert torch.equal(weight, torch.ones(64, dtype=torch.float64))


def test_frequencies_follow_the_law():
    sampler, n = sampler_of(table_of(), uniform_share=0.01), 100_000
    t, _ = sampler.draw(StepDraws(3, 0, 0, n, n))
    want = n * sampler.probabilities()
    assert want.min() > 5
    chi_squared = ((steps_of(t).bincount(minlength=T + 1)[1:] - want) ** 2 / want).sum().item()
    assert 15 < chi_squared < 78  # 39 degrees of freedom: p = 3e-4 on either side


def test_stratified_draws_follow_the_law_item_by_item():
    sampler, n = sampler_of(table_of(), stratified=True), 1000
    t, weight = sampler.draw(StepDraws(0, 0, 0, n, n))
    assert (steps_of(t).bincount(minlength=T + 1)[1:] - n * sampler.probabilities()).abs().max() < 2
    assert weight.shape == (n,)


def test_without_debiasing_the_same_steps_have_no_weight():
    draws = [StepDraws(0, 0, 0, 64, 64) for _ in range(2)]
    t, weight = sampler_of(table_of()).draw(draws[0])
    same, none = sampler_of(table_of(), debias=False).draw(draws[1])
    assert torch.equal(t, same)
    assert none is None
    p = sampler_of(table_of()).probabilities()
    torch.testing.assert_close(weight, 1 / (T * p[steps_of(t) - 1]), rtol=1e-13, atol=0)


@pytest.mark.parametrize("stratified", [False, True])
def test_until_every_step_has_its_losses_the_law_is_uniform(stratified):
    sampler = sampler_of(history=2, stratified=stratified)
    plain = UniformTimes(stratified=stratified).build(CosineSchedule(num_steps=T))
    missing = torch.ones(T)
    for observed in (times_of([]), times_of(range(1, T + 1)), times_of(range(1, T))):
        sampler.observe(observed, missing[: len(observed)])
        sampler.commit()
        assert not sampler.active
        t, weight = sampler.draw(StepDraws(0, 0, 0, 50, 50))
        assert weight is None
        assert torch.equal(t, plain.draw(StepDraws(0, 0, 0, 50, 50))[0])
        assert torch.equal(sampler.probabilities(), torch.full((T,), 1 / T, dtype=torch.float64))
        assert torch.equal(sampler.report(t)["loss_aware"], torch.zeros(50))
    sampler.observe(times_of([T]), torch.ones(1))
    sampler.commit()
    assert sampler.active
    assert sampler.draw(StepDraws(0, 0, 0, 50, 50))[1] is not None
    assert torch.equal(sampler.report(t)["loss_aware"], torch.ones(50))


def test_the_log_has_the_law_by_quartile_of_t():
    sampler = sampler_of(table_of())
    t, _ = sampler.draw(StepDraws(0, 0, 0, 50, 50))
    p, logged = sampler.probabilities(), sampler.report(t)
    quartile = (torch.arange(1, T + 1) / T * 4).long().clamp(max=3)
    for index in range(4):
        share = logged[f"p_q{index + 1}"]
        assert share.shape == (50,)
        assert share.unique().item() == pytest.approx(p[quartile == index].sum().item(), rel=1e-12)
    assert len({logged[f"p_q{index + 1}"][0].item() for index in range(4)}) == 4
    fresh = sampler_of(history=2)
    assert fresh.report(t)["p_q1"].unique().item() == pytest.approx((quartile == 0).double().mean().item())


def test_evaluation_draws_as_if_nothing_had_been_learned():
    sampler = sampler_of(table_of()).eval()
    t, weight = sampler.draw(StepDraws(0, 0, 0, 50, 50))
    assert weight is None
    assert torch.equal(t, UniformTimes().build(CosineSchedule(num_steps=T)).draw(StepDraws(0, 0, 0, 50, 50))[0])
    assert sampler.report(t) == {}
    assert sampler.train().draw(StepDraws(0, 0, 0, 50, 50))[1] is not None


def test_losses_of_zero_leave_a_law():
    sampler = sampler_of(torch.zeros(T))
    assert torch.equal(sampler.probabilities(), torch.full((T,), 1 / T, dtype=torch.float64))
    sampler = sampler_of(torch.eye(T)[7])
    assert sampler.probabilities()[7].item() == pytest.approx(0.999 + 0.001 / T)
    assert sampler.probabilities()[6].item() == pytest.approx(0.001 / T)


@pytest.mark.parametrize(("num_steps", "steps"), [(1000, 181), (4000, 808)])
def test_how_long_the_memory_takes_to_fill(num_steps, steps):
    taken = []
    for seed in range(6 if num_steps == 1000 else 2):
        sampler = LossAwareTimes().build(LinearSchedule(num_steps=num_steps))
        step = 0
        while not sampler.active:
            sampler.observe(sampler.draw(StepDraws(seed, step, 0, 128, 128))[0], torch.ones(128))
            sampler.commit()
            step += 1
        taken.append(step)
    assert sum(taken) / len(taken) == pytest.approx(steps, rel=0.08)


# --- the memory -----------------------------------------------------------------------------------------------------


def remembered(sampler):
    """The losses of each step, oldest first."""
    history = sampler.config.history
    rows = []
    for losses, count in zip(sampler.losses, sampler.counts.tolist(), strict=True):
        order = [n % history for n in range(max(0, count - history), count)]
        rows.append(losses[order].tolist())
    return rows


@pytest.mark.parametrize("history", [1, 3, 10])
def test_the_last_losses_of_each_step_are_kept_in_order(history):
    sampler = sampler_of(history=history)
    want = [deque(maxlen=history) for _ in range(T)]
    generator = torch.Generator().manual_seed(0)
    most = 0
    for size in (1, 64, 5, 400, 1, 64, 300):
        # Few steps take most of the batch: some come more often than the memory is long, some not at all.
        steps = 1 + (T * torch.rand(size, generator=generator, dtype=torch.float64) ** 3).long()
        losses = torch.rand(size, generator=generator)
        sampler.observe(times_of(steps), losses)
        sampler.commit()
        for step, loss in zip(steps.tolist(), losses.tolist(), strict=True):
            want[step - 1].append(loss)
        most = max(most, *Counter(steps.tolist()).values())
        assert remembered(sampler) == [list(row) for row in want]
    assert most > 10


def test_nothing_changes_before_the_commit():
    sampler = sampler_of(table_of())
    before = {name: value.clone() for name, value in sampler.state_dict().items()}
    draws = [sampler.draw(StepDraws(0, 0, 0, 16, 16))[0]]
    for start in (0, 8):
        sampler.observe(times_of([1] * 8), torch.full((8,), 1e3 * (1 + start)))
        draws.append(sampler.draw(StepDraws(0, 0, 0, 16, 16))[0])
    assert all(torch.equal(value, before[name]) for name, value in sampler.state_dict().items())
    assert all(torch.equal(t, draws[0]) for t in draws)
    sampler.commit()
    assert sampler.losses[0].tolist() == [9e3]
    assert sampler.probabilities()[0] > 0.99
    counts = sampler.counts.clone()
    sampler.commit()  # nothing is learned twice
    assert torch.equal(sampler.counts, counts)


def test_micro_batches_are_remembered_as_one_batch():
    one, cut = (sampler_of(history=3) for _ in range(2))
    steps, losses = torch.randint(1, 9, (60,), generator=torch.Generator().manual_seed(0)), torch.arange(60.0)
    one.observe(times_of(steps), losses)
    for part in torch.arange(60).split([10, 30, 20]):
        cut.observe(times_of(steps[part]), losses[part])
    for sampler in (one, cut):
        sampler.commit()
    assert remembered(one) == remembered(cut)


def test_processes_remember_one_batch_in_its_own_order(monkeypatch):
    # Two micro-batches of ten items, each shared by two processes: 0..4, 5..9, 10..14, 15..19.
    steps, losses = torch.tensor([1, 2, 3, 4, 1] * 4), torch.arange(20.0)
    alone = sampler_of(history=3)
    alone.observe(times_of(steps), losses)
    alone.commit()
    ranks = [sampler_of(history=3) for _ in range(2)]
    for rank, sampler in enumerate(ranks):
        for micro in range(2):
            part = slice(10 * micro + 5 * rank, 10 * micro + 5 * rank + 5)
            sampler.observe(times_of(steps[part]), losses[part])
    noted = [list(sampler._noted) for sampler in ranks]
    calls = []

    def all_gather(out, mine):
        rank, micro = calls.pop(0)
        assert torch.equal(mine, noted[rank][micro])
        for place, queue in zip(out, noted, strict=True):
            place.copy_(queue[micro])

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    for rank, sampler in enumerate(ranks):
        calls += [(rank, 0), (rank, 1)]
        sampler.commit()
        assert remembered(sampler) == remembered(alone)
        assert torch.equal(sampler.losses, alone.losses)


def test_a_loss_that_is_not_finite_is_not_remembered():
    sampler, sound = sampler_of(table_of()), sampler_of(table_of())
    bad = torch.tensor([float("nan"), 5.0, float("inf"), 7.0, -float("inf")])
    sampler.observe(times_of([1, 1, 2, 3, 3]), bad)
    sound.observe(times_of([1, 3]), torch.tensor([5.0, 7.0]))
    for one in (sampler, sound):
        one.commit()
    assert all(torch.equal(value, sound.state_dict()[name]) for name, value in sampler.state_dict().items())
    sampler.observe(times_of([4]), torch.tensor([float("nan")]))
    sampler.commit()
    assert bool(sampler.probabilities().isfinite().all())


def test_the_memory_is_in_the_state_and_continues_from_it():
    one, other = sampler_of(history=2), sampler_of(history=2)
    assert {name: (tuple(v.shape), v.dtype) for name, v in one.state_dict().items()} == {
        "losses": ((T, 2), torch.float32),
        "counts": ((T,), torch.int64),
    }
    assert not any(bool(value.any()) for value in one.state_dict().values())
    for step in range(60):
        if step == 30:
            other.load_state_dict(one.state_dict())
        for sampler in (one, other) if step >= 30 else (one,):
            t, weight = sampler.draw(StepDraws(0, step, 0, 16, 16))
            sampler.observe(t, table_of()[steps_of(t) - 1] + step)
            sampler.commit()
    assert weight is not None
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_a_loss_with_gradient_is_remembered_without_it():
    sampler = sampler_of(history=1)
    sampler.observe(times_of([1, 2]), torch.ones(2, requires_grad=True) * 3)
    sampler.commit()
    assert not sampler.losses.requires_grad
    assert sampler.losses[:2].flatten().tolist() == [3, 3]


# --- fixed laws, and what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [UniformTimes(), LogNormalTimes()], ids=lambda config: config.kind)
def test_a_fixed_law_learns_nothing(config):
    sampler = config.build(CosineSchedule(num_steps=T)).train()
    t, weight = sampler.draw(StepDraws(0, 0, 0, 20, 20))
    sampler.observe(t, 1e3 * torch.ones(20))
    sampler.commit()
    assert weight is None
    assert torch.equal(sampler.draw(StepDraws(0, 0, 0, 20, 20))[0], t)
    assert (sampler.report(t), sampler.state_dict(), sampler.extra_updates) == ({}, {}, 0)


def test_extra_updates_are_told_to_the_method():
    assert [sampler_of(extra_updates=extra).extra_updates for extra in (0, 2)] == [0, 2]


def test_a_continuous_schedule_is_refused_by_name_with_those_that_have_steps():
    with pytest.raises(UserError) as refusal:
        LossAwareTimes().build(VarianceExploding())
    message = str(refusal.value)
    assert message == (
        "times: 'loss-aware' remembers losses step by step, and schedule 've' is continuous; "
        "use schedule linear or cosine, or times uniform or log-normal"
    )
    discrete = {kind for kind in SCHEDULES.entries if SCHEDULES.resolve(kind)().native_steps}
    assert discrete == {"linear", "scaled-linear", "cosine"}
    assert set(TIME_SAMPLERS.entries) == {"uniform", "log-normal", "loss-aware"}
    with pytest.raises(UserError, match="remembers losses step by step, and schedule 'straight' is continuous"):
        DDPMConfig(network=MLPConfig(), schedule="straight", parametrization="v", times="loss-aware").build(
            DataSpec(kind="points", shape=(2,))
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"history": 0}, "history: 0 is not valid: should be greater than or equal to 1"),
        ({"uniform_share": 0.0}, r"uniform_share: 0\.0 is not valid: should be greater than 0"),
        ({"uniform_share": 1.5}, r"uniform_share: 1\.5 is not valid: should be less than or equal to 1"),
        ({"extra_updates": -1}, "extra_updates: -1 is not valid: should be greater than or equal to 0"),
        ({"hystory": 3}, "hystory: unknown field; did you mean 'history'"),
    ],
)
def test_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        TIME_SAMPLERS.parse({"kind": "loss-aware", **values})
