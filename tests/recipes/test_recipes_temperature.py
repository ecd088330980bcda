"""Softmax temperature."""

import copy
import math

import pytest
import torch

from tubelet.core.context import AttentionContext, Site
from tubelet.core.grid import TokenGrid
from tubelet.kernels.attention import attention_entropy
from tubelet.recipes import TempScale
from tubelet.testing import catalogue, tiny, tolerances


def temperature(recipe, keys):
    q = torch.randn(1, 2, keys, 8)
    site = Site(name="layer", layer=0, num_layers=1, kind="joint")
    grid = TokenGrid(frames=1, height=1, width=keys)
    ctx = AttentionContext(site=site, grid=grid, query=q, key=q, value=q, scale=8**-0.5)
    return recipe.plan(ctx).temperature


def rescaled(model, factor):
    """The host with its own attention scale multiplied, as a hand-written reference."""
    model = copy.deepcopy(model)
    for layer in model.get_submodule("vivit.layers"):
        layer.attention.scaling *= factor
    return model


@pytest.mark.parametrize("value", [0.5, 0.9, 2.0])
def test_TempScale_divides_the_logits_by_its_temperature(host, accelerated, value):
    model, pixels = host("vivit"), tiny.clip(2)
    got = accelerated(model, TempScale(temperature=value), pixels)
    wanted = catalogue.logits(rescaled(model, 1 / value), pixels)
    assert catalogue.difference(got, wanted) <= tolerances.REPLACED_ATTENTION


def test_TempScale_follows_the_log_of_the_number_of_tokens(host, accelerated):
    # Trained on 17 tokens, run on 65: sharper by log 65 / log 17.
    model, pixels = host("vivit"), tiny.clip(2)
    got = accelerated(model, TempScale(trained_tokens=17), pixels)
    wanted = catalogue.logits(rescaled(model, math.log(65) / math.log(17)), pixels)
    assert catalogue.difference(got, wanted) <= tolerances.REPLACED_ATTENTION


def test_TempScale_sharpens_beyond_the_trained_length_and_not_at_it():
    assert temperature(TempScale(trained_tokens=64), 64) == 1.0
    assert temperature(TempScale(trained_tokens=64), 4096) == pytest.approx(0.5)
    assert temperature(TempScale(trained_tokens=64), 8) == pytest.approx(2.0)


def test_TempScale_below_one_lowers_entropy():
    q, k = torch.randn(2, 1, 2, 50, 16)
    entropies = []
    for value in (1.0, temperature(TempScale(), 50)):
        scale = 0.25 / value
        lse = (q @ k.transpose(2, 3) * scale).logsumexp(-1)
        entropies.append(attention_entropy(q, k, lse, scale=scale))
    assert bool((entropies[1] < entropies[0]).all())
