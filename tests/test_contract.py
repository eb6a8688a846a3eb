"""What users of SB3 expect of an algorithm that replaces A2C: callbacks, logs, saving, loading, seeds."""

import copy
import csv
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from torch import nn

from sb3_episodic_a2c import EpisodicA2C, MaskableEpisodicA2C, RecurrentEpisodicA2C
from tests.envs import (
    ACTION_SPACES,
    NEVER,
    OBSERVATION_SPACES,
    CountingEnv,
    TargetEnv,
    Transition,
    arguments_of,
    policy_for,
    vectorized,
)

ALGORITHMS = [EpisodicA2C, MaskableEpisodicA2C, RecurrentEpisodicA2C]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("algorithm", ALGORITHMS)


def counting(n_envs: int = 1, lengths: tuple[int, ...] = (5,)) -> DummyVecEnv:
    return vectorized(lambda env_index: CountingEnv(lengths, env_index), n_envs)


def make_model(algorithm: type[OnPolicyAlgorithm], env: Any = None, **kwargs: Any) -> Any:
    """A model with a small network."""
    policy_kwargs = {"net_arch": [8], **kwargs.pop("policy_kwargs", {})}
    policy = kwargs.pop("policy", "MlpPolicy")
    if algorithm is MaskableEpisodicA2C and isinstance(getattr(env, "action_space", None), spaces.Box):
        pytest.skip("there are no masks for continuous actions")
    if isinstance(policy, str):
        policy, policy_kwargs = arguments_of(algorithm, policy, policy_kwargs)
    kwargs.setdefault("seed", 0)
    return algorithm(policy, counting() if env is None else env, policy_kwargs=policy_kwargs, device="cpu", **kwargs)


def policy_class(algorithm: type[EpisodicA2C]) -> Any:
    """The class behind ``MlpPolicy``."""
    return algorithm.policy_aliases[arguments_of(algorithm, "MlpPolicy", {})[0]]


def parameters_of(model: Any) -> dict[str, th.Tensor]:
    return {name: parameter.clone() for name, parameter in model.policy.state_dict().items()}


def assert_same_parameters(one: Any, other: Any) -> None:
    """Bit for bit."""
    parameters = [model if isinstance(model, dict) else parameters_of(model) for model in (one, other)]
    assert parameters[0].keys() == parameters[1].keys()
    for name, parameter in parameters[0].items():
        assert th.equal(parameter, parameters[1][name]), name


def have_same_parameters(one: Any, other: Any) -> bool:
    try:
        assert_same_parameters(one, other)
    except AssertionError:
        return False
    return True


# ------------------------------------------------------------------ what callbacks see

LEARN_LOCALS = {
    "self",
    "total_timesteps",
    "callback",
    "log_interval",
    "tb_log_name",
    "reset_num_timesteps",
    "progress_bar",
    "iteration",
}
STEP_LOCALS = {
    "env",
    "rollout_buffer",
    "n_rollout_steps",
    "n_steps",
    "actions",
    "clipped_actions",
    "new_obs",
    "rewards",
    "dones",
    "infos",
}
NOT_COMPUTED_WHILE_COLLECTING = {"values", "log_probs", "obs_tensor"}


class LocalsRecorder(BaseCallback):
    """Names and values that each hook finds."""

    def __init__(self) -> None:
        super().__init__()
        self.hooks: list[str] = []
        self.names: dict[str, set[str]] = {}
        self.steps: list[dict[str, Any]] = []

    def _record(self, hook: str) -> None:
        self.hooks.append(hook)
        names = set(self.locals)
        self.names[hook] = self.names.get(hook, names) & names

    def _on_training_start(self) -> None:
        self._record("training_start")

    def _on_rollout_start(self) -> None:
        self._record("rollout_start")

    def _on_step(self) -> bool:
        self._record("step")
        arrays = {name: np.array(self.locals[name]) for name in ("new_obs", "rewards", "dones")}
        self.steps.append(
            {
                **arrays,
                "num_timesteps": (self.num_timesteps, self.model.num_timesteps),
                "n_calls": self.n_calls,
                "n_steps": self.locals["n_steps"],
                "iteration": self.locals["iteration"],
                "finished_episodes": [info["l"] for info in self.model.ep_info_buffer],
            }
        )
        return True

    def _on_rollout_end(self) -> None:
        self._record("rollout_end")

    def _on_training_end(self) -> None:
        self._record("training_end")


def test_locals_at_each_hook(algorithm):
    recorder = LocalsRecorder()
    make_model(algorithm, counting(2)).learn(20, callback=recorder)
    assert recorder.names["training_start"] >= LEARN_LOCALS
    assert recorder.names["rollout_start"] >= LEARN_LOCALS
    for hook in ("step", "rollout_end", "training_end"):
        assert recorder.names[hook] >= LEARN_LOCALS | STEP_LOCALS
        # Training computes them anyway
        assert not recorder.names[hook] & NOT_COMPUTED_WHILE_COLLECTING
    assert recorder.hooks == [
        "training_start",
        *(["rollout_start", *["step"] * 5, "rollout_end"] * 2),
        "training_end",
    ]


def test_values_of_the_locals(algorithm):
    class Checker(BaseCallback):
        def _on_step(self) -> bool:
            found = self.locals
            assert found["self"] is self.model
            assert found["env"] is self.training_env
            assert found["rollout_buffer"] is self.model.rollout_buffer
            assert found["callback"] is self
            assert found["total_timesteps"] == 22
            assert found["log_interval"] == 7
            assert found["tb_log_name"] == "name"
            assert found["reset_num_timesteps"] is True
            assert found["progress_bar"] is False
            assert found["actions"].shape == found["rewards"].shape == found["dones"].shape == (2,)
            assert found["new_obs"].shape == (2, 3)
            assert len(found["infos"]) == 2
            np.testing.assert_array_equal(found["clipped_actions"], found["actions"])
            # The step is made, and the model has not yet moved on
            np.testing.assert_array_equal(found["new_obs"][:, 2], found["n_steps"] % 5 + 1 - 5 * found["dones"])
            assert (self.model._last_obs[:, 2] == found["n_steps"] % 5).all()
            assert self.model.num_timesteps == self.num_timesteps == 2 * self.n_calls
            return True

    checker = Checker()
    make_model(algorithm, counting(2)).learn(22, callback=checker, log_interval=7, tb_log_name="name")
    assert checker.n_calls == 11


