"""Labels of a classifier's examples: read from a corpus, checked against what the model can say."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from cria_dist.errors import ConfigError, DataError
from cria_dist.models.mlp import ModelDict
from cria_dist.stages.sources import Where

ReadLabel = Callable[[Any, Where], int]
"""Makes a class number of a field's value."""


def class_names(config: ModelDict) -> tuple[str, ...]:
    """Names of the classes, in the order of the model's logits.

    Raises:
        ConfigError: the model does not choose one of several classes.
    """
    names: Mapping[str, str] | None = config.get("id2label")
    if names is None:  # what transformers leaves out is its default
        names = {str(number): f"LABEL_{number}" for number in range(int(config.get("num_labels", 2)))}
    problem = config.get("problem_type") or "single_label_classification"
    if len(names) < 2 or problem != "single_label_classification":
        raise ConfigError(
            f"the model has {len(names)} labels and problem_type={problem!r}; accuracy and recovery are for models "
            "that choose one of several classes: give such a classifier"
        )
    return tuple(names[key] for key in sorted(names, key=int))


def label_reader(config: ModelDict) -> ReadLabel:
    """Reads numbers and names of classes.

    Raises:
        ConfigError: the model does not choose one of several classes.
    """
    names = class_names(config)
    numbers = {name: number for number, name in enumerate(names)}

    def read(value: Any, where: Where) -> int:
        number = numbers.get(value, value) if isinstance(value, str) else value
        if isinstance(number, str) and re.fullmatch(r"-?[0-9]+", number.strip()):
            number = int(number)
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(names):
            return number
        few = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise DataError(
            f"{where()} is {value!r}, and the model has {len(names)} labels, 0 to {len(names) - 1} ({few}); name the "
            "field with the labels of this model, or correct the row"
        )

    return read
