"""vLLM serves what is stored: parts of layers against the layers, and a server of its own against `load`.

What needs vLLM runs where the environment variable BASIS_SELECT_VLLM names the Python of an environment that
eval/vllm_env.sh made; the other tests need none.
"""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from conftest import make_task, make_tokenizer, tiny
from safetensors.torch import load_file

import basis_select as bs
from basis_select.bits import Form
from basis_select.checkpoint.checks import description
from basis_select.checkpoint.format import BasisSelectConfig
from basis_select.export import to_int8
from basis_select.layers.embedding import TableEmbedding
from basis_select.layers.group import groups
from basis_select.layers.rounded import RoundedLinear
from basis_select.layers.rounding import restored_from_bytes
from basis_select.serving.parts import Names, Stored, fuse, latent, table

PYTHON = os.environ.get("BASIS_SELECT_VLLM")
with_vllm = pytest.mark.skipif(
    not PYTHON, reason="BASIS_SELECT_VLLM names no Python with vLLM: make one with eval/vllm_env.sh"
)
EVAL = Path(__file__).parents[1] / "eval"
LAYER = "model.layers.0."
FUSED = [("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")), ("mlp", ("down_proj",))]


def bases(**options):
    return bs.prune(bs.decompose(tiny(), make_task(), examples=16, **options), keep=0.5, multiple_of=4)


def one_dense_shard():
    model = bases()
    k = model.get_submodule(f"{LAYER}self_attn.k_proj")
    assert k.leader is not k
    k.leader.readers -= 1
    model.set_submodule(f"{LAYER}self_attn.k_proj", k.to_linear())
    return model


def split():
    model = bs.decompose(tiny(), make_task(), examples=16)
    for group in groups(model):
        Form(group.rank, head=32).put(group, model)
    return model


MODELS = {
    "shared v": bases,
    "own v": lambda: bases(share=False),
    "a dense shard": one_dense_shard,
    "8 bits": lambda: to_int8(bases()),
    "heads of 8 bits": split,
}


@pytest.fixture(scope="module", params=MODELS)
def stored(request, tmp_path_factory):
    """`(model, what config.json describes, {layer: its tensors})` of a saved checkpoint."""
    model = MODELS[request.param]()
    folder = bs.save(model, make_tokenizer(), tmp_path_factory.mktemp("saved") / "model")
    return model, *read(folder)


def read(folder):
    """`(what config.json describes, all tensors)` of a checkpoint."""
    return Names(description(folder)), load_file(folder / "model.safetensors")


def of(names, tensors, layer):
    """The tensors of a layer by their names in it."""
    found = {name: tensors[f"{layer}.{name}"] for name in names.of(layer)}
    for name, about in names.of(layer).items():
        assert found[name].shape == about.shape(len(found[name]), inputs_of(layer))
    return found


def inputs_of(layer):
    return 96 if "down" in layer else 64


@torch.no_grad()
@pytest.mark.parametrize(("above", "leaves"), FUSED)
def test_a_fused_layer_is_its_layers_side_by_side(stored, above, leaves):
    model, names, tensors = stored
    layers = [f"{LAYER}{above}.{leaf}" for leaf in leaves]
    made, x = whole(names, tensors, layers), torch.randn(3, inputs_of(layers[0]))
    expected = torch.cat([model.get_submodule(layer)(x.clone()) for layer in layers], -1)
    assert torch.allclose(made(x), expected, atol=1e-5)
    if all(names.leader(layer) == layers[0] for layer in layers):
        assert (len(made.vs), len(made.us)) == (1, 1)  # two products for all of them


def whole(names, tensors, layers, rows=None, columns=None):
    """The layers as one, or what one device has of them."""
    columns = columns or range(inputs_of(layers[0]))

    def part(layer):
        found = {}
        for name, tensor in of(names, tensors, layer).items():
            about = names.of(layer)[name]
            own = torch.arange(len(tensor)) if about.rows or rows is None else rows(len(tensor))
            found[name] = about.part(tensor, own, columns)
        return found

    parts = {layer: part(layer) for layer in {*layers, *filter(None, map(names.leader, layers))}}
    vs = {leader: latent(names, leader, parts[leader], len(columns)) for leader in map(names.leader, layers) if leader}
    return fuse(names, layers, parts, vs, len(columns))


@torch.no_grad()
def test_rows_dealt_to_devices_are_the_rows_of_the_whole(stored):
    _, names, tensors = stored
    layers = [f"{LAYER}self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")]
    x = torch.randn(3, 64)
    expected = whole(names, tensors, layers)(x).split([64, 32, 32], -1)
    halves = [
        whole(names, tensors, layers, rows=lambda n, i=i: torch.arange(n).chunk(2)[i])(x).split([32, 16, 16], -1)
        for i in range(2)
    ]
    for y, a, b in zip(expected, *halves, strict=True):
        assert torch.allclose(torch.cat([a, b], -1), y, atol=1e-5)


