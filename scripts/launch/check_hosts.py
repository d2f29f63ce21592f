"""See whether the hosts of a hostfile can train together, before `colossalai run` waits for one that can't.

python scripts/launch/check_hosts.py hostfiles

Run it where `colossalai run` will run, in the same folder and environment. A hostfile has one host name or address a
line, the first one is where rank 0 runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fabric

LOCAL = ("localhost", "127.0.0.1", "0.0.0.0")  # colossalai starts these without ssh

# Runs on each host with the arguments (name of the first host, file that the hosts share).
PROBE = """
import json, os, socket, sys
sys.path = [path for path in sys.path if path]  # the installed package is what counts
found = {"python": sys.version.split()[0], "shared": os.path.exists(sys.argv[2])}
try:
    found["first"] = socket.gethostbyname(sys.argv[1])
except OSError as error:
    found["first"] = None
try:
    import torch
    import opensora
    found |= {"torch": torch.__version__, "gpus": torch.cuda.device_count(), "code": opensora.__file__}
except ImportError as error:
    found["missing"] = str(error)
print("found", json.dumps(found))
"""


def read_hosts(path: str) -> list[str]:
    """The names in a hostfile; ValueError for what `colossalai run` would not take for one name."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"hostfile {path} does not exist: one host name or address a line")
    hosts = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    for number, host in enumerate(hosts, start=1):
        if len(host.split()) > 1 or "#" in host:
            raise ValueError(
                f"hostfile {path}: '{host}' is not one host name: no comments, no 'slots=', one name a line"
            )
        if host in hosts[: number - 1]:
            raise ValueError(f"hostfile {path} has {host} twice")
    if not hosts:
        raise ValueError(f"hostfile {path} is empty: one host name or address a line")
    if len(hosts) > 1 and hosts[0] in LOCAL:
        raise ValueError(
            f"hostfile {path} begins with {hosts[0]}, where the others would look for rank 0 on themselves: give the "
            f"name or address that they reach it by, e.g. {socket.gethostname()}"
        )
    return hosts


def is_local(host: str) -> bool:
    """Whether `colossalai run` starts it without ssh; OSError if the name has no address."""
    port = 22
    if host in LOCAL:
        return True
    return socket.getaddrinfo(socket.getfqdn(host), port) == socket.getaddrinfo(socket.gethostname(), port)


def check(host: str, first: str, shared: Path, ssh_port: int | None, timeout: float) -> dict[str, Any]:
    """What is found on a host; `problem` says why it can't take part."""
    kept = [f"{name}={os.environ[name]}" for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ]
    command = shlex.join(["env", *kept, sys.executable, "-c", PROBE, first, str(shared)])
    try:
        local = is_local(host)
    except OSError as error:
        return {"problem": f"no address is known here ({error}); DNS and /etc/hosts count, ~/.ssh/config does not"}
    connection = fabric.Connection(host, port=ssh_port, connect_timeout=timeout)
    try:
        run = connection.local if local else connection.run
        result = run(f"cd {shlex.quote(os.getcwd())} && {command}", hide=True, warn=True, timeout=10 * timeout)
    except Exception as error:  # of sockets, of ssh, of authentication: each library has its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return {"problem": f"not reachable by ssh on port {connection.port} ({reason})"}
    finally:
        connection.close()
    answers = [line for line in result.stdout.splitlines() if line.startswith("found ")]
    if not answers:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        return {"problem": f"{sys.executable} does not run there in {os.getcwd()}: {reason}"}
    found = json.loads(answers[-1].removeprefix("found "))
    return found | {"problem": problem_of(found, host, first)}


def problem_of(found: dict[str, Any], host: str, first: str) -> str | None:
    if "missing" in found:
        return f"{found['missing']}: install the same environment in the same place"
    if not found["shared"]:
        return f"{os.getcwd()} is not the same folder there: put it on storage that all hosts share"
    if found["first"] is None or (host != first and found["first"].startswith("127.")):
        return f"{first}, where rank 0 runs, is {found['first'] or 'unknown'} there: mend its DNS or /etc/hosts"
    return None


def check_all(hosts: list[str], ssh_port: int | None, timeout: float) -> dict[str, dict[str, Any]]:
    """What is found on each host, and what differs from the first."""
    shared = Path.cwd() / f".check_hosts-{uuid.uuid4().hex}"  # a name that no other host has by chance
    shared.touch()
    try:
        with ThreadPoolExecutor(32) as pool:
            found = list(pool.map(lambda host: check(host, hosts[0], shared, ssh_port, timeout), hosts))
    finally:
        shared.unlink()
    for one in found[1:]:
        for what in ("python", "torch", "code"):
            if not (one["problem"] or found[0]["problem"]) and one[what] != found[0][what]:
                one["problem"] = f"{what} is {one[what]}, and {found[0][what]} on {hosts[0]}"
    return dict(zip(hosts, found, strict=True))


def print_table(found: dict[str, dict[str, Any]]) -> None:
    columns = ("python", "torch", "gpus")
    rows = [("host", *columns, "")]
    for host, one in found.items():
        rows.append((host, *(str(one.get(name, "-")) for name in columns), "NO" if one["problem"] else "ok"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hostfile")
    parser.add_argument("--ssh-port", type=int, default=None, help="as for colossalai run")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds to wait for a connection")
    args = parser.parse_args()
    try:
        hosts = read_hosts(args.hostfile)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    found = check_all(hosts, args.ssh_port, args.timeout)
    print_table(found)
    problems = [f"error: {host}: {one['problem']}" for host, one in found.items() if one["problem"]]
    sys.exit("\n".join(problems) or None)


if __name__ == "__main__":
    main()
