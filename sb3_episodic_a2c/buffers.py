"""The rollout buffer: rows of vec-steps, cut into complete episodes, and the transitions available for training."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer

from sb3_episodic_a2c.returns import (
    EPSILON,
    ReturnStatistics,
    discounted_returns_of_episodes,
    generalized_advantages,
    unstandardize,
)
from sb3_episodic_a2c.samples import (
    EpisodeSegment,
    EpisodicRolloutBufferSamples,
    ReadOnlyDict,
    RunningEpisodes,
    cut_episodes,
    flat_indices,
    has_only_finite,
    one_number_each,
    read_only,
    refuse_returns,
)
from sb3_episodic_a2c.selection import TakeFinished, TransitionCounts

INITIAL_BUFFER_SIZE = 128
"""Rows to start with."""

Evaluate = Callable[[bool], tuple[np.ndarray, np.ndarray]]
"""``with_log_probs -> (values, log_probs)`` of the available transitions, ``(n_transitions,)`` each."""


class EpisodicRolloutBuffer(BaseBuffer):
    """
    Rollout buffer whose unit is the complete episode.

    Collecting writes one row a vec-step into arrays ``(capacity, n_envs, ...)``, which grow by doubling and are
    reused. An episode is a column segment of these rows, closed when its environment reports ``done``. Once enough
    episodes are complete, :meth:`finish_rollout` makes them available for training until the next :meth:`start_rollout`;
    episodes still running stay in their rows.

    While episodes are available (``full``), the buffer reads as SB3's ``RolloutBuffer`` of ``pos`` steps of ONE environment,
    the episodes concatenated: ``observations`` ``(pos, 1, *obs_shape)``, ``actions`` ``(pos, 1, action_dim)``,
    and ``rewards``, ``episode_starts``, ``returns``, ``values``, ``log_probs``, ``advantages`` ``(pos, 1)``. ``returns``,
    ``values`` and ``advantages`` are in the units that are trained on. What a callback writes into ``returns`` or
    ``advantages`` is trained on. The others are copies that cannot be written to, as that would have no effect.

    ``selection`` decides which finished episodes are kept, and when a rollout is complete. Memory holds whole episodes, and
    the rows of all environments since the oldest running episode began; ``batch_size`` bounds the update alone.

    :param buffer_size: Number of rows (vec-steps) to start with
    :param observation_space: Observation space
    :param action_space: Action space
    :param device: PyTorch device the samples are put on
    :param n_envs: Number of parallel environments
    :raises ValueError: ``buffer_size`` is smaller than 1
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
    ) -> None:
        if buffer_size < 1:
            raise ValueError(
                f"`buffer_size` must be a positive number of rows, got {buffer_size}. It grows by itself: try 128."
            )
        super().__init__(buffer_size, observation_space, action_space, device, n_envs=n_envs)
        # Allocated at the first row, with types that hold what really arrives: VecNormalize turns integers into floats
        self._rows: dict[str, np.ndarray] = {}
        self._views: dict[str, np.ndarray] = {}
        self._n_policy_inputs = 0
        self._is_dict = isinstance(observation_space, spaces.Dict)
        self.selection = TakeFinished(n_envs)
        self.reset()

    # ------------------------------------------------------------------ collecting

    def reset(self) -> None:
        """Forget everything: the environments were reset, or are about to be."""
        super().reset()
        self._row = 0
        self._rollout_first_row = 0
        self._first_rows = np.zeros(self.n_envs, dtype=np.int64)
        self._select(type(self.selection), self.selection.n_wanted)
        self.drop_episodes()

    def select(self, rule: type[TakeFinished], n_wanted: int) -> None:
        """
        Say which episodes a rollout is made of.

        :param rule: The rule of selection. Another one than before counts the running episodes as just started
        :param n_wanted: Number of complete episodes
        """
        if type(self.selection) is not rule:
            self._select(rule, n_wanted)
        self.selection.n_wanted = n_wanted

    def _select(self, rule: type[TakeFinished], n_wanted: int) -> None:
        self.selection = rule(self.n_envs)
        self.selection.n_wanted = n_wanted

    def drop_episodes(self) -> None:
        """Forget the complete episodes, used or not, and keep those still running."""
        self.episodes: list[EpisodeSegment] = []
        self.pos = 0
        self.full = False
        self._returns = np.zeros((0, 1), dtype=np.float32)
        self._indices = np.zeros(0, dtype=np.int64)
        self._evaluations: tuple[np.ndarray, np.ndarray] | None = None
        self._evaluate: Evaluate | None = None
        self._units = ReturnStatistics()
        self._advantages: np.ndarray | None = None
        self._has_fixed_advantages = False
        self._computed_advantages: np.ndarray | None = None
        self._gamma, self._gae_lambda = 1.0, 1.0
        self.next_statistics: ReturnStatistics | None = None

    def drop_heads(self, episode_starts: np.ndarray) -> None:
        """
        Forget what the running episodes have collected where an environment was reset from outside.

        :param episode_starts: ``(n_envs,)`` bool: whether the next step is the first of an episode
        """
        self._first_rows[np.flatnonzero(episode_starts)] = self._row

    def start_rollout(self) -> None:
        """
        Drop the episodes that were available for training, and keep those still running.

        A rollout that was interrupted, or in which no episode ended, goes on: the policy is still the same.
        """
        if self.pos == 0:
            self.full = False
            return
        self.drop_episodes()
        if (self._first_rows == self._row).all():
            # No episode is running: start again at the top
            self._row = 0
            self._first_rows[:] = 0
        self._rollout_first_row = self._row

    def add(
        self,
        observations: np.ndarray | dict[str, np.ndarray],
        actions: np.ndarray,
        rewards: np.ndarray,
        policy_inputs: dict[str, np.ndarray],
    ) -> None:
        """
        Write one row: a step of every environment.

        :param observations: ``(n_envs, *obs_shape)``, or a dict of such arrays: what the actions were chosen for
        :param actions: ``(n_envs, *action_shape)`` as sampled, i.e. neither clipped nor unscaled
        :param rewards: ``(n_envs,)``
        :param policy_inputs: What the policy was given in addition to the observation, ``(n_envs, ...)`` each
        """
        row = self._row
        if row == 0 or row == self.buffer_size or not self._views:
            if row == 0:
                self._allocate(observations, actions, policy_inputs)
            elif row == self.buffer_size:
                self._make_room()
                row = self._row
            self._view_rows(observations, actions)
        views = self._views
        if len(policy_inputs) != self._n_policy_inputs:
            raise ValueError(
                f"`policy_inputs` are {sorted(policy_inputs)}, but were {self._keys('policy_inputs')} at earlier steps of "
                "episodes that are still running. Change what the policy is given, e.g. by `use_masking`, between two "
                "trainings only: call `learn` with reset_num_timesteps=True, which starts fresh episodes."
            )
        if self._is_dict:
            for key, observation in observations.items():  # type: ignore[union-attr]  # a dict here
                views[f"observations/{key}"][row] = observation
        else:
            views["observations"][row] = observations
        views["actions"][row] = actions
        views["rewards"][row] = rewards
        for name, policy_input in policy_inputs.items():
            views[f"policy_inputs/{name}"][row] = policy_input
        self._row = row + 1

    def close_episodes(self, env_indices: np.ndarray, terminal_values: np.ndarray) -> None:
        """
        The last row ended the episodes of these environments.

        :param env_indices: ``(n_finished,)`` their columns
        :param terminal_values: ``(n_finished,)`` value of the state after the last step, in reward units; 0 if terminated
        """
        is_wanted = self.selection.is_wanted
        for env_index, terminal_value in zip(env_indices.tolist(), terminal_values.tolist(), strict=True):
            if is_wanted[env_index]:
                first_row = int(self._first_rows[env_index])
                self.episodes.append(EpisodeSegment(env_index, first_row, self._row, terminal_value))
        self._first_rows[env_indices] = self._row
        self.selection.start_episodes(env_indices)

    def _allocate(
        self,
        observations: np.ndarray | dict[str, np.ndarray],
        actions: np.ndarray,
        policy_inputs: dict[str, np.ndarray],
    ) -> None:
        """Make the arrays that are missing, or whose type is too narrow for what arrives."""

        def allocate(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
            if name not in self._rows or self._rows[name].dtype != dtype:
                self._rows[name] = np.empty((self.buffer_size, self.n_envs, *shape), dtype=dtype)

        for name in [name for name in self._rows if name.startswith("policy_inputs/")]:
            if name.removeprefix("policy_inputs/") not in policy_inputs:
                # E.g. masks that are no longer used
                del self._rows[name]
        # SubprocVecEnv passes on what an environment returns, which may be an integer now and a float later
        if isinstance(observations, dict):
            for key, observation in observations.items():
                dtype = np.promote_types(observation.dtype, self.observation_space[key].dtype)  # type: ignore[index]  # a Dict
                allocate(f"observations/{key}", self.obs_shape[key], dtype)  # type: ignore[call-overload]  # a dict
        else:
            dtype = np.promote_types(observations.dtype, self.observation_space.dtype)  # type: ignore[arg-type]  # not None
            allocate("observations", self.obs_shape, dtype)
        allocate("actions", (self.action_dim,), actions.dtype)
        allocate("rewards", (), np.dtype(np.float32))
        for name, policy_input in policy_inputs.items():
            allocate(f"policy_inputs/{name}", policy_input.shape[1:], policy_input.dtype)
        self._n_policy_inputs = len(policy_inputs)

    def _view_rows(self, observations: np.ndarray | dict[str, np.ndarray], actions: np.ndarray) -> None:
        """Views of the rows in the shapes that arrive (discrete actions have no last axis), so that no step reshapes."""
        arrived = {"actions": actions.shape}
        if isinstance(observations, dict):
            arrived.update({f"observations/{key}": observation.shape for key, observation in observations.items()})
        else:
            arrived["observations"] = observations.shape
        self._views = {
            name: array.reshape(len(array), *arrived[name]) if name in arrived else array for name, array in self._rows.items()
        }

    def _make_room(self) -> None:
        """
        Move the rows that are still needed to the front, into arrays of twice the size where more than half are.

        The cost of a row stays constant on average, however long an episode or the wait for one.
        """
        first_rows = np.where(self.selection.is_wanted, self._first_rows, self._row)
        first_row = min(int(first_rows.min()), *(episode.first_row for episode in self.episodes), self._row)
        n_kept = self._row - first_row
        if n_kept > self.buffer_size // 2:
            self.buffer_size *= 2
        for name, array in self._rows.items():
            kept = array[first_row : self._row]
            if len(array) < self.buffer_size:
                array = self._rows[name] = np.empty((self.buffer_size, *array.shape[1:]), dtype=array.dtype)
            # At most half of the rows are kept in place, so the two ranges do not overlap
            array[:n_kept] = kept
        self._row = n_kept
        self._rollout_first_row -= first_row
        self._first_rows -= first_row
        self.episodes = [
            episode._replace(first_row=episode.first_row - first_row, end_row=episode.end_row - first_row)
            for episode in self.episodes
        ]

    # ------------------------------------------------------------------ available for training

    def is_complete(self) -> bool:
        """Whether the rollout has the episodes that it wants."""
        return self.selection.is_complete(len(self.episodes))

    @property
    def n_episodes(self) -> int:
        """Number of complete episodes."""
        return len(self.episodes)

    @property
    def running_steps(self) -> np.ndarray:
        """``(n_envs,)`` int64: number of steps of the running episodes so far."""
        return self._row - self._first_rows

    @property
    def episode_lengths(self) -> np.ndarray:
        """``(n_episodes,)`` int64: number of transitions of each complete episode."""
        return np.array([episode.end_row - episode.first_row for episode in self.episodes], dtype=np.int64)

    def counts(self) -> TransitionCounts:
        """What the rollout consists of."""
        first_row = self._rollout_first_row
        n_stale = sum(max(0, min(episode.end_row, first_row) - episode.first_row) for episode in self.episodes)
        return TransitionCounts(self.pos, n_stale, (self._row - first_row) * self.n_envs)

    def compute_returns(self, gamma: float) -> np.ndarray:
        """
        Discounted Monte Carlo returns of the complete episodes.

        :param gamma: Discount factor
        :return: ``(n_transitions,)`` float64 in reward units, the episodes concatenated
        :raises ValueError: A return is not finite
        """
        rewards = self._rows.get("rewards")
        if rewards is None or not self.episodes:
            return np.zeros(0)
        returns = discounted_returns_of_episodes(self._episode_rewards(), self.episode_lengths, gamma, self._terminal_values())
        if not np.isfinite(returns).all():
            refuse_returns(self.episodes, returns, rewards)
        return returns

    def _episode_rewards(self) -> np.ndarray:
        """Rewards of the complete episodes ``(n_transitions,)``, concatenated."""
        rewards = self._rows["rewards"]
        return np.concatenate([rewards[start:end, env_index] for env_index, start, end, _ in self.episodes])

    def _terminal_values(self) -> np.ndarray:
        """Values of what follows the complete episodes, ``(n_episodes,)``."""
        return np.array([episode.terminal_value for episode in self.episodes], dtype=np.float64)

    def check_observations(self) -> None:
        """
        Refuse observations that are not finite, in the complete episodes.

        :raises ValueError: It names the environment and the step
        """
        first_row = min((episode.first_row for episode in self.episodes), default=0)
        end_row = max((episode.end_row for episode in self.episodes), default=0)
        # Reading rows that hold little of these episodes would take longer
        is_dense = (end_row - first_row) * self.n_envs <= 8 * self.episode_lengths.sum()
        for name in [name for name in self._rows if name.startswith("observations") and self._rows[name].dtype.kind == "f"]:
            # All rows at once, and only if this fails, for which running episodes may be to blame, one by one
            if is_dense and has_only_finite(self._rows[name][first_row:end_row]):
                continue
            for episode in self.episodes:
                observations = self._rows[name][episode.first_row : episode.end_row, episode.env_index]
                if not has_only_finite(observations):
                    is_finite = np.isfinite(observations.reshape(len(observations), -1)).all(axis=1)
                    step = int(np.flatnonzero(~is_finite)[0])
                    raise ValueError(
                        f"Environment {episode.env_index} gave an observation that is not finite at step {step} of an episode "
                        f"of {len(observations)}: {name}={observations[step]}. Fix the environment, or clip in a wrapper. "
                        "stable_baselines3.common.vec_env.VecCheckNan raises at the first bad value."
                    )

    def finish_rollout(
        self,
        returns: np.ndarray,
        evaluate: Evaluate | None = None,
        next_statistics: ReturnStatistics | None = None,
        gamma: float = 1.0,
        gae_lambda: float = 1.0,
    ) -> None:
        """
        Make the complete episodes available for training.

        :param returns: ``(n_transitions,)`` targets to train on, the episodes concatenated
        :param evaluate: Computes what training would compute of these transitions. Only called if it is read before
        :param next_statistics: The units of the targets, which the update will give to the critic
        :param gamma: Discount factor of generalized advantages
        :param gae_lambda: See :func:`~sb3_episodic_a2c.returns.generalized_advantages`
        """
        self._returns = returns.astype(np.float32).reshape(-1, 1)
        self.pos = len(returns)
        self.full = True
        self._indices = flat_indices(self.episodes, self.n_envs)
        self._evaluations = None
        # They may have been read in a rollout in which no episode ended
        self._advantages, self._computed_advantages, self._has_fixed_advantages = None, None, False
        self._evaluate = evaluate
        self._units = next_statistics or ReturnStatistics()
        self.next_statistics = next_statistics
        self._gamma, self._gae_lambda = gamma, gae_lambda

    def set_evaluations(self, values: np.ndarray, log_probs: np.ndarray) -> None:
        """
        Keep what the first update on these transitions computed, so that reading it costs nothing.

        :param values: ``(n_transitions,)``
        :param log_probs: ``(n_transitions,)``
        """
        if self._evaluations is None:
            self._evaluations = values, log_probs
        self._evaluate = None

    def __getstate__(self) -> dict[str, Any]:
        # Leave out the model that `_evaluate` holds, and rows that are not in use, which the views have as well
        rows = {name: array[: self._row] for name, array in self._rows.items()}
        return {**self.__dict__, "_evaluate": None, "_rows": rows, "_views": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A checkpoint of version 0.1 lacks what came later
        super().__init__(state["buffer_size"], state["observation_space"], state["action_space"], "cpu", state["n_envs"])
        self.selection = TakeFinished(state["n_envs"])
        self.drop_episodes()
        self.__dict__.update(state)
        if "returns" in state:
            # So it was called until 0.2
            self._returns = self.__dict__.pop("returns")
        self._views = {}
        for name, array in self._rows.items():
            self._rows[name] = np.empty((self.buffer_size, *array.shape[1:]), dtype=array.dtype)
            self._rows[name][: self._row] = array

    def size(self) -> int:
        """Number of transitions available for training."""
        return self.pos

    # SB3 gives batches in random order. Here the order is that of the episodes: a sum does not depend on it
    def get(self, batch_size: int | None = None, whole_episodes: bool = False) -> Iterator[EpisodicRolloutBufferSamples]:
        """
        The transitions available for training, each exactly once, in order.

        :param batch_size: The most transitions in one sample; None for all of them at once
        :param whole_episodes: Whether to cut between episodes only. One longer than ``batch_size`` is then a sample of its own
        :return: Samples on the training device. They may share memory with the buffer: read only
        """
        if self.pos == 0:
            return
        for batch, episode_lengths in cut_episodes(self.episode_lengths, batch_size, whole_episodes):
            yield self._get_samples(batch, episode_lengths)

    def get_running(self, batch_size: int | None = None) -> Iterator[RunningEpisodes]:
        """
        What the running episodes have seen so far, for policies with a memory: each step exactly once, in order.

        Episodes without a step yet are left out, and so are those that will not be used.

        :param batch_size: The most transitions of several episodes together; None for all of them at once
        :return: Whole heads of episodes on the training device. They may share memory with the buffer: read only
        """
        env_indices = np.flatnonzero(self.selection.is_wanted & (self.running_steps > 0))
        if not len(env_indices):
            return
        indices = flat_indices([(index, self._first_rows[index], self._row) for index in env_indices], self.n_envs)
        first = 0
        for batch, episode_lengths in cut_episodes(self.running_steps[env_indices], batch_size, whole_episodes=True):
            last = first + len(episode_lengths)
            yield RunningEpisodes(env_indices[first:last], self._observation_tensors(indices[batch]), episode_lengths)
            first = last

    def _observation_tensors(self, indices: np.ndarray) -> th.Tensor | dict[str, th.Tensor]:
        if self._is_dict:
            return {key: self._tensor(f"observations/{key}", indices) for key in self._keys("observations")}
        return self._tensor("observations", indices)

    def _tensor(self, name: str, indices: np.ndarray) -> th.Tensor:
        return th.as_tensor(self._gather(name, indices), device=self.device)

    def _get_samples(  # type: ignore[override]  # SB3's takes the indices of single transitions
        self, batch: slice, episode_lengths: np.ndarray
    ) -> EpisodicRolloutBufferSamples:
        indices = self._indices[batch]
        actions = self._tensor("actions", indices)
        if isinstance(self.action_space, spaces.Discrete):
            actions = actions.long().flatten()
        elif isinstance(self.action_space, spaces.MultiBinary):
            # The Bernoulli distribution wants floats
            actions = actions.float()
        return EpisodicRolloutBufferSamples(
            observations=self._observation_tensors(indices),
            actions=actions,
            returns=th.as_tensor(self.returns[batch, 0], device=self.device),
            episode_lengths=tuple(episode_lengths.tolist()),
            old_log_prob=None if self._evaluations is None else th.as_tensor(self._evaluations[1][batch], device=self.device),
            advantages=th.as_tensor(self.advantages[batch, 0], device=self.device) if self._has_fixed_advantages else None,
            policy_inputs={name: self._tensor(f"policy_inputs/{name}", indices) for name in self._keys("policy_inputs")},
        )

    def _keys(self, prefix: str) -> list[str]:
        return [name.removeprefix(f"{prefix}/") for name in self._rows if name.startswith(f"{prefix}/")]

    def _gather(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Transitions of one array, ``(n, ...)``: a view where they are contiguous, otherwise a copy."""
        array = self._rows[name]
        flat = array.reshape(-1, *array.shape[2:])
        if len(indices) and self.n_envs == 1 and indices[-1] - indices[0] == len(indices) - 1:
            return flat[indices[0] : indices[-1] + 1]
        return flat.take(indices, axis=0)

    # ------------------------------------------------------------------ as SB3's RolloutBuffer reads

    def _copy_of(self, name: str) -> np.ndarray:
        """A copy ``(pos, 1, ...)``, which the next rollout does not overwrite. Read-only: writing would have no effect."""
        if name not in self._rows:
            raise ValueError(
                f"The rollout buffer holds no {name!r} yet: read it in `on_rollout_end`, or after a step was made."
            )
        return read_only(np.array(self._gather(name, self._indices))[:, None])

    @property
    def observations(self) -> np.ndarray | dict[str, np.ndarray]:
        """``(pos, 1, *obs_shape)``, or a dict of such arrays."""
        if self._is_dict:
            return ReadOnlyDict((key, self._copy_of(f"observations/{key}")) for key in self._keys("observations"))
        return self._copy_of("observations")

    @property
    def actions(self) -> np.ndarray:
        """``(pos, 1, action_dim)``, as sampled."""
        return self._copy_of("actions")

    @property
    def rewards(self) -> np.ndarray:
        """``(pos, 1)``, as the environment gave them: the value after a time limit is not added."""
        return self._copy_of("rewards")

    @property
    def episode_starts(self) -> np.ndarray:
        """``(pos, 1)`` float32: 1 at the first transition of each episode."""
        starts = np.zeros((self.pos, 1), dtype=np.float32)
        if self.full and self.episodes:
            lengths = self.episode_lengths
            starts[np.cumsum(lengths) - lengths] = 1.0
        return read_only(starts)

    def _get_evaluations(self) -> tuple[np.ndarray, np.ndarray]:
        if self._evaluations is None:
            self._evaluations = self._evaluate(True) if self._evaluate and self.pos else (np.zeros(0), np.zeros(0))
        return self._evaluations

    @property
    def values(self) -> np.ndarray:
        """``(pos, 1)`` predicted values, in the units of ``returns``."""
        return read_only(self._get_evaluations()[0].astype(np.float32).reshape(-1, 1))

    @property
    def log_probs(self) -> np.ndarray:
        """``(pos, 1)`` log-probabilities of the actions."""
        return read_only(self._get_evaluations()[1].astype(np.float32).reshape(-1, 1))

    @property
    def returns(self) -> np.ndarray:
        """``(pos, 1)`` float32, in the units that are trained on. With ``gae_lambda < 1`` by the critic alone."""
        return self._returns

    @returns.setter
    def returns(self, returns: np.ndarray) -> None:
        if not self._has_written_advantages():
            # They are computed from the returns
            self._advantages = self._computed_advantages = None
        self._returns = one_number_each("returns", returns, self.pos)

    @property
    def advantages(self) -> np.ndarray:
        """
        ``(pos, 1)``, in the units of ``returns``: generalized advantages, or with ``gae_lambda=1`` ``returns - values``.

        :raises ValueError: The buffer was pickled before they were computed
        """
        if self._advantages is None:
            evaluations = self._evaluations
            if evaluations is None and self._evaluate and self.pos:
                evaluations = self._evaluate(False)
            if evaluations is None and self.pos:
                raise ValueError("`advantages` are gone: the buffer was pickled before they were computed. Train again.")
            values = np.zeros(0, np.float32) if evaluations is None else evaluations[0]
            self._advantages = self._compute_advantages(values)[:, None]
            self._computed_advantages = self._advantages.copy()
        return self._advantages

    @advantages.setter
    def advantages(self, advantages: np.ndarray) -> None:
        self._advantages, self._computed_advantages = one_number_each("advantages", advantages, self.pos), None

    def fix_advantages(self) -> None:
        """Give training the advantages that a callback has written, or generalized ones; otherwise it computes them itself."""
        is_fixed = self._has_written_advantages() or self._gae_lambda < 1
        if is_fixed and self._advantages is None:
            # The first look computes them, before any pass of training
            self._advantages = self.advantages
        self._has_fixed_advantages = is_fixed

    def _has_written_advantages(self) -> bool:
        return self._advantages is not None and (
            self._computed_advantages is None or not np.array_equal(self._advantages, self._computed_advantages)
        )

    def _compute_advantages(self, values: np.ndarray) -> np.ndarray:
        """From values ``(n_transitions,)`` in the units of ``returns``."""
        if self._gae_lambda == 1 or not len(values):
            return self.returns[:, 0] - values.astype(np.float32)
        mean, std = self._units.mean, self._units.std
        has_statistics = self._units.count > 0
        raw_values = unstandardize(values.astype(np.float64), mean, std) if has_statistics else values
        advantages = generalized_advantages(
            self._episode_rewards(), raw_values, self._gamma, self._gae_lambda, self._terminal_values(), self.episode_lengths
        )
        scale = std + EPSILON if has_statistics else 1.0
        return (advantages / scale).astype(np.float32)
