"""`tubelet clips`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tubelet.cli.app import Json, app, console, print_json
from tubelet.core.errors import TubeletError

ZOOM = 3
FPS = 8
MAX_SHOWN = 64
TASK = "direction"


@app.command()
def clips(
    task: Annotated[str, typer.Option(help="Task to draw clips of; see --list.")] = TASK,
    background: Annotated[str, typer.Option(help="black, static, noise, pan or mixed.")] = "static",
    count: Annotated[int, typer.Option(min=1, max=MAX_SHOWN, help="Number of clips.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same clips.")] = 0,
    frames: Annotated[int | None, typer.Option(help="Default: the task's own.")] = None,
    size: Annotated[int, typer.Option(help="Side in pixels.")] = 64,
    out: Annotated[
        Path, typer.Option(help="A video, or with suffix .png a sheet with a row per clip.")
    ] = Path("clips.mp4"),
    questions: Annotated[
        bool, typer.Option("--questions", help="Clips of named objects, each with its questions.")
    ] = False,
    as_list: Annotated[bool, typer.Option("--list", help="List the tasks and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Draw procedural clips with their answers."""
    if as_list:
        return _list_tasks(as_json)
    from tubelet.train.clips import BACKGROUNDS, make_clips
    from tubelet.train.clips.sheet import film_strips, tile_clips
    from tubelet.video import write_video

    def write(pixels: Any) -> None:
        if out.suffix.lower() == ".png":
            write_video(out, film_strips(pixels, ZOOM), 1, codec="png")
        else:
            write_video(out, tile_clips(pixels, ZOOM), FPS)

    if questions:
        if task != TASK:
            raise TubeletError("--questions draws clips of its own; leave out --task")
        from tubelet.train.questions import KINDS, make_questions

        about_objects = [name for name, kind in KINDS.items() if kind.clips == "objects"]
        asked = make_questions(
            count, seed, kinds=about_objects, background=background, frames=frames or 16, size=size
        )
        write(asked.pixels)
        return _show_questions([asked.texts(clip) for clip in range(count)], seed, out, as_json)
    batch = make_clips(task, count, seed, background=background, frames=frames, size=size)
    write(batch.pixels)
    rows = [
        {"clip": number, "label": label, "background": BACKGROUNDS[kind]}
        for number, (label, kind) in enumerate(
            zip(batch.labels.tolist(), batch.backgrounds.tolist(), strict=True)
        )
    ]
    if as_json:
        return print_json({"task": task, "seed": seed, "out": str(out), "clips": rows})
    _show(task, rows)
    console.print(f"wrote {out}", soft_wrap=True)


def _show(name: str, rows: list[dict[str, Any]]) -> None:
    from tubelet.train.clips import TASKS

    task = TASKS[name]
    table = Table("clip", "label", "background", title=task.title, title_justify="left")
    for row in rows:
        label = str(row["label"]) if task.classes > 1 else "per token"
        table.add_row(str(row["clip"]), label, row["background"])
    console.print(table)
    console.print(task.doc, soft_wrap=True)


def _show_questions(
    clips: list[list[tuple[str, str, str]]], seed: int, out: Path, as_json: bool
) -> None:
    if as_json:
        names = ("kind", "question", "answer")
        told = [[dict(zip(names, row, strict=True)) for row in rows] for rows in clips]
        return print_json({"seed": seed, "out": str(out), "clips": told})
    table = Table("clip", "kind", "question", "answer", title="Questions", title_justify="left")
    for number, rows in enumerate(clips):
        for row in rows:
            table.add_row(str(number), *row)
    console.print(table)
    console.print(f"wrote {out}", soft_wrap=True)


def _list_tasks(as_json: bool) -> None:
    from tubelet.train.clips import CORE_TASKS, TASKS

    if as_json:
        facts = ("name", "title", "classes", "frames", "chance", "floor", "floors", "doc")
        return print_json([{key: getattr(task, key) for key in facts} for task in TASKS.values()])
    table = Table(
        "task", "title", "classes", "frames", "chance", "floor", "question", title="Tasks",
        title_justify="left", caption="* core score", caption_justify="left",
    )  # fmt: skip
    for task in TASKS.values():
        mark = "*" if task.name in CORE_TASKS else ""
        shares = [f"{value:.1%}" for value in (task.chance, task.floor)]
        table.add_row(
            task.name + mark, task.title, str(task.classes), str(task.frames), *shares, task.doc
        )
    console.print(table)
