"""The card of an entry: what these weights are, where they come from and what one may do with them."""

from __future__ import annotations

from dataclasses import dataclass

from cellprior.weights._registry import Entry, get_entry, human_size


@dataclass(frozen=True, slots=True)
class Card:
    """Markdown about one registry entry; `str(card)` in a terminal, rendered in a notebook."""

    name: str
    text: str

    def __str__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:
        return self.text


def card(name: str) -> Card:
    """Card of a registry entry: its own README where that is on this machine, else what the registry knows.

    Parameters
    ----------
    name
        Entry name, as listed by `available`.

    Raises
    ------
    WeightsError
        If the registry has no such entry.
    """
    entry = get_entry(name)
    readme = entry.folder / "README.md"
    return Card(name, readme.read_text(encoding="utf-8") if readme.is_file() else _from_entry(entry))


def _from_entry(entry: Entry) -> str:
    """Card text for an entry without a README."""
    facts = {
        "Model class": entry.model,
        "Kind": entry.type,
        "Licence": entry.licence,
        "Citation": entry.citation,
        "Trained on": entry.trained_on,
        "Genes": entry.genes,
        "Size": human_size(entry.size),
        "Status": f"{entry.status}; {entry.support}",
        "Page": entry.page,
        "Notes": entry.notes,
    }
    lines = [f"# {entry.name}", "", *(f"- **{key}:** {fact}" for key, fact in facts.items() if fact)]
    lines += ["", "| file | sha256 | address |", "|---|---|---|"]
    for file in entry.files:
        known = file.sha256 or "recorded at the first download"
        place = f"{file.url} ({file.member})" if file.member else file.url
        lines.append(f"| {file.name} | {known} | {place} |")
    return "\n".join(lines) + "\n"
