"""How outputs differ as models: what each makes of the items of a file, and how surely. `compare_answers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merger.errors import ManifestError
from merger.evaluation.instances import check_device, instance
from merger.evaluation.items import Item
from merger.evaluation.scores import Interval, Kept, Measure, Score, Summary, difference, score_items, summary_of


@dataclass(frozen=True, slots=True)
class Answered:
    """One output's scores."""

    name: str
    summary: Summary
    tasks: Mapping[str, Summary] = field(default_factory=dict)
    nll: Interval | None = None
    """How much larger than the first one's, in nats a token, or a byte where they read other tokens."""
    exact: Interval | None = None
    scores: tuple[Score, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "output": self.name, **self.summary.as_json(),
            "tasks": {task: summary.as_json() for task, summary in self.tasks.items()},
            "nll_over_first": None if self.nll is None else self.nll.as_json(),
            "exact_over_first": None if self.exact is None else self.exact.as_json(),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answers:
    """What several outputs make of the same items."""

    data: str
    outputs: tuple[Answered, ...]
    one_vocabulary: bool
    """Whether all read the items as the same tokens."""

    def as_json(self) -> dict[str, Any]:
        return {
            "version": 1, "data": self.data, "one_vocabulary": self.one_vocabulary,
            "outputs": [output.as_json() for output in self.outputs],
        }  # fmt: skip

    def lines(self) -> list[str]:
        """One table, and what it does not say for sure."""
        width = max(len(output.name) for output in self.outputs)
        unit = "nats a token" if self.one_vocabulary else "nats a byte"
        found = [f"{self.outputs[0].summary.items} items of {self.data}", ""]
        found.append(f"{'':{width}}  {unit:>13}  {'exact':>7}  {'KL to [1]':>9}  {'as [1]':>7}   than [1]")
        for i, output in enumerate(self.outputs):
            s = output.summary
            nll = s.nll if self.one_vocabulary else s.nll_per_byte
            exact = "–" if s.exact is None else f"{s.exact:.1%}"
            kl, same = ("–", "–") if s.kl is None or not i else (f"{s.kl:.4f}", f"{s.agreement or 0:.1%}")
            line = f"{output.name:{width}}  {nll:13.4f}  {exact:>7}  {kl:>9}  {same:>7}   {_told(output)}"
            found.append(line.rstrip())
        if cut := max(output.summary.cut for output in self.outputs):
            found += ["", f"of {cut} text(s) only the beginning was asked"]
        tasks = [task for task in self.outputs[0].tasks if task]
        if tasks:
            found += ["", "exact by task (nats a token where there is no answer)"]
            for output in self.outputs:
                shares = ", ".join(f"{task} {_share(output.tasks[task])}" for task in tasks)
                found.append(f"{output.name:{width}}  {shares}")
        return found


def _share(summary: Summary) -> str:
    return f"{summary.nll:.4f}" if summary.exact is None else f"{summary.exact:.0%}"


def _told(output: Answered) -> str:
    parts = []
    for interval, form, unit in ((output.nll, "+.4f", " nats"), (output.exact, "+.1%", " exact")):
        if interval is not None:
            span = f"[{interval.low:{form}}, {interval.high:{form}}]"
            parts.append(f"{interval.value:{form}}{unit} {span}" + ("" if interval.is_clear else " unclear"))
    return ", ".join(parts)


def answered(
    name: str, items: Sequence[Item], scores: Sequence[Score], first: Sequence[Score] | None,
    measure: Measure = "nll",
) -> Answered:  # fmt: skip
    """One output's scores in sum, by task, and against the first's."""
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.task, []).append(index)
    tasks = {task: summary_of([scores[i] for i in indexes]) for task, indexes in groups.items()}
    return Answered(
        name, summary_of(scores), tasks if set(tasks) != {""} else {},
        None if first is None else difference(scores, first, measure),
        None if first is None else difference(scores, first, "exact"), tuple(scores),
    )  # fmt: skip


def compare_answers(
    outputs: Sequence[str], items: Sequence[Item], data: str, *, base: str | None = None, device: str = "cpu",
    told: Callable[[str], None] | None = None,
) -> Answers:  # fmt: skip
    """Ask each output every item, one model in memory after another. `base` is for adapters.

    Raises what merging and loading an output raises (`merger.evaluation.instances.instance`), and SourceError of an
    item that a tokenizer cannot take.
    """
    if not outputs:
        raise ManifestError.of("bad-arguments", "no output is named", where="OUTPUT…", fix="name one or more")
    check_device(device)
    found: list[list[Score]] = []
    with Kept() as kept:
        for number, output in enumerate(outputs):
            if told is not None:
                told(f"asking {output}")
            keep = kept if not number and len(outputs) > 1 else None
            found.append(_asked(output, items, base, device, keep, kept if number else None))
    first = found[0]
    one_vocabulary = all([s.tokens for s in scores] == [s.tokens for s in first] for scores in found)
    measure: Measure = "nll" if one_vocabulary else "nll_per_byte"
    return Answers(
        data,
        tuple(
            answered(output, items, scores, first if number else None, measure)
            for number, (output, scores) in enumerate(zip(outputs, found, strict=True))
        ),
        one_vocabulary,
    )


def _asked(
    output: str, items: Sequence[Item], base: str | None, device: str, keep: Kept | None, against: Kept | None
) -> list[Score]:
    """The scores of one output. Its model is gone when this returns."""
    with instance(output, base=base, device=device) as model:
        return score_items(model, items, keep=keep, against=against)
