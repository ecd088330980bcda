"""Jobs: every one builds, starts from what it is told to, and writes what it can read."""

import json

import pytest
import torch

from tubelet.core.errors import ModelError
from tubelet.core.recipe import LearnedReduction
from tubelet.models.accelerate import accelerate
from tubelet.nn.dit import VideoDiT, VideoDiTConfig
from tubelet.nn.reducers import build_reducers
from tubelet.nn.vit import VideoViT, VideoViTConfig
from tubelet.nn.weights import load_weights, read_card, save_weights
from tubelet.recipes import GumbelKeep
from tubelet.recipes.learned import LEARNED_KEEPS, LEARNED_LAYERS, learned_recipes
from tubelet.train.clips import TASKS
from tubelet.train.jobs import (
    ENCODER_TASKS,
    LEARNED,
    QUICK_SHAPE,
    TRAINED,
    Job,
    Setup,
    job,
    jobs,
    save,
)
from tubelet.train.objectives import DiffusionObjective, ElasticObjective, shuffled, single_frame


def setup(**changes) -> Setup:
    fields = {"device": torch.device("cpu"), "seed": 3, "batch": 2, "quick": True}
    return Setup(**{**fields, **changes})


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """Weights of a quick encoder, as a name to start from."""
    folder = tmp_path_factory.mktemp("encoder")
    made = jobs()["encoder"].build(setup(seed=8))
    made.model.reducers = None
    del made.model.reducers
    save_weights(folder / "start", made.model, record={"seed": 8})
    return str(folder / "start")


# Names


def test_tasks_and_learned_recipes_are_jobs():
    known = jobs()
    assert {*TASKS, *LEARNED, "encoder", "encoder-small", "elastic", "generator"} <= set(known)
    assert len({entry.weights for entry in known.values()}) == len(known)
    assert all(name == entry.name and entry.summary for name, entry in known.items())
    assert all(entry.minutes > 0 for entry in known.values())


def test_every_learned_reduction_can_be_trained():
    import tubelet.recipes.learned as family

    final = [c for c in vars(family).values() if isinstance(c, type) and "identity" in vars(c)]
    assert set(learned_recipes().values()) == {c for c in final if issubclass(c, LearnedReduction)}
    assert len(LEARNED) == 6


@pytest.mark.parametrize(
    ("name", "words"), [("encodr", "did you mean encoder"), ("shels", "did you mean shells")]
)
def test_an_unknown_name_is_told_with_the_closest_one(name, words):
    with pytest.raises(ModelError, match=words) as caught:
        job(name)
    assert "Known: encoder, encoder-small, elastic" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_like_no_other_gets_the_list_only():
    with pytest.raises(ModelError, match=r"'zzzz'. Known: encoder"):
        job("zzzz")


# Building


@pytest.mark.parametrize("name", list(jobs()))
def test_every_job_builds_a_small_model_that_makes_a_step(name):
    made = jobs()[name].build(setup(batch=1))
    assert made.model.training
    assert sum(p.numel() for p in made.model.parameters()) < 2_000_000
    if name in ("encoder", "encoder-small", "elastic", *LEARNED) or name.startswith("control"):
        assert made.tasks == ENCODER_TASKS
    elif name in TASKS:
        assert made.tasks == made.model.config.task_names == (name,)
    if name in TASKS:
        loss, _ = made.loss(made.batch(0), 0, torch.Generator())
        loss.backward()
        assert torch.isfinite(loss)


@pytest.mark.parametrize("name", LEARNED)
def test_the_job_of_a_learned_recipe_trains_its_module(name):
    made = jobs()[name].build(setup(batch=1))
    assert isinstance(made, ElasticObjective)
    drawn = {type(made.draw(step)).__name__ for step in range(60)}
    assert drawn == {name, "NoneType"}
    step = next(step for step in range(60) if made.draw(step) is not None)
    clips = [clips for clips in made.batch(0) if clips.task == "direction"]
    made.loss(clips, step, torch.Generator())[0].backward()
    (needed,) = (word for word in made.draw(step).requires if word.startswith("trained "))
    module = made.model.reducers[needed.removeprefix("trained ")]
    assert any(p.grad is not None and p.grad.any() for p in module.parameters())
    others = [m for m in made.model.reducers.values() if m is not module]
    assert all(p.grad is None for m in others for p in m.parameters())


def test_the_elastic_job_draws_every_learned_recipe():
    made = jobs()["elastic"].build(setup())
    drawn = {type(made.draw(step)).__name__ for step in range(200)}
    assert drawn == {*LEARNED, "NoneType"}
    recipes = [recipe for step in range(200) if (recipe := made.draw(step)) is not None]
    layers = {getattr(r, "layer", None) or getattr(r, "layers", (0,))[0] for r in recipes}
    assert layers == set(LEARNED_LAYERS)
    assert all(LEARNED_KEEPS[0] <= r.keep_ratio <= LEARNED_KEEPS[1] for r in recipes)
    # A teacher with random weights has nothing to teach.
    assert made.distil == 0


def test_control_jobs_corrupt_their_clips():
    for name, corrupt in (("control-shuffled", shuffled), ("control-single-frame", single_frame)):
        made = jobs()[name].build(setup())
        assert made.corrupt is corrupt


def test_the_seed_decides_the_first_weights_and_the_callers_numbers_stay():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, again, other = (jobs()["direction"].build(setup(seed=s)).model for s in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)
    assert same(first, again)
    assert not same(first, other)


