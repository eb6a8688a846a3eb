"""The hyperparameters that an algorithm is compared with: those of the Zoo's and our files, or A2C's matched to ours."""

from typing import Any

from sb3_episodic_a2c.tools.entries import read_entry
from sb3_episodic_a2c.tools.zoo import ALGORITHMS, DEFAULT_ALGORITHM, evaluate_kwargs
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
    :param label: Zoo id of an algorithm, or :data:`MATCHED`
    :param env_id: Id of the environment
    :param configs: Zoo id: path of a file of hyperparameters that the user gave
    :return: Hyperparameters as they stand in the file, ``n_timesteps`` among them
    :raises ValueError: The file has none for the environment, or an incomplete entry
    """
    hyperparams = read_entry(zoo_id(label), env_id, configs.get(zoo_id(label)))
    if label == MATCHED:
        hyperparams = _matched(hyperparams, read_entry(DEFAULT_ALGORITHM, env_id, configs.get(DEFAULT_ALGORITHM)))
    return hyperparams


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
    ours_kwargs, theirs_kwargs = (evaluate_kwargs(hyperparams.get("policy_kwargs")) for hyperparams in (ours, theirs))
    if any(name in kwargs for name in names for kwargs in (ours_kwargs, theirs_kwargs)):
        others = {name: value for name, value in theirs_kwargs.items() if name not in names}
        matched["policy_kwargs"] = {**others, **{name: ours_kwargs[name] for name in names if name in ours_kwargs}}
    return matched
