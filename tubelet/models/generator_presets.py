"""Video diffusion transformers at their real sizes, with random weights: for speed, not pictures.

The numbers are those of the public diffusers configurations. Wan 2.1 is checked against the
configuration files of its authors' release; HunyuanVideo and LTX-Video are the defaults of their
diffusers classes; CogVideoX1.5 is from memory, but for its parameter count. The tests hold every
preset to the published number of parameters and of tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tubelet.core.errors import ModelError, ShapeError
from tubelet.core.grid import TokenGrid


@dataclass(frozen=True, kw_only=True)
class GeneratorPreset:
    """One published video diffusion transformer.

    Args:
        name: As in `tubelet bench forward --preset`.
        host: Class in diffusers.
        config: Arguments of that class.
        frames, height, width: Clip of the published setting, in pixels.
        compression: Pixels per latent along (frames, height, width); the first frame is a latent
            of its own.
        patch: Latents per token along the same axes.
        text: Text tokens that the model gets.
        text_place: Where they sit in self-attention: "before" or "after" the video, or "cross"
            when they have attention of their own.
    """

    name: str
    host: str
    config: dict[str, Any]
    frames: int
    height: int
    width: int
    compression: tuple[int, int, int] = (4, 8, 8)
    patch: tuple[int, int, int] = (1, 2, 2)
    text: int
    text_place: str

    def latents(
        self, frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """Latent (frames, height, width) of a clip in pixels; None takes the published setting.

        Raises:
            ShapeError: The clip is smaller than a token.
        """
        clip = (frames or self.frames, height or self.height, width or self.width)
        if min(clip) < 1:
            raise ShapeError(f"a clip of {clip} pixels is empty")
        steps = self.compression
        sizes = ((clip[0] - 1) // steps[0] + 1, clip[1] // steps[1], clip[2] // steps[2])
        # Pipelines pad the latents in time, as CogVideoX1.5 does, and crop in space.
        sizes = tuple(
            -(-n // p) * p if axis == 0 else n // p * p
            for axis, (n, p) in enumerate(zip(sizes, self.patch, strict=True))
        )
        if min(sizes) < 1:
            least = [p * s for p, s in zip(self.patch[1:], steps[1:], strict=True)]
            raise ShapeError(f"{self.name} needs at least {least[0]} x {least[1]} pixels")
        return sizes[0], sizes[1], sizes[2]

    def grid(
        self, frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> TokenGrid:
        """Tokens of self-attention for a clip in pixels."""
        sizes = self.latents(frames, height, width)
        t, h, w = (n // p for n, p in zip(sizes, self.patch, strict=True))
        before, after = (self.text if self.text_place == p else 0 for p in ("before", "after"))
        return TokenGrid(frames=t, height=h, width=w, before=before, after=after)

    def build(
        self,
        *,
        layers: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> Any:
        """The transformer in eval mode with diffusers' initial weights.

        Weights are made on the device in the wanted precision, never on the CPU first; the
        initialisation shrinks, so activations stay finite at any depth.

        Args:
            layers: Keep only so many layers; None keeps all. HunyuanVideo keeps its proportion of
                double- to single-stream layers.
            device: Also "meta", to count parameters.
            dtype: Floating-point precision.
            seed: Of the weights.

        Raises:
            ModelError: `layers` is below 1 or above what the preset has.
        """
        import diffusers

        config = {**self.config, **self._depth(layers)}
        default = torch.get_default_dtype()
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = getattr(diffusers, self.host)(**config)
        finally:
            torch.set_default_dtype(default)
        # Position tables stay in float32, as they do beside a checkpoint in half precision.
        return model.eval().requires_grad_(False)

    def inputs(
        self,
        *,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Arguments of one forward pass with batch 1: random latents and text, step 500."""
        generator = torch.Generator(device=device).manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        arguments = _ARGUMENTS[self.host]
        sizes, clip = self.latents(frames, height, width), self.grid(frames, height, width)
        inputs = arguments(self, sizes, clip, noise, torch.device(device))
        return {**inputs, "return_dict": False}

    @property
    def num_layers(self) -> int:
        """Layers with self-attention over the video."""
        return sum(self._layer_counts().values())

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.config["num_attention_heads"]

    @property
    def head_width(self) -> int:
        """Channels per attention head."""
        return self.config["attention_head_dim"]

    def _layer_counts(self) -> dict[str, int]:
        names = ("num_layers", "num_single_layers")
        return {name: self.config[name] for name in names if name in self.config}

    def _depth(self, layers: int | None) -> dict[str, int]:
        counts, whole = self._layer_counts(), self.num_layers
        if layers is None:
            return counts
        if not 1 <= layers <= whole:
            raise ModelError(f"{self.name} has {whole} layers, cannot keep {layers}")
        first = layers if len(counts) == 1 else round(layers * counts["num_layers"] / whole)
        kept = {"num_layers": first, "num_single_layers": layers - first}
        return {name: kept[name] for name in counts}


