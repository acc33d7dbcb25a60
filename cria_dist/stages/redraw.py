"""Draw the report of a finished run again, from its folder."""

from pathlib import Path

from cria_dist.errors import DataError
from cria_dist.models import depth
from cria_dist.records import PruningPlan, Report, Site, SiteEvidence
from cria_dist.report.writer import report_from_json, write_report
from cria_dist.stages.export_plan import read_plan
from cria_dist.store import site_scores


def redraw(folder: Path) -> Path:
    """Write ``report.html`` and the plots from ``report.json``, scores and plan; returns the page.

    Raises:
        DataError: the run has no report yet, or a file of it is damaged.
    """
    report: Report = report_from_json(folder / "report.json")
    path = folder / "pruned" / "plan.json"
    if not path.is_file():
        raise DataError(f"{path} is missing; run the same command again to write it")
    plan = read_plan(path)
    return write_report(report, site_evidence(folder / "round-00", plan), folder)


def site_evidence(scores_folder: Path, plan: PruningPlan) -> list[SiteEvidence]:
    """Scores of the first round (dense numbering) beside what the plan kept.

    Whole layers that went beside units inside others have no scores: their losses were measured.
    """
    kept = depth.within_layers(plan.kept) or plan.kept
    return [
        SiteEvidence(Site.from_key(key), site_scores.read_scores(scores_folder, Site.from_key(key)), kept[key])
        for key in sorted(kept)
    ]
