"""Tiny random-weight video language models: real Hugging Face classes and inputs made by hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VIDEO, IMAGE, START, END, PAD = 101, 100, 102, 103, 0
"""Token ids of every tiny model; text ids lie in [5, 90)."""

FRAMES = 4
"""Frames of tokens in a tiny video."""

_TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    # The default of 0.02 leaves attention so flat that errors would hide.
    "initializer_range": 0.2,
}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}


def qwen2_5_vl() -> Any:
    """Qwen2.5-VL: 4 frames of 4 x 4 merged patches per video."""
    import transformers as hf

    config = hf.Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": _mrope([1, 1, 2])},
        vision_config={
            **_qwen_vision(14),
            "depth": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        **_QWEN_IDS,
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> Any:
    """Qwen3-VL: 4 frames of 4 x 4 merged patches, each behind a timestamp; two DeepStack planes."""
    import transformers as hf

    config = hf.Qwen3VLConfig(
        text_config={**_TEXT, "head_dim": 8, "rope_parameters": _mrope([2, 1, 1])},
        vision_config={
            **_qwen_vision(16),
            "depth": 3,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **_QWEN_IDS,
    )
    return hf.Qwen3VLForConditionalGeneration(config)


def llava_onevision() -> Any:
    """LLaVA-OneVision: 4 frames of 4 x 4 pooled tokens and a line break."""
    import transformers as hf

    vision = {**_VISION, "image_size": 32, "patch_size": 4, "vision_use_head": False}
    config = hf.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **_TEXT},
        vision_config={"model_type": "siglip_vision_model", **vision},
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def internvl() -> Any:
    """InternVL: 4 frames of 4 x 4 tokens, each an image behind a few words."""
    import transformers as hf

    config = hf.InternVLConfig(
        text_config={"model_type": "qwen2", **_TEXT},
        vision_config={
            **_VISION,
            "image_size": [32, 32],
            "patch_size": [4, 4],
            "use_absolute_position_embeddings": True,
        },
        image_token_id=IMAGE,
        image_seq_length=16,
        downsample_ratio=0.5,
    )
    return hf.InternVLForConditionalGeneration(config)


def video_llava() -> Any:
    """VideoLLaVA: 4 frames of a class token and 4 x 4 patches."""
    import transformers as hf

    vision = {**_VISION, "image_size": 16, "patch_size": 4, "projection_dim": 32}
    config = hf.VideoLlavaConfig(
        text_config={"model_type": "llama", **_TEXT},
        vision_config={"model_type": "clip_vision_model", **vision},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_feature_layer=-2,
    )
    return hf.VideoLlavaForConditionalGeneration(config)


def smolvlm() -> Any:
    """SmolVLM2: 4 frames of 4 x 4 tokens, each an image behind a few words."""
    import transformers as hf

    config = hf.SmolVLMConfig(
        text_config={"model_type": "llama", **_TEXT},
        vision_config={**_VISION, "image_size": 32, "patch_size": 4},
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return hf.SmolVLMForConditionalGeneration(config)


@dataclass(frozen=True)
class TinyLLM:
    """How to build a tiny model and its inputs.

    Args:
        build: Makes the model.
        pixels: (frames, generator) to one video's pixels.
        video_ids: frames to a video's part of the prompt.
        collate: Videos to the model's pixel arguments.
        placeholder: Token id of its video tokens.
        deepstack: Layers behind which it adds visual features.
        images: It takes frames as images.
    """

    build: Callable[[], Any]
    pixels: Callable[[int, torch.Generator], Tensor]
    video_ids: Callable[[int], list[int]]
    collate: Callable[[Sequence[Tensor], Sequence[int]], dict[str, Tensor]]
    placeholder: int = VIDEO
    deepstack: int = 0
    images: bool = False


def _mrope(section: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": section, "rope_theta": 1e4}


def _qwen_vision(patch: int) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "in_channels": 3,
        "initializer_range": 0.2,
    }


def _qwen_pixels(patch: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda frames, g: torch.randn(frames * 64, 3 * 2 * patch * patch, generator=g)


def _qwen_collate(videos: Sequence[Tensor], prompts: Sequence[int]) -> dict[str, Tensor]:
    grids = torch.tensor([[len(video) // 64, 8, 8] for video in videos])
    return {"pixel_values_videos": torch.cat(list(videos)), "video_grid_thw": grids}


def _timed_collate(videos: Sequence[Tensor], prompts: Sequence[int]) -> dict[str, Tensor]:
    return {**_qwen_collate(videos, prompts), "second_per_grid_ts": torch.ones(len(videos))}


def _square(side: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda frames, g: torch.randn(frames, 3, side, side, generator=g)


def _stacked(videos: Sequence[Tensor], prompts: Sequence[int]) -> dict[str, Tensor]:
    return {"pixel_values_videos": torch.stack(list(videos))}


def _images(videos: Sequence[Tensor], prompts: Sequence[int]) -> dict[str, Tensor]:
    return {"pixel_values": torch.cat(list(videos))}


def _images_of_prompts(videos: Sequence[Tensor], prompts: Sequence[int]) -> dict[str, Tensor]:
    parts = [
        torch.cat([v for v, p in zip(videos, prompts, strict=True) if p == prompt])
        for prompt in sorted(set(prompts))
    ]
    longest = max(len(part) for part in parts)
    # Frames that are all zero are padding to this host.
    padded = [torch.nn.functional.pad(x, (0, 0) * 3 + (0, longest - len(x))) for x in parts]
    return {"pixel_values": torch.stack(padded)}


def _timestamped(tokens: list[int]) -> Callable[[int], list[int]]:
    return lambda frames: [t for f in range(frames) for t in (5 + f, 40 + f, *tokens)]


HOSTS: dict[str, TinyLLM] = {
    "qwen2_5_vl": TinyLLM(
        qwen2_5_vl,
        _qwen_pixels(14),
        lambda frames: [START, *[VIDEO] * 16 * frames, END],
        _timed_collate,
    ),
    "qwen3_vl": TinyLLM(
        qwen3_vl,
        _qwen_pixels(16),
        _timestamped([START, *[VIDEO] * 16, END]),
        _qwen_collate,
        deepstack=2,
    ),
    "llava_onevision": TinyLLM(
        llava_onevision, _square(32), lambda frames: [VIDEO] * (16 * frames + 1), _stacked
    ),
    "internvl": TinyLLM(
        internvl, _square(32), _timestamped([IMAGE] * 16), _images, IMAGE, images=True
    ),
    "video_llava": TinyLLM(
        video_llava, _square(16), lambda frames: [VIDEO] * (17 * frames), _stacked
    ),
    "smolvlm": TinyLLM(
        smolvlm, _square(32), _timestamped([IMAGE] * 16), _images_of_prompts, IMAGE, images=True
    ),
}
"""Builders by name."""


def build(name: str, seed: int = 0) -> Any:
    """A tiny model in eval mode with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HOSTS[name].build().eval()


