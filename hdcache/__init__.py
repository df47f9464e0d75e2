"""Run vision teachers once, keep what they know, distill any number of students from it.

The names below are the public interface; each is imported when it is first used, so that opening a store does not
load torch and ``hdcache --help`` loads nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hdcache.api import OpenedStore as OpenedStore
    from hdcache.api import open_store as open_store
    from hdcache.chain import distill_chain as distill_chain
    from hdcache.datasets import open_dataset as open_dataset
    from hdcache.distill.recipes import get_recipe as get_recipe
    from hdcache.distill.run import distill as distill_student
    from hdcache.distill.run import distill_several as distill_students
    from hdcache.evaluate.run import knn_eval as evaluate_knn
    from hdcache.extract.run import extract as extract_store

__version__ = "0.1.0"

_WHERE = {
    "OpenedStore": ("hdcache.api", "OpenedStore"),
    "open_store": ("hdcache.api", "open_store"),
    "open_dataset": ("hdcache.datasets", "open_dataset"),
    "extract_store": ("hdcache.extract.run", "extract"),
    "distill_student": ("hdcache.distill.run", "distill"),
    "distill_students": ("hdcache.distill.run", "distill_several"),
    "distill_chain": ("hdcache.chain", "distill_chain"),
    "evaluate_knn": ("hdcache.evaluate.run", "knn_eval"),
    "get_recipe": ("hdcache.distill.recipes", "get_recipe"),
}

__all__ = [  # noqa: RUF022  # in the order of use
    "open_dataset",
    "extract_store",
    "open_store",
    "OpenedStore",
    "get_recipe",
    "distill_student",
    "distill_students",
    "distill_chain",
    "evaluate_knn",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        module, attribute = _WHERE[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'hdcache' has no attribute {name!r}")
