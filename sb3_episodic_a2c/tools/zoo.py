"""
RL Zoo (https://github.com/DLR-RM/rl-baselines3-zoo) with our algorithms registered: its scripts, our hyperparameters.

The Zoo has no plugin hook: it knows the algorithms in the dict ``rl_zoo3.ALGOS``, and searches the hyperparameters of those
in two more dicts. :func:`register` puts ours there. :func:`launch` is the command line: all of the Zoo's flags work, and so do
its own algorithms, with the Zoo's hyperparameters. To drive the Zoo from Python::

    from sb3_episodic_a2c.tools.zoo import config_path, experiment_manager_class, register

    register()
    experiment_manager_class()(..., algo="episodic_a2c", config=str(config_path("episodic_a2c")))

The Zoo's own ``ExperimentManager`` does as well, but for entries with schedules that it does not know (``ent_coef: lin_0.1``).

Several workers search hyperparameters together if each runs the same ``train -optimize --storage STORAGE --study-name NAME``.
STORAGE is a file on a disk that they share (``x.log``, an Optuna journal) or a database (``postgresql://...``). Without
``-optimize``, the same with ``--trial-id 17`` trains with the hyperparameters of trial 17.

:func:`sb3_episodic_a2c.resume` goes on with a training of the Zoo, bit for bit and with its wrappers, if its hyperparameters
have ``callback: {sb3_episodic_a2c.ResumableCheckpointCallback: {save_path: checkpoints}}``, with a folder for each run.

Limits of the Zoo:

- ``train -i`` counts env steps from 0 again, and takes only the parameters of a checkpoint. Hyperparameters in the config or
  in ``-params`` win over those of the agent.
- ``plot_from_file`` needs two evaluations and two runs of an algorithm. Its flags ``-r``, ``-vs`` and ``-iqm`` need rliable,
  which is archived and needs pandas < 3, so it is not installed.
- ``all_plots`` drops runs with fewer evaluations than the longest one: give all of them the same ``-n``.
- ``--track`` needs ``pip install wandb``.
- ``push_to_hub`` is broken in rl_zoo3 2.9.2, so the command line does not have it.

Worked around in rl_zoo3 2.9.2:

- It needs ``requests`` and ``pandas`` but does not declare them: our extra ``zoo`` does.
- ``record_training`` and ``benchmark`` start child processes in which our algorithms are not registered.
- ``-optimize`` leaves an empty run folder, in which ``enjoy`` finds no model.
- ``--trial-id 0`` is ignored.
- ``record_training`` fails with a relative ``-o``, and without ffmpeg on the PATH.
- ``benchmark`` fails at its very end if the folder of its table is missing.
- Evaluations, searches, ``enjoy`` and ``record_video`` know no action masks.
- ``train`` evaluates and ``record_video`` plays without the ``env_kwargs`` of an entry, and ``enjoy`` plays with all of them,
  also those that shorten training episodes. Here it is :func:`evaluation_env_kwargs` for each.
"""

import argparse
import contextlib
import importlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium import spaces
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

import sb3_episodic_a2c
from sb3_episodic_a2c import EpisodicA2C, MaskableEpisodicA2C, RecurrentEpisodicA2C
from sb3_episodic_a2c.guards.arguments import check_spaces
from sb3_episodic_a2c.tools.samplers import convert_params, sample_lstm_params, sample_params
from sb3_episodic_a2c.tools.vectorization import make_vec_env

ALGORITHMS: dict[str, type[EpisodicA2C]] = {
    "episodic_a2c": EpisodicA2C,
    "episodic_a2c_mask": MaskableEpisodicA2C,
    "episodic_a2c_lstm": RecurrentEpisodicA2C,
}
"""Zoo id: the algorithm."""

DEFAULT_ALGORITHM = "episodic_a2c"

LOG_FOLDER = "logs"
"""Where the Zoo's ``train`` writes by default."""

OUR_SCHEDULES = ("ent_coef", "value_learning_rate")
"""Arguments of our algorithms that may be schedules, besides those that the Zoo knows."""

CONTINUOUS_ENTRY = "default-continuous"
"""Key of the entry, in a file of hyperparameters, for unlisted environments with vectors as observations and Box actions."""

