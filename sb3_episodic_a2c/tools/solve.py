"""The main job: train an agent, evaluate it, and keep the model, a learning curve and a GIF of the agent."""

import argparse
import contextlib
import difflib
import importlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
import yaml
from gymnasium import spaces
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv

from sb3_episodic_a2c import EpisodicA2C, ResumableCheckpointCallback
from sb3_episodic_a2c.callbacks import EpisodeProgressCallback, SolvedAt, StopTrainingOnSolved
from sb3_episodic_a2c.guards.arguments import check_spaces
from sb3_episodic_a2c.guards.files import atomic_write
from sb3_episodic_a2c.tools.entries import (
    checked_env,
    entry_manager,
    evaluation_seed,
    import_packages,
    read_entry,
)
from sb3_episodic_a2c.tools.greedy import Evaluation, evaluate
from sb3_episodic_a2c.tools.record import one_line, reason_against_pictures, record_episodes
from sb3_episodic_a2c.tools.run_folder import (
    CHECKPOINTS,
    MODEL,
    STATISTICS,
    checkpoints_in,
    discarded_without_a_model,
    finish,
    open_folder,
    resume_run,
)
from sb3_episodic_a2c.tools.runs import CONFIG, RESULT, Run
from sb3_episodic_a2c.tools.vectorization import HELP as VECTORIZATION_HELP
from sb3_episodic_a2c.tools.vectorization import VECTORIZATIONS, check_vectorization
from sb3_episodic_a2c.tools.versions import versions
from sb3_episodic_a2c.tools.zoo import (
    ALGORITHMS,
    DEFAULT_ALGORITHM,
    config_path,
    evaluation_env_kwargs,
    parse_kwargs,
    register,
    store_dict_action,
)

DEFAULT_TOTAL_TIMESTEPS = 500_000
"""Of the default preset."""

PRESETS = ("tuned", "default", "notebook")

SAVE_FREQ = 10_000
"""Env steps between two checkpoints."""

N_EVAL_ENVS = 10
"""Environments that are evaluated together."""

MAX_GIF_STEPS = 1_000


@dataclass(frozen=True)
class SolveResult:
    """What :func:`solve` did and where it put it."""

    env_id: str
    seed: int
    solved_at: SolvedAt | None
    """None if the budget ended first, or there is no threshold."""
    mean_reward: float
    """Over the last 100 training episodes, or all if there are fewer."""
    num_timesteps: int
    seconds: float
    """Of the training, since it was last resumed."""
    output: Path
    evaluation: Evaluation
    """Greedy episodes after the training."""
    gif_rewards: list[float]
    """Of the episode in the GIF; empty if there is none."""
    reward_threshold: float | None


def preset_entry(
    preset: str,
    algorithm: str,
    env_id: str,
    observation_space: spaces.Space,
    env_kwargs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """
    :param preset: ``"tuned"``: the environment's entry in our files for RL Zoo, or their default entry. ``"default"``: the
        defaults of the algorithm. ``"notebook"``: the notebook's setting
    :param algorithm: Zoo id of one of our algorithms
    :param env_id: Id of the environment
    :param observation_space: Decides the policy where the preset leaves it open
    :param env_kwargs: What the environment cannot be made without
    :return: Hyperparameters as they stand in the Zoo's files
    :raises ValueError: There is no such preset or algorithm
    """
    if preset not in PRESETS:
        raise ValueError(f"`preset` {preset!r} is unknown. Use one of {PRESETS}.")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"`algorithm` {algorithm!r} is unknown. Use one of {tuple(ALGORITHMS)}.")
    if preset == "notebook":
        if algorithm != DEFAULT_ALGORITHM:
            raise ValueError(f"`algorithm` is {algorithm!r}, but the notebook has none of it. Use {DEFAULT_ALGORITHM!r}.")
        return read_entry(algorithm, env_id, str(config_path("notebook")))
    entry = read_entry(algorithm, env_id, env_kwargs=env_kwargs)
    if preset == "default":
        # What an environment needs is no hyperparameter: a wrapper of its observations, a limit where it has none of its own
        environment = {"env_wrapper": entry.get("env_wrapper"), "env_kwargs": evaluation_env_kwargs(env_id, entry)}
        entry = {"policy": entry["policy"], "n_timesteps": DEFAULT_TOTAL_TIMESTEPS}
        entry |= {name: value for name, value in environment.items() if value}
    if entry["policy"].startswith("Mlp"):
        # The files' default entries cannot know the environment
        entry |= _for_observations(observation_space, entry["policy"].removeprefix("Mlp"))
    return entry


