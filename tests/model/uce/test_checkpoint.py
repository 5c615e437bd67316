"""The official files of UCE, and bundles made of them."""

from __future__ import annotations

import os
import pickle
import tarfile

import numpy as np
import pandas as pd
import pytest
import torch

from cellprior import weights
from cellprior.model import UCE, convert, model_class
from cellprior.model.uce._checkpoint import LATIN, read_official
from cellprior.weights import WeightsError, read_bundle
from tests.contract.shared import Bomb
from tests.parity.uce_golden import case_a, embed

HUMAN = ("human",)


@pytest.fixture
def official(tmp_path):
    return case_a().write(tmp_path / "official")


def wide(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Made-up tensors with tokens of 64 numbers, as one head of the released files has."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, x in tensors.items():
        shape = [{32: 64, 96: 192}.get(n, n) for n in x.shape]
        if name == "binary_decoder.0.0.weight":
            shape[1] = 24 + 64
        found[name] = torch.randn(shape, generator=generator)
    del found["pos_encoder.pe"]
    return found


def test_official_files_are_recognised_read_and_converted_by_name_of_the_model(tmp_path):
    case = case_a()
    path = case.write(tmp_path / "official", tensors=wide(case.tensors))
    assert model_class(path) is UCE
    assert model_class(path.parent) is UCE
    folder = convert(path, tmp_path / "bundle")
    bundle = read_bundle(folder)
    assert bundle.config["network"]["n_heads"] == 1
    assert bundle.genes["species"].unique().tolist() == ["human", "mouse"]
    assert np.isfinite(embed(folder, case.cells("mouse"))).all()
    assert np.isfinite(embed(path, case.cells("human"))).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_conversion_holds_the_chosen_species_and_a_cell_has_its_vector_whichever_they_are(
    official, tmp_path, dtype
):
    cells, found = case_a().cells("human"), []
    for species in (HUMAN, ("human", "mouse"), tuple(LATIN)):
        folder = UCE.convert(official, tmp_path / "-".join(species), species=species, dtype=dtype, n_heads=4)
        assert set(read_bundle(folder).genes["species"]) == set(species)
        found.append(embed(folder, cells))
    assert read_bundle(folder).card.count("CC BY 4.0") == 1
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], rtol=0, atol=1e-6)
    UCE.convert(official, folder, species=HUMAN, n_heads=4, overwrite=True)
    with pytest.raises(FileExistsError):
        UCE.convert(official, folder, species=HUMAN, n_heads=4)


def test_names_are_read_of_proteins_unpacked_or_in_their_archive_without_running_pickles(tmp_path):
    case = case_a()
    expected = read_official(case.write(tmp_path / "a"), n_heads=4)
    for packed in (False, True):
        path = case.write(tmp_path / str(packed))
        folder = path.parent / "protein_embeddings"
        for species, latin in LATIN.items():
            (folder / f"{species}.txt").unlink()
            torch.save({n: torch.zeros(48) for n in case.names(species)}, folder / f"{latin}.X.pt")
        if packed:
            with tarfile.open(path.parent / "protein_embeddings.tar.gz", "w:gz") as archive:
                archive.add(folder, arcname="model_files/protein_embeddings")
            for file in folder.iterdir():
                file.unlink()
        found = read_official(path, n_heads=4)
        pd.testing.assert_frame_equal(found.genes, expected.genes)
        torch.testing.assert_close(found.state_dict, expected.state_dict, rtol=0, atol=0)
    os.truncate(path.parent / "protein_embeddings.tar.gz", 200)
    with pytest.raises(WeightsError, match=r"tar\.gz is truncated or damaged"):
        read_official(path, n_heads=4)


def test_pickles_beside_the_checkpoint_are_not_run(official, tmp_path):
    bombs = tmp_path / "offsets", tmp_path / "names"
    (official.parent / "species_offsets.pkl").write_bytes(pickle.dumps({"human": Bomb(bombs[0])}))
    with pytest.raises(WeightsError, match="nothing in it was executed"):
        read_official(official, n_heads=4)
    case_a().write(official.parent)
    (official.parent / "protein_embeddings/human.txt").unlink()
    torch.save({"CD4": Bomb(bombs[1])}, official.parent / "protein_embeddings/Homo_sapiens.X.pt")
    with pytest.raises(WeightsError, match="nothing in it was executed"):
        read_official(official, n_heads=4)
    assert not any(bomb.exists() for bomb in bombs)


