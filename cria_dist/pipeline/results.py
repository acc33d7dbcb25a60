"""After the decision: measure every variant, compare methods, prove that the checkpoint loads, report."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cria_dist import files, machine
from cria_dist.methods import Method
from cria_dist.pipeline import repair, rounds, weights
from cria_dist.pipeline.context import Context
from cria_dist.pipeline.protocol import protocol
from cria_dist.pipeline.rounds import Model
from cria_dist.records import Evaluation, Generation, PruningPlan, Report, SiteEvidence
from cria_dist.report.versions import machine_and_versions
from cria_dist.stages import demonstrate, evaluate, recover, verify
from cria_dist.stages.evaluate import Variant
from cria_dist.stages.redraw import site_evidence
from cria_dist.store.recording import Recording

DigestedVariant = tuple[Variant, str]
"""A variant and the digest of its weights, or of what they are computed from."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found out about the result."""

    variants: Sequence[Evaluation]
    comparison: Sequence[Evaluation]
    generations: tuple[Generation, ...]
    loss_path: Path | None
    loaders: Mapping[str, str]


def comparison_variants(context: Context, recording: Recording) -> list[DigestedVariant]:
    """Prune by every method of ``compare`` in one shot at the same ratio: variants with and without repair."""
    dense = rounds.dense_model(context)
    variants: list[DigestedVariant] = []
    for index, method in enumerate(context.job.config.compare):
        folder = context.job.folder / "comparison" / f"{index:02d}-{method.name}"
        name = f"compare {method.title}"
        analysis = rounds.analyse_sites(context, f"{name}: analyse", folder, recording, dense, method)
        last = context.job.config.prune.rounds - 1
        plan = rounds.decide_round(context, folder, dense, method, analysis, last)
        masks = weights.masks_of(method, folder)
        repaired = None if masks else repair.repair_sites(context, f"{name}: repair", folder, recording, dense, plan)
        variants += plan_variants(context, method, plan, folder / "plan.json", repaired, masks)
    return variants


def plan_variants(
    context: Context, method: Method, plan: PruningPlan, plan_path: Path, repaired: Path | None, masks: Path | None
) -> list[DigestedVariant]:
    """The dense model pruned by a plan in memory, without and with repair, each with a digest of its weights."""
    job = context.job
    bare = Variant(method.title, job.model_dir, method.title, "none", plan_path, masks)
    variants = [(bare, files.digest(job.digests["model"], plan.to_json()))]
    if repaired is not None:
        kind = job.config.prune.repair
        whole = replace(bare, repair=kind, repair_dir=repaired)
        variants.append((whole, files.digest(job.digests["model"], plan.to_json(), kind, job.config.prune.ridge)))
    return variants


def main_variants(context: Context, dense: Model, pruned: Model, recovered: Model | None) -> list[DigestedVariant]:
    """Dense, pruned without repair, repaired, recovered, as far as they exist."""
    job, method = context.job, context.job.config.method
    if pruned.plan is None:
        raise TypeError("a pruned model has a plan")
    last_plan = rounds.round_folder(context, job.config.prune.rounds - 1) / "plan.json"
    variants = [(Variant("dense", job.model_dir), dense.digest)]
    bare = Variant("pruned", job.model_dir, method.title, "none", last_plan)
    if job.repair == "none":
        variants.append((Variant("pruned", pruned.directory, method.title), pruned.digest))
    else:
        variants.append((bare, files.digest(dense.digest, pruned.plan.to_json())))
        repaired = Variant("repaired", pruned.directory, method.title, job.repair)
        variants.append((repaired, pruned.digest))
    if recovered is not None:
        kind = job.repair
        variants.append((Variant("recovered", recovered.directory, method.title, kind), recovered.digest))
    return variants


def evaluate_variants(context: Context, variants: Sequence[DigestedVariant]) -> list[Evaluation]:
    """Perplexity or accuracy, and size, of every variant, in order; measured ones are read back."""
    job, settings = context.job, context.job.config.evaluate
    paths = {}
    for variant, digest in variants:
        numerics = [job.numerics.dtype, job.numerics.matmul, settings.batch_sequences]
        key = files.digest("evaluate", digest, *job.test_digests, numerics)
        paths[variant] = job.folder / "evaluations" / f"{key[:16]}.json"
    missing = [variant for variant, path in paths.items() if not _is_there(path)]
    if job.test_labels_path is None:
        meter = functools.partial(evaluate.PerplexityMeter, job.test_path)
    else:
        meter = functools.partial(evaluate.AccuracyMeter, (job.test_path, job.test_labels_path))
    make = functools.partial(meter, job.numerics, settings.batch_sequences, paths)
    context.map(("evaluate", "variants"), make, missing, tokens=lambda done: done.scored_tokens)
    return [
        replace(Evaluation(**files.read_json(path)), label=variant.label, method=variant.method, repair=variant.repair)
        for variant, path in paths.items()
    ]


