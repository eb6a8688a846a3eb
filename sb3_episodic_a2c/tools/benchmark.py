"""
How fast is ``learn()``? EpisodicA2C beside SB3's A2C and PPO, and beside the bare environments, which are the upper limit.
On vector environments also beside A2C in plain PyTorch.

The candidates take turns in one process on one torch thread, so a slow moment of the machine slows all of them down. Only
ratios within a turn are worth quoting. Run it on a quiet machine.
"""

import argparse
import contextlib
import json
import multiprocessing
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common import env_util
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from tqdm import tqdm

from sb3_episodic_a2c import EpisodicA2C, RecurrentEpisodicA2C
from sb3_episodic_a2c.tools.plain_a2c import PlainA2C
from sb3_episodic_a2c.tools.vectorization import HELP as VECTORIZATION_HELP
from sb3_episodic_a2c.tools.vectorization import VECTORIZATIONS, make_vec_env
from sb3_episodic_a2c.tools.versions import versions
from sb3_episodic_a2c.vector import GymnasiumVecEnv

IMAGE_ENV = "images-84x84x4"
DEFAULT_ENVS = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "LunarLander-v3", IMAGE_ENV)
DEFAULT_N_ENVS = (1, 8, 64)
MAX_IMAGE_ENVS = 8
"""With more, the images take gigabytes."""
MIN_WARM_UP = 2_048
"""Env steps before anything is measured: a rollout of PPO."""
CEILING = "VecEnv"
OURS = "EpisodicA2C"
PLAIN = "PyTorch A2C"
"""A2C without SB3, on vector environments with flat observations and discrete actions."""


