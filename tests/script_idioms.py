"""Idioms of training scripts, as texts: how they clear, edit and hook gradients, and what they do to weights.

Each is a script as `side_door_runs` runs them, on plain torch and on the library. An idiom fills the places of SCRIPT.
"""

from __future__ import annotations

import textwrap

SCRIPT = """
import copy

import torch
import torch.nn.functional as F
from torch import nn

import modelparallel as smp


class Gated(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm, self.down = nn.LayerNorm(size), nn.Linear(2 * size, size)
        self.up, self.gate = nn.Linear(size, 2 * size), nn.Linear(size, 2 * size, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Net(nn.Module):
    def __init__(self, size=6, vocabulary=13):
        super().__init__()
        self.table, self.scale = nn.Embedding(vocabulary, size), nn.Parameter(torch.linspace(0.5, 1.5, size))
        self.layers = nn.ModuleDict({f"l{i}": Gated(size) for i in range(3)})
        self.mix, self.norm = nn.Conv1d(size, size, 3, padding=1, bias=False), nn.BatchNorm1d(size)
        self.out = nn.Linear(size, vocabulary)

    def forward(self, tokens):
        x = self.table(tokens) * self.scale
        for layer in self.layers.values():
            x = layer(x)
        return self.out(x + self.norm(self.mix(x.transpose(1, 2))).transpose(1, 2))


def program(smp, see, handles):
    torch.manual_seed(3)
    net = Net().double()
    {before}
    model = smp.DistributedModel(net)
    net = model.get_module()
    {wrapped}
    inner = {optimizer}
    optimizer = smp.DistributedOptimizer(inner)

    def loss_of(model, tokens):
        return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    @smp.step
    def train({models}, tokens):
        loss = loss_of(model, tokens)
        {loss}
        model.backward(loss)
        return loss

    @smp.step
    def evaluate(model, tokens):
        return loss_of(model, tokens)

    def tokens_of(step):
        generator = torch.Generator().manual_seed(50 * step + smp.dp_rank())
        return torch.randint(13, (6, 5), generator=generator)

    for i in range(3):
        {clear}
        see(f"loss {{i}}", train({models}, tokens_of(i)))
        {edit}
        optimizer.step()
        {after}
    see("weights", model.state_dict())
    {end}
"""

DEFAULTS = {
    "before": "", "wrapped": "", "loss": "", "edit": "", "after": "", "end": "", "models": "model",
    "optimizer": "torch.optim.AdamW(model.parameters(), lr=0.02)", "clear": "optimizer.zero_grad()",
}  # fmt: skip


def script(**places: str) -> str:
    """The text of one idiom."""
    lines = []
    for line in SCRIPT.splitlines():
        name = line.strip().removeprefix("{").removesuffix("}")
        if line.strip() == "{" + name + "}" and name in DEFAULTS:
            lines.append(
                textwrap.indent(
                    textwrap.dedent(places.get(name, DEFAULTS[name])).strip() or "pass", line[: -len(name) - 2]
                )
            )
        else:
            lines.append(line)
    filled = "\n".join(lines)
    for name in ("optimizer", "models"):
        filled = filled.replace("{" + name + "}", places.get(name, DEFAULTS[name]))
    return filled.replace("{{", "{").replace("}}", "}")


EACH = "for p in model.parameters():\n    if p.grad is not None: "
GROUPS = "for group in optimizer.param_groups:\n    for p in group['params']:\n        "
TWO_GROUPS = (
    "torch.optim.AdamW([{'params': [p for p in model.parameters() if p.ndim > 1]}, "
    "{'params': [p for p in model.parameters() if p.ndim <= 1], 'weight_decay': 0.0}], lr=0.02)"
)