TRAINING_ONLY = ("max_episode_steps",)
"""Entries of ``env_kwargs`` that an algorithm may train with, while agents are evaluated without them."""


def config_path(name: str) -> Path:
    """
    :param name: Zoo id of one of our algorithms, or ``"notebook"``
    :return: Its file of hyperparameters, one entry for each environment. In a wheel it is inside the package, in a checkout
        beside it
    :raises ValueError: There is no file of that name
    """
    package = Path(sb3_episodic_a2c.__file__).parent
    for folder in (package, package.parent):
        path = folder / "zoo_configs" / f"{name}.yml"
        if path.is_file():
            return path
    raise ValueError(
        f"`name` is {name!r}, but there is no zoo_configs/{name}.yml. Use one of {sorted([*ALGORITHMS, 'notebook'])}."
    )


# ------------------------------------------------------------------ registration


def register() -> None:
    """
    Add our algorithms, their samplers and their converters to RL Zoo, and the Zoo's environments to Gymnasium.

    Call it once in every process that uses them, before the Zoo parses arguments. A second call changes nothing. The Zoo still
    reads hyperparameters from the file it is given: ``config=str(config_path("episodic_a2c"))``.

    :raises ImportError: RL Zoo is not installed
    """
    import rl_zoo3.import_envs  # noqa: F401  # registers CartPoleNoVel-v1 and others, and those of installed packages
    from rl_zoo3 import ALGOS
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

    # In place, as other modules of the Zoo have imported these objects by name
    ALGOS.update(ALGORITHMS)
    HYPERPARAMS_SAMPLER.update(
        {"episodic_a2c": sample_params, "episodic_a2c_mask": sample_params, "episodic_a2c_lstm": sample_lstm_params}
    )
    HYPERPARAMS_CONVERTER.update(dict.fromkeys(ALGORITHMS, convert_params))


def algorithms() -> dict[str, type[BaseAlgorithm]]:
    """
    :return: Zoo id: the algorithm, of RL Zoo's own and of ours
    :raises ImportError: RL Zoo is not installed
    """
    from rl_zoo3 import ALGOS

    return {**ALGOS, **ALGORITHMS}


def experiment_manager_class() -> type[Any]:
    """RL Zoo's ``ExperimentManager`` with workarounds, see :func:`fix_experiment_manager`."""
    from rl_zoo3.exp_manager import ExperimentManager

    return fix_experiment_manager(ExperimentManager)


def store_dict_action() -> type[argparse.Action]:
    """:return: What parses the Zoo's ``-params NAME:VALUE ...``"""
    from rl_zoo3.utils import StoreDict

    class Hyperparameters(StoreDict):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
            try:
                super().__call__(parser, namespace, values, option_string)
            except Exception as error:
                # It evaluates what stands after the colon
                raise argparse.ArgumentError(
                    self,
                    f"{type(error).__name__}: {error}. Each must be NAME:VALUE, the value as in Python, so a string in quotes "
                    "of its own: learning_rate:\"'lin_0.01'\"",
                ) from error

    return Hyperparameters


def parse_kwargs(kwargs: dict[str, Any] | str | None) -> dict[str, Any]:
    """
    :param kwargs: Keyword arguments as a config has them, maybe as Python code in a string
    :return: The arguments. Code is evaluated as the Zoo does it, in the module of its manager
    """
    if isinstance(kwargs, str):
        return dict(eval(kwargs, vars(importlib.import_module("rl_zoo3.exp_manager"))))
    return dict(kwargs or {})


def evaluation_env_kwargs(env_id: str, hyperparams: dict[str, Any]) -> dict[str, Any]:
    """
    :param env_id: Id of the environment
    :param hyperparams: Its entry
    :return: The arguments that the environment is made with for evaluations
    """
    env_kwargs = parse_kwargs(hyperparams.get("env_kwargs"))
    spec = gym.registry.get(env_id)
    if spec is not None and spec.max_episode_steps is None:
        # Without a limit of its own, a greedy agent may walk in a circle forever
        return env_kwargs
    return {name: value for name, value in env_kwargs.items() if name not in TRAINING_ONLY}


def asks_for_masks(algorithm: str, hyperparams: dict[str, Any]) -> bool:
    """
    :param algorithm: Zoo id of the algorithm
    :param hyperparams: An entry of it
    :return: Whether its agents need the action masks of their environments
    """
    return issubclass(algorithms()[algorithm], MaskableEpisodicA2C) and hyperparams.get("use_masking", True)


