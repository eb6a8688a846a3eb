"""Checkpoints from which training goes on exactly as if it had never been stopped."""

import copyreg
import csv
import functools
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
from sb3_episodic_a2c.guards.arguments import check_positive
from sb3_episodic_a2c.guards.files import atomic_write, with_suffix
from sb3_episodic_a2c.guards.signals import uninterrupted
from sb3_episodic_a2c.plain_mlp import unwrapped

TRAINING_MEMBER = "resume/training.pkl"
"""Member of the zip: what SB3's ``save`` leaves out, apart from the environments."""
EPISODES_MEMBER = "resume/episodes.pkl"
"""Member of the zip: the environments and their running episodes. Missing if they cannot be pickled."""

IN_FLIGHT = ("rollout_buffer", "_last_obs", "_last_episode_starts", "_last_original_obs")
"""Attributes of a model that belong to unfinished episodes, and are of no use without their environments."""

STATISTICS = ("obs_rms", "ret_rms")
"""The running statistics of VecNormalize."""


def save_checkpoint(model: EpisodicA2C, path: str | Path) -> None:
    """
    Write everything that the rest of a training depends on, atomically.

    The file is the zip of ``model.save`` with two more members, so ``EpisodicA2C.load`` reads it as well. They hold the random
    states of Python, NumPy, torch and the actor, and the environments with their wrappers (``Monitor``, ``VecMonitor``,
    ``VecNormalize``) and their running episodes. Environments that cannot be pickled (those in worker processes, with C++
    objects or with open windows) are left out, with a warning; the statistics of ``VecNormalize`` are saved all the same.

    Call it between two calls of ``learn``, or in a callback's ``_on_rollout_start``. During a rollout, the current step would
    be lost.

    :param model: The model
    :param path: Where to write it; ``.zip`` is added if there is no suffix
    :raises OSError: The disk is full, or the folder cannot be written to. An earlier file at ``path`` is unharmed
    """
    reason = _write(model, Path(path))
    if reason is not None:
        _warn_of_fresh_episodes(reason)


def _warn_of_fresh_episodes(reason: str) -> None:
    warnings.warn(
        f"The environments cannot be part of the checkpoint ({reason}). Everything else is saved. To go on, pass `env` to "
        "`resume` or `load_checkpoint`: training continues there with new episodes.",
        UserWarning,
        stacklevel=3,
    )


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
            names = ["env", "observation_space", "action_space", *IN_FLIGHT]
            episodes = _pickle({name: getattr(model, name) for name in names}, model.device, _parts(model))
        except Exception as error:
            # Pickling a user's environment may raise anything
            reason = f"{type(error).__name__}: {error}"
    members = {TRAINING_MEMBER: _pickle(training, model.device)}
    if episodes is not None:
        members[EPISODES_MEMBER] = episodes
    try:
        # Python ignores what is raised while an object is deleted: a signal would be lost where it deletes the archive
        with uninterrupted():
            _write_file(model, path, members)
    except OSError as error:
        raise OSError(
            error.errno,
            f"The checkpoint could not be written ({error.strerror}). The model and earlier checkpoints are unharmed",
            str(path),
        ) from error
    return reason


def _write_file(model: EpisodicA2C, path: Path, members: dict[str, bytes]) -> None:
    with atomic_write(with_suffix(path)) as file:
        model.save(file)  # type: ignore[arg-type]  # SB3 only calls what BinaryIO has
        with zipfile.ZipFile(file, mode="a") as archive:
            for name, content in members.items():
                archive.writestr(name, content)


def load_checkpoint(
    path: str | Path, env: GymEnv | None = None, device: th.device | str = "auto", **kwargs: Any
) -> EpisodicA2C:
    """
    Load what :func:`save_checkpoint` wrote, and restore the random states of Python, NumPy and torch.

    ``model.learn(total_timesteps - model.num_timesteps, reset_num_timesteps=False)`` then goes on as the uninterrupted
    training would have: bit for bit, on the same machine, with the same versions and the same ``device``.

    A ``Monitor`` continues its log file where it was at the checkpoint. If the file has lost its end since (the machine
    crashed), it continues after the last whole row, with a warning.

    Loading is unpickling, which executes code from the file. From a file that you do not trust, take the parameters alone::

        with zipfile.ZipFile("model.zip") as archive, archive.open("policy.pth") as file:
            model.policy.load_state_dict(torch.load(file, weights_only=True))

    :param path: The file, with or without its ``.zip``
    :param env: Environments to go on with instead of those in the checkpoint. They get its ``VecNormalize`` statistics, and
        start with new episodes
    :param device: Device of the model
    :param kwargs: Further arguments of ``EpisodicA2C.load``
    :return: The model, of the class that was saved
    :raises ValueError: The file is damaged or not a checkpoint, or ``env`` has other spaces than the model
    """
    path = Path(path)
    if not path.exists():
        path = with_suffix(path)
    members = _read(path)
    device = get_device(device)
    training = _unpickle(members[TRAINING_MEMBER], device)
    model = training["algorithm"].load(path, env=env, device=device, **kwargs)
    if env is not None:
        _prepare(model, training)
    elif EPISODES_MEMBER in members:
        episodes = _unpickle(members[EPISODES_MEMBER], device, model)
        model.set_env(episodes.pop("env"), force_reset=False)
        for name, value in episodes.items():
            setattr(model, name, value)
        model.rollout_buffer.device = model.device
    else:
        model._last_obs = None
        warnings.warn(f"{path} holds no environments: pass `env` to train on, with new episodes.", UserWarning, stacklevel=2)
    _set_random_states(model, training["random_states"])
    return model


