"""What a reader must know to judge the figures of one comparison: what was the same for all algorithms, and what was not."""

import itertools
import math
from collections.abc import Sequence

import pandas as pd

from sb3_episodic_a2c.tools.comparison.cells import (
    Cell,
    CellResult,
    finished_results,
    one_per_pair,
    seeds_by_env,
)
from sb3_episodic_a2c.tools.comparison.normalization import RANDOM_EPISODES, Scale
from sb3_episodic_a2c.tools.comparison.tables import format_number
from sb3_episodic_a2c.tools.entries import EVAL_SEED
from sb3_episodic_a2c.tools.zoo import ALGORITHMS, config_path


def fairness_notes(cells: Sequence[Cell], frame: pd.DataFrame, configs: dict[str, str]) -> list[str]:
    """
    :param cells: All cells
    :param frame: Their results
    :param configs: Files of hyperparameters that the user gave
    :return: The notes, a paragraph each
    """
    results = finished_results(cells)
    finished = frame[frame["status"] == "finished"]
    algorithms = {cell.label: cell.algorithm for cell in cells}
    return [
        *code_notes(results),
        "Same budget for all: a training stops at the first step that reaches it, without a last update. "
        "Env steps are counted over all environments of a training, used or not.",
        _evaluations_note(cells, finished),
        f"Same seeds for all: {_seeds_text(cells)}. They seed network, actions and environments.",
        "Times are wall times of the training alone, on one torch thread, without evaluations; env steps/s likewise."
        + _turns_note(results),
        _processor_note(finished),
        "The final evaluation is that of the last policy, not of the best one.",
        *(_origin(label, algorithm, configs) for label, algorithm in algorithms.items()),
        *_budget_notes(cells),
    ]


def _evaluations_note(cells: Sequence[Cell], finished: pd.DataFrame) -> str:
    n_episodes = cells[0].eval_episodes
    beyond = int((finished["timesteps"] - finished["grid_timesteps"]).max()) if len(finished) else 0
    precision = f"at the first step beyond, by at most {beyond}" if beyond else "met to the step"
    by_env = {cell.env_id: cell.n_evaluations for cell in cells}
    n_evaluations = (
        f"{cells[0].n_evaluations}"
        if len(set(by_env.values())) == 1
        else ", ".join(f"{number} ({env_id})" for env_id, number in by_env.items())
    )
    return (
        f"Same evaluations for all: {n_episodes} greedy episodes before training and at the same {n_evaluations} points "
        f"({precision}), in environments of their own. Episode i (from 0) of a training with seed s starts from environment "
        f"seed {EVAL_SEED:,} + {n_episodes} s + i every time, whatever the algorithm. The environments are as they are "
        "registered, with the `env_kwargs` of the hyperparameters that all algorithms share, but without those that only "
        "shorten training (`max_episode_steps`), and in the wrappers that the policy was trained in (`env_wrapper`, "
        "`frame_stack`). Where the training normalises, observations are normalised by its statistics; rewards are the "
        "environment's own."
    )


def _seeds_text(cells: Sequence[Cell]) -> str:
    envs_by_seeds: dict[str, list[str]] = {}
    for env_id, seeds in seeds_by_env(cells).items():
        envs_by_seeds.setdefault(format_seeds(seeds), []).append(env_id)
    return "; ".join(
        text if len(envs_by_seeds) == 1 else f"{text} ({', '.join(env_ids)})" for text, env_ids in envs_by_seeds.items()
    )


def format_seeds(seeds: list[int]) -> str:
    """``"0 to 9"``, or a list of seeds with gaps between them."""
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _turns_note(results: dict[Cell, CellResult]) -> str:
    """Whether a slow moment of the machine slowed all algorithms down."""
    groups: dict[tuple[str, int], list[CellResult]] = {}
    for cell, result in results.items():
        groups.setdefault((cell.env_id, cell.seed), []).append(result)
    if all(len(group) == 1 for group in groups.values()):
        return ""
    for group in groups.values():
        group.sort(key=lambda result: result.started)
        for one, following in itertools.pairwise(group):
            # In turn: within a minute, and without a whole training in between. A time that is NaN is not in turn either
            between = any(one.ended < other.started and other.ended < following.started for other in results.values())
            if between or not following.started <= one.ended + 60:
                return (
                    " Some algorithms were trained at other times than the others: the load of the machine may have differed."
                )
    return " The algorithms took turns."


