"""Tiny random-weight video transformers of diffusers: real classes that run in milliseconds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tubelet.core.block_mask import BlockMask
from tubelet.core.context import AttentionContext, Site, StepContext
from tubelet.core.grid import TokenGrid
from tubelet.core.handle import Handle
from tubelet.core.plan import AttentionPlan
from tubelet.core.recipe import Recipe, SparseAttention
from tubelet.kernels.attention import attention

GRID = (3, 4, 6)
"""Frames, height and width in tokens; all different, so that no two axes can be confused."""
TEXT = 10
"""Text tokens, padding included."""
VALID = 7
"""Text tokens that are real, where the host has a mask."""

Inputs = dict[str, Any]
_SMALL = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2}


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _latents(batch: int, patch: tuple[int, int, int], channels: int = 4) -> Tensor:
    return _noise(batch, channels, *(n * p for n, p in zip(GRID, patch, strict=True)))


def _mask(batch: int, tokens: int = TEXT, valid: int = VALID) -> Tensor:
    return (torch.arange(tokens) < valid).long().repeat(batch, 1)


def wan(
    batch: int,
    layers: int = 2,
    image: bool = False,
    per_token: bool = False,
    in_channels: int = 4,
) -> Any:
    """Wan; with `image` as I2V has it, with `per_token` timesteps as TI2V has them."""
    from diffusers import WanTransformer3DModel

    extra = {"image_dim": 8, "added_kv_proj_dim": 24} if image else {}
    sizes = {"attention_head_dim": 12, "text_dim": 8, "freq_dim": 16, "ffn_dim": 24}
    shape = {**_SMALL, **sizes, "in_channels": in_channels, "num_layers": layers}
    model = WanTransformer3DModel(**shape, rope_max_seq_len=32, **extra)
    inputs: Inputs = {
        "hidden_states": _latents(batch, (1, 2, 2), in_channels),
        "timestep": torch.full((batch,), 500.0),
        # Hosts with an image split text from it at a fixed 512 tokens.
        "encoder_hidden_states": _noise(batch, 512 if image else TEXT, 8),
    }
    if image:
        inputs["encoder_hidden_states_image"] = _noise(batch, 257, 8)
    if per_token:
        frames, height, width = GRID
        timestep = torch.full((batch, frames * height * width), 500.0)
        # The first frame is given.
        timestep[:, : height * width] = 0.0
        inputs["timestep"] = timestep
    return model, inputs


def wan_i2v(batch: int) -> Any:
    """Wan with cross-attention to an image."""
    return wan(batch, image=True)


def wan_ti2v(batch: int) -> Any:
    """Wan with a timestep per token."""
    return wan(batch, per_token=True)


def hunyuan_video(batch: int, **changes: Any) -> Any:
    """HunyuanVideo: two dual and two single blocks."""
    from diffusers import HunyuanVideoTransformer3DModel

    layers = {"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0}
    text = {"text_embed_dim": 8, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)}
    sizes = {"attention_head_dim": 10, **layers, **text}
    model = HunyuanVideoTransformer3DModel(**_SMALL, **sizes, **changes)
    inputs = {
        "hidden_states": _latents(batch, (1, 2, 2)),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": _noise(batch, TEXT, 8),
        "encoder_attention_mask": _mask(batch),
        "pooled_projections": _noise(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
    }
    return model, inputs


def hunyuan_token_replace(batch: int) -> Any:
    """HunyuanVideo as image-to-video has it: the first frame's tokens are replaced."""
    return hunyuan_video(batch, image_condition_type="token_replace")


