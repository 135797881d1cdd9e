"""The places of the remote tests: a bucket, a Hub, folders; sources that lie in all of them, and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.conformance.folders import ROOT, Outcome, adapter, ended, lora_tensors, model
from tests.counterparts.hub import HubServer
from tests.counterparts.s3 import S3Server

BUCKET: Final = "raymerge"
PLACES: Final = ("disk", "hub", "s3")
MODULES: Final = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(2))
ROWS, COLS = 6000, 1024
"""12 MB a tensor: its parts go up by themselves."""


@dataclass(frozen=True, slots=True)
class Places:
    """Servers that run, a folder, and the same sources in each place."""

    folder: Path
    s3: S3Server
    hub: HubServer

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """What a process needs to reach both servers."""
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "AWS_", "RAYMERGE_"))}
        return {
            **plain, **self.s3.environment(), **self.hub.environment(), "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(self.folder / "state"), **(more or {}),
        }  # fmt: skip

    def source(self, place: str, name: str) -> str:
        """The reference of one source in one place."""
        return {"disk": str(self.folder / name), "hub": f"acme/{name}", "s3": f"s3://{BUCKET}/sources/{name}"}[place]

    def fresh(self, place: str) -> str:
        """An output that nobody has used."""
        name = uuid.uuid4().hex[:12]
        return {"disk": str(self.folder / name), "hub": f"hf://acme/{name}", "s3": f"s3://{BUCKET}/out/{name}"}[place]

    def start(self, *arguments: object, settings: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *map(str, arguments)], cwd=ROOT, env=self.environment(settings),
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: object, timeout: float = 120, settings: Mapping[str, str] | None = None) -> Outcome:
        """The command in a process of its own."""
        return ended(self.start(*arguments, settings=settings), timeout=timeout)

    def merge(
        self, manifest: Mapping[str, Any], out: str, *options: object, settings: Mapping[str, str] | None = None
    ) -> Outcome:
        """Write a manifest and merge it, for one JSON document."""
        path = self.folder / f"{uuid.uuid4().hex[:12]}.yaml"
        path.write_text(json.dumps(manifest))
        return self.run("merge", path, out, "--json", *options, settings=settings)

    def upload(self, name: str) -> None:
        """Put a folder of sources into the bucket and on the Hub."""
        files = {path.name: path.read_bytes() for path in (self.folder / name).iterdir()}
        client = self.s3.client()
        for file, data in files.items():
            client.put_object(Bucket=BUCKET, Key=f"sources/{name}/{file}", Body=data)
        self.hub.create(f"acme/{name}", files)


def make_places(folder: Path, s3: S3Server, hub: HubServer) -> Places:
    """Two models of a base, the base, and two adapters of it, everywhere."""
    places = Places(folder, s3, hub)
    for seed, name in enumerate(("base", "m1", "m2")):
        model(folder / name, seed, rows=ROWS, cols=COLS)
    for seed, name in ((7, "a1"), (8, "a2")):
        tensors = lora_tensors(seed, modules=MODULES, rank=8, rows=ROWS, cols=COLS)
        adapter(folder / name, seed, rank=8, tensors=tensors, config={"base_model_name_or_path": "acme/base"})
    for name in ("base", "m1", "m2", "a1", "a2"):
        places.upload(name)
    return places


def ties(places: Places, place: str, **parameters: object) -> dict[str, Any]:
    """Two models against their base: rounds of statistics and a map."""
    return {
        "merge_method": "ties", "base_model": places.source(place, "base"),
        "models": [
            {"model": places.source(place, name), "parameters": {"weight": weight}}
            for name, weight in (("m1", 1.0), ("m2", 0.5))
        ],
        "parameters": {"density": 0.3, **parameters},
    }  # fmt: skip


def adapters(places: Places, place: str, kind: str = "adapter") -> dict[str, Any]:
    """Two adapters, concatenated or folded into their base."""
    return {
        "base_model": places.source(place, "base"),
        "adapters": [{"adapter": places.source(place, n), "parameters": {"weight": 0.5}} for n in ("a1", "a2")],
        "output": {"kind": kind},
    }  # fmt: skip
