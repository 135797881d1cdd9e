"""Remote stores for the suites, in this process: the environment a test enters, and a repository to put files into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from huggingface_hub import constants

from merger.storage.base import FileStat, RangeRead, Store
from merger.storage.hub import pin_hub
from tests.counterparts.hub import HubServer
from tests.counterparts.s3 import S3Server


def enter_s3(patch: pytest.MonkeyPatch, server: S3Server, endpoint: str | None = None) -> None:
    """Let this process be one that reaches this S3 alone, by another endpoint where a proxy stands before it."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION"):
        patch.delenv(name, raising=False)
    for name, value in server.environment(endpoint=endpoint).items():
        patch.setenv(name, value)


def enter_hub(patch: pytest.MonkeyPatch, server: HubServer, cache: Path, token: str | None = None) -> None:
    """Let this process be one that reaches this Hub alone. The client reads most of its environment at its import."""
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "ENDPOINT", server.endpoint)
    address = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    patch.setenv("HF_TOKEN", token or server.write_token)
    patch.setenv("NO_PROXY", "127.0.0.1")


@dataclass(slots=True)
class Repository:
    """A repository that a suite may put files into, by commits from outside; read at its newest commit."""

    server: HubServer
    repo: str
    _store: Store | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        self.server.create(self.repo, {})

    def _now(self) -> Store:
        if self._store is None:
            self._store = pin_hub(self.repo, None)
        return self._store

    @property
    def uri(self) -> str:
        return self._now().uri

    @property
    def remote(self) -> bool:
        return self._now().remote

    def list_files(self) -> tuple[str, ...]:
        return tuple(name for name in self._now().list_files() if name != ".gitattributes")

    def stat(self, name: str) -> FileStat:
        return self._now().stat(name)

    def read_into(self, name: str, reads: Sequence[RangeRead], *, pin: str | None = None) -> None:
        self._now().read_into(name, reads, pin=pin)

    def resolve(self, names: Sequence[str]) -> None:
        self._now().resolve(names)

    def put(self, name: str, data: bytes) -> None:
        self.server.commit(self.repo, {name: data})
        self._store = None

    def remove(self, name: str) -> None:
        self.server.commit(self.repo, {name: None})
        self._store = None
