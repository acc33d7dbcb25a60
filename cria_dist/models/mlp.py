"""MLPs of transformers: where their neurons are observed, which tensors carry them, what one costs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from cria_dist.records import Site

ModelDict = Mapping[str, Any]
"""The content of a checkpoint's config.json."""
Takes = Literal["tokens", "images"]
LAYER_WIDTHS = "intermediate_size_per_layer"
"""Key of config.json where the widths of the layers differ; ``intermediate_size`` then is the largest of them."""


@dataclass(frozen=True, slots=True)
class SiteModules:
    """Module names of one site.

    Attributes:
        inputs: linear maps whose outputs are the pre-activation signals, by signal name.
        output: linear map whose input is the post-activation signal.
    """

    inputs: Mapping[str, str]
    output: str


@dataclass(frozen=True, slots=True)
class MlpFamily(ABC):
    """Transformers whose units are the neurons of every layer's MLP.

    Attributes:
        model_type: ``model_type`` of config.json.
    """

    model_type: str

    takes: ClassVar[Takes]
    """What the model reads."""
    layers: ClassVar[str]
    """Module name of the list of layers."""
    embedding: ClassVar[str]
    """Module name of what makes hidden states of the input."""

    @abstractmethod
    def modules(self, site: Site) -> SiteModules:
        """Where the site's signals are observed, by names in memory."""

    @abstractmethod
    def has_bias(self, config: ModelDict) -> bool:
        """Whether the MLP's maps carry biases."""

    @abstractmethod
    def input_shape(self, config: ModelDict, sequence_length: int) -> tuple[int, ...]:
        """Of one calibration input: (tokens,), or (channels, height, width)."""

    @abstractmethod
    def positions(self, config: ModelDict, sequence_length: int) -> int:
        """Hidden states of one calibration input."""

    def on_disk(self, name: str) -> str:
        """What checkpoints call a module or parameter."""
        return name

    def stored(self, site: Site) -> SiteModules:
        """The site's modules, by names in checkpoints."""
        modules = self.modules(site)
        inputs = {signal: self.on_disk(name) for signal, name in modules.inputs.items()}
        return SiteModules(inputs, self.on_disk(modules.output))

    def widths(self, config: ModelDict) -> dict[Site, int]:
        """Units per site: the MLP neurons of every layer."""
        same = [config["intermediate_size"]] * int(config["num_hidden_layers"])
        return {Site(layer): int(width) for layer, width in enumerate(config.get(LAYER_WIDTHS) or same)}

    def signals(self) -> int:
        """Recorded signals of a unit: those before the activation, and the one after it."""
        return len(self.modules(Site(0)).inputs) + 1

    def coupled_tensors(self, site: Site, config: ModelDict) -> dict[str, int]:
        """Tensors of a checkpoint that carry the site's units, with the dimension the units lie along."""
        modules = self.stored(site)
        tensors = {f"{module}.weight": 0 for module in modules.inputs.values()}
        if self.has_bias(config):
            tensors |= {f"{module}.bias": 0 for module in modules.inputs.values()}
        return {**tensors, f"{modules.output}.weight": 1}

    def unit_cost(self, config: ModelDict) -> int:
        """Parameters that leave the model with one unit: a row per input map, one column, and the rows' biases."""
        inputs = self.signals() - 1
        return (inputs + 1) * int(config["hidden_size"]) + (inputs if self.has_bias(config) else 0)

    def unit_macs(self, config: ModelDict) -> int:
        """Multiplications per position that leave the model with one unit: a row per input map and one column."""
        return self.signals() * int(config["hidden_size"])

    def output_bias_cost(self, config: ModelDict, kept: int) -> int:
        """Parameters a site gains when the repair gives its output map a bias: the input maps get one of zeros too."""
        return 0 if self.has_bias(config) else int(config["hidden_size"]) + (self.signals() - 1) * kept

    def narrowed(self, config: ModelDict, kept: Mapping[str, int], output_bias: bool) -> dict[str, Any]:
        """The config of the pruned model: the stock one, and the width per layer where they differ.

        Args:
            config: config of the dense model.
            kept: surviving units per site key.
            output_bias: the repair adds a bias to every output map.

        Raises:
            ConfigError: a bias is needed and the architecture has none.
        """
        widths = [kept[key] for key in sorted(kept)]
        narrow = {key: value for key, value in config.items() if key != LAYER_WIDTHS}
        narrow |= {"intermediate_size": max(widths), **(self._with_biases() if output_bias else {})}
        return narrow if len(set(widths)) == 1 else {**narrow, LAYER_WIDTHS: widths}

    @abstractmethod
    def _with_biases(self) -> dict[str, Any]:
        """What the config says of MLPs with biases."""
