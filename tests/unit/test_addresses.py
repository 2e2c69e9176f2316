"""The addresses that `make up` derives from the operator's subnet, computed by its own shell script."""

from __future__ import annotations

import os
import re
import subprocess
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
NAMES = ("ORION_GATEWAY", "ORION_PROXY_ADDRESS", "ORION_APP_ADDRESS", "ORION_WORKER_RANGE")


def shell(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    source = f". {ROOT}/scripts/common.sh; . {ROOT}/scripts/addresses.sh; {script}"
    clean = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(["bash", "-c", source], env=clean, capture_output=True, text=True, check=False)


def derived(subnet: str, **environment: str) -> list[str]:
    show = "; ".join(f'echo "${name}"' for name in NAMES)
    return shell(f"derive_addresses; {show}", ORION_SUBNET=subnet, **environment).stdout.split()


def test_the_default_subnet_derives_the_defaults_of_the_compose_file() -> None:
    compose = (ROOT / "docker-compose.yml").read_text()
    defaults = [set(re.findall(rf"\${{{name}:-([^}}]+)}}", compose)) for name in NAMES]
    assert [{value} for value in derived("172.20.0.0/16")] == defaults


@pytest.mark.parametrize("subnet", ["10.0.0.0/8", "10.77.0.0/16", "192.168.5.0/24", "192.168.5.240/28"])
def test_the_fixed_addresses_are_inside_the_subnet_and_outside_the_workers_range(subnet: str) -> None:
    *fixed, workers = derived(subnet)
    inside = IPv4Network(subnet)
    assert fixed == [str(inside[1]), str(inside[2]), str(inside[3])]
    assert IPv4Network(workers) == list(inside.subnets())[1]


def test_an_address_that_is_given_is_kept() -> None:
    assert derived("10.77.0.0/16", ORION_APP_ADDRESS="10.77.0.9")[2] == "10.77.0.9"


@pytest.mark.parametrize("subnet", ["junk", "10.77.0.0", "10.77.0.5/16", "10.77.0.0/30", "10.77.0.0/4"])
def test_an_invalid_subnet_is_refused_in_one_line(subnet: str) -> None:
    refused = shell("derive_addresses", ORION_SUBNET=subnet)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"orion: ORION_SUBNET={subnet}")
    assert refused.stderr.count("\n") == 1


def test_the_machine_s_addresses_are_listed_in_order_without_those_of_docker(tmp_path: Path) -> None:
    programs = {
        "hostname": "echo 203.0.113.7 172.17.0.1 10.1.2.3 2001:db8::7 172.20.0.1 10.1.2.3 192.168.1.2",
        "docker": '[ "$2" = ls ] && echo id || printf "%s\\n" "bridge 172.17.0.0/16" none "x_orion_net 172.20.0.0/16"',
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    found = shell("host_addresses", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (found.stdout, found.stderr) == ("10.1.2.3,192.168.1.2,203.0.113.7\n", "")


networks = st.builds(
    lambda address, prefix: IPv4Network((address >> (32 - prefix) << (32 - prefix), prefix)),
    st.integers(10 << 24, (10 << 24) + (1 << 20)),
    st.integers(8, 30),
)


@settings(max_examples=10)
@given(st.lists(st.tuples(networks, networks), min_size=20, max_size=20))
def test_networks_overlap_as_the_standard_library_says(pairs: list[tuple[IPv4Network, IPv4Network]]) -> None:
    script = "; ".join(f"overlap {one} {other} && echo yes || echo no" for one, other in pairs)
    assert shell(script).stdout.split() == ["yes" if one.overlaps(other) else "no" for one, other in pairs]


RULES = """*nat
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -s {subnet} ! -o br-0123456789ab -j MASQUERADE
-A POSTROUTING -s 172.20.0.2/32 -d 172.20.0.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE
COMMIT"""


def test_leftovers_of_a_former_docker_network_are_reported_with_the_commands_against_them() -> None:
    """A former rule of masquerading hides the senders of the new network: the manager would refuse the proxy."""
    nothing = "docker_networks() { :; }; docker() { :; }; host_routes() { :; }; as_root_without_password() { :; }"
    bridge = "host_routes() { echo br-0123456789ab 172.20.0.0/16; }"
    rules = f"as_root_without_password() {{ echo '{RULES.format(subnet='172.20.0.0/16')}'; }}"
    elsewhere = f"as_root_without_password() {{ echo '{RULES.format(subnet='172.21.0.0/16')}'; }}"
    lives = f"{rules}; docker() {{ echo br-0123456789ab; }}"
    both = "iptables-save | grep -v br-0123456789ab | iptables-restore; then run make up"
    for found, way_out in ((bridge, f"as root: ip link delete br-0123456789ab; {both}"), (rules, f"as root: {both}")):
        done = shell(f"{nothing}; {found}; check_subnet", COMPOSE_PROJECT_NAME="tried")
        assert done.returncode == 1
        assert way_out in done.stderr
    for found in ("true", elsewhere, lives):
        done = shell(f"{nothing}; {found}; check_subnet", COMPOSE_PROJECT_NAME="tried")
        assert (done.returncode, done.stderr) == (0, "")


def test_a_network_is_found_by_its_ipv4_subnet_whatever_other_subnets_it_has() -> None:
    networks = "none\\nbridge fd00:1::/64 172.17.0.0/16\\nother fd00:2::/64 172.20.0.0/16"
    fakes = (
        f"docker_networks() {{ printf '{networks}\\n'; }}; host_routes() {{ :; }}; as_root_without_password() {{ :; }}"
    )
    done = shell(f"{fakes}; check_subnet", COMPOSE_PROJECT_NAME="tried")
    assert done.returncode == 1
    assert "172.20.0.0/16" in done.stderr
    assert "other" in done.stderr
    assert shell(f"{fakes}; check_subnet", COMPOSE_PROJECT_NAME="tried", ORION_SUBNET="10.9.0.0/16").returncode == 0
