"""Training that is stopped and resumed is the training that was never stopped; a damaged file costs one checkpoint at most."""

import random
import shutil
import signal
import zipfile
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecMonitor, VecNormalize

from sb3_episodic_a2c import (
    EpisodicA2C,
    MaskableEpisodicA2C,
    RecurrentEpisodicA2C,
    ResumableCheckpointCallback,
    load_checkpoint,
    resume,
    save_checkpoint,
)
from tests.envs import ACTION_SPACES, TargetEnv, vectorized
from tests.variant_envs import make_random_envs


def state_of(model: Any) -> dict[str, Any]:
    """Everything that the rest of a training depends on, as far as it can be compared."""
    buffer = model.rollout_buffer
    state = {
        "parameters": model.policy.state_dict(),
        "optimizer": model.policy.optimizer.state_dict()["state"],
        "statistics": model.return_statistics,
        "counters": (model.num_timesteps, model._total_timesteps, model._n_updates, model._episode_num),
        "observations": model._last_obs,
        "episodes": (buffer.running_steps, buffer._rows["rewards"][: buffer._row]),
        # Their wall-clock times differ
        "finished": [(episode["r"], episode["l"]) for episode in model.ep_info_buffer],
        "random": (th.get_rng_state(), np.random.get_state(), random.getstate()),
        "actor": model._actor.rng.bit_generator.state if model._actor.name == "numpy" else None,
        "lstm": getattr(model, "_lstm_states", None),
    }
    return deepcopy(state)


def assert_same(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (part, other_part) in enumerate(zip(one, other, strict=True)):
            assert_same(part, other_part, f"{where}/{index}")
    elif isinstance(one, th.Tensor):
        assert th.equal(one, other), where
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other, err_msg=where)
    else:
        assert one == other, where


class CheckpointEveryUpdate(BaseCallback):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.paths: list[Path] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.paths.append(self.folder / f"{len(self.paths)}.zip")
        save_checkpoint(self.model, self.paths[-1])


class RandomizedEnv(TargetEnv):
    """Draws from all that an environment may draw from: the global random states, and those of its spaces."""

    def __init__(self) -> None:
        super().__init__(action_space=spaces.Discrete(3))
        # Otherwise the operating system would seed it at its first use
        self.action_space.seed(0)

    def step(self, action: Any) -> Any:
        observation, reward, *_ = super().step(action)
        noise = random.random() + np.random.random() + float(th.rand(())) + int(self.action_space.sample())
        self.episode_length = 3 + int(self.np_random.integers(6))
        is_over = self.n_steps >= self.episode_length
        return observation, reward + noise, is_over, False, {}


def cartpole(n_envs: int) -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs, seed=1)


def normalized_cartpole(n_envs: int) -> VecEnv:
    env = DummyVecEnv([lambda: gym.make("CartPole-v1") for _ in range(n_envs)])
    return VecNormalize(VecMonitor(env), norm_reward=True)


def pendulum(n_envs: int) -> VecEnv:
    return make_vec_env("Pendulum-v1", n_envs, seed=1, wrapper_class=ShortEpisodes)


class ShortEpisodes(gym.wrappers.TimeLimit):
    def __init__(self, env: gym.Env) -> None:
        super().__init__(env, max_episode_steps=40)


SETTINGS: dict[str, tuple[type[EpisodicA2C], Callable[[int], VecEnv], dict[str, Any]]] = {
    "plain": (EpisodicA2C, cartpole, {"learning_rate": lambda progress: 3e-3 * progress}),
    "normalized": (EpisodicA2C, normalized_cartpole, {"batch_size": 50}),
    "gsde": (EpisodicA2C, pendulum, {"use_sde": True, "sde_sample_freq": 7}),
    "torch actor": (EpisodicA2C, cartpole, {"actor": "torch"}),
    "global random states": (EpisodicA2C, lambda n_envs: vectorized(lambda index: RandomizedEnv(), n_envs), {}),
    "maskable": (
        MaskableEpisodicA2C,
        lambda n_envs: VecMonitor(make_random_envs(ACTION_SPACES["discrete"], n_envs, max_length=40)),
        {},
    ),
    "recurrent": (RecurrentEpisodicA2C, cartpole, {"policy_kwargs": {"lstm_hidden_size": 8, "net_arch": []}}),
}


