"""Files and parameters, which are replaced whole or not at all."""

import copy
import io
import json
import os
import pathlib
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.type_aliases import TensorDict

from sb3_episodic_a2c.guards.signals import uninterrupted

SelfSafelySaved = TypeVar("SelfSafelySaved", bound="SafelySaved")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """
    Open a file for writing that takes the place of ``path`` once it is complete and on the disk.

    Whatever happens before that, a crash of the machine included, leaves what ``path`` was before.

    :param path: Where the file will be. Its folder is made if it is missing. A file that is there keeps its permissions
    """
    # Replace the target of a link, not the link
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with open(temporary, "w+b") as file:
            if path.exists():
                shutil.copymode(path, temporary)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        # The new name must also reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def with_suffix(path: Path) -> Path:
    """
    :param path: Where a model is to be, maybe without ``.zip``
    :return: Where SB3 looks for it
    """
    return path if path.suffix else Path(f"{path}.zip")


def temporary_path(path: Path) -> Path:
    """
    :param path: The file to be written
    :return: Where it is written first: a hidden file in the same folder. A process that is killed leaves it there
    """
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def made_by(path: str | pathlib.Path | io.BufferedIOBase) -> str | None:
    """
    :param path: A zip that an algorithm of SB3 or sb3-contrib has saved
    :return: Name of the algorithm, if it is one without episodes; None if it is not, or the file is no such zip
    """
    try:
        file = open_path(path, "r", suffix="zip")
        position = file.tell()
        with zipfile.ZipFile(file) as archive:
            data = json.loads(archive.read("data"))
        if file is path:
            file.seek(position)
        else:
            file.close()
        policy = str(data["policy_class"].get("__module__"))
    except Exception:
        # `load` itself says what is wrong with the file
        return None
    if "huber_delta" in data:
        return None
    prefix = "Recurrent" if "recurrent" in policy else "Maskable" if "maskable" in policy else ""
    for name, attribute in (("PPO", "clip_range"), ("TRPO", "cg_max_steps"), ("A2C", "normalize_advantage")):
        if attribute in data:
            return prefix + name
    return None


class SafelySaved(BaseAlgorithm):
    """An algorithm whose saved files and parameters survive a failure while they are replaced."""

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save all the attributes of the object and the model parameters in a zip-file.

        Unlike SB3's, it leaves a file of that name as it was until the new one is complete: a crash or a full disk
        never loses both. Ctrl-C waits until the model is written.

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        """
        # torch turns a Ctrl-C while it writes into an unrelated RuntimeError
        with uninterrupted():
            if not isinstance(path, (str, pathlib.Path)):
                super().save(path, exclude, include)
                return
            with atomic_write(with_suffix(Path(path))) as file:
                super().save(file, exclude, include)  # type: ignore[arg-type]  # SB3 only calls what BinaryIO has

    @classmethod
    def load(
        cls: type[SelfSafelySaved], path: str | pathlib.Path | io.BufferedIOBase, *args: Any, **kwargs: Any
    ) -> SelfSafelySaved:
        """
        Load the model from a zip-file, as SB3 does.

        :param path: path to the file (or a file-like) where to load the agent from
        :param args: ``env``, ``device``, ``custom_objects``, ``print_system_info`` and ``force_reset`` as for SB3's
        :param kwargs: extra arguments to change the model when loading
        :return: new model instance with loaded parameters
        :raises ValueError: Another algorithm made the file
        """
        algorithm = made_by(path)
        if algorithm is not None:
            raise ValueError(
                f"`path` {path} holds a model of {algorithm}, not of {cls.__name__}. Load it with `{algorithm}.load`. To take "
                "the parameters of its policy alone, make a model with the same policy and call "
                f"`model.policy.load_state_dict({algorithm}.load(path).policy.state_dict())`."
            )
        return super().load(path, *args, **kwargs)

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load parameters from a given zip-file or a nested dictionary containing parameters for different modules.

        Unlike SB3's, it loads all of them or, if it raises an error, none. As in SB3, they are those of the network and the
        optimizer. The running statistics of the returns travel with ``save`` and ``load`` only.

        :param load_path_or_dict: Location of the saved data (path or file-like, see ``save``), or a nested dictionary
            containing nn.Module parameters used by the policy
        :param exact_match: If True, the given parameters should include parameters for each module and each of their
            parameters
        :param device: Device on which the code should run
        """
        before = copy.deepcopy(self.get_parameters())
        try:
            super().set_parameters(load_path_or_dict, exact_match, device)
        except BaseException:
            with uninterrupted():
                super().set_parameters(before)  # type: ignore[arg-type]  # what SB3 itself returns
            raise
