"""``cria export``: which model of a run goes out, and what a mistake is answered."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cria_dist import cli
from cria_dist.errors import ConfigError
from cria_dist.stages.export_model import export_model, model_of

pytest.importorskip("gguf")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["export", *map(str, arguments)], env={"COLUMNS": "200"})


def test_a_checkpoint_becomes_a_file_or_a_folder(pico: Path, tmp_path: Path) -> None:
    written = call(pico, tmp_path / "pico.gguf")
    assert written.exit_code == 0, written.output
    assert written.output.startswith(f"{tmp_path / 'pico.gguf'}: 0.1 MB, llama.cpp's architecture 'llama'")
    written = call(pico, tmp_path / "decilm", "--format", "decilm")
    assert written.exit_code == 0, written.output
    assert "for vLLM" in written.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decilm", "pico.gguf"]


def test_a_run_gives_what_it_ended_with(pico: Path, tmp_path: Path) -> None:
    for name in ("pruned", "recovered"):
        (tmp_path / name).mkdir()
        for path in pico.iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
        assert model_of(str(tmp_path)) == tmp_path / name
    (tmp_path / "recovered" / "config.json").unlink()
    assert model_of(str(tmp_path)) == tmp_path / "pruned"
    assert model_of(str(pico)) == pico.resolve()


def test_mistakes_are_told_and_leave_nothing(pico: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert "is there already" in call(pico, tmp_path / "there").stderr
    assert "has no config.json" in call(tmp_path / "there", tmp_path / "out").stderr
    with pytest.raises(ConfigError, match="cannot be written"):
        export_model(str(pico), Path("/proc/nowhere/pico.gguf"), "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
