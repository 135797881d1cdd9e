"""Names of places: what a user writes to point at an adapter, a model or an output.

    org/name · org/name@revision          a repository of the Hub
    hf://org/name@revision/subfolder      the same, beyond doubt
    s3://bucket/prefix                    an object store
    ./x · ../x · /x · ~/x · any path that exists        a folder or file here
    memory://name                         tests
    merge://name                          what another document of the same file makes

An existing path wins over a repository of the same name. A revision may hold slashes (`refs/pr/3`, `feature/x`) in the
plain form; in an `hf://` URI only `refs/pr/N` and `refs/convert/NAME` may, and any other slash is written `%2F`, which
is the convention of huggingface_hub's own file system. Credentials never stand in a reference, and an error about one
never repeats its text. Nothing is opened or fetched here, but `exists` is asked of the local disk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, NoReturn
from urllib.parse import quote, unquote

from merger.errors import ManifestError, nearest

ReferenceKind = Literal["hub", "s3", "local", "memory", "merge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """One place. `str(reference)` is its canonical text, which parses back to an equal value anywhere."""

    kind: ReferenceKind
    root: str
    """`org/name` of a repository; the bucket; the absolute path; the name of a memory store or of a document."""
    revision: str | None = None
    """Branch, tag or commit of a repository; None is its default branch."""
    subfolder: str = ""
    """Folder inside the repository, or the prefix inside the bucket; no slash at either end."""

    def child(self, name: str) -> Reference:
        """The place `name` (relative, `/`-separated) below this one."""
        if self.kind in ("hub", "s3"):
            return replace(self, subfolder=f"{self.subfolder}/{name}" if self.subfolder else name)
        return replace(self, root=f"{self.root.rstrip('/')}/{name}")

    def __str__(self) -> str:
        tail = f"/{self.subfolder}" if self.subfolder else ""
        if self.kind == "hub":
            revision = ""
            if self.revision is not None:
                revision = "@" + (self.revision if _SPECIAL_REF.fullmatch(self.revision) else quote(self.revision, ""))
            return f"hf://{self.root}{revision}{tail}"
        if self.kind == "s3":
            return f"s3://{self.root}{tail}"
        return f"{self.kind}://{self.root}" if self.kind in ("memory", "merge") else self.root


@dataclass(frozen=True, slots=True)
class ModelReference:
    """mergekit's model: a place, and the adapters that are folded onto it in this order."""

    model: Reference
    adapters: tuple[Reference, ...] = ()

    def __str__(self) -> str:
        return "+".join(str(part) for part in (self.model, *self.adapters))

    def as_plain(self) -> str | dict[str, object]:
        """What a manifest holds: the text, or the object form where a `+` in a path would be read as a separator."""
        parts = [str(part) for part in (self.model, *self.adapters)]
        if not any("+" in part for part in parts):
            return "+".join(parts)
        plain: dict[str, object] = {"model": {"path": parts[0]}}
        if self.adapters:
            plain["lora"] = [{"path": part} for part in parts[1:]]
        return plain


_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9.-]*)://")
_PART: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?"
_REPOSITORY: Final = re.compile(rf"{_PART}/{_PART}")
_REVISION: Final = re.compile(r"[A-Za-z0-9._/+-]+")
_SPECIAL_REF: Final = re.compile(r"refs/(?:pr/[0-9]+|convert/[A-Za-z0-9._-]+)")
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_HUB_URI: Final = re.compile(
    r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr/[0-9]+|convert/[^/]+)(?=/|$)|[^/]*))?(?:/(?P<sub>.*))?"
)
_SECRET: Final = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|X-Amz-|AWSAccessKeyId=|[?&](?:token|signature)=",
    re.IGNORECASE,
)


def holds_secret(text: str) -> bool:
    """Whether a text looks as if it held a token, an access key or a signed URL."""
    return _SECRET.search(text) is not None


_FORMS: Final = "org/name, org/name@revision, hf://org/name@revision/subfolder, s3://bucket/prefix or a local path"
_SCHEMES: Final = ("hf", "s3", "memory", "merge", "file")


