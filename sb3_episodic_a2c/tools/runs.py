"""
A run of ``solve``, read from its folder: the agent, and environments that are wrapped as it was trained.

What ``solve`` prints at its end::

    from sb3_episodic_a2c.tools.runs import Run

    run = Run.read("runs/LunarLander-v3-tuned-seed0")
    print(run.evaluate(n_episodes=3, render_mode="human").rewards)
"""

import contextlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import yaml
from stable_baselines3.common.vec_env import VecEnv

from sb3_episodic_a2c import EpisodicA2C
from sb3_episodic_a2c.tools.entries import entry_manager, import_packages
from sb3_episodic_a2c.tools.greedy import Evaluation, evaluate
from sb3_episodic_a2c.tools.run_folder import MODEL, STATISTICS
from sb3_episodic_a2c.tools.zoo import ALGORITHMS, evaluation_env_kwargs, launch, register

CONFIG = "config.yml"
"""The hyperparameters, as RL Zoo writes and reads them."""

RESULT = "result.json"


@dataclass(frozen=True)
class Run:
    """A run of ``solve``: its folder, what ``result.json`` says about it, and its hyperparameters as RL Zoo writes them."""

    folder: Path
    result: dict[str, Any]
    """Of a run that is not finished, only its settings."""
    hyperparams: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> "Run":
        """
        :param folder: The output folder of ``solve``
        :return: The run. Modules that register its environment are imported
        :raises ValueError: The folder holds no finished run
        """
        folder = Path(folder)
        for name in (MODEL, CONFIG, RESULT):
            if not (folder / name).is_file():
                raise ValueError(f"`run` {folder} has no {name}, so it is no finished run. Give a folder that `solve` wrote.")
        with open(folder / CONFIG) as file:
            # As the Zoo does: hyperparameters may be any object. So is the model
            hyperparams = dict(yaml.load(file, Loader=yaml.UnsafeLoader))
        run = cls(folder, json.loads((folder / RESULT).read_text()), hyperparams)
        register()
        import_packages(run.result["gym_packages"])
        return run

    @property
    def env_id(self) -> str:
        return self.result["env_id"]

    @property
    def algorithm(self) -> str:
        """Zoo id."""
        return self.result["algorithm"]

    @property
    def seed(self) -> int:
        return self.result["seed"]

    def load_model(self) -> EpisodicA2C:
        """:return: The agent, on the CPU"""
        return ALGORITHMS[self.algorithm].load(self.folder / MODEL, device="cpu")

    def make_env(self, n_envs: int = 1, render_mode: str | None = None) -> VecEnv:
        """
        :param n_envs: Number of environments
        :param render_mode: As in ``gymnasium.make``
        :return: Environments for the agent: with the entry's wrappers, and normalised by the statistics of the training,
            which change no more
        """
        statistics = self.folder / STATISTICS
        manager = entry_manager(
            self.algorithm,
            self.env_id,
            self.hyperparams,
            seed=self.seed,
            env_kwargs={} if render_mode is None else {"render_mode": render_mode},
            statistics=statistics if statistics.is_file() else None,
        )
        return manager.create_envs(n_envs, eval_env=True, no_log=True)

    def evaluate(self, n_episodes: int = 100, seed: int = 0, render_mode: str | None = None) -> Evaluation:
        """
        Play greedy episodes.

        :param n_episodes: Number of episodes
        :param seed: Seed of the first
        :param render_mode: ``"human"`` shows them
        :return: Their rewards and lengths
        """
        env = self.make_env(render_mode=render_mode)
        try:
            return evaluate(self.load_model(), env, n_episodes, seed)
        finally:
            env.close()

    def snippet(self) -> str:
        """:return: Three lines of Python that play the agent"""
        with contextlib.closing(gym.make(self.env_id, **evaluation_env_kwargs(self.env_id, self.hyperparams))) as env:
            shown = ', render_mode="human"' if "human" in env.metadata.get("render_modes", ()) else ""
        return (
            "from sb3_episodic_a2c.tools.runs import Run\n"
            f"run = Run.read({str(self.folder)!r})\n"
            f"print(run.evaluate(n_episodes=3{shown}).rewards)"
        )


def enjoy(folder: str | Path, arguments: list[str]) -> None:
    """
    RL Zoo's ``enjoy`` for a run of ``solve``.

    :param folder: The run
    :param arguments: The Zoo's other arguments
    """
    run = Run.read(folder)
    name = run.env_id.replace("/", "-")
    with tempfile.TemporaryDirectory() as zoo_folder:
        # The Zoo finds an agent by the layout of its own run folders
        parameters = Path(zoo_folder, run.algorithm, f"{name}_1", name)
        parameters.mkdir(parents=True)
        shutil.copy(run.folder / MODEL, f"{parameters}.zip")
        if (run.folder / STATISTICS).exists():
            shutil.copy(run.folder / STATISTICS, parameters)
        shutil.copy(run.folder / CONFIG, parameters)
        found = ["--algo", run.algorithm, "--env", run.env_id, "--folder", zoo_folder, "--exp-id", "1"]
        packages = run.result["gym_packages"]
        launch("enjoy", [*found, *(["--gym-packages", *packages] if packages else []), *arguments])
