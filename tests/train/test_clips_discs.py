"""The physics of the discs, and labels found again from their motion on the frames."""

import math

import pytest
import torch
from torch import Tensor

from tubelet.train.clips import make_clips
from tubelet.train.clips.physics import SUBSTEPS, simulate

WALL = 31.5


def world(position, velocity, radius, present=None, frames=16):
    """One world from plain lists."""
    radius = torch.tensor([radius])
    present = torch.ones_like(radius, dtype=torch.bool) if present is None else present
    start = torch.tensor([position]), torch.tensor([velocity])
    return simulate(*start, radius, present, frames, WALL)


def test_equal_discs_exchange_their_motion_head_on():
    motion = world([[-15.0, 0.0], [5.0, 0.0]], [[2.0, 0.0], [0.0, 0.0]], [5.0, 5.0])
    # Ten pixels apart at two per frame: touching after five frames.
    step = int(motion.hits[:, 0, 0, 1].nonzero()[0])
    assert step / SUBSTEPS == pytest.approx(5, abs=0.5)
    assert motion.hits.sum() == 2
    path = motion.path[0]
    assert path[-1, 0].tolist() == pytest.approx([-5, 0], abs=0.5)
    assert (path[-1] - path[-2]).flatten().tolist() == pytest.approx([0, 0, 2, 0], abs=1e-4)


def test_momentum_and_energy_are_kept_for_different_masses():
    motion = world([[-15.0, 1.0], [5.0, 0.0]], [[2.0, 0.1], [-1.0, 0.0]], [4.0, 6.0], frames=12)
    path, mass = motion.path[0], torch.tensor([16.0, 36.0])
    before, after = path[1] - path[0], path[-1] - path[-2]
    assert motion.hits.any()
    assert not torch.allclose(before, after, atol=0.1)
    momentum = [(mass[:, None] * v).sum(0).tolist() for v in (before, after)]
    assert momentum[1] == pytest.approx(momentum[0], abs=1e-3)
    energy = [float((mass * v.square().sum(-1)).sum()) for v in (before, after)]
    assert energy[1] == pytest.approx(energy[0], rel=1e-4)


def test_walls_send_discs_back():
    motion = world([[20.0, 0.0]], [[2.0, 1.0]], [5.0])
    assert motion.path[..., 0].max() < WALL - 5 + 0.6
    assert (motion.path[0, -1] - motion.path[0, -2])[0].tolist() == pytest.approx([-2, 1], abs=1e-4)


def test_a_missing_disc_is_passed_through():
    present = torch.tensor([[True, False]])
    start = [[-15.0, 0.0], [5.0, 0.0]], [[2.0, 0.0], [0.0, 0.0]], [5.0, 5.0]
    motion = world(*start, present)
    assert not motion.hits.any()
    assert torch.isinf(motion.gaps[:, 0, 0, 1]).all()
    assert motion.path[0, -1, 0].tolist() == pytest.approx([15, 0], abs=1e-4)


def test_worlds_do_not_see_each_other():
    torch.manual_seed(1)
    position, velocity = torch.rand(6, 4, 2) * 40 - 20, torch.randn(6, 4, 2) * 2
    radius, present = torch.full((6, 4), 5.0), torch.ones(6, 4, dtype=torch.bool)
    together = simulate(position, velocity, radius, present, 12, WALL)
    alone = simulate(position[2:3], velocity[2:3], radius[2:3], present[2:3], 12, WALL)
    assert torch.equal(together.path[2:3], alone.path)


def coloured(pixels: Tensor, channel: int) -> Tensor:
    """Centres `[b, t, 2]` of the disc in which one colour channel rules."""
    others = [c for c in range(3) if c != channel]
    mine = pixels[:, :, channel]
    mask = ((mine > 0.3) & (mine > 1.7 * pixels[:, :, others].amax(2))).float()
    line = torch.arange(pixels.shape[-1]).float()
    total = mask.sum((-1, -2)).clamp(min=1)
    return torch.stack(
        [(mask.sum(-2) * line).sum(-1) / total, (mask.sum(-1) * line).sum(-1) / total], dim=-1
    )


def strongest_push(red: Tensor, blue: Tensor) -> Tensor:
    """How hard red and blue push each other apart at most, where they are close."""
    between = red - blue
    distance = between.norm(dim=-1)
    normal = (between / distance[..., None])[:, 1:-1]
    bends = [(x[:, 2:] - 2 * x[:, 1:-1] + x[:, :-2]) for x in (red, -blue)]
    pushed = torch.stack([(bend * normal).sum(-1) for bend in bends]).amin(0)
    return torch.where(distance[:, 1:-1] < 16, pushed, 0.0).amax(1)


def test_red_and_blue_push_each_other_where_the_label_says_so():
    batch = make_clips("collisions", 80, 1, background="black")
    red, blue = coloured(batch.pixels, 0), coloured(batch.pixels, 2)
    found = strongest_push(red, blue) > 0.3
    assert (found == batch.labels.bool()).float().mean() >= 0.95
    closest = (red - blue).norm(dim=-1).amin(1)
    assert closest[batch.labels == 0].min() > 10.4
    assert closest[batch.labels == 0].max() < 17.5
    assert closest[batch.labels == 1].max() < 14.5


def test_one_frame_says_little_about_the_hit():
    batch = make_clips("collisions", 500, 1, background="black", size=32)
    red, blue = coloured(batch.pixels, 0), coloured(batch.pixels, 2)
    distance = (red - blue).norm(dim=-1)
    for frame in range(16):
        labels = batch.labels[distance[:, frame].argsort()]
        # The best threshold on the distance, either way round.
        ahead = (2 * labels - 1).cumsum(0).abs().max() / len(labels)
        assert 0.5 + ahead < 0.68


def test_what_happens_does_not_answer_what_would():
    batch = make_clips("counterfactual", 120, 1, background="black")
    red, blue = coloured(batch.pixels, 0), coloured(batch.pixels, 2)
    happened = strongest_push(red, blue) > 0.3
    for label in (0, 1):
        share = happened[batch.labels == label].float().mean()
        assert share == pytest.approx(0.5, abs=0.15)
    ring = batch.pixels.amin(2) > 0.85
    assert ring.flatten(2).any(2).float().mean() > 0.99


def test_collision_counts_come_from_more_and_more_meetings():
    batch = make_clips("collision-count", 150, 1, background="black", size=32)
    red, blue = coloured(batch.pixels, 0), coloured(batch.pixels, 2)
    bends = (red[:, 2:] - 2 * red[:, 1:-1] + red[:, :-2]).norm(dim=-1) + (
        blue[:, 2:] - 2 * blue[:, 1:-1] + blue[:, :-2]
    ).norm(dim=-1)
    # Bends at walls are there for every label; those from collisions add to them.
    mean = [float(bends[batch.labels == k].sum(1).mean()) for k in (0, 2, 4)]
    assert mean[0] < mean[1] < mean[2]
    assert math.isfinite(mean[2])
