"""Options of containers, and the command lines made from them."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.errors import UserError
from hostos.live.container import (
    FIRST_BASE,
    LAST_BASE,
    Bind,
    Options,
    check_name,
    enter_argv,
    free_base,
    nspawn_argv,
    parse_bind,
    run_script,
    scope_argv,
)
from hostos.live.kept import Store
from hostos.live.limits import Limits
from hostos.live.manifest import BootConfig
from hostos.live.syscalls import IDS

PATHS = st.text(st.characters(exclude_characters="\0\n", exclude_categories=["Cs"]), max_size=20).map(
    lambda text: "/" + text
)


def escape(path: str) -> str:
    return path.replace(":", "\\:")


@given(source=PATHS, target=PATHS, read_only=st.booleans())
def test_any_paths_can_be_bound(source: str, target: str, read_only: bool) -> None:
    text = f"{escape(source)}:{escape(target)}" + (":ro" if read_only else "")
    unusable = any(".." in path.split("/") for path in (source, target))
    # A backslash before a colon is how a colon is written, so it can't stand before one itself.
    if unusable or "\\" in source + target or target in ("ro", "rw"):
        return
    assert parse_bind(text) == Bind(source, target, read_only)


@given(st.text())
def test_binds_are_read_or_refused(text: str) -> None:
    try:
        bind = parse_bind(text)
    except UserError:
        return
    for path in (bind.source, bind.target):
        assert path.startswith("/")
        assert ".." not in path.split("/")
        assert not set("\0\n") & set(path)


def test_bind_alone_keeps_its_place() -> None:
    assert parse_bind("/srv") == Bind("/srv", "/srv")
    assert parse_bind("/srv:ro") == Bind("/srv", "/srv", True)
    assert parse_bind("/srv:/data:rw") == Bind("/srv", "/data", False)


@pytest.mark.parametrize("text", ["", "srv", "/a:b", "/a:/b:/c", "/a:/b:ro:rw", "/a/../b", "/a:/b\n"])
def test_unusable_binds(text: str) -> None:
    with pytest.raises(UserError, match="bind"):
        parse_bind(text)


@given(st.text())
def test_names_are_safe_for_paths_units_and_host_names(text: str) -> None:
    try:
        name = check_name(text)
    except UserError:
        return
    assert 1 <= len(name) <= 40
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert name[0] != "-" != name[-1]


@given(
    argv=st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1, max_size=5)
)
def test_script_passes_every_word_as_it_is(argv: list[str]) -> None:
    script = run_script(argv, "/run/a b/started")
    line = script.split("\n", 5)[5]
    assert shlex.split(line) == ["exec", *argv]


def test_script_announces_itself_even_if_nobody_listens(tmp_path: Path) -> None:
    fifo = tmp_path / "fi fo"
    subprocess.run(["mkfifo", fifo], check=True)
    script = tmp_path / "run"
    script.write_text(run_script(["printf", "%s|", "a b", "$HOME", "'"], str(fifo)))
    done = subprocess.run(["/bin/sh", script], capture_output=True, timeout=10, check=True)
    assert done.stdout == b"a b|$HOME|'|"


def options(**changes: object) -> Options:
    return Options(**{"name": "web", "command": ("true",), **changes})  # type: ignore[arg-type]


def test_private_users_and_no_network_by_default() -> None:
    argv = nspawn_argv(options(), BootConfig(), "/root", 524288)
    assert argv[0] == "systemd-nspawn"
    assert f"--private-users=524288:{IDS}" in argv
    assert "--private-users-ownership=no" in argv
    assert "--private-network" in argv
    assert "--settings=no" in argv
    assert argv[-2:] == ["--", "true"]
    assert "--private-network" not in nspawn_argv(options(network="host"), BootConfig(), "/root", 524288)


def test_image_says_what_to_run_and_nothing_else() -> None:
    boot = BootConfig(("httpd", "--capability=all"), (("A", "b c"), ("HOME", "/x")), "www:adm", "/srv", ("80/tcp",))
    argv = nspawn_argv(options(command=()), boot, "/root", 524288)
    end = argv.index("--")
    # Options of nspawn in the image's command stay words of that command.
    assert argv[end + 1 :] == ["httpd", "--capability=all"]
    theirs = set(argv[:end]) - set(nspawn_argv(options(), BootConfig(), "/root", 524288))
    assert theirs == {"--setenv=A=b c", "--setenv=HOME=/x", "--user=www", "--chdir=/srv"}


def test_person_overrides_the_image() -> None:
    boot = BootConfig(("httpd",), (("A", "b"),))
    argv = nspawn_argv(options(command=("sh", "-c", "x y"), nspawn=("--setenv=A=mine",)), boot, "/root", None)
    assert argv[argv.index("--") :] == ["--", "sh", "-c", "x y"]
    assert argv.index("--setenv=A=b") < argv.index("--setenv=A=mine")
    assert "--private-users=no" in argv


def test_init_takes_neither_command_nor_user() -> None:
    boot = BootConfig(("httpd",), (), "www", "/srv")
    argv = nspawn_argv(options(command=(), init=True, console="read-only"), boot, "/root", 524288)
    assert argv[-1] == "--boot"
    assert not [word for word in argv if word.startswith(("--user", "--chdir"))]
    assert "httpd" not in argv


def test_what_is_for_the_init_comes_last() -> None:
    chosen = options(command=(), init=True, console="read-only", nspawn=("--tmpfs=/x",))
    assert nspawn_argv(chosen, BootConfig(), "/root", 524288, init_arguments=["a=1"])[-3:] == [
        "--tmpfs=/x",
        "--boot",
        "a=1",
    ]


def test_binds_with_colons_and_backslashes_are_escaped() -> None:
    bound = options(binds=(Bind("/a:b", "/c\\d", True),))
    argv = nspawn_argv(bound, BootConfig(), "/root", 524288)
    assert "--bind-ro=/a\\:b:/c\\\\d:idmap" in argv


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "Web"},
        {"name": "-web"},
        {"name": "w" * 41},
        {"nspawn": ("rm", "-rf")},
        {"nspawn": ("--",)},
        {"upper_size": "0"},
        {"upper_size": "50%,exec"},
        {"upper_size": "101%"},
        {"command": ("a\0b",)},
    ],
)
def test_unusable_options(changes: dict[str, object]) -> None:
    with pytest.raises(UserError) as caught:
        options(**changes)
    assert caught.value.status == 2


@given(st.sets(st.integers(0, 40).map(lambda number: FIRST_BASE + number * IDS)))
def test_ranges_of_users_never_overlap(used: set[int]) -> None:
    base = free_base(used)
    assert base not in used
    assert FIRST_BASE <= base <= LAST_BASE
    assert (base - FIRST_BASE) % IDS == 0


def test_no_range_left() -> None:
    with pytest.raises(UserError, match="in use"):
        free_base(set(range(FIRST_BASE, LAST_BASE + 1, IDS)))


def test_entering_starts_with_a_clean_environment() -> None:
    argv = enter_argv(42, ["ls", "-l"], "vt100")
    assert argv[:2] == ["env", "-i"]
    assert "TERM=vt100" in argv
    # The network belongs to the guest: it is entered before the container's user namespace.
    first = argv.index("nsenter")
    assert argv[first : first + 9] == ["nsenter", "-t", "42", "-n", "--", "nsenter", "-t", "42", "-U"]
    assert argv[-3:] == ["--", "ls", "-l"]


def test_scope_is_named_after_the_container() -> None:
    argv = scope_argv("web", "/run/x", Limits())
    assert argv[-3:] == ["--", "/bin/sh", "/run/x"]
    assert "--unit=hostos-container-web" in argv
    assert not [word for word in argv if word.startswith("--property")]
    limited = scope_argv("web", "/run/x", Limits.parse("64m", "1.5", "100"))
    assert {"--property=MemoryMax=67108864", "--property=CPUQuota=150%", "--property=TasksMax=100"} <= set(limited)


@pytest.mark.parametrize(
    ("memory", "cpus", "pids"),
    [("1k", "", ""), ("-5m", "", ""), ("x", "", ""), ("1t", "", ""), ("", "0", ""), ("", "-1", ""), ("", "2%", ""),
     ("", "9999", ""), ("", "", "7"), ("", "", "0"), ("", "", "many"), ("512m\n", "", ""), ("", "", "99\nExecStart=x")],
)  # fmt: skip
def test_limits_that_are_none(memory: str, cpus: str, pids: str) -> None:
    with pytest.raises(UserError):
        Limits.parse(memory, cpus, pids)


@given(st.text(max_size=12), st.text(max_size=12), st.text(max_size=12))
def test_no_limit_smuggles_properties_in(memory: str, cpus: str, pids: str) -> None:
    try:
        limits = Limits.parse(memory, cpus, pids)
    except UserError:
        return
    assert all(re.fullmatch(r"[A-Za-z]+=[0-9a-z]+%?", item) for item in limits.properties())


def test_what_is_kept_belongs_to_its_image(tmp_path: Path) -> None:
    store = Store(tmp_path / "kept")
    first, second = store.take("web", "a" * 64), store.take("other", "a" * 64)
    assert store.take("web", "a" * 64) == first
    assert abs(first.base - second.base) == 65536
    with pytest.raises(UserError, match="made over image aaaa"):
        store.take("web", "b" * 64)
    for name in ("", "..", "a/b", "Not"):
        with pytest.raises(UserError):
            store.take(name, "a" * 64)
