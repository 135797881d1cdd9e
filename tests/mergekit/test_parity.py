"""The same YAML, the same model: mergekit 0.1.5 in a process and a venv of its own, and raymerge here.

float32 results are equal to 1e-6, bfloat16 ones to one unit in the last place. What cannot be equal is counted and
explained: elements tied at a trim threshold (mergekit's sort is unstable), and random masks (only their laws compare).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import merger

pytestmark = [pytest.mark.mergekit, pytest.mark.filterwarnings("default")]

HIDDEN, LAYERS, VOCABULARY = 64, 4, 256
FP32_TOLERANCE = 1e-6
FP32_HALF_STEP = 2.0**-24
"""The rounding of one float32 operation on numbers below 1."""
MAX_TIED_SHARE = 0.005
SIGMAS = 5.0

Tensors = dict[str, Tensor]


# ---------------------------------------------------------------------------------------------------- models and runs


MAKE_MODELS = """
import sys, torch
from pathlib import Path
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig, BertForSequenceClassification, GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig,
    LlamaForCausalLM, PreTrainedTokenizerFast
)

root, dtype, tied = Path(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3] == "tied"
torch.manual_seed(7)
if sys.argv[4] == "gpt2":
    tied = True
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=64, n_layer=4, n_head=4, n_positions=128))
elif sys.argv[4] == "bert":
    model = BertForSequenceClassification(BertConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=128, num_labels=3,
    ))
else:
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied,
    ))
embeddings = "transformer.wte.weight" if sys.argv[4] == "gpt2" else "model.embed_tokens.weight"
base = {name: value.clone() for name, value in model.state_dict().items()}
tokens = Tokenizer(models.WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))
for seed, name in enumerate(("base", "a", "b", "c")):
    generator = torch.Generator().manual_seed(seed)
    changed = {k: v + 0.006 * bool(seed) * torch.randn(v.shape, generator=generator) for k, v in base.items()}
    if tied:
        changed["lm_head.weight"] = changed[embeddings]
    model.float().load_state_dict(changed)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, temperature=0.6, do_sample=True)
    model.to(dtype).save_pretrained(root / name)
    PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="w0").save_pretrained(root / name)
"""
"""Run in a process of its own: importing transformers warns, and warnings are errors here."""


@dataclass(frozen=True)
class Bench:
    """Where models lie and outputs go. Models are made once, when a test first asks for their kind."""

    root: Path
    python: Path
    families: dict[str, dict[str, str]] = field(default_factory=dict)

    def family(self, dtype: str = "float32", head: str = "untied", model: str = "llama") -> dict[str, str]:
        """Paths of `base`, `a`, `b` and `c`."""
        kind = f"{model}-{dtype}-{head}"
        if kind not in self.families:
            folder = self.root / kind
            _run([sys.executable, "-c", MAKE_MODELS, str(folder), dtype, head, model])
            self.families[kind] = {name: str(folder / name) for name in ("base", "a", "b", "c")}
        return self.families[kind]

    def both(self, text: str, models: dict[str, str], *options: str, sets: tuple[str, ...] = ()) -> tuple[Path, Path]:
        """Merge one YAML with mergekit and with raymerge. Returns their outputs."""
        folder = self.root / f"run-{len(list(self.root.glob('run-*')))}"
        folder.mkdir()
        manifest = folder / "manifest.yml"
        manifest.write_text(string.Template(text).substitute(models))
        theirs, ours = folder / "theirs", folder / "ours"
        command = Path(self.python).parent / "mergekit-yaml"
        _run([str(command), str(manifest), str(theirs), "--random-seed", "0", *options])
        merger.merge(manifest, ours, overrides=sets)
        return theirs, ours


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, mergekit_python: Path) -> Bench:
    return Bench(tmp_path_factory.mktemp("mergekit"), mergekit_python)


def tensors(folder: Path) -> Tensors:
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def config(folder: Path) -> dict[str, object]:
    loaded = json.loads((folder / "config.json").read_text())
    assert isinstance(loaded, dict)
    return loaded


# ----------------------------------------------------------------------------------------------------- how to compare


def bf16_steps(x: Tensor, y: Tensor) -> Tensor:
    """How many bfloat16 numbers lie between the elements of two tensors; the two zeros are one number."""

    def rank(value: Tensor) -> Tensor:
        bits = value.view(torch.int16).to(torch.int32)
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (rank(x) - rank(y)).abs()


def assert_same_structure(theirs: Path, ours: Path) -> None:
    """Names, shapes, dtypes, the config's layers and dtype, and every file that goes along."""
    left, right = tensors(theirs), tensors(ours)
    assert set(left) == set(right)
    assert {k: (v.shape, v.dtype) for k, v in left.items()} == {k: (v.shape, v.dtype) for k, v in right.items()}
    mine, other = config(ours), config(theirs)
    for key in ("num_hidden_layers", "dtype", "torch_dtype", "vocab_size", "architectures", "model_type"):
        assert mine.get(key) == other.get(key), key
    apart = re.compile(r"README\.md|mergekit_config\.yml|config\.json|.*\.safetensors|.*\.index\.json")
    along = [file for file in theirs.iterdir() if not apart.fullmatch(file.name)]
    generates = {"generation_config.json"} if mine["model_type"] != "bert" else set()
    assert {"tokenizer.json", "tokenizer_config.json"} | generates <= {file.name for file in along}
    for file in along:
        assert (ours / file.name).read_bytes() == file.read_bytes(), file.name