def _processor_note(finished: pd.DataFrame) -> str:
    if not len(finished):
        return "No training has finished."
    ends = finished.groupby(["algorithm", "env_id", "seed"]).last()
    share = ends["train_cpu_seconds"] / ends["train_seconds"]
    return (
        f"Of that time they were on a processor for {100 * share.median():.0f}% (median; {100 * share.min():.0f} to "
        f"{100 * share.max():.0f}%). Where that is much less than 100%, other work slowed them down. `results.csv` has the "
        "processor time as `train_cpu_seconds`."
    )


def _origin(label: str, algorithm: str, configs: dict[str, str]) -> str:
    """Where the hyperparameters come from, and what is known of how they were tuned."""
    if algorithm in configs:
        text = f"from `{configs[algorithm]}`, given with --conf; how they were found is not known here."
    elif algorithm in ALGORITHMS:
        text = f'of this package, `zoo_configs/{algorithm}.yml`, which says how they were found: "{_header(algorithm)}"'
    else:
        text = (
            f"of RL Zoo, `hyperparams/{algorithm}.yml`, by its authors, who mark what they tuned (with Optuna) there; "
            "not tuned again for these budgets."
        )
    if label != algorithm:
        text += (
            " Changed to match `episodic_a2c` on the same environment: its optimizer (Adam, unless its hyperparameters say "
            "otherwise) with its learning rate, and its number of environments. Neither was tuned for A2C."
        )
    return f"`{label}`: hyperparameters {text}"


def _header(algorithm: str) -> str:
    """The comment at the top of our file of hyperparameters, as one line."""
    lines = config_path(algorithm).read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))


def _budget_notes(cells: Sequence[Cell]) -> list[str]:
    """A note on hyperparameters that were made for another budget, if there are any."""
    own = [
        f"{cell.label} on {cell.env_id}: {int(cell.hyperparams['n_timesteps']):,}"
        for cell in one_per_pair(cells)
        if int(cell.hyperparams["n_timesteps"]) != cell.total_timesteps
    ]
    if not own:
        return []
    return [
        "Hyperparameters that were made for another budget than the one here (learning rates that fall to zero do so over "
        f"the budget here): {'; '.join(own)}."
    ]


# ------------------------------------------------------------------ code and machines


def code_notes(results: dict[Cell, CellResult]) -> list[str]:
    """A warning, if the cells were not all trained by the same code."""
    algorithms: dict[str, dict[str, None]] = {}
    for cell, result in results.items():
        algorithms.setdefault(_code_text(result), {})[cell.label] = None
    if len(algorithms) < 2:
        return []
    texts = [f"{', '.join(labels)}: {text}" for text, labels in algorithms.items()]
    return [
        "NOT ALL TRAINED BY THE SAME CODE, so the results may not compare. To train all again, give another folder. "
        f"{'; '.join(texts)}."
    ]


def version_lines(cells: Sequence[Cell]) -> list[str]:
    """Versions and machines that the cells were trained with, one line for each combination."""
    return sorted({f"{_code_text(result)}; {result.machine}" for result in finished_results(cells).values()})


def _code_text(result: CellResult) -> str:
    return ", ".join(f"{name} {version}" for name, version in result.versions.items()) + f", code {result.code}"


# ------------------------------------------------------------------ normalisation


def scale_lines(scale: dict[str, Scale]) -> list[str]:
    """One line for each environment: the meaning of 0 and 1 on its scale."""
    lines = []
    for env_id, one in scale.items():
        of = "the environment's threshold" if one.reference_is_threshold else "the best final evaluation of any run here"
        line = f"{env_id}: 0 is {format_number(one.random)} (mean of up to {RANDOM_EPISODES} episodes of random actions), "
        line += f"1 is {format_number(one.reference)} ({of})"
        if math.isnan(one.random):
            line = f"{env_id}: random actions failed"
        lines.append(line if one.is_usable else f"{line}: not usable, left out")
    return lines
