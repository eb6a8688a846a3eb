"""Monte Carlo returns and their standardisation. Pure functions on NumPy arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

EPSILON = float(np.finfo(np.float32).eps)
"""Added to the standard deviation, as in the notebook, so that a constant return standardises to 0."""

RETURN_MEMORY = 20_000
"""Effective memory, in transitions, of the running statistics."""

MANY_EPISODES = 30
"""With so many episodes of the same length, it is as fast to work on a step of all at once as on one after the other."""


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


def discounted_returns_of_episodes(
    rewards: np.ndarray, lengths: np.ndarray, gamma: float, terminal_values: np.ndarray
) -> np.ndarray:
    """
    :func:`discounted_returns` of several episodes, to the last bit.

    :param rewards: ``(n_transitions,)`` rewards, the episodes concatenated
    :param lengths: ``(n_episodes,)`` numbers of steps, each at least 1
    :param gamma: Discount factor
    :param terminal_values: ``(n_episodes,)`` values, in reward units, of the states after the last steps
    :return: ``(n_transitions,)`` float64 returns
    """
    ends = np.cumsum(lengths)
    if len(rewards) < MANY_EPISODES * lengths.max(initial=0):
        parts = zip(np.split(rewards, ends[:-1]), terminal_values.tolist(), strict=True)
        return np.concatenate([discounted_returns(part, gamma, terminal_value) for part, terminal_value in parts])
    # Backward from the ends, a step of all episodes at once; the longest come first, so that those still going on do
    order = np.argsort(-lengths, kind="stable")
    ends = ends[order]
    returns, future = rewards.astype(np.float64), terminal_values[order]
    n_with_more = np.searchsorted(-lengths[order], -np.arange(lengths.max(initial=0)))
    with np.errstate(all="ignore"):
        for step, n in enumerate(n_with_more.tolist(), start=1):
            steps = ends[:n] - step
            future = returns[steps] + gamma * future[:n]
            returns[steps] = future
    return returns


def generalized_advantages(
    rewards: np.ndarray,
    values: np.ndarray,
    gamma: float,
    gae_lambda: float,
    terminal_value: float | np.ndarray = 0.0,
    lengths: np.ndarray | None = None,
) -> np.ndarray:
    r"""
    Generalized advantage of every step of complete episodes.

    .. math:: A_t = \sum_k (\gamma \lambda)^k \delta_{t+k}, \qquad \delta_t = r_t + \gamma V(s_{t+1}) - V(s_t)

    With :math:`\lambda = 1` it is the Monte Carlo return minus :math:`V(s_t)`, with 0 the error of one step.
    See Schulman et al. (2016), eq. 16, https://arxiv.org/abs/1506.02438.

    :param rewards: ``(T,)`` rewards; ``rewards[t]`` is the one received for the action at step ``t``
    :param values: ``(T,)`` values of the states that the actions were taken in, in reward units
    :param gamma: Discount factor
    :param gae_lambda: :math:`\lambda`, from 0 to 1: how far to trust rewards rather than values
    :param terminal_value: Value, in reward units, of the state after the last step of an episode, ``(n_episodes,)`` or one for
        all: 0 if it terminated
    :param lengths: ``(n_episodes,)`` numbers of steps of episodes that are concatenated; None for one episode
    :return: ``(T,)`` float64 advantages in reward units
    """
    rewards, values = rewards.astype(np.float64), values.astype(np.float64)
    lengths = np.array([len(rewards)]) if lengths is None else lengths
    next_values = np.append(values[1:], 0.0)
    next_values[np.cumsum(lengths) - 1] = terminal_value
    deltas = rewards + gamma * next_values - values
    return discounted_returns_of_episodes(deltas, lengths, gamma * gae_lambda, np.zeros(len(lengths)))


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


class Standardization(NamedTuple):
    """A way to turn the raw returns of one update into the targets that are trained on."""

    standardize: Callable[[np.ndarray, np.ndarray, ReturnStatistics], tuple[np.ndarray, ReturnStatistics]]
    """
    ``(returns, episode_lengths, statistics) -> (targets, statistics)``: ``(n,)`` returns in reward units, the episodes
    concatenated; ``(n_episodes,)`` lengths that sum to ``n``; the running statistics before this update. It gives ``(n,)``
    targets and the statistics after this update.
    """
    has_units: bool
    """
    Whether a critic trained on the targets has units, so that its values convert to rewards and back. Without ``is_running``
    these must be the rewards' own.
    """
    is_running: bool = False
    """
    Whether the statistics are carried to the next update, as the units of the targets. Otherwise they only describe these
    returns, for the log.
    """


def _keep_raw(
    returns: np.ndarray, episode_lengths: np.ndarray, statistics: ReturnStatistics
) -> tuple[np.ndarray, ReturnStatistics]:
    return returns, update_statistics(ReturnStatistics(), returns)


def _standardize_each_episode(
    returns: np.ndarray, episode_lengths: np.ndarray, statistics: ReturnStatistics
) -> tuple[np.ndarray, ReturnStatistics]:
    episodes = np.split(returns, np.cumsum(episode_lengths)[:-1])
    targets = np.concatenate([standardize(episode, episode.mean(), episode.std()) for episode in episodes])
    return targets, update_statistics(ReturnStatistics(), returns)


def _standardize_rollout(
    returns: np.ndarray, episode_lengths: np.ndarray, statistics: ReturnStatistics
) -> tuple[np.ndarray, ReturnStatistics]:
    statistics = update_statistics(ReturnStatistics(), returns)
    return standardize(returns, statistics.mean, statistics.std), statistics


def _standardize_running(
    returns: np.ndarray, episode_lengths: np.ndarray, statistics: ReturnStatistics
) -> tuple[np.ndarray, ReturnStatistics]:
    statistics = update_statistics(statistics, returns)
    return standardize(returns, statistics.mean, statistics.std), statistics


STANDARDIZATIONS: dict[str | None, Standardization] = {
    "running": Standardization(_standardize_running, has_units=True, is_running=True),
    "episode": Standardization(_standardize_each_episode, has_units=False),
    "rollout": Standardization(_standardize_rollout, has_units=False),
    None: Standardization(_keep_raw, has_units=True),
}
"""
The values of ``standardize_returns``. ``"running"``: by running statistics, to which the returns are added first.
``"episode"``: each episode by its own. ``"rollout"``: by those of all returns of the update. None: unchanged.

An entry added here is known everywhere: to the constructor's check, to training and to RL Zoo's sampler.
"""


def standardize_returns(
    returns: np.ndarray, episode_lengths: np.ndarray, method: str | None, statistics: ReturnStatistics
) -> tuple[np.ndarray, ReturnStatistics]:
    """
    Turn the raw returns of one update into the targets that are trained on.

    :param returns: ``(n,)`` returns in reward units, the episodes concatenated, ``n >= 1``
    :param episode_lengths: ``(n_episodes,)`` number of steps of each episode; sums to ``n``
    :param method: A key of :data:`STANDARDIZATIONS`
    :param statistics: The running statistics before this update
    :return: ``(n,)`` targets, and the statistics after this update: see :class:`Standardization`
    """
    return STANDARDIZATIONS[method].standardize(returns, episode_lengths, statistics)
