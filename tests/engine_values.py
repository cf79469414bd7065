"""Values of the step as code between modules uses them: reads, in-place operations, attributes, structures."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_models import WIDTH, Returns, Stack, between, held, sequences, square, vectors
from engine_runs import Case

Pair = namedtuple("Pair", ["left", "right"])


# Reads


def reads(model: Any, x: Tensor) -> Any:
    y = model(x)
    loss = y.square().mean()
    seen = {
        "item": loss.item(), "list": y[0].detach().tolist(), "bool": bool(loss > 0), "float": float(loss),
        "int": int(loss * 1000), "numpy": float(y.detach().numpy().sum()), "nonzero": (y > 0).nonzero().shape[0],
        "format": f"{loss:.6f} {loss.item():.3e}", "rows": y[y > 0].numel(), "max": max(loss, loss * 2).item(),
        "round": round(loss.item(), 6), "array": y.detach().cpu().numpy().shape, "len": len(y),
        "any": bool((y > 100).any()), "equal": torch.equal(y, y), "allclose": torch.allclose(y, y + 1e-12),
        "unique": [part.numel() for part in torch.unique((y > 0).long(), return_counts=True)],
        "argmax": int(y.argmax()), "where": [index.numel() for index in torch.where(y > 0)],
        "contains": 3.0 in y.detach(), "complex": complex(loss), "index": list(range(5))[(y > 0).sum() % 5],
        "topk": y.topk(2).indices[0].tolist(), "print": str(loss.detach().item()),
    }  # fmt: skip
    return loss, seen


def read_by_some(model: Any, x: Tensor) -> Any:
    import modelparallel as smp

    y = model(x)
    loss = y.square().mean()
    if smp.rank() == 0:
        print("first", f"{loss.item():.9f}", float(y.detach().sum()))
    if smp.pp_rank() == smp.pp_size() - 1:
        print("last", float(loss), float((loss * 2 + 1).sqrt()), y.detach().max(-1).indices.sum().item())
    return loss, y.detach()


def large_read_by_some(model: Any, x: Tensor) -> Any:
    """The output is too large to be known everywhere; its loss is known."""
    import modelparallel as smp

    logits = model(x).repeat(1, 3000)
    loss = F.cross_entropy(logits, torch.zeros(x.shape[0], dtype=torch.long))
    correct = (logits.argmax(-1) == 0).sum()
    if smp.rank() == 0:
        print(f"{loss.item():.6f} {correct.item()} {logits.shape}", (loss.detach() * 2).tolist())
    if smp.pp_rank() == smp.pp_size() - 1:
        print(float(loss), int(correct), loss.detach().reshape(1).topk(1).values.tolist())
    return loss, correct


def loss_from_model(model: Any, x: Tensor) -> Any:
    import modelparallel as smp

    loss, extra = model(x)
    if smp.rank() == 0:
        print(loss.item(), extra["norm"].item())
    print("all", loss.item())
    return loss


# In-place glue


def residual_in_place(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    kept = x
    x = self.b(x)
    x += kept  # homes differ
    y = self.c(x)
    y[:, 0] = kept[:, 1]
    y[:, 1] *= 2
    y.clamp_(-2, 2)
    x = self.d(y)
    x.masked_fill_(x.detach() > 1.0, 0.5).add_(y)
    x.relu_()
    return x


class InPlaceFirst(nn.Module):
    """Its first operation writes to its input, which comes from another stage."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.relu(x))


class InPlaceUnits(nn.Module):
    def __init__(self, *, reads_input_again: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(InPlaceFirst() for _ in range(4))
        self.reads_input_again = reads_input_again

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x * 1)
        for block in self.blocks[1:]:
            y = block(x)
            x = y + x if self.reads_input_again else y
        return x


def writes_to_itself_and_to_another(self: Any, x: Tensor) -> Tensor:
    """The same operation on equal shapes, once with two values that share memory."""
    y = self.a(x) * 1
    y += y.detach()
    z = self.a(x + 1) * 1
    z += y.detach()
    w = self.b(z) * 1
    w += z.detach()
    w += w.detach()
    return self.c(w) + y


def into_plain(self: Any, x: Tensor) -> Tensor:
    first, second = self.a(x), self.b(x)
    collected = torch.zeros(x.shape[0], 2, WIDTH, dtype=x.dtype)
    collected[:, 0] = first
    collected[:, 1] = second
    out = torch.empty(x.shape, dtype=x.dtype)
    with torch.no_grad():
        torch.add(first, second, out=out)
    flat = torch.zeros(WIDTH, dtype=x.dtype)
    flat.add_(self.c(x).sum(0)).mul_(0.5)
    return self.d(collected.sum(1) + flat) + out


