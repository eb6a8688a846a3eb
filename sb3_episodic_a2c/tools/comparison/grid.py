"""
Algorithms side by side: the grid (algorithm x environment x seed), trained by RL Zoo, on many processes or machines.

Finished cells are kept: the same command again, or one with more seeds or environments, trains only what is missing.
"""

import argparse
import contextlib
import copy
import difflib
import importlib
import importlib.util
import numbers
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import joblib
import pandas as pd
from joblib.externals.loky.process_executor import ProcessPoolExecutor, TerminatedWorkerError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sb3_episodic_a2c.tools.comparison.cells import (
    TRAINING_ONLY,
    UNFINISHED_FOLDER,
    Cell,
    CellResult,
    is_finished,
    load_cell,
    remove_leftovers,
    train_cell,
)
from sb3_episodic_a2c.tools.comparison.report import write_report
from sb3_episodic_a2c.tools.zoo import (
    ALGORITHMS,
    DEFAULT_ALGORITHM,
    config_path,
    evaluate_kwargs,
    experiment_manager_class,
    register,
)
from sb3_episodic_a2c.tools.zoo import algorithms as zoo_algorithms

BACKENDS = ("loky", "sequential", "dask", "ray")
"""Where the cells are trained: processes of this machine, this process, a Dask or a Ray cluster."""

BACKEND_PACKAGES = {"dask": "distributed", "ray": "ray"}
"""What must be installed for a backend, beside the extra ``compare``."""

MATCHED = "a2c-matched"
"""Row of A2C with the Zoo's hyperparameters, but with the optimizer, learning rate and number of environments of ours."""

DEFAULT_SEEDS = 10

DEFAULT_EVALUATIONS = 20

DEFAULT_OUTPUT = Path("comparison")


def compare(
    envs: Sequence[str],
    algorithms: Sequence[str] = (DEFAULT_ALGORITHM, "a2c"),
    seeds: int | Sequence[int] | dict[str, int] = DEFAULT_SEEDS,
    total_timesteps: int | dict[str, int] | None = None,
    configs: dict[str, str] | None = None,
    n_evaluations: int | dict[str, int] = DEFAULT_EVALUATIONS,
    eval_episodes: int = 20,
    jobs: int = 1,
    backend: str = "loky",
    scheduler: str | None = None,
    output: str | Path = DEFAULT_OUTPUT,
    retrain: bool = False,
    device: str = "cpu",
    gym_packages: Sequence[str] = (),
    progress_bar: bool = False,
    console: Console | None = None,
) -> pd.DataFrame:
    """
    Train a grid of algorithms, environments and seeds, and report on it.

    Writes to the output folder a run folder for each cell, as RL Zoo's ``train`` does, and the report (``report.md``,
    ``results.csv``, ``results.json`` and plots), see :func:`sb3_episodic_a2c.tools.comparison.report.write_report`.

    :param envs: Ids of environments
    :param algorithms: Ids in the Zoo, ours among them, or ``"a2c-matched"`` (:data:`MATCHED`). The others are compared with
        the first
    :param seeds: A number ``n``, for 0 to ``n - 1``, or the seeds; or environment: number, for those where it is not 10. They
        are the same for all algorithms
    :param total_timesteps: Budget in env steps, for all environments or for each; by default the smallest of the
        ``n_timesteps`` in the configs of the algorithms compared
    :param configs: Algorithm: path of a file of hyperparameters, as the Zoo's ``--conf-file``; by default our files and the
        Zoo's
    :param n_evaluations: Number of evaluations during training, there is one before, too; or environment: number, for those
        where it is not 20
    :param eval_episodes: Greedy episodes of an evaluation
    :param jobs: Number of processes. On a cluster that was there before (``scheduler``) it is for ``"ray"`` only, and 1 is all
        of its processors
    :param backend: One of :data:`BACKENDS`
    :param scheduler: Address of the cluster, for ``"dask"`` or ``"ray"``; by default one of ``jobs`` processes on this machine
    :param output: Folder to write to, on a disk that all workers share. What a comparison has left there is used
    :param retrain: Whether to train again cells that are there with other settings, and then lose the old ones; by default
        they are an error
    :param device: Device (cpu, cuda, ...) of the models
    :param gym_packages: Modules to import that register environments
    :param progress_bar: Whether to show a progress bar over cells
    :param console: Where to print the tables to; None: nowhere
    :return: One row for each cell and evaluation, see :func:`results_frame`. A cell that failed has one row, with its
        ``error``
    :raises ValueError: An argument is out of its range or fits no other, or the package of the backend is missing; the message
        says how to install it. Nothing is trained then
    """
    cells = plan_cells(
        envs=envs,
        algorithms=algorithms,
        seeds=seeds,
        total_timesteps=total_timesteps,
        configs=configs,
        n_evaluations=n_evaluations,
        eval_episodes=eval_episodes,
        output=output,
        device=device,
        gym_packages=gym_packages,
    )
    try:
        errors = run_cells(cells, jobs=jobs, backend=backend, scheduler=scheduler, retrain=retrain, progress_bar=progress_bar)
    except BaseException:
        if n_kept := sum(_is_kept(cell) for cell in cells):
            # Whatever it was: a cluster that went away, Ctrl-C
            print(
                f"{n_kept} of {len(cells)} cells are there: the same command again goes on with the others.", file=sys.stderr
            )
        raise
    frame = results_frame(cells, errors)
    write_report(frame, cells, Path(output), configs or {}, console=console or Console(quiet=True))
    return frame


