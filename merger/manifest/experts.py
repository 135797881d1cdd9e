"""What a manifest with `experts` must satisfy beyond its shape: mergekit-moe's files and raymerge's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

from merger.errors import ManifestError
from merger.manifest.grammar import GATE_MODES, PROMPTED
from merger.manifest.references import parse_model_reference

EXPERT_KEYS: Final = ("experts", "shared_experts", "gate_mode", "experts_per_token", "architecture")
_MERGING: Final = (
    "merge_method", "combination_type", "space", "prepare", "combine", "finish", "parameters", "tokenizer_source",
    "tokenizer",
)  # fmt: skip
"""Keys of merges: nothing is merged here."""


class Findings(Protocol):
    """The part of the checks' findings that is needed here."""

    def refuse(self, code: str, what: str, path: str, why: str = "", fix: str = "") -> None: ...

    def warn(self, what: str, path: str, why: str, fix: str = "remove it", code: str = "") -> None: ...


def has_experts(data: Mapping[str, Any]) -> bool:
    return data.get("experts") is not None


def check_experts(findings: Findings, data: Mapping[str, Any]) -> None:
    """Keys against each other."""
    for key in _MERGING:
        if data.get(key) is not None:
            findings.refuse("conflict", f"{key} has no place beside experts", key,
                            "experts are copied side by side, and nothing is merged", "drop it")  # fmt: skip
    if data.get("base_model") is None:
        findings.refuse("missing-key", "there is no base_model", "base_model",
                        "attention, embeddings, norms and the tokenizer are the base's",
                        "add base_model: org/name")  # fmt: skip
    experts = [e for e in _list(data.get("experts")) if isinstance(e, dict)]
    shared = [e for e in _list(data.get("shared_experts")) if isinstance(e, dict)]
    chosen = data.get("experts_per_token")
    if isinstance(chosen, int) and not isinstance(chosen, bool) and chosen > len(experts):
        findings.refuse("out-of-bounds", f"{chosen} experts a token, and there are {len(experts)}", "experts_per_token",
                        "a token goes to different experts", f"give {len(experts)} or less")  # fmt: skip
    elif chosen is None and len(experts) == 1:
        findings.refuse("out-of-bounds", "2 experts a token (the default), and there is 1", "experts_per_token",
                        "a token goes to different experts", "write experts_per_token: 1, or add experts")  # fmt: skip
    mode = data.get("gate_mode") or "hidden"
    if mode not in PROMPTED:
        return
    for index, expert in enumerate(experts):
        if not expert.get("positive_prompts"):
            findings.refuse("missing-key", "this expert has no positive_prompts", f"experts[{index}].positive_prompts",
                            f"gate_mode: {mode} makes its gate from them",
                            f"add prompts, or write gate_mode: {GATE_MODES[-2]}")  # fmt: skip
    if len({bool(expert.get("positive_prompts")) for expert in shared}) > 1:
        findings.refuse("conflict", "some shared experts have prompts and some have none", "shared_experts",
                        "either all of them have gates or none has", "give all of them prompts, or none")  # fmt: skip
    prompts = [(expert.get("positive_prompts"), expert.get("negative_prompts") or []) for expert in experts]
    if len(experts) > 1 and all(one == prompts[0] for one in prompts) and prompts[0][0]:
        findings.refuse("conflict", "all experts have the same prompts", "experts",
                        "their gates would be equal, and no token could tell them apart",
                        "give each expert prompts of what it is for")  # fmt: skip
    names = {_same(expert.get("source_model")) for expert in experts}
    plain = not any(expert.get("noise_scale") or expert.get("residual_scale") for expert in experts)
    if len(experts) > 1 and len(names) == 1 and plain:
        findings.warn("all experts are one model", "experts",
                      "the result answers as that model does, with more memory, until it is trained",
                      "nothing, if it is to be trained", "same-experts")  # fmt: skip


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _same(model: object) -> str:
    try:
        return str(parse_model_reference(model))
    except ManifestError:
        return repr(model)
