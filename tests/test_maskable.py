"""MaskableEpisodicA2C: what is sampled, what is trained on, what is refused, and that it learns."""

import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiBinary, InvalidActionEnvMultiDiscrete
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_episodic_a2c import EpisodicA2C, MaskableEpisodicA2C, MlpPolicy
from sb3_episodic_a2c.actors import NumpyActor, TorchActor
from tests.variant_envs import ACTION_SPACES, GradientRecord, LogProbCheck, RandomEnv, make_random_envs, randomize

MASKED_SPACES = ["discrete", "multi_discrete", "multi_binary"]
INVALID_ACTION_ENVS: dict[str, Any] = {
    "discrete": lambda: InvalidActionEnvDiscrete(dim=20, n_invalid_actions=10),
    "multi_discrete": lambda: InvalidActionEnvMultiDiscrete(dims=[10, 10], n_invalid_actions=10),
    "multi_binary": lambda: InvalidActionEnvMultiBinary(dims=10, n_invalid_actions=5),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    th.set_num_threads(1)


# ---------------------------------------------------------------------- what is sampled and trained on


@pytest.mark.parametrize("partial_episodes", ["carry", "discard"])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("is_dict", [False, True])
@pytest.mark.parametrize("space", MASKED_SPACES)
def test_training_sees_the_distribution_that_was_sampled_from(space, is_dict, n_envs, partial_episodes):
    env = make_random_envs(ACTION_SPACES[space], n_envs, is_dict=is_dict)
    # No learning, so that the head of a carried episode comes from the same parameters
    model = MaskableEpisodicA2C(
        "MultiInputPolicy" if is_dict else "MlpPolicy", env, learning_rate=0.0, partial_episodes=partial_episodes, n_episodes=3
    )
    randomize(model.policy)
    check = LogProbCheck()
    model.learn(150 * n_envs, callback=check)
    assert check.n_compared > 100
    assert sum(env.get_attr("n_invalid_actions")) == 0


@pytest.mark.parametrize("use_masking", [True, False])
def test_masking_cannot_change_within_an_episode(use_masking):
    env = make_random_envs(ACTION_SPACES["discrete"], n_envs=3)
    model = MaskableEpisodicA2C("MlpPolicy", env, use_masking=use_masking, seed=0).learn(101)
    assert model.rollout_buffer.running_steps.any()
    model.use_masking = not use_masking
    with pytest.raises(ValueError, match=r"`use_masking`.*reset_num_timesteps=True"):
        model.learn(100, reset_num_timesteps=False)
    model.learn(100)
    assert ("policy_inputs/action_masks" in model.rollout_buffer._rows) == model.use_masking


def test_a_shifted_mask_would_be_seen():
    class ShiftedMasks(MaskableEpisodicA2C):
        def _evaluate_actions(self, samples):
            masks = {"action_masks": samples.policy_inputs["action_masks"].roll(1, dims=0)}
            return super()._evaluate_actions(samples._replace(policy_inputs=masks))

    model = ShiftedMasks("MlpPolicy", make_random_envs(ACTION_SPACES["discrete"]), learning_rate=0.0)
    randomize(model.policy)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        model.learn(100, callback=LogProbCheck())


@pytest.mark.parametrize("is_dict", [False, True])
@pytest.mark.parametrize("space", MASKED_SPACES)
def test_no_invalid_action_in_many_steps(space, is_dict):
    env = make_random_envs(ACTION_SPACES[space], n_envs=100, is_dict=is_dict)
    policy, actor = ("MultiInputPolicy", "torch") if is_dict else ("MlpPolicy", "numpy")
    model = MaskableEpisodicA2C(policy, env, n_episodes=5, seed=0, actor=actor)
    assert isinstance(model._actor, TorchActor if is_dict else NumpyActor)
    # A confident policy: without masks it would nearly always take some invalid actions
    randomize(model.policy, scale=2.0)
    model.learn(30_000)
    assert model.num_timesteps == 30_000
    assert env.get_attr("n_invalid_actions") == [0] * 100


def test_no_invalid_action_however_unlikely_the_others_are():
    model = MaskableEpisodicA2C("MlpPolicy", make_random_envs(ACTION_SPACES["discrete"]), seed=0)
    with th.no_grad():
        # Less than what sb3-contrib gives to invalid actions
        model.policy.action_net.bias.copy_(th.tensor([0.0, -1e9, -1e9, -1e9, -1e9]))
    masks = np.array([[False, True, True, False, False]])
    actions = {int(model._actor.sample(np.zeros((1, 3), np.float32), {"action_masks": masks})[0]) for _ in range(50)}
    assert actions <= {1, 2}


def test_without_masking_invalid_actions_are_sampled_and_no_mask_is_asked_for():
    env = make_random_envs(ACTION_SPACES["discrete"])
    model = MaskableEpisodicA2C("MlpPolicy", env, use_masking=False)
    model.learn(200)
    assert env.get_attr("n_invalid_actions")[0] > 50
    assert not model.rollout_buffer._keys("policy_inputs")


@pytest.mark.parametrize("space", MASKED_SPACES)
def test_an_action_that_is_never_valid_has_no_gradient(space):
    class NeverValid(RandomEnv):
        """The first choice of each dimension is never valid."""

        def _draw_mask(self, n_choices: int) -> np.ndarray:
            mask = np.ones(n_choices, dtype=bool)
            mask[0] = False
            return mask

    env = DummyVecEnv([lambda: NeverValid(ACTION_SPACES[space])])
    model = MaskableEpisodicA2C("MlpPolicy", env, n_episodes=4, ent_coef=0.1)
    record = GradientRecord(model)
    model.learn(200)
    first_choices = np.cumsum(model._n_choices) - model._n_choices
    # Bits have one valid choice left, so there is nothing to learn about them
    assert len(record.gradients) > 3
    for gradients in record.gradients:
        gradient = gradients["action_net.weight"]
        others = np.setdiff1d(np.arange(len(gradient)), first_choices)
        scale = 1.0 if space == "multi_binary" else gradient[others].abs().max().item()
        assert scale > 1e-2
        # Exactly zero but for the rounding of the normalisation over all choices that comes before the mask
        assert gradient[first_choices].abs().max().item() < 1e-5 * scale


# Not for MultiBinary, where the maskable policy is another one: two logits a bit, in place of one
@pytest.mark.parametrize("space", ["discrete", "multi_discrete"])
@pytest.mark.parametrize("partial_episodes", ["carry", "discard"])
def test_an_all_true_mask_changes_no_gradient(space, partial_episodes):
    runs = {}
    state_dict = None
    for algorithm in (EpisodicA2C, MaskableEpisodicA2C):
        env = make_random_envs(ACTION_SPACES[space], n_envs=3, always_valid=True)
        model = algorithm("MlpPolicy", env, seed=0, n_episodes=2, ent_coef=0.01, partial_episodes=partial_episodes)
        # The same parameters, and the same random numbers for the same actions
        state_dict = state_dict or {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
        model.policy.load_state_dict(state_dict)
        model._actor = TorchActor(model.policy)
        record = GradientRecord(model)
        th.manual_seed(1)
        model.learn(1500)
        runs[algorithm] = record.gradients
    assert len(runs[EpisodicA2C]) == len(runs[MaskableEpisodicA2C]) > 20
    for plain, masked in zip(runs[EpisodicA2C], runs[MaskableEpisodicA2C], strict=True):
        assert plain.keys() == masked.keys()
        for name in plain:
            scale = plain[name].abs().max().item()
            np.testing.assert_allclose(masked[name], plain[name], rtol=1e-3, atol=1e-4 * scale, err_msg=name)


def test_batches_change_nothing_but_memory():
    gradients = []
    for batch_size in (None, 7):
        env = make_random_envs(ACTION_SPACES["multi_discrete"], n_envs=3)
        model = MaskableEpisodicA2C("MlpPolicy", env, seed=0, n_episodes=4, batch_size=batch_size)
        record = GradientRecord(model)
        model.learn(150)
        gradients.append(record.gradients[0])
    for name in gradients[0]:
        np.testing.assert_allclose(gradients[1][name], gradients[0][name], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- refusals


class _MasksOf(gym.Wrapper):
    """Always the same mask, or an object that is not a mask."""

    def __init__(self, env: gym.Env, mask: Any) -> None:
        super().__init__(env)
        self.mask = mask

    def action_masks(self) -> Any:
        return self.mask


def test_refuses_an_environment_without_masks():
    model = MaskableEpisodicA2C("MlpPolicy", "CartPole-v1")
    with pytest.raises(ValueError, match=r"ActionMasker.*use_masking=False"):
        model.learn(10)
    MaskableEpisodicA2C("MlpPolicy", "CartPole-v1", use_masking=False).learn(100)


def test_refuses_masks_of_another_size():
    model = MaskableEpisodicA2C("MlpPolicy", _MasksOf(gym.make("CartPole-v1"), [True] * 3))
    with pytest.raises(ValueError, match="environment 0 returned 3 entries, but its action space has 2"):
        model.learn(10)


@pytest.mark.parametrize(
    ("mask", "returned"),
    [
        ([True], "1 entries"),
        ([True] * 4, "4 entries"),
        ([[True], [True, False]], r"\[\[True\], \[True, False\]\]"),
        (None, "None"),
        ("01", "'01'"),
    ],
)
@pytest.mark.parametrize("bad_index", [0, 2])
def test_refuses_what_is_no_mask_and_says_of_which_environment(bad_index, mask, returned):
    masks: list[Any] = [[True, True]] * 3
    masks[bad_index] = mask
    env = DummyVecEnv([lambda mask=mask: _MasksOf(gym.make("CartPole-v1"), mask) for mask in masks])
    model = MaskableEpisodicA2C("MlpPolicy", env)
    with pytest.raises(ValueError, match=rf"environment {bad_index} returned {returned}, but its action space has 2"):
        model.learn(10)


@pytest.mark.parametrize(
    ("mask", "shown"),
    [
        ([0.0, -1e8], r"\[0\.0, -1"),
        (np.array([np.nan, 1.0]), "array.*nan"),
        ([2, 0], r"\[2, 0\]"),
    ],
)
def test_refuses_masks_that_are_neither_booleans_nor_ones_and_zeros(mask, shown):
    model = MaskableEpisodicA2C("MlpPolicy", _MasksOf(gym.make("CartPole-v1"), mask))
    with pytest.raises(ValueError, match=f"environment 0 returned {shown}.*return booleans"):
        model.learn(10)


@pytest.mark.parametrize("mask", [[1, 0], [1.0, 0.0], [True, False], np.array([[1, 0]], dtype=np.int8)])
def test_takes_ones_and_zeros(mask):
    env = DummyVecEnv([lambda: Monitor(_MasksOf(gym.make("CartPole-v1"), mask))])
    model = MaskableEpisodicA2C("MlpPolicy", env, seed=0).learn(50)
    assert not model.rollout_buffer.actions.any()


@pytest.mark.parametrize(
    ("space", "mask", "dimension"),
    [
        ("discrete", [False] * 5, 0),
        ("multi_discrete", [True] * 3 + [False] * 2 + [True] * 4, 1),
        ("multi_binary", [True, False, False, True, False, False], 2),
    ],
)
def test_refuses_a_state_without_a_valid_action(space, mask, dimension):
    model = MaskableEpisodicA2C("MlpPolicy", _MasksOf(RandomEnv(ACTION_SPACES[space]), mask))
    with pytest.raises(ValueError, match=f"environment 0 allows no action in dimension {dimension}"):
        model.learn(10)


def test_refuses_what_masks_cannot_be_applied_to():
    with pytest.raises(ValueError, match="action space"):
        MaskableEpisodicA2C("MlpPolicy", "Pendulum-v1")
    with pytest.raises(ValueError, match=r"ActorCriticPolicy knows no action masks.*MaskableActorCriticPolicy"):
        MaskableEpisodicA2C(MlpPolicy, "CartPole-v1")
    with pytest.raises(ValueError, match="`use_masking` is 'yes'"):
        MaskableEpisodicA2C("MlpPolicy", "CartPole-v1", use_masking="yes")
    with pytest.raises(ValueError, match="gSDE"):
        MaskableEpisodicA2C("MlpPolicy", "CartPole-v1", use_sde=True)


# ---------------------------------------------------------------------- as part of SB3


def test_action_masker_and_integer_masks():
    def mask(env: gym.Env) -> np.ndarray:
        return np.array([0, 1])

    actions = []

    class Record(BaseCallback):
        def _on_step(self) -> bool:
            actions.extend(self.locals["actions"])
            return True

    model = MaskableEpisodicA2C("MlpPolicy", ActionMasker(gym.make("CartPole-v1"), mask))
    model.learn(100, callback=Record())
    assert set(actions) == {1}


@pytest.mark.parametrize("space", MASKED_SPACES)
def test_predict_with_masks(space):
    env = RandomEnv(ACTION_SPACES[space])
    model = MaskableEpisodicA2C("MlpPolicy", env)
    randomize(model.policy, scale=2.0)
    observation, _ = env.reset()
    for deterministic in (True, False):
        for _ in range(50):
            action, state = model.predict(observation, deterministic=deterministic, action_masks=env.action_masks())
            assert action.shape == env.action_space.shape
            assert state is None
            observation, *_ = env.step(action)
            env.steps_left = 10
    assert env.n_invalid_actions == 0
    # Several at once
    observations = np.stack([observation] * 4)
    actions, _ = model.predict(observations, action_masks=np.stack([env.action_masks()] * 4))
    assert actions.shape == (4, *env.action_space.shape)


def test_save_load_continue(tmp_path: Path):
    model = MaskableEpisodicA2C("MlpPolicy", make_random_envs(ACTION_SPACES["discrete"], n_envs=2), seed=0, use_masking=True)
    model.learn(200)
    model.save(tmp_path / "model")

    env = make_random_envs(ACTION_SPACES["discrete"], n_envs=3, seed=5)
    loaded = MaskableEpisodicA2C.load(tmp_path / "model", env=env)
    assert loaded.use_masking and loaded.n_envs == 3
    assert loaded.return_statistics == model.return_statistics
    for name, tensor in model.policy.state_dict().items():
        assert th.equal(tensor, loaded.policy.state_dict()[name])
    n_updates = loaded._n_updates
    loaded.learn(300, reset_num_timesteps=False)
    assert loaded.num_timesteps >= 500
    assert loaded._n_updates > n_updates
    assert sum(env.get_attr("n_invalid_actions")) == 0
    unmasked = MaskableEpisodicA2C.load(tmp_path / "model", env=env, use_masking=False)
    unmasked.learn(100)
    assert sum(env.get_attr("n_invalid_actions")) > 0


def test_evaluation_with_and_without_masks_on_normalised_observations(tmp_path: Path):
    def make() -> VecNormalize:
        return VecNormalize(DummyVecEnv([lambda: Monitor(RandomEnv(ACTION_SPACES["discrete"]))]), norm_reward=False)

    env, eval_env, other_eval_env = make(), make(), make()
    model = MaskableEpisodicA2C("MlpPolicy", env)
    callbacks = [
        MaskableEvalCallback(eval_env, eval_freq=100, best_model_save_path=str(tmp_path), verbose=0),
        EvalCallback(other_eval_env, eval_freq=100, verbose=0),
    ]
    model.learn(300, callback=callbacks)
    assert eval_env.get_attr("n_invalid_actions") == [0]
    # SB3's callback knows nothing of masks
    assert other_eval_env.get_attr("n_invalid_actions")[0] > 0
    assert (tmp_path / "best_model.zip").exists()
    rewards, _ = evaluate_policy(model, eval_env, n_eval_episodes=5, return_episode_rewards=True)
    assert len(rewards) == 5


def test_cnn_policy():
    class Images(RandomEnv):
        def __init__(self) -> None:
            super().__init__(ACTION_SPACES["discrete"])
            self.observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)

        def _observe(self) -> np.ndarray:
            super()._observe()
            return self.rng.integers(0, 256, (36, 36, 1), dtype=np.uint8)

    class ImageCheck(LogProbCheck):
        @staticmethod
        def _id(observations: np.ndarray) -> np.ndarray:
            # With the channels last or, in the buffer, first, which are the same bytes for one channel
            return observations.reshape(*observations.shape[:-3], 36 * 36)

    env = DummyVecEnv([Images])
    check = ImageCheck()
    MaskableEpisodicA2C("CnnPolicy", env, learning_rate=0.0).learn(60, callback=check)
    assert env.get_attr("n_invalid_actions") == [0]
    assert check.n_compared > 30


# ---------------------------------------------------------------------- learning


class StopWhenSolved(BaseCallback):
    """Stops once the mean reward of the last 20 episodes of training (of 100 at most each) is at least 90."""

    def _on_step(self) -> bool:
        rewards = [info["r"] for info in list(self.model.ep_info_buffer)[-20:]]
        return len(rewards) < 20 or float(np.mean(rewards)) < 90.0


def solve(model: Any, max_steps: int) -> tuple[int, float]:
    """Env steps and seconds of the processor until solved."""
    start = time.process_time()
    model.learn(max_steps, callback=StopWhenSolved())
    return model.num_timesteps, time.process_time() - start


MASKABLE_KWARGS: dict[str, dict[str, Any]] = {
    "discrete": dict(learning_rate=3e-2, gamma=0.0),
    "multi_discrete": dict(learning_rate=3e-2, gamma=0.0),
    "multi_binary": dict(learning_rate=1.5e-2, gamma=0.0),
}
"""gamma is 0, as each step is an independent guess."""

SMALL_ENVS: dict[str, Any] = {
    "discrete": lambda: InvalidActionEnvDiscrete(dim=10, n_invalid_actions=5),
    "multi_discrete": lambda: InvalidActionEnvMultiDiscrete(dims=[5, 5], n_invalid_actions=5),
    "multi_binary": lambda: InvalidActionEnvMultiBinary(dims=4, n_invalid_actions=2),
}


def seeded(env: Any, seed: int) -> Any:
    # sb3-contrib's environments draw from these two
    np.random.seed(seed)
    env.action_space.seed(seed)
    return env


@pytest.mark.parametrize("space", MASKED_SPACES)
def test_solves_small_invalid_action_environments(space):
    model = MaskableEpisodicA2C("MlpPolicy", seeded(SMALL_ENVS[space](), 0), seed=0, **MASKABLE_KWARGS[space])
    n_steps, _ = solve(model, 10_000)
    assert n_steps < 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    # MaskablePPO needs minutes for three seeds of the last
    ("space", "seeds"),
    [("discrete", range(20, 23)), ("multi_discrete", range(20, 23)), ("multi_binary", range(20, 21))],
)
def test_solves_invalid_action_environments_in_fewer_steps_and_seconds_than_maskable_ppo(space, seeds):
    """MaskablePPO with the arguments of sb3-contrib's own tests; and, for information, with faster ones. ``-m slow -s``."""
    runs: dict[str, list[tuple[int, float]]] = {}
    for seed in seeds:

        def make(seed: int = seed) -> Any:
            return seeded(INVALID_ACTION_ENVS[space](), seed)

        models = {
            "MaskableEpisodicA2C": MaskableEpisodicA2C("MlpPolicy", make(), seed=seed, **MASKABLE_KWARGS[space]),
            "MaskablePPO": MaskablePPO("MlpPolicy", make(), n_steps=64, gamma=0.4, seed=seed),
            "MaskablePPO, learning rate 3e-3, gamma 0": MaskablePPO(
                "MlpPolicy", make(), n_steps=64, gamma=0.0, learning_rate=3e-3, seed=seed
            ),
        }
        for name, model in models.items():
            runs.setdefault(name, []).append(solve(model, 40_000))
    for name, results in runs.items():
        print(
            f"\n{space}, {name}: (env steps, s) {np.round(results, 2).tolist()}, median {np.median(results, axis=0)}", end=""
        )
    ours, theirs = (np.median(runs[name], axis=0) for name in ("MaskableEpisodicA2C", "MaskablePPO"))
    assert (ours <= theirs).all(), (ours, theirs)


def test_use_masking_is_an_argument_of_the_constructor() -> None:
    """sb3-contrib's ``MaskablePPO.learn`` takes it."""
    model = MaskableEpisodicA2C("MlpPolicy", make_random_envs(spaces.Discrete(3)), device="cpu")
    message = r"MaskableEpisodicA2C.learn\(\).*'use_masking'.* one of the constructor's: .*use_masking=False\)"
    with pytest.raises(TypeError, match=message):
        model.learn(10, use_masking=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'callbacks'\.$"):
        model.learn(10, callbacks=None)  # type: ignore[arg-type]
    assert model.num_timesteps == 0
