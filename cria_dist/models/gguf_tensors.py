"""The tensors of a GGUF file: which of a checkpoint's each is made of, and how."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from cria_dist.errors import ConfigError
from cria_dist.models.gguf_layout import Layout
from cria_dist.models.shapes import Stored

EXPERT = re.compile(r"(?<=\.experts\.)(\d+)\.")
"""The number of an expert in the name of a tensor; in GGUF those of a layer are one tensor."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A tensor of a GGUF file.

    Attributes:
        called: its name there.
        sources: the tensors of the checkpoint it is made of: one, or one per expert.
        stacked: whether they lie one behind the other.
        operation: what is done with each.
        like: shape and data type.
    """

    called: str
    sources: Sequence[str]
    stacked: bool
    operation: Callable[[torch.Tensor], torch.Tensor]
    like: Stored

    def made(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Its values."""
        parts = [self.operation(read(name)) for name in self.sources]
        return torch.stack(parts) if self.stacked else parts[0]


def outgoing(layout: Layout, stored: Mapping[str, Stored]) -> list[Outgoing]:
    """The tensors of the file, in the checkpoint's order.

    Raises:
        ConfigError: the architecture does not have one of them.
    """
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == layout.architecture)
    known = gguf.get_tensor_name_map(architecture, layout.config.num_hidden_layers)
    sources: dict[str, list[str]] = {}
    for name in sorted(stored, key=_number):
        if not name.endswith(layout.rules.dropped):
            sources.setdefault(EXPERT.sub("", name), []).append(name)
    found: list[Outgoing] = []
    for name, parts in sources.items():
        called, first = known.get_name(name, try_suffixes=(".weight", ".bias")), stored[parts[0]]
        if called is None:
            raise ConfigError(f"tensor {name} has no place in llama.cpp's architecture {layout.architecture!r}")
        stacked, operation = name not in stored, layout.operation(name)
        shape = tuple(operation(torch.empty(first.shape, device="meta")).shape)
        like = Stored((len(parts), *shape) if stacked else shape, first.dtype)
        found.append(Outgoing(called, parts, stacked, operation, like))
    return found


def _number(name: str) -> tuple[str, int]:
    """Sorts names, experts by their numbers."""
    expert = EXPERT.search(name)
    return EXPERT.sub("", name), int(expert[1]) if expert else 0
