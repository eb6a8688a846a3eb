"""The rollout buffer against a list of lists: transition for transition, return for return."""

import pickle

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_episodic_a2c import EpisodicRolloutBuffer
from sb3_episodic_a2c.returns import discounted_returns
from sb3_episodic_a2c.selection import PARTIAL_EPISODES, TakeFinished, TakeStarted

BOX = spaces.Box(-1e9, 1e9, (2,), dtype=np.float32)
DICT = spaces.Dict({"position": BOX, "image": spaces.Box(0, 255, (1, 3, 3), dtype=np.uint8), "mode": spaces.Discrete(7)})


class World:
    """Environments with given episode lengths; every observation names its environment and time."""

    def __init__(self, episode_lengths: list[list[int]], is_dict: bool) -> None:
        self.episode_lengths = episode_lengths
        self.n_envs = len(episode_lengths)
        self.is_dict = is_dict
        self.t = 0
        self.age = np.zeros(self.n_envs, dtype=int)
        self.episode = np.zeros(self.n_envs, dtype=int)

    def observe(self) -> np.ndarray | dict[str, np.ndarray]:
        position = np.stack([np.arange(self.n_envs), np.full(self.n_envs, self.t)], axis=1).astype(np.float32)
        if not self.is_dict:
            return position
        image = np.full((self.n_envs, 1, 3, 3), self.t % 256, dtype=np.uint8)
        return {"position": position, "image": image, "mode": (np.arange(self.n_envs) + self.t) % 7}

    def step(self) -> np.ndarray:
        """Returns ``dones``."""
        self.t += 1
        self.age += 1
        lengths = np.array(
            [lengths[episode % len(lengths)] for lengths, episode in zip(self.episode_lengths, self.episode, strict=True)]
        )
        dones = self.age == lengths
        self.age[dones] = 0
        self.episode[dones] += 1
        return dones