def _is_kept(cell: Cell) -> bool:
    with contextlib.suppress(ValueError):
        return is_finished(cell)
    return False


# ------------------------------------------------------------------ the grid


def plan_cells(
    envs: Sequence[str],
    algorithms: Sequence[str],
    seeds: int | Sequence[int] | dict[str, int],
    total_timesteps: int | dict[str, int] | None = None,
    configs: dict[str, str] | None = None,
    n_evaluations: int | dict[str, int] = DEFAULT_EVALUATIONS,
    eval_episodes: int = 20,
    output: str | Path = DEFAULT_OUTPUT,
    device: str = "cpu",
    gym_packages: Sequence[str] = (),
) -> list[Cell]:
    """
    Arguments as in :func:`compare`.

    :return: The cells, in the order in which they are trained: the algorithms take turns, so that whatever slows the machine
        down slows all of them down, and a comparison that was cut short has about equally many seeds of each
    :raises ValueError: See :func:`compare`
    """
    if Path(output).exists() and not Path(output).is_dir():
        raise ValueError(f"`output` {output} is a file. Give a folder.")
    eval_episodes = _positive("`eval_episodes`", eval_episodes)
    register()
    for package in gym_packages:
        _import(package)
    envs, algorithms = _distinct("env", envs), _distinct("algo", algorithms)
    for env_id in envs:
        _check_env(env_id)
    if isinstance(seeds, dict):
        _check_compared("seeds", seeds, envs)
        seeds_of = {env_id: _check_seeds(seeds.get(env_id, DEFAULT_SEEDS)) for env_id in envs}
    else:
        seeds_of = dict.fromkeys(envs, _check_seeds(seeds))
    if isinstance(n_evaluations, dict):
        _check_compared("n_evaluations", n_evaluations, envs)
    else:
        n_evaluations = dict.fromkeys(envs, n_evaluations)
    n_evaluations_of = {
        env_id: _positive("`n_evaluations`", n_evaluations.get(env_id, DEFAULT_EVALUATIONS)) for env_id in envs
    }
    configs = {} if configs is None else configs
    for label in algorithms:
        _check_algorithm(label)
    if unused := sorted(configs.keys() - {_base(label) for label in algorithms}):
        raise ValueError(f"`conf` is given for {unused[0]!r}, which is not compared. The algorithms are {list(algorithms)}.")
    hyperparams = {(env_id, label): _hyperparams(label, env_id, configs) for env_id in envs for label in algorithms}
    budgets = _budgets(envs, algorithms, hyperparams, total_timesteps)
    cells: list[Cell] = []
    for index in range(max(map(len, seeds_of.values()))):
        for env_id in [env_id for env_id in envs if index < len(seeds_of[env_id])]:
            for label in algorithms:
                cells.append(
                    Cell(
                        label=label,
                        algorithm=_base(label),
                        env_id=env_id,
                        seed=seeds_of[env_id][index],
                        hyperparams=hyperparams[env_id, label],
                        total_timesteps=budgets[env_id],
                        n_evaluations=n_evaluations_of[env_id],
                        eval_episodes=eval_episodes,
                        output=Path(output).absolute(),
                        gym_packages=tuple(gym_packages),
                        device=device,
                    )
                )
    _check_same_environments(cells)
    for cell in cells:
        if cell.total_timesteps // cell.n_evaluations < cell.n_envs:
            raise ValueError(
                f"`n_evaluations` is {cell.n_evaluations}: too many for {cell.total_timesteps:,} env steps of {cell.label} on "
                f"{cell.env_id}, which takes {cell.n_envs} at a time. Use at most {cell.total_timesteps // cell.n_envs}."
            )
    return cells


