"""What is done with a run of ``solve`` after it: played, shown, described. And a run that is told to stop."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from huggingface_hub import ModelCard
from stable_baselines3.common.monitor import load_results

from sb3_episodic_a2c.__main__ import COMMANDS, PROGRAM, main
from sb3_episodic_a2c.tools.runs import Run, enjoy
from sb3_episodic_a2c.tools.solve import preset_entry, solve
from tests.processes import PATIENCE, Command
from tests.processes import run as run_command

CHECKOUT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "SDL_VIDEODRIVER": "dummy"}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment whose entry normalises observations. Tests share it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    solve("Pendulum-v1", seed=2, total_timesteps=2_000, output=folder, progress_bar=False, n_eval_episodes=4)
    return folder


def test_the_agent_plays_as_it_was_evaluated(run_folder: Path) -> None:
    """With the statistics of the training, from the printed lines of Python alone."""
    run = Run.read(run_folder)
    evaluation = run.result["evaluation"]
    assert (run_folder / "vecnormalize.pkl").exists()
    # Four environments at once and one after the other: products of matrices may round differently
    assert run.evaluate(n_episodes=4, seed=evaluation["seed"]).rewards == pytest.approx(evaluation["rewards"])
    script = run.snippet().replace('render_mode="human"', f"seed={evaluation['seed']}")
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, timeout=PATIENCE)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == pytest.approx(evaluation["rewards"][:3])


def test_enjoy_plays_a_run(run_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    command = ("enjoy", "--run", str(run_folder), "--no-render", "-n", "450")
    process = run_command(*command, cwd=tmp_path, environment=ENVIRONMENT)
    assert process.returncode == 0, process.stderr
    assert "Loading running average" in process.stdout and "Mean reward: " in process.stdout
    # It was trained on shorter episodes
    assert "Episode Length 200" in process.stdout
    # It leaves nothing behind
    assert not any(tmp_path.iterdir())


def test_enjoy_plays_a_masked_agent_that_ignores_masks(tmp_path: Path) -> None:
    hyperparams = {"use_masking": False}
    settings: dict[str, Any] = {"progress_bar": False, "n_eval_episodes": 2, "gif": False}
    folder = tmp_path / "run"
    solve(
        "CartPole-v1", algorithm="episodic_a2c_mask", hyperparams=hyperparams, total_timesteps=400, output=folder, **settings
    )
    process = run_command("enjoy", "--run", str(folder), "--no-render", "-n", "300", cwd=tmp_path, environment=ENVIRONMENT)
    assert process.returncode == 0, process.stderr
    assert "Mean reward: " in process.stdout


@pytest.mark.parametrize("command", ["enjoy", "gif -o x.gif", "card"])
def test_a_folder_that_is_no_run_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*command.split(), "--run", str(tmp_path)]) == 1
    assert "has no model.zip, so it is no finished run" in capsys.readouterr().err


ENVS_OF_A_USER = """
import gymnasium as gym
import numpy as np
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from gymnasium.envs.classic_control import CartPoleEnv

class LongCartPole(CartPoleEnv):
    def __init__(self, length, render_mode=None):
        super().__init__(render_mode=render_mode)
        self.length = length

class Grid(gym.Env):
    # It knows no way to be rendered
    observation_space = gym.spaces.Dict({"image": gym.spaces.Box(0, 255, (7, 7, 3), np.uint8), "to": gym.spaces.Discrete(4)})
    action_space = gym.spaces.Discrete(3)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def observe(self):
        return {"image": self.np_random.integers(0, 256, (7, 7, 3), dtype=np.uint8), "to": self.steps % 4}

    def step(self, action):
        self.steps += 1
        return self.observe(), float(action), self.steps == 5, False, {}

class Mistaken(CartPoleEnv):
    def step(self, action):
        return super().step(action)[:4] if self.state[0] > 0.1 else super().step(action)

gym.register("UsersGrid-v0", Grid)
gym.register("UsersMistake-v0", Mistaken, max_episode_steps=50)
gym.register("UsersMasked-v0", lambda render_mode=None: InvalidActionEnvDiscrete(dim=20, n_invalid_actions=10))
gym.register("UsersCartPole-v0", LongCartPole, max_episode_steps=20)
"""


@pytest.fixture
def users_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that registers environments."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "users_envs.py").write_text(ENVS_OF_A_USER)
    monkeypatch.syspath_prepend(str(tmp_path / "package"))
    yield "users_envs"
    sys.modules.pop("users_envs", None)
    for env_id in ("UsersMasked-v0", "UsersCartPole-v0", "UsersGrid-v0", "UsersMistake-v0"):
        gym.registry.pop(env_id, None)


def run_with_package(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Run a command in the folder of a test, where it finds the user's package."""
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(CHECKOUT), str(folder / "package")])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=PATIENCE)


