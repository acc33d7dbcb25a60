"""ONNX files: onnxruntime computes what the checkpoint computes, for any number of examples."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from cria_dist.errors import ConfigError, DataError
from cria_dist.models import checkpoint, onnx_file
from cria_dist.models.family import family_of
from cria_dist.models.onnx_file import example, write_onnx
from cria_dist.models.surgery import Surgery, write_pruned

onnxruntime = pytest.importorskip("onnxruntime")
MINILM = Path(__file__).parents[3] / "shared" / "data" / "minilm-l6-sst2"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT that classifies, its two layers of 20 and 30 neurons, 3 heads and 1."""
    folder = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(7)
    settings = BertConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.15,
    )
    AutoModelForSequenceClassification.from_config(settings).save_pretrained(folder / "dense")
    config = checkpoint.read_config(folder / "dense")
    kept = {"layer-000.mlp": tuple(range(20)), "layer-001.mlp": tuple(range(10, 40))}
    kept |= {"layer-000.attention": (0, 2, 3), "layer-001.attention": (1,)}
    write_pruned(folder / "dense", folder / "pruned", Surgery(family_of(config), config, kept))
    return folder / "pruned"


@pytest.mark.slow
def test_onnxruntime_computes_the_same(encoder: Path, tmp_path: Path) -> None:
    assert write_onnx(encoder, tmp_path / "model.onnx") < 1e-5
    assert_equal(encoder, tmp_path / "model.onnx", 1)
    assert_equal(encoder, tmp_path / "model.onnx", 6, 30)


def assert_equal(directory: Path, path: Path, count: int, length: int = 11) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = example(checkpoint.read_config(directory), count, length)
    assert [one.name for one in session.get_inputs()] == list(inputs)
    with torch.inference_mode():
        ours = checkpoint.from_pretrained(directory, dtype=torch.float32)(**inputs).logits.numpy()
    (theirs,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    assert theirs.shape == ours.shape
    assert np.abs(theirs - ours).max() <= 1e-4 * max(1.0, np.abs(ours).max())


def test_other_numbers_leave_no_file(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "_write", lambda model, inputs, positions, path: path.write_bytes(b"something"))
    monkeypatch.setattr(onnx_file, "_difference", lambda model, inputs, path: float("nan"))
    with pytest.raises(DataError, match="logits differ by nan"):
        write_onnx(encoder, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_has_no_onnx_is_told(pico: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="models that write text have no ONNX export"):
        write_onnx(pico, tmp_path / "model.onnx")
    monkeypatch.setattr(onnx_file, "ONE_FILE_BYTES", 1000)
    with pytest.raises(ConfigError, match="too many for an ONNX file"):
        write_onnx(encoder, tmp_path / "model.onnx")
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs onnx, onnxruntime, onnxscript, .*pip install 'cria-dist\[export\]'"):
        write_onnx(encoder, tmp_path / "model.onnx")


@pytest.mark.slow
def test_images_and_other_encoders(
    make_classifier: Callable[..., Path], make_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    vit = make_classifier(tmp_path / "vit", num_hidden_layers=2)
    config = checkpoint.read_config(vit)
    heads = {"layer-000.attention": (0, 2, 3), "layer-001.attention": (1,)}
    write_pruned(vit, tmp_path / "narrow", Surgery(family_of(config), config, heads))
    assert write_onnx(tmp_path / "narrow", tmp_path / "vit.onnx") < 1e-4
    assert_equal(tmp_path / "narrow", tmp_path / "vit.onnx", 5)
    distilbert = make_encoder(tmp_path / "distilbert", "distilbert", hidden_dim=48)
    assert write_onnx(distilbert, tmp_path / "distilbert.onnx") < 1e-4
    assert_equal(distilbert, tmp_path / "distilbert.onnx", 4, 20)
    if not (MINILM / "model.safetensors").is_file():
        pytest.skip(f"{MINILM} is not here")
    assert write_onnx(MINILM, tmp_path / "minilm.onnx") < 1e-4
    assert_equal(MINILM, tmp_path / "minilm.onnx", 4, 60)
