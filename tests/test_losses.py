"""The three losses: sums with known answers."""

import math

import pytest
import torch as th

from sb3_episodic_a2c.losses import entropy_loss, policy_loss, value_loss


def test_policy_loss_is_the_negative_sum_of_log_prob_times_advantage() -> None:
    log_prob = th.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantages = th.tensor([3.0, -1.0, 2.0])
    loss = policy_loss(log_prob, advantages)
    loss.backward()
    assert loss.item() == pytest.approx(3.0 - 2.0 + 1.0)
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == [-3.0, 1.0, -2.0]


def test_value_loss_is_quadratic_up_to_delta_and_linear_beyond() -> None:
    returns = th.tensor([0.0, 0.0, 0.0, 0.0])
    values = th.tensor([0.5, -1.0, 3.0, -2.0], requires_grad=True)
    loss = value_loss(values, returns, huber_delta=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.125 + 0.5 + 2.5 + 1.5)
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, -1.0, 1.0, -1.0]
    assert value_loss(values, returns, huber_delta=2.0).item() == pytest.approx(0.125 + 0.5 + 2 * (3 - 1) + 2.0)


def test_value_loss_reduces_to_half_the_squared_error_for_a_large_delta() -> None:
    values, returns = th.randn(50), th.randn(50)
    assert value_loss(values, returns, huber_delta=1e6).item() == pytest.approx(
        0.5 * ((values - returns) ** 2).sum().item(), rel=1e-5
    )


def test_entropy_loss() -> None:
    assert entropy_loss(th.full((4,), math.log(2)), th.zeros(4)).item() == pytest.approx(-4 * math.log(2))
    # No analytical form: -log_prob stands in
    assert entropy_loss(None, th.tensor([-1.0, -3.0])).item() == pytest.approx(-4.0)


@pytest.mark.parametrize("cut", [1, 3, 9])
def test_losses_are_sums_over_transitions(cut: int) -> None:
    first, second = th.randn(10), th.randn(10)
    for loss in (policy_loss, value_loss, entropy_loss):
        parts = loss(first[:cut], second[:cut]) + loss(first[cut:], second[cut:])
        assert parts.item() == pytest.approx(loss(first, second).item(), rel=1e-5, abs=1e-5)
