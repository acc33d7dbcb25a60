"""What a recovery needs beside its settings, checked before anything is computed."""

from importlib.util import find_spec

from cria_dist.config import RecoverConfig, RunConfig
from cria_dist.errors import ConfigError
from cria_dist.models.experts import PART
from cria_dist.models.mlp import MlpFamily, ModelDict


def check_recovery(config: RunConfig, family: MlpFamily, model_config: ModelDict) -> None:
    """Options of a recovery that want something of the model, of each other, or of the machine.

    Raises:
        ConfigError: names what is missing, or what does not go together.
    """
    if config.recover.steps:
        _check_language_options(config.recover, family, model_config)
        _check_augmentation(config.recover, family, model_config)
        _check_adapters(config)


def _check_language_options(recover: RecoverConfig, family: MlpFamily, model_config: ModelDict) -> None:
    """Classifiers are small, and their examples differ in length: workers would not gather equally often."""
    if family.takes != "tokens" and recover.strategy == "fsdp2":
        raise ConfigError("recover.strategy='fsdp2' is for language models; set recover.strategy='ddp'")
    if PART in family.parts and recover.strategy == "fsdp2":
        raise ConfigError(
            "recover.strategy='fsdp2' takes tensors as they are stored, and those of experts are stored one by one; "
            "set recover.strategy='ddp'"
        )
    if family.takes != "tokens" and recover.distill_hidden:
        raise ConfigError(
            f"recover.distill_hidden={recover.distill_hidden:g} is for language models; set recover.distill_hidden=0"
        )
    if recover.strategy == "fsdp2" and recover.lora_rank:
        raise ConfigError(
            f"recover.lora_rank={recover.lora_rank} does not go with recover.strategy='fsdp2', which shares out whole "
            "layers; set recover.lora_rank=0"
        )
    beyond = [layer for layer in recover.distill_layers if layer >= int(model_config.get("num_hidden_layers", 0))]
    if recover.distill_hidden and beyond:
        raise ConfigError(
            f"recover.distill_layers names layer {beyond[0]} and the model has {model_config['num_hidden_layers']}, "
            "counted from 0; leave it out"
        )


def _check_augmentation(recover: RecoverConfig, family: MlpFamily, model_config: ModelDict) -> None:
    """Only images can be moved, and something of them must stay in sight."""
    asked = [f"recover.{name}={value}" for name in ("shift_pixels", "mirror") if (value := getattr(recover, name))]
    if asked and family.takes != "images":
        raise ConfigError(
            f"{asked[0]} is for images, and model_type {family.model_type!r} takes {family.takes}; leave it out"
        )
    if asked and recover.shift_pixels >= (side := min(family.input_shape(model_config, 0)[1:])):
        raise ConfigError(
            f"recover.shift_pixels={recover.shift_pixels} can move all of an image of {side} pixels out of sight; take "
            "4 for images of 32 pixels"
        )


def _check_adapters(config: RunConfig) -> None:
    """They need peft, and would fill the zeros of a sparse model."""
    recover = config.recover
    if not recover.lora_rank:
        return
    if config.method.unit == "weight":
        raise ConfigError(
            f"recover.lora_rank={recover.lora_rank} adds a dense matrix to every map, and {config.method.title} makes "
            "weights zero; set recover.lora_rank=0"
        )
    if find_spec("peft") is None:
        raise ConfigError(
            f"recover.lora_rank={recover.lora_rank} needs peft, which is not installed; pip install 'cria-dist[lora]'"
        )
