"""What users of SB3 and its relatives have reported: each of these went wrong here once, most of them without a word."""

import json
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from hypothesis import given
from hypothesis import strategies as st
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from torch.nn.utils import prune

from sb3_episodic_a2c import EpisodicA2C, MaskableEpisodicA2C, RecurrentEpisodicA2C, load_checkpoint, save_checkpoint
from sb3_episodic_a2c.__main__ import main
from sb3_episodic_a2c.evaluation import pass_size
from sb3_episodic_a2c.policies import rescale_value_head
from sb3_episodic_a2c.returns import ReturnStatistics
from sb3_episodic_a2c.samples import cut_episodes
from tests.envs import TargetEnv, vectorized
from tests.variant_envs import make_random_envs

ALGORITHMS: list[tuple[type[Any], str, dict[str, Any]]] = [
    (EpisodicA2C, "MlpPolicy", {}),
    (MaskableEpisodicA2C, "MlpPolicy", {}),
    (RecurrentEpisodicA2C, "MlpLstmPolicy", {"lstm_hidden_size": 8}),
]
every_algorithm = pytest.mark.parametrize(("algorithm", "policy", "policy_kwargs"), ALGORITHMS)


def parameters_of(model: EpisodicA2C) -> list[th.Tensor]:
    return [parameter.detach().clone() for parameter in model.policy.parameters()]


def has_learnt(model: EpisodicA2C, before: list[th.Tensor]) -> bool:
    return any(not th.equal(old, new) for old, new in zip(before, model.policy.parameters(), strict=True))


# ---------------------------------------------------------------------- an optimizer of the policy's own


class OwnOptimizer(ActorCriticPolicy):
    """Makes its optimizer itself, with ``make_optimizer``."""

    def __init__(self, *args: Any, make_optimizer: Any, **kwargs: Any) -> None:
        self.make_optimizer = make_optimizer
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.optimizer = self.made = self.make_optimizer(self)
        self.n_calls = 0
        self.optimizer.register_step_post_hook(self._count)

    def _count(self, *args: Any) -> None:
        self.n_calls += 1


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda policy: th.optim.Adam([{"params": policy.parameters(), "weight_decay": 0.5}]),
        lambda policy: th.optim.Adam(policy.parameters(), betas=(0.5, 0.9)),
        lambda policy: th.optim.Adam(policy.action_net.parameters(), eps=1e-5),
        lambda policy: th.optim.Adam(
            [{"params": [parameter], "weight_decay": 0.1} for parameter in policy.parameters()], eps=1e-5
        ),
        lambda policy: th.optim.AdamW(policy.parameters()),
    ],
    ids=["weight decay", "betas", "some parameters", "groups", "AdamW"],
)
def test_an_optimizer_of_the_policys_own_is_not_touched(make_optimizer: Any) -> None:
    model = EpisodicA2C(OwnOptimizer, "CartPole-v1", policy_kwargs={"make_optimizer": make_optimizer}, seed=0, device="cpu")
    optimizer = model.policy.optimizer
    expected = make_optimizer(model.policy).param_groups
    for group, other in zip(optimizer.param_groups, expected, strict=True):
        assert {**group, "params": None} == {**other, "params": None}
    model.learn(300)
    assert model.policy.optimizer is model.policy.made is optimizer
    assert model.policy.n_calls == model._n_updates > 0


def test_the_optimizer_of_sb3_stays_the_object_that_it_is() -> None:
    """A learning rate scheduler, for one, holds it, and may have put hooks on it."""

    class Hooked(ActorCriticPolicy):
        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            self.made = self.optimizer
            self.calls: list[int] = []
            self.optimizer.register_step_pre_hook(lambda *_: self.calls.append(1))

    model = EpisodicA2C(Hooked, "CartPole-v1", device="cpu").learn(300)
    assert model.policy.optimizer is model.policy.made
    assert model.policy.optimizer.param_groups[0]["fused"] is True
    assert model.policy.calls


# ---------------------------------------------------------------------- self-play


class DuelEnv(TargetEnv):
    """Its opponent plays along, as in self-play."""

    opponent: Any = None
    held: Any = None

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, *rest = super().step(action)
        if self.opponent is not None:
            reply = self.opponent(observation)
            reward += float(np.sum(reply != action))
        return observation, reward, *rest


