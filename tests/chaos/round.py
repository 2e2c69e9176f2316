"""One round: start the platform, inject faults while renters work, wait until it has settled, and check its history."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from renter import Renter
from stack import WORKERS, Container, Stack
from waiting import TooLate, eventually

from chaos.checker import Violation, check, longest_waking_s, lost_lines
from chaos.history import End, Found, GrantedRental, Happened, History, Tick, WorkerEnd, story
from chaos.nemesis import KEEPER, KINDS, WORKER, Nemesis, PlannedFault, plan
from chaos.tenants import FOUND, JOURNAL, PLACE, Guest, Tenant, TenantRecords, read_faults, read_lines
from orion.client.sdk import Orion
from orion.errors import OrionError
from orion.wire import Event, Rental, RentalState, Worker, WorkerHealth, WorkerIntent

HERE = Path(__file__).parent
SUPPORT = HERE.parent / "support"
PROGRAMS = (HERE / "witness.py", HERE / "postgres.py", SUPPORT / "bank.py", SUPPORT / "difficult_tree.py")
"""The programs that renters run."""
SLOTS = 2
TENANTS = 3
BEGUN_WITHIN_S = 90.0
OPEN_WITHIN_S = 90.0
AT_REST_WITHIN_S = 120.0
"""Seconds until the platform must have settled. A takeover takes 10 s, a brake at most 30; the machine may be busy."""
CLOCK_MAY_SLEW_S = 0.05
NEVER_FLAPS = "1"
"""The window in seconds for losses of a worker: so short that no worker is quarantined for injected faults."""

Say = Callable[[str], None]


class NoTest(Exception):
    """The round itself failed, so it has no result."""


@dataclass
class RoundResult:
    seed: int
    history: History
    violations: list[Violation]
    figures: dict[str, str]

    def report(self) -> str:
        lines = [f"{what}: {value}" for what, value in self.figures.items()]
        for violation in self.violations:
            lines += ["", f"VIOLATION: {violation}"]
            lines.append(story(self.history, violation.rental, violation.since, violation.until))
        if self.violations:
            lines += ["", f"to repeat the same plan: make chaos SEED={self.seed}"]
        return "\n".join(lines)


def play(seed: int, seconds: float, say: Say, keep: Path | None = None, postgres: bool = False) -> RoundResult:
    """Run a round. `keep`: a directory for the history, as JSON, and for the logs of all containers.

    `postgres`: whether one tenant also has a PostgreSQL, for which the workers' image gets an additional layer.
    """
    small_disk = _memory_keeps_attributes()
    acts = [act for act in plan(seed, seconds) if small_disk or act.service != KEEPER]
    if not small_disk:
        say("no disk is filled: this kernel's tmpfs has no extended attributes, which snapshots need")
    with (
        tempfile.TemporaryDirectory(prefix="orion-chaos-") as folder,
        _platform(Path(folder), small_disk, postgres) as stack,
    ):
        say(f"up: {WORKERS} workers with {SLOTS} slots; seed {seed}, {len(acts)} acts in {seconds:g} s")
        try:
            outcome = Round(stack, Path(folder), seed, say, postgres).play(acts)
        finally:
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / "logs.txt").write_text(stack.compose("logs", "--no-color", "--timestamps"))
        if keep is not None:
            (keep / "history.json").write_text(json.dumps(asdict(outcome.history), indent=1))
        return outcome


class Round:
    def __init__(self, stack: Stack, folder: Path, seed: int, say: Say, postgres: bool) -> None:
        self._stack = stack
        self._postgres = postgres
        self._seed = seed
        self._say = say
        self._began = time.monotonic()
        self._keeper = stack.container(KEEPER).id
        self._wall_ahead = _wall_ahead_s()
        self._renter = Renter(folder / "renter", stack.url, stack.admin_token())
        self._book = TenantRecords(boot_time_s, self._of_boot)
        self._figures: dict[str, str] = {}

    def play(self, acts: list[PlannedFault]) -> RoundResult:
        self._lay_out()
        mark = self._stack.mark()
        tenants = [
            Tenant(self._stack, self._renter, self._book, f"tenant-{one}", self._postgres and one == 0)
            for one in range(TENANTS)
        ]
        guest = Guest(self._stack, self._renter, self._book, "guest")
        for one in (*tenants, guest):
            one.start()
        eventually("each tenant's process ticks", lambda: len(self._ticking()) >= TENANTS, BEGUN_WITHIN_S)
        banks = TENANTS + self._postgres
        eventually("each tenant's bank is open", lambda: len(self._found()) >= banks, OPEN_WITHIN_S)
        nemesis = Nemesis(self._stack, boot_time_s, self._tell)
        nemesis.run(acts)
        self._tell("all faults are undone")
        self._leave([guest])
        unrest = self._come_to_rest(nemesis.gone)
        self._leave(tenants)
        faults = [fault for one in (*tenants, guest) for fault in one.faults] + unrest
        if nemesis.faults:
            raise NoTest("\n".join(nemesis.faults))
        history = self._read(mark, nemesis, faults)
        violations = check(history)
        self._figure(history)
        return RoundResult(self._seed, history, violations, self._figures)

    def _lay_out(self) -> None:
        """Install the programs and the journals, which root owns, so that no purge removes them."""
        for program in PROGRAMS:
            self._lay_down(f"cat > {PLACE}/{program.name}; chmod 0644 {PLACE}/{program.name}", program.read_text())
        self._lay_down(f"for one in {JOURNAL} {FOUND}; do : > $one; chmod 0622 $one; done; chmod 0711 {PLACE}")

    def _lay_down(self, command: str, stdin: str = "") -> None:
        done = self._stack.exec(self._keeper, "sh", "-c", f"umask 0; {command}", stdin=stdin)
        assert done.returncode == 0, done.stderr

    def _ticking(self) -> set[str]:
        return {tick.rental for tick in self._ticks()}

    def _ticks(self) -> tuple[Tick, ...]:
        return tuple(Tick.parse(line) for line in self._lines_of(JOURNAL))

    def _found(self) -> tuple[Found, ...]:
        """Return the findings of all banks at their starts."""
        return tuple(Found.parse(line) for line in self._lines_of(FOUND))

    def _lines_of(self, journal: str) -> list[str]:
        """Return the complete lines of a journal. The last line may be incomplete if it crosses a page."""
        return self._stack.exec(self._keeper, "cat", journal).stdout.rpartition("\n")[0].splitlines()

    def _leave(self, tenants: list[Tenant]) -> None:
        for one in tenants:
            one.leave()
        for one in tenants:
            one.join(60)
            assert not one.is_alive(), f"{one.name} did not end"

    # Settling

    def _come_to_rest(self, gone: set[str]) -> list[str]:
        """Wait until the platform has settled, and return what has not. `gone`: hostnames of removed workers."""
        began = time.monotonic()
        unrest = ["the platform does not answer"]

        def at_rest() -> bool:
            with self._stack.connect() as orion:
                unrest[:] = [*self._forget(orion, gone), *self._unrest(orion)]
            return not unrest

        try:
            eventually("the platform has settled", at_rest, AT_REST_WITHIN_S)
        except TooLate:
            return [f"after {AT_REST_WITHIN_S:g} s: {one}" for one in unrest]
        self._figures["settled after"] = f"{time.monotonic() - began:.1f} s"
        return []

    def _forget(self, orion: Orion, gone: set[str]) -> Iterator[str]:
        """Remove the workers that were taken away, like an operator, and yield those that are not down yet."""
        for worker in orion.workers():
            if worker.hostname in gone and worker.health is WorkerHealth.DOWN:
                orion.remove_worker(worker.id)
            elif worker.hostname in gone:
                yield f"worker {worker.hostname} was taken away, and is {worker.health}: {worker.explanation}"

    def _unrest(self, orion: Orion) -> Iterator[str]:
        status = orion.status()
        if status.brake:
            yield f"the brake is on: {status.brake}"
        if status.copies_paused:
            yield f"no snapshots are made: {status.copies_paused}"
        for worker in orion.workers():
            if (worker.health, worker.intent) != (WorkerHealth.READY, WorkerIntent.ACTIVE):
                yield f"worker {worker.hostname} is {worker.health}, {worker.intent}: {worker.explanation}"
        living = list(orion.rentals())
        for rental in living:
            asked = self._book.asked.get(rental.id)
            if asked and not asked.released and rental.state is RentalState.ACTIVE:
                if self._lives(rental):
                    continue
                yield f"{rental.name} is active with epoch {rental.epoch}, but its process does not run yet"
            yield f"{rental.name} is {rental.state}: {rental.explanation}"
        if not living and status.slots_free != status.slots:
            yield f"{status.slots - status.slots_free} slots are occupied without a rental"
        if status.slots_free + len(living) != status.slots:
            yield f"{len(living)} rentals, and {status.slots_free} of {status.slots} slots are free"
        for one in status.overdue:
            yield f"overdue: {one.kind} {one.name} {one.state}: {one.why}"

    def _lives(self, rental: Rental) -> bool:
        """Return whether the rental's last tick is recent and of its current epoch."""
        now = boot_time_s()  # taken first, because reading all ticks takes a while
        last = max((one for one in self._ticks() if one.rental == rental.id), key=lambda one: one.at, default=None)
        return bool(last and last.epoch == rental.epoch and now - last.at < 2.0)

    # Reading

    def _read(self, mark: int, nemesis: Nemesis, faults: list[str]) -> History:
        with self._stack.connect() as orion:
            ends = {one: self._end(orion, asked, faults) for one, asked in self._book.asked.items()}
            found = self._workers_at_rest(orion)
            events = tuple(self._happened(one) for one in orion.events(after=mark, limit=500))
            unknown = [one for one in orion.rentals() if one.id not in self._book.asked]
        if abs(_wall_ahead_s() - self._wall_ahead) > CLOCK_MAY_SLEW_S:
            raise NoTest("this machine's wall clock was set during the round, so times cannot be compared")
        containers = {one.hostname: one for one in self._stack.containers(WORKER)}
        workers = {
            one.id: WorkerEnd(
                one.hostname, one.health, one.intent, one.explanation, self._traces(containers[one.hostname])
            )
            for one in found
            if one.hostname in containers
        }
        faults += [f"a rental that no tenant was granted: {one.name}, {one.state}" for one in unknown]
        faults += [f"a worker without a container: {one.hostname}" for one in found if one.hostname not in containers]
        return History(
            tuple(self._book.asked.values()),
            self._ticks(),
            tuple(nemesis.deeds),
            tuple(self._book.shown),
            events,
            self._found(),
            {identity: end for identity, end in ends.items() if end},
            workers,
            tuple(faults),
        )

    @staticmethod
    def _workers_at_rest(orion: Orion) -> list[Worker]:
        """Return the workers as soon as all are ready, or as they are after a timeout."""
        found: list[Worker] = []

        def all_are_ready() -> bool:
            found[:] = orion.workers()
            return {(one.health, one.intent) for one in found} == {(WorkerHealth.READY, WorkerIntent.ACTIVE)}

        with suppress(TooLate):
            eventually("all workers are ready", all_are_ready, AT_REST_WITHIN_S)
        return found

    def _happened(self, event: Event) -> Happened:
        at = self._of_boot(event.at.timestamp())
        return Happened(at, event.kind, event.rental_id, event.worker_id, event.epoch, event.reason)

    def _end(self, orion: Orion, asked: GrantedRental, faults: list[str]) -> End | None:
        lines: tuple[str, ...] = ()
        wrong: tuple[str, ...] = ()
        try:
            rental = orion.rental(asked.rental)
            if rental.state is RentalState.ACTIVE:
                lines = read_lines(self._renter, rental)
                wrong = read_faults(self._renter, rental)
        except OrionError as error:
            faults.append(f"{asked.name}: {error}")
            return None
        except AssertionError as error:
            faults.append(f"the renter of {asked.name} cannot log in: {error}")
        return End(rental.state, rental.epoch, rental.worker_id, rental.username, rental.explanation, lines, wrong)

    def _traces(self, container: Container) -> tuple[str, ...]:
        looked = self._stack.exec(container.id, "python3", "-c", TRACES)
        if looked.returncode:
            return (f"the search for traces failed: {looked.stderr[-300:]}",)
        return tuple(json.loads(looked.stdout))

    def _figure(self, history: History) -> None:
        kinds = [one.kind for one in history.events]
        takeovers = sum(one.kind == "rental.activated" and (one.epoch or 0) > 1 for one in history.events)
        self._figures["acts"] = ", ".join(
            f"{sum(one.kind == kind for one in history.deeds)} {kind}"
            for kind in KINDS
            if any(one.kind == kind for one in history.deeds)
        )
        self._figures["ticks"] = f"{len(history.ticks)} of {len({one.rental for one in history.ticks})} rentals"
        self._figures["states checked by banks"] = str(len(history.found))
        self._figures["planned migrations"] = str(kinds.count("rental.moved") + kinds.count("rental.parked"))
        self._figures["workers down"] = str(kinds.count("worker.became_down"))
        self._figures["takeovers"] = str(takeovers)
        self._figures["visits of guests"] = str(sum(one.released for one in history.asked))
        self._figures["lines lost, all newer than the last reported snapshot"] = str(lost_lines(history))
        self._figures["longest run of a stale rental after an unpause"] = f"{longest_waking_s(history):.3f} s"

    def _of_boot(self, wall: float) -> float:
        return wall - self._wall_ahead

    def _tell(self, text: str) -> None:
        self._say(f"{time.monotonic() - self._began:6.1f} s  {text}")


