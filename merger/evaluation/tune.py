"""A merge's parameters chosen by what the merges answer: `tune`.

Every combination of the values that are tried is merged into memory, made into a model and asked the items. What is
best on few items may be best by chance: each is told with the interval of its difference to the best, and `check` asks
the best, and the manifest as it is written, items that nothing was chosen by.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from merger import api
from merger.errors import ManifestError, PlanError
from merger.evaluation.answers import Answered, answered
from merger.evaluation.hidden import hidden_states
from merger.evaluation.instances import (
    Instance,
    check_device,
    check_memory,
    from_memory,
    instance,
    is_quantised,
    made_by,
    place,
)
from merger.evaluation.items import Item
from merger.evaluation.scores import Score, encode, score_items
from merger.manifest import Manifest
from merger.methods import METHODS
from merger.planning.nouns import MergePlan

LAMBDAS: Final = (0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2)
"""Tried where nothing else is said: how much of the merged change is added matters more than most else."""
_AS_WRITTEN: Final = "as written"

Measure = Literal["nll", "exact"]
Source = str | Path | Mapping[str, object]
"""A manifest that can be changed: its path or text, or plain data."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One merge that was asked."""

    chosen: Mapping[str, Any]
    """Keys of the manifest and their values; empty of the manifest as it is written."""
    scored: Answered
    """Its differences are to the best."""

    @property
    def overrides(self) -> list[str]:
        return _overrides(self.chosen)

    @property
    def name(self) -> str:
        return _named(self.chosen)


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was tried, and what came out best."""

    manifest: str
    data: str
    by: Measure
    trials: tuple[Trial, ...]
    best: Trial
    given: tuple[str, ...] = ()
    """Overrides that all of them have."""
    checked: tuple[Answered, ...] = field(default=())
    """On items that nothing was chosen by: the manifest as it is written, then the best."""

    def as_json(self) -> dict[str, Any]:
        return {
            "version": 1, "manifest": self.manifest, "data": self.data, "by": self.by,
            "best": {"set": self.best.overrides, "command": self.command},
            "trials": [{"set": trial.overrides, **trial.scored.as_json()} for trial in self.trials],
            "checked": [one.as_json() for one in self.checked],
        }  # fmt: skip

    def lines(self) -> list[str]:
        """One table, and what to do with it."""
        width = max(len(trial.name) for trial in self.trials)
        unit = "nats" if self.by == "nll" else "exact"
        found = [f"{self.trials[0].scored.summary.items} items of {self.data}, by {self.by}", ""]
        found.append(f"{'':{width}}  {'nats a token':>12}  {'exact':>7}   {unit} over the best")
        for trial in self.trials:
            s = trial.scored.summary
            exact = "–" if s.exact is None else f"{s.exact:.1%}"
            found.append(f"{trial.name:{width}}  {s.nll:12.4f}  {exact:>7}   {self._gap(trial)}".rstrip())
        ties = [t for t in self.trials if t is not self.best and (g := _gap(t.scored, self.by)) and not g.is_clear]
        found.append("")
        if ties:
            found.append(f"{len(ties)} other(s) may be as good: their interval holds 0")
        if self.checked:
            before, after = self.checked
            found.append(
                f"on other items: as written {_both(before)}, the best {_both(after)}"
                + (f", {g.value:+.4f} [{g.low:+.4f}, {g.high:+.4f}]" if (g := _gap(after, self.by)) else "")
            )
        else:
            found.append("these figures are of the items that it was chosen by: look at others with --check")
        found.append("best: as written" if not self.best.chosen else f"best: {shlex.join(self.command)}")
        return found

    @property
    def command(self) -> list[str]:
        """What makes the best one; what it is merged with (--plugin, --workers, OUT) may follow."""
        sets = [word for override in (*self.given, *self.best.overrides) for word in ("--set", override)]
        return ["raymerge", "merge", self.manifest, *sets]

    def _gap(self, trial: Trial) -> str:
        if trial is self.best:
            return "the best"
        gap = _gap(trial.scored, self.by)
        if gap is None:
            return ""
        form = "+.4f" if self.by == "nll" else "+.1%"
        return f"{gap.value:{form}} [{gap.low:{form}}, {gap.high:{form}}]" + ("" if gap.is_clear else " unclear")


def _gap(scored: Answered, by: Measure) -> Any:
    return scored.nll if by == "nll" else scored.exact


def _both(scored: Answered) -> str:
    exact = "" if scored.summary.exact is None else f" and {scored.summary.exact:.1%} exact"
    return f"{scored.summary.nll:.4f} nats{exact}"


def parse_over(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`a.b[0].c=[1, 2]` as keys and the values to try. Raises ManifestError(code `bad-arguments`)."""
    found: dict[str, list[Any]] = {}
    for text in texts:
        key, given, values = text.partition("=")
        try:
            read = yaml.safe_load(values) if given else None
        except yaml.YAMLError:
            read = None
        if not key or not isinstance(read, list) or not read or key in found:
            raise ManifestError.of(
                "bad-arguments", f"--over {text} cannot be used", where="--over",
                why="a key of the manifest and the values to try are needed, each key once",
                fix="write --over 'parameters.lambda=[0.4, 0.7, 1.0]'",
            )  # fmt: skip
        found[key] = read
    return found


