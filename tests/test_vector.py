"""Vector environments: the same episodes as in a DummyVecEnv, whenever they are reset, with SB3's tools on top."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecCheckNan,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from sb3_episodic_a2c import EpisodicA2C, MaskableEpisodicA2C, RecurrentEpisodicA2C, load_checkpoint, resume, save_checkpoint
from sb3_episodic_a2c.callbacks import StopTrainingOnSolved
from sb3_episodic_a2c.returns import discounted_returns
from sb3_episodic_a2c.vector import GymnasiumVecEnv, as_vec_env
from tests.envs import ACTION_SPACES, OBSERVATION_SPACES, TargetEnv, arguments_of, policy_for

SMALL = {"net_arch": [8]}
MODES = list(AutoresetMode)


class Script(NamedTuple):
    """The episodes of one environment, again and again."""

    lengths: tuple[int, ...]
    endings: tuple[str, ...]
    """How each of them ends: terminated, truncated, or both."""


class ScriptedEnv(gym.Env):
    """
    Rewards and observations encode environment, episode and step.

    :param script: Its episodes
    :param env_index: Number of the environment
    """

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, script: Script, env_index: int) -> None:
        self.script, self.env_index = script, env_index
        self.episode, self.step_index = -1, 0

    def _observation(self) -> np.ndarray:
        return np.array([self.env_index, self.episode, self.step_index], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.step_index = self.episode + 1, 0
        return self._observation(), {"first_of": self.episode}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = 100.0 * self.env_index + self.episode + 0.1 * self.step_index
        self.step_index += 1
        is_over = self.step_index == length_of(self.script, self.episode)
        ending = self.script.endings[self.episode % len(self.script.endings)]
        info = {"is_success": self.episode % 2 == 0, "where": {"episode": self.episode}} if is_over else {}
        terminated, truncated = is_over and ending != "truncated", is_over and ending != "terminated"
        return self._observation(), reward, terminated, truncated, info


def length_of(script: Script, episode: int) -> int:
    return script.lengths[episode % len(script.lengths)]


scripts = st.lists(
    st.builds(
        Script,
        st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple),
        st.lists(st.sampled_from(["terminated", "truncated", "both"]), min_size=1, max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=4,
)


def make_dummy(scripts: list[Script]) -> DummyVecEnv:
    return DummyVecEnv([lambda index=index, s=s: Monitor(ScriptedEnv(s, index)) for index, s in enumerate(scripts)])


def make_vector(scripts: list[Script], mode: AutoresetMode, copy: bool = True) -> SyncVectorEnv:
    fns = [lambda index=index, s=s: ScriptedEnv(s, index) for index, s in enumerate(scripts)]
    return SyncVectorEnv(fns, copy=copy, autoreset_mode=mode)


class Episode(NamedTuple):
    observations: list[list[float]]
    rewards: list[float]
    terminal_observation: list[float]
    info: dict[str, Any]
    reset_info: dict[str, Any]


def play(env: VecEnv, n_steps: int) -> list[list[Episode]]:
    """The complete episodes of each environment, without steps that only start one."""
    observations = env.reset()
    reset_infos = [dict(info) for info in env.reset_infos]
    running: list[tuple[list[list[float]], list[float]]] = [([], []) for _ in range(env.num_envs)]
    episodes: list[list[Episode]] = [[] for _ in range(env.num_envs)]
    for _ in range(n_steps):
        new_observations, rewards, dones, infos = env.step(np.zeros(env.num_envs, dtype=np.int64))
        assert rewards.dtype == np.float32 and dones.dtype == bool and new_observations.dtype == np.float32
        restarted = env.restarted.tolist() if isinstance(env, GymnasiumVecEnv) else []
        for index in range(env.num_envs):
            if index in restarted:
                assert rewards[index] == 0.0 and not dones[index]
                reset_infos[index] = dict(env.reset_infos[index])
                continue
            running[index][0].append(observations[index].tolist())
            running[index][1].append(rewards[index].item())
            if not dones[index]:
                assert not infos[index]
                continue
            info = dict(infos[index])
            terminal_observation = info.pop("terminal_observation")
            assert info["episode"].pop("t") >= 0
            episodes[index].append(Episode(*running[index], terminal_observation.tolist(), info, reset_infos[index]))
            running[index] = ([], [])
            reset_infos[index] = dict(env.reset_infos[index])
        observations = new_observations
    return episodes


@settings(deadline=None, max_examples=60)
@given(scripts, st.sampled_from(MODES), st.booleans())
def test_the_same_episodes_as_in_a_dummy_vec_env(scripts: list[Script], mode: AutoresetMode, copy: bool) -> None:
    class Emptied(DummyVecEnv):
        """Infos of steps that end no episode are left out, as the adapter's are."""

        def step_wait(self) -> Any:
            new_obs, rewards, dones, infos = super().step_wait()
            return new_obs, rewards, dones, [info if done else {} for info, done in zip(infos, dones, strict=True)]

    dummy_env = Emptied([lambda index=index, s=s: Monitor(ScriptedEnv(s, index)) for index, s in enumerate(scripts)])
    expected, found = play(dummy_env, 40), play(GymnasiumVecEnv(make_vector(scripts, mode, copy)), 40)
    for expected_episodes, episodes in zip(expected, found, strict=True):
        if mode == AutoresetMode.NEXT_STEP:
            # Each episode but the first takes one step more
            assert sum(len(episode.rewards) + 1 for episode in episodes) <= 41
            expected_episodes = expected_episodes[: len(episodes)]
        assert episodes == expected_episodes


