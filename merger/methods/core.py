"""Methods in the core of adapters (Core Space, arXiv:2509.17786): core_ties, core_dare_ties, core_tsv, core_iso.

Elementwise rules depend on the coordinates. These are the core's reference coordinates (`lowrank.reference_core`). They
follow from the deltas alone, so the result does not depend on how an adapter's product is split into factors, nor, but
for what is drawn at random, on the order of the adapters. float64: cores are small.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from merger.methods.declare import MethodSpec
from merger.methods.parameters import DENSITY, DIVISOR, ELECT, LAMBDA, WEIGHT, normalize, rescale
from merger.methods.rounds import Call, kept
from merger.methods.spectral import Iso, SpectralCore, Tsv
from merger.methods.tiles import F64
from merger.methods.whole import CoreBlock

if TYPE_CHECKING:
    from torch import Tensor

    from merger.methods.lowrank import Core


def prepared(call: Call, source: int, x_n: F64) -> F64:
    """One source's elements after a trim or a drop, in float64."""
    if call.keeps_all(source):
        return x_n
    density = call.densities[source]
    if call.prepare == "trim":
        out = largest(x_n, kept(density, x_n.size, keep_one=call.keep_one))
    else:
        assert call.prepare == "drop"
        out = x_n * _mask(x_n.size, call.keys[source], density)
    if call.rescale == "inverse" and density > 0:
        return out / density
    if call.rescale == "l1":
        before, after = float(np.abs(x_n).sum()), float(np.abs(out).sum())
        return out * (before / after) if before >= 1e-7 and after >= 1e-7 else out
    return out


def largest(x_n: F64, count: int) -> F64:
    """The `count` largest magnitudes; of equal ones those with the lowest index."""
    if count >= x_n.size:
        return x_n
    out = np.zeros_like(x_n)
    if count <= 0:
        return out
    sizes = np.abs(x_n)
    cut = np.partition(sizes, x_n.size - count)[x_n.size - count]
    chosen = np.flatnonzero(sizes > cut)
    equal = np.flatnonzero(sizes == cut)[: count - len(chosen)]
    out[chosen], out[equal] = x_n[chosen], x_n[equal]
    return out


def _mask(size: int, key: int, density: float) -> F64:
    from merger.kernels.dispatch import CompiledKernels
    from merger.kernels.hashing import keep_limit

    ones = np.ones(size, np.float32)
    CompiledKernels().drop(ones, 0, key, keep_limit(density))
    return ones.astype(np.float64)


def combined(call: Call, x_Kn: F64) -> F64:
    """Sum, mean or election, as merger/methods/blocks.py has them, in float64."""
    weights = np.array(call.weights, np.float64)[:, None]
    products = x_Kn * weights
    if call.combine != "elect":
        total: F64 = products.sum(axis=0)
        divisor = float(sum(call.weights))
        return total / divisor if call.normalize and abs(divisor) >= 1e-8 else total
    judged = products if call.elect == "weighted" else x_Kn
    ballots = np.sign(judged) if call.elect == "frequency" else judged
    positive = ballots.sum(axis=0) >= 0
    agrees = np.where(positive, judged > 0, judged < 0)
    total = np.where(agrees, products, 0.0).sum(axis=0)
    if not call.normalize:
        return total
    shares = (agrees * (weights if call.divisor == "weights" else 1.0)).sum(axis=0)
    out: F64 = total / np.where(shares == 0, 1.0, shares)
    return out


class ElementwiseCore(CoreBlock):
    """prepare and combine on the elements of the cores, in reference coordinates."""

    def merge(self, call: Call, core: Core) -> tuple[Tensor, Tensor]:
        import torch

        from merger.methods.lowrank import reference_core

        found = reference_core(core)
        shape = (found.left_mR.shape[1], found.right_nR.shape[1])
        x_Kn = np.stack([prepared(call, k, m.reshape(-1).numpy()) for k, m in enumerate(found.cores)])
        merged = torch.from_numpy(combined(call, x_Kn)).view(shape)
        return found.left_mR @ merged, found.right_nR


CORE_PAPER: Final = "arXiv:2509.17786"
CORE_BIBTEX: Final = (
    "@inproceedings{panariello2025core, title={Accurate and Efficient Low-Rank Model Merging in Core Space}, "
    "author={Panariello, Aniello and Marczak, Daniel and Magistri, Simone and Porrello, Angelo and Twardowski, "
    "Bart{\\l}omiej and Bagdanov, Andrew D. and Calderara, Simone and van de Weijer, Joost}, booktitle={NeurIPS}, "
    "year={2025}}"
)
ELECT_PAPER: Final = replace(ELECT, default="unweighted")
DIVISOR_PAPER: Final = replace(DIVISOR, default="count")
"""Names of their own keep the TIES paper's conventions."""

METHODS = (
    MethodSpec(
        name="core_ties", summary="ties on the elements of the adapters' exact core",
        spaces=("core",), prepare="trim", combine="elect", core=ElementwiseCore(),
        parameters=(WEIGHT, DENSITY, LAMBDA, normalize(True), rescale("none"), ELECT_PAPER, DIVISOR_PAPER),
        base="required", closed_on_deltas=True, cut="whole", paper=CORE_PAPER, bibtex=CORE_BIBTEX,
    ),
    MethodSpec(
        name="core_dare_ties", summary="dare_ties on the elements of the adapters' exact core",
        spaces=("core",), prepare="drop", combine="elect", core=ElementwiseCore(),
        parameters=(WEIGHT, DENSITY, LAMBDA, normalize(True), rescale("inverse"), ELECT_PAPER, DIVISOR_PAPER),
        base="required", closed_on_deltas=True, cut="whole", paper=CORE_PAPER, bibtex=CORE_BIBTEX,
    ),
    MethodSpec(
        name="core_tsv", summary="tsv_m of the adapters' cores, its count of directions taken from the core",
        spaces=("core",), combine="block", core=SpectralCore(Tsv(), count_in_core=True), parameters=(WEIGHT, LAMBDA),
        base="required", closed_on_deltas=True, cut="whole", paper=CORE_PAPER, bibtex=CORE_BIBTEX,
    ),
    MethodSpec(
        name="core_iso", summary="iso_c of the adapters' cores",
        spaces=("core",), combine="block", core=SpectralCore(Iso(), count_in_core=True), parameters=(WEIGHT, LAMBDA),
        base="required", closed_on_deltas=True, flat=True, cut="whole", paper=CORE_PAPER, bibtex=CORE_BIBTEX,
    ),
)  # fmt: skip