TRACES = """
import json, os, pathlib, pwd
first, found = 100_000, []
names = {one.pw_uid: one.pw_name for one in pwd.getpwall()}
def whose(uid):  # the process that sends a rental's files has the renter's uid with the highest bit set
    return names.get(uid & 0x7fffffff, uid)
found += [f"account {name}" for uid, name in names.items() if uid >= first]
for file, kind in (("/etc/shadow", "account"), ("/etc/group", "account")):
    for line in pathlib.Path(file).read_text().splitlines():
        name = line.partition(":")[0]
        if name.startswith("r-") and f"account {name}" not in found:
            found.append(f"{kind} in {file} {name}")
found += [f"key {name}" for name in os.listdir("/etc/orion/keys") if name != "root"]  # the manager's own
found += [f"locked key {name}" for name in os.listdir("/etc/orion/locked")]
found += [f"home {name}" for name in os.listdir("/home")]
for entry in pathlib.Path("/proc").iterdir():
    if entry.name.isdecimal():
        try:
            uid, line = entry.stat().st_uid, (entry / "cmdline").read_bytes().replace(b"\\0", b" ").decode()
        except OSError:
            continue
        if uid >= first:
            found.append(f"process {entry.name} ({line.strip()[:60]}) of {whose(uid)}")
def device_of(path):
    try:
        return os.lstat(path).st_dev
    except OSError:  # the path has vanished: snapshots are made and removed meanwhile
        return None
for top in ("/", "/dev/shm", "/run", "/tmp"):
    device = os.stat(top).st_dev
    for folder, folders, files in os.walk(top):
        folders[:] = [one for one in folders if device_of(os.path.join(folder, one)) == device]
        if folder.startswith("/home/"):
            continue
        for name in folders + files:
            path = os.path.join(folder, name)
            try:
                uid = os.lstat(path).st_uid
            except OSError:
                continue
            if uid >= first:
                found.append(f"file {path} of {whose(uid)}")
print(json.dumps(sorted(set(found))))
"""


