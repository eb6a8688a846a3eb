"""Comparisons: real grids with tiny budgets, on every backend, killed and started again."""

import contextlib
import importlib.util
import io
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch as th
import yaml
from gymnasium.envs.classic_control import CartPoleEnv
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_episodic_a2c import EpisodicA2C
from sb3_episodic_a2c.__main__ import main
from sb3_episodic_a2c.tools import comparison
from sb3_episodic_a2c.tools.comparison import compare
from sb3_episodic_a2c.tools.comparison.backends import BACKEND_PACKAGES, run_cells
from sb3_episodic_a2c.tools.comparison.cells import Cell, evaluation_grid, load_cell
from sb3_episodic_a2c.tools.comparison.command_line import parse_by_env, parse_configs
from sb3_episodic_a2c.tools.comparison.fairness import fairness_notes
from sb3_episodic_a2c.tools.comparison.frame import results_frame
from sb3_episodic_a2c.tools.comparison.grid import plan_cells
from sb3_episodic_a2c.tools.comparison.hyperparams import hyperparams_of
from sb3_episodic_a2c.tools.comparison.normalization import Scale, random_policy_score
from sb3_episodic_a2c.tools.comparison.plots import STYLES, plot_curves, plot_profile, plot_scores
from sb3_episodic_a2c.tools.comparison.progress import format_duration, seconds_left
from sb3_episodic_a2c.tools.comparison.report import write_report
from sb3_episodic_a2c.tools.comparison.statistics import iqm_band, profile_band
from sb3_episodic_a2c.tools.comparison.summaries import METRICS, summarize, summarize_overall
from sb3_episodic_a2c.tools.comparison.tables import cost_table, markdown_table, print_table, score_table, winner_table
from sb3_episodic_a2c.tools.entries import read_entry
from tests.processes import PATIENCE

CHECKOUT = Path(__file__).parent.parent

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
}

GRID: dict[str, Any] = {
    "envs": ["CartPole-v1"],
    "algorithms": ["episodic_a2c", "a2c"],
    "seeds": 2,
    "total_timesteps": 720,
    "n_evaluations": 3,
    "eval_episodes": 3,
}
"""Small enough to train in a moment."""

TIMES = ["train_seconds", "train_cpu_seconds", "eval_seconds", "folder"]


