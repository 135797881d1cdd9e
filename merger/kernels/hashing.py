"""Which elements a random drop keeps: a hash of where the element is, never a generator's state (design law 2).

For an element with flat index i and a 64-bit key (low and high half k0, k1), in 32-bit arithmetic:

    h = mix(low32(i) ^ k0);  h = mix(h + k1 + high32(i)·WEYL);  kept when h < density · 2³²

where mix is a 32-bit finaliser (two multiplications, three xor-shifts). The same on every device and for every cut.
The key is made from (seed, position in the manifest, tensor name, factor) by SHA-256. No torch here: the planner
uses it.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np
import numpy.typing as npt

MIX_A: Final = 0x7FEB352D
MIX_B: Final = 0x846CA68B
WEYL: Final = 0x9E3779B9


def element_key(seed: int, position: int, tensor: str, factor: str) -> int:
    """The 64-bit key of one source's tensor. `factor` is `delta`, `A` or `B`."""
    text = f"{seed}\0{position}\0{tensor}\0{factor}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def element_hashes(first: int, count: int, key: int) -> npt.NDArray[np.uint32]:
    """The hashes of `count` elements from flat index `first`, in plain numpy: where each has a bound of its own."""
    index = np.arange(first, first + count, dtype=np.uint64)
    h = _mixed((index & np.uint64(0xFFFFFFFF)).astype(np.uint32) ^ np.uint32(key & 0xFFFFFFFF))
    high = (index >> np.uint64(32)).astype(np.uint32) * np.uint32(WEYL)
    return _mixed(h + np.uint32(key >> 32) + high)


def _mixed(h: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    h = (h ^ (h >> np.uint32(16))) * np.uint32(MIX_A)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(MIX_B)
    return h ^ (h >> np.uint32(16))


def keep_limit(density: float) -> int:
    """density as a bound on 32-bit hashes; 2³² keeps everything."""
    return min(2**32, max(0, round(density * 2**32)))
