"""
How transitions are evaluated in training: their values, log-probabilities and entropies, and how many at a time.

In a small network torch spends more time on calls than on arithmetic, so a plain MLP is run without distribution objects.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor, NatureCNN
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn
from torch.nn import functional as F

from sb3_episodic_a2c.plain_mlp import (
    BYPASSED,
    NUMPY_ACTIVATIONS,
    TORCH_ACTIVATIONS,
    Array,
    PlainMlp,
    base_class,
    has_backward_hooks,
    numpy_layers,
    overridden_methods,
    reason_against_calls,
    run_layers,
    unwrapped,
)
from sb3_episodic_a2c.policies import SharedMlpExtractor
from sb3_episodic_a2c.samples import EpisodicRolloutBufferSamples

Evaluations = tuple[th.Tensor, th.Tensor, th.Tensor | None]
"""Values, log-probabilities and entropies (None where they have no analytical form), ``(n,)`` each."""

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

CPU_PASS_SIZE = 2048
"""
The most transitions of one forward and backward pass on the CPU. Larger passes are slower: their activations fit into no
cache, and take fresh memory from the operating system at every update.
"""

CPU_PASS_NUMBERS = 2**22
"""The most numbers in the observations of such a pass: the activations of images are larger."""


LARGE_PASS = 1024
"""
Transitions of a pass from which two slow kernels of MKL are avoided, measured on processors by AMD: tanh takes torch 2.6 ns a
number and NumPy 0.4, and the gradient of a layer with few inputs six times as long by rows as by columns. With 64 and 512
vectorised CartPoles `learn()` is 1.2 and 1.3 times as fast. With one environment the first brought 3%.
"""

POOLING = ("MaxPool1d", "MaxPool2d", "MaxPool3d", "AvgPool1d", "AvgPool2d", "AvgPool3d")
ADAPTIVE_POOLING = ("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveMaxPool1d", "AdaptiveMaxPool2d")

MODULES_OF_SINGLE_ROWS: frozenset[type[nn.Module]] = frozenset(
    {
        *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Flatten, nn.Embedding),
        *(nn.LayerNorm, nn.GroupNorm, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        *NUMPY_ACTIVATIONS,
        *TORCH_ACTIVATIONS,
        *(nn.PReLU, nn.LogSigmoid, nn.Hardsigmoid, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Threshold),
        *(getattr(nn, name) for name in POOLING + ADAPTIVE_POOLING),
        *(FlattenExtractor, NatureCNN, CombinedExtractor, MlpExtractor, SharedMlpExtractor),
    }
)
"""Modules whose output for a row depends on no other row of the batch. Not their subclasses."""


def treats_rows_alone(policy: Any) -> bool:
    """
    :param policy: A policy
    :return: Whether its output for a row is known to depend on no other row of the batch, as it does with batch norm, and
        gradients of passes add up to that of all: no hook clips one
    """
    policy = unwrapped(policy)
    base = base_class(policy)
    if not isinstance(policy, base) or overridden_methods(policy, base, {*BYPASSED["acting"], *BYPASSED["training"]}):
        return False
    return all(
        (module is policy or type(module) in MODULES_OF_SINGLE_ROWS)
        and reason_against_calls(module) is None
        and not (isinstance(module, nn.Flatten) and module.start_dim == 0)
        and not has_backward_hooks(module)
        for module in policy.modules()
    ) and not any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in policy.parameters())


def pass_size(policy: ActorCriticPolicy, n_transitions: int, batch_size: int | None) -> int | None:
    """
    How many transitions to evaluate at a time. That is less than was asked for only where it changes nothing but the speed.

    :param policy: The policy
    :param n_transitions: Transitions of the update
    :param batch_size: The most that were asked for; None for all
    :return: The most transitions of one forward and backward pass; None for all
    :raises ValueError: There is one transition only, and batch norm to be trained
    """
    if n_transitions == 1 and any(isinstance(module, BATCH_NORMS) and module.training for module in policy.modules()):
        raise ValueError(
            "The episodes of this update have one transition in all, which batch norm cannot normalize. "
            "Raise `n_episodes`, or use several environments."
        )
    most = min(n_transitions, batch_size or n_transitions)
    if policy.device.type == "cpu":
        size = max(1, min(CPU_PASS_SIZE, CPU_PASS_NUMBERS // max(1, spaces.flatdim(policy.observation_space))))
        if most > size and treats_rows_alone(policy):
            return size
    return batch_size


def evaluate_actions(
    policy: ActorCriticPolicy, samples: EpisodicRolloutBufferSamples, plain: PlainMlp | None = None
) -> Evaluations:
    """
    ``policy.evaluate_actions``, up to rounding.

    :param policy: The policy
    :param samples: ``n`` transitions
    :param plain: The layers of the policy, if it has a plain critic
    :return: Their evaluations
    """
    if plain is None or samples.policy_inputs:
        values, log_prob, entropy = policy.evaluate_actions(samples.observations, samples.actions, **samples.policy_inputs)
        return values.flatten(), log_prob, entropy
    assert plain.critic is not None
    observations = plain.numbers.tensor(samples.observations)
    values = _run(plain.critic, observations).flatten()
    output = _run(plain.actor, observations)
    if type(policy.action_dist) is CategoricalDistribution:
        log_probs = output.log_softmax(dim=1)
        log_prob = log_probs.gather(1, samples.actions[:, None]).flatten()
        return values, log_prob, -(log_probs.exp() * log_probs).sum(dim=1)
    entropy = (policy.log_std + (0.5 + 0.5 * math.log(2 * math.pi))).sum()
    errors = (samples.actions - output) / policy.log_std.exp()
    # The log-probability is minus the entropy where every squared error is as large as expected
    log_prob = 0.5 * (1 - errors.square()).sum(dim=1) - entropy
    return values, log_prob, entropy.expand(len(values))


def evaluate_values(
    policy: ActorCriticPolicy, samples: EpisodicRolloutBufferSamples, plain: PlainMlp | None = None
) -> th.Tensor:
    """
    ``policy.predict_values``, up to rounding, with its gradient: only the critic is run where it has layers of its own.

    :param policy: The policy
    :param samples: ``n`` transitions
    :param plain: The layers of the policy, if it has a plain critic
    :return: ``(n,)`` values
    """
    if plain is None:
        return policy.predict_values(samples.observations).flatten()
    assert plain.critic is not None
    return _run(plain.critic, plain.numbers.tensor(samples.observations)).flatten()


def predict_values(policy: ActorCriticPolicy, observations: Array | dict[str, Array], plain: PlainMlp | None = None) -> Array:
    """
    ``policy.predict_values``, up to rounding, of a few observations.

    :param policy: The policy
    :param observations: ``(n, *obs_shape)``, or a dict of such arrays
    :param plain: The layers of the policy, if it has a plain critic
    :return: ``(n,)`` values
    """
    if plain is None:
        with th.no_grad():
            return policy.predict_values(obs_as_tensor(observations, policy.device)).flatten().cpu().numpy()
    assert plain.critic is not None
    # Callers check for non-finite values
    with np.errstate(all="ignore"):
        # A copy, as an activation that comes first writes into it
        numbers = plain.numbers.array(observations).copy()
        return run_layers(numpy_layers(plain.critic), numbers).reshape(-1)


def is_truncated(info: dict[str, Any]) -> bool:
    """
    :param info: The info of the last step of an episode
    :return: Whether a time limit cut it, and the last observation is known
    """
    return bool(info.get("TimeLimit.truncated")) and info.get("terminal_observation") is not None


def stack_observations(observations: Sequence[Any], space: spaces.Space) -> Array | dict[str, Array]:
    """
    :param observations: ``n`` single observations
    :param space: Their space. Keys that it does not have are left out
    :return: ``(n, *obs_shape)``, or a dict of such arrays
    """
    if isinstance(space, spaces.Dict):
        return {key: np.stack([observation[key] for observation in observations]) for key in space}
    return np.stack(observations)


def _run(layers: list[Any], x: th.Tensor) -> th.Tensor:
    """The output of the last layer. Parameters are looked up only now, as they may have been replaced."""
    for layer in layers:
        if type(layer) is nn.Linear:
            weight = layer.weight
            if len(x) >= LARGE_PASS and layer.in_features < layer.out_features:
                # Its gradient has its layout: by columns
                weight = weight.t().contiguous().t()
            x = F.linear(x, weight, layer.bias)
        else:
            # NumPy does not know the half precision of `torch.autocast`
            has_numpy_tanh = len(x) >= LARGE_PASS and type(layer) is nn.Tanh and x.dtype == th.float32
            x = _Tanh.apply(x) if has_numpy_tanh else layer(x)
    return x


class _Tanh(th.autograd.Function):
    """``torch.tanh`` on the CPU, up to rounding. Its derivative is torch's own, and has one as well."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor) -> th.Tensor:
        # With np.seterr(all="raise"), tiny numbers would raise
        with np.errstate(all="ignore"):
            output = th.from_numpy(np.tanh(x.numpy()))
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: th.Tensor) -> th.Tensor:
        (output,) = ctx.saved_tensors
        return th.ops.aten.tanh_backward(grad_output, output)
