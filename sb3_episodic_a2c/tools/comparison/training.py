"""
How one cell is trained, in a worker process or machine.

RL Zoo's ``ExperimentManager`` trains it. So an algorithm gets exactly what the Zoo would give it, and leaves an ordinary run
folder of the Zoo. :func:`train_cell` is what the workers run: they share nothing but the disk with the process that started
them.
"""

import argparse
import contextlib
import copy
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import socket
import threading
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback

from sb3_episodic_a2c.guards.files import atomic_write
from sb3_episodic_a2c.tools.comparison.cells import (
    CELL_FILE,
    UNFINISHED_FOLDER,
    Cell,
    code_hash,
    evaluation_grid,
    is_finished,
)
from sb3_episodic_a2c.tools.versions import versions
from sb3_episodic_a2c.tools.zoo import asks_for_masks, experiment_manager_class, register

_one_at_a_time = threading.Lock()
"""Trainings share the random states of torch and NumPy, so the threads of a Dask worker must train one by one."""


def train_cell(cell: Cell, retrain: bool = False) -> str | None:
    """
    Train a cell, unless it is finished. Its run folder appears complete or not at all.

    :param cell: The cell
    :param retrain: Whether to replace a run folder with other settings, which is kept until the new one is complete
    :return: None, or the traceback of what went wrong
    """
    _exit_if_orphaned()
    with _one_at_a_time:
        try:
            for package in cell.gym_packages:
                importlib.import_module(package)
            if not is_finished(cell, retrain):
                _train(cell, retrain)
        except Exception:
            return traceback.format_exc()
    return None


def _exit_if_orphaned() -> None:
    """End a worker of joblib's whose command was killed: it does not notice, and would slow the next command down."""
    # What os.getppid() returned on import would not do: importing takes seconds, and the command may be killed meanwhile
    parent = multiprocessing.parent_process()
    is_worker = multiprocessing.current_process().name.startswith("LokyProcess")
    if is_worker and parent is not None and parent.pid != os.getppid():
        os._exit(1)


