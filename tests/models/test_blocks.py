"""Blocks of layers, run in turn, are the whole model, and hold no more than their own weights."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cria_dist.errors import DataError
from cria_dist.models import checkpoint
from cria_dist.models.blocks import Block, BlockModel, partition
from cria_dist.models.decoders import GatedMlpFamily
from cria_dist.models.family import FAMILIES, family_of

MakeModel = Callable[..., Path]

LAYERS = 4
SLIDING = ["sliding_attention", "full_attention"] * 2
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-untied": {"model_type": "llama", "tie_word_embeddings": False},
    "llama-bias": {"model_type": "llama", "mlp_bias": True, "attention_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 8, "tie_word_embeddings": False},
    "qwen2": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3"},
    "gemma2": {"model_type": "gemma2", "sliding_window": 8, "layer_types": SLIDING},
    "gemma3_text": {"model_type": "gemma3_text", "sliding_window": 8, "layer_types": SLIDING},
    "gemma3_text-untied": {
        "model_type": "gemma3_text", "sliding_window": 8, "layer_types": SLIDING, "tie_word_embeddings": False,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS, ids=str)
def directory(request: pytest.FixtureRequest, make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks") / request.param
    return make_model(folder, num_hidden_layers=LAYERS, **MODELS[request.param])


def tokens(sequences: int) -> torch.Tensor:
    return torch.randint(0, 256, (sequences, 20), generator=torch.Generator().manual_seed(sequences))


def load(directory: Path, block: Block, dtype: str = "float32") -> BlockModel:
    family = family_of(checkpoint.read_config(directory))
    return BlockModel(directory, checkpoint.Numerics(dtype), family, block)


def hidden_states(directory: Path, dtype: str, tokens_ST: torch.Tensor) -> list[torch.Tensor]:
    """After every layer of the whole model, as transformers runs it."""
    model = checkpoint.load_model(directory, checkpoint.Numerics(dtype))
    found: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, output: found.append(output))
    with torch.inference_mode():
        model(input_ids=tokens_ST)
    return found


def real_bytes(model: BlockModel) -> int:
    """Of the parameters that have memory, each storage once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in real_parameters(model)}
    return sum(storages.values())


def real_parameters(model: BlockModel) -> list[torch.nn.Parameter]:
    return [p for p in model.module("").parameters() if p.device.type != "meta"]


def test_every_family_is_tested() -> None:
    gated = {name: family for name, family in FAMILIES.items() if isinstance(family, GatedMlpFamily)}
    decoders = {name for name, family in gated.items() if "mlp" in family.parts}
    assert decoders == {model["model_type"] for model in MODELS.values()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_blocks_in_turn_are_the_whole_model(count: int, dtype: str, directory: Path) -> None:
    blocks = [load(directory, block, dtype) for block in partition(LAYERS, count)]
    for sequences in (1, 3):
        tokens_ST = tokens(sequences)
        expected = hidden_states(directory, dtype, tokens_ST)
        state = tokens_ST
        for model in blocks:
            state = model(state)
            assert state.dtype == getattr(torch, dtype)
            assert torch.equal(state, expected[model.block.stop - 1]), model.block
        assert not torch.equal(expected[0], expected[-1])


def test_a_block_computes_what_its_modules_are_asked_for(directory: Path) -> None:
    """What hooks on a middle block's neurons see is what they see in the whole model."""
    seen: dict[str, torch.Tensor] = {}
    whole = checkpoint.load_model(directory, checkpoint.Numerics())
    name = "model.layers.2.mlp.down_proj"
    whole.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.__setitem__("whole", args[0]))
    tokens_ST = tokens(2)
    with torch.inference_mode():
        whole(input_ids=tokens_ST)
    first, second = (load(directory, block) for block in partition(LAYERS, 2))
    second.module(name).register_forward_pre_hook(lambda _, args: seen.__setitem__("block", args[0]))
    second(first(tokens_ST))
    assert torch.equal(seen["whole"], seen["block"])


def test_only_the_blocks_own_weights_are_in_memory(directory: Path) -> None:
    whole = checkpoint.load_model(directory, checkpoint.Numerics()).model
    embedding = whole.embed_tokens.weight.nbytes
    layer = sum(parameter.nbytes for parameter in whole.layers[0].parameters())
    norm = whole.norm.weight.nbytes
    for block in partition(LAYERS, 3):
        length = block.stop - block.first
        assert real_bytes(load(directory, block)) == length * layer + norm + (embedding if block.is_first else 0)


def test_a_dropped_block_is_freed_at_once(directory: Path) -> None:
    """Two blocks in memory would be twice the budget; no garbage collector may be needed."""
    gc.collect()
    gc.disable()
    try:
        model = load(directory, Block(1, 3, LAYERS))
        model(torch.zeros(1, 4, 32))
        alive = [weakref.ref(parameter) for parameter in real_parameters(model)]
        del model
        assert [reference() for reference in alive if reference() is not None] == []
    finally:
        gc.enable()


def test_a_sharded_checkpoint(make_model: MakeModel, tmp_path: Path) -> None:
    whole = make_model(tmp_path / "whole", num_hidden_layers=LAYERS)
    parts = make_model(tmp_path / "parts", num_hidden_layers=LAYERS, shard_size="20KB")
    assert len(checkpoint.weight_files(parts)) > 3
    for block in partition(LAYERS, 2):
        values = tokens(2) if block.is_first else torch.randn(2, 20, 32)
        assert torch.equal(load(parts, block)(values), load(whole, block)(values))


def changed_weights(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / checkpoint.WEIGHTS)
    change(tensors)
    save_file(tensors, target / checkpoint.WEIGHTS, metadata={"format": "pt"})
    return target


def test_a_missing_tensor_is_named(pico: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    damaged = changed_weights(pico, tmp_path / "damaged", lambda tensors: tensors.pop(name))
    load(damaged, Block(0, 1, 2))
    with pytest.raises(DataError, match=rf"damaged has no tensor '{name}'; is config\.json of another model\?"):
        load(damaged, Block(1, 2, 2))


def test_a_tensor_of_another_shape_is_named(pico: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    damaged = changed_weights(pico, tmp_path / "damaged", lambda tensors: tensors.update({name: torch.zeros(40, 32)}))
    with pytest.raises(DataError, match=rf"{name} has shape \(40, 32\), config\.json says \(48, 32\)"):
        load(damaged, Block(0, 2, 2))


def test_a_config_with_too_many_layers_is_an_error(pico: Path, tmp_path: Path) -> None:
    shutil.copytree(pico, tmp_path / "model")
    config = checkpoint.read_config(pico) | {"num_hidden_layers": 3, "layer_types": None}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"has no tensor 'model\.layers\.2\."):
        load(tmp_path / "model", Block(2, 3, 3))


@pytest.mark.parametrize(("total", "count"), [(1, 1), (7, 3), (80, 8), (5, 5)])
def test_a_partition_is_balanced_and_whole(total: int, count: int) -> None:
    blocks = partition(total, count)
    lengths = [block.stop - block.first for block in blocks]
    assert (len(blocks), sum(lengths)) == (count, total)
    assert max(lengths) - min(lengths) <= 1
    assert [block.first for block in blocks[1:]] == [block.stop for block in blocks[:-1]]
    assert [block.is_first for block in blocks] == [True] + [False] * (count - 1)
    assert [block.is_last for block in blocks] == [False] * (count - 1) + [True]
