"""Small environments, and checks, that the tests of the masked and of the recurrent variant share."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_episodic_a2c.actors import NumpyActor

ACTION_SPACES: dict[str, spaces.Space] = {
    "discrete": spaces.Discrete(5),
    "multi_discrete": spaces.MultiDiscrete([3, 2, 4]),
    "multi_binary": spaces.MultiBinary(3),
    "box": spaces.Box(-1.0, 1.0, (2,)),
}


def count_choices(action_space: spaces.Space) -> list[int]:
    """Length of the mask of each dimension of the action space."""
    if isinstance(action_space, spaces.Discrete):
        return [int(action_space.n)]
    if isinstance(action_space, spaces.MultiDiscrete):
        return action_space.nvec.tolist()
    assert isinstance(action_space, spaces.MultiBinary)
    return [2] * int(action_space.n)


class RandomEnv(gym.Env):
    """
    Random observations, rewards, masks and episode lengths; an episode ends by termination or truncation with equal odds.

    The first number of an observation is unique to its step, so that a transition can be found again.
    """

    def __init__(
        self,
        action_space: spaces.Space,
        is_dict: bool = False,
        seed: int = 0,
        max_length: int = 12,
        truncation_probability: float = 0.5,
        always_valid: bool = False,
    ) -> None:
        box = spaces.Box(-np.inf, np.inf, (3,))
        self.action_space = action_space
        self.observation_space = spaces.Dict({"id": box, "other": spaces.Discrete(4)}) if is_dict else box
        self.rng = np.random.default_rng(seed)
        self.is_dict = is_dict
        self.max_length = max_length
        self.truncation_probability = truncation_probability
        self.always_valid = always_valid
        self.n_invalid_actions = 0
        self.masks: list[np.ndarray] = []

    def _observe(self) -> Any:
        if not isinstance(self.action_space, spaces.Box):
            self.masks = [self._draw_mask(n_choices) for n_choices in count_choices(self.action_space)]
        observation = self.rng.standard_normal(3, dtype=np.float32)
        return {"id": observation, "other": int(self.rng.integers(4))} if self.is_dict else observation

    def _draw_mask(self, n_choices: int) -> np.ndarray:
        mask = self.rng.random(n_choices) < 0.5
        mask[self.rng.integers(n_choices)] = True
        return mask | self.always_valid

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.steps_left = int(self.rng.integers(1, self.max_length + 1))
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        choices = zip(self.masks, np.atleast_1d(action), strict=True) if self.masks else ()
        self.n_invalid_actions += sum(not mask[int(choice)] for mask, choice in choices)
        self.steps_left -= 1
        is_over = self.steps_left == 0
        is_truncated = is_over and bool(self.rng.random() < self.truncation_probability)
        return self._observe(), float(self.rng.normal()), is_over and not is_truncated, is_truncated, {}

    def action_masks(self) -> np.ndarray:
        return np.concatenate(self.masks)


def make_random_envs(action_space: spaces.Space, n_envs: int = 1, seed: int = 0, **kwargs: Any) -> DummyVecEnv:
    """A vectorised :class:`RandomEnv`."""
    return DummyVecEnv(
        [lambda rank=rank: RandomEnv(action_space, seed=1000 * seed + rank, **kwargs) for rank in range(n_envs)]
    )


def randomize(policy: th.nn.Module, scale: float = 0.5, seed: int = 0) -> None:
    """Large random parameters: those that training starts from hardly tell two inputs apart."""
    generator = th.Generator().manual_seed(seed)
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(scale * th.randn(parameter.shape, generator=generator))


class LogProbCheck(BaseCallback):
    """
    Compares the log-probabilities under the distributions that actions were really sampled from with what training
    recomputes from the buffer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sampled: dict[bytes, float] = {}
        self.n_compared = 0

    @staticmethod
    def _id(observations: Any) -> np.ndarray:
        return observations["id"] if isinstance(observations, dict) else observations

    def _on_step(self) -> bool:
        # `proba_distribution` changes the object in place, so this is still the one that the torch actor sampled from
        distribution = self.model.policy.action_dist
        with th.no_grad():
            actor = self.model._actor
            if isinstance(actor, NumpyActor):
                _, logits = actor.latent_and_output(self.model._last_obs)
                distribution = distribution.proba_distribution(action_logits=th.as_tensor(logits))
                distribution.apply_masking(self.locals["policy_inputs"].get("action_masks"))
            log_probs = distribution.log_prob(th.as_tensor(self.locals["actions"])).numpy()
        # The observation acted on, which the algorithm replaces after this callback
        for observation, log_prob in zip(self._id(self.model._last_obs), log_probs, strict=True):
            self.sampled[observation.tobytes()] = float(log_prob)
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        observations = self._id(buffer.observations)[:, 0]
        expected = [self.sampled.pop(observation.tobytes()) for observation in observations]
        np.testing.assert_allclose(buffer.log_probs[:, 0], expected, atol=1e-5, rtol=1e-5)
        self.n_compared += len(expected)


class GradientRecord:
    """Keeps the gradient of every update of a model."""

    def __init__(self, model: Any) -> None:
        self.gradients: list[dict[str, th.Tensor]] = []
        self.policy = model.policy
        self.policy.optimizer.register_step_pre_hook(self._record)

    def _record(self, *_: Any) -> None:
        self.gradients.append(
            {name: parameter.grad.clone() for name, parameter in self.policy.named_parameters() if parameter.grad is not None}
        )
