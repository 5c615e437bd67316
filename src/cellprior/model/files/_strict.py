"""Whether weights fit the network that their configuration describes; found out before anything of its size is made."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from cellprior.model.learning._annotation_plan import AnnotationHead
from cellprior.weights import Bundle, WeightsError
from cellprior.weights._bundle import is_finite

PARTS_OF_A_TENSOR = 20  # modules and parameters of a network for each tensor in its file, at most
FEW_PARTS = 1_000
SHOWN = 10


def check_fits(cls: type[Any], bundle: Bundle, source: str) -> None:
    """Refuse tensors that are not those of the network that the configuration describes.

    The network is made without memory for its tensors (on the device "meta"), and with no more parts than the file
    could have tensors for, so that a configuration cannot ask for more than its file holds. The tensors may be on the
    device "meta". Raises WeightsError, with the argument that the network refuses, or with the tensors that do not
    fit.
    """
    try:
        with few_parts(len(bundle.state_dict)), torch.random.fork_rng(devices=[]), torch.device("meta"):
            network: Any = cls._blank(**{**bundle.config["network"], **bundle.vocabulary})
            if annotation := bundle.config.get("annotation"):
                sizes = (network.n_hidden, network.n_latent, len(annotation["labels"]))
                network.annotation = AnnotationHead(*sizes)
            expected = network.state_dict()
    except Exception as error:
        if isinstance(error, RuntimeError) and "meta" in str(error):
            return  # a network that looks at its numbers while it is made; they are compared once it is there
        raise WeightsError(_no_network(cls, source, error)) from error
    _refuse_misfits(expected, bundle.state_dict, source)


def load_strictly(module: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a module; each must have its place and each place its tensor, and all of them be finite.

    A module may have a method ``check_tensors(state_dict)`` that raises a ValueError for values that no trained
    network has.

    Raises WeightsError, with the names that are missing, left over, of another shape or type, or not finite.
    """
    expected = module.state_dict()
    _refuse_misfits(expected, state_dict, source)
    for name, tensor in state_dict.items():
        if not is_finite(tensor.to(expected[name].dtype)):
            msg = (
                f"{source}: the tensor {name} has values that are not finite (NaN or infinite, or too large for "
                f"{_type(expected[name])}). These are no weights; nothing was loaded."
            )
            raise WeightsError(msg)
    if check := getattr(module, "check_tensors", None):
        try:
            check(state_dict)
        except ValueError as error:
            msg = f"{source}: {error} Nothing was loaded."
            raise WeightsError(msg) from error
    module.load_state_dict(state_dict)


@contextmanager
def few_parts(n_tensors: int) -> Iterator[None]:
    """Stop the making of a network that has far more parts than a file has tensors.

    Raises ValueError when that is seen.
    """
    most = FEW_PARTS + PARTS_OF_A_TENSOR * n_tensors
    here, n_parts = threading.get_ident(), 0

    def count(*_: object) -> None:
        nonlocal n_parts
        n_parts += threading.get_ident() == here
        if n_parts > most:
            msg = (
                f"it describes a network of far more layers than the {n_tensors} tensors of the file are for."
            )
            raise ValueError(msg)

    hooks = [
        torch_modules.register_module_parameter_registration_hook(count),
        torch_modules.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _refuse_misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} has no place" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        shapes = tuple(found[name].shape), tuple(expected[name].shape)
        if shapes[0] != shapes[1]:
            problems.append(f"{name} is {shapes[0]}, needed {shapes[1]}")
        elif _kind(found[name]) != _kind(expected[name]):
            problems.append(f"{name} is of {_type(found[name])}, needed {_type(expected[name])}")
    if problems:
        shown = "; ".join(sorted(problems)[:SHOWN]) + ("; ..." if len(problems) > SHOWN else "")
        msg = f"{source} does not fit the network its configuration describes: {shown}. Nothing was loaded."
        raise WeightsError(msg)


def _kind(tensor: Tensor) -> Any:
    """Floating point numbers of all sizes are one kind; of other numbers, each type is."""
    return "floating" if tensor.is_floating_point() else tensor.dtype


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _no_network(cls: type[Any], source: str, error: Exception) -> str:
    text = str(error) or repr(error)
    return f"{source}: its configuration (config.json, `network`) is not that of a {cls.__name__}: {text}"
