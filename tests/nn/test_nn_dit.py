"""The video diffusion transformer: start, conditioning, geometry, the place for adapters."""

import pytest
import torch
from torch.nn.functional import avg_pool2d, scaled_dot_product_attention

from tubelet.core.errors import ShapeError
from tubelet.nn.dit import (
    VideoDiT,
    VideoDiTConfig,
    check_attributes,
    count_tokens,
    forward_flops,
    patchify,
    time_code,
    unpatchify,
)
from tubelet.nn.flow import training_loss
from tubelet.train.world import COUNTS, make_world

TINY = VideoDiTConfig(width=32, depth=2, heads=2, frames=4, size=(16, 16))


@pytest.fixture
def _one_thread():
    """Tiny products spend their time waiting for a second thread on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stirred(config=TINY):
    """A model whose gates and output are open."""
    model = VideoDiT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def inputs(batch=2, frames=4, size=(16, 16)):
    noisy = torch.randn(batch, frames, 3, *size)
    attributes = torch.tensor([[1, 2, 3, 0, 1], [0, 5, 7, 3, 0]])[:batch]
    return noisy, torch.linspace(0.2, 0.7, batch), attributes


def test_a_new_model_predicts_mid_grey():
    found = VideoDiT(TINY)(*inputs())
    assert found.shape == (2, 4, 3, 16, 16)
    assert torch.equal(found, torch.zeros_like(found))


def test_a_new_block_is_the_identity():
    block = VideoDiT(TINY).blocks[0]
    hidden = torch.randn(2, 5, 32)
    table = torch.ones(5, 16), torch.zeros(5, 16)
    assert torch.equal(block(hidden, torch.zeros(2, 6, 32), *table), hidden)


def test_new_blocks_pass_the_embedding_through():
    model, seen = VideoDiT(TINY), []
    for module in (model.embed, model.blocks[-1]):
        module.register_forward_hook(lambda *call: seen.append(call[-1]))
    model(*inputs())
    assert torch.equal(seen[0], seen[1])


def test_every_parameter_learns_after_the_first_steps():
    model = VideoDiT(TINY)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        (model(*inputs()) - 0.5).square().mean().backward()
        optimiser.step()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def test_the_configured_model_stays_small():
    model = VideoDiT(VideoDiTConfig())
    assert sum(p.numel() for p in model.parameters()) < 9e6
    assert model.grid(torch.zeros(1, 16, 3, 128, 128)).num_tokens == 8192


def test_attributes_at_minus_one_are_unconditional():
    model = stirred()
    noisy, time, attributes = inputs()
    noisy, time = noisy[:1].expand(2, -1, -1, -1, -1), time[:1].expand(2)
    told = model(noisy, time, attributes)
    assert (told[0] - told[1]).abs().max() > 1e-3
    untold = model(noisy, time, torch.full_like(attributes, -1))
    torch.testing.assert_close(untold[0], untold[1])
    assert (untold[0] - told[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", range(5))
def test_every_attribute_and_its_absence_count(kind):
    model = stirred()
    noisy, time, attributes = inputs(1)
    found = []
    for value in (-1, 0, 1):
        attributes[0, kind] = value
        found.append(model(noisy, time, attributes))
    pairs = [(found[0], found[1]), (found[1], found[2]), (found[0], found[2])]
    assert all((a - b).abs().max() > 1e-4 for a, b in pairs)


def test_time_counts_even_close_to_both_ends():
    code = time_code(torch.tensor([0.0, 0.001, 0.999, 1.0]), 64)
    assert (code.diff(dim=0).norm(dim=1) > 0.5)[[0, 2]].all()
    model = stirred()
    noisy, time, attributes = inputs()
    assert (
        model(noisy, time, attributes) - model(noisy, time + 0.2, attributes)
    ).abs().max() > 0.01


def test_samples_of_a_batch_do_not_meet():
    model = stirred()
    noisy, time, attributes = inputs()
    both = model(noisy, time, attributes)
    for i in range(2):
        alone = model(noisy[i : i + 1], time[i : i + 1], attributes[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-5, rtol=1e-4)


def test_other_frames_and_sizes_run():
    noisy, time, attributes = inputs(frames=6, size=(8, 20))
    assert stirred()(noisy, time, attributes).shape == noisy.shape


def test_tokens_see_all_of_space_and_time():
    model = stirred()
    noisy, time, attributes = inputs(1)
    changed = noisy.clone()
    changed[:, -1, :, -1, -1] += 1
    change = (model(changed, time, attributes) - model(noisy, time, attributes)).abs()
    assert change[:, 0, :, 0, 0].max() > 1e-6


class Watch:
    """Keeps the queries and keys of every call."""

    def __init__(self):
        self.logits = []

    def attend(self, module, q, k, v, scale, host):
        self.logits.append(q @ k.transpose(-1, -2))
        return host()


def test_positions_are_relative_in_time_height_and_width():
    model, watch = stirred(), Watch()
    model.blocks[0].attention.runtime = watch
    _, time, attributes = inputs(1)
    # In a flat clip tokens differ by their positions alone.
    model(torch.full((1, 4, 3, 16, 16), 0.3), time, attributes)
    logits = watch.logits[0].reshape(2, 2, 4, 4, 2, 4, 4)
    here, moved = logits[:, 0, :-1, :-1, 0, :-1, :-1], logits[:, 1, 1:, 1:, 1, 1:, 1:]
    torch.testing.assert_close(here, moved, atol=1e-4, rtol=1e-4)
    for axis in (4, 5, 6):
        assert logits.diff(dim=axis).abs().max() > 1e-2


def test_patches_are_in_raster_order_and_come_back():
    clip = torch.randn(2, 4, 3, 8, 12)
    cut = patchify(clip, (2, 4, 4))
    assert cut.shape == (2, 2 * 2 * 3, 2 * 4 * 4 * 3)
    torch.testing.assert_close(
        cut[0, 1].reshape(2, 4, 4, 3), clip[0, :2, :, :4, 4:8].permute(0, 2, 3, 1)
    )
    tokens = count_tokens((4, 8, 12), (2, 4, 4))
    assert tokens == (2, 2, 3)
    assert torch.equal(unpatchify(cut, tokens, (2, 4, 4)), clip)


class Runtime:
    """Stands in for an adapter: counts calls, replaces the attention by zeros or the host's."""

    def __init__(self, keep):
        self.keep, self.calls = keep, []

    def attend(self, module, q, k, v, scale, host):
        self.calls.append((module, tuple(q.shape), scale))
        return host() if self.keep else torch.zeros_like(host())


