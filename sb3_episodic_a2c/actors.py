"""
How actions are sampled while collecting.

Values and log-probabilities are not needed there (training recomputes them), so only the actor's path is run. For a small
network nearly all the time of a torch forward pass is overhead, call by call, of which NumPy has little: hence two actors that
sample from one distribution.
"""

import math
from collections.abc import Callable, Iterable, Iterator
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
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn

from sb3_episodic_a2c.policies import SharedMlpExtractor

ActorChoice = Literal["auto", "numpy", "torch"]

TOO_LARGE = (
    "The policy gave numbers that are not finite, though its parameters and the observations are: they are too large. "
    "Lower `learning_rate`, set `max_grad_norm`, or normalize the observations with "
    "stable_baselines3.common.vec_env.VecNormalize."
)

NOISE_BLOCK = 512
"""Random numbers that are drawn at once."""

PATCHABLE = {"forward", "forward_actor", "extract_features", "get_distribution", "_get_action_dist_from_latent"}
"""Methods that an action passes, where somebody may have put another one on the object itself."""

Array = np.ndarray
Sampler = Callable[[Array, Array, dict[str, Array]], Array]
"""``(output of action_net (n, k), latent of the actor (n, d), policy inputs) -> actions``."""


class Actor(Protocol):
    """Samples actions from the current policy."""

    name: ClassVar[str]
    policy: ActorCriticPolicy

    def refresh(self, reason: str | None) -> bool:
        """
        Look at the policy again: called before every rollout.

        :param reason: What :func:`reason_against_numpy` says of it
        :return: Whether this actor can still do what the policy does
        """

    def sample(self, observations: Array | dict[str, Array], policy_inputs: dict[str, Array]) -> Array:
        """
        :param observations: ``(n_envs, *obs_shape)``, or a dict of such arrays
        :param policy_inputs: What the policy is given beside the observation, ``(n_envs, ...)`` each
        :return: ``(n_envs, *action_shape)`` actions as sampled: neither clipped nor unscaled
        """
        ...


def check_finite(numbers: Array) -> Array:
    """
    Refuse what must not reach an environment. Those of torch's distributions that check their arguments do so for NaN only.

    :param numbers: Actions, or what they are drawn from
    :return: The same
    :raises ValueError: They are floats, and not all of them finite
    """
    if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
        raise ValueError(TOO_LARGE)
    return numbers


@contextmanager
def unvalidated(device: th.device) -> Iterator[None]:
    """
    Let torch's distributions take their arguments as they are, which saves a tenth of the time of a small policy.

    What is not finite is refused all the same: by torch where it samples discrete actions, else by :func:`check_finite`.
    Only on the CPU: a GPU's own check of what it samples from leaves it unusable. The setting is torch's, one for all threads.

    :param device: Device that the policy is on
    :raises ValueError: What was to be sampled from is not finite
    """
    # Torch offers to set it, not to ask for it
    before = th.distributions.Distribution._validate_args
    try:
        th.distributions.Distribution.set_default_validate_args(before and device.type != "cpu")
        yield
    except RuntimeError as error:
        # Of the categorical and of Bernoulli's distribution
        if any(words in str(error) for words in ("probability tensor contains", "Expected p_in")):
            raise ValueError(TOO_LARGE) from error
        raise
    finally:
        th.distributions.Distribution.set_default_validate_args(before)


class TorchActor:
    """
    Samples from ``policy.get_distribution``: any policy, any observation and action space.

    :param policy: The policy to sample from
    """

    name: ClassVar[str] = "torch"

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self.policy = policy

    def refresh(self, reason: str | None) -> bool:
        """Nothing to do: the policy itself is run."""
        return True

    def sample(self, observations: Array | dict[str, Array], policy_inputs: dict[str, Array]) -> Array:
        inputs: dict[str, Any] = policy_inputs
        policy: Any = self.policy
        device = policy.device
        tensor = obs_as_tensor(observations, device)
        with th.inference_mode(), unvalidated(device):
            base = ActorCriticPolicy if isinstance(policy, ActorCriticPolicy) else MaskableActorCriticPolicy
            if overridden_methods(policy, base, ("forward", "extract_features")):
                # Somebody samples in a way of his own, or extracts features so, which `get_distribution` leaves out
                actions = policy(tensor, **inputs)[0]
            else:
                # Its actor alone
                actions = policy.get_distribution(tensor, **inputs).get_actions()
            return check_finite(actions.reshape(-1, *policy.action_space.shape).cpu().numpy())


