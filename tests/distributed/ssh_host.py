"""An SSH server for a host that has none: runs one command a session in `sh`, as sshd does. Any key may log in.

python ssh_host.py ADDRESS PORT KEY: prints "listening" when it does, and serves until its stdin ends.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading

import paramiko


class Session(paramiko.ServerInterface):
    """One client's session."""

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return paramiko.AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=run, args=(channel, command.decode()), daemon=True).start()
        return True


def run(channel: paramiko.Channel, command: str) -> None:
    """Run a command with its output on the channel; when that is closed its pipe is too, as with sshd."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    clean = {name: os.environ[name] for name in ("HOME",) if name in os.environ}
    process = subprocess.Popen(["sh", "-c", command], env=clean, start_new_session=True, **pipes)
    try:
        while output := process.stdout.read1(2**15):
            channel.sendall(output)
        channel.send_exit_status(process.wait() % 256)
    except OSError:  # the client is gone
        process.stdout.close()
    channel.close()


def serve(server: socket.socket, key: paramiko.PKey) -> None:
    transports = []
    while True:
        connection, _ = server.accept()
        transport = paramiko.Transport(connection)
        transport.add_server_key(key)
        transport.start_server(event=threading.Event(), server=Session())
        transports.append(transport)


def main(address: str, port: str, key: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = socket.create_server((address, int(port)))
    threading.Thread(target=serve, args=(server, paramiko.RSAKey.from_private_key_file(key)), daemon=True).start()
    print("listening", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
