"""`make demo`: rent, kill the worker and follow the takeover on the running platform, and print the time of each step.

FAST=1 runs all clocks at a tenth. The demo rents under a name of its own, kills one worker container, and restores
everything at the end, also after Ctrl-C or a failure.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, TypeVar

try:
    from orion.cli.output import plain
    from orion.client.sdk import ENDED, Orion
    from orion.errors import OrionError
    from orion.wire import Event, Rental, RentalState, Worker, WorkerHealth
except ImportError:
    sys.exit("demo: the package orion is not installed for this Python: run it with make demo, after make up")

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = str(ROOT / "scripts" / "compose.sh")
TOKEN_FILE = "/var/lib/orion/secrets/admin_token"  # noqa: S105 - the path of the token, not the token
FAST_SCALE = 0.1
TAKEOVER_S = 90
"""Seconds of a takeover with the default clocks. The demo waits three times as long."""
SNAPSHOT_WITHIN_S = 75
"""Seconds until a snapshot must be complete: twice the interval, and a reserve for a busy machine."""

Found = TypeVar("Found")


class DemoFailed(Exception):
    """A step of the demo failed. The message says what was observed."""


@dataclass
class DemoReport:
    """Prints the steps of the demo, and keeps the measured times for the summary."""

    began: float = field(default_factory=time.monotonic)
    figures: list[tuple[str, float]] = field(default_factory=list)
    not_undone: list[str] = field(default_factory=list)
    """The changes that could not be undone."""

    def heading(self, text: str) -> None:
        print(f"\n{time.monotonic() - self.began:6.1f} s  {text}", flush=True)  # noqa: T201 - the demo prints its steps

    def line(self, text: str) -> None:
        for line in text.rstrip().splitlines():
            print(f"          {plain(line)}", flush=True)  # noqa: T201

    def command(self, *words: str) -> None:
        self.line(f"$ {shlex.join(words)}")

    def measurement(self, what: str, seconds: float) -> None:
        self.figures.append((what, seconds))
        self.line(f"-> {what}: {seconds:.2f} s")

    def summary(self) -> None:
        self.heading("Measured")
        width = max(len(what) for what, _ in self.figures)
        for what, seconds in self.figures:
            self.line(f"{what:<{width}}  {seconds:7.2f} s")


class DemoPlatform:
    """The containers of the platform, through the same Compose project as `make up`."""

    def __init__(self) -> None:
        self.app = self.compose("ps", "-q", "manager_app").strip()
        if not self.app:
            raise DemoFailed("the platform does not run: make up starts it")
        self.project = self.label(self.app, "com.docker.compose.project")

    def compose(self, *arguments: str, **environment: str) -> str:
        return run([COMPOSE, *arguments], environment=environment)

    def docker(self, *arguments: str) -> str:
        return run([*docker_command(), *arguments])

    def token(self) -> str:
        return self.compose("exec", "-T", "manager_app", "cat", TOKEN_FILE).strip()

    def url(self) -> str:
        published = self.compose("port", "manager_proxy", "80").strip().splitlines()
        if not published:
            raise DemoFailed("the proxy does not run: make up starts it")
        return f"http://localhost:{published[0].rpartition(':')[2]}"

    def label(self, container: str, name: str) -> str:
        return self.docker("inspect", "--format", f'{{{{index .Config.Labels "{name}"}}}}', container).strip()

    def workers(self) -> list[str]:
        """Return the ids of the workers' containers, running or not."""
        project = ["--filter", f"label=com.docker.compose.project={self.project}"]
        service = ["--filter", "label=com.docker.compose.service=worker"]
        return self.docker("ps", "-aq", "--no-trunc", *project, *service).split()

    def container_of(self, worker: Worker) -> str:
        """Return the id of a worker's container, which begins with the worker's hostname."""
        found = [one for one in self.workers() if one.startswith(worker.hostname)]
        if len(found) != 1:
            raise DemoFailed(f"{self.project} has no container with the hostname {worker.hostname}")
        return found[0]

    def settings(self) -> dict[str, str]:
        """Return the ORION_* settings of the running manager, so that a restart changes nothing else."""
        container = self.compose("ps", "-q", "manager_app").strip()
        environment = json.loads(self.docker("inspect", "--format", "{{json .Config.Env}}", container))
        pairs = (one.split("=", 1) for one in environment if one.startswith("ORION_") and "=" in one)
        return {name: value for name, value in pairs if name not in {"ORION_URL", "ORION_TOKEN_FILE"}}

    def restart_manager(self, settings: dict[str, str]) -> None:
        self.compose("up", "-d", "--no-deps", "--no-build", "manager_app", **settings)


