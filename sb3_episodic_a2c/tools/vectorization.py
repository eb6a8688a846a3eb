"""How copies of an environment are stepped: by SB3, in one process or several, or by gymnasium or EnvPool, all at once."""

import importlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from stable_baselines3.common import env_util
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_episodic_a2c.vector import GymnasiumVecEnv

VECTORIZATIONS = ("dummy", "subproc", "gymnasium", "envpool")

HELP = (
    "how copies of the environment are stepped. dummy, subproc: by SB3, in one process or one each; gymnasium: by the "
    "environment's own vectorised form, or gymnasium's loop; envpool: by EnvPool (default: %(default)s)"
)
"""Of the commands' argument."""


def check_vectorization(vectorization: str, env_id: str) -> None:
    """
    :param vectorization: One of :data:`VECTORIZATIONS`
    :param env_id: Id of the environment
    :raises ValueError: It is none of them, or EnvPool does not have the environment
    :raises ModuleNotFoundError: EnvPool is not installed
    """
    if vectorization not in VECTORIZATIONS:
        raise ValueError(f"`vectorization` {vectorization!r} is unknown. Use one of {VECTORIZATIONS}.")
    if vectorization != "envpool":
        return
    try:
        envpool = importlib.import_module("envpool")
    except ImportError as error:
        raise ModuleNotFoundError("`vectorization` is 'envpool', and EnvPool is not installed", name="envpool") from error
    if env_id not in envpool.list_all_envs():
        raise ValueError(
            f"`env` {env_id} is not in EnvPool. Use another vectorization, or one of `envpool.list_all_envs()` that gymnasium "
            "has as well, as agents are evaluated there."
        )


def make_vec_env(
    env_id: str,
    make_env: Callable[..., gym.Env] | None = None,
    n_envs: int = 1,
    seed: int | None = None,
    vectorization: str = "dummy",
    start_index: int = 0,
    monitor_dir: str | None = None,
    wrapper_class: Callable[[gym.Env], gym.Env] | None = None,
    env_kwargs: dict[str, Any] | None = None,
    wrapper_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> VecEnv:
    """
    SB3's function of that name, for all vectorisations.

    Unlike it, this does not ask for images that are not looked at. ``A2C("MlpPolicy", env_id)`` does: LunarLander then adds a
    particle to its physics at every thrust, which only ``render`` removes, so long episodes get ten times slower.

    :param env_id: Id of the environment
    :param make_env: Makes a copy; by default ``gymnasium.make`` of ``env_id``
    :param n_envs: Number of copies
    :param seed: Seed of the first copy. The next seeds follow
    :param vectorization: ``"dummy"``, ``"subproc"``: SB3's. ``"gymnasium"``: the environment's own vectorised form, or
        gymnasium's loop over single ones if it has none or there is a wrapper. ``"envpool"``: EnvPool on one thread
    :param start_index: Number of the first copy, and of its log
    :param monitor_dir: Folder of the logs ``*.monitor.csv``; one for all copies where they are stepped at once
    :param wrapper_class: Applied to each copy
    :param env_kwargs: Arguments to make a copy with
    :param wrapper_kwargs: Arguments of the wrapper
    :param kwargs: Further arguments of SB3's function, which mean nothing to the last two
    :return: The environments
    :raises ValueError: EnvPool does not have the environment, or is to apply a wrapper
    :raises ModuleNotFoundError: EnvPool is not installed
    """
    check_vectorization(vectorization, env_id)
    env_kwargs, wrapper_kwargs = env_kwargs or {}, wrapper_kwargs or {}
    make = make_env or partial(gym.make, env_id)
    if vectorization in ("dummy", "subproc"):
        if vectorization == "subproc":
            kwargs["vec_env_cls"] = SubprocVecEnv
        return env_util.make_vec_env(
            make,
            n_envs,
            seed,
            start_index,
            monitor_dir,
            wrapper_class,
            env_kwargs,
            wrapper_kwargs=wrapper_kwargs,
            **kwargs,
        )
    if vectorization == "envpool":
        if wrapper_class is not None:
            raise ValueError(
                "`vectorization` is 'envpool', but EnvPool has no place for a wrapper (`env_wrapper`) of single environments. "
                "Use another vectorization, or an entry without it."
            )
        vector_env: VectorEnv = importlib.import_module("envpool").make(
            env_id,
            env_type="gymnasium",
            num_envs=n_envs,
            num_threads=1,
            # RL Zoo draws its seeds below 2**32, and EnvPool takes 32 bits with a sign
            seed=0 if seed is None else (seed + start_index) % 2**31,
            **env_kwargs,
        )
    elif wrapper_class is None and env_id in gym.registry and gym.spec(env_id).vector_entry_point is not None:
        vector_env = gym.make_vec(env_id, n_envs, "vector_entry_point", **env_kwargs)
    else:

        def make_one() -> gym.Env:
            env = make(**env_kwargs)
            return env if wrapper_class is None else wrapper_class(env, **wrapper_kwargs)

        # As SB3's: no step that only starts an episode
        vector_env = SyncVectorEnv([make_one] * n_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    filename = None if monitor_dir is None else os.path.join(monitor_dir, str(start_index))
    env = GymnasiumVecEnv(vector_env, filename=filename)
    if seed is not None:
        env.seed(seed + start_index)
    return env
