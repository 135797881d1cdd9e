"""References: what a user writes, what it means, and that the canonical text means the same anywhere."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.errors import ManifestError
from merger.manifest import ModelReference, Reference, parse_model_reference, parse_reference


def hub(root: str, revision: str | None = None, subfolder: str = "") -> Reference:
    return Reference(kind="hub", root=root, revision=revision, subfolder=subfolder)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("org/name", hub("org/name")),
        ("org/name@main", hub("org/name", "main")),
        ("org/name@feature/x", hub("org/name", "feature/x")),
        ("org/name@refs/pr/3", hub("org/name", "refs/pr/3")),
        ("hf://org/name", hub("org/name")),
        ("hf://org/name@v1.0/sub/folder/", hub("org/name", "v1.0", "sub/folder")),
        ("hf://org/name/sub", hub("org/name", None, "sub")),
        ("hf://org/name@refs/pr/3/sub", hub("org/name", "refs/pr/3", "sub")),
        ("hf://org/name@feature%2Fx/sub", hub("org/name", "feature/x", "sub")),
        ("s3://bucket/a/b/", Reference(kind="s3", root="bucket", subfolder="a/b")),
        ("s3://bucket", Reference(kind="s3", root="bucket")),
        ("memory://x", Reference(kind="memory", root="x")),
        ("/abs/x@y", Reference(kind="local", root="/abs/x@y")),
        ("/abs/../x/", Reference(kind="local", root="/x")),
        ("./x", Reference(kind="local", root="/home/x")),
        ("../x", Reference(kind="local", root="/x")),
        ("file:///a%20b", Reference(kind="local", root="/a b")),
    ],
)
def test_forms(text: Any, expected: Any) -> None:
    assert parse_reference(text, cwd="/home") == expected


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_reference("~/x").root == "/home/me/x"


def test_existing_path_wins_over_a_repository(tmp_path: Path) -> None:
    assert parse_reference("org/name", cwd=tmp_path).kind == "hub"
    (tmp_path / "org" / "name").mkdir(parents=True)
    found = parse_reference("org/name", cwd=tmp_path)
    assert found == Reference(kind="local", root=str(tmp_path / "org" / "name"))
    assert parse_reference("hf://org/name", cwd=tmp_path).kind == "hub"


def test_outputs_are_local_unless_they_say_otherwise() -> None:
    assert parse_reference("out/merged", cwd="/w", bare="local") == Reference(kind="local", root="/w/out/merged")
    assert parse_reference("hf://org/name", bare="local").kind == "hub"


@pytest.mark.parametrize(
    "text",
    ["", " a/b", "a/b\n", "name", "a/b/c", "a/b@", "hf://org", "hf://datasets/a/b", "hf://a/b@x y", "s3://B/x", "s3://",
     "s3://bucket/../x", "s3://bucket/a//b", "ftp://a/b", "memory://", "https://huggingface.co/a/b", "a--b/c",
     "file://host/x"],
)  # fmt: skip
def test_refused(text: Any) -> None:
    with pytest.raises(ManifestError) as caught:
        parse_reference(text)
    assert caught.value.problems[0].code == "bad-reference"


@pytest.mark.parametrize(
    "text",
    ["s3://key:sEcReT@bucket/x", "https://me:sEcReT@huggingface.co/a/b", "hf://sEcReT@a/b", "s3://host:9000/sEcReT",
     "s3://bucket/x?X-Amz-Signature=sEcReT", "a/b@hf_sEcReTsEcReTsEcReTsEcReT"],
)  # fmt: skip
def test_credentials_are_refused_and_never_repeated(text: Any) -> None:
    with pytest.raises(ManifestError) as caught:
        parse_reference(text)
    assert "sEcReT" not in str(caught.value)
    assert "credentials" in str(caught.value)


def test_web_page_hint() -> None:
    with pytest.raises(ManifestError, match="write a/b"):
        parse_reference("https://huggingface.co/a/b/tree/main")


_word = st.text("abcXYZ019", min_size=1, max_size=8)
_path = st.lists(_word, max_size=3).map("/".join)
_references = st.one_of(
    st.builds(lambda o, n, r, s: hub(f"{o}/{n}", r, s), _word, _word, st.none() | _path.filter(bool), _path),
    st.builds(lambda b, s: Reference(kind="s3", root=b.lower() + "123", subfolder=s), _word, _path),
    st.builds(lambda p: Reference(kind="local", root="/" + p), st.lists(_word, min_size=1).map("/".join)),
    st.builds(lambda n: Reference(kind="memory", root=n), _word),
)


@given(_references)
def test_canonical_text_parses_back(reference: Any) -> None:
    assert parse_reference(str(reference)) == reference
    assert pickle.loads(pickle.dumps(reference)) == reference


@given(st.builds(ModelReference, _references, st.lists(_references, max_size=2).map(tuple)))
def test_model_reference_parses_back(reference: Any) -> None:
    assert parse_model_reference(reference.as_plain()) == reference


def test_model_with_adapter() -> None:
    found = parse_model_reference("a/b@r1+c/d@r2")
    assert found == ModelReference(hub("a/b", "r1"), (hub("c/d", "r2"),))


def test_object_form() -> None:
    plain = {"model": {"path": "a/b", "revision": "r"}, "lora": {"path": "c/d"}}
    assert parse_model_reference(plain) == ModelReference(hub("a/b", "r"), (hub("c/d"),))


def test_existing_path_with_plus_wins(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    found = parse_model_reference("a+b", cwd=tmp_path)
    assert found == ModelReference(Reference(kind="local", root=str(tmp_path / "a+b")))
    os.rmdir(tmp_path / "a+b")
    assert parse_model_reference(found.as_plain()) == found, "also where the folder is not"


@pytest.mark.parametrize(
    "value",
    [3, "a/b+", "+a/b", {"model": {"path": "a/b", "revison": "x"}}, {"model": {"path": "a/b@x", "revision": "y"}},
     {"model": {"path": "s3://bucket", "revision": "y"}}, {"lora": "a/b"}, {"model": "a/b", "loar": "c/d"}],
)  # fmt: skip
def test_model_refused(value: Any) -> None:
    with pytest.raises(ManifestError):
        parse_model_reference(value)


def test_children() -> None:
    assert str(parse_reference("s3://bucket/a").child("b")) == "s3://bucket/a/b"
    assert str(parse_reference("/a").child("b/c")) == "/a/b/c"
    assert str(parse_reference("a/b").child("c")) == "hf://a/b/c"
