"""ScGPT against numbers of the original; every test here is a `test_against_scgpt`."""

from __future__ import annotations

import gzip
import json
import runpy
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cellprior.model import ScGPT
from cellprior.model.scgpt._checkpoint import rename
from cellprior.model.scgpt._heads import Expression, reverse_gradient
from cellprior.model.scgpt._inputs import Counts, as_tokens, bin_bounds, choose_bins
from cellprior.model.scgpt._loss import contrastive, elastic_similarity, masked_losses, read_cells, zero_loss
from cellprior.model.scgpt._module import ScGPTModule, Tokens

from .scgpt_golden import CaseA, Variant, case_a, variant_tokens

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
TOKENS = variant_tokens()
VALID = torch.arange(20) < TOKENS.length[:, None]
DECODED = ("mlm_output", "mvc_output", "mlm_zero_probs", "mvc_zero_probs", "cls_output", "dab_output")


def close(found, expected, *, msg: str = "", **how) -> None:
    np.testing.assert_allclose(found.detach(), expected.detach(), **{**TOLERANCE, **how}, err_msg=msg)


@pytest.fixture
def case() -> CaseA:
    return case_a()


@pytest.fixture
def module(case, tmp_path) -> ScGPTModule:
    return case.module(tmp_path)


# case A: bins and tokens


def test_against_scgpt_bins_of_all_counts_exactly(case):
    counts = case.counts
    np.testing.assert_array_equal(counts.gene, case.row_of_token[case.arrays["bin/token_id"]])
    left, right = bin_bounds(counts)
    np.testing.assert_array_equal(left, case.arrays["bin/left"])
    np.testing.assert_array_equal(right, case.arrays["bin/right"])


def test_against_scgpt_tokens_with_its_draws_exactly(case):
    counts = case.counts
    bins = choose_bins(*bin_bounds(counts), case.arrays["embed_maxlen1200/rand"])
    found = as_tokens(counts.indptr, counts.gene, bins, n_genes=800, cls_value=-2)
    theirs = case.tokens("embed_maxlen1200")
    np.testing.assert_array_equal(found.gene, theirs.gene)
    np.testing.assert_array_equal(found.value, theirs.value)
    np.testing.assert_array_equal(found.length, theirs.length)


def test_against_scgpt_bins_of_log_normalised_values_exactly(case):
    """Only the order of a cell's values matters, and every bin of its preprocessing is one that we allow."""
    counts = case.counts
    left, right = bin_bounds(counts)
    depth = np.add.reduceat(counts.value.astype(np.float64), counts.indptr[:-1])[counts.cell]
    logarithm = np.log1p(counts.value * (1e4 / depth)).astype(np.float32)
    again = bin_bounds(counts._replace(value=logarithm))
    np.testing.assert_array_equal(again, (left, right))
    column = np.cumsum(case.arrays["token_id_of_column"] >= 0) - 1
    known = case.arrays["token_id_of_column"][case.arrays["counts/indices"].astype(int)] >= 0
    theirs = case.arrays["ft/X_binned"][counts.cell, column[case.arrays["counts/indices"].astype(int)[known]]]
    assert ((theirs > right) | (left == right)).all()
    assert (theirs <= left).all()


# case A: the network


@pytest.mark.parametrize("heading", ["embed_maxlen1200", "embed_maxlen101"])
def test_against_scgpt_embeddings(case, module, heading):
    tokens = case.tokens(heading)
    with torch.inference_mode():
        close(module.pool(tokens), case[f"{heading}/X_scGPT"])
        close(module.pool(tokens, unit_length=False), case[f"{heading}/cls_raw"])
        close(module.encode(tokens)[:, 0], case[f"{heading}/cls_raw"])


