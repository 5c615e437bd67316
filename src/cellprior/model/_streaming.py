"""An embedding that goes to disk as it is computed, and goes on where it was cut short."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anndata as ad
import pandas as pd
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from cellprior._compat import new_array, new_group, with_nullable_strings
from cellprior._obs import writable
from cellprior.model._files import write_file
from cellprior.model._on_disk import digest

if TYPE_CHECKING:
    from cellprior.model._embedding import Part

CHUNK_BYTES = 2**20  # of the array on disk
MIN_CHUNK_ROWS = 1024
BAR = "{l_bar}{bar}| {n:,.0f} of {total:,.0f} cells [{elapsed}<{remaining}, {rate_fmt}]"


class LatentStore:
    """A folder ``<out>.part`` that becomes the zarr folder ``<out>`` once all units are in it.

    It holds ``store``, an AnnData in zarr; ``finished``, the numbers of the units that are in it, a line each; and
    ``state.json``, what is embedded and how it is cut. In use, nobody else may write to it.

    Parameters
    ----------
    out
        Zarr folder to be.
    fingerprint
        Of what is embedded, by part.
    overwrite
        Replace what is there of another fingerprint.

    Raises
    ------
    FileExistsError
        If ``out`` is there and is none of ours, or it or its beginning has another fingerprint.
    RuntimeError
        If another process is writing to it.
    """

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], *, overwrite: bool) -> None:
        self.out, self.folder = out, out.with_name(out.name + ".part")
        self.fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))  # as it will be read
        self.overwrite = overwrite
        self.state: dict[str, Any] = {}
        self.complete = out.exists() and self._is_same(out, _noted(out).get("fingerprint"))

    def __enter__(self) -> LatentStore:
        with writing(self.out):
            self.folder.mkdir(exist_ok=True)
            self._lock = FileLock(self.folder / "lock", timeout=0)
            try:
                self._lock.acquire()
            except Timeout as error:
                msg = f"Another process is writing {self.folder}. Wait for it, or choose another folder."
                raise RuntimeError(msg) from error
        try:
            path = self.folder / "state.json"
            if path.exists():
                self.state = json.loads(path.read_text(encoding="utf-8"))
                if not self._is_same(self.folder, self.state["fingerprint"]):
                    self.state = {}
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()
        self.tidy()

    def tidy(self) -> None:
        """Remove what is left once ``out`` has its name; not the beginning of another embedding."""
        if self.complete and self.folder.exists() and not (self.folder / "store").exists():
            shutil.rmtree(self.folder)

    def _is_same(self, path: Path, found: Mapping[str, Any] | None) -> bool:
        """Whether what is there is what is asked for; refuses what is not, unless it may be overwritten."""
        if found is None:
            msg = f"{path} is there already, and is not an embedding of cellprior: choose another folder."
            raise FileExistsError(msg)
        names = sorted(self.fingerprint.keys() | found.keys())
        other = [name for name in names if self.fingerprint.get(name) != found.get(name)]
        if other and not self.overwrite:
            what = "holds an embedding" if path == self.out else "is the beginning of an embedding"
            shown = "; ".join(
                f"{name}: {found.get(name)}, now {self.fingerprint.get(name)}" for name in other
            )
            msg = (
                f"{path} {what} that differs in {', '.join(other)} ({shown}). To replace it: overwrite=True. To keep "
                "it, choose another folder."
            )
            raise FileExistsError(msg)
        return not other

    def begin(
        self, *, key: str, width: int, obs: pd.DataFrame, record: Mapping[str, Any], **state: Any
    ) -> None:
        """Write all but the latents, unless an earlier run has; ``state`` says how the cells are cut into units."""
        with writing(self.out):
            self._journal = self.folder / "finished"
            if not self.state:
                for name in ("state.json", "finished"):
                    (self.folder / name).unlink(missing_ok=True)
                shutil.rmtree(self.folder / "store", ignore_errors=True)
                root = new_group(self.folder / "store")
                columns = [name for name in obs.columns if not str(name).startswith("_scvi_")]
                noted = {"cellprior": {key: dict(record)}}
                with with_nullable_strings():
                    ad.io.write_elem(root, "/", ad.AnnData(obs=writable(obs[columns]), uns=noted))
                n_rows = min(max(CHUNK_BYTES // (4 * width), MIN_CHUNK_ROWS), max(len(obs), 1))
                new_array(root["obsm"], key, shape=(len(obs), width), chunks=(n_rows, width))
                self.state = {"fingerprint": self.fingerprint, **state}
                write_file(self.folder / "state.json", json.dumps(self.state).encode())
            self.array = _open(self.folder / "store", mode="r+")["obsm"][key]

    def finished(self) -> set[int]:
        """Units that an earlier run has finished."""
        if not self._journal.exists():
            return set()
        *lines, rest = self._journal.read_text(encoding="utf-8").split("\n")
        if rest:  # of a line that was being written
            self._journal.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return {int(line) for line in lines}

    def write(self, part: Part) -> None:
        """Write some cells; a unit counts as finished once its last cells are written."""
        with writing(self.out):
            first, last = int(part.cells[0]), int(part.cells[-1])
            if last - first == len(part.cells) - 1:
                self.array[first : last + 1] = part.latent
            else:
                self.array.oindex[part.cells, :] = part.latent
            if part.last:
                with self._journal.open("a", encoding="utf-8") as journal:
                    journal.write(f"{part.unit}\n")

    def close(self) -> None:
        """Mark the zarr folder complete, and give it its name."""
        with writing(self.out):
            root = _open(self.folder / "store", mode="r+")
            root.attrs["cellprior"] = {"complete": True, "fingerprint": self.fingerprint}
            if self.out.exists():
                self.out.rename(self.folder / "replaced")
            (self.folder / "store").rename(self.out)
            self.complete = True


def _noted(path: Path) -> dict[str, Any]:
    """What we have noted in a zarr folder."""
    try:
        return dict(_open(path, mode="r").attrs).get("cellprior", {})
    except (OSError, ValueError, KeyError):  # no zarr at all
        return {}


def _open(path: Path, *, mode: Literal["r", "r+"]) -> Any:
    import zarr

    return zarr.open_group(path, mode=mode)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Say what cannot be written, why, and that nothing is lost.

    Raises
    ------
    OSError
        With the name of ``out``.
    """
    try:
        yield
    except OSError as error:
        why = {errno.ENOSPC: "the disk is full", errno.EROFS: "the disk is read-only"}.get(
            error.errno or 0, str(error.strerror or error)
        )
        msg = f"{out} cannot be written: {why}. What is done is kept; the same call goes on from there."
        raise OSError(error.errno, msg) from error


