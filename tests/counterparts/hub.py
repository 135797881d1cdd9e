"""A Hugging Face Hub of our own, on this machine, that the real huggingface_hub reads from and publishes to.

From a checkout, for trials:

    python -m tests.counterparts.hub --root /tmp/hub --port 8901 --publish org/name=FOLDER

prints one JSON line with the endpoints and the tokens when it is ready, and keeps its repositories in the folder. Put
`HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_DISABLE_XET=1` in the environment of whatever shall use it.

In tests:

    with HubServer.start(tmp_path / "hub") as hub:
        sha = hub.create("org/name", {"config.json": b"{}", "model.safetensors": data})
        subprocess.run([…], env={**os.environ, **hub.environment()})
        assert [r.path for r in hub.log() if r.origin == "cdn"] == […]

Three origins (ports of one process). The *API* answers as the Hub does: metadata, small files in place, LFS files by a
redirect to a signed URL. The *CDN* gives and takes their bytes and wants no token; it writes down who sent one. The
*control* port is the test's own: it makes commits from outside, ages URLs, revokes tokens and hands out the log.

What it leaves out: pull requests, discussions, data sets and spaces, search, and gzip.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias, cast
from urllib.parse import quote, urlencode

import yaml
from aiohttp import web

from tests.counterparts.hub_store import (
    LARGE_BYTES,
    Blob,
    Commit,
    HubFile,
    HubStore,
    Refusal,
    Repository,
    decode_cursor,
    describe_path,
    encode_cursor,
    folders_of,
    list_tree,
    tracked_by_lfs,
)

ROOT: Final = Path(__file__).parents[2]
HOST: Final = "127.0.0.1"
_SEND_BYTES: Final = 8 << 20
"""Handed to the kernel at a time: how finely `bytes_sent` counts an answer that its reader left."""
_REPO: Final = r"{org:[\w.-]+}/{name:[\w.-]+}"

Origin: TypeAlias = Literal["api", "cdn"]
Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


# ---- what it is told, and what it tells ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """What a bearer of the token may do."""

    user: str
    writes: bool
    member: bool
    """Sees private repositories, and has been let through every gate."""


@dataclass(slots=True, kw_only=True)
class Settings:
    """What `HubServer.set` changes while the Hub runs."""

    cdn_ttl_seconds: float = 3600.0
    """How long a signed download URL is good, from now on; 0 makes every new one useless."""
    cdn_endpoint: str | None = None
    """The second origin that redirects name, where something stands before it."""
    cdn_refuses: list[str] = field(default_factory=list)
    """SHA-256 of files that the CDN answers with 400: a client must take them over xet."""
    rate_limit_next: int = 0
    """How many of the next resolves are answered with 429."""
    retry_after: int = 1
    """Seconds that such an answer asks for."""
    lose_next_commit_answer: bool = False
    """Make the next commit and drop the connection instead of answering."""
    redirect_small_files: bool = False
    """Send readers of small files on by a relative redirect on the same origin, as the real Hub does by now."""
    tree_page_entries: int = 1000
    multipart_from_bytes: int = 64 << 20
    """LFS objects from this size on are uploaded in parts."""
    part_bytes: int = 16 << 20
    xet_cas: str | None = None
    """The content store that xet tokens name, e.g. local:///folder; None: a Hub without xet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedRequest:
    """One request as the Hub saw it, and its answer."""

    origin: Origin
    method: str
    path: str
    """Decoded, without the query: a signature never gets into a log."""
    range: str | None
    authorization: bool
    """Whether an Authorization header came with it."""
    status: int
    """0 while there is no answer, or when it was dropped on purpose."""
    bytes_sent: int
    """Of the body."""
    bytes_received: int
    """Of an upload's body."""


@dataclass(slots=True)
class _Exchange:
    """A LoggedRequest in the making."""

    origin: Origin
    method: str
    path: str
    range: str | None
    authorization: bool
    status: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


_EXCHANGE: Final = web.RequestKey("exchange", _Exchange)


def requested_span(header: str | None, size: int) -> tuple[int, int] | None:
    """The [start, end) that a Range header asks of `size` bytes; None is the whole file.

    Several ranges, or none that can be understood, are answered with the whole file, which RFC 9110 allows. Raises
    Refusal (416) when nothing of the range exists.
    """
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", (header or "").replace(" ", ""))
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1 if last else size)
        if last and int(last) < start:
            return None
    if start >= end:
        raise Refusal(416, None, "nothing of the range exists", **{"Content-Range": f"bytes */{size}"})
    return start, end


def card_metadata(text: str) -> dict[str, Any] | None:
    """The YAML at the head of a model card; None when there is none. Raises yaml.YAMLError."""
    found = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|\Z)", text, re.DOTALL)
    loaded = yaml.safe_load(found.group(1)) if found else None
    return loaded if isinstance(loaded, dict) else None


# ---- the server ------------------------------------------------------------------------------------------------------


