"""
One cell of the grid (algorithm x environment x seed): its settings, its run folder, and what was measured in it.

A finished cell is kept: its run folder stands for the training as long as the settings stay the same.
"""

import functools
import hashlib
import json
import math
import os
import shutil
import socket
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import sb3_episodic_a2c
from sb3_episodic_a2c.tools.entries import evaluation_seed
from sb3_episodic_a2c.tools.zoo import evaluation_env_kwargs

CELL_FILE = "cell.json"
"""The settings and what was measured, beside the files of the Zoo. A run folder that has it is complete."""

UNFINISHED_FOLDER = ".unfinished"
"""Where run folders are until they are complete."""

GRID_MULTIPLES = (960, 240)
"""
Evaluations are at multiples of the first of these that fits between two of them. 1 to 6, 8, 10, 12, 15, 16, 20, 24 and 30
environments reach every multiple exactly; 32 and 64 reach those of the larger one.
"""


def evaluation_grid(total_timesteps: int, n_evaluations: int) -> list[int]:
    """
    When to evaluate: before training, then at ``n_evaluations`` points, the last of which is the budget.

    The points depend on the budget only, not on the algorithms. So adding an algorithm invalidates nothing while the budget
    stays. The points in between are rounded down to multiples of one of :data:`GRID_MULTIPLES`, which most numbers of
    environments reach exactly. Where a number does not, the evaluation is at the first step beyond, and both steps are kept.

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
    """Name of its row in the report."""
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
    vectorization: str = "dummy"
    """Of the training environments, see :func:`sb3_episodic_a2c.tools.vectorization.make_vec_env`."""

    def __str__(self) -> str:
        return f"{self.label} on {self.env_id}, seed {self.seed}"

    @property
    def log_folder(self) -> Path:
        """What RL Zoo calls the log folder (``--folder`` of its scripts)."""
        return self.output if self.label == self.algorithm else self.output / self.label

    @property
    def folder(self) -> Path:
        """The run folder. The Zoo numbers run folders from 1."""
        return self.log_folder / self.algorithm / f"{self.env_id.replace('/', '-')}_{self.seed + 1}"

    @property
    def is_there(self) -> bool:
        """Whether a comparison has left its run folder, with whatever settings."""
        return (self.folder / CELL_FILE).is_file()

    @property
    def unfinished_name(self) -> str:
        """The last part of its folder's name in :data:`UNFINISHED_FOLDER`, whichever process trains it."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:12]

    @property
    def was_being_trained(self) -> bool:
        """Whether a process has begun to train it and has not finished."""
        return any((self.output / UNFINISHED_FOLDER).glob(f"*.{self.unfinished_name}"))

    @property
    def n_envs(self) -> int:
        return int(self.hyperparams.get("n_envs", 1))

    @property
    def eval_seed(self) -> int:
        """Environment seed of the first evaluation episode; the next seeds follow. Two trainings share none."""
        return evaluation_seed(self.seed, self.eval_episodes)

    @property
    def eval_env_kwargs(self) -> dict[str, Any]:
        """The arguments that the environment is made with for evaluations."""
        return evaluation_env_kwargs(self.env_id, self.hyperparams)

    @property
    def settings(self) -> dict[str, Any]:
        """What must be equal in a finished cell to use it for this one, as JSON returns it."""
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
        if self.vectorization != "dummy":
            # Left out otherwise, as finished cells of older versions have no such entry
            settings["vectorization"] = self.vectorization
        # Hyperparameters from a .py config can be any object, e.g. a class
        return json.loads(json.dumps(settings, default=str, sort_keys=True))


@dataclass
class CellResult:
    """What was measured while a cell was trained. Lists have one entry an evaluation, shape ``(n_evaluations + 1,)``."""

    grid: list[int]
    """Env steps at which an evaluation was planned."""
    timesteps: list[int]
    """Env steps at which it took place."""
    rewards: np.ndarray
    """Shape ``(n_evaluations + 1, eval_episodes)``"""
    episode_lengths: np.ndarray
    """Shape ``(n_evaluations + 1, eval_episodes)``"""
    train_seconds: list[float]
    """Wall time of the training up to the evaluation, without evaluations."""
    train_cpu_seconds: list[float]
    """Processor time of the same."""
    eval_seconds: float
    """Wall time of all evaluations."""
    versions: dict[str, str]
    machine: str
    code: str = "unknown"
    """See :func:`code_hash`."""
    started: float = math.nan
    """Time of the clock at its start, in seconds since the epoch."""
    ended: float = math.nan


