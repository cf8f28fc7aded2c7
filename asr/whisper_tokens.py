"""The units of Whisper's models: pieces of UTF-8, and special tokens.

Whisper has R pieces by rank, the end of text, the start of transcript, 99 or (large-v3) 100 languages, five
tokens for tasks and silence, "no timestamps", and 1501 timestamps from 0 to 30 s. Our units:

    0 <blk>      not in Whisper: never an input or an output
    1 <sos/eos>  <|startoftranscript|> as input, <|endoftext|> as output
    2 <unk>      not in Whisper
    3 + i        Whisper's i for i < R, the pieces
    2 + i        Whisper's i for i > R, <|startoftranscript|> and what follows

<|endoftext|> (R) is never an input, and only unit 1. <|startoftranscript|> also has a unit of its own.
"""

import re
from collections.abc import Sequence

from asr.byte_tokens import symbol_of
from asr.errors import TokensError
from asr.tokens import SPECIAL

LANGUAGES = tuple(
    re.findall(
        r"\w+",
        """en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro da hu ta no th
        ur hr bg lt la mi ml cy sk te fa lv bn sr az sl kn et mk br eu is hy ne mn bs kk sq sw gl mr pa
        si km sn yo so af oc ka be tg sd gu am yi lo uz fo ht ps tk nn mt sa lb my bo tl mg as tt haw ln
        ha ba jw su yue""",
    )
)
"""In the order of their units; models before large-v3 lack the last one."""

TASKS = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")


def whisper_symbols(
    ranks: Sequence[bytes], num_languages: int, num_times: int = 1501, only_english: bool = False
) -> list[str]:
    """Our symbols: pieces in the order of their ranks (asr.byte_tokens.read_ranks), languages, tasks, times.

    only_english: for models that get no language token, whose language units are unused. TokensError if there
    are not that many languages.
    """
    if not 0 < num_languages <= len(LANGUAGES):
        raise TokensError(f"{num_languages} languages, expected 1 to {len(LANGUAGES)}, as those of Whisper")
    languages = [f"unused-{x}" if only_english else x for x in LANGUAGES[:num_languages]]
    times = [f"{i / 50:.2f}" for i in range(num_times)]
    marks = ("startoftranscript", *languages, *TASKS, *times)
    return [*SPECIAL, *map(symbol_of, ranks), *(f"<|{x}|>" for x in marks)]
