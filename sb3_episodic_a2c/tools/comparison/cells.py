"""
One training of a comparison: a cell of the grid (algorithm x environment x seed).

A cell is trained by RL Zoo's ``ExperimentManager``, so an algorithm gets exactly what the Zoo would give it, and leaves an
ordinary run folder of the Zoo. :func:`train_cell` is what the workers run; it shares nothing with the process that asks for it
but the disk.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import socket
import threading
import time
import traceback
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback

import sb3_episodic_a2c
from sb3_episodic_a2c import MaskableEpisodicA2C
from sb3_episodic_a2c.files import atomic_write
from sb3_episodic_a2c.tools.zoo import algorithms, experiment_manager_class, register

CELL_FILE = "cell.json"
"""Beside what the Zoo writes: what was trained, and what was measured. A run folder that has it is complete."""

UNFINISHED_FOLDER = ".unfinished"
"""Where run folders are until they are complete."""

GRID_MULTIPLES = (960, 240)
"""
Evaluations are at multiples of the first of these for which there is room: 1 to 6, 8, 10, 12, 15, 16, 20, 24, 30 environments
meet them, and with the larger one 32 and 64, too.
"""

EVAL_SEED = 1_000_000
"""Evaluation episodes of a training with seed 0 start from here, so that none starts as a training episode did."""

TRAINING_ONLY = ("max_episode_steps",)
"""Entries of ``env_kwargs`` that an algorithm may train with, while all are evaluated without."""

PACKAGES = ("sb3_episodic_a2c", "stable_baselines3", "sb3_contrib", "rl_zoo3", "gymnasium", "torch", "numpy")

_one_at_a_time = threading.Lock()
"""Trainings share torch's and NumPy's random states: a Dask worker with several threads must not mix them."""


def evaluation_grid(total_timesteps: int, n_evaluations: int) -> list[int]:
    """
    When to evaluate: before training, then at ``n_evaluations`` points, the last of which is the budget.

    It depends on the budget only, not on the algorithms that are compared, so that adding one invalidates nothing while the
    budget stays. The points between are rounded down to multiples of one of :data:`GRID_MULTIPLES`, which most numbers of
    environments meet exactly. Where one does not, the evaluation is at the first step beyond; both numbers are kept.

    :param total_timesteps: Budget, in env steps
    :param n_evaluations: Number of points after the start
    :return: ``n_evaluations + 1`` numbers of env steps, from 0 to ``total_timesteps``
    """
    multiple = next((multiple for multiple in GRID_MULTIPLES if total_timesteps // n_evaluations >= multiple), 1)
    points = [total_timesteps * index // n_evaluations // multiple * multiple for index in range(n_evaluations)]
    return [*points, total_timesteps]


@dataclass(frozen=True)
class Cell:
    """One training, and all that decides its result."""

    label: str
    """What its row is called."""
    algorithm: str
    """Id in the Zoo."""
    env_id: str
    seed: int
    hyperparams: dict[str, Any] = field(hash=False)
    """As the Zoo reads them from a config."""
    total_timesteps: int
    n_evaluations: int
    eval_episodes: int
    output: Path
    gym_packages: tuple[str, ...] = ()
    """Modules that register environments."""
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.label} on {self.env_id}, seed {self.seed}"

    @property
    def log_folder(self) -> Path:
        """What RL Zoo calls the log folder (``--folder`` of its scripts)."""
        return self.output if self.label == self.algorithm else self.output / self.label

    @property
    def folder(self) -> Path:
        """The run folder. The Zoo numbers them from 1."""
        return self.log_folder / self.algorithm / f"{self.env_id.replace('/', '-')}_{self.seed + 1}"

    @property
    def is_there(self) -> bool:
        """Whether a comparison has left its run folder, with whatever settings."""
        return (self.folder / CELL_FILE).is_file()

    @property
    def _unfinished_name(self) -> str:
        return hashlib.sha256(str(self).encode()).hexdigest()[:12]

    @property
    def was_being_trained(self) -> bool:
        """Whether some process has begun to train it, and has not finished."""
        return any((self.output / UNFINISHED_FOLDER).glob(f"*.{self._unfinished_name}"))

    @property
    def n_envs(self) -> int:
        return int(self.hyperparams.get("n_envs", 1))

    @property
    def eval_seed(self) -> int:
        """Environment seed of the first evaluation episode; the others follow. Trainings share none."""
        # Modulo NumPy's 32 bits
        return (EVAL_SEED + self.seed * self.eval_episodes) % (2**32 - self.eval_episodes)

    @property
    def eval_env_kwargs(self) -> dict[str, Any]:
        """What the environment is made with for evaluations."""
        env_kwargs = self.hyperparams.get("env_kwargs") or {}
        return {name: value for name, value in env_kwargs.items() if name not in TRAINING_ONLY}

    @property
    def settings(self) -> dict[str, Any]:
        """What a finished cell must agree in to stand for this one, as JSON gives it back."""
        settings = {
            "label": self.label,
            "algorithm": self.algorithm,
            "env_id": self.env_id,
            "seed": self.seed,
            "hyperparams": self.hyperparams,
            "total_timesteps": self.total_timesteps,
            "n_evaluations": self.n_evaluations,
            "eval_episodes": self.eval_episodes,
            "eval_seed": self.eval_seed,
            "device": self.device,
        }
        # Hyperparameters from a .py config can be anything, e.g. classes
        return json.loads(json.dumps(settings, default=str, sort_keys=True))


@dataclass
class CellResult:
    """What was measured while a cell was trained. Lists have one entry an evaluation, shape ``(n_evaluations + 1,)``."""

    grid: list[int]
    """Env steps at which it was to be evaluated."""
    timesteps: list[int]
    """Env steps at which it was."""
    rewards: np.ndarray
    """Shape ``(n_evaluations + 1, eval_episodes)``"""
    episode_lengths: np.ndarray
    """Shape ``(n_evaluations + 1, eval_episodes)``"""
    train_seconds: list[float]
    """Wall time of the training up to then, without evaluations."""
    train_cpu_seconds: list[float]
    """Processor time of the same."""
    eval_seconds: float
    """Wall time of all evaluations."""
    versions: dict[str, str]
    machine: str
    code: str = "unknown"
    """Hash of this package's modules."""
    started: float = math.nan
    """Time of the clock (seconds since the epoch) when it was begun."""
    ended: float = math.nan


