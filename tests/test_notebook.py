"""The notebook, to the digit: every number of the original TensorFlow code, through the class itself."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback

from sb3_episodic_a2c import EpisodicA2C, notebook_preset
from sb3_episodic_a2c.losses import policy_loss, value_loss
from sb3_episodic_a2c.returns import ReturnStatistics, discounted_returns, standardize_returns

GOLDEN = np.load(Path(__file__).parent / "data" / "notebook_cases.npz")
CASES = sorted({key.split("/")[0] for key in GOLDEN.files})
LAYERS = {"common": "mlp_extractor.shared_net.0", "actor": "action_net", "critic": "value_net"}


class Replay(gym.Env):
    """Plays the recorded episode again and again, whatever the action."""

    def __init__(self, observations: np.ndarray, rewards: np.ndarray) -> None:
        self.observations, self.rewards = observations, rewards
        self.observation_space = spaces.Box(-np.inf, np.inf, observations.shape[1:], dtype=np.float32)
        self.action_space = spaces.Discrete(2)
        self.t = 0

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        super().reset(**kwargs)
        self.t = 0
        return self.observations[0], {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = float(self.rewards[self.t])
        self.t += 1
        is_last = self.t == len(self.rewards)
        return self.observations[min(self.t, len(self.rewards) - 1)], reward, is_last, False, {}


class RecordedActions(EpisodicA2C):
    """Takes the recorded actions instead of sampling; everything else is the class under test."""

    recorded_actions: np.ndarray

    def _sample_actions(self, observations: Any, policy_inputs: Any) -> np.ndarray:
        env = self.env.envs[0].unwrapped
        return self.recorded_actions[env.t : env.t + 1]


class Snapshots(BaseCallback):
    """Parameters at the start of each rollout, i.e. after each update, and what the buffer held at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: list[dict[str, np.ndarray]] = []
        self.offered: list[dict[str, np.ndarray]] = []

    def _on_rollout_start(self) -> None:
        state = self.model.policy.state_dict()
        self.parameters.append({name: value.numpy().copy() for name, value in state.items()})

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        self.offered.append({name: getattr(buffer, name)[:, 0] for name in ("returns", "values", "log_probs", "advantages")})

    def _on_step(self) -> bool:
        return True


def make_model(case: str, **arguments: Any) -> RecordedActions:
    golden = {key.removeprefix(f"{case}/"): GOLDEN[key] for key in GOLDEN.files if key.startswith(f"{case}/")}
    env = Replay(golden["observations"], golden["rewards"])
    model = RecordedActions(env=env, **{**notebook_preset(), "gamma": float(golden["gamma"]), "device": "cpu", **arguments})
    model.recorded_actions = golden["actions"]
    state = {
        f"{ours}.{kind}": th.as_tensor(golden[f"params/{theirs}.{kind}"])
        for theirs, ours in LAYERS.items()
        for kind in ("weight", "bias")
    }
    # The network has these parameters and no others
    model.policy.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("case", CASES)
def test_pure_functions(case: str) -> None:
    golden = {key.removeprefix(f"{case}/"): GOLDEN[key] for key in GOLDEN.files if key.startswith(f"{case}/")}
    returns = discounted_returns(golden["rewards"], float(golden["gamma"]))
    np.testing.assert_allclose(returns, golden["returns"], rtol=1e-5, atol=1e-5)
    targets, _ = standardize_returns(returns, np.array([len(returns)]), "episode", ReturnStatistics())
    assert np.isfinite(targets).all()
    np.testing.assert_allclose(targets, golden["standardized_returns"], rtol=1e-4, atol=2e-5)
    values, log_probs = th.as_tensor(golden["values"]), th.as_tensor(golden["action_log_probs"])
    targets_tensor = th.as_tensor(golden["standardized_returns"])
    assert policy_loss(log_probs, targets_tensor - values).item() == pytest.approx(golden["actor_loss"], rel=1e-4, abs=1e-4)
    assert value_loss(values, targets_tensor).item() == pytest.approx(golden["critic_loss"], rel=1e-4)


