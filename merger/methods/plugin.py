"""Methods of one's own: a Python file that is named on the command line, or comes with an installed package.

    METHOD_API = 1
    from merger.methods.plugin import ParameterSpec, TileBlock, method

    @method(name="median", summary="the middle of the deltas", any_order=True)
    def median(deltas, weights): ...                     # whole tensors of torch, one tensor back

    @method(name="damped", summary="…", parameters=(ParameterSpec(…),))
    class Damped(TileBlock): ...                         # statistics, then a map; streamed

A plugin is one file, known by the SHA-256 of its bytes, which stands in the plan's digest and in raymerge.json; workers
elsewhere are sent its text. It is loaded before a manifest is looked at, so that it is validated, planned, documented
and checked (`check_method`) as every other method. A manifest never names one: reading data must not run code.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import keyword
import re
import sys
import threading
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, cast

import numpy as np

from merger.errors import ManifestError, MergeFailedError, PlanError, RaymergeError
from merger.methods import COMBINATION_TYPES, METHODS
from merger.methods.compose import WORDS
from merger.methods.declare import MethodSpec, ParameterSpec
from merger.methods.facts import IN_FIELDS
from merger.methods.parameters import LAMBDA, WEIGHT
from merger.methods.rounds import Call, Statistic
from merger.methods.tiles import F32, F64, Known, TensorExtent, Tile, TileBlock, dot
from merger.methods.whole import WholeBlock

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ENTRY_POINTS",
    "F32",
    "F64",
    "METHOD_API",
    "Call",
    "Known",
    "ParameterSpec",
    "Plugin",
    "Statistic",
    "TensorExtent",
    "Tile",
    "TileBlock",
    "WholeBlock",
    "adopt",
    "check_method",
    "dot",
    "load_installed",
    "load_plugin",
    "method",
    "plugins_of",
]

METHOD_API: Final = 1
"""The version of what this file offers to plugins. It is counted up when one that was written for it would break."""
ENTRY_POINTS: Final = "raymerge.methods"
"""Group under which an installed package names its plugin modules."""

_DECLARED: Final = "_raymerge_method"
_NAME: Final = re.compile(r"[a-z][a-z0-9_]*")
_BUILT_IN: Final = frozenset({*METHODS, *COMBINATION_TYPES, *WORDS})
_DEFAULT_MULTIPLE: Final = 3
"""What a function is reckoned to hold beside its sources, in multiples of them: enough to sort them with indices."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """A loaded plugin: all that another process needs to load the same."""

    name: str
    """The file's name, or `distribution version: entry point`."""
    source: str
    """Its text."""
    methods: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """How raymerge.json names it."""
        return {"name": self.name, "sha256": self.sha256, "methods": list(self.methods)}


_LOADED: Final[dict[str, Plugin]] = {}
"""By method."""
_LOCK: Final = threading.RLock()
_PLANNED: Final = frozenset({"rounds", "fitted"})
"""What of a block is asked while a merge is planned."""


# ---- declaring -------------------------------------------------------------------------------------------------------

_F = TypeVar("_F", bound="Callable[..., Any]")


def method(
    *,
    name: str,
    summary: str = "",
    parameters: Sequence[ParameterSpec] = (),
    space: Literal["delta", "weight"] = "delta",
    sources: int | None = None,
    bytes: int | Callable[[int, int, int], int] | None = None,  # noqa: A002 - the word of the seam
    any_order: bool = False,
    one_is_itself: bool = False,
    paper: str = "",
    bibtex: str = "",
) -> Callable[[_F], _F]:
    """Declare a function on whole tensors, or a TileBlock, as a merge method.

    `weight`, and in the space of deltas `lambda`, come by themselves; `parameters` are the method's own. `sources`
    fixes how many it merges. `bytes` is what the function holds at its peak beside the sources' float32, as multiples
    of them or as a function of (rows, cols, sources); 3 where it is not given. The function takes
    (deltas, weights, **parameters): float32 tensors (m, n), or (m,) of a vector, and one float a source; it returns a
    float32 tensor of that shape and leaves what it was given alone.
    `any_order` and `one_is_itself` are claims that `check_method` tests.

    Raises ManifestError(code `bad-plugin`).
    """

    def declare(made: _F) -> _F:
        declared = MethodSpec(
            name=name, summary=summary or _first_line(made), spaces=(space,), combine="block",
            parameters=(WEIGHT, *parameters, *((LAMBDA,) if space == "delta" else ())),
            base="required" if space == "delta" else "member", max_sources=sources, closed_on_deltas=space == "delta",
            cut="elements", paper=paper, bibtex=bibtex, any_order=any_order, one_is_itself=one_is_itself,
        )  # fmt: skip
        _check_declaration(declared, tuple(parameters))
        if isinstance(made, type):
            if not issubclass(made, TileBlock):
                raise _bad(name, f"{made.__name__} is no TileBlock", "a class streams tiles, a function takes tensors")
            if bytes is not None:
                raise _bad(name, "a TileBlock declares bytes", "it is streamed, and the block's memory is the plan's")
            block = _guarded(made, name)
            declared = replace(declared, tile=block, cut="rows" if block.whole_rows else "elements")
        else:
            _check_signature(name, made, parameters)
            whole = _Function(name, made, tuple(parameters), bytes)
            declared = replace(declared, whole=whole, cut="whole")
        setattr(made, _DECLARED, declared)
        return made

    return declare


