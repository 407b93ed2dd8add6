import os
import sys

import pytest

from hostos import paths
from hostos.errors import UserError


def test_home_moves_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path))
    for place in (paths.state_dir, paths.data_dir, paths.cache_dir, paths.config_dir):
        assert place().is_relative_to(tmp_path)


def test_sockets_fit_however_long_the_home_is(tmp_path, monkeypatch):
    home = tmp_path / ("x" * 120)
    monkeypatch.setenv("HOSTOS_HOME", str(home))
    runtime = paths.runtime_dir()
    assert len(os.fsencode(runtime / "machine-with-a-long-name" / "control.sock")) <= paths.SOCKET_PATH_LIMIT
    monkeypatch.setenv("HOSTOS_HOME", str(home) + "y")
    assert paths.runtime_dir() != runtime


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /run/user")
def test_without_a_login_session_there_is_still_a_place(monkeypatch):
    monkeypatch.delenv("HOSTOS_HOME", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert str(os.getuid()) in paths.runtime_dir().name


def test_a_private_directory_is_private(tmp_path):
    made = paths.private_dir(tmp_path / "a" / "b")
    assert made.stat().st_mode & 0o777 == 0o700


def test_what_belongs_to_others_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(UserError, match="somebody else"):
        paths.private_dir(tmp_path)


def test_what_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        paths.private_dir(tmp_path / "file" / "below")
