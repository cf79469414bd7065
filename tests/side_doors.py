"""Side doors: what a script does beside calling a model and its backward, as lines for the places of the script.

Hooks and blocks that keep values, patched forwards, edited and cleared gradients, copies of models, weights that are
frozen, replaced and read. Each function takes (program, door, number of the door) and gives :class:`Lines`.
"""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field

from side_door_programs import BLOCKS, KEEPERS, Door, Program, block_path, linears, paths


@dataclass
class Lines:
    """What a door adds, by place."""

    setup: list[str] = field(default_factory=list)  # before wrapping
    wrapped: list[str] = field(default_factory=list)
    optimizer: list[str] = field(default_factory=list)  # after the optimizer was made
    body: list[str] = field(default_factory=list)  # of the step, at its begin
    call: str = ""  # in place of "out = model(x)"
    loss: list[str] = field(default_factory=list)
    start: list[str] = field(default_factory=list)  # of each iteration
    clear: list[str] = field(default_factory=list)  # in place of optimizer.zero_grad()
    after: list[str] = field(default_factory=list)  # after each step, also of evaluation
    edit: list[str] = field(default_factory=list)  # between backward and update
    update: list[str] = field(default_factory=list)  # after the update
    models: list[str] = field(default_factory=list)
    end: list[str] = field(default_factory=list)


def at(program: Program, door: Door, *, is_linear_only: bool = False) -> str:
    """A module's expression."""
    candidates = linears(program) if is_linear_only else paths(program)
    path = candidates[door.at % len(candidates)] if candidates else ""
    return f"net.get_submodule({path!r})" if path else "net"


WHATS = [
    "{v}", "{v}.detach()", "{v}.detach().clone()", "{v}.mean()", "{v}.detach().mean()", "{v}.detach().mean().item()",
    "float({v}.detach().abs().mean())", "len({v})", "{v}.square().mean()", "{v}.detach().norm().item()",
]  # fmt: skip
NUMBERS = {5, 6, 7, 9}


def as_term(what: int, value: str) -> str:
    return f"0.1 * {value}" if what in NUMBERS else f"0.1 * ({value}).square().mean()"


def reading(lines: Lines, name: str, condition: str, value: str, term: str, how: int) -> None:
    """Read ``value``, where it is there: as a term of the loss, as a result, after the step, in the next step."""
    if how in (0, 1):
        lines.loss.append(f"if {condition}:\n    loss = loss + {term}")
    if how in (1, 2):
        lines.loss.append(f"if {condition}:\n    result['{name}'] = {value}")
    if how == 3:
        lines.after.append(f"if {condition}:\n    see('{name}', {value})")
    if how == 4:
        lines.body.append(f"if {condition}:\n    early = early + {term}")


HOOKS = [
    "{m}.register_forward_hook(hook{n})", "{m}.register_forward_hook(hook{n}, with_kwargs=True)",
    "{m}.register_forward_hook(hook{n}, always_call=True)", "{m}.register_forward_pre_hook(hook{n})",
    "{m}.register_forward_pre_hook(hook{n}, with_kwargs=True)", "{m}.register_forward_hook(hook{n}, prepend=True)",
    "nn.modules.module.register_module_forward_hook(hook{n})",
    "nn.modules.module.register_module_forward_pre_hook(hook{n})",
]  # fmt: skip
HOOK_HEADS = [
    "(module, args, output)", "(module, args, kwargs, output)", "(module, args, output)", "(module, args)",
    "(module, args, kwargs)", "(module, args, output)", "(module, args, output)", "(module, args)",
]  # fmt: skip


def hooked_value(kind: int) -> str:
    return "output" if "output" in HOOK_HEADS[kind] else "args[0]"


