"""What a vision tower computes, by operations that cost less.

Each function here but the packed attention stands in for a method of a host's module, whose
place it takes on the instance. Where it would not pay or could not be right, it calls the host's.
"""

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import ShapeError
from tubelet.kernels.rotary import rotary
from tubelet.models.packed_calls import batches
from tubelet.models.watched_attention import uncompiled

PACKED = "tubelet_flash_packed"
"""Name of the packed attention; towers hand all frames over at once to names with "flash" in
them."""

ALIGNMENT = 64
"""Padded widths are multiples of this; cuBLAS falls to slow kernels for rows of memory that are
no multiple of 16 bytes."""

LEAST_ROWS = 2048
"""Patches from which on faster products outweigh padded copies of the weights."""

POOLING = "_tubelet_pooling"
"""Attribute of a model: matrices of its pooling, by tokens, precision and device."""


# Attention


class PackedAttention:
    """Attention within the sequences that lie one behind the other, as transformers calls it.

    With any attention but FlashAttention's package, transformers computes the frames (in
    Qwen2.5-VL windows of 64 patches) one after the other in Python: thousands of launches. Frames
    of one length are a batch for torch's fused attention.
    """

    def __init__(self) -> None:
        # One object, so that another thread never sees the lengths of another call.
        self.last: tuple[Tensor | None, list[int]] = None, []

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        cu_seq_lens_q: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """[1, S, H, D] from [1, H, S, D] each."""
        assert cu_seq_lens_q is not None
        seen, lengths = self.last
        if seen is not cu_seq_lens_q:
            # All layers get the same object; reading it waits for the device.
            lengths = cu_seq_lens_q.diff().tolist()
            if sum(lengths) != query.shape[2]:
                raise ShapeError(
                    f"cu_seqlens ends behind {sum(lengths)} patches, but there are {query.shape[2]}"
                )
            self.last = cu_seq_lens_q, lengths
        return attend(query, key, value, lengths, scaling, dropout), None


packed_attention = PackedAttention()
"""The one that transformers knows."""


def begin(tower: nn.Module, args: Any) -> None:
    """A tower begins anew: what it is given may be the same tensor with other lengths."""
    packed_attention.last = None, []


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    scale: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention within consecutive sequences.

    Args:
        query, key, value: [1, H, S, D].
        lengths: Of the sequences; they add up to S.
        scale: Of the logits; None is 1 / sqrt(D).
        dropout: Of the attention weights.

    Returns:
        [1, S, H, D].
    """
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for rows, (q, k, v) in batches(lengths, query, key, value):
        part = F.scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout)
        part = part.transpose(1, 2).flatten(0, 1)
        if rows is None:
            return part[None]
        out[0, rows] = part
    return out


@uncompiled
def attention(
    self: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    max_seqlen: Any = None,
    **options: Any,
) -> Tensor:
    """Forward of a Qwen tower's attention with a fused rotary embedding.

    Args:
        self: The host's attention module.
        hidden_states: [S, C].
        cu_seqlens: Where its sequences begin and end.
        position_embeddings: Cos and sin, [S, D] each.
        max_seqlen: Longest sequence; None looks it up.

    Returns:
        [S, C].
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    length, name = hidden_states.shape[0], self.config._attn_implementation
    eager = sys.modules[type(self).__module__].eager_attention_forward  # type: ignore[attr-defined]
    call = functools.partial(
        ALL_ATTENTION_FUNCTIONS.get_interface(name, eager),
        self,
        attention_mask=None,
        scaling=self.scaling,
        dropout=self.attention_dropout if self.training else 0.0,
        is_causal=False,
        **options,
    )
    q, k, v = self.qkv(hidden_states).reshape(length, 3, self.num_heads, -1).unbind(1)
    q, k = rotary(q, k, *position_embeddings)
    states = [x[None] for x in (q, k, v.transpose(0, 1))]
    if "flash" in name:
        # Left on the device, as hosts that pass none do.
        longest = cu_seqlens.diff().max() if max_seqlen is None else max_seqlen
        ends = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
        out = call(*states, **ends, max_length_q=longest, max_length_k=longest)[0]
    else:
        sizes = cu_seqlens.diff().tolist()
        parts = zip(*(x.split(sizes, dim=2) for x in states), strict=True)
        out = torch.cat([call(*part)[0] for part in parts], dim=1)
    return self.proj(out.reshape(length, -1).contiguous())


