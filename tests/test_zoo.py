"""RL Zoo with our algorithms: its scripts as a user types them, our hyperparameters and samplers."""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import optuna
import pytest
import torch as th
import yaml
from gymnasium import spaces
from rl_zoo3 import ALGOS
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.utils import FloatSchedule

from sb3_episodic_a2c import EpisodicA2C, ResumableCheckpointCallback, notebook_preset, resume
from sb3_episodic_a2c.__main__ import ZOO_COMMANDS
from sb3_episodic_a2c.tools import samplers, zoo
from sb3_episodic_a2c.tools import vectorization as vectorizations
from sb3_episodic_a2c.tools.entries import read_entry
from sb3_episodic_a2c.tools.zoo import ALGORITHMS, config_path, experiment_manager_class, register
from tests.processes import PATIENCE, Command
from tests.variant_envs import make_random_envs

CHECKOUT = Path(__file__).parent.parent

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "SDL_VIDEODRIVER": "dummy", "WANDB_MODE": "offline"}

CONFIGS = {name: yaml.safe_load(config_path(name).read_text()) for name in [*ALGORITHMS, "notebook"]}

SHORT = ("--eval-freq", "-1", "--device", "cpu")


def start(*arguments: str, cwd: Path) -> Command:
    return Command(*arguments, cwd=cwd, environment=ENVIRONMENT)


def finish(process: Command) -> str:
    process.wait()
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout + process.stderr


def run(*arguments: str, cwd: Path) -> str:
    """Run a command that must succeed, and return what it printed."""
    return finish(start(*arguments, cwd=cwd))