class NumpyActor:
    """
    Samples in NumPy from an MLP policy on flat observations.

    On the CPU it works on views of the torch parameters, which share their memory and so follow every optimizer step at no
    cost; a parameter that was replaced is noticed at the next action. On another device it works on copies, made anew at every
    rollout. Modules that were replaced are noticed at the next rollout.

    :param policy: The policy to sample from, one for which :func:`reason_against_numpy` has none
    :param rng: Source of the random numbers (gSDE's come from torch)
    """

    name: ClassVar[str] = "numpy"

    def __init__(self, policy: ActorCriticPolicy, rng: np.random.Generator) -> None:
        self.policy = policy
        self.rng = rng
        self._view_parameters()

    def __reduce__(self) -> tuple[type["NumpyActor"], tuple[ActorCriticPolicy, np.random.Generator]]:
        # All else follows from these, and belongs to the memory of this process
        return NumpyActor, (self.policy, self.rng)

    def refresh(self, reason: str | None) -> bool:
        """Look at the modules of the policy again, which may be others by now, or no longer what NumPy can do."""
        if reason is not None:
            return False
        self._view_parameters()
        return True

    def _view_parameters(self) -> None:
        """Find the layers of the policy, and view or copy their parameters."""
        modules = _actor_modules(self.policy)
        # Where the parameters hang, not the parameters: one may be replaced by another object
        self._slots = [
            (module._parameters, name)
            for module in modules
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        log_std = self.policy._parameters.get("log_std")
        if log_std is not None:
            self._slots.append((self.policy._parameters, "log_std"))
        self._shares_memory = _is_shareable(modules[-1])
        self._fingerprint = self._take_fingerprint()

        self._layers = numpy_layers(modules[:-1])
        self._action_net = numpy_layers(modules[-1:])
        self._starts_with_activation = not isinstance(modules[0], nn.Linear)
        # Of as many dimensions as a batch of actions: NumPy is twice as slow where these differ
        self._log_std = None if log_std is None else _to_numpy(log_std)[None]
        self._sample, self._draw = self._make_sampler()
        action_space: Any = self.policy.action_space
        self._is_continuous = isinstance(action_space, spaces.Box)
        # None where the policy's flat actions are of the space's shape
        self._action_shape = action_space.shape if self._is_continuous and len(action_space.shape) != 1 else None
        # Noise that was drawn ahead is dropped, so that a rollout depends on the generator's state at its start only
        self._noise_left: list[Array] = []

    def _take_fingerprint(self) -> list[int]:
        """Changes when the arrays taken from the parameters are not the parameters any more."""
        if self._shares_memory:
            # Views follow what is written into their tensor. They keep its memory alive, so no other gets its address
            return [parameters[name].data_ptr() for parameters, name in self._slots]  # type: ignore[union-attr]
        current: list[Any] = [parameters[name] for parameters, name in self._slots]
        return [number for parameter in current for number in (parameter.data_ptr(), parameter._version)]

    def latent_and_output(self, observations: Array) -> tuple[Array, Array]:
        """
        The forward pass of the actor.

        :param observations: ``(n, *obs_shape)``
        :return: The latent, ``(n, latent_dim)`` or for ``n = 1`` ``(latent_dim,)``, and the output of ``action_net``
            ``(n, k)``: logits or means, float32
        """
        if self._take_fingerprint() != self._fingerprint:
            self._view_parameters()
        n = len(observations)
        # Vectors for a single observation: NumPy adds a vector to a vector three times faster than to a matrix of one row
        hidden = observations.reshape(-1) if n == 1 else observations.reshape(n, -1)
        if hidden.dtype != np.float32 or self._starts_with_activation:
            # In the latter case a copy: the activation writes into it
            hidden = hidden.astype(np.float32)
        hidden = run_layers(self._layers, hidden)
        return hidden, run_layers(self._action_net, hidden).reshape(n, -1)

    def sample(self, observations: Array | dict[str, Array], policy_inputs: dict[str, Array]) -> Array:
        assert isinstance(observations, np.ndarray)
        latent, output = self.latent_and_output(observations)
        actions = self._sample(output, latent, policy_inputs)
        # Discrete actions are numbers like any other, whatever they were drawn from
        tested = (actions if self._is_continuous else output).ravel()
        # One dot product tells nearly always; where it overflows, each number is looked at
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
        return self._noise_left.pop()

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
        actions = self._noise(means.shape) * np.exp(self._log_std)  # type: ignore[arg-type]
        actions += means
        return self._as_actions(actions)

    def _sample_gsde(self, means: Array, latent: Array, policy_inputs: dict[str, Array]) -> Array:
        # As StateDependentNoiseDistribution.get_noise; `reset_noise` puts new matrices there
        action_dist: Any = self.policy.action_dist
        matrices = action_dist.exploration_matrices
        if len(means) == 1 or len(means) != len(matrices):
            noise = latent.reshape(len(means), -1) @ _to_numpy(action_dist.exploration_mat)
        else:
            noise = np.matmul(latent[:, None], _to_numpy(matrices))[:, 0]
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
    # A multi-categorical one of two values each
    MaskableBernoulliDistribution: (NumpyActor._sample_multi_categorical, NumpyActor._draw_gumbel),
    BernoulliDistribution: (NumpyActor._sample_bernoulli, NumpyActor._draw_logistic),
    DiagGaussianDistribution: (NumpyActor._sample_gaussian, NumpyActor._draw_normal),
    # Its noise comes from the policy's exploration matrices
    StateDependentNoiseDistribution: (NumpyActor._sample_gsde, NumpyActor._draw_normal),
}
"""How :class:`NumpyActor` samples from a distribution: a :data:`Sampler`, and what draws its noise."""


