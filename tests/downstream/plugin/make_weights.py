"""Write the weights of `pca-pbmc` into the package."""

from __future__ import annotations

import sys

import scanpy as sc
import torch
from reference_pca import ReferencePCA
from sklearn.decomposition import PCA

import cellprior as cp

adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
adata.layers["counts"] = cp.pp.recover_counts(adata)
ReferencePCA.setup_anndata(adata, layer="counts")
model = ReferencePCA(adata, n_latent=16)

log = sc.pp.normalize_total(adata, target_sum=10_000, layer="counts", inplace=False)["X"].log1p().toarray()
pca = PCA(16, svd_solver="full").fit(log)
with torch.no_grad():
    model.module.mean.copy_(torch.as_tensor(pca.mean_))
    model.module.loadings.copy_(torch.as_tensor(pca.components_.T))
model.save_pretrained(sys.argv[1], card="# pca-pbmc\n\n16 principal components of 700 human blood cells.\n")
