"""`make demo`: the whole story against the running platform, told with times. FAST=1: all clocks at a tenth.

It rents under a name of its own, kills one worker container, and puts everything back, also after Ctrl-C or a failure.
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
    from orion.client import ENDED, Orion
    from orion.errors import OrionError
    from orion.wire import Event, Rental, RentalState, Worker, WorkerHealth
except ImportError:
    sys.exit("demo: the package orion is not installed for this Python: run it with make demo, after make up")

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = str(ROOT / "scripts" / "compose.sh")
TOKEN_FILE = "/var/lib/orion/secrets/admin_token"  # noqa: S105 - where it is, not what it is
FAST_SCALE = 0.1
TAKEOVER_S = 90
"""With the default clocks; a takeover is waited for three times as long."""
COPIED_WITHIN_S = 75
"""Twice the interval, and what a busy machine takes besides."""

Found = TypeVar("Found")


class Failed(Exception):
    """A step did not do what it should; the message says what was seen."""


@dataclass
class Story:
    """What is told, and what was measured on the way."""

    began: float = field(default_factory=time.monotonic)
    figures: list[tuple[str, float]] = field(default_factory=list)
    untidy: list[str] = field(default_factory=list)
    """What could not be put back."""

    def chapter(self, text: str) -> None:
        print(f"\n{time.monotonic() - self.began:6.1f} s  {text}", flush=True)  # noqa: T201 - it is there to tell

    def tell(self, text: str) -> None:
        for line in text.rstrip().splitlines():
            print(f"          {plain(line)}", flush=True)  # noqa: T201

    def command(self, *words: str) -> None:
        self.tell(f"$ {shlex.join(words)}")

    def measured(self, what: str, seconds: float) -> None:
        self.figures.append((what, seconds))
        self.tell(f"-> {what}: {seconds:.2f} s")

    def summary(self) -> None:
        self.chapter("Measured")
        width = max(len(what) for what, _ in self.figures)
        for what, seconds in self.figures:
            self.tell(f"{what:<{width}}  {seconds:7.2f} s")


class Platform:
    """The containers of the platform, through the same Compose project as `make up`."""

    def __init__(self) -> None:
        self.app = self.compose("ps", "-q", "manager_app").strip()
        if not self.app:
            raise Failed("the platform is not there: make up")
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
            raise Failed("the proxy publishes no port: make up")
        return f"http://localhost:{published[0].rpartition(':')[2]}"

    def label(self, container: str, name: str) -> str:
        return self.docker("inspect", "--format", f'{{{{index .Config.Labels "{name}"}}}}', container).strip()

    def workers(self) -> list[str]:
        """The ids of the workers' containers, running or not."""
        mine = ["--filter", f"label=com.docker.compose.project={self.project}"]
        every = self.docker("ps", "-aq", "--no-trunc", *mine, "--filter", "label=com.docker.compose.service=worker")
        return every.split()

    def container_of(self, worker: Worker) -> str:
        """A worker's hostname is the beginning of its container's id."""
        found = [one for one in self.workers() if one.startswith(worker.hostname)]
        if len(found) != 1:
            raise Failed(f"no container of {self.project} has the hostname {worker.hostname}")
        return found[0]

    def settings(self) -> dict[str, str]:
        """The ORION_* that the manager was started with, so that restarting it changes nothing else."""
        container = self.compose("ps", "-q", "manager_app").strip()
        environment = json.loads(self.docker("inspect", "--format", "{{json .Config.Env}}", container))
        pairs = (one.split("=", 1) for one in environment if one.startswith("ORION_") and "=" in one)
        return {name: value for name, value in pairs if name not in {"ORION_URL", "ORION_TOKEN_FILE"}}

    def restart_manager(self, settings: dict[str, str]) -> None:
        self.compose("up", "-d", "--no-deps", "--no-build", "manager_app", **settings)