class Hub:
    """The three origins over one store. Everything but copying and hashing runs in the event loop."""

    def __init__(self, store: HubStore, tokens: Mapping[str, Token]) -> None:
        self.store = store
        self.tokens = dict(tokens)
        self.settings = Settings()
        self.xet_hashes: dict[str, str] = {}
        """SHA-256 to xet hash: what a commit on the wire does not say."""
        self.cdn_endpoint = ""
        self.failures = 0
        self._key = secrets.token_bytes(32)
        self._generation = 0
        """Download URLs of an older one are refused as expired."""
        self._log: list[_Exchange] = []
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()

    # ---- every request

    def app(self, origin: Origin) -> web.Application:
        @web.middleware
        async def recorded(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._recorded(origin, request, handler)

        app = web.Application(middlewares=[recorded], client_max_size=1 << 30)
        app.add_routes(self._api_routes() if origin == "api" else self._cdn_routes())
        return app

    async def _recorded(self, origin: Origin, request: web.Request, handler: Handler) -> web.StreamResponse:
        exchange = _Exchange(
            origin, request.method, request.path, request.headers.get("Range"), "Authorization" in request.headers
        )
        request[_EXCHANGE] = exchange
        self._log.append(exchange)
        self._under_way += 1
        self._idle.clear()
        response: web.StreamResponse = web.Response()
        try:
            response = await self._answer(request, handler)
            # Here and not by the caller: what follows in the log has then seen this answer go out.
            await response.prepare(request)
            exchange.status = response.status
            await response.write_eof()
            if isinstance(response, web.Response) and request.method != "HEAD":
                exchange.bytes_sent = response.body_length
        except ConnectionError:
            pass  # the reader left, or was left on purpose
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()
        return response

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Refusal as refusal:
            return _refused(refusal)
        except web.HTTPException as error:  # no such route, mostly
            return _refused(Refusal(error.status, None, f"{error.reason}: {request.method} {request.path}"))
        except ConnectionError:
            raise
        except Exception:  # noqa: BLE001  (a fault of this Hub: the client must get an answer, and the test hear of it)
            self.failures += 1
            traceback.print_exc()
            return _refused(Refusal(500, None, "the Hub of the tests failed: see its standard error"))

    def _bearer(self, request: web.Request) -> Token | None:
        header = request.headers.get("Authorization")
        if header is None:
            return None
        found = self.tokens.get(header.removeprefix("Bearer ").strip())
        if found is None:
            # The client tells a bad token from a missing repository by these words.
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        return found

    def _repository(self, request: web.Request, *, content: bool = False, write: bool = False) -> Repository:
        """The repository that the path names, if the bearer may see it, read its content, or write to it."""
        bearer = self._bearer(request)
        repo_id = f"{request.match_info['org']}/{request.match_info['name']}"
        found = self.store.find(repo_id)
        member = bearer is not None and bearer.member
        if found is None or (found.private and not member):
            raise Refusal(404 if bearer else 401, "RepoNotFound", f"there is no repository {repo_id}, or it is private")
        if content and found.gated and not member:
            why = f"access to model {repo_id} is restricted: its conditions must be accepted first"
            raise Refusal(403 if bearer else 401, "GatedRepo", why)
        if write:
            self._check_may_write(bearer)
        return found

    @staticmethod
    def _check_may_write(bearer: Token | None) -> None:
        if bearer is None:
            raise Refusal(401, None, "a token is needed to write")
        if not bearer.writes:
            raise Refusal(403, None, "this token may read but not write")

    # ---- API

    def _api_routes(self) -> list[web.RouteDef]:
        model = f"/api/models/{_REPO}"
        return [
            web.get("/api/whoami-v2", self._whoami),
            web.post("/api/validate-yaml", self._validate_card),
            web.post("/api/repos/create", self._create_repository),
            web.delete("/api/repos/delete", self._delete_repository),
            web.get(model, self._model_info),
            web.get(f"{model}/revision/{{revision}}", self._model_info),
            web.get(f"{model}/tree/{{revision}}", self._tree),
            web.get(f"{model}/tree/{{revision}}/{{path:.+}}", self._tree),
            web.post(f"{model}/paths-info/{{revision}}", self._paths_info),
            web.get(f"{model}/refs", self._refs),
            web.get(f"{model}/commits/{{revision}}", self._commits),
            web.post(f"{model}/branch/{{branch}}", self._create_branch),
            web.delete(f"{model}/branch/{{branch}}", self._delete_branch),
            web.post(f"{model}/tag/{{revision}}", self._create_tag),
            web.delete(f"{model}/tag/{{tag}}", self._delete_tag),
            web.post(f"{model}/preupload/{{revision}}", self._preupload),
            web.post(f"{model}/commit/{{revision}}", self._commit),
            web.get(f"{model}/xet-{{right:read|write}}-token/{{revision}}", self._xet_token),
            web.post(f"/{_REPO}.git/info/lfs/objects/batch", self._lfs_batch),
            web.post(f"/{_REPO}.git/info/lfs/objects/verify", self._lfs_verify),
            web.post("/api/complete-upload/{org}/{name}/{oid}/{upload}", self._complete_upload),
            web.get(f"/{_REPO}/resolve/{{revision}}/{{path:.+}}", self._resolve),
            web.get(f"/api/resolve-cache/models/{_REPO}/{{revision}}/{{path:.+}}", self._resolve_cached),
        ]

    async def _whoami(self, request: web.Request) -> web.StreamResponse:
        bearer = self._bearer(request)
        if bearer is None:
            raise Refusal(401, None, "a token is needed to say who you are")
        role = "write" if bearer.writes else "read"
        return web.json_response(
            {
                "type": "user",
                "id": hashlib.sha1(bearer.user.encode()).hexdigest()[:24],
                "name": bearer.user,
                "fullname": bearer.user,
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": {"displayName": bearer.user, "role": role}},
            }
        )

    async def _validate_card(self, request: web.Request) -> web.StreamResponse:
        content = (await request.json())["content"]
        try:
            metadata = card_metadata(content)
        except yaml.YAMLError:
            errors = [{"message": "the metadata at the head of the card is not YAML"}]
            return web.json_response({"errors": errors, "warnings": []}, status=400)
        warnings = [] if metadata else [{"message": "empty or missing YAML metadata in the card"}]
        return web.json_response({"errors": [], "warnings": warnings})

    async def _create_repository(self, request: web.Request) -> web.StreamResponse:
        bearer = self._bearer(request)
        self._check_may_write(bearer)
        asked = await request.json()
        if asked.get("type", "model") != "model":
            raise Refusal(400, None, "this Hub keeps models alone")
        repo_id = f"{asked.get('organization') or cast('Token', bearer).user}/{asked['name']}"
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        address = {"url": f"{_address(request)}/{repo_id}", "name": repo_id}
        if self.store.find(repo_id) is not None:
            return web.json_response({"error": f"{repo_id} exists already", **address}, status=409)
        self.store.create(repo_id, private=private)
        return web.json_response(address)

    async def _delete_repository(self, request: web.Request) -> web.StreamResponse:
        bearer = self._bearer(request)
        self._check_may_write(bearer)
        asked = await request.json()
        repo_id = f"{asked.get('organization') or cast('Token', bearer).user}/{asked['name']}"
        if self.store.find(repo_id) is None:
            raise Refusal(404, "RepoNotFound", f"there is no repository {repo_id}")
        self.store.delete(repo_id)
        return web.json_response({})

    async def _model_info(self, request: web.Request) -> web.StreamResponse:
        repository = self._repository(request)
        commit = repository.commit(request.match_info.get("revision", "main"))
        card = commit.files.get("README.md")
        metadata: dict[str, Any] | None = None
        if card is not None and not card.is_lfs:
            with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError):
                metadata = card_metadata(self.store.read(card).decode())
        blobs = request.query.get("blobs", "").lower() == "true"
        first = min(repository.commits.values(), key=lambda made: made.time_ns)
        told: dict[str, Any] = {
            "author": repository.repo_id.split("/")[0],
            "sha": commit.sha,
            "createdAt": first.date,
            "lastModified": commit.date,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": list((metadata or {}).get("tags") or []),
            "siblings": [_sibling(name, file, blobs=blobs) for name, file in sorted(commit.files.items())],
            "usedStorage": sum(file.size for file in commit.files.values()),
            **({} if metadata is None else {"cardData": metadata}),
        }
        if wanted := request.query.getall("expand", []):
            told = {key: value for key, value in told.items() if key in wanted}
        return web.json_response(
            {"_id": first.sha[:24], "id": repository.repo_id, "modelId": repository.repo_id} | told
        )

    async def _tree(self, request: web.Request) -> web.StreamResponse:
        commit = self._repository(request).commit(request.match_info["revision"])
        expand, recursive = (request.query.get(word, "").lower() == "true" for word in ("expand", "recursive"))
        paths = list_tree(commit, request.match_info.get("path", "").strip("/"), recursive=recursive)
        after = decode_cursor(request.query["cursor"]) if "cursor" in request.query else ""
        paths = [path for path in paths if path > after]
        page, rest = paths[: self.settings.tree_page_entries], paths[self.settings.tree_page_entries :]
        headers = {}
        if rest:
            following = urlencode({**request.query, "cursor": encode_cursor(page[-1])})
            headers["Link"] = f'<{_address(request)}{request.rel_url.raw_path}?{following}>; rel="next"'
        told = [describe_path(commit, path, self.xet_hashes, expand=expand) for path in page]
        return web.json_response(told, headers=headers)

    async def _paths_info(self, request: web.Request) -> web.StreamResponse:
        commit = self._repository(request).commit(request.match_info["revision"])
        form = await request.post()
        expand = str(form.get("expand", "")).lower() == "true"
        there = {*commit.files, *folders_of(commit.files)}
        paths = [path for path in map(str, form.getall("paths", [])) if path in there]
        return web.json_response([describe_path(commit, path, self.xet_hashes, expand=expand) for path in paths])

    async def _refs(self, request: web.Request) -> web.StreamResponse:
        repository = self._repository(request)

        def told(kind: str, refs: Mapping[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in refs.items()]

        branches, tags = told("heads", repository.branches), told("tags", repository.tags)
        return web.json_response({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    async def _commits(self, request: web.Request) -> web.StreamResponse:
        history = self._repository(request).history(request.match_info["revision"])
        return web.json_response(
            [{"id": c.sha, "date": c.date, "title": c.title, "message": c.message, "authors": []} for c in history]
        )

    async def _create_branch(self, request: web.Request) -> web.StreamResponse:
        repository = self._repository(request, write=True)
        branch = request.match_info["branch"]
        asked = await request.json() if request.can_read_body else {}
        commit = repository.commit(asked.get("startingPoint", "main"))
        if branch in repository.branches or branch in repository.tags:
            raise Refusal(409, None, f"reference {branch} exists already")
        self._point(repository, repository.branches, branch, commit.sha)
        return web.json_response({})

    async def _delete_branch(self, request: web.Request) -> web.StreamResponse:
        repository = self._repository(request, write=True)
        self._point(repository, repository.branches, request.match_info["branch"], None)
        return web.json_response({})

    async def _create_tag(self, request: web.Request) -> web.StreamResponse:
        repository = self._repository(request, write=True)
        tag = (await request.json())["tag"]
        commit = repository.commit(request.match_info["revision"])
        if tag in repository.tags or tag in repository.branches:
            raise Refusal(409, None, f"reference {tag} exists already")
        self._point(repository, repository.tags, tag, commit.sha)
        return web.json_response({})

    async def _delete_tag(self, request: web.Request) -> web.StreamResponse:
        repository = self._repository(request, write=True)
        self._point(repository, repository.tags, request.match_info["tag"], None)
        return web.json_response({})

    def _point(self, repository: Repository, refs: dict[str, str], name: str, sha: str | None) -> None:
        """Make a branch or a tag name a commit, or none."""
        if sha is not None:
            refs[name] = sha
        elif refs.pop(name, None) is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {name}")
        self.store.save(repository)

    async def _xet_token(self, request: web.Request) -> web.StreamResponse:
        if self.settings.xet_cas is None:
            raise Refusal(404, None, "this Hub has no xet store: set xet_cas")
        self._repository(request, content=True, write=request.match_info["right"] == "write")
        token, expires = secrets.token_hex(16), int(time.time()) + 3600
        return web.json_response(
            {"accessToken": token, "exp": expires, "casUrl": self.settings.xet_cas},
            headers={
                "X-Xet-Cas-Url": self.settings.xet_cas,
                "X-Xet-Access-Token": token,
                "X-Xet-Token-Expiration": str(expires),
            },
        )

    # ---- files

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        self._check_rate()
        repository = self._repository(request, content=True)
        commit = repository.commit(request.match_info["revision"])
        path = request.match_info["path"]
        file = repository.file(commit, path)
        headers = {"X-Repo-Commit": commit.sha, "Content-Disposition": _disposition(path)}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size), "Accept-Ranges": "bytes"}
            if file.sha256 in self.xet_hashes:
                route = f"{_address(request)}/api/models/{repository.repo_id}/xet-read-token/{commit.sha}"
                headers |= {"X-Xet-Hash": self.xet_hashes[file.sha256], "Link": f'<{route}>; rel="xet-auth"'}
            location = self._sign_download(f"/{repository.repo_id}/{file.sha256}/{path}")
            return web.Response(status=302, headers={**headers, "Location": location}, text="redirected to the CDN")
        if self.settings.redirect_small_files:
            location = f"/api/resolve-cache/models/{repository.repo_id}/{commit.sha}/{quote(path)}"
            linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size), "Location": location}
            return web.Response(status=307, headers={**headers, **linked}, text="redirected to the cache")
        return await self._send(request, file, headers)

    async def _resolve_cached(self, request: web.Request) -> web.StreamResponse:
        repository = self._repository(request, content=True)
        commit = repository.commit(request.match_info["revision"])
        path = request.match_info["path"]
        headers = {"X-Repo-Commit": commit.sha, "Content-Disposition": _disposition(path)}
        return await self._send(request, repository.file(commit, path), headers)

    def _check_rate(self) -> None:
        if self.settings.rate_limit_next <= 0:
            return
        self.settings.rate_limit_next -= 1
        wait = self.settings.retry_after
        headers = {
            "Retry-After": str(wait),
            "RateLimit": f'"resolvers";r=0;t={wait}',
            "RateLimit-Policy": '"fixed window";"resolvers";q=5000;w=300',
        }
        raise Refusal(429, None, "too many resolves", **headers)

    async def _send(self, request: web.Request, file: HubFile, headers: Mapping[str, str]) -> web.StreamResponse:
        """The file, or the range of it that was asked for, by the kernel from the page cache."""
        etag = f'"{file.etag}"'
        sent = {**headers, "ETag": etag, "Accept-Ranges": "bytes"}
        if request.headers.get("If-Match", etag) not in {etag, "*"}:
            raise Refusal(412, None, "the file is another by now")
        if request.headers.get("If-None-Match") in {etag, "*"}:
            return web.Response(status=304, headers=sent)
        ranged = request.headers.get("Range") if request.headers.get("If-Range", etag) == etag else None
        span = requested_span(ranged, file.size)
        start, end = span or (0, file.size)
        if span is not None:
            sent["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
        response = web.StreamResponse(status=200 if span is None else 206, headers=sent)
        response.content_type = "application/octet-stream"
        response.content_length = end - start
        exchange = request[_EXCHANGE]
        with self.store.blob_path(file.sha256).open("rb") as content:
            await response.prepare(request)
            exchange.status = response.status
            while request.method != "HEAD" and start < end:
                if request.transport is None or request.transport.is_closing():
                    raise ConnectionResetError
                count = min(end - start, _SEND_BYTES)
                await asyncio.get_running_loop().sendfile(request.transport, content, start, count)
                exchange.bytes_sent += count
                start += count
        return response

    # ---- signed URLs

    def _sign_download(self, path: str) -> str:
        until = f"{time.time() + self.settings.cdn_ttl_seconds:.3f}.{self._generation}"
        base = self.settings.cdn_endpoint or self.cdn_endpoint
        return f"{base}{quote(path)}?Expires={until}&Signature={self._signature('GET', path, until)}"

    def _sign_upload(self, method: str, base: str, path: str) -> str:
        until = f"{time.time() + 3600:.3f}"
        return f"{base}{quote(path)}?Expires={until}&Signature={self._signature(method, path, until)}"

    def _signature(self, method: str, path: str, until: str) -> str:
        return hmac.new(self._key, f"{method}\n{path}\n{until}".encode(), hashlib.sha256).hexdigest()

    def _check_signature(self, request: web.Request, method: str) -> None:
        until = request.query.get("Expires", "")
        made = self._signature(method, request.path, until)
        if not hmac.compare_digest(made, request.query.get("Signature", "")):
            raise Refusal(403, None, "the URL is not signed, or not for this")
        seconds, _, generation = until.rpartition(".") if method == "GET" else (until, "", str(self._generation))
        if float(seconds) <= time.time() or generation != str(self._generation):
            raise Refusal(403, None, "the URL has expired")

    # ---- CDN

    def _cdn_routes(self) -> list[web.RouteDef]:
        return [
            web.get("/{org}/{name}/{oid}/{path:.+}", self._download),
            web.put("/upload/{org}/{name}/{oid}", self._upload),
            web.put("/upload/{org}/{name}/{oid}/{upload}/{part}", self._upload_part),
        ]

    async def _download(self, request: web.Request) -> web.StreamResponse:
        self._check_signature(request, "GET")
        oid = request.match_info["oid"]
        if oid in self.settings.cdn_refuses:
            raise Refusal(400, None, "this file is served over xet alone")
        path = self.store.blob_path(oid)
        if not path.exists():
            raise Refusal(404, None, "this file lies in the xet store alone")
        file = HubFile(sha256=oid, size=path.stat().st_size, oid=oid, pointer_bytes=0)
        return await self._send(request, file, {"Content-Disposition": _disposition(request.match_info["path"])})

    async def _receive(self, request: web.Request, path: Path) -> str:
        """Write the body to `path`; its SHA-256."""
        digest, exchange = hashlib.sha256(), request[_EXCHANGE]
        try:
            with path.open("wb") as file:
                async for piece in request.content.iter_chunked(1 << 20):
                    exchange.bytes_received += len(piece)
                    digest.update(piece)
                    file.write(piece)
        except BaseException:
            os.unlink(path)
            raise
        return digest.hexdigest()

    async def _upload(self, request: web.Request) -> web.StreamResponse:
        self._check_signature(request, "PUT")
        path = self.store.new_incoming()
        found = await self._receive(request, path)
        self._keep_upload(request, path, found)
        return web.Response(headers={"ETag": f'"{found}"'})

    async def _upload_part(self, request: web.Request) -> web.StreamResponse:
        self._check_signature(request, "PUT")
        folder = self.store.incoming / request.match_info["upload"]
        folder.mkdir(exist_ok=True)
        path = self.store.new_incoming()
        found = await self._receive(request, path)
        os.replace(path, folder / f"{int(request.match_info['part']):05d}.{found}")
        return web.Response(headers={"ETag": f'"{found}"'})

    async def _complete_upload(self, request: web.Request) -> web.StreamResponse:
        self._check_signature(request, "POST")
        folder = self.store.incoming / request.match_info["upload"]
        asked = await request.json()
        etags = [part["etag"].strip('"') for part in asked["parts"]]
        parts = [folder / f"{number:05d}.{etag}" for number, etag in enumerate(etags, start=1)]
        if [part["partNumber"] for part in asked["parts"]] != list(range(1, len(parts) + 1)):
            raise Refusal(400, None, "parts are missing or out of order")
        if missing := [path.name for path in parts if not path.exists()]:
            raise Refusal(400, None, f"parts that never came: {missing}")
        path = self.store.new_incoming()
        found = await asyncio.to_thread(_join, parts, path)
        self._keep_upload(request, path, found)
        shutil.rmtree(folder)
        return web.json_response({"success": True})

    def _keep_upload(self, request: web.Request, path: Path, found: str) -> None:
        """Make an upload an LFS object, if it is the one that was announced."""
        if found != request.match_info["oid"]:
            path.unlink()
            raise Refusal(400, None, "the content is not what its object id says")
        repository = self.store.find(f"{request.match_info['org']}/{request.match_info['name']}")
        if repository is None:
            path.unlink()
            raise Refusal(404, "RepoNotFound", "the repository is gone")
        self.store.adopt(path, move=True, sha256=found)
        repository.uploaded.add(found)
        self.store.save(repository)

    # ---- publishing

    async def _preupload(self, request: web.Request) -> web.StreamResponse:
        repository = self._repository(request, write=True)
        commit = repository.commit(request.match_info["revision"])
        attributes = self.store.attributes(commit.files)
        told: list[dict[str, Any]] = []
        for asked in (await request.json())["files"]:
            there = commit.files.get(asked["path"])
            mode = "lfs" if tracked_by_lfs(asked["path"], asked["size"], attributes) else "regular"
            oid = None if there is None else there.etag
            told.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return web.json_response({"files": told, "commitOid": commit.sha})

    async def _lfs_batch(self, request: web.Request) -> web.StreamResponse:
        repository = self._repository(request, write=True)
        asked = await request.json()
        if asked.get("operation") != "upload":
            raise Refusal(400, None, "this batch endpoint is for uploads")
        in_parts = "multipart" in asked.get("transfers", ["basic"])
        told = [self._lfs_object(request, repository, wanted, in_parts=in_parts) for wanted in asked["objects"]]
        transfer = "multipart" if any("chunk_size" in _upload_header(wanted) for wanted in told) else "basic"
        return web.json_response({"transfer": transfer, "objects": told}, content_type="application/vnd.git-lfs+json")

    def _lfs_object(
        self, request: web.Request, repository: Repository, wanted: Mapping[str, Any], *, in_parts: bool
    ) -> dict[str, Any]:
        oid, size = str(wanted["oid"]), int(wanted["size"])
        if re.fullmatch(r"[0-9a-f]{64}", oid) is None:
            raise Refusal(400, None, "an object id is a SHA-256")
        told: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
        if oid in repository.uploaded and self.store.blob_path(oid).exists():
            return told
        place, base = f"{repository.repo_id}/{oid}", self.settings.cdn_endpoint or self.cdn_endpoint
        upload: dict[str, Any] = {"href": self._sign_upload("PUT", base, f"/upload/{place}")}
        if in_parts and size >= self.settings.multipart_from_bytes:
            place, step = f"{place}/{uuid.uuid4().hex}", self.settings.part_bytes
            count = -(-size // step)
            parts = {f"{n:05d}": self._sign_upload("PUT", base, f"/upload/{place}/{n}") for n in range(1, count + 1)}
            address = self._sign_upload("POST", _address(request), f"/api/complete-upload/{place}")
            upload = {"href": address, "header": {"chunk_size": str(step), **parts}}
        verify = {"href": f"{_address(request)}/{repository.repo_id}.git/info/lfs/objects/verify"}
        return {**told, "actions": {"upload": upload, "verify": verify}}

    async def _lfs_verify(self, request: web.Request) -> web.StreamResponse:
        repository = self._repository(request, write=True)
        asked = await request.json()
        path = self.store.blob_path(asked["oid"])
        if asked["oid"] not in repository.uploaded or not path.exists() or path.stat().st_size != asked["size"]:
            raise Refusal(404, None, "the object was not uploaded, or with another size")
        return web.json_response({})

    async def _commit(self, request: web.Request) -> web.StreamResponse:
        repository = self._repository(request, write=True)
        branch = request.match_info["revision"]
        lines = [json.loads(line) for line in (await request.read()).splitlines() if line.strip()]
        if not lines or lines[0]["key"] != "header":
            raise Refusal(400, None, "a commit begins with its header")
        header = lines[0]["value"]
        # From here on nothing awaits: commits of several clients come one after the other.
        head = repository.commit(branch)
        if header.get("parentCommit", head.sha) != head.sha:
            raise Refusal(412, None, "there was another commit since: parentCommit is not the head of the branch")
        changes: dict[str, HubFile | None] = {}
        for line in lines[1:]:
            changes |= self._changes(repository, head, line["key"], line["value"])
        commit = self.store.commit_changes(
            repository, branch, changes, title=header["summary"], message=header.get("description", "")
        )
        if self.settings.lose_next_commit_answer:
            self.settings.lose_next_commit_answer = False
            if request.transport is not None:
                request.transport.close()
            raise ConnectionResetError
        url = f"{_address(request)}/{repository.repo_id}/commit/{commit.sha}"
        return web.json_response({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    def _changes(
        self, repository: Repository, head: Commit, key: str, value: Mapping[str, Any]
    ) -> dict[str, HubFile | None]:
        """What one line of a commit does."""
        path = str(value["path"])
        if key == "file":
            data = base64.b64decode(value["content"], validate=True)
            if len(data) > LARGE_BYTES:
                raise Refusal(400, None, f"{path} is larger than 10 MiB: it must be uploaded to LFS")
            return {path: self.store.regular_file(self.store.adopt_bytes(data))}
        if key == "lfsFile":
            return {path: self._uploaded_file(repository, path, value)}
        if key == "deletedFile":
            if path not in head.files:
                raise Refusal(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
            return {path: None}
        if key == "deletedFolder":
            inside = [name for name in head.files if name.startswith(f"{path.rstrip('/')}/")]
            if not inside:
                raise Refusal(404, "EntryNotFound", f"A folder with this name doesn't exist: {path}")
            return dict.fromkeys(inside)
        raise Refusal(400, None, f"unknown operation {key!r} in a commit")

    def _uploaded_file(self, repository: Repository, path: str, value: Mapping[str, Any]) -> HubFile:
        oid = str(value["oid"])
        content = self.store.blob_path(oid)
        there = oid in repository.uploaded and content.exists()
        if not there and self.settings.xet_cas is None:
            raise Refusal(400, None, f"{path} points to an LFS object that was not uploaded")
        size = content.stat().st_size if there else int(value["size"])
        if int(value.get("size", size)) != size:
            raise Refusal(400, None, f"{path} points to an LFS object of another size")
        return self.store.lfs_file(Blob(oid, size))

    # ---- control

    def control(self) -> web.Application:
        @web.middleware
        async def answered(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._answer(request, handler)

        app = web.Application(middlewares=[answered], client_max_size=1 << 30)
        app.add_routes(
            [
                web.post("/publish", self._control_publish),
                web.post("/files", self._control_files),
                web.post("/history", self._control_history),
                web.post("/point", self._control_point),
                web.post("/repository", self._control_repository),
                web.post("/set", self._control_set),
                web.post("/token", self._control_token),
                web.post("/expire", self._control_expire),
                web.post("/xet", self._control_xet),
                web.post("/log", self._control_log),
            ]
        )
        return app

    def _known(self, repo_id: str) -> Repository:
        found = self.store.find(repo_id)
        if found is None:
            raise Refusal(404, "RepoNotFound", f"there is no repository {repo_id}")
        return found

    async def _control_publish(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        given = {name: Path(path) for name, path in asked["files"].items()}
        if asked["create"]:
            self.store.create(asked["repo_id"], private=asked["private"], gated=asked["gated"])
        repository = self._known(asked["repo_id"])
        sha = await self.publish(
            repository, given, asked["revision"], removed=asked["removed"], move=asked["move"], title=asked["title"],
            new_branch=asked["create"],
        )  # fmt: skip
        return web.json_response({"sha": sha})

    async def publish(
        self, repository: Repository, given: Mapping[str, Path], branch: str, *, removed: Sequence[str] = (),
        move: bool = False, title: str = "commit from outside", new_branch: bool = False,
    ) -> str:  # fmt: skip
        """Commit files of this machine past the API; the commit."""
        if new_branch:
            repository.branches.setdefault(branch, repository.branches["main"])
        blobs = {name: await asyncio.to_thread(self.store.adopt, path, move=move) for name, path in given.items()}
        head = repository.commit(branch)
        changes: dict[str, HubFile | None] = dict.fromkeys(removed)
        attributes = self.store.attributes(head.files)
        for name, blob in blobs.items():
            large = tracked_by_lfs(name, blob.size, attributes)
            changes[name] = self.store.lfs_file(blob) if large else self.store.regular_file(blob)
        return self.store.commit_changes(repository, branch, changes, title=title).sha

    async def _control_files(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        commit = self._known(asked["repo_id"]).commit(asked["revision"])
        told = {name: dataclasses.asdict(file) for name, file in sorted(commit.files.items())}
        return web.json_response({"sha": commit.sha, "files": told})

    async def _control_history(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        commits = self._known(asked["repo_id"]).history(asked["revision"])
        return web.json_response([[commit.sha, commit.title] for commit in commits])

    async def _control_point(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        repository = self._known(asked["repo_id"])
        refs = repository.tags if asked["kind"] == "tag" else repository.branches
        at = asked["at"]
        self._point(repository, refs, asked["name"], None if at is None else repository.commit(at).sha)
        return web.json_response({})

    async def _control_repository(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        repository = self._known(asked["repo_id"])
        repository.private = repository.private if asked["private"] is None else asked["private"]
        repository.gated = repository.gated if asked["gated"] is None else asked["gated"]
        self.store.save(repository)
        return web.json_response({"private": repository.private, "gated": repository.gated})

    async def _control_set(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        known = {slot.name for slot in dataclasses.fields(Settings)}
        if unknown := set(asked) - known:
            raise Refusal(400, None, f"unknown settings {sorted(unknown)}: there are {sorted(known)}")
        for name, value in asked.items():
            setattr(self.settings, name, value)
        return web.json_response({})

    async def _control_token(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        if asked["rights"] is None:
            del self.tokens[asked["token"]]
        else:
            self.tokens[asked["token"]] = Token(**asked["rights"])
        return web.json_response({})

    async def _control_expire(self, request: web.Request) -> web.StreamResponse:
        self._generation += 1
        return web.json_response({})

    async def _control_xet(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        self.xet_hashes[asked["sha256"]] = asked["xet_hash"]
        return web.json_response({})

    async def _control_log(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), 1.0)
        told = [dataclasses.asdict(exchange) for exchange in self._log]
        if asked["clear"]:
            self._log.clear()
        return web.json_response(told)


# ---- what an answer is made of ---------------------------------------------------------------------------------------


def _refused(refusal: Refusal) -> web.Response:
    headers = {**refusal.headers, "X-Request-Id": uuid.uuid4().hex}
    # A header holds one line of Latin-1; the body says all of it.
    headers["X-Error-Message"] = " ".join(refusal.message.encode("ascii", "replace").decode().split())
    if refusal.code is not None:
        headers["X-Error-Code"] = refusal.code
    return web.json_response({"error": refusal.message}, status=refusal.status, headers=headers)


def _address(request: web.Request) -> str:
    """The origin as the client knows it: something that forwards requests may stand between."""
    return f"http://{request.host}"


def _disposition(path: str) -> str:
    return f"inline; filename*=UTF-8''{quote(path.rsplit('/', 1)[-1])}"


def _sibling(name: str, file: HubFile, *, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": name}
    told: dict[str, Any] = {"rfilename": name, "size": file.size, "blobId": file.oid}
    if file.is_lfs:
        told["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_bytes}
    return told


def _upload_header(told: Mapping[str, Any]) -> Mapping[str, str]:
    """The header of an LFS object's upload action; it holds the parts of an upload in parts."""
    header: Mapping[str, str] = told.get("actions", {}).get("upload", {}).get("header", {})
    return header


def _join(parts: Sequence[Path], path: Path) -> str:
    """Put the parts of an upload together; the SHA-256 of the whole."""
    with path.open("w+b") as whole:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, whole, 1 << 20)
        whole.seek(0)
        return hashlib.file_digest(whole, "sha256").hexdigest()


# ---- the process -----------------------------------------------------------------------------------------------------


async def _serve(options: argparse.Namespace) -> int:
    """Serve until told to stop; 1 when this Hub itself failed at a request."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if options.stop_with_stdin:
        loop.add_reader(sys.stdin.fileno(), stop.set)
    tokens = {
        "write": (options.token or f"hf_{secrets.token_hex(17)}", Token(user="writer", writes=True, member=True)),
        "read": (f"hf_{secrets.token_hex(17)}", Token(user="reader", writes=False, member=True)),
        "stranger": (f"hf_{secrets.token_hex(17)}", Token(user="stranger", writes=False, member=False)),
    }
    hub = Hub(HubStore(options.root), dict(tokens.values()))
    ports = {"endpoint": options.port, "cdn_endpoint": 0, "control_endpoint": 0}
    apps = {"endpoint": hub.app("api"), "cdn_endpoint": hub.app("cdn"), "control_endpoint": hub.control()}
    ready: dict[str, Any] = {}
    async with contextlib.AsyncExitStack() as stack:
        for origin, app in apps.items():
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5, read_bufsize=1 << 20)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, options.host, ports[origin]).start()
            ready[origin] = f"http://{options.host}:{runner.addresses[0][1]}"
        hub.cdn_endpoint = ready["cdn_endpoint"]
        for repo_id, folder in options.publish:
            repository = hub.store.find(repo_id) or hub.store.create(repo_id)
            await hub.publish(repository, _folder_files(folder), "main", title="commit of a folder")
        ready["tokens"] = {role: token for role, (token, _) in tokens.items()}
        print(json.dumps(ready), flush=True)  # noqa: T201
        await stop.wait()
    return 1 if hub.failures else 0


def _folder_files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _named_folder(text: str) -> tuple[str, Path]:
    repo_id, _, folder = text.partition("=")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) is None or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not org/name=FOLDER")
    return repo_id, Path(folder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.counterparts.hub", description="A Hub on this machine.")
    parser.add_argument("--root", type=Path, required=True, help="the folder that keeps the repositories")
    parser.add_argument("--host", default=HOST)
    parser.add_argument("--port", type=int, default=0, help="of the API; 0 takes a free one")
    parser.add_argument("--token", help="the token that may write; default a new one")
    parser.add_argument("--publish", type=_named_folder, action="append", default=[], metavar="ORG/NAME=FOLDER")
    parser.add_argument("--stop-with-stdin", action="store_true", help="stop when standard input closes")
    return asyncio.run(_serve(parser.parse_args()))


# ---- the handle ------------------------------------------------------------------------------------------------------


class HubServer:
    """A Hub in a process of its own, which ends with the `with` block, or with this process."""

    def __init__(self, process: subprocess.Popen[str], root: Path, ready: Mapping[str, Any]) -> None:
        self.root = root
        self.endpoint: str = ready["endpoint"]
        self.cdn_endpoint: str = ready["cdn_endpoint"]
        self.write_token: str = ready["tokens"]["write"]
        self.read_token: str = ready["tokens"]["read"]
        """Sees everything and writes nothing."""
        self.stranger_token: str = ready["tokens"]["stranger"]
        """Valid, and kept out of private and gated repositories."""
        self._control: str = ready["control_endpoint"]
        self._process = process
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @classmethod
    def start(cls, root: Path, **settings: Any) -> Self:
        """Start a Hub that keeps its repositories under `root`; `settings` are those of `set`."""
        root.mkdir(parents=True, exist_ok=True)
        line = [sys.executable, "-m", "tests.counterparts.hub", "--root", str(root), "--stop-with-stdin"]
        with (root / "errors.txt").open("w") as errors:
            process = subprocess.Popen(
                line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert process.stdout is not None
        watch = threading.Timer(60, process.kill)
        watch.start()
        try:
            ready = process.stdout.readline()
        finally:
            watch.cancel()
        if not ready:
            with process:
                process.kill()
            raise RuntimeError(f"the Hub did not start: {(root / 'errors.txt').read_text()}")
        started = cls(process, root, json.loads(ready))
        try:
            started.set(**settings)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        return started

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except RuntimeError:
            if error is None:
                raise

    def stop(self) -> None:
        """Stop it. Raises RuntimeError when it failed at a request: a test that passed all the same proves nothing."""
        try:
            self._process.communicate(timeout=20)  # closes its standard input, which it stops with
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        if self._process.returncode != 0:
            errors = (self.root / "errors.txt").read_text()
            raise RuntimeError(f"the Hub ended with {self._process.returncode}: {errors}")

    def environment(self, token: str | None = None, *, home: Path | None = None) -> dict[str, str]:
        """What a process needs around it to use this Hub and nothing of the machine's own Hugging Face folder.

        `token` defaults to the one that writes; "" is nobody's. Xet is off: its local store serves one process.
        """
        home = home or self.root / "home"
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.write_token if token is None else token,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": HOST,
            "no_proxy": HOST,
        }

    # ---- repositories, past the API

    def create(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path] | Path,
        *,
        revision: str = "main",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """A repository with these files (a folder is taken whole) on the branch `revision`; the commit."""
        return self._publish(repo_id, files, revision, create=True, private=private, gated=gated)

    def commit(
        self, repo_id: str, changes: Mapping[str, bytes | Path | None], revision: str = "main", *, title: str = "change"
    ) -> str:
        """Move a branch from outside; None removes a file. The commit."""
        removed = [name for name, data in changes.items() if data is None]
        files = {name: data for name, data in changes.items() if data is not None}
        return self._publish(repo_id, files, revision, removed=removed, title=title)

    def _publish(
        self, repo_id: str, files: Mapping[str, bytes | Path] | Path, revision: str, *, create: bool = False,
        private: bool = False, gated: bool = False, removed: Sequence[str] = (), title: str = "files from outside",
    ) -> str:  # fmt: skip
        ours = not isinstance(files, Path) and not any(isinstance(data, Path) for data in files.values())
        with self._on_disk(files) as paths:
            told = self._ask(
                "publish", repo_id=repo_id, files={name: str(path.absolute()) for name, path in paths.items()},
                removed=list(removed), move=ours, revision=revision, create=create, private=private, gated=gated,
                title=title,
            )  # fmt: skip
        sha: str = told["sha"]
        return sha

    @contextlib.contextmanager
    def _on_disk(self, files: Mapping[str, bytes | Path] | Path) -> Iterator[dict[str, Path]]:
        """The files where the server can read them."""
        if isinstance(files, Path):
            yield _folder_files(files)
            return
        folder = self.root / "incoming" / uuid.uuid4().hex
        folder.mkdir(parents=True)
        paths = {}
        for number, (name, data) in enumerate(files.items()):
            paths[name] = data if isinstance(data, Path) else folder / str(number)
            if not isinstance(data, Path):
                paths[name].write_bytes(data)
        try:
            yield paths
        finally:
            shutil.rmtree(folder)

    def point_branch(self, repo_id: str, branch: str, at: str | None) -> None:
        """Make a branch name the commit of another revision (backwards too); None removes it."""
        self._ask("point", repo_id=repo_id, kind="branch", name=branch, at=at)

    def point_tag(self, repo_id: str, tag: str, at: str | None) -> None:
        self._ask("point", repo_id=repo_id, kind="tag", name=tag, at=at)

    def guard(self, repo_id: str, *, private: bool | None = None, gated: bool | None = None) -> tuple[bool, bool]:
        """Change who may read it, where given; whether it is private, and gated."""
        told = self._ask("repository", repo_id=repo_id, private=private, gated=gated)
        return told["private"], told["gated"]

    def head(self, repo_id: str, revision: str = "main") -> str:
        sha: str = self._ask("files", repo_id=repo_id, revision=revision)["sha"]
        return sha

    def files(self, repo_id: str, revision: str = "main") -> dict[str, HubFile]:
        told = self._ask("files", repo_id=repo_id, revision=revision)["files"]
        return {name: HubFile(**file) for name, file in told.items()}

    def read(self, repo_id: str, name: str, revision: str = "main") -> bytes:
        """The content of a file, past every right."""
        sha256 = self.files(repo_id, revision)[name].sha256
        return (self.root / "blobs" / sha256[:2] / sha256).read_bytes()

    def history(self, repo_id: str, revision: str = "main") -> list[tuple[str, str]]:
        """Commits and their titles, newest first; the last is the one that made the repository."""
        return [(sha, title) for sha, title in self._ask("history", repo_id=repo_id, revision=revision)]

    # ---- behaviour

    def set(self, *, revoke_token: str | None = None, **settings: Any) -> None:
        """Change Settings by name; a revoked token is nobody's from now on."""
        if settings:
            self._ask("set", **settings)
        if revoke_token is not None:
            self._ask("token", token=revoke_token, rights=None)

    def add_token(self, token: str, rights: Token) -> None:
        self._ask("token", token=token, rights=dataclasses.asdict(rights))

    def expire_signed_urls(self) -> None:
        """Make every download URL given out so far one that has expired; new ones are good."""
        self._ask("expire")

    def register_xet(self, sha256: str, xet_hash: str) -> None:
        """From now on the file is advertised with its xet hash. Its bytes must be in the store that xet_cas names."""
        self._ask("xet", sha256=sha256, xet_hash=xet_hash)

    def log(self) -> list[LoggedRequest]:
        """Every request so far, in the order of arrival; waits up to a second for those that are being answered."""
        return [LoggedRequest(**told) for told in self._ask("log", clear=False)]

    def clear_log(self) -> None:
        self._ask("log", clear=True)

    def _ask(self, verb: str, **told: Any) -> Any:
        request = urllib.request.Request(f"{self._control}/{verb}", json.dumps(told).encode())
        try:
            with self._opener.open(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise RuntimeError(f"{verb}: {error.read().decode()}") from None


if __name__ == "__main__":
    sys.exit(main())
