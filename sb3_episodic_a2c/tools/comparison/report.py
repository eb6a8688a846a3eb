"""What a comparison found: figures with intervals, tables for the terminal and in Markdown, CSV and JSON."""

import contextlib
import itertools
import json
import math
import os
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from sb3_episodic_a2c.files import atomic_write
from sb3_episodic_a2c.tools.comparison import statistics
from sb3_episodic_a2c.tools.comparison.cells import EVAL_SEED, Cell, CellResult, load_cell, versions
from sb3_episodic_a2c.tools.comparison.statistics import Estimate
from sb3_episodic_a2c.tools.zoo import ALGORITHMS, config_path

METRICS = {"final": "final evaluation", "area": "area under the curve"}
"""Both in units of reward: the area is the mean reward over the budget."""

RANDOM_EPISODES = 100

RANDOM_TIMESTEPS = 100_000
"""Random actions are given up after so many env steps, if not one of their episodes has ended by then."""


@dataclass
class Summary:
    """One algorithm on one environment."""

    env_id: str
    algorithm: str
    seeds: list[int]
    """Of finished runs."""
    n_failed: int
    scores: dict[str, np.ndarray] = field(repr=False)
    """Metric: one score a run, in the order of the seeds; shape ``(n_seeds,)``"""
    iqm: dict[str, Estimate]
    mean: dict[str, float]
    std: dict[str, float]
    probability: dict[str, Estimate] | None
    """Metric: that a run of the first algorithm is better; None for itself."""
    n_pairs: int
    """Seeds with a finished run of this and of the first algorithm."""
    n_pairs_won: dict[str, float] | None
    """Metric: on how many of these the first algorithm is better, a tie counting half; None for itself."""
    n_solved: int
    """Runs of which an evaluation reached the threshold."""
    timesteps_to_threshold: float
    """Env steps until then, median over all runs; infinite unless more than half got there, NaN without threshold or runs."""
    seconds_to_threshold: float
    """Wall time of training until then, likewise."""
    timesteps_to_stay: float
    """Env steps until the first evaluation from which on all are at or above the threshold, likewise."""
    timesteps: float
    """Env steps at the end of training, median over runs."""
    train_seconds: float
    eval_seconds: float
    timesteps_per_second: float

    @property
    def n_seeds(self) -> int:
        return len(self.seeds)


@dataclass
class Scale:
    """How the scores of an environment are normalised: ``random`` becomes 0 and ``reference`` 1."""

    random: float
    reference: float
    reference_is_threshold: bool

    @property
    def is_usable(self) -> bool:
        return self.reference > self.random

    def normalize(self, scores: np.ndarray) -> np.ndarray:
        return (scores - self.random) / (self.reference - self.random)


@dataclass
class Overall:
    """One algorithm over all environments, on normalised scores."""

    algorithm: str
    env_ids: list[str]
    """Environments that count: those with a usable scale and finished runs of every algorithm."""
    seeds: list[int]
    """Seeds that count: those which every algorithm has finished on every one of them, so that all weigh the same."""
    iqm: dict[str, Estimate]
    mean: dict[str, float]
    std: dict[str, float]
    """Between all runs, whatever their environment."""
    probability: dict[str, Estimate] | None


# ------------------------------------------------------------------ figures


def summarize(frame: pd.DataFrame, rng: np.random.Generator) -> list[Summary]:
    """
    :param frame: See :func:`sb3_episodic_a2c.tools.comparison.grid.results_frame`
    :param rng: For the bootstrap
    :return: One for each environment and algorithm, in the order of the frame
    """
    summaries: list[Summary] = []
    for env_id in frame["env_id"].unique():
        rows = frame[frame["env_id"] == env_id]
        for algorithm in rows["algorithm"].unique():
            first = next((summary for summary in summaries if summary.env_id == env_id), None)
            summaries.append(_summarize(env_id, algorithm, rows[rows["algorithm"] == algorithm], first, rng))
    return summaries


