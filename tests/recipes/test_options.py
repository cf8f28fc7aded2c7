"""--search takes any field of a search, and says what is wrong with one."""

import re

import pytest

from asr.decode.config import SearchConfig
from asr.decode.modes import MODES
from asr.errors import ConfigError
from recipes import options
from recipes.options import search_config, stream_config


def test_the_help_names_every_mode() -> None:
    assert set(re.findall(r"[a-z-]+", options.MODES)) > set(MODES)


def test_fields_are_taken_and_win_over_options() -> None:
    found = search_config(["margin_frames=8", "recombine=sum", "min_emit=0", "beam=3"], beam=7, nbest=2)
    assert found == SearchConfig(margin_frames=8, recombine="sum", min_emit=0.0, beam=3, nbest=2)
    assert search_config(None) == SearchConfig()


def test_a_stream_gets_them() -> None:
    config = stream_config("alignatt", 0, -1, search=["detect_truncation=true"])
    assert config.search.detect_truncation is True
    assert (config.chunk_ms, config.left_chunks) == (None, None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("margin_frame=8", "did you mean margin_frames=...?"),
        ("zzz=1", "fields are beam, nbest"),
        ("beam", "expected a field and a value"),
        ("beam=wide", "--search beam=wide: input should be a valid integer"),
        ("beam=0", "beam is 0, expected at least 1"),
        ("recombine=mean", "recombine=mean"),
        ("beam=[", r"--search beam=\[: \[ is not a valid value"),
    ],
)
def test_what_is_wrong_is_said(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search_config([setting])
