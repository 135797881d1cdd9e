"""LoRA files of image trainers: kohya's, LyCORIS's and diffusers' names, merged and folded.

The files are written here from the published layouts: neither diffusers nor LyCORIS is installed where this runs. The
twins are plain float64 formulas.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merger
from merger.catalog import inspect_source
from merger.errors import RaymergeError, RefusedError
from merger.formats.bare_lora import flat_name, parse_keys, tensors_of
from merger.serving import for_vllm

State = dict[str, Tensor]
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flat(path: str, component: str = "lora_unet") -> str:
    return f"{component}_{path.replace('.', '_')}"


def kohya(path: Path, seed: int, *, rank: int = 4, alpha: float | None = 2.0) -> Path:
    """A linear layer, a convolution and a layer of a text encoder, as kohya's scripts save them."""
    state: State = {}
    for n, (module, down, up) in enumerate([
        (flat(Q), (rank, 12), (20, rank)),
        (flat(CONV), (rank, 5, 3, 3), (8, rank, 1, 1)),
        (flat(TEXT, "lora_te"), (rank, 16), (16, rank)),
    ]):  # fmt: skip
        state[f"{module}.lora_down.weight"] = normal(seed * 10 + n, *down)
        state[f"{module}.lora_up.weight"] = normal(seed * 10 + n + 5, *up)
        if alpha is not None:
            state[f"{module}.alpha"] = torch.tensor(alpha)
    save_file(state, path, {"ss_network_module": "networks.lora"})
    return path


def delta(state: State, module: str) -> Tensor:
    """alpha / rank · up·down of kohya's names, float64, as (out, in·…)."""
    down, up = (state[f"{module}.lora_{part}.weight"].double() for part in ("down", "up"))
    alpha = state.get(f"{module}.alpha")
    scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
    return scale * up.flatten(1) @ down.flatten(1)


def dotted(path: Path, seed: int, metadata: dict[str, str] | None = None) -> Path:
    """The same layers as diffusers saves them."""
    state: State = {}
    for n, (module, down, up) in enumerate([
        (f"unet.{Q}", (4, 12), (20, 4)), (f"unet.{CONV}", (4, 5, 3, 3), (8, 4, 1, 1)),
        (f"text_encoder.{TEXT}", (4, 16), (16, 4)),
    ]):  # fmt: skip
        state[f"{module}.lora_A.weight"] = normal(seed * 10 + n, *down)
        state[f"{module}.lora_B.weight"] = normal(seed * 10 + n + 5, *up)
    save_file(state, path, metadata)
    return path


def product(state: State, module: str) -> Tensor:
    return state[f"{module}.lora_B.weight"].double().flatten(1) @ state[f"{module}.lora_A.weight"].double().flatten(1)


def run(out: Path, adapters: list[Path], **more: object) -> State:
    manifest: dict[str, object] = {
        "merge_method": "task_arithmetic",
        "adapters": [{"adapter": str(a)} for a in adapters],
    } | more
    merger.merge(manifest, out)
    (file,) = out.glob("*.safetensors")
    return load_file(file)


