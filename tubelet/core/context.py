"""What a recipe may look at when it decides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.block_mask import BlockMask
from tubelet.core.errors import UnsupportedError
from tubelet.core.grid import TokenGrid

SiteKind = Literal["input", "joint", "temporal", "spatial", "prompt", "llm"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place in a host model where a plan can act.

    Args:
        name: Path of the module, as in `named_modules()`.
        layer: Transformer layer, 0-based; -1 for the embeddings.
        num_layers: Layers of the stack it belongs to.
        kind: "input" (embedded tokens, before layer 0), "joint" (attention over all tokens),
            "temporal" or "spatial" (the two halves of divided attention). Token plans act
            between a layer's attention and its MLP. In video language models "prompt" (between
            the projector and the language model) and "llm" (in front of one of its layers).
    """

    name: str
    layer: int
    num_layers: int
    kind: SiteKind


@runtime_checkable
class AttentionStatistics(Protocol):
    """Facts about the attention call just made, computed on demand in O(N) memory.

    G is batch times independent groups, H query heads, N tokens, D head width.
    """

    def keys(self) -> Float[Tensor, "g n d"]:
        """Keys averaged over heads, float32."""
        ...

    def rows(self, queries: Sequence[int]) -> Float[Tensor, "g h q n"]:
        """Softmax rows of a few query positions."""
        ...

    def value_norm(self) -> Float[Tensor, "g h n"]:
        """Euclidean norm of each value vector."""
        ...

    def received(self, weight: Float[Tensor, "g n"] | None = None) -> Float[Tensor, "g n"]:
        """Attention each key receives, summed over weighted queries, averaged over heads."""
        ...

    def entropy(self) -> Float[Tensor, "g n"]:
        """Entropy of each query's softmax in nats, averaged over heads."""
        ...


