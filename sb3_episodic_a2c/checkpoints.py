"""Checkpoints from which training goes on exactly as if it had never been stopped."""

import copyreg
import csv
import inspect
import io
import json
import pickle
import random
import re
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import torch as th
from gymnasium.utils import EzPickle
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnvWrapper

from sb3_episodic_a2c.episodic_a2c import EpisodicA2C
from sb3_episodic_a2c.guards.files import atomic_write

TRAINING_MEMBER = "resume/training.pkl"
"""Member of the zip with what SB3's save leaves out and every environment can go on with."""
EPISODES_MEMBER = "resume/episodes.pkl"
"""Member of the zip with the environments and their episodes in flight. Missing where they cannot be pickled."""

STATISTICS = ("obs_rms", "ret_rms")
"""What VecNormalize has learnt."""


def save_checkpoint(model: EpisodicA2C, path: str | Path) -> None:
    """
    Write all that the future of a training depends on, as a file that is there whole or not at all.

    It is the zip of ``model.save`` with two more members, so ``EpisodicA2C.load`` reads it as well: the random states of
    Python, NumPy, torch and the actor, and the environments with their wrappers and their unfinished episodes. Those that
    cannot be pickled (in processes of their own, with C++ objects or open windows) are left out, with a warning.

    Call it between two calls of ``learn``, or in a callback's ``_on_rollout_start``; in the midst of a rollout the step being
    made would be lost.

    :param model: The model
    :param path: Where to write it; ``.zip`` is added if there is no suffix
    :raises OSError: The disk is full, or the folder cannot be written to. A file that was there before is unharmed
    """
    reason = _write(model, Path(path))
    if reason is not None:
        _warn_of_fresh_episodes(reason)


def _warn_of_fresh_episodes(reason: str) -> None:
    warnings.warn(
        f"The environments cannot be part of the checkpoint ({reason}). All else is: training will go on from it with fresh "
        "episodes, in environments that you give to `resume` or `load_checkpoint` as `env`.",
        UserWarning,
        stacklevel=3,
    )


def _with_suffix(path: Path) -> Path:
    return path if path.suffix else Path(f"{path}.zip")


def _write(model: EpisodicA2C, path: Path) -> str | None:
    """Write a checkpoint. Returns why the environments are not part of it, or None if they are."""
    vec_normalize = model.get_vec_normalize_env()
    training = {
        "algorithm": type(model),
        "random_states": _get_random_states(model),
        "vec_normalize": vec_normalize and {name: getattr(vec_normalize, name, None) for name in STATISTICS},
    }
    episodes, reason = None, None
    if model.env is not None:
        try:
            names = ["env", "observation_space", "action_space", *model._in_flight_params()]
            episodes = _pickle({name: getattr(model, name) for name in names}, model.device)
        except Exception as error:
            # Whatever the pickling of somebody's environment may raise
            reason = f"{type(error).__name__}: {error}"
    try:
        with atomic_write(_with_suffix(path)) as file:
            model.save(file)  # type: ignore[arg-type]  # BinaryIO is one for all that SB3 does
            with zipfile.ZipFile(file, mode="a") as archive:
                archive.writestr(TRAINING_MEMBER, _pickle(training, model.device))
                if episodes is not None:
                    archive.writestr(EPISODES_MEMBER, episodes)
    except OSError as error:
        raise OSError(
            error.errno,
            f"The checkpoint could not be written ({error.strerror}). The model and earlier checkpoints are unharmed",
            str(path),
        ) from error
    return reason


