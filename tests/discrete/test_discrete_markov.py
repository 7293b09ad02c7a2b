import itertools
import math

import pytest
import torch

from osmose.configuration import ConfigError
from osmose.discrete import PROCESSES
from osmose.discrete.markov import Absorbing, BirthDeath, Death, MarkovChain, Uniform
from osmose.errors import UserError

#: Nothing is special about it: cycles, two states that do not talk, rates of different sizes.
RATES = torch.tensor(
    [[0.0, 0.7, 0.0, 0.3], [1.3, 0.0, 0.4, 0.0], [0.2, 2.1, 0.0, 0.9], [0.6, 0.0, 0.5, 0.0]], dtype=torch.float64
)
ODD = MarkovChain(RATES - RATES.sum(0).diag())
LAW = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64)
CHAINS = {
    "odd": ODD,
    "death": Death().chain(4),
    "uniform": Uniform().chain(4),
    "absorbing": Absorbing().chain(3),
    "birth-death": BirthDeath(births=(0.5, 1.5, 0.2), deaths=(1.0, 0.3, 2.0)).chain(4),
}
every_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())


def close(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=torch.float64), rtol=tolerance, atol=tolerance)


# --- the chain ------------------------------------------------------------------------------------------------------


@every_chain
@pytest.mark.parametrize("tau", [0.0, 0.01, 0.7, 3.0, 40.0])
def test_a_transition_is_a_law_in_every_column(chain, tau):
    p = chain.transition(tau)
    assert p.dtype == torch.float64
    assert p.shape == (chain.num_states, chain.num_states) == (4, 4)
    assert bool((p >= 0).all())
    close(p.sum(0), torch.ones(4))
    if tau == 0:
        close(p, torch.eye(4))


@every_chain
def test_transitions_are_a_semigroup_and_begin_with_the_generator(chain):
    close(chain.transition(0.3) @ chain.transition(0.9), chain.transition(1.2))
    h = 1e-6
    close((chain.transition(h) - torch.eye(4, dtype=torch.float64)) / h, chain.generator, 1e-5)
    # Kolmogorov's forward equation, dp/dtau = Q p, by a central difference.
    slope = (chain.marginal(LAW, 0.8 + 1e-4) - chain.marginal(LAW, 0.8 - 1e-4)) / 2e-4
    close(slope, chain.generator @ chain.marginal(LAW, 0.8), 1e-7)


@pytest.mark.parametrize("tau", [0.05, 0.9, 4.0])
def test_deaths_are_binomial(tau):
    p, got = math.exp(-tau), Death().chain(7).transition(tau)
    for m, n in itertools.product(range(7), repeat=2):
        want = math.comb(n, m) * p**m * (1 - p) ** (n - m) if m <= n else 0.0
        assert got[m, n].item() == pytest.approx(want, rel=1e-11, abs=1e-15)


@pytest.mark.parametrize("levels", [2, 5])
@pytest.mark.parametrize("tau", [0.05, 0.9, 4.0])
def test_uniform_and_absorbing_in_closed_form(levels, tau):
    kept, eye = math.exp(-tau), torch.eye(levels, dtype=torch.float64)
    close(Uniform().chain(levels).transition(tau), kept * eye + (1 - kept) / levels)
    got = Absorbing().chain(levels).transition(tau)
    assert got.shape == (levels + 1, levels + 1)
    close(got[:levels, :levels], kept * eye)
    close(got[levels, :levels], [1 - kept] * levels)
    close(got[:, levels], [0.0] * levels + [1.0])


@pytest.mark.parametrize("kind", ["death", "uniform", "absorbing"])
def test_every_process_goes_to_its_end(kind):
    process = PROCESSES.parse(kind)
    assert process.kind == kind
    states = process.states(5)
    chain, end = process.chain(5), process.end(5)
    assert chain.num_states == states == len(end)
    start = torch.full((states,), 1 / states, dtype=torch.float64)
    close(chain.marginal(start, 45.0), end)
    close(chain.generator @ end, torch.zeros(states))


# --- birth and death ------------------------------------------------------------------------------------------------


def test_births_and_deaths_are_where_they_belong():
    q = BirthDeath(births=(1.0, 2.0), deaths=(3.0, 4.0)).generator(3)
    close(q, [[-1.0, 3.0, 0.0], [1.0, -5.0, 4.0], [0.0, 2.0, -4.0]])
    # Pure death is one of them.
    close(BirthDeath(births=(0.0,) * 4, deaths=(1.0, 2.0, 3.0, 4.0)).generator(5), Death().generator(5))


