"""Ctrl-C and SIGTERM, which must not come while something is half done."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[Callable[[], None]]:
    """
    Hold Ctrl-C and SIGTERM back until the block is through, for what must not be done by half.

    Only the main thread is interrupted. Job schedulers announce the end of a job by SIGTERM; unless Python handles it, it
    ends the process at once.

    :return: A function that lets through what has arrived so far, for a place where that does no harm
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    # Nested, so that an exception of one of the handlers leaves none of them replaced
    with _held_back(signal.SIGINT) as let_sigint_through, _held_back(signal.SIGTERM) as let_sigterm_through:

        def let_through() -> None:
            let_sigint_through()
            let_sigterm_through()

        yield let_through


@contextmanager
def _held_back(signal_number: signal.Signals) -> Iterator[Callable[[], None]]:
    """Call the signal's handler, if Python has one, when the block is through."""
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
