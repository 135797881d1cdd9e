"""Small adapters and models in folders, the command in this process or another, and what a folder holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
LAYERS = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(2))
STATE = ".raymerge"


# ---- sources ---------------------------------------------------------------------------------------------------------


def lora_config(rank: int, **more: object) -> dict[str, object]:
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "base_model_name_or_path": "org/base",
        "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **more,
    }  # fmt: skip


def lora_tensors(
    seed: int, *, modules: Sequence[str] = LAYERS, rank: int = 4, rows: int = 96, cols: int = 64
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for module in modules:
        found[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, cols, generator=generator)
        found[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return found


def adapter(
    folder: Path, seed: int, *, rank: int = 4, tensors: Mapping[str, Tensor] | None = None,
    config: Mapping[str, object] | None = None, **shape: Any,
) -> Path:  # fmt: skip
    """A LoRA adapter as PEFT saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    found = dict(tensors) if tensors is not None else lora_tensors(seed, rank=rank, **shape)
    save_file(found, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**lora_config(rank), **(config or {})}))
    return folder


def model_tensors(
    seed: int, *, rows: int = 96, cols: int = 64, layers: int = 2, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {
        f"model.layers.{i}.self_attn.q_proj.weight": torch.randn(rows, cols, generator=generator).to(dtype)
        for i in range(layers)
    }
    return {**found, "model.norm.weight": (1 + torch.randn(cols, generator=generator) / 8).to(dtype)}


def model(
    folder: Path, seed: int, *, tensors: Mapping[str, Tensor] | None = None,
    config: Mapping[str, object] | None = None, **shape: Any,
) -> Path:  # fmt: skip
    """A checkpoint of one file with its config."""
    folder.mkdir(parents=True, exist_ok=True)
    found = dict(tensors) if tensors is not None else model_tensors(seed, **shape)
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    document = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **(config or {})}
    (folder / "config.json").write_text(json.dumps(document))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def raw_file(header: bytes | Mapping[str, object], data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file by hand, with what header one likes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def manifest(path: Path, document: Mapping[str, object]) -> Path:
    """JSON is YAML."""
    path.write_text(json.dumps(document))
    return path


# ---- the command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on standard output."""
        return json.loads(self.out)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(*arguments: str | Path, cwd: Path | None = None) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *map(str, arguments)], cwd=cwd or ROOT, env=environment(), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], *, timeout: float = 120) -> Outcome:
    """A process's end: what it printed, and its exit code as a shell would give it."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    code = process.returncode
    return Outcome(128 - code if code < 0 else code, out, err)


def command(*arguments: str | Path, cwd: Path | None = None) -> Outcome:
    return ended(start(*arguments, cwd=cwd))


@contextmanager
def signals_kept() -> Iterator[None]:
    """The command catches signals for good; a test gives them back."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


Command = Callable[..., Outcome]


# ---- what a folder holds ---------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, tuple[bytes | None, int]] | None:
    """Every file's bytes and time, and every folder; None where there is nothing."""
    if not folder.exists():
        return None
    if folder.is_file():
        return {"": (folder.read_bytes(), folder.stat().st_mtime_ns)}
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else (None, 0)
        for path in sorted(folder.rglob("*"))
    }


def names(folder: Path) -> set[str]:
    """Files below a folder that are no state of a run."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith(f"{STATE}/")}


def content_digest(folder: Path) -> str:
    return str(json.loads((folder / "raymerge.json").read_text())["content_digest"])