@every_algorithm
def test_after_a_resume_environments_hold_the_model_that_was_resumed(
    algorithm: type[Any], policy: str, policy_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    venv = VecNormalize(vectorized(lambda index: DuelEnv(), 2))
    model = algorithm(policy, venv, policy_kwargs=policy_kwargs, seed=0, device="cpu")
    for env in venv.unwrapped.envs:
        env.unwrapped.held = {
            "model": model,
            "policy": model.policy,
            "optimizer": model.policy.optimizer,
            "buffer": model.rollout_buffer,
            "layer": model.policy.action_net,
            "weight": model.policy.action_net.weight,
            "environments": venv,
            "other": np.arange(3),
        }
        env.unwrapped.opponent = lambda observation: model.predict(observation)[0]
    model.learn(103)
    save_checkpoint(model, tmp_path / "duel")
    again = load_checkpoint(tmp_path / "duel", device="cpu")
    assert again is not model
    for env in again.env.unwrapped.envs:
        held = env.unwrapped.held
        assert held["model"] is again
        assert held["policy"] is again.policy
        assert held["optimizer"] is again.policy.optimizer
        assert held["buffer"] is again.rollout_buffer
        assert held["layer"] is again.policy.action_net
        assert held["weight"] is again.policy.action_net.weight
        assert held["environments"] is again.env
        assert held["other"].tolist() == [0, 1, 2]
    # The opponent is trained on, so the rewards differ unless it is the same one
    for side in (model, again):
        np.random.seed(0)
        th.manual_seed(0)
        side.learn(200, reset_num_timesteps=False)
    for old, new in zip(model.policy.parameters(), again.policy.parameters(), strict=True):
        assert th.equal(old, new)


# ---------------------------------------------------------------------- what the world of SB3 divides by


@pytest.mark.filterwarnings("ignore:No episode ended")
def test_n_steps_is_positive_from_the_start(tmp_path: Path) -> None:
    """imitation's GAIL and AIRL divide by it."""
    model = EpisodicA2C("MlpPolicy", make_vec_env("CartPole-v1", 4), seed=0, device="cpu")
    assert model.n_steps == 128
    model.learn(1)
    assert model.n_steps == 1
    model.learn(2_000)
    assert isinstance(model.n_steps, int) and model.n_steps > 1
    model.save(tmp_path / "model")
    assert EpisodicA2C.load(tmp_path / "model", device="cpu").n_steps == model.n_steps
    # As version 0.1 wrote it
    model.n_steps = 0
    model.save(tmp_path / "old")
    assert EpisodicA2C.load(tmp_path / "old", device="cpu").n_steps == 128


# ---------------------------------------------------------------------- compiled policies


class Recorder:
    """A backend of ``th.compile`` that compiles nothing, and counts how often what it was given is run."""

    def __init__(self) -> None:
        self.n_runs = 0

    def __call__(self, graph: th.fx.GraphModule, example_inputs: list[th.Tensor]) -> Any:
        def run(*args: Any) -> Any:
            self.n_runs += 1
            return graph.forward(*args)

        return run


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("actor", ["auto", "torch"])
@every_algorithm
def test_a_compiled_policy_is_trained_and_samples(
    algorithm: type[Any], policy: str, policy_kwargs: dict[str, Any], actor: str, in_place: bool, tmp_path: Path
) -> None:
    """SB3's documentation recommends ``model.policy = th.compile(model.policy)``."""
    recorder = Recorder()
    venv = vectorized(lambda index: TargetEnv(truncates=True), 2)
    model = algorithm(policy, venv, actor=actor, policy_kwargs=policy_kwargs, seed=0, device="cpu")
    model.learn(20)
    if in_place:
        model.policy.compile(backend=recorder)
    else:
        model.policy = th.compile(model.policy, backend=recorder)
    before = parameters_of(model)
    model.learn(40)
    assert has_learnt(model, before)
    assert recorder.n_runs >= 20
    assert model.predict(np.zeros((2, 3), np.float32))[0].shape == (2,)
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model", device="cpu")
    for old, new in zip(model.policy.parameters(), again.policy.parameters(), strict=True):
        assert th.equal(old, new)


@pytest.mark.parametrize("algorithm", [EpisodicA2C, MaskableEpisodicA2C])
def test_numpy_samples_from_a_compiled_policy_where_it_is_asked_to(algorithm: type[Any]) -> None:
    model = algorithm("MlpPolicy", vectorized(lambda index: TargetEnv(), 2), actor="numpy", seed=0, device="cpu")
    model.policy = th.compile(model.policy, backend="eager")
    before = parameters_of(model)
    model.learn(40)
    assert model._actor.name == "numpy"
    assert model._actor.policy is model.policy
    assert has_learnt(model, before)


# ---------------------------------------------------------------------- hooks for all modules


def test_hooks_for_all_modules_are_called() -> None:
    """Also with a plain MLP policy, which is otherwise run in NumPy."""
    seen: list[str] = []
    model = EpisodicA2C("MlpPolicy", TargetEnv(), seed=0, device="cpu")
    with th.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__)):
        model.learn(10)
    assert seen.count("Linear") >= 10
    seen.clear()
    model.learn(10)
    assert not seen