def prompt(
    name: str,
    videos: Sequence[Sequence[int]] = ((FRAMES,),),
    *,
    seed: int = 0,
    question: Sequence[int] = (6,),
    side: str = "left",
) -> dict[str, Tensor]:
    """Inputs of a batch of prompts: a few words, then each video, then a question.

    Args:
        name: One of `HOSTS`.
        videos: Frames of each video of each prompt; a prompt without any is text only.
        seed: Any integer; sample i of a batch has the content of `prompt(..., seed=seed + i)`.
        question: Words of each prompt's question, repeated for the batch.
        side: Where shorter prompts are padded.
    """
    host = HOSTS[name]
    rows, clips, owners = [], [], []
    for number, lengths in enumerate(videos):
        g = torch.Generator().manual_seed(seed + number)
        ids = _words(5, g)
        for frames in lengths:
            ids += host.video_ids(frames)
            clips.append(_still_in_part(host.pixels(frames, g), frames))
            owners.append(number)
            ids += _words(2, g)
        rows.append(ids + _words(question[number % len(question)], g))
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        part = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[number, part] = torch.tensor(row)
        mask[number, part] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == VIDEO).int() * 2
    return inputs | (host.collate(clips, owners) if clips else {})


def _words(num: int, generator: torch.Generator) -> list[int]:
    return torch.randint(5, 90, (num,), generator=generator).tolist()


def _still_in_part(pixels: Tensor, frames: int) -> Tensor:
    """The same pixels with the first quarter of each frame standing still."""
    by_frame = pixels.reshape(frames, -1).clone()
    quarter = by_frame.shape[1] // 4
    by_frame[:, :quarter] = by_frame[:1, :quarter]
    return by_frame.reshape(pixels.shape)
