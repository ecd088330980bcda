"""Block means, step by step: reorder, cut, average."""

import torch
import torch.nn.functional as F
from torch import Tensor


def refuses(x: Tensor) -> str | None:
    """The reference takes everything."""
    return None


def run(x: Tensor, block: int, order: Tensor | None, num: int) -> Tensor:
    """See `tubelet.kernels.pool.block_means`."""
    if order is not None:
        picked = order[:, :num]
        if order.shape[0] == 1:
            x = x.index_select(2, picked[0])
        else:
            x = x.gather(2, picked[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3]))
    x = x[:, :, :num].to(torch.promote_types(x.dtype, torch.float32))
    blocks = -(-num // block)
    sums = F.pad(x, (0, 0, 0, blocks * block - num)).unflatten(2, (blocks, block)).sum(3)
    sizes = torch.full((blocks, 1), float(block), dtype=x.dtype, device=x.device)
    sizes[-1] = num - (blocks - 1) * block
    return sums / sizes
