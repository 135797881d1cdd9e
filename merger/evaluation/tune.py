"""A merge's parameters chosen by what the merges answer: `tune`.

Every combination of the values that are tried is merged into memory, made into a model and asked the items. What is
best on few items may be best by chance: each is told with the interval of its difference to the best, and `check` asks
the best, and the manifest as it is written, items that nothing was chosen by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from merger import api
from merger.errors import ManifestError
from merger.evaluation.answers import Answered, answered
from merger.evaluation.instances import from_memory, instance, made_by, place
from merger.evaluation.items import Item
from merger.evaluation.scores import Score, score_items
from merger.methods import METHODS

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
        return [f"{key}={json.dumps(value)}" for key, value in self.chosen.items()]

    @property
    def name(self) -> str:
        return " ".join(self.overrides) or _AS_WRITTEN


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was tried, and what came out best."""

    manifest: str
    data: str
    by: Measure
    trials: tuple[Trial, ...]
    best: Trial
    checked: tuple[Answered, ...] = field(default=())
    """On items that nothing was chosen by: the manifest as it is written, then the best."""

    def as_json(self) -> dict[str, Any]:
        return {
            "version": 1, "manifest": self.manifest, "data": self.data, "by": self.by,
            "best": {"set": self.best.overrides, **dict(self.best.chosen)},
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
        if self.best.chosen:
            found.append(f"best: raymerge merge {self.manifest} " + " ".join(f"--set {o}" for o in self.best.overrides))
        else:
            found.append("best: as written")
        return found

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


def to_try(manifest: Source, over: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values; without any, LAMBDAS. Raises ManifestError where the method has no lambda."""
    if not over:
        loaded = api.as_manifest(manifest)
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
    if by == "exact" and not all(any(item.has_answer for item in part) for part in (items, check) if part):
        raise ManifestError.of("bad-data", "no item has an answer", where=data, why="exact is a share of answers",
                               fix="give items with answers, or use --by nll")  # fmt: skip
    tried: list[tuple[dict[str, Any], list[Score]]] = []
    for chosen in to_try(manifest, over or {}):
        trial = Trial(chosen, answered("", items, [Score(0.0, 1, None)] * len(items), None))
        if told is not None:
            told(f"asking {trial.name}")
        tried.append((chosen, _asked(manifest, [*overrides, *trial.overrides], items, base, device)))
    first = min(range(len(tried)), key=lambda i: _worth(tried[i][1], by))
    best = tried[first][1]
    trials = tuple(
        Trial(chosen, answered(_named(chosen), items, scores, None if scores is best else best))
        for chosen, scores in tried
    )
    checked: tuple[Answered, ...] = ()
    if check:
        found = [_asked(manifest, [*overrides, *trials[i].overrides], check, base, device) for i in (0, first)]
        checked = (
            answered(_AS_WRITTEN, check, found[0], None), answered(trials[first].name, check, found[1], found[0])
        )  # fmt: skip
    name = str(manifest) if isinstance(manifest, str | Path) else "MANIFEST"
    return Tuning(name, data, by, trials, trials[first], checked)


def _worth(scores: Sequence[Score], by: Measure) -> tuple[float, float]:
    """Less is better; ties of one measure are broken by the other."""
    nll = sum(score.nll for score in scores) / sum(score.tokens for score in scores)
    wrong = float(sum(score.right is False for score in scores))
    return (nll, wrong) if by == "nll" else (wrong, nll)


def _named(chosen: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in chosen.items()) or _AS_WRITTEN


def _asked(
    manifest: Source, overrides: Sequence[str], items: Sequence[Item], base: str | None, device: str
) -> list[Score]:
    """The scores of one merge. An adapter is asked as it would be written, folded into its base."""
    loaded = api.as_manifest(manifest, overrides=[*overrides, "output.exists=refuse"])
    with place() as out:
        report = api.merge(loaded, out)
        if report.kind != "adapter":
            return score_items(from_memory(out, device=device), items)
        on = base or (str(loaded.base_model) if loaded.base_model is not None else None)
        with instance(out, base=on or made_by(out)["base_model_name_or_path"], device=device) as made:
            return score_items(made, items)
