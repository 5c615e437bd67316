"""Official checkpoints into bundles."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cellprior.weights import Bundle, InertCheckpoint, WeightsError, sha256, write_bundle
from cellprior.weights._bundle import is_zipped, refuse_packed

SHOWN = 40  # names of a pickle in a message


def convert(
    models: Callable[[], Iterable[type[Any]]],
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    trust: bool,
    reference: Any,
    layer: str | Mapping[str, str | None] | None,
    overwrite: bool,
) -> Path:
    """See :func:`cellprior.model.convert`; ``models`` gives the classes, which are imported for it."""
    path = Path(path).expanduser()
    if path.is_file() and is_zipped(path):
        refuse_packed(path)  # before anything is imported for it

    classes = list(models())
    for cls in classes:
        if path.exists() and cls.recognises(path):
            bundle, file = cls._read_weights(path)
            return _write(cls, bundle, file, [bundle.card] if bundle.card else [], folder, overwrite)
    checkpoint = InertCheckpoint(path)
    if not trust:
        raise WeightsError(_refusal(checkpoint))
    content = checkpoint.content()
    for cls in classes:
        if found := cls.from_pickle(checkpoint, content, reference=reference, layer=layer):
            model, notes = found
            if isinstance(model, Bundle):
                from cellprior.model.files._strict import check_fits  # with which comes PyTorch

                check_fits(cls, model, str(path))
                return _write(cls, model, path, notes, folder, overwrite)
            model.save_pretrained(folder, card=_card(cls, path, notes), overwrite=overwrite)
            return Path(folder)
    msg = f"{path} holds weights of no model that this version knows: {[cls.__name__ for cls in classes]}."
    raise WeightsError(msg)


def _write(
    cls: type[Any],
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


def _card(cls: type[Any], file: Path, notes: Iterable[str]) -> str:
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