def load_checkpoint(
    path: str | Path, env: GymEnv | None = None, device: th.device | str = "auto", **kwargs: Any
) -> EpisodicA2C:
    """
    Load what :func:`save_checkpoint` wrote, and put the random states of Python, NumPy and torch back.

    ``model.learn(total_timesteps - model.num_timesteps, reset_num_timesteps=False)`` then goes on as the training that it was
    taken from would have: bit for bit, on the same machine and versions.

    Loading executes code from the file, as all unpickling does: load none that you do not trust.

    :param path: The file, with or without its ``.zip``
    :param env: Environments to go on with instead of those in the checkpoint. They get its ``VecNormalize`` statistics, and
        start with fresh episodes
    :param device: Device on which the model should be
    :param kwargs: Further arguments of ``EpisodicA2C.load``
    :return: The model, of the class that was saved
    :raises ValueError: The file is damaged or no checkpoint, or the spaces of ``env`` are not those of the model
    """
    path = Path(path)
    if not path.exists():
        path = _with_suffix(path)
    members = _read(path)
    device = get_device(device)
    training = _unpickle(members[TRAINING_MEMBER], device)
    model = training["algorithm"].load(path, env=env, device=device, **kwargs)
    if env is not None:
        _prepare(model, training)
    elif EPISODES_MEMBER in members:
        episodes = _unpickle(members[EPISODES_MEMBER], device)
        model.set_env(episodes.pop("env"), force_reset=False)
        for name, value in episodes.items():
            setattr(model, name, value)
        model.rollout_buffer.device = model.device
    else:
        model._last_obs = None
        warnings.warn(f"{path} holds no environments: pass `env` to train on, with fresh episodes.", UserWarning, stacklevel=2)
    _set_random_states(model, training["random_states"])
    return model


