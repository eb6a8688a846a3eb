"""A run of ``solve`` that was killed goes on when it is started again, and ends as one that was never killed."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.envs.classic_control import CartPoleEnv
from stable_baselines3.common.monitor import load_results

from sb3_episodic_a2c import EpisodicA2C
from sb3_episodic_a2c.tools import run_folder
from sb3_episodic_a2c.tools import solve as solve_module

CONTEXT = multiprocessing.get_context("fork")

# A hundred greedy episodes would take longer than the trainings
solve = partial(solve_module.solve, n_eval_episodes=3)


class UnpicklableEnv(CartPoleEnv):
    """A checkpoint cannot hold it, as with Box2D."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.lock = threading.Lock()


gym.register("Unpicklable-v0", UnpicklableEnv, max_episode_steps=500)


@pytest.fixture(autouse=True)
def many_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve_module, "SAVE_FREQ", 300)


def start_and_kill(n_checkpoints: int, folder: Path, **arguments: Any) -> None:
    """Start it in a process of its own, and kill that process after so many more checkpoints."""

    def newest() -> int:
        return max((int(path.name.split("_")[1]) for path in folder.glob("checkpoints/*.zip")), default=0)

    goal = newest() + n_checkpoints
    process = CONTEXT.Process(target=partial(solve, output=folder, progress_bar=False, **arguments))
    process.start()
    while newest() < goal:
        assert process.is_alive()
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "model.zip").exists()


def log_later_episodes(folder: Path) -> None:
    """Episodes after the checkpoint: they must vanish from the learning curve."""
    for path in folder.glob("*.monitor.csv"):
        with open(path, "a") as file:
            file.write(f"123456.0,10,{10.0**6}\n")


