"""Machine code is kept, trusted only when it is what it says, and needs no compiler once it is there."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from merger.kernels import native
from merger.kernels.native import CPU, Kernel, Library, ObjectCode, Signature

ROOT = Path(__file__).parents[3]
X = np.array([1.5, -2.0, 0.25], np.float32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "code"))
    return tmp_path / "code"


def scaled(library: Library) -> list[float]:
    x = X.copy()
    library.scale(x, 2.0)
    found: list[float] = x.tolist()
    return found


def test_signatures() -> None:
    signature = Signature.parse("u2[:], f4[:,:], i8, f4 -> f8")
    assert signature == Signature((("u2", 1), ("f4", 2), ("i8", 0), ("f4", 0)), "f8")
    assert len(signature.c_types) == 2 + 3 + 1 + 1
    assert Signature.parse("i8 ->") == Signature((("i8", 0),), "")


@pytest.mark.slow  # a minute: each is compiled anew
@pytest.mark.parametrize("module", ["bits", "codes", "cpu"])
def test_every_kernel_stands_alone(module: str) -> None:
    names = importlib.import_module(f"merger.kernels.{module}").SIGNATURES
    assert names
    for name in names:
        assert isinstance(native.compile_kernel(module, name), ObjectCode), name


def test_what_is_kept_is_used_and_what_is_damaged_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def counting(module: str, name: str) -> ObjectCode | Kernel:
        compiled.append(name)
        return made(module, name)

    made = native.compile_kernel
    monkeypatch.setattr(native, "compile_kernel", counting)
    assert scaled(Library("cpu")) == [3.0, -4.0, 0.5]
    (kept,) = folder.glob("cpu.scale.*.o")
    whole = kept.read_bytes()
    assert scaled(Library("cpu")) == [3.0, -4.0, 0.5]
    assert compiled == ["scale"]
    for damaged in (whole[:-1], whole[:40], b"", whole.replace(b'"origin": "', b'"origin": "0', 1)):
        kept.write_bytes(damaged)
        assert scaled(Library("cpu")) == [3.0, -4.0, 0.5]
        assert kept.read_bytes() != damaged
    assert compiled == ["scale"] * 5
    assert [path.name for path in folder.iterdir()] == [kept.name]


def test_without_a_place_for_it_every_process_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/proc/nowhere")
    assert scaled(Library("cpu")) == [3.0, -4.0, 0.5]


def test_code_that_would_refer_to_more_than_itself_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_standing_alone", lambda entry: None)
    assert scaled(Library("cpu")) == [3.0, -4.0, 0.5]
    assert not folder.exists()


def test_arrays_that_would_be_misread_are_refused() -> None:
    for wrong in (X.astype(np.float64), np.zeros(6, np.float32)[::2], np.zeros((2, 2), np.float32)):
        with pytest.raises(TypeError, match="scale takes contiguous float32 of 1 dimensions"):
            CPU.scale(wrong, 2.0)
    with pytest.raises(ValueError, match=r"argument 2"):
        CPU.scale(X)
    with pytest.raises(AttributeError, match="cpu has no kernel nothing"):
        _ = CPU.nothing


def test_numba_is_imported_to_compile_and_never_again(folder: Path) -> None:
    program = """
import sys
import numpy as np
from merger.kernels.dispatch import CompiledKernels
x = np.ones(3, np.float32)
CompiledKernels().scale(x, 2.0)
assert x.tolist() == [2.0] * 3
print("numba" in sys.modules)
"""
    said = [
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "NUMBA_CACHE_DIR": str(folder)},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
        ).stdout.strip()
        for _ in range(2)
    ]  # fmt: skip
    assert said == ["True", "False"]
