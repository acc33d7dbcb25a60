"""A vision transformer: names in checkpoints are not those in memory, and pixels come in instead of tokens."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cria_dist.models import checkpoint, surgery
from cria_dist.models.blocks import BlockModel, partition
from cria_dist.models.checkpoint import Numerics, load_model, read_config
from cria_dist.models.family import FAMILIES, family_of
from cria_dist.models.surgery import Surgery
from cria_dist.models.tensor_parallel import tensor_ranks_problem
from cria_dist.records import Site

WIDTH, LAYERS = 48, 3
KEPT = {
    "layer-000.mlp": tuple(sorted({*range(0, 48, 2), 1, 47})),
    "layer-001.mlp": tuple(range(5, 31)),
    "layer-002.mlp": tuple(range(22, 48)),
}
PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

STRANGER = """
import sys
sys.modules["cria_dist"] = None  # any import of it raises
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
source, target, directory = sys.argv[1:]
model, info = AutoModelForImageClassification.from_pretrained(directory, output_loading_info=True)
assert not any(info.values()), info
with torch.inference_mode():
    save_file({"logits": model.eval()(pixel_values=load_file(source)["pixels"]).logits}, target)
"""


def operation(directory: Path, repair: Path | None = None, output_bias: bool = False) -> Surgery:
    config = read_config(directory)
    return Surgery(family_of(config), config, KEPT, repair, output_bias)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(pixel_values=PIXELS).logits


def masked_logits(
    directory: Path, repair: dict[str, torch.Tensor] | None = None, kept: dict[str, tuple[int, ...]] = KEPT
) -> torch.Tensor:
    """Of the whole model with the removed units' outputs zeroed; then the repair, put in by hand."""
    model = load_model(directory, Numerics())
    dense = logits(model)
    for layer, block in enumerate(model.vit.layers):
        key = f"layer-{layer:03d}.mlp"
        with torch.no_grad():
            block.mlp.fc2.weight[:, sorted(set(range(WIDTH)) - set(kept[key]))] = 0
            for name, values in (repair or {}).items():
                if name == f"{key}.weight":
                    block.mlp.fc2.weight[:, list(kept[key])] = values
                elif name == f"{key}.bias":
                    block.mlp.fc2.bias.copy_(values)
    masked = logits(model)
    assert (masked - dense).abs().max() > 1e-2, "the removed units do nothing: this test could not fail"
    return masked


def assert_equals(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), (found - expected).abs().max()


