"""Generalized advantages and value epochs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_episodic_a2c import EpisodicA2C, MaskableEpisodicA2C, RecurrentEpisodicA2C, load_checkpoint, save_checkpoint
from sb3_episodic_a2c.returns import EPSILON, discounted_returns, generalized_advantages, unstandardize
from tests.envs import OBSERVATION_SPACES, TargetEnv, vectorized
from tests.test_seams import parameters_of
from tests.variant_envs import make_random_envs

numbers = st.floats(-100, 100, width=32)


def test_an_episode_by_hand() -> None:
    """gamma 0.5 and lambda 0.5: the factor of the errors is 0.25."""
    advantages = generalized_advantages(np.array([1.0, 2.0, 3.0]), np.array([4.0, 2.0, 1.0]), 0.5, 0.5, terminal_value=8.0)
    # Errors: 1 + 1 - 4 = -2, 2 + 0.5 - 2 = 0.5, 3 + 4 - 1 = 6
    np.testing.assert_allclose(advantages, [-2 + 0.25 * 2.0, 0.5 + 0.25 * 6, 6.0])


@given(
    hnp.arrays(np.float32, st.integers(1, 30), elements=numbers), st.floats(0, 1), st.floats(0, 1), numbers, st.integers(0, 9)
)
def test_brute_force(rewards: np.ndarray, gamma: float, gae_lambda: float, terminal_value: float, seed: int) -> None:
    values = np.random.default_rng(seed).normal(0, 10, len(rewards))
    next_values = [*values[1:], terminal_value]
    deltas = [reward + gamma * after - value for reward, after, value in zip(rewards, next_values, values, strict=True)]
    expected = [
        sum((gamma * gae_lambda) ** k * delta for k, delta in enumerate(deltas[start:])) for start in range(len(rewards))
    ]
    advantages = generalized_advantages(rewards, values, gamma, gae_lambda, terminal_value)
    np.testing.assert_allclose(advantages, expected, rtol=1e-6, atol=1e-4)


@given(hnp.arrays(np.float32, st.integers(1, 30), elements=numbers), st.floats(0, 1), numbers)
def test_lambda_1_is_monte_carlo_and_0_the_error_of_one_step(rewards: np.ndarray, gamma: float, terminal_value: float) -> None:
    values = np.linspace(-5, 5, len(rewards))
    monte_carlo = discounted_returns(rewards, gamma, terminal_value) - values
    np.testing.assert_allclose(generalized_advantages(rewards, values, gamma, 1.0, terminal_value), monte_carlo, atol=1e-3)
    one_step = rewards + gamma * np.append(values[1:], terminal_value) - values
    np.testing.assert_allclose(generalized_advantages(rewards, values, gamma, 0.0, terminal_value), one_step, atol=1e-4)


class Watch(BaseCallback):
    """Reads the advantages before some updates, and checks them against the values that are logged there."""

    def __init__(self, read: bool = True) -> None:
        super().__init__()
        self.read = read
        self.n_checked = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        model, buffer = self.model, self.model.rollout_buffer  # type: ignore[attr-defined]
        if not self.read or not buffer.size():
            return
        units = buffer.next_statistics
        values = buffer.values[:, 0]
        raw = unstandardize(values.astype(float), units.mean, units.std) if units.count else values
        scale = units.std + EPSILON if units.count else 1.0
        start = 0
        for length, episode in zip(buffer.episode_lengths, buffer.episodes, strict=True):
            part = slice(start, start + length)
            expected = generalized_advantages(
                buffer.rewards[part, 0], raw[part], model.gamma, model.gae_lambda, episode.terminal_value
            )
            np.testing.assert_allclose(buffer.advantages[part, 0], expected / scale, rtol=1e-3, atol=1e-4)
            start += length
        self.n_checked += 1


SETTINGS: dict[str, Any] = {
    "carry": lambda **kw: EpisodicA2C("MlpPolicy", make_vec_env("CartPole-v1", 3), **kw),
    "discard": lambda **kw: EpisodicA2C("MlpPolicy", make_vec_env("CartPole-v1", 3), partial_episodes="discard", **kw),
    "raw": lambda **kw: EpisodicA2C("MlpPolicy", "CartPole-v1", standardize_returns=None, max_grad_norm=10.0, **kw),
    "time_limit": lambda **kw: EpisodicA2C("MlpPolicy", make_vec_env("Pendulum-v1", 2), batch_size=77, **kw),
    "normalized": lambda **kw: EpisodicA2C("MlpPolicy", VecNormalize(make_vec_env("Pendulum-v1", 2)), **kw),
    "shared": lambda **kw: EpisodicA2C("SharedMlpPolicy", "CartPole-v1", **kw),
    "torch": lambda **kw: EpisodicA2C("MlpPolicy", "CartPole-v1", actor="torch", **kw),
    "dict": lambda **kw: EpisodicA2C("MultiInputPolicy", vectorized(lambda _: TargetEnv(OBSERVATION_SPACES["dict"]), 2), **kw),
    "masked": lambda **kw: MaskableEpisodicA2C("MlpPolicy", make_random_envs(spaces.Discrete(4), 2), **kw),
    "recurrent": lambda **kw: RecurrentEpisodicA2C(
        "MlpLstmPolicy", make_vec_env("Pendulum-v1", 2), policy_kwargs={"lstm_hidden_size": 8}, **kw
    ),
    "shared_lstm": lambda **kw: RecurrentEpisodicA2C(
        "MlpLstmPolicy",
        "CartPole-v1",
        policy_kwargs={"lstm_hidden_size": 8, "shared_lstm": True, "enable_critic_lstm": False},
        **kw,
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_advantages_are_those_of_the_definition(setting: str) -> None:
    watch = Watch()
    model = SETTINGS[setting](gae_lambda=0.9, n_value_epochs=2, seed=0, device="cpu")
    before = parameters_of(model)
    model.learn(900, callback=watch)
    assert watch.n_checked > 0 and not th.equal(before, parameters_of(model))


@pytest.mark.parametrize("setting", SETTINGS)
def test_reading_advantages_changes_nothing(setting: str) -> None:
    read, not_read = (
        SETTINGS[setting](gae_lambda=0.9, n_value_epochs=1, seed=0, device="cpu").learn(900, callback=Watch(read))
        for read in (True, False)
    )
    th.testing.assert_close(parameters_of(read), parameters_of(not_read), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_resumed_bit_for_bit(setting: str, tmp_path: Path) -> None:
    whole = SETTINGS[setting](gae_lambda=0.95, n_value_epochs=2, value_learning_rate=1e-3, seed=0, device="cpu").learn(500)
    save_checkpoint(whole, tmp_path / "checkpoint")
    whole.learn(500, reset_num_timesteps=False)
    resumed = load_checkpoint(tmp_path / "checkpoint", device="cpu")
    assert (resumed.gae_lambda, resumed.n_value_epochs) == (0.95, 2)
    resumed.learn(500, reset_num_timesteps=False)
    assert th.equal(parameters_of(resumed), parameters_of(whole))


def test_value_epochs_train_the_critic_alone_and_lower_its_loss() -> None:
    losses: list[tuple[float, float]] = []

    class Recording(EpisodicA2C):
        def train(self) -> None:
            super().train()
            if self.rollout_buffer.size():
                logged = self.logger.name_to_value
                losses.append((logged["train/value_loss"], logged["train/value_loss_after_epochs"]))

    arguments: dict[str, Any] = {"policy": "MlpPolicy", "env": "CartPole-v1", "seed": 0, "device": "cpu"}
    with_epochs = Recording(n_value_epochs=8, **arguments)
    without = EpisodicA2C(**arguments)
    steps: list[int] = []
    for model in (with_epochs, without):
        # One update: the same episode, so the same step of the actor
        model.learn(10_000, callback=lambda locals_, _, model=model: model._n_updates < 1)
        steps.append(model._n_updates)
    assert steps == [1, 1]
    for name, parameter in with_epochs.policy.named_parameters():
        is_critic = "value_net" in name
        assert th.equal(parameter, without.policy.get_parameter(name)) != is_critic, name
    with_epochs.learn(3_000)
    # Rarely they overshoot: their optimizer remembers the gradients of earlier episodes
    assert np.mean([after < before for before, after in losses]) > 0.8
    before, after = np.mean(losses, axis=0)
    assert after < 0.9 * before


def test_value_epochs_sum_over_passes() -> None:
    whole, passes = (
        EpisodicA2C("MlpPolicy", "CartPole-v1", n_value_epochs=3, gae_lambda=0.9, batch_size=size, seed=0, device="cpu").learn(
            1_000
        )
        for size in (None, 7)
    )
    th.testing.assert_close(parameters_of(whole), parameters_of(passes), rtol=1e-2, atol=1e-3)


def test_a_value_epoch_that_would_spoil_the_critic_is_refused() -> None:
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", n_value_epochs=3, seed=0, device="cpu").learn(200)
    calls: list[int] = []

    def spoil(gradient: th.Tensor) -> th.Tensor:
        calls.append(1)
        return gradient * (np.nan if len(calls) == 3 else 1.0)

    model.policy.value_net.weight.register_hook(spoil)
    with pytest.raises(ValueError, match=r"gradient of value epoch 2 of update \d+ is not finite"):
        model.learn(500, reset_num_timesteps=False)
    assert bool(th.isfinite(parameters_of(model)).all())
    assert model.policy.value_net.weight.grad is None
    calls.extend([1] * 10)
    model.learn(500, reset_num_timesteps=False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"gae_lambda": 1.5}, r"`gae_lambda` is 1.5.*\[0, 1\]"),
        ({"gae_lambda": "x"}, r"`gae_lambda` is 'x'"),
        (
            {"gae_lambda": 0.9, "standardize_returns": "rollout", "handle_timeout_termination": False},
            "`gae_lambda` is 0.9.*no fixed units.*1.0",
        ),
        ({"gae_lambda": 0.9, "detach_advantage": False}, "`gae_lambda` is 0.9.*detach_advantage=True"),
        ({"n_value_epochs": -1}, "`n_value_epochs` is -1.*>= 0"),
        ({"n_value_epochs": 1.5}, "`n_value_epochs` is 1.5"),
        ({"n_value_epochs": 2, "vf_coef": 0.0}, "`n_value_epochs` is 2.*no value loss.*`vf_coef`"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpisodicA2C("MlpPolicy", "CartPole-v1", **arguments)


# ---------------------------------------------------------------------- what callbacks write


class Write(BaseCallback):
    def __init__(self, write: Any) -> None:
        super().__init__()
        self.write = write

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if self.model.rollout_buffer.size():  # type: ignore[attr-defined]
            self.write(self.model.rollout_buffer)  # type: ignore[attr-defined]


def set_zero(buffer: Any) -> None:
    buffer.advantages = np.zeros_like(buffer.advantages)


def multiply_by_zero(buffer: Any) -> None:
    buffer.advantages[:] *= 0


@pytest.mark.parametrize("write", [set_zero, multiply_by_zero])
@pytest.mark.parametrize("setting", ["carry", "discard", "recurrent", "masked", "time_limit"])
@pytest.mark.parametrize("gae_lambda", [1.0, 0.9])
def test_written_advantages_are_trained_on(write: Any, setting: str, gae_lambda: float) -> None:
    model = SETTINGS[setting](vf_coef=0.0, gae_lambda=gae_lambda, seed=0, device="cpu")
    before = model.policy.action_net.weight.detach().clone()
    model.learn(900, callback=Write(write))
    assert th.equal(before, model.policy.action_net.weight) and model._n_updates > 0


def test_written_returns_are_trained_on() -> None:
    def write(buffer: Any) -> None:
        buffer.returns[:] = 7.0

    model = EpisodicA2C("MlpPolicy", "CartPole-v1", n_value_epochs=20, seed=0, device="cpu").learn(
        2_000, callback=Write(write)
    )
    with th.no_grad():
        values = model.policy.predict_values(0.05 * th.randn(10, 4))
    assert float(values.mean()) > 4


def test_advantages_follow_written_returns() -> None:
    def write(buffer: Any) -> None:
        before = buffer.advantages.copy()
        buffer.returns += 10.0
        np.testing.assert_allclose(buffer.advantages, before + 10.0, rtol=1e-5)
        buffer.advantages = 2 * buffer.advantages
        written = buffer.advantages.copy()
        # What was written stays
        buffer.returns -= 10.0
        np.testing.assert_array_equal(buffer.advantages, written)

    assert EpisodicA2C("MlpPolicy", TargetEnv(), seed=0, device="cpu").learn(20, callback=Write(write))._n_updates == 4


@pytest.mark.parametrize("setting", ["carry", "recurrent", "masked"])
def test_a_train_of_ones_own_gets_generalized_advantages(setting: str) -> None:
    """And those that a callback has written."""
    model = SETTINGS[setting](gae_lambda=0.5, seed=0, device="cpu")
    seen: list[float] = []

    def train() -> None:
        if not model.rollout_buffer.size():
            return
        with model.update_transaction() as transaction:
            for samples in model.rollout_buffer.get():
                values, log_prob, _ = model._evaluate_actions(samples)
                samples = samples.completed(values.detach(), log_prob)
                ((values - samples.returns).square().sum() - (log_prob * samples.advantages).sum()).backward()
                np.testing.assert_array_equal(samples.advantages.numpy(), model.rollout_buffer.advantages[:, 0])
                seen.append(float(np.abs(samples.advantages.numpy()).max()))
            transaction.take("an update", None, lambda: None)
            model._n_updates += 1

    model.train = train
    watch = Watch()
    model.learn(900, callback=watch)
    assert watch.n_checked == len(seen) > 0 and min(seen) > 0
    seen.clear()
    model.learn(900, callback=Write(set_zero))
    assert seen and max(seen) == 0


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "values", "log_probs", "episode_starts"])
def test_what_cannot_be_trained_on_cannot_be_written(name: str) -> None:
    def write(buffer: Any) -> None:
        with pytest.raises(ValueError, match="read-only"):
            getattr(buffer, name)[:] = 0

    EpisodicA2C("MlpPolicy", "CartPole-v1", seed=0, device="cpu").learn(100, callback=Write(write))


@pytest.mark.parametrize("advantages", [np.zeros(3), np.float32(1.0), None])
def test_advantages_of_another_size_are_refused(advantages: Any) -> None:
    def write(buffer: Any) -> None:
        with pytest.raises(ValueError, match=r"`advantages` has the shape"):
            buffer.advantages = np.full(buffer.size(), np.nan) if advantages is None else advantages

    EpisodicA2C("MlpPolicy", "CartPole-v1", seed=0, device="cpu").learn(200, callback=Write(write))


def test_returns_may_be_set_in_any_precision() -> None:
    def write(buffer: Any) -> None:
        buffer.returns = buffer.returns + np.zeros(buffer.returns.shape)
        assert buffer.returns.dtype == np.float32

    assert EpisodicA2C("MlpPolicy", TargetEnv(), device="cpu").learn(20, callback=Write(write))._n_updates == 4


@pytest.mark.parametrize("wrong", [np.zeros(3), np.full(5, np.nan)])
def test_returns_that_cannot_be_trained_on_are_named(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="`returns` has the shape"):
        EpisodicA2C("MlpPolicy", TargetEnv(), device="cpu").learn(
            20, callback=Write(lambda buffer: setattr(buffer, "returns", wrong))
        )


def test_a_part_of_the_observations_cannot_be_set() -> None:
    env = TargetEnv(spaces.Dict({"vector": spaces.Box(-1, 1, (3,), np.float32)}))
    with pytest.raises(ValueError, match="copies"):
        EpisodicA2C("MultiInputPolicy", env, device="cpu").learn(
            20, callback=Write(lambda buffer: buffer.observations.__setitem__("vector", 0))
        )


# ---------------------------------------------------------------------- environments that are reset from outside


@pytest.mark.parametrize("partial_episodes", ["carry", "discard"])
@pytest.mark.parametrize("variant", ["plain", "recurrent"])
@pytest.mark.parametrize("when", ["start", "end"])
def test_a_head_that_was_abandoned_is_glued_to_nothing(partial_episodes: str, variant: str, when: str) -> None:
    import gymnasium as gym

    lengths: list[list[int]] = []

    class Fresh(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            model: Any = self.model
            if model.rollout_buffer.size():
                lengths.append(sorted(model.rollout_buffer.episode_lengths.tolist()))
            if when == "end":
                self.start_afresh()

        def _on_rollout_start(self) -> None:
            if when == "start":
                self.start_afresh()

        def start_afresh(self) -> None:
            model: Any = self.model
            model._last_obs = self.training_env.reset()
            model._last_episode_starts = np.ones(3, dtype=bool)

    def make(n: int) -> Any:
        return lambda: gym.wrappers.TimeLimit(gym.make("Pendulum-v1").unwrapped, n)

    env = DummyVecEnv([make(7), make(10), make(13)])
    algorithm, policy = (EpisodicA2C, "MlpPolicy") if variant == "plain" else (RecurrentEpisodicA2C, "MlpLstmPolicy")
    algorithm(policy, env, partial_episodes=partial_episodes, seed=0, device="cpu").learn(600, callback=Fresh())
    assert len(lengths) > 3
    # Each is an episode of one environment from its first step, whatever ran when the others were reset
    assert {length for rollout in lengths for length in rollout} <= {7, 10, 13}


def test_value_epochs_leave_batch_norm_to_the_update() -> None:
    """A refused value epoch, and the look at the loss after them, undo what they did to the running statistics."""

    class Normalized(FlattenExtractor):
        def __init__(self, observation_space: Any) -> None:
            super().__init__(observation_space)
            self.norm = th.nn.BatchNorm1d(self.features_dim)

        def forward(self, observations: th.Tensor) -> th.Tensor:
            return self.norm(super().forward(observations))

    policy_kwargs = {"features_extractor_class": Normalized}
    n_tracked: list[int] = []
    for n_value_epochs in (0, 3):
        model = EpisodicA2C(
            "MlpPolicy", "CartPole-v1", n_value_epochs=n_value_epochs, policy_kwargs=policy_kwargs, seed=0, device="cpu"
        )
        model.learn(10_000, callback=lambda locals_, _, model=model: model._n_updates < 1)
        n_tracked.append(int(model.policy.features_extractor.norm.num_batches_tracked))
    # One pass of the update, and one of each value epoch
    assert n_tracked == [1, 1 + 3]


def test_value_epochs_with_a_frozen_critic() -> None:
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", n_value_epochs=2, seed=0, device="cpu")
    for module in (model.policy.value_net, model.policy.mlp_extractor.value_net):
        module.requires_grad_(False)
    before = parameters_of(model)
    model.learn(300)
    assert not th.equal(before, parameters_of(model))


@pytest.mark.parametrize("gae_lambda", [1.0, 0.9])
def test_advantages_that_were_read_before_an_episode_ended(gae_lambda: float) -> None:
    shapes: list[tuple[int, ...]] = []

    class Read(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            buffer = self.model.rollout_buffer  # type: ignore[attr-defined]  # ours
            assert buffer.advantages.shape == (buffer.size(), 1)
            shapes.append(buffer.advantages.shape)

    model = EpisodicA2C("MlpPolicy", "CartPole-v1", gae_lambda=gae_lambda, seed=0, device="cpu")
    for _ in range(20):
        # The budget of a call ends before an episode does
        model.learn(5, callback=Read(), reset_num_timesteps=False)
    assert (0, 1) in shapes and max(shapes) > (5, 1) and model._n_updates > 0