@dataclass(frozen=True, kw_only=True)
class TokenContext:
    """The tokens at one site.

    Args:
        site: Where.
        grid: Geometry of the *original* token sequence.
        hidden: [G, N, C] tokens as they are now. G is the batch at joint sites; at a temporal
            site tokens are frames and G = batch x places, at a spatial site G = batch x frames.
        size: [G, N] float32, originals each token stands for.
        anchor: [G, N] int64, original position of each token at joint and input sites; the
            position on the remaining axis at temporal and spatial sites.
        protected: Leading tokens (class tokens) that must stay.
        shared: Consecutive groups that must get one common decision.
        padded: Samples differ in length and end in padding of size 0; see `valid`.
        stats: Attention statistics of the call that produced `hidden`; None at input sites.
        tubelet: (frames, height, width) in pixels that one token covers.
        pixels: [B, T, 3, H, W] float clip as the host model received it; input sites only.
        modules: Trained modules that the host carries, by name; see `trained`.
    """

    site: Site
    grid: TokenGrid
    hidden: Float[Tensor, "g n c"]
    size: Float[Tensor, "g n"]
    anchor: Tensor
    protected: int = 0
    shared: int = 1
    padded: bool = False
    stats: AttentionStatistics | None = None
    tubelet: tuple[int, int, int] = (1, 1, 1)
    pixels: Tensor | None = None
    modules: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens now, protected ones included; with padding, those of the longest sample."""
        return self.hidden.shape[1]

    @property
    def valid(self) -> Bool[Tensor, "g n"] | None:
        """False at the padding behind the end of a shorter sample; None when there is none.

        No field and no statistic means anything at padding, except that sizes, `rows` and
        `received` are 0. Only recipes that take padding ever see any.
        """
        return self.size > 0 if self.padded else None

    def statistics(self) -> AttentionStatistics:
        """`stats`, or an error that names the misuse."""
        if self.stats is None:
            raise RuntimeError(f"no attention statistics at {self.site.kind} site {self.site.name}")
        return self.stats

    def trained(self, name: str) -> Any:
        """The host's trained module of that name.

        Raises:
            UnsupportedError: The host carries none.
        """
        if name not in self.modules:
            held = ", ".join(sorted(self.modules)) or "none"
            raise UnsupportedError(
                f"the host carries no trained module {name!r} (it has {held}); `tubelet train` "
                "makes them, and model.reducers[name] holds them"
            )
        return self.modules[name]

    def identity(self) -> TokenAssignment:
        """The plan that changes nothing."""
        return TokenAssignment.identity(*self.hidden.shape[:2], device=self.hidden.device)


@dataclass(frozen=True, kw_only=True)
class AttentionContext:
    """One attention call.

    Queries and keys are the same tokens, in the order of `grid`. Tokens outside the video (text,
    class tokens) are exempt: plans compute their rows and columns whole.

    Args:
        site: Where.
        grid: Geometry of the original token sequence.
        query: [B, H, N, D] queries, positions applied.
        key: [B, Hkv, N, D] keys, positions applied.
        value: [B, Hkv, N, D] values.
        scale: Factor on the logits.
        num_keys: Leading tokens that are real; those behind them are padding, which no query may
            attend to. None when all are.
        step: Denoising step of the run and guidance branch; None outside of a generator.
        state: Kept from step to step by this recipe at this site in this branch; empty when a
            run begins.
        tools: Block operations that fit the device; None leaves them to plain torch.
    """

    site: Site
    grid: TokenGrid
    query: Float[Tensor, "b h n d"]
    key: Float[Tensor, "b g m d"]
    value: Float[Tensor, "b g m e"]
    scale: float
    num_keys: int | None = None
    step: "StepContext | None" = None
    state: dict[str, Any] = field(default_factory=dict)
    tools: "BlockTools | None" = None

    @property
    def keys(self) -> int:
        """Tokens that may be attended to."""
        return self.key.shape[2] if self.num_keys is None else self.num_keys


@runtime_checkable
class BlockTools(Protocol):
    """What selections of blocks are made of: `tubelet.ops.tools` says what each one computes.

    Fused kernels offer the same where they run, with the same results to rounding.
    """

    def means(self, x: Tensor, block: int, order: Tensor | None, num: int) -> Tensor:
        """Mean of each block of ordered tokens."""
        ...

    def similarity(self, x: Tensor, block: int, order: Tensor | None, num: int) -> Tensor:
        """Mean cosine between the tokens of each block."""
        ...

    def tile_means(self, x: Tensor, grid: TokenGrid, tile: tuple[int, int, int]) -> Tensor:
        """Mean of the video tokens of each tile."""
        ...

    def sub_block_scores(
        self, q: Tensor, k: Tensor, scale: float, parts: tuple[int, int]
    ) -> Tensor:
        """log sum exp over the pairs of sub-block means of two blocks."""
        ...

    def block_mass(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        block: tuple[int, int],
        counts: tuple[int, int],
        num_keys: int,
    ) -> Tensor:
        """Exact softmax mass of block pairs."""
        ...

    def antidiagonal_mass(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        block: tuple[int, int],
        stride: int,
        counts: tuple[int, int],
    ) -> Tensor:
        """Softmax mass of block pairs, estimated from antidiagonals."""
        ...

    def above_mass(self, score: Tensor, mass: float) -> Tensor:
        """True for the highest entries of each row whose share reaches `mass`."""
        ...

    def at_least(self, score: Tensor, k: int) -> Tensor:
        """True for entries no lower than the k-th highest of their row."""
        ...

    def max_min(self, x: Tensor, k: int, weight: Tensor | None = None) -> Tensor:
        """True for `k` tokens that lie far apart, chosen one after the other."""
        ...

    def row_totals(self, q: Tensor, k: Tensor, places: Tensor, scale: float) -> Tensor:
        """Log-sum-exp of some rows of causal attention."""
        ...

    def received(
        self,
        q: Tensor,
        k: Tensor,
        places: Tensor,
        scale: float,
        totals: Tensor,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Attention that each key receives from some rows of causal attention."""
        ...

    def mask(
        self, kept: Tensor, *, block: tuple[int, int], num_queries: int, num_keys: int
    ) -> BlockMask:
        """Lists from a boolean table."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """One denoising step.

    Args:
        step: Index of the step, 0-based.
        num_steps: Steps of the run; None where the host does not tell.
        branch: Guidance branch, such as "cond" or "uncond".
    """

    step: int
    num_steps: int | None = None
    branch: str = "cond"