def _for_observations(space: spaces.Space, policy: str) -> dict[str, Any]:
    """The policy for an observation space, given the end of its name, and what else its entry needs."""
    if not isinstance(space, spaces.Dict):
        return {"policy": ("Cnn" if _is_image(space) else "Mlp") + policy}
    if any(is_image_space(part) and not _is_image(part) for part in space.values()):
        # SB3's policy for Dict observations would look at it with a network that it is too small for
        wrapper = "gymnasium.wrappers.FlattenObservation"
        return {"policy": "Mlp" + policy, "env_wrapper": wrapper, "normalize": "{'norm_reward': False}"}
    return {"policy": "MultiInput" + policy}


def _is_image(space: spaces.Space) -> bool:
    """Whether SB3's ``NatureCNN`` can look at it: its kernels need 36 pixels. A smaller picture is a vector to us."""
    return isinstance(space, spaces.Box) and is_image_space(space) and sorted(space.shape)[1] >= 36


def solve(
    env_id: str,
    preset: str = "tuned",
    seed: int = 0,
    n_envs: int | None = None,
    total_timesteps: int | None = None,
    output: str | Path | None = None,
    reward_threshold: float | None = None,
    progress_bar: bool = True,
    fresh: bool = False,
    gif: bool = True,
    algorithm: str = DEFAULT_ALGORITHM,
    hyperparams: dict[str, Any] | None = None,
    gym_packages: Sequence[str] = (),
    n_eval_episodes: int = 100,
    vectorization: str = "dummy",
) -> SolveResult:
    """
    Train until the mean reward of 100 consecutive training episodes exceeds the threshold, or the budget ends, and evaluate.

    Writes to the output folder: ``model.zip``, ``config.yml``, ``learning_curve.png``, ``agent.gif``, ``result.json``, the
    rewards of all episodes as SB3's ``*.monitor.csv``, and ``vecnormalize.pkl`` where the preset normalises. A run that is not
    finished also has checkpoints. The same call again goes on from the newest one, as if it had never been stopped
    (environments that cannot be pickled start fresh episodes).

    :param env_id: Id of the environment
    :param preset: See :func:`preset_entry`
    :param seed: Seed of the model and the environments
    :param n_envs: Number of parallel environments; by default the preset's
    :param total_timesteps: The most env steps; by default the preset's
    :param output: The folder to write to; by default ``runs/ENV-PRESET-seedSEED``, with a number if a run is there that is
        finished, has other settings, or is still running
    :param reward_threshold: The mean reward to exceed; by default the environment's own. Without one, the budget is trained
    :param progress_bar: Whether to show progress bars over episodes
    :param fresh: Whether to start anew where an unfinished run could go on. An unfinished run in ``output`` is deleted
    :param gif: Whether to write ``agent.gif``. An environment that cannot be rendered is trained all the same, without it
    :param algorithm: Zoo id of one of our algorithms
    :param hyperparams: They win over the preset's, and are written as in RL Zoo's files
    :param gym_packages: Modules to import that register environments
    :param n_eval_episodes: Greedy episodes after the training
    :param vectorization: How copies of the environment are stepped in training, see
        :func:`sb3_episodic_a2c.tools.vectorization.make_vec_env`
    :return: What happened
    :raises ValueError: An argument is out of its range, or ``output`` holds another run
    """
    for name, value in {"total_timesteps": total_timesteps, "n_eval_episodes": n_eval_episodes}.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}. It must be an integer >= 1.")
    for package in ("matplotlib", "pandas"):
        # Now, not when the learning curve is drawn after the training
        importlib.import_module(package)
    register()
    import_packages(gym_packages)
    # Before the folder is made: an unknown environment or preset must not leave one behind
    given_env_kwargs = parse_kwargs((hyperparams or {}).get("env_kwargs"))
    probe = checked_env(env_id, **given_env_kwargs)
    check_vectorization(vectorization, env_id)
    entry = preset_entry(preset, algorithm, env_id, probe.observation_space, given_env_kwargs) | (hyperparams or {})
    if n_envs is not None:
        entry["n_envs"] = n_envs
    n_envs = entry.get("n_envs", 1)
    if not isinstance(n_envs, int) or n_envs < 1:
        raise ValueError(f"`n_envs` is {n_envs}. It must be an integer >= 1.")
    if preset == "notebook" and n_envs != 1:
        raise ValueError(f"`n_envs` is {n_envs}, but the notebook has one environment. Use 1, or another preset.")
    total_timesteps = total_timesteps or int(entry["n_timesteps"])
    algorithm_class = ALGORITHMS[algorithm]
    if "env_wrapper" not in entry:
        check_spaces(entry["policy"], probe.observation_space, probe.action_space, algorithm_class.supported_action_spaces)
    if reward_threshold is None and probe.spec is not None:
        reward_threshold = probe.spec.reward_threshold
    probe.close()
    if gif and (reason := reason_against_pictures(env_id, **given_env_kwargs)) is not None:
        print(f"There will be no GIF of {env_id}: {reason}")
        gif = False
    settings = _settings(env_id, algorithm, preset, seed, entry, gym_packages, vectorization)
    manager = entry_manager(algorithm, env_id, entry, seed=seed, vectorization=vectorization)
    device = "auto" if entry["policy"].startswith("Cnn") else "cpu"
    _check_hyperparams(algorithm_class, {"seed": seed, "device": device, **manager.arguments})
    folder, lock = open_folder(settings, output, fresh)
    manager.save_path = str(folder)

    def make_env(first_index: int) -> VecEnv:
        manager.first_index = first_index
        return manager.create_envs(manager.n_envs)

    # Unlocks the folder whatever happens. A run that fails before it has saved anything must not block the next start
    with lock, discarded_without_a_model(folder):
        model = resume_run(folder, make_env, device)
        # No mean reward exceeds infinity
        solved = StopTrainingOnSolved(np.inf if reward_threshold is None else reward_threshold)
        if model is None:
            model = algorithm_class(env=make_env(0), seed=seed, device=device, **manager.arguments)
        else:
            print(f"Going on with {folder}, after {model.num_timesteps:,} env steps.")
            solved.resume(model)
        assert model.env is not None
        start = time.perf_counter()
        try:
            try:
                if solved.solved_at is None and model.num_timesteps < total_timesteps:
                    progress = EpisodeProgressCallback(desc=env_id, disable=not progress_bar, initial=model._episode_num)
                    checkpoints = ResumableCheckpointCallback(folder / CHECKPOINTS, SAVE_FREQ)
                    model.learn(
                        total_timesteps - model.num_timesteps,
                        # The bar first, so that it still shows the last episode
                        callback=CallbackList([progress, solved, *manager.callbacks, checkpoints]),
                        reset_num_timesteps=False,
                    )
            finally:
                # Also after Ctrl-C, so that what was learnt is kept
                if model.num_timesteps > 0:
                    _save(model, entry, folder)
                # Ctrl-C in a terminal has ended worker processes as well
                with contextlib.suppress(BrokenPipeError, ConnectionError, EOFError):
                    model.env.close()
            seconds = time.perf_counter() - start
            run = Run(folder, settings, entry)
            evaluation = _evaluate(run, model, n_eval_episodes, progress_bar)

            plot = partial(plot_learning_curve, folder, env_id, reward_threshold, solved.solved_at)
            _write_picture(
                folder / "learning_curve.png", partial(plot, evaluation=evaluation, num_timesteps=model.num_timesteps)
            )
            gif_rewards = _write_gif(run, model, evaluation) if gif else []
        except (KeyboardInterrupt, SystemExit):
            print(_stopped(folder, model.num_timesteps, total_timesteps, solved.mean_reward), file=sys.stderr)
            raise

        result = SolveResult(
            *(env_id, seed, solved.solved_at, solved.mean_reward, model.num_timesteps, seconds, folder),
            evaluation=evaluation,
            gif_rewards=gif_rewards,
            reward_threshold=reward_threshold,
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
            "evaluation": evaluation.as_dict(),
            "gif_rewards": gif_rewards,
            "versions": versions(),
        }
        with atomic_write(folder / RESULT) as file:
            file.write((json.dumps(record, indent=2) + "\n").encode())
        finish(folder)
        return result


