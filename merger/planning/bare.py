"""`kind: tensors`: bare .safetensors files merged by tensor name. No config, no layers, no tokenizer: names are all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from merger.catalog import BARE, Catalog
from merger.errors import Problem
from merger.formats import bare_lora
from merger.methods import MethodSpec
from merger.planning.drafts import Draft, places_of
from merger.planning.layout import lay_out
from merger.planning.model import ModelPlanner
from merger.planning.nouns import Output, OutputFile, Result, Task
from merger.planning.quantise import Quantised
from merger.planning.requantise import Requantised

_SHOWN: Final = 8


class BarePlanner(ModelPlanner):
    """Plans one .safetensors file, named as the base's (or the first source's) is."""

    def _check_sources(self, spec: MethodSpec) -> None:
        super()._check_sources(spec)
        loras = [
            s.label for s in self.table.sources
            if s.catalog.kind == "tensors" and s.catalog.tensors and bare_lora.parse_keys(s.catalog.tensors) is not None
        ]  # fmt: skip
        if loras:
            self.warnings.append(
                Problem("factors-by-name", f"{', '.join(loras)}: LoRA factors are merged here as any tensors",
                        "models", "a mean of factors is not the factors of a mean, and alphas are averaged, too",
                        "list them under adapters: to merge what they add to the weights")
            )  # fmt: skip
        first, *others = dict.fromkeys(s.model for s in self._members(self.segments[0]) if s.model is not None)
        one = self.table.catalog(first)
        for index in others:
            other = self.table.catalog(index)
            lacking = [name for name in one.tensors if name not in other.tensors]
            more = [name for name in other.tensors if name not in one.tensors]
            if lacking or more:
                self._problem(
                    "missing-tensor", f"{_name(other)} and {_name(one)} do not hold the same tensors",
                    "; ".join([*_listed(one, lacking), *_listed(other, more)]),
                    "tensors are merged by name, and nothing is filled in from elsewhere",
                    "use files of one architecture, saved under the same names",
                )  # fmt: skip

    def _lay_out(
        self, output: int, path: str, tensors: Sequence[Draft], requantised: Requantised | Quantised
    ) -> tuple[Output, list[Task]]:
        del requantised
        donor = self.table.catalog(self.donor)
        file = donor.shards[0].rpartition("/")[2]
        if path.endswith(BARE):
            self._problem(
                "bad-output", "the output is a folder, and its name is that of a file", path,
                f"beside {file} it gets raymerge.json, a report and a card", "name a folder",
            )  # fmt: skip
        layout = lay_out(output, {file: [t.spec for t in tensors]})
        files = [
            *layout.files,
            *(OutputFile(name, donor.sizes[name], "copied", b"", self.donor, name) for name in donor.companions),
        ]
        tasks = [
            replace(t.task, results=(Result(t.call, t.store, places_of(layout, t), t.space),))
            for t in tensors
        ]  # fmt: skip
        return Output(path, "tensors", tuple(files)), tasks


def _name(catalog: Catalog) -> str:
    return catalog.reference.rpartition("/")[2]


def _listed(catalog: Catalog, names: Sequence[str]) -> list[str]:
    """`only in FILE: a, b, and 3 more`."""
    if not names:
        return []
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"only in {catalog.reference}: {', '.join(sorted(names)[:_SHOWN])}{more}"]
