"""Components of graphs against a plain search."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.ops.components import link

SETTINGS = settings(deadline=None, max_examples=80, derandomize=True)


def by_search(edges: list[tuple[int, int]], num: int) -> list[int]:
    label = list(range(num))
    for start in range(num):
        reached, frontier = {start}, [start]
        while frontier:
            here = frontier.pop()
            for a, b in edges + [(b, a) for a, b in edges]:
                if a == here and b not in reached:
                    reached.add(b)
                    frontier.append(b)
        label[start] = min(reached)
    return label


@SETTINGS
@given(st.data(), st.integers(1, 12))
def test_link_finds_the_lowest_member_of_each_component(data, num):
    ends = st.integers(0, num - 1)
    edges = data.draw(st.lists(st.tuples(ends, ends), max_size=14))
    first = torch.tensor([a for a, _ in edges], dtype=torch.int64)
    second = torch.tensor([b for _, b in edges], dtype=torch.int64)
    assert link(first, second, num).tolist() == by_search(edges, num)


def test_a_long_chain_is_one_component_whatever_its_order():
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert bool((link(order[1:], order[:-1], 500) == 0).all())
