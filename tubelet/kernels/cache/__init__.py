"""Storage of keys and values in few bits."""

from tubelet.kernels.cache.packing import Quantized, pack_codes, quantize, unpack_codes
from tubelet.kernels.cache.storage import PackedChunk, RawChunk

__all__ = ["PackedChunk", "Quantized", "RawChunk", "pack_codes", "quantize", "unpack_codes"]