def hunyuan_video15(batch: int) -> Any:
    """HunyuanVideo-1.5: 3 image, 4 glyph and 10 text tokens."""
    from diffusers import HunyuanVideo15Transformer3DModel

    text = {"text_embed_dim": 8, "text_embed_2_dim": 8, "image_embed_dim": 8}
    sizes = {"attention_head_dim": 16, "num_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0}
    model = HunyuanVideo15Transformer3DModel(
        **_SMALL, **sizes, **text, rope_axes_dim=(4, 6, 6), task_type="t2v"
    )
    inputs = {
        "hidden_states": _latents(batch, (1, 1, 1)),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": _noise(batch, TEXT, 8),
        "encoder_attention_mask": _mask(batch),
        "encoder_hidden_states_2": _noise(batch, 4, 8),
        "encoder_attention_mask_2": _mask(batch, 4, 2),
        "image_embeds": torch.zeros(batch, 3, 8),
    }
    return model, inputs


def ltx(batch: int) -> Any:
    """LTX-Video; its video arrives packed."""
    from diffusers import LTXVideoTransformer3DModel

    sizes = {"attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 8}
    model = LTXVideoTransformer3DModel(**_SMALL, **sizes, num_layers=2)
    frames, height, width = GRID
    inputs = {
        "hidden_states": _noise(batch, frames * height * width, 4),
        "encoder_hidden_states": _noise(batch, TEXT, 8),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": _mask(batch),
        "num_frames": frames,
        "height": height,
        "width": width,
    }
    return model, inputs


def cogvideox(batch: int, patch_size_t: int | None = None) -> Any:
    """CogVideoX with rotary positions; with `patch_size_t` as version 1.5 has it."""
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = GRID
    sizes = {"attention_head_dim": 16, "time_embed_dim": 4, "text_embed_dim": 8, "num_layers": 2}
    sample = {"sample_height": 2 * height, "sample_width": 2 * width, "sample_frames": 9}
    model = CogVideoXTransformer3DModel(
        **_SMALL,
        **sizes,
        **sample,
        patch_size=2,
        patch_size_t=patch_size_t,
        patch_bias=patch_size_t is None,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )
    angles = get_3d_rotary_pos_embed(
        16, ((0, 0), (height, width)), grid_size=(height, width), temporal_size=frames
    )
    inputs = {
        "hidden_states": _latents(batch, (patch_size_t or 1, 2, 2)).transpose(1, 2),
        "encoder_hidden_states": _noise(batch, TEXT, 8),
        "timestep": torch.full((batch,), 500),
        "image_rotary_emb": angles,
    }
    return model, inputs


def cogvideox15(batch: int) -> Any:
    """CogVideoX 1.5: patches of two frames."""
    return cogvideox(batch, patch_size_t=2)


def mochi(batch: int) -> Any:
    """Mochi; the last block has no text output."""
    from diffusers import MochiTransformer3DModel

    sizes = {"attention_head_dim": 16, "num_layers": 3, "pooled_projection_dim": 16}
    model = MochiTransformer3DModel(
        num_attention_heads=2,
        in_channels=4,
        **sizes,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=TEXT,
    )
    # Zeros, as the class leaves them, would hide a missing rotation.
    torch.nn.init.normal_(model.pos_frequencies)
    inputs = {
        "hidden_states": _latents(batch, (1, 2, 2)),
        "encoder_hidden_states": _noise(batch, TEXT, 16),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": _mask(batch).bool(),
    }
    return model, inputs


def allegro(batch: int) -> Any:
    """Allegro with the mask of ones over its video that some callers give."""
    from diffusers import AllegroTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    frames, height, width = GRID
    sizes = {"attention_head_dim": 12, "num_layers": 2, "cross_attention_dim": 24}
    model = AllegroTransformer3DModel(**_SMALL, **sizes, sample_frames=frames, caption_channels=8)
    *angles, t, h, w = get_3d_rotary_pos_embed_allegro(
        embed_dim=12,
        crops_coords=((0, 0), (height, width)),
        grid_size=(height, width),
        temporal_size=frames,
        interpolation_scale=(1, 1, 1),
        device="cpu",
    )
    positions = torch.cartesian_prod(t.long(), h.long(), w.long()).T[:, None]
    inputs = {
        "hidden_states": _latents(batch, (1, 2, 2)),
        "encoder_hidden_states": _noise(batch, TEXT, 8),
        "timestep": torch.full((batch,), 500),
        "attention_mask": torch.ones(batch, frames, 2 * height, 2 * width),
        "encoder_attention_mask": _mask(batch),
        "image_rotary_emb": (tuple(angles), tuple(positions)),
    }
    return model, inputs


def latte(batch: int) -> Any:
    """Latte: spatial and temporal blocks in turn."""
    from diffusers import LatteTransformer3DModel

    sizes = {"attention_head_dim": 12, "num_layers": 2, "cross_attention_dim": 24}
    model = LatteTransformer3DModel(
        **_SMALL, **sizes, caption_channels=8, sample_size=8, patch_size=2
    )
    return model, {"hidden_states": _noise(batch, 4, 3, 8, 8)}


def sana_video(batch: int) -> Any:
    """SANA-Video: linear attention."""
    from diffusers import SanaVideoTransformer3DModel

    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 12}
    sizes = {"attention_head_dim": 12, "num_layers": 2, "cross_attention_dim": 24, **cross}
    model = SanaVideoTransformer3DModel(**_SMALL, **sizes, caption_channels=8, sample_size=8)
    return model, {"hidden_states": _latents(batch, (1, 2, 2))}


HOSTS: dict[str, Callable[[int], Any]] = {
    "wan": wan,
    "wan_i2v": wan_i2v,
    "wan_ti2v": wan_ti2v,
    "hunyuan_video": hunyuan_video,
    "hunyuan_token_replace": hunyuan_token_replace,
    "hunyuan_video15": hunyuan_video15,
    "ltx": ltx,
    "cogvideox": cogvideox,
    "cogvideox15": cogvideox15,
    "mochi": mochi,
    "allegro": allegro,
}
"""Builders of hosts that take attention recipes: batch size -> model and inputs."""

REFUSED: dict[str, Callable[[int], Any]] = {"latte": latte, "sana_video": sana_video}
"""Builders of hosts that take none."""


def build(name: str, batch: int = 2, seed: int = 0, **changes: Any) -> tuple[Any, Inputs]:
    """A tiny host in eval mode and inputs for it, both seeded.

    Args:
        name: One of `HOSTS` or `REFUSED`.
        batch: Samples, each with its own content.
        seed: Any integer.
        changes: To the builder, such as `layers=12` for Wan.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs = {**HOSTS, **REFUSED}[name](batch, **changes)
        # The small weights of some classes leave attention so flat that errors would hide.
        for path, weight in model.named_parameters():
            if path.rsplit(".", 1)[0].endswith(("to_q", "to_k", "add_q_proj", "add_k_proj")):
                torch.nn.init.normal_(weight, std=0.5)
    return model.eval(), inputs


class Recorder:
    """Stands in for `AttentionRuntime`: carries plans out one by one and writes down its calls."""

    def __init__(self, recipes: Sequence[Recipe], sites: Sequence[Site], handle: Handle) -> None:
        self.sites = list(sites)
        self.begun: list[tuple[TokenGrid, StepContext | None, Sequence[int] | None]] = []
        self.attended: list[tuple[Site, tuple[int, ...]]] = []
        self.ended = 0
        (self._recipe,) = recipes

    @property
    def steps(self) -> list[tuple[int, int | None, str]]:
        """(step, steps of the run, branch) of each forward pass."""
        seen = [step for _, step, _ in self.begun if step is not None]
        return [(step.step, step.num_steps, step.branch) for step in seen]

    def begin(
        self, grid: TokenGrid, step: StepContext | None, lengths: Sequence[int] | None = None
    ) -> None:
        """A forward pass begins."""
        self.begun.append((grid, step, lengths))

    def attend(
        self, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, host: Callable[[], Tensor]
    ) -> Tensor:
        """Sample by sample as the recipe plans it; the host's attention for the empty plan."""
        self.attended.append((site, tuple(q.shape)))
        grid, step, lengths = self.begun[-1]
        rows = []
        for i, n in enumerate(lengths or [q.shape[2]] * len(q)):
            parts = [x[i : i + 1] for x in (q, k[:, :, :n], v[:, :, :n])]
            names = dict(zip(("query", "key", "value"), parts, strict=True))
            ctx = AttentionContext(site=site, grid=grid, scale=scale, step=step, **names)
            plan = self._recipe.plan(ctx)
            if plan.is_dense:
                return host()
            rows.append(attention(*parts, plan, scale=scale, impl="reference")[0])
        return torch.cat(rows)

    def end_run(self) -> None:
        """A run is over."""
        self.ended += 1


@dataclass(frozen=True, kw_only=True)
class Empty(SparseAttention):
    """Plans nothing."""

    def plan(self, ctx: AttentionContext) -> AttentionPlan:
        """The empty plan."""
        return AttentionPlan()


@dataclass(frozen=True, kw_only=True)
class Whole(SparseAttention):
    """Plans a mask that computes every block, so kernels run and nothing changes."""

    def plan(self, ctx: AttentionContext) -> AttentionPlan:
        """All blocks of 16 x 16 tokens."""
        queries, keys = ctx.query.shape[2], ctx.keys
        kept = torch.ones(1, 1, -(-queries // 16), -(-keys // 16), dtype=torch.bool)
        mask = BlockMask.from_dense(kept, block=(16, 16), num_queries=queries, num_keys=keys)
        return AttentionPlan(mask=mask)


@dataclass(frozen=True, kw_only=True)
class FirstBlock(SparseAttention):
    """Attends to the first 16 tokens only, so results change."""

    def plan(self, ctx: AttentionContext) -> AttentionPlan:
        """The first key block for every query block."""
        queries, keys = ctx.query.shape[2], ctx.keys
        kept = torch.zeros(1, 1, -(-queries // 16), -(-keys // 16), dtype=torch.bool)
        kept[..., 0] = True
        mask = BlockMask.from_dense(kept, block=(16, 16), num_queries=queries, num_keys=keys)
        return AttentionPlan(mask=mask)
