"""The ONNX model of an agent acts as the agent."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_episodic_a2c import EpisodicA2C, MaskableEpisodicA2C, RecurrentEpisodicA2C
from sb3_episodic_a2c.__main__ import main
from sb3_episodic_a2c.tools.export import export_onnx
from sb3_episodic_a2c.tools.runs import Run
from sb3_episodic_a2c.tools.solve import solve
from tests.envs import TargetEnv

BOX = spaces.Box(-2, 2, (3,))
IMAGE = spaces.Box(0, 255, (3, 40, 40), dtype=np.uint8)
DICT = spaces.Dict({"image": IMAGE, "mode": spaces.Discrete(4), "vector": BOX})
BOUNDED = spaces.Box(-0.1, 0.2, (2,))


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def inputs_of(space: spaces.Space, n: int) -> dict[str, np.ndarray]:
    if isinstance(space, spaces.Dict):
        return {key: np.stack([part.sample() for _ in range(n)]) for key, part in space.spaces.items()}
    return {"observation": np.stack([space.sample() for _ in range(n)])}


@pytest.mark.parametrize(
    "observation_space, action_space, kwargs",
    [
        (BOX, spaces.Discrete(3), {}),
        (BOX, spaces.MultiDiscrete([2, 3]), {}),
        (BOX, spaces.MultiBinary(3), {}),
        (BOX, BOUNDED, {}),
        (BOX, BOUNDED, {"use_sde": True, "policy_kwargs": {"squash_output": True}}),
        (spaces.Discrete(5), spaces.Discrete(3), {}),
        (IMAGE, spaces.Discrete(3), {}),
        (DICT, BOUNDED, {}),
    ],
    ids=str,
)
def test_it_acts_as_the_model(
    observation_space: spaces.Space, action_space: spaces.Space, kwargs: dict, tmp_path: Path
) -> None:
    is_dict = isinstance(observation_space, spaces.Dict)
    policy = "MultiInputPolicy" if is_dict else "CnnPolicy" if observation_space is IMAGE else "MlpPolicy"
    model = EpisodicA2C(policy, TargetEnv(observation_space, action_space), seed=0, **kwargs).learn(20)
    export_onnx(model, tmp_path / "agent.onnx")
    # Another number than it was traced with
    for n in (1, 7):
        inputs = inputs_of(model.observation_space, n)
        (actions,) = session(tmp_path / "agent.onnx").run(None, inputs)
        expected, _ = model.predict(inputs if is_dict else inputs["observation"], deterministic=True)  # type: ignore[arg-type]
        np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-5)
    # The model goes on
    model.learn(20)


@pytest.mark.parametrize("norm_obs_keys", [None, ["vector"]])
def test_observations_are_normalised_within(norm_obs_keys: list[str] | None, tmp_path: Path) -> None:
    space = BOX if norm_obs_keys is None else DICT
    env = VecNormalize(
        DummyVecEnv([lambda: TargetEnv(space, BOUNDED)]), norm_reward=False, norm_obs_keys=norm_obs_keys, clip_obs=1.0
    )
    model = EpisodicA2C("MlpPolicy" if space is BOX else "MultiInputPolicy", env, seed=0).learn(50)
    export_onnx(model, tmp_path / "agent.onnx")
    inputs = inputs_of(space, 9)
    (actions,) = session(tmp_path / "agent.onnx").run(None, inputs)
    normalised: Any = env.normalize_obs(inputs if space is DICT else inputs["observation"])
    np.testing.assert_allclose(actions, model.predict(normalised, deterministic=True)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("space", [BOX, spaces.Box(-2, 2, (4, 5))], ids=str)
def test_frames_that_are_stacked_after_they_were_normalised(space: spaces.Box, tmp_path: Path) -> None:
    """As RL Zoo does it."""
    normalize = VecNormalize(DummyVecEnv([lambda: TargetEnv(space, BOUNDED)]), norm_reward=False)
    env = VecFrameStack(normalize, 3)
    model = EpisodicA2C("MlpPolicy", env, seed=0).learn(50)
    export_onnx(model, tmp_path / "agent.onnx")
    frames = [inputs_of(space, 4)["observation"] for _ in range(3)]
    (actions,) = session(tmp_path / "agent.onnx").run(None, {"observation": np.concatenate(frames, axis=-1)})
    normalised = np.concatenate([normalize.normalize_obs(frame) for frame in frames], axis=-1)
    np.testing.assert_allclose(actions, model.predict(normalised, deterministic=True)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "action_space, first_of_choices",
    [(spaces.Discrete(5), [0]), (spaces.MultiDiscrete([3, 2]), [0, 3]), (spaces.MultiBinary(2), [0, 2])],
    ids=str,
)
def test_masks(action_space: spaces.Space, first_of_choices: list[int], tmp_path: Path) -> None:
    model = MaskableEpisodicA2C("MlpPolicy", TargetEnv(BOX, action_space), seed=0).learn(20)
    export_onnx(model, tmp_path / "agent.onnx")
    n_masks = 4 if isinstance(action_space, spaces.MultiBinary) else 5
    masks = np.random.default_rng(0).random((20, n_masks)) < 0.5
    # At least one value of each choice
    masks[:, first_of_choices] = True
    inputs = inputs_of(BOX, 20)
    (actions,) = session(tmp_path / "agent.onnx").run(None, {**inputs, "action_masks": masks})
    np.testing.assert_array_equal(actions, model.predict(inputs["observation"], deterministic=True, action_masks=masks)[0])


def test_the_memory_of_an_lstm(tmp_path: Path) -> None:
    policy_kwargs = {"lstm_hidden_size": 8, "n_lstm_layers": 2}
    model = RecurrentEpisodicA2C("MlpLstmPolicy", TargetEnv(BOX, BOUNDED), seed=0, policy_kwargs=policy_kwargs).learn(20)
    export_onnx(model, tmp_path / "agent.onnx")
    run = session(tmp_path / "agent.onnx").run
    hidden, cell = np.zeros((2, 2, 1, 8), dtype=np.float32)
    states, start = None, np.ones(1, dtype=bool)
    for _ in range(5):
        observation = BOX.sample()[None]
        action, hidden, cell = run(None, {"observation": observation, "hidden": hidden, "cell": cell})
        expected, states = model.predict(observation, state=states, episode_start=start, deterministic=True)
        np.testing.assert_allclose(action, expected, rtol=1e-4, atol=1e-5)
        start = np.zeros(1, dtype=bool)


def test_a_run_of_solve(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Whose observations are normalised."""
    folder = tmp_path / "run"
    solve("Pendulum-v1", total_timesteps=600, output=folder, progress_bar=False, n_eval_episodes=1, gif=False)
    assert main(["export", "--run", str(folder)]) == 0
    assert f"Wrote {folder / 'agent.onnx'}" in capsys.readouterr().out
    run = Run.read(folder)
    env = run.make_env()
    env.seed(3)
    observations: Any = env.reset()
    raw, _ = gym.make("Pendulum-v1").reset(seed=3)
    (action,) = session(folder / "agent.onnx").run(None, {"observation": raw[None]})
    np.testing.assert_allclose(action, run.load_model().predict(observations, deterministic=True)[0], rtol=1e-4, atol=1e-5)
