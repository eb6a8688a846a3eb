"""The report of a comparison: the figures, tables, notes and plots put into files and onto the terminal."""

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from sb3_episodic_a2c.guards.files import atomic_write
from sb3_episodic_a2c.tools.comparison.cells import Cell, finished_results, one_per_pair, seeds_by_env
from sb3_episodic_a2c.tools.comparison.fairness import (
    code_notes,
    fairness_notes,
    format_seeds,
    scale_lines,
    version_lines,
)
from sb3_episodic_a2c.tools.comparison.normalization import Scale, random_policy_scores, scales
from sb3_episodic_a2c.tools.comparison.plots import plot_all
from sb3_episodic_a2c.tools.comparison.statistics import Estimate
from sb3_episodic_a2c.tools.comparison.summaries import Overall, Summary, summarize, summarize_overall
from sb3_episodic_a2c.tools.comparison.tables import cost_table, markdown_table, print_table, score_table, winner_table
from sb3_episodic_a2c.tools.versions import versions


@dataclass
class _Findings:
    """All that the report tells."""

    cells: Sequence[Cell]
    summaries: list[Summary]
    overall: list[Overall]
    winners: list[list[str]] | None
    """Rows of a table, the header first; None if there is one algorithm."""
    scale: dict[str, Scale]
    failed: pd.DataFrame
    notes: list[str]
    versions: list[str]


def write_report(
    frame: pd.DataFrame,
    cells: Sequence[Cell],
    output: Path,
    configs: dict[str, str],
    console: Console,
    rng: np.random.Generator | None = None,
) -> None:
    """
    Write ``report.md``, ``results.csv`` (the frame), ``results.json`` and the plots, and print the tables.

    :param frame: See :func:`sb3_episodic_a2c.tools.comparison.frame.results_frame`
    :param cells: The cells whose results it holds
    :param output: Folder to write to
    :param configs: Files of hyperparameters that the user gave
    :param console: Where to print to
    :param rng: For the bootstrap; by default the same every time
    """
    rng = np.random.default_rng(0) if rng is None else rng
    output.mkdir(parents=True, exist_ok=True)
    # First, so that it is there even if the rest fails
    _write(output / "results.csv", frame.to_csv(index=False))
    scale = scales(frame, random_policy_scores(cells, output / "random_policy.json"))
    summaries = summarize(frame, rng)
    notes = fairness_notes(cells, frame, configs)
    if unusable := [line for env_id, line in zip(scale, scale_lines(scale), strict=True) if not scale[env_id].is_usable]:
        notes.append(f"Not normalised: {'; '.join(unusable)}.")
    overall = summarize_overall(summaries, scale, rng)
    findings = _Findings(
        cells=cells,
        summaries=summaries,
        overall=overall,
        winners=winner_table(summaries, overall) if len({summary.algorithm for summary in summaries}) > 1 else None,
        scale=scale,
        failed=frame[frame["status"] == "failed"],
        notes=notes,
        versions=version_lines(cells),
    )

    _write(output / "results.json", _json(findings))
    plots = plot_all(frame, summaries, findings.overall, scale, output, rng)
    _write(output / "report.md", _markdown(findings, plots))

    if findings.winners is not None:
        print_table("Who is better", findings.winners, console)
    print_table("What they reach", score_table(summaries, findings.overall), console)
    print_table("What they take (medians)", cost_table(summaries), console)
    for note in code_notes(finished_results(cells)):
        console.print(note, markup=False)
    for failure in findings.failed.itertuples():
        text = f"FAILED: {failure.algorithm} on {failure.env_id}, seed {failure.seed}: {_error_line(failure.error)}"
        console.print(text, markup=False)
    console.print(f"Wrote report.md, results.csv, results.json and plots to {output}/", markup=False)


def _error_line(error: str) -> str:
    """The line of a traceback that names the exception, which lines of a tensor may follow."""
    lines = error.strip().splitlines()
    last_frame = max((index for index, line in enumerate(lines) if line.startswith('  File "')), default=-1)
    return next((line for line in lines[last_frame + 1 :] if not line.startswith(" ")), lines[-1])


# ------------------------------------------------------------------ report.md


