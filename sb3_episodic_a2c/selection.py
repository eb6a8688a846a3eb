"""
Which episodes an update is made of: those that finish first, or strictly those that started first.

To reset after the first n FINISHED episodes would over-sample short ones. With 8 environments and an even mixture of episodes
of 10 and 200 steps, the mean length trained on would be about 50 instead of 105. Neither rule here has this bias
(``tests/test_collecting.py`` holds both to 3%): :class:`TakeFinished` uses every env step exactly once, :class:`TakeStarted`
chooses by the start of an episode.
"""

from typing import Any, ClassVar, NamedTuple

import numpy as np


class TransitionCounts(NamedTuple):
    """Transitions of one rollout, counted when its complete episodes become available for training."""

    available: int
    """Transitions of its complete episodes."""
    stale: int
    """How many of these were collected before the rollout started, by an older policy."""
    collected: int
    """Env steps since the rollout started, in all environments."""


class TakeFinished:
    """
    The first ``n_wanted`` episodes that finish; those still running are carried to the next update.

    The head of a carried episode comes from a slightly older policy.

    :param n_envs: Number of environments, each at the start of an episode
    """

    fraction_name: ClassVar[str] = "stale_fraction"
    """What :meth:`fraction` is logged as."""
    restarts: ClassVar[bool] = False
    """Whether all environments are reset once a rollout is complete."""

    def __init__(self, n_envs: int) -> None:
        self.n_wanted = n_envs
        """Episodes of an update."""
        self.is_wanted = np.ones(n_envs, dtype=bool)
        """``(n_envs,)`` whether the running episode of each environment will be used."""
        self.all_wanted = True

    def start_episodes(self, env_indices: np.ndarray) -> None:
        """
        Count new episodes.

        :param env_indices: ``(n_started,)`` environments in which one starts
        """

    def wanted_infos(self, infos: list[dict[str, Any]], dones: np.ndarray) -> tuple[list[dict[str, Any]], np.ndarray]:
        """
        The infos that may report an episode, and their dones. Those whose running episode will be discarded are left out or
        empty: counting these would favour short ones.

        :param infos: The infos of all environments
        :param dones: ``(n_envs,)`` whether their episodes ended
        :return: Both
        """
        reporting: np.ndarray | None = getattr(infos, "reporting", None)
        if reporting is not None:
            # A vector environment knows them; the others must not cost anything
            if len(reporting):
                reporting = reporting[self.is_wanted[reporting]]
            return [infos[index] for index in reporting.tolist()], dones[reporting]
        if self.all_wanted:
            return infos, dones
        return [info if wanted else {} for info, wanted in zip(infos, self.is_wanted.tolist(), strict=True)], dones

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

    Strictly on-policy, at the price of env steps that no update uses.
    """

    fraction_name: ClassVar[str] = "unused_fraction"
    restarts: ClassVar[bool] = True

    def __init__(self, n_envs: int) -> None:
        super().__init__(n_envs)
        self._n_started = n_envs

    def start_episodes(self, env_indices: np.ndarray) -> None:
        # Episodes that start at the same step count in the order of their environments
        order = self._n_started + np.arange(len(env_indices))
        self.is_wanted[env_indices] = order < self.n_wanted
        self._n_started += len(env_indices)
        self.all_wanted = bool(self.is_wanted.all())

    def is_complete(self, n_complete: int) -> bool:
        return not self.is_wanted.any()

    @staticmethod
    def fraction(counts: TransitionCounts) -> float:
        """Share of the env steps that are not used."""
        # An episode that a budget has cut in two counts in the rollout in which it ends
        return max(0.0, 1.0 - counts.available / max(counts.collected, 1))


PARTIAL_EPISODES: dict[str, type[TakeFinished]] = {"carry": TakeFinished, "discard": TakeStarted}
"""The values of ``partial_episodes``."""
