"""`tubelet train`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tubelet.cli.app import Json, app, console, print_json, progress_bar


@app.command()
def train(
    what: Annotated[
        str, typer.Argument(help="A job, a task or a learned recipe; --list shows all.")
    ] = "encoder",
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Training time; default depends on the job.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Exact steps instead; reproducible bit for bit.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Clips per step, of each task for encoders.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=1e-8, help="Peak of the cosine schedule.")
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="Weights to start from: a shipped name or a file.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=32, help="Side of the clips in pixels.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and clips.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for weights, log and checkpoints.")] = Path(
        "out/train"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cuda",
    quick: Annotated[bool, typer.Option(help="A much smaller model, fit for a CPU.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="torch.compile the model.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in the folder.")] = False,
    list_jobs: Annotated[bool, typer.Option("--list", help="Show what can be trained.")] = False,
    as_json: Json = False,
) -> None:
    """Train an encoder, its reducers or the video generator on procedural clips."""
    from tubelet.train.run import TrainRequest, run_training

    if list_jobs:
        return _list_jobs(as_json)
    request = TrainRequest(
        what=what,
        minutes=minutes,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        init=init,
        size=size,
        seed=seed,
        out=out,
        device=device,
        quick=quick,
        compile=compiled,
        resume=resume,
    )
    with progress_bar(quiet=as_json) as tell:
        outcome = run_training(request, tell)
    if as_json:
        return print_json(outcome.to_dict())
    if not outcome.first:
        return
    table = Table("score", "value", title=f"{what} after {outcome.steps} steps")
    for name, value in outcome.scores.items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    for path in outcome.files:
        console.print(f"wrote {path}", soft_wrap=True)


def _list_jobs(as_json: bool) -> None:
    from tubelet.train.jobs import jobs

    entries = jobs().values()
    if as_json:
        return print_json(
            [{"name": e.name, "summary": e.summary, "minutes": e.minutes} for e in entries]
        )
    table = Table("job", "what it trains", "minutes on one H200", title_justify="left")
    for entry in entries:
        table.add_row(entry.name, entry.summary, f"{entry.minutes:g}")
    console.print(table)
