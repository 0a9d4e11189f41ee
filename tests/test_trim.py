"""A trimmed tokenizer encodes training text to the same pieces and any other text exactly; the model says the same."""

import io
import json

import pytest
import torch
from conftest import logits, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast
from vocabularies import SPECIAL, TEXT, WORDS, byte_level, wrapped

from basis_select import decompose, load, load_task, prune, save, sizes
from basis_select.data.tasks import counted_as
from basis_select.run.disk import OnDisk
from basis_select.run.plan import plan
from basis_select.run.recipe import Recipe, override
from basis_select.run.room import check_budget, in_tokens
from basis_select.trim import BYTES, trim


def ignoring_merges():
    """As Llama 3: a word that is a token is taken whole, whether merges lead there or not."""
    content = json.loads(byte_level().to_str())
    content["model"]["ignore_merges"] = True
    content["model"]["vocab"]["Ġunreachable"] = len(content["model"]["vocab"])
    return Tokenizer.from_str(json.dumps(content))


def sentencepiece(trainer, model, fallback):
    """Bytes stand for what the vocabulary lacks, if `fallback`."""
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    made.train_from_iterator(TEXT, trainer)
    if not fallback:
        return made
    content = json.loads(made.to_str())
    content["model"]["byte_fallback"] = True
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(sorted(BYTES))}
    else:
        vocabulary += [[token, -20.0] for token in sorted(BYTES)]
    return Tokenizer.from_str(json.dumps(content))


def bpe(fallback):
    return sentencepiece(
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL), models.BPE(unk_token="<unk>"), fallback
    )


def unigram(fallback):
    trainer = trainers.UnigramTrainer(vocab_size=250, special_tokens=SPECIAL, unk_token="<unk>")
    return sentencepiece(trainer, models.Unigram(), fallback)


