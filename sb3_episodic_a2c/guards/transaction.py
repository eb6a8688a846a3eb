"""Changes to a model that are kept together, or undone together; one of them is a step of its optimizer."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch as th
from torch import nn

from sb3_episodic_a2c.guards.numbers import check_gradient
from sb3_episodic_a2c.guards.signals import uninterrupted


class Transaction:
    """
    Changes that are kept together, or undone together.

    The end of the block, also by an exception or Ctrl-C, undoes the changes, unless :meth:`commit` was called. Signals wait
    for :meth:`let_signals_through` or the end of the block, so none can interrupt the undoing.
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

    def set(self, owner: Any, name: str, value: Any) -> None:
        """
        Give an attribute another value, unless the changes are undone.

        :param owner: The object that has the attribute
        :param name: Name of the attribute
        :param value: Its new value
        """
        self.on_undo(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def keep_buffers(self, module: nn.Module) -> None:
        """
        Put back the buffers of a module, such as batch norm's statistics, if the changes are undone.

        :param module: The module. It may write into its buffers or replace them
        """
        for owner in module.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                self.on_undo(setattr, owner, name, buffer)
                self.keep([buffer])

    def keep(self, tensors: Iterable[th.Tensor]) -> None:
        """
        Put back what these tensors hold now, if the changes are undone.

        :param tensors: Those that are about to be written to
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
            # Held-back signals are handled here
            self._signals.__exit__(*exc_details)


class OptimizerStep(Transaction):
    """
    One step of an optimizer, taken if its gradient is finite, with what changes before it.

    :param optimizer: The optimizer. Its gradients are dropped at the start, and when the step is not taken
    """

    def __init__(self, optimizer: th.optim.Optimizer) -> None:
        super().__init__()
        self.optimizer = optimizer

    def __enter__(self) -> "OptimizerStep":
        super().__enter__()
        self.on_undo(self.optimizer.zero_grad)
        for parameter in self._parameters():
            # As `zero_grad`, which needs as long as a layer
            parameter.grad = None
        return self

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def take(self, name: str, max_grad_norm: float | None = None, before: Callable[[], None] = lambda: None) -> None:
        """
        Clip the gradient if asked to, and take the step.

        :param name: What to call the step in an error
        :param max_grad_norm: The maximum norm of the gradient; None: no clipping
        :param before: Called right before the step, when nothing can refuse it any more. It may set the learning rate
        :raises ValueError: The gradient is not finite
        """
        parameters = [parameter for parameter in self._parameters() if parameter.grad is not None]
        norm = check_gradient(parameters, name)
        if max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        before()
        # Before the step: if that failed half-way, the parameters of before would not fit the rest
        self.commit()
        self.optimizer.step()


def _write(tensor: th.Tensor, content: th.Tensor) -> None:
    with th.no_grad():
        tensor.copy_(content)
