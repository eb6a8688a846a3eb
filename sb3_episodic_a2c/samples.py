"""Records of episodes and their transitions, how transitions are cut into batches, and what others read and write of them."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs


class EpisodeSegment(NamedTuple):
    """A complete episode: the rows ``first_row`` (included) to ``end_row`` (excluded) of the column ``env_index``."""

    env_index: int
    first_row: int
    end_row: int
    terminal_value: float
    """Value of the state after the last step, in reward units: 0 unless a time limit cut the episode."""


class RunningEpisodes(NamedTuple):
    """What running episodes have seen so far."""

    env_indices: np.ndarray
    """``(n_episodes,)`` their columns."""
    observations: th.Tensor | dict[str, th.Tensor]
    """``(n_transitions, *obs_shape)``, the episodes concatenated, or a dict of such tensors."""
    episode_lengths: np.ndarray
    """``(n_episodes,)`` their steps so far, >= 1."""


class EpisodicRolloutBufferSamples(NamedTuple):
    """
    Transitions of complete episodes, concatenated, on the training device.

    ``episode_lengths`` cuts the flat tensors into episodes: it sums to ``n_transitions``. Where a batch limit cut
    an episode, its pieces are counted separately.
    """

    observations: PyTorchObs
    """``(n_transitions, *obs_shape)``, or a dict of such tensors."""
    actions: th.Tensor
    """``(n_transitions,)`` int64 for Discrete, else ``(n_transitions, action_dim)``."""
    returns: th.Tensor
    """``(n_transitions,)`` float32: the targets as trained on, i.e. standardised if that is asked for."""
    episode_lengths: tuple[int, ...]
    """Number of transitions of each episode, in order."""
    policy_inputs: dict[str, th.Tensor]
    """What the policy was given in addition to the observation, ``(n_transitions, ...)`` each, e.g. action masks."""
    advantages: th.Tensor | None = None
    """``(n_transitions,)`` float32, in the units of ``returns``. Set before :meth:`EpisodicA2C._losses` sees them."""
    old_log_prob: th.Tensor | None = None
    """``(n_transitions,)`` log-probabilities before the first update on these transitions. Set as ``advantages`` are."""

    def completed(self, baseline: th.Tensor, log_prob: th.Tensor) -> "EpisodicRolloutBufferSamples":
        """
        The same with ``advantages`` and ``old_log_prob``, where they are missing.

        :param baseline: ``(n_transitions,)`` values; detached, unless the policy loss is also to train the critic
        :param log_prob: ``(n_transitions,)`` log-probabilities of the current policy
        """
        return self._replace(
            advantages=self.returns - baseline if self.advantages is None else self.advantages,
            old_log_prob=log_prob.detach() if self.old_log_prob is None else self.old_log_prob,
        )


def flat_indices(segments: Sequence[tuple[Any, ...]], n_envs: int) -> np.ndarray:
    """
    Where transitions lie in arrays flattened over (row, environment).

    :param segments: Environment, first row (included) and end row (excluded) of each episode; what follows is ignored
    :param n_envs: Number of environments
    :return: ``(n_transitions,)``, the segments concatenated
    """
    env_indices, first_rows, end_rows = np.array([segment[:3] for segment in segments], dtype=np.int64).reshape(-1, 3).T
    lengths = end_rows - first_rows
    # Where a segment would have started, had the first one gone on to it
    starts = first_rows * n_envs + env_indices - (np.cumsum(lengths) - lengths) * n_envs
    return np.arange(lengths.sum()) * n_envs + np.repeat(starts, lengths)


def refuse_returns(episodes: Sequence[EpisodeSegment], returns: np.ndarray, rewards: np.ndarray) -> None:
    """
    Name the first episode with a return that is not finite, and the step that it comes from.

    :param episodes: Complete episodes
    :param returns: ``(n_transitions,)`` their returns, concatenated
    :param rewards: ``(n_rows, n_envs)`` the rewards of all rows
    :raises ValueError: There is one
    """
    lengths = [episode.end_row - episode.first_row for episode in episodes]
    for episode, episode_returns in zip(episodes, np.split(returns, np.cumsum(lengths)[:-1]), strict=True):
        is_finite = np.isfinite(episode_returns)
        if not is_finite.all():
            # The returns of all earlier steps inherit what is wrong
            step = int(np.flatnonzero(~is_finite)[-1])
            reward = rewards[episode.first_row + step, episode.env_index]
            raise ValueError(
                f"The return of environment {episode.env_index} is {episode_returns[step]} at step {step} of "
                f"its {len(episode_returns)}: the reward there was {reward}, the value after the last step "
                f"{episode.terminal_value}. Rewards and observations must be finite: wrap the environment in "
                "stable_baselines3.common.vec_env.VecCheckNan to find the cause."
            )


def cut_episodes(
    episode_lengths: np.ndarray, batch_size: int | None, whole_episodes: bool
) -> Iterator[tuple[slice, np.ndarray]]:
    """
    Cut concatenated episodes into batches. No batch is a single transition, of which batch norm can make nothing, unless
    ``batch_size`` leaves no other way.

    :param episode_lengths: ``(n_episodes,)`` lengths >= 1
    :param batch_size: The most transitions in a batch; None for all of them
    :param whole_episodes: Whether to cut between episodes only. One longer than ``batch_size`` is then a batch of its own
    :return: The transitions of each batch, and the lengths of the episodes, or pieces of them, that it consists of
    """
    episode_ends = episode_lengths.cumsum()
    n_transitions = int(episode_ends[-1])
    if not batch_size or batch_size >= n_transitions:
        yield slice(0, n_transitions), episode_lengths
        return
    start = 0
    while start < n_transitions:
        end = min(start + batch_size, n_transitions)
        if whole_episodes:
            # The last episode that fits, or the first one if none does
            n_fitting = np.searchsorted(episode_ends, end, side="right")
            end = int(episode_ends[max(n_fitting - 1, np.searchsorted(episode_ends, start + 1, side="right"))])
            if end == n_transitions - 1:
                end = n_transitions
        elif end == n_transitions - 1 and batch_size > 2:
            end -= 1
        cuts = episode_ends[(episode_ends > start) & (episode_ends < end)]
        yield slice(start, end), np.diff([start, *cuts, end])
        start = end


# ---------------------------------------------------------------------- arrays that others read and write


class ReadOnlyDict(dict[str, np.ndarray]):
    """Parts of observations: copies."""

    def __setitem__(self, key: str, value: np.ndarray) -> None:
        raise ValueError(f"observations[{key!r}] cannot be set: these are copies, so it would have no effect.")


def read_only(array: np.ndarray) -> np.ndarray:
    """:return: The array, which cannot be written to any more"""
    array.flags.writeable = False
    return array


def one_number_each(name: str, given: np.ndarray, n_transitions: int) -> np.ndarray:
    """
    :param name: What was set
    :param given: One number for each transition
    :param n_transitions: Number of transitions available for training
    :return: ``(n_transitions, 1)`` float32, to train on
    :raises ValueError: There are more or fewer numbers, or some are not finite
    """
    array = np.array(given, dtype=np.float32)
    if array.size != n_transitions or not np.isfinite(array).all():
        raise ValueError(
            f"`{name}` has the shape {array.shape} and the sum {array.sum()}, but there are {n_transitions} transitions. "
            f"It must have one finite number for each, {(n_transitions, 1)}: set it in `on_rollout_end`."
        )
    return array.reshape(-1, 1)


def has_only_finite(array: np.ndarray) -> bool:
    """Takes no memory, unlike ``isfinite`` of all numbers. NaN passes through min and max."""
    return not array.size or (math.isfinite(array.min()) and math.isfinite(array.max()))
