"""The house's own rules: what is packaged, what may import what, who prints."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("jobs", "cluster", "merger")


BLOCKED = """
import sys

class Blocked:
    '''What plan, inspect and --help do without.'''
    names = {"torch", "transformers", "ray", "peft", "bitsandbytes", "numba"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""

TORCH_FREE = [
    "errors",
    "tensors",
    "storage",
    "formats",
    "methods",
    "methods.declare",
    "adapters",
    "quantization",
    "manifest",
    "catalog",
    "generated",
    "vocabulary",
    "made",
    "plan",
]
"""Modules of merger that declare and plan."""

WHOLE = ("formats", "manifest", "catalog", "vocabulary", "plan")
"""Those of them that are torch-free in every file, should they be packages."""


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imported(path: Path) -> Iterator[str]:
    """Every absolute module name that the file imports, at any depth."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


def run(
    program: str, *, cwd: Path | None = None, python: Path | str = sys.executable
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-c", program],
        cwd=cwd or ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    [built] = folder.glob("*.whl")
    return built


# --- the package


def info_folder(wheel: Path) -> str:
    return "-".join(wheel.name.split("-")[:2]) + ".dist-info"


def test_the_wheel_holds_exactly_the_three_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {*PACKAGES, info_folder(wheel)}
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    shipped = {str(path.relative_to(ROOT)) for path in sources(*PACKAGES)}
    demo = {name for name in shipped if name.startswith("jobs/demo/")}  # it needs the checkout
    assert shipped - demo <= set(names)
    assert not demo & set(names)
    assert not [name for name in names if "__pycache__" in name]


def test_the_wheel_says_whose_and_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = info_folder(wheel)
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Classifier: Private :: Do Not Upload" in metadata
    assert "raymerge = jobs.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert "TERMS AND CONDITIONS" in archive.read(f"{info}/licenses/LICENSE").decode()


def test_the_wheel_runs_from_an_environment_that_never_saw_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """An environment with the wheel in it, and our dependencies borrowed through a .pth file."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    [site] = (home / "lib").glob("python3.*/site-packages")
    borrowed = Path(pytest.__file__).parents[1]
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for command in ("--help", "methods"):
        done = subprocess.run(
            [home / "bin" / "raymerge", command],
            cwd=empty,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    program = "import jobs, cluster, merger; print(*(m.__path__[0] for m in (jobs, cluster, merger)))"
    where = run(program, cwd=empty, python=python)
    assert where.stdout.split() == [str(site / package) for package in PACKAGES]


def test_constraints_name_versions_and_no_places() -> None:
    for name in ("constraints.txt", "tests/mergekit-constraints.txt"):
        pins = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
        assert pins
        for pin in pins:
            package, _, version = pin.partition("==")
            assert package, pin
            assert version, pin
            assert not set(pin) & set("@/: +"), pin


# --- imports


@pytest.mark.parametrize("line", ["--help", "plan --help", "inspect --help", "methods"])
def test_the_command_runs_with_torch_transformers_and_ray_blocked(line: str) -> None:
    done = run(f"{BLOCKED}\nfrom jobs.cli import main\nsys.exit(main({line.split()!r}))")
    assert done.returncode == 0, done.stderr
    assert done.stdout


def torch_free_modules() -> list[str]:
    found = []
    for name in TORCH_FREE:
        path = ROOT / "merger" / name.replace(".", "/")
        if path.is_dir():
            found.append(f"merger.{name}")
            if name in WHOLE:
                found += [f"merger.{name}.{file.stem}" for file in sorted(path.glob("*.py")) if file.stem != "__init__"]
        elif path.with_suffix(".py").exists():
            found.append(f"merger.{name}")
    return found


def test_declarations_and_plans_import_no_torch() -> None:
    """All in one process: what one module imports late, no other may need early."""
    modules = torch_free_modules()
    assert "merger.methods.declare" in modules
    done = run(f"{BLOCKED}\nimport importlib\nfor name in {modules!r}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sources("merger", "jobs"), ids=lambda path: str(path.relative_to(ROOT)))
def test_ray_is_imported_in_cluster_alone(path: Path) -> None:
    assert not [name for name in imported(path) if name.partition(".")[0] == "ray"]


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_mergekit_is_imported_nowhere(path: Path) -> None:
    assert not [name for name in imported(path) if name.partition(".")[0] == "mergekit"]


@pytest.mark.parametrize("path", sources("merger", "cluster"), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_jobs_print(path: Path) -> None:
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert not [f"{path.name}:{call.lineno}" for call in calls if call.func.id == "print"]  # type: ignore[attr-defined]


def test_tests_have_no_init_files() -> None:
    """tests/merger/__init__.py would stand in the way of `import merger` (importlib mode needs none)."""
    assert not list((ROOT / "tests").rglob("__init__.py"))
