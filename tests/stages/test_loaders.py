"""The verdicts on programs other than transformers: equal, by rule, or no, each with its reason."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cria_dist.models import checkpoint, gguf_families, gguf_layout
from cria_dist.models.family import family_of
from cria_dist.models.surgery import Surgery, write_pruned
from cria_dist.report.writer import report_from_json
from cria_dist.stages import fresh_process, loaders
from cria_dist.stages.answers import answer_of
from cria_dist.stages.loaders import verdicts
from tests.conftest import FinishedRun

pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, np.arange(64, dtype=np.int32).reshape(2, 32) * 5 % 250)
    return path


@pytest.fixture(scope="module")
def uneven(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target, config = tmp_path_factory.mktemp("uneven") / "pruned", checkpoint.read_config(pico)
    kept = {"layer-000.mlp": tuple(range(26)), "layer-001.mlp": tuple(range(10, 46))}
    write_pruned(pico, target, Surgery(family_of(config), config, kept))
    return target


def asked(directory: Path, tokens: Path) -> dict[str, str]:
    return verdicts(directory, answer_of(checkpoint.from_pretrained(directory, dtype=torch.float32), tokens))


def test_layers_that_differ_load_in_all_that_have_a_form_for_them(uneven: Path, tokens: Path) -> None:
    found = asked(uneven, tokens)
    assert found["llama.cpp"].startswith("equal: GGUF of `cria export`, architecture 'deci', loaded in a fresh process")
    assert "the same most likely token at 32 of 32 positions" in found["llama.cpp"]
    assert (
        found["vLLM"]
        == "by rule: as DeciLMForCausalLM, which `cria export --format decilm` writes, with trust_remote_code"
    )
    assert found["transformers, trust_remote_code"].startswith("by rule: modeling_pruned.py")
    assert found["onnxruntime"].startswith("no: ")


def test_a_report_says_it_of_what_the_run_ended_with(finished_run: FinishedRun) -> None:
    found = report_from_json(finished_run.folder / "report.json").loaders
    assert found["llama.cpp, recovered"].startswith("equal: GGUF of `cria export`, architecture 'llama'")
    assert found["vLLM, recovered"].startswith("by rule: ")
    assert "llama.cpp, pruned" not in found


def test_heads_that_do_not_make_up_the_hidden_size(
    make_model: Callable[..., Path], tokens: Path, tmp_path: Path
) -> None:
    found = asked(make_model(tmp_path / "model", "qwen2", num_attention_heads=2), tokens)
    assert found["llama.cpp"].startswith("no: 2 query heads of 8 values in a model of hidden size 32")
    assert found["vLLM"] == "no: its Qwen2 has heads that make up the hidden size"


@pytest.mark.parametrize(("family", "verdict"), [("granite", "by rule: "), ("olmo3", "no: it is not known to serve")])
def test_families_without_an_adapter_of_their_own_are_served_where_that_was_seen(
    family: str, verdict: str, make_model: Callable[..., Path], tokens: Path, tmp_path: Path
) -> None:
    assert asked(make_model(tmp_path / "model", family), tokens)["vLLM"].startswith(verdict)


def test_a_form_that_computes_something_else_is_no(uneven: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_families, "halves_to_pairs", lambda tensor, heads: tensor)
    assert asked(uneven, tokens)["llama.cpp"].startswith("no: GGUF of `cria export`, architecture 'deci' loads, but")


def test_a_file_that_llama_cpp_refuses_is_no(uneven: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_layout, "LAYERED", gguf_families.LLAMA)
    assert asked(uneven, tokens)["llama.cpp"].startswith("no: llama.cpp does not load its GGUF (ValueError: ")


def test_what_is_not_installed_or_too_large_is_by_rule(
    pico: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "TRIED_BYTES", 100)
    assert asked(pico, tokens)["llama.cpp"].endswith("too large to be tried here")
    monkeypatch.setattr(loaders, "find_spec", lambda name: None if name == "llama_cpp" else True)
    assert asked(pico, tokens)["llama.cpp"].endswith("llama-cpp-python is not installed to try it")


def refused(what: str, make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A model whose export says no, by its config or by its tokenizer."""
    if what == "config":
        return make_model(tmp_path / "model", hidden_act="gelu")
    directory = make_model(tmp_path / "model")
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": {"type": "Whitespace"}}))
    return directory


@pytest.mark.parametrize(
    ("what", "reason"),
    [("config", "no: hidden_act='gelu': llama.cpp computes 'silu'"), ("tokenizer", "no: the tokenizer cuts text by ")],
)
def test_what_the_export_refuses_is_no_wherever_it_is_asked(
    what: str, reason: str, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = refused(what, make_model, tmp_path)
    assert verdicts(directory, None)["llama.cpp"].startswith(reason)  # too large
    for place in ("cria_dist.stages.loaders.find_spec", "cria_dist.models.gguf_file.find_spec"):
        monkeypatch.setattr(place, lambda name: None)
    assert verdicts(directory, None)["llama.cpp"].startswith(reason)  # not installed


def test_a_program_that_comes_to_no_end_is_by_rule(pico: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh_process, "TIMEOUT_SECONDS", 0.01)
    found = asked(pico, tokens)["llama.cpp"]
    assert found == f"{loaders.GGUF_RULE}; trying it failed: no answer within 0 s"


def test_a_full_disk_is_by_rule(pico: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answer_of(checkpoint.from_pretrained(pico, dtype=torch.float32), tokens)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    monkeypatch.setattr(loaders, "python_with_vllm", lambda named: "python")
    found = verdicts(pico, expected)
    for program, rule in (("llama.cpp", loaders.GGUF_RULE), ("vLLM", loaders.STOCK_RULE)):
        assert found[program] == f"{rule}; trying it failed: [Errno 28] No space left on device"


def test_models_without_text_have_onnx(pico_vit: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "pixels.npy", np.zeros((1, 3, 16, 16), np.float32))
    found = verdicts(pico_vit, answer_of(checkpoint.from_pretrained(pico_vit), tmp_path / "pixels.npy"))
    assert {name: verdict.partition(":")[0] for name, verdict in found.items()} == {
        "llama.cpp": "no",
        "vLLM": "no",
        "onnxruntime": "by rule",
    }
