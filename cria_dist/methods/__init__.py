"""The methods, one paper a file. Adding one is a file, a line here, a row in the contract test."""

from typing import Annotated

from pydantic import Field

from cria_dist.methods.base import MethodBase, SiteStatistics, Verdict
from cria_dist.methods.cria import Cria
from cria_dist.methods.magnitude import Magnitude
from cria_dist.methods.random import Random

Method = Annotated[Cria | Random | Magnitude, Field(discriminator="name")]
METHODS: tuple[type[MethodBase], ...] = (Cria, Random, Magnitude)

__all__ = ["METHODS", "Cria", "Magnitude", "Method", "MethodBase", "Random", "SiteStatistics", "Verdict"]
