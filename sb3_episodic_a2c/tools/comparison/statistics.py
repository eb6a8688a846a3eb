"""
Statistics over few runs: interquartile means, intervals, probabilities of improvement. The arithmetic is SciPy's.

After Agarwal et al. (2021), "Deep Reinforcement Learning at the Edge of the Statistical Precipice",
https://arxiv.org/abs/2108.13264.

The scores of each environment are one sample, shape ``(n_runs,)``; the samples are called strata. A bootstrap resamples the
runs of each environment separately.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import integrate, optimize, stats

TRIMMED = 0.25
"""Share of the scores that the interquartile mean leaves out at each end."""


class Estimate(NamedTuple):
    """A figure with its confidence interval. With too few runs there is none: ``low`` and ``high`` are NaN."""

    value: float
    low: float
    high: float


def iqm(scores: np.ndarray, axis: int = -1) -> np.ndarray:
    """
    Interquartile mean: the mean without the lowest and the highest quarter, each rounded down to whole runs.

    :param scores: Scores; shape ``(..., n_runs)`` with the default axis
    :param axis: The axis of the runs
    :return: Shape of ``scores`` without that axis
    """
    return stats.trim_mean(scores, TRIMMED, axis=axis)


def check_strata(strata: Sequence[np.ndarray]) -> list[np.ndarray]:
    """
    :param strata: One sample an environment, shape ``(n_runs,)`` each
    :return: The same as float arrays
    :raises ValueError: There is no sample, or one is empty or holds NaN or infinity
    """
    samples = [np.asarray(sample, dtype=float) for sample in strata]
    if not samples:
        raise ValueError("`strata` is empty. Give at least one sample of scores.")
    for index, sample in enumerate(samples):
        if sample.ndim != 1 or sample.size == 0:
            raise ValueError(f"`strata[{index}]` has shape {sample.shape}. It must be (n_runs,) with at least one run.")
        if not np.isfinite(sample).all():
            raise ValueError(f"`strata[{index}]` holds NaN or infinity: {sample}. Leave failed runs out.")
    return samples


def check_confidence(confidence: float) -> None:
    """:raises ValueError: ``confidence`` is not between 0 and 1"""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"`confidence` is {confidence}. It must be between 0 and 1, e.g. 0.95.")


def stratified_iqm(
    strata: Sequence[np.ndarray], rng: np.random.Generator, confidence: float = 0.95, n_resamples: int = 5_000
) -> Estimate:
    """
    Interquartile mean over all runs of all environments, with a stratified bootstrap interval.

    The interval is the percentile interval at an expanded level (Hesterberg 2015,
    https://doi.org/10.1080/00031305.2015.1089789), as with ten runs a plain one is too narrow. The level corrects two things.
    With ``n`` runs in ``k`` strata, resampling each stratum separately has only ``(n - k) / (n - 1)`` of the variance of
    resampling all runs together. And the quantile is Student's with ``n - k`` degrees of freedom, not the normal one.

    In simulations with 1, 3 and 5 environments and 5 to 30 runs each, on normal, lognormal, exponential, uniform and
    saturating scores, a 95% interval covered the population's IQM in 93 to 97% of the cases (``tests/test_statistics.py``),
    a plain percentile interval in 89 to 95%. The studentised bootstrap broke down on scores that pile up at a maximum (76 to
    97%). Where some of fewer than ten runs fail altogether (two separate modes), ours covers only 88 to 91%.

    :param strata: One sample an environment, shape ``(n_runs,)`` each
    :param rng: Draws the resamples
    :param confidence: Of the interval
    :param n_resamples: Number of resamples
    :return: The figure. If a stratum has only one run, there is no interval. If the scores of each stratum are all equal, the
        interval has no width
    :raises ValueError: See :func:`check_strata`
    """
    check_confidence(confidence)
    samples = check_strata(strata)
    value = float(iqm(np.concatenate(samples)))
    level = _expanded_confidence([sample.size for sample in samples], confidence)
    if math.isnan(level):
        return Estimate(value, math.nan, math.nan)
    interval = stats.bootstrap(
        samples,
        lambda *resamples, axis: iqm(np.concatenate(resamples, axis=axis), axis=axis),
        confidence_level=level,
        n_resamples=n_resamples,
        vectorized=True,
        method="percentile",
        rng=rng,
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


def difference(one: Estimate, other: Estimate) -> Estimate:
    """
    :param one: A figure with its interval
    :param other: One that is independent of it
    :return: The difference, with an interval from those of both (MOVER, Zou & Donner 2008, https://doi.org/10.1002/sim.3095)
    """
    value = one.value - other.value
    return Estimate(
        value,
        value - math.hypot(one.value - one.low, other.high - other.value),
        value + math.hypot(one.high - one.value, other.value - other.low),
    )


def iqm_band(
    scores: np.ndarray, rng: np.random.Generator, confidence: float = 0.95, n_resamples: int = 2_000
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Interquartile mean over the runs at each point of a curve, with pointwise intervals as in :func:`stratified_iqm`.

    :param scores: Shape ``(n_runs, n_points)``
    :param rng: Draws the resamples
    :param confidence: Of the intervals
    :param n_resamples: Number of resamples
    :return: Value, lower and upper limit; shape ``(n_points,)`` each
    """
    check_confidence(confidence)
    value = iqm(scores, axis=0)
    level = _expanded_confidence([len(scores)], confidence)
    if math.isnan(level):
        nothing = np.full(value.shape, np.nan)
        return value, nothing, nothing
    interval = stats.bootstrap(
        (scores,), iqm, axis=0, confidence_level=level, n_resamples=n_resamples, method="percentile", rng=rng
    ).confidence_interval
    return value, interval.low, interval.high


def _expanded_confidence(sizes: Sequence[int], confidence: float) -> float:
    """
    Level at which a stratified percentile interval has about the coverage ``confidence``.

    :param sizes: Number of runs of each stratum
    :param confidence: Of the interval
    :return: The level; NaN if a stratum has only one run
    """
    n_runs, n_strata = sum(sizes), len(sizes)
    if min(sizes) < 2:
        return math.nan
    quantile = stats.t.ppf((1 + confidence) / 2, n_runs - n_strata) * math.sqrt((n_runs - 1) / (n_runs - n_strata))
    return float(2 * stats.norm.cdf(quantile) - 1)


def probability_of_improvement(ours: Sequence[np.ndarray], others: Sequence[np.ndarray], confidence: float = 0.95) -> Estimate:
    """
    Probability that a run of ours scores higher than a run of the other on the same environment, a tie counting half.

    It is the Mann-Whitney statistic over the number of pairs, averaged over environments. The interval of one environment is
    Newcombe's (2006, method 5, https://doi.org/10.1002/sim.2324), which keeps a width where one side always wins: a bootstrap
    would claim 1.0 to 1.0 after two runs. The intervals of several environments are combined by the squares of their distances
    to the estimate (MOVER, Zou & Donner 2008, https://doi.org/10.1002/sim.3095). In simulations with 10 runs on each side, a
    95% interval covered 92 to 97% for one environment, and 85 to 94% for the mean of five (least where one side nearly always
    wins).

    :param ours: One sample an environment, shape ``(n_runs,)`` each
    :param others: The same for the other, with the environments in the same order. Numbers of runs may differ
    :param confidence: Of the interval
    :return: The figure. If a side has only one run, there is no interval
    :raises ValueError: See :func:`check_strata`; or the numbers of environments differ
    """
    check_confidence(confidence)
    ours, others = check_strata(ours), check_strata(others)
    if len(ours) != len(others):
        raise ValueError(f"`ours` has {len(ours)} environments and `others` {len(others)}. They must be the same ones.")
    estimates = np.array([_newcombe(x, y, confidence) for x, y in zip(ours, others, strict=True)])
    value, low, high = estimates.T
    mean = float(value.mean())
    down, up = (math.sqrt(np.square(value - limit).sum()) / len(value) for limit in (low, high))
    return Estimate(mean, mean - down, mean + up)


def _newcombe(ours: np.ndarray, others: np.ndarray, confidence: float) -> Estimate:
    n_pairs = ours.size * others.size
    value = float(stats.mannwhitneyu(ours, others).statistic) / n_pairs
    if min(ours.size, others.size) < 2:
        return Estimate(value, math.nan, math.nan)
    quantile = stats.norm.ppf((1 + confidence) / 2)
    more = (ours.size + others.size) / 2 - 1

    def excess(probability: float) -> float:
        """Squared distance to the estimate, minus the largest that is compatible with it: a limit is where this is 0."""
        spread = 1 + more * (1 - probability) / (2 - probability) + more * probability / (1 + probability)
        return (probability - value) ** 2 - quantile**2 * probability * (1 - probability) * spread / n_pairs

    # An estimate of 0 or 1 is itself a root, so these ends are excluded from the search
    low = optimize.brentq(excess, 0.0, min(value, 1 - 1e-9)) if value > 0 else 0.0
    high = optimize.brentq(excess, max(value, 1e-9), 1.0) if value < 1 else 1.0
    return Estimate(value, float(low), float(high))


def performance_profile(strata: Sequence[np.ndarray], thresholds: np.ndarray) -> np.ndarray:
    """
    Share of runs that score above a threshold, averaged over environments.

    :param strata: One sample an environment, shape ``(n_runs,)`` each. The scores are normalised, so that a threshold means
        the same in each
    :param thresholds: Shape ``(n_thresholds,)``
    :return: Shape ``(n_thresholds,)``, from 1 down to 0
    :raises ValueError: See :func:`check_strata`
    """
    shares = [(sample[:, None] > np.asarray(thresholds)).mean(axis=0) for sample in check_strata(strata)]
    return np.mean(shares, axis=0)


def profile_band(
    strata: Sequence[np.ndarray],
    thresholds: np.ndarray,
    rng: np.random.Generator,
    confidence: float = 0.95,
    n_resamples: int = 2_000,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    :func:`performance_profile` with pointwise intervals, as in :func:`stratified_iqm`.

    :return: Value, lower and upper limit; shape ``(n_thresholds,)`` each
    """
    check_confidence(confidence)
    samples = check_strata(strata)
    value = performance_profile(samples, thresholds)
    level = _expanded_confidence([sample.size for sample in samples], confidence)
    if math.isnan(level):
        nothing = np.full(value.shape, np.nan)
        return value, nothing, nothing
    above = [(sample[:, None] > np.asarray(thresholds)).astype(float) for sample in samples]
    interval = stats.bootstrap(
        above,
        lambda *resamples, axis: np.mean([resample.mean(axis=axis) for resample in resamples], axis=0),
        axis=0,
        vectorized=True,
        confidence_level=level,
        n_resamples=n_resamples,
        method="percentile",
        rng=rng,
    ).confidence_interval
    return value, interval.low, interval.high


def mean_and_std(scores: np.ndarray) -> tuple[float, float]:
    """
    :param scores: Shape ``(n_runs,)``
    :return: Mean, and standard deviation between runs (ddof=1; NaN for one run)
    """
    scores = np.asarray(scores, dtype=float)
    return float(scores.mean()), float(scores.std(ddof=1)) if scores.size > 1 else math.nan


def normalized_area(timesteps: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """
    Area under an evaluation curve (by trapezoids), divided by its length: the mean reward over the budget.

    :param timesteps: Env steps of the evaluations, ascending; shape ``(n_evaluations,)``
    :param rewards: Mean rewards there; shape ``(..., n_evaluations)``
    :return: Shape ``(...)``
    :raises ValueError: There are fewer than two evaluations
    """
    timesteps = np.asarray(timesteps, dtype=float)
    if timesteps.size < 2:
        raise ValueError(f"`timesteps` is {timesteps}. An area needs two evaluations or more.")
    return integrate.trapezoid(rewards, timesteps, axis=-1) / (timesteps[-1] - timesteps[0])
