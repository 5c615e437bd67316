"""Weights by their address: what belongs beside a checkpoint comes from beside it there, or is named."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

import cellprior as cp
from cellprior.cli import main
from cellprior.model import CellPLM, model_class
from cellprior.weights import WeightsError, sha256
from tests.compatibility.cells import rna
from tests.parity.cellplm_golden import Golden

BUNDLE = Path(__file__).parents[1] / "compatibility" / "bundle-format-1" / "CellPLM"


@pytest.fixture
def case(tmp_path: Path) -> tuple[Golden, Path]:
    golden = Golden.load("vae")
    return golden, golden.write(tmp_path / "official")


def serve(server, *files: Path) -> str:
    """Address of the first."""
    return [server.serve(f"/x/{quote(file.name)}", file.read_bytes()) for file in files][0]


def test_what_belongs_beside_a_checkpoint_is_fetched_once_and_is_in_the_provenance(server, case):
    golden, path = case
    config = path.with_name(path.name.replace(".best.ckpt", ".config.json"))
    url = serve(server, path, config)
    assert model_class(url, known_hash=sha256(path)) is CellPLM
    model = CellPLM.from_pretrained(url, golden.adata, known_hash=sha256(path))
    np.testing.assert_allclose(
        model.get_latent_representation(), golden["one_sentence__vae_mu"], rtol=1e-5, atol=1e-5
    )
    assert model.pretrained_ == {"weights": url, "sha256": sha256(path, config)} and sha256(
        path, config
    ) != sha256(path)
    assert sorted(server.asked) == sorted([f"/x/{path.name}", f"/x/{config.name}"])


def test_what_is_not_beside_it_either_is_named_with_its_address(server, case):
    golden, path = case
    url = serve(server, path)
    with pytest.raises(
        WeightsError, match=r"needs tiny_vae\.config\.json.*looked for beside.*HTTP 404.*pass the path"
    ) as error:
        CellPLM.from_pretrained(url, golden.adata, known_hash=sha256(path))
    assert url.replace(".best.ckpt", ".config.json") in str(error.value)


def test_a_file_beside_it_that_has_changed_in_the_cache_is_fetched_again_or_refused(server, case):
    golden, path = case
    config = path.with_name(path.name.replace(".best.ckpt", ".config.json"))
    url = serve(server, path, config)
    options = {"known_hash": sha256(path)}
    cached = Path(
        CellPLM.from_pretrained(url, golden.adata, **options) and cp.weights.resolve(url, **options)
    )
    (cached.parent / config.name).write_text("{}")
    CellPLM.from_pretrained(url, golden.adata, **options)
    assert (cached.parent / config.name).read_bytes() == config.read_bytes()


def test_embed_and_annotate_take_the_hash_of_weights(tmp_path: Path, capsys):
    data, known = rna(), sha256(BUNDLE)
    cp.tl.embed(data, BUNDLE, known_hash=known)
    assert data.uns["cellprior"]["X_cellplm"]["sha256"] == known
    for function in (cp.tl.embed, cp.tl.annotate):
        with pytest.raises(WeightsError, match=f"needed is {'0' * 64}"):
            function(rna(), BUNDLE, known_hash="0" * 64)
    rna().write_h5ad(tmp_path / "in.h5ad")
    files = [str(tmp_path / "in.h5ad"), str(tmp_path / "out.h5ad"), "--weights", str(BUNDLE)]
    for verb in ("embed", "annotate"):
        assert main([verb, *files, "--known-hash", "0" * 64]) == 1
        assert "another folder than expected" in capsys.readouterr().err
        assert main([verb, *files, "--known-hash", known]) == 0
        (tmp_path / "out.h5ad").unlink()
