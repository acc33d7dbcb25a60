"""Transformers: where MLP neurons and KV groups are observed, which tensors carry them, what one costs."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from cria_dist.errors import ConfigError
from cria_dist.models import attention, residual
from cria_dist.models.names import shared_names
from cria_dist.models.stacks import ONE_MAP, Stack
from cria_dist.records import Site

ModelDict = Mapping[str, Any]
"""The content of a checkpoint's config.json."""
Takes = Literal["tokens", "sentences", "images"]
"""A stream of text, or the examples of a classifier."""
PART = "mlp"
"""Part of a site whose units are MLP neurons."""
LAYER_WIDTHS = "intermediate_size_per_layer"
"""Key of config.json where the widths of the layers differ; the stock key then has the largest of them."""

ANY_MLP = Site(0, PART)


PER_LAYER = (LAYER_WIDTHS, attention.LAYER_KV_HEADS)


def layers_differ(config: ModelDict) -> bool:
    """Whether layers have widths of their own, which stock classes cannot build."""
    return any(key in config for key in PER_LAYER)


@dataclass(frozen=True, slots=True)
class SiteModules:
    """Module names of one site.

    Attributes:
        inputs: linear maps with rows of the units, by signal name.
        output: linear map with columns of the units; its input is the post-activation signal.
        recorded: inputs whose outputs are the pre-activation signals.
        seen: modules that hand these on within the site's layer, at the places the output map reads, for inputs that do
            not lie there.
        leaves: what is observed is what leaves ``output``, and not what it is given.
        norms: RMSNorms behind inputs, each over all units of the site at once; of those left, when some are gone.
        joined: module that is given the sum of what ``output`` gives and what that is added to; the site's layer where
            the layer hands that sum on; nothing where ``output`` is not added to anything, or not as it is.
    """

    inputs: Mapping[str, str]
    output: str
    recorded: tuple[str, ...]
    seen: Mapping[str, str] = field(default_factory=dict[str, str])
    leaves: bool = False
    norms: tuple[str, ...] = ()
    joined: str = ""

    def seen_at(self, name: str) -> str:
        """The module whose outputs are a pre-activation signal."""
        return self.seen.get(name, self.inputs[name])