def into_plain_views(self: Any, x: Tensor) -> Tensor:
    first, second = self.a(x), self.b(x)
    collected = torch.zeros(2, *x.shape, dtype=x.dtype)
    rows = collected.view(-1)  # taken before the writing
    for index in range(2):
        collected[index] += first * (index + 1)
    collected[1][:, 0].add_(second[:, 1])
    y = self.c(rows.view(2, *x.shape)[0]) + collected[1]
    counts = torch.zeros(4, dtype=x.dtype)
    counts[1:3].copy_(second.detach()[0, :2])
    low, high = counts.chunk(2)
    return self.d(y * counts.sum()) + low.sum() * high[0]


def views_written_after_cuts(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    first = y[:, 0]
    transposed = y.T
    z = self.b(y * 1)  # a cut; y itself is not kept for the backward
    y.mul_(2.0)
    first.add_(1.0)
    z = z + first.unsqueeze(1) + self.b(transposed.T * 1)  # another one
    y[:, 2:4] += self.b(x)[:, 2:4]
    y[0].mul_(0.5)
    with torch.no_grad():
        transposed[1] += 1.0
    w = self.c(z) + y
    y.view(-1)[3:7].tanh_()
    only = self.d(w)[:, :3]
    z = self.b(w * 1)
    only.sub_(z[:, :3])
    return z + y + first.mean() + transposed.sum(0).unsqueeze(1) + only.sum()


def views_written(self: Any, x: Tensor) -> Tensor:
    x = self.b(self.a(x))
    half, other = x[:, : WIDTH // 2], x[:, WIDTH // 2 :]
    half.mul_(2.0)
    rows = x.view(-1)
    y = x * 1
    y.view(-1)[:3] = 0.0
    y.unsqueeze(0).transpose(1, 2).add_(1.0)
    return self.c(y) + rows.view_as(x) + other.sum()


def into_parameter_view(self: Any, x: Tensor) -> Tensor:
    weight = self.a.weight
    scaled = weight.clone()
    scaled[0] = 0.0
    return F.linear(self.b(x), scaled, self.c.bias) + self.d.weight.sum() + weight.norm() * self.c.weight.T[0]


def norm_running(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    x = F.batch_norm(x, None, None, training=True)
    return self.b(F.layer_norm(x, (WIDTH,), self.c.weight[0], self.c.bias))


# Attributes


def attributes(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    assert torch.is_tensor(x) and isinstance(x, Tensor) and not isinstance(x, nn.Parameter)
    assert x.shape == (x.size(0), WIDTH) and x.dtype == torch.float64 and len(x) == x.shape[0] and x.dim() == x.ndim
    assert x.device == torch.device("cpu") and not x.is_cuda and x.layout == torch.strided and x.requires_grad
    assert x.numel() == x.shape[0] * WIDTH and x.is_contiguous() and x.stride() == (WIDTH, 1) and x.element_size() == 8
    assert x.is_floating_point() and torch.is_floating_point(x) and not torch.is_complex(x) and bool(x.data.ndim == 2)
    table = {x: 1, x.T: 2}
    assert table[x] == 1 and hash(x) == hash(x) and repr(x)
    y = sum(row * index for index, row in enumerate(x))
    y = y + x.T.mT.mean(0) + x.to(torch.float32).to(x).sum(0) + x.type(torch.float32).double().mean(0)
    y = y + x.cpu().sum(0) + x.data.sum(0) + x.detach().clone().mean(0) + copy.copy(x).sum(0) + x.type_as(x)[0]
    y = y + copy.deepcopy(x.detach()).sum(0) + x.new_zeros(WIDTH) + x.new_tensor([1.0]) + x.new_full((1,), 2.0)
    first, *rest = x
    y = y + first + rest[-1] + x[..., None].squeeze(-1)[0] + x[None][0, -1] + x[:, [0, 1]].sum() + x[-1].real
    z = self.b(y.expand_as(x).contiguous()) @ self.c(x).mT @ x
    z = (z - 1.0) / 3 ** torch.tanh(z) + -z + 2.0 * z.abs().clamp(max=2) + (1.0 - z) + 1.0 / (1 + z * z)
    z = z + z.detach() // 5
    one, two = torch.split(z, WIDTH // 2, dim=1)
    z = torch.cat([two, one], 1) + torch.stack([z, z]).sum(0) + torch.einsum("ij,kj->ki", z, z).sum() + (z % 2)
    return self.d(torch.tanh(z * 0.1).half().double().float().to("cpu", torch.float64).to(device=x.device))


def broadcasting(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    wide = x[:, None, :].expand(-1, 3, -1)  # not dense
    y = self.b(wide) + wide + x.unsqueeze(1)
    flipped = self.c(y.transpose(0, 1)).transpose(0, 1)  # transposed strides
    strided = self.d(y[:, ::2]) + y[:, ::2]  # gaps
    return flipped.mean(1) + strided.permute(2, 1, 0).sum(1).T + self.a(x.t().contiguous().t())


def bounds(self: Any, x: Tensor) -> Tensor:
    """Parts of a value, from a place to a place that are values of other stages, or numbers of numpy."""
    y, z = self.a(x), self.b(x)
    counts = (z.detach() > 0).sum(0)
    for first, last in itertools.pairwise(counts.sort().values):
        part = y[first:last]
        y = y + self.c(part).sum() + part.shape[0] + part.shape[0] * y[:, counts[0] % 3 :].mean()
    for number in counts.numpy():
        y = y + y[number % 2 :].sum() + y[np.array([0, number % 2])].sum() * np.float32(0.5)
    y = y.clone()
    y[counts.min() :] += 1
    self.to(x.dtype)  # nothing changes
    return self.d(torch.tanh(y))


def gaps(self: Any, x: Tensor) -> Tensor:
    """The same operations on a view with gaps, on the stage that has made it and on another."""
    wide = self.a(x).repeat(WIDTH, 4)[:WIDTH]
    part = wide[:, :WIDTH].t()
    one, other = part * self.b.weight, part * self.a.weight
    return self.c(one) + self.d(other) + one.reshape(-1)[1] * self.b(part).t().sum(1) + self.a(part)[0]


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(memory_format=torch.channels_last)
        for conv in self.convs:
            x = conv(x).contiguous(memory_format=torch.channels_last) + x
            assert x.is_contiguous(memory_format=torch.channels_last)
        return self.head(x.permute(0, 2, 3, 1)) + x.permute(0, 2, 3, 1)


def images(step: int) -> tuple[Tensor, ...]:
    return (torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64),)


def other_dtypes(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    spectrum = torch.fft.fft(y)
    back = self.b(torch.fft.ifft(spectrum * torch.tensor(1j)).real) + self.b(spectrum.abs())
    mask, order = y > 0, y.argsort(dim=-1)
    nothing = y[:0]
    z = self.c(back) * mask + back.gather(1, order) + nothing.sum() + self.d(nothing).sum()
    scalar = self.d(z).mean()
    return z * scalar + torch.view_as_real(spectrum).sum(-1) + (order.to(torch.int8).float().double() * scalar)


# Structures


@dataclass
class Box:
    value: Tensor
    name: str = "box"
    others: tuple[Any, ...] = ()


class Bag(dict):
    """A dict subclass with attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Carrier:
    """Any object that can be pickled."""

    def __init__(self, tensor: Tensor, note: str) -> None:
        self.tensor, self.note = tensor, note


def model_output(y: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(last_hidden_state=y, pooler_output=None, hidden_states=(y * 2, y))


def counted(y: Tensor, count: list[int] = [0]) -> Any:  # noqa: B006
    count[0] += 1
    return y, float(count[0]) / 7, {"count": count[0]}


def use_counted(pair: Any, x: Tensor) -> Tensor:
    y, number, more = pair
    return y * number + more["count"]


def shape_of(y: Tensor) -> Any:
    return y, y.shape, y.dtype, [None, (None, {"none": None})], y.size(0)


def use_shape(found: Any, x: Tensor) -> Tensor:
    y, shape, dtype, nested, rows = found
    assert isinstance(shape, torch.Size) and dtype == torch.float64 and nested[1][1]["none"] is None and rows == len(y)
    return y.reshape(shape).to(dtype)


def same_twice(y: Tensor) -> Any:
    return y, y, [y]


def use_same(found: Any, x: Tensor) -> Tensor:
    assert found[0] is found[1] and found[2][0] is found[0]
    return found[0] + found[1] * 2


class Identity(nn.Module):
    """Returns its input, views of it, its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, *, again: Tensor | None = None, scale: float = 1.0) -> Any:
        return x, x.view(-1), self.weight, x.chunk(2, dim=-1), again, x * self.weight * scale


class Identities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = Identity()
        self.third = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        same, flat, weight, (left, right), again, scaled = self.second(x, again=self.gain, scale=0.5)
        assert same is x or same.shape == x.shape
        y = self.third(torch.cat([right, left], dim=-1)) * weight + flat.view_as(x) * again
        same2, *_ = self.second(x=y, scale=2.0)
        return same2 + same + scaled + self.second(self.gain)[0] + self.gain


def text(y: Tensor, *, mode: str, flag: bool = False, sizes: tuple[int, ...] = ()) -> Any:
    return {"mode": mode.upper(), "y": y * (2 if flag else 1), "sizes": sizes, "set": {1, 2}}


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList(Returns(text) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for index, unit in enumerate(self.units):
            found = unit(x, mode="abc"[index], flag=index == 1, sizes=(index, 2))
            assert found["mode"] == "ABC"[index] and found["sizes"] == (index, 2) and found["set"] == {1, 2}
            x = found["y"] + x
        return x


def scalars(self: Any, x: Tensor) -> Tensor:
    """Python numbers that come from values and vary from call to call."""
    x = self.a(x)
    scale = float(x.detach().abs().mean())
    y = self.b(x * scale) * (1 / scale) + scale
    return self.c(torch.where(y > scale, y, torch.tensor(scale, dtype=y.dtype))) + F.leaky_relu(y, scale)


def use_normal(found: Any, x: Tensor) -> Tensor:
    return found.rsample() + found.mean + found.entropy()


def makes_its_loss(model: Any, x: Tensor) -> Tensor:
    y = model(x)
    return nn.MSELoss(reduction="mean")(y, torch.ones_like(y))


CASES = {
    "makes_its_loss": Case(lambda: Stack(torch.tanh), vectors, makes_its_loss),
    "reads": Case(lambda: Stack(torch.tanh), vectors, reads),
    "read_by_some": Case(lambda: Stack(torch.tanh), vectors, read_by_some),
    "large_read_by_some": Case(lambda: Stack(torch.tanh), vectors, large_read_by_some),
    "loss_from_model": Case(
        held(lambda self, x: (self.b(self.a(x)).square().mean(), {"norm": self.c(x).norm()})), vectors, loss_from_model
    ),
    "residual_in_place": Case(held(residual_in_place), vectors, square),
    "writes_to_itself_and_to_another": Case(held(writes_to_itself_and_to_another), vectors, square),
    "in_place_first": Case(lambda: InPlaceUnits(reads_input_again=False), vectors, square),
    "in_place_first_read_again": Case(lambda: InPlaceUnits(reads_input_again=True), vectors, square),
    "into_plain": Case(held(into_plain), vectors, square),
    "into_plain_views": Case(held(into_plain_views), vectors, square),
    "views_written_after_cuts": Case(held(views_written_after_cuts), vectors, square),
    "views_written": Case(held(views_written), vectors, square),
    "into_parameter_view": Case(held(into_parameter_view), vectors, square),
    "norm_running": Case(held(norm_running), vectors, square),
    "attributes": Case(held(attributes), vectors, square),
    "broadcasting": Case(held(broadcasting), vectors, square),
    "bounds": Case(held(bounds), vectors, square),
    "gaps": Case(held(gaps), vectors, square),
    "channels_last": Case(Image, images, square),
    "other_dtypes": Case(held(other_dtypes), vectors, square),
    "dataclass": Case(
        between(lambda y: Box(y, others=(y.detach(), None)), lambda box, x: box.value + box.others[0] + len(box.name)),
        vectors, square,
    ),
    "dict_subclass": Case(between(lambda y: Bag(value=y, one=1), lambda bag, x: bag.value + bag.one), vectors, square),
    "ordered_dict": Case(
        between(lambda y: OrderedDict(a=y, b=[y.sum()]), lambda d, x: d["a"] * d["b"][0]), vectors, square
    ),
    "named_tuple": Case(between(lambda y: Pair(y, (None, y * 2)), lambda p, x: p.left + p.right[1]), vectors, square),
    "any_object": Case(
        between(lambda y: Carrier(y, "note"), lambda c, x: c.tensor * len(c.note)), vectors, square
    ),
    "model_output": Case(
        between(model_output, lambda out, x: out.last_hidden_state + out.hidden_states[0] + out[0]), vectors, square
    ),
    "return_types": Case(between(lambda y: y.max(dim=-1), lambda m, x: x + m.values[:, None] + m.indices[:, None]),
                         vectors, square),
    "numbers": Case(between(counted, use_counted), vectors, square, num_steps=3),
    "shapes": Case(between(shape_of, use_shape), vectors, square),
    "same_twice": Case(between(same_twice, use_same), vectors, square),
    "normal": Case(
        between(lambda y: torch.distributions.Normal(y, 1.0 + y.square()), use_normal), vectors, square
    ),
    "identities": Case(Identities, vectors, square),
    "keywords": Case(Keywords, vectors, square),
    "scalars": Case(held(scalars), vectors, square, num_steps=3),
    "sequences": Case(lambda: Stack(lambda x: x.cumsum(1)), sequences, square),
}  # fmt: skip