# ------------------------------------------------------------------ command line


def launch(command: str, arguments: list[str]) -> None:
    """
    Run a script of RL Zoo with our algorithms registered.

    :param command: Name of the script
    :param arguments: The user's arguments. All are passed on, after our defaults, so that the user's win
    :raises ImportError: The extra ``zoo`` is not installed
    """
    register()
    if command == "record_training":
        # Upstream lists the videos in a file. ffmpeg looks for them relative to that file, so a relative folder finds none
        output_folder = _given(arguments, "-o", "--output-folder")
        arguments = [*arguments, "--output-folder", os.path.abspath(output_folder)] if output_folder else arguments
    vectorization = _given(arguments, "--vec-env") if command == "train" else None
    if vectorization in ("gymnasium", "envpool"):
        # The Zoo's parser does not know them
        arguments = _without(arguments, "--vec-env")
    with contextlib.ExitStack() as stack:
        defaults = _default_arguments(command, arguments)
        argv = [f"python -m sb3_episodic_a2c {command}", *defaults, *arguments]
        if {"-h", "--help"} & set(arguments):
            # The Zoo's help names no defaults
            print(f"Given before your arguments: {' '.join(defaults) or 'none'}\n")
            with_default = argparse.ArgumentDefaultsHelpFormatter._get_help_string
            stack.enter_context(_replaced(argparse.HelpFormatter, "_get_help_string", with_default))
        stack.enter_context(_replaced(sys, "argv", argv))
        if command in ("plot_train", "all_plots", "plot_from_file"):
            getattr(importlib.import_module("rl_zoo3.plots"), command)()
        elif command in ("train", "enjoy"):
            module = importlib.import_module(f"rl_zoo3.{command}")
            if command == "train":
                manager_class = fix_experiment_manager(module.ExperimentManager)
                if vectorization in ("gymnasium", "envpool"):
                    manager_class.vectorization = vectorization
                stack.enter_context(_replaced(module, "ExperimentManager", manager_class))
            else:
                stack.enter_context(_played_as_evaluated(module, arguments))
            getattr(module, command)()
        else:
            stack.enter_context(_replaced(subprocess, "call", _call_our_launcher))
            if command == "record_video":
                # It imports them when it runs
                stack.enter_context(_played_as_evaluated(importlib.import_module("rl_zoo3.utils"), arguments))
            elif command == "record_training":
                stack.enter_context(_ffmpeg_on_path())
            elif command == "benchmark":
                # It writes its table there at its very end, and fails if the folder is missing
                os.makedirs(_given(arguments, "--benchmark-dir") or "logs/benchmark/", exist_ok=True)
            # These scripts have all their code below the main guard, or have no guard, so there is no function to call
            runpy.run_module(f"rl_zoo3.{command}", run_name="__main__")


def _default_arguments(command: str, arguments: list[str]) -> list[str]:
    """Our default algorithm and its hyperparameters, and for the other scripts the folder in which ``train`` writes."""
    if command == "plot_from_file":
        return []
    if command == "benchmark":
        return ["--log-dir", LOG_FOLDER]
    if command == "plot_train":
        return ["--algo", DEFAULT_ALGORITHM, "--exp-folder", LOG_FOLDER]
    if command == "all_plots":
        return ["--algos", DEFAULT_ALGORITHM, "--exp-folders", LOG_FOLDER]
    algorithm = _given(arguments, "--algo") or DEFAULT_ALGORITHM
    defaults = ["--algo", DEFAULT_ALGORITHM]
    if algorithm in ALGORITHMS:
        # For its own algorithms, the Zoo has hyperparameters, and trained agents to download
        defaults += ["--conf-file", str(config_path(algorithm))] if command == "train" else ["--folder", LOG_FOLDER]
    return defaults


def _given(arguments: list[str], *names: str) -> str | None:
    """The user's value of one of the Zoo's options. The Zoo parses it again."""
    return _option(*names).parse_known_args(arguments)[0].value


def _without(arguments: list[str], *names: str) -> list[str]:
    """The user's arguments but for one of the Zoo's options."""
    return _option(*names).parse_known_args(arguments)[1]


