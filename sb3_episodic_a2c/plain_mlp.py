"""
Whether a policy is a plain MLP, whose layers can be run one after another, in torch or in NumPy, without its own methods.

One inspection answers for all fast paths: the NumPy actor, values at time limits, and the evaluation of transitions in
training. It gives the layers, or the reason why not.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    DiagGaussianDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from sb3_episodic_a2c.policies import SharedMlpExtractor

Array = np.ndarray

# ---------------------------------------------------------------------- methods that a fast path bypasses

BYPASSED = {
    # The NumPy actor samples without these
    "acting": ("forward", "extract_features", "get_distribution", "_get_action_dist_from_latent"),
    # The torch actor runs `get_distribution` alone
    "distribution": ("forward", "extract_features"),
    # Training and values at time limits run the layers of actor and critic
    "training": ("evaluate_actions", "predict_values", "set_training_mode", "train"),
    # Policies with a memory are run over whole episodes instead of padded sequences
    "sequences": ("forward", "get_distribution", "predict_values", "evaluate_actions", "_process_sequence"),
    # A layer or a container is not called, but its parameters are used
    "modules": ("forward", "forward_actor", "forward_critic"),
}
"""What bypasses which methods of a policy or of its modules. Where one of them is overridden, it is called."""

PATCHABLE = {*BYPASSED["modules"], *BYPASSED["acting"]}
"""Methods of a policy or a layer that may have been replaced on the object itself."""


def unwrapped(policy: Any) -> Any:
    """
    :param policy: A policy, perhaps one that ``th.compile`` made
    :return: The policy that was compiled, which has the layers and all methods but ``forward``; any other policy as it is
    """
    return policy._modules.get("_orig_mod", policy)


def is_compiled(policy: Any) -> bool:
    """
    :param policy: A policy
    :return: Whether calling it runs what ``th.compile(policy)`` or ``policy.compile()`` made
    """
    return unwrapped(policy) is not policy or policy._compiled_call_impl is not None


def overridden_methods(policy: nn.Module | type[nn.Module], base: type[nn.Module], names: Iterable[str]) -> list[str]:
    """
    :param policy: A policy, on which methods may have been replaced, or a class of policies
    :param base: The class, or the parent class, whose methods are asked about
    :param names: Names of methods
    :return: Those of them that are not those of ``base``
    """
    if isinstance(policy, type):
        return [name for name in names if getattr(policy, name) is not getattr(base, name)]

    def function(name: str) -> Any:
        # Of the object, not of its class: it may be a wrapper that passes on the methods of a policy
        method = getattr(policy, name, None)
        return getattr(method, "__func__", method)

    return [name for name in names if name in vars(policy) or function(name) is not getattr(base, name)]


# ---------------------------------------------------------------------- inspection


class PlainMlp:
    """
    The layers of a policy, as they were when :func:`inspect` looked at it.

    :param policy: The policy
    :param actor: Linear layers and activations, from the numbers of an observation to the output of ``action_net``
    :param critic: The same, to the output of ``value_net``; None where values and training are left to the policy's methods
    """

    def __init__(self, policy: ActorCriticPolicy, actor: list[Any], critic: list[Any] | None) -> None:
        self.policy = policy
        self.numbers = Numbers(policy.observation_space)
        self.actor = actor
        self.critic = critic
        self._original = unwrapped(policy)
        self._containers = _containers(self._original)
        self._linear = [layer for layer in (*actor, *(critic or [])) if type(layer) is nn.Linear]
        self._names = self._parameter_names()
        self.shares_memory = _is_on_cpu(actor[-1])
        """Whether NumPy works on the parameters where they are, not on copies. One device holds all of them."""
        # torch's own dicts: looking up a parameter there takes 0.04 us, as an attribute of the module 0.4 us
        slots = [(layer._parameters, name) for layer in actor for name in layer._parameters]
        if type(policy.action_dist) is DiagGaussianDistribution:
            slots.append((self._original._parameters, "log_std"))
        self._slots: list[tuple[dict[str, Any], str]] = [slot for slot in slots if slot[0][slot[1]] is not None]

    def addresses(self) -> list[int]:
        """Addresses of the actor's parameters. They change when one is replaced, or when a copy of one is out of date."""
        # None for one that was removed, e.g. by pruning
        tensors = [tensor for parameters, name in self._slots if (tensor := parameters.get(name)) is not None]
        addresses = [tensor.data_ptr() for tensor in tensors]
        # A view on the CPU follows what is written into a tensor, and keeps its memory from being used for another one
        return addresses if self.shares_memory else [*addresses, *(tensor._version for tensor in tensors)]

    def is_current(self, policy: nn.Module) -> bool:
        """
        :param policy: The policy that the model has now
        :return: Whether it is the one that was inspected, with the same layers
        """
        # With other containers, the layers may not even be where they were
        return (
            policy is self.policy
            and _containers(self._original) == self._containers
            and _actor_layers(self._original) == self.actor
            and (self.critic is None or _critic_layers(self._original) == self.critic)
            and self._parameter_names() == self._names
        )

    def _parameter_names(self) -> list[list[str]]:
        """They change when a layer is pruned or parametrized."""
        return [[*layer._parameters] for layer in self._linear]


