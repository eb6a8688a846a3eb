"""What the algorithms reach and what they take: figures with intervals, for each environment and over all of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from sb3_episodic_a2c.tools.comparison.normalization import Scale, reward_threshold
from sb3_episodic_a2c.tools.comparison.statistics import (
    Estimate,
    mean_and_std,
    normalized_area,
    probability_of_improvement,
    stratified_iqm,
)

METRICS = {"final": "final evaluation", "area": "area under the curve"}
"""Both in units of reward: the area is the mean reward over the budget."""


@dataclass
class Summary:
    """One algorithm on one environment. Times and env steps are medians over runs."""

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
    """Metric: probability that a run of the first algorithm is better; None for the first algorithm itself."""
    n_pairs: int
    """Seeds with a finished run of this and of the first algorithm."""
    n_pairs_won: dict[str, float] | None
    """Metric: seeds on which the first algorithm is better, a tie counting half; None for the first algorithm itself."""
    n_solved: int
    """Runs with an evaluation at or above the threshold."""
    timesteps_to_threshold: float
    """Env steps until then; infinite unless more than half of the runs got there, NaN without a threshold or runs."""
    seconds_to_threshold: float
    """Wall time of training until then, likewise."""
    timesteps_to_stay: float
    """Env steps until the first evaluation from which on all are at or above the threshold, likewise."""
    timesteps: float
    """Env steps at the end of training."""
    train_seconds: float
    eval_seconds: float
    timesteps_per_second: float

    @property
    def n_seeds(self) -> int:
        return len(self.seeds)


@dataclass
class Overall:
    """One algorithm over all environments, on normalised scores."""

    algorithm: str
    env_ids: list[str]
    """Environments that count: those with a usable scale and finished runs of every algorithm."""
    seeds: list[int]
    """Seeds that count: those that every algorithm has finished on every such environment. So all weigh the same."""
    iqm: dict[str, Estimate]
    mean: dict[str, float]
    std: dict[str, float]
    """Over the runs of all environments together."""
    probability: dict[str, Estimate] | None


def summarize(frame: pd.DataFrame, rng: np.random.Generator) -> list[Summary]:
    """
    :param frame: See :func:`sb3_episodic_a2c.tools.comparison.frame.results_frame`
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
        "area": np.array([normalized_area(run["timesteps"], run["mean_reward"]) for run in runs]),
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
            metric: probability_of_improvement([first.scores[metric]], [scores[metric]]) if runs and first.n_seeds else nothing
            for metric in METRICS
        }
    threshold = reward_threshold(env_id)
    reached = [_is_reached(run, threshold) for run in runs] if threshold is not None else []
    # Without a threshold this is empty, and so are the medians below
    runs_reached = list(zip(runs, reached, strict=False))
    moments = {metric: mean_and_std(scores[metric]) if runs else (math.nan, math.nan) for metric in METRICS}
    ends = [run.iloc[-1] for run in runs]
    return Summary(
        env_id=env_id,
        algorithm=algorithm,
        seeds=seeds,
        n_failed=int((rows["status"] == "failed").sum()),
        scores=scores,
        iqm={metric: stratified_iqm([scores[metric]], rng) if runs else nothing for metric in METRICS},
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
    """The scores ``(len(wanted),)`` of some seeds, out of ``(len(seeds),)``."""
    return scores[[seeds.index(seed) for seed in wanted]]


def _n_wins(ours: np.ndarray, others: np.ndarray) -> float:
    return float(np.sum(ours > others) + np.sum(ours == others) / 2)


def _is_reached(run: pd.DataFrame, threshold: float) -> np.ndarray:
    """``(n_evaluations,)`` booleans: where a run is at or above a threshold. Before training that is luck, so it is False."""
    return ((run["mean_reward"] >= threshold) & (run["evaluation"] > 0)).to_numpy()


def _stays(is_reached: np.ndarray) -> np.ndarray:
    """The same, but only where it also holds at all later evaluations."""
    return np.logical_and.accumulate(is_reached[::-1])[::-1]


def _first(values: pd.Series, condition: np.ndarray) -> float:
    """The value where a condition first holds; infinity if it never does."""
    return float(values.to_numpy()[condition.argmax()]) if condition.any() else math.inf


def _median(values: list[float]) -> float:
    return float(np.median(values)) if values else math.nan


def summarize_overall(summaries: Sequence[Summary], scale: dict[str, Scale], rng: np.random.Generator) -> list[Overall]:
    """
    :param summaries: See :func:`summarize`
    :param scale: See :func:`sb3_episodic_a2c.tools.comparison.normalization.scales`
    :param rng: For the bootstrap
    :return: One for each algorithm; empty with fewer than two environments that count, or without a seed that they share
    """
    by_name = {(summary.env_id, summary.algorithm): summary for summary in summaries}
    algorithms = list(dict.fromkeys(summary.algorithm for summary in summaries))
    env_ids = comparable_envs(summaries, scale)
    counting = [summary for summary in summaries if summary.env_id in env_ids]
    seeds = sorted(set.intersection(*(set(summary.seeds) for summary in counting))) if counting else []
    if len(env_ids) < 2 or not seeds:
        return []

    def strata(algorithm: str, metric: str) -> list[np.ndarray]:
        chosen = [by_name[env_id, algorithm] for env_id in env_ids]
        return [scale[one.env_id].normalize(_of_seeds(seeds, one.seeds, one.scores[metric])) for one in chosen]

    result = []
    for algorithm in algorithms:
        moments = {metric: mean_and_std(np.concatenate(strata(algorithm, metric))) for metric in METRICS}
        probability = None
        if algorithm != algorithms[0]:
            probability = {
                metric: probability_of_improvement(strata(algorithms[0], metric), strata(algorithm, metric))
                for metric in METRICS
            }
        result.append(
            Overall(
                algorithm=algorithm,
                env_ids=env_ids,
                seeds=seeds,
                iqm={metric: stratified_iqm(strata(algorithm, metric), rng) for metric in METRICS},
                mean={metric: mean for metric, (mean, _) in moments.items()},
                std={metric: std for metric, (_, std) in moments.items()},
                probability=probability,
            )
        )
    return result


def comparable_envs(summaries: Sequence[Summary], scale: dict[str, Scale]) -> list[str]:
    """Environments with a usable scale on which every algorithm has finished runs."""
    return [
        env_id
        for env_id in dict.fromkeys(summary.env_id for summary in summaries)
        if scale[env_id].is_usable and all(summary.n_seeds for summary in summaries if summary.env_id == env_id)
    ]
