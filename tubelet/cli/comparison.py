"""`tubelet compare`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tubelet.cli.app import Json, announcer, app, console, print_json, progress_bar
from tubelet.core.errors import TubeletError

SAMPLE = "sample"
REPEATS = 5


class Precision(StrEnum):
    """Weights and activations."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@app.command()
def compare(
    clip: Annotated[
        str, typer.Argument(help="A video file, or 'sample'; for generators a prompt.")
    ] = SAMPLE,
    model: Annotated[
        str,
        typer.Option(
            help="Preset of an encoder, generator or video LLM, Hugging Face id, local folder, or "
            "a trained VideoDiT."
        ),
    ] = "videomae-base",
    recipe: Annotated[
        list[str] | None,
        typer.Option(help='Such as "ToMe(r=8)"; join with + to combine. Repeatable.'),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for report.json, report.html and clips.")
    ] = Path("out"),
    rate: Annotated[
        float | None,
        typer.Option(min=0.01, help="Frames per second; default: spread over the whole clip."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Copies of the clip in one forward.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs per variant.")] = REPEATS,
    dtype: Annotated[Precision, typer.Option(help="Precision of the model.")] = Precision.bfloat16,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**63 - 1, help="Of a preset's random weights, or of the noise."),
    ] = 0,
    ceiling: Annotated[bool, typer.Option(help="Also time mere slicing.")] = True,
    steps: Annotated[
        int | None, typer.Option(help="Generators: steps of the sampler; default 8.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Generators: 1, the default, turns it off.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a model dense, then with each recipe, on one clip or prompt; write a report."""
    from tubelet.bench.generators.run import is_generator

    if is_generator(model):
        encoders_only = {
            "--rate": rate is not None,
            "--batch": batch != 1,
            "--repeats": repeats != REPEATS,
            "--dtype": dtype is not Precision.bfloat16,
            "--no-ceiling": not ceiling,
        }
        _refuse(encoders_only, f"{model} is a generator")
        options = {"steps": steps, "guidance": guidance, "seed": seed, "device": device}
        given = {name: value for name, value in options.items() if value is not None}
        return _compare_generator(clip, model, tuple(recipe or ()), out, given, as_json)
    if _is_llm(model):
        others_only = {
            "--rate": rate is not None,
            "--batch": batch != 1,
            "--no-ceiling": not ceiling,
            "--steps": steps is not None,
            "--guidance": guidance is not None,
        }
        _refuse(others_only, f"{model} is a video language model")
        options = {"repeats": repeats, "dtype": dtype.value, "device": device, "seed": seed}
        return _compare_llm(clip, model, tuple(recipe or ()), out, options, as_json)
    generators_only = {"--steps": steps is not None, "--guidance": guidance is not None}
    _refuse(generators_only, f"{model} is no generator")
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


def _compare_generator(
    prompt: str,
    model: str,
    recipes: tuple[str, ...],
    out: Path,
    options: dict[str, Any],
    as_json: bool,
) -> None:
    from tubelet.bench.generators.page import FILES
    from tubelet.bench.generators.run import PROMPT, GeneratorRequest, run_generators
    from tubelet.bench.generators.table import rich_table

    request = GeneratorRequest(
        prompt=PROMPT if prompt == SAMPLE else prompt,
        model=model,
        out=out,
        recipes=recipes,
        **options,
    )
    with progress_bar(quiet=as_json) as tell:
        found = run_generators(request, tell, announcer(as_json))
    if as_json:
        return print_json(found.to_dict())
    console.print(rich_table(found))
    for note in found.notes:
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    console.print(f"wrote {', '.join(str(out / name) for name in FILES)}", soft_wrap=True)


def _compare_llm(
    clip: str,
    model: str,
    recipes: tuple[str, ...],
    out: Path,
    options: dict[str, Any],
    as_json: bool,
) -> None:
    """One prompt at a time; `tubelet bench llm` also measures batches, and has more options."""
    from tubelet.bench.llm.run import Request, run_llm
    from tubelet.cli.bench_llm import show_llm

    request = Request(
        out=out,
        preset=model,
        recipes=recipes,
        clip=None if clip == SAMPLE else clip,
        concurrencies=(1,),
        **options,
    )
    with progress_bar(quiet=as_json) as tell:
        runs = run_llm(request, tell, announcer(as_json))
    show_llm(runs, out, as_json)


def _is_llm(model: str) -> bool:
    """Whether it is a preset or folder of a video language model.

    Raises:
        TubeletError: It is one of tubelet's own, which other commands serve.
    """
    from tubelet.models.llm_presets import is_llm
    from tubelet.nn.weights import read_card, shipped

    if model in shipped() and read_card(model).architecture == "VideoLLM":
        raise TubeletError(
            f"{model} is a small video language model of tubelet's: `tubelet ask` compares its "
            "answers on a clip, `tubelet bench answers` counts right ones"
        )
    return is_llm(model)


def _refuse(given: dict[str, bool], why: str) -> None:
    wrong = [name for name, is_given in given.items() if is_given]
    if wrong:
        raise TubeletError(f"{why}, which {', '.join(wrong)} cannot be used with")