def register(
    lines: Lines, program: Program, door: Door, n: int, rng: random.Random, body: list[str], kind: int
) -> None:
    """Write the hook down, and where it is registered and removed."""
    target = at(program, door)
    head = HOOK_HEADS[kind]
    guard = [f"if module is not {target}:\n    return"] if kind in (6, 7) else []
    define = f"def hook{n}{head}:\n" + textwrap.indent("\n".join([*guard, *body]), "    ")
    made = f"handles.append({HOOKS[kind].format(m=target, n=n)})"
    where = rng.randrange(4)
    if where == 0:
        lines.setup += [define, made]
    elif where == 1:
        lines.wrapped += [define, made]
    else:
        lines.wrapped.append(define)
        lines.start.append(f"if i == {door.since}:\n    {made}")
        if where == 3:
            lines.after.append(f"if i == {door.since + 1}:\n    handles.pop().remove()")


def hook_stores(program: Program, door: Door, n: int) -> Lines:
    lines, rng = Lines(), random.Random(door.k)
    kind, what, place, how = rng.randrange(len(HOOKS)), rng.randrange(len(WHATS)), rng.randrange(6), rng.randrange(5)
    target = at(program, door)
    value = WHATS[what].format(v=hooked_value(kind))
    body, condition, read = [f"seen{n}['x'] = {value}"], f"seen{n}", f"seen{n}['x']"
    if place == 0:
        lines.setup.append(f"seen{n} = {{}}")
    elif place == 1:  # a list, emptied in each microbatch
        lines.setup.append(f"seen{n} = []")
        lines.body.append(f"seen{n}.clear()")
        body, read = [f"seen{n}.append({value})"], f"seen{n}[-1]"
    elif place == 2:
        body, condition, read = [f"module.kept{n} = {value}"], f"hasattr({target}, 'kept{n}')", f"{target}.kept{n}"
    elif place == 3:
        body, condition, read = [f"net.kept{n} = {value}"], f"hasattr(net, 'kept{n}')", f"net.kept{n}"
    elif place == 4:
        lines.setup.append(f"seen{n} = None")
        body, condition, read = [f"nonlocal seen{n}\nseen{n} = {value}"], f"seen{n} is not None", f"seen{n}"
    else:
        lines.setup.append(f"owner{n} = weakref.ref({target})")
        body = [f"owner{n}().kept{n} = {value}"]
        condition, read = f"hasattr(owner{n}(), 'kept{n}')", f"owner{n}().kept{n}"
    register(lines, program, door, n, rng, body, kind)
    reading(lines, f"door {n}", condition, read, as_term(what, read), how)
    return lines


def hook_collects(program: Program, door: Door, n: int) -> Lines:
    """Statistics over microbatches and steps: sums and counts, which do not depend on the order."""
    lines, rng = Lines(), random.Random(door.k)
    kind = rng.randrange(len(HOOKS))
    value = hooked_value(kind)
    guard = "if smp.is_tracing():\n    return\n" if program.is_guarded else ""
    variants = [
        (f"total{n} = []", f"total{n}.append({value}.detach().mean().item())", f"[len(total{n}), sum(total{n})]"),
        (f"total{n} = {{'count': 0}}", f"total{n}['count'] += 1", f"total{n}['count']"),
        (f"total{n} = {{'sum': 0.0}}", f"total{n}['sum'] += float({value}.detach().norm())", f"total{n}['sum']"),
        (
            f"total{n} = torch.zeros(6, dtype=torch.float64)", f"total{n}.add_({value}.detach().abs().sum(0))",
            f"total{n}",
        ),
        (
            f"total{n} = {{'sum': 0}}", f"total{n}['sum'] = total{n}['sum'] + {value}.detach().sum(0)",
            f"total{n}['sum']",
        ),
    ]  # fmt: skip
    init, write, read = variants[rng.randrange(len(variants))]
    lines.setup.append(init)
    register(lines, program, door, n, rng, [guard + write], kind)
    lines.after.append(f"see('door {n}', {read})")
    return lines


def hook_replaces(program: Program, door: Door, n: int) -> Lines:
    lines, rng = Lines(), random.Random(door.k)
    kind = rng.randrange(6)
    made = {3: "return (args[0] * 0.9,)", 4: "return (args[0] * 0.9,), kwargs"}.get(kind, "return output * 0.9")
    register(lines, program, door, n, rng, [made], kind)
    return lines