KINDS = {
    "byte level": byte_level,
    "ignoring merges": ignoring_merges,
    "BPE with bytes": lambda: bpe(True),
    "BPE with characters": lambda: bpe(False),
    "Unigram with bytes": lambda: unigram(True),
    "Unigram with characters": lambda: unigram(False),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Training text of a third of the words, and test text of all."""
    folder = tmp_path_factory.mktemp("rows")
    for split, lines in (("train", TEXT[0::3][:40]), ("validation", TEXT[1:9]), ("test", TEXT[9:40])):
        made = [{"prompt": line[:-9], "response": line[-9:]} for line in lines if split != "train" or "2" not in line]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(folder)


@pytest.fixture(scope="module", params=KINDS)
def trimmed(request, rows):
    """`(old tokenizer, new one, old task, new task, report)`"""
    tokenizer = wrapped(KINDS[request.param]())
    task = load_task(rows, tokenizer)
    _, smaller, report = trim(tiny(vocab_size=len(tokenizer)), tokenizer, task)
    return tokenizer, smaller, task, load_task(rows, smaller), report


def test_training_text_keeps_its_pieces(trimmed):
    old, new, before, after, report = trimmed
    assert report["tokens"] == len(new) < report["tokens_before"]
    for a, b in zip(before.train, after.train, strict=True):
        assert old.convert_ids_to_tokens(a.input_ids) == new.convert_ids_to_tokens(b.input_ids)


def test_other_text_is_spelled_and_counted(trimmed):
    old, new, before, after, report = trimmed
    known = set(new.get_vocab())
    for split in ("validation", "test"):
        tokens = [t for e in getattr(before, split) for t in old.convert_ids_to_tokens(e.input_ids)]
        assert report[f"spelled_{split}"] == pytest.approx(sum(t not in known for t in tokens) / len(tokens))
    assert sum(len(e.input_ids) for e in after.test) > sum(len(e.input_ids) for e in before.test)


def test_a_cut_response_is_not_counted_as_what_it_was(trimmed, rows):
    old, new, before, after, _ = trimmed
    counted = counted_as(after, before)
    for a, b in zip(before.test, counted.test, strict=True):
        assert len(b.input_ids) - b.start - b.spelled == len(a.input_ids) - a.start
    longest = max(len(e.input_ids) for e in before.test)
    with pytest.raises(ValueError, match="split does not fit into max_length: raise it"):
        counted_as(load_task(rows, new, max_length=longest), load_task(rows, old, max_length=longest))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text() | st.lists(st.sampled_from([*WORDS, "\u4e2d", "\u00e9", " ", "  ", "\n", "7"])).map("".join))
def test_any_text_decodes_as_before(trimmed, text):
    old, new = trimmed[:2]
    assert new.decode(new.encode(text)) == old.decode(old.encode(text))


def test_special_tokens_stay_in_every_place(trimmed, tmp_path):
    new = trimmed[1]
    new.save_pretrained(tmp_path)
    for tokenizer in (new, AutoTokenizer.from_pretrained(tmp_path)):
        assert [tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token] == SPECIAL
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode("fat"))[0] == "<s>"
        text = tokenizer.apply_chat_template([{"role": "user", "content": "fat"}], tokenize=False)
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))[0] == "<s>"
        assert tokenizer.get_vocab() == new.get_vocab()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {}), ("llama", {"tied": True}), ("gemma3_text", {"tied": True}), ("phi", {}), ("qwen3_moe", {})],
    ids=["untied", "tied", "scaled", "head with a bias", "experts"],
)
def test_a_trimmed_model_says_the_same(kind, options, rows, tmp_path):
    tokenizer = wrapped(byte_level())
    end, more = tokenizer.eos_token_id, 7  # rows that pad the table
    model = tiny(kind, vocab_size=len(tokenizer) + more, eos_token_id=[end, 1], pad_token_id=end, **options)
    task = load_task(rows, tokenizer)
    before = logits(model, torch.tensor([task.train[0].input_ids]))
    small, smaller, report = trim(model, tokenizer, task)
    assert small is model
    after = load_task(rows, smaller)
    kept = [tokenizer.get_vocab()[token] for token, _ in sorted(smaller.get_vocab().items(), key=lambda item: item[1])]
    found = logits(small, torch.tensor([after.train[0].input_ids]))
    torch.testing.assert_close(found, before[..., kept], rtol=0, atol=1e-6)
    assert small.config.vocab_size == len(smaller) == report["tokens"]
    assert small.config.eos_token_id == [kept.index(end), kept.index(1)]
    assert small.config.pad_token_id == smaller.eos_token_id
    save(small, smaller, tmp_path / "dense")
    assert torch.equal(logits(load(tmp_path / "dense")[0], torch.tensor([after.train[0].input_ids])), found)


def test_a_trimmed_model_is_decomposed_and_saved(rows, tmp_path):
    tokenizer = wrapped(byte_level())
    model, smaller, _ = trim(tiny(vocab_size=len(tokenizer), tied=True), tokenizer, load_task(rows, tokenizer))
    task = load_task(rows, smaller)
    prune(decompose(model, task, examples=8, embedding=True), task, size="1.5x", multiple_of=1)
    save(model, smaller, tmp_path / "small")
    ids = torch.tensor([task.test[0].input_ids])
    assert torch.equal(logits(load(tmp_path / "small")[0], ids), logits(model, ids))


def test_the_most_frequent_tokens_of_a_text_stay_too(rows, tmp_path):
    tokenizer = wrapped(byte_level())
    (tmp_path / "text.txt").write_text("\n".join(TEXT), encoding="utf-8")
    sizes, spelled = [], []
    for frequent in (10, 100, 1000):
        model, task = tiny(vocab_size=len(tokenizer)), load_task(rows, tokenizer)
        report = trim(model, tokenizer, task, text=str(tmp_path / "text.txt"), frequent=frequent)[2]
        sizes.append(report["tokens"])
        spelled.append(report["spelled_test"])
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    assert spelled[0] > spelled[-1] == 0


def test_a_token_that_the_table_has_no_row_for_goes(rows, tmp_path):
    """Gemma 3 has one."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), eos_token="</s>", extra_special_tokens={"image_token": "<image>"}
    )
    model = tiny("gemma3_text", vocab_size=len(tokenizer) - 1, tied=True)
    model.config.image_token_id = len(tokenizer) - 1
    smaller, report = trim(model, tokenizer, load_task(rows, tokenizer))[1:]
    assert model.get_input_embeddings().num_embeddings == report["tokens"]
    assert model.config.image_token_id == report["tokens"]
    save(model, smaller, tmp_path / "small")
    assert load(tmp_path / "small")[1].decode([report["tokens"] - 1])


