import json
import math

import pytest
import torch
from conftest import make_tokenizer, tiny
from tokenizers import processors

import basis_select as bs
from basis_select.data.tasks import load_task
from basis_select.evaluation.accuracy import compare
from basis_select.evaluation.report import table
from basis_select.evaluation.speed import decode_speed
from basis_select.training.loss import response_logits, task_loss


@pytest.fixture
def digits(tokenizer, tmp_path):
    rows = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(12) for b in range(12)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_task(str(tmp_path / "d.jsonl"), tokenizer, test=30, validation=10)


def test_likelihood_and_generation_agree_with_the_model(digits, tokenizer):
    model = tiny(tied=True)
    bs.tune(model, digits, steps=40, batch_size=16, lr=3e-3)
    result = bs.evaluate(model, tokenizer, digits)
    nll, tokens = 0.0, 0
    for example, item in zip(digits.test, result["items"], strict=True):
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            log_p = model(ids).logits.log_softmax(-1)[0]
        expected = -sum(log_p[t - 1, example.input_ids[t]].item() for t in range(example.start, ids.shape[1] - 1))
        assert item["nll"] == pytest.approx(expected, abs=1e-4)
        nll, tokens = nll + expected, tokens + ids.shape[1] - 1 - example.start
        out = model.generate(ids[:, : example.start], max_new_tokens=18, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(out[0, example.start :], skip_special_tokens=True)
        assert item["correct"] == (text.strip() == example.answer)
    assert result["nll"]["value"] == pytest.approx(nll / tokens, abs=1e-4)


def test_a_broken_model_is_an_error_not_a_number(digits, tokenizer):
    model = tiny(tied=True)
    model.model.norm.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="the model is broken"):
        bs.evaluate(model, tokenizer, digits)


def test_pairs_are_counted_and_other_items_refused():
    def result(correct):
        return {"items": [{"prompt": str(i), "correct": c} for i, c in enumerate(correct)]}

    found = compare(result([1, 1, 1, 0, 0]), result([1, 0, 0, 0, 1]))
    assert (found["both"], found["lost"], found["gained"], found["neither"]) == (1, 2, 1, 1)
    assert found["p"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="different items"):
        compare(result([1]), result([1, 0]))


def test_loss_sees_response_tokens_only_and_no_other_logits(task):
    from basis_select.training.data import Batches

    for kind in ("llama", "gemma3_text"):
        model = tiny(kind, tied=True)
        batch = Batches(task.train, 4, 1, 0)[0]
        with torch.no_grad():
            full = model(batch["input_ids"]).logits.flatten(0, 1)[batch["positions"]]
            assert torch.allclose(response_logits(model, batch), full, atol=1e-5)
            real = batch["targets"] >= 0
            expected = torch.nn.functional.cross_entropy(full[real], batch["targets"][real]).item()
            loss, ce, kl = task_loss(model, batch, model)
        assert ce.item() == pytest.approx(expected, rel=0.02)  # bf16 matmuls where the machine has them
        assert kl.item() == pytest.approx(0, abs=1e-6)
        assert math.isclose(loss.item(), ce.item(), abs_tol=1e-6)


def test_speed_and_table_need_only_models():
    speed = decode_speed({"a": tiny(), "b": tiny()}, tokens=2, rounds=2)
    assert speed["a"]["low"] <= speed["a"]["median"] <= speed["a"]["high"]
    sizes = {"bases": 1, "targeted": 1, "targeted_dense": 4, "parameters": 2, "parameters_dense": 4, "bytes": 8}
    row = {"accuracy": None, "nll": {"value": 1, "low": 0, "high": 2}, "n": 3, "sizes": sizes, "paired": None,
           "decode_tokens_per_second": speed["a"], "stages": [{"peak_memory_bytes": 2**30}]}  # fmt: skip
    assert "4.00x fewer" in table({"x": row})


def chat_tokenizer(end):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return tokenizer


def own_end(tokenizer):
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def turn(i):
    return {"messages": [{"role": "user", "content": f"{i}+{i}"}, {"role": "assistant", "content": f"{2 * i}"}]}


@pytest.mark.parametrize(
    ("tokenizer", "row"),
    [
        (make_tokenizer(), lambda i: {"prompt": f"{i}+{i}= ", "response": f"{2 * i}"}),
        (own_end(make_tokenizer()), lambda i: {"prompt": f"{i}+{i}=", "response": f"{2 * i}"}),
        (chat_tokenizer("~\n"), turn),
        (chat_tokenizer("</s>\n"), turn),
        (own_end(chat_tokenizer("!?")), turn),
    ],
)
def test_generation_is_given_what_training_saw_and_ends_where_the_response_does(tokenizer, row, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(40)))
    task = load_task(str(tmp_path / "a.jsonl"), tokenizer, test=6, validation=4)
    examples = {e.input_ids[: e.start]: e for e in task.test}
    model = tiny()

    def generate(input_ids, attention_mask, stopping_criteria, max_new_tokens, eos_token_id, **kwargs):
        given = [tuple(ids[real.bool()].tolist()) for ids, real in zip(input_ids, attention_mask, strict=True)]
        said = [[*examples[g].input_ids[examples[g].start :], *b"more"] for g in given]  # the reference, and on
        length = max(map(len, said))
        out = torch.tensor([s + [0] * (length - len(s)) for s in said])
        if stopping_criteria:
            ids = torch.cat([input_ids, out[:, : length - 4]], 1)
            assert stopping_criteria[0](ids, None).any()
        assert 2 in eos_token_id
        return torch.cat([input_ids, out], 1)

    model.generate = generate
    result = bs.evaluate(model, tokenizer, task)
    assert result["accuracy"]["value"] == 1
    for item, e in zip(result["items"], task.test, strict=True):
        assert item["generated"].strip() == e.answer
        ids = torch.tensor([e.input_ids[:-1] if e.input_ids[-1] == 2 else e.input_ids])
        with torch.no_grad():
            log_p = model(ids).logits.log_softmax(-1)[0]
        expected = -sum(log_p[t - 1, ids[0, t]].item() for t in range(e.start, ids.shape[1]))
        assert (item["nll"], item["tokens"]) == (pytest.approx(expected, abs=1e-4), ids.shape[1] - e.start)
