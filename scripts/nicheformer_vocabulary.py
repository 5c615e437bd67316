"""Make the vocabulary of Nicheformer that the package brings, from the authors' files and GENCODE.

    python scripts/nicheformer_vocabulary.py MODEL_H5AD MEANS

MODEL_H5AD is the authors' data/model_means/model.h5ad, MEANS the folder with their <technology>_mean_script.npy. Order,
ids and means are theirs; symbols are GENCODE's. The genes of mouse have none: they are found by their ids alone.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

from cellprior.genes._table import load, read_vocabulary
from cellprior.model.nicheformer._inputs import TECHNOLOGIES
from cellprior.model.nicheformer._vocabulary import SHIPPED, read_means, read_reference


def main(reference: Path, folder: Path) -> None:
    ids = read_reference(reference)
    means, _ = read_means(folder, len(ids))
    table, notes = load("human")
    if table is None:
        sys.exit("\n".join(notes))
    genes = table.complete(read_vocabulary(ids))
    rows = ["\t".join(("ensembl_id", "symbol", "previous_symbols", *TECHNOLOGIES))]
    for gene, of_gene in zip(genes.itertuples(index=False), means.T.tolist(), strict=True):
        rows.append("\t".join((*gene, *(repr(mean) if mean else "" for mean in of_gene))))
    text = "\n".join(rows) + "\n"
    SHIPPED.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
