"""Messages that the engine and the snapshot service have in common: a host, and the limit of a deadline."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, IPvAnyAddress, StringConstraints

from orion.manager.ssh.port import Host
from orion.wire import PublicKey

MAX_DEADLINE_S = 3600.0
WorkerId = Annotated[str, StringConstraints(pattern=r"^w-[a-z0-9]{1,30}$")]


class Message(BaseModel):
    """A message between processes, which refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class HostMessage(Message):
    """A worker. Its address is never a name, because OpenSSH takes a name that begins with a dash for an option."""

    worker_id: WorkerId
    address: IPvAnyAddress
    port: int = Field(22, ge=1, le=65535)
    host_keys: Annotated[tuple[PublicKey, ...], Field(min_length=1, max_length=8)]

    @classmethod
    def of(cls, host: Host) -> HostMessage:
        return cls(worker_id=host.worker_id, address=host.address, port=host.port, host_keys=host.host_keys)

    def host(self) -> Host:
        return Host(worker_id=self.worker_id, address=str(self.address), host_keys=self.host_keys, port=self.port)
