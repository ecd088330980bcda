"""Clips from tubelet's own generator, read back by the detector."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tubelet.bench.compare import Progress
from tubelet.core.errors import TubeletError
from tubelet.models.load import checked_device
from tubelet.nn.flow import METHODS, generate
from tubelet.nn.weights import load_weights
from tubelet.train.clips.sheet import film_strips, tile_clips
from tubelet.train.detector import detect
from tubelet.train.world import describe, parse_attributes
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
    wanted = [parse_attributes(prompt) for prompt in request.prompts]
    device = checked_device(request.device)
    progress("loading the model", 0, 1)
    model = load_weights(request.model, expect="VideoDiT", device=device)
    try:
        request.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TubeletError(f"cannot make {request.out.parent}: {error.strerror}") from None
    calls = METHODS.get(request.method, 1)
    total = request.steps * len(wanted)
    clips = []
    start = time.perf_counter()
    for number, row in enumerate(wanted):

        def tell(step: int, x: torch.Tensor, v: torch.Tensor, done: int = number) -> None:
            progress(f"drawing, {calls} evaluations per step", done * request.steps + step, total)

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
    if request.out.suffix.lower() == ".png":
        write_video(request.out, film_strips(pixels.cpu(), request.zoom), 1, codec="png")
    else:
        write_video(request.out, tile_clips(pixels.cpu(), request.zoom), request.fps)
    return Drawn([describe(row) for row in wanted], [describe(row) for row in found], spent)