def _settings(
    env_id: str,
    algorithm: str,
    preset: str,
    seed: int,
    entry: dict[str, Any],
    gym_packages: Sequence[str],
    vectorization: str,
) -> dict[str, Any]:
    """A run only goes on with the same of these. The budget and the threshold may change."""
    settings = {
        "env_id": env_id,
        "algorithm": algorithm,
        "preset": preset,
        "seed": seed,
        "hyperparams": {name: value for name, value in entry.items() if name != "n_timesteps"},
        "gym_packages": list(gym_packages),
        "vectorization": vectorization,
    }
    # As a file returns it. Hyperparameters can be any object, e.g. a class
    return json.loads(json.dumps(settings, default=str))


def _save(model: EpisodicA2C, entry: dict[str, Any], folder: Path) -> None:
    model.save(folder / MODEL)
    if (vec_normalize := model.get_vec_normalize_env()) is not None:
        vec_normalize.save(str(folder / STATISTICS))
    with atomic_write(folder / CONFIG) as file:
        file.write(yaml.dump(entry).encode())


def _evaluate(run: Run, model: EpisodicA2C, n_episodes: int, progress_bar: bool) -> Evaluation:
    from tqdm import tqdm

    env = run.make_env(min(N_EVAL_ENVS, n_episodes))
    try:
        with tqdm(total=n_episodes, desc="Evaluation", unit="episode", disable=not progress_bar) as bar:
            return evaluate(model, env, n_episodes, evaluation_seed(run.seed, n_episodes), on_episode=bar.update)
    finally:
        env.close()