def expected_rollouts(scripts: list[Script], n_wanted: int, discard: bool, delay: bool, n_steps: int) -> list[list[tuple]]:
    """
    The episodes ``(env, number)`` of each update, by a simulation of environments and rules that shares no code with them.

    :param delay: Whether a step of its own starts an episode
    """
    n_envs = len(scripts)
    episode, step, is_waiting = [0] * n_envs, [0] * n_envs, [False] * n_envs
    n_started, wanted = n_envs, [True] * n_envs
    complete: list[tuple[int, int]] = []
    rollouts = []
    for _ in range(n_steps):
        dones = []
        for env in range(n_envs):
            if is_waiting[env]:
                is_waiting[env] = False
                episode[env] += 1
                continue
            step[env] += 1
            if step[env] == length_of(scripts[env], episode[env]):
                dones.append(env)
                if wanted[env] or not discard:
                    complete.append((env, episode[env]))
                step[env] = 0
                wanted[env] = n_started < n_wanted
                n_started += 1
                is_waiting[env] = delay
                episode[env] += not delay
        if (discard and not any(wanted)) or (not discard and len(complete) >= n_wanted):
            rollouts.append(complete)
            complete = []
            if discard:
                # All environments are reset, unless all are at a start already
                if any(step[env] > 0 for env in range(n_envs)):
                    episode = [number + 1 for number in episode]
                    step, is_waiting = [0] * n_envs, [False] * n_envs
                n_started, wanted = n_envs, [index < n_wanted for index in range(n_envs)]
    return rollouts


class RecordingA2C(EpisodicA2C):
    """Remembers what each update is made of."""

    def _finish_rollout(self, rollout_buffer: Any) -> None:
        super()._finish_rollout(rollout_buffer)
        starts = np.flatnonzero(rollout_buffer.episode_starts[:, 0])
        parts = [np.split(array, starts[1:]) for array in (rollout_buffer.observations[:, 0], rollout_buffer.rewards[:, 0])]
        raw_returns = np.split(rollout_buffer.compute_returns(self.gamma), starts[1:])
        terminal_values = [episode.terminal_value for episode in rollout_buffer.episodes]
        if rollout_buffer.size():
            self.rollouts.append(list(zip(*parts, raw_returns, terminal_values, strict=True)))

    def learn(self, *args: Any, **kwargs: Any) -> Any:
        self.rollouts: list[list[tuple[Any, ...]]] = []
        return super().learn(*args, **kwargs)


@settings(deadline=None, max_examples=30)
@given(scripts, st.sampled_from(MODES), st.sampled_from(["carry", "discard"]), st.integers(1, 2))
def test_updates_are_made_of_the_right_episodes(
    scripts: list[Script], mode: AutoresetMode, partial_episodes: Any, n_episodes: int
) -> None:
    n_envs, n_steps = len(scripts), 45
    model = RecordingA2C(
        "MlpPolicy",
        make_vector(scripts, mode),
        seed=0,
        n_episodes=n_episodes,
        partial_episodes=partial_episodes,
        policy_kwargs=SMALL,
        # More than there are steps
        stats_window_size=1_000,
    )
    model.learn(n_steps * n_envs)
    assert model.num_timesteps == n_steps * n_envs
    is_delayed = mode == AutoresetMode.NEXT_STEP
    expected = expected_rollouts(scripts, n_episodes * n_envs, partial_episodes == "discard", is_delayed, n_steps)
    for episodes, rollout in zip(expected, model.rollouts, strict=False):
        assert sorted(episodes) == sorted((int(obs[0, 0]), int(obs[0, 1])) for obs, *_ in rollout)
    # The budget may end a rollout early
    assert len(expected) <= len(model.rollouts) <= len(expected) + 1
    for rollout in model.rollouts:
        for observations, rewards, returns, terminal_value in rollout:
            env, episode = int(observations[0, 0]), int(observations[0, 1])
            length = length_of(scripts[env], episode)
            steps = np.arange(length)
            np.testing.assert_array_equal(observations, np.stack([np.full(length, env), np.full(length, episode), steps], 1))
            np.testing.assert_array_equal(
                rewards, np.array([100.0 * env + episode + 0.1 * step for step in steps], np.float32)
            )
            np.testing.assert_array_equal(returns, discounted_returns(rewards, model.gamma, terminal_value))
            is_truncated = scripts[env].endings[episode % len(scripts[env].endings)] == "truncated"
            assert (terminal_value != 0.0) == is_truncated
    episode_infos = [(info["r"], info["l"]) for info in model.ep_info_buffer]
    reported = [
        (round(sum(100.0 * env + e + 0.1 * step for step in range(n)), 6), n) for env, e, n in finished(model, scripts)
    ]
    assert sorted(episode_infos) == sorted(reported)
    if partial_episodes == "carry":
        assert model._episode_num == len(model.ep_info_buffer)