@dataclass
class Demo:
    story: Story
    platform: Platform
    orion: Orion
    environment: dict[str, str]
    afterwards: ExitStack
    scale: float = 1.0

    def play(self, fast: bool) -> None:
        self.look(fast)
        if fast:
            self.speed_up()
        rental = self.rent()
        self.log_in(rental, "log in and do something")
        self.await_copy(rental, datetime.now(UTC))
        worker = self.orion.worker(str(rental.worker_id))
        container = self.kill(worker)
        rental = self.watch_migration(rental)
        self.log_in(rental, "log in again")
        self.release(rental)
        self.bring_back(worker, container, rental)

    def look(self, fast: bool) -> None:
        self.story.chapter(f"The platform is at {self.orion.url}")
        self.show_command("workers")
        ready = [one for one in self.orion.workers() if one.health is WorkerHealth.READY]
        if sum(one.slots_free > 0 for one in ready) < 2:
            # Never fewer than there are: that would take a place away from somebody.
            more = len(self.platform.workers()) + 2 - sum(one.slots_free > 0 for one in ready)
            raise Failed(
                f"a rental can move only where two workers have a free slot: WORKERS={more} make up, or release some"
            )
        if fast and any(True for _ in self.orion.rentals()):
            raise Failed(
                "FAST=1 restarts the manager with other clocks, and others rent here: run make demo without FAST"
            )

    def speed_up(self) -> None:
        before = self.platform.settings()
        self.scale = FAST_SCALE
        self.story.chapter("FAST=1: the manager is started again with all clocks at a tenth")
        self.story.tell(f"$ ORION_CLOCK_SCALE={FAST_SCALE} scripts/compose.sh up -d --no-deps --no-build manager_app")
        self.after("put the clocks back", lambda: self.put_clocks_back(before))
        workers = {one.id for one in self.orion.workers() if one.health is WorkerHealth.READY}
        moment = datetime.now(UTC)
        self.platform.restart_manager(before | {"ORION_CLOCK_SCALE": str(FAST_SCALE)})
        seconds = self.wait("every worker is ready under the new clocks", 90, lambda: self.beating(workers, moment))[1]
        self.story.measured("manager restarted, every worker heard again", seconds)

    def put_clocks_back(self, settings: dict[str, str]) -> None:
        self.story.chapter("The clocks are put back")
        self.platform.restart_manager(settings)
        self.wait("the manager answers", 60, lambda: self.orion.status() and True)

    def beating(self, workers: set[str], since: datetime) -> bool:
        """All of these are ready, and were heard since."""
        heard = (one for one in self.orion.workers() if one.last_heartbeat_at and one.last_heartbeat_at > since)
        return workers <= {one.id for one in heard if one.health is WorkerHealth.READY}

    def rent(self) -> Rental:
        name = f"demo-{secrets.token_hex(3)}"
        self.story.chapter("Rent an environment")
        self.after("release the rental", lambda: self.release_quietly(name))
        started = time.monotonic()
        self.show_command("rent", "--name", name, "--ttl", "1h")
        self.story.measured("rent until it can be entered", time.monotonic() - started)
        return self.orion.find_rental(name)

    def log_in(self, rental: Rental, what: str) -> None:
        self.story.chapter(f"{what.capitalize()}, with the machine's own ssh")
        started = time.monotonic()
        work = 'echo "I am $(id -un) on $(hostname)"; echo hello >> notes; wc -l notes'
        self.show_command("ssh", rental.name, work)
        self.story.measured(what, time.monotonic() - started)

    def await_copy(self, rental: Rental, since: datetime) -> None:
        """What is written after the last copy would be lost."""
        self.story.chapter("Its home is copied, as every 30 s")
        started = time.monotonic()
        while time.monotonic() - started < COPIED_WITHIN_S:
            copied_at = self.orion.rental(rental.id).last_safe_copy_at
            if copied_at is not None and copied_at >= since:
                self.story.measured("log in until its files are copied", time.monotonic() - started)
                return
            time.sleep(0.2)
        raise Failed(f"its files were not copied within {COPIED_WITHIN_S} s: orion show {rental.name} says why")

    def kill(self, worker: Worker) -> str:
        container = self.platform.container_of(worker)
        self.story.chapter(f"The machine of {worker.id} dies")
        self.story.command("docker", "kill", container[:12])
        self.after("start the worker again", lambda: self.start_quietly(container))
        self.last_event = last_event(self.orion)
        self.platform.docker("kill", container)
        self.killed_at = time.monotonic()
        return container

    def watch_migration(self, before: Rental) -> Rental:
        within_s = 3 * TAKEOVER_S * self.scale + 30
        self.story.tell("$ orion events -f")
        for event in self.orion.follow_events(after=self.last_event, for_s=within_s):
            seconds = time.monotonic() - self.killed_at
            if event.rental_id == before.id or event.worker_id == before.worker_id:
                self.story.tell(f"+{seconds:5.1f} s  {told(event)}")
            if event.rental_id == before.id:
                now = self.orion.rental(before.id)
                if now.state is RentalState.ACTIVE and now.epoch > before.epoch:
                    self.story.measured("kill until it is active on another worker", seconds)
                    return now
        now = self.orion.rental(before.id)
        raise Failed(f"{before.name} did not move within {within_s:.0f} s: it is {now.state.value}, {now.explanation}")

    def release(self, rental: Rental) -> None:
        self.story.chapter("Release it")
        started = time.monotonic()
        self.show_command("release", rental.name, "--yes")
        self.story.measured("release until nothing can run any more", time.monotonic() - started)

    def bring_back(self, worker: Worker, container: str, rental: Rental) -> None:
        self.story.chapter("The dead worker comes back, and is cleaned before it is ready")
        self.story.command("docker", "start", container[:12])
        moment, after = datetime.now(UTC), last_event(self.orion)
        self.platform.docker("start", container)
        seconds = self.wait(f"{worker.id} is ready", 90, lambda: self.beating({worker.id}, moment))[1]
        for event in self.orion.events(after=after, worker_id=worker.id):
            self.story.tell(f"          {told(event)}")
        self.story.measured("start until it is clean and ready", seconds)
        self.look_for_leftovers(container, rental.username)

    def look_for_leftovers(self, container: str, username: str) -> None:
        look = f"getent passwd {username}; ls -d /home/{username} /etc/orion/keys/{username} 2>/dev/null; true"
        self.story.command("docker", "exec", container[:12], "sh", "-c", look)
        left = self.platform.docker("exec", container, "sh", "-c", look).strip()
        if left:
            raise Failed(f"something of the rental is left on the worker: {left}")
        self.story.tell("(nothing: no account, no home, no key)")

    def show_command(self, *arguments: str) -> None:
        """Run `orion ARGUMENTS` as a person would, and show both."""
        self.story.command("orion", *arguments)
        command = [sys.executable, "-P", "-m", "orion.cli", *arguments]
        self.story.tell(run(command, environment=self.environment, within_s=120, show_errors=True))

    def wait(self, what: str, within_s: float, probe: Callable[[], Found]) -> tuple[Found, float]:
        """The first true answer of the probe, and the seconds it took. The platform may be away meanwhile."""
        started, last = time.monotonic(), ""
        while time.monotonic() - started < within_s:
            try:
                if found := probe():
                    return found, time.monotonic() - started
            except OrionError as error:
                last = f"; {error}"
            time.sleep(0.25)
        raise Failed(f"after {within_s:.0f} s it is still not so that {what}{last}")

    def after(self, what: str, action: Callable[[], None]) -> None:
        """Do this at the end, whatever happens; a failure of it is told and does not stop the rest."""

        def guarded() -> None:
            try:
                action()
            except (Failed, OrionError) as error:
                self.story.tell(f"could not {what}: {error}")
                self.story.untidy.append(what)

        self.afterwards.callback(guarded)

    def release_quietly(self, name: str) -> None:
        for rental in self.orion.rentals(name=name):
            if rental.state not in ENDED:
                self.story.chapter(f"{name} is released")
                self.orion.release(rental.id, wait_s=20)

    def start_quietly(self, container: str) -> None:
        running = self.platform.docker("inspect", "--format", "{{.State.Running}}", container).strip()
        if running != "true":
            self.story.chapter("The worker is started again")
            self.platform.docker("start", container)


