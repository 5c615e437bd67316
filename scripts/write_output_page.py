"""Fill the page docs/user_guide/output.md with what its blocks print.

    python scripts/write_output_page.py

Blocks that are not run, and their output, stay as they are. Needs `pip install ".[test]"`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "user_guide" / "output.md"
MOST = 12  # lines that are shown of a long output
BLOCK = re.compile(r"(<!-- not run.*?-->\n)?```(python|bash)\n(.*?)```\n\n```text\n(.*?)```", flags=re.DOTALL)

sys.path.insert(0, str(ROOT))


def main() -> int:
    """Run the blocks and write what they print below them."""
    from anndata import AnnData

    from tests.test_docs import _some_cells, made_up, run_shell

    text, names = PAGE.read_text(encoding="utf-8"), made_up()
    cells = AnnData(_some_cells().layers["counts"], obs=_some_cells().obs, var=_some_cells().var)

    def filled(block: re.Match[str]) -> str:
        if block[1]:
            return block[0]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if block[2] == "python":
                exec(compile(block[3], PAGE.name, "exec"), names)
            else:
                run_shell(block[3])
        lines = [line.rstrip() for line in said.getvalue().replace(str(Path.home()), "~").splitlines()]
        lines = [re.sub(r"\S*(?=/cellprior/weights/)", "...", line) for line in lines]
        if any(line.startswith("```") for line in lines):  # of a card, which has code of its own
            lines = [*lines[:1], "..."]
        if len(lines) > MOST:
            lines = [*lines[: MOST - 2], "..."]
        return block[0][: block.start(4) - block.start()] + "\n".join(lines) + "\n```"

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.environ |= {"CELLPRIOR_OFFLINE": "1", "CELLPRIOR_PROGRESS": "0"}
        for name in ("cells", "reference", "query"):
            cells.write_h5ad(f"{name}.h5ad")
        text = BLOCK.sub(filled, text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