# ------------------------------------------------------------------ scripts


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs of two evaluations each. Tests share it."""
    folder = tmp_path_factory.mktemp("zoo")
    arguments = (
        "train",
        "--env",
        "CartPole-v1",
        "-n",
        "1000",
        "--eval-freq",
        "500",
        "--eval-episodes",
        "2",
        "--device",
        "cpu",
    )
    output = run(*arguments, "-P", "--seed", "1", "--save-freq", "500", "-tb", "tb", cwd=folder)
    assert str(config_path("episodic_a2c")) in output
    # As `callback: {sb3_episodic_a2c.ResumableCheckpointCallback: {...}}` in a config
    callback = "callback:{'sb3_episodic_a2c.ResumableCheckpointCallback':{'save_path':'checkpoints','save_freq':200,'keep':9}}"
    params = ("learning_rate:'lin_0.01'", "n_envs:2", "normalize:True", callback)
    run(*arguments, "--seed", "2", "-params", *params, cwd=folder)
    return folder


def test_train_writes_an_ordinary_run_folder(trained: Path) -> None:
    folder = trained / "logs" / "episodic_a2c" / "CartPole-v1_1"
    for name in ("CartPole-v1.zip", "best_model.zip", "rl_model_500_steps.zip", "rl_model_1000_steps.zip", "0.monitor.csv"):
        assert (folder / name).is_file()
    assert EpisodicA2C.load(folder / "CartPole-v1.zip").num_timesteps == 1_000
    assert np.load(folder / "evaluations.npz")["timesteps"].tolist() == [500, 1_000]
    # As the user typed it
    command = (folder / "CartPole-v1" / "command.txt").read_text()
    assert command.endswith("-m sb3_episodic_a2c train " + command.partition(" train ")[2])
    assert "--conf-file" not in command
    assert list((trained / "tb" / "CartPole-v1").glob("EpisodicA2C_1/events*"))

    second = trained / "logs" / "episodic_a2c" / "CartPole-v1_2"
    model = EpisodicA2C.load(second / "CartPole-v1.zip")
    assert (model.n_envs, model.learning_rate(0.5)) == (2, 0.005)  # type: ignore[operator]  # "lin_0.01" is a function
    assert (second / "CartPole-v1" / "vecnormalize.pkl").is_file()
    # The grids line up, whatever the number of environments
    assert np.load(second / "evaluations.npz")["timesteps"].tolist() == [500, 1_000]


def test_train_is_resumed(trained: Path, tmp_path: Path) -> None:
    """From the third checkpoint on, resuming gives what `train` gave, although `train` also evaluated."""
    run_folder = trained / "logs" / "episodic_a2c" / "CartPole-v1_2"
    episodes = load_results(str(run_folder))
    checkpoints = Path(shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints"))
    paths = sorted(checkpoints.glob("checkpoint_*_steps.zip"))
    assert len(paths) >= 4 and paths[-1].name.endswith("_1000_steps.zip")
    for path in paths[3:]:
        path.unlink()
    model = resume(checkpoints, device="cpu")
    assert model is not None and 600 <= model.num_timesteps < 1_000
    callback = ResumableCheckpointCallback(checkpoints, save_freq=200)
    model.learn(1_000 - model.num_timesteps, reset_num_timesteps=False, callback=callback)
    finished = EpisodicA2C.load(run_folder / "CartPole-v1.zip", device="cpu")
    assert model.num_timesteps == finished.num_timesteps
    for one, other in zip(model.policy.parameters(), finished.policy.parameters(), strict=True):
        assert th.equal(one, other)
    resumed = resume(checkpoints, device="cpu")
    assert resumed is not None and resumed.num_timesteps == 1_000
    # The log has been written again from the checkpoint on
    assert load_results(str(run_folder))["r"].tolist() == episodes["r"].tolist()


@pytest.mark.parametrize(
    "options",
    [
        ("--load-best", "--exp-id", "2"),
        pytest.param(("--load-checkpoint", "500", "--exp-id", "1"), marks=pytest.mark.slow),
        pytest.param(("--load-last-checkpoint", "--exp-id", "1", "--n-envs", "2"), marks=pytest.mark.slow),
    ],
    ids=lambda options: options[0],
)
def test_enjoy(options: tuple[str, ...], trained: Path, tmp_path: Path) -> None:
    rewards = str(tmp_path / "rewards")
    run("enjoy", "--env", "CartPole-v1", "--no-render", "-n", "600", "--reward-log", rewards, *options, cwd=trained)
    assert len(load_results(rewards)) > 0


def test_record_video(trained: Path) -> None:
    run("record_video", "--env", "CartPole-v1", "-n", "20", "--exp-id", "2", "-o", "videos", cwd=trained)
    (video,) = (trained / "videos").glob("final-model-episodic_a2c-*.mp4")
    assert video.stat().st_size > 1_000


@pytest.mark.slow
def test_record_training(trained: Path) -> None:
    run("record_training", "--env", "CartPole-v1", "-n", "20", "--exp-id", "1", "-o", "training", "--gif", cwd=trained)
    folder = trained / "training"
    assert len(list(folder.glob("checkpoint-*.mp4"))) == 2
    for name in ("training.mp4", "training.gif"):
        assert (folder / name).stat().st_size > 1_000


def test_plots(trained: Path) -> None:
    run("plot_train", "--env", "CartPole-v1", "--episode-window", "3", cwd=trained)
    output = run("all_plots", "--env", "CartPole-v1", "--output", "results", cwd=trained)
    assert "EPISODIC_A2C" in output
    run("plot_from_file", "--input", "results.pkl", "--output", "plot.svg", cwd=trained)
    assert (trained / "plot.svg").stat().st_size > 1_000


@pytest.mark.slow
def test_benchmark(trained: Path) -> None:
    run("benchmark", "--no-hub", "-n", "600", cwd=trained)
    assert "|episodic_a2c|CartPole-v1|" in (trained / "logs" / "benchmark" / "benchmark.md").read_text()


def test_train_goes_on_with_a_trained_agent(trained: Path, tmp_path: Path) -> None:
    agent = trained / "logs" / "episodic_a2c" / "CartPole-v1_2" / "CartPole-v1.zip"
    options = ("-i", str(agent), "-params", "n_envs:2", "normalize:True", "gamma:0.9")
    output = run("train", "--env", "CartPole-v1", "-n", "500", *SHORT, *options, cwd=tmp_path)
    assert "Loading pretrained agent" in output
    assert "Loading saved VecNormalize stats" in output
    model = EpisodicA2C.load(tmp_path / "logs" / "episodic_a2c" / "CartPole-v1_1" / "CartPole-v1.zip")
    assert model.gamma == 0.9
    assert model._n_updates > EpisodicA2C.load(agent)._n_updates


@pytest.mark.slow
def test_train_in_subprocesses(tmp_path: Path) -> None:
    command = ("train", "--env", "CartPole-v1", "-n", "500", "--vec-env", "subproc", "-params", "n_envs:2", *SHORT)
    subprocess.run(
        [sys.executable, "-m", "sb3_episodic_a2c", *command],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT},
        check=True,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize("vectorization", ["dummy", "gymnasium", "envpool"])
def test_any_seed_of_the_zoo(vectorization: str) -> None:
    """``train`` without ``--seed`` draws one below 2**32."""

    def first_observations(seed: int) -> np.ndarray:
        env = vectorizations.make_vec_env("CartPole-v1", n_envs=3, seed=seed, vectorization=vectorization)
        observations = env.reset()
        env.close()
        return np.asarray(observations)

    largest = first_observations(2**32 - 4)
    assert (largest == first_observations(2**32 - 4)).all()
    assert (largest != first_observations(2**32 - 5)).any()


@pytest.mark.slow
@pytest.mark.parametrize("vectorization", ["gymnasium", "envpool"])
def test_train_on_vector_environments(vectorization: str, tmp_path: Path) -> None:
    arguments = ("train", "--env", "CartPole-v1", "-n", "600", "--vec-env", vectorization, "--eval-freq", "300")
    run(*arguments, "--eval-episodes", "1", "--device", "cpu", "-params", "n_envs:4", "normalize:True", cwd=tmp_path)
    folder = tmp_path / "logs" / "episodic_a2c" / "CartPole-v1_1"
    logged = load_results(str(folder))
    # All copies write to one log
    assert [path.name for path in folder.glob("*.monitor.csv")] == ["0.monitor.csv"]
    assert 4 <= len(logged) and logged["l"].sum() <= 600
    assert (folder / "evaluations.npz").exists()


def test_train_with_another_config(tmp_path: Path) -> None:
    options = ("-conf", str(config_path("notebook")), "--verbose", "0")
    run("train", "--env", "CartPole-v1", "-n", "300", *SHORT, *options, cwd=tmp_path)
    model = EpisodicA2C.load(tmp_path / "logs" / "episodic_a2c" / "CartPole-v1_1" / "CartPole-v1.zip")
    assert (model.standardize_returns, model.detach_advantage) == ("episode", False)


STRICT_ENVS = """
import gymnasium as gym
from sb3_contrib.common.envs import InvalidActionEnvDiscrete

