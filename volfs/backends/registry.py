"""The backends of one daemon: those of the configuration, and those made for sources that none of them serves."""

from __future__ import annotations

from volfs.backends import backend_class
from volfs.backends.base import Backend, Settings, Source
from volfs.errors import SourceError


class Backends:
    """The configured backends by name, and those made for sources that none of them serves."""

    def __init__(self, configured: dict[str, Backend]) -> None:
        self.configured = configured
        self._made: dict[tuple[str, Settings], Backend] = {}
        self._users: dict[Backend, int] = {}

    def acquire(self, source: Source) -> Backend:
        """The backend that serves the source. The caller owes one `release`. Connects to nothing."""
        backend = self._find(source)
        self.hold(backend)
        return backend

    def hold(self, backend: Backend) -> None:
        """Note one more user of the backend, who owes one `release`."""
        self._users[backend] = self._users.get(backend, 0) + 1

    async def release(self, backend: Backend) -> None:
        """Give a backend back; one that was made for its sources is closed with the last of them."""
        self._users[backend] -= 1
        if self._users[backend]:
            return
        del self._users[backend]
        for key, made in list(self._made.items()):
            if made is backend:
                del self._made[key]
                await backend.aclose()

    async def aclose(self) -> None:
        for backend in [*self._made.values(), *self.configured.values()]:
            await backend.aclose()

    def _find(self, source: Source) -> Backend:
        for backend in self.configured.values():
            if backend.serves(source):
                return backend
        cls = backend_class(source.driver)
        settings = self._settings_like(source) or cls.settings_for(source)
        key = (source.driver, settings)
        if key not in self._made:
            self._made[key] = cls(source.driver, settings)
        return self._made[key]

    def _settings_like(self, source: Source) -> Settings | None:
        """Those of the first configured backend that has the source but for its account; SourceError if none can."""
        refused: SourceError | None = None
        for backend in self.configured.values():
            try:
                if (settings := backend.settings_like(source)) is not None:
                    return settings
            except SourceError as exc:
                refused = refused or exc
        if refused is not None:
            raise refused
        return None
