"""Mixtures of experts that transformers loads: small real models, what they compute, where their numbers come from."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import merger
from jobs.cli import main
from merger import api
from merger.errors import ManifestError, PlanError
from merger.verify import verify_output
from tests.conformance.folders import adapter, lora_tensors

AutoModelForCausalLM: Any = transformers.AutoModelForCausalLM
HIDDEN, LAYERS, VOCABULARY = 32, 2, 64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip
KINDS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
WORDS = ["w0", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]


def make_model(folder: Path, kind: str, seed: int, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(KINDS[kind](**{**SHAPE, **more}))
    for name, value in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(value, 0.5, 0.2)
        else:
            torch.nn.init.normal_(value, 0.0, 0.1)
    model.to(dtype).save_pretrained(folder)
    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w0"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer: Any = transformers.PreTrainedTokenizerFast
    tokenizer(tokenizer_object=tokens, unk_token="w0", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def document(folder: Path, kind: str, mode: str = "random", shared: bool = False, **more: Any) -> dict[str, Any]:
    """Base, and experts `a` and `b`, as mergekit-moe writes it."""
    for seed, name in enumerate(("base", "a", "b")):
        if not (folder / name).exists():
            make_model(folder / name, kind, seed)
    prompts = {"a": (["w3 w4", "w5 w6 w7"], ["w8"]), "b": (["w9 w10"], None), "base": (["w11"], None)}

    def expert(name: str, **keys: Any) -> dict[str, Any]:
        positive, negative = prompts[name]
        found = {"source_model": str(folder / name), "positive_prompts": positive, **keys}
        return {**found, "negative_prompts": negative} if negative else found

    return {
        "base_model": str(folder / "base"), "gate_mode": mode, "experts": [expert("a"), expert("b")],
        **({"shared_experts": [expert("base")]} if shared else {}), **more,
    }  # fmt: skip


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def load(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


TOKENS = torch.tensor([[1, 5, 9, 22, 60, 3]])
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral-llama": ("llama", {}),
    "mixtral-mistral": ("mistral", {}),
    "qwen-llama": ("llama", {"shared": True, "architecture": "qwen"}),
    "qwen-qwen2": ("qwen2", {"shared": True}),
    "qwen3": ("qwen3", {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_equal_experts_answer_as_the_model_they_are(form: str, tmp_path: Path) -> None:
    """With every expert the base itself the router's choice is no choice: a wrong name, config or order shows."""
    kind, more = FORMS[form]
    found = document(tmp_path, kind, **more)
    for entry in found["experts"]:
        entry["source_model"] = str(tmp_path / "base")
    for entry in found.get("shared_experts", ()):
        entry["residual_scale"] = 0.0
    merger.merge(found, tmp_path / "out")
    model, base = load(tmp_path / "out"), load(tmp_path / "base")
    assert model.config.num_experts_per_tok == 2
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, base(TOKENS).logits, atol=2e-6, rtol=2e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").bos_token == "<s>"


@pytest.mark.parametrize("form", FORMS)
def test_experts_are_their_models_bytes_under_the_names_of_published_checkpoints(form: str, tmp_path: Path) -> None:
    kind, more = FORMS[form]
    merger.merge(document(tmp_path, kind, **more), tmp_path / "out")
    made, base = tensors(tmp_path / "out"), tensors(tmp_path / "base")
    block, names = ("block_sparse_moe", ("w1", "w3", "w2")) if "mixtral" in form else (
        "mlp", ("gate_proj", "up_proj", "down_proj"))  # fmt: skip
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for number, expert in enumerate(("a", "b")):
            source = tensors(tmp_path / expert)
            for name, own in zip(names, ("gate_proj", "up_proj", "down_proj"), strict=True):
                one = made.pop(f"{at}{block}.experts.{number}.{name}.weight")
                assert torch.equal(one, source[f"{at}mlp.{own}.weight"])
        assert made.pop(f"{at}{block}.gate.weight").shape == (2, HIDDEN)
        if "shared" in more:
            for own in ("gate_proj", "up_proj", "down_proj"):
                assert torch.equal(made.pop(f"{at}mlp.shared_expert.{own}.weight"), base[f"{at}mlp.{own}.weight"])
            assert made.pop(f"{at}mlp.shared_expert_gate.weight").shape == (1, HIDDEN)
            for own in ("q_proj", "k_proj", "v_proj"):
                bias = made.pop(f"{at}self_attn.{own}.bias")
                assert torch.equal(bias, base.get(f"{at}self_attn.{own}.bias", torch.zeros_like(bias)))
    rest = {n: v for n, v in base.items() if ".mlp." not in n and not (n.endswith(".bias") and "shared" in more)}
    assert made.keys() == rest.keys()
    assert all(torch.equal(made[n], rest[n]) for n in rest)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse config", "full config"])
