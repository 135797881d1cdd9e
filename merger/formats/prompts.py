"""Token ids of prompts, by a folder's tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence

from merger.errors import SourceError
from merger.formats.strict_json import parse_json_object
from merger.formats.tokenizer import MAX_TOKENIZER_BYTES, TOKENIZER_JSON
from merger.storage.base import Store, read_whole


def encode_prompts(store: Store, prompts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token ids of prompts, each after the tokenizer's own first token (bos_token) where it has one, and nothing else.

    Raises SourceError: `no-tokenizer`, `bad-tokenizer`.
    """
    names = store.list_files()
    where = f"{store.uri}/{TOKENIZER_JSON}"
    if TOKENIZER_JSON not in names:
        raise SourceError.of(
            "no-tokenizer", "there is no tokenizer.json, and prompts have to be read", where=store.uri,
            why="gates are made from the tokens of prompts",
            fix="save the tokenizer with transformers, which writes tokenizer.json, or write gate_mode: random",
        )  # fmt: skip
    from tokenizers import Tokenizer

    text = read_whole(store, TOKENIZER_JSON, limit=MAX_TOKENIZER_BYTES).decode("utf-8", "replace")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - whatever the library raises for a file that it cannot read
        raise SourceError.of(
            "bad-tokenizer", f"the tokenizer cannot be read: {error}", where=where,
            fix="save the tokenizer again with the tokenizers library",
        ) from None  # fmt: skip
    tokenizer.no_padding()
    tokenizer.no_truncation()
    first = _first_token(store, names)
    return tuple(tuple(tokenizer.encode(first + prompt, add_special_tokens=False).ids) for prompt in prompts)


def _first_token(store: Store, names: Sequence[str]) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name in names:
            document = parse_json_object(read_whole(store, name, limit=MAX_TOKENIZER_BYTES), f"{store.uri}/{name}")
            token = document.get("bos_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
    return ""
