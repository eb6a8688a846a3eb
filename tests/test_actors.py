"""Two actors, one distribution; and no stale parameters."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from scipy import stats
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn
from torch.nn.utils import prune

from sb3_episodic_a2c import EpisodicA2C, MaskableEpisodicA2C, SharedMlpPolicy, actors, plain_mlp
from sb3_episodic_a2c.actors import NumpyActor, TorchActor, make_actor, reason_against_numpy
from sb3_episodic_a2c.evaluation import predict_values, stack_observations
from sb3_episodic_a2c.plain_mlp import NUMPY_ACTIVATIONS, TORCH_ACTIVATIONS, PlainMlp, inspect
from tests.envs import ACTION_SPACES, OBSERVATION_SPACES, TargetEnv, vectorized

ACTIVATIONS = [*NUMPY_ACTIVATIONS, *TORCH_ACTIVATIONS]
BOX = spaces.Box(-10, 10, (3,))


def make_policy(
    action_space: spaces.Space,
    observation_space: spaces.Space = BOX,
    policy_class: type = ActorCriticPolicy,
    seed: int = 0,
    **kwargs: Any,
) -> Any:
    """A policy far from its initialisation, where all actions are about equally likely."""
    th.manual_seed(seed)
    policy = policy_class(observation_space, action_space, lambda _: 1e-3, **kwargs)
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(0.6 * th.randn_like(parameter))
    if kwargs.get("use_sde"):
        policy.reset_noise(4)
    return policy


# ---------------------------------------------------------------------- the same logits and means


@settings(max_examples=150, deadline=None)
@given(
    activation=st.sampled_from(ACTIVATIONS),
    net_arch=st.lists(st.integers(1, 40), max_size=4),
    is_shared=st.booleans(),
    obs_shape=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    dtype=st.sampled_from([np.float32, np.float64, np.int32]),
    action_space=st.sampled_from(
        [spaces.Discrete(5), spaces.Box(-1, 1, (2, 2)), spaces.MultiDiscrete([2, 4]), spaces.MultiBinary(3)]
    ),
    n_envs=st.integers(1, 9),
    seed=st.integers(0, 10_000),
)
def test_numpy_outputs_are_torchs(
    activation: Any, net_arch: list, is_shared: bool, obs_shape: list, dtype: Any, action_space: Any, n_envs: int, seed: int
) -> None:
    observation_space = spaces.Box(-100, 100, tuple(obs_shape), dtype=dtype)
    policy = make_policy(
        action_space,
        observation_space,
        SharedMlpPolicy if is_shared else ActorCriticPolicy,
        seed=seed,
        net_arch=net_arch if is_shared else {"pi": net_arch, "vf": [3]},
        activation_fn=activation,
    )
    observation_space.seed(seed)
    observations = np.stack([observation_space.sample() for _ in range(n_envs)])
    before = observations.copy()
    actor = make_actor(policy, "numpy", np.random.default_rng(0))
    assert isinstance(actor, NumpyActor)
    _, output = actor.latent_and_output(observations)
    with th.no_grad():
        hidden = policy.extract_features(th.as_tensor(observations), policy.pi_features_extractor)
        # Small numbers may be the difference of large ones: rounding is relative to the largest on the way
        scale = max(1.0, hidden.abs().max().item())
        for layer in [*(policy.mlp_extractor.shared_net if is_shared else policy.mlp_extractor.policy_net), policy.action_net]:
            hidden = layer(hidden)
            scale = max(scale, hidden.abs().max().item())
    expected = hidden.numpy()
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_array_equal(observations, before)


CHOICES = {
    "discrete": spaces.Discrete(7),
    "one": spaces.Discrete(1),
    "multi_discrete": spaces.MultiDiscrete([3, 1, 4]),
    "multi_binary": spaces.MultiBinary(4),
    "multi_binary_2d": spaces.MultiBinary([2, 3]),
    "dict": spaces.Dict(
        {
            "z": spaces.Discrete(3),
            "a": spaces.Box(-5, 5, (2, 2)),
            "m": spaces.MultiDiscrete([2, 3]),
            "b": spaces.MultiBinary(2),
            "wide": spaces.Box(-5, 5, (3,), np.float64),
        }
    ),
}


@pytest.mark.parametrize("n_envs", [1, 6])
@pytest.mark.parametrize("name", CHOICES)
def test_choices_and_dicts_are_the_numbers_that_sb3_makes(name: str, n_envs: int) -> None:
    space = CHOICES[name]
    space.seed(1)
    policy_class = MultiInputActorCriticPolicy if name == "dict" else ActorCriticPolicy
    policy = make_policy(spaces.Discrete(3), space, policy_class)
    plain = inspect(policy)
    assert isinstance(plain, PlainMlp) and plain.critic is not None
    samples_ = [space.sample() for _ in range(n_envs)]
    stacked = stack_observations(samples_, space)
    tensors = obs_as_tensor(stacked, th.device("cpu"))
    with th.no_grad():
        expected = policy.extract_features(tensors, policy.pi_features_extractor)
        latent = policy.mlp_extractor.forward_actor(expected)
        th.testing.assert_close(plain.numbers.tensor(tensors), expected, rtol=0, atol=0)
        np.testing.assert_array_equal(plain.numbers.array(stacked), expected.numpy())
        _, output = make_actor(policy, "numpy", np.random.default_rng(0)).latent_and_output(stacked)
        np.testing.assert_allclose(output, policy.action_net(latent).numpy(), rtol=1e-5, atol=1e-5)
        values = predict_values(policy, stacked, plain)
        np.testing.assert_allclose(values, policy.predict_values(tensors).numpy()[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("batch_size", [None, 7])
def test_trained_on_choices_and_dicts_as_by_the_policys_own_methods(name: str, batch_size: int | None) -> None:
    space = CHOICES[name]
    parameters = []
    for is_plain in (True, False):
        venv = vectorized(lambda _: TargetEnv(space, spaces.Discrete(3), truncates=True), 2)
        policy: Any = MultiInputActorCriticPolicy if name == "dict" else ActorCriticPolicy
        model = EpisodicA2C(policy, venv, batch_size=batch_size, n_value_epochs=1, seed=0, device="cpu")
        assert isinstance(model._actor, NumpyActor)
        if not is_plain:
            # Its methods are called for it, but not by the actor
            model._current_plain_mlp = lambda: None  # type: ignore[method-assign]
        model.learn(60)
        assert model._n_updates > 3
        parameters.append(th.nn.utils.parameters_to_vector(model.policy.parameters()).detach())
    th.testing.assert_close(*parameters, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("choice", [-1, 7])
def test_an_observation_that_is_no_choice_is_refused(choice: int) -> None:
    actor = make_actor(make_policy(spaces.Discrete(3), CHOICES["discrete"]), "numpy", np.random.default_rng(0))
    with pytest.raises(ValueError, match=rf"observation is \[\[{choice}\]\].*must lie in \[0, \[7\]\)"):
        actor.sample(np.array([choice]), {})


def test_layers_without_bias_and_parametrised_activations() -> None:
    policy = make_policy(spaces.Discrete(3), net_arch={"pi": [7, 6], "vf": [3]})
    layers = [nn.ELU(0.3), nn.Linear(3, 7, bias=False), nn.LeakyReLU(0.2), nn.Tanh(), nn.Linear(7, 6), nn.GELU("tanh")]
    policy.mlp_extractor.policy_net = nn.Sequential(*layers)
    observations = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    before = observations.copy()
    for n in (1, 5):
        _, output = make_actor(policy, "numpy", np.random.default_rng(0)).latent_and_output(observations[:n])
        with th.no_grad():
            expected = policy.action_net(policy.mlp_extractor.policy_net(th.as_tensor(observations[:n]))).numpy()
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(observations, before)


# ---------------------------------------------------------------------- the same distribution

N_SAMPLES = 20_000


def samples(
    actor: Any, observation: np.ndarray, policy_inputs: dict[str, np.ndarray] | None = None, n_envs: int = 200
) -> np.ndarray:
    """``(N_SAMPLES, ...)`` actions for one observation: most from several environments at a time, the last from one."""
    inputs = policy_inputs or {}
    parts = []
    for n, times in ((n_envs, N_SAMPLES // n_envs - 5), (1, 5 * n_envs)):
        observations = np.repeat(observation[None], n, axis=0)
        repeated = {name: np.repeat(value[None], n, axis=0) for name, value in inputs.items()}
        parts += [actor.sample(observations, repeated) for _ in range(times)]
    return np.concatenate(parts)


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, int]:
    """The statistic of Pearson's test, and its degrees of freedom."""
    assert counts[probabilities == 0].sum() == 0
    order = probabilities.argsort()
    counts, expected = counts[order], probabilities[order].astype(np.float64)
    expected *= counts.sum() / expected.sum()
    # The test needs at least 5 expected of each: rare actions are pooled, with the next one if they are still too few
    n_lumped = max((expected < 5).sum(), np.searchsorted(expected.cumsum(), 5) + 1)
    counts, expected = (np.append(numbers[:n_lumped].sum(), numbers[n_lumped:]) for numbers in (counts, expected))
    return stats.chisquare(counts, expected).statistic, len(counts) - 1


