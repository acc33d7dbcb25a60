"""Observe the experts of a layer: how much of each expert's output goes into the hidden state, token by token."""

import torch

from cria_dist.models.experts import output_norms
from cria_dist.stages.observe import SiteObserver


class ExpertsObserver(SiteObserver):
    """Collects one signal per expert: its router weight times the norm of its output, of all tokens."""

    def output_hook(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Hook for the experts, which are given hidden states, the experts of every token and their weights."""
        hidden, index_TK, weight_TK = args
        super().output_hook(module, (output_norms(module, hidden, index_TK, weight_TK),))
