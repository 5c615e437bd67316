"""An embedding that goes to disk as it is computed, and goes on where it was cut short."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout

from cellprior._compat import new_array, new_group, with_nullable_strings
from cellprior._obs import writable
from cellprior._outputs import refuse_full, refuse_unwritable, target, write_file
from cellprior.model.data._cells import Cells
from cellprior.model.data._fingerprint import digest
from cellprior.model.data._sources import Sources
from cellprior.model.engine._checksums import row_sums, total
from cellprior.model.engine._dask import ClusterLostError
from cellprior.model.engine._embedding import Embedding
from cellprior.model.engine._sizes import Part

CHUNK_BYTES = 2**20  # of the array on disk
MIN_CHUNK_ROWS = 1024
OURS = re.compile(
    r"lock|store|replaced|(state\.json|finished)(\..*\.part)?"
)  # what a folder <out>.part holds
LINE = re.compile(r"(\d+) ([0-9a-f]{16})")  # of the journal
DEBRIS = re.compile(r".*\.[0-9a-f]{32}\.partial")  # what zarr leaves if it is killed


class LatentStore:
    """A folder ``<out>.part`` that becomes the zarr folder ``<out>`` once all units are in it.

    It holds ``store``, an AnnData in zarr; ``finished``, the number of each unit that is in it and the sum of its rows;
    and ``state.json``, what is embedded and how it is cut. In use, nobody else may write to it.

    Parameters
    ----------
    out
        Zarr folder to be.
    fingerprint
        Of what is embedded, by part.
    overwrite
        Begin anew, and replace what is there.

    Raises
    ------
    FileExistsError
        If ``out`` is there and is none of ours, or it or its beginning has another fingerprint or is damaged.
    RuntimeError
        If another process is writing to it.
    """

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], *, overwrite: bool) -> None:
        self.out, self.folder = out, out.with_name(out.name + ".part")
        self.fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))  # as it will be read
        self.key: str = self.fingerprint["parameters"]["key"]
        self.overwrite = overwrite
        self.state: dict[str, Any] = {}
        self.journal: dict[int, str] = {}
        self.complete = self._is_complete()

    def __enter__(self) -> LatentStore:
        if os.path.lexists(self.folder):
            self._refuse_foreign()
        with self.writing():
            self.folder.mkdir(exist_ok=True)
            self._lock = FileLock(self.folder / "lock", timeout=0)
            try:
                self._lock.acquire()
                alone = (self.folder / "lock").exists()  # else it was removed with the folder meanwhile
            except Timeout:
                alone = False
        if not alone:
            msg = f"Another process is writing {self.folder}. Wait for it, or choose another folder."
            raise RuntimeError(msg)
        try:
            self.complete = self._is_complete()  # which another process may have made so
            self.state = {} if self.complete else self._found()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        # not the beginning of another embedding
        done = self.complete and not (self.folder / "store").exists()
        if done:  # before the lock is released: what another process begins then is not removed
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()
        if done and os.name == "nt":  # which does not remove an open file
            shutil.rmtree(self.folder, ignore_errors=True)

    # what is there

    def _is_complete(self) -> bool:
        """Whether ``out`` is what is asked for; refuses what is not, unless it may be replaced."""
        if not os.path.lexists(self.out):
            return False
        found = _noted(self.out)
        if "fingerprint" not in found:
            msg = f"{self.out} is there already, and is not an embedding of cellprior: choose another folder."
            raise FileExistsError(msg)
        if self.overwrite:
            return False
        if found["fingerprint"] != self.fingerprint:
            begun = self._read_state() or {}
            if begun.get("fingerprint") == self.fingerprint and begun["replaces"] == found["fingerprint"]:
                return False
            self._refuse_other(self.out, "holds an embedding", found["fingerprint"])
        if found.get("sum") != self._sum_of(self.out):
            msg = (
                f"{self.out} is complete, but damaged: its numbers are not those that were written. To compute them "
                "again: overwrite=True."
            )
            raise FileExistsError(msg)
        return True

    def _sum_of(self, path: Path) -> str | None:
        """Sum of all rows of a complete embedding, None if they cannot be read."""
        try:
            array = _open(path, mode="r")["obsm"][self.key]
            size = max(array.chunks[0], 1)
            starts = range(0, array.shape[0], size)
            parts = [
                row_sums(array[i : i + size], np.arange(i, min(i + size, array.shape[0]))) for i in starts
            ]
        except Exception:  # noqa: BLE001  each codec has its own way to say that a chunk is damaged
            return None
        return total(np.concatenate([np.zeros(0, dtype=np.uint64), *parts]))

    def _refuse_foreign(self) -> None:
        """Refuse a folder ``<out>.part`` that somebody else has made."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else [""]
        if any(not OURS.fullmatch(name) for name in names):
            msg = (
                f"{self.folder} is there already, and is not the beginning of an embedding: {self.out.name} is called "
                "so until it is complete. Rename it, or choose another folder."
            )
            raise FileExistsError(msg)

    def _found(self) -> dict[str, Any]:
        """State of what an earlier run has begun, as far as it can be gone on with."""
        if (old := self.folder / "replaced").exists() and not self.out.exists():  # killed between two renames
            old.rename(self.out)
        state = self._read_state()
        if self.overwrite or state == {}:
            return {}
        if state is None:
            msg = (
                f"{self.folder} is the beginning of an embedding, and damaged: state.json cannot be read. To begin "
                "anew: overwrite=True. To keep it, choose another folder."
            )
            raise FileExistsError(msg)
        if state["fingerprint"] != self.fingerprint:
            self._refuse_other(self.folder, "is the beginning of an embedding", state["fingerprint"])
        try:
            sound = list(self._array().shape) == state["shape"]
        except Exception:  # noqa: BLE001  zarr has many ways to say that something is missing
            sound = False
        if not sound:
            msg = f"{self.folder} is damaged: there is no array in it to go on with. It is begun anew."
            warnings.warn(msg, UserWarning, stacklevel=5)
            return {}
        return state

    def _read_state(self) -> dict[str, Any] | None:
        """What ``state.json`` says; nothing if there is none, and None if it is damaged."""
        try:
            state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
            return state if state.pop("digest") == digest([json.dumps(state)]) else None
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (ValueError, KeyError, AttributeError, TypeError):
            return None

    def _refuse_other(self, path: Path, what: str, found: Mapping[str, Any]) -> None:
        names = sorted(self.fingerprint.keys() | found.keys())
        other = [name for name in names if self.fingerprint.get(name) != found.get(name)]
        shown = "; ".join(f"{name}: {found.get(name)}, now {self.fingerprint.get(name)}" for name in other)
        msg = (
            f"{path} {what} that differs in {', '.join(other)} ({shown}). To replace it: overwrite=True. To keep "
            "it, choose another folder."
        )
        raise FileExistsError(msg)

    # what is written

    def begin(
        self,
        *,
        units: Sequence[np.ndarray],
        width: int,
        obs: pd.DataFrame,
        record: Mapping[str, Any],
        **state: Any,
    ) -> None:
        """Write all but the latents, and look at those of an earlier run.

        ``obs`` and ``record`` take the place of those of an earlier run; ``state`` says how the cells are cut into
        units.
        """
        self.units, self.sums = units, np.zeros(len(obs), dtype=np.uint64)
        columns = [name for name in obs.columns if not str(name).startswith("_scvi_")]
        about = ad.AnnData(obs=writable(obs[columns]), uns={"cellprior": {self.key: dict(record)}})
        with self.writing(), with_nullable_strings():
            if not self.state:
                self.discard()
                root = new_group(self.folder / "store")
                ad.io.write_elem(root, "/", about)
                n_rows = min(max(CHUNK_BYTES // (4 * width), MIN_CHUNK_ROWS), max(len(obs), 1))
                new_array(root["obsm"], self.key, shape=(len(obs), width), chunks=(n_rows, width))
                begun = {
                    "fingerprint": self.fingerprint,
                    "shape": [len(obs), width],
                    "replaces": _noted(self.out).get("fingerprint"),
                    **state,
                }
                text = json.dumps({**begun, "digest": digest([json.dumps(begun)])})
                write_file(self.folder / "state.json", text.encode())
                self.state = begun
            else:
                for path in [*(self.folder / "store").rglob("*.partial"), *self.folder.glob("*.part")]:
                    if path.is_file() and (path.parent == self.folder or DEBRIS.fullmatch(path.name)):
                        path.unlink()
                root = _open(self.folder / "store", mode="r+")
                for name in ("obs", "uns"):
                    ad.io.write_elem(root, name, getattr(about, name))
            self.array = self._array()
            self.journal = self._read_journal()
        if self.journal and (damaged := self._drop_unsound()):
            msg = f"{self.folder} is damaged: {damaged:,} cells are not as they were written, and are embedded again."
            warnings.warn(msg, UserWarning, stacklevel=4)

    def discard(self) -> None:
        """Remove what was begun."""
        for name in ("state.json", "finished"):
            (self.folder / name).unlink(missing_ok=True)
        if (self.folder / "store").exists():
            shutil.rmtree(self.folder / "store")
        self.state, self.journal = {}, {}

    def _array(self) -> Any:
        return _open(self.folder / "store", mode="r+")["obsm"][self.key]

    def _read_journal(self) -> dict[int, str]:
        """Units that an earlier run has finished, and their sums; not lines that are torn or damaged."""
        path = self.folder / "finished"
        text = path.read_bytes().decode(errors="replace") if path.exists() else ""
        lines = [match for line in text.split("\n")[:-1] if (match := LINE.fullmatch(line))]
        return {unit: match[2] for match in lines if (unit := int(match[1])) < len(self.units)}

    def _drop_unsound(self) -> int:
        """Forget units whose rows are not as they were written, and write the journal again; number of their cells."""
        with self.writing():
            self._read_sums()
            damaged = [unit for unit, noted in self.journal.items() if self._sum(unit) != noted]
            for unit in damaged:
                del self.journal[unit]
            lines = "".join(f"{unit} {noted}\n" for unit, noted in self.journal.items())
            (self.folder / "finished").write_text(lines, encoding="utf-8")
        return sum(len(self.units[unit]) for unit in damaged)

    def _read_sums(self) -> None:
        """Sums of the rows as they are on disk; a chunk that is damaged is removed."""
        size = self.array.chunks[0]
        for i, start in enumerate(range(0, len(self.sums), size)):
            rows = np.arange(start, min(start + size, len(self.sums)))
            try:
                self.sums[rows] = row_sums(self.array[start : start + size], rows)
            except OSError:
                raise
            except Exception:  # noqa: BLE001  each codec has its own
                (self.folder / "store" / "obsm" / self.key / f"{i}.0").unlink(missing_ok=True)
                self.sums[rows] = 0

    def _sum(self, unit: int) -> str:
        return total(self.sums[self.units[unit]])

    def write(self, part: Part) -> None:
        """Write some cells; a unit counts as finished once its last cells are written."""
        with self.writing():
            first, last = int(part.cells[0]), int(part.cells[-1])
            if last - first == len(part.cells) - 1:
                self.array[first : last + 1] = part.latent
            else:
                self.array.oindex[part.cells, :] = part.latent
            self.sums[part.cells] = row_sums(part.latent, part.cells)
            if part.last:
                self.journal[part.unit] = self._sum(part.unit)
                with (self.folder / "finished").open("a", encoding="utf-8") as journal:
                    journal.write(f"{part.unit} {self.journal[part.unit]}\n")

    def close(self) -> None:
        """See that all is there as it was written, mark the zarr folder complete, and give it its name.

        Raises OSError if the disk does not give what it was given.
        """
        if damaged := self._drop_unsound():
            msg = (
                f"{damaged:,} cells are not on the disk as they were written to {self.folder}: the disk is failing, or "
                "somebody else writes there. The same call embeds these again."
            )
            raise OSError(errno.EIO, msg)
        self._is_complete()  # refuses what somebody has put there meanwhile
        with self.writing():
            root = _open(self.folder / "store", mode="r+")
            root.attrs["cellprior"] = {
                "complete": True,
                "fingerprint": self.fingerprint,
                "sum": total(self.sums),
            }
            old = self.folder / "replaced"
            if self.out.exists():
                shutil.rmtree(old, ignore_errors=True)
                self.out.rename(old)
            try:
                (self.folder / "store").rename(self.out)
            except OSError:
                if old.exists():
                    old.rename(self.out)
                raise
            self.complete = True

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Say what cannot be written, why, and what is kept.

        Raises OSError, with the name of ``out``.
        """
        try:
            yield
        except OSError as error:
            why = {errno.ENOSPC: "the disk is full", errno.EROFS: "the disk is read-only"}.get(
                error.errno or 0, str(error.strerror or error)
            )
            raise OSError(error.errno, f"{self.out} cannot be written: {why}. {self.way_on}") from error

    @property
    def way_on(self) -> str:
        """What is kept, and how to go on; for a message."""
        if not self.state:
            return "Nothing has been computed."
        return f"What is done is kept; the same call{', without overwrite=True,' * self.overwrite} goes on from there."


def _noted(path: Path) -> dict[str, Any]:
    """What we have noted in a zarr folder."""
    if not path.exists():  # zarr's own error would hold our frames, and so the input, for a while
        return {}
    try:
        return dict(_open(path, mode="r").attrs).get("cellprior", {})
    except (OSError, ValueError, KeyError):  # no zarr at all
        return {}


def _open(path: Path, *, mode: Literal["r", "r+"]) -> Any:
    import zarr

    return zarr.open_group(path, mode=mode)


def stream(
    embed: Callable[..., Embedding],
    cells: Cells,
    out: str | os.PathLike[str],
    *,
    key: str,
    weights: str,
    record: Mapping[str, Any],
    batch_size: int | None = None,
    hidden: str | os.PathLike[str] = "memory",
    overwrite: bool = False,
    progress: bool | None = None,
    client: Any = None,
    source: Path | None = None,
) -> None:
    """Embed cells into a zarr folder; see :func:`cellprior.tl.embed`.

    ``embed`` gives the embedding of all ``cells``, of ``batch_size``, ``unit_size`` and ``client``; ``weights`` is a
    digest of all that can change a number, but for the cells; ``record`` says where the embedding comes from, with
    ``params``, the arguments that change the result; ``source`` is the path that the data come from.
    """
    out = target(Path(out))
    sources = Sources(cells.matrices(), source)
    known = cells.fingerprint()
    fingerprint = {
        **known,
        "weights": weights,
        "parameters": {"key": key, **record["params"]},
        "precision": torch.get_float32_matmul_precision(),
        "cellprior": record["cellprior_version"],
    }
    store = LatentStore(out, fingerprint, overwrite=overwrite)
    sources.refuse_inside(out, store.folder)
    if store.complete and not store.folder.exists():
        return
    with store:
        if store.complete:
            return
        unit_size = store.state.get("batch_size")
        embedding = embed(batch_size=batch_size or unit_size, unit_size=unit_size, client=client)
        store.begin(
            units=embedding.units,
            width=embedding.width,
            obs=embedding.obs,
            record={name: value for name, value in record.items() if value is not None},
            batch_size=embedding.size.n_cells,
        )
        pending = [unit for unit in range(len(embedding.units)) if unit not in store.journal]
        sizes = [len(embedding.units[unit]) for unit in pending]
        refuse_full(out.parent, 4 * embedding.width * sum(sizes))
        if hidden != "memory":
            refuse_full(Path(hidden), 4 * embedding.encoder.module.n_hidden * max(sizes, default=0))
            refuse_unwritable(Path(hidden))
            name = digest([json.dumps(store.fingerprint), out.resolve()])
            embedding.scratch = Path(hidden) / f"cellprior-{name}"
            if overwrite:
                shutil.rmtree(embedding.scratch, ignore_errors=True)
        _fill(store, embedding, pending, sources, progress)
        if sources.changed(every=True) or known != cells.fingerprint():
            store.discard()
            msg = (
                f"{sources.names} has changed while it was read, so that {out} would hold cells of both: what was done "
                "is discarded. Call again when nobody writes to it."
            )
            raise RuntimeError(msg)
        store.close()
        if embedding.scratch is not None:
            shutil.rmtree(embedding.scratch, ignore_errors=True)


def _fill(
    store: LatentStore, embedding: Embedding, pending: list[int], sources: Sources, progress: bool | None
) -> None:
    """Embed the cells of some units, under a bar that counts all cells."""
    n_pending = sum(len(embedding.units[unit]) for unit in pending)
    with embedding.bar(progress, n_done=embedding.n_cells - n_pending):
        try:
            for part in embedding.parts(pending):
                if part.last and sources.changed():
                    msg = (
                        f"{sources.names} was written to, or replaced, while it was read. The units that were finished "
                        f"before are kept in {store.folder}. If the counts are the same, the same call goes on from "
                        "there; else it is refused, and overwrite=True begins anew."
                    )
                    raise RuntimeError(msg)
                store.write(part)
                if part.last and embedding.scratch is not None:
                    shutil.rmtree(embedding.scratch / str(part.unit), ignore_errors=True)
        except ClusterLostError as error:
            msg = f"{error} {store.way_on}"
            raise RuntimeError(msg) from error


def refuse_impossible(name: str, *, sees_others: bool, hidden: str | os.PathLike[str], client: Any) -> None:
    """Refuse arguments of :func:`stream` that cannot be meant, of a model that is called ``name``.

    Raises ValueError if nobody has hidden states to keep in files.
    """
    if hidden == "memory":
        return
    if not sees_others:
        msg = f"hidden={os.fspath(hidden)!r}: a {name} looks at one cell at a time and holds no others."
        raise ValueError(msg)
    if client is not None:
        msg = f"hidden={os.fspath(hidden)!r}: on a cluster, the workers hold the hidden states; leave it out."
        raise ValueError(msg)