def _prepare(model: EpisodicA2C, training: dict[str, Any]) -> None:
    """Give other environments the checkpoint's VecNormalize statistics, and seed them."""
    vec_normalize, statistics = model.get_vec_normalize_env(), training["vec_normalize"]
    if (vec_normalize is None) != (statistics is None):
        raise ValueError(
            f"`env` is {'not ' if vec_normalize is None else ''}wrapped in VecNormalize, the environments of the checkpoint "
            f"were{'' if vec_normalize is None else ' not'}: the model would see other numbers than it was trained on. "
            f"{'Wrap `env` in VecNormalize' if vec_normalize is None else 'Pass the environments without VecNormalize'}."
        )
    for name, value in (statistics or {}).items():
        setattr(vec_normalize, name, value)
    if model.seed is not None:
        # Loading seeds them as at the first start: every resumed training would play the same episodes again
        seed = np.random.SeedSequence([model.seed, model.num_timesteps]).generate_state(1)[0]
        assert model.env is not None
        model.env.seed(int(seed) // 2)


def _read(path: Path) -> dict[str, bytes]:
    """
    Read the members that SB3 does not know, after a check of all checksums.

    :raises ValueError: The file is damaged, or not a checkpoint
    """
    # Errors of `open` are passed on: a missing or unreadable file is not damaged
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
                if damaged is not None:
                    raise zipfile.BadZipFile(f"{damaged} does not agree with its checksum")
                names = set(archive.namelist())
                members = {name: archive.read(name) for name in (TRAINING_MEMBER, EPISODES_MEMBER) if name in names}
        except Exception as error:
            # A wrong bit in the zip's directory may mark a member as, say, encrypted: there are many types of errors
            raise ValueError(
                f"{path} is damaged: {error}. `resume` loads the newest undamaged checkpoint of a folder."
            ) from error
    if TRAINING_MEMBER not in members:
        raise ValueError(
            f"{path} is no checkpoint: these are written by `save_checkpoint` or ResumableCheckpointCallback. "
            "Load a zip of `model.save` with the `load` of its algorithm."
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
    Load the newest undamaged checkpoint of a :class:`ResumableCheckpointCallback`.

    A damaged file is passed over, with a warning. One script for the first start and for every later one::

        model = resume("checkpoints") or EpisodicA2C("MlpPolicy", "CartPole-v1", seed=0)
        model.learn(
            100_000 - model.num_timesteps,
            reset_num_timesteps=False,
            callback=ResumableCheckpointCallback("checkpoints"),
        )

    :param folder: ``save_path`` of the callback
    :param env: As in :func:`load_checkpoint`
    :param device: Device of the model
    :param name_prefix: ``name_prefix`` of the callback
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
    Write checkpoints from which :func:`resume` continues a training.

    They are written after the first update at least ``save_freq`` env steps since the last one, and at the end of the
    training. Each is written atomically, so a crash costs at most the work since the last one.

    After a resume, other callbacks start anew (``EvalCallback`` forgets its best reward), and so does the count of updates
    between two logs.

    RL Zoo takes the callback from its hyperparameters, or from the command line::

        train ... -params "callback:{'sb3_episodic_a2c.ResumableCheckpointCallback':{'save_path':'checkpoints'}}"

    :param save_path: Folder for ``{name_prefix}_{number}_{num_timesteps}_steps.zip``; made if it is missing. Use one folder
        for each training
    :param save_freq: Env steps between two checkpoints, of all environments together
    :param keep: Number of checkpoints to keep; older ones are deleted
    :param name_prefix: Beginning of the file names
    :param verbose: Verbosity level: 0 for no output, 2 for a message at each checkpoint
    :raises ValueError: An argument is out of its range, or the model is not an :class:`EpisodicA2C`
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
            check_positive(f"`{name}`", value)
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
        # Left by a process that was killed while it wrote
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
        # The torch actor has no generator of its own
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
    Pickles environments with their full state, or refuses them.

    :param file: Where to write
    :param device: Device of the model. Its tensors are loaded to the device of the loaded model
    :param parts: Path of each part of the model by its id, see :func:`_parts`. They are named, not pickled
    """

    def __init__(self, file: io.BytesIO, device: th.device, parts: dict[int, str]) -> None:
        super().__init__(file)
        self._device = device
        self._parts = parts
        self._arrays: dict[int, tuple[th.Tensor, np.ndarray]] = {}

    def persistent_id(self, obj: Any) -> Any:
        part = self._parts.get(id(obj))
        if part is not None:
            return part
        if type(obj) is not th.Tensor or obj.device.type != self._device.type or obj.requires_grad:
            return None
        if id(obj) not in self._arrays:
            # A tensor with two names must stay one. It is kept alive, so that no other gets its id
            self._arrays[id(obj)] = obj, obj.detach().cpu().numpy()
        return self._arrays[id(obj)][1]

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, SubprocVecEnv):
            raise pickle.PicklingError("the environments of a SubprocVecEnv live in processes of their own")
        if isinstance(obj, ResultsWriter):
            return _ReopenedResultsWriter, (*_describe_results_writer(obj),)
        # VecNormalize's own pickling omits its environments and returns, EzPickle's all but the constructor's arguments
        if isinstance(obj, (VecEnvWrapper, EzPickle)):
            state = {name: value for name, value in obj.__dict__.items() if name != "class_attributes"}
            new_object = copyreg.__newobj__  # type: ignore[attr-defined]  # not in typeshed
            return new_object, (type(obj),), state, None, None, _set_attributes
        return super().reducer_override(obj)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, device: th.device, model: EpisodicA2C | None) -> None:
        super().__init__(file)
        self._device = device
        self._model = model
        self._tensors: dict[int, tuple[np.ndarray, th.Tensor]] = {}

    def persistent_load(self, pid: np.ndarray | str) -> Any:
        if isinstance(pid, str):
            return functools.reduce(getattr, pid.split(".")[1:], self._model)
        if id(pid) not in self._tensors:
            self._tensors[id(pid)] = pid, th.from_numpy(pid).to(self._device)
        return self._tensors[id(pid)][1]


def _parts(model: EpisodicA2C) -> dict[int, str]:
    """
    The parts of a model that its environments may hold, as in self-play. After a resume they must hold the resumed model, not
    a copy of the old one.

    :param model: The model
    :return: Path of each part by its id, e.g. ``"model.policy.action_net"``
    """
    policy = unwrapped(model.policy)
    parts = {id(model): "model", id(model.policy): "model.policy", id(policy.optimizer): "model.policy.optimizer"}
    for name, part in (*policy.named_modules(), *policy.named_parameters(), *policy.named_buffers()):
        parts[id(part)] = f"model.policy.{name}".rstrip(".")
    return parts


def _pickle(state: Any, device: th.device, parts: dict[int, str] | None = None) -> bytes:
    file = io.BytesIO()
    _Pickler(file, device, parts or {}).dump(state)
    return file.getvalue()


def _unpickle(data: bytes, device: th.device, model: EpisodicA2C | None = None) -> Any:
    """``model`` is the one whose parts the data names, if it does."""
    return _Unpickler(io.BytesIO(data), device, model).load()


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
    Continues a Monitor's log file where it was at the checkpoint.

    The file is opened when an episode ends, not when the checkpoint is loaded, which may be for inspection only.

    :param path: The file. If it is missing, it is made
    :param size: Its bytes at the checkpoint. Later rows are cut off, as they will be logged again. If the file is shorter now
        (the machine crashed), its whole rows are kept
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
        """Cut the file back to the checkpoint. Returns the bytes that are left."""
        file = self.file_handler.buffer
        file.seek(0)
        log = file.read(self.size)
        # A row after half a row, or without the header, could not be read
        n_kept = log.rfind(b"\n") + 1 if log.count(b"\n") >= 2 else 0
        file.truncate(n_kept)
        self.file_handler.seek(n_kept)
        if n_kept < self.size:
            warnings.warn(
                f"{self.path} has lost episodes: it was {self.size} bytes long when the checkpoint was made, and {n_kept} of "
                "them are left. New episodes are logged after these; the training itself is not affected.",
                UserWarning,
                stacklevel=2,
            )
        return n_kept

    def close(self) -> None:
        if self.file_handler is not None:
            super().close()
