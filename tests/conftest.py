"""Tiny random models and tokenizers, made here: nothing is downloaded."""

import functools
import gc
import json
import multiprocessing
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from basis_select.checkpoint.files import save
from basis_select.data.answers import exact
from basis_select.data.tasks import Example, Task
from basis_select.layers import kernels
from basis_select.training.loss import response_logits
from basis_select.training.precision import autocast

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))  # two threads beside other work spin

# Processes in which all is imported, once for all tests, and nothing was computed.
fresh = multiprocessing.get_context("forkserver")
fresh.set_forkserver_preload(["basis_select.run.pipeline", "lm_eval.models.huggingface"])

KINDS = ("llama", "qwen2", "qwen3", "gemma3_text", "mistral", "phi3", "gpt_neox")
VOCABULARY = 128


@pytest.fixture(scope="module", autouse=True)
def garbage_is_looked_for_among_what_tests_make():
    """Not among all that is imported, which takes 0.4 s each time a stage of a run looks for some."""
    gc.collect()
    gc.freeze()


def tiny(kind="llama", tied=False, dtype="float32", seed=0, **overrides):
    """A random two-layer decoder of the given architecture."""
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if kind not in ("gpt_neox", "gpt2"):
        options["num_key_value_heads"] = 2
    if kind in ("qwen3", "gemma3_text", "qwen3_moe"):
        options["head_dim"] = 16
    if kind == "qwen3_moe":
        options |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**options, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    for name, p in model.named_parameters():  # biases start at zero, which would hide a dropped one
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def make_tokenizer():
    """One token per ASCII character."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(c): c for c in range(3, VOCABULARY)}
    fast = Tokenizer(models.BPE(vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def addition_recipe(folder, model, digits, **content):
    """The path of a recipe in `folder`, beside the model and all sums of two numbers below `digits`."""
    save(model, make_tokenizer(), folder / "model")
    rows = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(digits) for b in range(digits)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {"model": str(folder / "model"), "task": str(folder / "data.jsonl"), **content}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    return folder / "tiny.yaml"


def sampled(cases, every):
    """The cases as parameters, of which one in `every` is tried by each run of the tests; the others are `slow`."""
    others = [pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.slow) for c in cases]
    return [case if i % every == 0 else others[i] for i, case in enumerate(cases)]


def in_processes(function, *arguments, count=2):
    """`function(rank, *arguments)` in so many `fresh` processes; an error in one is raised here."""
    torch.multiprocessing.start_processes(function, arguments, count, start_method="forkserver")


def start_no_process(patch):
    """Runs leave out what takes longer than all of a tiny run: the fresh process that loads what they saved, and
    looking for garbage before every stage."""
    patch.setattr("basis_select.run.pipeline.verify", lambda folder: {"bit_equal": True, "max_difference": 0.0})
    patch.setattr("basis_select.run.disk.forget_peak_memory", lambda: None)


@pytest.fixture
def in_fp32(monkeypatch):
    """Computes alike on a processor with bfloat16 units, where products of training are mixed, and on one without."""
    monkeypatch.setattr("basis_select.training.precision.fast_bf16", lambda device: False)


@pytest.fixture
def unloaded(monkeypatch):
    """The kernels are not loaded yet."""
    monkeypatch.setattr(kernels, "_are_loaded", lambda: False)
    monkeypatch.setattr(kernels, "try_load", functools.cache(kernels.try_load.__wrapped__))


class Waited(BaseException):
    """What a load must never do."""


@pytest.fixture
def quickly():
    def stop(*_):
        raise Waited

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(300)  # on a busy machine a load may take long
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def dense_folder(tmp_path):
    """A checkpoint of a tiny dense model that reads long prompts."""
    return save(tiny(max_position_embeddings=2048), make_tokenizer(), tmp_path / "model")


def make_task():
    """Random token sequences of varying lengths: enough to run every stage."""
    generator = torch.Generator().manual_seed(0)

    def example(i):
        length = 8 + i % 20
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        return Example(f"p{i}", f"r{i}", f"r{i}", tuple(ids), length - 4 - i % 3)

    examples = [example(i) for i in range(60)]
    return Task("random", examples[:40], examples[40:50], examples[50:], exact, 0)


@torch.no_grad()
def log_probabilities(teacher, batch):
    """(n, vocabulary) at `batch["positions"]`, as a teacher that is a function returns them."""
    with autocast(teacher):
        return response_logits(teacher, batch).float().log_softmax(-1)


@pytest.fixture
def task():
    return make_task()


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(1))
