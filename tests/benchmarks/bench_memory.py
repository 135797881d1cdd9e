"""Peak resident memory of a merge that has a 3 GB tensor in it: at most idle + --memory + 64 MB.

    python tests/benchmarks/bench_memory.py --method linear ties --memory 64MB 256MB

Each measurement is a process of its own. It first merges a tiny model of the same kind, so that everything is imported
and compiled (`idle`); then the kernel's high-water mark is reset and the large merge runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
ALLOWED_MB = 64
"""What a run may take beyond the idle process and --memory."""
COLUMNS = 4096
TINY_ROWS = 32
MANIFESTS = {
    "linear": """\
merge_method: linear
models:
  - {{model: {a}, parameters: {{weight: 0.5}}}}
  - {{model: {b}, parameters: {{weight: 0.3}}}}
""",
    "ties": """\
merge_method: ties
base_model: {base}
models:
  - {{model: {a}, parameters: {{weight: 0.5, density: 0.2}}}}
  - {{model: {b}, parameters: {{weight: 0.3, density: 0.2}}}}
""",
}


def make_model(folder: Path, rows: int, seed: int) -> None:
    """A llama of one layer whose embedding has `rows` rows: written by chunks, never held."""
    import numpy as np

    shapes = {"model.embed_tokens.weight": (rows, COLUMNS), "model.norm.weight": (COLUMNS,)}
    layer = "model.layers.0"
    shapes |= {f"{layer}.self_attn.{p}_proj.weight": (64, COLUMNS) for p in "qkv"}
    shapes |= {f"{layer}.input_layernorm.weight": (COLUMNS,), f"{layer}.self_attn.o_proj.weight": (COLUMNS, 64)}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    folder.mkdir(parents=True)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(seed)
    # Upper halves of random float32: bfloat16. One chunk again and again, its length no divisor of a row.
    chunk = (random.standard_normal((1 << 23) + 77, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, at, len(chunk)):
            file.write(chunk[: at - start])
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": COLUMNS,
        "num_hidden_layers": 1, "tie_word_embeddings": True, "vocab_size": rows,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def make_models(folder: Path, rows: int) -> dict[str, str]:
    """`base`, `a` and `b`; `a` and `b` hold the same bytes, and take them from the disk once."""
    make_model(folder / "base", rows, 0)
    make_model(folder / "a", rows, 1)
    (folder / "b").mkdir()
    for name in ("model.safetensors", "config.json"):
        os.link(folder / "a" / name, folder / "b" / name)
    return {name: str(folder / name) for name in ("base", "a", "b")}


def resident(key: str) -> float:
    """VmRSS or VmHWM of this process, in MB."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024 / 1e6


def child(method: str, memory: int, workers: int, folder: Path) -> None:
    """The measured process. Prints its figures as JSON."""
    sys.path.insert(0, str(ROOT))
    import merger

    def merge(size: str) -> float:
        models = {name: str(folder / size / name) for name in ("base", "a", "b")}
        out = folder / "out"
        started = time.perf_counter()
        merger.merge(MANIFESTS[method].format(**models), out, memory=memory, workers=workers)
        taken = time.perf_counter() - started
        shutil.rmtree(out)
        return taken

    merge("tiny")
    idle = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    seconds = merge("large")
    print(json.dumps({"idle": idle, "peak": resident("VmHWM"), "seconds": seconds}))


def measure(method: str, memory: int, workers: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", str(folder), "--method", method, "--memory", str(memory),
               "--workers", str(workers)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    found = {key: float(value) for key, value in figures.items()}
    return {**found, "beyond": found["peak"] - found["idle"] - memory / 1e6}


def parse_size(text: str) -> int:
    found = re.fullmatch(r"(\d+)\s*(MB|GB|)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text} is not like 64MB")
    return int(found.group(1)) * {"": 1, "MB": 10**6, "GB": 10**9}[found.group(2)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", nargs="+", choices=list(MANIFESTS), default=list(MANIFESTS))
    parser.add_argument("--memory", nargs="+", type=parse_size, default=[64 * 10**6, 256 * 10**6])
    parser.add_argument("--size", type=parse_size, default=3 * 10**9, help="bytes of the large tensor")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.method[0], arguments.memory[0], arguments.workers, arguments.child)
        return 0
    missed = False
    print("method   --memory    idle     peak   peak - idle - memory   seconds")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        make_models(folder / "tiny", TINY_ROWS)
        make_models(folder / "large", arguments.size // (2 * COLUMNS))
        for method in arguments.method:
            for memory in arguments.memory:
                found = measure(method, memory, arguments.workers, folder)
                wrong = found["beyond"] > ALLOWED_MB
                missed |= wrong
                print(
                    f"{method:8} {memory / 1e6:5.0f} MB {found['idle']:5.0f} MB {found['peak']:5.0f} MB"
                    f" {found['beyond']:14.0f} MB {found['seconds']:12.0f}{'   MISSED' if wrong else ''}",
                    flush=True,
                )
    return missed


if __name__ == "__main__":
    sys.exit(main())
