"""A2C in plain PyTorch, as one writes it by hand for a vector environment: a peer for the benchmark, without SB3."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import nn

from sb3_episodic_a2c.vector import GymnasiumVecEnv

ROLLOUT_STEPS = 128
"""Vec-steps of a rollout. With A2C's usual 5 the many small updates would be most of the time."""


def make_mlp(n_inputs: int, n_outputs: int) -> nn.Sequential:
    """The layers of SB3's ``MlpPolicy``: two of 64 with tanh."""
    return nn.Sequential(nn.Linear(n_inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, n_outputs))


class PlainA2C:
    """
    A2C with the networks of SB3's, and nothing beside the algorithm: no logs, no statistics of episodes, no callbacks.

    It steps the vector environment itself. Actions are sampled by Gumbel noise, without distribution objects, the update is
    one pass over the rollout, and steps that only start an episode are left out of it.

    :param env: A vector environment with flat observations and discrete actions
    :raises ValueError: It has other spaces, or does not reset by itself
    """

    train_seconds = 0.0

    def __init__(self, env: GymnasiumVecEnv) -> None:
        if not isinstance(env.action_space, spaces.Discrete) or len(env.observation_space.shape or ()) != 1:
            raise ValueError(
                f"`env` has the spaces {env.observation_space} and {env.action_space}. The peer in plain PyTorch takes flat "
                "observations and discrete actions: leave it out."
            )
        if env.autoreset_mode == AutoresetMode.DISABLED:
            raise ValueError("`env` has AutoresetMode.DISABLED, so it would never be reset here. Use another mode.")
        self.env = env
        self.is_next_step = env.autoreset_mode == AutoresetMode.NEXT_STEP
        (n_inputs,), self.n_envs = env.observation_space.shape or (), env.num_envs
        self.actor, self.critic = make_mlp(n_inputs, int(env.action_space.n)), make_mlp(n_inputs, 1)
        self.parameters = [*self.actor.parameters(), *self.critic.parameters()]
        self.optimizer = th.optim.Adam(self.parameters, lr=7e-4, fused=True)
        self.obs = self._tensor(env.env.reset()[0])
        self.is_start = th.zeros(self.n_envs)

    @staticmethod
    def _tensor(array: Any) -> th.Tensor:
        return th.from_numpy(np.asarray(array, dtype=np.float32))

    def run(self, n_steps: int) -> int:
        """
        :param n_steps: Env steps, rounded to whole rollouts
        :return: Env steps made
        """
        n_rollouts = max(1, round(n_steps / (ROLLOUT_STEPS * self.n_envs)))
        for _ in range(n_rollouts):
            self._learn_from_a_rollout()
        return n_rollouts * ROLLOUT_STEPS * self.n_envs

    def _learn_from_a_rollout(self, gamma: float = 0.99) -> None:
        shape = ROLLOUT_STEPS, self.n_envs
        observations = th.empty(*shape, self.obs.shape[1])
        actions = th.empty(shape, dtype=th.int64)
        rewards, going_on, is_valid = th.empty(shape), th.empty(shape), th.empty(shape)
        with th.no_grad():
            for step in range(ROLLOUT_STEPS):
                observations[step] = self.obs
                logits = self.actor(self.obs)
                actions[step] = action = (logits - th.empty_like(logits).exponential_().log_()).argmax(1)
                obs, reward, terminations, truncations, _ = self.env.env.step(action.numpy())
                self.obs = self._tensor(obs)
                rewards[step] = self._tensor(reward)
                going_on[step] = 1.0 - self._tensor(terminations | truncations)
                is_valid[step] = 1.0 - self.is_start
                if self.is_next_step:
                    self.is_start = 1.0 - going_on[step]
            returns = th.empty(shape)
            following = self.critic(self.obs)[:, 0]
            for step in range(ROLLOUT_STEPS - 1, -1, -1):
                following = returns[step] = rewards[step] + gamma * going_on[step] * following
        flat_observations = observations.flatten(0, 1)
        values = self.critic(flat_observations)[:, 0]
        log_probs = self.actor(flat_observations).log_softmax(1).gather(1, actions.view(-1, 1))[:, 0]
        errors, weights = returns.flatten() - values, is_valid.flatten()
        loss = (weights * (0.5 * errors.square() - errors.detach() * log_probs)).sum() / weights.sum()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 0.5)
        self.optimizer.step()
