"""Recipes, options and files that no run can be made of: each gets one sentence, before a model is loaded."""

import json
from importlib.metadata import version

import pytest
import yaml
from conftest import make_tokenizer, sampled
from packaging.version import Version
from transformers import AutoConfig, BertConfig, OPTConfig, T5Config
from typer.testing import CliRunner

from basis_select.cli import app

GOOD = {"model": "./model", "task": "data.jsonl", "prune": {"keep": 0.4}}


def texts(found):
    """What replaces the text of a good recipe: {name: (bytes, words of the sentence)}."""
    return {name: (text if isinstance(text, bytes) else text.encode(), words) for name, (text, words) in found.items()}


RECIPES = texts(
    {
        "empty": ("", "is not a mapping"),
        "only a comment": ("# nothing\n", "is not a mapping"),
        "a list": ("- model: a\n- task: b\n", "is not a mapping"),
        "a number": ("7\n", "is not a mapping"),
        "no model": ("task: b\n", "does not name a model"),
        "no task": ("model: a\n", "does not name a task"),
        "two documents": ("model: a\ntask: b\n---\nmodel: c\n", "is not valid YAML"),
        "open bracket": ("model: a\ntask: b\nsizes: [0.5\n", "is not valid YAML"),
        "open quote": ("model: 'a\ntask: b\n", "is not valid YAML"),
        "a tab": ("model: a\n\ttask: b\n", "is not valid YAML"),
        "a control character": ("model: a\x00\ntask: b\n", "is not valid YAML"),
        "UTF-16": ("model: a\ntask: b\n".encode("utf-16"), "is not UTF-8"),
        "Latin-1": ("model: a\ntask: caf\xe9\n".encode("latin-1"), "is not UTF-8"),
        "a picture": (b"\x89PNG\r\n\x1a\n\x00\x00", "is not UTF-8"),
        "two models": ("model: a\nmodel: b\ntask: c\n", "model is there twice"),
        "two sections": ("model: a\ntask: b\nheal: {steps: 1}\nheal: {steps: 2}\n", "heal is there twice"),
        "two steps": ("model: a\ntask: b\nheal: {steps: 1, steps: 2}\n", "steps is there twice"),
        "two quoted": ('model: a\n"model": b\ntask: c\n', "model is there twice"),
        "two rows": ("model: a\ntask: b\ncompare:\n  c: {heal.steps: 1}\n  c: {heal.steps: 2}\n", "c is there twice"),
        "a key that is a number": ("model: a\ntask: b\n1: 2\n", "the key 1 is not text"),
        "a key that is yes": ("model: a\ntask: b\nyes: 2\n", "the key yes is not text"),
        "a key that is null": ("model: a\ntask: b\n~: 2\n", "the key ~ is not text"),
        "a key that is nothing": ("model: a\ntask: b\n? \n: 2\n", "a key is empty"),
        "a key that is a list": ("model: a\ntask: b\n[1, 2]: 2\n", "a key is not text"),
        "a key that is a mapping": ("model: a\ntask: b\n{a: b}: 2\n", "a key is not text"),
        "a row that is a number": ("model: a\ntask: b\ncompare: {1: {heal.steps: 1}}\n", "the key 1 is not text"),
        "a bomb": (
            "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\nmodel: a\ntask: b\n",
            "write out what *a stands for",
        ),
        "an alias": ("model: &m a\ntask: *m\n", "write out what *m stands for"),
        "itself in a list": ("model: a\ntask: b\nsizes: &s [*s]\n", "write out what *s stands for"),
        "itself in a mapping": ("model: a\ntask: b\ncompare: &c {x: *c}\n", "write out what *c stands for"),
        "an unknown alias": ("model: *gone\ntask: b\n", "write out what *gone stands for"),
        "a merge": ("model: a\ntask: b\nheal:\n  <<: {steps: 2}\n", "the key << is not text"),
        "a Python object": ("model: !!python/object/apply:os.system [ls]\ntask: b\n", "has no meaning here"),
        "a tag of its own": ("model: !mine a\ntask: b\n", "the tag !mine has no meaning here"),
        "a set": ("model: a\ntask: b\nsizes: !!set {1, 2}\n", "has no meaning here"),
        "bytes": ("model: !!binary aGk=\ntask: b\n", "has no meaning here"),
        "a bool by tag": ("model: a\ntask: b\nheal: {steps: !!bool what}\n", "has no meaning here"),
        "a date by tag": ("model: a\ntask: b\nseed: !!timestamp what\n", "has no meaning here"),
        "a date": ("model: a\ntask: b\nseed: 2020-01-01\n", "seed is '2020-01-01', it should be a whole number"),
        "no date": ("model: a\ntask: b\nseed: 2020-99-99\n", "seed is '2020-99-99', it should be a whole number"),
        "a number without end": (f"model: a\ntask: b\nseed: {'9' * 5000}\n", "is not valid YAML"),
        "deep": (f"model: a\ntask: b\nsizes: {'[' * 600}{']' * 600}\n", "is nested too deeply"),
        "deep mappings": (f"model: a\ntask: b\ncompare: {'{a: ' * 3000}1{'}' * 3000}\n", "is nested too deeply"),
        "huge": ("model: a\ntask: b\n# " + "x" * 2**20, "is larger than 1 MB"),
        "model is a number": ("model: 5\ntask: b\n", "model is 5, it should be text"),
        "model is a list": ("model: [a]\ntask: b\n", "model is ['a'], it should be text"),
        "model is a mapping": ("model: {a: b}\ntask: b\n", "it should be text"),
        "model is nothing": ("model:\ntask: b\n", "model is None, it should be text"),
        "model is true": ("model: true\ntask: b\n", "model is True, it should be text"),
        "model is empty": ("model: ''\ntask: b\nprune: {keep: 0.4}\n", "model is '', it should be the name or path"),
        "model is blank": ("model: '  '\ntask: b\nprune: {keep: 0.4}\n", "it should be the name or path of a model"),
        "model has a line end": ('model: "a\\nb"\ntask: b\nprune: {keep: 0.4}\n', "it should be the name or path"),
        "model has a zero byte": ('model: "a\\0b"\ntask: b\nprune: {keep: 0.4}\n', "it should be the name or path"),
        "task is a number": ("model: a\ntask: 5\n", "task is 5, it should be text"),
        "task is a list": ("model: a\ntask: [b]\n", "task is ['b'], it should be text"),
        "task is empty": ("model: a\ntask: ''\nprune: {keep: 0.4}\n", "task is '', it should be the name or path"),
        "a section is a number": ("model: a\ntask: b\nheal: 5\n", "heal holds options, 5 is none"),
        "a section is a list": ("model: a\ntask: b\nheal: [steps]\n", "heal holds options"),
        "a section is nothing": ("model: a\ntask: b\nheal:\n", "heal holds options"),
        "a section in a section": ("model: a\ntask: b\nheal: {heal: {steps: 1}}\n", "heal.heal is not a recipe key"),
        "a dot in a section": ("model: a\ntask: b\nheal: {tune.steps: 1}\n", "heal.tune.steps is not a recipe key"),
        "an empty key": ("model: a\ntask: b\n'': 1\n", "is not a recipe key"),
    }
)