def _markdown(findings: _Findings, plots: Sequence[Path]) -> str:
    budgets = {cell.env_id: f"{cell.env_id} {cell.total_timesteps:,}" for cell in findings.cells}
    parts = [
        "# Comparison",
        f"Env steps: {', '.join(budgets.values())}.",
        *_winners(findings),
        "## What they reach",
        markdown_table(score_table(findings.summaries, findings.overall)),
        "IQM: mean of the runs without the lowest and the highest quarter, with a stratified bootstrap interval. Area: mean "
        "reward over the budget (trapezoids between evaluations). P: share of pairs of runs in which the first algorithm's is "
        "better, ties half; beside it the same for equal seeds only.",
    ]
    if findings.overall:
        parts.append(_overall_text(findings.overall[0], findings.scale))
    parts += ["## What they take", markdown_table(cost_table(findings.summaries))]
    parts.append(
        "Medians over runs; a run that never reached the threshold counts as infinite. Reached: the first evaluation during "
        "training at or above it, which may be luck. Stayed there: the first from which on all are, to the last."
    )
    if len(findings.failed):
        rows = [["environment", "algorithm", "seed", "error"]]
        rows += [[row.env_id, row.algorithm, str(row.seed), _error_line(row.error)] for row in findings.failed.itertuples()]
        parts += ["## Failed", markdown_table(rows)]
    parts += ["## Plots", *(f"![{path.stem}]({path.name})" for path in plots)]
    parts += ["## Fairness", "\n".join(f"- {note}" for note in findings.notes)]
    rows = [["environment", "algorithm", "hyperparameters"]]
    rows += [[cell.env_id, cell.label, _hyperparams_text(cell)] for cell in one_per_pair(findings.cells)]
    parts += ["## Hyperparameters", markdown_table(rows)]
    parts += ["## Versions", "\n".join(f"- {line}" for line in findings.versions)]
    if len(findings.versions) > 1:
        parts.append("The runs were not all made with the same code on the same machine: times may not compare.")
    return "\n\n".join(parts) + "\n"


def _winners(findings: _Findings) -> list[str]:
    if findings.winners is None:
        return []
    table = markdown_table(findings.winners)
    text = "Better or worse: the interval of the difference does not hold 0. Training: median over runs, in wall time."
    return ["## Who is better", table, text]


def _overall_text(one: Overall, scale: dict[str, Scale]) -> str:
    return (
        f"All: over {', '.join(one.env_ids)}, with the seeds that all algorithms have finished on all of them "
        f"({format_seeds(one.seeds)}), so that each weighs the same; scores normalised per environment. Mean and std are of "
        f"all these runs, P is the mean over environments. {'; '.join(scale_lines(scale))}."
    )


def _hyperparams_text(cell: Cell) -> str:
    return ", ".join(f"{name}: {value}" for name, value in sorted(cell.hyperparams.items()))


# ------------------------------------------------------------------ results.json


def _json(findings: _Findings) -> str:
    cells = findings.cells
    report = {
        "algorithms": list(dict.fromkeys(cell.label for cell in cells)),
        "seeds": seeds_by_env(cells),
        "total_timesteps": {cell.env_id: cell.total_timesteps for cell in cells},
        "n_evaluations": {cell.env_id: cell.n_evaluations for cell in cells},
        "eval_episodes": cells[0].eval_episodes,
        "summaries": [_plain(summary) for summary in findings.summaries],
        "overall": [_plain(whole) for whole in findings.overall],
        "normalisation": {env_id: _plain(one) for env_id, one in findings.scale.items()},
        "failed": findings.failed[["env_id", "algorithm", "seed", "error"]].to_dict("records"),
        "hyperparams": [
            {"env_id": cell.env_id, "algorithm": cell.label, **_plain(cell.settings["hyperparams"])}
            for cell in one_per_pair(cells)
        ],
        "notes": findings.notes,
        "versions": findings.versions,
        "reported_with": {**versions(), "platform": platform.platform(), "n_cpus": os.cpu_count()},
    }
    return json.dumps(report, indent=2, allow_nan=False, default=str)


def _plain(value: Any) -> Any:
    """The value as JSON has it: without arrays and named tuples, and with null for NaN and infinity."""
    if isinstance(value, Estimate):
        return {name: _plain(number) for name, number in value._asdict().items()}
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.rstrip("\n").encode() + b"\n")
