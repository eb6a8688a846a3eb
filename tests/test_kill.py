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
from stable_baselines3.common.callbacks import BaseCallback

from sb3_episodic_a2c import EpisodicA2C, ResumableCheckpointCallback, resume
from tests.test_checkpoints import assert_same, make_model, state_of

# Starts at once, as nothing is imported anew
CONTEXT = multiprocessing.get_context("fork")
NOT_STARTED = -1

SETTINGS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "plain": ("plain", 1, {}),
    "several environments": ("plain", 3, {}),
    "discard": ("plain", 3, {"partial_episodes": "discard"}),
    "maskable": ("maskable", 2, {}),
    "recurrent": ("recurrent", 2, {}),
}


def start_afresh(setting: str) -> EpisodicA2C:
    name, n_envs, arguments = SETTINGS[setting]
    # Not a schedule: while it is killed again and again, the training has no end
    return make_model(name, n_envs, **{"learning_rate": 3e-3, **arguments})


def state_seeded(model: EpisodicA2C) -> dict[str, Any]:
    """
    All of the state, but for the random states of Python and NumPy, which nothing here uses or seeds, and the memory of an
    LSTM, which is recalled when a rollout starts.
    """
    state = state_of(model)
    return {**state, "random": state["random"][:1], "lstm": None}


class Report(BaseCallback):
    """Says how far the training is, in memory that outlives the process. To be called before a checkpoint is written."""

    def __init__(self, reached: Any) -> None:
        super().__init__()
        self.reached = reached

    def _on_rollout_start(self) -> None:
        self.reached.value = self.model._n_updates

    def _on_step(self) -> bool:
        return True


def train(setting: str, total_timesteps: int, folder: Path, started_at: Any, reached: Any) -> None:
    """
    What the README says: one script for the first start and for all others.

    :param started_at: Told the env steps and the updates that it starts with
    :param reached: Told the updates that it has made
    """
    # No checkpoint is ever found damaged, as each is written as a whole
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", "No episode ended")
    model = resume(folder, device="cpu") or start_afresh(setting)
    started_at[1] = model._n_updates
    started_at[0] = model.num_timesteps
    model.learn(
        total_timesteps - model.num_timesteps,
        reset_num_timesteps=False,
        callback=[Report(reached), ResumableCheckpointCallback(folder, save_freq=1, keep=3)],
    )


def newest_steps(folder: Path) -> int:
    names = sorted(path.name for path in folder.glob("checkpoint_*.zip"))
    return int(names[-1].split("_")[2]) if names else 0


def is_writing(folder: Path) -> bool:
    return any(folder.glob(".*.tmp"))


def freeze_while_writing(process: Any, folder: Path) -> None:
    """
    Stop a process during a write.

    A write takes milliseconds: a kill that is sent once a write is seen may come too late.
    """
    while True:
        while not is_writing(folder):
            assert process.is_alive(), "the training has failed"
        os.kill(process.pid, signal.SIGSTOP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), "the training has failed"
        if is_writing(folder):
            return
        os.kill(process.pid, signal.SIGCONT)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("n_kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_and_resumed(setting: str, n_kills: int, tmp_path: Path) -> None:
    # Imports what a first training imports: none of the processes has to
    start_afresh(setting).learn(100)
    rng = np.random.default_rng(0)
    started_at = CONTEXT.Array("q", 2, lock=False)
    reached = CONTEXT.Value("q", 0, lock=False)
    lost_updates: list[int] = []
    n_killed_while_writing = 0

    def start(total_timesteps: int) -> Any:
        started_at[0] = NOT_STARTED
        process = CONTEXT.Process(target=train, args=(setting, total_timesteps, tmp_path, started_at, reached))
        process.start()
        return process

    def check_start(newest: int, reached_before: int) -> None:
        if started_at[0] == NOT_STARTED:
            return
        assert started_at[0] == newest
        # A checkpoint is written after each update, so no more than that one can be lost
        lost_updates.append(reached_before - started_at[1])
        assert lost_updates[-1] in (0, 1)

    for kill in range(n_kills):
        before = newest_steps(tmp_path), reached.value
        # Without an end, so that no machine is fast enough to reach it
        process = start(10**9)
        if kill % 3 == 0:
            # However slow the machine is, there is something to lose
            while newest_steps(tmp_path) <= before[0]:
                assert process.is_alive(), "the training has failed"
                time.sleep(0.001)
        time.sleep(float(rng.uniform(0.0, 0.1)))
        if kill % 3 == 1:
            freeze_while_writing(process, tmp_path)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the training has failed"
        check_start(*before)
        n_killed_while_writing += is_writing(tmp_path)
        # A folder that changes while it is listed may show more
        assert len(list(tmp_path.glob("checkpoint_*.zip"))) <= 4, "the last 3, and one more until the oldest is deleted"
    assert n_killed_while_writing >= n_kills // 3

    before = newest_steps(tmp_path), reached.value
    total_timesteps = before[0] + 500
    process = start(total_timesteps)
    process.join()
    assert process.exitcode == 0
    check_start(*before)
    assert not is_writing(tmp_path)
    resumed = resume(tmp_path, device="cpu")
    assert resumed is not None

    print(
        f"{n_kills} kills, {n_killed_while_writing} while a checkpoint was being written: {resumed._n_updates} updates made, "
        f"{sum(lost_updates)} of them twice"
    )
    assert_same(state_seeded(resumed), state_seeded(start_afresh(setting).learn(total_timesteps)))
