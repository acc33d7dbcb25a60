"""The sizes in a config.json under the names most families share: ``n_embd`` of GPT-2 is a ``hidden_size``.

``transformers`` knows which of a family's own names stand for which (``attribute_map``). In this package a config has
the shared ones; in files it has the family's own.
"""

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING

SHARED = ("hidden_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers")


def shared_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json's content with the shared names; one that has them already stays as it is."""
    shared = {own: name for name, own in _own_names(config).items()}
    return {shared.get(key, key): value for key, value in config.items()}


def own_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`shared_names`."""
    own = _own_names(config)
    return {own.get(key, key): value for key, value in config.items()}


def _own_names(config: Mapping[str, Any]) -> Mapping[str, str]:
    """The family's own names, by the shared ones."""
    model_type = str(config.get("model_type"))
    names = CONFIG_MAPPING[model_type].attribute_map if model_type in CONFIG_MAPPING else {}
    return {name: own for name, own in names.items() if name in SHARED}
