"""Versions of what decides the results."""

import importlib
import importlib.util
import platform

PACKAGES = ("sb3_episodic_a2c", "stable_baselines3", "sb3_contrib", "rl_zoo3", "gymnasium", "torch", "numpy")


def versions() -> dict[str, str]:
    """:return: Versions of the packages among :data:`PACKAGES` that are installed, and of Python"""
    modules = {name: importlib.import_module(name) for name in PACKAGES if importlib.util.find_spec(name) is not None}
    return {**{name: str(module.__version__) for name, module in modules.items()}, "python": platform.python_version()}
