"""A Ray to run on: a private one on this machine, or one that runs already. Imports ray late, after its environment
is set."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from typing import Any, Final

from merger.errors import InfrastructureError

OBJECT_STORE_BYTES: Final = 100 << 20
"""Enough for a plan: tensors never go through the object store."""
REACH_SECONDS: Final = 15.0


@contextlib.contextmanager
def connection(address: str, *, workers: int) -> Iterator[None]:
    """A Ray to run on: `private` starts one on this machine, anything else attaches. Detached again at the end.

    Raises InfrastructureError(code `no-cluster`) when there is none.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "private" and os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        # Ray reads both when it is imported. A token of our own keeps it from writing one into the home folder.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray
    from ray.exceptions import RayError

    _check_reachable(address)
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "namespace": "raymerge"}
    if address == "private":
        options |= {
            "address": "local",  # a bare init() would join whatever cluster was last started on this machine
            "num_cpus": max(workers, os.cpu_count() or 1),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    else:
        options["address"] = address
    started = not ray.is_initialized()
    try:
        if started:
            ray.init(**options)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, error) from error
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Whether anything listens at HOST:PORT: Ray itself tries for minutes, and may end the process over it."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> InfrastructureError:
    return InfrastructureError.of(
        "no-cluster", f"no Ray cluster could be reached: {error}", where=address,
        why="nothing answers there as Ray does", fix="check the address and that the cluster runs, or use --on here",
    )  # fmt: skip