def test_the_config_means_what_the_base_s_meant(form: str, sparse: bool, tmp_path: Path) -> None:
    """Also where the base's config leaves out what its architecture takes for granted."""
    kind, more = FORMS[form]
    found = document(tmp_path, kind, **more)
    if sparse:
        file = tmp_path / "base" / "config.json"
        keys = {"model_type", "architectures", *SHAPE} - {"max_position_embeddings", "head_dim"}
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k in keys}))
    merger.merge(found, tmp_path / "out")
    base, made = AutoConfig.from_pretrained(tmp_path / "base"), AutoConfig.from_pretrained(tmp_path / "out")
    for key in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
        "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id",
        "eos_token_id",
    ):  # fmt: skip
        assert getattr(made, key) == getattr(base, key), key
    if "qwen-llama" not in form:
        assert (made.sliding_window or None) == (getattr(base, "sliding_window", None) or None)


def test_a_tied_base_stays_tied(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        make_model(tmp_path / name, "llama", seed, tie_word_embeddings=True)
    merger.merge(document(tmp_path, "llama"), tmp_path / "out")
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    model = load(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_deepseek_has_its_names_and_a_shared_expert_without_a_gate(tmp_path: Path) -> None:
    found = document(tmp_path, "llama", shared=True)
    del found["shared_experts"][0]["positive_prompts"]
    merger.merge(found, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["n_routed_experts"], config["n_shared_experts"]) == ("deepseek", 2, 1)
    made = tensors(tmp_path / "out")
    assert "model.layers.1.mlp.shared_experts.down_proj.weight" in made
    assert made["model.layers.0.mlp.gate.weight"].shape == (2, HIDDEN)
    assert not any("shared_expert_gate" in name for name in made)


# ---- gates -----------------------------------------------------------------------------------------------------------


def expected_cheap(folder: Path) -> Tensor:
    """Mean directions of the prompts' embedding rows, positive minus negative, in float64."""
    rows = tensors(folder / "base")["model.embed_tokens.weight"].double()

    def direction(prompts: list[list[int]]) -> Tensor:
        total: Tensor = torch.stack([rows[i] for ids in prompts for i in ids]).sum(dim=0)
        return torch.nn.functional.normalize(total, dim=0)

    a = direction([[1, 3, 4], [1, 5, 6, 7]]) - direction([[1, 8]])
    return torch.stack([a / a.norm(), direction([[1, 9, 10]])])


def test_cheap_gates_are_the_prompts_embeddings_in_every_layer(tmp_path: Path) -> None:
    merger.merge(document(tmp_path, "llama", "cheap_embed"), tmp_path / "out")
    made = tensors(tmp_path / "out")
    for layer in range(LAYERS):
        gate = made[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        torch.testing.assert_close(gate.double(), expected_cheap(tmp_path), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_hidden_gates_are_what_enters_each_layer(mode: str, kind: str, tmp_path: Path) -> None:
    merger.moe(document(tmp_path, kind, mode), tmp_path / "out")
    model = load(tmp_path / "base").double()
    made = tensors(tmp_path / "out")
    block = "block_sparse_moe" if kind == "llama" else "mlp"

    def states(prompts: list[list[int]]) -> Tensor:
        found = []
        for ids in prompts:
            with torch.no_grad():
                hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[:LAYERS]
            stacked = torch.stack(hidden)[:, 0]
            found.append(stacked.mean(dim=1) if mode == "hidden_avg" else stacked[:, -1])
        return torch.stack(found).mean(dim=0)

    a, b = states([[1, 3, 4], [1, 5, 6, 7]]) - states([[1, 8]]), states([[1, 9, 10]])
    for layer in range(LAYERS):
        wanted = torch.stack([x[layer] / x[layer].norm() for x in (a, b)])
        gate = made[f"model.layers.{layer}.{block}.gate.weight"].double()
        torch.testing.assert_close(gate, wanted, atol=1e-5, rtol=1e-5)


def test_a_shared_expert_has_a_gate_of_its_prompts(tmp_path: Path) -> None:
    merger.merge(document(tmp_path, "qwen2", "cheap_embed", shared=True), tmp_path / "out")
    gate = tensors(tmp_path / "out")["model.layers.1.mlp.shared_expert_gate.weight"].double()
    rows = tensors(tmp_path / "base")["model.embed_tokens.weight"].double()
    wanted = rows[1] + rows[11]
    torch.testing.assert_close(gate[0], wanted / wanted.norm(), atol=1e-6, rtol=1e-6)


def test_random_gates_follow_their_law_and_nothing_else(tmp_path: Path) -> None:
    found = document(tmp_path, "llama", "random")
    found["experts"] = [copy.deepcopy(found["experts"][i % 2]) for i in range(64)]
    for mode, bound in (("random", None), ("uniform_random", HIDDEN**-0.5)):
        merger.merge({**found, "gate_mode": mode}, tmp_path / mode)
        gates = [v for n, v in tensors(tmp_path / mode).items() if n.endswith("gate.weight")]
        values = torch.cat([g.reshape(-1) for g in gates])
        assert not torch.equal(*gates)
        if bound is None:
            assert abs(float(values.mean())) < 0.06
            assert abs(float(values.std()) - 1) < 0.05
        else:
            assert float(values.abs().max()) <= bound
            assert abs(float(values.std()) - bound / 3**0.5) < 0.05 * bound


def test_a_seed_decides_random_gates(tmp_path: Path) -> None:
    def gate(name: str, **keys: Any) -> Tensor:
        merger.merge(document(tmp_path, "llama", **keys), tmp_path / name)
        return tensors(tmp_path / name)["model.layers.0.block_sparse_moe.gate.weight"]

    assert torch.equal(gate("one"), gate("again", seed=0))
    assert not torch.equal(gate("one-more", seed=1), gate("one-last"))


def test_noise_and_residual_scale(tmp_path: Path) -> None:
    found = document(tmp_path, "llama")
    found["experts"][0] |= {"noise_scale": 0.25, "residual_scale": 2.0}
    merger.merge(found, tmp_path / "out")
    made, source = tensors(tmp_path / "out"), tensors(tmp_path / "a")
    noise = []
    for own, name in (("gate_proj", "w1"), ("down_proj", "w2")):
        for layer in range(LAYERS):
            one = made[f"model.layers.{layer}.block_sparse_moe.experts.0.{name}.weight"]
            scale = 2.0 if own == "down_proj" else 1.0
            noise.append((one / scale - source[f"model.layers.{layer}.mlp.{own}.weight"]).reshape(-1))
    assert not torch.equal(noise[0], noise[1])
    joined = torch.cat(noise)
    assert abs(float(joined.mean())) < 0.02
    assert abs(float(joined.std()) - 0.25) < 0.01


def test_a_named_dtype_is_that_of_all_tensors(tmp_path: Path) -> None:
    merger.merge(document(tmp_path, "llama", "cheap_embed", dtype="bfloat16"), tmp_path / "out")
    assert {v.dtype for v in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


# ---- the run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["random", "cheap_embed", "hidden"])
def test_bytes_do_not_depend_on_workers_or_memory_and_replay(mode: str, tmp_path: Path) -> None:
    from merger.evaluation.hidden import hidden_states

    found = document(tmp_path, "llama", mode)
    found["experts"][1]["noise_scale"] = 0.1
    one = merger.moe(found, tmp_path / "one", workers=1, memory=64 << 20)
    two = merger.moe(found, tmp_path / "two", workers=3)
    assert one.content_digest == two.content_digest
    assert merger.moe(found, tmp_path / "two").already_done
    report = verify_output(str(tmp_path / "one"), replay=None, hidden=hidden_states)
    assert report.replayed == len(tensors(tmp_path / "one"))


def test_an_expert_may_be_made_by_another_document(tmp_path: Path) -> None:
    found = document(tmp_path, "llama", "cheap_embed")
    mixed = {"name": "mixed", "merge_method": "linear", "models": [
        {"model": str(tmp_path / n), "parameters": {"weight": 0.5}} for n in ("a", "b")]}  # fmt: skip
    found["experts"][1]["source_model"] = "mixed"
    merger.merge("\n---\n".join(json.dumps(d) for d in (mixed, found)) + "\n", tmp_path / "out")
    made = tensors(tmp_path / "out")["model.layers.0.block_sparse_moe.experts.1.w1.weight"]
    name = "model.layers.0.mlp.gate_proj.weight"
    wanted = (tensors(tmp_path / "a")[name] + tensors(tmp_path / "b")[name]) / 2
    torch.testing.assert_close(made, wanted)


def test_hidden_gates_need_someone_who_makes_them(tmp_path: Path) -> None:
    found = document(tmp_path, "llama", "hidden")
    with pytest.raises(PlanError, match="needs-forward-pass"):
        merger.merge(found, tmp_path / "out")
    with pytest.raises(PlanError, match="memory"):
        merger.moe(found, tmp_path / "out", memory=1 << 10)
    assert not (tmp_path / "out").exists()


def test_the_command_and_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "moe.yaml"
    file.write_text(json.dumps(document(tmp_path, "llama", "hidden")))
    assert main(["plan", str(file)]) == 0
    assert "gates   hidden: 4 prompts" in capsys.readouterr().out
    assert main(["moe", str(file), str(tmp_path / "out"), "--on", "here"]) == 0
    assert load(tmp_path / "out").config.num_local_experts == 2
    file.write_text(json.dumps({"adapters": [{"adapter": "org/a"}]}))
    assert main(["moe", str(file), str(tmp_path / "none")]) == 2


# ---- refusals --------------------------------------------------------------------------------------------------------


def problems(found: dict[str, Any]) -> dict[str, str]:
    try:
        return {p.code: f"{p.what} {p.why}" for p in api.plan(found).problems}
    except ManifestError as error:
        return {p.code: f"{p.what} {p.why} {p.where}" for p in error.problems}


@pytest.mark.parametrize(
    "change, code",
    [
        ({"experts_per_token": 3}, "out-of-bounds"),
        ({"architecture": "gpt"}, "bad-value"),
        ({"architecture": "qwen3"}, "bad-architecture"),
        ({"merge_method": "ties"}, "conflict"),
        ({"base_model": None}, "missing-key"),
        ({"gate_mode": "learned"}, "bad-value"),
        ({"output": {"kind": "adapter"}}, "bad-kind"),
    ],
)
def test_what_cannot_be_assembled_is_refused(change: dict[str, Any], code: str, tmp_path: Path) -> None:
    assert code in problems({**document(tmp_path, "llama"), **change})


def test_prompts_are_asked_for_where_gates_are_made_from_them(tmp_path: Path) -> None:
    found = document(tmp_path, "llama", "cheap_embed")
    found["experts"][1] = {"source_model": str(tmp_path / "b")}
    assert "experts[1].positive_prompts" in problems(found)["missing-key"]
    found["experts"][1] = {**found["experts"][0], "source_model": str(tmp_path / "b")}
    assert "same prompts" in problems(found)["conflict"]
    found["experts"][1]["positive_prompts"] = ["w3", " "]
    del found["experts"][1]["negative_prompts"]
    assert problems(found) == {}
    (tmp_path / "base" / "tokenizer.json").unlink()
    assert "no-tokenizer" in problems(found)


def test_a_base_with_more_than_the_output_can_hold_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "base", "llama", 0, attention_bias=True)
    found = document(tmp_path, "llama")
    assert "8 tensors" in problems(found)["no-place"]


def test_experts_of_another_shape_or_depth_are_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "b", "llama", 2, intermediate_size=64)
    assert "shape-mismatch" in problems(document(tmp_path, "llama"))
    deep = tmp_path / "deep"
    make_model(deep / "b", "llama", 2, num_hidden_layers=3)
    assert "layers-differ" in problems(document(deep, "llama"))
    mixed = tmp_path / "mixed"
    make_model(mixed / "b", "qwen2", 2)
    assert "architectures-differ" in problems(document(mixed, "llama"))


def test_keys_that_mergekit_ignores_are_warnings_and_transplants_are_not(tmp_path: Path) -> None:
    found = document(tmp_path, "llama")
    found["experts"][0]["denoise"] = 1
    (warning,) = api.plan(found).warnings
    assert "'denoise' has no effect" in warning.what
    assert "transplanted" in problems({**found, "tokensurgeon": {"donor": "org/name"}})["not-supported"]


def test_an_expert_may_be_a_model_with_an_adapter(tmp_path: Path) -> None:
    found = document(tmp_path, "llama")
    modules = [f"model.layers.{i}.mlp.up_proj" for i in range(LAYERS)]
    changes = lora_tensors(5, modules=modules, rows=48, cols=HIDDEN)
    adapter(tmp_path / "lora", 5, tensors=changes, config={"base_model_name_or_path": str(tmp_path / "a")})
    found["experts"][0]["source_model"] = f"{tmp_path / 'a'}+{tmp_path / 'lora'}"
    merger.merge(found, tmp_path / "out")
    one = tensors(tmp_path / "out")["model.layers.1.block_sparse_moe.experts.0.w3.weight"]
    a, b = (changes[f"base_model.model.{modules[1]}.lora_{x}.weight"].double() for x in "AB")
    source = tensors(tmp_path / "a")["model.layers.1.mlp.up_proj.weight"].double()
    torch.testing.assert_close(one.double(), source + 2.0 * b @ a, atol=1e-5, rtol=1e-5)


def test_a_chat_template_may_be_named(tmp_path: Path) -> None:
    merger.merge(document(tmp_path, "llama", chat_template="chatml"), tmp_path / "out")
    assert "<|im_start|>" in str(AutoTokenizer.from_pretrained(tmp_path / "out").chat_template)


def test_experts_of_other_rotary_settings_are_remarked_on(tmp_path: Path) -> None:
    make_model(tmp_path / "b", "llama", 2, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    plan = api.plan(document(tmp_path, "llama"))
    assert plan.problems == ()
    assert [w.code for w in plan.warnings] == ["settings-differ"]
