"""The files that the UCE authors release, read into our layout.

``4layer_model.torch`` and its like hold bare tensors, with the vectors of all 145,469 tokens of eight species among
them; they stay on disk, and only those of the chosen species are read. Beside it, ``species_offsets.pkl`` says where
the genes of a species begin, ``species_chrom.csv`` where they lie; and their names, in order, are those of the vectors
in ``protein_embeddings``, of which nothing else is read.
"""

from __future__ import annotations

import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from cellprior.model.files._official import find_checkpoint, shortened, translate
from cellprior.model.uce._module import protein_encoder, sinusoids
from cellprior.weights import Bundle, InertCheckpoint, WeightsError, read_checkpoint
from cellprior.weights._dictionary import read_dictionary

SUFFIX = ".torch"
POSITIONS, OFFSETS, NAMES = "species_chrom.csv", "species_offsets.pkl", "protein_embeddings"
ARCHIVE = f"{NAMES}.tar.gz"
DEFAULT_SPECIES = ("human", "mouse")
PAGE = "https://figshare.com/articles/dataset/24320806"
TABLE, SINUSOIDS = "pe_embedding.weight", "pos_encoder.pe"
PAD, CLOSE, CLS, FIRST_GENE = 0, 2, 3, 4  # rows of the released table; 1 is never used
HEAD_WIDTH = 64
ROWS_AT_A_TIME = 4096

# beginning of the name of the file with a species' proteins
LATIN = {
    "frog": "Xenopus_tropicalis",
    "human": "Homo_sapiens",
    "macaca_fascicularis": "Macaca_fascicularis",
    "macaca_mulatta": "Macaca_mulatta",
    "mouse": "Mus_musculus",
    "mouse_lemur": "Microcebus_murinus",
    "pig": "Sus_scrofa",
    "zebrafish": "Danio_rerio",
}
_LAYER = r"transformer_encoder\.layers\.(\d+)\."
# their name (a pattern) -> ours
RENAMED = {
    r"pe_embedding\.weight$": TABLE,
    r"pos_encoder\.pe$": SINUSOIDS,
    r"encoder\.([02])\.": r"token_encoder.\1.",
    r"gene_embedding_layer\.([02])\.": r"gene_encoder.\1.",
    _LAYER + r"self_attn\.in_proj_(weight|bias)$": r"encoder.\1.qkv.\2",
    _LAYER + r"self_attn\.out_proj\.": r"encoder.\1.out.",
    _LAYER + r"linear([12])\.": r"encoder.\1.ff\2.",
    _LAYER + r"norm([12])\.": r"encoder.\1.norm\2.",
    r"decoder\.([012])\.([01])\.": r"decoder.\1.\2.",
    r"decoder\.3\.": "decoder.3.",
    r"binary_decoder\.(\d+)\.": r"presence.\1.",
}


class Positions(NamedTuple):
    """Where genes lie, by the released table."""

    chromosomes: list[str]  # all of them, in the order of their codes
    of_gene: dict[tuple[str, str], tuple[int, int]]  # by species and symbol in capitals: code, start


def find_official(path: Path) -> Path:
    """The checkpoint file itself, or the only one in a folder."""
    return find_checkpoint(path, SUFFIX)


def recognises(path: Path) -> bool:
    """Whether a file or folder looks like a checkpoint of UCE: a ``*.torch`` that goes with a table of positions."""
    folder = path if path.is_dir() else path.parent
    candidates = [*path.glob("*" + SUFFIX)] if path.is_dir() else [path] * (path.suffix == SUFFIX)
    return bool(candidates) and (folder / POSITIONS).is_file()


def files_beside(name: str) -> list[str]:
    """What belongs beside a checkpoint of this name."""
    return [POSITIONS, OFFSETS, ARCHIVE] if name.endswith(SUFFIX) else []


