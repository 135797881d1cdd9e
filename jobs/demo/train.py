"""Trains the demo's three adapters on a CPU, in minutes: python -m jobs.demo.train.

The adapters touch the last layers alone. What reaches these layers does not change in training, so it is
computed once per example and kept; a step then runs the last layers only, and the output head at the answer's
tokens only.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.demo.base import MODEL
from jobs.demo.tasks import Task

FIRST_LAYER = 22
"""The first of the layers that are adapted."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
THREADS = 2


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained."""

    rank: int
    alpha: int = 16
    examples: int = 480
    epochs: int = 2
    batch: int = 16
    rate: float = 1e-3
    seed: int = 0


RECIPES = {"json": Recipe(rank=8), "triage": Recipe(rank=8), "sql": Recipe(rank=16)}


@dataclass(frozen=True)
class Batch:
    """Right-padded examples: their tokens, what is no padding, and the positions whose next token is the answer's."""

    tokens: Tensor
    mask: Tensor
    answer: Tensor


def encode(task: Task, recipe: Recipe, tokenizer: Any) -> list[Batch]:
    """The task's training examples in batches of like length."""
    rows: list[tuple[list[int], int]] = []
    for example in task.train(recipe.examples):
        chat = tokenizer.apply_chat_template(task.messages(example.prompt), add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(chat, add_special_tokens=False).input_ids
        answer = tokenizer(example.answer, add_special_tokens=False).input_ids
        rows.append(([*prompt, *answer, tokenizer.eos_token_id], len(prompt)))
    rows.sort(key=lambda row: len(row[0]))
    batches = []
    for at in range(0, len(rows), recipe.batch):
        part = rows[at : at + recipe.batch]
        width = max(len(tokens) for tokens, _ in part)
        tokens = torch.full((len(part), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(tokens)
        answer_at = torch.zeros_like(tokens, dtype=torch.bool)
        for i, (row, prompt_length) in enumerate(part):
            tokens[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
            answer_at[i, prompt_length - 1 : len(row) - 1] = True
        batches.append(Batch(tokens, mask, answer_at))
    return batches


def train(task: Task, recipe: Recipe, base: Path, out: Path) -> float:
    """Train one adapter and save it as PEFT does; gives the loss at the end."""
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.config.use_cache = False
    layers: nn.ModuleList = model.model.layers
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(TARGETS),
        layers_to_transform=list(range(FIRST_LAYER, len(layers))),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
        base_model_name_or_path=MODEL,
    )
    adapted = get_peft_model(model, config)
    inner, norm, head = model.model, model.model.norm, model.lm_head
    batches = encode(task, recipe, tokenizer)

    inner.layers, inner.norm = layers[:FIRST_LAYER], nn.Identity()
    with torch.no_grad():
        hidden = [inner(input_ids=b.tokens, attention_mask=b.mask).last_hidden_state for b in batches]
    inner.layers, inner.norm = layers[FIRST_LAYER:], norm

    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.rate, weight_decay=0.0)
    steps = recipe.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps, pct_start=0.1)
    shuffle = torch.Generator().manual_seed(recipe.seed)
    loss, step, started = torch.tensor(0.0), 0, time.perf_counter()
    for _ in range(recipe.epochs):
        for at in torch.randperm(len(batches), generator=shuffle).tolist():
            batch = batches[at]
            states = inner(inputs_embeds=hidden[at], attention_mask=batch.mask).last_hidden_state
            wanted = batch.tokens.roll(-1, dims=1)[batch.answer]
            loss = nn.functional.cross_entropy(head(states[batch.answer]), wanted)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0 or step == steps:
                seconds = time.perf_counter() - started
                print(f"{task.name}: step {step} of {steps}, loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    inner.layers = layers

    for weight in weights:
        weight.data = weight.data.to(torch.bfloat16)
    adapted.peft_config["default"].base_model_name_or_path = MODEL  # PEFT has put the folder's path there
    adapted.save_pretrained(out)
    path = out / "adapter_config.json"
    saved = json.loads(path.read_text())
    saved["target_modules"] = sorted(saved["target_modules"])  # a set: its order changes from run to run
    path.write_text(json.dumps(saved, indent=2) + "\n")
    return loss.item()