def test_against_scgpt_layer_by_layer(case, module):
    tokens = case.tokens("embed_maxlen101")
    one = Tokens(*(part[:1] for part in tokens))
    genes, values = module.gene_encoder(one.gene), module.value_encoder(one.value)
    close(genes, case["layers/gene_embedding"])
    close(values, case["layers/value_embedding"])
    close(module.value_encoder(one.value.float()), values)  # the table, and the network that it is made of
    x, mask = genes + values, module._key_mask(one.gene)
    for i, layer in enumerate(module.encoder):
        x = layer(x, mask)
        n = int(one.length)
        close(x[:, :n], case[f"layers/out{i}"][:, :n])


def test_against_scgpt_gene_vectors(case, module):
    rows = torch.from_numpy(case.row_of_token[:5])
    close(module.gene_encoder(rows), case["gene_embedding_first5"])


@pytest.mark.parametrize("heading", ["ft_zeros", "ft_expressed"])
def test_against_scgpt_losses_and_gradients(case, tmp_path, heading):
    module = case.module(tmp_path, dropout_rate=0.0).train()
    tokens = case.tokens(heading)
    hidden = case.tokens(heading, "masked").value == -1
    domain = case["ft/domain"]
    read = read_cells(module, tokens, hidden, domain)
    parts = masked_losses(read, tokens.value, hidden)
    parts |= elastic_similarity(read.cell, 0.8) | contrastive(read.cell, read.cell)
    classes, batches = module.classify(read.cell), module.adversary(reverse_gradient(read.cell))
    parts["cls"] = F.cross_entropy(classes, case["ft/labels"])
    parts["dab"] = F.cross_entropy(batches, domain)
    valid = tokens.gene != 800
    close(read.bins[valid], case[f"{heading}/mlm_output"][valid])
    close(read.mvc[valid], case[f"{heading}/mvc_output"][valid])
    close(read.cell, case[f"{heading}/cell_emb"])
    close(classes, case[f"{heading}/cls_output"])
    close(batches, case[f"{heading}/dab_output"])
    names = {"masked": "gep", "mvc": "gepc", "ecs": "ecs", "contrastive": "cce", "cls": "cls", "dab": "dab"}
    for ours, theirs in names.items():
        close(parts[ours], case[f"{heading}/loss_{theirs}"])
    total = parts["masked"] + parts["mvc"] + 10 * parts["ecs"] + parts["cls"] + parts["dab"]
    close(total, case[f"{heading}/loss_total"])
    total.backward()
    kind = heading.removeprefix("ft_")
    names = case.arrays[f"grad_names_{kind}"].tolist()
    theirs = rename(dict(zip(names, case[f"grad_norms_{kind}"], strict=True)), "golden")
    found = {name: p.grad.norm().double() for name, p in module.named_parameters()}
    assert found.keys() == theirs.keys()
    for name, norm in found.items():
        close(norm, theirs[name], rtol=2e-4, msg=name)


def test_against_scgpt_loaded_four_ways_it_is_the_same_network(case, tmp_path):
    tensors = case.tensors

    def renamed(old: str, new: str) -> dict[str, torch.Tensor]:
        return {name.replace(old, new): x for name, x in tensors.items()}

    spellings = {
        "in_proj": tensors,
        "Wqkv": renamed("in_proj_", "Wqkv."),
        "_impl": {
            name.replace("in_proj_", "_impl.Wqkv.").replace("attn.out_proj", "attn._impl.out_proj"): x
            for name, x in tensors.items()
        },
        "module": {f"module.{name}": x for name, x in renamed("in_proj_", "Wqkv.").items()},
    }
    tokens, found = case.tokens("embed_maxlen101"), []
    for name, spelled in spellings.items():
        assert name == "in_proj" or any(name in key for key in spelled)
        case.write(tmp_path / name, tensors=spelled)
        adata = ad.AnnData(np.ones((3, 800), dtype=np.float32))
        adata.var_names = [gene for gene in case.vocabulary if not gene.startswith("<")]
        model = ScGPT.from_pretrained(tmp_path / name, adata)
        with torch.inference_mode():
            found.append(model.module.pool(tokens))
        model.release()
    close(found[0], case["embed_maxlen101/X_scGPT"])
    assert all(torch.equal(found[0], other) for other in found)