def test_rows_that_configs_name_stay_though_no_token_has_them(rows, tmp_path):
    tokenizer = wrapped(byte_level())
    size = len(tokenizer)
    model = tiny(vocab_size=size + 24, pad_token_id=size + 4)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, size + 7]
    padding = model.get_input_embeddings().weight[size + 4].clone()
    model, smaller, report = trim(model, tokenizer, load_task(rows, tokenizer))
    assert report["tokens"] == len(smaller) + 2
    assert torch.equal(model.get_input_embeddings().weight[model.config.pad_token_id], padding)
    assert model.generation_config.eos_token_id == [smaller.eos_token_id, report["tokens"] - 1]
    save(model, smaller, tmp_path / "small")
    assert load(tmp_path / "small")[0].config.pad_token_id == model.config.pad_token_id


def test_several_chat_templates_stay(rows):
    tokenizer = wrapped(byte_level())
    templates = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    tokenizer.chat_template = templates
    assert trim(tiny(vocab_size=len(tokenizer)), tokenizer, load_task(rows, tokenizer))[1].chat_template == templates


def test_a_decoder_still_finds_the_sign_of_a_space_that_no_token_has(rows):
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    names = [*SPECIAL, *sorted(BYTES)]
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=600, special_tokens=names))
    tokenizer = wrapped(made)
    smaller = trim(tiny(vocab_size=len(tokenizer)), tokenizer, load_task(rows, tokenizer))[1]
    for text in ("b c d", "  kat 7"):
        assert smaller.decode(smaller.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_added_tokens_stay_where_no_others_can_spell_them(rows):
    tokenizer = wrapped(unigram(fallback=False))
    tokenizer.add_tokens(["{", "\n"])
    smaller = trim(tiny(vocab_size=len(tokenizer)), tokenizer, load_task(rows, tokenizer))[1]
    text = "bat {mee}\nkart"
    assert smaller.decode(smaller.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_tokens_around_a_text_stay(rows):
    made = byte_level()
    token = f"\u0120{WORDS[0]}"
    around = [("<s>", 1), (token, made.token_to_id(token))]
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair=f"<s> $A {token} $B", special_tokens=around
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    smaller = trim(tiny(vocab_size=len(tokenizer)), tokenizer, load_task(rows, tokenizer))[1]
    assert smaller.convert_ids_to_tokens(smaller("a", "b")["input_ids"])[2] == token


def test_what_names_tokens_beside_numbers_is_refused(rows):
    tokenizer = wrapped(byte_level())
    for key, value in {"sequence_bias": [[[270], -50.0]], "forced_decoder_ids": [[1, 270]]}.items():
        model = tiny(vocab_size=len(tokenizer))
        setattr(model.generation_config, key, value)
        with pytest.raises(
            ValueError, match=f"{key} of GenerationConfig is .*270.*, whose tokens trim cannot renumber"
        ):
            trim(model, tokenizer, load_task(rows, tokenizer))


def test_what_cannot_be_trimmed_is_refused(rows, tokenizer, task, tmp_path):
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words = wrapped(words)
    with pytest.raises(ValueError, match="WordLevel tokenizer cannot be trimmed"):
        trim(tiny(vocab_size=len(words)), words, load_task(rows, words))
    with pytest.raises(ValueError, match="trim before decompose"):
        trim(decompose(tiny(), task, examples=8, embedding=True), tokenizer, task)
    with pytest.raises(ValueError, match="go together"):
        trim(tiny(), tokenizer, task, frequent=5)
    with pytest.raises(ValueError, match=r"a ByT5Tokenizer cannot be trimmed: it has no tokenizer.json"):
        trim(tiny(vocab_size=400), ByT5Tokenizer(), task)
    (tmp_path / "text.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"text.txt is not UTF-8 text"):
        trim(tiny(), tokenizer, task, text=str(tmp_path / "text.txt"), frequent=5)


@pytest.mark.slow
def test_a_recipe_trims_after_tuning_and_counts_tokens_as_its_parent_does(rows, tmp_path):
    tokenizer = wrapped(byte_level())
    save(tiny(vocab_size=len(tokenizer), tied=True), tokenizer, tmp_path / "model")
    plain = Recipe(model=str(tmp_path / "model"), task=rows)
    changes = {"data.test": 12, "tune.steps": 2, "heal.steps": 2, "decompose.examples": 8, "prune.keep": None}
    changes |= {"tune.batch_size": 4, "heal.batch_size": 4, "prune.size": "2x", "prune.multiple_of": 2}
    row = override(plain, {**changes, "trim.tokens": "task"}, "test")
    (tmp_path / "run" / "stages").mkdir(parents=True)
    disk = OnDisk(row, tmp_path / "run")
    check_budget(row, disk.row(until="load")["parent"] / "model", in_tokens(row, tokenizer))
    dense, small = disk.row(dense=True), disk.row()
    parent, model = (load(state["final"] / "model")[0] for state in (dense, small))
    assert model.config.trimmed["tokens_before"] == len(tokenizer) == parent.config.vocab_size
    assert model.config.vocab_size == model.config.trimmed["tokens"] < parent.config.vocab_size
    assert sizes(model)["parameters_dense"] == sizes(parent)["parameters_dense"]
    assert sizes(model)["parameters"] <= sizes(parent)["parameters"] / 2  # of what the parent had before
    items = [json.loads((s["evaluation"] / "evaluation.json").read_text())["items"] for s in (dense, small)]
    counted = [[(item["prompt"], item["tokens"]) for item in found] for found in items]
    assert counted[0] == counted[1]
    spelled = [e.spelled for e in disk.tokens(small["tokenizer"])[1].test]
    assert max(spelled) > 0  # some responses are longer in the tokens that are left
    wanted = plan(row, rates={"train": 1e9, "float64": 1e9}).rows["result"]
    assert wanted.parent.config.vocab_size == model.config.vocab_size
    assert wanted.published == pytest.approx(sizes(model)["parameters"], rel=0.1)


@pytest.mark.parametrize(("class_", "kind"), [("LlamaTokenizer", "llama"), ("GemmaTokenizer", "gemma3_text")])
def test_a_sentencepiece_model_is_trimmed_alike_and_never_stale(class_, kind, rows, tmp_path):
    pieces = pytest.importorskip("sentencepiece")
    made = io.BytesIO()
    pieces.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=made,
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        character_coverage=1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        add_dummy_prefix=class_ == "LlamaTokenizer",
        minloglevel=2,
    )
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/tokenizer.model").write_bytes(made.getvalue())
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), [*SPECIAL, "</s>"], strict=True))
    (tmp_path / "raw/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_, **names}))
    first = AutoTokenizer.from_pretrained(tmp_path / "raw")
    save(tiny(kind, vocab_size=len(first), tied=True), first, tmp_path / "parent")
    model, tokenizer = load(tmp_path / "parent")
    model, smaller, report = trim(model, tokenizer, load_task(rows, tokenizer))
    save(model, smaller, tmp_path / "small")
    _, again = load(tmp_path / "small")
    assert len(again) == report["tokens"] < len(tokenizer)
    for folder, ours in (("parent", tokenizer), ("small", again)):
        theirs = pieces.SentencePieceProcessor(model_file=str(tmp_path / folder / "tokenizer.model"))
        assert theirs.vocab_size() <= len(ours)
        for text in [*TEXT[:60], "naïve \U0001f600 7  \n{}", "moust,fat-ba"]:
            assert theirs.encode(text) == ours.encode(text, add_special_tokens=False)
        assert [theirs.unk_id(), theirs.bos_id(), theirs.eos_id()] == ours.convert_tokens_to_ids(SPECIAL)
    (tmp_path / "small/tokenizer.model").write_bytes(made.getvalue())  # as in a folder that somebody put together
    save(model, AutoTokenizer.from_pretrained(tmp_path / "small"), tmp_path / "last")
    assert not (tmp_path / "last/tokenizer.model").exists()
