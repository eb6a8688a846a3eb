"""Where the cells are trained: processes of this machine, this process, a Dask or a Ray cluster."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any

import joblib
from joblib.externals.loky.process_executor import ProcessPoolExecutor, TerminatedWorkerError

from sb3_episodic_a2c.guards.arguments import check_positive
from sb3_episodic_a2c.tools.comparison.cells import UNFINISHED_FOLDER, Cell, is_finished, remove_leftovers
from sb3_episodic_a2c.tools.comparison.progress import CellProgress
from sb3_episodic_a2c.tools.comparison.training import train_cell
from sb3_episodic_a2c.tools.extras import install

BACKENDS = ("loky", "sequential", "dask", "ray")
"""Processes of this machine (joblib's loky), this process, a Dask or a Ray cluster."""

BACKEND_PACKAGES = {"dask": "distributed", "ray": "ray"}
"""Cluster backend: the package that it needs, which the extra of the backend's name brings."""


def run_cells(
    cells: Sequence[Cell],
    jobs: int = 1,
    backend: str = "loky",
    scheduler: str | None = None,
    retrain: bool = False,
    progress_bar: bool = False,
) -> dict[Cell, str]:
    """
    Train the cells that are not finished. The other arguments are those of :func:`sb3_episodic_a2c.tools.comparison.compare`.

    :param cells: All cells
    :return: Traceback of each cell that failed. The others are finished
    :raises ValueError: An argument is out of its range, or the package of the backend is missing
    """
    jobs = check_positive("`jobs`", jobs, f" This machine has {os.cpu_count()} processors.")
    if backend not in BACKENDS:
        raise ValueError(f"`backend` {backend!r} is unknown. Use one of {BACKENDS}.")
    if scheduler is not None and backend not in BACKEND_PACKAGES:
        raise ValueError(f"`scheduler` is {scheduler!r}, but {backend!r} has none. Use it with --backend dask or ray.")
    _check_installed(backend)
    missing = [cell for cell in cells if not is_finished(cell, retrain)]
    if not missing:
        return {}
    missing[0].output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(missing[0].output)
    with CellProgress(cells, progress_bar, retrain) as progress:
        errors = _run(missing, jobs, backend, scheduler, retrain, progress)
    for cell in missing:
        if cell not in errors and not is_finished(cell, retrain):
            errors[cell] = f"{cell.folder} is missing. Put `output` on a disk that all workers share."
    # Once more: workers of an earlier command that was killed may have ended only since then
    remove_leftovers(missing[0].output)
    with contextlib.suppress(OSError):
        # It stays where another command still uses it
        (missing[0].output / UNFINISHED_FOLDER).rmdir()
    return errors


def _check_installed(backend: str) -> None:
    package = BACKEND_PACKAGES.get(backend)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(f"`backend` {backend!r} needs a package that is not installed. Install it with: {install(backend)}")


def _run(
    cells: list[Cell], jobs: int, backend: str, scheduler: str | None, retrain: bool, progress: CellProgress
) -> dict[Cell, str]:
    if backend != "loky":
        with _cluster(backend, jobs, scheduler):
            # -1: all processors of a cluster. With 1, joblib would train in this process instead
            jobs = -1 if scheduler is not None and jobs == 1 else jobs
            return _run_on_cluster(cells, jobs, backend, retrain, progress)
    errors: dict[Cell, str] = {}
    while cells:
        with joblib.parallel_config("loky", inner_max_num_threads=1):
            try:
                return errors | _run_parallel(cells, jobs, retrain, progress)
            except TerminatedWorkerError:
                # One process died, and joblib has ended all others. Each cell that was at work is tried again, in a process
                # of its own
                suspects = [cell for cell in cells if cell.was_being_trained]
        remove_leftovers(cells[0].output)
        errors |= _run_apart(suspects or cells, retrain, progress)
        cells = [cell for cell in cells if cell not in errors and not is_finished(cell, retrain)]
        progress.start_again(len(errors))
    return errors


class _Parallel(joblib.Parallel):
    """Reports each cell that is done. Unlike joblib's results as a generator, this works with every backend."""

    progress: CellProgress
    n_seen = 0

    def print_progress(self) -> None:
        # The difference, as sequential joblib calls this once more at the end
        self.progress.update(self.n_completed_tasks - self.n_seen)
        self.n_seen = self.n_completed_tasks


def _run_parallel(cells: list[Cell], jobs: int, retrain: bool, progress: CellProgress) -> dict[Cell, str]:
    # One cell per task: cells take long, and unequally long
    parallel = _Parallel(n_jobs=jobs, batch_size=1)
    parallel.progress = progress
    # A cluster has a number of its own
    progress.jobs = min(joblib.effective_n_jobs(jobs), len(cells))
    errors = parallel(joblib.delayed(train_cell)(cell, retrain) for cell in cells)
    return {cell: error for cell, error in zip(cells, errors, strict=True) if error is not None}


def _run_on_cluster(cells: list[Cell], jobs: int, backend: str, retrain: bool, progress: CellProgress) -> dict[Cell, str]:
    """Dask trains the cell of a dead worker elsewhere. Ray gives all of them up, so what is left is started again."""
    n_left = None
    while True:
        try:
            return _run_parallel(cells, jobs, retrain, progress)
        except _errors_of_a_dead_worker(backend):
            cells = [cell for cell in cells if not is_finished(cell, retrain)]
            if len(cells) == n_left:
                # Twice without a cell between: it will die again
                raise
            if not cells:
                return {}
            n_left = len(cells)
            remove_leftovers(cells[0].output)
            progress.start_again(0)


def _errors_of_a_dead_worker(backend: str) -> tuple[type[BaseException], ...]:
    if backend != "ray":
        return ()
    from ray.exceptions import RayActorError

    return (RayActorError,)


def _run_apart(cells: list[Cell], retrain: bool, progress: CellProgress) -> dict[Cell, str]:
    """Train each cell in a process of its own, so that one that dies takes no other with it."""
    errors = {}
    for cell in cells:
        with ProcessPoolExecutor(1) as pool:
            try:
                error = pool.submit(train_cell, cell, retrain).result()
            except TerminatedWorkerError:
                error = "The process that trained it died twice: killed, out of memory, or a crash outside of Python."
        if error is not None:
            errors[cell] = error
        progress.update()
    return errors


@contextlib.contextmanager
def _cluster(backend: str, jobs: int, scheduler: str | None) -> Iterator[None]:
    """Make joblib use a backend other than loky; without ``scheduler``, a cluster of its own for as long as that takes."""
    with contextlib.ExitStack() as stack:
        if backend == "dask":
            import dask
            from distributed import Client, LocalCluster

            if scheduler is None:
                # Otherwise its workers may start no processes, which `vectorization="subproc"` does
                with dask.config.set({"distributed.worker.daemon": False}):
                    cluster = LocalCluster(n_workers=jobs, threads_per_worker=1, processes=True, dashboard_address=None)
                stack.callback(_close, cluster)
                scheduler = cluster.scheduler_address
            client = Client(scheduler)
            stack.callback(_close, client)
        elif backend == "ray":
            import ray
            from ray.util.joblib import register_ray

            if not ray.is_initialized():
                ray.init(address=scheduler, num_cpus=None if scheduler else jobs, include_dashboard=False)
                stack.callback(ray.shutdown)
            register_ray()
        stack.enter_context(joblib.parallel_config(backend))
        yield


def _close(client_or_cluster: Any) -> None:
    # A worker that does not end in time is no reason to lose the report: the cells are on the disk
    with contextlib.suppress(Exception):
        client_or_cluster.close()
