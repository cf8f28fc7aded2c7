"""Errors in a configuration say what is wrong, where, and in which file."""

import ast
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from asr.config import REGISTERS, ExperimentConfig, differences, load_config, save_config
from asr.errors import ConfigError

CONF = Path(__file__).parents[1] / "recipes" / "conf"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("encodr: {}", "a.yaml: encodr: no such field in ExperimentConfig; did you mean encoder?"),
        (
            "optim: {max_step: 3}",
            "a.yaml: optim.max_step: no such field in OptimConfig; did you mean max_steps?",
        ),
        (
            "encoder: {chunk: {max_chunks: 3}}",
            "a.yaml: encoder.chunk.max_chunks: no such field in ChunkConfig; did you mean max_chunk?",
        ),
        ("encoder: {zzz: 3}", "a.yaml: encoder.zzz: no such field in ConformerConfig"),
        ("optim: {lr: fast}", 'a.yaml: optim.lr: "fast" is not a number (float), in OptimConfig'),
        ("encoder: {dim: 1.5}", "a.yaml: encoder.dim: 1.5 is not a whole number (int), in ConformerConfig"),
        ("encoder: {dim: yes}", "a.yaml: encoder.dim: true is not a whole number (int), in ConformerConfig"),
        ("train: {compile: 1}", "a.yaml: train.compile: 1 is not true or false (bool), in TrainConfig"),
        ("data: {train: x}", 'a.yaml: data.train: "x" is not a list, in DataConfig'),
        ("optim:", "a.yaml: optim: null is not a mapping of fields, in OptimConfig"),
        ("encoder: {type: zip}", "a.yaml: encoder.type: no such encoder: zip; expected one of conformer"),
        ("encoder: {subsampling: 5}", "a.yaml: encoder.subsampling: 5 is not 4 or 8, in ConformerConfig"),
        ("train: {keep: 1}", "a.yaml: train: keep is 1; expected at least 2"),
        ("optim: {betas: [1, 2]}", "a.yaml: optim: betas is [1.0, 2.0]; expected two numbers"),
        ("optim: {type: sgd}", "a.yaml: optim.type: no such optim: sgd; expected one of adamw, scaled-adam"),
        ("optim: {type: scaled-adam, weight_decay: 0.1}", "a.yaml: optim: weight_decay is 0.1; scaled-adam"),
        ("optim: {lr: 1, lr: 2}", "a.yaml:1: not YAML: lr is given twice"),
        ("a: {b", "a.yaml:1: not YAML"),
        ("optim: {lr: -1}", "a.yaml: optim: lr is -1.0; expected 0 or more"),
        ("optim: {lr: .nan}", "a.yaml: optim: lr is nan; expected 0 or more"),
        ("loss: {ctc: -1}", "a.yaml: loss: ctc is -1.0; expected 0 or more"),
        ("data: {num_workers: -1}", "a.yaml: data: num_workers is -1; expected 0 or more"),
        ("train: {ema: 2}", "a.yaml: train: ema is 2.0; expected at least 0 and below 1"),
        ("train: {threads: -1}", "a.yaml: train: threads is -1; expected at least 0"),
        ("encoder: &x {dim: *x}", "a.yaml:1: not YAML: *x is a reference, write the value itself"),
        ("a: " + "[" * 3000, "a.yaml: not YAML of ours: nested too deeply"),
        ("- a", "a.yaml: a list, expected a mapping of features, encoder"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "a.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


def test_files_merge_from_left_to_right_and_overrides_win(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "optim: {lr: 1, max_steps: 5}\nencoder: {chunk: {max_chunk: 3}}")
    second = write(tmp_path / "b.yaml", "optim: {lr: 2}\naugment: {speed: [1.0]}")
    config = load_config([first, second], ["encoder.chunk.dynamic=false", "optim.warmup_steps=7"])
    assert (config.optim.lr, config.optim.max_steps, config.optim.warmup_steps) == (2, 5, 7)
    assert (config.encoder.chunk.max_chunk, config.encoder.chunk.dynamic) == (3, False)
    assert config.augment.speed == [1.0]
    assert load_config([second, first]).optim.lr == 1


def test_an_error_names_the_file_that_made_it(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "optim: {lr: 1}")
    second = write(tmp_path / "b.yaml", "optim: {lr: fast}")
    with pytest.raises(ConfigError, match=r"b.yaml: optim.lr"):
        load_config([first, second])
    with pytest.raises(ConfigError, match=r"^--set: optim.lr"):
        load_config([first], ["optim.lr=fast"])


def test_an_override_without_a_value_is_no_text() -> None:
    """This is how a recipe passes on an option that was not given."""
    assert load_config([], ["augment.noise="]).augment.noise == ""
    with pytest.raises(ConfigError, match=r'optim.lr: "" is not a number'):
        load_config([], ["optim.lr="])


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 0.001), ("1.5E-4", 0.00015), (".5e2", 50.0), ("3", 3.0), ("-2e+3", -2000.0)]
)
def test_numbers_are_read_as_people_write_them(text: str, value: float) -> None:
    assert load_config([], [f"optim.weight_decay={text}"]).optim.weight_decay == value


@pytest.mark.parametrize("text", ["optim.lr", "=3", "optim.lr={"])
def test_an_override_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_config([], [text])


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: no such file"):
        load_config([tmp_path / "none.yaml"])
    (tmp_path / "latin.yaml").write_bytes(b"data: {tokens: \xe9}")
    with pytest.raises(ConfigError, match=r"latin.yaml: not UTF-8"):
        load_config([tmp_path / "latin.yaml"])


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    config = load_config([], ["optim.lr=1e-7", "data.train=[ä.jsonl]", "augment.speed=[]", "train.ema=0.999"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config([tmp_path / "config.yaml"]) == config


def test_differences_are_dotted_paths() -> None:
    old, new = load_config([]), load_config([], ["optim.lr=7", "encoder.chunk.max_chunk=9"])
    assert differences(asdict(old), asdict(new)) == {
        "encoder.chunk.max_chunk": (25, 9),
        "optim.lr": (0.001, 7.0),
    }


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_of_models_load(path: Path) -> None:
    assert load_config([path]).encoder.dim > 0


@pytest.mark.parametrize("name", REGISTERS)
def test_each_kind_of_a_part_is_known_by_its_type(name: str) -> None:
    for kind, config_class in REGISTERS[name].items():
        assert isinstance(getattr(load_config([], [f"{name}.type={kind}"]), name), config_class)


def options(config: Any) -> Iterator[str]:
    for field in fields(config):
        value = getattr(config, field.name)
        yield from options(value) if is_dataclass(value) else [field.name]


def test_every_option_is_read_somewhere() -> None:
    """An option that the code never reads would have no effect, silently."""
    sources = [path for path in (CONF.parents[1] / "asr").rglob("*.py") if path.name != "config.py"]
    trees = [ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for path in sources]
    # self.x does not count: a configuration reads itself to check its values
    read = {
        node.attr
        for tree in trees
        for node in tree
        if isinstance(node, ast.Attribute)
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    }
    assert set(options(ExperimentConfig())) - read == set()
