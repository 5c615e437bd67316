"""What a model class gives to the base, and where that is written down."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scvi.model.base import BaseModelClass

from cellprior.model import CellPLM, PretrainedModel
from cellprior.model._hooks import Hooks

PAGE = Path(__file__).parents[2] / "docs" / "user_guide" / "extending.md"
OWN = {"module", "registry", "can", "_abc_impl"}  # the base's, for the types, and what is asked of a model


def test_the_guide_lists_all_that_a_model_can_give_and_nothing_else():
    text = PAGE.read_text(encoding="utf-8")
    table = text.partition("| member of the model |")[2].partition("| member of the network |")[0]
    cells = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    listed = {name for cell in cells for name in re.findall(r"`(\w+)", cell)}
    members = {name for name in {*vars(Hooks), *Hooks.__annotations__} if not name.startswith("__")}
    assert listed == members - OWN


def test_every_hook_says_what_it_is_for():
    attributes = (Hooks.__doc__ or "").partition("Attributes")[2]
    for name in vars(Hooks):
        if not name.startswith("__") and name not in OWN:
            member = vars(Hooks)[name]
            is_method = callable(getattr(Hooks, name)) and not isinstance(getattr(Hooks, name), type)
            said = (
                getattr(Hooks, name).__doc__
                if is_method
                else member.__doc__
                if isinstance(member, property)
                else ""
            )
            assert said or name in attributes, name


def test_a_model_that_gives_what_nothing_asks_for_any_more_is_told():
    with pytest.raises(TypeError, match=r"Old gives _encode, which nothing asks for any more.*_encoder_cls"):

        class Old(CellPLM):
            def _encode(self) -> None: ...


def test_a_model_class_inherits_from_the_base_alone():
    from cellprior.model import MODELS

    assert {model.__bases__ for model in MODELS} == {(PretrainedModel,)}
    assert PretrainedModel.__bases__ == (Hooks, BaseModelClass)


def test_evaluation_refuses_by_name_what_a_model_of_two_modalities_cannot_do():
    from cellprior import evaluate
    from cellprior.model import MultiomeCLIP

    peaks = [f"chr1:{100 * i}-{100 * i + 50}" for i in range(1, 31)]
    model = MultiomeCLIP(genes=[f"GENE{i}" for i in range(30)], peaks=peaks, n_components=(4, 4))
    model.is_trained_ = True
    with pytest.raises(NotImplementedError, match="stability .* MultiomeCLIP"):
        evaluate.stability(model)
    with pytest.raises(NotImplementedError, match="MultiomeCLIP does not predict hidden genes"):
        evaluate.masked_prediction(model)
    assert [what for what in ("train", "annotate", "read two modalities") if MultiomeCLIP.can(what)] == [
        "train", "read two modalities",
    ]  # fmt: skip


def test_a_habit_of_scvi_tools_is_told_what_takes_its_place():
    from cellprior.model._habits import ARGUMENTS, MEMBERS

    model = CellPLM(genes=[f"GENE{i}" for i in range(30)], size="small")
    for name, advice in MEMBERS.items():
        for owner in (CellPLM, model):
            assert not hasattr(owner, name)
            with pytest.raises(AttributeError, match=rf"CellPLM has no '{name}'\. {re.escape(advice)}"):
                getattr(owner, name)
    for name in ARGUMENTS:
        with pytest.raises(TypeError, match=f"{name}= is an argument of scvi-tools"):
            model.get_latent_representation(**{name: True})


def test_an_error_within_a_property_is_not_taken_for_a_missing_one(monkeypatch):
    def broken(self: CellPLM) -> None:
        raise AttributeError("what is wrong")

    model = CellPLM(genes=[f"GENE{i}" for i in range(30)], size="small")
    monkeypatch.setattr(CellPLM, "gene_match", property(broken))
    with pytest.raises(AttributeError, match="what is wrong"):
        _ = model.gene_match
    with pytest.raises(AttributeError, match="'CellPLM' object has no attribute 'nope'"):
        _ = model.nope
