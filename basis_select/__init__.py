"""Make a pretrained language model as small and fast as one target application allows, by basis selection.

    import basis_select as bs

    parent, tokenizer = bs.load("HuggingFaceTB/SmolLM2-135M-Instruct", dtype="float32")
    task = bs.load_task("gsm8k", tokenizer)
    model = copy.deepcopy(parent)
    bs.decompose(model, task)
    bs.prune(model, keep=0.25)
    bs.heal(model, task, teacher=parent)
    bs.save(model, tokenizer, "smol-gsm8k", dtype="bfloat16")

After the import `AutoModelForCausalLM.from_pretrained` reads such a folder too: the format is registered as soon as
transformers imports what loads models. What is public stands in `__init__.pyi`, for type checkers and for what follows
here; each is imported when it is first used, because torch and transformers take seconds.
"""

import ast
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .system.importing import after_import

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_PLACES = {
    name.name: f".{line.module}" for line in _STUB.body if isinstance(line, ast.ImportFrom) for name in line.names
}

# oneDNN writes code for every shape of a product, and once it has more than it keeps, it writes the same again. Bases
# have many ranks: of the 1,024 that it keeps by itself, two lengths of batches take all. It asks at its first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")

__version__ = "0.1.0"
__all__ = sorted(_PLACES)


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        setattr(self, name, getattr(importlib.import_module(_PLACES[name], __name__), name))
        return self.__dict__[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _PLACES.get(name) == f".{name}":
            value = getattr(value, name)  # `tune` is the verb, once its module is imported too, whoever imported it
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *_PLACES})


sys.modules[__name__].__class__ = _Package
after_import("transformers.modeling_utils", lambda: importlib.import_module(".checkpoint.format", __name__))