# variants

VARIANTS = [
    "continuous_cls", "avg_pool", "w_pool", "category", "scaling", "zero_prob", "batch_labels", "dsbn", "bn",
    "mvc_concat", "mvc_sum", "mvc_detach", "flash", "flash_prenorm",
]  # fmt: skip


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_against_scgpt_variants(name, mode):
    variant = Variant(name)
    if f"out/{mode}/cell_emb" not in variant:
        assert name in ("mvc_concat", "mvc_sum")  # whose forward the original cannot run
        return
    module = variant.module().train(mode == "train")
    batch = Variant("inputs")["domain_same" if name == "dsbn" else "domain_mixed"]
    hidden = module.encode(TOKENS, domain=1 if name == "dsbn" else None)
    cell, counted = hidden[:, 0], VALID if mode == "eval" else torch.ones_like(VALID)
    if name == "avg_pool":  # the original's mean is over the padding too, which is 0 in eval mode
        cell = (hidden * counted[..., None]).sum(1) / 20
        if mode == "eval":
            close(module.pool(TOKENS, "mean", unit_length=False) * TOKENS.length[:, None] / 20, cell)
    if name == "w_pool":
        cell = F.normalize((hidden * (TOKENS.value * counted)[..., None]).sum(1), dim=1)
        if mode == "eval":
            close(module.pool(TOKENS, "weighted"), cell)
    found = {"cell_emb": cell}
    found["mlm_output"], found["mlm_zero_probs"] = module.predict_bins(hidden, batch=batch)
    found["mvc_output"], found["mvc_zero_probs"] = module.predict_bins_of_cell(cell, TOKENS.gene, batch=batch)
    found["cls_output"] = module.classify(cell)
    found["dab_output"] = None if module.adversary is None else module.adversary(cell)
    found["loss_ecs"] = elastic_similarity(cell, 0.3)["ecs"]
    compared = 0
    for output, ours in found.items():
        if f"out/{mode}/{output}" in variant:
            theirs = variant[f"out/{mode}/{output}"]
            valid = VALID if theirs.shape == VALID.shape else ...
            close(ours[valid], theirs[valid])
            compared += 1
    assert compared >= 2
    for after in [key for key in variant.arrays if key.startswith("out/after/") and mode == "train"]:
        ours = after.removeprefix("out/after/").replace("dsbn.bns.", "batch_norm.")
        ours = ours.replace("bn.", "batch_norm.0.") if name == "bn" else ours
        close(module.state_dict()[ours], variant[after])


def test_against_scgpt_probability_of_a_zero():
    variant = Variant("zero_prob")
    module, hidden = variant.module().eval(), TOKENS.value == -1
    truth = TOKENS._replace(value=Variant("inputs")["value"].long())
    parts = masked_losses(read_cells(module, truth, hidden, None), truth.value, hidden)
    close(parts["masked"], variant["out/loss/gep"])
    close(parts["masked_zero"], variant["out/loss/zero"])
    close(parts["mvc_zero"], variant["out/loss/mvc_zero"])


@torch.no_grad()
def test_against_scgpt_generation_from_a_cell():
    variant = Variant("generate")
    found = variant.module().eval().generate(variant["out/cell"], TOKENS.gene)
    close(found[VALID], variant["out/output"][VALID])


