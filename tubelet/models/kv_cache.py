"""Layers of transformers' growing cache whose tokens may be stored in fewer bits."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

from torch import Tensor

from tubelet.core.errors import UnsupportedError
from tubelet.kernels.cache import PackedChunk, RawChunk

PLAIN = "DynamicLayer"
"""The one kind of cache layer that `take_over` replaces."""


@cache
def stored_layer() -> type[Any]:
    """The class, made when first asked for since its base is in transformers."""
    from transformers.cache_utils import DynamicLayer

    class StoredLayer(DynamicLayer):
        """Chunks that were decided on, and behind them the tokens that came since.

        Without chunks it is the layer that it replaces. What moves prompts or takes tokens back
        is refused: the decisions belong to the tokens in their order.
        """

        is_croppable = False

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.chunks: list[PackedChunk | RawChunk] = []

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            tail = super().update(key_states, value_states, *args, **kwargs)
            if not self.chunks:
                return tail
            return self._whole(*tail)

        def _whole(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            """All that is held with the tail behind it, restored where it belongs."""
            sizes = [*(chunk.shape[2] for chunk in self.chunks), keys.shape[2]]
            batch, heads, _, channels = keys.shape
            found = [x.new_empty(batch, heads, sum(sizes), channels) for x in (keys, values)]
            start = 0
            for chunk, size in zip(self.chunks, sizes[:-1], strict=True):
                # What `split` gives cannot be written to where gradients are recorded.
                chunk.restore_into(*(x.narrow(2, start, size) for x in found))
                start += size
            for whole, x in zip(found, (keys, values), strict=True):
                whole.narrow(2, start, sizes[-1]).copy_(x)
            return found[0], found[1]

        @property
        def num_waiting(self) -> int:
            """Tokens that are held as they came, behind the chunks."""
            return super().get_seq_length()

        def get_seq_length(self) -> int:
            return sum(chunk.shape[2] for chunk in self.chunks) + self.num_waiting

        def store(self, columns: Sequence[Tensor], bits: Sequence[Tensor | None]) -> dict[int, int]:
            """Make a chunk of the waiting tokens; see `PackedChunk.of`.

            Returns:
                How many of them have how many bits now; nothing where no token was decided on.
            """
            keys, values = self._tail()
            if all(wanted is None for wanted in bits):
                chunk, counts = RawChunk(keys=keys, values=values), {}
            else:
                chunk = PackedChunk.of(keys, values, columns, bits)
                counts = chunk.counts()
            self.chunks.append(chunk)
            self.keys, self.values = keys.new_empty(0), values.new_empty(0)
            return counts

        def nbytes(self) -> int:
            """Bytes held."""
            return sum(c.nbytes() for c in self.chunks) + sum(x.nbytes for x in self._tail())

        def dense_nbytes(self) -> int:
            """Bytes that the layer which it replaces would hold."""
            keys = self._tail()[0]
            batch, heads, _, channels = self.chunks[0].shape if self.chunks else keys.shape
            each = batch * heads * channels * keys.element_size()
            return 2 * self.get_seq_length() * each

        def reset(self) -> None:
            self.chunks = []
            super().reset()

        def offload(self) -> NoReturn:
            self._refuse("be offloaded")

        def crop(self, tokens_to_remove: int) -> None:
            if tokens_to_remove:
                self._refuse("give tokens back, as assisted decoding asks for")

        def reorder_cache(self, beam_idx: Tensor) -> NoReturn:
            self._refuse("be reordered, as beam search asks for")

        def batch_repeat_interleave(self, repeats: int) -> NoReturn:
            self._refuse("be repeated")

        def batch_select_indices(self, indices: Tensor) -> NoReturn:
            self._refuse("be thinned out")

        def _tail(self) -> tuple[Tensor, Tensor]:
            assert self.keys is not None
            assert self.values is not None
            return self.keys.detach(), self.values.detach()

        def _refuse(self, what: str) -> NoReturn:
            raise UnsupportedError(f"a key-value cache under a recipe for caches cannot {what}")

    return StoredLayer


def take_over(held: Any, num_layers: int) -> None:
    """Replace the layers of an empty cache, in place.

    Raises:
        UnsupportedError: It is not the default kind of cache.
    """
    layers = getattr(held, "layers", None)
    replicated = getattr(held, "layer_class_to_replicate", None)
    odd = {type(layer).__name__ for layer in layers or ()} - {PLAIN, stored_layer().__name__}
    if replicated is not None:
        odd |= {replicated.__name__} - {PLAIN}
    if layers is None:
        odd.add(type(held).__name__)
    if odd or getattr(held, "offloading", False):
        kind = "offloaded layers" if not odd else ", ".join(sorted(odd))
        raise UnsupportedError(
            f"recipes for caches need the default growing cache, this one is of {kind}; leave "
            "cache_implementation and past_key_values out"
        )
    held.layers = [stored_layer()() for _ in range(num_layers)]
    held.layer_class_to_replicate = None