class StrictEnv(InvalidActionEnvDiscrete):
    def step(self, action):
        if action in self.invalid_actions:
            raise RuntimeError(f"{action} is invalid")
        return super().step(action)

gym.register("Strict-v0", lambda render_mode=None: StrictEnv(dim=20, n_invalid_actions=15), max_episode_steps=50)
"""


def test_the_scripts_give_masks(tmp_path: Path) -> None:
    """To an agent of which a single action without one would be an error."""
    (tmp_path / "strict_envs.py").write_text(STRICT_ENVS)
    options = ("--algo", "episodic_a2c_mask", "--env", "Strict-v0", "--gym-packages", "strict_envs")
    run("train", *options, "-n", "400", "--eval-freq", "200", "--eval-episodes", "2", "--device", "cpu", cwd=tmp_path)
    folder = tmp_path / "logs" / "episodic_a2c_mask" / "Strict-v0_1"
    assert np.load(folder / "evaluations.npz")["timesteps"].tolist() == [200, 400]
    for n_envs in ("1", "2"):
        run("enjoy", *options, "-n", "120", "--no-render", "--n-envs", n_envs, cwd=tmp_path)
    search = ("-optimize", "--n-trials", "2", "--n-jobs", "2", "--no-optim-plots", "--n-startup-trials", "2")
    output = run("train", *options, "-n", "400", *search, "--device", "cpu", cwd=tmp_path)
    assert "Number of finished trials:  2" in output
    # An agent that ignores them gets none
    unmasked = ("--env", "CartPole-v1", "-params", "use_masking:False")
    run("train", "--algo", "episodic_a2c_mask", *unmasked, "-n", "200", "--eval-freq", "100", cwd=tmp_path)
    run("enjoy", "--algo", "episodic_a2c_mask", "--env", "CartPole-v1", "-n", "50", "--no-render", cwd=tmp_path)


@pytest.mark.parametrize(
    "env_id, env_kwargs, eval_env_kwargs, expected",
    [
        # Training episodes are shorter
        ("Pendulum-v1", None, None, {}),
        # It has no limit of its own: the greedy agent walked in a circle forever
        ("CliffWalking-v1", None, None, {"max_episode_steps": 200}),
        ("Pendulum-v1", {"g": 1.0}, None, {"g": 1.0}),
        ("Pendulum-v1", {"g": 1.0}, {"g": 2.0}, {"g": 2.0}),
    ],
)
def test_environments_of_evaluations(
    env_id: str, env_kwargs: dict | None, eval_env_kwargs: dict | None, expected: dict, tmp_path: Path
) -> None:
    register()
    given = {"env_kwargs": env_kwargs, "eval_env_kwargs": eval_env_kwargs}
    config = str(config_path("episodic_a2c"))
    arguments = argparse.Namespace(**given)
    manager = experiment_manager_class()(arguments, "episodic_a2c", env_id, str(tmp_path), config=config, verbose=0, **given)
    manager.read_hyperparameters()
    assert manager.eval_env_kwargs == expected


def test_an_agent_plays_what_it_was_evaluated_on(tmp_path: Path) -> None:
    """Not the shorter episodes of its training, unless the user says so."""
    # Code in a string, as the Zoo has it for other arguments
    entry = {"n_timesteps": 400, "policy": "MlpPolicy", "env_kwargs": "dict(max_episode_steps=50)"}
    (tmp_path / "short.yml").write_text(yaml.safe_dump({"Pendulum-v1": entry}))
    output = run("train", "--env", "Pendulum-v1", "--conf-file", "short.yml", "--eval-freq", "200", "-n", "400", cwd=tmp_path)
    assert set(load_results(str(tmp_path / "logs/episodic_a2c/Pendulum-v1_1")).l) == {50}
    assert "Episode length: 200.00" in output
    enjoy = ("enjoy", "--env", "Pendulum-v1", "-n", "250", "--no-render")
    assert "Episode Length 200" in run(*enjoy, cwd=tmp_path)
    assert "Episode Length 70" in run(*enjoy, "--env-kwargs", "max_episode_steps:70", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["episodic_a2c_lstm", "a2c"])
def test_train_another_algorithm(algorithm: str, tmp_path: Path) -> None:
    """The Zoo's own algorithms keep the Zoo's hyperparameters."""
    output = run("train", "--algo", algorithm, "--env", "CartPole-v1", "-n", "300", *SHORT, cwd=tmp_path)
    assert ("zoo_configs" in output) == (algorithm != "a2c")
    run("enjoy", "--algo", algorithm, "--env", "CartPole-v1", "-n", "50", "--no-render", "-f", "logs", cwd=tmp_path)


@pytest.mark.slow
def test_tracking_by_weights_and_biases(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="an option of the Zoo that the user installs")
    # `ENVIRONMENT` makes it write to files only
    run("train", "--env", "CartPole-v1", "-n", "600", "--track", *SHORT, cwd=tmp_path)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert next(folder.glob("*.wandb")).stat().st_size > 1_000
    assert list((tmp_path / "runs").rglob("events*"))


MISSION = """
import gymnasium as gym
from gymnasium import spaces

