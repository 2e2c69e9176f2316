#!/usr/bin/python3 -ES
"""`orion-rental` as sshd starts it: hand a transfer of files to the RPC server, which has everything loaded already.

The shim sends its standard input, output and error to the RPC server of this worker (rpc/server.py), which forks for
the transfer, and waits for the end of that fork. Loading all of orion-rental takes 40 ms of a processor for each
snapshot and restore, and a worker that takes over a hundred rentals may have one processor. Where no RPC server
listens, and for every other command, this process becomes the program itself (rental/cli.py).

The image links /usr/local/sbin/orion-rental to this file, which imports nothing of the package before it must.
"""

# `_socket` and not `socket`, because the import of that takes as long as the rest of the shim.
import _socket
import os
import sys

# These are the same as in rpc/server.py: to import them would cost what the shim saves. A test compares them.
SOCKET_PATH = "/run/orion/transfers"
TRANSFERS = ("send", "salvage", "receive")
TAKEN = b"!"
CONNECT_WITHIN_S = 1.0


def main() -> int:
    """Run one command of orion-rental; return its exit status."""
    if len(sys.argv) == 2 and sys.argv[1] in TRANSFERS:
        os.write(1, b"\n")  # tells the caller that the connection is there: all time from now on is work
        status = hand_over(sys.argv[1])
        if status is not None:
            os._exit(status)  # standard output is closed, so Python's own end could only fail
    # Python begins its search beside this file, which is inside the package; the package is one directory above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # noqa: PTH120 - nothing else is loaded
    from orion_worker.rental import cli  # noqa: PLC0415 - this import is what takes 40 ms

    return cli.main()


def hand_over(command: str, socket_path: str = SOCKET_PATH) -> int | None:
    """Return the exit status of a transfer that the RPC server did. None: no server took it, and nothing was read.

    A transfer that became rsync reports no status, which counts as 0; one that was refused reports its own.
    """
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        connection.settimeout(CONNECT_WITHIN_S)
        connection.connect(socket_path)
        connection.settimeout(None)
        descriptors = b"".join(number.to_bytes(4, sys.byteorder) for number in (0, 1, 2))
        connection.sendmsg([command.encode()], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, descriptors)])
        if connection.recv(len(TAKEN)) != TAKEN:
            return None
    except OSError:
        return None
    for number in (0, 1, 2):
        os.close(number)
    try:
        return (connection.recv(1) or b"\0")[0]
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
