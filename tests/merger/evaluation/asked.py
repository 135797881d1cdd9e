"""A small language model that has learnt nothing, adapters that teach it something, and a tokenizer with a template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 60
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"  # noqa: E501


def tokenizer(template: str | None = TEMPLATE) -> Any:
    words = ["<unk>", "</s>", "user", "assistant", *(f"w{i}" for i in range(WORDS - 4))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: Any = PreTrainedTokenizerFast
    made = fast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    made.chat_template = template
    return made


def base(folder: Path) -> Path:
    if not folder.exists():
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3, eos_token_id=1, bos_token_id=None,
            tie_word_embeddings=False,
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config)
        model.save_pretrained(str(folder))
        tokenizer().save_pretrained(str(folder))
    return folder


def lora(folder: Path, on: Path, seed: int, size: float = 0.4) -> Path:
    if not folder.exists():
        model: Any = AutoModelForCausalLM.from_pretrained(str(on))
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        made = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
        made.save_pretrained(str(folder))
    return folder


def loaded(on: Path, adapter: Path | None = None, scale: float = 1.0) -> Any:
    """The library's own model, with the adapter on it at a scale."""
    model: Any = AutoModelForCausalLM.from_pretrained(str(on), dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter))
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.scale_layer(scale)
    return model.eval()


def taught(model: Any, count: int, *, words: int = 6, length: int = 5) -> list[dict[str, str]]:
    """Prompts, and what the model itself answers to them greedily: as many as end by themselves or are cut."""
    tokens, generator = tokenizer(), torch.Generator().manual_seed(8)
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        ids = torch.randint(4, WORDS, (1, words), generator=generator)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False,
                pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        rows.append({"prompt": tokens.decode(ids[0]), "text": tokens.decode(out[0])})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