def finished(model: RecordingA2C, scripts: list[Script]) -> list[tuple[int, int, int]]:
    """Environment, number and length of all episodes that were trained on."""
    numbers = [(int(obs[0, 0]), int(obs[0, 1])) for rollout in model.rollouts for obs, *_ in rollout]
    return [(env, episode, length_of(scripts[env], episode)) for env, episode in numbers]


@settings(deadline=None, max_examples=25)
@given(
    scripts,
    st.sampled_from([AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]),
    st.sampled_from(["carry", "discard"]),
    st.integers(1, 2),
)
def test_training_is_that_in_a_dummy_vec_env_to_the_last_bit(
    scripts: list[Script], mode: AutoresetMode, partial_episodes: Any, n_episodes: int
) -> None:
    models = []
    for env in (make_dummy(scripts), make_vector(scripts, mode)):
        model = RecordingA2C(
            "MlpPolicy", env, seed=1, n_episodes=n_episodes, partial_episodes=partial_episodes, policy_kwargs=SMALL
        )
        models.append(model.learn(40 * len(scripts)))
    expected, found = models
    assert_same_parameters(expected, found)
    for name in ("num_timesteps", "_n_updates", "_episode_num", "return_statistics"):
        assert getattr(expected, name) == getattr(found, name)
    infos = [[(info["r"], info["l"]) for info in model.ep_info_buffer] for model in models]
    assert infos[0] == infos[1] and list(expected.ep_success_buffer) == list(found.ep_success_buffer)
    np.testing.assert_equal(expected.rollouts, found.rollouts)


def assert_same_parameters(expected: BaseAlgorithm, found: BaseAlgorithm) -> None:
    for (name, parameter), other in zip(expected.policy.named_parameters(), found.policy.parameters(), strict=True):
        assert th.equal(parameter, other), name


SCRIPTS = [
    Script((3, 5, 1), ("truncated", "terminated")),
    Script((2, 7), ("both", "truncated")),
    Script((4,), ("terminated",)),
]


@pytest.mark.parametrize("n_envs", [16, 24])
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_many_environments_train_as_in_a_dummy_vec_env(mode: AutoresetMode, n_envs: int) -> None:
    """From 16 environments on, returns are computed row by row."""
    scripts = [SCRIPTS[index % 3] for index in range(n_envs)]
    models = [
        EpisodicA2C("MlpPolicy", env, seed=1, policy_kwargs=SMALL).learn(1_500)
        for env in (make_dummy(scripts), make_vector(scripts, mode))
    ]
    assert models[0]._n_updates > 5
    assert_same_parameters(*models)


# ---------------------------------------------------------------------- SB3's tools


def cart_poles(n_envs: int = 4, mode: str = "vector_entry_point", **kwargs: Any) -> VectorEnv:
    return gym.make_vec("CartPole-v1", num_envs=n_envs, vectorization_mode=mode, **kwargs)


WRAPPERS: dict[str, Callable[[VecEnv], VecEnv]] = {
    "VecNormalize": lambda env: VecNormalize(env, gamma=0.9),
    "VecFrameStack": lambda env: VecFrameStack(env, 3),
    "VecMonitor": VecMonitor,
    "VecCheckNan": lambda env: VecCheckNan(env, raise_exception=True),
}


