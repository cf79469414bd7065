"""smp.optimizers against plain loops over the parameters, written from the papers."""

import copy
import math

import pytest
import torch

from modelparallel.errors import SMPConfigError
from modelparallel.optimizers import FusedAdam, FusedLAMB, FusedLamb, FusedNovoGrad
from pool import run_ranks

SHAPES = [(7, 5), (5,), (3, 2, 4), (1,), (6, 6)]


class Reference:
    """One group's update, parameter by parameter, in float64."""

    def __init__(self, values, options):
        self.values = [value.detach().double().clone() for value in values]
        self.options = options
        self.state = [{} for _ in values]

    def moments(self, index, shape):
        state = self.state[index]
        state.setdefault("m", torch.zeros(shape, dtype=torch.float64))
        state.setdefault("v", torch.zeros(shape, dtype=torch.float64))
        state["t"] = state.get("t", 0) + 1
        return state


class ReferenceAdam(Reference):
    """Kingma and Ba, algorithm 1; Loshchilov and Hutter, algorithm 2."""

    def step(self, gradients):
        o = self.options
        lr, (b1, b2), eps = o["lr"], o["betas"], o["eps"]
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            p, g = self.values[index], gradient.double()
            state = self.moments(index, p.shape)
            decay = o.get("weight_decay", 0.0)
            if not o.get("adam_w_mode", True):
                g = g + decay * p
                decay = 0.0
            state["m"] = b1 * state["m"] + (1 - b1) * g
            state["v"] = b2 * state["v"] + (1 - b2) * g * g
            is_corrected = o.get("bias_correction", True)
            m = state["m"] / (1 - b1 ** state["t"]) if is_corrected else state["m"]
            v = state["v"] / (1 - b2 ** state["t"]) if is_corrected else state["v"]
            self.values[index] = p - lr * (m / (v.sqrt() + eps) + decay * p)


class ReferenceLamb(Reference):
    """You et al., algorithm 2, after clipping all gradients to one norm."""

    def step(self, gradients, total=None):
        o = self.options
        lr, (b1, b2), eps, decay = o["lr"], o["betas"], o["eps"], o["weight_decay"]
        limit = o.get("max_grad_norm", 1.0)
        if total is None:
            total = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients if g is not None))
        factor = limit / total if limit and total > limit else 1.0
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            p, g = self.values[index], gradient.double() * factor
            state = self.moments(index, p.shape)
            is_decoupled = o.get("adam_w_mode", True)
            if not is_decoupled:
                g = g + decay * p
            state["m"] = b1 * state["m"] + ((1 - b1) if o.get("grad_averaging", True) else 1.0) * g
            state["v"] = b2 * state["v"] + (1 - b2) * g * g
            is_corrected = o.get("bias_correction", True)
            m = state["m"] / (1 - b1 ** state["t"]) if is_corrected else state["m"]
            v = state["v"] / (1 - b2 ** state["t"]) if is_corrected else state["v"]
            update = m / (v.sqrt() + eps)
            if is_decoupled:
                update = update + decay * p
            ratio = 1.0
            if decay or o.get("use_nvlamb", False):
                length, change = float(p.norm()), float(update.norm())
                ratio = length / change if length > 0 and change > 0 else 1.0
            self.values[index] = p - lr * ratio * update


class ReferenceNovoGrad(Reference):
    """Ginsburg et al., algorithm 1 (reg_inside_moment), and its variant with both outside the moment."""

    def step(self, gradients):
        o = self.options
        lr, (b1, b2), eps, decay = o["lr"], o["betas"], o["eps"], o.get("weight_decay", 0.0)
        share = (1 - b1) if o.get("grad_averaging", True) else 1.0
        is_corrected, is_maximum = o.get("bias_correction", True), o.get("norm_type", 2) == 0
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            p, g, state = self.values[index], gradient.double(), self.state[index]
            now = float(g.abs().max()) if is_maximum else float(g.pow(2).sum())
            t = state["t"] = state.get("t", 0) + 1
            if "v" not in state and not o.get("init_zero", False):
                state["v"] = now
            else:
                state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * now
            v = state["v"] / (1 - b2**t) if is_corrected else state["v"]
            denominator = (v if is_maximum else math.sqrt(v)) + eps
            m = state.get("m", torch.zeros_like(p))
            correction = 1 - b1**t if is_corrected else 1.0
            if o.get("reg_inside_moment", False):
                state["m"] = b1 * m + share * (g / denominator + decay * p)
                update = state["m"] / correction
            else:
                state["m"] = b1 * m + share * g
                update = state["m"] / correction / denominator + decay * p
            self.values[index] = p - lr * update


