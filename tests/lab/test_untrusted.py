"""Run folders, settings and studies that somebody else wrote: nothing in them is executed, followed or given away."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import yaml

from helpers import error_of
from neuralcollapse.cli import main
from neuralcollapse.lab import RunConfig, RunFolder, train_runs
from neuralcollapse.lab.results.files import sole_writer, without_formulas, write_csv, write_whole
from neuralcollapse.lab.results.provenance import command
from neuralcollapse.lab.untrusted import REDACTED, load_yaml, without_secrets

SMALL = {"backbone": "mlp", "width": 12, "depth": 1, "train_samples": 60, "test_samples": 30, "batch_size": 30}
MINE = """
from pathlib import Path
from torch import nn

Path("imported").touch()


class Net(nn.Sequential):
    def __init__(self, neurons=12, token=""):
        super().__init__(nn.Flatten(), nn.Linear(64, neurons), nn.ReLU())


def make():
    Path("called").touch()
    return Net()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    train_runs(RunConfig(**SMALL, epochs=2, keep_at=1, schedule="constant"), folder, progress=False)
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> RunFolder:
    """A run that was received, in the folder of work, beside a module whose import leaves a trace."""
    monkeypatch.chdir(tmp_path)
    Path("trap.py").write_text(MINE)
    return RunFolder(shutil.copytree(trained, tmp_path / "run"))


def rewrite(path: Path, **values: object) -> None:
    """Change a file; a value that is None is removed."""
    content = yaml.safe_load(path.read_text()) | values
    path.write_text(yaml.safe_dump({name: value for name, value in content.items() if value is not None}))


BUILT_IN_ONLY = dict.fromkeys(("width", "depth", "feature_dim"))


def with_class(run: RunFolder, name: str, **options: object) -> None:
    rewrite(run.config, **BUILT_IN_ONLY, backbone=name, backbone_options=options)


@pytest.mark.parametrize("name", ["trap.Net", "trap.make", "os.system", "shutil.rmtree"])
@pytest.mark.parametrize(
    "arguments",
    [
        "measure run",
        "train --resume --epochs 3 --out run",
        "train --config run/config.yaml --out new",
        "compare --config settings.yaml --out new",
        "study mine.yaml --out new",
    ],
)
def test_a_class_that_a_file_names_is_not_imported(name, arguments, run, capsys):
    with_class(run, name, command="touch called")
    settings = {"backbone": name, "backbone_options": {"command": "touch called"}}
    Path("settings.yaml").write_text(yaml.safe_dump(settings))
    claim = {"text": "it learns", "value": {"kind": "last", "of": "accuracy"}, "of": ["a"], "at_least": 0.1}
    scale = {"cost": "a second", "seeds": [0]}
    study = {"title": "t", "source": "s", "figure": "zhu", "runs": {"a": settings}, "claims": [claim], "small": scale}
    Path("mine.yaml").write_text(yaml.safe_dump(study))
    message = error_of(capsys, *arguments.split())
    assert f"backbone {name!r} is a class named in" in message
    assert f"--backbone {name}" in message
    assert not {"imported", "called", "new"} & {path.name for path in Path().iterdir()}


@pytest.mark.parametrize("arguments", ["distance run", "report run --out page.html", "aggregate run --out all.csv"])
def test_what_is_only_read_imports_no_class(arguments, run):
    with_class(run, "trap.Net")
    assert main(arguments.split()) == 0
    assert not Path("imported").exists()


def test_a_class_that_the_command_line_names_is_imported(run, capsys):
    flags = [f"--{name}={value}" for name, value in SMALL.items() if name not in ("backbone", "width", "depth")]
    own = ["train", *flags, "--backbone=trap.Net", "--backbone_options={neurons: 14}", "--epochs=2", "--out=own"]
    assert main([*own, "--keep_at=1", "--measure_at=2", "--schedule=constant"]) == 0
    Path("imported").unlink()
    error_of(capsys, "measure", "own")
    assert main(["measure", "own", "--backbone", "trap.Net"]) == 0
    assert "--backbone trap.Net" in error_of(capsys, "train", "--resume", "--epochs=3", "--out=own")
    assert main(["train", "--resume", "--epochs=3", "--out=own", "--backbone=trap.Net"]) == 0
    assert main(["train", "--config=own/config.yaml", "--backbone", "trap.Net", "--out=again"]) == 0


@pytest.mark.parametrize("name", ["trap.make", "os.system", "os.path", "collections.OrderedDict"])
def test_what_is_no_class_of_a_module_is_not_called(name, run, capsys):
    message = error_of(capsys, "train", "--backbone", name, "--out", "new")
    assert f"must be a class that is a torch.nn.Module, but {name!r} is a" in message
    assert not Path("called").exists()


