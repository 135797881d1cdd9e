"""The example of PEFT's merging guide, special tokens and all: adapters that PEFT saved of resized models, on the Hub.

A small Llama with a byte-level BPE stands in for TinyLlama. Each look-alike has special tokens of its own at the ids
that others use, embeddings and head trained with them, and its tokenizer beside it; the manifests are the shipped ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from tests import reference
from tests.conformance.folders import ROOT, Outcome, ended
from tests.counterparts.hub import HubServer
from tests.remote.test_peft_guide import BASE

TOKENS: Final = {
    "norobots": ["<|im_start|>", "<|im_end|>", "[PAD]"],
    "adcopy": ["[PAD]", "<|ad|>"],
    "sql": ["<|table|>", "[PAD]", "<|query|>", "<|im_end|>"],
}
WORDS: Final = 320
LAYERS: Final = ("model.embed_tokens.weight", "lm_head.weight")
KEY: Final = "base_model.model.{}"
Words: Any = Fast


@dataclass
class Guide:
    """The Hub of the guide, and what lies on it."""

    hub: HubServer
    root: Path
    factors: dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guide]:
    root = tmp_path_factory.mktemp("guide")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([(ROOT / "README.md").read_text()], vocab_size=WORDS, show_progress=False)
    bpe.save(str(root / "bpe.json"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "base")
    words = Words(tokenizer_file=str(root / "bpe.json"))
    words.save_pretrained(root / "base")
    factors = {}
    with HubServer.start(root / "hub") as hub:
        hub.create(BASE, root / "base")
        for seed, (name, added) in enumerate(TOKENS.items()):
            factors[name] = look_alike(root, name, added, seed)
            hub.create(f"smangrul/tinyllama_lora_{name}", root / name)
        yield Guide(hub, root, factors)


def look_alike(root: Path, name: str, added: list[str], seed: int) -> dict[str, torch.Tensor]:
    """An adapter as the guide's were made: tokens added, the model resized, LoRA and embeddings saved by PEFT."""
    words = Words(tokenizer_file=str(root / "bpe.json"))
    words.add_tokens(added, special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(root / "base")
    model.resize_token_embeddings(len(words), mean_resizing=False)
    wrapped: Any = peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in wrapped.named_parameters():
            if parameter.requires_grad or "embed_tokens" in path or "lm_head" in path:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    wrapped.peft_config["default"].base_model_name_or_path = str(root / "base")  # PEFT looks whether it was resized
    wrapped.save_pretrained(root / name)
    config = root / name / "adapter_config.json"
    config.write_text(config.read_text().replace(str(root / "base"), BASE))
    words.save_pretrained(root / name)
    return load_file(root / name / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("example", ["tinyllama-ties", "tinyllama-dare-ties"])
@pytest.mark.filterwarnings("ignore")
def test_the_guide_s_example_with_its_special_tokens(guide: Guide, example: str, tmp_path: Path) -> None:
    done = command(guide.hub, "merge", ROOT / "manifests" / "merges" / f"{example}.yaml", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert [w["code"] for w in done.document["warnings"]] == []
    out = tmp_path / "out"
    words = AutoTokenizer.from_pretrained(out)
    every = list(dict.fromkeys(token for added in TOKENS.values() for token in added))
    assert words.convert_ids_to_tokens(list(range(WORDS, len(words)))) == every
    model = AutoModelForCausalLM.from_pretrained(guide.root / "base")
    model.resize_token_embeddings(len(words))
    loaded: Any = peft.PeftModel.from_pretrained(model, str(out)).eval()
    held = load_file(out / "adapter_model.safetensors")
    for name, layer in zip(LAYERS, (model.get_input_embeddings(), model.lm_head), strict=True):
        assert torch.equal(layer.weight.detach(), held[KEY.format(name)])
        check_rows(guide, name, held[KEY.format(name)].numpy(), words, ties=example == "tinyllama-ties")
    if example == "tinyllama-ties":
        check_factors(guide, held)
    for token in every:
        number = words.convert_tokens_to_ids(token)
        inputs = words(f"Hello {token} world", return_tensors="pt")
        assert number in inputs["input_ids"][0].tolist()
        answer = loaded.generate(input_ids=inputs["input_ids"], max_new_tokens=4, do_sample=False)[0]
        assert token in words.decode(answer)
        assert token not in words.decode(answer, skip_special_tokens=True)
    folded = command(guide.hub, "fold", out, "-o", tmp_path / "model", "--base", guide.root / "base", "--json")
    assert folded.code == 0, folded.err
    whole: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert whole.config.vocab_size == len(words)
    with torch.no_grad():
        inputs = words("SELECT <|table|> for <|im_start|>", return_tensors="pt")["input_ids"]
        wanted, got = loaded(input_ids=inputs).logits, whole(input_ids=inputs).logits
    assert float((wanted - got).abs().max()) < 3e-6 * float(wanted.abs().max())


def command(hub: HubServer, *arguments: object) -> Outcome:
    """The command in a process of its own, with this Hub and no other around it."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "AWS_", "RAYMERGE_"))}
    return ended(
        subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *map(str, arguments)], cwd=ROOT, text=True, stdin=subprocess.DEVNULL,
            env={**plain, **hub.environment(), "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
    )  # fmt: skip


def check_rows(guide: Guide, name: str, ours: np.ndarray, words: Any, *, ties: bool) -> None:
    """Rows against float64: what every adapter changed in the base's rows by PEFT's ties; others the owners' mean."""
    base = load_file(guide.root / "base" / "model.safetensors")[name].numpy()
    sources = [guide.factors[n][KEY.format(name)].numpy() for n in TOKENS]
    wide = np.concatenate([base, np.zeros((len(words) - WORDS, base.shape[1]), np.float32)])
    deltas = [
        np.concatenate([reference.delta(s[:WORDS], base), np.zeros_like(wide[WORDS:], np.float64)]) for s in sources
    ]
    if ties:
        wanted = reference.ties(
            wide, deltas, (2.0, 1.0, 1.0), (0.2, 0.2, 0.2), elect="unweighted", divisor="count"
        )[:WORDS]  # fmt: skip
        np.testing.assert_allclose(ours[:WORDS], wanted, rtol=0, atol=1e-6)
    for number in range(WORDS, len(words)):
        token = words.convert_ids_to_tokens(number)
        rows = [
            s[WORDS + added.index(token)] for s, added in zip(sources, TOKENS.values(), strict=True) if token in added
        ]
        np.testing.assert_allclose(ours[number], np.mean(rows, 0, np.float64), rtol=0, atol=1e-7)


def check_factors(guide: Guide, held: dict[str, torch.Tensor]) -> None:
    """Factors as PEFT has them: A with A, B with B."""
    names = [name for name in held if ".lora_" in name]
    assert len(names) == 2 * 2 * 3
    for name in names:
        factors = [guide.factors[n][name].numpy() for n in TOKENS]
        which = "A" if ".lora_A." in name else "B"
        wanted = reference.peft_factor("ties", which, factors, (4.0, 2.0, 2.0), density=0.2)
        np.testing.assert_allclose(held[name].numpy(), wanted, rtol=0, atol=1e-6)
