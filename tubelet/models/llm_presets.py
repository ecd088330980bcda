"""Video language models at their real sizes, with random weights: for speed, not answers.

The sizes are those of the published configurations, from memory; the tests hold each preset to
its published number of parameters, which they meet exactly. `tiny-...` are the same classes with
a few narrow layers, for smoke tests on a CPU.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tubelet.core.errors import ModelError
from tubelet.core.grid import TokenGrid
from tubelet.models.llm_inputs import GEOMETRIES, geometry_of

FOLDER_FRAMES, FOLDER_SIDE = 8, (8, 8)
"""Video tokens that are measured with a model from a folder; its side where its frames may have
any size."""

WORDS_PER_STAMP = 6
"""About as many tokens as a timestamp such as "<12.5 seconds>" takes."""


@dataclass(frozen=True, kw_only=True)
class LLMPreset:
    """One published video language model.

    Args:
        name: As in `tubelet bench llm --preset`.
        host: Class in transformers.
        text, vision: Arguments of its two configs.
        config: Further arguments of the whole config.
        grid: Video tokens (frames, height, width) of the setting that is measured.
        words: [low, high) of ids that are text.
        stamps: Frames stand behind timestamps.
    """

    name: str
    host: str
    text: dict[str, Any]
    vision: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    grid: tuple[int, int, int]
    words: tuple[int, int] = (1000, 100_000)
    stamps: bool = False

    @property
    def video(self) -> TokenGrid:
        """`grid` as geometry."""
        frames, height, width = self.grid
        return TokenGrid(frames=frames, height=height, width=width)

    def make_config(self, layers: int | None = None) -> Any:
        """The config; its language model keeps only so many layers, None keeps all.

        Raises:
            ModelError: `layers` is below 1 or above what the preset has, or so few that the host
                could not add its visual features.
        """
        import transformers

        whole = self.text["num_hidden_layers"]
        least = max(1, len(self.vision.get("deepstack_visual_indexes", ())))
        if layers is not None and not least <= layers <= whole:
            raise ModelError(
                f"{self.name} has {whole} layers, cannot keep {layers}: {least} at least"
            )
        kept = {"num_hidden_layers": whole if layers is None else layers}
        kind = getattr(transformers, self.host).config_class
        return kind(
            text_config={**self.text, **kept},
            vision_config=dict(self.vision),
            tie_word_embeddings=False,
            **self.config,
        )

    def build(
        self,
        *,
        layers: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> Any:
        """The model in eval mode with transformers' initial weights and greedy, endless answers.

        Weights are made on the device in the wanted precision, never on the CPU first.

        Args:
            layers: Of the language model; None keeps all.
            device: Also "meta", to count parameters.
            dtype: Floating-point precision.
            seed: Of the weights.

        Raises:
            ModelError: See `make_config`.
        """
        import transformers

        config = self.make_config(layers)
        default = torch.get_default_dtype()
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = getattr(transformers, self.host)(config)
        finally:
            torch.set_default_dtype(default)
        # Random weights would end an answer anywhere.
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class LoadedLLM:
    """A video language model ready to run.

    Args:
        model: In eval mode, on its device.
        name: The name it was loaded by.
        random_weights: The weights were never trained.
        grid: Video tokens of the setting that is measured.
        words: [low, high) of ids that are text.
        stamps: Frames stand behind timestamps.
        folder: Where its tokenizer may lie; None for presets.
    """

    model: Any
    name: str
    random_weights: bool
    grid: TokenGrid
    words: tuple[int, int]
    stamps: bool
    folder: Path | None = None


def llm_preset(name: str) -> LLMPreset:
    """The preset of that name.

    Raises:
        ModelError: There is none; the message lists them.
    """
    if name not in LLM_PRESETS:
        raise ModelError(f"unknown preset {name!r}; there are {', '.join(LLM_PRESETS)}")
    return LLM_PRESETS[name]


def is_llm(name: str | os.PathLike[str]) -> bool:
    """Whether a name means a preset here, or a folder with a video language model."""
    if os.fspath(name) in LLM_PRESETS:
        return True
    from transformers import AutoConfig

    path = Path(name)
    try:
        return path.is_dir() and AutoConfig.from_pretrained(path).model_type in GEOMETRIES
    except (OSError, ValueError):
        # Too long for the file system, or another kind of folder.
        return False


def load_llm(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    layers: int | None = None,
    seed: int = 0,
) -> LoadedLLM:
    """A preset with random weights, or a model from a local folder.

    Args:
        name: A name of `LLM_PRESETS`, or a folder with `config.json` and weights.
        dtype: Precision of the weights.
        device: Where it runs.
        layers: Of a preset's language model.
        seed: Of a preset's weights.

    Raises:
        ModelError: The name is unknown, what it names does not load, or `layers` was given for a
            folder.
    """
    config, grid = llm_setting(name, layers)
    if os.fspath(name) in LLM_PRESETS:
        preset = LLM_PRESETS[os.fspath(name)]
        model = preset.build(layers=layers, device=device, dtype=dtype, seed=seed)
        return LoadedLLM(
            model=model,
            name=preset.name,
            random_weights=True,
            grid=grid,
            words=preset.words,
            stamps=preset.stamps,
        )
    folder = Path(name)
    return LoadedLLM(
        model=_from_folder(folder, dtype).to(device).eval().requires_grad_(False),
        name=folder.name,
        random_weights=False,
        grid=grid,
        words=(1, min(config.get_text_config().vocab_size, config.video_token_id)),
        stamps=config.model_type == "qwen3_vl",
        folder=folder,
    )


def llm_setting(name: str | os.PathLike[str], layers: int | None = None) -> tuple[Any, TokenGrid]:
    """Config of a preset or folder, and the video tokens of the setting that is measured.

    Nothing is built.

    Raises:
        ModelError: See `load_llm`.
    """
    if os.fspath(name) in LLM_PRESETS:
        preset = LLM_PRESETS[os.fspath(name)]
        return preset.make_config(layers), preset.video
    if layers is not None:
        raise ModelError("only presets can be cut to some layers")
    if not is_llm(name):
        raise ModelError(
            f"{os.fspath(name)!r} is neither a preset ({', '.join(LLM_PRESETS)}) nor a local "
            "folder with a model of Qwen2.5-VL, Qwen3-VL or LLaVA-OneVision"
        )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    height, width = geometry_of(config).side(config) or FOLDER_SIDE
    return config, TokenGrid(frames=FOLDER_FRAMES, height=height, width=width)


def _from_folder(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForImageTextToText

    try:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    except Exception as error:
        # safetensors and transformers each raise their own kinds.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"cannot load model {str(folder)!r}: {reason}") from error


def _rotary(theta: float, section: list[int] | None = None) -> dict[str, Any]:
    split = {} if section is None else {"mrope_section": section}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **split}}


_QWEN_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}

_TINY_IDS = {
    "image_token_id": 100,
    "video_token_id": 101,
    "vision_start_token_id": 102,
    "vision_end_token_id": 103,
}

_QWEN2_7B = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
}

_TINY_TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    # The default of 0.02 leaves attention so flat that no recipe would move an answer.
    "initializer_range": 0.2,
}

_QWEN25_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "out_hidden_size": 3584,
    "tokens_per_second": 2,
}

_QWEN3_VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 4096,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}

_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}

_TINY_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "depth": 3,
    "out_hidden_size": 64,
    "initializer_range": 0.2,
}


def _llava_ids(image: int, video: int) -> dict[str, Any]:
    return {
        "image_token_index": image,
        "video_token_index": video,
        "image_token_id": image,
        "video_token_id": video,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


LLM_PRESETS = {
    preset.name: preset
    for preset in (
        LLMPreset(
            name="qwen2.5-vl-7b",
            host="Qwen2_5_VLForConditionalGeneration",
            text={
                **_QWEN2_7B,
                "max_position_embeddings": 128_000,
                **_rotary(1e6, [16, 24, 24]),
            },
            vision=_QWEN25_VISION,
            config=_QWEN_IDS,
            grid=(64, 16, 16),
        ),
        LLMPreset(
            name="qwen3-vl-8b",
            host="Qwen3VLForConditionalGeneration",
            text={
                "vocab_size": 151_936,
                "hidden_size": 4096,
                "intermediate_size": 12_288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "max_position_embeddings": 262_144,
                "rms_norm_eps": 1e-6,
                **_rotary(5e6, [24, 20, 20]),
            },
            vision=_QWEN3_VISION,
            config=_QWEN_IDS,
            grid=(64, 16, 16),
            stamps=True,
        ),
        LLMPreset(
            name="llava-onevision-7b",
            host="LlavaOnevisionForConditionalGeneration",
            text={
                "model_type": "qwen2",
                **_QWEN2_7B,
                "max_position_embeddings": 32_768,
                **_rotary(1e6),
            },
            vision=_SIGLIP,
            config=_llava_ids(151_646, 151_647),
            grid=(32, 14, 14),
        ),
        LLMPreset(
            name="tiny-qwen2.5-vl",
            host="Qwen2_5_VLForConditionalGeneration",
            text={**_TINY_TEXT, **_rotary(1e4, [2, 3, 3])},
            vision={
                **_QWEN25_VISION,
                **_TINY_TOWER,
                "window_size": 56,
                "fullatt_block_indexes": [1],
            },
            config=_TINY_IDS,
            grid=(8, 4, 4),
            words=(5, 90),
        ),
        LLMPreset(
            name="tiny-qwen3-vl",
            host="Qwen3VLForConditionalGeneration",
            text={**_TINY_TEXT, "head_dim": 16, **_rotary(1e4, [4, 2, 2])},
            vision={
                **_QWEN3_VISION,
                **_TINY_TOWER,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1],
            },
            config=_TINY_IDS,
            grid=(8, 4, 4),
            words=(5, 90),
            stamps=True,
        ),
        LLMPreset(
            name="tiny-llava-onevision",
            host="LlavaOnevisionForConditionalGeneration",
            text={"model_type": "qwen2", **_TINY_TEXT, **_rotary(1e4)},
            vision={
                **_SIGLIP,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 4,
                "initializer_range": 0.2,
            },
            config=_llava_ids(100, 101),
            grid=(8, 4, 4),
            words=(5, 90),
        ),
    )
}
"""By name."""
