"""tokenizer.json: tokens and ids, against the tokenizers library."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models

from merger.errors import SourceError
from merger.formats.tokenizer import tokens_of, vocabulary_size
from merger.storage.memory import MemoryStore


def tokenizers() -> list[Tokenizer]:
    return [
        Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]")),
        Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])),
        Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("ü", -2.0)], 0, False)),
        Tokenizer(models.WordPiece({"[UNK]": 0, "##a": 1}, unk_token="[UNK]")),
    ]


@pytest.mark.parametrize("number", range(4))
def test_tokens_are_those_of_the_library(number: int) -> None:
    tokenizer = tokenizers()[number]
    tokenizer.add_special_tokens([AddedToken("<pad>", special=True), AddedToken("a", special=True)])
    store = MemoryStore(f"tokenizer-{number}")
    store.put("tokenizer.json", tokenizer.to_str().encode())
    assert tokens_of(store) == tokenizer.get_vocab(with_added_tokens=True)
    assert vocabulary_size(json.loads(tokenizer.to_str())) == tokenizer.get_vocab_size(with_added_tokens=True)


def test_no_tokenizer_is_none() -> None:
    assert tokens_of(MemoryStore("tokenizer-none")) is None


def test_gaps_count_as_rows() -> None:
    document = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 9, "content": "<x>"}]}
    assert vocabulary_size(document) == 10


@pytest.mark.parametrize(
    "document,code",
    [
        ({}, "bad-tokenizer"),
        ({"model": []}, "bad-tokenizer"),
        ({"model": {"vocab": 5}}, "bad-tokenizer"),
        ({"model": {"vocab": {"a": "0"}}}, "bad-tokenizer"),
        ({"model": {"vocab": {"a": -1}}}, "bad-tokenizer"),
        ({"model": {"vocab": {"a": True}}}, "bad-tokenizer"),
        ({"model": {"vocab": {"a": 2**40}}}, "bad-tokenizer"),
        ({"model": {"vocab": [["a"]]}}, "bad-tokenizer"),
        ({"model": {"vocab": {}}, "added_tokens": {}}, "bad-tokenizer"),
        ({"model": {"vocab": {}}, "added_tokens": [5]}, "bad-tokenizer"),
        ({"model": {"vocab": {}}, "added_tokens": [{"content": "a"}]}, "bad-tokenizer"),
        ({"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}, "bad-tokenizer"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "a"}]}, "token-conflict"),
    ],
)
def test_a_broken_tokenizer_is_refused(document: dict[str, Any], code: str) -> None:
    with pytest.raises(SourceError, match=code):
        vocabulary_size(document)