# ---------------------------------------------------------------------- layers that look at the whole batch


class CentredExtractor(FlattenExtractor):
    """Subtracts the mean of the batch, without being one of torch's batch norms."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features = super().forward(observations)
        return features - features.mean(dim=0)


class BatchNormExtractor(FlattenExtractor):
    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space)
        self.flatten = th.nn.Sequential(th.nn.Flatten(), th.nn.BatchNorm1d(self.features_dim))


class CentredPolicy(ActorCriticPolicy):
    def extract_features(self, *args: Any, **kwargs: Any) -> Any:
        features = super().extract_features(*args, **kwargs)
        return features - features.mean(dim=0)


def pass_sizes(policy: Any, n_transitions: int, batch_size: int | None, **policy_kwargs: Any) -> list[int]:
    """How many transitions go through the policy together in an update."""
    sizes: list[int] = []

    class Recording(EpisodicA2C):
        def _evaluate_actions(self, samples: Any) -> Any:
            sizes.append(len(samples.actions))
            return super()._evaluate_actions(samples)

    env = TargetEnv(episode_length=n_transitions)
    model = Recording(policy, env, batch_size=batch_size, policy_kwargs=policy_kwargs, seed=0, device="cpu")
    model.learn(n_transitions)
    return sizes


@pytest.mark.parametrize(
    ("policy", "policy_kwargs"),
    [
        ("MlpPolicy", {"features_extractor_class": CentredExtractor}),
        ("MlpPolicy", {"activation_fn": type("MyTanh", (th.nn.Tanh,), {})}),
        (CentredPolicy, {}),
    ],
    ids=["extractor", "activation", "policy"],
)
def test_what_may_look_at_the_whole_batch_is_given_all_of_it(
    policy: Any, policy_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``batch_size=None`` promises that."""
    monkeypatch.setattr("sb3_episodic_a2c.evaluation.CPU_PASS_SIZE", 100)
    assert pass_sizes(policy, 250, None, **policy_kwargs) == [250]
    assert pass_sizes(policy, 250, 150, **policy_kwargs) == [150, 100]


