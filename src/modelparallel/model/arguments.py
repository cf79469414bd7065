"""The checks of what ``smp.DistributedModel`` is given."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from modelparallel.errors import SMPConfigError, StepUsageError
from modelparallel.model.questions import ModelParameters


def check_arguments(
    module: nn.Module,
    trace_device: str,
    trace_execution_times: bool,
    backward_passes_per_step: int,
    bucket_cap_mb: float,
) -> None:
    if isinstance(module, ModelParameters):
        raise StepUsageError("smp.DistributedModel was given a smp.DistributedModel: wrap the model once")
    if isinstance(module, torch.nn.parallel.DistributedDataParallel):
        raise StepUsageError(
            "smp.DistributedModel was given a DistributedDataParallel: give the model itself; data parallelism is "
            "built in (ddp: True)"
        )
    if not isinstance(module, nn.Module):
        raise SMPConfigError(f"smp.DistributedModel: expected an nn.Module, got {type(module).__name__}")
    if isinstance(module, torch.jit.ScriptModule):
        raise SMPConfigError("smp.DistributedModel: a ScriptModule cannot be partitioned: give the original nn.Module")
    for part in module.modules():
        if part is not module and isinstance(part, (ModelParameters, torch.nn.parallel.DistributedDataParallel)):
            raise StepUsageError(
                f"smp.DistributedModel: the model contains a {type(part).__name__}: wrap the whole model once, "
                "without it"
            )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            kind = type(module.get_submodule(name.rpartition(".")[0])).__name__
            raise StepUsageError(
                f"'{name}' of a lazy module ({kind}) has no shape yet, so that it cannot be placed: call the model "
                "once on an example batch before it is wrapped, on all ranks\n"
                "  wrong: model = smp.DistributedModel(model)\n"
                "  right: with torch.no_grad():\n"
                "             model(example)\n"
                "         model = smp.DistributedModel(model)"
            )
    if trace_device not in ("cpu", "gpu"):
        raise SMPConfigError(f'trace_device: must be "cpu" or "gpu", got {trace_device!r}')
    if trace_device == "cpu" and trace_execution_times:
        raise SMPConfigError(
            'trace_execution_times=True needs trace_device="gpu": times on the CPU say nothing about those on the '
            "device; leave one of them out"
        )
    if (
        isinstance(backward_passes_per_step, bool)
        or not isinstance(backward_passes_per_step, int)
        or backward_passes_per_step < 1
    ):
        raise SMPConfigError(f"backward_passes_per_step: expected int >= 1, got {backward_passes_per_step!r}")
    if bucket_cap_mb <= 0:
        raise SMPConfigError(f"bucket_cap_mb: expected a size > 0 in MiB, got {bucket_cap_mb!r}")
