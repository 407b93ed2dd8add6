import gzip
import io
import json
import re

import pytest

from hostos.build import size
from hostos.cpio import directory, file, write_newc
from hostos.errors import UserError


def os_build(path, content):
    out = io.BytesIO()
    write_newc(
        [directory("usr"), directory("usr/bin"), *(file(f"usr/bin/{name}", data) for name, data in content.items())],
        out,
    )
    path.mkdir()
    (path / "initrd.gz").write_bytes(gzip.compress(out.getvalue()))
    manifest = {"engine": "debian", "files": {"initrd.gz": {"size": len(out.getvalue())}}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_what_was_packed_is_found_again(tmp_path):
    content = {"a": b"1" * 5000, "b": b"", "c": bytes(range(256)) * 64}
    archive = gzip.decompress((os_build(tmp_path / "os", content) / "initrd.gz").read_bytes())
    assert {name: data for name, data in size.members(archive) if data} == {
        f"usr/bin/{name}": data for name, data in content.items() if data
    }


def test_the_largest_come_first(tmp_path):
    shown = size.report(os_build(tmp_path / "os", {"small": b"x" * 10, "large": bytes(range(256)) * 64}), 10)
    assert re.search(r"largest files\n.*usr/bin/large\n.*usr/bin/small", shown)


def test_two_builds_are_compared(tmp_path):
    one = os_build(tmp_path / "one", {"a": b"x"})
    two = os_build(tmp_path / "two", {"a": b"x", "b": bytes(range(256)) * 4096})
    assert "+" in size.compare(one, two, 5).splitlines()[-1]
    assert "usr/bin" in size.compare(one, two, 5)
    assert "usr/bin" not in size.compare(one, one, 5)


def test_what_is_no_build_is_said(tmp_path):
    with pytest.raises(UserError, match="is not a build"):
        size.report(tmp_path, 5)