@pytest.mark.parametrize(
    "env_id, algorithm, hyperparams",
    [
        ("UsersMasked-v0", "episodic_a2c_mask", {"learning_rate": 0.01}),
        ("UsersCartPole-v0", "episodic_a2c_lstm", {"env_kwargs": {"length": 3}}),
        ("UsersCartPole-v0", "episodic_a2c_lstm", {"env_kwargs": "dict(length=3)"}),
    ],
)
def test_solve_an_environment_of_the_users(
    env_id: str, algorithm: str, hyperparams: dict[str, Any], users_package: str, tmp_path: Path
) -> None:
    result = solve(
        env_id,
        algorithm=algorithm,
        hyperparams=hyperparams,
        gym_packages=[users_package],
        total_timesteps=400,
        output=tmp_path / "run",
        progress_bar=False,
        n_eval_episodes=2,
        gif=False,
    )
    run = Run.read(tmp_path / "run")
    assert run.algorithm == algorithm and {**run.hyperparams, **hyperparams} == run.hyperparams
    rewards = run.evaluate(2, result.evaluation.seed).rewards
    if algorithm == "episodic_a2c_lstm":
        assert rewards == result.evaluation.rewards
    else:
        # An action that is not allowed would have been an error. Its target is drawn without the seed
        assert len(rewards) == 2
        enjoy(tmp_path / "run", ["--no-render", "-n", "120"])


def test_solve_a_dict_with_an_image_too_small_for_a_network(users_package: str, tmp_path: Path) -> None:
    """And one that nobody can look at, so that the printed lines of Python do not try."""
    settings: dict[str, Any] = {"gym_packages": [users_package], "progress_bar": False, "n_eval_episodes": 2}
    result = solve("UsersGrid-v0", total_timesteps=400, output=tmp_path / "run", **settings)
    assert (tmp_path / "run" / "vecnormalize.pkl").exists() and not result.gif_rewards
    script = Run.read(tmp_path / "run").snippet()
    process = run_with_package([sys.executable, "-c", script], tmp_path)
    assert process.returncode == 0 and len(json.loads(process.stdout)) == 3, process.stderr


def test_a_mistake_in_an_environment_keeps_its_traceback(users_package: str, tmp_path: Path) -> None:
    """A ``ValueError`` as well, although that of a bad argument is one line."""
    command = ("solve", "--env", "UsersMistake-v0", "--gym-packages", users_package, "--no-progress")
    process = run_with_package([sys.executable, "-m", "sb3_episodic_a2c", *command], tmp_path)
    assert process.returncode != 0 and "not enough values to unpack" in process.stderr
    assert "Traceback" in process.stderr
    if sys.version_info >= (3, 11):
        assert "Raised by environment 0 at step" in process.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"hyperparams": {"lerning_rate": 0.01}}, "'lerning_rate'.*Did you mean 'learning_rate'"),
        ({"hyperparams": {"gae_lambda": 2}}, "`gae_lambda` is 2"),
        ({"hyperparams": {"n_envs": 0}}, "`n_envs` is 0"),
        ({"hyperparams": {"n_envs": 2.0}}, "`n_envs` is 2.0"),
        ({"hyperparams": {"env_kwargs": {"size": 3}}}, "`env` CartPole-v1 cannot be made: .*'size'.*env_kwargs:"),
        # Found when the training has begun
        ({"algorithm": "episodic_a2c_mask"}, "no method `action_masks`"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_a_start_that_fails_leaves_nothing(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        solve("CartPole-v1", total_timesteps=200, output=output, progress_bar=False, gif=False, **arguments)
    assert not output.exists()


def test_hyperparameters_that_are_no_python_are_explained(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["solve", "--env", "CartPole-v1", "-params", "learning_rate:lin_0.01"])
    assert "a string in quotes of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    "space, policy",
    [
        (spaces.Box(0, 255, (84, 84, 4), np.uint8), "CnnPolicy"),
        (spaces.Box(0, 255, (3, 64, 64), np.uint8), "CnnPolicy"),
        # Too small for SB3's network, and no picture
        (spaces.Box(0, 255, (7, 7, 3), np.uint8), "MlpPolicy"),
        (spaces.Box(0, 1, (84, 84, 4), np.float32), "MlpPolicy"),
        (spaces.Dict({"vector": spaces.Box(0, 1, (3,))}), "MultiInputPolicy"),
    ],
)
def test_the_policy_fits_the_observations(space: spaces.Space, policy: str) -> None:
    assert preset_entry("default", "episodic_a2c", "CartPole-v1", space)["policy"] == policy


def test_the_default_preset_keeps_what_the_environment_needs() -> None:
    entries = {
        env_id: preset_entry("default", "episodic_a2c", env_id, spaces.Discrete(2))
        for env_id in ("Blackjack-v1", "CliffWalking-v1", "Pendulum-v1")
    }
    assert "env_wrapper" in entries["Blackjack-v1"] and "learning_rate" not in entries["Blackjack-v1"]
    # It has no limit of its own; Pendulum's is for training only
    assert entries["CliffWalking-v1"]["env_kwargs"] == {"max_episode_steps": 200}
    assert "env_kwargs" not in entries["Pendulum-v1"]


def test_the_model_card_is_one_of_the_hub(run_folder: Path) -> None:
    assert main(["card", "--run", str(run_folder)]) == 0
    card = ModelCard.load(run_folder / "README.md")
    result = json.loads((run_folder / "result.json").read_text())
    evaluation = result["evaluation"]
    assert card.data.library_name == "stable-baselines3" and "Pendulum-v1" in card.data.tags
    (entry,) = card.data.eval_results
    reward = f"{np.mean(evaluation['rewards']):.2f} +/- {np.std(evaluation['rewards']):.2f}"
    assert (entry.dataset_name, entry.metric_name, entry.metric_value) == ("Pendulum-v1", "mean_reward", reward)
    assert f"**{reward}**" in card.text and "(agent.gif)" in card.text
    assert "gae_lambda" in card.text or "learning_rate" in card.text
    assert all(f"- {name} {version}" in card.text for name, version in result["versions"].items())
    # What it says about loading is Python that works
    code = card.text.split("```python\n")[1].split("```")[0]
    script = code.replace("'FOLDER'", repr(str(run_folder))).replace('render_mode="human"', "")
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, timeout=PATIENCE)
    assert process.returncode == 0 and len(json.loads(process.stdout)) == 3, process.stderr


