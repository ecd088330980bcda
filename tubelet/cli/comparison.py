"""`tubelet compare`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tubelet.cli.app import Json, app, console, print_json, progress_bar


class Precision(StrEnum):
    """Weights and activations."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@app.command()
def compare(
    clip: Annotated[str, typer.Argument(help="A video file, or 'sample'.")] = "sample",
    model: Annotated[
        str, typer.Option(help="Preset, Hugging Face id or local folder.")
    ] = "videomae-base",
    recipe: Annotated[
        list[str] | None,
        typer.Option(help='Such as "ToMe(r=8)"; join with + to combine. Repeatable.'),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.json and report.html.")] = Path(
        "out"
    ),
    rate: Annotated[
        float | None,
        typer.Option(min=0.01, help="Frames per second; default: spread over the whole clip."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Copies of the clip in one forward.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs per variant.")] = 5,
    dtype: Annotated[Precision, typer.Option(help="Precision of the model.")] = Precision.bfloat16,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of a preset's random weights.")
    ] = 0,
    ceiling: Annotated[bool, typer.Option(help="Also time mere slicing.")] = True,
    as_json: Json = False,
) -> None:
    """Run a model dense, then with each recipe, on one clip; write a report."""
    from tubelet.bench.run import Request, run_comparison

    request = Request(
        clip=clip,
        model=model,
        recipes=tuple(recipe or ()),
        out=out,
        rate=rate,
        batch=batch,
        repeats=repeats,
        dtype=dtype.value,
        device=device,
        seed=seed,
        ceiling=ceiling,
    )
    with progress_bar(quiet=as_json) as tell:
        comparison = run_comparison(request, tell)
    if as_json:
        return print_json(comparison.to_dict())
    from tubelet.bench.table import rich_table

    console.print(rich_table(comparison))
    for note in comparison.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)
    console.print(f"wrote {out / 'report.json'} and {out / 'report.html'}", soft_wrap=True)