def _summarize(env_id: str, algorithm: str, rows: pd.DataFrame, first: Summary | None, rng: np.random.Generator) -> Summary:
    runs = [run for _, run in rows[rows["status"] == "finished"].groupby("seed")]
    scores = {
        "final": np.array([run["mean_reward"].iloc[-1] for run in runs]),
        "area": np.array([statistics.normalized_area(run["timesteps"], run["mean_reward"]) for run in runs]),
    }
    seeds = [int(run["seed"].iloc[0]) for run in runs]
    nothing = Estimate(math.nan, math.nan, math.nan)
    probability, pairs, n_pairs_won = None, [], None
    if first is not None:
        pairs = [seed for seed in seeds if seed in first.seeds]
        n_pairs_won = {
            metric: _n_wins(_of_seeds(pairs, first.seeds, first.scores[metric]), _of_seeds(pairs, seeds, scores[metric]))
            for metric in METRICS
        }
        probability = {
            metric: statistics.probability_of_improvement([first.scores[metric]], [scores[metric]])
            if runs and first.n_seeds
            else nothing
            for metric in METRICS
        }
    threshold = reward_threshold(env_id)
    reached = [_is_reached(run, threshold) for run in runs] if threshold is not None else []
    runs_reached = list(zip(runs, reached, strict=False))
    moments = {metric: statistics.mean_and_std(scores[metric]) if runs else (math.nan, math.nan) for metric in METRICS}
    ends = [run.iloc[-1] for run in runs]
    return Summary(
        env_id=env_id,
        algorithm=algorithm,
        seeds=seeds,
        n_failed=int((rows["status"] == "failed").sum()),
        scores=scores,
        iqm={metric: statistics.stratified_iqm([scores[metric]], rng) if runs else nothing for metric in METRICS},
        mean={metric: mean for metric, (mean, _) in moments.items()},
        std={metric: std for metric, (_, std) in moments.items()},
        probability=probability,
        n_pairs=len(pairs),
        n_pairs_won=n_pairs_won,
        n_solved=sum(bool(is_reached.any()) for is_reached in reached),
        timesteps_to_threshold=_median([_first(run["timesteps"], is_reached) for run, is_reached in runs_reached]),
        seconds_to_threshold=_median([_first(run["train_seconds"], is_reached) for run, is_reached in runs_reached]),
        timesteps_to_stay=_median([_first(run["timesteps"], _stays(is_reached)) for run, is_reached in runs_reached]),
        timesteps=_median([end["timesteps"] for end in ends]),
        train_seconds=_median([end["train_seconds"] for end in ends]),
        eval_seconds=_median([end["eval_seconds"] for end in ends]),
        timesteps_per_second=_median([end["timesteps"] / end["train_seconds"] for end in ends]),
    )


def _of_seeds(wanted: Sequence[int], seeds: list[int], scores: np.ndarray) -> np.ndarray:
    """The scores, of ``(n_seeds,)``, of some seeds: ``(len(wanted),)``."""
    return scores[[seeds.index(seed) for seed in wanted]]


def _n_wins(ours: np.ndarray, others: np.ndarray) -> float:
    return float(np.sum(ours > others) + np.sum(ours == others) / 2)


def _is_reached(run: pd.DataFrame, threshold: float) -> np.ndarray:
    """``(n_evaluations,)`` booleans: where a run is at or above a threshold, not counting luck before training."""
    return ((run["mean_reward"] >= threshold) & (run["evaluation"] > 0)).to_numpy()


def _stays(is_reached: np.ndarray) -> np.ndarray:
    """The same, but only where it holds at all later evaluations, too."""
    return np.logical_and.accumulate(is_reached[::-1])[::-1]


def _first(values: pd.Series, condition: np.ndarray) -> float:
    """The value where a condition first holds; infinity if it never does."""
    return float(values.to_numpy()[condition.argmax()]) if condition.any() else math.inf


def _median(values: list[float]) -> float:
    return float(np.median(values)) if values else math.nan


def reward_threshold(env_id: str) -> float | None:
    """The mean reward at which an environment says that it is solved."""
    return gym.spec(env_id).reward_threshold


