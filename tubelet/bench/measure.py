"""Measuring one forward pass: latency, multiply-accumulates, peak memory."""

import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of one call, the device's queue drained before and after."""
    _drain(device)
    start = time.perf_counter()
    run()
    _drain(device)
    return time.perf_counter() - start


def interleaved(
    runs: Sequence[Callable[[], float]],
    repeats: int,
    tick: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Time several variants in turns, so that a drifting clock speed hits all alike.

    Args:
        runs: Each performs one run and returns its seconds.
        repeats: Rounds, >= 1. Every second round goes backwards.
        tick: Called after every run.

    Returns:
        For each variant its `repeats` samples in seconds.
    """
    samples: list[list[float]] = [[] for _ in runs]
    for round_number in range(repeats):
        order = range(len(runs)) if round_number % 2 == 0 else reversed(range(len(runs)))
        for index in order:
            samples[index].append(runs[index]())
            tick()
    return samples


def median(samples: Sequence[float]) -> float:
    """Middle value."""
    return statistics.median(samples)


def count_macs(run: Callable[[], Any]) -> int:
    """Multiply-accumulates of one call: matrix products, convolutions and fused attention."""
    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention_flops(q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> int:
        return sdpa_flop_count(q, k, v)

    with FlopCounterMode(display=False, custom_mapping={cpu_attention: attention_flops}) as counter:
        run()
    return counter.get_total_flops() // 2


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Largest number of bytes of tensors alive at once that one call made itself.

    On CUDA it is the allocator's peak above what was held before. Elsewhere live tensors are
    tracked, which leaves out scratch space inside an operator.
    """
    if device.type == "cuda":
        _drain(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        _drain(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as live:
        run()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Sum of the storages that operators made and that are still referenced."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Storages that come in from outside must not count when a view of them goes out.
        outside = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if _is_tensor(x)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _is_tensor(leaf):
                storage = leaf.untyped_storage()
                if id(storage) not in outside:
                    self._track(storage)
        self.peak = max(self.peak, self.now)
        return result

    def _track(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.now -= size


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _drain(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
