"""Where files are kept, and whether and from where they may be fetched."""

from __future__ import annotations

import os
from pathlib import Path

_YES = frozenset({"1", "true", "yes", "on"})
_NO = frozenset({"", "0", "false", "no", "off"})


class Settings:
    """Four settings, each with an environment variable behind it.

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
        self._n_jobs: int | None = None

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

    @property
    def n_jobs(self) -> int | None:
        """Cores that cells are embedded on; `CELLPRIOR_N_JOBS`, or else `None`.

        `None` is as many as PyTorch uses (``OMP_NUM_THREADS``, :func:`torch.set_num_threads`), of those that the
        process is bound to and that a container grants, 16 at most. Never changes a number.

        Raises
        ------
        ValueError
            If it is not a whole number from 1 on.
        """
        return self._n_jobs or _cores(os.environ.get("CELLPRIOR_N_JOBS") or None)

    @n_jobs.setter
    def n_jobs(self, n_jobs: int | None) -> None:
        self._n_jobs = _cores(n_jobs)

    def __repr__(self) -> str:
        return (
            f"Settings(cache_dir={str(self.cache_dir)!r}, offline={self.offline}, mirror={self.mirror!r}, "
            f"n_jobs={self.n_jobs})"
        )


def _cores(n_jobs: int | str | None) -> int | None:
    try:
        n_cores = None if n_jobs is None else int(n_jobs)
    except ValueError:
        n_cores = 0
    if n_cores is not None and n_cores < 1:
        msg = f"n_jobs={n_jobs!r}: a whole number of cores from 1 on is needed, or None."
        raise ValueError(msg)
    return n_cores


settings = Settings()
