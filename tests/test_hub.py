"""Checkpoints on a hub: the real client against a hub on this machine (hub_server.py)."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import make_task, make_tokenizer, tiny
from damages import flip
from hub_server import Hub
from huggingface_hub import ModelCard, constants, parse_eval_result_entries
from typer.testing import CliRunner

import basis_select as bs
from basis_select.checkpoint.checks import SIDECAR, weight_hash
from basis_select.cli import app
from basis_select.evaluation.report import curve
from basis_select.publish.push import contents

RESULTS = Path(__file__).parents[1] / "eval" / "results" / "gallery.json"
BASE_CARD = b"---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# A base model\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run directory: a tiny checkpoint of two shards, with the results of another run said to be its own."""
    run = tmp_path_factory.mktemp("runs") / "svamp"
    model = bs.decompose(tiny(tied=True), make_task(), examples=16, embedding=True)
    bs.prune(model, keep=0.5, keep_embedding=0.5, multiple_of=1)
    bs.save(model, make_tokenizer(), run / "final", "float32", max_shard_size="80KB")
    results = json.loads(RESULTS.read_text())["quickstart"]["results"]
    results["result"]["weights_sha256"] = weight_hash(run / "final")
    (run / "results.json").write_text(json.dumps(results))
    (run / "manifest.json").write_text(json.dumps({"versions": {"torch": torch.__version__}}))
    recipe = {"model": "org/base", "task": "svamp", "data": {"prompt": None, "options": None}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "svamp"))


