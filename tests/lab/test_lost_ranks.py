"""Ranks that are stopped or killed, and the resumed run, on one machine and on two hosts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import multiprocessing

from neuralcollapse import cli
from neuralcollapse.cli import main
from neuralcollapse.lab import RunConfig, RunFolder, train_runs
from neuralcollapse.lab.figures import summary
from neuralcollapse.lab.process import LostRank
from neuralcollapse.lab.results.tables import read_table

# No batch norm: its statistics are those of a rank's part.
BACKBONE = """
from torch import nn

class Plain(nn.Sequential):
    def __init__(self, image_shape):
        channels, height, width = image_shape
        super().__init__(nn.Flatten(), nn.Linear(channels * height * width, 16), nn.Tanh(), nn.Linear(16, 16))
"""
SETTINGS = {
    "backbone": "plain_backbone.Plain",
    "train_samples": 203,
    "test_samples": 40,
    "batch_size": 12,
    "augmentation": {"crop_padding": 1},
    "epochs": 3,
    "device": "cpu",
    "checkpoint_minutes": 1e-9,  # after every batch
}
LOST = "neuralcollapse: error: ranks: one rank is lost or cannot be reached: "
SECONDS = 240  # for processes on a busy machine


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working folder of the ranks, which contains the backbone."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "plain_backbone.py").write_text(BACKBONE)
    return folder


def wait_for(true: Callable[[], object]) -> None:
    until = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def arguments(out: Path) -> list[str]:
    if (out / "config.yaml").exists():
        return ["train", "--resume", f"--backbone={SETTINGS['backbone']}", "--devices=2", "--out", str(out)]
    return ["train", *(f"--{name}={value}" for name, value in SETTINGS.items()), "--devices=2", "--out", str(out)]


# Ranks whose start is short: processes that have imported the laboratory, with torchrun's environment.


def rank_of_two(rank: int, port: int, place: Path, arguments: list[str], log: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(place)
    sys.path.insert(0, str(place))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "GROUP_RANK": "0"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    summary.draw_figures = lambda *_: []
    with log.open("w") as sys.stderr:
        sys.exit(main(arguments))


def start(place: Path, out: Path, port: int | None = None, ranks: int = 2) -> list[multiprocessing.Process]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["neuralcollapse.lab.training.runs", "neuralcollapse.lab.figures.summary"])
    port = free_port() if port is None else port
    found = [
        context.Process(target=rank_of_two, args=(rank, port, place, arguments(out), place / f"{out.name}-{rank}.log"))
        for rank in range(ranks)
    ]
    for process in found:
        process.start()
    return found


def end(processes: list[multiprocessing.Process]) -> list[int | None]:
    for process in processes:
        process.join(SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


@pytest.fixture(scope="module")
def unbroken(place: Path) -> RunFolder:
    """The run of two ranks."""
    assert end(start(place, place / "unbroken")) == [0, 0]
    return RunFolder(place / "unbroken")


def assert_same(run: RunFolder, expected: RunFolder) -> None:
    """To the bit: of two ranks the order of sums is one."""
    assert run.read_environment()["finished"] is True
    assert run.measured().keys() == expected.measured().keys()
    weights, others = (torch.load(one.last_checkpoint, weights_only=True)["state_dict"] for one in (run, expected))
    assert all(torch.equal(weights[name], others[name]) for name in others)
    for table in ("metrics", "gradients"):
        assert getattr(run, table).read_bytes() == getattr(expected, table).read_bytes()


def test_two_ranks_end_as_one(place, unbroken, monkeypatch):
    monkeypatch.syspath_prepend(place)
    one = train_runs(RunConfig(**SETTINGS), place / "one", progress=False)
    assert unbroken.measured().keys() == one.measured().keys()
    for table, tolerance in (("training_log", 1e-5), ("metrics", 1e-3)):  # pseudo-inverses magnify differences
        found, expected = (read_table(getattr(run, table)) for run in (unbroken, one))
        columns = expected.select_dtypes("number").columns.drop("seconds", errors="ignore")
        np.testing.assert_allclose(found[columns], expected[columns], rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("lost", [pytest.param(lost, marks=pytest.mark.slow) for lost in (0, 1)])
def test_a_rank_that_is_killed_ends_the_other_and_the_run_goes_on(lost, place, unbroken):
    out = place / f"killed{lost}"
    processes = start(place, out)
    wait_for((out / "checkpoints" / "last.ckpt").exists)
    processes[lost].kill()
    codes = end(processes)
    assert (codes[lost], codes[1 - lost]) == (-signal.SIGKILL, 2)
    message = (place / f"{out.name}-{1 - lost}.log").read_text().strip()
    assert message.split("\n")[-1].startswith(LOST)
    assert "Traceback" not in message
    assert end(start(place, out)) == [0, 0]
    assert_same(RunFolder(out), unbroken)


def test_sigterm_of_one_rank_stops_all_inside_the_epoch(place, unbroken):
    out = place / "terminated"
    processes = start(place, out)
    wait_for((out / "checkpoints" / "last.ckpt").exists)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert end(processes) == [143, 143]
    assert not RunFolder(out).read_environment()["finished"]
    assert end(start(place, out)) == [0, 0]
    assert_same(RunFolder(out), unbroken)


def test_a_port_that_is_taken_is_said(place):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert end(start(place, place / "taken", port, ranks=1)) == [2]
    message = (place / "taken-0.log").read_text().strip()
    assert message == f"neuralcollapse: error: MASTER_PORT must be a free port, but {port} is in use"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("error", "ranks"), [(ValueError("lr must be positive"), {0}), (LostRank("ranks: lost"), {0, 1})]
)
def test_an_error_of_all_ranks_is_printed_once_and_a_lost_rank_by_each_other(error, ranks, rank, monkeypatch, capsys):
    def fail(_: list[str]) -> int:
        raise error

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(cli, "_run", fail)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == (f"neuralcollapse: error: {error}\n" if rank in ranks else "")


# The command itself, as a user starts it. Each start imports everything anew.


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with an address each, joined by a cable."""
    names = [f"nc{os.getpid()}{end}" for end in "ab"]
    cable = f"link add host0 netns {names[0]} type veth peer name host1 netns {names[1]}"
    commands = [f"netns add {names[0]}", f"netns add {names[1]}", cable]
    for number, name in enumerate(names):
        commands += [f"-n {name} addr add 10.77.0.{number + 1}/24 dev host{number}"]
        commands += [f"-n {name} link set {link} up" for link in ("lo", f"host{number}")]
    try:
        for command in commands:
            made = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
            if made.returncode:
                pytest.skip(f"no network namespaces can be made here: {made.stderr.strip()}")
        yield names
    except FileNotFoundError:
        pytest.skip("no network namespaces can be made here: there is no ip command")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


