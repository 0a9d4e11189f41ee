"""What happens when another package is imported, without importing it now."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, then: Callable[[], object]) -> None:
    """Call `then` when the module `name` has been imported, whoever imports it: at once if it is there already."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _After(name, then))


class _After(MetaPathFinder):
    """Finds nothing itself: the loader that others find for one module calls `then` once it has run that module."""

    def __init__(self, name: str, then: Callable[[], object]):
        self.name, self.then = name, then

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_then(module: ModuleType) -> None:
            run(module)
            self.then()

        spec.loader.exec_module = run_then
        return spec
