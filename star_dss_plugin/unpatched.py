"""Load guards with transformers' own classes, which patches of the host do not reach.

Hosts patch functions and layers in transformers' modules, for the whole process. Liger's kernels
(TRL, Axolotl) run on a GPU only, and its MLP has no biases; Axolotl rewrites attention for LoRA. A
guard of the trained model's architecture would be computed with these patches. So the guard's class
comes from a second copy of its module. References use the host's classes, because a reference must
be computed exactly as the trained model is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

__all__ = ["unpatched", "unpatched_class", "unpatched_module"]

_AUTOS: tuple[Any, ...] = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)
_MODELS = "transformers.models."
_COPY = "star_dss_"
"""What the name of a second module begins with."""
_LOCK = threading.RLock()


@contextlib.contextmanager
def unpatched() -> Iterator[None]:
    """Make transformers' auto classes return unpatched classes inside the `with` block.

    This includes parts of a model that are built with `AutoModel`, such as a classifier's base.
    Blocks of several threads wait for each other; blocks within a block change nothing.
    """
    with _LOCK:
        mappings = [(auto, auto._model_mapping) for auto in _AUTOS]
        usual = [(auto, found) for auto, found in mappings if not isinstance(found, _Unpatched)]
        for auto, mapping in usual:
            auto._model_mapping = _Unpatched(mapping)
        try:
            yield
        finally:
            for auto, mapping in usual:
                auto._model_mapping = mapping


@functools.cache
def unpatched_module(name: str) -> ModuleType:
    """Execute the file of a transformers module again; return it as a second module.

    Args:
        name: The module's name, `transformers.models.….modeling_…`.
    """
    found = importlib.util.find_spec(name)
    assert found is not None
    package, _, last = name.rpartition(".")
    # In the same package, for its relative imports; with another name, because transformers keeps
    # tables of classes by the names of their modules.
    own = f"{package}.{_COPY}{last}"
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
    """Map each configuration to the unpatched copy of the class that an auto class uses."""

    def __init__(self, mapping: Any) -> None:
        self._mapping = mapping

    def __getitem__(self, config: Any) -> Any:
        found = self._mapping[config]
        if isinstance(found, list | tuple):
            return tuple(map(unpatched_class, found))
        return unpatched_class(found)

    def __contains__(self, config: object) -> bool:
        return config in self._mapping

    def __iter__(self) -> Iterator[Any]:
        return iter(self._mapping)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mapping, name)


def unpatched_class(model_class: Any) -> Any:
    """Return the unpatched copy of a class of transformers, and any other class as it is."""
    module = model_class.__module__
    is_copy = module.rpartition(".")[2].startswith(_COPY)
    if is_copy or not module.startswith(_MODELS):
        return model_class
    return getattr(unpatched_module(module), model_class.__name__)
