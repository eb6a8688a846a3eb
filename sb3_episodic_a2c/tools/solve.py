"""The main job: train on an environment until it is solved, and keep the model, a learning curve and a GIF of the agent."""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import get_monitor_files, load_results
from stable_baselines3.common.vec_env import VecEnv

from sb3_episodic_a2c import EpisodicA2C, ResumableCheckpointCallback, notebook_preset, resume
from sb3_episodic_a2c.callbacks import EpisodeProgressCallback, SolvedAt, StopTrainingOnSolved
from sb3_episodic_a2c.guards.arguments import check_spaces
from sb3_episodic_a2c.guards.files import atomic_write
from sb3_episodic_a2c.tools.record import one_line, reason_against_pictures, record_gif, without_images

try:
    import fcntl
except ImportError:
    # Windows, where two processes that write to one folder go unnoticed
    fcntl = None  # type: ignore[assignment]  # mypy does not allow None for a module

DEFAULT_TOTAL_TIMESTEPS = 500_000

PRESETS = ("default", "notebook")

CHECKPOINTS = "checkpoints"
"""Folder in the output folder of a run, as long as the run is not finished."""

REMOVED = f".{CHECKPOINTS}.done"
"""Its name while it is removed at the end."""

SAVE_FREQ = 10_000
"""Env steps between two checkpoints."""


@dataclass(frozen=True)
class SolveResult:
    """What :func:`solve` did and where it put it."""

    env_id: str
    seed: int
    solved_at: SolvedAt | None
    """None if the budget ended first."""
    mean_reward: float
    """Over the last 100 training episodes, or all if there are fewer."""
    num_timesteps: int
    seconds: float
    """Of the training, since it was last resumed."""
    output: Path
    gif_rewards: list[float]
    """Of the episodes in the GIF; empty if there is none."""


def preset_arguments(preset: str, observation_space: spaces.Space) -> dict[str, Any]:
    """
    :param preset: ``"default"``: the defaults of :class:`EpisodicA2C`. ``"notebook"``: the notebook's setting
    :param observation_space: Decides the policy of the default preset
    :return: Arguments of :class:`EpisodicA2C`, the policy among them
    :raises ValueError: There is no preset of that name
    """
    if preset not in PRESETS:
        raise ValueError(f"`preset` {preset!r} is unknown. Use one of {PRESETS}.")
    if preset == "notebook":
        return notebook_preset()
    if isinstance(observation_space, spaces.Dict):
        return {"policy": "MultiInputPolicy"}
    is_image = isinstance(observation_space, spaces.Box) and len(observation_space.shape) == 3
    return {"policy": "CnnPolicy" if is_image else "MlpPolicy"}


