"""Which episodes an update is made of: those that finish first, or strictly those that started first."""

from typing import ClassVar, NamedTuple

import numpy as np


class TransitionCounts(NamedTuple):
    """Of one rollout, when its complete episodes are made available for training."""

    available: int
    """Transitions of its complete episodes."""
    stale: int
    """Those of them that were collected before the rollout started, by an older policy."""
    collected: int
    """Env steps since the rollout started, in all environments."""


class TakeFinished:
    """
    The first ``n_wanted`` episodes that finish; those still running are carried to the next update.

    All env steps are used in the end, so short episodes are not favoured. The head of a carried episode comes from a
    slightly older policy.

    :param n_envs: Number of environments, each in the first step of an episode
    """

    fraction_name: ClassVar[str] = "stale_fraction"
    """What :meth:`fraction` is logged as."""
    restarts: ClassVar[bool] = False
    """Whether all environments start afresh once the rollout is complete."""

    def __init__(self, n_envs: int) -> None:
        self.n_wanted = n_envs
        """Episodes of an update."""
        self.is_wanted = np.ones(n_envs, dtype=bool)
        """``(n_envs,)`` whether the running episode of each environment will be used."""
        self.all_wanted = True

    def start_episodes(self, env_indices: np.ndarray) -> None:
        """
        New episodes start.

        :param env_indices: ``(n_started,)`` their environments
        """

    def is_complete(self, n_complete: int) -> bool:
        """
        Whether a rollout has the episodes that it wants.

        :param n_complete: Complete episodes so far
        """
        return n_complete >= self.n_wanted

    @staticmethod
    def fraction(counts: TransitionCounts) -> float:
        """Share of the transitions that an older policy has collected."""
        return counts.stale / max(counts.available, 1)


class TakeStarted(TakeFinished):
    """
    The ``n_wanted`` episodes that started first since the environments were reset, however long they take.

    Strictly on-policy, at the price of env steps that no update uses. Taking the first episodes to FINISH after a reset
    would favour short ones.
    """

    fraction_name: ClassVar[str] = "unused_fraction"
    restarts: ClassVar[bool] = True

    def __init__(self, n_envs: int) -> None:
        super().__init__(n_envs)
        self._n_started = n_envs

    def start_episodes(self, env_indices: np.ndarray) -> None:
        # In the order of the environments, which start them at the same step
        order = self._n_started + np.arange(len(env_indices))
        self.is_wanted[env_indices] = order < self.n_wanted
        self._n_started += len(env_indices)
        self.all_wanted = bool(self.is_wanted.all())

    def is_complete(self, n_complete: int) -> bool:
        return not self.is_wanted.any()

    @staticmethod
    def fraction(counts: TransitionCounts) -> float:
        """Share of the env steps that are not used."""
        # An episode that was cut in two by a budget counts in the rollout in which it ends
        return max(0.0, 1.0 - counts.available / max(counts.collected, 1))


PARTIAL_EPISODES: dict[str, type[TakeFinished]] = {"carry": TakeFinished, "discard": TakeStarted}
"""The values of ``partial_episodes``."""
