from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.build.kconfig import format_option, parse_config, verify
from hostos.build.profile import Option
from hostos.errors import UserError

HERE = Path("feature.toml")
symbols = st.from_regex(r"[A-Z0-9][A-Z0-9_]{0,20}", fullmatch=True)
values = st.one_of(
    st.booleans(),
    st.integers(min_value=-(2**31), max_value=2**31),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")),
)


@given(st.dictionaries(symbols, values), st.sampled_from(["CONFIG_", "BR2_"]))
def test_what_is_written_is_read_back(config, prefix):
    lines = [format_option(Option(symbol, value, "f", HERE), prefix) for symbol, value in config.items()]
    parsed = parse_config("\n".join(lines))
    assert parsed == config
    assert {symbol: type(value) for symbol, value in parsed.items()} == {s: type(v) for s, v in config.items()}


@given(st.text())
def test_any_text_is_survived(text):
    parse_config(text)


def test_real_lines():
    text = (
        "CONFIG_SMP=y\n# CONFIG_EFI is not set\nCONFIG_NR_CPUS=64\n"
        'CONFIG_BASE=0x1000\nCONFIG_LSM="a,b"\nCONFIG_E="x=\\"y\\""\n'
    )
    assert parse_config(text) == {
        "SMP": True, "EFI": False, "NR_CPUS": 64, "BASE": 4096, "LSM": "a,b", "E": 'x="y"',
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "got"),
    [
        (True, {}),
        (True, {"X": False}),
        (True, {"X": "m"}),
        (False, {"X": True}),
        (64, {"X": 8}),
        ("a", {"X": "b"}),
        (1, {"X": True}),
    ],
)
def test_a_lost_option_names_everything(wanted, got):
    with pytest.raises(UserError) as caught:
        verify([Option("X", wanted, "fuse", HERE)], got)
    for part in ("X", repr(wanted), "fuse", "feature.toml"):
        assert part in caught.value.message


def test_an_option_wanted_off_may_be_absent():
    verify([Option("X", False, "f", HERE), Option("Y", True, "f", HERE)], {"Y": True})


def test_a_line_break_is_refused():
    with pytest.raises(UserError, match="line break"):
        format_option(Option("X", "a\nb", "f", HERE), "CONFIG_")
