"""What is rebuilt after a change, how progress and faults are read from the output, source checks."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.build import cache
from hostos.build.engines import buildroot, buildroot_host, buildroot_kernel, buildroot_source
from hostos.build.engines.buildroot import BuildrootEngine, Options, overridden_packages
from hostos.build.engines.buildroot_plan import Plan, owning_package, plan
from hostos.build.engines.buildroot_progress import Progress, seconds_by_package
from hostos.build.engines.buildroot_source import COMMIT, RELEASE
from hostos.build.profile import Value, load_profile
from hostos.errors import UserError
from hostos.steps import Step, Steps


def step() -> Step:
    return Step("test", lambda event: None)


def package(version: str = "1", needs: tuple[str, ...] = (), users: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"type": "target", "version": version, "dependencies": list(needs), "reverse_dependencies": list(users)}


INFO = {
    "libopenssl": package(users=("openssh", "python3")),
    "openssh": package(needs=("libopenssl",)),
    "python3": package(needs=("libopenssl",), users=("python-trio",)),
    "python-trio": package(needs=("python3",)),
    "host-python3": {**package(users=("python3",)), "type": "host"},
    "busybox": package(),
}
CONFIG: dict[str, Value] = {"PACKAGE_OPENSSH": True, "PACKAGE_LIBOPENSSL_ENABLE_QUIC": True, "DL_DIR": "/a"}


def test_nothing_changed_nothing_to_do() -> None:
    assert not plan(INFO, INFO, CONFIG, CONFIG)


def test_where_sources_come_from_does_not_matter() -> None:
    assert not plan(INFO, INFO, CONFIG, {**CONFIG, "DL_DIR": "/b", "PRIMARY_SITE": "file:///x"})


def test_an_option_of_a_library_rebuilds_what_uses_it() -> None:
    found = plan(INFO, INFO, CONFIG, {**CONFIG, "PACKAGE_LIBOPENSSL_ENABLE_QUIC": False})
    assert found == Plan(("libopenssl", "openssh", "python-trio", "python3"), refill=True)


def test_what_an_older_hostos_did_not_record_rebuilds_nothing() -> None:
    assert not plan(INFO, {name: {**facts, "stamp_dir": "build/x"} for name, facts in INFO.items()}, CONFIG, CONFIG)


def test_a_new_package_rebuilds_nothing_else() -> None:
    assert not plan(INFO, {**INFO, "htop": package()}, CONFIG, {**CONFIG, "PACKAGE_HTOP": True})


def test_a_package_that_gains_a_dependency_is_rebuilt() -> None:
    new = {**INFO, "zlib": package(users=("openssh",)), "openssh": package(needs=("libopenssl", "zlib"))}
    assert plan(INFO, new, CONFIG, CONFIG) == Plan(("openssh",), refill=True)


def test_a_package_that_is_gone_empties_the_target_directory() -> None:
    new = {name: facts for name, facts in INFO.items() if name != "busybox"}
    assert plan(INFO, new, CONFIG, CONFIG) == Plan(refill=True)


def test_a_rebuilt_host_tool_does_not_rebuild_its_users() -> None:
    new = {**INFO, "host-python3": {**INFO["host-python3"], "version": "2"}}
    assert plan(INFO, new, CONFIG, CONFIG).rebuild == ("host-python3",)


def test_a_file_of_the_external_tree_rebuilds_what_reads_it() -> None:
    config: dict[str, Value] = {"PACKAGE_BUSYBOX_CONFIG_FRAGMENT_FILES": "$(X)/board/hostos/busybox.fragment"}
    assert plan(INFO, INFO, config, config, ["board/hostos/busybox.fragment"]).rebuild == ("busybox",)
    assert plan(INFO, INFO, config, config, ["package/python-trio/python-trio.mk"]).rebuild == ("python-trio",)
    assert not plan(INFO, INFO, config, config, ["board/hostos/left-out", "Config.in"])


def test_a_kernel_option_compiles_only_what_differs() -> None:
    info = {**INFO, "linux": package("6.12.91")}
    config: dict[str, Value] = {**CONFIG, "LINUX_KERNEL_ZSTD": True}
    assert plan(info, info, CONFIG, config) == Plan(reconfigure=("linux",))
    newer = {**info, "linux": package("6.12.92")}
    assert plan(info, newer, CONFIG, config) == Plan(rebuild=("linux",), refill=True)


def test_who_is_only_installed_after_a_program_is_not_rebuilt_with_it() -> None:
    info = {**INFO, "busybox": {**package(users=("openssh",)), "install_staging": False}}
    assert plan(info, info, CONFIG, {**CONFIG, "PACKAGE_BUSYBOX_CONFIG": "x"}).rebuild == ("busybox",)


def test_the_longest_name_owns_a_symbol() -> None:
    info = {name: {} for name in ("util-linux", "util-linux-libs", "python3", "python-trio")}
    assert owning_package("PACKAGE_UTIL_LINUX_LIBS", info) == "util-linux-libs"
    assert owning_package("PACKAGE_UTIL_LINUX_MOUNT", info) == "util-linux"
    assert owning_package("PACKAGE_UTIL", info) is None
    assert owning_package("INIT_SYSTEMD", info) is None


names = st.sampled_from(sorted(INFO))


@given(st.dictionaries(names, st.sampled_from(["1", "2"])), st.sets(names))
def test_whatever_changed_is_rebuilt(versions: dict[str, str], gone: set[str]) -> None:
    new = {name: {**facts, "version": versions.get(name, "1")} for name, facts in INFO.items() if name not in gone}
    found = plan(INFO, new, {}, {})
    assert {name for name, version in versions.items() if version == "2" and name in new} <= set(found.rebuild)
    assert set(found.rebuild) <= new.keys()


def test_progress_counts_packages() -> None:
    told: list[str] = []
    progress = Progress(10, told.append, done=3)
    for line in (
        "\x1b[7m>>> host-m4 1.4.21 Building\x1b[27m",
        "checking for gcc... gcc",
        "\x1b[7m>>> openssh 10.2p1 Installing to target\x1b[27m",
    ):
        progress.feed(line)
    assert told[-1] == "5 of 10  openssh: installing to target"
    assert told[1] == "4 of 10  host-m4: building  checking for gcc... gcc"


def test_a_wrong_hash_shows_both() -> None:
    progress = Progress(1, lambda text: None)
    for line in ("ERROR: dbus-1.tar.xz has wrong sha256 hash:", "ERROR: expected: aaaa", "ERROR: got     : bbbb"):
        progress.feed(line)
    explained = progress.explain()
    assert explained is not None
    assert "dbus-1.tar.xz" in explained[0]
    assert "expected aaaa" in explained[0]
    assert "got      bbbb" in explained[0]


def test_a_missing_hash_is_named() -> None:
    progress = Progress(1, lambda text: None)
    progress.feed("ERROR: No hash found for linux-6.12.1.tar.xz")
    explained = progress.explain()
    assert explained is not None
    assert "linux-6.12.1.tar.xz" in explained[0]


@given(st.text())
def test_any_output_can_be_fed(text: str) -> None:
    progress = Progress(1, lambda line: None)
    for line in text.splitlines():
        progress.feed(line)
    progress.explain()


def test_seconds_by_package() -> None:
    log = (
        "10.0:start:extract             : a\n11.5:end  :extract             : a\n"
        "12.0:start:build               : b\n20.0:end  :build               : b\n"
        "20.0:start:build               : a\n21.0:end  :build               : a\nbroken line\n"
    )
    assert seconds_by_package(log) == {"b": 8.0, "a": 2.5}


@given(st.text())
def test_any_build_time_log_can_be_read(text: str) -> None:
    seconds_by_package(text)


def test_overridden_packages() -> None:
    text = "O = /x\nHOST_M4_OVERRIDE_SRCDIR = $(O)/m4\nUTIL_LINUX_LIBS_OVERRIDE_SRCDIR=/u\nKMOD_AUTORECONF = YES\n"
    assert overridden_packages(text) == {"host-m4", "util-linux-libs"}


def tree(path: Path, release: str) -> Path:
    path.mkdir()
    (path / "Makefile").write_text(f"export BR2_VERSION := {release}\n")
    return path


def test_an_unpacked_release_is_taken(tmp_path: Path) -> None:
    source = buildroot_source.obtain(str(tree(tmp_path / "br", RELEASE)), step())
    assert source.release == RELEASE
    assert source.commit == ""


def test_another_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is Buildroot 2021\.02"):
        buildroot_source.obtain(str(tree(tmp_path / "br", "2021.02")), step())


def test_another_commit_is_refused_with_both_named(tmp_path: Path) -> None:
    path = tree(tmp_path / "br", RELEASE)
    git = ["git", "-C", str(path), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    with pytest.raises(UserError, match=rf"at commit [0-9a-f]{{12}}.*made for {COMMIT[:12]}"):
        buildroot_source.obtain(str(path), step())


@pytest.mark.parametrize(("name", "message"), [("absent", "no such directory"), ("empty", "no Buildroot tree")])
def test_what_is_no_buildroot_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        buildroot_source.obtain(str(tmp_path / name), step())


def test_the_newest_recorded_kernel_of_a_series_is_taken(tmp_path: Path) -> None:
    path = tree(tmp_path / "br", RELEASE)
    (path / "linux/before").mkdir(parents=True)
    lines = [f"sha256  {'0' * 64}  linux-{version}.tar.xz" for version in ("6.12.9", "6.12.91", "6.6.141")]
    (path / "linux/before/linux.hash").write_text("\n".join(lines) + "\n")
    source = buildroot_source.obtain(str(path), step())
    assert buildroot_source.kernel_version(source, "6.12") == "6.12.91"
    with pytest.raises(UserError, match=r"records no kernel 5\.4\.x"):
        buildroot_source.kernel_version(source, "5.4")
    patches = buildroot_kernel.record_hash(source, tmp_path / "output", "6.12.91")
    for package in ("linux", "linux-headers"):
        recorded = (patches / package / f"{package}.hash").read_text().splitlines()
        assert f"sha256  {'0' * 64}  linux-6.12.91.tar.xz" in recorded


def test_every_missing_host_tool_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="Buildroot needs") as caught:
        buildroot_host.check("x86_64")
    assert {"gcc", "rsync", "cpio", "bc"} <= set(re.split(r"[ ,]+", caught.value.message))
    assert "apt-get install" in caught.value.hint
    assert "build-essential" in caught.value.hint


def test_a_full_disk_is_seen_before_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(buildroot_host.DISK_NEEDED, "debian", 1 << 60)
    with pytest.raises(UserError, match="GiB are free"):
        buildroot_host.check_disk(tmp_path / "new", "debian", built=False)


def test_nothing_leaks_into_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLAGS", "-O0")
    monkeypatch.setenv("PATH", "/usr/bin::.:relative:/bin")
    env = buildroot_host.environment()
    assert env["CFLAGS"] == ""
    assert env["PATH"] == "/usr/bin:/bin"


def test_a_missing_primary_site_or_override_file_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--primary-site"):
        BuildrootEngine(Options(primary_site=str(tmp_path / "absent"))).settings()
    with pytest.raises(UserError, match="--override-file"):
        BuildrootEngine(Options(override_file=tmp_path / "absent")).settings()


def test_offline_without_a_site_looks_only_into_the_download_directory(tmp_path: Path) -> None:
    settings = BuildrootEngine(Options(offline=True, dl_dir=tmp_path)).settings()
    assert settings.primary_site == f"file://{tmp_path}"


def test_offline_lists_what_is_missing(tmp_path: Path) -> None:
    settings = BuildrootEngine(Options(offline=True, dl_dir=tmp_path)).settings()
    (tmp_path / "there").mkdir()
    (tmp_path / "there/there-1.tar.gz").write_bytes(b"x")
    info = {
        "there": {"hashes": ["there.hash"], "downloads": [{"source": "there-1.tar.gz"}]},
        "host-gone": {"hashes": ["gone.hash"], "downloads": [{"source": "gone-2.tar.gz"}]},
        "hostos-live": {"hashes": [], "downloads": [{"source": "hostos-live-1.tar.gz"}]},
    }
    source = buildroot_source.Source(tmp_path, RELEASE, COMMIT)
    toolchain = buildroot.Toolchain("internal", "internal", ())
    prepared = buildroot.Prepared(source, toolchain, settings, tmp_path, "6.12.1", "", {}, info, tmp_path / "log")
    with pytest.raises(UserError, match=r"(?s)1 source archive.*gone-2\.tar\.gz \(host-gone\)") as caught:
        buildroot.check_sources(prepared)
    assert "there-1" not in caught.value.message
    assert "hostos-live" not in caught.value.message


def test_a_result_that_needs_the_output_directory_is_found_only_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path / "home"))
    output = tmp_path / "output"
    for key, python in (("with", True), ("without", False)):
        with cache.create("buildroot", key) as result:
            (result / "facts.json").write_text(json.dumps({"python": python}))
    assert buildroot.find_result("absent", output) is None
    assert buildroot.find_result("without", output) is not None
    assert buildroot.find_result("with", output) is None
    (output / buildroot.PYTHON).parent.mkdir(parents=True)
    (output / buildroot.PYTHON).touch()
    assert buildroot.find_result("with", output) is not None


def test_a_path_make_cannot_hold_is_refused_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path / "my caches"))
    with pytest.raises(UserError, match="cannot build in a path with ' ' in it, and the cache has one") as caught:
        BuildrootEngine().build(load_profile("default", "x86_64"), Steps())
    assert caught.value.status == 2
    assert not (tmp_path / "my caches").exists()
