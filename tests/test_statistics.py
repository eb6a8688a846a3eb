"""The statistics of a comparison: known answers, brute force, coverage."""

import itertools
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from sb3_episodic_a2c.tools.comparison.statistics import (
    Estimate,
    difference,
    iqm,
    iqm_band,
    mean_and_std,
    normalized_area,
    performance_profile,
    probability_of_improvement,
    profile_band,
    stratified_iqm,
)


def naive_iqm(scores: list[float]) -> float:
    scores = sorted(scores)
    n_cut = len(scores) // 4
    kept = scores[n_cut : len(scores) - n_cut]
    return sum(kept) / len(kept)


# ------------------------------------------------------------------ interquartile mean


def test_iqm_of_known_samples() -> None:
    assert iqm(np.arange(8.0)) == 3.5
    # An outlier at each end changes nothing
    assert iqm(np.array([-1e9, 1.0, 2.0, 1e9])) == 1.5
    assert iqm(np.array([7.0])) == 7.0
    np.testing.assert_array_equal(iqm(np.array([[0.0, 1, 2, 3], [4, 5, 6, 70]])), [1.5, 5.5])


@pytest.mark.parametrize("n_runs", [1, 2, 3, 4, 5, 7, 10, 11, 50])
def test_iqm_is_a_naive_loop(n_runs: int) -> None:
    scores = np.random.default_rng(n_runs).normal(size=n_runs)
    assert iqm(scores) == pytest.approx(naive_iqm(list(scores)))


def all_resamples(strata: list[list[float]]) -> np.ndarray:
    """The IQM of every possible resample, by loops."""
    values = []
    for resamples in itertools.product(*(itertools.product(sample, repeat=len(sample)) for sample in strata)):
        values.append(naive_iqm([score for resample in resamples for score in resample]))
    return np.array(values)


@pytest.mark.parametrize(
    "strata", [[[1.0, 2.0, 4.0, 8.0]], [[1.0, 5.0], [2.0, 3.0, 9.0]], [[0.0, 1.0, 3.0], [10.0, 11.0, 15.0], [5.0, 7.0]]]
)
@pytest.mark.parametrize("confidence", [0.5, 0.8])
def test_interval_is_that_of_all_resamples(strata: list[list[float]], confidence: float) -> None:
    estimate = stratified_iqm([np.array(sample) for sample in strata], np.random.default_rng(0), confidence, 20_000)
    assert estimate.value == pytest.approx(naive_iqm([score for sample in strata for score in sample]))
    n_runs, n_strata = sum(map(len, strata)), len(strata)
    quantile = stats.t(n_runs - n_strata).ppf(0.5 + confidence / 2) * math.sqrt((n_runs - 1) / (n_runs - n_strata))
    tail = stats.norm.sf(quantile)
    # The distribution has steps, so a limit is where it passes the level
    exact = all_resamples(strata)
    assert (exact < estimate.low - 1e-9).mean() - 0.01 <= tail <= (exact <= estimate.low + 1e-9).mean() + 0.01
    assert (exact > estimate.high + 1e-9).mean() - 0.01 <= tail <= (exact >= estimate.high - 1e-9).mean() + 0.01


def test_strata_are_resampled_on_their_own() -> None:
    """Environments of different level but without spread leave no doubt. Resampling all runs together would."""
    estimate = stratified_iqm([np.zeros(5), np.full(5, 100.0)], np.random.default_rng(0))
    assert estimate == (50.0, 50.0, 50.0)


def test_the_rng_decides_and_units_do_not_matter() -> None:
    scores = [np.random.default_rng(1).normal(size=10), np.random.default_rng(2).normal(size=8)]
    first, again, other = (stratified_iqm(scores, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    scaled = stratified_iqm([100 + 10 * sample for sample in scores], np.random.default_rng(0))
    np.testing.assert_allclose(scaled, 100 + 10 * np.array(first))


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95, 0.99])
def test_more_confidence_is_wider(confidence: float) -> None:
    scores = [np.random.default_rng(1).normal(size=10)]
    wide, narrow = (stratified_iqm(scores, np.random.default_rng(0), level) for level in (confidence, confidence - 0.1))
    assert wide.low < narrow.low < narrow.value == wide.value < narrow.high < wide.high


SCORES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "lognormal": lambda rng, shape: rng.lognormal(size=shape),
    "exponential": lambda rng, shape: rng.exponential(size=shape),
    # As on CartPole-v1: most runs are at or near the maximum
    "saturating": lambda rng, shape: np.minimum(1.0, 0.96 + 0.08 * rng.normal(size=shape)),
}