def solve(
    env_id: str,
    preset: str = "default",
    seed: int = 0,
    n_envs: int = 1,
    total_timesteps: int = DEFAULT_TOTAL_TIMESTEPS,
    output: str | Path | None = None,
    reward_threshold: float | None = None,
    progress_bar: bool = True,
    fresh: bool = False,
    gif: bool = True,
) -> SolveResult:
    """
    Train until the mean reward of 100 consecutive training episodes exceeds the threshold, or the budget ends.

    Writes to the output folder: ``model.zip``, ``learning_curve.png``, ``agent.gif``, ``result.json``, and the rewards of all
    episodes as SB3's ``*.monitor.csv``. A run that is not finished also has checkpoints. The same call again goes on from the
    newest one, as if it had never been stopped (environments that cannot be pickled start fresh episodes).

    :param env_id: Id of the environment
    :param preset: See :func:`preset_arguments`
    :param seed: Seed of the model and the environments
    :param n_envs: Number of parallel environments
    :param total_timesteps: The most env steps
    :param output: The folder to write to; by default ``runs/ENV-PRESET-seedSEED``, with a number if a run is there that is
        finished, has another ``n_envs``, or is still running
    :param reward_threshold: The mean reward to exceed; by default the environment's own
    :param progress_bar: Whether to show a progress bar over episodes
    :param fresh: Whether to start anew where an unfinished run could go on. An unfinished run in ``output`` is deleted
    :param gif: Whether to write ``agent.gif``. An environment that cannot be rendered is trained all the same, without it
    :return: What happened
    :raises ValueError: An argument is out of its range, or ``output`` holds another run
    """
    for name, value in {"n_envs": n_envs, "total_timesteps": total_timesteps}.items():
        if value < 1:
            raise ValueError(f"`{name}` is {value}. It must be an integer >= 1.")
    if preset == "notebook" and n_envs != 1:
        raise ValueError(f"`n_envs` is {n_envs}, but the notebook has one environment. Use 1, or the default preset.")
    for package in ("matplotlib", "pandas"):
        # Now, not when the learning curve is drawn after the training
        importlib.import_module(package)
    # Before the folder is made: an unknown environment or preset must not leave one behind
    probe = gym.make(env_id)
    arguments = preset_arguments(preset, probe.observation_space)
    check_spaces(arguments["policy"], probe.observation_space, probe.action_space, EpisodicA2C.supported_action_spaces)
    if reward_threshold is None:
        if probe.spec is None or probe.spec.reward_threshold is None:
            raise ValueError(
                f"{env_id} has no reward threshold of its own, so there is no telling when it is solved. "
                "Give `reward_threshold` (--reward-threshold)."
            )
        reward_threshold = probe.spec.reward_threshold
    probe.close()
    if gif and (reason := reason_against_pictures(env_id)) is not None:
        print(f"There will be no GIF of {env_id}: {reason}")
        gif = False
    # A run only goes on with the same of these. The budget and the threshold may change
    settings = {"env_id": env_id, "preset": preset, "seed": seed, "n_envs": n_envs}
    folder, lock = _open_folder(settings, output, fresh)

    def make_env(first_index: int) -> VecEnv:
        return make_vec_env(without_images(env_id), n_envs, seed, first_index, monitor_dir=str(folder))

    # Unlocks the folder whatever happens
    with lock:
        device = "auto" if arguments["policy"] == "CnnPolicy" else "cpu"
        model = _resume(folder, make_env, device)
        solved = StopTrainingOnSolved(reward_threshold)
        if model is None:
            model = EpisodicA2C(env=make_env(0), seed=seed, device=device, **arguments)
        else:
            print(f"Going on with {folder}, after {model.num_timesteps:,} env steps.")
            solved.resume(model)
        assert model.env is not None
        progress = EpisodeProgressCallback(desc=env_id, disable=not progress_bar, initial=model._episode_num)
        checkpoints = ResumableCheckpointCallback(folder / CHECKPOINTS, SAVE_FREQ)
        start = time.perf_counter()
        try:
            if solved.solved_at is None and model.num_timesteps < total_timesteps:
                model.learn(
                    total_timesteps - model.num_timesteps,
                    # The bar first, so that it still shows the last episode
                    callback=CallbackList([progress, solved, checkpoints]),
                    reset_num_timesteps=False,
                )
        finally:
            # Also after Ctrl-C, so that what was learnt is kept
            model.save(folder / "model.zip")
            model.env.close()
        seconds = time.perf_counter() - start

        curve, agent = folder / "learning_curve.png", folder / "agent.gif"
        _write_picture(curve, lambda: plot_learning_curve(folder, env_id, reward_threshold, solved.solved_at))
        gif_rewards: list[float] = []
        if gif:
            gif_rewards = _write_picture(agent, lambda: record_gif(model, env_id, agent, seed=seed, max_steps=1_000)) or []
        result = SolveResult(
            env_id, seed, solved.solved_at, solved.mean_reward, model.num_timesteps, seconds, folder, gif_rewards
        )
        record = {
            **settings,
            "total_timesteps": total_timesteps,
            "reward_threshold": reward_threshold,
            "solved_at": solved.solved_at._asdict() if solved.solved_at else None,
            # JSON has no NaN
            "mean_reward": None if np.isnan(result.mean_reward) else result.mean_reward,
            "num_timesteps": result.num_timesteps,
            "seconds": seconds,
            "gif_rewards": gif_rewards,
        }
        with atomic_write(folder / "result.json") as file:
            file.write((json.dumps(record, indent=2) + "\n").encode())
        # The run is finished, and must not go on from a checkpoint. Renaming does that at once: a kill may come while the
        # files are removed
        os.replace(folder / CHECKPOINTS, folder / REMOVED)
        shutil.rmtree(folder / REMOVED, ignore_errors=True)
        return result


# ---------------------------------------------------------------------- runs that were stopped


def _open_folder(settings: dict[str, Any], output: str | Path | None, fresh: bool) -> tuple[Path, IO[str]]:
    """
    Choose the output folder, a new one or that of an unfinished run of the same settings.

    :return: The folder, and a file that locks it for other processes until it is closed or this process ends
    :raises ValueError: ``output`` cannot be used
    """
    if output is not None:
        return Path(output), _claim(Path(output), settings, fresh)
    name = "{env_id}-{preset}-seed{seed}".format(**settings).replace("/", "-")
    for number in itertools.count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not (fresh and folder.exists()):
            with contextlib.suppress(ValueError):
                return folder, _claim(folder, settings, fresh)
    raise AssertionError("there is always another number")