class Mission(gym.Env):
    observation_space = spaces.Dict({"image": spaces.Box(-1, 1, (3,)), "mission": spaces.Text(10)})
    action_space = spaces.Discrete(2)

gym.register("Mission-v0", Mission)
"""


@pytest.mark.parametrize("algorithm", ["episodic_a2c", "episodic_a2c_lstm"])
def test_a_text_among_the_observations_is_named(algorithm: str, tmp_path: Path) -> None:
    """As the missions of MiniGrid; SB3's vector environments fail on it without saying so."""
    (tmp_path / "mission.py").write_text(MISSION)
    arguments = ("--algo", algorithm, "--env", "Mission-v0", "--gym-packages", "mission", "-n", "100")
    process = start("train", *arguments, *SHORT, cwd=tmp_path)
    process.wait()
    output = process.stdout + process.stderr
    assert process.returncode != 0
    assert "is not supported because of Text(" in output and "use Box, Discrete" in output


@pytest.mark.slow
def test_help_is_the_zoos_with_defaults(tmp_path: Path) -> None:
    for command in ZOO_COMMANDS:
        output = run(command, "--help", cwd=tmp_path)
        assert "Example: " in output and "[-h]" in output and "(default: " in output
        assert "Given before your arguments: " in output


def test_a_missing_package_of_the_zoos_is_one_line(tmp_path: Path) -> None:
    """One that no extra of ours brings."""
    # A package of that name that cannot be imported
    (tmp_path / "wandb.py").write_text("raise ModuleNotFoundError(\"No module named 'wandb'\", name='wandb')")
    process = start("train", "--track", cwd=tmp_path)
    process.wait()
    output = process.stdout + process.stderr
    assert process.returncode == 1
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "pip install wandb" in line
    assert "Traceback" not in output


