"""Returns and their standardisation: fixed numbers, identities, and properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sb3_episodic_a2c.returns import (
    EPSILON,
    ReturnStatistics,
    discounted_returns,
    discounted_returns_of_episodes,
    generalized_advantages,
    standardize,
    standardize_returns,
    unstandardize,
    update_statistics,
)

finite_floats = st.floats(-1e3, 1e3, width=32)
reward_arrays = st.integers(1, 60).flatmap(lambda n: arrays(np.float32, n, elements=finite_floats))


def test_discounted_returns_by_hand() -> None:
    np.testing.assert_allclose(discounted_returns(np.array([1.0, 2.0, 4.0]), 0.5), [3.0, 4.0, 4.0])
    np.testing.assert_allclose(discounted_returns(np.array([1.0, 2.0, 4.0]), 0.5, terminal_value=8.0), [4.0, 6.0, 8.0])


def test_discounted_return_of_a_constant_reward_is_the_geometric_series() -> None:
    # As SB3's tests/test_gae.py: with the value 1/(1-gamma) after a time limit, every return is 1/(1-gamma)
    np.testing.assert_allclose(discounted_returns(np.ones(1_000), 0.99, terminal_value=100.0), 100.0)
    np.testing.assert_allclose(discounted_returns(np.ones(3_000), 0.99)[0], 100.0)


def test_one_step_and_limits_of_gamma() -> None:
    rewards = np.array([1.0, -2.0, 3.0], dtype=np.float32)
    np.testing.assert_array_equal(discounted_returns(rewards[:1], 0.9), [1.0])
    np.testing.assert_array_equal(discounted_returns(rewards, 0.0, terminal_value=7.0), rewards)
    np.testing.assert_array_equal(discounted_returns(rewards, 1.0), rewards[::-1].cumsum()[::-1])


@given(reward_arrays, st.floats(0, 1), finite_floats)
def test_discounted_returns_satisfy_their_recursion(rewards: np.ndarray, gamma: float, terminal_value: float) -> None:
    returns = discounted_returns(rewards, gamma, terminal_value)
    following = np.append(returns[1:], terminal_value)
    assert returns.dtype == np.float64
    np.testing.assert_allclose(returns, rewards + gamma * following, rtol=1e-12, atol=1e-12)


@given(reward_arrays, st.floats(0, 1), st.data())
def test_a_cut_episode_with_the_true_value_behind_it_keeps_its_returns(
    rewards: np.ndarray, gamma: float, data: st.DataObject
) -> None:
    whole = discounted_returns(rewards, gamma)
    cut = data.draw(st.integers(1, len(rewards)))
    value = whole[cut] if cut < len(rewards) else 0.0
    np.testing.assert_allclose(discounted_returns(rewards[:cut], gamma, value), whole[:cut], rtol=1e-12, atol=1e-12)


def test_episode_standardisation_uses_each_episodes_own_population_statistics() -> None:
    returns = np.array([1.0, 3.0, 10.0, 20.0, 60.0])
    targets, _ = standardize_returns(returns, np.array([2, 3]), "episode", ReturnStatistics())
    np.testing.assert_allclose(targets[:2], [-1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(targets[2:], (returns[2:] - 30.0) / (np.sqrt(1400.0 / 3.0) + EPSILON))


def test_rollout_standardisation_uses_all_transitions() -> None:
    returns = np.array([1.0, 3.0, 10.0, 20.0, 60.0])
    targets, statistics = standardize_returns(returns, np.array([2, 3]), "rollout", ReturnStatistics())
    np.testing.assert_allclose(targets, (returns - returns.mean()) / (returns.std() + EPSILON))
    assert statistics.mean == pytest.approx(18.8)
    assert statistics.std == pytest.approx(returns.std())


def test_no_standardisation_leaves_returns_alone() -> None:
    returns = np.array([1.0, 3.0, 10.0])
    targets, statistics = standardize_returns(returns, np.array([3]), None, ReturnStatistics(5.0, 2.0, 9.0))
    np.testing.assert_array_equal(targets, returns)
    assert statistics.mean == pytest.approx(returns.mean())


@pytest.mark.parametrize("method", ["episode", "rollout", "running"])
@pytest.mark.parametrize("reward", [0.1, -7.3, 1e6, 0.0])
def test_constant_returns_standardise_to_zero(method: str, reward: float) -> None:
    """Their standard deviation is 0; a rounding error in the mean would be blown up by 1/EPSILON."""
    returns = discounted_returns(np.full(77, reward, dtype=np.float32), gamma=0.0)
    targets, statistics = standardize_returns(returns, np.array([70, 7]), method, ReturnStatistics())
    np.testing.assert_allclose(targets, 0.0, atol=1e-6)
    targets, _ = standardize_returns(returns[:5], np.array([5]), method, statistics)
    np.testing.assert_allclose(targets, 0.0, atol=1e-6)


@given(st.lists(reward_arrays, min_size=1, max_size=8))
def test_running_statistics_are_those_of_everything_seen(batches: list[np.ndarray]) -> None:
    statistics = ReturnStatistics()
    for batch in batches:
        statistics = update_statistics(statistics, batch.astype(np.float64))
    everything = np.concatenate(batches).astype(np.float64)
    assert statistics.count == len(everything)
    np.testing.assert_allclose(statistics.mean, everything.mean(), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(statistics.variance, everything.var(), rtol=1e-9, atol=1e-6)


def test_running_statistics_forget_at_the_rate_of_their_memory() -> None:
    statistics = update_statistics(ReturnStatistics(), np.zeros(50_000), memory=1_000)
    assert statistics.count == 1_000
    for _ in range(10):
        statistics = update_statistics(statistics, np.ones(100), memory=1_000)
    # Ten times 1000 old against 100 new
    assert statistics.mean == pytest.approx(1 - (1_000 / 1_100) ** 10)
    for _ in range(1_000):
        statistics = update_statistics(statistics, np.ones(100), memory=1_000)
    assert statistics.mean == pytest.approx(1.0)
    assert statistics.variance == pytest.approx(0.0, abs=1e-9)


@given(reward_arrays, finite_floats, st.floats(0.01, 100))
def test_unstandardize_inverts_standardize(values: np.ndarray, mean: float, std: float) -> None:
    np.testing.assert_allclose(unstandardize(standardize(values.astype(float), mean, std), mean, std), values, atol=1e-6)


def test_initial_statistics_leave_an_untrained_critics_value_alone() -> None:
    statistics = ReturnStatistics()
    assert unstandardize(np.array([0.3]), statistics.mean, statistics.std) == pytest.approx([0.3])


@given(st.lists(st.integers(1, 6), min_size=1, max_size=120), st.floats(0, 1), st.integers(0, 10_000))
def test_returns_of_many_episodes_at_once_are_those_of_each_to_the_last_bit(
    lengths: list[int], gamma: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, sum(lengths))).astype(np.float32)
    terminal_values = rng.normal(size=len(lengths))
    cuts = np.cumsum(lengths)[:-1]
    of_all = discounted_returns_of_episodes(rewards, np.array(lengths), gamma, terminal_values)
    advantages = generalized_advantages(rewards, values, gamma, 0.7, terminal_values, np.array(lengths))
    parts = (np.split(array, cuts) for array in (rewards, values, of_all, advantages))
    for index, (some_rewards, some_values, returns, some_advantages) in enumerate(zip(*parts, strict=True)):
        terminal_value = float(terminal_values[index])
        np.testing.assert_array_equal(returns, discounted_returns(some_rewards, gamma, terminal_value))
        expected = generalized_advantages(some_rewards, some_values, gamma, 0.7, terminal_value)
        np.testing.assert_array_equal(some_advantages, expected)
