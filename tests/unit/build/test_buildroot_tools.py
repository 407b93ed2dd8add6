"""menuconfig's difference, the vulnerability list, and the guides of docs/buildroot.md, followed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.build import kconfig
from hostos.build.engines import buildroot_config
from hostos.build.engines.buildroot import Options
from hostos.build.engines.buildroot_config import EXTERNAL, Settings
from hostos.build.engines.buildroot_source import Source
from hostos.build.engines.buildroot_tools import cve, minimal, unchecked, vulnerabilities, write_feature
from hostos.build.profile import CONFIGS, Value, load_profile
from hostos.errors import UserError
from hostos.steps import Steps

Rendered = Callable[..., str]
GUIDE = (EXTERNAL.parent / "docs/buildroot.md").read_text()


def block(language: str, number: int = 0) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.M | re.S)[number]


def test_only_what_was_chosen_is_kept() -> None:
    before: dict[str, Value] = {"A": True, "B": False, "GONE": True, "SIZE": 1}
    after: dict[str, Value] = {"A": False, "B": True, "FOLLOWS": True, "SIZE": 2}
    assert minimal(before, after, {"B", "SIZE", "GONE"}) == {"A": False, "B": True, "GONE": False, "SIZE": 2}


configs = st.dictionaries(st.sampled_from("ABCDEF"), st.sampled_from([True, False, 1, "x"]))


@given(configs, configs)
def test_the_difference_leads_from_one_to_the_other(before: dict[str, Value], after: dict[str, Value]) -> None:
    changed = minimal(before, after, before.keys() | after.keys())
    reached = {symbol: value for symbol, value in {**before, **changed}.items() if value is not False}
    assert reached == {symbol: value for symbol, value in after.items() if value is not False}


def test_a_second_menuconfig_adds_to_the_first(tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    write_feature({"A": True}, "kernel", tmp_path)
    write_feature({"PACKAGE_X": True, "TEXT": 'a "b"'}, "buildroot", tmp_path)
    path = write_feature({"B": 7}, "kernel", tmp_path)
    assert tomllib.loads(path.read_text()) == {
        "schema": 1,
        "description": "Options chosen in menuconfig",
        "buildroot": {"PACKAGE_X": True, "TEXT": 'a "b"'},
        "kernel": {"A": True, "B": 7},
    }


def test_vulnerabilities_are_those_that_apply() -> None:
    document = {
        "components": [{"bom-ref": "dbus", "name": "dbus"}],
        "vulnerabilities": [
            {
                "id": "CVE-2",
                "analysis": {"state": "exploitable"},
                "affects": [{"ref": "dbus"}],
                "ratings": [{"severity": "high"}],
            },
            {"id": "CVE-1", "analysis": {"state": "resolved"}, "affects": [{"ref": "dbus"}]},
        ],
    }
    assert vulnerabilities(json.dumps(document)) == [("CVE-2", "high", "dbus")]


def write_cve(feed: Path, name: str, severity: str, match: dict[str, object]) -> None:
    """One entry of the feed, in the shape of the NVD's API 2.0."""
    directory = feed / name.rpartition("-")[0] / f"{name[:-2]}xx"
    directory.mkdir(parents=True)
    cvss = {"version": "3.1", "baseScore": 8.1, "baseSeverity": severity}
    document = {
        "id": name,
        "published": "2024-07-01T13:15:06.467",
        "lastModified": "2025-09-30T13:52:23.540",
        "descriptions": [{"lang": "en", "value": "a fault"}],
        "metrics": {"cvssMetricV31": [{"type": "Primary", "cvssData": cvss}]},
        "weaknesses": [{"description": [{"lang": "en", "value": "CWE-362"}]}],
        "configurations": [{"nodes": [{"operator": "OR", "negate": False, "cpeMatch": [match]}]}],
        "references": [{"url": "https://example.org", "tags": ["Vendor Advisory"]}],
    }
    (directory / f"{name}.json").write_text(json.dumps(document))


