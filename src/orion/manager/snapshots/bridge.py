"""The remote shell of the local rsync. It passes its stdin and stdout to the snapshot service, and waits for the end.

So the rsync that talks to a worker starts no ssh and can read no key. Usage: bridge.py SOCKET-DESCRIPTOR ...
"""

# `socket` itself takes three times as long to import as the rest of this, at each snapshot and restore.
import _socket
import os
import sys

control = _socket.socket(fileno=int(sys.argv[1]))
ends = b"".join(end.to_bytes(4, sys.byteorder) for end in (0, 1))
control.sendmsg([b"."], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, ends)])
for end in (0, 1):
    os.close(end)
control.recv(1)