@pytest.fixture
def hub():
    server = Hub()
    server.repositories["org/base"] = {"private": False, "commits": [{"README.md": BASE_CARD}]}
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def online(hub, tmp_path, monkeypatch):
    """This process uses that hub and is logged in: what huggingface_hub reads from the environment at its import."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # what an earlier test may have made asks elsewhere
    return hub


def push(*arguments):
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def test_what_is_pushed_is_what_is_loaded(online, run):
    assert push(run, "me/small").output == f"{online.url}/me/small\n"
    assert online.repositories["me/small"]["private"]
    assert len(online.repositories["me/small"]["commits"]) == 2  # the empty one, and all at once
    files = online.files("me/small")
    expected = {p.name for p in (run / "final").iterdir()} | {"recipe.yaml", "results.json", "manifest.json"}
    assert set(files) == expected | {"README.md", ".eval_results/svamp.yaml"}
    online.calls.clear()
    model, tokenizer = bs.load("me/small")
    assert torch.equal(logits(model), logits(bs.load(run / "final")[0]))
    assert tokenizer("abc")["input_ids"] == [97, 98, 99]
    fetched = [call for call in online.calls if call.startswith("GET") and call.endswith(".safetensors")]
    assert len(fetched) == len(set(fetched)) == 2
    online.calls.clear()
    bs.load("me/small")
    assert not [call for call in online.calls if call.startswith("GET /me")]


def test_a_damaged_copy_of_the_hub_is_refused(online, run):
    push(run, "me/small")
    files = online.files("me/small")
    name = next(name for name in files if name.endswith(".safetensors"))
    files[name] = files[name][:-5] + bytes([files[name][-5] ^ 1]) + files[name][-4:]
    with pytest.raises(ValueError, match=f"{name} is not the file that was saved"):
        bs.load("me/small")
    del files[SIDECAR]
    with pytest.raises(ValueError, match=f"has no {SIDECAR}"):
        bs.load("me/small")


def test_other_models_of_a_hub_load_as_ever(online, tmp_path):
    dense = tiny()
    dense.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    files = {p.name: p.read_bytes() for p in (tmp_path / "dense").iterdir()}
    online.repositories["org/dense"] = {"private": False, "commits": [files]}
    assert torch.equal(logits(bs.load("org/dense")[0]), logits(dense))
    with pytest.raises(OSError, match="org/nothing"):
        bs.load("org/nothing")


@pytest.mark.slow
def test_a_lost_connection_is_continued(online, run):
    online.fail = {"PUT /lfs": 1, "POST /api/models/me/small/commit": 1}  # the client tries the first again by itself
    broken = push(run, "me/small")
    assert broken.exit_code == 1
    assert re.fullmatch(r"error: the connection to \S+ failed \(.+\): .*the same command continues\n", broken.output)
    assert online.files("me/small") == {}  # nothing half-visible
    uploads = [call for call in online.calls if call.startswith("PUT")]
    assert len(uploads) == 3
    assert push(run, "me/small").exit_code == 0
    assert [call for call in online.calls if call.startswith("PUT")] == uploads  # no weights were sent again
    bs.load("me/small")


@pytest.mark.slow
def test_a_later_push_leaves_nothing_of_an_earlier_one(online, run, made, tmp_path):
    push(run, "me/small")
    online.files("me/small").update({"notes.txt": b"x", "chat_template.jinja": b"x", ".gitattributes": b"x"})
    model, tokenizer = bs.load(run / "final")
    bs.save(model, tokenizer, tmp_path / "other")
    assert push(tmp_path / "other", "me/small", "--base", "org/base").exit_code == 0
    files = online.files("me/small")
    recorded = json.loads((tmp_path / "other" / SIDECAR).read_text())["sha256"]
    assert set(files) == {*recorded, SIDECAR, "README.md", ".gitattributes"}
    assert "No evaluation is recorded" in files["README.md"].decode()
    assert torch.equal(logits(bs.load("me/small")[0]), logits(model))


FAILURES = {
    "not logged in": ("", "me/small", "not logged in to .*hf auth login"),
    "wrong token": ("hf_wrong", "me/small", "does not accept this access token"),
    "no rights": ("hf_stranger", "me/small", "does not let this access token write to me/small"),
    "no rights to what exists": (
        "hf_stranger",
        "org/base --public --replace-card",
        "does not let this access token write to org/base",
    ),
    "no owner": ("hf_owner", "small", "'small' is not the name of a repository.*USER/NAME"),
    "bad name": ("hf_owner", "me/sm all", "'me/sm all' is not the name of a repository"),
    "address": ("hf_owner", "https://huggingface.co/me/small", "is not the name of a repository"),
    "public": ("hf_owner", "me/public", "me/public exists and is public: push with --public"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_are_one_sentence(failure, online, run, monkeypatch):
    token, repo_id, message = FAILURES[failure]
    online.repositories["me/public"] = {"private": False, "commits": [{}]}
    before = {name: len(r["commits"]) for name, r in online.repositories.items()}
    monkeypatch.setenv("HF_TOKEN", token)
    result = push(run, "--license", "mit", *(repo_id.split() if "--" in repo_id else [repo_id]))
    assert result.exit_code == 1
    assert re.fullmatch(f"error: .*{message}.*\n", result.output)
    assert {name: len(r["commits"]) for name, r in online.repositories.items()} == before


def test_nothing_is_created_for_what_cannot_be_published(online, run, tmp_path):
    cases = {
        "there is no checkpoint folder": (tmp_path / "nowhere",),
        "is not a checkpoint of basis_select": (bs.save(tiny(), make_tokenizer(), tmp_path / "dense"),),
        "name it with --license": (run, "--base", "org/unknown"),
    }
    flip(run / "final" / "model-00001-of-00002.safetensors")
    cases["is not the file that was saved"] = (run,)
    for message, (folder, *options) in cases.items():
        result = push(folder, "me/small", *options)
        assert result.exit_code == 1
        assert message in result.output
    assert "me/small" not in online.repositories


def test_a_damaged_recipe_is_named(online, run):
    (run / "recipe.yaml").write_text("model: [")
    result = push(run, "me/small")
    assert result.exit_code == 1
    assert "recipe.yaml" in result.output
    assert "Traceback" not in result.output


def test_results_of_other_weights_are_not_published(run, tmp_path):
    shutil.rmtree(run / "final")
    model = bs.prune(bs.decompose(tiny(), make_task(), examples=16), keep=0.5, multiple_of=1)
    bs.save(model, make_tokenizer(), run / "final")
    with pytest.raises(ValueError, match=r"has no results of .*final: no row has its weights"):
        contents(run, "me/small")


def test_a_hub_that_is_not_there(online, run, monkeypatch):
    online.shutdown()
    online.server_close()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    result = push(run, "me/small", "--license", "mit")
    assert re.fullmatch(r"error: the connection to \S+ failed .*\n", result.output)


def test_only_what_was_saved_is_published(online, run):
    final = run / "final"
    (final / ".env").write_text("PASSWORD=x")
    (final / ".state").mkdir()
    (final / ".state" / "optimizer.pt").write_text("x")
    (final / "notes.md").symlink_to(run / "recipe.yaml")
    assert push(run, "me/small").exit_code == 0
    assert not {".env", ".state/optimizer.pt", "notes.md"} & set(online.files("me/small"))
    (final / "optimizer.pt").write_text("x")
    assert "optimizer.pt may be a pickle" in push(run, "me/small").output


def test_no_folder_and_no_secret_of_this_machine_is_published(online, run, caplog):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["task"] = "/home/jane/clients/rows.jsonl"
    recipe["data"] |= {"options": {"data_dir": "private/clients", "token": "s3cret", "note": "hf_s3crets3cret"}}
    recipe["prune"] = {"costs": "C:\\\\Users\\\\jane\\\\costs.json"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    manifest = {"versions": {}, "data": {"source": "read from /home/jane/clients/rows.jsonl"}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert push(run, "me/small").exit_code == 0
    published = online.files("me/small")
    for name, content in published.items():
        assert not re.search(rb"jane|s3cret|private/clients", content), name
    said = yaml.safe_load(published["recipe.yaml"])
    assert (said["model"], said["task"]) == ("org/base", "rows.jsonl")
    assert said["data"]["options"] == {"data_dir": "clients", "token": "***", "note": "***"}
    assert (
        "recipe.yaml is published without secrets and folders of this machine in data.options.data_dir" in caplog.text
    )


def test_a_model_folder_that_is_gone_is_nobodys_hub_id(online, run):
    """Its name may be that of somebody's repository, whose licence is not its own."""
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("org/base", "models/base"))
    online.repositories["models/base"] = {"private": False, "commits": [{"README.md": BASE_CARD}]}
    stage = run / "stages" / "load-1"
    stage.mkdir(parents=True)
    (stage / "stage.json").write_text(
        json.dumps({"options": {"model": "models/base", "files": [["config.json", 1, 1]]}})
    )
    assert "names the model models/base, a folder that is not here" in push(run, "me/small").output
    assert push(run, "me/small", "--base", "org/base").exit_code == 0
    shutil.rmtree(run / "stages")
    online.files("models/base")["config.json"] = b'{"model_type": "llama", "hidden_size": 8}'
    assert "models/base on the hub is not what this model was made from" in push(run, "me/small").output
    recipe.write_text(recipe.read_text().replace("models/base", "../models/base"))
    assert "a folder that is not here" in push(run, "me/small", "--license", "mit").output


