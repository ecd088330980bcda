"""Training runs from request to weights, with models that take milliseconds."""

import json
from pathlib import Path

import pytest
import torch

from tubelet.core.errors import ModelError, TubeletError, UnsupportedError
from tubelet.nn.weights import load_weights, read_card
from tubelet.train.log import read_log
from tubelet.train.run import Outcome, TrainRequest, run_training

FIELDS = {
    "command", "job", "seed", "init", "steps", "training_minutes", "wall_minutes", "processes",
    "hardware", "torch", "python", "clips_per_second", "config", "scores", "curve",
}  # fmt: skip


def request(out: Path, what: str = "mask", **changes) -> TrainRequest:
    fields = {"steps": 2, "batch": 1, "size": 32, "device": "cpu", "quick": True, "seed": 5}
    return TrainRequest(what=what, out=out, **{**fields, **changes})


def quiet(*told: object) -> None:
    pass


def run(out: Path, what: str = "mask", **changes) -> Outcome:
    return run_training(request(out, what, **changes), quiet)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("run") / "new" / "out"
    run(folder)
    return folder


def test_a_run_writes_weights_log_and_a_complete_card(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tubelet", "train", "mask", "--quick"])
    told = []
    outcome = run_training(request(tmp_path), lambda *what: told.append(what))
    assert outcome.steps == 2
    assert outcome.first
    assert [path.name for path in outcome.files] == ["encoder-mask.safetensors", "log.jsonl"]
    assert all(path.is_file() for path in outcome.files)
    assert set(outcome.scores) == {"mask/static", "mask/noise", "mask/pan"}
    card = read_card(tmp_path / "encoder-mask")
    assert card.record == outcome.record
    assert set(card.record) == FIELDS
    assert card.record["command"] == "tubelet train mask --quick"
    assert (card.record["job"], card.record["seed"], card.record["init"]) == ("mask", 5, None)
    assert card.record["config"]["steps"] == card.record["steps"] == 2
    assert card.record["config"]["precision"] == "fp32"
    assert card.record["processes"] == 1
    assert "CPU" in card.record["hardware"]
    assert card.record["torch"] == torch.__version__
    assert card.record["curve"]["step"] == [2]
    assert set(card.record["scores"]) == set(outcome.scores)
    assert any("loss" in line for line in read_log(tmp_path / "log.jsonl"))
    assert ("evaluating", 2, 2) in told
    plain = outcome.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["files"][0] == str(tmp_path / "encoder-mask.safetensors")


def test_the_weights_are_those_that_were_evaluated(tmp_path, monkeypatch):
    models = []

    def spy(entry, model, *rest):
        models.append(model)
        return save(entry, model, *rest)

    from tubelet.train.jobs import save

    monkeypatch.setattr("tubelet.train.run.save", spy)
    run(tmp_path, "direction")
    again = load_weights(tmp_path / "encoder-direction")
    for name, value in models[0].state_dict().items():
        assert torch.equal(again.state_dict()[name], value.half().float()), name
    assert not models[0].training


def test_a_reducers_run_starts_from_an_encoder_and_says_so(tmp_path):
    run(tmp_path / "first", "encoder", steps=1)
    start = tmp_path / "first" / "tubelet-vit"
    outcome = run(tmp_path / "second", "GumbelKeep", steps=1, init=str(start))
    names = [path.stem for path in outcome.files]
    assert names == ["tubelet-vit-gumbelkeep", "tubelet-vit-gumbelkeep-reducers", "log"]
    assert load_weights(tmp_path / "second" / names[0]).reducers is not None
    record = read_card(tmp_path / "second" / names[0]).record
    assert record["init"] == "tubelet-vit"
    assert record["before"] == read_card(start).record
    assert set(record) == {*FIELDS, "before"}


def test_jobs_with_reducers_start_from_the_shipped_encoder_unless_quick(tmp_path, monkeypatch):
    setups = []

    def build(setup):
        setups.append(setup)
        raise TubeletError("enough")

    from tubelet.train import jobs

    entry = jobs.job("elastic")
    monkeypatch.setattr("tubelet.train.run.job", lambda name: jobs.replace(entry, build=build))
    for quick in (True, False):
        with pytest.raises(TubeletError, match="enough"):
            run(tmp_path, "elastic", quick=quick)
    assert [setup.init for setup in setups] == [None, "tubelet-vit"]


def test_resume_goes_on_from_where_the_run_was(tmp_path):
    whole = run(tmp_path / "whole", steps=4)
    from tubelet.train import loop

    class Killed(Exception):
        pass

    step = loop._Run._train_step

    def dies(self):
        if self.step == 2:
            self._save()
            raise Killed
        step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "_train_step", dies)
        with pytest.raises(Killed):
            run(tmp_path / "cut", steps=4)
    assert not (tmp_path / "cut" / "encoder-mask.safetensors").exists()
    rest = run(tmp_path / "cut", steps=4, resume=True)
    assert rest.steps == 4
    assert rest.scores == whole.scores
    one, two = (read_card(tmp_path / name / "encoder-mask").sha256 for name in ("whole", "cut"))
    assert one == two


