"""The command line. Exit codes: 0 fine, 1 a run failed, 2 wrong usage or input."""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tubelet import __version__
from tubelet.core.errors import TubeletError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Rich would wrap piped tables at 80 columns and fold every cell.
console = Console(width=None if sys.stdout.isatty() else 180)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


class Precision(StrEnum):
    """Weights and activations."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"tubelet {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    """tubelet makes video transformers fast."""


@app.command()
def methods(as_json: Json = False) -> None:
    """List the recipes with their papers and fields."""
    from tubelet.bench.matrix import methods as rows

    if as_json:
        return _print_json(rows())
    table = Table(
        "recipe", "what it does", "paper", "fields", title="Recipes", title_justify="left"
    )
    for row in rows():
        fields = ", ".join(f"{f['name']}={f['default']!r}" for f in row["fields"])
        table.add_row(row["name"], row["summary"], row["paper"] or "-", escape(fields))
    console.print(table)


@app.command()
def models(as_json: Json = False) -> None:
    """Show which recipe runs on which model, and why not where it does not."""
    from tubelet.bench.matrix import support

    rows = support()
    if as_json:
        return _print_json(rows)
    table = Table("model", "presets", *rows[0]["recipes"], title="Support", title_justify="left")
    for row in rows:
        marks = ["yes" if reason is None else "no" for reason in row["recipes"].values()]
        table.add_row(row["model"], ", ".join(row["presets"]) or "-", *marks)
    console.print(table)
    for row in rows:
        for name, reason in row["recipes"].items():
            if reason is not None:
                console.print(f"{row['model']}: {name} {reason}", markup=False, soft_wrap=True)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Tell what works on this machine, what is missing and how to get it."""
    from tubelet.bench.doctor import examine, to_dict

    findings = examine()
    if as_json:
        return _print_json(to_dict(findings))
    table = Table("what", "found", "advice", title="Doctor", title_justify="left")
    for finding in findings:
        mark = "" if finding.fine else "[yellow]"
        table.add_row(finding.what, mark + escape(finding.found), escape(finding.advice))
    console.print(table)


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
    with _progress(quiet=as_json) as tell:
        comparison = run_comparison(request, tell)
    if as_json:
        return _print_json(comparison.to_dict())
    from tubelet.bench.table import rich_table

    console.print(rich_table(comparison))
    for note in comparison.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)
    console.print(f"wrote {out / 'report.json'} and {out / 'report.html'}", soft_wrap=True)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """A callback (what, done, total) that draws a bar on the error stream."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    errors = Console(stderr=True)
    hidden = quiet or not errors.is_terminal
    with Progress(*columns, console=errors, transient=True, disable=hidden) as bar:
        task = bar.add_task("starting", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=escape(what), completed=done, total=total)

        yield tell


def main() -> None:
    """Entry point: errors become one line and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = lambda message, *rest, **named: _say(f"warning: {message}")
    try:
        app(standalone_mode=False)
    except TubeletError as error:
        _fail(str(error), 2)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 1)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            _fail(error.format_message(), error.exit_code)
        if os.environ.get("TUBELET_TRACEBACK"):
            raise
        _fail(f"{type(error).__name__}: {error} (TUBELET_TRACEBACK=1 shows where)", 1)


def _say(message: str) -> None:
    print(" ".join(message.split()), file=sys.stderr)


def _fail(message: str, code: int) -> None:
    _say(f"tubelet: {message}")
    sys.exit(code)
