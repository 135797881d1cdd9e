"""The name guard in environments where another distribution owns one of the three names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("jobs", "cluster", "merger")

PROGRAM = """
import sys
from jobs.guard import check_names
try:
    check_names()
except Exception as error:
    print(type(error).__name__, error, file=sys.stderr)
    sys.exit(2)
"""


def install(folder: Path, distribution: str, files: dict[str, str], *, metadata: str = "RECORD") -> None:
    """What pip leaves behind for a small pure package: its files and a .dist-info (or, of old, a top_level.txt)."""
    info = folder / f"{distribution}-1.4.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.4.1\n")
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    lines = {
        "RECORD": [f"{path},," for path in (*files, f"{info.name}/METADATA", f"{info.name}/RECORD")],
        "top_level.txt": sorted({path.split("/")[0] for path in files}),
    }[metadata]
    (info / metadata).write_text("".join(f"{line}\n" for line in lines))


def install_ours(folder: Path) -> None:
    """Copy the three packages, as the wheel would lay them."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))


def start(*path: Path, cwd: Path, arguments: tuple[str, ...] = ("-c", PROGRAM)) -> subprocess.CompletedProcess[str]:
    """Run the guard with `path` in front of everything; -P keeps the working directory off the path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_our_own_three_names_pass(tmp_path: Path) -> None:
    done = start(ROOT, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_installed_copy_of_ours_passes(tmp_path: Path) -> None:
    install(tmp_path / "site", "raymerge", {f"{package}/py.typed": "" for package in PACKAGES})
    install_ours(tmp_path / "copy")
    done = start(tmp_path / "copy", tmp_path / "site", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_foreign_package_found_first_is_named(tmp_path: Path) -> None:
    """An editable install of ours beside PyPI's `cluster`: theirs is what `import cluster` finds."""
    theirs = tmp_path / "site"
    install(theirs, "cluster", {"cluster/__init__.py": "raise SystemExit('foreign code ran')\n"})
    done = start(theirs, ROOT, cwd=tmp_path)
    assert done.returncode == 2
    assert "RefusedError foreign-package: the package cluster is owned by cluster 1.4.1" in done.stderr
    assert f"cluster is imported from {theirs / 'cluster'}" in done.stderr
    assert "pip uninstall cluster" in done.stderr
    assert "foreign code ran" not in done.stderr


@pytest.mark.parametrize("metadata", ["RECORD", "top_level.txt"])
def test_a_foreign_package_behind_ours_is_named(tmp_path: Path, metadata: str) -> None:
    """Ours is found first here; a worker with another path would find theirs."""
    install(tmp_path / "site", "Some_Jobs", {"jobs/__init__.py": ""}, metadata=metadata)
    done = start(ROOT, tmp_path / "site", cwd=tmp_path)
    assert done.returncode == 2
    assert "the package jobs is owned by Some_Jobs 1.4.1" in done.stderr


def test_a_foreign_single_module_is_named(tmp_path: Path) -> None:
    install(tmp_path / "site", "onefile", {"cluster.py": ""})
    done = start(tmp_path / "site", ROOT, cwd=tmp_path)
    assert done.returncode == 2
    assert "the package cluster is owned by onefile 1.4.1" in done.stderr


def test_two_distributions_mixed_into_one_folder_are_told_apart(tmp_path: Path) -> None:
    """Both installed into one environment, which pip does without a warning: one `cluster/` with the files of both."""
    site = tmp_path / "site"
    install_ours(site)
    install(site, "raymerge", {f"{package}/py.typed": "" for package in PACKAGES})
    install(site, "cluster", {"cluster/__init__.py": "", "cluster/linkage.py": ""})
    done = start(site, cwd=tmp_path)
    assert done.returncode == 2
    assert "the package cluster is owned by cluster 1.4.1" in done.stderr
    assert str(site) in done.stderr
    assert "owned by raymerge" not in done.stderr


def test_a_foreign_merger_is_named_without_the_error_tree_that_lives_there(tmp_path: Path) -> None:
    theirs = tmp_path / "site"
    install(theirs, "merger", {"merger/__init__.py": "raise SystemExit('foreign code ran')\n"})
    done = start(theirs, ROOT, cwd=tmp_path)
    assert done.returncode == 2
    assert "foreign-package: the package merger is owned by merger 1.4.1" in done.stderr
    assert "foreign code ran" not in done.stderr


def test_three_packages_from_two_folders_are_refused(tmp_path: Path) -> None:
    """A stale copy on PYTHONPATH, owned by nobody."""
    shutil.copytree(ROOT / "cluster", tmp_path / "stale" / "cluster")
    done = start(tmp_path / "stale", ROOT, cwd=tmp_path)
    assert done.returncode == 2
    assert f"cluster is imported from {tmp_path / 'stale' / 'cluster'}, not from {ROOT / 'cluster'}" in done.stderr


def test_a_name_with_similar_beginning_is_not_ours_to_guard(tmp_path: Path) -> None:
    files = {"clusters/__init__.py": "", "jobs_board/__init__.py": "", "x/merger/y.py": ""}
    install(tmp_path / "site", "clusters", files)
    done = start(ROOT, tmp_path / "site", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["cluster", "merger"])
def test_the_command_stops_with_exit_code_2(tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "site"
    install(theirs, f"their-{name}", {f"{name}/__init__.py": "raise SystemExit('foreign code ran')\n"})
    done = start(theirs, ROOT, cwd=tmp_path, arguments=("-m", "jobs.cli", "methods"))
    assert done.returncode == 2, done.stderr
    assert f"the package {name} is owned by their-{name} 1.4.1" in done.stderr
    assert "Traceback" not in done.stderr
