"""Regional compilation: recipes add no graph, no break and no recompilation."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tubelet import accelerate
from tubelet.models.catalogue import adapter_for
from tubelet.testing import tiny_diffusion
from tubelet.testing.tiny_diffusion import FirstBlock, Recorder, Whole


@pytest.fixture(autouse=True)
def _fresh_compiler(made):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sample(model, inputs):
    with torch.no_grad():
        return model(**inputs).sample


def compiled(model):
    """Compile every video block on its own; returns the counter of graphs."""
    counter = CompileCounterWithBackend("eager")
    for site in adapter_for(model).sites(model):
        block = model.get_submodule(site.name.rpartition(".")[0])
        block.compile(backend=counter, fullgraph=True)
    return counter


def test_twelve_layers_of_wan_are_one_graph_by_the_official_call():
    model, inputs = tiny_diffusion.build("wan", layers=12)
    counter = CompileCounterWithBackend("eager")
    want = sample(model, inputs)
    with accelerate(model, Whole()):
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
        for timestep in (500.0, 400.0, 300.0):
            sample(model, {**inputs, "timestep": torch.full((2,), timestep)})
        assert float((sample(model, inputs) - want).abs().max()) < 1e-5
    assert counter.frame_count == 1


# Graphs of two blocks of each kind without recipes: hosts hand the first block of a stack other
# strides than the next.
GRAPHS = {"hunyuan_video": 3, "hunyuan_video15": 1, "ltx": 1, "cogvideox": 2, "mochi": 2}


@pytest.mark.parametrize("name", GRAPHS)
def test_whole_graphs_and_no_more_of_them_than_without_recipes(name):
    model, inputs = tiny_diffusion.build(name)
    want = sample(model, inputs)
    with accelerate(model, Whole()):
        counter = compiled(model)
        assert float((sample(model, inputs) - want).abs().max()) < 1e-5
    assert 0 < counter.frame_count <= GRAPHS[name]


def test_recipes_act_in_blocks_that_were_compiled_before_and_leave_them():
    model, inputs = tiny_diffusion.build("wan")
    compiled(model)
    want = sample(model, inputs)
    with accelerate(model, FirstBlock()):
        other = sample(model, inputs)
    assert float((other - want).abs().max()) > 1e-3
    assert torch.equal(sample(model, inputs), want)


def test_the_operator_says_the_shape_and_strides_that_it_returns():
    from torch.library import opcheck

    from tubelet.core.context import Site, StepContext
    from tubelet.core.grid import TokenGrid
    from tubelet.core.handle import Handle
    from tubelet.models import attend_op

    site = Site(name="attn", layer=0, num_layers=1, kind="joint")
    grid = TokenGrid(frames=2, height=3, width=3)
    for recipe in (Whole(), tiny_diffusion.Empty()):
        runtime = Recorder([recipe], [site], Handle(torch.nn.Identity(), [recipe]))
        runtime.begin(grid, StepContext(step=0))
        call = attend_op.CurrentCall(grid)
        place = attend_op.open_place(site, call, runtime, attend_op.sdpa)
        try:
            tensors = [torch.randn(2, 18, 3, 8).transpose(1, 2) for _ in range(3)]
            checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
            opcheck(torch.ops.tubelet.attend, (*tensors, 0.5, place.number), test_utils=checks)
        finally:
            attend_op.close_place(place)
