"""The files of a comparison: report, page, video and contact sheet, all of them or none."""

import base64
import os
import tempfile
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tubelet.bench.generators.result import GeneratorComparison
from tubelet.bench.generators.svg import error_curves, heat_map, time_bars
from tubelet.bench.generators.table import COLUMNS, cells, heading
from tubelet.bench.pictures import jpeg
from tubelet.core.errors import TubeletError
from tubelet.core.files import write_whole
from tubelet.train.clips.sheet import film_strips, tile_clips
from tubelet.video import write_video

FILES = ("report.json", "report.html", "compare.mp4", "sheet.png")

FPS, ZOOM = 8, 2
"""Of the video."""

FRAMES_SHOWN = 8
"""Of each variant on the page; the sheet has them all."""


def write_folder(out: Path, found: GeneratorComparison, pixels: Float[Tensor, "v t 3 h w"]) -> None:
    """Write `FILES`; each appears only when all have been made.

    Args:
        out: Folder; made when missing.
        found: The figures.
        pixels: Clips of the rows, in [0, 1].

    Raises:
        TubeletError: The folder cannot be written; what was there before stays.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".tubelet-") as name:
            folder = Path(name)
            write_video(folder / "compare.mp4", tile_clips(pixels, ZOOM), FPS)
            write_video(folder / "sheet.png", film_strips(pixels, 1), 1, codec="png")
            video = (folder / "compare.mp4").read_bytes()
            write_whole(folder / "report.html", render(found, pixels, video))
            found.to_json(folder / "report.json")
            for file in FILES:
                os.replace(folder / file, out / file)
    except OSError as error:
        raise TubeletError(f"cannot write to {out}: {error.strerror or error}") from None


def render(found: GeneratorComparison, pixels: Float[Tensor, "v t 3 h w"], video: bytes) -> str:
    """One self-contained HTML page: no script, no network.

    Args:
        found: The figures.
        pixels: Clips of the rows, in [0, 1].
        video: MP4 of all of them.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # The style of all pages lies with those of the fidelity bench.
    folders = [Path(__file__).parent, Path(__file__).parents[1] / "fidelity"]
    templates = Environment(
        loader=FileSystemLoader(folders), autoescape=True, undefined=StrictUndefined
    )
    page = templates.get_template("generators.html.jinja")
    return page.render(
        found=found,
        heading=heading(found),
        columns=COLUMNS,
        table=[cells(row, found) for row in found.rows],
        video="data:video/mp4;base64," + base64.b64encode(video).decode(),
        strips=_strips(found, pixels),
        curves=error_curves(found.rows[1:]),
        bars=time_bars(found),
        maps=_maps(found),
    )


def _strips(found: GeneratorComparison, pixels: Tensor) -> list[dict[str, Any]]:
    step = -(-pixels.shape[1] // FRAMES_SHOWN)
    return [
        {"row": row, "images": [jpeg(image) for image in clip[::step]]}
        for row, clip in zip(found.rows, pixels, strict=True)
    ]


def _maps(found: GeneratorComparison) -> list[dict[str, Any]]:
    return [
        {
            "number": number,
            "row": row,
            # One list for all heads.
            "shared": bool(row.by_head) and len(row.by_head[0]) == 1,
            "by_step": heat_map(row.by_step, f"density of {row.name} by layer and step", "step"),
            "by_head": heat_map(row.by_head, f"density of {row.name} by layer and head", "head"),
        }
        for number, row in enumerate(found.rows[1:], 2)
    ]