def assert_frequencies(counts: np.ndarray, probabilities: np.ndarray) -> None:
    statistic, freedom = chi_square(counts, probabilities)
    if freedom > 0:
        assert stats.chi2.sf(statistic, freedom) > 1e-4


# sb3-contrib masks all but the last two
MANY = [
    *(spaces.Discrete(2), spaces.Discrete(7), spaces.MultiDiscrete([2, 4, 3]), spaces.MultiBinary(3)),
    *(spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (2, 2))),
]


@pytest.mark.parametrize(
    "action_space, is_masked", [*((space, False) for space in MANY), *((space, True) for space in MANY[:-2])], ids=str
)
@pytest.mark.parametrize("choice", ["numpy", "torch"])
def test_many_networks_and_observations(choice: Any, action_space: Any, is_masked: bool) -> None:
    """One test over all of them: the sum of their statistics, or their standardised actions together."""
    is_continuous = isinstance(action_space, spaces.Box)
    policy_class = MaskableActorCriticPolicy if is_masked else ActorCriticPolicy
    rng = np.random.default_rng(0)
    total, freedom, standardised = 0.0, 0, []
    for seed in range(30):
        net_arch = {"pi": rng.integers(1, 20, rng.integers(0, 4)).tolist(), "vf": []}
        activation = ACTIVATIONS[seed % len(ACTIVATIONS)]
        policy = make_policy(action_space, BOX, policy_class, seed=seed, net_arch=net_arch, activation_fn=activation)
        observations = rng.normal(size=(8, 3)).astype(np.float32)
        inputs = {}
        if is_masked:
            inputs["action_masks"] = np.stack([draw_mask(action_space, rng) for _ in observations])
        actor = make_actor(policy, choice, rng)
        actions = np.stack([actor.sample(observations, inputs) for _ in range(200)])
        distribution = policy.get_distribution(th.as_tensor(observations), **inputs)
        if is_continuous:
            normal = distribution.distribution
            standardised.append((actions.reshape(200, 8, -1) - normal.mean.detach().numpy()) / normal.stddev.detach().numpy())
            continue
        for dimension, probabilities in enumerate(probabilities_of(distribution)):
            of_dimension = actions.reshape(200, 8, -1)[:, :, dimension].astype(int)
            for index in range(8):
                counts = np.bincount(of_dimension[:, index], minlength=probabilities.shape[1])
                statistic, own_freedom = chi_square(counts, probabilities[index])
                total, freedom = total + statistic, freedom + own_freedom
    if is_continuous:
        assert stats.kstest(np.concatenate(standardised).ravel(), "norm").pvalue > 1e-4
    else:
        assert freedom > 50
        assert stats.chi2.sf(total, freedom) > 1e-4