@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_give_what_they_give_on_a_dummy_vec_env(name: str, mode: AutoresetMode) -> None:
    envs = [WRAPPERS[name](env) for env in (make_dummy(SCRIPTS), as_vec_env(make_vector(SCRIPTS, mode)))]
    np.testing.assert_array_equal(*[env.reset() for env in envs])
    for _ in range(30):
        (obs, rewards, dones, infos), (other_obs, other_rewards, other_dones, other_infos) = [
            env.step(np.zeros(3, dtype=np.int64)) for env in envs
        ]
        np.testing.assert_array_equal(obs, other_obs)
        np.testing.assert_array_equal(rewards, other_rewards)
        np.testing.assert_array_equal(dones, other_dones)
        for index in np.flatnonzero(dones):
            terminal_observations = [each[index]["terminal_observation"] for each in (infos, other_infos)]
            np.testing.assert_array_equal(*terminal_observations)
            assert infos[index]["episode"]["r"] == other_infos[index]["episode"]["r"]
            assert infos[index]["episode"]["l"] == other_infos[index]["episode"]["l"]


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
def test_training_below_wrappers(name: str) -> None:
    """With gymnasium's default, NEXT_STEP, seen through the wrapper: only whole episodes are trained on."""
    model = RecordingA2C("MlpPolicy", WRAPPERS[name](as_vec_env(make_vector(SCRIPTS, AutoresetMode.NEXT_STEP))), seed=0)
    model.learn(300)
    lengths = {len(rewards) for rollout in model.rollouts for _, rewards, *_ in rollout}
    assert lengths == {1, 2, 3, 4, 5, 7}
    if name != "VecMonitor":
        assert {info["l"] for info in model.ep_info_buffer} == lengths


def test_callbacks_and_logs(tmp_path: Path) -> None:
    eval_callback = EvalCallback(as_vec_env(cart_poles(3)), eval_freq=50, n_eval_episodes=3, verbose=0)
    callbacks = [
        eval_callback,
        CheckpointCallback(100, str(tmp_path)),
        StopTrainingOnMaxEpisodes(5),
        StopTrainingOnSolved(10_000.0, n_episodes=5),
    ]
    model = EpisodicA2C("MlpPolicy", cart_poles(4), seed=0, policy_kwargs=SMALL).learn(4_000, callbacks, log_interval=1)
    # At the end of the step in which each environment has had its five
    assert 20 <= model._episode_num <= 24 and callbacks[3].n_episodes_seen == model._episode_num
    assert np.isfinite(eval_callback.last_mean_reward)
    assert len(list(tmp_path.glob("*.zip"))) == model.num_timesteps // 400


def test_progress_bar_and_logged_rewards() -> None:
    model = EpisodicA2C("MlpPolicy", cart_poles(8), seed=0, policy_kwargs=SMALL)
    logged: list[dict[str, Any]] = []
    model.set_logger(Logger(None, [Remember(logged)]))
    model.learn(1_000, progress_bar=True, log_interval=1)
    assert len(logged) == model._n_updates > 3
    rewards = [info["r"] for info in model.ep_info_buffer]
    assert all(info["r"] == info["l"] for info in model.ep_info_buffer)
    assert logged[-1]["rollout/ep_rew_mean"] == pytest.approx(np.mean(rewards))


class Remember(KVWriter):
    def __init__(self, logged: list[dict[str, Any]]) -> None:
        self.logged = logged

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.logged.append(dict(key_values))

    def close(self) -> None:
        pass


def test_solved_by_the_threshold_of_the_environments_own_spec() -> None:
    callback = StopTrainingOnSolved(n_episodes=1)
    EpisodicA2C("MlpPolicy", cart_poles(), policy_kwargs=SMALL).learn(40, callback)
    assert callback.reward_threshold == 475.0


def test_evaluation() -> None:
    model = EpisodicA2C("MlpPolicy", cart_poles(), seed=0, policy_kwargs=SMALL)
    for mode in MODES:
        env = as_vec_env(make_vector(SCRIPTS, mode))
        model = EpisodicA2C("MlpPolicy", env, seed=0, policy_kwargs=SMALL)
        _, lengths = evaluate_policy(model, env, n_eval_episodes=9, return_episode_rewards=True)
        expected = evaluate_policy(model, make_dummy(SCRIPTS), n_eval_episodes=9, return_episode_rewards=True)
        # Another step to each start changes which environment finishes first
        assert sorted(lengths) == sorted(expected[1])
    with pytest.raises(ValueError, match="not a Gymnasium environment"):
        evaluate_policy(model, make_vector(SCRIPTS, AutoresetMode.SAME_STEP))


@pytest.mark.parametrize("algorithm", [A2C, PPO])
@pytest.mark.parametrize("mode", MODES)
def test_algorithms_of_sb3(algorithm: type[BaseAlgorithm], mode: AutoresetMode) -> None:
    model = algorithm(
        "MlpPolicy", as_vec_env(make_vector(SCRIPTS, mode)), n_steps=16, seed=0, device="cpu", policy_kwargs=SMALL
    )
    model.learn(200)
    assert len(model.ep_info_buffer) > 20
    if mode != AutoresetMode.NEXT_STEP:
        other = algorithm("MlpPolicy", make_dummy(SCRIPTS), n_steps=16, seed=0, device="cpu", policy_kwargs=SMALL).learn(200)
        assert_same_parameters(other, model)


