"""SB3 callbacks that read the model and the training environments only."""

from collections import deque
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecMonitor, is_vecenv_wrapped

from sb3_episodic_a2c.buffers import EpisodicRolloutBuffer


class _FinishedEpisodesCallback(BaseCallback):
    """
    Calls :meth:`_on_episode` for every finished training episode, in the order of the environments.

    The reward is that of the environment itself, as ``Monitor`` records it: before ``VecNormalize``.

    :param verbose: Verbosity level: 0 for no output, 1 for info messages
    """

    def __init__(self, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.n_episodes_seen = 0

    def _on_training_start(self) -> None:
        env = self.training_env
        if not is_vecenv_wrapped(env, VecMonitor) and not all(env.env_is_wrapped(Monitor)):
            raise ValueError(
                f"{self.__class__.__name__} needs the rewards of whole episodes, but `env` is not monitored: wrap it in "
                "stable_baselines3.common.vec_env.VecMonitor, or each environment in stable_baselines3.common.monitor.Monitor."
            )

    def _on_step(self) -> bool:
        continue_training = True
        env_indices = np.flatnonzero(self.locals["dones"])
        rollout_buffer = getattr(self.model, "rollout_buffer", None)
        if len(env_indices) and isinstance(rollout_buffer, EpisodicRolloutBuffer):
            # With `partial_episodes="discard"`, unused episodes finish only if short: counting them would favour short ones
            env_indices = env_indices[rollout_buffer.selection.is_wanted[env_indices]]
        for index in env_indices.tolist():
            episode = self.locals["infos"][index].get("episode")
            # Under wrappers that end episodes early (e.g. at the loss of a life) the Monitor's episode still runs
            if episode is not None:
                self.n_episodes_seen += 1
                continue_training = self._on_episode(float(episode["r"]), int(episode["l"])) and continue_training
        return continue_training

    def _on_episode(self, episode_reward: float, episode_length: int) -> bool:
        """
        :param episode_reward: Sum of the episode's rewards
        :param episode_length: Number of its steps
        :return: If the callback returns False, training is aborted early.
        """
        raise NotImplementedError


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"`{name}` is {value!r}. It must be an integer >= 1, e.g. 100.")


class SolvedAt(NamedTuple):
    """When a task counted as solved."""

    n_episodes: int
    """Training episodes finished by then, in all environments."""
    num_timesteps: int
    """Env steps made by then, in all environments."""


