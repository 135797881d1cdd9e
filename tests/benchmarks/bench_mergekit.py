"""CPU seconds of whole processes: mergekit's command and raymerge's, on the same YAML and the same models.

    python tests/benchmarks/bench_mergekit.py --mergekit .venv-mergekit/bin/python --runs 3

The models have the shapes of SmolLM2-135M: bfloat16, random, three fine-tunes a little off their base. The two take
turns. One run of raymerge that is not counted comes first: it compiles the kernels, as the first merge after an
installation does; its figures are shown as `first`. Python may keep its bytecode, as that of an installed program is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TARGETS = {"ties": 1 / 10, "dare_ties": 1 / 10, "linear": 1 / 2, "slerp": 1 / 2}
"""raymerge's CPU time over mergekit's, at most."""
HIDDEN, LAYERS, INTERMEDIATE, HEADS, KEYS, VOCABULARY = 576, 30, 1536, 9, 3, 49152
GTA = """\
merge_method: {method}
base_model: {base}
models:
  - {{model: {a}, parameters: {{weight: 0.5, density: 0.2}}}}
  - {{model: {b}, parameters: {{weight: 0.3, density: 0.2}}}}
  - {{model: {c}, parameters: {{weight: 0.4, density: 0.2}}}}
dtype: {dtype}
out_dtype: bfloat16
"""
LINEAR = """\
merge_method: linear
models:
  - {{model: {a}, parameters: {{weight: 0.5}}}}
  - {{model: {b}, parameters: {{weight: 0.3}}}}
  - {{model: {c}, parameters: {{weight: 0.4}}}}
dtype: {dtype}
out_dtype: bfloat16
"""
SLERP = """\
merge_method: slerp
base_model: {base}
models: [{{model: {base}}}, {{model: {a}}}]
parameters: {{t: 0.4}}
dtype: {dtype}
out_dtype: bfloat16
"""
MANIFESTS = {"ties": GTA, "dare_ties": GTA, "linear": LINEAR, "slerp": SLERP}


@dataclass(frozen=True)
class Cost:
    """What a child process took."""

    user: float
    system: float
    wall: float
    peak_mb: float

    @property
    def cpu(self) -> float:
        return self.user + self.system


def measure(command: Sequence[str], folder: Path) -> Cost:
    """Run a command to its end. Its cost includes the children it waited for.

    This process has to stay small: a child's peak begins at what its parent held.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    started = time.perf_counter()
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(child.pid, 0)
    wall = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{(folder / 'log').read_text()[-4000:]}")
    return Cost(used.ru_utime, used.ru_stime, wall, used.ru_maxrss / 1024)


def make_models(folder: Path, layers: int) -> None:
    """Four models, with names as transformers writes them."""
    import torch
    from safetensors.torch import save_file

    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    width = HIDDEN // HEADS * KEYS
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"model.layers.{i}.self_attn.k_proj.weight": (width, HIDDEN),
            f"model.layers.{i}.self_attn.v_proj.weight": (width, HIDDEN),
            f"model.layers.{i}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"model.layers.{i}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"model.layers.{i}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"model.layers.{i}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            f"model.layers.{i}.input_layernorm.weight": (HIDDEN,),
            f"model.layers.{i}.post_attention_layernorm.weight": (HIDDEN,),
        }
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KEYS, "max_position_embeddings": 8192,
        "tie_word_embeddings": True, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.04 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for seed, name in enumerate(("base", "a", "b", "c")):
        generator.manual_seed(seed)
        path = folder / name
        path.mkdir()
        changed = {
            k: (v + 0.002 * bool(seed) * torch.randn(v.shape, generator=generator)).bfloat16() for k, v in base.items()
        }
        save_file(changed, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config))


def compare(
    methods: Sequence[str], mergekit: Path, folder: Path, *, runs: int, layers: int, dtype: str, times: float | None
) -> list[dict[str, Any]]:
    """One row a method: medians and their ratio."""
    subprocess.run([sys.executable, __file__, "--make", str(folder), "--layers", str(layers)], check=True)
    models = {name: str(folder / name) for name in ("base", "a", "b", "c")}
    rows = []
    for method in methods:
        manifest = folder / f"{method}.yml"
        manifest.write_text(MANIFESTS[method].format(method=method, dtype=dtype, **models))
        out = folder / "out"
        theirs = [
            str(mergekit.parent / "mergekit-yaml"), str(manifest), str(out),
            "--random-seed", "0", "--no-copy-tokenizer",
        ]  # fmt: skip
        ours = [sys.executable, "-m", "jobs.cli", "merge", str(manifest), str(out), "--on", "here"]
        costs: dict[str, list[Cost]] = {"raymerge": [], "mergekit": []}
        first = measure(ours, folder)
        shutil.rmtree(out)
        for _ in range(runs):
            for name, command in (("mergekit", theirs), ("raymerge", ours)):
                costs[name].append(measure(command, folder))
                shutil.rmtree(out)
                print(f"{method:10} {name:9} {costs[name][-1].cpu:7.2f} s", file=sys.stderr, flush=True)
        medians = {name: statistics.median(c.cpu for c in found) for name, found in costs.items()}
        rows.append(
            {
                "method": method,
                "mergekit": medians["mergekit"],
                "raymerge": medians["raymerge"],
                "first": first.cpu,
                "ratio": medians["raymerge"] / medians["mergekit"],
                "target": 1 / times if times else TARGETS[method],
                "peak_mb": {name: statistics.median(c.peak_mb for c in found) for name, found in costs.items()},
                "wall": {name: statistics.median(c.wall for c in found) for name, found in costs.items()},
                "runs": {name: [asdict(c) for c in found] for name, found in costs.items()},
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["method      mergekit  raymerge     first    ratio   target   peak MB (mergekit, raymerge)"]
    lines += [
        f"{r['method']:10} {r['mergekit']:8.2f}s {r['raymerge']:8.2f}s {r['first']:8.2f}s  1/{1 / r['ratio']:<5.1f}"
        f"  1/{1 / r['target']:<5.0f}  {r['peak_mb']['mergekit']:.0f}, {r['peak_mb']['raymerge']:.0f}"
        f"{'' if r['ratio'] <= r['target'] else '   MISSED'}"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mergekit", type=Path, default=ROOT / ".venv-mergekit" / "bin" / "python")
    parser.add_argument("--methods", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        help="what mergekit computes in; raymerge computes in float32; both store bfloat16",
    )
    parser.add_argument("--times", type=float, help="hold all to 1/TIMES of mergekit's time, whatever the method")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make is not None:
        make_models(arguments.make, arguments.layers)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(
            arguments.methods, arguments.mergekit.absolute(), Path(folder), runs=arguments.runs,
            layers=arguments.layers, dtype=arguments.dtype, times=arguments.times,
        )  # fmt: skip
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return any(row["ratio"] > row["target"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
