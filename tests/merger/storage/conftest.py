"""The S3 of these tests, and the proxy that stands before it in each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.counterparts.faults import FaultProxy
from tests.counterparts.s3 import S3Server


@pytest.fixture(scope="session")
def s3(s3_server: S3Server) -> S3Server:
    return s3_server


@pytest.fixture(scope="session")
def gate(s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy.start(s3.endpoint, objects=s3.objects) as proxy:
        yield proxy


@pytest.fixture
def proxy(gate: FaultProxy) -> FaultProxy:
    """What stands before the S3, well-behaved as yet."""
    gate.clear()
    gate.forget()
    return gate
