"""How far results may differ, each bound with its reason.

Bounds are absolute, on outputs of size about 1 (the tiny hosts' logits have a standard deviation
between 0.3 and 3). A measured error is given where a bound is not zero, so that a bound is known
to be tight.
"""

import torch

EXACT = 0.0
"""Nothing but the host's own kernels ran on the same tensors: every bit must agree."""

REPLACED_ATTENTION = 2e-5
"""Attention of the host was computed by another kernel or in another token order (TimeSformer:
fused for eager, raster order; any host with a plan on its attention). Summation order differs;
measured 2e-6."""

SPLIT_BATCH = 2e-5
"""The same sample alone and in a batch: matrix kernels choose other blockings for other shapes.
Measured 3e-6."""

ORACLE = 5e-5
"""Explicit loops against batched kernels in float32, over four layers. Measured 4e-6; a wrong
decision on a single token moves the tiny hosts' logits by more than 1e-3."""

DUPLICATES = 2e-5
"""Merging exact copies with a log-size bias is exact mathematics; only rounding remains.
Measured 2e-6."""

COMPILED = 1e-6
"""A plan traced by torch.compile with the eager backend runs the same operators, but may fuse
Python scalars differently. Indices must agree exactly."""

BY_DTYPE = {torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Dense output of a host whose attention was replaced, against the host in the same dtype:
about ten roundings of that dtype over the layers."""
