"""AdamW's parameter groups and the moving average of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tubelet.train.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients, fused on CUDA.

    Only matrices called `weight` (or `..._weight`) of modules other than embeddings are decayed:
    biases, norms, embeddings, and parameters that a module holds itself, such as positions, class
    tokens and other tables, would only be pulled towards a zero that means nothing for them.
    """
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if _is_matrix(model, name, parameter) else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    fused = all(p.is_cuda for p in (*decayed, *free))
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        fused=fused or None,
    )


def _is_matrix(model: nn.Module, name: str, parameter: Tensor) -> bool:
    owner, _, leaf = name.rpartition(".")
    table = isinstance(model.get_submodule(owner), (nn.Embedding, nn.EmbeddingBag))
    return parameter.ndim >= 2 and not table and (leaf == "weight" or leaf.endswith("_weight"))


class Average:
    """Exponential moving average of weights, in fp32.

    Args:
        parameters: What is averaged, by name.
        decay: Share of the average that a step keeps, in (0, 1), once the start is forgotten.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters = list(parameters.values())
        self._decay = decay
        self.weights = {n: p.detach().float().clone() for n, p in parameters.items()}

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again from the weights as they are."""
        torch._foreach_copy_(list(self.weights.values()), self._parameters)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after step 0, 1, ...; nothing waits for the device."""
        decay = min(self._decay, (1 + step) / (10 + step))
        now = [parameter.detach().float() for parameter in self._parameters]
        torch._foreach_lerp_(list(self.weights.values()), now, 1 - decay)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over an average of the same names and shapes."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])

    @torch.no_grad()
    def apply(self) -> None:
        """Put the average into the model, for good."""
        torch._foreach_copy_(self._parameters, list(self.weights.values()))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in the model; afterwards the weights are back, bit for bit."""
        kept = [parameter.detach().clone() for parameter in self._parameters]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, kept)
