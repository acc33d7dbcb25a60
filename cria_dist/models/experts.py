"""Mixtures of experts: a unit is a whole expert with its row of the router. All layers keep equally many.

In memory the experts of a layer are three-dimensional tensors; in checkpoints every map of every expert has its own.
Shapes: T tokens, E experts, K experts of a token, R tokens of one expert.
"""

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cria_dist.errors import ConfigError
from cria_dist.models import attention, residual
from cria_dist.models.decoders import GatedMlpFamily
from cria_dist.models.mlp import PART as MLP
from cria_dist.models.mlp import MlpFamily, ModelDict, SiteModules
from cria_dist.records import Site

PART = "experts"
"""Part of a site whose units are experts."""
MAPS = ("gate_up_proj", "down_proj")
"""Names in memory of what the experts of a layer compute with."""
COUNTS = ("num_experts", "num_local_experts")
"""Keys of config.json with their number: either one."""
PLAIN_LAYERS, EVERY = "mlp_only_layers", "decoder_sparse_step"
"""Keys of config.json with the layers that have none, and of how many of the others every last one has."""


@dataclass(frozen=True, slots=True)
class ExpertsFamily(GatedMlpFamily):
    """Decoders whose tokens go through a few experts of many, each a gated MLP.

    Attributes:
        block: what checkpoints call the MLP of a layer.
        maps: what they call an expert's maps: gate, up, down.
        expert_width: key of config.json with the width of an expert.
    """

    block: str = "mlp"
    maps: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    expert_width: str = "moe_intermediate_size"

    parts = (attention.PART, PART)

    def modules(self, site: Site) -> SiteModules:
        """Where the site's signals are observed."""
        if site.part != PART:
            return GatedMlpFamily.modules(self, site)  # slots: super() knows another class
        prefix = f"{self.layers}.{site.layer}.mlp"
        return SiteModules({"router": f"{prefix}.gate"}, f"{prefix}.experts", ())

    def on_disk(self, name: str) -> str:
        """What checkpoints call a module or parameter."""
        return name.replace(".mlp.", f".{self.block}.")

    def numbered(self, site: Site) -> str | None:
        """The experts' tensors begin so, before the number of the expert."""
        return f"{self.stored(site).output}." if site.part == PART else None

    def pieces(self, name: str, shape: Sequence[int]) -> tuple[tuple[str, ...], ...]:
        """The tensors of a checkpoint that make up one in memory: those of an expert one below the other, stacked."""
        place, _, leaf = name.rpartition(".")
        if not place.endswith(".experts"):
            return ()
        gate, up, down = self.maps
        names = (gate, up) if leaf == "gate_up_proj" else (down,)
        prefix = self.on_disk(place)
        return tuple(tuple(f"{prefix}.{expert}.{one}.weight" for one in names) for expert in range(shape[0]))

    def widths(self, config: ModelDict, parts: Collection[str] = (MLP,)) -> dict[Site, int]:
        """Units per site of some parts: experts where a layer has them; neurons of no layer."""
        found = GatedMlpFamily.widths(self, config, [part for part in parts if part not in (MLP, PART)])
        layers = range(int(config["num_hidden_layers"])) if PART in parts else ()
        found |= {Site(layer, PART): experts_of(config) for layer in layers if has_experts(config, layer)}
        return dict(sorted(found.items()))

    def coupled_tensors(self, site: Site, config: ModelDict) -> dict[str, int]:
        """Of experts, by their names in memory, and the router's."""
        if site.part != PART:
            return GatedMlpFamily.coupled_tensors(self, site, config)
        modules = self.stored(site)
        names = (f"{modules.inputs['router']}.weight", *(f"{modules.output}.{leaf}" for leaf in MAPS))
        return dict.fromkeys(names, 0)

    def stream_maps(self, site: Site, config: ModelDict) -> tuple[list[str], list[str]]:
        """Where a layer has experts, the router and every expert's gate and up read, their downs write."""
        if not _reads_by_experts(site, config):
            return GatedMlpFamily.stream_maps(self, site, config)
        router, *experts = (
            self.on_disk(f"{self.layers}.{site.layer}.mlp.{name}")
            for name in ("gate", *(f"experts.{expert}." for expert in range(experts_of(config))))
        )
        *reads, writes = self.maps
        return [router, *(expert + name for expert in experts for name in reads)], [one + writes for one in experts]

    def stream_weights(self, site: Site, config: ModelDict, met: bool) -> int:
        """Of the router and all experts, or those that a token goes through."""
        if not _reads_by_experts(site, config):
            return GatedMlpFamily.stream_weights(self, site, config, met)
        experts = experts_of(config)
        return experts + 3 * int(config[self.expert_width]) * (per_token(config) if met else experts)

    def unit_cost(self, site: Site, config: ModelDict) -> int:
        """Of an expert, its three maps and its row of the router."""
        if site.part != PART:
            return GatedMlpFamily.unit_cost(self, site, config)
        return (3 * int(config[self.expert_width]) + 1) * int(config["hidden_size"])

    def narrowed(self, config: ModelDict, kept: Mapping[str, int], output_bias: bool) -> dict[str, Any]:
        """The config of the pruned model.

        Raises:
            ConfigError: layers would have different numbers of experts, or fewer than a token goes through.
        """
        in_layers = {units for key, units in kept.items() if Site.from_key(key).part == PART}
        counts = in_layers - {0}  # whole layers that go
        narrow = GatedMlpFamily.narrowed(self, config, kept, output_bias)
        if not counts:
            return narrow
        fewest, needed = min(counts), per_token(config)
        if fewest < needed or len(counts) > 1:
            raise ConfigError(
                f"{' and '.join(map(str, sorted(counts)))} experts would be left in a layer, every token goes through "
                f"{needed}, and all layers have the same number; lower prune.ratio, with prune.allocation=uniform"
            )
        return {**narrow, **{key: fewest for key in COUNTS if key in config}}


