"""Structured pruning of trained networks: neuron graphs, spectra, a plan, a smaller checkpoint."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel

__all__ = ["load_pruned"]


def load_pruned(directory: "str | os.PathLike[str]", **settings: Any) -> "PreTrainedModel":
    """Load a pruned checkpoint as the stock ``transformers`` model it is, whatever the widths of its layers.

    See :func:`cria_dist.models.loading.load_pruned`.
    """
    from cria_dist.models.loading import load_pruned as load  # torch and transformers take seconds to import

    return load(directory, **settings)
