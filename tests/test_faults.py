"""Whatever breaks, for real: a clear error, no hang, the parameters as after the last update, and a model that trains on."""

import io
import os
import pickle
import resource
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize
from torch import nn

from sb3_episodic_a2c import (
    EpisodicA2C,
    MaskableEpisodicA2C,
    RecurrentEpisodicA2C,
    ResumableCheckpointCallback,
    as_vec_env,
    load_checkpoint,
    resume,
    save_checkpoint,
)
from sb3_episodic_a2c.guards.workers import base_env
from tests.envs import ACTION_SPACES, OBSERVATION_SPACES, TargetEnv, arguments_of
from tests.processes import PATIENCE
from tests.test_checkpoints import DAMAGES, assert_same

pytestmark = pytest.mark.filterwarnings("ignore:No episode ended")


for_all = pytest.mark.parametrize("algorithm", [EpisodicA2C, MaskableEpisodicA2C, RecurrentEpisodicA2C])


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A test that takes longer than this hangs: better that it fails."""

    def fail(*_: Any) -> None:
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def trained_state(model: EpisodicA2C) -> dict[str, Any]:
    """What an update changes."""
    return deepcopy(
        {
            "parameters": model.policy.state_dict(),
            "optimizer": model.policy.optimizer.state_dict(),
            "statistics": model.return_statistics,
            "n_updates": model._n_updates,
        }
    )


class LastUpdate(BaseCallback):
    """Keeps the state after the last update, and calls something at a step."""

    def __init__(self, at_step: int = 0, call: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.at_step, self.call = at_step, call

    def _on_rollout_start(self) -> None:
        self.state = trained_state(self.model)

    def _on_step(self) -> bool:
        if self.call is not None and self.n_calls == self.at_step:
            self.call()
        return True


def assert_usable(model: EpisodicA2C, last_update: LastUpdate, folder: Path, env: Any = None) -> None:
    """The model is as after the last update, can be saved and predict, and learns on from a reset of the environments."""
    assert_same(trained_state(model), last_update.state)
    assert model._n_updates > 0, "nothing to lose"
    model.save(folder / "model")
    loaded = type(model).load(folder / "model", device="cpu")
    assert_same(loaded.policy.state_dict(), model.policy.state_dict())
    observation = model.observation_space.sample()
    np.testing.assert_array_equal(*(each.predict(observation, deterministic=True)[0] for each in (model, loaded)))

    if env is not None:
        model.set_env(env)
    assert model._last_obs is None
    assert model.rollout_buffer.running_steps.sum() == model.rollout_buffer.n_episodes == 0
    n_updates, starts = model._n_updates, EpisodeStarts()
    model.learn(60, reset_num_timesteps=False, callback=starts)
    assert model._n_updates > n_updates
    assert starts.first_is_a_start
    assert all(np.isfinite(parameter.detach()).all() for parameter in model.policy.parameters())


class EpisodeStarts(BaseCallback):
    def _on_training_start(self) -> None:
        self.first_is_a_start = bool(self.model._last_episode_starts.all())

    def _on_step(self) -> bool:
        return True


class BrokenEnvironment(Exception):
    """An error that only an environment raises."""


class FragileEnv(TargetEnv):
    """Episodes of 5 to 9 steps. It breaks once: at a step, or at a reset, counted over its life."""

    def __init__(self, step: int = 0, reset: int = 0, what: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.breaks_at = {"step": step, "reset": reset}
        self.counts = {"step": 0, "reset": 0}
        self.what = what

    def _count(self, name: str) -> None:
        self.counts[name] += 1
        if self.counts[name] == self.breaks_at[name]:
            if self.what is None:
                raise BrokenEnvironment(f"broke in {name}")
            self.what()

    def reset(self, **kwargs: Any) -> Any:
        self._count("reset")
        result = super().reset(**kwargs)
        self.episode_length = int(self.np_random.integers(5, 10))
        return result

    def step(self, action: Any) -> Any:
        self._count("step")
        return super().step(action)


def fragile_model(
    algorithm: type[EpisodicA2C] = EpisodicA2C, n_envs: int = 3, index: int = 1, vec_env: Any = DummyVecEnv, **breaks: Any
) -> EpisodicA2C:
    env = vec_env([lambda i=i: FragileEnv(**(breaks if i == index else {})) for i in range(n_envs)])
    policy, policy_kwargs = arguments_of(algorithm, "MlpPolicy", {"net_arch": [8]})
    return algorithm(policy, VecNormalize(VecMonitor(env)), seed=0, device="cpu", policy_kwargs=policy_kwargs)


# ---------------------------------------------------------------------- environments that raise


def in_turn(env_fns: Any) -> Any:
    return as_vec_env(SyncVectorEnv(env_fns))


def in_processes(env_fns: Any) -> Any:
    return as_vec_env(AsyncVectorEnv(env_fns))


@for_all
@pytest.mark.parametrize("place", ["step", "reset"])
@pytest.mark.parametrize("vec_env", [DummyVecEnv, in_turn])
def test_environment_raises(algorithm: type[EpisodicA2C], place: str, vec_env: Any, tmp_path: Path) -> None:
    model = fragile_model(algorithm, vec_env=vec_env, **{place: 40 if place == "step" else 6})
    last_update = LastUpdate()
    with pytest.raises(BrokenEnvironment, match=f"broke in {place}") as raised:
        model.learn(1_000, callback=last_update)
    (note,) = raised.value.__notes__
    assert "Raised by environment 1 at step" in note
    assert f"after {model.num_timesteps} env steps" in note and f"after update {model._n_updates}" in note
    assert_usable(model, last_update, tmp_path)


def test_the_step_named_is_the_one_that_broke() -> None:
    model = fragile_model(step=23)
    lengths: list[int] = []

    class Lengths(BaseCallback):
        def _on_step(self) -> bool:
            if self.locals["dones"][1]:
                lengths.append(self.locals["infos"][1]["episode"]["l"])
            return True

    with pytest.raises(BrokenEnvironment) as raised:
        model.learn(1_000, callback=Lengths())
    # 22 steps were made before, counted from 0 within the episode
    assert f"environment 1 at step {22 - sum(lengths)} of its episode" in raised.value.__notes__[0]


def test_environment_raises_in_the_first_reset() -> None:
    model = fragile_model(reset=1)
    with pytest.raises(BrokenEnvironment, match="broke in reset") as raised:
        model.learn(100)
    assert "environment 1 at step 0" in raised.value.__notes__[0]
    model.learn(100)
    assert model._n_updates > 0


def test_a_callback_that_raises_blames_no_environment(tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyError("callback")

    model, last_update = fragile_model(), LastUpdate(30, fail)
    with pytest.raises(KeyError) as raised:
        model.learn(1_000, callback=last_update)
    assert not hasattr(raised.value, "__notes__")
    assert_usable(model, last_update, tmp_path)


# ---------------------------------------------------------------------- worker processes


# Starts at once. SB3's default takes seconds, as each process imports torch
forked = partial(SubprocVecEnv, start_method="fork")


@pytest.mark.parametrize(
    "algorithm, vec_env",
    [
        (EpisodicA2C, partial(SubprocVecEnv, start_method="forkserver")),
        (EpisodicA2C, forked),
        (MaskableEpisodicA2C, forked),
        (RecurrentEpisodicA2C, forked),
        (EpisodicA2C, in_processes),
    ],
)
def test_a_worker_is_killed(algorithm: type[EpisodicA2C], vec_env: Any, tmp_path: Path) -> None:
    model = fragile_model(algorithm, vec_env=vec_env, n_envs=2)
    env: Any = model.env
    workers: Any = base_env(env)
    processes = workers.processes
    # With fork, worker 0 holds the other end of the pipe of worker 1 as well
    last_update = LastUpdate(30, lambda: os.kill(processes[1].pid, signal.SIGKILL))
    with pytest.raises(RuntimeError, match=r"process of environment 1 was killed by SIGKILL, at step \[.*set_env"):
        model.learn(1_000, callback=last_update)
    assert not any(process.is_alive() for process in processes)
    env.close()
    # The old environments do not come back
    with pytest.raises(RuntimeError, match=r"cannot be reset.*`model\.set_env\(env\)`"):
        model.learn(100, reset_num_timesteps=False)
    assert_usable(model, last_update, tmp_path, VecNormalize(VecMonitor(DummyVecEnv([FragileEnv] * 2))))


@for_all
@pytest.mark.parametrize("place", ["step", "reset"])
def test_an_environment_raises_in_a_worker(algorithm: type[EpisodicA2C], place: str, tmp_path: Path) -> None:
    model = fragile_model(algorithm, vec_env=forked, index=2, **{place: 40 if place == "step" else 6})
    last_update = LastUpdate()
    with pytest.raises(RuntimeError, match=r"process of environment 2 ended with exit code 1 .*printed above"):
        model.learn(1_000, callback=last_update)
    assert_usable(model, last_update, tmp_path, VecNormalize(VecMonitor(DummyVecEnv([FragileEnv] * 3))))


@pytest.mark.parametrize("place", ["step", "reset"])
@pytest.mark.filterwarnings("ignore:.*ERROR:")
def test_an_environment_raises_in_a_worker_of_gymnasium(place: str, tmp_path: Path) -> None:
    model = fragile_model(vec_env=in_processes, **{place: 40 if place == "step" else 6})
    last_update = LastUpdate()
    with pytest.raises(BrokenEnvironment, match=f"broke in {place}") as raised:
        model.learn(1_000, callback=last_update)
    (note,) = raised.value.__notes__
    assert "Raised by environment 1 at step" in note and "`model.set_env(env)`" in note
    with pytest.raises(RuntimeError, match=r"cannot be reset.*`model\.set_env\(env\)`"):
        model.learn(100, reset_num_timesteps=False)
    assert_usable(model, last_update, tmp_path, VecNormalize(VecMonitor(DummyVecEnv([FragileEnv] * 3))))


class SlowEnv(FragileEnv):
    def step(self, action: Any) -> Any:
        time.sleep(0.02)
        _, *rest = super().step(action)
        # Tells the step of the episode
        return np.full(3, 0.1 * self.n_steps, np.float32), *rest

    def reset(self, **kwargs: Any) -> Any:
        super().reset(**kwargs)
        return np.zeros(3, np.float32), {}


class CtrlCWhileWorkersStep(LastUpdate):
    timer: threading.Timer | None = None

    def _on_step(self) -> bool:
        # No episode has ended, so no update comes before the next step
        if self.timer is None and self.n_calls >= 20 and not self.locals["dones"].any():
            self.timer = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))
            self.timer.start()
        return True


def test_ctrl_c_while_workers_step(tmp_path: Path) -> None:
    """Their answers to the interrupted step must not be taken for answers to the reset."""
    env = forked([SlowEnv] * 2)
    model = EpisodicA2C("MlpPolicy", env, seed=0, device="cpu", policy_kwargs={"net_arch": [8]})
    for _ in range(3):
        last_update = CtrlCWhileWorkersStep()
        with pytest.raises(KeyboardInterrupt):
            model.learn(100_000, callback=last_update)
        assert_same(trained_state(model), last_update.state)

        class Observations(BaseCallback):
            def _on_training_start(self) -> None:
                self.seen = [np.array(self.model._last_obs)]

            def _on_step(self) -> bool:
                self.seen.append(self.locals["new_obs"])
                return True

        observations = Observations()
        model.learn(8, reset_num_timesteps=False, callback=observations)
        np.testing.assert_allclose(np.array(observations.seen)[:, 0, 0], [0.0, 0.1, 0.2, 0.3, 0.4], atol=1e-6)
    assert model._n_updates > 0
    env.close()


def test_ctrl_c_between_two_bytes_of_an_answer() -> None:
    """A message is its length and its content. Ctrl-C comes when only the length has been read."""
    env = forked([FragileEnv] * 2)
    model = EpisodicA2C("MlpPolicy", env, seed=0, device="cpu", policy_kwargs={"net_arch": [8]})

    def read_the_length() -> None:
        env.step_async(np.zeros(2, np.int64))
        os.read(env.remotes[1].fileno(), 4)
        press_ctrl_c()

    last_update = LastUpdate(30, read_the_length)
    with pytest.raises(KeyboardInterrupt):
        model.learn(1_000, callback=last_update)
    n_updates = model._n_updates
    model.learn(100, reset_num_timesteps=False)
    assert model._n_updates > n_updates > 0
    env.close()


# ---------------------------------------------------------------------- Ctrl-C


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    # Python acts on it at one of the next instructions
    for _ in range(100):
        pass


@for_all
@pytest.mark.parametrize("place", ["step", "callback", "forward", "gradient", "optimizer"])
def test_ctrl_c(algorithm: type[EpisodicA2C], place: str, tmp_path: Path) -> None:
    model = fragile_model(algorithm, step=40 if place == "step" else 0, what=press_ctrl_c)
    last_update = LastUpdate(40, press_ctrl_c if place == "callback" else None)
    value_net = model.policy.value_net

    def press_in_update_4(*_: Any) -> None:
        if model._n_updates == 3 and (place != "forward" or th.is_grad_enabled()):
            press_ctrl_c()

    if place == "forward":
        hook = value_net.register_forward_hook(press_in_update_4)
    elif place == "gradient":
        hook = value_net.weight.register_hook(press_in_update_4)
    elif place == "optimizer":
        hook = model.policy.optimizer.register_step_pre_hook(press_in_update_4)
    with pytest.raises(KeyboardInterrupt):
        model.learn(1_000, callback=last_update)
    if place in ("forward", "gradient", "optimizer"):
        hook.remove()
    if place == "optimizer":
        # The step is made as a whole, and counted
        assert model._n_updates == 4
        last_update.state = trained_state(model)
    elif place in ("forward", "gradient"):
        assert model._n_updates == 3
    assert_usable(model, last_update, tmp_path)


class Terminated(Exception):
    """What the SIGTERM handler of a script raises."""


@for_all
@pytest.mark.parametrize("and_ctrl_c", [False, True])
def test_sigterm_that_python_handles(algorithm: type[EpisodicA2C], and_ctrl_c: bool, tmp_path: Path) -> None:
    """Job schedulers send it. It waits for the step of the optimizer as Ctrl-C does, even where both come at once."""

    def terminate(*_: Any) -> None:
        raise Terminated

    def interrupt(*_: Any) -> None:
        if model._n_updates == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            if and_ctrl_c:
                press_ctrl_c()

    model, last_update = fragile_model(algorithm), LastUpdate()
    hook = model.policy.optimizer.register_step_pre_hook(interrupt)
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with pytest.raises(KeyboardInterrupt if and_ctrl_c else Terminated):
            model.learn(1_000, callback=last_update)
        assert signal.getsignal(signal.SIGTERM) is terminate
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    hook.remove()
    # The step is made as a whole, and counted
    assert model._n_updates == 4
    last_update.state = trained_state(model)
    assert_usable(model, last_update, tmp_path)


@for_all
def test_ctrl_c_at_random_moments(algorithm: type[EpisodicA2C], tmp_path: Path) -> None:
    """A timer, so that it comes between any two instructions."""
    rng = np.random.default_rng(0)
    model = fragile_model(algorithm, n_envs=2)
    model.learn(50)
    for _ in range(15):
        last_update = LastUpdate()
        # It may come before a rollout is begun
        last_update.state = trained_state(model)
        pressed = threading.Timer(float(rng.uniform(0.01, 0.15)), os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            # In here, as it may come before the timer's thread has said that it runs
            pressed.start()
            model.learn(10**7, callback=last_update, reset_num_timesteps=False)
        if model._n_updates == last_update.state["n_updates"]:
            assert_same(trained_state(model), last_update.state)
        else:
            # It came between the step of the optimizer and the next rollout
            assert model._n_updates == last_update.state["n_updates"] + 1
    last_update.state = trained_state(model)
    assert_usable(model, last_update, tmp_path)


@for_all
def test_ctrl_c_while_gradients_are_off(algorithm: type[EpisodicA2C], tmp_path: Path) -> None:
    """As it may come between the first instruction of `no_grad` and the block."""

    def press() -> None:
        th.set_grad_enabled(False)
        press_ctrl_c()

    model, last_update = fragile_model(algorithm), LastUpdate(at_step=200, call=press)
    try:
        with pytest.raises(KeyboardInterrupt):
            model.learn(10**6, callback=last_update)
        assert th.is_grad_enabled()
    finally:
        th.set_grad_enabled(True)
    assert_usable(model, last_update, tmp_path)


@for_all
def test_ctrl_c_while_saving(algorithm: type[EpisodicA2C]) -> None:
    """torch turns a Ctrl-C while it writes into a RuntimeError."""

    class Interrupted(io.BytesIO):
        def write(self, data: Any) -> int:
            press_ctrl_c()
            return super().write(data)

    model, file = fragile_model(algorithm), Interrupted()
    with pytest.raises(KeyboardInterrupt):
        model.save(file)
    loaded = algorithm.load(io.BytesIO(file.getvalue()), device="cpu")
    assert_same(loaded.policy.state_dict(), model.policy.state_dict())


def test_training_in_a_thread() -> None:
    """Only the main thread may handle signals, and only it is interrupted."""
    model = fragile_model()
    thread = threading.Thread(target=model.learn, args=(100,))
    thread.start()
    thread.join()
    assert model.num_timesteps == 102
    assert model._n_updates > 0


# ---------------------------------------------------------------------- numbers


@for_all
@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("place", ["reward", "observation"])
@pytest.mark.parametrize("is_normalized", [False, True])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_numbers_that_are_not_finite(
    algorithm: type[EpisodicA2C], place: str, number: float, is_normalized: bool, tmp_path: Path
) -> None:
    class NotFinite(FragileEnv):
        def step(self, action: Any) -> Any:
            observation, reward, *rest = super().step(action)
            if self.counts["step"] == 40:
                reward, observation = (number, observation) if place == "reward" else (reward, observation * number)
            return observation, reward, *rest

    env: Any = DummyVecEnv([FragileEnv, NotFinite, FragileEnv])
    if is_normalized:
        # One number spoils its statistics, and with them those of all environments
        env = VecNormalize(env)
    policy, policy_kwargs = arguments_of(algorithm, "MlpPolicy", {})
    model = algorithm(policy, env, seed=0, device="cpu", policy_kwargs=policy_kwargs)
    last_update = LastUpdate()
    with pytest.raises(ValueError, match=r"[eE]nvironment 1 .*step \d"):
        model.learn(1_000, callback=last_update)
    if is_normalized:
        assert (
            np.isfinite([env.obs_rms.mean, env.obs_rms.var]).all() and np.isfinite([env.ret_rms.mean, env.ret_rms.var]).all()
        )
    assert_usable(model, last_update, tmp_path)


class NormalizedExtractor(FlattenExtractor):
    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space)
        self.norm = nn.BatchNorm1d(self.features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.norm(super().forward(observations))


def test_a_refused_update_leaves_batch_norm_as_it_was() -> None:
    policy_kwargs = {"features_extractor_class": NormalizedExtractor}
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", policy_kwargs=policy_kwargs, seed=0, device="cpu").learn(200)
    before = deepcopy(model.policy.state_dict())
    # The loss is finite, its gradient is not
    model.policy.value_net.weight.register_hook(lambda gradient: gradient * np.nan)
    with pytest.raises(ValueError, match="not finite"):
        model.learn(200, reset_num_timesteps=False)
    assert_same(model.policy.state_dict(), before)


class OwnTraining(EpisodicA2C):
    """A `train` that knows nothing of the transaction."""

    def train(self) -> None:
        if not self.rollout_buffer.size():
            return
        for samples in self.rollout_buffer.get():
            values, log_prob, _ = self.policy.evaluate_actions(samples.observations, samples.actions)
            loss = (values.flatten() - samples.returns).square().sum() - log_prob.sum()
            self.policy.optimizer.zero_grad()
            loss.backward()
            self.policy.optimizer.step()
        self._n_updates += 1


def test_ctrl_c_after_an_own_train() -> None:
    model = OwnTraining("MlpPolicy", "CartPole-v1", seed=0, device="cpu").learn(300)
    # The critic is in the units that it was trained in
    assert model.return_statistics.count > 0 and model.rollout_buffer.next_statistics is None
    before = trained_state(model)
    with pytest.raises(KeyboardInterrupt):
        model.learn(100, callback=LastUpdate(1, lambda: os.kill(os.getpid(), signal.SIGINT)), reset_num_timesteps=False)
    assert_same(trained_state(model), before)


class NanEnv(TargetEnv):
    """One number of an observation is NaN at a step, counted over its life. It may not be acted upon."""

    def __init__(self, action_space: spaces.Space, step: int = 0) -> None:
        super().__init__(action_space=action_space, episode_length=7)
        self.nan_at = step
        self.n_life_steps = 0

    def step(self, action: Any) -> Any:
        self.n_life_steps += 1
        observation, *rest = super().step(action)
        if self.n_life_steps == self.nan_at:
            observation[1] = np.nan
        return observation, *rest


NOT_FINITE_CASES = [
    (algorithm, space, actor)
    for algorithm, spaces_, actors in [
        (EpisodicA2C, ["box", "discrete", "multi_discrete", "multi_binary"], ["numpy", "torch"]),
        (MaskableEpisodicA2C, ["discrete", "multi_discrete", "multi_binary"], ["numpy", "torch"]),
        # It samples by itself, without an actor
        (RecurrentEpisodicA2C, ["box", "discrete", "multi_discrete", "multi_binary"], ["auto"]),
    ]
    for space in spaces_
    for actor in actors
]


def nan_model(algorithm: type[EpisodicA2C], space: str, actor: Any, step: int = 0) -> EpisodicA2C:
    env = DummyVecEnv([lambda i=i: NanEnv(ACTION_SPACES[space], step if i == 1 else 0) for i in range(3)])
    policy, policy_kwargs = arguments_of(algorithm, "MlpPolicy", {"net_arch": [8]})
    return algorithm(policy, env, seed=0, device="cpu", actor=actor, policy_kwargs=policy_kwargs)


@pytest.mark.parametrize("algorithm, space, actor", NOT_FINITE_CASES)
def test_no_action_is_taken_on_an_observation_that_is_not_finite(
    algorithm: type[EpisodicA2C], space: str, actor: str, tmp_path: Path
) -> None:
    model = nan_model(algorithm, space, actor, step=40)
    last_update = LastUpdate()
    # 40 = 5 * 7 + 5
    with pytest.raises(ValueError, match=r"^Environment 1 .* not finite at step 5 of its episode.*observation=\[.* nan"):
        model.learn(1_000, callback=last_update)
    assert model.get_env().get_attr("n_life_steps") == [40] * 3
    assert_usable(model, last_update, tmp_path)


@for_all
def test_an_observation_of_a_reset_that_is_not_finite(algorithm: type[EpisodicA2C], tmp_path: Path) -> None:
    class NanReset(FragileEnv):
        def reset(self, **kwargs: Any) -> Any:
            observation, info = super().reset(**kwargs)
            return observation * (np.nan if self.counts["reset"] == 6 else 1.0), info

    policy, policy_kwargs = arguments_of(algorithm, "MlpPolicy", {"net_arch": [8]})
    env = DummyVecEnv([FragileEnv, NanReset, FragileEnv])
    model, last_update = algorithm(policy, env, seed=0, device="cpu", policy_kwargs=policy_kwargs), LastUpdate()
    with pytest.raises(ValueError, match=r"^Environment 1 .* not finite at step 0 of its episode"):
        model.learn(1_000, callback=last_update)
    assert_usable(model, last_update, tmp_path)


@for_all
# tanh makes a finite value of a single infinity
@pytest.mark.parametrize("numbers", [np.nan, np.inf, np.array([1.0, np.inf, 1.0], np.float32)])
def test_a_last_observation_that_is_not_finite(
    algorithm: type[EpisodicA2C], numbers: float | np.ndarray, tmp_path: Path
) -> None:
    """No action is taken on it, but after a time limit its value counts."""

    class NotFiniteAtTheEnd(TargetEnv):
        n_life_steps = 0

        def step(self, action: Any) -> Any:
            self.n_life_steps += 1
            observation, *rest = super().step(action)
            return observation * (numbers if self.n_life_steps == 20 else 1.0), *rest

    policy, policy_kwargs = arguments_of(algorithm, "MlpPolicy", {"net_arch": [8]})
    env = DummyVecEnv([lambda: TargetEnv(truncates=True), lambda: NotFiniteAtTheEnd(truncates=True)])
    model, last_update = algorithm(policy, env, seed=0, device="cpu", policy_kwargs=policy_kwargs), LastUpdate()
    with pytest.raises(ValueError, match=r"[eE]nvironment 1 .*step 4 of its 5.*value after the last step nan"):
        model.learn(1_000, callback=last_update)
    assert_usable(model, last_update, tmp_path)


def test_which_part_of_a_dict_is_not_finite() -> None:
    class NanDictEnv(TargetEnv):
        def step(self, action: Any) -> Any:
            observation, *rest = super().step(action)
            return {**observation, "vector": observation["vector"] * np.nan}, *rest

    model = EpisodicA2C("MultiInputPolicy", NanDictEnv(OBSERVATION_SPACES["dict"]), device="cpu")
    with pytest.raises(ValueError, match=r"Environment 0 .* not finite at step 1 of its episode.*: vector=\[nan nan nan\]"):
        model.learn(100)


@pytest.mark.parametrize("algorithm, space, actor", NOT_FINITE_CASES)
def test_a_parameter_that_is_not_finite_blames_no_environment(
    algorithm: type[EpisodicA2C], space: str, actor: str, tmp_path: Path
) -> None:
    model = nan_model(algorithm, space, actor)
    name = "log_std" if space == "box" else "action_net.bias"
    parameter = model.policy.get_parameter(name)

    def spoil() -> None:
        spoilt_at.append(model.num_timesteps)
        parameter.data[0] = np.nan

    spoilt_at: list[int] = []
    last_update = LastUpdate(25, spoil)
    with pytest.raises(ValueError, match=f"^The parameter '{name}' of the policy is not finite"):
        model.learn(1_000, callback=last_update)
    assert spoilt_at == [75]
    # No further step was made
    assert model.num_timesteps == 75
    parameter.data.copy_(last_update.state["parameters"][name])
    assert_usable(model, last_update, tmp_path)


@pytest.mark.parametrize("algorithm, space, actor", NOT_FINITE_CASES)
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
def test_numbers_too_large_for_the_policy(algorithm: type[EpisodicA2C], space: str, actor: str) -> None:
    """The observations and the parameters are finite, what the policy makes of them is not."""
    model = nan_model(algorithm, space, actor)
    for parameter in model.policy.parameters():
        parameter.data.fill_(3e38)
    # For a Bernoulli distribution, infinite logits mean certainty
    with pytest.raises(ValueError, match=r"finite.*are too large.*`learning_rate`|^The gradient of update 1"):
        model.learn(100)
    assert model._n_updates == 0


@pytest.mark.parametrize("size", [1.0, 1e30])
@pytest.mark.parametrize("actor", ["numpy", "torch"])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_large_but_finite_numbers_are_acted_upon(actor: str, size: float) -> None:
    """Their squares overflow, which the NumPy actor looks at first."""
    model = nan_model(EpisodicA2C, "discrete", actor)
    model.policy.get_parameter("action_net.bias").data.copy_(th.tensor([0.0, size, 0.0]))
    actions: list[int] = []
    model.learn(6, callback=lambda locals_, _: actions.extend(locals_["actions"]) or True)
    assert size == 1.0 or actions == [1] * 6


@for_all
def test_a_loss_that_is_not_finite(algorithm: type[EpisodicA2C], tmp_path: Path) -> None:
    """The critic's scale, which had moved before the update, is put back as well."""
    model = fragile_model(algorithm)
    last_update = LastUpdate()
    hook = model.policy.value_net.register_forward_hook(
        lambda module, inputs, output: output * np.nan if model._n_updates == 3 and th.is_grad_enabled() else output
    )
    with pytest.raises(ValueError, match="gradient of update 4 is not finite"):
        model.learn(1_000, callback=last_update)
    hook.remove()
    assert_usable(model, last_update, tmp_path)