def told(event: Event) -> str:
    return f"{event.kind}: {event.reason}"


def last_event(orion: Orion) -> int:
    newest = deque(orion.events(limit=500), maxlen=1)
    return newest[0].id if newest else 0


def docker_command() -> list[str]:
    """The engine's socket is root's unless the user is in its group."""
    socket = Path("/var/run/docker.sock")
    direct = os.geteuid() == 0 or os.access(socket, os.W_OK) or "DOCKER_HOST" in os.environ
    return ["docker"] if direct else ["sudo", "docker"]


def run(
    command: list[str], *, environment: dict[str, str] | None = None, within_s: float = 90, show_errors: bool = False
) -> str:
    """Its output. Raises Failed with what it said."""
    try:
        done = subprocess.run(
            command, env=os.environ | (environment or {}), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if show_errors else subprocess.PIPE, text=True, timeout=within_s, check=True,
            # Docker's client obeys a Ctrl-C even where it is to be ignored: while tidying it must not hear it.
            process_group=0 if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else None,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or "").strip()
        raise Failed(f"{shlex.join(command[-4:])} ended with {error.returncode}: {said}") from error
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{shlex.join(command[-4:])} did not end within {within_s:.0f} s") from error
    except OSError as error:
        raise Failed(f"{command[0]} cannot be run: {error.strerror}") from error
    return done.stdout


def main() -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    story = Story()
    with ExitStack() as afterwards:
        status = act(story, afterwards)
        # From here on nothing stops the tidying.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if story.untidy:
        story.chapter(f"NOT DONE: {', '.join(story.untidy)}")
        return status or 1
    if status:
        story.chapter("Everything is as it was.")
        return status
    story.summary()
    story.tell(f"\nAll of it worked, in {time.monotonic() - story.began:.0f} s.")
    return 0


def act(story: Story, afterwards: ExitStack) -> int:
    try:
        prepare(story, afterwards).play(os.environ.get("FAST", "") not in {"", "0"})
    except (Failed, OrionError) as error:
        story.chapter(f"FAILED: {error}")
        return 1
    except KeyboardInterrupt:
        story.chapter("Interrupted")
        return 130
    return 0


def prepare(story: Story, afterwards: ExitStack) -> Demo:
    """A login of its own, in a folder that goes away: the user's is not touched."""
    folder = afterwards.enter_context(tempfile.TemporaryDirectory(prefix="orion-demo-"))
    platform = Platform()
    token, url = platform.token(), platform.url()
    token_file = Path(folder) / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(token)
    environment = {"ORION_URL": url, "ORION_TOKEN_FILE": str(token_file), "XDG_CONFIG_HOME": folder}
    orion = afterwards.enter_context(Orion.at(url, token))
    return Demo(story, platform, orion, environment, afterwards)


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