class Launched:
    """The command, by one launcher or by one on each host; what it says is in files."""

    def __init__(self, place: Path, out: Path, commands: list[list[str]]) -> None:
        self.logs = [place / f"{out.name}-{number}.log" for number in range(len(commands))]
        self.processes = []
        for number, command in enumerate(commands):
            more = {"PYTHONPATH": os.pathsep.join([str(place), *filter(None, sys.path)]), "OMP_NUM_THREADS": "1"}
            more |= {"GLOO_SOCKET_IFNAME": f"host{number}"} if len(commands) > 1 else {}
            with self.logs[number].open("w") as log:
                self.processes.append(
                    subprocess.Popen(command, cwd=place, env=os.environ | more, stdout=log, stderr=log)
                )

    def end(self) -> list[int]:
        return [process.wait(SECONDS) for process in self.processes]

    def message(self, number: int = 0) -> str:
        return self.logs[number].read_text()


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "neuralcollapse.cli"]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def assert_whole(out: Path, unbroken: RunFolder) -> None:
    assert_same(RunFolder(out), unbroken)
    assert (out / "summary.md").exists()
    assert len(list((out / "figures").glob("*.png"))) > 3
    assert not list(out.rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_the_command_on_two_ranks_goes_on_when_one_of_them_was_killed(launcher, place, unbroken):
    out = place / launcher
    command = torchrun("--nproc-per-node=2") if launcher == "torchrun" else [sys.executable, "-m", "neuralcollapse.cli"]
    launched = Launched(place, out, [[*command, *arguments(out)]])
    wait_for((out / "checkpoints" / "last.ckpt").exists)
    os.kill(children(launched.processes[0].pid)[-1], signal.SIGKILL)
    code, said = (1, "(SIGKILL)") if launcher == "torchrun" else (2, LOST)  # torchrun stops the other before it knows
    assert launched.end() == [code]
    assert said in launched.message()
    launched = Launched(place, out, [[*command, *arguments(out)]])
    assert launched.end() == [0], launched.message()
    assert launched.message().count("wrote ") == 1
    assert_whole(out, unbroken)


@pytest.mark.slow
def test_two_hosts_go_on_when_one_of_them_was_killed(hosts, place, unbroken):
    out = place / "hosts"

    def launch() -> Launched:
        nodes = [f"--nnodes=2 --nproc-per-node=1 --master-addr=10.77.0.1 --node-rank={rank}" for rank in range(2)]
        return Launched(
            place,
            out,
            [
                ["ip", "netns", "exec", host, *torchrun(*node.split()), *arguments(out), "--devices=1", "--num_nodes=2"]
                for host, node in zip(hosts, nodes, strict=True)
            ],
        )

    launched = launch()
    wait_for((out / "checkpoints" / "last.ckpt").exists)
    there = subprocess.run(["ip", "netns", "pids", hosts[1]], capture_output=True, text=True, check=True)
    for pid in there.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    assert launched.end() == [1, -signal.SIGKILL]
    assert LOST in launched.message()
    launched = launch()
    assert launched.end() == [0, 0], launched.message()
    assert_whole(out, unbroken)
