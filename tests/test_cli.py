"""The command: one line for a user's mistake, verbs that read a finished run, and a quick --help."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cria_dist import cli, locks
from cria_dist.config import ModelConfig, RunConfig

BLOCKED = """
import sys
sys.argv = ["cria", *sys.argv[1:]]
from cria_dist.cli import app
try:
    app()
except SystemExit as end:
    heavy = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "ray", "transformers", "datasets"})
    print("code", end.code, "heavy", heavy)
"""


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200"})


def toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_value(one)}" for key, one in value.items() if one is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(value)


@pytest.fixture
def toml(run_tree: dict[str, Any], tmp_path: Path) -> Path:
    """The pico run as a file."""
    tree = {**run_tree, "run": {**run_tree["run"], "root": str(tmp_path / "runs")}}
    path = tmp_path / "pico.toml"
    path.write_text("".join(f"{key} = {toml_value(value)}\n" for key, value in tree.items()))
    return path


def test_help_and_mistakes_cost_no_heavy_import(toml: Path) -> None:
    for arguments, code in ((["--help"], 0), (["prune", str(toml), "prune.ration=0.3"], 2)):
        command = [sys.executable, "-c", BLOCKED, *arguments]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.stdout.splitlines()[-1] == f"code {code} heavy []", run.stderr


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "cria_dist", "prune", "no.toml"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == (
        "error: configuration 'no.toml' cannot be read (No such file or directory); give a TOML file\n"
    )


def test_help_names_every_verb() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for verb in (
        "record",
        "analyse",
        "decide",
        "apply",
        "recover",
        "evaluate",
        "prune",
        "estimate",
        "status",
        "report",
    ):
        assert verb in result.stdout


@pytest.mark.parametrize("verb", ["record", "analyse", "decide", "apply", "recover", "evaluate", "prune", "estimate"])
def test_a_mistake_is_one_line_and_exit_code_2(verb: str, toml: Path) -> None:
    result = call(verb, str(toml), "prune.ration=0.3")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: unknown key 'prune.ration'; known keys here: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.path=/no/such/model", "error: model.path='/no/such/model' is not a directory"),
        ("prune.ratio=0.99", "error: prune.ratio=0.99 leaves 0 of 48 units"),
        ("data.test.source=/no.txt", "error: source='/no.txt': no such file"),
    ],
)
def test_what_prepare_refuses_is_one_line_and_exit_code_2(override: str, message: str, toml: Path) -> None:
    result = call("record", str(toml), override)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_a_model_of_another_kind_costs_estimate_one_line(toml: Path, tmp_path: Path) -> None:
    result = call("estimate", str(toml), f"model.path={tmp_path}")
    assert result.exit_code == 2
    assert "has no config.json" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-x"]])
def test_a_job_without_configuration_explains_itself(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments, "prune") == 2
    assert capsys.readouterr().err == "error: usage: CONFIG.toml [dotted.key=value ...]\n"


def test_a_verb_runs_up_to_its_stage(toml: Path, tmp_path: Path) -> None:
    result = call("decide", str(toml), "prune.ratio=0.5", "name=short")
    assert result.exit_code == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"decide: finished in {folder}" in result.stdout
    assert folder.name.startswith("short-")
    assert (folder / "round-00" / "plan.json").is_file()
    assert not (folder / "pruned").exists()
    assert json.loads((folder / "progress.json").read_text())["state"] == "done"
    status = call("status", str(folder))
    assert status.exit_code == 0
    assert json.loads(status.stdout)["state"] == "done"


def test_a_numeric_failure_is_exit_code_1_and_can_be_seen(toml: Path, tmp_path: Path) -> None:
    result = call("analyse", str(toml), 'method={name="cria", neighbours=47}')
    assert result.exit_code in (1, 2)
    assert "method.neighbours" in result.stderr
    assert "Traceback" not in result.stderr


def test_status_of_a_finished_run(finished_run: Any) -> None:
    result = call("status", str(finished_run.folder))
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["state"] == "done"
    assert found["stage"] == "verify"
    assert re.fullmatch(rf"{finished_run.folder.name}: done, verify .*, last heard of .* ago\n", result.stderr)


def test_status_says_how_old_it_is_and_whether_it_was_killed(tmp_path: Path) -> None:
    """A killed run says that it is running for ever; of a run on another machine nobody here knows."""
    state = {"stage": "record", "done": 3, "total": 12, "unit": "shards", "state": "running"}
    (tmp_path / "progress.json").write_text(json.dumps({**state, "updated": time.time() - 7200}))
    said = f"{tmp_path.name}: running, record 3/12 shards, last heard of 2 h 00 min ago"
    unknown = f"{said}; if it was killed, the same command goes on from there\n"
    assert call("status", str(tmp_path)).stderr == unknown
    with locks.alone(tmp_path):
        assert call("status", str(tmp_path)).stderr == f"{said}\n"
    over = f"{said}; no process works on it (killed?), the same command goes on from there\n"
    assert call("status", str(tmp_path)).stderr == over
    (tmp_path / ".lock").write_text("elsewhere, process 7\n")
    assert call("status", str(tmp_path)).stderr == unknown


def test_status_of_another_folder_asks_for_a_run(tmp_path: Path) -> None:
    assert "give a run folder" in call("status", str(tmp_path)).stderr


@pytest.mark.parametrize("verb", ["status", "report"])
def test_a_folder_without_a_run_is_one_line(verb: str, tmp_path: Path) -> None:
    result = call(verb, str(tmp_path / "nothing"))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "cannot be read" in result.stderr
    assert result.stderr.count("\n") == 1


def test_report_draws_again_from_the_folder(finished_run: Any, tmp_path: Path) -> None:
    copy = finished_run.copy(tmp_path)
    page = (copy.folder / "report.html").read_text()
    record = (copy.folder / "report.json").read_bytes()
    (copy.folder / "report.html").unlink()
    for plot in (copy.folder / "plots").iterdir():
        plot.unlink()
    result = call("report", str(copy.folder))
    assert result.exit_code == 0, result.stderr
    assert f"report: {copy.folder / 'report.html'}" in result.stdout
    assert len((copy.folder / "report.html").read_text()) == pytest.approx(len(page), rel=0.01)
    assert (copy.folder / "report.json").read_bytes() == record
    assert {path.name for path in (copy.folder / "plots").iterdir()} == {
        path.name for path in (finished_run.folder / "plots").iterdir()
    }


def test_report_of_a_run_without_plan_is_one_line(finished_run: Any, tmp_path: Path) -> None:
    copy = finished_run.copy(tmp_path)
    plan = copy.folder / "pruned" / "plan.json"
    for damage in ("", "{", "[]", '{"schema": 1}'):
        plan.write_text(damage)
        result = call("report", str(copy.folder))
        assert (result.exit_code, "plan.json is damaged" in result.stderr) == (2, True)
    plan.unlink()
    result = call("report", str(copy.folder))
    assert result.exit_code == 2
    assert "plan.json" in result.stderr


def test_estimate_prints_a_table(toml: Path, tmp_path: Path) -> None:
    result = call("estimate", str(toml))
    assert result.exit_code == 0, result.stderr
    assert "25,120" in result.stdout
    assert "storage_bytes.total" in result.stdout
    assert not (tmp_path / "runs").exists()


def test_every_key_is_listed_with_its_default_and_meaning() -> None:
    lines = call("keys").stdout.splitlines()
    assert 'data.test.part = "second"' in lines, "the default of where it stands, not of its kind"
    assert 'prune.units = ["mlp"]' in lines
    assert "method.cria.neighbours = 10" in lines
    assert "model.path = (must be given)" in lines
    names = {line.partition(" = ")[0] for line in lines if not line.startswith(" ")}
    sections = RunConfig(model=ModelConfig(path="x")).model_dump()
    assert {
        f"{section}.{key}" for section in ("record", "prune", "recover", "run") for key in sections[section]
    } <= names


def test_keys_of_a_section_and_of_none() -> None:
    lines = call("keys", "recover.lora").stdout.splitlines()
    assert lines[0] == "recover.lora_rank = 0"
    assert all(line.startswith("    ") for line in lines[1:])
    wrong = call("keys", "recovery")
    assert (wrong.exit_code, wrong.stderr) == (2, "error: no key begins with 'recovery'; `cria keys` lists them all\n")
