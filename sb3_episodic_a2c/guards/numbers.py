"""
Numbers that are not finite: where they come from, and what they spoil.

Where they are refused: an observation before an action is chosen for it (:func:`check_policy_input`) and at the end of its
episode (``EpisodicRolloutBuffer.check_observations``); a reward at the end of its episode
(``EpisodicRolloutBuffer.compute_returns``), with ``VecNormalize`` at once (:func:`check_rewards`); a gradient and what
a schedule returns before the step of the optimizer.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

NOT_MADE = "so {step} was not made and the parameters are as they were before it."


def has_finite_numbers(observations: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
    """
    :param observations: ``(n, *obs_shape)``, or a dict of such arrays
    :return: ``(n,)`` whether all numbers of an observation are finite
    """
    arrays = observations.values() if isinstance(observations, dict) else [observations]
    return np.logical_and.reduce([np.isfinite(array).reshape(len(array), -1).all(axis=1) for array in arrays])


def check_policy_input(
    observations: np.ndarray | dict[str, np.ndarray], steps: np.ndarray, tensors: Iterable[tuple[str, th.Tensor]]
) -> None:
    """
    Find the reason why no action could be sampled.

    :param observations: ``(n_envs, *obs_shape)``, or a dict of such arrays: what the policy was given
    :param steps: ``(n_envs,)`` steps that the environments have made in their running episodes
    :param tensors: Parameters and buffers of the policy, by name
    :raises ValueError: A number is not finite. It names the environment and the step, or the parameter
    """
    for name, array in observations.items() if isinstance(observations, dict) else [("observation", observations)]:
        is_finite = has_finite_numbers(array)
        if not is_finite.all():
            index = int(is_finite.argmin())
            raise ValueError(
                f"Environment {index} gave an observation that is not finite at step {steps[index]} of its episode, so no "
                f"action could be sampled: {name}={array[index]}. Fix the environment, or clip in a wrapper. "
                "stable_baselines3.common.vec_env.VecCheckNan raises at the first bad value."
            )
    for name, tensor in tensors:
        if not th.isfinite(tensor).all():
            raise ValueError(
                f"The parameter {name!r} of the policy is not finite, so no action could be sampled. Load an earlier "
                "model, and lower `learning_rate`, unless other code than training has written into `model.policy`."
            )


def check_rewards(rewards: np.ndarray, steps: np.ndarray) -> None:
    """
    Refuse rewards that are not finite: they would spoil the statistics that normalize the rewards of all environments.

    :param rewards: ``(n_envs,)`` as the environments gave them
    :param steps: ``(n_envs,)`` steps that they had made in their running episodes
    :raises ValueError: It names the environment and the step
    """
    is_finite = np.isfinite(rewards)
    if not is_finite.all():
        index = int(is_finite.argmin())
        raise ValueError(
            f"Environment {index} gave the reward {rewards[index]} at step {steps[index]} of its episode. Rewards must be "
            "finite: fix the environment, or clip in a wrapper."
        )


def check_gradient(parameters: Sequence[nn.Parameter], step: str) -> th.Tensor:
    """
    Refuse a gradient that would spoil the parameters.

    :param parameters: Those that have a gradient
    :param step: Which step of the optimizer it is for
    :return: The norm of all gradients together, a scalar
    :raises ValueError: No parameter has a gradient, or it is not finite
    """
    if not parameters:
        raise ValueError(
            "No parameter of `policy.optimizer` has a gradient: all are frozen, or the policy was replaced after the "
            "optimizer was made. Make a new optimizer of the parameters of `model.policy` that are to be trained."
        )
    # As `th.nn.utils.get_total_norm`, for parameters that are all on one device
    gradients = [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
    norm = th.linalg.vector_norm(th.cat(gradients))
    if not math.isfinite(norm.item()):
        raise ValueError(
            f"The gradient of {step} is not finite (norm {norm.item()}), {NOT_MADE.format(step=step)} Lower "
            "`learning_rate`, set `max_grad_norm`, or look for extreme observations and rewards with "
            "stable_baselines3.common.vec_env.VecCheckNan."
        )
    return norm


def scheduled(
    name: str,
    value: float | Callable[[float], float],
    progress_remaining: float,
    step: str,
    minimum: float = -math.inf,
    maximum: float = math.inf,
) -> float:
    """
    The current value of an argument that may be a schedule.

    :param name: Name of the argument
    :param value: A number, or a function of the progress remaining
    :param progress_remaining: From 1 to 0
    :param step: What it is for, e.g. a step of the optimizer, which is refused
    :param minimum: The smallest number allowed
    :param maximum: The largest number allowed
    :return: The number
    :raises ValueError: It is not finite, or out of its range
    """
    number = float(value(progress_remaining) if callable(value) else value)
    if not (math.isfinite(number) and minimum <= number <= maximum):
        limits = "a finite number" if minimum == -math.inf else f"a number >= {minimum:g}"
        limits += "" if maximum == math.inf else f" and <= {maximum:g}"
        raise ValueError(
            f"`{name}` of {step} is {number}, {NOT_MADE.format(step=step)} Fix the schedule: it returned "
            f"{number} at progress_remaining={progress_remaining}, where it must return {limits}."
        )
    return number


NormalizeStatistics = tuple[Any, Any]
"""``obs_rms`` and ``ret_rms`` of a VecNormalize: copies."""


def statistics_of(vec_normalize: VecNormalize | None) -> NormalizeStatistics | None:
    """
    :param vec_normalize: The wrapper, if there is one
    :return: Copies of its running statistics
    """
    return None if vec_normalize is None else copy.deepcopy((getattr(vec_normalize, "obs_rms", None), vec_normalize.ret_rms))


def restore_statistics(vec_normalize: VecNormalize | None, statistics: NormalizeStatistics | None) -> None:
    """
    Put back statistics that non-finite numbers have spoilt.

    :param vec_normalize: The wrapper, if there is one
    :param statistics: What they were, see :func:`statistics_of`
    """
    if vec_normalize is None or statistics is None:
        return
    spoilt = _running_moments(getattr(vec_normalize, "obs_rms", None), vec_normalize.ret_rms)
    if not all(np.isfinite(rms.mean).all() and np.isfinite(rms.var).all() for rms in spoilt):
        # In place: an evaluation environment may share them
        for kept, rms in zip(_running_moments(*statistics), spoilt, strict=True):
            rms.mean, rms.var, rms.count = kept.mean.copy(), kept.var.copy(), kept.count
    vec_normalize.returns = np.nan_to_num(vec_normalize.returns, posinf=0.0, neginf=0.0)


def _running_moments(obs_rms: Any, ret_rms: RunningMeanStd) -> list[RunningMeanStd]:
    """Those of each part of the observations, and of the returns."""
    parts = obs_rms.values() if isinstance(obs_rms, dict) else [] if obs_rms is None else [obs_rms]
    return [*parts, ret_rms]