def _check_same_environments(cells: Sequence[Cell]) -> None:
    first: dict[str, Cell] = {}
    for cell in cells:
        other = first.setdefault(cell.env_id, cell)
        if cell.eval_env_kwargs != other.eval_env_kwargs:
            raise ValueError(
                f"`env_kwargs` of {cell.env_id} are {other.eval_env_kwargs} for {other.label} and {cell.eval_env_kwargs} for "
                f"{cell.label}: these are two environments, and their rewards do not compare. Only {', '.join(TRAINING_ONLY)} "
                "may differ, since evaluations are without. Give them the same with --conf ALGO:PATH."
            )


def _import(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"`gym_packages` {package!r} cannot be imported: {error}. Is it installed, or its folder in PYTHONPATH?"
        ) from error


def _distinct(name: str, values: Sequence[Any]) -> tuple[Any, ...]:
    if isinstance(values, str):
        values = [values]
    if not values:
        raise ValueError(f"`{name}` is empty. Give at least one.")
    for value in values:
        if list(values).count(value) > 1:
            raise ValueError(f"`{name}` names {value!r} more than once: {list(values)}. Give each once.")
    return tuple(values)


def _check_compared(name: str, by_env: dict[str, int], envs: Sequence[str]) -> None:
    if unknown := sorted(by_env.keys() - set(envs)):
        raise ValueError(f"`{name}` is given for {unknown[0]!r}, which is not compared. The environments are {list(envs)}.")


def _check_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    if not isinstance(seeds, Iterable):
        if not _is_integer(seeds) or seeds < 1:
            raise ValueError(f"`seeds` is {seeds!r}. It must be an integer >= 1, or a list of seeds.")
        return tuple(range(seeds))
    for seed in seeds:
        # NumPy's seeds have 32 bits, and each environment adds its number
        if not _is_integer(seed) or not 0 <= seed < 2**31:
            raise ValueError(f"`seeds` holds {seed!r}. Each must be an integer >= 0 and < 2**31.")
    return _distinct("seeds", [int(seed) for seed in seeds])