# ------------------------------------------------------------------ finished cells


def load_cell(cell: Cell) -> CellResult | None:
    """
    :param cell: The cell
    :return: What its run folder holds; None if there is none, or if it is damaged
    :raises ValueError: There is a run folder which this comparison did not write, or wrote with other settings
    """
    if not cell.folder.exists():
        return None
    if not cell.is_there:
        raise ValueError(
            f"`output`: {cell.folder} is there already, but not from a comparison. Give another folder, or move that one away."
        )
    try:
        record = json.loads((cell.folder / CELL_FILE).read_text())
        with np.load(cell.folder / "evaluations.npz") as evaluations:
            rewards, lengths = evaluations["results"], evaluations["ep_lengths"]
        settings, measured = record["settings"], record["measured"]
        result = CellResult(rewards=rewards, episode_lengths=lengths, **measured)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        # E.g. the machine went down before the disk had it all
        return None
    if settings != cell.settings:
        raise ValueError(_difference(cell, settings))
    return result


def _difference(cell: Cell, settings: dict[str, Any]) -> str:
    there, asked = _flat(settings), _flat(cell.settings)
    names = [name for name in sorted(there.keys() | asked.keys()) if there.get(name) != asked.get(name)]
    budget = ""
    if "total_timesteps" in names:
        # The default one is the smallest of the algorithms', so that one more of them may change it
        budget = f"--total-timesteps {cell.env_id}:{there.get('total_timesteps')} to go on with that budget, "
    changes = ", ".join(f"{name}={there.get(name)!r} there and {asked.get(name)!r} here" for name in names)
    return (
        f"`output`: {cell.folder} was trained with other settings: {changes}. Results of both must not be mixed: "
        f"give {budget}another folder, or --retrain to train such cells again and lose the old ones."
    )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in settings.items() if name != "hyperparams"}, **settings.get("hyperparams", {})}


def is_finished(cell: Cell, retrain: bool = False) -> bool:
    """
    :param cell: The cell
    :param retrain: Whether one with other settings is none, instead of an error
    :return: Whether its run folder is there and whole
    :raises ValueError: See :func:`load_cell`
    """
    try:
        return load_cell(cell) is not None
    except ValueError:
        if retrain and cell.is_there:
            return False
        raise


def remove_leftovers(output: Path) -> None:
    """Delete what processes of this machine have left unfinished that are no longer there."""
    for folder in (output / UNFINISHED_FOLDER).glob("*"):
        host, _, pid = folder.name.rpartition(".")[0].rpartition(".")
        if host == socket.gethostname() and pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


