"""Rotary positions: relative, norm-preserving, one band of channels per axis."""

import pytest
import torch

from tubelet.core.errors import ShapeError
from tubelet.nn.rotary import apply_rotary, grid_coordinates, rotary_table


def logits(q, k, q_at, k_at):
    turned = [apply_rotary(x, *rotary_table(at, x.shape[-1])) for x, at in ((q, q_at), (k, k_at))]
    return turned[0] @ turned[1].transpose(-1, -2)


@pytest.mark.parametrize("width", [32, 64, 128])
def test_logits_depend_on_coordinate_differences_only(width):
    q, k = torch.randn(2, 3, 5, width), torch.randn(2, 3, 7, width)
    q_at, k_at = torch.rand(5, 3) * 20, torch.rand(7, 3) * 20
    shift = torch.tensor([3.5, -8.0, 11.25])
    torch.testing.assert_close(
        logits(q, k, q_at, k_at), logits(q, k, q_at + shift, k_at + shift), atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_axis_changes_the_logits(axis):
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)
    here, there = torch.zeros(1, 3), torch.zeros(1, 3)
    there[0, axis] = 1.0
    change = logits(q, k, here, here) - logits(q, k, here, there)
    assert change.abs().item() > 1e-2


def test_pairs_are_split_over_time_height_and_width():
    for width, expected in ((32, (6, 5, 5)), (64, (12, 10, 10)), (128, (22, 21, 21))):
        cos, _ = rotary_table(torch.eye(3), width)
        turned = (cos[:, : width // 2] != 1).sum(1)
        assert tuple(turned.tolist()) == expected


def test_turning_keeps_norms_and_the_origin():
    x = torch.randn(2, 4, 6, 32)
    at = torch.rand(6, 3) * 30
    at[0] = 0
    turned = apply_rotary(x, *rotary_table(at, 32))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, :, 0], x[:, :, 0])


def test_a_pair_turns_by_coordinate_times_rate():
    x = torch.zeros(1, 1, 1, 32)
    x[..., 0] = 1.0  # the fastest pair of time is channels 0 and 16
    turned = apply_rotary(x, *rotary_table(torch.tensor([[0.75, 5.0, 9.0]]), 32))
    angle = torch.tensor(0.75)
    torch.testing.assert_close(turned[0, 0, 0, [0, 16]], torch.stack([angle.cos(), angle.sin()]))


def test_a_table_per_sample_equals_one_table_each():
    x, at = torch.randn(2, 3, 4, 32), torch.rand(2, 4, 3) * 9
    both = apply_rotary(x, *rotary_table(at, 32))
    for i in range(2):
        alone = apply_rotary(x[i : i + 1], *rotary_table(at[i], 32))
        torch.testing.assert_close(both[i : i + 1], alone)


def test_half_precision_is_kept_and_turned_in_float32():
    x = torch.randn(1, 1, 8, 32)
    table = rotary_table(torch.full((8, 3), 77.0), 32)
    turned = apply_rotary(x.bfloat16(), *table)
    assert turned.dtype == torch.bfloat16
    exact = apply_rotary(x.bfloat16().float(), *table)
    torch.testing.assert_close(turned.float(), exact, atol=0, rtol=2**-8)


def test_grid_coordinates_are_in_raster_order():
    found = grid_coordinates(2, 3, 4)
    assert found.shape == (24, 3)
    assert found[0].tolist() == [0, 0, 0]
    assert found[1].tolist() == [0, 0, 1]
    assert found[4].tolist() == [0, 1, 0]
    assert found[12].tolist() == [1, 0, 0]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match="tokens, 3"):
        rotary_table(torch.zeros(4, 2), 32)
    for width in (4, 33):
        with pytest.raises(ShapeError, match="even width"):
            rotary_table(torch.zeros(4, 3), width)
    with pytest.raises(ShapeError, match="do not fit"):
        apply_rotary(torch.zeros(1, 1, 5, 32), *rotary_table(torch.zeros(4, 3), 32))