def test_children_share_new_obs(algorithm):
    """As SB3's own test asks, for every kind of callback that has children."""

    class Child(BaseCallback):
        n_compared = 0

        def _on_step(self) -> bool:
            assert self.locals["new_obs"] is top.locals["new_obs"]
            assert self.locals["infos"] is top.locals["infos"]
            self.n_compared += 1
            return True

    class Top(BaseCallback):
        def _on_step(self) -> bool:
            return True

    top = Top()
    children = [Child() for _ in range(4)]
    callbacks = [
        top,
        children[0],
        EveryNTimesteps(2, children[1]),
        CallbackList([children[2]]),
        EvalCallback(counting(), callback_after_eval=children[3], eval_freq=4, n_eval_episodes=1, verbose=0),
    ]
    make_model(algorithm, counting()).learn(12, callback=callbacks)
    assert [child.n_compared for child in children] == [12, 6, 12, 3]


@pytest.mark.parametrize("partial_episodes", ["carry", "discard"])
def test_same_to_callbacks_as_a2c(algorithm, partial_episodes):
    """With episodes as long as A2C's rollouts, callbacks see the same, call for call, and the buffer holds the same."""

    class BufferRecorder(LocalsRecorder):
        def __init__(self) -> None:
            super().__init__()
            self.buffers: list[dict[str, np.ndarray]] = []

        def _on_rollout_end(self) -> None:
            super()._on_rollout_end()
            buffer = self.model.rollout_buffer
            assert buffer.full
            # A2C's is (n_steps, n_envs, ...), here the environments are concatenated
            self.buffers.append(
                {"n_steps": np.array(self.locals["n_steps"])}
                | {
                    name: np.concatenate(np.array(getattr(buffer, name)).swapaxes(0, 1))
                    for name in ("observations", "rewards", "episode_starts")
                }
            )

    recorders = []
    for model in (
        make_model(A2C, counting(3), n_steps=5),
        make_model(algorithm, counting(3), partial_episodes=partial_episodes),
    ):
        recorders.append(BufferRecorder())
        model.learn(45, callback=recorders[-1])
        assert model.num_timesteps == 45
        assert model._n_updates == 3
    a2c, ours = recorders
    assert ours.hooks == a2c.hooks
    for name in ("steps", "buffers"):
        for our_record, a2c_record in zip(getattr(ours, name), getattr(a2c, name), strict=True):
            for key, value in a2c_record.items():
                np.testing.assert_array_equal(our_record[key], value, err_msg=key)
    # The private variables of A2C's loop are not part of the contract
    private = {"idx", "done", "terminal_obs", "terminal_value"}
    for hook, names in a2c.names.items():
        assert ours.names[hook] >= names - NOT_COMPUTED_WHILE_COLLECTING - private, hook


