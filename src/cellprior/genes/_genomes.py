"""Lengths of the chromosomes of common genomes, to tell which one peaks can come from."""

from __future__ import annotations

from collections.abc import Mapping

# UCSC's chrom.sizes: chromosomes 1 to 22 (human) or 19 (mouse), then X and Y
_LENGTHS = {
    "hg19": (
        "249250621 243199373 198022430 191154276 180915260 171115067 159138663 146364022 141213431 135534747 "
        "135006516 133851895 115169878 107349540 102531392 90354753 81195210 78077248 59128983 63025520 48129895 "
        "51304566 155270560 59373566"
    ),
    "hg38": (
        "248956422 242193529 198295559 190214555 181538259 170805979 159345973 145138636 138394717 133797422 "
        "135086622 133275309 114364328 107043718 101991189 90338345 83257441 80373285 58617616 64444167 46709983 "
        "50818468 156040895 57227415"
    ),
    "mm9": (
        "197195432 181748087 159599783 155630120 152537259 149517037 152524553 131738871 124076172 129993255 "
        "121843856 121257530 120284312 125194864 103494974 98319150 95272651 90772031 61342430 166650296 15902555"
    ),
    "mm10": (
        "195471971 182113224 160039680 156508116 151834684 149736546 145441459 129401213 124595110 130694993 "
        "122082543 120129022 120421639 124902244 104043685 98207768 94987271 90702639 61431566 171031299 91744698"
    ),
}


def _chromosomes(lengths: str) -> dict[str, int]:
    values = [int(length) for length in lengths.split()]
    names = [str(i + 1) for i in range(len(values) - 2)] + ["X", "Y"]
    return dict(zip(names, values, strict=True))


GENOMES = {genome: _chromosomes(lengths) for genome, lengths in _LENGTHS.items()}


def possible_genomes(largest_ends: Mapping[str, int]) -> list[str]:
    """Genomes in which some positions can lie: none ends after its chromosome, and none is on one that is not there.

    Parameters
    ----------
    largest_ends
        End of the last peak by chromosome, named without "chr"; contigs and the mitochondrion are passed over.
    """
    numbered = {name: end for name, end in largest_ends.items() if name.isdigit() or name in ("X", "Y")}
    if not numbered:
        return []
    return [
        genome
        for genome, lengths in GENOMES.items()
        if all(end <= lengths.get(name, 0) for name, end in numbered.items())
    ]
