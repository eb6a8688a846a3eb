"""
How transitions are evaluated in training: their values, log-probabilities and entropies, and the gradient of these.

A small network costs torch more in calls than in arithmetic, forward and backward. The common one is therefore one node of
the autograd graph, not thirty.
"""

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from stable_baselines3.common.type_aliases import TensorDict
from torch import nn

from sb3_episodic_a2c.actors import overridden_methods
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
    if networks is None or networks.policy is not policy or samples.policy_inputs:
        values, log_prob, entropy = policy.evaluate_actions(samples.observations, samples.actions, **samples.policy_inputs)
        return values.flatten(), log_prob, entropy
    log_std = policy._parameters.get("log_std")
    return _Evaluation.apply(
        _flat(samples.observations), samples.actions, log_std, networks.activations, *_parameters(networks.linear_layers)
    )


def predict_values(
    policy: ActorCriticPolicy, observations: th.Tensor | TensorDict, networks: "PlainNetworks | None" = None
) -> th.Tensor:
    """
    ``policy.predict_values``, up to rounding, without a gradient.

    :param policy: The policy
    :param observations: ``(n, *obs_shape)``, or a dict of such tensors
    :param networks: What :func:`find_plain_networks` found in the policy
    :return: ``(n,)`` values
    """
    with th.no_grad():
        if networks is None or networks.policy is not policy:
            return policy.predict_values(observations).flatten()
        activations = networks.activations[1]
        critic = networks.linear_layers[-len(activations) - 1 :]
        return _run(_flat(observations), _parameters(critic), activations)[-1].flatten()


def _flat(observations: th.Tensor | TensorDict) -> th.Tensor:
    """What the first layer of plain networks is given, ``(n, observation size)``."""
    assert isinstance(observations, th.Tensor)
    return observations.float().flatten(start_dim=1)


def _parameters(linear_layers: list[nn.Linear]) -> list[th.Tensor]:
    """``weight, bias`` of each layer, looked up only now, as they may have been replaced."""
    return [parameter for layer in linear_layers for parameter in (layer.weight, layer.bias)]


# ---------------------------------------------------------------------- which policies


BYPASSED_METHODS = ("evaluate_actions", "predict_values", "set_training_mode", "train")
"""Methods of a policy that are not called where it has plain networks."""


class _Activation(NamedTuple):
    """Both functions write into their first argument, and return it."""

    run: Callable[[th.Tensor], th.Tensor]
    backpropagate: Callable[[th.Tensor, th.Tensor], th.Tensor]
    """``(gradient of the output, output) -> gradient of the input``."""


def _tanh(x: th.Tensor) -> th.Tensor:
    # NumPy's is as accurate as torch's, and eight times as fast
    array = x.numpy()
    np.tanh(array, out=array)
    return x


def _backpropagate_tanh(grad: th.Tensor, output: th.Tensor) -> th.Tensor:
    return grad.addcmul_(grad * output, output, value=-1)


def _backpropagate_relu(grad: th.Tensor, output: th.Tensor) -> th.Tensor:
    return grad.mul_(output > 0)


# No lambdas: a model can be pickled
ACTIVATIONS: dict[type[nn.Module], _Activation] = {
    nn.Tanh: _Activation(_tanh, _backpropagate_tanh),
    nn.ReLU: _Activation(th.relu_, _backpropagate_relu),
}
"""Those that are built in: what their gradient needs is their output."""


class PlainNetworks(NamedTuple):
    """Actor and critic, of linear layers with an activation between each two, on flat observations."""

    policy: ActorCriticPolicy
    linear_layers: list[nn.Linear]
    """Those of the actor, then those of the critic."""
    activations: tuple[list[_Activation], list[_Activation]]
    """Of the actor and of the critic, one fewer than linear layers each."""


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
    if type(extractor) is not MlpExtractor or "forward_critic" in extractor.__dict__:
        return None
    policy_net, value_net = extractor.policy_net, extractor.value_net
    if type(value_net) is not nn.Sequential or _has_hooks(policy_net) or _has_hooks(value_net):
        return None
    networks = [*policy_net, policy.action_net], [*value_net, policy.value_net]
    for network in networks:
        if not (
            all(type(module) is nn.Linear and _is_plain(module) for module in network[::2])
            and all(type(module) in ACTIVATIONS for module in network[1::2])
            and not any(_has_hooks(module) for module in network)
        ):
            return None
    actor_activations, critic_activations = ([ACTIVATIONS[type(module)] for module in network[1::2]] for network in networks)
    linear_layers: list[Any] = [layer for network in networks for layer in network[::2]]
    return PlainNetworks(policy, linear_layers, (actor_activations, critic_activations))


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