@pytest.mark.parametrize("name", ["../elsewhere", "a/../../elsewhere", "/tmp", "..", "", 3])
@pytest.mark.parametrize("arguments", ["measure all", "distance all", "report all --out page.html"])
def test_names_of_runs_lead_nowhere_else(name, arguments, run, capsys):
    train_runs([RunConfig(**SMALL, epochs=1, seed=seed) for seed in (0, 1)], "all", progress=False)
    elsewhere = Path(shutil.copytree(run.path, "elsewhere"))
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    rewrite(Path("all/environment.yaml"), runs=["implicit-seed0", name])
    assert "runs must be a list of folder names" in error_of(capsys, *arguments.split())
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before


def test_names_of_runs_are_plain_and_differ(tmp_path):
    for names in (["../a"], ["a/b"], [".lock"], ["run", "RUN"], ["caf\u00e9", "cafe\u0301"]):
        runs = {name: RunConfig(**SMALL, epochs=1, seed=place) for place, name in enumerate(names)}
        with pytest.raises(ValueError, match="runs must"):
            train_runs(runs, tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()


def test_links_are_not_written_through(run):
    mine = Path("thesis.tex")
    mine.write_text("mine")
    temporary = [run.path / f".{name}.{os.getpid()}.partial" for name in ("metrics.csv", "environment.yaml")]
    links = [run.path / ".lock", *temporary, run.summary]
    for link in links:
        link.unlink(missing_ok=True)
        link.symlink_to(mine.absolute())
    with pytest.raises(ValueError, match="is a link"), sole_writer(run.path):
        pass
    (run.path / ".lock").unlink()
    for record in run.measured().values():
        record.unlink()
        record.symlink_to(mine.absolute())
    assert main(["measure", "run"]) == 0
    assert main(["distance", "run"]) == 0
    assert main(["train", "--resume", "--out", "run"]) == 0
    assert mine.read_text() == "mine"
    assert not any(link.is_symlink() for link in (*links, *run.measured().values()))


@pytest.mark.parametrize("linked", ["checkpoints", "moments", "figures", "all of it"])
def test_overwriting_through_a_link_starts_afresh(linked, run):
    place = run.path if linked == "all of it" else run.path / linked
    place.mkdir(exist_ok=True)
    shutil.move(place, "scratch")
    place.symlink_to(Path("scratch").absolute())
    Path("scratch/thesis.tex").write_text("mine")
    new = RunConfig(**SMALL, epochs=1, seed=5, lr=0.2)
    train_runs(new, run.path, overwrite=True, progress=False)
    expected = train_runs(new, "fresh", progress=False)
    assert run.metrics.read_bytes() == expected.metrics.read_bytes()
    assert set(run.measured()) == set(expected.measured())
    assert Path("scratch/thesis.tex").read_text() == "mine"


def bomb(levels: int = 12) -> str:
    further = (f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, levels))
    return "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]", *further])


DAMAGED = {
    "a bomb": bomb(),
    "deep nesting": f"a: {'[' * 100_000}",
    "nesting that ends": f"a: {'[' * 300}{']' * 300}",
    "itself": "a: &a [*a]",
    "a tag": "a: !!python/object/apply:os.system [touch called]",
    "no text": "\udcff",
    "a list": "- 1",
    "numbers for names": "1: 2",
}


