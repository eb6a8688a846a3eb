"""The shared network, and the rescaling of the critic's last layer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

from sb3_episodic_a2c import EpisodicA2C
from sb3_episodic_a2c.policies import rescale_value_head
from sb3_episodic_a2c.returns import EPSILON, ReturnStatistics, unstandardize


def test_actor_and_critic_share_the_hidden_layers() -> None:
    model = EpisodicA2C("SharedMlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [32, 16], "activation_fn": nn.Tanh})
    policy = model.policy
    assert sum(parameter.numel() for parameter in policy.parameters()) == 4 * 32 + 32 + 32 * 16 + 16 + 16 * 2 + 2 + 16 + 1
    observations = th.randn(5, 4)
    latent = policy.mlp_extractor.shared_net(observations)
    assert latent.shape == (5, 16)
    assert any(isinstance(module, nn.Tanh) for module in policy.mlp_extractor.shared_net)
    th.testing.assert_close(policy.predict_values(observations), policy.value_net(latent))
    th.testing.assert_close(
        policy.get_distribution(observations).distribution.logits, policy.action_net(latent).log_softmax(1)
    )
    values, log_prob, entropy = policy.evaluate_actions(observations, th.zeros(5))
    th.testing.assert_close(values, policy.value_net(latent))
    assert entropy is not None
    assert log_prob.shape == entropy.shape == (5,)


def test_shared_policy_survives_saving(tmp_path: object) -> None:
    model = EpisodicA2C("SharedMlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [8]}, seed=0).learn(200)
    model.policy.save(f"{tmp_path}/policy")
    model.save(f"{tmp_path}/model")
    observations = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    for policy in (type(model.policy).load(f"{tmp_path}/policy"), EpisodicA2C.load(f"{tmp_path}/model").policy):
        np.testing.assert_array_equal(
            policy.predict(observations, deterministic=True)[0], model.predict(observations, deterministic=True)[0]
        )


def test_no_shared_layers_at_all() -> None:
    EpisodicA2C("SharedMlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": []}).learn(100)


@pytest.mark.parametrize("policy", ["MlpPolicy", "SharedMlpPolicy"])
@pytest.mark.parametrize("new", [ReturnStatistics(-30.0, 900.0, 10.0), ReturnStatistics(5.0, 1e-4, 10.0)])
def test_rescaling_leaves_values_in_reward_units_as_they_are(policy: str, new: ReturnStatistics) -> None:
    model = EpisodicA2C(policy, "CartPole-v1", seed=0)
    old = ReturnStatistics(12.0, 16.0, 5.0)
    observations = th.randn(20, 4)

    def values(statistics: ReturnStatistics) -> np.ndarray:
        with th.no_grad():
            return unstandardize(model.policy.predict_values(observations).numpy(), statistics.mean, statistics.std)

    before = values(old)
    unchanged = {name: parameter.detach().clone() for name, parameter in model.policy.named_parameters()}
    rescale_value_head(model.policy, old, new)
    assert np.std(before) > 0.1
    np.testing.assert_allclose(values(new), before, rtol=1e-4)
    changed = {name for name, parameter in model.policy.named_parameters() if not th.equal(parameter, unchanged[name])}
    assert changed == {"value_net.weight", "value_net.bias"}


@pytest.mark.parametrize("first, second", [(None, "running"), ("running", None)])
def test_a_critic_keeps_its_values_when_the_setting_is_changed_at_load(first: Any, second: Any, tmp_path: Path) -> None:
    """Raw returns are of other units than standardised ones."""
    observations = th.randn(20, 4)

    def values(model: EpisodicA2C) -> np.ndarray:
        statistics = model.return_statistics
        with th.no_grad():
            return unstandardize(model.policy.predict_values(observations).numpy(), statistics.mean, statistics.std)

    model = EpisodicA2C("MlpPolicy", "CartPole-v1", standardize_returns=first, learning_rate=0.01, seed=0).learn(3_000)
    before = values(model)
    assert before.mean() > 5
    model.save(tmp_path / "model")
    env = make_vec_env("CartPole-v1")
    loaded = EpisodicA2C.load(tmp_path / "model", env=env, standardize_returns=second, learning_rate=0.0)
    np.testing.assert_allclose(values(loaded), before, rtol=1e-4)
    loaded.learn(1_000)
    np.testing.assert_allclose(values(loaded), before, rtol=1e-3)
    assert (loaded.return_statistics.count > 0) == (second == "running")


def test_nothing_to_preserve_before_the_first_update_or_without_spread() -> None:
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", seed=0)
    before = th.nn.utils.parameters_to_vector(model.policy.parameters()).detach()
    rescale_value_head(model.policy, ReturnStatistics(3.0, EPSILON**2 / 2, 1.0), ReturnStatistics(5.0, 4.0, 9.0))
    rescale_value_head(model.policy, ReturnStatistics(), ReturnStatistics())
    assert th.equal(before, th.nn.utils.parameters_to_vector(model.policy.parameters()))
    # No update yet: the critic predicts noise around 0, which is best read as about the mean
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", learning_rate=0.0, seed=0)
    model.learn(1_000, callback=lambda *_: model._n_updates == 0)
    assert model._n_updates == 1
    assert th.equal(before, th.nn.utils.parameters_to_vector(model.policy.parameters()))


def test_a_policy_that_is_frozen_entirely() -> None:
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", seed=0, device="cpu")
    model.policy.requires_grad_(False)
    with pytest.raises(ValueError, match=r"No parameter of `policy.optimizer` has a gradient: all are frozen"):
        model.learn(200)


def test_training_with_a_frozen_critic_keeps_its_values_in_reward_units() -> None:
    """With a learning rate of 0, only the rescaling moves the parameters."""
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", learning_rate=0.0, seed=0, device="cpu").learn(50)
    observations = th.randn(20, 4)

    def values() -> np.ndarray:
        statistics = model.return_statistics
        with th.no_grad():
            return unstandardize(model.policy.predict_values(observations).numpy(), statistics.mean, statistics.std)

    before, statistics = values(), model.return_statistics
    model.learn(1_000, reset_num_timesteps=False)
    assert abs(model.return_statistics.mean - statistics.mean) > 0.01
    np.testing.assert_allclose(values(), before, rtol=1e-3)