def base_class(policy: Any) -> type[ActorCriticPolicy] | type[MaskableActorCriticPolicy]:
    """
    :param policy: A policy
    :return: The class of SB3 or sb3-contrib that it is derived from
    """
    return ActorCriticPolicy if isinstance(policy, ActorCriticPolicy) else MaskableActorCriticPolicy


def inspect(policy: ActorCriticPolicy) -> PlainMlp | str:
    """
    Find the layers of a policy, if it is a plain MLP.

    :param policy: The policy
    :return: Its layers, if running them does what the policy does; otherwise the reason why not
    """
    given, policy = policy, unwrapped(policy)
    base = base_class(policy)
    # A subclass that overrides one of these may have another distribution
    if not isinstance(policy, base) or overridden_methods(type(policy), base, BYPASSED["acting"]):
        return f"{type(policy).__name__} computes its distribution in a way of its own"
    for space in _parts(policy.observation_space).values():
        if isinstance(space, spaces.Box) and is_image_space(space):
            return f"there are images among the observations, {space}"
    reason = _reason_against_modules(policy) or _reason_against_layers(_actor_layers(policy))
    if reason is not None:
        return reason
    return PlainMlp(given, _actor_layers(policy), _critic_layers(policy) if _has_plain_critic(policy) else None)


def _reason_against_modules(policy: ActorCriticPolicy) -> str | None:
    """The reason against the modules around the layers of the actor."""
    extractor: Any = policy.pi_features_extractor
    is_dict = isinstance(policy.observation_space, spaces.Dict)
    extractor_class = type(extractor)
    if extractor_class is not (CombinedExtractor if is_dict else FlattenExtractor):
        return f"the features extractor is a {extractor_class.__name__}"
    flattening = list(extractor.extractors.values()) if is_dict else [extractor.flatten]
    if is_dict and list(extractor.extractors) != list(_parts(policy.observation_space)):
        return "the features extractor has other keys than the observations"
    if any(type(module) is not nn.Flatten for module in flattening):
        return "the features extractor does more than flatten"
    if type(policy.mlp_extractor) not in (MlpExtractor, SharedMlpExtractor):
        return f"`mlp_extractor` is a {type(policy.mlp_extractor).__name__}"
    hidden = _hidden_layers(policy)
    if type(hidden) is not nn.Sequential:
        return f"the hidden layers are a {type(hidden).__name__}"
    if type(policy.action_net) is not nn.Linear:
        return f"`action_net` is a {type(policy.action_net).__name__}"
    if type(policy.action_dist) is DiagGaussianDistribution:
        # A buffer, or a value computed at every access by a parametrization, would not do
        log_std = policy._parameters.get("log_std")
        if log_std is None or log_std.dtype != th.float32:
            return "`log_std` is not a float32 parameter"
    for module in (policy, extractor, *flattening, policy.mlp_extractor, hidden):
        if reason := reason_against_calls(module):
            return reason
    return None


def _reason_against_layers(layers: list[Any]) -> str | None:
    for module in layers:
        if reason := reason_against_calls(module):
            return reason
        if type(module) is not nn.Linear and type(module) not in NUMPY_ACTIVATIONS and type(module) not in TORCH_ACTIVATIONS:
            return f"there is a layer {type(module).__name__}"
        if any(parameter.dtype != th.float32 for parameter in _parameters(module)):
            return "its parameters are not float32"
    return None


