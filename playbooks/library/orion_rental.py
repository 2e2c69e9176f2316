#!/usr/bin/python
"""The documentation of the task orion_rental. Its action runs in the manager's container: action/orion_rental.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: orion_rental
short_description: Make, certify, lock, unlock, freeze, thaw or purge rentals on their worker
description:
  - Sends one order to C(orion-rental) on the worker, and returns that program's report.
  - An order may have several rentals of one worker. The worker accepts or refuses each separately, and the task
    fails if it refuses one.
options:
  command:
    description: The command. C(run) is C(create), followed by C(unlock) if this epoch is still the newest.
    type: str
    choices: [run, create, certify, unlock, lock, freeze, thaw, purge]
    required: true
  rentals:
    description:
      - The orders, one for each rental.
      - Without this option there is one order, whose fields are the variables of the same names that the command uses.
    type: list
    elements: dict
    suboptions:
      rental_id:
        description: The id of the rental.
        type: str
        required: true
      epoch:
        description: The placement's epoch. The worker refuses one older than it has seen, and one that it has purged.
        type: int
        required: true
      username:
        description: The name of the account. For run, create and purge.
        type: str
      uid:
        description: The uid and gid of the account. For run, create and purge.
        type: int
      public_keys:
        description: The public keys by which the renter logs in. For run and create.
        type: list
        elements: str
      start:
        description:
          - A command that runs in the renter's shell and home when the account is unlocked. For run.
          - The worker does not run it again with the same I(start_mark).
        type: str
      start_mark:
        description: The run of I(start) and the boot of the worker's container, as C(RUN@BOOT).
        type: str
      rental_name:
        description: The value of the variable ORION_RENTAL in sessions. For run and create.
        type: str
      user_authority:
        description: The authority for log-in certificates, which must name this rental and epoch. For run and create.
        type: str
      host_certificate:
        description: The host certificate for sshd. One that was signed later stays. For run, create and certify.
        type: str
      kill:
        description: Whether the worker also kills the processes of the rental. For lock.
        type: bool
      move:
        description: The number of the planned migration; an order with a lower one cannot thaw. For freeze and thaw.
        type: int
      boot_id:
        description: The boot of the worker's container that the order is for. Another boot refuses. Optional.
        type: str
      deadline:
        description: The Unix time in seconds after which the worker refuses the order.
        type: float
author:
  - Orion-Sec
"""

EXAMPLES = r"""
- name: Lock these rentals and kill their processes
  orion_rental:
    command: lock
    rentals:
      - {rental_id: abcdefghij, epoch: 3, kill: true}
      - {rental_id: klmnopqrst, epoch: 1, kill: true}
"""

RETURN = r"""
rentals:
  description:
    - A report for each rental, in the sequence of the request, with C(error) and C(code) if it was refused.
    - If there is only one rental, the names below are also in the result itself.
  type: list
  returned: always
state:
  description: The state of the rental, C(running) or C(locked).
  type: str
  returned: run, create, unlock and lock
epoch:
  description: The epoch of the rental on the worker.
  type: int
  returned: run, create and unlock
restored:
  description: The snapshot that was restored into the home at this epoch, if any.
  type: str
  returned: run and create
left:
  description: The residue that was found after the purge. If there is any, the task has failed.
  type: list
  returned: purge
looked:
  description: The places that the purge searched.
  type: list
  returned: purge
unsearched:
  description: Directories of other owners that are too deep to be searched.
  type: list
  returned: purge
removed_files:
  description: The number of files, directories and IPC objects that were removed.
  type: int
  returned: purge
killed:
  description: The number of processes that were killed; for freeze, those that resisted it.
  type: int
  returned: purge, lock and freeze
started:
  description: Whether the start command was started. If not, C(start_problem) says why.
  type: bool
  returned: run, if there was a start command to run
code:
  description: The reason of a refusal, as a stable code.
  type: str
  returned: failure
"""
