"""One bucket and one Hub for all remote tests, filled once."""

from __future__ import annotations

import pytest

from tests.counterparts.hub import HubServer
from tests.counterparts.s3 import S3Server
from tests.remote.places import Places, make_places


@pytest.fixture(scope="session")
def places(s3_server: S3Server, hub_server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Places:
    return make_places(tmp_path_factory.mktemp("places"), s3_server, hub_server)
