"""`cria submit` and `cria sweep` before anything is reached: what they would call, and what they refuse."""

import shlex
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package
from typer.testing import CliRunner, Result

from cria_dist import cli
from cria_dist.cli import running
from cria_dist.errors import ConfigError
from cria_dist.runtime import submit as jobs
from cria_dist.runtime.submit import read_token
from cria_dist.stages.sweep import plan

CONFIGS = Path(__file__).parents[1] / "jobs" / "configs"
CONFIG = str(CONFIGS / "demo.toml")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200"})


def dry(*arguments: str) -> list[str]:
    """The words of the call that would be made."""
    result = call("submit", "--dry-run", *arguments)
    assert result.exit_code == 0, result.output
    return shlex.split(result.stdout)


def test_a_dry_run_prints_the_line_that_ray_takes() -> None:
    words = dry("prune", CONFIG, "run.root=/data/runs", "prune.ratio=0.3", "--address", "http://head:8265")
    submission = words[words.index("--submission-id") + 1]
    assert submission.startswith("cria-prune-demo-")
    assert words == [
        *("ray", "job", "submit", "--address", "http://head:8265", "--submission-id", submission),
        *("--working-dir", str(CONFIGS), "--runtime-env-json", '{"excludes": [".?*"]}', "--"),
        *("python", "-m", "cria_dist", "prune", "demo.toml", "run.root=/data/runs", "prune.ratio=0.3"),
    ]


def test_the_name_of_a_job_is_what_it_does() -> None:
    def name(*arguments: str) -> str:
        words = dry(*arguments)
        return words[words.index("--submission-id") + 1]

    same = name("prune", CONFIG, "run.root=/data", "prune.ratio=0.3")
    assert name("prune", CONFIG, "prune.ratio=0.3", "run.root=/data") == same
    others = [
        name("decide", CONFIG, "run.root=/data", "prune.ratio=0.3"),
        name("prune", CONFIG, "run.root=/data", "prune.ratio=0.2"),
        name("prune", CONFIG, "run.root=/data", "prune.ratio=0.3", "run.workers=3"),
        name("sweep", CONFIG, "run.root=/data", "sweep.grid.seed=[1, 2]"),
        name("sweep", CONFIG, "run.root=/data", "sweep.grid.seed=[1, 3]"),
    ]
    assert len({same, *others}) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", CONFIG], "run.root='runs' is relative, so it would be lost with the job; set run.root=/folder"),
        (["prune", CONFIG, "run.folder=x"], "run.folder='x' is relative"),
        (["prun", CONFIG, "run.root=/d"], "is not VERB CONFIG [key=value ...]; VERB is one of record, "),
        (["prune"], "is not VERB CONFIG [key=value ...]"),
        (["prune", CONFIG, "run.root=/d", "prune.ration=1"], "unknown key 'prune.ration'"),
        (["prune", CONFIG, "run.root=/d", "--working-dir", "/etc"], "is not in the working directory /etc"),
    ],
)
def test_what_would_fail_on_the_cluster_is_said_here(arguments: list[str], message: str) -> None:
    result = call("submit", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def submitted_from(folder: Path, monkeypatch: pytest.MonkeyPatch, **environment: str) -> Result:
    """A dry run with a configuration in this folder."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_text('model = { path = "m" }')
    return call("submit", "--dry-run", "prune", str(folder / "run.toml"), "run.root=/d")


def test_neither_home_nor_the_token_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, token = tmp_path / "users" / "me", tmp_path / "work" / "keys" / "token"
    for folder in (home, home.parent):
        result = submitted_from(folder, monkeypatch, HOME=str(home))
        assert result.exit_code == 2
        assert (
            f"the working directory {folder} would travel to the cluster, and it holds your home; put" in result.stderr
        )
    assert submitted_from(home / "run", monkeypatch, HOME=str(home)).exit_code == 0
    token.parent.mkdir(parents=True)
    token.write_text("s3cret")
    result = submitted_from(tmp_path / "work", monkeypatch, HOME=str(home), RAY_AUTH_TOKEN_PATH=str(token))
    assert result.exit_code == 2
    assert f"it holds the token {token}; put" in result.stderr
    assert submitted_from(tmp_path / "work" / "run", monkeypatch, HOME=str(home)).exit_code == 0


def test_what_is_hidden_stays_here(tmp_path: Path) -> None:
    """Ray itself packs the folder."""
    folder = tmp_path / "work"
    for name in ("run.toml", ".env", "texts/a.txt", "texts/.netrc", "texts/..b", ".ssh/id", "texts/.keys/id", "a..b"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    environment = jobs.Call("name", ("true",), folder).environment()
    create_package(folder, tmp_path / "sent.zip", include_gitignore=True, excludes=environment["excludes"])
    with zipfile.ZipFile(tmp_path / "sent.zip") as sent:
        assert sorted(sent.namelist()) == ["a..b", "run.toml", "texts/a.txt"]


def test_a_hidden_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / ".mine.toml").write_text('model = { path = "m" }')
    result = call("submit", "--dry-run", "prune", str(tmp_path / ".mine.toml"), "run.root=/d")
    assert result.exit_code == 2
    assert ".mine.toml is hidden in" in result.stderr


@pytest.mark.parametrize("verb", ["prune", "sweep"])
def test_a_job_says_that_its_result_would_be_lost(
    verb: running.Verb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that was not sent by us: it runs in a temporary copy of the folder."""
    monkeypatch.setenv(running.IN_A_JOB, "{}")
    assert running.main([CONFIG], verb) == 2
    assert "run.root='runs' is relative, so it would be lost with the job" in capsys.readouterr().err


def test_a_token_that_others_can_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "token"
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    with pytest.raises(ConfigError, match=r"no token for the cluster .*; set RAY_AUTH_TOKEN"):
        read_token()
    path.write_text("s3cret\n")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=r"has mode 0644, others can read it; run: chmod 600") as refused:
        read_token()
    assert "s3cret" not in str(refused.value)
    path.chmod(0o600)
    assert read_token() == "s3cret"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "other")
    assert read_token() == "other"


def test_a_cluster_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    result = call("submit", "--address", "http://127.0.0.1:9", "prune", CONFIG, "run.root=/d")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no Ray dashboard at http://127.0.0.1:9 (")
    assert "0000" not in result.stderr


def test_a_sweep_without_a_grid_is_one_line() -> None:
    result = call("sweep", CONFIG)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {CONFIG} has no grid; add a table [sweep.grid]")


def test_the_example_of_a_sweep_is_one() -> None:
    sweep = plan(str(CONFIGS / "sweep.toml"))
    assert len(sweep.trials) == 12
    assert len({trial.score_key for trial in sweep.trials}) == 2


@pytest.mark.parametrize("verb", ["submit", "sweep"])
def test_help_names_the_verb(verb: str) -> None:
    assert verb in call("--help").stdout
    assert call(verb, "--help").exit_code == 0


def test_help_shows_the_overrides() -> None:
    """Rich takes plain brackets for markup."""
    assert "VERB CONFIG [key=value ...]; VERB is one of: " in " ".join(call("submit", "--help").stdout.split())


def test_every_job_names_its_line() -> None:
    for verb in ("record", "analyse", "decide", "recover", "evaluate", "prune", "sweep"):
        text = (CONFIGS.parent / f"{verb}.py").read_text()
        assert (
            f"ray job submit --working-dir . -- python -m jobs.{verb} CONFIG.toml run.root=/shared/runs [key=value ...]"
            in text
        )
        assert f'until="{verb}"' in text