def experts_of(config: ModelDict) -> int:
    """Experts of a layer that has any."""
    return next(int(config[key]) for key in COUNTS if key in config)


def per_token(config: ModelDict) -> int:
    """Experts that a token goes through."""
    return int(config["num_experts_per_tok"])


def has_experts(config: ModelDict, layer: int) -> bool:
    """Whether a layer has experts; some families have plain MLPs in between."""
    plain = layer in (config.get(PLAIN_LAYERS) or ())
    return not plain and (layer + 1) % int(config.get(EVERY) or 1) == 0


def _reads_by_experts(site: Site, config: ModelDict) -> bool:
    return site.part == residual.READ[1] and has_experts(config, site.layer)


def weights_met(family: MlpFamily, config: ModelDict) -> dict[int, int]:
    """By layer, the weights that a token meets there: the router's, and those of the experts it goes through."""
    if PART not in family.parts:
        return {}
    row, times = int(config["hidden_size"]), per_token(config)
    sites = family.widths(config, (PART,))
    return {site.layer: units * row + times * (family.unit_cost(site, config) - row) for site, units in sites.items()}


def assembled(pieces: Sequence[Sequence[str]], read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The tensor in memory that a checkpoint's tensors make up."""
    return torch.stack([torch.cat([read(name) for name in names]) for names in pieces])


def taken_apart(pieces: Sequence[Sequence[str]], tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inverse of :func:`assembled`."""
    return {
        name: part
        for names, expert in zip(pieces, tensor, strict=True)
        for name, part in zip(names, expert.chunk(len(names)), strict=True)
    }


@contextmanager
def routed_among(router: Any, kept: Sequence[int]) -> Generator[None]:
    """Have a router choose among some of the experts only, until the block ends."""
    whole, kept_S = router.weight, torch.tensor(kept, device=router.weight.device)
    router.weight = torch.nn.Parameter(whole.detach()[kept_S], requires_grad=False)
    hook = router.register_forward_hook(lambda *args: (*args[2][:2], kept_S[args[2][2]]))
    try:
        yield
    finally:
        hook.remove()
        router.weight = whole


def output_norms(
    experts: Any, hidden_TD: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    """Router weight times the norm of what an expert gives for a token, [T, E]; zero where a token does not go.

    The experts are computed again for it: the module adds up what they give.
    """
    found_TE = torch.zeros(len(hidden_TD), experts.num_experts, device=hidden_TD.device)
    for expert in range(experts.num_experts):
        token_R, place_R = (index_TK == expert).nonzero(as_tuple=True)
        gate_RN, up_RN = torch.nn.functional.linear(hidden_TD[token_R], experts.gate_up_proj[expert]).chunk(2, dim=-1)
        given_RD = torch.nn.functional.linear(experts.act_fn(gate_RN) * up_RN, experts.down_proj[expert])
        found_TE[token_R, expert] = weight_TK[token_R, place_R].float() * given_RD.float().norm(dim=1)
    return found_TE
