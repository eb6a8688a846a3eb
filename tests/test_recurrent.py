"""RecurrentEpisodicA2C: its states while collecting and in training, and that it remembers."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from sb3_contrib.ppo_recurrent import MlpLstmPolicy
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch.nn.utils.rnn import pad_sequence

from sb3_episodic_a2c import EpisodicA2C, MlpPolicy, RecurrentEpisodicA2C
from sb3_episodic_a2c.recurrent import _interleave
from sb3_episodic_a2c.tools.benchmark import recurrent_update_seconds
from tests.variant_envs import ACTION_SPACES, GradientRecord, LogProbCheck, RandomEnv, make_random_envs, randomize

CRITICS: dict[str, dict[str, Any]] = {
    "separate": dict(enable_critic_lstm=True),
    "shared": dict(enable_critic_lstm=False, shared_lstm=True),
    "none": dict(enable_critic_lstm=False),
    "separate_2_layers": dict(enable_critic_lstm=True, n_lstm_layers=2),
    "shared_2_layers": dict(enable_critic_lstm=False, shared_lstm=True, n_lstm_layers=2),
    "separate_extractors": dict(enable_critic_lstm=True, share_features_extractor=False),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    th.set_num_threads(1)


def make_model(env: gym.Env | DummyVecEnv, critic: str = "separate", cls: type = RecurrentEpisodicA2C, **kwargs: Any) -> Any:
    """A small model whose actions really depend on its memory."""
    policy = "MultiInputLstmPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpLstmPolicy"
    policy_kwargs = dict(lstm_hidden_size=8, net_arch=[8], **CRITICS[critic])
    model = cls(policy, env, policy_kwargs=policy_kwargs, seed=0, device="cpu", **kwargs)
    randomize(model.policy)
    return model


def evaluate_by_sb3_contrib(policy: Any, samples: Any) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """Values, log-probabilities, entropies by padding and sb3-contrib's own ``evaluate_actions``."""
    lengths = list(samples.episode_lengths)

    def pad(tensor: th.Tensor) -> th.Tensor:
        padded = pad_sequence(tensor.split(lengths), batch_first=True)
        return padded.flatten(end_dim=1)

    observations = samples.observations
    observations = (
        {key: pad(value) for key, value in observations.items()} if isinstance(observations, dict) else pad(observations)
    )
    zeros = th.zeros(policy.lstm_actor.num_layers, len(lengths), policy.lstm_actor.hidden_size)
    states = RNNStates((zeros, zeros), (zeros, zeros))
    is_real = pad(th.ones(sum(lengths))) > 0
    results = policy.evaluate_actions(observations, pad(samples.actions), states, th.zeros(len(is_real)))
    return tuple(result.flatten()[is_real] for result in results)


# ---------------------------------------------------------------------- collecting and training agree


@pytest.mark.parametrize("critic", ["separate", "shared", "none", "separate_2_layers"])
@pytest.mark.parametrize(
    ("n_envs", "partial_episodes"),
    [(3, "carry"), *(pytest.param(*rest, marks=pytest.mark.slow) for rest in ((1, "carry"), (3, "discard")))],
)
@pytest.mark.parametrize("is_dict", [False, True])
@pytest.mark.parametrize("space", list(ACTION_SPACES))
def test_training_sees_the_distribution_that_was_sampled_from(space, is_dict, n_envs, partial_episodes, critic):
    env = make_random_envs(ACTION_SPACES[space], n_envs, is_dict=is_dict)
    # No learning, so that the head of a carried episode comes from the same parameters
    model = make_model(env, critic, learning_rate=0.0, partial_episodes=partial_episodes, n_episodes=3)
    check = LogProbCheck()
    model.learn(60 * n_envs, callback=check)
    # Episodes in flight, and their states, go on in the next call
    model.learn(60 * n_envs, callback=check, reset_num_timesteps=False)
    assert check.n_compared > 60


def test_training_sees_it_while_learning_too():
    model = make_model(make_random_envs(ACTION_SPACES["discrete"], n_envs=3), partial_episodes="discard", learning_rate=0.01)
    check = LogProbCheck()
    model.learn(600, callback=check)
    assert check.n_compared > 200


