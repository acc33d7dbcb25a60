"""A pico Llama with its tokenizer, a text, and a run over both that takes a second and no network."""

import io
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cria_dist.config import RunConfig
from cria_dist.config_file import parse
from cria_dist.pool import LocalPool, Pool
from cria_dist.records import Stage
from cria_dist.report.progress import Progress

# torch and transformers are imported where they are used: the environment below must be set before

WORDS = """
the cat sat on a mat and saw seven grey birds fly over one old house by the sea while rain fell in long thin lines
nobody had asked for bread or wine but every evening two men came back from work with both
"""
STORIES = Path(__file__).parents[2] / "shared" / "data" / "stories260k"


def pytest_configure() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ray reads these when it is imported, by whatever test module comes first
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # as in Ray workers; set here and not by a fixture: those of the session, which compute runs, come before it
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    os.environ["MKL_CBWR"] = "AUTO,STRICT"


def save_tokenizer(folder: Path) -> None:
    """One token per byte, ``<s>`` and ``</s>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate([*alphabet, "<s>", "</s>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def save_model(
    folder: Path, model_type: str = "llama", dtype: str = "float32", shard_size: str = "1GB", **changes: Any
) -> Path:
    """A small decoder of a family, with weights large enough that every unit matters, and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    shape: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": None,
    }
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):  # transformers starts them at zero, which would hide a lost bias
                parameter.normal_(std=0.15)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """``make_model(folder, model_type="llama", dtype="float32", shard_size="1GB", **config_changes)``."""
    return save_model