def assert_equal(theirs: Path, ours: Path) -> None:
    """Every element: 1e-6 in float32, one unit in the last place in bfloat16 (or what float32 cannot tell apart)."""
    assert_same_structure(theirs, ours)
    left, right = tensors(theirs), tensors(ours)
    wrong: dict[str, float] = {}
    for name, value in left.items():
        if value.dtype == torch.bfloat16:
            # Where terms cancel, the last bit of a float32 sum is many steps of a bfloat16 near zero.
            sizeable = (value.float() - right[name].float()).abs() > FP32_HALF_STEP
            steps = (bf16_steps(value, right[name]) * sizeable).max().item()
            if steps > 1:
                wrong[name] = float(steps)
        else:
            difference = (value - right[name]).abs().max().item()
            if not difference <= FP32_TOLERANCE:
                wrong[name] = difference
    assert not wrong


# ------------------------------------------------------------------------------------------------ equal by arithmetic


CASES = {
    "linear": """
        merge_method: linear
        models:
          - {model: $a, parameters: {weight: 0.5}}
          - {model: $b, parameters: {weight: 0.3}}
          - {model: $c, parameters: {weight: 0.4}}
        """,
    "linear, not normalized, a negative weight": """
        merge_method: linear
        models:
          - {model: $a, parameters: {weight: 1.0}}
          - {model: $b, parameters: {weight: -0.5}}
          - {model: $c, parameters: {weight: 0.7}}
        parameters: {normalize: false}
        """,
    "linear, gradients; what is in no layer takes the first anchor": """
        merge_method: linear
        models:
          - {model: $a, parameters: {weight: [0.9, 0.5, 0.1]}}
          - {model: $b, parameters: {weight: [0.2, 1]}}
        """,
    "linear, the first filter that matches wins": """
        merge_method: linear
        models:
          - model: $a
            parameters:
              weight:
                - {filter: self_attn, value: 0.9}
                - {filter: q_proj, value: 0.0}
                - {filter: mlp, value: [0.1, 0.8]}
                - {value: 0.4}
          - {model: $b, parameters: {weight: 1.0}}
        """,
    "linear, no filter matches: the next scope": """
        merge_method: linear
        models:
          - {model: $a, parameters: {weight: [{filter: mlp, value: 0.2}]}}
          - {model: $b, parameters: {weight: [{filter: self_attn, value: [0, 1]}]}}
        parameters:
          weight: 0.7
          normalize: [{filter: mlp, value: false}, {value: true}]
        """,
    "linear, the base is a member": """
        merge_method: linear
        base_model: $base
        models:
          - {model: $base, parameters: {weight: 0.6}}
          - {model: $a, parameters: {weight: 0.2}}
        """,
    "linear, an asterisk matches all": """
        merge_method: linear
        models:
          - {model: $a, parameters: {weight: [{filter: embed, value: 0.1}, {filter: "*", value: 0.6}]}}
          - {model: $b, parameters: {weight: [{filter: layers.1, value: 2.0}, {value: 0.5}]}}
        """,
    "task_arithmetic": """
        merge_method: task_arithmetic
        base_model: $base
        models:
          - {model: $a, parameters: {weight: 1.0}}
          - {model: $b, parameters: {weight: -0.4}}
          - {model: $c, parameters: {weight: 0.3}}
        parameters: {lambda: 0.7}
        """,
    "task_arithmetic, normalized, gradient of lambda, a weight that YAML 1.1 takes for text": """
        merge_method: task_arithmetic
        base_model: $base
        models:
          - {model: $base}
          - {model: $a, parameters: {weight: 1e-1}}
          - {model: $b, parameters: {weight: 0.5}}
        parameters: {normalize: true, lambda: [0.5, 1.5]}
        """,
    "task_arithmetic, normalized, weights that cancel": """
        merge_method: task_arithmetic
        base_model: $base
        models:
          - {model: $a, parameters: {weight: 1.0}}
          - {model: $b, parameters: {weight: -1.0}}
        parameters: {normalize: true}
        """,
    "ties": """
        merge_method: ties
        base_model: $base
        models:
          - {model: $a, parameters: {weight: 0.5, density: 0.2}}
          - {model: $b, parameters: {weight: 0.3, density: 0.5}}
          - {model: $c, parameters: {weight: 0.8, density: 1.0}}
        """,
    "ties, not normalized, gradients of density": """
        merge_method: ties
        base_model: $base
        models:
          - {model: $a, parameters: {weight: 1.0, density: [1, 0.1]}}
          - {model: $b, parameters: {weight: 0.6, density: [0.3, 0.9, 0.2]}}
        parameters: {normalize: false, int8_mask: true}
        """,
    "ties, a negative weight": """
        merge_method: ties
        base_model: $base
        models:
          - {model: $a, parameters: {weight: 1.0, density: 0.4}}
          - {model: $b, parameters: {weight: -0.6, density: 0.4}}
          - {model: $c, parameters: {weight: 0.9, density: 0.4}}
        """,
    "ties, lambda, filters, one element left, none left": """
        merge_method: ties
        base_model: $base
        models:
          - model: $a
            parameters:
              weight: [{filter: mlp, value: 0.5}, {value: 1}]
              density: [{filter: norm, value: 0.001}, {filter: o_proj, value: 0.0}, {value: 0.35}]
          - {model: $b, parameters: {weight: 1.0}}
        parameters: {density: 0.6, lambda: 1.3}
        """,
    "ties, the norm restored": """
        merge_method: ties
        base_model: $base
        models:
          - {model: $a, parameters: {weight: 0.5, density: 0.3}}
          - {model: $b, parameters: {weight: 0.7, density: 0.3}}
        parameters: {rescale: true}
        """,
    "dare_linear, all kept": """
        merge_method: dare_linear
        base_model: $base
        models:
          - {model: $a, parameters: {weight: 0.5, density: 1.0}}
          - {model: $b, parameters: {weight: 0.9}}
        parameters: {normalize: true, lambda: 0.9}
        """,
    "dare_ties, all kept": """
        merge_method: dare_ties
        base_model: $base
        models:
          - {model: $a, parameters: {weight: 0.5, density: 1.0}}
          - {model: $b, parameters: {weight: -0.9, density: 1}}
          - {model: $c, parameters: {weight: 0.4}}
        """,
    "slerp": """
        merge_method: slerp
        base_model: $base
        models: [{model: $base}, {model: $a}]
        parameters: {t: 0.3}
        """,
    "slerp, gradients and filters": """
        merge_method: slerp
        base_model: $a
        models: [{model: $a}, {model: $b}]
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - {value: 0.5}
        """,
    "slerp, one slice, the base second": """
        merge_method: slerp
        base_model: $b
        slices:
          - sources:
              - {model: $a, layer_range: [0, 4]}
              - {model: $b, layer_range: [0, 4]}
        parameters: {t: [{filter: mlp, value: [0.2, 0.9]}, {value: 0.4}]}
        """,
    "slerp of layers far apart": """
        merge_method: slerp
        base_model: $base
        slices:
          - sources:
              - {model: $base, layer_range: [0, 2]}
              - {model: $a, layer_range: [2, 4]}
            parameters: {t: [0.25, 0.75]}
          - sources:
              - {model: $base, layer_range: [2, 4]}
              - {model: $a, layer_range: [0, 2]}
        parameters: {t: 0.6}
        """,
    "nuslerp": """
        merge_method: nuslerp
        models:
          - {model: $a, parameters: {weight: 0.5}}
          - {model: $b, parameters: {weight: [0.2, 1.5]}}
        """,
    "nuslerp of deltas": """
        merge_method: nuslerp
        base_model: $base
        models:
          - {model: $a, parameters: {weight: 1.0}}
          - {model: $b, parameters: {weight: 0.4}}
        """,
    "nuslerp, a negative weight": """
        merge_method: nuslerp
        base_model: $base
        models:
          - {model: $a, parameters: {weight: -0.3}}
          - {model: $b, parameters: {weight: 1.0}}
        """,
    "nuslerp, weights that cancel": """
        merge_method: nuslerp
        base_model: $base
        models:
          - {model: $a, parameters: {weight: 1.0}}
          - {model: $b, parameters: {weight: -1.0}}
        """,
    "nuslerp by rows": """
        merge_method: nuslerp
        base_model: $base
        models:
          - {model: $a, parameters: {weight: 0.3}}
          - {model: $b, parameters: {weight: 0.7}}
        parameters: {nuslerp_flatten: false}
        """,
    "nuslerp by columns, no base": """
        merge_method: nuslerp
        models:
          - {model: $a, parameters: {weight: 0.3}}
          - {model: $b, parameters: {weight: 0.7}}
        parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
        """,
    "multislerp": """
        merge_method: multislerp
        models:
          - {model: $a, parameters: {weight: 0.5}}
          - {model: $b, parameters: {weight: 0.3}}
          - {model: $c, parameters: {weight: 1.4}}
        """,
    "multislerp of deltas": """
        merge_method: multislerp
        base_model: $base
        models:
          - {model: $a, parameters: {weight: 0.5}}
          - {model: $b, parameters: {weight: 0.3}}
          - {model: $c, parameters: {weight: -0.4}}
        parameters: {normalize_weights: false, eps: 1e-6}
        """,
    "multislerp of one": """
        merge_method: multislerp
        base_model: $base
        models: [{model: $a, parameters: {weight: 0.5}}]
        """,
    "karcher": """
        merge_method: karcher
        models: [{model: $a}, {model: $b}, {model: $c}]
        """,
    "karcher, the base is one more": """
        merge_method: karcher
        base_model: $base
        models: [{model: $a}, {model: $b}]
        parameters: {max_iter: 3, tol: 1e-4}
        """,
    "model_stock": """
        merge_method: model_stock
        base_model: $base
        models: [{model: $a}, {model: $b}, {model: $c}]
        """,
    "model_stock by rows": """
        merge_method: model_stock
        base_model: $base
        models: [{model: $base}, {model: $a}, {model: $b}]
        parameters: {filter_wise: true}
        """,
    "nearswap": """
        merge_method: nearswap
        base_model: $base
        models: [{model: $base}, {model: $a}]
        parameters: {t: 0.005}
        """,
    "sce": """
        merge_method: sce
        base_model: $base
        models: [{model: $a}, {model: $b}, {model: $c}]
        """,
    "sce, a part": """
        merge_method: sce
        base_model: $base
        models: [{model: $a}, {model: $b}, {model: $c}]
        parameters: {select_topk: 0.35}
        """,
    "ram": """
        merge_method: ram
        base_model: $base
        models: [{model: $a}, {model: $b}, {model: $c}]
        parameters: {epsilon: 5e-3}
        """,
    "ramplus_tl": """
        merge_method: ramplus_tl
        base_model: $base
        models: [{model: $a}, {model: $b}, {model: $c}]
        parameters: {epsilon: 5e-3, r: 0.3, alpha: 5}
        """,
    "breadcrumbs": """
        merge_method: breadcrumbs
        base_model: $base
        models:
          - {model: $a, parameters: {weight: 0.6, density: 0.9}}
          - {model: $b, parameters: {weight: 0.3, density: 0.5, gamma: 0.1}}
          - {model: $c, parameters: {weight: -0.3, density: 0.5, gamma: 0.9}}
        parameters: {lambda: 0.8, rescale: true}
        """,
    "breadcrumbs_ties": """
        merge_method: breadcrumbs_ties
        base_model: $base
        models:
          - {model: $a, parameters: {weight: 0.6, density: 0.9, gamma: 0}}
          - {model: $b, parameters: {weight: 0.3, density: 0.2, gamma: 0.05}}
        """,
    "della, all kept": """
        merge_method: della
        base_model: $base
        models:
          - {model: $a, parameters: {weight: 0.6}}
          - {model: $b, parameters: {weight: 0.3}}
        """,
    "della_linear, all kept": """
        merge_method: della_linear
        base_model: $base
        models:
          - {model: $a, parameters: {weight: 0.6}}
          - {model: $b, parameters: {weight: -0.3}}
        """,
    "passthrough, stacked": """
        merge_method: passthrough
        slices:
          - sources: [{model: $a, layer_range: [0, 3]}]
          - sources: [{model: $b, layer_range: [1, 4]}]
        """,
    "passthrough, fewer layers": """
        merge_method: passthrough
        slices:
          - sources: [{model: $a, layer_range: [1, 3]}]
        """,
    "passthrough, scaled": """
        merge_method: passthrough
        slices:
          - sources: [{model: $base, layer_range: [0, 2]}]
          - sources:
              - model: $base
                layer_range: [1, 2]
                parameters:
                  scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: [0.1, 0.5]}, {value: 1.0}]
          - sources: [{model: $a, layer_range: [1, 4], parameters: {scale: [0.5, 2]}}]
        """,
    "linear, slices with parameters of their own": """
        merge_method: linear
        slices:
          - sources:
              - {model: $a, layer_range: [0, 2], parameters: {weight: [1, 0.2]}}
              - {model: $b, layer_range: [2, 4], parameters: {weight: [{filter: layers.3., value: 3}, {value: 0.3}]}}
          - sources:
              - {model: $a, layer_range: [2, 3]}
              - {model: $c, layer_range: [3, 4], parameters: {weight: [0.1, 0.9]}}
            parameters: {weight: 0.45}
          - sources:
              - {model: $b, layer_range: [1, 4], parameters: {weight: 0.8}}
              - {model: $c, layer_range: [0, 3]}
            parameters: {normalize: false}
        parameters: {weight: [0.35, 0.65]}
        """,
    "task_arithmetic, slices": """
        merge_method: task_arithmetic
        base_model: $base
        slices:
          - sources:
              - {model: $base, layer_range: [0, 3]}
              - {model: $a, layer_range: [0, 3], parameters: {weight: [0.2, 0.8]}}
          - sources:
              - {model: $base, layer_range: [2, 4]}
              - {model: $a, layer_range: [2, 4], parameters: {weight: 1.0}}
        """,
}
"""Each with `dtype` and `out_dtype` added. Names in $ are models."""