@pytest.mark.parametrize(
    "policy_kwargs",
    [{"activation_fn": th.nn.GELU}, {"share_features_extractor": False}],
    ids=["GELU", "two extractors"],
)
def test_what_treats_rows_alone_is_cut(policy_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_episodic_a2c.evaluation.CPU_PASS_SIZE", 100)
    assert pass_sizes("MlpPolicy", 250, None, **policy_kwargs) == [100, 100, 50]
    assert pass_sizes("MlpPolicy", 251, 50, **policy_kwargs) == [50, 50, 50, 50, 49, 2]


def test_hooks_may_look_at_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_episodic_a2c.evaluation.CPU_PASS_SIZE", 100)
    model = EpisodicA2C("MlpPolicy", TargetEnv(), device="cpu")
    assert pass_size(model.policy, 250, None) == 100
    model.policy.action_net.register_forward_hook(lambda module, args, output: output - output.mean(dim=0))
    assert pass_size(model.policy, 250, None) is None


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook", "register_full_backward_hook"])
def test_gradient_hooks_are_given_the_gradient_of_all_transitions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that clips would clip each pass by itself."""
    monkeypatch.setattr("sb3_episodic_a2c.evaluation.CPU_PASS_SIZE", 100)
    model = EpisodicA2C("MlpPolicy", TargetEnv(), device="cpu")
    layer = model.policy.action_net
    assert pass_size(model.policy, 250, None) == 100
    getattr(layer if kind == "register_full_backward_hook" else layer.weight, kind)(lambda *gradients: None)
    assert pass_size(model.policy, 250, None) is None


@pytest.mark.parametrize(
    ("n_transitions", "batch_size", "expected"),
    [(200, 199, [198, 2]), (7, 3, [3, 2, 2]), (7, 2, [2, 2, 2, 1]), (10, 4, [4, 4, 2]), (9, 4, [4, 3, 2]), (5, None, [5])],
)
def test_batch_norm_gets_no_single_row_where_another_size_is_possible(
    n_transitions: int, batch_size: int | None, expected: list[int]
) -> None:
    if expected[-1] == 1:
        # No size up to the one asked for leaves more
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            pass_sizes("MlpPolicy", n_transitions, batch_size, features_extractor_class=BatchNormExtractor)
    else:
        assert pass_sizes("MlpPolicy", n_transitions, batch_size, features_extractor_class=BatchNormExtractor) == expected


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(1, 9))
def test_whole_episodes_are_cut_without_single_rows(lengths: list[int], batch_size: int) -> None:
    batches = list(cut_episodes(np.array(lengths), batch_size, whole_episodes=True))
    assert [length for _, pieces in batches for length in pieces] == lengths
    sizes = [int(pieces.sum()) for _, pieces in batches]
    assert [part.stop - part.start for part, _ in batches] == sizes
    assert min(sizes) > 1 or sum(lengths) == 1
    for size, (_, pieces) in zip(sizes, batches, strict=True):
        # More than was asked for only for one long episode, and single rows beside it
        assert size <= batch_size or size - sorted(pieces)[-1] <= 2 or size <= batch_size + 1


def test_batch_norm_before_an_lstm_gets_no_single_row() -> None:
    model = RecurrentEpisodicA2C(
        "MlpLstmPolicy",
        make_random_envs(spaces.Discrete(2), 2, max_length=3),
        n_episodes=3,
        batch_size=2,
        policy_kwargs={"features_extractor_class": BatchNormExtractor, "lstm_hidden_size": 4},
        seed=0,
        device="cpu",
    )
    model.learn(150)
    assert model._n_updates > 5


def test_batch_norm_cannot_be_trained_on_one_transition() -> None:
    env = TargetEnv(episode_length=1)
    model = EpisodicA2C("MlpPolicy", env, policy_kwargs={"features_extractor_class": BatchNormExtractor}, device="cpu")
    with pytest.raises(ValueError, match=r"one transition in all.*Raise `n_episodes`, or use several environments"):
        model.learn(10)
    model.n_episodes = 4
    model.learn(12)


# ---------------------------------------------------------------------- environments without a picture


class BlindEnv(TargetEnv):
    """Cannot be rendered, in one of the ways that there are."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, picture: Any = None, render_mode: str | None = None) -> None:
        super().__init__()
        self.picture = picture
        self.render_mode = render_mode
        self.n_pictures = 0

    def render(self) -> Any:
        self.n_pictures += 1
        return self.picture(self.n_pictures) if callable(self.picture) else self.picture


def raise_at(number: int, n_pictures: int) -> np.ndarray:
    if n_pictures >= number:
        raise RuntimeError("no display\nat all")
    return np.zeros((8, 8, 3), np.uint8)


PICTURES: dict[str, Any] = {
    "None": None,
    "grey": np.zeros((8, 8), np.uint8),
    "floats": np.zeros((8, 8, 3)),
    "text": "a board",
    "raises": partial(raise_at, 1),
    "raises later": partial(raise_at, 3),
}


@pytest.mark.parametrize("picture", PICTURES)
def test_solve_needs_no_picture(
    picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        gym.registry, "Blind-v0", EnvSpec("Blind-v0", BlindEnv, reward_threshold=10.0, kwargs={"picture": PICTURES[picture]})
    )
    arguments = ["solve", "--env", "Blind-v0", "--total-timesteps", "50", "--output", str(tmp_path), "--no-progress"]
    assert main(arguments) == 0
    assert json.loads((tmp_path / "result.json").read_text())["gif_rewards"] == []
    assert (tmp_path / "learning_curve.png").exists()
    assert not (tmp_path / "agent.gif").exists()
    lines = [line for line in capsys.readouterr().out.splitlines() if "GIF" in line or "no agent.gif" in line]
    assert len(lines) == 1, lines
    assert re.match("There (will be no GIF of Blind-v0|is no agent.gif): ", lines[0])


def test_solve_writes_no_gif_where_it_is_not_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["solve", "--env", "CartPole-v1", "--total-timesteps", "50", "--output", str(tmp_path), "--no-progress"]
    assert main([*arguments, "--no-gif"]) == 0
    assert not (tmp_path / "agent.gif").exists()
    assert (tmp_path / "result.json").exists()
    assert "GIF" not in capsys.readouterr().out


class MissionEnv(TargetEnv):
    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__()
        vector = spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.observation_space = spaces.Dict({"vector": vector, "mission": spaces.Text(20)})


def test_solve_says_which_observations_it_cannot_learn_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gym.registry, "Mission-v0", EnvSpec("Mission-v0", MissionEnv, reward_threshold=1.0))
    assert main(["solve", "--env", "Mission-v0", "--output", str(tmp_path / "run"), "--no-progress"]) == 1
    assert re.search(r"observation space .* not supported because of Text", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- modules that keep tensors


class CachingExtractor(BaseFeaturesExtractor):
    """Makes a tensor at its first call and keeps it, and keeps running statistics."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 4)
        self.layer = th.nn.Linear(3, 4)
        self.scale: th.Tensor | None = None
        self.register_buffer("mean", th.zeros(3))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        if self.scale is None:
            self.scale = th.linspace(0.5, 1.5, 4)
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * observations.mean(dim=0).detach())
        return self.layer(observations - self.mean) * self.scale


@pytest.mark.parametrize("n_value_epochs", [0, 2])
@every_algorithm
def test_extractors_may_keep_tensors(
    algorithm: type[Any], policy: str, policy_kwargs: dict[str, Any], n_value_epochs: int
) -> None:
    """Sampling in torch's inference mode would make these tensors unfit for training."""
    venv = vectorized(lambda index: TargetEnv(truncates=True), 2)
    policy_kwargs = {**policy_kwargs, "features_extractor_class": CachingExtractor}
    model = algorithm(policy, venv, policy_kwargs=policy_kwargs, n_value_epochs=n_value_epochs, seed=0, device="cpu")
    before = parameters_of(model)
    model.learn(100)
    assert has_learnt(model, before)
    assert model.policy.features_extractor.mean.abs().sum() > 0


# ---------------------------------------------------------------------- several trainings in one process


def settings_of_the_process() -> list[Any]:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    distributions = th.distributions.Distribution._validate_args, th.distributions.Categorical._validate_args
    return [*handlers, *distributions, th.is_grad_enabled(), th.is_inference_mode_enabled(), np.geterr(), np.geterrcall()]


@pytest.mark.parametrize("actor", ["auto", "torch"])
@every_algorithm
def test_trainings_in_threads_leave_the_settings_of_the_process(
    algorithm: type[Any], policy: str, policy_kwargs: dict[str, Any], actor: str
) -> None:
    """As with Optuna's ``n_jobs``. What is set "for a while" in one thread is put back in the wrong order in the other."""
    seen: list[list[Any]] = []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls % 10 == 0:
                seen.append(settings_of_the_process())
            return True

    models = [
        algorithm(
            policy, vectorized(lambda index: TargetEnv(), 2), actor=actor, policy_kwargs=policy_kwargs, seed=seed, device="cpu"
        )
        for seed in (0, 1)
    ]
    before = settings_of_the_process()
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda model: model.learn(600, callback=Watch()), models):
            pass
    assert settings_of_the_process() == before
    assert len(seen) == 60
    assert all(settings == before for settings in seen)