def make_actor(policy: ActorCriticPolicy, choice: ActorChoice, rng: np.random.Generator) -> Actor:
    """
    :param policy: The policy to sample from
    :param choice: ``"auto"``: NumPy where it is possible, else torch; or one of these by name
    :param rng: Source of the random numbers of the NumPy actor
    :return: The actor
    :raises ValueError: NumPy is asked for, but not possible
    """
    reason = reason_against_numpy(policy)
    if choice == "numpy" and reason is not None:
        raise ValueError(f'`actor` is "numpy", but {reason}. Use actor="auto" or "torch".')
    return TorchActor(policy) if choice == "torch" or reason is not None else NumpyActor(policy, rng)


def reason_against_numpy(policy: ActorCriticPolicy) -> str | None:
    """
    :param policy: The policy to sample from
    :return: Why :class:`NumpyActor` would not do what the policy does; None if it would
    """
    methods = ("forward", "extract_features", "get_distribution", "_get_action_dist_from_latent")
    for base in (ActorCriticPolicy, MaskableActorCriticPolicy):
        # Somebody who overrides one of these has another distribution in mind
        if isinstance(policy, base) and not overridden_methods(type(policy), base, methods):
            break
    else:
        return f"{type(policy).__name__} computes its distribution in a way of its own"
    space = policy.observation_space
    if not isinstance(space, (spaces.Box, spaces.MultiBinary)) or is_image_space(space):
        return f"the observations are not flat numbers but {space}"
    return _reason_against_layers(policy)


def overridden_methods(policy: nn.Module | type[nn.Module], base: type[nn.Module], names: Iterable[str]) -> list[str]:
    """
    :param policy: A policy, on which methods may have been replaced, or a class of policies
    :param base: The class, or the parent class, whose methods are asked about
    :param names: Names of methods
    :return: Those of them that are not those of ``base``
    """
    policy_class, own = (policy, {}) if isinstance(policy, type) else (type(policy), vars(policy))
    return [name for name in names if name in own or getattr(policy_class, name) is not getattr(base, name)]


def _reason_against_layers(policy: ActorCriticPolicy) -> str | None:
    """The part of :func:`reason_against_numpy` that is about modules."""
    extractor: Any = policy.pi_features_extractor
    if type(extractor) is not FlattenExtractor:
        return f"the features extractor is a {type(extractor).__name__}"
    if type(policy.mlp_extractor) not in (MlpExtractor, SharedMlpExtractor):
        return f"`mlp_extractor` is a {type(policy.mlp_extractor).__name__}"
    hidden_layers = _hidden_layers(policy)
    if type(hidden_layers) is not nn.Sequential:
        return f"the hidden layers are a {type(hidden_layers).__name__}"
    # Not their subclasses: a squashed Gaussian, say, is one of a Gaussian
    if type(policy.action_dist) not in SAMPLERS:
        return f"the distribution is a {type(policy.action_dist).__name__}"
    layers = _actor_modules(policy)
    for module in [policy, extractor, extractor.flatten, policy.mlp_extractor, hidden_layers, *layers]:
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{type(module).__name__} has hooks"
        if not PATCHABLE.isdisjoint(module.__dict__):
            return f"a method of {type(module).__name__} was replaced"
    for module in layers:
        if type(module) is not nn.Linear and type(module) not in NUMPY_ACTIVATIONS and type(module) not in TORCH_ACTIVATIONS:
            return f"there is a layer {type(module).__name__}"
        # A linear layer or an activation has no submodules
        if any(parameter is not None and parameter.dtype != th.float32 for parameter in module._parameters.values()):
            return "its parameters are not float32"
    if type(policy.action_net) is not nn.Linear:
        return f"`action_net` is a {type(policy.action_net).__name__}"
    if type(policy.action_dist) is DiagGaussianDistribution:
        # Not in a buffer, say, or computed anew from something else at every look
        log_std = policy._parameters.get("log_std")
        if log_std is None or log_std.dtype != th.float32:
            return "`log_std` is not a float32 parameter"
    return None


