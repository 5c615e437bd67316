"""What users of scvi-tools are used to and what takes its place here, said where they ask for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

PAGE = "https://cellprior.readthedocs.io/en/latest/user_guide/coming_from_scvi.html"

# Members of scvi-tools' models that ours do not have.
MEMBERS = {
    "load_query_data": "A query needs no model of its own: load the weights once, and pass the query, "
    "model.get_latent_representation(query) or model.predict(query). Its genes are matched by name.",
    "prepare_query_anndata": "A query needs no preparing: its genes are matched by name, and those that are missing "
    "are told in cp.genes.match. Pass it as it is.",
    "get_elbo": "There is no bound on the likelihood. model.history has the losses, each beside what is known without "
    "biology: cp.pl.training(model).",
    "get_marginal_ll": "There is no marginal likelihood. cp.evaluate.masked_prediction(model) measures how well hidden "
    "genes are predicted.",
    "get_reconstruction_error": "cp.evaluate.masked_prediction(model) measures how well hidden genes are predicted.",
    "get_likelihood_parameters": "CellPLM gives the means of its decoder: model.get_normalized_expression().",
    "posterior_predictive_sample": "CellPLM gives the means of its decoder: model.get_normalized_expression().",
    "differential_expression": "Test the counts themselves: sc.tl.rank_genes_groups(adata, groupby). A decoder's means "
    "are no measurements, and their differences no evidence.",
    "get_feature_correlation_matrix": "Correlate the counts themselves. ScBERT, Geneformer and ScGPT give vectors of "
    "genes and attention.",
}

# Arguments of scvi-tools' get_latent_representation that ours does not take.
ARGUMENTS = {
    "give_mean": "the embedding is always the mean, and the same at each call: leave it out",
    "mc_samples": "nothing is sampled: leave it out",
    "return_dist": "the embedding has no distribution that is given out: leave it out",
    "dataloader": "pass the data, adata=, or stream a file: cp.tl.embed(path, weights, out=...)",
}


def refuse_habit(cls: type, name: str) -> None:
    """Say what takes the place of a member of scvi-tools' models.

    Raises AttributeError if it is one.
    """
    if name in MEMBERS:
        msg = f"{cls.__name__} has no {name!r}. {MEMBERS[name]} See {PAGE}."
        raise AttributeError(msg, name=name, obj=cls)


def told(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that says what to do without an argument of scvi-tools."""

    @wraps(method)
    def with_hint(self: Any, *args: Any, **options: Any) -> Any:
        for name in ARGUMENTS.keys() & options.keys():
            msg = f"{name}= is an argument of scvi-tools' models; here, {ARGUMENTS[name]}. See {PAGE}."
            raise TypeError(msg)
        return method(self, *args, **options)

    return with_hint
