"""A Ray to run on: a private one on this machine, or one that runs already. Imports ray late, after its environment
is set."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from merger.errors import InfrastructureError, PlanError

OBJECT_STORE_BYTES: Final = 100 << 20
"""About the least Ray takes: nothing of ours goes through the object store."""
REACH_SECONDS: Final = 15.0
AUTH_MODE: Final = "RAY_AUTH_MODE"
TOKEN: Final = "RAY_AUTH_TOKEN"  # noqa: S105 - a name
TOKEN_FILE: Final = "RAY_AUTH_TOKEN_PATH"  # noqa: S105 - a name


@contextlib.contextmanager
def connection(address: str, *, workers: int) -> Iterator[None]:
    """A Ray to run on: `private` starts one on this machine, anything else attaches. Detached again at the end.

    Raises InfrastructureError(code `no-cluster`) when there is none, PlanError(code `not-authenticated`) when it does
    not know us.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    set_authentication(private=address == "private")
    import ray
    from ray.exceptions import AuthenticationError, RayError

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
    except AuthenticationError as error:
        raise _not_authenticated(address) from error
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, error) from error
    try:
        with quiet():
            yield
    finally:
        if started:
            ray.shutdown()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Ray from writing what befalls its workers to standard output, which it does whatever `log_to_driver` says:
    there stands our one document. What matters of it is in our errors."""
    from ray._private import worker

    before = getattr(worker, "_worker_logs_enabled", True)
    worker._worker_logs_enabled = False  # noqa: SLF001 - there is no other switch
    try:
        yield
    finally:
        worker._worker_logs_enabled = before  # noqa: SLF001


def set_authentication(*, private: bool) -> None:
    """Say how Ray is to authenticate, before it is imported: it reads the environment then. What the environment says
    already stays.

    A private Ray has a token of its own: it would else write one into the home folder. A cluster gets a token where the
    user has one, and none where not: which of both Ray takes by itself differs between its versions.
    """
    if AUTH_MODE in os.environ:
        mode = os.environ[AUTH_MODE]
    elif private:
        mode = "token"
    else:
        mode = "token" if has_token() else "disabled"
    os.environ[AUTH_MODE] = mode
    if private and mode == "token" and TOKEN_FILE not in os.environ:
        os.environ.setdefault(TOKEN, secrets.token_hex(32))


def has_token() -> bool:
    """Whether Ray would find a token: in the environment, in the file it names, or in the home folder."""
    if os.environ.get(TOKEN):
        return True
    named = os.environ.get(TOKEN_FILE)
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        return Path(named).is_file() if named else (Path.home() / ".ray" / "auth_token").is_file()
    return False


def _check_reachable(address: str) -> None:
    """Whether a Ray that knows us answers at HOST:PORT. Ray itself tries for minutes where nothing listens, may end the
    process over it, and says "cannot connect" where the token is wrong."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error
    from ray.exceptions import AuthenticationError, RayError

    try:
        from ray._raylet import GcsClient  # type: ignore[attr-defined] # private, and the only way to ask

        GcsClient(address=address)
    except (ImportError, TypeError):
        return
    except AuthenticationError as error:
        raise _not_authenticated(address) from error
    except RayError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> InfrastructureError:
    return InfrastructureError.of(
        "no-cluster", f"no Ray cluster could be reached: {error}", where=address,
        why="nothing answers there as Ray does", fix="check the address and that the cluster runs, or use --on here",
    )  # fmt: skip


def _not_authenticated(address: str) -> PlanError:
    return PlanError.of(
        "not-authenticated", "the cluster does not accept us", where=address,
        why=f"its authentication differs from ours, which is {os.environ[AUTH_MODE]}",
        fix=f"give its token in {TOKEN} or {TOKEN_FILE}, or set {AUTH_MODE} as the cluster has it",
    )  # fmt: skip
