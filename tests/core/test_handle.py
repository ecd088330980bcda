"""Handle: what was put on comes off again, in order and whatever happens."""

import warnings
from dataclasses import dataclass

import pytest

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import NoEffectWarning
from tubelet.core.handle import Handle
from tubelet.core.recipe import TokenReduction


@dataclass(frozen=True, kw_only=True)
class Nothing(TokenReduction):
    def acts_on(self, site):
        return True

    def plan(self, ctx):
        return None


@dataclass(frozen=True, kw_only=True)
class Other(Nothing):
    pass


class Host:
    pass


@pytest.fixture
def handle() -> Handle:
    return Handle(Host(), [Nothing(), Other()])


def failing(error: Exception):
    def undo() -> None:
        raise error

    return undo


def test_changes_are_undone_last_in_first_out(handle):
    undone = []
    for step in range(3):
        handle.on_remove(lambda step=step: undone.append(step))
    assert undone == []
    handle.remove()
    assert undone == [2, 1, 0]


def test_removing_twice_undoes_once(handle):
    undone = []
    handle.on_remove(lambda: undone.append(1))
    handle.remove()
    handle.remove()
    assert undone == [1]


def test_a_failing_undo_does_not_keep_the_others_from_running(handle):
    undone = []
    handle.on_remove(lambda: undone.append("first"))
    handle.on_remove(failing(KeyError("second")))
    handle.on_remove(failing(OSError("third")))
    handle.on_remove(lambda: undone.append("fourth"))
    with pytest.raises(OSError, match="third"):
        handle.remove()
    assert undone == ["fourth", "first"]
    handle.remove()


def test_leaving_the_context_removes(handle):
    undone = []
    with handle as inside:
        assert inside is handle
        handle.on_remove(lambda: undone.append(1))
        assert undone == []
    assert undone == [1]


def test_an_exception_inside_the_context_still_removes_and_goes_on(handle):
    undone = []
    handle.on_remove(lambda: undone.append(1))
    handle.report().start_run(10)
    with warnings.catch_warnings():
        # A failed run says nothing about whether a recipe has an effect.
        warnings.simplefilter("error")
        with pytest.raises(ZeroDivisionError), handle:
            raise ZeroDivisionError
    assert undone == [1]


def test_recipes_that_ran_and_changed_nothing_are_named(handle):
    handle.report().start_run(10)
    handle.report().change("Other", "layers.0", 10, 5)
    with pytest.warns(NoEffectWarning, match="Nothing ran 1 times on Host") as caught, handle:
        pass
    assert len(caught) == 1


def test_the_warning_points_at_the_with_block(handle):
    handle.report().start_run(10)
    with pytest.warns(NoEffectWarning) as caught, handle:
        pass
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize("ran", [False, True])
def test_no_warning_without_a_run_or_when_all_acted(handle, ran):
    if ran:
        handle.report().start_run(10)
        handle.report().change("Nothing", "layers.0", 10, 9)
        handle.report().attention["Other: flex"] += 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with handle:
            pass


def test_the_report_names_model_and_recipes(handle):
    assert handle.report().model == "Host"
    assert handle.report().recipes == ("Nothing", "Other")
    assert handle.report() is handle.report()


def test_the_latest_assignment_is_kept(handle):
    assert handle.assignment is None
    for num in (4, 3):
        latest = [TokenAssignment.identity(1, num)]
        handle.record_assignment(latest)
    assert handle.assignment is latest
