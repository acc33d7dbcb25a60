"""Loading what a run wrote, also where stock ``from_pretrained`` does not: layers of different widths."""

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cria_dist.models import checkpoint, location


def load_pruned(directory: str | os.PathLike[str], **settings: Any) -> PreTrainedModel:
    """Load a pruned checkpoint as the stock ``transformers`` model it is, whatever the widths of its layers.

    Args:
        directory: the checkpoint.
        settings: handed to ``from_pretrained`` (``dtype``, ``device_map``); remote code stays off.

    Returns:
        An instance of the stock class, in evaluation mode; ``save_pretrained`` writes what this function loads again.

    Raises:
        ConfigError: the directory is no checkpoint, or of a family that is not known.
    """
    return checkpoint.from_pretrained(location.locate(str(Path(directory)), None), **settings)
