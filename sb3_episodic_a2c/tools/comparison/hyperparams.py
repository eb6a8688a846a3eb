"""The hyperparameters that an algorithm is compared with: those of the Zoo's and our files, or A2C's matched to ours."""

import argparse
from typing import Any

from gymnasium.envs.registration import get_env_id, parse_env_id

from sb3_episodic_a2c.tools.entries import read_entry
from sb3_episodic_a2c.tools.zoo import ALGORITHMS, DEFAULT_ALGORITHM, experiment_manager_class, parse_kwargs
from sb3_episodic_a2c.tools.zoo import algorithms as zoo_algorithms

MATCHED = "a2c-matched"
"""Label of A2C with the Zoo's hyperparameters, but with our optimizer, learning rate and number of environments."""


def zoo_id(label: str) -> str:
    """The algorithm's id in the Zoo."""
    return "a2c" if label == MATCHED else label


def check_algorithm(label: str) -> None:
    """:raises ValueError: The Zoo does not know it"""
    known = zoo_algorithms()
    if zoo_id(label) not in known:
        names = [*ALGORITHMS, MATCHED, *sorted(known.keys() - ALGORITHMS.keys())]
        raise ValueError(f"`algo` {label!r} is unknown. Use one of {', '.join(names)}.")


def hyperparams_of(label: str, env_id: str, configs: dict[str, str]) -> dict[str, Any]:
    """
    The Zoo's algorithms have the Zoo's entries, if need be that of an older version of the environment: the Zoo tuned
    HalfCheetah-v4, and its normalisation is as useful with -v5.

    :param label: Zoo id of an algorithm, or :data:`MATCHED`
    :param env_id: Id of the environment
    :param configs: Zoo id: path of a file of hyperparameters that the user gave
    :return: Hyperparameters as they stand in the file, ``n_timesteps`` among them
    :raises ValueError: The file has none for the environment, or an incomplete entry
    """
    algorithm, config = zoo_id(label), configs.get(zoo_id(label))
    is_zoos = config is None and algorithm not in ALGORITHMS
    hyperparams = read_entry(algorithm, _listed_version(algorithm, env_id) if is_zoos else env_id, config)
    if label == MATCHED:
        hyperparams = _matched(hyperparams, read_entry(DEFAULT_ALGORITHM, env_id, configs.get(DEFAULT_ALGORITHM)))
    return hyperparams


def _listed_version(algorithm: str, env_id: str) -> str:
    """The newest version of the environment, no newer than this one, that the Zoo's file lists; this one if there is none."""
    # As in `tools.zoo`
    import yaml

    with open(experiment_manager_class()(argparse.Namespace(), algorithm, env_id, "").config) as file:
        listed = yaml.safe_load(file)
    namespace, name, version = parse_env_id(env_id)
    older = (get_env_id(namespace, name, number) for number in range(version or 0, -1, -1))
    return next((listed_id for listed_id in older if listed_id in listed), env_id)


def _matched(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """
    A2C's hyperparameters with three of ours. The optimizer becomes that of :class:`EpisodicA2C`: the one that our
    ``policy_kwargs`` name, or Adam, the default of SB3's policies.
    """
    matched = {
        **theirs,
        "use_rms_prop": False,
        "learning_rate": ours.get("learning_rate", 3e-3),
        "n_envs": ours.get("n_envs", 1),
    }
    names = ("optimizer_class", "optimizer_kwargs")
    ours_kwargs, theirs_kwargs = (parse_kwargs(hyperparams.get("policy_kwargs")) for hyperparams in (ours, theirs))
    if any(name in kwargs for name in names for kwargs in (ours_kwargs, theirs_kwargs)):
        others = {name: value for name, value in theirs_kwargs.items() if name not in names}
        matched["policy_kwargs"] = {**others, **{name: ours_kwargs[name] for name in names if name in ours_kwargs}}
    return matched
