"""Recoveries of convolutional nets: through adapters, with few activations, with a held-out share of any size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageClassification

from cria_dist.config import RecoverConfig
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.models.patches import Patches
from cria_dist.stages import recover, recover_watch
from cria_dist.stages.examples import Examples
from cria_dist.stages.recover import Place, RecoverTask

NETS: dict[str, dict[str, Any]] = {
    "resnet_cifar": {"num_hidden_layers": 3, "intermediate_size": 8},
    "vgg_cifar": {"channels": [8, 8, 12, 8, 8], "pools": [1, 2, 3, 4]},
    "resnet_bottleneck": {
        "depths": [1, 2],
        "inner_channels": [8, 8],
        "channels": [16, 24],
        "stem_channels": 8,
        "image_size": 32,
    },
}


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A random net, with twelve labelled images beside it."""
    shape = NETS[request.param]
    family_of({"model_type": request.param})  # tells transformers of its class
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, num_labels=10, **shape)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "net")
    rng = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", rng.normal(size=(12, 3, 32, 32)).astype(np.float32))
    np.save(tmp_path / "labels.npy", rng.integers(0, 10, 12))
    return tmp_path / "net"


def recovered(net: Path, name: str, **options: Any) -> dict[str, torch.Tensor]:
    config = RecoverConfig(steps=3, batch_sequences=4, workers=1, learning_rate=1e-2, distill=0, **options)
    folder = net.parent
    files = net, folder / "images.npy", folder / name, folder / f"{name}.jsonl"
    task = RecoverTask(*files, config, "highest", 0, labels_path=folder / "labels.npy")
    recover.train(task, Place(), None, lambda step, write: None)
    return load_file(task.target / checkpoint.WEIGHTS)


def test_adapters_learn_the_maps_of_patches(net: Path) -> None:
    before, after = load_file(net / checkpoint.WEIGHTS), recovered(net, "adapted", lora_rank=2)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith(".weight") and before[name].ndim == 2 for name in changed)
    ranks = {int(torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3)) for name in changed}
    assert ranks <= {1, 2}


def test_activations_computed_again_give_the_same_weights(net: Path) -> None:
    kept, few = recovered(net, "kept"), recovered(net, "few", checkpoint_activations=True)
    assert all(torch.allclose(kept[name], few[name], rtol=0, atol=1e-6) for name in kept)


def test_an_adapter_is_what_maps_the_patches() -> None:
    """A module in the place of a linear map is called; the convolution knows nothing of it."""

    class Doubling(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    patches, double = Patches(4, 1), Doubling(9 * 2, 3)
    plain = torch.nn.Linear(9 * 2, 3)
    plain.load_state_dict(double.state_dict())
    grid = torch.randn(2, 16, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(patches.mapped(grid, double), 2 * patches.mapped(grid, plain))


def test_held_out_images_go_through_in_batches(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many together as in training, and the loss is that of all at once."""
    held = Examples(np.load(net.parent / "images.npy"), np.load(net.parent / "labels.npy"))
    model = checkpoint.load_model(net, checkpoint.Numerics())
    sizes = list[int]()
    model.register_forward_hook(lambda _module, _args, found: sizes.append(len(found.logits)))
    apart = recover_watch.held_out_loss(model, held, Place(), 5)
    together = recover_watch.held_out_loss(model, held, Place(), 12)
    assert sizes == [5, 5, 2, 12]
    assert apart == pytest.approx(together, rel=1e-6)