# Patches


def cuts_patches(proj: Any) -> bool:
    """Whether a convolution is a matrix product of patches that do not overlap."""
    return (
        type(proj) is nn.Conv3d
        and proj.kernel_size == proj.stride
        and (set(proj.padding), set(proj.dilation), proj.groups) == ({0}, {1}, 1)
        and ordinary(proj)
    )


def embed_patches(self: Any, hidden_states: Tensor) -> Tensor:
    """Forward of a Qwen tower's patch embedding: [S, C] from [S, pixels of a patch]."""
    proj = self.proj
    if not cuts_patches(proj):
        return type(self).forward(self, hidden_states)
    weight = proj.weight.flatten(1)
    pixels = hidden_states.to(weight.dtype).reshape(-1, weight.shape[1])
    return F.linear(pixels, weight, proj.bias)


# Layers


def layers_of(mlp: Any) -> list[nn.Linear]:
    """The matrices of an MLP whose width tubelet can pad, the one that narrows last; or none."""
    for names in (("gate_proj", "up_proj", "down_proj"), ("linear_fc1", "linear_fc2")):
        layers = [getattr(mlp, name, None) for name in names]
        if all(type(x) is nn.Linear and ordinary(x) for x in layers):
            return layers  # type: ignore[return-value]
    return []


def pads(x: Tensor, layer: nn.Linear) -> bool:
    """Whether the product of rows and a matrix that narrows is faster when padded."""
    return x.is_cuda and uneven(layer) and x.numel() >= LEAST_ROWS * x.shape[-1]


def uneven(layer: nn.Linear) -> bool:
    """Whether a row of a matrix is no multiple of 16 bytes."""
    return layer.in_features * layer.weight.element_size() % 16 != 0


def padded_mlp(self: Any, hidden_state: Tensor) -> Tensor:
    """Forward of an MLP through a wider hidden layer, whose new channels are zero.

    The wider weights are made anew in every call, which reads them once: kept copies would be
    wrong when somebody changes the weights.
    """
    layers = layers_of(self)
    if not layers or not pads(hidden_state, layers[-1]):
        return type(self).forward(self, hidden_state)
    *widening, last = layers
    extra = -last.in_features % ALIGNMENT
    wide = [
        F.linear(
            hidden_state,
            F.pad(layer.weight, (0, 0, 0, extra)),
            None if layer.bias is None else F.pad(layer.bias, (0, extra)),
        )
        for layer in widening
    ]
    hidden = self.act_fn(wide[0])
    if len(wide) == 2:
        hidden = hidden * wide[1]
    return F.linear(hidden, F.pad(last.weight, (0, extra)), last.bias)


def norms(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's own RMSNorm is one kernel and rounds as the host's result is rounded."""
    same = x.is_cuda and x.dtype == weight.dtype and type(weight) is nn.Parameter
    return same and not torch.is_autocast_enabled("cuda")


def rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Forward of an RMSNorm in one kernel, rounded once instead of twice."""
    if not norms(hidden_states, self.weight):
        return type(self).forward(self, hidden_states)
    return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


# Pooling


def pool(self: Any, image_features: Tensor) -> Tensor:
    """LLaVA-OneVision's pooling of frames as one product with a small matrix.

    Args:
        self: The host's base model.
        image_features: [F, N, C].

    Returns:
        [F, M, C], added up in float32 at least, as the host does.
    """
    exact = torch.promote_types(image_features.dtype, torch.float32)
    matrix = _pooling_matrix(self, image_features.shape[1], exact, image_features.device)
    return (matrix @ image_features.to(exact)).to(image_features.dtype)


@uncompiled
def _pooling_matrix(base: Any, num: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[M, N]: what the host makes of the identity, since its pooling is linear."""
    kept = vars(base).setdefault(POOLING, {})
    key = num, dtype, device
    if key not in kept:
        # A tensor made for inference could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            identity = torch.eye(num, dtype=dtype, device=device)
            kept[key] = type(base).apply_pooling(base, identity[None])[0]
    return kept[key]


# Modules of the host


def ordinary(module: nn.Module) -> bool:
    """Whether calling a module does nothing but its class's forward with an ordinary weight.

    Hooks and forwards of its own do more; packages for quantisation put other weights there.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    touched = "forward" in vars(module) or any((*hooks, module._backward_pre_hooks))
    return not touched and type(module.weight) is nn.Parameter
