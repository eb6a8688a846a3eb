"""Full-episode Monte Carlo actor-critic for Stable-Baselines3."""

from sb3_episodic_a2c.buffers import EpisodicRolloutBuffer
from sb3_episodic_a2c.checkpoints import ResumableCheckpointCallback, load_checkpoint, resume, save_checkpoint
from sb3_episodic_a2c.episodic_a2c import EpisodicA2C
from sb3_episodic_a2c.maskable import MaskableEpisodicA2C
from sb3_episodic_a2c.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, SharedMlpPolicy
from sb3_episodic_a2c.presets import notebook_preset
from sb3_episodic_a2c.recurrent import RecurrentEpisodicA2C
from sb3_episodic_a2c.vector import as_vec_env

__version__ = "0.2.0.dev0"

__all__ = [
    "CnnPolicy",
    "EpisodicA2C",
    "EpisodicRolloutBuffer",
    "MaskableEpisodicA2C",
    "MlpPolicy",
    "MultiInputPolicy",
    "RecurrentEpisodicA2C",
    "ResumableCheckpointCallback",
    "SharedMlpPolicy",
    "__version__",
    "as_vec_env",
    "load_checkpoint",
    "notebook_preset",
    "resume",
    "save_checkpoint",
]
