"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """
    Open a file for writing that takes the place of ``path`` once it is complete and on the disk.

    Whatever happens before that, a crash of the machine included, leaves what ``path`` was before.

    :param path: Where the file will be. Its folder is made if it is missing
    """
    # What a link points to is replaced, not the link
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        # The new name must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def temporary_path(path: Path) -> Path:
    """
    :param path: The file to be written
    :return: Where it is written first: a hidden file in the same folder, which a process that is killed leaves behind
    """
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
