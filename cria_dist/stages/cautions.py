"""What a run may do and had better not: said before anything is computed, and nothing is refused."""

import logging
import math
from collections.abc import Mapping

from cria_dist.config import RunConfig
from cria_dist.methods import Conditional
from cria_dist.models import attention
from cria_dist.models.mlp import MlpFamily, ModelDict
from cria_dist.records import Stage
from cria_dist.stages.analyse import widest_site
from cria_dist.stages.budget import budget_of, multiple_of
from cria_dist.stages.estimate_left import left_of
from cria_dist.stages.estimate_recover import recovery_bytes, recovery_remedies
from cria_dist.stages.footprint import in_units, itemsize

log = logging.getLogger(__name__)

FEWEST_TOKENS = 16
"""Calibration tokens for each signal of a site that is solved. SmolLM2-135M (1,536 neurons, 20 % of them gone, least
squares) ends at 1.22 times the dense model's perplexity with 16, at 1.16 with 64. If the price of too few goes with
their inverse, it is a third of the increase at 16, and half of it at 8."""
OVERSHOOT = 1.25, 0.02
"""A share that is more than so many times the one asked for, and by more than so much larger, is worth a word."""


def warn_of_memory(config: RunConfig, parameters: int, until: Stage) -> None:
    """Recording needs a block of layers at a time; what measures losses or gradients has the whole model in a worker.

    A warning, for ``record.memory_gb`` may be less than what there is.
    """
    needed, given = parameters * itemsize(config.model.dtype), config.record.memory_gb
    whole = ["evaluate (hence prune)"] if until == "evaluate" else []
    if config.prune.allocation != "uniform" and until not in ("record", "analyse"):
        whole.append(f"prune.allocation={config.prune.allocation}")
    if until != "record":
        whole += [one.title for one in (config.method, *config.compare) if one.needs & {"gradients", "gates"}]
    if given is not None and needed > given * 1e9 and whole:
        log.warning(
            "%s: a worker holds the whole model, %s, and record.memory_gb=%g; take a larger device, or stop before it "
            "(cria apply; cria recover, where memory.recover of cria estimate fits) and evaluate elsewhere",
            whole[0],
            in_units(needed),
            given,
        )


def warn_of_recovery(
    config: RunConfig, family: MlpFamily, model_config: ModelDict, dense_parameters: int, until: Stage
) -> None:
    """Training takes a multiple of what the weights take; a warning, as that of memory."""
    given = config.record.memory_gb
    if given is None or not config.recover.steps or until not in ("recover", "evaluate"):
        return
    needed = recovery_bytes(config, model_config, left_of(config, family, model_config, dense_parameters))
    if needed > given * 1e9:
        log.warning(
            "recover: a worker holds %s of weights, gradients and moments, and record.memory_gb=%g; set %s",
            in_units(needed),
            given,
            recovery_remedies(config),
        )


def warn_of_few_tokens(config: RunConfig, family: MlpFamily, model_config: ModelDict) -> None:
    """What is solved from the moments of few tokens fits these tokens, and not the model's text."""
    methods, repair = (config.method, *config.compare), config.prune.repair
    solves = [f"prune.repair={repair}"] if repair in ("least_squares", "sequential") else []
    solves = solves if any(one.unit == "mlp" for one in methods) else []
    solves += [one.title for one in methods if isinstance(one, Conditional)]
    signals = widest_site(family, model_config, config.prune.parts)
    positions = family.positions(model_config, config.data.sequence_length)
    tokens = config.data.calibration_sequences * positions
    if solves and tokens < FEWEST_TOKENS * signals:
        log.warning(
            "data.calibration_sequences=%d are %s tokens, %.2g for each of the %s signals of the widest site, and %s "
            "solves for all of these at once; with fewer than %d the text, not the method, limits the result: raise it "
            "to %d",
            config.data.calibration_sequences,
            f"{tokens:,}",
            tokens / signals,
            f"{signals:,}",
            solves[0],
            FEWEST_TOKENS,
            math.ceil(FEWEST_TOKENS * signals / positions),
        )


def warn_of_rounding(
    config: RunConfig, family: MlpFamily, model_config: ModelDict, dense_parameters: int, kept: Mapping[str, int]
) -> None:
    """Units that are few and large (KV groups, experts) round to much more than was asked for.

    Args:
        config: the run.
        family: adapter of the model's family.
        model_config: config.json of the dense model.
        dense_parameters: its parameters.
        kept: units that are left, by site key.
    """
    ratio, widths = config.prune.ratio, family.widths(model_config, config.prune.parts)
    budget = budget_of(config, family, model_config, dense_parameters)
    gone = sum((width - kept[site.key]) * budget.unit_cost[site] for site, width in widths.items()) / budget.total
    if gone > max(OVERSHOOT[0] * ratio, ratio + OVERSHOOT[1]):
        site = min(widths, key=lambda site: widths[site] / multiple_of(config.prune, site))
        remedy = "lower prune.multiple" if multiple_of(config.prune, site) > 1 else f"set prune.ratio={gone:.3g}"
        remedy += " or prune.allocation=global, which rounds over all layers" * (site.part == attention.PART)
        log.warning(
            "prune.ratio=%g takes %.3g of what prune.budget=%s measures, for what stays is rounded down: %d of the %d "
            "units of %s; %s",
            ratio,
            gone,
            config.prune.budget,
            kept[site.key],
            widths[site],
            site.key,
            remedy,
        )