@dataclass
class Demo:
    report: DemoReport
    platform: DemoPlatform
    orion: Orion
    environment: dict[str, str]
    cleanup: ExitStack
    scale: float = 1.0

    def run_all(self, fast: bool) -> None:
        self.check_platform(fast)
        if fast:
            self.use_fast_clocks()
        rental = self.rent()
        self.log_in(rental, "log in and do something")
        self.await_snapshot(rental, datetime.now(UTC))
        worker = self.orion.worker(str(rental.worker_id))
        container = self.kill(worker)
        rental = self.follow_takeover(rental)
        self.log_in(rental, "log in again")
        self.release(rental)
        self.restart_worker(worker, container, rental)

    def check_platform(self, fast: bool) -> None:
        self.report.heading(f"The platform is at {self.orion.url}")
        self.show_command("workers")
        ready = [one for one in self.orion.workers() if one.health is WorkerHealth.READY]
        if sum(one.slots_free > 0 for one in ready) < 2:
            # The number is never smaller than the present one, because that would take a slot away from a rental.
            more = len(self.platform.workers()) + 2 - sum(one.slots_free > 0 for one in ready)
            raise DemoFailed(
                f"the demo needs two workers with a free slot: run WORKERS={more} make up, or release a rental"
            )
        if fast and any(True for _ in self.orion.rentals()):
            raise DemoFailed(
                "FAST=1 restarts the manager with other clocks, and there are rentals: run make demo without FAST"
            )

    def use_fast_clocks(self) -> None:
        before = self.platform.settings()
        self.scale = FAST_SCALE
        self.report.heading("FAST=1: restart the manager with all clocks at a tenth")
        self.report.line(f"$ ORION_CLOCK_SCALE={FAST_SCALE} scripts/compose.sh up -d --no-deps --no-build manager_app")
        self.at_end("restore the clocks", lambda: self.restore_clocks(before))
        workers = {one.id for one in self.orion.workers() if one.health is WorkerHealth.READY}
        moment = datetime.now(UTC)
        self.platform.restart_manager(before | {"ORION_CLOCK_SCALE": str(FAST_SCALE)})
        seconds = self.wait("all workers are ready", 90, lambda: self.all_ready_since(workers, moment))[1]
        self.report.measurement("restart of the manager until all workers are ready", seconds)

    def restore_clocks(self, settings: dict[str, str]) -> None:
        self.report.heading("Restore the clocks")
        self.platform.restart_manager(settings)
        self.wait("the manager answers", 60, lambda: self.orion.status() and True)

    def all_ready_since(self, workers: set[str], since: datetime) -> bool:
        """Return whether all these workers are ready, and have sent a heartbeat since that time."""
        recent = (one for one in self.orion.workers() if one.last_heartbeat_at and one.last_heartbeat_at > since)
        return workers <= {one.id for one in recent if one.health is WorkerHealth.READY}

    def rent(self) -> Rental:
        name = f"demo-{secrets.token_hex(3)}"
        self.report.heading("Rent an environment")
        self.at_end("release the rental", lambda: self.release_quietly(name))
        started = time.monotonic()
        self.show_command("rent", "--name", name, "--ttl", "1h")
        self.report.measurement("rent until the renter can log in", time.monotonic() - started)
        return self.orion.find_rental(name)

    def log_in(self, rental: Rental, what: str) -> None:
        self.report.heading(f"{what.capitalize()}, with this machine's ssh")
        started = time.monotonic()
        work = 'echo "I am $(id -un) on $(hostname)"; echo hello >> notes; wc -l notes'
        self.show_command("ssh", rental.name, work)
        self.report.measurement(what, time.monotonic() - started)

    def await_snapshot(self, rental: Rental, since: datetime) -> None:
        """Wait for a snapshot: files that are written after the last snapshot would be lost."""
        self.report.heading("Wait for a snapshot of the home, which is made every 30 s")
        started = time.monotonic()
        while time.monotonic() - started < SNAPSHOT_WITHIN_S:
            copied_at = self.orion.rental(rental.id).last_safe_copy_at
            if copied_at is not None and copied_at >= since:
                self.report.measurement("log in until a snapshot has the files", time.monotonic() - started)
                return
            time.sleep(0.2)
        raise DemoFailed(f"no snapshot was made within {SNAPSHOT_WITHIN_S} s: orion show {rental.name} shows why")

    def kill(self, worker: Worker) -> str:
        container = self.platform.container_of(worker)
        self.report.heading(f"Kill the worker {worker.id}")
        self.report.command("docker", "kill", container[:12])
        self.at_end("start the worker again", lambda: self.start_quietly(container))
        self.last_event = last_event(self.orion)
        self.platform.docker("kill", container)
        self.killed_at = time.monotonic()
        return container

    def follow_takeover(self, before: Rental) -> Rental:
        within_s = 3 * TAKEOVER_S * self.scale + 30
        self.report.line("$ orion events -f")
        for event in self.orion.follow_events(after=self.last_event, for_s=within_s):
            seconds = time.monotonic() - self.killed_at
            if event.rental_id == before.id or event.worker_id == before.worker_id:
                self.report.line(f"+{seconds:5.1f} s  {describe(event)}")
            if event.rental_id == before.id:
                now = self.orion.rental(before.id)
                if now.state is RentalState.ACTIVE and now.epoch > before.epoch:
                    self.report.measurement("kill until the rental is active on another worker", seconds)
                    return now
        now = self.orion.rental(before.id)
        state = f"it is {now.state.value}, {now.explanation}"
        raise DemoFailed(f"{before.name} was not taken over within {within_s:.0f} s: {state}")

    def release(self, rental: Rental) -> None:
        self.report.heading("Release the rental")
        started = time.monotonic()
        self.show_command("release", rental.name, "--yes")
        self.report.measurement("release until nothing of the rental runs", time.monotonic() - started)

    def restart_worker(self, worker: Worker, container: str, rental: Rental) -> None:
        self.report.heading("Start the dead worker again: it is cleaned before it is ready")
        self.report.command("docker", "start", container[:12])
        moment, after = datetime.now(UTC), last_event(self.orion)
        self.platform.docker("start", container)
        seconds = self.wait(f"{worker.id} is ready", 90, lambda: self.all_ready_since({worker.id}, moment))[1]
        for event in self.orion.events(after=after, worker_id=worker.id):
            self.report.line(f"          {describe(event)}")
        self.report.measurement("start until the worker is clean and ready", seconds)
        self.check_residue(container, rental.username)

    def check_residue(self, container: str, username: str) -> None:
        look = f"getent passwd {username}; ls -d /home/{username} /etc/orion/keys/{username} 2>/dev/null; true"
        self.report.command("docker", "exec", container[:12], "sh", "-c", look)
        left = self.platform.docker("exec", container, "sh", "-c", look).strip()
        if left:
            raise DemoFailed(f"the rental has left residue on the worker: {left}")
        self.report.line("(no residue: no account, no home, no key)")

    def show_command(self, *arguments: str) -> None:
        """Print and run `orion ARGUMENTS`, and print its output."""
        self.report.command("orion", *arguments)
        command = [sys.executable, "-P", "-m", "orion.cli", *arguments]
        self.report.line(run(command, environment=self.environment, within_s=120, show_errors=True))

    def wait(self, what: str, within_s: float, probe: Callable[[], Found]) -> tuple[Found, float]:
        """Return the probe's first true answer and the seconds until then. Errors of the API meanwhile are ignored."""
        started, last = time.monotonic(), ""
        while time.monotonic() - started < within_s:
            try:
                if found := probe():
                    return found, time.monotonic() - started
            except OrionError as error:
                last = f"; {error}"
            time.sleep(0.25)
        raise DemoFailed(f"not within {within_s:.0f} s: {what}{last}")

    def at_end(self, what: str, action: Callable[[], None]) -> None:
        """Run an action at the end, whatever happens. Its failure is printed, and the other actions still run."""

        def guarded() -> None:
            try:
                action()
            except (DemoFailed, OrionError) as error:
                self.report.line(f"could not {what}: {error}")
                self.report.not_undone.append(what)

        self.cleanup.callback(guarded)

    def release_quietly(self, name: str) -> None:
        for rental in self.orion.rentals(name=name):
            if rental.state not in ENDED:
                self.report.heading(f"Release {name}")
                self.orion.release(rental.id, wait_s=20)

    def start_quietly(self, container: str) -> None:
        running = self.platform.docker("inspect", "--format", "{{.State.Running}}", container).strip()
        if running != "true":
            self.report.heading("Start the worker again")
            self.platform.docker("start", container)