def test_codes_of_chromosomes_are_kept_and_do_not_depend_on_the_order_of_the_table(tmp_path):
    case = case_a()
    expected = read_official(case.write(tmp_path / "a"), n_heads=4).state_dict
    shuffled = case.positions.sample(frac=1, random_state=0)
    found = read_official(case.write(tmp_path / "b", positions=shuffled), n_heads=4).state_dict
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    human = read_official(case.write(tmp_path / "c"), HUMAN, n_heads=4).state_dict["chromosome_code"]
    assert set(human.tolist()) < set(expected["chromosome_code"].tolist())


def changed(what: str):
    """The golden files with one thing wrong."""
    case = case_a()
    positions, offsets, tensors = case.positions, case.offsets, case.tensors
    first = positions[positions["species"] == "human"].iloc[[0]]
    if what == "a symbol twice":
        positions = pd.concat([positions, first.assign(start="77")])
    if what == "no start":
        positions.loc[3, "start"] = "?"
    if what == "a column less":
        positions = positions.drop(columns="chromosome")
    if what == "another chromosome":
        positions = pd.concat([positions, first.assign(gene_symbol="NEW", chromosome="99")])
    if what == "another offset":
        offsets["mouse"] += 1
    if what == "an unknown tensor":
        tensors["lm_head.weight"] = torch.zeros(2)
    if what == "no table":
        del tensors["pe_embedding.weight"]
    if what == "no layer":
        del tensors["encoder.0.weight"]
    if what == "other positions":
        tensors["pos_encoder.pe"] = torch.ones(4, 1, 32)
    return {"positions": positions, "offsets": offsets, "tensors": tensors}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a symbol twice", "of human lies at two places"),
        ("no start", r"starts at '\?'"),
        ("a column less", r"lacks the columns \['chromosome'\]"),
        ("another chromosome", "not of one release"),
        ("another offset", "346 genes of mouse, and .* not of one release"),
        ("an unknown tensor", "lm_head.weight"),
        ("no table", "lacks pe_embedding.weight"),
        ("no layer", "lacks 'token_encoder.0.weight'"),
        ("other positions", "sines and cosines"),
    ],
)
def test_files_that_are_wrong_are_refused_and_said_why(tmp_path, what, message):
    path = case_a().write(tmp_path, **changed(what))
    with pytest.raises(WeightsError, match=message):
        read_official(path, LATIN if what == "another chromosome" else None, n_heads=4)


def test_a_gene_without_a_position_is_left_out_and_the_card_says_so(tmp_path):
    positions = case_a().positions
    symbol = case_a().names("human")[5]
    positions = positions[(positions["gene_symbol"] != symbol.upper()) | (positions["species"] != "human")]
    bundle = read_official(case_a().write(tmp_path, positions=positions), n_heads=4)
    assert not ((bundle.genes["symbol"] == symbol) & (bundle.genes["species"] == "human")).any()
    assert f"human {symbol}" in bundle.card


@pytest.mark.parametrize("name", ["species_chrom.csv", "species_offsets.pkl", "protein_embeddings/human.txt"])
def test_a_file_that_is_missing_is_named(official, name):
    (official.parent / name).unlink()
    with pytest.raises(WeightsError, match=r"Homo_sapiens.*human\.txt" if "txt" in name else name):
        read_official(official, n_heads=4)


def test_species_and_heads_that_cannot_be_told_are_refused(official):
    with pytest.raises(WeightsError, match="no species 'rat'; name one or more of frog, human"):
        read_official(official, ["rat"], n_heads=4)
    with pytest.raises(WeightsError, match="no species"):
        read_official(official, [], n_heads=4)
    with pytest.raises(WeightsError, match=r"n_heads=\.\.\."):
        read_official(official)


def test_chromosomes_that_are_not_there_are_refused(tmp_path):
    folder = case_a().bundle(tmp_path)
    bundle = read_bundle(folder)
    bundle.state_dict["gene_chromosome"][7] = 999
    parts = {"config": bundle.config, "genes": bundle.genes, "card": ""}
    weights.write_bundle(folder, state_dict=bundle.state_dict, overwrite=True, **parts)
    with pytest.raises(WeightsError, match="gene_chromosome goes from 0 to 999"):
        embed(folder, case_a().cells("human"))


