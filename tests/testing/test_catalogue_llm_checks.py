"""Every recipe for prompts on every tiny video language model."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tubelet.core.recipe import Recipe
from tubelet.models.catalogue import adapter_for, refusal
from tubelet.testing import catalogue, catalogue_llm, tiny_llm

RECIPES = {recipe.name: recipe for recipe in catalogue_llm.settings()}
HOSTS = {name: tiny_llm.build(name) for name in tiny_llm.HOSTS}
# The identity point is asked for on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::tubelet.core.errors.NoEffectWarning")

RUNNING = [
    (recipe, host)
    for recipe in RECIPES
    for host in HOSTS
    if refusal(RECIPES[recipe], adapter_for(HOSTS[host]).lacks(HOSTS[host])) is None
]
pairs = pytest.mark.parametrize(("name", "host"), RUNNING)


@cache
def prompt(host: str, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Prompts whose questions differ in length, so that all but one are padded."""
    return tiny_llm.prompt(host, [[4]] * batch, seed=seed, question=(9, 6))


def pair(name: str, host: str) -> tuple[Any, Recipe]:
    return HOSTS[host], catalogue_llm.placed(RECIPES[name], host)


@pytest.mark.parametrize("name", RECIPES)
def test_every_prompt_recipe_runs_on_some_tiny_model(name):
    assert any(name == running for running, _ in RUNNING)


@pytest.mark.parametrize("name", RECIPES)
def test_prompt_recipe_survives_json_text_and_pickle(name):
    catalogue.survives_serialisation(RECIPES[name])
    catalogue.known_requirements(RECIPES[name])


@pairs
def test_prompt_recipe_acts(name, host):
    catalogue_llm.acts(*pair(name, host), prompt(host))


@pairs
def test_identity_point_is_bit_identical_to_dense(name, host):
    catalogue_llm.identity_equals_dense(*pair(name, host), prompt(host))


@pairs
def test_remove_restores_the_language_model(name, host):
    catalogue_llm.remove_restores(*pair(name, host), prompt(host))


@pairs
def test_prompt_plans_are_valid_and_deterministic(name, host):
    catalogue_llm.plans_are_valid(*pair(name, host), prompt(host))
    catalogue_llm.same_plan_twice(*pair(name, host), prompt(host))


@pairs
def test_nan_in_dropped_video_tokens_never_reaches_the_answer(name, host):
    catalogue_llm.dropped_is_never_read(*pair(name, host), prompt(host))


@pairs
def test_one_prompt_leaves_no_state_for_the_next(name, host):
    catalogue_llm.state_never_survives(*pair(name, host), prompt(host), prompt(host, 3, seed=5))


@pairs
def test_padded_batch_equals_its_prompts(name, host):
    singles = [
        tiny_llm.prompt(host, [[4]], seed=seed, question=(words,))
        for seed, words in enumerate((9, 6))
    ]
    catalogue_llm.batch_equals_singles(*pair(name, host), prompt(host), singles)


@pairs
def test_kinds_of_generation_agree(name, host):
    catalogue_llm.modes_agree(*pair(name, host), prompt(host))
    catalogue_llm.modes_agree(*pair(name, host), prompt(host, 1))


@pairs
def test_prompt_recipe_runs_in_half_precision(name, host):
    catalogue_llm.runs_in(*pair(name, host), prompt(host), torch.bfloat16)


@pairs
def test_an_error_inside_a_decision_leaves_the_model_usable(name, host):
    catalogue_llm.error_leaves_it_usable(*pair(name, host), prompt(host))
