"""A trial of a sweep: an ordinary run, and what it has in common with the others."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cria_dist import config_file, files
from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.stages.prepare import run_folder


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep.

    Attributes:
        label: what sets it apart, ``prune.ratio=0.2 method.name=random``.
        command: the command that does the same by itself.
        config: its configuration.
    """

    label: str
    command: str
    config: RunConfig

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return run_folder(self.config)

    @property
    def score_key(self) -> str:
        """Equal for trials whose recordings and scores are the same."""
        parts = self.config.result_part()
        read = {name: value for name, value in parts.items() if name not in ("name", *AFTER_SCORING)}
        return files.digest(read, self.config.prune.parts)


AFTER_SCORING = ("prune", "recover", "evaluate")
"""Sections that recording and scoring do not read, but for what is pruned."""


@dataclass(frozen=True, slots=True)
class Base:
    """What trials have in common, as the file said it when the sweep began.

    A search makes trials hours later and in other processes, which may find the file changed, or none.

    Attributes:
        path: configuration file.
        overrides: those of the command line.
        tree: both as plain data.
    """

    path: str
    overrides: tuple[str, ...]
    tree: Mapping[str, Any]

    def trial(self, own: Sequence[str]) -> Trial:
        """The trial with these overrides beside the common ones.

        Raises:
            ConfigError: it is not a valid run.
        """
        label = " ".join(own)
        try:
            config, _ = config_file.parse_with_sweep(config_file.overridden(self.tree, own))
        except ConfigError as error:
            raise ConfigError(f"trial {label!r}: {error}") from error
        return Trial(label, shlex.join(["cria", "prune", self.path, *self.overrides, *own]), config)
