"""What is saved is described from the modules there are, ties from the tensors; architectures; Unix-only imports."""

import copy
import importlib
import os
import pkgutil
import re
import signal
import sys

import architectures
import pytest
import torch
import torch.distributed as dist
from conftest import logits, make_task, make_tokenizer, sampled, tiny
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.quantizers import auto as quantizers

import basis_select as bs
from basis_select.checkpoint.format import description
from basis_select.checkpoint.targets import is_plain, targets
from basis_select.layers.group import groups
from basis_select.layers.low_rank import LowRankLinear

TASK, IDS = make_task(), torch.randint(3, 128, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def weighted():
    model = bs.decompose(tiny(), TASK, examples=8)
    for group in groups(model):
        group.leader.s.learned.data.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def pruned(weighted):
    return bs.prune(copy.deepcopy(weighted), keep=0.5, multiple_of=1)


def learned(model, **options):
    return bs.learn(model, TASK, steps=1, rounds=0, kl=0, **options)


def dense_layers(model, several=True):
    for group in groups(model) if several else groups(model)[-1:]:
        for name, layer in group.items():
            model.set_submodule(name, layer.to_linear())
    return model


def new_head(model):
    torch.manual_seed(3)
    model.lm_head = nn.Linear(64, 128, bias=False)
    return model


def tied_by_hand(model):
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def embedded(model):
    model = bs.decompose(model, TASK, examples=8, embedding=True)
    return bs.prune(model, keep=0.5, keep_embedding=0.5, multiple_of=1)


def folded_after_loading(model, tmp_path):
    return bs.prune(bs.load(bs.save(model, make_tokenizer(), tmp_path / "before"))[0], keep=0.3, multiple_of=1)


WAYS = {
    "decompose": lambda weighted, pruned: weighted,
    "learn": lambda weighted, pruned: learned(weighted),
    "learn(square)": lambda weighted, pruned: learned(weighted, square=True),
    "learn(new)": lambda weighted, pruned: learned(weighted, new=2),
    "prune": lambda weighted, pruned: pruned,
    "to_linear of one group": lambda weighted, pruned: dense_layers(pruned, several=False),
    "to_linear of all": lambda weighted, pruned: dense_layers(pruned),
    "dequantize": lambda weighted, pruned: pruned.dequantize(),
    "new head": lambda weighted, pruned: new_head(pruned),
    "new head of a tied model": lambda weighted, pruned: new_head(tiny(tied=True)),
    "new head of a cut, tied model": lambda weighted, pruned: new_head(bs.decompose(tiny(tied=True), metric="plain")),
    "head tied by hand": lambda weighted, pruned: tied_by_hand(tiny()),
    "head tied by hand, cut": lambda weighted, pruned: bs.decompose(tied_by_hand(tiny()), metric="plain"),
    "embedding": lambda weighted, pruned: embedded(tiny(tied=True)),
    "embedding of a model not tied": lambda weighted, pruned: embedded(new_head(tiny(tied=True))),
    "int8": lambda weighted, pruned: bs.export.__globals__["to_int8"](pruned),
    "copy": lambda weighted, pruned: copy.deepcopy(pruned),
}


@pytest.mark.parametrize("way", sampled(WAYS, 4))
def test_what_is_saved_loads_as_it_was(way, weighted, pruned, tmp_path):
    model = WAYS[way](copy.deepcopy(weighted), copy.deepcopy(pruned)).eval()
    before = logits(model, IDS)
    bs.save(model, make_tokenizer(), tmp_path / "ours")
    assert torch.equal(logits(bs.load(tmp_path / "ours")[0], IDS), before)
    if "tied" not in way and way != "int8":  # a stock model that was changed by hand is not described by anybody
        model.save_pretrained(tmp_path / "theirs")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"), IDS), before)


def test_a_description_that_is_stale_is_not_saved(weighted, pruned, tmp_path):
    model = copy.deepcopy(pruned)
    model.config.quantization_config = description(weighted)
    model.save_pretrained(tmp_path / "a")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "a"), IDS), logits(pruned, IDS))
    stock = tiny()
    stock.config.quantization_config = description(weighted)
    bs.save(stock, make_tokenizer(), tmp_path / "b")
    assert torch.equal(logits(bs.load(tmp_path / "b")[0], IDS), logits(stock, IDS))


@pytest.mark.parametrize("wrap", ["compile", "compile in place", "DataParallel", "DDP"])
def test_wrapped_models_are_saved_without_their_wrapper(wrap, pruned, tmp_path):
    model = copy.deepcopy(pruned)
    if wrap == "DDP":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = {
            "compile": lambda m: torch.compile(m, backend="eager"),
            "compile in place": lambda m: m.compile(backend="eager") or m,
            "DataParallel": nn.DataParallel,
            "DDP": lambda m: DistributedDataParallel(m.requires_grad_(True)),
        }[wrap](model)
        bs.save(wrapped, make_tokenizer(), tmp_path / "a")
    finally:
        if wrap == "DDP":
            dist.destroy_process_group()
    assert torch.equal(logits(bs.load(tmp_path / "a")[0], IDS), logits(pruned, IDS))