def read_official(
    checkpoint: Path, species: Collection[str] | None = None, *, n_heads: int | None = None
) -> Bundle:
    """Read an official checkpoint.

    Raises WeightsError if a file is missing or broken, a tensor is not known, a species is not there, or files
    contradict each other.

    Parameters
    ----------
    checkpoint
        ``4layer_model.torch`` or its like, with ``species_chrom.csv``, ``species_offsets.pkl`` and
        ``protein_embeddings.tar.gz`` in the same folder. In place of the last, a folder ``protein_embeddings`` with the
        files of the chosen species, or with a list of names for each: ``human.txt``, a name per line, in their order.
    species
        Which to read; by default human and mouse.
    n_heads
        Attention heads, which the files do not tell; by default one for each 64 numbers of a token, as in all released
        ones.
    """
    folder = checkpoint.parent
    chosen = list(dict.fromkeys(DEFAULT_SPECIES if species is None else species))
    offsets = read_offsets(folder / OFFSETS)
    if (unknown := [name for name in chosen if name not in offsets]) or not chosen:
        msg = (
            f"{checkpoint.name} has no species {', '.join(map(repr, unknown))}; name one or more of "
            f"{', '.join(sorted(offsets))}."
        )
        raise WeightsError(msg)
    positions = read_positions(folder / POSITIONS)
    tensors = rename(read_checkpoint(checkpoint), checkpoint.name)
    table = tensors.pop(TABLE)
    first_chromosome = len(table) - len(positions.chromosomes)
    in_order = sorted(offsets, key=offsets.__getitem__)
    ends = dict(zip(in_order, [*(offsets[name] for name in in_order[1:]), first_chromosome], strict=True))
    names, files = names_of(folder, sorted(chosen, key=offsets.__getitem__))
    for name, found in names.items():
        if len(found) != ends[name] - offsets[name]:
            msg = (
                f"{NAMES} has {len(found):,} genes of {name}, and {OFFSETS}, {POSITIONS} and {checkpoint.name} have "
                f"{ends[name] - offsets[name]:,} rows for them: they are not of one release."
            )
            raise WeightsError(msg)
    genes, lost = vocabulary(names, offsets, positions)
    arguments = network(tensors, table.shape[1], n_heads, checkpoint.name)
    used = np.unique(genes["code"])
    rows = np.concatenate([genes["number"], first_chromosome + used, [CLOSE, CLS, PAD]])
    tensors |= tables(tensors, table, rows, len(genes))
    for column in ("number", "start"):
        tensors[f"gene_{column}"] = torch.tensor(genes[column].to_numpy(np.int64))  # pandas may give a view
    tensors["gene_chromosome"] = torch.from_numpy(np.searchsorted(used, genes["code"]))
    tensors["gene_species"] = torch.from_numpy(pd.factorize(genes["species"])[0].astype(np.int64))
    tensors["chromosome_code"] = torch.from_numpy(used.astype(np.int64))
    arguments["n_chromosomes"] = len(used)
    card = f"Species: {', '.join(names)}, of the {len(offsets)} in the file."
    if lost:
        card += f" {len(lost):,} genes without a position are left out: {shortened(lost)}."
    columns = ["ensembl_id", "symbol", "previous_symbols", "species"]
    read = (checkpoint, folder / OFFSETS, folder / POSITIONS, *files)
    return Bundle(tensors, {"model": "UCE", "network": arguments}, genes[columns], card, files=read)


def read_offsets(path: Path) -> dict[str, int]:
    """Row of the first gene of each species; the pickle is read without running it."""
    found = read_dictionary(path)
    if wrong := [name for name, row in found.items() if not isinstance(row, int) or row < FIRST_GENE]:
        msg = f"{path}: {wrong[0]!r} is {found[wrong[0]]!r}; needed: the row of its first gene, {FIRST_GENE} or above."
        raise WeightsError(msg)
    if not found or len(set(found.values())) < len(found):
        msg = f"{path} has no species, or two of them begin at one row."
        raise WeightsError(msg)
    return found


def read_positions(path: Path) -> Positions:
    """Where genes lie. Codes of chromosomes are places among the sorted names of the whole table.

    Raises WeightsError if it is missing, lacks a column, or a gene lies at two places.
    """
    if not path.is_file():
        msg = f"{path} is missing: the table of where genes lie. Get it from {PAGE}, into the folder of the checkpoint."
        raise WeightsError(msg)
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return positions_of(table, str(path))