def describe(event: Event) -> str:
    return f"{event.kind}: {event.reason}"


def last_event(orion: Orion) -> int:
    newest = deque(orion.events(limit=500), maxlen=1)
    return newest[0].id if newest else 0


def docker_command() -> list[str]:
    """Return the command docker, with sudo if this user may not use the engine's socket."""
    socket = Path("/var/run/docker.sock")
    direct = os.geteuid() == 0 or os.access(socket, os.W_OK) or "DOCKER_HOST" in os.environ
    return ["docker"] if direct else ["sudo", "docker"]


def run(
    command: list[str], *, environment: dict[str, str] | None = None, within_s: float = 90, show_errors: bool = False
) -> str:
    """Return the command's output. Raise DemoFailed with its error output if it fails."""
    try:
        done = subprocess.run(
            command, env=os.environ | (environment or {}), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if show_errors else subprocess.PIPE, text=True, timeout=within_s, check=True,
            # Docker's client handles Ctrl-C even where the signal is ignored, so it gets no signal during the clean-up.
            process_group=0 if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else None,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or "").strip()
        raise DemoFailed(f"{shlex.join(command[-4:])} ended with {error.returncode}: {said}") from error
    except subprocess.TimeoutExpired as error:
        raise DemoFailed(f"{shlex.join(command[-4:])} did not end within {within_s:.0f} s") from error
    except OSError as error:
        raise DemoFailed(f"{command[0]} cannot be run: {error.strerror}") from error
    return done.stdout


