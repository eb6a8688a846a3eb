"""The output folder of a run of ``solve``: who may write to it, and how a run that was stopped goes on."""

import contextlib
import itertools
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from stable_baselines3.common.monitor import get_monitor_files
from stable_baselines3.common.vec_env import VecEnv

from sb3_episodic_a2c import EpisodicA2C, resume
from sb3_episodic_a2c.guards.files import atomic_write
from sb3_episodic_a2c.tools.zoo import DEFAULT_ALGORITHM

try:
    import fcntl
except ImportError:
    # Windows, where two processes that write to one folder go unnoticed
    fcntl = None  # type: ignore[assignment]  # mypy does not allow None for a module

CHECKPOINTS = "checkpoints"
"""Folder in the output folder of a run, as long as the run is not finished."""

MODEL = "model.zip"

STATISTICS = "vecnormalize.pkl"
"""Of ``VecNormalize``, where the entry normalises."""

REMOVED = f".{CHECKPOINTS}.done"
"""Its name while it is removed at the end."""


def open_folder(settings: dict[str, Any], output: str | Path | None, fresh: bool) -> tuple[Path, IO[str]]:
    """
    Choose the output folder, a new one or that of an unfinished run of the same settings.

    :return: The folder, and a file that locks it for other processes until it is closed or this process ends
    :raises ValueError: ``output`` cannot be used
    """
    if output is not None:
        return Path(output), _claim(Path(output), settings, fresh)
    # The default algorithm goes without saying
    names = [settings[name] for name in ("env_id", "algorithm", "preset") if settings[name] != DEFAULT_ALGORITHM]
    name = "-".join([*names, f"seed{settings['seed']}"]).replace("/", "-")
    for number in itertools.count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not (fresh and folder.exists()):
            with contextlib.suppress(ValueError):
                return folder, _claim(folder, settings, fresh)
    raise AssertionError("there is always another number")


def _claim(folder: Path, settings: dict[str, Any], fresh: bool) -> IO[str]:
    """See :func:`open_folder`. A run is unfinished as long as the file with its lock exists."""
    # A run that was killed at its very end has left this
    shutil.rmtree(folder / REMOVED, ignore_errors=True)
    lock = _lock(folder, fresh)
    try:
        lock.seek(0)
        started_with = json.loads(lock.read() or "{}")
        if not started_with:
            # Checked again under the lock, as another process may have changed the folder before
            _check_unused(folder, fresh)
        elif not fresh and started_with != settings:
            raise ValueError(
                f"`output` {folder} holds an unfinished run with {started_with}, which cannot go on with {settings}. "
                "Give another folder, or start anew with `fresh` (--fresh), which deletes that run."
            )
        if fresh:
            for path in _files_of_training(folder):
                path.unlink()
        if fresh or not started_with:
            lock.truncate(0)
            json.dump(settings, lock)
            lock.flush()
    except BaseException:
        lock.close()
        raise
    return lock


def _lock(folder: Path, fresh: bool) -> IO[str]:
    """
    :return: The file with the settings of the folder's unfinished run, locked; a new, empty one if there is no such run
    :raises ValueError: Another process has locked it, or the folder holds other files
    """
    path = folder / CHECKPOINTS / "settings.json"
    while True:
        if not path.exists():
            _check_unused(folder, fresh)
            path.parent.mkdir(parents=True, exist_ok=True)
        # If the file is missing from here on, its run has just finished and removed it: look again
        with contextlib.ExitStack() as stack, contextlib.suppress(FileNotFoundError):
            lock = stack.enter_context(open(path, "a+"))
            try:
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"`output` {folder} belongs to a run that is not over yet. Give another folder.") from error
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                stack.pop_all()
                return lock


