"""Training over two hosts, started in each of the documented ways. What is a host here: hosts.py."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import paramiko
import pytest
from hosts import REPOSITORY, Host, end, two_hosts
from runs import metrics, train

from opensora.checkpoint_folder import list_checkpoints
from opensora.parallel.interface import choose_interface, interface_towards

SHORT = ["--max-steps", "2", "--dtype", "fp32", "--num-workers", "0", "--ckpt-every", "0"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    made = two_hosts(tmp_path_factory.mktemp("hosts"))
    yield made
    end(made)


@pytest.fixture(scope="module")
def home(hosts, tmp_path_factory) -> Path:
    """A user's home with a key, which an SSH server on host2 lets in."""
    home = tmp_path_factory.mktemp("home")
    key = home / "key"
    paramiko.RSAKey.generate(2048).write_private_key_file(str(key))
    (home / ".ssh").mkdir()
    (home / ".ssh/config").write_text(f"Host *\n  IdentityFile {key}\n")
    server = subprocess.Popen(
        [*hosts[1].inside, sys.executable, Path(__file__).with_name("ssh_host.py"), "0.0.0.0", "22", key],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdout.readline() == b"listening\n"
    yield home
    server.stdin.close()
    server.wait(60)


@pytest.fixture(scope="module")
def on_one_rank(one_rank, shapes, tmp_path_factory) -> list[dict]:
    """The metrics of the same updates on one rank of this machine, which accumulates what four ranks share."""
    outputs = tmp_path_factory.mktemp("one")
    more = ["--outputs", str(outputs), "--exp-name", "one", "--accumulation-steps", "4"]
    one_rank(train, shapes.root, shapes.train_arguments(*SHORT, *more))
    return metrics(outputs / "one")


def assert_same_updates(run: Path, expected: list[dict]) -> None:
    for four, one in zip(metrics(run), expected, strict=True):
        assert (four["samples"], four["tokens"]) == (one["samples"], one["tokens"])
        assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert four["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def output(process: subprocess.Popen, seconds: float = 300) -> str:
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.terminate()
        raise


def wait_until(condition: Callable[[], object], *started: subprocess.Popen, seconds: float = 200) -> None:
    until = time.monotonic() + seconds
    while not condition():
        for process in started:
            assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.05)


def ranks_with(text: str) -> dict[int, int]:
    """rank -> process id of what trains with `text` in its command line."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes()
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        rank = [v.removeprefix(b"RANK=") for v in variables if v.startswith(b"RANK=")]
        if rank and text.encode() in words:
            found.setdefault(int(rank[0]), int(folder.name))
    return found


@pytest.mark.slow
def test_torchrun_over_two_hosts_equals_one_rank(hosts, shapes, on_one_rank, tmp_path):
    arguments = shapes.train_arguments(*SHORT, "--outputs", str(tmp_path), "--exp-name", "run")
    started = [host.train(*arguments, cwd=shapes.root, end_point="host1:29400") for host in hosts]
    for process in started:
        out = output(process)
        assert process.returncode == 0, out[-3000:]
    assert_same_updates(tmp_path / "run", on_one_rank)


@pytest.mark.slow
def test_colossalai_run_over_a_hostfile_equals_one_rank(hosts, home, shapes, on_one_rank, tmp_path):
    (tmp_path / "hostfiles").write_text("host1\nhost2\n")
    arguments = shapes.train_arguments(*SHORT, "--outputs", str(tmp_path), "--exp-name", "run")
    bucket = arguments.index("--bucket-config") + 1
    arguments[bucket] = f"'{arguments[bucket]}'".replace("'64px'", '"64px"')  # it is read by one more shell
    process = hosts[0].start(
        *("colossalai", "run", "--hostfile", tmp_path / "hostfiles", "--nproc_per_node", "2"),
        *(REPOSITORY / "scripts/diffusion/train.py", *arguments),
        cwd=shapes.root,
        HOME=str(home),
    )
    out = output(process)
    assert process.returncode == 0, out[-3000:]
    assert "host2: success" in out
    assert_same_updates(tmp_path / "run", on_one_rank)


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_both_hosts(hosts, shapes, tmp_path):
    arguments = shapes.train_arguments("--outputs", str(tmp_path), "--exp-name", "run", "--num-workers", "0")
    started = [host.train(*arguments, cwd=shapes.root, end_point="host1:29401") for host in hosts]
    wait_until((tmp_path / "run/metrics.jsonl").exists, *started)
    os.kill(ranks_with(str(tmp_path))[3], signal.SIGKILL)
    outs = [output(process, 120) for process in started]
    assert all(process.returncode != 0 for process in started)
    assert "Signal 9 (SIGKILL)" in outs[1]
    wait_until(lambda: not ranks_with(str(tmp_path)), seconds=240)


def check_hosts(host: Host, home: Path, folder: Path, *names: str) -> tuple[int, str]:
    (folder / "hostfiles").write_text("\n".join(names) + "\n")
    script = REPOSITORY / "scripts/launch/check_hosts.py"
    process = host.start(
        *(sys.executable, script, "hostfiles", "--timeout", "5"), cwd=folder, HOME=str(home), PYTHONPATH=str(REPOSITORY)
    )
    return process.wait(200), output(process)


def test_check_hosts_says_which_host_is_missing(hosts, home, tmp_path):
    code, out = check_hosts(hosts[0], home, tmp_path, "host1", "host2", "10.77.0.9", "host3")
    assert code == 1
    table, errors = (
        [line for line in out.splitlines() if line.startswith("error: ") is is_error] for is_error in (False, True)
    )
    assert [line.split()[-1] for line in table[-4:]] == ["ok", "ok", "NO", "NO"]
    assert [line.split()[1] for line in errors] == ["10.77.0.9:", "host3:"]
    assert "not reachable by ssh on port 22" in errors[0] and "no address is known" in errors[1]


def test_check_hosts_knows_that_a_folder_is_not_shared(hosts, home, tmp_path):
    hosts[1].do("mount", "-t", "tmpfs", "none", str(tmp_path))  # another file system in the same place
    code, out = check_hosts(hosts[0], home, tmp_path, "host1", "host2")
    hosts[1].do("umount", str(tmp_path))
    assert code == 1 and "host2: " in out and "not the same folder" in out


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["worker-0 slots=8"], "is not one host name"),
        (["a", "b", "a"], "has a twice"),
        ([""], "is empty"),
        (["localhost", "b"], "begins with localhost"),
    ],
)
def test_check_hosts_reads_the_file_as_colossalai_does(tmp_path, names, message):
    (tmp_path / "hostfiles").write_text("\n".join(names))
    command = [sys.executable, REPOSITORY / "scripts/launch/check_hosts.py", tmp_path / "hostfiles"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: hostfile") and message in line


@pytest.fixture
def slurm(hosts, shapes, tmp_path) -> Callable[..., subprocess.Popen]:
    """Starts the batch script for the two hosts, with an srun that starts one task on each, for real."""
    commands = tmp_path / "commands"
    commands.mkdir()
    tasks = "".join(
        f'SLURM_NODEID={node} {" ".join(host.inside)} "$@" & tasks+=($!)\n' for node, host in enumerate(hosts)
    )
    first_failure_ends_all = "wait -n || status=1\n[ $status ] && kill ${tasks[@]}\nwait -n || status=1"
    scripts = {
        "srun": f"while [[ $1 == --* ]]; do shift; done\n{tasks}{first_failure_ends_all}\n",
        "scontrol": f'[ "$1" = show ] && printf "host1\\nhost2\\n" || echo "$@" >> {tmp_path}/scontrol\n',
    }
    for name, script in scripts.items():
        (commands / name).write_text(f"#!/bin/bash\n{script}exit $status\n")
        (commands / name).chmod(0o755)
    job = {"JOB_ID": "77", "JOB_NAME": "job", "JOB_NODELIST": "host[1-2]", "NNODES": "2", "CPUS_ON_NODE": "2"}
    variables = {f"SLURM_{name}": value for name, value in job.items()}
    variables |= {"NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def submit(*arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", REPOSITORY / "scripts/launch/slurm.sbatch", *arguments],
            cwd=shapes.root,
            env=os.environ | variables | {"PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return submit


@pytest.mark.slow
def test_a_slurm_job_saves_before_its_time_is_up_and_goes_on(slurm, shapes, tmp_path):
    shutil.rmtree(shapes.root / "outputs/job", ignore_errors=True)
    link = shapes.root / "scripts"
    if not link.exists():
        link.symlink_to(REPOSITORY / "scripts")  # the script is for the repository's root
    arguments = shapes.train_arguments("--num-workers", "0", "--ckpt-every", "0")
    run = shapes.root / "outputs/job"
    job = slurm(*arguments)
    wait_until((run / "metrics.jsonl").exists, job)
    job.send_signal(signal.SIGUSR1)
    out = output(job)
    assert job.returncode == 0, out[-3000:]
    assert (tmp_path / "scontrol").read_text() == "requeue 77\n"
    (saved,) = list_checkpoints(run)
    updates = len(metrics(run))
    again = slurm(*arguments, "--max-steps", str(updates + 1))
    out = output(again)
    assert again.returncode == 0, out[-3000:]
    assert str(saved.relative_to(shapes.root)) in out
    assert [line["step"] for line in metrics(run)] == list(range(1, updates + 2))
    assert (tmp_path / "scontrol").read_text() == "requeue 77\n"


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.2"}, True),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, False),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.2", "GLOO_SOCKET_IFNAME": "x"}, False),
        ({}, False),
    ],
)
def test_only_jobs_over_several_hosts_are_given_an_interface(given, chosen):
    environment = dict(given)
    choose_interface(environment)
    expected = interface_towards("127.0.0.2") if chosen else None
    assert environment == given | ({"GLOO_SOCKET_IFNAME": expected} if expected else {})


@pytest.mark.parametrize("target", ["host1", "host2", "10.77.0.2"])
def test_the_interface_is_the_cable(hosts, target):
    code = f"from opensora.parallel.interface import interface_towards as find; print(find('{target}'))"
    assert [host.do(sys.executable, "-c", code).strip() for host in hosts] == ["eth0", "eth0"]
