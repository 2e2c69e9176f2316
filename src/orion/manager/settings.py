"""The operator's settings, from ORION_* in the environment, and the secrets, which are never in the environment."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network
from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from orion.manager.domain.clocks import Clocks
from orion.manager.domain.snapshot_plan import SnapshotLimits, SnapshotPlan


class Settings(BaseSettings):
    """The settings of the manager. Clocks under which a rental could run twice are refused: see domain/clocks.py."""

    model_config = SettingsConfigDict(env_prefix="ORION_", frozen=True, env_ignore_empty=True)

    subnet: IPv4Network = IPv4Network("172.20.0.0/16")
    proxy_address: IPv4Address = IPv4Address("172.20.0.2")
    app_address: IPv4Address = IPv4Address("172.20.0.3")
    database_url: str = "sqlite:////var/lib/orion/database/orion.db"
    lock_file: str = "/var/lib/orion/database/leader.lock"
    engine_socket: str = "/run/orion/engine.sock"
    vault_socket: str = "/run/orion-vault/vault.sock"
    copies_directory: str = "/var/lib/orion/copies"
    ballast_bytes: int = Field(16 << 20, ge=0, lt=2**40, description="Size of the ballast: see store/ballast.py")
    port: int = 5000
    apps_domain: str = Field(
        "",
        pattern=r"^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*)?$",
        description="The domain of the host names of web ports; the proxy has the same setting",
    )

    snapshot_interval_s: float = Field(
        30.0, gt=0, description="Between two snapshots of a rental; scaled as the clocks"
    )
    uncopied_wait_s: float = Field(600.0, ge=0, description="Wait for a lost worker without a snapshot; scaled as well")
    copies_at_once: int = Field(8, ge=1, le=32)
    home_max_bytes: int = Field(2 << 30, ge=1 << 20, lt=2**53, description="No snapshot is taken of a larger home")
    home_max_files: int = Field(200_000, ge=100, lt=2**31)
    owner_disk_share: float = Field(0.5, gt=0, le=1, description="Share of the snapshots' disk for one owner's rentals")

    events_kept: int = Field(1_000_000, ge=10_000, lt=2**31, description="Number of the newest events that are kept")

    clock_scale: float = Field(1.0, gt=0, le=10, description="Factor of every clock below")
    heartbeat_s: float = Clocks.heartbeat_s
    suspect_after_s: float = Clocks.suspect_after_s
    freeze_after_s: float = Clocks.freeze_after_s
    freeze_budget_s: float = Clocks.freeze_budget_s
    door_answer_s: float = Clocks.door_answer_s
    takeover_after_s: float = Clocks.takeover_after_s
    wake_budget_s: float = Clocks.wake_budget_s
    slack_s: float = Clocks.slack_s
    brake_max_s: float = Clocks.brake_max_s
    goodbye_after_s: float = Clocks.goodbye_after_s
    flap_window_s: float = Clocks.flap_window_s

    @cached_property
    def clocks(self) -> Clocks:
        return Clocks(**{name: getattr(self, name) for name in vars(Clocks())}).scaled(self.clock_scale)

    @property
    def snapshots(self) -> SnapshotPlan:
        return SnapshotPlan(
            interval_s=self.snapshot_interval_s * self.clock_scale,
            at_once=self.copies_at_once,
            limits=SnapshotLimits(
                max_files=self.home_max_files, max_bytes=self.home_max_bytes, owner_share=self.owner_disk_share
            ),
            paused_share=SnapshotPlan.paused_share / self.clock_scale,  # a pause does not scale
        )

    @property
    def awaits_files_s(self) -> float:
        return self.uncopied_wait_s * self.clock_scale

    @model_validator(mode="after")
    def _safe_clocks(self) -> Self:
        if problems := self.clocks.problems():
            raise ValueError("; ".join(problems))
        return self

    @model_validator(mode="after")
    def _addresses_in_subnet(self) -> Self:
        for name in ("proxy_address", "app_address"):
            if getattr(self, name) not in self.subnet:
                raise ValueError(f"ORION_{name.upper()} must be inside ORION_SUBNET {self.subnet}")
        return self

    @property
    def door_url(self) -> str:
        """The address at which the proxy probe reaches the manager through the proxy."""
        return f"http://{self.proxy_address}/healthz"

    def may_be_a_worker(self, address: str) -> bool:
        """Return whether a worker may register from this address: in the subnet, and not an address of the platform."""
        try:
            peer = IPv4Address(address)
        except ValueError:
            return False
        own = {self.proxy_address, self.app_address, self.subnet.network_address + 1}
        return peer in self.subnet and peer not in own


@dataclass(frozen=True, repr=False, kw_only=True)
class Secrets:
    """The secrets that the entrypoint reads as root and writes to a pipe. No repr: they must not reach a log."""

    admin_token: str
    join_token: str
    proxy_secret: str
    ssh_private_key: str
    ssh_public_key: str
    host_authority: str
    """The private key that signs host certificates of workers."""
    user_authority: str
    """The private key that signs user certificates for rentals."""

    @staticmethod
    def from_pipe(descriptor: int) -> Secrets:
        """Read the JSON object that the entrypoint wrote, once."""
        with os.fdopen(descriptor, encoding="utf-8") as pipe:
            return Secrets(**json.load(pipe))
