"""Episodic A2C: an on-policy actor-critic that learns from complete episodes."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NoReturn, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import explained_variance, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_episodic_a2c.actors import INDEPENDENT, ActorChoice, action_bounds, make_actor, noise_schedule, to_env_actions
from sb3_episodic_a2c.buffers import INITIAL_BUFFER_SIZE, EpisodicRolloutBuffer
from sb3_episodic_a2c.evaluation import (
    Evaluations,
    evaluate_actions,
    evaluate_values,
    is_truncated,
    pass_size,
    predict_values,
    stack_observations,
)
from sb3_episodic_a2c.guards.arguments import (
    PartialEpisodes,
    check_arguments,
    check_policy_class,
    check_policy_name,
    check_spaces,
    check_unknown,
    copy_nested,
)
from sb3_episodic_a2c.guards.files import SafelySaved
from sb3_episodic_a2c.guards.numbers import NormalizeStatistics, check_rewards, has_finite_numbers, scheduled, statistics_of
from sb3_episodic_a2c.guards.resets import ResetWatch, warn_of_reset
from sb3_episodic_a2c.guards.training import guarded_training, raise_if_not_finite, warn_of_no_episode
from sb3_episodic_a2c.guards.transaction import OptimizerStep, Transaction
from sb3_episodic_a2c.guards.workers import resynchronize
from sb3_episodic_a2c.losses import Losses, entropy_loss, policy_loss, value_loss
from sb3_episodic_a2c.plain_mlp import PlainMlp, inspect
from sb3_episodic_a2c.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, SharedMlpPolicy, fuse_adam, rescale_value_head
from sb3_episodic_a2c.returns import STANDARDIZATIONS, ReturnStatistics, standardize_returns, unstandardize
from sb3_episodic_a2c.samples import EpisodicRolloutBufferSamples
from sb3_episodic_a2c.selection import PARTIAL_EPISODES
from sb3_episodic_a2c.vector import GymnasiumVecEnv, as_vec_env, wrap_env

SelfEpisodicA2C = TypeVar("SelfEpisodicA2C", bound="EpisodicA2C")


class EpisodicA2C(SafelySaved, OnPolicyAlgorithm):
    r"""
    Episodic Advantage Actor Critic: REINFORCE with a learned baseline, on complete episodes.

    One update gathers ``n_episodes * n_envs`` complete episodes, computes the discounted Monte Carlo return :math:`G_t` of
    every transition, standardises the returns and takes ONE gradient step on

    .. math::
        -\sum_t \log \pi(a_t|s_t) A_t + \text{vf\_coef} \sum_t \text{huber}(V(s_t), G_t)
        - \text{ent\_coef} \sum_t H(\pi(\cdot|s_t)), \qquad A_t = G_t - V(s_t)

    summed, never averaged, over all transitions of all episodes. ``gae_lambda < 1`` takes another :math:`A_t`, and
    ``n_value_epochs`` adds steps on the critic's term alone.

    Where it differs from SB3's A2C: the unit is the episode (``n_episodes`` stands for ``n_steps``), returns are not
    bootstrapped except at a time limit, losses are sums, the value loss is Huber's, the optimizer is Adam, and ``learn``
    stops at its budget instead of overshooting it by up to a rollout.

    Williams (1992), https://doi.org/10.1007/BF00992696; Sutton & Barto (2018), section 13.4;
    A2C: https://arxiv.org/abs/1602.01783

    :param policy: The policy model to use (``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``, ``"SharedMlpPolicy"``
        or a class)
    :param env: The environment to learn from (if registered in Gym, can be str). Its episodes must end. With ``VecNormalize``
        prefer ``norm_reward=False``: the scale of normalized rewards drifts within an episode
    :param learning_rate: The learning rate, it can be a function of the current progress remaining (from 1 to 0)
    :param n_episodes: Complete episodes per environment per update
    :param gamma: Discount factor
    :param standardize_returns: ``"running"``: by a running mean and standard deviation of the returns seen in training; the
        critic's last layer is rescaled as they move, so its values in reward units stay. ``"episode"``: each by its own.
        ``"rollout"``: over all of the update. ``None``: raw. Or a key of :data:`~sb3_episodic_a2c.returns.STANDARDIZATIONS`
    :param handle_timeout_termination: Whether an episode that was cut by a time limit gets the value of its last observation
        as the return of what would have followed (https://arxiv.org/abs/1712.00378). False with ``"episode"``, ``"rollout"``
    :param partial_episodes: What happens, with several environments, to unfinished episodes when enough others are complete.
        ``"carry"``: they are kept for the next update, so that no env step is thrown away; their head comes from a slightly
        older policy. ``"discard"``: strictly on-policy; the first ``n_episodes * n_envs`` episodes that were STARTED in the
        rollout are used, then all environments are reset. Where a budget ends, complete ones are used, others by the next call
    :param huber_delta: Error, in units of the returns trained on, at which the value loss turns from quadratic to linear
    :param detach_advantage: Whether the policy loss leaves the critic alone, though its advantages come from there
    :param ent_coef: Entropy coefficient for the loss calculation, it can be a function of the current progress remaining
    :param vf_coef: Value function coefficient for the loss calculation
    :param max_grad_norm: The maximum norm of the gradient; None: no clipping. As the loss is a sum, larger than for A2C
    :param batch_size: The most transitions in one forward and backward pass; None: all at once, but on the CPU 2048, or for
        84x84x4 images 148, which is faster. The gradients of the passes are summed: it bounds memory and changes nothing else
    :param actor: What samples the actions while collecting, from the same distribution. ``"auto"``: NumPy for an MLP policy on
        all observations but images, several times faster, torch for everything else. ``"numpy"``, ``"torch"``: that one
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE) instead of action noise exploration
    :param sde_sample_freq: Sample a new noise matrix every n steps when using gSDE; -1: at the beginning of the rollout only
    :param rollout_buffer_class: A subclass of :class:`EpisodicRolloutBuffer`, which is what None stands for
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation
    :param stats_window_size: Number of episodes that logged success rate, episode length and reward are averaged over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation. Copied, never written to
    :param verbose: 0: no output, 1: info messages (such as device or wrappers used), 2: debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run; ``"auto"``: on the GPU if possible
    :param gae_lambda: Factor of generalized advantages in the policy loss (https://arxiv.org/abs/1506.02438). 1: the Monte
        Carlo return minus the value. Less: less variance, more trust in the critic, which must have units
    :param n_value_epochs: After the update, so many more gradient steps on the value loss alone, over the same episodes. Meant
        for a critic with layers of its own: what it shares with the actor keeps the momentum of the policy's step
    :param value_learning_rate: The learning rate of these steps, or a function as ``learning_rate``; None: ``learning_rate``
    :param noise_resample_prob: Probability that an environment gets new noise for its actions at a step. Less than 1: noise
        persists, as with gSDE, while every action keeps the policy's own probability. A number rises to 1 until half of the
        training is over; a function of the progress remaining is taken as it is. Needs the NumPy actor, and no gSDE
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: An argument is out of its range, or the spaces of the environment are not supported
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
        "SharedMlpPolicy": SharedMlpPolicy,
    }
    supported_action_spaces: ClassVar[tuple[type[spaces.Space], ...]] = (
        spaces.Box,
        spaces.Discrete,
        spaces.MultiDiscrete,
        spaces.MultiBinary,
    )
    rollout_buffer: EpisodicRolloutBuffer  # type: ignore[assignment]  # not SB3's fixed-length one
    _policy_base_class: ClassVar[type[BasePolicy]] = ActorCriticPolicy
    """What a policy must be derived from."""
    _variants: ClassVar[dict[type[BasePolicy], str]] = {}
    """What a policy of a variant of this algorithm is derived from, and the name of the variant."""
    _trains_on_whole_episodes: ClassVar[bool] = False
    """Whether ``batch_size`` cuts between episodes only, which a policy with a memory needs."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_policy_base_class" in vars(cls):
            EpisodicA2C._variants[cls._policy_base_class] = cls.__name__

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-3,
        n_episodes: int = 1,
        gamma: float = 0.99,
        standardize_returns: str | None = "running",
        handle_timeout_termination: bool = True,
        partial_episodes: PartialEpisodes = "carry",
        huber_delta: float = 1.0,
        detach_advantage: bool = True,
        ent_coef: float | Schedule = 0.0,
        vf_coef: float = 1.0,
        max_grad_norm: float | None = None,
        batch_size: int | None = None,
        actor: ActorChoice = "auto",
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[EpisodicRolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        gae_lambda: float = 1.0,
        n_value_epochs: int = 0,
        value_learning_rate: float | Schedule | None = None,
        noise_resample_prob: float | Schedule = INDEPENDENT,
        _init_setup_model: bool = True,
    ) -> None:
        check_arguments(locals())
        if env is not None:
            env = as_vec_env(maybe_make_env(env, verbose))
            check_spaces(policy, env.observation_space, env.action_space, self.supported_action_spaces)
        super().__init__(
            policy,
            env,
            # SB3 accepts only Python's floats
            learning_rate=learning_rate if callable(learning_rate) else float(learning_rate),
            # Not an argument of this algorithm
            n_steps=INITIAL_BUFFER_SIZE,
            gae_lambda=gae_lambda,
            gamma=gamma,
            ent_coef=ent_coef,  # type: ignore[arg-type]  # SB3's is a number
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,  # type: ignore[arg-type]  # SB3's always clip
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,  # type: ignore[arg-type]  # not SB3's fixed-length one
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=copy_nested(policy_kwargs or {}),
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.n_episodes = n_episodes
        self.standardize_returns = standardize_returns
        self.handle_timeout_termination = handle_timeout_termination
        self.partial_episodes = partial_episodes
        self.huber_delta = huber_delta
        self.detach_advantage = detach_advantage
        self.batch_size = batch_size
        self.actor = actor
        self.n_value_epochs = n_value_epochs
        self.value_learning_rate = value_learning_rate
        self.noise_resample_prob = noise_resample_prob
        self.return_statistics = ReturnStatistics()
        """The units of the critic: initial for raw returns, running for ``"running"``. Saved with the model."""
        self.n_steps: int
        """Vec-steps of the last rollout; before the first one, the rows that the rollout buffer starts with."""

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        # `load` has put saved and given values into the attributes without the constructor's checks
        check_arguments(vars(self))
        # Zips of version 0.1 may say 0
        self.n_steps = self.n_steps or INITIAL_BUFFER_SIZE
        check_policy_class(type(self), self.policy_class)
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        buffer_kwargs = {"buffer_size": INITIAL_BUFFER_SIZE, **self.rollout_buffer_kwargs}
        self.rollout_buffer = (self.rollout_buffer_class or EpisodicRolloutBuffer)(  # type: ignore[assignment]  # annotated as SB3's
            observation_space=self.observation_space,
            action_space=self.action_space,
            device=self.device,
            n_envs=self.n_envs,
            **buffer_kwargs,
        )
        # Policies without gSDE do not know the argument
        sde_kwargs: dict[str, Any] = {"use_sde": True} if self.use_sde else {}
        self.policy = self.policy_class(  # type: ignore[assignment]  # annotated as SB3's
            self.observation_space, self.action_space, self.lr_schedule, **sde_kwargs, **self.policy_kwargs
        )
        self.policy = self.policy.to(self.device)
        fuse_adam(self.policy)
        self._normalize_statistics: NormalizeStatistics | None = None
        """Copies of VecNormalize's statistics at the start of the rollout."""
        self._resets = ResetWatch()
        self._maybe_recommend_cpu()
        self._action_bounds = action_bounds(self.action_space)
        self._setup_actor()
        self._plain_mlp = inspect(self.policy)

    def _setup_actor(self) -> None:
        """Choose how actions are sampled. The random numbers of the NumPy actor depend on torch's seed."""
        rng = np.random.default_rng(int(th.randint(2**63 - 1, ()).item()))
        self._actor = make_actor(self.policy, self.actor, rng, self.noise_resample_prob)
        if self.verbose >= 1:
            print(f"Sampling actions with the {self._actor.name} actor")

    def _refresh_actor(self) -> None:
        """Follow what was done to the policy since the last rollout."""
        plain = inspect(self.policy)
        schedule, name = noise_schedule(self.noise_resample_prob), f"the rollout before update {self._n_updates + 1}"
        noise = scheduled("noise_resample_prob", schedule, self._current_progress_remaining, name, 0.0, INDEPENDENT)
        if self._actor.policy is not self.policy or not self._actor.refresh(plain, noise):
            # Another policy has taken its place, e.g. one trained by imitation, or it or the noise was changed
            self._setup_actor()
        self._plain_mlp = plain
        self._actor.noise_resample_prob = noise

    def _current_plain_mlp(self) -> PlainMlp | None:
        """The layers that training may run without the policy's methods, if it is still the policy that was inspected."""
        plain = self._plain_mlp
        if isinstance(plain, str) or plain.critic is None or not plain.is_current(self.policy):
            return None
        return plain

    def set_random_seed(self, seed: int | None = None) -> None:
        super().set_random_seed(seed)
        if seed is not None and hasattr(self, "_actor"):
            self._setup_actor()

    # ------------------------------------------------------------------ what a variant overrides

    def _start_rollout(self, env: VecEnv) -> None:
        """Called once a rollout, before its first step in the training environment ``env``."""

    def _policy_inputs(self, env: VecEnv) -> dict[str, np.ndarray]:
        """
        What the policy is given in addition to the observation at this step.

        :param env: The training environment
        :return: ``(n_envs, ...)`` arrays, stored with the step and given back in training; the same keys at every step
        """
        return {}

    def _sample_actions(
        self, observations: np.ndarray | dict[str, np.ndarray], policy_inputs: dict[str, np.ndarray]
    ) -> np.ndarray:
        """
        Sample one action for every environment.

        :param observations: ``(n_envs, *obs_shape)``, or a dict of such arrays
        :param policy_inputs: See :meth:`_policy_inputs`
        :return: ``(n_envs, *action_shape)`` actions as sampled: neither clipped nor unscaled
        """
        return self._actor.sample(observations, policy_inputs)

    def _predict_terminal_values(
        self, observations: np.ndarray | dict[str, np.ndarray], env_indices: np.ndarray
    ) -> np.ndarray:
        """
        Value of the observation at which a time limit cut an episode.

        :param observations: ``(n, *obs_shape)``, or a dict of such arrays
        :param env_indices: ``(n,)`` the environments that they come from
        :return: ``(n,)`` values, in the critic's units
        """
        return predict_values(self.policy, observations, self._current_plain_mlp())

    def _evaluate_actions(self, samples: EpisodicRolloutBufferSamples) -> Evaluations:
        """Evaluate ``n`` transitions of complete episodes with the current policy."""
        return evaluate_actions(self.policy, samples, self._current_plain_mlp())

    def _evaluate_values(self, samples: EpisodicRolloutBufferSamples) -> th.Tensor:
        """The values alone of ``n`` transitions, ``(n,)``, with their gradient: what a value epoch trains."""
        return evaluate_values(self.policy, samples, self._current_plain_mlp())

    def _value_loss(self, samples: EpisodicRolloutBufferSamples, values: th.Tensor) -> th.Tensor:
        """The critic's term of the objective, also in value epochs: a scalar, from predicted values ``(n,)``."""
        return value_loss(values, samples.returns, self.huber_delta)

    def _losses(
        self, samples: EpisodicRolloutBufferSamples, values: th.Tensor, log_prob: th.Tensor, entropy: th.Tensor | None
    ) -> Losses:
        """
        The objective. A subclass may compute other terms, or add some under ``auxiliary``: sums over transitions, as gradients
        add up over the passes of an update.

        :param samples: ``n`` transitions with their ``returns``, ``advantages`` and ``old_log_prob``
        :param values: ``(n,)`` predicted values
        :param log_prob: ``(n,)`` log-probabilities of the actions
        :param entropy: ``(n,)`` entropies; None where they have no analytical form
        :return: The terms of the loss
        """
        assert samples.advantages is not None
        return Losses(
            policy_loss(log_prob, samples.advantages),
            self._value_loss(samples, values),
            entropy_loss(entropy, log_prob),
        )

    # ------------------------------------------------------------------ collecting

    def collect_rollouts(  # type: ignore[override]  # the buffer is not SB3's fixed-length one
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: EpisodicRolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """
        Collect complete episodes using the current policy, until there are ``n_episodes * n_envs`` or the budget of ``learn``
        is used up. At a step, callbacks see A2C's locals, except what only the update computes (``values``, ``log_probs``).

        :param env: The training environment
        :param callback: Called at each step, and at the beginning and end of the rollout
        :param rollout_buffer: Buffer to fill with rollouts
        :param n_rollout_steps: Ignored: the length of the episodes is unknown. Named as callbacks know it from SB3
        :return: False if the callback terminated the rollout, which the next call then continues; True otherwise
        """
        self._follow_own_training()
        n_steps = 0
        # A rollout that the budget has ended goes on: its running episodes are the long ones, and must not be lost
        rollout_buffer.select(PARTIAL_EPISODES[self.partial_episodes], self.n_episodes * env.num_envs)
        base_env = env.unwrapped
        self._restart_if_reset(env, rollout_buffer, self._resets.noticed(base_env, self._last_obs))
        if rollout_buffer.selection.restarts and rollout_buffer.size() > 0 and rollout_buffer.is_complete():
            self._discard_partial_episodes(env, rollout_buffer)
        rollout_buffer.start_rollout()
        self._refresh_actor()
        if self._current_plain_mlp() is None:
            # Switch to eval mode (this affects batch norm / dropout)
            self.policy.set_training_mode(False)
        self._start_rollout(env)

        # From here on everything depends on the model, the environments and the random states alone: checkpoints are made here
        self._resets.look(base_env, self._last_obs)
        callback.on_rollout_start()
        self._restart_if_reset(env, rollout_buffer, self._resets.noticed(base_env, self._last_obs))
        assert self._last_episode_starts is not None
        # A callback may have reset the environments itself
        rollout_buffer.drop_heads(self._last_episode_starts)

        if self.use_sde:
            # Sample new weights for the state dependent exploration
            self.policy.reset_noise(env.num_envs)

        vec_normalize = self.get_vec_normalize_env()
        self._normalize_statistics = statistics_of(vec_normalize)
        vector_env = base_env if isinstance(base_env, GymnasiumVecEnv) else None
        continue_training = True
        # At least one step, also where a callback stopped a rollout that was complete: at the end, callbacks expect its locals
        while (
            continue_training
            and (n_steps == 0 or not rollout_buffer.is_complete())
            and self.num_timesteps < self._total_timesteps
        ):
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                # Sample a new noise matrix
                self.policy.reset_noise(env.num_envs)

            last_obs = self._last_obs
            assert last_obs is not None, "No previous observation was provided"
            policy_inputs = self._policy_inputs(env)
            try:
                actions = self._sample_actions(last_obs, policy_inputs)
            except (ValueError, RuntimeError) as error:
                raise_if_not_finite(self, error)
                raise
            clipped_actions = to_env_actions(actions, self.policy, self._action_bounds)
            new_obs, rewards, dones, infos = env.step(clipped_actions)
            if vec_normalize is not None:
                check_rewards(vec_normalize.get_original_reward(), rollout_buffer.running_steps)

            self.num_timesteps += env.num_envs

            callback.update_locals(locals())
            self._resets.look(base_env)
            # Store the step even if the callback stops: a later `learn` goes on from here
            continue_training = callback.on_step()
            was_reset = self._resets.noticed(base_env)

            n_steps += 1
            rollout_buffer.add(last_obs, actions, rewards, policy_inputs)
            # At every step: a wrapper may play several monitored episodes as one
            self._update_info_buffer(*rollout_buffer.selection.wanted_infos(infos, dones))
            if np.count_nonzero(dones):
                env_indices = np.flatnonzero(dones)
                self._episode_num += len(env_indices)
                rollout_buffer.close_episodes(env_indices, self._terminal_values(infos, env_indices))
            self._last_obs = new_obs  # type: ignore[assignment]  # SB3 annotates an array, dicts come as well
            self._last_episode_starts = dones if vector_env is None else vector_env.episode_starts(dones)
            if vector_env is not None and len(vector_env.restarted):
                # Their step did nothing but start an episode
                rollout_buffer.drop_heads(self._last_episode_starts)
            self._restart_if_reset(env, rollout_buffer, was_reset)

        self._resets.look(base_env, self._last_obs)
        if not continue_training:
            return False

        self.n_steps = n_steps or self.n_steps
        self._finish_rollout(rollout_buffer)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _discard_partial_episodes(self, env: VecEnv, rollout_buffer: EpisodicRolloutBuffer) -> None:
        """Reset all environments, so that the current policy takes every step of the next rollout."""
        assert self._last_episode_starts is not None
        if not self._last_episode_starts.all():
            self._reset_envs(env)
        # Last: an error of the reset names the steps of the episodes
        rollout_buffer.reset()

    def _restart_if_reset(self, env: VecEnv, rollout_buffer: EpisodicRolloutBuffer, was_reset: bool) -> None:
        """Where the environments were reset from outside, their running episodes must not be glued to the next ones."""
        if was_reset:
            warn_of_reset(int(rollout_buffer.running_steps.sum()))
            self._reset_envs(env)
            rollout_buffer.drop_heads(np.ones(env.num_envs, dtype=bool))

    def _reset_envs(self, env: VecEnv) -> None:
        self._last_obs = env.reset()  # type: ignore[assignment]  # as above
        self._last_episode_starts = np.ones((env.num_envs,), dtype=bool)

    def _terminal_values(self, infos: list[dict[str, Any]], env_indices: np.ndarray) -> np.ndarray:
        """What follows episodes that have just ended, in reward units: 0, or after a time limit the critic's value."""
        terminal_values = np.zeros(len(env_indices))
        truncated = [index for index in env_indices.tolist() if is_truncated(infos[index])]
        if truncated and self.handle_timeout_termination:
            last = [infos[index]["terminal_observation"] for index in truncated]
            observations = stack_observations(last, self.observation_space)
            values = self._predict_terminal_values(observations, np.array(truncated)).astype(np.float64)
            # tanh turns infinity into a finite number
            values[~has_finite_numbers(observations)] = np.nan
            if self.return_statistics.count > 0:
                values = unstandardize(values, self.return_statistics.mean, self.return_statistics.std)
            terminal_values[np.isin(env_indices, truncated)] = values
        return terminal_values

    def _finish_rollout(self, rollout_buffer: EpisodicRolloutBuffer) -> None:
        """Turn the complete episodes into what is trained on, and log what was collected."""
        try:
            rollout_buffer.check_observations()
            returns = rollout_buffer.compute_returns(self.gamma)
        except ValueError:
            # Drop these episodes, or the next `learn` would fail on them again
            rollout_buffer.drop_episodes()
            raise
        units: ReturnStatistics | None = None
        if len(returns):
            returns, statistics = standardize_returns(
                returns, rollout_buffer.episode_lengths, self.standardize_returns, self.return_statistics
            )
            # Where no running statistics are kept, these are the initial ones: mean 0 and standard deviation 1
            units = statistics if STANDARDIZATIONS[self.standardize_returns].is_running else ReturnStatistics()
            self.logger.record("train/return_mean", statistics.mean)
            self.logger.record("train/return_std", statistics.std)
        rollout_buffer.finish_rollout(returns, self._evaluate_rollout, units, self.gamma, self.gae_lambda)
        self.logger.record("rollout/n_episodes", rollout_buffer.n_episodes)
        selection = rollout_buffer.selection
        self.logger.record(f"rollout/{selection.fraction_name}", selection.fraction(rollout_buffer.counts()))

    def _evaluate_rollout(self, with_log_probs: bool) -> tuple[np.ndarray, np.ndarray]:
        """Values and log-probabilities of the available transitions before the update, for advantages and callbacks."""
        values, log_probs = np.zeros((2, self.rollout_buffer.size()), dtype=np.float32)
        # In the units of the update, which is not made yet: whatever changes is undone
        with Transaction() as transaction, th.no_grad():
            self._prepare_update(transaction)
            for part, samples in self._passes(transaction):
                if with_log_probs:
                    batch_values, log_prob, _ = self._evaluate_actions(samples)
                    log_probs[part] = log_prob.numpy(force=True)
                else:
                    batch_values = self._evaluate_values(samples)
                values[part] = batch_values.numpy(force=True)
        return values, log_probs

    # ------------------------------------------------------------------ training

    @contextmanager
    def update_transaction(self) -> Iterator[OptimizerStep]:
        """
        What one update changes apart from the optimizer step: the critic takes the units of the returns, and batch norm
        may update its statistics. Unless the step is taken, all of it is undone, whatever ends the block.

        A subclass with a ``train`` of its own enters it around its passes, and calls ``take``, or ``commit`` right before a
        step of its own. One that does neither is safe, but its critic is not rescaled when the statistics of the returns move.
        Within it, samples bring the advantages of ``gae_lambda < 1``, or those that a callback has written.
        """
        # In evaluation mode, as they were sampled
        self.rollout_buffer.fix_advantages()
        with OptimizerStep(self.policy.optimizer) as step:
            self._prepare_update(step)
            yield step

    def _prepare_update(self, transaction: Transaction) -> None:
        """Change what an update changes before its first pass, as long as ``transaction`` is not undone."""
        units = self.rollout_buffer.next_statistics
        if units is not None:
            transaction.set(self.rollout_buffer, "next_statistics", None)
            value_net = getattr(self.policy, "value_net", None)
            has_units = STANDARDIZATIONS[self.standardize_returns].has_units
            if self._n_updates > 0 and has_units and isinstance(value_net, nn.Module):
                transaction.keep(value_net.parameters())
                rescale_value_head(self.policy, self.return_statistics, units)
            transaction.set(self, "return_statistics", units)
        if self._current_plain_mlp() is None:
            transaction.keep_buffers(self.policy)

    def _follow_own_training(self) -> None:
        """Take over the units of the critic after a ``train`` that entered no transaction."""
        units = self.rollout_buffer.next_statistics
        if units is not None:
            self.return_statistics, self.rollout_buffer.next_statistics = units, None

    def train(self) -> None:
        """
        Update policy using the currently gathered episodes (one gradient step over whole data).

        :raises ValueError: The loss or its gradient is not finite. The parameters are then as they were
        """
        n_transitions = self.rollout_buffer.size()
        if n_transitions == 0:
            # The budget ended before an episode did
            return

        ent_coef = scheduled("ent_coef", self.ent_coef, self._current_progress_remaining, f"update {self._n_updates + 1}")
        values, log_probs = np.empty((2, n_transitions), dtype=np.float32)
        sums: dict[str, float] = {}
        with self.update_transaction() as transaction:
            if self._current_plain_mlp() is None:
                # Switch to train mode (this affects batch norm / dropout)
                self.policy.set_training_mode(True)
            for part, samples in self._passes(transaction):
                batch_values, log_prob, entropy = self._evaluate_actions(samples)
                baseline = batch_values.detach() if self.detach_advantage else batch_values
                losses = self._losses(samples.completed(baseline, log_prob), batch_values, log_prob, entropy)
                # Gradients add up over the batches, as the loss is a sum
                total = losses.total(self.vf_coef, ent_coef)
                if total.requires_grad:
                    total.backward()
                values[part], log_probs[part] = batch_values.numpy(force=True), log_prob.numpy(force=True)
                for name, term in losses.terms().items():
                    sums[name] = sums.get(name, 0.0) + term.item()

            self._take(transaction, f"update {self._n_updates + 1}")
            self._n_updates += 1

        self.rollout_buffer.set_evaluations(values, log_probs)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        with np.errstate(all="ignore"):
            self.logger.record("train/explained_variance", explained_variance(values, self.rollout_buffer.returns[:, 0]))
        for name, summed in sums.items():
            # Per transition, so that curves of episodes of different length compare
            self.logger.record(f"train/{name}", summed / n_transitions)
        if self.n_value_epochs > 0:
            self.logger.record("train/value_loss_after_epochs", self._train_critic() / n_transitions)
        if callable(self.ent_coef):
            self.logger.record("train/ent_coef", ent_coef)
        if self.noise_resample_prob != INDEPENDENT:
            self.logger.record("train/noise_resample_prob", self._actor.noise_resample_prob)
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", float(np.exp(self.policy.log_std.numpy(force=True)).mean()))

    def _passes(self, transaction: Transaction) -> Iterator[tuple[slice, EpisodicRolloutBufferSamples]]:
        """
        The available transitions, as many at a time as go through the policy together, and where they are among all.
        Ctrl-C comes after a pass.

        Write what comes of them into one array for all: a small tensor of each pass would keep the memory of the large ones
        from being used again.
        """
        size = self.batch_size
        if not self._trains_on_whole_episodes:
            size = pass_size(self.policy, self.rollout_buffer.size(), size)
        start = 0
        for samples in self.rollout_buffer.get(size, self._trains_on_whole_episodes):
            end = start + len(samples.returns)
            yield slice(start, end), samples
            start = end
            transaction.let_signals_through()

    def _train_critic(self) -> float:
        """
        ``n_value_epochs`` gradient steps on the value loss alone. Returns the value loss after them, a sum.

        :raises ValueError: The gradient of a step is not finite. The parameters are then as they were before that step
        """
        for epoch in range(self.n_value_epochs):
            with self.update_transaction() as transaction:
                for _, samples in self._passes(transaction):
                    loss = self.vf_coef * self._value_loss(samples, self._evaluate_values(samples))
                    if loss.requires_grad:
                        loss.backward()
                if not loss.requires_grad:
                    # The critic is frozen
                    break
                self._take(transaction, f"value epoch {epoch + 1} of update {self._n_updates}", self.value_learning_rate)
        # What it does to batch norm is undone
        with Transaction() as transaction, th.no_grad():
            self._prepare_update(transaction)
            passes = self._passes(transaction)
            return sum(self._value_loss(samples, self._evaluate_values(samples)).item() for _, samples in passes)

    def _take(self, step: OptimizerStep, name: str, own_rate: float | Schedule | None = None) -> None:
        """Take a step with the current learning rate, or one of its own, unless it would spoil the parameters."""
        argument, schedule = ("learning_rate", self.lr_schedule) if own_rate is None else ("value_learning_rate", own_rate)
        rate = scheduled(argument, schedule, self._current_progress_remaining, name, minimum=0.0)
        set_rate = self._update_learning_rate if own_rate is None else partial(update_learning_rate, learning_rate=rate)
        step.take(name, self.max_grad_norm, lambda: set_rate(self.policy.optimizer))
        if own_rate is not None:
            # The other one is logged where it is set
            self.logger.record("train/value_learning_rate", rate)

    # ------------------------------------------------------------------ learning

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last step of several environments may go beyond the budget. Not every schedule accepts numbers below 0
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if reset_num_timesteps or self._last_obs is None:
            # The environments will be reset: episodes in flight end here
            self.rollout_buffer.reset()
            if self._last_obs is None and self.env is not None:
                # An exception may have ended the last call within a step
                resynchronize(self.env)
        total_and_callback = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        if self._total_timesteps > 0:
            # SB3 does this after a rollout, too late for the noise of the first one
            self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
        return total_and_callback

    def learn(
        self: SelfEpisodicA2C,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 10,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        **unknown: NoReturn,
    ) -> SelfEpisodicA2C:
        """
        Return a trained model. If no episode ends within the budget, nothing is learned, and a warning says so.

        :param total_timesteps: The number of env steps to train on. Training stops at the first step that reaches it, so
            ``total_timesteps <= num_timesteps < total_timesteps + n_envs``; complete episodes get an update, the others wait
            for the next call with ``reset_num_timesteps=False``
        :param callback: callback(s) called at every step with state of the algorithm.
        :param log_interval: Number of updates between two logs; None: no logs
        :param tb_log_name: the name of the run for TensorBoard logging; None: the name of the class
        :param reset_num_timesteps: whether or not to reset the current timestep number (used in logging)
        :param progress_bar: Display a progress bar using tqdm and rich.
        :return: the trained model
        :raises RuntimeError: A worker process of the environments died. Any other exception, Ctrl-C included, is passed
            on; where an environment raised it, a note says which. The model is then as after its last gradient step, and
            can be saved and used; the next call resets the environments
        """
        check_unknown(unknown, type(self))
        n_finished = 0 if reset_num_timesteps else self._episode_num
        with guarded_training(self):
            tb_log_name = tb_log_name or self.__class__.__name__
            super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        self._follow_own_training()
        if self._episode_num == n_finished and self.num_timesteps >= self._total_timesteps > self._num_timesteps_at_start:
            warn_of_no_episode(type(self).__name__, total_timesteps, self.n_envs)
        return self

    # ------------------------------------------------------------------ saving, names

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_actor", "_plain_mlp", "_normalize_statistics", "_action_bounds", "_resets"]

    _wrap_env = staticmethod(wrap_env)

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        check_policy_name(policy_name, self.policy_aliases)
        return self.policy_aliases[policy_name]
