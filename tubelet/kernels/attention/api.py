"""One attention call for every implementation."""

from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.core.plan import AttentionPlan
from tubelet.kernels.attention import flex, reference, sdpa

IMPLEMENTATIONS: dict[str, ModuleType] = {"sdpa": sdpa, "flex": flex, "reference": reference}
"""Fastest first: the order in which `impl="auto"` asks."""


def attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m e"],
    plan: AttentionPlan | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_bias: Float[Tensor, "b m"] | None = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]:
    """Softmax attention with its log-sum-exp.

    Args:
        q: Queries. H is a multiple of the G key heads (grouped queries).
        k: Keys.
        v: Values.
        plan: Block mask, token order, key bias and temperature; None is dense.
        scale: Factor on the logits, default D ** -0.5; divided by the plan's temperature.
        causal: Query i sees keys 0..i; needs as many queries as keys.
        key_bias: Added to every logit of a key, float32; -inf excludes the key.
        impl: "auto", "sdpa", "flex" or "reference". A named one is never replaced by another.

    Returns:
        Output in q's dtype and the natural log-sum-exp of the scaled, biased logits (float32,
        float64 for float64 inputs). A query without any key gets zeros and -inf.

    Raises:
        ShapeError: Shapes, dtypes or devices disagree, or the mask is for other sizes.
        UnsupportedError: The named implementation cannot take these inputs; the message says why.
    """
    _check(q, k, v, plan, key_bias)
    if causal and q.shape[2] != k.shape[2]:
        raise ShapeError(f"causal attention needs N = M, got {q.shape[2]} and {k.shape[2]}")
    plan = plan or AttentionPlan()
    scale = (q.shape[-1] ** -0.5 if scale is None else scale) / plan.temperature
    if plan.bias is not None:
        key_bias = plan.bias if key_bias is None else key_bias + plan.bias
    if plan.order is not None:
        if causal:
            raise ShapeError("a causal call cannot be reordered")
        return _reordered(q, k, v, plan, scale, key_bias, impl)
    module = IMPLEMENTATIONS[choose(q, k, v, plan, causal=causal, impl=impl)]
    return module.run(q, k, v, scale=scale, causal=causal, key_bias=key_bias, mask=plan.mask)


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan | None = None,
    *,
    causal: bool = False,
    impl: str = "auto",
) -> str:
    """Name of the implementation that `attention` would run.

    Raises:
        UnsupportedError: `impl` is unknown or cannot take these inputs.
    """
    if impl == "auto":
        names = IMPLEMENTATIONS
        return next(n for n in names if why_not(n, q, k, v, plan, causal=causal) is None)
    if impl not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise UnsupportedError(f"unknown attention implementation {impl!r}; use one of {known}")
    reason = why_not(impl, q, k, v, plan, causal=causal)
    if reason is not None:
        raise UnsupportedError(f"attention implementation {impl!r} cannot run this: {reason}")
    return impl


def why_not(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan | None = None,
    *,
    causal: bool = False,
) -> str | None:
    """Why an implementation cannot take these inputs, or None; the reference takes all."""
    mask = None if plan is None else plan.mask
    return None if impl == "reference" else IMPLEMENTATIONS[impl].refuses(q, k, v, mask, causal)


def _reordered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scale: float,
    key_bias: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    order = plan.order
    assert order is not None
    if order.shape[0] != 1 and k.shape[1] != q.shape[1]:
        raise UnsupportedError("a token order per head needs as many key heads as query heads")
    if order.shape[0] != 1 and key_bias is not None:
        raise UnsupportedError("a key bias needs one token order for all heads")
    q, k, v = (_permute(x, order) for x in (q, k, v))
    key_bias = None if key_bias is None else key_bias[:, order[0]]
    inner = AttentionPlan(mask=plan.mask)
    out, lse = attention(q, k, v, inner, scale=scale, key_bias=key_bias, impl=impl)
    back = torch.argsort(order, dim=-1)
    return _permute(out, back), _permute(lse[..., None], back)[..., 0]


def _permute(x: Tensor, order: Tensor) -> Tensor:
    if order.shape[0] == 1:
        return x.index_select(2, order[0])
    return x.gather(2, order[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3]))


def _check(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan | None, key_bias: Tensor | None
) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if any(x.ndim != 4 for x in (q, k, v)):
        raise ShapeError(f"attention takes [batch, heads, tokens, width] tensors, got {shapes}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ShapeError(f"attention inputs do not fit together: {shapes}")
    if q.shape[1] % k.shape[1] or 0 in (*q.shape, *k.shape):
        raise ShapeError(f"query heads must be a multiple of key heads, none empty: {shapes}")
    if len({q.dtype, k.dtype, v.dtype}) > 1 or len({q.device, k.device, v.device}) > 1:
        raise ShapeError("attention inputs must share one dtype and one device")
    wanted = (k.shape[0], k.shape[2])
    for name, bias in (("key_bias", key_bias), ("plan.bias", None if plan is None else plan.bias)):
        if bias is not None and bias.shape != wanted:
            raise ShapeError(f"{name} must be [batch, keys] = {wanted}, got {tuple(bias.shape)}")
    if plan is None:
        return
    mask, order = plan.mask, plan.order
    if mask is not None and (mask.num_queries, mask.num_keys) != (q.shape[2], k.shape[2]):
        raise ShapeError(
            f"the block mask is for {mask.num_queries} x {mask.num_keys} tokens, the call has "
            f"{q.shape[2]} x {k.shape[2]}"
        )
    if mask is not None and any(
        have not in (1, want) for have, want in zip(mask.counts.shape[:2], q.shape[:2], strict=True)
    ):
        raise ShapeError(
            f"the block mask has batch and heads {tuple(mask.counts.shape[:2])}, the call "
            f"{tuple(q.shape[:2])}; use 1 to share one mask"
        )
    if order is not None and (
        order.shape[0] not in (1, q.shape[1]) or not order.shape[1] == q.shape[2] == k.shape[2]
    ):
        raise ShapeError(
            f"the token order is {tuple(order.shape)}, the call has {q.shape[1]} heads, "
            f"{q.shape[2]} queries and {k.shape[2]} keys"
        )