def scales(frame: pd.DataFrame, random_scores: dict[str, float]) -> dict[str, Scale]:
    """
    :param frame: See :func:`sb3_episodic_a2c.tools.comparison.grid.results_frame`
    :param random_scores: Environment: mean reward of random actions
    :return: Environment: 0 is what random actions get, 1 the environment's own threshold, which depends on nothing that is
        compared; without a threshold, the best final evaluation of any run
    """
    result = {}
    for env_id in frame["env_id"].unique():
        finished = frame[(frame["env_id"] == env_id) & (frame["status"] == "finished")]
        threshold = reward_threshold(env_id)
        best = finished.groupby(["algorithm", "seed"])["mean_reward"].last().max() if len(finished) else math.nan
        reference = float(best) if threshold is None else threshold
        result[env_id] = Scale(random_scores[env_id], reference, threshold is not None)
    return result


def random_policy_score(env_id: str, n_episodes: int = RANDOM_EPISODES, env_kwargs: dict[str, Any] | None = None) -> float:
    """
    :param env_id: Id of the environment
    :param env_kwargs: What it is made with
    :param n_episodes: Number of episodes
    :return: Mean reward of episodes of random actions, the same ones every time; of fewer than ``n_episodes`` if they take
        more than :data:`RANDOM_TIMESTEPS` env steps
    :raises RuntimeError: Not one of them has ended by then
    """
    env = gym.make(env_id, **(env_kwargs or {}))
    env.action_space.seed(EVAL_SEED)
    totals: list[float] = []
    n_steps = 0
    with contextlib.closing(env):
        while len(totals) < n_episodes and n_steps < RANDOM_TIMESTEPS:
            env.reset(seed=EVAL_SEED + len(totals))
            total, done = 0.0, False
            while not done and n_steps < RANDOM_TIMESTEPS:
                _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
                n_steps += 1
                total += float(reward)
                done = terminated or truncated
            if done:
                totals.append(total)
    if not totals:
        raise RuntimeError(f"No episode of random actions has ended within {RANDOM_TIMESTEPS:,} env steps.")
    return sum(totals) / len(totals)


