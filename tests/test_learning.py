"""It learns: on tasks with a known optimum, and CartPole-v1 to solved."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_episodic_a2c import EpisodicA2C, notebook_preset
from sb3_episodic_a2c.callbacks import StopTrainingOnSolved


class LinearTargetEnv(gym.Env):
    """Three steps; the best action is a known function of the observation, and the reward 1 less the squared distance."""

    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        super().reset(**kwargs)
        self.t = 0
        return self._observe(), {}

    def _observe(self) -> np.ndarray:
        self.observation = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.observation

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        target = 0.5 * self.observation[0] - 0.3 * self.observation[1]
        self.t += 1
        return self._observe(), float(1 - (action[0] - target) ** 2), self.t == 3, False, {}


class BrightSideEnv(gym.Env):
    """An image, bright on the left or on the right: the action is to say where. Five steps."""

    observation_space: spaces.Space = spaces.Box(0, 255, (36, 36, 1), dtype=np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        super().reset(**kwargs)
        self.t = 0
        return self._observe(), {}

    def _observe(self) -> Any:
        self.side = int(self.np_random.integers(2))
        image = self.np_random.integers(0, 64, (36, 36, 1), dtype=np.uint8)
        image[:, 18 * self.side : 18 * (self.side + 1)] += 128
        return image

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        reward = float(action == self.side)
        self.t += 1
        return self._observe(), reward, self.t == 5, False, {}


class DictEnv(BrightSideEnv):
    """The image is only right if the other key says so."""

    observation_space = spaces.Dict({"image": BrightSideEnv.observation_space, "is_swapped": spaces.Discrete(2)})

    def _observe(self) -> dict[str, Any]:
        image = super()._observe()
        is_swapped = int(self.np_random.integers(2))
        self.side ^= is_swapped
        return {"image": image, "is_swapped": is_swapped}


@pytest.mark.parametrize("policy", ["MlpPolicy", pytest.param("SharedMlpPolicy", marks=pytest.mark.slow)])
def test_continuous_actions(policy: str) -> None:
    model = EpisodicA2C(policy, make_vec_env(LinearTargetEnv, n_envs=4, seed=0), n_episodes=2, gamma=0.0, seed=0, device="cpu")
    model.learn(20_000)
    mean_reward, _ = evaluate_policy(model, make_vec_env(LinearTargetEnv, seed=1), n_eval_episodes=100)
    # The best is 3.0; the middle of the actions gives 2.66
    assert mean_reward > 2.97


@pytest.mark.slow
def test_continuous_actions_with_gsde() -> None:
    model = EpisodicA2C(
        "MlpPolicy",
        make_vec_env(LinearTargetEnv, n_envs=4, seed=0),
        n_episodes=2,
        gamma=0.0,
        use_sde=True,
        policy_kwargs={"squash_output": True, "log_std_init": -1},
        seed=0,
        device="cpu",
    )
    model.learn(20_000)
    mean_reward, _ = evaluate_policy(model, make_vec_env(LinearTargetEnv, seed=1), n_eval_episodes=100)
    assert mean_reward > 2.95


def test_images() -> None:
    model = EpisodicA2C("CnnPolicy", make_vec_env(BrightSideEnv, n_envs=4, seed=0), learning_rate=1e-3, seed=0, device="cpu")
    model.learn(2_000)
    mean_reward, _ = evaluate_policy(model, make_vec_env(BrightSideEnv, seed=1), n_eval_episodes=20)
    assert mean_reward > 4.9


@pytest.mark.slow
def test_dict_observations() -> None:
    model = EpisodicA2C(
        "MultiInputPolicy", make_vec_env(DictEnv, n_envs=4, seed=0), n_episodes=2, learning_rate=1e-3, seed=0, device="cpu"
    )
    model.learn(12_000)
    mean_reward, _ = evaluate_policy(model, make_vec_env(DictEnv, seed=1), n_eval_episodes=20)
    # Either key alone says nothing: 2.5
    assert mean_reward > 4.9


def solve_cartpole(seed: int, total_timesteps: int, **arguments: Any) -> int | None:
    env = make_vec_env("CartPole-v1", n_envs=1, seed=seed)
    solved = StopTrainingOnSolved()
    EpisodicA2C(env=env, seed=seed, device="cpu", **arguments).learn(total_timesteps, callback=solved)
    return solved.solved_at.num_timesteps if solved.solved_at else None


def test_cartpole_is_solved() -> None:
    solved_at = solve_cartpole(seed=0, total_timesteps=100_000, policy="MlpPolicy")
    assert solved_at is not None


@pytest.mark.slow
@pytest.mark.parametrize("actor, n_seeds", [("numpy", 40), ("torch", 10)])
def test_cartpole_is_solved_by_many_seeds(actor: str, n_seeds: int) -> None:
    """
    The median within 60,000 env steps, nine of ten within 100,000, all within 200,000. The criterion needs about 47,500.

    One seed in forty takes longer than 100,000: which one changes with the rounding, so with the processor.
    """
    solved_at = [solve_cartpole(seed, 200_000, policy="MlpPolicy", actor=actor) for seed in range(n_seeds)]
    print(actor, solved_at)
    in_order = sorted(n_steps for n_steps in solved_at if n_steps is not None)
    assert len(in_order) == n_seeds
    assert np.median(in_order) <= 60_000 and in_order[-1 - n_seeds // 10] <= 100_000


@pytest.mark.slow
def test_cartpole_is_solved_by_ten_seeds_of_the_notebook() -> None:
    solved_at = [solve_cartpole(seed, 400_000, **notebook_preset()) for seed in range(10)]
    print(solved_at)
    assert None not in solved_at