def _train(cell: Cell, retrain: bool) -> None:
    if cell.vectorization == "subproc" and multiprocessing.current_process().daemon:
        raise ValueError(
            "`vectorization` is 'subproc', but Dask's workers start no processes unless they are told to. Start them with "
            "DASK_DISTRIBUTED__WORKER__DAEMON=False in their environment, or use another vectorization."
        )
    unfinished = cell.output / UNFINISHED_FOLDER / f"{socket.gethostname()}.{os.getpid()}.{cell.unfinished_name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    started, code = time.time(), code_hash()
    try:
        with open(unfinished / "train.log", "w") as log, _output_to(log), _one_torch_thread():
            manager, model, callback = _make_manager(cell, unfinished)
            _run_manager(manager, model, callback)
        run_folder = Path(manager.save_path)
        os.replace(unfinished / "train.log", run_folder / "train.log")
        measured = {
            "grid": callback.grid,
            "timesteps": callback.evaluations_timesteps,
            "train_seconds": callback.train_seconds,
            "train_cpu_seconds": callback.train_cpu_seconds,
            "eval_seconds": callback.eval_seconds,
            "versions": versions(),
            "machine": f"{platform.platform()}, {socket.gethostname()}",
            "code": code,
            "started": started,
            "ended": time.time(),
        }
        with atomic_write(run_folder / CELL_FILE) as file:
            file.write(json.dumps({"settings": cell.settings, "measured": measured}, indent=2).encode() + b"\n")
        _put_in_place(run_folder, cell, retrain)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _put_in_place(run_folder: Path, cell: Cell, retrain: bool) -> None:
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    # The old folder is damaged or has other settings; otherwise this training would not have started
    if cell.is_there and not is_finished(cell, retrain):
        old = run_folder.parent / "old"
        os.rename(cell.folder, old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        os.rename(run_folder, cell.folder)
    except OSError:
        # Another process may have finished the cell first, e.g. a worker of a command that was killed
        if not is_finished(cell, retrain):
            raise


# ------------------------------------------------------------------ evaluations


class _EvalOnGrid(EvalCallback):
    """
    Evaluates at the points of a grid, always on the same episodes, and stops training at the last point.

    Times exclude the evaluations: the clock of the training stands still meanwhile.
    """

    def __init__(self, *args: Any, grid: list[int], eval_seed: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eval_freq = 1
        self.grid = grid
        self.eval_seed = eval_seed
        self.train_seconds: list[float] = []
        self.train_cpu_seconds: list[float] = []
        self.eval_seconds = 0.0

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._wall_start, self._cpu_start = time.perf_counter(), time.process_time()
        self._evaluate()

    def _on_step(self) -> bool:
        n_done = len(self.train_seconds)
        # ARS asks again after it was told to stop
        if n_done < len(self.grid) and self.num_timesteps >= self.grid[n_done]:
            return self._evaluate() and n_done + 1 < len(self.grid)
        return n_done < len(self.grid)

    def _evaluate(self) -> bool:
        wall, cpu = time.perf_counter(), time.process_time()
        _exit_if_orphaned()
        self.train_seconds.append(wall - self._wall_start)
        self.train_cpu_seconds.append(cpu - self._cpu_start)
        # The same first states at every evaluation, and for every algorithm
        self.eval_env.seed(self.eval_seed)
        continue_training = super()._on_step()
        wall_passed, cpu_passed = time.perf_counter() - wall, time.process_time() - cpu
        self.eval_seconds += wall_passed
        self._wall_start += wall_passed
        self._cpu_start += cpu_passed
        return continue_training


class _MaskableEvalOnGrid(_EvalOnGrid, MaskableEvalCallback):
    """The same for policies that need action masks."""


# ------------------------------------------------------------------ the Zoo's manager


def _make_manager(cell: Cell, log_folder: Path) -> tuple[Any, BaseAlgorithm, Any]:
    """
    :return: The Zoo's manager for a cell, which evaluates by our callback instead of its own; the model; the callback
    """
    manager_class: Any = experiment_manager_class()
    callbacks: list[Any] = []

    class CellManager(manager_class):
        vectorization = cell.vectorization

        def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
            # Copies: the Zoo deletes entries, and A2C writes into `policy_kwargs`
            saved_hyperparams = OrderedDict(sorted(copy.deepcopy(cell.hyperparams).items()))
            return copy.deepcopy(cell.hyperparams), saved_hyperparams

        def create_callbacks(self) -> None:
            self.eval_env_kwargs = copy.deepcopy(cell.eval_env_kwargs)
            callback = (_MaskableEvalOnGrid if asks_for_masks(cell.algorithm, cell.hyperparams) else _EvalOnGrid)(
                # One environment per episode: each starts from its own seed, and stepping them together takes less time
                self.create_envs(cell.eval_episodes, eval_env=True),
                best_model_save_path=self.save_path,
                n_eval_episodes=cell.eval_episodes,
                log_path=self.save_path,
                deterministic=True,
                verbose=0,
                grid=evaluation_grid(cell.total_timesteps, cell.n_evaluations),
                eval_seed=cell.eval_seed,
            )
            self.callbacks.append(callback)
            callbacks.append(callback)

    register()
    manager = CellManager(
        # The Zoo saves these as the command's arguments, and `enjoy` reads them
        argparse.Namespace(
            algo=cell.algorithm,
            env=cell.env_id,
            seed=cell.seed,
            n_timesteps=cell.total_timesteps,
            eval_episodes=cell.eval_episodes,
            env_kwargs=None,
            eval_env_kwargs=None,
            device=cell.device,
        ),
        cell.algorithm,
        cell.env_id,
        str(log_folder),
        n_timesteps=cell.total_timesteps,
        n_eval_episodes=cell.eval_episodes,
        n_eval_envs=cell.eval_episodes,
        seed=cell.seed,
        verbose=0,
        device=cell.device,
    )
    results = manager.setup_experiment()
    assert results is not None
    (callback,) = callbacks
    return manager, results[0], callback


def _run_manager(manager: Any, model: BaseAlgorithm, callback: Any) -> None:
    try:
        # Not by the manager, which takes Ctrl-C for an ordinary end. No logging, so that it takes no time
        model.learn(manager.n_timesteps, callback=manager.callbacks, log_interval=None)  # type: ignore[arg-type]  # SB3 allows None
    finally:
        assert model.env is not None
        model.env.close()
        callback.eval_env.close()
    if len(callback.train_seconds) < len(callback.grid):
        raise RuntimeError(
            f"Training ended at step {model.num_timesteps:,} of {manager.n_timesteps:,}, after {len(callback.train_seconds)} "
            f"of {len(callback.grid)} evaluations. Remove the `callback` from the hyperparameters if it stops the training."
        )
    if not np.isfinite(callback.evaluations_results).all():
        raise RuntimeError(
            "An evaluation gave rewards that are NaN or infinite, so this training cannot be compared. Fix the environment."
        )
    manager.save_trained_model(model)


@contextlib.contextmanager
def _output_to(log: Any) -> Iterator[None]:
    """Write to a file what the Zoo prints and warns."""
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log), warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    # As in a worker, whatever the backend: another number of threads adds in another order, which rounds differently
    n_threads = th.get_num_threads()
    th.set_num_threads(1)
    try:
        yield
    finally:
        th.set_num_threads(n_threads)
