"""The ``cria`` command, one verb per stage of a run and per question about one.

``running.py`` has what runs, ``cluster.py`` what goes to a cluster, ``folders.py`` what reads a finished run.
"""

import typer

from cria_dist.cli import cluster, exports, folders, keys, running
from cria_dist.cli.frame import ConfigPath, Overrides, guarded
from cria_dist.cli.running import main

__all__ = ["app", "guarded", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _add_verb(name: running.Verb, text: str) -> None:
    @app.command(name, help=text)
    def verb(config: ConfigPath, overrides: Overrides = None) -> None:  # pyright: ignore[reportUnusedFunction]  (typer's)
        raise typer.Exit(main([config, *(overrides or [])], name))


for _name, _text in running.VERBS.items():
    _add_verb(_name, _text)
app.command()(cluster.submit)
app.command()(keys.keys)
app.command()(folders.estimate)
app.command()(folders.status)
app.command()(folders.report)
app.command("export-activations")(folders.export_activations)
app.command()(exports.export)
app.command("apply-plan")(exports.apply_plan)
