"""The declaration of an order: its checks, its bytes between manager and worker, and that there is only one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from ansible_contract import KEY
from orion_worker.rental.cli import order_from
from orion_worker.system import processes

from orion.manager.ansible.port import Action, Job
from orion.manager.ansible.protocol import BatchOrder, JobMessage, job_message
from orion.manager.ssh.port import Host
from orion.manager.store import rentals
from orion.rental_order import (
    FIRST_UID,
    MAX_START,
    InvalidOrder,
    RentalOrder,
    _number,
    _optional,
    _text,
    declared_fields,
    rule_of,
)
from orion.wire import MAX_START as MAX_START_OF_A_RENT

ROOT = Path(__file__).parents[2]
PLAYBOOKS = ROOT / "playbooks"
CERTIFICATE = "ssh-ed25519-cert-v01@openssh.com AAAAIHNzaC1lZDI1NTE5LWNlcnQtdjAxQG9wZW5zc2guY29t"
ORDER = RentalOrder(rental_id="abcdefghij", username="r-abcdefghij", uid=100_001, epoch=3)
WHO = '"rental_id": "abcdefghij", "username": "r-abcdefghij", "uid": 100001, "epoch": 3'
EMPTY = '"public_keys": [], "user_authority": "", "host_certificate": ""'
CREATE = replace(
    ORDER, public_keys=(KEY,), start="serve", start_mark="1@boot-0001", rental_name="lab", user_authority=KEY
)
RELEASED = {
    "create": (
        Action.CREATE,
        replace(CREATE, host_certificate=CERTIFICATE),
        f'{{{WHO}, "public_keys": ["{KEY}"], "start": "serve", "start_mark": "1@boot-0001", "rental_name": "lab", '
        f'"user_authority": "{KEY}", "host_certificate": "{CERTIFICATE}", "move": 0, "boot_id": "boot-0001", '
        '"deadline": 1800000000.5}',
    ),
    "create, as little as can be": (
        Action.CREATE,
        replace(ORDER, public_keys=(KEY,)),
        f'{{{WHO}, "public_keys": ["{KEY}"], "user_authority": "", "host_certificate": "", "move": 0, '
        '"boot_id": "boot-0001", "deadline": 1800000000.5}',
    ),
    "freeze": (
        Action.FREEZE,
        replace(ORDER, move=5),
        f'{{{WHO}, {EMPTY}, "move": 5, "boot_id": "boot-0001", "deadline": 1800000000.5}}',
    ),
    "purge": (Action.DELETE, ORDER, f'{{{WHO}, {EMPTY}, "move": 0, "deadline": 1800000000.5}}'),
    "certify": (
        Action.CERTIFY,
        replace(ORDER, host_certificate=CERTIFICATE),
        f'{{{WHO}, "public_keys": [], "user_authority": "", "host_certificate": "{CERTIFICATE}", "move": 0, '
        '"deadline": 1800000000.5}',
    ),
}
"""Orders as managers and workers of released versions send and understand them."""
COMMANDS_OF = {Action.CREATE: "run", Action.FREEZE: "freeze", Action.DELETE: "purge", Action.CERTIFY: "certify"}
each_released = pytest.mark.parametrize(("action", "order", "text"), RELEASED.values(), ids=RELEASED)


@pytest.fixture(scope="module")
def task() -> ModuleType:
    return load(PLAYBOOKS / "action/orion_rental.py")


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{file.parent.name}_orion_rental", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The bytes


@each_released
def test_an_order_has_the_bytes_that_released_workers_understand(action: Action, order: RentalOrder, text: str) -> None:
    job = Job(
        action=action,
        host=Host(worker_id="w-abcdefgh", address="192.0.2.7", host_keys=(KEY,), boot_id="boot-0001"),
        order=order,
    )
    received = JobMessage.model_validate_json(job_message("1", job).model_dump_json())
    sent = BatchOrder(number=1, order=received.order, refused_after=1800000000.5).as_json()
    assert json.dumps(sent) == text


@each_released
def test_a_worker_reads_an_order_of_a_released_manager(
    action: Action, order: RentalOrder, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orion_worker.rental.cli.read_certificate", lambda line: line)
    read = order_from(COMMANDS_OF[action], json.loads(text))
    assert replace(read, boot_id="", deadline=None) == order
    assert json.dumps(read.as_json()) == text


# The checks


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rental_id", "SECRET"),
        ("rental_id", ""),
        ("rental_id", ["SECRET"]),
        ("epoch", "17"),
        ("epoch", True),
        ("epoch", 2**53),
        ("username", "r-SECRET"),
        ("uid", 99_999),
        ("uid", 2**31),
        ("public_keys", KEY),
        ("public_keys", [f"{KEY}\nSECRET"]),
        ("public_keys", [KEY] * 65),
        ("start", "SECRET\n"),
        ("start_mark", "SECRET!"),
        ("rental_name", "SECRET"),
        ("user_authority", "SECRET!"),
        ("host_certificate", "SECRET!"),
        ("kill", "SECRET!"),
        ("move", -17),
        ("boot_id", "SECRET SECRET"),
        ("deadline", float("nan")),
        ("deadline", "SECRET"),
        ("other_field", "SECRET"),
    ],
)
def test_a_wrong_field_is_named_and_its_value_is_not(name: str, value: Any) -> None:
    with pytest.raises(InvalidOrder) as found:
        RentalOrder.from_json(ORDER.as_json() | {name: value})
    assert found.value.field == name
    assert str(found.value).startswith(name)
    assert not [word for word in ("SECRET", KEY, "17") if word in str(found.value)]


@pytest.mark.parametrize("data", [None, [], "text", 5, [["rental_id", "one"]]])
def test_an_order_has_to_be_an_object(data: object) -> None:
    with pytest.raises(ValueError, match="JSON object"):
        RentalOrder.from_json(data)


def test_a_field_that_is_null_is_empty_and_some_are_needed() -> None:
    assert RentalOrder.from_json(ORDER.as_json() | {"boot_id": None, "start": None}) == ORDER
    for name in ("rental_id", "epoch"):
        with pytest.raises(ValueError, match=f"{name} is missing"):
            RentalOrder.from_json(ORDER.as_json() | {name: None})
    with pytest.raises(ValueError, match="start_mark is missing"):
        RentalOrder.from_json(ORDER.as_json() | {"start": "serve"})


@pytest.mark.parametrize(
    ("command", "name"),
    [("run", "public_keys"), ("create", "username"), ("purge", "uid"), ("certify", "host_certificate")],
)
def test_a_command_needs_some_fields(command: str, name: str) -> None:
    whole = replace(CREATE, host_certificate=CERTIFICATE).as_json()
    RentalOrder.from_json(whole, command)
    del whole[name]
    RentalOrder.from_json(whole, "thaw")
    with pytest.raises(ValueError, match=name):
        RentalOrder.from_json(whole, command)


def test_bounds_that_are_also_elsewhere_are_equal() -> None:
    assert FIRST_UID == processes.FIRST_UID == rentals.FIRST_UID
    assert MAX_START == MAX_START_OF_A_RENT


# One declaration


def test_the_task_s_arguments_are_the_fields(task: ModuleType) -> None:
    assert {
        name: {"type": rule_of(each).kind, "required": name in {"rental_id", "epoch"}}
        | ({"elements": "str", "no_log": False} if name == "public_keys" else {})
        for name, each in declared_fields().items()
    } == task.RENTAL


def test_the_documentation_has_each_field_with_its_type(task: ModuleType) -> None:
    options = yaml.safe_load(load(PLAYBOOKS / "library/orion_rental.py").DOCUMENTATION)["options"]
    described = options["rentals"]["suboptions"]
    assert {name: (one["type"], one.get("required", False)) for name, one in described.items()} == {
        name: (one["type"], one["required"]) for name, one in task.RENTAL.items()
    }
    assert {*options["command"]["choices"]} == {*task.ARGUMENTS["command"]["choices"]}
    assert all(one["description"] for one in described.values())


@dataclass(frozen=True, kw_only=True)
class LargerOrder(RentalOrder):
    colour: str = _optional("", _text(r"[a-z]+", "be a colour", used_by=("run",)))
    size: int = _optional(0, _number(1, 10, required_by=("run",)))


def test_a_new_field_is_declared_in_one_place() -> None:
    assert LargerOrder.from_json(ORDER.as_json()).as_json() == ORDER.as_json(), "a worker that does not know the field"
    larger = LargerOrder.from_json(CREATE.as_json() | {"colour": "red", "size": 5}, "run")
    assert larger.as_json() == CREATE.as_json() | {"colour": "red", "size": 5}
    for wrong, name in (({"colour": "RED", "size": 5}, "colour"), ({"colour": "red"}, "size")):
        with pytest.raises(ValueError, match=f"{name} must"):
            LargerOrder.from_json(CREATE.as_json() | wrong, "run")
    with pytest.raises(ValueError, match="colour is not a field"):
        RentalOrder.from_json(larger.as_json())


# The worker's image

FROZEN = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from orion_worker.rental.cli import answer_request
from orion_worker.rental.commands import Rentals, WorkerPaths
answer = answer_request("freeze", sys.stdin.read(), Rentals(WorkerPaths(Path(sys.argv[2]))), 0)
print(json.dumps([*answer, sorted(name for name in sys.modules if name.split(".")[0] in {"orion", "pydantic"})]))
"""