def test_a_folder_with_a_run_is_not_overwritten(finished):
    before = (finished / "encoder-mask.safetensors").read_bytes()
    with pytest.raises(TubeletError, match="already holds a run; resume it"):
        run(finished, seed=6)
    assert (finished / "encoder-mask.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"seed": 6}, "seed"), ({"what": "direction"}, "tasks"), ({"size": 48}, "size")],
    ids=str,
)
def test_resuming_another_run_is_refused(finished, changes, words):
    with pytest.raises(ModelError, match=f"cannot resume .*{words}"):
        run(finished, **changes, resume=True)


def test_a_control_run_is_not_resumed_as_the_other_control(tmp_path):
    options = {"steps": 1, "batch": 1}
    run(tmp_path, "control-shuffled", **options)
    with pytest.raises(ModelError, match=r"corrupt \(shuffled there, single_frame now\)"):
        run(tmp_path, "control-single-frame", resume=True, **options)


def test_a_generator_run_is_not_resumed_at_another_size(tmp_path):
    run(tmp_path, "generator", steps=1)
    # Rotary positions: the weights of both sizes have one shape.
    with pytest.raises(ModelError, match="size"):
        run(tmp_path, "generator", steps=1, size=48, resume=True)


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no checkpoint at"):
        run(tmp_path, resume=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_told_with_what_to_do_instead(tmp_path):
    with pytest.raises(UnsupportedError, match=r"8 minutes on one H200; .* --device cpu --quick"):
        run(tmp_path / "out", "encoder", device="cuda")
    assert not (tmp_path / "out").exists()


def test_a_whole_run_on_a_cpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tubelet.train.run.train", None)  # would take hours
    with pytest.raises(TubeletError, match=r"generator takes about 20 minutes .* add --quick"):
        run(tmp_path / "out", "generator", quick=False, steps=None)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("mine")
    for out in (blocked, blocked / "inside"):
        with pytest.raises(TubeletError) as caught:
            run(out)
        assert str(blocked) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert blocked.read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"what": "nothing"}, "nothing to train is called"),
        ({"device": "quantum"}, "device"),
        ({"minutes": 1.0}, "either minutes or steps"),
        ({"batch": 0}, "batch is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"size": 20}, "tubelets"),
        ({"init": "nowhere"}, "no weights 'nowhere'"),
    ],
    ids=str,
)
def test_wrong_requests_leave_nothing_behind(tmp_path, changes, words):
    with pytest.raises(TubeletError, match=words):
        run(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_defaults_come_from_the_job(monkeypatch, tmp_path):
    configs = []

    def stop(objective, config, *rest, **options):
        configs.append(config)
        raise TubeletError("enough")

    monkeypatch.setattr("tubelet.train.run.train", stop)
    for changes in ({}, {"minutes": 3.0, "learning_rate": 0.5}):
        with pytest.raises(TubeletError, match="enough"):
            run(tmp_path, "generator", steps=None, batch=None, **changes)
    quick, told = configs
    assert (quick.minutes, quick.steps, quick.batch) == (1.0, None, 2)
    assert quick.learning_rate == 6e-4
    assert (told.minutes, told.learning_rate) == (3.0, 0.5)
