"""VGG and bottleneck ResNets as linear maps of patches: the same function as their convolutions, in every way cut."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers.utils import logging

from cria_dist import load_pruned
from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint, resnet_bottleneck, surgery, vgg_cifar
from cria_dist.models.blocks import Block, partition
from cria_dist.models.checkpoint import Numerics, load_model, read_config
from cria_dist.models.family import family_of
from cria_dist.models.onnx_file import write_onnx
from cria_dist.models.ranks import Ranks
from cria_dist.models.surgery import Surgery
from cria_dist.records import Site
from cria_dist.stages.observe import SiteObserver
from cria_dist.stages.observed_block import ObservedBlock, Wanted
from cria_dist.stages.sample import TokenSample

WIDTHS = (4, 6, 8, 6, 5, 7, 8, 6, 4, 5, 6, 7, 8)
DEPTHS, INNER, CHANNELS = (2, 1, 1, 2), (4, 5, 6, 7), (12, 16, 20, 24)
CLASSES = 7


class Vgg(nn.Module):
    """VGG-16 with batch norm as the common implementations have it; the last pooling is the classifier's business."""

    def __init__(self, pooled_last: bool = True) -> None:
        super().__init__()
        features: list[nn.Module] = []
        for place, (before, width) in enumerate(zip((3, *WIDTHS), WIDTHS, strict=False)):
            features += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            if place in vgg_cifar.POOLS_16:
                features.append(nn.MaxPool2d(2) if pooled_last or place < 12 else nn.AvgPool2d(2))
        self.features, self.classifier = nn.Sequential(*features), nn.Linear(WIDTHS[-1], CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


class Bottleneck(nn.Module):
    """torchvision's block: the stride is in the 3 x 3 convolution."""

    def __init__(self, before: int, inner: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, after, 1, bias=False), nn.BatchNorm2d(after)
        if stride > 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(functional.relu(self.bn2(self.conv2(out)))))
        return functional.relu(out + (self.downsample(x) if hasattr(self, "downsample") else x))