@pytest.mark.slow
def test_a_card_that_was_written_by_hand_stays(online, run):
    hand = b"---\nlicense: mit\n---\nby hand\n"
    online.repositories["me/small"] = {"private": True, "commits": [{"README.md": hand}]}
    assert "README.md of me/small was not written by basis_select" in push(run, "me/small").output
    assert online.files("me/small") == {"README.md": hand}
    (run / "final" / "README.md").write_bytes(hand)
    assert push(run, "me/small").exit_code == 0
    assert online.files("me/small")["README.md"] == hand
    assert push(run, "me/small", "--replace-card").exit_code == 0
    assert b"# small" in online.files("me/small")["README.md"]
    (run / "final" / "README.md").unlink()
    (run / "final" / "README.md").write_bytes(online.files("me/small")["README.md"])  # ours, as a clone has it
    assert push(run, "me/small").exit_code == 0
    online.files("me/small")["README.md"] += b"and by hand\n"
    assert "was not written by basis_select, or changed since" in push(run, "me/small").output


@pytest.mark.parametrize("there", ["there", "not there", "refusing"])
def test_a_password_in_the_address_is_never_printed(there, online, run, monkeypatch, caplog):
    monkeypatch.setattr(constants, "ENDPOINT", online.url.replace("://", "://jane:s3cret@"))
    if there == "not there":
        online.shutdown()
        online.server_close()
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between one attempt of the client and the next
    if there == "refusing":
        monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    result = push(run, "me/small", "--license", "mit")
    assert "s3cret" not in result.output + caplog.text + str(result.exception)
    assert online.url in result.output
    with pytest.raises(OSError, match=r"me/nothing|connect") as caught:
        bs.load("me/nothing")
    assert "s3cret" not in str(caught.value)


