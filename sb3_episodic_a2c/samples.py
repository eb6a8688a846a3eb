"""Records of episodes and their transitions, and how transitions are cut into batches."""

from collections.abc import Iterator
from typing import NamedTuple

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


def cut_episodes(
    episode_lengths: np.ndarray, batch_size: int | None, whole_episodes: bool
) -> Iterator[tuple[slice, np.ndarray]]:
    """
    Cut concatenated episodes into batches.

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
            end = int(episode_ends[max(n_fitting - 1, np.searchsorted(episode_ends, start, side="right"))])
        cuts = episode_ends[(episode_ends > start) & (episode_ends < end)]
        yield slice(start, end), np.diff([start, *cuts, end])
        start = end