# ------------------------------------------------------------------ hyperparameter search


def test_two_workers_finish_one_study(tmp_path: Path) -> None:
    storage = tmp_path / "storage" / "study.log"
    options = ("-optimize", "--storage", str(storage), "--study-name", "pendulum", "--max-total-trials", "4")
    sampler = ("--n-startup-trials", "2", "--eval-episodes", "1", "--no-optim-plots", "-params", "normalize:False", "n_envs:2")
    workers = [
        start("train", "--env", "Pendulum-v1", "-n", "500", *SHORT, *options, *sampler, "-f", "logs", cwd=tmp_path)
        for _ in range(2)
    ]
    outputs = [finish(worker) for worker in workers]
    assert all("Best trial:" in output for output in outputs)
    backend = optuna.storages.journal.JournalFileBackend(str(storage))
    study = optuna.load_study(study_name="pendulum", storage=optuna.storages.JournalStorage(backend))
    # Each counts the running trials of the other, but both may start their last trial at the same moment
    assert 4 <= len(study.trials) <= 5
    assert {"use_sde", "log_std_init", "partial_episodes", "standardize_returns"} <= set(study.trials[0].params)
    # Reports only. `enjoy` would take an empty run folder for the latest run
    assert {path.suffix for path in (tmp_path / "logs" / "episodic_a2c").iterdir()} == {".csv", ".pkl"}

    options = ("--storage", str(storage), "--study-name", "pendulum", "--trial-id", "0")
    run("train", "--env", "Pendulum-v1", "-n", "400", *SHORT, *options, "-params", "n_envs:2", cwd=tmp_path)
    folder = tmp_path / "logs" / "episodic_a2c" / "Pendulum-v1_1"
    model = EpisodicA2C.load(folder / "Pendulum-v1.zip")
    trial_params = study.trials[0].params
    assert model.gamma == pytest.approx(1 - trial_params["one_minus_gamma"])
    assert model.standardize_returns == trial_params["standardize_returns"]
    assert model.use_sde == trial_params["use_sde"]
    assert model.policy_kwargs["log_std_init"] == trial_params["log_std_init"]
    run("enjoy", "--env", "Pendulum-v1", "-n", "200", "--no-render", cwd=tmp_path)


@pytest.mark.slow
def test_a_search_in_two_threads(tmp_path: Path) -> None:
    options = ("-optimize", "--n-trials", "4", "--n-jobs", "2", "--n-startup-trials", "2", "--no-optim-plots")
    study = ("--storage", str(tmp_path / "study.log"), "--study-name", "cartpole", "--eval-episodes", "1")
    run("train", "--env", "CartPole-v1", "-n", "600", *SHORT, *options, *study, "-f", "logs", cwd=tmp_path)
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log"))
    trials = optuna.load_study(study_name="cartpole", storage=optuna.storages.JournalStorage(backend)).trials
    assert len(trials) == 4
    assert all(trial.state.is_finished() and trial.state != optuna.trial.TrialState.FAIL for trial in trials)
    (report,) = (tmp_path / "logs" / "episodic_a2c").glob("*.csv")
    assert len(report.read_text().splitlines()) == 1 + len(trials)


