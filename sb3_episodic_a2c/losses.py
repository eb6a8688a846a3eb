"""The three terms of the loss, as sums over transitions. Pure functions on flat ``(n_transitions,)`` tensors."""

import torch as th
from torch.nn import functional as F


def policy_loss(log_prob: th.Tensor, advantages: th.Tensor) -> th.Tensor:
    r"""
    Policy gradient loss with a baseline, :math:`-\sum_t \log \pi(a_t|s_t) A_t` (Williams, 1992; Sutton & Barto, 2018, 13.4).

    :param log_prob: ``(n_transitions,)`` log-probabilities of the actions taken
    :param advantages: ``(n_transitions,)`` advantages; detached, unless this loss is meant to push the critic too
    :return: Scalar, a sum
    """
    return -(log_prob * advantages).sum()


def value_loss(values: th.Tensor, returns: th.Tensor, huber_delta: float = 1.0) -> th.Tensor:
    r"""
    Huber loss of the critic, :math:`\sum_t h_\delta(G_t - V(s_t))` (Huber, 1964).

    :math:`h_\delta(e)` is :math:`e^2 / 2` up to :math:`|e| = \delta` and :math:`\delta (|e| - \delta / 2)` beyond.

    :param values: ``(n_transitions,)`` predicted values
    :param returns: ``(n_transitions,)`` targets
    :param huber_delta: Error at which the loss turns from quadratic to linear
    :return: Scalar, a sum
    """
    return F.huber_loss(values, returns, reduction="sum", delta=huber_delta)


def entropy_loss(entropy: th.Tensor | None, log_prob: th.Tensor) -> th.Tensor:
    r"""
    Negative entropy of the policy, :math:`-\sum_t H(\pi(\cdot|s_t))`.

    :param entropy: ``(n_transitions,)`` entropies, or None where the distribution has no analytical form
        (squashed Gaussian); then :math:`-\log \pi(a_t|s_t)` stands in for it, as in SB3
    :param log_prob: ``(n_transitions,)`` log-probabilities of the actions taken
    :return: Scalar, a sum
    """
    return log_prob.sum() if entropy is None else -entropy.sum()
