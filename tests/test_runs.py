"""What is done with a run of ``solve`` after it: played, shown, described. And a run that is told to stop."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from stable_baselines3.common.monitor import load_results

from sb3_episodic_a2c.__main__ import COMMANDS, PROGRAM, main
from sb3_episodic_a2c.tools.runs import Run
from sb3_episodic_a2c.tools.solve import solve
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
    # It leaves nothing behind
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["enjoy", "gif -o x.gif", "card"])
def test_a_folder_that_is_no_run_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    try:
        assert main([*command.split(), "--run", str(tmp_path)]) == 1
        message = capsys.readouterr().err
    except ValueError as error:
        # Errors keep their traceback in the Zoo's commands
        assert command == "enjoy"
        message = str(error)
    assert "has no model.zip, so it is no finished run" in message


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