def _check_unused(folder: Path, fresh: bool) -> None:
    """
    Check a folder without an unfinished run.

    :raises ValueError: A new run would overwrite something in it
    """
    if (folder / MODEL).exists():
        raise ValueError(f"`output` {folder} holds a model already, which would be lost. Give another folder.")
    paths = _files_of_training(folder)
    if paths and not fresh:
        raise ValueError(
            f"`output` {folder} holds files of another training, e.g. {paths[0].relative_to(folder)}. Give another folder, or "
            "`fresh` (--fresh), which deletes them."
        )


def _files_of_training(folder: Path) -> list[Path]:
    # An agent would be evaluated with statistics that a run of other hyperparameters has left
    return [*checkpoints_in(folder), *folder.glob("*.monitor.csv"), *folder.glob(STATISTICS)]


def checkpoints_in(folder: Path) -> list[Path]:
    """:return: The checkpoints of an unfinished run, which may not have come to one yet"""
    return list((folder / CHECKPOINTS).glob("*.zip"))


@contextlib.contextmanager
def discarded_without_a_model(folder: Path) -> Iterator[None]:
    """A run that ends with an error before it has saved anything leaves nothing in its folder."""
    try:
        yield
    except BaseException:
        if not (folder / MODEL).exists() and not checkpoints_in(folder):
            for path in _files_of_training(folder):
                path.unlink()
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            # Only if there is nothing of the user's
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def resume_run(folder: Path, make_env: Callable[[int], VecEnv], device: str) -> EpisodicA2C | None:
    """
    :param make_env: Makes the environments if the checkpoint does not hold them, given the number of their first log
    :return: The model of an unfinished run as it was at its newest checkpoint; None if there is no checkpoint yet
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* holds no environments")
        model = resume(folder / CHECKPOINTS, device=device)
    if model is not None and model.env is None:
        assert model.ep_info_buffer is not None
        n_logs = _cut_logs(folder, list(model.ep_info_buffer))
        model = resume(folder / CHECKPOINTS, make_env(n_logs), device=device)
    return model


def _cut_logs(folder: Path, last_episodes: list[dict[str, Any]]) -> int:
    """
    Keep only the first episodes in the ``*.monitor.csv``: the episodes after the checkpoint will be played again, differently.

    :param last_episodes: The last that the checkpoint knows, as ``Monitor`` gave them. Not their number: wrappers may end an
        episode early, e.g. at the loss of a life, which is no row of the log
    :return: Number of logs
    """
    logs = {Path(name): _read_log(Path(name)) for name in get_monitor_files(str(folder))}
    # When each episode ended: the start of the log plus the last of "r,l,t"
    times = {
        path: [json.loads(header[1:])["t_start"] + float(row.split(",")[2]) for row in rows]
        for path, (header, _, *rows) in logs.items()
    }
    known = {(str(episode["l"]), str(episode["t"])) for episode in last_episodes}
    last_time = max(
        (
            time
            for path, (_, _, *rows) in logs.items()
            for row, time in zip(rows, times[path], strict=True)
            if tuple(row.rstrip().split(",")[1:3]) in known
        ),
        default=-math.inf,
    )
    for path, lines in logs.items():
        n_kept = sum(time <= last_time for time in times[path])
        with atomic_write(path) as file:
            file.write("".join(lines[: 2 + n_kept]).encode())
    return len(logs)


def _read_log(path: Path) -> list[str]:
    """The lines of a ``*.monitor.csv``, first the two of its head, without lines that a crash has cut short."""
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if len(lines) < 2:
        # Not even the head is whole, so there is no episode
        return [f'#{{"t_start": {time.time()}}}\n', "r,l,t\n"]
    return lines[:2] + [row for row in lines[2:] if row.count(",") >= 2]


def finish(folder: Path) -> None:
    """The run is finished, and must not go on from a checkpoint."""
    # Renaming does that at once: a kill may come while the files are removed
    os.replace(folder / CHECKPOINTS, folder / REMOVED)
    shutil.rmtree(folder / REMOVED, ignore_errors=True)
