"""A further species for weights that have been converted, from vectors of its proteins."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from cellprior._arguments import whole
from cellprior.model.uce._checkpoint import encoder_of, positions_of
from cellprior.model.uce._inputs import most_chromosomes
from cellprior.weights import Bundle, WeightsError, read_checkpoint

Proteins: TypeAlias = pd.DataFrame | Mapping[str, Any] | str | os.PathLike[str]
Table: TypeAlias = pd.DataFrame | str | os.PathLike[str]
TAXON_BITS = 32  # numbers of a further species' genes are above those of all released ones, and its own


def with_species(bundle: Bundle, *, species: str, proteins: Proteins, positions: Table, taxon: int) -> Bundle:
    """Weights that know one more species; what they knew stays as it was.

    The bundle has the layers that make tokens of proteins, whose vectors are by symbol: a frame, a mapping, or a file
    that ``torch.save`` wrote of one, such as the original's ``*.gene_symbol_to_embedding_ESM2.pt``. Positions are a
    table with ``gene_symbol``, ``chromosome`` and ``start``, or a CSV file; of ``taxon``, the species' number in
    NCBI's taxonomy, the vectors of its chromosomes are drawn, as in the original. Raises WeightsError if the weights
    cannot take it, or a table is not as needed; ValueError if the species is there already.
    """
    whole(most=2**31 - 1, taxon=taxon)
    network = bundle.config["network"]
    known = list(dict.fromkeys(bundle.genes.get("species", pd.Series(dtype=object))))
    if species in known or not species:
        msg = f"species={species!r}: the weights have {', '.join(known)} already; give the new one a name of its own."
        raise ValueError(msg)
    if not known or network.get("n_protein") is None:
        msg = "These weights have no layers for vectors of proteins, or one species without a name: none can be added."
        raise WeightsError(msg)
    vectors = vectors_of(proteins, network["n_protein"])
    table = positions
    if not isinstance(table, pd.DataFrame):
        table = pd.read_csv(table, dtype=str, keep_default_na=False)
    places = positions_of(table.assign(species=species), f"positions of {species}")
    names = [name for name in vectors if (species, name.upper()) in places.of_gene]
    if not names:
        some = ", ".join(list(vectors)[:3])
        msg = (
            f"None of the {len(vectors):,} proteins ({some}, ...) has a position: both need symbols of genes."
        )
        raise WeightsError(msg)
    if lost := len(vectors) - len(names):
        msg = f"{lost:,} of {len(vectors):,} genes of {species} have no position, and are left out."
        warnings.warn(msg, UserWarning, stacklevel=3)
    most = most_chromosomes(network.get("sentence_length", 1024))
    if len(places.chromosomes) > most:
        msg = (
            f"{species} has {len(places.chromosomes):,} chromosomes, and a sentence has room for {most}: cells that "
            "express genes of more are refused. Give scaffolds that are not placed one name."
        )
        warnings.warn(msg, UserWarning, stacklevel=3)
    return _extended(bundle, species, {name: vectors[name] for name in names}, places, taxon)


def _extended(bundle: Bundle, species: str, vectors: Mapping[str, Tensor], places: Any, taxon: int) -> Bundle:
    state = dict(bundle.state_dict)
    n_old, n_chromosomes = len(bundle.genes), len(state["chromosome_code"])
    where = [places.of_gene[species, name.upper()] for name in vectors]
    number = (taxon << TAXON_BITS) + torch.arange(len(vectors))
    code = (taxon << TAXON_BITS) + torch.arange(len(places.chromosomes))
    drawn = torch.randn(
        len(code), bundle.config["network"]["n_protein"], generator=torch.Generator().manual_seed(taxon)
    )
    with torch.no_grad():
        token, gene = (encoder_of(state, name) for name in ("token_encoder", "gene_encoder"))
        proteins = torch.stack(list(vectors.values()))
        genes, chromosomes = (token(F.normalize(x, dim=1)) for x in (proteins, drawn))
        old_genes, old_chromosomes, special = state["token_table.weight"].split([n_old, n_chromosomes, 3])
        state["token_table.weight"] = torch.cat([old_genes, genes, old_chromosomes, chromosomes, special])
        state["gene_table.weight"] = torch.cat([state["gene_table.weight"], gene(proteins)])
    added = {
        "gene_number": number,
        "gene_chromosome": n_chromosomes + torch.tensor([place[0] for place in where]),
        "gene_start": torch.tensor([place[1] for place in where]),
        "gene_species": torch.full_like(number, int(state["gene_species"].max()) + 1),
        "chromosome_code": code,
    }
    for name, values in added.items():
        state[name] = torch.cat([state[name], values])
    new = pd.DataFrame(
        {"ensembl_id": "", "symbol": list(vectors), "previous_symbols": "", "species": species}
    )
    network = {**bundle.config["network"], "n_chromosomes": n_chromosomes + len(code)}
    card = f"{bundle.card.rstrip()}\n\nSpecies added: {species}, {len(new):,} genes (taxon {taxon}).\n"
    genes_of_all = pd.concat([bundle.genes, new], ignore_index=True)
    config = {
        name: value for name, value in bundle.config.items() if name not in ("format_version", "n_genes")
    }
    return Bundle(state, {**config, "network": network}, genes_of_all, card)


def vectors_of(proteins: Proteins, width: int) -> dict[str, Tensor]:
    """Vectors by symbol, float32; of two symbols that differ in capitals only, the place of the first, as the original.

    Raises WeightsError if one is of another width, or not finite.
    """
    if isinstance(proteins, str | os.PathLike):
        proteins = read_checkpoint(Path(proteins))
    items = proteins.iterrows() if isinstance(proteins, pd.DataFrame) else proteins.items()
    found: dict[str, Tensor] = {}
    seen: set[str] = set()
    for name, values in items:
        vector = torch.as_tensor(np.asarray(values, dtype=np.float32))
        if vector.shape != (width,) or not bool(vector.isfinite().all()):
            what = f"{tuple(vector.shape)}" if vector.shape != (width,) else "not finite"
            msg = (
                f"The vector of {name} is {what}; needed: {width:,} numbers (ESM-2 15B, mean over residues)."
            )
            raise WeightsError(msg)
        if str(name).upper() not in seen:
            seen.add(str(name).upper())
            found[str(name)] = vector
    return found
