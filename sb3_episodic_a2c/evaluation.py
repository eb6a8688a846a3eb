"""
How transitions are evaluated in training: their values, log-probabilities and entropies, and the gradient of these.

A small network costs torch more in calls than in arithmetic, forward and backward. The common one is therefore one node of
the autograd graph, not thirty.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from stable_baselines3.common.type_aliases import TensorDict
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn

from sb3_episodic_a2c.actors import Array, numpy_layers, overridden_methods, run_layers
from sb3_episodic_a2c.type_aliases import EpisodicRolloutBufferSamples

Evaluations = tuple[th.Tensor, th.Tensor, th.Tensor | None]
"""Values, log-probabilities and entropies (None where they have no analytical form), ``(n,)`` each."""


def evaluate_actions(
    policy: ActorCriticPolicy, samples: EpisodicRolloutBufferSamples, networks: "PlainNetworks | None" = None
) -> Evaluations:
    """
    ``policy.evaluate_actions``, up to rounding.

    :param policy: The policy
    :param samples: ``n`` transitions
    :param networks: What :func:`find_plain_networks` found in the policy
    :return: Their evaluations
    """
    if networks is None or samples.policy_inputs:
        values, log_prob, entropy = policy.evaluate_actions(samples.observations, samples.actions, **samples.policy_inputs)
        return values.flatten(), log_prob, entropy
    log_std = policy.log_std if type(policy.action_dist) is DiagGaussianDistribution else None
    activations = _activations(networks.actor), _activations(networks.critic)
    return _Evaluation.apply(_flat(samples.observations), samples.actions, log_std, activations, *_parameters(networks))


def predict_values(
    policy: ActorCriticPolicy, observations: Array | dict[str, Array], networks: "PlainNetworks | None" = None
) -> Array:
    """
    ``policy.predict_values``, up to rounding, of a few observations.

    :param policy: The policy
    :param observations: ``(n, *obs_shape)``, or a dict of such arrays
    :param networks: What :func:`find_plain_networks` found in the policy
    :return: ``(n,)`` values
    """
    if networks is None or not isinstance(observations, np.ndarray):
        with th.no_grad():
            return policy.predict_values(obs_as_tensor(observations, policy.device)).flatten().cpu().numpy()
    # Whoever asked looks whether they are finite
    with np.errstate(all="ignore"):
        hidden = observations.reshape(len(observations), -1).astype(np.float32)
        return run_layers(numpy_layers(networks.critic), hidden).reshape(-1)


def _flat(observations: th.Tensor | TensorDict) -> th.Tensor:
    """What the first layer of plain networks is given, ``(n, observation size)``."""
    assert isinstance(observations, th.Tensor)
    return observations.float().flatten(start_dim=1)


def _activations(network: list[Any]) -> "list[_Activation]":
    """One fewer than linear layers."""
    return [ACTIVATIONS[type(module)] for module in network[1::2]]


def _parameters(networks: "PlainNetworks") -> list[th.Tensor]:
    """``weight, bias`` of each linear layer, looked up only now, as they may have been replaced."""
    slots = [layer._parameters for layer in (*networks.actor[::2], *networks.critic[::2])]
    return [parameters[name] for parameters in slots for name in ("weight", "bias")]


# ---------------------------------------------------------------------- which policies


BYPASSED_METHODS = ("evaluate_actions", "predict_values", "set_training_mode", "train")
"""Methods of a policy that are not called where it has plain networks."""


class _Activation(NamedTuple):
    run: Callable[[th.Tensor], th.Tensor]
    """Writes into its argument, and returns it."""
    backpropagate: Callable[[th.Tensor, th.Tensor], th.Tensor]
    """``(gradient of the output, output) -> gradient of the input``."""


# Arithmetic on arrays is NumPy's: it is done in half the time of torch's, which spends most of its own on the call. The matrix
# products are torch's, which keep to its number of threads


def _tanh(x: th.Tensor) -> th.Tensor:
    array = x.numpy()
    np.tanh(array, out=array)
    return x


def _backpropagate_tanh(grad: th.Tensor, output: th.Tensor) -> th.Tensor:
    slope = np.square(output.numpy())
    np.subtract(1, slope, out=slope)
    np.multiply(grad.numpy(), slope, out=slope)
    return th.from_numpy(slope)


def _backpropagate_relu(grad: th.Tensor, output: th.Tensor) -> th.Tensor:
    return th.ops.aten.threshold_backward(grad, output, 0)


# No lambdas: a model can be pickled
ACTIVATIONS: dict[type[nn.Module], _Activation] = {
    nn.Tanh: _Activation(_tanh, _backpropagate_tanh),
    nn.ReLU: _Activation(th.relu_, _backpropagate_relu),
}
"""Those that are built in: what their gradient needs is their output."""


class PlainNetworks(NamedTuple):
    """Actor and critic, of linear layers with an activation between each two, on flat observations."""

    policy: ActorCriticPolicy
    actor: list[Any]
    """Its modules: linear layers and activations in turn, from the observation to the output."""
    critic: list[Any]

    def belong_to(self, policy: ActorCriticPolicy) -> bool:
        """Whether neither the policy nor one of its layers was replaced since they were found."""
        return self.policy is policy and (self.actor, self.critic) == _layers_of(policy)


def find_plain_networks(policy: ActorCriticPolicy, reason_against_numpy: str | None) -> PlainNetworks | None:
    """
    :param policy: The policy
    :param reason_against_numpy: What the function of that name says of it: it knows the actor's half, and whose methods were
        replaced
    :return: Its networks, if there is no more to ``policy.evaluate_actions`` and ``predict_values`` than what
        :func:`evaluate_actions` and :func:`predict_values` do with them: that is, neither a mode nor a state nor a hook
    """
    if (
        reason_against_numpy is not None
        or overridden_methods(policy, ActorCriticPolicy, BYPASSED_METHODS)
        or type(policy.action_dist) not in (CategoricalDistribution, DiagGaussianDistribution)
        # Those of actor and critic may have been replaced, `features_extractor` alone too
        or not policy.features_extractor is policy.pi_features_extractor is policy.vf_features_extractor
    ):
        return None
    extractor: Any = policy.mlp_extractor
    networks = _layers_of(policy)
    if (
        networks is None
        or "forward_critic" in extractor.__dict__
        or (type(policy.action_dist) is DiagGaussianDistribution and not policy.log_std.is_cpu)
    ):
        return None
    actor, critic = networks
    containers = policy.features_extractor, extractor, extractor.policy_net, extractor.value_net
    if any(_has_hooks(module) for module in (*containers, *actor, *critic)):
        return None
    for network in networks:
        if not (
            all(type(module) is nn.Linear and _is_plain(module) for module in network[::2])
            and all(type(module) in ACTIVATIONS for module in network[1::2])
        ):
            return None
    return PlainNetworks(policy, actor, critic)


def _layers_of(policy: ActorCriticPolicy) -> tuple[list[Any], list[Any]] | None:
    """The modules of the actor and of the critic behind the flat observation, if they are in a row."""
    # As attributes, modules take ten times as long to look up
    modules: dict[str, Any] = policy._modules
    extractor = modules["mlp_extractor"]
    policy_net, value_net = (extractor._modules.get(name) for name in ("policy_net", "value_net"))
    if type(extractor) is not MlpExtractor or not type(policy_net) is type(value_net) is nn.Sequential:
        return None
    return [*policy_net._modules.values(), modules["action_net"]], [*value_net._modules.values(), modules["value_net"]]


def _is_plain(layer: nn.Linear) -> bool:
    return all(
        parameter is not None and parameter.is_cpu and parameter.dtype == th.float32
        for parameter in layer._parameters.values()
    )


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to be called, or has put a method of his own on the object."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


# ---------------------------------------------------------------------- forward and backward


BackpropagateHead = Callable[[Array | None, Array | None], tuple[Array | None, Array | None]]
"""Gradients of log-probabilities and entropies, ``(n,)`` each -> gradients of the actor's output and of ``log_std``."""