class StopTrainingOnSolved(_FinishedEpisodesCallback):
    """
    Stop the training once the mean reward of the last training episodes exceeds a threshold.

    That is what "solved" means in Gymnasium. Unlike ``StopTrainingOnRewardThreshold`` it evaluates nothing: the actions are
    those sampled in training.

    :param reward_threshold: The mean reward to exceed. By default the environment's own ``spec.reward_threshold``
    :param n_episodes: Number of consecutive episodes that the mean is taken over
    :param verbose: Verbosity level: 0 for no output, 1 for saying when training ended because of it
    :raises ValueError: The threshold is not given, and the environment names none; or the environment is not monitored
    """

    def __init__(self, reward_threshold: float | None = None, n_episodes: int = 100, verbose: int = 0) -> None:
        super().__init__(verbose)
        _check_positive("n_episodes", n_episodes)
        self.reward_threshold = reward_threshold
        self.n_episodes = n_episodes
        self.episode_rewards: deque[float] = deque(maxlen=n_episodes)
        self.solved_at: SolvedAt | None = None

    @property
    def mean_reward(self) -> float:
        """Mean reward of the last episodes, at most ``n_episodes`` of them; NaN before the first."""
        return float(np.mean(self.episode_rewards)) if self.episode_rewards else float("nan")

    def _on_training_start(self) -> None:
        super()._on_training_start()
        if self.reward_threshold is None:
            spec = self.training_env.get_attr("spec")[0]
            threshold = getattr(spec, "reward_threshold", None)
            if threshold is None:
                # EnvPool's specs have no id
                env_id = getattr(spec, "id", None)
                name = "`env`" if env_id is None else f"`env` {env_id}"
                raise ValueError(
                    f"{name} names no reward threshold of its own: pass `reward_threshold` to StopTrainingOnSolved."
                )
            self.reward_threshold = float(threshold)
        # A resumed model may already be solved; the first step then stops the training
        self._check()

    def resume(self, model: BaseAlgorithm) -> None:
        """
        Count the episodes of a resumed model, as if its training had never been stopped.

        Call it on a new callback, before ``learn(reset_num_timesteps=False)``. If ``solved_at`` is set afterwards, nothing is
        left to learn.

        With ``partial_episodes="discard"``, and under wrappers that end episodes early, the model has counted more episodes
        than this callback would: ``solved_at.n_episodes`` is then greater than without the stop.

        :param model: The model, e.g. from :func:`sb3_episodic_a2c.resume`. It remembers ``stats_window_size`` episodes
        """
        assert model.ep_info_buffer is not None
        self.n_episodes_seen = model._episode_num
        self.num_timesteps = model.num_timesteps
        self.episode_rewards.extend(info["r"] for info in model.ep_info_buffer)
        self._check()

    def _on_episode(self, episode_reward: float, episode_length: int) -> bool:
        self.episode_rewards.append(episode_reward)
        return True

    def _on_step(self) -> bool:
        super()._on_step()
        # Once a step, after all of its episodes: a resumed model could not repeat a check between them
        return self._check()

    def _check(self) -> bool:
        if (
            self.solved_at is None
            and self.reward_threshold is not None
            and len(self.episode_rewards) == self.n_episodes
            and self.mean_reward > self.reward_threshold
        ):
            self.solved_at = SolvedAt(self.n_episodes_seen, self.num_timesteps)
            if self.verbose >= 1:
                print(
                    f"Stopping training because the mean reward {self.mean_reward:.2f} of the last {self.n_episodes} episodes "
                    f"is above the threshold {self.reward_threshold}, after {self.n_episodes_seen} episodes and "
                    f"{self.num_timesteps} env steps"
                )
        return self.solved_at is None


class EpisodeProgressCallback(_FinishedEpisodesCallback):
    """
    A progress bar over training episodes that shows ``episode_reward`` and ``running_reward``, the mean of the last
    ``window`` episodes, as the notebook's does; and the env steps, and how long those that are left to ``learn`` will take.
    Needs tqdm.

    :param total_episodes: Number of episodes that fills the bar; None: the bar only counts
    :param window: Number of episodes that ``running_reward`` is the mean of
    :param tqdm_kwargs: Further arguments of ``tqdm.tqdm``, e.g. ``file`` or ``disable``
    """

    def __init__(self, total_episodes: int | None = None, window: int = 100, **tqdm_kwargs: Any) -> None:
        super().__init__()
        _check_positive("window", window)
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise ImportError("EpisodeProgressCallback needs tqdm: pip install tqdm") from error
        self._tqdm = tqdm
        self.total_episodes = total_episodes
        self.tqdm_kwargs = tqdm_kwargs
        self.episode_rewards: deque[float] = deque(maxlen=window)
        self.pbar: Any = None

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self.pbar = self._tqdm(total=self.total_episodes, unit="episode", **self.tqdm_kwargs)
        self._first_timestep = self.num_timesteps

    def _on_episode(self, episode_reward: float, episode_length: int) -> bool:
        self.episode_rewards.append(episode_reward)
        running_reward = float(np.mean(self.episode_rewards))
        # `refresh=False`: tqdm decides when to draw
        self.pbar.set_postfix(
            episode_reward=f"{episode_reward:.1f}",
            running_reward=f"{running_reward:.1f}",
            steps=self.num_timesteps,
            left=self._tqdm.format_interval(self._seconds_left()),
            refresh=False,
        )
        self.pbar.update()
        return True

    def _seconds_left(self) -> float:
        n_done = self.num_timesteps - self._first_timestep
        n_left = max(0, self.model._total_timesteps - self.num_timesteps)
        # A bar that is disabled keeps no time
        return n_left * self.pbar.format_dict.get("elapsed", 0.0) / n_done if n_done else 0.0

    def _on_training_end(self) -> None:
        # Draws the last state, which tqdm may have held back
        self.pbar.refresh()
        self.pbar.close()
