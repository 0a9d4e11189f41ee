"""Layers that read one tensor: what they share, and what none of them leaves behind on the model."""

import contextlib
import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import logits, tiny

from basis_select import decompose
from basis_select.checkpoint.targets import targets
from basis_select.layers.group import groups
from basis_select.layers.learning import LearningLinear
from basis_select.layers.sharing import HALF_READ, _latents
from basis_select.statistics.readers import same_input


def test_layers_that_read_one_tensor_are_found_without_their_names(task):
    model = tiny("qwen2")
    short = [sorted(n.rpartition(".")[2] for n in g) for g in same_input(model, targets(model), task)]
    assert short[:4] == [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_sharing_stores_and_computes_v_once(task, ids):
    model = decompose(tiny(), task, examples=16)
    q, k = (model.get_submodule(f"model.layers.0.self_attn.{n}_proj") for n in "qk")
    assert k.leader is q
    assert not hasattr(k, "v")
    calls = []
    q.v.register_forward_hook(lambda *a: calls.append(1))
    logits(model, ids)
    assert len(calls) == 1
    assert not {*model.modules()} & _latents.held.keys()  # nothing is kept alive


def _scale_input(q, x):
    x.mul_(2)


def _step_of_an_optimizer(q, x):
    q.v.weight.add_(1)


def _other_weights(q, x):
    q.v.weight = torch.nn.Parameter(q.v.weight * 2, requires_grad=False)


def _other_scales(q, x):
    q.s.scale = q.s.scale * 2


CHANGES = [_scale_input, _step_of_an_optimizer, _other_weights, _other_scales]


MODES = [contextlib.nullcontext, torch.no_grad, torch.inference_mode]


def pair():
    """Two layers that share `v` and `s`, their weights frozen."""
    torch.manual_seed(0)
    q = LearningLinear(16, 16, 4, False)
    k = LearningLinear(16, 16, 4, False, leader=q)
    return q.requires_grad_(False), k.requires_grad_(False)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("changed_in", MODES[1:])
@pytest.mark.parametrize("read_in", MODES)
def test_a_shared_latent_is_of_the_input_and_weights_that_there_are_now(read_in, changed_in, change):
    (q, k), x = pair(), torch.randn(3, 16)
    with read_in():
        own = x.clone()  # in inference mode a tensor without a version
        q(own)
    with changed_in() if read_in is not torch.inference_mode else read_in():
        change(q, own)
    with read_in():
        assert torch.equal(k(own), k.u(q.project(own)))


def test_a_shared_latent_is_never_one_of_another_call():
    (q, k), (x, y) = pair(), torch.randn(2, 3, 16)
    q(x)
    assert torch.equal(k(y), k.u(q.project(y)))
    q(x)
    x.data.mul_(2)  # which torch does not count
    assert torch.equal(q(x), q.u(q.project(x)))  # what it has read already it computes anew


def test_a_shared_latent_has_the_graph_and_the_precision_of_its_reader():
    (q, k), x = pair(), torch.randn(3, 16)
    with torch.inference_mode():
        q(x)
    assert not k(x).is_inference()
    q(x)
    q.v.weight.requires_grad_(True)
    assert k(x).requires_grad
    q(x)
    assert torch.autograd.grad(k(x).sum(), q.v.weight)[0].abs().max() > 0
    for first, second in ((True, False), (False, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=first):
            q(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=second):
            assert torch.equal(k(x), k.u(q.project(x)))


@pytest.mark.parametrize("same_tensor", [False, True])
def test_threads_share_a_model_and_no_latents(same_tensor):
    """As in a server. They switch as often as Python lets them, so that layers of one interleave with another's."""
    (q, k), inputs = pair(), list(torch.randn(8, 3, 16))
    inputs = inputs[:1] * 8 if same_tensor else inputs
    with torch.no_grad():
        expected = [(layer.u(q.project(x)),) for x in inputs for layer in (q, k)]
    wrong, start = [], threading.Barrier(8)

    def work(i):
        start.wait()
        with torch.no_grad():
            for _ in range(200):
                for layer, (y,) in zip((q, k), expected[2 * i : 2 * i + 2], strict=True):
                    if not torch.equal(layer(inputs[i]), y):
                        wrong.append(i)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_a_thread_keeps_few_latents_that_were_not_read_by_all():
    x = torch.randn(3, 16)
    for _ in range(HALF_READ + 2):
        pair()[0](x)
    assert len(_latents.held) == HALF_READ
    _latents.held.clear()


@pytest.mark.slow
def test_layers_compiled_one_by_one_share_nothing():
    (q, k), x = pair(), torch.randn(3, 16)
    with torch.no_grad():
        first, second = (torch.compile(layer, backend="eager") for layer in (q, k))
        for _ in range(2):
            first(x)
            x.mul_(2)
            assert torch.equal(second(x), k.u(q.project(x)))


def test_a_half_used_latent_survives_deepcopy_and_gradient_checkpointing(task, ids):
    model = decompose(tiny(), task, examples=16)
    leader = groups(model)[0].leader
    leader.s.learned.requires_grad_(True)
    leader(torch.randn(2, 64))
    other = copy.deepcopy(model)
    assert groups(other)[0].layers[1].leader is groups(other)[0].layers[0]
    for m in (model, other):
        m.train()
    other.gradient_checkpointing_enable({"use_reentrant": False})
    grads = []
    for m in (model, other):
        m(ids, labels=ids).loss.backward()
        grads.append(groups(m)[0].leader.s.learned.grad)
    assert torch.allclose(*grads, atol=1e-7)
