"""What a merge will make, as a source of the next: known from its plan before it is there, read once it is made.

Pins are those of the plan (its digest), so that the next plan is the same whether the first output lies in memory, on a
disk or in a bucket, and before it lies anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from merger.catalog import Catalog, read_from
from merger.errors import SourceChangedError, SourceError
from merger.planning.nouns import MergePlan, Source
from merger.storage.base import FileStat, RangeRead, Store


@dataclass(frozen=True, slots=True)
class MadeFile:
    """One file of an output that is planned."""

    size: int
    known: bytes = b""
    """The first bytes, which the plan has: a header, or the whole of a literal file."""
    origin: Store | None = None
    """Of a copied file: where it comes from."""
    name: str = ""
    pin: str = ""


@dataclass(frozen=True, slots=True)
class MadeStore:
    """The output of a plan. Before it is made it has sizes, headers, literal and copied files, and no tensor data."""

    name: str
    digest: str
    files: Mapping[str, MadeFile]
    inner: Store | None = None
    """Where it lies, once it is made."""

    @property
    def uri(self) -> str:
        return f"merge://{self.name}"

    @property
    def remote(self) -> bool:
        return self.inner is not None and self.inner.remote

    def list_files(self) -> tuple[str, ...]:
        return tuple(sorted(self.files))

    def resolve(self, names: Sequence[str]) -> None:
        if self.inner is not None:
            self.inner.resolve(names)

    def stat(self, name: str) -> FileStat:
        if self.inner is not None:
            self.inner.stat(name)
        return FileStat(self._file(name).size, self._pin(name))

    def read_into(self, name: str, reads: Sequence[RangeRead], *, pin: str | None = None) -> None:
        """Before the output is made, a read that begins in a header is filled up with zeros: headers are read in one
        go with what follows them."""
        file = self._file(name)
        if pin is not None and pin != self._pin(name):
            raise SourceChangedError.of(
                "source-changed", f"{name} is the output of another plan", where=f"{self.uri}/{name}",
                fix="run the same command again with --restart",
            )  # fmt: skip
        if self.inner is not None:
            self.inner.read_into(name, reads)
        elif file.origin is not None:
            file.origin.read_into(file.name, reads, pin=file.pin)
        else:
            for read in reads:
                into = read.into.cast("B")
                if into.nbytes and read.start >= len(file.known):
                    raise SourceError.of(
                        "not-made", f"{self.uri} is planned and not made yet", where=f"{self.uri}/{name}",
                        fix="report this: a plan needs headers alone",
                    )  # fmt: skip
                known = file.known[read.start : read.start + into.nbytes]
                into[:] = known + bytes(into.nbytes - len(known))

    def _pin(self, name: str) -> str:
        return f"merge:{self.digest}:{name}"

    def _file(self, name: str) -> MadeFile:
        if name not in self.files:
            raise SourceError.of("no-such-file", f"there is no file {name}", where=f"{self.uri}/{name}")
        return self.files[name]


def made_catalog(name: str, plan: MergePlan) -> Catalog:
    """What another plan reads where it names this one's output `merge://NAME`."""
    output = plan.outputs[0]
    files = {}
    for file in output.files:
        if file.kind == "copied":
            catalog = plan.sources[file.source].catalog
            origin = MadeFile(file.size, b"", catalog.store, file.source_name, catalog.pins[file.source_name])
            files[file.name] = origin
        else:
            files[file.name] = MadeFile(file.size, file.prefix)
    store = MadeStore(name, plan.digest, files)
    return replace(read_from(store, output.kind), reference=store.uri)


def with_made(plan: MergePlan, places: Mapping[str, Store]) -> MergePlan:
    """The same plan, reading what was made from where it lies."""

    def moved(source: Source) -> Source:
        store = source.catalog.store
        if not isinstance(store, MadeStore) or store.name not in places:
            return source
        return replace(source, catalog=replace(source.catalog, store=replace(store, inner=places[store.name])))

    return replace(plan, sources=tuple(map(moved, plan.sources)))


def unmade(plan: MergePlan) -> set[str]:
    """Names of the outputs that a plan reads and that are not made yet."""
    stores = [source.catalog.store for source in plan.sources]
    return {store.name for store in stores if isinstance(store, MadeStore) and store.inner is None}