@torch.no_grad()
def test_latents_of_columns_dealt_to_devices_add_up(stored):
    _, names, tensors = stored
    layers, x = [f"{LAYER}mlp.down_proj"], torch.randn(3, 96)
    whole_layer = whole(names, tensors, layers)
    halves = [(columns, whole(names, tensors, layers, columns=columns)) for columns in (range(64), range(64, 96))]
    if whole_layer.vs:
        z = sum(part.latents(x[:, columns.start : columns.stop])[0] for columns, part in halves)
        assert torch.allclose(halves[0][1].outputs(x, [z]), whole_layer(x), atol=1e-5)
    else:
        assert torch.allclose(sum(p(x[:, c.start : c.stop]) for c, p in halves), whole_layer(x), atol=1e-5)


def test_what_shares_a_scale_is_not_parted():
    rows = torch.arange(2)
    for bits in (4, 3, 2):
        layer = RoundedLinear.rounded(torch.nn.Linear(90, 3).requires_grad_(False), bits)
        q = Stored("q", bits, None, None)
        for columns in (range(32), range(32, 90), range(64, 90), range(90)):
            part = q.part(layer.q, rows, columns)
            found = restored_from_bytes(part, len(columns), bits, torch.float32)
            assert torch.equal(found, layer.weight[:2, columns.start : columns.stop])
        for columns in (range(48), range(48, 90)):
            with pytest.raises(ValueError, match="32 inputs share a scale"):
                q.part(layer.q, rows, columns)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"bits": True}])
@pytest.mark.parametrize("tied", [True, False])
def test_a_table_of_embeddings_is_that_of_the_file(tied, options, tmp_path):
    model = bs.decompose(tiny(tied=tied), make_task(), examples=16, embedding=True)
    if options:
        bs.prune(model, make_task(), size="2.6x", bits="auto", multiple_of=4)
    else:
        bs.prune(model, keep=0.5, keep_embedding=0.5, multiple_of=4)
    folder = bs.save(model, make_tokenizer(), tmp_path / "saved")
    names, tensors = read(folder)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, TableEmbedding)
    layer = "lm_head" if tied else f"{names.table['name']}.table"
    made = table(names, layer, {name: tensors[f"{layer}.{name}"] for name in names.of_table(layer)}, 64)
    ids, x = torch.arange(9), torch.randn(2, 64)
    assert torch.equal(made(ids), embedding(ids))
    assert torch.equal(made.bases(x), embedding.bases(x))


def test_names_follow_a_server_that_renames():
    config = BasisSelectConfig(
        ranks={"a.q": 4, "a.k": 4}, groups=[["a.q", "a.k"]], heads={"a.q": 2}, bits={"a.q.u.head": 8, "b.w": 4}
    )
    names = Names(config, lambda name: f"model.{name}")
    assert names.layers == {"model.a.q", "model.a.k", "model.b.w"}
    assert names.leader("model.a.k") == "model.a.q"
    assert names.of("model.a.k").keys() == {"u.head.weight", "u.tail.weight"}
    assert names.of("model.b.w").keys() == {"q"}
    assert names.of("model.a.q").keys() == {
        "u.head.q",
        "u.head.scale",
        "u.tail.weight",
        "v.head.weight",
        "v.tail.weight",
    }


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with bases of 8 and 4 bits and a rounded table, of sizes that vLLM's attention on the CPU has."""
    model = bs.decompose(tiny(tied=True, hidden_size=128, intermediate_size=160), make_task(), examples=16)
    bs.prune(model, make_task(), size="2.6x", bits="auto", multiple_of=4)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    return bs.save(model, tokenizer, tmp_path_factory.mktemp("served") / "model", dtype="bfloat16")


@pytest.fixture(scope="module")
def served(folder):
    """`(address, process)` of `vllm serve FOLDER`."""
    port = free_port()
    command = [str(Path(PYTHON).parent / "vllm"), "serve", str(folder), "--port", str(port), "--served-model-name", "m"]
    command += ["--max-model-len", "128", "--max-num-seqs", "32", "--enforce-eager"]
    # On some processors with AMX, vLLM's attention in bfloat16 dies of an illegal instruction, with dense models too.
    command += ["--dtype", "float32"]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with open(folder.parent / "log", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(400):
            assert process.poll() is None, (folder.parent / "log").read_text()[-4000:]
            if answers(f"{address}/health"):
                break
            time.sleep(1)
        yield f"{address}/v1", process
    finally:
        process.terminate()
        process.wait(60)


def answers(address):
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


CLIENT = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from openai import OpenAI
client = OpenAI(base_url=sys.argv[1], api_key="none")

def chat(text, **more):
    asked = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="m", messages=asked, temperature=0, max_tokens=8, **more)

