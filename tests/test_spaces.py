"""Every space and every wrapper that A2C takes, and that what is trained on is what was seen and done."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from sb3_episodic_a2c import EpisodicA2C, MaskableEpisodicA2C, RecurrentEpisodicA2C
from tests.envs import (
    ACTION_SPACES,
    IMAGE_SPACE,
    OBSERVATION_SPACES,
    CountingEnv,
    MixedRewardEnv,
    TargetEnv,
    arguments_of,
    policy_for,
    vectorized,
)

Observations = np.ndarray | dict[str, np.ndarray]

ALGORITHMS = [EpisodicA2C, MaskableEpisodicA2C, RecurrentEpisodicA2C]

NOT_RECURRENT = {"test_trains_on_what_was_seen_and_done", "test_time_limit_value_for_every_observation"}
"""They evaluate a policy without a memory; `test_recurrent.py` evaluates one with a memory, with its states."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    is_for_all = metafunc.function.__name__ not in NOT_RECURRENT
    metafunc.parametrize("algorithm", ALGORITHMS if is_for_all else ALGORITHMS[:2])


def small_policy_kwargs(policy: str) -> dict[str, Any]:
    """A network that costs next to nothing."""
    features: dict[str, Any] = {}
    if policy == "CnnPolicy":
        features = {"features_extractor_kwargs": {"features_dim": 8}}
    elif policy == "MultiInputPolicy":
        features = {"features_extractor_kwargs": {"cnn_output_dim": 8}}
    return {"net_arch": [8], **features}


def make_model(algorithm: type[EpisodicA2C], env: Any, **kwargs: Any) -> EpisodicA2C:
    space = env.observation_space
    if algorithm is MaskableEpisodicA2C and isinstance(env.action_space, spaces.Box):
        pytest.skip("there are no masks for continuous actions")
    # The wrapper for images has not been put around it yet
    policy = policy_for(space)
    policy_kwargs = {**small_policy_kwargs(policy), **kwargs.pop("policy_kwargs", {})}
    policy, policy_kwargs = arguments_of(algorithm, policy, policy_kwargs)
    return algorithm(policy, env, policy_kwargs=policy_kwargs, seed=0, device="cpu", **kwargs)


def flatten(observations: Observations) -> th.Tensor | dict[str, th.Tensor]:
    """``(N, 1, ...)`` arrays of the rollout buffer as ``(N, ...)`` tensors."""
    if isinstance(observations, dict):
        return {key: th.as_tensor(observation[:, 0]) for key, observation in observations.items()}
    return th.as_tensor(observations[:, 0])


def by_env(values: list[np.ndarray]) -> np.ndarray:
    """``(n_steps, n_envs)`` as a rollout buffer lists it whose environments all ended their only episode at once."""
    return np.concatenate(np.stack(values).swapaxes(0, 1))


