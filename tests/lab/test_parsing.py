"""Numbers of the command line and of YAML files are decimal; text stays text."""

from __future__ import annotations

import math
import string
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import error_of
from neuralcollapse.cli import main
from neuralcollapse.lab.commands import load_command
from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.settings import load_typed_yaml, load_yaml, parse, schema_of

SETTINGS = {
    (name, str(field.annotation)): field.annotation
    for command in map(load_command, ("compare", "train", "measure", "ufm", "landscape"))
    for section in command.sections
    for name, field in section.model_fields.items()
}
# What YAML 1.1, Python or C read as another number, or as one at all.
NOT_DECIMAL = (
    "0x10",
    "0o17",
    "0b11",
    "1_000",
    "1:30",
    "190:20:30",
    "\u0663",
    "1 0",
    "10,,20",
    "1e",
    "--1",
    "+",
    ".",
    "1.2.3",
)


def alternatives(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return schema.get("anyOf", [schema])


def is_number(schema: dict[str, Any]) -> bool:
    return any(one.get("type") in ("integer", "number") and "enum" not in one for one in alternatives(schema))


def is_text(schema: dict[str, Any]) -> bool:
    return any(one.get("type") == "string" and not {"enum", "const"} & set(one) for one in alternatives(schema))


def items(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [one["items"] for one in alternatives(schema) if one.get("type") == "array"]


def in_file(text: str) -> Any:
    return load_yaml(f"setting: {text}")["setting"]


@pytest.mark.parametrize(("name", "hint"), [(name, hint) for (name, _), hint in SETTINGS.items()])
def test_every_setting_takes_decimal_numbers_alone(name, hint):
    schema = schema_of(hint)
    for read in (str, in_file):
        if is_number(schema):
            assert parse(name, read("010"), hint) == 10
            assert parse(name, read("+7"), hint) == 7
        for item in items(schema):
            if is_number(item):
                assert parse(name, read("[010, 020]"), hint) == [10, 20]
        if is_text(schema):
            assert parse(name, read("0x10"), hint) == "0x10"
        elif not any(one.get("type") == "object" for one in alternatives(schema)) and not any(
            map(is_text, items(schema))
        ):
            for text in NOT_DECIMAL:
                with pytest.raises(ValueError, match=f"^{name} must be "):
                    parse(name, read(text), hint)


@given(st.integers(-(10**9), 10**9), st.integers(0, 5))
def test_zeros_in_front_change_no_integer(number, zeros):
    text = f"{'-' * (number < 0)}{'0' * zeros}{abs(number)}"
    assert parse("it", text, int) == parse("it", in_file(text), int | None) == number
    assert parse("it", f"{text},{text}", int | list[int]) == [number, number]
    assert load_typed_yaml(text) == number


@given(st.floats(allow_nan=False), st.sampled_from(["{!r}", "{:e}", "{:.17g}", "{:+.17e}"]))
def test_numbers_are_what_python_writes(number, form):
    for read in (str, in_file):
        assert parse("it", read(form.format(number)), float) == pytest.approx(number, rel=1e-6)
    assert parse("it", repr(number), float) == number


@pytest.mark.parametrize("text", [".inf", "inf", "-.INF", ".nan", "NaN"])
def test_what_is_not_finite_is_read_as_such(text):
    assert not math.isfinite(parse("it", text, float))


# Without the line ends of Unicode, which PyYAML itself folds into spaces when it writes them.
@given(st.text(st.characters(exclude_characters="\x85\u2028\u2029", exclude_categories=["Cs"])))
def test_text_settings_stay_text(text):
    assert parse("it", text, str | None) == text
    dumped = yaml.safe_dump({"it": text}, allow_unicode=True)
    assert parse("it", load_yaml(dumped)["it"], str) == text


@pytest.mark.parametrize(
    "text", ["no", "off", "yes", "true", "010", "1_0", "2020-01-01", "1:30", "0x1", "1e3", ".5", "<<", "="]
)
def test_a_name_in_a_file_needs_no_quotes(text):
    assert parse("data", in_file(text), str) == text


@pytest.mark.parametrize("text", ["", "~", "null", "NULL"])
def test_null_in_a_file_asks_for_the_default_and_quoted_is_a_text(text):
    assert parse("data", in_file(text), str | None) is None
    assert parse("data", in_file(f"'{text}'"), str | None) == text
    assert parse("width", in_file(text), int | None) is None


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("On", True), ("TRUE", True), ("no", False), ("off", False)]
)
def test_switches_take_words(text, value):
    assert parse("flip", text, bool | None) is value
    assert parse("flip", in_file(text), bool) is value


@pytest.mark.parametrize("text", ["1", "0", "y", "2", "maybe"])
def test_other_words_are_no_switch(text):
    with pytest.raises(ValueError, match="^flip must be true or false, got "):
        parse("flip", text, bool)


