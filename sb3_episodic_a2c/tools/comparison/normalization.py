"""How the scores of different environments are put on one scale: 0 is what random actions get, 1 a reference."""

import contextlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd

from sb3_episodic_a2c.guards.files import atomic_write
from sb3_episodic_a2c.tools.comparison.cells import Cell
from sb3_episodic_a2c.tools.entries import EVAL_SEED

RANDOM_EPISODES = 100

RANDOM_TIMESTEPS = 100_000
"""Random actions end after so many env steps, however few of their episodes have ended."""


@dataclass
class Scale:
    """How the scores of an environment are normalised: ``random`` becomes 0 and ``reference`` 1."""

    random: float
    reference: float
    reference_is_threshold: bool

    @property
    def is_usable(self) -> bool:
        return self.reference > self.random

    def normalize(self, scores: np.ndarray) -> np.ndarray:
        return (scores - self.random) / (self.reference - self.random)


def reward_threshold(env_id: str) -> float | None:
    """The mean reward from which on an environment counts as solved, by its own specification."""
    return gym.spec(env_id).reward_threshold


def scales(frame: pd.DataFrame, random_scores: dict[str, float]) -> dict[str, Scale]:
    """
    :param frame: See :func:`sb3_episodic_a2c.tools.comparison.frame.results_frame`
    :param random_scores: Environment: mean reward of random actions
    :return: Environment: its scale. 1 is its own threshold, which does not depend on what is compared. Without a threshold, it
        is the best final evaluation of any run
    """
    result = {}
    for env_id in frame["env_id"].unique():
        finished = frame[(frame["env_id"] == env_id) & (frame["status"] == "finished")]
        threshold = reward_threshold(env_id)
        best = finished.groupby(["algorithm", "seed"])["mean_reward"].last().max() if len(finished) else math.nan
        reference = float(best) if threshold is None else threshold
        result[env_id] = Scale(random_scores[env_id], reference, threshold is not None)
    return result


# ------------------------------------------------------------------ random actions


def random_policy_score(env_id: str, n_episodes: int = RANDOM_EPISODES, env_kwargs: dict[str, Any] | None = None) -> float:
    """
    :param env_id: Id of the environment
    :param n_episodes: Number of episodes
    :param env_kwargs: Arguments that it is made with
    :return: Mean reward of episodes of random actions, the same episodes every time; of fewer than ``n_episodes`` if they take
        more than :data:`RANDOM_TIMESTEPS` env steps
    :raises RuntimeError: No episode has ended by then
    """
    env = gym.make(env_id, **(env_kwargs or {}))
    env.action_space.seed(EVAL_SEED)
    totals: list[float] = []
    n_steps = 0
    with contextlib.closing(env):
        while len(totals) < n_episodes and n_steps < RANDOM_TIMESTEPS:
            env.reset(seed=EVAL_SEED + len(totals))
            total, done = 0.0, False
            while not done and n_steps < RANDOM_TIMESTEPS:
                _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
                n_steps += 1
                total += float(reward)
                done = terminated or truncated
            if done:
                totals.append(total)
    if not totals:
        raise RuntimeError(f"No episode of random actions has ended within {RANDOM_TIMESTEPS:,} env steps.")
    return sum(totals) / len(totals)


def random_policy_scores(cells: Sequence[Cell], path: Path) -> dict[str, float]:
    """
    :func:`random_policy_score` of each environment.

    :param cells: Cells on these environments
    :param path: File that keeps the scores for the next report
    :return: Environment: its score; NaN where random actions fail
    """
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        kept = {}
    scores: dict[str, float] = {}
    for cell in cells:
        if cell.env_id in scores:
            continue
        env_kwargs = cell.eval_env_kwargs
        key = f"{cell.env_id} {json.dumps(env_kwargs, default=str, sort_keys=True)}" if env_kwargs else cell.env_id
        try:
            if key not in kept:
                kept[key] = random_policy_score(cell.env_id, env_kwargs=env_kwargs)
                with atomic_write(path) as file:
                    file.write(json.dumps(kept, indent=2).encode() + b"\n")
            scores[cell.env_id] = kept[key]
        except Exception as error:
            # Any error of the environment: the report on the trainings must not fail with it
            warnings.warn(f"Scores on {cell.env_id} are not normalised, as random actions failed: {error}", stacklevel=2)
            scores[cell.env_id] = math.nan
    return scores