def _is_integer(value: Any) -> bool:
    """NumPy's, too, but no bools."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _positive(name: str, value: Any, hint: str = "") -> int:
    if not _is_integer(value) or value < 1:
        raise ValueError(f"{name} is {value!r}. It must be an integer >= 1.{hint}")
    return int(value)


def _check_env(env_id: str) -> None:
    if env_id not in gym.registry:
        close = difflib.get_close_matches(env_id, list(gym.registry), n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "Name the module that registers it (--gym-packages)."
        raise ValueError(f"`env` {env_id!r} is no registered environment. {hint}")
    # What it needs may be missing, e.g. Box2D
    gym.make(env_id).close()


def _base(label: str) -> str:
    return "a2c" if label == MATCHED else label


def _check_algorithm(label: str) -> None:
    known = zoo_algorithms()
    if _base(label) not in known:
        names = [*ALGORITHMS, MATCHED, *sorted(known.keys() - ALGORITHMS.keys())]
        raise ValueError(f"`algo` {label!r} is unknown. Use one of {', '.join(names)}.")


def _hyperparams(label: str, env_id: str, configs: dict[str, str]) -> dict[str, Any]:
    hyperparams = _read_config(_base(label), env_id, configs)
    if label == MATCHED:
        hyperparams = _matched(hyperparams, _read_config(DEFAULT_ALGORITHM, env_id, configs))
    return hyperparams


def _matched(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """
    A2C's hyperparameters with what it gets from ours. Its optimizer is then that of :class:`EpisodicA2C`: what our
    ``policy_kwargs`` name, or else Adam, the default of SB3's policies.
    """
    matched = {
        **theirs,
        "use_rms_prop": False,
        "learning_rate": ours.get("learning_rate", 3e-3),
        "n_envs": ours.get("n_envs", 1),
    }
    names = ("optimizer_class", "optimizer_kwargs")
    ours_kwargs, theirs_kwargs = (evaluate_kwargs(hyperparams.get("policy_kwargs")) for hyperparams in (ours, theirs))
    if any(name in kwargs for name in names for kwargs in (ours_kwargs, theirs_kwargs)):
        others = {name: value for name, value in theirs_kwargs.items() if name not in names}
        matched["policy_kwargs"] = {**others, **{name: ours_kwargs[name] for name in names if name in ours_kwargs}}
    return matched


def _read_config(algorithm: str, env_id: str, configs: dict[str, str]) -> dict[str, Any]:
    """Hyperparameters as the Zoo finds them: the entry of the environment, else ``atari`` for such games, else ``default``."""
    config = configs.get(algorithm)
    if config is None and algorithm in ALGORITHMS:
        config = str(config_path(algorithm))
    manager = experiment_manager_class()(argparse.Namespace(), algorithm, env_id, "", config=config)
    try:
        with contextlib.redirect_stdout(None):
            hyperparams = copy.deepcopy(dict(manager.read_hyperparameters()[1]))
    except Exception as error:
        raise ValueError(
            f"`conf` {manager.config} of {algorithm!r} gives no hyperparameters for {env_id}: "
            f"{type(error).__name__}: {error}. Give a file that has them: --conf {algorithm}:PATH"
        ) from error
    if not isinstance(hyperparams.get("n_timesteps"), int | float) or "policy" not in hyperparams:
        raise ValueError(
            f"`conf` {manager.config}: the entry of {env_id} must have `n_timesteps` and `policy`. It has {hyperparams}."
        )
    return hyperparams


def _budgets(
    envs: Sequence[str],
    algorithms: Sequence[str],
    hyperparams: dict[tuple[str, str], dict[str, Any]],
    total_timesteps: int | dict[str, int] | None,
) -> dict[str, int]:
    budgets = {env_id: int(min(hyperparams[env_id, label]["n_timesteps"] for label in algorithms)) for env_id in envs}
    if isinstance(total_timesteps, dict):
        _check_compared("total_timesteps", total_timesteps, envs)
        budgets.update(total_timesteps)
    elif total_timesteps is not None:
        budgets = dict.fromkeys(envs, total_timesteps)
    return {env_id: _positive(f"`total_timesteps` of {env_id}", budget) for env_id, budget in budgets.items()}


# ------------------------------------------------------------------ running it


def run_cells(
    cells: Sequence[Cell],
    jobs: int = 1,
    backend: str = "loky",
    scheduler: str | None = None,
    retrain: bool = False,
    progress_bar: bool = False,
) -> dict[Cell, str]:
    """
    Train what is missing.

    :param cells: The cells
    :return: Traceback of each cell that failed. The others are finished
    :raises ValueError: See :func:`compare`
    """
    jobs = _positive("`jobs`", jobs, f" This machine has {os.cpu_count()} processors.")
    if backend not in BACKENDS:
        raise ValueError(f"`backend` {backend!r} is unknown. Use one of {BACKENDS}.")
    if scheduler is not None and backend not in BACKEND_PACKAGES:
        raise ValueError(f"`scheduler` is {scheduler!r}, but {backend!r} has none. Use it with --backend dask or ray.")
    _check_backend_installed(backend)
    missing = [cell for cell in cells if not is_finished(cell, retrain)]
    if not missing:
        return {}
    missing[0].output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(missing[0].output)
    with _Bar(cells, progress_bar, retrain) as bar:
        errors = _run(missing, jobs, backend, scheduler, retrain, bar)
    for cell in missing:
        if cell not in errors and not is_finished(cell, retrain):
            errors[cell] = f"{cell.folder} is not there: is `output` on a disk that all workers share?"
    # Once more: workers of a command that was killed may have gone only since then
    remove_leftovers(missing[0].output)
    with contextlib.suppress(OSError):
        # Only if no other command is using it
        (missing[0].output / UNFINISHED_FOLDER).rmdir()
    return errors


def _check_backend_installed(backend: str) -> None:
    package = BACKEND_PACKAGES.get(backend)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"`backend` {backend!r} needs a package that is not installed. Install it with: pip install {package}"
        )


def _run(cells: list[Cell], jobs: int, backend: str, scheduler: str | None, retrain: bool, bar: "_Bar") -> dict[Cell, str]:
    if backend != "loky":
        with _cluster(backend, jobs, scheduler):
            # With one, joblib would train here instead of on the cluster
            jobs = -1 if scheduler is not None and jobs == 1 else jobs
            return _run_parallel(cells, jobs, retrain, bar)
    errors: dict[Cell, str] = {}
    while cells:
        with joblib.parallel_config("loky", inner_max_num_threads=1):
            try:
                return errors | _run_parallel(cells, jobs, retrain, bar)
            except TerminatedWorkerError:
                # Every process of the pool is gone. Whoever was at work then is tried again, each in a process of its own
                suspects = [cell for cell in cells if cell.was_being_trained]
        remove_leftovers(cells[0].output)
        errors |= _run_apart(suspects or cells, retrain, bar)
        cells = [cell for cell in cells if cell not in errors and not is_finished(cell, retrain)]
        bar.start_again(len(errors))
    return errors


class _Parallel(joblib.Parallel):
    """Tells when a cell is through, which works with every backend, in contrast to returning a generator."""

    bar: "_Bar"
    n_seen = 0

    def print_progress(self) -> None:
        # Not once a cell: sequential joblib calls it once more at the end
        self.bar.update(self.n_completed_tasks - self.n_seen)
        self.n_seen = self.n_completed_tasks


def _run_parallel(cells: list[Cell], jobs: int, retrain: bool, bar: "_Bar") -> dict[Cell, str]:
    # One cell a task: they are long, and of different lengths
    parallel = _Parallel(n_jobs=jobs, batch_size=1)
    parallel.bar = bar
    # A cluster has its own idea of it
    bar.jobs = min(joblib.effective_n_jobs(jobs), len(cells))
    errors = parallel(joblib.delayed(train_cell)(cell, retrain) for cell in cells)
    return {cell: error for cell, error in zip(cells, errors, strict=True) if error is not None}


def _run_apart(cells: list[Cell], retrain: bool, bar: "_Bar") -> dict[Cell, str]:
    errors = {}
    for cell in cells:
        with ProcessPoolExecutor(1) as pool:
            try:
                error = pool.submit(train_cell, cell, retrain).result()
            except TerminatedWorkerError:
                error = "The process that trained it died twice: killed, out of memory, or a crash outside of Python."
        if error is not None:
            errors[cell] = error
        bar.update()
    return errors


@contextlib.contextmanager
def _cluster(backend: str, jobs: int, scheduler: str | None) -> Iterator[None]:
    """Make joblib use what the user asked for."""
    with contextlib.ExitStack() as stack:
        if backend == "dask":
            from distributed import Client, LocalCluster

            if scheduler is None:
                scheduler = stack.enter_context(
                    LocalCluster(n_workers=jobs, threads_per_worker=1, processes=True, dashboard_address=None)
                )
            stack.enter_context(Client(scheduler))
        elif backend == "ray":
            import ray
            from ray.util.joblib import register_ray

            if not ray.is_initialized():
                ray.init(address=scheduler, num_cpus=None if scheduler else jobs, include_dashboard=False)
                stack.callback(ray.shutdown)
            register_ray()
        stack.enter_context(joblib.parallel_config(backend))
        yield


class _Bar:
    """
    A progress bar over all cells, with the time that the missing ones will take.

    :param cells: All cells, the finished ones included
    :param enabled: Whether to show it
    :param retrain: Whether cells with other settings are missing
    """

    def __init__(self, cells: Sequence[Cell], enabled: bool, retrain: bool) -> None:
        self.jobs = 1
        self.retrain = retrain
        self.unseen = list(cells)
        self.n_cells = self.n_missing = len(cells)
        self.seconds: dict[tuple[str, str], list[float]] = {}
        self.n_through = 0
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        # Of its own: where cells are trained in this process, their output goes elsewhere meanwhile, and the bar's must not
        self.progress = Progress(*columns, console=Console(file=sys.stdout), disable=not enabled)
        self.task = self.progress.add_task("", total=len(cells))

    def __enter__(self) -> "_Bar":
        self.progress.start()
        self._look()
        self.n_missing = len(self.unseen)
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def update(self, n_through: int = 1) -> None:
        self.n_through += n_through
        self._look()

    def start_again(self, n_failed: int) -> None:
        """Only what is finished, and so many failures, need no training any more."""
        self._look()
        self.n_through = self.n_missing - len(self.unseen) + n_failed
        self._show()

    def _look(self) -> None:
        for cell in list(self.unseen):
            result = load_cell(cell) if is_finished(cell, self.retrain) else None
            if result is not None:
                self.unseen.remove(cell)
                self.seconds.setdefault((cell.env_id, cell.label), []).append(result.train_seconds[-1] + result.eval_seconds)
        self._show()

    def _show(self) -> None:
        # Through, but without a folder
        n_failed = max(0, self.n_through - (self.n_missing - len(self.unseen)))
        completed = self.n_cells - len(self.unseen) + n_failed
        left = seconds_left(self.unseen, self.seconds) / self.jobs
        text = f"cells, {n_failed} failed" if n_failed else "cells"
        if self.seconds and self.unseen:
            text += f", about {_duration(left)} left"
        self.progress.update(self.task, completed=completed, description=text)


def seconds_left(cells: Sequence[Cell], seconds: dict[tuple[str, str], list[float]]) -> float:
    """
    :param cells: What is to be trained
    :param seconds: Environment and label: how long finished cells took
    :return: How long they will take one after the other: as long as others of their kind did, or else as others on their
        environment, or as all
    """

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def guess(cell: Cell) -> float:
        same = seconds.get((cell.env_id, cell.label), [])
        same_env = [second for (env_id, _), values in seconds.items() if env_id == cell.env_id for second in values]
        everything = [second for values in seconds.values() for second in values]
        return mean(same or same_env or everything or [0.0])

    return sum(guess(cell) for cell in cells)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{minutes // 60} h {minutes % 60:02d} min"
        if minutes >= 60
        else f"{minutes} min"
    )


# ------------------------------------------------------------------ results


def results_frame(cells: Sequence[Cell], errors: dict[Cell, str]) -> pd.DataFrame:
    """
    :param cells: All cells
    :param errors: Tracebacks of those that failed
    :return: One row for each cell and evaluation: ``algorithm, env_id, seed, status`` (``"finished"`` or ``"failed"``),
        ``evaluation`` (0 is before training), ``grid_timesteps`` (env steps at which it was to be), ``timesteps`` (at which it
        was), ``mean_reward`` and ``std_reward`` over its episodes, ``mean_ep_length``, ``train_seconds`` (wall time up to it,
        without evaluations), ``train_cpu_seconds``, ``eval_seconds`` (of all evaluations of the cell), ``folder``, ``error``.
        A failed cell has one row, without figures
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
    columns = [
        "algorithm",
        "env_id",
        "seed",
        "status",
        "evaluation",
        "grid_timesteps",
        "timesteps",
        "mean_reward",
        "std_reward",
    ]
    columns += ["mean_ep_length", "train_seconds", "train_cpu_seconds", "eval_seconds", "folder", "error"]
    return pd.DataFrame(rows, columns=columns)


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


