"""tokenizer.json: which tokens there are and which ids they have. Meaning (union, rows) is merger/vocabulary.py's.

{"model": {"type": "BPE" | "WordPiece" | "WordLevel", "vocab": {token: id}}      or
          {"type": "Unigram", "vocab": [[token, score], ...]},                   id = position
 "added_tokens": [{"id": 5, "content": "<pad>", ...}]}
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final

from merger.errors import SourceError
from merger.formats.strict_json import parse_json_object
from merger.storage.base import Store, read_whole

TOKENIZER_JSON: Final = "tokenizer.json"
CHAT_TEMPLATE: Final = "chat_template.jinja"
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
"""Files by fixed name that make up a tokenizer."""
_PATTERNS: Final = ("*.tiktoken", "tokenizer.model.v*", "chat_templates/*.jinja", "additional_chat_templates/*.jinja")
MAX_TOKENIZER_BYTES: Final = 512 * 2**20


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of a model's folder belongs to its tokenizer."""
    return name in TOKENIZER_FILES or any(fnmatchcase(name, pattern) for pattern in _PATTERNS)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A tokenizer as its files say it: what is needed to compare it with others and to add tokens to it."""

    where: str
    document: Mapping[str, Any]
    """tokenizer.json."""
    tokens: Mapping[str, int]
    """Every token and its id, those added later included."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """tokenizer_config.json; empty where there is none."""
    added_file: Mapping[str, Any] | None = None
    """added_tokens.json, which older tokenizers keep beside."""
    chat_template: str | None = None

    @property
    def added(self) -> dict[str, Mapping[str, Any]]:
        """The entries of `added_tokens`, by token."""
        return {entry["content"]: entry for entry in self.document.get("added_tokens") or ()}

    @property
    def kind(self) -> str:
        """`BPE`, `Unigram`, `WordPiece` or `WordLevel`."""
        return str(self.document["model"].get("type", ""))

    def same_rules(self, other: Tokenizer) -> tuple[str, ...]:
        """What the two do differently with the same text: parts of tokenizer.json by name. Vocabularies are no part."""
        differing = [
            part
            for part in ("normalizer", "pre_tokenizer", "decoder")
            if self.document.get(part) != other.document.get(part)
        ]
        if self.kind != other.kind:
            differing.append("model.type")
        elif _merges(self.document) != _merges(other.document):
            differing.append("model.merges")
        return tuple(differing)


def _merges(document: Mapping[str, Any]) -> list[tuple[str, ...]] | None:
    """The merges of a BPE, which are written as one string or as pairs."""
    merges = document["model"].get("merges")
    return None if merges is None else [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]


def read_tokenizer(store: Store) -> Tokenizer | None:
    """The tokenizer of a folder; None where there is no tokenizer.json.

    Raises SourceError: `bad-tokenizer`, `token-conflict`, and what is wrong with the JSON of any of the files.
    """
    names = store.list_files()
    if TOKENIZER_JSON not in names:
        return None

    def read(name: str) -> dict[str, Any]:
        return parse_json_object(read_whole(store, name, limit=MAX_TOKENIZER_BYTES), f"{store.uri}/{name}")

    document = read(TOKENIZER_JSON)
    settings = read("tokenizer_config.json") if "tokenizer_config.json" in names else {}
    template: str | None = None
    if CHAT_TEMPLATE in names:
        template = read_whole(store, CHAT_TEMPLATE, limit=MAX_TOKENIZER_BYTES).decode("utf-8", "replace")
    elif isinstance(settings.get("chat_template"), str):
        template = settings["chat_template"]
    where = f"{store.uri}/{TOKENIZER_JSON}"
    return Tokenizer(
        where=where, document=document, tokens=_tokens(document, where), settings=settings,
        added_file=read("added_tokens.json") if "added_tokens.json" in names else None, chat_template=template,
    )  # fmt: skip


def grown_tokenizer(tokenizer: Tokenizer, store: Store) -> Tokenizer | None:
    """A tokenizer with the tokens that a folder without tokenizer.json says were added to it; None where it says none.

        added_tokens.json       {token: id}
        tokenizer_config.json   {"added_tokens_decoder": {"id": {"content": token, "special": true, ...}}}

    Raises SourceError: `bad-tokenizer`, `token-conflict`.
    """
    names = store.list_files()
    entries: dict[str, dict[str, Any]] = {}
    where = f"{store.uri}/tokenizer_config.json"
    if "tokenizer_config.json" in names:
        settings = parse_json_object(read_whole(store, "tokenizer_config.json", limit=MAX_TOKENIZER_BYTES), where)
        for number, entry in (settings.get("added_tokens_decoder") or {}).items():
            if isinstance(entry, dict) and isinstance(entry.get("content"), str) and str(number).isdecimal():
                entries[entry["content"]] = {**_PLAIN_TOKEN, **entry, "id": int(number)}
    if "added_tokens.json" in names:
        where = f"{store.uri}/added_tokens.json"
        added = parse_json_object(read_whole(store, "added_tokens.json", limit=MAX_TOKENIZER_BYTES), where)
        for token, number in added.items():
            entries.setdefault(token, {**_PLAIN_TOKEN, "content": token, "id": number})
    if not entries:
        return None
    listed = tokenizer.document.get("added_tokens") or ()
    document = {
        **tokenizer.document,
        "added_tokens": [*(entry for entry in listed if entry["content"] not in entries), *entries.values()],
    }
    return Tokenizer(
        where=where, document=document, tokens=_tokens(document, where), settings=tokenizer.settings,
        chat_template=tokenizer.chat_template,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that a tokenizer gets: its id, and how text is searched for it."""

    content: str
    number: int
    entry: Mapping[str, Any] | None
    """Its entry in the `added_tokens` it comes from; None of a piece of a vocabulary."""