whole = chat("1+2").choices[0].message.content
pieces = [part.choices[0].delta.content or "" for part in chat("1+2", stream=True) if part.choices]
with ThreadPoolExecutor(32) as pool:
    many = [a.choices[0].message.content for a in pool.map(lambda i: chat("1+2"), range(32))]
print(json.dumps({"whole": whole, "streamed": "".join(pieces), "pieces": len(pieces), "many": many}))
"""


@pytest.mark.slow
@with_vllm
def test_the_openai_client_chats_streams_and_asks_32_times_at_once(served, folder):
    address, _ = served
    done = subprocess.run([PYTHON, "-c", CLIENT, address], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["whole"] == said["streamed"]
    assert said["pieces"] > 4
    assert len(said["many"]) == 32
    model, tokenizer = bs.load(folder)
    ids = torch.tensor([tokenizer.apply_chat_template([{"role": "user", "content": "1+2"}])["input_ids"]])
    new = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    # Tokens of nearly the same probability may change places where sums are rounded otherwise: the first may not here.
    assert said["whole"][:1] == tokenizer.decode(new, skip_special_tokens=True)[:1]


@pytest.mark.slow
@with_vllm
def test_a_thousand_requests_leave_no_memory_behind(served):
    address, process = served
    body = json.dumps({"model": "m", "prompt": "12+34=", "max_tokens": 2, "temperature": 0}).encode()

    def ask(_):
        request = urllib.request.Request(f"{address}/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["choices"][0]["text"]

    def used():
        every = [process, *psutil.Process(process.pid).children(recursive=True)]
        return sum(psutil.Process(p.pid).memory_info().rss for p in every)

    with ThreadPoolExecutor(16) as pool:
        texts, before = set(pool.map(ask, range(200))), used()
        texts |= set(pool.map(ask, range(1000)))
    assert all(texts)
    assert used() - before < 40e6


@pytest.mark.slow
@with_vllm
def test_damage_is_found_before_weights_are_read(folder, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    code = "import sys; sys.path.insert(0, sys.argv[1]); from vllm_check import theirs; theirs(sys.argv[2])"
    done = subprocess.run([PYTHON, "-c", code, EVAL, damaged], capture_output=True, text=True, timeout=300)
    assert done.returncode
    assert "model.safetensors is not the file that was saved: its sha256 differs" in done.stderr + done.stdout


REFUSED = """
from basis_select.serving import vllm

def said(function, *arguments, **more):
    try:
        function(*arguments, **more)
    except ValueError as error:
        print(error)

made = vllm.ServedConfig.from_config
said(made, {"quant_method": "basis_select", "format_version": 2, "ranks": {"a": 4}, "weighted": 1})
said(made, {"quant_method": "basis_select", "format_version": 4})
served = made({"quant_method": "basis_select", "format_version": 2, "ranks": {"a.b": 4}})
said(served.maybe_update_config, "some/model", revision="abc")
vllm.get_pp_group = lambda: type("Group", (), {"world_size": 1})
said(served.require_all_built)
said(served.read, "a.b", ["u.weight"])
"""


@pytest.mark.slow
@with_vllm
def test_what_cannot_be_served_is_refused_in_a_sentence():
    done = subprocess.run([PYTHON, "-c", REFUSED], capture_output=True, text=True, timeout=300)
    said = [line for line in done.stdout.splitlines() if line]
    assert [line.split(":")[0] for line in said[-5:]] == [
        "these bases are still weighted, as decompose and learn leave them",
        "this checkpoint has format version 4; this basis_select reads versions 1 to 3",
        "some/model is served as it is on its main branch",
        "vLLM's model of this architecture has no place for bases or bits in a.b",
        "None holds no a.b.u.weight",
    ], done.stderr[-2000:]


@pytest.mark.slow
@with_vllm
def test_log_probabilities_are_those_of_load(tmp_path):
    command = [PYTHON, EVAL / "vllm_check.py", "--only", "qwen2", "--out", tmp_path / "found.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    for row in json.loads((tmp_path / "found.json").read_text())["cases"]:
        assert row["max_difference"]["float32"] < (5e-5 if "bits" in row["form"] else 1e-5)
        assert row["max_difference"]["bfloat16"] < 0.02
