"""
How actions are sampled while collecting.

Values and log-probabilities are not needed there (training recomputes them), so only the actor's path is run. In a small
network nearly all the time of a torch forward pass is the overhead of calls, of which NumPy has little. So there are two
actors, which sample from the same distribution.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.distributions import (
    MaskableBernoulliDistribution,
    MaskableCategoricalDistribution,
    MaskableMultiCategoricalDistribution,
)
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import LinearSchedule, obs_as_tensor
from torch import nn

from sb3_episodic_a2c.plain_mlp import (
    BYPASSED,
    Array,
    PlainMlp,
    base_class,
    inspect,
    is_compiled,
    numpy_layers,
    overridden_methods,
    run_layers,
    to_numpy,
)

ActorChoice = Literal["auto", "numpy", "torch"]

TOO_LARGE = (
    "The policy gave numbers that are not finite, though its parameters and the observations are finite: they are too large. "
    "Lower `learning_rate`, set `max_grad_norm`, or normalize the observations with "
    "stable_baselines3.common.vec_env.VecNormalize."
)

NOISE_BLOCK = 512
"""How many random numbers are drawn at once."""

INDEPENDENT = 1.0
"""The probability that an environment gets new noise at a step, where every action is sampled on its own."""

Sampler = Callable[[Array, Array, dict[str, Array]], Array]
"""``(output of action_net (n, k), latent of the actor (n, d), policy inputs) -> actions``."""


class Actor(Protocol):
    """Samples actions from the current policy."""

    name: ClassVar[str]
    noise_resample_prob: float
    """Probability that an environment gets new noise at a step. Set before a rollout, which starts with new noise."""

    @property
    def policy(self) -> ActorCriticPolicy:
        """The policy that is sampled from."""

    def refresh(self, plain: PlainMlp | str, noise_resample_prob: float) -> bool:
        """
        Follow changes of the policy. Called before every rollout.

        :param plain: What :func:`~sb3_episodic_a2c.plain_mlp.inspect` returned for it
        :param noise_resample_prob: What the noise of the rollout is to be
        :return: Whether this actor can still do what the policy does, with such noise
        """

    def sample(self, observations: Array | dict[str, Array], policy_inputs: dict[str, Array]) -> Array:
        """
        :param observations: ``(n_envs, *obs_shape)``, or a dict of such arrays
        :param policy_inputs: What the policy is given in addition to the observation, ``(n_envs, ...)`` each
        :return: ``(n_envs, *action_shape)`` actions as sampled: neither clipped nor unscaled
        """
        ...


def check_finite(numbers: Array) -> Array:
    """
    Refuse numbers that are not finite. torch's distributions check their arguments for NaN only.

    :param numbers: Actions, or what they are drawn from
    :return: The same
    :raises ValueError: They are floats, and not all of them finite
    """
    if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
        raise ValueError(TOO_LARGE)
    return numbers


def action_bounds(space: spaces.Space) -> tuple[Array, Array] | None:
    """
    :param space: An action space
    :return: Low and high of a Box, ``(1, *action_shape)`` each, as NumPy is twice as slow where numbers of dimensions differ;
        None for other spaces
    """
    return (space.low[None], space.high[None]) if isinstance(space, spaces.Box) else None


def to_env_actions(actions: Array, policy: ActorCriticPolicy, bounds: tuple[Array, Array] | None) -> Array:
    """
    The actions, as sampled from the distribution, that an environment accepts.

    :param actions: ``(n_envs, *action_shape)``
    :param policy: The policy that they come from
    :param bounds: Low and high of a Box, ``(1, *action_shape)`` each; None for other spaces
    :return: The same, clipped or unscaled
    """
    if bounds is None:
        return actions
    if policy.squash_output:
        # Unscale the actions to match env bounds if they were previously squashed (scaled in [-1, 1])
        return policy.unscale_action(actions)
    # A Gaussian is unbounded
    low, high = bounds
    return np.minimum(np.maximum(actions, low), high)


@contextmanager
def refusing_too_large() -> Iterator[None]:
    """
    Turn the errors of torch's distributions about numbers that are not finite into one with a remedy.

    :raises ValueError: The numbers to sample from are not finite
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        # The messages of validation, of sampling from a categorical, and of sampling from a Bernoulli distribution
        if any(words in str(error) for words in ("Expected parameter", "probability tensor contains", "Expected p_in")):
            raise ValueError(TOO_LARGE) from error
        raise


