"""Bad arguments and spaces, refused before anything is changed. Each error names the argument, its value and the remedy."""

import inspect
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, Literal, get_args

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy

from sb3_episodic_a2c.actors import ActorChoice
from sb3_episodic_a2c.buffers import EpisodicRolloutBuffer
from sb3_episodic_a2c.returns import STANDARDIZATIONS
from sb3_episodic_a2c.selection import PARTIAL_EPISODES

PartialEpisodes = Literal["carry", "discard"]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and bool(np.isfinite(float(value)))


def is_integer(value: Any, minimum: int) -> bool:
    """
    :param value: Anything
    :param minimum: The least that it may be
    :return: Whether it is such an integer, of Python's or NumPy's; a bool is not one
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= minimum


def check_positive(name: str, value: Any, hint: str = "") -> int:
    """
    :param name: Name of the argument, for the message
    :param value: An integer of Python's or NumPy's
    :param hint: Appended to the message
    :return: A Python integer
    :raises ValueError: It is no integer, or smaller than 1
    """
    if not is_integer(value, 1):
        raise ValueError(f"{name} is {value!r}. It must be an integer >= 1.{hint}")
    return int(value)


def check_unknown(arguments: Mapping[str, Any], algorithm: type[Any]) -> None:
    """
    Refuse arguments that ``learn`` does not have, as ``MaskablePPO.learn`` does with ``use_masking``.

    :param arguments: What ``learn`` was given beyond its own arguments
    :param algorithm: The class of the model
    :raises TypeError: As Python does, but it says which of them the constructor has
    """
    for name in arguments:
        message = f"{algorithm.__name__}.learn() got an unexpected keyword argument {name!r}."
        if name in inspect.signature(algorithm).parameters:
            message += f" It is one of the constructor's: {algorithm.__name__}(policy, env, {name}={arguments[name]!r})."
        raise TypeError(message)


def copy_nested(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A copy of a dict and of the dicts in it, so that nothing is ever written into the caller's."""
    return {key: copy_nested(value) if isinstance(value, dict) else value for key, value in kwargs.items()}


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """
    Refuse arguments out of their range.

    :param arguments: The arguments of the constructor by name; other names are ignored
    :raises ValueError: It names the argument, its value and the remedy
    """

    def check(name: str, is_valid: bool, remedy: str) -> None:
        if not is_valid:
            raise ValueError(f"`{name}` is {arguments[name]!r}. {remedy}")

    learning_rate, gamma = arguments["learning_rate"], arguments["gamma"]
    check(
        "learning_rate",
        callable(learning_rate) or (_is_number(learning_rate) and learning_rate >= 0),
        "It must be a number >= 0, e.g. 3e-3, or a function of the progress remaining (from 1 to 0).",
    )
    check("n_episodes", is_integer(arguments["n_episodes"], 1), "It must be an integer >= 1 (episodes per environment).")
    check("gamma", _is_number(gamma) and 0 <= gamma <= 1, "It must lie in [0, 1], e.g. 0.99.")
    method = arguments["standardize_returns"]
    check("standardize_returns", method in (*STANDARDIZATIONS,), f"It must be one of {(*STANDARDIZATIONS,)}.")
    check("handle_timeout_termination", isinstance(arguments["handle_timeout_termination"], bool), "It must be True or False.")
    check(
        "handle_timeout_termination",
        not arguments["handle_timeout_termination"] or STANDARDIZATIONS[method].has_units,
        f"With standardize_returns={method!r} the critic's values have no fixed units, so they "
        'cannot stand for the rewards after a time limit: set it to False, or use standardize_returns="running" or None.',
    )
    check(
        "partial_episodes",
        arguments["partial_episodes"] in (*PARTIAL_EPISODES,),
        f"It must be one of {(*PARTIAL_EPISODES,)}.",
    )
    huber_delta, vf_coef = arguments["huber_delta"], arguments["vf_coef"]
    check("huber_delta", _is_number(huber_delta) and huber_delta > 0, "It must be a number > 0, e.g. 1.0.")
    check("detach_advantage", isinstance(arguments["detach_advantage"], bool), "It must be True or False.")
    ent_coef = arguments["ent_coef"]
    check(
        "ent_coef",
        callable(ent_coef) or _is_number(ent_coef),
        "It must be a finite number, e.g. 0.0 or 0.01, or a function of the progress remaining (from 1 to 0).",
    )
    check("vf_coef", _is_number(vf_coef) and vf_coef >= 0, "It must be a number >= 0, e.g. 1.0.")
    gae_lambda = arguments["gae_lambda"]
    check("gae_lambda", _is_number(gae_lambda) and 0 <= gae_lambda <= 1, "It must lie in [0, 1]; 1.0 is Monte Carlo.")
    check(
        "gae_lambda",
        gae_lambda == 1 or STANDARDIZATIONS[method].has_units,
        f"With standardize_returns={method!r} the critic's values have no fixed units, so they cannot stand for rewards: set "
        'it to 1.0, or use standardize_returns="running" or None.',
    )
    check(
        "gae_lambda",
        gae_lambda == 1 or arguments["detach_advantage"],
        "With detach_advantage=False the gradient flows through the return minus the value: set it to 1.0, or use "
        "detach_advantage=True.",
    )
    check("n_value_epochs", is_integer(arguments["n_value_epochs"], 0), "It must be an integer >= 0 (gradient steps), e.g. 4.")
    check(
        "n_value_epochs",
        arguments["n_value_epochs"] == 0 or vf_coef > 0,
        "With vf_coef=0.0 there is no value loss to train on: set it to 0, or `vf_coef` to more than 0, e.g. 1.0.",
    )
    value_learning_rate = arguments["value_learning_rate"]
    check(
        "value_learning_rate",
        value_learning_rate is None
        or callable(value_learning_rate)
        or (_is_number(value_learning_rate) and value_learning_rate >= 0),
        "It must be None for `learning_rate`, a number >= 0, e.g. 1e-3, or a function of the progress remaining (1 to 0).",
    )
    check(
        "value_learning_rate",
        value_learning_rate is None or arguments["n_value_epochs"] > 0,
        "It is the learning rate of value epochs, of which there are none: set `n_value_epochs`, e.g. to 10.",
    )
    noise_resample_prob = arguments["noise_resample_prob"]
    check(
        "noise_resample_prob",
        callable(noise_resample_prob) or (_is_number(noise_resample_prob) and 0 < noise_resample_prob <= 1),
        "It must lie in (0, 1], where 1.0 is noise of its own at every step, or be a function of the progress remaining "
        "(from 1 to 0).",
    )
    max_grad_norm, batch_size = arguments["max_grad_norm"], arguments["batch_size"]
    check(
        "max_grad_norm",
        max_grad_norm is None or (_is_number(max_grad_norm) and max_grad_norm > 0),
        "It must be a number > 0, or None for no clipping.",
    )
    check(
        "batch_size",
        batch_size is None or is_integer(batch_size, 1),
        "It must be an integer >= 1 (transitions per pass), or None for all at once.",
    )
    # A loaded model has it under another name
    stats_window_size = arguments.get("stats_window_size", 1)
    check("stats_window_size", is_integer(stats_window_size, 1), "It must be an integer >= 1 (episodes), e.g. 100.")
    check("actor", arguments["actor"] in get_args(ActorChoice), f"It must be one of {get_args(ActorChoice)}.")
    sde_sample_freq = arguments["sde_sample_freq"]
    check(
        "sde_sample_freq",
        is_integer(sde_sample_freq, -1) and sde_sample_freq != 0,
        "It must be an integer >= 1 (steps between two noise matrices), or -1 for one a rollout.",
    )
    buffer_class = arguments["rollout_buffer_class"]
    check(
        "rollout_buffer_class",
        buffer_class is None or (isinstance(buffer_class, type) and issubclass(buffer_class, EpisodicRolloutBuffer)),
        "It must be None or a subclass of sb3_episodic_a2c.EpisodicRolloutBuffer: SB3's buffers hold a fixed number of steps.",
    )
    for name in ("rollout_buffer_kwargs", "policy_kwargs"):
        check(name, arguments[name] is None or isinstance(arguments[name], dict), "It must be a dict, or None.")


