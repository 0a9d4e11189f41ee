"""The examples in the docstrings of public functions run, on a tiny random model in place of the one that they name."""

import copy
import doctest
import inspect
import json

import pytest
from conftest import make_tokenizer, tiny

import basis_select as bs

EXAMPLES = [name for name in bs.__all__ if ">>>" in (inspect.getdoc(getattr(bs, name)) or "")]
FUNCTIONS = [name for name in bs.__all__ if inspect.isfunction(getattr(bs, name))]


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """What the examples start from, and a folder that is the working directory while they run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("examples"))
        patch.setattr("tqdm.std.tqdm.write", lambda *args, **how: None)  # what the trainer says at its end
        parent, tokenizer = tiny(vocab_size=128), make_tokenizer()
        for folder in ("parent", "HuggingFaceTB/SmolLM2-135M-Instruct"):
            bs.save(parent, tokenizer, folder)
        rows = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(8) for b in range(8)]
        with open("data.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        task = bs.load_task("data.jsonl", tokenizer, validation=8, test=8)
        yield {"bs": bs, "copy": copy, "parent": parent, "tokenizer": tokenizer, "task": task}


def test_every_public_function_has_an_example():
    assert set(EXAMPLES) >= set(FUNCTIONS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, known):
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(bs, name), name, globs=known)
    said = []
    failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found, out=said.append).failed
    assert not failed, "".join(said)
