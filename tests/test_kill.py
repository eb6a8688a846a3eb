"""A training that is killed again and again, and resumed each time, ends where an uninterrupted one does."""

import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env

from sb3_episodic_a2c import EpisodicA2C, RecurrentEpisodicA2C, ResumableCheckpointCallback, resume
from tests.test_checkpoints import assert_same, state_of

# Starts at once, as nothing is imported anew
CONTEXT = multiprocessing.get_context("fork")
N_ENVS = 2


def make_model(algorithm: type[EpisodicA2C]) -> EpisodicA2C:
    is_recurrent = algorithm is RecurrentEpisodicA2C
    policy_kwargs = {"lstm_hidden_size": 8, "net_arch": []} if is_recurrent else {}
    env = make_vec_env("CartPole-v1", N_ENVS, seed=0)
    policy = "MlpLstmPolicy" if is_recurrent else "MlpPolicy"
    return algorithm(policy, env, seed=0, device="cpu", policy_kwargs=policy_kwargs)


def state_seeded(model: EpisodicA2C) -> dict[str, Any]:
    """All of the state, but for the random states of Python and NumPy, which nothing here uses or seeds."""
    state = state_of(model)
    return {**state, "random": state["random"][:1]}


def train(algorithm: type[EpisodicA2C], total_timesteps: int, folder: Path, started_at: Any) -> None:
    """What the README says: one script for the first start and for all others."""
    # No checkpoint is ever found damaged, as each is written as a whole
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", "No episode ended")
    model = resume(folder, device="cpu") or make_model(algorithm)
    started_at.value = model.num_timesteps
    model.learn(
        total_timesteps - model.num_timesteps,
        reset_num_timesteps=False,
        callback=ResumableCheckpointCallback(folder, save_freq=1, keep=3),
    )


def newest_steps(folder: Path) -> int:
    names = sorted(path.name for path in folder.glob("checkpoint_*.zip"))
    return int(names[-1].split("_")[2]) if names else 0


@pytest.mark.parametrize(
    "algorithm, n_kills, total_timesteps",
    [
        (EpisodicA2C, 5, 3_000),
        pytest.param(EpisodicA2C, 50, 120_000, marks=pytest.mark.slow),
        pytest.param(RecurrentEpisodicA2C, 50, 50_000, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed(algorithm: type[EpisodicA2C], n_kills: int, total_timesteps: int, tmp_path: Path) -> None:
    # Before the others, which then need not import what a first training imports
    uninterrupted = make_model(algorithm).learn(total_timesteps)
    rng = np.random.default_rng(0)
    started_at = CONTEXT.Value("q", -1)
    n_killed_while_writing = n_with_progress = 0
    for kill in range(n_kills):
        expected_start = newest_steps(tmp_path)
        started_at.value = -1
        process = CONTEXT.Process(target=train, args=(algorithm, total_timesteps, tmp_path, started_at))
        process.start()
        while started_at.value < 0 and process.is_alive():
            time.sleep(0.001)
        assert started_at.value == expected_start or process.exitcode == 0
        while kill % 2 == 1 and process.is_alive() and newest_steps(tmp_path) <= expected_start:
            # However slow the machine is, there is something to lose
            time.sleep(0.001)
        time.sleep(float(rng.uniform(0.0, 0.2)))
        if kill % 3 == 0:
            # A write is short: moments chosen blindly hit few
            while process.is_alive() and not any(tmp_path.glob(".*.tmp")):
                pass
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join()
        if process.exitcode == 0:
            # A fast machine, or many lucky kills
            assert kill >= n_kills // 2, f"finished before kill {kill + 1}: the test needs a longer training"
            break
        assert process.exitcode == -signal.SIGKILL
        # A folder that changes while it is listed may show more
        assert len(list(tmp_path.glob("checkpoint_*.zip"))) <= 4, "the last 3, and one more until the oldest is deleted"
        n_killed_while_writing += any(tmp_path.glob(".*.tmp"))
        n_with_progress += newest_steps(tmp_path) > expected_start
    # Else nothing was tested
    assert n_with_progress > n_kills // 3
    assert n_killed_while_writing > n_kills // 25

    process = CONTEXT.Process(target=train, args=(algorithm, total_timesteps, tmp_path, started_at))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert not any(tmp_path.glob(".*.tmp"))
    resumed = resume(tmp_path, device="cpu")
    assert resumed is not None

    print(f"{n_kills} kills, {n_killed_while_writing} of them while a checkpoint was being written")
    assert_same(state_seeded(resumed), state_seeded(uninterrupted))