def reason_against_calls(module: nn.Module) -> str | None:
    """Code that is skipped if the module is not called: hooks, and methods replaced on the object."""
    # torch has no public way to ask for hooks
    if _has_any_global_hook():
        return "there are hooks for all modules"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{type(module).__name__} has hooks"
    if not PATCHABLE.isdisjoint(vars(module)):
        return f"a method of {type(module).__name__} was replaced"
    return None


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether something looks at the gradients that pass through the module."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _has_plain_critic(policy: ActorCriticPolicy) -> bool:
    """
    Whether ``evaluate_actions`` and ``predict_values`` only run the layers of actor and critic.

    Those of the actor are known to be plain. Shared layers are left to the policy's methods, which compute them once.
    """
    extractor: Any = policy.mlp_extractor
    if (
        overridden_methods(policy, ActorCriticPolicy, BYPASSED["training"])
        or type(policy.action_dist) not in (CategoricalDistribution, DiagGaussianDistribution)
        # Each of them may have been replaced
        or not policy.features_extractor is policy.pi_features_extractor is policy.vf_features_extractor
        or type(extractor) is not MlpExtractor
        or type(extractor.value_net) is not nn.Sequential
        or type(policy.value_net) is not nn.Linear
    ):
        return False
    actor, critic = _actor_layers(policy), _critic_layers(policy)
    containers = (*policy.features_extractor.modules(), extractor, extractor.policy_net, extractor.value_net)
    return (
        _reason_against_layers(critic) is None
        and reason_against_calls(extractor.value_net) is None
        and not any(has_backward_hooks(module) for module in (*containers, *actor, *critic))
        and all(parameter.is_cpu for module in (*actor, *critic) for parameter in _parameters(module))
        and (type(policy.action_dist) is not DiagGaussianDistribution or policy.log_std.is_cpu)
        # Not computed from other parameters, nor missing
        and all(type(module) is not nn.Linear or len(_parameters(module)) == 2 for module in (*actor, *critic))
    )


def _is_on_cpu(layer: nn.Linear) -> bool:
    # Tests without a GPU replace it
    return layer.weight.is_cpu


# These are asked several times an update. torch's own dicts answer in 1.5 us, attributes of modules in 4 us


def _containers(policy: ActorCriticPolicy) -> list[Any]:
    extractor: Any = policy._modules["mlp_extractor"]
    return [extractor, *extractor._modules.values()]


def _hidden_layers(policy: ActorCriticPolicy) -> Any:
    extractor = policy._modules["mlp_extractor"]
    assert extractor is not None
    return extractor._modules["shared_net" if type(extractor) is SharedMlpExtractor else "policy_net"]


def _actor_layers(policy: ActorCriticPolicy) -> list[Any]:
    return [*_hidden_layers(policy)._modules.values(), policy._modules["action_net"]]


def _critic_layers(policy: ActorCriticPolicy) -> list[Any]:
    extractor: Any = policy._modules["mlp_extractor"]
    return [*extractor._modules["value_net"]._modules.values(), policy._modules["value_net"]]


def _parameters(layer: Any) -> list[th.Tensor]:
    return [parameter for parameter in layer._parameters.values() if parameter is not None]


# ---------------------------------------------------------------------- observations as numbers


class Choices(NamedTuple):
    """
    A Discrete or MultiDiscrete space.

    :param n_choices: ``(k,)`` number of values of each choice
    :param starts: ``(k,)`` where the numbers of each choice start among those of all
    """

    n_choices: Array
    starts: Array


class Numbers:
    """
    Turns observations into the numbers that the first layer is given, as SB3's preprocessing and its extractors do: flat,
    choices one-hot, the parts of a dict one after the other.

    :param space: The observation space, without images
    """

    def __init__(self, space: spaces.Space) -> None:
        self._choices = {key: _choices(part) for key, part in _parts(space).items()}

    def array(self, observations: Array | dict[str, Array]) -> Array:
        """
        :param observations: ``(n, *obs_shape)``, or a dict of such arrays
        :return: ``(n, n_in)`` float32, which may be a view
        :raises ValueError: A choice is none that the space has
        """
        if isinstance(observations, dict):
            parts = [_array(observations[key], choices) for key, choices in self._choices.items()]
            return np.concatenate(parts, axis=1)
        return _array(observations, self._choices[""])

    def tensor(self, observations: th.Tensor | dict[str, th.Tensor]) -> th.Tensor:
        """
        :param observations: ``(n, *obs_shape)``, or a dict of such tensors
        :return: ``(n, n_in)`` float32
        """
        if isinstance(observations, dict):
            return th.cat([_tensor(observations[key], choices) for key, choices in self._choices.items()], dim=1)
        return _tensor(observations, self._choices[""])


