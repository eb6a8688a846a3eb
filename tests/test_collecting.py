"""What is collected: no bias towards short episodes, exact sums, time limits, and the budget to the step."""

import itertools
import warnings
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize
from torch import nn

from sb3_episodic_a2c import EpisodicA2C, EpisodicRolloutBuffer, MaskableEpisodicA2C, RecurrentEpisodicA2C
from sb3_episodic_a2c.callbacks import StopTrainingOnSolved
from sb3_episodic_a2c.returns import discounted_returns, standardize
from sb3_episodic_a2c.samples import EpisodicRolloutBufferSamples
from sb3_episodic_a2c.selection import TakeFinished
from tests.envs import arguments_of


class LengthsEnv(gym.Env):
    """Episodes of given lengths, in turn. The observation tells what has been stepped: (environment, episode, step)."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), dtype=np.float64)
    action_space = spaces.Discrete(2)

    def __init__(self, lengths: Any, index: int = 0, is_truncated: bool = False) -> None:
        self.lengths = iter(lengths)
        self.index = index
        self.is_truncated = is_truncated
        self.episode = -1
        self.t = 0

    def _observe(self) -> np.ndarray:
        return np.array([self.index, self.episode, self.t], dtype=np.float64)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        super().reset(**kwargs)
        self.length = next(self.lengths)
        self.episode += 1
        self.t = 0
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        is_over = self.t >= self.length
        reward = float(np.sin(self.index + 10 * self.episode + self.t))
        return self._observe(), reward, is_over and not self.is_truncated, is_over and self.is_truncated, {}


def lengths_env(*lengths_of_envs: Any, **kwargs: Any) -> DummyVecEnv:
    def maker(index: int) -> Any:
        return lambda: Monitor(LengthsEnv(lengths_of_envs[index], index, **kwargs))

    return DummyVecEnv([maker(index) for index in range(len(lengths_of_envs))])


class OneAction(EpisodicA2C):
    """Saves the time of sampling, as the action does not matter."""

    def _sample_actions(self, observations: Any, policy_inputs: Any) -> np.ndarray:
        return np.zeros(self.n_envs, dtype=np.int64)


class Rollouts(BaseCallback):
    """Keeps what each update is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[list[int]] = []
        self.observations: list[np.ndarray] = []
        self.returns: list[np.ndarray] = []
        self.logged: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        self.lengths.append(buffer.episode_lengths.tolist())
        self.observations.append(buffer.observations[:, 0] if buffer.pos else np.zeros((0, 3)))
        self.returns.append(buffer.returns[:, 0].copy())
        self.logged.append(dict(self.model.logger.name_to_value))


# ---------------------------------------------------------------------- no bias towards short episodes


