"""Models that version 0.1 has saved are loaded, play as they did, and go on learning."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from sb3_contrib.common.envs import InvalidActionEnvDiscrete

from sb3_episodic_a2c import EpisodicA2C, MaskableEpisodicA2C, RecurrentEpisodicA2C

DATA = Path(__file__).parent / "data"

OBSERVATIONS = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def test_it_plays_as_it_did() -> None:
    """The numbers are what version 0.1 printed: one hidden layer of 8, 400 steps of CartPole, seed 0."""
    model = EpisodicA2C.load(DATA / "episodic_a2c_0.1", device="cpu")
    assert (model.num_timesteps, model._n_updates, model._episode_num) == (400, 20, 20)
    actions, _ = model.predict(OBSERVATIONS, deterministic=True)
    assert actions.tolist() == [1, 1, 1, 0, 1]
    with th.no_grad():
        values = model.policy.predict_values(th.as_tensor(OBSERVATIONS)).flatten().tolist()
    assert values == pytest.approx([-0.15103623, 0.11751303, -0.71237326, -1.0698806, -0.14773792], abs=1e-6)
    # What 0.1 did not have has the values that change nothing
    assert (model.gae_lambda, model.n_value_epochs, model.noise_resample_prob) == (1.0, 0, 1.0)


@pytest.mark.parametrize(
    "algorithm, name, env",
    [
        (EpisodicA2C, "episodic_a2c", lambda: gym.make("CartPole-v1")),
        (MaskableEpisodicA2C, "episodic_a2c_mask", lambda: InvalidActionEnvDiscrete(dim=6, n_invalid_actions=3)),
        (RecurrentEpisodicA2C, "episodic_a2c_lstm", lambda: gym.make("CartPole-v1")),
    ],
)
def test_it_goes_on_learning(algorithm: type[EpisodicA2C], name: str, env, tmp_path: Path) -> None:
    model = algorithm.load(DATA / f"{name}_0.1", env=env(), device="cpu")
    before, n_updates = model.num_timesteps, model._n_updates
    model.learn(300, reset_num_timesteps=False)
    assert model.num_timesteps == before + 300 and model._n_updates > n_updates
    # What is saved from here on is of this version
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model", device="cpu")
    assert all(th.equal(a, b) for a, b in zip(model.policy.parameters(), again.policy.parameters(), strict=True))
