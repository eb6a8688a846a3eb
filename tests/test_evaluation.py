"""The update's own forward and backward pass is that of the policy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_episodic_a2c import EpisodicA2C, SharedMlpPolicy
from sb3_episodic_a2c.actors import make_actor
from sb3_episodic_a2c.evaluation import _Tanh, evaluate_actions, predict_values
from sb3_episodic_a2c.plain_mlp import NUMPY_ACTIVATIONS, TORCH_ACTIVATIONS, PlainMlp, inspect
from sb3_episodic_a2c.samples import EpisodicRolloutBufferSamples
from tests.test_actors import BOX, Residual, make_policy


def find_plain(policy: Any) -> PlainMlp | None:
    """The layers, if training may run them."""
    plain = inspect(policy)
    return plain if isinstance(plain, PlainMlp) and plain.critic is not None else None


def make_samples(policy: Any, n: int, seed: int = 0) -> EpisodicRolloutBufferSamples:
    observation_space, action_space = policy.observation_space, policy.action_space
    observation_space.seed(seed)
    action_space.seed(seed)
    actions = np.stack([action_space.sample() for _ in range(n)])
    return EpisodicRolloutBufferSamples(
        observations=th.as_tensor(np.stack([observation_space.sample() for _ in range(n)])),
        actions=th.as_tensor(actions.reshape(n, -1) if isinstance(action_space, spaces.Box) else actions),
        returns=th.zeros(n),
        episode_lengths=(n,),
        policy_inputs={},
    )


def evaluate_and_differentiate(policy: Any, evaluate: Callable[[], Any], weights: th.Tensor) -> list[th.Tensor | None]:
    """Values, log-probabilities and entropies, and the gradients of a random weighting ``(3, n)`` of them."""
    policy.zero_grad(set_to_none=True)
    evaluations = evaluate()
    # What has the weight 0 is not part of the loss, as the entropy by default
    used = [
        (weight * evaluation.flatten()).sum() for weight, evaluation in zip(weights, evaluations, strict=True) if weight.any()
    ]
    sum(used).backward()
    gradients = [parameter.grad for parameter in policy.parameters()]
    return [*(evaluation.detach().flatten() for evaluation in evaluations), *gradients]


@settings(max_examples=150, deadline=None)
@given(
    activation=st.sampled_from([*NUMPY_ACTIVATIONS, *TORCH_ACTIVATIONS]),
    actor=st.lists(st.integers(1, 40), max_size=3),
    critic=st.lists(st.integers(1, 40), max_size=3),
    obs_shape=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    dtype=st.sampled_from([np.float32, np.float64, np.int32]),
    action_space=st.sampled_from([spaces.Discrete(2), spaces.Discrete(5), spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (2, 2))]),
    n=st.integers(1, 30),
    used=st.sets(st.sampled_from([0, 1, 2]), min_size=1),
    seed=st.integers(0, 10_000),
)
def test_values_and_gradients_are_autograds(
    activation: Any, actor: list, critic: list, obs_shape: list, dtype: Any, action_space: Any, n: int, used: set, seed: int
) -> None:
    space = spaces.Box(-2, 2, tuple(obs_shape), dtype=dtype)
    policy = make_policy(action_space, space, seed=seed, net_arch={"pi": actor, "vf": critic}, activation_fn=activation)
    samples = make_samples(policy, n, seed)
    weights = th.randn(3, n)
    weights[[index for index in range(3) if index not in used]] = 0.0
    networks = find_plain(policy)
    assert networks is not None

    values = predict_values(policy, samples.observations.numpy(), networks)
    with th.no_grad():
        expected_values = policy.predict_values(samples.observations).flatten()
    np.testing.assert_allclose(values, expected_values, rtol=1e-5, atol=1e-5 * max(1.0, float(expected_values.abs().max())))

    if used == {2} and isinstance(action_space, spaces.Box):
        # Not even autograd reaches the networks: a Gaussian's entropy depends on `log_std` alone
        weights[0] = 1.0
    ours = evaluate_and_differentiate(policy, lambda: evaluate_actions(policy, samples, networks), weights)
    expected = evaluate_and_differentiate(
        policy, lambda: policy.evaluate_actions(samples.observations, samples.actions), weights
    )
    for index, (our_tensor, tensor) in enumerate(zip(ours, expected, strict=True)):
        # None and zero are the same to the optimizer's sum of losses
        tensor = th.zeros(1) if tensor is None else tensor
        our_tensor = th.zeros_like(tensor) if our_tensor is None else our_tensor
        # Where an action is nearly certain, the gradient of the entropy is a small difference of large numbers
        tolerance = 1e-5 if index < 3 else 1e-4
        atol = tolerance * max(1.0, float(tensor.abs().max()))
        np.testing.assert_allclose(our_tensor.numpy(), tensor.expand_as(our_tensor).numpy(), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("action_space", [spaces.Discrete(3), spaces.Box(-1, 1, (2,))], ids=["Discrete", "Box"])
def test_many_transitions(action_space: spaces.Space) -> None:
    """Their tanh is NumPy's, and the products of the actor in collecting are torch's."""
    n = 1100
    policy = make_policy(action_space)
    samples, weights, plain = make_samples(policy, n), th.randn(3, n), find_plain(policy)
    with np.errstate(all="raise"):
        ours = evaluate_and_differentiate(policy, lambda: evaluate_actions(policy, samples, plain), weights)
    expected = evaluate_and_differentiate(
        policy, lambda: policy.evaluate_actions(samples.observations, samples.actions), weights
    )
    for our_tensor, tensor in zip(ours, expected, strict=True):
        np.testing.assert_allclose(our_tensor, tensor.expand_as(our_tensor), rtol=1e-4, atol=1e-4 * float(tensor.abs().max()))  # type: ignore[arg-type,union-attr]
    observations = samples.observations.numpy()
    _, output = make_actor(policy, "numpy", np.random.default_rng(0)).latent_and_output(observations)
    with th.no_grad():
        latent = policy.mlp_extractor.forward_actor(samples.observations)
        np.testing.assert_allclose(output, policy.action_net(latent), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(predict_values(policy, observations, plain), ours[0], rtol=1e-4, atol=1e-5)


def test_the_second_derivative_of_tanh() -> None:
    x = th.linspace(-3, 3, 7, dtype=th.float64, requires_grad=True)
    assert th.autograd.gradcheck(_Tanh.apply, x)
    assert th.autograd.gradgradcheck(_Tanh.apply, x)


def test_half_precision() -> None:
    policy = make_policy(spaces.Discrete(3))
    samples = make_samples(policy, 1100)
    with th.autocast("cpu", dtype=th.bfloat16):
        values, *_ = evaluate_actions(policy, samples, find_plain(policy))
        expected = policy.predict_values(samples.observations).flatten()
    assert values.dtype == th.bfloat16
    np.testing.assert_allclose(values.detach().float(), expected.detach().float(), rtol=0.02, atol=0.02)


def test_frozen_parameters_get_no_gradient() -> None:
    policy = make_policy(spaces.Box(-1, 1, (2,)))
    policy.mlp_extractor.policy_net.requires_grad_(False)
    policy.log_std.requires_grad_(False)
    samples = make_samples(policy, 7)
    evaluate_and_differentiate(policy, lambda: evaluate_actions(policy, samples, find_plain(policy)), th.ones(3, 7))
    assert all(parameter.grad is None for parameter in policy.mlp_extractor.policy_net.parameters())
    assert policy.log_std.grad is None
    assert policy.action_net.weight.grad is not None


class OwnEvaluation(ActorCriticPolicy):
    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return 2 * values, log_prob, entropy


class OwnValues(ActorCriticPolicy):
    def predict_values(self, obs: Any) -> th.Tensor:
        return 2 * super().predict_values(obs)


class OwnModes(ActorCriticPolicy):
    def set_training_mode(self, mode: bool) -> None:
        super().set_training_mode(mode)


def replace_critic(policy: Any) -> None:
    policy.mlp_extractor.value_net = Residual(*policy.mlp_extractor.value_net)


def patch_policy(policy: Any) -> None:
    evaluate = policy.evaluate_actions
    policy.evaluate_actions = lambda *arguments: evaluate(*arguments)


@pytest.mark.parametrize(
    "change",
    [
        replace_critic,
        patch_policy,
        lambda policy: setattr(policy, "features_extractor", FlattenExtractor(BOX)),
        lambda policy: setattr(policy, "vf_features_extractor", FlattenExtractor(BOX)),
        lambda policy: policy.value_net.register_forward_hook(lambda module, x, y: 2 * y),
        lambda policy: policy.mlp_extractor.value_net[0].register_full_backward_hook(lambda module, x, y: None),
        lambda policy: policy.mlp_extractor.register_full_backward_hook(lambda module, x, y: None),
        lambda policy: policy.mlp_extractor.value_net.__setitem__(1, nn.Dropout(0.5)),
        lambda policy: setattr(policy.value_net, "bias", None),
        lambda policy: policy.mlp_extractor.value_net.double(),
        lambda policy: nn.utils.parametrizations.weight_norm(policy.value_net),
    ],
)
def test_the_rest_is_left_to_the_policy(change: Callable[[Any], Any]) -> None:
    policy = make_policy(spaces.Discrete(3))
    assert find_plain(policy) is not None
    change(policy)
    assert find_plain(policy) is None


@pytest.mark.parametrize(
    "policy_class, kwargs",
    [
        (OwnEvaluation, {}),
        (OwnValues, {}),
        (OwnModes, {}),
        (SharedMlpPolicy, {}),
        (MaskableActorCriticPolicy, {}),
        (ActorCriticPolicy, {"share_features_extractor": False}),
    ],
)
def test_policies_that_are_left_alone(policy_class: type, kwargs: dict) -> None:
    assert find_plain(make_policy(spaces.Discrete(3), BOX, policy_class, **kwargs)) is None


def test_a_change_is_seen_at_the_next_rollout() -> None:
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", seed=0, device="cpu").learn(100)
    assert isinstance(model._plain_mlp, PlainMlp) and model._plain_mlp.critic is not None
    calls: list[int] = []
    model.policy.value_net.register_forward_hook(lambda module, x, y: calls.append(len(x[0])))
    model.learn(100)
    assert sum(calls) > 0
    # A parameter is another object at once
    model.policy.value_net._forward_hooks.clear()
    model._refresh_actor()
    model.policy.value_net.weight = nn.Parameter(th.zeros(1, 64))
    model.policy.value_net.bias = nn.Parameter(th.ones(1))
    values, _, _ = model._evaluate_actions(make_samples(model.policy, 3))
    assert values.tolist() == [1.0, 1.0, 1.0]


def replace_head(model: EpisodicA2C) -> None:
    model.policy.value_net = nn.Linear(64, 1)


def replace_policy(model: EpisodicA2C) -> None:
    model.policy = EpisodicA2C("MlpPolicy", "CartPole-v1", seed=5, device="cpu").policy


@pytest.mark.parametrize("replace", [replace_head, replace_policy])
@pytest.mark.parametrize("when", ["on_rollout_start", "on_rollout_end"])
def test_what_is_replaced_during_a_rollout_is_trained_after_it(replace: Any, when: str) -> None:
    weights: list[th.Tensor] = []

    class Replace(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            if when == "on_rollout_start":
                self.replace_once()
            # At the second start, the weights after the first update
            weights.append(model.policy.value_net.weight.detach().clone())

        def _on_rollout_end(self) -> None:
            if when == "on_rollout_end":
                self.replace_once()
                weights.append(model.policy.value_net.weight.detach().clone())

        def replace_once(self) -> None:
            if model._n_updates == 0:
                replace(model)
                model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=1e-2)

    model = EpisodicA2C("MlpPolicy", "CartPole-v1", seed=0, device="cpu")
    model.learn(100, callback=Replace())
    before, after = weights[when == "on_rollout_end" :][:2]
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan, 1e300])
@pytest.mark.parametrize("n", [1, 3])
def test_values_of_what_is_not_finite(number: float, n: int) -> None:
    """Without a warning: callers check for non-finite values."""
    policy = make_policy(spaces.Discrete(2), spaces.Box(-np.inf, np.inf, (3,), np.float64))
    observations = np.full((n, 3), number)
    assert predict_values(policy, observations, find_plain(policy)).shape == (n,)


def test_a_gradient_that_overflows_is_refused_without_a_warning() -> None:
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", vf_coef=1e3, seed=0, device="cpu")
    with th.no_grad():
        model.policy.value_net.weight.zero_()
        model.policy.value_net.weight[0, 0] = 1e38
        model.policy.mlp_extractor.value_net[2].weight.mul_(1e6)
    with pytest.raises(ValueError, match="not finite"):
        model.learn(200)
