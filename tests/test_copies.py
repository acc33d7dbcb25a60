"""Neurons that exist twice: the default takes the copies, and the model computes what it did."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cria_dist.config import RunConfig
from cria_dist.models import checkpoint
from cria_dist.pipeline import prune
from jobs.benchmarks import copies

COPIES = 8


@pytest.fixture(scope="module")
def doubled(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doubled") / "model"
    copies.widen(pico, folder, COPIES)
    return folder


def logits(directory: Path) -> np.ndarray:
    tokens = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (2, 24)))
    with torch.inference_mode():
        return checkpoint.load_model(directory, checkpoint.Numerics())(input_ids=tokens).logits.numpy()


def test_a_doubled_model_computes_the_same(doubled: Path, pico: Path) -> None:
    assert checkpoint.count_parameters(checkpoint.read_config(doubled)) > checkpoint.count_parameters(
        checkpoint.read_config(pico)
    )
    np.testing.assert_allclose(logits(doubled), logits(pico), atol=1e-5)


@pytest.mark.parametrize(("method", "is_free"), [("conditional", True), ("random", False), ("wanda", False)])
def test_removing_as_many_as_were_doubled(
    method: str,
    is_free: bool,
    doubled: Path,
    run_config: Callable[..., RunConfig],
    make_context: Callable[..., Any],
    tmp_path: Path,
) -> None:
    width = checkpoint.read_config(doubled)["intermediate_size"]
    config = run_config(
        tmp_path,
        model={"path": str(doubled)},
        method={"name": method},
        prune={"ratio": COPIES / width, "multiple": 1, "ridge": 1e-7},
    )
    context = make_context(config, until="apply")
    prune(context, "python -m pytest", until="apply")
    dense = logits(doubled)
    error = float(np.abs(logits(context.job.folder / "pruned") - dense).max() / np.abs(dense).max())
    assert (error < 1e-4) is is_free, error
