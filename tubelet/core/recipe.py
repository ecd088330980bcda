"""Recipes: published methods as frozen dataclasses that return plans.

    Recipe
    ├── TokenRecipe
    │   ├── TokenReduction     TokenContext -> TokenAssignment
    │   ├── RaggedReduction    TokenContext -> mask, as many tokens as the input needs
    │   └── LearnedReduction   TokenContext -> LearnedPlan, new tokens from a trained module
    ├── PromptReduction        PromptContext -> TokenAssignment, before a language model
    ├── LayerReduction         LayerContext -> TokenAssignment, inside a language model
    ├── SparseAttention        AttentionContext -> AttentionPlan
    ├── SparsePrefill          PrefillContext -> AttentionPlan, causal, over a prompt
    ├── AttentionReuse         when an earlier plan serves again
    ├── AttentionCompensation  AttentionPlan -> AttentionPlan with terms for what is left out
    ├── AttentionQuantization  precision of the attention product
    ├── StepCache              StepContext -> Action
    └── KVPolicy
        ├── KVStorage          StoreContext -> bits of each token of a key-value cache
        └── KVReads            ReadContext -> tokens of it that a layer reads

A concrete recipe carries its citation and its identity point as class attributes and its
parameters as fields made with `param`, which hold their own ranges.
"""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar

from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.context import AttentionContext, Site, StepContext, TokenContext
from tubelet.core.errors import UnsupportedError
from tubelet.core.fields import checked
from tubelet.core.kv import ReadContext, StoreContext
from tubelet.core.learned import LearnedPlan
from tubelet.core.plan import AttentionPlan
from tubelet.core.prefill import PrefillContext
from tubelet.core.prompt import LayerContext, PromptContext


@dataclass(frozen=True)
class Paper:
    """A citation."""

    title: str
    arxiv: str | None = None
    venue: str | None = None
    year: int | None = None

    @property
    def url(self) -> str | None:
        """Address of the preprint."""
        return None if self.arxiv is None else f"https://arxiv.org/abs/{self.arxiv}"

    def __str__(self) -> str:
        where = " ".join(str(part) for part in (self.venue, self.year) if part)
        return f"{self.title} ({where})" if where else self.title


class Action(Enum):
    """What to do at one denoising step."""

    COMPUTE = auto()
    REUSE = auto()
    FORECAST = auto()
    SKIP = auto()


