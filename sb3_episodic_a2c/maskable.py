"""Episodic A2C that never chooses an invalid action."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.maskable.utils import EXPECTED_METHOD_NAME, is_masking_supported
from sb3_contrib.ppo_mask.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_episodic_a2c.episodic_a2c import EpisodicA2C
from sb3_episodic_a2c.vector import NO_ENVS, GymnasiumVecEnv


class MaskableEpisodicA2C(EpisodicA2C):
    """
    Episodic A2C with invalid action masking (Huang & Ontañón, 2020, https://arxiv.org/abs/2006.14171).

    At every step the environment tells which actions are valid, through a method ``action_masks()`` of its own or the one of
    ``sb3_contrib.common.wrappers.ActionMasker``: ``(n,)`` for ``Discrete(n)``, ``(sum(nvec),)`` for ``MultiDiscrete(nvec)``,
    ``(2 * n,)`` for ``MultiBinary(n)`` (0 allowed, 1 allowed, for each bit). Masks are booleans, or ones and zeros; anything
    else is refused. They are stored with the step, so training sees the distribution that was sampled from.

    Where it differs from :class:`EpisodicA2C`: sb3-contrib's maskable policies, which have neither continuous actions nor
    gSDE; ``predict`` takes ``action_masks``. ``EpisodicA2C`` refuses these policies, because it would train them without
    masks. Where it differs from MaskablePPO: ``use_masking`` is an argument of the constructor, not of ``learn``, so it is
    saved with the model; a state with no valid action is refused, not sampled from at random.

    sb3-contrib's ``MaskableEvalCallback`` and its ``evaluate_policy`` work.

    All other arguments are those of :class:`EpisodicA2C`.

    :param policy: The policy model to use (``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``, or a subclass of
        sb3-contrib's ``MaskableActorCriticPolicy``)
    :param use_masking: Whether to ask the environment for masks in training. False: as :class:`EpisodicA2C`
    :raises ValueError: As :class:`EpisodicA2C`. In ``learn``: the environment has no masks, its masks do not fit its action
        space, or a state has no valid action
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    supported_action_spaces: ClassVar[tuple[type[spaces.Space], ...]] = (
        spaces.Discrete,
        spaces.MultiDiscrete,
        spaces.MultiBinary,
    )
    _policy_base_class: ClassVar[type[BasePolicy]] = MaskableActorCriticPolicy
    policy: MaskableActorCriticPolicy  # type: ignore[assignment]  # not a subclass of SB3's

    def __init__(
        self,
        policy: str | type[MaskableActorCriticPolicy],
        env: GymEnv | str,
        *args: Any,
        use_masking: bool = True,
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        # The policy is no subclass of SB3's; the last argument of the base class is never given by position
        super().__init__(policy, env, *args, _init_setup_model=False, **kwargs)  # type: ignore[arg-type,misc]  # as said above
        self.use_masking = use_masking

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        if not isinstance(self.use_masking, bool):
            raise ValueError(f"`use_masking` is {self.use_masking!r}. It must be True or False.")
        if not issubclass(self.policy_class, MaskableActorCriticPolicy):
            raise ValueError(
                f"`policy` {self.policy_class.__name__} knows no action masks: use one of {sorted(self.policy_aliases)}, or a "
                "subclass of sb3_contrib.common.maskable.policies.MaskableActorCriticPolicy."
            )
        super()._setup_model()
        self._n_choices = _count_choices(self.action_space)
        """Actions to choose from in each dimension of the action space: the mask has one entry for each of them."""

    def _start_rollout(self, env: VecEnv) -> None:
        if self.use_masking and not is_masking_supported(env):
            raise ValueError(
                "`env` has no method `action_masks`: add it, wrap each environment in "
                "sb3_contrib.common.wrappers.ActionMasker, or set use_masking=False."
            )

    def _policy_inputs(self, env: VecEnv) -> dict[str, np.ndarray]:
        if not self.use_masking:
            return {}
        vector_env = env.unwrapped
        # A state after the end of an episode may allow no action
        ignored = vector_env.pending if isinstance(vector_env, GymnasiumVecEnv) else NO_ENVS
        return {"action_masks": _stack_masks(env.env_method(EXPECTED_METHOD_NAME), self._n_choices, ignored)}

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Get the policy action from an observation.

        :param observation: ``(*obs_shape)`` or ``(n_envs, *obs_shape)``, or a dict of such arrays
        :param state: Ignored and returned: the policy has no memory
        :param episode_start: Ignored
        :param deterministic: Whether to return the most probable action instead of a sample
        :param action_masks: The valid actions, ``(n,)`` or ``(n_envs, n)``; None: all actions
        :return: the action, ``(*action_shape)`` or ``(n_envs, *action_shape)``, and ``state``
        """
        return self.policy.predict(observation, state, episode_start, deterministic, action_masks=action_masks)


def _count_choices(action_space: spaces.Space) -> np.ndarray:
    """Number of actions to choose from in each dimension of the action space, ``(n_dimensions,)``."""
    if isinstance(action_space, spaces.Discrete):
        return np.array([action_space.n])
    if isinstance(action_space, spaces.MultiDiscrete):
        return np.asarray(action_space.nvec)
    assert isinstance(action_space, spaces.MultiBinary)
    return np.full(action_space.shape, 2)


def _stack_masks(masks: Sequence[Any], n_choices: np.ndarray, ignored: np.ndarray = NO_ENVS) -> np.ndarray:
    """
    Stack the masks of all environments, and refuse those that do not fit the action space or allow no action.

    :param masks: What ``action_masks()`` of each environment returned
    :param n_choices: ``(n_dimensions,)`` actions to choose from in each dimension of the action space
    :param ignored: Environments that will ignore their action: all are valid there
    :return: ``(n_envs, n_choices.sum())`` booleans
    :raises ValueError: It names the environment and the remedy
    """
    action_masks = np.empty((len(masks), int(n_choices.sum())), dtype=bool)
    if isinstance(masks, np.ndarray) and masks.dtype == bool and masks.shape == action_masks.shape:
        # Those of a vector environment, without a look at each
        action_masks[:] = masks
        masks = ()
    for env_index, mask in enumerate(masks):
        try:
            array = np.asarray(mask)
        except ValueError:
            # Nested lists of different lengths
            array = np.empty(0, dtype=object)
        is_number = array.dtype.kind in "biuf"
        if not is_number or array.size != action_masks.shape[1]:
            returned = f"{array.size} entries" if is_number else repr(mask)
            raise ValueError(
                f"`action_masks()` of environment {env_index} returned {returned}, but its action space has "
                f"{action_masks.shape[1]} (choices in each dimension: {n_choices.tolist()}): return one array with one "
                "boolean for each of them."
            )
        if array.dtype != bool and not np.isin(array, (0, 1)).all():
            # For example terms to add to the logits, 0 and -1e8, whose meaning is the opposite
            raise ValueError(
                f"`action_masks()` of environment {env_index} returned {mask!r}: return booleans, True where the action is "
                "valid, or 1 and 0."
            )
        action_masks[env_index] = array.ravel()
    action_masks[ignored] = True
    has_choice = np.logical_or.reduceat(action_masks, np.cumsum(n_choices) - n_choices, axis=1)
    if not has_choice.all():
        # All logits would be equal, and an invalid action would be sampled at random
        env_index, dimension = np.argwhere(~has_choice)[0]
        raise ValueError(
            f"`action_masks()` of environment {env_index} allows no action in dimension {dimension}: end the episode in "
            "such a state, or let an action that does nothing be valid there."
        )
    return action_masks
