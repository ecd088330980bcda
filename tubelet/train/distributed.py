"""Several processes that train one model, as torchrun starts them; alone, all of it is a no-op."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tubelet.core.errors import TubeletError, UnsupportedError

PATIENCE = timedelta(hours=1)
"""How long the others wait while rank 0 evaluates or writes."""


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Args:
        rank: Number of this process; rank 0 alone writes and evaluates.
        size: Number of processes.
        device: Where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share_weights(self, model: nn.Module) -> None:
        """Give every process the parameters and buffers of rank 0."""
        if self.size > 1:
            for tensor in model.state_dict().values():
                whole = tensor.contiguous()
                dist.broadcast(whole, 0)
                tensor.copy_(whole)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the processes: one all-reduce per dtype.

        A parameter without gradient counts as zero, since another process may have one.
        """
        if self.size == 1:
            return
        groups: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            groups.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in groups.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
            flat /= self.size
            parts = flat.split([gradient.numel() for gradient in gradients])
            shaped = [p.view(g.shape) for p, g in zip(parts, gradients, strict=True)]
            torch._foreach_copy_(gradients, shaped)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; any that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The value of rank 0, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]


@contextmanager
def open_world(device: str) -> Iterator[World]:
    """Join the processes that torchrun announces in the environment, and leave them at the end.

    Nested calls share the outer one's group. NCCL connects GPUs, Gloo CPUs.

    Args:
        device: "cpu", "cuda" or "cuda:N". With several processes "cuda" becomes cuda:LOCAL_RANK.

    Raises:
        TubeletError: WORLD_SIZE and RANK in the environment make no sense.
        UnsupportedError: There is no such device here.
    """
    size = _environment("WORLD_SIZE", 1)
    place = _place(device, _environment("LOCAL_RANK", 0) if size > 1 else None)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1 and not dist.is_initialized():
        yield World(0, 1, place)
        return
    joined_here = not dist.is_initialized()
    if joined_here:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), place)
        if joined_here:
            # Who leaves while another still talks takes that one down.
            dist.barrier()
    finally:
        if joined_here:
            dist.destroy_process_group()


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit() or (name == "WORLD_SIZE" and int(text) < 1):
        raise TubeletError(
            f"the environment says {name}={text!r}; start with torchrun, or unset it"
        )
    return int(text)


def _place(device: str, local_rank: int | None) -> torch.device:
    place = torch.device(device)
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise UnsupportedError(f"device {device!r} was asked for; torch finds no CUDA GPU here")
        index = (place.index or 0) if local_rank is None else local_rank
        if index >= torch.cuda.device_count():
            raise UnsupportedError(
                f"GPU {index} was asked for; this machine has {torch.cuda.device_count()}"
            )
        return torch.device("cuda", index)
    return place
