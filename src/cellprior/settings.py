"""Where files are kept, and whether and from where they may be fetched."""

from __future__ import annotations

import os
from pathlib import Path

_YES = frozenset({"1", "true", "yes", "on"})
_NO = frozenset({"", "0", "false", "no", "off"})


class Settings:
    """Three settings, each with an environment variable behind it.

    The environment is read at every access. A value that has been assigned wins over the environment
    until `None` is assigned in its place.

    Examples
    --------
    >>> import cellprior as cp
    >>> cp.settings.cache_dir = "/scratch/me/cellprior"
    >>> cp.settings.offline = True
    """

    def __init__(self) -> None:
        self._cache_dir: Path | None = None
        self._offline: bool | None = None
        self._mirror: str | None = None

    @property
    def cache_dir(self) -> Path:
        """Folder that downloaded files are kept in; `CELLPRIOR_CACHE`, or else the user's cache folder."""
        if self._cache_dir is not None:
            return self._cache_dir
        if folder := os.environ.get("CELLPRIOR_CACHE"):
            return Path(folder).expanduser()
        # Imported here: pooch is slow to import, and `import cellprior` must stay light.
        import pooch

        return Path(pooch.os_cache("cellprior"))

    @cache_dir.setter
    def cache_dir(self, folder: str | os.PathLike[str] | None) -> None:
        self._cache_dir = None if folder is None else Path(folder).expanduser()

    @property
    def offline(self) -> bool:
        """Whether the network is off limits; `CELLPRIOR_OFFLINE`, or else `False`.

        Raises
        ------
        ValueError
            If `CELLPRIOR_OFFLINE` is neither a yes (1, true, yes, on) nor a no (0, false, no, off).
        """
        if self._offline is not None:
            return self._offline
        answer = os.environ.get("CELLPRIOR_OFFLINE", "")
        if answer.strip().lower() in _YES:
            return True
        if answer.strip().lower() in _NO:
            return False
        msg = (
            f"The environment variable CELLPRIOR_OFFLINE is {answer!r}, which is neither yes nor no. "
            "Set it to 1 (no network) or 0, or unset it."
        )
        raise ValueError(msg)

    @offline.setter
    def offline(self, offline: bool | None) -> None:
        self._offline = None if offline is None else bool(offline)

    @property
    def mirror(self) -> str | None:
        """Folder or base URL that is asked before the network; `CELLPRIOR_MIRROR`, or else `None`.

        The empty string means no mirror, also where `CELLPRIOR_MIRROR` names one.
        """
        mirror = self._mirror if self._mirror is not None else os.environ.get("CELLPRIOR_MIRROR")
        return mirror or None

    @mirror.setter
    def mirror(self, mirror: str | os.PathLike[str] | None) -> None:
        self._mirror = None if mirror is None else os.fspath(mirror)

    def __repr__(self) -> str:
        return f"Settings(cache_dir={str(self.cache_dir)!r}, offline={self.offline}, mirror={self.mirror!r})"


settings = Settings()