# ------------------------------------------------------------------ training


class _EvalOnGrid(EvalCallback):
    """
    Evaluates at the points of a grid, always on the same episodes, and stops training at its last point.

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
    pass


def _exit_if_orphaned() -> None:
    """A worker of joblib's does not see that the command was killed, and would slow down the next one."""
    # Not what os.getppid() said on import: that takes seconds, in which the command may be killed, too
    parent = multiprocessing.parent_process()
    is_worker = multiprocessing.current_process().name.startswith("LokyProcess")
    if is_worker and parent is not None and parent.pid != os.getppid():
        os._exit(1)


def train_cell(cell: Cell, retrain: bool = False) -> str | None:
    """
    Train a cell, unless it is there already. Its run folder appears complete or not at all.

    :param cell: The cell
    :param retrain: Whether it takes the place of one with other settings, which is kept until then
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


def _train(cell: Cell, retrain: bool) -> None:
    unfinished = cell.output / UNFINISHED_FOLDER / f"{socket.gethostname()}.{os.getpid()}.{cell._unfinished_name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    started, code = time.time(), code_hash()
    try:
        with open(unfinished / "train.log", "w") as log, _quiet(log), _one_torch_thread():
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
    # Damaged, or of other settings, or nobody would be training it
    if cell.is_there and not is_finished(cell, retrain):
        old = run_folder.parent / "old"
        os.rename(cell.folder, old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        os.rename(run_folder, cell.folder)
    except OSError:
        # Another process was faster: a worker of a command that was killed, say
        if not is_finished(cell, retrain):
            raise


def _make_manager(cell: Cell, log_folder: Path) -> tuple[Any, BaseAlgorithm, Any]:
    """The Zoo's manager for a cell, with our evaluations in the place of its own; the model; the callback that evaluates."""
    manager_class = experiment_manager_class()
    callbacks: list[Any] = []

    class CellManager(manager_class):  # type: ignore[misc, valid-type]
        def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
            # Copies: the Zoo deletes entries, and A2C writes into `policy_kwargs`
            saved_hyperparams = OrderedDict(sorted(copy.deepcopy(cell.hyperparams).items()))
            return copy.deepcopy(cell.hyperparams), saved_hyperparams

        def create_callbacks(self) -> None:
            self.eval_env_kwargs = copy.deepcopy(cell.eval_env_kwargs)
            is_masked = issubclass(algorithms()[cell.algorithm], MaskableEpisodicA2C)
            callback = (_MaskableEvalOnGrid if is_masked else _EvalOnGrid)(
                # An environment for each episode: all start from a seed, and side by side they take less time
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
        # What the Zoo writes down as the command's arguments, and `enjoy` reads
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
        # Not by the manager, which takes Ctrl-C for an ordinary end. No logging, so no time spent on it
        model.learn(manager.n_timesteps, callback=manager.callbacks, log_interval=None)  # type: ignore[arg-type]  # SB3 allows it
    finally:
        assert model.env is not None
        model.env.close()
        callback.eval_env.close()
    if len(callback.train_seconds) < len(callback.grid):
        raise RuntimeError(
            f"Training ended at step {model.num_timesteps:,} of {manager.n_timesteps:,}, after {len(callback.train_seconds)} "
            f"of {len(callback.grid)} evaluations: does a callback in the hyperparameters stop it?"
        )
    if not np.isfinite(callback.evaluations_results).all():
        raise RuntimeError("An evaluation gave rewards that are NaN or infinite: nothing can be said of such a training.")
    manager.save_trained_model(model)


@contextlib.contextmanager
def _quiet(log: Any) -> Iterator[None]:
    """Into a file with what the Zoo prints, and with warnings."""
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log), warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    # As many threads everywhere as in a worker: sums in another order are other numbers
    n_threads = th.get_num_threads()
    th.set_num_threads(1)
    try:
        yield
    finally:
        th.set_num_threads(n_threads)


@functools.cache
def code_hash() -> str:
    """Which code of this package it is: versions do not tell, where one works on it."""
    package = Path(sb3_episodic_a2c.__file__).parent
    code = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return code.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Versions of the packages that decide the results."""
    modules = {name: importlib.import_module(name) for name in PACKAGES}
    return {**{name: str(module.__version__) for name, module in modules.items()}, "python": platform.python_version()}
