"""
Algorithms side by side: a grid of trainings (algorithm x environment x seed), with statistics, tables and plots.

RL Zoo does each training with the hyperparameters of our and of the Zoo's files, unless --conf names others.
Each leaves an ordinary run folder of the Zoo: `enjoy --algo a2c -f comparison --exp-id 3` plays seed 2, and
`all_plots -f comparison` works.

What you get in the output folder
  report.md      Also printed. First one line an environment: by how much the first algorithm is better, with
                 its interval, and how long each trained. Then for each environment and over all of them: IQM
                 with 95% stratified bootstrap intervals, mean and standard deviation of the final evaluation
                 and of the area under the evaluation curve; the probability that the first algorithm is better;
                 env steps and wall time until the reward threshold, env steps until the evaluations stayed
                 there; env steps/s. Then failed trainings with their errors, hyperparameters, versions, and what
                 is fair and what is not
  results.csv    One row for each training and evaluation
  results.json   Everything in the report
  *.png, *.svg   Learning curves over env steps and over wall time, IQMs with intervals, performance profiles

Kept work
  A finished training is kept. The same command again, or one with more seeds, environments or algorithms,
  trains only what is missing. Stop it with Ctrl-C, kill it or lose a worker: start it again. An algorithm whose
  file has a smaller budget lowers the default budget of all: give --total-timesteps when you add one.
  Results of other settings are never mixed in: they are an error, unless --retrain says to train those again.
  A training that fails is in the tables with its error. The others go on, and the exit status is 1.

Backends
  --jobs N trains in N processes of this machine (joblib's loky), --backend sequential in this process.
  --backend dask --scheduler tcp://HOST:8786 and --backend ray --scheduler HOST:6379 train on a cluster that can
  import this package and shares the output folder (extras dask and ray). The results are identical bit for bit,
  except for the times.

Fairness: the same for all algorithms
  Budget         To the step: no algorithm overshoots it by a rollout. The default is the smallest in their files
  Seeds          Those of networks, actions and environments
  Evaluations    Greedy, at the same env steps, from the same first states, which no two seeds share, and in the
                 same environment: `env_kwargs` must be equal, except for `max_episode_steps`, which is for
                 training only
  Times          One torch thread each, without evaluations. Algorithms take turns. The report says where some
                 were trained at other times, or by other code

Fairness: what differs
  How much each algorithm was tuned, and for which budget. The report says what is known. `--algo a2c-matched`
  adds a row for A2C with our optimizer, learning rate and number of environments.

Over all environments
  Scores are normalised: 0 is what random actions get, 1 is the environment's reward threshold. Where it has
  none, 1 is the best final evaluation of any run in the comparison.
  `statistics.py` says how the intervals are computed, and how often they hold the true figure.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sb3_episodic_a2c.tools.comparison.cells import Cell, is_finished
from sb3_episodic_a2c.tools.comparison.grid import DEFAULT_EVALUATIONS, DEFAULT_OUTPUT, DEFAULT_SEEDS, plan_cells
from sb3_episodic_a2c.tools.zoo import DEFAULT_ALGORITHM

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console


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
    vectorization: str = "dummy",
    progress_bar: bool = False,
    console: "Console | None" = None,
) -> "pd.DataFrame":
    """
    Train a grid of algorithms, environments and seeds, and report on it.

    Writes to the output folder a run folder for each cell, as RL Zoo's ``train`` does, and the report, see
    :func:`sb3_episodic_a2c.tools.comparison.report.write_report`.

    :param envs: Ids of environments
    :param algorithms: Ids in the Zoo, ours among them, or ``"a2c-matched"``. The others are compared with the first
    :param seeds: A number ``n``, for 0 to ``n - 1``; or a list of seeds; or environment: number, for environments where it is
        not 10. They are the same for all algorithms
    :param total_timesteps: Budget in env steps, one for all environments or one for each; by default the smallest of the
        ``n_timesteps`` in the configs of the algorithms
    :param configs: Algorithm: path of a file of hyperparameters, as the Zoo's ``--conf-file``; by default our files and the
        Zoo's
    :param n_evaluations: Number of evaluations during training, after one before it; or environment: number, for environments
        where it is not 20
    :param eval_episodes: Greedy episodes of an evaluation
    :param jobs: Number of processes. On an existing cluster (``scheduler``) only ``"ray"`` uses it, and 1 means all processors
    :param backend: One of :data:`sb3_episodic_a2c.tools.comparison.backends.BACKENDS`
    :param scheduler: Address of the cluster, for ``"dask"`` or ``"ray"``; by default one of ``jobs`` processes on this machine
    :param output: Folder to write to, on a disk that all workers share. What a comparison has left there is used
    :param retrain: Whether to train again cells that are there with other settings, and then lose the old ones; by default
        they are an error
    :param device: Device (cpu, cuda, ...) of the models
    :param gym_packages: Modules to import that register environments
    :param vectorization: How copies of an environment are stepped in training, see
        :func:`sb3_episodic_a2c.tools.vectorization.make_vec_env`
    :param progress_bar: Whether to show a progress bar over cells
    :param console: Where to print the tables; None: nowhere
    :return: One row for each cell and evaluation, see :func:`sb3_episodic_a2c.tools.comparison.frame.results_frame`. A cell
        that failed has one row, with its ``error``
    :raises ValueError: An argument is out of its range or does not fit another, or the package of the backend is missing.
        Nothing is trained then
    """
    # Here, as each worker imports this package and needs none of it
    from rich.console import Console

    from sb3_episodic_a2c.tools.comparison.backends import run_cells
    from sb3_episodic_a2c.tools.comparison.frame import results_frame
    from sb3_episodic_a2c.tools.comparison.report import write_report

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
        vectorization=vectorization,
    )
    try:
        errors = run_cells(cells, jobs=jobs, backend=backend, scheduler=scheduler, retrain=retrain, progress_bar=progress_bar)
    except BaseException:
        # Ctrl-C, or e.g. a cluster that went away
        if n_kept := sum(_is_kept(cell) for cell in cells):
            print(f"{n_kept} of {len(cells)} cells are finished: the same command again trains the others.", file=sys.stderr)
        raise
    frame = results_frame(cells, errors)
    write_report(frame, cells, Path(output), configs or {}, console=console or Console(quiet=True))
    return frame


def _is_kept(cell: Cell) -> bool:
    with suppress(ValueError):
        return is_finished(cell)
    return False
