"""What the papers claim of prompt reductions that keep what is unlike the rest."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from prompt_contexts import kept, noise, prompt_context
from torch import Tensor

from tubelet.kernels.selection import TOOLS
from tubelet.ops.tools import PlainTools
from tubelet.recipes import DivPrune, VidCom2
from tubelet.testing import catalogue_llm, tiny_llm


def greedy_by_matrix(x: Tensor, k: int) -> list[int]:
    """Max-min choice from the whole matrix of distances, step by step."""
    unit = F.normalize(x, dim=-1)
    distance = 1 - unit @ unit.T
    apart = distance.clone().fill_diagonal_(torch.inf)
    chosen = [int(apart.amin(1).argmax())]
    while len(chosen) < k:
        gaps = distance[:, chosen].amin(1)
        gaps[chosen] = -1
        chosen.append(int(gaps.argmax()))
    return sorted(chosen)


def test_DivPrune_is_the_greedy_max_min_choice_of_the_whole_matrix():
    for seed in range(4):
        tokens = noise(3, seed=seed)
        for k in (1, 2, 7, 30):
            plan = DivPrune(keep_ratio=k / 48).plan(prompt_context(tokens))
            assert kept(plan) == greedy_by_matrix(tokens.reshape(48, -1), k)


def test_DivPrune_keeps_one_of_each_group_of_duplicates():
    groups = noise(1, 2, seed=3).reshape(4, -1)
    tokens = groups.repeat(8, 1).reshape(2, 4, 4, -1)
    plan = DivPrune(keep_ratio=4 / 32).plan(prompt_context(tokens))
    assert sorted(place % 4 for place in kept(plan)) == [0, 1, 2, 3]


class Recorded(PlainTools):
    """Tools that remember what was asked of them."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def max_min(self, x: Tensor, k: int, weight: Tensor | None = None) -> Tensor:
        self.asked.append((*x.shape, k))
        return super().max_min(x, k, weight)


def test_DivPrune_leaves_its_loop_to_the_tools_of_the_device():
    tools, tokens = Recorded(), noise(3)
    plain = DivPrune(keep_ratio=0.25).plan(prompt_context(tokens))
    found = DivPrune(keep_ratio=0.25).plan(replace(prompt_context(tokens), tools=tools))
    assert tools.asked == [(1, 48, 16, 12)]
    assert kept(found) == kept(plain)


def test_DivPrune_is_shown_the_tools_by_the_model():
    model, inputs = tiny_llm.build("llava_onevision"), tiny_llm.prompt("llava_onevision")
    ((ctx, _),) = catalogue_llm.decisions(model, DivPrune(keep_ratio=0.25), inputs)
    assert ctx.tools is TOOLS


def unlike_last_frame() -> Tensor:
    """Three frames about one direction, and a fourth about another."""
    base = torch.zeros(4, 4, 4, 16)
    base[:3, ..., 0], base[3, ..., 1] = 4, 4
    return base + 0.05 * noise(4)


def test_VidCom2_gives_the_frame_unlike_the_clip_more_of_the_budget():
    plan = VidCom2(keep_ratio=0.25).plan(prompt_context(unlike_last_frame()))
    frames = torch.tensor(kept(plan)) // 16
    counts = frames.bincount(minlength=4).tolist()
    assert sum(counts) == 16
    assert counts[3] > max(counts[:3])


def by_hand(tokens: Tensor, keep_ratio: float) -> list[int]:
    """The formulas of the paper, frame by frame, for quotas that need no reconciling."""
    frames, places, channels = tokens.shape
    spread = tokens.reshape(-1, channels).var(0)
    x = F.normalize(tokens[..., spread.argsort()[: channels // 2]], dim=-1)

    def likeness(a: Tensor, b: Tensor) -> Tensor:
        distance = (a - b).square().sum(-1)
        return sum(torch.exp(-distance / (2 * w)) for w in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    clip = x.reshape(-1, x.shape[-1]).mean(0)
    unusual = torch.stack([-likeness(x[t], clip).mean() for t in range(frames)])
    weight = (unusual / 0.01).softmax(0)
    chosen = []
    for t in range(frames):
        ratio = min(1.0, keep_ratio * float(1 + weight[t] - weight.mean()))
        score = likeness(x[t], clip) + likeness(x[t], x[t].mean(0))
        count = max(1, round(ratio * places))
        chosen += (score.argsort()[:count] + t * places).sort().values.tolist()
    return chosen


def test_VidCom2_follows_the_formulas():
    # The softmax is one-hot here: the quotas are 0.4375 and 0.1875 of 16 tokens, whole numbers.
    tokens = unlike_last_frame()
    plan = VidCom2(keep_ratio=0.25).plan(prompt_context(tokens))
    assert kept(plan) == by_hand(tokens.reshape(4, 16, -1), 0.25)


def test_VidCom2_keeps_the_tokens_least_like_the_centres_in_the_steadiest_channels():
    tokens = 5 * noise(2)
    tokens[..., :8] = 1 + 0.01 * tokens[..., :8]
    tokens[:, 1, 1, :8] *= -1
    plan = VidCom2(keep_ratio=2 / 32).plan(prompt_context(tokens))
    assert kept(plan) == [5, 16 + 5]


def test_VidCom2_keeps_exactly_its_budget():
    for seed in range(3):
        for keep_ratio in (0.05, 0.21, 0.5, 0.93):
            plan = VidCom2(keep_ratio=keep_ratio).plan(prompt_context(noise(5, seed=seed)))
            assert plan is not None
            assert plan.num_out == -(-80 * keep_ratio // 1)
