"""Tables for the terminal, readable at 100 columns."""

from rich import box
from rich.table import Table
from rich.text import Text

from cria_dist.records import Report
from cria_dist.report import grids, text
from cria_dist.report.grids import Grid


def variants_table(report: Report) -> Table:
    """Size and quality of the dense, pruned, repaired and recovered model."""
    return table(grids.variants_grid(report))


def speed_table(report: Report) -> Table:
    """Time and memory of the same, beside the dense model's."""
    return table(grids.speed_grid(report))


def comparison_table(report: Report) -> Table:
    """Perplexity of every compared method at the same ratio, pruned and repaired."""
    return table(grids.comparison_grid(report))


def generations_table(report: Report) -> Table:
    """What each variant wrote after each prompt, side by side."""
    return table(grids.generations_grid(report), lines=True)


def table(grid: Grid, lines: bool = False) -> Table:
    """A table for the terminal."""
    shown = Table(
        title=grid.title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        header_style="bold",
        show_lines=lines,
        pad_edge=False,
    )
    for index, name in enumerate(grid.header):
        shown.add_column(Text(name), justify="left" if index < grid.words else "right", overflow="fold")
    for row in grid.rows:
        shown.add_row(*(Text(text.printable(cell)) for cell in row))
    return shown
