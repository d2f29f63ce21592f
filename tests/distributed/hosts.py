"""Hosts of their own on this machine: network, host name and /etc/hosts in namespaces, joined by a cable.

They share files and nothing of the network, 127.0.0.1 neither. No root is needed, and nothing is left behind: a
namespace ends with the last process in it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Host:
    """A host; `anchor` is the process that its namespaces live by, and ends when its stdin does."""

    name: str
    address: str
    anchor: subprocess.Popen

    @property
    def inside(self) -> list[str]:
        """What to put before a command to run it there."""
        namespaces = ("--user", "--net", "--uts", "--mount", "--preserve-credentials", "--wd=.")
        return ["nsenter", "--target", str(self.anchor.pid), *namespaces]

    def processes(self) -> list[int]:
        """What runs there, the anchor too."""

        def network(pid: int | str) -> str | None:
            try:
                return os.readlink(f"/proc/{pid}/ns/net")
            except OSError:  # has ended, or is another user's
                return None

        here = network(self.anchor.pid)
        if here in (None, network("self")):
            return []
        return [int(process.name) for process in Path("/proc").glob("[0-9]*") if network(process.name) == here]

    def do(self, *command: str) -> str:
        return subprocess.run([*self.inside, *command], check=True, capture_output=True, text=True).stdout

    def start(self, *command: str | Path, cwd: Path, **variables: str) -> subprocess.Popen:
        """Start a command there, with stdout and stderr in one pipe."""
        others = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GLOO_SOCKET_IFNAME", "WANDB_API_KEY")
        environment = {name: value for name, value in os.environ.items() if name not in others}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # as in an activated environment
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **variables}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen([*self.inside, *map(str, command)], cwd=cwd, env=environment, text=True, **pipes)

    def train(self, *arguments: str, cwd: Path, end_point: str) -> subprocess.Popen:
        """Start the two ranks of this host under torchrun."""
        return self.start(
            *("torchrun", "--nnodes", "2", "--nproc-per-node", "2"),
            *("--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", end_point),
            *(REPOSITORY / "scripts/diffusion/train.py", *arguments),
            cwd=cwd,
        )


def two_hosts(folder: Path) -> list[Host]:
    """host1 at 10.77.0.1 and host2 at 10.77.0.2; skips the test where namespaces can't be made.

    Each maps its own name to 127.0.1.1, as Debian's installer does: the trap for what looks up its own address so.
    """
    if sys.platform != "linux":
        pytest.skip("network namespaces are Linux's")
    first = _anchor(["unshare", "--user", "--map-root-user"])
    made = [Host("host1", "10.77.0.1", first)]
    made.append(Host("host2", "10.77.0.2", _anchor([*made[0].inside, "unshare"])))
    no_server = folder / "resolv.conf"
    no_server.write_text("nameserver 127.0.0.1\n")  # refuses at once, where the real one would be waited for
    try:
        made[0].do("ip", "link", "add", "eth0", "type", "veth", "peer", "eth0", "netns", str(made[1].anchor.pid))
        for host, other in (made, made[::-1]):
            table = folder / f"{host.name}.hosts"
            table.write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n{other.address} {other.name}\n")
            host.do("mount", "--bind", str(table), "/etc/hosts")
            host.do("mount", "--bind", str(no_server), "/etc/resolv.conf")
            host.do("hostname", host.name)
            host.do("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                host.do("ip", "link", "set", device, "up")
        for host in made:  # the kernel notices within a second that the other end is plugged in
            host.do("sh", "-c", "until ip link show eth0 | grep -q 'state UP'; do sleep 0.05; done")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        end(made)
        pytest.skip(f"two network namespaces can't be made here: {getattr(error, 'stderr', None) or error}")
    return made


def end(hosts: list[Host]) -> None:
    """End the hosts, and what still runs on them."""
    for host in hosts:
        for pid in host.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        host.anchor.wait(60)


def _anchor(command: list[str]) -> subprocess.Popen:
    """A process in namespaces of its own, once it is there."""
    try:
        anchor = subprocess.Popen(
            [*command, "--net", "--uts", "--mount", "sh", "-c", "echo there; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    except FileNotFoundError as error:
        pytest.skip(f"namespaces can't be made here: {error}")
    if anchor.stdout.readline() != b"there\n":
        pytest.skip(f"namespaces can't be made here: {' '.join(command)} failed")
    return anchor