def _claim(folder: Path, settings: dict[str, Any], fresh: bool) -> IO[str]:
    """See :func:`_open_folder`. A run is unfinished as long as the file with its lock exists."""
    # A run that was killed at its very end has left this
    shutil.rmtree(folder / REMOVED, ignore_errors=True)
    lock = _lock(folder, fresh)
    try:
        lock.seek(0)
        started_with = json.loads(lock.read() or "{}")
        if not started_with:
            # Checked again under the lock, as another process may have changed the folder before
            _check_unused(folder, fresh)
        elif not fresh and started_with != settings:
            raise ValueError(
                f"`output` {folder} holds an unfinished run with {started_with}, which cannot go on with {settings}. "
                "Give another folder, or start anew with `fresh` (--fresh), which deletes that run."
            )
        if fresh:
            for path in _files_of_training(folder):
                path.unlink()
        if fresh or not started_with:
            lock.truncate(0)
            json.dump(settings, lock)
            lock.flush()
    except BaseException:
        lock.close()
        raise
    return lock


def _lock(folder: Path, fresh: bool) -> IO[str]:
    """
    :return: The file with the settings of the folder's unfinished run, locked; a new, empty one if there is no such run
    :raises ValueError: Another process has locked it, or the folder holds other files
    """
    path = folder / CHECKPOINTS / "settings.json"
    while True:
        if not path.exists():
            _check_unused(folder, fresh)
            path.parent.mkdir(parents=True, exist_ok=True)
        # If the file is missing from here on, its run has just finished and removed it: look again
        with contextlib.ExitStack() as stack, contextlib.suppress(FileNotFoundError):
            lock = stack.enter_context(open(path, "a+"))
            try:
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"`output` {folder} belongs to a run that is not over yet. Give another folder.") from error
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                stack.pop_all()
                return lock


def _check_unused(folder: Path, fresh: bool) -> None:
    """
    Check a folder without an unfinished run.

    :raises ValueError: A new run would overwrite something in it
    """
    if (folder / "model.zip").exists():
        raise ValueError(f"`output` {folder} holds a model already, which would be lost. Give another folder.")
    paths = _files_of_training(folder)
    if paths and not fresh:
        raise ValueError(
            f"`output` {folder} holds files of another training, e.g. {paths[0].relative_to(folder)}. Give another folder, or "
            "`fresh` (--fresh), which deletes them."
        )


def _files_of_training(folder: Path) -> list[Path]:
    return [*(folder / CHECKPOINTS).glob("*.zip"), *folder.glob("*.monitor.csv")]


