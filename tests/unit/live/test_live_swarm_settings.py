"""How strangers are dealt with: what libtorrent is told, and that nothing is open by default."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.errors import UserError
from hostos.live.swarm_settings import MOST_RATE, SwarmSettings
from hostos.live.torrents import magnet, parse_image_reference

settings = st.builds(
    SwarmSettings,
    encryption=st.sampled_from(["required", "preferred", "off"]),
    download_limit=st.integers(0, MOST_RATE),
    upload_limit=st.integers(0, MOST_RATE),
    lan=st.booleans(),
    public=st.booleans(),
    nodes=st.lists(st.sampled_from(["192.0.2.1:6881", "[2001:db8::1]:9", "dht.example.org:1"])).map(tuple),
)


@given(settings)
def test_settings_are_read_back(value: SwarmSettings) -> None:
    assert SwarmSettings.parse(value.to_dict()) == value


def test_by_default_nobody_is_asked_and_nothing_is_plain() -> None:
    told = SwarmSettings().settings()
    assert told["enable_dht"] is told["enable_lsd"] is False
    assert told["dht_bootstrap_nodes"] == ""
    assert (told["in_enc_policy"], told["out_enc_policy"], told["allowed_enc_level"]) == (0, 0, 2)


def test_a_dht_of_ones_own_may_be_all_neighbours() -> None:
    own = SwarmSettings(public=True, nodes=("192.168.1.5:6881",)).settings()
    assert own["dht_bootstrap_nodes"] == "192.168.1.5:6881"
    assert own["dht_restrict_routing_ips"] is False
    assert "dht_restrict_routing_ips" not in SwarmSettings(public=True).settings()
    assert "dht_restrict_routing_ips" not in SwarmSettings(public=True, nodes=("8.8.8.8:1",)).settings()


@pytest.mark.parametrize(
    "fields",
    [
        {"encryption": "rot13"},
        {"encryption": 1},
        {"lan": 1},
        {"public": "yes"},
        {"download_limit": -1},
        {"upload_limit": True},
        {"upload_limit": 1 << 40},
        {"nodes": "here:1"},
        {"nodes": ["nowhere"]},
        {"nodes": [7]},
        {"colour": "blue"},
    ],
)
def test_nonsense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        SwarmSettings.parse(fields)


def test_links_name_web_seeds() -> None:
    link = magnet("ab" * 32, ["192.0.2.7:1"], web_seeds=["http://192.0.2.7:80/a/b", "https://[2001:db8::1]:443"])
    found = parse_image_reference(link)
    assert found.web_seeds == ("http://192.0.2.7:80/a/b", "https://[2001:db8::1]:443")
    assert found.peers == ("192.0.2.7:1",)
    for bad in ("ftp://x/", "http://u:p@h/", "http://h/?q", "http://"):
        with pytest.raises(UserError, match="web seed"):
            parse_image_reference(f"magnet:?xt=urn:btmh:1220{'ab' * 32}&ws={bad.replace('?', '%3F')}")
