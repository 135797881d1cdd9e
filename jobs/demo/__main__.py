"""The demo: python -m jobs.demo. Prepares the base, merges, folds, and asks every model the held-out prompts."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table

from jobs.demo.tasks import TASKS, Example

if TYPE_CHECKING:
    from jobs.demo.evaluate import Answers

ROOT: Final = Path(__file__).parents[2]
MANIFEST: Final = Path("manifests/demo/merge.yaml")
ADAPTERS: Final = Path("manifests/demo/adapters")
OUT: Final = "build/demo"
"""The folder the manifest names."""
ASKED: Final = 30
"""Prompts a task: the demo is to take less than three minutes on two cores."""
BETTER: Final = 0.25
"""How much more of the prompts than the base an adapter, or the merge, has to get right."""
MERGED_ADAPTER: Final = "merged adapter"
MERGED_MODEL: Final = "merged model"

console = Console(highlight=False, soft_wrap=False)


@contextmanager
def _step(title: str) -> Iterator[None]:
    """A step of the demo, with its seconds."""
    console.rule(f"[bold]{title}", align="left")
    started = time.perf_counter()
    yield
    console.print(f"[green]done[/] in {time.perf_counter() - started:.1f} s\n")


def _report(message: str) -> None:
    console.print(f"  {message}", markup=False)


REPLACING = ("--set", "output.exists=replace")
"""An earlier version of this checkout may have left its merge here."""


def _raymerge(*arguments: str) -> None:
    """Run the command as a user would, its output shown as it comes."""
    console.print(f"$ raymerge {shlex.join(arguments)}", markup=False, style="bold", soft_wrap=True)
    code = subprocess.run([sys.executable, "-m", "jobs.cli", *arguments], check=False).returncode
    if code:
        raise SystemExit(code)


def _manifest(out: Path) -> Path:
    """The committed manifest, or for another folder than its own a copy that names this one."""
    if out == Path(OUT):
        return MANIFEST
    copy = out / MANIFEST.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(MANIFEST.read_text(encoding="utf-8").replace(f"{OUT}/", f"{out}/"), encoding="utf-8")
    return copy


def _accuracies(found: list[Answers], count: int) -> Table:
    table = Table(title=f"Right answers to {count} held-out prompts of each task (exact match)", title_justify="left")
    table.add_column("model")
    for task in TASKS.values():
        table.add_column(f"{task.name}\n[dim]{task.title}", justify="right")
    for answers in found:
        shares = [
            f"[bold green]{share:.0%}" if share >= found[0].accuracy[task] + BETTER else f"{share:.0%}"
            for task, share in answers.accuracy.items()
        ]
        table.add_row(answers.name, *shares)
    return table


def _samples(found: list[Answers], prompts: dict[str, list[Example]], each: int) -> Iterator[Table]:
    for task, examples in prompts.items():
        for at, example in enumerate(examples[:each]):
            table = Table("model", "answer", title=f"{task}: {example.prompt}", title_justify="left", min_width=80)
            for answers in found:
                text = answers.texts[task][at]
                right = text == example.answer
                style = "green" if right else "red" if answers.name in {task, MERGED_ADAPTER, MERGED_MODEL} else "dim"
                shown = text.replace("\n", "⏎")
                table.add_row(answers.name, f"{'✓' if right else '✗'} {shown}", style=style)
            yield table


def _failures(found: list[Answers]) -> Iterator[str]:
    """What the demo promises and the answers do not keep."""
    by_name = {answers.name: answers.accuracy for answers in found}
    base = found[0].accuracy
    for task in TASKS:
        for name in (task, MERGED_ADAPTER, MERGED_MODEL):
            if by_name[name][task] < base[task] + BETTER:
                yield f"{name} gets {by_name[name][task]:.0%} of the {task} prompts right, the base {base[task]:.0%}"


def main() -> int:
    """Run the demo; the exit status says whether the merge does what the adapters do."""
    parser = argparse.ArgumentParser(prog="python -m jobs.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(OUT), help="where the models go (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=ASKED, help="held-out prompts a task (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="prompts a task whose answers are shown")
    options = parser.parse_args()
    started = time.perf_counter()
    out = Path(os.path.relpath(options.out, ROOT))
    os.chdir(ROOT)
    base, merged_adapter, merged_model = out / "base", out / "merged-adapter", out / "merged-model"

    with _step("1/4 The base: SmolLM2-135M-Instruct"):
        from jobs.demo.base import DemoError, prepare_base

        try:
            prepare_base(base, _report)
        except DemoError as error:
            console.print(f"error: {error}", markup=False, style="red", soft_wrap=True)
            return 1
    with _step("2/4 Three adapters merged into one"):
        _raymerge("merge", str(_manifest(out)), "--on", "ray", "--workers", "2", *REPLACING)
    with _step("3/4 The merged adapter folded into a full model"):
        fold = ("fold", str(merged_adapter), "-o", str(merged_model), "--base", str(base))
        _raymerge(*fold, "--on", "ray", *REPLACING)
    with _step("4/4 What they answer"):
        # On import, PEFT's bitsandbytes tells of an optional package that nothing here needs.
        logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
        from jobs.demo.evaluate import evaluate, held_out

        prompts = held_out(options.prompts)
        adapters = {task: ADAPTERS / task for task in TASKS} | {MERGED_ADAPTER: merged_adapter}
        try:
            found = evaluate(base, adapters, prompts, _report, name="base")
            found += evaluate(merged_model, {}, prompts, _report, name=MERGED_MODEL)
        except DemoError as error:
            console.print(f"error: {error}", markup=False, style="red", soft_wrap=True)
            return 1
    for table in _samples(found, prompts, options.samples):
        console.print(table)
    console.print(_accuracies(found, options.prompts))
    failures = list(_failures(found))
    for failure in failures:
        console.print(f"error: {failure}", style="red")
    console.print(f"The demo took {time.perf_counter() - started:.0f} s.")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
