"""The documents say what is so."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from jobs.show import methods_markdown
from merger.manifest import Found, expand_bulk, load_manifest, parse_reference
from merger.manifest.documents import read_documents
from merger.manifest.load import load_bulk_grammar
from merger.methods import COMBINATION_TYPES, METHODS, plugin
from merger.methods.plugin import load_plugin

HOME = Path(__file__).resolve().parents[1]
README = HOME / "README.md"
BLOCK = re.compile(r"(<!-- methods: [^\n]*-->\n)(.*?)(<!-- /methods -->)", re.DOTALL)


def test_readme_has_the_table_of_methods() -> None:
    text = README.read_text(encoding="utf-8")
    table = methods_markdown(METHODS.values())
    wanted = BLOCK.sub(lambda m: f"{m[1]}{table}\n{m[3]}", text)
    if os.environ.get("RAYMERGE_UPDATE_DOCS"):
        README.write_text(wanted, encoding="utf-8")
    assert table in wanted
    assert wanted == text


def test_readme_names_every_combination_type() -> None:
    text = README.read_text(encoding="utf-8")
    for name in COMBINATION_TYPES:
        assert re.search(rf"\b{name}\b", text), name


@pytest.mark.parametrize("package", ["merger", "cluster", "jobs"])
def test_every_file_that_a_package_readme_names_exists(package: str) -> None:
    text = (HOME / package / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert (HOME / package / name).is_file(), name


@pytest.mark.parametrize("path", sorted((HOME / "manifests" / "merges").glob("*.yaml")), ids=lambda p: p.name)
def test_every_example_loads(path: Path) -> None:
    assert load_manifest(path).sources_key in ("adapters", "models", "slices", "experts")


@pytest.mark.parametrize("path", sorted((HOME / "manifests" / "bulk").glob("*.yaml")), ids=lambda p: p.name)
def test_every_example_of_a_bulk_is_written_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HOME)  # where the commands in the examples are run
    (document,) = read_documents(path)
    bulk = load_bulk_grammar(document)
    found = [Found(name, parse_reference(f"s3://models/adapters/{name}")) for name in ("a", "b")]
    elsewhere = [entry.manifest for entry in bulk.merges or () if entry.manifest is not None]
    manifests = {str(place): read_documents(Path(place.root))[0] for place in elsewhere}
    merges = expand_bulk(document, bulk, date="2026-11-21", found=found, manifests=manifests)
    assert len(merges) == {"sweep.yaml": 18}.get(path.name, 2)


@pytest.mark.parametrize("path", sorted((HOME / "manifests" / "plugins").glob("*.yaml")), ids=lambda p: p.name)
def test_every_example_of_a_plugin_loads(path: Path) -> None:
    before = dict(METHODS)
    loaded = load_plugin(path.with_name(f"{path.stem.replace('-', '_')}.py"))
    try:
        assert load_manifest(path).merge_method in loaded.methods
    finally:
        plugin._LOADED.clear()
        METHODS.clear()
        METHODS.update(before)


def test_readme_blocks_are_ties() -> None:
    text = README.read_text(encoding="utf-8")
    (blocks,) = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "combine:" in block]
    found = load_manifest(f"adapters: [{{adapter: org/a}}]\n{blocks}")
    assert found.method is not None
    assert (found.method.prepare, found.method.combine) == (METHODS["ties"].prepare, METHODS["ties"].combine)


def _yaml_blocks(text: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)


def test_readme_bulk_is_written_out() -> None:
    text = README.read_text(encoding="utf-8")
    (block,) = [block for block in _yaml_blocks(text) if "merges:" in block]
    (document,) = read_documents(block)
    merges = expand_bulk(document, load_bulk_grammar(document), date="2026-11-21")
    assert [str(merge.manifest.output.path) for merge in merges[:2]] == [
        "s3://models/chat/2026-11-21/0.2-0.5", "s3://models/chat/2026-11-21/0.2-1.0"
    ]  # fmt: skip
    assert len(merges) == 8


def test_readme_manifest_loads() -> None:
    text = README.read_text(encoding="utf-8")
    (manifest,) = [block for block in _yaml_blocks(text) if "merge_method" in block and "merges:" not in block]
    loaded = load_manifest(manifest)
    assert loaded.merge_method == "ties"
    assert loaded.output.store is not None
    assert loaded.output.store.rank == 16


def test_readme_site_loads() -> None:
    text = README.read_text(encoding="utf-8")
    (site,) = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if block.startswith("kubernetes:")]
    found = load_manifest(f"adapters: [{{adapter: org/a}}]\n{site}").kubernetes
    said = set(yaml.safe_load(site)["kubernetes"])
    unsaid = {name for name in type(found).model_fields if name not in said}
    assert all(re.search(rf"\b{name}\b", text) for name in unsaid), unsaid