#: Right everywhere.
EQUAL = {
    "clear: foreach": script(
        clear="if i: torch._foreach_zero_([p.grad for p in model.parameters() if p.grad is not None])"
    ),
    "clear: groups": script(clear=GROUPS + "p.grad = None"),
    "clear: inner": script(clear="inner.zero_grad()"),
    "clear: inner, zeros": script(clear="inner.zero_grad(set_to_none=False)"),
    "clear: detach_": script(clear=EACH + "p.grad.detach_(); p.grad.requires_grad_(False); p.grad.zero_()"),
    "clear: del": script(clear=EACH.replace("if p.grad is not None: ", "del p.grad")),
    "clear: times 0": script(clear=EACH + "p.grad *= 0"),
    "clear: zeros_like": script(clear=EACH + "p.grad = torch.zeros_like(p)"),
    "clear: apply": script(
        clear="net.apply(lambda m: [setattr(p, 'grad', None) for p in m.parameters(recurse=False)])"
    ),
    "clear: every second": script(clear="if i % 2 == 0: optimizer.zero_grad()"),
    "edit: groups": script(edit=GROUPS + "p.grad.mul_(0.3)"),
    "edit: groups, another": script(edit=GROUPS + "p.grad = p.grad * 0.3 + 0.01 * p.detach()"),
    "edit: groups, none": script(edit=GROUPS + "p.grad = None if i == 1 else p.grad"),
    "edit: clip of groups": script(
        optimizer=TWO_GROUPS,
        edit="for group in optimizer.param_groups: torch.nn.utils.clip_grad_norm_(group['params'], 0.05)",
    ),
    "edit: out=": script(edit=EACH + "torch.nan_to_num(p.grad, nan=0.0, posinf=1e5, out=p.grad)"),
    "edit: layers": script(
        edit="for n, p in net.layers.named_parameters():\n    if p.grad is not None: p.grad.mul_(0.5 ** int(n[1]))"
    ),
    "edit: put back": script(
        edit="""
        kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.zero_grad()
        train(model, tokens_of(100 + i))
        for n, p in model.named_parameters():
            if n in kept: p.grad = kept[n] * 0.7 + p.grad * 0.3
        """
    ),
    "hook: before": script(
        before="for n, p in net.named_parameters(): handles.append(p.register_hook(lambda g, k=len(n) % 3: g * k))"
    ),
    "hook: mask": script(
        before="handles.append(net.table.weight.register_hook(lambda g: g * (torch.arange(13) % 2)[:, None]))"
    ),
    "hook: wrapped": script(
        wrapped="for p in model.parameters(): handles.append(p.register_hook(lambda g: g * 2 if g.ndim > 1 else g))"
    ),
    "hook: removed": script(
        before="handle = net.out.weight.register_hook(lambda g: g * 5)", after="handle.remove()"
    ),
    "hook: accumulated": script(
        before="def half(p): p.grad.mul_(0.5)\n"
        "for p in net.layers.parameters(): handles.append(p.register_post_accumulate_grad_hook(half))"
    ),
    "weights: teacher": script(
        before="teacher = copy.deepcopy(net).requires_grad_(False)",
        wrapped="teacher = smp.DistributedModel(teacher)",
        models="model, teacher",
        loss="with torch.no_grad(): goal = teacher(tokens)\nloss = loss + F.mse_loss(model(tokens), goal)",
        after="""
        with torch.no_grad():
            for (_, t), s in zip(teacher.get_module().named_parameters(), net.parameters()):
                t.mul_(0.8).add_(s, alpha=0.2)
            for t, s in zip(teacher.get_module().buffers(), net.buffers()): t.copy_(s)
        """,
        end="see('weights of the teacher', teacher.state_dict())",
    ),
    "weights: second network with statistics": script(
        before="other = copy.deepcopy(net)",
        wrapped="other = smp.DistributedModel(other)\n"
        "second = smp.DistributedOptimizer(torch.optim.SGD(other.parameters(), lr=0.1))",
        models="model, other",
        loss="loss = loss + 0.1 * loss_of(other, tokens)",
        clear="optimizer.zero_grad()\nsecond.zero_grad()",
        after="second.step()",
        end="see('weights of the other', other.state_dict())",
    ),
    "weights: judge that is frozen in turns, and called twice": script(
        before="judge = nn.Sequential(nn.Linear(13, 8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1)).double()",
        wrapped="""
        judge = smp.DistributedModel(judge)
        second = smp.DistributedOptimizer(torch.optim.SGD(judge.parameters(), lr=0.1))

        @smp.step
        def train_judge(judge, model, tokens):
            real, made = F.one_hot(tokens, 13).double(), model(tokens).detach().softmax(-1)
            loss = F.softplus(-judge(real)).mean() + F.softplus(judge(made)).mean()
            judge.backward(loss)
            return loss
        """,
        models="model, judge",
        loss="loss = loss + F.softplus(-judge(model(tokens).softmax(-1))).mean()",
        clear="""
        judge.get_module().requires_grad_(True)
        second.zero_grad()
        see(f"loss of the judge {i}", train_judge(judge, model, tokens_of(i)))
        second.step()
        judge.get_module().requires_grad_(False)
        optimizer.zero_grad()
        """,
        end="see('weights of the judge', judge.state_dict())",
    ),
    "weights: loaded target": script(
        before="target = copy.deepcopy(net)",
        wrapped="target = smp.DistributedModel(target)",
        models="model, target",
        loss="with torch.no_grad(): goal = target(tokens)\nloss = loss + F.mse_loss(model(tokens), goal)",
        after="target.load_state_dict(model.state_dict())",
        end="see('weights of the target', target.state_dict())",
    ),
    "weights: best": script(
        after="if i == 0: best = {k: v.clone() for k, v in model.state_dict().items()}",
        end="model.load_state_dict(best)\nsee('weights, best', model.state_dict())\n"
        "model.eval()\nwith torch.no_grad(): see('loss, best', evaluate(model, tokens_of(9)))",
    ),
    "weights: shrink": script(after="with torch.no_grad():\n    for p in net.parameters(): p.mul_(0.9).add_(0.01)"),
    "weights: drawn anew": script(
        wrapped="""
        torch.manual_seed(9)
        net.apply(lambda m: nn.init.xavier_uniform_(m.weight) if isinstance(m, nn.Linear) else None)
        nn.init.eye_(net.layers["l1"].down.weight)
        nn.init.orthogonal_(net.out.weight)
        net.table.reset_parameters()
        """
    ),
    "weights: noise": script(
        after="""
        torch.manual_seed(20 + i)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p), alpha=0.01).mul_(torch.bernoulli(torch.full_like(p, 0.9)))
        """
    ),
    "weights: frozen later": script(after="if i == 0: net.layers['l0'].requires_grad_(False)"),
    "weights: statistics of one rank": script(before="net.norm.running_mean.fill_(smp.rank() + 0.5)"),
}  # fmt: skip
