"""Seconds of one call on the device, and several calls taking turns."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tubelet.bench.measure import interleaved, seconds

WARM_UPS = 2
"""Rounds before the timed ones."""

AHEAD = 16 << 30
"""Bytes written before a timed call: about 4 ms of an H200, so that the host is ahead of it as in
the middle of a model."""


def device_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds that one call keeps the device busy.

    On CUDA events are recorded around it, and the device first clears a buffer: the caches are
    cold, and launching is hidden, as inside a model whose other layers keep the device busy. A
    host that has to wait for the device within the call still shows. Elsewhere wall-clock time.
    """
    if device.type != "cuda":
        return seconds(run, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    buffer = _buffer(device)
    for _ in range(AHEAD // buffer.nbytes):
        buffer.zero_()
    start.record(torch.cuda.current_stream(device))
    run()
    end.record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000


def take_turns(
    runs: Sequence[Callable[[], Any]],
    device: torch.device,
    repeats: int,
    tick: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Samples of `device_seconds` of each call, after WARM_UPS rounds; see `interleaved`."""

    def timed(run: Callable[[], Any]) -> Callable[[], float]:
        return lambda: device_seconds(run, device)

    timers = [timed(run) for run in runs]
    if device.type == "cuda":
        interleaved(timers, WARM_UPS, tick)
    return interleaved(timers, repeats, tick)


@lru_cache(maxsize=1)
def _buffer(device: torch.device) -> Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device=device)
