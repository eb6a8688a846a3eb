"""The tables of a comparison: rows of text, for the terminal and in Markdown."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from sb3_episodic_a2c.tools.comparison.normalization import reward_threshold
from sb3_episodic_a2c.tools.comparison.statistics import Estimate, difference
from sb3_episodic_a2c.tools.comparison.summaries import METRICS, Overall, Summary


def winner_table(summaries: Sequence[Summary], overall: Sequence[Overall]) -> list[list[str]]:
    """
    Rows of text, the header first: one line an environment that says how much better the first algorithm is than each of the
    others, and how long they trained.
    """
    algorithms = list(dict.fromkeys(summary.algorithm for summary in summaries))
    first, *others = algorithms
    header = ["environment", f"{first}, final evaluation, IQM (95% interval)"]
    header += [f"minus that of {other} (95% interval)" for other in others]
    rows = [[*header, *(f"training of {algorithm}" for algorithm in algorithms)]]
    verdicts: dict[str, list[str]] = {other: [] for other in others}
    for env_id in dict.fromkeys(summary.env_id for summary in summaries):
        by_algorithm = {summary.algorithm: summary for summary in summaries if summary.env_id == env_id}
        final = {algorithm: summary.iqm["final"] for algorithm, summary in by_algorithm.items()}
        row = [env_id, format_interval(final[first])]
        for other in others:
            gain = difference(final[first], final[other])
            verdicts[other].append(_verdict(gain))
            row.append(f"{format_interval(gain)}: {verdicts[other][-1]}")
        rows.append([*row, *(format_seconds(by_algorithm[algorithm].train_seconds) for algorithm in algorithms)])
    rows.append(["all", "", *(_counts(verdicts[other]) for other in others), *([""] * len(algorithms))])
    if overall:
        normalised = {whole.algorithm: whole.iqm["final"] for whole in overall}
        gains = [difference(normalised[first], normalised[other]) for other in others]
        texts = [f"{format_interval(gain, 2)}: {_verdict(gain)}" for gain in gains]
        rows.append(["all, normalised", format_interval(normalised[first], 2), *texts, *([""] * len(algorithms))])
    return rows


BETTER, WORSE, UNDECIDED, NOT_COMPARED = "better", "worse", "undecided", "not compared"


def _verdict(gain: Estimate) -> str:
    """What an interval says. There is none where trainings failed, or with a single seed."""
    if math.isnan(gain.low):
        return NOT_COMPARED
    return BETTER if gain.low > 0 else WORSE if gain.high < 0 else UNDECIDED


def _counts(verdicts: list[str]) -> str:
    words = [BETTER, WORSE, UNDECIDED, *([NOT_COMPARED] if NOT_COMPARED in verdicts else [])]
    return ", ".join(f"{verdicts.count(word)} {word}" for word in words)


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
            row += [format_interval(summary.iqm[metric])]
            row += [f"{format_number(summary.mean[metric])} ± {format_number(summary.std[metric])}"]
        row.append(format_interval(summary.probability["final"], 2) if summary.probability else "")
        row.append(f"{summary.n_pairs_won['final']:g} of {summary.n_pairs} seeds" if summary.n_pairs_won else "")
        row.append(f"{summary.n_seeds}" + (f", {summary.n_failed} FAILED" if summary.n_failed else ""))
        rows.append(row)
    for whole in overall:
        row = ["all, normalised", whole.algorithm]
        for metric in METRICS:
            row += [format_interval(whole.iqm[metric], 2)]
            row += [f"{format_number(whole.mean[metric], 2)} ± {format_number(whole.std[metric], 2)}"]
        probability = format_interval(whole.probability["final"], 2) if whole.probability else ""
        rows.append([*row, probability, "", f"{len(whole.seeds)}"])
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
            row += [format_number(summary.timesteps_to_threshold, 0), format_seconds(summary.seconds_to_threshold)]
            row.append(format_number(summary.timesteps_to_stay, 0))
        row += [format_number(summary.timesteps, 0), format_seconds(summary.train_seconds)]
        row += [format_number(summary.timesteps_per_second, 0), format_seconds(summary.eval_seconds)]
        rows.append(row)
    return rows


# ------------------------------------------------------------------ figures as text


def format_number(value: float, digits: int | None = None) -> str:
    """
    :param value: NaN for unknown, infinity for never reached
    :param digits: Digits after the point; by default one from 10 on, and two below
    """
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "not reached"
    if digits is None:
        digits = 1 if abs(value) >= 10 else 2
    text = f"{value:,.{digits}f}"
    # Not "-0.00"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text


def format_interval(estimate: Estimate, digits: int | None = None) -> str:
    """``"value (low to high)"``"""
    if math.isnan(estimate.value):
        return "-"
    if math.isnan(estimate.low):
        return f"{format_number(estimate.value, digits)} (no interval)"
    value, low, high = (format_number(number, digits) for number in estimate)
    return f"{value} ({low} to {high})"


def format_seconds(value: float) -> str:
    return f"{format_number(value)} s" if math.isfinite(value) else format_number(value)


# ------------------------------------------------------------------ layout


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """
    :param rows: The header first
    :return: Markdown, without a final end of line
    """
    lines = [list(rows[0]), ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines)


def print_table(title: str, rows: Sequence[Sequence[str]], console: Console) -> None:
    """
    Print a table to the terminal, with a line between environments.

    A table that is too wide becomes several. Each starts with the same two columns, the names, so that no name is cut and no
    figure is broken into two lines.

    :param title: Printed above it
    :param rows: The header first
    :param console: Where to print to
    """
    # Headers may be broken between words
    widths = [
        max(*map(len, header.split()), *(len(row[index]) for row in rows[1:]), 1) for index, header in enumerate(rows[0])
    ]
    parts: list[list[int]] = [[]]
    for column in range(2, len(widths)):
        # Border and margins of a column take three characters more
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