def test_against_scgpt_generative_pretraining():
    variant = Variant("generative")
    module = variant.module().eval()
    known, generated = variant["out/in/pcpt_gene"], variant["out/in/gen_gene"]
    tokens = Tokens(known, variant["out/in/pcpt_value"].long(), (known != 37).sum(1))
    both = torch.cat([known, generated], dim=1)
    first, of_generated = module.encode_generative(tokens, generated)
    cell = first[:, 0]
    predicted, mvc = module.predict_bins(of_generated)[0], module.predict_bins_of_cell(cell, both)[0]
    close(cell, variant["out/first/cell_emb"])
    close(predicted[generated != 37], variant["out/first/gen_preds"][generated != 37])
    close(module.predict_bins(first)[0][known != 37], variant["out/first/pcpt_preds"][known != 37])
    close(mvc[both != 37], variant["out/first/mvc_output"][both != 37])
    second, again = module.encode_generative(tokens, generated, cell=cell.detach())
    close(second[:, 0], variant["out/second/cell_emb"])
    from_cell = module.predict_bins(again)[0]
    close(from_cell[generated != 37], variant["out/second/gen_preds"][generated != 37])
    place, target = generated != 37, variant["out/in/gen_target"]
    losses = {
        "gen": F.mse_loss(predicted[place], target[place]),
        "mvc": F.mse_loss(mvc[:, known.shape[1] :][place], target[place]),
        "gen_from_cell": F.mse_loss(from_cell[place], target[place]),
    }
    for name, loss in losses.items():
        close(loss, variant[f"out/loss/{name}"])
    sum(losses.values()).backward()
    norms = {key: x for key, x in variant.arrays.items() if key.startswith("out/grad_norm/")}
    theirs = rename({key.removeprefix("out/grad_norm/"): x for key, x in norms.items()}, "golden")
    found = {name: p.grad.norm() for name, p in module.named_parameters() if p.grad is not None}
    assert found.keys() == theirs.keys()
    for name, norm in found.items():
        close(norm, theirs[name], rtol=2e-4, msg=name)


# two networks that ScGPT refuses to load, made of its parts


@pytest.mark.parametrize("name", ["generator", "generator_adaptive"])
@torch.no_grad()
def test_against_scgpt_perturbation(name):
    variant = Variant(name)
    own = ("pert_encoder.", "decoder.")
    module = variant.module({k: x for k, x in variant.tensors.items() if not k.startswith(own)}).eval()
    gene, value = variant["out/in/gene"], variant["out/in/value"]
    x = module.gene_encoder(gene) + module.value_encoder(value)
    x = x + variant["param/pert_encoder.weight"][variant["out/in/flag"]]
    for layer in module.encoder:
        x = layer(x, module._key_mask(gene))

    def decoded(part: str) -> torch.Tensor:
        decoder = Expression(16, 16, False)
        prefix = f"param/decoder.{part}."
        decoder.load_state_dict(
            {k.removeprefix(prefix): t for k, t in variant.arrays.items() if k.startswith(prefix)}
        )
        return decoder(x)[0]

    a, b = decoded("coeff_decoder"), decoded("bias_decoder")
    if name == "generator_adaptive":
        a, b = F.relu(a), F.relu(b)
        mean = (value * (value != 0)).sum(1) / (value != 0).sum(1)
        b = b * mean[:, None]
    valid = gene != 37
    close((a * value + b)[valid], variant["out/mlm_output"][valid])


@torch.no_grad()
def test_against_scgpt_multiomic():
    variant = Variant("multiomic")
    tensors = {k: x for k, x in variant.tensors.items() if not k.startswith(("mod_encoder.", "mvc_decoder."))}
    module = variant.module(tensors).eval()
    hidden = module.encode(TOKENS)
    close(hidden[:, 0], variant["out/eval/cell_emb"])
    close(module.classify(hidden[:, 0]), variant["out/eval/cls_output"])
    vectors = variant["param/mod_encoder.embedding.weight"][variant["out/in/mod"]]
    modality = F.layer_norm(
        vectors,
        (16,),
        variant["param/mod_encoder.enc_norm.weight"],
        variant["param/mod_encoder.enc_norm.bias"],
    )
    batch = module.batch_encoder(Variant("inputs")["domain_mixed"])[:, None]
    bins, _ = module.expression(torch.cat([hidden, batch + modality], dim=2))
    close(bins[VALID], variant["out/eval/mlm_output"][VALID])


