"""The same shortened prompt for another engine: indices, positions, and what is written where.

    plan = export_prompt(model, inputs, VidCom2(keep_ratio=0.25))
    plan.to_json("plan.json")            # for engines that gather embeddings themselves
    plan.save_embeddings("prompt.safetensors")   # for engines that take embeddings

Nothing of the language model runs. Recipes that decide inside of it cannot be exported.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import TubeletError, UnsupportedError
from tubelet.core.files import write_whole
from tubelet.core.handle import Handle
from tubelet.core.recipe import PromptReduction, Recipe
from tubelet.models.accelerate import accelerate
from tubelet.models.catalogue import adapter_for
from tubelet.models.prompt import Prompt, VideoPlace, shortened
from tubelet.models.prompt_runtime import PromptRuntime
from tubelet.models.video_llm import VideoLLMAdapter

SCHEMA = 1
KIND = "tubelet prompt"


@dataclass(frozen=True, kw_only=True)
class ExportedVideo:
    """What is left of one video.

    Args:
        grid: Tokens (frames, height, width) of the whole video.
        kept: Place of each output in the whole video, raster order, ascending.
        group: Where tokens were merged: output of each token of the whole video, -1 if it was
            dropped. None where outputs are copies of the tokens at `kept`.
        weight: Where tokens were merged: share of each token in its output.
    """

    grid: tuple[int, int, int]
    kept: list[int]
    group: list[int] | None = None
    weight: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class ExportedPrompt:
    """One prompt, without padding.

    Args:
        whole_length: Tokens before.
        length: Tokens now.
        columns: [length] place of each token in the whole prompt.
        ids: [length] token ids, placeholders included.
        positions: Rotary positions, one list of [length] per axis (time, height, width, or one).
        next_position: Of the first answer token, on every axis; later ones count on.
        decode_offset: `next_position` - `length`: what an engine that counts its own tokens adds
            ("rope delta").
        videos: In order.
    """

    whole_length: int
    length: int
    columns: list[int]
    ids: list[int]
    positions: list[list[int]]
    next_position: int
    decode_offset: int
    videos: list[ExportedVideo]


@dataclass(frozen=True, kw_only=True)
class PromptExport:
    """A batch of prompts.

    Args:
        model: Class of the model.
        recipe: Its name and fields.
        prompts: In order of the batch.
        embeddings: [length, C] of each prompt, as they enter the language model.
        planes: Per prompt more features [length, C], zero at text, that Qwen3-VL adds behind each
            of its first layers.
    """

    model: str
    recipe: dict[str, Any]
    prompts: list[ExportedPrompt]
    embeddings: list[Tensor] = field(repr=False)
    planes: list[list[Tensor]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, without embeddings."""
        prompts = [asdict(prompt) for prompt in self.prompts]
        facts = {"model": self.model, "recipe": self.recipe, "prompts": prompts}
        return {"kind": KIND, "schema": SCHEMA, **facts}

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan; the file appears whole or not at all."""
        return write_whole(path, json.dumps(self.to_dict(), allow_nan=False) + "\n")

    def save_embeddings(self, path: str | os.PathLike[str]) -> Path:
        """Write `embeds.I` of each prompt and `plane.I.J` as safetensors.

        Raises:
            TubeletError: The file cannot be written.
        """
        from safetensors.torch import save_file

        tensors = {f"embeds.{i}": x.cpu().contiguous() for i, x in enumerate(self.embeddings)}
        for i, planes in enumerate(self.planes):
            tensors |= {f"plane.{i}.{j}": x.cpu().contiguous() for j, x in enumerate(planes)}
        try:
            save_file(tensors, path)
        except OSError as error:
            raise TubeletError(f"cannot write {path}: {error.strerror or error}") from None
        return Path(path)


@torch.no_grad()
def export_prompt(model: Any, inputs: Mapping[str, Any], recipe: Recipe) -> PromptExport:
    """What `accelerate(model, recipe)` would feed the language model for these inputs.

    Args:
        model: A video language model in eval mode, without recipes on it.
        inputs: As for `generate`: ids, mask and pixels.
        recipe: A `PromptReduction`.

    Raises:
        UnsupportedError: The recipe decides inside the language model, or the model or the inputs
            cannot be shortened.
        ShapeError: Videos and placeholders do not match.
        ConflictError: The model carries recipes already.
    """
    if not isinstance(recipe, PromptReduction):
        raise UnsupportedError(
            f"{recipe} decides inside the model; only recipes between projector and language model "
            "can be exported"
        )
    # The same checks as for use, before anything is hooked.
    accelerate(model, recipe).remove()
    adapter = adapter_for(model)
    assert isinstance(adapter, VideoLLMAdapter)
    handle = Handle(model, (recipe,))
    try:
        return _Exporter(adapter, model, [recipe], [], handle).export(inputs)
    finally:
        handle.remove()


class _Exporter(PromptRuntime):
    """The runtime of the adapter up to the point where the host would be called."""

    def export(self, inputs: Mapping[str, Any]) -> PromptExport:
        recipe = self.recipe
        assert recipe is not None
        whole, places = self._understand(inputs)
        videos, seen = self._encode(places, inputs)
        plans = self._decide(recipe, whole, places, videos, seen)
        whole = replace(whole, positions=self._positions(whole, inputs))
        # Where nothing is dropped the host numbers the prompt itself.
        policy = "keep" if all(plan is None for plan in plans) else recipe.positions
        short = shortened(whole, places, videos, plans, policy=policy, pad=self._padding())
        embeds, planes = self._embedded(short)
        rows = range(short.batch)
        return PromptExport(
            model=type(self.model).__name__,
            recipe=recipe.to_dict(),
            prompts=[_prompt(whole, short, places, plans, row) for row in rows],
            embeddings=[embeds[row][short.mask[row]] for row in rows],
            planes=[[plane[row][short.mask[row]] for plane in planes] for row in rows],
        )

    def _embedded(self, prompt: Prompt) -> tuple[Tensor, list[Tensor]]:
        """Embeddings [B, S, C] with the videos written in, and the planes at the same places."""
        assert prompt.features is not None
        embeds = self.model.get_input_embeddings()(prompt.ids)
        written = prompt.written[..., None]
        filled = embeds.masked_scatter(written, prompt.features.to(embeds.dtype))
        empty = torch.zeros_like(embeds)
        planes = [empty.masked_scatter(written, x.to(embeds.dtype)) for x in prompt.planes]
        return filled, planes


def _prompt(
    whole: Prompt,
    short: Prompt,
    places: list[VideoPlace],
    plans: list[TokenAssignment | None],
    row: int,
) -> ExportedPrompt:
    real = short.mask[row]
    numbered = whole.mask[row].long().cumsum(0) - 1
    assert short.positions is not None
    axes = short.positions[None] if short.positions.ndim == 2 else short.positions[-3:]
    positions = axes[:, row, real]
    length = int(real.sum())
    # Answers follow the last token of the prompt, which is text: all axes agree there.
    next_position = int(positions[0, -1]) + 1
    return ExportedPrompt(
        whole_length=int(whole.mask[row].sum()),
        length=length,
        columns=numbered[short.index[row, real]].tolist(),
        ids=short.ids[row, real].tolist(),
        positions=positions.tolist(),
        next_position=next_position,
        decode_offset=next_position - length,
        videos=[
            _video(place, plan)
            for place, plan in zip(places, plans, strict=True)
            if place.sample == row
        ],
    )


def _video(place: VideoPlace, plan: TokenAssignment | None) -> ExportedVideo:
    grid = (place.grid.frames, place.grid.height, place.grid.width)
    if plan is None:
        return ExportedVideo(grid=grid, kept=list(range(place.grid.num_video)))
    kept = plan.anchor[0].tolist()
    if plan.copies:
        return ExportedVideo(grid=grid, kept=kept)
    return ExportedVideo(
        grid=grid, kept=kept, group=plan.index[0].tolist(), weight=plan.weight[0].tolist()
    )
