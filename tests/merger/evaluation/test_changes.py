"""`compare` without data: inner products of changes are those of the dense deltas, in float64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import merger
from jobs.cli import main
from merger.errors import PlanError
from merger.evaluation.changes import Changes, compare_changes
from tests.conformance.folders import adapter, model, model_tensors
from tests.merger.evaluation.asked import base, loaded, lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("changes")
    for seed, name in enumerate(("one", "two"), 1):
        lora(made / name, base(made / "base"), seed)
        merger.fold(made / name, made / f"{name}-model", base=made / "base")
    return made


def deltas(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """What PEFT's own merge changes."""
    plain = loaded(folder / "base").state_dict()
    merged = loaded(folder / "base", folder / name).merge_and_unload().state_dict()
    return {key: merged[key].double() - value.double() for key, value in plain.items()}


def check(found: Changes, expected: list[dict[str, torch.Tensor]], tolerance: float) -> None:
    for i, one in enumerate(expected):
        for j, two in enumerate(expected):
            product = sum(float((one[key] * two[key]).sum()) for key in one)
            size = sum(float((one[key] ** 2).sum()) for key in one) ** 0.5
            size *= sum(float((two[key] ** 2).sum()) for key in two) ** 0.5
            assert float(found.gram[i, j]) == pytest.approx(product, abs=tolerance * size)


def test_adapters(folder: Path) -> None:
    found = compare_changes([str(folder / "one"), str(folder / "two")])
    check(found, [deltas(folder, "one"), deltas(folder, "two")], 1e-5)
    assert found.base is None
    assert found.equal == (4, 0)
    assert set(found.by_tensor) == {
        f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert found.cosine(0, 0) == pytest.approx(1)
    assert found.retained(1, 1) == pytest.approx(1)


def test_models_against_their_base_and_against_the_first(folder: Path) -> None:
    outputs = [str(folder / "one-model"), str(folder / "two-model"), str(folder / "base")]
    found = compare_changes(outputs, base=str(folder / "base"))
    check(found, [deltas(folder, "one"), deltas(folder, "two")], 1e-5)
    assert found.cosine(0, 2) is None
    assert found.equal[0] == len(found.by_tensor)
    assert found.equal[2] == found.equal[0] - 4
    assert found.retained(0, 2) is None
    first = compare_changes(outputs)
    assert first.retained(0, 1) is None
    assert first.base == outputs[0]
    assert first.norms[0] == 0
    assert first.norms[2] == pytest.approx(float(found.norms[0]))
    assert first.distance(2) == pytest.approx(found.distance(2))


def test_a_merge_holds_its_sources_at_their_weights(folder: Path, tmp_path: Path) -> None:
    """task_arithmetic: what is retained of a source is its weight, but for what the other one adds to it."""
    weights = {"one": 0.5, "two": 2.0}
    manifest: dict[str, Any] = {
        "adapters": [{"adapter": str(folder / n), "parameters": {"weight": w}} for n, w in weights.items()],
        "output": {"kind": "adapter"}, "dtype": "float32",
    }  # fmt: skip
    merger.merge(manifest, tmp_path / "out")
    found = compare_changes([str(tmp_path / "out"), str(folder / "one"), str(folder / "two")])
    cross = float(found.gram[1, 2])
    assert found.retained(0, 1) == pytest.approx(0.5 + 2 * cross / float(found.gram[1, 1]), rel=1e-5)
    assert found.retained(0, 2) == pytest.approx(2 + 0.5 * cross / float(found.gram[2, 2]), rel=1e-5)


def test_an_adapter_beside_a_model(folder: Path) -> None:
    on = str(folder / "base")
    found = compare_changes([str(folder / "one-model"), f"{on}+{folder / 'one'}"], base=on)
    assert found.cosine(0, 1) == pytest.approx(1, abs=1e-6)
    assert found.distance(1) < 1e-5 * float(found.norms[0])


def test_one_changed_value_is_seen(tmp_path: Path) -> None:
    """Far below what inner products can tell."""
    tensors = model_tensors(1, dtype=torch.float32)
    model(tmp_path / "a", 1, tensors=tensors)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][3, 5] *= 1 + 1e-6
    model(tmp_path / "b", 1, tensors=tensors)
    model(tmp_path / "base", 9, tensors=model_tensors(9, dtype=torch.float32))
    found = compare_changes([str(tmp_path / "a"), str(tmp_path / "b")], base=str(tmp_path / "base"))
    assert found.equal == (3, 2)
    assert found.farthest(1)[0][0] == name


def test_what_is_saved_whole_is_no_change_and_is_told(folder: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        model: Any = AutoModelForCausalLM.from_pretrained(str(folder / "base"))
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        made = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in made.named_parameters():
                if ".lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        made.save_pretrained(str(tmp_path / name))
    found = compare_changes([str(tmp_path / "a"), str(tmp_path / "b")])
    cosine = found.cosine(0, 1)
    assert cosine is not None
    assert abs(cosine) < 0.5
    assert found.left_out == ("lm_head.weight",)
    assert any("lm_head.weight" in line for line in found.lines())


def test_experts_of_a_packed_parameter_are_compared_one_by_one(tmp_path: Path) -> None:
    """The same experts in another order have nothing in common."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model: Any = MixtralForCausalLM(config)
    (name, before) = next((k, v.clone().double()) for k, v in model.state_dict().items() if "experts.down_proj" in k)
    lora = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"], task_type="CAUSAL_LM")
    made = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if ".lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    made.save_pretrained(str(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    rank = 2
    for key, value in tensors.items():  # A is expert by expert, B rank by rank
        if "lora_A" in key:
            tensors[key] = value.reshape(4, rank, -1).roll(1, 0).reshape(value.shape).contiguous()
        else:
            tensors[key] = value.reshape(-1, rank, 4).roll(1, 2).reshape(value.shape).contiguous()
    save_file(tensors, tmp_path / "b" / "adapter_model.safetensors", {"format": "pt"})
    found = compare_changes([str(tmp_path / "a"), str(tmp_path / "b")])
    change = made.merge_and_unload().state_dict()[name].double() - before
    assert float(found.norms[0]) == pytest.approx(float(change.norm()), rel=1e-5)
    expected = float((change * change.roll(1, 0)).sum() / (change**2).sum())
    assert found.cosine(0, 1) == pytest.approx(expected, abs=1e-5)
    assert abs(expected) < 0.5


def test_a_base_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model(tmp_path / "a", 1)
    model(tmp_path / "b", 2, rows=32)
    with pytest.raises(PlanError):
        compare_changes([str(tmp_path / "a"), str(tmp_path / "b")])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(adapter(tmp_path / f"a{seed}", seed)) for seed in range(3)]
    assert main(["compare", *names]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names)
    assert "‖Δ‖" in out
    assert main(["compare", *names, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["outputs"] == names
    assert found["cosine"][1][1] == pytest.approx(1)
    assert len(found["gram_by_tensor"]) == found["tensors"] == 2
