"""What guests say about their boot, and the picture of it. (From a guest itself: tests/boot.)"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.errors import UserError
from hostos.machine import timeline
from hostos.machine.timeline import Recorder, Span
from hostos.machine.timeline_picture import draw
from hostos.steps import Steps

DMESG = """\
[    0.000000] Linux version 6.12.117-hostos
[    0.090000] tsc: Detected 2594.048 MHz processor
[    0.000417] clocksource: tsc-early
[    0.268723] smpboot: CPU0: AMD QEMU TCG CPU
[    0.902705] Run /init as init process
[    2.088651] systemd[1]: Failed to initialize kmod context
not a message
"""
UNITS = """\
Id=ssh.service
InactiveExitTimestampMonotonic=2000000
ActiveEnterTimestampMonotonic=2300000
InactiveEnterTimestampMonotonic=0

Id=once.service
InactiveExitTimestampMonotonic=1000000
ActiveEnterTimestampMonotonic=0
InactiveEnterTimestampMonotonic=1500000

Id=never.service
InactiveExitTimestampMonotonic=0
ActiveEnterTimestampMonotonic=0
InactiveEnterTimestampMonotonic=0

Id=hanging.service
InactiveExitTimestampMonotonic=2500000
ActiveEnterTimestampMonotonic=0
InactiveEnterTimestampMonotonic=0

Id=sys-devices-virtual.device
InactiveExitTimestampMonotonic=2500000
ActiveEnterTimestampMonotonic=2500000
"""
TEXTS = st.text(max_size=80)
KINDS = st.sampled_from(["host", "kernel", "manager", "unit"])
SPANS = st.builds(
    lambda kind, name, start, took, detail: Span(kind, name, start, start + took, detail),
    KINDS, TEXTS, st.floats(-0.5, 1000), st.floats(0, 1000), TEXTS,
)  # fmt: skip


def test_the_kernels_silences() -> None:
    whole, *silences = timeline.kernel(DMESG, until=1.3)
    assert (whole.name, whole.start, whole.end, whole.detail) == ("Linux", 0.0, 1.3, "5 messages")
    assert [(span.name, round(span.end - span.start, 6)) for span in silences] == [
        ("Linux version 6.12.117-hostos", 0.09),
        # Not the message before: the clock went back meanwhile.
        ("clocksource: tsc-early", 0.178723),
        ("smpboot: CPU0: AMD QEMU TCG CPU", 0.633982),
        ("Run /init as init process", 0.397295),
    ]
    assert list(timeline.kernel("", until=1.0)) == []


def test_units() -> None:
    found = list(timeline.of_units(UNITS, now=9.0))
    assert [(span.name, span.start, span.end, span.detail) for span in found] == [
        ("once.service", 1.0, 1.5, ""),
        ("ssh.service", 2.0, 2.3, ""),
        ("hanging.service", 2.5, 9.0, "still starting"),
    ]


def test_stages_of_the_host() -> None:
    recorder = Recorder(began=0.0)
    with Steps(recorder).step("QEMU started") as step:
        step.detail = "tcg"
    first, second = recorder.spans
    assert (first.name, first.start) == ("hostos itself", 0.0)
    assert (second.name, second.detail) == ("QEMU started", "tcg")
    assert first.end == pytest.approx(second.start, abs=0.1)


@given(TEXTS, st.lists(SPANS, max_size=20))
def test_every_picture_is_well_formed(title: str, spans: list[Span]) -> None:
    root = ET.fromstring(draw(title, spans))
    width = float(root.get("width", "0"))
    bars = [each for each in root.iter("{http://www.w3.org/2000/svg}rect") if each.get("x")]
    assert len(bars) == len(spans)
    for bar in bars:
        assert 0 <= float(bar.get("x", "-1")) <= float(bar.get("x", "")) + float(bar.get("width", "")) <= width


def test_files(tmp_path: Path) -> None:
    spans = [Span("host", "QEMU <started> & more", 0.0, 1.0)]
    timeline.write(str(tmp_path / "a.svg"), "title", spans)
    assert "QEMU &lt;started&gt; &amp; more 1.00 s" in (tmp_path / "a.svg").read_text()
    timeline.write(str(tmp_path / "a.json"), "title", spans)
    assert json.loads((tmp_path / "a.json").read_text())["spans"][0]["name"] == "QEMU <started> & more"
    for wrong in (tmp_path / "a.png", tmp_path / "absent" / "a.svg"):
        with pytest.raises(UserError):
            timeline.check_target(str(wrong))
