"""Methods of one's own on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from merger.methods import METHODS, plugin
from tests.conformance.folders import Outcome, adapter, ended, manifest, model, start

Raymerge = Callable[..., Outcome]

PLUGINS = Path(__file__).parents[2] / "manifests" / "plugins"


@pytest.fixture(autouse=True)
def _without_plugins() -> Iterator[None]:
    yield
    for name in plugin._LOADED:
        METHODS.pop(name, None)
    plugin._LOADED.clear()


@pytest.fixture
def here(tmp_path: Path) -> Path:
    model(tmp_path / "base", 0)
    for n in (1, 2):
        model(tmp_path / f"m{n}", n)
        adapter(tmp_path / f"a{n}", n)
    entries = [{"model": str(tmp_path / f"m{n}"), "parameters": {"weight": 0.5}} for n in (1, 2)]
    document = {"merge_method": "clipped_sum", "base_model": str(tmp_path / "base"), "models": entries}
    manifest(tmp_path / "merge.yaml", document)
    return tmp_path


def test_merge_plan_and_verify_take_a_plugin(raymerge: Raymerge, here: Path) -> None:
    file = PLUGINS / "clipped_sum.py"
    planned = raymerge("plan", here / "merge.yaml", "--plugin", file)
    assert planned.code == 0, planned.err
    assert "plugin  clipped_sum.py  SHA-256" in planned.out
    done = raymerge("merge", here / "merge.yaml", here / "out", "--plugin", file)
    assert done.code == 0, done.err
    made = json.loads((here / "out" / "raymerge.json").read_text())
    assert [p["name"] for p in made["plugins"]] == ["clipped_sum.py"]
    again = raymerge("verify", here / "out", "--replay", "all", "--plugin", file)
    assert again.code == 0, again.err


def test_a_method_that_nobody_brought_is_unknown(here: Path) -> None:
    """In a process of its own, which has no plugin from elsewhere."""
    done = ended(start("plan", here / "merge.yaml"))
    assert done.code == 2
    assert "'clipped_sum' is no merge_method" in done.err


def test_the_short_form_takes_a_plugin(raymerge: Raymerge, here: Path) -> None:
    done = raymerge("merge", here / "a1", here / "a2", "-o", here / "out", "--base", here / "base",
                    "--method", "trimmed_mean", "--plugin", PLUGINS / "trimmed_mean.py")  # fmt: skip
    assert done.code == 0, done.err


def test_a_broken_plugin_cannot_start(raymerge: Raymerge, here: Path) -> None:
    (here / "bad.py").write_text("METHOD_API = 7\n")
    refused = raymerge("merge", here / "merge.yaml", here / "out", "--plugin", here / "bad.py")
    assert refused.code == 2
    assert "METHOD_API 7" in refused.err
    assert not (here / "out").exists()


def test_methods_shows_and_checks_a_plugin(raymerge: Raymerge) -> None:
    file = PLUGINS / "trimmed_mean.py"
    assert "trimmed_mean" in raymerge("methods", "--plugin", file).out
    page = raymerge("methods", "trimmed_mean", "--plugin", file, "--check")
    assert page.code == 0, page.err
    for word in ("spaces   delta", "rounds   0", "5× its sources", "arXiv:1803.01498", "cut", "[0, inf)", "SHA-256"):
        assert word in page.out, word
    assert "every property holds" in page.err
    document = raymerge("methods", "trimmed_mean", "--json", "--plugin", file).document
    assert document["rounds"] == [0, 0]
    assert document["plugins"][0]["name"] == "trimmed_mean.py"


def test_methods_check_fails_where_a_property_does_not_hold(raymerge: Raymerge, tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(
        "METHOD_API = 1\nfrom merger.methods.plugin import method\n"
        "@method(name='wrong', summary='s', one_is_itself=True)\ndef wrong(deltas, weights): return deltas[0] * 2\n"
    )
    found = raymerge("methods", "wrong", "--check", "--plugin", file)
    assert found.code == 1
    assert "one source at weight 1 is not itself" in found.err
    assert raymerge("methods", "ties", "--check").code == 2


def test_the_page_of_a_method_says_all(raymerge: Raymerge) -> None:
    page = raymerge("methods", "ties").out
    for word in ("spaces   delta, core", "rounds   2 to 3 of statistics", "cost     streamed", "arXiv:2306.01708",
                 "@inproceedings{yadav2023ties", "density", "default 1.0; [0, 1]", "one a source"):  # fmt: skip
        assert word in page, word
