"""The grid: which cells a comparison has, planned and checked before anything is trained."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sb3_episodic_a2c.guards.arguments import check_positive, is_integer
from sb3_episodic_a2c.tools.comparison.cells import Cell
from sb3_episodic_a2c.tools.comparison.hyperparams import check_algorithm, hyperparams_of, zoo_id
from sb3_episodic_a2c.tools.entries import checked_env, import_packages
from sb3_episodic_a2c.tools.vectorization import check_vectorization
from sb3_episodic_a2c.tools.zoo import TRAINING_ONLY, register

DEFAULT_SEEDS = 10

DEFAULT_EVALUATIONS = 20

DEFAULT_OUTPUT = Path("comparison")


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
    vectorization: str = "dummy",
) -> list[Cell]:
    """
    Arguments as in :func:`sb3_episodic_a2c.tools.comparison.compare`.

    :return: The cells in the order in which they are trained. Algorithms take turns: a slow moment of the machine then slows
        all of them down, and a comparison that was cut short has about equally many seeds of each
    :raises ValueError: An argument is out of its range, or does not fit another
    """
    if Path(output).exists() and not Path(output).is_dir():
        raise ValueError(f"`output` {output} is a file. Give a folder.")
    eval_episodes = check_positive("`eval_episodes`", eval_episodes)
    register()
    import_packages(gym_packages)
    envs, algorithms = _distinct("env", envs), _distinct("algo", algorithms)
    for env_id in envs:
        checked_env(env_id).close()
        check_vectorization(vectorization, env_id)
    seeds_of = _seeds_of(envs, seeds)
    n_evaluations_of = _n_evaluations_of(envs, n_evaluations)
    configs = {} if configs is None else configs
    for label in algorithms:
        check_algorithm(label)
    if unused := sorted(configs.keys() - {zoo_id(label) for label in algorithms}):
        raise ValueError(f"`conf` is given for {unused[0]!r}, which is not compared. The algorithms are {list(algorithms)}.")
    hyperparams = {(env_id, label): hyperparams_of(label, env_id, configs) for env_id in envs for label in algorithms}
    budgets = _budgets(envs, algorithms, hyperparams, total_timesteps)
    cells = [
        Cell(
            label=label,
            algorithm=zoo_id(label),
            env_id=env_id,
            seed=seeds_of[env_id][index],
            hyperparams=hyperparams[env_id, label],
            total_timesteps=budgets[env_id],
            n_evaluations=n_evaluations_of[env_id],
            eval_episodes=eval_episodes,
            output=Path(output).absolute(),
            gym_packages=tuple(gym_packages),
            device=device,
            vectorization=vectorization,
        )
        for index in range(max(map(len, seeds_of.values())))
        for env_id in envs
        if index < len(seeds_of[env_id])
        for label in algorithms
    ]
    _check_same_environments(cells)
    _check_room_for_evaluations(cells)
    return cells


def _seeds_of(envs: Sequence[str], seeds: int | Sequence[int] | dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Environment: its seeds."""
    if not isinstance(seeds, dict):
        return dict.fromkeys(envs, _check_seeds(seeds))
    _check_compared("seeds", seeds, envs)
    return {env_id: _check_seeds(seeds.get(env_id, DEFAULT_SEEDS)) for env_id in envs}


def _n_evaluations_of(envs: Sequence[str], n_evaluations: int | dict[str, int]) -> dict[str, int]:
    """Environment: its number of evaluations during training."""
    if not isinstance(n_evaluations, dict):
        n_evaluations = dict.fromkeys(envs, n_evaluations)
    _check_compared("n_evaluations", n_evaluations, envs)
    return {env_id: check_positive("`n_evaluations`", n_evaluations.get(env_id, DEFAULT_EVALUATIONS)) for env_id in envs}


def _budgets(
    envs: Sequence[str],
    algorithms: Sequence[str],
    hyperparams: dict[tuple[str, str], dict[str, Any]],
    total_timesteps: int | dict[str, int] | None,
) -> dict[str, int]:
    """Environment: the budget of all algorithms, in env steps."""
    budgets = {env_id: int(min(hyperparams[env_id, label]["n_timesteps"] for label in algorithms)) for env_id in envs}
    if isinstance(total_timesteps, dict):
        _check_compared("total_timesteps", total_timesteps, envs)
        budgets.update(total_timesteps)
    elif total_timesteps is not None:
        budgets = dict.fromkeys(envs, total_timesteps)
    return {env_id: check_positive(f"`total_timesteps` of {env_id}", budget) for env_id, budget in budgets.items()}


# ------------------------------------------------------------------ checks


def _check_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    if not isinstance(seeds, Iterable):
        if not is_integer(seeds, 1):
            raise ValueError(f"`seeds` is {seeds!r}. It must be an integer >= 1, or a list of seeds.")
        return tuple(range(seeds))
    for seed in seeds:
        # NumPy's seeds have 32 bits, and each environment of a training adds its index
        if not is_integer(seed, 0) or seed >= 2**31:
            raise ValueError(f"`seeds` holds {seed!r}. Each must be an integer >= 0 and < 2**31.")
    return _distinct("seeds", [int(seed) for seed in seeds])


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


def _check_same_environments(cells: Sequence[Cell]) -> None:
    first: dict[str, Cell] = {}
    for cell in cells:
        other = first.setdefault(cell.env_id, cell)
        if cell.eval_env_kwargs != other.eval_env_kwargs:
            raise ValueError(
                f"`env_kwargs` of {cell.env_id} are {other.eval_env_kwargs} for {other.label} and {cell.eval_env_kwargs} for "
                f"{cell.label}: these are two environments, so their rewards do not compare. Only {', '.join(TRAINING_ONLY)} "
                "may differ, as evaluations do without. Give both the same with --conf ALGO:PATH."
            )


def _check_room_for_evaluations(cells: Sequence[Cell]) -> None:
    for cell in cells:
        if cell.total_timesteps // cell.n_evaluations < cell.n_envs:
            raise ValueError(
                f"`n_evaluations` is {cell.n_evaluations}: too many for {cell.total_timesteps:,} env steps of {cell.label} on "
                f"{cell.env_id}, which takes {cell.n_envs} at a time. Use at most {cell.total_timesteps // cell.n_envs}."
            )