def _prepare(model: EpisodicA2C, training: dict[str, Any]) -> None:
    """Make other environments ready to go on with."""
    vec_normalize, statistics = model.get_vec_normalize_env(), training["vec_normalize"]
    if (vec_normalize is None) != (statistics is None):
        raise ValueError(
            f"`env` is {'not ' if vec_normalize is None else ''}wrapped in VecNormalize, the environments of the checkpoint "
            f"were{'' if vec_normalize is None else ' not'}: the model would see other numbers than it was trained on."
        )
    for name, value in (statistics or {}).items():
        setattr(vec_normalize, name, value)
    if model.seed is not None:
        # Loading has seeded them as the first time: every resumed training would play the very same episodes again
        seed = np.random.SeedSequence([model.seed, model.num_timesteps]).generate_state(1)[0]
        assert model.env is not None
        model.env.seed(int(seed) // 2)


def _read(path: Path) -> dict[str, bytes]:
    """
    Read the members that SB3 does not know, once all members agree with their checksums.

    :raises ValueError: The file is damaged, or no checkpoint
    """
    # What this raises is no damage: the file is missing, or may not be read
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
                if damaged is not None:
                    raise zipfile.BadZipFile(f"{damaged} does not agree with its checksum")
                names = set(archive.namelist())
                members = {name: archive.read(name) for name in (TRAINING_MEMBER, EPISODES_MEMBER) if name in names}
        except Exception as error:
            # A wrong bit beside the members makes them, say, compressed or encrypted, which fails in a way of its own each
            raise ValueError(
                f"{path} is damaged: {error}. `resume` finds the newest checkpoint of a folder that is not."
            ) from error
    if TRAINING_MEMBER not in members:
        raise ValueError(
            f"{path} is no checkpoint: `save_checkpoint` or ResumableCheckpointCallback write them. "
            "A zip of `model.save` is loaded by the `load` of its algorithm."
        )
    return members


# ---------------------------------------------------------------------- a folder of checkpoints


def _checkpoints(folder: Path, name_prefix: str) -> list[tuple[int, Path]]:
    """The checkpoints of a folder by number, the oldest first."""
    pattern = re.compile(re.escape(name_prefix) + r"_(\d+)_\d+_steps\.zip")
    matches = [(pattern.fullmatch(path.name), path) for path in folder.glob("*.zip")]
    return sorted((int(match[1]), path) for match, path in matches if match)


def resume(
    folder: str | Path,
    env: GymEnv | None = None,
    device: th.device | str = "auto",
    name_prefix: str = "checkpoint",
    **kwargs: Any,
) -> EpisodicA2C | None:
    """
    Load the newest good checkpoint that a :class:`ResumableCheckpointCallback` has left in a folder.

    One script for the first start and for every later one::

        model = resume("checkpoints") or EpisodicA2C("MlpPolicy", "CartPole-v1", seed=0)
        model.learn(
            100_000 - model.num_timesteps,
            reset_num_timesteps=False,
            callback=ResumableCheckpointCallback("checkpoints"),
        )

    :param folder: ``save_path`` of the callback
    :param env: As in :func:`load_checkpoint`
    :param device: Device on which the model should be
    :param name_prefix: As that of the callback
    :param kwargs: Further arguments of ``EpisodicA2C.load``
    :return: The model; None if the folder has no checkpoint yet
    :raises ValueError: There are checkpoints, but all of them are damaged
    """
    paths = [path for _, path in _checkpoints(Path(folder), name_prefix)]
    for path in reversed(paths):
        try:
            _read(path)
        except ValueError as error:
            warnings.warn(f"{error} Trying the one before.", UserWarning, stacklevel=2)
            continue
        return load_checkpoint(path, env, device, **kwargs)
    if paths:
        raise ValueError(f"All {len(paths)} checkpoints in {folder} are damaged: move them away to start anew.")
    return None


class ResumableCheckpointCallback(BaseCallback):
    """
    Write checkpoints from which :func:`resume` goes on: after the first update behind every ``save_freq`` env steps, and at
    the end of the training. Each is written atomically, so that a crash never costs more than the work since the last one.

    :param save_path: Folder for ``{name_prefix}_{number}_{num_timesteps}_steps.zip``; made if it is missing. One training each
    :param save_freq: Env steps between two checkpoints, of all environments together
    :param keep: Number of checkpoints to keep; older ones are deleted
    :param name_prefix: What their names begin with
    :param verbose: Verbosity level: 0 for no output, 2 for saying when a checkpoint was written
    :raises ValueError: An argument is out of its range, or the model no :class:`EpisodicA2C`
    """

    def __init__(
        self,
        save_path: str | Path,
        save_freq: int = 10_000,
        keep: int = 3,
        name_prefix: str = "checkpoint",
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        for name, value in {"save_freq": save_freq, "keep": keep}.items():
            if value < 1:
                raise ValueError(f"`{name}` is {value}. It must be an integer >= 1.")
        self.save_path = Path(save_path)
        self.save_freq = save_freq
        self.keep = keep
        self.name_prefix = name_prefix
        self._has_warned = False

    def _init_callback(self) -> None:
        if not isinstance(self.model, EpisodicA2C):
            raise ValueError(
                f"ResumableCheckpointCallback is for EpisodicA2C and its variants, not for {type(self.model).__name__}: "
                "use stable_baselines3.common.callbacks.CheckpointCallback."
            )
        self.save_path.mkdir(parents=True, exist_ok=True)
        # What a process left behind that was killed while writing
        for path in self.save_path.glob(f".{self.name_prefix}_*.tmp"):
            path.unlink(missing_ok=True)

    def _on_training_start(self) -> None:
        self._last_saved = self.num_timesteps = self.model.num_timesteps

    def _on_rollout_start(self) -> None:
        if self.model.num_timesteps - self._last_saved >= self.save_freq:
            self._save()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        if self.model.num_timesteps != self._last_saved:
            self._save()

    def _save(self) -> None:
        assert isinstance(self.model, EpisodicA2C)
        earlier = _checkpoints(self.save_path, self.name_prefix)
        number = earlier[-1][0] + 1 if earlier else 1
        num_timesteps = self.model.num_timesteps
        path = self.save_path / f"{self.name_prefix}_{number:06d}_{num_timesteps}_steps.zip"
        reason = _write(self.model, path)
        self._last_saved = num_timesteps
        if reason is not None and not self._has_warned:
            _warn_of_fresh_episodes(reason)
            self._has_warned = True
        for _, old_path in earlier[: max(0, len(earlier) + 1 - self.keep)]:
            old_path.unlink(missing_ok=True)
        if self.verbose >= 2:
            print(f"Saved checkpoint to {path}")


# ---------------------------------------------------------------------- random states


def _get_random_states(model: EpisodicA2C) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": th.get_rng_state(),
        "cuda": th.cuda.get_rng_state_all() if model.device.type == "cuda" else None,
        # The torch actor has none of its own
        "actor": getattr(model._actor, "rng", None),
    }


def _set_random_states(model: EpisodicA2C, states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    th.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and model.device.type == "cuda" and len(states["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    if states["actor"] is not None and hasattr(model._actor, "rng"):
        model._actor.rng = states["actor"]


# ---------------------------------------------------------------------- pickling environments


class _Pickler(cloudpickle.Pickler):
    """
    Pickles environments with all of their state, or not at all.

    :param file: Where to write
    :param device: Tensors that are there will be on the device that the model is loaded to
    """

    def __init__(self, file: io.BytesIO, device: th.device) -> None:
        super().__init__(file)
        self._device = device
        self._arrays: dict[int, tuple[th.Tensor, np.ndarray]] = {}

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) is not th.Tensor or obj.device.type != self._device.type or obj.requires_grad:
            return None
        if id(obj) not in self._arrays:
            # A tensor of two names must stay one. It is kept, so that no other gets its id
            self._arrays[id(obj)] = obj, obj.detach().cpu().numpy()
        return self._arrays[id(obj)][1]

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, SubprocVecEnv):
            raise pickle.PicklingError("the environments of a SubprocVecEnv live in processes of their own")
        if isinstance(obj, ResultsWriter):
            return _ReopenedResultsWriter, (*_describe_results_writer(obj),)
        # Pickling themselves, VecNormalize would leave out its environments and returns, EzPickle all but the arguments of the
        # constructor
        if isinstance(obj, (VecEnvWrapper, EzPickle)):
            state = {name: value for name, value in obj.__dict__.items() if name != "class_attributes"}
            return copyreg.__newobj__, (type(obj),), state, None, None, _set_attributes  # type: ignore[attr-defined]
        return super().reducer_override(obj)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, device: th.device) -> None:
        super().__init__(file)
        self._device = device
        self._tensors: dict[int, tuple[np.ndarray, th.Tensor]] = {}

    def persistent_load(self, pid: np.ndarray) -> th.Tensor:
        if id(pid) not in self._tensors:
            self._tensors[id(pid)] = pid, th.from_numpy(pid).to(self._device)
        return self._tensors[id(pid)][1]


def _pickle(state: Any, device: th.device) -> bytes:
    file = io.BytesIO()
    _Pickler(file, device).dump(state)
    return file.getvalue()


def _unpickle(data: bytes, device: th.device) -> Any:
    return _Unpickler(io.BytesIO(data), device).load()


def _set_attributes(obj: Any, state: dict[str, Any]) -> None:
    obj.__dict__.update(state)
    if isinstance(obj, VecEnvWrapper):
        # As its constructor does
        obj.class_attributes = dict(inspect.getmembers(type(obj)))


def _describe_results_writer(writer: ResultsWriter) -> tuple[str, int, tuple[str, ...]]:
    """Path of a Monitor's log file, its size, and the keys that are logged."""
    file: Any = writer.file_handler
    if isinstance(writer, _ReopenedResultsWriter):
        return writer.path, writer.size if file is None else file.tell(), tuple(writer.logger.fieldnames)
    return file.name, file.tell(), tuple(writer.logger.fieldnames)


class _ReopenedResultsWriter(ResultsWriter):
    """
    Goes on with a Monitor's log file, where it ended when the checkpoint was made.

    The file is touched when an episode ends, not when the checkpoint is loaded: somebody may only want to look into it.

    :param path: The file. If it is missing, it is made
    :param size: Bytes that it had then. What was written later is cut off, as it will be written again; of a file that has
        become shorter, as a crash of the machine may leave it, the whole lines are kept
    :param fieldnames: Keys that are logged
    """

    def __init__(self, path: str, size: int, fieldnames: tuple[str, ...]) -> None:
        self.path = path
        self.size = size
        self.file_handler: Any = None
        self.logger = csv.DictWriter(io.StringIO(), fieldnames)

    def write_row(self, epinfo: dict[str, Any]) -> None:
        if self.file_handler is None:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            self.file_handler = open(self.path, "a+", newline="\n")
            self.logger = csv.DictWriter(self.file_handler, self.logger.fieldnames)
            if self._cut() == 0:
                self.file_handler.write(f"#{json.dumps({'t_start': time.time()})}\n")
                self.logger.writeheader()
        super().write_row(epinfo)

    def _cut(self) -> int:
        """Cut off what does not belong into the file. Returns the bytes that are left."""
        file = self.file_handler.buffer
        file.seek(0)
        log = file.read(self.size)
        # A row behind half a row, or without the head, could not be read
        n_kept = log.rfind(b"\n") + 1 if log.count(b"\n") >= 2 else 0
        file.truncate(n_kept)
        self.file_handler.seek(n_kept)
        if n_kept < self.size:
            warnings.warn(
                f"{self.path} has lost episodes: it was {self.size} bytes long when the checkpoint was made, of which "
                f"{n_kept} are left. Those to come are logged behind them; the training itself is not affected.",
                UserWarning,
                stacklevel=2,
            )
        return n_kept

    def close(self) -> None:
        if self.file_handler is not None:
            super().close()
