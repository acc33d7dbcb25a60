"""A run whose recovery a sweep stopped: what its report says, and that the run alone still comes to its end."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cria_dist.pipeline import prune
from cria_dist.stages.halving import Race
from cria_dist.stages.recover import read_log


@pytest.mark.usefixtures("no_fresh_process")
def test_a_stopped_recovery_is_no_variant_and_said(
    run_config: Callable[..., Any], make_context: Callable[..., Any], tmp_path: Path
) -> None:
    config = run_config(tmp_path, recover={"patience": 9}, evaluate={"latency_repeats": 0})
    assert Race(tmp_path / "rungs", "better", 2, 2).goes_on(2, 0.0)
    raced = replace(make_context(config), race=Race(tmp_path / "rungs", "ours", 2, 2))
    report = prune(raced)
    assert report is not None
    assert [one.label for one in report.variants] == ["dense", "pruned", "repaired"]
    assert report.protocol[-1].startswith("Recovery: stopped after 2 of 6 steps, held-out loss ")
    assert not report.loss
    assert not (raced.job.folder / "recovered").exists()
    [log_path] = raced.job.folder.glob("recover/loss-*.jsonl")
    log = read_log(log_path)
    assert prune(raced) == replace(report, stages=raced.stage_times())
    assert read_log(log_path) == log, "it was trained again"

    alone = prune(make_context(config))
    assert alone is not None
    assert [one.label for one in alone.variants] == ["dense", "pruned", "repaired", "recovered"]
    assert raced.stopped is None, "it has come to its end since"
    assert not any("stopped" in sentence for sentence in alone.protocol)
