"""The long tail of tuners through PEFT's own layer code: the same weights as PEFT's merge of the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from merger.adapters.bridge import BRIDGED
from merger.errors import RefusedError

if TYPE_CHECKING:
    from tests.merger.adapters.conftest import Workshop

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["q_proj", "up_proj"]


def on_targets(kind: Callable[..., peft.PeftConfig], **options: object) -> peft.PeftConfig:
    return kind(**{"target_modules": TARGETS, **options})


CASES: dict[str, peft.PeftConfig] = {
    "BOFT": on_targets(peft.BOFTConfig, boft_block_size=4, boft_n_butterfly_factor=1),
    "BOFT, two factors": on_targets(peft.BOFTConfig, boft_block_size=4, boft_n_butterfly_factor=2),
    "HRA": on_targets(peft.HRAConfig, r=4),
    "HRA, orthogonal": on_targets(peft.HRAConfig, r=4, apply_GS=True),
    "VERA": on_targets(peft.VeraConfig, r=4),
    "PVERA": on_targets(peft.PveraConfig, r=4),
    "FOURIERFT": on_targets(peft.FourierFTConfig, n_frequency=50, scaling=3.0),
    "WAVEFT": on_targets(peft.WaveFTConfig, n_frequency=48),
    "VBLORA": on_targets(peft.VBLoRAConfig, r=4, num_vectors=20, vector_length=16),
    "RANDLORA": on_targets(peft.RandLoraConfig, r=4),
    "C3A": on_targets(peft.C3AConfig, block_size=8),
    "GRALORA": on_targets(peft.GraloraConfig, r=4, gralora_k=2),
    "MISS": on_targets(peft.MissConfig, r=4),
    "MISS, bat": on_targets(peft.MissConfig, r=4, init_weights="bat"),
    "DELORA": on_targets(peft.DeloraConfig, r=4),
    "PSOFT": on_targets(peft.PsoftConfig, r=4),
    "HIRA": on_targets(peft.HiraConfig, r=4),
    "DEFT": on_targets(peft.DeftConfig),
    "GLORA": on_targets(peft.GloraConfig, r=4),
    "OSF": on_targets(peft.OSFConfig),
    "ROAD": on_targets(peft.RoadConfig, group_size=8),
    "SHIRA": on_targets(peft.ShiraConfig, r=2),
    "PEANUT": on_targets(peft.PeanutConfig, r=4),
    "SUPERTUNING": on_targets(peft.SupertuningConfig),
    "OFT, constrained": on_targets(peft.OFTConfig, r=0, oft_block_size=8, coft=True, eps=0.05),
    "LN_TUNING": peft.LNTuningConfig(target_modules=["norm", "input_layernorm"]),
    "BEFT": on_targets(peft.BeftConfig),
}
TOUCH_BIASES = ("ROAD", "GLORA")


def test_every_bridged_type_is_tried() -> None:
    assert set(BRIDGED) <= {name.partition(",")[0] for name in CASES}


@pytest.mark.parametrize("kind", ["llama", pytest.param("llama-bias", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_a_fold_is_pefts_merge(workshop: Workshop, name: str, kind: str, tmp_path: Path) -> None:
    base = workshop.base(kind)
    adapter = workshop.adapter(base, CASES[name])
    if name in TOUCH_BIASES and kind == "llama-bias":
        with pytest.raises(RefusedError, match="has a bias, which this tuner changes too"):
            workshop.fold(base, [adapter], tmp_path / "out")
        return
    if name == "BEFT" and kind == "llama":
        with pytest.raises(RefusedError, match=r"q_proj\.bias"):
            workshop.fold(base, [adapter], tmp_path / "out")
        return
    out = workshop.fold(base, [adapter], tmp_path / "out")
    ours, theirs = load_file(out / "model.safetensors"), workshop.merged(base, adapter)
    before = load_file(base / "model.safetensors")
    assert sorted(ours) == sorted(theirs)
    changed = 0
    for tensor, value in theirs.items():
        changed += not torch.equal(value, before[tensor])
        assert float((ours[tensor] - value).abs().max()) <= 1e-6 * float(value.abs().max()), tensor
    assert changed >= (3 if name == "LN_TUNING" else 4)
    unmerged = workshop.logits(workshop.loaded(base, adapter))
    assert float((workshop.logits(workshop.model(out)) - unmerged).abs().max()) < 3e-5 * float(unmerged.abs().max())


def test_the_same_bytes_whatever_was_drawn_before(workshop: Workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    adapter = workshop.adapter(base, CASES["FOURIERFT"])
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        out = workshop.fold(base, [adapter], tmp_path / str(seed))
        assert torch.equal(torch.get_rng_state(), before)
        made.append((out / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_projections_that_are_not_saved_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    adapter = workshop.adapter(base, on_targets(peft.VeraConfig, r=4, save_projection=False))
    with pytest.raises(RefusedError, match="without its projections"):
        workshop.fold(base, [adapter], tmp_path / "out")


def test_a_tensor_that_belongs_to_no_layer_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    adapter = workshop.adapter(base, CASES["HRA"])
    weights = adapter / "adapter_model.safetensors"
    save_file(load_file(weights) | {"base_model.model.stray": torch.ones(2)}, weights)
    with pytest.raises(RefusedError, match="stray"):
        workshop.fold(base, [adapter], tmp_path / "out")


@pytest.mark.parametrize(
    "kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "POLY", "XLORA", "LILY", "UNILORA", "FROD"]
)
def test_what_has_no_weights_to_fold_is_refused_with_the_reason(workshop: Workshop, kind: str, tmp_path: Path) -> None:
    base = workshop.base("llama")
    adapter = workshop.adapter(base, CASES["HRA"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": kind}))
    with pytest.raises(RefusedError, match=f"{kind} cannot be merged") as caught:
        workshop.fold(base, [adapter], tmp_path / "out")
    assert caught.value.problems[0].why
