"""`raymerge compare` and `raymerge tune`: the commands that make models."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from jobs import show
from jobs.exits import guarded
from jobs.options import DebugOption, JsonOption, PluginOption, SetOption, load_plugins
from merger.errors import ManifestError

DataOption = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="FILE", help="Items to ask: .jsonl of prompt and answer, messages or text; or text."
    ),
]
AskDeviceOption = Annotated[str, typer.Option("--device", help="Where models are asked: cpu or cuda.")]


def compare_command(
    outputs: Annotated[list[str], typer.Argument(metavar="OUTPUT…")],
    base: Annotated[
        str | None, typer.Option("--base", help="The model that they were trained from; default the first, or theirs.")
    ] = None,
    data: DataOption = None,
    device: AskDeviceOption = "cpu",
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Hold outputs, sources and bases against each other: what each changed, or with --data what each answers."""

    def work() -> None:
        if data is None:
            from merger.evaluation.changes import compare_changes

            changes = compare_changes(outputs, base=base)
            show.either(changes, json_=json_)
            return
        from merger.evaluation.answers import compare_answers
        from merger.evaluation.items import load_items

        answers = compare_answers(outputs, load_items(data), data, base=base, device=device, told=show.note)
        show.either(answers, json_=json_)

    guarded(work, json_=json_, debug=debug)


def tune_command(
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST")],
    data: DataOption = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            "--over", metavar="KEY=[VALUE, …]", help="Values of a key to try, every combination; default of lambda."
        ),
    ] = None,
    by: Annotated[Literal["nll", "exact"], typer.Option("--by", help="What is best: likelihood, or answers.")] = "nll",
    check: Annotated[
        str | None, typer.Option("--check", metavar="FILE", help="Other items, for the best and the manifest as it is.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="What merged adapters are asked on.")] = None,
    set_: SetOption = None,
    plugin: PluginOption = None,
    device: AskDeviceOption = "cpu",
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Choose a merge's parameters by what the merges answer. Writes no output: it says what to --set."""

    def work() -> None:
        from merger.evaluation.items import load_items
        from merger.evaluation.tune import parse_over, tune

        if data is None:
            raise ManifestError.of("bad-arguments", "there is nothing to choose by", where="--data",
                                   why="merges are chosen by what they answer", fix="give --data FILE")  # fmt: skip
        load_plugins(plugin)
        found = tune(
            manifest, load_items(data), data, over=parse_over(over or ()), by=by,
            check=() if check is None else load_items(check), overrides=set_ or (), base=base, device=device,
            told=show.note,
        )  # fmt: skip
        show.either(found, json_=json_)

    guarded(work, json_=json_, debug=debug)
