"""Entries of hyperparameters, as RL Zoo's files have them: which one an environment has, and what the Zoo makes of it."""

import argparse
import contextlib
import copy
import difflib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import VecNormalize

from sb3_episodic_a2c.tools.extras import install, lacks_atari
from sb3_episodic_a2c.tools.zoo import (
    ALGORITHMS,
    config_path,
    evaluation_env_kwargs,
    experiment_manager_class,
)

EVAL_SEED = 1_000_000
"""The first evaluation episode of a training with seed 0 starts from it: far above the seeds of training episodes."""


def evaluation_seed(seed: int, n_episodes: int) -> int:
    """
    :param seed: Seed of a training
    :param n_episodes: Episodes of an evaluation
    :return: Seed of the environment in the first of them; the next seeds follow. Two trainings share none
    """
    # NumPy's seeds have 32 bits
    return (EVAL_SEED + seed * n_episodes) % (2**32 - n_episodes)


def read_entry(
    algorithm: str, env_id: str, config: str | None = None, env_kwargs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """
    The entry that the Zoo would use: the environment's, or ``atari`` for such games, or ``default``.

    :param algorithm: Zoo id of the algorithm
    :param env_id: Id of the environment
    :param config: Path of a file of hyperparameters; by default ours, or the Zoo's for its own algorithms
    :param env_kwargs: What the environment cannot be made without. Those of the entry are in the entry
    :return: Hyperparameters as they stand in the file, ``n_timesteps`` among them
    :raises ValueError: The file has none for the environment, or an incomplete entry
    """
    if config is None and algorithm in ALGORITHMS:
        config = str(config_path(algorithm))
    manager = experiment_manager_class()(argparse.Namespace(), algorithm, env_id, "", config=config, env_kwargs=env_kwargs)
    try:
        with contextlib.redirect_stdout(None):
            hyperparams = copy.deepcopy(dict(manager.read_hyperparameters()[1]))
    except Exception as error:
        raise ValueError(
            f"`conf` {manager.config} of {algorithm!r} gives no hyperparameters for {env_id}: "
            f"{type(error).__name__}: {error}. Give a file that has them: --conf {algorithm}:PATH"
        ) from error
    if not isinstance(hyperparams.get("n_timesteps"), int | float) or "policy" not in hyperparams:
        raise ValueError(
            f"`conf` {manager.config}: the entry of {env_id} is {hyperparams}. It must have `n_timesteps` and `policy`."
        )
    return hyperparams


def entry_manager(
    algorithm: str,
    env_id: str,
    hyperparams: dict[str, Any],
    seed: int = 0,
    env_kwargs: dict[str, Any] | None = None,
    statistics: Path | None = None,
    vectorization: str = "dummy",
) -> Any:
    """
    RL Zoo's manager for an entry, without its folders and callbacks of evaluation.

    :param algorithm: Zoo id of the algorithm
    :param env_id: Id of the environment
    :param hyperparams: The entry
    :param seed: Seed of the environments
    :param env_kwargs: Further arguments of evaluation environments, e.g. ``render_mode``
    :param statistics: Saved statistics of ``VecNormalize``, for environments of an agent that is trained no more
    :param vectorization: Of training environments, see :func:`sb3_episodic_a2c.tools.vectorization.make_vec_env`
    :return: The manager. ``create_envs`` makes the environments, with all that the entry wraps them in, and training logs in
        its ``save_path``, numbered from its ``first_index``; ``arguments`` are those of the algorithm's constructor;
        ``callbacks`` are the entry's own
    """
    manager_class: Any = experiment_manager_class()

    class EntryManager(manager_class):
        def _maybe_normalize(self, env: Any, eval_env: bool) -> Any:
            if statistics is None:
                return super()._maybe_normalize(env, eval_env)
            env = VecNormalize.load(str(statistics), env)
            env.training = env.norm_reward = False
            return env

    EntryManager.vectorization = vectorization
    manager = EntryManager(
        argparse.Namespace(),
        algorithm,
        env_id,
        "",
        seed=seed,
        verbose=0,
        eval_env_kwargs={**evaluation_env_kwargs(env_id, hyperparams), **(env_kwargs or {})},
    )
    # A copy: the Zoo deletes entries
    preprocessed = manager._preprocess_hyperparams(copy.deepcopy(hyperparams))
    manager.arguments, manager.env_wrapper, manager.callbacks, manager.vec_env_wrapper = preprocessed
    return manager


def import_packages(packages: Sequence[str]) -> None:
    """
    :param packages: Modules that register environments
    :raises ValueError: One cannot be imported
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(
                f"`gym_packages` {package!r} cannot be imported: {error}. Install it, or put its folder into PYTHONPATH."
            ) from error


def checked_env(env_id: str, **env_kwargs: Any) -> gym.Env:
    """
    :param env_id: Id of the environment
    :param env_kwargs: What it is made with
    :return: The environment, to be closed
    :raises ValueError: It is not registered, or lacks an argument. What else it may raise, e.g. about a missing package, is
        passed on
    """
    if env_id not in gym.registry:
        close = difflib.get_close_matches(env_id, list(gym.registry), n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "Name the module that registers it (--gym-packages)."
        if lacks_atari(env_id):
            hint = f"Atari games need a package that is missing. Install it with: {install('atari')}"
        raise ValueError(f"`env` {env_id!r} is no registered environment. {hint}")
    try:
        # A package that it needs may be missing, e.g. Box2D
        return gym.make(env_id, **env_kwargs)
    except TypeError as error:
        if "argument" not in str(error):
            # A mistake in the environment, which only the traceback shows
            raise
        raise ValueError(
            f"`env` {env_id} cannot be made: {error}. Give it what it needs among the hyperparameters, e.g. "
            '-params env_kwargs:"dict(size=3)"'
        ) from error