# the published shapes


def test_against_scgpt_at_its_published_size(golden, tmp_path):
    folder: Path = golden / "scgpt" / "caseC_full"
    recipe = runpy.run_path(str(folder / "recipe_weights.py"))
    names = gzip.decompress((folder / "census_genes_60694.txt.gz").read_bytes()).decode().split("\n")[:60694]
    vocabulary = {name: i for i, name in enumerate([*names, "<pad>", "<cls>", "<eoc>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "args.json").write_text((folder / "args.json").read_text())
    tensors = {name: torch.from_numpy(array) for name, array in recipe["tensors"]().items()}
    assert len(tensors) == 163
    torch.save(tensors, tmp_path / "best_model.pt")
    adata = ad.read_h5ad(folder / "counts.h5ad")
    adata.var_names = [names[i] for i in adata.var["token_id"]]
    model = ScGPT.from_pretrained(tmp_path, adata)
    assert list(model.gene_match.index) == list(adata.var["token_id"])
    module = model.module
    with np.load(folder / "outputs.npz") as file:
        out = {name: torch.from_numpy(file[name]) for name in file}

    def tokens(heading: str, value: torch.Tensor | None = None) -> Tokens:
        gene = out[f"{heading}/gene"].long()
        return Tokens(
            gene, (out[f"{heading}/value"] if value is None else value).long(), (gene != 60694).sum(1)
        )

    x = adata.X.tocsr()
    x.sort_indices()
    gene = adata.var["token_id"].to_numpy()[x.indices]
    counts = Counts(x.indptr.astype(np.int64), gene, x.data.astype(np.float32))
    bins = choose_bins(*bin_bounds(counts), out["embed_maxlen3000/rand"].numpy())
    ours = as_tokens(counts.indptr, counts.gene, bins, n_genes=60694, cls_value=-2)
    np.testing.assert_array_equal(ours.gene, tokens("embed_maxlen3000").gene)
    np.testing.assert_array_equal(ours.value, tokens("embed_maxlen3000").value)
    with torch.inference_mode():
        found = module.pool(tokens("embed_maxlen3000"), unit_length=False)
        close(found, out["embed_maxlen3000/cls_raw"], rtol=2e-5, atol=2e-5)
        close(F.normalize(found, dim=1), out["embed_maxlen3000/X_scGPT"])
        sampled = tokens("embed_maxlen1200")  # another input for the one cell with more genes than that
        longest = sampled.length.argmax()
        close(
            module.pool(Tokens(*(part[longest : longest + 1] for part in sampled)))[0],
            out["embed_maxlen1200/X_scGPT"][longest],
        )
        masked = tokens("embed_maxlen3000")
        masked = Tokens(masked.gene[:2, :712], out["masked/value"].long(), masked.length[:2])
        hidden = module.encode(masked)
        valid = masked.gene != 60694
        close(hidden[:, 0], out["masked/cell_emb"], rtol=2e-5, atol=2e-5)
        close(module.predict_bins(hidden)[0][valid], out["masked/mlm_output"][valid], rtol=2e-5, atol=2e-5)
        mvc, _ = module.predict_bins_of_cell(hidden[:, 0], masked.gene)
        close(mvc[valid], out["masked/mvc_output"][valid], rtol=2e-5, atol=2e-5)
        close(elastic_similarity(hidden[:, 0], 0.3)["ecs"], out["masked/loss_ecs_threshold_0.3"])
    model.release()


def test_against_scgpt_zero_loss_is_that_of_a_bernoulli():
    probability, above = torch.tensor([0.0, 0.3, 1.0]), torch.tensor([False, True, True])
    bernoulli = torch.distributions.Bernoulli(probs=probability.clamp(2**-23, 1 - 2**-23))
    expected = -bernoulli.log_prob(above.float()).mean()
    close(zero_loss(probability, above), expected)
