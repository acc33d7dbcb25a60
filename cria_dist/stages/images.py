"""Images become rows of one array, prepared as the checkpoint asks: recorders shard over it as over token sequences.

Shape suffixes: S images, C channels, H and W pixels.
"""

import io
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cria_dist.config import CorpusConfig, DataConfig
from cria_dist.errors import ConfigError, DataError
from cria_dist.files import file_digest, write_with
from cria_dist.stages.examples import check_same_examples
from cria_dist.stages.labels import ReadLabel
from cria_dist.stages.sentences import too_few
from cria_dist.stages.sources import Where, read_items, read_labelled
from cria_dist.stages.token_files import Cut, cut_array

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
    path: Path,
    corpus: CorpusConfig,
    processor: "BaseImageProcessor",
    shape: tuple[int, ...],
    what: str,
    read_label: ReadLabel | None = None,
) -> list[int]:
    """Write the first images of a corpus as a float32 ``.npy``; one image is in memory at a time.

    Args:
        path: file to write, whole or not at all.
        corpus: a Parquet file, data set or folder of images; ``field`` holds them in the ``datasets`` Image format.
        processor: see :func:`load_processor`.
        shape: of the array, [S, C, H, W]: number of images (reads no further) and what the model takes.
        what: ``calibration`` or ``test``, for messages.
        read_label: see :mod:`cria_dist.stages.labels`; without, the images have no labels.

    Returns:
        The labels.

    Raises:
        ConfigError: the field does not hold images.
        DataError: too few images, one that cannot be decoded, one that the processor makes another shape of, or one
            without a label that the model knows.
    """
    labels: list[int] = []
    prepared = _prepared(corpus, processor, read_label, labels)
    write_with(path, lambda temporary: _fill(temporary, prepared, shape, what))
    return labels


@contextmanager
def staged_pixels(
    folder: Path, model_dir: Path, data: DataConfig, shape: tuple[int, ...], read_label: ReadLabel | None
) -> Generator[Mapping[str, Cut]]:
    """The images of a run, prepared in a hidden folder; they are gone afterwards unless they were written.

    Args:
        folder: run folder, which may still turn out to be another run's.
        model_dir: checkpoint with the image processor.
        data: names and counts the images.
        shape: channels, height and width that the model takes.
        read_label: see :mod:`cria_dist.stages.labels`; without, there are calibration images alone.

    Raises:
        ConfigError: there is no image processor, the field does not hold images, or test images are among those of the
            calibration.
        DataError: see :func:`write_pixels`.
    """
    staging, processor = folder / ".images", load_processor(model_dir)
    cuts: dict[str, Cut] = {}
    counts = {"calibration": data.calibration_sequences, "test": data.test_sequences}
    try:
        for name in ("calibration",) if read_label is None else ("calibration", "test"):
            path, corpus = staging / f"{name}.npy", getattr(data, name)
            labels = write_pixels(path, corpus, processor, (counts[name], *shape), name, read_label)
            cuts[name] = Cut(file_digest(path), path.replace)
            if read_label is not None:
                cuts[f"{name}-labels"] = cut_array(np.array(labels, dtype=np.int64))
        if read_label is not None:
            calibration, test = (np.load(staging / f"{name}.npy", mmap_mode="r") for name in counts)
            check_same_examples(calibration, test, data.max_overlap)
        yield cuts
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


def _prepared(
    corpus: CorpusConfig, processor: "BaseImageProcessor", read_label: ReadLabel | None, labels: list[int]
) -> Iterator[Pixels]:
    """The images as the model takes them; their labels are put into the list as they are read."""
    if read_label is None:
        images = read_items(corpus, decode)
    else:
        images = _taking_labels(read_labelled(corpus, decode, read_label), labels)
    for image_HWC in images:
        batch = processor(images=[image_HWC], input_data_format="channels_last", return_tensors="np")
        yield batch["pixel_values"][0]


def _taking_labels(labelled: Iterator[tuple[NDArray[np.uint8], int]], labels: list[int]) -> Iterator[NDArray[np.uint8]]:
    for image_HWC, label in labelled:
        labels.append(label)
        yield image_HWC


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
    raise too_few(what, there, images, "images")