def test_quick_and_size_shrink_what_is_built():
    quick = jobs()["encoder"].build(setup(size=32)).model.config
    assert {name: getattr(quick, name) for name in QUICK_SHAPE} == QUICK_SHAPE
    assert quick.size == (32, 32)
    whole = jobs()["direction"].build(setup(quick=False)).model.config
    assert (whole.width, whole.depth, whole.size) == (256, 12, (64, 64))
    small = jobs()["encoder-small"].build(setup(quick=False)).model.config
    assert (small.width, small.depth) == (128, 8)
    made = jobs()["generator"].build(setup(size=48))
    assert isinstance(made, DiffusionObjective)
    assert made.model.config.size == (48, 48)


# Starting from weights


def test_weights_to_start_from_are_taken(encoder):
    made = jobs()["encoder"].build(setup(init=encoder))
    assert same(made.model, load_weights(encoder))
    assert made.model.training


def test_the_elastic_job_starts_from_an_encoder_with_fresh_reducers(encoder):
    made, again = (jobs()["elastic"].build(setup(init=encoder)) for _ in range(2))
    assert same(made.model, again.model)
    start = load_weights(encoder).state_dict()
    weights = made.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in start.items())
    assert set(made.model.reducers.names) == set(build_reducers(64, heads=1).names)
    assert made.distil > 0
    assert made.identity["teacher"] == read_card(encoder).sha256


def test_elastic_training_that_goes_on_keeps_to_the_encoder_it_began_with():
    made = jobs()["elastic"].build(setup(init="tubelet-vit-elastic"))
    assert made.identity["teacher"] == read_card(TRAINED).sha256
    assert same(made.teacher, load_weights(TRAINED))
    assert not same(made.model, load_weights(TRAINED))


def test_only_jobs_with_reducers_start_from_trained_weights():
    assert {entry.name for entry in jobs().values() if entry.init} == {"elastic", *LEARNED}
    assert {entry.init for entry in jobs().values()} == {None, TRAINED}


def test_reducers_that_were_trained_before_are_kept_and_dense_jobs_leave_them_out(
    encoder, tmp_path
):
    before = jobs()["elastic"].build(setup(init=encoder, seed=11)).model
    entry = jobs()["elastic"]
    save(entry, before, tmp_path, {})
    path = str(tmp_path / entry.weights)
    after = jobs()["elastic"].build(setup(init=path, seed=12)).model
    assert same(after, load_weights(path))
    dense = jobs()["encoder"].build(setup(init=path)).model
    assert same(dense, load_weights(encoder))


def test_another_architecture_is_refused_to_start_from(tmp_path, encoder):
    config = VideoDiTConfig(width=16, depth=1, heads=2, frames=2, size=(32, 32))
    save_weights(tmp_path / "dit", VideoDiT(config), record={})
    for name in ("encoder", "elastic", "GumbelKeep"):
        with pytest.raises(ModelError, match="holds a VideoDiT, wanted a VideoViT"):
            jobs()[name].build(setup(init=str(tmp_path / "dit")))
    with pytest.raises(ModelError, match="holds a VideoViT, wanted a VideoDiT"):
        jobs()["generator"].build(setup(init=encoder))
    with pytest.raises(ModelError, match="no weights 'nowhere'"):
        jobs()["encoder"].build(setup(init="nowhere"))


@pytest.mark.parametrize("name", ["direction", "encoder-small"])
def test_another_shape_is_refused_to_start_from(encoder, name):
    with pytest.raises(ModelError, match="another shape than this job's model") as caught:
        jobs()[name].build(setup(init=encoder, quick=name == "direction"))
    assert "\n" not in str(caught.value)


# Saving


def tiny() -> VideoViT:
    torch.manual_seed(2)
    shape = {"width": 32, "depth": 4, "heads": 2, "frames": 4, "size": (32, 32)}
    return VideoViT(VideoViTConfig(**shape, tasks={"direction": 8}, dense_tasks=())).eval()


def entry() -> Job:
    return Job(name="x", summary="a test", build=lambda setup: None, weights="some-vit")


def test_a_plain_model_is_one_file(tmp_path):
    assert save(entry(), tiny(), tmp_path, {"seed": 1}) == [tmp_path / "some-vit.safetensors"]
    card = read_card(tmp_path / "some-vit")
    assert (card.summary, card.attach, card.record) == ("a test", None, {"seed": 1})


def test_reducers_are_a_file_of_their_own_and_come_back_attached(tmp_path):
    model = tiny()
    model.reducers = build_reducers(32, heads=2, names=["gumbel-keep", "vtm"]).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape) * 0.1)
            value.copy_(value.half())
    files = save(entry(), model, tmp_path, {"seed": 1})
    assert [path.name for path in files] == [
        "some-vit.safetensors", "some-vit-reducers.safetensors",
    ]  # fmt: skip
    assert model.reducers.names == ("gumbel-keep", "vtm")
    assert json.loads((tmp_path / "some-vit.json").read_text())["attach"] == "some-vit-reducers"
    parts = read_card(tmp_path / "some-vit-reducers")
    assert (parts.architecture, parts.record) == ("Reducers", {"seed": 1})
    assert "gumbel-keep, vtm" in parts.summary
    again = load_weights(tmp_path / "some-vit")
    pixels = torch.randn(2, 4, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(again(pixels).logits, model(pixels).logits)
        answers = []
        for host in (model, again):
            with accelerate(host, GumbelKeep(keep_ratio=0.4)):
                answers.append(host(pixels).logits)
    assert torch.equal(*answers)
    assert not torch.equal(answers[0], model(pixels).logits)


def test_a_save_that_fails_leaves_the_reducers_on_the_model(tmp_path):
    model = tiny()
    model.reducers = build_reducers(32, heads=2)
    with torch.no_grad():
        model.norm.bias.fill_(1e9)
    with pytest.raises(ModelError, match=r"norm.bias has values that are not finite in float16"):
        save(entry(), model, tmp_path, {})
    assert model.reducers is not None
