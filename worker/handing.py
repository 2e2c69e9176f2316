#!/usr/bin/python3 -ES
"""`orion-rental` as it is called: a transfer of files is handed to the program that is loaded already.

What sshd gave this process goes to the one that answers the manager's orders on this worker (standing.py), which forks
for it; this one only stays until that has ended. To load all of orion-rental takes 40 ms of a processor, for each copy
and each restore, and a worker that takes over a hundred rentals may have just one. Where nothing stands there, and for
every other command, this process is the program itself.
"""

# Without `socket`, whose import takes as long as all the rest of this.
import _socket
import os
import sys

PLACE = "/run/orion/transfers"
TRANSFERS = ("send", "salvage", "receive")
TAKEN = b"!"
CONNECT_WITHIN_S = 1.0


def hand_over(command: str, place: str = PLACE) -> int | None:
    """The exit status of what was handed over, which has ended by now; None: nobody took it, nothing was read.

    It has become rsync, whose status nobody asks for, or it was refused: only that has one.
    """
    with_it = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        with_it.settimeout(CONNECT_WITHIN_S)
        with_it.connect(place)
        with_it.settimeout(None)
        ends = b"".join(end.to_bytes(4, sys.byteorder) for end in (0, 1, 2))
        with_it.sendmsg([command.encode()], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, ends)])
        if with_it.recv(len(TAKEN)) != TAKEN:
            return None
    except OSError:
        return None
    for end in (0, 1, 2):
        os.close(end)
    try:
        said = with_it.recv(1)
    except OSError:
        said = b""
    return said[0] if said else 0


def main() -> int:
    if len(sys.argv) == 2 and sys.argv[1] in TRANSFERS:
        os.write(1, b"\n")  # whoever asked is connected: what takes time from now on is the work itself
        status = hand_over(sys.argv[1])
        if status is not None:
            os._exit(status)  # whatever Python would still write has nowhere to go
    import rental  # noqa: PLC0415 - it is what takes so long

    return rental.main()


if __name__ == "__main__":
    sys.exit(main())
