"""Rules between configuration and model: what is said is what helps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.stages.prepare import prepare

RunConfigMaker = Callable[..., RunConfig]


def test_the_remedy_for_a_mixture_is_whole(
    make_model: Callable[..., Path], run_config: RunConfigMaker, tmp_path: Path
) -> None:
    """Neurons are the default and cannot go; each of the two remedies is enough."""
    model = {"path": str(make_model(tmp_path / "model", "mixtral", num_local_experts=4, num_experts_per_tok=2))}

    def settings(**changes: Any) -> RunConfig:
        return run_config(tmp_path, model=model, **changes)

    remedy = (
        r"set prune\.units=\['experts'\] with method\.name=activation .* prune\.repair=none, or set .*\['attention'\]$"
    )
    with pytest.raises(ConfigError, match=r"'mixtral' is a mixture, whose neurons stay; " + remedy):
        prepare(settings(method={"name": "conditional"}))
    prepare(settings(method={"name": "activation"}, prune={"units": ["experts"], "repair": "none"}), "decide")
    prepare(settings(method={"name": "conditional"}, prune={"units": ["attention"]}), "decide")


def test_a_budget_of_time_is_not_for_classifiers(
    make_classifier: Callable[..., Path], run_config: RunConfigMaker, tmp_path: Path
) -> None:
    """The remedy must not lead back to what ``latency`` asks for."""
    images = {"source": "x.parquet", "format": "images", "field": "image"}
    config = run_config(
        tmp_path,
        model={"path": str(make_classifier(tmp_path / "model"))},
        data={"calibration": images, "test": images},
        prune={"budget": "latency", "allocation": "sensitivity"},
    )
    with pytest.raises(ConfigError, match=r"use prune\.allocation=uniform, and a prune\.budget other than latency"):
        prepare(config, "decide")
