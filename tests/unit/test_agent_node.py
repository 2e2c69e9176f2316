"""The agent's settings, and the usage that it reads from the control group in both versions."""

from __future__ import annotations

from pathlib import Path

import pytest
from orion_worker.agent.node import MAX_SLOTS, count_files, settings_from
from orion_worker.system.cgroup import CgroupUsage, processes_for_each_renter, usage

from orion import wire
from orion.manager.domain.host_certificates import MAX_NAMES

VERSION_1 = {
    "cpuacct/cpuacct.usage": "2500000000\n",
    "memory/memory.usage_in_bytes": "104857600\n",
    "memory/memory.stat": "cache 1\ntotal_inactive_file 4857600\n",
    "memory/memory.limit_in_bytes": "536870912\n",
    "pids/pids.current": "7\n",
    "pids/pids.max": "512\n",
}
VERSION_2 = {
    "cgroup.controllers": "cpu memory pids\n",
    "cpu.stat": "usage_usec 2500000\nuser_usec 1\n",
    "memory.current": "104857600\n",
    "memory.stat": "anon 1\ninactive_file 4857600\n",
    "memory.max": "536870912\n",
    "pids.current": "7\n",
    "pids.max": "512\n",
}


@pytest.mark.parametrize("files", [VERSION_1, VERSION_2], ids=["version 1", "version 2"])
def test_both_versions_of_control_groups_give_the_same_usage(files: dict[str, str]) -> None:
    assert usage(files.get) == CgroupUsage(
        cpu_s=2.5, memory_used_bytes=100_000_000, memory_limit_bytes=536_870_912, processes=7, processes_limit=512
    )


def test_no_limit_is_zero_in_both_versions() -> None:
    for files in (
        VERSION_1 | {"memory/memory.limit_in_bytes": "9223372036854771712\n", "pids/pids.max": "max\n"},
        VERSION_2 | {"memory.max": "max\n", "pids.max": "max\n"},
    ):
        found = usage(files.get)
        assert (found.memory_limit_bytes, found.processes_limit) == (0, 0)


def test_missing_or_wrong_files_of_the_control_group_are_zero() -> None:
    assert usage(lambda _: None) == CgroupUsage(
        cpu_s=0, memory_used_bytes=0, memory_limit_bytes=0, processes=0, processes_limit=0
    )
    assert usage({"cgroup.controllers": "", "memory.current": "no number"}.get) == CgroupUsage(
        cpu_s=0, memory_used_bytes=0, memory_limit_bytes=0, processes=0, processes_limit=0
    )


@pytest.mark.parametrize(("limit", "slots", "each"), [(512, 1, 448), (512, 4, 112), (0, 1, 448), (70, 4, 16)])
def test_the_renters_together_leave_room_for_sshd_and_the_agent(limit: int, slots: int, each: int) -> None:
    assert processes_for_each_renter(limit, slots) == each


def test_a_worker_offers_no_more_than_one_certificate_can_name_and_the_contract_takes() -> None:
    assert MAX_SLOTS == wire.MAX_SLOTS == MAX_NAMES
    assert settings_from({"ORION_APP_ADDRESS": "172.20.0.3", "ORION_SLOTS": f"{MAX_SLOTS}"}).slots == MAX_SLOTS


def test_settings_come_from_the_environment_with_defaults() -> None:
    settings = settings_from({"ORION_APP_ADDRESS": "172.20.0.3", "ORION_LABELS": "zone=a,gpu="})
    assert (settings.url, settings.slots) == ("http://manager_proxy", 1)
    assert settings.labels == {"zone": "a", "gpu": ""}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"ORION_APP_ADDRESS": ""}, "ORION_APP_ADDRESS"),
        ({"ORION_APP_ADDRESS": "x; reboot"}, "ORION_APP_ADDRESS"),
        ({"ORION_URL": "ftp://x"}, "ORION_URL"),
        ({"ORION_URL": "http://x/path"}, "ORION_URL"),
        ({"ORION_SLOTS": "0"}, "ORION_SLOTS"),
        ({"ORION_SLOTS": "many"}, "ORION_SLOTS"),
        ({"ORION_SLOTS": f"{MAX_SLOTS + 1}"}, "from 1 to 256"),
        ({"ORION_LABELS": "zone"}, "ORION_LABELS"),
        ({"ORION_STOP_GRACE_S": "soon"}, "ORION_STOP_GRACE_S"),
        ({"ORION_STOP_GRACE_MAX_S": "-1"}, "ORION_STOP_GRACE_MAX_S"),
        ({"ORION_LABELS": "=a"}, "ORION_LABELS"),
        ({"ORION_LABELS": "zone=a b"}, "ORION_LABELS"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        settings_from({"ORION_APP_ADDRESS": "172.20.0.3"} | wrong)


def test_files_to_migrate_are_counted_without_following_links(tmp_path: Path) -> None:
    (tmp_path / "a/deep").mkdir(parents=True)
    (tmp_path / "a/deep/file").write_bytes(b"x" * 1000)
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/file").write_bytes(b"x" * 10)
    assert count_files([tmp_path / "a", tmp_path / "b", tmp_path / "never"]) == (4, 1010)


def test_the_grace_grows_only_where_its_maximum_is_set() -> None:
    alone = settings_from({"ORION_APP_ADDRESS": "172.20.0.3", "ORION_STOP_GRACE_S": "20"})
    assert (alone.stop_grace_s, alone.stop_grace_max_s) == (20, 20)
    both = {"ORION_STOP_GRACE_S": "55", "ORION_STOP_GRACE_MAX_S": "590"}
    grows = settings_from({"ORION_APP_ADDRESS": "172.20.0.3"} | both)
    assert (grows.stop_grace_s, grows.stop_grace_max_s) == (55, 590)
