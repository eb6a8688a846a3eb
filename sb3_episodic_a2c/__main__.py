"""The command line: ``python -m sb3_episodic_a2c COMMAND ...``"""

import argparse
import importlib
import sys

import gymnasium

COMMANDS = {
    "solve": ("solve", "train until an environment is solved; keep the model, a learning curve and a GIF"),
    "compare": (
        "comparison.command_line",
        "train algorithms side by side, with many seeds on many processes, and report with intervals",
    ),
    "bench": ("benchmark", "env steps/s of learn() beside A2C, PPO and the bare VecEnv"),
    "gif": ("record", "play greedy episodes of a saved model and write them as a GIF"),
}
"""Command: the module of ``tools`` that has its ``add_arguments`` and ``run``, and its help."""

ZOO_COMMANDS = {
    "train": "train an agent, continue training one (-i), or search hyperparameters (-optimize)",
    "enjoy": "watch a trained agent",
    "record_video": "record a video of a trained agent",
    "record_training": "record one video of all checkpoints of a training",
    "plot_train": "plot the training rewards of runs",
    "all_plots": "gather the evaluations of runs: a table, plots, and a file for plot_from_file",
    "plot_from_file": "plot what all_plots has gathered",
    "benchmark": "evaluate all trained agents of a folder",
}
"""Command: its help. Each runs RL Zoo's script of that name, which parses its own arguments."""

EXTRAS = {"matplotlib": "solve", "PIL": "solve", "pandas": "solve", "tqdm": "solve", "pygame": "solve"}
"""Package that cannot be imported: the extra that brings it."""

COMPARE_PACKAGES = {"joblib", "matplotlib", "pandas", "rich", "rl_zoo3", "scipy"}
"""What the extra ``compare`` brings."""

ZOO_PACKAGES = {
    "rl_zoo3",
    "optuna",
    "requests",
    "pandas",
    "seaborn",
    "scipy",
    "matplotlib",
    "moviepy",
    "tqdm",
    "rich",
    "pygame",
}
"""What the extra ``zoo`` brings."""


def main(argv: list[str] | None = None) -> int:
    """
    Run a command.

    :param argv: The arguments; by default those of the process
    :return: The exit status: 0, 1 for bad input or a missing package, 130 for Ctrl-C
    """
    parser = argparse.ArgumentParser(prog="python -m sb3_episodic_a2c", description="Full-episode A2C for Stable-Baselines3")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    argv = sys.argv[1:] if argv is None else argv
    is_zoo = bool(argv) and argv[0] in ZOO_COMMANDS
    try:
        if is_zoo:
            # Without our parser: all flags are the Zoo's
            importlib.import_module("sb3_episodic_a2c.tools.zoo").launch(argv[0], argv[1:])
            return 0
        for command, (module, help_text) in COMMANDS.items():
            subparser = subparsers.add_parser(command, help=help_text, description=help_text)
            # Import only the tool that runs: the others may lack their packages
            if command in argv[:1]:
                tool = importlib.import_module(f"sb3_episodic_a2c.tools.{module}")
                tool.add_arguments(subparser)
                subparser.set_defaults(run=tool.run)
        for command, help_text in ZOO_COMMANDS.items():
            subparsers.add_parser(command, help=f"RL Zoo: {help_text}", add_help=False)
        arguments = parser.parse_args(argv)
        status = arguments.run(arguments)
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if is_zoo:
            extra = "zoo" if package in ZOO_PACKAGES else None
        elif argv[:1] == ["compare"] and package in COMPARE_PACKAGES:
            extra = "compare"
        else:
            extra = EXTRAS.get(package)
        if extra is not None:
            print(f"error: {error}. Install it with: pip install 'sb3-episodic-a2c[{extra}]'", file=sys.stderr)
        elif is_zoo and not package:
            # The Zoo's own message about an optional package, e.g. wandb
            print(f"error: {error}", file=sys.stderr)
        else:
            raise
        return 1
    except (ValueError, gymnasium.error.Error) as error:
        # Errors of the Zoo and of environments trained there keep their traceback, as in the Zoo
        if is_zoo and not isinstance(error, gymnasium.error.DependencyNotInstalled):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    # Most tools return None: they succeed or raise
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
