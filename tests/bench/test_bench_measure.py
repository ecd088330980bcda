"""Counting and timing."""

import time

import torch
import torch.nn.functional as F

from tubelet.bench.measure import count_macs, interleaved, median, peak_memory, seconds
from tubelet.kernels.attention import attention

CPU = torch.device("cpu")


def test_macs_of_a_matrix_product_are_exact() -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert count_macs(lambda: a @ b) == 3 * 5 * 7


def test_macs_of_fused_attention_count_both_products() -> None:
    q = torch.randn(2, 3, 10, 16)
    assert count_macs(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 3 * 10 * 10 * 16
    assert count_macs(lambda: attention(q, q, q)) == 2 * 2 * 3 * 10 * 10 * 16


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    x = torch.randn(1000)

    def one_after_the_other() -> None:
        for _ in range(5):
            y = x + 1
            del y

    def all_at_once() -> None:
        kept = [x + i for i in range(5)]
        assert len(kept) == 5

    assert peak_memory(one_after_the_other, CPU) == 4000
    assert peak_memory(all_at_once, CPU) == 20000


def test_peak_memory_ignores_inputs_and_views() -> None:
    x = torch.randn(1000)
    assert peak_memory(lambda: x.view(10, 100)[:5].t(), CPU) == 0


def test_interleaving_takes_turns_in_both_directions() -> None:
    order: list[str] = []

    def variant(name: str):
        def run() -> float:
            order.append(name)
            return float(len(order))

        return run

    samples = interleaved([variant("a"), variant("b"), variant("c")], 2)
    assert order == ["a", "b", "c", "c", "b", "a"]
    assert samples == [[1.0, 6.0], [2.0, 5.0], [3.0, 4.0]]


def test_seconds_and_median_measure_wall_clock() -> None:
    # Only that it is wall-clock in seconds: a sleep cannot end early.
    assert seconds(lambda: time.sleep(0.02), CPU) >= 0.02
    assert median([3.0, 1.0, 2.0]) == 2.0