def logits_elsewhere(directory: Path, tmp_path: Path) -> torch.Tensor:
    save_file({"pixels": PIXELS}, tmp_path / "pixels.safetensors")
    paths = [str(tmp_path / "pixels.safetensors"), str(tmp_path / "logits.safetensors"), str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", STRANGER, *paths], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return load_file(paths[1])["logits"]


def test_every_vision_family_is_tested() -> None:
    images = [name for name, family in FAMILIES.items() if family.takes == "images"]
    assert images == ["vit", "resnet_cifar", "vgg_cifar", "resnet_bottleneck"]  # the last three: test_convolutional.py


def test_names_on_disk_are_those_that_transformers_writes(pico_vit: Path) -> None:
    config = read_config(pico_vit)
    model = checkpoint.empty_model(config)
    stored = load_file(pico_vit / checkpoint.WEIGHTS)
    shapes = {family_of(config).on_disk(name): value.shape for name, value in model.named_parameters()}
    assert shapes == {name: tensor.shape for name, tensor in stored.items()}


def test_the_coupled_tensors_are_all_that_know_the_width(pico_vit: Path) -> None:
    """No other size of the model is 48 (a patch has 3 x 4 x 4 values, but in three dimensions)."""
    config = read_config(pico_vit)
    family = family_of(config)
    found = {
        name: list(tensor.shape).index(WIDTH)
        for name, tensor in load_file(pico_vit / checkpoint.WEIGHTS).items()
        if WIDTH in tensor.shape
    }
    assert found == {
        name: dim for site in family.widths(config) for name, dim in family.coupled_tensors(site, config).items()
    }
    assert len(found) == 3 * LAYERS


def test_units_cost_what_leaves_the_checkpoint(pico_vit: Path, tmp_path: Path) -> None:
    surgery.write_pruned(pico_vit, tmp_path / "pruned", operation(pico_vit))
    before, after = (
        sum(tensor.numel() for tensor in load_file(folder / checkpoint.WEIGHTS).values())
        for folder in (pico_vit, tmp_path / "pruned")
    )
    config = read_config(pico_vit)
    removed = sum(WIDTH - len(kept) for kept in KEPT.values())
    assert before - after == removed * family_of(config).unit_cost(Site(0), config)
    assert after == checkpoint.count_parameters(read_config(tmp_path / "pruned"))


@pytest.mark.parametrize(
    ("image", "patch", "positions", "shape"),
    [(16, 4, 17, (3, 16, 16)), (224, 16, 197, (3, 224, 224)), ([32, 16], [8, 4], 17, (3, 32, 16)), (30, 8, 10, None)],
)
def test_positions_are_patches_and_the_class_token(
    image: int | list[int],
    patch: int | list[int],
    positions: int,
    shape: tuple[int, ...] | None,
    make_classifier: Callable[..., Path],
    tmp_path: Path,
) -> None:
    config = read_config(make_classifier(tmp_path / "model", patch_size=4)) | {"image_size": image, "patch_size": patch}
    family = family_of(config)
    assert family.positions(config, 512) == positions
    embedding = checkpoint.empty_model(config).get_parameter("vit.embeddings.position_embeddings")
    assert embedding.shape[1] == positions
    assert shape is None or family.input_shape(config, 512) == shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_blocks_in_turn_are_the_whole_model(count: int, dtype: str, pico_vit: Path) -> None:
    expected: list[torch.Tensor] = []
    whole = load_model(pico_vit, Numerics(dtype))
    for layer in whole.vit.layers:
        layer.register_forward_hook(lambda _, args, output: expected.append(output))
    with torch.inference_mode():
        whole(pixel_values=PIXELS)
    family, state = family_of(read_config(pico_vit)), PIXELS
    for block in partition(LAYERS, count):
        state = BlockModel(pico_vit, Numerics(dtype), family, block)(state)
        assert torch.equal(state, expected[block.stop - 1]), block
    assert not torch.equal(expected[0], expected[-1])


def test_only_the_blocks_own_weights_are_in_memory(pico_vit: Path) -> None:
    def count(parameters: list[torch.nn.Parameter]) -> int:
        return sum(parameter.numel() for parameter in parameters if parameter.device.type != "meta")

    whole, family = load_model(pico_vit, Numerics()).vit, family_of(read_config(pico_vit))
    layer, norm = count(list(whole.layers[0].parameters())), count(list(whole.layernorm.parameters()))
    embedding = count(list(whole.embeddings.parameters()))
    for block in partition(LAYERS, 2):
        held = count(list(BlockModel(pico_vit, Numerics(), family, block).module("").parameters()))
        assert held == (block.stop - block.first) * layer + norm + (embedding if block.is_first else 0)


def test_removing_equals_masking(pico_vit: Path, tmp_path: Path) -> None:
    expected = masked_logits(pico_vit)
    surgery.write_pruned(pico_vit, tmp_path / "pruned", operation(pico_vit))
    assert_equals(logits_elsewhere(tmp_path / "pruned", tmp_path), expected)
    assert_equals(logits(load_model(tmp_path / "pruned", Numerics())), expected)
    assert_equals(logits(surgery.pruned_copy(load_model(pico_vit, Numerics()), operation(pico_vit))), expected)
    assert (tmp_path / "pruned" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_repair_goes_where_it_belongs(part: str, pico_vit: Path, tmp_path: Path) -> None:
    generator, repair = torch.Generator().manual_seed(3), tmp_path / "repair"
    repair.mkdir()
    made: dict[str, torch.Tensor] = {}
    for key, kept in KEPT.items():
        name = f"vit.encoder.layer.{Site.from_key(key).layer}.output.dense.{part}"
        shape = (32, len(kept)) if part == "weight" else (32,)
        made[f"{key}.{part}"] = 0.1 * torch.randn(shape, generator=generator)
        save_file({name: made[f"{key}.{part}"]}, repair / f"{key}.safetensors")
    repaired = operation(pico_vit, repair, part == "bias")
    expected = masked_logits(pico_vit, made)
    surgery.write_pruned(pico_vit, tmp_path / "pruned", repaired)
    assert_equals(logits(load_model(tmp_path / "pruned", Numerics())), expected)
    assert_equals(logits(surgery.pruned_copy(load_model(pico_vit, Numerics()), repaired)), expected)


def test_widths_that_differ(pico_vit: Path, tmp_path: Path) -> None:
    kept = {"layer-000.mlp": tuple(range(8)), "layer-001.mlp": tuple(range(9, 40)), "layer-002.mlp": tuple(range(16))}
    done = surgery.Surgery(family_of(read_config(pico_vit)), read_config(pico_vit), kept)
    surgery.write_pruned(pico_vit, tmp_path / "pruned", done)
    assert read_config(tmp_path / "pruned")["intermediate_size_per_layer"] == [8, 31, 16]
    assert_equals(logits(load_model(tmp_path / "pruned", Numerics())), masked_logits(pico_vit, kept=kept))


def test_layers_are_not_shared(pico_vit: Path) -> None:
    assert "no plan to share the layers of 'vit'" in (tensor_ranks_problem(read_config(pico_vit), 2) or "")
