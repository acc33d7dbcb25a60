"""What had better not be done is said and done nevertheless."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cria_dist.config import RunConfig
from cria_dist.config_file import load
from cria_dist.models.family import FAMILIES
from cria_dist.records import Stage
from cria_dist.stages import cautions
from cria_dist.stages.prepare import prepare

RunConfigMaker = Callable[..., RunConfig]
CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"


@pytest.mark.parametrize(
    ("until", "changes", "named"),
    [
        ("evaluate", {}, "evaluate (hence prune)"),
        ("recover", {}, None),
        ("decide", {"prune": {"allocation": "sensitivity"}}, "prune.allocation=sensitivity"),
        ("analyse", {"method": {"name": "taylor", "sequences": 4}}, "taylor"),
        ("record", {"method": {"name": "taylor", "sequences": 4}}, None),
        ("evaluate", {"record": {"memory_gb": 1}}, None),
    ],
)
def test_what_holds_the_whole_model_is_told_beforehand(
    until: Stage,
    changes: dict[str, Any],
    named: str | None,
    run_config: RunConfigMaker,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    prepare(run_config(tmp_path, **{"record": {"memory_gb": 1e-5}, **changes}), until)
    found = [one.getMessage() for one in caplog.records if "whole model" in one.getMessage()]
    if named is None:
        assert not found
    else:
        assert found[0].startswith(f"{named}: a worker holds the whole model, ")
        assert "kB, and record.memory_gb=1e-05; take a larger device, or stop before it" in found[0]


@pytest.mark.parametrize(
    ("until", "changes", "remedy"),
    [
        ("recover", {}, "set recover.strategy='fsdp2' with more workers, recover.lora_rank, recover.teacher='cpu' or"),
        ("evaluate", {"recover": {"distill": 0}}, "with more workers, recover.lora_rank or recover.steps=0"),
        ("recover", {"recover": {"steps": 0}}, None),
        ("apply", {}, None),
    ],
)
def test_what_training_holds_is_told_beforehand(
    until: Stage,
    changes: dict[str, Any],
    remedy: str | None,
    run_config: RunConfigMaker,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    prepare(run_config(tmp_path, **{"record": {"memory_gb": 1e-4}, **changes}), until)
    found = [one for one in caplog.messages if one.startswith("recover: ")]
    if remedy is None:
        assert not found
    else:
        assert "of weights, gradients and moments, and record.memory_gb=0.0001; " in found[0]
        assert remedy in found[0]


@pytest.mark.parametrize(
    ("changes", "solver"),
    [
        ({}, "prune.repair=least_squares"),
        ({"prune": {"repair": "none"}, "method": {"name": "conditional"}}, "conditional"),
        ({"prune": {"repair": "none"}}, None),
        ({"method": {"name": "block_influence"}}, None),
        ({"data": {"calibration_sequences": 24}}, None),
    ],
)
def test_few_tokens_for_what_is_solved(
    changes: dict[str, Any],
    solver: str | None,
    run_config: RunConfigMaker,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """12 sequences of 32 tokens are 8 for each of 48 neurons; 24 sequences are 16."""
    prepare(run_config(tmp_path, **changes), "decide")
    found = [one for one in caplog.messages if one.startswith("data.calibration_sequences=12 are 384 tokens, 8 for ")]
    assert len(found) == (solver is not None)
    assert solver is None or (f"and {solver} solves " in found[0] and found[0].endswith("raise it to 24"))


@pytest.mark.parametrize("name", ["demo", "sweep", "wikitext"])
def test_the_examples_have_text_enough(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of SmolLM2-135M, 1,536 neurons."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    cautions.warn_of_few_tokens(load(CONFIGS / f"{name}.toml"), FAMILIES["llama"], shape)
    assert not caplog.records


@pytest.mark.parametrize(
    ("prune", "said"),
    [
        ({"units": ["attention"], "ratio": 0.1}, r"prune.ratio=0.1 takes 0.5 of what prune.budget=units measures"),
        ({"units": ["attention"], "ratio": 0.45}, None),
        ({"ratio": 0.26, "multiple": 16}, "32 of the 48 units of layer-000.mlp; lower prune.multiple"),
        ({"ratio": 0.26, "multiple": 1}, None),
    ],
)
def test_much_more_than_was_asked_for(
    prune: dict[str, Any],
    said: str | None,
    run_config: RunConfigMaker,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of two KV groups one goes, whatever part of it was asked for."""
    prepare(run_config(tmp_path, method={"name": "activation"}, prune=prune), "decide")
    found = [one for one in caplog.messages if one.startswith("prune.ratio=")]
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
