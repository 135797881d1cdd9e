"""Adapters made of models: what a fine-tuned model changed, as LoRA pairs that PEFT loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from merger import api
from merger.errors import ManifestError, MergeFailedError, PlanError
from merger.planning.nouns import MergePlan
from merger.verify import verify_output
from tests.conformance.folders import content_digest

PREFIX = "base_model.model."
TOKENS = torch.arange(40).reshape(2, 20) % 50


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a worker: bits hang on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(seed: int, *, tied: bool = False) -> Any:
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied,
        )
    )  # fmt: skip
    return model.eval()


def qwen2(seed: int) -> Any:
    torch.manual_seed(seed)
    model: Any = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    )  # fmt: skip
    return model.eval()


def gpt2(seed: int) -> Any:
    torch.manual_seed(seed)
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=4, n_positions=32))
    return model.eval()


def is_matrix(name: str) -> bool:
    return ".layers." in name and name.endswith("_proj.weight")


def save(
    folder: Path, model: Any, seed: int = 0, *, changes: Callable[[str], bool] | None = None, size: float = 0.05
) -> Path:
    """The model, or one with what `changes` names moved at random, with singular values that fall."""
    if changes is not None:
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if changes(name):
                    moved = torch.randn(parameter.shape, generator=g) * size
                    if moved.ndim == 2:
                        u, s, vt = torch.linalg.svd(moved, full_matrices=False)
                        moved = u * (s * 0.7 ** torch.arange(len(s))) @ vt
                    parameter.add_(moved)
    model.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module → A and B, float64."""
    found = load_file(folder / "adapter_model.safetensors")
    modules = [n.removeprefix(PREFIX).removesuffix(".lora_A.weight") for n in found if n.endswith(".lora_A.weight")]
    return {
        m: (found[f"{PREFIX}{m}.lora_A.weight"].double(), found[f"{PREFIX}{m}.lora_B.weight"].double()) for m in modules
    }


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def whole(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()


def loaded(base: Path, adapter: Path) -> Any:
    """Base and adapter as PEFT loads them, with no key missing."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def changed(base: Path, model: Path) -> dict[str, Tensor]:
    """Module → ΔW of what differs, float64."""
    one, other = tensors(base), tensors(model)
    return {n.removesuffix(".weight"): other[n].double() - one[n].double() for n in one if not one[n].equal(other[n])}


# ---- what is in a pair -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 5])
def test_each_pair_is_the_best_of_its_rank(tmp_path: Path, rank: int) -> None:
    base, model = save(tmp_path / "base", llama(0)), save(tmp_path / "m", llama(0), 1, changes=is_matrix)
    report = api.extract(model, tmp_path / "out", base=base, rank=rank)
    found, deltas = pairs(tmp_path / "out"), changed(base, model)
    assert set(found) == set(deltas)
    lost = total = 0.0
    for module, delta in deltas.items():
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        a, b = found[module]
        assert a.shape[0] == rank
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        torch.testing.assert_close(b @ a, best, rtol=0, atol=2e-6 * float(s[0]))
        lost, total = lost + float((s[rank:] ** 2).sum()), total + float((s**2).sum())
    assert report.energy_lost == pytest.approx(lost / total, rel=1e-4)


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_an_energy_gives_each_pair_the_least_rank_that_keeps_it(tmp_path: Path, share: float) -> None:
    base, model = save(tmp_path / "base", llama(0)), save(tmp_path / "m", llama(0), 1, changes=is_matrix)
    api.extract(model, tmp_path / "out", base=base, energy=share)
    found = pairs(tmp_path / "out")
    for module, delta in changed(base, model).items():
        energies = (torch.linalg.svdvals(delta) ** 2).cumsum(0)
        least = int((energies < share * energies[-1]).sum()) + 1
        assert len(found[module][0]) == least, module
    loaded(base, tmp_path / "out")
    verify_output(str(tmp_path / "out"), replay=None)


def test_logits_approach_the_models_as_the_rank_grows(tmp_path: Path) -> None:
    base, model = save(tmp_path / "base", llama(0)), save(tmp_path / "m", llama(0), 1, changes=is_matrix)
    wanted = logits(whole(model))
    errors = []
    for rank in (1, 3, 8, 24):
        api.extract(model, tmp_path / f"r{rank}", base=base, rank=rank)
        errors.append(float((logits(loaded(base, tmp_path / f"r{rank}")) - wanted).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e3 * errors[-1]
    assert errors[-1] < 1e-4


def test_the_lora_of_a_model_that_a_lora_made_is_found_again(tmp_path: Path) -> None:
    base = save(tmp_path / "base", llama(0))
    torch.manual_seed(3)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tuned = get_peft_model(llama(0), LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    deltas = {
        n: m.get_delta_weight("default").detach().double() for n, m in tuned.named_modules() if hasattr(m, "lora_A")
    }
    model = save(tmp_path / "m", tuned.merge_and_unload())
    report = api.extract(model, tmp_path / "out", base=base, rank=4)
    for module, (a, b) in pairs(tmp_path / "out").items():
        delta = deltas[PREFIX + module]
        torch.testing.assert_close(b @ a, delta, rtol=0, atol=1e-5 * float(delta.norm()))
    assert report.energy_lost < 1e-10


def test_layers_that_lie_transposed_are_extracted_as_peft_has_them(tmp_path: Path) -> None:
    base = save(tmp_path / "base", gpt2(0))
    model = save(tmp_path / "m", gpt2(0), 1, changes=lambda n: ".h." in n and n.endswith(("attn.weight", "fc.weight")))
    api.extract(model, tmp_path / "out", base=base, rank=24)
    wanted = logits(whole(model))
    assert not torch.allclose(logits(whole(base)), wanted, atol=1e-3)
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out")), wanted, rtol=0, atol=1e-5)


# ---- what has no pair ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("store", [{"rank": 2}, {"energy": 0.9}])
def test_a_change_that_no_pair_holds_ends_the_run_before_a_singular_value_is_taken(
    tmp_path: Path, name: str, store: dict[str, Any]
) -> None:
    base = save(tmp_path / "base", llama(0))
    model = save(tmp_path / "m", llama(0), 1, changes=lambda n: is_matrix(n) or n == name)
    with pytest.raises(MergeFailedError) as caught:
        api.extract(model, tmp_path / "out", base=base, workers=1, **store)
    (problem,) = caught.value.problems
    assert problem.code == "left-out"
    assert name in problem.what
    assert "modules_to_save: all" in problem.fix
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_what_is_dropped_is_told_with_its_size(tmp_path: Path) -> None:
    base = save(tmp_path / "base", llama(0))
    model = save(tmp_path / "m", llama(0), 1, changes=lambda n: is_matrix(n) or "norm" in n)
    report = api.extract(model, tmp_path / "out", base=base, rank=2, modules_to_save="drop")
    (told,) = [w for w in report.warnings if w.code == "left-out"]
    deltas = [delta for name, delta in changed(base, model).items() if "norm" in name]
    assert f"{len(deltas)} changed" in told.what
    norm = sum(float((d**2).sum()) for d in deltas) ** 0.5
    assert f"{norm:.3g}" in told.what
    assert set(pairs(tmp_path / "out")) == {n for n in changed(base, model) if "norm" not in n}
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] is None


@pytest.mark.parametrize("tied", [False, True])
def test_norms_embeddings_and_heads_are_written_whole_when_asked_for(tmp_path: Path, tied: bool) -> None:
    base = save(tmp_path / "base", llama(0, tied=tied))
    model = save(tmp_path / "m", llama(0, tied=tied), 1, changes=lambda _: True)
    api.extract(model, tmp_path / "out", base=base, rank=24, modules_to_save="all")
    wanted = logits(whole(model))
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out")), wanted, rtol=0, atol=1e-5)
    api.fold(tmp_path / "out", tmp_path / "folded", base=base)
    torch.testing.assert_close(logits(whole(tmp_path / "folded")), wanted, rtol=0, atol=1e-5)
    found, own = load_file(tmp_path / "out" / "adapter_model.safetensors"), tensors(model)
    assert found[f"{PREFIX}model.norm.weight"].equal(own["model.norm.weight"])
    assert found[f"{PREFIX}lm_head.weight"].equal(own["model.embed_tokens.weight" if tied else "lm_head.weight"])
    verify_output(str(tmp_path / "out"), replay=None)


def test_biases_beside_pairs_are_written_whole_as_peft_and_a_fold_read_them(tmp_path: Path) -> None:
    base = save(tmp_path / "base", qwen2(0))
    model = save(tmp_path / "m", qwen2(0), 1, changes=lambda _: True)
    api.extract(model, tmp_path / "out", base=base, rank=24, modules_to_save="all")
    assert f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.bias" in load_file(
        tmp_path / "out" / "adapter_model.safetensors"
    )
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out")), logits(whole(model)), rtol=0, atol=1e-5)
    api.fold(tmp_path / "out", tmp_path / "folded", base=base)
    torch.testing.assert_close(logits(whole(tmp_path / "folded")), logits(whole(model)), rtol=0, atol=1e-5)


# ---- several models, and adapters among them -------------------------------------------------------------------------


WEIGHTS = (2.0, 1.0, 0.5)


def merged(base: Path, models: list[str], out: Path, **more: Any) -> Any:
    entries = [{"model": m, "parameters": {"weight": w}} for m, w in zip(models, WEIGHTS, strict=False)]
    output = {"kind": "adapter", "store": {"svd": {"rank": 24}}, **more.pop("output", {})}
    return api.merge(
        {"merge_method": "ties", "base_model": str(base), "models": entries, "output": output, **more}, out
    )


@pytest.mark.parametrize("method", ["ties", "linear", "task_arithmetic", "tsv_m", "dare_ties"])
def test_merged_deltas_of_models_and_adapters_are_those_of_the_merged_model(tmp_path: Path, method: str) -> None:
    base, model = save(tmp_path / "base", llama(0)), save(tmp_path / "m", llama(0), 1, changes=is_matrix)
    torch.manual_seed(4)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(tmp_path / "lora"))
    other = save(tmp_path / "m2", llama(0), 2, changes=is_matrix)
    # Whole deltas of adapters are refused by spectral methods; linear counts a base that is listed.
    sources = [str(model), str(other) if method == "tsv_m" else f"{base}+{tmp_path / 'lora'}"]
    sources += [str(base)] if method == "linear" else []
    density = {"parameters": {"density": 0.5}} if "ties" in method else {}
    document = {"merge_method": method, **density}
    merged(base, sources, tmp_path / "out", **document)
    found = pairs(tmp_path / "out")
    entries = [{"model": m, "parameters": {"weight": w}} for m, w in zip(sources, WEIGHTS, strict=False)]
    api.merge({**document, "base_model": str(base), "models": entries}, tmp_path / "whole")
    deltas = {m: d for m, d in changed(base, tmp_path / "whole").items() if m.endswith("_proj")}
    assert set(found) == set(deltas)
    for module, delta in deltas.items():
        a, b = found[module]
        torch.testing.assert_close(b @ a, delta, rtol=0, atol=1e-5 * float(delta.norm()))


def test_bytes_hang_on_neither_memory_nor_workers(tmp_path: Path) -> None:
    base = save(tmp_path / "base", llama(0))
    model = save(tmp_path / "m", llama(0), 1, changes=lambda _: True)
    made = [
        api.extract(
            model, tmp_path / f"o{i}", base=base, energy=0.9, modules_to_save="all", workers=workers, memory=memory
        )
        for i, (workers, memory) in enumerate([(1, 1 << 30), (3, 24 << 20)])
    ]
    assert made[0].content_digest == made[1].content_digest
    assert content_digest(tmp_path / "o0") == content_digest(tmp_path / "o1")


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(plan: MergePlan) -> set[str]:
    return {problem.code for problem in plan.problems}


def test_what_no_adapter_can_be_is_refused_before_data_moves(tmp_path: Path) -> None:
    base, model = save(tmp_path / "base", llama(0)), save(tmp_path / "m", llama(0), 1, changes=is_matrix)
    entry = {"model": str(model), "parameters": {"weight": 1.0}}
    start = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [entry]}

    def codes(output: dict[str, Any], **more: Any) -> set[str]:
        return refused(api.plan({**start, **more, "output": {"kind": "adapter", **output}}, tmp_path / "out"))

    svd = {"store": {"svd": {"rank": 4}}}
    assert codes(svd) == set()
    assert codes({}) == {"no-rank"}
    assert codes({"store": "concat"}) == {"bad-store"}
    assert codes({**svd, "modules_to_save": "average"}) == {"bad-value"}
    assert codes(svd, tokenizer_source="union") == {"conflict"}
    assert codes(svd, models=[{**entry, "model": str(base)}]) == {"no-modules"}
    assert "not-closed" in codes(svd, merge_method="slerp", parameters={"t": 0.5}, models=[{"model": str(model)}])
    with pytest.raises(ManifestError):
        api.extract(model, tmp_path / "out", base=base, rank=2, energy=0.5)
    with pytest.raises(PlanError):
        api.extract(model, tmp_path / "out", base=base, rank=2, overrides=["output.modules_to_save=average"])
    assert not (tmp_path / "out").exists()