BASE = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-7}
CASES = [
    (FusedAdam, ReferenceAdam, {}),
    (FusedAdam, ReferenceAdam, {"weight_decay": 0.1}),
    (FusedAdam, ReferenceAdam, {"weight_decay": 0.1, "adam_w_mode": False}),
    (FusedAdam, ReferenceAdam, {"weight_decay": 0.1, "bias_correction": False}),
    (FusedAdam, ReferenceAdam, {"weight_decay": 0.1, "bias_correction": False, "adam_w_mode": False}),
    (FusedLAMB, ReferenceLamb, {"weight_decay": 0.01}),
    (FusedLAMB, ReferenceLamb, {"weight_decay": 0.0}),
    (FusedLAMB, ReferenceLamb, {"weight_decay": 0.0, "use_nvlamb": True}),
    (FusedLAMB, ReferenceLamb, {"weight_decay": 0.1, "adam_w_mode": False, "max_grad_norm": 0.3}),
    (FusedLAMB, ReferenceLamb, {"weight_decay": 0.1, "grad_averaging": False, "max_grad_norm": 0.0}),
    (FusedLAMB, ReferenceLamb, {"weight_decay": 0.1, "bias_correction": False, "max_grad_norm": 1e9}),
    (FusedNovoGrad, ReferenceNovoGrad, {}),
    (FusedNovoGrad, ReferenceNovoGrad, {"weight_decay": 0.1, "reg_inside_moment": True}),
    (FusedNovoGrad, ReferenceNovoGrad, {"weight_decay": 0.1, "init_zero": True}),
    (FusedNovoGrad, ReferenceNovoGrad, {"weight_decay": 0.1, "norm_type": 0, "grad_averaging": False}),
    (FusedNovoGrad, ReferenceNovoGrad, {"weight_decay": 0.1, "bias_correction": False, "init_zero": True}),
]
IDS = [f"{case[0].__name__}-{'-'.join(map(str, case[2].items())) or 'plain'}" for case in CASES]


def parameters_of(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES
    ]


def gradients_of(step, dtype=torch.float64, missing=()):
    generator = torch.Generator().manual_seed(100 + step)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    return [None if index in missing else gradient for index, gradient in enumerate(drawn)]


def set_gradients(parameters, gradients):
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()


@pytest.mark.parametrize(("fused", "reference", "options"), CASES, ids=IDS)
def test_updates_are_those_of_the_papers(fused, reference, options):
    parameters = parameters_of()
    optimizer, expected = fused(parameters, **BASE, **options), reference(parameters, {**BASE, **options})
    for step in range(5):
        # Gradients that come late, and that stay away: each parameter counts its own updates.
        gradients = gradients_of(step, missing={0: (1, 3), 1: (1,), 3: (4,)}.get(step, ()))
        set_gradients(parameters, gradients)
        optimizer.step()
        expected.step(gradients)
        for parameter, value in zip(parameters, expected.values, strict=True):
            torch.testing.assert_close(parameter.detach(), value, rtol=1e-10, atol=1e-12)
    assert all("step" in optimizer.state[parameter] for parameter in parameters)


@pytest.mark.parametrize("fused", [FusedAdam, FusedLAMB, FusedNovoGrad])
def test_no_gradients_change_nothing(fused):
    parameters = parameters_of()
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = fused(parameters, weight_decay=0.1)
    optimizer.step()
    for parameter, value in zip(parameters, before, strict=True):
        assert torch.equal(parameter, value)
    assert not optimizer.state