class _WithPostgres(Stack):
    """A platform whose workers have an image with PostgreSQL."""

    def build(self) -> None:
        super().build()
        image = f"{self.environment()['COMPOSE_PROJECT_NAME']}-chaos-worker"  # as in postgres.yml
        layer = (
            "--tag",
            image,
            "--build-arg",
            f"WORKER={image}",
            "--file",
            str(HERE / "postgres.Dockerfile"),
            str(HERE),
        )
        self.docker("build", "--quiet", *layer, timeout_s=900)


@contextmanager
def _platform(folder: Path, small_disk: bool, postgres: bool) -> Iterator[Stack]:
    files = [HERE / "platform.yml", *([HERE / "small_disk.yml"] if small_disk else [])]
    files += [HERE / "postgres.yml"] if postgres else []
    settings = {"ORION_SLOTS": str(SLOTS), "ORION_FLAP_WINDOW_S": NEVER_FLAPS}
    settings |= {"CHAOS_SMALL_DISK": "600m"} if postgres else {}
    stack = (_WithPostgres if postgres else Stack)(folder, files, settings)
    try:
        stack.up()
        yield stack
    finally:
        stack.remove()


def _memory_keeps_attributes() -> bool:
    """Return whether tmpfs supports extended attributes, which it does since Linux 6.6 (tmpfs(5))."""
    memory = "/dev/shm"  # noqa: S108 - of this machine
    if not os.access(memory, os.W_OK):
        return False
    with tempfile.NamedTemporaryFile(dir=memory) as file:
        try:
            os.setxattr(file.name, "user.orion", b"1")
        except OSError:
            return False
    return True


def boot_time_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _wall_ahead_s() -> float:
    return time.time() - boot_time_s()
