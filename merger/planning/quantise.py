"""A merged model stored in fewer bits: linear layers as bitsandbytes' nf4, fp4 or int8, or as FP8 in blocks. Pure.

Written is what the scheme's own library would write of the merged weights: none of these needs calibration. Which
matrices are linear layers follows from names; all others stay dense and are listed as such in the config.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from merger.adapters.bind import CONV1D_MODELS, HEAD
from merger.catalog import Catalog
from merger.errors import Problem, RefusedError
from merger.manifest import OutputQuantization
from merger.methods.rounds import Call
from merger.planning.drafts import CodedPlace, Draft
from merger.planning.linear import is_linear
from merger.planning.requantise import in_codes
from merger.quantization.declare import stem_of
from merger.quantization.writing import (
    FP8_BLOCK,
    FP8_BLOCKS,
    INT8_ROWS,
    NESTED_BLOCK,
    STATE,
    Recode,
    blocks_parameters,
    state_length,
    state_text,
)
from merger.tensors import DTYPES, F32, TensorSpec

CODED: Final = ("nf4", "fp4", "int8", "fp8")
"""Kinds of output.quantization that quantise."""
_EXPERT: Final = re.compile(r"\.experts\.")
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Quantised:
    """What the config of the output says of its scheme."""

    asked: OutputQuantization
    dense: tuple[str, ...]
    """Modules with a matrix that is not quantised."""
    dtype: str
    """What the rest is stored in, as torch names it."""

    def config(self, donor: Catalog) -> Mapping[str, Any]:
        """quantization_config of the output."""
        del donor
        if self.asked.kind == "fp8":
            return {
                "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
                "weight_block_size": [FP8_BLOCK, FP8_BLOCK], "modules_to_not_convert": list(self.dense),
            }  # fmt: skip
        four = self.asked.kind != "int8"
        blocks = {
            "bnb_4bit_quant_type": self.asked.kind, "bnb_4bit_use_double_quant": self.asked.double_quant,
            "bnb_4bit_compute_dtype": self.dtype, "bnb_4bit_quant_storage": "uint8",
        }  # fmt: skip
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four,
            "_load_in_4bit": four, "_load_in_8bit": not four, "llm_int8_threshold": 6.0,
            "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": list(self.dense), **(blocks if four else {}),
        }  # fmt: skip

    def beside(self, donor: Catalog) -> None:
        """No scheme that is made here says itself in a second file, as `Requantised.beside` may."""
        del donor

    def metadata(self, specs: Iterable[TensorSpec]) -> Mapping[str, str]:
        """Nor in the headers of files."""
        del specs
        return {}


def quantise(
    asked: OutputQuantization, donor: Catalog, drafts: Sequence[Draft]
) -> tuple[list[Draft], Quantised, list[Problem], list[Problem]]:
    """The tensors of a dense merge with its linear layers as codes, what the config says of that, what stands against
    it, and what is to be told."""
    problems: list[Problem] = []
    if str(donor.config.get("model_type")) in CONV1D_MODELS:
        problems.append(
            Problem("bad-value", f"{donor.reference} cannot be quantised to {asked.kind} here", "output.quantization",
                    "its layers are stored transposed (Conv1D)", "leave it out, and quantise the dense output")
        )  # fmt: skip
    found: list[Draft] = []
    dense: dict[str, None] = {}
    uneven: list[str] = []
    for draft in drafts:
        linear = _is_linear(draft.spec, asked)
        if linear and _fits(draft.spec, asked):
            try:
                found.append(_as_codes(draft, asked))
            except RefusedError as error:
                problems += [p for p in error.problems if p not in problems]
            continue
        found.append(draft)
        if len(draft.spec.shape) > 1:
            dense[stem_of(draft.spec.name)] = None
            uneven += [draft.spec.name] if linear else []
    if not any(draft.coded for draft in found) and not problems:
        problems.append(
            Problem("bad-value", f"{asked.kind} finds nothing to quantise", "output.quantization",
                    "no matrix of a numbered layer has a shape that its blocks divide", "leave it out")
        )  # fmt: skip
    # A tied head is in no file, and would be quantised when the model is loaded.
    dense[stem_of(HEAD)] = None
    experts = sorted({name.partition(".experts")[0] + ".experts" for name in dense if ".experts" in f"{name}."})
    named = [name for name in dense if not _EXPERT.search(f"{name}.")] + experts
    made = Quantised(asked, tuple(named), _dtype_of(drafts))
    return found, made, problems, _told(asked, uneven, experts)


def _dtype_of(drafts: Sequence[Draft]) -> str:
    """The dtype of most elements."""
    counted: dict[str, int] = {}
    for draft in drafts:
        name = draft.spec.dtype.torch_name
        if draft.spec.dtype.is_float and name is not None:
            counted[name] = counted.get(name, 0) + draft.spec.numel
    return max(counted, key=lambda name: counted[name], default="float32")


def _is_linear(spec: TensorSpec, asked: OutputQuantization) -> bool:
    """Whether a tensor is quantised, as far as its name says. transformers packs experts when it loads them, and
    bitsandbytes has no packed experts."""
    return is_linear(spec) and spec.dtype.is_float and (asked.kind == "fp8" or not _EXPERT.search(spec.name))


def _fits(spec: TensorSpec, asked: OutputQuantization) -> bool:
    """Whether blocks of scales divide a matrix: what does not divide, the schemes' libraries refuse or read wrongly."""
    if asked.kind == "int8":
        return True
    if asked.kind == "fp8":
        return spec.rows % FP8_BLOCK == 0 and spec.cols % FP8_BLOCK == 0
    return spec.cols % asked.blocksize == 0


