"""The terms of the loss, and their weighted sum. Pure functions on flat ``(n_transitions,)`` tensors."""

from typing import NamedTuple

import torch as th
from torch.nn import functional as F


def policy_loss(log_prob: th.Tensor, advantages: th.Tensor) -> th.Tensor:
    r"""
    Policy gradient loss with a baseline, :math:`-\sum_t \log \pi(a_t|s_t) A_t` (Williams, 1992; Sutton & Barto, 2018, 13.4).

    :param log_prob: ``(n_transitions,)`` log-probabilities of the actions taken
    :param advantages: ``(n_transitions,)`` advantages; detached, unless this loss is also to train the critic
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


class Losses(NamedTuple):
    """The terms of the loss, each a scalar and a sum over transitions."""

    policy: th.Tensor
    value: th.Tensor
    entropy: th.Tensor
    auxiliary: dict[str, th.Tensor] | None = None
    """Further terms by name, already weighted. They are logged as ``train/NAME``, per transition."""

    def total(self, vf_coef: float, ent_coef: float) -> th.Tensor:
        """
        :param vf_coef: Weight of the value loss
        :param ent_coef: Weight of the entropy loss
        :return: Scalar, the loss to minimise
        """
        loss = self.policy + vf_coef * self.value
        if ent_coef != 0:
            loss = loss + ent_coef * self.entropy
        for term in (self.auxiliary or {}).values():
            loss = loss + term
        return loss

    def terms(self) -> dict[str, th.Tensor]:
        """The terms by the name they are logged under."""
        named = {"policy_loss": self.policy, "value_loss": self.value, "entropy_loss": self.entropy}
        return {**named, **(self.auxiliary or {})}