def ten_or_two_hundred(seed: int) -> Any:
    """Equal probability, in shuffled blocks of 100, which needs fewer episodes for the same precision."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.permutation([10] * 50 + [200] * 50).tolist()


class FirstFinished(TakeFinished):
    """The mistake: resets the environments, and takes the episodes that finish first."""

    restarts = True


class FirstFinishedBuffer(EpisodicRolloutBuffer):
    def select(self, rule: type[TakeFinished], n_wanted: int) -> None:
        super().select(FirstFinished, n_wanted)


def mean_length_used(partial_episodes: str, n_envs: int, n_used: int, **arguments: Any) -> float:
    env = lengths_env(*(ten_or_two_hundred(seed) for seed in range(n_envs)))
    model = OneAction(
        "MlpPolicy", env, partial_episodes=partial_episodes, policy_kwargs={"net_arch": []}, device="cpu", seed=0, **arguments
    )
    rollouts = Rollouts()
    # Few env steps are unused with "discard": 2 * 105 covers them
    model.learn(n_used * 105, callback=rollouts)
    lengths = np.concatenate(rollouts.lengths)
    assert set(lengths) == {10, 200}
    return float(lengths.mean())


@pytest.mark.parametrize("partial_episodes", ["carry", "discard"])
@pytest.mark.parametrize("n_envs", [1, 2, 8])
def test_mean_length_of_the_episodes_used_is_unbiased(partial_episodes: str, n_envs: int) -> None:
    assert mean_length_used(partial_episodes, n_envs, n_used=500 * n_envs) == pytest.approx(105, rel=0.03)


@pytest.mark.parametrize("partial_episodes", ["carry", "discard"])
@pytest.mark.parametrize("chunk", [400, 3_000])
def test_many_short_calls_of_learn_are_no_less_unbiased(partial_episodes: str, chunk: int) -> None:
    """The budget of a call cuts long episodes more often than short ones: what it cuts must be used later."""
    env = lengths_env(*(ten_or_two_hundred(seed) for seed in range(8)))
    policy_kwargs = {"net_arch": []}
    model = OneAction("MlpPolicy", env, partial_episodes=partial_episodes, policy_kwargs=policy_kwargs, device="cpu")
    rollouts = Rollouts()
    for _ in range(240_000 // chunk):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model.learn(chunk, callback=rollouts, reset_num_timesteps=False)
    assert np.concatenate(rollouts.lengths).mean() == pytest.approx(105, rel=0.04)
    used = np.concatenate([observations for observations in rollouts.observations if len(observations)])
    assert len(np.unique(used, axis=0)) == len(used)


def test_logged_episodes_are_unbiased_too() -> None:
    """With "discard", unused episodes finish only if they are short."""
    env = lengths_env(*(ten_or_two_hundred(seed) for seed in range(8)))
    model = OneAction("MlpPolicy", env, partial_episodes="discard", stats_window_size=100_000, device="cpu")
    solved = StopTrainingOnSolved(reward_threshold=1e9, n_episodes=100_000)
    model.learn(200_000, callback=solved)
    assert model.ep_info_buffer is not None
    assert np.mean([info["l"] for info in model.ep_info_buffer]) == pytest.approx(105, rel=0.05)
    assert solved.n_episodes_seen == len(model.ep_info_buffer)


def test_taking_the_first_finished_would_be_seen() -> None:
    assert mean_length_used("discard", 8, n_used=1_000, rollout_buffer_class=FirstFinishedBuffer) < 60


# ---------------------------------------------------------------------- carry and discard, step for step


def test_discard_uses_the_first_started_and_then_resets_all() -> None:
    # Started in this order: 0a 1a | 0b (at step 2) | 0c (4): with 4 wanted it is 0c, though 1a is still running
    env = lengths_env([2, 2, 3, 2, 2, 2, 2], [9, 5, 5, 5])
    model = OneAction("MlpPolicy", env, n_episodes=2, partial_episodes="discard", device="cpu")
    rollouts = Rollouts()
    model.learn(2 * 9 + 1, callback=rollouts)
    assert rollouts.lengths[0] == [2, 2, 3, 9]
    # 16 of 18 steps; environment 0 was in its fourth episode
    assert rollouts.logged[0]["rollout/unused_fraction"] == pytest.approx(2 / 18)
    assert rollouts.logged[0]["rollout/n_episodes"] == 4
    assert "rollout/stale_fraction" not in rollouts.logged[0]
    # Environment 0 finished its fourth episode at the same step as environment 1: none was within one
    assert [env.envs[0].unwrapped.episode, env.envs[1].unwrapped.episode] == [4, 1]


def test_discard_resets_the_environments_that_were_in_the_middle() -> None:
    env = lengths_env([3, 50, 3, 50], [5, 50, 5, 50])
    model = OneAction("MlpPolicy", env, partial_episodes="discard", device="cpu")
    rollouts = Rollouts()
    model.learn(2 * 10, callback=rollouts)
    # The episodes of 50 steps were started in between and thrown away by the reset
    assert rollouts.lengths == [[3, 5], [3, 5]]
    episodes = [np.unique(observations[:, :2], axis=0).tolist() for observations in rollouts.observations]
    assert episodes == [[[0, 0], [1, 0]], [[0, 2], [1, 2]]]


def test_carry_keeps_running_episodes_and_throws_nothing_away() -> None:
    env = lengths_env([2] * 100, [7] * 100)
    model = OneAction("MlpPolicy", env, device="cpu")
    rollouts = Rollouts()
    model.learn(2 * 28, callback=rollouts)
    # Environment 0 finishes every 2 steps, environment 1 every 7; both at step 14
    assert rollouts.lengths == [[2, 2], [2, 7], [2, 2], [2, 2, 7]] * 2
    n_used = sum(sum(lengths) for lengths in rollouts.lengths)
    assert n_used == model.num_timesteps == 56
    used = np.concatenate(rollouts.observations)
    assert len(np.unique(used, axis=0)) == 56
    # At step 7, the second update: 4 of environment 1's seven steps came before the update at step 4
    assert rollouts.logged[1]["rollout/stale_fraction"] == pytest.approx(4 / 9)
    assert "rollout/unused_fraction" not in rollouts.logged[1]


def test_learn_again_continues_running_episodes() -> None:
    """In pieces or in one go: the same transitions reach training, none twice, none lost."""
    used = []
    for budgets in ([60], [7, 5, 2, 6, 40]):
        model = OneAction("MlpPolicy", lengths_env([4, 9] * 20, [5] * 40), device="cpu")
        rollouts = Rollouts()
        for number, budget in enumerate(budgets):
            with warnings.catch_warnings():
                # Some of the pieces are too short for an episode to end
                warnings.simplefilter("ignore", UserWarning)
                model.learn(budget, callback=rollouts, reset_num_timesteps=number == 0)
        observations = np.concatenate(rollouts.observations)
        assert len(np.unique(observations, axis=0)) == len(observations)
        used.append((model.num_timesteps, {tuple(observation) for observation in observations}))
    assert used[0][0] == 60
    assert used[1][0] == 62
    assert used[0][1] <= used[1][1]


def test_learn_afresh_forgets_running_episodes() -> None:
    env = lengths_env([10] * 20)
    model = OneAction("MlpPolicy", env, device="cpu")
    rollouts = Rollouts()
    model.learn(15, callback=rollouts)
    model.learn(10, callback=rollouts)
    assert [sum(lengths) for lengths in rollouts.lengths] == [10, 0, 10]
    # Episode 1 was cut by the reset
    assert np.unique(rollouts.observations[2][:, 1]).tolist() == [2]


# ---------------------------------------------------------------------- all of it, against lists


class RecordedEnv(LengthsEnv):
    """Its lengths repeat, and it remembers its actions. Everything else follows from the episode and the step."""

    def __init__(self, lengths: list[int], index: int, is_truncated: bool, is_dict: bool) -> None:
        super().__init__(itertools.cycle(lengths), index, is_truncated)
        self.actions: dict[tuple[int, int], int] = {}
        self.is_dict = is_dict
        if is_dict:
            numbers = spaces.Box(0, 255, (2,), np.uint8)
            self.observation_space = spaces.Dict({"where": LengthsEnv.observation_space, "numbers": numbers})

    def observation(self, episode: int, t: int) -> Any:
        where = np.array([self.index, episode, t], dtype=np.float64)
        return {"where": where, "numbers": np.array([episode, t], np.uint8)} if self.is_dict else where

    def _observe(self) -> Any:
        return self.observation(self.episode, self.t)

    def mask(self, episode: int, t: int) -> list[bool]:
        number = (self.index + episode + t) % 3
        return [number != 0, number != 1]

    def action_masks(self) -> np.ndarray:
        return np.array(self.mask(self.episode, self.t))

    def step(self, action: int) -> Any:
        self.actions[self.episode, self.t] = int(action)
        return super().step(action)


def episodes_of_updates(
    lengths: list[list[int]], n_episodes: int, partial_episodes: str, budgets: list[int]
) -> list[list[tuple[int, int]]]:
    """Which episodes, as (environment, number), each update is to be made of."""
    n_envs = len(lengths)
    n_wanted = n_episodes * n_envs
    updates: list[list[tuple[int, int]]] = []
    complete: list[tuple[int, int]] = []
    episode, t = [0] * n_envs, [0] * n_envs
    # In the order of their starts since the last reset, and how many of them were complete
    rank, n_started, n_used = list(range(n_envs)), n_envs, 0
    for budget in budgets:
        for n_steps in range(n_envs, budget + n_envs, n_envs):
            for index in range(n_envs):
                t[index] += 1
                if t[index] == lengths[index][episode[index] % len(lengths[index])]:
                    if partial_episodes == "carry" or rank[index] < n_wanted:
                        complete.append((index, episode[index]))
                        n_used += 1
                    episode[index], t[index] = episode[index] + 1, 0
                    rank[index], n_started = n_started, n_started + 1
            is_full = len(complete) >= n_wanted if partial_episodes == "carry" else n_used == n_wanted
            if complete and (is_full or n_steps >= budget):
                updates.append(complete)
                complete = []
            if is_full and partial_episodes == "discard":
                if any(t):
                    # All are reset, also those that have not made a step yet
                    episode, t = [number + 1 for number in episode], [0] * n_envs
                rank, n_started, n_used = list(range(n_envs)), n_envs, 0
    return updates


@pytest.mark.parametrize("algorithm", [EpisodicA2C, MaskableEpisodicA2C, RecurrentEpisodicA2C])
@pytest.mark.filterwarnings("ignore:No episode ended")
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=4),
    n_episodes=st.integers(1, 3),
    partial_episodes=st.sampled_from(["carry", "discard"]),
    budgets=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    is_truncated=st.booleans(),
    is_dict=st.booleans(),
    batch_size=st.none() | st.integers(1, 30),
    buffer_size=st.integers(1, 30),
)
def test_training_is_given_what_lists_would_hold(
    algorithm: type[EpisodicA2C],
    lengths: list[list[int]],
    n_episodes: int,
    partial_episodes: Any,
    budgets: list[int],
    is_truncated: bool,
    is_dict: bool,
    batch_size: int | None,
    buffer_size: int,
) -> None:
    """Several calls of ``learn``, the budget of each of which ends anywhere."""
    envs = [RecordedEnv(env_lengths, index, is_truncated, is_dict) for index, env_lengths in enumerate(lengths)]
    policy, policy_kwargs = arguments_of(algorithm, "MultiInputPolicy" if is_dict else "MlpPolicy", {"net_arch": []})
    is_recurrent = algorithm is RecurrentEpisodicA2C
    model = algorithm(
        policy,
        DummyVecEnv([lambda env=env: env for env in envs]),
        # The critic that gave the values at the time limits is still there in the end
        learning_rate=0.0,
        n_episodes=n_episodes,
        gamma=0.9,
        standardize_returns=None,
        # The value depends on what the LSTM has seen
        handle_timeout_termination=not is_recurrent,
        partial_episodes=partial_episodes,
        batch_size=batch_size,
        rollout_buffer_kwargs={"buffer_size": buffer_size},
        policy_kwargs=policy_kwargs,
        device="cpu",
    )
    updates: list[list[EpisodicRolloutBufferSamples]] = []
    evaluate_actions = model._evaluate_actions

    def record(samples: EpisodicRolloutBufferSamples) -> Any:
        if len(updates) == model._n_updates:
            updates.append([])
        # They are views of the buffer
        updates[-1].append(deepcopy(samples))
        return evaluate_actions(samples)

    model._evaluate_actions = record
    for number, budget in enumerate(budgets):
        model.learn(budget, reset_num_timesteps=number == 0)

    used: list[tuple[int, int, int]] = []
    expected_updates = episodes_of_updates(lengths, n_episodes, partial_episodes, budgets)
    for samples, episodes in zip(updates, expected_updates, strict=True):
        transitions: list[tuple[int, int, int]] = []
        returns: list[float] = []
        episode_lengths = [lengths[index][episode % len(lengths[index])] for index, episode in episodes]
        for (index, episode), length in zip(episodes, episode_lengths, strict=True):
            transitions.extend((index, episode, t) for t in range(length))
            tail = 0.0
            if is_truncated and not is_recurrent:
                observation, _ = model.policy.obs_to_tensor(envs[index].observation(episode, length))
                tail = model.policy.predict_values(observation).item()
            episode_returns: list[float] = []
            for t in reversed(range(length)):
                tail = float(np.sin(index + 10 * episode + t + 1)) + 0.9 * tail
                episode_returns.insert(0, tail)
            returns.extend(episode_returns)
        used.extend(transitions)

        if batch_size is None or is_recurrent:
            assert [length for sample in samples for length in sample.episode_lengths] == episode_lengths
        observations = [sample.observations for sample in samples]
        where = [each["where"] if is_dict else each for each in observations]
        assert list(map(tuple, th.cat(where).tolist())) == transitions
        if is_dict:
            numbers = th.cat([each["numbers"] for each in observations]).tolist()
            assert list(map(tuple, numbers)) == [transition[1:] for transition in transitions]
        actions = th.cat([sample.actions for sample in samples]).tolist()
        assert actions == [envs[index].actions[episode, t] for index, episode, t in transitions]
        np.testing.assert_allclose(th.cat([sample.returns for sample in samples]), returns, rtol=1e-4, atol=1e-5)
        if algorithm is MaskableEpisodicA2C:
            masks = th.cat([sample.policy_inputs["action_masks"] for sample in samples]).tolist()
            assert masks == [envs[index].mask(episode, t) for index, episode, t in transitions]

    made = {(env.index, *where) for env in envs for where in env.actions}
    assert len(made) == model.num_timesteps
    # None twice
    assert len(set(used)) == len(used) and made.issuperset(used)
    if partial_episodes == "carry":
        # None lost: what is left belongs to the episodes in flight
        assert made - set(used) == {(env.index, env.episode, t) for env in envs for t in range(env.t)}


# ---------------------------------------------------------------------- returns


@pytest.mark.parametrize("method", ["episode", "rollout", "running", None])
def test_returns_trained_on_are_those_of_the_rewards(method: Any) -> None:
    model = OneAction(
        "MlpPolicy",
        lengths_env([4, 7, 5] * 10, [6] * 30),
        gamma=0.8,
        standardize_returns=method,
        handle_timeout_termination=False,
        device="cpu",
    )
    rollouts = Rollouts()
    model.learn(60, callback=rollouts)
    seen: list[np.ndarray] = []
    for observations, returns, lengths in zip(rollouts.observations, rollouts.returns, rollouts.lengths, strict=True):
        # The observation tells which reward followed
        rewards = np.sin(observations[:, 0] + 10 * observations[:, 1] + observations[:, 2] + 1)
        episodes = [
            discounted_returns(episode.astype(np.float32), 0.8) for episode in np.split(rewards, np.cumsum(lengths)[:-1])
        ]
        raw = np.concatenate(episodes)
        seen.append(raw)
        everything = np.concatenate(seen)
        expected = {
            "episode": np.concatenate([standardize(episode, episode.mean(), episode.std()) for episode in episodes]),
            "rollout": standardize(raw, raw.mean(), raw.std()),
            "running": standardize(raw, everything.mean(), everything.std()),
            None: raw,
        }[method]
        np.testing.assert_allclose(returns, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["running", None])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_time_limit_value_is_the_critics_in_reward_units(method: Any, n_envs: int) -> None:
    env = lengths_env(*[[5] * 100] * n_envs, is_truncated=True)
    model = OneAction("MlpPolicy", env, gamma=0.9, standardize_returns=method, device="cpu", seed=1, learning_rate=0.05)
    observed: list[tuple[np.ndarray, np.ndarray]] = []

    class Check(BaseCallback):
        def _on_rollout_start(self) -> None:
            # The critic and the statistics that this rollout's terminal values come from
            self.statistics = model.return_statistics

        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            buffer = model.rollout_buffer
            for episode in buffer.episodes:
                terminal_observation = np.array([[episode.env_index, buffer.observations[0, 0, 1], 5.0]])
                with th.no_grad():
                    value = model.policy.predict_values(th.as_tensor(terminal_observation)).item()
                if method == "running":
                    # The critic has been put into the units of the new statistics by now, unless it had none before
                    statistics = model.return_statistics if self.statistics.count else self.statistics
                    value = value * (statistics.std + np.finfo(np.float32).eps) + statistics.mean
                observed.append((np.array(episode.terminal_value), np.array(value)))

    model.learn(5 * n_envs * 20, callback=Check())
    assert len(observed) == 20 * n_envs
    actual, expected = np.array(observed).T
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert np.std(actual) > 0.01


def test_no_value_behind_a_termination_or_when_switched_off() -> None:
    for is_truncated, handle_timeout_termination in ((False, True), (True, False)):
        env = lengths_env([5] * 10, is_truncated=is_truncated)
        model = OneAction("MlpPolicy", env, handle_timeout_termination=handle_timeout_termination, device="cpu")
        model.learn(5)
        assert [episode.terminal_value for episode in model.rollout_buffer.episodes] == [0.0]


def test_value_of_a_never_ending_task_cut_by_time_limits() -> None:
    """Reward 1 forever: the value is 1 / (1 - gamma) everywhere, but only if the time limit is no end."""

    class Ones(gym.Env):
        observation_space = spaces.Box(-1, 1, (1,))
        action_space = spaces.Discrete(2)

        def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
            return np.zeros(1, dtype=np.float32), {}

        def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
            return np.zeros(1, dtype=np.float32), 1.0, False, False, {}

    values = {}
    for handle_timeout_termination in (True, False):
        env = gym.wrappers.TimeLimit(Ones(), max_episode_steps=10)
        model = OneAction(
            "MlpPolicy",
            env,
            gamma=0.9,
            handle_timeout_termination=handle_timeout_termination,
            learning_rate=0.03,
            huber_delta=10.0,
            standardize_returns=None,
            device="cpu",
            seed=0,
        )
        model.learn(3_000)
        with th.no_grad():
            values[handle_timeout_termination] = model.policy.predict_values(th.zeros(1, 1)).item()
    assert values[True] == pytest.approx(10.0, rel=0.05)
    # Otherwise the average of (1 - 0.9^k) / 0.1 for k = 1..10
    assert values[False] == pytest.approx(np.mean([(1 - 0.9**k) / 0.1 for k in range(1, 11)]), rel=0.05)


# ---------------------------------------------------------------------- exact sums


class DictEnv(gym.Env):
    observation_space = spaces.Dict(
        {"vector": spaces.Box(-1, 1, (3,)), "image": spaces.Box(0, 255, (36, 36, 1), dtype=np.uint8)}
    )
    action_space = spaces.Box(-1, 1, (2,))

    def reset(self, **kwargs: Any) -> tuple[dict, dict]:
        super().reset(**kwargs)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.t += 1
        return self.observation_space.sample(), float(action.sum()), self.t >= 23, False, {}


@pytest.mark.parametrize("policy, make_env", [("MlpPolicy", lambda: gym.make("CartPole-v1")), ("MultiInputPolicy", DictEnv)])
@pytest.mark.parametrize("detach_advantage", [True, False])
def test_gradients_with_a_batch_size_equal_those_of_one_batch(policy: str, make_env: Any, detach_advantage: bool) -> None:
    gradients = []
    for batch_size in (None, 7, 1, 1_000):
        env = make_env()
        env.observation_space.seed(0)
        model = EpisodicA2C(
            policy,
            env,
            n_episodes=3,
            batch_size=batch_size,
            ent_coef=0.1,
            vf_coef=0.7,
            detach_advantage=detach_advantage,
            seed=0,
            device="cpu",
            policy_kwargs={"net_arch": [16]},
        )
        model.learn(50_000, callback=StopAtFirstUpdate())
        gradients.append([parameter.grad.clone() for parameter in model.policy.parameters() if parameter.grad is not None])
    for batched in gradients[1:]:
        assert len(batched) == len(gradients[0])
        for gradient, whole in zip(batched, gradients[0], strict=True):
            scale = whole.abs().max().item()
            assert scale > 0
            th.testing.assert_close(gradient, whole, rtol=1e-4, atol=1e-5 * scale)


class BatchNormExtractor(FlattenExtractor):
    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space)
        self.flatten = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(self.features_dim))


@pytest.mark.parametrize(
    ("numbers", "batch_size", "policy_kwargs", "expected"),
    [
        (10_000, None, {}, [100, 100, 50]),
        (10_000, 1_000, {}, [100, 100, 50]),
        (10_000, 70, {}, [70, 70, 70, 40]),
        (200, None, {}, [66, 66, 66, 52]),
        (2, 70, {}, [1] * 250),
        # Batch norm depends on the other rows of the batch
        (10_000, None, {"features_extractor_class": BatchNormExtractor}, [250]),
        (10_000, 150, {"features_extractor_class": BatchNormExtractor}, [150, 100]),
    ],
)
def test_passes_on_the_cpu(
    numbers: int, batch_size: int | None, policy_kwargs: dict, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sb3_episodic_a2c.evaluation.CPU_PASS_SIZE", 100)
    monkeypatch.setattr("sb3_episodic_a2c.evaluation.CPU_PASS_NUMBERS", numbers)
    sizes: list[int] = []

    class Recording(EpisodicA2C):
        def _evaluate_actions(self, samples: EpisodicRolloutBufferSamples) -> Any:
            sizes.append(len(samples.actions))
            return super()._evaluate_actions(samples)

    env = LengthsEnv(itertools.repeat(250))
    Recording("MlpPolicy", env, batch_size=batch_size, policy_kwargs=policy_kwargs, device="cpu", seed=0).learn(250)
    assert sizes == expected


class StopAtFirstUpdate(BaseCallback):
    def _on_step(self) -> bool:
        return self.model._n_updates == 0


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("use_sde", [False, True])
def test_the_gradient_is_that_of_the_loss(use_sde: bool, max_grad_norm: float | None) -> None:
    """Every coefficient and its sign, against autograd on the formula of the docstring."""
    model = EpisodicA2C(
        "MlpPolicy",
        "Pendulum-v1",
        standardize_returns="episode",
        handle_timeout_termination=False,
        ent_coef=0.1,
        vf_coef=0.7,
        huber_delta=0.5,
        max_grad_norm=max_grad_norm,
        use_sde=use_sde,
        seed=0,
        device="cpu",
    )
    expected: list[th.Tensor] = []

    class Differentiate(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            buffer = model.rollout_buffer
            returns = th.as_tensor(buffer.returns[:, 0])
            values, log_prob, entropy = model.policy.evaluate_actions(
                th.as_tensor(buffer.observations[:, 0]), th.as_tensor(buffer.actions[:, 0])
            )
            error = (returns - values.flatten()).abs()
            huber = th.where(error <= 0.5, 0.5 * error**2, 0.5 * (error - 0.25))
            advantages = (returns - values.flatten()).detach()
            assert entropy is not None
            loss = -(log_prob * advantages).sum() + 0.7 * huber.sum() - 0.1 * entropy.sum()
            gradients = th.autograd.grad(loss, list(model.policy.parameters()))
            norm = th.sqrt(sum((gradient**2).sum() for gradient in gradients))
            assert norm > 1
            factor = 1.0 if max_grad_norm is None else max_grad_norm / norm
            expected.extend(gradient * factor for gradient in gradients)

    model.learn(200, callback=Differentiate())
    for parameter, gradient in zip(model.policy.parameters(), expected, strict=True):
        assert parameter.grad is not None
        th.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- the budget


@settings(max_examples=25, deadline=None)
@given(
    total=st.integers(1, 120),
    n_envs=st.integers(1, 5),
    n_episodes=st.integers(1, 3),
    partial_episodes=st.sampled_from(["carry", "discard"]),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    more=st.integers(0, 40),
)
def test_learn_stops_at_the_first_step_that_reaches_the_budget(
    total: int, n_envs: int, n_episodes: int, partial_episodes: Any, lengths: list[int], more: int
) -> None:
    env = lengths_env(*[lengths * 200] * n_envs)
    model = OneAction(
        "MlpPolicy",
        env,
        n_episodes=n_episodes,
        partial_episodes=partial_episodes,
        policy_kwargs={"net_arch": []},
        device="cpu",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.learn(total)
        assert total <= model.num_timesteps < total + n_envs
        assert model.num_timesteps % n_envs == 0
        first = model.num_timesteps
        model.learn(more, reset_num_timesteps=False)
    assert first + more <= model.num_timesteps < first + more + n_envs


def test_complete_episodes_get_their_update_when_the_budget_ends() -> None:
    model = OneAction("MlpPolicy", lengths_env([10] * 9, [100] * 9), device="cpu")
    rollouts = Rollouts()
    model.learn(2 * 15, callback=rollouts)
    assert rollouts.lengths == [[10]]
    assert model._n_updates == 1


@pytest.mark.parametrize("n_envs", [1, 4])
def test_evaluation_grids_of_different_seeds_line_up(n_envs: int, tmp_path: Any) -> None:
    grids = []
    for seed in range(3):
        env = make_vec_env("CartPole-v1", n_envs=n_envs, seed=seed)
        callback = EvalCallback(
            make_vec_env("CartPole-v1"),
            n_eval_episodes=1,
            eval_freq=500 // n_envs,
            log_path=str(tmp_path / str(seed)),
            verbose=0,
        )
        EpisodicA2C("MlpPolicy", env, seed=seed, device="cpu").learn(2_000, callback=callback)
        grids.append(np.load(tmp_path / str(seed) / "evaluations.npz")["timesteps"].tolist())
    assert grids == [[500, 1_000, 1_500, 2_000]] * 3


@pytest.mark.parametrize("n_envs", [1, 3])
def test_an_environment_that_never_ends_returns_with_a_warning(n_envs: int) -> None:
    model = OneAction("MlpPolicy", lengths_env(*[[10**9]] * n_envs), device="cpu")
    before = [parameter.clone() for parameter in model.policy.parameters()]
    with pytest.warns(UserWarning, match=r"No episode ended within total_timesteps=500 .*TimeLimit"):
        model.learn(500)
    assert 500 <= model.num_timesteps < 500 + n_envs
    assert model._n_updates == 0
    assert all(th.equal(old, new) for old, new in zip(before, model.policy.parameters(), strict=True))


def test_no_warning_when_a_callback_stops_or_an_episode_ended() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OneAction("MlpPolicy", lengths_env([100] * 9), device="cpu").learn(50, callback=lambda *_: False)
        OneAction("MlpPolicy", lengths_env([100] * 9), device="cpu").learn(100)


# ---------------------------------------------------------------------- vectorised environments


@pytest.mark.parametrize("partial_episodes", ["carry", "discard"])
def test_dummy_and_subprocess_environments_give_the_same_training(partial_episodes: Any) -> None:
    parameters = []
    for vec_env_class in (DummyVecEnv, SubprocVecEnv):
        env: VecEnv = make_vec_env("CartPole-v1", n_envs=2, seed=3, vec_env_cls=vec_env_class)
        env = VecNormalize(env, norm_reward=False)
        model = EpisodicA2C("MlpPolicy", env, partial_episodes=partial_episodes, seed=3, device="cpu").learn(600)
        parameters.append(th.nn.utils.parameters_to_vector(model.policy.parameters()).detach())
        env.close()
    assert th.equal(*parameters)
