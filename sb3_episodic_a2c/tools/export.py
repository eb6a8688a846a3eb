"""
An agent as an ONNX model: the greedy action for raw observations, where there is neither torch nor Stable-Baselines3.

    import onnxruntime

    session = onnxruntime.InferenceSession("agent.onnx")
    (actions,) = session.run(None, {"observation": observations})

Inputs, as the environments give them, with a dimension of environments in front: ``observation``, or one input for each key of
Dict observations; ``action_masks`` for an agent with masks; for an LSTM ``hidden`` and ``cell`` (zeros at the start of an
episode) and one environment at a time. Outputs: ``action``, clipped to its bounds, and of an LSTM ``next_hidden`` and
``next_cell``. Observations are normalised within the model if the agent was trained so. Stacked frames, and images with
channels first, are given as SB3 gives them to the agent. Only where single frames were normalised (RL Zoo's ``normalize`` with
``frame_stack``), frames before the start of an episode are the mean ``normalize.obs_rms.mean`` instead of zeros.
"""

import argparse
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch as th
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize, unwrap_vec_normalize
from torch import nn

from sb3_episodic_a2c import EpisodicA2C, MaskableEpisodicA2C, RecurrentEpisodicA2C
from sb3_episodic_a2c.guards.files import atomic_write
from sb3_episodic_a2c.plain_mlp import unwrapped
from sb3_episodic_a2c.tools.runs import Run

OPSET = 17


class GreedyAgent(nn.Module):
    """
    What is exported: from observations to greedy actions.

    :param model: The trained model
    :param normalize: Normalises its observations; None for raw ones
    """

    def __init__(self, model: EpisodicA2C, normalize: VecNormalize | None) -> None:
        super().__init__()
        self.policy: Any = unwrapped(model.policy)
        self.action_space = model.action_space
        self.normalize = normalize if normalize is not None and normalize.norm_obs else None
        self.has_masks = isinstance(model, MaskableEpisodicA2C) and model.use_masking
        self.has_memory = isinstance(model, RecurrentEpisodicA2C)
        space = model.observation_space
        self.keys = list(space.spaces) if isinstance(space, spaces.Dict) else None
        self.input_names = [*(self.keys or ["observation"])]
        if self.has_masks:
            self.input_names.append("action_masks")
        if self.has_memory:
            self.input_names += ["hidden", "cell"]

    def example(self) -> tuple[th.Tensor, ...]:
        """Inputs to trace it with, of one environment."""
        space = self.policy.observation_space
        parts = [space[key] for key in self.keys] if self.keys else [space]
        inputs = [th.as_tensor(np.zeros((1, *(part.shape or ())), dtype=part.dtype)) for part in parts]
        if self.has_masks:
            inputs.append(th.ones(1, self.policy.action_net.out_features, dtype=th.bool))
        if self.has_memory:
            lstm = self.policy.lstm_actor
            inputs += [th.zeros(lstm.num_layers, 1, lstm.hidden_size) for _ in range(2)]
        return tuple(inputs)

    def forward(self, *inputs: th.Tensor) -> tuple[th.Tensor, ...]:
        named = dict(zip(self.input_names, inputs, strict=True))
        obs: Any
        if self.keys is not None:
            obs = {key: self._normalized(named[key], key) for key in self.keys}
        else:
            obs = self._normalized(named["observation"])
        next_states: tuple[th.Tensor, ...] = ()
        if self.has_memory:
            states = (named["hidden"], named["cell"])
            distribution, next_states = self.policy.get_distribution(obs, states, th.zeros(1))
        else:
            masks = {"action_masks": named["action_masks"]} if self.has_masks else {}
            distribution = self.policy.get_distribution(obs, **masks)
        actions = distribution.get_actions(deterministic=True).reshape(-1, *(self.action_space.shape or ()))
        return (self._to_env(actions), *next_states)

    def _normalized(self, observations: th.Tensor, key: str | None = None) -> th.Tensor:
        if self.normalize is None:
            return observations
        statistics: Any = self.normalize.obs_rms
        if key is not None:
            if key not in statistics:
                return observations
            statistics = statistics[key]
        assert isinstance(statistics, RunningMeanStd)
        # Frames may have been stacked after they were normalised: the same statistics for each of them
        space = self.policy.observation_space
        shape = (space if key is None else space[key]).shape
        n_frames = [whole // part for whole, part in zip(shape, statistics.mean.shape, strict=True)]
        mean = np.tile(statistics.mean, n_frames)
        scale = np.sqrt(np.tile(statistics.var, n_frames) + self.normalize.epsilon)
        centred = observations - th.as_tensor(mean, dtype=th.float32)
        bound = self.normalize.clip_obs
        return (centred / th.as_tensor(scale, dtype=th.float32)).clamp(-bound, bound)

    def _to_env(self, actions: th.Tensor) -> th.Tensor:
        space = self.action_space
        if not isinstance(space, spaces.Box):
            return actions
        low, high = th.as_tensor(space.low), th.as_tensor(space.high)
        if self.policy.squash_output:
            return low + 0.5 * (actions + 1.0) * (high - low)
        return th.minimum(th.maximum(actions, low), high)


def export_onnx(model: EpisodicA2C, path: str | Path, normalize: VecNormalize | None = None) -> None:
    """
    Write an agent as an ONNX model.

    :param model: The trained model
    :param path: The file to write
    :param normalize: What normalises its observations; by default that of the model's environment, if it has one
    :raises ValueError: The written model is not valid
    """
    if normalize is None and model.env is not None:
        normalize = unwrap_vec_normalize(model.env)
    agent = GreedyAgent(model, normalize)
    device, was_training = model.policy.device, model.policy.training
    outputs = ["action", *(["next_hidden", "next_cell"] if agent.has_memory else [])]
    # The state of an LSTM has the environments in its second dimension, and its policy counts them when it is traced
    batched = [] if agent.has_memory else [*agent.input_names, "action"]
    file = io.BytesIO()
    try:
        agent.cpu().eval()
        with warnings.catch_warnings(), th.no_grad():
            warnings.simplefilter("ignore")
            # The newer exporter, dynamo, fails on SB3's policies
            th.onnx.export(
                agent,
                agent.example(),
                file,  # type: ignore[arg-type]  # the older exporter takes files
                input_names=agent.input_names,
                output_names=outputs,
                dynamic_axes={name: {0: "n_envs"} for name in batched},
                opset_version=OPSET,
                dynamo=False,
            )
    finally:
        agent.to(device).train(was_training)
    onnx.checker.check_model(onnx.load_from_string(file.getvalue()))
    with atomic_write(Path(path)) as target:
        target.write(file.getvalue())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"{parser.epilog}\n{__doc__}"
    parser.add_argument("--run", dest="folder", type=Path, required=True, help="output folder of solve")
    parser.add_argument("-o", "--output", type=Path, help="the file to write (default: agent.onnx in that folder)")


def run(arguments: argparse.Namespace) -> None:
    path = arguments.output or arguments.folder / "agent.onnx"
    run = Run.read(arguments.folder)
    env = run.make_env()
    try:
        export_onnx(run.load_model(), path, unwrap_vec_normalize(env))
    finally:
        env.close()
    print(f"Wrote {path}")
