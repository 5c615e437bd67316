"""Command line: ``cellprior check | list | card | download | embed | annotate | convert | evaluate | demo``."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellprior._terminal import Signals, complain, say, warnings_in_words
from cellprior.settings import settings

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData


# whose messages are written for users; of others, the name says something too
IN_WORDS = (ValueError, KeyError, OSError, RuntimeError, TypeError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0; or 1 with a message on stderr; or, if it was stopped, 128 and the number of the signal: 130 after Ctrl-C, 143
    after SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    name = f"cellprior {args.command}"
    with warnings_in_words(name), _as_asked(args), Signals() as signals:
        try:
            args.run(args)
        except BaseException as error:
            if signals.caught is not None:  # whatever became of the exception on its way
                how = "interrupted" if signals.caught == signal.SIGINT else "asked to end"
                complain(f"{name}: {how}; {_way_on(args, argv)}")
                return 128 + signals.caught
            if getattr(args, "debug", False) or not isinstance(error, Exception):
                raise
            complain(f"{name}: {_in_words(error)}")
            return 1
    return 0


@contextmanager
def _as_asked(args: argparse.Namespace) -> Iterator[None]:
    """How much is said, as the arguments of this command have it."""
    before = settings._verbosity, settings._progress
    if args.quiet or args.verbose:
        settings.verbosity = 0 if args.quiet else 2
    if args.progress is not None:
        settings.progress = args.progress
    try:
        yield
    finally:
        settings._verbosity, settings._progress = before


def _in_words(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    if isinstance(error, OSError) and error.strerror and error.filename is None:  # without "[Errno 28]"
        return error.strerror
    if isinstance(error, IN_WORDS) and str(error):
        return str(error)
    what = "not enough memory" if isinstance(error, MemoryError) else type(error).__name__
    return f"{what}{f': {error}' if str(error) else ''} (--debug shows where)"


def _way_on(args: argparse.Namespace, argv: Sequence[str]) -> str:
    """What is kept of a command that was stopped, and how to go on."""
    command = shlex.join(["cellprior", *argv])
    if args.command == "embed" and _streams(args.output):
        part = Path(f"{os.path.realpath(args.output)}.part")
        if (part / "state.json").exists():
            command = shlex.join(["cellprior", *(word for word in argv if word != "--overwrite")])
            return f"the same command goes on from there, and what is done is kept in {part.name}: {command}"
    if args.command == "annotate" and args.reference and args.save and (args.save / "config.json").exists():
        return (
            f"what was learned is kept: cellprior annotate {args.input} {args.output} --weights {args.save}"
        )
    if args.command == "download":
        return f"the same command goes on, and files that are whole are kept: {command}"
    return f"nothing was written, and the same command begins anew: {command}"


def _parser() -> argparse.ArgumentParser:
    from importlib.metadata import version

    parser = argparse.ArgumentParser(
        prog="cellprior", description="Pretrained single-cell models for scverse."
    )
    parser.add_argument("--version", action="version", version=version("cellprior"))
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("check", help="say what is in a file, and which command comes next")
    command.add_argument("input", type=Path, help="h5ad or h5mu file, or zarr folder")
    command.set_defaults(run=_check)

    command = commands.add_parser("list", help="list the weights and gene tables that can be had")
    command.set_defaults(run=_list)

    command = commands.add_parser("card", help="print what is known of some weights")
    command.add_argument("name", help="registry name")
    command.set_defaults(run=_card)

    command = commands.add_parser("download", help="download weights or a gene table into the cache")
    command.add_argument("name", nargs="+", help="registry name")
    command.set_defaults(run=_download)

    command = commands.add_parser("embed", help="embed the cells of an h5ad or h5mu file, or a zarr folder")
    command.add_argument(
        "input",
        type=Path,
        help="h5ad file, or h5mu file with RNA and ATAC; or zarr folder; raw counts",
    )
    command.add_argument(
        "output",
        type=Path,
        help="file to write, of the same kind; or <name>.zarr, to stream, and to go on if cut short",
    )
    command.add_argument(
        "--weights",
        required=True,
        help="registry name, bundle folder, official checkpoint file or its address",
    )
    command.add_argument("--known-hash", help="sha256 that the checkpoint file or the whole folder must have")
    command.add_argument(
        "--layer", help="layer with raw counts (default: X); of an h5mu file also rna=NAME,atac=NAME"
    )
    command.add_argument("--modalities", help="names of the modalities in an h5mu file: rna=NAME,atac=NAME")
    command.add_argument("--gene-key", help="column of var with gene names (default: found by itself)")
    command.add_argument("--batch-key", help="column of obs with the batch of each cell")
    command.add_argument(
        "--setup",
        metavar="NAME=VALUE",
        action="append",
        type=_pair,
        default=[],
        help="what the model's setup takes besides, such as assay_key=assay for Nicheformer; may be repeated",
    )
    command.add_argument("--key-added", help="key in obsm (default: the model's, such as X_cellplm)")
    command.add_argument("--batch-size", type=int, help="cells in memory at a time; never changes the result")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what is at the output, and begin anew; an output that is the input needs no leave",
    )
    command.add_argument(
        "--hidden", default="memory", help="to stream CellPLM: folder for hidden states (default: memory)"
    )
    command.set_defaults(run=_embed)

    command = commands.add_parser(
        "annotate", help="name the cells of an h5ad file, after a labelled reference or by what weights know"
    )
    command.add_argument("input", type=Path, help="h5ad file with raw counts")
    command.add_argument("output", type=Path, help="h5ad file to write")
    command.add_argument(
        "--weights", required=True, help="as of embed; without --reference, weights that have learned labels"
    )
    command.add_argument("--known-hash", help="as of embed")
    command.add_argument("--reference", type=Path, help="h5ad file with raw counts and labels, to learn from")
    _labels_key(command, "column of the reference's obs with cell types")
    command.add_argument("--layer", help="layer with raw counts (default: X); raw for adata.raw")
    command.add_argument("--reference-layer", help="that of the reference, if it is another; X for X")
    command.add_argument(
        "--gene-key", help="column of var with gene names, in both (default: found by itself)"
    )
    command.add_argument("--batch-key", help="column of obs with the batch of each cell")
    command.add_argument("--reference-batch-key", help="that of the reference, if it is another")
    command.add_argument(
        "--setup", metavar="NAME=VALUE", action="append", type=_pair, default=[], help="as of embed"
    )
    command.add_argument(
        "--unlabeled",
        help="label of the reference that stands for none, and name of rejected cells (unknown)",
    )
    command.add_argument(
        "--reject",
        type=float,
        help="share that may be called unknown or be wrong, such as 0.1 (default: what the weights were saved with)",
    )
    command.add_argument(
        "--trainable", help="part of the network that learns, besides the head (default: last)"
    )
    command.add_argument("--max-epochs", type=int, help="passes over the reference, at most (default: 100)")
    command.add_argument("--key-added", help="column of obs (default: the model's, such as cellplm_label)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    command.add_argument("--save", type=Path, help="folder for the weights that have learned the labels")
    command.add_argument(
        "--overwrite", action="store_true", help="replace the output, if it is not the input"
    )
    command.set_defaults(run=_annotate)

    command = commands.add_parser(
        "convert", help="make a bundle of an official checkpoint, without running it"
    )
    command.add_argument("input", type=Path, help="checkpoint of CellPLM, scBERT, scCLIP or Nicheformer")
    command.add_argument("output", type=Path, help="folder to write")
    command.add_argument(
        "--i-trust-this-file",
        action="store_true",
        help="you know who made it: needed for a pickle of objects, as scCLIP's and Nicheformer's are: a program",
    )
    command.add_argument(
        "--reference",
        type=Path,
        help="h5mu or h5ad file with raw counts, for scCLIP: the cells whose largest expression RNA is scaled by",
    )
    command.add_argument(
        "--layer", help="layer of the reference with raw counts (default: X), or rna=NAME,atac=NAME"
    )
    command.add_argument("--overwrite", action="store_true", help="replace a bundle that is already there")
    command.set_defaults(run=_convert)

    command = commands.add_parser("evaluate", help="does a pretrained model help on your data? a report")
    command.add_argument("input", type=Path, help="h5ad file with raw counts and labels")
    _labels_key(command, "column of obs with cell types", required=True)
    command.add_argument(
        "--weights", action="append", default=[], help="weights to evaluate; may be repeated"
    )
    command.add_argument("--embedding", action="append", default=[], help="key of obsm to evaluate; likewise")
    command.add_argument(
        "--batch-key", help="column of obs with the batch or donor: each is held out in turn"
    )
    command.add_argument("--layer", help="layer with raw counts (default: X)")
    command.add_argument(
        "--seeds", type=int, help="random splits (default: 15 of up to 2,000 cells, otherwise 5)"
    )
    command.add_argument(
        "--scvi-epochs", type=int, help="also train scVI, once on all cells, which takes long"
    )
    command.add_argument(
        "--max-cells", type=int, default=20_000, help="of more, some are drawn (default: 20000)"
    )
    command.add_argument("--out", type=Path, help="folder for report.md and report.png, made if needed")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("demo", help="embed 700 blood cells, draw them, and compare with PCA")
    command.add_argument(
        "--out", type=Path, default=Path(), help="folder to write to (default: the current one)"
    )
    command.set_defaults(run=_demo)
    for command in commands.choices.values():
        command.add_argument(
            "--debug", action="store_true", help="show where in the code an error comes from"
        )
        much = command.add_mutually_exclusive_group()
        much.add_argument("-q", "--quiet", action="store_true", help="say nothing but warnings and errors")
        much.add_argument(
            "-v", "--verbose", action="store_true", help="say all, also what other packages say"
        )
        command.add_argument(
            "--progress",
            action=argparse.BooleanOptionalAction,
            help="draw bars (default: for steps of more than a few seconds, unless -q is given)",
        )
    return parser


def _done(text: str) -> None:
    """Say what was written, unless nothing is to be said."""
    if settings.verbosity > 0:
        say(text)


def _labels_key(command: argparse.ArgumentParser, text: str, *, required: bool = False) -> None:
    """The argument as it is called in Python; ``--labels`` is what it was called first."""
    command.add_argument(
        "--labels-key", "--labels", dest="labels", metavar="LABELS_KEY", required=required, help=text
    )


def _check(args: argparse.Namespace) -> None:
    from cellprior import tl

    say(f"{tl.check(args.input)!r}\n")


def _list(args: argparse.Namespace) -> None:
    from cellprior import weights

    say(weights.available().to_string() + "\n")


def _card(args: argparse.Namespace) -> None:
    from cellprior import weights

    say(f"{weights.card(args.name)}\n")


def _download(args: argparse.Namespace) -> None:
    from cellprior import weights

    for name in args.name:
        say(f"{name}: {weights.fetch(name)}\n")


def _embed(args: argparse.Namespace) -> None:
    from cellprior import tl

    is_mudata, streams = args.input.suffix == ".h5mu", _streams(args.output)
    if not streams and is_mudata != (args.output.suffix == ".h5mu"):
        msg = f"{args.input.name} and {args.output.name} are of different kinds. Name both .h5mu, or neither."
        raise ValueError(msg)
    if not streams:
        _refuse_output(args)
    names = ("gene_key", "batch_key", "key_added", "batch_size", "device", "known_hash")
    options = {name: getattr(args, name) for name in names}
    options["layer"] = _by_modality(args.layer) if is_mudata else args.layer
    options["modalities"] = None if args.modalities is None else _by_modality(args.modalities)
    options["setup"] = dict(args.setup)
    if streams:
        options |= {"overwrite": args.overwrite, "hidden": args.hidden}
        tl.embed(args.input, args.weights, out=args.output, **options)
        _done(f"{args.output}: complete\n")
        return
    data = _read(args.input)
    _refuse_full(data, args.output)
    tl.embed(data, args.weights, **options)
    _write(data, args.output, replace=_may_replace(args))
    key, record = next(reversed(data.uns["cellprior"].items()))
    used = "".join(
        f", {record[share]:.1%} of the counts{of} used"
        for share, of in (
            ("counts_share", ""),
            ("rna_counts_share", " of RNA"),
            ("atac_counts_share", " of ATAC"),
        )
        if share in record
    )
    _done(f"{args.output}: obsm[{key!r}], {data.n_obs:,} cells x {data.obsm[key].shape[1]}{used}\n")


def _annotate(args: argparse.Namespace) -> None:
    from cellprior import tl

    _refuse_output(args)
    if (args.reference is None) != (args.labels is None):
        missing = (
            "--reference, an h5ad file of cells" if args.reference is None else "--labels-key, its column"
        )
        msg = f"{missing} with names to learn, is needed too: give --reference and --labels-key together."
        raise ValueError(msg)
    adata: Any = _read(args.input)
    _refuse_full(adata, args.output)
    reference: Any = None if args.reference is None else _read(args.reference)
    names = ["layer", "gene_key", "batch_key", "key_added", "device", "save", "known_hash"]
    names += ["reference_layer", "reference_batch_key"]
    options = {name: getattr(args, name) for name in names}
    for name in ("reject", "trainable", "max_epochs"):  # the defaults are those of annotate and fine_tune
        if (value := getattr(args, name)) is not None:
            options[name] = value
    options["setup"] = dict(args.setup)
    if args.unlabeled is not None:
        options["unlabeled_category"] = args.unlabeled
    tl.annotate(adata, args.weights, reference, args.labels, **options)
    _write(adata, args.output, replace=_may_replace(args))
    key = next(reversed(adata.uns["cellprior"]))
    counts = adata.obs[key].value_counts()
    shown = "\n".join(f"{name:40} {n:8,}" for name, n in counts.items() if n)
    coarse = f"{key}_coarse"
    also = f" (coarser names in obs[{coarse!r}])" if coarse in adata.obs else ""
    _done(f"{args.output}: obs[{key!r}], {adata.n_obs:,} cells{also}\n{shown}\n")
    if reasons := adata.uns["cellprior"][key].get("unknown"):
        _done(
            f"unknown: {reasons['too_far']:,} too far from every type, {reasons['too_uncertain']:,} too uncertain; "
            f"obs[{key + '_best_guess'!r}] has the best guess for each cell\n"
        )


def _streams(output: Path) -> bool:
    return output.suffix == ".zarr"


def _may_replace(args: argparse.Namespace) -> bool:
    return args.overwrite or (args.output.exists() and args.output.samefile(args.input))


def _refuse_output(args: argparse.Namespace) -> None:
    """Before anything is read or computed: refuse a file that cannot be written, or may not be replaced."""
    from cellprior._outputs import refuse_unwritable, target

    output = target(args.output)
    if output.is_dir():
        msg = f"{args.output} is a folder: name a file to write, such as {args.output / args.input.name}."
        raise ValueError(msg)
    if not args.input.exists():  # which is told when it is read
        return
    if output.exists() and not _may_replace(args):
        msg = f"{args.output} is there already: --overwrite replaces it, or choose another name."
        raise FileExistsError(msg)
    refuse_unwritable(output.parent)


def _refuse_full(data: AnnData | MuData, output: Path) -> None:
    """Refuse to compute what will not fit: the matrices, which are most of a file and are not compressed."""
    from anndata import AnnData

    from cellprior._outputs import refuse_full, target

    parts: Any = [data] if isinstance(data, AnnData) else data.mod.values()
    matrices = [x for part in parts for x in (part.X, *part.layers.values()) if x is not None]
    n_bytes = sum(getattr(x, "data", x).nbytes for x in matrices)  # of a sparse one, its values
    refuse_full(target(output).parent, n_bytes)


def _read(path: Path) -> AnnData | MuData:
    import anndata as ad
    import mudata as md

    from cellprior._compat import without_pulled_columns
    from cellprior.model.data._files import refuse_foreign

    refuse_foreign(path)
    is_mudata = path.suffix == ".h5mu"
    problem: object = "it has no modalities"
    try:
        with without_pulled_columns():
            if path.is_dir():
                data = None if (path / "mod").exists() else ad.read_zarr(path)
                problem = "it holds a MuData, which is streamed: name an output that ends in .zarr"
            else:
                data = md.read_h5mu(path) if is_mudata else ad.read_h5ad(path)
    except Exception as error:  # noqa: BLE001  of HDF5, anndata or mudata, none of which names the file
        data, problem = None, error
    if data is None or (is_mudata and not data.mod):
        kind = "a zarr folder" if path.is_dir() else f"an {'h5mu' if is_mudata else 'h5ad'} file"
        msg = f"{path} cannot be read as {kind}: {problem}"
        raise ValueError(msg)
    return data


def _write(data: AnnData | MuData, path: Path, *, replace: bool = True) -> None:
    """Write an h5ad or h5mu file, which is there once it is whole, however many processes write it.

    Raises FileExistsError if it is there meanwhile, and is not to be replaced; what was computed is kept under
    another name; OSError if it cannot be written.
    """
    from anndata import AnnData

    from cellprior._compat import with_nullable_strings, without_pulled_columns
    from cellprior._outputs import partial_name, target

    path = target(path)
    for _ in range(2):
        partial = partial_name(path)
        try:
            with with_nullable_strings(), without_pulled_columns():
                if isinstance(data, AnnData):
                    data.write_h5ad(partial)
                else:
                    data.write_h5mu(partial)
            if not _is_whole(partial, data):  # what came between? once more, then
                continue
            if not replace and path.exists():
                kept = partial.rename(
                    path.with_name(f"{path.stem}-{partial.name.split('.')[-2]}{path.suffix}")
                )
                msg = f"{path} was written by another process meanwhile, and is left as it is: this result is {kept}."
                raise FileExistsError(msg)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return
    msg = f"{path} cannot be written: what is read back is not what was written."
    raise OSError(msg)


def _is_whole(path: Path, data: AnnData | MuData) -> bool:
    """Whether a file that was just written can be read, before it replaces another."""
    import h5py

    try:
        with h5py.File(path) as file:
            return "obs" in file and all(key in file["obsm"] for key in data.obsm)
    except (OSError, KeyError):
        return False


def _convert(args: argparse.Namespace) -> None:
    from cellprior.model import convert

    folder = convert(
        args.input,
        args.output,
        trust=args.i_trust_this_file,
        reference=None if args.reference is None else _read(args.reference),
        layer=_by_modality(args.layer),
        overwrite=args.overwrite,
    )
    _done(f"{folder}: {(folder / 'README.md').read_text(encoding='utf-8')}")


def _by_modality(text: str | None) -> Any:
    """A name for all modalities as it is; ``rna=NAME,atac=NAME`` as a mapping."""
    return dict(part.split("=", 1) for part in text.split(",")) if text and "=" in text else text


def _pair(text: str) -> tuple[str, str]:
    """``NAME=VALUE``."""
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        msg = f"{text!r} is not NAME=VALUE, such as assay_key=assay"
        raise argparse.ArgumentTypeError(msg)
    return name, value


def _evaluate(args: argparse.Namespace) -> None:
    from cellprior import evaluate

    if not args.weights + args.embedding:
        msg = "nothing to evaluate: give --weights (such as cellplm-starter) or --embedding (a key of obsm)."
        raise ValueError(msg)
    if args.out is not None:
        _prepare(args.out)
    adata: Any = _read(args.input)
    if missing := [key for key in args.embedding if key not in adata.obsm]:
        msg = f"{', '.join(missing)} not found in obsm; its keys are {list(adata.obsm)}."
        raise ValueError(msg)
    report = evaluate.report(
        adata,
        [*args.weights, *args.embedding],
        args.labels,
        args.batch_key,
        layer=args.layer,
        seeds=args.seeds,
        scvi_epochs=args.scvi_epochs,
        max_cells=args.max_cells,
    )
    text = report.to_markdown()
    say(text)
    if args.out is not None:
        import matplotlib.pyplot as plt

        from cellprior import pl
        from cellprior._outputs import write_file

        write_file(args.out / "report.md", text.encode())
        figure = pl.report(report)
        figure.savefig(args.out / "report.png", dpi=150)
        plt.close(figure)


def _prepare(folder: Path) -> None:
    """Make a folder for results, before they are computed."""
    from cellprior._outputs import refuse_unwritable

    folder.mkdir(parents=True, exist_ok=True)
    refuse_unwritable(folder)


def _demo(args: argparse.Namespace) -> None:
    from cellprior._demo import demo

    _prepare(args.out)
    say(demo(args.out).to_string(float_format="{:.3f}".format) + "\n")
    _done(f"Written: {args.out / 'cellprior_demo.png'}, {args.out / 'cellprior_demo.h5ad'}\n")
