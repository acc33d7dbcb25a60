"""A layer as it is and as it will be, against checkpoints that have lost the same units."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cria_dist.models import checkpoint, resnet_bottleneck, resnet_cifar, surgery
from cria_dist.models.blocks import Block, BlockModel
from cria_dist.models.depth import PART as LAYER
from cria_dist.models.family import family_of
from cria_dist.models.patches import CIFAR, write_classifier
from cria_dist.models.twin import TwinLayer
from cria_dist.records import Site

MakeModel = Callable[..., Path]
NUMERICS = checkpoint.Numerics()
EVERY_HEAD = {"num_key_value_heads": None}
DECODERS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "llama": ({"mlp_bias": True, "attention_bias": True}, {"attention", "mlp"}),
    "mistral": ({}, {"attention", "mlp"}),
    "qwen2": ({}, {"attention", "mlp"}),
    "qwen3": ({}, {"attention", "mlp"}),
    "gpt2": (EVERY_HEAD, {"attention", "mlp"}),
    "gpt_neox": (EVERY_HEAD, {"mlp"}),
    "phi3": ({"pad_token_id": 0}, {"attention", "mlp"}),
    "glm": ({"pad_token_id": 0}, {"attention", "mlp"}),
    "gemma2": ({}, set()),
    "olmo2": ({}, set()),
    "granite": ({"residual_multiplier": 0.5}, set()),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32, **EVERY_HEAD}, set()),
    "mixtral": ({}, {"attention"}),
}
"""Changes of the config, and the parts that are known to be added to the stream as they are."""
ENCODERS = ("bert", "roberta", "distilbert")


@pytest.fixture(scope="module", params=[*DECODERS, *ENCODERS, "vit", "resnet_cifar", "resnet_bottleneck"])
def dense(
    request: pytest.FixtureRequest,
    make_model: MakeModel,
    make_encoder: MakeModel,
    make_classifier: MakeModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder, name = tmp_path_factory.mktemp("twin") / request.param, request.param
    torch.manual_seed(3)
    if name == "resnet_cifar":
        settings = resnet_cifar.ResnetCifarConfig(3, num_labels=10)
        model = resnet_cifar.ResnetCifarForImageClassification(settings)
        return write_classifier(model, drawn(model), folder, CIFAR)
    if name == "resnet_bottleneck":
        sizes = {"depths": (1, 1), "inner_channels": (8, 8), "channels": (16, 24), "stem_channels": 8}
        settings = resnet_bottleneck.ResnetBottleneckConfig(**sizes, image_size=32, num_labels=10)
        model = resnet_bottleneck.ResnetBottleneckForImageClassification(settings)
        return write_classifier(model, drawn(model), folder, CIFAR)
    if name == "vit":
        return make_classifier(folder)
    return make_encoder(folder, name) if name in ENCODERS else make_model(folder, name, **DECODERS[name][0])


def drawn(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights with which every layer hands on about as much as it is given."""
    return {name: torch.randn(one.shape) / max(one[0].numel(), 4) ** 0.5 for name, one in model.state_dict().items()}


def inputs(config: dict[str, Any]) -> torch.Tensor:
    family = family_of(config)
    if family.takes == "images":
        return torch.randn(2, *family.input_shape(config, 0), generator=torch.Generator().manual_seed(5))
    return torch.arange(24).reshape(2, 12) * 7 % 256


def plan_for(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every second unit of every MLP and the last group of every attention go."""
    widths = family_of(config).widths(config, family_of(config).parts)
    units = {site.key: range(0, width, 2) if site.part == "mlp" else range(width - 1) for site, width in widths.items()}
    return {key: tuple(kept) for key, kept in units.items() if not key.endswith("experts")}


def twin(dense: Path, layer: int, kept: dict[str, tuple[int, ...]]) -> TwinLayer:
    total = int(checkpoint.read_config(dense)["num_hidden_layers"])
    return TwinLayer(dense, NUMERICS, Block(layer, layer + 1, total), kept)


def test_what_is_left_of_a_layer_computes_what_the_pruned_checkpoint_does(dense: Path, tmp_path: Path) -> None:
    config = checkpoint.read_config(dense)
    family, kept, values = family_of(config), plan_for(config), inputs(config)
    surgery.write_pruned(dense, tmp_path / "pruned", surgery.Surgery(family, config, kept))
    total = int(config["num_hidden_layers"])
    expected = BlockModel(tmp_path / "pruned", NUMERICS, family, Block(0, total, total))(values)
    whole = BlockModel(dense, NUMERICS, family, Block(0, total, total))(values)
    left = there = values
    for layer in range(total):
        one = twin(dense, layer, kept)
        left, there = one.run(left, pruned=True)[0], one.run(there)[0]
    torch.testing.assert_close(left, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(there, whole)
    assert not torch.allclose(left, there, rtol=1e-2)


def test_what_a_map_is_added_to_does_not_depend_on_the_map(dense: Path) -> None:
    """The claim that ``joined`` makes for a family, on every part; its opposite shows that the test would see it."""
    config = checkpoint.read_config(dense)
    family, kept, known = family_of(config), plan_for(config), set[str]()
    layer = int(config["num_hidden_layers"]) - 1
    hidden = inputs(config) if not layer else twin(dense, 0, kept).run(inputs(config))[0]
    for middle in range(1, layer):
        hidden = twin(dense, middle, kept).run(hidden)[0]
    for site in (Site.from_key(key) for key in kept if Site.from_key(key).layer == layer):
        one = twin(dense, layer, kept)
        before, name = one.run(hidden, pruned=True, site=site)[1], family.stored(site).output
        shape = one.sizes(site)[0], one.kept_signals(site, before).shape[1]
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        one.repair(site, {f"{name}.weight": family.oriented(weight).contiguous()})
        after = one.run(hidden, pruned=True, site=site)[1]
        assert not torch.allclose(before.joined_TD, after.joined_TD, atol=1e-2)
        if family.modules(site).joined:
            known.add(site.part)
            torch.testing.assert_close(after.beside_TD, before.beside_TD, rtol=1e-4, atol=1e-4)
            assert float(torch.as_tensor(before.beside_TD).abs().max()) > 0.01
        else:
            assert before.beside_TD == 0.0
    convolutional = {"mlp"} if "resnet" in config["model_type"] else {"attention", "mlp"}
    expected = DECODERS.get(config["model_type"], ({}, convolutional))[1]
    assert known == expected


def test_a_removed_layer_hands_the_hidden_state_through(pico: Path) -> None:
    config = checkpoint.read_config(pico)
    kept = {"layer-000.mlp": (), "layer-001.mlp": (0, 3), f"layer-000.{LAYER}": (), f"layer-001.{LAYER}": (0,)}
    values, whole = inputs(config), twin(pico, 0, kept)
    left, there = whole.run(values, pruned=True)[0], whole.run(values)[0]
    model = checkpoint.load_model(pico, NUMERICS)
    torch.testing.assert_close(left, model.model.embed_tokens(values).detach())
    assert not torch.allclose(there, left, rtol=1e-2)
