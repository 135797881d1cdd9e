"""The bench of tests/quantised.py, made once."""

from __future__ import annotations

import pytest

from tests.quantised import QuantBench


@pytest.fixture(scope="session")
def quant_bench(tmp_path_factory: pytest.TempPathFactory) -> QuantBench:
    return QuantBench(tmp_path_factory.mktemp("quantised"))
