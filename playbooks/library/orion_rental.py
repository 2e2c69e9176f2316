#!/usr/bin/python
"""The documentation of the task orion_rental. What it does, on the manager's side, is in action/orion_rental.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: orion_rental
short_description: Make, certify, lock, unlock, freeze, thaw or purge rentals on their worker
description:
  - Sends one order to C(orion-rental) on the worker, and returns that program's report.
  - Several rentals of one worker are one order. Each is done, or refused, by itself; the task has failed if one was.
options:
  command:
    description: What to do. C(run) is C(create), and then C(unlock) if this epoch is still the newest.
    type: str
    choices: [run, create, certify, unlock, lock, freeze, thaw, purge]
    required: true
  rentals:
    description: The rentals.
    type: list
    elements: dict
    required: true
    suboptions:
      rental_id:
        description: Which rental.
        type: str
        required: true
      epoch:
        description: Which of its placements; the worker refuses one older than it has seen, and one that it has purged.
        type: int
        required: true
      username:
        description: Its account. For run, create and purge.
        type: str
      uid:
        description: Its uid, which is its gid too. For run, create and purge.
        type: int
      public_keys:
        description: The keys that open it. For run and create.
        type: list
        elements: str
      start:
        description:
          - A command that its shell runs, as the renter in its home, when the renter is let in. For run.
          - It is not run again under the same I(start_mark).
        type: str
      start_mark:
        description: Which run of I(start) it is, and in which life of the worker's container, as C(RUN@BOOT).
        type: str
      rental_name:
        description: The name that its sessions find in the variable ORION_RENTAL. For run and create.
        type: str
      user_authority:
        description: The key whose certificates open it too, when they name it and this epoch. For run and create.
        type: str
      host_certificate:
        description: What sshd shows to renters, unless it has one that was signed later. For run, create and certify.
        type: str
      kill:
        description: Also end its processes. For lock.
        type: bool
      move:
        description: For freeze and thaw, the planned move that it is for. No order of an earlier one thaws it.
        type: int
      boot_id:
        description: The life of the worker's container that it is for; another refuses. Without it, any life does it.
        type: str
      deadline:
        description: Unix time in seconds after which the worker refuses.
        type: float
author:
  - Orion-Sec
"""

EXAMPLES = r"""
- name: Nobody can log in to these rentals any more
  orion_rental:
    command: lock
    rentals:
      - {rental_id: abcdefghij, epoch: 3, kill: true}
      - {rental_id: klmnopqrst, epoch: 1, kill: true}
"""

RETURN = r"""
rentals:
  description:
    - A report for each rental, in the order of the request, with C(error) and C(code) where it was refused.
    - Where there is but one rental, what follows is also in the result itself.
  type: list
  returned: always
state:
  description: Whether the rental is C(running) or C(locked) now.
  type: str
  returned: run, create, unlock and lock
epoch:
  description: The epoch that is here now.
  type: int
  returned: run, create and unlock
restored:
  description: The copy with which its home was filled at this epoch, if it was.
  type: str
  returned: run and create
left:
  description: What of the rental was found after its purge; empty, or the task has failed.
  type: list
  returned: purge
looked:
  description: Where the purge looked.
  type: list
  returned: purge
unsearched:
  description: Directories of others that are too deep to be searched.
  type: list
  returned: purge
removed_files:
  description: Number of files, directories and IPC objects removed.
  type: int
  returned: purge
killed:
  description: Number of processes ended; by a freeze, because they fought it.
  type: int
  returned: purge, lock and freeze
started:
  description: Whether the start command is on its way; C(start_problem) says why not.
  type: bool
  returned: run, where it was to be started now
code:
  description: Why it was refused, as a stable word.
  type: str
  returned: failure
"""
