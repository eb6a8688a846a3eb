"""Small environments whose right answers are known in advance."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_episodic_a2c import RecurrentEpisodicA2C
from tests.variant_envs import count_choices

IMAGE_SPACE = spaces.Box(0, 255, (36, 36, 1), np.uint8)

ACTION_SPACES: dict[str, spaces.Space] = {
    "box": spaces.Box(-2.0, 0.5, (2,), np.float32),
    "box_2d": spaces.Box(-1.0, 1.0, (2, 3), np.float32),
    "discrete": spaces.Discrete(3),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(3),
}

OBSERVATION_SPACES: dict[str, spaces.Space] = {
    "box": spaces.Box(-1.0, 1.0, (3,), np.float32),
    "box_2d": spaces.Box(-1.0, 1.0, (2, 3), np.float32),
    "float64": spaces.Box(-1.0, 1.0, (3,), np.float64),
    "discrete": spaces.Discrete(4),
    "multi_discrete": spaces.MultiDiscrete([3, 2]),
    "multi_binary": spaces.MultiBinary(4),
    "image": IMAGE_SPACE,
    "dict": spaces.Dict(
        {
            "vector": spaces.Box(-1.0, 1.0, (3,), np.float32),
            "image": IMAGE_SPACE,
            "choice": spaces.Discrete(3),
            "choices": spaces.MultiDiscrete([2, 3]),
            "switches": spaces.MultiBinary(2),
        }
    ),
}


def policy_for(observation_space: spaces.Space) -> str:
    """SB3's policy for these observations."""
    if isinstance(observation_space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if observation_space.shape == IMAGE_SPACE.shape else "MlpPolicy"


def arguments_of(algorithm: type[Any], policy: str, policy_kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The policy and its arguments for a variant, e.g. ``MlpLstmPolicy`` with a small LSTM for ``MlpPolicy``."""
    if not issubclass(algorithm, RecurrentEpisodicA2C):
        return policy, policy_kwargs
    return policy.replace("Policy", "LstmPolicy"), {"lstm_hidden_size": 8, **policy_kwargs}


class UnmaskedEnv(gym.Env):
    """All actions are valid, which its masks tell the masked variant."""

    def action_masks(self) -> np.ndarray:
        return np.ones(sum(count_choices(self.action_space)), dtype=bool)


class TargetEnv(UnmaskedEnv):
    """
    The observations are noise and one action is the best: the reward is 1 there, and falls to 0 the further off an action is.

    So the best return is ``episode_length``, and actions outside of the action space are an error.

    :param observation_space: Sampled from
    :param action_space: Its target is :meth:`target`
    :param episode_length: Steps of each episode
    :param truncates: Whether episodes are truncated instead of terminated
    """

    def __init__(
        self,
        observation_space: spaces.Space = OBSERVATION_SPACES["box"],
        action_space: spaces.Space = ACTION_SPACES["discrete"],
        episode_length: int = 5,
        truncates: bool = False,
    ) -> None:
        # A space samples from a random state of its own
        self.observation_space = deepcopy(observation_space)
        self.action_space = action_space
        self.episode_length = episode_length
        self.truncates = truncates
        self.n_steps = 0

    @property
    def target(self) -> np.ndarray:
        """The best action, as an array."""
        space = self.action_space
        if isinstance(space, spaces.Box):
            return space.low + 0.75 * (space.high - space.low)
        if isinstance(space, spaces.Discrete):
            return space.n - 1
        return space.nvec - 1 if isinstance(space, spaces.MultiDiscrete) else np.ones(space.shape)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.n_steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.n_steps += 1
        if isinstance(self.action_space, spaces.Box):
            widths = self.action_space.high - self.action_space.low
            reward = 1.0 - float(np.mean(np.abs(action - self.target) / widths))
        else:
            reward = float(np.mean(action == self.target))
        is_over = self.n_steps == self.episode_length
        return self.observation_space.sample(), reward, is_over and not self.truncates, is_over and self.truncates, {}


class Transition(NamedTuple):
    """What a :class:`CountingEnv` went through in one step."""

    observation: tuple[float, ...]
    action: int
    reward: float
    is_over: bool


class CountingEnv(UnmaskedEnv):
    """
    Counts, and remembers each transition, so that none can be lost, doubled or mixed up unnoticed.

    The observation is (environment, episode, step), the reward is the number of steps ever made in this environment, as
    an integer: actions have no effect.

    :param lengths: The length of each episode is drawn from these
    :param env_index: First number of the observation
    :param truncates: Whether episodes are truncated instead of terminated
    """

    observation_space = spaces.Box(-1.0, np.inf, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, lengths: Sequence[int] = (5,), env_index: int = 0, truncates: bool = False) -> None:
        self.lengths = lengths
        self.env_index = env_index
        self.truncates = truncates
        self.transitions: list[Transition] = []
        self.n_resets = 0

    def _observation(self) -> np.ndarray:
        return np.array([self.env_index, self.n_resets, self.step_index], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.n_resets += 1
        self.step_index = 0
        self.length = int(self.np_random.choice(self.lengths))
        return self._observation(), {}

    def step(self, action: np.integer) -> tuple[np.ndarray, int, bool, bool, dict[str, Any]]:
        observation = tuple(self._observation().tolist())
        self.step_index += 1
        reward = len(self.transitions) + 1
        is_over = self.step_index == self.length
        self.transitions.append(Transition(observation, int(action), float(reward), is_over))
        return self._observation(), reward, is_over and not self.truncates, is_over and self.truncates, {}


class MixedRewardEnv(TargetEnv):
    """Its reward is an ``int`` 0 at first, and 0.1, which no float32 can hold, at the end: both are legal."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, _, terminated, truncated, info = super().step(action)
        return observation, 0.1 if terminated or truncated else 0, terminated, truncated, info


NEVER = 10**9
"""An episode length that no test reaches."""


def vectorized(make_env: Callable[[int], gym.Env], n_envs: int) -> DummyVecEnv:
    """``make_env(env_index)`` for each environment, monitored as ``make_vec_env`` does."""
    return DummyVecEnv([lambda env_index=env_index: Monitor(make_env(env_index)) for env_index in range(n_envs)])
