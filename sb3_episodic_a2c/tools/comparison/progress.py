"""The progress bar of a comparison: how many cells are done, and how long the others will take."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sb3_episodic_a2c.tools.comparison.cells import Cell, is_finished, load_cell


class CellProgress:
    """
    A progress bar over all cells, with the time that the missing ones will take.

    It looks at the disk, so it works with every backend.

    :param cells: All cells, the finished ones included
    :param enabled: Whether to show it
    :param retrain: Whether cells with other settings count as missing
    """

    def __init__(self, cells: Sequence[Cell], enabled: bool, retrain: bool) -> None:
        self.jobs = 1
        """How many cells are trained at a time."""
        self.retrain = retrain
        self.unseen = list(cells)
        """Cells without a complete run folder, as far as it has looked."""
        self.n_cells = self.n_missing = len(cells)
        self.seconds: dict[tuple[str, str], list[float]] = {}
        """Environment and label: how long each finished cell took."""
        self.n_done = 0
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        # A console of its own: a cell that is trained in this process redirects sys.stdout, and the bar must not follow
        self.progress = Progress(*columns, console=Console(file=sys.stdout), disable=not enabled)
        self.task = self.progress.add_task("", total=len(cells))

    def __enter__(self) -> "CellProgress":
        self.progress.start()
        self._look()
        self.n_missing = len(self.unseen)
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def update(self, n_done: int = 1) -> None:
        """So many more cells have been trained or have failed."""
        self.n_done += n_done
        self._look()

    def start_again(self, n_failed: int) -> None:
        """All cells start again but the finished ones and so many that have failed."""
        self._look()
        self.n_done = self.n_missing - len(self.unseen) + n_failed
        self._show()

    def _look(self) -> None:
        for cell in list(self.unseen):
            result = load_cell(cell) if is_finished(cell, self.retrain) else None
            if result is not None:
                self.unseen.remove(cell)
                self.seconds.setdefault((cell.env_id, cell.label), []).append(result.train_seconds[-1] + result.eval_seconds)
        self._show()

    def _show(self) -> None:
        # Done, but without a run folder
        n_failed = max(0, self.n_done - (self.n_missing - len(self.unseen)))
        completed = self.n_cells - len(self.unseen) + n_failed
        left = seconds_left(self.unseen, self.seconds) / self.jobs
        text = f"cells, {n_failed} failed" if n_failed else "cells"
        if self.seconds and self.unseen:
            text += f", about {format_duration(left)} left"
        self.progress.update(self.task, completed=completed, description=text)


def seconds_left(cells: Sequence[Cell], seconds: dict[tuple[str, str], list[float]]) -> float:
    """
    :param cells: Cells that are not trained yet
    :param seconds: Environment and label: how long each finished cell took
    :return: How long one job will need for all of them. A cell is assumed to take the mean of finished cells with the same
        algorithm and environment; where there is none, of those on the same environment; where there is none, of all
    """

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def guess(cell: Cell) -> float:
        same = seconds.get((cell.env_id, cell.label), [])
        same_env = [second for (env_id, _), values in seconds.items() if env_id == cell.env_id for second in values]
        everything = [second for values in seconds.values() for second in values]
        return mean(same or same_env or everything or [0.0])

    return sum(guess(cell) for cell in cells)


def format_duration(seconds: float) -> str:
    """``"5 s"``, ``"2 min"`` or ``"2 h 01 min"``."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
