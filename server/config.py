"""`coordinator.yaml`: where the coordinator keeps its state and where hospitals reach it.

Nothing here can weaken a study: rounds, quorum, deadlines and privacy come from the signed terms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from common.address import Host, Port, is_loopback, joined_address
from common.config import Frozen, Rules, beside
from common.fields import FilePath, Listed, Text

__all__ = ["FORMAT", "Admin", "CoordinatorConfig", "Listen"]

FORMAT: Final = "wardround-coordinator/1"
PUBLIC_PORT: Final = 8443
ADMIN_PORT: Final = 8444
HEALTH_PORT: Final = 8445


class Listen(Frozen):
    """The one port that hospitals dial."""

    host: Host = Field("0.0.0.0", description="interface; 0.0.0.0 is every one")  # noqa: S104
    port: Port = Field(PUBLIC_PORT, description="TCP port; TLS 1.3 only")


class Admin(Frozen):
    """The operator's port, which nobody outside this machine reaches."""

    host: Host = Field("127.0.0.1", description="a loopback address")
    port: Port = Field(ADMIN_PORT, description="TCP port of status and metrics")
    health: Port = Field(HEALTH_PORT, description="TCP port of the gRPC health service")


class CoordinatorConfig(Frozen):
    """The operator's own settings."""

    format: Literal["wardround-coordinator/1"] = Field(description="this file's kind and version")
    state: FilePath = Field(description="folder of keys, sites, journals, models and audit logs")
    consortium: Text = Field("consortium", description="the name that hospitals read in an invite")
    names: Annotated[Listed[Host], Field(min_length=1, max_length=20)] = Field(
        ("localhost", "127.0.0.1"),
        description="host names and addresses that hospitals dial; the certificate is for them",
    )
    listen: Listen = Field(Listen(), description="the port that hospitals dial")
    admin: Admin = Field(Admin(), description="the operator's port, on this machine only")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least level of the operator's log; no level holds data of patients"
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        rules.require(
            is_loopback(self.admin.host),
            "admin.host",
            "must be a loopback address: whoever reaches this port steers the coordinator",
        )
        rules.require(
            self.admin.port != self.listen.port, "admin.port", "is also the hospitals' port"
        )
        for index, name in enumerate(self.names):
            rules.require(name not in self.names[:index], f"names.{index}", "is listed twice")
        rules.done()
        return self

    @property
    def url(self) -> str:
        """`host:port` that hospitals dial, by the first name."""
        return joined_address(self.names[0], self.listen.port)

    def state_folder(self, config: str | Path) -> Path:
        """The state folder as the file `config` means it."""
        return beside(config, self.state)
