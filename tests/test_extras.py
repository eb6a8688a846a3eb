"""What a user sees who has not installed an extra: each command in an environment without it."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sb3_episodic_a2c.tools.extras import PACKAGES, install
from tests.processes import PATIENCE

ROOT = Path(__file__).parent.parent
OURS = "sb3-episodic-a2c"


def requirements_of(name: str, extras: set[str]) -> Iterator[Requirement]:
    """What a distribution needs, with some of its extras; nothing if it is not installed, as those of Atari games here."""
    try:
        texts = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for text in texts:
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            yield requirement


def closure(extras: set[str]) -> set[str]:
    """All distributions that pip installs with our package and some of its extras."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(OURS, frozenset(extras))]
    while waiting:
        item = waiting.pop()
        if item in seen:
            continue
        seen.add(item)
        waiting += [(canonicalize_name(r.name), frozenset(r.extras)) for r in requirements_of(item[0], set(item[1]))]
    return {name for name, _ in seen}


@pytest.fixture(scope="session")
def make_environment(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A function that makes a folder of packages: those of our package and some of its extras, and no others."""

    def make(extras: tuple[str, ...]) -> Path:
        folder = tmp_path_factory.mktemp("packages")
        for name in closure(set(extras)) - {OURS}:
            distribution = importlib.metadata.distribution(name)
            for part in {file.parts[0] for file in distribution.files or []} - {".."}:
                path = Path(str(distribution.locate_file(part)))
                if path.exists() and not (folder / part).exists():
                    (folder / part).symlink_to(path)
        return folder

    environments: dict[tuple[str, ...], Path] = {}

    def cached(*extras: str) -> Path:
        if extras not in environments:
            environments[extras] = make(extras)
        return environments[extras]

    return cached


@pytest.mark.parametrize(
    "extra, installed, command",
    [
        ("solve", (), "solve --env CartPole-v1"),
        ("compare", ("solve",), "compare --env CartPole-v1"),
        ("box2d", ("solve",), "solve --env LunarLander-v3"),
        ("envpool", ("solve",), "solve --env CartPole-v1 --vectorization envpool"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("solve", (), "gif --run runs/x -o agent.gif"),
                ("solve", (), "card --run runs/x"),
                ("export", ("solve",), "export --run runs/x"),
                ("zoo", (), "train --env CartPole-v1"),
                ("zoo", ("solve",), "plot_from_file -i results -o results.svg"),
                ("compare", (), "compare --env CartPole-v1"),
                ("box2d", ("compare",), "compare --env LunarLander-v3"),
                ("box2d", ("zoo",), "train --env LunarLander-v3 -n 100"),
                ("mujoco", ("solve",), "solve --env HalfCheetah-v5"),
                ("atari", ("solve",), "solve --env ALE/Pong-v5"),
                ("atari", ("solve",), "solve --env PongNoFrameskip-v4"),
                ("atari", ("zoo",), "train --env ALE/Pong-v5 -n 100"),
                ("atari", ("solve",), "bench --env ALE/Pong-v5 --n-envs 1 --no-extra --no-memory"),
                ("envpool", ("compare",), "compare --env CartPole-v1 --vectorization envpool --seeds 1"),
                ("envpool", ("zoo",), "train --env CartPole-v1 --vec-env envpool -n 100"),
                ("dask", ("compare",), "compare --env CartPole-v1 --backend dask"),
                ("ray", ("compare",), "compare --env CartPole-v1 --backend ray"),
            )
        ),
    ],
)
def test_a_missing_extra_is_named_in_one_line(
    extra: str, installed: tuple[str, ...], command: str, tmp_path: Path, make_environment
) -> None:
    packages = make_environment(*installed)
    # Without site-packages, so that it is an environment of its own
    process = subprocess.run(
        [sys.executable, "-S", "-m", "sb3_episodic_a2c", *command.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(packages)]), "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert process.returncode == 1, process.stderr
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and last.endswith(f"Install it with: {install(extra)}"), process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "runs").exists()


def test_every_extra_has_its_packages_named() -> None:
    """But `test`, whose packages no command needs. A table that lags behind would name the wrong extra or none."""
    extras = set(importlib.metadata.metadata(OURS).get_all("Provides-Extra") or [])
    assert extras - {"test"} == set(PACKAGES)
    distributions = importlib.metadata.packages_distributions()
    for extra, packages in PACKAGES.items():
        brought = closure({extra})
        for package in packages:
            # What is not installed cannot be asked
            names = {canonicalize_name(name) for name in distributions.get(package, [])}
            assert not names or names & brought, f"{extra} does not bring {package}"