def close(made: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert (made - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_kohya_files_are_merged_into_one_with_kohyas_names(tmp_path: Path) -> None:
    one, other = kohya(tmp_path / "one.safetensors", 1), kohya(tmp_path / "other.safetensors", 2, rank=3, alpha=None)
    made = run(tmp_path / "out", [one, other])
    assert {name.partition(".")[2] for name in made} == {"lora_down.weight", "lora_up.weight", "alpha"}
    for module in (flat(Q), flat(CONV), flat(TEXT, "lora_te")):
        assert made[f"{module}.alpha"].shape == ()
        assert float(made[f"{module}.alpha"]) == made[f"{module}.lora_down.weight"].shape[0] == 7
        close(delta(made, module), delta(load_file(one), module) + delta(load_file(other), module))
    assert made[f"{flat(CONV)}.lora_down.weight"].shape == (7, 5, 3, 3)
    assert made[f"{flat(CONV)}.lora_up.weight"].shape == (8, 7, 1, 1)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert inspect_source(str(tmp_path / "out")).spelling == "kohya"  # it is read as what it was made from


@pytest.mark.parametrize("method", ["ties", "dare_ties", "knots_ties", "iso_c"])
def test_any_method_of_adapters_takes_kohya_files(tmp_path: Path, method: str) -> None:
    files = [kohya(tmp_path / f"{n}.safetensors", n) for n in (1, 2)]
    made = run(tmp_path / "out", files, merge_method=method, output={"store": {"svd": {"rank": 4}}})
    assert made[f"{flat(CONV)}.lora_down.weight"].shape == (4, 5, 3, 3)
    assert all(bool(value.isfinite().all()) for value in made.values())


def test_ranks_that_follow_from_energy_are_the_alphas(tmp_path: Path) -> None:
    files = [kohya(tmp_path / f"{n}.safetensors", n) for n in (1, 2)]
    made = run(tmp_path / "out", files, output={"store": {"svd": {"energy": 0.7}}})
    for module in (flat(Q), flat(CONV)):
        wanted = sum(delta(load_file(file), module) for file in files)
        assert isinstance(wanted, Tensor)
        u, s, v = torch.linalg.svd(wanted, full_matrices=False)
        share = (s**2).cumsum(0) / (s**2).sum()
        rank = int((share < 0.7).sum()) + 1
        assert made[f"{module}.lora_down.weight"].shape[0] == float(made[f"{module}.alpha"]) == rank
        close(delta(made, module), (u[:, :rank] * s[:rank]) @ v[:rank])
    assert made[f"{flat(CONV)}.lora_down.weight"].shape[1:] == (5, 3, 3)


def test_diffusers_files_are_merged_into_one_with_diffusers_names(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    one = dotted(folder / "pytorch_lora_weights.safetensors", 1)
    other = dotted(tmp_path / "other.safetensors", 2)
    made = run(tmp_path / "out", [folder, other])
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == ["pytorch_lora_weights.safetensors"]
    for module in (f"unet.{Q}", f"unet.{CONV}", f"text_encoder.{TEXT}"):
        close(product(made, module), product(load_file(one), module) + product(load_file(other), module))
    assert len(made) == 6


def test_alphas_of_diffusers_metadata_count(tmp_path: Path) -> None:
    config = {"unet.r": 4, "unet.lora_alpha": 12, "unet.rank_pattern": {}, "unet.use_rslora": False}
    file = dotted(tmp_path / "one.safetensors", 1, {"lora_adapter_metadata": json.dumps(config)})
    made = run(tmp_path / "out", [file])
    close(product(made, f"unet.{Q}"), 3.0 * product(load_file(file), f"unet.{Q}"))
    close(product(made, f"text_encoder.{TEXT}"), product(load_file(file), f"text_encoder.{TEXT}"))


def test_spellings_of_the_same_modules_are_mixed_under_kohyas_names(tmp_path: Path) -> None:
    one, other = kohya(tmp_path / "one.safetensors", 1), dotted(tmp_path / "other.safetensors", 2)
    made = run(tmp_path / "out", [other, one])
    assert len(made) == 9
    for name, spelled in ((flat(Q), f"unet.{Q}"), (flat(TEXT, "lora_te"), f"text_encoder.{TEXT}")):
        close(delta(made, name), delta(load_file(one), name) + product(load_file(other), spelled))


def test_files_that_name_modules_by_other_schemes_are_refused_with_both_sides(tmp_path: Path) -> None:
    module = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    save_file({f"{module}.lora_down.weight": normal(1, 4, 12), f"{module}.lora_up.weight": normal(2, 20, 4)},
              tmp_path / "native.safetensors")  # fmt: skip
    for other in (kohya(tmp_path / "one.safetensors", 1), dotted(tmp_path / "other.safetensors", 2)):
        with pytest.raises(RefusedError) as caught:
            run(tmp_path / "out", [tmp_path / "native.safetensors", other])
        (problem,) = caught.value.problems
        assert problem.code == "spellings-differ"
        assert module in problem.where
        assert "down_blocks" in problem.where
    assert not (tmp_path / "out").exists()


def test_older_names_of_diffusers_are_todays() -> None:
    names = [
        "unet.down_blocks.0.attn1.processor.to_q_lora.down.weight", "mid_block.attn2.processor.to_out_lora.up.weight",
        "text_encoder.text_model.layers.0.self_attn.to_q_lora.up.weight", "unet.up_blocks.0.to_v.lora.down.weight",
        "text_encoder.text_model.layers.1.self_attn.k_proj.lora_linear_layer.up.weight",
    ]  # fmt: skip
    keys = parse_keys(names)
    assert keys is not None
    assert keys.spelling == "diffusers"
    assert {module: next(iter(roles)) for module, roles in keys.modules.items()} == {
        "unet.down_blocks.0.attn1.to_q": "lora_A", "unet.mid_block.attn2.to_out.0": "lora_B",
        "text_encoder.text_model.layers.0.self_attn.q_proj": "lora_B", "unet.up_blocks.0.to_v": "lora_A",
        "text_encoder.text_model.layers.1.self_attn.k_proj": "lora_B",
    }  # fmt: skip
    assert flat_name("transformer.single_transformer_blocks.3.attn.to_q") == (
        "lora_transformer_single_transformer_blocks_3_attn_to_q"
    )


def lycoris(path: Path) -> tuple[Path, dict[str, Tensor]]:
    """LoHa, LoKr and LoCon modules, with the deltas that they stand for, by the base's name."""
    h, k, c, t = flat("mid_block.a"), flat("mid_block.b"), flat("mid_block.conv_in"), flat("mid_block.conv_out")
    state: State = {
        f"{h}.hada_w1_a": normal(1, 10, 3), f"{h}.hada_w1_b": normal(2, 3, 12), f"{h}.hada_w2_a": normal(3, 10, 3),
        f"{h}.hada_w2_b": normal(4, 3, 12), f"{h}.alpha": torch.tensor(1.5, dtype=torch.bfloat16),
        f"{k}.lokr_w1": normal(5, 2, 3), f"{k}.lokr_w2_a": normal(6, 5, 2), f"{k}.lokr_w2_b": normal(7, 2, 4),
        f"{k}.alpha": torch.tensor(1.0, dtype=torch.float16),
        f"{c}.lora_down.weight": normal(8, 4, 5, 1, 1), f"{c}.lora_mid.weight": normal(9, 4, 4, 3, 3),
        f"{c}.lora_up.weight": normal(10, 8, 4, 1, 1), f"{c}.alpha": torch.tensor(2.0),
        f"{t}.hada_w1_a": normal(11, 2, 8), f"{t}.hada_w1_b": normal(12, 2, 5), f"{t}.hada_t1": normal(13, 2, 2, 3, 3),
        f"{t}.hada_w2_a": normal(14, 2, 8), f"{t}.hada_w2_b": normal(15, 2, 5), f"{t}.hada_t2": normal(16, 2, 2, 3, 3),
        f"{t}.alpha": torch.tensor(1.0),
    }  # fmt: skip
    save_file(state, path)
    d = {name: value.double() for name, value in state.items()}

    def cp(n: int) -> Tensor:
        return torch.einsum("ijkl,ip,jr->prkl", d[f"{t}.hada_t{n}"], d[f"{t}.hada_w{n}_a"], d[f"{t}.hada_w{n}_b"])

    mid = torch.einsum(
        "op,pqkl,qi->oikl", d[f"{c}.lora_up.weight"][..., 0, 0], d[f"{c}.lora_mid.weight"],
        d[f"{c}.lora_down.weight"][..., 0, 0],
    )  # fmt: skip
    return path, {
        "mid_block.a": 0.5 * (d[f"{h}.hada_w1_a"] @ d[f"{h}.hada_w1_b"]) * (d[f"{h}.hada_w2_a"] @ d[f"{h}.hada_w2_b"]),
        "mid_block.b": 0.5 * torch.kron(d[f"{k}.lokr_w1"], d[f"{k}.lokr_w2_a"] @ d[f"{k}.lokr_w2_b"]),
        "mid_block.conv_in": 0.5 * mid, "mid_block.conv_out": 0.5 * cp(1) * cp(2),
    }  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_lycoris_files_are_folded_into_a_bare_checkpoint(tmp_path: Path, prefix: str) -> None:
    file, deltas = lycoris(tmp_path / "lycoris.safetensors")
    base = {f"{prefix}{name}.weight": normal(20, *value.shape) for name, value in deltas.items()}
    base |= {f"{prefix}other.bias": normal(30, 7), "first_stage_model.decoder.weight": normal(31, 3, 3)}
    save_file(base, tmp_path / "base.safetensors")
    merger.merge(merger.api.fold_manifest(file, base=tmp_path / "base.safetensors"), tmp_path / "out")
    made = load_file(tmp_path / "out" / "base.safetensors")
    assert made.keys() == base.keys()
    for name, value in deltas.items():
        close(made[f"{prefix}{name}.weight"].double(), base[f"{prefix}{name}.weight"].double() + value, 1e-6)
    assert torch.equal(made[f"{prefix}other.bias"], base[f"{prefix}other.bias"])


def test_lycoris_is_written_as_kohya_lora_by_svd(tmp_path: Path) -> None:
    file, deltas = lycoris(tmp_path / "lycoris.safetensors")
    made = run(tmp_path / "out", [file], output={"store": {"svd": {"rank": 12}}})
    for name, value in deltas.items():
        close(delta(made, flat(name)), value.flatten(1))
    assert made[f"{flat('mid_block.conv_in')}.lora_down.weight"].shape[1:] == (5, 3, 3)


def test_a_convolution_whose_kernel_no_file_says_is_refused(tmp_path: Path) -> None:
    module = flat(CONV)
    state = {f"{module}.hada_{part}": normal(n, *((8, 2) if part.endswith("a") else (2, 45)))
             for n, part in enumerate(("w1_a", "w1_b", "w2_a", "w2_b"))}  # fmt: skip
    save_file(state, tmp_path / "loha.safetensors")
    with pytest.raises(RefusedError, match="kernel"):
        run(tmp_path / "out", [tmp_path / "loha.safetensors"], output={"store": {"svd": {"rank": 4}}})
    both = [tmp_path / "loha.safetensors", kohya(tmp_path / "one.safetensors", 1)]
    made = run(tmp_path / "out", both, output={"store": {"svd": {"rank": 4}}})  # the other file says it
    assert made[f"{module}.lora_down.weight"].shape == (4, 5, 3, 3)


def test_a_fold_into_a_checkpoint_of_other_names_is_refused(tmp_path: Path) -> None:
    save_file({"input_blocks.1.weight": normal(1, 20, 12)}, tmp_path / "base.safetensors")
    manifest = merger.api.fold_manifest(kohya(tmp_path / "one.safetensors", 1), base=tmp_path / "base.safetensors")
    with pytest.raises(RefusedError) as caught:
        merger.merge(manifest, tmp_path / "out")
    assert [p.code for p in caught.value.problems] == ["no-such-tensor"]
    assert flat(Q) in caught.value.problems[0].where
    assert "input_blocks.1.weight" in caught.value.problems[0].why


def test_names_that_two_tensors_flatten_to_are_not_guessed() -> None:
    assert tensors_of(["lora_unet_a_b"], ["a.b.weight"]) == {"lora_unet_a_b": "a.b.weight"}
    assert tensors_of(["lora_unet_a_b"], ["a.b.weight", "a_b.weight"]) == {}


@pytest.mark.parametrize(
    "extra, code",
    [
        ({f"{flat(Q)}.dora_scale": torch.ones(20, 1)}, "unsupported-adapter"),
        ({f"{flat(Q)}.alpha": torch.tensor(float("nan"))}, "bad-alpha"),
        ({f"{flat(Q)}.alpha": torch.ones(2)}, "bad-alpha"),
        ({"bundle_emb.a.string_to_param": torch.ones(3)}, "unknown-tensor"),
        ({f"{flat(Q)}.diff_b": torch.ones(20)}, "unsupported-adapter"),
        ({f"{flat('x')}.lora_down.weight": torch.ones(4, 2)}, "missing-tensor"),
        ({f"{flat(Q)}.lora_down.weight": torch.ones(3, 12)}, "rank-mismatch"),
    ],
)
def test_what_cannot_be_merged_right_is_refused(tmp_path: Path, extra: State, code: str) -> None:
    file = kohya(tmp_path / "one.safetensors", 1)
    save_file(load_file(file) | extra, file)
    with pytest.raises(RefusedError) as caught:
        run(tmp_path / "out", [file])
    assert [p.code for p in caught.value.problems] == [code]
    assert not (tmp_path / "out").exists()


def test_a_file_of_other_names_is_no_adapter(tmp_path: Path) -> None:
    save_file({"base_model.model.q.lora_A.weight": normal(1, 4, 12)}, tmp_path / "adapter.safetensors")
    with pytest.raises(RaymergeError, match="adapter_config"):
        run(tmp_path / "out", [tmp_path / "adapter.safetensors"])
    assert inspect_source(str(tmp_path / "adapter.safetensors")).kind == "tensors"


def test_inspect_says_whose_names_a_file_has(tmp_path: Path) -> None:
    catalog = inspect_source(str(kohya(tmp_path / "one.safetensors", 1)))
    assert (catalog.kind, catalog.spelling, len(catalog.modules)) == ("adapter", "kohya", 3)
    assert {module.scaling for module in catalog.modules.values()} == {0.5}
    assert "kohya" in for_vllm(catalog).findings[0].what


def test_lora_files_that_are_merged_as_models_are_warned_of(tmp_path: Path) -> None:
    files = [kohya(tmp_path / f"{n}.safetensors", n) for n in (1, 2)]
    entries = [{"model": str(file), "parameters": {"weight": 1.0}} for file in files]
    planned = merger.plan({"merge_method": "linear", "models": entries}, tmp_path / "out")
    assert [w.code for w in planned.warnings] == ["factors-by-name"]


def test_a_component_is_left_out_of_a_fold_with_exclude(tmp_path: Path) -> None:
    file = kohya(tmp_path / "one.safetensors", 1)
    base = {f"{Q}.weight": normal(1, 20, 12), f"{CONV}.weight": normal(2, 8, 5, 3, 3)}
    save_file(base, tmp_path / "unet.safetensors")
    manifest = {
        "base_model": str(tmp_path / "unet.safetensors"), "output": {"kind": "tensors"},
        "adapters": [{"adapter": str(file), "exclude": ["lora_te_*"]}],
    }  # fmt: skip
    merger.merge(manifest, tmp_path / "out")
    made, state = load_file(tmp_path / "out" / "unet.safetensors"), load_file(file)
    for name in (Q, CONV):
        wanted = base[f"{name}.weight"].double() + delta(state, flat(name)).reshape(base[f"{name}.weight"].shape)
        close(made[f"{name}.weight"].double(), wanted, 1e-6)


def test_names_of_peft_and_of_image_trainers_are_not_mixed(tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    key = f"base_model.model.{Q}"
    save_file({f"{key}.lora_A.weight": normal(1, 4, 12), f"{key}.lora_B.weight": normal(2, 20, 4)},
              folder / "adapter_model.safetensors")  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    with pytest.raises(RefusedError, match="do not name modules alike"):
        run(tmp_path / "out", [folder, kohya(tmp_path / "one.safetensors", 1)])


@pytest.mark.parametrize("kind", ["linear", "ties", "cat", "svd"])
def test_combination_types_of_peft_take_kohya_files(tmp_path: Path, kind: str) -> None:
    files = [kohya(tmp_path / f"{n}.safetensors", n) for n in (1, 2)]
    more = {"density": 0.5} if kind == "ties" else {}
    manifest = {"combination_type": kind, "adapters": [{"adapter": str(file)} for file in files], **more}
    merger.merge(manifest, tmp_path / "out")
    made = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    if kind == "cat":
        close(delta(made, flat(Q)), sum((delta(load_file(f), flat(Q)) for f in files), torch.zeros(20, 12)))
    assert float(made[f"{flat(Q)}.alpha"]) == made[f"{flat(Q)}.lora_down.weight"].shape[0]


def test_factors_take_the_dtype_that_is_asked_for_and_alphas_stay_exact(tmp_path: Path) -> None:
    file = kohya(tmp_path / "one.safetensors", 1)
    made = run(tmp_path / "out", [file, file], dtype="bfloat16")
    dtypes = {name.rpartition(".")[2]: value.dtype for name, value in made.items()}
    assert dtypes == {"weight": torch.bfloat16, "alpha": torch.float32}


def test_a_checkpoint_with_parameters_called_alpha_is_no_lora() -> None:
    assert parse_keys(["diffusion_model.blocks.0.alpha", "diffusion_model.blocks.0.weight"]) is None
