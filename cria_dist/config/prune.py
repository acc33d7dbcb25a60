"""What is removed, and what the survivors are repaired by."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from cria_dist.config.section import Section

Repair = Literal["none", "bias", "least_squares", "sequential"]
Allocation = Literal["uniform", "global", "sensitivity"]
Unit = Literal["mlp", "attention", "layer", "residual", "experts"]


def _share(value: float) -> float:
    if not 0 < value < 1:
        raise ValueError("a share is greater than 0 and less than 1; write 0.2 for 20 %")
    return value


class PruneConfig(Section):
    """How much is removed and how it is repaired."""

    ratio: Annotated[float, AfterValidator(_share)] = 0.2
    """Share to remove; see ``budget`` for the share of what."""
    units: tuple[Unit, ...] = ("mlp",)
    """What goes: MLP neurons, ``attention`` heads (KV groups: heads of keys and values with all query heads that read
    them), ``experts`` of a mixture (of every layer the same number), and whole layers beside them (``layer``, by
    ``sensitivity``). Several share one budget. ``residual``, alone: dimensions of the residual stream, the same ones of
    every layer. Groups and experts go whole, and what stays is rounded down: of 4 KV groups a ratio of 0.1 takes one,
    a quarter, from every layer of a ``uniform`` allocation; a run that takes much more than its ratio says so."""
    budget: Literal["units", "parameters", "macs", "kv_cache", "latency"] = "units"
    """``units``: share of the neurons of every site, of the layers where whole layers go, or of the weights of every
    MLP map where single weights become zero. ``parameters``: share of all parameters of the dense model. ``macs``:
    share of all multiplications of one sequence (linear maps, head and full T x T attention). ``kv_cache``: share of
    the keys and values kept of a token. ``latency``: share of the milliseconds that ``latency`` names, as measured
    where the run computes, at ``data.sequence_length`` and batch 1; the measured times stay in the run folder, and
    another machine may decide otherwise."""
    latency: Literal["prefill", "decode"] = "decode"
    """What ``budget = "latency"`` counts: a forward pass over a sequence, or one further token after it."""
    multiple: Annotated[int, Field(ge=1)] = 8
    """Widths of MLPs are rounded down to a multiple of this (8 suits most kernels, 1 hits the ratio most closely)."""
    rounds: Annotated[int, Field(ge=1, le=64)] = 1
    """Record, analyse, decide, apply are repeated this often, each round with fresh scores on the smaller model."""
    repair: Repair = "least_squares"
    """What the surviving output weights do for the removed units; nothing where layers or single weights go. ``bias``
    and ``least_squares`` look at every site by itself, as the recording saw it. ``sequential`` goes on from there layer
    by layer: the weights of a layer are solved for what the repaired layers before it hand on, so that each makes good
    what they have lost; the calibration goes through the model three times more (five times where heads go too)."""
    ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    """Relative ridge of the least-squares repair (times the mean diagonal of the Gram matrix; at most the median)."""
    allocation: Allocation = "uniform"
    """How the budget is spread over the layers. ``uniform``: the same share of each. ``global``: what scores least
    anywhere, in shares of its layer's sum, goes first (learned gates as they are: they are bounded alike everywhere).
    ``sensitivity``: the loss with each layer alone pruned to a few widths is measured on held-out calibration text,
    and the widths with the least sum are chosen. The last two never end worse than ``uniform`` on that text, in every
    round, and a checkpoint whose widths differ is loaded by ``cria_dist.load_pruned``, not by the stock class."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Least share of a layer's units that stays (``global`` and ``sensitivity``)."""
    protect: tuple[int, ...] = ()
    """Layers that are left alone, -1 is the last (``global`` and ``sensitivity``)."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of a layer whose units are scored."""
        if self.units == ("residual",):
            return ("residual_attention", "residual_mlp")
        return tuple(sorted(unit for unit in self.units if unit != "layer"))

    @model_validator(mode="after")
    def _time_is_measured(self) -> Self:
        other = [unit for unit in self.units if unit in ("residual", "experts")]
        if self.budget == "latency" and other:
            raise ValueError(
                f"budget=latency is for neurons and heads, and whole layers beside them, and units={list(self.units)} "
                f"are other ones; set prune.budget=units or parameters"
            )
        if self.budget == "latency" and self.allocation != "sensitivity":
            raise ValueError(
                "budget=latency weighs measured times against measured losses of neurons and heads (and whole layers "
                f"beside them), and allocation={self.allocation}; set prune.allocation=sensitivity with a method that "
                "removes neurons, or set prune.budget=units, parameters or macs"
            )
        return self

    @model_validator(mode="after")
    def _units_share_a_budget(self) -> Self:
        if not self.parts or len(set(self.units)) < len(self.units) or ("residual" in self.units[1:]):
            raise ValueError(
                f"units={list(self.units)} must name mlp, attention or both, or experts (of mixtures), each once; "
                "layer goes beside one of them, residual stands alone. For whole layers only, set "
                "method.name=block_influence and leave prune.units out"
            )
        local = self.repair in ("none", "least_squares")
        if "residual" in self.units and (len(self.units) > 1 or self.allocation != "uniform" or not local):
            raise ValueError(
                f"units={list(self.units)} with allocation={self.allocation} and repair={self.repair}: residual stands "
                "alone, is the same in every layer and is repaired by itself; set prune.units=['residual'], "
                "prune.allocation=uniform and prune.repair=least_squares"
            )
        if "layer" in self.units and self.allocation != "sensitivity":
            raise ValueError(
                f"units={list(self.units)} weighs whole layers against units by measured losses, and "
                f"allocation={self.allocation}; set prune.allocation=sensitivity, or take a method that removes layers"
            )
        if len(self.units) > 1 and self.budget in ("units", "kv_cache"):
            raise ValueError(
                f"units={list(self.units)} share a budget, and budget={self.budget} is of one kind of them; set "
                "prune.budget=parameters or macs"
            )
        if self.budget == "kv_cache" and self.units != ("attention",):
            raise ValueError(
                f"budget=kv_cache is spent on attention, and units={list(self.units)}; set prune.units=['attention']"
            )
        if self.repair == "bias" and "attention" in self.units:
            raise ValueError(
                f"repair=bias needs a bias in every output map, and units={list(self.units)} has attention, whose maps "
                "stay without; set prune.repair=least_squares"
            )
        return self

    @model_validator(mode="after")
    def _allocation_can_be_made(self) -> Self:
        if self.allocation == "uniform" and self.protect:
            raise ValueError(
                f"protect={list(self.protect)} needs widths that differ, and allocation=uniform gives every layer the "
                "same; set prune.allocation=global or sensitivity"
            )
        if self.allocation == "sensitivity" and self.rounds > 1:
            raise ValueError(
                f"allocation=sensitivity measures the dense model's layers, but rounds={self.rounds}; set "
                "prune.rounds=1 or prune.allocation=global"
            )
        return self

    def content_part(self) -> dict[str, Any]:
        """What a result depends on: how the budget may be spread only where it is not spread evenly."""
        unused = {"allocation", "floor", "protect"} if self.allocation == "uniform" else set[str]()
        unused |= {"units"} if self.units == ("mlp",) else set()
        unused |= {"latency"} if self.budget != "latency" else set()
        return self.model_dump(mode="json", exclude=unused)