class FreshLogProbCheck(LogProbCheck):
    """Of the steps made since the last update only: the parameters that training recomputes them with are the same."""

    def _on_training_start(self) -> None:
        self.n_compared_with_stale_head = 0

    def _on_rollout_start(self) -> None:
        self.sampled.clear()

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        observations, log_probs = self._id(buffer.observations)[:, 0], buffer.log_probs[:, 0]
        expected = np.array([self.sampled.get(observation.tobytes(), np.nan) for observation in observations])
        is_fresh = ~np.isnan(expected)
        np.testing.assert_allclose(log_probs[is_fresh], expected[is_fresh], atol=1e-5, rtol=1e-5)
        for episode in np.split(is_fresh, np.cumsum(buffer.episode_lengths)[:-1]):
            self.n_compared_with_stale_head += 0 if episode[0] else episode.sum()


@pytest.mark.parametrize("critic", list(CRITICS))
@pytest.mark.parametrize(("is_dict", "batch_size"), [(False, None), (True, 10)])
def test_an_episode_goes_on_with_the_memory_of_the_new_parameters(is_dict, batch_size, critic):
    env = make_random_envs(ACTION_SPACES["discrete"], n_envs=4, is_dict=is_dict)
    model = make_model(env, critic, learning_rate=0.01, batch_size=batch_size)
    check = FreshLogProbCheck()
    model.learn(500, callback=check)
    # The budget ends within episodes. Parameters may also change between two calls
    assert model.rollout_buffer.running_steps.any()
    randomize(model.policy, seed=1)
    model.learn(500, callback=check, reset_num_timesteps=False)
    assert model._n_updates > 20
    assert check.n_compared_with_stale_head > 100


@pytest.mark.parametrize("use_expln", [False, True])
def test_training_sees_it_with_state_dependent_exploration(use_expln):
    env = make_random_envs(ACTION_SPACES["box"], n_envs=3)
    model = RecurrentEpisodicA2C(
        "MlpLstmPolicy",
        env,
        learning_rate=0.0,
        use_sde=True,
        sde_sample_freq=4,
        policy_kwargs=dict(lstm_hidden_size=8, net_arch=[8], use_expln=use_expln),
    )
    check = LogProbCheck()
    model.learn(200, callback=check)
    assert check.n_compared > 100


class NeverZeroed(RecurrentEpisodicA2C):
    """Planted fault: an episode goes on with the memory of the one before."""

    def _sample_actions(self, observations, policy_inputs):
        starts, self._last_episode_starts = self._last_episode_starts, np.zeros(self.n_envs, dtype=bool)
        actions = super()._sample_actions(observations, policy_inputs)
        self._last_episode_starts = starts
        return actions


class AlwaysZeroed(RecurrentEpisodicA2C):
    """Planted fault: no memory while collecting."""

    def _sample_actions(self, observations, policy_inputs):
        starts, self._last_episode_starts = self._last_episode_starts, np.ones(self.n_envs, dtype=bool)
        actions = super()._sample_actions(observations, policy_inputs)
        self._last_episode_starts = starts
        return actions


class SwappedStates(RecurrentEpisodicA2C):
    """Planted fault: environments get each other's memory."""

    def _sample_actions(self, observations, policy_inputs):
        self._lstm_states = RNNStates(*(tuple(state.flip(1) for state in states) for states in self._lstm_states))
        return super()._sample_actions(observations, policy_inputs)


class ForgetfulBetweenRollouts(RecurrentEpisodicA2C):
    """Planted fault: episodes that are carried over lose their memory."""

    def _recall(self, running):
        pass


class MemoryOfOldParameters(RecurrentEpisodicA2C):
    """Planted fault: episodes that are carried over keep the memory that the parameters before the update made."""

    def _start_rollout(self, env):
        states = self._lstm_states
        super()._start_rollout(env)
        self._lstm_states = states or self._lstm_states


@pytest.mark.parametrize("fault", [NeverZeroed, AlwaysZeroed, SwappedStates, ForgetfulBetweenRollouts])
def test_a_wrong_state_would_be_seen(fault):
    model = make_model(make_random_envs(ACTION_SPACES["discrete"], n_envs=3), cls=fault, learning_rate=0.0)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        model.learn(600, callback=LogProbCheck())


@pytest.mark.parametrize("fault", [MemoryOfOldParameters, ForgetfulBetweenRollouts])
def test_the_memory_of_old_parameters_would_be_seen(fault):
    model = make_model(make_random_envs(ACTION_SPACES["discrete"], n_envs=4), cls=fault, learning_rate=0.01)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        model.learn(500, callback=FreshLogProbCheck())


