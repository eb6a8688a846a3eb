"""Play greedy episodes of a saved model and write them as a GIF at the environment's own frame rate."""

import argparse
import importlib
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import sb3_contrib
import stable_baselines3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

import sb3_episodic_a2c
from sb3_episodic_a2c.tools.greedy import predict
from sb3_episodic_a2c.tools.runs import Run

DEFAULT_FPS = 30.0
"""For environments that name no ``render_fps``."""


def play_episodes(
    model: BaseAlgorithm, env: VecEnv, n_episodes: int = 1, max_steps: int | None = None, deterministic: bool = True
) -> tuple[list[np.ndarray], list[float]]:
    """
    Play episodes and keep all frames.

    :param model: The agent
    :param env: One environment, made with ``render_mode="rgb_array"``
    :param n_episodes: Number of episodes to play
    :param max_steps: The most steps in all; None: no limit
    :param deterministic: Whether to take the most likely action instead of sampling
    :return: The frames, ``(height, width, 3)`` uint8 each, one for each observation that an action was chosen for; and the
        sum of rewards of each episode (of the last one as far as it was played)
    :raises ValueError: There are several environments, or they do not render arrays
    """
    if n_episodes < 1:
        raise ValueError(f"`n_episodes` is {n_episodes}. It must be an integer >= 1.")
    if env.num_envs != 1 or env.render_mode != "rgb_array":
        raise ValueError(
            f"`env` has num_envs={env.num_envs} and render_mode={env.render_mode!r}, so it renders no single image. "
            'Make it with make_vec_env(env_id, n_envs=1, env_kwargs={"render_mode": "rgb_array"}).'
        )
    frames: list[np.ndarray] = []
    episode_rewards = [0.0]
    # SB3's hints for `predict` do not allow for all that `reset` may return
    obs: Any = env.reset()
    state: Any = None
    episode_start = np.ones((1,), dtype=bool)
    while max_steps is None or len(frames) < max_steps:
        frames.append(_render(env))
        actions, state = predict(model, env, obs, state, episode_start, deterministic)
        obs, rewards, episode_start, _ = env.step(actions)
        episode_rewards[-1] += float(rewards[0])
        # The last state of the episode has no frame: the VecEnv has already reset
        if episode_start[0]:
            if len(episode_rewards) == n_episodes:
                break
            episode_rewards.append(0.0)
    return frames, episode_rewards


def _render(env: VecEnv) -> np.ndarray:
    return _check_frame(env.render())


def _check_frame(frame: Any) -> np.ndarray:
    """
    :param frame: What ``env.render()`` returned
    :return: A copy of it, as pygame draws the next frame into the same memory
    :raises ValueError: It is no colour image
    """
    if frame is None:
        raise ValueError("`env.render()` returned None, so there is no image. It must return an array of pixels.")
    array = np.array(frame)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or array.size == 0:
        raise ValueError(
            f"`env.render()` returned an array of shape {array.shape} and type {array.dtype}, which is no colour image. "
            "It must return (height, width, 3) numbers of type uint8."
        )
    return array


def reason_against_pictures(env_id: str, **env_kwargs: Any) -> str | None:
    """
    Make the environment, and render it once.

    :param env_id: Id of the environment
    :param env_kwargs: What it is made with
    :return: Why :func:`record_gif` cannot show it, in one line; None if it can
    """
    try:
        # Only the GIF needs it
        importlib.import_module("PIL.Image")
        with warnings.catch_warnings():
            # The reason says it better
            warnings.simplefilter("ignore")
            env = gym.make(env_id, **{**env_kwargs, "render_mode": "rgb_array"})
            try:
                env.reset()
                _check_frame(env.render())
            finally:
                env.close()
    except Exception as error:
        return one_line(error)
    return None


def one_line(error: Exception) -> str:
    """
    :param error: What an environment may have raised
    :return: Its type and what it says, without line breaks
    """
    return " ".join(f"{type(error).__name__}: {error}".split())


