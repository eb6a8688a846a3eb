"""The README's Python runs, on a small budget, and its commands, as those of RESULTS.md, can be parsed."""

import argparse
import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from sb3_episodic_a2c import EpisodicA2C
from sb3_episodic_a2c.__main__ import COMMANDS, ZOO_COMMANDS

CHECKOUT = Path(__file__).parent.parent


def blocks(language: str, name: str) -> list[str]:
    """The blocks of code of a text, in order."""
    return re.findall(rf"```{language}\n(.*?)```", (CHECKOUT / name).read_text(), flags=re.DOTALL)


def commands() -> list[str]:
    """The command lines of ours, in order."""
    texts = [block for name in ("README.md", "zoo_configs/RESULTS.md") for block in blocks("bash", name)]
    found = re.findall(r"-m sb3_episodic_a2c (.*)", "\n".join(texts).replace("\\\n", " "))
    return list(dict.fromkeys(re.sub(" +", " ", line) for line in found))


@pytest.mark.parametrize("code", blocks("python", "README.md"), ids=["use", "variants", "vector", "resume"])
def test_python(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # What the text takes for granted
    names: dict[str, Any] = {"gym": gym, "EpisodicA2C": EpisodicA2C}
    names |= {"masks": np.arange(20) < 10, "states": None, "episode_starts": np.ones(1, dtype=bool)}
    for statement in ast.parse(re.sub(r"\b\d+(_000)+\b", "1_000", code)).body:
        if "model" in names:
            names["observation"] = np.asarray(names["model"].observation_space.sample())
        exec(compile(ast.Module([statement], []), "README.md", "exec"), names)
    assert names["model"].num_timesteps >= 1_000


@pytest.mark.parametrize("line", commands())
def test_command(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)
    if name in COMMANDS:
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(f"sb3_episodic_a2c.tools.{COMMANDS[name].module}").add_arguments(parser)
        parser.parse_args(arguments)
    else:
        # Which .ci/run starts
        assert name in ZOO_COMMANDS