def draw_mask(action_space: Any, rng: np.random.Generator) -> np.ndarray:
    """In each dimension at least one action is valid."""
    if isinstance(action_space, spaces.Discrete):
        dims = [action_space.n]
    else:
        dims = action_space.nvec if isinstance(action_space, spaces.MultiDiscrete) else [2] * action_space.n
    return np.concatenate([rng.permutation([True, *(rng.random(n - 1) < 0.5)]) for n in dims])


def probabilities_of(distribution: Any) -> list[np.ndarray]:
    """``(n, n_actions)`` for each dimension of the actions."""
    of_torch = getattr(distribution, "distributions", None) or distribution.distribution
    if isinstance(of_torch, th.distributions.Bernoulli):
        ones = of_torch.probs.detach().numpy()
        return [np.stack([1 - ones[:, dimension], ones[:, dimension]], axis=1) for dimension in range(ones.shape[1])]
    return [one.probs.detach().numpy() for one in (of_torch if isinstance(of_torch, list) else [of_torch])]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("choice", ["numpy", "torch"])
def test_discrete_frequencies(choice: Any, seed: int) -> None:
    policy = make_policy(spaces.Discrete(5), seed=seed, net_arch=[8])
    observation = np.random.default_rng(seed).normal(size=3).astype(np.float32)
    actions = samples(make_actor(policy, choice, np.random.default_rng(seed)), observation)
    assert (actions.shape, actions.dtype) == ((N_SAMPLES,), np.int64)
    probabilities = policy.get_distribution(th.as_tensor(observation[None])).distribution.probs[0].detach().numpy()
    assert_frequencies(np.bincount(actions, minlength=5), probabilities)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("choice", ["numpy", "torch"])
def test_multi_discrete_and_multi_binary_frequencies(choice: Any, seed: int) -> None:
    observation = np.random.default_rng(seed).normal(size=3).astype(np.float32)
    tensor = th.as_tensor(observation[None])
    policy = make_policy(spaces.MultiDiscrete([2, 4, 3]), seed=seed, net_arch=[8])
    actions = samples(make_actor(policy, choice, np.random.default_rng(seed)), observation)
    assert actions.shape == (N_SAMPLES, 3)
    for dimension, distribution in enumerate(policy.get_distribution(tensor).distribution):
        probabilities = distribution.probs[0].detach().numpy()
        assert_frequencies(np.bincount(actions[:, dimension], minlength=len(probabilities)), probabilities)
    # Dimensions are independent of each other
    assert stats.chi2_contingency(np.histogram2d(actions[:, 1], actions[:, 2], bins=(4, 3))[0] + 1e-9).pvalue > 1e-4

    policy = make_policy(spaces.MultiBinary(4), seed=seed, net_arch=[8])
    actions = samples(make_actor(policy, choice, np.random.default_rng(seed)), observation)
    assert (actions.shape, actions.dtype) == ((N_SAMPLES, 4), np.float32)
    probabilities = policy.get_distribution(tensor).distribution.probs[0].detach().numpy()
    for dimension, probability in enumerate(probabilities):
        ones = int(actions[:, dimension].sum())
        assert_frequencies(np.array([N_SAMPLES - ones, ones]), np.array([1 - probability, probability], dtype=np.float64))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("choice", ["numpy", "torch"])
