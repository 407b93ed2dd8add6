import io
import json

import pytest

from hostos.steps import JsonEvents, Steps, Talk


def test_durations_are_kept_and_told():
    out = io.StringIO()
    steps = Steps(Talk(out))
    with steps.step("outer") as outer, steps.step("inner") as inner:
        inner.detail = "cached"
        inner.progress("half")
    outer.progress("late")
    assert [each.name for each in steps.finished] == ["inner", "outer"]
    assert steps.finished[0].seconds <= steps.finished[1].seconds
    assert "inner  (cached)" in out.getvalue()
    assert "half" not in out.getvalue()


def test_a_failed_step_is_named_and_not_finished():
    out = io.StringIO()
    steps = Steps(Talk(out))
    with pytest.raises(KeyError), steps.step("boot"):
        raise KeyError("x")
    assert "boot: FAILED" in out.getvalue()
    assert steps.finished == []


def test_programs_get_one_object_a_line():
    out = io.StringIO()
    steps = Steps(JsonEvents(out))
    with steps.step("pack") as step:
        step.progress("1 of 2")
    steps.warning("careful")
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(each["kind"], each["step"]) for each in events] == [
        ("start", "pack"), ("progress", "pack"), ("done", "pack"), ("warning", ""),
    ]  # fmt: skip
    assert all(each["schema"] == 1 for each in events)


def test_a_terminal_is_rewritten_in_place(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
    steps = Steps(Talk(out))
    with steps.step("pack") as step:
        step.progress("half")
    assert "\r" in out.getvalue()
    assert "half" in out.getvalue()
