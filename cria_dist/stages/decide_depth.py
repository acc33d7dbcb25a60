"""Decide on whole layers: a budget becomes a number of layers, and the layers that stay become a plan."""

from collections.abc import Callable, Collection, Mapping, Sequence

from cria_dist.config import RunConfig
from cria_dist.errors import PlanError
from cria_dist.models import depth
from cria_dist.models.macs import macs_of_layers, macs_per_position
from cria_dist.models.mlp import MlpFamily, ModelDict
from cria_dist.models.sizes import sizes_of
from cria_dist.records import PruningPlan, Site


def layer_budget(
    config: RunConfig, family: MlpFamily, model_config: ModelDict, dense_parameters: int
) -> tuple[Sequence[int], float]:
    """What every layer holds of what ``prune.budget`` measures, and how much of it must go.

    Raises:
        PlanError: it is more than all layers but the largest hold, which may be the one that stays.
    """
    ratio, budget, layers = config.prune.ratio, config.prune.budget, int(model_config["num_hidden_layers"])
    sizes, total = [1] * layers, layers
    if budget == "parameters":
        sizes, total = list(sizes_of(model_config, family).layers), dense_parameters
    elif budget == "macs":
        length = family.positions(model_config, config.data.sequence_length)
        sizes = macs_of_layers(model_config, family, length)
        total = macs_per_position(model_config, family, length)
    wanted, most = ratio * total - 1e-9 * min(sizes), sum(sizes) - max(sizes)
    if wanted > most:
        share = f"the {layers} layers" if budget == "units" else f"all {total:,} {budget}"
        raise PlanError(
            f"prune.ratio={ratio:g} of {share} is more than all layers but the largest hold ({most / total:.3f}), and "
            "one must stay; lower prune.ratio"
        )
    return sizes, wanted


def layers_to_remove(config: RunConfig, family: MlpFamily, model_config: ModelDict, dense_parameters: int) -> int:
    """The layers that go if they are the largest: at least so many, whatever a method thinks of them.

    Raises:
        PlanError: no layer might be left.
    """
    sizes, wanted = layer_budget(config, family, model_config, dense_parameters)
    largest = sorted(range(len(sizes)), key=lambda layer: sizes[layer], reverse=True)
    return len(fewest_layers(lambda count: tuple(largest[:count]), sizes, wanted))


def fewest_layers(removed: Callable[[int], tuple[int, ...]], sizes: Sequence[int], wanted: float) -> tuple[int, ...]:
    """The least that a method removes to make up what is wanted; where nothing does, all that it would spare.

    Args:
        removed: the layers that go if so many may.
        sizes: what every layer holds.
        wanted: how much must go; none of it, and no layer does.
    """
    gone: tuple[int, ...] = ()
    for count in range(1, len(sizes)):
        if sum(sizes[layer] for layer in gone) >= wanted:
            break
        gone = removed(count)
    return gone


def removed_after_round(count: int, rounds: int, index: int) -> int:
    """Layers gone after round ``index`` (0-based) of ``rounds`` about equal steps; the last one reaches ``count``."""
    return count * (index + 1) // rounds


def layers_of(plan: PruningPlan | None, total: int) -> tuple[int, ...]:
    """Layers of the model a plan left, in the numbering of the dense model with ``total`` layers."""
    if plan is None:
        return tuple(range(total))
    return tuple(sorted(Site.from_key(key).layer for key, units in plan.kept.items() if units))


def depth_plan(kept: Collection[int], parameters: Sequence[int], dense: int, method: str, digest: str) -> PruningPlan:
    """Account for the layers that leave the model and write it all down.

    Args:
        kept: layers that stay, in the numbering of the dense model.
        parameters: of every layer of the dense model.
        dense: parameters of the dense model.
        method: title of the method.
        digest: digest of everything the decision was made from.
    """
    removed = sum(size for layer, size in enumerate(parameters) if layer not in kept)
    keys = {layer: Site(layer, depth.PART).key for layer in range(len(parameters))}
    return PruningPlan(
        kept={key: (0,) if layer in kept else () for layer, key in keys.items()},
        widths=dict.fromkeys(keys.values(), 1),
        method=method,
        ratio=removed / dense,
        parameters=(dense, dense - removed),
        digest=digest,
    )


def local_layers(plan: PruningPlan, previous: PruningPlan) -> Mapping[str, tuple[int, ...]]:
    """The plan in the numbering of the model that the previous round left."""
    there = layers_of(previous, len(previous.kept))
    return {Site(number, depth.PART).key: plan.kept[Site(layer, depth.PART).key] for number, layer in enumerate(there)}
