"""Checkpoint folders: which files count, where index and files disagree, and what is written."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given
from hypothesis import strategies as st

from merger.errors import SourceError
from merger.formats.checkpoint import (
    auto_map_files,
    build_index,
    companion_files,
    find_weights,
    is_plain_path,
    parse_json_object,
    read_checkpoint,
    relative_imports,
    shard_names,
    split_shards,
)
from merger.formats.torch_bin import BinEntry
from merger.storage.memory import MemoryStore
from merger.tensors import DTYPES, TensorSpec

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def weights(*names: str) -> bytes:
    return safetensors.torch.save({name: torch.ones(2) for name in names})


def torch_weights(*names: str) -> bytes:
    buffer = io.BytesIO()
    torch.save({name: torch.ones(2) for name in names}, buffer)
    return buffer.getvalue()


def index(**weight_map: Any) -> bytes:
    return json.dumps({"weight_map": weight_map}).encode()


@pytest.fixture
def store(request: pytest.FixtureRequest) -> MemoryStore:
    return MemoryStore(f"checkpoint-{request.node.name}")


def fill(store: MemoryStore, files: dict[str, bytes]) -> MemoryStore:
    for name, data in {"config.json": b'{"model_type": "llama"}', **files}.items():
        store.put(name, data)
    return store


def codes(caught: pytest.ExceptionInfo[SourceError]) -> list[str]:
    return [problem.code for problem in caught.value.problems]


def test_a_single_file_is_the_checkpoint(store: MemoryStore) -> None:
    found = read_checkpoint(fill(store, {"model.safetensors": weights("b", "a"), "pytorch_model.bin": b"ignored"}))
    assert found.weights.files == ("model.safetensors",)
    assert list(found.tensors) == ["a", "b"]
    assert found.config == {"model_type": "llama"}
    assert found.files == ("config.json", "model.safetensors", "pytorch_model.bin")


def test_shards_are_read_by_their_index(store: MemoryStore) -> None:
    found = read_checkpoint(fill(store, {INDEX: index(a=TWO, b=ONE), ONE: weights("b"), TWO: weights("a")}))
    assert found.weights.index == INDEX
    assert {name: tensor.file for name, tensor in found.tensors.items()} == {"b": ONE, "a": TWO}


def test_torch_files_are_read_where_there_is_no_other(store: MemoryStore) -> None:
    files = {
        "pytorch_model.bin.index.json": index(a="pytorch_model-00001-of-00001.bin"),
        "pytorch_model-00001-of-00001.bin": torch_weights("a"),
    }
    found = read_checkpoint(fill(store, files))
    assert found.weights.kind == "bin"
    assert isinstance(found.tensors["a"].entry, BinEntry)
    assert found.tensors["a"].spec.shape == (2,)


def test_a_single_file_and_an_index_of_others_are_refused(store: MemoryStore) -> None:
    fill(store, {"model.safetensors": weights("a"), INDEX: index(a=ONE), ONE: weights("a")})
    with pytest.raises(SourceError, match="two-checkpoints") as caught:
        find_weights(store)
    assert "model.safetensors" in caught.value.problems[0].what
    assert INDEX in caught.value.problems[0].what


def test_an_index_of_the_single_file_agrees_with_it(store: MemoryStore) -> None:
    fill(store, {"model.safetensors": weights("a"), INDEX: index(a="model.safetensors")})
    assert read_checkpoint(store).weights.files == ("model.safetensors",)


@pytest.mark.parametrize(
    "value,code",
    [
        ("../model.safetensors", "path-escapes"),
        ("a/../../b.safetensors", "path-escapes"),
        ("/etc/passwd", "path-escapes"),
        ("./" + ONE, "path-escapes"),
        ("a//b.safetensors", "path-escapes"),
        ("", "path-escapes"),
        ("..\\b.safetensors", "path-escapes"),
        ("C:model.safetensors", "path-escapes"),
        ("a\0b", "path-escapes"),
        ("absent.safetensors", "missing-shard"),
        (5, "missing-shard"),
    ],
)
def test_an_index_that_names_a_wrong_file_is_refused(store: MemoryStore, value: Any, code: str) -> None:
    with pytest.raises(SourceError) as caught:
        find_weights(fill(store, {INDEX: index(a=value, b=ONE), ONE: weights("b")}))
    assert codes(caught)[0] == code


@pytest.mark.parametrize(
    "data,code",
    [
        (b"", "bad-json"),
        (b"[]", "bad-json"),
        (b"{}", "bad-index"),
        (b'{"weight_map": {}}', "bad-index"),
        (b'{"weight_map": []}', "bad-index"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "duplicate-name"),
        (b'{"weight_map": {"a": NaN}}', "json-constant"),
        (b"\xff", "bad-json"),
    ],
)
def test_a_broken_index_is_refused(store: MemoryStore, data: bytes, code: str) -> None:
    with pytest.raises(SourceError) as caught:
        find_weights(fill(store, {INDEX: data}))
    assert codes(caught) == [code]


def test_every_disagreement_of_index_and_shards_is_reported_at_once(store: MemoryStore) -> None:
    fill(store, {INDEX: index(a=ONE, lost=ONE, c=TWO), ONE: weights("a", "c"), TWO: weights("c", "extra")})
    with pytest.raises(SourceError) as caught:
        read_checkpoint(store)
    assert codes(caught) == ["not-in-shard", "not-in-index", "not-in-index"]
    text = str(caught.value)
    assert f"places lost in {ONE}" in text
    assert f"{ONE} holds c, but the index places it in {TWO}" in text
    assert f"{TWO} holds extra, but the index does not know it" in text


def test_a_folder_without_weights_is_refused_and_says_what_is_there(store: MemoryStore) -> None:
    with pytest.raises(SourceError, match="no-weights") as caught:
        find_weights(fill(store, {"adapter_model.safetensors": weights("a")}))
    assert "adapter_model.safetensors" in caught.value.problems[0].why


def test_a_checkpoint_without_config_is_refused(store: MemoryStore) -> None:
    store.put("model.safetensors", weights("a"))
    with pytest.raises(SourceError, match="no-config"):
        read_checkpoint(store)


@pytest.mark.parametrize("name,plain", [("a", True), ("a/b.x", True), ("a b", True), (".", False), ("a/", False)])
def test_plain_paths(name: str, plain: bool) -> None:
    assert is_plain_path(name) is plain


@pytest.mark.parametrize(
    "data", [b"1", b"null", b'"a"', b"{} {}", b'{"a": 1,}', b'{"a": "\\ud800"}', b"\xef\xbb\xbf{}"]
)
def test_what_is_no_strict_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(SourceError, match="bad-json"):
        parse_json_object(data, "here")


def test_json_keeps_escapes_and_surrogate_pairs() -> None:
    assert parse_json_object(b'{"a": "\\ud83d\\ude00"}', "here") == {"a": "😀"}


def test_the_index_is_written_as_transformers_writes_it() -> None:
    expected = {"metadata": {"total_parameters": 3, "total_size": 12}, "weight_map": {"a": ONE, "b": TWO}}
    assert build_index({"b": TWO, "a": ONE}, 12, 3) == (json.dumps(expected, indent=2, sort_keys=True) + "\n").encode()


def test_shards_are_named_as_loaders_expect() -> None:
    assert shard_names(1) == ("model.safetensors",)
    assert shard_names(2) == (ONE, TWO)
    assert shard_names(1, "adapter_model") == ("adapter_model.safetensors",)


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 40))
def test_shards_are_those_of_huggingface_hub(sizes: list[int], limit: int) -> None:
    specs = [TensorSpec(f"t{number:02}", DTYPES["U8"], (size,)) for number, size in enumerate(sizes)]
    shards = split_shards(specs, limit)
    state = {spec.name: torch.zeros(spec.shape, dtype=torch.uint8) for spec in specs if spec.numel}
    if len(state) == len(specs):
        theirs = split_torch_state_dict_into_shards(state, max_shard_size=limit).filename_to_tensors
        assert [[spec.name for spec in shard] for shard in shards] == (
            [list(t) for t in theirs.values()] if specs else []
        )
    assert sorted(spec.name for shard in shards for spec in shard) == [spec.name for spec in specs]
    assert all(len(shard) == 1 or sum(spec.nbytes for spec in shard) <= limit for shard in shards)


def test_companions_are_what_a_loader_asks_for() -> None:
    wanted = {
        "added_tokens.json", "additional_chat_templates/tool_use.jinja", "chat_template.jinja",
        "generation_config.json", "merges.txt", "preprocessor_config.json", "qwen.tiktoken",
        "special_tokens_map.json", "spiece.model",
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "video_preprocessor_config.json", "vocab.json",
    }  # fmt: skip
    unwanted = {
        ".gitattributes", "README.md", "config.json", "model.gguf", "model.safetensors", INDEX, "modeling_x.py",
        "onnx/model.onnx", "onnx/tokenizer.json", "original/tokenizer.model", "pytorch_model.bin", "training_args.bin",
        "1_Pooling/config.json", "checkpoint-5/generation_config.json",
    }  # fmt: skip
    assert set(companion_files(wanted | unwanted)) == wanted


def test_companions_of_sentence_transformers_include_module_configs() -> None:
    names = ["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json",
             "2_Dense/config.json", "2_Dense/model.safetensors", "onnx/config.json", "config.json"]  # fmt: skip
    left_behind = {"2_Dense/model.safetensors", "onnx/config.json", "config.json"}
    assert companion_files(names) == tuple(sorted(set(names) - left_behind))


@pytest.mark.parametrize(
    "config,files",
    [
        ({}, ()),
        ({"auto_map": {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.X"}},
         ("configuration_x.py", "modeling_x.py")),
        ({"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}, ("tokenization_x.py",)),
        ({"auto_map": ["tokenization_x.X", None]}, ("tokenization_x.py",)),
        ({"auto_map": {"AutoConfig": "owner/repo--configuration_x.X"}}, ()),
        ({"auto_map": {"AutoConfig": "../evil.X", "AutoModel": "/etc/x.X", "A": 5, "B": "plain"}}, ()),
        ({"auto_map": None, "custom_pipelines": {"p": {"impl": "pipeline_x.P"}}}, ("pipeline_x.py",)),
    ],
)  # fmt: skip
def test_auto_map_names_the_code_that_goes_along(config: dict[str, Any], files: tuple[str, ...]) -> None:
    assert auto_map_files(config) == files


def test_relative_imports_are_found_and_nothing_runs() -> None:
    source = "import os\nfrom .a import b\ndef f():\n    from . import c, d\nfrom ..up import e\nraise SystemExit\n"
    assert relative_imports(source) == ("a.py", "c.py", "d.py")
    assert relative_imports("def (") == ()