episode_lengths = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    lengths=episode_lengths,
    copies=st.sampled_from([1, 1, 32]),  # returns of many episodes are computed a step of all at once
    is_dict=st.booleans(),
    n_wanted=st.integers(1, 6),
    n_rollouts=st.integers(1, 8),
    max_rows=st.integers(1, 60),
    buffer_size=st.integers(1, 20),
    batch_size=st.none() | st.integers(1, 30),
    discard=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_buffer_equals_a_brute_force_reference(
    lengths: list[list[int]],
    copies: int,
    is_dict: bool,
    n_wanted: int,
    n_rollouts: int,
    max_rows: int,
    buffer_size: int,
    batch_size: int | None,
    discard: bool,
    seed: int,
) -> None:
    """``max_rows`` cuts rollouts short, as the budget of ``learn`` does."""
    rng = np.random.default_rng(seed)
    world = World(lengths * copies, is_dict)
    n_envs = world.n_envs
    n_wanted = max(n_wanted, n_envs)
    space = DICT if is_dict else BOX
    buffer = EpisodicRolloutBuffer(buffer_size, space, spaces.Discrete(1_000), device="cpu", n_envs=n_envs)
    buffer.select(PARTIAL_EPISODES["discard" if discard else "carry"], n_wanted)
    running: list[list[tuple]] = [[] for _ in range(n_envs)]
    started = list(range(n_envs))  # what episode, in order of starts, each environment is in
    times_used: dict[tuple, int] = {}
    n_collected = n_offered = 0

    for _ in range(n_rollouts):
        if discard:
            buffer.reset()
            world.age[:] = 0
            running = [[] for _ in range(n_envs)]
            started, n_started = list(range(n_envs)), n_envs
        buffer.start_rollout()
        reference: list[tuple[list[tuple], float]] = []
        rows = 0
        while len(reference) < n_wanted and rows < max_rows:
            rows += 1
            observations = world.observe()
            actions = rng.integers(0, 1_000, n_envs)
            rewards = rng.normal(size=n_envs).astype(np.float32)
            masks = rng.random((n_envs, 3)) < 0.5
            time = world.t
            for index in range(n_envs):
                running[index].append((index, time, actions[index], rewards[index], tuple(masks[index])))
            dones = world.step()
            buffer.add(observations, actions, rewards, {"action_masks": masks})
            env_indices = np.flatnonzero(dones)
            values = rng.normal(size=len(env_indices))
            buffer.close_episodes(env_indices, values)
            for index, value in zip(env_indices, values, strict=True):
                if not discard or started[index] < n_wanted:
                    reference.append((running[index], value))
                running[index] = []
                if discard:
                    started[index] = n_started
                    n_started += 1
            n_collected += n_envs

        assert buffer.n_episodes == len(reference)
        returns = buffer.compute_returns(0.9)
        expected = [discounted_returns(np.array([step[3] for step in steps]), 0.9, value) for steps, value in reference]
        np.testing.assert_allclose(returns, np.concatenate(expected) if expected else np.zeros(0), rtol=1e-6)
        buffer.finish_rollout(returns)

        transitions = [step for steps, _ in reference for step in steps]
        assert buffer.full
        assert buffer.size() == buffer.pos == len(transitions)
        n_offered += len(transitions)
        samples = list(buffer.get(batch_size))
        assert [length for steps, _ in reference for length in [len(steps)]] == buffer.episode_lengths.tolist()
        assert sum(sum(sample.episode_lengths) for sample in samples) == len(transitions)
        seen = [len(steps) and (not discard or order < n_wanted) for steps, order in zip(running, started, strict=True)]
        heads = list(buffer.get_running(batch_size))
        assert [index for head in heads for index in head.env_indices] == np.flatnonzero(seen).tolist()
        expected_heads = [[step[:2] for step in running[index]] for index in np.flatnonzero(seen)]
        positions = [head.observations["position"] if is_dict else head.observations for head in heads]
        assert [tuple(p) for p in th.cat([*positions, th.zeros(0, 2)]).tolist()] == [p for h in expected_heads for p in h]
        assert [length for head in heads for length in head.episode_lengths] == [len(head) for head in expected_heads]
        for size, longest in ((int(head.episode_lengths.sum()), int(head.episode_lengths.max())) for head in heads):
            # More only for one that is longer, and for single steps, which go with their neighbours
            assert batch_size is None or size <= batch_size + 1 or size <= longest + 2
        if not transitions:
            assert samples == []
            continue
        if batch_size is not None:
            *full, second_last, last = [batch_size, *(len(sample.actions) for sample in samples)]
            assert all(size == batch_size for size in full) and batch_size - 1 <= second_last <= batch_size
            # No single transition, where another cut is possible
            assert last == len(transitions) or (1 if batch_size <= 2 else 2) <= last <= batch_size
        positions = th.cat([s.observations["position"] if is_dict else s.observations for s in samples]).numpy()
        np.testing.assert_array_equal(positions, np.array([step[:2] for step in transitions], dtype=np.float32))
        if is_dict:
            images = th.cat([s.observations["image"] for s in samples])
            assert images.dtype == th.uint8
            assert images[:, 0, 1, 1].tolist() == [step[1] % 256 for step in transitions]
            modes = th.cat([s.observations["mode"] for s in samples])
            assert modes.shape == (len(transitions), 1)
            assert modes[:, 0].tolist() == [(step[0] + step[1]) % 7 for step in transitions]
        assert th.cat([s.actions for s in samples]).tolist() == [step[2] for step in transitions]
        sampled_masks = th.cat([s.policy_inputs["action_masks"] for s in samples])
        assert sampled_masks.tolist() == [list(step[4]) for step in transitions]
        np.testing.assert_allclose(th.cat([s.returns for s in samples]).numpy(), returns, rtol=1e-6)
        # ... and as SB3's buffer reads
        np.testing.assert_array_equal(buffer.rewards[:, 0], [step[3] for step in transitions])
        starts = np.concatenate([[1.0] + [0.0] * (len(steps) - 1) for steps, _ in reference])
        np.testing.assert_array_equal(buffer.episode_starts[:, 0], starts)

        for step in transitions:
            times_used[step[:2]] = times_used.get(step[:2], 0) + 1

    # Every transition is used at most once; with "carry", exactly once but for the episodes still running
    assert set(times_used.values()) <= {1}
    if not discard:
        assert n_offered + sum(len(steps) for steps in running) == n_collected


def test_stale_and_unused_fractions_by_hand() -> None:
    """Environment 0 has episodes of 2 steps, environment 1 one of 5."""
    buffer = EpisodicRolloutBuffer(4, BOX, spaces.Discrete(2), device="cpu", n_envs=2)

    def add(*finished: int) -> None:
        buffer.add(np.zeros((2, 2), np.float32), np.zeros(2, np.int64), np.zeros(2, np.float32), {})
        buffer.close_episodes(np.array(finished, dtype=int), np.zeros(len(finished)))

    buffer.start_rollout()
    for finished in ((), (0,), (), (0,)):
        add(*finished)
    buffer.finish_rollout(buffer.compute_returns(0.9))
    assert buffer.counts() == (4, 0, 8) and buffer.pos == 4
    assert (TakeFinished.fraction(buffer.counts()), TakeStarted.fraction(buffer.counts())) == (0.0, 0.5)

    buffer.start_rollout()
    for finished in ((1,), (0,)):
        add(*finished)
    buffer.finish_rollout(buffer.compute_returns(0.9))
    # 5 transitions of environment 1, 4 of them older than this rollout, and 2 of environment 0
    assert (buffer.pos, TakeFinished.fraction(buffer.counts())) == (7, pytest.approx(4 / 7))


