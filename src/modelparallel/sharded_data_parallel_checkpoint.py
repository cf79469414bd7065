"""``smp.sharded_data_parallel_checkpoint``, a module path of the original API."""

from modelparallel.checkpoints.tools.sharded_data_parallel import (
    get_full_state_dict_from_sharded_data_parallel_checkpoint,
)

__all__ = ["get_full_state_dict_from_sharded_data_parallel_checkpoint"]
