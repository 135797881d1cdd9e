"""The experiment's tables, from its committed measurements alone: means, bootstrap intervals, Markdown."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tests.experiment.rows import FLIPPED, ROTATED, ROWS, SAME
from tests.experiment.tasks import ARMS, SEEDS, TASKS, TEST, TRAININGS

RESULTS: Final = Path(__file__).parent / "results.jsonl.gz"
RESAMPLES: Final = 2000
REFERENCE: Final = "task_arithmetic"

Line = dict[str, Any]
F64 = npt.NDArray[np.float64]
Key = tuple[str, str, str, str]
"""Arm, row, default or tuned, task."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over items, tasks and seeds, and where 95 % of its resamples lie."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Resamples:
    """How often each seed and each test item is drawn: the same draws for every row, so that differences are paired."""

    seeds_RS: F64
    items_Rn: dict[str, F64]

    @classmethod
    def draw(cls, count: int = RESAMPLES) -> Resamples:
        """The drawing itself, and after it `count` resamples of the seeds and of each task's items."""
        rng = np.random.default_rng(0)

        def counts(n: int) -> F64:
            drawn = rng.multinomial(n, np.full(n, 1 / n), size=count) / n
            return np.concatenate([np.full((1, n), 1 / n), drawn])

        return cls(counts(len(SEEDS)), {task: counts(TEST) for task in TASKS})

    def mean(self, values_Sn: F64, task: str) -> F64:
        """(R + 1,): the mean itself, then that of each resample."""
        found: F64 = np.sum((self.seeds_RS @ values_Sn) * self.items_Rn[task], axis=1)
        return found


def interval(values_R: F64) -> Interval:
    """The first value, and the 2.5th and 97.5th percentiles of the others."""
    low, high = np.percentile(values_R[1:], [2.5, 97.5])
    return Interval(float(values_R[0]), float(low), float(high))


def read_results(path: Path = RESULTS) -> list[Line]:
    """The committed measurements."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_results(lines: Sequence[Line], path: Path = RESULTS) -> None:
    """Write measurements, compressed; the same lines give the same bytes."""
    text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as file:
        file.write(text.encode())


class Results:
    """The measurements, found by what they are of."""

    def __init__(self, lines: Iterable[Line]) -> None:
        """Sort the lines by what they say."""
        lines = list(lines)
        self.merges = {(x["arm"], x["row"], x["seed"]): x for x in lines if x["what"] == "merge"}
        self.same = [x for x in lines if x["what"] == "same"]
        chosen: dict[tuple[str, str, int], float] = {}
        right: dict[Key, dict[int, F64]] = defaultdict(dict)
        loss: dict[Key, dict[int, F64]] = defaultdict(dict)
        for x in lines:
            if x["what"] != "scores":
                continue
            key = (x["arm"], x["row"], x["at"], x["task"])
            if x["at"] == "tuned":
                chosen[x["arm"], x["row"], x["seed"]] = float(x["scale"])
            right[key][x["seed"]] = np.array([c == "1" for c in x["right"]], np.float64)
            loss[key][x["seed"]] = np.array(x["loss"], np.float64)
        for arm, row, seed in self.merges:
            for task in ARMS[arm].tasks if arm in ARMS else ():
                if seed not in right[arm, row, "tuned", task]:  # validation chose 1: what was measured already
                    right[arm, row, "tuned", task][seed] = right[arm, row, "default", task][seed]
                    loss[arm, row, "tuned", task][seed] = loss[arm, row, "default", task][seed]
        self.right = {key: _by_seed(found) for key, found in right.items()}
        self.loss = {key: _by_seed(found) for key, found in loss.items()}
        self._chosen = chosen
        self._draws = Resamples.draw()

    def measured(self, arm: str, row: str) -> bool:
        """Whether the row was measured at every seed."""
        return all((arm, row, seed) in self.merges for seed in SEEDS)

    def scales(self, arm: str, row: str) -> list[float]:
        """What validation chose, a scale a seed."""
        return [self._chosen.get((arm, row, seed), 1.0) for seed in SEEDS]

    def accuracy(self, arm: str, row: str, at: str, task: str) -> F64:
        """(R + 1,): the share of right answers."""
        return self._draws.mean(self.right[arm, row, at, task], task)

    def own(self, arm: str, task: str) -> F64:
        """(R + 1,): what the task's own adapters get right; the mean where the arm has several."""
        names = [name for name in ARMS[arm].sources if TRAININGS[name].task == task]
        found: F64 = np.mean([self.accuracy("single", f"adapter {name}", "default", task) for name in names], axis=0)
        return found

    def normalised(self, arm: str, row: str, at: str) -> F64:
        """(R + 1,): the mean over tasks of accuracy divided by that of the task's own adapter."""
        shares = [self.accuracy(arm, row, at, task) / self.own(arm, task) for task in ARMS[arm].tasks]
        found: F64 = np.mean(shares, axis=0)
        return found

    def mean_loss(self, arm: str, row: str, at: str) -> F64:
        """(R + 1,): the mean over tasks of the answers' NLL, in nats a token."""
        losses = [self._draws.mean(self.loss[arm, row, at, task], task) for task in ARMS[arm].tasks]
        found: F64 = np.mean(losses, axis=0)
        return found


def _by_seed(found: dict[int, F64]) -> F64:
    """(S, n): what does not depend on the seed was measured once."""
    if len(found) == 1:
        (only,) = found.values()
        return np.stack([only] * len(SEEDS))
    return np.stack([found[seed] for seed in SEEDS if seed in found])