@pytest.mark.parametrize("fused", [FusedAdam, FusedLAMB, FusedNovoGrad])
def test_groups_have_their_own_options_and_schedulers_reach_them(fused):
    parameters, twins = parameters_of(), parameters_of()
    together = fused([{"params": parameters[:2], "weight_decay": 0.3}, {"params": parameters[2:], "lr": 0.2}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(together, 1, gamma=0.5)
    options = {"max_grad_norm": None} if fused is FusedLAMB else {}
    if options:
        for group in together.param_groups:
            group.update(options)
    apart = [fused(twins[:2], lr=0.1, weight_decay=0.3, **options), fused(twins[2:], lr=0.2, **options)]
    for step in range(3):
        set_gradients(parameters, gradients_of(step))
        set_gradients(twins, gradients_of(step))
        together.step()
        scheduler.step()
        for optimizer in apart:
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.5
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter, twin, rtol=0, atol=0)


def test_lamb_clips_by_one_norm_over_all_groups():
    parameters = parameters_of()
    options = {**BASE, "weight_decay": 0.1, "max_grad_norm": 0.5}
    optimizer = FusedLAMB([{"params": parameters[:2]}, {"params": parameters[2:]}], **options)
    expected = ReferenceLamb(parameters, options)
    gradients = gradients_of(0)
    set_gradients(parameters, gradients)
    optimizer.step()
    expected.step(gradients)
    for parameter, value in zip(parameters, expected.values, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [FusedAdam, FusedLAMB, FusedNovoGrad])
def test_state_dict_round_trip_continues_exactly(fused, dtype):
    parameters = parameters_of(dtype)
    optimizer = fused(parameters, lr=0.02, weight_decay=0.1)
    for step in range(2):
        set_gradients(parameters, gradients_of(step, dtype))
        optimizer.step()
    twins = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = fused(twins, lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(2, 4):
        for each in (parameters, twins):
            set_gradients(each, gradients_of(step, dtype))
        optimizer.step()
        resumed.step()
    for parameter, twin in zip(parameters, twins, strict=True):
        assert torch.equal(parameter, twin)
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, resumed.state[twin][key]) and value.dtype == resumed.state[twin][key].dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("fused", "reference"), [(FusedAdam, ReferenceAdam), (FusedLAMB, ReferenceLamb), (FusedNovoGrad, ReferenceNovoGrad)]
)
def test_half_precision_is_updated_in_fp32_and_rounded_once(fused, reference, dtype):
    parameters = parameters_of(dtype)
    options = {**BASE, "weight_decay": 0.1}
    optimizer = fused(parameters, **options)
    expected = reference(parameters, options)
    for step in range(6):
        gradients = gradients_of(step, dtype)
        set_gradients(parameters, gradients)
        optimizer.step()
        expected.step(gradients)
        expected.values = [value.to(dtype).double() for value in expected.values]
    # One rounding in the last place, at most, where the fp32 result lies near the middle.
    unit = torch.finfo(dtype).eps
    for parameter, value in zip(parameters, expected.values, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=unit, atol=unit * 0.05)
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert {moment.dtype for moment in moments} == {torch.float32}


def test_master_weights_collect_updates_below_the_rounding():
    kept, rounded = (torch.nn.Parameter(torch.full((4,), 256.0, dtype=torch.bfloat16)) for _ in range(2))
    optimizers = [FusedAdam([kept], lr=0.1, master_weights=True), FusedAdam([rounded], lr=0.1)]
    for _ in range(40):
        for parameter in (kept, rounded):
            parameter.grad = torch.ones_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(rounded, torch.full((4,), 256.0, dtype=torch.bfloat16))
    assert torch.equal(kept, torch.full((4,), 252.0, dtype=torch.bfloat16))
    twin = torch.nn.Parameter(kept.detach().clone())
    resumed = FusedAdam([twin], lr=0.1, master_weights=True)
    resumed.load_state_dict(optimizers[0].state_dict())
    master = resumed.state[twin]["master_param"]
    assert master.dtype == torch.float32 and torch.equal(master, optimizers[0].state[kept]["master_param"])


def test_adam_is_torchs_fused_adamw():
    parameters, twins = parameters_of(torch.float32), parameters_of(torch.float32)
    optimizer = FusedAdam(parameters, lr=0.01, weight_decay=0.1)
    torchs = torch.optim.AdamW(twins, lr=0.01, weight_decay=0.1, fused=True)
    for step in range(3):
        for each in (parameters, twins):
            set_gradients(each, gradients_of(step, torch.float32))
        optimizer.step()
        torchs.step()
    for parameter, twin in zip(parameters, twins, strict=True):
        assert torch.equal(parameter, twin)