class ImageEnv(gym.Env):
    """
    Random images that cost almost nothing to make, so that the cost of learning from images remains.

    :param episode_length: Steps of every episode
    """

    observation_space = spaces.Box(0, 255, (4, 84, 84), dtype=np.uint8)
    action_space = spaces.Discrete(4)

    def __init__(self, episode_length: int = 200) -> None:
        self.episode_length = episode_length
        self.images = np.random.default_rng(0).integers(0, 255, (16, 4, 84, 84), dtype=np.uint8)
        self.t = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self.images[0], {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self.images[self.t % 16], float(action == self.t % 4), self.t >= self.episode_length, False, {}


class LengthEnv(gym.Env):
    """
    Episodes of one length, at almost no cost.

    :param episode_length: Steps of every episode
    """

    observation_space = spaces.Box(-1, 1, (4,))
    action_space = spaces.Discrete(2)

    def __init__(self, episode_length: int) -> None:
        self.episode_length = episode_length
        self.observation = np.zeros(4, np.float32)
        self.t = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self.observation, {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self.observation, float(action), self.t >= self.episode_length, False, {}


@dataclass
class Case:
    """One environment with one number of copies, and what was measured on it."""

    env_id: str
    n_envs: int
    vectorization: str = "dummy"
    """See :func:`make_env`."""
    steps_per_second: dict[str, list[float]] = field(default_factory=dict)
    """Candidate: one figure a turn."""
    train_fraction: dict[str, list[float]] = field(default_factory=dict)
    """Candidate: share of the time that went into updates, one figure a turn."""
    env_fraction: dict[str, float] = field(default_factory=dict)
    """Algorithm: share of its time in the VecEnv, whose steps may cost more or less than under random actions."""
    peak_mib: dict[str, float] = field(default_factory=dict)
    """Candidate: memory of a fresh process for environments, model and training, beyond its imports."""

    def ratios(self, of: str, to: str) -> list[float]:
        """Speed of one candidate divided by that of another, turn by turn."""
        return [a / b for a, b in zip(self.steps_per_second[of], self.steps_per_second[to], strict=True)]


def make_env(env_id: str, n_envs: int, vectorization: str = "dummy") -> VecEnv:
    """
    :param env_id: A registered id, or :data:`IMAGE_ENV`
    :param n_envs: Number of copies
    :param vectorization: See :func:`sb3_episodic_a2c.tools.vectorization.make_vec_env`
    :return: The environments
    :raises ValueError: EnvPool is not installed, or does not have the environment
    """
    make = ImageEnv if env_id == IMAGE_ENV else None
    return make_vec_env(env_id, make, n_envs, seed=0, vectorization=vectorization)


def make_model(name: str, env: VecEnv) -> BaseAlgorithm:
    """
    Every algorithm with its defaults, except that PPO's rollout has 2048 steps in all, not for every environment.

    :param name: ``"EpisodicA2C"``, ``"A2C"`` or ``"PPO"``
    :param env: The environments
    :return: The model
    """
    policy = "CnnPolicy" if len(env.observation_space.shape or ()) == 3 else "MlpPolicy"
    if name == "PPO":
        return PPO(policy, env, n_steps=max(2048 // env.num_envs, 8), seed=0, device="cpu")
    return {OURS: EpisodicA2C, "A2C": A2C}[name](policy, env, seed=0, device="cpu")


class Learner:
    """An algorithm on an environment, which goes on learning at each turn."""

    def __init__(self, name: str, env_id: str, n_envs: int, vectorization: str = "dummy") -> None:
        self.env = make_env(env_id, n_envs, vectorization)
        self.model = make_model(name, self.env)
        self.train_seconds = 0.0
        self._train = self.model.train  # type: ignore[attr-defined]  # SB3's base class does not declare `train`
        self.model.train = self._timed_train  # type: ignore[attr-defined]  # likewise
        self.is_started = False

    def _timed_train(self) -> None:
        start = time.perf_counter()
        self._train()
        self.train_seconds += time.perf_counter() - start

    def run(self, n_steps: int) -> int:
        before = self.model.num_timesteps if self.is_started else 0
        self.train_seconds = 0.0
        with warnings.catch_warnings():
            # A turn may be shorter than an episode, which then ends in a later turn
            warnings.filterwarnings("ignore", "No episode ended")
            self.model.learn(n_steps, reset_num_timesteps=not self.is_started)
        self.is_started = True
        return self.model.num_timesteps - before

    def env_fraction(self, n_steps: int) -> float:
        """
        :param n_steps: Env steps of a separate turn, as measuring each step takes time
        :return: Share of its time that went into ``VecEnv.step``
        """
        env: Any = self.model.env
        step, seconds = env.step, 0.0

        def watched_step(actions: np.ndarray) -> Any:
            nonlocal seconds
            start = time.perf_counter()
            result = step(actions)
            seconds += time.perf_counter() - start
            return result

        env.step = watched_step
        start = time.perf_counter()
        self.run(n_steps)
        elapsed = time.perf_counter() - start
        del env.step
        return seconds / elapsed


class RandomPlayer:
    """The bare environments under random actions, drawn beforehand: SB3's VecEnv, or the vector environment itself."""

    train_seconds = 0.0

    def __init__(self, env_id: str, n_envs: int, vectorization: str = "dummy") -> None:
        self.env = make_env(env_id, n_envs, vectorization)
        self.actions = np.array([[self.env.action_space.sample() for _ in range(n_envs)] for _ in range(256)])
        self.env.reset()
        self.step = self.env.env.step if isinstance(self.env, GymnasiumVecEnv) else self.env.step

    def run(self, n_steps: int) -> int:
        n_vec_steps = max(1, n_steps // self.env.num_envs)
        for index in range(n_vec_steps):
            self.step(self.actions[index % 256])
        return n_vec_steps * self.env.num_envs


def make_player(name: str, env_id: str, n_envs: int, vectorization: str) -> Learner | RandomPlayer | PlainA2C:
    """
    :param name: Name of an algorithm, :data:`CEILING` or :data:`PLAIN`
    :param env_id: See :func:`make_env`
    :param n_envs: Number of copies
    :param vectorization: See :func:`make_env`
    """
    if name == CEILING:
        return RandomPlayer(env_id, n_envs, vectorization)
    if name == PLAIN:
        env = make_env(env_id, n_envs, vectorization)
        assert isinstance(env, GymnasiumVecEnv)
        return PlainA2C(env)
    return Learner(name, env_id, n_envs, vectorization)


def has_plain_peer(env_id: str, vectorization: str) -> bool:
    """Whether A2C in plain PyTorch can learn there."""
    if vectorization not in ("gymnasium", "envpool"):
        return False
    env = make_env(env_id, 1, vectorization)
    env.close()
    return isinstance(env.action_space, spaces.Discrete) and len(env.observation_space.shape or ()) == 1


def measure(
    env_id: str, n_envs: int, candidates: list[str], repeats: int, seconds: float, vectorization: str = "dummy"
) -> Case:
    """
    :param env_id: See :func:`make_env`
    :param n_envs: Number of copies
    :param candidates: Names of algorithms; the bare VecEnv is always among them
    :param repeats: Number of turns
    :param seconds: About how long a candidate may run at each turn
    :param vectorization: See :func:`make_env`
    :return: The case, without memory
    """
    case = Case(env_id, n_envs, vectorization)
    players = {name: make_player(name, env_id, n_envs, vectorization) for name in (CEILING, *candidates)}
    n_steps = {}
    for name, player in players.items():
        # Warm up, and measure how many steps take ``seconds``
        n_warm_up = max(MIN_WARM_UP, 250 * n_envs)
        player.run(n_warm_up)
        start = time.perf_counter()
        done = player.run(n_warm_up)
        n_steps[name] = max(n_warm_up, round(seconds * done / (time.perf_counter() - start)))
    for _ in range(repeats):
        for name, player in players.items():
            start = time.perf_counter()
            done = player.run(n_steps[name])
            elapsed = time.perf_counter() - start
            case.steps_per_second.setdefault(name, []).append(done / elapsed)
            case.train_fraction.setdefault(name, []).append(player.train_seconds / elapsed)
    for name, player in players.items():
        if isinstance(player, Learner):
            case.env_fraction[name] = player.env_fraction(n_steps[name])
        player.env.close()
    return case


def in_fresh_process(function: Callable[..., float], *arguments: Any) -> float:
    """Call a function in a process of its own, so that the peak memory is that of this call alone."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _peak_mib() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        # Not `getrusage`: on Linux its peak includes the memory of the process that started this one
        (kib,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(kib) / 2**10
    # Windows has no such module: use --no-memory --no-extra there
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


def _forget_peak() -> None:
    """Reset the peak to what the process needs now, where the system supports it (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(name: str, env_id: str, n_envs: int, n_steps: int, vectorization: str = "dummy") -> float:
    """
    :param name: Name of an algorithm
    :param env_id: See :func:`make_env`
    :param n_envs: Number of copies
    :param n_steps: Env steps to train for
    :param vectorization: See :func:`make_env`
    :return: MiB by which the process has grown
    """
    th.set_num_threads(1)
    before = _peak_mib()
    make_player(name, env_id, n_envs, vectorization).run(n_steps)
    return _peak_mib() - before


def episode_length_cost(repeats: int, n_steps: int = 40_000) -> dict[int, float]:
    """
    :param repeats: Number of turns
    :param n_steps: Env steps of a turn
    :return: Microseconds of ``learn()`` for an env step, by the length of the episodes; median over the turns
    """
    models = {
        length: EpisodicA2C(
            "MlpPolicy", env_util.make_vec_env(LengthEnv, env_kwargs={"episode_length": length}), device="cpu", seed=0
        )
        for length in (10, 100, 1_000, 10_000)
    }
    microseconds: dict[int, list[float]] = {length: [] for length in models}
    for _ in range(repeats):
        for length, model in models.items():
            start = time.perf_counter()
            model.learn(n_steps, log_interval=1_000_000)
            microseconds[length].append(1e6 * (time.perf_counter() - start) / n_steps)
    return {length: statistics.median(values) for length, values in microseconds.items()}


def recurrent_update_seconds(repeats: int, n_envs: int = 8, n_steps: int = 200) -> dict[str, float]:
    """
    One pass over ``n_envs`` episodes of ``n_steps`` steps with the same LSTM policy, here and in sb3-contrib.

    :param repeats: Number of turns
    :param n_envs: Number of environments, and of episodes
    :param n_steps: Steps of every episode
    :return: Seconds, median over the turns. RecurrentPPO with its default ``batch_size``, and with all transitions at once
    """
    env = env_util.make_vec_env(LengthEnv, n_envs=n_envs, env_kwargs={"episode_length": n_steps})
    common: dict[str, Any] = {"policy_kwargs": {"lstm_hidden_size": 64}, "device": "cpu", "seed": 0}
    ppo: dict[str, Any] = {"n_steps": n_steps, "n_epochs": 1, **common}
    models: dict[str, Any] = {
        "RecurrentEpisodicA2C": RecurrentEpisodicA2C("MlpLstmPolicy", env, **common),
        "RecurrentPPO, batch_size=128": RecurrentPPO("MlpLstmPolicy", env, batch_size=128, **ppo),
        "RecurrentPPO, one batch": RecurrentPPO("MlpLstmPolicy", env, batch_size=n_envs * n_steps, **ppo),
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.learn(n_envs * n_steps)
    for _ in range(repeats):
        for name, model in models.items():
            start = time.perf_counter()
            model.train()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def image_update_memory(episode_length: int, batch_size: int | None) -> float:
    """
    :param episode_length: Steps of an episode of 84x84x4 images
    :param batch_size: Of the update
    :return: MiB that the update of one episode needed beyond what the process held before it, the episode included
    """
    th.set_num_threads(1)
    env = env_util.make_vec_env(ImageEnv, env_kwargs={"episode_length": episode_length})
    model = EpisodicA2C("CnnPolicy", env, batch_size=batch_size, device="cpu", seed=0)
    peaks = []
    train = model.train

    def watched_train() -> None:
        # Growing the storage of the episode may have needed more for a moment
        _forget_peak()
        peaks.append(_peak_mib())
        train()
        peaks.append(_peak_mib())

    model.train = watched_train  # type: ignore[method-assign]  # to measure around it
    model.learn(episode_length)
    return peaks[1] - peaks[0]


def benchmark(
    env_ids: tuple[str, ...] = DEFAULT_ENVS,
    n_envs: tuple[int, ...] = DEFAULT_N_ENVS,
    candidates: tuple[str, ...] = (OURS, "A2C", "PPO"),
    repeats: int = 5,
    seconds: float = 1.0,
    with_memory: bool = True,
    on_case: Callable[[Case], None] = lambda case: None,
    vectorizations: tuple[str, ...] = ("dummy",),
) -> list[Case]:
    """
    :param env_ids: See :func:`make_env`; the image environment is run with at most :data:`MAX_IMAGE_ENVS` copies
    :param n_envs: Numbers of copies
    :param candidates: Names of algorithms
    :param repeats: Number of turns
    :param seconds: About how long a candidate may run at each turn
    :param with_memory: Whether to measure peak memory, each in a process of its own
    :param on_case: Called with every case as soon as it is measured
    :param vectorizations: See :func:`make_env`
    :return: The cases
    """
    th.set_num_threads(1)
    cases = []
    for env_id, n, vectorization in grid(env_ids, n_envs, vectorizations):
        names = [*candidates, PLAIN] if has_plain_peer(env_id, vectorization) else list(candidates)
        case = measure(env_id, n, names, repeats, seconds, vectorization)
        if with_memory:
            # Several rollouts of A2C and PPO, and in most environments at least one whole episode each
            n_steps = max(4_096, 500 * n)
            case.peak_mib = {name: in_fresh_process(peak_memory, name, env_id, n, n_steps, vectorization) for name in names}
        cases.append(case)
        on_case(case)
    return cases


def grid(env_ids: tuple[str, ...], n_envs: tuple[int, ...], vectorizations: tuple[str, ...]) -> list[tuple[str, int, str]]:
    """The cases of :func:`benchmark`: environment, number of copies, vectorization."""
    return [
        (env_id, n, vectorization)
        for env_id, vectorization in product(env_ids, vectorizations)
        for n in dict.fromkeys(min(n, MAX_IMAGE_ENVS) if env_id == IMAGE_ENV else n for n in n_envs)
    ]


def describe(case: Case) -> list[str]:
    """One row of the table for each candidate, with its cells joined."""
    rows = []
    for name, speeds in case.steps_per_second.items():
        cells = [
            case.env_id,
            case.vectorization,
            str(case.n_envs),
            name,
            f"{statistics.median(speeds):,.0f}",
            _spread(speeds, "{:,.0f}"),
        ]
        for other in ("A2C", CEILING):
            if other in case.steps_per_second:
                ratios = case.ratios(name, other)
                cells.append(f"{statistics.median(ratios):.2f} {_spread(ratios, '{:.2f}')}")
            else:
                cells.append("-")
        cells.append(f"{100 * statistics.median(case.train_fraction[name]):.0f}%" if name in case.env_fraction else "-")
        cells.append(f"{100 * case.env_fraction[name]:.0f}%" if name in case.env_fraction else "-")
        cells.append(f"{case.peak_mib[name]:.0f}" if name in case.peak_mib else "-")
        rows.append(" | ".join(cells))
    return rows


def _spread(values: list[float], template: str) -> str:
    return f"({template.format(min(values))}-{template.format(max(values))})"


COLUMNS = (
    *("environment", "vectorization", "n_envs", "candidate", "env steps/s", "(min-max)"),
    *("times A2C", "share of VecEnv", "in updates", "in VecEnv", "peak MiB"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--env", nargs="+", default=DEFAULT_ENVS, help="ids of environments (default: %(default)s)")
    parser.add_argument(
        "--n-envs", nargs="+", type=int, default=DEFAULT_N_ENVS, help="numbers of copies (default: %(default)s)"
    )
    parser.add_argument(
        "--vectorization",
        nargs="+",
        choices=VECTORIZATIONS,
        default=["dummy"],
        help=f"{VECTORIZATION_HELP}. With the last two, A2C in plain PyTorch is measured as well",
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="about how long a turn of one candidate takes (default: %(default)s)"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--no-extra", action="store_true", help="do not measure long episodes and the update on images")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    parser.add_argument("-o", "--output", type=Path, help="write the figures to this JSON file")


def run(arguments: argparse.Namespace) -> None:
    for name in ("repeats", "seconds"):
        if getattr(arguments, name) <= 0:
            raise ValueError(f"`--{name}` is {getattr(arguments, name)}. It must be > 0.")
    if min(arguments.n_envs) < 1:
        raise ValueError(f"`--n-envs` is {list(arguments.n_envs)}. Each must be >= 1.")
    print(", ".join(f"{name} {version}" for name, version in versions().items()) + "; one torch thread")
    print(f"Medians over {arguments.repeats} turns; ratios are taken within a turn\n")
    if IMAGE_ENV in arguments.env and max(arguments.n_envs) > MAX_IMAGE_ENVS:
        print(f"{IMAGE_ENV}: at most {MAX_IMAGE_ENVS} copies\n")
    print(f"| {' | '.join(COLUMNS)} |")
    print("|" + "---|" * len(COLUMNS))

    env_ids, vectorizations = tuple(arguments.env), tuple(arguments.vectorization)
    numbers = tuple(arguments.n_envs)
    image_updates = [] if arguments.no_extra else [(length, size) for size in (64, 1_024) for length in (2_000, 20_000)]
    n_measured = len(grid(env_ids, numbers, vectorizations)) + (0 if arguments.no_extra else 2 + len(image_updates))
    # The tables go to the standard output, so that they can be kept
    with tqdm(total=n_measured, unit="case", disable=arguments.no_progress) as bar:

        def show(text: str) -> None:
            bar.write(text)
            sys.stdout.flush()

        def on_case(case: Case) -> None:
            show("\n".join(f"| {row} |" for row in describe(case)))
            bar.update()

        cases = benchmark(
            env_ids,
            numbers,
            repeats=arguments.repeats,
            seconds=arguments.seconds,
            with_memory=not arguments.no_memory,
            on_case=on_case,
            vectorizations=vectorizations,
        )
        report: dict[str, Any] = {"versions": versions(), "cases": [asdict(case) for case in cases]}
        if not arguments.no_extra:
            report["microseconds_by_episode_length"] = episode_length_cost(arguments.repeats)
            bar.update()
            show("\nMicroseconds of learn() for an env step, by the length of the episodes:")
            show(", ".join(f"{length:,}: {cost:.1f}" for length, cost in report["microseconds_by_episode_length"].items()))
            report["recurrent_update_seconds"] = recurrent_update_seconds(arguments.repeats)
            bar.update()
            show("\nMilliseconds of an update of 8 episodes of 200 steps, LSTM of 64:")
            show(", ".join(f"{name}: {1e3 * seconds:.1f}" for name, seconds in report["recurrent_update_seconds"].items()))
            report["image_update_mib"] = {}
            for length, batch_size in image_updates:
                mib = in_fresh_process(image_update_memory, length, batch_size)
                report["image_update_mib"][f"{length} steps, batch_size={batch_size}"] = mib
                bar.update()
            show("\nMiB that the update of one episode of 84x84x4 images needs above the stored episode:")
            show(", ".join(f"{case}: {mib:.0f}" for case, mib in report["image_update_mib"].items()))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
        print(f"\nWrote {arguments.output}")
