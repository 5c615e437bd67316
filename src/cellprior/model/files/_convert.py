"""Official checkpoints into bundles."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from cellprior.weights import Bundle, InertCheckpoint, WeightsError, sha256, write_bundle
from cellprior.weights._bundle import is_zipped, refuse_packed

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

    from cellprior.model.files._loading import LoadableModel

SHOWN = 40  # names of a pickle in a message


def convert(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    trust: bool = False,
    reference: AnnData | MuData | None = None,
    layer: str | Mapping[str, str | None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the official checkpoint of a model as a bundle, which ``from_pretrained`` loads without its authors' code.

    Checkpoints of CellPLM and scBERT hold tensors and plain values. That of :class:`~cellprior.model.Nicheformer` has
    numbers of NumPy among them; those of scCLIP, for :class:`~cellprior.model.MultiomeCLIP`, are pickles of objects
    from pandas, transformers and argparse. Read in the usual way (``torch.load`` with ``weights_only=False``), such a
    file may run whatever its author put in. That is not done here: every name in it becomes a placeholder, none is
    imported or called, and tensors, gene and peak names are dug out of these. What remains are flaws of Python's own
    unpickler, and numbers that are not what they claim to be; so a file is opened only with ``trust=True``, and
    ``from_pretrained`` never does.

    Parameters
    ----------
    path
        Checkpoint file; beside it, or in the same folder, what its model's ``from_pretrained`` needs.
    folder
        Bundle to write.
    trust
        That you know who made a file that is a pickle.
    reference
        For scCLIP: raw counts of RNA, and better also of ATAC of the same cells. The original divides the expression
        of each gene by its largest in the data set at hand, and stores none; here the largest of these cells, of
        20,000 at most, become a part of the weights. Best are the data that the model was trained on. From cells with
        both modalities it is also found how the modalities are turned together (``center=True``); without, they lie
        apart as in the original.
    layer
        Layer of ``reference`` with the counts, see :func:`cellprior.tl.embed`.
    overwrite
        Replace a bundle that is already there.

    Returns
    -------
    The folder.

    Raises
    ------
    WeightsError
        If the file is a pickle and ``trust`` is off, and then with what can be said of it unopened; or it is damaged,
        of no known model, or names what no checkpoint needs.
    ValueError
        If ``reference`` is needed and missing, or does not have what is needed.
    """
    path = Path(path).expanduser()
    if path.is_file() and is_zipped(path):
        refuse_packed(path)  # before anything is imported for it

    from cellprior.model import MODELS

    for cls in MODELS:
        if path.exists() and cls.recognises(path):
            bundle, file = cls._read_weights(path)
            return _write(cls, bundle, file, [bundle.card] if bundle.card else [], folder, overwrite)
    checkpoint = InertCheckpoint(path)
    if not trust:
        raise WeightsError(_refusal(checkpoint))
    content = checkpoint.content()
    for cls in MODELS:
        if found := cls.from_pickle(checkpoint, content, reference=reference, layer=layer):
            model, notes = found
            if isinstance(model, Bundle):
                from cellprior.model.files._strict import check_fits

                check_fits(cls, model, str(path))
                return _write(cls, model, path, notes, folder, overwrite)
            model.save_pretrained(folder, card=_card(cls, path, notes), overwrite=overwrite)
            return Path(folder)
    msg = f"{path} holds weights of no model that this version knows: {[cls.__name__ for cls in MODELS]}."
    raise WeightsError(msg)


def _write(
    cls: type[LoadableModel],
    bundle: Bundle,
    file: Path,
    notes: Iterable[str],
    folder: str | os.PathLike[str],
    overwrite: bool,
) -> Path:
    """What was read of an official checkpoint, as a bundle."""
    return write_bundle(
        folder,
        state_dict=bundle.state_dict,
        config=bundle.config,
        genes=bundle.genes,
        card=_card(cls, file, notes),
        overwrite=overwrite,
    )


def _card(cls: type[LoadableModel], file: Path, notes: Iterable[str]) -> str:
    lines = [
        f"# {cls.__name__}",
        f"Converted by cellprior {version('cellprior')} from `{file.name}` (sha256 {sha256(file)}). Its licence, and "
        "what it was trained on, are those of that file.",
        *notes,
    ]
    return "\n\n".join(lines) + "\n"


def _refusal(checkpoint: InertCheckpoint) -> str:
    """Why a pickle is not opened, and what can be said of it."""
    path, names = checkpoint.path, checkpoint.globals
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    listed = "\n".join(f"  {name}" for name in [*names[:SHOWN], *more])
    advice = (
        "With all of these as placeholders, so that none is imported or called, it can be converted. If you know who "
        "made it, say so: --i-trust-this-file (trust=True)."
    )
    if checkpoint.suspicious:
        advice = (
            f"No checkpoint needs {', '.join(checkpoint.suspicious)}: it will not be converted. Delete it."
        )
    return (
        f"{path} is a pickle, and a pickle is a program: reading it in the usual way (torch.load with "
        "weights_only=False) runs whatever its author put in. It was not read. It has "
        f"{path.stat().st_size / 1e6:,.1f} MB, {checkpoint.n_tensors} tensors, and names\n{listed}\n{advice}"
    )