def random_policy_scores(cells: Sequence[Cell], path: Path) -> dict[str, float]:
    """:func:`random_policy_score` of the environments of cells, which a file keeps; NaN for those where it fails."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        kept = {}
    scores: dict[str, float] = {}
    for cell in cells:
        if cell.env_id in scores:
            continue
        env_kwargs = cell.eval_env_kwargs
        key = f"{cell.env_id} {json.dumps(env_kwargs, default=str, sort_keys=True)}" if env_kwargs else cell.env_id
        try:
            if key not in kept:
                kept[key] = random_policy_score(cell.env_id, env_kwargs=env_kwargs)
                _write(path, json.dumps(kept, indent=2))
            scores[cell.env_id] = kept[key]
        except Exception as error:
            # Whatever the environment may raise: the trainings must not be lost for it
            warnings.warn(f"Scores on {cell.env_id} are not normalised, since random actions failed: {error}", stacklevel=2)
            scores[cell.env_id] = math.nan
    return scores


def summarize_overall(summaries: Sequence[Summary], scale: dict[str, Scale], rng: np.random.Generator) -> list[Overall]:
    """
    :param summaries: See :func:`summarize`
    :param scale: See :func:`scales`
    :param rng: For the bootstrap
    :return: One for each algorithm; empty with fewer than two environments that count, or without a seed that they share
    """
    by_name = {(summary.env_id, summary.algorithm): summary for summary in summaries}
    algorithms = list(dict.fromkeys(summary.algorithm for summary in summaries))
    env_ids = [
        env_id
        for env_id in dict.fromkeys(summary.env_id for summary in summaries)
        if scale[env_id].is_usable and all(by_name[env_id, algorithm].n_seeds for algorithm in algorithms)
    ]
    counting = [summary for summary in summaries if summary.env_id in env_ids]
    seeds = sorted(set.intersection(*(set(summary.seeds) for summary in counting))) if counting else []
    if len(env_ids) < 2 or not seeds:
        return []

    def strata(algorithm: str, metric: str) -> list[np.ndarray]:
        chosen = [by_name[env_id, algorithm] for env_id in env_ids]
        return [scale[one.env_id].normalize(_of_seeds(seeds, one.seeds, one.scores[metric])) for one in chosen]

    result = []
    for algorithm in algorithms:
        moments = {metric: statistics.mean_and_std(np.concatenate(strata(algorithm, metric))) for metric in METRICS}
        probability = None
        if algorithm != algorithms[0]:
            probability = {
                metric: statistics.probability_of_improvement(strata(algorithms[0], metric), strata(algorithm, metric))
                for metric in METRICS
            }
        result.append(
            Overall(
                algorithm=algorithm,
                env_ids=env_ids,
                seeds=seeds,
                iqm={metric: statistics.stratified_iqm(strata(algorithm, metric), rng) for metric in METRICS},
                mean={metric: mean for metric, (mean, _) in moments.items()},
                std={metric: std for metric, (_, std) in moments.items()},
                probability=probability,
            )
        )
    return result


# ------------------------------------------------------------------ tables


def score_table(summaries: Sequence[Summary], overall: Sequence[Overall]) -> list[list[str]]:
    """Rows of text, the header first: what the algorithms reach."""
    first = summaries[0].algorithm
    header = ["environment", "algorithm", "final evaluation, IQM (95% interval)", "final, mean ± std"]
    header += ["area under the curve, IQM (95% interval)", "area, mean ± std", f"P({first} is better), final"]
    header += [f"{first} is better on, final", "seeds"]
    rows = [header]
    for summary in summaries:
        row = [summary.env_id, summary.algorithm]
        for metric in METRICS:
            row += [_interval(summary.iqm[metric]), f"{_number(summary.mean[metric])} ± {_number(summary.std[metric])}"]
        row.append(_interval(summary.probability["final"], 2) if summary.probability else "")
        row.append(f"{summary.n_pairs_won['final']:g} of {summary.n_pairs} seeds" if summary.n_pairs_won else "")
        row.append(f"{summary.n_seeds}" + (f", {summary.n_failed} FAILED" if summary.n_failed else ""))
        rows.append(row)
    for whole in overall:
        row = ["all, normalised", whole.algorithm]
        for metric in METRICS:
            row += [_interval(whole.iqm[metric], 2), f"{_number(whole.mean[metric], 2)} ± {_number(whole.std[metric], 2)}"]
        rows.append([*row, _interval(whole.probability["final"], 2) if whole.probability else "", "", f"{len(whole.seeds)}"])
    return rows


def cost_table(summaries: Sequence[Summary]) -> list[list[str]]:
    """Rows of text, the header first: what the algorithms take."""
    header = ["environment", "algorithm", "threshold", "seeds that reached it", "env steps until then", "training until then"]
    header += ["env steps until it stayed there"]
    rows = [[*header, "env steps in all", "training in all", "env steps/s", "evaluations"]]
    for summary in summaries:
        threshold = reward_threshold(summary.env_id)
        row = [summary.env_id, summary.algorithm]
        if threshold is None:
            row += ["none", "", "", "", ""]
        else:
            row += [f"{threshold:g}", f"{summary.n_solved} of {summary.n_seeds}"]
            row += [_number(summary.timesteps_to_threshold, 0), _seconds(summary.seconds_to_threshold)]
            row.append(_number(summary.timesteps_to_stay, 0))
        row += [_number(summary.timesteps, 0), _seconds(summary.train_seconds), _number(summary.timesteps_per_second, 0)]
        rows.append([*row, _seconds(summary.eval_seconds)])
    return rows


def _number(value: float, digits: int | None = None) -> str:
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "not reached"
    if digits is None:
        digits = 1 if abs(value) >= 10 else 2
    text = f"{value:,.{digits}f}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text


def _interval(estimate: Estimate, digits: int | None = None) -> str:
    if math.isnan(estimate.value):
        return "-"
    if math.isnan(estimate.low):
        return f"{_number(estimate.value, digits)} (no interval)"
    return f"{_number(estimate.value, digits)} ({_number(estimate.low, digits)} to {_number(estimate.high, digits)})"


def _seconds(value: float) -> str:
    return f"{_number(value)} s" if math.isfinite(value) else _number(value)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """
    :param rows: The header first
    :return: Markdown, without an end of line
    """
    lines = [list(rows[0]), ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines)


def print_table(title: str, rows: Sequence[Sequence[str]], console: Console) -> None:
    """
    Print a table to the terminal, a line between environments. One that is too wide becomes several with the same first two
    columns, the names, so that no name is cut and no figure falls apart.
    """
    # Headers may be broken between words
    widths = [
        max(*map(len, header.split()), *(len(row[index]) for row in rows[1:]), 1) for index, header in enumerate(rows[0])
    ]
    parts: list[list[int]] = [[]]
    for column in range(2, len(widths)):
        # A column takes three more for its border and its margins
        if parts[-1] and sum(widths[index] + 3 for index in (0, 1, *parts[-1], column)) + 1 > console.width:
            parts.append([])
        parts[-1].append(column)
    for part in parts:
        table = Table(title=title if part is parts[0] else None, title_justify="left")
        columns = [0, 1, *part]
        for index in columns:
            table.add_column(rows[0][index], width=widths[index], overflow="fold")
        for row, following in zip(rows[1:], [*rows[2:], None], strict=True):
            table.add_row(*(row[index] for index in columns), end_section=following is None or following[0] != row[0])
        console.print(table)


# ------------------------------------------------------------------ words


def fairness_notes(cells: Sequence[Cell], frame: pd.DataFrame, configs: dict[str, str]) -> list[str]:
    """
    :param cells: All cells
    :param frame: Their results
    :param configs: Files of hyperparameters that the user gave
    :return: What a reader must know to judge the figures, a paragraph each
    """
    one = cells[0]
    algorithms = list(dict.fromkeys(cell.label for cell in cells))
    envs_by_seeds: dict[str, list[str]] = {}
    for env_id, seeds in _seeds(cells).items():
        envs_by_seeds.setdefault(_ranges(seeds), []).append(env_id)
    seeds_text = "; ".join(
        text if len(envs_by_seeds) == 1 else f"{text} ({', '.join(env_ids)})" for text, env_ids in envs_by_seeds.items()
    )
    finished = frame[frame["status"] == "finished"]
    beyond = int((finished["timesteps"] - finished["grid_timesteps"]).max()) if len(finished) else 0
    by_env = {cell.env_id: cell.n_evaluations for cell in cells}
    n_evaluations = (
        f"{one.n_evaluations}"
        if len(set(by_env.values())) == 1
        else ", ".join(f"{number} ({env_id})" for env_id, number in by_env.items())
    )
    precision = f"at the first step beyond, by at most {beyond}" if beyond else "met to the step"
    results = _results(cells)
    notes = [
        *_code_notes(results),
        "Same budget for all: a training is stopped at the first step that reaches it, without a last update. "
        "Env steps are counted over all environments of a training, used or not.",
        f"Same evaluations for all: {one.eval_episodes} greedy episodes before training and at the same "
        f"{n_evaluations} points ({precision}), in environments of their own; episode i (from 0) of a "
        f"training with seed s starts from environment seed {EVAL_SEED:,} + {one.eval_episodes} s + i every time, whatever "
        "the algorithm. The environments are as they are registered, with the `env_kwargs` of the hyperparameters that all "
        "algorithms share, but without those that only shorten training (`max_episode_steps`), and in the wrappers that the "
        "policy was trained in (`env_wrapper`, `frame_stack`). "
        "Where the training normalises, observations are normalised by its statistics; rewards are "
        "the environment's own.",
        f"Same seeds for all: {seeds_text}. They seed network, actions and environments.",
        "Times are wall times of the training alone, on one torch thread, without evaluations; env steps/s likewise."
        + _turns_note(results),
        _processor_note(finished),
        "The final evaluation is that of the last policy, not of the best one.",
    ]
    for label in algorithms:
        notes.append(_origin(label, next(cell for cell in cells if cell.label == label).algorithm, configs))
    own = [
        f"{cell.label} on {cell.env_id}: {int(cell.hyperparams['n_timesteps']):,}"
        for cell in _one_a_pair(cells)
        if int(cell.hyperparams["n_timesteps"]) != cell.total_timesteps
    ]
    if own:
        notes.append(
            "Hyperparameters that were made for another budget than the one here (learning rates that fall to zero do so over "
            f"the budget here): {'; '.join(own)}."
        )
    return notes


def _processor_note(finished: pd.DataFrame) -> str:
    ends = finished.groupby(["algorithm", "env_id", "seed"]).last()
    share = ends["train_cpu_seconds"] / ends["train_seconds"]
    return (
        f"Of that time they were on a processor for {100 * share.median():.0f}% (median; {100 * share.min():.0f} to "
        f"{100 * share.max():.0f}%). Where that is much less than 100%, other work slowed them down; `results.csv` has the "
        "processor time, too (`train_cpu_seconds`)."
        if len(share)
        else "No training has finished."
    )


def _origin(label: str, algorithm: str, configs: dict[str, str]) -> str:
    start = f"`{label}`: hyperparameters "
    if algorithm in configs:
        text = f"{start}from `{configs[algorithm]}`, given with --conf; how they were found is not known here."
    elif algorithm in ALGORITHMS:
        text = f'{start}of this package, `zoo_configs/{algorithm}.yml`, which says how they were found: "{_header(algorithm)}"'
    else:
        text = (
            f"{start}of RL Zoo, `hyperparams/{algorithm}.yml`, by its authors, who mark what they tuned (with Optuna) there; "
        )
        text += "not tuned again for these budgets."
    if label != algorithm:
        text += (
            " Changed to match `episodic_a2c` on the same environment: its optimizer (Adam, unless its hyperparameters say "
            "otherwise) with its learning rate, and its number of environments. Neither was tuned for A2C."
        )
    return text


def _header(algorithm: str) -> str:
    """The comment at the top of our file of hyperparameters, as one line."""
    lines = []
    for line in config_path(algorithm).read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


def _seeds(cells: Sequence[Cell]) -> dict[str, list[int]]:
    """Environment: the seeds, which are the same for all algorithms."""
    seeds: dict[str, dict[int, None]] = {}
    for cell in cells:
        seeds.setdefault(cell.env_id, {})[cell.seed] = None
    return {env_id: list(env_seeds) for env_id, env_seeds in seeds.items()}


def _ranges(seeds: list[int]) -> str:
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _one_a_pair(cells: Sequence[Cell]) -> list[Cell]:
    return list({(cell.env_id, cell.label): cell for cell in cells}.values())


def version_lines(cells: Sequence[Cell]) -> list[str]:
    """Versions and machines that cells were trained with, one line for each combination."""
    return sorted({f"{_code_text(result)}; {result.machine}" for result in _results(cells).values()})


def _code_text(result: CellResult) -> str:
    return ", ".join(f"{name} {version}" for name, version in result.versions.items()) + f", code {result.code}"


def _results(cells: Sequence[Cell]) -> dict[Cell, CellResult]:
    results = {}
    for cell in cells:
        # Of one that failed, with other settings, an old one may be there
        with contextlib.suppress(ValueError):
            result = load_cell(cell)
            if result is not None:
                results[cell] = result
    return results


def _code_notes(results: dict[Cell, CellResult]) -> list[str]:
    """A warning if the cells were not all trained by the same code."""
    algorithms: dict[str, dict[str, None]] = {}
    for cell, result in results.items():
        algorithms.setdefault(_code_text(result), {})[cell.label] = None
    if len(algorithms) < 2:
        return []
    texts = [f"{', '.join(labels)}: {text}" for text, labels in algorithms.items()]
    return [
        "NOT ALL TRAINED BY THE SAME CODE, so that the results may not compare; to train all again give another folder. "
        f"{'; '.join(texts)}."
    ]


def _turns_note(results: dict[Cell, CellResult]) -> str:
    """Whether what slowed the machine down slowed all algorithms down."""
    groups: dict[tuple[str, int], list[CellResult]] = {}
    for cell, result in results.items():
        groups.setdefault((cell.env_id, cell.seed), []).append(result)
    if all(len(group) == 1 for group in groups.values()):
        return ""
    for group in groups.values():
        group.sort(key=lambda result: result.started)
        for one, following in itertools.pairwise(group):
            # Without a whole training between them, and within a minute. False for NaN, too
            between = any(one.ended < other.started and other.ended < following.started for other in results.values())
            if between or not following.started <= one.ended + 60:
                return (
                    " Some algorithms were trained at other times than the others: the load of the machine may have differed."
                )
    return " The algorithms took turns."


def _error_line(error: str) -> str:
    """The line of a traceback that names the exception. What follows may be a tensor."""
    lines = error.strip().splitlines()
    last_frame = max((index for index, line in enumerate(lines) if line.startswith('  File "')), default=-1)
    return next((line for line in lines[last_frame + 1 :] if not line.startswith(" ")), lines[-1])


def scale_lines(scale: dict[str, Scale]) -> list[str]:
    lines = []
    for env_id, one in scale.items():
        of = "the environment's threshold" if one.reference_is_threshold else "the best final evaluation of any run here"
        line = f"{env_id}: 0 is {_number(one.random)} (mean of up to {RANDOM_EPISODES} episodes of random actions), 1 is "
        line += f"{_number(one.reference)} ({of})"
        if math.isnan(one.random):
            line = f"{env_id}: random actions failed"
        lines.append(line if one.is_usable else f"{line}: not usable, left out")
    return lines


# ------------------------------------------------------------------ files


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

    :param frame: See :func:`sb3_episodic_a2c.tools.comparison.grid.results_frame`
    :param cells: The cells it is of
    :param output: Folder to write to
    :param configs: Files of hyperparameters that the user gave
    :param console: Where to print to
    :param rng: For the bootstrap; by default always the same
    """
    from sb3_episodic_a2c.tools.comparison.plots import plot_all

    rng = np.random.default_rng(0) if rng is None else rng
    output.mkdir(parents=True, exist_ok=True)
    # First, whatever happens to the rest
    _write(output / "results.csv", frame.to_csv(index=False))
    scale = scales(frame, random_policy_scores(cells, output / "random_policy.json"))
    summaries = summarize(frame, rng)
    overall = summarize_overall(summaries, scale, rng)
    failed = frame[frame["status"] == "failed"]
    notes = fairness_notes(cells, frame, configs)
    if unusable := [line for env_id, line in zip(scale, scale_lines(scale), strict=True) if not scale[env_id].is_usable]:
        notes.append(f"Not normalised: {'; '.join(unusable)}.")
    version_list = version_lines(cells)

    _write(output / "results.json", _json(frame, cells, summaries, overall, scale, notes, version_list))
    plots = plot_all(frame, summaries, overall, scale, output, rng)
    _write(output / "report.md", _markdown(cells, summaries, overall, scale, failed, notes, version_list, plots))

    print_table("What they reach", score_table(summaries, overall), console)
    print_table("What they take (medians)", cost_table(summaries), console)
    for note in _code_notes(_results(cells)):
        console.print(note, markup=False)
    for failure in failed.itertuples():
        text = f"FAILED: {failure.algorithm} on {failure.env_id}, seed {failure.seed}: {_error_line(failure.error)}"
        console.print(text, markup=False)
    console.print(f"Wrote report.md, results.csv, results.json and plots to {output}/", markup=False)


