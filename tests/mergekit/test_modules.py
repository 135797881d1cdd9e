"""An encoder-decoder merged module by module, as mergekit merges it. mergekit runs as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import merger

pytestmark = pytest.mark.mergekit

MAKE = """
import sys, torch
from pathlib import Path
from transformers import T5Config, T5ForConditionalGeneration

for seed, name in enumerate(("base", "a", "b")):
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )
    T5ForConditionalGeneration(config).float().save_pretrained(Path(sys.argv[1]) / name)
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("t5")
    subprocess.run([sys.executable, "-c", MAKE, str(folder)], check=True, capture_output=True, timeout=280)
    return {name: str(folder / name) for name in ("base", "a", "b")}


def test_encoder_and_decoder_have_parameters_of_their_own(
    family: dict[str, str], mergekit_python: Path, tmp_path: Path
) -> None:
    def models(*weights: object) -> list[dict[str, object]]:
        return [{"model": family[m], "parameters": {"weight": w}} for m, w in zip("ab", weights, strict=True)]

    document = {
        "merge_method": "task_arithmetic", "base_model": family["base"], "dtype": "float32",
        "modules": {
            "encoder": {"models": models([0.0, 1.0], 0.25)}, "decoder": {"models": models(0.5, [1.0, 0.0])},
            "shared": {"models": models(0.1, 0.2)},
        },
    }  # fmt: skip
    (tmp_path / "manifest.yml").write_text(yaml.safe_dump(document))
    command = [str(mergekit_python.parent / "mergekit-yaml"), "manifest.yml", "theirs"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    merger.merge(tmp_path / "manifest.yml", tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=2e-6, msg=name)
