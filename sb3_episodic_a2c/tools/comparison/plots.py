"""The plots of a comparison, as PNG and SVG."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, Locator, LogLocator, MaxNLocator, NullLocator

from sb3_episodic_a2c.tools.comparison.normalization import Scale, reward_threshold
from sb3_episodic_a2c.tools.comparison.statistics import iqm_band, profile_band
from sb3_episodic_a2c.tools.comparison.summaries import METRICS, Overall, Summary, comparable_envs

STYLES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#E69F00", (0, (5, 1)), "v"),
    ("#56B4E9", (0, (3, 1, 1, 1)), "P"),
    ("#000000", (0, (1, 1)), "X"),
)
"""Colour, line and marker of the algorithms in their order. The colour-blind can tell Okabe and Ito's colours apart."""

PANELS_PER_ROW = 3


def plot_all(
    frame: pd.DataFrame,
    summaries: Sequence[Summary],
    overall: Sequence[Overall],
    scale: dict[str, Scale],
    output: Path,
    rng: np.random.Generator,
) -> list[Path]:
    """
    :param frame: See :func:`sb3_episodic_a2c.tools.comparison.frame.results_frame`
    :param summaries: See :func:`sb3_episodic_a2c.tools.comparison.summaries.summarize`
    :param overall: See :func:`sb3_episodic_a2c.tools.comparison.summaries.summarize_overall`
    :param scale: See :func:`sb3_episodic_a2c.tools.comparison.normalization.scales`
    :param output: Folder to write to
    :param rng: For the bootstrap
    :return: The PNG files; beside each is an SVG
    """
    figures = {
        "learning_curves": plot_curves(frame, rng, over_time=False),
        "learning_curves_time": plot_curves(frame, rng, over_time=True),
        "scores": plot_scores(summaries, overall),
        "performance_profile": plot_profile(summaries, scale, rng),
    }
    paths = []
    for name, figure in figures.items():
        if figure is None:
            continue
        path = output / f"{name}.png"
        figure.savefig(path, dpi=120)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        paths.append(path)
    return paths


def _figure(width: float, height: float) -> Figure:
    # Without pyplot, which would choose a window system and keep the figure alive
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _styles(algorithms: Sequence[str]) -> dict[str, tuple[str, Any, str]]:
    return {algorithm: STYLES[index % len(STYLES)] for index, algorithm in enumerate(algorithms)}


def _legend(figure: Figure, algorithms: Sequence[str], extra: Sequence[Line2D] = (), with_markers: bool = True) -> None:
    handles = [
        Line2D([], [], color=color, linestyle=line, marker=marker * with_markers, linewidth=2, label=algorithm)
        for algorithm, (color, line, marker) in _styles(algorithms).items()
    ]
    figure.legend(handles=[*handles, *extra], loc="outside lower center", ncols=4, frameon=False)


def _log_locator(low: float, high: float) -> Locator:
    """Ticks of a logarithmic axis: at least two, and no more than fit."""
    if high / low < 5:
        return MaxNLocator(3)
    return LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,), numticks=7)


def plot_curves(frame: pd.DataFrame, rng: np.random.Generator, over_time: bool) -> Figure | None:
    """
    Learning curves: IQM over runs of the mean reward of each evaluation, with 95% bootstrap intervals.

    :param frame: See :func:`sb3_episodic_a2c.tools.comparison.frame.results_frame`
    :param rng: For the bootstrap
    :param over_time: True: over wall time of training (median over runs). False: over env steps
    :return: The figure, a panel for each environment; None if nothing has finished
    """
    algorithms = list(frame["algorithm"].unique())
    finished = frame[frame["status"] == "finished"]
    env_ids = list(finished["env_id"].unique())
    if not env_ids:
        return None
    n_columns = min(PANELS_PER_ROW, len(env_ids))
    n_rows = math.ceil(len(env_ids) / n_columns)
    figure = _figure(max(4.2 * n_columns, 5.5), 3.1 * n_rows + 0.6)
    panels = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axes in panels[len(env_ids) :]:
        axes.set_axis_off()
    for axes, env_id in zip(panels, env_ids, strict=False):
        for algorithm, (color, line, marker) in _styles(algorithms).items():
            runs = finished[(finished["env_id"] == env_id) & (finished["algorithm"] == algorithm)]
            if not len(runs):
                continue
            table = runs.pivot(index="seed", columns="evaluation", values="mean_reward").to_numpy()
            by_evaluation = runs.groupby("evaluation")
            x = by_evaluation["train_seconds" if over_time else "timesteps"].median().to_numpy()
            value, low, high = iqm_band(table, rng)
            # A logarithmic axis has no zero, and the first evaluation is at time 0
            shown = slice(1 if over_time else 0, None)
            axes.plot(x[shown], value[shown], color=color, linestyle=line, marker=marker, markersize=3.5, linewidth=1.8)
            axes.fill_between(x[shown], low[shown], high[shown], color=color, alpha=0.18, linewidth=0)
        threshold = reward_threshold(env_id)
        if threshold is not None:
            axes.axhline(threshold, color="#666666", linestyle=(0, (1, 2)), linewidth=1)
        axes.set_title(env_id, fontsize=11)
        axes.grid(alpha=0.3)
        if over_time:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(_log_locator(*axes.get_xlim()))
            axes.xaxis.set_minor_locator(NullLocator())
            # No SI prefixes: 100m would be read as minutes
            axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:g}" if seconds < 10_000 else f"{seconds / 1_000:g}k")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in panels[max(0, len(env_ids) - n_columns) : len(env_ids)]:
        axes.set_xlabel("training wall time (s, log scale)" if over_time else "env steps")
    for index in range(0, len(env_ids), n_columns):
        panels[index].set_ylabel("reward of an episode")
    n_runs = finished.groupby(["env_id", "algorithm"])["seed"].nunique()
    runs_text = f"{n_runs.max()}" if n_runs.min() == n_runs.max() else f"{n_runs.min()} to {n_runs.max()}"
    figure.suptitle(f"Greedy evaluations: IQM over {runs_text} runs, 95% bootstrap interval", fontsize=12)
    threshold_line = Line2D([], [], color="#666666", linestyle=(0, (1, 2)), label="reward threshold")
    _legend(figure, algorithms, [threshold_line] if any(reward_threshold(env_id) is not None for env_id in env_ids) else [])
    return figure


