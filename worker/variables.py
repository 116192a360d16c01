"""The environment of a container: the spec's, what that refers to, and what every container is told.

From weakest to strongest: defaults (PORT, PATH, HOME, TMPDIR), the image's variables, the spec's, and the
names that the node always sets, those of its host API included. Nothing of the worker's own environment gets
in unless the spec names it and the node's operator has granted that name.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from schemas.spec import ServiceSpec
from schemas.subjects import parse_cid
from worker.config import Config
from worker.errors import ContractError, InvalidSpec, PolicyDenied, StartFailed, Unsupported
from worker.images.model import ImageConfig
from worker.secret_files import SecretReader

ENV_REFERENCE = "$E:"
SECRET_REFERENCE = "$S:"


def build_env(
    spec: ServiceSpec,
    *,
    config: Config,
    node: str,
    cid: str,
    instance: str,
    port: int | None,
    tmp: Path,
    image: ImageConfig,
    secrets: SecretReader,
    default_path: str,
    host_api: Mapping[str, str] = MappingProxyType({}),
    volumes: Mapping[str, str] = MappingProxyType({}),
    environ: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """Every variable of one start, in a fixed order. `host_api` are those of the node's host API, `volumes`
    those that tell where each volume is.

    PolicyDenied for a reference that the operator has not granted, StartFailed for one that leads to
    nothing, each naming `spec.env.<NAME>` and never a value.
    """
    home = str(tmp)
    found = {"PATH": default_path, "HOME": home, "TMPDIR": home}
    if port is not None:
        found["PORT"] = str(port)
    found.update(image.environment)
    references = _References(config, parse_cid(cid)[0], secrets, environ)
    for name, value in spec.env.items():
        found[name] = _checked(name, references.value(name, value))
    if port is not None:
        found["SANDFLEET_PORT"] = found["ZLAYER_PORT"] = str(port)
    found["SANDFLEET_NODE"] = node
    found["SANDFLEET_CONTAINER"] = cid
    found["SANDFLEET_INSTANCE"] = instance
    found.update(volumes)
    found.update(host_api)
    return found


def _checked(name: str, value: str) -> str:
    if not name or "=" in name or "\0" in name or "\0" in value:
        raise InvalidSpec(
            f"{name[:80]!r} cannot be a variable: its name holds `=`, or a NUL is in it", field=_field(name)
        )
    return value


def _field(name: str) -> str:
    return f"spec.env.{name}"


class _References:
    """`$E:NAME` and `$S:name`, bounded by what the node's policy grants to this service."""

    def __init__(
        self, config: Config, service: str, secrets: SecretReader, environ: Mapping[str, str]
    ) -> None:
        self._config = config
        self._service = service
        self._secrets = secrets
        self._environ = environ

    def value(self, variable: str, written: str) -> str:
        if written.startswith(ENV_REFERENCE):
            return self._variable(variable, written.removeprefix(ENV_REFERENCE))
        if written.startswith(SECRET_REFERENCE):
            return self._secret(variable, written.removeprefix(SECRET_REFERENCE))
        return written

    def _variable(self, variable: str, name: str) -> str:
        if name not in self._config.policy.env:
            raise PolicyDenied(
                f"the node's variable {name!r} may not be read; {self._config.how_to_allow('env', name)}",
                field=_field(variable),
            )
        value = self._environ.get(name)
        if value is None:
            raise StartFailed(f"the worker's environment has no {name}", field=_field(variable))
        return value

    def _secret(self, variable: str, name: str) -> str:
        if name.startswith("@"):
            raise Unsupported("secrets of other services cannot be named", field=_field(variable))
        if not self._config.policy.may_have_secret(name, self._service):
            raise PolicyDenied(
                f"the service {self._service} may not have the secret {name!r}; "
                f"{self._config.how_to_allow('secrets', name)}",
                field=_field(variable),
            )
        try:
            return self._secrets.read(name)
        except ContractError as failure:
            raise StartFailed(failure.message, field=_field(variable)) from failure