class RolloutRecorder(BaseCallback):
    """Computes for itself what the rollout buffer should say, from what passes by at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.rollouts: list[dict[str, Any]] = []
        self.log_probs: list[np.ndarray] = []
        self.values: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []

    def _on_rollout_start(self) -> None:
        self.log_probs, self.values, self.actions = [], [], []

    def _on_step(self) -> bool:
        # What A2C computes while it collects
        actions = self.locals["actions"]
        self.actions.append(actions.reshape(len(actions), -1))
        with th.no_grad():
            tensor = th.as_tensor(actions)
            if isinstance(self.model.action_space, spaces.Discrete):
                tensor = tensor.long().flatten()
            else:
                tensor = tensor.reshape(len(actions), -1).float()
            values, log_probs, _ = self.model.policy.evaluate_actions(obs_as_tensor(self.model._last_obs, "cpu"), tensor)
        self.values.append(values.numpy().flatten())
        self.log_probs.append(log_probs.numpy())
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        actions = th.as_tensor(buffer.actions[:, 0])
        actions = actions.long().flatten() if isinstance(self.model.action_space, spaces.Discrete) else actions.float()
        with th.no_grad():
            values, log_probs, _ = self.model.policy.evaluate_actions(flatten(buffer.observations), actions)
        self.rollouts.append(
            {
                "buffer_values": buffer.values.flatten(),
                "buffer_log_probs": buffer.log_probs.flatten(),
                "values": values.numpy().flatten(),
                "log_probs": log_probs.numpy(),
                "seen_values": by_env(self.values),
                "seen_log_probs": by_env(self.log_probs),
                "buffer_actions": buffer.actions[:, 0],
                "seen_actions": by_env(self.actions),
            }
        )


@pytest.mark.parametrize(
    ("n_envs", "partial_episodes"),
    [(3, "carry"), *(pytest.param(*rest, marks=pytest.mark.slow) for rest in ((1, "carry"), (1, "discard"), (3, "discard")))],
)
@pytest.mark.parametrize("observation", OBSERVATION_SPACES)
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_trains_on_what_was_seen_and_done(algorithm, action, observation, n_envs, partial_episodes):
    """
    Log-probabilities and values of the buffer are those of the policy, and so are those that the update used, for
    the observations and actions of the steps really made. Actions out of the action space would make the environment raise.
    """
    env = vectorized(lambda _: TargetEnv(OBSERVATION_SPACES[observation], ACTION_SPACES[action], episode_length=3), n_envs)
    # Raw returns: otherwise the critic's units, and so its values, change between the steps and the end of the rollout
    model = make_model(algorithm, env, partial_episodes=partial_episodes, standardize_returns=None)
    initial = {name: parameter.clone() for name, parameter in model.policy.state_dict().items()}
    recorder = RolloutRecorder()
    model.learn(2 * 3 * n_envs, callback=recorder)

    assert model._n_updates == len(recorder.rollouts) == 2
    for rollout in recorder.rollouts:
        np.testing.assert_array_equal(rollout["buffer_actions"], rollout["seen_actions"])
        for name in ("values", "log_probs"):
            assert rollout[f"buffer_{name}"].shape == (3 * n_envs,)
            np.testing.assert_allclose(rollout[f"buffer_{name}"], rollout[name], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(rollout[f"buffer_{name}"], rollout[f"seen_{name}"], rtol=1e-5, atol=1e-5)
    # After the update the buffer holds what the update computed
    last = recorder.rollouts[-1]
    np.testing.assert_allclose(model.rollout_buffer.values.flatten(), last["values"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.rollout_buffer.log_probs.flatten(), last["log_probs"], rtol=1e-5, atol=1e-5)

    parameters = model.policy.state_dict()
    assert all(th.isfinite(parameter).all() for parameter in parameters.values())
    assert any(not th.equal(parameter, initial[name]) for name, parameter in parameters.items())
    actions, _ = model.predict(env.reset())
    assert len(actions) == n_envs
    assert all(env.action_space.contains(single) for single in actions)


@pytest.mark.parametrize("observation", OBSERVATION_SPACES)
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_every_pair_of_spaces(algorithm, action, observation):
    """It trains, and predicts, and neither steps nor predicts outside of the action space."""
    env = vectorized(lambda _: TargetEnv(OBSERVATION_SPACES[observation], ACTION_SPACES[action], episode_length=3), 2)
    model = make_model(algorithm, env)
    before = {name: parameter.clone() for name, parameter in model.policy.named_parameters()}
    model.learn(12)
    assert model._n_updates == 2
    after = dict(model.policy.named_parameters())
    assert all(th.isfinite(parameter).all() for parameter in after.values())
    assert not th.equal(after["action_net.bias"], before["action_net.bias"])
    assert not th.equal(after["value_net.bias"], before["value_net.bias"])
    actions, _ = model.predict(env.reset())
    assert all(env.action_space.contains(single) for single in actions)


@pytest.mark.parametrize("action", ACTION_SPACES)
@pytest.mark.parametrize("observation", ["box", "dict"])
def test_batches_cover_every_space(algorithm, action, observation):
    """A batch limit that cuts episodes gives the same transitions and, but for rounding, the same parameters."""
    parameters, losses = [], []
    for batch_size in (None, 2):
        env = vectorized(lambda _: TargetEnv(OBSERVATION_SPACES[observation], ACTION_SPACES[action]), 2)
        model = make_model(
            algorithm, env, batch_size=batch_size, learning_rate=0.1, policy_kwargs={"optimizer_class": th.optim.SGD}
        )
        model.learn(10)
        parameters.append(th.nn.utils.parameters_to_vector(model.policy.parameters()).detach())
        losses.append(model.logger.name_to_value["train/policy_loss"])
    np.testing.assert_allclose(parameters[0], parameters[1], rtol=1e-4, atol=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


class TerminalValues(BaseCallback):
    """The value of each ``terminal_observation``, as SB3's A2C computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.terminal_values: list[float] = []
        self.tails: list[np.ndarray] = []

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if info.get("TimeLimit.truncated"):
                observation = self.model.policy.obs_to_tensor(info["terminal_observation"])[0]
                with th.no_grad():
                    self.terminal_values.append(self.model.policy.predict_values(observation).item())
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        is_last = np.append(buffer.episode_starts[1:, 0], 1.0) == 1.0
        self.tails.append((buffer.returns - buffer.rewards)[is_last, 0])


