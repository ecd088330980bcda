"""Every recipe on every tiny host."""

import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch

from tubelet.core.recipe import Recipe, TokenRecipe
from tubelet.testing import catalogue, tiny, tolerances

RECIPES = {recipe.name: recipe for recipe in catalogue.settings()}
# Built here only to ask which pairs run; a host's answer depends on its config alone.
HOSTS = {name: catalogue.stir(tiny.build(name, reducers=True)) for name in tiny.HOSTS}
# The identity point is asked for on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::tubelet.core.errors.NoEffectWarning")

PAIRS = [(recipe, host) for recipe in RECIPES for host in HOSTS]
RUNNING = [
    (recipe, host)
    for recipe, host in PAIRS
    if catalogue.why_refused(HOSTS[host], RECIPES[recipe]) is None
]

pairs = pytest.mark.parametrize(("name", "host"), RUNNING)


@cache
def clip(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return tiny.clip(batch, seed)


def pair(name: str, host: str) -> tuple[Any, Recipe]:
    return HOSTS[host], RECIPES[name]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_on_some_tiny_host(name):
    assert any(name == running for running, _ in RUNNING)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_survives_json_text_and_pickle(name):
    catalogue.survives_serialisation(RECIPES[name])
    catalogue.known_requirements(RECIPES[name])


@pytest.mark.parametrize(("name", "host"), PAIRS)
def test_recipe_runs_or_is_refused_with_the_reason(name, host):
    catalogue.runs_or_is_refused(*pair(name, host), clip())


@pairs
def test_identity_point_equals_dense(name, host):
    model, recipe = pair(name, host)
    replaced = "timesformer" in host or not isinstance(recipe, TokenRecipe)
    bound = tolerances.REPLACED_ATTENTION if replaced else tolerances.EXACT
    catalogue.identity_equals_dense(model, recipe, clip(), bound)


@pairs
def test_remove_restores_bit_for_bit(name, host):
    catalogue.remove_restores(*pair(name, host), clip())


@pairs
def test_plans_conserve_mass_and_class_tokens(name, host):
    catalogue.plans_are_valid(*pair(name, host), clip())


@pairs
def test_nan_in_dropped_tokens_never_reaches_the_output(name, host):
    catalogue.dropped_is_never_read(*pair(name, host), clip())


@pairs
def test_one_run_leaves_no_state_for_the_next(name, host):
    catalogue.state_never_survives(*pair(name, host), clip(), clip(3, seed=5))


@pairs
def test_batch_of_two_equals_two_batches_of_one(name, host):
    catalogue.batch_equals_singles(*pair(name, host), clip())


@pairs
def test_output_length_and_order_stay(name, host):
    catalogue.length_is_kept(*pair(name, host), clip())


@pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recipe_runs_in_dtype(name, host, dtype):
    catalogue.runs_in(*pair(name, host), clip(), dtype)


@pairs
def test_an_error_inside_a_forward_leaves_the_model_usable(name, host):
    catalogue.error_leaves_it_usable(*pair(name, host), clip())


def test_plans_trace_full_graph():
    # In a process of its own: runtime shape checks are Python that no graph can hold.
    script = """
import torch
from tubelet.testing import catalogue, tiny
for host in tiny.HOSTS:
    model = tiny.build(host, reducers=True)
    for recipe in catalogue.settings():
        if catalogue.why_refused(model, recipe) is None:
            catalogue.plan_traces(model, recipe, tiny.clip(2))
            print("traced", recipe.name, host)
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {line.split()[1] for line in done.stdout.splitlines()} == {name for name, _ in RUNNING}