class TorchActor:
    """
    Samples from ``policy.get_distribution``: any policy, any observation and action space.

    :param policy: The policy to sample from
    """

    name: ClassVar[str] = "torch"

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self._policy = policy
        self.noise_resample_prob = INDEPENDENT

    @property
    def policy(self) -> ActorCriticPolicy:
        return self._policy

    def refresh(self, plain: PlainMlp | str, noise_resample_prob: float) -> bool:
        """The policy itself is run, but noise cannot persist."""
        return noise_resample_prob == INDEPENDENT

    def sample(self, observations: Array | dict[str, Array], policy_inputs: dict[str, Array]) -> Array:
        inputs: dict[str, Any] = policy_inputs
        policy: Any = self.policy
        tensor = obs_as_tensor(observations, policy.device)
        # Not inference mode: modules may keep tensors, and training could not use these
        with th.no_grad(), refusing_too_large():
            if is_compiled(policy) or overridden_methods(policy, base_class(policy), BYPASSED["distribution"]):
                # `get_distribution` would bypass them
                actions = policy(tensor, **inputs)[0]
            else:
                # It runs the actor alone
                actions = policy.get_distribution(tensor, **inputs).get_actions()
            return check_finite(actions.reshape(-1, *policy.action_space.shape).cpu().numpy())