@given(st.text(alphabet=string.punctuation + " \t\nab01", max_size=12))
@settings(max_examples=300)
def test_any_text_is_read_or_refused(text):
    for hint in (
        int,
        float | None,
        bool,
        list[int],
        list[float] | None,
        int | list[int],
        Literal["a", "b"],
        dict[str, Any],
    ):
        try:
            parse("it", text, hint)
        except ValueError as error:
            message = str(error)
        else:
            continue
        assert message.startswith("it must be ")
        assert "\n" not in message


@pytest.mark.parametrize(
    "text", ["[", "]", "{", "}", "*x", "&x", "!!x", "!x y", "%", "|", ">", "`", "@", "a: b", "- 1", "? 1", "#"]
)
def test_a_setting_that_is_no_yaml_is_one_line(text, capsys):
    message = error_of(capsys, "train", "--schedule=step", f"--keep_at={text}", "--print_config")
    assert message.startswith("keep_at must be ")
    for name in ("pixel_mean", "measure_at", "loggers", "width"):
        with pytest.raises(ValueError, match=f"^{name} must be "):
            parse(name, text, RunConfig.model_fields[name].annotation)


@pytest.mark.parametrize("number", ["0x10", "1_000"])
@pytest.mark.parametrize(
    "command",
    [
        "measure --every",
        "distance here --reference",
        "compare --parallel",
        "study markou2024-mnist --parallel",
        "study markou2024-mnist --seeds",
    ],
)
def test_flags_that_are_no_settings_are_decimal_as_well(command, number, capsys):
    *others, flag = command.split()
    assert repr(number) in error_of(capsys, *others, f"{flag}={number}")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_flags_and_files_say_the_same(tmp_path, capsys):
    lines = {
        "epochs": "030",
        "schedule_options": "{step_at: [010,020]}",
        "lr": "1e-3",
        "compile": "off",
        "pixel_mean": "[.5]",
        "schedule": "step",
    }
    file = tmp_path / "mine.yaml"
    file.write_text("\n".join(f"{name}: {text}" for name, text in lines.items()))
    found = shown(capsys, "train", *(f"--{name}={text}" for name, text in lines.items()))
    assert found == shown(capsys, "train", "--config", str(file))
    assert (found["epochs"], found["schedule_options"]["step_at"], found["lr"]) == (30, [10, 20], 0.001)
    assert (found["compile"], found["pixel_mean"]) == (False, [0.5])
    assert shown(capsys, "compare", "--seeds=010,011,")["seeds"] == [10, 11]
    assert shown(capsys, "compare", "--seeds=04")["seeds"] == 4
    assert shown(capsys, "train", "--config", str(file), "--compile")["compile"] is True
    assert shown(capsys, "train", "--compile", "--no-compile")["compile"] is False


def test_settings_that_are_shown_are_settings_again(tmp_path, capsys):
    config = RunConfig(
        recipe="no",
        data="null",
        backbone="010.Net",
        backbone_options={"a": 1, "b": "no", "c": [True, None, "07"]},
        lr=1e-5,
    )
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(config.in_force()))
    read = {
        name: parse(name, value, RunConfig.model_fields[name].annotation)
        for name, value in load_yaml(file.read_text()).items()
    }
    assert RunConfig(**read) == config


@pytest.mark.parametrize("text", ["no", "Yes", "off", "0x10", "1_000", "1:30"])
def test_options_without_a_type_refuse_what_versions_of_yaml_read_differently(text, capsys):
    message = error_of(capsys, "train", "--backbone=some.Net", f"--backbone_options={{a: {text}}}")
    assert message.startswith("backbone_options must be a mapping, got ")
    assert f"instead of {text}, or quote it" in message
    with pytest.raises(ValueError, match="quote it"):
        load_typed_yaml(f"a: [{text}]")
    assert load_typed_yaml(f"a: ['{text}']") == {"a": [text]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs: 3\nepochs: 4\n", "'epochs' occurs twice"),
        ("epochs: !!int 3\n", "tag 'tag:yaml.org,2002:int' is not supported"),
        ("epochs: !!python/name:os.system\n", "is not supported"),
        ("? [a]\n: 3\n", "keys must be text"),
        ("[" * 10**4 + "]" * 10**4, "nested more than 50 deep"),
        ("epochs: 3\n---\nepochs: 4\n", "expected a single document"),
        ("", "a file of settings must consist of lines NAME: VALUE"),
        ("many words, of no meaning " * 1000, "a file of settings must consist of lines NAME: VALUE"),
        ("epochs: 3\n\x07", "Problems parsing config"),
    ],
)
def test_a_file_of_settings_that_is_damaged_is_one_line(text, expected, tmp_path: Path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    message = error_of(capsys, "train", "--config", str(file))
    assert expected in message
    assert len(message) < 1000


def test_output_flags_in_a_file_have_their_types(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("out: 010\noverwrite: no\nresume: yes\n")
    assert "resume needs the folder of a run, but '010' has none" in error_of(capsys, "train", "--config", "mine.yaml")
    Path("mine.yaml").write_text("overwrite: perhaps\n")
    assert "overwrite must be true or false, got 'perhaps'" in error_of(capsys, "train", "--config", "mine.yaml")
