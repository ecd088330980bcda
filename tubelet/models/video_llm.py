"""Facts about video language models in transformers, and what their adapters share."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tubelet.core.context import Site
from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.core.grid import TokenGrid
from tubelet.core.handle import CAPABILITIES, Handle
from tubelet.core.recipe import KVPolicy, LayerReduction, PromptReduction, Recipe, SparsePrefill
from tubelet.models.prompt import VideoPlace, VideoRows
from tubelet.models.vision_statistics import VisionTower

NOT_A_PROMPT = "video language models take recipes for prompts, layers and caches only"

Places = Callable[[Any, Mapping[str, Any], Tensor], list[VideoPlace]]
"""Where the videos are, from the base model, the inputs and the placeholders [B, S] bool."""

Encode = Callable[[Any, Mapping[str, Any], Sequence[VideoPlace]], list[VideoRows]]
"""What the host would write over the placeholders of each video."""

Positions = Callable[[Any, Mapping[str, Any], Tensor, Tensor], Tensor]
"""[3, B, S] positions of a whole prompt, from base model, inputs, ids and mask [B, S]."""


def no_planes(config: Any) -> int:
    """The host adds no features behind its first layers."""
    return 0


@dataclass(frozen=True, kw_only=True)
class VideoLLMAdapter:
    """Facts about a family of video language models.

    Args:
        family: Name for people.
        classes: Model classes it serves.
        text: Path of the language model in `model.model`.
        tower: The vision tower.
        pixels: Argument that holds the video.
        placeholder: Attribute of the config with the id of a video token.
        image_pixels: Argument that holds images, in families that tell them from videos.
        consumed: Further arguments that describe the video, which a shortened prompt goes without.
        places, encode: See the types.
        positions: Three-axis positions; None where positions count tokens.
        deepstack: Layers behind which the host adds visual features, from its config.
        missing: Capabilities that the family lacks, with reasons.
    """

    family: str
    classes: tuple[str, ...]
    text: str = "language_model"
    tower: VisionTower
    pixels: str = "pixel_values_videos"
    placeholder: str = "video_token_id"
    image_pixels: str | None = "pixel_values"
    consumed: tuple[str, ...] = ()
    places: Places
    encode: Encode
    positions: Positions | None = None
    deepstack: Callable[[Any], int] = no_planes
    missing: Mapping[str, str] = field(default_factory=dict)
    fused_by_tubelet: bool = False

    def variants(self) -> dict[str, dict[str, str]]:
        """What the family lacks, by its name."""
        offered = {"video prompt", "kv cache", "class token"}
        lacks = dict.fromkeys(CAPABILITIES.keys() - offered, NOT_A_PROMPT)
        if not self.tower.class_tokens:
            lacks["class token"] = "its vision tower has none"
        return {self.family: {**lacks, **self.missing}}

    def lacks(self, model: Any) -> dict[str, str]:
        """Capabilities that this model does not offer, each with the reason."""
        stated, drift = self.variants()[self.family], self._drift(model)
        drifted = {"video prompt", "kv cache"}
        return stated if drift is None else {**stated, **dict.fromkeys(drifted, drift)}

    def _drift(self, model: Any) -> str | None:
        """What keeps prompts of this very model from being shortened, or None."""
        base = getattr(model, "model", None)
        text = getattr(base, self.text, None)
        if base is None or text is None or not hasattr(text, "layers"):
            return f"model.{self.text}.layers is not where this version of tubelet looks for it"
        taken = inspect.signature(type(base).forward).parameters
        absent = {"input_ids", "inputs_embeds", "position_ids", "attention_mask"} - taken.keys()
        if absent:
            return f"its forward does not take {', '.join(sorted(absent))}"
        return None

    def text_model(self, model: Any) -> Any:
        """The language model behind the projector."""
        return getattr(model.model, self.text)

    def sites(self, model: Any) -> list[Site]:
        """The prompt, then the front of every layer of the language model."""
        num = len(self.text_model(model).layers)
        path = f"model.{self.text}"
        layers = [
            Site(name=f"{path}.layers.{i}", layer=i, num_layers=num, kind="llm") for i in range(num)
        ]
        return [Site(name=path, layer=-1, num_layers=num, kind="prompt"), *layers]

    def install(self, model: Any, recipes: Sequence[Recipe], handle: Handle) -> None:
        """Hook the recipes in."""
        # Imported here: the runtimes import this module.
        from tubelet.models.kv_runtime import KVRuntime
        from tubelet.models.prefill_runtime import PrefillRuntime
        from tubelet.models.prompt_runtime import PromptRuntime

        prompts = PromptRuntime(
            self,
            model,
            [r for r in recipes if isinstance(r, PromptReduction)],
            [r for r in recipes if isinstance(r, LayerReduction)],
            handle,
            takes_text=all(isinstance(r, KVPolicy) for r in recipes),
        )
        prefill = [r for r in recipes if isinstance(r, SparsePrefill)]
        # First, so that those who watch attention calls see the ones that it computes.
        PrefillRuntime(self, model, prefill, prompts.layers, handle).hook()
        prompts.hook()
        # Last, around all others, as it reads what they computed.
        KVRuntime(model, [r for r in recipes if isinstance(r, KVPolicy)], prompts).hook()

    def placeholders(self, model: Any, ids: Tensor) -> Tensor:
        """[B, S] True at video tokens."""
        return ids == getattr(model.config, self.placeholder)


def in_turn(
    found: Tensor, sizes: Sequence[int], grids: Sequence[TokenGrid], rows: Sequence[Tensor]
) -> list[VideoPlace]:
    """Videos that take the placeholders of a batch one after the other.

    Args:
        found: [B, S] bool, placeholders.
        sizes: Placeholders of each video.
        grids: Geometry of each video.
        rows: Which of a video's placeholders are its own tokens.

    Raises:
        ShapeError: The counts differ, or a video would lie in two prompts.
    """
    spots = found.nonzero()
    if sum(sizes) != len(spots):
        raise ShapeError(
            f"{len(sizes)} videos need {sum(sizes)} placeholders, but the prompts hold {len(spots)}"
        )
    samples = spots[:, 0].tolist()
    places, start = [], 0
    for number, (size, grid, own) in enumerate(zip(sizes, grids, rows, strict=True)):
        end = start + size
        if samples[start] != samples[end - 1]:
            raise ShapeError(f"video {number} would lie in two prompts; check the placeholders")
        columns = spots[start:end, 1]
        places.append(VideoPlace(sample=samples[start], columns=columns, grid=grid, grid_rows=own))
        start = end
    return places


def frames_of_prompts(found: Tensor, height: int, width: int) -> list[VideoPlace]:
    """All placeholders of a prompt as one video whose frames are height x width tokens.

    Raises:
        ShapeError: A prompt holds a part of a frame.
    """
    counts, per_frame = found.sum(1).tolist(), height * width
    for sample, count in enumerate(counts):
        if count % per_frame:
            raise ShapeError(
                f"prompt {sample} has {count} placeholders, not a multiple of {per_frame} (the "
                "tokens of a frame)"
            )
    sizes = [count for count in counts if count]
    grids = [TokenGrid(frames=n // per_frame, height=height, width=width) for n in sizes]
    return in_turn(found, sizes, grids, [torch.arange(n, device=found.device) for n in sizes])


def call_encoder(base: Any, name: str, inputs: Mapping[str, Any]) -> Any:
    """The host's own `get_*_features` on the inputs that it takes.

    Raises:
        UnsupportedError: This version of transformers has no such method.
    """
    encoder = getattr(base, name, None)
    if encoder is None:
        raise UnsupportedError(f"{type(base).__name__} has no {name}; transformers has changed")
    taken = inspect.signature(encoder).parameters
    given = {key: inputs[key] for key in taken if key in inputs and key != "kwargs"}
    if "pixel_values_videos" in inputs and "pixel_values_videos" not in taken:
        # Its name up to transformers 5.17.
        given["pixel_values"] = inputs["pixel_values_videos"]
    return encoder(**given, return_dict=True)


def split_rows(features: Any, places: Sequence[VideoPlace]) -> list[Tensor]:
    """Features in any nesting as one [R, C] tensor per video, in order.

    Raises:
        ShapeError: The host made another number of features than the placeholders take.
    """
    if isinstance(features, Tensor):
        flat = features.flatten(0, -2)
    else:
        flat = torch.cat([x.flatten(0, -2) for x in features])
    sizes = [len(place.columns) for place in places]
    if sum(sizes) != len(flat):
        raise ShapeError(f"{len(flat)} video features for {sum(sizes)} placeholders")
    return list(flat.split(sizes))
