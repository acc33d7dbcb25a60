"""The methods, one paper a file. Adding one is a file, a line here, a row in the contract test."""

from typing import Annotated

from pydantic import Field

from cria_dist.methods.activation import Activation
from cria_dist.methods.base import GradientSample, MethodBase, SiteStatistics, Verdict
from cria_dist.methods.block_influence import BlockInfluence
from cria_dist.methods.conditional import Conditional
from cria_dist.methods.cria import Cria
from cria_dist.methods.eigenvalue import Eigenvalue
from cria_dist.methods.flap import Flap
from cria_dist.methods.magnitude import Magnitude
from cria_dist.methods.mpruner import MPruner
from cria_dist.methods.random import Random
from cria_dist.methods.receding import Receding
from cria_dist.methods.spectrum_preserving import SpectrumPreserving
from cria_dist.methods.taylor import Taylor
from cria_dist.methods.wanda import Wanda

Method = Annotated[
    Conditional
    | Cria
    | Random
    | Magnitude
    | Activation
    | Wanda
    | Flap
    | Taylor
    | Eigenvalue
    | Receding
    | BlockInfluence
    | MPruner
    | SpectrumPreserving,
    Field(discriminator="name"),
]
METHODS: tuple[type[MethodBase], ...] = (
    Conditional,
    Cria,
    Random,
    Magnitude,
    Activation,
    Wanda,
    Flap,
    Taylor,
    Eigenvalue,
    Receding,
    BlockInfluence,
    MPruner,
    SpectrumPreserving,
)

__all__ = [
    "METHODS",
    "Activation",
    "BlockInfluence",
    "Conditional",
    "Cria",
    "Eigenvalue",
    "Flap",
    "GradientSample",
    "MPruner",
    "Magnitude",
    "Method",
    "MethodBase",
    "Random",
    "Receding",
    "SiteStatistics",
    "SpectrumPreserving",
    "Taylor",
    "Verdict",
    "Wanda",
]