def test_closures_and_zeroing():
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = FusedAdam([parameter], lr=0.1, set_grad_none=False)

    def closure():
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0 and parameter.item() < 2.0
    optimizer.zero_grad()
    assert torch.equal(parameter.grad, torch.zeros(1))
    optimizer.zero_grad(set_to_none=True)
    assert parameter.grad is None
    by_default = FusedNovoGrad([parameter])
    parameter.grad = torch.ones(1)
    by_default.zero_grad()
    assert parameter.grad is None


@pytest.mark.parametrize("fused", [FusedAdam, FusedLAMB, FusedNovoGrad])
def test_bad_arguments(fused):
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match="AMSGrad"):
        fused([parameter], amsgrad=True)
    wrong = [({"lr": -1.0}, "lr must be >= 0"), ({"betas": (0.9, 1.0)}, "betas must be in"), ({"eps": -1}, "eps")]
    for option, message in wrong:
        with pytest.raises(SMPConfigError, match=message):
            fused([parameter], **option)
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        fused(table.parameters()).step()
    if fused is FusedNovoGrad:
        with pytest.raises(SMPConfigError, match="norm_type"):
            fused([parameter], norm_type=1)


def test_names_and_what_they_say_of_themselves():
    import smdistributed.modelparallel.torch.optimizers as by_alias

    import modelparallel as smp

    assert by_alias is smp.optimizers
    assert FusedLamb is FusedLAMB is by_alias.FusedLAMB
    assert (FusedAdam.is_elementwise, FusedLAMB.is_elementwise, FusedNovoGrad.is_elementwise) == (True, False, False)


class Tied(torch.nn.Module):
    """Layers that are cut, layers that are not, and on two stages one weight under two names."""

    def __init__(self):
        super().__init__()
        import modelparallel as smp

        torch.manual_seed(3)
        self.table = torch.nn.Embedding(12, 8)
        with smp.tensor_parallelism():
            self.first = torch.nn.Linear(8, 16)
        self.norm = torch.nn.LayerNorm(16)
        with smp.tensor_parallelism():
            self.second = torch.nn.Linear(16, 8)
        self.head = torch.nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight
        self.double()

    def forward(self, ids):
        return self.head(self.second(torch.tanh(self.norm(self.first(self.table(ids))))))


def train_tied(make_optimizer, is_distributed):
    import modelparallel as smp

    model = Tied()
    ids = torch.arange(24).reshape(4, 6) % 12
    targets = (ids * 5 + 1) % 12
    if is_distributed:
        model = smp.DistributedModel(model)
    optimizer = make_optimizer(model.parameters())
    if is_distributed:
        optimizer = smp.DistributedOptimizer(optimizer)

    def body(model, ids, targets):
        loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="mean")
        model.backward(loss) if is_distributed else loss.backward()
        return loss

    run = smp.step(body) if is_distributed else body
    for _ in range(3):
        optimizer.zero_grad()
        run(model, ids, targets)
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def lamb(parameters):
    return FusedLAMB(parameters, lr=0.05, weight_decay=0.1, max_grad_norm=0.01)


def novograd(parameters):
    return FusedNovoGrad(parameters, lr=0.05, weight_decay=0.1)


def novograd_of_maxima(parameters):
    return FusedNovoGrad(parameters, lr=0.05, weight_decay=0.1, norm_type=0, init_zero=True)


def compare_with_one_process():
    for make_optimizer in (lamb, novograd, novograd_of_maxima):
        expected = train_tied(make_optimizer, False)
        found = train_tied(make_optimizer, True)
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-9, atol=1e-12, msg=f"{make_optimizer.__name__} {name}"
            )
    return True


@pytest.mark.parametrize(("num_ranks", "parameters"), [
    (2, {"tensor_parallel_degree": 2, "ddp": True}),
    (2, {"pipeline_parallel_degree": 2, "microbatches": 2}),
    (2, {"pipeline_parallel_degree": 2, "microbatches": 2, "tied_weights": "replicate"}),
    (4, {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2, "ddp": True}),
])  # fmt: skip
def test_norms_are_those_of_the_whole_model(num_ranks, parameters):
    assert all(run_ranks(compare_with_one_process, num_ranks, parameters=parameters))