@pytest.mark.parametrize("trial_id", [0, 1])
@pytest.mark.parametrize("env_id", ["Pusher-v5", "Pendulum-v1"])
def test_a_trial_wins_over_the_entry(trial_id: int, env_id: str, tmp_path: Path) -> None:
    """Also over the one of environments that are not listed; and what the user gives wins over both."""
    register()
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log"))
    study = optuna.create_study(study_name="s", storage=optuna.storages.JournalStorage(backend))
    for gae_lambda in (0.9, 0.98):
        study.enqueue_trial({"gae_lambda": gae_lambda, "n_value_epochs": 0, "standardize_returns": "running"})
        trial = study.ask()
        samplers.sample_params(trial, n_actions=7, n_envs=4, additional_args={})
        study.tell(trial, 0.0)
    manager = experiment_manager_class()(
        argparse.Namespace(),
        "episodic_a2c",
        env_id,
        "",
        config=str(config_path("episodic_a2c")),
        storage=str(tmp_path / "study.log"),
        study_name="s",
        trial_id=trial_id,
        hyperparams={"huber_delta": 5.0},
    )
    hyperparams = manager.read_hyperparameters()[1]
    expected = samplers.convert_params(study.trials[trial_id].params)
    assert hyperparams.pop("huber_delta") == 5.0 and expected.pop("huber_delta") != 5.0
    assert {name: hyperparams[name] for name in expected} == expected
    # The rest is the entry's
    assert "VecNormalize" not in hyperparams and "norm_obs" in hyperparams["normalize"]


def test_an_old_trial_has_no_generalized_advantages() -> None:
    """Studies of version 0.1 knew none, but an entry may have them."""
    study = optuna.create_study()
    trial = study.ask()
    samplers.sample_params(trial, n_actions=1, n_envs=1, additional_args={})
    new = {"gae_lambda", "n_value_epochs", "value_learning_rate"}
    params = samplers.convert_params({name: value for name, value in trial.params.items() if name not in new})
    assert (params["gae_lambda"], params["n_value_epochs"], params["value_learning_rate"]) == (1.0, 0, None)


def test_register_twice_changes_nothing() -> None:
    before = dict(ALGOS), dict(HYPERPARAMS_SAMPLER), dict(HYPERPARAMS_CONVERTER)
    register()
    after = dict(ALGOS), dict(HYPERPARAMS_SAMPLER), dict(HYPERPARAMS_CONVERTER)
    register()
    assert (ALGOS, HYPERPARAMS_SAMPLER, HYPERPARAMS_CONVERTER) == after
    for registered, upstream in zip(after, before, strict=True):
        assert registered.keys() == upstream.keys() | ALGORITHMS.keys()
        assert {name: registered[name] for name in upstream} == upstream
    assert {name: ALGOS[name] for name in ALGORITHMS} == ALGORITHMS


def test_choices_of_standardisation_are_those_of_old_studies() -> None:
    """Optuna refuses to go on with a study if the choices or their order have changed."""
    trial = optuna.create_study().ask()
    samplers.sample_params(trial, 0, 1, {})
    choices = optuna.distributions.CategoricalDistribution(("running", "episode", "rollout", None))
    assert trial.distributions["standardize_returns"] == choices
    for name, has_units in {"running": True, "episode": False, "rollout": False, None: True}.items():
        params = samplers.convert_params({**trial.params, "standardize_returns": name})
        assert params["handle_timeout_termination"] == has_units


