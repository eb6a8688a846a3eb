"""The commands, as a user types them."""

import json
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from PIL import Image
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_episodic_a2c import EpisodicA2C
from sb3_episodic_a2c.__main__ import COMMANDS, ZOO_COMMANDS, main
from sb3_episodic_a2c.tools import benchmark
from sb3_episodic_a2c.tools.plain_a2c import PlainA2C
from sb3_episodic_a2c.tools.record import play_episodes, record_gif, write_gif
from sb3_episodic_a2c.tools.solve import solve, summary
from sb3_episodic_a2c.vector import GymnasiumVecEnv
from tests.processes import run


def gif_frames(path: Path) -> tuple[int, float]:
    """Number of frames, and seconds that the animation takes."""
    with Image.open(path) as image:
        milliseconds = 0
        n_frames = image.n_frames  # type: ignore[attr-defined]  # Pillow's hints do not declare it
        for index in range(n_frames):
            image.seek(index)
            milliseconds += image.info["duration"]
        return n_frames, milliseconds / 1_000


def test_solve_writes_everything(tmp_path: Path) -> None:
    process = run("solve", "--env", "CartPole-v1", "--total-timesteps", "1500", "--seed", "3", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "runs" / "CartPole-v1-tuned-seed3"
    assert {path.name for path in folder.iterdir()} == {
        "0.monitor.csv",
        "agent.gif",
        "config.yml",
        "learning_curve.png",
        "model.zip",
        "result.json",
    }
    assert "Not solved in training within 1,500 env steps" in process.stdout
    assert "running_reward=" in process.stderr
    result = json.loads((folder / "result.json").read_text())
    assert (result["num_timesteps"], result["solved_at"], result["reward_threshold"]) == (1_500, None, 475.0)
    with Image.open(folder / "learning_curve.png") as image:
        assert image.width > 600
    model = EpisodicA2C.load(folder / "model.zip")
    assert model.num_timesteps == 1_500
    # CartPole renders 50 frames a second
    assert gif_frames(folder / "agent.gif")[1] == pytest.approx(result["gif_rewards"][0] / 50, abs=0.02)


def test_solve_stops_when_solved(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [
        "solve",
        "--env",
        "CartPole-v1",
        "--reward-threshold",
        "25",
        "--output",
        str(tmp_path / "out"),
        "--no-progress",
    ]
    assert main([*arguments, "--n-envs", "2", "--eval-episodes", "5"]) == 0
    output = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["solved_at"]["n_episodes"] >= 100
    assert result["mean_reward"] > 25
    assert (
        f"Solved CartPole-v1 at episode {result['solved_at']['n_episodes']}: {result['num_timesteps']:,} env steps" in output
    )
    assert len(list((tmp_path / "out").glob("*.monitor.csv"))) == 2
    # An existing model is never overwritten
    assert main(arguments) == 1
    assert "holds a model already" in capsys.readouterr().err


@pytest.mark.parametrize("threshold, is_advised", [(1, False), (499, True)])
def test_advice_after_a_run_that_was_not_solved(threshold: float, is_advised: bool, tmp_path: Path) -> None:
    """Fewer than 100 episodes never solve it. Where the greedy agent is above the threshold, there is nothing to advise."""
    result = solve(
        "CartPole-v1",
        total_timesteps=500,
        reward_threshold=threshold,
        n_eval_episodes=2,
        gif=False,
        progress_bar=False,
        output=tmp_path / "run",
    )
    assert result.solved_at is None
    assert ("Try another --seed" in summary(result)) == is_advised


def test_solve_with_the_notebooks_preset(tmp_path: Path) -> None:
    few: dict[str, Any] = {"progress_bar": False, "n_eval_episodes": 3, "gif": False}
    result = solve("CartPole-v1", preset="notebook", seed=1, total_timesteps=2_000, output=tmp_path, **few)
    model = EpisodicA2C.load(tmp_path / "model")
    assert (model.standardize_returns, model.detach_advantage, model.lr_schedule(0.5)) == ("episode", False, 0.01)
    assert result.num_timesteps == 2_000


def test_default_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    few: dict[str, Any] = {"progress_bar": False, "n_eval_episodes": 3, "gif": False}
    folders = [solve("CartPole-v1", total_timesteps=300, **few).output for _ in range(3)]
    assert [folder.name for folder in folders] == [f"CartPole-v1-tuned-seed0{suffix}" for suffix in ("", "-2", "-3")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--env", "CartPole-v1", "--n-envs", "0"], "`n_envs` is 0"),
        (["--env", "CartPole-v1", "--total-timesteps", "-5"], "`total_timesteps` is -5"),
        (["--env", "CartPole-v1", "--n-envs", "2", "--preset", "notebook"], "the notebook has one environment"),
        (["--env", "NoSuchEnv-v0"], "NoSuchEnv"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    process = run("solve", *arguments, cwd=tmp_path)
    assert process.returncode == 1
    assert message in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1, process.stderr
    assert not (tmp_path / "runs").exists()


def test_a_path_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    process = run("solve", "--env", "CartPole-v1", "--no-gif", "--output", "file", cwd=tmp_path)
    assert process.returncode == 1 and "file/checkpoints" in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1, process.stderr


@pytest.mark.parametrize("algorithm", [EpisodicA2C, PPO])
def test_gif_of_any_saved_model(algorithm: type, tmp_path: Path) -> None:
    algorithm("MlpPolicy", "CartPole-v1", seed=0, device="cpu").save(tmp_path / "model")
    process = run(
        *("gif", "--model", "model.zip", "--algo", algorithm.__name__, "--env", "CartPole-v1", "-o", "deep/out.gif"),
        *("--n-episodes", "2", "--max-steps", "30"),
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    n_frames, seconds = gif_frames(tmp_path / "deep" / "out.gif")
    assert 5 <= n_frames <= 30
    assert seconds <= 0.61


def test_gif_refusals(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["gif", "--model", str(tmp_path / "none.zip"), "--env", "CartPole-v1", "-o", "x.gif"]) == 1
    assert "is not a file" in capsys.readouterr().err
    (tmp_path / "none.zip").touch()
    assert main(["gif", "--model", str(tmp_path / "none.zip"), "--algo", "XYZ", "--env", "CartPole-v1", "-o", "x.gif"]) == 1
    assert "`--algo` 'XYZ' is no algorithm" in capsys.readouterr().err
    assert main(["gif", "--run", str(tmp_path), "--env", "CartPole-v1", "-o", "x.gif"]) == 1
    assert "`--env` is CartPole-v1, but the folder of `--run` says it" in capsys.readouterr().err


@pytest.mark.parametrize("fps", [15.0, 30.0, 50.0, 60.0, 100.0])
def test_gif_plays_at_the_frame_rate(fps: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = list(rng.integers(0, 255, (90, 20, 30, 3), dtype=np.uint8))
    _, seconds = gif_frames(write_gif(frames, tmp_path / "x.gif", fps))
    assert seconds == pytest.approx(90 / fps, abs=0.03)


def test_gif_shows_what_was_played(tmp_path: Path) -> None:
    frames = [np.full((16, 16, 3), colour, np.uint8) for colour in ([255, 0, 0], [0, 255, 0], [0, 0, 255])]
    with Image.open(write_gif(frames, tmp_path / "x.gif", 10)) as image:
        for index, frame in enumerate(frames):
            image.seek(index)
            np.testing.assert_array_equal(np.array(image.convert("RGB"))[5, 5], frame[5, 5])


def test_play_counts_frames_and_rewards() -> None:
    model = EpisodicA2C("MlpPolicy", "CartPole-v1", seed=0, device="cpu")
    env = make_vec_env("CartPole-v1", env_kwargs={"render_mode": "rgb_array"})
    frames, episode_rewards = play_episodes(model, env, n_episodes=3, deterministic=False)
    assert len(episode_rewards) == 3
    assert len(frames) == sum(episode_rewards)
    frames, episode_rewards = play_episodes(model, env, max_steps=12)
    assert (len(frames), episode_rewards) == (12, [12.0]) or sum(episode_rewards) == len(frames) < 12
    with pytest.raises(ValueError, match="rgb_array"):
        play_episodes(model, make_vec_env("CartPole-v1", env_kwargs={"render_mode": None}))
    with pytest.raises(ValueError, match="num_envs=2"):
        play_episodes(model, make_vec_env("CartPole-v1", n_envs=2, env_kwargs={"render_mode": "rgb_array"}))
    with pytest.raises(ValueError, match="`frames` is empty"):
        write_gif([], "x.gif", 10)


def test_gif_under_vec_normalize(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", seed=0))
    model = EpisodicA2C("MlpPolicy", env, seed=0, device="cpu").learn(500)
    env.save(str(tmp_path / "vecnormalize.pkl"))
    rewards = record_gif(
        model, "CartPole-v1", tmp_path / "x.gif", seed=0, max_steps=20, vec_normalize_path=tmp_path / "vecnormalize.pkl"
    )
    # In the environment's own units: one for each step
    assert rewards[0] in range(8, 21)


def test_help_lists_the_commands(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert all(re.search(rf"^ +{command}\b", output, re.MULTILINE) for command in {**COMMANDS, **ZOO_COMMANDS})


def test_bench_measures_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "MIN_WARM_UP", 100)
    arguments = ["--env", "CartPole-v1", "--n-envs", "2", "--repeats", "2", "--seconds", "0.05", "--no-extra", "--no-memory"]
    assert main(["bench", *arguments, "-o", str(tmp_path / "out" / "bench.json")]) == 0
    output = capsys.readouterr().out
    (case,) = json.loads((tmp_path / "out" / "bench.json").read_text())["cases"]
    assert (case["env_id"], case["n_envs"]) == ("CartPole-v1", 2)
    assert set(case["steps_per_second"]) == {"EpisodicA2C", "A2C", "PPO", "VecEnv"}
    assert all(len(speeds) == 2 and min(speeds) > 0 for speeds in case["steps_per_second"].values())
    assert case["train_fraction"]["VecEnv"] == [0, 0]
    assert all(0 <= fraction < 1 for fraction in case["train_fraction"]["EpisodicA2C"])
    assert len(case["train_fraction"]["EpisodicA2C"]) == 2
    assert set(case["env_fraction"]) == {"EpisodicA2C", "A2C", "PPO"}
    assert all(0 < fraction < 1 for fraction in case["env_fraction"].values())
    assert len([line for line in output.splitlines() if line.startswith("| CartPole-v1 | dummy | 2 |")]) == 4
    assert main(["bench", "--repeats", "0"]) == 1
    assert "`--repeats` is 0" in capsys.readouterr().err


def test_bench_of_vector_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside A2C in plain PyTorch, where it can learn."""
    monkeypatch.setattr(benchmark, "MIN_WARM_UP", 100)
    (case,) = benchmark.benchmark(
        ("CartPole-v1",), (2,), repeats=1, seconds=0.05, with_memory=False, vectorizations=("gymnasium",)
    )
    assert isinstance(benchmark.make_env("CartPole-v1", 2, "gymnasium").env, CartPoleVectorEnv)
    assert set(case.steps_per_second) == {"EpisodicA2C", "A2C", "PPO", "VecEnv", "PyTorch A2C"}
    assert all(speeds[0] > 0 for speeds in case.steps_per_second.values())
    for env_id in ("Pendulum-v1", benchmark.IMAGE_ENV):
        assert not benchmark.has_plain_peer(env_id, "gymnasium")
        with pytest.raises(ValueError, match="leave it out"):
            benchmark.make_player(benchmark.PLAIN, env_id, 2, "gymnasium")


@pytest.mark.parametrize("mode", [gym.vector.AutoresetMode.NEXT_STEP, gym.vector.AutoresetMode.SAME_STEP])
def test_the_peer_in_plain_pytorch_learns(mode: gym.vector.AutoresetMode) -> None:
    """Action 1 is the best. It is no peer if it does not find out."""
    torch.manual_seed(0)
    env = gym.vector.SyncVectorEnv([lambda: benchmark.LengthEnv(7)] * 8, autoreset_mode=mode)
    peer = PlainA2C(GymnasiumVecEnv(env))
    before = peer.actor(peer.obs).softmax(1)[:, 1].mean()
    assert peer.run(20 * 8 * 128) == 20 * 8 * 128
    assert peer.actor(peer.obs).softmax(1)[:, 1].mean() > before + 0.1


def test_bench_on_envpool() -> None:
    pytest.importorskip("envpool")
    assert benchmark.make_env("CartPole-v1", 3, "envpool").num_envs == 3
    with pytest.raises(ValueError, match="not in EnvPool"):
        benchmark.make_env(benchmark.IMAGE_ENV, 3, "envpool")


class NeverRendered(CartPoleEnv):
    """Its constructor does not take `render_mode`."""

    def __init__(self) -> None:
        super().__init__()


def test_bench_asks_for_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """For images LunarLander keeps particles, which make its physics slower and slower."""
    assert benchmark.make_env("LunarLander-v3", 1).render_mode is None
    spec = gym.envs.registration.EnvSpec("NeverRendered-v0", entry_point=NeverRendered)
    monkeypatch.setitem(gym.registry, "NeverRendered-v0", spec)
    assert benchmark.make_env("NeverRendered-v0", 2).num_envs == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:No episode ended")
def test_what_else_bench_measures() -> None:
    """On short runs: it runs, and gives no negative figures."""
    costs = benchmark.episode_length_cost(repeats=1, n_steps=200)
    assert set(costs) == {10, 100, 1_000, 10_000} and min(costs.values()) > 0
    seconds = benchmark.recurrent_update_seconds(repeats=1, n_envs=2, n_steps=20)
    assert set(seconds) == {"RecurrentEpisodicA2C", "RecurrentPPO, batch_size=128", "RecurrentPPO, one batch"}
    assert min(seconds.values()) > 0
    # The batch bounds it, not the episode
    small_batches = benchmark.in_fresh_process(benchmark.image_update_memory, 280, 8)
    assert 0 < small_batches < benchmark.in_fresh_process(benchmark.image_update_memory, 140, None) / 2
    assert benchmark.in_fresh_process(benchmark.peak_memory, benchmark.PLAIN, "CartPole-v1", 2, 1_000, "gymnasium") > 0
    # Memory of this process does not count
    hoard = np.ones(2**27, dtype=np.uint8)
    assert benchmark.in_fresh_process(benchmark.peak_memory, "EpisodicA2C", benchmark.IMAGE_ENV, 1, 20) > 1
    assert hoard.all()