def _as_codes(draft: Draft, asked: OutputQuantization) -> Draft:
    """One task that writes a tensor's codes and scales."""
    spec, task, call = draft.spec, draft.task, draft.call
    if draft.store.kind == "copy":
        call = Call(method="copy", combine="pass", weights=(1.0,))
        task = replace(task, entries=task.entries[:1])
    places, recode = _laid_out(spec, asked)
    task, store = in_codes(spec.name, task, call, recode)
    return replace(draft, task=task, store=store, call=call, coded=places)


def _laid_out(spec: TensorSpec, asked: OutputQuantization) -> tuple[tuple[CodedPlace, ...], Recode]:
    name, rows, cols = spec.name, spec.rows, spec.cols
    if asked.kind == "fp8":
        scale = TensorSpec(f"{name}_scale_inv", F32, (rows // FP8_BLOCK, cols // FP8_BLOCK))
        return (
            CodedPlace("codes", TensorSpec(name, DTYPES["F8_E4M3"], spec.shape), rows, cols, 1),
            CodedPlace("scale", scale, scale.rows, 4 * scale.cols, FP8_BLOCK),
        ), FP8_BLOCKS
    if asked.kind == "int8":
        return (
            CodedPlace("codes", TensorSpec(name, DTYPES["I8"], spec.shape), rows, cols, 1),
            CodedPlace("scale", TensorSpec(f"{stem_of(name)}.SCB", F32, (rows,)), rows, 4, 1),
            CodedPlace("format", TensorSpec(f"{stem_of(name)}.weight_format", DTYPES["U8"], ()), 1, 1, 0),
        ), INT8_ROWS
    block, double = asked.blocksize, asked.double_quant
    recode = blocks_parameters(asked.kind, block, NESTED_BLOCK if double else 0, cols)
    assert not isinstance(recode, str), recode
    text = state_text(asked.kind, block, spec.dtype.torch_name or "", spec.shape, double=double)
    blocks = spec.numel // block

    def once(role: str, suffix: str, dtype: str, count: int) -> CodedPlace:
        made = TensorSpec(f"{name}.{suffix}", DTYPES[dtype], (count,))
        return CodedPlace(role, made, 1, made.nbytes, 0)

    absmax = TensorSpec(f"{name}.absmax", DTYPES["U8" if double else "F32"], (blocks,))
    places = [
        CodedPlace("codes", TensorSpec(name, DTYPES["U8"], (spec.numel // 2, 1)), rows, cols // 2, 1),
        CodedPlace("absmax", absmax, rows, absmax.nbytes // rows, 1),
        once("table", "quant_map", "F32", 16),
        once(STATE, f"quant_state.bitsandbytes__{asked.kind}", "U8", state_length(text, double=double)),
    ]
    if double:
        places.append(once("nested", "nested_absmax", "F32", -(-blocks // NESTED_BLOCK)))
        places.append(once("nested_table", "nested_quant_map", "F32", 256))
    return tuple(places), (*recode, (STATE, text))


def _told(asked: OutputQuantization, uneven: Sequence[str], experts: Sequence[str]) -> list[Problem]:
    """What stays dense though one might expect otherwise."""
    found = []
    if uneven:
        shown = ", ".join(uneven[:_SHOWN]) + (", …" if len(uneven) > _SHOWN else "")
        size = f"{FP8_BLOCK} × {FP8_BLOCK}" if asked.kind == "fp8" else str(asked.blocksize)
        found.append(
            Problem("left-dense", f"{len(uneven)} matrices stay dense: {shown}", "output.quantization",
                    f"blocks of {size} do not divide them", "nothing, if that is what you want")
        )  # fmt: skip
    if experts and asked.kind != "fp8":
        found.append(
            Problem("left-dense", f"the experts of {len(experts)} layers stay dense", "output.quantization",
                    "transformers packs them when it loads them, and bitsandbytes has no packed experts",
                    "write fp8, or nothing if that is what you want")
        )  # fmt: skip
    return found