def test_a_card_goes_elsewhere_if_told_so(run_folder: Path, tmp_path: Path) -> None:
    assert main(["card", "--run", str(run_folder), "-o", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text().startswith("---\nlibrary_name: stable-baselines3")


@pytest.mark.parametrize("signal_number, status", [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_says_how_to_go_on(signal_number: int, status: int, tmp_path: Path) -> None:
    process = Command(
        *("solve", "--env", "CartPole-v1", "--reward-threshold", "501", "--total-timesteps", "10000000", "--no-progress"),
        cwd=tmp_path,
        environment=ENVIRONMENT,
    )
    folder = Path("runs", "CartPole-v1-tuned-seed0")
    while not any((tmp_path / folder / "checkpoints").glob("*.zip")):
        assert process.returncode is None, process.stderr
        time.sleep(0.05)
    process.send_signal(signal_number)
    errors = process.wait().stderr
    assert process.returncode == status, errors
    assert "of 10,000,000 env steps: mean reward" in errors and f"{folder}/ holds model.zip" in errors
    assert "The same command again goes on" in errors and "Traceback" not in errors
    assert (tmp_path / folder / "model.zip").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
def test_a_run_on_processes_that_is_stopped_before_its_first_checkpoint(tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches the worker processes as well."""
    command = ("solve", "--env", "CartPole-v1", "--reward-threshold", "501", "--vectorization", "subproc", "--n-envs", "2")
    process = subprocess.Popen(
        [sys.executable, "-m", "sb3_episodic_a2c", *command, "--no-progress"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    folder = tmp_path / "runs" / "CartPole-v1-tuned-seed0"
    # Rows of episodes, after a head of two lines
    while sum(len(path.read_text().splitlines()) for path in folder.glob("*.monitor.csv")) < 6:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 130 and "Stopped after" in errors, errors
    assert (folder / "model.zip").exists()
    goes_on = "goes on from the newest checkpoint" if any(folder.glob("checkpoints/*.zip")) else "too early"
    assert goes_on in errors


@pytest.mark.parametrize("vectorization", [pytest.param("subproc", marks=pytest.mark.slow), "gymnasium", "envpool"])
def test_solve_on_other_environments(vectorization: str, tmp_path: Path) -> None:
    """Trained there, with logs of all episodes, and evaluated as always."""
    result = solve(
        "CartPole-v1",
        vectorization=vectorization,
        n_envs=3,
        seed=1,
        total_timesteps=1_500,
        output=tmp_path,
        progress_bar=False,
        n_eval_episodes=3,
    )
    assert result.num_timesteps == 1_500
    logged = load_results(str(tmp_path))
    assert 3 < len(logged) and logged["l"].sum() <= 1_500
    assert (logged["r"] == logged["l"]).all()
    assert len(list(tmp_path.glob("*.monitor.csv"))) == (3 if vectorization == "subproc" else 1)
    assert json.loads((tmp_path / "result.json").read_text())["vectorization"] == vectorization
    assert result.evaluation.rewards == [float(length) for length in result.evaluation.episode_lengths]


def test_help_without_a_command(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in COMMANDS) and f"Example: {PROGRAM} solve" in output


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture) -> None:
    """What it does, an example that its parser takes, and the defaults."""
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    output = " ".join(capsys.readouterr().out.split())
    assert f"Example: {PROGRAM} {COMMANDS[name].example}" in output
    assert COMMANDS[name].example.startswith(f"{name} --")
    assert "(default: " in output
