"""Hot blocks for CPU and GPU.

hashing    which elements a random drop keeps (no torch: the planner uses it too)
cpu        compiled loops
bits       compiled loops on a checkpoint's bfloat16 bits, whole merges in one pass
codes      compiled loops of quantised weights
native     their machine code, kept between processes
plain      the same in torch: their specification, and what a GPU runs
dispatch   one interface over both
"""

from typing import Final

LANES: Final = 256
"""Partial sums of a Σ|x|: element i adds to the one of i mod LANES, then halves are added until one is left. Also the
elements that a compiled loop works on at once, so that they stay in the first cache."""
