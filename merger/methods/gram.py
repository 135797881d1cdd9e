"""Methods whose result is a linear combination, with coefficients that follow from the sources' inner products.

One round measures the Gram matrix ⟨xᵢ, xⱼ⟩ in float64; everything else (angles, tangent steps, means on the sphere)
happens on K×K numbers, since all that these methods ever form are combinations of the sources. nuslerp and model_stock
can also do so for each row by itself, then without a round of statistics.

    nuslerp      spherical interpolation of two, of the whole tensor, its rows or its columns (mergekit 0.1.5)
    multislerp   Σwᵢ‖xᵢ‖ along the weighted mean direction: the tangent step at that mean is zero (mergekit 0.1.5)
    karcher      the mean on the sphere (mergekit 0.1.5)
    model_stock  the mean of the deltas, shortened by their mutual angle (arXiv:2403.19522)
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace

import numpy as np

from merger.errors import MergeFailedError, PlanError
from merger.methods.declare import MethodSpec, ParameterSpec
from merger.methods.parameters import WEIGHT
from merger.methods.rounds import Call, Statistic
from merger.methods.tiles import F32, F64, Known, TensorExtent, Tile, TileBlock, combined

_ROUNDED = 1e-7
"""A mean direction shorter than this, of unit vectors, is what rounding left of nothing."""


class GramBlock(TileBlock):
    """One round measures ⟨xᵢ, xⱼ⟩; `factors_of` makes factors of the sources of it."""

    def rounds(self, call: Call) -> int:
        return 1

    def empty(self, number: int, call: Call, extent: TensorExtent) -> Statistic:
        return np.zeros((extent.count, extent.count), np.float64)

    def measure(self, number: int, call: Call, known: Known, tile: Tile, into: Statistic) -> None:
        wide_Kn = tile.x_Kn.astype(np.float64)
        for i, x_n in enumerate(wide_Kn):
            for j in range(i, len(wide_Kn)):
                product = np.sum(x_n * wide_Kn[j])
                into[i, j] += product
                if i != j:
                    into[j, i] += product

    def conclude(self, number: int, call: Call, known: Known, merged: Statistic, extent: TensorExtent) -> F64:
        return self.factors_of(call, np.asarray(merged, np.float64), extent)

    def combines(self, call: Call) -> bool:
        return self.rounds(call) == 1

    @abstractmethod
    def factors_of(self, call: Call, gram_KK: F64, extent: TensorExtent) -> F64: ...

    def apply(self, call: Call, known: Known, tile: Tile) -> F32:
        return combined(tile.x_Kn, known[0].tolist())


def _row_dots(a_rl: F32, b_rl: F32) -> F64:
    """⟨a, b⟩ of each row, float64 (r,)."""
    found: F64 = np.sum(a_rl.astype(np.float64) * b_rl.astype(np.float64), axis=1)
    return found


# -------------------------------------------------------------------- nuslerp


def nuslerp_factors(aa: F64, ab: F64, bb: F64, t: float) -> tuple[F64, F64]:
    """Factors of a and b at t, from ⟨a,a⟩, ⟨a,b⟩ and ⟨b,b⟩, elementwise. Norms are at least 1e-7; vectors on one line
    (1 − cos² ≤ 1e-16) are interpolated linearly, as in mergekit 0.1.5."""
    cosine = ab / np.maximum(np.sqrt(aa), 1e-7) / np.maximum(np.sqrt(bb), 1e-7)
    cosine = np.clip(cosine, -1.0, 1.0)
    angle = np.arccos(cosine)
    straight = 1.0 - cosine * cosine <= 1e-16
    sine = np.where(straight, 1.0, np.sin(angle))
    return (
        np.where(straight, 1.0 - t, np.sin((1.0 - t) * angle) / sine),
        np.where(straight, t, np.sin(t * angle) / sine),
    )


class Nuslerp(TileBlock):
    """Two sources."""

    whole_rows = True
    keeps_equal = True

    def fitted(self, call: Call, shape: tuple[int, ...]) -> Call:
        if call.option("nuslerp_flatten") or len(shape) <= 1:
            # A vector is one row and, along its only dimension, one column.
            return replace(call, options=_with(call.options, nuslerp_flatten=True))
        if call.option("nuslerp_row_wise") and len(shape) > 2:
            raise PlanError.of(
                "bad-shape", f"a tensor of {len(shape)} dimensions cannot be interpolated along its first one yet",
                where="parameters.nuslerp_row_wise", why="such slices do not lie in rows or columns of a matrix",
                fix="leave nuslerp_row_wise out for these tensors, with a filter",
            )  # fmt: skip
        return call

    def rounds(self, call: Call) -> int:
        return 1 if call.option("nuslerp_flatten") or call.option("nuslerp_row_wise") else 0

    def empty(self, number: int, call: Call, extent: TensorExtent) -> Statistic:
        return np.zeros((3, 1 if call.option("nuslerp_flatten") else extent.length), np.float64)

    def measure(self, number: int, call: Call, known: Known, tile: Tile, into: Statistic) -> None:
        flatten = call.option("nuslerp_flatten")
        a, b = (x.astype(np.float64) for x in (tile.x_Kn if flatten else tile.x_Krl))
        for row, product in enumerate((a * a, a * b, b * b)):
            into[row] += np.sum(product) if flatten else np.sum(product, axis=0)

    def conclude(self, number: int, call: Call, known: Known, merged: Statistic, extent: TensorExtent) -> F64:
        aa, ab, bb = np.asarray(merged, np.float64)
        return np.stack(nuslerp_factors(aa, ab, bb, _share(call)))

    def combines(self, call: Call) -> bool:
        return bool(call.option("nuslerp_flatten"))

    def factors_of(self, call: Call, gram_KK: F64, extent: TensorExtent) -> F64:
        (aa, ab), (_, bb) = gram_KK[:, :, None]
        return np.concatenate(nuslerp_factors(aa, ab, bb, _share(call)))

    def apply(self, call: Call, known: Known, tile: Tile) -> F32:
        if call.option("nuslerp_flatten"):
            return combined(tile.x_Kn, known[0][:, 0].tolist())
        a, b = tile.x_Krl
        if call.option("nuslerp_row_wise"):
            factor_a, factor_b = known[0].astype(np.float32)
        else:
            found = nuslerp_factors(_row_dots(a, a), _row_dots(a, b), _row_dots(b, b), _share(call))
            factor_a, factor_b = (f.astype(np.float32)[:, None] for f in found)
        out: F32 = a * factor_a + b * factor_b
        return out.reshape(-1)


def _share(call: Call) -> float:
    """t, from the two weights."""
    first, second = call.weights
    return 0.5 if abs(first + second) < 1e-6 else second / (first + second)


def _with(options: tuple[tuple[str, float | int | bool | str], ...], **changes: bool) -> tuple[
    tuple[str, float | int | bool | str], ...
]:  # fmt: skip
    return tuple((name, changes.get(name, value)) for name, value in options)


# -------------------------------------------------------------------- multislerp


class Multislerp(GramBlock):
    """Σwᵢ‖xᵢ‖ · Σwᵢuᵢ/‖Σwᵢuᵢ‖ with uᵢ = xᵢ/(‖xᵢ‖ + eps)."""

    def fitted(self, call: Call, shape: tuple[int, ...]) -> Call:
        if len(call.weights) > 1 and call.option("normalize_weights") and abs(sum(call.weights)) < 1e-8:
            raise PlanError.of(
                "weights-cancel", "the weights of a tensor sum to zero", where="parameters.weight",
                why="multislerp divides by their sum", fix="use other weights, or normalize_weights: false",
            )  # fmt: skip
        return call

    def factors_of(self, call: Call, gram_KK: F64, extent: TensorExtent) -> F64:
        if extent.count == 1:
            return np.ones(1)
        weights, eps = np.asarray(call.weights, np.float64), call.number("eps")
        if call.option("normalize_weights"):
            weights = weights / np.sum(weights)
        norms = np.sqrt(np.diagonal(gram_KK))
        if not norms.any():
            return np.zeros(extent.count)  # nothing points anywhere: the sum of zeros
        directed = weights / (norms + eps)
        size = math.sqrt(max(0.0, float(np.sum(directed[:, None] * gram_KK * directed))))
        if size < max(eps, _ROUNDED * float(np.sum(np.abs(weights)))):
            if extent.count == 2:
                return weights
            raise MergeFailedError.of(
                "directions-cancel", "the weighted directions of the sources add up to nothing", where=extent.name,
                why="multislerp goes along their mean, and there is none",
                fix="use other weights, or task_arithmetic for this tensor",
            )  # fmt: skip
        found: F64 = directed * (float(np.sum(weights * norms)) / size)
        return found


# -------------------------------------------------------------------- karcher


class Karcher(GramBlock):
    """The point on the unit sphere whose tangent vectors to all sources cancel, at their mean length."""

    keeps_equal = True

    def factors_of(self, call: Call, gram_KK: F64, extent: TensorExtent) -> F64:
        tol = call.number("tol")
        norms = np.sqrt(np.diagonal(gram_KK))
        there = np.flatnonzero(norms > tol)
        found = np.zeros(extent.count)
        if len(there):
            cosines = gram_KK[np.ix_(there, there)] / (norms[there, None] * norms[there])
            mean = _sphere_mean(cosines, int(call.number("max_iter")), tol)
            found[there] = mean / norms[there] * (float(np.sum(norms)) / extent.count)
        return found


def _sphere_mean(cosines_KK: F64, max_iter: int, tol: float) -> F64:
    """The mean of unit vectors with these inner products, as a combination of them."""

    def size_of(x_K: F64) -> float:
        return math.sqrt(max(0.0, float(np.sum(x_K[:, None] * cosines_KK * x_K))))

    count = len(cosines_KK)
    mean = np.full(count, 1.0 / count)
    size = size_of(mean)
    mean = np.eye(count)[0] if size < tol else mean / size
    for _ in range(max_iter):
        step = np.zeros(count)
        for i, cosine in enumerate(np.clip(np.sum(cosines_KK * mean, axis=1), -1.0, 1.0).tolist()):
            angle = math.acos(cosine) if math.isfinite(cosine) else 0.0
            if angle < tol or angle > math.pi - tol:
                continue  # at the mean itself, or opposite to it: no direction to go
            factor = angle / math.sin(angle) / count
            step[i] += factor
            step -= factor * cosine * mean
        length = size_of(step)
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * step
        mean = mean / size_of(mean)
    return mean


# -------------------------------------------------------------------- model_stock


def stock_ratio(gram: F64) -> F64:
    """t = N·c / (1 + (N − 1)·c), with c the mean cosine over pairs, from a (N, N, …) Gram array.

    Products of norms count as 1e-6 at least, and a divisor below 1e-6 gives t = 0, as in mergekit 0.1.5.
    """
    count = len(gram)
    norms = [np.sqrt(gram[i, i]) for i in range(count)]
    total = np.zeros(gram.shape[2:])
    for i in range(count):
        for j in range(i + 1, count):
            total = total + np.clip(gram[i, j] / np.maximum(norms[i] * norms[j], 1e-6), -1.0, 1.0)
    cosine = total / (count * (count - 1) / 2)
    below = 1.0 + (count - 1) * cosine
    flat = np.abs(below) < 1e-6
    found: F64 = np.where(flat, 0.0, count * cosine / np.where(flat, 1.0, below))
    return found


class ModelStock(GramBlock):
    """base + t·mean of the deltas."""

    whole_rows = True

    def fitted(self, call: Call, shape: tuple[int, ...]) -> Call:
        if len(call.weights) < 2:
            raise PlanError.of(
                "number-of-sources", "model_stock merges two models or more, and a base", where="models",
                why="it measures the angle between them", fix="use task_arithmetic for one",
            )  # fmt: skip
        return call

    def rounds(self, call: Call) -> int:
        return 0 if call.option("filter_wise") else 1

    def factors_of(self, call: Call, gram_KK: F64, extent: TensorExtent) -> F64:
        return np.full(extent.count, float(stock_ratio(gram_KK)) / extent.count)

    def notes(self, call: Call, known: Known) -> dict[str, float]:
        """How much of the mean delta stays: t, where something changed at all."""
        share = 0.0 if call.option("filter_wise") else float(known[0].sum())
        return {"mean_kept": share} if share else {}

    def apply(self, call: Call, known: Known, tile: Tile) -> F32:
        if not call.option("filter_wise"):
            return super().apply(call, known, tile)
        x_Krl, count = tile.x_Krl, len(tile.x_Kn)
        gram = np.empty((count, count, x_Krl.shape[1]), np.float64)
        for i in range(count):
            for j in range(i, count):
                gram[i, j] = gram[j, i] = _row_dots(x_Krl[i], x_Krl[j])
        out = combined(x_Krl.reshape(count, -1), [1.0] * count).reshape(x_Krl.shape[1:])
        out *= (stock_ratio(gram) / count).astype(np.float32)[:, None]
        return out.reshape(-1)


METHODS = (
    MethodSpec(
        name="nuslerp", summary="spherical interpolation of two models, or of two deltas where there is a base",
        spaces=("delta", "weight"), combine="block", tile=Nuslerp(),
        parameters=(
            WEIGHT,
            ParameterSpec(name="nuslerp_flatten", kind="bool", scope="global", default=True,
                          doc="take the angle over the whole tensor"),
            ParameterSpec(name="nuslerp_row_wise", kind="bool", scope="global", default=False,
                          doc="without flatten: an angle for each column (mergekit's name notwithstanding), "
                              "not for each row"),
        ),
        base="optional", max_sources=2, closed_on_deltas=True, cut="rows", paper="Shoemake, SIGGRAPH 1985",
        bibtex="@inproceedings{shoemake1985animating, title={Animating rotation with quaternion curves}, "
               "author={Shoemake, Ken}, booktitle={SIGGRAPH}, year={1985}}",
    ),
    MethodSpec(
        name="multislerp", summary="the weighted mean direction of many models or deltas, at their mean length",
        spaces=("delta", "weight"), combine="block", tile=Multislerp(),
        parameters=(
            WEIGHT,
            ParameterSpec(name="normalize_weights", kind="bool", scope="global", default=True,
                          doc="divide the weights by their sum"),
            ParameterSpec(name="eps", kind="float", scope="global", default=1e-8, low=0.0,
                          doc="added to norms; a mean direction below it counts as none"),
        ),
        base="optional", closed_on_deltas=True, cut="elements", paper="mergekit",
    ),
    MethodSpec(
        name="karcher", summary="the Riemannian mean of the models on the sphere, at their mean length",
        spaces=("weight",), combine="block", tile=Karcher(),
        parameters=(
            ParameterSpec(name="max_iter", kind="int", scope="global", default=10, low=0,
                          doc="steps towards the mean, at the most"),
            ParameterSpec(name="tol", kind="float", scope="global", default=1e-5, low=0.0, low_open=True,
                          doc="a step, an angle or a norm below it counts as zero"),
        ),
        base="member", closed_on_deltas=False, cut="elements", paper="arXiv:2603.04972",
    ),
    MethodSpec(
        name="model_stock", summary="the mean of the deltas, shortened as the angles between them say",
        spaces=("delta",), combine="block", tile=ModelStock(),
        parameters=(
            ParameterSpec(name="filter_wise", kind="bool", scope="global", default=False,
                          doc="measure the angle for each row by itself"),
        ),
        base="required", closed_on_deltas=True, cut="rows", paper="arXiv:2403.19522",
        bibtex="@inproceedings{jang2024model, title={Model Stock: All we need is just a few fine-tuned models}, "
               "author={Jang, Dong-Hwan and Yun, Sangdoo and Han, Dongyoon}, booktitle={ECCV}, year={2024}}",
    ),
)  # fmt: skip
