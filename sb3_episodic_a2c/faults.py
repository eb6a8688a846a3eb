"""What breaks in the midst of training from outside: signals, worker processes, environments."""

import copy
import os
import signal
import socket
import struct
import threading
import traceback
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Pipe, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecNormalize

WORKER_EXIT_SECONDS = 5.0
"""How long a worker may take from closing its pipe to its end."""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """
    Hold Ctrl-C and SIGTERM back until the block is through, for what must not be done by half.

    Only the main thread is interrupted. Job schedulers announce the end of a job by SIGTERM; unless Python handles it, it
    ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # One within the other, so that what one of the handlers raises leaves none of them replaced
    with _held_back(signal.SIGINT), _held_back(signal.SIGTERM):
        yield


@contextmanager
def _held_back(signal_number: signal.Signals) -> Iterator[None]:
    """Call the signal's handler, if Python has one, when the block is through."""
    handler = signal.getsignal(signal_number)
    if not callable(handler):
        yield
        return
    arrived: list[Any] = []
    signal.signal(signal_number, lambda *arguments: arrived.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal_number, handler)
        if arrived:
            handler(*arrived[-1])


@contextmanager
def torch_settings_kept() -> Iterator[None]:
    """
    Put back what others set for a while, as Ctrl-C may come while they do: whether there are gradients, and whether
    distributions check their arguments.
    """
    is_grad_enabled, validates = th.is_grad_enabled(), th.distributions.Distribution._validate_args
    try:
        yield
    except BaseException:
        th.set_grad_enabled(is_grad_enabled)
        th.distributions.Distribution.set_default_validate_args(validates)
        raise


def add_note(error: BaseException, note: str) -> None:
    """
    :param error: The error, which keeps its type
    :param note: Shown below its traceback by Python 3.11 and later
    """
    if hasattr(error, "add_note"):
        error.add_note(note)


def _base_env(env: VecEnv) -> VecEnv:
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    return env


# ---------------------------------------------------------------------- numbers


