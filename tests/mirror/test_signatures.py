"""What is not signed as it should be is refused, by apt's own rules, and never kept."""

from __future__ import annotations

import lzma
import os
import time

import pytest

from bench.archive import DAY
from hostos.mirror.upstreams import Apt

INRELEASE = "dists/stable/InRelease"


def refused(cache, web, archive, reason):
    answer = cache.get(f"{web.url}/{INRELEASE}")
    assert answer.status == 502
    assert reason in answer.reason
    # Without a signed list, no package either.
    assert cache.get(f"{web.url}/{archive.packages['small'].relative_to(web.root)}").status == 404
    assert cache.held() == []
    assert reason in cache.log()


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"signed": False}, "is not signed"),
        ({"signed": False, "inline": False}, "is not signed"),
        ({"key": "other"}, "unknown key"),
        ({"key": "other", "inline": False}, "unknown key"),
        ({"key": "expired"}, "expired key"),
        ({"age": 10 * DAY}, "has expired (3 days ago)"),
        ({"age": -3600.0}, "is not valid yet (for 60 min)"),
    ],
    ids=["unsigned", "no Release.gpg", "unknown key", "unknown key, detached", "expired key", "expired", "future"],
)
def test_refused(cache, web, archive, made, reason):
    archive.publish(**made)
    if made.get("inline") is False:
        answer = cache.get(f"{web.url}/dists/stable/Release")
        assert answer.status == 502
        assert reason in answer.reason
    refused(cache, web, archive, reason)


def test_apt_itself_sees_the_reason(cache, archive, make_client):
    archive.publish(key="other")
    failed = make_client(cache).update(check=False)
    assert failed.returncode != 0
    assert "is not signed by a trusted key: unknown key" in failed.stdout + failed.stderr


@pytest.mark.parametrize("place", ["inside", "before", "after"])
def test_tampered(cache, web, archive, place):
    file = web.root / INRELEASE
    data = file.read_bytes()
    changed = {
        "inside": data.replace(b"Origin: Test", b"Origin: Evil"),
        "before": b"Origin: Evil\n" + data,
        "after": data + b"\nOrigin: Evil\n",
    }[place]
    file.write_bytes(changed)
    reason = {"inside": "bad signature", "before": "is not signed", "after": "outside of its signature"}[place]
    refused(cache, web, archive, reason)


def test_a_detached_signature_is_as_good(cache, archive, make_client):
    archive.publish(inline=False)
    client = make_client(cache)
    client.update()
    client.download("small")
    assert len(client.debs()) == 1


def test_signed_by_may_name_a_fingerprint_or_hold_the_key(make_cache, web, archive, keyring, tmp_path):
    listing = keyring.gpg("--with-colons", "--list-keys").decode().splitlines()
    prints = [line.split(":")[9] for line in listing if line.startswith("fpr")]
    both = keyring.export(tmp_path / "both.gpg", "good", "other")
    for signed_by, status in (
        (keyring.export(tmp_path / "good.asc", "good", armor=True).read_text(), 200),
        (f"{both} {prints[0]}", 200),
        (f"{both} {prints[1]}", 502),
        (str(tmp_path / "nowhere.gpg"), 502),
    ):
        cache = make_cache(Apt(web.url, ("stable",), ("main",), (), signed_by)).start()
        assert cache.get(f"{web.url}/{INRELEASE}").status == status, signed_by


def test_check_valid_until_can_be_off_as_in_apt(make_cache, upstream, web, archive):
    archive.publish(age=10 * DAY)
    lax = Apt(upstream.url, ("stable",), ("main",), (), upstream.signed_by, check_valid_until=False)
    assert make_cache(lax).start().get(f"{web.url}/{INRELEASE}").status == 200


def test_an_older_index_is_refused_also_after_a_restart(cache, web, archive, make_client):
    archive.publish(age=2 * DAY)
    old = (web.root / INRELEASE).read_bytes()
    archive.add("small", version="2.0")
    archive.publish()
    new = cache.get(f"{web.url}/{INRELEASE}").body
    (web.root / INRELEASE).write_bytes(old)
    os.utime(web.root / INRELEASE, (time.time() + 60, time.time() + 60))
    cache.stop()
    cache.start()
    time.sleep(2.1)
    answer = cache.get(f"{web.url}/{INRELEASE}")
    assert (answer.status, answer.body) == (200, new)
    assert "older than what was verified before: refused" in cache.log()
    assert cache.stats()["archives"][web.address]["refused"] == 1


def test_an_expired_one_is_not_served_when_the_mirror_is_gone(cache, web, archive):
    archive.publish(valid=4.0)
    assert cache.get(f"{web.url}/{INRELEASE}").status == 200
    web.faults.only, web.faults.down = ".*", True
    time.sleep(4.5)
    answer = cache.get(f"{web.url}/{INRELEASE}")
    assert answer.status == 502
    assert "has expired, and there is none newer" in answer.reason


def test_an_index_that_is_not_the_signed_one(cache, web, archive, make_client):
    archive.publish(lie={"main/binary-amd64/Packages.xz": lzma.compress(b"Package: evil\n")})
    # apt turns to the uncompressed one.
    make_client(cache).update()
    answer = cache.get(f"{web.url}/dists/stable/main/binary-amd64/Packages.xz")
    assert answer.status == 502
    assert "bytes, not" in answer.reason
    assert all(path.read_bytes().startswith(b"Package: small") for path in cache.held())


def test_a_signed_index_may_not_lead_out_of_its_archive(cache, web, archive):
    deb = archive.packages["small"]
    evil = web.root.parent / "evil.deb"
    evil.write_bytes(deb.read_bytes())
    text = (web.root / "dists/stable/main/binary-amd64/Packages").read_text()
    spoiled = text.replace(f"Filename: {deb.relative_to(web.root)}", "Filename: ../evil.deb")
    assert spoiled != text
    archive.packages = {}
    archive.more = {"contrib/binary-amd64/Packages": spoiled.encode()}
    archive.publish()
    assert cache.get(f"{web.url}/dists/stable/contrib/binary-amd64/Packages").status == 200
    for path in (f"{web.url}/../evil.deb", f"{web.url}/pool/../../evil.deb", f"{web.url}/%2e%2e/evil.deb"):
        assert cache.get(path).status == 400
