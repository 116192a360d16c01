"""As whom the node speaks to a registry: by which secret, and whether it may be sent there."""

from fnmatch import fnmatchcase
from pathlib import Path

from worker.config import Config
from worker.errors import ContractError, PolicyDenied, PullFailed
from worker.log import register_secret
from worker.secret_files import SecretReader

from .registry.credentials import Credentials, from_docker_config, from_secret
from .registry.reference import RegistryImage


class Access:
    def __init__(self, config: Config, secrets: SecretReader) -> None:
        self._config = config
        self._docker_config = config.images.docker_config
        self._secrets = secrets

    def grant(self, config: Config) -> None:
        """Go by the policy of `config` from now on."""
        self._config = config

    def check(self, auth: str | None, image: RegistryImage) -> None:
        """PolicyDenied. A secret goes only where the operator said: whoever names a registry could collect it
        otherwise.
        """
        if auth is None:
            return
        patterns = self._config.policy.registry_secrets.get(auth, ())
        if not any(fnmatchcase(image.host, pattern) for pattern in patterns):
            raise PolicyDenied(
                f"the secret {auth[:128]} may not be sent to {image.host}; "
                + self._config.how_to_allow("registry_secrets", auth),
                field="auth",
            )

    def credentials(self, image: RegistryImage, auth: str | None) -> Credentials | None:
        """Those of the secret `auth`, else the docker configuration's for that registry; no log tells them.

        Blocking. PullFailed.
        """
        found = self._find(image, auth)
        for secret in found.secrets if found else ():
            register_secret(secret)
        return found

    def _find(self, image: RegistryImage, auth: str | None) -> Credentials | None:
        if auth is not None:
            try:
                return from_secret(self._secrets.read(auth), image.host, auth)
            except PullFailed:
                raise
            except ContractError as failure:
                raise PullFailed(failure.message, field="auth") from failure
        if self._docker_config is not None:
            return from_docker_config(Path(self._docker_config), image.host)
        return None
