"""What the tests of several hosts share."""

import pytest
import torch


@pytest.fixture
def made(monkeypatch):
    """The runtimes that diffusion adapters make during the test, which here only record."""
    import tubelet.models.diffusion as diffusion
    from tubelet.testing.tiny_diffusion import Recorder

    runtimes: list[Recorder] = []

    class Kept(Recorder):
        def __init__(self, *args):
            super().__init__(*args)
            runtimes.append(self)

    monkeypatch.setattr(diffusion, "AttentionRuntime", Kept)
    # Hosts this small lose more to waiting threads than they win.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield runtimes
    torch.set_num_threads(before)


@pytest.fixture
def forced(monkeypatch):
    """Of a fused vision tower, what pays on a GPU only runs here too."""
    from tubelet.models import vision_operations as ops

    monkeypatch.setattr(ops, "pads", lambda x, layer: True)
    monkeypatch.setattr(ops, "norms", lambda x, weight: True)
