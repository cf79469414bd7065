"""The exception tree of the library; every error that a user can cause is one of these.

    SMPError
    |-- SMPConfigError (ValueError)              a configuration value is wrong, or values do not fit together
    |   `-- NotBuiltError                        the configuration asks for a feature that does not exist yet
    |-- TensorParallelError (ValueError)         a layer cannot be split over the tensor-parallel group
    |-- GroupMembershipError (ValueError)        a rank outside the group, or a message to oneself
    |-- GroupTypeError (TypeError)               something that is not a CommGroup or a RankType where one is needed
    |-- NotInitializedError (RuntimeError)       used before smp.init()
    |-- StepUsageError (RuntimeError)            a model, or backward, used outside the place where it may be used
    |-- AbsentTensorError (RuntimeError)         a weight that lives on another stage is read outside a step
    |-- PartitionError (RuntimeError)            the model cannot be placed on the stages as asked
    |-- CannotTraceError                         the step function cannot run on the unsplit model; never reaches users
    |-- ScheduleError (ValueError)               a pipeline schedule, or what it is made from, breaks a rule
    |-- DivergenceError (RuntimeError)           the ranks did not run the same program
    |-- RecomputationError (RuntimeError)        a region cannot be recomputed, or came out differently
    |-- LaunchError (RuntimeError)               a job could not be started, or one of its processes failed
    |-- DeferredTensorError (RuntimeError)       a tensor whose initialisation is delayed cannot be made as it was asked
    |-- OutOfMemoryError (RuntimeError, MemoryError)    a rank has run out of memory; says what it holds and what helps
    |-- CommunicationError (RuntimeError)        a message could not be delivered
    |   `-- WaitTimeoutError (TimeoutError)      a message did not come in time; says who waits for what from whom
    `-- UnsupportedError (NotImplementedError)   a combination that the library refuses by design

The second base class lets a script that catches the built-in exception go on working. Messages name the value, the
cause and the remedy.
"""


class SMPError(Exception):
    """Base of every error that this library raises on purpose."""


class SMPConfigError(SMPError, ValueError):
    """A configuration value is wrong, unknown, or does not fit the other values or the number of processes."""


class NotBuiltError(SMPConfigError):
    """The configuration asks for a feature that this version does not have yet."""


class TensorParallelError(SMPError, ValueError):
    """A layer cannot be split over the tensor-parallel group as asked."""


class GroupMembershipError(SMPError, ValueError):
    """A rank that is not in the group was named as a peer, or a rank named itself."""


class GroupTypeError(SMPError, TypeError):
    """An argument must be a `CommGroup` or a `RankType`, and is something else."""


class NotInitializedError(SMPError, RuntimeError):
    """The library is used before `smp.init()`."""


class StepUsageError(SMPError, RuntimeError):
    """A model, or its backward, is used outside the place where it may be used."""


class AbsentTensorError(SMPError, RuntimeError):
    """A parameter or buffer that lives on another pipeline stage is read where only its home has its values."""


class PartitionError(SMPError, RuntimeError):
    """The model cannot be placed on the pipeline stages as asked."""


class CannotTraceError(SMPError):
    """The body of the step function cannot run on unsplit models; the plan is made without a trace."""


class ScheduleError(SMPError, ValueError):
    """A pipeline schedule, or the chain of visits it is made for, breaks a rule; the text says which one and where."""


class DivergenceError(SMPError, RuntimeError):
    """The ranks did not run the same program, or hold values that must be equal and are not."""


class RecomputationError(SMPError, RuntimeError):
    """A region with activation checkpointing cannot be run again, or its second run differs from the first."""


class LaunchError(SMPError, RuntimeError):
    """A job could not be started, or one of its processes failed."""


class DeferredTensorError(SMPError, RuntimeError):
    """A tensor whose initialisation is delayed cannot be made as it would have been at once."""


class OutOfMemoryError(SMPError, RuntimeError, MemoryError):
    """A rank has run out of memory; the text says what it holds, what was predicted, and what would help."""


class CommunicationError(SMPError, RuntimeError):
    """A message could not be delivered."""


class WaitTimeoutError(CommunicationError, TimeoutError):
    """A message did not come in time; the text says who waits for what from whom."""


class UnsupportedError(SMPError, NotImplementedError):
    """A combination that the library refuses by design."""


class CheckpointError(SMPError, RuntimeError):
    """A checkpoint cannot be written or read."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such checkpoint, or no file of it."""


class CheckpointCorruptError(CheckpointError):
    """A checkpoint is not complete, or its files are not what was written."""


#: What a script can do where a module cannot be called inside those of other stages; the end of several messages.
REMEDY_FOR_GUESTS = (
    "call it between the modules and hand its output to them, give each of them one of its own, or place it and the "
    "modules that call it on one stage (auto_partition: False, smp.set_partition)"
)