def _markdown(
    cells: Sequence[Cell],
    summaries: Sequence[Summary],
    overall: Sequence[Overall],
    scale: dict[str, Scale],
    failed: pd.DataFrame,
    notes: list[str],
    version_list: list[str],
    plots: list[Path],
) -> str:
    budgets = ", ".join(f"{env_id} {budget:,}" for env_id, budget in {c.env_id: c.total_timesteps for c in cells}.items())
    parts = [
        "# Comparison",
        f"Env steps: {budgets}.",
        "## What they reach",
        markdown_table(score_table(summaries, overall)),
        "IQM: mean of the runs without the lowest and the highest quarter, with a stratified bootstrap interval. Area: mean "
        "reward over the budget (trapezoids between evaluations). P: share of pairs of runs of which the first algorithm's is "
        "better, ties half; beside it the same for equal seeds only.",
    ]
    if overall:
        parts.append(
            f"All: over {', '.join(overall[0].env_ids)}, with the seeds that all algorithms have finished on all of them "
            f"({_ranges(overall[0].seeds)}), so that each weighs the same; scores "
            "normalised per environment. Mean and std are of all these runs, P is the mean over environments. "
            + "; ".join(scale_lines(scale))
            + "."
        )
    parts += ["## What they take", markdown_table(cost_table(summaries))]
    parts.append(
        "Medians over runs; a run that never reached the threshold counts as infinite. Reached: the first evaluation during "
        "training at or above it, which may be luck. Stayed there: the first from which on all are, to the last."
    )
    if len(failed):
        rows = [["environment", "algorithm", "seed", "error"]]
        rows += [[row.env_id, row.algorithm, str(row.seed), _error_line(row.error)] for row in failed.itertuples()]
        parts += ["## Failed", markdown_table(rows)]
    parts += ["## Plots", *(f"![{path.stem}]({path.name})" for path in plots)]
    parts += ["## Fairness", "\n".join(f"- {note}" for note in notes)]
    rows = [["environment", "algorithm", "hyperparameters"]]
    rows += [[cell.env_id, cell.label, _hyperparams_text(cell)] for cell in _one_a_pair(cells)]
    parts += ["## Hyperparameters", markdown_table(rows)]
    parts += ["## Versions", "\n".join(f"- {line}" for line in version_list)]
    if len(version_list) > 1:
        parts.append("The runs were not all made with the same code on the same machine: times may not compare.")
    return "\n\n".join(parts) + "\n"