SPACES = {"discrete": spaces.Discrete(5), "box": spaces.Box(-1.0, 1.0, (2,))}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_samples_are_arguments(algorithm: str, n_envs: int, space: str) -> None:
    if algorithm == "episodic_a2c_mask" and space == "box":
        pytest.skip("masks are for discrete actions")
    register()
    n_actions = 2 if space == "box" else 0
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    policy = "MlpLstmPolicy" if algorithm == "episodic_a2c_lstm" else "MlpPolicy"
    env = make_random_envs(SPACES[space], n_envs)
    for _ in range(6):
        trial = study.ask()
        arguments = HYPERPARAMS_SAMPLER[algorithm](trial, n_actions, n_envs, {})
        # The stored parameters are enough to make the arguments again
        stored = ExperimentManager._preprocess_schedules(HYPERPARAMS_CONVERTER[algorithm](trial.params))
        for progress_remaining in (1.0, 0.25):
            schedules = [FloatSchedule(params["learning_rate"]) for params in (arguments, stored)]
            assert schedules[0](progress_remaining) == pytest.approx(schedules[1](progress_remaining))
        assert stored | {"learning_rate": arguments["learning_rate"]} == arguments
        assert ("use_sde" in arguments) == (space == "box")
        assert ("partial_episodes" in arguments) == (n_envs > 1)
        model = ALGORITHMS[algorithm](policy, env, device="cpu", **arguments)
        assert model.policy_kwargs.items() >= arguments["policy_kwargs"].items()
        model.learn(100)


@pytest.mark.parametrize("space", SPACES)
def test_samples_fit_every_entry(space: str) -> None:
    """The Zoo puts what was sampled over the environment's entry, which may have what does not fit the rest."""
    entry = {"gae_lambda": 0.95, "n_value_epochs": 10, "value_learning_rate": 1e-3, "noise_resample_prob": 0.2}
    assert entry.keys() <= {name for of_env in CONFIGS["episodic_a2c"].values() for name in of_env}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    env = make_random_envs(SPACES[space], 1)
    for _ in range(20):
        arguments = samplers.sample_params(study.ask(), 2 if space == "box" else 0, 1, {})
        EpisodicA2C("MlpPolicy", env, device="cpu", **{**entry, **arguments})


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_diverging_trial_is_pruned() -> None:
    """The Zoo prunes a trial at a ValueError; any other error ends the study."""
    model = EpisodicA2C("MlpPolicy", "Pendulum-v1", learning_rate=1e30, device="cpu")
    with pytest.raises(ValueError):
        model.learn(2_000)


# ------------------------------------------------------------------ hyperparameters


ENTRIES = [(name, env_id) for name in CONFIGS for env_id in CONFIGS[name] if env_id != "atari" and not (name.endswith("mask"))]


@pytest.mark.filterwarnings("ignore:No episode ended")
@pytest.mark.parametrize("name, env_id", ENTRIES, ids=["-".join(entry) for entry in ENTRIES])
def test_entries_train(name: str, env_id: str, tmp_path: Path) -> None:
    register()
    manager = experiment_manager_class()(
        args=type("Arguments", (), {})(),
        algo=name if name in ALGORITHMS else "episodic_a2c",
        env_id={"default": "CartPole-v1", "default-continuous": "Pusher-v5"}.get(env_id, env_id),
        log_folder=str(tmp_path),
        config=str(config_path(name)),
        n_timesteps=300,
        eval_freq=-1,
        verbose=0,
        device="cpu",
        log_interval=-1,
        seed=0,
    )
    results = manager.setup_experiment()
    assert results is not None
    model, hyperparams = results
    model.learn(300)
    assert 300 <= model.num_timesteps < 300 + hyperparams.get("n_envs", 1)
    assert model.env is not None
    model.env.close()


def test_mask_entry_trains() -> None:
    hyperparams = dict(CONFIGS["episodic_a2c_mask"]["default"])
    del hyperparams["n_timesteps"]
    ALGORITHMS["episodic_a2c_mask"](env=make_random_envs(spaces.Discrete(5)), **hyperparams).learn(300)


