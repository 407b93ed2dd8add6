"""`hostos doctor`: each fault has its line and its remedy. (Real QEMU: tests/boot.)"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hostos.cli import main
from hostos.findings import Finding
from hostos.machine import doctor, proof
from hostos.machine.os_image import host_arch

MakeOs = Callable[..., Path]
DEVICES = "".join(f'name "{name}", bus PCI\n' for name in (*doctor.NEEDED_DEVICES, *doctor.OPTIONAL_DEVICES))


def program(path: Path, script: str) -> Path:
    """An executable written in Python."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport sys, time\nline = sys.argv[1:]\n{script}\n")
    path.chmod(0o755)
    return path


def talking(path: Path, version: str, devices: str = DEVICES, backends: str = "user tap") -> Path:
    """Says about itself what QEMUs say that are not installed here."""
    return program(
        path,
        f"""
if "--version" in line: print("QEMU emulator version {version}")
elif "help" in line and "-device" in line: print({devices!r})
elif "-netdev" in line: print({backends!r})
""",
    )


def levels(found: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.level for finding in found}


def good(directory: Path) -> Path:
    """Puts the right checksums into the manifest."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, facts in manifest["files"].items():
        facts["sha256"] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    path.write_text(json.dumps(manifest))
    return directory


def test_qemu_versions_and_features(tmp_path: Path) -> None:
    found = list(doctor.check_qemu(talking(tmp_path / "q", "9.2.1 (Debian)"), "x86_64"))
    assert levels(found) == {"QEMU": "ok", "QEMU devices": "ok"}
    assert found[0].says.startswith("9.2.1 ")
    old = list(doctor.check_qemu(talking(tmp_path / "old", "4.2.0"), "x86_64"))
    assert levels(old)["QEMU"] == "warning"
    assert "7.2 or newer" in old[0].fix
    bare = list(doctor.check_qemu(talking(tmp_path / "bare", "8.0.0", 'name "e1000"\n', "tap"), "x86_64"))
    assert levels(bare)["QEMU devices"] == "fault"
    assert "virtio-net-pci" in bare[1].says
    assert "slirp" in bare[1].says
    fewer = "".join(f'name "{name}"\n' for name in doctor.NEEDED_DEVICES)
    some = list(doctor.check_qemu(talking(tmp_path / "some", "8.0.0", fewer), "x86_64"))
    assert levels(some)["QEMU devices"] == "warning"
    assert "--share (no virtio-9p-pci)" in some[1].says
    broken = list(doctor.check_qemu(program(tmp_path / "broken", "sys.exit(3)"), "x86_64"))
    assert levels(broken) == {"QEMU": "fault"}


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("print('SeaBIOS', flush=True); time.sleep(60)", ""),
        ("time.sleep(60)", "printed nothing within 0.5 s"),
        ("print('no such device', file=sys.stderr); sys.exit(1)", "ended with status 1: no such device"),
        ("import os; os.abort()", "ended with status -6"),
    ],
)
def test_only_output_is_proof(tmp_path: Path, script: str, says: str) -> None:
    seconds = 0.5 if "within" in says else 30.0
    reason = proof.prove("tcg", program(tmp_path / "q", script), "x86_64", None, seconds=seconds)
    assert (says in reason) if says else reason == ""


def test_the_os_is_read_to_its_last_byte(make_os: MakeOs) -> None:
    directory = good(make_os())
    assert doctor._os(directory)[1].level == "ok"
    (directory / "initrd.gz").write_bytes(b"xz")
    _, found = doctor._os(directory)
    assert found.level == "fault"
    assert "initrd.gz is not what was built" in found.says
    assert "invoke build" in found.fix


def test_directories_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (found,) = doctor.check_directories()
    assert found.level == "ok"
    monkeypatch.setenv("HOSTOS_HOME", "/proc/none")
    (found,) = doctor.check_directories()
    assert (found.level, "/proc cannot be written (for state, data" in found.says) == ("fault", True)
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path / "file" / "home"))
    (found,) = doctor.check_directories()
    assert "is no directory" in found.says


def test_machines_that_need_somebody(home: Path) -> None:
    (home / "state" / "machines" / "box").mkdir(parents=True)
    (home / "state" / "machines" / "box" / "run.json").write_text("{")
    first, last = doctor.check_machines()
    assert (first.name, first.level) == ("machine box", "warning")
    assert "hostos up -m box" in first.fix
    assert last.says == "1 broken"


def test_ports_and_sockets_are_fine_here() -> None:
    assert [finding.level for finding in (*doctor.check_ports(), *doctor.check_sockets())] == ["ok", "ok"]


def test_the_command(
    capfd: pytest.CaptureFixture[str], make_os: MakeOs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    directory = good(make_os(arch=host_arch()))
    talking(tmp_path / "bin" / f"qemu-system-{host_arch()}", "9.1.0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["doctor", "--os", str(directory), *words])
        return int(left.value.code or 0), *capfd.readouterr()

    status, out, _ = run("--json", "--no-proof")
    report = json.loads(out)
    assert (status, report["ok"]) == (0, True)
    assert {finding["level"] for finding in report["findings"]} >= {"ok", "warning"}
    assert all(finding["fix"] for finding in report["findings"] if finding["level"] != "ok")
    # A QEMU whose guests print nothing, not even by emulation.
    monkeypatch.setattr(proof, "PROOF_SECONDS", 0.5)
    status, out, err = run()
    assert status == 1
    assert "no guest runs by emulation" in out
    assert "1 fault: machines do not start" in err
    monkeypatch.setenv("PATH", str(tmp_path))
    status, out, _ = run()
    assert status == 1
    assert f"fault    QEMU           qemu-system-{host_arch()} is not installed" in out
