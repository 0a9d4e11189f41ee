"""The one data structure: a linear layer written as a weighted sum of rank-one bases.

    y = u((v x) * s) + b        u: (out, r)   s: (r,)   v: (r, in)

`v` and `u` are plain nn.Linear children, so PEFT, torchao, FSDP and exporters need no special case.
While the weights are learned, `s = scale * weight^power`: with power 1 `scale` is the decomposed singular value
(frozen, it carries the metric) and `weight` starts at 1; with power 2 (Basel) `scale` is 1 and `weight` the root of the
singular value. `weight` is what trains; `new`, if there, is a second layer of new bases that train beside them.
`fold` merges all of it into the factors; a folded layer is `u(v(x))` and is what gets deployed.

Layers that read the same tensor (q/k/v, gate/up) can share one `v` and one `s`: the first of them, the
leader, owns both; the others hold only their `u`. The product `(v x) * s` is then computed once per input. What one
of them leaves for the next belongs to the thread that computes, never to the model.
"""

import threading
import weakref

import torch
from torch import nn


class _Thread(threading.local):
    """What layers of this thread's forward have yet to read: `{leader: (x, sources, state, z, who has read it)}`."""

    def __init__(self):
        self.latents = {}


_thread = _Thread()
HALF_READ = 8  # groups of which a thread keeps a latent that some of their layers have not read


@torch.compiler.assume_constant_result
def _graph():
    """Which graph a compiler is tracing, None for one that runs Python as it is."""
    return str(torch._guards.CompileContext.current_compile_id())


class LowRankLinear(nn.Module):
    """`in_features -> rank -> out_features`; drop-in for nn.Linear.

    `weighted` layers carry `scale` and `weight`; `leader` is the layer whose `v` (and `s`) this one shares.
    """

    def __init__(self, in_features, out_features, rank, bias, weighted=False, leader=None, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        if leader is None:
            self.v = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
            if weighted:
                self.register_buffer("scale", torch.ones(rank, device=device, dtype=dtype))
                self.weight = nn.Parameter(torch.ones(rank, device=device, dtype=dtype))
                self.power = 1
                # How many prunings of `learn` each basis survived: the order in which `prune` removes them.
                self.register_buffer("survived", torch.zeros(rank, dtype=torch.int16, device=device))
        self.new = None
        self.u = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        # In a tuple, so that nn.Module does not register it; never self, so that a dropped layer is freed at once.
        self._leader = (leader,)
        self._readers = 1  # how many layers use this leader's latent
        if leader is not None:
            leader._readers += 1

    leader = property(lambda self: self._leader[0] or self)
    rank = property(lambda self: self.u.in_features)
    weighted = property(lambda self: "weight" in self.leader._parameters)
    s = property(lambda self: self.leader.scale * self.leader.weight**self.leader.power)

    def __getattr__(self, name):
        # Tools that edit layers in place reach for it, such as resize_token_embeddings.
        if name == "weight" and name not in self._parameters:
            raise AttributeError(
                "a layer written as bases has no weight: change the model before it is decomposed or after dequantize()"
            )
        return super().__getattr__(name)

    @classmethod
    def like(cls, linear, rank, **kwargs):
        """A layer of the shape, bias, device and dtype of an nn.Linear, weights uninitialised."""
        weight = linear.weight
        return cls(
            linear.in_features,
            linear.out_features,
            rank,
            linear.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
            **kwargs,
        )

    def forward(self, x):  # x: (..., in)
        y = self._modules["u"](self.latent(x))  # as self.u, but without a search that takes as long as small products
        return y if self.new is None else y + self.new(x)

    def latent(self, x):
        """`(v x) * s`: (..., r), computed once when several layers read the same `x` one after the other."""
        leader = self.leader
        if leader._readers == 1:
            return leader._project(x)
        if torch.compiler.is_compiling():
            # A compiler that traces training merges equal products itself.
            return leader._project(x) if torch.is_grad_enabled() else leader._once_in_graph(x)
        latents = _thread.latents
        held = latents.get(leader)
        if held is not None:
            y, sources, state, z, read = held
            # None reads it twice: a second reading is another call.
            if y() is x and self not in read and state == leader._state(x, leader._sources()):
                read.append(self)
                if len(read) == leader._readers:  # do not keep activations or their graph alive
                    del latents[leader]
                return z
            del latents[leader]
        z = leader._project(x)
        # After the product: where weights are offloaded, the next reader finds what stands for them then.
        sources = leader._sources()
        state = leader._state(x, sources)
        if state is not None:
            latents[leader] = weakref.ref(x), sources, state, z, [self]
            if len(latents) > HALF_READ:
                del latents[next(iter(latents))]
        return z

    def _once_in_graph(self, x):
        """`latent` for a compiler that traces inference, which follows no weak references.

        What is left for the next reader is an attribute of `x` until the last has been traced. Where a graph ends in
        between, that remains on a real tensor, whose values may change before the next graph runs: that one ignores it.
        """
        held, graph = getattr(x, "_latent", None), _graph()
        if held is None or held[0] is not self or held[1] != graph:
            held = self, graph, self._project(x), self._readers
        _, _, z, left = held
        x._latent = (self, graph, z, left - 1) if left > 1 else None
        return z

    def _sources(self):
        """The tensors that the product depends on, those of adapters and of int8 weights too."""
        v = self._modules["v"]
        sources = (v._parameters["weight"],) if type(v) is nn.Linear else (*v.parameters(), *v.buffers())
        return (*sources, self.scale, self.weight) if "weight" in self._parameters else sources

    def _state(self, x, sources):
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

    def _project(self, x):
        # Products of strided inputs are rounded differently where the weights require gradients.
        z = self._modules["v"](x.contiguous())
        return z * self.s.to(z.dtype) if self.weighted else z

    def extra_repr(self):
        shared = "" if self.leader is self else ", shared v"
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}{shared}"

    @torch.no_grad()
    def dense_weight(self):
        """`u diag(s) v`: (out, in), multiplied in fp32 or better."""
        wide = torch.promote_types(self.u.weight.dtype, torch.float32)
        u = self.u.weight.to(wide)
        if self.weighted:
            u = u * self.s.to(wide)
        weight = u @ self.leader.v.weight.to(wide)
        if self.new is not None:
            weight += self.new.dense_weight().to(wide)
        return weight.to(self.u.weight.dtype)

    def to_linear(self):
        """The equivalent nn.Linear (no smaller, any tool reads it)."""
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            self.u.bias is not None,
            device=self.u.weight.device,
            dtype=self.u.weight.dtype,
        )
        linear.weight = nn.Parameter(self.dense_weight(), requires_grad=False)
        if self.u.bias is not None:
            linear.bias = nn.Parameter(self.u.bias.detach().clone(), requires_grad=False)
        return linear


def resize(linear, weight):
    linear.weight.data = weight.contiguous()
    linear.weight.grad = None
    linear.out_features, linear.in_features = weight.shape
