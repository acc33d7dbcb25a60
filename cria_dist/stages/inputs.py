"""The corpora of a run as arrays, of the kind its model takes, checked to be different for calibration and test."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cria_dist.config import CorpusConfig, RunConfig
from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint
from cria_dist.models.mlp import MlpFamily, ModelDict
from cria_dist.stages.check_takes import check_sentences
from cria_dist.stages.corpus import load_tokens
from cria_dist.stages.examples import check_same_examples, sentence_lengths
from cria_dist.stages.images import staged_pixels
from cria_dist.stages.labels import label_reader
from cria_dist.stages.sentences import encode
from cria_dist.stages.sources import plain_text, read_items, read_labelled
from cria_dist.stages.token_files import Cut, corpora_of, cut_array


@contextmanager
def corpus_cuts(
    folder: Path, model_dir: Path, model_config: ModelDict, family: MlpFamily, config: RunConfig
) -> Generator[Mapping[str, Cut]]:
    """The arrays of a run, by the names of their files; those not written by the end are gone.

    Args:
        folder: run folder, which may still turn out to be another run's.
        model_dir: checkpoint with the tokenizer or image processor.
        model_config: its config.json.
        family: its adapter.
        config: names, counts and cuts the corpora.

    Raises:
        ConfigError: a source or field does not exist, or the corpora overlap more than ``data.max_overlap``.
        DataError: a corpus cannot be read, is too short, or has a label the model does not know.
    """
    data = config.data
    if family.takes == "images":
        shape = family.input_shape(model_config, data.sequence_length)
        read_label = label_reader(model_config) if data.labelled else None
        with staged_pixels(folder, model_dir, data, shape, read_label) as found:
            yield found
    elif family.takes == "sentences":
        yield _sentence_cuts(model_dir, model_config, config)
    else:
        arrays = load_tokens(data, checkpoint.load_tokenizer(model_dir))
        _check_vocabulary(arrays, model_config)
        yield {name: cut_array(tokens_ST) for name, tokens_ST in zip(("calibration", "test"), arrays, strict=True)}


def _check_vocabulary(arrays: Iterable[np.ndarray], model_config: ModelDict) -> None:
    """A tokenizer may know tokens that its model has no embedding for: on a GPU that ends the worker."""
    largest, known = max(int(array.max()) for array in arrays), int(model_config["vocab_size"])
    if largest >= known:
        raise ConfigError(
            f"the tokenizer makes token {largest} and the model knows 0 to {known - 1}; take this model's tokenizer, "
            "or resize its embeddings"
        )


def _sentence_cuts(model_dir: Path, model_config: ModelDict, config: RunConfig) -> dict[str, Cut]:
    data, tokenizer = config.data, checkpoint.load_tokenizer(model_dir)
    counts = {"calibration": data.calibration_sequences, "test": data.test_sequences}
    arrays: dict[str, np.ndarray] = {}
    for name in corpora_of("sentences", data):
        corpus: CorpusConfig = getattr(data, name)
        shape, labels = (counts[name], data.sequence_length), list[int]()
        if data.labelled:
            labelled = read_labelled(corpus, plain_text, label_reader(model_config))
            sentences = (labels.append(label) or text for text, label in labelled)
        else:
            sentences = read_items(corpus, plain_text)
        arrays[name] = encode(sentences, tokenizer, shape, name)
        if data.labelled:  # of a last batch, more are read than are wanted
            arrays[f"{name}-labels"] = np.array(labels[: counts[name]], dtype=np.int64)
    _check_vocabulary((arrays[name] for name in corpora_of("sentences", data)), model_config)
    check_sentences(config, sentence_lengths(arrays["calibration"]))
    if data.labelled:
        check_same_examples(arrays["calibration"], arrays["test"], data.max_overlap)
    return {name: cut_array(array) for name, array in arrays.items()}
