"""Monte Carlo returns and their standardisation. Pure functions on NumPy arrays."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np

StandardizationMethod = Literal["episode", "rollout", "running"]

EPSILON = float(np.finfo(np.float32).eps)
"""Added to the standard deviation, as in the notebook, so that a constant return standardises to 0."""

RETURN_MEMORY = 20_000
"""Effective memory, in transitions, of the running statistics."""


@dataclass(frozen=True)
class ReturnStatistics:
    """
    Mean and variance of the returns seen so far, in reward units.

    The initial value (0, 1) leaves a value unchanged, which is right for a critic that has not been trained.
    """

    mean: float = 0.0
    variance: float = 1.0
    count: float = 0.0
    """Transitions remembered, at most the memory given to :func:`update_statistics`."""

    @property
    def std(self) -> float:
        """Population standard deviation."""
        return float(np.sqrt(self.variance))


def discounted_returns(rewards: np.ndarray, gamma: float, terminal_value: float = 0.0) -> np.ndarray:
    r"""
    Discounted Monte Carlo return of every step of one episode.

    .. math:: G_t = r_t + \gamma G_{t+1}, \qquad G_T = \text{terminal\_value}

    See Sutton & Barto (2018), eq. 3.9; for the value of the state after a time limit, Pardo et al. (2018),
    https://arxiv.org/abs/1712.00378.

    :param rewards: ``(T,)`` rewards; ``rewards[t]`` is the one received for the action at step ``t``
    :param gamma: Discount factor
    :param terminal_value: Value, in reward units, of the state after the last step: 0 if the episode terminated
    :return: ``(T,)`` float64 returns
    """
    # Plain floats: a C loop over a Python list is 20 times faster than indexing the array
    backward = accumulate(rewards[::-1].tolist(), lambda future, reward: reward + gamma * future, initial=terminal_value)
    returns = np.fromiter(backward, dtype=np.float64, count=len(rewards) + 1)
    return returns[:0:-1]


def standardize(returns: np.ndarray, mean: float, std: float) -> np.ndarray:
    """
    Shift and scale to mean 0 and standard deviation 1.

    :param returns: ``(n,)`` returns in reward units
    :param mean: Mean to subtract
    :param std: Standard deviation to divide by, after adding :data:`EPSILON`
    :return: ``(n,)`` standardised returns
    """
    return (returns - mean) / (std + EPSILON)


def unstandardize(values: np.ndarray, mean: float, std: float) -> np.ndarray:
    """
    Invert :func:`standardize`: turn what a critic predicts back into reward units.

    :param values: ``(n,)`` standardised values
    :param mean: Mean that was subtracted
    :param std: Standard deviation that was divided by
    :return: ``(n,)`` values in reward units
    """
    return values * (std + EPSILON) + mean


def update_statistics(statistics: ReturnStatistics, returns: np.ndarray, memory: int = RETURN_MEMORY) -> ReturnStatistics:
    """
    Fold new returns into running statistics with a bounded memory.

    Merges two samples as Chan et al. (1979), http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf;
    the count of the old one is capped, so it fades exponentially once ``memory`` transitions have been seen.

    :param statistics: Statistics so far
    :param returns: ``(n,)`` new returns in reward units, ``n >= 1``
    :param memory: The most transitions that old returns can weigh
    :return: The merged statistics
    """
    n_new = len(returns)
    total = statistics.count + n_new
    delta = float(returns.mean()) - statistics.mean
    sum_of_squares = statistics.variance * statistics.count + float(returns.var()) * n_new
    return ReturnStatistics(
        mean=statistics.mean + delta * n_new / total,
        variance=(sum_of_squares + delta**2 * statistics.count * n_new / total) / total,
        count=float(min(total, memory)),
    )


def standardize_returns(
    returns: np.ndarray,
    episode_lengths: np.ndarray,
    method: StandardizationMethod | None,
    statistics: ReturnStatistics,
) -> tuple[np.ndarray, ReturnStatistics]:
    """
    Turn the raw returns of one update into the targets that are trained on.

    :param returns: ``(n,)`` returns in reward units, one episode behind the other, ``n >= 1``
    :param episode_lengths: ``(n_episodes,)`` number of steps of each episode; sums to ``n``
    :param method: ``"episode"``: each episode by its own statistics. ``"rollout"``: by those of all ``n`` returns.
        ``"running"``: by running statistics, to which these returns are added first. ``None``: unchanged
    :param statistics: The running statistics before this update
    :return: ``(n,)`` targets, and the statistics after this update: the running ones for ``"running"``,
        those of these returns otherwise (they describe, nothing depends on them)
    """
    if method == "running":
        statistics = update_statistics(statistics, returns)
        return standardize(returns, statistics.mean, statistics.std), statistics

    statistics = update_statistics(ReturnStatistics(), returns)
    if method is None:
        return returns, statistics
    if method == "rollout":
        return standardize(returns, statistics.mean, statistics.std), statistics
    episodes = np.split(returns, np.cumsum(episode_lengths)[:-1])
    return np.concatenate([standardize(episode, episode.mean(), episode.std()) for episode in episodes]), statistics
