"""Sources that no file holds: random numbers, computed as they are read, and router gates, made before a run.

Each is a store like any other, so that planning, reading and digests know nothing of them. A random number is a hash of
where it stands (kernels/hashing.py), so any range can be read by itself and gives the same bits on every machine: the
arithmetic below is exactly rounded operations alone (no library's log or cos).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from merger.catalog import Catalog, StoredTensor
from merger.errors import SourceChangedError, SourceError
from merger.kernels.hashing import element_hashes
from merger.storage.base import FileStat, RangeRead
from merger.tensors import F32, TensorSpec

Floats = npt.NDArray[np.float64]

# Rational approximations of the inverse of the normal distribution: M. J. Wichura, Algorithm AS 241 (PPND16), Applied
# Statistics 37 (1988). Numerators and denominators, highest power first.
_CENTRE: Final = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip
_NEAR: Final = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0),
)  # fmt: skip
_FAR: Final = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
     2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0),
    (2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
     1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0),
)  # fmt: skip
_CHUNK: Final = 1 << 18


def _ratio(terms: tuple[tuple[float, ...], tuple[float, ...]], x: Floats) -> Floats:
    above, below = (np.full_like(x, polynomial[0]) for polynomial in terms)
    for a, b in zip(terms[0][1:], terms[1][1:], strict=True):
        above, below = above * x + a, below * x + b
    return above / below


_LN2: Final = 0.6931471805599453094


def _minus_log(x: Floats) -> Floats:
    """-ln x for x in (0, 1), from ln m = 2·artanh((m-1)/(m+1)), whose series ends below float64's last bit."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < 0.7071067811865476
    mantissa, exponent = np.where(low, mantissa * 2, mantissa), exponent - low
    s = (mantissa - 1) / (mantissa + 1)
    square, total = s * s, np.zeros_like(s)
    for k in range(21, 0, -2):
        total = total * square + 1.0 / k
    found: Floats = -(2 * s * total + exponent * _LN2)
    return found


def normal_quantile(p: Floats) -> Floats:
    """The standard normal number below which lies the share p in (0, 1)."""
    q = p - 0.5
    central = q * _ratio(_CENTRE, 0.180625 - q * q)
    tail = np.abs(q) > 0.425
    if tail.any():
        r = np.sqrt(_minus_log(np.minimum(p, 1 - p)[tail]))
        far = np.where(r <= 5, _ratio(_NEAR, r - 1.6), _ratio(_FAR, r - 5))
        central[tail] = np.where(q[tail] < 0, -far, far)
    return central


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """A tensor of random numbers."""

    key: int
    """64 bits: kernels/hashing.py."""
    distribution: Literal["normal", "uniform"]
    scale: float
    """The standard deviation; of `uniform` the bound: numbers lie in (-scale, scale)."""
    numel: int

    def values(self, first: int, count: int) -> npt.NDArray[np.float32]:
        """Elements [first, first + count)."""
        share = (element_hashes(first, count, self.key).astype(np.float64) + 0.5) / 2**32
        unit = normal_quantile(share) if self.distribution == "normal" else share * 2 - 1
        return (unit * self.scale).astype(np.float32)


@dataclass(frozen=True, slots=True)
class RandomStore:
    """Random numbers as files of float32, one a tensor."""

    tensors: dict[str, RandomTensor]

    @property
    def uri(self) -> str:
        return "generated:random"

    @property
    def remote(self) -> bool:
        return False

    def list_files(self) -> tuple[str, ...]:
        return tuple(sorted(self.tensors))

    def resolve(self, names: Sequence[str]) -> None:
        """Nothing to find out beforehand."""

    def stat(self, name: str) -> FileStat:
        tensor = self._tensor(name)
        return FileStat(4 * tensor.numel, f"random:{tensor.distribution}:{tensor.scale!r}:{tensor.key}:{tensor.numel}")

    def read_into(self, name: str, reads: Sequence[RangeRead], *, pin: str | None = None) -> None:
        tensor = self._tensor(name)
        if pin is not None and pin != self.stat(name).pin:
            raise SourceChangedError.of("source-changed", f"{name} is other random numbers", where=self.uri)
        for read in reads:
            into = np.frombuffer(read.into.cast("B"), np.float32)
            first = read.start // 4
            if read.start % 4 or first + into.size > tensor.numel:
                raise SourceError.of("truncated", f"{name} has {tensor.numel} numbers", where=self.uri)
            for at in range(0, into.size, _CHUNK):
                count = min(_CHUNK, into.size - at)
                into[at : at + count] = tensor.values(first + at, count)

    def _tensor(self, name: str) -> RandomTensor:
        if name not in self.tensors:
            raise SourceError.of("no-such-file", f"there is no file {name}", where=self.uri)
        return self.tensors[name]


def random_catalog(seed: int) -> Catalog:
    """A source of random tensors, none yet."""
    return Catalog(
        reference=f"generated:random (seed {seed})", kind="generated", store=RandomStore({}), pins={}, tensors={},
        config={},
    )  # fmt: skip


def add_random(catalog: Catalog, name: str, shape: tuple[int, ...], tensor: RandomTensor) -> None:
    """Put a tensor into it. Only while a plan is being made."""
    assert isinstance(catalog.store, RandomStore)
    catalog.store.tensors[name] = tensor
    catalog.pins[name] = catalog.store.stat(name).pin
    catalog.tensors[name] = StoredTensor(TensorSpec(name, F32, shape), name, 0)


@dataclass(frozen=True, slots=True)
class GivenStore:
    """Small tensors that are computed before a run from what `pin` is the digest of, and travel with the plan."""

    label: str
    pin: str
    sizes: Mapping[str, int]
    """Bytes of each file."""
    data: Mapping[str, bytes] | None = field(default=None, repr=False)
    """None until they are computed."""

    @property
    def uri(self) -> str:
        return f"generated:{self.label}"

    @property
    def remote(self) -> bool:
        return False

    def list_files(self) -> tuple[str, ...]:
        return tuple(sorted(self.sizes))

    def resolve(self, names: Sequence[str]) -> None:
        """Nothing to find out beforehand."""

    def stat(self, name: str) -> FileStat:
        if name not in self.sizes:
            raise SourceError.of("no-such-file", f"there is no file {name}", where=self.uri)
        return FileStat(self.sizes[name], self.pin)

    def read_into(self, name: str, reads: Sequence[RangeRead], *, pin: str | None = None) -> None:
        if pin is not None and pin != self.stat(name).pin:
            raise SourceChangedError.of("source-changed", f"{name} is computed from something else", where=self.uri)
        if self.data is None:
            raise SourceError.of("not-made", f"{self.label} are not computed yet", where=self.uri)
        for read in reads:
            into = read.into.cast("B")
            into[:] = self.data[name][read.start : read.start + into.nbytes]