@contextmanager
def seconds(most: int) -> Iterator[None]:
    """End what hangs."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"it takes more than {most} seconds"))
    signal.alarm(most)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize("name", ["config.yaml", "environment.yaml"])
def test_damaged_yaml_is_one_line(name, content, run, capsys):
    (run.path / name).write_bytes(DAMAGED[content].encode(errors="surrogateescape"))
    with seconds(60):
        assert name in error_of(capsys, "distance", "run")
    assert not Path("called").exists()


@pytest.mark.parametrize("content", ["a bomb", "deep nesting", "itself"])
def test_damaged_files_of_settings_are_one_line(content, run, capsys):
    Path("mine.yaml").write_text(DAMAGED[content])
    with seconds(60):
        error_of(capsys, "train", "--config", "mine.yaml")
        error_of(capsys, "study", "mine.yaml")


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.yaml", {"method": ["standard"]}),
        ("config.yaml", {"seed": "first"}),
        ("config.yaml", {"backbone": 5}),
        ("config.yaml", {"format": "new"}),
        ("environment.yaml", {"num_classes": "ten"}),
        ("environment.yaml", {"num_classes": 1}),
        ("environment.yaml", {"finished": "yes"}),
        ("environment.yaml", {"data_fingerprint": [1]}),
    ],
)
def test_values_of_other_types_are_one_line(file, values, run, capsys):
    rewrite(run.path / file, **values)
    for arguments in ("train --resume --epochs 3 --out run", "report run --out page.html", "measure run"):
        assert "must be" in error_of(capsys, *arguments.split())


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv", "moments/epoch0002-test.safetensors", ".lock"])
def test_what_is_no_file_is_one_line(name, run, capsys):
    (run.path / name).unlink(missing_ok=True)
    os.mkfifo(run.path / name)
    with seconds(60):
        assert main(["distance", "run"]) in (1, 2)
    assert "regular file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "must be a table"),
        ("epoch,split\n1,train\n", "must have a column 'metric'"),
        ("epoch,split,metric,value\n1,train,accuracy,much\n", "must be a table"),
        ("epoch,split,metric,value\nlast,train,accuracy,1\n", "epochs must be whole numbers"),
    ],
)
def test_damaged_tables_are_one_line(content, expected, run, capsys):
    run.metrics.write_text(content)
    assert expected in error_of(capsys, "aggregate", "run", "--out", "all.csv")


def test_tables_hold_no_formulas(tmp_path):
    cells = ["=1+1", "+cmd", "@sum", "-cmd", "\tx", "-1.5", "-inf", "fixed"]
    table = pd.DataFrame({"=group": cells, "value": range(-4, 4)})
    write_csv(tmp_path / "table.csv", table)
    for line in (tmp_path / "table.csv").read_text().splitlines():
        cell = line.strip('"')
        assert cell[0] not in "=+@\t", line
        assert cell[0] != "-" or cell.startswith(("-1.5", "-inf")), line
    assert without_formulas(table).iloc[-3:, 0].tolist() == cells[-3:]
    assert table.columns[0] == "=group"


def test_a_received_run_puts_no_formula_into_statistics(run):
    rewrite(run.config, method="=HYPERLINK(1)")
    assert main(["aggregate", "run", "--out", "all.csv"]) == 0
    assert {cell[:2] for cell in pd.read_csv("all.csv")["group"]} == {"'="}


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"token": "a"}, True),
        ({"hub-token": "a"}, True),
        ({"API_KEY": "a"}, True),
        ({"apikey": "a"}, True),
        ({"key": "a"}, True),
        ({"password": "a"}, True),
        ({"client_secret": "a"}, True),
        ({"auth": {"user": "a"}}, True),
        ({"headers": ["ghp_0123456789abcdef"]}, True),
        ({"url": "https://me:pass@host/x"}, True),
        ({"num_tokens": 196, "token_dim": 8, "tokenizer": "bert", "author": "me", "keys": 3, "monkey": "a"}, False),
        ({"weights": "imagenet", "url": "https://host/x"}, False),
    ],
)
def test_texts_that_look_like_secrets_are_not_shown(values, shown):
    assert (REDACTED in str(without_secrets({"options": values}))) == shown
    if not shown:
        assert without_secrets(values) == values


@pytest.mark.parametrize(
    "arguments",
    [
        ["--backbone_options", '{"token": "abc123"}'],
        ["--backbone_options={token: abc123}"],
        ["--backbone_options.token", "abc123"],
        ["--backbone_options.token=abc123"],
        ["--backbone_options", "token: abc123"],
        ["--wandb_key=abc123", "--data", "digits"],
    ],
)
def test_a_command_line_is_shown_without_secrets(arguments):
    assert "abc123" not in command(["neuralcollapse", "train", *arguments], Path("run"))


def test_what_is_written_about_a_run_tells_no_secret_and_no_absolute_path(run, tmp_path, monkeypatch):
    out = tmp_path / "home" / "out"
    flags = [f"--{name}={value}" for name, value in SMALL.items() if name not in ("backbone", "width", "depth")]
    arguments = ["--backbone=trap.Net", "--backbone_options={token: verysecret}", "--epochs=1", f"--out={out}"]
    monkeypatch.setattr("sys.argv", ["neuralcollapse", "train", *flags, *arguments])
    assert main(["train", *flags, *arguments]) == 0
    for path in (path for path in out.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert (b"verysecret" in content) == (path.name == "config.yaml"), path
        assert str(tmp_path).encode() not in content, path
    assert RunConfig(**RunFolder(out).settings()).backbone_options == {"token": "verysecret"}


def test_temporary_files_of_a_killed_process_are_deleted(run):
    left = [".metrics.csv.partial", "checkpoints/.last.ckpt.partial", "moments/.epoch0001-train.safetensors.4711"]
    others = [".notes", "notes.partial", "moments/.gitkeep"]
    for name in left + others:
        (run.path / name).write_text("x")
    with sole_writer(run.path):
        pass
    assert not [name for name in left if (run.path / name).exists()]
    assert all((run.path / name).exists() for name in others)


def test_a_folder_that_is_deleted_is_not_written_again(run):
    with sole_writer(run.path):
        write_whole(run.summary, lambda partial: partial.write_text("x"))
        shutil.rmtree(run.path)
        with pytest.raises(OSError, match="was deleted or replaced"):
            write_whole(run.summary, lambda partial: partial.write_text("x"))
        assert not run.path.exists()


def test_yaml_of_settings_is_read(tmp_path):
    assert load_yaml("a: &x [1, 2]\nb: *x\nc: {d: null}") == {"a": [1, 2], "b": [1, 2], "c": {"d": None}}
