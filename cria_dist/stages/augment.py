"""Images as they are trained on: shifted and mirrored at random, by draws that no worker count changes.

Shapes: S images, C channels, H and W pixels.
"""

import numpy as np

from cria_dist.config import RecoverConfig
from cria_dist.stages.examples import Data, Examples
from cria_dist.stages.recover_step import Place

STREAM = 1
"""Sets these draws apart from those of the order."""


def augmented(batch: Data, config: RecoverConfig, seed: int, step: int, place: Place) -> Data:
    """A worker's part of a global batch with each image moved and mirrored as the recipe says.

    Args:
        batch: examples ``place.rank :: place.world`` of the step's global batch.
        config: recipe.
        seed: of the run; with the step it gives the draws.
        step: optimiser step, from 0.
        place: this worker.
    """
    if not isinstance(batch, Examples) or not (config.shift_pixels or config.mirror):
        return batch
    draws = np.random.default_rng((seed, step, STREAM))
    most = config.shift_pixels
    shift_S2 = draws.integers(-most, most, (config.batch_sequences, 2), endpoint=True)
    mirrored_S = config.mirror & draws.integers(0, 1, config.batch_sequences, np.bool_, endpoint=True)
    mine = slice(place.rank, None, place.world)
    images = zip(batch.inputs, shift_S2[mine], mirrored_S[mine], strict=True)
    return Examples(np.stack([_moved(*one) for one in images]), batch.labels_S)


def _moved(image_CHW: np.ndarray, shift_2: np.ndarray, mirrored: bool) -> np.ndarray:
    """The image shifted down and to the right, zeros (after normalisation: the mean colour) where nothing is."""
    target, source = zip(*(_overlap(int(by)) for by in shift_2), strict=True)
    moved_CHW = np.zeros_like(image_CHW)
    moved_CHW[:, *target] = image_CHW[:, *source]
    return moved_CHW[..., ::-1] if mirrored else moved_CHW


def _overlap(by: int) -> tuple[slice, slice]:
    """Where the pixels that stay in the image go along one axis, and where they come from."""
    forth, back = slice(max(by, 0), min(by, 0) or None), slice(max(-by, 0), min(-by, 0) or None)
    return forth, back