def _resume(folder: Path, make_env: Callable[[int], VecEnv], device: str) -> EpisodicA2C | None:
    """
    :param make_env: Makes the environments if the checkpoint does not hold them, given the number of their first log
    :return: The model of an unfinished run as it was at its newest checkpoint; None if there is no checkpoint yet
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* holds no environments")
        model = resume(folder / CHECKPOINTS, device=device)
    if model is not None and model.env is None:
        n_logs = _cut_logs(folder, model._episode_num)
        model = resume(folder / CHECKPOINTS, make_env(n_logs), device=device)
    return model


def _cut_logs(folder: Path, n_episodes: int) -> int:
    """
    Keep only the first episodes in the ``*.monitor.csv``: the episodes after the checkpoint will be played again, differently.

    :return: Number of logs
    """
    logs = {Path(name): _read_log(Path(name)) for name in get_monitor_files(str(folder))}
    # When each episode ended: the start of the log plus the last of "r,l,t"
    times = {
        path: [json.loads(header[1:])["t_start"] + float(row.split(",")[2]) for row in rows]
        for path, (header, _, *rows) in logs.items()
    }
    last_times = sorted(time for log_times in times.values() for time in log_times)[:n_episodes][-1:]
    for path, lines in logs.items():
        n_kept = sum(time <= last_time for last_time in last_times for time in times[path])
        with atomic_write(path) as file:
            file.write("".join(lines[: 2 + n_kept]).encode())
    return len(logs)


def _read_log(path: Path) -> list[str]:
    """The lines of a ``*.monitor.csv``, first the two of its head, without lines that a crash has cut short."""
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if len(lines) < 2:
        # Not even the head is whole, so there is no episode
        return [f'#{{"t_start": {time.time()}}}\n', "r,l,t\n"]
    return lines[:2] + [row for row in lines[2:] if row.count(",") >= 2]


# ---------------------------------------------------------------------- what is written


def _write_picture(path: Path, write: Callable[[], Any]) -> Any:
    """What ``write`` returns. Whatever it raises costs nothing but the picture: then None."""
    try:
        return write()
    except Exception as error:
        print(f"There is no {path.name}: {one_line(error)}")
        path.unlink(missing_ok=True)
        return None


def plot_learning_curve(
    folder: str | Path, title: str, reward_threshold: float | None = None, solved_at: SolvedAt | None = None, window: int = 100
) -> Path:
    """
    Plot the rewards of all training episodes and their running mean over env steps, from SB3's ``*.monitor.csv``.

    :param folder: The folder of the monitor files, where ``learning_curve.png`` is written to
    :param title: Title of the plot
    :param reward_threshold: Drawn as a line if given
    :param solved_at: Marked if given
    :param window: Number of episodes of the running mean
    :return: Path of the PNG
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Sorted by the time at which the episodes ended
    episodes = load_results(str(folder))
    steps = np.cumsum(episodes["l"].to_numpy())
    rewards = episodes["r"].to_numpy(dtype=float)
    sums = np.cumsum(np.concatenate([[0.0], rewards]))
    counts = np.minimum(np.arange(1, len(rewards) + 1), window)
    running_mean = (sums[1:] - sums[np.arange(1, len(rewards) + 1) - counts]) / counts

    # Without pyplot, which would choose a window system and keep the figure alive
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # The colour-blind can tell Okabe and Ito's colours apart
    axes.plot(steps, rewards, ".", color="#56B4E9", markersize=3, label="episode reward")
    axes.plot(steps, running_mean, color="#0072B2", linewidth=2, label=f"mean of the last {window} episodes")
    if reward_threshold is not None:
        axes.axhline(
            reward_threshold, color="#D55E00", linestyle="--", linewidth=1, label=f"solved: above {reward_threshold:g}"
        )
    if solved_at is not None:
        label = f"episode {solved_at.n_episodes}, step {solved_at.num_timesteps:,}"
        axes.axvline(solved_at.num_timesteps, color="#009E73", linestyle=":", label=label)
    axes.set(title=title, xlabel="env steps", ylabel="episode reward")
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    path = Path(folder) / "learning_curve.png"
    figure.savefig(path, dpi=120)
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--env", required=True, help="id of the environment, e.g. CartPole-v1")
    parser.add_argument("--preset", choices=PRESETS, default="default", help="setting of the algorithm (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the model and the environments (default: %(default)s)")
    parser.add_argument("--n-envs", type=int, default=1, help="parallel environments (default: %(default)s)")
    parser.add_argument(
        "--total-timesteps", type=int, default=DEFAULT_TOTAL_TIMESTEPS, help="the most env steps (default: %(default)s)"
    )
    parser.add_argument("--reward-threshold", type=float, help="mean reward to exceed (default: the environment's own)")
    parser.add_argument("--output", type=Path, help="folder to write to (default: runs/ENV-PRESET-seedSEED)")
    parser.add_argument("--fresh", action="store_true", help="start anew where an unfinished run could go on")
    parser.add_argument("--no-gif", action="store_true", help="write no GIF of the agent")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(arguments: argparse.Namespace) -> None:
    # Networks this small are faster on one thread
    th.set_num_threads(1)
    result = solve(
        arguments.env,
        preset=arguments.preset,
        seed=arguments.seed,
        n_envs=arguments.n_envs,
        total_timesteps=arguments.total_timesteps,
        output=arguments.output,
        reward_threshold=arguments.reward_threshold,
        progress_bar=not arguments.no_progress,
        fresh=arguments.fresh,
        gif=not arguments.no_gif,
    )
    if result.solved_at is not None:
        print(
            f"Solved {result.env_id} at episode {result.solved_at.n_episodes}: {result.solved_at.num_timesteps:,} env steps "
            f"in {result.seconds:.1f} s, mean reward {result.mean_reward:.1f} over the last 100 episodes."
        )
    else:
        print(
            f"Not solved within {result.num_timesteps:,} env steps ({result.seconds:.1f} s): mean reward "
            f"{result.mean_reward:.1f} over the last 100 episodes. Try another --seed, or more --total-timesteps."
        )
    if result.gif_rewards:
        print(f"The greedy agent's episode in the GIF: reward {', '.join(f'{reward:g}' for reward in result.gif_rewards)}.")
    names = ["model.zip", "learning_curve.png", "agent.gif"]
    files = ", ".join(name for name in names if (result.output / name).exists())
    print(f"Wrote {files} and result.json to {result.output}/")
