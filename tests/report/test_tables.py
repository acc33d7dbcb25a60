"""The tables in a terminal of 100 columns."""

import io
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console
from rich.table import Table

from cria_dist.records import Report, SiteEvidence
from cria_dist.report import grids, html, text
from cria_dist.report.tables import comparison_table, generations_table, speed_table, variants_table


def shown(table: Table) -> str:
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(table)
    return console.export_text()


def line(printed: str, start: str) -> str:
    """The line that starts so, with single spaces."""
    found = next(words for words in printed.splitlines() if words.strip().startswith(start))
    return " ".join(found.split())


def test_variants_table_has_every_number(report: Report) -> None:
    printed = shown(variants_table(report))
    assert line(printed, "dense") == "dense 134.52 M 0.0 % 21.32 1.00x 538.1"
    assert line(printed, "recovered") == "recovered 118.60 M 11.8 % 26.75 1.25x 474.4"


def test_speed_stands_beside_the_dense_models(report: Report, bare_report: Report) -> None:
    printed = shown(speed_table(report))
    assert line(printed, "recovered") == "recovered 118.6 (0.88x) 28.2 (0.88x)"
    assert speed_table(bare_report).row_count == 0


def test_a_model_that_is_smaller_but_not_faster_is_called_so(report: Report) -> None:
    dense, *between, end = report.variants
    slow = replace(end, prefill_ms=dense.prefill_ms, batch_prefill_ms=9.0, memory_bytes=2_000_000)
    whole = replace(dense, batch_prefill_ms=18.0, memory_bytes=4_000_000)
    timed = replace(report, variants=(whole, *between, slow))
    assert "instead of 134.5 (not faster)" in html.headline(timed)
    assert html.headline(timed).count("not faster") == 1  # decoding is
    printed = shown(speed_table(timed))
    assert line(printed, "recovered") == "recovered 134.5 (1.00x) 28.2 (0.88x) 9.00 (0.50x) 2.0 (0.50x)"
    assert line(printed, "pruned") == "pruned 118.6 (0.88x) 28.2 (0.88x) - -"


def test_comparison_table_puts_this_run_first_and_pairs_repair(report: Report) -> None:
    printed = shown(comparison_table(report))
    assert line(printed, "cria (this") == "cria (this run) 91.57 (4.30x) 33.14 (1.55x) 26.75 (1.25x)"
    assert line(printed, "random") == "random 159.04 (7.46x) 72.51 (3.40x) -"
    assert line(printed, "magnitude") == "magnitude 88.10 (4.13x) 41.23 (1.93x) -"
    assert printed.index("cria (this run)") < printed.index("cria, paper's score") < printed.index("magnitude")


def test_methods_of_one_title_keep_their_numbers_and_show_what_differs(report: Report) -> None:
    first = report.comparison[:2]
    second = tuple(replace(one, perplexity=2 * one.perplexity) for one in first)
    other = report.comparison[2:4]
    options = [{"name": "cria", "neighbours": 4}, {"name": "cria", "neighbours": 8}, {"name": "random"}]
    twice = replace(report, comparison=(*first, *second, *other), config={"compare": options})
    _, *compared = grids.contenders(twice)
    assert [one.name for one in compared] == [
        "cria, paper's score, neighbours=4",
        "cria, paper's score, neighbours=8",
        "random",
    ]
    assert [(one.pruned, one.repaired) for one in compared] == [first, second, other]
    bare = replace(twice, comparison=(first[0], second[0], other[0]))
    assert [one.pruned for one in grids.contenders(bare)[1:]] == [first[0], second[0], other[0]]


def test_perplexity_that_is_not_finite_is_said_so(report: Report) -> None:
    broken = replace(report, variants=(report.variants[0], replace(report.variants[1], perplexity=math.inf)))
    assert "not finite" in shown(variants_table(broken))


def test_generations_show_markup_and_control_characters_as_text(report: Report) -> None:
    printed = shown(generations_table(report))
    assert "[/bold]" in printed
    assert "[red]" in printed
    assert "\x1b" not in printed
    assert "The the the" in printed


@pytest.mark.parametrize("table", [variants_table, comparison_table, generations_table])
def test_tables_fit_100_columns(table: Callable[[Report], Table], report: Report) -> None:
    printed = shown(table(report)).splitlines()
    assert max(len(words) for words in printed) <= 100
    assert not any("…" in words for words in printed)


def test_sites_grid_joins_facts_and_spectrum(evidence: tuple[SiteEvidence, ...]) -> None:
    grid = grids.sites_grid(tuple(reversed(evidence)))
    assert grid.header[4:] == ("dead units", "components", "mean degree", "largest eigenvalue", "residual")
    assert grid.rows[3] == ("layer-003.mlp", "1,536", "1,352", "12.0 %", "9", "1", "13.5", "6.05", "2.50e-09")


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.4, "0.4 s"), (45.2, "45 s"), (59.7, "60 s"), (200, "3 min 20 s"), (3599.6, "1 h 00 min"), (7380, "2 h 03 min")],
)
def test_seconds(value: float, words: str) -> None:
    assert text.seconds(value) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (12.0, "12"),
        (0.0312, "0.0312"),
        (1.234, "1.23"),
        (45.67, "45.7"),
        (812.4, "812"),
        (2.5e-9, "2.50e-09"),
    ],
)
def test_number(value: float, words: str) -> None:
    assert text.number(value) == words
