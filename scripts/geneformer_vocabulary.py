"""Make the vocabulary of Geneformer V1 that the package brings, from the authors' dictionaries and GENCODE.

    python scripts/geneformer_vocabulary.py FOLDER

FOLDER holds the authors' token_dictionary_gc30M.pkl, gene_median_dictionary_gc30M.pkl and gene_name_id_dict_gc30M.pkl.
Order, ids and medians are theirs; symbols are GENCODE's, and the authors' where GENCODE knows none of that name.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

from cellprior.genes._table import load
from cellprior.model.geneformer._vocabulary import SHIPPED, read_tokens


def main(folder: Path) -> None:
    tokens, medians, names = (
        folder / f"{name}_gc30M.pkl"
        for name in ("token_dictionary", "gene_median_dictionary", "gene_name_id_dict")
    )
    theirs = read_tokens(tokens, medians, names)
    table, notes = load("human")
    if table is None:
        sys.exit("\n".join(notes))
    ours = table.complete(
        theirs.genes.assign(symbol=theirs.genes["symbol"].where(theirs.genes["ensembl_id"] == "", ""))
    )
    rows = ["ensembl_id\tsymbol\tprevious_symbols\tmedian"]
    for (identifier, symbol, previous), other, median in zip(
        ours.itertuples(index=False), theirs.genes.itertuples(index=False), theirs.scale, strict=True
    ):
        free = [
            name
            for name in (other.symbol, *other.previous_symbols.split("|"))
            if name and name not in table.id_of
        ]
        known = [symbol, *previous.split("|"), *free] if identifier else [symbol]
        known = list(dict.fromkeys(name for name in known if name))
        symbol, previous = (known[0], known[1:]) if known else ("", [])
        rows.append(f"{identifier}\t{symbol}\t{'|'.join(previous)}\t{float(median)!r}")
    text = "\n".join(rows) + "\n"
    SHIPPED.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
