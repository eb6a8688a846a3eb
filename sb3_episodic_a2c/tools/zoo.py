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
- The search samples networks with separate actor and critic, so it does not fit ``"SharedMlpPolicy"``.
- ``--track`` needs ``pip install wandb``.
- ``push_to_hub`` is broken in rl_zoo3 2.9.2, so the command line does not have it.

Worked around in rl_zoo3 2.9.2:

- It needs ``requests`` and ``pandas`` but does not declare them: our extra ``zoo`` does.
- ``record_training`` and ``benchmark`` start child processes in which our algorithms are not registered.
- ``-optimize`` leaves an empty run folder, in which ``enjoy`` finds no model.
- ``--trial-id 0`` is ignored.
- ``record_training`` fails with a relative ``-o``, and without ffmpeg on the PATH.
- ``benchmark`` fails at its very end if the folder of its table is missing.
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
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

import sb3_episodic_a2c
from sb3_episodic_a2c import EpisodicA2C, MaskableEpisodicA2C, RecurrentEpisodicA2C
from sb3_episodic_a2c.actors import INDEPENDENT
from sb3_episodic_a2c.returns import STANDARDIZATIONS
from sb3_episodic_a2c.selection import PARTIAL_EPISODES
from sb3_episodic_a2c.tools.vectorization import make_vec_env

if TYPE_CHECKING:
    import optuna

ALGORITHMS: dict[str, type[EpisodicA2C]] = {
    "episodic_a2c": EpisodicA2C,
    "episodic_a2c_mask": MaskableEpisodicA2C,
    "episodic_a2c_lstm": RecurrentEpisodicA2C,
}
"""Zoo id: the algorithm."""

DEFAULT_ALGORITHM = "episodic_a2c"

LOG_FOLDER = "logs"
"""Where the Zoo's ``train`` writes by default."""

NET_ARCHS: dict[str, list[int]] = {"tiny": [64], "small": [64, 64], "medium": [128, 128], "big": [256, 256]}

OUR_SCHEDULES = ("ent_coef", "value_learning_rate")
"""Arguments of our algorithms that may be schedules, besides those that the Zoo knows."""

CONTINUOUS_ENTRY = "default-continuous"
"""Key of the entry, in a file of hyperparameters, for unlisted environments with vectors as observations and Box actions."""

ACTIVATION_FNS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


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


def evaluate_kwargs(kwargs: dict[str, Any] | str | None) -> dict[str, Any]:
    """
    :param kwargs: Keyword arguments as a config has them, maybe as Python code in a string
    :return: The arguments. Code is evaluated as the Zoo does it, in the module of its manager
    """
    if isinstance(kwargs, str):
        return dict(eval(kwargs, vars(importlib.import_module("rl_zoo3.exp_manager"))))
    return dict(kwargs or {})


# ------------------------------------------------------------------ hyperparameter search


