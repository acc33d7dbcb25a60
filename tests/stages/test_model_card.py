"""The card beside the weights: what a reader needs is in it, and two runs of the same write the same."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from cria_dist.models import checkpoint, writing
from cria_dist.records import Report
from cria_dist.report.writer import report_from_json
from cria_dist.stages.model_card import card, read_base, write_cards
from tests.conftest import FinishedRun


@pytest.fixture(scope="module")
def report(finished_run: FinishedRun) -> Report:
    return report_from_json(finished_run.folder / "report.json")


def test_every_checkpoint_of_a_run_has_one(finished_run: FinishedRun, report: Report) -> None:
    for name, labels in (("pruned", 3), ("recovered", 4)):
        written = (finished_run.folder / name / "README.md").read_text()
        parsed = ModelCard(written)
        assert parsed.data.to_dict() == {"tags": ["cria-dist", "pruned"]}
        assert written.count("| dense |") == 1
        assert [f"| {one.label} | {one.parameters:,} |" in written for one in report.variants] == [
            index < labels for index in range(4)
        ]
        assert [sentence in written for sentence in report.protocol] == [
            not sentence.startswith(("Latency", "Compared")) for sentence in report.protocol
        ]
        assert "AutoModelForCausalLM.from_pretrained" in written
        assert "python -m pytest" in written
        assert ("cria apply-plan" in written) == (name == "pruned")
        assert ("llama.cpp | equal: " in written) == (name == "recovered")
    assert checkpoint.is_complete(finished_run.folder / "recovered")


def test_times_are_left_out_so_that_it_is_the_same_again(finished_run: FinishedRun, report: Report) -> None:
    base = read_base("base", Path("nowhere"))
    assert card(report, finished_run.folder / "pruned", base) == card(report, finished_run.folder / "pruned", base)
    assert " ms" not in card(report, finished_run.folder / "recovered", base)


def test_the_licence_goes_on(finished_run: FinishedRun, report: Report, pico: Path, tmp_path: Path) -> None:
    run = finished_run.copy(tmp_path).folder
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/first\nlanguage: en\n---\n# Base\n")
    (base / "LICENSE.txt").write_text("the terms")
    assert len(write_cards(report, base, run)) == 2
    written = (run / "pruned" / "README.md").read_text()
    assert ModelCard(written).data.to_dict() == {
        "base_model": "org/first",
        "language": "en",
        "license": "apache-2.0",
        "tags": ["cria-dist", "pruned"],
    }
    assert "apache-2.0, as the base model says; its LICENSE.txt lie beside the weights" in written
    assert (run / "pruned" / "BASE_MODEL.md").read_text().endswith("# Base\n")
    (base / "README.md").unlink()
    assert "That of the base model; its LICENSE.txt" in card(report, run / "pruned", read_base("base", base))
    assert "names no licence" in card(report, run / "pruned", read_base("base", pico))
    assert "base_model: org/name" in card(report, run / "pruned", read_base("org/name", pico))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"---\nlicense: [\n---\n", "while parsing a flow node"),
        (b"---\nsome text\n---\n", "block should be a dict"),
        (b"\xff\xfe", "can't decode byte 0xff"),
    ],
)
def test_a_card_that_cannot_be_read_is_said_and_no_more(
    content: bytes, reason: str, finished_run: FinishedRun, report: Report, tmp_path: Path
) -> None:
    run = finished_run.copy(tmp_path).folder
    (tmp_path / "README.md").write_bytes(content)
    assert len(write_cards(report, tmp_path, run)) == 2
    written = (run / "pruned" / "README.md").read_text()
    assert "See BASE_MODEL.md: the front matter of the base model's card cannot be read" in written
    assert reason in written
    assert ModelCard(written).data.to_dict() == {"tags": ["cria-dist", "pruned"]}


def test_layers_that_differ_are_loaded_as_the_card_says(
    finished_run: FinishedRun, report: Report, tmp_path: Path
) -> None:
    config = {**checkpoint.read_config(finished_run.folder / "pruned"), "intermediate_size_per_layer": [20, 36]}
    writing.finish(finished_run.folder / "pruned", tmp_path, config)
    written = card(report, tmp_path, read_base("base", tmp_path))
    assert 'cria_dist.load_pruned("PATH")' in written
    assert "trust_remote_code=True" in written
    assert "model.gguf" in written


def test_a_classifier_is_not_sent_to_llama_cpp(report: Report, pico_bert: Path, tmp_path: Path) -> None:
    config = {**checkpoint.read_config(pico_bert), "intermediate_size_per_layer": [20, 36, 48]}
    writing.finish(pico_bert, tmp_path, config)
    written = card(report, tmp_path, read_base("base", tmp_path))
    assert "--format onnx" in written
    assert "gguf" not in written
