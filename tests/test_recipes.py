"""Every recipe is planned on the public config of its model, with a tiny tokenizer and tiny data."""

import json
from pathlib import Path

import pytest
from conftest import make_tokenizer
from public_configs import MODELS, save
from recipes_table import costs
from recipes_table import table as costs_table
from transformers import AutoConfig

from basis_select.checkpoint.format import dense_on_meta
from basis_select.data.sources import HUB
from basis_select.data.tasks import load_task
from basis_select.run import recipe as recipes
from basis_select.run.plan import plan, text

REPO = Path(__file__).parents[1]
RECIPES = {p.stem: p for p in sorted((REPO / "recipes").glob("*.yaml")) if not p.stem.startswith("phonelm")}
EARLIER = ("basel", "gsm_symbolic", "quickstart")  # their commands are in the README
RATES = {"train": 1e11, "float64": 1e10}
FEW = 2  # decoder layers that are planned: what is said of more is the same, and takes as many times longer


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """`stand_in(model, task)`: command line changes that put a config, a tokenizer and rows here in the hub's place.

    The config has FEW of its layers, unless the `whole` is asked for.
    """
    home = tmp_path_factory.mktemp("models")
    row = {
        "question": "How many?",
        "answer": "2 and 2 #### 4",
        "Body": "There are 2.",
        "Question": "How many?",
        "Equation": "( 2 + 2 )",
        "Answer": 4,
        "text": "Add.",
        "test_list": ["assert f(2) == 4"],
        "code": "def f(x):\n    return x + x",
        "problem": "Find $x$.",
        "solution": "It is $4$.",
        "prompt": "2 and 2 is",
        "response": " 4",
    }
    asked = ("question", "Body", "text", "problem", "prompt")
    rows = [row | {key: f"{row[key]} {i}" for key in asked} for i in range(240)]
    for split, part in (("train", rows[:200]), ("validation", rows[200:220]), ("test", rows[220:])):
        (home / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    answer = {"role": "assistant", "content": "4"}
    chats = [{"messages": [{"role": "user", "content": f"{i}?"}, answer]} for i in range(200)]
    own = [{key: row[key] for key in ("prompt", "response")} for row in rows]
    for name, part in (("chats", chats), ("own", own)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"

    def changes(model, task, whole=False):
        folder = home / f"{model.partition('#')[0].replace('/', '--').replace(':', '-')}-{whole}"
        if not folder.exists():
            save("HuggingFaceTB/SmolLM2-135M-Instruct" if model.startswith("wheel:") else model, folder)
            if not whole:
                cut(folder).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        found = [f"model={folder}"]
        if task in HUB:
            found.append(f"data.options={{data_dir: {home}}}")
        elif not task.startswith("reasoning_gym:"):
            found.append(f"task={home / ('chats.jsonl' if 'chat' in task else 'own.jsonl')}")
        else:
            found += ["data.train=40", "data.validation=8", "data.test=8"]
        return found

    return changes


def cut(folder):
    """The config of a folder, with FEW layers."""
    config = AutoConfig.from_pretrained(folder)
    kinds = {"layer_types": config.layer_types[:FEW]} if getattr(config, "layer_types", None) else {}
    return AutoConfig.for_model(**{**config.to_dict(), "num_hidden_layers": FEW, **kinds})


def planned(path, stand_in, *changes):
    r = recipes.read(path, changes)
    smaller = ["prune.size=45MB"] if "MB" in str(r.prune.size) else []  # than the few layers are
    return plan(recipes.read(path, [*changes, *smaller, *stand_in(r.model, r.task)]), rates=RATES)


@pytest.mark.parametrize("model", MODELS)
def test_a_public_config_has_the_published_number_of_parameters(model, tmp_path):
    save(model, tmp_path)
    dense = dense_on_meta(AutoConfig.from_pretrained(tmp_path))
    assert sum(p.numel() for p in dense.parameters()) == MODELS[model][1]


def test_recipes_can_be_read():
    for name, path in RECIPES.items():
        r = recipes.read(path)
        assert r.model in MODELS or r.model.startswith("wheel:"), name
        assert f"basis-select run recipes/{path.name}" in path.read_text() or name in EARLIER


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_planned(name, stand_in):
    found = planned(RECIPES[name], stand_in)
    assert {step.name for step in found.steps} >= {"decompose", "heal", "evaluate"}
    assert all(0 < row.keep <= 1 for row in found.rows.values())
    assert all(step.cost.memory > 0 for step in found.steps if step.name in ("tune", "decompose", "heal"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model", "changes"),
    [
        ("llama-3", "meta-llama/Llama-3.2-3B-Instruct", []),
        ("llama-3", "meta-llama/Llama-3.1-8B-Instruct", ["prune.bits=16", "prune.size=2x"]),
        ("qwen2.5", "Qwen/Qwen2.5-1.5B-Instruct", []),
        ("qwen3", "Qwen/Qwen3-1.7B", []),
        ("gemma-3", "google/gemma-3-1b-it", []),
    ],
)
def test_other_sizes_of_a_family_are_an_override(name, model, changes, stand_in, tmp_path):
    assert f"model={model}" in RECIPES[name].read_text()
    found = planned(RECIPES[name], stand_in, f"model={model}", *changes)
    save(model, tmp_path)
    few = dense_on_meta(cut(tmp_path))
    assert sum(p.numel() for p in found.model.parameters()) == sum(p.numel() for p in few.parameters())


@pytest.mark.slow
def test_plan_prints_what_a_recipe_costs(stand_in):
    r = recipes.read(RECIPES["svamp"], stand_in("HuggingFaceTB/SmolLM2-135M-Instruct", "svamp", whole=True))
    told = text(plan(r))
    assert "134.5 M parameters" in told
    assert "45 MB at most" in told  # 6x smaller


def test_the_readme_of_the_recipes_is_what_their_files_say():
    readme = (REPO / "recipes" / "README.md").read_text()
    assert costs_table(costs()) in readme
    for name in RECIPES:
        assert f"[{name}]({name}.yaml)" in readme


def test_math_is_tested_on_another_data_set_without_what_both_hold(monkeypatch):
    rows = [{"problem": f"{i} and {i}?", "solution": f"It is $\\boxed{{{2 * i}}}$."} for i in range(60)]
    sets = {("DigitalLearningGmbH/MATH-lighteval", "default", "train"): rows[:45]}
    sets[("HuggingFaceH4/MATH-500", None, "test")] = rows[40:]
    monkeypatch.setattr("datasets.load_dataset", lambda path, config, split: sets[path, config, split])
    task = load_task("math", make_tokenizer(), validation=5, test=500)
    assert (len(task.train), len(task.validation), len(task.test)) == (35, 5, 20)
    assert task.report["overlaps_dropped"] == 5
    assert task.test[0].prompt == "Problem:\n40 and 40?\n\nSolution:"
    assert task.test[0].response == r" It is $\boxed{80}$."


def test_the_command_line_may_name_what_a_recipe_does_not(tmp_path):
    (tmp_path / "a.yaml").write_text("prune: {keep: 0.5}\n")
    assert recipes.read(tmp_path / "a.yaml", ["model=m", "task=t"]).task == "t"
    with pytest.raises(ValueError, match=r"a.yaml does not name a task"):
        recipes.read(tmp_path / "a.yaml", ["model=m"])