def sample_params(trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sample hyperparameters of :class:`EpisodicA2C` or :class:`MaskableEpisodicA2C`.

    The number of environments and their wrappers are not searched: the Zoo takes them from the config, or from
    ``-params n_envs:8 normalize:...``. Nor is ``noise_resample_prob``, which policies for images refuse: the Zoo does not say
    here what the policy is.

    :param trial: Where they are drawn from
    :param n_actions: Dimension of a Box action space, 0 for any other
    :param n_envs: Number of environments
    :param additional_args: For off-policy algorithms; ignored
    :return: Arguments of the constructor
    """
    return _arguments(_suggest(trial, n_actions, n_envs))


def sample_lstm_params(trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """Sample hyperparameters of :class:`RecurrentEpisodicA2C`, see :func:`sample_params`."""
    sampled_params = {
        **_suggest(trial, n_actions, n_envs),
        "lstm_hidden_size": trial.suggest_categorical("lstm_hidden_size", [16, 32, 64, 128, 256]),
        "enable_critic_lstm": trial.suggest_categorical("enable_critic_lstm", [False, True]),
    }
    return _arguments(sampled_params)


def _suggest(trial: "optuna.Trial", n_actions: int, n_envs: int) -> dict[str, Any]:
    sampled_params: dict[str, Any] = {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 1e-4, 0.1, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 2e-2, log=True),
        "lr_schedule": trial.suggest_categorical("lr_schedule", ["constant", "linear"]),
        # 1, 2, 4 or 8
        "n_episodes_pow": trial.suggest_int("n_episodes_pow", 0, 3),
        "standardize_returns": trial.suggest_categorical("standardize_returns", list(STANDARDIZATIONS)),
        "ent_coef": trial.suggest_float("ent_coef", 1e-8, 0.1, log=True),
        "vf_coef": trial.suggest_float("vf_coef", 0.1, 2.0, log=True),
        "huber_delta": trial.suggest_categorical("huber_delta", [0.3, 1.0, 10.0]),
        # The gradient is a sum over all transitions, so the values are larger than A2C's. If every update is clipped, Adam
        # gives all the same weight, however long their episodes
        "max_grad_norm": trial.suggest_categorical("max_grad_norm", [None, 1.0, 10.0, 100.0]),
        "net_arch": trial.suggest_categorical("net_arch", list(NET_ARCHS)),
        "activation_fn": trial.suggest_categorical("activation_fn", list(ACTIVATION_FNS)),
        "gae_lambda": trial.suggest_categorical("gae_lambda", [0.9, 0.95, 0.98, 1.0]),
        "n_value_epochs": trial.suggest_categorical("n_value_epochs", [0, 4, 10]),
        "value_learning_rate": trial.suggest_float("value_learning_rate", 1e-4, 1e-2, log=True),
    }
    if n_envs > 1:
        sampled_params["partial_episodes"] = trial.suggest_categorical("partial_episodes", list(PARTIAL_EPISODES))
    if n_actions > 0:
        sampled_params["use_sde"] = trial.suggest_categorical("use_sde", [False, True])
        sampled_params["sde_sample_freq"] = trial.suggest_categorical("sde_sample_freq", [-1, 4, 8, 16, 64])
        sampled_params["log_std_init"] = trial.suggest_float("log_std_init", -2.0, 1.0)
    # The Zoo displays these instead of the transformed values
    trial.set_user_attr("gamma", 1 - sampled_params["one_minus_gamma"])
    trial.set_user_attr("n_episodes", 2 ** sampled_params["n_episodes_pow"])
    return sampled_params


def convert_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: What a trial stores
    :return: Hyperparameters as they stand in a config: arguments of the constructor, except for the learning rate, where the
        Zoo turns ``"lin_0.003"`` into a schedule
    """
    params = dict(sampled_params)
    if params.pop("lr_schedule") == "linear":
        params["learning_rate"] = f"lin_{params['learning_rate']}"
    params["gamma"] = 1 - params.pop("one_minus_gamma")
    params["n_episodes"] = 2 ** params.pop("n_episodes_pow")
    # What does not fit the rest is overwritten, not left out: the environment's entry may have it
    has_units = STANDARDIZATIONS[params["standardize_returns"]].has_units
    # A value at a time limit, and one in an advantage, needs a critic that has units
    params["handle_timeout_termination"] = has_units
    # Studies of older versions have none
    params.setdefault("n_value_epochs", 0)
    params.setdefault("gae_lambda", 1.0)
    if not has_units:
        params["gae_lambda"] = 1.0
    if params["n_value_epochs"] == 0:
        params["value_learning_rate"] = None
    if params.get("use_sde"):
        params["noise_resample_prob"] = INDEPENDENT
    net_arch = NET_ARCHS[params.pop("net_arch")]
    policy_kwargs = {
        "net_arch": {"pi": list(net_arch), "vf": list(net_arch)},
        "activation_fn": ACTIVATION_FNS[params.pop("activation_fn")],
    }
    for name in ("log_std_init", "lstm_hidden_size", "enable_critic_lstm"):
        if name in params:
            policy_kwargs[name] = params.pop(name)
    return {**params, "policy_kwargs": policy_kwargs}


def _arguments(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the constructor. In a search the Zoo makes no schedules, so they are made here."""
    arguments = convert_params(sampled_params)
    if sampled_params["lr_schedule"] == "linear":
        arguments["learning_rate"] = LinearSchedule(sampled_params["learning_rate"], 0.0, 1.0)
    return arguments


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
            getattr(module, command)()
        else:
            stack.enter_context(_replaced(subprocess, "call", _call_our_launcher))
            if command == "record_training":
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
    :return: A subclass that works around two upstream bugs, makes schedules of ``ent_coef: lin_0.01``, training environments
        by our ``make_vec_env``, and knows :data:`CONTINUOUS_ENTRY`
    """

    class ExperimentManager(experiment_manager):
        custom_hyperparams: dict[str, Any] | None
        vectorization = "dummy"
        """Of the training environments. ``"dummy"`` leaves the choice to the Zoo."""
        first_index = 0
        """Number of the first training environment, and of its log."""

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
                    # SB3's vector environments fail on a space that they do not know; our constructor names it
                    env = gym.make(self.env_name.gym_id, **self.env_kwargs)
                    ALGORITHMS[self.algo]("MlpPolicy", self.env_wrapper(env) if self.env_wrapper else env)
                raise

        def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
            hyperparams = self._continuous_entry()
            # Upstream tests `if self.trial_id`, so that `--trial-id 0` is ignored. Others must not lose to that entry
            if self.storage and self.study_name and self.trial_id is not None:
                hyperparams |= self.load_trial(self.storage, self.study_name, self.trial_id)
            self.custom_hyperparams = {**hyperparams, **(self.custom_hyperparams or {})}
            return super().read_hyperparameters()

        def _continuous_entry(self) -> dict[str, Any]:
            """What a file of ours says of environments like this one, besides its ``default``, if it does not list it."""
            if self._is_atari or not str(self.config).endswith((".yml", ".yaml")):
                return {}
            # Here, as it comes with the Zoo: without it, the Zoo is what is missing
            import yaml

            with open(self.config) as file:
                entries = yaml.safe_load(file) or {}
            if CONTINUOUS_ENTRY not in entries or self.env_name.gym_id in entries:
                return {}
            with contextlib.closing(gym.make(self.env_name.gym_id, **self.env_kwargs)) as env:
                is_vector = isinstance(env.observation_space, spaces.Box) and len(env.observation_space.shape) == 1
                return entries[CONTINUOUS_ENTRY] if is_vector and isinstance(env.action_space, spaces.Box) else {}

        @staticmethod
        def _preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
            # Upstream knows no schedules of these
            for name in OUR_SCHEDULES:
                kind, _, initial_value = str(hyperparams.get(name)).partition("_")
                if kind == "lin":
                    hyperparams[name] = LinearSchedule(float(initial_value), 0.0, 1.0)
            return experiment_manager._preprocess_schedules(hyperparams)

    return ExperimentManager


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
