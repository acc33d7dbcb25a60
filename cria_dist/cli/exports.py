"""The verbs that turn a finished model into what another program loads, or a plan into a checkpoint."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from cria_dist.cli.frame import guarded

Source = Annotated[str, typer.Argument(help="Run folder, checkpoint, hub name or builtin:NAME.")]
Target = Annotated[Path, typer.Argument(help="New file (gguf, onnx) or folder (decilm).")]
Form = Annotated[
    Literal["gguf", "decilm", "onnx"],
    typer.Option("--format", help="gguf for llama.cpp, decilm for vLLM, onnx for classifiers."),
]


def export(source: Source, out: Target, form: Form = "gguf") -> None:
    """Write a model for llama.cpp, vLLM or onnxruntime, layers of different widths included."""

    def action() -> None:
        from cria_dist.stages.export_model import export_model  # torch and transformers; see running.py

        Console().print(export_model(source, out, form), soft_wrap=True, highlight=False)

    raise typer.Exit(guarded(action))


def apply_plan(
    plan: Annotated[Path, typer.Argument(help="plan.json of a pruned checkpoint.")],
    base: Annotated[str, typer.Argument(help="The model it was made of: a folder, hub name or builtin:NAME.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    replaced: Annotated[
        Path | None, typer.Option(help="The run's repair or masks folder; found by itself beside RUN/pruned/plan.json.")
    ] = None,
) -> None:
    """Make a pruned checkpoint again from its plan and the base model, bit for bit."""

    def action() -> None:
        from cria_dist.stages.export_plan import apply_plan as carry_out  # torch and transformers; see running.py

        Console().print(carry_out(plan, base, out, replaced), soft_wrap=True, highlight=False)

    raise typer.Exit(guarded(action))