BF16_CASES = (
    "linear", "linear, gradients; what is in no layer takes the first anchor", "task_arithmetic",
    "dare_ties, all kept", "slerp, gradients and filters", "passthrough, scaled",
    "linear, slices with parameters of their own", "nuslerp of deltas", "multislerp", "karcher", "model_stock by rows",
    "ram",
)  # fmt: skip
GPT2_CASES = (
    "task_arithmetic", "ties", "slerp", "nuslerp by rows", "nuslerp by columns, no base", "multislerp of deltas",
    "karcher", "model_stock by rows", "sce, a part", "ramplus_tl", "breadcrumbs",
)  # fmt: skip
"""Matrices that are stored transposed (Conv1D), and many vectors."""
BERT_CASES = (
    "linear", "linear, not normalized, a negative weight", "task_arithmetic", "ties", "slerp", "nuslerp by rows",
    "multislerp", "karcher", "model_stock by rows", "sce, a part", "ramplus_tl", "breadcrumbs",
)  # fmt: skip
TIED_CASES = ("linear", "ties", "slerp", "passthrough, stacked")


def with_dtypes(text: str, dtype: str = "float32", out_dtype: str = "") -> str:
    lines = text.strip("\n").split("\n")
    margin = len(lines[0]) - len(lines[0].lstrip())
    body = "\n".join(line[margin:] for line in lines)
    return f"{body}\ndtype: {dtype}\n" + (f"out_dtype: {out_dtype}\n" if out_dtype else "")


