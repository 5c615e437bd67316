"""How CellPLM's cells are encoded: sentence by sentence, each whole and exactly, a few cells at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from cellprior.model.cellplm._cluster import submit_sentence
from cellprior.model.cellplm._hidden import HiddenStates, StoredStates
from cellprior.model.cellplm._inputs import sentences
from cellprior.model.engine._encoder import Covariates, Encoder
from cellprior.model.engine._sizes import Chunks


@dataclass
class SentenceEncoder(Encoder):
    """A unit is a sentence: the cells of a batch."""

    sees_others = True

    @property
    def n_stages(self) -> int:
        """Embedder, layers, norm and latent."""
        return len(self.module.encoder) + 3

    def units(self, n_cells: int, batch: np.ndarray | None, size: int) -> list[np.ndarray]:
        """Positions of the cells of each batch."""
        return list(sentences(np.arange(n_cells), batch))

    def encode(self, chunks: Iterable[Any], covariates: Covariates) -> Iterator[Tensor]:
        """Latents of each chunk of a sentence, whose hidden states are in memory, or in the folder of the chunks."""
        if not isinstance(chunks, Chunks) or chunks.scratch is None:
            states = HiddenStates(step=chunks.step) if isinstance(chunks, Chunks) else HiddenStates()
        else:
            device, width = self.module.device, self.module.n_hidden
            states = StoredStates(chunks.scratch, chunks.sizes, width, device=device, step=chunks.step)
            chunks = chunks.read(states.n_filled)
        return self.module.encode_chunks(chunks, gene_index=self.columns(), states=states, **self.options)

    def hidden(self, chunks: Iterable[Any], covariates: Covariates) -> Iterable[Tensor]:
        """Hidden states of each chunk of a sentence."""
        return self.module.hidden_chunks(chunks, gene_index=self.columns())

    def submit(self, cluster: Any, cells: np.ndarray) -> list[tuple[Any, np.ndarray]]:
        """A long sentence is worked on by several workers."""
        centred = self.module.direction is not None
        return submit_sentence(cluster, cells, len(self.module.encoder), centred=centred)