def learned(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame without the columns that differ between equal comparisons."""
    return frame.drop(columns=TIMES)


def parameters(folder: Path, path: str, model_class: type) -> dict[str, th.Tensor]:
    return model_class.load(folder / path).policy.state_dict()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """A comparison in this process. Copy the folder before changing it."""
    output = tmp_path_factory.mktemp("compare") / "out"
    return output, compare(**GRID, backend="sequential", output=output)


@pytest.fixture
def copied(finished: tuple[Path, pd.DataFrame], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "copied"))


# ------------------------------------------------------------------ what a comparison leaves


def test_frame_is_tidy(finished: tuple[Path, pd.DataFrame]) -> None:
    output, frame = finished
    assert len(frame) == 2 * 2 * 4
    assert (frame["status"] == "finished").all()
    assert (frame.groupby(["algorithm", "seed"])["timesteps"].apply(list).map(tuple) == (0, 240, 480, 720)).all()
    assert (frame["timesteps"] == frame["grid_timesteps"]).all()
    for _, run in frame.groupby(["algorithm", "seed"]):
        assert run["train_seconds"].is_monotonic_increasing
        assert run["train_seconds"].iloc[0] < 0.1
    # With equal seeds, networks and first states are equal: before training no algorithm is better
    before = frame[frame["evaluation"] == 0].pivot(index="seed", columns="algorithm", values="mean_reward")
    assert before["a2c"].tolist() == before["episodic_a2c"].tolist()
    pd.testing.assert_frame_equal(pd.read_csv(output / "results.csv", keep_default_na=False), frame)


def test_cells_are_zoo_run_folders(finished: tuple[Path, pd.DataFrame], capsys: pytest.CaptureFixture) -> None:
    output, _ = finished
    for algorithm, model_class in (("episodic_a2c", EpisodicA2C), ("a2c", A2C)):
        for seed in (0, 1):
            folder = output / algorithm / f"CartPole-v1_{seed + 1}"
            names = {path.name for path in folder.iterdir()}
            assert names >= {"CartPole-v1.zip", "best_model.zip", "evaluations.npz", "0.monitor.csv", "cell.json", "train.log"}
            model = model_class.load(folder / "CartPole-v1.zip")
            assert (model.num_timesteps, model.seed) == (720, seed)
    assert not (output / ".unfinished").exists()
    capsys.readouterr()
    # The Zoo's own scripts
    arguments = ["--env", "CartPole-v1", "-f", str(output), "--no-display", "--print-n-trials"]
    assert main(["all_plots", "--algos", "episodic_a2c", "a2c", *arguments]) == 0
    printed = capsys.readouterr().out
    assert f"CartPole-v1-EPISODIC_A2C-{output}: 2" in printed
    assert f"CartPole-v1-A2C-{output}: 2" in printed
    assert (
        main(["enjoy", "--algo", "a2c", "--env", "CartPole-v1", "-f", str(output), "--exp-id", "2", "-n", "20", "--no-render"])
        == 0
    )


def test_report(finished: tuple[Path, pd.DataFrame]) -> None:
    output, frame = finished
    report = (output / "report.md").read_text()
    for words in ("| CartPole-v1 | episodic_a2c |", "## Fairness", "met to the step", "n_envs: 8", "torch 2."):
        assert words in report
    assert "`zoo_configs/episodic_a2c.yml`, which says how they were found" in report
    results = json.loads((output / "results.json").read_text())
    assert [summary["algorithm"] for summary in results["summaries"]] == ["episodic_a2c", "a2c"]
    scores = frame[(frame["algorithm"] == "a2c") & (frame["evaluation"] == 3)]["mean_reward"].tolist()
    assert results["summaries"][1]["scores"]["final"] == scores
    for name in ("learning_curves", "learning_curves_time", "scores", "performance_profile"):
        with Image.open(output / f"{name}.png") as image:
            assert image.width > 600
        assert "<svg" in (output / f"{name}.svg").read_text()
        assert f"({name}.png)" in report


def test_last_evaluation_by_hand(tmp_path: Path) -> None:
    """Greedy, from the documented seeds, with the statistics of the training, in the environment's own rewards."""
    arguments = {
        **GRID,
        "envs": ["Pendulum-v1"],
        "algorithms": ["a2c"],
        "seeds": [5],
        "total_timesteps": 480,
        "n_evaluations": 1,
    }
    frame = compare(**arguments, backend="sequential", output=tmp_path)
    folder = Path(frame["folder"].iloc[-1])
    assert folder == tmp_path / "a2c" / "Pendulum-v1_6"
    model = A2C.load(folder / "Pendulum-v1.zip")
    normalize = VecNormalize.load(str(folder / "Pendulum-v1" / "vecnormalize.pkl"), make_vec_env("Pendulum-v1"))
    env = gym.make("Pendulum-v1")
    by_hand = []
    for episode in range(3):
        observation, _ = env.reset(seed=1_000_000 + 5 * 3 + episode)
        total, truncated = 0.0, False
        while not truncated:
            action, _ = model.predict(normalize.normalize_obs(observation), deterministic=True)
            observation, reward, _, truncated, _ = env.step(action)
            total += float(reward)
        by_hand.append(total)
    with np.load(folder / "evaluations.npz") as evaluations:
        # A batch and single observations do not give exactly the same sums
        np.testing.assert_allclose(evaluations["results"][-1], by_hand, rtol=1e-3)
        assert evaluations["timesteps"].tolist() == [0, 480]
    assert frame["mean_reward"].iloc[-1] == pytest.approx(np.mean(by_hand), rel=1e-3)


def test_trainings_share_no_evaluation_episode(tmp_path: Path) -> None:
    cells = plan_cells(**{**GRID, "algorithms": ["a2c"], "seeds": [0, 1, 2, 2**31 - 1]}, output=tmp_path)
    seeds = [cell.eval_seed + episode for cell in cells for episode in range(cell.eval_episodes)]
    assert len(set(seeds)) == len(seeds)
    assert 0 < min(seeds) and max(seeds) < 2**32


def test_all_are_evaluated_in_the_same_environment(tmp_path: Path) -> None:
    def configs(**env_kwargs: dict[str, Any]) -> dict[str, str]:
        for algorithm, kwargs in env_kwargs.items():
            entry = {"n_timesteps": 480, "policy": "MlpPolicy", "env_kwargs": kwargs}
            (tmp_path / f"{algorithm}.yml").write_text(yaml.safe_dump({"Pendulum-v1": entry}))
        return {algorithm: str(tmp_path / f"{algorithm}.yml") for algorithm in env_kwargs}

    grid = {**GRID, "envs": ["Pendulum-v1"], "seeds": 1, "total_timesteps": 480, "n_evaluations": 1}
    heavy = configs(a2c={"g": 9.0}, episodic_a2c={"g": 9.5})
    with pytest.raises(
        ValueError, match=r"`env_kwargs` of Pendulum-v1 are {'g': 9\.5} for episodic_a2c and {'g': 9\.0} for a2c"
    ):
        compare(**grid, configs=heavy, backend="sequential", output=tmp_path / "out")
    # Shorter episodes apply to training only, the other gravity also to evaluations
    short = configs(a2c={"g": 1.0}, episodic_a2c={"g": 1.0, "max_episode_steps": 50})
    frame = compare(**grid, configs=short, backend="sequential", output=tmp_path / "out")
    assert (frame["mean_ep_length"] == 200).all()
    monitor = (Path(frame["folder"].iloc[0]) / "0.monitor.csv").read_text().splitlines()
    assert monitor[2].split(",")[1] == "50"
    by_gravity = [random_policy_score("Pendulum-v1", 3, {"g": gravity}) for gravity in (1.0, 10.0)]
    assert by_gravity[0] > by_gravity[1]
    (cached,) = json.loads((tmp_path / "out" / "random_policy.json").read_text()).values()
    assert cached == random_policy_score("Pendulum-v1", env_kwargs={"g": 1.0})


class StrictEnv(InvalidActionEnvDiscrete):
    def step(self, action: int) -> Any:
        if action in self.invalid_actions:
            raise ValueError(f"{action} is invalid")
        return super().step(action)


def test_evaluations_know_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = gym.envs.registration.EnvSpec("Strict-v0", lambda: StrictEnv(dim=20, n_invalid_actions=10))
    monkeypatch.setitem(gym.registry, "Strict-v0", spec)
    arguments = {**GRID, "envs": ["Strict-v0"], "algorithms": ["episodic_a2c_mask"]}
    with pytest.warns(UserWarning, match=r"random actions failed: \d+ is invalid"):
        frame = compare(**arguments, backend="sequential", output=tmp_path)
    assert (frame["status"] == "finished").all(), frame["error"]


def test_evaluations_of_an_agent_that_ignores_masks(tmp_path: Path) -> None:
    hyperparams = {"policy": "MlpPolicy", "n_timesteps": 500, "use_masking": False}
    (tmp_path / "entry.yml").write_text(yaml.dump({"CartPole-v1": hyperparams}))
    algorithm = {"algorithms": ["episodic_a2c_mask"], "configs": {"episodic_a2c_mask": str(tmp_path / "entry.yml")}}
    frame = compare(**{**GRID, **algorithm}, backend="sequential", output=tmp_path / "out")
    assert (frame["status"] == "finished").all(), frame["error"]


# ------------------------------------------------------------------ backends


@contextlib.contextmanager
def on_a_machine_that_can_start_ray() -> Iterator[None]:
    """Ray gives its node 30 seconds to start, whatever it is told. A machine that takes minutes to import torch needs more."""
    try:
        yield
    except Exception as error:
        if "timed out during startup" in str(error):
            pytest.skip("this machine is too busy: Ray's node does not start within 30 seconds")
        raise


@pytest.mark.parametrize("backend", ["loky", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dask", "ray"))])
def test_backends_give_identical_results(backend: str, finished: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    output, sequential = finished
    if backend == "dask":
        # A cluster of two worker processes, like that of `dask scheduler` and `dask worker`
        with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
            frame = compare(**GRID, backend="dask", scheduler=cluster.scheduler_address, output=tmp_path)
    else:
        with on_a_machine_that_can_start_ray():
            frame = compare(**GRID, backend=backend, jobs=2, output=tmp_path)
    pd.testing.assert_frame_equal(learned(frame), learned(sequential))
    for path, model_class in (
        ("episodic_a2c/CartPole-v1_1/CartPole-v1.zip", EpisodicA2C),
        ("a2c/CartPole-v1_2/CartPole-v1.zip", A2C),
    ):
        ours, theirs = parameters(tmp_path, path, model_class), parameters(output, path, model_class)
        assert all(th.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_a_cluster_loses_a_worker(backend: str, finished: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    """Dask goes on with another one, and so do we for Ray, which gives up."""
    arguments = ["--env", "CartPole-v1", "--seeds", "2", "--total-timesteps", "720", "--n-evaluations", "3"]
    arguments += ["--eval-episodes", "3", "--jobs", "2", "--backend", backend, "-o", str(tmp_path)]
    command = [sys.executable, "-m", "sb3_episodic_a2c", "compare", *arguments]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (at_work := list((tmp_path / ".unfinished").glob("*"))):
        if process.poll() is not None:
            assert process.stdout is not None
            with on_a_machine_that_can_start_ray():
                raise RuntimeError(process.stdout.read())
        time.sleep(0.005)
    (worker,) = {int(path.name.removeprefix(f"{socket.gethostname()}.").split(".")[0]) for path in at_work[:1]}
    assert worker != process.pid
    os.kill(worker, signal.SIGKILL)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    again = pd.read_csv(tmp_path / "results.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(learned(again), learned(pd.read_csv(finished[0] / "results.csv", keep_default_na=False)))
    assert what_they_reach(tmp_path) == what_they_reach(finished[0]) != ""


@pytest.mark.slow
def test_command_line_with_a_cluster_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a2c.yml").write_text("default: {n_timesteps: 1000, policy: MlpPolicy, n_steps: 6}")
    arguments = ["--env", "CartPole-v1", "--algo", "a2c", "--seed-list", "4", "2", "--conf", str(tmp_path / "a2c.yml")]
    arguments += ["--total-timesteps", "CartPole-v1:480", "--n-evaluations", "CartPole-v1:2", "--eval-episodes", "2"]
    output = tmp_path / "out"
    assert main(["compare", *arguments, "--backend", "dask", "--jobs", "2", "--no-progress", "-o", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "What they reach" in printed and "━━━ " not in printed
    frame = pd.read_csv(output / "results.csv", keep_default_na=False)
    assert frame["seed"].tolist() == [4] * 3 + [2] * 3
    assert frame["timesteps"].tolist() == [0, 240, 480] * 2
    assert A2C.load(output / "a2c" / "CartPole-v1_5" / "CartPole-v1.zip").n_steps == 6


@pytest.mark.parametrize("backend", ["loky", "sequential"])
def test_progress_bar(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """With one job, cells are trained in this process, and its output is redirected."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    frame = compare(**{**GRID, "seeds": 1}, backend=backend, output=tmp_path, progress_bar=True)
    printed = capsys.readouterr().out
    last = printed[printed.rindex("━") :]
    assert "2/2" in last and "cells" in last and "failed" not in printed
    assert "1/2" in printed and "cells, about" in printed
    assert all("━" not in (Path(folder) / "train.log").read_text() for folder in frame["folder"].unique())


def test_threads_of_torch_are_left_as_they_were(tmp_path: Path) -> None:
    before = th.get_num_threads()
    th.set_num_threads(before + 1)
    try:
        compare(**{**GRID, "algorithms": ["episodic_a2c"], "seeds": 1}, backend="sequential", output=tmp_path)
        assert th.get_num_threads() == before + 1
    finally:
        th.set_num_threads(before)


# ------------------------------------------------------------------ kept work


def stamps(output: Path) -> dict[str, int]:
    return {str(path.relative_to(output)): path.stat().st_mtime_ns for path in output.glob("*/*/cell.json")}


def test_more_seeds_train_only_what_is_missing(finished: tuple[Path, pd.DataFrame], copied: Path) -> None:
    before = stamps(copied)
    frame = compare(**{**GRID, "seeds": 3}, backend="sequential", output=copied)
    after = stamps(copied)
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {"episodic_a2c/CartPole-v1_3/cell.json", "a2c/CartPole-v1_3/cell.json"}
    old = learned(frame[frame["seed"] < 2]).reset_index(drop=True)
    pd.testing.assert_frame_equal(old, learned(finished[1]))


def test_other_settings_are_not_mixed_in(copied: Path) -> None:
    before = stamps(copied)
    for change, words in (
        ({"total_timesteps": 960}, "total_timesteps=720 there and 960 here.* Give --total-timesteps CartPole-v1:720 to go on"),
        ({"eval_episodes": 4}, "eval_episodes=3 there and 4 here"),
    ):
        with pytest.raises(ValueError, match=words):
            compare(**{**GRID, **change}, backend="sequential", output=copied)
    config = copied / "other.yml"
    config.write_text("CartPole-v1: {n_timesteps: 1000, policy: MlpPolicy, gamma: 0.9}")
    configs = {"episodic_a2c": str(config)}
    with pytest.raises(ValueError, match=r"gamma=None there and 0\.9 here.*--retrain"):
        compare(**GRID, configs=configs, backend="sequential", output=copied)
    assert stamps(copied) == before
    frame = compare(**GRID, configs=configs, backend="sequential", output=copied, retrain=True)
    after = stamps(copied)
    assert (frame["status"] == "finished").all()
    # Only those whose settings have changed
    assert {path for path in before if before[path] == after[path]} == {path for path in before if path.startswith("a2c")}
    assert EpisodicA2C.load(copied / "episodic_a2c/CartPole-v1_1/CartPole-v1.zip").gamma == 0.9


def test_retrain_keeps_old_cells_until_there_are_new_ones(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stamps(copied)
    config = copied / "bad.yml"
    config.write_text("CartPole-v1: {n_timesteps: 1000, policy: MlpPolicy, n_episodes: 0}")
    configs = {"episodic_a2c": str(config)}
    frame = compare(**GRID, configs=configs, backend="sequential", output=copied, retrain=True)
    assert (frame.groupby("algorithm")["status"].first() == pd.Series({"a2c": "finished", "episodic_a2c": "failed"})).all()
    # The new trainings failed, so the old ones are kept
    assert stamps(copied) == before
    assert (compare(**GRID, backend="sequential", output=copied)["status"] == "finished").all()
    assert stamps(copied) == before


def edit_measured(output: Path, path: str, **changes: Any) -> None:
    record = json.loads((output / path).read_text())
    record["measured"].update(changes)
    (output / path).write_text(json.dumps(record))


def test_report_says_what_was_trained_by_other_code_and_at_other_times(copied: Path) -> None:
    report, code = copied / "report.md", "NOT ALL TRAINED BY THE SAME CODE"
    assert "The algorithms took turns." in report.read_text()
    assert code not in report.read_text()
    edit_measured(copied, "a2c/CartPole-v1_2/cell.json", code="0123", started=0.0, ended=1.0)
    console = Console(record=True, width=200, quiet=False, file=io.StringIO())
    compare(**GRID, backend="sequential", output=copied, console=console)
    assert code in console.export_text()
    assert code in report.read_text() and "code 0123" in report.read_text()
    assert "Some algorithms were trained at other times" in report.read_text()


def test_damaged_cells_are_trained_again(finished: tuple[Path, pd.DataFrame], copied: Path) -> None:
    truncated = copied / "a2c/CartPole-v1_1/evaluations.npz"
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size // 2])
    (copied / "episodic_a2c/CartPole-v1_2/evaluations.npz").write_bytes(b"PK")
    (copied / "a2c/CartPole-v1_2/cell.json").write_text("{")
    frame = compare(**GRID, backend="sequential", output=copied)
    pd.testing.assert_frame_equal(learned(frame), learned(finished[1]))


def test_folders_of_others_are_left_alone(copied: Path) -> None:
    (copied / "a2c/CartPole-v1_1/cell.json").unlink()
    for retrain in (False, True):
        with pytest.raises(ValueError, match="exists already, but not from a comparison"):
            compare(**GRID, backend="sequential", output=copied, retrain=retrain)
    assert (copied / "a2c/CartPole-v1_1/CartPole-v1.zip").exists()


def what_they_reach(output: Path) -> str:
    """The table of a report that holds no times."""
    _, _, table = (output / "report.md").read_text().partition("## What they reach")
    return table.partition("## What they take")[0]


@pytest.mark.parametrize(
    "jobs, with_workers",
    [(1, True), pytest.param(2, True, marks=pytest.mark.slow), pytest.param(2, False, marks=pytest.mark.slow)],
    ids=["one process", "with its workers", "without its workers"],
)
def test_kill_and_start_again(jobs: int, with_workers: bool, finished: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    whole, output = finished[0], tmp_path / "out"
    arguments = ["--env", "CartPole-v1", "--seeds", "2", "--total-timesteps", "720", "--n-evaluations", "3"]
    arguments += ["--eval-episodes", "3", "--jobs", str(jobs), "-o", str(output)]
    command = [sys.executable, "-m", "sb3_episodic_a2c", "compare", *arguments]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + PATIENCE
    # Until one cell is finished and another is being trained
    while not (stamps(output) and (at_work := list((output / ".unfinished").glob("*")))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    (os.killpg if with_workers else os.kill)(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    # Workers train, if there are any
    assert all((f".{process.pid}." in path.name) == (jobs == 1) for path in at_work)
    kept = stamps(output)
    assert 1 <= len(kept) <= 3
    again = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert kept.items() <= stamps(output).items()
    assert len(stamps(output)) == 4
    assert not (output / ".unfinished").exists()
    # Equal, except for the times, to a comparison that was never killed
    frames = [learned(pd.read_csv(folder / "results.csv", keep_default_na=False)) for folder in (whole, output)]
    pd.testing.assert_frame_equal(*frames)
    assert what_they_reach(output) == what_they_reach(whole) != ""
    summaries = [json.loads((folder / "results.json").read_text())["summaries"] for folder in (whole, output)]
    for one, other in zip(*summaries, strict=True):
        for name in ("scores", "iqm", "mean", "std", "probability", "seeds", "timesteps_to_threshold", "timesteps"):
            assert one[name] == other[name]


ORPHAN = """
import os, time
from joblib.externals.loky.process_executor import ProcessPoolExecutor

def work():
    parent = os.getppid()
    print("at work", flush=True)
    while os.getppid() == parent:
        time.sleep(0.01)
    # A worker takes seconds to import this
    from sb3_episodic_a2c.tools.comparison.training import train_cell
    print("imported", flush=True)
    train_cell(None)
    print("went on", flush=True)
    os._exit(0)

if __name__ == "__main__":
    ProcessPoolExecutor(1).submit(work).result()
"""


def test_a_worker_sees_that_the_command_was_killed_while_it_started(tmp_path: Path) -> None:
    (tmp_path / "orphan.py").write_text(ORPHAN)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "orphan.py")],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        process.kill()
        # The pipe ends once the worker has also ended
        assert process.communicate(timeout=PATIENCE)[0] == "imported\n"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def test_leftovers_go_with_the_process_that_was_still_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of a command that was killed may still run when the next command starts."""
    with subprocess.Popen(["sleep", "100"]) as process:

        class Parting(CartPoleEnv):
            def reset(self, **kwargs: Any) -> Any:
                process.kill()
                process.wait()
                return super().reset(**kwargs)

        monkeypatch.setitem(gym.registry, "Parting-v0", gym.envs.registration.EnvSpec("Parting-v0", entry_point=Parting))
        (tmp_path / ".unfinished" / f"{socket.gethostname()}.{process.pid}.0123").mkdir(parents=True)
        config = tmp_path / "a2c.yml"
        config.write_text("default: {n_timesteps: 480, policy: MlpPolicy}")
        arguments = {**GRID, "envs": ["Parting-v0"], "algorithms": ["a2c"], "seeds": 1, "configs": {"a2c": str(config)}}
        run_cells(plan_cells(**arguments, output=tmp_path), backend="sequential")
    assert not (tmp_path / ".unfinished").exists()


@pytest.mark.slow
def test_ctrl_c_keeps_finished_cells(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sb3_episodic_a2c", "compare", "--env", "CartPole-v1", "--seeds", "20", "--jobs", "2"]
    command += ["--total-timesteps", "5000", "--no-progress", "-o", str(tmp_path)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not stamps(tmp_path):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "of 40 cells are finished: the same command again trains the others" in stderr
    assert 1 <= len(stamps(tmp_path)) < 40


# ------------------------------------------------------------------ failures


def test_a_failing_cell_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tmp_path / "bad.yml"
    config.write_text("default: {n_timesteps: 1000, policy: MlpPolicy, n_episodes: 0}")
    arguments = [
        "compare",
        "--env",
        "CartPole-v1",
        "--algo",
        "a2c",
        "episodic_a2c",
        "--seeds",
        "1",
        "--total-timesteps",
        "480",
    ]
    arguments += ["--n-evaluations", "2", "--eval-episodes", "2", "--backend", "sequential", "-o", str(tmp_path / "out")]
    assert main([*arguments, "--conf", f"episodic_a2c:{config}"]) == 1
    printed = capsys.readouterr().out
    assert "1 FAILED" in printed
    assert "FAILED: episodic_a2c on CartPole-v1, seed 0: ValueError: `n_episodes` is 0" in printed
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## Failed" in report and "| CartPole-v1 | a2c |" in report
    (failure,) = json.loads((tmp_path / "out" / "results.json").read_text())["failed"]
    assert "Traceback" in failure["error"] and failure["algorithm"] == "episodic_a2c"
    kept = stamps(tmp_path / "out")
    assert list(kept) == ["a2c/CartPole-v1_1/cell.json"]
    # The same command tries it again. With the right file it trains what failed, and nothing else
    assert main([*arguments, "--conf", f"episodic_a2c:{config}"]) == 1
    assert main(arguments) == 0
    assert kept.items() <= stamps(tmp_path / "out").items()
    assert len(stamps(tmp_path / "out")) == 2


def test_everything_may_fail(tmp_path: Path) -> None:
    config = tmp_path / "bad.yml"
    config.write_text("default: {n_timesteps: 1000, policy: NoSuchPolicy}")
    arguments = {**GRID, "envs": ["Pendulum-v1", "CartPole-v1"], "algorithms": ["a2c"]}
    frame = compare(**arguments, configs={"a2c": str(config)}, backend="sequential", output=tmp_path / "out")
    assert len(frame) == 4
    assert (frame["status"] == "failed").all()
    assert frame["error"].str.contains("NoSuchPolicy").all()
    assert "NoSuchPolicy" in (tmp_path / "out" / "report.md").read_text()


DEADLY = """
import os, signal
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

class Deadly(CartPoleEnv):
    def step(self, action):
        os.kill(os.getpid(), signal.SIGKILL)

gym.register("Deadly-v0", Deadly, max_episode_steps=100)
"""


@pytest.mark.slow
def test_a_dying_process_takes_no_other_cell_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deadly_envs.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]]))
    # There even random actions kill the process, so their score is given
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "random_policy.json").write_text('{"Deadly-v0": 0.0}')
    arguments = {**GRID, "envs": ["CartPole-v1", "Deadly-v0"], "algorithms": ["episodic_a2c"]}
    frame = compare(**arguments, gym_packages=["deadly_envs"], jobs=2, output=tmp_path / "out")
    assert (frame[frame["env_id"] == "CartPole-v1"]["status"] == "finished").all()
    assert frame[frame["env_id"] == "Deadly-v0"]["error"].str.contains("died twice").tolist() == [True, True]


def test_a_callback_that_ends_training_is_a_failure(tmp_path: Path) -> None:
    config = tmp_path / "stop.yml"
    callback = {"stable_baselines3.common.callbacks.StopTrainingOnMaxEpisodes": {"max_episodes": 1}}
    config.write_text(yaml.safe_dump({"default": {"n_timesteps": 1000, "policy": "MlpPolicy", "callback": callback}}))
    arguments = {**GRID, "algorithms": ["episodic_a2c"], "seeds": 1}
    frame = compare(**arguments, configs={"episodic_a2c": str(config)}, backend="sequential", output=tmp_path / "out")
    assert "after 1 of 4 evaluations. Remove the `callback`" in frame["error"].item()


NAN_ENV = """
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

class NaN(CartPoleEnv):
    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, float("nan") if terminated else reward, terminated, truncated, info

gym.register("NaN-v0", NaN, max_episode_steps=100)
"""


def test_rewards_that_are_no_numbers_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With DQN, which does not fail by itself, as it only collects within the budget."""
    (tmp_path / "nan_env.py").write_text(NAN_ENV)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "dqn.yml").write_text("default: {n_timesteps: 480, policy: MlpPolicy, learning_starts: 1000}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "random_policy.json").write_text('{"NaN-v0": 0.0}')
    arguments = {
        **GRID,
        "envs": ["CartPole-v1", "NaN-v0"],
        "algorithms": ["dqn"],
        "configs": {"dqn": str(tmp_path / "dqn.yml")},
    }
    frame = compare(**arguments, gym_packages=["nan_env"], backend="sequential", output=tmp_path / "out")
    assert (frame[frame["env_id"] == "CartPole-v1"]["status"] == "finished").all()
    failed = frame[frame["env_id"] == "NaN-v0"]
    assert failed["error"].str.contains("RuntimeError: An evaluation gave rewards that are NaN").tolist() == [True, True]
    assert "| NaN-v0 | dqn | 1 | RuntimeError: An evaluation gave" in (tmp_path / "out" / "report.md").read_text()


def test_errors_of_several_lines_are_told_by_the_first(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cells = plan_cells(**{**GRID, "algorithms": ["a2c"]}, output=tmp_path)
    try:
        th.distributions.Categorical(logits=th.tensor([[th.nan, th.nan]]))
    except ValueError:
        tensor = traceback.format_exc()
    assert tensor.strip().splitlines()[-1] == "tensor([[nan, nan]])"
    frame = results_frame(cells, dict(zip(cells, [tensor, "The process died."], strict=True)))
    write_report(frame, cells, tmp_path, {}, console=Console(width=200))
    report, printed = (tmp_path / "report.md").read_text(), capsys.readouterr().out
    assert "| CartPole-v1 | a2c | 0 | ValueError: Expected parameter logits" in report
    assert "| CartPole-v1 | a2c | 1 | The process died. |" in report
    assert "seed 0: ValueError: Expected parameter logits" in printed and "seed 1: The process died." in printed
    # The whole error is in the JSON file
    assert "tensor([[nan, nan]])" in json.loads((tmp_path / "results.json").read_text())["failed"][0]["error"]


# ------------------------------------------------------------------ the grid


@pytest.mark.parametrize(
    "total_timesteps, n_evaluations", [(60_000, 20), (500_000, 20), (100_000, 30), (1_000, 3), (100, 100), (7, 1)]
)
def test_evaluation_grid(total_timesteps: int, n_evaluations: int) -> None:
    grid = evaluation_grid(total_timesteps, n_evaluations)
    assert len(grid) == n_evaluations + 1
    assert (grid[0], grid[-1]) == (0, total_timesteps)
    assert all(a < b for a, b in itertools.pairwise(grid))
    if total_timesteps >= 240 * n_evaluations:
        assert all(point % n_envs == 0 for point in grid[:-1] for n_envs in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 30))
    if total_timesteps >= 960 * n_evaluations:
        assert all(point % n_envs == 0 for point in grid[:-1] for n_envs in (32, 64))


def test_evaluations_off_the_grid_say_so(tmp_path: Path) -> None:
    """7 environments reach no multiple of 240 exactly."""
    config = tmp_path / "seven.yml"
    config.write_text("default: {n_timesteps: 1000, policy: MlpPolicy, n_envs: 7}")
    arguments = {**GRID, "algorithms": ["episodic_a2c"], "seeds": 1}
    frame = compare(**arguments, configs={"episodic_a2c": str(config)}, backend="sequential", output=tmp_path / "out")
    assert frame["grid_timesteps"].tolist() == [0, 240, 480, 720]
    assert frame["timesteps"].tolist() == [0, 245, 483, 721]
    assert "at the first step beyond, by at most 5" in (tmp_path / "out" / "report.md").read_text()


def test_plan_takes_turns_and_the_smallest_budget(tmp_path: Path) -> None:
    arguments = {"envs": ["CartPole-v1", "Pendulum-v1"], "algorithms": ["episodic_a2c", "a2c", "ppo"], "output": tmp_path}
    cells = plan_cells(**arguments, seeds=2)
    assert [cell.label for cell in cells] == ["episodic_a2c", "a2c", "ppo"] * 4
    assert [cell.seed for cell in cells] == [0] * 6 + [1] * 6
    smallest = {
        cell.env_id: min(int(other.hyperparams["n_timesteps"]) for other in cells if other.env_id == cell.env_id)
        for cell in cells
    }
    assert all(cell.total_timesteps == smallest[cell.env_id] for cell in cells)
    cells = plan_cells(**arguments, seeds=[7, 3], total_timesteps={"CartPole-v1": 5_000})
    assert {cell.seed for cell in cells} == {3, 7}
    assert {cell.total_timesteps for cell in cells if cell.env_id == "CartPole-v1"} == {5_000}
    assert {cell.total_timesteps for cell in cells if cell.env_id == "Pendulum-v1"} == {smallest["Pendulum-v1"]}
    assert len({cell.folder for cell in cells}) == len(cells)
    cells = plan_cells(**arguments, seeds={"Pendulum-v1": 3})
    seeds = {env_id: {cell.seed for cell in cells if cell.env_id == env_id} for env_id in arguments["envs"]}
    assert seeds == {"CartPole-v1": set(range(10)), "Pendulum-v1": {0, 1, 2}}
    (note,) = [note for note in fairness_notes(cells, results_frame([], {}), {}) if note.startswith("Same seeds")]
    assert "0 to 9 (CartPole-v1); 0 to 2 (Pendulum-v1)" in note


def test_environments_that_the_zoo_adds(tmp_path: Path) -> None:
    """In a process of its own, as other tests may have registered them in this one."""
    code = (
        "import sys; from sb3_episodic_a2c.tools.comparison.grid import plan_cells; "
        "cells = plan_cells(['CartPoleNoVel-v1'], ['episodic_a2c_lstm', 'ppo_lstm'], seeds=1, output=sys.argv[1]); "
        "print([cell.hyperparams['policy'] for cell in cells])"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1:] == ["['MlpLstmPolicy', 'MlpLstmPolicy']"], result.stderr


def test_matched_a2c_is_a_row_of_its_own(tmp_path: Path) -> None:
    algorithms = ["episodic_a2c", "a2c", "a2c-matched"]
    cells = plan_cells(["Acrobot-v1", "CartPole-v1"], algorithms, seeds=1, output=tmp_path)
    for ours, theirs, matched in (cells[:3], cells[3:]):
        changed = {"use_rms_prop": False, "learning_rate": ours.hyperparams.get("learning_rate", 0.003), "n_envs": ours.n_envs}
        assert matched.hyperparams == {**theirs.hyperparams, **changed}
        assert matched.settings != theirs.settings
        # What `enjoy --algo a2c --folder OUTPUT/a2c-matched` looks for
        assert matched.folder == tmp_path / "a2c-matched" / "a2c" / theirs.folder.name
    arguments = {**GRID, "algorithms": ["a2c-matched"], "seeds": 1}
    frame = compare(**arguments, backend="sequential", output=tmp_path)
    assert set(frame["algorithm"]) == {"a2c-matched"}
    model = A2C.load(Path(frame["folder"].iloc[0]) / "CartPole-v1.zip")
    ours = EpisodicA2C("MlpPolicy", "CartPole-v1")
    assert type(model.policy.optimizer) is type(ours.policy.optimizer) is th.optim.Adam
    for name in ("eps", "betas", "weight_decay"):
        assert model.policy.optimizer.param_groups[0][name] == ours.policy.optimizer.param_groups[0][name]
    # The learning rate of our file is lin_0.003
    assert [model.lr_schedule(progress) for progress in (1.0, 0.5)] == pytest.approx([0.003, 0.0015])
    assert model.n_envs == 1


def test_the_zoos_entry_of_an_older_version() -> None:
    """The Zoo lists MuJoCo's environments up to -v4."""
    assert hyperparams_of("a2c", "HalfCheetah-v5", {}) == read_entry("a2c", "HalfCheetah-v4")
    assert hyperparams_of("a2c", "HalfCheetah-v4", {})["normalize"] is True
    assert hyperparams_of("a2c", "CartPole-v0", {}) == read_entry("a2c", "CartPole-v0") != read_entry("a2c", "CartPole-v1")
    assert hyperparams_of("episodic_a2c", "CartPole-v0", {}) == read_entry("episodic_a2c", "CartPole-v0")


def test_matched_a2c_has_the_optimizer_of_our_file(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.yml", tmp_path / "theirs.yml"
    text = "dict(net_arch=[7], optimizer_class=th.optim.SGD, optimizer_kwargs=dict(momentum=0.5))"
    ours.write_text(yaml.safe_dump({"default": {"n_timesteps": 480, "policy": "MlpPolicy", "policy_kwargs": text}}))
    entry = {"n_timesteps": 480, "policy": "MlpPolicy", "policy_kwargs": "dict(net_arch=[9], optimizer_kwargs=dict(eps=1e-3))"}
    theirs.write_text(yaml.safe_dump({"default": entry}))
    arguments = {**GRID, "algorithms": ["a2c-matched", "episodic_a2c"], "seeds": 1, "output": tmp_path / "out"}
    configs = {"a2c": str(theirs), "episodic_a2c": str(ours)}
    frame = compare(**arguments, configs=configs, backend="sequential")
    model = A2C.load(Path(frame["folder"].iloc[0]) / "CartPole-v1.zip")
    assert isinstance(model.policy.optimizer, th.optim.SGD)
    assert model.policy.optimizer.param_groups[0]["momentum"] == 0.5
    assert model.policy.net_arch == [9]


def test_numpy_integers_and_evaluations_by_environment(tmp_path: Path) -> None:
    arguments = {**GRID, "envs": ["CartPole-v1", "Pendulum-v1"], "seeds": np.arange(2), "eval_episodes": np.int64(3)}
    cells = plan_cells(**{**arguments, "n_evaluations": {"Pendulum-v1": np.int32(3)}}, output=tmp_path)
    assert {(cell.env_id, cell.n_evaluations) for cell in cells} == {("CartPole-v1", 20), ("Pendulum-v1", 3)}
    assert json.dumps(cells[0].settings)
    (note,) = [note for note in fairness_notes(cells, results_frame([], {}), {}) if note.startswith("Same evaluations")]
    assert "20 (CartPole-v1), 3 (Pendulum-v1) points" in note


def test_hyperparameters_of_a_python_file_are_not_written_to(tmp_path: Path) -> None:
    """A2C puts its optimizer into the caller's dict, and the Zoo deletes entries that it has read."""
    config = tmp_path / "hyperparams.py"
    config.write_text(
        "hyperparams = {'default': dict(n_timesteps=1000, policy='MlpPolicy', n_envs=2, policy_kwargs=dict(net_arch=[8]))}"
    )
    arguments = {**GRID, "algorithms": ["a2c"], "output": tmp_path / "out", "configs": {"a2c": str(config)}}
    cells = plan_cells(**arguments)
    before = json.dumps([cell.settings for cell in cells])
    assert run_cells(cells, backend="sequential") == {}
    assert json.dumps([cell.settings for cell in cells]) == before
    frame = results_frame(cells, {})
    assert (frame["status"] == "finished").all()


def test_report_of_unusual_hyperparameters(tmp_path: Path) -> None:
    """Of several lines, or infinite, which JSON does not have."""
    config = tmp_path / "a2c.yml"
    text = "dict(\n  net_arch=[8])\n"
    entry = {"n_timesteps": 480, "policy": "MlpPolicy", "max_grad_norm": float("inf"), "policy_kwargs": text}
    config.write_text(yaml.safe_dump({"default": entry}))
    arguments = {**GRID, "algorithms": ["a2c"], "seeds": 1, "output": tmp_path / "out", "configs": {"a2c": str(config)}}
    assert (compare(**arguments, backend="sequential")["status"] == "finished").all()
    row = "| CartPole-v1 | a2c | max_grad_norm: inf, n_timesteps: 480, policy: MlpPolicy, policy_kwargs: dict( net_arch=[8]) |"
    assert row in (tmp_path / "out" / "report.md").read_text()
    (hyperparams,) = json.loads((tmp_path / "out" / "results.json").read_text())["hyperparams"]
    assert (hyperparams["max_grad_norm"], hyperparams["policy_kwargs"]) == (None, text)
    # The second comparison recognises them
    before = stamps(tmp_path / "out")
    compare(**arguments, backend="sequential")
    assert stamps(tmp_path / "out") == before


BAD_INPUT: list[tuple[dict[str, Any], str]] = [
    ({"envs": ["NoSuchEnv-v0"]}, "`env` 'NoSuchEnv-v0' is no registered environment"),
    ({"envs": ["CartPole-v9"]}, "Did you mean 'CartPole-v"),
    ({"envs": []}, "`env` is empty"),
    ({"envs": ["CartPole-v1", "CartPole-v1"]}, "`env` names 'CartPole-v1' more than once"),
    ({"algorithms": ["a2c", "a3c"]}, "`algo` 'a3c' is unknown. Use one of episodic_a2c"),
    ({"algorithms": ["a2c", "a2c"]}, "`algo` names 'a2c' more than once"),
    ({"seeds": 0}, "`seeds` is 0"),
    ({"seeds": []}, "`seeds` is empty"),
    ({"seeds": [1, -1]}, "`seeds` holds -1"),
    ({"seeds": [1, 2, 1]}, "`seeds` names 1 more than once"),
    ({"seeds": {"Pendulum-v1": 3}}, "`seeds` is given for 'Pendulum-v1', which is not compared"),
    ({"total_timesteps": 0}, "`total_timesteps` of CartPole-v1 is 0"),
    ({"total_timesteps": {"Pendulum-v1": 10}}, "`total_timesteps` is given for 'Pendulum-v1', which is not compared"),
    ({"n_evaluations": 0}, "`n_evaluations` is 0"),
    ({"n_evaluations": 2.5}, r"`n_evaluations` is 2\.5. It must be an integer"),
    ({"n_evaluations": {"Pendulum-v1": 3}}, "`n_evaluations` is given for 'Pendulum-v1', which is not compared"),
    ({"eval_episodes": True}, "`eval_episodes` is True. It must be an integer"),
    ({"seeds": 2.5}, r"`seeds` is 2\.5. It must be an integer"),
    ({"seeds": True}, "`seeds` is True. It must be an integer"),
    ({"seeds": [0, 1.0]}, r"`seeds` holds 1\.0. Each must be an integer"),
    ({"total_timesteps": 720.0}, r"`total_timesteps` of CartPole-v1 is 720\.0. It must be an integer"),
    ({"jobs": -1}, r"`jobs` is -1. It must be an integer >= 1. This machine has \d+ processors"),
    ({"n_evaluations": 200}, "`n_evaluations` is 200: too many for 720 env steps of a2c on CartPole-v1, .* Use at most 90"),
    ({"eval_episodes": 0}, "`eval_episodes` is 0"),
    ({"gym_packages": ["no_such_package"]}, "`gym_packages` 'no_such_package' cannot be imported"),
    ({"output": __file__}, "`output` .*test_compare.py is a file"),
    ({"jobs": 0}, "`jobs` is 0"),
    ({"backend": "slurm"}, "`backend` 'slurm' is unknown"),
    ({"scheduler": "tcp://x:1", "backend": "loky"}, "`scheduler` is 'tcp://x:1', but 'loky' has none"),
    ({"configs": {"ppo": "x.yml"}}, "`conf` is given for 'ppo', which is not compared"),
    ({"configs": {"a2c": "no-such.yml"}}, "`conf` no-such.yml of 'a2c' gives no hyperparameters for CartPole-v1"),
]


@pytest.mark.parametrize("change, message", BAD_INPUT, ids=[message[:30] for _, message in BAD_INPUT])
def test_bad_input(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        compare(**{**GRID, "backend": "sequential", "output": tmp_path / "out", **change})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("Pendulum-v1: {n_timesteps: 10, policy: MlpPolicy}", "Hyperparameters not found"),
        ("CartPole-v1: {policy: MlpPolicy}", "must have `n_timesteps` and `policy`"),
        ("CartPole-v1: [", "ParserError"),
    ],
)
def test_bad_config(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text(text)
    with pytest.raises(ValueError, match=message):
        compare(**GRID, configs={"a2c": str(tmp_path / "x.yml")}, output=tmp_path / "out")


def test_backend_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKEND_PACKAGES, "ray", "no_such_package")
    with pytest.raises(ValueError, match=r"Install it with: pip install 'sb3-episodic-a2c\[ray\]'"):
        compare(**GRID, backend="ray", output=tmp_path / "out")


def test_help_says_what_is_fair(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "--n-evaluations" in printed
    # As it stands in the package, lines and all
    assert comparison.__doc__ is not None and comparison.__doc__.strip() in printed
    for words in ("Fairness: the same for all algorithms", "Fairness: what differs", "Kept work", "Backends"):
        assert words in printed


def test_workers_import_no_more_than_they_need() -> None:
    code = (
        "import sys; import sb3_episodic_a2c.tools.comparison.training; "
        "print([name for name in ('matplotlib', 'pandas', 'scipy.stats') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_arguments_of_the_command_line() -> None:
    assert parse_by_env("total_timesteps", ["1e5"]) == 100_000
    assert parse_by_env("total_timesteps", ["CartPole-v1:5e4", "ALE/Pong-v5:1000000"]) == {
        "CartPole-v1": 50_000,
        "ALE/Pong-v5": 1_000_000,
    }
    for values, message in (
        (["many"], "`seeds` 'many' is no integer"),
        (["1.5"], "'1.5' is no integer"),
        (["1000", "2000"], "'1000' names no environment"),
        (["A-v0:1", "A-v0:2"], "given twice for 'A-v0'"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_by_env("seeds", values)
    algorithms = ["episodic_a2c", "a2c-matched", "ppo"]
    assert parse_configs(["a.yml", "a2c:b.yml", "ppo:c:d.yml"], algorithms) == {
        "episodic_a2c": "a.yml",
        "a2c": "b.yml",
        "ppo": "c:d.yml",
    }
    # Kept, so that the error is that ppo is not compared, instead of a missing file ppo:x.yml
    assert parse_configs(["ppo:x.yml"], ["a2c"]) == {"ppo": "x.yml"}
    with pytest.raises(ValueError, match="`conf` is given twice for 'episodic_a2c'"):
        parse_configs(["a.yml", "episodic_a2c:b.yml"], algorithms)


def test_time_left_is_learnt_from_finished_cells(tmp_path: Path) -> None:
    cells = plan_cells(["CartPole-v1", "Pendulum-v1"], ["episodic_a2c", "a2c"], seeds=2, output=tmp_path)
    missing = cells[4:]
    assert seconds_left(missing, {}) == 0
    assert seconds_left(missing, {("CartPole-v1", "episodic_a2c"): [1.0, 3.0]}) == 4 * 2
    known = {("CartPole-v1", "episodic_a2c"): [1.0, 3.0], ("Pendulum-v1", "a2c"): [10.0]}
    # Ours and A2C on CartPole-v1, ours and A2C on Pendulum-v1
    assert seconds_left(missing, known) == 2 + 2 + 10 + 10
    assert [format_duration(seconds) for seconds in (5, 130, 7_260)] == ["5 s", "2 min", "2 h 01 min"]


# ------------------------------------------------------------------ figures


def frame_of(scores: dict[tuple[str, str], list[list[float]]]) -> pd.DataFrame:
    """A frame from evaluations at 0, 100 and 200 env steps of each run; 0.01 s a step."""
    rows = []
    for (env_id, algorithm), runs in scores.items():
        for seed, rewards in enumerate(runs):
            for index, reward in enumerate(rewards):
                row = {"algorithm": algorithm, "env_id": env_id, "seed": seed, "status": "finished", "evaluation": index}
                row.update(timesteps=100 * index, grid_timesteps=100 * index, mean_reward=reward, train_seconds=1.0 * index)
                rows.append({**row, "eval_seconds": 0.5, "error": ""})
    return pd.DataFrame(rows)


def test_summary_of_known_runs() -> None:
    frame = frame_of(
        {
            ("CartPole-v1", "ours"): [[500, 480, 500], [10, 480, 100], [10, 20, 30]],
            ("CartPole-v1", "other"): [[0, 500, 0], [10, 20, 30], [0, 0, 40]],
        }
    )
    ours, other = summarize(frame, np.random.default_rng(0))
    assert ours.scores["final"].tolist() == [500, 100, 30]
    # By hand, the first run: (490 * 100 + 490 * 100) / 200
    assert ours.scores["area"].tolist() == [490, 267.5, 20]
    assert ours.iqm["final"].value == ours.mean["final"] == 210
    assert ours.std["final"] == pytest.approx(np.std([500, 100, 30], ddof=1))
    assert ours.probability is None
    # 500 and 100 win three times each; 30 wins once, ties once
    assert other.probability is not None
    assert other.probability["final"].value == pytest.approx(7.5 / 9)
    # Seed by seed: 500 against 0, 100 against 30, 30 against 40
    assert ours.n_pairs_won is None
    assert other.n_pairs_won is not None
    assert (other.n_pairs, other.n_pairs_won["final"]) == (3, 2)
    assert "| 2 of 3 seeds | 3 |" in markdown_table(score_table([ours, other], []))
    # What was reached before training does not count
    assert (ours.n_solved, ours.timesteps_to_threshold, ours.seconds_to_threshold) == (2, 100, 1)
    assert (other.n_solved, other.timesteps_to_threshold) == (1, np.inf)
    assert (ours.timesteps, ours.train_seconds, ours.timesteps_per_second, ours.eval_seconds) == (200, 2, 100, 0.5)
    text = markdown_table(cost_table([ours, other]))
    assert "| CartPole-v1 | ours | 475 | 2 of 3 | 100 | 1.00 s | not reached |" in text
    assert "| CartPole-v1 | other | 475 | 1 of 3 | not reached | not reached | not reached |" in text


def test_one_line_an_environment_says_who_is_better() -> None:
    ends = {"ours": ([500.0] * 4, [-80.0, -90.0, -100.0, -90.0]), "other": ([100.0] * 4, [-85.0, -95.0, -90.0, -90.0])}
    scores = {
        (env_id, algorithm): [[0, 0, end] for end in values]
        for algorithm, both in ends.items()
        for env_id, values in zip(("CartPole-v1", "Acrobot-v1"), both, strict=True)
    }
    # One that failed on one of them
    failed = {"algorithm": "third", "env_id": "Acrobot-v1", "seed": 0, "status": "failed", "error": "ValueError: x"}
    scores["CartPole-v1", "third"] = [[0, 0, 600]] * 4
    frame = pd.concat([frame_of(scores), pd.DataFrame([failed])], ignore_index=True)
    header, cart_pole, acrobot, counts = winner_table(summarize(frame, np.random.default_rng(0)), [])
    assert header[2:4] == ["minus that of other (95% interval)", "minus that of third (95% interval)"]
    assert cart_pole[:4] == [
        "CartPole-v1",
        "500.0 (500.0 to 500.0)",
        "400.0 (400.0 to 400.0): better",
        "-100.0 (-100.0 to -100.0): worse",
    ]
    assert cart_pole[4:] == ["2.00 s"] * 3
    assert acrobot[0] == "Acrobot-v1" and acrobot[2].endswith("): undecided") and acrobot[3] == "-: not compared"
    assert counts[2:4] == ["1 better, 0 worse, 1 undecided", "0 better, 1 worse, 0 undecided, 1 not compared"]


def test_reached_and_stayed() -> None:
    runs = [[0, 480, 480], [0, 480, 0], [500, 500, 500], [0, 0, 480], [0, 0, 0], [500, 0, 500]]
    stayed = [100, np.inf, 100, 200, np.inf, 200]
    for run, timesteps in zip(runs, stayed, strict=True):
        (summary,) = summarize(frame_of({("CartPole-v1", "ours"): [run]}), np.random.default_rng(0))
        assert summary.timesteps_to_stay == timesteps
    # The median is infinite unless more than half of the runs reach it
    for n_solved, median in ((2, np.inf), (3, 100)):
        scores = [[0, 480, 480]] * n_solved + [[0, 0, 0]] * (4 - n_solved)
        (summary,) = summarize(frame_of({("CartPole-v1", "ours"): scores}), np.random.default_rng(0))
        assert summary.timesteps_to_threshold == summary.timesteps_to_stay == median


def test_overall_is_over_normalised_scores() -> None:
    ends = {"ours": (500.0, -100.0), "other": (22.0, -500.0)}
    frame = frame_of(
        {
            (env_id, algorithm): [[0, 0, end]] * 4
            for algorithm, values in ends.items()
            for env_id, end in zip(("CartPole-v1", "Acrobot-v1"), values, strict=True)
        }
    )
    summaries = summarize(frame, np.random.default_rng(0))
    scale = {"CartPole-v1": Scale(22.0, 500.0, True), "Acrobot-v1": Scale(-500.0, -100.0, True)}
    ours, other = summarize_overall(summaries, scale, np.random.default_rng(0))
    assert (ours.iqm["final"], other.iqm["final"]) == ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    assert other.probability is not None
    assert other.probability["final"].value == 1.0
    # By hand: after 0 and 0, halfway to the end is a quarter of it
    area = [(125 - 22) / 478, (-25 + 500) / 400] * 4
    assert (ours.mean["final"], ours.std["final"]) == (1.0, 0.0)
    assert (ours.mean["area"], ours.std["area"]) == pytest.approx((np.mean(area), np.std(area, ddof=1)))
    table = markdown_table(score_table(summaries, [ours, other]))
    assert "| all, normalised | ours | 1.00 (1.00 to 1.00) | 1.00 ± 0.00 |" in table
    assert f" | {np.mean(area):.2f} ± {np.std(area, ddof=1):.2f} |" in table
    # More seeds of one environment do not make it weigh more
    more = {("CartPole-v1", name): [[0, 0, ends[name][0]]] * 12 for name in ends}
    less = {("Acrobot-v1", name): [[0, 0, -300.0]] * 4 for name in ends}
    ours, _ = summarize_overall(summarize(frame_of(more | less), np.random.default_rng(0)), scale, np.random.default_rng(0))
    assert ours.seeds == [0, 1, 2, 3]
    assert ours.iqm["final"].value == pytest.approx(0.75)
    # An environment whose reference is no better than chance has no scale
    scale["Acrobot-v1"] = Scale(-100.0, -100.0, False)
    assert summarize_overall(summaries, scale, np.random.default_rng(0)) == []


def test_score_of_random_actions() -> None:
    score = random_policy_score("CartPole-v1", n_episodes=20)
    assert 12 < score < 40
    assert random_policy_score("CartPole-v1", n_episodes=20) == score


ENDLESS = """
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

class Endless(CartPoleEnv):
    def step(self, action):
        observation, reward, _, _, info = super().step(action)
        return observation, reward, False, False, info

class Broken(CartPoleEnv):
    def step(self, action):
        raise OSError("no display")

gym.register("Endless-v0", Endless)
gym.register("Broken-v0", Broken)
"""


def test_random_actions_that_fail_lose_no_report(
    finished: tuple[Path, pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "endless_envs.py").write_text(ENDLESS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sb3_episodic_a2c.tools.comparison.normalization.RANDOM_TIMESTEPS", 500)
    arguments = {**GRID, "envs": ["Endless-v0", "Broken-v0"], "algorithms": ["a2c"], "gym_packages": ["endless_envs"]}
    config = tmp_path / "a2c.yml"
    config.write_text("default: {n_timesteps: 1000, policy: MlpPolicy}")
    cells = plan_cells(**arguments, configs={"a2c": str(config)}, output=tmp_path / "out")
    frame = results_frame(cells, dict.fromkeys(cells, "it failed"))
    with pytest.warns(UserWarning, match="random actions failed"):
        write_report(frame, cells, tmp_path / "out", {}, console=Console(quiet=True))
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Not normalised: Endless-v0: random actions failed: not usable, left out; Broken-v0" in report
    assert len(pd.read_csv(tmp_path / "out" / "results.csv")) == 4
    # As many episodes as fit into the env steps
    assert 5 < random_policy_score("CartPole-v1") < 60


def test_one_seed_says_that_there_is_no_interval(finished: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    cells = [cell for cell in plan_cells(**GRID, output=finished[0]) if cell.seed == 0]
    assert all(load_cell(cell) is not None for cell in cells)
    frame = results_frame(cells, {})
    write_report(frame, cells, tmp_path, {}, console=Console(quiet=True))
    assert "(no interval)" in (tmp_path / "report.md").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["summaries"][0]["iqm"]["final"]["low"] is None


def test_terminal_table(capsys: pytest.CaptureFixture) -> None:
    print_table("title", [["environment", "b"], ["x", "1"], ["y", "[2]"]], Console(width=80))
    printed = capsys.readouterr().out
    assert "title" in printed and "[2]" in printed
    assert len(set(map(len, printed.strip().splitlines()[1:]))) == 1


@pytest.mark.parametrize("width", [80, 100])
def test_terminal_tables_cut_no_names_and_no_figures(width: int) -> None:
    runs = {("MountainCarContinuous-v0", name): [[0, 90, 91.25]] * 3 for name in ("episodic_a2c_mask", "a2c-matched")}
    summaries = summarize(frame_of(runs), np.random.default_rng(0))
    for rows in (score_table(summaries, []), cost_table(summaries)):
        console = Console(width=width, record=True, file=io.StringIO())
        print_table("title", rows, console)
        printed = console.export_text()
        assert "…" not in printed
        assert "MountainCarContinuous-v0" in printed and "episodic_a2c_mask" in printed and "a2c-matched" in printed
        assert all(cell in printed for row in rows[1:] for cell in row)
        assert max(map(len, printed.splitlines())) <= width


# ------------------------------------------------------------------ plots


def band(axes: Axes, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The corners of the polygon of an interval, with the lowest and the highest value at each."""
    corners = axes.collections[index].get_paths()[0].vertices
    x = np.unique(corners[:, 0])
    limits = [corners[corners[:, 0] == one, 1] for one in x]
    return x, np.array([values.min() for values in limits]), np.array([values.max() for values in limits])


def legend_entries(figure: Figure) -> dict[str, tuple[Any, Any]]:
    (legend,) = figure.legends
    return {handle.get_label(): (handle.get_color(), handle.get_linestyle()) for handle in legend.legend_handles}


def random_runs(env_ids: list[str], n_runs: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    names = itertools.product(env_ids, ("ours", "other"))
    return frame_of({name: rng.normal(100, 30, size=(n_runs, 3)).tolist() for name in names})


@pytest.mark.parametrize("over_time", [False, True], ids=["env steps", "wall time"])
def test_learning_curves(over_time: bool) -> None:
    env_ids = ["CartPole-v1", "Pendulum-v1"]
    frame = random_runs(env_ids, 8)
    # Evaluation i of seed s is after i (1 + s)^2 seconds, or twice as many: the medians are 20.5 i and 41 i
    frame["train_seconds"] = frame["evaluation"] * (1 + frame["seed"]) ** 2 * frame["algorithm"].map({"ours": 1, "other": 2})
    failed = {"algorithm": "broken", "env_id": "CartPole-v1", "seed": 0, "status": "failed", "error": "it failed"}
    figure = plot_curves(pd.concat([frame, pd.DataFrame([failed])]), np.random.default_rng(0), over_time)
    assert figure is not None
    # The first evaluation is at time 0, which a logarithmic axis does not have
    shown = slice(1 if over_time else 0, None)
    expected_x = (
        {"ours": [20.5, 41.0], "other": [41.0, 82.0]} if over_time else {"ours": [0, 100, 200], "other": [0, 100, 200]}
    )
    rng = np.random.default_rng(0)
    for axes, env_id in zip(figure.axes, env_ids, strict=True):
        # A line for each finished algorithm, and one for the threshold, which Pendulum does not have
        assert len(axes.lines) == (3 if env_id == "CartPole-v1" else 2)
        assert len(axes.collections) == 2
        for index, algorithm in enumerate(("ours", "other")):
            runs = frame[(frame["env_id"] == env_id) & (frame["algorithm"] == algorithm)]
            rewards = runs["mean_reward"].to_numpy().reshape(8, 3)
            line = axes.lines[index]
            assert line.get_xdata().tolist() == expected_x[algorithm]
            # The mean of the middle four of eight runs
            np.testing.assert_allclose(line.get_ydata(), np.sort(rewards, axis=0)[2:6].mean(axis=0)[shown])
            assert (line.get_color(), line.get_linestyle()) == legend_entries(figure)[algorithm]
            _, low, high = iqm_band(rewards, rng)
            x, drawn_low, drawn_high = band(axes, index)
            assert x.tolist() == expected_x[algorithm]
            np.testing.assert_array_equal((drawn_low, drawn_high), (low[shown], high[shown]))
            assert (drawn_low < line.get_ydata()).all() and (line.get_ydata() < drawn_high).all()
            assert to_rgb(axes.collections[index].get_facecolor()[0]) == to_rgb(line.get_color())
        assert axes.get_title() == env_id
        assert axes.get_xlabel() == ("training wall time (s, log scale)" if over_time else "env steps")
        assert axes.get_xscale() == ("log" if over_time else "linear")
    assert set(figure.axes[0].lines[2].get_ydata()) == {475}
    assert [axes.get_ylabel() for axes in figure.axes] == ["reward of an episode", ""]
    assert list(legend_entries(figure)) == ["ours", "other", "broken", "reward threshold"]
    assert figure.get_suptitle() == "Greedy evaluations: IQM over 8 runs, 95% bootstrap interval"


def test_learning_curves_of_one_run_and_without_a_threshold() -> None:
    figure = plot_curves(random_runs(["Pendulum-v1"], 1), np.random.default_rng(0), over_time=False)
    assert figure is not None
    (axes,) = figure.axes
    assert [len(line.get_xdata()) for line in axes.lines] == [3, 3]
    # No interval
    assert not any(len(path.vertices) for collection in axes.collections for path in collection.get_paths())
    assert list(legend_entries(figure)) == ["ours", "other"]


@pytest.mark.parametrize("over_time", [False, True], ids=["env steps", "wall time"])
@pytest.mark.parametrize(
    "start, end", [(1, 1.5), (0.021, 0.09), (2.2, 8.7), (1, 10), (0.3, 160), (1, 1_000), (0.1, 3e5), (2e4, 2.4e4), (2e4, 9e5)]
)
def test_words_of_learning_curves_do_not_overlap(over_time: bool, start: float, end: float) -> None:
    env_ids = ["CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCarContinuous-v0", "LunarLander-v3"]
    frame = random_runs(env_ids, 4)
    frame["train_seconds"] = frame["evaluation"].map({0: 0.0, 1: start, 2: end})
    frame["timesteps"] = frame["evaluation"].map({0: 0, 1: 1_000 * start, 2: 1_000 * end})
    figure = plot_curves(frame, np.random.default_rng(0), over_time)
    assert figure is not None
    figure.canvas.draw()
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in panels] == env_ids
    # Three in the first row; the third has no panel below it, so it has the words
    assert [bool(axes.get_xlabel()) for axes in panels] == [False, False, True, True, True]
    assert [bool(axes.get_ylabel()) for axes in panels] == [True, False, False, True, False]
    for axes in panels:
        for axis, first, last in ((axes.xaxis, "x0", "x1"), (axes.yaxis, "y0", "y1")):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            boxes = [tick.label1.get_window_extent() for tick in ticks]
            assert 2 <= len(boxes)
            assert all(getattr(one, last) < getattr(other, first) for one, other in itertools.pairwise(boxes))
    inside, whole = figure.get_tightbbox(), figure.bbox_inches
    assert whole.x0 <= inside.x0 and inside.x1 <= whole.x1 and whole.y0 <= inside.y0 and inside.y1 <= whole.y1


def test_plot_of_scores() -> None:
    env_ids = ["CartPole-v1", "Acrobot-v1"]
    summaries = summarize(random_runs(env_ids, 6), np.random.default_rng(0))
    overall = summarize_overall(summaries, dict.fromkeys(env_ids, Scale(0.0, 100.0, True)), np.random.default_rng(0))
    figure = plot_scores(summaries, overall)
    rows = {**{env_id: [one for one in summaries if one.env_id == env_id] for env_id in env_ids}, "all, normalised": overall}
    panels = iter(figure.axes)
    for name, (metric, title) in itertools.product(rows, METRICS.items()):
        axes = next(panels)
        assert axes.get_title(loc="left") == f"{name}: {title}"
        assert [label.get_text() for label in axes.get_yticklabels()] == (["ours", "other"] if metric == "final" else ["", ""])
        assert len(axes.patches) == len(axes.lines) == 2
        for index, one in enumerate(rows[name]):
            bar, line = axes.patches[index], axes.lines[index]
            assert (bar.get_x(), bar.get_x() + bar.get_width()) == pytest.approx((one.iqm[metric].low, one.iqm[metric].high))
            assert line.get_xdata() == [one.iqm[metric].value]
            # On the same height as its name
            assert line.get_ydata() == [axes.get_yticks()[index]] == [bar.get_y() + bar.get_height() / 2]
            assert (line.get_color(), line.get_marker()) == (STYLES[index][0], STYLES[index][2])
            assert to_rgb(bar.get_facecolor()) == to_rgb(line.get_color())
    assert next(panels, None) is None
    assert [axes.get_xlabel() for axes in figure.axes] == [""] * 4 + ["normalised score"] * 2
    axes_of_one_run = plot_scores(summarize(random_runs(["CartPole-v1"], 1), np.random.default_rng(0)), []).axes
    assert np.isnan(axes_of_one_run[0].patches[0].get_width()) and np.isfinite(axes_of_one_run[0].lines[0].get_xdata()).all()
    assert [axes.get_xlabel() for axes in axes_of_one_run] == ["reward of an episode", "mean reward over the budget"]


def profile_of(scores: dict[tuple[str, str], list[float]]) -> Figure | None:
    """Of normalised scores that are equal at all evaluations, so that both metrics are equal."""
    summaries = summarize(
        frame_of({name: [[score] * 3 for score in runs] for name, runs in scores.items()}), np.random.default_rng(0)
    )
    return plot_profile(summaries, {env_id: Scale(0.0, 1.0, True) for env_id, _ in scores}, np.random.default_rng(0))


def test_performance_profile() -> None:
    scores = {
        ("CartPole-v1", "ours"): [0.0, 0.4, 0.4, 1.0],
        ("CartPole-v1", "other"): [0.2, 0.2, 0.2],
        ("Acrobot-v1", "ours"): [1.0, 1.0],
        ("Acrobot-v1", "other"): [-0.2, 0.6],
    }
    figure = profile_of(scores)
    assert figure is not None
    final = figure.axes[0]
    assert [axes.get_title() for axes in figure.axes] == list(METRICS.values())
    assert {axes.get_xlabel() for axes in figure.axes} == {"normalised score (0: random actions, 1: reference)"}
    assert [axes.get_ylabel() for axes in figure.axes] == ["share of runs above that score", ""]
    assert figure.get_suptitle() == "Performance profile over 2 environments, 95% bootstrap interval"
    assert list(legend_entries(figure)) == ["ours", "other"]
    # By hand: the mean of both environments' shares
    shares = {
        "ours": {-0.21: 1.0, -0.01: 1.0, 0.02: 0.875, 0.38: 0.875, 0.42: 0.625, 0.98: 0.625, 1.01: 0.0},
        "other": {-0.21: 1.0, -0.18: 0.75, 0.18: 0.75, 0.22: 0.25, 0.58: 0.25, 0.62: 0.0, 1.01: 0.0},
    }
    rng = np.random.default_rng(0)
    for index, (algorithm, by_threshold) in enumerate(shares.items()):
        line = final.lines[index]
        x, y = line.get_data()
        assert line.get_drawstyle() == "steps-post"
        assert (line.get_color(), line.get_linestyle()) == legend_entries(figure)[algorithm]
        assert (np.diff(x) > 0).all() and (np.diff(y) <= 0).all()
        assert (y[0], y[-1]) == (1, 0)
        for threshold, share in by_threshold.items():
            assert y[np.searchsorted(x, threshold, side="right") - 1] == share
        samples = [np.array(runs) for (_, name), runs in scores.items() if name == algorithm]
        _, low, high = profile_band(samples, x, rng)
        corners, drawn_low, drawn_high = band(final, index)
        np.testing.assert_array_equal(corners, x)
        # A corner ends one step and starts the next, lower one
        np.testing.assert_array_equal((drawn_low[1:], drawn_high[1:]), (low[1:], high[:-1]))
        assert to_rgb(final.collections[index].get_facecolor()[0]) == to_rgb(line.get_color())
    for line, other in zip(final.lines, figure.axes[1].lines, strict=True):
        np.testing.assert_allclose(line.get_ydata(), other.get_ydata())


@pytest.mark.parametrize("scores", [[1.0, 1.0, 1.0], [-1.0, -1.2, -1.4], [-3.0, -3.0, -3.0], [0.1, 0.2, 7.0]], ids=str)
def test_performance_profile_of_equal_and_of_low_scores(scores: list[float]) -> None:
    figure = profile_of({("CartPole-v1", "ours"): scores, ("CartPole-v1", "other"): [scores[0], scores[0]]})
    assert figure is not None
    for line in (line for axes in figure.axes for line in axes.lines):
        x, y = line.get_data()
        assert (np.diff(x) > 0).all() and (np.diff(y) <= 0).all()
        assert (y[0], y[-1]) == (1, 0)
        assert min(scores) - 0.2 < x[0] < min(scores) and max(scores) < x[-1] < max(scores) + 0.2


def test_performance_profile_is_not_squeezed_by_one_run() -> None:
    figure = profile_of({("CartPole-v1", "ours"): [-50.0, 0.0, 1.0, 1.0], ("CartPole-v1", "other"): [0.5]})
    assert figure is not None
    x, y = figure.axes[0].lines[0].get_data()
    assert -0.6 < x[0] < -0.5
    # The run below the axis still counts
    assert y[0] == 0.75


def test_nothing_to_plot(tmp_path: Path) -> None:
    cells = plan_cells(**GRID, output=tmp_path)
    frame = results_frame(cells, dict.fromkeys(cells, "it failed"))
    assert plot_curves(frame, np.random.default_rng(0), over_time=False) is None
    summaries = summarize(frame, np.random.default_rng(0))
    scale = {"CartPole-v1": Scale(0.0, 1.0, True)}
    assert plot_profile(summaries, scale, np.random.default_rng(0)) is None
    # Nor without a usable scale
    summaries = summarize(random_runs(["CartPole-v1"], 2), np.random.default_rng(0))
    assert plot_profile(summaries, {"CartPole-v1": Scale(1.0, 1.0, False)}, np.random.default_rng(0)) is None


def test_styles_differ_in_colour_and_in_shape() -> None:
    for column in zip(*STYLES, strict=True):
        assert len(set(map(str, column))) == len(STYLES)


def test_cells_of_the_same_kind_are_equal(tmp_path: Path) -> None:
    first, again = (plan_cells(**GRID, output=tmp_path) for _ in range(2))
    assert first == again
    assert len({*first, *again}) == len(first)
    assert isinstance(first[0], Cell)
    assert importlib.util.find_spec("joblib") is not None
