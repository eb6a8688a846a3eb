"""The layout of the package: imports go downward only, and there is one loop."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sb3_episodic_a2c"

LAYERS = [
    {"returns", "losses", "samples", "selection", "presets"},
    {"policies", "buffers", "vector"},
    {"plain_mlp", "callbacks"},
    {"actors", "evaluation"},
    {"guards"},
    {"episodic_a2c"},
    {"maskable", "recurrent"},
    {"checkpoints"},
    {"__init__"},
    {"tools"},
    {"__main__"},
]
"""From the bottom to the top. A module imports from layers below its own. Those of `guards` or `tools` import each other."""


def module_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def layer_of(module: str) -> int:
    (layer,) = [number for number, modules in enumerate(LAYERS) if module in modules]
    return layer


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def imported_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports; ``__init__`` for the package itself."""
    ours = {tuple(name.split(".")) for name in imports_of(path)}
    return {parts[1] if len(parts) > 1 else "__init__" for parts in ours if parts[0] == "sb3_episodic_a2c"}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_go_downward_only(path: Path) -> None:
    module = module_of(path)
    for imported in imported_modules(path):
        assert layer_of(imported) < layer_of(module) or imported == module in ("guards", "tools"), f"{path} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_one_loop_one_train_step(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name in ("collect_rollouts", "train", "learn"):
            assert module_of(path) == "episodic_a2c", f"{path} defines {node.name}"


def test_the_base_class_names_no_variant() -> None:
    """It refuses their policies through `_policy_base_class`, and their hooks do the rest."""
    text = (PACKAGE / "episodic_a2c.py").read_text()
    assert not re.findall(r"mask|lstm|recurrent", text, flags=re.IGNORECASE)


def test_tools_import_each_other_in_no_circle() -> None:
    paths = {}
    for path in (PACKAGE / "tools").rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    imports: dict[str, set[str]] = {}
    for name, path in paths.items():
        # Also those within functions
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.module]
        submodules = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
        imports[name] = {*submodules, *(str(node.module) for node in nodes)} & paths.keys()
    assert "sb3_episodic_a2c.tools.comparison.summaries" in imports["sb3_episodic_a2c.tools.comparison.plots"]
    # Raises an error that names the circle
    graphlib.TopologicalSorter(imports).prepare()


MOST_LINES = {"episodic_a2c.py": 750}
"""The others have 600 at most."""


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_files_stay_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) < MOST_LINES.get(path.name, 600)


def test_one_module_knows_the_inside_of_rl_zoo() -> None:
    """Its registers, its manager and its bugs. Other modules only mention its name."""
    inside = [path.name for path in FILES if re.search(r"(import|from) rl_zoo3|rl_zoo3\.", path.read_text())]
    assert inside == ["zoo.py"]


@pytest.mark.parametrize("name", ["returns", "selection"])
def test_pure_maths_needs_neither_torch_nor_sb3(name: str) -> None:
    packages = {imported.split(".")[0] for imported in imports_of(PACKAGE / f"{name}.py")}
    assert packages and not packages & {"torch", "stable_baselines3", "sb3_contrib"}


def test_importing_the_package_needs_no_extra_and_has_no_side_effects() -> None:
    """The tools' dependencies are extras; only the tools may import them."""
    code = (
        "import sys, torch; threads = torch.get_num_threads(); import sb3_episodic_a2c; "
        "assert torch.get_num_threads() == threads; "
        "print([name for name in ('rl_zoo3', 'scipy', 'joblib', 'PIL', 'sb3_episodic_a2c.tools') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() in ("[]", "['PIL']", "['scipy']"), output


def test_the_names_offered_exist() -> None:
    import sb3_episodic_a2c

    assert sorted(sb3_episodic_a2c.__all__) == sb3_episodic_a2c.__all__
    for name in sb3_episodic_a2c.__all__:
        assert hasattr(sb3_episodic_a2c, name)
