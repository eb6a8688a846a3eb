"""Bad input gets a ValueError that names the argument, the value and the remedy, before anything is changed."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.ppo_recurrent import MlpLstmPolicy
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.dqn.policies import DQNPolicy

from sb3_episodic_a2c import EpisodicA2C, SharedMlpPolicy


class AnyEnv(gym.Env):
    """An environment that is used for its spaces only."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        return self.observation_space.sample(), 0.0, True, False, {}


BOX, TWO = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)


@pytest.mark.parametrize(
    "arguments, value, remedy",
    [
        ({"learning_rate": -1e-3}, "-0.001", "number >= 0"),
        ({"learning_rate": float("nan")}, "nan", "number >= 0"),
        ({"learning_rate": "3e-3"}, "'3e-3'", "function of the progress"),
        ({"n_episodes": 0}, "0", "integer >= 1"),
        ({"n_episodes": -2}, "-2", "integer >= 1"),
        ({"n_episodes": 1.5}, "1.5", "integer >= 1"),
        ({"n_episodes": True}, "True", "integer >= 1"),
        ({"gamma": 1.01}, "1.01", r"\[0, 1\]"),
        ({"gamma": -0.1}, "-0.1", r"\[0, 1\]"),
        ({"gamma": float("nan")}, "nan", r"\[0, 1\]"),
        ({"standardize_returns": "batch"}, "'batch'", "'running', 'episode', 'rollout', None"),
        ({"standardize_returns": True}, "True", "must be one of"),
        ({"handle_timeout_termination": "yes"}, "'yes'", "True or False"),
        ({"partial_episodes": "keep"}, "'keep'", "'carry', 'discard'"),
        ({"huber_delta": 0}, "0", "> 0"),
        ({"detach_advantage": None}, "None", "True or False"),
        ({"ent_coef": "auto"}, "'auto'", "finite number"),
        ({"ent_coef": float("inf")}, "inf", "finite number"),
        ({"vf_coef": -1}, "-1", ">= 0"),
        ({"max_grad_norm": 0}, "0", "None for no clipping"),
        ({"batch_size": 0}, "0", "None for all at once"),
        ({"batch_size": 6.4}, "6.4", "None for all at once"),
        ({"stats_window_size": 0}, "0", "integer >= 1"),
        ({"actor": "jax"}, "'jax'", "'auto', 'numpy', 'torch'"),
        ({"sde_sample_freq": -2}, "-2", "-1 for one a rollout"),
        ({"sde_sample_freq": 0}, "0", "-1 for one a rollout"),
        ({"rollout_buffer_class": RolloutBuffer}, "RolloutBuffer", "EpisodicRolloutBuffer"),
        ({"rollout_buffer_kwargs": 3}, "3", "dict"),
        ({"policy_kwargs": [64]}, r"\[64\]", "dict"),
    ],
)
def test_arguments(arguments: dict[str, Any], value: str, remedy: str) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=rf"`{name}` is .*{value}.*{remedy}"):
        EpisodicA2C("MlpPolicy", "CartPole-v1", **arguments)


@pytest.mark.parametrize("method", ["episode", "rollout"])
def test_time_limit_values_need_a_critic_with_units(method: Any) -> None:
    with pytest.raises(ValueError, match=rf"`handle_timeout_termination` is True.*{method}.*False.*running"):
        EpisodicA2C("MlpPolicy", "CartPole-v1", standardize_returns=method)
    EpisodicA2C("MlpPolicy", "CartPole-v1", standardize_returns=method, handle_timeout_termination=False)


def test_numpy_numbers_are_numbers() -> None:
    model = EpisodicA2C(
        "MlpPolicy",
        "CartPole-v1",
        n_episodes=np.int64(2),
        gamma=np.float32(0.5),
        batch_size=np.int32(8),
        learning_rate=0,
        ent_coef=-0.1,
    )
    model.learn(100)


