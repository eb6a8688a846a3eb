"""The command ``compare``: its arguments, and what they mean in Python."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from sb3_episodic_a2c.tools import comparison
from sb3_episodic_a2c.tools.comparison.backends import BACKENDS
from sb3_episodic_a2c.tools.comparison.grid import DEFAULT_EVALUATIONS, DEFAULT_OUTPUT, DEFAULT_SEEDS
from sb3_episodic_a2c.tools.comparison.hyperparams import MATCHED, zoo_id
from sb3_episodic_a2c.tools.vectorization import HELP as VECTORIZATION_HELP
from sb3_episodic_a2c.tools.vectorization import VECTORIZATIONS
from sb3_episodic_a2c.tools.zoo import DEFAULT_ALGORITHM
from sb3_episodic_a2c.tools.zoo import algorithms as zoo_algorithms


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # What is compared and what is fair is explained in one place
    parser.epilog = f"{parser.epilog}\n{comparison.__doc__}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--env", nargs="+", required=True, help="ids of environments")
    parser.add_argument(
        "--algo",
        nargs="+",
        default=[DEFAULT_ALGORITHM, "a2c"],
        help=f"RL Zoo's ids, ours among them; the others are compared with the first. {MATCHED}: A2C with our optimizer, "
        "learning rate and number of environments (default: %(default)s)",
    )
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument(
        "--seeds",
        nargs="+",
        metavar="N",
        help=f"seeds 0 to N-1: one number, or ENV:N for environments where it is not {DEFAULT_SEEDS} "
        f"(default: {DEFAULT_SEEDS})",
    )
    seeds.add_argument("--seed-list", nargs="+", type=int, metavar="SEED", help="these seeds")
    parser.add_argument(
        "--total-timesteps",
        nargs="+",
        metavar="N",
        help="budget in env steps: one number, or ENV:N for each (default: the smallest of the configs' n_timesteps)",
    )
    parser.add_argument(
        "--conf",
        nargs="+",
        default=[],
        metavar="ALGO:PATH",
        help="files of hyperparameters; a PATH alone is for the first algorithm (default: ours and RL Zoo's)",
    )
    parser.add_argument(
        "--n-evaluations",
        nargs="+",
        metavar="N",
        default=[str(DEFAULT_EVALUATIONS)],
        help=f"evaluations during training: one number, or ENV:N for environments where it is not {DEFAULT_EVALUATIONS} "
        f"(default: {DEFAULT_EVALUATIONS})",
    )
    parser.add_argument("--eval-episodes", type=int, default=20, help="greedy episodes of each (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="cells trained at a time (default: %(default)s)")
    parser.add_argument("--backend", choices=BACKENDS, default="loky", help="where they are trained (default: %(default)s)")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask or Ray cluster (default: one on this machine)")
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write to (default: %(default)s)")
    parser.add_argument("--retrain", action="store_true", help="train again cells that are there with other settings")
    parser.add_argument("--device", default="cpu", help="device of the models (default: %(default)s)")
    parser.add_argument("--vectorization", choices=VECTORIZATIONS, default="dummy", help=VECTORIZATION_HELP)
    parser.add_argument("--gym-packages", nargs="+", default=[], help="modules to import that register environments")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """
    :param arguments: See :func:`add_arguments`
    :return: The exit status: 1 if a cell failed
    """
    frame = comparison.compare(
        envs=arguments.env,
        algorithms=arguments.algo,
        seeds=arguments.seed_list or (parse_by_env("seeds", arguments.seeds) if arguments.seeds else DEFAULT_SEEDS),
        total_timesteps=parse_by_env("total_timesteps", arguments.total_timesteps) if arguments.total_timesteps else None,
        configs=parse_configs(arguments.conf, arguments.algo),
        n_evaluations=parse_by_env("n_evaluations", arguments.n_evaluations),
        eval_episodes=arguments.eval_episodes,
        jobs=arguments.jobs,
        backend=arguments.backend,
        scheduler=arguments.scheduler,
        output=arguments.output,
        retrain=arguments.retrain,
        device=arguments.device,
        gym_packages=arguments.gym_packages,
        vectorization=arguments.vectorization,
        progress_bar=not arguments.no_progress,
        # A file or a pipe has no edge: wide enough for whole tables
        console=Console(width=None if sys.stdout.isatty() else 200),
    )
    return 1 if (frame["status"] == "failed").any() else 0


def parse_by_env(name: str, values: list[str]) -> int | dict[str, int]:
    """
    :param name: Name of the argument of :func:`sb3_episodic_a2c.tools.comparison.compare`
    :param values: ``["1e5"]``, or ``["CartPole-v1:1e5", ...]``
    :return: The argument
    :raises ValueError: They are neither
    """
    if len(values) == 1 and ":" not in values[0]:
        return _integer(name, values[0])
    by_env = {}
    for value in values:
        env_id, separator, number = value.rpartition(":")
        if not separator:
            raise ValueError(f"`{name}` {value!r} names no environment. Give one number, or ENV:N for each.")
        if env_id in by_env:
            raise ValueError(f"`{name}` is given twice for {env_id!r}. Give it once.")
        by_env[env_id] = _integer(name, number)
    return by_env


def _integer(name: str, text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not number.is_integer():
        raise ValueError(f"`{name}` {text!r} is no integer. Give e.g. 100000 or 1e5.")
    return int(number)


def parse_configs(values: list[str], algorithms: list[str]) -> dict[str, str]:
    """
    :param values: ``ALGO:PATH``, or a path alone for the first algorithm
    :param algorithms: What is compared
    :return: Algorithm: path
    :raises ValueError: An algorithm has two paths
    """
    known = {*zoo_algorithms(), *(zoo_id(label) for label in algorithms)}
    configs: dict[str, str] = {}
    for value in values:
        algorithm, separator, path = value.partition(":")
        if not separator or algorithm not in known:
            algorithm, path = zoo_id(algorithms[0]), value
        if algorithm in configs:
            raise ValueError(f"`conf` is given twice for {algorithm!r}: {configs[algorithm]!r} and {path!r}. Give it once.")
        configs[algorithm] = path
    return configs
