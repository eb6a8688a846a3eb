"""The record of transitions that the rollout buffer gives to training."""

from typing import NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs


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
    """What the policy was given beside the observation, ``(n_transitions, ...)`` each, e.g. action masks."""
    advantages: th.Tensor | None = None
    """``(n_transitions,)`` float32, in the units of ``returns``. Set before :meth:`EpisodicA2C._losses` sees them."""
    old_log_prob: th.Tensor | None = None
    """``(n_transitions,)`` log-probabilities before the update, where the algorithm asks for them; None otherwise."""
