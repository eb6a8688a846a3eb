"""Arguments that change in the course of training: the entropy coefficient, the critic's learning rate, persistent noise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule

from sb3_episodic_a2c import EpisodicA2C, MaskableEpisodicA2C, RecurrentEpisodicA2C, load_checkpoint, save_checkpoint
from sb3_episodic_a2c.actors import make_actor
from sb3_episodic_a2c.tools.zoo import experiment_manager_class
from tests.test_actors import assert_frequencies, make_policy
from tests.test_advantages import parameters_of
from tests.variant_envs import make_random_envs

COMMON: dict[str, Any] = {"policy": "MlpPolicy", "seed": 0, "device": "cpu"}


class Logged(BaseCallback):
    """What the updates have logged, by name, and how far the training was."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, list[float]] = {}

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        logged = dict(self.logger.name_to_value)
        if "train/n_updates" in logged:
            logged["progress"] = self.model._current_progress_remaining
            for name, value in logged.items():
                self.values.setdefault(name, []).append(value)


# ---------------------------------------------------------------------- entropy coefficient


def test_a_constant_schedule_is_the_number() -> None:
    number, schedule = (
        EpisodicA2C(env="CartPole-v1", ent_coef=ent_coef, n_value_epochs=2, value_learning_rate=rate, **COMMON).learn(1_000)
        for ent_coef, rate in ((0.02, 2e-3), (lambda _: 0.02, lambda _: 2e-3))
    )
    assert th.equal(parameters_of(number), parameters_of(schedule))


def test_the_entropy_coefficient_falls_and_is_logged() -> None:
    logged = Logged()
    model = EpisodicA2C(env="CartPole-v1", ent_coef=LinearSchedule(0.5, 0.0, 1.0), **COMMON)
    model.learn(1_000, callback=logged, log_interval=10_000)
    np.testing.assert_allclose(logged.values["train/ent_coef"], 0.5 * np.array(logged.values["progress"]))
    assert len(set(logged.values["train/ent_coef"])) > 5


def test_a_schedule_is_saved(tmp_path: Path) -> None:
    arguments = {"ent_coef": LinearSchedule(0.5, 0.1, 1.0), "value_learning_rate": LinearSchedule(1e-3, 0.0, 1.0)}
    EpisodicA2C(env="CartPole-v1", n_value_epochs=1, noise_resample_prob=0.3, **arguments, **COMMON).save(tmp_path / "model")
    loaded: Any = EpisodicA2C.load(tmp_path / "model", device="cpu")
    assert (loaded.ent_coef(0.5), loaded.value_learning_rate(0.5)) == (0.3, 5e-4)
    assert loaded.noise_resample_prob == 0.3


@pytest.mark.parametrize("name", ["ent_coef", "value_learning_rate", "noise_resample_prob"])
def test_a_schedule_that_is_not_finite(name: str) -> None:
    arguments: dict[str, Any] = {name: lambda progress_remaining: 0.1 if progress_remaining > 0.5 else float("nan")}
    model = EpisodicA2C(env="CartPole-v1", n_value_epochs=1, **arguments, **COMMON)
    with pytest.raises(ValueError, match=rf"`{name}` of .*update \d+ is nan.*progress_remaining=0\.[0-4]"):
        model.learn(1_000)
    assert th.isfinite(parameters_of(model)).all() and model._n_updates > 1


# ---------------------------------------------------------------------- learning rate of the value epochs


