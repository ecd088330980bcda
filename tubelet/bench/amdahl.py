"""What sparse attention can bring: the speed-up predicted before anything is measured.

    speed-up = 1 / ((1 - a) + a (w + (1 - w) (density / e + o)))

a is the share of attention in the dense time, w the share of attention calls that stay dense
(first layers, first steps), e the speed of the sparse kernel per computed pair relative to the
dense one, o the cost of deciding relative to dense attention.
"""

from dataclasses import asdict, dataclass
from typing import Any

from tubelet.core.errors import TubeletError


def speedup(
    share: float,
    density: float,
    *,
    efficiency: float = 1.0,
    selection: float = 0.0,
    dense_calls: float = 0.0,
) -> float:
    """Dense time over sparse time.

    Args:
        share: Of attention in the dense time, in [0, 1].
        density: Share of token pairs computed, in [0, 1].
        efficiency: Pairs per second of the sparse kernel over those of the dense one, > 0.
        selection: Seconds of deciding over seconds of dense attention, >= 0.
        dense_calls: Share of the attention calls that stay dense, in [0, 1].

    Raises:
        TubeletError: A number is out of range; the message names it.
    """
    for name, value in (("share", share), ("density", density), ("dense_calls", dense_calls)):
        if not 0 <= value <= 1:
            raise TubeletError(f"{name} must be in [0, 1], got {value}")
    if efficiency <= 0 or selection < 0:
        raise TubeletError(
            f"efficiency must be > 0 and selection >= 0, got {efficiency} and {selection}"
        )
    sparse_call = density / efficiency + selection
    left = (1 - share) + share * (dense_calls + (1 - dense_calls) * sparse_call)
    # Attention that is everything and costs nothing has no finite speed-up.
    return 1 / left if left > 0 else float("inf")


def attention_flops(tokens: int, width: int) -> float:
    """Floating-point operations of one dense attention call.

    Args:
        tokens: Queries, and as many keys.
        width: Channels of all heads together.
    """
    return 4.0 * tokens**2 * width


def flop_share(tokens: int, width: int, layers: int, parameters: int) -> float:
    """Share of attention in the floating-point operations of a forward pass, in [0, 1].

    Two per weight and token for everything that is not attention. Time follows it closely only
    where attention and matrix products run equally fast.

    Args:
        tokens: Of one sample.
        width: Channels of all heads together.
        layers: Layers with attention over all tokens.
        parameters: Weights of the model.
    """
    attention = layers * attention_flops(tokens, width)
    return attention / (attention + 2.0 * parameters * tokens)


@dataclass(frozen=True, kw_only=True)
class TimeSplit:
    """Measured pieces of a forward pass, and what follows from them.

    Args:
        rest: Seconds outside of attention.
        dense: Seconds of all attention calls, dense.
        call_dense: Seconds of one dense attention call.
        call_selection: Seconds of deciding, for one call.
        call_attention: Seconds of one sparse call, reordering and its inverse included.
        density: Share of token pairs computed.
        dense_calls: Share of the attention calls that stay dense.
    """

    rest: float
    dense: float
    call_dense: float
    call_selection: float
    call_attention: float
    density: float
    dense_calls: float = 0.0

    @property
    def share(self) -> float:
        """Of attention in the dense time."""
        return self.dense / (self.dense + self.rest)

    @property
    def efficiency(self) -> float:
        """Pairs per second of the sparse call over those of the dense one."""
        return self.density * self.call_dense / self.call_attention

    @property
    def selection(self) -> float:
        """Deciding over dense attention."""
        return self.call_selection / self.call_dense

    @property
    def limit(self) -> float:
        """Speed-up if attention cost nothing."""
        return speedup(self.share, 0.0, dense_calls=self.dense_calls)

    @property
    def speedup(self) -> float:
        """Predicted speed-up of the whole forward pass."""
        return speedup(
            self.share,
            self.density,
            efficiency=self.efficiency,
            selection=self.selection,
            dense_calls=self.dense_calls,
        )

    def to_dict(self) -> dict[str, Any]:
        """The pieces and what follows from them, JSON-ready."""
        derived = ("share", "efficiency", "selection", "limit", "speedup")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}

    def __str__(self) -> str:
        return (
            f"attention is {self.share:.1%} of the dense time (at most {self.limit:.2f}x), "
            f"density {self.density:.3f}, kernel efficiency {self.efficiency:.2f}, "
            f"selection {self.selection:.1%} of dense attention, "
            f"{self.dense_calls:.0%} of the calls dense: {self.speedup:.2f}x"
        )
