"""The experiment's adapters: one a training and seed, of rank 8 on all linear modules of the last eight layers."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from tests.experiment.tasks import SEEDS, TRAININGS


def folder_of(adapters: Path, name: str, seed: int) -> Path:
    """Where an adapter lies."""
    return adapters / f"seed{seed}" / name


def train_one(name: str, seed: int, base: Path, out: Path) -> float:
    """Train one adapter on one thread. Returns the seconds it took."""
    import torch

    from jobs.demo.train import Recipe, train
    from tests.experiment.scoring import FIRST_LAYER

    torch.set_num_threads(1)
    training = TRAININGS[name]
    recipe = Recipe(8, 16, seed=training.seed(seed), first_layer=FIRST_LAYER)
    texts = [(example.prompt, example.answer) for example in training.examples()]
    return train(f"{name}, seed {seed}", lambda _: texts, recipe, base, out, torch.bfloat16)


def train_all(base: Path, adapters: Path, *, processes: int = 2) -> None:
    """Train what is not there yet."""
    missing = [
        (name, seed, base, folder_of(adapters, name, seed))
        for seed in SEEDS
        for name in TRAININGS
        if not (folder_of(adapters, name, seed) / "adapter_config.json").is_file()
    ]
    if missing:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            pool.starmap(train_one, missing, chunksize=1)