@pytest.mark.parametrize("case", CASES)
def test_float32(bench: Bench, case: str) -> None:
    assert_equal(*bench.both(with_dtypes(CASES[case]), bench.family()))


@pytest.mark.parametrize("case", BF16_CASES)
def test_bfloat16_is_rounded_once(bench: Bench, case: str) -> None:
    assert_equal(*bench.both(with_dtypes(CASES[case], out_dtype="bfloat16"), bench.family("bfloat16")))


@pytest.mark.parametrize("case", TIED_CASES)
def test_tied_head(bench: Bench, case: str) -> None:
    theirs, ours = bench.both(with_dtypes(CASES[case]), bench.family(head="tied"))
    assert_equal(theirs, ours)
    assert "lm_head.weight" not in tensors(ours)
    assert config(ours)["tie_word_embeddings"] is True


@pytest.mark.parametrize("case", GPT2_CASES)
def test_gpt2(bench: Bench, case: str) -> None:
    assert_equal(*bench.both(with_dtypes(CASES[case]), bench.family(model="gpt2")))


@pytest.mark.parametrize("case", BERT_CASES)
def test_bert(bench: Bench, case: str) -> None:
    """An encoder with a head: mergekit 0.1.5 merges BERT only with one that has a pooler."""
    assert_equal(*bench.both(with_dtypes(CASES[case]), bench.family(model="bert")))