@pytest.mark.parametrize(
    ("observation", "normalize"),
    [*((observation, False) for observation in OBSERVATION_SPACES), ("box", True), ("float64", True)],
)
def test_time_limit_value_for_every_observation(algorithm, observation, normalize):
    """The tail of a truncated episode is the discounted value of the observation that the time limit cut off."""
    space = OBSERVATION_SPACES[observation]
    env = vectorized(lambda _: TargetEnv(space, truncates=True), 3)
    model = make_model(algorithm, VecNormalize(env, gamma=0.9) if normalize else env, standardize_returns=None, gamma=0.9)
    callback = TerminalValues()
    model.learn(30, callback=callback)
    assert len(callback.terminal_values) == 6
    assert np.ptp(callback.terminal_values) > 0
    np.testing.assert_allclose(np.concatenate(callback.tails), 0.9 * np.array(callback.terminal_values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("observation", ["image", "dict"])
def test_images_stay_uint8_and_channels_first(algorithm, observation):
    model = make_model(algorithm, vectorized(lambda _: TargetEnv(OBSERVATION_SPACES[observation]), 2))
    model.learn(10)
    assert isinstance(model.get_env(), VecTransposeImage)
    observations = model.rollout_buffer.observations
    (samples,) = model.rollout_buffer.get()
    images, sampled = (
        (observations, samples.observations)
        if observation == "image"
        else (
            observations["image"],
            samples.observations["image"],
        )
    )
    assert images.dtype == np.uint8
    assert images.shape == (10, 1, 1, 36, 36)
    assert sampled.dtype == th.uint8
    assert images.max() > 1
    np.testing.assert_array_equal(images[:, 0], sampled)


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("sde_sample_freq", [-1, 2])
@pytest.mark.parametrize("squash_output", [False, True])
def test_gsde(algorithm, squash_output, sde_sample_freq, n_envs):
    """Noise is drawn at the start of a rollout and every ``sde_sample_freq`` steps; squashed actions are unscaled."""

    class NoiseRecorder(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.matrices: list[np.ndarray] = []
            self.actions: list[np.ndarray] = []
            self.clipped_actions: list[np.ndarray] = []

        def _on_step(self) -> bool:
            self.matrices.append(self.model.policy.action_dist.exploration_matrices.detach().numpy().copy())
            self.actions.append(self.locals["actions"])
            self.clipped_actions.append(self.locals["clipped_actions"])
            return True

    space = ACTION_SPACES["box"]
    recorder = NoiseRecorder()
    model = make_model(
        algorithm,
        vectorized(lambda _: TargetEnv(action_space=space), n_envs),
        use_sde=True,
        sde_sample_freq=sde_sample_freq,
        # Wide enough to leave the bounds unless it is squashed
        policy_kwargs={"squash_output": squash_output, "log_std_init": 1.0},
    )
    model.learn(2 * 5 * n_envs, callback=recorder)

    assert all(len(matrices) == n_envs for matrices in recorder.matrices)
    changes = [not np.array_equal(one, other) for one, other in zip(recorder.matrices, recorder.matrices[1:], strict=False)]
    if sde_sample_freq == -1:
        assert changes == [False, False, False, False, True, False, False, False, False]
    else:
        assert changes == [False, True, False, True, True, False, True, False, True]

    actions, clipped_actions = np.concatenate(recorder.actions), np.concatenate(recorder.clipped_actions)
    if squash_output:
        assert np.abs(actions).max() <= 1
        np.testing.assert_allclose(clipped_actions, space.low + (actions + 1) / 2 * (space.high - space.low), rtol=1e-5)
    else:
        assert (actions < space.low).any() or (actions > space.high).any()
        np.testing.assert_array_equal(clipped_actions, np.clip(actions, space.low, space.high))
    # The buffer holds what was sampled: the log-probabilities are of that
    stored = model.rollout_buffer.actions
    assert stored.shape == (5 * n_envs, 1, 2)
    np.testing.assert_array_equal(stored[:, 0], by_env(recorder.actions[5:]))
    assert np.isfinite(model.rollout_buffer.log_probs).all()


# ------------------------------------------------------------------ wrappers


class SeenObservations(BaseCallback):
    """The observations that actions were chosen for, rollout by rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[np.ndarray] = []
        self.stored: list[np.ndarray] = []

    def _on_step(self) -> bool:
        self.seen.append(self.model._last_obs.copy())
        return True

    def _on_rollout_end(self) -> None:
        self.stored.append(self.model.rollout_buffer.observations[:, 0])


def test_vec_normalize(algorithm):
    """The buffer holds the normalised observations that the policy saw and normalised rewards, not the raw ones."""
    env = VecNormalize(vectorized(lambda index: CountingEnv((5,), index), 2), gamma=0.99)
    model = make_model(algorithm, env)
    callback = SeenObservations()
    model.learn(20, callback=callback)
    assert model.get_vec_normalize_env() is env
    seen = np.stack(callback.seen)
    np.testing.assert_array_equal(np.concatenate(callback.stored), np.concatenate([by_env(seen[:5]), by_env(seen[5:])]))
    assert np.abs(seen).max() <= env.clip_obs
    # The environments' own rewards count up to 10
    assert model.rollout_buffer.rewards.max() < 5
    # Unnormalised, as the Monitor inside says: 1 + ... + 5 and 6 + ... + 10
    assert [info["r"] for info in model.ep_info_buffer] == [15, 15, 40, 40]


def test_vec_frame_stack(algorithm):
    """The stack is cut at the start of an episode, and stored as it was seen."""
    env = VecFrameStack(vectorized(lambda index: CountingEnv((3,), index), 2), n_stack=2)
    model = make_model(algorithm, env)
    model.learn(12)
    observations = model.rollout_buffer.observations
    assert observations.shape == (6, 1, 6)
    step_indices = observations[:3, 0, [2, 5]].tolist()
    assert step_indices == [[0, 0], [0, 1], [1, 2]]
    episodes = observations[:3, 0, [1, 4]].tolist()
    assert episodes == [[0, 2], [2, 2], [2, 2]]


def test_vec_transpose_image_given_by_the_user(algorithm):
    env = VecTransposeImage(vectorized(lambda _: TargetEnv(IMAGE_SPACE), 1))
    # It transposes the images of the space too, so it cannot be told from that
    policy, policy_kwargs = arguments_of(algorithm, "CnnPolicy", small_policy_kwargs("CnnPolicy"))
    model = algorithm(policy, env, policy_kwargs=policy_kwargs)
    model.learn(10)
    assert model.get_env() is env
    assert model.rollout_buffer.observations.shape == (5, 1, 1, 36, 36)


def test_vec_monitor(algorithm):
    env = VecMonitor(DummyVecEnv([lambda: CountingEnv((4,))] * 2))
    model = make_model(algorithm, env)
    model.learn(16)
    assert [(info["r"], info["l"]) for info in model.ep_info_buffer] == [(10, 4), (10, 4), (26, 4), (26, 4)]


def test_vec_check_nan(algorithm):
    """The wrapper that error messages recommend finds the cause."""

    class NanEnv(TargetEnv):
        def step(self, action):
            observation, _, terminated, truncated, info = super().step(action)
            return observation, float("nan"), terminated, truncated, info

    model = make_model(algorithm, VecCheckNan(vectorized(lambda _: TargetEnv(), 1), raise_exception=True))
    model.learn(10)
    assert model._n_updates == 2
    model = make_model(algorithm, VecCheckNan(vectorized(lambda _: NanEnv(), 1), raise_exception=True))
    with pytest.raises(ValueError, match="nan in rewards"):
        model.learn(10)


forked = partial(SubprocVecEnv, start_method="fork")


def train_mixed_rewards(algorithm: type[EpisodicA2C], env_class: Any, partial_episodes: str) -> EpisodicA2C:
    lengths = (3, 4)
    env = env_class([lambda length=length: MixedRewardEnv(episode_length=length, truncates=True) for length in lengths])
    try:
        return make_model(algorithm, env, partial_episodes=partial_episodes, gamma=0.9).learn(40)
    finally:
        env.close()


@pytest.mark.parametrize("partial_episodes", ["carry", "discard"])
def test_dummy_and_subproc_train_identically(algorithm, partial_episodes):
    """Bit for bit, though one passes rewards on as float32 and the other as whatever the environment returned."""
    dummy, subproc = (train_mixed_rewards(algorithm, cls, partial_episodes) for cls in (DummyVecEnv, forked))
    assert dummy._n_updates == subproc._n_updates > 2
    assert subproc.rollout_buffer.rewards.max() == np.float32(0.1)
    np.testing.assert_array_equal(subproc.rollout_buffer.rewards, dummy.rollout_buffer.rewards)
    np.testing.assert_array_equal(subproc.rollout_buffer.returns, dummy.rollout_buffer.returns)
    for name, parameter in dummy.policy.state_dict().items():
        assert th.equal(parameter, subproc.policy.state_dict()[name]), name
    assert dummy.return_statistics == subproc.return_statistics


class IntegerEnv(CountingEnv):
    """Counts in integers, as its space says."""

    observation_space = spaces.Box(0, 100, (3,), np.int64)

    def _observation(self) -> np.ndarray:
        return super()._observation().astype(np.int64)


def test_integer_observations_may_become_normalised(algorithm):
    """Another environment of the same spaces may bring other types: nothing may be rounded off."""
    model = make_model(algorithm, vectorized(lambda _: IntegerEnv((5,)), 1))
    model.learn(5)
    assert model.rollout_buffer.observations.dtype == np.int64
    model.set_env(VecNormalize(vectorized(lambda _: IntegerEnv((5,)), 1)))
    callback = SeenObservations()
    model.learn(5, callback=callback)
    assert not (callback.seen[-1] == np.round(callback.seen[-1])).all()
    np.testing.assert_array_equal(callback.stored[0], by_env(callback.seen))


class SloppyEnv(TargetEnv):
    """Starts with integers where its space says floats, as hand-written environments do."""

    def reset(self, **kwargs):
        observation, info = super().reset(**kwargs)
        return np.zeros(observation.shape, dtype=np.int64), info


def test_observations_of_another_type_than_the_space_says(algorithm):
    """SubprocVecEnv passes on what environments return: A2C casts it to the type of the space, so it must not be rounded."""
    env = forked([SloppyEnv])
    try:
        model = make_model(algorithm, env)
        callback = SeenObservations()
        model.learn(5, callback=callback)
    finally:
        env.close()
    assert not (callback.seen[-1] == 0).all()
    np.testing.assert_array_equal(callback.stored[0], by_env(callback.seen))
