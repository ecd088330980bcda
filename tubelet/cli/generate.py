"""`tubelet generate`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tubelet.cli.app import Json, app, console, print_json, progress_bar

ZOOM = 2
FPS = 8


@app.command()
def generate(
    prompt: Annotated[
        list[str], typer.Argument(help='Such as "large red triangle moving left on stripes".')
    ],
    model: Annotated[str, typer.Option(help="A trained generator: name or file.")] = "tubelet-dit",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 20,
    method: Annotated[str, typer.Option(help="euler or midpoint.")] = "euler",
    guidance: Annotated[
        float, typer.Option(min=0, help="1 turns guidance off and halves the time.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same clips.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    out: Annotated[
        Path, typer.Option(help="A video, or with suffix .png a sheet with a row per prompt.")
    ] = Path("out/generated.mp4"),
    as_json: Json = False,
) -> None:
    """Generate clips with tubelet's video diffusion transformer and read them back."""
    from tubelet.bench.drawing import DrawRequest, draw

    request = DrawRequest(
        prompts=tuple(prompt),
        model=model,
        steps=steps,
        method=method,
        guidance=guidance,
        seed=seed,
        device=device,
        out=out,
        zoom=ZOOM,
        fps=FPS,
    )
    with progress_bar(quiet=as_json) as tell:
        drawn = draw(request, tell)
    if as_json:
        return print_json(
            {
                "out": str(out),
                "seconds": drawn.seconds,
                "clips": [
                    {"wanted": wanted, "found": found}
                    for wanted, found in zip(drawn.wanted, drawn.found, strict=True)
                ],
            }
        )
    table = Table("asked for", "the detector finds", title_justify="left")
    for wanted, found in zip(drawn.wanted, drawn.found, strict=True):
        table.add_row(wanted, found)
    console.print(table)
    console.print(f"wrote {out} in {drawn.seconds:.0f} s", soft_wrap=True)