@pytest.mark.parametrize("critic", list(CRITICS))
@pytest.mark.parametrize("space", list(ACTION_SPACES))
def test_evaluation_and_its_gradient_are_those_of_sb3_contrib(space, critic):
    # All that is complete when the budget ends
    model = make_model(
        make_random_envs(ACTION_SPACES[space], n_envs=3, is_dict=True), critic, learning_rate=0.0, n_episodes=100
    )
    model.learn(100)
    (samples,) = model.rollout_buffer.get()
    assert len(set(samples.episode_lengths)) > 3

    gradients = []
    for evaluate in (model._evaluate_actions, lambda samples: evaluate_by_sb3_contrib(model.policy, samples)):
        outputs = evaluate(samples)
        weights = th.linspace(-1, 1, len(outputs[0]))
        model.policy.zero_grad()
        sum((output * weights).sum() for output in outputs).backward()
        gradients.append((outputs, {name: parameter.grad.clone() for name, parameter in model.policy.named_parameters()}))
    for ours, theirs in zip(gradients[0][0], gradients[1][0], strict=True):
        assert ours.shape == (len(samples.returns),)
        np.testing.assert_allclose(ours.detach(), theirs.detach(), atol=1e-5, rtol=1e-5)
    for name, gradient in gradients[0][1].items():
        np.testing.assert_allclose(gradient, gradients[1][1][name], atol=1e-4, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("lengths", [[1], [7], [3, 3, 3], [1, 5, 2, 5, 1], [100, 1, 1], list(range(1, 30))])
def test_interleaving_is_dense_and_reversible(lengths):
    positions, pieces = _interleave(np.array(lengths))
    assert sorted(positions) == list(range(sum(lengths)))
    assert sum(n_steps * n_running for n_steps, n_running in pieces) == sum(lengths)
    assert len(pieces) == len(set(lengths))
    # Step after step, the longest episode first, each in the same place as the step before
    transitions = [(step, -length, index) for index, length in enumerate(lengths) for step in range(length)]
    assert np.array_equal(np.argsort(positions), sorted(range(len(transitions)), key=transitions.__getitem__))


def test_one_very_long_episode_costs_no_padding():
    class Long(RandomEnv):
        def reset(self, **kwargs: Any) -> Any:
            result = super().reset(**kwargs)
            self.steps_left = 3000 if self.n_resets == 0 else 1
            self.n_resets += 1
            return result

        n_resets = 0

    model = make_model(Long(ACTION_SPACES["discrete"]), n_episodes=100, learning_rate=0.0)
    n_rows = []
    model.policy.lstm_actor.register_forward_hook(lambda _, inputs, __: n_rows.append(inputs[0].shape[0] * inputs[0].shape[1]))
    model.learn(3099)
    # 3099 steps were sampled one by one, the update then took them in two dense pieces: 100 episodes, and the rest of one
    assert n_rows[-2:] == [100, 2999]


@pytest.mark.parametrize("batch_size", [1, 10, 25, 10_000])
def test_batches_are_whole_episodes_and_change_nothing_else(batch_size):
    gradients = []
    for size in (None, batch_size):
        model = make_model(make_random_envs(ACTION_SPACES["discrete"], n_envs=3), n_episodes=5, batch_size=size)
        record = GradientRecord(model)
        model.learn(300)
        gradients.append(record.gradients[0])
        lengths = model.rollout_buffer.episode_lengths.tolist()
        batches = list(model.rollout_buffer.get(size, whole_episodes=True))
        assert [length for batch in batches for length in batch.episode_lengths] == lengths
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            n_transitions = sum(batch.episode_lengths)
            # More only for one that is longer, and for single steps, which go with their neighbours
            assert size is None or n_transitions <= size + 1 or n_transitions <= max(batch.episode_lengths) + 2
            # As many as fit
            assert following is None or n_transitions + following.episode_lengths[0] > size
    for name in gradients[0]:
        np.testing.assert_allclose(gradients[1][name], gradients[0][name], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("critic", list(CRITICS))
def test_the_values_of_a_value_epoch(critic):
    """They are those of the update, and cost no pass of what is the actor's alone."""

    def note(calls, module, *_):
        calls.append(module)

    class Compare(BaseCallback):
        n_compared = 0

        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            policy = self.model.policy
            actors = {policy.pi_features_extractor: policy.share_features_extractor, policy.lstm_actor: policy.shared_lstm}
            for samples in self.model.rollout_buffer.get(None, whole_episodes=True):
                calls = []
                hooks = [module.register_forward_hook(partial(note, calls)) for module in actors]
                values = self.model._evaluate_values(samples)
                for hook in hooks:
                    hook.remove()
                assert {module: module in calls for module in actors} == actors
                th.testing.assert_close(values, self.model._evaluate_actions(samples)[0])
                self.n_compared += 1

    compare = Compare()
    env = make_random_envs(ACTION_SPACES["discrete"], n_envs=3)
    model = make_model(env, critic, n_value_epochs=2, learning_rate=0.01).learn(200, callback=compare)
    assert compare.n_compared == model._n_updates > 2


# ---------------------------------------------------------------------- the value after a time limit


class TerminalValueCheck(BaseCallback):
    """Compares the value after each time limit with that of the whole episode evaluated by hand, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.n_compared = 0

    def _on_training_start(self) -> None:
        self.observations: list[list[Any]] = [[] for _ in range(self.training_env.num_envs)]
        self.expected: list[tuple[int, int, float]] = []

    def _value(self, observations: list[Any]) -> float:
        policy = self.model.policy
        zeros = th.zeros(policy.lstm_actor.num_layers, 1, policy.lstm_actor.hidden_size)
        states = RNNStates((zeros, zeros), (zeros, zeros))
        with th.no_grad():
            for observation in observations[:-1]:
                tensor, _ = policy.obs_to_tensor(observation)
                *_, states = policy(tensor, states, th.zeros(1))
            tensor, _ = policy.obs_to_tensor(observations[-1])
            return policy.predict_values(tensor, states.vf, th.zeros(1)).item()

    def _on_step(self) -> bool:
        last_obs = self.model._last_obs
        for index, (done, info) in enumerate(zip(self.locals["dones"], self.locals["infos"], strict=True)):
            is_dict = isinstance(last_obs, dict)
            self.observations[index].append({k: v[index] for k, v in last_obs.items()} if is_dict else last_obs[index].copy())
            if done:
                observations = [*self.observations[index], info["terminal_observation"]]
                self.observations[index] = []
                is_truncated = info["TimeLimit.truncated"]
                self.expected.append((index, len(observations) - 1, self._value(observations) if is_truncated else 0.0))
        return True

    def _on_rollout_end(self) -> None:
        episodes = self.model.rollout_buffer.episodes
        assert len(episodes) == len(self.expected)
        for episode, (env_index, length, value) in zip(episodes, self.expected, strict=True):
            assert (episode.env_index, episode.end_row - episode.first_row) == (env_index, length)
            assert episode.terminal_value == pytest.approx(value, abs=1e-5, rel=1e-5)
            self.n_compared += value != 0.0
        self.expected = []


@pytest.mark.parametrize("critic", list(CRITICS))
@pytest.mark.parametrize(("is_dict", "learning_rate"), [(False, 0.0), (True, 0.0), (True, 0.01)])
def test_the_value_after_a_time_limit_remembers_the_episode(is_dict, learning_rate, critic):
    model = make_model(
        make_random_envs(ACTION_SPACES["discrete"], n_envs=3, is_dict=is_dict),
        critic,
        learning_rate=learning_rate,
        standardize_returns=None,
    )
    check = TerminalValueCheck()
    model.learn(400, callback=check)
    assert check.n_compared > 15


class WrongCriticState(RecurrentEpisodicA2C):
    """Planted fault: the state of another environment."""

    def _predict_terminal_values(self, observations, env_indices):
        return super()._predict_terminal_values(observations, (env_indices + 1) % self.n_envs)


def test_a_wrong_critic_state_would_be_seen():
    model = make_model(
        make_random_envs(ACTION_SPACES["discrete"], n_envs=3),
        cls=WrongCriticState,
        learning_rate=0.0,
        standardize_returns=None,
    )
    with pytest.raises(AssertionError):
        model.learn(400, callback=TerminalValueCheck())


# ---------------------------------------------------------------------- refusals, as part of SB3


def test_refuses_a_policy_without_memory():
    with pytest.raises(ValueError, match=r"ActorCriticPolicy has no LSTM.*RecurrentActorCriticPolicy"):
        RecurrentEpisodicA2C(MlpPolicy, "CartPole-v1")
    with pytest.raises(ValueError, match=r"'MlpPolicy' is unknown.*MlpLstmPolicy"):
        RecurrentEpisodicA2C("MlpPolicy", "CartPole-v1")


class ForwardOfItsOwn(MlpLstmPolicy):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class SequencesOfItsOwn(MlpLstmPolicy):
    @staticmethod
    def _process_sequence(features, lstm_states, episode_starts, lstm):
        return MlpLstmPolicy._process_sequence(features, lstm_states, episode_starts, lstm)

    def evaluate_actions(self, *args, **kwargs):
        return super().evaluate_actions(*args, **kwargs)


class LayersOfItsOwn(MlpLstmPolicy):
    """Its methods are all called."""

    n_calls = 0

    def extract_features(self, *args, **kwargs):
        self.n_calls += 1
        return super().extract_features(*args, **kwargs)

    def _get_action_dist_from_latent(self, latent_pi):
        self.n_calls += 1
        return super()._get_action_dist_from_latent(latent_pi)


def test_refuses_methods_that_would_not_be_called():
    with pytest.raises(ValueError, match="ForwardOfItsOwn overrides forward, which would not be called"):
        RecurrentEpisodicA2C(ForwardOfItsOwn, "CartPole-v1")
    with pytest.raises(ValueError, match="SequencesOfItsOwn overrides evaluate_actions, _process_sequence, which"):
        RecurrentEpisodicA2C(SequencesOfItsOwn, "CartPole-v1")

    model = RecurrentEpisodicA2C(LayersOfItsOwn, "CartPole-v1", policy_kwargs=dict(lstm_hidden_size=8))
    model.learn(20)
    assert model.policy.n_calls >= 40
    # Replaced on the object
    model.policy.get_distribution = model.policy.get_distribution
    with pytest.raises(ValueError, match="LayersOfItsOwn overrides get_distribution"):
        model.learn(20)


@pytest.mark.parametrize("lstm_kwargs", [{"batch_first": True}, {"bidirectional": True}, {"proj_size": 4}])
def test_refuses_an_lstm_of_other_shapes(lstm_kwargs):
    (name,) = lstm_kwargs
    with pytest.raises(ValueError, match=f"`lstm_kwargs` of `policy_kwargs` has {name}={lstm_kwargs[name]}"):
        RecurrentEpisodicA2C("MlpLstmPolicy", "CartPole-v1", policy_kwargs=dict(lstm_kwargs=lstm_kwargs))
    # The default is accepted
    RecurrentEpisodicA2C("MlpLstmPolicy", "CartPole-v1", policy_kwargs=dict(lstm_kwargs={"batch_first": False}))


def test_save_load_continue(tmp_path: Path):
    model = make_model(make_random_envs(ACTION_SPACES["discrete"], n_envs=2))
    model.learn(200)
    model.save(tmp_path / "model")
    data, _, _ = load_from_zip_file(tmp_path / "model")
    assert model._lstm_states is not None and "_lstm_states" not in data

    # Other environments than before, also as many as never before
    loaded = RecurrentEpisodicA2C.load(tmp_path / "model", env=make_random_envs(ACTION_SPACES["discrete"], n_envs=3, seed=5))
    assert loaded._lstm_states is None
    assert loaded.return_statistics == model.return_statistics
    for name, tensor in model.policy.state_dict().items():
        assert th.equal(tensor, loaded.policy.state_dict()[name])
    n_updates = loaded._n_updates
    loaded.learning_rate = 0.0
    loaded._setup_lr_schedule()
    check = LogProbCheck()
    loaded.learn(300, reset_num_timesteps=False, callback=check)
    assert loaded.num_timesteps >= 500 and loaded._n_updates > n_updates and check.n_compared > 100

    # Without a reset, the tail of an episode is one of its own: its head is gone, and so is its state
    env = model.get_env()
    assert not model._last_episode_starts.all()
    continued = RecurrentEpisodicA2C.load(tmp_path / "model", env=env, force_reset=False, learning_rate=0.0)
    check = LogProbCheck()
    continued.learn(200, reset_num_timesteps=False, callback=check)
    assert check.n_compared > 100


def test_predict_with_states():
    model = make_model(make_random_envs(ACTION_SPACES["box"]))
    observations = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    state, actions = None, []
    for observation in observations:
        action, state = model.predict(observation, state=state, episode_start=np.zeros(2, dtype=bool), deterministic=True)
        actions.append(action)
        assert action.shape == (2, 2) and state[0].shape == (1, 2, 8)
    forgetful, _ = model.predict(observations[-1], state=state, episode_start=np.ones(2, dtype=bool), deterministic=True)
    fresh, _ = model.predict(observations[-1], deterministic=True)
    np.testing.assert_allclose(forgetful, fresh, atol=1e-6)
    assert not np.allclose(actions[-1], fresh)
    # One environment, without the leading dimension
    action, _ = model.predict(observations[0, 0], deterministic=True)
    assert action.shape == (2,)


def test_evaluation_on_normalised_observations(tmp_path: Path):
    def make() -> VecNormalize:
        return VecNormalize(make_vec_env(lambda: RandomEnv(ACTION_SPACES["box"]), n_envs=2), norm_reward=False)

    eval_env = make()
    model = make_model(make(), learning_rate=1e-3)
    model.learn(300, callback=EvalCallback(eval_env, eval_freq=60, best_model_save_path=str(tmp_path), verbose=0))
    assert (tmp_path / "best_model.zip").exists()
    rewards, _ = evaluate_policy(model, eval_env, n_eval_episodes=5, return_episode_rewards=True)
    assert len(rewards) == 5


def test_cnn_policy():
    env = gym.wrappers.TransformObservation(
        gym.make("CartPole-v1", max_episode_steps=20),
        lambda observation: np.full((36, 36, 1), 100 * abs(observation[2]), np.uint8),
        spaces.Box(0, 255, (36, 36, 1), np.uint8),
    )
    check = LogProbCheckOfImages()
    model = RecurrentEpisodicA2C("CnnLstmPolicy", env, learning_rate=0.0, policy_kwargs=dict(lstm_hidden_size=8))
    model.learn(60, callback=check)
    assert check.n_compared


class LogProbCheckOfImages(LogProbCheck):
    """With one environment and no learning, transitions are found again by their place."""

    def _on_training_start(self) -> None:
        self.in_order: list[float] = []

    def _on_step(self) -> bool:
        with th.no_grad():
            log_prob = self.model.policy.action_dist.log_prob(th.as_tensor(self.locals["actions"]))
        self.in_order.extend(log_prob.tolist())
        return True

    def _on_rollout_end(self) -> None:
        log_probs = self.model.rollout_buffer.log_probs[:, 0]
        expected, self.in_order = self.in_order[: len(log_probs)], self.in_order[len(log_probs) :]
        np.testing.assert_allclose(log_probs, expected, atol=1e-5)
        self.n_compared += len(expected)


# ---------------------------------------------------------------------- learning


class MemoryEnv(gym.Env):
    """The cue, -1 or 1, is shown at the first step only; the action of the last one earns 1 if it names it."""

    observation_space = spaces.Box(-1.0, 1.0, (2,))
    action_space = spaces.Discrete(2)

    def __init__(self, n_steps: int = 8) -> None:
        self.n_steps = n_steps

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.cue = int(self.np_random.integers(2))
        self.step_index = 0
        return np.array([2 * self.cue - 1, 0], dtype=np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.step_index += 1
        is_over = self.step_index == self.n_steps
        observation = np.array([0, self.step_index / self.n_steps], dtype=np.float32)
        return observation, float(is_over and action == self.cue), is_over, False, {}


# Without entropy, a policy that is sure of itself before it remembers may stay at guessing
MEMORY_KWARGS: dict[str, Any] = dict(learning_rate=5e-3, n_episodes=2, ent_coef=0.03)
MEMORY_POLICY_KWARGS: dict[str, Any] = dict(lstm_hidden_size=32, net_arch=[])


def test_remembers_a_cue_that_a_policy_without_memory_cannot_know():
    env = make_vec_env(MemoryEnv, n_envs=8, seed=0)
    model = RecurrentEpisodicA2C("MlpLstmPolicy", env, seed=0, policy_kwargs=MEMORY_POLICY_KWARGS, **MEMORY_KWARGS)
    # A stochastic policy that is nearly always right is always right when it is greedy
    solve(model, 0.98, 100_000)
    assert evaluate_policy(model, env, n_eval_episodes=100)[0] == 1.0

    # The last observation is the same whatever the cue was, and so is the action: right once in two on average
    plain = EpisodicA2C("MlpPolicy", env, seed=0, **MEMORY_KWARGS)
    plain.learn(20_000)
    assert evaluate_policy(plain, env, n_eval_episodes=400)[0] == pytest.approx(0.5, abs=0.1)


class HiddenVelocity(gym.ObservationWrapper):
    """CartPole without velocities."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,))

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[[0, 2]]


def make_hidden_velocity_envs(seed: int, n_envs: int = 8) -> VecNormalize:
    env = make_vec_env("CartPole-v1", n_envs=n_envs, seed=seed, wrapper_class=HiddenVelocity)
    return VecNormalize(env, norm_reward=False)


HIDDEN_VELOCITY_KWARGS: dict[str, Any] = dict(
    # The gradient of a sum over eight episodes is far above that: all updates get the same weight
    learning_rate=1e-3,
    max_grad_norm=1.0,
    policy_kwargs=dict(lstm_hidden_size=64, enable_critic_lstm=False),
)


def mean_reward(model: Any) -> float:
    """Of the last 100 episodes of training."""
    return float(np.mean([info["r"] for info in model.ep_info_buffer]))


def test_balances_a_pole_without_velocities():
    model = RecurrentEpisodicA2C("MlpLstmPolicy", make_hidden_velocity_envs(0), seed=0, **HIDDEN_VELOCITY_KWARGS)
    model.learn(40_000)
    plain = EpisodicA2C("MlpPolicy", make_hidden_velocity_envs(0), seed=0, learning_rate=1e-3)
    plain.learn(40_000)
    # On the seeds 0 to 9: 127 to 165, and 44 to 56
    assert mean_reward(model) > 85 > mean_reward(plain)


# ---------------------------------------------------------------------- beside RecurrentPPO, for a quiet machine: -m slow -s


class StopWhenSolved(BaseCallback):
    """Stops once the mean reward of the last 100 episodes of training exceeds a threshold."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def _on_step(self) -> bool:
        # Only after an episode: the mean is not worth taking at each step
        if not self.locals["dones"].any() or len(self.model.ep_info_buffer) < 100:
            return True
        return mean_reward(self.model) <= self.threshold


def solve(model: Any, threshold: float, max_steps: int) -> tuple[int, float]:
    """Env steps and seconds of the processor until solved, ``max_steps`` or a little more if it was not."""
    start = time.process_time()
    model.learn(max_steps, callback=StopWhenSolved(threshold))
    return model.num_timesteps, time.process_time() - start


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_solves_cartpole_with_hidden_velocities(seed):
    model = RecurrentEpisodicA2C("MlpLstmPolicy", make_hidden_velocity_envs(seed), seed=seed, **HIDDEN_VELOCITY_KWARGS)
    # On the seeds 0 to 9: 178,576 to 315,720. Some forget what they had learnt, and learn it again
    n_steps, seconds = solve(model, 475, 650_000)
    print(f"\nhidden velocities, seed {seed}: {n_steps} env steps in {seconds:.0f} s")
    assert n_steps < 650_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20, 25))
def test_solves_the_memory_task_beside_recurrent_ppo(seed):
    env = make_vec_env(MemoryEnv, n_envs=8, seed=seed)
    ours = solve(
        RecurrentEpisodicA2C("MlpLstmPolicy", env, seed=seed, policy_kwargs=MEMORY_POLICY_KWARGS, **MEMORY_KWARGS),
        0.98,
        100_000,
    )
    env = make_vec_env(MemoryEnv, n_envs=8, seed=seed)
    # As many transitions a rollout. It makes 10 epochs of them, so the learning rate is lower
    ppo = RecurrentPPO("MlpLstmPolicy", env, n_steps=16, learning_rate=3e-3, policy_kwargs=MEMORY_POLICY_KWARGS, seed=seed)
    theirs = solve(ppo, 0.98, 50_000)
    print(f"\nmemory task, seed {seed}: (env steps, s) RecurrentEpisodicA2C {ours}, RecurrentPPO {theirs}")
    assert ours[0] < 100_000


@pytest.mark.slow
def test_an_update_is_at_least_five_times_as_fast_as_the_pass_of_recurrent_ppo():
    seconds = recurrent_update_seconds(repeats=9)
    print(f"\nan update of 8 episodes of 200 steps: {seconds}")
    ours = seconds.pop("RecurrentEpisodicA2C")
    assert 5 * ours <= min(seconds.values())
