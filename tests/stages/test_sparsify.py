"""Maps of a site with their zeros: exact, in the checkpoint's data type, measured, found again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cria_dist.errors import NumericError
from cria_dist.maths.sampling import spectral_errors
from cria_dist.methods import SpectrumPreserving
from cria_dist.models import checkpoint
from cria_dist.records import Site
from cria_dist.stages.sparsify import MASKS, Sparsifier, SparsifyTask, is_sparsified, sparse_names
from cria_dist.store.site_scores import read_scores

MakeModel = Callable[..., Path]


def task_of(model_dir: Path, folder: Path, truncate: float = 0.5) -> SparsifyTask:
    return SparsifyTask(model_dir, SpectrumPreserving(truncate=truncate), 0.4, folder, "digest", 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zeros_and_what_was_measured(make_model: MakeModel, tmp_path: Path, dtype: str) -> None:
    model = make_model(tmp_path / "model", dtype=dtype, mlp_bias=True)
    task = task_of(model, tmp_path / "run")
    assert Sparsifier(task)(Site(1)) == "layer-001.mlp"
    dense = load_file(model / checkpoint.WEIGHTS)
    found = load_file(tmp_path / "run" / MASKS / "layer-001.mlp.safetensors")
    assert set(found) == {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    for name, tensor in found.items():
        assert tensor.dtype == dense[name].dtype
        assert int((tensor == 0).sum()) == round(0.4 * 32 * 48)
        assert tensor[tensor != 0].equal(dense[name][tensor != 0])
    scores = read_scores(tmp_path / "run", Site(1))
    assert scores.facts["zeros"] == 3 * round(0.4 * 32 * 48)
    assert scores.facts["sparsity"] == scores.facts["zeros"] / scores.facts["weights"]
    errors = [spectral_errors(dense[name].double().numpy(), found[name].double().numpy()) for name in found]
    assert scores.facts["spectral_error"] == max(first for first, _ in errors)
    assert scores.facts["top_20_error"] == max(second for _, second in errors)
    assert 0 < scores.facts["magnitude_spectral_error"] < 1
    squares = [sum(one[name].double().square().sum() for name in found) for one in (found, dense)]
    assert scores.keep_N.mean() == pytest.approx(float(squares[0] / squares[1]), rel=0.05)


def test_the_limit_of_magnitude_measures_the_same_as_magnitude(pico: Path, tmp_path: Path) -> None:
    Sparsifier(task_of(pico, tmp_path, truncate=1))(Site(0))
    facts = read_scores(tmp_path, Site(0)).facts
    for name in ("spectral_error", "top_20_error"):
        assert facts[name] == facts[f"magnitude_{name}"]


def test_sites_are_found_again_and_differ(pico: Path, tmp_path: Path) -> None:
    task = task_of(pico, tmp_path)
    assert not is_sparsified(task, Site(0))
    for layer in (0, 1):
        Sparsifier(task)(Site(layer))
    assert is_sparsified(task, Site(0))
    assert not is_sparsified(replace(task, digest="another"), Site(0))
    first, second = (load_file(tmp_path / MASKS / f"layer-00{layer}.mlp.safetensors") for layer in (0, 1))
    down, gate = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    assert not (first[gate].T == 0).equal(first[down] == 0)
    assert not (first[down] == 0).equal(second[down.replace("0", "1")] == 0)
    before = (tmp_path / MASKS / "layer-000.mlp.safetensors").read_bytes()
    Sparsifier(task)(Site(0))
    assert (tmp_path / MASKS / "layer-000.mlp.safetensors").read_bytes() == before
    (tmp_path / "scores" / "layer-000.mlp.npz").unlink()
    assert not is_sparsified(task, Site(0))


def test_maps_of_vision_models_go_by_their_names_on_disk(pico_vit: Path, tmp_path: Path) -> None:
    Sparsifier(task_of(pico_vit, tmp_path))(Site(2))
    found = load_file(tmp_path / MASKS / "layer-002.mlp.safetensors")
    assert set(found) < set(load_file(pico_vit / checkpoint.WEIGHTS))
    assert set(found) < sparse_names(pico_vit)
    assert len(sparse_names(pico_vit)) == 6


def test_weights_that_are_not_finite_are_named(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    tensors = load_file(model / checkpoint.WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, model / checkpoint.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(NumericError, match=r"layer-001\.mlp, model\.layers\.1\.mlp\.up_proj\.weight: .*finite"):
        Sparsifier(task_of(model, tmp_path))(Site(1))
    assert np.isfinite(tensors["model.layers.1.mlp.gate_proj.weight"].numpy()).all()