def positions_of(table: pd.DataFrame, source: str) -> Positions:
    """See :func:`read_positions`; columns ``gene_symbol``, ``chromosome``, ``start``, ``species``."""
    columns = ["gene_symbol", "chromosome", "start", "species"]
    if missing := [name for name in columns if name not in table]:
        msg = f"{source} lacks the columns {missing}; it has {list(table.columns)}."
        raise WeightsError(msg)
    text = {name: table[name].astype(str).str.strip() for name in columns}
    start = pd.to_numeric(text["start"], errors="coerce")
    if (wrong := start.isna() | (start != start.round())).any():
        row = int(wrong.to_numpy().argmax())
        symbol, found = text["gene_symbol"].iloc[row], text["start"].iloc[row]
        msg = f"{source}: {symbol} starts at {found!r}; a whole number is needed."
        raise WeightsError(msg)
    named = text["species"] + "_" + text["chromosome"]
    chromosomes = sorted(set(named))
    code = {name: i for i, name in enumerate(chromosomes)}
    of_gene: dict[tuple[str, str], tuple[int, int]] = {}
    for species, symbol, chromosome, begin in zip(
        text["species"], text["gene_symbol"].str.upper(), named, start.astype(np.int64), strict=True
    ):
        place = (code[chromosome], int(begin))
        if (before := of_gene.setdefault((species, symbol), place)) != place:
            msg = (
                f"{source}: {symbol} of {species} lies at two places, {chromosomes[before[0]]}:{before[1]:,} and "
                f"{chromosome}:{begin:,}. Each gene needs one: leave out the other row."
            )
            raise WeightsError(msg)
    return Positions(chromosomes, of_gene)


def names_of(folder: Path, species: Sequence[str]) -> tuple[dict[str, list[str]], list[Path]]:
    """Names of the genes of each species in the order of their rows, and the files that they are from.

    Of two names that differ in capitals only, the first.

    Raises WeightsError if they are nowhere.
    """
    found, files, packed = {}, [], []
    for name in species:
        listed = folder / NAMES / f"{name}.txt"
        unpacked = sorted((folder / NAMES).glob(f"{LATIN.get(name, name)}.*.pt"))
        if listed.is_file():
            found[name] = listed.read_text(encoding="utf-8").split()
            files.append(listed)
        elif unpacked:
            found[name] = _names_of_proteins(unpacked[0])
            files.append(unpacked[0])
        else:
            packed.append(name)
    if packed:
        found |= _packed_names(folder, packed)
        files.append(folder / ARCHIVE)
    for name, all_of_them in found.items():
        first: dict[str, str] = {}
        for gene in all_of_them:
            first.setdefault(gene.upper(), gene)
        found[name] = list(first.values())
    return {name: found[name] for name in species}, files


def _names_of_proteins(path: Path) -> list[str]:
    """Names of the vectors in a file; nothing in it is run, and no vector read."""
    content = InertCheckpoint(path).content()
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        msg = f"{path.name} holds no vectors by the names of genes."
        raise WeightsError(msg)
    return list(content)


def _packed_names(folder: Path, species: Sequence[str]) -> dict[str, list[str]]:
    """Names out of the archive with the proteins of all species, in one pass over it."""
    archive = folder / ARCHIVE
    if not archive.is_file():
        msg = (
            f"The names of the genes of {', '.join(species)} are missing: {ARCHIVE}, or a folder {NAMES} with "
            f"{LATIN.get(species[0], species[0])}.*.pt or {species[0]}.txt, is needed beside the checkpoint. Get it "
            f"from {PAGE}."
        )
        raise WeightsError(msg)
    found = {}
    with tempfile.TemporaryDirectory() as place:
        try:
            with tarfile.open(archive, "r|gz") as packed:
                for member in packed:
                    file = member.name.rsplit("/", 1)[-1]
                    name = next((s for s in species if file.startswith(f"{LATIN.get(s, s)}.")), None)
                    content = packed.extractfile(member) if name and file.endswith(".pt") else None
                    if name and content is not None:
                        path = Path(place) / "proteins.pt"
                        with path.open("wb") as copy:
                            shutil.copyfileobj(content, copy, 2**20)
                        found[name] = _names_of_proteins(path)
                        if len(found) == len(species):
                            break
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            msg = f"{archive} is truncated or damaged ({error!r}). Get it again from {PAGE}."
            raise WeightsError(msg) from error
    if missing := [name for name in species if name not in found]:
        msg = f"{archive} has no proteins of {', '.join(missing)} ({LATIN.get(missing[0], missing[0])}.*.pt)."
        raise WeightsError(msg)
    return found


def vocabulary(
    names: Mapping[str, Sequence[str]], offsets: Mapping[str, int], positions: Positions
) -> tuple[pd.DataFrame, list[str]]:
    """Genes of the chosen species with their numbers, codes of chromosomes and starts; and those without a position."""
    rows, lost = [], []
    for species, of_species in names.items():
        for i, name in enumerate(of_species):
            place = positions.of_gene.get((species, name.upper()))
            if place is None:
                lost.append(f"{species} {name}")
            else:
                rows.append(("", name, "", species, offsets[species] + i, *place))
    if not rows:
        msg = f"{POSITIONS} has none of the genes of {', '.join(names)}: it belongs to other weights."
        raise WeightsError(msg)
    columns = ["ensembl_id", "symbol", "previous_symbols", "species", "number", "code", "start"]
    return pd.DataFrame(rows, columns=columns), lost


