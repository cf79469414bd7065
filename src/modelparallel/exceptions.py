"""The exceptions under the module path of the original API (smp-api section 1); they are defined in ``errors.py``."""

from modelparallel.errors import (
    CommunicationError,
    DivergenceError,
    GroupMembershipError,
    GroupTypeError,
    LaunchError,
    NotBuiltError,
    NotInitializedError,
    PartitionError,
    RecomputationError,
    ScheduleError,
    SMPConfigError,
    SMPError,
    StepUsageError,
    TensorParallelError,
    UnsupportedError,
    WaitTimeoutError,
)

__all__ = [
    "CommunicationError",
    "DivergenceError",
    "GroupMembershipError",
    "GroupTypeError",
    "LaunchError",
    "NotBuiltError",
    "NotInitializedError",
    "PartitionError",
    "RecomputationError",
    "SMPConfigError",
    "SMPError",
    "ScheduleError",
    "StepUsageError",
    "TensorParallelError",
    "UnsupportedError",
    "WaitTimeoutError",
]
