"""Rules between the parts of a configuration: how many units a method must have where it scores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.stages.prepare import prepare

RunConfigMaker = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def heads(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 4 KV groups; not to be written to."""
    folder = tmp_path_factory.mktemp("heads") / "model"
    return make_model(folder, num_attention_heads=8, num_key_value_heads=4)


ATTENTION = {"units": ["attention"], "ratio": 0.5}


@pytest.mark.parametrize(
    "changes",
    [
        {"prune": {**ATTENTION, "rounds": 2}},  # of 4, 3 are left when the last round scores them
        {"prune": {**ATTENTION, "rounds": 2}, "method": {"name": "conditional"}, "compare": [{"name": "cria"}]},
        {
            "prune": {**ATTENTION, "ratio": 0.75, "rounds": 3},  # 2 are left, but compared methods score the dense 4
            "method": {"name": "conditional"},
            "compare": [{"name": "cria"}],
        },
    ],
)
def test_what_a_method_scores_is_large_enough(
    changes: dict[str, Any], heads: Path, run_config: RunConfigMaker, tmp_path: Path
) -> None:
    prepare(run_config(tmp_path, model={"path": str(heads)}, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prune": {**ATTENTION, "ratio": 0.75, "rounds": 3}},
            r"cria \(paper\) needs at least 3 units and layer-000\.attention has 2 .*another method or .*units=mlp",
        ),
        ({"method": {"name": "cria", "neighbours": 47}}, r"at least 49 units .* has 48 .*lower method\.neighbours"),
        (
            {"method": {"name": "cria", "neighbours": 40}, "prune": {"ratio": 0.5, "rounds": 2}},
            r"at least 42 units .* has 36 when it is scored; lower method\.neighbours",
        ),
    ],
)
def test_what_is_too_small_names_the_remedy(
    changes: dict[str, Any], message: str, heads: Path, run_config: RunConfigMaker, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(run_config(tmp_path, model={"path": str(heads)}, **changes))