def write_gif(frames: list[np.ndarray], path: str | Path, fps: float) -> Path:
    """
    Write frames as an animated GIF that loops forever.

    GIF measures time in hundredths of a second, and viewers slow down frames shorter than two. So frames are rounded to that
    grid without accumulating error: the playing time is right, and above 50 frames/s some frames are dropped.

    :param frames: ``(height, width, 3)`` uint8 each
    :param path: The file to write; its folder is made if it is missing
    :param fps: Frames per second of the environment
    :return: The path
    :raises ValueError: There are no frames, or ``fps`` is not positive
    """
    from PIL import Image

    if not frames:
        raise ValueError("`frames` is empty, so there is nothing to write. Give at least one frame.")
    if not fps > 0:
        raise ValueError(f"`fps` is {fps}. It must be a number > 0, e.g. {DEFAULT_FPS}.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: list[int] = []
    starts: list[int] = []
    for index in range(len(frames)):
        start = round(100 * index / fps)
        if not starts or start - starts[-1] >= 2:
            kept.append(index)
            starts.append(start)
    durations = np.diff([*starts, max(round(100 * len(frames) / fps), starts[-1] + 2)])
    # One palette for all frames, from a sample of them: with a palette for each, colours would flicker
    sample = np.concatenate([frames[index] for index in kept[:: max(1, len(kept) // 8)]])
    palette = Image.fromarray(sample).quantize(colors=256)
    images = [Image.fromarray(frames[index]).quantize(palette=palette, dither=Image.Dither.NONE) for index in kept]
    images[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=[int(10 * d) for d in durations],
        loop=0,
        optimize=True,
    )
    return path


def record_gif(
    model: BaseAlgorithm,
    env_id: str,
    path: str | Path,
    n_episodes: int = 1,
    seed: int | None = None,
    max_steps: int | None = None,
    env_kwargs: dict[str, Any] | None = None,
    vec_normalize_path: str | Path | None = None,
) -> list[float]:
    """
    Play greedy episodes in a fresh environment and write them as a GIF at its own frame rate.

    :param model: The agent
    :param env_id: Id of the environment
    :param path: The file to write
    :param n_episodes: Number of episodes to play
    :param seed: Seed of the environment
    :param max_steps: The most steps in all; None: no limit
    :param env_kwargs: Arguments to make the environment with
    :param vec_normalize_path: Saved statistics of the ``VecNormalize`` that the agent was trained under
    :return: The sum of rewards of each episode
    """
    env = make_vec_env(env_id, n_envs=1, seed=seed, env_kwargs={**(env_kwargs or {}), "render_mode": "rgb_array"})
    if vec_normalize_path is not None:
        env = VecNormalize.load(str(vec_normalize_path), env)
        env.training = False
        env.norm_reward = False
    # Images are put channels first, as in training
    return _record(model, BaseAlgorithm._wrap_env(env), path, n_episodes, max_steps)


def record_episodes(
    run: Run, model: BaseAlgorithm, path: str | Path, n_episodes: int = 1, seed: int = 0, max_steps: int | None = None
) -> list[float]:
    """
    :func:`record_gif` for a run of ``solve``, with all that its environment is wrapped in.

    :param run: The run
    :param model: Its agent
    :param path: The file to write
    :param n_episodes: Number of episodes to play
    :param seed: Seed of the environment
    :param max_steps: The most steps in all; None: no limit
    :return: The sum of rewards of each episode
    """
    env = run.make_env(render_mode="rgb_array")
    env.seed(seed)
    return _record(model, env, path, n_episodes, max_steps)


def _record(model: BaseAlgorithm, env: VecEnv, path: str | Path, n_episodes: int, max_steps: int | None) -> list[float]:
    try:
        fps: Any = env.metadata.get("render_fps") or DEFAULT_FPS
        frames, episode_rewards = play_episodes(model, env, n_episodes, max_steps)
        write_gif(frames, path, fps)
    finally:
        env.close()
    return episode_rewards


def _algorithm_class(name: str) -> type[BaseAlgorithm]:
    for package in (sb3_episodic_a2c, stable_baselines3, sb3_contrib):
        candidate = getattr(package, name, None)
        if isinstance(candidate, type) and issubclass(candidate, BaseAlgorithm):
            return candidate
    raise ValueError(
        f"`--algo` {name!r} is no algorithm of sb3_episodic_a2c, stable_baselines3 or sb3_contrib. "
        "Use e.g. EpisodicA2C or PPO."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", dest="folder", type=Path, help="output folder of solve, which says all about the agent")
    source.add_argument("--model", type=Path, help="zip of any model; needs --env")
    parser.add_argument("--algo", help="class of --model: ours, SB3's or sb3-contrib's (default: EpisodicA2C)")
    parser.add_argument("--env", help="id of the environment of --model, e.g. CartPole-v1")
    parser.add_argument("-o", "--output", required=True, type=Path, help="the GIF to write")
    parser.add_argument("--n-episodes", type=int, default=1, help="episodes to play (default: %(default)s)")
    parser.add_argument("--max-steps", type=int, help="the most steps in all (default: no limit)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the environment (default: %(default)s)")
    parser.add_argument("--vec-normalize", type=Path, help="saved VecNormalize statistics (.pkl) of the training of --model")


def run(arguments: argparse.Namespace) -> None:
    how_long = {"n_episodes": arguments.n_episodes, "seed": arguments.seed, "max_steps": arguments.max_steps}
    if arguments.folder is not None:
        for name, given in {"algo": arguments.algo, "env": arguments.env, "vec-normalize": arguments.vec_normalize}.items():
            if given is not None:
                raise ValueError(f"`--{name}` is {given}, but the folder of `--run` says it. Leave it out, or give `--model`.")
        finished = Run.read(arguments.folder)
        episode_rewards = record_episodes(finished, finished.load_model(), arguments.output, **how_long)
    else:
        if arguments.env is None:
            raise ValueError("`--env` is missing. Give the id of the environment of `--model`, or the folder of `--run`.")
        if not arguments.model.is_file():
            raise ValueError(f"`--model` {arguments.model} is not a file. Give the zip that `model.save` or `solve` wrote.")
        model = _algorithm_class(arguments.algo or "EpisodicA2C").load(arguments.model, device="cpu")
        episode_rewards = record_gif(
            model, arguments.env, arguments.output, vec_normalize_path=arguments.vec_normalize, **how_long
        )
    print(f"Wrote {arguments.output}: rewards {', '.join(f'{reward:g}' for reward in episode_rewards)}")
