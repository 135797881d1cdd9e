"""What models are asked: the items of a file, and which of their tokens are scored.

A line of a `.jsonl` file is one item, one of
    {"text": …}                               every token but the first is scored
    {"prompt": …, "answer": …}                the answer as it stands behind the prompt, and the end of text
    {"messages": [{"role": …, "content": …}]} the last message, as the tokenizer's chat template writes it
each with a `task` if scores are to be told apart. Of any other file every paragraph is a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from merger.bulk import fetch_file
from merger.errors import ManifestError, SourceError
from merger.manifest import parse_reference

MOST_BYTES: Final = 256 << 20
_KINDS: Final = ({"text"}, {"prompt", "answer"}, {"messages"})
_FORMS: Final = 'it has one of "text", "prompt" with "answer", "messages"'


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to ask."""

    where: str
    """File and line."""
    task: str = ""
    text: str = ""
    """Scored as a whole, where there is no answer."""
    prompt: str = ""
    answer: str | None = None
    messages: tuple[Mapping[str, str], ...] = ()

    @property
    def has_answer(self) -> bool:
        return self.answer is not None or bool(self.messages)

    @property
    def scored(self) -> str:
        """The text whose tokens are scored."""
        if self.messages:
            return self.messages[-1]["content"]
        return self.text if self.answer is None else self.answer


@dataclass(frozen=True, slots=True)
class Tokens:
    """An item as a model reads it."""

    ids: tuple[int, ...]
    first: int
    """Index of the first token that is scored."""


def load_items(source: str) -> tuple[Item, ...]:
    """The items of a file, wherever it lies. Raises ManifestError(code `bad-data`), and what reading it raises."""
    try:
        return parse_items(fetch_file(parse_reference(source, bare="local"), limit=MOST_BYTES).decode(), source)
    except UnicodeDecodeError as error:
        raise ManifestError.of("bad-data", "it is no text", where=source, why=str(error),
                               fix="write it as UTF-8") from error  # fmt: skip


def parse_items(data: str, name: str) -> tuple[Item, ...]:
    """The items of a file's text. Raises ManifestError(code `bad-data`) naming every line that is no item."""
    if name.lower().endswith(".jsonl"):
        found = _lines(data, name)
    else:
        parts = [part.strip() for part in re.split(r"\n\s*\n", data)]
        found = [Item(f"{name}: paragraph {i}", text=part) for i, part in enumerate(parts, 1) if part]
    if not found:
        raise ManifestError.of("bad-data", "there is nothing to ask", where=name, why="the file holds no item",
                               fix="write one item a line")  # fmt: skip
    return tuple(found)


def _lines(data: str, name: str) -> list[Item]:
    found: list[Item] = []
    wrong = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(_item(json.loads(line), f"{name}:{number}"))
        except (ValueError, TypeError) as error:
            wrong.append((number, str(error)))
    if wrong:
        number, why = wrong[0]
        raise ManifestError.of(
            "bad-data", f"{len(wrong)} line(s) are no items, the first is {number}", where=f"{name}:{number}", why=why,
            fix=f"make each line a JSON object: {_FORMS}",
        )  # fmt: skip
    return found


def _item(row: Any, where: str) -> Item:
    if not isinstance(row, dict):
        raise TypeError("it is no object")
    task = row.get("task", "")
    keys = set(row) & {"text", "prompt", "answer", "messages"}
    if keys not in _KINDS or not isinstance(task, str):
        raise ValueError(f"its keys are {', '.join(sorted(row)) or 'none'}; {_FORMS}")
    if "messages" in keys:
        messages = row["messages"]
        if not isinstance(messages, list) or len(messages) < 2 or not all(map(_is_message, messages)):
            raise ValueError("messages are two or more objects with `role` and `content`")
        if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
            raise ValueError("the last message is the assistant's, and says something")
        return Item(where, task, messages=tuple({"role": m["role"], "content": m["content"]} for m in messages))
    if not all(isinstance(row[key], str) for key in keys):
        raise TypeError("text, prompt and answer are strings")
    if not (row["text"] if "text" in keys else row["answer"]):
        raise ValueError("there is nothing to score")
    return Item(where, task, row.get("text", ""), row.get("prompt", ""), row.get("answer"))


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def tokens_of(item: Item, tokenizer: Any, *, limit: int | None) -> Tokens:
    """An item as tokens, at most `limit`: of a longer text the beginning is taken.

    Raises SourceError: `too-long` of a longer prompt or answer, `no-chat-template`, `bad-data` of what leaves nothing
    to score.
    """
    if item.messages:
        before, after = _chat(item, tokenizer)
        prompt = tokenizer(before, add_special_tokens=False).input_ids
        answer = tokenizer(after, add_special_tokens=False).input_ids
    elif item.answer is not None:
        prompt = _without_end(tokenizer(item.prompt).input_ids, tokenizer)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        answer = [*tokenizer(item.answer, add_special_tokens=False).input_ids, *end]
    else:
        ids = _without_end(tokenizer(item.text).input_ids, tokenizer)[:limit]
        prompt, answer = ids[:1], ids[1:]
    if limit is not None and len(prompt) + len(answer) > limit:
        raise SourceError.of(
            "too-long", f"an item has {len(prompt) + len(answer)} tokens", where=item.where,
            why=f"the model takes {limit}", fix="shorten it, or leave it out",
        )  # fmt: skip
    if not prompt or not answer:
        raise SourceError.of(
            "bad-data", "an item leaves no token to score", where=item.where,
            why="a token is scored by what stands before it", fix="write a longer one, or give it a prompt",
        )  # fmt: skip
    return Tokens((*prompt, *answer), len(prompt))


def _without_end(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Tokens without the end of text that some tokenizers put behind every text."""
    found = list(ids)
    return found[:-1] if found and tokenizer.eos_token_id is not None and found[-1] == tokenizer.eos_token_id else found


def _chat(item: Item, tokenizer: Any) -> tuple[str, str]:
    """A conversation up to the last message, and that message with the end of its turn."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise SourceError.of(
            "no-chat-template", "the tokenizer has no chat template", where=item.where,
            why="messages are written as its template says", fix="give items with `prompt` and `answer`",
        )  # fmt: skip
    messages = [dict(message) for message in item.messages]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    before = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    if not whole.startswith(before):
        raise SourceError.of(
            "no-chat-template", "the chat template does not write a conversation by parts", where=item.where,
            why="with the last message it writes the earlier ones differently",
            fix="give items with `prompt` and `answer`",
        )  # fmt: skip
    return before, whole[len(before) :].rstrip()
