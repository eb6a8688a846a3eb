"""Vectorised environments of gymnasium and EnvPool as an SB3 VecEnv, stepped without a Python loop over them."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.patch_gym import _patch_env

NO_ENVS = np.zeros(0, dtype=np.int64)
"""Indices of no environment."""


class _NothingReported(dict[str, Any]):
    """The info of all environments that report nothing. It is shared, so it cannot be written to."""

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError(
            f"info[{key!r}] cannot be set: one empty info is shared by all environments whose episode goes on. Write to the "
            "infos of finished episodes only (where `dones` is True), or put a new dict into the list of infos."
        )

    def setdefault(self, key: str, default: Any = None) -> Any:
        self[key] = default

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> "_NothingReported":  # type: ignore[override, misc]  # one for dict's two forms
        self.update(other)
        return self


NOTHING_REPORTED = _NothingReported()


class VectorInfos(list[dict[str, Any]]):
    """One info for each environment."""

    reporting: np.ndarray
    """``(n,)`` indices of the environments whose info says something."""


class GymnasiumVecEnv(VecEnv):
    """
    A ``gymnasium.vector.VectorEnv`` as an SB3 VecEnv: one of ``gymnasium.make_vec`` in any vectorisation mode, a subclass, or
    an environment of EnvPool's gymnasium interface.

    :class:`EpisodicA2C` and its variants wrap such an environment themselves. For SB3's own algorithms, ``evaluate_policy``
    and ``EvalCallback``, and below wrappers such as ``VecNormalize``, use :func:`as_vec_env`, as SB3 knows of no vector
    environments::

        env = as_vec_env(gym.make_vec("CartPole-v1", num_envs=64, vectorization_mode="vector_entry_point"))
        model = EpisodicA2C("MlpPolicy", VecNormalize(env, norm_reward=False))

    Episode rewards, lengths and times are in ``info["episode"]``, as ``Monitor`` records them. An environment reports its
    ``info`` when its episode ends; at other steps, all environments share an empty dict. ``seed`` has no effect on EnvPool:
    pass the seed to ``envpool.make``.

    When an episode ends, three things can happen:

    - ``AutoresetMode.SAME_STEP``: the environment starts the next episode within the step, as SB3's do.
    - ``AutoresetMode.DISABLED``: this class resets it, with gymnasium's option ``reset_mask``; to SB3 it looks the same.
    - ``AutoresetMode.NEXT_STEP`` (gymnasium's default, and EnvPool): the observation of the last step is the terminal one. The
      next step ignores the action, has the reward 0, and returns the first observation of the next episode.
      :class:`EpisodicA2C` leaves that step out of the episode, though it counts as an env step. Other algorithms learn
      from it as the first step of the next episode, one whose action has no effect. Of SB3's wrappers, ``VecMonitor`` counts
      it in the length (it is not needed here), ``VecFrameStack`` still has the terminal observation in its stack when an
      episode starts, and ``VecNormalize`` counts the terminal observation and the reward 0. ``evaluate_policy`` lets an LSTM
      begin an episode with the memory of the terminal observation, unlike training. Where that matters, use
      ``SAME_STEP``: ``gym.make_vec(..., vectorization_mode="sync", vector_kwargs={"autoreset_mode":
      gym.vector.AutoresetMode.SAME_STEP})``.

    :param env: The vector environment
    :param autoreset_mode: What it does when an episode ends; None: what ``env.metadata["autoreset_mode"]`` says
    :param filename: Where to log the episodes of all environments, as ``VecMonitor`` does: ``FILENAME.monitor.csv``
    :raises ValueError: It is no vector environment, its autoreset mode is not known, or it does not do what the mode says
    """

    def __init__(self, env: VectorEnv, autoreset_mode: AutoresetMode | str | None = None, filename: str | None = None) -> None:
        if not isinstance(env, VectorEnv):
            raise ValueError(
                f"`env` is a {type(env).__name__}. It must be a gymnasium.vector.VectorEnv, e.g. of gymnasium.make_vec, or an "
                'EnvPool environment: envpool.make(..., env_type="gymnasium") of EnvPool 1.2 or later.'
            )
        self.env = env
        self.autoreset_mode = _autoreset_mode(env, autoreset_mode)
        self._layers: list[Any] = [env]
        while isinstance(self._layers[-1], VectorWrapper):
            self._layers.append(self._layers[-1].env)
        base = self._layers[-1]
        self._has_sub_envs = callable(getattr(base, "call", None))
        self._is_envpool = hasattr(base, "send") and hasattr(base, "recv")
        sub_envs = getattr(base, "envs", None)
        self._sub_envs: list[gym.Env] | None = sub_envs if self._has_sub_envs and isinstance(sub_envs, list) else None
        self._is_monitored = self._sub_envs is not None and all(is_wrapped(sub_env, Monitor) for sub_env in self._sub_envs)
        """Whether the environments have monitors of their own, whose episodes may be longer than those that end here."""
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self.restarted = NO_ENVS
        """Indices of the environments whose last step did nothing but start an episode."""
        self.pending = NO_ENVS
        """Indices of the environments whose next step will do nothing but start an episode: their action is ignored."""
        self._episode_returns = np.zeros(self.num_envs)
        self._episode_lengths = np.zeros(self.num_envs, dtype=np.int64)
        self._start_time = time.time()
        self._results_writer: ResultsWriter | None = None
        if filename is not None:
            header: dict[str, float | str] = {"t_start": self._start_time, "env_id": str(getattr(env.spec, "id", None))}
            self._results_writer = ResultsWriter(filename, header)
        self._nothing_reported = [NOTHING_REPORTED] * self.num_envs
        self._is_stepping = False

    # ------------------------------------------------------------------ stepping

    def reset(self) -> VecEnvObs:
        self._finish_interrupted_step()
        options = self._options[0]
        if any(other != options for other in self._options):
            raise ValueError(
                f"`options` differ between the environments: {self._options}. A vector environment has one reset for all of "
                "them: give each the same, e.g. `set_options({...})`."
            )
        # EnvPool warns of seeds
        seed = None if self._is_envpool else self._seeds[0]
        obs, infos = self.env.reset(seed=seed, options=options or None)
        self._reset_seeds()
        self._reset_options()
        self.restarted = self.pending = NO_ENVS
        self._episode_returns[:] = 0.0
        self._episode_lengths[:] = 0
        new_obs = self._copy(obs)
        self._check_shapes(new_obs)
        # A new list: the infos may all be one shared empty dict, and a reset must be noticed
        self.reset_infos = list(self.reset_infos)
        self._keep_reset_infos(infos, np.arange(self.num_envs))
        return new_obs

    def _finish_interrupted_step(self) -> None:
        """Read the answers of gymnasium's worker processes to a step in which an exception came, e.g. Ctrl-C."""
        step_wait = getattr(self._layers[-1], "step_wait", None)
        if self._is_stepping and step_wait is not None:
            try:
                step_wait()
            except gym.error.NoAsyncCallError:
                # It had not begun
                pass
        self._is_stepping = False

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = np.asarray(actions, dtype=self.action_space.dtype)

    def step_wait(self) -> VecEnvStepReturn:
        self._is_stepping = True
        obs, rewards, terminations, truncations, env_infos = self.env.step(self._actions)
        self._is_stepping = False
        # Copies: an environment may write the next observations into the same array
        new_obs = self._copy(obs)
        dones = np.logical_or(terminations, truncations)
        self._episode_returns += rewards
        self._episode_lengths += 1
        # The type that DummyVecEnv returns
        rewards = np.array(rewards, dtype=np.float32)

        self.restarted = self.pending
        if len(self.restarted):
            self._start_pending_episodes(rewards, dones, env_infos)
        infos = VectorInfos(self._nothing_reported)
        infos.reporting = np.flatnonzero(dones) if np.count_nonzero(dones) else NO_ENVS
        if len(infos.reporting):
            self._finish_episodes(infos, new_obs, dones, terminations, env_infos)
        if self._is_monitored and "_episode" in env_infos:
            # Episodes of the monitors that end without one here, or start one
            reporting = np.flatnonzero(env_infos["_episode"] & ~dones)
            for index, info in zip(reporting.tolist(), self._infos_of(env_infos, reporting), strict=True):
                infos[index] = info
            infos.reporting = np.sort(np.append(infos.reporting, reporting))
        return new_obs, rewards, dones, infos

    def _start_pending_episodes(self, rewards: np.ndarray, dones: np.ndarray, env_infos: dict[str, Any]) -> None:
        """The last step has started the episodes of ``restarted``, and did nothing else there."""
        self.pending = NO_ENVS
        if dones[self.restarted].any():
            index = int(self.restarted[dones[self.restarted]][0])
            raise ValueError(
                f"Environment {index} ended an episode in the step after the end of one, in which `autoreset_mode` "
                f"{self.autoreset_mode} says that it only starts the next: set `env.metadata['autoreset_mode']` to what it "
                "does, e.g. gymnasium.vector.AutoresetMode.SAME_STEP if it starts one in the step that ends the last."
            )
        rewards[self.restarted] = 0.0
        self._episode_returns[self.restarted] = 0.0
        self._episode_lengths[self.restarted] = 0
        self._keep_reset_infos(env_infos, self.restarted)

    def _finish_episodes(
        self,
        infos: VectorInfos,
        new_obs: Any,
        dones: np.ndarray,
        terminations: np.ndarray,
        env_infos: dict[str, Any],
    ) -> None:
        """Write the infos of the episodes that have ended, and see to it that the next ones start."""
        finished = infos.reporting
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            terminal_observations = self._final_observations(env_infos, finished)
            finished_infos = self._infos_of(env_infos.get("final_info", {}), finished)
            reset_infos = {name: value for name, value in env_infos.items() if name.lstrip("_") not in FINAL_KEYS}
            self._keep_reset_infos(reset_infos, finished)
        else:
            terminal_observations = self._rows(new_obs, finished)
            finished_infos = self._infos_of(env_infos, finished)
            if self.autoreset_mode == AutoresetMode.NEXT_STEP:
                self.pending = finished
            else:
                self._reset_finished(new_obs, dones, finished)
        episodes = self._episodes(finished)
        is_truncated = np.logical_not(terminations[finished]).tolist()
        for position, index in enumerate(finished.tolist()):
            info = infos[index] = finished_infos[position]
            if not self._is_monitored:
                info["episode"] = episodes[position]
            if self._results_writer is not None:
                self._results_writer.write_row(episodes[position])
            info["terminal_observation"] = terminal_observations[position]
            info["TimeLimit.truncated"] = is_truncated[position]
        if self.autoreset_mode != AutoresetMode.NEXT_STEP:
            self._episode_returns[finished] = 0.0
            self._episode_lengths[finished] = 0

    def _episodes(self, finished: np.ndarray) -> list[dict[str, Any]]:
        """Rewards, lengths and times of the episodes that have ended, as ``Monitor`` gives them."""
        seconds = round(time.time() - self._start_time, 6)
        returns, lengths = self._episode_returns[finished].tolist(), self._episode_lengths[finished].tolist()
        return [
            {"r": round(episode_return, 6), "l": length, "t": seconds}
            for episode_return, length in zip(returns, lengths, strict=True)
        ]

    def _reset_finished(self, new_obs: Any, dones: np.ndarray, finished: np.ndarray) -> None:
        """Reset the environments whose episode has ended, and leave the others alone."""
        # A copy, as the environment may take the mask out of the options and change it
        obs, reset_infos = self.env.reset(options={"reset_mask": dones.copy()})
        others = np.flatnonzero(~dones)
        pairs = [(new_obs[key], obs[key]) for key in new_obs] if isinstance(new_obs, dict) else [(new_obs, obs)]
        for array, reset_array in pairs:
            reset_array = np.asarray(reset_array)
            if reset_array.shape != array.shape or not np.array_equal(reset_array[others], array[others], equal_nan=True):
                raise ValueError(
                    "`env.reset(options={'reset_mask': mask})` does not return the observations of all environments, changed "
                    "only where the mask is True: with AutoresetMode.DISABLED it must reset those, and leave the others "
                    "alone. Change its `reset`, or let it reset by itself, e.g. with AutoresetMode.SAME_STEP."
                )
            array[finished] = reset_array[finished]
        self._keep_reset_infos(reset_infos, finished)

    # ------------------------------------------------------------------ observations and infos

    def _copy(self, obs: Any) -> Any:
        """Observations of all environments, in arrays of the type of the space that share no memory with ``env``."""
        if isinstance(self.observation_space, spaces.Dict):
            return {key: np.array(obs[key], dtype=space.dtype) for key, space in self.observation_space.items()}
        return np.array(obs, dtype=self.observation_space.dtype)

    def _check_shapes(self, obs: Any) -> None:
        is_dict = isinstance(self.observation_space, spaces.Dict)
        whole: Any = self.observation_space
        for key, space in whole.items() if is_dict else [("", whole)]:
            shape = (obs[key] if is_dict else obs).shape
            if shape != (self.num_envs, *space.shape):
                raise ValueError(
                    f"`env.reset` returned an observation{f' {key!r}' if key else ''} of the shape {shape}, but with "
                    f"num_envs={self.num_envs} its space says {(self.num_envs, *space.shape)}: return one observation for "
                    "each environment. (EnvPool: leave `batch_size` out.)"
                )

    def _rows(self, obs: Any, env_indices: np.ndarray) -> Sequence[Any]:
        """Copies of the observations of some environments."""
        if isinstance(obs, dict):
            rows = {key: array[env_indices] for key, array in obs.items()}
            return [{key: array[position] for key, array in rows.items()} for position in range(len(env_indices))]
        return list(obs[env_indices])

    def _final_observations(self, env_infos: dict[str, Any], finished: np.ndarray) -> Sequence[Any]:
        """The last observations of episodes, where the environment has started the next ones already."""
        final_obs = env_infos.get("final_obs")
        if isinstance(final_obs, dict) and isinstance(self.observation_space, spaces.Dict):
            return self._rows({key: np.asarray(array) for key, array in final_obs.items()}, finished)
        rows = [] if final_obs is None else [final_obs[index] for index in finished.tolist()]
        if not rows or any(row is None for row in rows):
            raise ValueError(
                f"`env` ended the episodes of the environments {finished.tolist()} without their last observation, which "
                f"`autoreset_mode` {self.autoreset_mode} needs: put it into infos['final_obs'], for all environments or as an "
                "object array, or set `env.metadata['autoreset_mode']` to what the environment does."
            )
        if isinstance(self.observation_space, spaces.Dict):
            return [
                {key: np.array(row[key], dtype=space.dtype) for key, space in self.observation_space.items()} for row in rows
            ]
        return list(np.array(rows, dtype=self.observation_space.dtype))

    def _keep_reset_infos(self, env_infos: dict[str, Any], env_indices: np.ndarray) -> None:
        for index, info in zip(env_indices.tolist(), self._infos_of(env_infos, env_indices), strict=True):
            self.reset_infos[index] = info

    def _infos_of(self, env_infos: dict[str, Any], env_indices: np.ndarray) -> list[dict[str, Any]]:
        """
        What the infos of a vector environment say about some of its environments.

        :param env_infos: By name an array with one entry for each environment, or a dict of such arrays; with an underscore
            before the name, in which environments it is there. Anything else is said of all environments
        :param env_indices: ``(n,)``
        :return: A dict for each of them
        """
        if not isinstance(env_infos, dict):
            raise ValueError(
                f"`env` returned infos of the type {type(env_infos).__name__}. They must be a dict of arrays, as "
                "gymnasium.vector.VectorEnv says: leave out wrappers such as gymnasium.wrappers.vector.DictInfoToList."
            )
        infos: list[dict[str, Any]] = [{} for _ in range(len(env_indices))]
        for name, values in env_infos.items():
            if name.startswith("_") and name[1:] in env_infos:
                continue
            mask = env_infos.get(f"_{name}")
            entries: Iterable[Any]
            if isinstance(values, dict):
                entries = self._infos_of(values, env_indices)
            elif isinstance(values, np.ndarray) and values.shape[:1] == (self.num_envs,):
                rows = values[env_indices]
                entries = rows.tolist() if rows.ndim == 1 else rows
            else:
                entries = [values] * len(infos)
            is_there = [True] * len(infos) if mask is None else mask[env_indices].tolist()
            for info, entry, has_entry in zip(infos, entries, is_there, strict=True):
                if has_entry:
                    info[name] = entry
        return infos

    def episode_starts(self, dones: np.ndarray) -> np.ndarray:
        """
        Whether the next step of each environment is the first of an episode, or only starts one.

        :param dones: ``(n_envs,)`` the dones of the last step
        :return: ``(n_envs,)`` bool
        """
        if not len(self.restarted):
            return dones
        starts = dones.copy()
        starts[self.restarted] = True
        return starts

    # ------------------------------------------------------------------ attributes, rendering

    def _find(self, name: str) -> Any:
        """The vector environment, or the wrapper of it, that has an attribute; None if only its environments may have it."""
        for layer in self._layers:
            if self._answers(layer, name):
                return layer
        if self._has_sub_envs:
            return None
        raise AttributeError(f"{type(self._layers[-1]).__name__} has no attribute {name!r}")

    def _answers(self, layer: Any, name: str) -> bool:
        """Whether an attribute of a layer stands for the environments."""
        # What every vector environment has says nothing about the environments in it
        return hasattr(layer, name) and not (self._has_sub_envs and hasattr(VectorEnv, name))

    def _all_or_some(self, values: Any, indices: VecEnvIndices) -> Any:
        """Of values for each environment, or one for all of them, those of some environments."""
        if not (isinstance(values, (np.ndarray, tuple, list)) and len(values) == self.num_envs):
            values = [values] * self.num_envs
        return values if indices is None else [values[index] for index in self._get_indices(indices)]

    def _check_all(self, indices: VecEnvIndices, what: str, layer: Any) -> None:
        if indices is not None and len(list(self._get_indices(indices))) < self.num_envs:
            raise ValueError(
                f"`indices` is {indices}, but {what} can only be done for all environments of a {type(layer).__name__} at "
                "once: pass indices=None, or do it in the environments of a SyncVectorEnv."
            )

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        Return an attribute of the environments. An array, list or tuple that the vector environment itself has, with one
        entry for each environment is taken apart; anything else is that of all of them.

        :param attr_name: Name of the attribute
        :param indices: Indices of the environments
        :return: A value for each of them
        :raises AttributeError: There is no such attribute
        """
        layer = self._find(attr_name)
        if layer is not None:
            return list(self._all_or_some(getattr(layer, attr_name), indices))
        if self._sub_envs is not None:
            # Not through `call`, which would call a method
            return [sub_env.get_wrapper_attr(attr_name) for sub_env in self._all_or_some(self._sub_envs, indices)]
        self._check_has(attr_name)
        return list(self._all_or_some(self._layers[-1].call("get_wrapper_attr", attr_name), indices))

    def has_attr(self, attr_name: str) -> bool:
        try:
            if self._find(attr_name) is None:
                self._check_has(attr_name)
        except AttributeError:
            return False
        return True

    def _check_has(self, name: str) -> None:
        """Make sure that the environments have an attribute: worker processes end if they are asked for one that they lack."""
        base = self._layers[-1]
        if not all(base.call("has_wrapper_attr", name)):
            raise AttributeError(f"The environments of {type(base).__name__} have no attribute {name!r}")

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        owner = next((layer for layer in self._layers if attr_name in vars(layer)), None)
        if owner is not None and self._answers(owner, attr_name):
            self._check_all(indices, "setting an attribute", owner)
            setattr(owner, attr_name, value)
            return
        if self._sub_envs is not None:
            for sub_env in self._all_or_some(self._sub_envs, indices):
                sub_env.set_wrapper_attr(attr_name, value)
            return
        self._check_all(indices, "setting an attribute", self._layers[-1])
        if self._has_sub_envs:
            self._layers[-1].set_attr(attr_name, [value] * self.num_envs)
        else:
            setattr(self._layers[-1], attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any) -> Any:
        """
        Call a method of the environments. A vector environment may have one that works for all at once, such as an
        ``action_masks()`` that returns an array ``(n_envs, n_actions)``.

        :param method_name: Name of the method
        :param indices: Indices of the environments
        :param method_args: Arguments
        :param method_kwargs: Keyword arguments
        :return: What it returns for each environment; for all at once, an array as it is
        """
        layer = self._find(method_name)
        if layer is not None:
            return self._all_or_some(getattr(layer, method_name)(*method_args, **method_kwargs), indices)
        if self._sub_envs is not None:
            methods: list[Callable[..., Any]] = self.get_attr(method_name, indices)
            return [method(*method_args, **method_kwargs) for method in methods]
        self._check_all(indices, "calling a method", self._layers[-1])
        return list(self._layers[-1].call(method_name, *method_args, **method_kwargs))

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        n_asked = len(list(self._get_indices(indices)))
        if issubclass(Monitor, wrapper_class):
            # This class records what a monitor records
            return [True] * n_asked
        if self._sub_envs is None:
            return [False] * n_asked
        return [is_wrapped(sub_env, wrapper_class) for sub_env in self._all_or_some(self._sub_envs, indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        render: Any = self.env.render
        # EnvPool renders one environment if it is not told which
        frames = render(np.arange(self.num_envs)) if self._is_envpool else render()
        return [None] * self.num_envs if frames is None else list(frames)

    def close(self) -> None:
        self.env.close()
        if self._results_writer is not None:
            self._results_writer.close()


FINAL_KEYS = ("final_obs", "final_info")
"""What gymnasium puts into the infos of a step that has started the next episode already."""


def _autoreset_mode(env: VectorEnv, mode: AutoresetMode | str | None) -> AutoresetMode:
    if mode is None:
        mode = (env.metadata or {}).get("autoreset_mode")
    try:
        return mode if isinstance(mode, AutoresetMode) else AutoresetMode(mode)
    except ValueError:
        raise ValueError(
            f"`env.metadata['autoreset_mode']` of {type(env).__name__} is {mode!r}, so it is not known what the environment "
            f"does when an episode ends: set it to one of {[str(mode) for mode in AutoresetMode]} of gymnasium.vector, or "
            "pass `autoreset_mode` to GymnasiumVecEnv."
        ) from None


def as_vec_env(env: Any) -> GymEnv:
    """
    Make an environment one that SB3 takes.

    :param env: Any environment
    :return: A vector environment as a :class:`GymnasiumVecEnv`, one of old gym with SB3's patch, all others as they are
    :raises ValueError: A vector environment that cannot be wrapped
    """
    if isinstance(env, VecEnv):
        _check_innermost(env)
        return env
    if isinstance(env, VectorEnv) or (hasattr(env, "send") and hasattr(env, "recv")):
        return GymnasiumVecEnv(env)
    return _patch_env(env)


def _check_innermost(env: VecEnv) -> None:
    while isinstance(env, VecEnvWrapper):
        wrapper, env = type(env).__name__, env.venv
        if isinstance(env, VectorEnv):
            raise ValueError(
                f"`env` is SB3's {wrapper} around {type(env).__name__}, a vector environment of gymnasium, which it cannot "
                f"step. Wrap that first: {wrapper}(sb3_episodic_a2c.as_vec_env(...))."
            )


def wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
    """
    What SB3's algorithms do with an environment that they are given, for vector environments as well.

    :param env: Any environment
    :param verbose: Verbosity level: 1 says what it is wrapped in
    :param monitor_wrapper: Whether to wrap a single environment in a ``Monitor``
    :return: Environments to train on
    """
    return BaseAlgorithm._wrap_env(as_vec_env(env), verbose, monitor_wrapper)