def test_the_stationary_law_is_in_detailed_balance():
    births, deaths = (0.5, 1.5, 0.2), (1.0, 0.3, 2.0)
    process = BirthDeath(births=births, deaths=deaths)
    law = [1.0]
    for up, down in zip(births, deaths, strict=True):
        law.append(law[-1] * up / down)
    want = torch.tensor(law, dtype=torch.float64) / sum(law)
    close(process.end(4), want)
    close(process.chain(4).marginal(LAW, 200.0), want, 1e-9)
    # Begun there it looks the same backwards.
    close(process.chain(4).reverse_rates(want, 0.7), process.generator(4))


def test_where_a_state_is_never_left_all_ends_there():
    close(BirthDeath(births=(0.0, 1.0), deaths=(1.0, 2.0)).end(3), [1.0, 0.0, 0.0])
    close(BirthDeath(births=(1.0, 1.0), deaths=(0.0, 0.0)).end(3), [0.0, 0.0, 1.0])


# --- backwards ------------------------------------------------------------------------------------------------------


@every_chain
def test_the_reversed_chain_has_the_joint_law_of_the_chain(chain):
    # P(x_s, x_t): forward, by its transition; backward, from the law of x_t along the reverse rates, as a fine product
    # of exponentials with the rates in the middle of each step.
    s, t, pieces = 0.3, 1.1, 800
    forward = (chain.transition(t - s) * chain.marginal(LAW, s)).T  # [x_s, x_t]
    back, h = torch.eye(4, dtype=torch.float64), (t - s) / pieces
    for k in range(pieces):
        rates = chain.reverse_rates(LAW, t - (k + 0.5) * h)
        assert k or bool((rates - rates.diagonal().diag() >= 0).all())
        back = torch.linalg.matrix_exp(h * rates) @ back
    close(back * chain.marginal(LAW, t), forward, 2e-6)
    # The exact step backwards is what this goes to.
    close(chain.kernel(LAW, s, t) * chain.marginal(LAW, t), forward)


@every_chain
def test_reverse_rates_are_the_limit_of_the_step_backwards(chain):
    h = 1e-6
    step = (chain.kernel(LAW, 0.6 - h, 0.6) - torch.eye(4, dtype=torch.float64)) / h
    close(step, chain.reverse_rates(LAW, 0.6), 2e-5)
    close(chain.reverse_rates(LAW, 0.6).sum(0), torch.zeros(4))


@every_chain
def test_the_rates_are_the_mean_of_those_given_the_beginning(chain):
    tau, posterior = 0.6, chain.posterior(LAW, 0.6)
    given = [chain.reverse_rates(state, tau) for state in torch.eye(4, dtype=torch.float64)]
    mean = sum(rates * posterior[k] for k, rates in enumerate(given))
    want = chain.reverse_rates(LAW, tau)
    off = ~torch.eye(4, dtype=torch.bool)
    close(mean[off], want[off], 1e-11)


@every_chain
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.8), (0.4, 0.8), (0.8, 0.8)])
def test_posterior_kernel_and_bridge_are_bayes_rule_by_enumeration(chain, s, t):
    to_s, on, to_t = chain.transition(s), chain.transition(t - s), chain.transition(t)
    posterior, kernel, bridge = chain.posterior(LAW, t), chain.kernel(LAW, s, t), chain.bridge(s, t)
    whole = torch.zeros(4, 4, 4, dtype=torch.float64)  # [x_0, x_s, x_t]
    for k, n, m in itertools.product(range(4), repeat=3):
        whole[k, n, m] = LAW[k] * to_s[n, k] * on[m, n]
    for k, m in itertools.product(range(4), repeat=2):
        at_m, of_k = whole[:, :, m].sum(), whole[k, :, m].sum()
        assert posterior[k, m].item() == pytest.approx(float(LAW[k] * to_t[m, k] / at_m), abs=1e-13)
        for n in range(4):
            assert kernel[n, m].item() == pytest.approx(float(whole[:, n, m].sum() / at_m), abs=1e-13)
            want = float(whole[k, n, m] / of_k) if of_k > 0 else 0.0
            assert bridge[k, m, n].item() == pytest.approx(want, abs=1e-13)
    # The bridge averaged over what is known of the beginning is the kernel.
    close((bridge * posterior[:, :, None]).sum(0).T, kernel)


def test_what_cannot_be_reached_has_no_rates_and_no_past():
    chain, two = Death().chain(5), torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    for made in (chain.reverse_rates(two, 0.5), chain.posterior(two, 0.5), chain.kernel(two, 0.2, 0.5)):
        assert bool(made.isfinite().all())
        assert bool((made[:, 3:] == 0).all())
    assert bool((chain.bridge(0.2, 0.5)[2, 3:] == 0).all())
    # Given 2 units, those that are missing come back at p / (1 - p) each.
    odds = math.exp(-0.5) / (1 - math.exp(-0.5))
    rates = chain.reverse_rates(two, 0.5)
    assert rates[1, 0].item() == pytest.approx(2 * odds, rel=1e-12)
    assert rates[2, 1].item() == pytest.approx(odds, rel=1e-12)
    assert rates[3, 2].item() == 0