@dataclass(frozen=True, slots=True)
class MlpFamily(ABC):
    """Transformers whose units are the neurons of every layer's MLP, and KV groups where they are known.

    Attributes:
        model_type: ``model_type`` of config.json.
    """

    model_type: str

    parts: ClassVar[tuple[str, ...]] = (PART,)
    """Parts of a layer that have units."""

    takes: ClassVar[Takes]
    """What the model reads."""
    layers: ClassVar[str]
    """Module name of the list of layers."""
    embedding: ClassVar[str]
    """Module name of what makes hidden states of the input."""
    attention_maps: ClassVar[tuple[str, ...]]
    """Names within a layer of the maps of queries, keys and values, or of the one they are, and of what reads heads."""
    head_norms: ClassVar[tuple[str, ...]] = ()
    """Names within a layer of RMSNorms over all query heads at once, and over all heads of keys."""
    mlp_maps: ClassVar[tuple[str, ...]]
    """Names within a layer of the maps that make neurons, and of the one that reads them."""
    mlp_signals: ClassVar[tuple[str, ...]] = ("input",)
    """What the maps that make neurons give."""
    width_key: ClassVar[str] = "intermediate_size"
    """Key of config.json with the width of the MLPs."""
    joins: ClassVar[Mapping[str, str]] = {}
    """Names within a layer of :attr:`SiteModules.joined`, by part; nothing for the layer itself."""
    transposed: ClassVar[bool] = False
    """Whether the maps' weights are stored with inputs as rows; see :meth:`oriented`."""

    @abstractmethod
    def has_bias(self, config: ModelDict, part: str = PART) -> bool:
        """Whether the input maps of a part carry biases (of an MLP, the output map too)."""

    @abstractmethod
    def input_shape(self, config: ModelDict, sequence_length: int) -> tuple[int, ...]:
        """Of one calibration input: (tokens,), or (channels, height, width)."""

    @abstractmethod
    def positions(self, config: ModelDict, sequence_length: int) -> int:
        """Hidden states of one calibration input."""

    def modules(self, site: Site) -> SiteModules:
        """Where the site's signals are observed, by names in memory."""
        heads = site.part == attention.PART
        names = self.attention_maps if heads else self.mlp_maps
        *inputs, output = (f"{self.layers}.{site.layer}.{name}" for name in names)
        signals = attention.SIGNALS[len(inputs)] if heads else self.mlp_signals
        norms = tuple(f"{self.layers}.{site.layer}.{name}" for name in self.head_norms if heads)
        recorded = signals[-1:] if heads else signals
        return SiteModules(
            dict(zip(signals, inputs, strict=True)), output, recorded, norms=norms, joined=self.joined(site)
        )

    def joined(self, site: Site) -> str:
        """Where what a site's output map gives is added to the stream; see :class:`SiteModules`."""
        name = self.joins.get(site.part)
        return "" if name is None else f"{self.layers}.{site.layer}.{name}".removesuffix(".")

    def on_disk(self, name: str) -> str:
        """What checkpoints call a module or parameter."""
        return name

    def pieces(self, name: str, shape: Sequence[int]) -> tuple[tuple[str, ...], ...]:
        """The tensors of a checkpoint that make up a parameter of this shape; none where it is one of them."""
        return ()

    def numbered(self, site: Site) -> str | None:
        """What tensors begin with before the number of a unit, where units have tensors of their own in checkpoints."""
        return None

    def obstacle(self, part: str) -> str:
        """Why the units of a part cannot go, where there is more to say than that they are not known."""
        return residual.LAYER_NORM if part == residual.UNIT else ""

    def stored(self, site: Site) -> SiteModules:
        """The site's modules, by names in checkpoints."""
        modules = self.modules(site)
        inputs = {signal: self.on_disk(name) for signal, name in modules.inputs.items()}
        return SiteModules(inputs, self.on_disk(modules.output), modules.recorded, norms=modules.norms)

    def widths(self, config: ModelDict, parts: Collection[str] = (PART,)) -> dict[Site, int]:
        """Units per site of some parts: the MLP neurons of every layer, and its KV groups."""
        config = shared_names(config)  # a loaded model's own has not got them yet
        same = [self.width(config)] * int(config["num_hidden_layers"])
        neurons = {Site(layer): int(width) for layer, width in enumerate(config.get(LAYER_WIDTHS) or same)}
        found = neurons if PART in parts else {}
        found |= attention.attention_sites(config) if attention.PART in parts else {}
        return dict(sorted(found.items()))

    def width(self, config: ModelDict) -> int:
        """Neurons of an MLP, where all layers have as many."""
        return int(config[self.width_key])

    def oriented(self, weight: Any) -> Any:
        """A map's weight with outputs as rows, of one as it is stored, and the other way round.

        Everything that computes with the weights of maps asks here; :meth:`coupled_tensors` speaks of tensors as they
        are stored.
        """
        return weight.T if self.transposed else weight

    def stack(self, site: Site, config: ModelDict) -> Stack:
        """The maps in every tensor of the site's input maps."""
        return ONE_MAP

    def maps_in(self, name: str, site: Site, config: ModelDict) -> Stack:
        """The maps in a coupled tensor, along the dimension of the units."""
        return ONE_MAP if name == f"{self.stored(site).output}.weight" else self.stack(site, config)

    def span(self, site: Site, config: ModelDict) -> int:
        """Inputs of the output map that one unit computes: columns, one after the other."""
        return attention.attention_shape(config).span if site.part == attention.PART else 1

    def taps(self, site: Site, config: ModelDict) -> dict[str, int]:
        """Places of a patch that a site's maps read, by the names of their stored weights; 1 for those not named."""
        return {}

    def rows_at(self, site: Site, config: ModelDict, rows: Any) -> Any:
        """Rows of a site's signals for rows of the positions that tokens are sampled from: the same ones."""
        return rows

    def signals(self, site: Site = ANY_MLP) -> int:
        """Recorded signals of a unit: those before the activation, and the one after it."""
        names = [one for name in self.modules(site).recorded for one in self.signal_names(site, name)]
        return len(names) - names.count(None) + 1

    def signal_names(self, site: Site, name: str) -> tuple[str | None, ...]:
        """What the outputs of a recorded input map are called, one by one of those in it; None for one left out."""
        return (None, None, "value") if name == attention.ALL_THREE else (name,)

    def coupled_tensors(self, site: Site, config: ModelDict) -> dict[str, int]:
        """Tensors of a checkpoint that carry the site's units, with the dimension the units lie along.

        A unit has the same number of consecutive rows (or columns) as every other of its site, in each of the maps that
        the tensor holds.
        """
        modules, rows = self.stored(site), int(self.transposed)
        tensors = {f"{module}.weight": rows for module in modules.inputs.values()}
        if self.has_bias(config, site.part):
            tensors |= {f"{module}.bias": 0 for module in modules.inputs.values()}
        tensors |= {f"{norm}.weight": 0 for norm in modules.norms}
        return {**tensors, f"{modules.output}.weight": 1 - rows}

    def solved(self, site: Site, config: ModelDict) -> tuple[str, ...]:
        """Tensors that the repair replaces by some that read the kept units."""
        return (f"{self.stored(site).output}.weight",)

    def unit_cost(self, site: Site, config: ModelDict) -> int:
        """Parameters that leave the model with one unit: rows of the input maps, their biases, columns."""
        if site.part == attention.PART:
            shape = attention.attention_shape(config)
            normed = (shape.span + shape.head_dim) * bool(self.head_norms)
            return shape.unit_weights + shape.unit_biases * self.has_bias(config, site.part) + normed
        inputs = self.signals(site) - 1
        return (inputs + 1) * int(config["hidden_size"]) + (inputs if self.has_bias(config) else 0)

    def unit_macs(self, site: Site, config: ModelDict, length: int) -> int:
        """Multiplications per position that leave the model with one unit, in a sequence of ``length`` positions."""
        if site.part == attention.PART:
            return attention.attention_shape(config).unit_macs(length)
        return self.signals(site) * int(config["hidden_size"])

    def removed_twice(self, config: ModelDict, kept: Mapping[str, Sized]) -> int:
        """Parameters that leave the model once and are in the costs of units of two sites, where these share a map.

        Args:
            config: config of the dense model.
            kept: surviving units by site key.
        """
        return 0

    def output_bias_cost(self, config: ModelDict, kept: int) -> int:
        """Parameters an MLP gains when the repair gives its output map a bias: the input maps get one of zeros too."""
        return 0 if self.has_bias(config) else int(config["hidden_size"]) + (self.signals() - 1) * kept

    def narrowed(self, config: ModelDict, kept: Mapping[str, int], output_bias: bool) -> dict[str, Any]:
        """The config of the pruned model: the stock one, and widths per layer where they differ.

        Args:
            config: config of the dense model.
            kept: surviving units per site key.
            output_bias: the repair adds a bias to every output map.

        Raises:
            ConfigError: a bias is needed and the architecture has none.
        """
        by_part: dict[str, list[int]] = {}
        for key in sorted(kept):
            by_part.setdefault(Site.from_key(key).part, []).append(kept[key])
        narrow = dict(config)
        if widths := by_part.get(PART):
            narrow.pop(LAYER_WIDTHS, None)
            narrow |= {self.width_key: max(widths)}
            narrow |= self._with_biases() if output_bias and not self.has_bias(config) else {}
            narrow |= {} if len(set(widths)) == 1 else {LAYER_WIDTHS: widths}
        return attention.with_groups(narrow, groups) if (groups := by_part.get(attention.PART)) else narrow

    def rescaled(self, config: ModelDict, pruned: ModelDict) -> dict[str, residual.Rescaling]:
        """Tensors that the stock class takes for other values when sizes of the config change, by their stored names.

        Args:
            config: config of the model operated on.
            pruned: config of the model that is left.
        """
        return {}

    def _with_biases(self) -> dict[str, Any]:
        """What the config of a model without biases has to say for its MLPs, and nothing else, to have them.

        Raises:
            ConfigError: the stock class has no word for it.
        """
        raise ConfigError(
            f"prune.repair=bias needs MLP biases, which this {self.model_type!r} does not have; use "
            "prune.repair=least_squares"
        )


def signals_of(units: Sequence[int], span: int) -> NDArray[np.int64]:
    """The signals of some units, ``span`` consecutive ones of each."""
    return (np.asarray(units, dtype=np.int64)[:, np.newaxis] * span + np.arange(span)).ravel()