def spec_of(declared: object) -> MethodSpec:
    """The spec of a method, by its name, or of what `@method` stands over. Raises ValueError."""
    if isinstance(declared, MethodSpec):
        return declared
    found = METHODS.get(declared) if isinstance(declared, str) else getattr(declared, _DECLARED, None)
    if not isinstance(found, MethodSpec):
        raise ValueError(f"{declared!r} is no method")
    return found


def _first_line(made: object) -> str:
    return (inspect.getdoc(made) or "").partition("\n")[0].strip().rstrip(".")


def _bad(where: str, what: str, why: str = "", fix: str = "") -> ManifestError:
    return ManifestError.of("bad-plugin", what, where=where, why=why, fix=fix or "see `merger/methods/plugin.py`")


def _check_declaration(declared: MethodSpec, own: tuple[ParameterSpec, ...]) -> None:
    name = declared.name
    if not _NAME.fullmatch(name):
        raise _bad(name, f"{name!r} cannot name a method", "a name is lower-case letters, digits and _")
    if name in _BUILT_IN:
        raise _bad(name, f"{name} is a name of raymerge's own", "it would mean two things", "choose another name")
    if not declared.summary:
        raise _bad(name, f"{name} has no summary", "the table of methods has a line for it", "write summary=…")
    if declared.spaces[0] not in ("delta", "weight"):
        raise _bad(name, f"{declared.spaces[0]!r} is no space of a plugin", "it works on deltas or on weights")
    names = [p.name for p in own]
    for p in own:
        if p.name in IN_FIELDS or not p.name.isidentifier() or keyword.iskeyword(p.name) or names.count(p.name) > 1:
            raise _bad(
                name,
                f"{p.name!r} cannot name a parameter of {name}",
                "it is given by raymerge, given twice, or no name of an argument",
                "choose another name",
            )
        if p.scope == "source" and p.kind not in ("float", "int"):
            raise _bad(
                name,
                f"{p.name} is one {p.kind} a source",
                "parameters of a source are numbers",
                "make its scope global",
            )


def _check_signature(name: str, function: Callable[..., Any], parameters: Sequence[ParameterSpec]) -> None:
    try:
        inspect.signature(function).bind((), (), **{p.name: None for p in parameters})
    except TypeError as error:
        wanted = ", ".join(["deltas", "weights", *(p.name for p in parameters)])
        raise _bad(
            name,
            f"the function of {name} does not take ({wanted})",
            str(error),
            "give it these arguments, and declare each of its others in `parameters`",
        ) from None


# ---- what stands between the engine and a plugin ---------------------------------------------------------------------


class _Function(WholeBlock):
    """A function on whole tensors as the engine calls it."""

    def __init__(
        self, name: str, function: Callable[..., Any], parameters: tuple[ParameterSpec, ...],
        held: int | Callable[[int, int, int], int] | None,
    ) -> None:  # fmt: skip
        self.name = name
        self.function = function
        self.parameters = parameters
        self.held = _DEFAULT_MULTIPLE if held is None else held

    def bytes(self, rows: int, cols: int, count: int) -> int:
        if callable(self.held):
            return int(_guard_planning(self.name, self.held, rows, cols, count))
        return int(self.held * 4 * rows * cols * count)

    def merge(self, call: Call, deltas_Kmn: Sequence[Tensor], base_mn: Tensor | None, *, vector: bool) -> Tensor:
        import torch

        shape = deltas_Kmn[0].shape
        given = [d.reshape(-1) if vector else d for d in deltas_Kmn]
        versions = [d._version for d in given]  # noqa: SLF001 - torch counts what is done in place
        with torch.no_grad():
            out = _guard(self.name, self.function, given, call.weights, **self._arguments(call))
        if not isinstance(out, torch.Tensor) or out.dtype != torch.float32 or out.shape != given[0].shape:
            found = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, torch.Tensor) else type(out).__name__
            raise _broken(
                self.name, f"its result is {found}", f"a float32 tensor {tuple(given[0].shape)} was to come back"
            )
        if [d._version for d in given] != versions:  # noqa: SLF001 - as above
            raise _broken(self.name, "it changed a tensor that it was given", "others may read the same tensors")
        if any(out.untyped_storage().data_ptr() == d.untyped_storage().data_ptr() for d in given):
            out = out.clone()
        return out.reshape(shape).contiguous()

    def _arguments(self, call: Call) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for p in self.parameters:
            if p.scope == "global":
                found[p.name] = call.option(p.name)
            else:
                values = call.per_source(p.name)
                found[p.name] = tuple(int(v) for v in values) if p.kind == "int" else values
        return found


