"""What a column of the data is: a gene, or an antibody, a guide, a peak, a hashtag, a spike-in, a control probe."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd

from cellprior.genes._intervals import which_are_peaks

GENE, PEAK = "gene", "peak"

# One of a kind, and several.
WORDS = {
    GENE: ("gene", "genes"),
    "antibody": ("antibody", "antibodies"),
    "guide": ("CRISPR guide", "CRISPR guides"),
    PEAK: ("peak", "peaks"),
    "tag": ("hashtag", "hashtags"),
    "spike-in": ("spike-in", "spike-ins"),
    "control": ("control probe", "control probes"),
    "custom": ("custom feature", "custom features"),
    "other": ("other feature", "other features"),
}

# Columns of `var` that say it: Cell Ranger's, CELLxGENE's, that of a MuData's var; the first that is understood counts.
_COLUMNS = ("feature_types", "feature_type", "feature_biotype", "modality", "modalities")
_VALUES = {
    GENE: "gene expression|gene|genes|gex|rna|mrna|scrna|expression|transcriptome|transcripts",
    "antibody": "antibody capture|antigen capture|antibody|antibodies|antibody derived tag|antibody derived tags|adt|"
    "adts|ab|protein|proteins|prot|protein expression|surface protein|cite",
    "guide": "crispr guide capture|crispr|guide|guides|guide rna|grna|sgrna|grnas|sgrnas",
    PEAK: "peaks|peak|atac|scatac|chromatin accessibility|accessibility|tiles|bins|fragments",
    "tag": "multiplexing capture|multiplexing|cell multiplexing|hto|htos|hashtag|hashtags|hashing|cmo",
    "spike-in": "spike in|spike ins|spikein|ercc",
    "control": "negative control probe|negative control codeword|unassigned codeword|deprecated codeword|"
    "blank codeword|genomic control|control|control probe",
    "custom": "custom",
}
_KIND_OF_VALUE = {value: kind for kind, values in _VALUES.items() for value in values.split("|")}
# Types of transcripts (protein_coding, lncRNA, IG_V_gene), which stand in columns of the same names.
_BIOTYPE = re.compile(
    r"protein coding|.*rna|.*gene|tec|artifact|ribozyme|.*overlapping.*|.*intronic|antisense"
)

# What its name says.
_NAMED = {
    "antibody": r"(?i:.*[-_. ]totalseq[-_ ]?[abcd]?.*|(?:adt|prot|protein|abseq)[-_:.].+|.+[-_.](?:adt|ts[abc])|"
    r".+_prot(?:ein)?|.+[|_]pabo|anti[-_.](?:human|mouse|hamster|rat)[-_.].+)",
    "guide": r"sg[A-Z].*|(?i:s?grna[-_.].+|.+[-_.]s?grna[-_.]?\d*|non[-_.]?target.*)",
    "tag": r"(?i:hto[-_.]?[a-z]?\d+.*|hto[-_.].+|.+[-_.]hto|.*hashtag.*|cmo\d{3})",
    "spike-in": r"(?i:ercc[-_.]\d{5}|sirv\d.*)",
    "control": r"(?i:neg(?:ative)?[-_. ]?(?:control|ctrl|prb|probe).*|negative\d+|blank[-_. ]?\d+|"
    r"(?:unassigned|deprecated|blank)[-_. ]?codeword.*|genomiccontrol.*|deprecated_.+|antisense_.+|systemcontrol\d+)",
}
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in _NAMED.items()}
# One of these is in each such name, in lower case and with _ for all signs; few genes have one, and are looked at.
_NEEDLES = (
    "seq adt prot pabo _ts anti \nsg grna target hto hashtag cmo ercc_ sirv neg blank codeword control deprecated_"
).split(" ")
_ALIKE = str.maketrans("-:. |", "_____")


def kinds_by_type(var: pd.DataFrame) -> tuple[np.ndarray, str]:
    """What a column of `var` says of each feature, and which column.

    Cell Ranger's values are known, and many others, in any spelling of upper and lower case. A value of unknown
    meaning is no gene where others of the column are called genes, unless it is a type of transcript; in a column in
    which none is understood, it says nothing. Gives the kind of each feature, "" where nothing is said ``(n_vars,)``,
    and the column, "" if there is none.
    """
    columns = {str(label).lower().replace(" ", "_"): column for label, column in var.items()}
    for name in _COLUMNS:
        if name not in columns:
            continue
        codes, values = pd.factorize(columns[name])
        plain = [re.sub(r"[\W_]+", " ", str(value)).strip().lower() for value in values]
        kinds = [_KIND_OF_VALUE.get(value, "") for value in plain]
        if not any(kinds):
            continue
        if GENE in kinds:
            kinds = [
                kind or ("" if not value or _BIOTYPE.fullmatch(value) else "other")
                for kind, value in zip(kinds, plain, strict=True)
            ]
        return np.array([*kinds, ""], dtype=object)[codes], str(columns[name].name)
    return np.full(len(var), "", dtype=object), ""


def kinds_by_name(names: Iterable[str]) -> dict[int, str]:
    """Kind of the names, by number, that are those of no gene, such as `CD4_TotalSeqB`, `sgRNA_CD4` or `ERCC-00002`.

    Peaks are not looked for.
    """
    names = list(names)
    text = "\n" + "\n".join(names) + "\n"
    lower = text.lower().translate(_ALIKE)
    found: dict[str, str] = {}
    for name in dict.fromkeys(_lines_with(_NEEDLES, text, lower)):
        if kind := next((kind for kind, pattern in _PATTERNS.items() if pattern.fullmatch(name)), ""):
            found[name] = kind
    return {i: found[name] for i, name in enumerate(names) if name in found} if found else {}


def _lines_with(needles: list[str], text: str, lower: str) -> Iterator[str]:
    """Lines of a text in which one of some lower-case texts stands."""
    if len(lower) != len(text):  # a letter that is two in lower case
        yield from text.split("\n")
        return
    for needle in needles:
        at = lower.find(needle)
        while at >= 0:
            begin = text.rfind("\n", 0, at + 1) + 1
            end = text.find("\n", max(at + 1, begin))
            yield text[begin:end]
            at = lower.find(needle, end)


def kinds_of(var: pd.DataFrame) -> np.ndarray:
    """What each column of the data is, by what `var` says, and else by its name; "gene" if nothing is said.

    One of "gene", "antibody", "guide", "peak", "tag", "spike-in", "control", "custom" and "other" each, `(n_vars,)`.
    """
    kinds, _ = kinds_by_type(var)
    unsaid = np.flatnonzero(kinds == "")
    kinds[unsaid] = GENE
    if len(unsaid):
        names = var.index[unsaid].astype(str)
        for i, kind in kinds_by_name(names).items():
            kinds[unsaid[i]] = kind
        kinds[unsaid[which_are_peaks(names)]] = PEAK
    return kinds


def which_are_genes(var: pd.DataFrame) -> np.ndarray:
    """Columns of the data that are genes, or all if none is said to be one ``(n_vars,)``."""
    genes = kinds_of(var) == GENE
    return genes if genes.any() else np.ones(len(var), dtype=bool)


def counted(kinds: np.ndarray, kind: str) -> str:
    """How many of a kind there are, such as "2 antibodies"."""
    n = int((kinds == kind).sum())
    return f"{n:,} {WORDS[kind][n != 1]}"
