"""Where files are kept, whether and from where they may be fetched, and how much is said."""

from __future__ import annotations

import os
from pathlib import Path

_YES = frozenset({"1", "true", "yes", "on"})
_NO = frozenset({"0", "false", "no", "off"})


class Settings:
    """Six settings, each with an environment variable behind it.

    The environment is read at every access. A value that has been assigned wins over the environment
    until `None` is assigned in its place.

    Examples
    --------
    >>> import cellprior as cp
    >>> cp.settings.cache_dir = "/scratch/me/cellprior"
    >>> cp.settings.offline = True
    >>> cp.settings.verbosity = 0  # warnings and errors only
    """

    def __init__(self) -> None:
        self._cache_dir: Path | None = None
        self._offline: bool | None = None
        self._mirror: str | None = None
        self._n_jobs: int | None = None
        self._verbosity: int | None = None
        self._progress: bool | None = None

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
        return bool(_yes_or_no("CELLPRIOR_OFFLINE", "1 (no network) or 0"))

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
        """Cores that cells are embedded and a report is made on; `CELLPRIOR_N_JOBS`, or else `None`.

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

    @property
    def verbosity(self) -> int:
        """How much is said on the way; `CELLPRIOR_VERBOSITY`, or else 1.

        0: warnings and errors only. 1: a line where something long begins and ends, and bars of progress. 2: also
        what Lightning and scvi-tools say of devices and of themselves. Warnings are Python's, and follow its filters.

        Raises
        ------
        ValueError
            If it is not 0, 1 or 2.
        """
        if self._verbosity is not None:
            return self._verbosity
        return _level(
            os.environ.get("CELLPRIOR_VERBOSITY") or 1, "The environment variable CELLPRIOR_VERBOSITY"
        )

    @verbosity.setter
    def verbosity(self, verbosity: int | None) -> None:
        self._verbosity = None if verbosity is None else _level(verbosity, "settings.verbosity")

    @property
    def progress(self) -> bool:
        """Whether steps of more than a few seconds draw a bar; `CELLPRIOR_PROGRESS`, or else unless `verbosity` is 0.

        ``progress=`` of a function wins over it.

        Raises
        ------
        ValueError
            If `CELLPRIOR_PROGRESS` is neither a yes (1, true, yes, on) nor a no (0, false, no, off).
        """
        if self._progress is not None:
            return self._progress
        answer = _yes_or_no("CELLPRIOR_PROGRESS", "1 (draw bars) or 0")
        return self.verbosity > 0 if answer is None else answer

    @progress.setter
    def progress(self, progress: bool | None) -> None:
        self._progress = None if progress is None else bool(progress)

    def __repr__(self) -> str:
        return (
            f"Settings(cache_dir={str(self.cache_dir)!r}, offline={self.offline}, mirror={self.mirror!r}, "
            f"n_jobs={self.n_jobs}, verbosity={self.verbosity}, progress={self.progress})"
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


def _yes_or_no(variable: str, values: str) -> bool | None:
    """Answer of an environment variable; None if it is not set."""
    answer = os.environ.get(variable, "")
    if not answer.strip():
        return None
    if answer.strip().lower() in _YES:
        return True
    if answer.strip().lower() in _NO:
        return False
    msg = (
        f"The environment variable {variable} is {answer!r}, which is neither yes nor no. "
        f"Set it to {values}, or unset it."
    )
    raise ValueError(msg)


def _level(value: int | str, what: str) -> int:
    if str(value).strip() not in ("0", "1", "2"):
        msg = (
            f"{what} is {value!r}: set it to 0 (warnings and errors only), 1 (the default) or 2 (everything)."
        )
        raise ValueError(msg)
    return int(value)


settings = Settings()