def main() -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    report = DemoReport()
    with ExitStack() as cleanup:
        status = act(report, cleanup)
        # From here on no signal interrupts the clean-up.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if report.not_undone:
        report.heading(f"NOT DONE: {', '.join(report.not_undone)}")
        return status or 1
    if status:
        report.heading("Everything was restored.")
        return status
    report.summary()
    report.line(f"\nAll steps succeeded, in {time.monotonic() - report.began:.0f} s.")
    return 0


def act(report: DemoReport, cleanup: ExitStack) -> int:
    try:
        prepare(report, cleanup).run_all(os.environ.get("FAST", "") not in {"", "0"})
    except (DemoFailed, OrionError) as error:
        report.heading(f"FAILED: {error}")
        return 1
    except KeyboardInterrupt:
        report.heading("Interrupted")
        return 130
    return 0


def prepare(report: DemoReport, cleanup: ExitStack) -> Demo:
    """Return the demo, with a login in a temporary folder, so that the user's own login is not changed."""
    folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="orion-demo-"))
    platform = DemoPlatform()
    token, url = platform.token(), platform.url()
    token_file = Path(folder) / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(token)
    environment = {"ORION_URL": url, "ORION_TOKEN_FILE": str(token_file), "XDG_CONFIG_HOME": folder}
    orion = cleanup.enter_context(Orion.at(url, token))
    return Demo(report, platform, orion, environment, cleanup)


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
