"""Writes the report of a run and reads it back."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cria_dist import files
from cria_dist.errors import DataError
from cria_dist.records import Evaluation, Generation, Report, SiteEvidence, StageTime
from cria_dist.report import html, plots

REPORT_SCHEMA = 1
JSON_NAME = "report.json"
PAGE_NAME = "report.html"
PLOTS_NAME = "plots"


def write_report(report: Report, evidence: Sequence[SiteEvidence], folder: Path) -> Path:
    """Write ``report.json``, ``plots/*.png`` and ``report.html``.

    Returns:
        The path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {"schema": REPORT_SCHEMA, **_strict(asdict(report))}
    content = json.dumps(record, indent=1, allow_nan=False) + "\n"
    files.write_bytes(folder / JSON_NAME, content.encode())
    drawn = plots.draw_all(report, evidence, folder / PLOTS_NAME)
    files.write_bytes(folder / PAGE_NAME, html.render(report, evidence, drawn).encode())
    return folder / PAGE_NAME


def report_from_json(path: Path) -> Report:
    """Read ``report.json``; perplexities that were not finite come back as NaN.

    Raises:
        DataError: the file is missing, damaged or of another schema.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.pop("schema") != REPORT_SCHEMA:
            raise DataError(f"{path} is of another version of this package; run the evaluation again")
        return Report(
            **{
                **record,
                "protocol": tuple(record["protocol"]),
                "variants": tuple(_evaluation(one) for one in record["variants"]),
                "comparison": tuple(_evaluation(one) for one in record["comparison"]),
                "generations": tuple(Generation(**one) for one in record["generations"]),
                "stages": tuple(StageTime(**one) for one in record["stages"]),
                "loss": tuple((step, _number(value)) for step, value in record["loss"]),
            }
        )
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); run the evaluation first") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); delete it and run the same command again") from error


def _evaluation(record: Mapping[str, Any]) -> Evaluation:
    return Evaluation(**{**record, "perplexity": _number(record["perplexity"])})


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _strict(value: Any) -> Any:
    """Plain data with every number that JSON cannot say replaced by None."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