# --- paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "start"), [("odd", 2), ("death", 3), ("absorbing", 1)])
def test_paths_have_the_law_of_the_transition(name, start):
    chain, generator, count = CHAINS[name], torch.Generator().manual_seed(3), 3000
    ends = torch.zeros(4, dtype=torch.float64)
    for _ in range(count):
        path = chain.simulate(start, 0.7, generator)
        assert path[0] == (0.0, start)
        times, states = zip(*path, strict=True)
        assert list(times) == sorted(times)
        assert times[-1] <= 0.7
        assert all(float(chain.generator[b, a]) > 0 for a, b in itertools.pairwise(states))
        ends[states[-1]] += 1
    want = chain.transition(0.7)[:, start] * count
    assert bool((ends[want == 0] == 0).all())
    seen = want > 0
    chi_square = ((ends - want).square() / want)[seen].sum()
    assert chi_square < 16.3  # 3 degrees of freedom at most, p = 1e-3


def test_a_path_waits_as_long_as_its_rate_says():
    generator, chain = torch.Generator().manual_seed(0), Death().chain(4)
    first = torch.tensor([chain.simulate(3, 50.0, generator)[1][0] for _ in range(2000)])
    assert first.mean().item() == pytest.approx(1 / 3, rel=0.07)
    assert [state for _, state in chain.simulate(3, 500.0, generator)] == [3, 2, 1, 0]
    assert chain.simulate(0, 50.0, generator) == [(0.0, 0)]


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0.0, 1.0]], r"generator: shape \(1, 2\) is not valid: should be square"),
        ([0.0, 1.0], r"shape \(2,\) is not valid"),
        ([[-1.0, -0.5], [1.0, 0.5]], "the rate -0.5 from state 1 to 0 is not valid: must be >= 0"),
        ([[-1.0, math.nan], [1.0, 0.0]], "the rate nan from state 1 to 0"),
        ([[-1.0, 0.0], [math.inf, 0.0]], "the rate inf from state 0 to 1"),
        ([[-1.0, 0.5], [1.0, -0.4]], "column 1 sums to 0.1"),
        ([[-1.0, 1.0], [0.5, -0.5]], "column 0 sums to -0.5"),  # rows that sum to 0: the other convention
    ],
)
def test_a_matrix_that_is_no_generator_is_refused(rows, message):
    with pytest.raises(UserError, match=message):
        MarkovChain(torch.tensor(rows))


def test_a_generator_may_have_any_dtype_and_size_of_rates():
    close(MarkovChain(torch.tensor([[-2, 1], [2, -1]])).generator, [[-2.0, 1.0], [2.0, -1.0]])
    big = 1e8 * ODD.generator
    close(MarkovChain(big).transition(1e-8), ODD.transition(1.0))


@pytest.mark.parametrize(("s", "t"), [(-0.1, 0.5), (0.6, 0.5), (math.nan, 0.5)])
def test_times_in_the_wrong_order_are_refused(s, t):
    for use in (lambda: ODD.kernel(LAW, s, t), lambda: ODD.bridge(s, t)):
        with pytest.raises(UserError, match=r"should be 0 <= s <= t|must be at least 0"):
            use()


def test_a_negative_time_is_refused():
    with pytest.raises(UserError, match=r"tau: -0\.5 is not valid: must be at least 0"):
        ODD.transition(-0.5)


@pytest.mark.parametrize(
    ("births", "deaths", "message"),
    [
        ((1.0, -2.0), (1.0, 1.0), "births: -2.0 is not valid: must be at least 0"),
        ((1.0, 2.0), (1.0, -1.0), "deaths: -1.0 is not valid"),
        ((1.0, 2.0), (1.0,), "deaths: 1 rates given beside 2 births"),
        ((0.0, 0.0), (0.0, 0.0), "births: all rates are 0"),
        ((1.0, math.inf), (1.0, 1.0), "births.1: inf is not valid"),
    ],
)
def test_rates_that_are_none_are_refused(births, deaths, message):
    with pytest.raises(ConfigError, match=message):
        BirthDeath.parse({"births": births, "deaths": deaths})


def test_rates_of_another_number_of_levels_are_refused():
    with pytest.raises(UserError, match=r"process\.births: 2 rates given for 5 levels; 4 needed"):
        BirthDeath(births=(1.0, 2.0), deaths=(1.0, 1.0)).chain(5)


def test_an_unknown_process_is_named():
    with pytest.raises(UserError, match=r"unknown process 'deaths'.*death"):
        PROCESSES.parse("deaths")