@pytest.mark.parametrize("mode", ["sync", "async", "vector_entry_point"])
def test_make_vec(mode: str) -> None:
    model = EpisodicA2C("MlpPolicy", cart_poles(3, mode), seed=0, policy_kwargs=SMALL)
    try:
        model.learn(300)
        assert model._n_updates > 0
        env = model.get_env()
        assert env.get_attr("spec")[0].reward_threshold == 475.0
        assert len(env.get_attr("gravity", [0, 2])) == 2
        model.learn(300)
    finally:
        model.get_env().close()


def test_three_vectorisation_modes_play_the_same_episodes() -> None:
    rewards = []
    for mode in ("sync", "async"):
        model = EpisodicA2C("MlpPolicy", cart_poles(3, mode), seed=0, policy_kwargs=SMALL).learn(300)
        rewards.append([info["r"] for info in model.ep_info_buffer])
        model.get_env().close()
    dummy_env = DummyVecEnv([lambda: Monitor(gym.make("CartPole-v1")) for _ in range(3)])
    dummy = EpisodicA2C("MlpPolicy", dummy_env, seed=0, policy_kwargs=SMALL).learn(300)
    assert rewards[0] == rewards[1]
    # The first episodes, before a step that starts one can differ
    assert rewards[0][0] == dummy.ep_info_buffer[0]["r"]