def check_policy_name(name: str, aliases: Mapping[str, type[BasePolicy]]) -> None:
    """
    :param name: The argument ``policy``, where it is no class
    :param aliases: The names that the algorithm knows
    :raises ValueError: The name is unknown
    """
    if name not in aliases:
        raise ValueError(
            f"`policy` {name!r} is unknown. Use one of {sorted(aliases)}, or a policy class "
            "(a subclass of stable_baselines3.common.policies.ActorCriticPolicy)."
        )


def check_policy_class(algorithm: Any, policy_class: type[BasePolicy]) -> None:
    """
    Refuse policies that would be trained without what they need, such as those of a variant.

    :param algorithm: :class:`EpisodicA2C` or a subclass of it
    :param policy_class: The policy that it is given
    :raises ValueError: It does not fit. The error names the algorithm that it is for
    """
    base = algorithm._policy_base_class
    others = [
        f" A {policy_class.__name__} is for {name}."
        for other, name in algorithm._variants.items()
        if issubclass(policy_class, other) and not issubclass(base, other)
    ]
    if others or not issubclass(policy_class, base):
        raise ValueError(
            f"`policy` {policy_class.__name__} does not fit {algorithm.__name__}: use one of "
            f"{sorted(algorithm.policy_aliases)}, or a subclass of {base.__module__}.{base.__name__}.{''.join(others)}"
        )


