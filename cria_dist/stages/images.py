"""Images become rows of one array, prepared as the checkpoint asks: recorders shard over it as over token sequences.

Shape suffixes: S images, C channels, H and W pixels.
"""

import io
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cria_dist.config import CorpusConfig, DataConfig
from cria_dist.errors import ConfigError, DataError
from cria_dist.files import file_digest, write_with
from cria_dist.stages.sources import Where, read_items
from cria_dist.stages.token_files import Cut

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

Pixels = NDArray[np.float32]


def load_processor(model_dir: Path) -> "BaseImageProcessor":
    """The checkpoint's image processor, on Pillow and NumPy: torchvision would give other pixels, and is not needed.

    Raises:
        ConfigError: there is none, or it is not for images.
    """
    from transformers import AutoImageProcessor

    if not (model_dir / "preprocessor_config.json").is_file():
        raise ConfigError(
            f"{model_dir} has no preprocessor_config.json, which says how its model takes images; put the file beside "
            "the weights"
        )
    try:
        return AutoImageProcessor.from_pretrained(model_dir, backend="pil", local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{model_dir / 'preprocessor_config.json'} does not name an image processor that works here ({reason}); "
            "take a whole copy of the model"
        ) from error


def write_pixels(
    path: Path, corpus: CorpusConfig, processor: "BaseImageProcessor", shape: tuple[int, ...], what: str
) -> None:
    """Write the first images of a corpus as a float32 ``.npy``; one image is in memory at a time.

    Args:
        path: file to write, whole or not at all.
        corpus: a Parquet file, data set or folder of images; ``field`` holds them in the ``datasets`` Image format.
        processor: see :func:`load_processor`.
        shape: of the array, [S, C, H, W]: number of images (reads no further) and what the model takes.
        what: ``calibration`` or ``test``, for messages.

    Raises:
        ConfigError: the field does not hold images.
        DataError: too few images, one that cannot be decoded, or one that the processor makes another shape of.
    """
    write_with(path, lambda temporary: _fill(temporary, _prepared(corpus, processor), shape, what))


@contextmanager
def staged_pixels(folder: Path, model_dir: Path, data: DataConfig, shape: tuple[int, ...]) -> Generator[Cut]:
    """The calibration images, prepared in a hidden folder; they are gone afterwards unless they were written.

    Args:
        folder: run folder, which may still turn out to be another run's.
        model_dir: checkpoint with the image processor.
        data: names and counts the images.
        shape: channels, height and width that the model takes.

    Raises:
        ConfigError: there is no image processor, or the field does not hold images.
        DataError: see :func:`write_pixels`.
    """
    staging = folder / ".images"
    shape = (data.calibration_sequences, *shape)
    try:
        write_pixels(staging / "calibration.npy", data.calibration, load_processor(model_dir), shape, "calibration")
        yield Cut(file_digest(staging / "calibration.npy"), (staging / "calibration.npy").replace)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def decode(value: Any, where: Where) -> NDArray[np.uint8] | None:
    """RGB values [H, W, 3] of an encoded image, turned upright; None when the field is null.

    Raises:
        ConfigError: the field holds something else.
        DataError: the image is damaged.
    """
    from PIL import Image, ImageOps

    if value is None:
        return None
    if not isinstance(value, dict) or not {"bytes", "path"} <= value.keys():
        kind = type(value).__name__
        raise ConfigError(f"{where()} holds {kind}, not images (bytes and path); name a source and field of images")
    try:
        with Image.open(io.BytesIO(_encoded(value))) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where()} is not an image Pillow can read ({error}); correct or delete the row") from error


def _encoded(value: dict[str, Any]) -> bytes:
    if value["bytes"] is not None:
        return value["bytes"]
    import fsspec  # what datasets reads paths with, also inside archives and on the hub

    with fsspec.open(value["path"], "rb") as handle:
        return handle.read()  # pyright: ignore[reportAttributeAccessIssue]  fsspec types one file as a list of them


def _prepared(corpus: CorpusConfig, processor: "BaseImageProcessor") -> Iterator[Pixels]:
    for image_HWC in read_items(corpus, decode):
        batch = processor(images=[image_HWC], input_data_format="channels_last", return_tensors="np")
        yield batch["pixel_values"][0]


def _fill(path: Path, prepared: Iterator[Pixels], shape: tuple[int, ...], what: str) -> None:
    images, there = shape[0], 0
    pixels_SCHW = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for there, image_CHW in enumerate(prepared, 1):
        if image_CHW.shape != shape[1:]:
            raise DataError(
                f"{what} image {there - 1} (from 0) becomes {image_CHW.shape} and the model takes {shape[1:]}; set "
                "do_resize and size in preprocessor_config.json, or give images of this size"
            )
        pixels_SCHW[there - 1] = image_CHW
        if there == images:
            pixels_SCHW.flush()
            return
    raise DataError(
        f"the {what} corpus has {there} images, but {images} were asked for; lower data.{what}_sequences"
        f"{f' to {there}' if there else ''}, or give more images"
    )