@for_all
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_learning_rate_that_is_not_finite(algorithm: type[EpisodicA2C], number: float, tmp_path: Path) -> None:
    """One step with it, and no parameter would be finite."""
    model = fragile_model(algorithm)
    last_update = LastUpdate()
    model.lr_schedule = lambda progress_remaining: number if model._n_updates == 3 else 1e-3 * progress_remaining
    with pytest.raises(
        ValueError, match=rf"`learning_rate` of update 4 is {number}, so.*returned {number} at progress_remaining=0\.\d"
    ):
        model.learn(1_000, callback=last_update)
    model.lr_schedule = lambda _: 1e-3
    assert_usable(model, last_update, tmp_path)


def test_a_refused_update_leaves_the_learning_rate_as_it_was() -> None:
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", learning_rate=lambda progress: 3e-3 * progress, device="cpu", seed=0)
    model.learn(200)
    before = trained_state(model)
    model.policy.value_net.weight.register_hook(lambda gradient: gradient * np.nan)
    with pytest.raises(ValueError, match="not finite"):
        model.learn(200)
    assert_same(trained_state(model), before)


# ---------------------------------------------------------------------- disk


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """Files cannot grow beyond a size, as on a disk that is full. SIGXFSZ is ignored by Python: write fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", [save_checkpoint, EpisodicA2C.save])
@pytest.mark.parametrize("size", [0, 3_000, 20_000])
def test_disk_is_full(write: Callable[..., None], size: int, tmp_path: Path, full_disk: Callable[[int], None]) -> None:
    model = fragile_model()
    model.learn(100)
    write(model, tmp_path / "model.zip")
    good = (tmp_path / "model.zip").read_bytes()
    assert len(good) > 20_000
    model.learn(100, reset_num_timesteps=False)
    before = trained_state(model)
    full_disk(size)
    with pytest.raises(OSError, match="File too large"):
        write(model, tmp_path / "model.zip")
    full_disk(resource.RLIM_INFINITY)
    # The file that was there is as it was, and no other file is left
    assert (tmp_path / "model.zip").read_bytes() == good
    assert len(list(tmp_path.iterdir())) == 1
    assert_same(trained_state(model), before)
    model.learn(100, reset_num_timesteps=False)
    write(model, tmp_path / "model.zip")
    loaded = load_checkpoint(tmp_path / "model.zip") if write is save_checkpoint else EpisodicA2C.load(tmp_path / "model.zip")
    assert_same(loaded.policy.state_dict(), model.policy.state_dict())


@for_all
def test_disk_is_full_in_the_midst_of_training(
    algorithm: type[EpisodicA2C], tmp_path: Path, full_disk: Callable[[int], None]
) -> None:
    model = fragile_model(algorithm)
    checkpoints = ResumableCheckpointCallback(tmp_path / "checkpoints", save_freq=100)
    last_update = LastUpdate(100, lambda: full_disk(3_000))
    with pytest.raises(OSError, match="model and earlier checkpoints are unharmed"):
        model.learn(1_000, callback=[last_update, checkpoints])
    full_disk(resource.RLIM_INFINITY)
    resumed = resume(tmp_path / "checkpoints", device="cpu")
    assert resumed is not None and 200 <= resumed.num_timesteps <= 300
    # The callback that failed runs after the one that keeps the state
    assert_usable(model, last_update, tmp_path)


def test_a_checkpoint_after_ctrl_c(tmp_path: Path) -> None:
    """RL Zoo calls the end of the training of its first callback then. The environments, stopped anywhere, are reset."""
    model = fragile_model()
    checkpoints = ResumableCheckpointCallback(tmp_path / "checkpoints", save_freq=10**6)
    last_update = LastUpdate(40, press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        model.learn(1_000, callback=[last_update, checkpoints])
    checkpoints.on_training_end()
    resumed = resume(tmp_path / "checkpoints", device="cpu")
    assert resumed is not None and resumed.num_timesteps == model.num_timesteps
    assert_usable(resumed, last_update, tmp_path)


# ---------------------------------------------------------------------- files


@for_all
@pytest.mark.parametrize("damage", [*DAMAGES, "network", "space", "algorithm"])
def test_files_that_do_not_fit_change_nothing(
    algorithm: type[EpisodicA2C], damage: Callable[[Path], None] | str, tmp_path: Path
) -> None:
    model = fragile_model(algorithm)
    model.learn(100)
    before = trained_state(model)
    path = tmp_path / "foreign.zip"
    policy, policy_kwargs = arguments_of(algorithm, "MlpPolicy", {"net_arch": [4 if damage == "network" else 8]})
    other: Any
    if damage == "algorithm":
        other = A2C("MlpPolicy", FragileEnv(), device="cpu")
    else:
        env = TargetEnv(OBSERVATION_SPACES["multi_binary" if damage == "space" else "box"])
        other = algorithm(policy, env, seed=7, device="cpu", policy_kwargs=policy_kwargs)
    other.save(path)
    if callable(damage):
        damage(path)
    # What they have in common would be loaded by SB3 before it notices
    with pytest.raises((ValueError, RuntimeError, AssertionError, zipfile.BadZipFile, pickle.UnpicklingError)):
        model.set_parameters(path)
    assert_same(trained_state(model), before)
    if damage != "network":
        with pytest.raises(
            (ValueError, AssertionError), match=r"wasn't a zip-file|No data|spaces do not match|a model of A2C|`policy`"
        ):
            algorithm.load(path, env=FragileEnv(), device="cpu")
    model.learn(60, reset_num_timesteps=False)
    assert model._n_updates > before["n_updates"]


def test_a_link_is_followed_and_folders_are_made(tmp_path: Path) -> None:
    model = fragile_model()
    (tmp_path / "here.zip").symlink_to(tmp_path / "a" / "b" / "there.zip")
    model.save(tmp_path / "here.zip")
    assert (tmp_path / "here.zip").is_symlink()
    EpisodicA2C.load(tmp_path / "a" / "b" / "there")
