"""What a sweep says of its trials: fronts before and after recovery, the best of each budget, plain data."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cria_dist.records import Evaluation
from cria_dist.report.writer import report_from_json
from cria_dist.stages import sweep_results
from cria_dist.stages.sweep_table import Row, best, front, grid, latency, loss, record, row

DENSE = Evaluation("dense", "", "none", 1000, 10.0, 64, 4000, 5.0, 2.0)


def trial(label: str, parameters: int, before: float, after: float, budget: str = "20.0 % of units") -> Row:
    repaired = replace(DENSE, label="repaired", method="m", parameters=parameters, perplexity=before)
    recovered = replace(repaired, label="recovered", perplexity=after)
    return Row(
        label, f"cria prune c.toml {label}", Path("/runs") / label / "recovered", budget, DENSE, repaired, recovered
    )


@pytest.fixture
def rows() -> list[Row]:
    """The better one before recovery is not the better one after."""
    return [
        trial("a", 900, 12.0, 11.5),
        trial("b", 900, 13.0, 11.0),
        trial("c", 800, 20.0, 14.0, "40.0 % of units"),
        trial("d", 800, float("nan"), float("inf"), "40.0 % of units"),
        trial("e", 850, 30.0, 20.0, "40.0 % of units"),
    ]


def test_the_front_before_recovery_is_not_that_after(rows: list[Row]) -> None:
    assert front(rows, "before") == (True, False, True, False, False)
    assert front(rows, "after") == (False, True, True, False, False)


def test_the_best_of_each_budget_is_chosen_by_what_is_handed_over(rows: list[Row]) -> None:
    assert {budget: one.label for budget, one in best(rows).items()} == {"20.0 % of units": "b", "40.0 % of units": "c"}
    assert best([rows[3]]) == {}


def test_the_table_marks_fronts_and_the_best(rows: list[Row]) -> None:
    table = grid(rows)
    assert [line[0] for line in table.rows] == ["b *", "a", "e", "c *", "d"]
    lines = {line[0][0]: line for line in table.rows}
    assert lines["a"][1:5] == ("900", "10.0 %", "12.00 (1.20x) P", "11.50 (1.15x)")
    assert lines["b"][1:] == ("900", "10.0 %", "13.00 (1.30x)", "11.00 (1.10x) P", "5.00", "2.00")
    assert "perplexity" in table.title


def test_what_was_stopped_is_told_and_neither_best_nor_on_a_front_after(rows: list[Row], tmp_path: Path) -> None:
    """Even where the model before is the best there is."""
    state = "stopped after 50 of 100 steps, held-out loss 3.2000"
    stopped = replace(rows[0], before=replace(rows[0].before, perplexity=10.5), stopped=state)
    stopped = replace(stopped, after=stopped.before, checkpoint=tmp_path / "stopped")
    mixed = [stopped, *rows[1:]]
    assert best(mixed)["20.0 % of units"].label == "b"
    assert best([stopped]) == {}
    assert (front(mixed, "before")[0], front(mixed, "after")) == (True, front(rows, "after"))
    [line] = [line for line in grid(mixed).rows if line[0] == "a"]
    assert line[3:5] == ("10.50 (1.05x) P", state)
    assert [one.get("stopped") for one in record(mixed)["trials"]] == [state, None, None, None, None]
    assert "stopped" not in record(rows)["trials"][0]
    [_, after] = sweep_results.panels(mixed)[0].clouds
    assert np.isnan(after.points_P2[0, 1])


def test_classifiers_are_judged_by_their_labels() -> None:
    one = trial("a", 900, 2.0, 1.0)
    one = replace(one, after=replace(one.after, accuracy=0.75), before=replace(one.before, accuracy=0.5))
    assert loss(one.after) == pytest.approx(0.25)
    assert grid([one]).rows[0][3:5] == ("50.0 % P", "75.0 % P")
    assert sweep_results.panels([one])[0].loss == "share of wrong labels"


def test_plain_data_is_strict_json_in_the_order_of_the_trials(rows: list[Row]) -> None:
    text = json.dumps(record(rows), allow_nan=False)
    trials = json.loads(text)["trials"]
    assert [one["label"] for one in trials] == ["a", "b", "c", "d", "e"]
    assert trials[3]["after"]["perplexity"] is None
    assert trials[1]["checkpoint"] == "/runs/b/recovered"
    assert [one["best_of_budget"] for one in trials] == [False, True, True, False, False]


def test_latency_is_that_of_generation_where_there_is_one() -> None:
    assert latency(DENSE) == 2.0
    assert latency(replace(DENSE, decode_ms=None)) == 5.0
    assert latency(replace(DENSE, decode_ms=None, prefill_ms=None)) is None


def test_a_row_is_what_the_report_says(finished_run) -> None:
    report = report_from_json(finished_run.folder / "report.json")
    found = row("x", "cria prune", finished_run.folder, report)
    by_label = {one.label: one for one in report.variants}
    assert (found.dense, found.before, found.after) == tuple(by_label[n] for n in ("dense", "repaired", "recovered"))
    assert found.budget == "25 % of units"
    assert (found.checkpoint / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "budget"),
    [
        ({"prune": {"ratio": 0.2004}}, "20.04 % of units"),
        ({"prune": {"units": ["attention"]}}, "25 % of units (attention)"),
        ({"method": {"name": "block_influence"}}, "25 % of units (layer)"),
        ({"method": {"name": "block_influence"}, "prune": {"budget": "parameters"}}, "25 % of parameters"),
    ],
)
def test_trials_of_different_sizes_do_not_compete(changes: dict[str, Any], budget: str, finished_run) -> None:
    report = report_from_json(finished_run.folder / "report.json")
    config = {**report.config, **changes, "prune": {**report.config["prune"], **changes.get("prune", {})}}
    assert row("x", "cria prune", finished_run.folder, replace(report, config=config)).budget == budget


def test_losses_on_other_texts_or_of_other_models_do_not_compete(rows: list[Row], finished_run) -> None:
    report = report_from_json(finished_run.folder / "report.json")
    assert len(report.config["data"]["test"]) > 1

    def terms(**changes: Any) -> tuple[str, ...]:
        data = {**report.config["data"], **changes}
        return row(
            "x", "cria prune", finished_run.folder, replace(report, config={**report.config, "data": data})
        ).terms

    text = {**report.config["data"]["test"], "part": "all"}
    assert set(terms(test=text)) ^ set(terms()) == {"data.test.part=all", "data.test.part=second"}
    assert set(terms(sequence_length=99)) - set(terms()) == {"data.sequence_length=99"}
    assert terms(calibration_sequences=99) == terms()

    few, many = terms(test_sequences=8), terms(test_sequences=9)
    mixed = [replace(one, terms=many if one.label in "bc" else few) for one in rows]
    assert {contest: one.label for contest, one in best(mixed).items()} == {
        "20.0 % of units, data.test_sequences=8": "a",
        "40.0 % of units, data.test_sequences=8": "e",
        "20.0 % of units, data.test_sequences=9": "b",
        "40.0 % of units, data.test_sequences=9": "c",
    }
    assert front(mixed, "after") == (True, True, True, False, True)
    told = record(mixed)["trials"]
    assert told[1]["budget"] == "20.0 % of units, data.test_sequences=9"
    assert [one["best_of_budget"] for one in told] == [True, True, True, False, True]
    assert len(sweep_results.panels(mixed)) == 2 * len(sweep_results.panels(rows))
    assert best([replace(one, terms=few) for one in rows]).keys() == best(rows).keys()


def test_links_have_names_of_their_own_and_old_ones_go(rows: list[Row], tmp_path: Path) -> None:
    terms = [(f"model.path=/{'very-' * 60}long",), ("model.path=a/b",), ("model.path=a-b",), (), ()]
    sweep_results.write(rows[:2], tmp_path)
    sweep_results.write([replace(one, terms=own) for one, own in zip(rows, terms, strict=True)], tmp_path)
    names = sorted(link.name[:-8] for link in (tmp_path / "best").iterdir())
    assert names[:2] == ["20.0-of-units-model.path-a-b-", f"20.0-of-units-model.path-{'very-' * 15}-"]
    assert names[2:] == ["40.0-", "40.0-of-units-model.path-a-b-"]


def test_files_of_a_sweep_and_links_that_move_with_the_folder(rows: list[Row], tmp_path: Path) -> None:
    moved = [replace(one, checkpoint=tmp_path / "runs" / one.label / "recovered") for one in rows]
    for one in moved:
        one.checkpoint.mkdir(parents=True)
    folder = tmp_path / "runs" / "s-sweep"
    for _ in range(2):
        sweep_results.write(moved, folder)
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert len(sweep_results.panels(moved)) == 2
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    link = tmp_path / "elsewhere" / "s-sweep" / "best" / "40.0-of-units"
    assert link.resolve() == tmp_path / "elsewhere" / "c" / "recovered"
