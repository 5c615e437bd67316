"""Labels of the training sets as terms of the Cell Ontology, fine and coarse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

NONE = (
    "none of these"  # what the head has learned not to name: brain, germ cells, placenta, cancer cell lines
)
TABLE = pd.read_csv(Path(__file__).with_suffix(".tsv"), sep="\t", keep_default_na=False)
# term -> id in the Cell Ontology, coarse name
TERMS = {
    "B cell": ("CL:0000236", "B cell"),
    "plasma cell": ("CL:0000786", "B cell"),
    "CD4-positive, alpha-beta T cell": ("CL:0000624", "T cell"),
    "CD8-positive, alpha-beta T cell": ("CL:0000625", "T cell"),
    "natural killer cell": ("CL:0000623", "innate lymphoid cell"),
    "innate lymphoid cell": ("CL:0001065", "innate lymphoid cell"),
    "CD14-positive monocyte": ("CL:0001054", "myeloid cell"),
    "CD14-low, CD16-positive monocyte": ("CL:0002396", "myeloid cell"),
    "macrophage": ("CL:0000235", "myeloid cell"),
    "conventional dendritic cell": ("CL:0000990", "myeloid cell"),
    "plasmacytoid dendritic cell": ("CL:0000784", "myeloid cell"),
    "mast cell": ("CL:0000097", "myeloid cell"),
    "neutrophil": ("CL:0000775", "myeloid cell"),
    "platelet": ("CL:0000233", "platelet or megakaryocyte"),
    "megakaryocyte": ("CL:0000556", "platelet or megakaryocyte"),
    "erythroid lineage cell": ("CL:0000764", "erythroid lineage cell"),
    "hematopoietic precursor cell": ("CL:0008001", "hematopoietic precursor cell"),
    "endothelial cell": ("CL:0000115", "endothelial cell"),
    "endothelial cell of lymphatic vessel": ("CL:0002138", "endothelial cell"),
    "fibroblast": ("CL:0000057", "stromal cell"),
    "myofibroblast cell": ("CL:0000186", "stromal cell"),
    "pericyte": ("CL:0000669", "stromal cell"),
    "smooth muscle cell": ("CL:0000192", "stromal cell"),
    "adipocyte": ("CL:0000136", "stromal cell"),
    "glial cell": ("CL:0000125", "glial cell"),
    "enterocyte": ("CL:0000584", "epithelial cell"),
    "goblet cell": ("CL:0000160", "epithelial cell"),
    "paneth cell": ("CL:0000510", "epithelial cell"),
    "intestinal tuft cell": ("CL:0019032", "epithelial cell"),
    "enteroendocrine cell": ("CL:0000164", "epithelial cell"),
    "intestinal crypt stem cell": ("CL:0002250", "epithelial cell"),
    "basal cell": ("CL:0000646", "epithelial cell"),
    "keratinocyte": ("CL:0000312", "epithelial cell"),
    "squamous epithelial cell": ("CL:0000076", "epithelial cell"),
    "ciliated epithelial cell": ("CL:0000067", "epithelial cell"),
    "secretory cell": ("CL:0000151", "epithelial cell"),
    "pulmonary alveolar type 1 cell": ("CL:0002062", "epithelial cell"),
    "pulmonary alveolar type 2 cell": ("CL:0002063", "epithelial cell"),
    "luminal epithelial cell": ("CL:0002325", "epithelial cell"),
    "hepatocyte": ("CL:0000182", "epithelial cell"),
    "cholangiocyte": ("CL:1000488", "epithelial cell"),
    "pancreatic acinar cell": ("CL:0002064", "epithelial cell"),
    "pancreatic ductal cell": ("CL:0002079", "epithelial cell"),
    "pancreatic A cell": ("CL:0000171", "endocrine cell of the pancreas"),
    "type B pancreatic cell": ("CL:0000169", "endocrine cell of the pancreas"),
    "pancreatic D cell": ("CL:0000173", "endocrine cell of the pancreas"),
    "melanocyte": ("CL:0000148", "melanocyte"),
    "cardiac muscle cell": ("CL:0000746", "striated muscle cell"),
    "skeletal muscle cell": ("CL:0000188", "striated muscle cell"),
    "skeletal muscle satellite cell": ("CL:0000594", "striated muscle cell"),
}
# labels of the studies that the head is judged on; "" is a type that the head has no name for
JUDGED = {
    "pbmc3k_seurat": {
        "Naive CD4 T": "CD4-positive, alpha-beta T cell",
        "Memory CD4 T": "CD4-positive, alpha-beta T cell",
        "CD14+ Mono": "CD14-positive monocyte",
        "B": "B cell",
        "CD8 T": "CD8-positive, alpha-beta T cell",
        "FCGR3A+ Mono": "CD14-low, CD16-positive monocyte",
        "NK": "natural killer cell",
        "DC": "conventional dendritic cell",
        "Platelet": "platelet",
    },
    "pbmc_kang_ifnb_muscat": {
        "CD14+ Monocytes": "CD14-positive monocyte",
        "CD4 T cells": "CD4-positive, alpha-beta T cell",
        "B cells": "B cell",
        "FCGR3A+ Monocytes": "CD14-low, CD16-positive monocyte",
        "CD8 T cells": "CD8-positive, alpha-beta T cell",
    },
    "pancreas_5tech_panc8small": {
        "alpha": "pancreatic A cell",
        "beta": "type B pancreatic cell",
        "ductal": "pancreatic ductal cell",
        "acinar": "pancreatic acinar cell",
        "delta": "pancreatic D cell",
        "endothelial": "endothelial cell",
    },
}
# the same where the study names coarse types only
JUDGED_COARSE = {
    "lung_adeno_kim2020": {
        "T lymphocytes": "T cell",
        "Myeloid cells": "myeloid cell",
        "Epithelial cells": "epithelial cell",
        "B lymphocytes": "B cell",
    },
    "breast_tnbc_wu2021_cid4465": {
        "CAFs": "stromal cell",
        "PVL": "stromal cell",
        "Endothelial": "endothelial cell",
        "Myeloid": "myeloid cell",
        "T-cells": "T cell",
        "Plasmablasts": "B cell",
        "B-cells": "B cell",
        "Normal Epithelial": "epithelial cell",
        "Cancer Epithelial": "epithelial cell",
    },
}


def terms_of(source: str, labels: np.ndarray) -> np.ndarray:
    """Terms of labels as `_starter_terms.tsv` gives them, "" for mixtures, states, and what two terms would fit."""
    of_source = TABLE[TABLE["source"] == source].set_index("label")["term"]
    return of_source.reindex(labels).fillna("").to_numpy(dtype=object)
