"""Adapters of every kind merged with each other: as deltas of the base, into a LoRA or into the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import merger
from merger.errors import RefusedError

if TYPE_CHECKING:
    from tests.merger.adapters.conftest import Workshop

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FULL = 48
"""No delta of the small Llama has a larger rank."""


def lora(*targets: str, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(targets or EVERY), **options})


KINDS: dict[str, peft.PeftConfig] = {
    "lora": lora(),
    "dora": lora("q_proj", "up_proj", "down_proj", use_dora=True),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=EVERY),
    "lokr": peft.LoKrConfig(r=3, alpha=5, target_modules=EVERY),
    "oft": peft.OFTConfig(r=0, oft_block_size=8, target_modules=EVERY),
    "adalora": peft.AdaLoraConfig(init_r=5, target_r=3, lora_alpha=7, total_step=10, target_modules=EVERY),
    "pissa": lora("q_proj", init_lora_weights="pissa"),
}
pytestmark = pytest.mark.filterwarnings("ignore")


def adapters_of(workshop: Workshop, base: Path, names: tuple[str, ...]) -> list[Path]:
    return [workshop.adapter(base, KINDS[name], seed) for seed, name in enumerate(names, 1)]


def weights(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def deltas(workshop: Workshop, base: Path, adapter: Path) -> dict[str, Tensor]:
    """What PEFT's own merge changes, float64."""
    before = weights(base)
    merged = workshop.merged(base, adapter)
    return {name: merged[name].double() - value.double() for name, value in before.items()}


PAIRS = [("lora", "dora"), ("lora", "ia3"), ("loha", "lokr"), ("oft", "adalora"), ("pissa", "dora"), ("ia3", "loha")]


@pytest.mark.parametrize("kind", ["dora", "ia3", "loha"])
def test_the_base_is_the_one_that_the_adapters_name(workshop: Workshop, kind: str, tmp_path: Path) -> None:
    base = workshop.base("llama")
    listed = [{"adapter": str(a)} for a in adapters_of(workshop, base, ("lora", kind))]
    merger.merge({"adapters": listed}, tmp_path / "found")
    merger.merge({"adapters": listed, "base_model": str(base)}, tmp_path / "given")
    found, given = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("found", "given"))
    assert found == given


def test_a_base_that_is_gone_is_missed_where_a_delta_needs_it(workshop: Workshop, tmp_path: Path) -> None:
    adapters = adapters_of(workshop, workshop.base("llama"), ("lora", "dora", "ia3"))
    for adapter in adapters:
        config = json.loads((adapter / "adapter_config.json").read_text())
        gone = config | {"base_model_name_or_path": str(tmp_path / "gone")}
        (adapter / "adapter_config.json").write_text(json.dumps(gone))
    plain, dora, ia3 = ({"adapter": str(adapter)} for adapter in adapters)
    for alone in (plain, ia3):
        assert merger.plan({"adapters": [alone, alone]}, tmp_path / "out").problems == ()
    found = merger.plan({"adapters": [plain, dora]}, tmp_path / "out").problems
    assert [p.code for p in found] == ["no-base"]
    assert "gone" in found[0].what


