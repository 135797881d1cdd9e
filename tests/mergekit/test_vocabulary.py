"""Vocabularies united as mergekit unites them, where it is right: tokens of one owner, moved rows, named rows.

mergekit runs as a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer

import merger

pytestmark = pytest.mark.mergekit

MAKE = """
import sys, torch
from pathlib import Path
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

root = Path(sys.argv[1])
for seed, (name, step, added) in enumerate([("base", 1, ["<s>"]), ("a", 1, ["<s>", "<a>"]), ("b", 7, ["<b>", "<s>"])]):
    words = sorted((f"w{i}" for i in range(40)), key=lambda w: int(w[1:]) * step % 41)
    tokens = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="w0"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.add_tokens([AddedToken(t, special=True, normalized=False) for t in added])
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=40 + len(added), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    ))
    model.float().save_pretrained(root / name)
    PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="w0").save_pretrained(root / name)
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("vocabularies")
    subprocess.run([sys.executable, "-c", MAKE, str(folder)], check=True, capture_output=True, timeout=280)
    return {name: str(folder / name) for name in ("base", "a", "b")}


CASES: dict[str, dict[str, object]] = {
    "union": {"tokenizer_source": "union"},
    "base": {"tokenizer_source": "base"},
    "padded": {"tokenizer": {"source": "union", "pad_to_multiple_of": 32}},
    "named": {"tokenizer": {"source": "union", "tokens": {
        "<a>": {"source": {"kind": "model_token", "model": "BASE", "token": "w3"}, "force": True},
        "<new>": {"source": {"kind": "model_token", "model": "B", "token_id": 5}},
        "<none>": {"source": {"kind": "zero"}},
    }}},
}  # fmt: skip
METHODS = {
    "linear": (["base", "a", "b"], 1.0),
    "task_arithmetic": (["a", "b"], 0.6),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_mergekit(
    method: str, case: str, family: dict[str, str], mergekit_python: Path, tmp_path: Path
) -> None:
    names, weight = METHODS[method]
    document = {
        "merge_method": method, "dtype": "float32",
        "models": [{"model": family[m], "parameters": {"weight": weight}} for m in names],
        "base_model": family["base"], **CASES[case],
    }  # fmt: skip
    text = yaml.safe_dump(document).replace("BASE", family["base"]).replace("model: B\n", f"model: {family['b']}\n")
    (tmp_path / "manifest.yml").write_text(text)
    command = [str(mergekit_python.parent / "mergekit-yaml"), "manifest.yml", "theirs"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    merger.merge(tmp_path / "manifest.yml", tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    ids = [
        Tokenizer.from_file(str(tmp_path / who / "tokenizer.json")).get_vocab(with_added_tokens=True)
        for who in ("theirs", "ours")
    ]
    assert theirs.keys() == ours.keys()
    assert ids[0].keys() == ids[1].keys()
    tokens = sorted(ids[0])
    for name, expected in theirs.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = [[vocabulary[token] for token in tokens] for vocabulary in ids]
            torch.testing.assert_close(ours[name][rows[1]], expected[rows[0]], rtol=0, atol=1e-6)
            assert ours[name].shape == expected.shape
        else:
            torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-6)