def keeper_read(program: Program, door: Door, n: int) -> Lines:
    """Read what the blocks keep."""
    lines = Lines()
    found = [
        (block_path(program, index) + (".0" if name == "keep_inside" else ""), BLOCKS[name][0])
        for index, name in enumerate(program.blocks)
        if name.startswith("keep")
    ]
    if not found:
        return lines
    path, made = found[door.at % len(found)]
    name = next(name for name in KEEPERS if f"{name}()" in made)
    module = f"net.get_submodule({path!r})"
    value = KEEPERS[name][2].format(m=module)
    is_number = name in ("KeepCount", "KeepList", "KeepFloat")
    term = f"0.1 * {value}" if is_number else f"0.1 * ({value})"
    condition = f"getattr({module}, 'kept', None) is not None"
    reading(lines, f"kept {n}", condition, value, term, door.k % 5)
    return lines


def patched_forward(program: Program, door: Door, n: int) -> Lines:
    """A recorder replaces ``forward``, for a call or for good."""
    lines, rng = Lines(), random.Random(door.k)
    target, what = at(program, door), rng.randrange(len(WHATS))
    value = WHATS[what].format(v="output")
    recorder = (
        f"def recorder{n}(forward):\n    def recorded(*args, **kwargs):\n        output = forward(*args, **kwargs)\n"
        f"        seen{n}.append({value})\n        return output\n    return recorded"
    )
    lines.setup += [f"seen{n} = []", recorder]
    patch = f"{target}.forward = recorder{n}({target}.forward)"
    lines.body.append(f"seen{n}.clear()")
    where = rng.randrange(4)
    if where < 2:
        undo = [f"{target}.forward = before{n}", f"del {target}.forward"][where]
        lines.body += [f"before{n} = {target}.forward", patch]
        lines.call = f"try:\n    out = model(x)\nfinally:\n    {undo}"
    elif where == 2:
        lines.setup.append(patch)
    else:
        lines.wrapped.append(patch)
    reading(lines, f"door {n}", f"seen{n}", f"seen{n}[0]", as_term(what, f"seen{n}[0]"), rng.randrange(4))
    return lines


def backward_hook(program: Program, door: Door, n: int) -> Lines:
    lines, rng = Lines(), random.Random(door.k)
    target = at(program, door)
    lines.setup.append(f"total{n} = []")
    variants = [
        f"handles.append({target}.register_full_backward_hook("
        f"lambda module, gi, go: total{n}.append(go[0].norm().item())))",
        f"handles.append({target}.register_full_backward_hook(lambda module, gi, go: tuple("
        "g if g is None else g * 0.5 for g in gi)))",
        f"handles.append({target}.register_full_backward_pre_hook(lambda module, go: (go[0] * 0.5,)))",
        f"handles.append({target}.register_forward_hook(lambda module, args, output: output.register_hook("
        "lambda g: g * 0.5) and None if output.requires_grad else None))",
        f"handles.append({target}.register_forward_hook(lambda module, args, output: output.register_hook("
        f"lambda g: total{n}.append(g.norm().item())) and None if output.requires_grad else None))",
        f"handles += [p.register_hook(lambda g: g * 0.5) for p in {target}.parameters()]",
        f"handles += [p.register_post_accumulate_grad_hook(lambda p: total{n}.append(1)) "
        f"for p in {target}.parameters()]",
    ]
    line = variants[rng.randrange(len(variants))]
    if rng.randrange(2):
        lines.setup.append(line)
    else:
        lines.wrapped.append(line)
    lines.after.append(f"see('door {n}', [len(total{n}), sum(total{n})])")
    return lines


LISTS = ["model.parameters()", "net.parameters()", "listed", "{m}.parameters()", "model.get_module().parameters()"]


