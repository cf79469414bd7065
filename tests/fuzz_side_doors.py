"""Random scripts whose values leave modules by side doors: hooks, attributes, patched forwards, kept lists, edited
gradients, copies of models.

:func:`source` writes a program down as a script, and the script is what runs, on plain torch (plain_smp.py) and on the
library (side_door_runs.py). What the script reads is compared: on every rank, in every step.
"""

from __future__ import annotations

import textwrap

from side_door_programs import Layout, Program, block_path, classes, linears
from side_doors import DOORS

SCRIPT = """
def program(smp, see, handles):
    torch.manual_seed({seed})
    net = make_net().double()
    {split}
    {setup}
    model = smp.DistributedModel(net)
    net = model.get_module()
    {placed}
    {wrapped}
    optimizer = smp.DistributedOptimizer({optimizer})
    {made}

    def body({models}, x, y):
        early = 0.0
        {body}
        {call}
        loss = (out - y).square().mean() + early
        result = {{}}
        {loss}
        return loss, {{"loss": loss, **result}}

    @smp.step
    def train({models}, x, y):
        loss, result = body({models}, x, y)
        model.backward(loss)
        return result

    {evaluate}

    for i, (mode, samples) in enumerate({steps}):
        {start}
        generator = torch.Generator().manual_seed({seed} + 10 * i + smp.dp_rank())
        x, y = torch.randn(2, samples, 6, generator=generator, dtype=torch.float64)
        if mode == "train":
            {clear}
            see(f"step {{i}}", train({models}, x, y))
            {after}
            {gradients}
            {edit}
            optimizer.step()
            {update}
        {evaluation}
    see("weights", model.state_dict())
    {end}
"""

GRADIENTS = 'see(f"gradients {i}", {name: p.grad for name, p in model.named_parameters()})'
EVALUATE = """
@smp.step
def evaluate({models}, x, y):
    return body({models}, x, y)[1]
"""
EVALUATION = """
else:
    model.eval()
    with torch.no_grad():
        see(f"evaluation {{i}}", evaluate({models}, x, y))
    {after}
    model.train()
"""

OPTIMIZERS = [
    "torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)", "torch.optim.SGD(model.parameters(), lr=0.1)",
    "torch.optim.Adam(model.parameters(), lr=0.02)", "torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)",
]  # fmt: skip


def source(layout: Layout, program: Program) -> str:
    """The program as a script's text; it defines ``program(smp, see, handles)``."""
    parts = [DOORS[door.kind](program, door, n) for n, door in enumerate(program.doors)]
    blocks = [f"net.get_submodule({block_path(program, index)!r})" for index in range(len(program.blocks))]

    def block_of(lines: list[str], indent: int) -> str:
        return textwrap.indent("\n".join(dict.fromkeys(lines)) or "pass", " " * indent).lstrip()

    def lines_of(place: str, indent: int, default: str = "pass") -> str:
        return block_of([line for part in parts for line in getattr(part, place)] or [default], indent)

    split, placed = [], []
    if layout.tensor_parallel > 1:
        split = [f"smp.set_tensor_parallelism(net.get_submodule({path!r}))" for path in linears(program)[::2]]
    if layout.homes and program.net != "tied":  # what is tied stays together
        homes = [layout.homes[index % len(layout.homes)] % layout.num_stages for index in range(len(blocks))]
        placed = [f"smp.set_partition({block}, {home})" for block, home in zip(blocks, homes, strict=True)]
    if layout.is_recomputed:
        placed.append(f"smp.set_activation_checkpointing({blocks[0]})")
    calls = [part.call for part in parts if part.call]
    models = ", ".join(["model", *(name for part in parts for name in part.models)])
    evaluate = evaluation = "pass"
    if any(step.mode == "eval" for step in program.steps):
        evaluate = EVALUATE.strip().format(models=models)
        evaluation = EVALUATION.strip().format(models=models, after=lines_of("after", 4))
    script = SCRIPT.format(
        seed=program.seed,
        split=block_of(split, 4),
        setup=lines_of("setup", 4),
        placed=block_of(placed, 4),
        wrapped=lines_of("wrapped", 4),
        optimizer=OPTIMIZERS[program.optimizer % len(OPTIMIZERS)],
        made=lines_of("optimizer", 4),
        models=models,
        body=lines_of("body", 8),
        call=block_of([calls[0] if calls else "out = model(x)"], 8),
        loss=lines_of("loss", 8),
        evaluate=block_of([evaluate], 4),
        steps=[(step.mode, step.num_samples) for step in program.steps],
        start=lines_of("start", 8),
        clear=lines_of("clear", 12, "optimizer.zero_grad()"),
        after=lines_of("after", 12),
        gradients="pass" if layout.sharding == "optimizer" else GRADIENTS,
        edit=lines_of("edit", 12),
        update=lines_of("update", 12),
        evaluation=block_of([evaluation], 8),
        end=lines_of("end", 4),
    )
    kept = [line for line in script.splitlines() if line.strip() != "pass"]
    head = "import copy\nimport weakref\n\nimport torch\nfrom torch import nn\n\nimport modelparallel as smp\n"
    return head + classes(program) + "\n".join(kept) + "\n"