def _check_hyperparams(algorithm_class: type[EpisodicA2C], arguments: dict[str, Any]) -> None:
    """
    :param arguments: Those of the constructor, but for the environments
    :raises ValueError: It would refuse one
    """
    # A variant passes on what it has in common with the base class
    classes = [one for one in algorithm_class.__mro__ if issubclass(one, EpisodicA2C)]
    known = [name for one in classes for name in inspect.signature(one).parameters if name not in ("args", "kwargs")]
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"It has {', '.join(known)}."
            raise ValueError(f"`hyperparams` hold {name!r}, which {algorithm_class.__name__} does not know. {hint}")
    algorithm_class(env=None, _init_setup_model=False, **arguments)  # type: ignore[arg-type]  # as SB3's `load` does


def _stopped(folder: Path, num_timesteps: int, total_timesteps: int, mean_reward: float) -> str:
    stopped = f"Stopped after {num_timesteps:,} of {total_timesteps:,} env steps: {_training_reward(mean_reward)}."
    if num_timesteps == 0:
        return f"{stopped}\nNothing was learnt, so nothing was kept."
    if not checkpoints_in(folder):
        return (
            f"{stopped}\n{folder}/ holds {MODEL}, the agent as it is now. For a checkpoint it was too early: the same command "
            "starts anew."
        )
    return (
        f"{stopped}\n{folder}/ holds {MODEL}, the agent as it is now, and {CHECKPOINTS}/.\n"
        "The same command again goes on from the newest checkpoint; with --fresh it starts anew."
    )


def _training_reward(mean_reward: float) -> str:
    if np.isnan(mean_reward):
        return "no training episode has ended"
    return f"mean reward {mean_reward:.1f} over the last 100 training episodes"


# ---------------------------------------------------------------------- what is written


def _write_picture(path: Path, write: Callable[[], Any]) -> Any:
    """What ``write`` returns. Whatever it raises costs nothing but the picture: then None."""
    try:
        return write()
    except Exception as error:
        print(f"There is no {path.name}: {one_line(error)}")
        path.unlink(missing_ok=True)
        return None


def _write_gif(run: Run, model: EpisodicA2C, evaluation: Evaluation) -> list[float]:
    """A typical episode of the evaluation. Its reward; none if it cannot be shown."""
    path, seed = run.folder / "agent.gif", evaluation.seed + evaluation.typical
    return _write_picture(path, partial(record_episodes, run, model, path, seed=seed, max_steps=MAX_GIF_STEPS)) or []


