"""CPU seconds of combination_type="svd": PEFT's add_weighted_adapter, and raymerge's on the same adapter files.

    python tests/benchmarks/bench_svd.py --layers 2

Three adapters of rank 16 with the shapes of a 7B llama. raymerge is measured as a whole process, imports and files
included, over all modules. PEFT takes minutes for one module, so it is measured on one module of each size, the call of
add_weighted_adapter alone (no import, no loading), and scaled by the number of modules; --peft-all measures them all.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TARGET = 1 / 100
RANK, ADAPTERS = 16, 3
WEIGHTS = (0.5, 0.3, 0.4)
SHAPES = {
    **{f"self_attn.{p}_proj": (4096, 4096) for p in "qkvo"},
    "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096), "mlp.down_proj": (4096, 11008),
}  # fmt: skip
"""(out, in) of a layer's modules."""
MEASURED = ("self_attn.q_proj", "mlp.gate_proj")
"""One module of each kind; down_proj is gate_proj transposed, and costs PEFT as much."""
PREFIX = "base_model.model.model.layers"


def make_adapters(folder: Path, layers: int) -> list[Path]:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 32, "bias": "none", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "nobody/llama-7b", "target_modules": sorted(n.split(".")[1] for n in SHAPES),
    }  # fmt: skip
    folders = []
    for index in range(ADAPTERS):
        path = folder / f"adapter{index}"
        path.mkdir()
        found = {}
        for layer in range(layers):
            for name, (rows, cols) in SHAPES.items():
                key = f"{PREFIX}.{layer}.{name}"
                found[f"{key}.lora_A.weight"] = 0.02 * torch.randn(RANK, cols, generator=generator)
                found[f"{key}.lora_B.weight"] = 0.02 * torch.randn(rows, RANK, generator=generator)
        save_file(found, path / "adapter_model.safetensors", metadata={"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(config))
        folders.append(path)
    return folders


OURS = """
import sys, merger
*adapters, out = sys.argv[1:]
merger.add_weighted_adapter(adapters, {weights}, out, combination_type="svd", svd_rank={rank})
"""


def measure_ours(adapters: list[Path], out: Path) -> float:
    """CPU seconds of a whole process."""
    code = OURS.format(weights=list(WEIGHTS), rank=RANK)
    child = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, adapters), str(out)], cwd=ROOT, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit("raymerge failed")
    return used.ru_utime + used.ru_stime


def measure_peft(module: str, layer: int, adapters: list[Path], ours: Path) -> dict[str, float]:
    """CPU seconds of PEFT's call on one module, and how far its B·A lies from ours (relative, Frobenius)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors import safe_open

    torch.set_num_threads(1)  # threads that wait for each other would count as PEFT's CPU time
    name = module.split(".")[1]
    rows, cols = SHAPES[module]

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, torch.nn.Linear(cols, rows, bias=False))

    names = [f"adapter{i}" for i in range(len(adapters))]
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=[name])
    model = get_peft_model(Model(), config, adapter_name=names[0])
    for other in names[1:]:
        model.add_adapter(other, config)
    linear = getattr(model.base_model.model, name)
    key = f"{PREFIX}.{layer}.{module}"
    for adapter, path in zip(names, adapters, strict=True):
        with safe_open(path / "adapter_model.safetensors", "pt") as opened:
            linear.lora_A[adapter].weight.data.copy_(opened.get_tensor(f"{key}.lora_A.weight"))
            linear.lora_B[adapter].weight.data.copy_(opened.get_tensor(f"{key}.lora_B.weight"))
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    model.add_weighted_adapter(names, list(WEIGHTS), "merged", combination_type="svd", svd_rank=RANK)
    after, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - started
    theirs = linear.lora_B["merged"].weight.data @ linear.lora_A["merged"].weight.data
    theirs *= linear.scaling["merged"]
    saved = json.loads((ours / "adapter_config.json").read_text())
    with safe_open(ours / "adapter_model.safetensors", "pt") as opened:
        mine = opened.get_tensor(f"{key}.lora_B.weight").float() @ opened.get_tensor(f"{key}.lora_A.weight").float()
    mine *= saved["lora_alpha"] / saved["r"]
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"cpu": cpu, "wall": wall, "apart": float((mine - theirs).norm() / theirs.norm())}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3, help="of raymerge; PEFT runs once")
    parser.add_argument("--peft-all", action="store_true", help="measure PEFT on every module")
    parser.add_argument("--peft-modules", nargs="+", choices=list(SHAPES), default=list(MEASURED))
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        adapters = make_adapters(folder, arguments.layers)
        measure_ours(adapters, folder / "first")
        found = [measure_ours(adapters, folder / f"out{i}") for i in range(arguments.runs)]
        ours = statistics.median(found)
        print(f"raymerge, {arguments.layers * len(SHAPES)} modules, whole process: {ours:.2f} CPU s", flush=True)
        theirs: dict[str, dict[str, float]] = {}
        layers = range(arguments.layers) if arguments.peft_all else range(1)
        for layer in layers:
            for module in SHAPES if arguments.peft_all else arguments.peft_modules:
                theirs[f"{layer}.{module}"] = measured = measure_peft(module, layer, adapters, folder / "out0")
                print(
                    f"PEFT, {module} {SHAPES[module]}: {measured['cpu']:.1f} CPU s, "
                    f"B·A apart by {measured['apart']:.1e}",
                    flush=True,
                )
    total = _scaled(theirs, arguments.layers, measured_all=arguments.peft_all)
    figures: dict[str, Any] = {
        "raymerge": ours, "peft": total, "peft_is_scaled": not arguments.peft_all, "ratio": ours / total,
        "target": TARGET, "modules": theirs, "runs": found,
    }  # fmt: skip
    scaled = "" if arguments.peft_all else " (scaled by the number of modules)"
    print(f"PEFT, all modules{scaled}: {total:.0f} CPU s; ratio 1/{total / ours:.0f}, target 1/{1 / TARGET:.0f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return figures["ratio"] > TARGET or any(m["apart"] > 1e-3 for m in theirs.values())


def _scaled(theirs: dict[str, dict[str, float]], layers: int, *, measured_all: bool) -> float:
    """PEFT's CPU seconds for all modules. A shape that was not measured takes the least that was."""
    if measured_all:
        return sum(found["cpu"] for found in theirs.values())
    by_size = {}
    for key, found in theirs.items():
        rows, cols = SHAPES[key.partition(".")[2]]
        by_size[rows * cols] = found["cpu"]
    least = min(by_size.values())
    return layers * sum(by_size.get(rows * cols, least) for rows, cols in SHAPES.values())


if __name__ == "__main__":
    sys.exit(main())
