"""The part of a run that a sweep's trials do at the same time: all but what needs the machine to itself."""

from cria_dist.pipeline import recovery, results, rounds, shrink, weights
from cria_dist.pipeline.context import Context
from cria_dist.records import Evaluation


def prune_and_score(context: Context) -> list[Evaluation]:
    """Carry out a run up to the quality of its variants; no latency, no report. ``prune()`` goes on from there.

    Returns:
        Dense, pruned, repaired and recovered, as far as they exist.
    """
    shrunk = shrink(context)
    if shrunk is None:
        raise TypeError("a run that is not told to stop has a pruned model")
    recovered = recovery.recover_model(context, shrunk.model)
    weights.compress_checkpoint(context, recovered)
    main = results.main_variants(context, rounds.dense_model(context), shrunk.model, recovered)
    return results.evaluate_variants(context, main)
