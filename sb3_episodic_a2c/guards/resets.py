"""Resets of the training environments by others than the training, e.g. by a callback that evaluates in them."""

import warnings
from typing import Any

from stable_baselines3.common.vec_env import VecEnv


class ResetWatch:
    """Notices that the environments were reset, by what a reset replaces: their ``reset_infos``, or the first of them."""

    def __init__(self) -> None:
        self._seen: tuple[Any, ...] | None = None

    def __reduce__(self) -> tuple[type["ResetWatch"], tuple[()]]:
        # A copy has seen nothing: its environments are copies or others
        return ResetWatch, ()

    def look(self, env: VecEnv, obs: Any = None) -> None:
        """
        Remember how things are now.

        :param env: The environments, without wrappers
        :param obs: The observations from which the training would go on
        """
        self._seen = (*_marks(env), obs)

    def noticed(self, env: VecEnv, obs: Any = None) -> bool:
        """
        :param env: The environments, without wrappers
        :param obs: The observations from which the training would go on
        :return: Whether these environments were reset since the last look, and the observations were not replaced
        """
        if self._seen is None:
            return False
        seen_env, infos, first_info, seen_obs = self._seen
        new_env, new_infos, new_first_info = _marks(env)
        return new_env is seen_env and obs is seen_obs and not (new_infos is infos and new_first_info is first_info)


def _marks(env: VecEnv) -> tuple[Any, Any, Any]:
    infos = getattr(env, "reset_infos", None)
    # DummyVecEnv replaces the members of a list, SubprocVecEnv the whole
    return env, infos, infos[0] if infos else None


def warn_of_reset(n_steps: int) -> None:
    """
    :param n_steps: Env steps of the episodes that this has cut
    """
    warnings.warn(
        f"The training environments were reset from outside, e.g. by a callback that evaluates in them. They are reset once "
        f"more, and the {n_steps} env steps of their running episodes are dropped. Evaluate in environments of their own.",
        UserWarning,
        stacklevel=3,
    )