def test_without_a_base_the_adapter_that_needs_one_is_named_once(workshop: Workshop, tmp_path: Path) -> None:
    adapters = adapters_of(workshop, workshop.base("llama"), ("lora", "dora"))
    for adapter in adapters:
        config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    (found,) = merger.plan({"adapters": [{"adapter": str(a)} for a in adapters]}, tmp_path / "out").problems
    assert found.code == "no-base"
    assert found.what.startswith(f"{adapters[1]} is dora")


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_two_kinds_into_a_model(workshop: Workshop, names: tuple[str, ...], tmp_path: Path) -> None:
    base = workshop.base("llama")
    adapters = adapters_of(workshop, base, names)
    out = workshop.merge(
        {
            "merge_method": "task_arithmetic", "base_model": str(base), "output": {"kind": "model"},
            "adapters": [
                {"adapter": str(a), "parameters": {"weight": w}} for a, w in zip(adapters, (0.7, -0.4), strict=True)
            ],
        },
        tmp_path / "out",
    )  # fmt: skip
    first, second = (deltas(workshop, base, a) for a in adapters)
    for name, value in weights(base).items():
        wanted = value.double() + 0.7 * first[name] - 0.4 * second[name]
        assert float((weights(out)[name].double() - wanted).abs().max()) < 2e-6, name


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_two_kinds_into_a_lora(workshop: Workshop, names: tuple[str, ...], tmp_path: Path) -> None:
    """Stored at full rank nothing is lost, and PEFT loads what was written."""
    base = workshop.base("llama")
    adapters = adapters_of(workshop, base, names)
    out = workshop.merge(
        {
            "merge_method": "task_arithmetic", "base_model": str(base),
            "output": {"kind": "adapter", "store": {"svd": {"rank": FULL}}},
            "adapters": [{"adapter": str(a), "parameters": {"weight": 0.5}} for a in adapters],
        },
        tmp_path / "out",
    )  # fmt: skip
    model = workshop.model(base)
    first, second = (deltas(workshop, base, a) for a in adapters)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((0.5 * first[name] + 0.5 * second[name]).float())
    wanted = workshop.logits(model)
    got = workshop.logits(workshop.loaded(base, out))
    assert float((got - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_ties_of_a_lora_and_a_dora_is_that_of_their_models(workshop: Workshop, method: str, tmp_path: Path) -> None:
    """models: of the folds is the same merge, but for the rounding of the folds."""
    base = workshop.base("llama")
    adapters = adapters_of(workshop, base, ("lora", "dora"))
    each = {"weight": 1.0, "density": 0.4}
    shared = {"merge_method": method, "base_model": str(base), "seed": 3}
    ours = workshop.merge(
        shared | {"adapters": [{"adapter": str(a), "parameters": each} for a in adapters], "output": {"kind": "model"}},
        tmp_path / "ours",
    )
    folds = [workshop.fold(base, [a], tmp_path / f"fold{i}") for i, a in enumerate(adapters)]
    theirs = workshop.merge(shared | {"models": [{"model": str(f), "parameters": each} for f in folds]}, tmp_path / "m")
    for name, value in weights(theirs).items():
        unequal = float(((weights(ours)[name] - value).abs() > 1e-6).float().mean())
        assert unequal < 2e-3, name  # elements at the cut


def test_embeddings_and_conv1d_adapters_stay_low_rank(workshop: Workshop, tmp_path: Path) -> None:
    """concat is exact, without the base, in the orientation that PEFT loads."""
    base = workshop.base("gpt2")
    config = lora("c_attn", "c_proj", "wte", fan_in_fan_out=True)
    adapters = [workshop.adapter(base, config, seed, save_embedding_layers=False) for seed in (1, 2)]
    out = workshop.merge(
        {"merge_method": "cat", "adapters": [{"adapter": str(a), "parameters": {"weight": 0.5}} for a in adapters],
         "output": {"kind": "adapter"}},
        tmp_path / "out",
    )  # fmt: skip
    model = workshop.model(base)
    first, second = (deltas(workshop, base, a) for a in adapters)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # PEFT's merge gives the tied head what it gives the embeddings; compared is what its model says unmerged.
            parameter.add_((0.5 * first[name] + 0.5 * second[name]).float())
        model.lm_head.weight = torch.nn.Parameter(weights(base)["transformer.wte.weight"])
    got = workshop.logits(workshop.loaded(base, out))
    wanted = workshop.logits(model)
    assert float((got - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    assert json.loads((out / "adapter_config.json").read_text())["fan_in_fan_out"] is True


@pytest.mark.parametrize("method", ["tsv_m", "core_ties", "svc"])
@pytest.mark.parametrize("kind", ["gpt2", "layers"])
def test_core_methods_see_every_layer(workshop: Workshop, kind: str, method: str, tmp_path: Path) -> None:
    """An adapter merged in the core and then folded is the merge into the model, transposed layers and all."""
    base = workshop.base(kind)
    targets = ["c_attn", "c_fc", "wte"] if kind == "gpt2" else ["words", "conv1", "conv2", "out"]
    config = lora(*targets, fan_in_fan_out=kind == "gpt2")
    entries = [
        {
            "adapter": str(workshop.adapter(base, config, seed, save_embedding_layers=False)),
            "parameters": {"weight": 0.5},
        }
        for seed in (1, 2)
    ]
    manifest = {"merge_method": method, "base_model": str(base), "adapters": entries}
    merged = workshop.merge(
        manifest | {"output": {"kind": "adapter", "store": {"svd": {"rank": 8}}}}, tmp_path / "adapter"
    )
    folded = workshop.fold(base, [merged], tmp_path / "folded")
    model = workshop.merge(manifest | {"output": {"kind": "model"}}, tmp_path / "model")
    before = weights(base)
    changed = 0
    for name, value in weights(model).items():
        assert torch.allclose(weights(folded)[name], value, atol=2e-6), name
        changed += name in before and not torch.equal(before[name], value)
    assert changed >= 4


@pytest.mark.parametrize("kind", ["linear", "ties", "svd", "cat"])
def test_peft_types_on_convolutions_and_embeddings(workshop: Workshop, kind: str, tmp_path: Path) -> None:
    base = workshop.base("layers")
    targets = ["words", "conv2", "point"] if kind == "svd" else ["words", "conv1", "conv2", "conv3"]
    adapters = [workshop.adapter(base, lora(*targets), seed) for seed in (1, 2)]
    options: dict[str, Any] = {"density": 0.5} if kind == "ties" else {}
    merger.add_weighted_adapter(
        [str(a) for a in adapters], [0.6, 0.3], tmp_path / "out", combination_type=kind, workers=1, **options
    )
    model = peft.PeftModel.from_pretrained(workshop.model(base), str(adapters[0]), adapter_name="s0")
    model.load_adapter(str(adapters[1]), adapter_name="s1")
    model.add_weighted_adapter(["s0", "s1"], [0.6, 0.3], "merged", combination_type=kind, **options)
    model.set_adapter("merged")
    wanted = workshop.logits(model)
    got = workshop.logits(workshop.loaded(base, tmp_path / "out"))
    assert float((got - wanted).abs().max()) < 3e-6 * float(wanted.abs().max())


def test_adalora_that_was_left_with_fewer_ranks(workshop: Workshop, tmp_path: Path) -> None:
    """PEFT saves what its rank_pattern keeps, and divides by the rank at the start."""
    base = workshop.base("llama")
    targets = ["q_proj", "up_proj"]
    config = peft.AdaLoraConfig(init_r=5, target_r=3, lora_alpha=7, total_step=10, target_modules=targets)
    model: Any = peft.get_peft_model(workshop.model(base), config)
    workshop.move(model, 2)
    names = [n.removesuffix(".lora_E.default") for n, _ in model.base_model.model.named_parameters() if "lora_E" in n]
    kept = {f"{name}.lora_E": [i % 2 == 0 or n % 2 == 0 for i in range(5)] for n, name in enumerate(names)}
    model.peft_config["default"].rank_pattern = kept
    adapter = tmp_path / "adapter"
    model.save_pretrained(str(adapter))
    ranks = {v.shape[0] for k, v in load_file(adapter / "adapter_model.safetensors").items() if k.endswith("lora_A")}
    assert ranks == {3, 5}
    out = workshop.fold(base, [adapter], tmp_path / "out")
    wanted = workshop.logits(workshop.loaded(base, adapter))
    got = workshop.logits(workshop.model(out))
    assert float((got - wanted).abs().max()) < 3e-6 * float(wanted.abs().max())


# ---------------------------------------------------------------- IA3


@pytest.mark.parametrize("same", [True, False])
def test_peft_sum_of_ia3(workshop: Workshop, same: bool, tmp_path: Path) -> None:
    base = workshop.base("llama")
    configs = [
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.IA3Config(target_modules=["k_proj", "down_proj"] if same else ["v_proj", "down_proj"],
                       feedforward_modules=["down_proj"]),
    ]  # fmt: skip
    adapters = [workshop.adapter(base, config, seed) for seed, config in enumerate(configs, 1)]
    merger.add_weighted_adapter(
        [str(a) for a in adapters], [0.5, 0.7], tmp_path / "out", combination_type="linear", workers=1
    )
    model = peft.PeftModel.from_pretrained(workshop.model(base), str(adapters[0]), adapter_name="s0")
    model.load_adapter(str(adapters[1]), adapter_name="s1")
    model.add_weighted_adapter(["s0", "s1"], [0.5, 0.7], "merged")
    theirs = peft.get_peft_model_state_dict(model, adapter_name="merged")
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sorted(ours) == sorted(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_ia3_by_method_takes_an_absent_module_for_the_identity(workshop: Workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    adapters = [
        workshop.adapter(base, peft.IA3Config(target_modules=[name], feedforward_modules=[]), seed)
        for seed, name in enumerate(("k_proj", "v_proj"), 1)
    ]
    entries = [{"adapter": str(a), "parameters": {"weight": 0.5}} for a in adapters]
    out = workshop.merge({"merge_method": "task_arithmetic", "adapters": entries}, tmp_path / "out")
    ours = load_file(out / "adapter_model.safetensors")
    for adapter in adapters:
        for name, value in load_file(adapter / "adapter_model.safetensors").items():
            assert torch.allclose(ours[name], 1 + 0.5 * (value - 1), atol=1e-6)
    assert torch.isfinite(workshop.logits(workshop.loaded(base, out))).all()


# ---------------------------------------------------------------- what is saved whole


def heads(workshop: Workshop, base: Path) -> list[Path]:
    return [workshop.adapter(base, lora("q_proj", modules_to_save=["lm_head"]), seed) for seed in (1, 2)]


def head_of(adapter: Path) -> Tensor:
    return load_file(adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"]


@pytest.mark.parametrize("kind", ["adapter", "model"])
@pytest.mark.parametrize("wanted", ["average", {"from": "second"}])
def test_heads_are_averaged_or_chosen(workshop: Workshop, kind: str, wanted: Any, tmp_path: Path) -> None:
    base = workshop.base("llama")
    adapters = heads(workshop, base)
    out = workshop.merge(
        {
            "merge_method": "task_arithmetic", "base_model": str(base),
            "adapters": [
                {"adapter": str(a), "name": name, "parameters": {"weight": w}}
                for a, name, w in zip(adapters, ("first", "second"), (3.0, 1.0), strict=True)
            ],
            "output": {"kind": kind, "modules_to_save": wanted},
        },
        tmp_path / "out",
    )  # fmt: skip
    first, second = map(head_of, adapters)
    expected = second if wanted != "average" else 0.75 * first + 0.25 * second
    if kind == "model":
        got = weights(out)["lm_head.weight"]
    else:
        got = head_of(out)
        loaded = workshop.loaded(base, out)
        assert torch.equal(loaded.base_model.model.lm_head.modules_to_save["default"].weight.detach(), got)
    assert torch.allclose(got, expected, atol=1e-6)
    assert any("lm_head.weight" in said for said in json.loads((out / "raymerge.json").read_text())["deviations"])


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_heads_are_refused_without_a_word(workshop: Workshop, kind: str, tmp_path: Path) -> None:
    base = workshop.base("llama")
    with pytest.raises(RefusedError, match=r"lm_head.weight is saved whole") as caught:
        workshop.merge(
            {"base_model": str(base), "adapters": [{"adapter": str(a)} for a in heads(workshop, base)],
             "output": {"kind": kind}},
            tmp_path / "out",
        )  # fmt: skip
    assert "average" in caught.value.problems[0].fix
    assert not (tmp_path / "out").exists()


def test_a_name_that_no_source_has_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    with pytest.raises(RefusedError, match="no source is called third"):
        workshop.merge(
            {"base_model": str(base), "adapters": [{"adapter": str(a)} for a in heads(workshop, base)],
             "output": {"kind": "adapter", "modules_to_save": {"from": "third"}}},
            tmp_path / "out",
        )  # fmt: skip


def test_biases_and_tokens_do_not_fit_a_plain_adapter(workshop: Workshop, tmp_path: Path) -> None:
    base = workshop.base("llama-bias")
    for config in (lora("q_proj", lora_bias=True), lora("q_proj", bias="all"), lora(trainable_token_indices=[1])):
        with pytest.raises(RefusedError, match=r"kind: model|merged adapter"):
            workshop.merge(
                {"base_model": str(base), "adapters": [{"adapter": str(workshop.adapter(base, config))}],
                 "output": {"kind": "adapter"}},
                tmp_path / "out",
            )  # fmt: skip


def test_resized_embeddings_come_with_their_vocabulary(workshop: Workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    model = workshop.model(base)
    model.resize_token_embeddings(163, mean_resizing=False)
    wrapped = peft.get_peft_model(model, lora("q_proj"))
    workshop.move(wrapped, 5)
    adapter = tmp_path / "adapter"
    wrapped.save_pretrained(str(adapter), save_embedding_layers=True)
    (adapter / "tokenizer_config.json").write_text('{"added": 3}')
    out = workshop.fold(base, [adapter], tmp_path / "out")
    folded = workshop.model(out)
    assert folded.config.vocab_size == 163
    assert (out / "tokenizer_config.json").read_text() == '{"added": 3}'
    wanted, got = workshop.logits(wrapped.eval()), workshop.logits(folded)
    assert float((got - wanted).abs().max()) < 3e-6 * float(wanted.abs().max())


# ---------------------------------------------------------------- what the initialisation did to the base


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_an_adapter_with_the_one_before_training(workshop: Workshop, init: str, kind: str, tmp_path: Path) -> None:
    base = workshop.base("llama")
    torch.manual_seed(3)
    model: Any = peft.get_peft_model(workshop.model(base), lora("q_proj", "up_proj", init_lora_weights=init))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "before"))
    workshop.move(model, 7)
    model.peft_config["default"].init_lora_weights = init
    model.save_pretrained(str(tmp_path / "after"))
    out = workshop.merge(
        {"merge_method": "task_arithmetic", "base_model": str(base), "output": {"kind": kind},
         "adapters": [{"adapter": str(tmp_path / "after"), "initial": str(tmp_path / "before")}]},
        tmp_path / "out",
    )  # fmt: skip
    wanted = workshop.logits(model.eval())
    got = workshop.logits(workshop.model(out) if kind == "model" else workshop.loaded(base, out))
    assert float((got - wanted).abs().max()) < 3e-6 * float(wanted.abs().max())


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_what_cannot_be_found_from_the_base_is_refused(workshop: Workshop, init: str, tmp_path: Path) -> None:
    base = workshop.base("llama")
    adapter = workshop.adapter(base, lora("q_proj"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": init}))
    with pytest.raises(RefusedError, match="needs `initial`"):
        workshop.fold(base, [adapter], tmp_path / "out")


def test_initial_for_an_adapter_that_left_the_base_alone_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    adapter = str(workshop.adapter(base, lora("q_proj")))
    with pytest.raises(RefusedError, match="left the base alone"):
        workshop.merge(
            {"base_model": str(base), "adapters": [{"adapter": adapter, "initial": adapter}]}, tmp_path / "o"
        )
