"""What a model answers to the held-out prompts, alone and with adapters, and how much of it is right."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from jobs.demo.base import DemoError
from jobs.demo.tasks import TASKS, Example, Task

Prompts = Mapping[str, list[Example]]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Answers:
    """The answers of one model to the prompts of the tasks, in their order."""

    name: str
    texts: dict[str, list[str]]
    accuracy: dict[str, float]
    seconds: float


def held_out(count: int) -> dict[str, list[Example]]:
    """The held-out prompts of every task."""
    return {name: task.held_out(count) for name, task in TASKS.items()}


def _generate(model: Any, tokenizer: Any, task: Task, examples: list[Example]) -> list[str]:
    """The model's greedy answers to a task's prompts, in one batch padded on the left."""
    chats = [
        tokenizer.apply_chat_template(task.messages(example.prompt), add_generation_prompt=True, tokenize=False)
        for example in examples
    ]
    batch = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
    longest = max(len(tokenizer(example.answer, add_special_tokens=False).input_ids) for example in examples)
    with torch.inference_mode():
        # One token more than the longest right answer: the end, or the proof that a model goes on talking.
        tokens = model.generate(**batch, max_new_tokens=longest + 1, do_sample=False)
    texts = tokenizer.batch_decode(tokens[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return [str(text).strip() for text in texts]


def _answers(name: str, model: Any, tokenizer: Any, prompts: Prompts, report: Report) -> Answers:
    started = time.perf_counter()
    texts = {task: _generate(model, tokenizer, TASKS[task], examples) for task, examples in prompts.items()}
    accuracy = {
        task: sum(text == example.answer for text, example in zip(texts[task], examples, strict=True)) / len(examples)
        for task, examples in prompts.items()
    }
    seconds = time.perf_counter() - started
    report(f"{name}: {', '.join(f'{task} {share:.0%}' for task, share in accuracy.items())} ({seconds:.0f} s)")
    return Answers(name, texts, accuracy, seconds)


def _load(folder: Path) -> tuple[Any, Any]:
    """A full model and its tokenizer; the checkpoint's keys must be exactly the model's."""
    # float32: bfloat16 is slow on many CPUs, and the checkpoint's values are kept either way.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, local_files_only=True)
    if any(info.values()):
        raise DemoError(f"{folder} does not fit its model: {info}")
    return model.eval(), AutoTokenizer.from_pretrained(folder, padding_side="left", local_files_only=True)


@contextmanager
def _adapted(model: Any, name: str, folder: Path) -> Iterator[Any]:
    """The model with the adapter put on by PEFT, and taken off again; the adapter's keys must be exactly PEFT's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        adapted = PeftModelForCausalLM(model, PeftConfig.from_pretrained(str(folder)), name)
    result = adapted.load_adapter(folder, name)
    missing = [key for key in result.missing_keys if f".{name}." in key]
    if missing or result.unexpected_keys:
        raise DemoError(f"{folder} does not fit its model: missing {missing}, unexpected {result.unexpected_keys}")
    try:
        yield adapted.eval()
    finally:
        adapted.unload()


def evaluate(folder: Path, adapters: Mapping[str, Path], prompts: Prompts, report: Report, name: str) -> list[Answers]:
    """The answers of the full model in the folder, then of the model with each of the adapters."""
    model, tokenizer = _load(folder)
    found = [_answers(name, model, tokenizer, prompts, report)]
    for adapter, path in adapters.items():
        with _adapted(model, adapter, path) as adapted:
            found.append(_answers(adapter, adapted, tokenizer, prompts, report))
    return found