# ---------------------------------------------------------------------- layers


def _hidden_layers(policy: ActorCriticPolicy) -> Any:
    extractor = policy.mlp_extractor
    return extractor.shared_net if isinstance(extractor, SharedMlpExtractor) else extractor.policy_net


def _actor_modules(policy: ActorCriticPolicy) -> list[nn.Module]:
    """The layers from the flat observation to the output of ``action_net``, which is the last."""
    return [*_hidden_layers(policy), policy.action_net]


def _is_shareable(action_net: nn.Module) -> bool:
    """Whether NumPy can work on the parameters where they are, which is one device for all."""
    weight: Any = action_net.weight
    return weight.is_cpu


def _to_numpy(tensor: th.Tensor) -> Array:
    """A view of a tensor on the CPU, a copy of one elsewhere."""
    return tensor.numpy(force=True)


Activation = Callable[[Array, Array], Array]
"""``(x, out) -> activations``, which it may write into ``out``, as NumPy's own functions do; ``out`` may be ``x``."""

Layer = tuple[Array | None, Array | None, Activation | None]
"""``(weight (n_in, n_out), bias (n_out,), activation)``: no weight and bias for an activation that follows no linear layer."""


def numpy_layers(modules: list[nn.Module]) -> list[Layer]:
    """
    :param modules: Linear layers and activations
    :return: The linear layers with the activations that follow them. Their arrays share the memory of parameters on the CPU
    """
    layers: list[Layer] = []
    for module in modules:
        if isinstance(module, nn.Linear):
            # Without a bias, a scalar zero stands for it
            bias = np.zeros((), np.float32) if module.bias is None else _to_numpy(module.bias)
            layers.append((_to_numpy(module.weight).T, bias, None))
            continue
        make_activation = NUMPY_ACTIVATIONS.get(type(module))
        activation = make_activation(module) if make_activation is not None else partial(_run_torch, module)
        if layers and layers[-1][2] is None:
            layers[-1] = (*layers[-1][:2], activation)
        else:
            layers.append((None, None, activation))
    return layers


def run_layers(layers: list[Layer], hidden: Array) -> Array:
    """
    :param layers: The layers
    :param hidden: ``(n, n_in)`` or ``(n_in,)`` float32. An activation that comes first writes into it
    :return: The output of the last one, ``(n, n_out)`` or ``(n_out,)``
    """
    for weight, bias, activation in layers:
        if weight is not None:
            hidden = hidden.dot(weight)
            hidden += bias
        if activation is not None:
            hidden = activation(hidden, hidden)
    return hidden


# Functions with a name, so that a model can be pickled


def _identity(x: Array, out: Array) -> Array:
    return x


def _relu(x: Array, out: Array) -> Array:
    return np.maximum(x, np.float32(0), out=out)


def _leaky_relu(negative_slope: np.float32, x: Array, out: Array) -> Array:
    return np.where(x > 0, x, negative_slope * x)


def _elu(alpha: np.float32, x: Array, out: Array) -> Array:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def _sigmoid(x: Array, out: Array) -> Array:
    # By tanh: exp would overflow
    return 0.5 * np.tanh(0.5 * x) + np.float32(0.5)


def _silu(x: Array, out: Array) -> Array:
    return x * _sigmoid(x, out)


def _run_torch(module: nn.Module, x: Array, out: Array) -> Array:
    # Without parameters, so it can be run as it is
    return module(th.from_numpy(x)).numpy()


NUMPY_ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.Identity: lambda module: _identity,
    nn.Tanh: lambda module: np.tanh,
    nn.ReLU: lambda module: _relu,
    nn.LeakyReLU: lambda module: partial(_leaky_relu, np.float32(module.negative_slope)),
    nn.ELU: lambda module: partial(_elu, np.float32(module.alpha)),
    nn.Sigmoid: lambda module: _sigmoid,
    nn.SiLU: lambda module: _silu,
}
"""Activation module to a NumPy function of it."""

TORCH_ACTIVATIONS = (nn.GELU, nn.SELU, nn.CELU, nn.Softplus, nn.Softsign, nn.Mish, nn.Hardtanh, nn.ReLU6, nn.Hardswish)
"""Activations that torch itself computes: no parameters, no state."""