def has_finite_numbers(observations: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
    """
    :param observations: ``(n, *obs_shape)``, or a dict of such arrays
    :return: ``(n,)`` whether all numbers of an observation are finite
    """
    arrays = observations.values() if isinstance(observations, dict) else [observations]
    return np.logical_and.reduce([np.isfinite(array).reshape(len(array), -1).all(axis=1) for array in arrays])


def find_not_finite(
    observations: np.ndarray | dict[str, np.ndarray], steps: np.ndarray, parameters: Iterable[tuple[str, th.Tensor]]
) -> str | None:
    """
    Look for the reason why no action could be sampled.

    :param observations: ``(n_envs, *obs_shape)``, or a dict of such arrays: what the policy was given
    :param steps: ``(n_envs,)`` steps that the environments have made in their running episodes
    :param parameters: Those of the policy, by name
    :return: Which environment, or which parameter, is to blame; None if all numbers are finite
    """
    for name, array in observations.items() if isinstance(observations, dict) else [("observation", observations)]:
        is_finite = has_finite_numbers(array)
        if not is_finite.all():
            index = int(is_finite.argmin())
            return (
                f"Environment {index} gave an observation that is not finite at step {steps[index]} of its episode, so no "
                f"action could be sampled: {name}={array[index]}. Mend it or clip it in a wrapper: "
                "stable_baselines3.common.vec_env.VecCheckNan stops where it first appears."
            )
    for name, parameter in parameters:
        if not th.isfinite(parameter).all():
            return (
                f"The parameter {name!r} of the policy is not finite, so no action could be sampled. Load an earlier "
                "model, and lower `learning_rate`, unless something else than training has written into `model.policy`."
            )
    return None


def check_rewards(rewards: np.ndarray, steps: np.ndarray) -> None:
    """
    Refuse rewards that would spoil what the rewards of all environments are normalized by.

    :param rewards: ``(n_envs,)`` as the environments gave them
    :param steps: ``(n_envs,)`` steps that they had made in their running episodes
    :raises ValueError: It names the environment and the step
    """
    is_finite = np.isfinite(rewards)
    if not is_finite.all():
        index = int(is_finite.argmin())
        raise ValueError(
            f"Environment {index} gave the reward {rewards[index]} at step {steps[index]} of its episode. Rewards must be "
            "finite: mend it in a wrapper."
        )


NormalizeStatistics = tuple[Any, Any]
"""``obs_rms`` and ``ret_rms`` of a VecNormalize: copies."""


def statistics_of(vec_normalize: VecNormalize | None) -> NormalizeStatistics | None:
    """
    :param vec_normalize: The wrapper, if there is one
    :return: Copies of its running statistics
    """
    return None if vec_normalize is None else copy.deepcopy((getattr(vec_normalize, "obs_rms", None), vec_normalize.ret_rms))


def restore_statistics(vec_normalize: VecNormalize | None, statistics: NormalizeStatistics | None) -> None:
    """
    Put back statistics that numbers which are not finite have spoilt for good.

    :param vec_normalize: The wrapper, if there is one
    :param statistics: What they were, see :func:`statistics_of`
    """
    if vec_normalize is None or statistics is None:
        return
    moments = [
        moment
        for rms in (getattr(vec_normalize, "obs_rms", None), vec_normalize.ret_rms)
        for one in (rms.values() if isinstance(rms, dict) else [rms])
        if one is not None
        for moment in (one.mean, one.var)
    ]
    if not all(np.isfinite(moment).all() for moment in moments):
        obs_rms, ret_rms = copy.deepcopy(statistics)
        if obs_rms is not None:
            vec_normalize.obs_rms = obs_rms
        vec_normalize.ret_rms = ret_rms
    vec_normalize.returns = np.nan_to_num(vec_normalize.returns, posinf=0.0, neginf=0.0)


# ---------------------------------------------------------------------- environments of this process


def find_environment(error: BaseException, env: VecEnv) -> int | None:
    """
    :param error: What was raised
    :param env: The environments it may come from
    :return: Index of the environment that raised it; None if it is not known, or none of them did
    """
    base_env = _base_env(env)
    if isinstance(base_env, DummyVecEnv):
        # SB3 calls them in turn, and says nowhere else whose turn it was
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_locals.get("self") is base_env and "env_idx" in frame.f_locals:
                return frame.f_locals["env_idx"]
    return None


# ---------------------------------------------------------------------- environments of other processes


def find_dead_workers(error: BaseException | None, env: VecEnv) -> str | None:
    """
    Look for worker processes that died, and stop the others, which are of no use without them.

    :param error: What was raised in talking to them; None to look at once
    :param env: The environments
    :return: Which died, and how; None if all are alive, or there are none
    """
    base_env = _base_env(env)
    if not isinstance(base_env, SubprocVecEnv) or base_env.closed:
        return None
    if error is not None:
        if not isinstance(error, (EOFError, ConnectionError)):
            return None
        ended = wait([process.sentinel for process in base_env.processes], timeout=WORKER_EXIT_SECONDS)
        for process in base_env.processes:
            if process.sentinel in ended:
                # It closes its pipes a moment before it can be asked for its exit code
                process.join(WORKER_EXIT_SECONDS)
    dead = [index for index, process in enumerate(base_env.processes) if not process.is_alive()]
    if not dead:
        return None
    for process in base_env.processes:
        process.terminate()
    for process in base_env.processes:
        process.join()
    for remote in base_env.remotes:
        remote.close()
    # `close` would wait for an answer of the dead
    base_env.waiting, base_env.closed = False, True
    return "; ".join(
        f"the worker process of environment {index} {_describe_exit(base_env.processes[index].exitcode)}" for index in dead
    )


def _describe_exit(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code} (if its environment raised an error, that is printed above)"


def resynchronize(env: VecEnv) -> None:
    """
    Throw away what worker processes still answer to a step that was interrupted.

    Else it would be taken for the answer to the next question, and every later one would be one step late.

    :param env: The environments, about to be reset
    :raises RuntimeError: A worker is dead
    """
    base_env = _base_env(env)
    if not isinstance(base_env, SubprocVecEnv):
        return
    try:
        if base_env.closed:
            raise EOFError
        # Who gives this back has answered everything before
        token = str(uuid.uuid4())
        for remote in base_env.remotes:
            remote.send(("set_attr", ("resynchronization_token", token)))
            remote.send(("get_attr", "resynchronization_token"))
        for remote in base_env.remotes:
            _skip_to(remote, token)
    except Exception as error:
        dead = find_dead_workers(error, env)
        raise RuntimeError(
            f"The environments cannot be reset: {dead or 'their worker processes do not answer any more'}. "
            "Give the model new ones of the same number with `model.set_env(env)`."
        ) from error
    base_env.waiting = False


def _skip_to(remote: Any, answer: str) -> None:
    """Read from a pipe until this answer, which is the last one."""
    if os.name != "posix":
        received = None
        while not (isinstance(received, str) and received == answer):
            received = remote.recv()
        return
    # Byte by byte, as it were: Ctrl-C may have come between the length of a message and the message
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

    With ``start_method="fork"`` the workers hold each other's pipes open, so that SB3 would wait for the answer of a dead
    one for ever. A thread that sleeps until one ends then closes its pipe for good.

    :param env: The environments; nothing is done unless they live in forked processes
    """
    base_env = None if env is None else _base_env(env)
    if not isinstance(base_env, SubprocVecEnv) or base_env.closed or os.name != "posix":
        yield
        return
    processes, remotes = list(base_env.processes), list(base_env.remotes)
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
