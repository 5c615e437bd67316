"""Every code block of the README and the documentation is run, page by page, from top to bottom.

Python runs on a few blood cells that come with scanpy, or on a made-up multiome, with training cut to two epochs. Of
shell blocks, the lines that call `cellprior` are run. Two comments tell this file more, and readers see neither:

    <!-- not run: why -->   before a block that needs what a test cannot have
    <!-- run: ... -->       code that makes what the next blocks take for granted
"""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scvi
from anndata import AnnData

import cellprior as cp
from cellprior.cli import main
from tests.contract.models import blood_cells
from tests.model.multiomeclip.data import cells as multiome_cells

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in DOCS.rglob("*.md") if not {"_build", "generated"} & set(path.parts)),
]
LANGUAGES = {"python", "bash"}
SHOWN_ONLY = {"text", "toml", "yaml", "console"}
PIECE = re.compile(
    r"^<!-- (?P<marker>run|not run):(?P<said>.*?)-->$|^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)
# Two epochs are too few to be good, and the models say so.
trained_too_little = pytest.mark.filterwarnings("ignore::UserWarning")


class Block(NamedTuple):
    """A piece of a page: its language, its code, and why it is not run, if it is not."""

    language: str
    code: str
    excuse: str | None = None


def blocks(text: str) -> Iterator[Block]:
    """Pieces of a page in order; hidden code is Python."""
    excuse = None
    for piece in PIECE.finditer(text):
        if piece["marker"] == "run":
            yield Block("python", piece["said"])
        elif piece["marker"] == "not run":
            excuse = piece["said"].strip()
        else:
            yield Block(piece["language"], piece["code"], excuse)
            excuse = None


def test_the_pieces_of_a_page_are_found_in_order_each_with_what_is_said_of_it():
    page = (
        "# Title\n\n<!-- run:\na = 1\n-->\n```python\nb = 2\n```\n\n<!-- not run: needs a moon -->\n"
        "```bash\nls\n```\n<!-- a remark -->\n```{note}\nno code\n```\n```python\nc = 3\n```\n"
    )
    assert list(blocks(page)) == [
        Block("python", "\na = 1\n"),
        Block("python", "b = 2\n"),
        Block("bash", "ls\n", "needs a moon"),
        Block("python", "c = 3\n"),
    ]


@cache
def _some_cells() -> AnnData:
    adata = blood_cells()
    rng = np.random.default_rng(0)
    shown = ["CD3D", "LYZ", "NKG7", "IL7R"]  # genes that the pages name
    others = rng.permutation(adata.var_names.difference(shown))[: 300 - len(shown)]
    adata = adata[rng.permutation(adata.n_obs)[:240], [*others, *shown]].copy()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.layers.pop("log")
    adata.obs["sample"] = np.where(np.arange(adata.n_obs) % 2, "spatial", "dissociated")
    adata.obs["cell_type"] = adata.obs.pop("bulk_labels").astype(str).str.replace("CD[48].*", "T", regex=True)
    return adata


def made_up() -> dict[str, Any]:
    """What pages take for granted: cells with counts, samples and types; a reference and a query; a multiome."""
    adata, mdata = _some_cells().copy(), multiome_cells()
    mdata.obs["sample"] = mdata.obs.pop("batch")
    mdata.obs["cell_type"] = mdata.obs.pop("type")
    for modality in mdata.mod.values():
        modality.layers["counts"] = modality.X
        modality.obs["cell_type"] = mdata.obs["cell_type"].loc[modality.obs_names]
    half = np.arange(adata.n_obs) < 200
    return {
        "adata": adata,
        "reference": adata[half].copy(),
        "query": adata[~half].copy(),
        "mdata": mdata,
        "rna": mdata.mod["rna"].copy(),
        "atac": mdata.mod["atac"].copy(),
    }


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Two epochs of everything, in an empty folder, without the network."""
    start = scvi.train.TrainRunner.__init__
    signature = inspect.signature(start)

    def cut_short(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        given.arguments["max_epochs"] = min(given.arguments["max_epochs"], 2)
        start(*given.args, **given.kwargs)

    monkeypatch.setattr(scvi.train.TrainRunner, "__init__", cut_short)
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    seed = scvi.settings.seed
    yield
    plt.close("all")
    if seed is not None:
        scvi.settings.seed = seed


@trained_too_little
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs_from_top_to_bottom(page, quick, capsys):
    found = list(blocks(page.read_text(encoding="utf-8")))
    names = made_up() if any(block.language == "python" and not block.excuse for block in found) else {}
    if any(block.language == "bash" for block in found):
        cells = AnnData(_some_cells().layers["counts"], obs=_some_cells().obs, var=_some_cells().var)
        for name in ("cells", "reference", "query"):
            cells.write_h5ad(f"{name}.h5ad")
    excused = False
    cp.settings.progress = (
        None if page.name != "output.md" else False
    )  # what bars there are depends on the machine
    for number, block in enumerate(found):
        assert block.language in LANGUAGES | SHOWN_ONLY, f"{page}: a block of {block.language}"
        if block.excuse is not None:
            assert len(block.excuse) > 10, f"{page}: say why it is not run"
        elif block.language == "text" and page.name == "output.md" and not excused:
            assert_same_kinds(shown(capsys), block.code)
        elif block.language == "python":
            exec(compile(block.code, f"{page.name}, block {number}", "exec"), names)
        elif block.language == "bash":
            run_shell(block.code)
        excused = block.excuse is not None
    if page.name == "README.md":  # the first page that people read gives an embedding, a map and a record
        adata = names["adata"]
        embedding = adata.obsm["X_cellplm"]
        assert embedding.shape[0] == adata.n_obs
        assert embedding.dtype == np.float32
        assert np.isfinite(embedding).all()
        assert adata.obsm["X_umap"].shape == (adata.n_obs, 2)
        assert "cellprior" in adata.uns


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """What was on the screen since the last time: what is said on the way, then the result."""
    captured = capsys.readouterr()
    return captured.err + captured.out


def assert_same_kinds(said: str, page: str) -> None:
    """The same lines, whatever the numbers, names of types and spaces; `...` on the page stands for any lines."""
    wanted = [re.escape(kind) for kind in kinds_of_lines(page)]
    pattern = "\n".join(wanted).replace(r"\.\.\.", r"[\s\S]*?")
    found = "\n".join(kinds_of_lines(said))
    assert re.fullmatch(pattern, found), f"{found}\n\nThe page has:\n\n{page}"


def kinds_of_lines(text: str) -> list[str]:
    """Lines without numbers and repeated spaces, and one of those that follow each other and are alike."""
    kinds = []
    for line in text.splitlines():
        kind = re.sub(r"[-+]?\d[\d,.]*(?:e[-+]\d+)?(?<![.,])|\bnan\b", "#", " ".join(line.split()))
        kind = re.sub(r"\S*(?=/cellprior/weights/)", "PATH", kind)
        kind = re.sub(r"^(unknown|[A-Z][\w+/ #-]*) #$", "TYPE #", kind)
        if kind and kinds[-1:] != [kind]:
            kinds.append(kind)
    return kinds


def test_kinds_of_lines_know_numbers_and_nothing_else():
    page = "Trained for 20 epochs. loss: 3.5.\n...\nB cell      12\nT cell  3\n"
    assert_same_kinds("Trained for 3 epochs. loss: 1e-05.\nmore\nand more\nunknown 1\n", page)
    for other in ("Trained for 3 epochs.\nmore\nunknown 1\n", "Trained for 3 epochs. loss: 1.\nmore\n"):
        with pytest.raises(AssertionError):
            assert_same_kinds(other, page)


def run_shell(code: str) -> None:
    """Run the calls of `cellprior`, as in a shell; of a script, look whether it is there."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["cellprior"]:
            assert main(words[1:]) == 0, line
        elif words[:1] == ["python"] and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), line


def test_a_page_whose_code_fails_would_be_noticed(quick):
    with pytest.raises(cp.model.NotCountsError):
        exec("import cellprior as cp\ncp.tl.embed(adata, 'cellplm-starter')", made_up())


def test_a_link_or_an_image_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "index.html").write_text(
        '<h1 id="top">a</h1><a href="#top"></a><a href="b/page.html#x%20y"></a><a href="https://scverse.org/nope"></a>'
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "page.html").write_text('<p id="x y"></p><a href="../index.html"></a>')
    command = [sys.executable, str(ROOT / "scripts" / "check_links.py"), str(tmp_path)]
    whole = subprocess.run(command, capture_output=True, text=True)
    assert (whole.returncode, whole.stdout) == (0, "4 links in 2 pages, 0 broken\n")
    (tmp_path / "b" / "page.html").write_text(
        '<a href="../index.html#no"></a><img src="no.png"><a href="no.html"></a>'
    )
    broken = subprocess.run(command, capture_output=True, text=True)
    assert broken.returncode == 1
    for link in (
        "b/page.html: ../index.html#no",
        "b/page.html: no.png",
        "b/page.html: no.html",
        "b/page.html#x%20y",
    ):
        assert link in broken.stdout
