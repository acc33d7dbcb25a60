"""``python -m cria_dist`` is the ``cria`` command."""

from cria_dist.cli import app

app()
