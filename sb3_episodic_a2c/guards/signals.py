"""Ctrl-C and SIGTERM, which must not interrupt what has to be done as a whole."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[Callable[[], None]]:
    """
    Hold Ctrl-C and SIGTERM back until the end of the block, which must be done as a whole.

    Python interrupts only the main thread. Job schedulers announce the end of a job by SIGTERM; unless Python handles it, it
    ends the process at once.

    :return: A function that handles the signals received so far. Call it where an interrupt does no harm
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    # Nested, so that an exception in one handler does not keep the other replaced
    with _held_back(signal.SIGINT) as let_sigint_through, _held_back(signal.SIGTERM) as let_sigterm_through:

        def let_through() -> None:
            let_sigint_through()
            let_sigterm_through()

        yield let_through


@contextmanager
def _held_back(signal_number: signal.Signals) -> Iterator[Callable[[], None]]:
    """Call the signal's handler, if Python has one, at the end of the block."""
    handler = signal.getsignal(signal_number)
    if not callable(handler):
        yield lambda: None
        return
    arrived: list[Any] = []

    def let_through() -> None:
        if arrived:
            arguments = arrived[-1]
            arrived.clear()
            handler(*arguments)

    signal.signal(signal_number, lambda *arguments: arrived.append(arguments))
    try:
        yield let_through
    finally:
        signal.signal(signal_number, handler)
        let_through()


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """
    SIGTERM raises ``SystemExit`` within the block, as Ctrl-C raises ``KeyboardInterrupt``, so that what is at work can end in
    order. A handler that is there already stays.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    # The exit status that a shell shows for it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