class SaveEachRollout(BaseCallback):
    """Saves a checkpoint before each rollout, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.folders, self.n_pending = folder, [], []

    def _on_rollout_start(self) -> None:
        self.folders.append(self.folder / str(self.model.num_timesteps))
        self.folders[-1].mkdir()
        save_checkpoint(self.model, self.folders[-1] / "checkpoint_1_1_steps.zip")
        self.n_pending.append(len(self.training_env.unwrapped.pending))

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("n_envs", [2, 20])
def test_exact_resume(n_envs: int, tmp_path: Path) -> None:
    """During episodes, and where the next step only starts one in some environments."""
    n_steps = 200 * n_envs
    callback = SaveEachRollout(tmp_path)
    model = EpisodicA2C("MlpPolicy", cart_poles(n_envs), seed=3, policy_kwargs=SMALL).learn(n_steps, callback)
    assert len(callback.folders) > 3 and any(callback.n_pending)
    for folder in callback.folders[1:]:
        resumed = resume(folder)
        assert isinstance(resumed.get_env(), GymnasiumVecEnv)
        resumed.learn(n_steps - resumed.num_timesteps, reset_num_timesteps=False)
        assert resumed.num_timesteps == model.num_timesteps
        assert_same_parameters(model, resumed)
        assert [info["r"] for info in model.ep_info_buffer] == [info["r"] for info in resumed.ep_info_buffer]


def test_worker_processes_are_left_out_of_checkpoints(tmp_path: Path) -> None:
    model = EpisodicA2C("MlpPolicy", cart_poles(2, "async"), seed=0, policy_kwargs=SMALL).learn(100)
    with pytest.warns(UserWarning, match="cannot be part of the checkpoint"):
        save_checkpoint(model, tmp_path / "model.zip")
    model.get_env().close()
    resumed = load_checkpoint(tmp_path / "model.zip", env=cart_poles(2))
    assert resumed.learn(100, reset_num_timesteps=False).num_timesteps == 200


def test_wrapped_wherever_a_model_takes_an_environment(tmp_path: Path) -> None:
    model = EpisodicA2C("MlpPolicy", cart_poles(2), policy_kwargs=SMALL)
    model.set_env(cart_poles(2, "sync"))
    assert isinstance(model.get_env(), GymnasiumVecEnv)
    model.learn(60)
    model.save(tmp_path / "model.zip")
    loaded = EpisodicA2C.load(tmp_path / "model.zip", env=cart_poles(3))
    assert isinstance(loaded.get_env(), GymnasiumVecEnv) and loaded.n_envs == 3
    loaded.learn(60)
    images = EpisodicA2C("CnnPolicy", target_env(MODES[0], observation_space="image"))
    assert isinstance(images.get_env(), VecTransposeImage)


def target_env(mode: AutoresetMode, observation_space: str = "box", action_space: str = "discrete") -> SyncVectorEnv:
    spaces_ = OBSERVATION_SPACES[observation_space], ACTION_SPACES[action_space]
    fns = [lambda index=index: TargetEnv(*spaces_, episode_length=3 + index, truncates=index == 1) for index in range(3)]
    return SyncVectorEnv(fns, autoreset_mode=mode)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize(
    ("observation_space", "action_space"),
    [*[(name, "discrete") for name in OBSERVATION_SPACES], *[("box", name) for name in ACTION_SPACES if name != "discrete"]],
)
def test_all_spaces(observation_space: str, action_space: str, mode: AutoresetMode) -> None:
    env = target_env(mode, observation_space, action_space)
    model = EpisodicA2C(policy_for(OBSERVATION_SPACES[observation_space]), env, seed=0, policy_kwargs=SMALL).learn(40)
    assert model._n_updates > 0
    if mode == AutoresetMode.SAME_STEP:
        fns = [lambda env=env: Monitor(env) for env in target_env(mode, observation_space, action_space).envs]
        dummy = EpisodicA2C(policy_for(OBSERVATION_SPACES[observation_space]), DummyVecEnv(fns), seed=0, policy_kwargs=SMALL)
        assert_same_parameters(dummy.learn(40), model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("algorithm", [MaskableEpisodicA2C, RecurrentEpisodicA2C])
def test_variants(algorithm: type[EpisodicA2C], mode: AutoresetMode) -> None:
    policy, policy_kwargs = arguments_of(algorithm, "MlpPolicy", SMALL)
    models = []
    for env in (target_env(mode), DummyVecEnv([lambda env=env: Monitor(env) for env in target_env(mode).envs])):
        models.append(algorithm(policy, env, seed=0, policy_kwargs=policy_kwargs).learn(60))
    assert models[0]._n_updates > 0
    if mode != AutoresetMode.NEXT_STEP:
        assert_same_parameters(*models)


# ---------------------------------------------------------------------- a hand-written one


class CountdownVectorEnv(VectorEnv):
    """
    Environment ``i`` has episodes of ``i + 2`` steps. Observations and rewards are written into the same arrays at every step.

    Action 0 is never valid, and in the state after the end of an episode none is.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012  # as gymnasium's own

    def __init__(self, n_envs: int = 3) -> None:
        self.num_envs = n_envs
        self.single_observation_space = spaces.Box(0, 100, (1,), np.float32)
        self.single_action_space = spaces.Discrete(3)
        self.observation_space = batch_space(self.single_observation_space, n_envs)
        self.action_space = batch_space(self.single_action_space, n_envs)
        self.lengths = np.arange(n_envs) + 2
        self.left = self.lengths.copy()
        self.obs, self.rewards = np.zeros((n_envs, 1), np.float32), np.zeros(n_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = self.lengths.copy()
        self.obs[:, 0] = self.left
        return self.obs, {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        is_start = self.left == 0
        assert (actions[~is_start] > 0).all(), "an invalid action"
        self.left = np.where(is_start, self.lengths, self.left - 1)
        self.obs[:, 0] = self.left
        # Not to be trusted in a step that only starts an episode
        self.rewards[:] = np.where(is_start, 7.0, 1.0)
        return self.obs, self.rewards, self.left == 0, np.zeros(self.num_envs, dtype=bool), {}

    def action_masks(self) -> np.ndarray:
        masks = np.ones((self.num_envs, 3), dtype=bool)
        masks[:, 0] = False
        masks[self.left == 0] = False
        return masks


class AnyActionVectorEnv(CountdownVectorEnv):
    """Takes action 0 as action 1."""

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        return super().step(np.maximum(actions, 1))


class RecordingMaskable(RecordingA2C, MaskableEpisodicA2C):
    """Remembers what each update is made of."""


def test_vectorised_masks_and_arrays_that_are_written_to() -> None:
    model = RecordingMaskable("MlpPolicy", CountdownVectorEnv(), seed=0, policy_kwargs=SMALL).learn(300)
    assert len(model.rollouts) > 10
    for rollout in model.rollouts:
        for observations, rewards, *_ in rollout:
            np.testing.assert_array_equal(observations[:, 0], np.arange(len(observations), 0, -1))
            assert (rewards == 1.0).all()
    assert {(info["r"], info["l"]) for info in model.ep_info_buffer} == {(2.0, 2), (3.0, 3), (4.0, 4)}


@pytest.mark.parametrize("spoiled_step", [4, 5])
def test_a_number_that_is_not_finite_is_blamed_on_its_environment(spoiled_step: int) -> None:
    """Environment 2 has episodes of 4 steps: once their last observation is spoiled, once the first of the next."""

    class Spoiled(AnyActionVectorEnv):
        n_steps = 0

        def step(self, actions: np.ndarray) -> Any:
            self.n_steps += 1
            obs, *others = super().step(actions)
            if self.n_steps == spoiled_step:
                obs[2] = np.nan
            return obs, *others

    model = EpisodicA2C("MlpPolicy", Spoiled(), seed=0, policy_kwargs=SMALL)
    with pytest.raises(ValueError, match=r"(?i)environment 2 .* step 0"):
        model.learn(300)


def test_attributes_and_methods() -> None:
    class OneRoom(CountdownVectorEnv):
        def add(self, number: int) -> int:
            return 1 + number

    native = as_vec_env(OneRoom())
    assert native.get_attr("lengths") == [2, 3, 4] and native.get_attr("lengths", 1) == [3]
    assert native.get_attr("num_envs", [0, 2]) == [3, 3]
    assert native.env_method("add", 2) == [3, 3, 3] and native.env_method("add", 2, indices=[1]) == [3]
    np.testing.assert_array_equal(native.env_method("action_masks"), native.env.action_masks())
    native.set_attr("colour", "red")
    assert native.env.colour == "red"
    with pytest.raises(ValueError, match="SyncVectorEnv"):
        native.set_attr("colour", "blue", indices=[0])
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        native.get_attr("missing")
    assert not native.has_attr("missing")

    sync = as_vec_env(make_vector(SCRIPTS, AutoresetMode.NEXT_STEP))
    assert sync.get_attr("env_index") == [0, 1, 2] and sync.get_attr("env_index", [2]) == [2]
    assert sync.env_method("_observation", indices=1)[0][0] == 1
    sync.set_attr("env_index", 5, indices=[1])
    assert sync.get_attr("env_index") == [0, 5, 2]
    assert sync.env_is_wrapped(Monitor) == [True] * 3
    assert sync.env_is_wrapped(gym.wrappers.TimeLimit, indices=0) == [False]
    assert not sync.has_attr("missing")

    class Difficult(VectorWrapper):
        difficulty = 0

        def __init__(self, env: gym.vector.VectorEnv) -> None:
            super().__init__(env)
            self.difficulty = 1

    for wrapped in (as_vec_env(Difficult(OneRoom())), as_vec_env(Difficult(make_vector(SCRIPTS, AutoresetMode.NEXT_STEP)))):
        wrapped.set_attr("difficulty", 5)
        assert wrapped.get_attr("difficulty") == [5, 5, 5] and wrapped.env.difficulty == 5
        with pytest.raises(ValueError, match="for all environments of a Difficult at once"):
            wrapped.set_attr("difficulty", 6, indices=[0])

    processes = as_vec_env(cart_poles(2, "async"))
    try:
        assert processes.get_attr("gravity", 1) == [9.8]
        processes.set_attr("gravity", 1.0)
        assert processes.get_attr("gravity") == [1.0, 1.0]
        # A worker process ends if it is asked for what it lacks
        assert processes.has_attr("gravity") and not processes.has_attr("missing")
        with pytest.raises(AttributeError, match="AsyncVectorEnv have no attribute 'missing'"):
            processes.get_attr("missing")
        model = MaskableEpisodicA2C("MlpPolicy", processes, device="cpu")
        with pytest.raises(ValueError, match="use_masking=False"):
            model.learn(100)
        model.use_masking = False
        assert model.learn(100).num_timesteps == 100
        with pytest.raises(ValueError, match="SyncVectorEnv"):
            processes.env_method("reset", indices=[0])
    finally:
        processes.close()


def test_seeds_options_and_images() -> None:
    env = as_vec_env(cart_poles(2, "sync", render_mode="rgb_array"))
    env.seed(7)
    observations = env.reset()
    np.testing.assert_array_equal(observations[1], gym.make("CartPole-v1").reset(seed=8)[0])
    env.set_options({"low": -0.01, "high": 0.01})
    assert np.abs(env.reset()).max() <= 0.01
    assert env.render().shape == (800, 600, 3)
    env.set_options([{}, {"low": 0.0}])
    with pytest.raises(ValueError, match="options"):
        env.reset()
    env.close()
    env.close()


def test_infos_of_finished_episodes_only_can_be_written_to() -> None:
    env = as_vec_env(CountdownVectorEnv())
    env.reset()
    _, _, _, infos = env.step(np.ones(3, dtype=np.int64))
    assert infos == [{}, {}, {}] and not len(infos.reporting)
    for write in (lambda: infos[0].update(a=1), lambda: infos[0].setdefault("a", 1), lambda: infos[0].__setitem__("a", 1)):
        with pytest.raises(TypeError, match="shared"):
            write()
    _, _, _, infos = env.step(np.ones(3, dtype=np.int64))
    infos[0]["a"] = 1
    assert infos.reporting.tolist() == [0] and "a" not in infos[1]


def without_metadata(env: Any, **metadata: Any) -> Any:
    env.metadata = metadata
    return env


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"autoreset_mode.*None.*set it to one of"):
        EpisodicA2C("MlpPolicy", without_metadata(CountdownVectorEnv()))
    with pytest.raises(ValueError, match=r"autoreset_mode.*'never'"):
        as_vec_env(without_metadata(CountdownVectorEnv(), autoreset_mode="never"))
    with pytest.raises(ValueError, match=r"must be a gymnasium\.vector\.VectorEnv"):
        GymnasiumVecEnv(gym.make("CartPole-v1"))
    assert GymnasiumVecEnv(without_metadata(CountdownVectorEnv()), "NextStep").autoreset_mode == AutoresetMode.NEXT_STEP


@pytest.mark.parametrize(
    ("told", "does", "message"),
    [
        (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, "final_obs"),
        (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, "set `env.metadata"),
    ],
)
def test_an_environment_that_does_not_do_what_it_says_is_found_out(
    told: AutoresetMode, does: AutoresetMode, message: str
) -> None:
    env = without_metadata(make_vector([Script((1,), ("terminated",))], does), autoreset_mode=told)
    with pytest.raises(ValueError, match=message):
        EpisodicA2C("MlpPolicy", env, policy_kwargs=SMALL).learn(20)


def test_an_environment_that_resets_all_of_its_environments_is_found_out() -> None:
    env = without_metadata(CountdownVectorEnv(), autoreset_mode=AutoresetMode.DISABLED)
    vec_env = as_vec_env(env)
    vec_env.reset()
    vec_env.step(np.ones(3, dtype=np.int64))
    with pytest.raises(ValueError, match="reset_mask"):
        vec_env.step(np.ones(3, dtype=np.int64))


def test_infos_that_are_no_dict_and_observations_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="DictInfoToList"):
        as_vec_env(gym.wrappers.vector.DictInfoToList(cart_poles())).reset()
    env = CountdownVectorEnv()
    env.obs = np.zeros((2, 1), np.float32)
    env.lengths = env.lengths[:2]
    with pytest.raises(ValueError, match="num_envs=3"):
        as_vec_env(env).reset()