def make_model(setting: str, n_envs: int, **kwargs: Any) -> EpisodicA2C:
    algorithm, make_env, arguments = SETTINGS[setting]
    policy = "MlpLstmPolicy" if algorithm is RecurrentEpisodicA2C else "MlpPolicy"
    arguments = {"policy_kwargs": {"net_arch": [16]}, "device": "cpu", **arguments, **kwargs}
    return algorithm(policy, make_env(n_envs), seed=3, **arguments)


# Where the budget ends shortly after a checkpoint
pytestmark = pytest.mark.filterwarnings("ignore:No episode ended")


@pytest.mark.parametrize("partial_episodes", ["carry", "discard"])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.filterwarnings("error:The environments cannot be part")
def test_goes_on_as_if_never_stopped(setting: str, n_envs: int, partial_episodes: str, tmp_path: Path) -> None:
    model = make_model(setting, n_envs, partial_episodes=partial_episodes)
    checkpoints = CheckpointEveryUpdate(tmp_path)
    model.learn(700, callback=checkpoints)
    expected = state_of(model)
    n_rollouts = len(checkpoints.paths)
    assert n_rollouts >= 3
    n_in_flight = 0
    for path in {checkpoints.paths[index] for index in (0, n_rollouts // 2, n_rollouts - 1)}:
        resumed = load_checkpoint(path, device="cpu")
        assert type(resumed) is type(model)
        n_in_flight += resumed.rollout_buffer.running_steps.sum()
        resumed.learn(700 - resumed.num_timesteps, reset_num_timesteps=False)
        assert_same(state_of(resumed), expected)
    # All episodes of Pendulum have the same length
    assert (n_in_flight > 0) == (n_envs > 1 and partial_episodes == "carry" and setting != "gsde")


@pytest.mark.parametrize("partial_episodes", ["carry", "discard"])
@pytest.mark.parametrize("setting", ["normalized", "recurrent"])
def test_between_two_calls_of_learn(setting: str, partial_episodes: str, tmp_path: Path) -> None:
    """The budget ends within an episode."""
    model = make_model(setting, 3, partial_episodes=partial_episodes)
    model.learn(400)
    assert model.rollout_buffer.running_steps.any()
    save_checkpoint(model, tmp_path / "checkpoint")
    model.learn(300, reset_num_timesteps=False)
    expected = state_of(model)
    # The suffix is optional here as well
    resumed = load_checkpoint(tmp_path / "checkpoint", device="cpu")
    resumed.learn(300, reset_num_timesteps=False)
    assert_same(state_of(resumed), expected)
    if setting == "normalized":
        np.testing.assert_array_equal(resumed.env.obs_rms.mean, model.env.obs_rms.mean)
        np.testing.assert_array_equal(resumed.env.returns, model.env.returns)


def test_writing_checkpoints_changes_nothing(tmp_path: Path) -> None:
    models = [make_model("gsde", 2) for _ in range(2)]
    states = []
    for model, callback in zip(models, [None, CheckpointEveryUpdate(tmp_path)], strict=True):
        model.set_random_seed(0)
        random.seed(0)
        model.learn(500, callback=callback)
        states.append(state_of(model))
    assert_same(*states)


def test_a_checkpoint_is_an_ordinary_zip_and_a_save_holds_no_environments(tmp_path: Path) -> None:
    model = make_model("plain", 2).learn(300)
    model.save(tmp_path / "model")
    save_checkpoint(model, tmp_path / "checkpoint")
    loaded = EpisodicA2C.load(tmp_path / "checkpoint", device="cpu")
    assert_same(loaded.policy.state_dict(), model.policy.state_dict())
    assert loaded.return_statistics == model.return_statistics
    with zipfile.ZipFile(tmp_path / "model.zip") as archive, zipfile.ZipFile(tmp_path / "checkpoint.zip") as checkpoint:
        added = set(checkpoint.namelist()) - set(archive.namelist())
    assert added == {"resume/training.pkl", "resume/episodes.pkl"}
    with pytest.raises(ValueError, match=r"model\.zip is no checkpoint.*save_checkpoint.*load"):
        load_checkpoint(tmp_path / "model.zip")


def test_monitor_files_go_on_where_the_checkpoint_was_made(tmp_path: Path) -> None:
    env = make_vec_env("CartPole-v1", 2, seed=1, monitor_dir=str(tmp_path / "monitor"))
    model = EpisodicA2C("MlpPolicy", env, seed=0, device="cpu")
    checkpoints = CheckpointEveryUpdate(tmp_path)
    model.learn(600, callback=checkpoints)
    expected = load_results(str(tmp_path / "monitor"))
    resumed = load_checkpoint(checkpoints.paths[2], device="cpu")
    # Looking into a checkpoint writes nothing
    assert len(load_results(str(tmp_path / "monitor"))) == len(expected)
    resumed.learn(600 - resumed.num_timesteps, reset_num_timesteps=False)
    resumed.env.close()
    actual = load_results(str(tmp_path / "monitor"))
    for key in ("r", "l"):
        assert sorted(actual[key]) == sorted(expected[key])


@pytest.mark.parametrize("lost", ["all", "head", "rows", "half a row"])
def test_monitor_files_that_have_lost_their_end(lost: str, tmp_path: Path) -> None:
    """After a crash of the machine, or without the files: they can be read, and the training is the same."""
    env = make_vec_env("CartPole-v1", 1, seed=1, monitor_dir=str(tmp_path / "monitor"))
    model = EpisodicA2C("MlpPolicy", env, seed=0, device="cpu").learn(200)
    save_checkpoint(model, tmp_path / "checkpoint.zip")
    model.learn(200, reset_num_timesteps=False)
    env.close()
    log = tmp_path / "monitor" / "0.monitor.csv"
    lines = log.read_bytes().splitlines(keepends=True)
    n_kept = {"all": 0, "head": 0, "rows": 3, "half a row": 2}[lost]
    if lost == "all":
        shutil.rmtree(tmp_path / "monitor")
    else:
        log.write_bytes({"head": lines[0] + lines[1][:3], "rows": b"".join(lines[:5])}.get(lost, b"".join(lines[:5])[:-6]))

    resumed = load_checkpoint(tmp_path / "checkpoint.zip", device="cpu")
    n_finished = resumed._episode_num
    assert n_finished > 3
    with pytest.warns(UserWarning, match=r"0\.monitor\.csv has lost episodes: it was \d+ bytes") as warned:
        resumed.learn(200, reset_num_timesteps=False)
    resumed.env.close()
    assert len(warned) == 1
    assert_same(state_of(resumed), state_of(model))
    results = load_results(str(log.parent))
    assert len(results) == n_kept + resumed._episode_num - n_finished
    assert results["l"].tolist()[n_kept:] == [episode["l"] for episode in model.ep_info_buffer][n_finished:]
    assert not results.isna().any(axis=None)


# ---------------------------------------------------------------------- environments that cannot be pickled


def test_subprocess_environments_start_fresh_episodes(tmp_path: Path) -> None:
    # Starts at once, as the processes import nothing
    fork = {"start_method": "fork"}

    def make_env() -> VecEnv:
        return VecNormalize(make_vec_env("CartPole-v1", 2, 1, vec_env_cls=SubprocVecEnv, vec_env_kwargs=fork))

    env = make_env()
    model = EpisodicA2C("MlpPolicy", env, seed=0, device="cpu")
    with pytest.warns(UserWarning, match=r"cannot be part of the checkpoint.*processes of their own.*`env`") as warned:
        model.learn(400, callback=ResumableCheckpointCallback(tmp_path, save_freq=100, keep=10))
    assert len([warning for warning in warned if "cannot be part" in str(warning.message)]) == 1
    env.close()
    assert len(list(tmp_path.iterdir())) >= 3

    with pytest.warns(UserWarning, match=r"holds no environments: pass `env`"):
        alone = resume(tmp_path, device="cpu")
    alone.predict(np.zeros(4, np.float32))

    new_env = make_env()
    resumed = resume(tmp_path, env=new_env, device="cpu")
    assert_same(resumed.policy.state_dict(), model.policy.state_dict())
    assert_same(resumed.policy.optimizer.state_dict(), model.policy.optimizer.state_dict())
    assert resumed.return_statistics == model.return_statistics
    np.testing.assert_array_equal(new_env.obs_rms.mean, env.obs_rms.mean)
    np.testing.assert_array_equal(new_env.ret_rms.var, env.ret_rms.var)
    resumed.learn(100, reset_num_timesteps=False)
    assert resumed.num_timesteps == model.num_timesteps + 100
    new_env.close()


def test_box2d_environments_start_fresh_episodes(tmp_path: Path) -> None:
    """Their EzPickle would keep only the arguments of the constructor: an environment that was never reset."""
    model = EpisodicA2C("MlpPolicy", make_vec_env("LunarLander-v3", 1, seed=1), seed=0, device="cpu").learn(300)
    with pytest.warns(UserWarning, match=r"cannot be part of the checkpoint \(.*Swig.*\)"):
        save_checkpoint(model, tmp_path / "checkpoint.zip")
    resumed = load_checkpoint(tmp_path / "checkpoint.zip", env=make_vec_env("LunarLander-v3", 1, seed=1), device="cpu")
    resumed.learn(300, reset_num_timesteps=False)
    assert resumed._n_updates > model._n_updates


def test_fresh_episodes_are_not_those_of_the_first_start(tmp_path: Path) -> None:
    model = make_model("plain", 1)
    first_observation = model.env.reset()
    model.learn(200)
    save_checkpoint(model, tmp_path / "checkpoint.zip")
    observations = []
    for _ in range(2):
        resumed = load_checkpoint(tmp_path / "checkpoint.zip", env=cartpole(1), device="cpu")
        observations.append(resumed.env.reset())
    # But the same ones whenever this checkpoint is resumed
    np.testing.assert_array_equal(*observations)
    assert not np.array_equal(observations[0], first_observation)


@pytest.mark.parametrize("saved_with", [True, False])
def test_vec_normalize_must_be_there_again(saved_with: bool, tmp_path: Path) -> None:
    make_env = {True: normalized_cartpole, False: cartpole}
    model = EpisodicA2C("MlpPolicy", make_env[saved_with](1), device="cpu").learn(50)
    save_checkpoint(model, tmp_path / "checkpoint.zip")
    with pytest.raises(ValueError, match=r"VecNormalize.*other numbers"):
        load_checkpoint(tmp_path / "checkpoint.zip", env=make_env[not saved_with](1))


def test_other_spaces_are_refused(tmp_path: Path) -> None:
    save_checkpoint(make_model("plain", 1).learn(50), tmp_path / "checkpoint.zip")
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        load_checkpoint(tmp_path / "checkpoint.zip", env=make_vec_env("Acrobot-v1"))


# ---------------------------------------------------------------------- a folder of checkpoints


def test_callback_keeps_the_last_ones(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = make_model("plain", 1)
    callback = ResumableCheckpointCallback(tmp_path / "a" / "b", save_freq=100, keep=2, verbose=2)
    model.learn(1_000, callback=callback)
    names = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert len(names) == 2
    assert names[-1].endswith("_1000_steps.zip")
    written = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Saved checkpoint")]
    steps = [int(line.split("_")[-2]) for line in written]
    # At the first update at least 100 steps after the last one; the episodes of CartPole are shorter than that here
    assert len(steps) >= 5 and all(100 <= later - earlier < 300 for earlier, later in pairwise(steps[:-1]))
    # Another training in the same folder: its first steps are newer than the last of the one before
    make_model("plain", 1).learn(200, callback=callback)
    resumed = resume(tmp_path / "a" / "b", device="cpu")
    assert resumed.num_timesteps == 200


def test_a_finished_training_is_resumed_at_its_end(tmp_path: Path) -> None:
    model = make_model("plain", 3).learn(500, callback=ResumableCheckpointCallback(tmp_path))
    resumed = resume(tmp_path, device="cpu")
    assert resumed.num_timesteps >= 500
    resumed.learn(500 - resumed.num_timesteps, reset_num_timesteps=False, callback=ResumableCheckpointCallback(tmp_path))
    assert_same(state_of(resumed), {**state_of(model), "counters": state_of(resumed)["counters"]})
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("save_freq, keep", [(0, 3), (10, 0), (10, 1.5)])
def test_callback_arguments(save_freq: int, keep: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is (0|1\.5)\. It must be an integer >= 1"):
        ResumableCheckpointCallback(tmp_path, save_freq=save_freq, keep=keep)


def test_callback_refuses_other_algorithms(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not for A2C.*CheckpointCallback"):
        A2C("MlpPolicy", "CartPole-v1").learn(10, callback=ResumableCheckpointCallback(tmp_path))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("policy.pth")
    data = bytearray(path.read_bytes())
    data[info.header_offset + info.file_size // 2] ^= 1
    path.write_bytes(bytes(data))


def flip_in_directory(path: Path, offset: int, mask: int) -> None:
    """Flip bits after the members, in the zip's directory."""
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    data = bytearray(path.read_bytes())
    data[start + offset] ^= mask
    path.write_bytes(bytes(data))


def pretend_encryption(path: Path) -> None:
    flip_in_directory(path, 8, 1)


def pretend_compression(path: Path) -> None:
    flip_in_directory(path, 10, zipfile.ZIP_DEFLATED)


def misplace_directory(path: Path) -> None:
    data = bytearray(path.read_bytes())
    # The last record says where the directory begins. The first member is then sought before the beginning of the file
    start = int.from_bytes(data[-6:-2], "little")
    data[-6:-2] = (start + 8).to_bytes(4, "little")
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def put_another_zip_there(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("holiday.jpg", b"sunset")


DAMAGES = [truncate, flip_a_bit, empty, put_another_zip_there]


@pytest.mark.parametrize("damage", [*DAMAGES, pretend_encryption, pretend_compression, misplace_directory])
def test_a_damaged_checkpoint_costs_one_checkpoint(damage: Callable[[Path], None], tmp_path: Path) -> None:
    assert resume(tmp_path / "missing") is None
    model = make_model("plain", 1)
    model.learn(600, callback=ResumableCheckpointCallback(tmp_path, save_freq=200))
    paths = sorted(tmp_path.iterdir())
    damage(paths[-1])
    with pytest.raises(ValueError, match=r"is damaged|is no checkpoint"):
        load_checkpoint(paths[-1])
    with pytest.warns(UserWarning, match=r"(is damaged|is no checkpoint).*Trying the one before"):
        resumed = resume(tmp_path, device="cpu")
    assert f"_{resumed.num_timesteps}_steps" in paths[-2].name
    resumed.learn(600 - resumed.num_timesteps, reset_num_timesteps=False)
    assert_same(state_of(resumed)["parameters"], state_of(model)["parameters"])
    for path in paths[:-1]:
        damage(path)
    with pytest.raises(ValueError, match=r"All \d+ checkpoints .* are damaged"), pytest.warns(UserWarning):
        resume(tmp_path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_zips_of_save_are_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    make_model("plain", 1).save(tmp_path / "model")
    damage(tmp_path / "model.zip")
    with pytest.raises((ValueError, AssertionError), match=r"wasn't a zip-file|No data found"):
        EpisodicA2C.load(tmp_path / "model")


def test_parameters_alone_load_without_unpickling(tmp_path: Path) -> None:
    """As the docstring of `load_checkpoint` says of files that are not trusted."""
    model = make_model("plain", 1).learn(100)
    save_checkpoint(model, tmp_path / "checkpoint.zip")
    with zipfile.ZipFile(tmp_path / "checkpoint.zip") as archive, archive.open("policy.pth") as file:
        parameters = th.load(file, weights_only=True)
    other = make_model("plain", 1)
    other.policy.load_state_dict(parameters)
    assert_same(other.policy.state_dict(), model.policy.state_dict())


def test_tensors_of_an_environment_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    class TensorEnv(TargetEnv):
        def __init__(self) -> None:
            super().__init__()
            self.tensor = self.same_tensor = th.arange(3.0)

        def step(self, action: Any) -> Any:
            self.tensor += 1
            return super().step(action)

    model = EpisodicA2C("MlpPolicy", DummyVecEnv([lambda: Monitor(TensorEnv())]), device="cpu").learn(17)
    save_checkpoint(model, tmp_path / "checkpoint.zip")
    resumed = load_checkpoint(tmp_path / "checkpoint.zip", device="cpu")
    (tensor,) = resumed.env.get_attr("tensor")
    assert tensor.tolist() == [17.0, 18.0, 19.0]
    assert resumed.env.get_attr("same_tensor")[0] is tensor


def test_a_signal_while_the_archive_is_deleted_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python ignores what is raised in ``__del__``, which the archive has."""
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", seed=0).learn(100)
    delete = zipfile.ZipFile.__del__

    def interrupted_delete(archive: zipfile.ZipFile) -> None:
        signal.raise_signal(signal.SIGINT)
        delete(archive)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(zipfile.ZipFile, "__del__", interrupted_delete)
    try:
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(model, tmp_path / "model")
    finally:
        monkeypatch.undo()
        signal.signal(signal.SIGINT, handler)
    assert load_checkpoint(tmp_path / "model").num_timesteps == 100
