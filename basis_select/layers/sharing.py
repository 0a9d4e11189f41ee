"""Which layers read the same tensor, and their product, computed once: what one of them leaves for the next.

That belongs to the thread that computes, never to the model.
"""

import threading
import weakref
from collections.abc import Callable, Iterable

import torch

HALF_READ = 8  # groups of which a thread keeps a latent that some of their layers have not read


def latent(reader: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`v x`, or `(v x) * s`: (..., r), computed once when several layers read the same `x` one after the other."""
    leader = reader.leader
    if leader.readers == 1:
        return leader.project(x)
    if torch.compiler.is_compiling():
        # A compiler that traces training merges equal products itself.
        return leader.project(x) if torch.is_grad_enabled() else _once_in_graph(leader, x)
    return _latents.of(leader, reader, x)


class _Latents(threading.local):
    """What layers of this thread's forward have yet to read: `{leader: (x, sources, state, z, who has read it)}`."""

    def __init__(self):
        self.held = {}

    def of(self, leader: torch.nn.Module, reader: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        held = self.held.get(leader)
        if held is not None:
            y, sources, state, z, read = held
            # None reads it twice: a second reading is another call.
            if y() is x and reader not in read and state == _state(x, leader.sources()):
                read.append(reader)
                if len(read) == leader.readers:  # do not keep activations or their graph alive
                    del self.held[leader]
                return z
            del self.held[leader]
        z = leader.project(x)
        # After the product: where weights are offloaded, the next reader finds what stands for them then.
        sources = leader.sources()
        state = _state(x, sources)
        if state is not None:
            self.held[leader] = weakref.ref(x), sources, state, z, [reader]
            if len(self.held) > HALF_READ:
                del self.held[next(iter(self.held))]
        return z


_latents = _Latents()


def _state(x: torch.Tensor, sources: tuple[torch.Tensor, ...]) -> list | None:
    """Which tensors the product is of and all else that it depends on.

    None if one of them was made in inference mode: torch does not count how often those are overwritten.
    """
    device, grad = x.device.type, torch.is_grad_enabled()
    mixed = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    try:
        state = [x._version, grad and x.requires_grad, grad, torch.is_inference_mode_enabled(), mixed]
        for source in sources:
            state += id(source), source._version, grad and source.requires_grad
    except RuntimeError:
        return None
    return state


@torch.compiler.assume_constant_result
def _graph() -> str:
    """Which graph a compiler is tracing, None for one that runs Python as it is."""
    return str(torch._guards.CompileContext.current_compile_id())


def _once_in_graph(leader: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`latent` for a compiler that traces inference, which follows no weak references.

    What is left for the next reader is an attribute of `x` until the last has been traced. Where a graph ends in
    between, that remains on a real tensor, whose values may change before the next graph runs: that one ignores it.
    """
    held, graph = getattr(x, "_latent", None), _graph()
    if held is None or held[0] is not leader or held[1] != graph:
        held = leader, graph, leader.project(x), leader.readers
    _, _, z, left = held
    x._latent = (leader, graph, z, left - 1) if left > 1 else None
    return z


@torch.no_grad()
def read_together(
    model: torch.nn.Module, layers: dict[str, torch.nn.Module], inputs: Iterable[torch.Tensor]
) -> list[list[str]]:
    """Names of layers that read the very same tensors, found by watching a forward: `[[q, k, v], [o], ...]`.

    One of the first of `inputs`, token ids (1, L); of some more if there are layers that it does not call, such as
    experts. One that is called in none stands alone. One that is called several times reads a list of tensors.
    """
    reads = {}

    def watch(name: str, held: dict[int, tuple]) -> Callable:
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            x = layer_input(args, kwargs)
            # Held, so that no second tensor can get its id; what was overwritten in between is another input.
            number, _ = held.setdefault(id(x), (len(held), x))
            version = None if x.is_inference() else x._version
            reads.setdefault(name, []).append((number, version, module.in_features))

        return hook

    for i, ids in enumerate(inputs):
        held = {}
        handles = [m.register_forward_pre_hook(watch(name, held), with_kwargs=True) for name, m in layers.items()]
        try:
            model(input_ids=ids)
        finally:
            for handle in handles:
                handle.remove()
        for read in reads.values():
            read.append(i)  # tensors of another forward get the same numbers
        if len(reads) == len(layers):
            break
    found = {}
    for name in layers:
        found.setdefault(tuple(reads.get(name, [name])), []).append(name)
    return list(found.values())


def layer_input(args: tuple, kwargs: dict) -> torch.Tensor:
    """The tensor that an nn.Linear is called with."""
    return args[0] if args else kwargs["input"]
