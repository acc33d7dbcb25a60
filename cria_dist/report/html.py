"""One HTML page that needs nothing else: no network, no script, pictures inside. All data is escaped."""

import base64
import html as markup
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path

from cria_dist.records import Evaluation, Report, SiteEvidence
from cria_dist.report import grids, text
from cria_dist.report.grids import Grid
from cria_dist.report.metrics import ACCURACY, metric_of

CAPTIONS = {
    "perplexity": "Perplexity of this run's variants and of the compared methods at the same ratio, on the same text.",
    "accuracy": "Accuracy of this run's variants and of the compared methods at the same ratio, on the same examples.",
    "layers": "The score of each layer in the first round; the layer with the lowest goes first.",
    "kept_widths": "How many units each layer keeps.",
    "scores": "Each row is the histogram of one layer's scores, scaled to its own peak. A unit with a higher score is "
    "kept first; dead units have no score and are counted at the right.",
    "kept_widths_attention": "How many groups of heads (keys and values with the queries that read them) stay.",
    "scores_attention": "The same of the groups of heads.",
    "spectra": "Generalised eigenvalues in descending order. A steep start means that few directions carry the "
    "difference between what the layer reads and what it writes.",
    "residuals": "How exactly the eigenpairs behind the scores solve the pencil, |L_X v - zeta L_Y v| over "
    "|L_X v| + zeta |L_Y v|, the worst pair of each layer. A layer above the engine's tolerance stops the run.",
    "loss": "Training loss while the pruned model was fine-tuned.",
    "stages": "Time of the stages in the invocation that computed them.",
}
COMPARISON_NOTE = (
    "The compared methods remove the same ratio in one shot, are measured on the same data and get no recovery. "
    "Every row is listed as it came out, the score exactly as the paper gives it too, also where a simpler one does "
    "better."
)
FASTER, NOT_FASTER = 0.97, " (not faster)"
"""A model that takes more than this share of the dense model's time is called what it is."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render(report: Report, evidence: Sequence[SiteEvidence], plots: Sequence[Path]) -> str:
    """The whole page."""
    style = resources.files("cria_dist.report").joinpath("style.css").read_text(encoding="utf-8")
    title = escape(f"{report.name}: pruning report")
    return "\n".join(
        (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>",
            f"<h1>{title}</h1>",
            f'<p class="headline">{escape(headline(report))}</p>',
            *_results(report),
            *_section("Plots", *(_figure(path) for path in plots)),
            *_section("What the models write", *_table(grids.generations_grid(report), "prose")),
            *_layers(evidence),
            *_provenance(report),
            "</body>\n</html>\n",
        )
    )


def headline(report: Report) -> str:
    """The result in one sentence: size, quality, speed."""
    end, dense = grids.final(report), grids.variant(report, "dense")
    if end is None or dense is None:
        return "The run measured no pruned model beside the dense one."
    ratio = text.percent(report.effective_parameter_reduction)
    done = f"removed {ratio} of the parameters ({text.count(dense.parameters)} to {text.count(end.parameters)})"
    if end.parameters == dense.parameters:
        done = f"set {ratio} of the {text.count(dense.parameters)} parameters to zero"
    metric = metric_of(report)
    before, after = metric.of(dense), metric.of(end)
    quality = f"{metric.show(before)} to {metric.show(after)}"
    change = f"{metric.beside(after, before)}{' points' if metric is ACCURACY else ''}"
    return f"{end.method} {done}; {metric.name} went from {quality} ({change}, {end.label}){_speed(dense, end)}."


def escape(data: str) -> str:
    """Text that the page shows as it is, whatever it holds."""
    return markup.escape(text.printable(data))


def _speed(dense: Evaluation, end: Evaluation) -> str:
    parts = [
        f"{what} takes {text.milliseconds(after)} ms{unit} instead of {text.milliseconds(before)}"
        f"{NOT_FASTER if after > before * FASTER else ''}"
        for what, before, after, unit in (
            ("a forward pass", dense.prefill_ms, end.prefill_ms, ""),
            ("generation", dense.decode_ms, end.decode_ms, " per token"),
        )
        if before is not None and after is not None
    ]
    return "; " + " and ".join(parts) if parts else ""


def _results(report: Report) -> Iterator[str]:
    yield from _section("Result", *_table(grids.variants_grid(report)))
    yield from _section("Speed and memory", *_table(grids.speed_grid(report)))
    if report.comparison:
        note = f'<p class="soft">{escape(COMPARISON_NOTE)}</p>'
        yield from _section("Methods at the same ratio", *_table(grids.comparison_grid(report)), note)


def _layers(evidence: Sequence[SiteEvidence]) -> Iterator[str]:
    if evidence:
        summary = f"<details>\n<summary>Width, facts and spectrum of {len(evidence)} layers</summary>"
        yield from _section("Layers", summary, *_table(grids.sites_grid(evidence)), "</details>")


def _provenance(report: Report) -> Iterator[str]:
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in report.protocol)
    times = [(one.stage, text.seconds(one.seconds)) for one in report.stages]
    config = json.dumps(report.config, indent=2, sort_keys=True, default=str)
    yield from _section("How it was measured", f"<ul>{sentences}</ul>" if sentences else "")
    yield from _section("What loads the result", _pairs(report.loaders.items()))
    yield from _section("Time per stage", _pairs(times))
    yield from _section(
        "Reproduce it",
        f'<pre class="command">{escape(report.command)}</pre>',
        f"<details>\n<summary>Whole configuration</summary>\n<pre>{escape(config)}</pre>\n</details>",
    )
    yield from _section("Versions", _pairs(report.versions.items()))
    yield from _section("Digests", _pairs(report.digests.items()))


def _section(title: str, *parts: str) -> Iterator[str]:
    """A heading and its parts, or nothing when all parts are empty."""
    if any(parts):
        yield f"<h2>{escape(title)}</h2>"
        yield from (part for part in parts if part)


def _table(grid: Grid, style: str = "") -> Iterator[str]:
    if not grid.rows:
        return
    yield f'<div class="scroll"><table class="{style}">'
    yield f"<thead>{_row('th', grid.header, grid.words)}</thead>"
    yield f"<tbody>{''.join(_row('td', row, grid.words) for row in grid.rows)}</tbody>"
    yield "</table></div>"


def _row(tag: str, cells: Sequence[str], words: int) -> str:
    marks = (' class="word"' if index < words else "" for index in range(len(cells)))
    return (
        "<tr>" + "".join(f"<{tag}{mark}>{escape(c)}</{tag}>" for c, mark in zip(cells, marks, strict=True)) + "</tr>\n"
    )


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "".join(_row("td", (name, str(value)), words=2) for name, value in pairs)
    return f'<div class="scroll"><table class="pairs"><tbody>{rows}</tbody></table></div>' if rows else ""


def _figure(path: Path) -> str:
    picture = base64.b64encode(path.read_bytes()).decode("ascii")
    caption = CAPTIONS.get(path.stem, path.stem)
    return (
        f'<figure><img alt="{escape(path.stem.replace("_", " "))}" src="data:image/png;base64,{picture}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
