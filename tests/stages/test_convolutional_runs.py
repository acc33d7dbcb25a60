"""Runs on convolutional nets: zeros in their kernels, channels by every method, what does not apply."""

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
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.utils import logging

from cria_dist import load_pruned
from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.files import write_json
from cria_dist.maths.sampling import convolution_error
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.models.patches import CIFAR
from cria_dist.models.resnet_bottleneck import processor
from cria_dist.models.sparse import read_sparse
from cria_dist.pipeline import Context, prune
from cria_dist.records import PruningPlan, Site
from cria_dist.stages.estimate import estimate
from cria_dist.stages.images import load_processor
from cria_dist.stages.prepare import prepare
from cria_dist.stages.sparsify import map_names, sparse_names
from cria_dist.store.site_scores import read_scores

NETS: dict[str, tuple[dict[str, Any], int]] = {
    "resnet_cifar": ({"num_hidden_layers": 3, "intermediate_size": 8}, 32),
    "vgg_cifar": ({"channels": [8, 8, 12, 8, 8], "pools": [1, 2, 3, 4]}, 32),
    "resnet_bottleneck": (
        {"depths": [1, 2], "inner_channels": [8, 8], "channels": [16, 24], "stem_channels": 8, "image_size": 32},
        32,
    ),
}
SP = {"name": "spectrum_preserving"}


def save_net(name: str, folder: Path) -> Path:
    """A random net that tells images apart, and its image processor."""
    torch.manual_seed(2)
    logging.disable_progress_bar()
    shape, side = NETS[name]
    model = AutoModelForImageClassification.from_config(AutoConfig.for_model(name, num_labels=10, **shape))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=(2 / module.in_features) ** 0.5)
                module.bias.normal_(std=0.2)
    model.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", processor(side) if name == "resnet_bottleneck" else CIFAR)
    return folder


def save_images(path: Path, model_dir: Path) -> None:
    """24 images, labelled by the net itself."""
    rows, seen = [], []
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
        seen.append(load_processor(model_dir)(images=[pixels], return_tensors="np")["pixel_values"][0])
    with torch.inference_mode():
        labels = load_pruned(model_dir)(pixel_values=torch.from_numpy(np.stack(seen))).logits.argmax(dim=1).tolist()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    parquet.write_table(pa.table({"image": pa.array(rows, kind), "label": labels}), path)


