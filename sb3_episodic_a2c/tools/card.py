"""
A model card for a run of ``solve``: what the agent is, what it reached, how it was trained and how to load it.

The card is the README.md of the run's folder, in the form that the Hugging Face hub reads. To push both, with a free account
(``hf auth login``)::

    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo("NAME/CartPole-v1", exist_ok=True)
    api.upload_folder(folder_path="runs/CartPole-v1-tuned-seed0", repo_id="NAME/CartPole-v1", ignore_patterns="*.monitor.csv")

RL Zoo's ``push_to_hub`` is no way there: it is broken in rl_zoo3 2.9.2.
"""

import argparse
import pprint
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sb3_episodic_a2c.guards.files import atomic_write
from sb3_episodic_a2c.tools.runs import Run
from sb3_episodic_a2c.tools.zoo import ALGORITHMS

CARD = "README.md"


def model_card(run: Run) -> ModelCard:
    """
    :param run: A finished run
    :return: Its card. Mean reward and standard deviation are those of the greedy episodes after the training
    """
    algorithm = ALGORITHMS[run.algorithm].__name__
    evaluation = run.result["evaluation"]
    reward = f"{evaluation['mean_reward']:.2f} +/- {evaluation['std_reward']:.2f}"
    data = ModelCardData(
        library_name="stable-baselines3",
        model_name=algorithm,
        tags=[run.env_id, "deep-reinforcement-learning", "reinforcement-learning", "stable-baselines3", "sb3-episodic-a2c"],
        eval_results=[
            EvalResult(
                task_type="reinforcement-learning",
                task_name="reinforcement-learning",
                dataset_type=run.env_id,
                dataset_name=run.env_id,
                metric_type="mean_reward",
                metric_name="mean_reward",
                metric_value=reward,
                verified=False,
            )
        ],
    )
    packages = run.result["gym_packages"]
    has_gif = (run.folder / "agent.gif").exists()
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {algorithm} playing {run.env_id}",
        f"An agent of [Stable-Baselines3](https://github.com/DLR-RM/stable-baselines3), trained by `{algorithm}` of "
        f"`sb3_episodic_a2c`: A2C on whole episodes.",
        *(["![The agent plays](agent.gif)"] if has_gif else []),
        f"Mean reward of {evaluation['n_episodes']} greedy episodes, after {run.result['num_timesteps']:,} env steps of "
        f"training: **{reward}**.",
        "## How to play it",
        "Install `sb3-episodic-a2c[solve]`"
        + (f" and what has the module{'s' if packages[1:] else ''} `{'`, `'.join(packages)}`" if packages else "")
        + ", and download this repository, e.g. with `huggingface_hub.snapshot_download`:",
        f"```python\n{Run(Path('FOLDER'), run.result, run.hyperparams).snippet()}\n```",
        "## Hyperparameters",
        f"```python\n{pprint.pformat(run.hyperparams, width=110)}\n```",
        f"Seed {run.seed}. How copies of the environment were stepped: `{run.result['vectorization']}`.",
        "## Versions",
        "\n".join(f"- {name} {version}" for name, version in run.result["versions"].items()),
    ]
    return ModelCard("\n\n".join(parts) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"{parser.epilog}\n{__doc__}"
    parser.add_argument("--run", dest="folder", type=Path, required=True, help="output folder of solve")
    parser.add_argument("-o", "--output", type=Path, help=f"the file to write (default: {CARD} in that folder)")


def run(arguments: argparse.Namespace) -> None:
    path = arguments.output or arguments.folder / CARD
    card = model_card(Run.read(arguments.folder))
    with atomic_write(path) as file:
        file.write(str(card).encode())
    print(f"Wrote {path}")
