"""Worker processes of ``SubprocVecEnv`` and ``AsyncVectorEnv``: which died, and how to go on with those interrupted."""

import os
import signal
import socket
import struct
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Pipe, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

from gymnasium.vector import AsyncVectorEnv, VectorEnv
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecEnvWrapper

WORKER_EXIT_SECONDS = 5.0
"""How long a worker may take from closing its pipe to its exit."""


def base_env(env: VecEnv) -> VecEnv | VectorEnv:
    """
    :param env: Environments, with or without wrappers
    :return: The environments without the wrappers of SB3, and of gymnasium where it is a vector environment
    """
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    vector_env = getattr(env, "env", None)
    return vector_env.unwrapped if isinstance(vector_env, VectorEnv) else env


def stop_workers_if_one_died(error: BaseException | None, env: VecEnv) -> str | None:
    """
    If a worker process died, stop the others, which are of no use without it.

    :param error: What was raised in talking to them; None to look without waiting
    :param env: The environments
    :return: Which died, and how; None if none did, or ``error`` is that of its environment
    """
    workers = base_env(env)
    if not isinstance(workers, SubprocVecEnv | AsyncVectorEnv) or workers.closed:
        return None
    if isinstance(workers, AsyncVectorEnv) and None in workers.parent_pipes:
        # gymnasium has dropped the pipe to a worker whose environment raised an error, and raises the error itself
        _stop(workers)
        return None
    if error is not None:
        if not isinstance(error, EOFError | ConnectionError):
            return None
        ended = wait([process.sentinel for process in workers.processes], timeout=WORKER_EXIT_SECONDS)
        for process in workers.processes:
            if process.sentinel in ended:
                # A worker closes its pipes a moment before its exit code is known
                process.join(WORKER_EXIT_SECONDS)
    dead = [index for index, process in enumerate(workers.processes) if not process.is_alive()]
    if not dead:
        return None
    _stop(workers)
    return "; ".join(
        f"the worker process of environment {index} {_describe_exit(workers.processes[index].exitcode)}" for index in dead
    )


def _stop(workers: SubprocVecEnv | AsyncVectorEnv) -> None:
    """End all processes. ``close`` would wait for answers of dead ones."""
    for process in workers.processes:
        process.terminate()
    for process in workers.processes:
        process.join()
    for pipe in workers.remotes if isinstance(workers, SubprocVecEnv) else workers.parent_pipes:
        if pipe is not None:
            pipe.close()
    if isinstance(workers, SubprocVecEnv):
        workers.waiting = False
    workers.closed = True


def _describe_exit(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code} (if its environment raised an error, that is printed above)"


def resynchronize(env: VecEnv) -> None:
    """
    Discard the answers of worker processes to a step that was interrupted.

    Otherwise they would be taken for the answers to the next request, and every later answer would be one step late.

    :param env: The environments, about to be reset
    :raises RuntimeError: A worker is dead
    """
    subproc_env = base_env(env)
    if not isinstance(subproc_env, SubprocVecEnv):
        return
    try:
        if subproc_env.closed:
            raise EOFError
        # A worker that returns this token has answered all earlier requests
        token = str(uuid.uuid4())
        for remote in subproc_env.remotes:
            remote.send(("set_attr", ("resynchronization_token", token)))
            remote.send(("get_attr", "resynchronization_token"))
        for remote in subproc_env.remotes:
            _skip_to(remote, token)
    except Exception as error:
        dead = stop_workers_if_one_died(error, env)
        raise RuntimeError(
            f"The environments cannot be reset: {dead or 'their worker processes no longer answer'}. "
            "Give the model as many new ones with `model.set_env(env)`."
        ) from error
    subproc_env.waiting = False


def _skip_to(remote: Any, answer: str) -> None:
    """Read from a pipe until this answer, which is the last one."""
    if os.name != "posix":
        received = None
        while not (isinstance(received, str) and received == answer):
            received = remote.recv()
        return
    # Read raw bytes: the interrupt may have split a length prefix from its message
    message = bytes(ForkingPickler.dumps(answer))
    end = struct.pack("!i", len(message)) + message
    received_bytes = b""
    while received_bytes != end:
        chunk = os.read(remote.fileno(), 2**16)
        if not chunk:
            raise EOFError
        received_bytes = (received_bytes + chunk)[-len(end) :]


@contextmanager
def watch_workers(env: VecEnv | None) -> Iterator[None]:
    """
    Make sure that the death of a worker process is noticed.

    With ``start_method="fork"`` the workers hold each other's pipes open, so SB3 would wait for a dead one for ever. A thread
    sleeps until a worker ends, and then closes its pipe for good.

    :param env: The environments; nothing is done unless they live in forked processes
    :raises RuntimeError: They are closed
    """
    subproc_env = None if env is None else base_env(env)
    if isinstance(subproc_env, SubprocVecEnv | AsyncVectorEnv) and subproc_env.closed:
        raise RuntimeError(
            "The environments are closed and cannot be reset. Give the model as many new ones with `model.set_env(env)`."
        )
    # A worker of gymnasium's is the only one that holds the end of its pipe: its death is noticed
    if not isinstance(subproc_env, SubprocVecEnv) or os.name != "posix":
        yield
        return
    processes, remotes = list(subproc_env.processes), list(subproc_env.remotes)
    stopped, stop = Pipe(duplex=False)

    def watch() -> None:
        sentinels = [process.sentinel for process in processes]
        if stopped in (ready := wait([*sentinels, stopped])):
            return
        for sentinel, remote in zip(sentinels, remotes, strict=True):
            if sentinel in ready:
                with socket.socket(fileno=os.dup(remote.fileno())) as pipe:
                    pipe.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.send(None)
        thread.join()
        stop.close()
        stopped.close()
