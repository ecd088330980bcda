"""Reordered tokens are those that plain indexing gives, wherever they lie in memory."""

import pytest
import torch

from tubelet.kernels.attention.order import for_heads, inverse, permuted, restored


def orders(groups: int, num: int) -> torch.Tensor:
    return torch.stack([torch.randperm(num) for _ in range(groups)])


@pytest.mark.parametrize("width", [4, 5])
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "strided"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_an_order_and_its_way_back(layout, batch, groups, width):
    num, heads = 23, 4
    x = torch.randn(batch, heads, num, width)
    if layout == "tokens first":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        x = torch.randn(batch, heads, num, 2 * width)[..., ::2]
    order = orders(groups, num)
    found = permuted(x, order)
    for head, own in enumerate(for_heads(order, heads).expand(heads, -1)):
        assert torch.equal(found[:, head], x[:, head, own])
    assert torch.equal(restored(found, inverse(order)), x)
    assert torch.equal(permuted(x, order[:, :7]), found[:, :, :7])


def test_tokens_come_back_in_the_memory_order_of_hosts():
    x = torch.randn(1, 23, 4, 5).transpose(1, 2)
    order = orders(2, 23)
    # Head by head is what kernels read best, token by token what hosts go on with.
    found = permuted(x, order)
    assert found.is_contiguous()
    for result in (found, found.transpose(1, 2).contiguous().transpose(1, 2)):
        back = restored(result, inverse(order))
        assert torch.equal(back, x)
        assert back.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 1])
def test_rows_of_any_type_and_start_in_memory_keep_their_bits(dtype, offset):
    x = torch.randn(4 * 23 * 8 + offset).to(dtype)[offset:].view(1, 4, 23, 8)
    order = orders(2, 23)
    found = permuted(x, order)
    assert found.dtype == dtype
    assert torch.equal(found[0, 3], x[0, 3, order[1]])


def test_gradients_go_through():
    x = torch.randn(1, 4, 23, 8, requires_grad=True)
    order, weight = orders(2, 23), torch.randn(1, 4, 23, 8)
    (restored(permuted(x, order), inverse(order)) * weight).sum().backward()
    assert torch.equal(x.grad, weight)
