"""The extras of this package, and which of them brings a package that is missing."""

import importlib.util
import re

import gymnasium

SOLVE = ("rl_zoo3", "matplotlib", "pandas", "PIL", "pygame", "requests", "tqdm", "yaml", "huggingface_hub")

PACKAGES: dict[str, tuple[str, ...]] = {
    "solve": SOLVE,
    "zoo": ("rl_zoo3", "matplotlib", "moviepy", "optuna", "pandas", "pygame", "requests", "rich", "scipy", "seaborn", "tqdm"),
    "compare": ("rl_zoo3", "joblib", "matplotlib", "pandas", "pygame", "requests", "rich", "scipy"),
    "export": ("onnx", *SOLVE),
    "box2d": ("Box2D",),
    "mujoco": ("mujoco",),
    "atari": ("ale_py", "cv2"),
    "envpool": ("envpool",),
    "dask": ("distributed", "dask"),
    "ray": ("ray",),
}
"""Extra: the packages that it brings, by the names that they are imported by."""

GYMNASIUM_EXTRAS = {
    "box2d": "box2d",
    "mujoco": "mujoco",
    "atari": "atari",
    "classic-control": "solve",
    "classic_control": "solve",
    "toy-text": "solve",
    "toy_text": "solve",
}
"""Extra of gymnasium, as its errors name it: ours that brings the same."""


def install(extra: str) -> str:
    """
    :param extra: Name of an extra
    :return: The command that installs it
    """
    return f"pip install 'sb3-episodic-a2c[{extra}]'"


def lacks_atari(text: str) -> bool:
    """
    :param text: Id of an environment, or what was said of one
    :return: Whether it is an Atari game, without the package that registers them
    """
    is_atari = re.search(r"\bALE\b|(NoFrameskip|Deterministic)-v\d", text) is not None
    return is_atari and importlib.util.find_spec("ale_py") is None


def missing_extra(error: Exception, preferred: str | None = None) -> str | None:
    """
    :param error: Raised where a package is missing
    :param preferred: The extra to name if several bring the package
    :return: Name of the extra that brings it; None if none does
    """
    if lacks_atari(str(error)):
        # Gymnasium and RL Zoo only say that they do not know the game
        return "atari"
    if isinstance(error, gymnasium.error.DependencyNotInstalled):
        return next((ours for theirs, ours in GYMNASIUM_EXTRAS.items() if f"gymnasium[{theirs}]" in str(error)), None)
    package = ((error.name if isinstance(error, ImportError) else None) or "").partition(".")[0]
    extras = [extra for extra, packages in PACKAGES.items() if package in packages]
    return preferred if preferred in extras else next(iter(extras), None)