# ---------------------------------------------------------------------- speed


def n_calls(algorithm: type[EpisodicA2C], n_envs: int) -> int:
    """Calls of Python and C functions in a training step in which no episode ends."""
    env = AnyActionVectorEnv(n_envs)
    env.lengths += 1_000
    model = algorithm("MlpPolicy", env, policy_kwargs=SMALL)
    counts: list[int] = []
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    def on_step(local: dict[str, Any], _: dict[str, Any]) -> bool:
        counts.append(count)
        return True

    callbacks = CallbackList([ConvertCallback(on_step), StopTrainingOnSolved(1e9)])
    sys.setprofile(profile)
    try:
        with pytest.warns(UserWarning, match="No episode ended"):
            model.learn(50 * n_envs, callbacks)
    finally:
        sys.setprofile(None)
    return counts[30] - counts[20]


@pytest.mark.parametrize("algorithm", [EpisodicA2C, MaskableEpisodicA2C])
def test_a_step_in_which_no_episode_ends_costs_no_python_per_environment(algorithm: type[EpisodicA2C]) -> None:
    assert n_calls(algorithm, 100) == n_calls(algorithm, 400)


# ---------------------------------------------------------------------- EnvPool


@pytest.fixture
def make_envpool() -> Callable[..., Any]:
    envpool = pytest.importorskip("envpool")
    return lambda name, n_envs: envpool.make(name, env_type="gymnasium", num_envs=n_envs, num_threads=1, seed=3)