def clears(program: Program, door: Door, n: int) -> Lines:
    lines = Lines(setup=[], optimizer=["listed = list(model.parameters())"])
    target = at(program, door)
    each = LISTS[door.k // 10 % len(LISTS)].format(m="net")
    variants = [
        "optimizer.zero_grad(set_to_none=True)", "optimizer.zero_grad(set_to_none=False)", "model.zero_grad()",
        "net.zero_grad()", "net.zero_grad(set_to_none=False)", f"optimizer.zero_grad()\n{target}.zero_grad()",
        f"for p in {each}:\n    p.grad = None", f"for p in {each}:\n    if p.grad is not None:\n        p.grad.zero_()",
        "if i % 2 == 0:\n    optimizer.zero_grad()",
        f"optimizer.zero_grad()\nfor p in {target}.parameters():\n    p.grad = None",
        f"for p in {each}:\n    if p.grad is not None:\n        p.grad.mul_(0.5)",
        "model.zero_grad(set_to_none=False)",
    ]  # fmt: skip
    lines.clear.append(variants[door.k % len(variants)])
    return lines


def edits(program: Program, door: Door, n: int) -> Lines:
    lines = Lines(optimizer=["listed = list(model.parameters())"])
    target = at(program, door)
    each = LISTS[door.k // 20 % len(LISTS)].format(m=target)
    head = f"for p in {each}:\n    if p.grad is not None:\n        "
    variants = [
        head + "p.grad.mul_(0.5)", head + "p.grad = p.grad * 0.5", head + "p.grad.clamp_(-0.01, 0.01)",
        head + "p.grad.data = p.grad.data * 0.5", head + "p.grad.add_(p.detach(), alpha=0.1)",
        f"torch.nn.utils.clip_grad_norm_({each}, 0.05)", f"torch.nn.utils.clip_grad_value_({each}, 0.01)",
        head + "p.grad = None", head + "p.grad = torch.zeros_like(p)", f"{target}.zero_grad()",
        f"torch.nn.utils.clip_grads_with_norm_({each}, 0.05, torch.nn.utils.get_total_norm("
        f"[p.grad for p in {each} if p.grad is not None]))",
        head + "p.grad.copy_(p.grad.sign())",
        f"see('norm {n}', torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05).item())",
        "torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 0.5)",
    ]  # fmt: skip
    line = variants[door.k % len(variants)].replace(f"for p in {each}", f"for p in list({each})")
    lines.edit.append(f"if i >= {door.since}:\n" + textwrap.indent(line, "    "))
    return lines


def copies(program: Program, door: Door, n: int) -> Lines:
    """A teacher, target or average, wrapped or plain, that follows the model."""
    lines, rng = Lines(), random.Random(door.k)
    name = f"copy{n}"
    lines.setup.append(f"{name} = copy.deepcopy(net).requires_grad_(False)")
    lines.wrapped.append("listed = list(model.parameters())")
    is_wrapped = rng.randrange(4) > 0
    one, other = rng.choice([
        (f"{name}.parameters()", "model.parameters()"), (f"{name}.get_module().parameters()", "net.parameters()"),
        (f"listed{n}", "listed"), (f"{name}.virtual_named_parameters()", "model.virtual_named_parameters()"),
    ])  # fmt: skip
    if is_wrapped:
        lines.wrapped += [f"{name} = smp.DistributedModel({name})", f"listed{n} = list({name}.parameters())"]
        lines.models.append(name)
        lines.loss.append(
            f"with torch.no_grad():\n    goal{n} = {name}(x)\nloss = loss + 0.1 * (out - goal{n}).square().mean()"
        )
        lines.end.append(f"see('copy {n}', {name}.state_dict())")
    else:
        one = f"{name}.named_parameters()" if "virtual" in other else f"{name}.parameters()"
        lines.end.append(f"see('copy {n}', {name}.state_dict())")
    if "virtual" in other:
        zipped = f"for (_, e), (_, p) in zip({one}, {other}):"
    else:
        zipped = f"for e, p in zip({one}, {other}):"
    updates = ["e.mul_(0.9).add_(p, alpha=0.1)", "e.copy_(p)", "e.data.copy_(p.data)", "e.lerp_(p, 0.1)"]
    update = updates[rng.randrange(len(updates))]
    how = rng.randrange(6)
    if how < 3:
        lines.update.append(f"with torch.no_grad():\n    {zipped}\n        {update}")
    elif how == 3:
        lines.update.append(f"{name}.load_state_dict(model.state_dict())")
    elif how == 4:
        named = f"named{n} = dict({name}.named_parameters())"
        loop = f"for key, p in model.named_parameters():\n        named{n}[key].lerp_(p, 0.1)"
        lines.update.append(f"with torch.no_grad():\n    {named}\n    {loop}")
    return lines


def late_copies(program: Program, door: Door, n: int) -> Lines:
    """Copies of the wrapped model."""
    name = f"late{n}"
    average = "torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))"
    copied = f"if i == {door.since}:\n    {name} = copy.deepcopy(MODEL)"
    variants = [
        Lines(wrapped=[f"{name} = {average}"], update=[f"{name}.update_parameters(model)"],
              end=[f"see('copy {n}', {{key: value for key, value in {name}.state_dict().items()}})"]),
        Lines(start=[copied.replace("MODEL", "model")], end=[f"see('copy {n}', {name}.state_dict())"]),
        Lines(start=[copied.replace("MODEL", "net")], end=[f"see('copy {n}', {name}.state_dict())"]),
        Lines(start=[f"if i == {door.since}:\n    {name} = {{k: v.clone() for k, v in model.state_dict().items()}}"],
              end=[f"model.load_state_dict({name})", f"see('weights {n}', model.state_dict())"]),
        Lines(start=[f"if i == {door.since}:\n    {name} = [p.detach().clone() for p in model.parameters()]"],
              end=[f"with torch.no_grad():\n    for p, old in zip(model.parameters(), {name}):\n        p.copy_(old)",
                   f"see('weights {n}', model.state_dict())"]),
    ]  # fmt: skip
    return variants[door.k % len(variants)]


def freezes(program: Program, door: Door, n: int) -> Lines:
    lines = Lines()
    target = at(program, door)
    variants = [
        ("setup", f"{target}.requires_grad_(False)"), ("wrapped", f"{target}.requires_grad_(False)"),
        ("start", f"if i >= {door.since}:\n    {target}.requires_grad_(i % 2 == 0)"),
        ("start", f"{target}.weight.requires_grad_(i < {door.since})" if "net." in target else "pass"),
        ("start", f"for key, p in model.virtual_named_parameters():\n    if 'bias' in key:\n"
                  f"        p.requires_grad_(i < {door.since})"),
        ("start", f"for p in list(model.parameters())[:2]:\n    p.requires_grad_(i < {door.since})"),
    ]  # fmt: skip
    place, line = variants[door.k % len(variants)]
    if ".weight" in line:
        line = f"{at(program, door, is_linear_only=True)}.weight.requires_grad_(i < {door.since})"
    getattr(lines, place).append(line)
    return lines


def changes(program: Program, door: Door, n: int) -> Lines:
    """Weights and modules that are replaced, tied, or written to."""
    lines = Lines()
    linear = at(program, door, is_linear_only=True)
    if linear == "net":
        return lines
    other = at(program, Door("", door.at + 1), is_linear_only=True)
    variants = [
        f"{linear}.weight = nn.Parameter({linear}.weight.detach() * 0.5)",
        f"with torch.no_grad():\n    {linear}.weight.mul_(0.5)",
        f"{linear}.weight.data.mul_(0.5)", f"{linear}.weight.data = {linear}.weight.data * 0.5",
        f"{linear}.weight = {other}.weight", f"nn.init.ones_({linear}.bias)", f"{linear}.bias = None",
        "with torch.no_grad():\n    for p in MODEL.parameters():\n        p.mul_(0.9)",
        "with torch.no_grad():\n    for p in net.parameters():\n        p.mul_(0.9)",
        "MODEL.load_state_dict({key: value * 0.9 for key, value in MODEL.state_dict().items()})",
        f"{linear}.load_state_dict({{'weight': torch.eye(6), 'bias': torch.ones(6)}})",
        "for p in net.parameters():\n    p.data.mul_(0.9)",
    ]  # fmt: skip
    where = door.k // 20 % 4
    line = variants[door.k % len(variants)].replace("MODEL", "model" if where else "net")
    if where == 0:
        lines.setup.append(line)
    elif where == 1:
        lines.wrapped.append(line)
    else:
        place = lines.start if where == 2 else lines.edit
        place.append(f"if i == {door.since}:\n" + textwrap.indent(line, "    "))
    return lines


def starts(program: Program, door: Door, n: int) -> Lines:
    """Initial weights that only the first rank has."""
    variants = [
        "if smp.rank() == 0:\n    net.load_state_dict({key: value * 0.5 for key, value in net.state_dict().items()})",
        "torch.manual_seed(100 + smp.rank())\nfor p in net.parameters():\n    nn.init.normal_(p, std=0.3)",
        "if smp.rank() == 0:\n    nn.init.ones_(net.head.bias)" if program.net != "sequential" else "pass",
    ]
    return Lines(setup=[variants[door.k % len(variants)]])


def modes(program: Program, door: Door, n: int) -> Lines:
    inner = paths(program)[1:]
    target = f"net.get_submodule({inner[door.at % len(inner)]!r})"
    variants = [
        Lines(start=[f"{target}.eval()"]), Lines(start=[f"{target}.train(i % 2 == 0)"]),
        Lines(body=[f"{target}.eval()"], loss=[f"{target}.train()"]),
    ]  # fmt: skip
    return variants[door.k % len(variants)]


def reads_weights(program: Program, door: Door, n: int) -> Lines:
    found = linears(program)[1::2]  # the others are split under tensor parallelism
    if not found:
        return Lines()
    linear = f"net.get_submodule({found[door.at % len(found)]!r})"
    variants = [
        Lines(after=[f"see('weight {n}', {linear}.weight.norm().item())"]),
        Lines(after=[f"see('weight {n}', {linear}.weight.detach().clone())"]),
        Lines(after=[f"see('weight {n}', sum(p.detach().square().sum() for p in net.parameters()).item())"]),
        Lines(optimizer=[f"listed{n} = list(model.parameters())"],
              after=[f"see('weight {n}', [p.detach().norm().item() for p in listed{n}])"]),
        Lines(loss=[f"loss = loss + 0.1 * {linear}.weight.square().sum()"]),
        Lines(loss=["loss = loss + 0.01 * sum(p.square().sum() for p in model.parameters())"]),
        Lines(loss=[f"result['weight {n}'] = {linear}.weight.norm()"]),
        Lines(after=[f"if i > 0:\n    see('slope {n}', None if {linear}.weight.grad is None else "
                     f"{linear}.weight.grad.norm().item())"]),
        Lines(after=[f"see('stats {n}', [b.double().sum().item() for b in net.buffers()])"]),
    ]  # fmt: skip
    return variants[door.k % len(variants)]


def second_model(program: Program, door: Door, n: int) -> Lines:
    """Another model of the same classes, trained along."""
    name = f"other{n}"
    lines = Lines(setup=[f"{name} = make_net().double()"], wrapped=[f"{name} = smp.DistributedModel({name})"])
    lines.models.append(name)
    lines.optimizer.append(
        f"optimizer{n} = smp.DistributedOptimizer(torch.optim.SGD({name}.parameters(), lr=0.1, momentum=0.5))"
    )
    term = ["(NAME(x) - y)", "(NAME(out) - y)", "0.3 * NAME(out.detach())"][door.k % 3].replace("NAME", name)
    lines.loss.append(f"loss = loss + ({term}).square().mean()")
    lines.start.append(f"optimizer{n}.zero_grad()")
    lines.update.append(f"optimizer{n}.step()")
    lines.end.append(f"see('weights {n}', {name}.state_dict())")
    return lines


DOORS: dict[str, Callable[[Program, Door, int], Lines]] = {
    "hook_stores": hook_stores,
    "hook_collects": hook_collects,
    "hook_replaces": hook_replaces,
    "keeper_read": keeper_read,
    "patched_forward": patched_forward,
    "backward_hook": backward_hook,
    "clears": clears,
    "edits": edits,
    "copies": copies,
    "late_copies": late_copies,
    "freezes": freezes,
    "changes": changes,
    "starts": starts,
    "modes": modes,
    "reads_weights": reads_weights,
    "second_model": second_model,
}
