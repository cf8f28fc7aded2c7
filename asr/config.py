"""The configuration of an experiment: the dataclasses of its components, read from and written to YAML.

YAML files mirror the dataclasses and contain only numbers, strings and lists. Several files merge from left
to right, then overrides such as `optim.lr=1e-3` apply. A misspelt field or a wrong type is an error that
names the file, the dotted path and the class.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import ConfigDict, ValidationError, create_model

from asr.data.augment import AugmentConfig
from asr.data.loader import DataConfig
from asr.errors import ConfigError
from asr.features import FbankConfig
from asr.losses import LossConfig
from asr.model.build import DECODERS, ENCODERS, EncoderConfig
from asr.model.conformer import ConformerConfig
from asr.model.decoder import DecoderConfig
from asr.optim import OPTIMIZERS, OptimConfig


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """How to run training and what to keep; nothing here is part of the model."""

    init: str = ""
    """Start from the parameters of another model: an experiment (its average) or a .safetensors file. Tensors
    with the same name are loaded, including the feature normalisation; the rest starts fresh; "" is off. A
    resumed run ignores it."""

    init_parts: list[str] = field(default_factory=list)
    """Load only these parts, for example [cmvn, encoder, ctc] for a different decoder; [] loads all."""

    seed: int = 1
    """Seed of initial parameters, dropout, SpecAugment and random contexts; separate from data.seed."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`bf16` computes matrix products in bfloat16 (parameters stay float32). `auto` does so if it is faster:
    on GPUs that support it, and for models of at least 128 channels on CPUs that do (AVX-512, AMX)."""

    threads: int = 0
    """Threads per process on a CPU; 0 leaves it to torch. One is best for a small model: several mostly wait
    for each other, and waiting uses CPU time, too."""

    compile: bool = False
    """Use torch.compile: takes minutes at the start, and saves time and memory per step on a GPU."""

    cmvn: bool = True
    """Normalise features by the mean and variance of the first `cmvn_utterances` of training."""

    cmvn_utterances: int = 1000

    ema: float = 0.0
    """Decay of a running average of the parameters, which validation then uses; 0 is off."""

    log_every: int = 50
    """Steps between two lines of the log."""

    valid_every: int = 1000
    """Steps between two validations."""

    valid_utterances: int = 500
    """Utterances of a validation, evenly spaced in data.valid; 0 takes all."""

    save_every: int = 1000
    """Steps between two checkpoints."""

    keep: int = 10
    """Checkpoints to keep, besides the best; at least 2, as the last may turn out to be damaged."""

    max_bad_steps: int = 10
    """Training fails after this many consecutive steps without a finite gradient."""

    max_cpu_minutes: float = 0.0
    """Stop once all processes together, across resumes, have used this much CPU time; 0 is off."""

    timeout_s: float = 1800.0
    """How long a rank waits for the others before it reports the missing ones."""

    def __post_init__(self) -> None:
        limits = {"keep": 2, "log_every": 1, "valid_every": 1, "save_every": 1, "threads": 0}
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema is {self.ema}; expected at least 0 and below 1")


@dataclass(kw_only=True, slots=True)
class ExperimentConfig:
    """The complete configuration of an experiment; each part is documented in its own class."""

    features: FbankConfig = field(default_factory=FbankConfig)
    encoder: EncoderConfig = field(default_factory=ConformerConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


REGISTERS: dict[str, dict[str, Any]] = {
    "encoder": {name: config for name, (config, _) in ENCODERS.items()},
    "decoder": {name: config for name, (config, _) in DECODERS.items()},
    "optim": OPTIMIZERS,
}
"""Sections with several types: the key `type` selects one, by default the first."""


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Merge YAML files from left to right, then overrides `a.b=value`. Raises ConfigError."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    sources = [(str(path), _read(Path(path))) for path in paths]
    for source, values in sources + [("--set", _parse_override(text)) for text in overrides]:
        _merge(merged, values)
        origin.update(dict.fromkeys(_leaves(values), source))
    return _build(merged, origin)


def save_config(config: ExperimentConfig, path: str | Path) -> None:
    """Write every field, so that the file rebuilds the model even if defaults change later."""
    text = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Two configurations as nested dicts -> dotted path: (old value, new value), where they differ."""
    left, right = _leaves(old), _leaves(new)
    paths = list(dict.fromkeys([*left, *right]))
    return {p: (left.get(p), right.get(p)) for p in paths if left.get(p) != right.get(p)}


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


