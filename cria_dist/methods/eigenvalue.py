"""Pruning in spectral space (Buffoni et al., arXiv 2108.00940): an eigenvalue per neuron, ranked by its size."""

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from cria_dist.arrays import Array
from cria_dist.maths.gates import elastic_penalty
from cria_dist.methods.gates import GateMethod
from cria_dist.records import Float64


class Eigenvalue(GateMethod):
    """``|lambda_i|`` after training with ``w_ij = lambda_i phi_ij``.

    A layer is the block of an adjacency matrix ``Phi Lambda Phi^-1``, ``w_ij = (lambda_in_j - lambda_out_i) phi_ij``;
    the paper's pruning runs keep one eigenvalue per neuron and no bias, so that 0 removes the neuron exactly. Here
    lambda multiplies the neuron's signal: in a gated MLP, ``act(g) * (lambda phi x) = lambda * (act(g) * phi x)``, this
    is the eigenvalue of the up projection's row, and it is that of the output projection's column too.

    Gauge: ``(lambda, phi)`` and ``(c lambda, phi / c)`` are the same map, so a trained network has no eigenvalues until
    a scale is chosen. Here phi starts as the trained weights and every lambda as 1: what is read is how far training
    moves each neuron's factor. (With rows of norm 1 it would be plain norm pruning, which ``magnitude`` does.)

    ``variant = "gates"`` is the paper's pre-training variant, in which phi is frozen (there random, here trained);
    ``"all"`` its post-training variant, in which phi learns too. The paper's threshold is one percentile over all
    layers, ``prune.allocation = "global"``, which ranks eigenvalues as they are. Its CIFAR-10 runs have an L1 (1e-5 to
    1 per neuron of 512, by cross validation), its MNIST runs none. Its networks are dense ones and a dense head,
    without BatchNorm.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2108.00940"

    name: Literal["eigenvalue"] = "eigenvalue"
    l1: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    """Weight of the mean of ``|lambda|`` over all neurons."""
    l2: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight of the mean of ``lambda^2`` over all neurons."""

    @property
    def title(self) -> str:
        """Name shown in tables."""
        return "eigenvalue" if self.variant == "gates" else "eigenvalue (all)"

    @property
    def start(self) -> float:
        """The gauge."""
        return 1.0

    def gate(self, learned_N: Array) -> Array:
        """Lambda itself."""
        return learned_N

    def penalty(self, learned_N: Array) -> Array:
        """L1 and L2."""
        return elastic_penalty(learned_N, self.l1, self.l2)

    def importance(self, learned_N: Float64) -> Float64:
        """``|lambda|``."""
        return np.abs(learned_N)
