"""Paired differences: closed forms, the bootstrap by brute force, and how often its intervals hold."""

import itertools
import math
import statistics

import numpy as np
import pytest

from benchmarks import paired
from benchmarks.paired import bootstrap_interval, difference, holm, t_quantile, t_tails
from tests.tiny import global_rng_state

ZEROS = dict.fromkeys(range(20), 0.0)


def numbered(values) -> dict[int, float]:
    return dict(enumerate(map(float, values)))


def test_a_difference_by_hand():
    found = difference(numbered([1, 1, 0, 5, -2]), numbered([2, 0, 0, 3, -1]))  # -1, 1, 0, 2, -1
    assert (found.mean, found.n, found.wins) == (pytest.approx(0.2), 5, 2)
    # The standard deviation is sqrt(6.8 / 4), so t = 0.2 sqrt(5) / 1.3038.
    assert found.p == pytest.approx(t_tails(0.3430, 4), abs=1e-4)
    # All of 5^5 resamples are -1 in 2^5 of them, which is more than the tail that is cut off.
    assert (found.low, found.high) == (-1, pytest.approx((4 * 2 + 1) / 5))
    assert not found.excludes_zero


def test_only_seeds_that_both_have_count():
    arm = {0: 1.0, 3: 2.0, 4: 7.0, 9: math.nan}
    found = difference(arm, {3: 1.0, 4: 4.0, 5: math.inf})
    assert (found.mean, found.n, found.wins) == (2, 2, 0)
    assert (found.low, found.high) == (1, 3)  # with two values nothing less than the range is left
    assert found.excludes_zero


def test_too_few_seeds_and_values_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match=r"share the seeds \[1\]: at least two"):
        difference({1: 2.0, 2: 3.0}, {1: 1.0, 3: 3.0})
    with pytest.raises(ValueError, match="must be finite"):
        difference({1: 2.0, 2: math.nan}, {1: 1.0, 2: 3.0})


@pytest.mark.parametrize(("values", "p"), [([0.5] * 5, 0.0), ([0.0] * 5, 1.0)])
def test_differences_that_are_all_the_same(values, p):
    found = difference(numbered(values), ZEROS)
    assert (found.low, found.high, found.p) == (values[0], values[0], p)
    assert found.excludes_zero == (values[0] != 0)


def test_interval_mirrors_scales_and_forgets_the_order():
    values = [0.3, -1.2, 2.5, 0.4, 0.9]
    low, high = bootstrap_interval(values)
    assert bootstrap_interval([-value for value in values]) == pytest.approx((-high, -low))
    assert bootstrap_interval([8 * value for value in values]) == pytest.approx((8 * low, 8 * high))
    assert bootstrap_interval(values[::-1]) == pytest.approx((low, high))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_distribution_is_that_of_all_resamples(n):
    values = np.array([0.3, -1.2, 2.5, 0.4, 0.9])[:n]
    means, counts = paired._resampled_means(values)
    assert len(means) == math.comb(2 * n - 1, n) and counts.sum() == n**n
    every = sorted(statistics.fmean(chosen) for chosen in itertools.product(values, repeat=n))
    order = np.argsort(means)
    np.testing.assert_allclose(np.repeat(means[order], counts[order]), every, atol=1e-12)
    tail = statistics.NormalDist().cdf(-math.sqrt(n / (n - 1)) * t_quantile(n - 1))
    outside = max(1, math.ceil(tail * n**n))
    low, high = every[outside - 1], every[-outside]
    assert bootstrap_interval(values.tolist()) == pytest.approx((low, high), abs=1e-12)


def test_enumeration_is_the_limit_of_drawing(monkeypatch):
    values = np.random.default_rng(0).standard_normal(paired.EXACT_UP_TO).tolist()
    exact = bootstrap_interval(values)
    monkeypatch.setattr(paired, "EXACT_UP_TO", 1)
    assert bootstrap_interval(values) == pytest.approx(exact, abs=0.03)


def test_many_seeds_are_drawn_the_same_each_time_and_leave_the_global_generators_alone():
    values = np.random.default_rng(0).standard_normal(20)
    state = global_rng_state()
    found = difference(numbered(values), ZEROS)
    assert found == difference(numbered(values), ZEROS)
    assert global_rng_state() == state
    # Near to Student's interval, which it tends to.
    half = t_quantile(19) * values.std(ddof=1) / math.sqrt(20)
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


@pytest.mark.parametrize(("n", "claimed"), [(2, 0.5), (4, 0.87), (5, 0.92)])
def test_intervals_cover_the_mean_of_normals_as_often_as_the_docstring_says(n, claimed):
    samples = np.random.default_rng(n).standard_normal((3000, n)).tolist()
    intervals = [bootstrap_interval(sample) for sample in samples]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    assert covered == pytest.approx(claimed, abs=0.015)  # three standard errors
    assert 1 - 2 ** (1 - n) >= covered - 0.015


def test_without_the_correction_they_cover_less(monkeypatch):
    """Why the quantiles are moved: of five values the usual interval of 95% covers the mean in 83%."""
    samples = np.random.default_rng(5).standard_normal((3000, 5))
    means, counts = zip(*map(paired._resampled_means, samples), strict=True)
    covered = [
        paired._quantile(m, c, 0.025) <= 0 <= -paired._quantile(-m, c, 0.025)
        for m, c in zip(means, counts, strict=True)
    ]
    assert np.mean(covered) == pytest.approx(0.83, abs=0.02)


def test_the_t_test_keeps_its_level():
    samples = np.random.default_rng(1).standard_normal((2500, 5)).tolist()
    p_values = np.array([paired.t_test(sample) for sample in samples])
    for level in (0.01, 0.05, 0.5):
        assert np.mean(p_values <= level) == pytest.approx(level, abs=4 * math.sqrt(level / 2500))


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # of the printed tables
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (7, 2.3646), (10, 2.2281), (30, 2.0423)],
)
def test_quantiles_of_student(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=5e-5)


def test_tails_of_student_in_closed_form():
    assert t_tails(-1, 1) == pytest.approx(0.5)  # Cauchy's quartile
    assert t_tails(3, 2) == pytest.approx(1 - 3 / math.sqrt(11))
    assert t_tails(0, 7) == 1 and t_tails(1e9, 4) < 1e-12


def test_holm_by_hand():
    # The least times 4, the next times 3, then 2; never less than one before it, never above 1.
    assert holm([0.03, 0.01, 0.4, 0.02]) == pytest.approx([0.06, 0.04, 0.4, 0.06])
    assert holm([0.7, 0.9]) == [1, 1]
    assert holm([]) == []
