"""Images as rows of an array: the processor's own pixels, from Parquet files, folders and data sets."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from transformers import ViTImageProcessorPil

from cria_dist.config import CorpusConfig
from cria_dist.errors import ConfigError, CriaError, DataError
from cria_dist.stages import images
from cria_dist.stages.images import decode, load_processor, write_pixels
from cria_dist.stages.sources import read_items

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def save_processor(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 16, "width": 16},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **changes}))
    return folder


def generated(number: int, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def image_rows(contents: list[bytes | None]) -> pa.Table:
    rows = [None if content is None else {"bytes": content, "path": None} for content in contents]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"image": pa.array(rows, kind), "label": list(range(len(rows)))})


def corpus(source: Path, **settings: Any) -> CorpusConfig:
    return CorpusConfig(source=str(source), **{"field": "image", **settings})


def expected(image: Image.Image) -> np.ndarray:
    """Resize, rescale, normalise, written out with Pillow and NumPy alone."""
    small_HWC = np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR), np.float64)
    return ((small_HWC / 255 - MEAN) / STD).transpose(2, 0, 1)


def test_pixels_are_what_the_preprocessor_config_asks_for(tmp_path: Path) -> None:
    pictures = [generated(number, (20 + number, 30)) for number in range(5)]
    parquet.write_table(image_rows([encoded(picture) for picture in pictures]), tmp_path / "rows.parquet")
    processor = load_processor(save_processor(tmp_path / "model"))
    write_pixels(tmp_path / "pixels.npy", corpus(tmp_path / "rows.parquet"), processor, (4, 3, 16, 16), "calibration")
    pixels_SCHW = np.load(tmp_path / "pixels.npy", mmap_mode="r", allow_pickle=False)
    assert (pixels_SCHW.shape, pixels_SCHW.dtype) == ((4, 3, 16, 16), np.float32)
    for row_CHW, picture in zip(pixels_SCHW, pictures, strict=False):
        np.testing.assert_allclose(row_CHW, expected(picture), atol=2e-6)


def test_the_processor_needs_no_torchvision(tmp_path: Path) -> None:
    assert isinstance(load_processor(save_processor(tmp_path)), ViTImageProcessorPil)


def test_a_folder_of_images_and_a_data_set_of_them_are_the_same(tmp_path: Path) -> None:
    pictures = [generated(number) for number in range(6)]
    for number, picture in enumerate(pictures):
        path = tmp_path / "folder" / f"class-{number // 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    (tmp_path / "set").mkdir()
    parquet.write_table(image_rows([encoded(picture) for picture in pictures]), tmp_path / "set" / "train.parquet")
    processor = load_processor(save_processor(tmp_path / "model"))
    for source in ("folder", "set"):
        write_pixels(tmp_path / f"{source}.npy", corpus(tmp_path / source), processor, (6, 3, 16, 16), "calibration")
    assert (tmp_path / "folder.npy").read_bytes() == (tmp_path / "set.npy").read_bytes()
    np.testing.assert_allclose(np.load(tmp_path / "set.npy")[5], expected(pictures[5]), atol=2e-6)


def test_gray_palette_and_transparent_images_become_rgb_and_turned_ones_upright(tmp_path: Path) -> None:
    flat = generated(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was held turned by 90 degrees
    contents = [
        encoded(generated(1, mode="L")), encoded(generated(2, mode="P")), encoded(generated(3, mode="RGBA")), None,
        encoded(flat, "PNG", exif=exif),
    ]  # fmt: skip
    parquet.write_table(image_rows(contents), tmp_path / "rows.parquet")
    found = list(read_items(corpus(tmp_path / "rows.parquet"), decode))
    assert [image_HWC.shape for image_HWC in found] == [(20, 24, 3)] * 3 + [(24, 20, 3)]
    assert (found[0] == np.asarray(generated(1, mode="L").convert("RGB"))).all()
    assert (found[3] == np.rot90(np.asarray(flat), -1)).all()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_halves_of_images_are_disjoint(kind: str, tmp_path: Path) -> None:
    contents = [encoded(generated(number, (32, 32))) for number in range(100)]
    parquet.write_table(image_rows(contents), tmp_path / "train.parquet")
    source = tmp_path / "train.parquet" if kind == "file" else tmp_path
    parts = [
        [image_HWC.tobytes() for image_HWC in read_items(corpus(source, part=part), decode)]
        for part in ("all", "first", "second")
    ]
    assert sorted(parts[1] + parts[2]) == sorted(parts[0])
    assert not set(parts[1]) & set(parts[2])
    assert min(len(parts[1]), len(parts[2])) >= 34, "stretches of 22 images are dealt in turn"


def test_no_more_images_are_decoded_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def counted(value: Any, where: Callable[[], str]) -> Any:
        decoded.append(1)
        return decode(value, where)

    monkeypatch.setattr(images, "decode", counted)
    contents = [encoded(generated(number)) for number in range(50)]
    parquet.write_table(image_rows(contents), tmp_path / "rows.parquet")
    processor = load_processor(save_processor(tmp_path / "model"))
    write_pixels(tmp_path / "pixels.npy", corpus(tmp_path / "rows.parquet"), processor, (7, 3, 16, 16), "test")
    assert len(decoded) == 7


def rows_of_sizes(*sizes: tuple[int, int]) -> pa.Table:
    return image_rows([encoded(generated(number, size)) for number, size in enumerate(sizes)])


REFUSED: dict[str, tuple[pa.Table, dict[str, Any], type[CriaError], str]] = {
    "too few": (
        rows_of_sizes((8, 8), (8, 8)), {}, DataError,
        r"the calibration corpus has 2 images, but 3 were asked for; lower data\.calibration_sequences to 2, or give",
    ),
    "none": (rows_of_sizes(), {}, DataError, r"has 0 images, but 3 were asked for; lower data\..*_sequences, or"),
    "damaged": (
        image_rows([encoded(generated(0)), encoded(generated(1))[:60]]), {}, DataError,
        r"field='image' of .*rows\.parquet row 1 \(from 0\) is not an image Pillow can read \(.*\); correct or delete",
    ),
    "text": (
        pa.table({"image": ["a cat"]}), {}, ConfigError,
        r"row 0 \(from 0\) holds str, not images \(bytes and path\); name a source and field of images",
    ),
    "no such field": (pa.table({"a": [1], "b": [2]}), {}, ConfigError, r"field='image' is not in .*; it has: 'a', 'b'"),
    "unequal sizes": (
        rows_of_sizes((16, 16), (16, 16), (9, 8)), {"do_resize": False}, DataError,
        r"calibration image 2 \(from 0\) becomes \(3, 8, 9\) and the model takes \(3, 16, 16\); set do_resize",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("table", "changes", "error", "complaint"), REFUSED.values(), ids=REFUSED)
def test_refused(
    table: pa.Table, changes: dict[str, Any], error: type[CriaError], complaint: str, tmp_path: Path
) -> None:
    parquet.write_table(table, tmp_path / "rows.parquet")
    processor = load_processor(save_processor(tmp_path / "model", **changes))
    rows, out = corpus(tmp_path / "rows.parquet"), tmp_path / "out" / "pixels.npy"
    with pytest.raises(error, match=complaint) as refusal:
        write_pixels(out, rows, processor, (3, 3, 16, 16), "calibration")
    assert "\n" not in str(refusal.value)
    assert not list((tmp_path / "out").iterdir()), "neither an array nor a part of one"


def test_a_language_model_does_not_take_images(pico: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no preprocessor_config\.json, which says how its model takes images"):
        load_processor(pico)


@pytest.mark.parametrize(
    "content",
    ["{", "{}", '{"feature_extractor_type": "WhisperFeatureExtractor"}', '{"image_processor_type": "Nothing"}'],
)
def test_a_processor_that_is_none_is_explained(content: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json does not name an image processor") as refusal:
        load_processor(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("part", ["first", "second"])
def test_cifar10(part: str, tmp_path: Path) -> None:
    if not (CIFAR10 / "test.parquet").is_file():
        pytest.skip(f"{CIFAR10} is not here")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    size = {"height": 32, "width": 32}
    processor = load_processor(save_processor(tmp_path, size=size, image_mean=mean, image_std=std))
    source = corpus(CIFAR10 / "test.parquet", part=part)
    write_pixels(tmp_path / "pixels.npy", source, processor, (256, 3, 32, 32), "test")
    pixels_SCHW = np.load(tmp_path / "pixels.npy", mmap_mode="r")
    start = 0 if part == "first" else 5000
    column = parquet.read_table(CIFAR10 / "test.parquet", columns=["image"])["image"][start : start + 256].to_pylist()
    raw_SHWC = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in column])
    assert pixels_SCHW.shape == (256, 3, 32, 32)
    np.testing.assert_allclose(pixels_SCHW, ((raw_SHWC / 255 - mean) / std).transpose(0, 3, 1, 2), atol=2e-6)
