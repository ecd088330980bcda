"""One pooling call for every device."""

from jaxtyping import Float, Int
from torch import Tensor

from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.kernels.pool import reference, triton_pool

IMPLEMENTATIONS = {"triton": triton_pool, "reference": reference}
"""Fastest first: the order in which `impl="auto"` asks."""


def block_means(
    x: Float[Tensor, "b h n d"],
    block: int,
    order: Int[Tensor, "g n"] | None = None,
    num: int | None = None,
    *,
    impl: str = "auto",
) -> Float[Tensor, "b h m d"]:
    """Mean over the real tokens of each block of consecutive tokens.

    Args:
        x: Queries, keys or values, any float type and any strides.
        block: Tokens per block; the last block holds what is left.
        order: [H or 1, N] permutation: the blocks are cut from x in this order, of which no copy
            is made on a GPU. None keeps the order.
        num: Tokens, from the first of the order, that are real; those behind are padding, and
            whatever they hold does not matter. None when all are.
        impl: "auto", "triton" or "reference". A named one is never replaced by another.

    Returns:
        Means of the ceil(num / block) blocks, at least float32.

    Raises:
        ShapeError: `block` or `num` is out of range, or `order` is for other sizes.
        UnsupportedError: The named implementation cannot take these inputs; the message says why.
    """
    num = x.shape[2] if num is None else num
    if block < 1 or not 1 <= num <= x.shape[2]:
        raise ShapeError(
            f"block_means wants block >= 1 and num in 1..{x.shape[2]}, got {block} and {num}"
        )
    if order is not None and (
        order.ndim != 2 or order.shape[0] not in (1, x.shape[1]) or order.shape[1] != x.shape[2]
    ):
        raise ShapeError(f"the order is {tuple(order.shape)} for tokens {tuple(x.shape)}")
    if impl == "auto":
        impl = next(name for name, m in IMPLEMENTATIONS.items() if m.refuses(x) is None)
    if impl not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise UnsupportedError(f"unknown pooling implementation {impl!r}; use one of {known}")
    module = IMPLEMENTATIONS[impl]
    if (reason := module.refuses(x)) is not None:
        raise UnsupportedError(f"pooling implementation {impl!r} cannot run this: {reason}")
    return module.run(x, block, order, num)