def coverage(name: str, n_envs: int, n_runs: int, n_repeats: int) -> float:
    """How often the 95% interval holds the IQM of the distribution; the environments differ in level."""
    rng = np.random.default_rng(0)
    level = 0.5 * np.arange(n_envs)[:, None]
    # The IQM of a distribution is that of a very large sample
    truth = iqm((SCORES[name](rng, (n_envs, 1_000_000 // n_envs)) + level).flatten())
    n_covered = 0
    for _ in range(n_repeats):
        estimate = stratified_iqm(list(SCORES[name](rng, (n_envs, n_runs)) + level), rng, n_resamples=1_000)
        n_covered += estimate.low <= truth <= estimate.high
    return n_covered / n_repeats


@pytest.mark.parametrize("name, n_envs", [("normal", 1), ("lognormal", 5)])
def test_coverage(name: str, n_envs: int) -> None:
    assert 0.93 <= coverage(name, n_envs, n_runs=10, n_repeats=1_000) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("n_envs, n_runs", [(1, 5), (1, 10), (1, 20), (5, 5), (5, 10)])
@pytest.mark.parametrize("name", SCORES)
def test_coverage_over_many_repeats(name: str, n_envs: int, n_runs: int) -> None:
    covered = coverage(name, n_envs, n_runs, n_repeats=3_000)
    print(f"{name}, {n_envs} environments, {n_runs} runs: {100 * covered:.1f}%")
    # Two standard errors of 3,000 repeats are 0.8 percent
    assert 0.925 <= covered <= 0.975


# ------------------------------------------------------------------ curves


def test_band_is_an_interval_at_each_point() -> None:
    scores = np.random.default_rng(0).normal(size=(10, 4)).cumsum(axis=1)
    value, low, high = iqm_band(scores, np.random.default_rng(1), n_resamples=20_000)
    assert value.shape == low.shape == high.shape == (4,)
    for index in range(4):
        estimate = stratified_iqm([scores[:, index]], np.random.default_rng(2), n_resamples=20_000)
        np.testing.assert_allclose((value[index], low[index], high[index]), estimate, atol=0.15)


def test_area_is_the_mean_over_the_budget() -> None:
    assert normalized_area(np.array([0, 10, 100]), np.array([7.0, 7.0, 7.0])) == 7.0
    assert normalized_area(np.array([0, 10]), np.array([0.0, 10.0])) == 5.0
    # By hand: 10 * 5 + 90 * 15, over 100
    assert normalized_area(np.array([0, 10, 100]), np.array([0.0, 10.0, 20.0])) == 14.0
    np.testing.assert_array_equal(normalized_area(np.array([5, 15]), np.array([[1.0, 3.0], [0.0, 0.0]])), [2.0, 0.0])
    with pytest.raises(ValueError, match="two evaluations or more"):
        normalized_area(np.array([5]), np.array([1.0]))


def test_mean_and_std() -> None:
    assert mean_and_std(np.array([1.0, 2.0, 3.0])) == (2.0, 1.0)
    assert mean_and_std(np.array([4.0]))[0] == 4.0
    assert math.isnan(mean_and_std(np.array([4.0]))[1])


# ------------------------------------------------------------------ probability of improvement


@pytest.mark.parametrize("seed", range(5))
def test_probability_is_a_naive_count(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Whole numbers, so that there are ties
    ours = [rng.integers(0, 6, size=n).astype(float) for n in (7, 4)]
    others = [rng.integers(0, 6, size=n).astype(float) for n in (5, 9)]
    shares = []
    for sample, other in zip(ours, others, strict=True):
        wins = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x in sample for y in other)
        shares.append(wins / (len(sample) * len(other)))
    estimate = probability_of_improvement(ours, others)
    assert estimate.value == pytest.approx(sum(shares) / 2)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    # With the sides exchanged
    reverse = probability_of_improvement(others, ours)
    np.testing.assert_allclose(reverse, (1 - estimate.value, 1 - estimate.high, 1 - estimate.low), atol=1e-9)


@pytest.mark.parametrize("shift", [0.0, 1.0, 100.0])
def test_limits_are_as_far_as_chance_allows(shift: float) -> None:
    """The equation of Newcombe's method 5, by hand."""
    rng = np.random.default_rng(0)
    ours, others = rng.normal(size=10) + shift, rng.normal(size=6)
    estimate = probability_of_improvement([ours], [others])
    for limit in (estimate.low, estimate.high):
        if limit in (0.0, 1.0):
            continue
        extra = (10 + 6) / 2 - 1
        variance = limit * (1 - limit) / 60 * (1 + extra * ((1 - limit) / (2 - limit) + limit / (1 + limit)))
        assert abs(estimate.value - limit) == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-5)
    assert estimate.low < estimate.value
    assert estimate.value < estimate.high or estimate.value == 1


def test_always_better_keeps_a_doubt() -> None:
    few, many = (probability_of_improvement([np.arange(n) + 100.0], [np.arange(n)]) for n in (3, 30))
    assert few.value == few.high == many.value == many.high == 1.0
    assert few.low < 0.6 < 0.9 < many.low < 1.0
    # Several environments say more than one
    assert few.low < probability_of_improvement([np.arange(3) + 100.0] * 5, [np.arange(3.0)] * 5).low


@pytest.mark.parametrize("shift", [0.0, 1.2])
def test_coverage_of_probability(shift: float) -> None:
    rng = np.random.default_rng(0)
    truth = stats.norm.cdf(shift / math.sqrt(2))
    estimates = [probability_of_improvement([rng.normal(size=10) + shift], [rng.normal(size=10)]) for _ in range(1_000)]
    assert 0.93 <= np.mean([low <= truth <= high for _, low, high in estimates]) <= 0.975


# ------------------------------------------------------------------ performance profile


def test_profile_is_a_naive_count() -> None:
    rng = np.random.default_rng(0)
    strata = [rng.normal(size=4), rng.normal(size=7)]
    thresholds = np.linspace(-2, 2, 9)
    profile = performance_profile(strata, thresholds)
    for threshold, share in zip(thresholds, profile, strict=True):
        naive = [sum(float(score > threshold) for score in sample) / len(sample) for sample in strata]
        assert share == pytest.approx(sum(naive) / 2)
    value, low, high = profile_band(strata, thresholds, np.random.default_rng(1))
    np.testing.assert_array_equal(value, profile)
    assert (np.diff(profile) <= 0).all()
    assert (0 <= low).all() and (low <= value).all() and (value <= high).all() and (high <= 1).all()


# ------------------------------------------------------------------ edges


def test_one_run_has_no_interval() -> None:
    rng = np.random.default_rng(0)
    estimate = stratified_iqm([np.array([3.0])], rng)
    assert estimate.value == 3.0
    assert math.isnan(estimate.low) and math.isnan(estimate.high)
    assert math.isnan(stratified_iqm([np.arange(10.0), np.array([3.0])], rng).low)
    assert math.isnan(probability_of_improvement([np.array([3.0])], [np.array([1.0])]).low)
    assert np.isnan(iqm_band(np.ones((1, 3)), rng)[1]).all()
    assert np.isnan(profile_band([np.array([3.0])], np.arange(3.0), rng)[2]).all()


def test_equal_scores_have_no_width_and_warn_of_nothing() -> None:
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stratified_iqm([np.full(10, 500.0)], rng) == (500.0, 500.0, 500.0)
        assert stratified_iqm([np.full(10, 500.0), np.full(3, 500.0)], rng) == (500.0, 500.0, 500.0)
        np.testing.assert_array_equal(iqm_band(np.full((10, 2), 500.0), rng), np.full((3, 2), 500.0))
        np.testing.assert_array_equal(profile_band([np.ones(5)], np.array([0.0, 2.0]), rng), [[1.0, 0.0]] * 3)
        # With ties only, either side may be better
        tie = probability_of_improvement([np.ones(10)], [np.ones(10)])
        assert tie.value == 0.5
        assert tie.low < 0.3 and tie.high > 0.7


@pytest.mark.parametrize(
    "strata, message",
    [
        ([], "`strata` is empty"),
        ([np.array([])], r"`strata\[0\]` has shape \(0,\)"),
        ([np.ones(2), np.ones((2, 2))], r"`strata\[1\]` has shape \(2, 2\)"),
        ([np.array([1.0, np.nan])], "Leave failed runs out"),
    ],
)
def test_bad_scores(strata: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stratified_iqm(strata, np.random.default_rng(0))
    with pytest.raises(ValueError, match=message):
        probability_of_improvement(strata, strata)
    with pytest.raises(ValueError, match=message):
        performance_profile(strata, np.zeros(1))


def test_bad_arguments() -> None:
    for confidence in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match=f"`confidence` is {confidence}"):
            stratified_iqm([np.ones(2)], np.random.default_rng(0), confidence)
    with pytest.raises(ValueError, match="2 environments and `others` 1"):
        probability_of_improvement([np.ones(2), np.ones(2)], [np.ones(2)])


def test_difference_of_two_means_covers_the_true_one() -> None:
    """Of two normal samples, with Student's intervals of each: as often as it says, or slightly more."""
    rng = np.random.default_rng(0)
    n_covered = 0
    for _ in range(1_000):
        estimates = []
        for mean, std in ((3.0, 1.0), (1.0, 4.0)):
            sample = rng.normal(mean, std, size=10)
            low, high = stats.t.interval(0.95, 9, loc=sample.mean(), scale=stats.sem(sample))
            estimates.append(Estimate(float(sample.mean()), float(low), float(high)))
        result = difference(*estimates)
        assert result.value == estimates[0].value - estimates[1].value
        n_covered += result.low <= 2.0 <= result.high
    assert 930 <= n_covered <= 990
    # By hand: 3 and 4 make 5
    assert difference(Estimate(10.0, 7.0, 12.0), Estimate(4.0, 3.0, 8.0)) == (6.0, 1.0, 6.0 + math.sqrt(5))
    assert math.isnan(difference(Estimate(1.0, math.nan, math.nan), Estimate(0.0, 0.0, 0.0)).low)
