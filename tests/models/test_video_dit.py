"""Recipes on tubelet's own video diffusion transformer."""

import pytest
import torch

import tubelet
from tubelet.core.errors import UnsupportedError
from tubelet.models.attend_op import open_places
from tubelet.models.catalogue import adapter_for
from tubelet.nn.dit import VideoDiT, VideoDiTConfig
from tubelet.nn.flow import generate
from tubelet.recipes import RandomBlocks, Rettention, SubBlock, ToMe, ZerothOrder

ATTRIBUTES = torch.tensor([[1, 2, 3, 1, 0], [0, 1, 2, 3, 1]])


@pytest.fixture(scope="module")
def model() -> VideoDiT:
    torch.manual_seed(0)
    config = VideoDiTConfig(width=32, depth=3, heads=2, frames=8, size=(32, 32))
    made = VideoDiT(config).eval()
    for weight in made.parameters():
        # A new model predicts grey, whatever its attention does.
        torch.nn.init.normal_(weight, std=0.1)
    return made


def drawn(model, steps=3, **options):
    return generate(model, ATTRIBUTES, seed=5, steps=steps, guidance=2.0, **options)


def test_full_density_equals_the_untouched_model_and_remove_is_exact(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = drawn(model)
    with tubelet.accelerate(model, RandomBlocks(density=1.0, block=(16, 16))) as handle:
        same = drawn(model)
        report = handle.report()
    assert torch.allclose(same, dense, atol=1e-5)
    assert report.mean_density == pytest.approx(1.0)
    assert torch.equal(drawn(model), dense)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert open_places() == 0
    assert all(block.attention.runtime is None for block in model.blocks)
    assert not model._forward_pre_hooks


def test_steps_layers_and_densities_are_reported(model):
    recipe = RandomBlocks(density=0.5, block=(32, 32), dense_layers=1, dense_steps=0.5)
    with tubelet.accelerate(model, recipe, num_steps=4) as handle:
        sparse = drawn(model, 4)
    entries = handle.report().densities()
    assert {(e["step"], e["layer"]) for e in entries} == {(2, 1), (2, 2), (3, 1), (3, 2)}
    assert all(e["heads"] == pytest.approx([0.5, 0.5]) for e in entries)
    assert not torch.allclose(sparse, drawn(model, 4), atol=1e-3)


def test_a_second_clip_does_not_see_the_first(model):
    recipes = (SubBlock(density=0.4, block=(32, 32), parts=(2, 2), dense_steps=0.0), ZerothOrder())
    with tubelet.accelerate(model, *recipes):
        alone = drawn(model)
    with tubelet.accelerate(model, *recipes):
        generate(model, ATTRIBUTES[:1], seed=9, steps=2, guidance=1.0)
        after = drawn(model)
    assert torch.equal(alone, after)


def test_what_it_lacks_is_said(model):
    with pytest.raises(UnsupportedError, match="do not run on generators yet"):
        tubelet.accelerate(model, ToMe(r=4))
    assert adapter_for(model).family == "VideoDiT"


def test_training_under_recipes_is_refused(model):
    clip = torch.randn(1, 8, 3, 32, 32, requires_grad=True)
    with tubelet.accelerate(model, RandomBlocks(density=0.5, block=(16, 16))):
        out = model(clip, torch.tensor([0.5]), ATTRIBUTES[:1])
        with pytest.raises(UnsupportedError, match="has no gradient"):
            out.sum().backward()


def test_a_pass_that_fails_leaves_nothing_to_the_next_run(model, monkeypatch):
    recipes = (RandomBlocks(density=0.5, block=(16, 16)), Rettention(refresh=4))
    with tubelet.accelerate(model, *recipes):
        alone = drawn(model)
    block = model.blocks[2]
    with tubelet.accelerate(model, *recipes):
        monkeypatch.setattr(block, "forward", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            drawn(model)
        monkeypatch.undo()
        assert torch.equal(drawn(model), alone)
    assert not model._forward_hooks
    assert not model._forward_hooks_always_called
