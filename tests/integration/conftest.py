"""Fixtures for the tests of workers: the worker's image, a network, a small manager, two workers."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from platform_support import Platform, platform
from rental_support import Rental, new_rental
from worker_support import (
    IMAGE,
    PREFIX,
    ROOT,
    SmallManager,
    Worker,
    WorkerNetwork,
    docker,
    join_directory,
    make_key,
    serving,
    worker,
)


@pytest.fixture(scope="session")
def worker_image() -> str:
    engine = subprocess.run(["docker", "version"], capture_output=True, text=True, check=False)
    if engine.returncode:
        pytest.fail(f"These tests need a Docker engine, and none answers: {engine.stderr.strip()}", pytrace=False)
    build = ["docker", "build", "--quiet", "--tag", IMAGE, "--file", "worker/Dockerfile", "."]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"The worker's image cannot be built:\n{done.stderr[-3000:]}", pytrace=False)
    return IMAGE


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Yield the real proxy and the real manager, for attacks from outside."""
    with platform(tmp_path_factory.mktemp("platform")) as running:
        yield running


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """Yield a folder with a short path, because paths of ssh's control sockets may not be long."""
    place = Path(tempfile.mkdtemp(prefix="orion-"))
    yield place
    shutil.rmtree(place)


@pytest.fixture(scope="session")
def network(worker_image: str) -> Iterator[WorkerNetwork]:
    prefix = f"10.{20 + secrets.randbelow(70)}.{secrets.randbelow(256)}"  # the proxy's tests and e2e use others
    made = WorkerNetwork(PREFIX, f"{prefix}.0/24", f"{prefix}.1")
    docker("network", "create", "--subnet", made.subnet, "--gateway", made.gateway, made.name)
    yield made
    docker("network", "rm", made.name)


@pytest.fixture(scope="session")
def join(folder: Path) -> Iterator[Path]:
    with join_directory(folder) as place:
        yield place


@pytest.fixture(scope="session")
def shared_manager(network: WorkerNetwork, folder: Path) -> Iterator[SmallManager]:
    with serving(SmallManager(make_key(folder)), network.gateway) as manager:
        yield manager


@pytest.fixture(scope="session")
def pair(network: WorkerNetwork, shared_manager: SmallManager, join: Path) -> Iterator[tuple[Worker, Worker]]:
    """Yield two workers for tests that make their own rentals and restart nothing."""
    with (
        worker(network, shared_manager, join, slots=4) as first,
        worker(network, shared_manager, join, slots=4) as second,
    ):
        first.wait_registered()
        second.wait_registered()
        yield first, second


@pytest.fixture(scope="session")
def host(pair: tuple[Worker, Worker]) -> Worker:
    return pair[0]


@pytest.fixture(scope="session")
def neighbour(pair: tuple[Worker, Worker]) -> Worker:
    return pair[1]


@pytest.fixture
def roommate(host: Worker, folder: Path) -> Rental:
    """Return a rental of another renter on the same worker."""
    return new_rental(host, folder).create_quickly()


@pytest.fixture
def manager(network: WorkerNetwork, folder: Path) -> Iterator[SmallManager]:
    """Yield a manager for a single test, which may script it."""
    with serving(SmallManager(make_key(folder)), network.gateway) as made:
        yield made
