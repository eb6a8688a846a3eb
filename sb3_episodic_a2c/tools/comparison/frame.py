"""The results of all cells as one tidy frame: a row for each cell and evaluation."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from sb3_episodic_a2c.tools.comparison.cells import Cell, CellResult, load_cell

COLUMNS = (
    *("algorithm", "env_id", "seed", "status", "evaluation", "grid_timesteps", "timesteps", "mean_reward", "std_reward"),
    *("mean_ep_length", "train_seconds", "train_cpu_seconds", "eval_seconds", "folder", "error"),
)


def results_frame(cells: Sequence[Cell], errors: dict[Cell, str]) -> pd.DataFrame:
    """
    :param cells: All cells
    :param errors: Tracebacks of those that failed
    :return: One row for each cell and evaluation: ``algorithm, env_id, seed, status`` (``"finished"`` or ``"failed"``),
        ``evaluation`` (0 is before training), ``grid_timesteps`` (env steps at which it was planned), ``timesteps`` (at which
        it took place), ``mean_reward`` and ``std_reward`` over its episodes, ``mean_ep_length``, ``train_seconds`` (wall time
        up to it, without evaluations), ``train_cpu_seconds``, ``eval_seconds`` (of all evaluations of the cell), ``folder``,
        ``error``. A failed cell has one row, without figures
    """
    rows = []
    for cell in cells:
        common = {"algorithm": cell.label, "env_id": cell.env_id, "seed": cell.seed}
        if cell in errors:
            rows.append({**common, "status": "failed", "folder": str(cell.folder), "error": errors[cell].strip()})
            continue
        result = load_cell(cell)
        assert result is not None
        rows += [{**common, "status": "finished", **row, "folder": str(cell.folder), "error": ""} for row in _rows(result)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _rows(result: CellResult) -> list[dict[str, Any]]:
    return [
        {
            "evaluation": index,
            "grid_timesteps": result.grid[index],
            "timesteps": result.timesteps[index],
            "mean_reward": float(result.rewards[index].mean()),
            "std_reward": float(result.rewards[index].std()),
            "mean_ep_length": float(result.episode_lengths[index].mean()),
            "train_seconds": result.train_seconds[index],
            "train_cpu_seconds": result.train_cpu_seconds[index],
            "eval_seconds": result.eval_seconds,
        }
        for index in range(len(result.grid))
    ]