# ---------------------------------------------------------------------- smaller ones


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (0,)), "action space .* has no numbers"),
        (spaces.Box(-1, 1, ()), spaces.Discrete(2), r"observation space .* has the shape \(\): .*ReshapeObservation"),
        (spaces.Box(-1, 1, (0,)), spaces.Discrete(2), r"observation space .* has the shape \(0,\)"),
        (spaces.Dict({"a": spaces.Box(-1, 1, ())}), spaces.Discrete(2), r"observation space .* has the shape \(\)"),
    ],
)
def test_spaces_without_numbers_are_refused_at_the_start(
    observation_space: spaces.Space, action_space: spaces.Space, message: str
) -> None:
    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    with pytest.raises(ValueError, match=message):
        EpisodicA2C(policy, TargetEnv(observation_space, action_space), device="cpu")


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize(
    ("other", "policy", "algorithm"),
    [
        (A2C, "MlpPolicy", EpisodicA2C),
        (PPO, "MlpPolicy", EpisodicA2C),
        (MaskablePPO, "MlpPolicy", MaskableEpisodicA2C),
        (RecurrentPPO, "MlpLstmPolicy", RecurrentEpisodicA2C),
        (RecurrentPPO, "MlpLstmPolicy", EpisodicA2C),
    ],
)
def test_a_zip_of_another_algorithm_is_refused(
    other: type[Any], policy: str, algorithm: type[Any], as_file: bool, tmp_path: Path
) -> None:
    source = other(policy, TargetEnv(), device="cpu")
    source.save(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"a model of {other.__name__}, not of {algorithm.__name__}\. .*load_state_dict"):
        if as_file:
            with open(tmp_path / "other.zip", "rb") as file:
                algorithm.load(file, device="cpu")
        else:
            algorithm.load(tmp_path / "other", device="cpu")
    if algorithm is EpisodicA2C and policy != "MlpPolicy":
        return
    # The remedy of the message
    model = algorithm(policy, TargetEnv(), device="cpu")
    model.policy.load_state_dict(other.load(tmp_path / "other", device="cpu").policy.state_dict())
    for old, new in zip(source.policy.parameters(), model.policy.parameters(), strict=True):
        assert th.equal(old, new)