@pytest.mark.parametrize(
    ("policy", "remedy"),
    [(MlpLstmPolicy, "RecurrentEpisodicA2C"), (MaskableActorCriticPolicy, "MaskableEpisodicA2C"), (DQNPolicy, "MlpPolicy")],
)
def test_policies_of_other_algorithms(policy: type, remedy: str) -> None:
    with pytest.raises(ValueError, match=rf"`policy` {policy.__name__} does not fit EpisodicA2C.*{remedy}"):
        EpisodicA2C(policy, "CartPole-v1")


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match=r"`policy` 'MlpPolice' is unknown.*MlpPolicy.*SharedMlpPolicy"):
        EpisodicA2C("MlpPolice", "CartPole-v1")


@pytest.mark.parametrize(
    "policy, observation_space, action_space, message",
    [
        ("MlpPolicy", BOX, spaces.Dict({"a": TWO}), r"action space Dict.*Box, Discrete, MultiDiscrete, MultiBinary"),
        ("MlpPolicy", BOX, spaces.Tuple([TWO, TWO]), "action space Tuple.*not supported"),
        ("MlpPolicy", BOX, spaces.Box(0, 4, (2,), np.int32), r"action space Box.*whole numbers.*MultiDiscrete"),
        ("MlpPolicy", BOX, spaces.Box(-np.inf, np.inf, (2,)), r"action space Box.*unbounded.*RescaleAction"),
        ("MlpPolicy", BOX, spaces.MultiBinary([2, 2]), r"MultiBinary\(.*several dimensions: flatten"),
        ("MlpPolicy", BOX, spaces.Discrete(3, start=1), r"Discrete\(3, start=1\).*start at 0"),
        ("MlpPolicy", spaces.Discrete(3, start=-1), TWO, r"Discrete\(3, start=-1\).*start at 0"),
        ("MlpPolicy", BOX, spaces.MultiDiscrete([3, 3], start=[1, 1]), r"MultiDiscrete.*start at 0"),
        ("MlpPolicy", spaces.MultiDiscrete([3, 3], start=[1, 1]), TWO, r"MultiDiscrete.*start at 0"),
        ("MlpPolicy", spaces.MultiDiscrete([[3, 3], [2, 2]]), TWO, r"(?s)MultiDiscrete.*several dimensions"),
        ("MlpPolicy", spaces.Tuple([BOX, BOX]), TWO, "observation space Tuple.*FlattenObservation"),
        ("MlpPolicy", spaces.Text(5), TWO, "observation space Text.*not supported"),
        (
            "MultiInputPolicy",
            spaces.Dict({"a": spaces.Dict({"b": BOX})}),
            TWO,
            "not supported because of Dict.*without nesting",
        ),
        ("MlpPolicy", spaces.Dict({"a": BOX}), TWO, "'MlpPolicy' takes no Dict.*MultiInputPolicy"),
        ("SharedMlpPolicy", spaces.Dict({"a": BOX}), TWO, "'SharedMlpPolicy' takes no Dict"),
        ("MultiInputPolicy", BOX, TWO, "'MultiInputPolicy' needs Dict.*MlpPolicy"),
        ("CnnPolicy", BOX, TWO, "'CnnPolicy' needs images.*MlpPolicy"),
    ],
)
def test_spaces(policy: str, observation_space: spaces.Space, action_space: spaces.Space, message: str) -> None:
    for env in (AnyEnv(observation_space, action_space),):
        with pytest.raises(ValueError, match=message):
            EpisodicA2C(policy, env)


def test_spaces_of_a_vec_env() -> None:
    env = DummyVecEnv([lambda: AnyEnv(BOX, spaces.Box(-np.inf, np.inf, (2,)))])
    with pytest.raises(ValueError, match="unbounded"):
        EpisodicA2C("MlpPolicy", env)


def test_gsde_needs_continuous_actions() -> None:
    with pytest.raises(ValueError, match="gSDE"):
        EpisodicA2C("MlpPolicy", "CartPole-v1", use_sde=True)


@pytest.mark.parametrize("net_arch", [{"pi": [64], "vf": [64]}, [0], [64.0], 64])
def test_shared_layers(net_arch: Any) -> None:
    with pytest.raises(ValueError, match=r"`net_arch` of SharedMlpPolicy.*MlpPolicy"):
        EpisodicA2C("SharedMlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": net_arch})
    assert SharedMlpPolicy is EpisodicA2C.policy_aliases["SharedMlpPolicy"]