def test_a_tied_and_an_untied_model_give_a_head_of_its_own(bench: Bench) -> None:
    models = {"base": bench.family(head="tied")["base"], "a": bench.family()["a"]}
    text = """
        merge_method: linear
        base_model: $base
        models:
          - {model: $base, parameters: {weight: 0.5}}
          - {model: $a, parameters: {weight: 0.5}}
        """
    theirs, ours = bench.both(with_dtypes(text), models)
    assert_equal(theirs, ours)
    assert "lm_head.weight" in tensors(ours)
    assert config(ours)["tie_word_embeddings"] is False  # mergekit leaves it true beside a separate head


def test_dtype_is_what_the_files_hold_where_none_is_named(bench: Bench) -> None:
    text = """
        merge_method: passthrough
        slices:
          - sources: [{model: $a, layer_range: [0, 2]}]
          - sources: [{model: $b, layer_range: [0, 4]}]
        """
    margin = with_dtypes(text).rsplit("dtype", 1)[0]
    assert_equal(*bench.both(margin, bench.family("bfloat16")))


# ---------------------------------------------------------------------------------------------------------- in shards


def test_shards_are_named_alike(bench: Bench) -> None:
    text = with_dtypes(CASES["linear"])
    theirs, ours = bench.both(
        text, bench.family(), "--out-shard-size", "200K", sets=("output.shard_size=200KB",)
    )  # fmt: skip
    assert_equal(theirs, ours)
    indices = [json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (theirs, ours)]
    assert set(indices[0]["weight_map"]) == set(indices[1]["weight_map"])
    for folder, index in zip((theirs, ours), indices, strict=True):
        files = sorted(file.name for file in folder.glob("*.safetensors"))
        assert len(files) > 1
        assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
        assert set(index["weight_map"].values()) == set(files)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(folder).values())
        for file in files:
            with safe_open(folder / file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}
                assert all(index["weight_map"][name] == file for name in opened.keys())  # noqa: SIM118 - no mapping


