"""What an error in ``learn`` leaves: the model as after its last gradient step, and the environment that caused it named."""

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_episodic_a2c.guards.numbers import check_policy_input, restore_statistics
from sb3_episodic_a2c.guards.signals import uninterrupted
from sb3_episodic_a2c.guards.workers import base_env, stop_workers_if_one_died, watch_workers


@contextmanager
def guarded_training(model: Any) -> Iterator[None]:
    """
    Leave the model as it was after its last gradient step, whatever ends the training, Ctrl-C included.

    The next ``learn`` resets the environments. If an environment raised the error, a note names it.

    :param model: The :class:`EpisodicA2C` that learns in the block
    :raises RuntimeError: A worker process died
    """
    # A setting of this thread. Ctrl-C may come while torch has switched it for a while
    is_grad_enabled = th.is_grad_enabled()
    try:
        with watch_workers(model.env):
            yield
    except BaseException as error:
        # First of all: a second Ctrl-C must not leave half of this undone
        with uninterrupted():
            th.set_grad_enabled(is_grad_enabled)
            if model.env is not None:
                _abandon_rollout(model, model.env, error)
        raise


def _abandon_rollout(model: Any, env: VecEnv, error: BaseException) -> None:
    """Forget the rollout, and say which environment is the cause."""
    steps = model.rollout_buffer.running_steps
    # Which environments have made the last step is unknown: reset all of them
    model._last_obs = None
    model.rollout_buffer.reset()
    restore_statistics(model.get_vec_normalize_env(), model._normalize_statistics)
    where = (
        f"after {model.num_timesteps} env steps. The model is as it was after update {model._n_updates}; "
        "the next `learn` starts with a reset of the environments"
    )
    death = stop_workers_if_one_died(error, env)
    if death is not None:
        raise RuntimeError(
            f"Training ended because {death}, at step {steps.tolist()} of the environments' episodes, {where}, "
            "so first give it as many new ones with `model.set_env(env)`."
        ) from error
    index = find_environment(error, env)
    # Exceptions have notes since Python 3.11
    if index is not None and hasattr(error, "add_note"):
        replace = ""
        if getattr(base_env(env), "closed", False):
            replace = ", so first give it as many new ones with `model.set_env(env)`, as the worker process has ended"
        error.add_note(f"Raised by environment {index} at step {steps[index]} of its episode, {where}{replace}.")


def raise_if_not_finite(model: Any, error: Exception) -> None:
    """
    :param model: The :class:`EpisodicA2C` that could not sample an action
    :param error: What was raised
    :raises ValueError: The cause is a number that is not finite: it names the environment and the step, or the parameter
    """
    vec_normalize = model.get_vec_normalize_env()
    # Normalized ones do not tell: one environment spoils the statistics that normalize the observations of all
    observations = model._last_obs if vec_normalize is None else vec_normalize.get_original_obs()
    assert observations is not None
    tensors = [*model.policy.named_parameters(), *model.policy.named_buffers()]
    try:
        check_policy_input(observations, model.rollout_buffer.running_steps, tensors)
    except ValueError as reason:
        raise reason from error


def warn_of_no_episode(algorithm: str, total_timesteps: int, n_envs: int) -> None:
    """
    Warn that nothing was learned.

    :param algorithm: Name of the algorithm
    :param total_timesteps: The budget of ``learn``
    :param n_envs: Number of environments
    """
    warnings.warn(
        f"No episode ended within total_timesteps={total_timesteps} env steps (n_envs={n_envs}), so nothing was learned from "
        f"them: {algorithm} learns from complete episodes. If episodes never end, give the environment a time limit "
        "(`gymnasium.wrappers.TimeLimit(env, max_episode_steps=...)`); if they are long, raise `total_timesteps`.",
        UserWarning,
        stacklevel=3,
    )


def find_environment(error: BaseException, env: VecEnv) -> int | None:
    """
    :param error: What was raised
    :param env: The environments it may come from
    :return: Index of the environment that raised it; None if it is not known, or none of them did
    """
    base = base_env(env)
    # SB3 and gymnasium step them in turn, and only their stack frames tell which one
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame, called in zip(frames, [*frames[1:], {}], strict=True):
        if frame.get("self") is not base:
            continue
        if isinstance(base, DummyVecEnv) and "env_idx" in frame:
            return frame["env_idx"]
        if isinstance(base, SyncVectorEnv) and "i" in frame and called.get("self") is base.envs[frame["i"]]:
            return frame["i"]
        if isinstance(base, AsyncVectorEnv) and "exctype" in frame:
            # It re-raises the error of the last of its workers
            return frame["index"]
    return None
