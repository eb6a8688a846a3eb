"""Greedy episodes of an agent: what it does, and what a number of them are worth."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_episodic_a2c import MaskableEpisodicA2C

MAX_EPISODE_STEPS = 100_000
"""An evaluation cuts an episode there, as a greedy agent may walk in a circle forever. Environments with a time limit have
shorter ones."""


def predict(model: BaseAlgorithm, env: VecEnv, obs: Any, state: Any, episode_start: np.ndarray, deterministic: bool) -> Any:
    """
    ``model.predict``, with the environments' action masks where the agent needs them.

    :return: The actions, and the next state of an LSTM
    """
    # MaskablePPO says in `learn` whether it asks for masks, so that the model does not know it
    masked = isinstance(model, MaskablePPO) or (isinstance(model, MaskableEpisodicA2C) and model.use_masking)
    masks = {"action_masks": get_action_masks(env)} if masked else {}
    return model.predict(obs, state=state, episode_start=episode_start, deterministic=deterministic, **masks)


@dataclass(frozen=True)
class Evaluation:
    """Greedy episodes of an agent."""

    rewards: list[float]
    """Sum of the rewards of each, in the environment's own units."""
    episode_lengths: list[int]
    seed: int
    """Of the first episode's environment. The next seeds follow."""

    @property
    def mean_reward(self) -> float:
        return float(np.mean(self.rewards))

    @property
    def std_reward(self) -> float:
        return float(np.std(self.rewards))

    def __str__(self) -> str:
        return f"{self.mean_reward:.1f} ± {self.std_reward:.1f}"

    @property
    def typical(self) -> int:
        """Index of the episode whose reward is nearest to the median."""
        return int(np.argmin(np.abs(np.array(self.rewards) - np.median(self.rewards))))

    def as_dict(self) -> dict[str, Any]:
        """What ``result.json`` holds."""
        return {
            "mean_reward": self.mean_reward,
            "std_reward": self.std_reward,
            "n_episodes": len(self.rewards),
            "seed": self.seed,
            "rewards": self.rewards,
            "episode_lengths": self.episode_lengths,
        }


def evaluate(
    model: BaseAlgorithm,
    env: VecEnv,
    n_episodes: int = 100,
    seed: int = 0,
    on_episode: Callable[[], Any] = lambda: None,
) -> Evaluation:
    """
    Play greedy episodes, each from a seed of its own, so that any of them can be played again. They are cut after
    :data:`MAX_EPISODE_STEPS`.

    :param model: The agent
    :param env: Environments in a ``Monitor`` each; they are stepped together
    :param n_episodes: Number of episodes to play
    :param seed: Seed of the first episode
    :param on_episode: Called when one has ended
    :return: Their rewards and lengths
    :raises ValueError: ``n_episodes`` is smaller than 1
    """
    if n_episodes < 1:
        raise ValueError(f"`n_episodes` is {n_episodes}. It must be an integer >= 1.")
    rewards, lengths = np.zeros(n_episodes), np.zeros(n_episodes, dtype=int)
    for first in range(0, n_episodes, env.num_envs):
        env.seed(seed + first)
        obs: Any = env.reset()
        state: Any = None
        episode_start = np.ones(env.num_envs, dtype=bool)
        running = set(range(min(env.num_envs, n_episodes - first)))
        while running:
            actions, state = predict(model, env, obs, state, episode_start, deterministic=True)
            obs, step_rewards, episode_start, infos = env.step(actions)
            for index in sorted(running):
                rewards[first + index] += step_rewards[index]
                lengths[first + index] += 1
                # Under wrappers that end episodes early (e.g. at the loss of a life) the Monitor's episode still runs
                episode = infos[index].get("episode") if episode_start[index] else None
                if episode is not None:
                    # Before wrappers that change rewards
                    rewards[first + index], lengths[first + index] = episode["r"], episode["l"]
                if episode is not None or lengths[first + index] >= MAX_EPISODE_STEPS:
                    running.remove(index)
                    on_episode()
    return Evaluation(rewards.tolist(), lengths.tolist(), seed)
