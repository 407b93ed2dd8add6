"""The Debian engine on real packages. Downloads and the compiled kernel come from the build cache."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hostos import paths
from hostos.build import cache, elf, lock, os_build
from hostos.build.debian_archive import find_mirror
from hostos.build.engines import debian
from hostos.build.engines.debian import DebianEngine
from hostos.build.profile import load_profile
from hostos.build.size import members
from hostos.errors import UserError
from hostos.steps import Steps

pytestmark = pytest.mark.build
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def profile():
    return load_profile("default", "x86_64")


@pytest.fixture(scope="session")
def built(profile, tmp_path_factory):
    """The OS as `invoke build` makes it."""
    return os_build.build(profile, DebianEngine(), Steps(), tmp_path_factory.mktemp("dist"))


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """A cache with the downloads and kernels of the real one, and nothing else."""
    real = paths.cache_dir()
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path / "home"))
    mine = paths.cache_dir()
    (mine / "build").mkdir(parents=True)
    (mine / "debs").symlink_to(real / "debs")
    (mine / "build" / "kernel").symlink_to(real / "build" / "kernel")
    return mine


def files(directory):
    return {path.name: cache.file_digest(path) for path in directory.iterdir() if path.is_file()}


def test_the_same_inputs_give_the_same_bytes(profile, built, fresh_cache, tmp_path):
    again = os_build.build(profile, DebianEngine(locked=True), Steps(), tmp_path / "elsewhere")
    assert files(again.directory) == files(built.directory)


def test_the_manifest_is_true(built):
    manifest = json.loads((built.directory / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        path = built.directory / name
        assert entry == {"size": path.stat().st_size, "sha256": cache.file_digest(path)}
    assert manifest["min_memory_mib"] << 20 > manifest["unpacked"]
    assert "openssh-server" in manifest["packages"]
    sbom = json.loads((built.directory / "sbom.cdx.json").read_text())
    assert {each["name"] for each in sbom["components"]} == set(manifest["packages"])


def test_it_is_small(built):
    sizes = json.loads((built.directory / "manifest.json").read_text())["files"]
    assert sizes["bzImage"]["size"] + sizes["initrd.gz"]["size"] <= 36e6


def test_nothing_is_linked_to_what_is_not_there(profile, tmp_path):
    tree = debian.root_tree(profile, lock.obtain(profile, Steps()), _Silent())
    names = {Path(path).name for path in tree.entries}
    for path, entry in tree.entries.items():
        wanted = elf.needs(entry.data)
        if wanted is not None:
            assert set(wanted.libraries) <= names, path


class _Silent:
    detail = ""

    def progress(self, detail):
        pass


def test_an_overlay_change_compiles_nothing(profile, built, tmp_path, monkeypatch):
    overlay = tmp_path / "overlay"
    shutil.copytree(os_build.initrd.OVERLAY, overlay, symlinks=True)
    (overlay / "etc/motd").write_text("changed\n")
    monkeypatch.setattr(os_build.initrd, "OVERLAY", overlay)
    steps = Steps()
    changed = os_build.build(profile, DebianEngine(), steps, tmp_path / "dist")
    details = {each.name: each.detail for each in steps.finished}
    assert "cached" in details["kernel"]
    assert "cached" in details["root file system"]
    assert changed.manifest["files"]["vmlinux"] == built.manifest["files"]["vmlinux"]
    assert changed.manifest["files"]["initrd.gz"] != built.manifest["files"]["initrd.gz"]


def test_the_guest_gets_no_python_sources(built):
    import gzip

    names = [name for name, _ in members(gzip.decompress((built.directory / "initrd.gz").read_bytes()))]
    assert "usr/lib/hostos/python/hostos/live/daemon.pyc" in names
    assert not [name for name in names if name.endswith(".py")]
    assert names[-1] == os_build.initrd.SENTINEL


def test_a_symbol_that_does_not_survive_stops_the_build(fresh_cache, tmp_path, monkeypatch):
    from hostos.build import profile as profiles

    configs = tmp_path / "configs"
    shutil.copytree(profiles.CONFIGS, configs)
    feature = configs / "features/fuse.toml"
    feature.write_text(feature.read_text().replace("FUSE_FS = true", "FUSE_FS = true\nNO_SUCH_THING = true"))
    source = paths.cache_dir() / "build" / "kernel-source"
    monkeypatch.setattr(profiles, "CONFIGS", configs)
    with pytest.raises(UserError) as caught:
        os_build.build(load_profile("default", "x86_64", configs), DebianEngine(), Steps(), tmp_path / "dist")
    assert source.is_dir()
    for part in ("NO_SUCH_THING", "fuse", str(feature)):
        assert part in caught.value.message
    assert not (tmp_path / "dist").exists()


def test_a_lock_that_does_not_fit_is_refused_when_it_must_hold(fresh_cache, tmp_path, monkeypatch):
    from hostos.build import profile as profiles

    configs = tmp_path / "configs"
    shutil.copytree(profiles.CONFIGS, configs)
    monkeypatch.setattr(profiles, "CONFIGS", configs)
    path = configs / "locks/default-x86_64.json"
    text = json.loads(path.read_text())
    text["requested"].append("nothing")
    path.write_text(json.dumps(text))
    with pytest.raises(UserError, match="packages have changed .nothing."):
        os_build.build(
            load_profile("default", "x86_64", configs), DebianEngine(locked=True), Steps(), tmp_path / "dist"
        )
    path.write_text("{")
    with pytest.raises(UserError, match="no lock file of this hostos"):
        os_build.build(
            load_profile("default", "x86_64", configs), DebianEngine(locked=True), Steps(), tmp_path / "dist"
        )


def test_a_damaged_download_is_noticed(fresh_cache, profile, tmp_path):
    (fresh_cache / "debs").unlink()
    (fresh_cache / "debs").mkdir()
    entry = lock.read(lock.lock_file(profile)).root[0]
    archive = lock.Archive("trixie", "x86_64")
    wrong = type(entry)(**{**entry.__dict__, "sha256": "0" * 64})
    with pytest.raises(UserError) as caught:
        archive.fetch([wrong], _Silent())
    assert "0" * 64 in caught.value.message
    assert not list((fresh_cache / "debs").iterdir())


def test_a_mirror_is_found_where_apt_knows_none(monkeypatch):
    which = shutil.which
    if which("mmdebstrap") is None:
        pytest.skip("mmdebstrap is not installed")
    monkeypatch.delenv("HOSTOS_MIRROR", raising=False)
    configured = find_mirror()
    assert configured.main.startswith("http")
    monkeypatch.setattr(shutil, "which", lambda name, **options: None if name == "apt-get" else which(name, **options))
    assert find_mirror().main.startswith("http")
    monkeypatch.setattr(shutil, "which", lambda name, **options: None)
    with pytest.raises(UserError, match="no Debian mirror"):
        find_mirror()
    monkeypatch.setenv("HOSTOS_MIRROR", "http://mirror.example/debian/")
    assert find_mirror().main == "http://mirror.example/debian"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_no_root_is_needed(built, tmp_path):
    """The whole root tree and the initrd, made by an unprivileged user, are the same bytes."""
    home = Path("/var/tmp") / f"hostos-unprivileged-{os.getpid()}"
    try:
        pool = home / "home/cache/debs"
        kernels = home / "home/cache/build/kernel"
        shutil.copytree(paths.cache_dir() / "debs", pool)
        shutil.copytree(paths.cache_dir() / "build" / "kernel", kernels)
        for name in ("hostos", "configs", "overlay"):
            shutil.copytree(REPOSITORY / name, home / "clone" / name, symlinks=True)
        (home / "env").mkdir()
        subprocess.run(["chown", "-R", "65534:65534", home], check=True)
        site = next(path for path in sys.path if path.endswith("site-packages"))
        shutil.copytree(site, home / "env/site", symlinks=True)
        subprocess.run(["chmod", "-R", "a+rX", home / "env"], check=True)
        code = (
            "from pathlib import Path; from hostos.build import os_build\n"
            "from hostos.build.profile import load_profile\n"
            "from hostos.build.engines.debian import DebianEngine; from hostos.steps import Steps\n"
            "os_build.build(load_profile('default', 'x86_64'), DebianEngine(locked=True), Steps(), Path('dist'))"
        )
        done = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", code],
            cwd=home / "clone",
            env={
                "HOSTOS_HOME": str(home / "home"),
                "PYTHONPATH": f"{home / 'clone'}:{home / 'env/site'}",
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        result = home / "clone/dist/default-x86_64"
        assert files(result) == files(built.directory)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def test_ctrl_c_leaves_the_old_build(built, fresh_cache, tmp_path):
    """Interrupt a build while it unpacks; what was in dist stays, nothing half-made does."""
    dist = tmp_path / "dist"
    shutil.copytree(built.directory, dist / "default-x86_64")
    before = files(dist / "default-x86_64")
    process = subprocess.Popen(
        [Path(sys.executable).parent / "invoke", "build", "--dist", dist],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert files(dist / "default-x86_64") == before
    assert [path.name for path in dist.iterdir()] == ["default-x86_64"]
    assert not list((fresh_cache / "build").glob("*/.*"))