def test_the_standard_library_of_the_worker_s_image_is_enough_for_an_order(tmp_path: Path) -> None:
    library, root = tmp_path / "usr/local/lib/orion", tmp_path / "root"
    for line in (ROOT / "worker/Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "/usr/local/lib/orion" in line:
            *sources, target = line.split()[1:]
            into = tmp_path / target.lstrip("/")
            for source in map(ROOT.joinpath, sources):
                if source.is_dir():
                    shutil.copytree(source, into, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    into.mkdir(parents=True, exist_ok=True)
                    shutil.copy(source, into)
    assert sorted(file.name for file in (library / "orion").iterdir()) == ["__init__.py", "rental_order.py"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", FROZEN, library, root],
        input=RELEASED["freeze"][2].replace("1800000000.5", "1"),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    status, report, loaded = json.loads(done.stdout)
    assert (status, report["state"], loaded) == (0, "absent", ["orion", "orion.rental_order"])


# Playbooks that are run by hand

WHO_BY_HAND = {"rental_id": "abcdefghij", "username": "r-abcdefghij", "uid": 100_001, "epoch": 3}
BY_HAND = {
    "create_user": ("run", WHO_BY_HAND | {"public_keys": [KEY], "boot_id": "boot-0001", "rental_name": "lab"}),
    "freeze": ("freeze", {"rental_id": "abcdefghij", "epoch": 3, "move": 5, "boot_id": "boot-0001"}),
    "delete_user": ("purge", WHO_BY_HAND),
    "certify_host": ("certify", {"rental_id": "abcdefghij", "epoch": 3, "host_certificate": CERTIFICATE}),
}


def played(folder: Path, playbook: str, variables: dict[str, Any]) -> tuple[str, str, str]:
    """Run a playbook on this machine; return the command and the input of orion-rental, and Ansible's output."""
    shutil.copytree(PLAYBOOKS, folder / "playbooks", dirs_exist_ok=True)
    (folder / "said").unlink(missing_ok=True)
    program, action = folder / "orion-rental", folder / "playbooks/action/orion_rental.py"
    program.write_text(
        f'#!/bin/sh\n{{ echo "$1"; cat; }} >{folder}/said\necho \'{{"rentals": [{{"changed": true}}]}}\'\n'
    )
    program.chmod(0o755)
    action.write_text(action.read_text().replace('"/usr/local/sbin/orion-rental"', f'"{program}"'))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ansible", "playbook", "-i", "w-abcdefgh,", "-c", "local", f"{playbook}.yml"),
            *("-e", json.dumps({"target": "all", "ansible_python_interpreter": sys.executable} | variables)),
        ],
        cwd=folder / "playbooks",
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT / "src"),
            "ANSIBLE_CONFIG": str(folder / "playbooks/ansible.cfg"),
            "ANSIBLE_ACTION_PLUGINS": str(action.parent),
            "ANSIBLE_LIBRARY": str(folder / "playbooks/library"),
            "ANSIBLE_HOME": str(folder / "home"),
            "LC_ALL": "C.UTF-8",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    said = folder / "said"
    command, _, order = said.read_text().partition("\n") if said.exists() else ("", "", "")
    return command, order, done.stdout + done.stderr


@pytest.mark.parametrize("playbook", BY_HAND)
def test_a_playbook_by_hand_passes_the_fields_that_its_command_uses(playbook: str, tmp_path: Path) -> None:
    expected, variables = BY_HAND[playbook]
    command, order, output = played(tmp_path, playbook, variables | {"kill": True, "unknown": "x"})
    assert command == expected, output
    assert json.loads(order)["rentals"] == [variables]


def test_a_playbook_by_hand_takes_a_list_and_says_which_field_is_missing(tmp_path: Path) -> None:
    several = [{"rental_id": "abcdefghij", "epoch": 3}]
    assert played(tmp_path, "freeze", {"rentals": several, "rental_id": "other"})[:2] == (
        "freeze",
        json.dumps({"rentals": several}),
    )
    command, _, output = played(tmp_path, "freeze", {"epoch": 3})
    assert (command, "rental_id" in output) == ("", True)