def to_try(manifest: Source, over: Mapping[str, Sequence[Any]], overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every combination of the values; without any, LAMBDAS. Raises ManifestError where the method has no lambda."""
    if not over:
        loaded = api.as_manifest(manifest, overrides=overrides)
        spec = METHODS.get(loaded.merge_method or "task_arithmetic")
        if loaded.combination_type is not None or spec is None or "lambda" not in {p.name for p in spec.parameters}:
            raise ManifestError.of(
                "bad-arguments", "it is not said what to try", where="--over",
                why="lambda is tried where nothing is said, and this method has none",
                fix="write --over 'KEY=[VALUE, …]', for example --over 'parameters.density=[0.2, 0.5]'",
            )  # fmt: skip
        over = {"parameters.lambda": LAMBDAS}
    return [{}, *(dict(zip(over, values, strict=True)) for values in product(*over.values()))]


def tune(
    manifest: Source, items: Sequence[Item], data: str, *, over: Mapping[str, Sequence[Any]] | None = None,
    by: Measure = "nll", check: Sequence[Item] = (), overrides: Sequence[str] = (), base: str | None = None,
    device: str = "cpu", told: Callable[[str], None] | None = None,
) -> Tuning:  # fmt: skip
    """Try every combination of `over` (manifest keys to values) and say which answers the items best.

    `base` is what merged adapters are asked on, where not the base that they name. Merges go into memory: no output is
    written. Raises ManifestError, and what merging and loading raise; code `bad-data` where `by` is `exact` and no item
    has an answer.
    """
    if isinstance(manifest, Manifest):
        raise TypeError("a typed manifest cannot be overridden: give its path, text or plain data")
    check_device(device)
    if by == "exact" and not all(any(item.has_answer for item in part) for part in (items, check) if part):
        raise ManifestError.of("bad-data", "no item has an answer", where=data, why="exact is a share of answers",
                               fix="give items with answers, or use --by nll")  # fmt: skip
    combinations = to_try(manifest, over or {}, overrides)
    for chosen in combinations:  # all of them, before the first is merged
        _planned(manifest, [*overrides, *_overrides(chosen)], "memory://raymerge")
    tried: list[tuple[dict[str, Any], list[Score]]] = []
    for chosen in combinations:
        if told is not None:
            told(f"asking {_named(chosen)}")
        asked = _Asked(manifest, [*overrides, *_overrides(chosen)], base, device)
        tried.append((chosen, asked.scores(items, look_at=() if tried else check)))
    first = min(range(len(tried)), key=lambda i: _worth(tried[i][1], by))
    best = tried[first][1]
    trials = tuple(
        Trial(chosen, answered(_named(chosen), items, scores, None if scores is best else best))
        for chosen, scores in tried
    )
    checked: tuple[Answered, ...] = ()
    if check:
        found = {
            i: _Asked(manifest, [*overrides, *trials[i].overrides], base, device).scores(check) for i in {0, first}
        }
        checked = (
            answered(_AS_WRITTEN, check, found[0], None),
            answered(trials[first].name, check, found[first], found[0] if first else None),
        )
    name = str(manifest) if isinstance(manifest, str | Path) else "MANIFEST"
    return Tuning(name, data, by, trials, trials[first], tuple(overrides), checked)


def _worth(scores: Sequence[Score], by: Measure) -> tuple[float, float]:
    """Less is better; ties of one measure are broken by the other."""
    nll = sum(score.nll for score in scores) / sum(score.tokens for score in scores)
    wrong = float(sum(score.right is False for score in scores))
    return (nll, wrong) if by == "nll" else (wrong, nll)


def _overrides(chosen: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in chosen.items()]


def _named(chosen: Mapping[str, Any]) -> str:
    return " ".join(_overrides(chosen)) or _AS_WRITTEN


def _planned(manifest: Source, overrides: Sequence[str], out: str) -> MergePlan:
    """The plan of a trial. Raises ManifestError, PlanError where there can be none."""
    loaded = api.as_manifest(manifest, overrides=[*overrides, "output.exists=refuse"])
    kept = [name for name, document in loaded.documents.items() if document.output.path is not None]
    if kept:
        raise ManifestError.of(
            "conflict", f"the document {kept[0]} is written to a place of its own", where=f"documents.{kept[0]}.output",
            why="trials are merged in memory, and write nothing", fix="leave its output.path out while you try",
        )  # fmt: skip
    planned = api.plan(loaded, out)
    if planned.problems:
        raise PlanError(planned.problems)
    return planned


@dataclass(frozen=True, slots=True)
class _Asked:
    """One merge that is asked as it would be written: an adapter folded into its base, codes made dense."""

    manifest: Source
    overrides: Sequence[str]
    base: str | None
    device: str

    def scores(self, items: Sequence[Item], *, look_at: Sequence[Item] = ()) -> list[Score]:
        """What its model makes of the items. `look_at`: items that it must be able to take, too."""
        with place() as out:
            planned = _planned(self.manifest, self.overrides, out)
            check_memory(planned, "the merge", device=self.device)
            report = api.run_planned(planned, hidden=hidden_states)
            if report.kind == "model" and not is_quantised(out):
                return self._scores(from_memory(out, "the merge", device=self.device), items, look_at)
            base = None if report.kind == "model" else self.base or _base_of(planned, out)
            with instance(out, base=base, device=self.device) as made:
                return self._scores(made, items, look_at)

    def _scores(self, made: Instance, items: Sequence[Item], look_at: Sequence[Item]) -> list[Score]:
        encode(made, look_at)
        return score_items(made, items)


def _base_of(planned: MergePlan, out: str) -> str:
    """The base that a merged adapter is asked on: the manifest's, else the one that it names, at its revision."""
    named = planned.manifest.get("base_model")
    config = made_by(out)
    if named is None and config.get("base_model_name_or_path"):
        revision = config.get("revision")
        named = f"{config['base_model_name_or_path']}" + (f"@{revision}" if revision else "")
    if named is None:
        raise ManifestError.of("no-base", "it is not known which model the adapter is for", where="base_model",
                               fix="give --base REF")  # fmt: skip
    return str(named)
