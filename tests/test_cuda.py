"""On a GPU, for machines that have one: the actor's copies, checkpoints with the GPU's random state, moving a model over."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_episodic_a2c import EpisodicA2C, RecurrentEpisodicA2C, load_checkpoint
from sb3_episodic_a2c.tools.benchmark import IMAGE_ENV, make_env
from tests.envs import ACTION_SPACES, TargetEnv, vectorized
from tests.test_checkpoints import SETTINGS, CheckpointEveryUpdate, assert_same, make_model, state_of

pytestmark = [
    pytest.mark.skipif(not th.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:You are trying to run .* on the GPU", "ignore:No episode ended"),
]


def states_with_gpu(model: EpisodicA2C) -> dict[str, Any]:
    return {**state_of(model), "cuda": th.cuda.get_rng_state_all()}


class CompareActors(BaseCallback):
    """After every update, the copies that NumPy works on must be the parameters on the GPU."""

    n_compared = 0

    def _on_step(self) -> bool:
        if self.n_calls % 7 == 0:
            observations = self.model._last_obs
            _, output = self.model._actor.latent_and_output(observations)
            distribution = self.model.policy.get_distribution(th.as_tensor(observations, device="cuda")).distribution
            logits = distribution.logits.detach().cpu().numpy()
            np.testing.assert_allclose(output - np.logaddexp.reduce(output, axis=1, keepdims=True), logits, atol=1e-4)
            self.n_compared += 1
        return True


@pytest.mark.parametrize("fused", [True, False])
def test_numpy_actor_follows_the_parameters(fused: bool) -> None:
    policy_kwargs = {} if fused else {"optimizer_kwargs": {"foreach": True}}
    env = make_vec_env("CartPole-v1", 4, seed=0)
    model = EpisodicA2C("MlpPolicy", env, policy_kwargs=policy_kwargs, learning_rate=0.01, seed=0, device="cuda")
    assert model._actor.name == "numpy"
    assert bool(model.policy.optimizer.defaults["fused"]) == fused
    callback = CompareActors()
    model.learn(3_000, callback=callback)
    assert callback.n_compared > 100 and model._n_updates >= 5


def test_nan_leaves_the_gpu_usable() -> None:
    """Numbers are checked before the GPU samples from them: a failed check on the GPU would end all use of it."""
    env = vectorized(lambda _: TargetEnv(action_space=ACTION_SPACES["multi_binary"]), 1)
    model = EpisodicA2C("MlpPolicy", env, actor="torch", device="cuda", seed=0)
    with pytest.raises(ValueError):
        model._actor.sample(np.full((1, *env.observation_space.shape), np.nan, np.float32), {})
    assert model.learn(50)._n_updates > 0


def test_solves_cartpole() -> None:
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", seed=0, device="cuda").learn(40_000)
    assert np.mean([episode["r"] for episode in model.ep_info_buffer]) > 300


@pytest.mark.parametrize("setting", SETTINGS)
def test_goes_on_as_if_never_stopped(setting: str, tmp_path: Path) -> None:
    with th.backends.cudnn.flags(deterministic=True):
        model = make_model(setting, 3, device="cuda")
        checkpoints = CheckpointEveryUpdate(tmp_path)
        model.learn(500, callback=checkpoints)
        expected = states_with_gpu(model)
        resumed = load_checkpoint(checkpoints.paths[len(checkpoints.paths) // 2], device="cuda")
        resumed.learn(500 - resumed.num_timesteps, reset_num_timesteps=False)
    assert resumed.policy.device.type == "cuda"
    assert_same(states_with_gpu(resumed), expected)


def test_images() -> None:
    model = EpisodicA2C("CnnPolicy", make_env(IMAGE_ENV, 2), batch_size=128, seed=0, device="cuda")
    assert model._actor.name == "torch"
    model.learn(1_000)
    assert model._n_updates == 2
    assert all(bool(parameter.isfinite().all()) for parameter in model.policy.parameters())


@pytest.mark.parametrize("algorithm", [EpisodicA2C, RecurrentEpisodicA2C])
@pytest.mark.parametrize("first, second", [("cuda", "cpu"), ("cpu", "cuda")])
def test_moves_between_devices(algorithm: Any, first: str, second: str, tmp_path: Path) -> None:
    policy = "MlpLstmPolicy" if algorithm is RecurrentEpisodicA2C else "MlpPolicy"
    model = algorithm(policy, make_vec_env("CartPole-v1", 2, seed=0), seed=0, device=first).learn(500)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 2, seed=0), device=second)
    observations = np.random.default_rng(0).uniform(-1, 1, (50, 4)).astype(np.float32)
    before, _ = model.predict(observations, deterministic=True)
    after, _ = loaded.predict(observations, deterministic=True)
    assert (before == after).mean() > 0.95
    loaded.learn(500, reset_num_timesteps=False)
    assert loaded._n_updates > model._n_updates


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", seed=0, device="cuda").learn(200)
    with th.no_grad():
        model.policy.value_net.weight[0, 0] = np.nan
    before = [parameter.clone() for parameter in model.policy.parameters()]
    with pytest.raises(ValueError, match="not finite"):
        model.learn(200, reset_num_timesteps=False)
    for parameter, old in zip(model.policy.parameters(), before, strict=True):
        assert th.equal(parameter.nan_to_num(), old.nan_to_num())