def _option(*names: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(*names, dest="value")
    return parser


def fix_experiment_manager(experiment_manager: type[Any]) -> type[Any]:
    """
    :param experiment_manager: ``rl_zoo3.exp_manager.ExperimentManager``
    :return: A subclass that works around upstream's bugs, makes schedules of ``ent_coef: lin_0.01``, training environments by
        our ``make_vec_env``, and knows :data:`CONTINUOUS_ENTRY` and action masks
    """

    class ExperimentManager(experiment_manager):
        custom_hyperparams: dict[str, Any] | None
        eval_env_kwargs: dict[str, Any]
        vectorization = "dummy"
        """Of the training environments. ``"dummy"`` leaves the choice to the Zoo."""
        first_index = 0
        """Number of the first training environment, and of its log."""
        asks_for_masks = False
        """See :func:`asks_for_masks`."""

        def create_log_folder(self) -> None:
            # Upstream makes a run folder with a Monitor file for a hyperparameter search, which never uses it. `enjoy` then
            # takes it for the latest run and finds no model in it
            if not self.optimize_hyperparameters:
                super().create_log_folder()

        def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> Any:
            # The Zoo knows two classes, and always counts from 0
            vectorization, start_index = ("dummy", 0) if eval_env else (self.vectorization, self.first_index)
            make = partial(make_vec_env, self.env_name.gym_id, vectorization=vectorization, start_index=start_index)
            try:
                with _replaced(importlib.import_module("rl_zoo3.exp_manager"), "make_vec_env", make):
                    return super().create_envs(n_envs, eval_env, no_log or self.optimize_hyperparameters)
            except TypeError:
                if self.algo in ALGORITHMS:
                    # SB3's vector environments fail on a space that they do not know, without naming it
                    with contextlib.closing(gym.make(self.env_name.gym_id, **self.env_kwargs)) as made:
                        env = self.env_wrapper(made) if self.env_wrapper else made
                        check_spaces(
                            None, env.observation_space, env.action_space, ALGORITHMS[self.algo].supported_action_spaces
                        )
                raise

        def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
            hyperparams = _continuous_entry(self)
            # Upstream tests `if self.trial_id`, so that `--trial-id 0` is ignored. Trials win over the entry of `default`
            if self.storage and self.study_name and self.trial_id is not None:
                hyperparams |= self.load_trial(self.storage, self.study_name, self.trial_id)
            self.custom_hyperparams = {**hyperparams, **(self.custom_hyperparams or {})}
            hyperparams, saved_hyperparams = super().read_hyperparameters()
            if not self.eval_env_kwargs:
                # Upstream takes those of the command line only
                self.eval_env_kwargs = evaluation_env_kwargs(self.env_name.gym_id, hyperparams)
            self.asks_for_masks = asks_for_masks(self.algo, hyperparams)
            return hyperparams, saved_hyperparams

        def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> Any:
            # Upstream evaluates code in a string for other arguments, but not for these
            hyperparams["env_kwargs"] = parse_kwargs(hyperparams.get("env_kwargs", self.env_kwargs))
            return super()._preprocess_hyperparams(hyperparams)

        def create_callbacks(self) -> None:
            with _masked_evaluations(self.asks_for_masks):
                super().create_callbacks()

        def hyperparameters_optimization(self) -> None:
            # Around all trials, as they may run in threads
            with _masked_evaluations(self.asks_for_masks):
                super().hyperparameters_optimization()

        @staticmethod
        def _preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
            # Upstream knows no schedules of these
            for name in OUR_SCHEDULES:
                kind, _, initial_value = str(hyperparams.get(name)).partition("_")
                if kind == "lin":
                    hyperparams[name] = LinearSchedule(float(initial_value), 0.0, 1.0)
            return experiment_manager._preprocess_schedules(hyperparams)

    return ExperimentManager


def _continuous_entry(manager: Any) -> dict[str, Any]:
    """What a file of ours says of environments like the manager's, besides its ``default``, if it does not list it."""
    if manager._is_atari or not str(manager.config).endswith((".yml", ".yaml")):
        return {}
    # Here, as it comes with the Zoo: without it, the Zoo is what is missing
    import yaml

    with open(manager.config) as file:
        entries = yaml.safe_load(file) or {}
    if CONTINUOUS_ENTRY not in entries or manager.env_name.gym_id in entries:
        return {}
    with contextlib.closing(gym.make(manager.env_name.gym_id, **manager.env_kwargs)) as env:
        is_vector = isinstance(env.observation_space, spaces.Box) and len(env.observation_space.shape) == 1
        return entries[CONTINUOUS_ENTRY] if is_vector and isinstance(env.action_space, spaces.Box) else {}


@contextlib.contextmanager
def _masked_evaluations(are_needed: bool) -> Iterator[None]:
    """Let the Zoo's callbacks of evaluation ask for action masks."""
    if not are_needed:
        yield
        return
    module = importlib.import_module("rl_zoo3.exp_manager")
    trial_callback = type("MaskableTrialEvalCallback", (module.TrialEvalCallback, MaskableEvalCallback), {})
    with (
        _replaced(module, "EvalCallback", MaskableEvalCallback),
        _replaced(module, "TrialEvalCallback", trial_callback),
    ):
        yield


@contextlib.contextmanager
def _played_as_evaluated(module: Any, arguments: list[str]) -> Iterator[None]:
    """
    Let a script play an agent in the environment that it was evaluated in, with the action masks that it needs.

    :param module: From which the script takes the Zoo's functions
    :param arguments: The user's
    """
    get_saved_hyperparams, create_test_env = module.get_saved_hyperparams, module.create_test_env
    env_kwargs: dict[str, Any] = {}
    test_env: VecEnv | None = None

    def keep_env_kwargs(*args: Any, **kwargs: Any) -> tuple[dict[str, Any], str | None]:
        hyperparams, stats_path = get_saved_hyperparams(*args, **kwargs)
        env_id = _given(arguments, "--env")
        if env_id is not None:
            env_kwargs.update(evaluation_env_kwargs(env_id, {"env_kwargs": hyperparams.pop("env_kwargs", None)}))
        return hyperparams, stats_path

    def keep_test_env(*args: Any, **kwargs: Any) -> VecEnv:
        nonlocal test_env
        # Those of the command lines, of `train` and of the script, win
        test_env = create_test_env(*args, **{**kwargs, "env_kwargs": {**env_kwargs, **kwargs["env_kwargs"]}})
        return test_env

    class Player(MaskableEpisodicA2C):
        """Asks the script's environments for the masks that the script does not give."""

        def predict(self, *args: Any, **kwargs: Any) -> Any:
            if self.use_masking and test_env is not None:
                kwargs["action_masks"] = get_action_masks(test_env)
            return super().predict(*args, **kwargs)

    with (
        _replaced(module, "get_saved_hyperparams", keep_env_kwargs),
        _replaced(module, "create_test_env", keep_test_env),
        _replaced(module, "ALGOS", {**module.ALGOS, "episodic_a2c_mask": Player}),
    ):
        yield


_subprocess_call = subprocess.call


def _call_our_launcher(command: Any, *args: Any, **kwargs: Any) -> int:
    """
    ``subprocess.call`` for the Zoo's scripts that start others.

    ``record_training`` starts ``python -m rl_zoo3.record_video``, where our algorithms are not registered, and ``benchmark``
    starts ``python enjoy.py``, which only a checkout of the Zoo has. And ``python`` may be another interpreter than this one.
    """
    for script, start in {"record_video": ["python", "-m", "rl_zoo3.record_video"], "enjoy": ["python", "enjoy.py"]}.items():
        if isinstance(command, list) and command[: len(start)] == start:
            command = [sys.executable, "-m", "sb3_episodic_a2c", script, *command[len(start) :]]
    return _subprocess_call(command, *args, **kwargs)


@contextlib.contextmanager
def _ffmpeg_on_path() -> Iterator[None]:
    """``record_training`` joins its videos with the command ``ffmpeg``; moviepy comes with a binary of another name."""
    if shutil.which("ffmpeg") is not None or importlib.util.find_spec("imageio_ffmpeg") is None:
        yield
        return
    binary = importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "ffmpeg").symlink_to(binary)
        path = os.environ.get("PATH", os.defpath)
        os.environ["PATH"] = os.pathsep.join([path, folder])
        try:
            yield
        finally:
            os.environ["PATH"] = path


@contextlib.contextmanager
def _replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute within a ``with`` block."""
    original = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, original)
