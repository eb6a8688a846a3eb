"""Our callbacks, on real environments."""

import io
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from sb3_episodic_a2c import EpisodicA2C, load_checkpoint, save_checkpoint
from sb3_episodic_a2c.callbacks import EpisodeProgressCallback, StopTrainingOnSolved


class RisingEnv(gym.Env):
    """Episode ``k`` (from 1) has two steps and the reward ``k`` in all."""

    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.Discrete(2)
    n_resets = 0

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        self.n_resets += 1
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        return np.zeros(1, np.float32), self.n_resets / 2, self.t == 2, False, {}


@pytest.mark.parametrize("wrap", [lambda env: env, lambda env: VecNormalize(env, norm_reward=True)])
def test_stops_when_the_mean_exceeds_the_threshold(wrap: Any, capsys: pytest.CaptureFixture) -> None:
    model = EpisodicA2C("MlpPolicy", wrap(DummyVecEnv([lambda: Monitor(RisingEnv())])), device="cpu")
    callback = StopTrainingOnSolved(reward_threshold=10, n_episodes=5, verbose=1)
    model.learn(1_000, callback=callback)
    # The mean of 8..12 is 10, which does not exceed 10; that of 9..13 does
    assert callback.solved_at == (13, 26)
    assert callback.solved_at.n_episodes == 13
    assert callback.solved_at.num_timesteps == model.num_timesteps == 26
    assert callback.mean_reward == 11
    assert "after 13 episodes and 26 env steps" in capsys.readouterr().out


def test_needs_all_its_episodes_before_it_may_stop() -> None:
    model = EpisodicA2C("MlpPolicy", RisingEnv(), device="cpu")
    callback = StopTrainingOnSolved(reward_threshold=0.5)
    assert np.isnan(callback.mean_reward)
    model.learn(10_000, callback=callback)
    assert callback.solved_at == (100, 200)


@pytest.mark.parametrize("n_envs, stopped_at", [(1, 11), (1, 22), (1, 26), (3, 12)])
def test_goes_on_with_a_resumed_model(n_envs: int, stopped_at: int, tmp_path: Path) -> None:
    """It is solved at the same step as a training that was never stopped, even if it was stopped at that step."""

    def make_callback() -> StopTrainingOnSolved:
        return StopTrainingOnSolved(reward_threshold=10, n_episodes=5)

    def make_model() -> EpisodicA2C:
        return EpisodicA2C("MlpPolicy", VecMonitor(DummyVecEnv([RisingEnv] * n_envs)), device="cpu")

    uninterrupted = make_callback()
    make_model().learn(1_000, callback=uninterrupted)
    save_checkpoint(make_model().learn(stopped_at), tmp_path / "checkpoint.zip")
    model = load_checkpoint(tmp_path / "checkpoint.zip", device="cpu")
    callback = make_callback()
    callback.resume(model)
    assert (callback.solved_at is not None) == (stopped_at == 26)
    if callback.solved_at is None:
        model.learn(1_000, callback=callback, reset_num_timesteps=False)
    assert callback.solved_at == uninterrupted.solved_at is not None
    assert callback.mean_reward == uninterrupted.mean_reward


class UnrewardedEnv(RisingEnv):
    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        observation, _, *rest = super().step(action)
        return observation, 0.0, *rest


@pytest.mark.parametrize("stopped_at", [60, 64, 124])
def test_episodes_that_end_at_the_same_step_count_together(stopped_at: int) -> None:
    """A resumed model knows the last episodes only as they were after the step."""
    model = EpisodicA2C("MlpPolicy", VecMonitor(DummyVecEnv([RisingEnv, UnrewardedEnv])), device="cpu")
    callback = StopTrainingOnSolved(reward_threshold=10, n_episodes=3)
    model.learn(stopped_at)
    callback.resume(model)
    # From step 64 on there is 15 0 16 in between, whose mean is 10.3. It is 0 31 0 at step 124
    assert (callback.solved_at is not None) == (stopped_at == 124)
    if callback.solved_at is None:
        model.learn(1_000, callback=callback, reset_num_timesteps=False)
    assert callback.solved_at == (62, 124)


def test_resumed_with_the_environments_own_threshold() -> None:
    gym.register("Rising-v0", RisingEnv, reward_threshold=10.0)
    model = EpisodicA2C("MlpPolicy", "Rising-v0", device="cpu").learn(26)
    callback = StopTrainingOnSolved(n_episodes=5)
    callback.resume(model)
    model.learn(1_000, callback=callback, reset_num_timesteps=False)
    assert callback.solved_at == (13, 26)
    assert model.num_timesteps == 27


def test_several_environments_and_vec_monitor() -> None:
    model = EpisodicA2C("MlpPolicy", VecMonitor(DummyVecEnv([RisingEnv] * 3)), device="cpu")
    callback = StopTrainingOnSolved(reward_threshold=4, n_episodes=6)
    model.learn(1_000, callback=callback)
    # Three episodes end at a step: 3 3 3 4 4 4 has the mean 3.5, 4 4 4 5 5 5 has 4.5
    assert callback.solved_at == (15, 30)


def test_the_environments_own_threshold() -> None:
    callback = StopTrainingOnSolved()
    EpisodicA2C("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2), device="cpu").learn(50, callback=callback)
    assert callback.reward_threshold == 475.0
    assert callback.solved_at is None


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"`env` names no reward threshold.*pass `reward_threshold`"):
        EpisodicA2C("MlpPolicy", RisingEnv()).learn(10, callback=StopTrainingOnSolved())
    with pytest.raises(ValueError, match="`env` Pendulum-v1 names no reward threshold"):
        EpisodicA2C("MlpPolicy", "Pendulum-v1").learn(10, callback=StopTrainingOnSolved())
    with pytest.raises(ValueError, match=r"not monitored.*VecMonitor"):
        EpisodicA2C("MlpPolicy", DummyVecEnv([RisingEnv])).learn(10, callback=StopTrainingOnSolved(1.0))
    for number in (0, 2.5):
        with pytest.raises(ValueError, match=f"`n_episodes` is {number}"):
            StopTrainingOnSolved(n_episodes=number)
        with pytest.raises(ValueError, match=f"`window` is {number}"):
            EpisodeProgressCallback(window=number)


def test_a_threshold_that_envpool_does_not_name() -> None:
    envpool = pytest.importorskip("envpool")
    env = envpool.make("Pendulum-v1", env_type="gymnasium", num_envs=2, num_threads=1)
    with pytest.raises(ValueError, match="`env` names no reward threshold"):
        EpisodicA2C("MlpPolicy", env).learn(10, callback=StopTrainingOnSolved())


def test_progress_bar_shows_the_last_and_the_running_reward() -> None:
    output = io.StringIO()
    callback = EpisodeProgressCallback(total_episodes=20, window=4, file=output, mininterval=0)
    EpisodicA2C("MlpPolicy", RisingEnv(), device="cpu").learn(40, callback=callback)
    last = output.getvalue().split("\r")[-1]
    assert "20/20" in last
    assert "episode_reward=20.0" in last
    assert "running_reward=18.5" in last
    # All of the 40 that were asked for
    assert "steps=40" in last and "left=00:00" in last
    assert callback.n_episodes_seen == 20