class ResNet(nn.Module):
    """torchvision's ResNet-50, narrow and shallow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 7, 2, 3, bias=False), nn.BatchNorm2d(6)
        before = 6
        for stage, (depth, inner, after) in enumerate(zip(DEPTHS, INNER, CHANNELS, strict=True)):
            blocks = []
            for place in range(depth):
                blocks.append(Bottleneck(before, inner, after, 2 if stage and not place else 1))
                before = after
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(before, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[Path, Path], Path], int]] = {
    "vgg": (Vgg, vgg_cifar.convert, 32),
    "vgg-averaged": (
        functools.partial(Vgg, pooled_last=False),
        functools.partial(vgg_cifar.convert, pooled_last=False),
        32,
    ),
    "bottleneck": (ResNet, functools.partial(resnet_bottleneck.convert, image_size=64), 64),
}


class Net:
    """A net of the common implementation with random batch norms, and what it was converted to."""

    def __init__(self, name: str, folder: Path) -> None:
        build, convert, side = NETS[name]
        torch.manual_seed(3)
        self.plain = build().eval()
        with torch.no_grad():
            for key, tensor in self.plain.state_dict().items():
                if "running_var" in key:
                    tensor.uniform_(0.5, 2.0)
                elif tensor.is_floating_point():
                    tensor.normal_(0.1, 0.5 if tensor.ndim == 1 else tensor[0].numel() ** -0.5 * 1.5)
        logging.disable_progress_bar()
        save_file(self.plain.state_dict(), folder / "plain.safetensors")
        self.directory = convert(folder / "plain.safetensors", folder / "net")
        self.config = read_config(self.directory)
        self.family = family_of(self.config)
        self.pixels_SCHW = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))

    def kept(self) -> dict[str, tuple[int, ...]]:
        """Of every site but the second all but two or three units, elsewhere than in the site before."""
        found: dict[str, tuple[int, ...]] = {}
        for site, width in self.family.widths(self.config).items():
            gone = {site.layer % width, (site.layer + 2) % width} if site.layer != 1 else set[int]()
            found[site.key] = tuple(sorted({*range(width)} - gone))
        return found

    def logits(self, model: nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return model(pixel_values=self.pixels_SCHW).logits

    def masked(self, kept: dict[str, tuple[int, ...]]) -> nn.Module:
        """The dense model with the columns of removed units zeroed."""
        model = load_model(self.directory, Numerics())
        for key, stay in kept.items():
            site = Site.from_key(key)
            width, span = self.family.widths(self.config)[site], self.family.span(site, self.config)
            weight = model.get_submodule(self.family.modules(site).output).weight
            with torch.no_grad():
                weight.unflatten(1, (width, span))[:, sorted({*range(width)} - {*stay})] = 0
        return model


@pytest.fixture(scope="module", params=NETS)
def net(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Net:
    return Net(request.param, tmp_path_factory.mktemp("net"))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)


def test_maps_of_patches_are_the_convolutions(net: Net) -> None:
    with torch.inference_mode():
        expected = net.plain(net.pixels_SCHW)
    assert expected.std(dim=0).min() > 1e-2
    model = load_model(net.directory, Numerics())
    close(net.logits(model), expected)
    for site in net.family.widths(net.config):  # who looks sees patches, and changes nothing
        model.get_submodule(net.family.modules(site).output).register_forward_pre_hook(lambda *_: None)
    close(net.logits(model), expected)
    assert model.config.num_labels == CLASSES


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("net", ["vgg", "bottleneck"], indirect=True)
def test_onnxruntime_computes_the_same(net: Net, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    surgery.write_pruned(net.directory, tmp_path / "pruned", Surgery(net.family, net.config, net.kept()))
    assert write_onnx(tmp_path / "pruned", tmp_path / "model.onnx") < 1e-5  # it compares three images itself


def test_removing_channels_equals_silencing_them(net: Net, tmp_path: Path) -> None:
    kept = net.kept()
    expected = net.logits(net.masked(kept))
    dense = load_model(net.directory, Numerics())
    assert (expected - net.logits(dense)).abs().max() > 1e-2
    operation = Surgery(net.family, net.config, kept)
    close(net.logits(surgery.pruned_copy(dense, operation)), expected)
    surgery.write_pruned(net.directory, tmp_path / "pruned", operation)
    on_disk = load_pruned(tmp_path / "pruned")
    close(net.logits(on_disk), expected)
    assert read_config(tmp_path / "pruned")["intermediate_size_per_layer"] == [len(one) for one in kept.values()]
    widths = net.family.widths(net.config)
    costs = sum(
        net.family.unit_cost(site, net.config) * (width - len(kept[site.key])) for site, width in widths.items()
    )
    left = sum(parameter.numel() for parameter in on_disk.parameters())
    removed = checkpoint.count_parameters(net.config) - left
    assert removed == costs - net.family.removed_twice(net.config, kept)
    again = Surgery(net.family, read_config(tmp_path / "pruned"), dict.fromkeys(kept, (0, 1)))
    surgery.write_pruned(tmp_path / "pruned", tmp_path / "twice", again)
    twice = {key: stay[:2] for key, stay in kept.items()}
    close(net.logits(load_pruned(tmp_path / "twice")), net.logits(net.masked(twice)))


def test_a_repair_knows_the_units_that_stay_and_the_next_site_takes_its_rows(net: Net, tmp_path: Path) -> None:
    kept, generator = net.kept(), torch.Generator().manual_seed(1)
    expected = net.masked(kept)
    for key, stay in kept.items():
        site = Site.from_key(key)
        output = net.family.modules(site).output
        reader = expected.get_submodule(output)
        columns = reader.weight.unflatten(1, (-1, net.family.span(site, net.config)))
        repaired = 0.5 * torch.randn(columns[:, list(stay)].shape, generator=generator)
        bias_D = torch.randn(len(reader.bias), generator=generator)
        (tmp_path / "repair").mkdir(exist_ok=True)
        tensors = {f"{output}.weight": repaired.flatten(1), f"{output}.bias": bias_D}
        save_file(tensors, tmp_path / "repair" / f"{key}.safetensors")
        with torch.no_grad():
            columns[:, list(stay)] = repaired
            reader.bias.copy_(bias_D)
    surgery.write_pruned(net.directory, tmp_path / "pruned", Surgery(net.family, net.config, kept, tmp_path / "repair"))
    close(net.logits(load_pruned(tmp_path / "pruned")), net.logits(expected))


def observed(net: Net, blocks: tuple[Block, ...]) -> dict[Site, dict[str, torch.Tensor]]:
    """Sampled signals of every site, and its moments, recorded block by block."""
    sequences, found = range(len(net.pixels_SCHW)), {}
    sample = TokenSample(0, len(sequences), net.family.positions(net.config, 0), 24)
    values: torch.Tensor | None = net.pixels_SCHW

    def keep(site: Site, observer: SiteObserver) -> None:
        signals = {name: torch.from_numpy(tiles[0].copy()) for name, tiles in observer.signals().items()}
        found[site] = signals | {"gram": torch.from_numpy(observer.moments()[2].copy())}

    for block in blocks:
        part = ObservedBlock(net.directory, Numerics(), block, Ranks(), Wanted("float32"))
        values = part.run(values, sequences, sample, 2, keep)
    return found


def test_what_is_recorded_is_the_same_in_parts_and_belongs_together(net: Net) -> None:
    """The signal before the activation is that of the same channel and place as the middle tap behind it."""
    layers = len(net.family.widths(net.config))
    whole, parts = observed(net, partition(layers, 1)), observed(net, partition(layers, 3))
    assert whole.keys() == parts.keys() == net.family.widths(net.config).keys()
    for site, signals in whole.items():
        span = net.family.span(site, net.config)
        middle = signals["output"].unflatten(1, (-1, span))[..., span // 2]
        assert middle.abs().max() > 0
        assert torch.equal(signals["input"].unflatten(1, (-1, span))[..., 0].relu(), middle)
        assert all(torch.equal(parts[site][name], signal) for name, signal in signals.items())


def test_the_coupled_tensors_are_those_of_torch_pruning(net: Net) -> None:
    """Its dependency graph finds them by following a traced forward pass; ours are written down."""
    pruning = pytest.importorskip("torch_pruning")
    graph = pruning.DependencyGraph().build_dependency(net.plain, net.pixels_SCHW[:1])
    names = {module: name for name, module in net.plain.named_modules()}
    sources = {ours: theirs for theirs, ours in converted(net).items()}
    for site, width in net.family.widths(net.config).items():
        made = net.plain.get_submodule(sources[net.family.modules(site).inputs["input"]])
        group = graph.get_pruning_group(made, pruning.prune_conv_out_channels, idxs=[width - 1])
        theirs = {
            (names[item.dep.target.module], "out" if "out" in item.dep.handler.__name__ else "in", tuple(item.idxs))
            for item in group
            if isinstance(item.dep.target.module, nn.Conv2d | nn.Linear)
        }
        ours = {
            (sources[name.removesuffix(".weight")], "in" if dim else "out", (width - 1,))
            for name, dim in net.family.coupled_tensors(site, net.config).items()
            if name.endswith(".weight")
        }
        assert theirs == ours


def converted(net: Net) -> dict[str, str]:
    """Our maps by the names of the convolutions and linear maps they are, found by their weights."""
    ours = load_file(net.directory / checkpoint.WEIGHTS)
    found: dict[str, str] = {}
    given = net.plain.state_dict()
    for theirs, module in net.plain.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            directions = functional.normalize(given[f"{theirs}.weight"].flatten(1))
            alike = [
                name
                for name, tensor in ours.items()
                if tensor.ndim == 2
                and tensor.shape == directions.shape
                and (functional.normalize(tensor) * directions).sum(dim=1).abs().min() > 0.999
            ]
            assert len(alike) == 1
            found[theirs] = alike[0].removesuffix(".weight")
    return found


def test_a_state_dict_of_something_else_is_refused(net: Net, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in net.plain.state_dict().items() if "running_mean" not in name}
    save_file(state, tmp_path / "odd.safetensors")
    _, convert, _ = NETS["bottleneck" if isinstance(net.plain, ResNet) else "vgg"]
    with pytest.raises(ConfigError, match=r"has no tensor '.*running_mean', as the common implementation's"):
        convert(tmp_path / "odd.safetensors", tmp_path / "net")