@pytest.mark.parametrize("batch_size", [None, 7])
@pytest.mark.parametrize("mode", ["notebook", "detached"])
@pytest.mark.parametrize("case", CASES)
def test_learn_reproduces_the_notebook(case: str, mode: str, batch_size: int | None) -> None:
    n_steps = len(GOLDEN[f"{case}/rewards"])
    model = make_model(case, detach_advantage=mode == "detached", batch_size=batch_size)
    gradients: list[dict[str, np.ndarray]] = []
    step = model.policy.optimizer.step

    def recording_step(*args: Any, **kwargs: Any) -> Any:
        gradients.append({name: p.grad.numpy().copy() for name, p in model.policy.named_parameters()})
        return step(*args, **kwargs)

    model.policy.optimizer.step = recording_step
    snapshots = Snapshots()
    # A sixth rollout starts, so that the parameters after five updates are seen
    model.learn(5 * n_steps + 1, callback=snapshots)

    assert model._n_updates >= 5
    offered = snapshots.offered[0]
    np.testing.assert_allclose(offered["returns"], GOLDEN[f"{case}/standardized_returns"], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(offered["values"], GOLDEN[f"{case}/values"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(offered["log_probs"], GOLDEN[f"{case}/action_log_probs"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(offered["advantages"], offered["returns"] - offered["values"])
    for theirs, ours in LAYERS.items():
        for kind in ("weight", "bias"):
            expected = GOLDEN[f"{case}/grads_{mode}/{theirs}.{kind}"]
            scale = np.abs(expected).max()
            np.testing.assert_allclose(gradients[0][f"{ours}.{kind}"], expected, rtol=1e-4, atol=1e-5 * max(scale, 1e-3))
            for n_updates in (1, 5):
                expected = GOLDEN[f"{case}/params_{mode}_after_{n_updates}/{theirs}.{kind}"]
                actual = snapshots.parameters[n_updates][f"{ours}.{kind}"]
                # Keras adds Adam's epsilon before the bias correction, torch after it: this shows where a gradient is
                # about as small as epsilon, in a few entries
                is_close = np.isclose(actual, expected, rtol=1e-4, atol=1e-4)
                assert is_close.mean() > 0.97, f"{theirs}.{kind} after {n_updates}: {is_close.mean()}"
                np.testing.assert_allclose(actual, expected, atol=3e-3 * n_updates)


@pytest.mark.parametrize("case", CASES)
def test_logged_losses_are_the_notebooks_per_transition(case: str) -> None:
    n_steps = len(GOLDEN[f"{case}/rewards"])
    model = make_model(case)
    model.learn(n_steps)
    logged = model.logger.name_to_value
    assert logged["train/policy_loss"] * n_steps == pytest.approx(GOLDEN[f"{case}/actor_loss"], rel=1e-3, abs=2e-3)
    assert logged["train/value_loss"] * n_steps == pytest.approx(GOLDEN[f"{case}/critic_loss"], rel=1e-4)


def test_a_one_step_episode_gives_no_nan() -> None:
    model = make_model("single_step")
    model.learn(100)
    assert model._n_updates == 100
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


def test_the_preset_is_the_notebooks_setting() -> None:
    model = EpisodicA2C(env="CartPole-v1", **notebook_preset())
    optimizer = model.policy.optimizer
    assert isinstance(optimizer, th.optim.Adam)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["eps"]) == (0.01, 1e-7)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.policy.named_parameters()}
    assert shapes == {
        "mlp_extractor.shared_net.0.weight": (128, 4),
        "mlp_extractor.shared_net.0.bias": (128,),
        "action_net.weight": (2, 128),
        "action_net.bias": (2,),
        "value_net.weight": (1, 128),
        "value_net.bias": (1,),
    }
    # Keras: Glorot uniform and zero biases
    for name, parameter in model.policy.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            limit = np.sqrt(6 / sum(parameter.shape))
            assert 0.8 * limit < parameter.abs().max() <= limit
