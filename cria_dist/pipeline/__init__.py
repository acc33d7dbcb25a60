"""The whole story: record, analyse, decide, apply, recover, evaluate, report."""

from dataclasses import dataclass

from cria_dist.pipeline import depth, recovery, repair, results, rounds, weights
from cria_dist.pipeline.context import Context, Train
from cria_dist.pipeline.results import Measured
from cria_dist.pipeline.rounds import Model
from cria_dist.records import Report, Stage
from cria_dist.report.writer import write_report
from cria_dist.stages.model_card import write_cards
from cria_dist.store.recording import Recording

__all__ = ["Context", "Train", "prune"]


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The model after all rounds, and the first round's recording (of the dense model)."""

    model: Model
    dense_recording: Recording


def prune(context: Context, command: str = "", until: Stage = "evaluate") -> Report | None:
    """Carry out a run, or resume it; what is finished is not computed again.

    Args:
        context: the checked job and its surroundings.
        command: command line that reproduces the run, for the report.
        until: stop after this stage.

    Returns:
        The report, or None when stopped before it.
    """
    shrunk = shrink(context, until)
    if shrunk is None or until == "apply":
        return None
    compared = results.comparison_variants(context, shrunk.dense_recording) if until == "evaluate" else []
    recovered = recovery.recover_model(context, shrunk.model)
    weights.compress_checkpoint(context, recovered)
    if until == "recover":
        return None
    measured = measure(context, shrunk.model, recovered, compared)
    report, evidence = results.collect_report(context, command, rounds.round_folder(context, 0), shrunk.model, measured)
    write_report(report, evidence, context.job.folder)
    write_cards(report, context.job.model_dir, context.job.folder)
    return report


def shrink(context: Context, until: Stage = "evaluate") -> Shrunk | None:
    """The rounds: each records, analyses, decides and applies on the model the last one left."""
    config = context.job.config
    model = rounds.dense_model(context)
    first: Recording | None = None
    for index in range(config.prune.rounds):
        folder = rounds.round_folder(context, index)
        label = f" round {index + 1}" if config.prune.rounds > 1 else ""
        recording = rounds.record_round(context, index, model)
        first = first or recording
        if until == "record":
            return None
        analysis = rounds.analyse_sites(context, f"analyse{label}", folder, recording, model, config.method)
        if until == "analyse":
            return None
        plan = rounds.decide_round(context, folder, model, config.method, analysis, index)
        last = index == config.prune.rounds - 1 or depth.is_settled(config.method, plan, model)
        if until == "decide" and last:
            return None
        masks = weights.masks_of(config.method, folder)
        repaired = masks or repair.repair_sites(context, f"repair{label}", folder, recording, model, plan)
        target = context.job.folder / "pruned" if last else folder / "pruned"
        model = rounds.apply_plan(context, target, recording, model, plan, repaired)
        if last:
            weights.compress_checkpoint(context, model)
            break
    return Shrunk(model, first) if first is not None else None


def measure(
    context: Context, pruned: Model, recovered: Model | None, compared: list[results.DigestedVariant]
) -> Measured:
    """Evaluate the variants and the compared methods; prove that the result loads elsewhere."""
    main = results.main_variants(context, rounds.dense_model(context), pruned, recovered)
    evaluations = results.evaluate_variants(context, main + compared)
    timed, texts = results.demonstrate_variants(context, main, evaluations[: len(main)])
    return Measured(
        variants=timed,
        comparison=evaluations[len(main) :],
        generations=texts,
        loss_path=recovery.loss_path(context, pruned) if recovered else None,
        loaders=results.verify_exports(context, pruned, recovered)
        | weights.compress_checkpoint(context, pruned)
        | weights.compress_checkpoint(context, recovered),
    )