class _PlainLoader(_Loader):
    """A reference is an error, too: with them, a file of a few lines can be endless."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.constructor.ConstructorError(
                None, None, f"*{event.anchor} is a reference, write the value itself", event.start_mark
            )
        return super().compose_node(parent, index)


def parse_yaml(text: str, source: str, references: bool = False) -> Any:
    """What a YAML text holds. references: whether it may have them, as those that programs write.

    Raises ConfigError, which begins with `source`.
    """
    try:
        return (_Loader if references else _PlainLoader)(text).get_single_data()
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = problem or getattr(error, "reason", None) or error
        raise ConfigError(f"{source}{line}: not YAML: {reason}") from None
    except RecursionError:
        raise ConfigError(f"{source}: not YAML of ours: nested too deeply") from None
    except (ArithmeticError, AttributeError, LookupError, ValueError) as error:  # !!int x, 2024-99-99
        raise ConfigError(f"{source}: not YAML: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    if values is not None and not isinstance(values, dict):
        raise ConfigError(
            f"{path}: a {type(values).__name__}, expected a mapping of {', '.join(_sections())}"
        )
    return values or {}


def _parse_override(text: str) -> dict[str, Any]:
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {text}: expected a path and a value, as in optim.lr=1e-3")
    nested: Any = parse_yaml(value, f"--set {text}") if value else ""
    for key in reversed(path.strip().split(".")):
        nested = {key: nested}
    return nested


def _merge(merged: dict[str, Any], values: dict[str, Any]) -> None:
    """Merge mappings recursively; any other value replaces."""
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            _merge(merged[key], value)
        else:
            merged[key] = value


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> dotted path: value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found.update(_leaves(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _build(merged: dict[str, Any], origin: dict[str, str]) -> ExperimentConfig:
    sections = _sections()
    for name in merged:
        if name not in sections:
            raise ConfigError(_unknown(str(name), str(name), sections, "ExperimentConfig", origin))
    return ExperimentConfig(**{name: _section(name, data, origin) for name, data in merged.items()})


def _sections() -> list[str]:
    return [f.name for f in fields(ExperimentConfig)]


def _section(name: str, data: Any, origin: dict[str, str]) -> Any:
    """One section of the configuration, checked for unknown fields and wrong types."""
    kind = _section_class(name, data, origin)
    schema = create_model("Section", value=(kind, ...), __config__=ConfigDict(extra="forbid", strict=True))
    try:
        # via JSON, where strict mode still accepts mappings for dataclasses
        text = json.dumps({"value": data}, default=str)
        return schema.model_validate_json(text).value  # type: ignore[attr-defined]
    except ConfigError as error:
        raise ConfigError(f"{_where(name, origin)}{name}: {error}") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        keys = [str(key) for key in problem["loc"][1:]]
        raise ConfigError(
            _explain(".".join([name, *keys]), _owner(kind, keys), dict(problem), origin)
        ) from None


def _section_class(name: str, data: Any, origin: dict[str, str]) -> Any:
    if name not in REGISTERS:
        return get_type_hints(ExperimentConfig)[name]
    if not isinstance(data, dict) or "type" not in data:
        return next(iter(REGISTERS[name].values()))
    if data["type"] not in list(REGISTERS[name]):
        path = f"{name}.type"
        known = ", ".join(REGISTERS[name])
        raise ConfigError(
            f"{_where(path, origin)}{path}: no such {name}: {data['type']}; expected one of {known}"
        )
    return REGISTERS[name][data["type"]]


def _owner(kind: Any, keys: list[str]) -> Any:
    """The dataclass that should have the last of the keys."""
    for key in keys[:-1]:
        inner = get_type_hints(kind).get(key)
        if not is_dataclass(inner):
            break
        kind = inner
    return kind


EXPECTED = {
    "float_type": "a number (float)",
    "int_type": "a whole number (int)",
    "bool_type": "true or false (bool)",
    "string_type": "text (str)",
    "list_type": "a list",
    "dataclass_type": "a mapping of fields",
}


def _explain(path: str, owner: Any, problem: dict[str, Any], origin: dict[str, str]) -> str:
    """A pydantic error -> one readable line."""
    if problem["type"] == "unexpected_keyword_argument":
        names = [f.name for f in fields(owner)]
        return _unknown(path, path.rpartition(".")[2], names, owner.__name__, origin)
    expected = EXPECTED.get(problem["type"])
    if problem["type"] == "literal_error":
        expected = problem["ctx"]["expected"]
    value = json.dumps(problem["input"], default=str)
    meaning = f"{value} is not {expected}" if expected else f"{value}: {problem['msg'].lower()}"
    return f"{_where(path, origin)}{path}: {meaning}, in {owner.__name__}"


def _unknown(path: str, key: str, names: Iterable[str], owner: str, origin: dict[str, str]) -> str:
    near = difflib.get_close_matches(key, list(names), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{_where(path, origin)}{path}: no such field in {owner}{hint}"


def _where(path: str, origin: dict[str, str]) -> str:
    """The last source that set the path or something below it, or else something above it."""
    below = [source for leaf, source in origin.items() if f"{leaf}.".startswith(f"{path}.")]
    above = [origin[parent] for parent in _parents(path) if parent in origin]
    return f"{(below or above or ['configuration'])[-1]}: "


def _parents(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path
