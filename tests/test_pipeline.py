"""The whole run on one process: what it leaves, what it skips, what survives an interruption."""
from pathlib import Path


def test_smoke(finished_run) -> None:
    print(sorted(str(p.relative_to(finished_run.folder)) for p in finished_run.folder.rglob("*") if p.is_file()))
    print((finished_run.folder / "timings.json").read_text())
    print((finished_run.folder / "report.json").read_text()[-6000:])