def _parts(space: spaces.Space) -> dict[str, spaces.Space]:
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}


def _choices(space: spaces.Space) -> Choices | None:
    """What the space chooses from; None for one of numbers."""
    if not isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        return None
    n_choices = np.atleast_1d(space.n if isinstance(space, spaces.Discrete) else space.nvec).astype(np.int64)
    return Choices(n_choices, np.cumsum(n_choices) - n_choices)


def _array(observations: Array, choices: Choices | None) -> Array:
    flat = observations.reshape(len(observations), -1)
    if choices is None:
        return flat if flat.dtype == np.float32 else flat.astype(np.float32)
    n_choices, starts = choices
    chosen = flat.astype(np.int64)
    # As an unsigned number, what is negative is too large
    if (chosen.view(np.uint64) >= n_choices).any():
        raise ValueError(f"An observation is {chosen.tolist()}, but its choices must lie in [0, {n_choices.tolist()}).")
    one_hot = np.zeros((len(chosen), n_choices.sum()), dtype=np.float32)
    one_hot[np.arange(len(chosen))[:, None], chosen + starts] = 1
    return one_hot


def _tensor(observations: th.Tensor, choices: Choices | None) -> th.Tensor:
    flat = observations.flatten(start_dim=1) if observations.dim() > 1 else observations[:, None]
    if choices is None:
        return flat.float()
    one_hot = flat.new_zeros((len(flat), int(choices.n_choices.sum())), dtype=th.float32)
    return one_hot.scatter_(1, flat.long() + th.as_tensor(choices.starts, device=flat.device), 1.0)


# ---------------------------------------------------------------------- layers in NumPy


def to_numpy(tensor: th.Tensor) -> Array:
    """A view of a tensor on the CPU, a copy of one elsewhere."""
    return tensor.numpy(force=True)


OPENBLAS_THREADS_FROM = 2**18
"""
Multiplications from which NumPy's products run in threads of their own, on all cores, whatever ``torch.set_num_threads``
says. With 512 environments that kept a second core busy, to be 5% faster.
"""

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
            bias = np.zeros((), np.float32) if module.bias is None else to_numpy(module.bias)
            layers.append((to_numpy(module.weight).T, bias, None))
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
            hidden = _product(hidden, weight)
            hidden += bias
        if activation is not None:
            hidden = activation(hidden, hidden)
    return hidden


def _product(x: Array, weight: Array) -> Array:
    if len(x) * weight.size > OPENBLAS_THREADS_FROM and x.ndim == 2 and x.flags.writeable:
        return th.mm(th.from_numpy(x), th.from_numpy(weight)).numpy()
    return x.dot(weight)


# Named functions, so that a model can be pickled


def _identity(x: Array, out: Array) -> Array:
    return x


def _relu(x: Array, out: Array) -> Array:
    return np.maximum(x, np.float32(0), out=out)


def _leaky_relu(negative_slope: np.float32, x: Array, out: Array) -> Array:
    return np.where(x > 0, x, negative_slope * x)


def _elu(alpha: np.float32, x: Array, out: Array) -> Array:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def _sigmoid(x: Array, out: Array) -> Array:
    # exp would overflow
    return 0.5 * np.tanh(0.5 * x) + np.float32(0.5)


def _silu(x: Array, out: Array) -> Array:
    return x * _sigmoid(x, out)


def _run_torch(module: nn.Module, x: Array, out: Array) -> Array:
    # It has no parameters, so it can be run as it is
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
"""What makes the NumPy function of an activation module."""

TORCH_ACTIVATIONS = (nn.GELU, nn.SELU, nn.CELU, nn.Softplus, nn.Softsign, nn.Mish, nn.Hardtanh, nn.ReLU6, nn.Hardswish)
"""Activations that torch computes: they have no parameters and no state."""