def plot_scores(summaries: Sequence[Summary], overall: Sequence[Overall]) -> Figure:
    """
    Both metrics: IQM with its 95% interval.

    :param summaries: See :func:`sb3_episodic_a2c.tools.comparison.summaries.summarize`
    :param overall: See :func:`sb3_episodic_a2c.tools.comparison.summaries.summarize_overall`
    :return: The figure: a row for each environment, a column for each metric
    """
    algorithms = list(dict.fromkeys(summary.algorithm for summary in summaries))
    groups: dict[str, list[Any]] = {}
    for summary in summaries:
        groups.setdefault(summary.env_id, []).append(summary)
    if overall:
        groups["all, normalised"] = list(overall)
    height = 0.26 * len(algorithms) + 0.62
    figure = _figure(9.0, height * len(groups) + 0.9)
    panels = figure.subplots(len(groups), len(METRICS), squeeze=False)
    for row, (name, rows) in zip(panels, groups.items(), strict=True):
        for axes, (metric, title) in zip(row, METRICS.items(), strict=True):
            for index, one in enumerate(rows):
                color, _, marker = _styles(algorithms)[one.algorithm]
                value, low, high = one.iqm[metric]
                axes.barh(index, high - low, left=low, height=0.55, color=color, alpha=0.35)
                axes.use_sticky_edges = False
                axes.plot(value, index, marker=marker, color=color, markersize=6)
            axes.set_yticks(range(len(rows)), [one.algorithm for one in rows] if metric == "final" else [""] * len(rows))
            axes.set_ylim(len(rows) - 0.45, -0.55)
            axes.grid(axis="x", alpha=0.3)
            axes.margins(x=0.08)
            axes.set_title(f"{name}: {title}", fontsize=10, loc="left")
            axes.xaxis.set_major_locator(MaxNLocator(6))
    for axes, text in zip(panels[-1], ["reward of an episode", "mean reward over the budget"], strict=True):
        axes.set_xlabel("normalised score" if overall else text)
    figure.suptitle(
        "IQM over runs, 95% stratified bootstrap interval" + (" (in rewards, where not normalised)" if overall else "")
    )
    return figure


def plot_profile(summaries: Sequence[Summary], scale: dict[str, Scale], rng: np.random.Generator) -> Figure | None:
    """
    Performance profile: share of runs that score above a threshold, averaged over environments.

    :param summaries: See :func:`sb3_episodic_a2c.tools.comparison.summaries.summarize`
    :param scale: See :func:`sb3_episodic_a2c.tools.comparison.normalization.scales`
    :param rng: For the bootstrap
    :return: The figure; None without an environment that has a usable scale and finished runs of every algorithm
    """
    algorithms = list(dict.fromkeys(summary.algorithm for summary in summaries))
    env_ids = comparable_envs(summaries, scale)
    if not env_ids:
        return None
    figure = _figure(9.0, 4.0)
    panels = figure.subplots(1, len(METRICS), sharey=True)
    for axes, (metric, title) in zip(panels, METRICS.items(), strict=True):
        strata = {
            algorithm: [
                scale[summary.env_id].normalize(summary.scores[metric])
                for summary in summaries
                if summary.algorithm == algorithm and summary.env_id in env_ids
            ]
            for algorithm in algorithms
        }
        scores = np.concatenate([sample for samples in strata.values() for sample in samples])
        low, high = float(scores.min()), float(scores.max())
        # One run far below random actions must not squeeze all others together
        low = max(low, min(-0.5, high - 0.5))
        # A width even where all scores are equal
        margin = max(0.02 * (high - low), 0.01)
        thresholds = np.linspace(low - margin, high + margin, 201)
        for algorithm, (color, line, _) in _styles(algorithms).items():
            value, lower, upper = profile_band(strata[algorithm], thresholds, rng)
            axes.plot(thresholds, value, color=color, linestyle=line, linewidth=1.8, drawstyle="steps-post")
            axes.fill_between(thresholds, lower, upper, color=color, alpha=0.18, linewidth=0, step="post")
        axes.set(title=title, xlabel="normalised score (0: random actions, 1: reference)", ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of runs above that score")
    figure.suptitle(f"Performance profile over {len(env_ids)} environment{'s' * (len(env_ids) > 1)}, 95% bootstrap interval")
    _legend(figure, algorithms, with_markers=False)
    return figure