# ------------------------------------------------------------------ command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--env", nargs="+", required=True, help="ids of environments")
    parser.add_argument(
        "--algo",
        nargs="+",
        default=[DEFAULT_ALGORITHM, "a2c"],
        help=f"RL Zoo's ids, ours among them; the others are compared with the first. {MATCHED}: A2C with our optimizer, "
        "learning rate and number of environments (default: %(default)s)",
    )
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument(
        "--seeds",
        nargs="+",
        metavar="N",
        help=f"seeds 0 to N-1: one number, or ENV:N where it is another than {DEFAULT_SEEDS} (default: {DEFAULT_SEEDS})",
    )
    seeds.add_argument("--seed-list", nargs="+", type=int, metavar="SEED", help="these seeds")
    parser.add_argument(
        "--total-timesteps",
        nargs="+",
        metavar="N",
        help="budget in env steps: one number, or ENV:N for each (default: the smallest of the configs' n_timesteps)",
    )
    parser.add_argument(
        "--conf",
        nargs="+",
        default=[],
        metavar="ALGO:PATH",
        help="files of hyperparameters; a PATH alone is for the first algorithm (default: ours and RL Zoo's)",
    )
    parser.add_argument(
        "--n-evaluations",
        nargs="+",
        metavar="N",
        default=[str(DEFAULT_EVALUATIONS)],
        help="evaluations during training: one number, or ENV:N where it is another than "
        f"{DEFAULT_EVALUATIONS} (default: {DEFAULT_EVALUATIONS})",
    )
    parser.add_argument("--eval-episodes", type=int, default=20, help="greedy episodes of each (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="cells trained at a time (default: %(default)s)")
    parser.add_argument("--backend", choices=BACKENDS, default="loky", help="where they are trained (default: %(default)s)")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask or Ray cluster (default: one on this machine)")
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write to (default: %(default)s)")
    parser.add_argument("--retrain", action="store_true", help="train again cells that are there with other settings")
    parser.add_argument("--device", default="cpu", help="device of the models (default: %(default)s)")
    parser.add_argument("--gym-packages", nargs="+", default=[], help="modules to import that register environments")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(arguments: argparse.Namespace) -> int:
    frame = compare(
        envs=arguments.env,
        algorithms=arguments.algo,
        seeds=arguments.seed_list or (parse_by_env("seeds", arguments.seeds) if arguments.seeds else DEFAULT_SEEDS),
        total_timesteps=parse_by_env("total_timesteps", arguments.total_timesteps) if arguments.total_timesteps else None,
        configs=parse_configs(arguments.conf, arguments.algo),
        n_evaluations=parse_by_env("n_evaluations", arguments.n_evaluations),
        eval_episodes=arguments.eval_episodes,
        jobs=arguments.jobs,
        backend=arguments.backend,
        scheduler=arguments.scheduler,
        output=arguments.output,
        retrain=arguments.retrain,
        device=arguments.device,
        gym_packages=arguments.gym_packages,
        progress_bar=not arguments.no_progress,
        # Wide enough for the tables where nobody sees the edge
        console=Console(width=None if sys.stdout.isatty() else 200),
    )
    return 1 if (frame["status"] == "failed").any() else 0


def parse_by_env(name: str, values: list[str]) -> int | dict[str, int]:
    """
    :param name: Name of the argument of :func:`compare`
    :param values: ``["1e5"]``, or ``["CartPole-v1:1e5", ...]``
    :return: The argument
    :raises ValueError: They are neither
    """
    if len(values) == 1 and ":" not in values[0]:
        return _integer(name, values[0])
    by_env = {}
    for value in values:
        env_id, separator, number = value.rpartition(":")
        if not separator:
            raise ValueError(f"`{name}` {value!r} names no environment. Give one number, or ENV:N for each.")
        if env_id in by_env:
            raise ValueError(f"`{name}` is given twice for {env_id!r}. Give it once.")
        by_env[env_id] = _integer(name, number)
    return by_env


def _integer(name: str, text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not number.is_integer():
        raise ValueError(f"`{name}` {text!r} is no integer. Give e.g. 100000 or 1e5.")
    return int(number)


def parse_configs(values: list[str], algorithms: list[str]) -> dict[str, str]:
    """
    :param values: ``ALGO:PATH``, or a path alone for the first algorithm
    :param algorithms: What is compared
    :return: Algorithm: path
    :raises ValueError: One has two paths
    """
    known = {*zoo_algorithms(), *(_base(label) for label in algorithms)}
    configs: dict[str, str] = {}
    for value in values:
        algorithm, separator, path = value.partition(":")
        if not separator or algorithm not in known:
            algorithm, path = _base(algorithms[0]), value
        if algorithm in configs:
            raise ValueError(f"`conf` is given twice for {algorithm!r}: {configs[algorithm]!r} and {path!r}. Give it once.")
        configs[algorithm] = path
    return configs
