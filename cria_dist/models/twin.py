"""One layer of a model, run as it is and as it is without some of its units, with one set of weights in memory.

Removed units are columns of zeros in the output map, which computes the same as removing them; a removed layer hands
the hidden state through.

Shapes: T tokens (or places), N signals of a site, D outputs of its output map, S kept signals.
"""

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from cria_dist.models import checkpoint, depth
from cria_dist.models.attention import counting
from cria_dist.models.blocks import Block, BlockModel
from cria_dist.models.family import family_of
from cria_dist.models.mlp import signals_of
from cria_dist.records import Site

Values = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Seen:
    """What a run of the layer showed of a site.

    Attributes:
        values: ``signals`` [T, N] that the output map reads, what it has ``written`` [T, D], and the sum ``joined``
            [T, D] that this ends up in; where it is not added to anything, that is what was written.
    """

    values: Values = field(default_factory=Values)

    @property
    def signals_TN(self) -> torch.Tensor:
        """What the output map reads."""
        return _flat(self.values["signals"])

    @property
    def beside_TD(self) -> torch.Tensor | float:
        """What the output of the map is added to, float32."""
        return self.joined_TD - _flat(self.values["written"]).float() if "joined" in self.values else 0.0

    @property
    def joined_TD(self) -> torch.Tensor:
        """The sum, float32."""
        return _flat(self.values["joined" if "joined" in self.values else "written"]).float()


