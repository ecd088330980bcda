"""The command line. Exit codes: 0 fine, 1 a run failed, 2 wrong usage or input."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

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


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def announcer(quiet: bool) -> Callable[[str], None]:
    """Prints lines as they come, none where the output is JSON."""

    def announce(words: str) -> None:
        if not quiet:
            console.print(words, markup=False, highlight=False, soft_wrap=True)

    return announce


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Any]:
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