def stream(
    model: Any,
    out: str | os.PathLike[str],
    *,
    key: str,
    params: Mapping[str, Any],
    batch_size: int | None = None,
    hidden: str | os.PathLike[str] = "memory",
    overwrite: bool = False,
    progress: bool = True,
    client: Any = None,
) -> None:
    """Embed the attached data of a model into a zarr folder; see :func:`cellprior.tl.embed`.

    Parameters
    ----------
    model
        With ``_embedding`` and ``_fingerprint``.
    out
        The folder.
    key
        Of ``obsm``.
    params
        Arguments that change the result.
    batch_size, hidden, overwrite, progress, client
        See :func:`cellprior.tl.embed`.
    """
    out = Path(out)
    refuse_impossible(model, out, hidden=hidden, client=client)
    record = model.provenance()
    fingerprint = {
        **model._fingerprint(),
        "weights": digest(*(tensor.float().cpu().numpy() for tensor in model.module.state_dict().values())),
        "parameters": {"key": key, **params},
        "cellprior": record["cellprior_version"],
    }
    store = LatentStore(out, fingerprint, overwrite=overwrite)
    if store.complete:
        store.tidy()
        return
    with store:
        unit_size = store.state.get("batch_size")
        embedding = model._embedding(batch_size=batch_size or unit_size, unit_size=unit_size, client=client)
        record = {name: value for name, value in {**record, "params": params}.items() if value is not None}
        store.begin(
            key=key,
            width=embedding.width,
            obs=embedding.obs,
            record=record,
            batch_size=embedding.size.n_cells,
        )
        finished = store.finished()
        pending = [unit for unit in range(len(embedding.units)) if unit not in finished]
        sizes = [len(embedding.units[unit]) for unit in pending]
        refuse_full(out.parent, 4 * embedding.width * sum(sizes))
        if hidden != "memory":
            refuse_full(Path(hidden), 4 * model.module.n_hidden * max(sizes, default=0))
            name = digest([json.dumps(store.fingerprint), out.resolve()])
            embedding.scratch = Path(hidden) / f"cellprior-{name}"
        _fill(store, embedding, pending, progress)
        store.close()
        if embedding.scratch is not None:
            shutil.rmtree(embedding.scratch, ignore_errors=True)


def _fill(store: LatentStore, embedding: Any, pending: list[int], progress: bool) -> None:
    """Embed the cells of some units, under a bar that counts all cells."""
    n_stages, n_pending = embedding.n_stages, sum(len(embedding.units[unit]) for unit in pending)
    with tqdm(
        total=n_stages * embedding.n_cells,
        initial=n_stages * (embedding.n_cells - n_pending),
        unit=" cells",
        unit_scale=1 / n_stages,
        bar_format=BAR,
        disable=not progress,
    ) as bar:
        embedding.progress = bar.update
        for part in embedding.parts(pending):
            store.write(part)
            if part.last and embedding.scratch is not None:
                shutil.rmtree(embedding.scratch / str(part.unit), ignore_errors=True)


def refuse_impossible(model: Any, out: Path, *, hidden: str | os.PathLike[str], client: Any) -> None:
    """Refuse arguments of :func:`stream` that cannot be meant.

    Raises
    ------
    FileNotFoundError
        If there is no folder for ``out``.
    ValueError
        If nobody has hidden states to keep in files.
    """
    if not out.parent.is_dir():
        msg = f"There is no folder {out.parent} to write {out.name} into."
        raise FileNotFoundError(msg)
    if hidden == "memory":
        return
    if not model._sentences:
        msg = f"hidden={os.fspath(hidden)!r}: a {type(model).__name__} looks at one cell at a time and holds no others."
        raise ValueError(msg)
    if client is not None:
        msg = f"hidden={os.fspath(hidden)!r}: on a cluster, the workers hold the hidden states; leave it out."
        raise ValueError(msg)


def refuse_full(folder: Path, n_bytes: int) -> None:
    """Refuse to begin what will not fit.

    Raises
    ------
    OSError
        With what is needed and what is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        msg = f"{folder} has {free / 1e9:.1f} GB free, and {n_bytes / 1e9:.1f} GB are needed."
        raise OSError(errno.ENOSPC, msg)
