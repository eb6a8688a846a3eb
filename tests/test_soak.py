"""A long training neither grows nor slows down."""

import gc
import os
import time
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_episodic_a2c import EpisodicA2C


class Watch(BaseCallback):
    """
    Memory and CPU seconds at every ``every`` env steps.

    CPU time, as other processes share the machine.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.bytes: list[int] = []
        self.seconds: list[float] = []

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.every * (len(self.bytes) + 1):
            gc.collect()
            resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.bytes.append(resident_pages * os.sysconf("SC_PAGE_SIZE"))
            self.seconds.append(time.process_time())
        return True


@pytest.mark.slow
def test_two_million_steps() -> None:
    model = EpisodicA2C("MlpPolicy", make_vec_env("CartPole-v1", 8, seed=0), seed=0, device="cpu")
    watch = Watch(every=50_000)
    model.learn(2_000_000, callback=watch)
    assert len(watch.bytes) == 40
    megabytes = np.array(watch.bytes) / 2**20
    # Once episodes are as long as they get, which takes 200,000 steps at most
    warm = megabytes[4:]
    seconds = np.diff(watch.seconds)[3:]
    first, last = np.median(seconds[:8]), np.median(seconds[-8:])
    print(f"\nmemory in MB at every 50,000 env steps: {np.round(megabytes).astype(int).tolist()}")
    print(f"{50_000 / first:.0f} env steps per CPU second at first, {50_000 / last:.0f} at last")
    assert warm.max() <= 1.05 * warm[0]
    assert last <= 1.2 * first
    assert model.rollout_buffer.buffer_size <= 16 * 1024
