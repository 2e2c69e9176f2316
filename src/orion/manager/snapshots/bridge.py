"""What rsync takes for its remote shell: hands the two ends of its connection to the vault, and stays until told to go.

So the rsync that speaks with a worker starts no ssh and can read no key. Usage: bridge.py SOCKET-DESCRIPTOR ...
"""

# What `socket` is made of: that takes three times as long to import as all the rest of this, for each copy and restore.
import _socket
import os
import sys

control = _socket.socket(fileno=int(sys.argv[1]))
ends = b"".join(end.to_bytes(4, sys.byteorder) for end in (0, 1))
control.sendmsg([b"."], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, ends)])
for end in (0, 1):
    os.close(end)
control.recv(1)
