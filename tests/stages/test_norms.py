"""Gates in place of batch norm's scales: held against a net whose batch norms are the paper's bounded ones."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError, NumericError
from cria_dist.methods import Receding
from cria_dist.models.checkpoint import Numerics, load_model, read_config
from cria_dist.models.family import family_of
from cria_dist.models.vgg_cifar import convert
from cria_dist.records import Site
from cria_dist.stages.examples import Examples
from cria_dist.stages.learn import GatedModel, LearnTask
from cria_dist.stages.norms import measured_norms
from cria_dist.stages.prepare import prepare
from cria_dist.stages.recover import Place
from cria_dist.store.gates import Gates

WIDTHS, CLASSES, IMAGES = (6, 5, 8), 5, 40


class Plain(nn.Module):
    """Three convolutions with batch norm and pooling, and the mean over what is left."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width, momentum=None)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(WIDTHS[-1], CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))

    @property
    def norms(self) -> list[nn.BatchNorm2d]:
        return [one for one in self.features if isinstance(one, nn.BatchNorm2d)]


class Bounded(nn.Module):
    """``bound sigmoid(w) x + beta`` in place of ``gamma x + beta``."""

    def __init__(self, norm: nn.BatchNorm2d, bound: float) -> None:
        super().__init__()
        self.norm, self.bound, gamma_N = norm, bound, norm.weight.detach()
        self.w = nn.Parameter(torch.logit((gamma_N.abs() / bound).double()))
        self.sign_N, self.beta_N = gamma_N.sign(), norm.bias.detach().clone()
        with torch.no_grad():
            norm.weight.fill_(1.0)
            norm.bias.fill_(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale_N = self.bound * self.w.sigmoid().float() * self.sign_N
        return scale_N[:, None, None] * self.norm(x) + self.beta_N[:, None, None]


@pytest.fixture(scope="module")
def plain() -> Plain:
    """Its running statistics are those of the data: it was trained on them, as far as batch norm is concerned."""
    torch.manual_seed(5)
    net = Plain()
    with torch.no_grad():
        for norm in net.norms:
            norm.weight.normal_(0.0, 0.7)  # negative ones too
            norm.bias.normal_(0.3, 0.5)
    net.train()(torch.from_numpy(data().inputs))
    return net.eval().requires_grad_(False)


def data() -> Examples:
    random = np.random.default_rng(0)
    pixels = random.normal(size=(IMAGES, 3, 32, 32)).astype(np.float32)
    return Examples(pixels, random.integers(0, CLASSES, IMAGES))


@pytest.fixture(scope="module")
def model_dir(plain: Plain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("net")
    save_file(plain.state_dict(), folder / "plain.safetensors")
    return convert(folder / "plain.safetensors", folder / "net")


@pytest.fixture
def make_task(model_dir: Path, tmp_path: Path) -> Callable[[Receding], LearnTask]:
    examples = data()
    np.save(tmp_path / "pixels.npy", examples.inputs)
    np.save(tmp_path / "labels.npy", examples.labels_S)
    what = model_dir, tmp_path / "pixels.npy", Gates(tmp_path / "gates.npz", "d"), tmp_path / "log"
    return lambda method: LearnTask(*what, method, "highest", 0, tmp_path / "labels.npy")


def maps_of(model_dir: Path) -> dict[Site, str]:
    family, config = family_of(read_config(model_dir)), read_config(model_dir)
    return {site: family.modules(site).inputs["input"] for site in family.widths(config)}


def test_the_norms_that_were_folded_are_found_again(plain: Plain, model_dir: Path) -> None:
    norms = measured_norms(load_model(model_dir, Numerics()), maps_of(model_dir), data())
    largest = max(float(norm.weight.abs().max()) for norm in plain.norms)
    for norm, found in zip(plain.norms, norms.values(), strict=True):
        np.testing.assert_allclose(found.shift_N, norm.bias.numpy(), atol=1e-4)
        np.testing.assert_allclose(found.share_N, norm.weight.abs().numpy() / largest, rtol=2e-3)


def test_one_step_takes_the_gradient_of_the_papers_net(
    plain: Plain, make_task: Callable[[Receding], LearnTask]
) -> None:
    method = Receding(scaling="batch_norm", opening=0.6, strength=0.0)
    gated = GatedModel(make_task(method))
    loss, penalty = gated.step(data(), IMAGES, 1.0, Place())
    bound = max(float(norm.weight.abs().max()) for norm in plain.norms) / method.opening
    theirs = Plain().eval()
    theirs.load_state_dict(plain.state_dict())
    bounded = [Bounded(one, bound) if isinstance(one, nn.BatchNorm2d) else one for one in theirs.features]
    theirs.features = nn.Sequential(*bounded)
    examples = data()
    labels_S = torch.from_numpy(examples.labels_S)
    expected = nn.functional.cross_entropy(theirs(torch.from_numpy(examples.inputs)), labels_S)
    expected.backward()
    assert (loss, penalty) == (pytest.approx(expected.item(), rel=1e-5), 0.0)
    for one, learned_N in zip(
        [one for one in bounded if isinstance(one, Bounded)], gated.learned.values(), strict=True
    ):
        assert one.w.grad.abs().max() > 1e-4
        torch.testing.assert_close(learned_N.grad, one.w.grad, rtol=5e-3, atol=2e-6)
        step_N = method.starts(method.importance(one.w.detach().numpy()) / method.opening)
        step_N -= method.learning_rate * np.sign(one.w.grad.numpy())  # Adam's first
        torch.testing.assert_close(learned_N.detach(), torch.from_numpy(step_N), rtol=0, atol=5e-3)


def test_a_net_that_never_varies_has_no_norms(make_task: Callable[[Receding], LearnTask], model_dir: Path) -> None:
    model = load_model(model_dir, Numerics())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(NumericError, match=r"^the largest scale of batch norm is 0\.0; check the weights"):
        measured_norms(model, maps_of(model_dir), data())


def test_models_without_batch_norm_are_refused(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = run_config(tmp_path, compare=[{"name": "receding", "scaling": "batch_norm"}])
    with pytest.raises(ConfigError, match=r"^receding \(batch_norm\) learns in place .*'llama' has no batch norm; set"):
        prepare(config)
