"""How the numbers of a report were measured, one sentence each."""

from cria_dist.pipeline import weights
from cria_dist.pipeline.context import Context
from cria_dist.stages import speed


def protocol(context: Context) -> tuple[str, ...]:
    """How the numbers were measured, one sentence each."""
    return (
        *(_of_text(context) if context.job.test_labels_path is None else _of_examples(context)),
        "Parameters: counted on the real tensors, tied weights once; the reduction is removed over dense parameters.",
        "Compared methods: one shot, the same widths, with and without the same repair.",
        *_layers_beside_neurons(context),
        *weights.protocol(context),
        *_stopped_recovery(context),
    )


def _of_text(context: Context) -> tuple[str, ...]:
    data, config = context.job.config.data, context.job.config
    return (
        f"Perplexity: exp of the token mean of the negative log likelihood over {data.test_sequences} non-overlapping "
        f"sequences of {data.sequence_length} tokens of {data.test.source} (part: {data.test.part}), each without "
        f"context or a beginning-of-text token (BOS) before it, computed in {config.model.dtype} (matrix products: "
        f"{config.model.matmul}).",
        f"Calibration: {data.calibration_sequences} sequences of {data.sequence_length} tokens of "
        f"{data.calibration.source} (part: {data.calibration.part}); the recovery trains on the same text, the dense "
        "model is not fine-tuned on it.",
        f"Latency: median of {config.evaluate.latency_repeats} visits, variants alternating; a forward pass over a "
        f"test sequence (prefill) and {speed.DECODED_TOKENS} greedy tokens after {speed.PROMPT_TOKENS} in the cache "
        f"(decode, per token), one sequence alone and {speed.BATCH} together, all CPU threads of this machine or its "
        f"GPU. Memory: the weights in {config.model.dtype} and the cache of the {speed.BATCH} sequences.",
    )


def _of_examples(context: Context) -> tuple[str, ...]:
    data, config, takes = context.job.config.data, context.job.config, context.job.family.takes
    cut = f" (at most {data.sequence_length} tokens of each, none padded)" if takes == "sentences" else ""
    return (
        f"Accuracy: share of {data.test_sequences} {takes}{cut} of {data.test.source} (part: {data.test.part}) whose "
        f"label has the largest logit, computed in {config.model.dtype} (matrix products: {config.model.matmul}).",
        f"Calibration: {data.calibration_sequences} {takes} of {data.calibration.source} (part: "
        f"{data.calibration.part}); the recovery trains on the same ones and their labels, the dense model is not "
        "fine-tuned on them.",
        f"Latency: median of {config.evaluate.latency_repeats} visits, variants alternating; a forward pass over one "
        f"of the test {takes} and over the first {speed.BATCH} together, all CPU threads of this machine or its GPU.",
    )


def _layers_beside_neurons(context: Context) -> tuple[str, ...]:
    """What must be known of a comparison between methods that remove neurons and methods that remove layers."""
    config = context.job.config
    if not {method.unit for method in (config.method, *config.compare)} >= {"mlp", "layer"}:
        return ()
    equal = "" if config.prune.budget != "units" else ", which is not the same number of parameters"
    share = "neurons of each layer, or of the layers" if config.prune.budget == "units" else config.prune.budget
    return (f"Whole layers and neurons: the ratio is the share of the {share}{equal}; removed layers get no repair.",)


def _stopped_recovery(context: Context) -> tuple[str, ...]:
    """That the numbers are not those of the recovery that the configuration asks for."""
    if context.stopped is None:
        return ()
    return (f"Recovery: {context.stopped}; a sweep stopped it, no number is of it, the command goes on from there.",)