# a species of one's own


def proteins(n: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(rng.normal(size=(n, 48)), index=[f"Rat{i}" for i in range(n)])


def places(names: pd.Index) -> pd.DataFrame:
    chromosome = [str(i % 5 + 1) for i in range(len(names))]  # numbers, which the original cannot do
    return pd.DataFrame({"gene_symbol": names, "chromosome": chromosome, "start": range(len(names))})


def add(folder, target, **how):
    table = proteins()
    how = {"species": "rat", "proteins": table, "positions": places(table.index), "taxon": 10116, **how}
    return UCE.add_species(folder, target, **how)


def test_a_species_can_be_added_and_the_others_stay_as_they_were(tmp_path):
    case = case_a()
    folder = case.bundle(tmp_path)
    more = add(folder, tmp_path / "more")
    for species in ("human", "mouse"):
        np.testing.assert_array_equal(embed(more, case.cells(species)), embed(folder, case.cells(species)))
    counts = (
        np.random.default_rng(1).poisson(1.0, (9, 60)).astype(np.float32)
    )  # 9 cells, which the original cannot do
    rat = case.cells("human")[:9, :60].copy()
    rat.X, rat.var_names = counts, proteins().index
    model = UCE.from_pretrained(more, rat)
    assert model.gene_match.species == {"rat": 60}
    assert np.isfinite(model.get_latent_representation()).all()
    # its tokens are what the layers make of its proteins, and of chromosomes drawn by the taxon
    vectors = torch.tensor(proteins().to_numpy(np.float32))
    encoded = model.module.token_encoder(torch.nn.functional.normalize(vectors, dim=1))
    found = model.get_gene_representation(species="rat")
    np.testing.assert_allclose(found.to_numpy(), encoded.numpy(), rtol=1e-6, atol=1e-5)
    torch.manual_seed(10116)
    drawn = torch.normal(mean=0, std=1, size=(5, 48))
    encoded = model.module.token_encoder(torch.nn.functional.normalize(drawn, dim=1))
    n_genes, n_chromosomes = len(model.genes), len(model.module.chromosome_code)
    row = slice(n_genes + n_chromosomes - 5, n_genes + n_chromosomes)
    torch.testing.assert_close(model.module.token_table.weight[row], encoded, rtol=0, atol=1e-6)
    model.release()


def test_what_a_new_species_lacks_is_said(tmp_path):
    folder = case_a().bundle(tmp_path)
    table, name = proteins(), tmp_path / "more"
    with pytest.warns(UserWarning, match="10 of 60 genes of rat have no position"):
        add(folder, name, positions=places(table.index[:50]))
    scaffolds = places(table.index).assign(chromosome=[f"s{i}" for i in range(60)])
    others = [f"x{i}" for i in range(700)]
    many = pd.concat([scaffolds, places(pd.Index(others)).assign(chromosome=others)])
    with pytest.warns(UserWarning, match="760 chromosomes, and a sentence has room for"):
        add(folder, name, positions=many, overwrite=True)
    twice = pd.concat([places(table.index), places(table.index).assign(start=1)])
    for how, error, message in (
        ({"species": "human"}, ValueError, "have human, mouse already"),
        ({"proteins": table.iloc[:, :40]}, WeightsError, r"vector of Rat0 is \(40,\); needed: 48"),
        ({"proteins": table.mask(table > 2)}, WeightsError, "not finite"),
        ({"positions": places(pd.Index(["A", "B"]))}, WeightsError, "None of the 60 proteins"),
        ({"positions": twice}, WeightsError, "lies at two places"),
        ({"taxon": 0}, ValueError, "taxon=0"),
    ):
        with pytest.raises(error, match=message):
            add(folder, tmp_path / "no", **how)
    torch.save(
        {name: torch.tensor(row.to_numpy(np.float32)) for name, row in table.iterrows()}, tmp_path / "rat.pt"
    )
    places(table.index).to_csv(tmp_path / "rat.csv", index=False)
    found = add(folder, tmp_path / "file", proteins=tmp_path / "rat.pt", positions=tmp_path / "rat.csv")
    expected = add(folder, tmp_path / "frame")
    torch.testing.assert_close(read_bundle(found).state_dict, read_bundle(expected).state_dict)