@every_algorithm
def test_an_own_zip_is_loaded_from_a_file(
    algorithm: type[Any], policy: str, policy_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    model = algorithm(policy, TargetEnv(), policy_kwargs=policy_kwargs, device="cpu")
    # As a subclass with a clipped ratio may have
    model.clip_range = 0.2
    model.save(tmp_path / "own")
    with open(tmp_path / "own.zip", "rb") as file:
        again = algorithm.load(file, device="cpu")
    assert again.clip_range == 0.2


@pytest.mark.parametrize("reset_num_timesteps", [False, True])
def test_closed_environments_are_named(reset_num_timesteps: bool) -> None:
    venv = SubprocVecEnv([TargetEnv, TargetEnv], start_method="fork")
    model = EpisodicA2C("MlpPolicy", venv, device="cpu").learn(20)
    venv.close()
    with pytest.raises(RuntimeError, match=r"environments are closed.*`model\.set_env\(env\)`"):
        model.learn(20, reset_num_timesteps=reset_num_timesteps)
    model.set_env(vectorized(lambda index: TargetEnv(), 2))
    model.learn(20, reset_num_timesteps=reset_num_timesteps)


@pytest.mark.parametrize("action_space", [spaces.Discrete(2), spaces.Box(-1.0, 1.0, (2,))])
def test_numpy_may_be_told_to_raise(action_space: spaces.Space) -> None:
    """Tiny observations give products as small as zero, which is an error then."""
    tiny = spaces.Box(-1e-30, 1e-30, (3,), np.float32)
    with np.errstate(all="raise"):
        model = EpisodicA2C("MlpPolicy", TargetEnv(tiny, action_space), actor="numpy", seed=0, device="cpu").learn(100)
        assert set(np.geterr().values()) == {"raise"}
    assert model._n_updates == 20


@pytest.mark.parametrize("standardize_returns", ["episode", "rollout", None])
def test_numpy_may_be_told_to_raise_with_tiny_rewards(standardize_returns: str | None) -> None:
    env = gym.wrappers.TransformReward(TargetEnv(), lambda reward: 1e-30 * reward)
    with np.errstate(all="raise"):
        model = EpisodicA2C(
            "MlpPolicy",
            env,
            standardize_returns=standardize_returns,
            handle_timeout_termination=False,
            seed=0,
            device="cpu",
        )
        assert model.learn(100)._n_updates == 20


@every_algorithm
def test_a_vector_environment_inside_a_wrapper_of_sb3_is_named(
    algorithm: type[Any], policy: str, policy_kwargs: dict[str, Any]
) -> None:
    env: Any = VecNormalize(gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="vector_entry_point"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"VecNormalize around CartPoleVectorEnv.*VecNormalize\(sb3_episodic_a2c.as_vec_env"):
        algorithm(policy, env, policy_kwargs=policy_kwargs, device="cpu")


def test_an_evaluation_environment_keeps_the_statistics_that_it_shares() -> None:
    """Those that a NaN has spoilt are put back in place."""

    class Spoilt(TargetEnv):
        n_made = 0

        def step(self, action: Any) -> Any:
            self.n_made += 1
            observation, *rest = super().step(action)
            return (observation * np.nan if self.n_made == 42 else observation, *rest)

    env = VecNormalize(DummyVecEnv([Spoilt]))
    evaluation_env = VecNormalize(DummyVecEnv([TargetEnv]), training=False)
    evaluation_env.obs_rms = env.obs_rms
    with pytest.raises(ValueError, match="nan"):
        EpisodicA2C("MlpPolicy", env, device="cpu").learn(100)
    assert evaluation_env.obs_rms is env.obs_rms
    assert np.isfinite(evaluation_env.obs_rms.mean).all() and env.obs_rms.count > 30


@pytest.mark.parametrize("change", ["compiled", "weight_norm", "pruned"])
def test_the_values_of_a_changed_critic_do_not_jump(change: str) -> None:
    """Rescaled, or left as it is, but never in part."""
    model = EpisodicA2C("MlpPolicy", TargetEnv(), seed=0, device="cpu")
    observations = th.randn(6, 3)
    layer: Any = model.policy.value_net
    if change == "compiled":
        model.policy.value_net = th.compile(layer, backend="eager")
    elif change == "weight_norm":
        th.nn.utils.parametrizations.weight_norm(layer)
    else:
        prune.l1_unstructured(layer, "weight", 0.3)
    before = model.policy.predict_values(observations)
    old, new = ReturnStatistics(0.0, 1.0, 10), ReturnStatistics(5.0, 9.0, 20)
    rescale_value_head(model.policy, old, new)
    after = model.policy.predict_values(observations)
    if change == "compiled":
        th.testing.assert_close(after * new.std + new.mean, before * old.std + old.mean, rtol=1e-4, atol=1e-4)
    else:
        th.testing.assert_close(after, before)


@pytest.mark.skipif(not hasattr(BaseException, "add_note"), reason="Python 3.10 has no notes")
def test_an_environment_that_refuses_an_early_reset_is_named_with_its_step() -> None:
    venv = DummyVecEnv(
        [lambda length=length: Monitor(TargetEnv(episode_length=length), allow_early_resets=False) for length in (5, 8)]
    )
    model = EpisodicA2C("MlpPolicy", venv, partial_episodes="discard", device="cpu")
    with pytest.raises(RuntimeError, match="before done") as caught:
        model.learn(100)
    # The first rollout takes 8 steps: the third one of environment 0's second episode is the last
    assert "environment 0 at step 3 of its episode" in caught.value.__notes__[0]


# ---------------------------------------------------------------------- environments that a callback resets


class NumberedEnv(gym.Env):
    """Episodes of ``length`` steps. Observations are (number of the episode, step)."""

    observation_space = spaces.Box(0, 10_000, (2,))
    action_space = spaces.Discrete(2)

    def __init__(self, length: int = 7) -> None:
        self.length = length
        self.episode = 0

    def action_masks(self) -> np.ndarray:
        return np.ones(2, dtype=bool)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode += 1
        self.age = 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.age += 1
        return self._observation(), 1.0, self.age == self.length, False, {}

    def _observation(self) -> np.ndarray:
        return np.array([self.episode, self.age], dtype=np.float32)


class EvaluateInTrainingEnvs(BaseCallback):
    """As ``EvalCallback(model.get_env())``. It collects what is trained on."""

    def __init__(self, when: str, is_honest: bool = False) -> None:
        super().__init__()
        self.when, self.is_honest = when, is_honest
        self.episodes: list[np.ndarray] = []

    def evaluate(self) -> None:
        self.training_env.reset()
        for _ in range(3):
            self.training_env.step(np.zeros(self.training_env.num_envs, dtype=int))
        if self.is_honest:
            # It says where to go on
            self.model._last_obs = self.training_env.reset()
            self.model._last_episode_starts = np.ones(self.training_env.num_envs, dtype=bool)

    def _on_rollout_start(self) -> None:
        if self.when == "rollout_start" and self.n_calls > 0:
            self.evaluate()

    def _on_step(self) -> bool:
        if self.when == "step" and self.n_calls % 11 == 0:
            self.evaluate()
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        if buffer.size():
            parts = np.split(buffer.observations[:, 0], np.cumsum(buffer.episode_lengths)[:-1])
            self.episodes += [part.copy() for part in parts]
        if self.when == "rollout_end":
            self.evaluate()


def make_numbered(kind: str) -> Any:
    makers = [partial(NumberedEnv, 4), partial(NumberedEnv, 7)]
    if kind == "gymnasium":
        return gym.vector.SyncVectorEnv(makers)
    return {"one": DummyVecEnv, "dummy": DummyVecEnv, "subproc": SubprocVecEnv}[kind](makers[:1] if kind == "one" else makers)


@pytest.mark.filterwarnings("ignore:The training environments were reset:UserWarning")
@pytest.mark.parametrize("partial_episodes", ["carry", "discard"])
@pytest.mark.parametrize("kind", ["one", "dummy", "subproc", "gymnasium"])
@pytest.mark.parametrize("when", ["step", "rollout_start", "rollout_end"])
@pytest.mark.parametrize("is_honest", [False, True])
def test_episodes_that_a_reset_from_outside_has_cut_are_not_glued(
    when: str, kind: str, partial_episodes: Any, is_honest: bool
) -> None:
    callback = EvaluateInTrainingEnvs(when, is_honest)
    model = EpisodicA2C("MlpPolicy", make_numbered(kind), partial_episodes=partial_episodes, seed=0, device="cpu")
    model.learn(300, callback=callback)
    assert len(callback.episodes) > 15
    for observations in callback.episodes:
        assert (observations[:, 0] == observations[0, 0]).all()
        assert observations[:, 1].tolist() == list(range(len(observations)))
        assert len(observations) in (4, 7)
    assert model.env is not None
    model.env.close()


@every_algorithm
def test_a_reset_between_two_calls_of_learn(algorithm: type[Any], policy: str, policy_kwargs: dict[str, Any]) -> None:
    model = algorithm(policy, make_numbered("dummy"), policy_kwargs=policy_kwargs, seed=0, device="cpu").learn(20)
    callback = EvaluateInTrainingEnvs("")
    model.get_env().reset()
    with pytest.warns(UserWarning, match="were reset from outside"):
        model.learn(60, callback=callback, reset_num_timesteps=False)
    assert callback.episodes
    assert all(episode[:, 1].tolist() == list(range(len(episode))) for episode in callback.episodes)


def test_nothing_is_said_where_nothing_was_reset(recwarn: pytest.WarningsRecorder) -> None:
    model = EpisodicA2C("MlpPolicy", make_numbered("dummy"), seed=0, device="cpu").learn(50)
    model.learn(50, reset_num_timesteps=False)
    model.learn(50)
    assert not [warning for warning in recwarn if "were reset" in str(warning.message)]