def plot_learning_curve(
    folder: str | Path,
    title: str,
    reward_threshold: float | None = None,
    solved_at: SolvedAt | None = None,
    window: int = 100,
    evaluation: Evaluation | None = None,
    num_timesteps: int = 0,
) -> Path:
    """
    Plot the rewards of all training episodes and their running mean over env steps, from SB3's ``*.monitor.csv``.

    :param folder: The folder of the monitor files, where ``learning_curve.png`` is written to
    :param title: Title of the plot
    :param reward_threshold: Drawn as a line if given
    :param solved_at: Marked if given
    :param window: Number of episodes of the running mean
    :param evaluation: Its mean and standard deviation are marked if given
    :param num_timesteps: Env steps after which it took place
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
    if evaluation is not None:
        axes.errorbar(
            num_timesteps,
            evaluation.mean_reward,
            evaluation.std_reward,
            fmt="D",
            color="#000000",
            capsize=4,
            label=f"evaluation: {evaluation}",
        )
    axes.set(title=title, xlabel="env steps", ylabel="episode reward")
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    path = Path(folder) / "learning_curve.png"
    figure.savefig(path, dpi=120)
    return path


def summary(result: SolveResult) -> str:
    """:return: What the command prints at its end"""
    mean_reward = _training_reward(result.mean_reward)
    evaluation, threshold = result.evaluation, result.reward_threshold
    is_above = threshold is not None and evaluation.mean_reward > threshold
    if result.solved_at is not None:
        lines = [
            f"Solved {result.env_id} at episode {result.solved_at.n_episodes}: {result.solved_at.num_timesteps:,} env steps "
            f"in {result.seconds:.1f} s, {mean_reward}."
        ]
    elif threshold is None:
        lines = [f"Trained {result.env_id} for {result.num_timesteps:,} env steps in {result.seconds:.1f} s: {mean_reward}."]
    else:
        lines = [
            f"Not solved in training within {result.num_timesteps:,} env steps ({result.seconds:.1f} s): {mean_reward}."
            # The greedy agent may be better than the one that explores
            + ("" if is_above else " Try another --seed, or more --total-timesteps.")
        ]
    compared = "" if threshold is None else f", {'above' if is_above else 'not above'} the threshold {threshold:g}"
    lines.append(f"Evaluation: mean reward {evaluation} over {len(evaluation.rewards)} greedy episodes{compared}.")
    if result.gif_rewards:
        lines.append(f"The GIF shows a typical one of them: reward {evaluation.rewards[evaluation.typical]:g}.")
    names = [MODEL, STATISTICS, "learning_curve.png", "agent.gif"]
    files = ", ".join(name for name in names if (result.output / name).exists())
    lines += [f"Wrote {files} and {RESULT} to {result.output}/", "To play the agent:"]
    lines += [f"    {line}" for line in Run.read(result.output).snippet().splitlines()]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--env", required=True, help="id of the environment, e.g. CartPole-v1")
    parser.add_argument(
        "--algo",
        choices=list(ALGORITHMS),
        default=DEFAULT_ALGORITHM,
        help="RL Zoo's id of the algorithm (default: %(default)s)",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="tuned",
        help="tuned: the environment's entry in zoo_configs/, or the one for all others; default: the defaults of the class; "
        "notebook: the setting of the notebook (default: %(default)s)",
    )
    parser.add_argument(
        *("-params", "--hyperparams"),
        nargs="+",
        action=store_dict_action(),
        metavar="NAME:VALUE",
        help='hyperparameters that win over the preset\'s, as in RL Zoo, e.g. learning_rate:0.01 policy_kwargs:"dict(...)"',
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the model and the environments (default: %(default)s)")
    parser.add_argument("--n-envs", type=int, help="parallel environments (default: the preset's)")
    parser.add_argument("--vectorization", choices=VECTORIZATIONS, default="dummy", help=VECTORIZATION_HELP)
    parser.add_argument("--total-timesteps", type=int, help="the most env steps (default: the preset's)")
    parser.add_argument(
        "--reward-threshold",
        type=float,
        help="mean reward to exceed (default: the environment's own; without one, the whole budget is trained)",
    )
    parser.add_argument(
        "--eval-episodes", type=int, default=100, help="greedy episodes after the training (default: %(default)s)"
    )
    parser.add_argument("--gym-packages", nargs="+", default=[], help="modules to import that register environments")
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
        algorithm=arguments.algo,
        hyperparams=arguments.hyperparams,
        gym_packages=arguments.gym_packages,
        n_eval_episodes=arguments.eval_episodes,
        vectorization=arguments.vectorization,
    )
    print(summary(result))