def read_result(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_text())
    del result["seconds"]
    return result


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("n_envs, reward_threshold", [(1, None), (2, 25.0)])
def test_killed_runs_go_on(n_envs: int, reward_threshold: float | None, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    arguments: dict[str, Any] = {
        "env_id": "CartPole-v1",
        "n_envs": n_envs,
        "reward_threshold": reward_threshold,
        "total_timesteps": 3_000 if reward_threshold is None else 20_000,
        "seed": 1,
    }
    expected = solve(**arguments, output=tmp_path / "expected", progress_bar=False)
    folder = tmp_path / "killed"
    for n_checkpoints in (0, 3, 2):
        start_and_kill(n_checkpoints, folder, **arguments)
    result = solve(**arguments, output=folder, progress_bar=False)
    output = capfd.readouterr().out
    # Killed at once the first time, it had no checkpoint to go on from
    assert output.count(f"Going on with {folder}, after ") == 2

    assert (expected.solved_at is not None) == (reward_threshold is not None)
    assert (result.solved_at, result.mean_reward) == (expected.solved_at, expected.mean_reward)
    assert read_result(folder) == read_result(tmp_path / "expected")
    assert files_of(folder) == files_of(tmp_path / "expected")
    models = [EpisodicA2C.load(path / "model.zip", device="cpu") for path in (tmp_path / "expected", folder)]
    for one, other in zip(*(model.policy.parameters() for model in models), strict=True):
        assert th.equal(one, other)
    # The learning curve is whole: no episode is missing, none is there twice
    for index in range(n_envs):
        logs = [
            np.genfromtxt(path / f"{index}.monitor.csv", delimiter=",", skip_header=2)
            for path in (tmp_path / "expected", folder)
        ]
        np.testing.assert_array_equal(logs[0][:, :2], logs[1][:, :2])


def test_environments_that_a_checkpoint_cannot_hold(tmp_path: Path) -> None:
    """They start fresh episodes. The learning curve has the episodes before the checkpoint, then the fresh ones."""
    arguments: dict[str, Any] = {
        "env_id": "Unpicklable-v0",
        "n_envs": 2,
        "reward_threshold": 500.0,
        "total_timesteps": 3_000,
    }
    for n_checkpoints in (3, 2):
        start_and_kill(n_checkpoints, tmp_path, **arguments)
        log_later_episodes(tmp_path)
    with pytest.warns(UserWarning, match="cannot be part of the checkpoint"):
        result = solve(**arguments, output=tmp_path, progress_bar=False)
    assert result.num_timesteps == 3_000
    model = EpisodicA2C.load(tmp_path / "model.zip", device="cpu")
    episodes = load_results(str(tmp_path))
    assert len(episodes) == model._episode_num
    assert episodes["r"].max() <= 500
    # Steps of unfinished episodes are missing, at two stops and at the end
    assert 3_000 - 3 * 2 * 500 < episodes["l"].sum() <= 3_000
    assert [info["r"] for info in model.ep_info_buffer] == episodes["r"].tolist()[-100:]
    # A log for each environment and each start
    assert len(list(tmp_path.glob("*.monitor.csv"))) == 6


class Lives(gym.Wrapper):
    """Ends an episode every five steps, while the game goes on, as ``EpisodicLifeEnv`` does."""

    is_over = True

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        self.n_steps = 0
        if self.is_over:
            self.observation, _ = self.env.reset(**kwargs)
        return self.observation, {}

    def step(self, action: int) -> tuple[np.ndarray, Any, bool, bool, dict]:
        self.observation, reward, terminated, truncated, info = self.env.step(action)
        self.is_over = terminated or truncated
        self.n_steps += 1
        return self.observation, reward, terminated or self.n_steps == 5, truncated, info


def test_logs_of_games_with_lives(tmp_path: Path) -> None:
    """More episodes end than games, of which the logs are. Those after the checkpoint must vanish as well."""
    arguments: dict[str, Any] = {
        "env_id": "Unpicklable-v0",
        "n_envs": 2,
        "reward_threshold": 500.0,
        "total_timesteps": 2_500,
        "hyperparams": {"env_wrapper": "tests.test_solve_resumed.Lives"},
    }
    start_and_kill(3, tmp_path, **arguments)
    log_later_episodes(tmp_path)
    with pytest.warns(UserWarning, match="cannot be part of the checkpoint"):
        solve(**arguments, output=tmp_path, progress_bar=False)
    model = EpisodicA2C.load(tmp_path / "model.zip", device="cpu")
    games = load_results(str(tmp_path))
    assert 20 < len(games) < model._episode_num
    # Steps of unfinished games are missing, at the stop and at the end
    assert 2_500 - 2 * 2 * 500 < games["l"].sum() <= 2_500
    assert [info["r"] for info in model.ep_info_buffer] == games["r"].tolist()[-100:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda log: log + "17.0,1",
        lambda log: log + "17.0,17,0.",
        lambda log: log + "17.0,17\n",
        lambda log: "".join(log.splitlines(keepends=True)[:2]),
        lambda log: log.splitlines(keepends=True)[0] + "r,l",
        lambda log: log.splitlines(keepends=True)[0],
        lambda log: log[:10],
        lambda log: "",
    ],
)
def test_logs_that_a_crash_has_cut_short(damage: Callable[[str], str], tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"env_id": "Unpicklable-v0", "reward_threshold": 500.0, "total_timesteps": 1_500}
    start_and_kill(2, tmp_path, **arguments)
    path = tmp_path / "0.monitor.csv"
    log = path.read_text()
    path.write_text(damage(log))
    with pytest.warns(UserWarning, match="cannot be part of the checkpoint"):
        result = solve(**arguments, output=tmp_path, progress_bar=False)
    assert result.num_timesteps == 1_500
    n_kept = len(path.read_text().splitlines()) - 2
    assert (n_kept > 0) == damage(log).startswith(log)
    n_later = len((tmp_path / "1.monitor.csv").read_text().splitlines()) - 2
    assert len(load_results(str(tmp_path))) == n_kept + n_later > n_kept