def test_arguments_given_to_load_are_checked_too(tmp_path: Any) -> None:
    EpisodicA2C("MlpPolicy", "CartPole-v1").save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"`gamma` is 1\.5"):
        EpisodicA2C.load(tmp_path / "model", gamma=1.5)
    assert EpisodicA2C.load(tmp_path / "model", n_episodes=3, gamma=0.5).n_episodes == 3


class NoDerivative(FlattenExtractor):
    """The derivative of the square root at 0 is infinite."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space)
        self.offset = th.nn.Parameter(th.zeros(1))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations) + self.offset.sqrt()


def test_a_gradient_that_is_not_finite_never_reaches_the_optimizer() -> None:
    model = EpisodicA2C(
        "MlpPolicy", "CartPole-v1", policy_kwargs={"features_extractor_class": NoDerivative}, device="cpu", seed=0
    )
    before = th.nn.utils.parameters_to_vector(model.policy.parameters()).detach()
    with pytest.raises(ValueError, match=r"gradient of update 1 is not finite.*as they were.*learning_rate"):
        model.learn(1_000)
    assert th.equal(th.nn.utils.parameters_to_vector(model.policy.parameters()), before)
    assert not model.policy.optimizer.state
    model.predict(np.zeros(4, np.float32))


def test_after_such_a_gradient_the_critic_has_its_units_back() -> None:
    """The statistics had moved, and the critic's last layer with them."""
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", device="cpu", seed=0).learn(500)
    before = th.nn.utils.parameters_to_vector(model.policy.parameters()).detach(), model.return_statistics

    def spoil(parameters: Any) -> th.Tensor:
        return parameters * np.nan

    handle = model.policy.action_net.bias.register_hook(spoil)
    with pytest.raises(ValueError, match="not finite"):
        model.learn(500, reset_num_timesteps=False)
    assert th.equal(th.nn.utils.parameters_to_vector(model.policy.parameters()), before[0])
    assert model.return_statistics == before[1]
    handle.remove()
    model.learn(500, reset_num_timesteps=False)
    assert model.return_statistics != before[1]


class BreaksOnce(AnyEnv):
    """Episodes of 4 steps, one of which has a number that is not finite."""

    def __init__(self, broken_observation: float | np.ndarray = 0.1, broken_reward: float = 1.0) -> None:
        super().__init__(BOX, TWO)
        self.broken_observation, self.broken_reward = broken_observation, broken_reward
        self.t = 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.t += 1
        observation = np.full(2, self.broken_observation if self.t == 10 else 0.1, np.float32)
        return observation, self.broken_reward if self.t == 10 else 1.0, self.t % 4 == 0, False, {}


@pytest.mark.parametrize(
    "env, message",
    [
        (
            BreaksOnce(broken_observation=np.nan),
            r"Environment 0 gave an observation.*step 2 of its episode.*nan.*VecCheckNan",
        ),
        (
            BreaksOnce(broken_observation=np.inf),
            r"Environment 0 gave an observation.*step 2 of its episode.*inf.*VecCheckNan",
        ),
        (
            # tanh makes a finite number of infinity: noticed at the end of the episode
            BreaksOnce(broken_observation=np.array([np.inf, 0.1])),
            r"Environment 0 gave an observation.*step 2 of an episode of 4.*inf.*VecCheckNan",
        ),
        (
            BreaksOnce(broken_reward=np.nan),
            r"return of environment 0 is nan at step 1 of its 4.*reward there was nan.*VecCheckNan",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_never_reaches_training(env: gym.Env, message: str) -> None:
    model = EpisodicA2C("MlpPolicy", env, device="cpu", seed=0)
    with pytest.raises(ValueError, match=message):
        model.learn(1_000)
    assert model._n_updates == 2
    assert np.isfinite(model.return_statistics.mean)
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
    model.predict(np.zeros(2, np.float32))
    # The environment breaks only once: training goes on
    model.learn(100, reset_num_timesteps=False)
    assert model._n_updates == 2 + 25
