"""What holds for every test: no network, no Ray but its own, no slow test by accident."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.counterparts.hub import HubServer
from tests.counterparts.s3 import S3Server

# Before anything imports ray or huggingface_hub: both read these at import.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("RAY_ADDRESS", None)

hypothesis.settings.register_profile("default", deadline=None, max_examples=50)
hypothesis.settings.register_profile("long", deadline=None, max_examples=200)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

ROOT = Path(__file__).parents[1]
MERGEKIT_PYTHON = Path(os.environ.get("RAYMERGE_MERGEKIT_PYTHON") or ROOT / ".venv-mergekit" / "bin" / "python")


@functools.cache
def cuda_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make every comparison with mergekit a slow test, before pytest deselects by marker."""
    for item in items:
        if item.get_closest_marker("mergekit"):
            item.add_marker("slow")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not cuda_is_there():
        pytest.skip("no CUDA device")
    if item.get_closest_marker("mergekit") and not MERGEKIT_PYTHON.exists():
        pytest.skip("no .venv-mergekit; make .venv-mergekit makes it")


@pytest.fixture(scope="session")
def mergekit_python() -> Path:
    """The interpreter of mergekit's own environment."""
    return MERGEKIT_PYTHON


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 of our own."""
    with S3Server.start() as server:
        yield server


@pytest.fixture(scope="session")
def hub_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub of our own."""
    with HubServer.start(tmp_path_factory.mktemp("hub")) as server:
        yield server
