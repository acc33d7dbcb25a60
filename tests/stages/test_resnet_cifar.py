"""A CIFAR ResNet as linear maps of patches: the same function as its convolutions, and a run on its inner channels."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from cria_dist import files, load_pruned
from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint, surgery
from cria_dist.models.checkpoint import Numerics, load_model, read_config
from cria_dist.models.family import family_of
from cria_dist.models.resnet_cifar import convert
from cria_dist.pipeline import Context, prune
from cria_dist.records import Site
from cria_dist.stages.prepare import prepare
from cria_dist.store.recording import MANIFEST, Recording
from cria_dist.store.storage import LocalStorage

WIDTHS = (16, 32, 64)
KEPT = {"layer-000.mlp": (0, 3, 4, 15), "layer-001.mlp": tuple(range(1, 32, 2)), "layer-002.mlp": tuple(range(60))}


class Plain(nn.Module):
    """The common implementation, one block per stage: convolutions, batch norms, option-A shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for stage, (before, width) in enumerate(zip((16, 16, 32), WIDTHS, strict=True), 1):
            block = nn.Module()
            block.conv1 = nn.Conv2d(before, width, 3, 2 if stage > 1 else 1, 1, bias=False)
            block.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            block.bn1, block.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
            setattr(self, f"layer{stage}", nn.ModuleList([block]))
        self.linear = nn.Linear(64, 10)

    def inner(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(block.bn1(block.conv1(x)))

    def forward(self, x: torch.Tensor, seen: list[torch.Tensor] | None = None) -> torch.Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            block = getattr(self, f"layer{stage}")[0]
            inner = self.inner(block, x)
            if seen is not None:
                seen.append(inner)
            if stage > 1:
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))
            x = functional.relu(x + block.bn2(block.conv2(inner)))
        return self.linear(functional.avg_pool2d(x, 8).flatten(1))


@pytest.fixture(scope="module")
def plain() -> Plain:
    torch.manual_seed(3)
    net = Plain().eval()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 2.0)
            elif "bn" in name and tensor.is_floating_point():
                tensor.normal_(0.2, 0.5)
    return net


@pytest.fixture(scope="module")
def model_dir(plain: Plain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_file({f"module.{name}": one for name, one in plain.state_dict().items()}, folder / "plain.safetensors")
    return convert(folder / "plain.safetensors", folder / "resnet")


@pytest.fixture(scope="module")
def pixels_SCHW() -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_maps_of_patches_are_the_convolutions(plain: Plain, model_dir: Path, pixels_SCHW: torch.Tensor) -> None:
    with torch.inference_mode():
        found = load_model(model_dir, Numerics())(pixel_values=pixels_SCHW).logits
        torch.testing.assert_close(found, plain(pixels_SCHW), rtol=1e-4, atol=1e-4)


def test_who_looks_sees_patches_and_changes_nothing(model_dir: Path, pixels_SCHW: torch.Tensor) -> None:
    model, seen = load_model(model_dir, Numerics()), list[torch.Size]()
    with torch.inference_mode():
        expected = model(pixel_values=pixels_SCHW).logits
        for layer in model.resnet.layers:
            layer.conv1.register_forward_hook(lambda _, args, output: seen.append(args[0].shape[1:] + output.shape[2:]))
            layer.conv2.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1:]))
        torch.testing.assert_close(model(pixel_values=pixels_SCHW).logits, expected, rtol=1e-4, atol=1e-4)
    inner, outer = [(1024, 144), (256, 288), (64, 576)], [(1024, 144, 16), (256, 144, 32), (64, 288, 64)]
    assert [tuple(one) for one in seen] == [one for pair in zip(outer, inner, strict=True) for one in pair]


def test_removing_channels_equals_silencing_them(model_dir: Path, pixels_SCHW: torch.Tensor, tmp_path: Path) -> None:
    config, family = read_config(model_dir), family_of(read_config(model_dir))
    operation = surgery.Surgery(family, config, KEPT)
    surgery.write_pruned(model_dir, tmp_path / "pruned", operation)
    masked = load_model(model_dir, Numerics())
    with torch.inference_mode():
        dense = masked(pixel_values=pixels_SCHW).logits.clone()
        in_memory = surgery.pruned_copy(load_model(model_dir, Numerics()), operation)
        for key, kept in KEPT.items():
            layer = masked.resnet.layers[Site.from_key(key).layer]
            removed = sorted(set(range(layer.conv1.out_features)) - set(kept))
            layer.conv2.weight.unflatten(1, (-1, 9))[:, removed] = 0
        expected = masked(pixel_values=pixels_SCHW).logits
        assert (expected - dense).abs().max() > 1e-2
        on_disk = load_pruned(tmp_path / "pruned")
        for found in (in_memory, on_disk):
            torch.testing.assert_close(found(pixel_values=pixels_SCHW).logits, expected, rtol=1e-4, atol=1e-4)
    counts = [sum(one.numel() for one in model.parameters()) for model in (masked, on_disk)]
    costs = {site.key: family.unit_cost(site, config) * width for site, width in family.widths(config).items()}
    left = {key: family.unit_cost(Site.from_key(key), config) * len(kept) for key, kept in KEPT.items()}
    assert counts[0] - counts[1] == sum(costs.values()) - sum(left.values())


