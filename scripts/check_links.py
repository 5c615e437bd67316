"""Look whether every link and image of the built documentation that stays inside it leads somewhere.

    python scripts/check_links.py FOLDER

FOLDER is what sphinx-build has written. Links to other sites are not followed.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """Names in a page that can be linked to, and what it links to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = {""}
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note one element."""
        for name, value in attrs:
            if name == "id" or (name == "name" and tag == "a"):
                self.anchors.add(value or "")
            elif name in ("href", "src") and value:
                self.links.append(value)


def main() -> int:
    """Print the links that lead nowhere; 1 if there are any."""
    root = Path(sys.argv[1]).resolve()
    pages = {path: Page(path) for path in root.rglob("*.html") if path.parent.name != "_static"}
    if not pages:
        sys.stderr.write(f"{root} holds no pages: build the documentation first.\n")
        return 1
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            if not target.exists() or (target in pages and anchor not in pages[target].anchors):
                broken.append(f"{path.relative_to(root)}: {link}")
    n_links = sum(len(page.links) for page in pages.values())
    sys.stdout.write("\n".join([*broken, f"{n_links:,} links in {len(pages)} pages, {len(broken)} broken\n"]))
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
