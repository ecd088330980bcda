"""Connected components: tokens that are linked, directly or through others."""

import torch
from jaxtyping import Int
from torch import Tensor


def link(first: Int[Tensor, "e"], second: Int[Tensor, "e"], num: int) -> Int[Tensor, "n"]:
    """Connected components of a graph: the lowest member of each token's component.

    Args:
        first, second: Ends of each edge, in [0, num), in any order.
        num: Tokens.

    Notes:
        Labels sink along edges and jump to their own label until nothing changes, which takes a
        number of rounds about the logarithm of the longest chain.
    """
    label = torch.arange(num, device=first.device)
    while len(first):
        low = torch.minimum(label[first], label[second])
        sunk = label
        for end in (first, second):
            # The component's root learns of the edge too, not its end alone.
            sunk = sunk.scatter_reduce(0, end, low, "amin").scatter_reduce(
                0, label[end], low, "amin"
            )
        sunk = sunk[sunk]
        if torch.equal(sunk, label):
            break
        label = sunk
    return label