# ------------------------------------------------------------------------------------- elements tied at the threshold


@dataclass(frozen=True)
class Trim:
    """ties at one tensor, written down once more: which elements are tied, and what each choice gives."""

    base: Tensor
    deltas: Tensor
    """(models, elements)"""
    weights: tuple[float, ...]
    densities: tuple[float, ...]

    def tied(self) -> tuple[Tensor, Tensor]:
        """(models, elements) masks: equal to the threshold, above it."""
        at, above = [], []
        for delta, density in zip(self.deltas, self.densities, strict=True):
            count = max(1, int(density * delta.numel()))
            magnitude = delta.abs()
            threshold = magnitude.sort(descending=True).values[count - 1]
            above.append(magnitude > threshold)
            at.append((magnitude == threshold) & (density < 1))
            above[-1] |= torch.tensor(density >= 1)
        return torch.stack(at), torch.stack(above)

    def result(self, kept: Tensor) -> Tensor:
        """The merge of what is kept, normalized. Signs are elected in float32: coarse deltas often cancel."""
        w = torch.tensor(self.weights)[:, None]
        weighted = self.deltas * kept * w
        total = torch.zeros_like(self.base)
        for row in weighted:
            total += row
        agrees = weighted.sign() == torch.where(total >= 0, 1.0, -1.0)
        divisor = (agrees * w).sum(0)
        divisor[divisor == 0] = 1
        return self.base + (weighted * agrees).sum(0) / divisor

    def explains(self, value: Tensor) -> Tensor:
        """Elements that some choice among the tied gives."""
        at, above = self.tied()
        found = torch.zeros(value.numel(), dtype=torch.bool)
        for choice in itertools.product((False, True), repeat=len(self.weights)):
            kept = above | (at & torch.tensor(choice)[:, None])
            found |= (self.result(kept) - value).abs() <= FP32_TOLERANCE
        return found