def save_classifier(folder: Path, **changes: Any) -> Path:
    """A small ViT for images of 3 x 16 x 16 (16 patches and the class token), with its image processor."""
    import torch
    from transformers import AutoModelForImageClassification, ViTConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        "num_labels": 10,
        "initializer_range": 0.15,
    }
    settings = ViTConfig(**{**shape, **changes})
    torch.manual_seed(7)
    model = AutoModelForImageClassification.from_config(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    size = {"height": settings.image_size, "width": settings.image_size}
    processor = {"image_processor_type": "ViTImageProcessor", "size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="session")
def make_classifier() -> Callable[..., Path]:
    """``make_classifier(folder, **config_changes)``."""
    return save_classifier


@pytest.fixture(scope="session")
def pico_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a ViT with 3 layers of 48 units; not to be written to."""
    return save_classifier(tmp_path_factory.mktemp("models") / "pico-vit")


def save_encoder(folder: Path, model_type: str = "bert", **changes: Any) -> Path:
    """A small sentence classifier of two classes; its tokenizer puts every sentence between ``<s>`` and ``</s>``."""
    import torch
    from tokenizers import processors
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    shape: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 1 if model_type == "roberta" else 0,
        "id2label": {0: "bad", 1: "good"},
        "label2id": {"bad": 0, "good": 1},
    }
    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type, **shape | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = [("<s>", 256), ("</s>", 257)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_encoder() -> Callable[..., Path]:
    """``make_encoder(folder, model_type="bert", **config_changes)``."""
    return save_encoder


@pytest.fixture(scope="session")
def pico_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a BERT with 3 layers of 48 units and two classes; not to be written to."""
    return save_encoder(tmp_path_factory.mktemp("models") / "pico-bert")


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a Llama with 2 layers of 48 units and tied embeddings; not to be written to."""
    return save_model(tmp_path_factory.mktemp("models") / "pico")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 18,000 characters in paragraphs; its halves share no 32 characters in a row."""
    rng = random.Random(11)
    paragraphs = [" ".join(rng.choices(WORDS.split(), k=24)) for _ in range(160)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` laid over ``tree``, section by section; the method is replaced as a whole."""
    result = dict(tree)
    for key, value in changes.items():
        both_are_sections = isinstance(value, Mapping) and isinstance(result.get(key), Mapping) and key != "method"
        result[key] = merged(result[key], value) if both_are_sections else value
    return result


RunConfigMaker = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def run_tree(pico: Path, text_file: Path) -> dict[str, Any]:
    """Plain configuration of a run on the pico model: 12 x 32 calibration tokens in 3 shards; no ``run.root`` yet."""
    return {
        "name": "pico",
        "model": {"path": str(pico)},
        "data": {
            "calibration": {"source": str(text_file), "part": "first"},
            "test": {"source": str(text_file), "part": "second"},
            "sequence_length": 32,
            "calibration_sequences": 12,
            "test_sequences": 4,
        },
        "record": {"tokens": 200, "shard_sequences": 4, "batch_sequences": 2},
        "method": {"name": "cria"},
        "prune": {"ratio": 0.25, "multiple": 4},
        "recover": {
            "steps": 6,
            "workers": 1,
            "batch_sequences": 4,
            "sequence_length": 16,
            "learning_rate": 1e-3,
            "checkpoint_every": 2,
        },
        "evaluate": {"latency_repeats": 1, "prompts": ["the cat", "rain fell"], "new_tokens": 4},
        "run": {"pool": "local"},
    }


@pytest.fixture(scope="session")
def run_config(run_tree: dict[str, Any]) -> RunConfigMaker:
    """``run_config(tmp_path, **changes)``: a run on the pico model with run folders in ``tmp_path/runs``."""

    def make(tmp_path: Path, **changes: Any) -> RunConfig:
        return parse(merged(merged(run_tree, {"run": {"root": str(tmp_path / "runs")}}), changes))

    return make


@pytest.fixture
def image_config(tmp_path: Path) -> Callable[..., Callable[..., RunConfig]]:
    """Runs of a classifier on the labelled images of a Parquet file: half to calibrate on, half to test."""

    def make(model: Path, images: Path, tokens: int) -> Callable[..., RunConfig]:
        half = {"source": str(images), "format": "images", "field": "image", "label": "label"}
        tree: dict[str, Any] = {
            "name": "net",
            "model": {"path": str(model)},
            "data": {
                "calibration": {**half, "part": "first"},
                "test": {**half, "part": "second"},
                "calibration_sequences": 12,
                "test_sequences": 12,
            },
            "record": {"tokens": tokens, "shard_sequences": 6, "batch_sequences": 4},
            "method": {"name": "conditional"},
            "prune": {"ratio": 0.25, "multiple": 1},
            "recover": {"steps": 3, "workers": 1, "batch_sequences": 4, "learning_rate": 1e-3},
            "evaluate": {"latency_repeats": 1, "batch_sequences": 4},
            "run": {"root": str(tmp_path / "runs"), "pool": "local"},
        }
        return lambda **changes: parse({**tree, **changes})

    return make


def train_in_this_process(task: Any, name: str, storage: Path) -> None:
    """What ``cria_dist.runtime.launch.train_here`` does, without importing Ray."""
    from cria_dist.stages import training
    from cria_dist.stages.recover import Place

    del name, storage
    training.carry_out(task, Place(), None, lambda step, write: None)


@pytest.fixture(scope="session")
def make_context() -> Callable[..., Any]:
    """``make_context(config, pool=LocalPool(), until="evaluate")``: prepare a run; what it prints goes nowhere."""
    from cria_dist.pipeline import Context
    from cria_dist.stages.prepare import prepare

    def make(config: RunConfig, pool: Pool | None = None, until: Stage = "evaluate") -> Context:
        job = prepare(config, until)
        progress = Progress(job.folder, interactive=False, console=Console(file=io.StringIO()))
        return Context(job, pool or LocalPool(), train_in_this_process, progress)

    return make


@dataclass(frozen=True)
class FinishedRun:
    """A run with report; copy it before changing anything."""

    config: RunConfig
    folder: Path

    def copy(self, tmp_path: Path) -> "FinishedRun":
        """The same run below ``tmp_path/runs``."""
        folder = tmp_path / "runs" / self.folder.name
        shutil.copytree(self.folder, folder)
        run = self.config.run.model_copy(update={"root": str(tmp_path / "runs")})
        return FinishedRun(self.config.model_copy(update={"run": run}), folder)


@pytest.fixture(scope="session")
def finished_run(
    run_config: RunConfigMaker, make_context: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    """The whole story on the pico model with two methods to compare: one shot, least squares, recovery, report."""
    from cria_dist.pipeline import prune

    config = run_config(tmp_path_factory.mktemp("finished"), compare=[{"name": "random"}, {"name": "magnitude"}])
    context = make_context(config)
    prune(context, "python -m pytest")
    context.progress.close("done")
    return FinishedRun(config, context.job.folder)


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real Llama with 260,000 parameters, where it is at hand."""
    if not (STORIES / "model.safetensors").is_file():
        pytest.skip(f"{STORIES} is not here")
    return STORIES
