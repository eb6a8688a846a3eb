"""
How transitions are evaluated in training: their values, log-probabilities and entropies.

A small network costs torch more in calls than in arithmetic. The common one is therefore run without distribution objects.
"""

import math
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
    observations = _flat(samples.observations)
    values = _run(networks.critic, observations).flatten()
    output = _run(networks.actor, observations)
    if type(policy.action_dist) is CategoricalDistribution:
        log_probs = output.log_softmax(dim=1)
        log_prob = log_probs.gather(1, samples.actions[:, None]).flatten()
        return values, log_prob, -(log_probs.exp() * log_probs).sum(dim=1)
    entropy = (policy.log_std + (0.5 + 0.5 * math.log(2 * math.pi))).sum()
    errors = (samples.actions - output) / policy.log_std.exp()
    # The entropy is that of every error being as large as expected
    log_prob = 0.5 * (1 - errors.square()).sum(dim=1) - entropy
    return values, log_prob, entropy.expand(len(values))


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


def _run(network: list[Any], x: th.Tensor) -> th.Tensor:
    """The output of a network's last layer. Parameters are looked up only now, as they may have been replaced."""
    for module in network:
        parameters = module._parameters
        x = th.addmm(parameters["bias"], x, parameters["weight"].t()) if parameters else module(x)
    return x


# ---------------------------------------------------------------------- which policies


BYPASSED_METHODS = ("evaluate_actions", "predict_values", "set_training_mode", "train")
"""Methods of a policy that are not called where it has plain networks."""


ACTIVATIONS = (nn.Tanh, nn.ReLU)


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