def test_known_vulnerabilities_come_from_a_local_feed(
    buildroot: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path / "home"))
    feed = tmp_path / "feed"
    openssh = {"vulnerable": True, "criteria": "cpe:2.3:a:openbsd:openssh:*:*:*:*:*:*:*:*"}
    dbus = {"vulnerable": True, "criteria": "cpe:2.3:a:freedesktop:dbus:*:*:*:*:*:*:*:*"}
    write_cve(feed, "CVE-2024-63870", "HIGH", {**openssh, "versionEndExcluding": "99"})
    write_cve(feed, "CVE-2006-50510", "HIGH", {**openssh, "versionEndExcluding": "4.4"})
    write_cve(feed, "CVE-2023-34969", "LOW", {**dbus, "versionEndIncluding": "99"})
    override = tmp_path / "override.mk"
    override.write_text(f"DBUS_OVERRIDE_SRCDIR = {tmp_path}\n")
    options = Options(source=str(buildroot.path), offline=True, override_file=override)
    checked = cve(load_profile("minimal", "x86_64"), options, feed, Steps())
    assert vulnerabilities(checked) == [("CVE-2024-63870", "high", "openssh")]
    assert unchecked(checked) == ["dbus"]


def test_a_directory_without_a_feed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no CVE feed"):
        cve(load_profile("minimal", "x86_64"), Options(), tmp_path, Steps())


@pytest.mark.parametrize("jobs", ["-3", "many"])
def test_a_number_of_compilers_that_is_none_is_bad_input(jobs: str) -> None:
    command = [sys.executable, "-m", "invoke", "build", "--engine", "buildroot", f"--jobs={jobs}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=CONFIGS.parent)
    assert (done.returncode, done.stderr.partition("\n")[0]) == (
        2,
        f"invoke: --jobs {jobs}: not a whole number from 1",
    )


def with_guide(tmp_path: Path) -> Path:
    directory = tmp_path / "configs"
    shutil.copytree(CONFIGS, directory)
    for found in re.finditer(r"^```toml\n(.*?)^```", GUIDE, re.M | re.S):
        # Each file is shown below the sentence that names it.
        path = re.findall(r"`configs/((?:features|profiles)/[a-z-]+\.toml)`", GUIDE[: found.start()])[-1]
        (directory / path).write_text(found[1])
    return directory


def test_how_to_add_a_feature_and_a_board(rendered: Rendered, tmp_path: Path) -> None:
    directory = with_guide(tmp_path)
    server = directory / "profiles/server.toml"
    server.write_text(server.read_text().replace('"ssh",', '"ssh", "htop",'))
    profile = load_profile("server", "x86_64", directory)
    assert "BR2_PACKAGE_HTOP=y" in rendered(profile, Settings(Path("/dl")))
    assert {option.symbol for option in profile.kernel_options()} >= {"BLK_DEV_NVME", "IGB", "HWMON"}


def test_how_to_add_a_package(
    buildroot: Source, rendered: Rendered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    external = tmp_path / "external"
    shutil.copytree(EXTERNAL, external)
    (external / "package/hello").mkdir()
    (external / "package/hello/Config.in").write_text(block("kconfig"))
    (external / "package/hello/hello.mk").write_text(block("make"))
    (external / "package/hello/hello.hash").write_text(block("hash"))
    with (external / "Config.in").open("a") as file:
        file.write(block("kconfig-source"))
    monkeypatch.setattr(buildroot_config, "EXTERNAL", external)
    profile = load_profile("minimal", "x86_64")
    text = rendered(profile, Settings(tmp_path))
    got = buildroot_config.configure(buildroot, tmp_path / "output", text + "BR2_PACKAGE_HELLO=y\n", profile)
    assert got["PACKAGE_HELLO"] is True
    shown = subprocess.run(
        buildroot_config.make(buildroot, tmp_path / "output", "-s", "hello-show-info"),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert '"hello-2.12.1.tar.gz"' in shown
    assert kconfig.parse_config(text)["PACKAGE_OPENSSH"] is True