class NumpyActor:
    """
    Samples in NumPy from an MLP policy on any observations but images.

    On the CPU it works on views of the torch parameters, which share their memory and so follow every optimizer step at no
    cost; a parameter that was replaced is noticed at the next action. On another device it works on copies, made at every
    rollout. Modules that were replaced are noticed at the next rollout.

    Noise may persist: then an environment keeps what its actions are drawn with, for a random number of steps. Each single
    action still has the policy's own distribution, but those of neighbouring steps are alike.

    :param plain: The layers of the policy to sample from
    :param rng: Source of the random numbers (gSDE's come from torch)
    """

    name: ClassVar[str] = "numpy"

    def __init__(self, plain: PlainMlp, rng: np.random.Generator) -> None:
        self.plain = plain
        self.rng = rng
        self.noise_resample_prob = INDEPENDENT
        self._is_compiled = is_compiled(plain.policy)
        self._view_parameters()

    @property
    def policy(self) -> ActorCriticPolicy:
        """The policy that is sampled from."""
        return self.plain.policy

    def __reduce__(self) -> tuple[Callable[..., "NumpyActor"], tuple[ActorCriticPolicy, np.random.Generator]]:
        # Everything else follows from these, and belongs to the memory of this process
        return _unpickle_numpy_actor, (self.policy, self.rng)

    def refresh(self, plain: PlainMlp | str, noise_resample_prob: float) -> bool:
        if isinstance(plain, str) or reason_against_numpy(plain) is not None or is_compiled(plain.policy) != self._is_compiled:
            return False
        if noise_resample_prob != INDEPENDENT and has_gsde(plain.policy):
            return False
        self.plain = plain
        self._view_parameters()
        return True

    def _view_parameters(self) -> None:
        """View or copy the parameters of the actor's layers."""
        *hidden, action_net = self.plain.actor
        self._addresses = self.plain.addresses()
        self._layers = numpy_layers(hidden)
        self._action_net = numpy_layers([action_net])
        self._starts_with_activation = not isinstance(self.plain.actor[0], nn.Linear)
        self._has_flat_observations = isinstance(self.policy.observation_space, spaces.Box)
        is_gaussian = type(self.policy.action_dist) is DiagGaussianDistribution
        # With as many dimensions as a batch of actions: NumPy is twice as slow where these differ
        self._log_std = to_numpy(self.policy.log_std)[None] if is_gaussian else None
        self._sample, self._draw = self._make_sampler()
        action_space: Any = self.policy.action_space
        self._is_continuous = isinstance(action_space, spaces.Box)
        # None where the policy's flat actions have the space's shape
        self._action_shape = action_space.shape if self._is_continuous and len(action_space.shape) != 1 else None
        # Drop noise that was drawn ahead, so that a rollout depends only on the generator's state at its start
        self._noise_left: list[Array] = []
        self._held_noise: Array | None = None

    def latent_and_output(self, observations: Array | dict[str, Array]) -> tuple[Array, Array]:
        """
        The forward pass of the actor.

        :param observations: ``(n, *obs_shape)``, or a dict of such arrays
        :return: The latent, ``(n, latent_dim)`` or for ``n = 1`` ``(latent_dim,)``, and the output of ``action_net``
            ``(n, k)``: logits or means, float32
        """
        if self.plain.addresses() != self._addresses:
            self._view_parameters()
        if not self._has_flat_observations or isinstance(observations, dict):
            observations = self.plain.numbers.array(observations)
        n = len(observations)
        # Vectors for a single observation: NumPy adds a vector to a vector three times faster than to a matrix of one row
        hidden = observations.reshape(-1) if n == 1 else observations.reshape(n, -1)
        if hidden.dtype != np.float32 or self._starts_with_activation:
            # A copy also in the latter case, as the activation writes into it
            hidden = hidden.astype(np.float32)
        hidden = run_layers(self._layers, hidden)
        return hidden, run_layers(self._action_net, hidden).reshape(n, -1)

    def sample(self, observations: Array | dict[str, Array], policy_inputs: dict[str, Array]) -> Array:
        # OpenBLAS may flag an invalid operation where there was none, and with np.seterr(all="raise") a product as small as
        # zero raises. What is not finite is refused below
        with np.errstate(all="ignore"):
            return self._sample_actions(observations, policy_inputs)

    def _sample_actions(self, observations: Array | dict[str, Array], policy_inputs: dict[str, Array]) -> Array:
        latent, output = self.latent_and_output(observations)
        actions = self._sample(output, latent, policy_inputs)
        # Discrete actions are finite whatever they were drawn from
        tested = (actions if self._is_continuous else output).ravel()
        # One dot product nearly always decides; where it overflows, check each number
        if not tested.dot(tested) < math.inf:
            check_finite(tested)
        return actions

    # ------------------------------------------------------------------ distributions

    def _make_sampler(self) -> tuple[Sampler, Callable[[tuple[int, ...]], Array]]:
        """How an action follows from the output of ``action_net``, and the noise of a given shape that this takes."""
        action_dist: Any = self.policy.action_dist
        sample, draw = SAMPLERS[type(action_dist)]
        if sample is NumpyActor._sample_multi_categorical:
            ends = np.cumsum(action_dist.action_dims).tolist()
            self._parts = [slice(end - n, end) for end, n in zip(ends, action_dist.action_dims, strict=True)]
        return partial(sample, self), partial(draw, self)

    def _draw_gumbel(self, shape: tuple[int, ...]) -> Array:
        # The negative logarithm of an exponential variate is a Gumbel variate. Drawn in double precision, for its tails, and
        # then cast, as NumPy is slow to mix the two
        return -np.log(self.rng.standard_exponential(shape)).astype(np.float32)

    def _draw_logistic(self, shape: tuple[int, ...]) -> Array:
        return self.rng.logistic(size=shape).astype(np.float32)

    def _draw_normal(self, shape: tuple[int, ...]) -> Array:
        return self.rng.standard_normal(shape, dtype=np.float32)

    def _noise(self, shape: tuple[int, ...]) -> Array:
        """Noise of the distribution, ``shape``. It is drawn for many steps at once, which costs little more than for one."""
        if not self._noise_left or self._noise_left[-1].shape != shape:
            n_steps = max(1, NOISE_BLOCK // math.prod(shape))
            self._noise_left = list(self._draw((n_steps, *shape)))
        noise = self._noise_left.pop()
        return noise if self.noise_resample_prob >= INDEPENDENT else self._hold(noise)

    def _hold(self, noise: Array) -> Array:
        """The noise of the step before, except in the environments whose turn it is to get this one, ``(n_envs, k)``."""
        held = self._held_noise
        if held is None or held.shape != noise.shape:
            held = self._held_noise = noise
        else:
            is_new = self.rng.random(len(noise)) < self.noise_resample_prob
            held[is_new] = noise[is_new]
        return held

    def _perturb(self, logits: Array, policy_inputs: dict[str, Array]) -> Array:
        """
        Logits plus Gumbel noise: the largest is that of an action sampled from their softmax
        (Gumbel, 1954; https://arxiv.org/abs/1411.0030).
        """
        action_masks = policy_inputs.get("action_masks")
        if action_masks is not None:
            # Below any logit, which sb3-contrib's -1e8 is not
            logits = np.where(action_masks.reshape(logits.shape), logits, np.float32(-np.inf))
        return logits + self._noise(logits.shape)

    def _sample_categorical(self, logits: Array, latent: Array, policy_inputs: dict[str, Array]) -> Array:
        return self._perturb(logits, policy_inputs).argmax(axis=1)

    def _sample_multi_categorical(self, logits: Array, latent: Array, policy_inputs: dict[str, Array]) -> Array:
        perturbed = self._perturb(logits, policy_inputs)
        return np.stack([perturbed[:, part].argmax(axis=1) for part in self._parts], axis=1)

    def _sample_bernoulli(self, logits: Array, latent: Array, policy_inputs: dict[str, Array]) -> Array:
        # A logistic variate is below the logit with the probability sigmoid(logit)
        return (self._noise(logits.shape) < logits).astype(np.float32)

    def _sample_gaussian(self, means: Array, latent: Array, policy_inputs: dict[str, Array]) -> Array:
        actions = self._noise(means.shape) * np.exp(self._log_std)  # type: ignore[arg-type]  # set for a Gaussian
        actions += means
        return self._as_actions(actions)

    def _sample_gsde(self, means: Array, latent: Array, policy_inputs: dict[str, Array]) -> Array:
        # As StateDependentNoiseDistribution.get_noise; `reset_noise` sets new matrices
        action_dist: Any = self.policy.action_dist
        matrices = action_dist.exploration_matrices
        if len(means) == 1 or len(means) != len(matrices):
            noise = latent.reshape(len(means), -1) @ to_numpy(action_dist.exploration_mat)
        else:
            noise = np.matmul(latent[:, None], to_numpy(matrices))[:, 0]
        actions = means + noise
        if action_dist.bijector is not None:
            actions = np.tanh(actions)
        return self._as_actions(actions)

    def _as_actions(self, flat_actions: Array) -> Array:
        """In the shape of the action space, from ``(n, action_dim)``."""
        return flat_actions if self._action_shape is None else flat_actions.reshape(-1, *self._action_shape)


SAMPLERS: dict[type[Distribution], tuple[Callable[..., Array], Callable[..., Array]]] = {
    CategoricalDistribution: (NumpyActor._sample_categorical, NumpyActor._draw_gumbel),
    MaskableCategoricalDistribution: (NumpyActor._sample_categorical, NumpyActor._draw_gumbel),
    MultiCategoricalDistribution: (NumpyActor._sample_multi_categorical, NumpyActor._draw_gumbel),
    MaskableMultiCategoricalDistribution: (NumpyActor._sample_multi_categorical, NumpyActor._draw_gumbel),
    # One categorical of two values for each bit
    MaskableBernoulliDistribution: (NumpyActor._sample_multi_categorical, NumpyActor._draw_gumbel),
    BernoulliDistribution: (NumpyActor._sample_bernoulli, NumpyActor._draw_logistic),
    DiagGaussianDistribution: (NumpyActor._sample_gaussian, NumpyActor._draw_normal),
    # Its noise comes from the policy's exploration matrices
    StateDependentNoiseDistribution: (NumpyActor._sample_gsde, NumpyActor._draw_normal),
}
"""How :class:`NumpyActor` samples from a distribution: a :data:`Sampler`, and what draws its noise."""


def has_gsde(policy: ActorCriticPolicy) -> bool:
    """
    :param policy: A policy
    :return: Whether its noise depends on the state
    """
    return type(policy.action_dist) is StateDependentNoiseDistribution


def reason_against_numpy(plain: PlainMlp | str) -> str | None:
    """
    :param plain: What :func:`~sb3_episodic_a2c.plain_mlp.inspect` says of a policy
    :return: Why NumPy cannot sample from it; None if it can
    """
    if isinstance(plain, str):
        return plain
    # Exact types: a squashed Gaussian is a subclass of a Gaussian
    distribution = type(plain.policy.action_dist)
    return None if distribution in SAMPLERS else f"the distribution is a {distribution.__name__}"


def noise_schedule(noise_resample_prob: float | Schedule) -> Schedule:
    """
    Persistent noise helps an agent to find what it has never seen; learning it well then takes independent noise.

    :param noise_resample_prob: A number, which rises linearly to 1 until half of the training is over; or a schedule
    :return: The probability that an environment gets new noise at a step, from the progress remaining
    """
    return noise_resample_prob if callable(noise_resample_prob) else LinearSchedule(noise_resample_prob, INDEPENDENT, 0.5)


def make_actor(
    policy: ActorCriticPolicy,
    choice: ActorChoice,
    rng: np.random.Generator,
    noise_resample_prob: float | Schedule = INDEPENDENT,
) -> Actor:
    """
    :param policy: The policy to sample from
    :param choice: ``"auto"``: NumPy where it is possible, otherwise torch; or one of these by name
    :param rng: Source of the random numbers of the NumPy actor
    :param noise_resample_prob: Unless it is 1, noise is to persist, which the NumPy actor alone can do
    :return: The actor
    :raises ValueError: ``choice`` is ``"numpy"``, or noise is to persist, but NumPy is not possible
    """
    plain = inspect(policy)
    reason = reason_against_numpy(plain)
    if noise_resample_prob != INDEPENDENT:
        remedy = "Leave it at 1.0"
        if reason is None and choice == "torch":
            reason, remedy = 'actor="torch" was asked for', f'{remedy}, or use actor="auto"'
        elif reason is None and has_gsde(policy):
            reason = "gSDE has noise of its own, which persists for `sde_sample_freq` steps"
        if reason is not None:
            raise ValueError(
                f"`noise_resample_prob` is {noise_resample_prob!r}, but noise persists only with the NumPy actor, and "
                f"{reason}. {remedy}."
            )
        choice = "numpy"
    if choice == "numpy" and reason is not None:
        raise ValueError(f'`actor` is "numpy", but {reason}. Use actor="auto" or "torch".')
    if choice == "torch" or isinstance(plain, str) or reason is not None or (choice == "auto" and is_compiled(policy)):
        return TorchActor(policy)
    return NumpyActor(plain, rng)


def _unpickle_numpy_actor(policy: ActorCriticPolicy, rng: np.random.Generator) -> NumpyActor:
    plain = inspect(policy)
    assert isinstance(plain, PlainMlp)
    return NumpyActor(plain, rng)