def extended_files(tokenizer: Tokenizer, new: Sequence[NewToken], removed: Sequence[str] = ()) -> dict[str, bytes]:
    """The files of a tokenizer that change when tokens are added to it and added tokens removed: name → bytes.

    Pieces of another vocabulary go into the vocabulary, where words and decoding find them; a BPE gets no merges for
    them. Raises SourceError(code `token-gap`) where a Unigram vocabulary would need ids between those it has.
    """
    if not new and not removed:
        return {}
    document = copy.deepcopy(dict(tokenizer.document))
    gone = set(removed)
    added = [e for e in document.get("added_tokens") or () if e["content"] not in gone]
    vocab = document["model"]["vocab"]
    taken = {**{t: n for t, n in tokenizer.tokens.items() if t not in gone}}
    pieces = [token for token in new if token.entry is None]
    if isinstance(vocab, list):
        for token in pieces:
            if token.number != len(vocab):
                raise SourceError.of(
                    "token-gap", f"the piece {token.content!r} would need the id {token.number}", where=tokenizer.where,
                    why=f"a Unigram vocabulary numbers its pieces by place, and has {len(vocab)}",
                    fix="use a tokenizer_source that holds all pieces, or tokenizer_source: base",
                )  # fmt: skip
            vocab.append([token.content, min((score for _, score in vocab), default=0.0) - 1.0])
    elif pieces or any(n != i for i, n in enumerate(sorted(taken.values()))):
        # Every id is written down: the tokenizers library numbers added tokens by place where a vocabulary lacks them.
        vocab.update(taken)
        vocab.update({token.content: token.number for token in new})
    added += [{**_PLAIN_TOKEN, **token.entry, "id": token.number} for token in new if token.entry is not None]
    document["added_tokens"] = sorted(added, key=lambda entry: entry["id"])
    files = {TOKENIZER_JSON: _dump(document)}
    decoder = tokenizer.settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        kept = {n: e for n, e in decoder.items() if not (isinstance(e, dict) and e.get("content") in gone)}
        kept |= {
            str(token.number): {k: v for k, v in {**_PLAIN_TOKEN, **token.entry}.items() if k != "id"}
            for token in new if token.entry is not None
        }  # fmt: skip
        files["tokenizer_config.json"] = _dump({**tokenizer.settings, "added_tokens_decoder": kept})
    if tokenizer.added_file is not None:
        kept = {t: n for t, n in tokenizer.added_file.items() if t not in gone}
        files["added_tokens.json"] = _dump(kept | {t.content: t.number for t in new if t.entry is not None})
    return files


def with_chat_template(tokenizer: Tokenizer, template: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files that say a chat template: its own, and the settings without one. `files` are those changed before."""
    settings = json.loads(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else tokenizer.settings
    changed = {**files, CHAT_TEMPLATE: template.encode()}
    if "chat_template" in settings:
        changed["tokenizer_config.json"] = _dump({k: v for k, v in settings.items() if k != "chat_template"})
    return changed


_PLAIN_TOKEN: Final = {
    "content": "", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False,
}  # fmt: skip


def _dump(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


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
    from tokenizers import Tokenizer as Encoder

    text = read_whole(store, TOKENIZER_JSON, limit=MAX_TOKENIZER_BYTES).decode("utf-8", "replace")
    try:
        tokenizer = Encoder.from_str(text)
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
