"""Clips from tubelet's own generator, read back by the detector."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tubelet.bench.compare import Progress
from tubelet.core.errors import ClipError, TubeletError
from tubelet.models.load import checked_device
from tubelet.nn.flow import METHODS, generate
from tubelet.nn.weights import load_weights
from tubelet.train.clips.sheet import film_strips, tile_clips
from tubelet.train.detector import detect
from tubelet.train.world import complete_attributes, describe, parse_attributes
from tubelet.video import write_video


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """What `tubelet generate` was asked for; see its options."""

    prompts: tuple[str, ...]
    out: Path
    model: str = "tubelet-dit"
    steps: int = 20
    method: str = "euler"
    guidance: float = 1.0
    seed: int = 0
    device: str = "cpu"
    zoom: int = 2
    fps: float = 8


@dataclass(frozen=True)
class Drawn:
    """What was asked for and what the detector finds, in words; seconds of drawing."""

    wanted: list[str]
    found: list[str]
    seconds: float


def draw(request: DrawRequest, progress: Progress) -> Drawn:
    """Generate one clip per prompt and write them into one file.

    Raises:
        TubeletError: Unknown words, model, sampler or device, or a file that cannot be written.
    """
    # What a prompt leaves open is drawn at random: the model never saw rows with single holes.
    wanted = [
        complete_attributes(parse_attributes(prompt)[None], request.seed + number)[0]
        for number, prompt in enumerate(request.prompts)
    ]
    device = checked_device(request.device)
    progress("loading the model", 0, 1)
    model = load_weights(request.model, expect="VideoDiT", device=device)
    _check_out(request.out, request.fps)
    calls = METHODS.get(request.method, 1)
    total = request.steps * len(wanted)
    clips = []
    start = time.perf_counter()
    for number, row in enumerate(wanted):

        def tell(step: int, x: torch.Tensor, v: torch.Tensor, done: int = number) -> None:
            progress(
                f"drawing, {calls} evaluations per step", done * request.steps + step + 1, total
            )

        clips.append(
            generate(
                model,
                row[None],
                seed=request.seed + number,
                steps=request.steps,
                method=request.method,
                guidance=request.guidance,
                dtype=torch.bfloat16,
                callback=tell,
            )
        )
    pixels = torch.cat(clips)
    spent = time.perf_counter() - start
    found = detect(pixels.float())
    layout = film_strips if _is_sheet(request.out) else tile_clips
    _write(request.out, layout(pixels.cpu(), request.zoom), request.fps)
    return Drawn([describe(row) for row in wanted], [describe(row) for row in found], spent)


def _is_sheet(out: Path) -> bool:
    return out.suffix.lower() == ".png"


def _write(out: Path, frames: torch.Tensor, fps: float) -> None:
    if _is_sheet(out):
        write_video(out, frames, 1, codec="png")
    else:
        write_video(out, frames, fps)


def _check_out(out: Path, fps: float) -> None:
    """Write a grey frame beside `out`: what cannot be written shows before minutes of drawing."""
    try:
        if out.is_dir():
            raise IsADirectoryError(0, "it is a folder; name a file inside it")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            probe = Path(folder) / out.name
            try:
                _write(probe, torch.full((1, 3, 16, 16), 128, dtype=torch.uint8), fps)
            except TubeletError as error:
                raise type(error)(str(error).replace(str(probe), str(out))) from None
    except OSError as error:
        raise ClipError(f"cannot write {out}: {error.strerror or error}") from None
