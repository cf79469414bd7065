"""Prints docs/configuration.md from the configuration table.

Run `python -m modelparallel.config.reference > docs/configuration.md` after a change of the table.
"""

from typing import Any

from modelparallel.config.reading import ENVIRONMENT_WITHOUT_EFFECT, FOREIGN_KEYS, NOT_BUILT
from modelparallel.config.table import Config, public_key

_OPENING = """# Configuration

<!-- Written by `python -m modelparallel.config.reference > docs/configuration.md`; a test compares the two. -->

Parameters are given in the `parameters` dictionary of the estimator's `distribution`, by `modelparallel run
--parameters` (JSON, or the path of a JSON file), or to `smp.init(dict)`. A launcher hands them to its processes in
the environment variable `SM_HP_MP_PARAMETERS`, which wins over equal keys of the dict given to `smp.init`.
`smp.state.cfg` holds the values in force, and `smp.state.cfg.sources` says for each whether it came from the
"environment", from "init" or is the "default". A second `smp.init` adds keys that are new; a key that contradicts the
first call is ignored with a warning.

Whole numbers must not be bools; 0 and 1 serve as bools; `"4"` and `"True"` are read as the values they spell; numbers
of elements and bytes may be written as 5e8. An unknown key is an error that names the nearest one; an unknown key that
starts with `_` only warns. Every error is raised before any process is started, or by `smp.init`; it is a
`SMPConfigError` (a `ValueError`) that names key, value and remedy.

## Parameters

| Parameter | Type | Default | Valid | Meaning |
|---|---|---|---|---|
"""

_RULES = """
## Rules between parameters

- `pipeline_parallel_degree * tensor_parallel_degree` divides the number of processes.
- `tensor_parallel_degree` > 1, `sharded_data_parallel_degree` > 1, `shard_optimizer_state`, and more than one copy of
  the model (more processes than `pipeline_parallel_degree * tensor_parallel_degree`) need `ddp: True`.
- `ddp_port` and `ddp_dist_backend` need the key `ddp`. `ddp` and `horovod` cannot be used together.
- `sharded_data_parallel_degree` divides the data parallel degree, and with tensor parallelism the number of processes
  that hold the same slice. It excludes `shard_optimizer_state`: optimizer state is sharded with the parameters.
- `auto_partition: False` needs `default_partition`; `load_partition: True` needs `partition_file`.
- `fp16` and `bf16` are exclusive.
"""

_VARIABLES = """

## Environment variables

- `MODELPARALLEL_DEVICE=cpu` runs on the CPU although there is a GPU; `cuda` ends with an error where there is none. The
  launcher sets it to the device that it was given, or that `auto` found.
- `SMP_TIMEOUT=<seconds>` is `timeout_seconds` where that is not given. Anything but a number > 0 is an error.
- `SMP_TRUST_PICKLES=1` and `SMP_ALLOWED_TYPES=module.Class,...` are `trust_pickles` and `allowed_types` where those are
  not given ([checkpoints](checkpoints.md#what-objects-are-opened)).
- `SMP_EVENT_DIR=<directory>` and `SMP_EVENTS=error|exit|off` say where and when a rank writes down its last events
  ([diagnosis](diagnosis.md)).
"""


def configuration_markdown() -> str:
    """The text of docs/configuration.md."""
    lines = [_row(name) for name in Config.model_fields]
    not_built = [f"- `{entry}`: {feature}" for entry, feature in sorted(NOT_BUILT.items())]
    foreign = [f"- `{key}`: {reason}" for key, reason in FOREIGN_KEYS.items()]
    variables = [f"- `{name}`: {meaning}" for name, meaning in ENVIRONMENT_WITHOUT_EFFECT.items()]
    return (
        _OPENING
        + "\n".join(lines)
        + "\n"
        + _RULES
        + "\n## Not built yet\n\nA value other than the default stops with an error that says so.\n\n"
        + "\n".join(not_built)
        + "\n\n## Accepted without effect\n\nKeys, each with a notice in the log:\n\n"
        + "\n".join(foreign)
        + "\n\nEnvironment variables of the original library, each with a notice in the log:\n\n"
        + "\n".join(variables)
        + _VARIABLES
    )


def _row(name: str) -> str:
    info: Any = Config.model_fields[name]
    extra = info.json_schema_extra
    key = public_key(name)
    title = f"`{key}`" + (" (also `partitions`)" if key == "pipeline_parallel_degree" else "")
    default = extra["default_text"] or ("none" if info.default is None else f"`{info.default}`")
    valid = extra["valid"] or ", ".join(f"`{choice}`" for choice in extra["choices"]) or "-"
    return f"| {title} | {extra['kind']} | {default} | {valid} | {info.description} |"


if __name__ == "__main__":
    print(configuration_markdown(), end="")