def test_one_environment_reuses_its_rows_and_never_grows_beyond_the_longest_episode() -> None:
    buffer = EpisodicRolloutBuffer(8, BOX, spaces.Discrete(2), device="cpu")
    memory = None
    for length in (5, 60, 3, 64, 1, 50):
        buffer.start_rollout()
        for t in range(length):
            buffer.add(np.full((1, 2), t, np.float32), np.zeros(1, np.int64), np.ones(1, np.float32), {})
        buffer.close_episodes(np.array([0]), np.zeros(1))
        buffer.finish_rollout(buffer.compute_returns(1.0))
        np.testing.assert_array_equal(buffer.observations[:, 0, 0], np.arange(length))
        if memory is not None:
            assert np.shares_memory(memory, buffer._rows["observations"])
        if length >= 60:
            memory = buffer._rows["observations"]
    assert buffer.buffer_size == 64


def test_rows_are_moved_a_constant_number_of_times_while_one_episode_never_ends() -> None:
    """The other environment's episodes are consumed at once; the rows must not be copied at every update."""
    buffer = EpisodicRolloutBuffer(8, BOX, spaces.Discrete(2), device="cpu", n_envs=2)
    n_moved = 0
    make_room = buffer._make_room

    def count() -> None:
        nonlocal n_moved
        make_room()
        n_moved += buffer._row

    buffer._make_room = count
    for t in range(20_000):
        buffer.start_rollout()
        buffer.add(np.full((2, 2), t, np.float32), np.zeros(2, np.int64), np.ones(2, np.float32), {})
        buffer.close_episodes(np.array([0]), np.zeros(1))
        buffer.finish_rollout(buffer.compute_returns(1.0))
    assert n_moved < 2 * 20_000
    buffer.start_rollout()
    buffer.close_episodes(np.array([1]), np.zeros(1))
    buffer.finish_rollout(buffer.compute_returns(1.0))
    assert buffer.episode_lengths.tolist() == [20_000]


def test_public_arrays_outlive_the_next_rollout() -> None:
    buffer = EpisodicRolloutBuffer(8, BOX, spaces.Discrete(2), device="cpu")
    kept = []
    for rollout in range(2):
        buffer.start_rollout()
        buffer.add(np.full((1, 2), rollout, np.float32), np.zeros(1, np.int64), np.ones(1, np.float32), {})
        buffer.close_episodes(np.array([0]), np.zeros(1))
        buffer.finish_rollout(buffer.compute_returns(1.0))
        kept.append(buffer.observations)
    assert [int(observations[0, 0, 0]) for observations in kept] == [0, 1]


@pytest.mark.parametrize("reward", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite_is_named(reward: float) -> None:
    buffer = EpisodicRolloutBuffer(8, BOX, spaces.Discrete(2), device="cpu", n_envs=2)
    for t in range(3):
        rewards = np.array([1.0, reward if t == 1 else 1.0], dtype=np.float32)
        buffer.add(np.zeros((2, 2), np.float32), np.zeros(2, np.int64), rewards, {})
    buffer.close_episodes(np.array([0, 1]), np.zeros(2))
    with pytest.raises(ValueError, match=rf"environment 1 is {reward} at step 1 of its 3.*reward there was {reward}"):
        buffer.compute_returns(0.99)


def test_reading_before_there_is_anything() -> None:
    buffer = EpisodicRolloutBuffer(8, BOX, spaces.Discrete(2), device="cpu")
    assert buffer.values.shape == buffer.log_probs.shape == buffer.returns.shape == (0, 1)
    assert list(buffer.get()) == []
    with pytest.raises(ValueError, match="on_rollout_end"):
        _ = buffer.observations
    with pytest.raises(ValueError, match="buffer_size"):
        EpisodicRolloutBuffer(0, BOX, spaces.Discrete(2))


def test_a_pickle_has_the_rows_in_use_only() -> None:
    """With all rows, a checkpoint of an agent of images took 13.9 MiB, where it takes 0.1."""
    buffer = EpisodicRolloutBuffer(1_000, spaces.Box(0, 255, (1, 84, 84), dtype=np.uint8), spaces.Discrete(2))
    for age in range(3):
        buffer.add(np.full((1, 1, 84, 84), age, dtype=np.uint8), np.zeros(1), np.zeros(1), {})
    state = pickle.dumps(buffer)
    # The space has four arrays of bounds
    assert len(state) < 8 * 84 * 84
    copy = pickle.loads(state)
    for one in (buffer, copy):
        # Not in the last row that was pickled
        one.add(np.full((1, 1, 84, 84), 3, dtype=np.uint8), np.ones(1), np.ones(1), {})
        one.close_episodes(np.array([0]), np.zeros(1))
        one.finish_rollout(one.compute_returns(gamma=1.0), lambda with_log_probs: (np.zeros(4), np.zeros(4)), None, 1.0, 1.0)
    np.testing.assert_array_equal(copy.observations[:, 0, 0, 0, 0], [0, 1, 2, 3])
    np.testing.assert_array_equal(copy.returns, buffer.returns)