def test_killed_while_the_checkpoints_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree = shutil.rmtree

    def remove_some_and_die(path: Path, **arguments: Any) -> None:
        if path.exists():
            (path / "settings.json").unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    arguments: dict[str, Any] = {"env_id": "CartPole-v1", "total_timesteps": 1_000, "output": tmp_path, "progress_bar": False}
    monkeypatch.setattr(shutil, "rmtree", remove_some_and_die)
    process = CONTEXT.Process(target=partial(solve, **arguments))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a model already"):
        solve(**arguments)
    assert files_of(tmp_path) == {
        *("0.monitor.csv", "agent.gif", "config.yml", "learning_curve.png", "model.zip", "result.json")
    }
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("moment", ["open", "flock"])
def test_the_other_run_finishes_just_now(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the check of the folder and the opening of the lock file, or between opening and locking."""
    start_and_kill(1, tmp_path, env_id="CartPole-v1")
    module, function = {"open": (run_folder, open), "flock": (run_folder.fcntl, run_folder.fcntl.flock)}[moment]

    def finish_and_go_on(*arguments: Any) -> Any:
        if (tmp_path / "checkpoints").exists():
            (tmp_path / "model.zip").touch()
            shutil.rmtree(tmp_path / "checkpoints")
        return function(*arguments)

    monkeypatch.setattr(module, moment, finish_and_go_on, raising=False)
    with pytest.raises(ValueError, match="holds a model already"):
        solve("CartPole-v1", output=tmp_path)
    assert files_of(tmp_path) == {"0.monitor.csv", "model.zip"}


@pytest.mark.parametrize("name", ["0.monitor.csv", "checkpoints/rl_model_100_steps.zip", "vecnormalize.pkl"])
def test_files_of_others_are_not_deleted(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    before = set(tmp_path.rglob("*"))
    arguments: dict[str, Any] = {"env_id": "CartPole-v1", "total_timesteps": 100, "output": tmp_path, "progress_bar": False}
    with pytest.raises(ValueError, match=rf"`output` .* e.g. {name}. Give another folder, or `fresh` \(--fresh\)"):
        solve(**arguments)
    assert set(tmp_path.rglob("*")) == before
    assert solve(**arguments, fresh=True).num_timesteps == 100


@pytest.mark.filterwarnings("ignore:No episode ended")
def test_interrupted_and_started_again(tmp_path: Path) -> None:
    """Ctrl-C keeps the model. The same call goes on; one with other settings is refused."""
    arguments: dict[str, Any] = {"env_id": "CartPole-v1", "output": tmp_path, "progress_bar": False}

    def press_ctrl_c() -> None:
        while not any(tmp_path.glob("checkpoints/*.zip")):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press_ctrl_c).start()
    # The traceback is kept, as in a REPL, and with it all that the call had opened
    with pytest.raises(KeyboardInterrupt) as interrupt:
        solve(**arguments, reward_threshold=500.0, total_timesteps=10**7)
    assert {"model.zip", "checkpoints"} <= files_of(tmp_path)
    num_timesteps = EpisodicA2C.load(tmp_path / "model.zip").num_timesteps

    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with pytest.raises(ValueError, match=r"unfinished run with .*'seed': 0.*cannot go on with .*'seed': 1.*--fresh"):
        solve(**arguments, seed=1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before

    # The budget may change
    assert solve(**arguments, reward_threshold=500.0, total_timesteps=num_timesteps).num_timesteps == num_timesteps
    assert "checkpoints" not in files_of(tmp_path)
    with pytest.raises(ValueError, match="holds a model already"):
        solve(**arguments)
    assert interrupt.traceback


def test_start_afresh(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"env_id": "CartPole-v1", "total_timesteps": 2_000}
    start_and_kill(2, tmp_path, **arguments, seed=5)
    # Left by a run that normalises, and wrong for this one
    (tmp_path / "vecnormalize.pkl").touch()
    result = solve(**arguments, seed=6, output=tmp_path, progress_bar=False, fresh=True)
    assert (result.num_timesteps, result.seed) == (2_000, 6)
    assert load_results(str(tmp_path))["l"].sum() <= 2_000


def test_default_folders_of_unfinished_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("runs") / "CartPole-v1-tuned-seed0"
    start_and_kill(2, folder, env_id="CartPole-v1")
    short = partial(solve, "CartPole-v1", progress_bar=False)
    # A fresh run and one with other settings leave it alone
    assert short(total_timesteps=100, fresh=True).output.name == "CartPole-v1-tuned-seed0-2"
    assert short(total_timesteps=100, n_envs=2).output.name == "CartPole-v1-tuned-seed0-3"
    assert (folder / "checkpoints").exists()
    assert short(total_timesteps=1_500).output == folder
    assert short(total_timesteps=100).output.name == "CartPole-v1-tuned-seed0-4"


def test_two_runs_never_write_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("runs") / "CartPole-v1-tuned-seed0"
    process = CONTEXT.Process(
        target=partial(solve, "CartPole-v1", reward_threshold=500.0, total_timesteps=10**7, progress_bar=False)
    )
    process.start()
    while not list(folder.glob("checkpoints/*.zip")):
        assert process.is_alive()
        time.sleep(0.002)
    with pytest.raises(ValueError, match="not over yet"):
        solve("CartPole-v1", output=folder)
    assert solve("CartPole-v1", total_timesteps=100, progress_bar=False).output.name == "CartPole-v1-tuned-seed0-2"
    process.kill()
    process.join()
    assert solve("CartPole-v1", total_timesteps=100, progress_bar=False).output == folder