def test_the_critics_own_learning_rate_is_used_and_the_actors_is_not_changed() -> None:
    class Rates(EpisodicA2C):
        def _take(self, step: Any, name: str, own_rate: Any = None) -> None:
            super()._take(step, name, own_rate)
            rates.append((name.split()[0], self.policy.optimizer.param_groups[0]["lr"]))

    rates: list[tuple[str, float]] = []
    Rates(env="CartPole-v1", learning_rate=3e-3, n_value_epochs=2, value_learning_rate=1e-4, **COMMON).learn(300)
    assert len(rates) > 9 and len(rates) % 3 == 0
    assert rates == [("update", 3e-3), ("value", 1e-4), ("value", 1e-4)] * (len(rates) // 3)


def test_a_rate_of_0_trains_no_critic_but_in_the_update() -> None:
    frozen, none = (
        EpisodicA2C(env="CartPole-v1", n_episodes=100, **arguments, **COMMON)
        for arguments in ({"n_value_epochs": 1, "value_learning_rate": 0.0}, {})
    )
    # One update: from the second on, Adam remembers the gradients of the value epochs
    for model in (frozen, none):
        model.learn(100)
        assert model._n_updates == 1
    assert th.equal(parameters_of(frozen), parameters_of(none))


# ---------------------------------------------------------------------- persistent noise


@pytest.mark.parametrize("prob", [0.05, 0.5])
def test_held_noise_leaves_the_distribution_of_each_action(prob: float) -> None:
    """Discrete actions by Pearson's test over environments, which are independent, at a step in the midst."""
    policy = make_policy(spaces.Discrete(5), net_arch=[8])
    observation = np.random.default_rng(1).normal(size=3).astype(np.float32)
    actor = make_actor(policy, "auto", np.random.default_rng(0), noise_resample_prob=0.5)
    actor.noise_resample_prob = prob
    observations = np.repeat(observation[None], 20_000, axis=0)
    steps = np.array([actor.sample(observations, {}) for _ in range(6)])
    probabilities = policy.get_distribution(th.as_tensor(observation[None])).distribution.probs[0].detach().numpy()
    for actions in steps:
        assert_frequencies(np.bincount(actions, minlength=5), probabilities)
    # An action is kept if its noise is, or if new noise gives the same
    is_same = prob * (probabilities**2).sum() + 1 - prob
    n_pairs = steps[1:].size
    n_same = (steps[1:] == steps[:-1]).sum()
    assert abs(n_same - n_pairs * is_same) < 5 * np.sqrt(n_pairs * is_same * (1 - is_same) * 5)


@pytest.mark.parametrize(
    "action_space", [spaces.Box(-9.0, 9.0, (2,)), spaces.MultiDiscrete([3, 2]), spaces.MultiBinary(4)], ids=str
)
def test_noise_is_held_for_other_actions(action_space: spaces.Space) -> None:
    policy = make_policy(action_space)
    actor = make_actor(policy, "auto", np.random.default_rng(0), noise_resample_prob=0.5)
    observations = np.zeros((50, 3), dtype=np.float32)
    actor.noise_resample_prob = 1e-12
    held = [actor.sample(observations, {}) for _ in range(4)]
    assert all(np.array_equal(held[0], actions) for actions in held) and not np.array_equal(held[0][:25], held[0][25:])
    actor.noise_resample_prob = 1.0
    assert not np.array_equal(held[0], actor.sample(observations, {}))


def test_a_number_rises_to_independent_noise_at_half_of_the_training() -> None:
    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            actor = self.model._actor  # type: ignore[attr-defined]
            seen.append((self.model._current_progress_remaining, actor.noise_resample_prob))
            return True

    seen: list[tuple[float, float]] = []
    model = EpisodicA2C(env="CartPole-v1", noise_resample_prob=0.2, **COMMON)
    model.learn(1_000, callback=Watch())
    probs = [prob for _, prob in seen]
    assert probs[0] == 0.2 and probs == sorted(probs) and len(set(probs)) > 5
    assert {prob for progress, prob in seen if progress < 0.45} == {1.0}
    # A function is taken as it is
    model = EpisodicA2C(env="CartPole-v1", noise_resample_prob=lambda _: 0.2, **COMMON)
    model.learn(1_000, callback=Watch())
    assert {prob for _, prob in seen[len(probs) :]} == {0.2}


def test_the_noise_of_a_further_training() -> None:
    """A new one starts with the noise of its start; one that was resumed goes on where it was."""
    seen: list[float] = []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            seen.append(self.model._actor.noise_resample_prob)  # type: ignore[attr-defined]
            return True

    model = EpisodicA2C(env="CartPole-v1", noise_resample_prob=0.2, **COMMON).learn(500)
    model.learn(500, callback=Watch())
    assert seen[0] == 0.2
    # 500 of 2,000 steps, half of the rise
    model.learn(1_500, callback=Watch(), reset_num_timesteps=False)
    assert seen[500] == pytest.approx(0.6)


def test_noise_that_is_asked_for_later() -> None:
    model = EpisodicA2C(env="CartPole-v1", actor="torch", **COMMON).learn(100)
    model.noise_resample_prob = 0.2
    with pytest.raises(ValueError, match=r'actor="torch" was asked for.*actor="auto"'):
        model.learn(100)
    model.actor = "auto"
    model.learn(100)
    assert model._actor.name == "numpy"
    model = EpisodicA2C(env="Pendulum-v1", use_sde=True, **COMMON).learn(200)
    model.noise_resample_prob = 0.2
    with pytest.raises(ValueError, match="gSDE has noise of its own"):
        model.learn(200)


def test_resumed_while_the_noise_changes(tmp_path: Path) -> None:
    class Save(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            if 150 < self.num_timesteps < 250:
                save_checkpoint(self.model, tmp_path / "checkpoint")  # type: ignore[arg-type]

    whole = EpisodicA2C(env=make_vec_env("CartPole-v1", 2), noise_resample_prob=0.1, **COMMON).learn(800, callback=Save())
    resumed = load_checkpoint(tmp_path / "checkpoint", device="cpu")
    resumed.learn(800 - resumed.num_timesteps, reset_num_timesteps=False)
    assert th.equal(parameters_of(resumed), parameters_of(whole))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"noise_resample_prob": lambda _: -3.0},
            r"noise_resample_prob` of the rollout before update 1 is -3.0.*>= 0 and <= 1",
        ),
        ({"noise_resample_prob": lambda _: 7.0}, r"noise_resample_prob` of the rollout before update 1 is 7.0"),
        (
            {"value_learning_rate": lambda _: -1.0, "n_value_epochs": 1},
            r"value_learning_rate` of value epoch 1 .* is -1.0.*>= 0",
        ),
        ({"learning_rate": lambda left: left - 0.5}, r"learning_rate` of update .* is -0.*>= 0"),
    ],
)
def test_schedules_out_of_range(arguments: dict[str, Any], message: str) -> None:
    model = EpisodicA2C(env="CartPole-v1", **arguments, **COMMON)
    with pytest.raises(ValueError, match=message):
        model.learn(300)


