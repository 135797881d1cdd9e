"""Machine code of the compiled kernels, kept between processes: numba makes it once, and is not imported again.

Importing numba and reading its own cache takes half a second of CPU time, as long as a small merge's arithmetic. So a
kernel is compiled behind a plain C signature, its LLVM module is rid of all that refers to numba's or Python's runtime,
and the object code is kept: beside the sources where that folder is writable, as numba does, else in the user's cache
folder. Later processes give it to LLVM's linker (llvmlite, which numba brings along) and call it by address, the GIL
released.

A file of object code names what it was made from (sources, numba, LLVM, this CPU) and its own SHA-256; anything else is
compiled anew. Where no folder is writable every process compiles; where a kernel would refer to more than itself, it
is numba's own function that is called.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

HERE: Final = Path(__file__).parent
SOURCES: Final = ("__init__", "bits", "codes", "cpu", "hashing", "native")
"""Files that decide what machine code a kernel has."""
_SCALARS: Final[dict[str, type[Any]]] = {"i8": ctypes.c_int64, "f4": ctypes.c_float, "f8": ctypes.c_double}


@dataclass(frozen=True, slots=True)
class Signature:
    """What a kernel takes and gives: (numpy dtype, dimensions) an argument, 0 dimensions for a number."""

    arguments: tuple[tuple[str, int], ...]
    returns: str
    """A dtype, or empty."""

    @classmethod
    def parse(cls, text: str) -> Signature:
        """`f4[:], i8 -> f8`: contiguous arrays by their dimensions, numbers bare, nothing after the arrow for none."""
        arguments, _, returns = (part.strip() for part in text.partition("->"))
        parts = arguments.replace("[:,:]", "2").replace("[:]", "1").split(",")
        return cls(tuple((p.strip()[:2], int(p.strip()[2:] or 0)) for p in parts), returns)

    @property
    def c_types(self) -> tuple[Any, ...]:
        """Types of the arguments in C: an array is its address and its shape."""
        return tuple(
            kind
            for dtype, dimensions in self.arguments
            for kind in ([ctypes.c_void_p, *[ctypes.c_int64] * dimensions] if dimensions else [_SCALARS[dtype]])
        )


@dataclass(frozen=True, slots=True)
class ObjectCode:
    """One kernel, compiled: position-independent but for itself."""

    symbol: str
    signature: str
    code: bytes


class Kernel:
    """A compiled kernel. Arrays must have its dtypes, and be contiguous."""

    __slots__ = ("_arguments", "_function", "_name", "_owner")

    def __init__(self, name: str, signature: Signature, address: int, owner: object) -> None:
        self._name = name
        self._arguments: tuple[tuple[Any, int], ...] = tuple(
            (np.dtype(dtype) if dimensions else _number(dtype), dimensions) for dtype, dimensions in signature.arguments
        )
        result = _SCALARS[signature.returns] if signature.returns else None
        self._function = ctypes.CFUNCTYPE(result, *signature.c_types)(address)
        self._owner = owner  # the machine code lives as long as this

    def __call__(self, *arguments: Any) -> Any:
        """Raises TypeError for an array that the machine code would misread."""
        flat: list[Any] = []
        for (kind, dimensions), value in zip(self._arguments, arguments, strict=True):
            if dimensions:
                if value.dtype != kind or value.ndim != dimensions or not value.flags.c_contiguous:
                    raise TypeError(f"{self._name} takes contiguous {kind} of {dimensions} dimensions")
                flat.append(value.ctypes.data)
                flat += value.shape
            else:
                flat.append(kind(value))
        return self._function(*flat)


def _number(dtype: str) -> Callable[[Any], int | float]:
    return int if dtype == "i8" else float


class Library:
    """The kernels of one module of this folder as attributes, each ready at its first use. Safe for threads."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("_"):
            raise AttributeError(name)
        with self._lock:
            if name not in self.__dict__:
                self.__dict__[name] = _ready(self._module, name)
        found: Kernel = self.__dict__[name]
        return found


CPU: Final = Library("cpu")
CODES: Final = Library("codes")
BITS: Final = Library("bits")


# -------------------------------------------------------------------- from object code to a function


def _ready(module: str, name: str) -> Kernel:
    kept = _read(module, name)
    if kept is not None:
        return link(name, kept)
    made = compile_kernel(module, name)
    if isinstance(made, Kernel):
        return made
    _keep(module, name, made)
    return link(name, made)


def link(name: str, kept: ObjectCode) -> Kernel:
    """Object code as a function of this process."""
    binding = _llvm()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _target_machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(kept.code))
    engine.finalize_object()
    return Kernel(name, Signature.parse(kept.signature), engine.get_function_address(kept.symbol), engine)


@functools.cache
def _llvm() -> Any:
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding


def _target_machine() -> Any:
    binding = _llvm()
    return binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3
    )


# -------------------------------------------------------------------- from Python to object code


