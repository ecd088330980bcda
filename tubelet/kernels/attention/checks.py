"""Whether the inputs of an attention call fit together."""

from torch import Tensor

from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.core.plan import RANKS, AttentionPlan


def check(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, key_bias: Tensor | None, causal: bool
) -> None:
    """Raise ShapeError or UnsupportedError for what no implementation could run."""
    _check_tensors(q, k, v)
    if causal and q.shape[2] != k.shape[2]:
        raise ShapeError(f"causal attention needs N = M, got {q.shape[2]} and {k.shape[2]}")
    wanted = (k.shape[0], k.shape[2])
    for name, bias in (("key_bias", key_bias), ("plan.bias", plan.bias)):
        if bias is not None and bias.shape != wanted:
            raise ShapeError(f"{name} must be [batch, keys] = {wanted}, got {tuple(bias.shape)}")
    _check_devices(q, plan, key_bias)
    _check_mask(q, k, plan)
    _check_order(q, k, plan, key_bias)
    _check_compensation(q, v, plan, key_bias, causal)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if any(x.ndim != 4 for x in (q, k, v)):
        raise ShapeError(f"attention takes [batch, heads, tokens, width] tensors, got {shapes}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ShapeError(f"attention inputs do not fit together: {shapes}")
    if 0 in (*q.shape, *k.shape) or q.shape[1] % k.shape[1]:
        raise ShapeError(f"query heads must be a multiple of key heads, none empty: {shapes}")
    if len({q.dtype, k.dtype, v.dtype}) > 1 or len({q.device, k.device, v.device}) > 1:
        raise ShapeError("attention inputs must share one dtype and one device")


def _check_devices(q: Tensor, plan: AttentionPlan, key_bias: Tensor | None) -> None:
    named = {f"plan.{name}": getattr(plan, name) for name in RANKS}
    if plan.mask is not None:
        named |= {"plan.mask.counts": plan.mask.counts, "plan.mask.indices": plan.mask.indices}
    for name, value in {"key_bias": key_bias, **named}.items():
        if value is not None and value.device != q.device:
            raise ShapeError(f"{name} is on {value.device}, the queries are on {q.device}")


def _check_mask(q: Tensor, k: Tensor, plan: AttentionPlan) -> None:
    mask = plan.mask
    if mask is None:
        return
    if mask.num_queries != q.shape[2] or mask.num_keys > k.shape[2]:
        raise ShapeError(
            f"the block mask is for {mask.num_queries} x {mask.num_keys} tokens, the call has "
            f"{q.shape[2]} x {k.shape[2]}"
        )
    if any(
        have not in (1, want) for have, want in zip(mask.counts.shape[:2], q.shape[:2], strict=True)
    ):
        raise ShapeError(
            f"the block mask has batch and heads {tuple(mask.counts.shape[:2])}, the call "
            f"{tuple(q.shape[:2])}; use 1 to share one mask"
        )


def _check_order(q: Tensor, k: Tensor, plan: AttentionPlan, key_bias: Tensor | None) -> None:
    order, heads = plan.order, (1, k.shape[1], q.shape[1])
    if order is None:
        return
    if order.shape[0] not in heads or not order.shape[1] == q.shape[2] == k.shape[2]:
        raise ShapeError(
            f"the token order is {tuple(order.shape)}, the call has {q.shape[1]} heads, "
            f"{q.shape[2]} queries and {k.shape[2]} keys"
        )
    if order.shape[0] not in (1, k.shape[1]):
        raise UnsupportedError(
            "a token order per head needs as many key heads as query heads, or one order for all "
            "query heads of a key head"
        )
    if order.shape[0] != 1 and (key_bias is not None or plan.bias is not None):
        raise UnsupportedError("a key bias needs one token order for all heads")


def _check_compensation(
    q: Tensor, v: Tensor, plan: AttentionPlan, key_bias: Tensor | None, causal: bool
) -> None:
    if plan.approximate and (key_bias is not None or plan.bias is not None):
        raise UnsupportedError("blocks cannot be approximated by their means under a key bias")
    if causal and (plan.approximate or plan.delta_rows is not None):
        raise UnsupportedError("causal calls take neither approximate blocks nor delta rows")
    wanted = {"gain": tuple(q.shape[:3]), "residual": (*q.shape[:3], v.shape[3])}
    for name, shape in wanted.items():
        value = getattr(plan, name)
        if value is not None and tuple(value.shape) != shape:
            raise ShapeError(f"plan.{name} must be {shape}, got {tuple(value.shape)}")
