"""Learning from hidden states: which of a pruned model belong to which of the dense one, and how far they are apart.

Shapes: S sequences, T tokens, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cria_dist.config import RecoverConfig
from cria_dist.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Hidden:
    """What is compared of the hidden states.

    Attributes:
        weight: of the comparison in the loss.
        pairs: of a state of the student and the one of the teacher that it is to become, both as in
            ``hidden_states``: number 0 enters the first layer, the last one is what the head reads.
    """

    weight: float
    pairs: tuple[tuple[int, int], ...]

    def loss(self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
        """The weighted mean over the pairs."""
        errors = [relative_error(student[mine], teacher[its]) for mine, its in self.pairs]
        return self.weight * torch.stack(errors).mean()


def relative_error(hidden_STD: torch.Tensor, taught_STD: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of ``||hidden - taught||^2 / ||taught||^2``.

    Each token by its own norm: norms grow with depth, and those of a few tokens are hundreds of times the others'
    (Sun et al. 2024, https://arxiv.org/abs/2402.17762), which would else be all that counts.

    *Source:* a squared error of hidden states as in Jiao et al. 2020, https://arxiv.org/abs/1909.10351, equation 8.
    """
    taught_STD = taught_STD.float()
    return ((hidden_STD.float() - taught_STD).square().sum(-1) / taught_STD.square().sum(-1)).mean()


def paired_states(kept: tuple[int, ...] | None, total: int, config: RecoverConfig) -> tuple[tuple[int, int], ...]:
    """Which state of the student is to become which of the teacher's: what a layer leaves, what the next one expects.

    Where the teacher's layers between two of the student's are gone, the first of the two learns to do their work: its
    output is held against what entered the second one.

    Args:
        kept: the teacher's layers that the student has; None where it has all.
        total: layers of the teacher.
        config: says behind which of the teacher's layers to look.

    Raises:
        ConfigError: none of these layers is left.
    """
    kept = tuple(range(total)) if kept is None else kept
    following = (*kept[1:], total)
    wanted = config.distill_layers or kept
    pairs = tuple(
        (number + 1, expected)
        for number, (layer, expected) in enumerate(zip(kept, following, strict=True))
        if layer in wanted
    )
    if not pairs:
        raise ConfigError(f"recover.distill_layers={list(wanted)}: none of them is left; choose among {list(kept)}")
    return pairs
