"""Images that are shifted and mirrored: every pixel is one of the image or zero, whoever draws."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from cria_dist.config import RecoverConfig, RunConfig
from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.stages import recover
from cria_dist.stages.augment import augmented
from cria_dist.stages.check_recovery import check_recovery
from cria_dist.stages.examples import Examples
from cria_dist.stages.recover import Place, RecoverTask

BATCH = 8


def images(count: int = BATCH, side: int = 6) -> Examples:
    pixels = np.random.default_rng(0).normal(size=(count, 3, side, side)).astype(np.float32)
    return Examples(pixels, np.arange(count))


def recipe(**options: Any) -> RecoverConfig:
    return RecoverConfig(batch_sequences=BATCH, workers=1, **options)


def candidates(image_CHW: np.ndarray, most: int, mirror: bool) -> dict[tuple[int, int, bool], np.ndarray]:
    """All an image may become: windows of the padded image, and their mirror images."""
    side = image_CHW.shape[-1]
    padded = np.pad(image_CHW, ((0, 0), (most, most), (most, most)))
    windows = {
        (down, right, False): padded[:, most - down : most - down + side, most - right : most - right + side]
        for down in range(-most, most + 1)
        for right in range(-most, most + 1)
    }
    flipped = {(down, right, True): one[..., ::-1] for (down, right, _), one in windows.items()}
    return windows | (flipped if mirror else {})


@pytest.mark.parametrize(("most", "mirror"), [(2, True), (2, False), (0, True)])
def test_an_image_becomes_a_window_of_its_padded_self(most: int, mirror: bool) -> None:
    data, seen = images(), set[tuple[int, int, bool]]()
    for step in range(40):
        moved = augmented(data, recipe(shift_pixels=most, mirror=mirror), 0, step, Place())
        assert isinstance(moved, Examples)
        np.testing.assert_array_equal(moved.labels_S, data.labels_S)
        for before, after in zip(data.inputs, moved.inputs, strict=True):
            found = [move for move, one in candidates(before, most, mirror).items() if np.array_equal(one, after)]
            assert len(found) == 1
            seen |= set(found)
    assert seen == set(candidates(data.inputs[0], most, mirror))  # 320 draws of at most 50


def test_workers_draw_what_one_draws() -> None:
    data, config = images(), recipe(shift_pixels=2, mirror=True)
    whole = augmented(data, config, 5, 3, Place())
    halves = [augmented(data[rank::2], config, 5, 3, Place(rank, 2)) for rank in range(2)]
    assert isinstance(whole, Examples)
    for rank, half in enumerate(halves):
        assert isinstance(half, Examples)
        np.testing.assert_array_equal(half.inputs, whole.inputs[rank::2])
        np.testing.assert_array_equal(half.labels_S, whole.labels_S[rank::2])
    again, other = (augmented(data, config, 5, step, Place()) for step in (3, 4))
    assert isinstance(again, Examples)
    assert isinstance(other, Examples)
    np.testing.assert_array_equal(again.inputs, whole.inputs)
    assert not np.array_equal(other.inputs, whole.inputs)


def test_it_is_off_unless_asked_for() -> None:
    data = images()
    assert augmented(data, recipe(), 0, 0, Place()) is data
    assert not {"shift_pixels", "mirror"} & recipe().content_part().keys()
    assert recipe(mirror=True).content_part()["mirror"] is True


def test_a_recovery_trains_on_what_was_moved(pico_vit: Path, tmp_path: Path) -> None:
    data = images(side=16)
    np.save(tmp_path / "images.npy", data.inputs)
    np.save(tmp_path / "labels.npy", data.labels_S)
    weights = []
    for name, options in {"as they are": {}, "moved": {"shift_pixels": 3}}.items():
        config = recipe(steps=1, distill=0, **options)
        files = pico_vit, tmp_path / "images.npy", tmp_path / name, tmp_path / f"{name}.jsonl"
        task = RecoverTask(*files, config, "highest", 0, labels_path=tmp_path / "labels.npy")
        recover.train(task, Place(), None, lambda step, write: None)
        weights.append(load_file(task.target / checkpoint.WEIGHTS))
    assert any(not np.array_equal(one, weights[1][name]) for name, one in weights[0].items())


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("pico", {"shift_pixels": 4}, r"recover\.shift_pixels=4 is for images, and model_type 'llama' takes tokens"),
        ("pico", {"mirror": True}, r"recover\.mirror=True is for images"),
        (
            "pico_vit",
            {"shift_pixels": 16},
            r"recover\.shift_pixels=16 can move all of an image of 16 pixels out of sig",
        ),
    ],
)
def test_refused(
    model: str,
    options: dict[str, Any],
    message: str,
    run_config: Callable[..., RunConfig],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    model_config = checkpoint.read_config(request.getfixturevalue(model))
    with pytest.raises(ConfigError, match=message):
        check_recovery(run_config(tmp_path, recover={"steps": 2, **options}), family_of(model_config), model_config)
