"""What scvi-tools registers of an AnnData: counts of any genes, and batches by their text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data.fields import CategoricalObsField, LayerField
from torch.utils.data import Dataset, Subset

from cellprior._matrix import (
    Matrix,
    is_raw,
    matrix_of,
    refuse_pointers,
    to_memory,
)
from cellprior._obs import read_column, text_of
from cellprior.model.data._cells import refuse_no_counts
from cellprior.model.data._minibatches import CountsDataset


class CountsField(LayerField):
    """Raw counts in ``X``, a layer or ``raw``, of any genes or peaks; ``argument`` of the setup names the layer."""

    def __init__(
        self, registry_key: str, layer: str | None, *, argument: str = "layer", feature: str = "gene"
    ) -> None:
        self.argument, self.feature = argument, feature
        # scvi's own count check draws from the global random state, and its format correction replaces the user's X
        super().__init__(registry_key, layer, is_count_data=False, correct_data_format=False)

    def get_field_data(self, adata: ad.AnnData) -> Any:
        """The counts."""
        return matrix_of(adata, self.attr_key, argument=self.argument).x

    def validate_field(self, adata: ad.AnnData) -> None:
        """Refuse data without cells, and data whose first cells are not counts."""
        refuse_no_counts(adata, self.attr_key, argument=self.argument, feature=self.feature)

    def register_field(self, adata: ad.AnnData) -> dict:
        """Note the size of the data, and the names of the columns."""
        names = matrix_of(adata, self.attr_key, argument=self.argument).var.index
        found = super().register_field(adata)
        return found | {self.N_VARS_KEY: len(names), self.COLUMN_NAMES_KEY: np.asarray(names)}

    def transfer_field(self, state_registry: dict, adata_target: ad.AnnData, **kwargs: Any) -> dict:
        """Register the target by itself: its genes are matched by name, their number need not agree."""
        return self.register_field(adata_target)


class BatchField(CategoricalObsField):
    """Batches, by their text: a query may have 1.0 or "1" where the attached data have 1."""

    def validate_field(self, adata: ad.AnnData) -> None:
        """Refuse data without the column, and cells without a batch."""
        read_column(adata.obs, self._original_attr_key)

    def register_field(self, adata: ad.AnnData) -> dict:
        """Number the batches."""
        return self._number(adata, [], extend=True)

    def transfer_field(
        self, state_registry: dict, adata_target: ad.AnnData, extend_categories: bool = False, **kwargs: Any
    ) -> dict:
        """Number the batches as in the data that were registered first; new ones come after them."""
        known = [text_of(name) for name in state_registry[self.CATEGORICAL_MAPPING_KEY]]
        return self._number(adata_target, known, extend=extend_categories)

    def _number(self, adata: ad.AnnData, known: list[str], *, extend: bool) -> dict:
        key = self._original_attr_key
        codes, names = read_column(adata.obs, key)
        if not extend:
            present = [names[code] for code in np.unique(codes)]
            if new := [name for name in present if name not in known]:
                msg = (
                    f"adata.obs[{key!r}] has the batch {new[0]!r}, which the data of the saved model did not have; "
                    f"they had {known}. Load the model without data and pass these as a query, or set them up and "
                    "load the weights with from_pretrained."
                )
                raise ValueError(msg)
        place = {name: code for code, name in enumerate(known)}
        new_codes = np.array([place.setdefault(name, len(place)) for name in names], dtype=int)
        mapping = list(place)
        adata.obs[self.attr_key] = pd.Categorical.from_codes(new_codes[codes], mapping).codes
        return {
            self.CATEGORICAL_MAPPING_KEY: np.array(mapping, dtype=object),
            self.ORIGINAL_ATTR_KEY: key,
        }


class CountsManager(AnnDataManager):
    """Manager that finds counts in ``raw`` as well, and whose dataset keeps them sparse."""

    @property
    def counts(self) -> Matrix:
        """The counts, and the genes that their columns are."""
        return matrix_of(self.adata, self.data_registry[REGISTRY_KEYS.X_KEY]["attr_key"])

    def get_from_registry(self, registry_key: str) -> Any:
        """Data of a field."""
        found = self.data_registry[registry_key]
        if registry_key == REGISTRY_KEYS.X_KEY and getattr(found, "mod_key", None) is None:
            return self.counts.x
        return super().get_from_registry(registry_key)

    def create_torch_dataset(
        self,
        indices: Sequence[int] | None = None,
        data_and_attributes: list[str] | dict[str, Any] | None = None,
        load_sparse_tensor: bool = False,
    ) -> Dataset:
        """Rows of all registered fields; ``load_sparse_tensor`` is not read, counts are always sparse."""
        keys = list(self.data_registry if data_and_attributes is None else data_and_attributes)
        dataset = CountsDataset(self, keys)
        return dataset if indices is None else Subset(dataset, indices)


def without_view(adata: ad.AnnData) -> ad.AnnData:
    """A copy of a view, which scvi-tools cannot register, in memory; other data as they are."""
    if not adata.is_view:
        return adata
    whole = getattr(adata, "_adata_ref", None)  # a view is cut out of it by compiled code
    for x in () if whole is None or whole.isbacked else (whole.X, *whole.layers.values()):
        if sp.issparse(x) and x.format in ("csr", "csc"):
            refuse_pointers(
                x.indptr[:-1], x.indptr[1:], min(len(x.indices), len(x.data)), "of the whole data"
            )
    return to_memory(adata) if adata.isbacked else adata.copy()


def manager_of(adata: ad.AnnData, setup_method_args: dict[str, Any], **kwargs: Any) -> CountsManager:
    """Manager of an AnnData, or of one that takes the place of another, for which ``source_registry`` is given."""
    args = setup_method_args["setup_args"]
    refuse_missing_key(adata, args)
    fields: list[Any] = [CountsField(REGISTRY_KEYS.X_KEY, args["layer"])]
    if args["batch_key"] is not None:
        fields.append(BatchField(REGISTRY_KEYS.BATCH_KEY, args["batch_key"]))
    # labels are no field: they are read when they are learned, and a query need not have them
    if args["labels_key"] not in (None, *adata.obs) and "source_registry" not in kwargs:
        columns = list(adata.obs.columns)
        msg = f"{args['labels_key']!r} not found in adata.obs; its columns are {columns}."
        raise KeyError(msg)
    manager = CountsManager(fields=fields, setup_method_args=setup_method_args)
    manager.register_fields(adata, **kwargs)
    return manager


def refuse_missing_key(adata: ad.AnnData, setup_args: Mapping[str, Any]) -> None:
    """Refuse a column with names of genes that is not there.

    Raises KeyError, with those that are.
    """
    key, layer = setup_args["gene_key"], setup_args["layer"]
    if key is None:
        return
    var = matrix_of(adata, layer).var
    if key not in var:
        frame = "adata.raw.var" if is_raw(adata, layer) else "adata.var"
        msg = f"{key!r} not found in {frame}; its columns are {list(var.columns)}."
        raise KeyError(msg)
