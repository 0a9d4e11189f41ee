"""Options: recipes, Python callers, editors and the docs all follow the signatures of the verbs."""

import inspect
import json
import re
from pathlib import Path
from typing import get_args, get_type_hints

import jsonschema
import pytest
import recipe_keys
import yaml
from typer.testing import CliRunner

import basis_select as bs
from basis_select import target
from basis_select.cli import app
from basis_select.data import answers
from basis_select.export import FORMATS
from basis_select.linalg import metrics, scores
from basis_select.options import options, properties
from basis_select.run.recipe import SECTIONS, Recipe, json_schema, override

REPO = Path(__file__).parents[1]
GOOD = {"model": "a", "task": "b", "prune": {"keep": 0.5}}
OPTIONS = [
    (f"{section}.{key}".lstrip("."), part)
    for section, kind in {"": Recipe, **SECTIONS}.items()
    for key, part in properties(kind).items()
    if key not in SECTIONS
]


def faults(content):
    return [error.message for error in jsonschema.Draft7Validator(json_schema()).iter_errors(content)]


def test_page_and_schema_are_those_of_the_code():
    page = (REPO / "docs" / "recipe_keys.md").read_text()
    assert recipe_keys.page(page) == page
    assert (REPO / "docs" / "recipe.schema.json").read_text() == recipe_keys.schema()


@pytest.mark.parametrize("path", sorted((REPO / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_names_the_schema_and_conforms_to_it(path):
    text = path.read_text()
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert (path.parent / named[1]).resolve() == REPO / "docs" / "recipe.schema.json"
    assert faults(yaml.safe_load(text)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"prune": {"keep": 2}},
        {"prune": {"keep": True}},
        {"prune": {"kep": 0.5}},
        {"prune": 0.5},
        {"heal": {"steps": 1.5}},
        {"heal": {"precision": "fp8"}},
        {"sizes": [2]},
        {"sizes": 0.5},
        {"dtype": "int8"},
        {"compare": {"a": {"heal.stepz": 1}}},
        {"compare": {"a": {"heal.steps": -1}}},
        {"compare": {"a": {"seed": 1}}},
        {"compare": {"a": {}}},
        {"models": "a"},
        {"model": 5},
    ],
    ids=str,
)
def test_what_reading_refuses_an_editor_marks(wrong, tmp_path):
    from basis_select.run.recipe import read

    assert faults(GOOD) == []
    assert faults(GOOD | wrong)
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(GOOD | wrong))
    with pytest.raises(ValueError, match=r"wrong\.yaml"):
        read(tmp_path / "wrong.yaml")


@pytest.mark.parametrize(("name", "part"), OPTIONS, ids=[name for name, _ in OPTIONS])
def test_an_option_has_a_sentence_of_help_and_a_number_its_limits(name, part):
    assert re.fullmatch(r"\S.{10,240}\.", part["description"])
    for kind in part.get("anyOf", [part]):
        if kind.get("type") in ("integer", "number"):
            assert kind.get("minimum", kind.get("exclusiveMinimum")) < kind["maximum"]


def test_choices_are_those_that_there_are():
    for names, table in (
        (metrics.MetricName, metrics.METRICS),
        (scores.ScoreName, scores.SCORES),
        (target.Dtype, target.BYTES),
        (answers.ScoreName, answers.SCORES),
        (get_type_hints(bs.export)["to"], FORMATS),
    ):
        assert get_args(names) == tuple(table)


@pytest.mark.parametrize(
    ("verb", "wrong"),
    [
        (bs.prune, {"keep": 2}),
        (bs.prune, {"keep": True}),
        (bs.prune, {"budget": "best"}),
        (bs.decompose, {"metric": "cubic"}),
        (bs.heal, {"lr": float("nan")}),
        (bs.heal, {"steps": 1.5}),
        (bs.learn, {"unpruned": -0.1}),
        (bs.extend, {"init": "best"}),
        (bs.refine, {"batch_size": 0}),
        (bs.tune, {"precision": "fp8"}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_python_gets_the_sentence_of_a_recipe(verb, wrong):
    (name, value), section = *wrong.items(), verb.__name__
    with pytest.raises(ValueError, match="it should be") as said:
        verb(None, **{p: None for p in ("task", "parent") if p in inspect.signature(verb).parameters}, **wrong)
    with pytest.raises(ValueError, match="it should be") as read:
        override(Recipe("a", "b"), {f"{section}.{name}": value}, "here")
    assert str(said.value).removeprefix(f"{section}: ") == str(read.value).removeprefix(f"here: {section}.")


def test_text_and_whole_numbers_are_numbers_and_true_is_none():
    known = options(bs.heal)
    assert (known(lr="1e-4").lr, known(kl=1).kl, type(known(kl=1).kl)) == (1e-4, 1.0, float)
    for wrong in ({"kl": True}, {"steps": True}, {"steps": 1.0}, {"steps": "1"}, {"embeddings": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            known(**wrong)


@pytest.mark.parametrize("name", [name for name in bs.__all__ if inspect.isfunction(getattr(bs, name))])
def test_a_public_function_says_what_it_takes_and_gives(name):
    signature = inspect.signature(getattr(bs, name))
    assert signature.return_annotation is not signature.empty
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    assert "FieldInfo" not in str(signature)


def test_keys_are_listed():
    listed = CliRunner().invoke(app, ["keys"])
    assert listed.exit_code == 0
    for name, part in OPTIONS:
        assert f"  {name}: " in listed.output
        assert " ".join(part["description"].split()) in " ".join(listed.output.split())
    assert json.loads(CliRunner().invoke(app, ["keys", "--schema"]).output) == json_schema()