def param(
    default: Any,
    doc: str,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> Any:
    """A recipe field with its meaning and range; numbers inside tuples are checked one by one.

    Args:
        default: The authors' default.
        doc: Meaning and unit, in one line; shown by the command line and the docs.
        above, least: Exclusive and inclusive lower bound.
        below, most: Exclusive and inclusive upper bound.
    """
    bounds = {">": above, ">=": least, "<": below, "<=": most}
    bounds = {sign: bound for sign, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata={"doc": doc, "bounds": bounds})


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """A published method: its parameters, and the one decision it takes."""

    paper: ClassVar[Paper | None] = None
    identity: ClassVar[dict[str, Any]] = {}
    """Fields at which the result equals the dense model."""
    verified: ClassVar[str] = "behaviour"
    """What it was compared with: "behaviour", "authors' code" or "paper number"."""
    stage: ClassVar[str] = ""
    requires: ClassVar[frozenset[str]] = frozenset()
    """What the host must offer; see `tubelet.core.handle.CAPABILITIES`."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(self, field))

    @property
    def name(self) -> str:
        """Class name, as in the paper."""
        return type(self).__name__

    @abstractmethod
    def acts_on(self, site: Site) -> bool:
        """Whether this recipe wants to decide at `site`."""

    def to_dict(self) -> dict[str, Any]:
        """Name and fields, JSON-ready."""
        return {"recipe": self.name, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        shown = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        values = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in shown)
        return f"{self.name}({values})" if values else self.name


@dataclass(frozen=True, kw_only=True)
class TokenRecipe(Recipe):
    """Decides which tokens go on; what its two kinds have in common."""

    stage: ClassVar[str] = "tokens"
    requires: ClassVar[frozenset[str]] = frozenset({"any subset"})
    statistics: ClassVar[frozenset[str]] = frozenset()
    """Attention statistics that the decision asks for; the host keeps only what is named here."""
    decides: ClassVar[str] = "plan"
    """Name of the method that takes the decision."""

    @property
    def size_bias(self) -> bool:
        """Whether later attention adds log(size) to a merged token's logits."""
        return False


@dataclass(frozen=True, kw_only=True)
class TokenReduction(TokenRecipe):
    """Decides which tokens are dropped or merged; how many follows from the parameters."""

    @abstractmethod
    def plan(self, ctx: TokenContext) -> TokenAssignment | None:
        """Where the tokens at this site go; None leaves them alone."""


@dataclass(frozen=True, kw_only=True)
class RaggedReduction(TokenRecipe):
    """Drops tokens whose number depends on the input, so samples of a batch differ in length."""

    decides: ClassVar[str] = "keep"
    takes_padding: ClassVar[bool] = False
    """Whether `keep` heeds `ctx.valid`. Without it, samples that differ in length already are
    decided one by one."""

    @abstractmethod
    def keep(self, ctx: TokenContext) -> Tensor | None:
        """Bool [G, N], True where a token stays (at least one per row); None keeps all.

        What it says of padding is ignored.
        """


@dataclass(frozen=True, kw_only=True)
class LearnedReduction(TokenRecipe):
    """Computes the tokens that go on by a trained module, which the host carries.

    `requires` names the module ("trained vtm"), `ctx.trained("vtm")` returns it. How many tokens
    are left follows from the parameters, never from tensor values.
    """

    decides: ClassVar[str] = "transform"

    @abstractmethod
    def transform(self, ctx: TokenContext) -> LearnedPlan | None:
        """The new tokens and the way back; None leaves the tokens alone."""


POSITIONS = ("keep", "compact", "anchor")
"""Where video tokens of a shortened prompt stand; see `PositionPolicy`."""


@dataclass(frozen=True, kw_only=True)
class PositionPolicy(Recipe):
    """Shortens the prompt of a video language model; what its two kinds have in common."""

    requires: ClassVar[frozenset[str]] = frozenset({"video prompt"})

    positions: str = param(
        "keep",
        "keep: tokens, text and answer stand where they would in the full prompt; compact: all "
        "are renumbered; anchor: as keep, merged tokens at their earliest member",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions not in POSITIONS:
            raise RecipeError(
                f"{self.name}.positions must be one of {', '.join(POSITIONS)}, got "
                f"{self.positions!r}"
            )

    @property
    def vision(self) -> frozenset[tuple[str, int]]:
        """(statistic, layer) of the vision tower that the decision asks for; the host keeps only
        what is named here. See `tubelet.core.prompt.VISION_STATISTICS`."""
        return frozenset()


@dataclass(frozen=True, kw_only=True)
class PromptReduction(PositionPolicy):
    """Decides, before a language model, which tokens of a video its prompt holds.

    Each video of a batch is decided alone. How many tokens stay may depend on the input; a
    method with a budget keeps exactly that many.
    """

    stage: ClassVar[str] = "prompt"

    def acts_on(self, site: Site) -> bool:
        """Between projector and language model."""
        return site.kind == "prompt"

    @abstractmethod
    def plan(self, ctx: PromptContext) -> TokenAssignment | None:
        """Where the tokens of this video go; None leaves them alone."""


@dataclass(frozen=True, kw_only=True)
class LayerReduction(PositionPolicy):
    """Decides, in front of a layer of a language model, which video tokens go on.

    All videos of a prompt are decided together, each prompt of a batch alone. Layers before keep
    the keys and values of what is dropped. Which layer is a field of the recipe: `layer`, or
    `layers` for several.
    """

    stage: ClassVar[str] = "layers"
    statistics: ClassVar[bool] = False
    """Whether the decision asks for the attention call of the layer before."""

    def acts_on(self, site: Site) -> bool:
        """In front of its layers."""
        fields = vars(self)
        layers = fields["layers"] if "layers" in fields else (fields["layer"],)
        return site.kind == "llm" and site.layer in layers

    @abstractmethod
    def plan(self, ctx: LayerContext) -> TokenAssignment | None:
        """Where the video tokens of this prompt go; None leaves them alone."""


@dataclass(frozen=True, kw_only=True)
class SparseAttention(Recipe):
    """Decides how one attention call is computed.

    Video policies act on joint attention, and leave the first layers and the first denoising
    steps of a run dense. Warm-up in steps means nothing to hosts that do not denoise.
    """

    stage: ClassVar[str] = "attention"
    requires: ClassVar[frozenset[str]] = frozenset({"attention", "joint"})

    dense_layers: int = param(0, "first layers that stay dense", least=0)
    dense_steps: float = param(
        0.0, "share of the denoising steps, from the first, that stay dense", least=0, most=1
    )

    def acts_on(self, site: Site) -> bool:
        """Joint attention behind the dense layers."""
        return site.kind == "joint" and site.layer >= self.dense_layers

    def warming_up(self, step: StepContext | None) -> bool:
        """Whether this step stays dense.

        Raises:
            UnsupportedError: `dense_steps` is a share and the host does not tell how many steps
                a run has.
        """
        if step is None or self.dense_steps == 0:
            return False
        if step.num_steps is None:
            raise UnsupportedError(
                f"{self.name}.dense_steps={self.dense_steps:g} is a share of the steps, but this "
                "host does not tell how many there are; give accelerate(..., num_steps=)"
            )
        return step.step < round(self.dense_steps * step.num_steps)

    @abstractmethod
    def plan(self, ctx: AttentionContext) -> AttentionPlan:
        """The plan for this call; the empty plan is dense attention."""


@dataclass(frozen=True, kw_only=True)
class SparsePrefill(Recipe):
    """Decides which keys the tokens of a prompt attend to in a video language model.

    Every prompt of a batch is decided alone, when all of it is there; the tokens of the answer
    attend to everything. Plans are causal: a query never attends to a later token, listed or not.
    """

    stage: ClassVar[str] = "prefill"
    requires: ClassVar[frozenset[str]] = frozenset({"video prompt"})

    dense_layers: int = param(0, "first layers that stay dense", least=0)

    def acts_on(self, site: Site) -> bool:
        """Layers of the language model behind the dense ones."""
        return site.kind == "llm" and site.layer >= self.dense_layers

    @abstractmethod
    def plan(self, ctx: PrefillContext) -> AttentionPlan:
        """The plan for this call; the empty plan is dense attention."""


@dataclass(frozen=True, kw_only=True)
class AttentionReuse(Recipe):
    """Decides when the plan of an earlier step serves again; goes with a SparseAttention."""

    stage: ClassVar[str] = "attention reuse"
    requires: ClassVar[frozenset[str]] = frozenset({"attention", "joint", "generator"})

    @abstractmethod
    def reuses(self, ctx: AttentionContext) -> bool:
        """Whether the last plan of this site and branch serves this call."""


@dataclass(frozen=True, kw_only=True)
class AttentionCompensation(Recipe):
    """Adds terms to a sparse plan that make up for what it leaves out."""

    stage: ClassVar[str] = "attention compensation"
    requires: ClassVar[frozenset[str]] = frozenset({"attention", "joint", "generator"})

    @abstractmethod
    def compensate(self, ctx: AttentionContext, plan: AttentionPlan) -> AttentionPlan:
        """The plan with terms added; returned unchanged where nothing is to be done."""

    def wants_dense(self, ctx: AttentionContext) -> bool:
        """Whether this sparse call is to be done densely too; asked before `compensate`.

        Where it is, the host gets the dense output, and `observe` the sparse one, with
        ctx.state["dense"] = (output, log-sum-exp) of the dense call.
        """
        return False

    def observe(self, ctx: AttentionContext, plan: AttentionPlan, out: Tensor, lse: Tensor) -> None:
        """See the sparse result [B, H, N, D] and its log-sum-exp where `wants_dense` asked."""


@dataclass(frozen=True, kw_only=True)
class AttentionQuantization(Recipe):
    """Decides the precision of the two attention products."""

    stage: ClassVar[str] = "attention precision"


@dataclass(frozen=True, kw_only=True)
class StepCache(Recipe):
    """Decides which denoising steps are computed and which reuse or forecast."""

    stage: ClassVar[str] = "steps"

    @abstractmethod
    def plan(self, ctx: StepContext) -> Action:
        """What to do at this step."""


@dataclass(frozen=True, kw_only=True)
class KVPolicy(Recipe):
    """Decides about the key-value cache of a language model; what its two kinds have in common.

    The two compose: one decides how tokens are stored, the other which are read.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"kv cache"})

    def acts_on(self, site: Site) -> bool:
        """In every layer."""
        return site.kind == "llm"


@dataclass(frozen=True, kw_only=True)
class KVStorage(KVPolicy):
    """Decides in how many bits each token of a cache is stored.

    The prompt is decided behind its own attention call, which sees it as it came. Each prompt of
    a batch is decided alone.
    """

    stage: ClassVar[str] = "cache"
    decides: ClassVar[str] = "store"

    every: int = param(100, "new tokens that are kept as they came before they are stored", least=1)

    @abstractmethod
    def store(self, ctx: StoreContext) -> Tensor | None:
        """[n] int64, one of `tubelet.core.kv.BITS` for each token; None leaves all as they are."""


@dataclass(frozen=True, kw_only=True)
class KVReads(KVPolicy):
    """Decides which tokens of a cache a layer reads for the next token of an answer.

    All of them stay in the cache. Asked once per layer and step that `acts_on` names, behind the
    first layer.
    """

    stage: ClassVar[str] = "cache reads"
    decides: ClassVar[str] = "read"

    def acts_on(self, site: Site) -> bool:
        """In every layer but the first, which has no layer before it to look at."""
        return site.kind == "llm" and site.layer >= 1

    @abstractmethod
    def read(self, ctx: ReadContext) -> Tensor | None:
        """[1, K] or, for each head of the cache, [Hkv, K] int64 places; None reads all."""
