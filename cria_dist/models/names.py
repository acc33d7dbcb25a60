"""The sizes in a config.json under the names most families share: ``n_embd`` of GPT-2 is a ``hidden_size``.

``transformers`` knows which of a family's own names stand for which (``attribute_map``). In this package a config has
the shared ones; in files it has the family's own.
"""

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from cria_dist.errors import ConfigError

SHARED = ("hidden_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers")


def shared_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json's content with the shared names; one that has them already stays as it is."""
    shared = {own: name for name, own in _own_names(config).items()}
    return {shared.get(key, key): value for key, value in config.items()}


def own_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`shared_names`."""
    own = _own_names(config)
    return {own.get(key, key): value for key, value in config.items()}


def rotation_of_old(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding under the keys of before ``transformers`` 5, for programs that look for these.

    vLLM 0.16 over ``transformers`` 4 takes the family's default for a ``rope_theta`` that only ``rope_parameters`` has:
    SmolLM2 came out with log probabilities 1.7 away. Where layers rotate differently there are no such keys.
    """
    said: dict[str, Any] = dict(config.get("rope_parameters") or {})
    older = {key: said.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in said}
    if "rope_theta" not in older:
        return {}
    return older if said.get("rope_type", "default") == "default" else {**older, "rope_scaling": said}


def parsed(config: Mapping[str, Any]) -> PretrainedConfig:
    """A config.json's content as ``transformers`` understands it.

    Raises:
        ConfigError: a value is of another type than the architecture's.
        ValueError: ``transformers`` does not know the architecture.
    """
    try:
        return AutoConfig.for_model(**config)
    except StrictDataclassError as error:
        raise damaged(" ".join(str(error).split())) from error


def damaged(reason: str) -> ConfigError:
    """The error for a config.json that cannot be what was saved, where its folder is not known."""
    return ConfigError(f"the model's config.json is damaged ({reason}); take a whole copy of the model")


def _own_names(config: Mapping[str, Any]) -> Mapping[str, str]:
    """The family's own names, by the shared ones."""
    model_type = str(config.get("model_type"))
    names = CONFIG_MAPPING[model_type].attribute_map if model_type in CONFIG_MAPPING else {}
    return {name: own for name, own in names.items() if name in SHARED}
