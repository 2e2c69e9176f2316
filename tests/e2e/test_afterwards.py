"""Checks of what all earlier tests have left: no secret is in an environment, an argument or a log."""

from __future__ import annotations

import json

import pytest
from stack import Stack

ARGUMENTS = "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"


@pytest.fixture
def secrets(stack: Stack) -> dict[str, str]:
    found = {
        "admin token": stack.admin_token(),
        "join token": stack.secret("manager_app", "/var/lib/orion-join/token"),
        "proxy secret": stack.secret("manager_app", "/var/lib/orion-proxy/secret"),
        "ssh key": stack.secret("manager_app", "/var/lib/orion/secrets/ssh_key").splitlines()[3],
    }
    with stack.connect() as orion:
        made = orion.create_token("of-the-last-test")
        orion.revoke_token(made.id)
    found["client token"] = made.token
    for container in stack.containers("worker"):
        identity = json.loads(stack.exec(container.id, "cat", "/var/lib/orion/agent/identity.json").stdout)
        found[f"token of {container.name}"] = identity["worker_token"]
    assert all(len(value) >= 43 for value in found.values())
    return found


def test_no_secret_of_the_platform_is_in_an_environment_an_argument_or_a_log(
    stack: Stack, secrets: dict[str, str]
) -> None:
    said = {"all logs": stack.logs(tail=1_000_000)}
    for container in stack.containers():
        said[f"docker inspect {container.name}"] = stack.docker("inspect", container.id)
        said[f"arguments in {container.name}"] = stack.exec(container.id, "sh", "-c", ARGUMENTS).stdout
    assert "orion-agent: registered" in said["all logs"]
    assert "orion.manager.main" in said[f"arguments in {stack.container('manager_app').name}"]
    found = [(what, where) for what, value in secrets.items() for where, text in said.items() if value in text]
    assert found == []


def test_only_root_can_read_stored_secrets(stack: Stack) -> None:
    for service, path in (
        ("manager_app", "/var/lib/orion/secrets"),
        ("manager_app", "/var/lib/orion-join"),
        ("manager_app", "/var/lib/orion-proxy"),
        ("manager_proxy", "/run/orion-proxy"),
        ("worker", "/run/orion-join"),
        ("worker", "/var/lib/orion/agent"),
    ):
        seen = stack.exec(stack.container(service).id, "stat", "-c", "%U %a", path)
        assert seen.stdout.strip() == "root 700", f"{path} of {service}"


def test_each_service_has_only_the_secrets_that_it_needs(stack: Stack) -> None:
    mounted = {
        container.service: {mount["Name"] for mount in json.loads(stack.docker("inspect", container.id))[0]["Mounts"]}
        for container in stack.containers()
    }
    secret_volumes = {
        service: {name.split("_", 1)[1] for name in volumes} - {"proxy_tls"} for service, volumes in mounted.items()
    }
    assert secret_volumes == {
        "manager_app": {"manager_data", "join_secret", "proxy_secret"},
        "manager_proxy": {"proxy_secret"},
        "worker": {"join_secret"},
    }