def test_dry_run_contacts_nobody(online, run):
    before = sorted(run.rglob("*"))
    result = push(run, "me/small", "--dry-run")
    assert result.exit_code == 0
    assert result.stdout == contents(run, "me/small")["README.md"] + "\n"
    assert [line.split()[1] for line in result.stderr.splitlines()] == list(contents(run, "me/small"))
    assert online.calls == []
    assert sorted(run.rglob("*")) == before


def test_the_card_says_what_the_results_say(online, run):
    push(run, "me/small", "--public")
    text = online.files("me/small")["README.md"].decode()
    card = ModelCard(text)
    assert card.data.base_model == "org/base"
    assert card.data.base_model_relation == "quantized"
    assert (card.data.license, card.data.language) == ("apache-2.0", ["en"])
    results = json.loads((run / "results.json").read_text())
    row, parent = results["result"], results["parent"]
    numbers = {str(row["n"]), f"{row['paired']['p']:.2g}", "95"}  # 95 % of the intervals
    for r in (row, parent):
        numbers |= {f"{x:.1f}" for x in (100 * r["accuracy"][k] for k in ("value", "low", "high"))}
        numbers |= {f"{r['nll'][k]:.3f}" for k in ("value", "low", "high")}
        bits = r["sizes"].get("bits", {})
        numbers |= {f"{x:,}" for x in (*(v for k, v in r["sizes"].items() if k != "bits"), *bits.values())}
        numbers |= {*bits, "16"}
    numbers |= {str(row["paired"]["gained"]), str(row["paired"]["lost"])}
    numbers |= {f"{row['sizes'][k + '_dense'] / row['sizes'][k]:.2f}" for k in ("targeted", "parameters")}
    said = set(re.findall(r"\d[\d,]*(?:\.\d+)?(?:e-\d+)?", text[text.index("## Size") : text.index("## How")]))
    assert said <= numbers
    sizes = row["sizes"]
    shown = {f"{sizes['bytes']:,}", *(f"{100 * r['accuracy']['value']:.1f}" for r in (row, parent))}
    shown |= {f"{row['nll']['value']:.3f}", str(row["paired"]["gained"]), str(row["paired"]["lost"])}
    shown |= {f"{sizes[k + '_dense'] / sizes[k]:.2f}" for k in ("targeted", "parameters")}
    assert shown <= said
    code = re.search(r"```python\n(.+?)```", text, re.DOTALL)[1]
    assert code.startswith("import basis_select")
    assert 'basis_select.load("me/small")' in code
    assert "basis-select run recipe.yaml" in text
    assert "Question: {Body} {Question}" in text
    assert f"come from {row['n']} test items" in text
    (entry,) = parse_eval_result_entries(yaml.safe_load(online.files("me/small")[".eval_results/svamp.yaml"]))
    assert (entry.dataset_id, entry.value) == ("ChilleD/SVAMP", 100 * row["accuracy"]["value"])
    assert entry.notes.startswith("200 test items drawn at random")