# ------------------------------------------------------------------------------------------------------ Markdown


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _percent(x: Interval) -> str:
    return f"{100 * x.mean:.0f} ({100 * x.low:.0f} to {100 * x.high:.0f})"


def _signed(x: Interval) -> str:
    clear = "**" if x.low > 0 or x.high < 0 else ""
    return f"{clear}{100 * x.mean:+.0f} ({100 * x.low:+.0f} to {100 * x.high:+.0f}){clear}".replace("-", "−")


def single_table(results: Results) -> str:
    """Every adapter, and the base, on every task."""
    header = ["accuracy in %, loss in nats a token", *(f"`{task}`" for task in TASKS)]
    rows = []
    for row in ("base", *(f"adapter {name}" for name in TRAININGS)):
        label = row if row == "base" else f"`{row.removeprefix('adapter ')}`"
        cells = [
            f"{100 * results.right['single', row, 'default', task].mean():.0f}, "
            f"{results.loss['single', row, 'default', task].mean():.2f}"
            for task in TASKS
        ]
        rows.append([label, *cells])
    return _table(header, rows)


def arm_table(results: Results, arm: str) -> str:
    """Every row of an arm, best first by what it reaches at the scale that validation chose."""
    tasks = ARMS[arm].tasks
    header = [
        "method", "default: % of own", "loss", "tuned: % of own", "loss", f"over tuned `{REFERENCE}`", "scales",
        *(f"`{task}`" for task in tasks),
    ]  # fmt: skip
    reference = results.normalised(arm, REFERENCE, "tuned")

    def best(name: str) -> tuple[float, float]:
        return -round(float(results.normalised(arm, name, "tuned")[0]), 6), float(
            results.mean_loss(arm, name, "tuned")[0]
        )

    rows = []
    measured = [row.name for row in ROWS if results.measured(arm, row.name)]
    for name in sorted(measured, key=best):
        tuned = results.normalised(arm, name, "tuned")
        rows.append(
            [
                _code(name),
                _percent(interval(results.normalised(arm, name, "default"))),
                f"{results.mean_loss(arm, name, 'default')[0]:.2f}",
                _percent(interval(tuned)),
                f"{results.mean_loss(arm, name, 'tuned')[0]:.2f}",
                "" if name == REFERENCE else _signed(interval(tuned - reference)),
                ", ".join(f"{scale:g}" for scale in results.scales(arm, name)),
                *(f"{100 * results.accuracy(arm, name, 'tuned', task)[0]:.0f}" for task in tasks),
            ]
        )
    left = ", ".join(_code(row.name) for row in ROWS if row.name not in measured)
    return _table(header, rows) + (f"\n\nNot measured at every seed: {left}." if left else "")


def check_table(results: Results) -> str:
    """What must change, and what must not."""
    arm = "distinct"
    rows = [["base", "", "", _percent(interval(_base(results, arm)))]]
    rows += [
        [_code(name), "", "", _percent(interval(results.normalised(arm, name, "default")))]
        for name in (REFERENCE, FLIPPED.name)
        if results.measured(arm, name)
    ]
    for row in ROTATED:
        if not results.measured(arm, row.name):
            continue
        merges = [results.merges[arm, row.name, seed] for seed in SEEDS]
        rows.append(
            [
                _code(row.name),
                f"{max(float(m['rotation']) for m in merges):.0e}",
                _percent(interval(results.normalised(arm, row.name.removesuffix(", rotated"), "default"))),
                _percent(interval(results.normalised(arm, row.name, "default"))),
            ]
        )
    return _table(["check", "change of the merged ΔW", "unrotated: % of own", "% of own"], rows)


def _base(results: Results, arm: str) -> F64:
    shares = [results.accuracy("single", "base", "default", task) / results.own(arm, task) for task in ARMS[arm].tasks]
    found: F64 = np.mean(shares, axis=0)
    return found


def same_table(results: Results) -> str:
    """Rows that are others at their defaults."""
    worst: dict[str, float] = defaultdict(float)
    for line in results.same:
        for name, far in line["distance"].items():
            worst[name] = max(worst[name], float(far))
    return _table(
        ["at its defaults", "is", "relative distance"],
        [[f"`{row.name}`", f"`{reference}`", f"{worst[row.name]:.0e}"] for row, reference in SAME if row.name in worst],
    )


def _code(name: str) -> str:
    """The method's name as code, what is said of it as it is."""
    if name.startswith("PEFT "):
        return f"PEFT {_code(name.removeprefix('PEFT '))}"
    method, _, rest = name.partition(" ")
    bare = method.removesuffix(",")
    return f"`{bare}`{',' if bare != method else ''}{f' {rest}' if rest else ''}"


TABLES: Final[dict[str, Callable[[Results], str]]] = {
    "single": single_table,
    "distinct": lambda results: arm_table(results, "distinct"),
    "overlapping": lambda results: arm_table(results, "overlapping"),
    "checks": check_table,
    "same": same_table,
}


def with_tables(page: str, results: Results) -> str:
    """The page with every table between its marks as the results give it. Raises ValueError where a mark is missing."""
    for name, make in TABLES.items():
        start, end = f"<!-- experiment {name}: generated by `make experiment` -->\n", f"<!-- /experiment {name} -->"
        if start not in page or end not in page:
            raise ValueError(f"the page has no marks for the table {name}")
        before, rest = page.split(start, 1)
        after = rest.split(end, 1)[1]
        page = f"{before}{start}{make(results)}\n{end}{after}"
    return page