@pytest.mark.filterwarnings("ignore:.*precision lowered:UserWarning")
def test_envpool(make_envpool: Callable[..., Any], tmp_path: Path) -> None:
    model = RecordingA2C("MlpPolicy", make_envpool("CartPole-v1", 5), seed=0, policy_kwargs=SMALL)
    model.learn(1_000, StopTrainingOnSolved(1e9))
    n_steps = [len(rewards) for rollout in model.rollouts for _, rewards, *_ in rollout]
    assert [info["l"] for info in model.ep_info_buffer] == [info["r"] for info in model.ep_info_buffer]
    assert sorted(n_steps)[-1] > 20 and all((rewards == 1).all() for rollout in model.rollouts for _, rewards, *_ in rollout)
    # Each episode and its start are env steps, but for those that run
    assert sum(n_steps) + len(n_steps) <= model.num_timesteps + 5
    with pytest.warns(UserWarning, match="cannot be part of the checkpoint"):
        save_checkpoint(model, tmp_path / "model.zip")
    resumed = load_checkpoint(tmp_path / "model.zip", env=make_envpool("CartPole-v1", 5))
    resumed.learn(200, reset_num_timesteps=False)
    assert evaluate_policy(resumed, as_vec_env(make_envpool("CartPole-v1", 2)), n_eval_episodes=4)[0] > 0


@pytest.mark.filterwarnings("ignore:.*precision lowered:UserWarning")
def test_envpool_continuous_actions_and_time_limits(make_envpool: Callable[..., Any]) -> None:
    model = RecordingA2C("MlpPolicy", make_envpool("Pendulum-v1", 3), seed=0, policy_kwargs=SMALL).learn(3 * 402)
    assert [len(rewards) for rollout in model.rollouts for _, rewards, *_ in rollout] == [200] * 6
    assert all(value != 0.0 for rollout in model.rollouts[1:] for *_, value in rollout)
