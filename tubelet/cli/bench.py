"""`tubelet bench`: measured answers to "how good", on clips and models of tubelet's own."""

from pathlib import Path
from typing import Annotated

import typer

from tubelet.cli.app import Json, announcer, app, console, print_json, progress_bar
from tubelet.cli.options import read_numbers, read_shard, read_words
from tubelet.core.errors import TubeletError

bench = typer.Typer(no_args_is_help=True, help="Measure quality against cost.")
app.add_typer(bench, name="bench")


@bench.command()
def fidelity(
    model: Annotated[str, typer.Option(help="Dense encoder: a name or file.")] = "tubelet-vit",
    small: Annotated[
        list[str] | None,
        typer.Option(help="A smaller dense encoder; default: the shipped ones. Repeatable."),
    ] = None,
    trained: Annotated[
        str | None,
        typer.Option(
            help="An encoder with trained reducers; default: the shipped one, but for --quick."
        ),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Comma-separated.")] = None,
    backgrounds: Annotated[str | None, typer.Option(help="Comma-separated.")] = None,
    recipes: Annotated[str | None, typer.Option(help="Methods, comma-separated.")] = None,
    keep: Annotated[str | None, typer.Option(help="Budgets in (0, 1], comma-separated.")] = None,
    clips: Annotated[int, typer.Option(min=1, help="Test clips per cell.")] = 4096,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    shard: Annotated[str, typer.Option(help="i/n: run every n-th cell, from the i-th.")] = "1/1",
    seed_name: Annotated[str, typer.Option(help="Names the models' training seed.")] = "0",
    latency: Annotated[bool, typer.Option(help="Also measure latency.")] = True,
    quick: Annotated[bool, typer.Option(help="A smoke test of minutes on two cores.")] = False,
    yes: Annotated[bool, typer.Option(help="Run for long on a CPU.")] = False,
    join: Annotated[
        list[Path] | None, typer.Option(help="Join result files instead. Repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/fidelity"),
    as_json: Json = False,
) -> None:
    """Accuracy against tokens: recipes beside dense, random, oracle and controls."""
    from tubelet.bench.fidelity.run import Request, join_files, run_fidelity

    if join:
        runs = join_files(join, out)
    else:
        request = Request(
            out=out,
            model=model,
            small=None if small is None else tuple(small),
            trained=trained,
            recipes=read_words(recipes, ()),
            tasks=read_words(tasks, Request.tasks),
            backgrounds=read_words(backgrounds, Request.backgrounds),
            keeps=read_numbers(keep, Request.keeps, "--keep"),
            clips=clips,
            device=device,
            shard=read_shard(shard),
            seed_name=seed_name,
            latency=latency,
            quick=quick,
            yes=yes,
        )
        with progress_bar(quiet=as_json) as tell:
            runs = run_fidelity(request, tell)
    from tubelet.bench.fidelity.summary import summary
    from tubelet.bench.fidelity.tables import docs_table

    if as_json:
        return print_json(summary(runs))
    console.print(docs_table(runs), markup=False, highlight=False, soft_wrap=True)
    files = ", ".join(str(out / name) for name in ("fidelity.html", "fidelity.json"))
    console.print(f"wrote {files}", soft_wrap=True)


@bench.command()
def generation(
    model: Annotated[str, typer.Option(help="A trained VideoDiT: name or file.")] = "tubelet-dit",
    pairs: Annotated[
        int | None,
        typer.Option(min=1, help="Clips drawn in every way; default: 24, with --curves 8."),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Euler steps of the dense run.")] = 24,
    guidance: Annotated[float, typer.Option(min=0, help="1 turns guidance off.")] = 2.0,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="Sparse attention; join with + to combine. Repeatable."),
    ] = None,
    curves: Annotated[
        str | None,
        typer.Option(
            help="Block policies, each from dense to sparse and some with compensation: all, or "
            "names, comma-separated."
        ),
    ] = None,
    dense_steps: Annotated[
        float, typer.Option(help="Warm-up of all curves: share of the steps that stay dense.")
    ] = 0.2,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    shard: Annotated[str, typer.Option(help="i/n: run every n-th way, from the i-th.")] = "1/1",
    quick: Annotated[bool, typer.Option(help="A smoke test on a few small clips.")] = False,
    yes: Annotated[bool, typer.Option(help="Run for long on a CPU.")] = False,
    join: Annotated[
        list[Path] | None, typer.Option(help="Join result files instead. Repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/generation"),
    as_json: Json = False,
) -> None:
    """Same-seed quality of drawn clips against the dense run, with its noise floor."""
    from tubelet.bench.fidelity.generation import GenerationRequest, join_files, run_generation
    from tubelet.bench.fidelity.generation_tables import markdown

    if join:
        found = join_files(join, out)
    else:
        request = GenerationRequest(
            out=out,
            model=model,
            pairs=pairs,
            steps=steps,
            guidance=guidance,
            recipes=tuple(recipe or ()),
            curves=curves,
            dense_steps=dense_steps,
            device=device,
            shard=read_shard(shard),
            quick=quick,
            yes=yes,
        )
        with progress_bar(quiet=as_json) as tell:
            found = run_generation(request, tell, announcer(as_json))
    if as_json:
        return print_json(found.to_dict())
    console.print(markdown(found), markup=False, highlight=False, soft_wrap=True)
    files = ", ".join(str(out / name) for name in ("generation.html", "generation.json"))
    console.print(f"wrote {files}", soft_wrap=True)


@bench.command()
def attention(
    shape: Annotated[
        list[str] | None, typer.Option(help="Such as wan-720p; default: by device. Repeatable.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Instead of the model's own, to bound time.")
    ] = None,
    impl: Annotated[
        list[str] | None, typer.Option(help="Attention implementation; default: all. Repeatable.")
    ] = None,
    density: Annotated[
        str | None, typer.Option(help="Of random lists, in (0, 1], comma-separated.")
    ] = None,
    block: Annotated[
        list[str] | None, typer.Option(help="Of random lists, such as 128x64. Repeatable.")
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help='Policy, such as "DraftAttention(density=0.2)". Repeatable.'),
    ] = None,
    policy_density: Annotated[
        float, typer.Option(help="Of all policies with a density, where none is named.")
    ] = 0.2,
    kernels: Annotated[bool, typer.Option(help="Measure kernels on random lists.")] = True,
    policies: Annotated[bool, typer.Option(help="Measure policies, the whole layer.")] = True,
    inputs: Annotated[
        str | None, typer.Option(help="Of policies: structured,random or one of them.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Timed runs per case.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Of inputs and lists.")] = 0,
    shard: Annotated[str, typer.Option(help="i/n: run every n-th shape, from the i-th.")] = "1/1",
    quick: Annotated[bool, typer.Option(help="A smoke test of seconds.")] = False,
    join: Annotated[
        list[Path] | None, typer.Option(help="Join result files instead. Repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/attention"),
    as_json: Json = False,
) -> None:
    """Speed of attention: kernels on block lists, and whole layers of sparse policies."""
    from tubelet.bench.attention.run import Request, join_files, run_attention
    from tubelet.bench.attention.tables import markdown

    if join:
        runs = join_files(join, out)
    else:
        request = Request(
            out=out,
            shapes=tuple(shape or ()),
            heads=heads,
            impls=tuple(impl or ()),
            blocks=Request.blocks if block is None else tuple(map(_block, block)),
            densities=read_numbers(density, Request.densities, "--density"),
            recipes=tuple(recipe or ()),
            policy_density=policy_density,
            kernels=kernels,
            policies=policies,
            fields=read_words(inputs, Request.fields),
            repeats=repeats,
            device=device,
            seed=seed,
            shard=read_shard(shard),
            quick=quick,
        )
        with progress_bar(quiet=as_json) as tell:
            runs = run_attention(request, tell)
    if as_json:
        return print_json([run.to_dict() for run in runs])
    console.print(markdown(runs), markup=False, highlight=False, soft_wrap=True)
    files = ", ".join(str(out / name) for name in ("attention.json", "attention.md"))
    console.print(f"wrote {files}", soft_wrap=True)


@bench.command()
def forward(
    preset: Annotated[
        str, typer.Option(help="Published transformer, random weights.")
    ] = "wan2.1-14b",
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="Policy; default: DraftAttention(density=0.2). Repeatable."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Keep only so many layers, to bound memory.")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Of the clip.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Of the clip, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of the clip, in pixels.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="Attention backend of diffusers for the dense pass.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes, taking turns.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Of weights and inputs.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for forward.json.")] = Path("out/forward"),
    as_json: Json = False,
) -> None:
    """One forward pass of a real-size transformer, dense and sparse: predicted, then measured."""
    from tubelet.bench.attention.forward import ForwardRequest, run_forward

    request = ForwardRequest(
        out=out,
        preset=preset,
        recipes=tuple(recipe or ForwardRequest.recipes),
        layers=layers,
        frames=frames,
        height=height,
        width=width,
        backend=backend,
        repeats=repeats,
        device=device,
        seed=seed,
    )

    with progress_bar(quiet=as_json) as tell:
        found = run_forward(request, tell, announcer(as_json))
    if as_json:
        return print_json(found)
    console.print(f"wrote {out / 'forward.json'}", soft_wrap=True)


def _block(text: str) -> tuple[int, int]:
    try:
        rows, columns = (int(word) for word in text.lower().split("x"))
    except ValueError:
        raise TubeletError(f"--block takes sizes such as 128x64, got {text!r}") from None
    return rows, columns
