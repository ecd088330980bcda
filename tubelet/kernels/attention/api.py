"""One attention call for every implementation."""

from dataclasses import replace
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from tubelet.core.errors import UnsupportedError
from tubelet.core.plan import AttentionPlan
from tubelet.kernels.attention import cpu, fa4, flex, reference, sdpa, triton_blocks
from tubelet.kernels.attention.call import Call
from tubelet.kernels.attention.checks import check
from tubelet.kernels.attention.left_out import approximated
from tubelet.kernels.attention.order import for_heads, inverse, permuted, restored

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "sdpa": sdpa,
    "fa4": fa4,
    "triton": triton_blocks,
    "flex": flex,
    "cpu": cpu,
    "reference": reference,
}

PREFERENCES = {
    "dense": ("sdpa", "flex", "reference"),
    "block lists": ("fa4", "triton", "cpu", "flex", "reference"),
    "causal block lists": ("fa4", "triton", "cpu", "flex", "reference"),
    "64 x 64 lists, heads of 64": ("triton", "fa4", "cpu", "flex", "reference"),
}
"""Fastest first: the order in which `impl="auto"` asks, by kind of call, as measured on an H200
(bench/results/attention): Triton is a fifth faster at small blocks of narrow heads."""

TOO_MANY = 2**31
"""Logits beyond which the reference has to be asked for by name."""


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
        plan: Block mask, token order, key bias, temperature and compensation; None is dense. What
            the mask skips never matters, NaN included, except to compensation.
        scale: Factor on the logits, default D ** -0.5; divided by the plan's temperature.
        causal: Query i sees keys 0..i, counted before the plan's order; needs as many queries as
            keys. A mask is narrowed by it: listed blocks that are later than all queries of their
            row are not read, and those on the diagonal are masked token by token. There, later
            keys and values have no weight but must be finite.
        key_bias: Added to every logit of a key, float32; -inf excludes the key, whose tensors
            must still be finite.
        impl: "auto" or a name in IMPLEMENTATIONS. A named one is never replaced by another;
            only the few dense rows of `plan.delta_rows` go elsewhere when it takes lists only.

    Returns:
        Output in q's dtype and the natural log-sum-exp of the scaled, biased logits (float32,
        float64 for float64 inputs). A query without any key gets zeros and -inf. The
        log-sum-exp covers approximated blocks, but neither delta rows nor gain and residual.

    Raises:
        ShapeError: Shapes, dtypes or devices disagree, or the plan is for other sizes.
        UnsupportedError: The named implementation cannot take these inputs, or no one can take
            this combination; the message says why.
    """
    plan = plan or AttentionPlan()
    check(q, k, v, plan, key_bias, causal)
    name = choose(q, k, v, plan, causal=causal, key_bias=key_bias, impl=impl)
    # Without a mask the order is as good as any other.
    order = None if plan.mask is None else plan.order
    call = _ordered(_call(q, k, v, plan, causal, key_bias, scale), order)
    out, lse = IMPLEMENTATIONS[name].run(call)
    if plan.approximate:
        out, lse = approximated(call, out, lse, name)
    if plan.delta_rows is not None and call.mask is not None:
        out = _with_delta_rows(call, out, plan.delta_rows, name)
    if order is not None:
        back = inverse(order)
        out, lse = restored(out, back), permuted(lse[..., None], back)[..., 0]
    return _compensated(out, plan), lse


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan | None = None,
    *,
    causal: bool = False,
    key_bias: Tensor | None = None,
    impl: str = "auto",
) -> str:
    """Name of the implementation that `attention` would run.

    Raises:
        UnsupportedError: `impl` is unknown or cannot take these inputs.
    """
    call = _call(q, k, v, plan or AttentionPlan(), causal, key_bias, None)
    if impl == "auto":
        return _preferred(call)
    if impl not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise UnsupportedError(f"unknown attention implementation {impl!r}; use one of {known}")
    reason = IMPLEMENTATIONS[impl].refuses(call)
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
    key_bias: Tensor | None = None,
) -> str | None:
    """Why an implementation cannot take these inputs, or None; the reference takes all."""
    call = _call(q, k, v, plan or AttentionPlan(), causal, key_bias, None)
    return IMPLEMENTATIONS[impl].refuses(call)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    causal: bool,
    key_bias: Tensor | None,
    scale: float | None,
) -> Call:
    biases = [bias for bias in (key_bias, plan.bias) if bias is not None]
    return Call(
        q=q,
        k=k,
        v=v,
        scale=(q.shape[-1] ** -0.5 if scale is None else scale) / plan.temperature,
        causal=causal,
        key_bias=sum(biases[1:], biases[0]) if biases else None,
        mask=plan.mask,
    )


def _kind(call: Call) -> str:
    if call.mask is None:
        return "dense"
    if call.causal:
        return "causal block lists"
    small = call.mask.block == (64, 64) and call.q.shape[3] == 64
    return "64 x 64 lists, heads of 64" if small else "block lists"


def _preferred(call: Call) -> str:
    names = PREFERENCES[_kind(call)]
    reasons = {name: IMPLEMENTATIONS[name].refuses(call) for name in names}
    name = next(name for name in names if reasons[name] is None)
    logits = call.q.shape[:3].numel() * call.k.shape[2]
    if name == "reference" and logits > TOO_MANY:
        why = "; ".join(f"{other}: {reason}" for other, reason in reasons.items() if reason)
        raise UnsupportedError(
            f"only the reference takes this call, and it would hold {logits:,} logits. {why}"
        )
    return name


def _ordered(call: Call, order: Tensor | None) -> Call:
    """The call in the order of the plan, with only as many keys as the mask speaks of."""
    keys = call.k.shape[2] if call.mask is None else call.mask.num_keys
    q, k, v, key_bias, places = call.q, call.k, call.v, call.key_bias, None
    if order is not None:
        q, (k, v) = permuted(q, order), (permuted(x, order[:, :keys]) for x in (k, v))
        key_bias = None if key_bias is None else key_bias[:, order[0, :keys]]
        if call.causal:
            places = for_heads(order, q.shape[1]).to(torch.int32)
    elif keys < k.shape[2]:
        k, v = k[:, :, :keys], v[:, :, :keys]
        key_bias = None if key_bias is None else key_bias[:, :keys]
    return replace(call, q=q, k=k, v=v, key_bias=key_bias, places=places)


def _with_delta_rows(call: Call, out: Tensor, every: int, name: str) -> Tensor:
    """`out` with what every such query gains by seeing all keys, added to its followers too."""
    rows = replace(call, q=call.q[:, :, ::every], mask=None)
    if IMPLEMENTATIONS[name].refuses(rows) is not None:
        name = _preferred(rows)
    dense, _ = IMPLEMENTATIONS[name].run(rows)
    wide = torch.promote_types(out.dtype, torch.float32)
    gained = dense.to(wide) - out[:, :, ::every].to(wide)
    followers = gained.repeat_interleave(every, dim=2)[:, :, : out.shape[2]]
    return (out + followers).to(call.q.dtype)


def _compensated(out: Tensor, plan: AttentionPlan) -> Tensor:
    result = out if plan.gain is None else out * plan.gain[..., None]
    return (result if plan.residual is None else result + plan.residual).to(out.dtype)
