"""Load guards by classes of transformers that no host has changed, and that none can change later.

Hosts replace functions and layers in transformers' modules, for the whole process: Liger's kernels
(TRL, Axolotl) run on a GPU alone, and its MLP has no biases; Axolotl rewrites attention for LoRA. A
guard of the trained model's architecture would be computed by them, on whatever device it is. So
its class comes from a second copy of the module that defines it. References are loaded as the
trained model is, from which they may differ in nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

__all__ = ["unpatched", "unpatched_module"]

_AUTOS: tuple[Any, ...] = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)
_MODELS = "transformers.models."


@contextlib.contextmanager
def unpatched() -> Iterator[None]:
    """Let transformers' auto classes make models of unpatched classes for a while.

    Also the parts of models that are made by way of `AutoModel`, as most classifiers are.
    """
    usual = [(auto, auto._model_mapping) for auto in _AUTOS]
    for auto, mapping in usual:
        auto._model_mapping = _Unpatched(mapping)
    try:
        yield
    finally:
        for auto, mapping in usual:
            auto._model_mapping = mapping


@functools.cache
def unpatched_module(name: str) -> ModuleType:
    """Return a copy of a module of transformers, as its file has it.

    Args:
        name: `transformers.models.….modeling_…`.
    """
    found = importlib.util.find_spec(name)
    assert found is not None
    package, _, last = name.rpartition(".")
    # In the same package, for its relative imports. Its name is another one, because transformers
    # knows some classes by their module's name and their own.
    own = f"{package}.star_dss_{last}"
    spec = importlib.util.spec_from_file_location(own, found.origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[own] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[own]
        raise
    return module


class _Unpatched:
    """Map configurations to classes as an auto class does, but to unpatched ones."""

    def __init__(self, mapping: Any) -> None:
        self._mapping = mapping

    def __getitem__(self, config: Any) -> Any:
        found = self._mapping[config]
        if isinstance(found, list | tuple):
            return tuple(map(_own, found))
        return _own(found)

    def __contains__(self, config: object) -> bool:
        return config in self._mapping

    def __iter__(self) -> Iterator[Any]:
        return iter(self._mapping)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mapping, name)


def _own(model_class: Any) -> Any:
    """Return the unpatched class; code that is not transformers' own is left alone."""
    module = model_class.__module__
    if not module.startswith(_MODELS):
        return model_class
    return getattr(unpatched_module(module), model_class.__name__)