@pytest.fixture
def family(run):
    """The run at two sizes: the second is another checkpoint of it."""
    model = bs.prune(bs.decompose(tiny(tied=True), make_task(), examples=16), keep=0.3, multiple_of=1)
    bs.save(model, make_tokenizer(), run / "final-6x", "float32")
    results = json.loads((run / "results.json").read_text())
    sizes = results["result"]["sizes"]
    results["result at 6x"] = {**results["result"], "sizes": {**sizes, "bytes": sizes["bytes"] + 5_000_000}}
    results["result at 6x"]["weights_sha256"] = weight_hash(run / "final-6x")
    (run / "results.json").write_text(json.dumps(results))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "sizes": ["6x"], "prune": {"size": "8x"}}))
    curve({name: results[name] for name in ("parent", "result", "result at 6x")}, run)
    return run


@pytest.mark.slow
def test_all_sizes_of_a_family_are_published_with_an_overview(online, family):
    pushed = push(family, "me/small", "--family").output.split()
    assert pushed == [f"{online.url}/me/small{size}" for size in ("-8x", "-6x", "")]
    for size, folder in (("8x", "final"), ("6x", "final-6x")):
        assert torch.equal(logits(bs.load(f"me/small-{size}")[0]), logits(bs.load(family / folder)[0]))
    files = online.files("me/small")
    assert set(files) == {"README.md", "curve.csv", "curve.png"}
    assert files["curve.png"] == (family / "curve.png").read_bytes()
    text = files["README.md"].decode()
    assert ModelCard(text).data.license == "apache-2.0"
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    results = json.loads((family / "results.json").read_text())
    names = ("me/small-8x", "me/small-6x", "dense parent")
    for cells, name, key in zip(table, names, ("result", "result at 6x", "parent"), strict=True):
        row = results[key]
        assert name in cells[0]
        assert cells[1:3] == [f"{row['sizes']['bytes'] / 1e6:.1f}", f"{row['sizes']['parameters']:,}"]
        assert cells[3].startswith(f"{row['accuracy']['value']:.1%}")
        assert cells[4].startswith(f"{row['nll']['value']:.3f}")
    assert push(family, "me/small", "--family").exit_code == 0  # again, over what is there


@pytest.mark.slow
def test_nothing_of_this_machine_is_in_a_family(online, family):
    push(family, "me/small", "--family")
    here = [str(Path(bs.__file__).parents[1]), str(family.parent), str(Path.home())]
    for name in ("me/small", "me/small-8x", "me/small-6x"):
        for file, content in online.files(name).items():
            assert not [place for place in here if place.encode() in content], (name, file)


def test_a_run_of_one_size_is_no_family(online, run):
    assert "a family is a finished run whose recipe names `sizes`" in push(run, "me/small", "--family").output
    assert "me/small" not in online.repositories


def test_licence_is_never_invented(run):
    metadata = ModelCard(contents(run, "me/small", base="org/other")["README.md"]).data
    assert metadata.license is None
    assert metadata.language is None
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("org/base", "wheel:llm==1#sha256=0"))
    card = ModelCard(contents(run, "me/small", metadata={"license": "mit"})["README.md"])
    assert card.data.base_model is None
    assert "`wheel:llm==1#sha256=0`" in card.text


@pytest.mark.slow
def test_from_one_process_to_another(hub, run, tmp_path):
    """As users do it: nothing but the environment says which hub."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_owner"}
    environment = {**os.environ, **own, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "basis_select", "push", str(run), "me/small"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{hub.url}/me/small\n", done.stderr
    code = (
        "import basis_select, torch; from transformers import AutoModelForCausalLM;"
        "ids = torch.arange(3, 40)[None];"
        "a = basis_select.load('me/small')[0](ids).logits;"
        "b = AutoModelForCausalLM.from_pretrained('me/small')(ids).logits;"
        "print(torch.equal(a, b), a.double().sum().item())"
    )
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    equal, total = loaded.stdout.split()
    assert equal == "True"
    assert float(total) == logits(bs.load(run / "final")[0]).double().sum().item()
