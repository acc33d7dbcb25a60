"""Rules between what a model takes (text, sentences, images) and what a run gives it, and does with it."""

import logging

import numpy as np

from cria_dist.config import CorpusConfig, RunConfig
from cria_dist.errors import ConfigError
from cria_dist.methods.gates import GateMethod
from cria_dist.methods.layers import LayerMethod
from cria_dist.models.channels import ConvFamily
from cria_dist.models.encoders import EncoderMlpFamily
from cria_dist.models.mlp import MlpFamily, ModelDict, Takes
from cria_dist.records import Stage
from cria_dist.stages.labels import class_names
from cria_dist.stages.sample import SentenceSample
from cria_dist.stages.token_files import corpora_of

log = logging.getLogger(__name__)

LEARNED_POSITIONS = ("gpt2", "opt")
"""Decoders with a vector for every position, and none for those beyond."""
FORMATS: dict[Takes, tuple[str, ...]] = {"tokens": ("text", "chat"), "sentences": ("text",), "images": ("images",)}


def check_takes(config: RunConfig, family: MlpFamily, model_config: ModelDict, until: Stage) -> None:
    """Corpora must be of what the model takes, with labels where a stage up to the last one needs them.

    Raises:
        ConfigError: they are not.
    """
    data = config.data
    for name in corpora_of(family.takes, data):
        _check_format(name, getattr(data, name), family)
    for method in (config.method, *config.compare):
        if isinstance(method, GateMethod) and method.scales_norms and not isinstance(family, ConvFamily):
            raise ConfigError(
                f"{method.title} learns in place of batch norm's scales, and model_type {family.model_type!r} has no "
                "batch norm; set scaling of the method to signals"
            )
    if family.takes != "tokens":
        _check_classifier(config, family, model_config, until)
    else:
        _check_positions(config, family.model_type, model_config, until)


def _check_positions(config: RunConfig, model_type: str, model_config: ModelDict, until: Stage) -> None:
    """Sequences must not be longer than the model knows; where it computes on beyond that, a word of warning."""
    data, recover, evaluate = config.data, config.recover, config.evaluate
    lengths = {"data.sequence_length": data.sequence_length}
    if until in ("recover", "evaluate") and recover.steps:
        lengths["recover.sequence_length"] = min(
            recover.sequence_length, data.sequence_length * data.calibration_sequences
        )
    if until == "evaluate" and evaluate.prompts:
        lengths["evaluate.new_tokens"] = evaluate.new_tokens
    longest = int(model_config.get("max_position_embeddings") or max(lengths.values()))
    for key, length in lengths.items():
        if length > longest:
            found = f"{key}={length} is more than the {longest} positions the model has (max_position_embeddings)"
            if model_type in LEARNED_POSITIONS:
                raise ConfigError(f"{found}; lower it")
            log.warning("%s: it computes on, but what it was not trained on is no measure of it", found)


def _check_format(name: str, corpus: CorpusConfig, family: MlpFamily) -> None:
    formats = FORMATS[family.takes]
    if corpus.format not in formats:
        remedy = " or ".join(formats)
        remedy += ", and source and field to theirs" if family.takes == "images" else ""
        raise ConfigError(
            f"model_type {family.model_type!r} takes {family.takes}, but data.{name}.format={corpus.format}; "
            f"set it to {remedy}, or give another model"
        )
    if family.takes == "tokens" and corpus.label is not None:
        raise ConfigError(
            f"data.{name}.label={corpus.label!r} is for classifiers, and model_type {family.model_type!r} is a "
            "language model here; leave it out"
        )


def _check_classifier(config: RunConfig, family: MlpFamily, model_config: ModelDict, until: Stage) -> None:
    data, what = config.data, f"model_type {family.model_type!r}"
    if isinstance(family, ConvFamily):
        _check_channels(config, family, model_config)
    if data.labelled:
        class_names(model_config)  # or the model does not choose between classes
    else:
        _check_without_labels(config, what, until)
    if isinstance(family, EncoderMlpFamily) and data.sequence_length > (longest := family.longest(model_config)):
        raise ConfigError(f"data.sequence_length={data.sequence_length} is more than the model's {longest}; lower it")


def _check_channels(config: RunConfig, family: ConvFamily, model_config: ModelDict) -> None:
    methods, what = (config.method, *config.compare), f"model_type {family.model_type!r}"
    for method in methods:
        if method.unit == "layer":
            raise ConfigError(
                f"{method.title} does not prune {what}, which has inner channels; choose a method of neurons"
            )
    chained = any(one.chained for one in family.sites(model_config))
    if chained and config.prune.budget == "parameters" and any(method.unit == "mlp" for method in methods):
        raise ConfigError(
            f"prune.budget=parameters adds up what the units of every site cost, and in {what} two sites share a map; "
            "set prune.budget=units"
        )


def _check_without_labels(config: RunConfig, what: str, until: Stage) -> None:
    data = config.data
    missing = next(name for name in ("calibration", "test") if getattr(data, name).label is None)
    if data.calibration.label is not None or data.test.label is not None:
        raise ConfigError(
            f"data.{missing}.label is missing; calibration and test examples both need labels, or neither"
        )
    remedy = "set data.calibration.label and data.test.label"
    by_gradients = [one.title for one in (config.method, *config.compare) if one.needs & {"gradients", "gates"}]
    if by_gradients:
        raise ConfigError(
            f"{by_gradients[0]} takes gradients of the loss and {what} is a classifier, whose loss needs labels; "
            f"{remedy}, or choose a method without gradients"
        )
    if until in ("recover", "evaluate"):
        raise ConfigError(
            f"{what} is a classifier, and recover and evaluate (hence prune) need labels; {remedy}, or use cria "
            "record, analyse, decide or apply"
        )


def check_sentences(config: RunConfig, lengths_S: np.ndarray) -> None:
    """There must be as many tokens as are to be sampled, of every sentence as many as a method measures.

    Args:
        config: the run.
        lengths_S: tokens of every calibration sentence; of each, the first is never sampled.

    Raises:
        ConfigError: there are not.
    """
    wanted, available = config.record.tokens, int((lengths_S - 1).sum())
    if wanted > available:
        raise ConfigError(
            f"record.tokens={wanted} is more than the {available} tokens of {len(lengths_S)} calibration sentences "
            "without their first; lower it or raise data.calibration_sequences"
        )
    sample = SentenceSample(config.seed, lengths_S, wanted)
    fewest = min(len(sample.positions(sentence)) for sentence in range(len(lengths_S)))
    for method in (config.method, *config.compare):
        if isinstance(method, LayerMethod) and fewest < method.fewest_tokens:
            raise ConfigError(
                f"{method.title} needs {method.fewest_tokens} sampled tokens of every calibration sentence, and a "
                f"short one gives {fewest}; raise record.tokens (there are {available}), or choose a method that "
                "removes neurons"
            )
