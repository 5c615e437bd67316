"""Floors of masked-gene prediction, by technology: each measures other genes, and puts them in another order."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from cellprior.model.learning._rank_floors import RankFloors
from cellprior.model.nicheformer._inputs import CONTEXT_TECHNOLOGY, FIRST_GENE, TECHNOLOGIES


class TechnologyFloors(nn.Module):
    """:class:`~cellprior.model.learning._rank_floors.RankFloors` of the cells of each technology.

    A rank is a place among a cell's tokens, those of its context included.
    """

    def __init__(self, floors: list[RankFloors]) -> None:
        super().__init__()
        self.floors = nn.ModuleList(floors)

    @classmethod
    def fit(
        cls, cells: Iterable[tuple[Tensor, Tensor]], *, n_genes: int, n_positions: int
    ) -> TechnologyFloors:
        """Count in one pass over tokens ``(cells, positions)`` and codes of the context ``(cells,)``."""
        sizes = {"n_genes": n_genes, "n_positions": n_positions, "first": FIRST_GENE}
        found = [RankFloors.fit([], **sizes) for _ in TECHNOLOGIES]
        for tokens, context in cells:
            technology = CONTEXT_TECHNOLOGY[context.cpu()]
            for code in technology.unique().tolist():
                of_it = tokens[(technology == code).to(tokens.device)]
                counts = found[code].counts
                found[code].counts = counts.to(of_it.device) + RankFloors.fit([of_it], **sizes).counts
        return cls(found)

    def predict(
        self, tokens: Tensor, selected: Tensor, context: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """As of :class:`~cellprior.model.learning._rank_floors.RankFloors`, for codes of the context ``(cells,)``."""
        technology = CONTEXT_TECHNOLOGY[context.cpu()].to(tokens.device)
        of_place = technology[selected.nonzero()[:, 0]]
        joined: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for code, floor in enumerate(self.floors):
            cells, places = technology == code, of_place == code
            if not bool(cells.any()) and code:
                continue  # of the first, to have the names
            assert isinstance(floor, RankFloors)
            found = floor.predict(tokens[cells], selected[cells], first=FIRST_GENE)
            for whole, part in zip(joined, found, strict=True):
                for name, value in part.items():
                    into = whole.setdefault(name, value.new_zeros(len(of_place)))
                    into[places] = value
        return joined
