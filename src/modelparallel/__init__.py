"""The public namespace of modelparallel, usually imported as ``smp``.

``import modelparallel as smp`` and ``import smdistributed.modelparallel.torch as smp`` give the same module.
"""

from modelparallel import amp as amp
from modelparallel import model as model
from modelparallel import nn as nn
from modelparallel import optimizers as optimizers
from modelparallel import patches as patches
from modelparallel.checkpoints.huggingface.exporting import export_hf
from modelparallel.checkpoints.huggingface.importing import import_hf
from modelparallel.checkpoints.resuming import resume_from_checkpoint
from modelparallel.checkpoints.sampling import GlobalBatchSampler
from modelparallel.checkpoints.saving import save_checkpoint
from modelparallel.checkpoints.whole.objects import load, save
from modelparallel.config.topology import CommGroup, RankType
from modelparallel.job.messages import (
    allgather,
    barrier,
    broadcast,
    dp_barrier,
    dp_rank,
    dp_size,
    get_dp_group,
    get_dp_process_group,
    get_mp_group,
    get_mp_process_group,
    get_pp_group,
    get_pp_process_group,
    get_rdp_group,
    get_rdp_process_group,
    get_tp_group,
    get_tp_process_group,
    get_world_process_group,
    local_rank,
    local_size,
    mp_barrier,
    mp_rank,
    mp_size,
    pp_rank,
    pp_size,
    rank,
    rdp_rank,
    rdp_size,
    recv_from,
    send,
    size,
    tp_rank,
    tp_size,
)
from modelparallel.job.preemption import EXIT_PREEMPTED
from modelparallel.model import DistributedModel
from modelparallel.model.creation import delay_param_initialization, delayed_parameter_initialization, model_creation
from modelparallel.model.placing import set_partition
from modelparallel.model.weight_copies import average_weights, copy_weights
from modelparallel.optimizer.wrapper import DistributedOptimizer
from modelparallel.pipeline.batch_lists import SampleList
from modelparallel.pipeline.operations.calls import mark_dynamic as dynamic
from modelparallel.state_mod import state
from modelparallel.stepping.function import is_tracing, num_microbatches, step
from modelparallel.stepping.output import StepOutput
from modelparallel.stepping.recomputed import (
    checkpoint,
    checkpoint_sequential,
    checkpoint_wrapper,
    set_activation_checkpointing,
)
from modelparallel.tensor_parallel.contexts import (
    partition,
    set_tensor_parallelism,
    tensor_parallelism,
    tp_register,
    tp_register_with_module,
)
from modelparallel.training.data_of_ranks import data_sampler
from modelparallel.training.gradient_norm import clip_grad_norm_
from modelparallel.training.memory_report import memory_report
from modelparallel.training.preemption import preemption_requested
from modelparallel.training.runtime import init, is_initialized
from modelparallel.version import __version__

WORLD = CommGroup.WORLD
MP_GROUP = CommGroup.MP_GROUP
DP_GROUP = CommGroup.DP_GROUP
TP_GROUP = CommGroup.TP_GROUP
PP_GROUP = CommGroup.PP_GROUP
RDP_GROUP = CommGroup.RDP_GROUP

__all__ = [
    "DP_GROUP",
    "EXIT_PREEMPTED",
    "MP_GROUP",
    "PP_GROUP",
    "RDP_GROUP",
    "TP_GROUP",
    "WORLD",
    "CommGroup",
    "DistributedModel",
    "DistributedOptimizer",
    "GlobalBatchSampler",
    "RankType",
    "SampleList",
    "StepOutput",
    "__version__",
    "allgather",
    "amp",
    "average_weights",
    "barrier",
    "broadcast",
    "checkpoint",
    "checkpoint_sequential",
    "checkpoint_wrapper",
    "clip_grad_norm_",
    "copy_weights",
    "data_sampler",
    "delay_param_initialization",
    "delayed_parameter_initialization",
    "dp_barrier",
    "dp_rank",
    "dp_size",
    "dynamic",
    "export_hf",
    "get_dp_group",
    "get_dp_process_group",
    "get_mp_group",
    "get_mp_process_group",
    "get_pp_group",
    "get_pp_process_group",
    "get_rdp_group",
    "get_rdp_process_group",
    "get_tp_group",
    "get_tp_process_group",
    "get_world_process_group",
    "import_hf",
    "init",
    "is_initialized",
    "is_tracing",
    "load",
    "local_rank",
    "local_size",
    "memory_report",
    "model",
    "model_creation",
    "mp_barrier",
    "mp_rank",
    "mp_size",
    "nn",
    "num_microbatches",
    "optimizers",
    "partition",
    "patches",
    "pp_rank",
    "pp_size",
    "preemption_requested",
    "rank",
    "rdp_rank",
    "rdp_size",
    "recv_from",
    "resume_from_checkpoint",
    "save",
    "save_checkpoint",
    "send",
    "set_activation_checkpointing",
    "set_partition",
    "set_tensor_parallelism",
    "size",
    "state",
    "step",
    "tensor_parallelism",
    "tp_rank",
    "tp_register",
    "tp_register_with_module",
    "tp_size",
]
