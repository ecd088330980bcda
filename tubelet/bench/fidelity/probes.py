"""Controls that see no more than averages: logistic regression on them, fitted on fresh clips.

If averages of the pixels give the answer away, a score on the task says nothing about the skill it
is named after.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tubelet.bench.fidelity.cells import Clips

PROBE_SEED = 2**30
"""First generator seed of the clips that probes are fitted on: no test clips."""

SIDE = 16
"""The mean frame is averaged down to this side, so that few clips suffice to fit it."""

PENALTY = 1e-2
"""Weight of the squared coefficients, on standardised features."""

Feature = Callable[[Tensor], Tensor]


def mean_frame(pixels: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b f"]:
    """The mean over time, area-averaged to 16 x 16."""
    return F.adaptive_avg_pool2d(pixels.mean(1), SIDE).flatten(1)


def frame_moments(pixels: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b f"]:
    """Mean and variance of every channel of every frame."""
    flat = pixels.flatten(3)
    return torch.cat([flat.mean(3).flatten(1), flat.var(3).flatten(1)], dim=1)


PROBES: dict[str, Feature] = {
    "regression on the mean frame": mean_frame,
    "regression on frame means and variances": frame_moments,
}


class Features:
    """What the probes see of some clips, gathered batch by batch."""

    def __init__(self, batches: Iterable[Clips] = ()) -> None:
        self._seen: dict[str, list[Tensor]] = {name: [] for name in PROBES}
        self._labels: list[Tensor] = []
        for clips in batches:
            self.add(clips)

    def add(self, clips: Clips) -> None:
        """Look at one more batch."""
        for name, feature in PROBES.items():
            self._seen[name].append(feature(clips.pixels).cpu())
        self._labels.append(clips.labels.cpu())

    def of(self, name: str) -> tuple[Float[Tensor, "n f"], Int[Tensor, "n"]]:
        """Features of one probe, and labels."""
        return torch.cat(self._seen[name]), torch.cat(self._labels)


def probe_scores(train: Features, test: Features, classes: int) -> dict[str, Float[Tensor, "n"]]:
    """Per-clip accuracy of every probe on the test clips."""
    found = {}
    for name in PROBES:
        asked, truth = test.of(name)
        found[name] = (fit(*train.of(name), classes)(asked) == truth).float()
    return found


def fit(
    features: Float[Tensor, "n f"], labels: Int[Tensor, "n"], classes: int
) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression by L-BFGS, as a function from features to classes.

    Source:
        Limited-memory quasi-Newton (Liu and Nocedal, 1989), torch's implementation.
    """
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    inputs = (features - mean) / std
    with torch.inference_mode(False), torch.enable_grad():
        # A plain copy: tensors made in inference mode take no part in a graph.
        inputs, labels = inputs.clone(), labels.clone()
        weight = torch.zeros(inputs.shape[1], classes, device=inputs.device, requires_grad=True)
        bias = torch.zeros(classes, device=inputs.device, requires_grad=True)
        steps = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            steps.zero_grad()
            error = F.cross_entropy(inputs @ weight + bias, labels)
            error = error + PENALTY * weight.square().sum()
            error.backward()
            return error

        steps.step(loss)
    found, offset = weight.detach(), bias.detach()
    return lambda x: ((x - mean) / std @ found + offset).argmax(-1)
