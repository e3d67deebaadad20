"""Lets tox environments that need the same packages share one virtualenv.

tox recreates a virtualenv whenever an environment of another name asks for its folder. Here they all ask for the same
folder with the same dependencies, so the name must not count.
"""

from __future__ import annotations

from tox.plugin import impl
from tox.tox_env.python.virtual_env.runner import VirtualEnvRunner
from tox.tox_env.register import ToxEnvRegister


class SharedVirtualEnv(VirtualEnvRunner):
    """A virtualenv whose folder several environments use."""

    @staticmethod
    def id() -> str:
        """The name that tox.ini's ``runner`` gives."""
        return "shared-virtualenv"

    @property
    def cache(self):  # type: ignore[no-untyped-def]
        """What tox remembers about the folder, without the name of the environment that asked first."""
        info = super().cache
        remembered = info._content.get("ToxEnv")
        if isinstance(remembered, dict):
            remembered["name"] = self.conf.name
        return info


@impl
def tox_register_tox_env(register: ToxEnvRegister) -> None:
    """Make the runner known to tox."""
    register.add_run_env(SharedVirtualEnv)
