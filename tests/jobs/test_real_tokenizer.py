"""A real tokenizer with other added tokens in each source: rows, generation and templates after a union."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.demo.base import prepare_base

TRY = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
import merger

base, root = sys.argv[1], Path(sys.argv[2])


def make(name, seed, added):
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer.add_tokens(added, special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(seed)
    with torch.no_grad():
        for token in added:
            row = tokenizer.convert_tokens_to_ids(token)
            model.get_input_embeddings().weight[row] = torch.randn(model.config.hidden_size) / 10
    model.save_pretrained(root / name)
    tokenizer.save_pretrained(root / name)
    return lambda token: model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(token)]


a = make("a", 0, ["<|tool|>", "<|both|>"])
b = make("b", 1, ["<|both|>", "<|img|>"])
models = [{"model": str(root / name), "parameters": {"weight": 0.5}} for name in "ab"]
merger.merge(
    {"merge_method": "task_arithmetic", "base_model": base, "tokenizer_source": "union", "models": models},
    root / "out",
)
tokenizer = AutoTokenizer.from_pretrained(root / "out")
model = AutoModelForCausalLM.from_pretrained(root / "out", dtype=torch.float32)
rows = model.get_input_embeddings().weight
assert len(tokenizer) == model.config.vocab_size == len(rows) == len(AutoTokenizer.from_pretrained(base)) + 3
expected = {"<|tool|>": a("<|tool|>"), "<|img|>": b("<|img|>"), "<|both|>": (a("<|both|>") + b("<|both|>")) / 2}
for token, row in expected.items():
    number = tokenizer.convert_tokens_to_ids(token)
    assert torch.equal(rows[number], row), token
    inputs = tokenizer(f"Hello {token} world", return_tensors="pt")
    assert number in inputs["input_ids"][0].tolist()
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0]
    assert token in tokenizer.decode(answer)
    assert token not in tokenizer.decode(answer, skip_special_tokens=True)
assert torch.equal(rows[: len(rows) - 3], AutoModelForCausalLM.from_pretrained(
    base, dtype=torch.float32).get_input_embeddings().weight)
assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
"""
"""Run in a process of its own: importing transformers warns, and warnings are errors here."""

TRY_ADAPTERS = """
import sys, torch, peft
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
import merger

base, root = sys.argv[1], Path(sys.argv[2])


def make(name, seed, added):
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer.add_tokens(added, special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) / 50)
        rows = model.get_input_embeddings().weight
        for token in added:
            rows[tokenizer.convert_tokens_to_ids(token)] = torch.randn(model.config.hidden_size) / 10
        rows[1000:1010] += torch.randn(10, model.config.hidden_size) / 50
    wrapped.save_pretrained(root / name)
    tokenizer.save_pretrained(root / name)
    return rows.detach().double(), tokenizer.get_vocab()


a, in_a = make("a", 0, ["<|tool|>", "<|both|>"])
b, in_b = make("b", 1, ["<|both|>", "<|img|>"])
plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
below, words = plain.get_input_embeddings().weight.detach().double(), len(AutoTokenizer.from_pretrained(base))
adapters = [{"adapter": str(root / name), "parameters": {"weight": 0.5}} for name in "ab"]
for kind in ("adapter", "model"):
    out = root / kind
    merger.merge(
        {"merge_method": "task_arithmetic", "base_model": base, "tokenizer_source": "union", "adapters": adapters,
         "out_dtype": "float32", "output": {"kind": kind}},
        out,
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == words + 3
    if kind == "adapter":
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model.resize_token_embeddings(len(tokenizer))
        model = peft.PeftModel.from_pretrained(model, out)
        inner = model.get_base_model()
    else:
        model = inner = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert model.config.tie_word_embeddings and model.config.vocab_size == len(tokenizer)
    rows = inner.get_input_embeddings().weight
    assert inner.lm_head.weight.data_ptr() == rows.data_ptr() and len(rows) == len(tokenizer)
    wanted = below + 0.5 * (a[:words] - below) + 0.5 * (b[:words] - below)
    assert float((rows[:words].double() - wanted).abs().max()) < 1e-6
    assert not torch.equal(rows[1000:1010].double(), below[1000:1010])
    expected = {
        "<|tool|>": a[in_a["<|tool|>"]], "<|img|>": b[in_b["<|img|>"]],
        "<|both|>": (a[in_a["<|both|>"]] + b[in_b["<|both|>"]]) / 2,
    }
    for token, row in expected.items():
        number = tokenizer.convert_tokens_to_ids(token)
        assert float((rows[number].double() - row).abs().max()) < 1e-7, token
        inputs = tokenizer(f"Hello {token} world", return_tensors="pt")
        assert number in inputs["input_ids"][0].tolist()
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0]
        assert token in tokenizer.decode(answer)
        assert token not in tokenizer.decode(answer, skip_special_tokens=True)
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("script", [TRY, TRY_ADAPTERS], ids=["models", "adapters"])
def test_each_token_keeps_its_row_and_generates(script: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the demo's extra converts the model")
    base = prepare_base(tmp_path / "base")
    done = subprocess.run(
        [sys.executable, "-c", script, str(base), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
