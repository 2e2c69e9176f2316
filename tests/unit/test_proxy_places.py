"""How many connections the proxy accepts: as many as fit into its memory, computed by its own entrypoint."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENTRYPOINT = (ROOT / "manager_proxy" / "entrypoint.sh").read_text()
LIMITS = (ROOT / "manager_proxy" / "limits.conf").read_text()
MIB = 1 << 20


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "route").write_text(
        "Iface\tDestination\tGateway\tFlags\neth0\t00000000\t01FE10AC\t0003\neth0\t0000FEAC\t00000000\t0001\n"
    )
    return tmp_path


def said(
    place: Path, script: str, memory: str = "", files: str = "unlimited", **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run functions of the entrypoint; return the ended process.

    `memory`: the content of the file with the container's limit; empty: no file. `files`: the limit of open files.
    """
    functions = ENTRYPOINT.partition("\ntrap 'exit 0'")[0].replace("/run/", f"{place}/run/")
    functions = functions.replace("/proc/net/route", str(place / "route"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        functions = functions.replace(file, str(place / "memory"))
    if memory:
        (place / "memory").write_text(f"{memory}\n")
    command = [
        "sh",
        "-c",
        f"{functions}\nsubnet=172.16.0.0/12 gateway=172.16.0.1\nulimit() {{ echo {files}; }}\n{script}",
    ]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, check=False)


@pytest.mark.parametrize(
    ("memory", "requests"),
    [(str(768 * MIB), 2157), (str(2048 * MIB), 6838), ("max", 2157), ("9223372036854771712", 2157)],
)
def test_the_proxy_accepts_as_many_connections_as_fit_into_its_memory(place: Path, memory: str, requests: int) -> None:
    done = said(place, "write_limits", memory)
    assert done.returncode == 0, done.stderr
    assert f"room for {requests} requests at a time" in done.stdout
    written = (place / "run" / "orion-request-limits.conf").read_text()
    assert written == f"limit_conn requests {requests // 5};\nlimit_conn all_requests {requests * 7 // 8};\n"
    assert (place / "run" / "orion-events.conf").read_text() == f"worker_connections {requests};\n"


def test_the_proxy_accepts_no_more_connections_than_nginx_may_open_files(place: Path) -> None:
    assert "room for 1000 requests at a time" in said(place, "write_limits", str(768 * MIB), files="1100").stdout
    assert "room for 2157 requests at a time" in said(place, "write_limits", str(768 * MIB), files="20000").stdout


def test_too_little_memory_is_refused_with_what_would_be_enough(place: Path) -> None:
    done = said(place, "write_limits", str(200 * MIB))
    assert done.returncode == 1
    enough = re.search(r"ORION_PROXY_MEMORY is too small: 200m, and manager_proxy needs (\d+)m or more", done.stderr)
    assert enough, done.stderr
    assert said(place, "write_limits", str(int(enough[1]) * MIB)).returncode == 0


def test_the_memory_per_connection_covers_the_limits_of_nginx(place: Path) -> None:
    """The memory of a connection and of a request follows from the settings of Nginx."""
    sizes = {
        name: int(number or 1) * int(kib) for name, number, kib in re.findall(r"^(\w+) (?:(\d) )?(\d+)k;", LIMITS, re.M)
    }
    connection = 50 + sizes["client_header_buffer_size"] + sizes["large_client_header_buffers"]
    web_answer = 32 + sizes["client_body_buffer_size"]
    answer = sizes["proxy_buffers"] + 4 + sizes["client_body_buffer_size"]
    request = max(web_answer, answer) + sizes["large_client_header_buffers"]
    each = int(re.findall(r"^kib_per_connection=(\d+)$", ENTRYPOINT, re.M)[0])
    assert connection <= 70
    assert request <= 64
    assert connection + (connection + request) / 2 <= each
    zones = sum(int(mib) for mib in re.findall(r"zone=\w+:(\d+)m", LIMITS))
    without = int(re.findall(r"^kib_base=\$\(\((\d+) \* 1024\)\)$", ENTRYPOINT, re.M)[0])
    assert 80 + zones + 4 + 17 <= without, "Nginx itself, its zones, the zone of TLS, and the memory for files"


def test_trusted_outer_proxies_are_separated_into_ipv4_and_ipv6(place: Path) -> None:
    trusted = "192.0.2.7,2001:db8::/32,10.1.0.0/24"
    done = said(place, "trusted_addresses 4; echo; trusted_addresses 6", ORION_TRUSTED_PROXIES=trusted)
    assert done.stdout == ",192.0.2.7,10.1.0.0/24\n,2001:db8::/32"


def test_the_gateway_is_found_in_the_kernels_table(place: Path) -> None:
    assert said(place, "gateway_address").stdout == "172.16.254.1\n"
    (place / "route").write_text("Iface\tDestination\tGateway\tFlags\n")
    assert said(place, "gateway_address").stdout == "255.255.255.255\n"


def test_peers_inside_are_the_subnet_without_its_gateway(place: Path) -> None:
    assert said(place, "write_limits", str(768 * MIB)).returncode == 0
    written = (place / "run" / "orion-internal.conf").read_text()
    assert written == (
        "geo $realip_remote_addr $from_platform {\n    default 0;\n    127.0.0.0/8 1;\n"
        "    172.16.0.0/12 1;\n    172.16.0.1 0;\n}\n"
    )
