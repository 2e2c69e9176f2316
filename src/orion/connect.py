"""Run `orion.ssh_client.connect`: the files of `orion config-ssh` name this module (`python -m orion.connect`)."""

import sys

from orion.ssh_client.connect import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