def generator_preset(name: str) -> GeneratorPreset:
    """The preset of that name.

    Raises:
        ModelError: There is none; the message lists them.
    """
    if name not in GENERATOR_PRESETS:
        raise ModelError(f"unknown preset {name!r}; there are {', '.join(GENERATOR_PRESETS)}")
    return GENERATOR_PRESETS[name]


def _wan_inputs(
    preset: GeneratorPreset, sizes: tuple[int, ...], grid: TokenGrid, noise: Any, place: Any
) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, preset.config["in_channels"], *sizes),
        "timestep": torch.full((1,), 500, device=place),
        "encoder_hidden_states": noise(1, preset.text, preset.config["text_dim"]),
    }


def _hunyuan_inputs(
    preset: GeneratorPreset, sizes: tuple[int, ...], grid: TokenGrid, noise: Any, place: Any
) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, preset.config["in_channels"], *sizes),
        "timestep": torch.full((1,), 500, device=place),
        "encoder_hidden_states": noise(1, preset.text, preset.config["text_embed_dim"]),
        "encoder_attention_mask": torch.ones(1, preset.text, dtype=torch.bool, device=place),
        "pooled_projections": noise(1, preset.config["pooled_projection_dim"]),
        "guidance": noise(1) + 6000,
    }


def _ltx_inputs(
    preset: GeneratorPreset, sizes: tuple[int, ...], grid: TokenGrid, noise: Any, place: Any
) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, grid.num_video, preset.config["in_channels"]),
        "timestep": torch.full((1, 1), 500, device=place),
        "encoder_hidden_states": noise(1, preset.text, preset.config["caption_channels"]),
        "encoder_attention_mask": torch.ones(1, preset.text, dtype=torch.bool, device=place),
        "num_frames": grid.frames,
        "height": grid.height,
        "width": grid.width,
        # Latent steps in seconds (25 frames each) and in pixels, as its pipeline passes them.
        "rope_interpolation_scale": (8 / 25, 32.0, 32.0),
    }


def _cogvideox_inputs(
    preset: GeneratorPreset, sizes: tuple[int, ...], grid: TokenGrid, noise: Any, place: Any
) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    config, patch = preset.config, preset.config["patch_size"]
    rotary = get_3d_rotary_pos_embed(
        embed_dim=config["attention_head_dim"],
        crops_coords=None,
        grid_size=(grid.height, grid.width),
        temporal_size=grid.frames,
        grid_type="slice",
        max_size=(config["sample_height"] // patch, config["sample_width"] // patch),
        device=place,
    )
    return {
        "hidden_states": noise(1, sizes[0], config["in_channels"], *sizes[1:]),
        "timestep": torch.full((1,), 500, device=place),
        "encoder_hidden_states": noise(1, preset.text, config["text_embed_dim"]),
        "image_rotary_emb": rotary,
    }


_ARGUMENTS = {
    "WanTransformer3DModel": _wan_inputs,
    "HunyuanVideoTransformer3DModel": _hunyuan_inputs,
    "LTXVideoTransformer3DModel": _ltx_inputs,
    "CogVideoXTransformer3DModel": _cogvideox_inputs,
}

_WAN = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}

_HUNYUAN = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
    "rope_axes_dim": (16, 56, 56),
    "guidance_embeds": True,
}

_LTX = {
    "in_channels": 128,
    "out_channels": 128,
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "cross_attention_dim": 2048,
    "num_layers": 28,
    "caption_channels": 4096,
}

_COGVIDEOX = {
    "num_attention_heads": 48,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "text_embed_dim": 4096,
    "num_layers": 42,
    "patch_size": 2,
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_frames": 81,
    "sample_height": 300,
    "sample_width": 300,
    "max_text_seq_length": 226,
    "use_rotary_positional_embeddings": True,
}

GENERATOR_PRESETS = {
    preset.name: preset
    for preset in (
        GeneratorPreset(
            name="wan2.1-1.3b",
            host="WanTransformer3DModel",
            config={**_WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
            frames=81,
            height=480,
            width=832,
            text=512,
            text_place="cross",
        ),
        GeneratorPreset(
            name="wan2.1-14b",
            host="WanTransformer3DModel",
            config={**_WAN, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
            frames=81,
            height=720,
            width=1280,
            text=512,
            text_place="cross",
        ),
        GeneratorPreset(
            name="hunyuanvideo",
            host="HunyuanVideoTransformer3DModel",
            config=_HUNYUAN,
            frames=129,
            height=720,
            width=1280,
            text=256,
            text_place="after",
        ),
        GeneratorPreset(
            name="ltx",
            host="LTXVideoTransformer3DModel",
            config=_LTX,
            frames=121,
            height=512,
            width=768,
            compression=(8, 32, 32),
            patch=(1, 1, 1),
            text=128,
            text_place="cross",
        ),
        GeneratorPreset(
            name="cogvideox1.5-5b",
            host="CogVideoXTransformer3DModel",
            config=_COGVIDEOX,
            frames=81,
            height=768,
            width=1360,
            patch=(2, 2, 2),
            text=226,
            text_place="before",
        ),
    )
}
"""By name, at the published clip sizes."""
