"""Options that several commands have, said once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

OutOption = Annotated[str | None, typer.Option("-o", "--out", help="Folder of the result.")]
OnOption = Annotated[str, typer.Option("--on", help="auto, here, ray, or the address of a cluster.")]
WorkersOption = Annotated[int | None, typer.Option("--workers", min=1, help="Threads here, actors on Ray.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
GpusOption = Annotated[
    float | None, typer.Option("--gpus-per-worker", help="On Ray with --device cuda: 1, or 0.5, 0.25 … to share a GPU.")
]
MemoryOption = Annotated[
    str | None, typer.Option("--memory", help="Buffers of all workers together, for example 4GB. Changes no byte.")
]
DeviceMemoryOption = Annotated[
    str | None,
    typer.Option("--device-memory", help="What a worker may take of its GPU, for example 20GB. Changes no byte."),
]
RestartOption = Annotated[bool, typer.Option("--restart", help="First remove what an earlier run left or made.")]
RunDirOption = Annotated[
    str | None,
    typer.Option("--run-dir", help="Where the state of a run lies whose output is a repository: a folder or s3://…"),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=YAML", help="Override a key, for example parameters.density=0.3."),
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Warnings about the manifest become errors.")]
PluginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin", metavar="FILE.py", help="A file with methods of one's own. It is run: name only your own."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
TimelineOption = Annotated[
    str | None,
    typer.Option("--timeline", metavar="FILE", help="Write what each worker did when, for ui.perfetto.dev."),
]
LogOption = Annotated[
    str | None, typer.Option("--log-format", help="plain or json, on standard error; default RAYMERGE_LOG_FORMAT.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def load_plugins(files: Sequence[str] | None) -> None:
    """What --plugin names, and what is installed: before any manifest is looked at, which may name their methods."""
    from merger.methods.plugin import load_installed, load_plugin

    load_installed()
    for file in files or ():
        load_plugin(file)