def test_rewards_local_is_before_any_bootstrap(algorithm):
    """At the step and at the end of the rollout: the reward of the environment, without the value after a time limit."""

    class Rewards(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.at_steps: list[float] = []

        def _on_step(self) -> bool:
            self.at_steps.append(self.locals["rewards"][0])
            return True

        def _on_rollout_end(self) -> None:
            assert self.locals["dones"].all()
            assert self.locals["rewards"][0] == self.at_steps[-1]
            assert self.model.rollout_buffer.rewards[:, 0].tolist() == self.at_steps[-5:]

    callback = Rewards()
    make_model(algorithm, vectorized(lambda _: CountingEnv(truncates=True), 1)).learn(10, callback=callback)
    assert callback.at_steps == list(range(1, 11))


def test_rewards_changed_in_place_are_trained_on(algorithm):
    """A2C stores the rewards after ``on_step``, so callbacks can shape them."""

    def shape_reward(locals_: dict[str, Any], _globals: dict[str, Any]) -> bool:
        locals_["rewards"] += 100
        return True

    model = make_model(algorithm).learn(5, callback=shape_reward)
    assert model.rollout_buffer.rewards[:, 0].tolist() == [101, 102, 103, 104, 105]


@pytest.mark.parametrize("standardize_returns", ["running", None])
def test_rollout_buffer_at_rollout_end(algorithm, standardize_returns):
    """Every array of the buffer, against the environments' own records."""

    class Checker(BaseCallback):
        n_rollouts = 0

        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            self.n_rollouts += 1
            buffer = self.model.rollout_buffer
            assert buffer is self.locals["rollout_buffer"]
            n = buffer.pos
            # Even if the budget ended it before an episode did
            assert buffer.full
            assert n == buffer.size() == buffer.episode_lengths.sum()
            assert buffer.observations.shape == (n, 1, 3)
            assert buffer.actions.shape == (n, 1, 1)
            for name in ("rewards", "values", "log_probs", "returns", "advantages", "episode_starts"):
                array = getattr(buffer, name)
                assert array.shape == (n, 1), name
                assert array.dtype == np.float32, name
                assert np.isfinite(array).all(), name
            np.testing.assert_allclose(buffer.advantages, buffer.returns - buffer.values, rtol=1e-6)
            assert (buffer.log_probs < 0).all()
            np.testing.assert_array_equal(buffer.episode_starts[:, 0], buffer.observations[:, 0, 2] == 0)
            if standardize_returns is None:
                is_last = np.append(buffer.episode_starts[1:, 0] == 1, True)[:n]
                np.testing.assert_array_equal(buffer.returns[is_last], buffer.rewards[is_last])
                expected = buffer.rewards[:-1] + 0.99 * buffer.returns[1:]
                np.testing.assert_allclose(buffer.returns[:-1][~is_last[:-1]], expected[~is_last[:-1]], rtol=1e-6)

    checker = Checker()
    env = counting(3, lengths=(2, 5, 7))
    make_model(algorithm, env, standardize_returns=standardize_returns).learn(120, callback=checker)
    assert checker.n_rollouts > 5


# ------------------------------------------------------------------ logs


def read_progress(folder: Path) -> list[dict[str, str]]:
    with open(folder / "progress.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("action", ["discrete", "box"])
@pytest.mark.parametrize("partial_episodes", ["carry", "discard"])
def test_logger_keys(algorithm, partial_episodes, action, tmp_path):
    """A2C's, and those that whole episodes need."""
    model = make_model(algorithm, TargetEnv(action_space=ACTION_SPACES[action]), partial_episodes=partial_episodes)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(20, log_interval=1)
    rows = read_progress(tmp_path)
    fraction = "rollout/stale_fraction" if partial_episodes == "carry" else "rollout/unused_fraction"
    expected = {
        *("time/fps", "time/iterations", "time/time_elapsed", "time/total_timesteps"),
        *("rollout/ep_rew_mean", "rollout/ep_len_mean", "rollout/n_episodes", fraction),
        *("train/policy_loss", "train/value_loss", "train/entropy_loss", "train/explained_variance"),
        *("train/n_updates", "train/learning_rate", "train/return_mean", "train/return_std"),
    }
    assert set(rows[0]) == expected | ({"train/std"} if action == "box" else set())
    assert [int(row["time/total_timesteps"]) for row in rows] == [5, 10, 15, 20]
    assert [int(row["time/iterations"]) for row in rows] == [1, 2, 3, 4]
    # As in SB3, the log is written before the update, so it tells of the update before
    assert [row["train/n_updates"] for row in rows] == ["", "1", "2", "3"]
    assert {row["rollout/ep_len_mean"] for row in rows} == {"5.0"}
    assert {float(row[fraction]) for row in rows} == {0.0}


def test_a2c_logs_nothing_that_we_do_not(algorithm, tmp_path):
    keys = []
    for model in (make_model(A2C), make_model(algorithm)):
        folder = tmp_path / type(model).__name__
        model.set_logger(configure(str(folder), ["csv"]))
        model.learn(20, log_interval=1)
        keys.append(set(read_progress(folder)[0]))
    assert keys[0] <= keys[1]


@pytest.mark.parametrize(("log_interval", "logged_at"), [(1, [5, 10, 15, 20]), (2, [10, 20]), (None, [])])
def test_log_interval(algorithm, log_interval, logged_at, tmp_path):
    model = make_model(algorithm)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(20, log_interval=log_interval)
    assert [int(row["time/total_timesteps"]) for row in read_progress(tmp_path)] == logged_at


def test_success_rate_is_logged(algorithm, tmp_path):
    class SuccessEnv(TargetEnv):
        def step(self, action):
            *step, _ = super().step(action)
            return *step, {"is_success": True}

    model = make_model(algorithm, SuccessEnv())
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(10, log_interval=1)
    assert [row["rollout/success_rate"] for row in read_progress(tmp_path)] == ["1.0", "1.0"]


def test_episode_statistics_that_come_between_episodes(algorithm):
    """A wrapper may play several episodes of the monitored environment as one: A2C counts each as it comes."""

    class Trial(gym.Wrapper):
        def step(self, action):
            observation, reward, terminated, truncated, info = self.env.step(action)
            self.n_steps = getattr(self, "n_steps", 0) + 1
            if terminated:
                observation, _ = self.env.reset()
            return observation, reward, self.n_steps % 15 == 0, truncated, info

    lengths = []
    for cls, kwargs in ((A2C, {"n_steps": 15}), (algorithm, {})):
        model = make_model(cls, DummyVecEnv([lambda: Trial(counting().envs[0])]), **kwargs).learn(30)
        lengths.append([info["l"] for info in model.ep_info_buffer])
    assert lengths == [[5] * 6] * 2


def test_tensorboard(algorithm, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = make_model(algorithm, tensorboard_log=str(tmp_path))
    model.learn(20, log_interval=1)
    model.learn(10, log_interval=1, reset_num_timesteps=False)
    model.learn(10, log_interval=1)
    model.learn(5, log_interval=1, tb_log_name="mine")
    name = algorithm.__name__
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted([f"{name}_1", f"{name}_2", "mine_1"])
    events = EventAccumulator(str(tmp_path / f"{name}_1")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"rollout/ep_rew_mean", "train/policy_loss", "train/learning_rate", "train/return_std", "time/fps"} <= tags
    # As in A2C, what is not worth a curve is left out
    assert not {"train/n_updates", "time/iterations"} & tags
    assert [event.step for event in events.Scalars("rollout/ep_len_mean")] == [5, 10, 15, 20, 25, 30]


def test_default_tb_log_name_is_the_class_name(algorithm):
    recorder = LocalsRecorder()
    make_model(algorithm).learn(5, callback=recorder)
    assert recorder.locals["tb_log_name"] == algorithm.__name__

    class Mine(algorithm):
        pass

    make_model(Mine).learn(5, callback=recorder)
    assert recorder.locals["tb_log_name"] == "Mine"


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_progress_bar(algorithm, capsys):
    model = make_model(algorithm, counting(2)).learn(20, progress_bar=True)
    assert model.num_timesteps == 20
    assert "20/20" in "".join(capsys.readouterr())
    callback = ProgressBarCallback()
    model.learn(10, callback=callback, reset_num_timesteps=False)
    assert callback.pbar.total == callback.pbar.n == 10


# ------------------------------------------------------------------ SB3's callbacks


@pytest.mark.parametrize("n_envs", [1, 3])
def test_stop_training_on_max_episodes(algorithm, n_envs):
    callback = StopTrainingOnMaxEpisodes(max_episodes=2)
    model = make_model(algorithm, counting(n_envs)).learn(1000, callback=callback)
    assert callback.n_episodes == 2 * n_envs
    assert model.num_timesteps == 10 * n_envs
    # A stop does not train, as in A2C
    assert model._n_updates == 1


def test_eval_callback(algorithm, tmp_path):
    """It evaluates on its grid, writes its file, saves the best model, and its threshold stops the training."""
    env = TargetEnv(action_space=ACTION_SPACES["discrete"])
    callback = EvalCallback(
        vectorized(lambda _: TargetEnv(action_space=ACTION_SPACES["discrete"]), 1),
        callback_on_new_best=StopTrainingOnRewardThreshold(5.0),
        eval_freq=50,
        n_eval_episodes=3,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    model = make_model(algorithm, env, seed=0, learning_rate=0.03).learn(5000, callback=callback)
    assert callback.best_mean_reward == 5.0
    assert model.num_timesteps < 5000
    evaluations = np.load(tmp_path / "evaluations.npz")
    assert evaluations["timesteps"].tolist() == list(range(50, model.num_timesteps + 1, 50))
    assert (evaluations["ep_lengths"] == 5).all()
    # It stopped there and then
    assert_same_parameters(algorithm.load(tmp_path / "best_model"), model)


def test_eval_callback_synchronises_vec_normalize(algorithm):
    env, eval_env = (VecNormalize(counting()) for _ in range(2))
    eval_env.training = False
    callback = EvalCallback(eval_env, eval_freq=10, n_eval_episodes=1, verbose=0)
    make_model(algorithm, env).learn(10, callback=callback)
    assert env.obs_rms.count > 10
    assert eval_env.obs_rms.count == env.obs_rms.count
    np.testing.assert_array_equal(eval_env.obs_rms.mean, env.obs_rms.mean)


def test_stop_training_on_no_model_improvement(algorithm):
    class ConstantEnv(TargetEnv):
        def step(self, action):
            observation, _, *rest = super().step(action)
            return observation, 1.0, *rest

    stop = StopTrainingOnNoModelImprovement(max_no_improvement_evals=2)
    callback = EvalCallback(Monitor(ConstantEnv()), callback_after_eval=stop, eval_freq=10, n_eval_episodes=1, verbose=0)
    model = make_model(algorithm, ConstantEnv()).learn(1000, callback=callback)
    # The first evaluation is the best, then three are not better
    assert model.num_timesteps == 40


def test_checkpoint_callback(algorithm, tmp_path):
    """Also within episodes. Each checkpoint is a model that trains on."""
    callback = CheckpointCallback(4, str(tmp_path), save_replay_buffer=True, save_vecnormalize=True)
    make_model(algorithm, VecNormalize(counting(2))).learn(30, callback=callback)
    names = {path.name for path in tmp_path.iterdir()}
    steps = (8, 16, 24)
    assert names == {f"rl_model_{n}_steps.zip" for n in steps} | {f"rl_model_vecnormalize_{n}_steps.pkl" for n in steps}
    env = VecNormalize.load(str(tmp_path / "rl_model_vecnormalize_24_steps.pkl"), counting(2))
    model = algorithm.load(tmp_path / "rl_model_24_steps.zip", env=env)
    assert (model.num_timesteps, model._n_updates) == (24, 2)
    model.learn(10, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates) == (34, 3)


def test_log_every_n_timesteps(algorithm, tmp_path):
    model = make_model(algorithm, counting(3))
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(45, callback=LogEveryNTimesteps(10), log_interval=None)
    # The first multiples of 3 that are at least 10 further
    assert [int(row["time/total_timesteps"]) for row in read_progress(tmp_path)] == [12, 24, 36]


def test_function_callback_stops(algorithm):
    model = make_model(algorithm).learn(100, callback=lambda locals_, _globals: locals_["self"].num_timesteps < 7)
    assert model.num_timesteps == 7
    assert model._n_updates == 1


def test_one_of_a_list_stops(algorithm):
    callbacks = [StopTrainingOnMaxEpisodes(3), EveryNTimesteps(12, StopTrainingOnMaxEpisodes(0))]
    model = make_model(algorithm).learn(100, callback=CallbackList(callbacks))
    assert model.num_timesteps == 12


# ------------------------------------------------------------------ stopping and going on


class StoredTransitions(BaseCallback):
    """All transitions that were available for training, per environment."""

    def __init__(self, env: VecEnv, stop_after: int | None = None) -> None:
        super().__init__()
        self.env = env
        self.stop_after = stop_after
        self.stored: list[list[Transition]] = [[] for _ in range(env.num_envs)]

    def _on_step(self) -> bool:
        return self.n_calls != self.stop_after

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        ends = np.append(buffer.episode_starts[1:, 0], 1.0)[: buffer.pos]
        arrays = (buffer.observations[:, 0], buffer.actions[:, 0, 0], buffer.rewards[:, 0], ends)
        for observation, action, reward, end in zip(*arrays, strict=True):
            transition = Transition(tuple(observation.tolist()), int(action), float(reward), bool(end))
            self.stored[int(observation[0])].append(transition)

    def made(self) -> list[list[Transition]]:
        """What the environments went through, up to the end of the last episode that ended."""
        all_transitions = [env.unwrapped.transitions for env in self.env.envs]
        n_complete = [sum(len(part) for part in _episodes(transitions)) for transitions in all_transitions]
        return [transitions[:n] for transitions, n in zip(all_transitions, n_complete, strict=True)]


def _episodes(transitions: list[Transition]) -> list[list[Transition]]:
    """The complete episodes."""
    ends = [index + 1 for index, transition in enumerate(transitions) if transition.is_over]
    return [transitions[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("stop_after", range(1, 15))
@pytest.mark.parametrize(("n_envs", "partial_episodes"), [(1, "carry"), (3, "carry")])
def test_stop_by_callback_and_go_on_loses_nothing(algorithm, n_envs, partial_episodes, stop_after):
    """Wherever a callback stops, the transitions trained on in the end are those that the environments made."""
    env = counting(n_envs, lengths=(1, 2, 5))
    model = make_model(algorithm, env, partial_episodes=partial_episodes, seed=stop_after)
    callback = StoredTransitions(env, stop_after)
    model.learn(10_000, callback=callback)
    assert model.num_timesteps == stop_after * n_envs
    model.learn(20 * n_envs, callback=callback, reset_num_timesteps=False)
    assert model.num_timesteps == (stop_after + 20) * n_envs
    assert callback.stored == callback.made()
    # Each environment was reset once, and after each of its episodes
    assert [e.unwrapped.n_resets for e in env.envs] == [1 + len(_episodes(e.unwrapped.transitions)) for e in env.envs]


@pytest.mark.parametrize("stop_after", range(1, 15))
@pytest.mark.parametrize("n_envs", [1, 3])
def test_stop_by_callback_and_go_on_when_discarding(algorithm, n_envs, stop_after):
    """Each episode that is trained on was really made, as it was made, and once."""
    env = counting(n_envs, lengths=(1, 2, 5))
    model = make_model(algorithm, env, partial_episodes="discard", seed=stop_after)
    callback = StoredTransitions(env, stop_after)
    model.learn(10_000, callback=callback)
    model.learn(20 * n_envs, callback=callback, reset_num_timesteps=False)
    assert sum(map(len, callback.stored)) > 7 * n_envs
    for stored, made in zip(callback.stored, [e.unwrapped.transitions for e in env.envs], strict=True):
        numbers = [int(transition.reward) for transition in stored]
        assert numbers == sorted(set(numbers))
        assert stored == [made[number - 1] for number in numbers]
        assert sum(map(len, _episodes(stored))) == len(stored)


@pytest.mark.parametrize("partial_episodes", ["carry", "discard"])
def test_stop_at_the_step_that_completes_a_rollout(algorithm, partial_episodes):
    """The next rollout has a step of its own, so that callbacks find their locals at its end, whatever callback it is."""
    model = make_model(algorithm, counting(1, lengths=(3,)), partial_episodes=partial_episodes)
    model.learn(100, callback=StopTrainingOnMaxEpisodes(2))
    seen = []

    class ReadsLocals(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            seen.append(
                [len(self.locals[name]) for name in ("infos", "dones", "rewards", "actions", "clipped_actions", "new_obs")]
            )

    model.learn(10, callback=ReadsLocals(), reset_num_timesteps=False)
    assert len(seen) >= 3
    assert set(map(tuple, seen)) == {(1,) * 6}


@pytest.mark.parametrize("n_envs", [1, 3])
def test_learn_again_continues_the_running_episode(algorithm, n_envs):
    """Many short calls are one long one: the budget may end anywhere in an episode."""
    env = counting(n_envs, lengths=(5, 7))
    model = make_model(algorithm, env)
    callback = StoredTransitions(env)
    with pytest.warns(UserWarning, match="No episode ended"):
        model.learn(3 * n_envs, callback=callback, reset_num_timesteps=False)
    for budget in (8, 9, 7, 10, 18):
        model.learn(budget * n_envs, callback=callback, reset_num_timesteps=False)
    assert model.num_timesteps == 55 * n_envs
    assert [len(e.unwrapped.transitions) for e in env.envs] == [55] * n_envs
    assert callback.stored == callback.made()


@pytest.mark.parametrize("partial_episodes", ["carry", "discard"])
@pytest.mark.filterwarnings("ignore:No episode ended")
def test_learn_in_calls_shorter_than_an_episode(algorithm, partial_episodes):
    """As long as there was no update, an episode in flight is of the current policy: there is no reason to drop it."""
    env = counting(1, lengths=(10,))
    model = make_model(algorithm, env, partial_episodes=partial_episodes)
    callback = StoredTransitions(env)
    for n_calls in range(1, 5):
        model.learn(5, callback=callback, reset_num_timesteps=False)
        assert model._n_updates == n_calls // 2
        if n_calls % 2 == 0:
            assert model.rollout_buffer.selection.fraction(model.rollout_buffer.counts()) == 0
    assert callback.stored == callback.made()
    assert env.envs[0].unwrapped.n_resets == 3


def test_learn_again_starts_afresh(algorithm):
    """With ``reset_num_timesteps=True`` the environments are reset, and the running episode is dropped."""
    env = counting(2, lengths=(5,))
    model = make_model(algorithm, env)
    model.learn(16)
    callback = StoredTransitions(env)
    model.learn(20, callback=callback)
    assert model.num_timesteps == 20
    # 8 steps each were made before, so the rewards go on with 9
    assert [[t.reward for t in stored] for stored in callback.stored] == [list(range(9, 19))] * 2


# ------------------------------------------------------------------ saving and loading


def save_to(model: Any, folder: Path, form: str) -> Any:
    """Save, and return what to load from."""
    if form == "buffer":
        buffer = io.BytesIO()
        model.save(buffer)
        buffer.seek(0)
        return buffer
    if form == "file":
        with open(folder / "model.zip", "wb") as file:
            model.save(file)
        return open(folder / "model.zip", "rb")
    path = {"str": str(folder / "model"), "str with suffix": str(folder / "model.zip"), "pathlib": folder / "model"}[form]
    model.save(path)
    assert (folder / "model.zip").exists()
    return path


def test_a_model_is_saved_where_sb3_looks_for_it(algorithm, tmp_path):
    model = make_model(algorithm, counting(1))
    model.save(f"{tmp_path}/agent/")
    (tmp_path / "agent.zip").chmod(0o660)
    model.save(tmp_path / "agent")
    algorithm.load(f"{tmp_path}/agent/", device="cpu")
    assert (tmp_path / "agent.zip").stat().st_mode & 0o777 == 0o660
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("form", ["str", "str with suffix", "pathlib", "file", "buffer"])
def test_save_and_load(algorithm, form, tmp_path):
    """Parameters, optimizer, counters, arguments and running statistics come back bit for bit."""
    model = make_model(
        algorithm, counting(2), n_episodes=2, gamma=0.9, huber_delta=2.0, detach_advantage=False, ent_coef=0.1, seed=3
    )
    model.learn(47)
    source = save_to(model, tmp_path, form)
    loaded = algorithm.load(source, env=counting(2))
    if isinstance(source, io.IOBase):
        source.close()
    assert_same_parameters(model, loaded)
    for one, other in zip(
        model.policy.optimizer.state_dict()["state"].values(),
        loaded.policy.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        assert all(th.equal(one[name], other[name]) for name in one)
    for name in ("num_timesteps", "_n_updates", "_episode_num", "n_episodes", "gamma", "huber_delta", "detach_advantage"):
        assert getattr(loaded, name) == getattr(model, name), name
    assert (loaded.ent_coef, loaded.seed, loaded.partial_episodes) == (0.1, 3, "carry")
    assert model.return_statistics.count > 0
    assert loaded.return_statistics == model.return_statistics
    assert list(loaded.ep_info_buffer) == list(model.ep_info_buffer)
    observations = counting(2).reset()
    np.testing.assert_array_equal(
        model.predict(observations, deterministic=True)[0], loaded.predict(observations, deterministic=True)[0]
    )


@pytest.mark.parametrize("standardize_returns", ["running", None])
def test_loaded_model_trains_on_as_the_saved_one(algorithm, standardize_returns, tmp_path):
    """From the same random state both end at the same parameters, so nothing that training needs is missing."""
    make_env = lambda: vectorized(lambda _: TargetEnv(truncates=True), 2)  # noqa: E731
    model = make_model(algorithm, make_env(), standardize_returns=standardize_returns, seed=1).learn(30)
    model.save(tmp_path / "model")
    before = parameters_of(model)
    loaded = algorithm.load(tmp_path / "model", env=make_env())
    n_seen = model.return_statistics.count
    for continued in (model, loaded):
        continued.set_random_seed(5)
        continued.learn(30)
    assert not have_same_parameters(before, model)
    assert_same_parameters(model, loaded)
    assert loaded.return_statistics == model.return_statistics
    if standardize_returns == "running":
        assert loaded.return_statistics.count == n_seen + 30


@pytest.mark.parametrize("partial_episodes", ["carry", "discard"])
@pytest.mark.parametrize(("n_before", "n_after"), [(1, 3), (3, 1)])
def test_load_with_another_number_of_environments(algorithm, n_before, n_after, partial_episodes, tmp_path):
    model = make_model(algorithm, counting(n_before), partial_episodes=partial_episodes).learn(12 * n_before)
    model.save(tmp_path / "model")
    env = counting(n_after)
    loaded = algorithm.load(tmp_path / "model", env=env)
    callback = StoredTransitions(env)
    loaded.learn(10 * n_after, callback=callback, reset_num_timesteps=False)
    assert loaded.n_envs == loaded.rollout_buffer.n_envs == n_after
    assert loaded.num_timesteps == 12 * n_before + 10 * n_after
    assert callback.stored == callback.made()
    assert [len(stored) for stored in callback.stored] == [10] * n_after


def test_load_without_environment(algorithm, tmp_path):
    """Good for prediction; an environment can be given later."""
    make_model(algorithm, counting(2)).learn(10).save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model")
    assert loaded.get_env() is None
    assert loaded.predict(counting().reset())[0].shape == (1,)
    loaded.set_env(counting(2))
    loaded.learn(10, reset_num_timesteps=False)
    assert loaded.num_timesteps == 20
    assert loaded._n_updates == 2


def test_load_with_other_arguments(algorithm, tmp_path):
    make_model(algorithm, gamma=0.9).learn(5).save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=counting(), n_episodes=2, learning_rate=0.5)
    assert (loaded.n_episodes, loaded.gamma) == (2, 0.9)
    loaded.learn(10)
    # One before it was saved
    assert loaded._n_updates == 2
    assert loaded.policy.optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="n_episodes"):
        algorithm.load(tmp_path / "model", env=counting(), n_episodes=0)


def test_load_custom_objects(algorithm, tmp_path):
    """What cannot be unpickled any more is replaced, not read: the Zoo does this for schedules."""
    make_model(algorithm, learning_rate=lambda progress: 0.1 * progress).save(tmp_path / "model")
    custom_objects = {"learning_rate": 0.25, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    loaded = algorithm.load(tmp_path / "model", env=counting(), custom_objects=custom_objects)
    assert loaded.learning_rate == 0.25
    loaded.learn(5)
    assert loaded.policy.optimizer.param_groups[0]["lr"] == 0.25


def test_save_exclude_and_include(algorithm, tmp_path):
    model = make_model(algorithm, gamma=0.5).learn(5)
    model.save(tmp_path / "without", exclude=["gamma"])
    assert algorithm.load(tmp_path / "without").gamma == 0.99
    model.save(tmp_path / "with", include=["env"])
    loaded = algorithm.load(tmp_path / "with")
    assert isinstance(loaded.get_env(), VecEnv)
    assert loaded.learn(5).num_timesteps == 5


def test_policy_kwargs_that_differ_at_load(algorithm, tmp_path):
    model = make_model(algorithm)
    model.save(tmp_path / "model")
    algorithm.load(tmp_path / "model", policy_kwargs=model.policy_kwargs)
    with pytest.raises(ValueError, match="policy kwargs do not equal"):
        algorithm.load(tmp_path / "model", policy_kwargs={**model.policy_kwargs, "net_arch": [16]})


def test_no_episode_in_flight_is_saved(algorithm, tmp_path):
    """A save is an ordinary SB3 zip: no environments, no episodes, nothing that grows with training."""
    names, sizes = [], []
    for cls, kwargs in ((A2C, {"use_rms_prop": False}), (algorithm, {})):
        model = make_model(cls, counting(2), **kwargs).learn(40)
        path = tmp_path / f"{cls.__name__}.zip"
        model.save(path)
        sizes.append(path.stat().st_size)
        with zipfile.ZipFile(path) as file:
            names.append((set(file.namelist()), set(json.loads(file.read("data")))))
    (a2c_files, a2c_names), (our_files, our_names) = names
    assert our_files == a2c_files
    assert our_names - a2c_names - {"use_masking", "_n_choices"} == {
        *("n_episodes", "standardize_returns", "handle_timeout_termination", "partial_episodes"),
        *("huber_delta", "detach_advantage", "batch_size", "actor", "return_statistics", "n_value_epochs"),
        *("value_learning_rate", "noise_resample_prob"),
    }
    assert a2c_names - our_names == {"normalize_advantage"}
    # An LSTM has many parameters
    assert sizes[1] < 1.2 * sizes[0] or algorithm is RecurrentEpisodicA2C
    model.set_env(counting(2, lengths=(NEVER,)))
    with pytest.warns(UserWarning, match="TimeLimit"):
        model.learn(2000, reset_num_timesteps=False)
    model.save(path)
    assert path.stat().st_size < sizes[1] + 1000


def test_get_and_set_parameters(algorithm):
    model, other = (make_model(algorithm, seed=seed) for seed in (0, 1))
    model.learn(10)
    assert set(model.get_parameters()) == {"policy", "policy.optimizer"}
    assert not have_same_parameters(model, other)
    other.set_parameters(copy.deepcopy(model.get_parameters()))
    assert_same_parameters(model, other)
    observations = counting().reset()
    np.testing.assert_array_equal(
        model.predict(observations, deterministic=True)[0], other.predict(observations, deterministic=True)[0]
    )
    # The actor also samples from the new parameters
    with th.no_grad():
        other.set_parameters({"policy": {"action_net.bias": th.tensor([-100.0, 100.0])}}, exact_match=False)
    actions: list[int] = []
    other.learn(5, callback=lambda locals_, _: actions.extend(locals_["actions"]) or True)
    assert actions == [1] * 5


def test_set_parameters_exact_match(algorithm, tmp_path):
    model = make_model(algorithm)
    parameters = copy.deepcopy(model.get_parameters())
    optimizer = parameters.pop("policy.optimizer")
    with pytest.raises(ValueError, match="Names of parameters do not match"):
        model.set_parameters(parameters)
    model.set_parameters(parameters, exact_match=False)
    del parameters["policy"]["value_net.bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.set_parameters({**parameters, "policy.optimizer": optimizer})
    model.set_parameters(parameters, exact_match=False)
    with pytest.raises(ValueError, match="invalid object name"):
        model.set_parameters({"nobody": {}}, exact_match=False)
    other = make_model(algorithm, seed=7)
    other.save(tmp_path / "other")
    model.set_parameters(str(tmp_path / "other"))
    assert_same_parameters(model, other)


@pytest.mark.parametrize("policy", ["MlpPolicy", "SharedMlpPolicy"])
def test_save_and_load_of_the_policy_alone(algorithm, policy, tmp_path):
    if policy == "SharedMlpPolicy" and policy not in algorithm.policy_aliases:
        pytest.skip("sb3-contrib's policies have no such network")
    # sb3-contrib's policy does not remember the arguments of its LSTM: only the default's loads
    policy_kwargs = {"lstm_hidden_size": 256} if algorithm is RecurrentEpisodicA2C else {}
    model = make_model(algorithm, policy=policy, policy_kwargs=policy_kwargs).learn(10)
    model.policy.save(tmp_path / "policy")
    loaded = type(model.policy).load(tmp_path / "policy")
    assert type(loaded) is type(model.policy)
    for name, parameter in model.policy.state_dict().items():
        assert th.equal(parameter, loaded.state_dict()[name]), name
    observations = counting(4).reset()
    np.testing.assert_array_equal(
        model.predict(observations, deterministic=True)[0], loaded.predict(observations, deterministic=True)[0]
    )


def test_a_policy_put_in_the_place_of_another_is_the_one_that_acts(algorithm):
    """A2C looks at ``model.policy`` at each step; users assign, say, one trained by imitation."""
    model = make_model(algorithm, seed=0)
    model.learn(5)
    other = make_model(algorithm, seed=1)
    with th.no_grad():
        other.policy.action_net.bias.copy_(th.tensor([-100.0, 100.0]))
    model.policy = other.policy
    actions: list[int] = []
    model.learn(5, callback=lambda locals_, _: actions.extend(locals_["actions"]) or True)
    assert actions == [1] * 5


@pytest.mark.parametrize("library", [pickle, cloudpickle])
def test_model_pickles(algorithm, library):
    """The whole model, its environments included, as SB3's own: it predicts the same, and learns on by itself."""
    model = make_model(algorithm, counting(2)).learn(23)
    other = pickle.loads(library.dumps(model))
    observations = counting(4).reset()
    np.testing.assert_array_equal(*(each.predict(observations, deterministic=True)[0] for each in (model, other)))
    before = parameters_of(model)
    other.learn(20, reset_num_timesteps=False)
    assert (model.num_timesteps, other.num_timesteps) == (24, 44)
    assert_same_parameters(model, before)
    assert not have_same_parameters(other, before)


def test_buffer_pickles(algorithm):
    model = make_model(algorithm, counting(2)).learn(23)
    buffer = cloudpickle.loads(cloudpickle.dumps(model.rollout_buffer))
    for name in ("observations", "actions", "rewards", "returns", "values", "log_probs", "episode_starts"):
        np.testing.assert_array_equal(getattr(buffer, name), getattr(model.rollout_buffer, name))


# ------------------------------------------------------------------ environments


@pytest.mark.parametrize("form", ["string", "environment", "vectorized"])
def test_environment_in_any_form(algorithm, form):
    env = {
        "string": "CartPole-v1",
        "environment": gym.make("CartPole-v1"),
        "vectorized": DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2),
    }[form]
    # CartPole has no masks
    kwargs = {"use_masking": False} if algorithm is MaskableEpisodicA2C else {}
    model = make_model(algorithm, env, **kwargs).learn(200)
    assert isinstance(model.get_env(), VecEnv)
    assert model.n_envs == (2 if form == "vectorized" else 1)
    # SB3 puts a Monitor around single environments only
    assert bool(model.ep_info_buffer) == (form != "vectorized")


def test_set_env(algorithm):
    """The new environment is reset, and the old one's episode in flight does not leak into its first."""
    old, new = counting(2), counting(2)
    model = make_model(algorithm, old).learn(14)
    model.set_env(new)
    callback = StoredTransitions(new)
    model.learn(20, callback=callback, reset_num_timesteps=False)
    assert callback.stored == callback.made()
    assert [len(stored) for stored in callback.stored] == [10, 10]
    assert [len(env.unwrapped.transitions) for env in old.envs] == [7, 7]


def test_set_env_refuses_as_a2c_does(algorithm):
    for cls in (A2C, algorithm):
        model = make_model(cls, counting(2))
        with pytest.raises(AssertionError, match="number of environments"):
            model.set_env(counting(3))
        for env in (
            TargetEnv(OBSERVATION_SPACES["discrete"], CountingEnv.action_space),
            TargetEnv(CountingEnv.observation_space, ACTION_SPACES["box"]),
        ):
            with pytest.raises(ValueError, match="spaces do not match"):
                model.set_env(vectorized(lambda _, env=env: copy.deepcopy(env), 2))


def test_load_refuses_other_spaces(algorithm, tmp_path):
    make_model(algorithm).save(tmp_path / "model")
    with pytest.raises(ValueError, match="spaces do not match"):
        algorithm.load(tmp_path / "model", env=TargetEnv())


def test_evaluate_policy(algorithm):
    model = make_model(algorithm, seed=0)
    rewards, lengths = evaluate_policy(model, counting(2), n_eval_episodes=4, return_episode_rewards=True)
    assert sorted(rewards) == [15, 15, 40, 40]
    assert lengths == [5] * 4


# ------------------------------------------------------------------ seeds


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"partial_episodes": "discard"}, {"standardize_returns": "episode", "handle_timeout_termination": False}],
    ids=["carry", "discard", "episode"],
)
@pytest.mark.parametrize("action", ["discrete", "box"])
def test_seeds(algorithm, action, kwargs):
    """The same seed gives the same run bit for bit, another one another."""

    def train(seed: int) -> Any:
        env = vectorized(lambda _: TargetEnv(action_space=ACTION_SPACES[action], truncates=True), 2)
        return make_model(algorithm, env, seed=seed, **kwargs).learn(60)

    first, again, other = train(0), train(0), train(1)
    assert_same_parameters(first, again)
    assert list(first.ep_info_buffer)[-1]["r"] == list(again.ep_info_buffer)[-1]["r"]
    assert first.return_statistics == again.return_statistics
    assert not have_same_parameters(first, other)


def test_callbacks_that_read_change_nothing(algorithm):
    """Values and log-probabilities are computed when a callback reads them, which must not change the training."""

    class Reader(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            assert self.model.rollout_buffer.values.size
            assert self.model.rollout_buffer.advantages.size

    with_reader, without = (
        make_model(algorithm, TargetEnv(), seed=0).learn(40, callback=callback) for callback in (Reader(), None)
    )
    assert_same_parameters(with_reader, without)


# ------------------------------------------------------------------ networks and optimizers


class ModalExtractor(BaseFeaturesExtractor):
    """Behaves differently in training, and remembers how it was used."""

    def __init__(self, observation_space: spaces.Box, features_dim: int = 8) -> None:
        super().__init__(observation_space, features_dim)
        self.net = nn.Sequential(nn.Linear(3, features_dim), nn.BatchNorm1d(features_dim), nn.Dropout(0.5))
        self.modes: list[bool] = []

    def forward(self, observations: th.Tensor) -> th.Tensor:
        self.modes.append(self.training)
        return self.net(observations)


def test_train_and_eval_mode(algorithm):
    """Dropout and batch norm act in the update, and only there; reading the buffer is no update."""

    class ModeChecker(BaseCallback):
        def _on_rollout_start(self) -> None:
            self.extractor = self.model.policy.features_extractor
            self.extractor.modes.clear()
            self.n_tracked = self.extractor.net[1].num_batches_tracked.item()
            self.running_mean = self.extractor.net[1].running_mean.clone()

        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            assert self.model.rollout_buffer.log_probs.size
            assert len(self.extractor.modes) >= 5
            assert not any(self.extractor.modes)
            assert self.extractor.net[1].num_batches_tracked == self.n_tracked == self.model._n_updates
            assert th.equal(self.extractor.net[1].running_mean, self.running_mean)
            self.extractor.modes.clear()

    # Truncated, so that the value of the last observation is needed as well
    env = vectorized(lambda _: TargetEnv(truncates=True), 2)
    model = make_model(algorithm, env, policy_kwargs={"features_extractor_class": ModalExtractor})
    model.learn(40, callback=ModeChecker())
    extractor = model.policy.features_extractor
    assert extractor.modes == [True]
    assert extractor.net[1].num_batches_tracked == model._n_updates == 4
    # SB3's predict switches back
    observations = env.reset()
    values = [model.predict(observations, deterministic=True)[0] for _ in range(5)]
    assert all((value == values[0]).all() for value in values)
    assert not any(extractor.modes[1:])


def test_custom_policy_and_features_extractor(algorithm, tmp_path):
    class MyPolicy(policy_class(algorithm)):
        pass

    policy_kwargs = {"features_extractor_class": ModalExtractor, "features_extractor_kwargs": {"features_dim": 5}}
    model = make_model(algorithm, TargetEnv(), policy=MyPolicy, policy_kwargs=policy_kwargs).learn(10)
    assert type(model.policy) is MyPolicy
    assert model.policy.features_dim == 5
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model")
    assert type(loaded.policy).__name__ == "MyPolicy"
    assert_same_parameters(model, loaded)


def test_default_optimizer_is_adam(algorithm):
    assert type(make_model(algorithm).policy.optimizer) is th.optim.Adam


def test_custom_optimizer(algorithm, tmp_path):
    policy_kwargs = {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.5}}
    model = make_model(algorithm, learning_rate=0.125, policy_kwargs=policy_kwargs)
    model.learn(10)
    optimizer = model.policy.optimizer
    assert type(optimizer) is th.optim.SGD
    assert optimizer.param_groups[0]["momentum"] == 0.5
    assert optimizer.param_groups[0]["lr"] == 0.125
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model")
    assert type(loaded.policy.optimizer) is th.optim.SGD
    for one, other in zip(optimizer.state.values(), loaded.policy.optimizer.state.values(), strict=True):
        assert th.equal(one["momentum_buffer"], other["momentum_buffer"])


def test_learning_rate_schedule(algorithm):
    """Each update uses the rate of the progress made when its episodes were complete, as in A2C."""
    rates: list[float] = []

    class Rates(BaseCallback):
        def _on_rollout_start(self) -> None:
            rates.append(self.model.policy.optimizer.param_groups[0]["lr"])

        def _on_step(self) -> bool:
            return True

    model = make_model(algorithm, learning_rate=lambda progress: 0.5 * progress)
    model.learn(20, callback=Rates())
    assert rates == pytest.approx([0.5, 0.375, 0.25, 0.125])
    assert model.policy.optimizer.param_groups[0]["lr"] == 0.0
    assert model.logger.name_to_value["train/learning_rate"] == 0.0


def test_progress_remaining_never_falls_below_zero(algorithm):
    """The last step of several environments goes beyond the budget, and, say, a square root fails below 0."""
    progress: list[float] = []

    def learning_rate(progress_remaining: float) -> float:
        progress.append(progress_remaining)
        return 0.1 * progress_remaining**0.5

    model = make_model(algorithm, counting(3), learning_rate=learning_rate).learn(13)
    assert (model.num_timesteps, model._n_updates) == (15, 1)
    assert progress[-1] == min(progress) == 0.0


@pytest.mark.parametrize("observation", ["box", "image", "dict"])
@pytest.mark.parametrize("use_sde", [False, True])
def test_policy_kwargs_are_never_written_to(algorithm, observation, use_sde, tmp_path):
    """A2C writes its optimizer into the caller's dict, and the next algorithm given it then uses RMSprop."""
    has_masks = algorithm is MaskableEpisodicA2C
    if use_sde and has_masks:
        pytest.skip("there is no gSDE for discrete actions")
    env = TargetEnv(OBSERVATION_SPACES[observation], ACTION_SPACES["discrete" if has_masks else "box"])
    policy_kwargs: dict[str, Any] = {
        "net_arch": {"pi": [4], "vf": [4]},
        "optimizer_kwargs": {"eps": 1e-7},
        "features_extractor_kwargs": {"box": {}, "image": {"features_dim": 4}, "dict": {"cnn_output_dim": 4}}[observation],
    }
    policy, policy_kwargs = arguments_of(algorithm, policy_for(env.observation_space), policy_kwargs)
    expected = copy.deepcopy(policy_kwargs)
    model = algorithm(policy, env, policy_kwargs=policy_kwargs, use_sde=use_sde)
    model.learn(5).save(tmp_path / "model")
    assert policy_kwargs == expected
    algorithm.load(tmp_path / "model", env=env, policy_kwargs=policy_kwargs).learn(5)
    assert policy_kwargs == expected


def test_policy_kwargs_are_not_shared_with_the_policy(algorithm):
    """Not even a policy that writes into what it is given reaches the caller's dict."""

    class WritingPolicy(policy_class(algorithm)):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["optimizer_kwargs"]["eps"] = 1.0
            super().__init__(*args, **kwargs)

    policy_kwargs: dict[str, Any] = {"optimizer_kwargs": {"eps": 1e-7}}
    model = algorithm(WritingPolicy, counting(), policy_kwargs=policy_kwargs)
    assert model.policy.optimizer.param_groups[0]["eps"] == 1.0
    assert policy_kwargs == {"optimizer_kwargs": {"eps": 1e-7}}


class OnnxablePolicy(nn.Module):
    """What SB3's documentation exports; for an LSTM with its states, within an episode."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observation: th.Tensor, *states: th.Tensor) -> tuple[th.Tensor, ...]:
        if not states:
            return self.policy(observation, deterministic=True)
        lstm_states = RNNStates((states[0], states[1]), (states[2], states[3]))
        *results, new_states = self.policy(observation, lstm_states, th.zeros(len(observation)), deterministic=True)
        return (*results, *new_states.pi, *new_states.vf)


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:Exporting a model to ONNX with a batch_size:UserWarning"
)
@pytest.mark.parametrize("action", ["discrete", "box"])
def test_onnx_export(algorithm, action, tmp_path):
    """The recipe of SB3's documentation, with the older exporter: the newer exporter fails on SB3's policies."""
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = make_model(algorithm, TargetEnv(action_space=ACTION_SPACES[action])).learn(10)
    inputs = {"input": th.tensor([[0.1, -0.2, 0.3]])}
    if algorithm is RecurrentEpisodicA2C:
        lstm = model.policy.lstm_actor
        names = ("pi_hidden", "pi_cell", "vf_hidden", "vf_cell")
        inputs |= {name: th.rand(lstm.num_layers, 1, lstm.hidden_size) for name in names}
    path = str(tmp_path / "model.onnx")
    policy = OnnxablePolicy(model.policy)
    th.onnx.export(policy, tuple(inputs.values()), path, input_names=list(inputs), dynamo=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    # Other numbers than those that it was traced with
    inputs = {name: tensor + 0.25 for name, tensor in inputs.items()}
    results = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with th.no_grad():
        expected = policy(*inputs.values())
    for result, tensor in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, tensor.numpy(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ small things that users rely on


def test_chaining_and_attributes(algorithm):
    """``learn`` returns the model; attributes that callbacks of SB3, of the Zoo and of W&B look at are as they expect."""
    model = make_model(algorithm)
    assert model.learn(5) is model
    assert not hasattr(model, "replay_buffer")
    assert isinstance(model, OnPolicyAlgorithm)
    # W&B makes a string of each attribute
    assert all(len(str(value)) < 10_000 for value in vars(model).values())