@pytest.fixture(scope="module")
def images(plain: Plain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images, labelled by the dense model itself."""
    rows, labels = [], []
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
        with torch.inference_mode():
            image = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(2, 0, 1)
            labels.append(int(plain(image[None]).argmax()))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path = tmp_path_factory.mktemp("images") / "rows.parquet"
    parquet.write_table(pa.table({"image": pa.array(rows, kind), "label": labels}), path)
    return path


@pytest.fixture
def make_config(
    model_dir: Path, images: Path, image_config: Callable[..., Callable[..., RunConfig]]
) -> Callable[..., RunConfig]:
    return image_config(model_dir, images, tokens=240)


def test_what_is_recorded_are_the_patches_between_the_convolutions(
    make_config: Callable[..., RunConfig], make_context: Callable[..., Context], plain: Plain
) -> None:
    context = make_context(make_config(), until="record")
    assert prune(context, until="record") is None
    job = context.job
    seen: list[torch.Tensor] = []
    with torch.inference_mode():
        plain(torch.from_numpy(np.load(job.calibration_path)), seen)
    digest = files.read_json(job.folder / "round-00" / MANIFEST)["digest"]
    recording = Recording(LocalStorage(job.folder / "round-00"), digest)
    for layer, inner_SCHW in enumerate(seen):
        moments, side = recording.moments(Site(layer)), inner_SCHW.shape[2]
        patches_STN = functional.unfold(inner_SCHW, 3, padding=1).transpose(1, 2).double().numpy()
        patches_TN = patches_STN.reshape(-1, 9 * WIDTHS[layer])
        assert moments.count == 12 * side**2
        np.testing.assert_allclose(moments.gram_NN, patches_TN.T @ patches_TN, rtol=1e-3, atol=1e-2)
        paths = sorted((job.folder / "round-00" / "activations" / Site(layer).key).glob("*.parquet"))
        places = pa.concat_tables([parquet.read_table(path, columns=["sequence", "position"]) for path in paths])
        rows, columns = np.divmod(places["position"].to_numpy(), 32)
        here = rows // (32 // side) * side + columns // (32 // side)
        expected_MN = patches_STN[places["sequence"].to_numpy(), here]
        np.testing.assert_allclose(recording.signals(Site(layer))["output"].T, expected_MN, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_run_on_channels(make_config: Callable[..., RunConfig], make_context: Callable[..., Context]) -> None:
    names = ("taylor", "eigenvalue", "cria", "wanda", "flap", "activation", "magnitude")
    small = {"taylor": {"sequences": 8}, "eigenvalue": {"steps": 2}, "cria": {"neighbours": 4}}
    context = make_context(make_config(compare=[{"name": name, **small.get(name, {})} for name in names]))
    report = prune(context)
    assert report is not None
    folder = context.job.folder
    found = {one.label: one for one in report.variants}
    assert list(found) == ["dense", "pruned", "repaired", "recovered"]
    assert found["dense"].accuracy == 1.0
    assert found["repaired"].perplexity < found["pruned"].perplexity
    assert read_config(folder / "pruned")["intermediate_size_per_layer"] == [12, 24, 48]
    loaders = [report.loaders[f"transformers, {name}"] for name in ("pruned", "recovered")]
    assert all("load_pruned, logits equal" in finding for finding in loaders)
    assert len({one.method for one in report.comparison}) == len(names)
    assert found["pruned"].parameters == checkpoint.count_parameters(read_config(folder / "pruned"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "block_influence"}}, r"^block_influence .*'resnet_cifar'.* inner channels; choose"),
        (
            {"prune": {"budget": "macs", "multiple": 1}},
            r"prune\.budget=macs is for transformers; set prune\.budget=par",
        ),
    ],
)
def test_what_does_not_apply_is_said_first(
    changes: dict[str, Any], message: str, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(make_config(**changes))
    assert not (tmp_path / "runs").exists()
