"""What a recovery needs beside its settings, checked before anything is computed."""

from importlib.util import find_spec

from cria_dist.config import RecoverConfig, RunConfig
from cria_dist.errors import ConfigError
from cria_dist.models.mlp import MlpFamily, ModelDict


def check_recovery(config: RunConfig, family: MlpFamily, model_config: ModelDict) -> None:
    """Options of a recovery that want something of the model, of each other, or of the machine.

    Raises:
        ConfigError: names what is missing, or what does not go together.
    """
    if config.recover.steps:
        _check_patience(config, family)
        _check_language_options(config.recover, family, model_config)
        _check_augmentation(config.recover, family, model_config)
        _check_adapters(config)
        _check_teacher(config, family)


def _check_patience(config: RunConfig, family: MlpFamily) -> None:
    """Stopping early holds sequences out; one must be left to train on."""
    data, recover = config.data, config.recover
    there = data.calibration_sequences
    if family.takes == "tokens":
        there = there * data.sequence_length // recover.sequence_length
    if recover.patience and there < 2:
        raise ConfigError(
            f"recover.patience={recover.patience} holds training sequences out, and the calibration corpus makes "
            f"{there} of recover.sequence_length={recover.sequence_length}; set recover.patience=0, or take more text"
        )


def _check_language_options(recover: RecoverConfig, family: MlpFamily, model_config: ModelDict) -> None:
    """Hidden states are compared token by token, and of layers that are there."""
    if family.takes != "tokens" and recover.distill_hidden:
        raise ConfigError(
            f"recover.distill_hidden={recover.distill_hidden:g} is for language models; set recover.distill_hidden=0"
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


def _check_teacher(config: RunConfig, family: MlpFamily) -> None:
    """Where the dense model lies: there must be one to learn from, and such a place."""
    recover = config.recover
    if recover.teacher == "cpu" and not recover.distills:
        raise ConfigError(
            "recover.teacher='cpu' places the dense model, and nothing is learned from it; raise recover.distill or "
            "set recover.teacher='beside'"
        )
    if recover.teacher_gpus and (reason := _no_gpus_for_a_teacher(config, family)):
        raise ConfigError(f"recover.teacher_gpus={recover.teacher_gpus}, and {reason}")


def _no_gpus_for_a_teacher(config: RunConfig, family: MlpFamily) -> str:
    """Why the dense model gets no GPUs, or not so many, and what to do."""
    recover = config.recover
    reasons = {
        "nothing is learned from the dense model; raise recover.distill or set it to 0": not recover.distills,
        "recover.teacher='cpu' is another place for the dense model; set one of them only": recover.teacher == "cpu",
        "recover.strategy='fsdp2' shares the dense model out over the workers; set it to 0": recover.strategy
        == "fsdp2",
        "run.pool='local' trains in this process, on one GPU; set it to 0": config.run.pool == "local",
        "run.gpus_per_worker=0 gives training workers none; set it to 0": config.run.gpus_per_worker == 0,
        "a classifier fits one GPU; set it to 1": recover.teacher_gpus > 1 and family.takes != "tokens",
    }
    return next((reason for reason, holds in reasons.items() if holds), "")
