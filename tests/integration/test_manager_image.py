"""The manager's image as compose runs it: read-only, with the least capabilities, and with walls between its uids."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from support.patience import PATIENCE_S
from worker_support import CHECKOUT, ROOT, docker, wait_until

IMAGE = f"orion-manager-test:{CHECKOUT}"
CAPABILITIES = ("CHOWN", "SETUID", "SETGID", "KILL")
MANAGER, ENGINE = "900:900", "901:901"
SECRETS = (
    "/var/lib/orion/secrets/admin_token",
    "/var/lib/orion/secrets/ssh_key",
    "/var/lib/orion-join/token",
    "/var/lib/orion-proxy/secret",
)
DATABASE = "/var/lib/orion/database/orion.db"
SNAPSHOT_SOCKET = "/run/orion-vault/vault.sock"
FILES, FILES_KEY = "902:902", "/run/orion-vault/ssh/id_ed25519"
RENTAL = "123456:123456"
ENGINE_KEY = "/run/orion/engine/id_ed25519"


@dataclass(frozen=True)
class ManagerContainer:
    name: str

    def run(self, *command: str, user: str = "0:0", check: bool = True) -> str:
        return docker("exec", "--user", user, self.name, *command, check=check)

    def can(self, user: str, test: str, path: str) -> bool:
        return self.run("sh", "-c", f"test {test} {path} && echo yes || echo no", user=user).strip() == "yes"

    def state(self, of: str) -> str:
        return docker("inspect", "--format", f"{{{{.State.{of}}}}}", self.name).strip()

    def wait_healthy(self) -> None:
        wait_until(lambda: self.state("Health.Status") == "healthy", f"{self.name} is healthy", 2 * PATIENCE_S)

    def engine_listens(self) -> bool:
        script = "import socket; socket.socket(socket.AF_UNIX).connect('/run/orion/engine.sock'); print('yes')"
        return self.run("python", "-c", script, user=MANAGER, check=False).strip() == "yes"

    def engine_pids(self) -> set[str]:
        listing = self.run("sh", "-c", "grep -lz 'ansible[.]server' /proc/[0-9]*/cmdline 2>/dev/null; true")
        return {path.split("/")[2] for path in listing.split()}


def build() -> str:
    """Build the image, and return its name."""
    docker("build", "--quiet", "--tag", IMAGE, "--file", f"{ROOT}/manager_app/Dockerfile", str(ROOT), timeout_s=900)
    return IMAGE


@pytest.fixture(scope="module")
def manager() -> Iterator[ManagerContainer]:
    build()
    name = f"orion-managertest-{secrets.token_hex(3)}"
    docker(
        "run", "--detach", "--name", name, "--network", "none", "--read-only", "--init",
        "--tmpfs", "/run:mode=0755,size=16m", "--tmpfs", "/tmp:mode=1777,size=64m", "--cap-drop", "ALL",  # noqa: S108
        *(f"--cap-add={capability}" for capability in CAPABILITIES),
        "--security-opt", "no-new-privileges:true", IMAGE,
    )  # fmt: skip
    container = ManagerContainer(name)
    try:
        container.wait_healthy()
        wait_until(container.engine_listens, "the engine listens")
        yield container
    finally:
        docker("rm", "--force", "--volumes", name, check=False)


@pytest.mark.parametrize("path", SECRETS)
def test_secrets_are_there_and_neither_manager_nor_engine_can_read_them(manager: ManagerContainer, path: str) -> None:
    assert manager.can("0:0", "-s", path)
    for user in (MANAGER, ENGINE):
        assert "Permission denied" in manager.run("sh", "-c", f"cat {path} 2>&1", user=user, check=False)


def test_only_the_manager_can_open_the_database(manager: ManagerContainer) -> None:
    assert manager.can(MANAGER, "-w", DATABASE)
    assert "Permission denied" in manager.run("sh", "-c", f"cat {DATABASE} 2>&1", user=ENGINE, check=False)


def test_only_the_engine_can_read_its_ssh_key(manager: ManagerContainer) -> None:
    assert manager.can(ENGINE, "-r", ENGINE_KEY)
    assert "Permission denied" in manager.run("sh", "-c", f"cat {ENGINE_KEY} 2>&1", user=MANAGER, check=False)


def test_only_the_manager_and_the_engine_can_open_the_engine_s_socket(manager: ManagerContainer) -> None:
    status = manager.run("stat", "--format", "%U %G %a", "/run/orion/engine.sock", user=MANAGER)
    assert status.split() == ["orion-engine", "orion", "660"]
    assert not manager.can("65534:65534", "-e", "/run/orion/engine.sock")


def test_only_the_manager_can_open_the_snapshot_service_s_socket_and_its_ssh_key_is_private(
    manager: ManagerContainer,
) -> None:
    def status() -> list[str]:
        return manager.run("stat", "--format", "%u %g %a", SNAPSHOT_SOCKET, check=False).split()

    wait_until(
        lambda: status() not in ([], ["0", "0", "660"]),
        "the snapshot service listens, and its socket belongs to the manager",
    )
    assert status() == ["0", "900", "660"]
    assert manager.can(FILES, "-r", FILES_KEY)
    for user in (MANAGER, ENGINE, RENTAL):
        assert "Permission denied" in manager.run("sh", "-c", f"cat {FILES_KEY} 2>&1", user=user, check=False)


def test_a_process_with_a_rentals_uid_reaches_nothing_of_the_manager(manager: ManagerContainer) -> None:
    """Use the uid of a process that receives files by rsync: an attacker that controls it must be confined."""
    for test, path in (
        *(("-r", path) for path in (*SECRETS, DATABASE, ENGINE_KEY, "/var/lib/orion/copies")),
        *(("-w", path) for path in ("/var/lib/orion", "/var/lib/orion/copies", "/run", "/opt/orion", SNAPSHOT_SOCKET)),
        ("-e", "/run/orion/engine.sock"),
    ):
        assert not manager.can(RENTAL, test, path), (test, path)


def test_manager_and_engine_have_no_capability_and_cannot_read_each_other_s_environment(
    manager: ManagerContainer,
) -> None:
    for user, other in ((MANAGER, "901"), (ENGINE, "900")):
        script = (
            'for p in /proc/[0-9]*; do grep -q "^Uid:.$(id -u)" $p/status && grep ^CapEff $p/status; '
            f"grep -q '^Uid:.{other}' $p/status && cat $p/environ; done 2>&1; true"
        )
        output = manager.run("sh", "-c", script, user=user)
        assert {line for line in output.splitlines() if line.startswith("CapEff")} == {"CapEff:\t0000000000000000"}
        assert "Permission denied" in output
        assert "ORION_" not in output


def test_no_secret_is_in_an_environment_or_an_argument(manager: ManagerContainer) -> None:
    for user in (MANAGER, ENGINE):
        seen = manager.run("sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null; true", user=user)
        assert "orion.manager" in seen
        assert "orion_admin_admin" not in seen
        assert "PRIVATE KEY" not in seen


def test_a_killed_engine_is_restarted_at_once_and_the_manager_keeps_running(manager: ManagerContainer) -> None:
    before = manager.engine_pids()
    assert before
    # Before the engine starts anew, all processes of its user are killed, those of this test too.
    manager.run("sh", "-c", f"kill -9 {' '.join(before)}", user=ENGINE, check=False)
    wait_until(lambda: manager.engine_pids() - before, "another engine runs")
    wait_until(manager.engine_listens, "it listens")
    assert manager.state("Running") == "true"


def test_a_restart_is_orderly_and_keeps_every_secret(manager: ManagerContainer) -> None:
    before = manager.run("cat", *SECRETS)
    docker("stop", "--time", "60", manager.name)
    assert manager.state("ExitCode") in {"0", "143"}  # it ended by itself, or by the SIGTERM; 137 would be the grace
    docker("start", manager.name)
    manager.wait_healthy()
    assert manager.run("cat", *SECRETS) == before
