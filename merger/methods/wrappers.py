"""Steps that go around any method on deltas: balance, calibrate, and scaling by depth; and nan, svc and lines by name.

balance: nan       weight_i ∝ weight_i / ‖ΔW_i‖ before the merge (one more round of statistics)
calibrate: svc     directions that several sources share are counted once, after the merge (needs whole tensors)
lambda: [α, α+β]   α + β·l/(L-1), LiNeS' scaling by depth, is the gradient that every parameter may be
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from merger.methods.declare import MethodSpec, ParameterSpec
from merger.methods.parameters import LAMBDA, WEIGHT, normalize

BALANCE: Final = ParameterSpec(
    name="balance", kind="choice", scope="global", default="none", choices=("none", "nan"),
    doc="nan: divide each weight by the norm of its source's delta (NAN), all together by their sum at weight 1",
)  # fmt: skip
CALIBRATE: Final = ParameterSpec(
    name="calibrate", kind="choice", scope="global", default="none", choices=("none", "svc"),
    doc="svc: shrink each singular value of the merged delta by how many times over the sources are found in it",
)  # fmt: skip
CALIBRATE_ALPHA: Final = ParameterSpec(
    name="calibrate_alpha", kind="float", scope="global", default=1.0, low=0.0, low_open=True,
    doc="svc: a source is counted at least this often in a direction",
)  # fmt: skip


def wrappers_for(spec: MethodSpec) -> tuple[ParameterSpec, ...]:
    """The parameters of the steps that may go around a method, beside its own."""
    if not spec.closed_on_deltas or spec.spaces[0] == "weight":
        return ()
    balance = (BALANCE,) if spec.parameter("weight") is not None else ()
    # Of equal singular values an SVD may return any directions: there is nothing to calibrate one by one.
    found = (*balance, *(() if spec.flat else (CALIBRATE, CALIBRATE_ALPHA)))
    return tuple(p for p in found if spec.parameter(p.name) is None)


METHODS = (
    MethodSpec(
        name="nan", summary="task arithmetic with each weight divided by the norm of its delta",
        spaces=("delta",), combine="sum",
        parameters=(WEIGHT, LAMBDA, normalize(False), replace(BALANCE, default="nan")),
        base="required", closed_on_deltas=True, linear=True, cut="elements", paper="arXiv:2505.16148",
        bibtex="@article{si2025nan, title={NAN: A Training-Free Solution to Coefficient Estimation in Model Merging}, "
               "author={Si, Chongjie and others}, journal={arXiv:2505.16148}, year={2025}}",
    ),
    MethodSpec(
        name="lines", summary="task arithmetic scaled by depth: alpha + beta·l/(L-1) at layer l of L, alpha elsewhere",
        spaces=("delta",), combine="sum", depth=True,
        parameters=(
            WEIGHT, LAMBDA, normalize(False),
            ParameterSpec(name="alpha", kind="float", scope="global", doc="scale at the first layer"),
            ParameterSpec(name="beta", kind="float", scope="global", doc="how much the scale grows to the last layer"),
        ),
        base="required", closed_on_deltas=True, linear=True, cut="elements", paper="arXiv:2410.17146",
        bibtex="@inproceedings{wang2025lines, title={LiNeS: Post-training Layer Scaling Prevents Forgetting and "
               "Enhances Model Merging}, author={Wang, Ke and Dimitriadis, Nikolaos and Favero, Alessandro and "
               "Ortiz-Jimenez, Guillermo and Fleuret, Fran{\\c{c}}ois and Frossard, Pascal}, booktitle={ICLR}, "
               "year={2025}}",
    ),
    MethodSpec(
        name="svc", summary="task arithmetic with its singular values calibrated: what sources share is counted once",
        spaces=("delta",), combine="sum",
        parameters=(WEIGHT, LAMBDA, normalize(False), replace(CALIBRATE, default="svc"), CALIBRATE_ALPHA),
        base="required", closed_on_deltas=True, cut="whole", paper="arXiv:2602.05536",
        bibtex="@inproceedings{li2026shared, title={When Shared Knowledge Hurts: Spectral Over-Accumulation in Model "
               "Merging}, author={Li, Yayuan and Peng, Ze and Zhang, Jian and Guo, Jintao and Duan, Yue and Shi, "
               "Yinghuan}, booktitle={ICML}, year={2026}}",
    ),
)  # fmt: skip