def _guarded(made: type[TileBlock], name: str) -> TileBlock:
    """The block, with a check of what its map gives, and errors that say whose they are."""

    def apply(self: TileBlock, call: Call, known: Known, tile: Tile) -> F32:
        out = _guard(name, made.apply, self, call, known, tile)
        if not isinstance(out, np.ndarray) or out.dtype != np.float32 or out.shape != tile.x_Kn.shape[1:]:
            found = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
            raise _broken(name, f"its tile is {found}", f"a float32 array {tile.x_Kn.shape[1:]} was to come back")
        return out

    def passed(word: str) -> Callable[..., Any]:
        own = getattr(made, word)
        if word in _PLANNED:
            return lambda self, *arguments: _guard_planning(name, own, self, *arguments)
        return lambda self, *arguments: _guard(name, own, self, *arguments)

    members: dict[str, Any] = {word: passed(word) for word in ("rounds", "fitted", "empty", "measure", "conclude")}
    return cast("TileBlock", type(made.__name__, (made,), {**members, "apply": apply})())


def _guard(name: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a plugin's code. What it raises becomes an error of the merge, but for lack of memory."""
    try:
        return function(*arguments, **named)
    except (RaymergeError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise _broken(name, f"it raised {type(error).__name__}: {error}", _place(error)) from error


def _guard_planning(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The same while nothing has been written yet."""
    try:
        return _guard(name, function, *arguments)
    except MergeFailedError as error:
        raise PlanError(error.problems) from error


def _place(error: BaseException) -> str:
    """Where in the plugin an error came from."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").startswith(_MODULE):
            found = f"{trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _broken(name: str, what: str, why: str) -> MergeFailedError:
    return MergeFailedError.of(
        "plugin-failed", f"the method {name} failed: {what}", where=f"method {name}", why=why,
        fix="mend the plugin; `raymerge methods NAME --check` looks for such faults",
    )  # fmt: skip


# ---- loading ---------------------------------------------------------------------------------------------------------

_MODULE: Final = "raymerge_plugin_"


def load_plugin(path: str | Path) -> Plugin:
    """Load a plugin file; one that is loaded already is left as it is.

    Raises ManifestError(code `bad-plugin`).
    """
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise _bad(str(path), "the plugin cannot be read", error.strerror or "", "check the path") from None
    except UnicodeDecodeError:
        raise _bad(str(path), "the plugin is not UTF-8 text", "", "name a .py file") from None
    return _load(Path(path).name, text, str(path))


_INSTALLED: list[tuple[Plugin, ...]] = []


def load_installed() -> tuple[Plugin, ...]:
    """Load the plugins that installed packages name under `raymerge.methods`, once a process.

    Raises ManifestError(code `bad-plugin`) naming the package.
    """
    with _LOCK:
        if not _INSTALLED:
            found = importlib.metadata.entry_points(group=ENTRY_POINTS)
            _INSTALLED.append(tuple(_load_entry(point) for point in sorted(found, key=lambda p: (p.name, p.value))))
        return _INSTALLED[0]


def _load_entry(point: importlib.metadata.EntryPoint) -> Plugin:
    owner = "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
    name = f"{owner}: {point.name}"
    try:
        found = importlib.util.find_spec(point.module)
    except ImportError as error:
        raise _bad(name, f"the module {point.module} cannot be found", str(error), f"mend or remove {owner}") from None
    origin = None if found is None else found.origin
    if point.attr or origin is None or not origin.endswith(".py"):
        raise _bad(
            name,
            f"{point.value} is no plugin",
            "an entry point names a module that is one .py file",
            f"mend or remove {owner}",
        )
    return _load(name, Path(origin).read_bytes().decode(), origin)


def adopt(plugins: Iterable[Plugin]) -> None:
    """Load what a plan was made with, from its text, where this process has not got it.

    Raises PlanError(code `plugin-differs`) where it has another plugin of the same method.
    """
    for plugin in plugins:
        with _LOCK:
            for name in plugin.methods:
                known = _LOADED.get(name)
                if known is not None and known.sha256 != plugin.sha256:
                    raise PlanError.of(
                        "plugin-differs", f"the method {name} is another one in this process", where=plugin.name,
                        why=f"the plan was made with {plugin.sha256[:12]}, and {known.name} here is "
                        f"{known.sha256[:12]}",
                        fix="use one version of the plugin everywhere",
                    )  # fmt: skip
            if all(name in _LOADED for name in plugin.methods):
                continue
            if not set(plugin.methods) <= set(_load(plugin.name, plugin.source, plugin.name).methods):
                raise PlanError.of(
                    "plugin-differs", "a plugin declares other methods in this process", where=plugin.name,
                    why=f"the plan was made with {', '.join(plugin.methods)}",
                    fix="declare methods whatever the machine",
                )  # fmt: skip


def plugins_of(methods: Iterable[str]) -> tuple[Plugin, ...]:
    """The plugins that these methods come from, in the order of their names."""
    found = {plugin.sha256: plugin for name in methods if (plugin := _LOADED.get(name)) is not None}
    return tuple(sorted(found.values(), key=lambda plugin: (plugin.name, plugin.sha256)))


def _load(name: str, source: str, where: str) -> Plugin:
    digest = hashlib.sha256(source.encode()).hexdigest()
    with _LOCK:
        for known in _LOADED.values():
            if known.sha256 == digest:
                return known
        _check_source(source, where)
        module = types.ModuleType(f"{_MODULE}{digest[:16]}")
        module.__file__ = where
        sys.modules[module.__name__] = module  # dataclasses and inspect look there
        try:
            exec(compile(source, where, "exec", dont_inherit=True), module.__dict__)  # noqa: S102 - what it is for
            specs = _declared_in(module, where)
        except RaymergeError as error:
            del sys.modules[module.__name__]
            raise ManifestError([replace(p, where=_within(where, p.where)) for p in error.problems]) from None
        except Exception as error:
            del sys.modules[module.__name__]
            why = f"{type(error).__name__}: {error}"
            raise _bad(where, "the plugin cannot be loaded", why, "mend it; `--debug` shows where it failed") from error
        plugin = Plugin(name, source, tuple(specs))
        METHODS.update(specs)
        _LOADED.update(dict.fromkeys(specs, plugin))
        return plugin


def _within(where: str, inner: str) -> str:
    return where if inner in ("", where) else f"{where}: {inner}"


def _check_source(source: str, where: str) -> None:
    """What can be said of a plugin before any of it runs."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise _bad(where, "the plugin is no Python", str(error), "mend it") from None
    named = [value for node in tree.body if (value := _method_api(node)) is not None]
    if not named:
        raise _bad(
            where,
            "the plugin does not say for which METHOD_API it was written",
            "another version might call it in another way",
            f"write METHOD_API = {METHOD_API} in it",
        )
    if named != [METHOD_API]:
        raise _bad(
            where,
            f"the plugin was written for METHOD_API {named[-1]}, and this raymerge has {METHOD_API}",
            "it would be called in another way than it expects",
            "use a version of the plugin, or of raymerge, that fits the other",
        )
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise _bad(
                f"{where}:{node.lineno}",
                "a plugin imports nothing relative to itself",
                "it is one file: that is what its digest covers, and what workers are sent",
                "put it all into one file",
            )


def _method_api(node: ast.stmt) -> object:
    """The value of `METHOD_API = …`, where a statement is that; a name for one that is not written out."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    if not any(isinstance(target, ast.Name) and target.id == "METHOD_API" for target in targets):
        return None
    value = getattr(node, "value", None)
    return value.value if isinstance(value, ast.Constant) and type(value.value) is int else "that is no number"


def _declared_in(module: types.ModuleType, where: str) -> dict[str, MethodSpec]:
    specs: dict[str, MethodSpec] = {}
    for made in {id(value): value for value in vars(module).values()}.values():
        spec = getattr(made, "__dict__", {}).get(_DECLARED) if callable(made) else None
        if not isinstance(spec, MethodSpec) or made.__module__ != module.__name__:
            continue
        if spec.name in specs:
            raise _bad(where, f"the plugin declares {spec.name} twice", "", "give each method its own name")
        if spec.name in METHODS:
            other = _LOADED[spec.name].name if spec.name in _LOADED else "raymerge"
            raise _bad(
                where,
                f"there is a method {spec.name} already, of {other}",
                "a name means one thing",
                "choose another name, or name one plugin; a changed file needs a new process",
            )
        specs[spec.name] = spec
    if not specs:
        raise _bad(where, "the plugin declares no method", "", "put @method(name=…) over a function or a TileBlock")
    return specs


def check_method(declared: object, *, seed: int = 0, **values: Any) -> None:
    """Check a method on random and on hostile inputs: see merger/methods/check.py."""
    from merger.methods.check import check_method as check

    check(spec_of(declared), seed=seed, **values)
