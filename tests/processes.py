"""Commands as a user types them, each in a process of its own that need not import everything again."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path

# A server that has imported everything and done nothing forks. A fork of the test process would inherit what the threads of
# earlier tests have left behind, and crash now and then
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["rl_zoo3.train", "rl_zoo3.import_envs", "sb3_episodic_a2c.tools.solve"])

PATIENCE = 1_200
"""Seconds after which a process hangs. Starting one takes seconds, on a loaded machine minutes."""


class Command:
    """
    ``python -m sb3_episodic_a2c ...`` in a process forked from one that has imported it.

    For commands that start workers of joblib, Dask or Ray, use ``subprocess``.

    :param arguments: Its arguments
    :param cwd: The folder that it runs in
    :param environment: Environment variables that differ from those of this process
    """

    def __init__(self, *arguments: str, cwd: Path, environment: dict[str, str] | None = None) -> None:
        self._streams = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]
        self._process = CONTEXT.Process(
            target=_run_command,
            args=(arguments, cwd, {**os.environ, **(environment or {})}, [stream.name for stream in self._streams]),
        )
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        return self._read(0)

    @property
    def stderr(self) -> str:
        return self._read(1)

    def _read(self, index: int) -> str:
        return Path(self._streams[index].name).read_text(errors="replace")

    def send_signal(self, signal_number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, signal_number)

    def wait(self) -> "Command":
        """:return: Itself, when it has ended"""
        self._process.join(PATIENCE)
        assert self.returncode is not None, f"it hangs: {self.stdout}\n{self.stderr}"
        return self


def run(*arguments: str, cwd: Path, environment: dict[str, str] | None = None) -> Command:
    """
    Run a command to its end. Its arguments are those of :class:`Command`.

    :return: It, with ``returncode``, ``stdout`` and ``stderr``
    """
    return Command(*arguments, cwd=cwd, environment=environment).wait()


def _run_command(arguments: tuple[str, ...], cwd: Path, environment: dict[str, str], streams: list[str]) -> None:
    # As in a terminal; pytest-xdist and the server change it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))
    for number, name in enumerate(streams, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    faulthandler.enable()
    sys.argv = ["sb3_episodic_a2c", *arguments]
    sys.orig_argv = [sys.executable, "-m", *sys.argv]
    # pytest makes errors of some
    warnings.resetwarnings()

    from sb3_episodic_a2c.__main__ import main

    try:
        sys.exit(main())
    finally:
        sys.stdout.flush()
