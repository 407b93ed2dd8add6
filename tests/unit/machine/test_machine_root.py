"""`up --root`: what is refused, what the machine is told, what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.machine import root
from hostos.machine.instance import Instance
from hostos.machine.options import UpOptions
from hostos.machine.plan import make_plan
from hostos.machine.root import Source

HASH = "ab" * 32
OURS = {"mounts": ["disk", "9p", "root"]}


@pytest.fixture
def finder(monkeypatch: pytest.MonkeyPatch) -> Callable[[Source], None]:
    def found(source: Source) -> None:
        monkeypatch.setattr(root, "finder", lambda _image, _peers, _start: source)

    return found


def test_the_kernel_is_told_which_image(make_os: Callable[..., Path]) -> None:
    options = UpOptions(root=HASH, os=make_os(**OURS), accel="tcg", disk="1G", persist=True)
    plan = make_plan(Instance.named("box"), options, ("ssh-ed25519 AAAA x",))
    words = plan.config.cmdline.split()
    assert f"hostos.root={HASH}" in words
    assert "rdinit=/usr/lib/hostos/root" in words
    assert "hostos.persist=1" in words
    assert "fstab=no" in words


def test_none_is_our_own_system_again(make_os: Callable[..., Path]) -> None:
    plan = make_plan(Instance.named("box"), UpOptions(root="none", os=make_os(), accel="tcg"), ("ssh-ed25519 AAAA x",))
    assert "rdinit" not in plan.config.cmdline


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"root": "no hash"}, "not the hash"),
        ({"persist": True}, "--persist without --root"),
        ({"root": HASH, "persist": True}, "it has none"),
        ({"root": HASH, "memory_mib": 256}, "too little"),
    ],
)
def test_what_cannot_be_is_refused(make_os: Callable[..., Path], changes: dict[str, object], said: str) -> None:
    options = UpOptions(os=make_os(**OURS), accel="tcg", **changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=said) as refused:
        make_plan(Instance.named("box"), options, ("ssh-ed25519 AAAA x",))
    assert refused.value.status == 2


def test_an_os_that_cannot_do_it_is_refused(make_os: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="cannot boot an image"):
        make_plan(Instance.named("box"), UpOptions(root=HASH, os=make_os(), accel="tcg"), ("ssh-ed25519 AAAA x",))


def test_another_image_has_other_peers_and_keeps_nothing_of_the_last() -> None:
    before = UpOptions(root=HASH, peers=("192.0.2.7:1",), persist=True, disk="1G")
    assert UpOptions(root=HASH).over(before) == before
    after = UpOptions(root="cd" * 32).over(before)
    assert (after.peers, after.persist, after.disk) == (None, None, "1G")
    assert UpOptions.from_json(before.to_json()) == before


def test_this_hosts_loopback_has_another_name_in_the_machine(finder: Callable[[Source], None]) -> None:
    finder(Source(("127.0.0.1:7", "192.0.2.7:8"), b"{}"))
    files = root.archive(UpOptions(root=HASH), own_address=False, start=True)
    assert files == {"root": b"hostos.peer=10.0.2.2:7\nhostos.peer=192.0.2.7:8\n", "image": b"{}"}
    # On a bridge it cannot be reached at all.
    files = root.archive(UpOptions(root=HASH), own_address=True, start=True)
    assert files["root"] == b"hostos.peer=192.0.2.7:8\n"
    finder(Source(("http://127.0.0.1:8080",)))
    assert root.archive(UpOptions(root="b" * 59), own_address=False, start=True) == {
        "root": b"hostos.gateway=http://10.0.2.2:8080\n"
    }


def test_nobody_to_ask_is_an_error(finder: Callable[[Source], None]) -> None:
    finder(Source(("127.0.0.1:7",), b"{}"))
    with pytest.raises(UserError, match="nobody is known"):
        root.archive(UpOptions(root=HASH), own_address=True, start=True)


def test_what_the_machine_says_about_its_root() -> None:
    assert root.heard("[    5.1] hostos: root: mounted after 2.1 s, starting /sbin/init") == (
        "mounted after 2.1 s, starting /sbin/init"
    )
    assert root.heard("hostos: initrd incomplete") == ""
