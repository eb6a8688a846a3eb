"""The command line: ``python -m sb3_episodic_a2c COMMAND ...``"""

import argparse
import importlib
import sys
from typing import NamedTuple

import gymnasium

from sb3_episodic_a2c.guards.signals import exit_on_sigterm
from sb3_episodic_a2c.tools.extras import install, missing_extra

PROGRAM = "python -m sb3_episodic_a2c"

PATH_ERRORS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""What a path that a user gave may raise."""


class Command(NamedTuple):
    """A command of ours."""

    module: str
    """In ``tools``. It has ``add_arguments`` and ``run``."""
    extra: str
    """What it needs to be installed."""
    help: str
    example: str


class ZooCommand(NamedTuple):
    """A script of RL Zoo, which parses its own arguments."""

    help: str
    example: str


COMMANDS = {
    "solve": Command(
        *("solve", "solve", "train until an environment is solved; keep the model, a learning curve and a GIF"),
        "solve --env LunarLander-v3 --seed 1",
    ),
    "compare": Command(
        *("comparison.command_line", "compare"),
        "train algorithms side by side, with many seeds on many processes, and report with intervals",
        "compare --env CartPole-v1 Acrobot-v1 --algo episodic_a2c a2c ppo --seeds 10 --jobs 2",
    ),
    "bench": Command(
        *("benchmark", "solve", "env steps/s of learn() beside A2C, PPO and the bare VecEnv"),
        "bench --env CartPole-v1 --n-envs 1 64 --vectorization dummy gymnasium",
    ),
    "gif": Command(
        *("record", "solve", "play greedy episodes of a saved model and write them as a GIF"),
        "gif --run runs/CartPole-v1-tuned-seed0 -o agent.gif --n-episodes 3",
    ),
    "card": Command(
        *("card", "solve", "write a model card beside the model of a run of solve, as the Hugging Face hub shows it"),
        "card --run runs/CartPole-v1-tuned-seed0",
    ),
    "export": Command(
        *("export", "export", "write the greedy agent of a run of solve as an ONNX model"),
        "export --run runs/CartPole-v1-tuned-seed0 -o agent.onnx",
    ),
}

ZOO_COMMANDS = {
    "train": ZooCommand(
        "train an agent, continue training one (-i), or search hyperparameters (-optimize)",
        "train --env CartPole-v1 --eval-freq 5000",
    ),
    "enjoy": ZooCommand(
        "watch a trained agent; that of a run of solve with --run", "enjoy --env CartPole-v1 --load-best --no-render"
    ),
    "record_video": ZooCommand("record a video of a trained agent", "record_video --env CartPole-v1 -n 500"),
    "record_training": ZooCommand(
        "record one video of all checkpoints of a training", "record_training --env CartPole-v1 -n 500"
    ),
    "plot_train": ZooCommand("plot the training rewards of runs", "plot_train --env CartPole-v1"),
    "all_plots": ZooCommand(
        "gather the evaluations of runs: a table, plots, and a file for plot_from_file",
        "all_plots --env CartPole-v1 -o results",
    ),
    "plot_from_file": ZooCommand("plot what all_plots has gathered", "plot_from_file -i results -o results.svg"),
    "benchmark": ZooCommand("evaluate all trained agents of a folder", "benchmark --no-hub -n 500"),
}


def main(argv: list[str] | None = None) -> int:
    """
    Run a command.

    :param argv: The arguments; by default those of the process
    :return: The exit status: 0, 1 for bad input or a missing package, 130 for Ctrl-C
    """
    argv = sys.argv[1:] if argv is None else argv
    is_zoo = bool(argv) and argv[0] in ZOO_COMMANDS
    try:
        # Job schedulers announce the end of a job by it. The commands say what they have reached
        with exit_on_sigterm():
            if is_zoo:
                _run_zoo(argv[0], argv[1:])
                return 0
            # Most tools return None: they succeed or raise
            return _run(argv) or 0
    except (ImportError, ValueError, gymnasium.error.Error, *PATH_ERRORS) as error:
        command = COMMANDS.get(argv[0]) if argv else None
        extra = missing_extra(error, "zoo" if is_zoo or command is None else command.extra)
        if extra is not None:
            what = str(error) if isinstance(error, ImportError) else "a package is missing"
            print(f"error: {what}. Install it with: {install(extra)}", file=sys.stderr)
            return 1
        if isinstance(error, ImportError):
            # The Zoo says in words that a package is missing, e.g. wandb. Otherwise it is in none of our extras
            is_kept = error.name is not None
        else:
            # As in the Zoo. But runs are ours
            is_kept = is_zoo and "--run" not in argv
        # What an environment has raised, which a note names, can only be understood with its traceback
        if is_kept or hasattr(error, "__notes__"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int | None:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Full-episode A2C for Stable-Baselines3.",
        epilog=f"Example: {PROGRAM} {COMMANDS['solve'].example}",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            epilog=f"Example: {PROGRAM} {command.example}",
        )
        # Import only the tool that runs: the others may lack their packages
        if name in argv[:1]:
            tool = importlib.import_module(f"sb3_episodic_a2c.tools.{command.module}")
            tool.add_arguments(subparser)
            subparser.set_defaults(run=tool.run)
    for name, zoo_command in ZOO_COMMANDS.items():
        subparsers.add_parser(name, help=f"RL Zoo: {zoo_command.help}", add_help=False)
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    return arguments.run(arguments)


def _run_zoo(name: str, arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        # The Zoo's own help follows
        command = ZOO_COMMANDS[name]
        print(f"RL Zoo: {command.help}.\nExample: {PROGRAM} {command.example}\n")
    # Without our parser: all other flags are the Zoo's
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    if name == "enjoy":
        parser.add_argument("--run")
    given, arguments = parser.parse_known_args(arguments)
    if getattr(given, "run", None) is not None:
        importlib.import_module("sb3_episodic_a2c.tools.runs").enjoy(given.run, arguments)
    else:
        importlib.import_module("sb3_episodic_a2c.tools.zoo").launch(name, arguments)


if __name__ == "__main__":
    sys.exit(main())