class _Evaluation(th.autograd.Function):
    """
    Evaluations by two plain networks, for a categorical distribution, or with ``log_std`` a diagonal Gaussian one.

    Without NumPy's warnings: a loss or a gradient that is not finite is refused later.
    """

    @staticmethod
    @np.errstate(all="ignore")
    def forward(
        ctx: Any,
        observations: th.Tensor,
        actions: th.Tensor,
        log_std: th.Tensor | None,
        activations: tuple[list[_Activation], list[_Activation]],
        *parameters: th.Tensor,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        n_actor = 2 * len(activations[0]) + 2
        actor_outputs = _run(observations, parameters[:n_actor], activations[0])
        critic_outputs = _run(observations, parameters[n_actor:], activations[1])
        output = actor_outputs.pop().numpy()
        if log_std is None:
            log_prob, entropy, ctx.backpropagate_head = _evaluate_categorical(output, actions.numpy())
        else:
            log_prob, entropy, ctx.backpropagate_head = _evaluate_gaussian(output, actions.numpy(), log_std.numpy())
        values = critic_outputs.pop().flatten()
        ctx.activations = activations
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*actor_outputs, *critic_outputs, *parameters[::2])
        return values, th.from_numpy(log_prob), th.from_numpy(entropy)

    @staticmethod
    @th.autograd.function.once_differentiable
    @np.errstate(all="ignore")
    def backward(
        ctx: Any, grad_values: th.Tensor | None, grad_log_prob: th.Tensor | None, grad_entropy: th.Tensor | None
    ) -> tuple[th.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        actor_inputs, critic_inputs, actor_weights, critic_weights = (
            list(islice(saved, len(activations) + 1)) for _ in range(2) for activations in ctx.activations
        )
        # None for what the loss does not depend on
        grad_output, grad_log_std = ctx.backpropagate_head(*map(_to_numpy, (grad_log_prob, grad_entropy)))
        grad_value = None if grad_values is None else grad_values[:, None]
        return (
            *(None, None, _to_torch(grad_log_std), None),
            *_backpropagate(_to_torch(grad_output), actor_inputs, actor_weights, ctx.activations[0]),
            *_backpropagate(grad_value, critic_inputs, critic_weights, ctx.activations[1]),
        )


def _to_numpy(tensor: th.Tensor | None) -> Array | None:
    return None if tensor is None else tensor.numpy()


def _to_torch(array: Array | None) -> th.Tensor | None:
    return None if array is None else th.from_numpy(array)


# Transitions are the last axis: over one of a few numbers, NumPy adds up ten times slower


def _evaluate_categorical(logits: Array, actions: Array) -> tuple[Array, Array, BackpropagateHead]:
    """Of logits ``(n, n_actions)`` and actions ``(n,)``."""
    log_probs = np.ascontiguousarray(logits.T)
    log_probs = log_probs - log_probs.max(axis=0)
    log_probs -= np.log(np.exp(log_probs).sum(axis=0))
    probs = np.exp(log_probs)
    entropy = -(probs * log_probs).sum(axis=0)
    chosen = actions, np.arange(len(actions))
    return log_probs[chosen], entropy, partial(_backpropagate_categorical, log_probs, probs, entropy, chosen)


def _backpropagate_categorical(
    log_probs: Array,
    probs: Array,
    entropy: Array,
    chosen: tuple[Array, Array],
    grad_log_prob: Array | None,
    grad_entropy: Array | None,
) -> tuple[Array | None, None]:
    grad_logits = None
    if grad_log_prob is not None:
        grad_logits = probs * -grad_log_prob
        grad_logits[chosen] += grad_log_prob
    if grad_entropy is not None:
        of_entropy = -grad_entropy * probs * (log_probs + entropy)
        grad_logits = of_entropy if grad_logits is None else grad_logits + of_entropy
    return None if grad_logits is None else grad_logits.T, None


def _evaluate_gaussian(means: Array, actions: Array, log_std: Array) -> tuple[Array, Array, BackpropagateHead]:
    """Of means and actions ``(n, action_dim)``."""
    std = np.exp(log_std)[:, None]
    errors = (np.ascontiguousarray(actions.T, dtype=np.float32) - means.T) / std
    constants = log_std.sum() + np.float32(0.5 * math.log(2 * math.pi) * len(log_std))
    log_prob = np.square(errors).sum(axis=0) * np.float32(-0.5) - constants
    entropy = np.full(len(actions), constants + np.float32(0.5 * len(log_std)))
    return log_prob, entropy, partial(_backpropagate_gaussian, errors, std)


def _backpropagate_gaussian(
    errors: Array, std: Array, grad_log_prob: Array | None, grad_entropy: Array | None
) -> tuple[Array | None, Array]:
    grad_means, grad_log_std = None, np.zeros(len(std), np.float32)
    if grad_log_prob is not None:
        grad_means = errors * grad_log_prob
        grad_log_std += (grad_means * errors).sum(axis=1) - grad_log_prob.sum()
        grad_means = (grad_means / std).T
    if grad_entropy is not None:
        grad_log_std += grad_entropy.sum()
    return grad_means, grad_log_std


def _run(x: th.Tensor, parameters: Sequence[th.Tensor], activations: list[_Activation]) -> list[th.Tensor]:
    """The input of every layer of a network, and its output behind them."""
    outputs = [x]
    for index, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
        output = th.addmm(bias, outputs[-1], weight.t())
        outputs.append(activations[index].run(output) if index < len(activations) else output)
    return outputs


def _backpropagate(
    grad: th.Tensor | None, inputs: list[th.Tensor], weights: list[th.Tensor], activations: list[_Activation]
) -> list[th.Tensor | None]:
    """The gradients of ``weight, bias`` of each layer of a network, from that of its output."""
    if grad is None:
        return [None] * (2 * len(weights))
    grads: list[th.Tensor | None] = []
    for index in reversed(range(len(weights))):
        grads += [grad.sum(dim=0), _weight_gradient(grad, inputs[index])]
        if index > 0:
            grad = activations[index - 1].backpropagate(grad.mm(weights[index]), inputs[index])
    return grads[::-1]


def _weight_gradient(grad: th.Tensor, x: th.Tensor) -> th.Tensor:
    """``(n_out, n_in)``, of the weight of a linear layer, from the gradient of its output and its input."""
    if x.shape[1] < grad.shape[1]:
        # Four times as fast for the few numbers of an observation: the matrix with fewer rows first
        return x.t().mm(grad).t().contiguous()
    return grad.t().mm(x)