def parse_reference(text: str, *, cwd: str | Path | None = None, bare: Literal["hub", "local"] = "hub") -> Reference:
    """Read a reference. `cwd` is where relative paths start (default: the working directory).

    `bare` says what `a/b` means when no such path exists: a repository (sources), or a path (outputs, where a merge
    must never be pushed to the Hub because a folder was not there yet).
    Raises ManifestError(code `bad-reference`).
    """
    _refuse_hostile(text)
    if found := _SCHEME.match(text):
        scheme, rest = found[1].lower(), text[found.end() :]
        if scheme in ("http", "https") and rest.startswith(("huggingface.co/", "hf.co/")):
            _refuse(text, "a web page is not a reference", f"write {'/'.join(rest.split('/')[1:3])}")
        if scheme not in _SCHEMES:
            near = nearest(scheme, _SCHEMES)
            _refuse(text, f"{scheme}:// is not a place raymerge knows", f"did you mean {near}://?" if near else "")
        if scheme == "hf":
            return _parse_hub(text, rest)
        if scheme == "s3":
            return _parse_s3(text, rest)
        if scheme in ("memory", "merge"):
            if not rest:
                _refuse(text, "it has no name", f"write {scheme}://NAME")
            return Reference(kind="memory" if scheme == "memory" else "merge", root=rest.rstrip("/"))
        if not rest.startswith("/"):
            _refuse(text, "a file:// URI holds an absolute path and no host", "write file:///PATH, or the path itself")
        return _local(unquote(rest), cwd)
    if bare == "local" or _looks_local(text) or _exists(text, cwd):
        return _local(text, cwd)
    repo, at, revision = text.partition("@")
    if not _is_repository(repo):
        why = "no such path exists, and a repository of the Hub is written org/name"
        _refuse(text, why, f"write {_FORMS}; a path that does not exist yet starts with ./ or /")
    return _hub(text, repo, revision if at else None, "")


def parse_model_reference(value: object, *, cwd: str | Path | None = None) -> ModelReference:
    """Read `model[@revision][+adapter[@revision]…]`, or mergekit's object form, in which a path may hold any sign.

    Raises ManifestError(code `bad-reference`).
    """
    if isinstance(value, ModelReference):
        return value
    if isinstance(value, Mapping):
        return _parse_object(value, cwd)
    if not isinstance(value, str):
        _refuse(None, f"a model is text or a mapping, not {type(value).__name__}", "quote it if it looks like a number")
    for part in value.split("+"):
        _refuse_secrets(part)
    if not _SCHEME.match(value) and _exists(value, cwd):
        return ModelReference(_local(value, cwd))
    model, *adapters = value.split("+")
    if adapters and not all((model, *adapters)):
        _refuse(value, "nothing stands beside a +", "write MODEL+ADAPTER, or the form {model: {path: …}, lora: {…}}")
    try:
        return ModelReference(
            parse_reference(model, cwd=cwd), tuple(parse_reference(adapter, cwd=cwd) for adapter in adapters)
        )
    except ManifestError as error:
        if not adapters:
            raise
        raise ManifestError(
            [replace(p, fix=p.fix or "a path that holds a + is written {model: {path: …}}") for p in error.problems]
        ) from None


def _parse_object(value: Mapping[object, object], cwd: str | Path | None) -> ModelReference:
    known = ("model", "lora", "override_architecture")
    for key in value:
        if key not in known:
            near = nearest(str(key), known)
            _refuse(None, f"{key!r} is no key of a model reference", f"did you mean {near}?" if near else "")
    lora = value.get("lora")
    adapters = lora if isinstance(lora, list | tuple) else [] if lora is None else [lora]
    return ModelReference(_parse_pathlike(value.get("model"), cwd), tuple(_parse_pathlike(a, cwd) for a in adapters))