class _Evaluation(th.autograd.Function):
    """Evaluations by two plain networks, for a categorical distribution, or with ``log_std`` a diagonal Gaussian one."""

    @staticmethod
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
        if log_std is None:
            log_prob, entropy, kept = _evaluate_categorical(actor_outputs.pop(), actions)
        else:
            log_prob, entropy, kept = _evaluate_gaussian(actor_outputs.pop(), actions, log_std)
        values = critic_outputs.pop().flatten()
        ctx.activations = activations
        ctx.backpropagate_head = _backpropagate_categorical if log_std is None else _backpropagate_gaussian
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *actor_outputs, *critic_outputs, *parameters[::2])
        return values, log_prob, entropy

    @staticmethod
    @th.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_values: th.Tensor | None, grad_log_prob: th.Tensor | None, grad_entropy: th.Tensor | None
    ) -> tuple[th.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        kept = list(islice(saved, 2))
        actor_inputs, critic_inputs, actor_weights, critic_weights = (
            list(islice(saved, len(activations) + 1)) for _ in range(2) for activations in ctx.activations
        )
        # None for what the loss does not depend on
        grad_output, grad_log_std = ctx.backpropagate_head(grad_log_prob, grad_entropy, *kept)
        grad_value = None if grad_values is None else grad_values[:, None]
        return (
            *(None, None, grad_log_std, None),
            *_backpropagate(grad_output, actor_inputs, actor_weights, ctx.activations[0]),
            *_backpropagate(grad_value, critic_inputs, critic_weights, ctx.activations[1]),
        )


def _evaluate_categorical(logits: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, tuple[th.Tensor, th.Tensor]]:
    """Log-probabilities and entropies ``(n,)``, and what their gradient needs, from logits ``(n, n_actions)``."""
    log_probs = logits.log_softmax(dim=1)
    log_prob = log_probs.gather(1, actions[:, None]).flatten()
    return log_prob, -(log_probs.exp() * log_probs).sum(dim=1), (log_probs, actions[:, None])


def _backpropagate_categorical(
    grad_log_prob: th.Tensor | None, grad_entropy: th.Tensor | None, log_probs: th.Tensor, actions: th.Tensor
) -> tuple[th.Tensor | None, None]:
    probs = log_probs.exp()
    grad_logits = None
    if grad_log_prob is not None:
        grad_logits = (probs * -grad_log_prob[:, None]).scatter_add_(1, actions, grad_log_prob[:, None])
    if grad_entropy is not None:
        entropy = -(probs * log_probs).sum(dim=1, keepdim=True)
        of_entropy = probs.mul_(log_probs + entropy).mul_(-grad_entropy[:, None])
        grad_logits = of_entropy if grad_logits is None else grad_logits.add_(of_entropy)
    return grad_logits, None


def _evaluate_gaussian(
    means: th.Tensor, actions: th.Tensor, log_std: th.Tensor
) -> tuple[th.Tensor, th.Tensor, tuple[th.Tensor, th.Tensor]]:
    """Log-probabilities and entropies ``(n,)``, and what their gradient needs, from means ``(n, action_dim)``."""
    std = log_std.exp()
    errors = (actions - means).div_(std)
    constants = log_std.sum() + 0.5 * math.log(2 * math.pi) * len(log_std)
    log_prob = errors.square().sum(dim=1).mul_(-0.5).sub_(constants)
    return log_prob, (constants + 0.5 * len(log_std)).repeat(len(actions)), (errors, std)


def _backpropagate_gaussian(
    grad_log_prob: th.Tensor | None, grad_entropy: th.Tensor | None, errors: th.Tensor, std: th.Tensor
) -> tuple[th.Tensor | None, th.Tensor]:
    grad_means, grad_log_std = None, th.zeros_like(std)
    if grad_log_prob is not None:
        grad_means = errors * grad_log_prob[:, None]
        grad_log_std += (grad_means * errors).sum(dim=0) - grad_log_prob.sum()
        grad_means.div_(std)
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
        grads += [grad.sum(dim=0), grad.t().mm(inputs[index])]
        if index > 0:
            grad = activations[index - 1].backpropagate(grad.mm(weights[index]), inputs[index])
    return grads[::-1]