def test_an_adapter_can_replace_attention():
    model = stirred()
    noisy, time, attributes = inputs()
    dense = model(noisy, time, attributes)
    for keep in (True, False):
        runtime = Runtime(keep)
        for block in model.blocks:
            block.attention.runtime = runtime
        assert torch.equal(model(noisy, time, attributes), dense) == keep
        assert [call[0] for call in runtime.calls] == [b.attention for b in model.blocks]
        assert runtime.calls[0][1:] == ((2, 2, 32, 16), 16**-0.5)


class PlainAttention:
    """Stands in for the kernel package, whose shape checks in tests cannot be traced."""

    def attend(self, module, q, k, v, scale, host):
        return scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def test_it_traces_whole():
    model = stirred()
    noisy, time, attributes = inputs()
    dense = model(noisy, time, attributes)
    for block in model.blocks:
        block.attention.runtime = PlainAttention()
    traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(traced(noisy, time, attributes), dense, atol=1e-5, rtol=1e-4)


def test_it_runs_in_half_precision():
    model = stirred()
    noisy, time, attributes = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(noisy, time, attributes)
    assert half.dtype == torch.float32
    exact = model(noisy, time, attributes)
    assert (half - exact).norm() / exact.norm() < 0.03
    assert model.bfloat16()(noisy.bfloat16(), time, attributes).dtype == torch.bfloat16


@pytest.mark.usefixtures("_one_thread")
def test_a_tiny_model_learns_one_clip():
    torch.manual_seed(0)
    world = make_world(1, 0, frames=4, size=32)
    clip = avg_pool2d(world.pixels[0], 2).expand(4, -1, -1, -1, -1)
    model = VideoDiT(TINY)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(50):
        optimiser.zero_grad()
        loss = training_loss(model, clip, world.attributes.expand(4, -1), generator)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < sum(losses[:10]) / 10


def test_flops_are_those_of_the_products():
    config = VideoDiTConfig(width=8, depth=1, heads=1, mlp_ratio=2, patch=(1, 1, 1), size=(2, 2))
    n, c = 4, 8
    products = n * c * 3 * c + n * n * c * 2 + n * c * c + 2 * n * c * 16 + 2 * n * c * 3
    assert forward_flops(config, n) == 2 * products


def test_configurations_that_cannot_be_are_refused():
    for wrong in (
        {"width": 30, "heads": 4},
        {"width": 12, "heads": 4},
        {"depth": 0},
        {"mlp_ratio": 0},
        {"size": (128, 126)},
        {"attributes": (5, 0)},
    ):
        with pytest.raises(ShapeError):
            VideoDiTConfig(**wrong)
    assert VideoDiTConfig(patch=[2, 4, 4]) == VideoDiTConfig()


def test_inputs_that_do_not_fit_are_refused():
    model = VideoDiT(TINY)
    noisy, time, attributes = inputs()
    with pytest.raises(ShapeError, match="whole number of patches"):
        model(noisy[:, :3], time, attributes)
    with pytest.raises(ShapeError, match="batch, frames, 3"):
        model(noisy[:, :, :2], time, attributes)
    with pytest.raises(ShapeError, match="time must be"):
        model(noisy, time[:1], attributes)
    for wrong in (attributes[:, :4], attributes.float(), attributes[0]):
        with pytest.raises(ShapeError, match="attributes must be"):
            model(noisy, time, wrong)


def test_attributes_out_of_range_are_named():
    check_attributes(torch.tensor([[0, -1, 7, 3, 1]]), COUNTS)
    for wrong in ([[5, 0, 0, 0, 0]], [[0, 0, -2, 0, 0]], [[0.0] * 5], [[0] * 4], [0] * 5):
        with pytest.raises(ShapeError, match="attribute"):
            check_attributes(torch.tensor(wrong), COUNTS)