def _hyperparams_text(cell: Cell) -> str:
    return ", ".join(f"{name}: {value}" for name, value in sorted(cell.hyperparams.items()))


def _json(
    frame: pd.DataFrame,
    cells: Sequence[Cell],
    summaries: Sequence[Summary],
    overall: Sequence[Overall],
    scale: dict[str, Scale],
    notes: list[str],
    version_list: list[str],
) -> str:
    failed = frame[frame["status"] == "failed"]
    report = {
        "algorithms": list(dict.fromkeys(cell.label for cell in cells)),
        "seeds": _seeds(cells),
        "total_timesteps": {cell.env_id: cell.total_timesteps for cell in cells},
        "n_evaluations": {cell.env_id: cell.n_evaluations for cell in cells},
        "eval_episodes": cells[0].eval_episodes,
        "summaries": [_plain(summary) for summary in summaries],
        "overall": [_plain(whole) for whole in overall],
        "normalisation": {env_id: _plain(one) for env_id, one in scale.items()},
        "failed": failed[["env_id", "algorithm", "seed", "error"]].to_dict("records"),
        "hyperparams": [
            {"env_id": cell.env_id, "algorithm": cell.label, **_plain(cell.settings["hyperparams"])}
            for cell in _one_a_pair(cells)
        ],
        "notes": notes,
        "versions": version_list,
        "reported_with": {**versions(), "platform": platform.platform(), "n_cpus": os.cpu_count()},
    }
    return json.dumps(report, indent=2, allow_nan=False, default=str)


def _plain(value: Any) -> Any:
    """What JSON knows: no arrays and named tuples, and null for NaN and infinity."""
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