def _parse_pathlike(value: object, cwd: str | Path | None) -> Reference:
    """`{path, revision}`, or a plain reference."""
    if isinstance(value, str):
        return parse_reference(value, cwd=cwd)
    if not isinstance(value, Mapping) or not isinstance(value.get("path"), str) or set(value) - {"path", "revision"}:
        _refuse(None, "the object form of a model is {model: {path, revision}, lora: {path, revision}}", "")
    reference, revision = parse_reference(value["path"], cwd=cwd), value.get("revision")
    if revision is None:
        return reference
    if not isinstance(revision, str):
        _refuse(None, f"a revision is text, not {revision!r}", "quote it")
    if reference.kind != "hub":
        _refuse(value["path"], "only a repository of the Hub has revisions", "drop the revision")
    if reference.revision is not None:
        _refuse(value["path"], "two revisions are given", "keep one of path@revision and revision")
    return _hub(value["path"], reference.root, revision, reference.subfolder)


def _parse_hub(text: str, rest: str) -> Reference:
    if rest.startswith(("datasets/", "spaces/", "buckets/")):
        _refuse(text, "only model repositories hold adapters and models", "write hf://org/name")
    found = _HUB_URI.fullmatch(rest)
    if not found:
        _refuse(text, "it does not name a repository", "write hf://org/name@revision/subfolder")
    revision = found["revision"]
    return _hub(text, found["repo"], unquote(revision) if revision is not None else None, found["sub"] or "")


def _hub(text: str, repo: str, revision: str | None, subfolder: str) -> Reference:
    if not _is_repository(repo):
        _refuse(text, f"{repo!r} cannot be the name of a repository", "a repository is written org/name")
    if revision is not None and (
        not _REVISION.fullmatch(revision) or ".." in revision or revision.strip("/") != revision
    ):
        _refuse(text, "the revision is empty or has signs no branch, tag or commit has", "write org/name@REVISION")
    return Reference(kind="hub", root=repo, revision=revision, subfolder=_clean(text, subfolder))


def _parse_s3(text: str, rest: str) -> Reference:
    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        _refuse(text, f"{bucket!r} cannot be the name of a bucket", "write s3://bucket/prefix")
    if "?" in prefix:
        _refuse(text, "a reference has no query", "give endpoints and credentials in the environment (AWS_*)")
    return Reference(kind="s3", root=bucket, subfolder=_clean(text, prefix))


def _clean(text: str, path: str) -> str:
    path = path.rstrip("/")
    if path and any(part in ("", ".", "..") for part in path.split("/")):
        _refuse(text, "a part of its path is empty, . or ..", "write the path out")
    return path


def _local(text: str, cwd: str | Path | None) -> Reference:
    path = os.path.normpath(os.path.join(cwd or os.getcwd(), os.path.expanduser(text)))
    return Reference(kind="local", root=path if path[:2] != "//" else path[1:])


def _looks_local(text: str) -> bool:
    return text in (".", "..", "~") or text.startswith(("/", "./", "../", "~/"))


def _exists(text: str, cwd: str | Path | None) -> bool:
    try:
        return os.path.exists(os.path.join(cwd or os.getcwd(), text))
    except (OSError, ValueError):
        return False


def _is_repository(name: str) -> bool:
    return bool(_REPOSITORY.fullmatch(name)) and "--" not in name and ".." not in name


def _refuse_hostile(text: str) -> None:
    _refuse_secrets(text)
    if not text or text != text.strip() or not text.isprintable():
        _refuse(text, "it is empty, or has spaces around it or control characters in it", f"write {_FORMS}")


def _refuse_secrets(text: str) -> None:
    authority = text.split("://", 1)[1].split("/", 1)[0] if "://" in text else ""
    if holds_secret(text) or "@" in authority or ":" in authority:
        raise ManifestError.of(
            "bad-reference",
            "a reference holds what looks like credentials or a host (its text is withheld)",
            why="manifests are copied into outputs, reports and job metadata",
            fix="give them in the environment: HF_TOKEN, HF_ENDPOINT, AWS_* and AWS_ENDPOINT_URL",
        )


def _refuse(text: str | None, why: str, fix: str) -> NoReturn:
    what = "this is no reference" if text is None else f"{text!r} is no reference"
    raise ManifestError.of("bad-reference", what, why=why, fix=fix)