def rename(tensors: Mapping[str, Any], file: str) -> dict[str, Tensor]:
    """Their tensors under our names; every one is used, or the error lists it."""
    renamed, unknown = translate(tensors, RENAMED, prefix="module.")  # left by distributed training
    if unknown:
        msg = f"{file} holds {len(unknown)} tensors that UCE does not have: {shortened(unknown)}."
        raise WeightsError(msg)
    if TABLE not in renamed:
        msg = (
            f"{file} lacks {TABLE}, the vectors of the genes: it is no released checkpoint of UCE, or was cut. "
            f"Get it from {PAGE}."
        )
        raise WeightsError(msg)
    added = renamed.pop(SINUSOIDS, None)
    if added is not None:
        needed = sinusoids(len(added), added.shape[-1])
        if not torch.allclose(added.flatten(1).float(), needed, rtol=0, atol=1e-3):
            msg = (
                f"{file}: {SINUSOIDS} is not that of sines and cosines of positions. It is another network's."
            )
            raise WeightsError(msg)
    return renamed


def network(tensors: Mapping[str, Tensor], n_protein: int, n_heads: int | None, file: str) -> dict[str, Any]:
    """Arguments of the network, from the shapes of its tensors; of the heads, see :func:`read_official`."""
    try:
        n_hidden = len(tensors["token_encoder.0.weight"])
        layers = {found[1] for name in tensors if (found := re.match(r"encoder\.(\d+)\.", name))}
        presence = [len(tensors[f"presence.{i}.0.weight"]) for i in range(_n_blocks(tensors))]
        if n_hidden % HEAD_WIDTH and n_heads is None:
            msg = (
                f"{file} has tokens of {n_hidden} numbers, and released checkpoints have heads of {HEAD_WIDTH}. Its "
                "number of heads is not in the file: say it, UCE.convert(..., n_heads=...)."
            )
            raise WeightsError(msg)
        return {
            "n_hidden": n_hidden,
            "n_layers": len(layers),
            "n_heads": n_hidden // HEAD_WIDTH if n_heads is None else n_heads,
            "n_feedforward": len(tensors["encoder.0.ff1.weight"]),
            "n_protein": n_protein,
            "n_latent": len(tensors["decoder.3.weight"]),
            "dropout_rate": 0.05,
            "decoder_width": len(tensors["decoder.0.0.weight"]),
            "binary_widths": presence,
        }
    except KeyError as error:
        msg = f"{file} lacks {error.args[0]!r}, without which it is no checkpoint of UCE. Get it from {PAGE}."
        raise WeightsError(msg) from error


def _n_blocks(tensors: Mapping[str, Tensor]) -> int:
    return sum(re.fullmatch(r"presence\.\d+\.0\.weight", name) is not None for name in tensors)


@torch.no_grad()
def tables(
    tensors: Mapping[str, Tensor], vectors: Tensor, rows: np.ndarray, n_genes: int
) -> dict[str, Tensor]:
    """What the two small layers make of the vectors of tokens: all that the network sees of them.

    ``tensors`` are under our names, with both layers; vectors on disk are read a few at a time; of the ``rows`` that
    are needed, the first ``n_genes`` are genes.
    """
    token, gene = (encoder_of(tensors, name) for name in ("token_encoder", "gene_encoder"))
    of_tokens, of_genes = [], []
    for part in np.array_split(rows, -(-len(rows) // ROWS_AT_A_TIME)):
        these = vectors[torch.from_numpy(part.astype(np.int64))].float()
        of_tokens.append(token(F.normalize(these, dim=1)))
        of_genes.append(gene(these))
    return {
        "token_table.weight": torch.cat(of_tokens),
        "gene_table.weight": torch.cat(of_genes)[:n_genes],
    }


def encoder_of(tensors: Mapping[str, Tensor], name: str) -> torch.nn.Module:
    """One of the small layers, from the tensors of a bundle."""
    own = {
        key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")
    }
    n_hidden, n_protein = own["0.weight"].shape
    layer = protein_encoder(n_protein, n_hidden)
    layer.load_state_dict(own)
    return layer.requires_grad_(False)