def test_predictions_do_not_hold_noise() -> None:
    model = EpisodicA2C(env="CartPole-v1", noise_resample_prob=lambda _: 1e-12, **COMMON).learn(100)
    observation = np.zeros(4, dtype=np.float32)
    assert len({int(model.predict(observation)[0]) for _ in range(50)}) == 2


@pytest.mark.parametrize("partial_episodes", ["carry", "discard"])
def test_resumed_to_the_last_bit(partial_episodes: Any, tmp_path: Path) -> None:
    """It goes on as one training that was not stopped; with a schedule that does not depend on how long it is."""
    env = make_vec_env("CartPole-v1", 3)
    whole = EpisodicA2C(env=env, partial_episodes=partial_episodes, noise_resample_prob=lambda _: 0.3, **COMMON).learn(600)
    save_checkpoint(whole, tmp_path / "checkpoint")
    whole.learn(600, reset_num_timesteps=False)
    resumed = load_checkpoint(tmp_path / "checkpoint", device="cpu")
    resumed.learn(600, reset_num_timesteps=False)
    assert th.equal(parameters_of(resumed), parameters_of(whole))


def test_masks_hold_with_held_noise() -> None:
    env = make_random_envs(spaces.Discrete(4), 2)
    model = MaskableEpisodicA2C(env=env, noise_resample_prob=0.1, **COMMON).learn(600)
    assert model._n_updates > 0 and env.get_attr("n_invalid_actions") == [0, 0]


@pytest.mark.parametrize(
    "algorithm, arguments, reason",
    [
        (EpisodicA2C, {"actor": "torch"}, 'actor="torch" was asked for'),
        (EpisodicA2C, {"env": "Pendulum-v1", "use_sde": True}, "gSDE has noise of its own"),
        (RecurrentEpisodicA2C, {"policy": "MlpLstmPolicy"}, "noise persists only with the NumPy actor"),
    ],
)
def test_where_noise_cannot_persist(algorithm: type[Any], arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"`noise_resample_prob` is 0.2.*{reason}.*Leave it at 1.0"):
        algorithm(**{"env": "CartPole-v1", **COMMON, "noise_resample_prob": 0.2, **arguments})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"noise_resample_prob": 0.0}, r"`noise_resample_prob` is 0.0.*\(0, 1\]"),
        ({"noise_resample_prob": 1.5}, r"`noise_resample_prob` is 1.5"),
        ({"noise_resample_prob": True}, r"`noise_resample_prob` is True"),
        ({"value_learning_rate": 1e-3}, r"`value_learning_rate` is 0.001.*set `n_value_epochs`"),
        ({"value_learning_rate": -1.0, "n_value_epochs": 2}, r"`value_learning_rate` is -1.0.*>= 0"),
        ({"ent_coef": "lin_0.1"}, r"`ent_coef` is 'lin_0.1'.*finite number"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpisodicA2C(env="CartPole-v1", **arguments, **COMMON)


def test_the_zoo_writes_schedules_as_its_own() -> None:
    preprocess: Any = experiment_manager_class()._preprocess_schedules  # type: ignore[attr-defined]
    hyperparams = preprocess({"ent_coef": "lin_0.01", "value_learning_rate": "lin_0.002", "learning_rate": "lin_0.1"})
    assert [hyperparams[name](0.5) for name in hyperparams] == [0.005, 0.001, 0.05]
    # SAC's, and numbers
    assert preprocess({"ent_coef": "auto_0.1"}) == {"ent_coef": "auto_0.1"}
    assert preprocess({"ent_coef": 0.01}) == {"ent_coef": 0.01}