def _is_there(path: Path) -> bool:
    """Whether a variant was measured, here or by a neighbouring run: the dense model's result is everyone's."""
    return path.is_file() or files.take_copy(path.parents[2], f"*/evaluations/{path.name}", path)


def demonstrate_variants(
    context: Context, variants: Sequence[DigestedVariant], evaluations: Sequence[Evaluation]
) -> tuple[list[Evaluation], tuple[Generation, ...]]:
    """Add latency to the evaluations, and let every variant write the example texts."""
    job, settings = context.job, context.job.config.evaluate
    if job.test_labels_path is not None and not settings.latency_repeats:
        return list(evaluations), ()  # a classifier writes no texts
    key = files.digest("speed and texts", [digest for _, digest in variants], settings.model_dump(), *job.test_digests)
    path = job.folder / "evaluations" / f"demonstration-{key[:16]}.json"
    if not path.is_file():
        task = demonstrate.Demonstration(
            job.test_path, job.numerics, settings.prompts, settings.new_tokens, machine.cpus()
        )
        if job.test_labels_path is not None:
            task = replace(task, writes=False)
        visits = demonstrate.alternating_visits([variant for variant, _ in variants], settings.latency_repeats)
        context.pool.release()  # the timed process must have the machine to itself
        make = functools.partial(demonstrate.Demonstrator, task)
        shown = context.map(("latency and texts", "visits"), make, visits, workers=1)
        files.write_json(path, demonstrate.summary(shown))
    summary = files.read_json(path)
    timed = [replace(evaluation, **summary["times"].get(evaluation.label, {})) for evaluation in evaluations]
    texts = {evaluation.label: summary["texts"][evaluation.label] for evaluation in evaluations}
    return timed, demonstrate.generations(texts, settings.prompts)


def verify_exports(context: Context, pruned: Model, recovered: Model | None) -> dict[str, str]:
    """Load the checkpoints in a process without this package and compare logits; a finding is kept.

    What the run ends with is held against the loaders of other programs too.
    """
    job, python = context.job, context.job.config.run.vllm_python
    exports: list[verify.Export] = []
    for model in (pruned, recovered):
        if model is not None:
            final = model is (recovered or pruned)
            asked = [python] if python and final else []
            key = files.digest("verify", model.digest, *job.test_digests, final, *asked)
            record = job.folder / "evaluations" / f"verified-{key[:16]}.json"
            exports.append(verify.Export(model.directory, _reference(context, model), record, final))
    missing = [export for export in exports if not export.record.is_file()]
    make = functools.partial(verify.Verifier, job.test_path, python)
    context.map(("verify", "checkpoints"), make, missing, workers=1)
    found: dict[str, str] = {}
    for export in exports:
        record = files.read_json(export.record)
        found[f"transformers, {export.directory.name}"] = record["finding"]
        found |= {f"{loader}, {export.directory.name}": verdict for loader, verdict in record["others"].items()}
    return found


def _reference(context: Context, model: Model) -> Variant:
    """One round of pruning can be redone in memory; what rounds or training made can only be loaded."""
    job = context.job
    if model.directory.name != "pruned" or job.config.prune.rounds > 1:
        return Variant("reference", model.directory)
    folder, kind = rounds.round_folder(context, 0), job.repair
    repaired = weights.masks_of(job.config.method, folder) if kind == "none" else folder / "repair"
    return Variant("reference", job.model_dir, "", kind, folder / "plan.json", repaired)


def collect_report(
    context: Context, command: str, analysis_folder: Path, final: Model, measured: Measured
) -> tuple[Report, list[SiteEvidence]]:
    """Gather everything the report shows."""
    job = context.job
    if final.plan is None:
        raise TypeError("a report is about a pruned model")
    loss = recover.read_log(measured.loss_path) if measured.loss_path is not None else []
    report = Report(
        name=job.config.name,
        command=command,
        config=job.config.model_dump(mode="json"),
        versions=machine_and_versions(),
        digests={**job.digests, "plan": final.plan.digest},
        protocol=protocol(context),
        effective_parameter_reduction=final.plan.ratio,
        variants=tuple(measured.variants),
        comparison=tuple(measured.comparison),
        generations=measured.generations,
        stages=context.stage_times(),
        loss=tuple((int(line["step"]), float(line["loss"])) for line in loss),
        loaders=measured.loaders,
    )
    return report, site_evidence(analysis_folder, final.plan)