def check_spaces(
    policy: str | type[BasePolicy] | None,
    observation_space: spaces.Space,
    action_space: spaces.Space,
    supported_action_spaces: tuple[type[spaces.Space], ...],
) -> None:
    """
    Refuse spaces that this algorithm, or SB3, cannot learn on.

    :param policy: The policy, by name or class; None: any
    :param observation_space: The observation space of the environment
    :param action_space: The action space of the environment
    :param supported_action_spaces: The types that the algorithm supports
    :raises ValueError: It names the space and the remedy
    """
    if not isinstance(action_space, supported_action_spaces):
        names = ", ".join(space.__name__ for space in supported_action_spaces)
        raise ValueError(
            f"The action space {action_space} of `env` is not supported: wrap the environment so that it is one of {names}."
        )
    if isinstance(action_space, spaces.Box) and not (
        np.isfinite(action_space.low).all() and np.isfinite(action_space.high).all()
    ):
        raise ValueError(
            f"The action space {action_space} of `env` is unbounded. Give it finite bounds, "
            "e.g. with gymnasium.wrappers.RescaleAction or TransformAction."
        )
    if isinstance(action_space, spaces.Box) and not np.issubdtype(action_space.dtype, np.floating):
        # SB3's policies would give the environment numbers between
        raise ValueError(
            f"The action space {action_space} of `env` is one of whole numbers, which no Gaussian policy gives. Use "
            "MultiDiscrete, or a Box of floats that the environment rounds."
        )
    if isinstance(action_space, spaces.Box) and 0 in action_space.shape:
        raise ValueError(
            f"The action space {action_space} of `env` has no numbers, so there is nothing to choose. Give it at least one."
        )
    if isinstance(action_space, spaces.MultiBinary) and len(action_space.shape) != 1:
        raise ValueError(f"The action space {action_space} of `env` has several dimensions: flatten it.")
    is_dict = isinstance(observation_space, spaces.Dict)
    parts = list(observation_space.spaces.values()) if isinstance(observation_space, spaces.Dict) else [observation_space]
    for part in parts:
        if not isinstance(part, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            raise ValueError(
                f"The observation space {observation_space} of `env` is not supported because of {part}: use Box, Discrete, "
                "MultiDiscrete or MultiBinary, or a Dict of these without nesting "
                "(gymnasium.wrappers.FlattenObservation makes one Box of it)."
            )
        if isinstance(part, spaces.Box) and (part.shape == () or 0 in part.shape):
            raise ValueError(
                f"The observation space {observation_space} of `env` is not supported because of {part}, which has the shape "
                f"{part.shape}: a Box needs at least one dimension and one number (gymnasium.wrappers.ReshapeObservation)."
            )
    for part in [*parts, action_space]:
        if isinstance(part, spaces.MultiDiscrete) and part.nvec.ndim != 1:
            raise ValueError(f"{part} of `env` has several dimensions: flatten it in a wrapper.")
        if isinstance(part, (spaces.Discrete, spaces.MultiDiscrete)) and np.any(part.start != 0):
            raise ValueError(f"{part} of `env` does not start at 0, which SB3 needs: shift it in a wrapper.")
    if is_dict and policy in ("MlpPolicy", "CnnPolicy", "SharedMlpPolicy", "MlpLstmPolicy", "CnnLstmPolicy"):
        raise ValueError(
            f'`policy` {policy!r} takes no Dict observations: use the one for several inputs, e.g. "MultiInputPolicy".'
        )
    if not is_dict and policy in ("MultiInputPolicy", "MultiInputLstmPolicy"):
        raise ValueError(
            f'`policy` {policy!r} needs Dict observations, but `env` has {observation_space}: use e.g. "MlpPolicy".'
        )
    if policy in ("CnnPolicy", "CnnLstmPolicy") and not (
        isinstance(observation_space, spaces.Box) and len(observation_space.shape) == 3
    ):
        raise ValueError(
            f'`policy` {policy!r} needs images as observations, but `env` has {observation_space}: use e.g. "MlpPolicy".'
        )
