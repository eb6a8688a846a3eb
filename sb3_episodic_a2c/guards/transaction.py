"""Changes to a model that are kept together, or undone together."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch as th

from sb3_episodic_a2c.guards.signals import uninterrupted


class Transaction:
    """
    Changes that are kept together, or undone together.

    Whatever leaves the block, an exception or Ctrl-C, undoes what was changed, unless :meth:`commit` was called. Signals wait
    for :meth:`let_signals_through`, so no second one can come while changes are undone.
    """

    def __init__(self) -> None:
        self._signals = uninterrupted()
        self._undo = ExitStack()

    def __enter__(self) -> "Transaction":
        self.let_signals_through = self._signals.__enter__()
        return self

    def on_undo(self, function: Callable[..., Any], *arguments: Any) -> None:
        """
        Push what undoes a change, before the change is made. The last one pushed is called first.

        :param function: The function to call
        :param arguments: Its arguments
        """
        self._undo.callback(function, *arguments)

    def keep(self, tensors: Iterable[th.Tensor]) -> None:
        """
        Put back what these tensors hold now, if the changes are undone.

        :param tensors: Parameters or buffers that are about to be written to
        """
        for tensor in tensors:
            self.on_undo(_write, tensor, tensor.detach().clone())

    def commit(self) -> None:
        """Keep the changes."""
        self._undo.pop_all()

    def __exit__(self, *exc_details: Any) -> None:
        try:
            self._undo.close()
        finally:
            # Signals that arrived are handled here
            self._signals.__exit__(*exc_details)


def _write(tensor: th.Tensor, content: th.Tensor) -> None:
    with th.no_grad():
        tensor.copy_(content)
