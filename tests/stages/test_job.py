"""What a run knows of its model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cria_dist.config import RunConfig
from cria_dist.models import checkpoint
from cria_dist.models.surgery import Surgery
from cria_dist.stages.budget import sites_of
from cria_dist.stages.decide import Accounts, make_plan
from cria_dist.stages.prepare import prepare


@pytest.mark.parametrize("gone", [None, 1])
def test_biases_are_counted_where_units_are_left(
    gone: int | None, make_model: Callable[..., Path], run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Also beside whole layers: a plan has the parameters of the model that comes of it."""
    model = make_model(tmp_path / "model", num_hidden_layers=3)
    whole: dict[str, Any] = {} if gone is None else {"units": ["mlp", "layer"], "allocation": "sensitivity"}
    settings = {"ratio": 0.3, "budget": "parameters", "repair": "bias", **whole}
    job = prepare(run_config(tmp_path, model={"path": str(model)}, method={"name": "magnitude"}, prune=settings))
    sites = sites_of(job.config, job.family, job.model_config)
    kept = {site.key: tuple(range(0 if site.layer == gone else min(width, 32))) for site, width in sites.items()}
    accounts = Accounts(job.dense_parameters, job.unit_parameters, job.added_parameters(kept))
    plan = make_plan(kept, {site.key: width for site, width in sites.items()}, accounts, "m", "d")
    narrow = Surgery(job.family, job.model_config, kept, None, True).pruned_config()
    assert plan.parameters[1] == checkpoint.count_parameters(narrow)
