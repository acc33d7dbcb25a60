"""What dimensions of the residual stream cannot be removed from, by what, and why: said before anything is computed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cria_dist.config import RunConfig
from cria_dist.errors import CriaError
from cria_dist.models.checkpoint import read_config
from cria_dist.models.family import family_of
from cria_dist.stages.check_residual import check_residual
from cria_dist.stages.prepare import prepare

MakeModel = Callable[..., Path]
RunConfigMaker = Callable[..., RunConfig]
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune": {"units": ["residual", "mlp"]}}, "residual alone|stands alone"),
        ({"prune": {"units": ["residual"], "allocation": "global"}}, "stands alone"),
        ({"prune": {"units": ["residual"], "repair": "sequential"}}, "repaired by itself; set"),
        ({"prune": {"units": ["residual"]}, "method": {"name": "wanda"}}, "runs through all"),
        ({"prune": {"units": ["residual"], "budget": "kv_cache"}}, "kv_cache is spent on attention"),
    ],
)
def test_what_does_not_apply(changes: dict[str, Any], message: str, run_config: RunConfigMaker, tmp_path: Path) -> None:
    with pytest.raises((ValueError, CriaError), match=message):
        prepare(run_config(tmp_path, **({"method": {"name": "random"}, "compare": []} | changes)))


KEPT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "cohere": ({}, {}, "'cohere': LayerNorm subtracts the mean"),
    "gpt_neox": ({}, {}, "'gpt_neox': LayerNorm subtracts the mean"),
    "helium": ({}, {}, "'helium': its heads share as many values"),
    "gemma2": ({}, {"multiple": 2}, "'gemma2' refuses 26 dimensions and 4 heads: they must divide it; set prune.mult"),
    "phi3": ({"pad_token_id": 0, "rope_parameters": LONG}, {}, "'phi3' refuses 24 dim.* its long rotary factors"),
}
"""Changes to the model and to what is asked, and the error."""


@pytest.mark.parametrize("model_type", KEPT)
def test_what_is_refused(model_type: str, make_model: MakeModel, run_config: RunConfigMaker, tmp_path: Path) -> None:
    changes, asked, error = KEPT[model_type]
    folder = make_model(tmp_path / "dense", model_type=model_type, **changes)
    wanted = {"units": ["residual"], "ratio": 0.18, "multiple": 8} | asked
    config = run_config(tmp_path, model={"path": str(folder)}, prune=wanted, method={"name": "random"}, compare=[])
    with pytest.raises(CriaError, match=error) as raised:
        prepare(config)
    assert "refuses" in error or "is for ernie4_5, gemma2, gemma3_text, glm, glm4, granite, llama" in str(raised.value)


def test_layers_of_different_heads_are_refused(pico: Path, run_config: RunConfigMaker, tmp_path: Path) -> None:
    config, given = run_config(tmp_path), {**read_config(pico), "num_key_value_heads_per_layer": [2, 1]}
    with pytest.raises(CriaError, match="'llama': its layers have different heads"):
        check_residual(config, family_of(given), given)