def shorter_head(model):
    model.lm_head = nn.Linear(64, 90, bias=False)
    return model


def without_leader(model):
    group = next(group for group in groups(model) if len(group.names) > 1)
    model.set_submodule(group.name, group.leader.to_linear())
    return model


def half_folded(model):

    groups(model)[0].fold(model)
    return model


def compiled_layer(model):
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    return model


def more_layers(model):
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    return model


LORA = LoraConfig(r=2, target_modules=r".*\.(u|v)")
REFUSED = {
    "PEFT": (lambda m: get_peft_model(m, LORA), r"PeftModel is not a model of transformers.*merge_and_unload"),
    "adapters inside": (lambda m: inject_adapter_in_model(LORA, m), "merge the adapters first"),
    "a shorter head": (shorter_head, r"lm_head.weight is \[90, 64\] in this LlamaForCausalLM and absent|lm_head"),
    "a leader gone": (without_leader, r"\.v\.weight is absent in this LlamaForCausalLM and \["),
    "a compiled layer": (compiled_layer, "compile the whole model, or its layers in place"),
    "a layer too many": (more_layers, r"layers\.2\..* LlamaForCausalLM lacks"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_could_not_be_loaded_is_not_saved(what, pruned, tmp_path):
    change, sentence = REFUSED[what]
    with pytest.raises(ValueError, match=sentence):
        bs.save(change(copy.deepcopy(pruned)), make_tokenizer(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_layers_weighted_and_folded_are_not_saved_together(weighted, tmp_path):
    with pytest.raises(ValueError, match="differs from the other layers of bases in whether they are weighted"):
        half_folded(copy.deepcopy(weighted)).save_pretrained(tmp_path / "a")


@pytest.mark.parametrize("state", sampled(["weighted", "pruned"], 2))
def test_checkpoints_of_a_users_trainer_load(state, weighted, pruned, tmp_path):
    model = copy.deepcopy({"weighted": weighted, "pruned": pruned}[state]).requires_grad_(True)
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}]
    arguments = TrainingArguments(tmp_path, max_steps=1, save_steps=1, report_to="none", use_cpu=True)
    Trainer(model, arguments, train_dataset=rows).train()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert torch.equal(logits(again, IDS), logits(model.eval(), IDS))


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("head", sampled(["other", "equal", "none"], 3))
def test_tensors_decide_what_is_tied(says, head, tmp_path):
    """config.json says tied or not; the file holds another head, one that equals the embedding, or none."""
    if head == "none" and not says:
        pytest.skip("such a folder does not fit its config.json")
    model = tiny(tied=head == "none")
    if head == "equal":
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    source = tmp_path / "source"
    bs.save(model, make_tokenizer(), source)
    (source / "basis_select.json").unlink()
    config = (source / "config.json").read_text()
    written = f'"tie_word_embeddings": {str(head == "none").lower()}'
    assert written in config
    (source / "config.json").write_text(config.replace(written, f'"tie_word_embeddings": {str(says).lower()}'))
    before, loaded = logits(model, IDS), bs.load(source)[0]
    assert torch.equal(logits(loaded, IDS), before)
    bs.export(loaded, "dense", tmp_path / "dense", make_tokenizer())
    assert torch.equal(logits(bs.load(tmp_path / "dense")[0], IDS), before)
    bs.decompose_checkpoint(source, tmp_path / "streamed", metric="plain")
    assert torch.allclose(logits(bs.load(tmp_path / "streamed")[0], IDS), before, atol=1e-5)
    cut = embedded(copy.deepcopy(loaded))
    bs.save(cut, make_tokenizer(), tmp_path / "embedded")
    assert torch.equal(logits(bs.load(tmp_path / "embedded")[0], IDS), logits(cut, IDS))
    bs.export(cut, "dense", tmp_path / "again", make_tokenizer())
    assert torch.allclose(logits(bs.load(tmp_path / "again")[0], IDS), logits(cut, IDS), atol=1e-5)


class ByHand(nn.Linear):
    def forward(self, hidden):
        product = hidden @ self.weight.T
        return product if self.bias is None else product + self.bias


class Named(nn.Linear):
    def forward(self, inputs):
        return nn.functional.linear(input=inputs, weight=self.weight, bias=self.bias)


class Same(nn.Linear):
    pass


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class WithoutBias(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-100, 100))


class Rounded(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.sign(), self.bias)


class Dropped(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Residual(nn.Linear):
    def forward(self, x, residual):
        return super().forward(x) + residual


class Tuple(nn.Linear):
    def forward(self, x):
        return super().forward(x), self.bias


class Normed(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return super().forward(self.norm(x))


class Transposed(nn.Linear):
    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


PLAIN = [nn.Linear, ByHand, Named, Same, Transposed]
OTHERS = [Scaled, WithoutBias, Clipped, Rounded, Dropped, Residual, Tuple, Normed]


@pytest.mark.parametrize("kind", [*PLAIN, *OTHERS])
def test_a_subclass_is_plain_if_it_computes_the_product(kind):
    layer = kind(8, 8)
    before = copy.deepcopy(layer.state_dict())
    assert is_plain(layer) == (kind in PLAIN)
    assert is_plain(layer.to("meta")) == (kind in PLAIN)
    assert before.keys() == layer.state_dict().keys()


def test_layers_whose_weight_the_model_reads_stay_dense(caplog):
    model = tiny()
    model.lm_head.register_forward_pre_hook(lambda m, args: None)
    inner = type(model.model.norm).forward
    head = model.lm_head

    class Reads(type(model.model.norm)):
        def forward(self, x):
            return inner(self, x).to(model.lm_head.weight.dtype)

    model.model.norm.__class__ = Reads
    bs.decompose(model, metric="plain")
    assert model.lm_head is head
    assert "left dense, because the model reads their weights directly: lm_head" in caplog.text
    assert isinstance(model.model.layers[0].mlp.down_proj, LowRankLinear)


def test_a_model_that_needs_more_than_token_ids_is_refused_at_once():
    model = tiny()
    forward = model.forward
    model.forward = lambda input_ids: forward(input_ids=input_ids, position_ids=torch.zeros(1, 3).long())
    with pytest.raises(ValueError, match="LlamaForCausalLM does not run on token ids alone"):
        bs.decompose(model, metric="plain")
    assert len(targets(model)) == 15


def test_resizing_the_vocabulary_of_bases_says_what_to_do(pruned, weighted):
    model = bs.prune(copy.deepcopy(weighted), keep=0.3, budget="uniform", multiple_of=1)
    with pytest.raises(AttributeError, match="has no weight: change the model before it is decomposed"):
        model.resize_token_embeddings(136, mean_resizing=False)


def test_the_suffix_of_a_gguf_file_may_be_in_capitals(tmp_path):
    (tmp_path / "M.GGUF").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"M\.GGUF does not start with the GGUF magic"):
        bs.load(tmp_path / "M.GGUF")


def test_experts_in_float32_are_streamed(tmp_path):
    model = tiny("mixtral", num_local_experts=4)
    bs.save(model, make_tokenizer(), tmp_path / "a")
    bs.decompose_checkpoint(tmp_path / "a", tmp_path / "b", metric="plain")
    assert torch.allclose(logits(bs.load(tmp_path / "b")[0], IDS), logits(model, IDS), atol=1e-4)


@pytest.mark.parametrize("kind", sampled(["mamba", "falcon", "gpt2", "gpt_bigcode", "modernbert-decoder", "gemma3"], 2))
def test_architectures(kind):
    row = architectures.examine(kind)
    said = [row[step] for step in architectures.STEPS]
    assert said == ["yes"] * 4 if kind != "gpt2" else "nothing to decompose in GPT2LMHeadModel" in said[0]


def test_a_vision_language_model_is_tuned():
    model = architectures.tiny("gemma3")
    config = model.config.to_dict()
    bs.tune(model, architectures.make_task(), steps=1, lr=1e-3, batch_size=2)
    assert model.config.to_dict() == config


def every_module():
    names = [found.name for found in pkgutil.walk_packages(bs.__path__, "basis_select.")]
    apart = {"basis_select.__main__", "basis_select.serving.vllm"}  # the second is for vLLM's own processes
    return {name: importlib.import_module(name) for name in names if name not in apart}


def test_everything_is_imported_where_python_has_only_what_windows_has(monkeypatch):
    """Other packages are loaded before: they choose by themselves what they use there."""
    before = every_module() | {"basis_select": bs}
    for name in ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios"):
        monkeypatch.setitem(sys.modules, name, None)
    windows = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN"}
    lacking = {signal: {n for n in dir(signal) if n.startswith("SIG") and n.isupper()} - windows}
    lacking |= {os: {n for n in dir(os) if re.match("sched_|fork|getuid|geteuid|getgid|O_NONBLOCK|mkfifo|sysconf", n)}}
    for module, names in lacking.items():
        assert names
        for name in names:
            monkeypatch.delattr(module, name)
    for registry in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):  # a name is registered there once
        monkeypatch.setattr(quantizers, registry, {})
    for name in before:
        monkeypatch.delitem(sys.modules, name)
    again = importlib.import_module("basis_select")
    assert again is not bs
    for name in before:
        assert importlib.import_module(name) is not before[name]
