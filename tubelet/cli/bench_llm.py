"""`tubelet bench llm` and `tubelet bench answers`: how fast video LLMs are, and what they lose."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tubelet.cli.app import Json, announcer, console, print_json, progress_bar
from tubelet.cli.bench import bench
from tubelet.cli.options import read_numbers, read_shard, read_words
from tubelet.core.errors import TubeletError


@bench.command()
def llm(
    preset: Annotated[
        str | None,
        typer.Option(
            help="Published video LLM with random weights, or a local folder; default: "
            "qwen3-vl-8b, with --quick tiny-qwen3-vl."
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="Join with + to combine; default: all with --keep. Repeatable."),
    ] = None,
    keep: Annotated[
        float, typer.Option(help="Of all recipes with a keep_ratio, where none is named.")
    ] = 0.25,
    grid: Annotated[
        str | None, typer.Option(help="Video tokens, such as 64x16x16; default: the preset's.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="A video file to read, in place of rendered clips.")
    ] = None,
    question: Annotated[int, typer.Option(help="Words behind the video.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="Answer tokens behind the first.")] = 32,
    concurrency: Annotated[
        str, typer.Option(help="Prompts answered together, comma-separated.")
    ] = "1,8,32",
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Timed runs, in turns with dense.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Keep only so many layers of a preset's LLM.")
    ] = None,
    vision: Annotated[
        str, typer.Option(help="The vision tower: fused where tubelet can, or the host's own.")
    ] = "fused",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of weights, clips and words.")
    ] = 0,
    shard: Annotated[str, typer.Option(help="i/n: run every n-th recipe, from the i-th.")] = "1/1",
    quick: Annotated[bool, typer.Option(help="A smoke test of seconds.")] = False,
    join: Annotated[
        list[Path] | None, typer.Option(help="Join result files instead. Repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/llm"),
    as_json: Json = False,
) -> None:
    """Video LLMs: time to the first token, decoding, throughput; bounds first, then measured."""
    from tubelet.bench.llm.run import Request, join_files, run_llm

    if join:
        runs = join_files(join, out)
    else:
        request = Request(
            out=out,
            preset=preset,
            recipes=tuple(recipe or ()),
            keep=keep,
            grid=None if grid is None else _grid(grid),
            clip=clip,
            question=question,
            new_tokens=new_tokens,
            concurrencies=tuple(map(int, read_numbers(concurrency, (), "--concurrency"))),
            repeats=repeats,
            layers=layers,
            vision=vision,
            dtype=dtype,
            device=device,
            seed=seed,
            shard=read_shard(shard),
            quick=quick,
        )
        with progress_bar(quiet=as_json) as tell:
            runs = run_llm(request, tell, announcer(as_json))
    show_llm(runs, out, as_json)


def show_llm(runs: Sequence[Any], out: Path, as_json: bool) -> None:
    """Measurements of video LLMs (`LLMRun`) as tables with notes, or as JSON."""
    from tubelet.bench.llm.run import FILES
    from tubelet.bench.llm.table import failures, rich_table

    if as_json:
        return print_json([run.to_dict() for run in runs])
    for run in runs:
        console.print(rich_table(run))
        for name, why in failures(run):
            console.print(f"not measured: {name}: {why}", markup=False, soft_wrap=True)
        for note in run.notes:
            console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    console.print(f"wrote {', '.join(str(out / name) for name in FILES)}", soft_wrap=True)


@bench.command()
def answers(
    model: Annotated[
        str | None,
        typer.Option(
            help="Weights of a VideoLLM: a name or file; default: tubelet-llm, with --quick an "
            "untrained one."
        ),
    ] = None,
    kinds: Annotated[str | None, typer.Option(help="Of questions, comma-separated.")] = None,
    backgrounds: Annotated[str | None, typer.Option(help="Comma-separated.")] = None,
    recipes: Annotated[
        str | None,
        typer.Option(help="Beside the controls, comma-separated; two stages joined with +."),
    ] = None,
    keep: Annotated[str | None, typer.Option(help="Budgets in (0, 1), comma-separated.")] = None,
    clips: Annotated[int, typer.Option(min=1, help="Per kind and background.")] = 128,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    shard: Annotated[str, typer.Option(help="i/n: ask every n-th part, from the i-th.")] = "1/1",
    quick: Annotated[bool, typer.Option(help="A smoke test of seconds.")] = False,
    yes: Annotated[bool, typer.Option(help="Run for long on a CPU.")] = False,
    join: Annotated[
        list[Path] | None, typer.Option(help="Join result files instead. Repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/answers"),
    as_json: Json = False,
) -> None:
    """A small video LLM: right answers against kept video tokens, recipe by recipe."""
    from tubelet.bench.answers.run import FILES, Request, join_files, run_answers
    from tubelet.bench.answers.summary import plain
    from tubelet.bench.answers.tables import markdown

    if join:
        run = join_files(join, out)
    else:
        request = Request(
            out=out,
            model=model,
            kinds=read_words(kinds, Request.kinds),
            backgrounds=read_words(backgrounds, Request.backgrounds),
            recipes=read_words(recipes, ()),
            keeps=read_numbers(keep, Request.keeps, "--keep"),
            clips=clips,
            device=device,
            shard=read_shard(shard),
            quick=quick,
            yes=yes,
        )
        with progress_bar(quiet=as_json) as tell:
            run = run_answers(request, tell)
    if as_json:
        return print_json(plain(run))
    console.print(markdown(run), markup=False, highlight=False, soft_wrap=True)
    console.print(f"wrote {', '.join(str(out / name) for name in FILES)}", soft_wrap=True)


def _grid(text: str) -> tuple[int, int, int]:
    try:
        frames, height, width = (int(word) for word in text.lower().split("x"))
    except ValueError:
        raise TubeletError(f"--grid takes sizes such as 64x16x16, got {text!r}") from None
    return frames, height, width
