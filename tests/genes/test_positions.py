"""Positions of genes, from annotation files and tables."""

from __future__ import annotations

import gzip

import pandas as pd
import pytest

from cellprior.genes import read_positions
from cellprior.genes._positions import places_of

GTF = """#!genome-build GRCm38
chr1\tHAVANA\tgene\t3205901\t3671498\t.\t-\t.\tgene_id "ENSMUSG00000051951.5"; gene_type "x"; gene_name "Xkr4";
chr1\tHAVANA\ttranscript\t3205901\t3216344\t.\t-\t.\tgene_id "ENSMUSG00000051951.5"; gene_name "Xkr4";
2\tensembl\tgene\t101\t200\t.\t+\t.\tgene_id "ENSMUSG00000000001";
"""
GFF = """##gff-version 3
1\tensembl\tncRNA_gene\t11\t20\t.\t+\t.\tID=gene:ENSG00000000009;Name=MIR9;biotype=x;gene_id=ENSG00000000009
"""
TRANSCRIPTS = """chr5\trefGene\ttranscript\t101\t200\t.\t-\t.\tgene_id "Actb"; transcript_id "NM_1"; gene_name "Actb";
chr5\trefGene\ttranscript\t151\t260\t.\t-\t.\tgene_id "Actb"; transcript_id "NM_2"; gene_name "Actb";
chr5\trefGene\texon\t1\t999\t.\t-\t.\tgene_id "Actb"; transcript_id "NM_2"; gene_name "Actb";
"""
BED = "chr1\t100\t200\tXkr4\t0\t-\nchr2\t5\t9\tSox17\n"


def read(tmp_path, text: str, name: str = "genes") -> dict:
    (tmp_path / name).write_text(text)
    return read_positions(tmp_path / name).to_dict("index")


def test_genes_of_a_gtf_are_read_from_0_with_symbols_or_else_ids(tmp_path):
    found = read(tmp_path, GTF)
    assert found["Xkr4"] == {
        "gene_id": "ENSMUSG00000051951.5",
        "chrom": "chr1",
        "start": 3205900,
        "end": 3671498,
        "strand": "-",
    }
    assert list(found) == ["Xkr4", "ENSMUSG00000000001"]
    (tmp_path / "genes.gz").write_bytes(gzip.compress(GTF.encode()))
    assert read_positions(tmp_path / "genes.gz").to_dict("index") == found


def test_a_gff3_a_bed_and_a_gtf_without_genes_are_read_as_well(tmp_path):
    place = {"gene_id": "ENSG00000000009", "chrom": "1", "start": 10, "end": 20, "strand": "+"}
    assert read(tmp_path, GFF) == {"MIR9": place}
    assert read(tmp_path, BED)["Xkr4"] == {
        "gene_id": "",
        "chrom": "chr1",
        "start": 100,
        "end": 200,
        "strand": "-",
    }
    assert read(tmp_path, TRANSCRIPTS)["Actb"]["start"] == 100
    assert read(tmp_path, TRANSCRIPTS)["Actb"]["end"] == 260


def test_a_file_without_genes_is_refused_with_what_is_needed(tmp_path):
    with pytest.raises(ValueError, match=r"No gene is found in .*genes.*GTF.*BED"):
        read(tmp_path, "gene,chrom,start\nXkr4,chr1,5\n")


def test_a_gene_starts_at_its_end_on_the_other_strand_and_anywhere_between_without_one():
    table = pd.DataFrame(
        {
            "Chromosome": ["chr1", "1", "chrX", None],
            "start": [100, 100, 100, None],
            "end": [200, 200, 200, None],
        },
        index=["a", "b", "c", "d"],
    )
    table["strand"] = ["+", -1, ".", "+"]
    found = places_of(table)
    assert found.chromosome.tolist() == ["1", "1", "X", ""]
    assert found.first.tolist() == [100, 199, 100, -1]
    assert found.last.tolist() == [100, 199, 199, -1]
    assert found.sense[:3].tolist() == [1, -1, 0]
    assert found.known.tolist() == [True, True, True, False]
    of_cell_ranger = places_of(
        pd.DataFrame({"interval": ["chr1:29553-30267", "2:5-9", "NA"]}, index=["a", "b", "c"])
    )
    assert of_cell_ranger.first.tolist() == [29553, 5, -1]
    assert of_cell_ranger.last.tolist() == [30266, 8, -1]
