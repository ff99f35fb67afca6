"""``fastpool optimize``: what ``fastpool.optimize`` makes of a user's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from . import rewrite, terminal
from .users_model import Factory, Place, Shapes, in_words, load


@click.command()
@click.argument("model", type=Factory())
@click.option("--input", "shapes", type=Shapes(), required=True, help="The model's input, as 1x3x224x224; several by commas.")
@click.option("--training", is_flag=True, help="For training: forward and backward.  [default: evaluation]")
@click.option("--channels-last", is_flag=True, help="Model and input in channels_last.  [default: contiguous]")
@click.option("--threads", type=click.IntRange(1), help="Threads.  [default: PyTorch's setting]")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Keep the report in this file too.")
def optimize(
    model: Place, shapes: tuple[tuple[int, ...], ...], training: bool, channels_last: bool, threads: int | None, path: Path | None
) -> None:
    """Rewrite a model's layer order to the cheapest exact form, and say what was done.

    FILE:FACTORY, or MODULE:FACTORY, names the model, its class or a function that makes it.

    The batch-norms that evaluation folds, activations in one pass with the poolings beside them, fastpool's convolutions: each only where
    it measures quicker on the model's own maps, of normal random input. Outputs (gradients too with --training) are checked against
    float64.

    In a program: fastpool.optimize(model, example_input).
    """
    if threads:
        torch.set_num_threads(threads)
    made = load(model)
    if made.training != training:  # else layers in another mode than the model, as frozen batch-norms, stay so
        made.train(training)
    inputs = tuple(torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes)
    if channels_last:
        form = torch.channels_last_3d if inputs[0].dim() == 5 else torch.channels_last
        made = made.to(memory_format=form)  # type: ignore[call-overload]
        inputs = tuple(x.to(memory_format=form) if x.dim() in (4, 5) else x for x in inputs)
    with terminal.progress() as bar:
        task = bar.add_task("optimize", total=None)

        def says(done: int, sites: int) -> None:
            bar.update(task, completed=done, total=sites)

        try:
            report: Any = rewrite.optimize(made, inputs, training=training, progress=says).report
        except Exception as error:  # the user's model runs
            raise in_words(model, "running the model", error) from error
    if path:
        path.write_text(report.to_json() + "\n")
    click.echo(str(report))