def compile_kernel(module: str, name: str) -> ObjectCode | Kernel:
    """A kernel's object code, or the kernel itself where its code does not stand alone. Imports numba.

    Raises AttributeError for a name that is no kernel.
    """
    made = importlib.import_module(f"{__package__}.{module}")
    if name not in made.SIGNATURES:
        raise AttributeError(f"{module} has no kernel {name}")
    text = made.SIGNATURES[name]
    signature = Signature.parse(text)
    entry = _with_c_signature(getattr(made, name), name, signature)
    code = _standing_alone(entry)
    if code is None:
        return Kernel(name, signature, entry.address, entry)
    return ObjectCode(entry.native_name, text, code)


def _with_c_signature(function: Any, name: str, signature: Signature) -> Any:
    """numba's C callback around a kernel: addresses and shapes in, arrays for the kernel."""
    numba: Any = importlib.import_module("numba")  # untyped
    types = numba.types

    numbers = {"i8": types.int64, "f4": types.float32, "f8": types.float64}
    names: list[str] = []
    kinds: list[Any] = []
    given: list[str] = []
    for at, (dtype, dimensions) in enumerate(signature.arguments):
        names.append(f"a{at}")
        if not dimensions:
            kinds.append(numbers[dtype])
            given.append(f"a{at}")
            continue
        kinds.append(types.CPointer(numba.from_dtype(np.dtype(dtype))))
        shape = [f"a{at}_{i}" for i in range(dimensions)]
        names += shape
        kinds += [types.int64] * dimensions
        given.append(f"carray(a{at}, ({', '.join(shape)},))")
    # numba knows no variable arguments here, so the wrapper is written out.
    source = f"def {name}({', '.join(names)}):\n    return kernel({', '.join(given)})\n"
    scope = {"kernel": function, "carray": numba.carray, "__name__": function.__module__}
    exec(source, scope)  # noqa: S102 - made of the names above alone
    returns = numbers[signature.returns] if signature.returns else types.void
    return numba.cfunc(returns(*kinds), error_model="numpy")(scope[name])


def _standing_alone(entry: Any) -> bytes | None:
    """Object code that refers to nothing outside it; None where some reference is left.

    No kernel raises or allocates. Once its functions are internal, LLVM sees that their status is constant, and what
    would have told Python of an error is dead.
    """
    binding = _llvm()
    module = binding.parse_assembly(entry.inspect_llvm())
    for function in module.functions:
        if not function.is_declaration and function.name != entry.native_name:
            function.linkage = "internal"
    machine = _target_machine()
    passes = binding.create_new_module_pass_manager()
    passes.add_ipsccp_pass()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, binding.create_pass_builder(machine, binding.create_pipeline_tuning_options()))
    if any(f.is_declaration and not f.name.startswith("llvm.") for f in module.functions):
        return None
    found: bytes = machine.emit_object(module)
    return found


# -------------------------------------------------------------------- files


@functools.cache
def _origin() -> str:
    """SHA-256 of all that decides the machine code."""
    binding = _llvm()
    digest = hashlib.sha256()
    compiler = importlib.util.find_spec("numba")  # found, not imported
    assert compiler is not None
    assert compiler.origin is not None
    digest.update(Path(compiler.origin).with_name("_version.py").read_bytes())
    for part in (binding.llvm_version_info, binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()):
        digest.update(f"{part}\0".encode())
    for source in SOURCES:
        digest.update((HERE / f"{source}.py").read_bytes())
    return digest.hexdigest()


def _folders() -> Iterator[Path]:
    """Where object code may lie, best first."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        yield Path(chosen)
        return
    yield HERE / "__pycache__"
    with contextlib.suppress(RuntimeError):  # no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raymerge"


def _file(module: str, name: str) -> str:
    return f"{module}.{name}.{_origin()[:16]}.o"


def _read(module: str, name: str) -> ObjectCode | None:
    for folder in _folders():
        with contextlib.suppress(OSError, ValueError, KeyError):
            head, _, code = (folder / _file(module, name)).read_bytes().partition(b"\n")
            said = json.loads(head)
            if said["origin"] == _origin() and said["sha256"] == hashlib.sha256(code).hexdigest():
                return ObjectCode(said["symbol"], said["signature"], code)
    return None


def _keep(module: str, name: str, made: ObjectCode) -> None:
    """Write a kernel's file, whole or not at all. Whoever comes second writes the same."""
    head = {
        "origin": _origin(), "sha256": hashlib.sha256(made.code).hexdigest(), "symbol": made.symbol,
        "signature": made.signature,
    }  # fmt: skip
    for folder in _folders():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, scratch = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            try:
                os.fchmod(descriptor, 0o644)  # an image is built by one user and used by others
                with open(descriptor, "wb") as file:
                    file.write(json.dumps(head).encode() + b"\n" + made.code)
                os.replace(scratch, folder / _file(module, name))
            except OSError:
                os.unlink(scratch)
                raise
            return
