#!/usr/bin/python3 -ES
"""`orion-watched`: the program at the worker's end of the manager's liveness connection (rpc/liveness.py).

It hands its standard input and output to the agent and waits until the agent closes the socket. It imports nothing of
the package, because the manager starts it on every worker at once.
"""

import socket
import sys

SOCKET_PATH = "/run/orion/watch"


def main() -> None:
    with socket.socket(socket.AF_UNIX) as agent:
        agent.connect(SOCKET_PATH)
        socket.send_fds(agent, [b"w"], [sys.stdin.fileno(), sys.stdout.fileno()])
        agent.recv(1)


if __name__ == "__main__":
    main()
