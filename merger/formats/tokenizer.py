"""tokenizer.json: which tokens there are and which ids they have. Meaning (union, rows) is merger/vocabulary.py's.

{"model": {"type": "BPE" | "WordPiece" | "WordLevel", "vocab": {token: id}}      or
          {"type": "Unigram", "vocab": [[token, score], ...]},                   id = position
 "added_tokens": [{"id": 5, "content": "<pad>", ...}]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from merger.errors import SourceError
from merger.formats.strict_json import parse_json_object
from merger.storage.base import Store, read_whole

TOKENIZER_JSON: Final = "tokenizer.json"
TOKENIZER_FILES: Final = (
    TOKENIZER_JSON,
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "tekken.json",
    "normalizer.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files by fixed name that make up a tokenizer; `*.tiktoken` and `tokenizer.model.v*` belong to it too."""
MAX_TOKENIZER_BYTES: Final = 512 * 2**20


def _refuse(code: str, what: str, where: str) -> SourceError:
    return SourceError.of(code, what, where=where, fix="save the tokenizer again with the tokenizers library")


def _tokens(document: Mapping[str, Any], where: str) -> dict[str, int]:
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    tokens: dict[str, Any] = {}
    if isinstance(vocab, dict):
        tokens.update(vocab)
    elif isinstance(vocab, list):
        for number, piece in enumerate(vocab):
            if not (isinstance(piece, list) and len(piece) == 2 and isinstance(piece[0], str)):
                raise _refuse("bad-tokenizer", f"piece {number} of the vocabulary is no pair of token and score", where)
            tokens[piece[0]] = number  # of a piece that occurs twice the last counts, as in the tokenizers library
    else:
        raise _refuse("bad-tokenizer", "there is no vocabulary at model.vocab", where)
    added = document.get("added_tokens")
    if added is None:
        added = []
    if not isinstance(added, list):
        raise _refuse("bad-tokenizer", "added_tokens is no list", where)
    for entry in added:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise _refuse("bad-tokenizer", f"the added token {entry!r:.80} has no content", where)
        content, added_id = entry["content"], entry.get("id")
        if tokens.setdefault(content, added_id) != added_id:
            raise _refuse(
                "token-conflict", f"the token {content!r} has the ids {tokens[content]} and {added_id}", where
            )
    for token, number in tokens.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
            raise _refuse("bad-tokenizer", f"the token {token!r} has the id {number!r}", where)
    return tokens


def vocabulary_size(tokenizer_json: Mapping[str, Any], where: str = TOKENIZER_JSON) -> int:
    """Rows an embedding needs: the highest id plus one (added tokens count; ids may have gaps)."""
    return max(_tokens(tokenizer_json, where).values(), default=-1) + 1


def tokens_of(store: Store) -> dict[str, int] | None:
    """Every token and its id, from tokenizer.json; None where there is no such file.

    Raises SourceError: `bad-tokenizer`, `token-conflict` when one string has two ids, and what is wrong with the JSON.
    """
    if TOKENIZER_JSON not in store.list_files():
        return None
    where = f"{store.uri}/{TOKENIZER_JSON}"
    return _tokens(parse_json_object(read_whole(store, TOKENIZER_JSON, limit=MAX_TOKENIZER_BYTES), where), where)


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
        raise _refuse("bad-tokenizer", f"the tokenizer cannot be read: {error}", where) from None
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
