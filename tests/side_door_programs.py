"""Random programs with side doors, as data, and the models that they train.

A :class:`Program` says which blocks the model has, which side doors there are and which steps run; a :class:`Layout`
says on how many ranks, and how. fuzz_side_doors.py writes both down as a script.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Door:
    """A side door: ``kind`` is a key of DOORS; ``at`` chooses the module, ``k`` the variant, ``since`` the step."""

    kind: str
    at: int = 0
    k: int = 0
    since: int = 0


@dataclass(frozen=True)
class Step:
    mode: str = "train"  # or "eval"
    num_samples: int = 6


@dataclass(frozen=True)
class Program:
    """``net``: a key of NETS; ``blocks``: keys of BLOCKS; ``is_guarded``: side effects leave out the traced run."""

    seed: int = 0
    net: str = "list"
    blocks: tuple[str, ...] = ("res", "res", "linear")
    doors: tuple[Door, ...] = ()
    steps: tuple[Step, ...] = (Step(), Step(), Step())
    optimizer: int = 0
    is_guarded: bool = True


@dataclass(frozen=True)
class Layout:
    """The degrees; ``homes``: stages of the blocks in turn, none: automatic."""

    num_stages: int = 2
    tensor_parallel: int = 1
    copies: int = 1
    num_microbatches: int = 2
    schedule: str = "interleaved"
    virtual: int = 1
    sharding: str = ""  # "parameters" or "optimizer"
    homes: tuple[int, ...] = ()
    is_recomputed: bool = False

    @property
    def num_ranks(self) -> int:
        return self.num_stages * self.tensor_parallel * self.copies

    @property
    def num_batches(self) -> int:
        """How many ranks are fed batches of their own."""
        return self.tensor_parallel * self.copies

    def parameters(self) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if self.homes:
            more |= {"auto_partition": False, "default_partition": 0}
        if self.virtual > 1:
            more["virtual_pipeline_degree"] = self.virtual
        if self.sharding == "parameters":
            more |= {
                "sharded_data_parallel_degree": 2, "sdp_param_persistence_threshold": 0, "sdp_gradient_clipping": 1e9,
            }  # fmt: skip
        if self.sharding == "optimizer":
            more["shard_optimizer_state"] = True
        if self.tensor_parallel > 1:
            more["tensor_parallel_degree"] = self.tensor_parallel
        return {
            "pipeline_parallel_degree": self.num_stages, "microbatches": self.num_microbatches, "ddp": True,
            "pipeline": self.schedule, "timeout_seconds": 20, "message_timeout_seconds": 20, **more,
        }  # fmt: skip


# Modules: source, and the paths of what is called inside

BLOCKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "linear": ("nn.Linear(6, 6)", ()),
    "mlp": ("nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))", ("0", "1", "2")),
    "res": ("Res()", ("a", "b")),
    "deep": ("nn.Sequential(Res(), nn.Sequential(nn.Linear(6, 6), nn.GELU()))", ("0", "0.a", "1", "1.0")),
    # Not behind a bias, whose gradient would be zero but for rounding.
    "norm": ("nn.Sequential(nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 6))", ("0", "1", "2")),
    "gelu": ("nn.GELU()", ()),
    "keep_aux": ("KeepAux()", ("a",)),
    "keep_last": ("KeepLast()", ("a",)),
    "keep_count": ("KeepCount()", ("a",)),
    "keep_list": ("KeepList()", ("a",)),
    "keep_float": ("KeepFloat()", ("a",)),
    "keep_average": ("KeepAverage()", ("a",)),
    "keep_buffer": ("KeepBuffer()", ("a",)),
    "keep_inside": ("nn.Sequential(KeepAux(), nn.Linear(6, 6))", ("0", "1")),
}
#: What a block that keeps something reads and writes: attribute, lines of __init__, lines of forward, what a script
#: makes of it (a tensor or a number).
KEEPERS: dict[str, tuple[str, str, str]] = {
    "KeepAux": ("", "self.kept = h.square().mean()", "{m}.kept"),
    "KeepLast": ("self.kept = None", "self.kept = h.detach()", "{m}.kept.mean()"),
    "KeepCount": ("self.kept = 0", "{guard}self.kept += 1", "{m}.kept"),
    "KeepList": ("self.kept = []", "{guard}self.kept.append(h.mean().item())", "sum({m}.kept)"),
    "KeepFloat": ("self.kept = 0.0", "self.kept = float(h.detach().abs().mean())", "{m}.kept"),
    "KeepAverage": (
        "self.kept = torch.zeros(6, dtype=torch.float64)",
        "{guard}self.kept = 0.9 * self.kept + 0.1 * h.detach().mean(0)",
        "{m}.kept.sum()",
    ),
    "KeepBuffer": (
        "self.register_buffer('kept', torch.zeros(6))",
        "self.kept.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)",
        "{m}.kept.sum()",
    ),
}

RES = """
class Res(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.b(torch.tanh(self.a(x)))
"""

KEEPER = """
class {name}(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)
        {init}

    def forward(self, x):
        h = torch.tanh(self.a(x))
        {write}
        return x + h
"""

NET = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        {init}
        self.head = nn.Linear(6, 6)

    def forward(self, x):
        {forward}
        return self.head(x)
"""


def classes(program: Program) -> str:
    used = " ".join(BLOCKS[name][0] for name in program.blocks)
    guard = "if not smp.is_tracing(): " if program.is_guarded else ""
    parts = [RES] if "Res()" in used else []
    for name, (init, write, _) in KEEPERS.items():
        if f"{name}()" in used:
            parts.append(KEEPER.format(name=name, init=init or "pass", write=write.format(guard=guard)))
    blocks = ", ".join(BLOCKS[name][0] for name in program.blocks)
    if program.net == "sequential":
        parts.append(f"\ndef make_net():\n    return nn.Sequential({blocks})\n")
        return "".join(parts)
    forward = "for block in self.blocks:\n            x = block(x)"
    init = f"self.blocks = nn.ModuleList([{blocks}])"
    if program.net == "dict":
        entries = ", ".join(f"'b{index}': {BLOCKS[name][0]}" for index, name in enumerate(program.blocks))
        init = f"self.blocks = nn.ModuleDict({{{entries}}})"
        forward = "for block in self.blocks.values():\n            x = x + block(x)"
    elif program.net == "nested":
        made = [BLOCKS[name][0] for name in program.blocks]
        groups = [f"nn.Sequential({', '.join(made[start : start + 2])})" for start in range(0, len(made), 2)]
        init = f"self.blocks = nn.Sequential({', '.join(groups)})"
        forward = "x = self.blocks(x)"
    elif program.net == "twice":
        forward += "\n        x = self.blocks[0](x) * 0.5"
    elif program.net == "residual":
        forward = (
            "first = x\n        for block in self.blocks:\n            x = x + 0.5 * block(x)\n        x = x + first"
        )
    net = NET.format(init=init, forward=forward)
    tie = "\n    net.head.weight = net.get_submodule('TIED').weight" if program.net == "tied" else ""
    linear = next((path for path in paths(program) if is_linear(program, path) and path != "head"), None)
    tie = tie.replace("TIED", linear) if linear else ""
    parts.append(f"{net}\n\ndef make_net():\n    net = Net(){tie}\n    return net\n")
    return "".join(parts)


def block_path(program: Program, index: int) -> str:
    if program.net == "sequential":
        return str(index)
    if program.net == "nested":
        return f"blocks.{index // 2}.{index % 2}"
    return f"blocks.b{index}" if program.net == "dict" else f"blocks.{index}"


def paths(program: Program) -> list[str]:
    """All modules that are called, the root as ''."""
    found = [""]
    for index, name in enumerate(program.blocks):
        path = block_path(program, index)
        found += [path, *(f"{path}.{inner}" for inner in BLOCKS[name][1])]
    if program.net == "nested":
        found += ["blocks", *(f"blocks.{index}" for index in range((len(program.blocks) + 1) // 2))]
    return found + ([] if program.net == "sequential" else ["head"])


def is_linear(program: Program, path: str) -> bool:
    """Whether there is an nn.Linear(6, 6) at ``path``."""
    if path == "head":
        return True
    for index, name in enumerate(program.blocks):
        own = block_path(program, index)
        if path == own:
            return name == "linear"
        if path.startswith(own + "."):
            inner = path.removeprefix(own + ".")
            return inner in {"a", "b", "0.a", "1.0"} or (name, inner) in {("norm", "2"), ("keep_inside", "1")}
    return False


def linears(program: Program) -> list[str]:
    return [path for path in paths(program) if is_linear(program, path)]