NUMBERS = [
    f"{section}.{name}={value}"
    for section, names in {
        "data": ("train", "validation", "test", "max_length"),
        "tune": ("steps", "batch_size", "lr"),
        "decompose": ("examples",),
        "learn": ("steps", "batch_size", "lr", "kl", "rounds", "unpruned", "new"),
        "prune": ("keep", "max_drop", "mass", "multiple_of", "keep_embedding"),
        "extend": ("rank", "examples"),
        "refine": ("steps", "batch_size", "lr"),
        "heal": ("steps", "batch_size", "lr", "kl", "lora"),
    }.items()
    for name in names
    for value in ("-1", "99999999999999999999999999999999999999999999", ".nan", "true", "[1]", "many")
]
CHANGES = {
    "seed=-1": "seed is -1, it should be a whole number from 0 to 4294967295",
    "seed=4294967296": "it should be a whole number from 0 to 4294967295",
    "seed=1.5": "seed is 1.5, it should be a whole number",
    "seed=null": "seed is None, it should be a whole number",
    "soft_labels=-1": "soft_labels is -1, it should be a whole number from 0 to 2147483647",
    "soft_labels=all": "it should be a whole number",
    "heal.lr=.inf": "heal.lr is inf, it should be a number above 0 and up to 3e+38",
    "heal.lr=-.inf": "heal.lr is -inf",
    "heal.kl=.inf": "heal.kl is inf, it should be a number from 0 to 3e+38",
    "learn.unpruned=1.5": "it should be a fraction from 0 to 1",
    "data.test=0": "data.test is 0, it should be a whole number from 1",
    "data.train=0": "data.train is 0",
    "heal.batch_size=0": "heal.batch_size is 0, it should be a whole number from 1",
    "heal.batch_size=2.5": "heal.batch_size is 2.5, it should be a whole number",
    "prune.keep=0": "prune.keep is 0, it should be a fraction above 0 and up to 1, or null",
    "prune.keep=null": "prune: nothing says how much stays",
    "prune.multiple_of=0": "it should be a whole number from 1",
    "prune.size=2x": "prune: keep and size are given",
    "prune={keep: 0.5}": "prune holds options; set one of them",
    "heal=null": "heal holds options",
    "model=5": "model is 5, it should be text",
    "model=": "model is None, it should be text",
    "task=[]": "task is [], it should be text",
    "dtype=int8": "dtype is 'int8', it should be float32, bfloat16 or float16",
    "dtype=8": "dtype is 8, it should be float32",
    "teacher=none": "teacher is 'none', it should be float32, bfloat16, float16 or int8",
    "data.score=best": "data.score is 'best', it should be exact or number, or null",
    "data.options=5": "data.options is 5, it should be a mapping, or null",
    "data.options={data_dir: 5}": "data.options.data_dir is 5, it should be the path of a folder",
    "data.options={1: 2}": "the key 1 is not text",
    "data.prompt={": "is not valid YAML",
    "data.prompt='{'": "data.prompt is '{': ",
    "data.prompt='{}'": "between braces should be a name alone",
    "data.prompt='{0}'": "between braces should be a name alone",
    "data.prompt='{a.__class__}'": "between braces should be a name alone",
    "data.prompt='{a[0]}'": "between braces should be a name alone",
    "heal.precision=fp8": "heal.precision is 'fp8', it should be fp32, plus",
    "heal.embeddings=1": "heal.embeddings is 1, it should be true or false",
    "heal.embeddings=maybe": "it should be true or false",
    "prune.costs=5": "prune.costs is 5, it should be text, or null",
    "sizes=0.5": "sizes is 0.5, it should be a list, each item a fraction",
    "sizes={}": "sizes is {}, it should be a list, each item a fraction",
    "sizes=[0.4]": "the size 0.4 is the same as 0.4",
    "sizes=[0.5, 0.50]": "the size 0.5 is the same as 0.5",
    "sizes=[2x, 2.0x]": "the size '2.0x' is the same as '2x'",
    "sizes=[90M, 0.09B]": "the size '0.09B' is the same as '90M'",
    "sizes=[1000MB, 1 GB]": "the size '1 GB' is the same as '1000MB'",
    "sizes=[0]": "sizes holds 0, it should be a fraction above 0 and up to 1, or text",
    "sizes=[-0.5]": "sizes holds -0.5",
    "sizes=[1.5]": "sizes holds 1.5",
    "sizes=[.nan]": "sizes holds nan",
    "sizes=[true]": "sizes holds True",
    "sizes=[null]": "sizes holds None",
    "sizes=[[2x]]": "sizes holds ['2x']",
    "sizes=[{a: b}]": "sizes holds {'a': 'b'}",
    "sizes=[0.5x]": "size=0.5x asks for more than the whole model",
    "sizes=[0x]": "should read like 4x",
    "sizes=[-2x]": "should read like 4x",
    "sizes=[2 x 3]": "should read like 4x",
    "sizes=[half]": "should read like 4x",
    "sizes=['']": "should read like 4x",
    f"sizes=[{'9' * 400}x]": "should read like 4x",
    "compare=5": "compare is 5, it should be a mapping",
    "compare=[a]": "it should be a mapping",
    "compare={a: 5}": "compare.a is 5, it should hold what differs",
    "compare={a: null}": "compare.a is None, it should hold what differs",
    "compare={a: []}": "it should hold what differs",
    "compare={a: {}}": "compare.a is {}, it should hold what differs",
    "compare={parent: {heal.steps: 1}}": "compare.parent is the name of a row that every run has",
    "compare={result: {heal.steps: 1}}": "compare.result is the name of a row",
    "compare={Result: {heal.steps: 1}}": "compare.Result is the name of a row",
    "compare={result at 0.5: {heal.steps: 1}}": "compare.result at 0.5 is the name of a row",
    "compare={'': {heal.steps: 1}}": "the name of a row is up to 60 printable characters",
    "compare={' a': {heal.steps: 1}}": "the name of a row is up to 60",
    'compare={"a\\nb": {heal.steps: 1}}': "the name of a row is up to 60",
    'compare={"a\\u202eb": {heal.steps: 1}}': "the name of a row is up to 60",
    f"compare={{{'a' * 61}: {{heal.steps: 1}}}}": "the name of a row is up to 60",
    "compare={a: {model: b}}": "all rows share model:",
    "compare={a: {task: b}}": "all rows share task:",
    "compare={a: {seed: 1}}": "all rows share seed:",
    "compare={a: {dtype: float32}}": "all rows share dtype:",
    "compare={a: {sizes: [0.5]}}": "all rows share sizes:",
    "compare={a: {compare: {}}}": "all rows share compare:",
    "compare={a: {data.test: 5}}": "all rows share data.test:",
    "compare={a: {tune.steps: 5}}": "all rows share tune.steps:",
    "compare={a: {heal: {steps: 5}}}": "heal holds options; set one of them",
    "compare={a: {heal.steps: -5}}": "compare.a: heal.steps is -5",
    "compare={a: {heal.steps: many}}": "compare.a: heal.steps is 'many', it should be a whole number",
    "compare={a: {prune.score: best}}": "prune.score is 'best'",
    "compare={a: {prune.size: 2x}}": "prune: keep and size are given",
    "compare={a: {1: 2}}": "the key 1 is not text",
    "heal.steps=!!int x": "has no meaning here",
    "heal.steps=[": "is not valid YAML",
    "heal.steps=*a": "write out what *a stands for",
    "heal.steps": "should read key=value",
    "=5": "is not a recipe key",
    "heal.=5": "is not a recipe key",
    ".steps=5": "is not a recipe key",
    "heal.steps.more=5": "is not a recipe key",
    "HEAL.STEPS=5": "is not a recipe key",
    "prune.latency=2x decode": "prune: keep and latency are given",
}
SIZES = ("0x", "0.5x", "-2x", "x", "2", "twice", "2 x 3", "1e3M", "90m", "120 mb", "0MB", "9" * 50 + "x", "2x decode")
SPEEDS = ("fast", "0x decode", "0.5x decode", "-1ms decode", "2x", "2x prefill", "2x prefill -1", "2 decode")
OPTIONS = {  # of commands: these never get as far as a model
    "eval m --tasks=": "no task is named",
    "eval m --tasks=,": "no task is named",
    "eval m --tasks=nothing_like_it": "unknown task 'nothing_like_it'",
    "eval m --tasks=svamp --limit=0": "Invalid value for '--limit'",
    "eval m --tasks=svamp --limit=-5": "Invalid value for '--limit'",
    "eval m --tasks=svamp --shots=-1": "Invalid value for '--shots'",
    "eval m --tasks=svamp --samples=0": "Invalid value for '--samples'",
    "eval m --tasks=svamp --batch-size=0": "Invalid value for '--batch-size'",
    "eval m --tasks=svamp --batch-size=many": "Invalid value for '--batch-size'",
    "eval m --tasks=svamp --out=.": "it is a folder",
    "eval m --tasks=svamp --out=file/out.json": "is no folder in which files can be written",
    "eval m --tasks=svamp_nll --against=gone.json": "there is no result file at gone.json",
    "eval m --tasks=svamp_nll --against=garbage.json": "garbage.json is not valid JSON",
    "eval m --tasks=svamp_nll --against=list.json": "list.json is damaged or was written by something else: it is [1]",
    "eval m --tasks=svamp_nll --against=empty.json": "it has no model",
    "eval m --tasks=svamp_nll --against=wrong.json": "tasks.svamp_nll is 5, it should be an object",
    "eval m --tasks=svamp_nll --against=deep.json": "is nested too deeply",
    "bench m --prompts=0": "should read like 32,128,512",
    "bench m --prompts=": "should read like 32,128,512",
    "bench m --prompts=4,4": "different numbers from 1 on",
    "bench m --prompts=-4": "should read like 32,128,512",
    "bench m --prompts=99999999999": "should read like 32,128,512",
    "bench m --tokens=0": "Invalid value for '--tokens'",
    "bench m --rounds=0": "Invalid value for '--rounds'",
    "bench m --pause=-1": "Invalid value for '--pause'",
    "bench m --pause=nan": "Invalid value for '--pause'",
    "bench m --device=gpu": "--device 'gpu' should be cpu, cuda or cuda:NUMBER",
    "bench m --device=": "should be cpu, cuda or cuda:NUMBER",
    "bench m --device=cuda:-1": "should be cpu, cuda or cuda:NUMBER",
    "bench m --device=cuda:999": "torch sees",
    "bench m --device=meta": "should be cpu, cuda or cuda:NUMBER",
    "bench m --out=.": "it is a folder",
    "profile m --tokens=0": "should read like 1,128",
    "profile m --tokens=a": "should read like 1,128",
    "profile m --device=tpu": "should be cpu, cuda or cuda:NUMBER",
    "profile m --out=file/costs.json": "is no folder in which files can be written",
    "plan good.yaml --processes=0": "Invalid value for '--processes'",
    "plan good.yaml --processes=99999": "Invalid value for '--processes'",
    "plan gone.yaml": "there is no recipe at gone.yaml",
    "plan .": ". is a folder, not a recipe",
    "plan good.yaml prune.keep=null prune.size=45": "prune.size is 45, it should be text, or null, such as 4x, 90M or",
    "plan good.yaml prune.size=2x": "good.yaml with prune.size=2x: prune: keep and size are given",
    "plan good.yaml model=nobody/nothing": "nobody/nothing does not load: ",
    "run good.yaml --out=/proc/here": "the folder /proc/here cannot be made: No such file",
    "inspect gone": "there is no checkpoint folder at gone",
    "inspect file": "there is no checkpoint folder at file",
    "verify gone": "there is no checkpoint folder at gone",
    "report gone": "gone holds no results.json",
    "report file": "file holds no results.json",
    "export model onnx --to=onnx": "onnx is not empty",
    "run good.yaml --out=file": "file is a file: --out names the folder of a run",
    "run good.yaml --out=model": "model is the folder of the model",
}


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """A folder with a good recipe, damaged result files and configs of models that are no decoders, without weights."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "good.yaml").write_text(yaml.safe_dump(GOOD))
    for name, text in {
        "file": "text",
        "garbage.json": '{"tasks": {',
        "list.json": "[1]",
        "empty.json": "{}",
        "deep.json": "[" * 100_000,
        "wrong.json": json.dumps(
            {
                "model": {"dtype": "float32", "sizes": {}},
                "tasks": {"svamp_nll": 5},
                "settings": {},
                "domains": {},
            }
        ),
    }.items():
        (folder / name).write_text(text)
    for name in ("model", "onnx"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    rows = [{"prompt": f"{i:02}" * 20, "response": "ab"} for i in range(30)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, config in {
        "bert": BertConfig(**small, intermediate_size=64),
        "roberta": AutoConfig.for_model("roberta", **small, intermediate_size=64),
        "t5": T5Config(vocab_size=128, d_model=32, d_ff=64, num_layers=1, num_heads=2),
        "opt": OPTConfig(**small, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=42),
    }.items():
        config.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def refused(*arguments):
    """The one sentence with which the command line answers; a traceback or a second one fails."""
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code in (1, 2), (arguments, done.exception)
    assert isinstance(done.exception, SystemExit), arguments
    said = [line for line in done.output.splitlines() if line.lstrip("│ ").startswith("error: ")]
    if done.exit_code == 1:
        assert len(said) == 1, (arguments, done.output)
        assert len(said[0]) < 700, arguments
        return said[0]
    return " ".join(done.output.replace("│", " ").split())  # typer's box


@pytest.mark.parametrize("name", RECIPES)
def test_a_bad_recipe_gets_one_sentence(name, here):
    content, words = RECIPES[name]
    path = here / "bad.yaml"
    path.write_bytes(content)
    for command in ("run", "plan"):
        said = refused(command, str(path))
        assert words in said
        assert str(path) in said
    assert not (here / "runs").exists()


@pytest.mark.parametrize("change", [*CHANGES, *NUMBERS])
def test_a_bad_change_gets_one_sentence(change):
    said = refused("plan", "good.yaml", change)
    assert CHANGES.get(change, f"{change.partition('=')[0]} is ") in said
    if change not in CHANGES:
        assert "it should be" in said


@pytest.mark.parametrize(
    "changes",
    [
        *([f"prune.size={size}"] for size in SIZES),
        *([f"prune.latency={speed}", "prune.costs=costs.json"] for speed in SPEEDS),
    ],
    ids=lambda changes: changes[0][:40],
)
def test_a_bad_size_gets_one_sentence(changes):
    said = refused("plan", "good.yaml", "prune.keep=null", *changes)
    assert any(words in said for words in ("should read like", "asks for", "it should be text"))


@pytest.mark.parametrize("line", OPTIONS)
def test_a_bad_option_gets_one_sentence(line):
    assert OPTIONS[line] in refused(*line.split(" "))


@pytest.mark.parametrize("model", sampled(["bert", "roberta", "t5"], 3))
def test_an_encoder_is_not_taken_for_a_decoder(model):
    for command in (["plan"], ["run", "--out", "encoder"]):
        assert f"is a {model} model, which is no decoder" in refused(*command, "good.yaml", f"model=./{model}")


def test_data_longer_than_learned_positions_is_said():
    said = refused("plan", "good.yaml", "model=./opt")
    assert "has 43 tokens and the model has learned 42 positions: cut rows with max_length=42" in said


@pytest.mark.skipif(
    Version(version("transformers")) < Version("5.20"), reason="OPT does not run on the meta device there"
)
def test_a_size_above_that_of_the_model_is_said():
    said = refused("plan", "good.yaml", "model=./opt", "data.max_length=42", "prune.keep=null", "prune.size=9GB")
    assert "size=9GB is more than the model has" in said