class TwinLayer:
    """A layer and what is left of it.

    Args:
        directory: checkpoint of the model as it is.
        numerics: how it computes.
        block: the layer.
        kept: units that stay, by site key of the whole model.
    """

    def __init__(
        self, directory: Path, numerics: checkpoint.Numerics, block: Block, kept: Mapping[str, tuple[int, ...]]
    ) -> None:
        config = checkpoint.read_config(directory)
        self.layer = block.first
        self.repaired = set[Site]()
        self._family = family_of(config)
        self._model = BlockModel(directory, numerics, self._family, block)
        self._kept = {Site.from_key(key): units for key, units in depth.within_layers(kept).items()}
        self._kept = {site: units for site, units in self._kept.items() if site.layer == self.layer}
        widths = self._family.widths(config, {site.part for site in self._kept})
        self._units = {site: widths[site] for site in self._kept}
        self._spans = {site: self._family.span(site, config) for site in self._kept}
        self._is_gone = self.layer not in depth.surviving(kept, config)
        self._left = {} if self._is_gone else {site: self._without_units(site) for site in self._kept}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._model.device

    def _output(self, site: Site) -> torch.nn.Linear:
        """The map that reads a site's signals."""
        return cast(torch.nn.Linear, self._model.module(self._family.modules(site).output))

    def sizes(self, site: Site) -> tuple[int, bool]:
        """Outputs of the map that reads a site's signals, and whether it has a bias."""
        parameters = dict(self._output(site).named_parameters())
        return len(self._family.oriented(parameters["weight"])), "bias" in parameters

    def repair(self, site: Site, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give what is left of a site other output weights, those of the kept units, and another bias where given."""
        name, (like, bias) = self._family.stored(site).output, self._there(site)
        weight = self._family.oriented(torch.zeros_like(like))
        kept = torch.from_numpy(signals_of(self._kept[site], self._spans[site])).to(weight.device)
        weight[:, kept] = self._family.oriented(tensors[f"{name}.weight"]).to(weight)
        given = tensors.get(f"{name}.bias")
        self.repaired.add(site)
        self._left[site] = _fixed(self._family.oriented(weight)), bias if given is None else _fixed(given.to(like))

    def kept_signals(self, site: Site, seen: Seen) -> torch.Tensor:
        """Of what the output map read, the part that stays, [T, S]."""
        kept = torch.from_numpy(signals_of(self._kept[site], self._spans[site]))
        return seen.signals_TN.index_select(1, kept.to(seen.signals_TN.device))

    def run(self, values: torch.Tensor, pruned: bool = False, site: Site | None = None) -> tuple[torch.Tensor, Seen]:
        """Run the layer.

        Args:
            values: token ids or pixels for the first layer, hidden states before the layer for the others.
            pruned: without the units that go, repaired as far as :meth:`repair` was called.
            site: what to look at.

        Returns:
            The hidden states behind the layer, and what was seen of the site.
        """
        seen = Seen()
        with ExitStack() as during:
            if pruned:
                during.enter_context(self._as_left())
            if site is not None:
                during.enter_context(self._looking_at(site, seen, pruned))
            return self._model(values), seen

    @contextmanager
    def _as_left(self) -> Generator[None]:
        """Without the units that go, until the block ends."""
        with ExitStack() as during:
            if self._is_gone:
                layer = self._model.module(f"{self._family.layers}.{self.layer}")
                during.enter_context(_hooked(layer.register_forward_hook(_through, with_kwargs=True, prepend=True)))
            for site, (weight, bias) in self._left.items():
                output = self._output(site)
                during.callback(_put, output, *self._there(site))
                _put(output, weight, bias)
                for norm in self._family.modules(site).norms:
                    counted = counting(self._model.module(norm), self._kept[site], self._units[site])
                    during.enter_context(counted)
            yield

    @contextmanager
    def _looking_at(self, site: Site, seen: Seen, pruned: bool) -> Generator[None]:
        """Keep what passes; of the whole layer only the sum counts."""
        modules, values = self._family.modules(site), seen.values
        output = self._model.module(modules.output)
        with ExitStack() as during:
            if pruned:
                during.enter_context(_hooked(output.register_forward_pre_hook(_keep_input(values, "signals"))))
            if pruned or not modules.joined:
                during.enter_context(_hooked(output.register_forward_hook(_keep_output(values, "written"))))
            if modules.joined == f"{self._family.layers}.{self.layer}":
                layer = self._model.module(modules.joined)
                during.enter_context(_hooked(layer.register_forward_hook(_keep_output(values, "joined"))))
            elif modules.joined:
                joined = self._model.module(modules.joined)
                during.enter_context(_hooked(joined.register_forward_pre_hook(_keep_input(values, "joined"))))
            yield

    def _there(self, site: Site) -> tuple[torch.nn.Parameter, torch.nn.Parameter | None]:
        parameters = dict(self._output(site).named_parameters())
        return parameters["weight"], parameters.get("bias")

    def _without_units(self, site: Site) -> tuple[torch.nn.Parameter, torch.nn.Parameter | None]:
        """The output map with zeros for the units that go."""
        (there, bias), units = self._there(site), self._units[site]
        weight = self._family.oriented(there.detach().clone())
        gone = sorted(set(range(units)) - set(self._kept[site]))
        weight[:, torch.from_numpy(signals_of(gone, self._spans[site])).to(weight.device)] = 0
        return _fixed(self._family.oriented(weight)), bias


def _flat(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, values.shape[-1])


def _fixed(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor.contiguous(), requires_grad=False)


def _put(output: torch.nn.Linear, weight: torch.nn.Parameter, bias: torch.nn.Parameter | None) -> None:
    output.weight, output.bias = weight, cast(torch.nn.Parameter, bias)


def _through(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The hidden state as it came, in place of what the layer made of it."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _keep_input(values: Values, name: str) -> Any:
    def hook(_module: object, args: tuple[torch.Tensor, ...]) -> None:
        values[name] = args[0]

    return hook


def _keep_output(values: Values, name: str) -> Any:
    def hook(_module: object, _args: object, output: Any) -> None:
        values[name] = output[0] if isinstance(output, tuple) else output

    return hook


@contextmanager
def _hooked(handle: torch.utils.hooks.RemovableHandle) -> Generator[None]:
    try:
        yield
    finally:
        handle.remove()