@pytest.mark.parametrize("densities", [(0.2, 0.2, 0.2), (0.5, 0.8, 0.1)])
def test_ties_of_bfloat16_differ_only_where_magnitudes_are_equal(
    bench: Bench, densities: tuple[float, float, float], record_property: Callable[[str, object], None]
) -> None:
    models, weights = bench.family("bfloat16"), (0.5, 0.3, 0.8)
    entries = "".join(
        f"  - {{model: ${name}, parameters: {{weight: {w}, density: {d}}}}}\n"
        for name, w, d in zip("abc", weights, densities, strict=True)
    )
    theirs, ours = bench.both(
        f"merge_method: ties\nbase_model: $base\nmodels:\n{entries}dtype: float32\n", models
    )  # fmt: skip
    assert_same_structure(theirs, ours)
    left, right = tensors(theirs), tensors(ours)
    sources = [tensors(Path(models[name])) for name in ("base", "a", "b", "c")]
    differing = total = 0
    for name, value in left.items():
        base, *others = [source[name].float().flatten() for source in sources]
        trim = Trim(base, torch.stack(others) - base, weights, densities)
        apart = (value - right[name]).abs().flatten() > FP32_TOLERANCE
        total += apart.numel()
        differing += int(apart.sum())
        at, _ = trim.tied()
        assert not (apart & ~at.any(0)).any(), name
        for output in (value, right[name]):
            assert trim.explains(output.flatten()).all(), name
    record_property("differing elements", f"{differing} of {total}")
    assert differing <= MAX_TIED_SHARE * total


# --------------------------------------------------------------------------------------------------------- at random


def deltas_of(bench: Bench, folder: Path, *names: str) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """Name, R − B and each X − B, flattened, of the tensors with enough elements to count."""
    models = bench.family()
    base, merged = tensors(Path(models["base"])), tensors(folder)
    sources = [tensors(Path(models[name])) for name in names]
    for name, b in base.items():
        if b.numel() >= 1024:
            yield name, (merged[name] - b).flatten(), [(source[name] - b).flatten() for source in sources]


def assert_share(count: int, total: int, share: float, what: str) -> None:
    """Whether `count` of `total` independent draws may well have this share."""
    assert abs(count / total - share) <= SIGMAS * math.sqrt(share * (1 - share) / total), (what, count / total, share)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("density, rescale", [(0.3, "true"), (0.3, "false"), (0.05, "true"), (0.9, "true")])
def test_dropping_keeps_its_share_and_the_norm(bench: Bench, method: str, density: float, rescale: str) -> None:
    text = f"""
        merge_method: {method}
        base_model: $base
        models:
          - {{model: $a, parameters: {{weight: 1.0, density: {density}}}}}
        parameters: {{rescale: {rescale}}}
        """
    theirs, ours = bench.both(with_dtypes(text), bench.family())
    assert_same_structure(theirs, ours)
    masks = []
    for folder in (theirs, ours):
        kept_of = []
        for name, merged, (delta,) in deltas_of(bench, folder, "a"):
            kept = merged != 0
            assert_share(int(kept.sum()), kept.numel(), density, f"{folder.name} {name}")
            sizeable = kept & (delta.abs() > 1e-3)
            ratios = (merged[sizeable] / delta[sizeable]).double()
            assert ratios.std() / ratios.mean() < 1e-3, name
            if rescale == "true":
                assert merged.double().abs().sum().item() == pytest.approx(delta.double().abs().sum().item(), rel=1e-4)
            else:
                assert ratios.mean().item() == pytest.approx(1, abs=1e-4)
            kept_of.append(kept)
        masks.append(torch.cat(kept_of))
    # Other generators, so other elements: as many in common as chance gives.
    assert_share(int((masks[0] & masks[1]).sum()), masks[0].numel(), density**2, "in common")


