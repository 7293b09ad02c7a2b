"""Verdicts: the quantiles against tables, the intervals by hand, the three answers on their boundaries."""

import math

import numpy as np
import pytest
from scipy import stats

from osmose.studies.verdicts import Finding, all_of, interval, lower, mean_and_spread, same, t_quantile, within


@pytest.mark.parametrize(("seeds", "printed"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (31, 2.042)])
def test_student_s_quantile_is_that_of_the_tables(seeds, printed):
    assert round(t_quantile(seeds - 1), 3) == printed


@pytest.mark.parametrize("freedom", range(1, 31))
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_student_s_quantile_is_scipy_s(freedom, level):
    assert t_quantile(freedom, level) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-6)


def test_the_interval_is_mean_and_t_s_over_root_n():
    # 1, 2, 3: mean 2, s 1, half width 4.302653 / sqrt(3)
    assert interval([1, 2, 3]) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    assert interval([7]) == (-math.inf, math.inf)
    assert interval([4, 4, 4]) == (4, 4)


def test_the_interval_holds_the_truth_in_19_of_20_samples():
    draws = np.random.default_rng(0).normal(5, 2, (4000, 3))
    held = np.mean([low <= 5 <= high for low, high in map(interval, draws)])
    assert held == pytest.approx(0.95, abs=0.011)


A = np.array([10.0, 12.0, 11.0])


@pytest.mark.parametrize(
    ("difference", "margin", "verdict"),
    [
        ((-1, -2, -3), 0, "inconclusive"),  # -2 ± 2.48
        ((-4, -5, -6), 0, "reproduced"),  # -5 ± 2.48
        ((-4, -5, -6), 2.5, "reproduced"),
        ((-4, -5, -6), 2.6, "inconclusive"),
        ((-4, -5, -6), 7.5, "not reproduced"),  # lower, but all of it within the margin
        ((4, 5, 6), 0, "not reproduced"),
        ((1, 2, 3), 0, "inconclusive"),
        ((0, 0, 0), 0, "not reproduced"),  # equal is not lower
        ((-1, -1, -1), 1, "not reproduced"),
    ],
)
def test_lower(difference, margin, verdict):
    assert lower(A + difference, A, margin).verdict == verdict


@pytest.mark.parametrize(
    ("difference", "allowed", "verdict"),
    [
        ((-1, 0, 1), 2.5, "reproduced"),  # 0 ± 2.48
        ((-1, 0, 1), 2.4, "inconclusive"),
        ((9, 10, 11), 7, "not reproduced"),
        ((-9, -10, -11), 7, "not reproduced"),
        ((9, 10, 11), 8, "inconclusive"),
        ((0, 0, 0), 0, "reproduced"),
    ],
)
def test_same(difference, allowed, verdict):
    assert same(A + difference, A, allowed).verdict == verdict


def test_seeds_are_paired():
    noise = np.array([0.0, 50.0, -50.0])
    assert lower(noise - 1 + [0, 0.1, -0.1], noise).verdict == "reproduced"
    assert lower(noise - 1 + [0, 0.1, -0.1], noise[[1, 2, 0]]).verdict == "inconclusive"


def test_one_seed_decides_nothing():
    for finding in (lower([1.0], [1e9]), lower([1e9], [1.0]), same([1.0], [1.0], 1), same([1.0], [9.0], 1)):
        assert finding.verdict == "inconclusive"
        assert "1 seed" in finding.evidence


def test_a_number_stands_for_all_seeds():
    assert lower(A, 20).verdict == "reproduced"
    assert lower(1, A).verdict == "reproduced"
    assert lower(20, A).verdict == "not reproduced"
    assert same(A, 11, 3).verdict == "reproduced"


@pytest.mark.parametrize(("value", "verdict"), [(2, "reproduced"), (3, "reproduced"), (3.01, "not reproduced")])
def test_within_is_for_facts(value, verdict):
    assert within(value, 2, 3).verdict == verdict


def test_a_whole_is_as_good_as_its_worst_part():
    good, bad, open_ = (Finding(v, v) for v in ("reproduced", "not reproduced", "inconclusive"))
    assert all_of(good, good).verdict == "reproduced"
    assert all_of(good, open_).verdict == "inconclusive"
    assert all_of(open_, good, bad).verdict == "not reproduced"
    assert all_of(good, open_).evidence == "(1) reproduced; (2) inconclusive"


def test_the_evidence_has_the_numbers():
    evidence = lower([10.0, 12.0, 11.0], [15.0, 18.0, 16.5], margin=0.5).evidence
    assert evidence == (
        "11.0 ± 1.0 against 16.5 ± 1.5, difference -5.5, 95 % interval -6.74 to -4.26 (n = 3); margin 0.5"
    )


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.23456], "1.235"),
        ([10, 12, 11], "11.0 ± 1.0"),
        ([0.0312, 0.0331, 0.0305], "0.0316 ± 0.0013"),
        ([1234, 1500, 1300], "1345 ± 139"),
        ([3, 3, 3], "3 ± 0"),
        ([1e-9, 3e-9], "2e-09 ± 1.41e-09"),
    ],
)
def test_as_many_digits_as_the_spread_bears(values, text):
    assert mean_and_spread(values) == text


@pytest.mark.parametrize(("a", "b"), [([1, 2], [1, 2, 3]), ([[1, 2]], [1, 2]), ([1, math.nan], [1, 2])])
def test_what_cannot_be_compared_is_refused(a, b):
    with pytest.raises(ValueError, match="cannot be compared"):
        lower(a, b)
