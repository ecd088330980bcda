"""TokenAssignment: every way of applying it equals the dense matrix it stands for."""

import json
import pickle
import re

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import ShapeError

SETTINGS = settings(deadline=None, max_examples=40, derandomize=True)
KINDS = ["identity", "keep", "merge", "merge and drop", "scaled merge"]


@pytest.fixture
def untyped():
    """Users run without shape checking, and get the library's own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def build(kind: str, batch: int, num: int, kept: int, seed: int) -> TokenAssignment:
    """A random assignment of one kind."""
    if kind == "identity":
        return TokenAssignment.identity(batch, num)
    random = torch.Generator().manual_seed(seed)
    places = torch.rand(batch, num, generator=random).argsort(1)[:, :kept].sort(1).values
    if kind == "keep":
        return TokenAssignment.keep(places, num)
    target = places.gather(1, torch.randint(kept, (batch, num), generator=random))
    if kind == "merge and drop":
        target[torch.rand(batch, num, generator=random) < 0.4] = -1
    target = target.scatter(1, places, places)
    size = torch.rand(batch, num, generator=random) + 0.5
    scale = torch.rand(batch, num, generator=random) if kind == "scaled merge" else None
    return TokenAssignment.merge(target, places, size, scale)


@st.composite
def assignments(draw, kinds=tuple(KINDS), num=None, batch=None):
    num = draw(st.integers(1, 12)) if num is None else num
    batch = draw(st.integers(1, 3)) if batch is None else batch
    kept = draw(st.integers(1, num))
    return build(draw(st.sampled_from(kinds)), batch, num, kept, draw(st.integers(0, 2**16)))


@st.composite
def chains(draw):
    first = draw(assignments())
    return first, draw(assignments(num=first.num_out, batch=first.batch))


def tokens(assignment: TokenAssignment, dtype=torch.float32, width=(3,)) -> torch.Tensor:
    return torch.randn(assignment.batch, assignment.num_in, *width, dtype=torch.float64).to(dtype)


@SETTINGS
@given(assignments(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_reduce_equals_the_dense_matrix(assignment, dtype):
    x = tokens(assignment, dtype)
    out = assignment.reduce(x)
    assert out.dtype == dtype
    # Sums are accumulated in at least float32, so the result is off by its own rounding only.
    expected = assignment.matrix().double() @ x.double()
    eps = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=eps, atol=min(eps, 1e-6))


@SETTINGS
@given(assignments(), st.sampled_from([(), (2,), (2, 1, 3)]))
def test_reduce_and_restore_keep_trailing_axes(assignment, width):
    x = tokens(assignment, width=width)
    y = assignment.reduce(x)
    assert y.shape == (assignment.batch, assignment.num_out, *width)
    restored = assignment.restore(y)
    assert restored.shape == x.shape
    flat = assignment.reduce(x.reshape(*x.shape[:2], -1))
    assert torch.equal(y.reshape(flat.shape), flat)
    assert torch.equal(restored, assignment.restore(flat).reshape(x.shape))


def test_low_precision_sums_accumulate_in_float32():
    num = 4096
    target = torch.zeros(1, num, dtype=torch.int64)
    merged = TokenAssignment.merge(target, target[:, :1], torch.ones(1, num))
    # A running bf16 sum of these would stop growing at 256 of 4096 terms.
    out = merged.reduce(torch.ones(1, num, 1, dtype=torch.bfloat16))
    assert out.item() == 1.0


@SETTINGS
@given(chains())
def test_compose_equals_applying_both(chain):
    first, second = chain
    both = first.compose(second)
    both.check()
    x = tokens(first, torch.float64)
    torch.testing.assert_close(both.reduce(x), second.reduce(first.reduce(x)), atol=1e-6, rtol=1e-6)
    product = second.matrix() @ first.matrix()
    torch.testing.assert_close(both.matrix(), product, atol=1e-6, rtol=1e-6)
    assert torch.equal(both.anchor, first.anchor.gather(1, second.anchor))
    assert both.copies == (first.copies and second.copies)


@SETTINGS
@given(chains())
def test_restoring_a_composition_equals_restoring_twice_where_nothing_is_dropped(chain):
    first, second = chain
    both = first.compose(second)
    y = torch.randn(both.batch, both.num_out, 2)
    twice = first.restore(second.restore(y))
    live = both.index >= 0
    assert torch.equal(both.restore(y)[live], twice[live])


@pytest.mark.parametrize("second", ["keep", "merge and drop"])
@pytest.mark.parametrize("first", ["keep", "merge and drop"])
def test_compose_counts_original_tokens(first, second):
    one = build(first, 2, 10, 6, 0)
    two = build(second, 2, 6, 3, 1)
    both = one.compose(two)
    for sample in range(2):
        counts = [0] * 3
        for slot in one.index[sample].tolist():
            end = two.index[sample, slot].item() if slot >= 0 else -1
            if end >= 0:
                counts[end] += 1
        assert both.size[sample].tolist() == counts


@SETTINGS
@given(assignments())
def test_sizes_sum_to_the_tokens_that_were_not_dropped(assignment):
    live = (assignment.index >= 0).sum(1).float()
    assert torch.equal(assignment.size.sum(1), live)
    assert bool((assignment.size >= 1).all())


@SETTINGS
@given(assignments(kinds=("merge", "merge and drop")))
def test_weights_of_a_plain_merge_sum_to_one_per_output(assignment):
    torch.testing.assert_close(
        assignment.matrix().sum(2), torch.ones_like(assignment.size), atol=1e-6, rtol=0
    )


def test_merge_weights_are_shares_of_the_mass():
    target = torch.tensor([[0, 0, 2, 0, -1]])
    merged = TokenAssignment.merge(
        target, torch.tensor([[0, 2]]), torch.tensor([[1.0, 2.0, 5.0, 1.0, 9.0]])
    )
    assert merged.matrix()[0].tolist() == [[0.25, 0.5, 0, 0.25, 0], [0, 0, 1, 0, 0]]
    assert merged.size.tolist() == [[3, 1]]


def test_merge_scale_shrinks_the_contribution_and_not_the_denominator():
    target = torch.zeros(1, 2, dtype=torch.int64)
    ones = torch.ones(1, 2)
    scaled = TokenAssignment.merge(target, target[:, :1], ones, torch.tensor([[1.0, 0.5]]))
    assert scaled.weight.tolist() == [[0.5, 0.25]]


@SETTINGS
@given(assignments())
def test_constructors_pass_their_own_check(assignment):
    assignment.check()
    assert bool((assignment.anchor.diff(dim=1) > 0).all())


def test_identity_changes_nothing():
    x = torch.randn(2, 5, 3)
    same = TokenAssignment.identity(2, 5)
    assert torch.equal(same.reduce(x), x)
    assert torch.equal(same.restore(x), x)


def test_copies_are_bit_exact_in_every_dtype():
    kept = TokenAssignment.keep(torch.tensor([[1, 3], [0, 2]]), 4)
    assert kept.copies
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = torch.randn(2, 4, 3).to(dtype)
        assert torch.equal(kept.reduce(x), torch.stack([x[0, [1, 3]], x[1, [0, 2]]]))


@SETTINGS
@given(assignments(kinds=("keep", "merge and drop")), st.sampled_from([torch.nan, torch.inf]))
def test_poison_in_dropped_tokens_never_reaches_an_output(assignment, poison):
    x = tokens(assignment)
    clean = assignment.reduce(x)
    x[assignment.index < 0] = poison
    assert torch.equal(assignment.reduce(x), clean)


@pytest.mark.parametrize("kind", ["keep", "merge and drop"])
def test_poison_in_one_sample_stays_there(kind):
    assignment = build(kind, 3, 8, 4, 0)
    x = tokens(assignment)
    clean = assignment.reduce(x)
    x[1] = torch.nan
    assert torch.equal(assignment.reduce(x)[[0, 2]], clean[[0, 2]])


@SETTINGS
@given(assignments())
def test_restored_tokens_carry_the_value_of_their_output(assignment):
    y = torch.randn(assignment.batch, assignment.num_out, 2)
    restored = assignment.restore(y, fill="zero")
    for sample in range(assignment.batch):
        for place, slot in enumerate(assignment.index[sample].tolist()):
            expected = y[sample, slot] if slot >= 0 else torch.zeros(2)
            assert torch.equal(restored[sample, place], expected)


@SETTINGS
@given(assignments())
def test_mean_fill_preserves_the_size_weighted_mean(assignment):
    y = torch.randn(assignment.batch, assignment.num_out, 2)
    share = assignment.size / assignment.size.sum(1, keepdim=True)
    pooled = (share[..., None] * y).sum(1)
    restored = assignment.restore(y)
    torch.testing.assert_close(restored.mean(1), pooled, atol=1e-6, rtol=1e-5)
    for sample in range(assignment.batch):
        for row in restored[sample, assignment.index[sample] < 0]:
            torch.testing.assert_close(row, pooled[sample], atol=1e-6, rtol=1e-5)


@SETTINGS
@given(assignments())
def test_batch_of_many_equals_single_runs(assignment):
    x = tokens(assignment)
    y = torch.randn(assignment.batch, assignment.num_out, 3)
    reduced, restored = assignment.reduce(x), assignment.restore(y)
    for sample in range(assignment.batch):
        row = slice(sample, sample + 1)
        parts = {name: getattr(assignment, name)[row] for name in TokenAssignment.TENSORS}
        single = TokenAssignment(**parts, copies=assignment.copies)
        assert torch.equal(single.reduce(x[row]), reduced[row])
        torch.testing.assert_close(single.restore(y[row]), restored[row])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dense_matrix(kind):
    assignment = build(kind, 2, 6, 3, 4)
    x = tokens(assignment, torch.float64).requires_grad_()
    pull = torch.randn(assignment.batch, assignment.num_out, 3, dtype=torch.float64)
    (assignment.reduce(x) * pull).sum().backward()
    expected = assignment.matrix().double().transpose(1, 2) @ pull
    torch.testing.assert_close(x.grad, expected, atol=1e-6, rtol=1e-6)


def test_gradients_flow_back_through_restore():
    assignment = build("merge and drop", 1, 6, 3, 4)
    y = torch.randn(1, 3, 2, requires_grad=True)
    assignment.restore(y, fill="zero").sum().backward()
    assert torch.equal(y.grad[0, :, 0], assignment.size[0])


@SETTINGS
@given(assignments())
def test_json_round_trip_is_exact(assignment):
    again = TokenAssignment.from_dict(json.loads(json.dumps(assignment.to_dict())))
    for name in TokenAssignment.TENSORS:
        have, want = getattr(again, name), getattr(assignment, name)
        assert have.dtype == want.dtype
        assert torch.equal(have, want)
    assert again.copies == assignment.copies


def test_pickle_and_device_moves_keep_the_values():
    assignment = build("merge and drop", 2, 6, 3, 0)
    x = tokens(assignment)
    for again in (pickle.loads(pickle.dumps(assignment)), assignment.to("cpu")):
        assert torch.equal(again.reduce(x), assignment.reduce(x))
    assert assignment.to("meta").index.device.type == "meta"


def test_properties():
    assignment = build("merge", 2, 6, 3, 0)
    assert (assignment.batch, assignment.num_in, assignment.num_out) == (2, 6, 3)


def test_an_empty_keep_is_refused():
    with pytest.raises(ShapeError, match="must keep between 1 and 4, got 0"):
        TokenAssignment.keep(torch.empty(1, 0, dtype=torch.int64), 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(1, 3)}, "index and weight of one shape"),
        ({"index": torch.zeros(4, dtype=torch.int64)}, "index and weight of one shape"),
        ({"size": torch.ones(1, 3)}, "anchor and size of one shape"),
        (
            {"anchor": torch.zeros(2, 2, dtype=torch.int64), "size": torch.ones(2, 2)},
            "the same B",
        ),
        (
            {"anchor": torch.arange(5)[None], "size": torch.ones(1, 5)},
            "must keep between 1 and 4, got 5",
        ),
    ],
)
def test_shapes_that_disagree_are_refused(untyped, changes, message):
    good = {
        "index": torch.tensor([[0, 0, 1, -1]]),
        "weight": torch.ones(1, 4),
        "anchor": torch.tensor([[0, 2]]),
        "size": torch.ones(1, 2),
    }
    TokenAssignment(**good)
    with pytest.raises(ShapeError, match=message):
        TokenAssignment(**(good | changes))


def test_tensors_for_other_assignments_are_refused(untyped):
    assignment = build("merge", 2, 6, 3, 0)
    with pytest.raises(ShapeError, match=re.escape("takes tokens [2, 6, ...], got (2, 5, 1)")):
        assignment.reduce(torch.zeros(2, 5, 1))
    with pytest.raises(ShapeError, match=re.escape("restores tokens [2, 3, ...], got (2, 6, 1)")):
        assignment.restore(torch.zeros(2, 6, 1))
    with pytest.raises(ShapeError, match="cannot compose 6 -> 3"):
        assignment.compose(assignment)
    with pytest.raises(ShapeError, match="batch 1"):
        assignment.compose(build("merge", 1, 3, 2, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": [[0, 0, 2, -1]]}, "index leaves"),
        ({"index": [[0, -2, 1, -1]]}, "index leaves"),
        ({"anchor": [[0, 4]]}, "anchor leaves"),
        ({"anchor": [[-1, 2]]}, "anchor leaves"),
        ({"anchor": [[2, 0]]}, "strictly ascending"),
        ({"anchor": [[2, 2]]}, "strictly ascending"),
        ({"anchor": [[0, 1]]}, "not assigned to its own output"),
        ({"index": [[0, 0, -1, 1]]}, "not assigned to its own output"),
        ({"weight": [[1.0, float("nan"), 1.0, 1.0]]}, "must be finite"),
        ({"weight": [[1.0, 1.0, float("inf"), 1.0]]}, "must be finite"),
    ],
)
def test_check_finds_bad_values(changes, message):
    good = {
        "index": [[0, 0, 1, -1]],
        # A dropped token's weight is never read, so it may be anything.
        "weight": [[0.5, 0.5, 1.0, float("nan")]],
        "anchor": [[0, 2]],
        "size": [[2.0, 1.0]],
    }
    TokenAssignment(**{name: torch.tensor(value) for name, value in good.items()}).check()
    bad = {name: torch.tensor(value) for name, value in (good | changes).items()}
    with pytest.raises(ShapeError, match=message):
        TokenAssignment(**bad).check()


@given(mask=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3))
@SETTINGS
def test_keep_where_equals_keeping_each_sample_by_itself(mask):
    for row in mask:
        row[2] = True
    rows = torch.tensor(mask)
    plans = TokenAssignment.keep_where(rows)
    for row, plan in zip(rows, plans, strict=True):
        wanted = TokenAssignment.keep(row.nonzero().T, 6)
        plan.check()
        for name in TokenAssignment.TENSORS:
            assert torch.equal(getattr(plan, name), getattr(wanted, name)), name
        assert plan.copies


def test_a_sample_that_keeps_nothing_is_refused():
    with pytest.raises(ShapeError):
        TokenAssignment.keep_where(torch.tensor([[True, False], [False, False]]))