def test_gaussian_moments(choice: Any, seed: int) -> None:
    policy = make_policy(spaces.Box(-1, 1, (2, 2)), seed=seed, net_arch=[8])
    observation = np.random.default_rng(seed).normal(size=3).astype(np.float32)
    actions = samples(make_actor(policy, choice, np.random.default_rng(seed)), observation)
    assert (actions.shape, actions.dtype) == ((N_SAMPLES, 2, 2), np.float32)
    normal = policy.get_distribution(th.as_tensor(observation[None])).distribution
    flat = actions.reshape(-1, 4)
    for dimension, (mean, std) in enumerate(zip(normal.mean[0].tolist(), normal.stddev[0].tolist(), strict=True)):
        assert stats.kstest(flat[:, dimension], "norm", args=(mean, std)).pvalue > 1e-4
    correlations = np.corrcoef(flat.T) - np.eye(4)
    assert np.abs(correlations).max() < 4 / np.sqrt(N_SAMPLES)
    # Nor are successive actions correlated
    assert abs(np.corrcoef(flat[:-1, 0], flat[1:, 0])[0, 1]) < 4 / np.sqrt(N_SAMPLES)


@pytest.mark.parametrize("squash_output", [True, False])
@pytest.mark.parametrize("full_std", [True, False])
@pytest.mark.parametrize("n_envs", [1, 4, 7])
def test_gsde_actions_are_torchs(squash_output: bool, full_std: bool, n_envs: int) -> None:
    """gSDE's noise is a function of the policy's exploration matrices, so the actions are equal."""
    policy = make_policy(spaces.Box(-1, 1, (2,)), use_sde=True, squash_output=squash_output, full_std=full_std, net_arch=[8])
    observations = np.random.default_rng(0).normal(size=(n_envs, 3)).astype(np.float32)
    actor = make_actor(policy, "numpy", np.random.default_rng(0))
    for _ in range(2):
        policy.reset_noise(4)
        expected = TorchActor(policy).sample(observations, {})
        np.testing.assert_allclose(actor.sample(observations, {}), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("action_space", [spaces.Discrete(5), spaces.MultiDiscrete([2, 4, 3]), spaces.MultiBinary(3)], ids=str)
@pytest.mark.parametrize("choice", ["numpy", "torch"])
def test_masked_frequencies(choice: Any, action_space: Any, seed: int) -> None:
    policy = make_policy(action_space, policy_class=MaskableActorCriticPolicy, seed=seed, net_arch=[8])
    rng = np.random.default_rng(seed)
    observation = rng.normal(size=3).astype(np.float32)
    mask = draw_mask(action_space, rng)
    actions = samples(make_actor(policy, choice, rng), observation, {"action_masks": mask}).reshape(N_SAMPLES, -1)
    masked = policy.get_distribution(th.as_tensor(observation[None]), action_masks=mask[None])
    start = 0
    for dimension, (probabilities,) in enumerate(probabilities_of(masked)):
        allowed = mask[start : start + len(probabilities)]
        start += len(probabilities)
        counts = np.bincount(actions[:, dimension].astype(int), minlength=len(probabilities))
        assert counts[~allowed].sum() == 0
        assert_frequencies(counts, np.where(allowed, probabilities, 0).astype(np.float64))


# ---------------------------------------------------------------------- nothing stale


def outputs(model: EpisodicA2C) -> tuple[np.ndarray, np.ndarray]:
    """What the NumPy actor computes at the next action, and what torch does."""
    observations = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    actor = model._actor
    assert isinstance(actor, NumpyActor)
    with th.no_grad():
        features = model.policy.extract_features(th.as_tensor(observations), model.policy.pi_features_extractor)
        expected = model.policy.action_net(model.policy.mlp_extractor.forward_actor(features)).numpy()
    return actor.latent_and_output(observations)[1].copy(), expected.copy()


def step_optimizer(model: EpisodicA2C, tmp_path: Any) -> None:
    for parameter in model.policy.parameters():
        parameter.grad = th.ones_like(parameter)
    model.policy.optimizer.step()


def set_parameters(model: EpisodicA2C, tmp_path: Any) -> None:
    model.set_parameters(EpisodicA2C("MlpPolicy", "CartPole-v1", seed=5).get_parameters())


def load_policy_state(model: EpisodicA2C, tmp_path: Any) -> None:
    model.policy.load_state_dict(EpisodicA2C("MlpPolicy", "CartPole-v1", seed=5).policy.state_dict())


def replace_data(model: EpisodicA2C, tmp_path: Any) -> None:
    model.policy.action_net.weight.data = th.randn(2, 64)


def replace_data_at_the_old_address(model: EpisodicA2C, tmp_path: Any) -> None:
    """Freed memory is handed out again at once, unless the actor holds it."""
    for _ in range(5):
        model.policy.action_net.weight.data = th.randn(2, 64)


def replace_parameter(model: EpisodicA2C, tmp_path: Any) -> None:
    model.policy.action_net.weight = nn.Parameter(th.randn(2, 64))


def write_in_place(model: EpisodicA2C, tmp_path: Any) -> None:
    with th.no_grad():
        model.policy.mlp_extractor.policy_net[0].weight.mul_(3.0)


def keep_training(model: EpisodicA2C, tmp_path: Any) -> None:
    model.learn(300)


CHANGES = [
    *(step_optimizer, set_parameters, load_policy_state, replace_data, replace_data_at_the_old_address),
    *(replace_parameter, write_in_place, keep_training),
]


def pretend_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none here. An actor for another device makes copies instead of views, so this one does."""
    for module in (actors, plain_mlp):
        monkeypatch.setattr(module, "to_numpy", lambda tensor: tensor.detach().cpu().numpy().copy())
    monkeypatch.setattr(plain_mlp, "_is_on_cpu", lambda layer: False)


@pytest.mark.parametrize("is_on_another_device", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_the_next_action_sees_every_change(
    change: Any, is_on_another_device: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", seed=0, device="cpu")
    if is_on_another_device:
        pretend_another_device(monkeypatch)
        model._setup_actor()
    before, expected = outputs(model)
    np.testing.assert_allclose(before, expected, rtol=1e-5, atol=1e-6)
    change(model, tmp_path)
    if is_on_another_device and change in (step_optimizer, keep_training):
        # Fused optimizers do not count their changes (`_version`), but a rollout begins after each of their steps
        model._refresh_actor()
    after, expected = outputs(model)
    assert np.abs(after - before).max() > 1e-4
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-5)


def write_log_std(policy: Any) -> None:
    with th.no_grad():
        policy.log_std.fill_(-20)


def replace_log_std(policy: Any) -> None:
    policy.log_std = nn.Parameter(th.full((1,), -20.0))


def replace_data_of_log_std(policy: Any) -> None:
    policy.log_std.data = th.full((1,), -20.0)


@pytest.mark.parametrize("is_on_another_device", [False, True])
@pytest.mark.parametrize("change", [write_log_std, replace_log_std, replace_data_of_log_std])
def test_the_next_action_sees_another_standard_deviation(
    change: Any, is_on_another_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_on_another_device:
        pretend_another_device(monkeypatch)
    model = EpisodicA2C("MlpPolicy", "Pendulum-v1", seed=0, device="cpu")
    observations = np.ones((50, 3), np.float32)
    assert model._actor.name == "numpy"
    assert model._sample_actions(observations, {}).std() == pytest.approx(1, rel=0.5)
    change(model.policy)
    assert model._sample_actions(observations, {}).std() < 1e-6


def test_a_replaced_module_or_policy_is_seen_at_the_next_rollout(tmp_path: Any) -> None:
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", seed=0, device="cpu").learn(100)
    model.policy.mlp_extractor.policy_net[0] = nn.Linear(4, 64)
    model.learn(100)
    np.testing.assert_allclose(*outputs(model), rtol=1e-5, atol=1e-5)
    model.policy = EpisodicA2C("MlpPolicy", "CartPole-v1", seed=5, device="cpu").policy
    model.learn(100)
    np.testing.assert_allclose(*outputs(model), rtol=1e-5, atol=1e-5)
    # NumPy cannot run this policy
    model.policy.mlp_extractor.policy_net[1] = nn.Dropout(0.1)
    model.learn(100)
    assert isinstance(model._actor, TorchActor)
    model.save(tmp_path / "model")
    np.testing.assert_allclose(*outputs(EpisodicA2C.load(tmp_path / "model")), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- which one


class OwnDistribution(ActorCriticPolicy):
    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
        return super()._get_action_dist_from_latent(2 * latent_pi)


class OwnSampling(ActorCriticPolicy):
    """Overrides `forward`, as users do to mask or explore: SB3 collects with it."""

    n_calls = 0

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> Any:
        OwnSampling.n_calls += 1
        return super().forward(obs, deterministic)


class SquashedPolicy(ActorCriticPolicy):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.action_dist = SquashedDiagGaussianDistribution(1)


def test_actions_come_from_the_policys_own_way_of_sampling() -> None:
    model = EpisodicA2C(OwnSampling, "CartPole-v1", device="cpu")
    assert "a way of its own" in str(inspect(model.policy))
    OwnSampling.n_calls = 0
    model.learn(100)
    assert OwnSampling.n_calls == 100

    model = EpisodicA2C(SquashedPolicy, "Pendulum-v1", policy_kwargs={"log_std_init": 2.0}, device="cpu")
    assert "SquashedDiagGaussianDistribution" in str(reason_against_numpy(inspect(model.policy)))
    model.learn(200)
    assert np.abs(model.rollout_buffer.actions).max() <= 1


class OwnFeatures(ActorCriticPolicy):
    """SB3's `forward` and `evaluate_actions` call this method, its `get_distribution` does not."""

    def extract_features(self, obs: Any, features_extractor: Any = None) -> Any:
        return -super().extract_features(obs, features_extractor)


def test_actions_come_from_the_features_that_training_sees() -> None:
    model = EpisodicA2C(OwnFeatures, "CartPole-v1", device="cpu", seed=0)
    policy = model.policy
    assert "a way of its own" in str(inspect(policy))
    with th.no_grad():
        policy.action_net.weight.mul_(1_000)
    observations = np.array([[0.5, -1.0, 0.3, 1.0]], np.float32)
    _, log_prob, _ = policy.evaluate_actions(th.as_tensor(observations), th.zeros(1))
    expected = log_prob.exp().item()
    # With the features of the base class, the other action is the likely one
    _, plain_log_prob, _ = policy.evaluate_actions(th.as_tensor(-observations), th.zeros(1))
    assert abs(plain_log_prob.exp().item() - expected) > 0.5
    actions = [int(model._sample_actions(observations, {})[0]) for _ in range(500)]
    assert abs(actions.count(0) / 500 - expected) < 0.1


@pytest.mark.parametrize("name", ["forward", "extract_features"])
def test_a_method_that_was_put_on_the_policy_is_called(name: str) -> None:
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", device="cpu")
    method, calls = getattr(model.policy, name), []
    setattr(model.policy, name, lambda *args, **kwargs: calls.append(1) or method(*args, **kwargs))
    model.learn(100)
    assert len(calls) >= 100


@pytest.mark.parametrize("policy, observation", [("MlpPolicy", "box"), ("CnnPolicy", "image"), ("MultiInputPolicy", "dict")])
@pytest.mark.parametrize("action", ["discrete", "box"])
def test_the_torch_actor_runs_the_actor_alone(
    policy: Any, observation: str, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = vectorized(lambda _: TargetEnv(OBSERVATION_SPACES[observation], ACTION_SPACES[action]), 2)
    model = EpisodicA2C(policy, env, actor="torch", device="cpu")
    modes: list[bool] = []
    model.policy.action_net.register_forward_hook(
        lambda module, x, y: modes.append((th.is_grad_enabled(), th.is_inference_mode_enabled()))
    )

    def refuse(*args: Any) -> Any:
        raise AssertionError("not needed for an action")

    model.policy.value_net.register_forward_hook(refuse)
    model.policy.mlp_extractor.value_net.register_forward_hook(refuse)
    monkeypatch.setattr(type(model.policy.action_dist), "log_prob", refuse)
    assert model.env is not None
    assert len(model._sample_actions(model.env.reset(), {})) == 2
    # Modules that keep a tensor can still be trained with it
    assert modes == [(False, False)]


def test_distributions_check_their_arguments_also_while_collecting() -> None:
    """Validation is set for the whole process: another thread may rely on it."""
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", device="cpu", actor="torch")
    get_distribution, checks = model.policy.get_distribution, []

    def watched(*args: Any) -> Any:
        distribution = get_distribution(*args)
        checks.append(distribution.distribution._validate_args)
        return distribution

    model.policy.get_distribution = watched
    model.learn(50)
    assert checks == [True] * 50
    logits_of_nan = th.tensor([np.nan, 0.0])
    with pytest.raises(ValueError, match="constraint"):
        th.distributions.Categorical(logits=logits_of_nan)
    with pytest.raises(ValueError, match="too large"):
        model._actor.sample(np.full((1, 4), np.nan, np.float32), {})
    with pytest.raises(ValueError, match="constraint"):
        th.distributions.Categorical(logits=logits_of_nan)


class Steps(gym.Env):
    """Remembers its actions, ``(2, 2)`` numbers."""

    observation_space = spaces.Box(-1, 1, (3,))
    action_space = spaces.Box(np.array([[-1, -2], [-0.1, -4]], np.float32), np.array([[0.5, 1], [2, 0]], np.float32))

    def __init__(self) -> None:
        self.actions: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(3, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.actions.append(action.copy())
        return np.zeros(3, np.float32), 1.0, len(self.actions) % 20 == 0, False, {}


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("choice", ["numpy", "torch"])
def test_actions_are_clipped_in_each_of_their_dimensions(choice: Any, n_envs: int) -> None:
    envs = [Steps() for _ in range(n_envs)]
    env = vectorized(lambda index: envs[index], n_envs)
    model = EpisodicA2C(
        "MlpPolicy", env, learning_rate=0.0, actor=choice, policy_kwargs={"log_std_init": 1.0}, device="cpu", seed=0
    )
    sampled: list[np.ndarray] = []
    model.learn(60 * n_envs, callback=lambda locals_, _: sampled.append(locals_["actions"]) or True)
    assert sampled[0].shape == (n_envs, 2, 2)
    for index, env in enumerate(envs):
        expected = np.stack([np.clip(actions[index], env.action_space.low, env.action_space.high) for actions in sampled])
        np.testing.assert_array_equal(np.stack(env.actions), expected)
    # Actions reached all limits
    flat = np.concatenate([env.actions for env in envs])
    assert (flat.max(axis=0) == Steps.action_space.high).all() and (flat.min(axis=0) == Steps.action_space.low).all()
    assert np.stack(sampled).std(axis=(0, 1)) == pytest.approx(np.e, rel=0.3)


class OwnExtractor(FlattenExtractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations) ** 2


@pytest.mark.parametrize(
    "policy, observation, policy_kwargs, reason",
    [
        ("CnnPolicy", "image", {}, "images among the observations"),
        ("MlpPolicy", "image", {}, "images among the observations"),
        ("MultiInputPolicy", "dict", {}, "images among the observations"),
        (OwnDistribution, "box", {}, "OwnDistribution computes its distribution in a way of its own"),
        ("MlpPolicy", "box", {"features_extractor_class": OwnExtractor}, "features extractor is a OwnExtractor"),
        ("MlpPolicy", "box", {"activation_fn": nn.Hardsigmoid}, "a layer Hardsigmoid"),
    ],
)
def test_everything_else_is_done_by_torch(policy: Any, observation: str, policy_kwargs: dict, reason: str) -> None:
    env = vectorized(lambda _: TargetEnv(OBSERVATION_SPACES[observation], ACTION_SPACES["discrete"]), 1)
    model = EpisodicA2C(policy, env, policy_kwargs=policy_kwargs, device="cpu")
    assert isinstance(model._actor, TorchActor)
    assert reason in str(reason_against_numpy(inspect(model.policy)))
    model.learn(10)
    with pytest.raises(ValueError, match=rf'`actor` is "numpy", but.*{reason}.*actor="auto" or "torch"'):
        EpisodicA2C(policy, env, policy_kwargs=policy_kwargs, actor="numpy")


class Clamp(nn.Module):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return x.clamp(-1, 1)


def keep_as_buffer(policy: Any) -> None:
    log_std = policy.log_std.detach()
    del policy.log_std
    policy.register_buffer("log_std", log_std)


@pytest.mark.parametrize(
    "change",
    [
        lambda policy: nn.utils.parametrize.register_parametrization(policy, "log_std", Clamp()),
        lambda policy: setattr(policy, "log_std", nn.Parameter(policy.log_std.double())),
        keep_as_buffer,
    ],
)
def test_a_standard_deviation_that_is_no_plain_parameter(change: Any) -> None:
    model = EpisodicA2C("MlpPolicy", "Pendulum-v1", seed=0, device="cpu")
    change(model.policy)
    model.policy.optimizer = th.optim.Adam(model.policy.parameters())
    model.learn(400)
    assert model._actor.name == "torch"
    assert model._n_updates == 2


def test_hooks_are_not_passed_over() -> None:
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", device="cpu")
    model.policy.action_net.register_forward_hook(lambda module, inputs, output: output + 1)
    assert "hooks" in str(inspect(model.policy))
    model.learn(100)
    assert isinstance(model._actor, TorchActor)


class Residual(nn.Sequential):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return x.sum(dim=-1, keepdim=True) + super().forward(x)


def remove_bias(policy: Any) -> None:
    policy.action_net.bias = None


def transpose(policy: Any) -> None:
    # At the same address
    policy.mlp_extractor.policy_net[2].weight.data = policy.mlp_extractor.policy_net[2].weight.data.T


def change_slope(policy: Any) -> None:
    policy.mlp_extractor.policy_net[1].negative_slope = 0.9


def patch_forward(policy: Any) -> None:
    forward = policy.action_net.forward
    policy.action_net.forward = lambda x: forward(x) + th.tensor([3.0, 0.0])


def replace_hidden_layers(policy: Any) -> None:
    policy.mlp_extractor.policy_net = Residual(*policy.mlp_extractor.policy_net)


@pytest.mark.parametrize(
    "change, actor",
    [
        (remove_bias, "numpy"),
        (transpose, "numpy"),
        (change_slope, "numpy"),
        (patch_forward, "torch"),
        (replace_hidden_layers, "torch"),
        (lambda policy: nn.utils.parametrizations.weight_norm(policy.mlp_extractor.policy_net[2]), "torch"),
        (lambda policy: prune.l1_unstructured(policy.mlp_extractor.policy_net[2], "weight", 0.5), "torch"),
        (lambda policy: policy.features_extractor.flatten.register_forward_hook(lambda module, x, y: 0 * y), "torch"),
    ],
)
@pytest.mark.filterwarnings("ignore:No episode ended")
def test_a_changed_module_is_seen_at_the_next_rollout(change: Any, actor: str) -> None:
    policy_kwargs = {"activation_fn": nn.LeakyReLU}
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", policy_kwargs=policy_kwargs, seed=0, device="cpu").learn(100)
    change(model.policy)
    model.learn(5)
    assert model._actor.name == actor
    if actor == "numpy":
        np.testing.assert_allclose(*outputs(model), rtol=1e-5, atol=1e-5)


def test_the_choice_is_said_and_can_be_forced(capsys: pytest.CaptureFixture, tmp_path: Any) -> None:
    for actor, name in (("auto", "numpy"), ("numpy", "numpy"), ("torch", "torch")):
        model = EpisodicA2C("MlpPolicy", "CartPole-v1", actor=actor, verbose=1, device="cpu")
        assert f"Sampling actions with the {name} actor" in capsys.readouterr().out
        assert model._actor.name == name
        model.save(tmp_path / "model")
        assert EpisodicA2C.load(tmp_path / "model")._actor.name == name
    assert MaskableEpisodicA2C("MlpPolicy", "CartPole-v1", use_masking=False)._actor.name == "numpy"


@pytest.mark.parametrize("actor", ["numpy", "torch"])
def test_seeds(actor: Any) -> None:
    def parameters(seed: int, **kwargs: Any) -> th.Tensor:
        model = EpisodicA2C("MlpPolicy", "CartPole-v1", actor=actor, seed=seed, device="cpu").learn(300)
        return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach()

    assert th.equal(parameters(1), parameters(1))
    assert not th.equal(parameters(1), parameters(2))

    # Reseeding a model repeats what it does from there on
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", actor=actor, learning_rate=0.0, seed=1, device="cpu")
    env: Any = model.get_env()
    observations = env.reset()
    drawn = []
    for _ in range(2):
        model.set_random_seed(7)
        drawn.append([int(model._sample_actions(observations, {})[0]) for _ in range(50)])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 2


def test_numpy_and_torch_actors_start_from_the_same_network() -> None:
    """The random numbers of sampling are drawn after the network is initialised, as in A2C."""
    networks = [
        EpisodicA2C("MlpPolicy", "CartPole-v1", actor=actor, seed=3).policy.state_dict() for actor in ("numpy", "torch")
    ]
    assert all(th.equal(networks[0][name], networks[1][name]) for name in networks[0])


def test_adam_is_fused_unless_told_otherwise() -> None:
    def optimizer(**policy_kwargs: Any) -> th.optim.Optimizer:
        return EpisodicA2C("MlpPolicy", "CartPole-v1", policy_kwargs=policy_kwargs, device="cpu").policy.optimizer

    assert optimizer().defaults["fused"] is True
    assert optimizer().defaults["eps"] == 1e-5
    own = optimizer(optimizer_kwargs={"eps": 1e-3, "betas": (0.8, 0.9)})
    assert (own.defaults["fused"], own.defaults["eps"], own.defaults["betas"]) == (True, 1e-3, (0.8, 0.9))
    assert optimizer(optimizer_kwargs={"fused": False}).defaults["fused"] is False
    assert optimizer(optimizer_kwargs={"foreach": True}).defaults["fused"] is None
    assert type(optimizer(optimizer_class=th.optim.RMSprop)) is th.optim.RMSprop


@pytest.mark.slow
def test_learning_is_the_same_with_either_actor() -> None:
    """CartPole's median number of env steps to solved. The two are samples of one distribution."""
    from tests.test_learning import solve_cartpole

    solved_at = {
        actor: [solve_cartpole(seed, 150_000, policy="MlpPolicy", actor=actor) or 150_000 for seed in range(100, 112)]
        for actor in ("numpy", "torch")
    }
    print(solved_at)
    assert np.median(solved_at["numpy"]) == pytest.approx(np.median(solved_at["torch"]), rel=0.2)
    assert stats.mannwhitneyu(solved_at["numpy"], solved_at["torch"]).pvalue > 0.01


@pytest.mark.parametrize("change", ["prune", "weight_norm", "no_bias", "no_critic_bias"])
@pytest.mark.parametrize("when", ["_on_step", "_on_rollout_end"])
def test_layers_that_are_changed_during_a_rollout(change: str, when: str) -> None:
    """The actor follows at the next rollout at the latest, training at once."""

    def apply(policy: Any) -> None:
        if change == "prune":
            prune.l1_unstructured(policy.action_net, "weight", 0.5)
        elif change == "weight_norm":
            nn.utils.parametrizations.weight_norm(policy.action_net)
        else:
            (policy.action_net if change == "no_bias" else policy.value_net).bias = None

    class Change(BaseCallback):
        def _on_step(self) -> bool:
            return self.change("_on_step")

        def _on_rollout_end(self) -> None:
            self.change("_on_rollout_end")

        def change(self, now: str) -> bool:
            if now == when and not self.is_changed:
                self.is_changed = True
                apply(self.model.policy)
                self.model.policy.optimizer = th.optim.Adam(self.model.policy.parameters())
            return True

        is_changed = False

    callback = Change()
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", batch_size=5, seed=0, device="cpu").learn(300, callback=callback)
    assert callback.is_changed and model._n_updates > 3