@pytest.fixture(scope="module", params=NETS)
def net(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_images(folder / "rows.parquet", save_net(request.param, folder / "model"))
    return folder


@pytest.fixture
def make_config(net: Path, image_config: Callable[..., Callable[..., RunConfig]]) -> Callable[..., RunConfig]:
    return image_config(net / "model", net / "rows.parquet", tokens=96)


def test_zeros_go_into_every_map_between_channels_once(
    net: Path, make_config: Callable[..., RunConfig], make_context: Callable[..., Context]
) -> None:
    context = make_context(make_config(method=SP, prune={"ratio": 0.4, "multiple": 1}), until="apply")
    prune(context, until="apply")
    folder, config = context.job.folder, checkpoint.read_config(net / "model")
    dense, found = (load_file(one / checkpoint.WEIGHTS) for one in (net / "model", folder / "pruned"))
    family, names = family_of(config), sparse_names(net / "model")
    between = {name for site in family.widths(config) for name in family.coupled_tensors(site, config)}
    assert names == {name for name in between if name.endswith(".weight")}
    zeros = {name: round(0.4 * dense[name].numel()) for name in names}
    assert {name: int((found[name] == 0).sum()) for name in names} == zeros
    assert all(found[name].equal(dense[name]) for name in dense.keys() - names)
    plan = PruningPlan.from_json((folder / "pruned" / "plan.json").read_text())
    assert plan.parameters[0] - plan.parameters[1] == sum(zeros.values())
    counted, errors = 0.0, 0.0
    for site, width in family.widths(config).items():
        scores, taps = read_scores(folder / "round-00", site), family.taps(site, config)
        counted += scores.facts["zeros"]
        assert scores.keep_N.shape == (width,)
        assert 0.5 < scores.keep_N.mean() < 1
        assert 0 < scores.facts["spectral_error"] < 1
        assert 0 < scores.facts.get("convolution_error", 0.5) < 1
        errors = max(errors, scores.facts.get("convolution_error", 0.0))
        assert ("convolution_error" in scores.facts) == any(taps[name] == 9 for name in map_names(config, site))
    assert counted == sum(zeros.values()), "a map between two sites is counted at one of them"
    kernels = {name for site in family.widths(config) for name, taps in family.taps(site, config).items() if taps == 9}
    measured = [convolution_error(*(one[name].double().numpy() for one in (dense, found)), 3) for name in kernels]
    assert errors == pytest.approx(max(measured), rel=1e-6)
    expanded = read_sparse(folder / "compressed" / "pruned" / "model.sparse.safetensors")
    assert all(expanded[name].equal(tensor) for name, tensor in found.items())
    assert all(tensor.equal(found[name]) for name, tensor in load_pruned(folder / "pruned").state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "block_influence"}}, r"^block_influence does not prune .*has inner channels; choose"),
        ({"prune": {"budget": "macs", "multiple": 1}}, r"^prune\.budget=macs is for transformers; set prune\.budget"),
    ],
)
def test_what_does_not_apply_is_said_first(
    changes: dict[str, Any], message: str, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(make_config(**changes))
    assert not (tmp_path / "runs").exists()


def test_a_budget_in_parameters_adds_up_only_where_no_map_is_shared(
    make_config: Callable[..., RunConfig], net: Path
) -> None:
    config = make_config(prune={"budget": "parameters", "ratio": 0.1, "multiple": 1})
    if checkpoint.read_config(net / "model")["model_type"] == "resnet_cifar":
        assert prepare(config).final_widths
    else:
        with pytest.raises(ConfigError, match=r"^prune\.budget=parameters adds up .* two sites share a map; set"):
            prepare(config)


@pytest.mark.parametrize("net", ["resnet_bottleneck"], indirect=True)
def test_an_estimate_times_layers_that_are_not_alike(make_config: Callable[..., RunConfig]) -> None:
    found = estimate(make_config(), measured=True)
    assert 0 < found["prunable_parameters"] < found["parameters"]
    assert found["seconds"] >= 0


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("net", ["vgg_cifar", "resnet_bottleneck"], indirect=True)
def test_a_run_on_channels(
    net: Path, make_config: Callable[..., RunConfig], make_context: Callable[..., Context]
) -> None:
    short = {"steps": 2, "batch_sequences": 4}
    compare = [
        {"name": "taylor", "sequences": 8},
        {"name": "cria", "neighbours": 4},
        {"name": "eigenvalue", **short},
        {"name": "receding", "scaling": "batch_norm", **short},
        *({"name": name} for name in ("wanda", "flap", "activation", "magnitude", "random")),
    ]
    context = make_context(make_config(compare=compare, prune={"ratio": 0.25, "multiple": 1, "rounds": 2}))
    report = prune(context)
    assert report is not None
    found = {one.label: one for one in report.variants}
    assert list(found) == ["dense", "pruned", "repaired", "recovered"]
    assert found["dense"].accuracy == 1.0
    assert found["repaired"].perplexity < found["pruned"].perplexity
    assert len({one.method for one in report.comparison}) == len(compare)
    folder = context.job.folder
    pruned = checkpoint.read_config(folder / "pruned")
    widths = family_of(pruned).widths(checkpoint.read_config(net / "model"))
    assert pruned["intermediate_size_per_layer"] == [width * 3 // 4 for width in widths.values()]
    plan = PruningPlan.from_json((folder / "pruned" / "plan.json").read_text())
    assert plan.parameters[1] == checkpoint.count_parameters(pruned) == found["pruned"].parameters
    loaders = [report.loaders[f"transformers, {name}"] for name in ("pruned", "recovered")]
    assert all("load_pruned, logits equal" in finding for finding in loaders)
    assert Site(0) in widths