@pytest.mark.parametrize("density, epsilon, rescale", [(0.5, 0.4, "true"), (0.3, 0.1, "false"), (0.7, 0.2, "true")])
def test_della_keeps_by_rank_and_restores_the_norm(bench: Bench, density: float, epsilon: float, rescale: str) -> None:
    text = f"""
        merge_method: della_linear
        base_model: $base
        models:
          - {{model: $a, parameters: {{weight: 1.0, density: {density}, epsilon: {epsilon}}}}}
        parameters: {{rescale: {rescale}}}
        """
    models = bench.family()
    base, source = (tensors(Path(models[name])) for name in ("base", "a"))
    for folder in bench.both(with_dtypes(text), models):
        merged, bins = tensors(folder), torch.zeros(2, 8)
        for name, b in base.items():
            delta, found = source[name] - b, merged[name] - b
            if b.dim() != 2:
                continue
            kept = found != 0
            assert_share(int(kept.sum()), kept.numel(), density, f"{folder.name} {name}")
            sizeable = kept & (delta.abs() > 1e-3)
            ratios = (found[sizeable] / delta[sizeable]).double()
            assert ratios.std() / ratios.mean() < 1e-3, name
            if rescale == "true":
                assert found.double().abs().sum().item() == pytest.approx(delta.double().abs().sum().item(), rel=1e-4)
            ranks = delta.abs().argsort(dim=1).argsort(dim=1)
            eighth = ranks * 8 // b.shape[1]
            for i in range(8):
                bins[0, i] += kept[eighth == i].sum()
                bins[1, i] += (eighth == i).sum()
        for i in range(8):
            share = density - epsilon + 2 * epsilon * (i + 0.5) / 8
            assert abs(bins[0, i] / bins[1, i] - share) < 0.01 * epsilon + SIGMAS * 0.5 / math.sqrt(float(bins[1, i]))


def test_arcee_fusion_takes_the_same_elements(bench: Bench) -> None:
    """A hard threshold on a divergence that float32 knows to four digits: a few elements may fall the other way."""
    text = """
        merge_method: arcee_fusion
        base_model: $base
        models: [{model: $base}, {model: $a}]
        """
    models = bench.family()
    theirs, ours = bench.both(with_dtypes(text), models)
    assert_same_structure(theirs, ours)
    base, other, left, right = (tensors(Path(f)) for f in (models["base"], models["a"], theirs, ours))
    total = apart = taken = 0
    for name, b in base.items():
        assert ((right[name] == b) | (right[name] == other[name])).all(), name
        apart += int(((left[name] - right[name]).abs() > FP32_TOLERANCE).sum())
        taken += int((right[name] == other[name]).sum())
        total += b.numel()
    assert apart <= 0.001 * total
    assert 0.02 * total < taken < 0.5 * total


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_two_dropped_deltas_mix_as_often_as_chance_says(bench: Bench, method: str) -> None:
    """Without rescaling every element is one of four: none, the first, the second, or both merged."""
    first, second = 0.6, 0.25
    text = f"""
        merge_method: {method}
        base_model: $base
        models:
          - {{model: $a, parameters: {{weight: 1.0, density: {first}}}}}
          - {{model: $b, parameters: {{weight: 1.0, density: {second}}}}}
        parameters: {{rescale: false}}
        """
    chances = {"none": (1 - first) * (1 - second), "a": first * (1 - second), "b": (1 - first) * second}
    chances["both"] = first * second
    for folder in bench.both(with_dtypes(text), bench.family()):
        counts, total = dict.fromkeys(chances, 0), 0
        for name, merged, (a, b) in deltas_of(bench, folder, "a", "b"):
            both = a + b
            if method == "dare_ties":
                both = torch.where(a * b > 0, a + b, torch.where(a.abs() > b.abs(), a, b))
            # Where two outcomes are equal nothing can be told: opposite signs, for dare_ties.
            outcomes = {"none": torch.zeros_like(a), "a": a, "b": b, "both": both}
            told = torch.ones_like(a, dtype=torch.bool)
            for one, other in itertools.combinations(outcomes.values(), 2):
                told &= (one - other).abs() > 1e-5
            close = {key: ((merged - value).abs() <= 1e-6) & told for key, value in outcomes.items()}
            assert bool((torch.stack([*close.values()]).sum(0) == told.int()).all()), name
            total += int(told.sum())
            for key, found in close.items():
                counts[key] += int(found.sum())
        for key, count in counts.items():
            assert_share(count, total, chances[key], f"{folder.name} {key}")
