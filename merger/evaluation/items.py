"""What models are asked: the items of a file, and which of their tokens are scored.

A line of a `.jsonl` file is one item, one of
    {"text": …}                               every token but the first is scored
    {"prompt": …, "answer": …}                the answer as it stands behind the prompt; with "end": true the end of
                                              text behind it, too
    {"messages": [{"role": …, "content": …}]} the last message, as the tokenizer's chat template writes it
each with a `task` if scores are to be told apart. Of any other file every paragraph is a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
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
    ends: bool = False
    """Whether the end of text behind the answer is scored, too."""
    messages: tuple[Mapping[str, str], ...] = ()

    @property
    def has_answer(self) -> bool:
        return self.answer is not None or bool(self.messages)


@dataclass(frozen=True, slots=True)
class Tokens:
    """An item as a model reads it."""

    ids: tuple[int, ...]
    first: int
    """Index of the first token that is scored."""
    size: int
    """Bytes of the text whose tokens are scored."""
    cut: bool = False
    """Whether only the beginning of a text is here."""


def load_items(source: str) -> tuple[Item, ...]:
    """The items of a file, wherever it lies. Raises ManifestError(code `bad-data`), and what reading it raises."""
    try:
        return parse_items(
            fetch_file(parse_reference(source, bare="local"), limit=MOST_BYTES).decode("utf-8-sig"), source
        )
    except UnicodeDecodeError as error:
        raise ManifestError.of("bad-data", "it is no text", where=source, why=str(error),
                               fix="write it as UTF-8") from error  # fmt: skip


def parse_items(data: str, name: str) -> tuple[Item, ...]:
    """The items of a file's text. Raises ManifestError(code `bad-data`) naming every line that is no item."""
    kind = name.lower().rpartition(".")[2]
    if kind in ("json", "csv", "tsv", "yaml", "yml", "parquet"):
        raise ManifestError.of(
            "bad-data", f"items are not read from .{kind}", where=name, why="it would be taken for a text",
            fix="write one JSON object a line, in .jsonl",
        )  # fmt: skip
    if kind in ("jsonl", "ndjson"):
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
    for number, line in enumerate(data.split("\n"), 1):
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
    ends = row.get("end", False)
    if keys not in _KINDS or not isinstance(task, str) or not isinstance(ends, bool):
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
    return Item(where, task, row.get("text", ""), row.get("prompt", ""), row.get("answer"), ends)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def tokens_of(item: Item, tokenizer: Any, *, limit: int | None, text_limit: int | None = None) -> Tokens:
    """An item as tokens, at most `limit`; of a text without an answer the first `text_limit` of them.

    Prompt and answer are read as one text, so that a word which begins at the cut is the word that it is in the middle
    of a text; spaces before the cut go with the answer. Raises SourceError: `too-long` of a longer prompt or answer,
    `no-chat-template`, `bad-data` of what leaves nothing to score.
    """
    end = tokenizer.eos_token_id
    if item.messages:
        before, whole = _chat(item, tokenizer)
        ids = tokenizer(whole, add_special_tokens=False).input_ids
        first = len(tokenizer(before, add_special_tokens=False).input_ids)
    elif item.answer is not None:
        prompt = item.prompt.rstrip()
        ids = _read(prompt + item.prompt[len(prompt) :] + item.answer, tokenizer)
        first = len(_read(prompt, tokenizer))
        ids = [*ids, end] if item.ends and end is not None else ids
    else:
        ids = _read(item.text, tokenizer)
        first = 1
    most = min((bound for bound in (limit, text_limit) if bound is not None), default=len(ids))
    cut = not item.has_answer and len(ids) > most
    ids = ids[:most] if cut else ids
    if limit is not None and len(ids) > limit:
        raise SourceError.of(
            "too-long", f"an item has {len(ids)} tokens", where=item.where, why=f"the model takes {limit}",
            fix="shorten it, or leave it out",
        )  # fmt: skip
    if not 0 < first < len(ids):
        raise SourceError.of(
            "bad-data", "an item leaves no token to score", where=item.where,
            why="a token is scored by what stands before it", fix="write a longer one, or give it a prompt",
        )  # fmt: skip
    size = len(tokenizer.decode(ids[first:], skip_special_tokens=True).encode())
    return Tokens(tuple(ids), first, size, cut)


def _read(text: str, tokenizer: Any) -> list[int]:
    """A text's tokens, with what a tokenizer puts before a text, without what some put behind it."""
    ids: list[int] = list(tokenizer(text).input_ids)
    behind = list(tokenizer("").input_ids)
    if behind and tokenizer.eos_token_id is not None and behind[-1] == tokenizer.eos_token_id == ids[-1]:
        return ids[:-1]
    return ids


def _chat(item: Item, tokenizer: Any) -> tuple[str, str]:
    """A conversation up to the last message, and with it and the end of its turn."""
    from jinja2 import TemplateError

    if getattr(tokenizer, "chat_template", None) is None:
        raise _no_template(item, "the tokenizer has no chat template", "messages are written as its template says")
    messages = [dict(message) for message in item.messages]
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        before = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise _no_template(item, "the chat template refuses this conversation", str(error)) from error
    if not whole.startswith(before):
        raise _no_template(
            item, "the chat template does not write a conversation by parts",
            "what it writes before an answer (a beginning of thought, for example) is not what it writes around one",
        )  # fmt: skip
    return before, whole.rstrip()


def _no_template(item: Item, what: str, why: str) -> SourceError:
    return SourceError.of("no-chat-template", what, where=item.where, why=why,
                          fix="give items with `prompt` and `answer`")  # fmt: skip