# ------------------------------------------------------------------ groups of cells


def seeds_by_env(cells: Sequence[Cell]) -> dict[str, list[int]]:
    """Environment: the seeds, which are the same for all algorithms."""
    seeds: dict[str, dict[int, None]] = {}
    for cell in cells:
        seeds.setdefault(cell.env_id, {})[cell.seed] = None
    return {env_id: list(env_seeds) for env_id, env_seeds in seeds.items()}


def one_per_pair(cells: Sequence[Cell]) -> list[Cell]:
    """One cell for each environment and algorithm, as all its seeds share their hyperparameters."""
    return list({(cell.env_id, cell.label): cell for cell in cells}.values())


def finished_results(cells: Sequence[Cell]) -> dict[Cell, CellResult]:
    """Cell: its result, for all that are finished."""
    results = {}
    for cell in cells:
        # A cell that failed may have an old run folder with other settings
        with suppress(ValueError):
            result = load_cell(cell)
            if result is not None:
                results[cell] = result
    return results


# ------------------------------------------------------------------ finished cells


def load_cell(cell: Cell) -> CellResult | None:
    """
    :param cell: The cell
    :return: What its run folder holds; None if the folder is missing or damaged
    :raises ValueError: There is a run folder which this comparison did not write, or wrote with other settings
    """
    if not cell.folder.exists():
        return None
    if not cell.is_there:
        raise ValueError(
            f"`output`: {cell.folder} exists already, but not from a comparison, so it is not overwritten. "
            "Give another output folder, or move this one away."
        )
    try:
        record = json.loads((cell.folder / CELL_FILE).read_text())
        with np.load(cell.folder / "evaluations.npz") as evaluations:
            rewards, lengths = evaluations["results"], evaluations["ep_lengths"]
        settings, measured = record["settings"], record["measured"]
        result = CellResult(rewards=rewards, episode_lengths=lengths, **measured)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        # E.g. the machine crashed before all of it was on the disk
        return None
    if settings != cell.settings:
        raise ValueError(_difference(cell, settings))
    return result


def _difference(cell: Cell, settings: dict[str, Any]) -> str:
    there, asked = _flat(settings), _flat(cell.settings)
    names = [name for name in sorted(there.keys() | asked.keys()) if there.get(name) != asked.get(name)]
    budget = ""
    if "total_timesteps" in names:
        # The default budget is the smallest of all algorithms, so adding an algorithm may change it
        budget = f"--total-timesteps {cell.env_id}:{there.get('total_timesteps')} to go on with that budget, "
    changes = ", ".join(f"{name}={there.get(name)!r} there and {asked.get(name)!r} here" for name in names)
    return (
        f"`output`: {cell.folder} was trained with other settings: {changes}. The results must not be mixed. "
        f"Give {budget}another folder, or --retrain to train such cells again and lose the old ones."
    )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in settings.items() if name != "hyperparams"}, **settings.get("hyperparams", {})}


def is_finished(cell: Cell, retrain: bool = False) -> bool:
    """
    :param cell: The cell
    :param retrain: Whether a run folder with other settings counts as missing, instead of being an error
    :return: Whether its run folder is there and complete
    :raises ValueError: See :func:`load_cell`
    """
    try:
        return load_cell(cell) is not None
    except ValueError:
        if retrain and cell.is_there:
            return False
        raise


def remove_leftovers(output: Path) -> None:
    """Delete unfinished run folders of processes of this machine that are gone."""
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
        # It exists, but belongs to another user
        pass
    return True


# ------------------------------------------------------------------ which code trains


@functools.cache
def code_hash() -> str:
    """Hash of all modules of this package: while they are being edited, the version alone does not identify the code."""
    package = Path(sb3_episodic_a2c.__file__).parent
    code = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return code.hexdigest()[:12]