def test_entries_promised() -> None:
    assert list(CONFIGS["episodic_a2c"]) == [
        "default",
        "default-continuous",
        "CartPole-v1",
        "Acrobot-v1",
        "MountainCar-v0",
        "MountainCarContinuous-v0",
        "Pendulum-v1",
        "LunarLander-v3",
        "LunarLanderContinuous-v3",
        "BipedalWalker-v3",
        "HalfCheetah-v5",
        "Swimmer-v5",
        "Ant-v5",
        "Hopper-v5",
        "Walker2d-v5",
        "InvertedDoublePendulum-v5",
        "InvertedPendulum-v5",
        "Reacher-v5",
        "FrozenLake-v1",
        "Taxi-v4",
        "CliffWalking-v1",
        "Blackjack-v1",
        "atari",
    ]
    for config in CONFIGS.values():
        for env_id, entry in config.items():
            # The Zoo merges nothing: an entry is all there is
            assert {"n_timesteps", "policy"} <= entry.keys()
            assert env_id in ("default", "default-continuous", "atari") or gym.spec(env_id)


@pytest.mark.parametrize(
    "env_id, entry", [("Pusher-v5", "default-continuous"), ("FrozenLake8x8-v1", "default"), ("CarRacing-v3", "default")]
)
def test_the_entry_of_an_unlisted_environment(env_id: str, entry: str) -> None:
    assert read_entry("episodic_a2c", env_id) == CONFIGS["episodic_a2c"][entry]


@pytest.mark.parametrize("env_id", CONFIGS["notebook"])
def test_notebook_config_is_the_preset(env_id: str) -> None:
    entry: dict[str, Any] = dict(CONFIGS["notebook"][env_id])
    del entry["n_timesteps"]
    entry["policy_kwargs"] = eval(entry["policy_kwargs"])
    assert entry == notebook_preset()


def test_atari_entry_fits_the_algorithm() -> None:
    """With images of that shape, as ale-py is no dependency."""

    class Images(gym.Env):
        observation_space = spaces.Box(0, 255, (84, 84, 4), np.uint8)
        action_space = spaces.Discrete(4)

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
            self.steps_left = 10
            return self.observation_space.sample(), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            self.steps_left -= 1
            return self.observation_space.sample(), 1.0, self.steps_left == 0, False, {}

    entry = dict(CONFIGS["episodic_a2c"]["atari"])
    for name in ("n_timesteps", "n_envs", "frame_stack", "env_wrapper"):
        del entry[name]
    EpisodicA2C(env=make_vec_env(Images, n_envs=2), device="cpu", **entry).learn(40)


def test_config_path_refuses_other_names() -> None:
    with pytest.raises(ValueError, match="Use one of"):
        config_path("ppo")


# ------------------------------------------------------------------ launcher


def test_the_users_arguments_win() -> None:
    defaults = zoo._default_arguments
    config = str(config_path("episodic_a2c_lstm"))
    assert defaults("train", ["--algo", "episodic_a2c_lstm"]) == ["--algo", "episodic_a2c", "--conf-file", config]
    assert defaults("train", ["--env", "X-v0", "--algo=ppo"]) == ["--algo", "episodic_a2c"]
    assert defaults("enjoy", []) == ["--algo", "episodic_a2c", "--folder", "logs"]
    # The Zoo downloads agents of its own algorithms
    assert defaults("enjoy", ["--algo", "ppo"]) == ["--algo", "episodic_a2c"]
    assert defaults("plot_from_file", ["-i", "x"]) == []


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_configs(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)], cwd=CHECKOUT, check=True, capture_output=True
    )
    # The files name the measurements in RESULTS.md
    names = {*(f"{name}.yml" for name in CONFIGS), "RESULTS.md"}
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        assert names == {Path(name).name for name in wheel.namelist() if name.startswith("sb3_episodic_a2c/zoo_configs/")}
        # Where `config_path` looks when the package is not in a checkout
        wheel.extractall(tmp_path / "site-packages")
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        assert names == {Path(name).name for name in sdist.getnames() if "/zoo_configs/" in name}
    code = "from sb3_episodic_a2c.tools.zoo import config_path; print(config_path('episodic_a2c'))"
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(tmp_path / "site-packages")}
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert Path(output.strip()) == tmp_path / "site-packages" / "sb3_episodic_a2c" / "zoo_configs" / "episodic_a2c.yml"
