"""Configuration: types, ranges, aliases, sources, rules between keys, and the estimator's `distribution` dict."""

import json
from pathlib import Path

import pytest

from modelparallel.config import reading as config_module
from modelparallel.config.reading import (
    NOT_BUILT,
    load_config,
    merge_second_init,
    parse_parameters,
    validate_parameters,
)
from modelparallel.config.reference import configuration_markdown
from modelparallel.config.table import CONFIGURATION_KEYS, Config
from modelparallel.errors import NotBuiltError, SMPConfigError
from modelparallel.launch.distribution import validate_distribution

ALL_KEYS = [
    "pipeline_parallel_degree",
    "partitions",
    "microbatches",
    "active_microbatches",
    "pipeline",
    "optimize",
    "placement_strategy",
    "auto_partition",
    "default_partition",
    "memory_weight",
    "ddp",
    "ddp_port",
    "ddp_dist_backend",
    "deterministic_server",
    "tensor_parallel_degree",
    "prescaled_batch",
    "shard_optimizer_state",
    "offload_activations",
    "activation_loading_horizon",
    "skip_tracing",
    "fp16",
    "fp16_params",
    "bf16",
    "sharded_data_parallel_degree",
    "sdp_reduce_bucket_size",
    "sdp_param_persistence_threshold",
    "sdp_max_live_parameters",
    "sdp_hierarchical_allgather",
    "sdp_gradient_clipping",
    "partition_file",
    "load_partition",
    "static_mode",
    "fast_mode",
    "checkpoint_attentions",
    "_match_weights",
    "_fp32_grad_accumulation",
]

MPI = {
    "enabled": True,
    "processes_per_host": 8,
    "custom_mpi_options": "--mca btl_vader_single_copy_mechanism none ",
}
SEED_TENSOR = {
    "pipeline_parallel_degree": 1,
    "placement_strategy": "cluster",
    "tensor_parallel_degree": 4,
    "ddp": True,
}
SEED_PIPELINE = {
    "microbatches": 4,
    "pipeline_parallel_degree": 2,
    "placement_strategy": "cluster",
    "tensor_parallel_degree": 2,
    "ddp": True,
}


def load(parameters: object = None, environment: object = None, **environ: str) -> Config:
    if environment is not None:
        environ["SM_HP_MP_PARAMETERS"] = environment if isinstance(environment, str) else json.dumps(environment)
    return load_config(parameters, environ)


def distribution(parameters: object = SEED_TENSOR, mpi: object = MPI) -> dict[str, object]:
    return {"smdistributed": {"modelparallel": {"enabled": True, "parameters": parameters}}, "mpi": mpi}


def test_defaults() -> None:
    config = load()
    for key in ALL_KEYS:
        assert hasattr(config, key), key
    expected = {
        "partitions": 1, "microbatches": 1, "active_microbatches": 1, "pipeline": "interleaved", "optimize": "memory",
        "placement_strategy": "cluster", "auto_partition": True, "default_partition": 0, "memory_weight": 0.8,
        "ddp": False, "ddp_port": 7777, "ddp_dist_backend": "auto", "activation_loading_horizon": 4,
        "sdp_reduce_bucket_size": 500_000_000, "sdp_param_persistence_threshold": 1_000_000,
        "sdp_max_live_parameters": 1_000_000_000, "sdp_hierarchical_allgather": True, "sdp_gradient_clipping": 1.0,
        "partition_file": None, "fp16": False, "_match_weights": False, "uneven_microbatches": "exact",
        "virtual_pipeline_degree": 1, "memory_limit": None, "tied_weights": "colocate", "sdp_gather": "auto",
        "seed": None, "debug": False, "timeout_seconds": 600.0, "push_limit_bytes": 65536,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected
    assert set(config.sources.values()) == {"default"}
    assert config.notices == ()


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().microbatches = 3


def test_derived_defaults() -> None:
    config = load({"partitions": 2, "microbatches": 8})
    assert (config.pipeline_parallel_degree, config.partitions, config.active_microbatches) == (2, 2, 4)
    assert load({"microbatches": 2, "active_microbatches": 5}).active_microbatches == 2
    assert load({"ddp": True}, MASTER_PORT="1234").ddp_port == 1234
    assert load({"ddp": True, "ddp_port": 5}, MASTER_PORT="1234").ddp_port == 5


def test_c013_environment_over_init() -> None:
    config = load({"microbatches": 2, "seed": 1}, {"microbatches": 4})
    assert config.microbatches == 4
    assert config.sources["microbatches"] == "environment"
    assert (config.sources["seed"], config.sources["ddp"]) == ("init", "default")
    assert "microbatches: 2 given to smp.init, 4 in SM_HP_MP_PARAMETERS" in config.notices[0]


@pytest.mark.parametrize("text", ["", "{}"])
def test_empty_environment_is_none(text: str) -> None:
    assert load({"microbatches": 2}, text).sources["microbatches"] == "init"


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"ddp": 1}, ("ddp", True)),
        ({"ddp": 0}, ("ddp", False)),
        ({"ddp": "True"}, ("ddp", True)),
        ({"skip_tracing": "false"}, ("skip_tracing", False)),
        ({"microbatches": "4"}, ("microbatches", 4)),
        ({"memory_weight": "0.25"}, ("memory_weight", 0.25)),
        ({"memory_weight": 1}, ("memory_weight", 1.0)),
        ({"sdp_reduce_bucket_size": 5e8}, ("sdp_reduce_bucket_size", 500_000_000)),
        ({"sdp_max_live_parameters": "1e9"}, ("sdp_max_live_parameters", 10**9)),
        ({"memory_limit": "2e9"}, ("memory_limit", 2 * 10**9)),
        ({"memory_limit": None}, ("memory_limit", None)),
        ({"pipeline": "zero_bubble"}, ("pipeline", "zero_bubble")),
        ({"pipeline": "_only_forward"}, ("pipeline", "_only_forward")),
        ({"_match_weights": True}, ("_match_weights", True)),
        ({"placement_strategy": "TDP"}, ("placement_strategy", "TDP")),
        ({"partition_file": Path("plan.json")}, ("partition_file", "plan.json")),
    ],
)
def test_accepted_forms(parameters: dict[str, object], expected: tuple[str, object]) -> None:
    key, value = expected
    read = getattr(load(parameters), key)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"microbatches": 0}, r"microbatches: expected int >= 1, got 0 \(from smp.init\)"),
        ({"microbatches": True}, "microbatches: expected int >= 1, got bool True"),
        ({"microbatches": 2.0}, "microbatches: expected int >= 1, got float 2.0"),
        ({"microbatches": "many"}, "microbatches: expected int >= 1, got str 'many'"),
        ({"microbatches": None}, "microbatches: expected int >= 1, got NoneType None"),
        ({"pipeline_parallel_degree": 0}, "pipeline_parallel_degree: expected int >= 1, got 0"),
        ({"partitions": 0}, "pipeline_parallel_degree: expected int >= 1, got 0"),
        ({"ddp": 2}, "ddp: expected bool, got int 2"),
        ({"ddp": "maybe"}, "ddp: expected bool, got str 'maybe'"),
        ({"pipeline": "fast"}, "pipeline: must be one of 'interleaved', 'simple', 'zero_bubble', '_only_forward', got"),
        ({"virtual_pipeline_degree": 0}, "virtual_pipeline_degree: expected int >= 1, got 0"),
        ({"memory_limit": 0}, "memory_limit: expected int > 0, got 0"),
        ({"memory_limit": "much"}, "memory_limit: expected int > 0, got str 'much'"),
        ({"tied_weights": "copy"}, "tied_weights: must be one of 'colocate', 'replicate', 'auto', got 'copy'"),
        ({"pipeline": "simple\n"}, "pipeline: must be one of"),
        ({"optimize": 3}, "optimize: must be one of 'memory', 'speed', got int 3"),
        ({"placement_strategy": "DDT"}, "placement_strategy: not a permutation of D,P,T"),
        ({"memory_weight": 1.3}, r"memory_weight: expected float 0.0..1.0, got 1.3"),
        ({"memory_weight": float("nan")}, "memory_weight: expected float"),
        ({"ddp": True, "ddp_port": 70000}, r"ddp_port: expected int 0..65535, got 70000"),
        ({"sdp_reduce_bucket_size": 0}, "sdp_reduce_bucket_size: expected int > 0, got 0"),
        ({"sdp_reduce_bucket_size": 0.5}, "sdp_reduce_bucket_size: expected int > 0, got float 0.5"),
        ({"activation_loading_horizon": 0}, "activation_loading_horizon: expected int >= 1, got 0"),
        ({"partition_file": 3}, "partition_file: expected str, got int 3"),
        ({"timeout_seconds": 0}, "timeout_seconds: expected float > 0, got"),
        ({3: 4}, "a parameter's key must be a str, got int 3"),
        (["microbatches"], "smp.init: expected a dict of parameters"),
    ],
)
def test_refused_values(parameters: object, message: str) -> None:
    with pytest.raises(SMPConfigError, match=message):
        load(parameters)


def test_all_wrong_values_are_reported_at_once() -> None:
    with pytest.raises(SMPConfigError) as caught:
        load({"microbatches": 0, "ddp": 7})
    assert str(caught.value).splitlines() == [
        "microbatches: expected int >= 1, got 0 (from smp.init)",
        "ddp: expected bool, got int 7 (from smp.init)",
    ]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"partitions": 2, "pipeline_parallel_degree": 4}, "two names of one parameter"),
        ({"tensor_parallel_degree": 2}, "tensor_parallel_degree>1 requires ddp: True"),
        ({"partitions": 2, "default_partition": 2}, r"default_partition=2 is outside 0\.\.1"),
        ({"load_partition": True}, "needs partition_file"),
        ({"ddp_port": 80}, "ddp_port: 80 needs ddp"),
        ({"ddp_dist_backend": "nccl"}, "ddp_dist_backend: 'nccl' needs ddp"),
        ({"horovod": True, "ddp": True}, "cannot be used together with ddp"),
        ({"shard_optimizer_state": True}, "requires ddp"),
        ({"sharded_data_parallel_degree": 2}, "requires ddp"),
    ],
)
def test_rules(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(SMPConfigError, match=message) as caught:
        load(parameters)
    assert not isinstance(caught.value, NotBuiltError)


def test_aliases_that_agree_are_accepted() -> None:
    assert load({"partitions": "2", "pipeline_parallel_degree": 2}).partitions == 2


def test_c052_default_partition_outside_the_stages() -> None:
    # The key's own rule: a stage number that does not exist is refused. (smp.partition itself is tested elsewhere.)
    with pytest.raises(SMPConfigError, match=r"default_partition=2 is outside 0\.\.1"):
        load({"partitions": 2, "auto_partition": False, "default_partition": 2})
    assert load({"partitions": 2, "auto_partition": False, "default_partition": 1}).default_partition == 1


def test_c053_memory_weight_and_manual_partition() -> None:
    assert load({"optimize": "speed"}).memory_weight == 0.2
    assert load({"optimize": "memory"}).memory_weight == 0.8
    assert load({"optimize": "speed", "memory_weight": 0.5}).memory_weight == 0.5
    for value in (-0.1, 1.1):
        with pytest.raises(SMPConfigError, match=r"memory_weight: expected float 0\.0\.\.1\.0"):
            load({"memory_weight": value})
    with pytest.raises(SMPConfigError, match="auto_partition: False needs default_partition"):
        load({"auto_partition": False})


def test_c100_unknown_key_and_exclusive_precisions() -> None:
    with pytest.raises(SMPConfigError, match=r"micro_batches: unknown parameter .*did you mean 'microbatches'"):
        load({"micro_batches": 4})
    with pytest.raises(SMPConfigError, match=r"unknown parameter .*'tensor_parallel_degree'"):
        load({"tensor_parallel_degre": 4})
    with pytest.raises(SMPConfigError, match="fp16 and bf16 are exclusive") as caught:
        load({"fp16": True, "bf16": True})
    assert not isinstance(caught.value, NotBuiltError)


def test_foreign_and_unknown_private_keys_are_noted() -> None:
    config = load({"contiguous": True, "horovod": False, "_odd": 1, "overlapping_allreduce": True})
    text = "\n".join(config.notices)
    for key in ("contiguous", "horovod", "_odd", "overlapping_allreduce"):
        assert f"{key}=" in text
    with pytest.raises(SMPConfigError, match=r"2 processes hold 2 copies"):
        load({"horovod": True}).check_world(2)


@pytest.mark.parametrize("entry", sorted(NOT_BUILT))
def test_features_that_do_not_exist_yet_stop(entry: str) -> None:
    key, _, value = entry.partition("=")
    default = Config.model_fields[key.lstrip("_")].default
    asked: object = value or not default
    with pytest.raises(NotBuiltError, match=f"{key}: .*not built yet: use {default!r}"):
        load({key: asked, "ddp": True})
    load({key: default, "ddp": True})


def test_a_built_feature_needs_only_its_line_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(config_module.NOT_BUILT, "checkpoint_attentions")
    config = load({"checkpoint_attentions": 1})
    assert config.checkpoint_attentions is True


def test_prescaled_batch_without_tensor_parallelism_is_noticed() -> None:
    config = load({"prescaled_batch": 1})
    assert config.prescaled_batch is True
    assert config.notices == ("prescaled_batch: no effect with tensor_parallel_degree=1",)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"pipeline": "simple"}, "pipeline: no effect with pipeline_parallel_degree=1"),
        ({"virtual_pipeline_degree": 2}, "virtual_pipeline_degree: no effect with pipeline_parallel_degree=1"),
        (
            {"partitions": 2, "memory_limit": 9, "memory_weight": 1, "auto_partition": False, "default_partition": 0},
            "memory_weight, memory_limit: no effect with auto_partition=False",
        ),
        ({"static_mode": True}, "static_mode=True has no effect"),
        ({"deterministic_server": 1}, "deterministic_server=True has no effect"),
        ({"sdp_gradient_clipping": 2.0}, "sdp_gradient_clipping: no effect with sharded_data_parallel_degree=1"),
        ({"activation_loading_horizon": 2}, "no effect without offload_activations"),
        ({"offload_activations": True}, "no effect without smp.set_activation_checkpointing"),
    ],
)
def test_values_with_less_effect_are_noted(parameters: dict[str, object], message: str) -> None:
    assert any(message in notice for notice in load(parameters).notices)


def test_environment_variables_without_effect_are_noted() -> None:
    assert any("SMP_DISABLE_D2D" in notice for notice in load({}, SMP_DISABLE_D2D="1").notices)


def test_parameters_from_text_and_files(tmp_path: Path) -> None:
    file = tmp_path / "parameters.json"
    file.write_text('{"microbatches": 4, "ddp": true}')
    expected = {"microbatches": 4, "ddp": True}
    assert parse_parameters(file, "here") == parse_parameters(str(file), "here") == expected
    assert parse_parameters('{"microbatches":4,"ddp":true}', "here") == expected
    assert parse_parameters("ddp=True,microbatches=4", "here") == {"ddp": "True", "microbatches": "4"}
    assert load(str(file)).microbatches == 4
    assert load(None, "ddp=True,microbatches=4").ddp is True
    with pytest.raises(SMPConfigError, match=r"cannot read the parameters from .*none.json"):
        parse_parameters(tmp_path / "none.json", "here")
    with pytest.raises(SMPConfigError, match="SM_HP_MP_PARAMETERS: the parameters are not valid JSON"):
        load(None, "{microbatches")
    with pytest.raises(SMPConfigError, match="expected key=value, got 'ddp'"):
        parse_parameters("ddp,microbatches=4", "here")


def test_check_world() -> None:
    with pytest.raises(SMPConfigError, match=r"world size 8 is not divisible .* = 3 \* 2 = 6"):
        load({"partitions": 3, "tensor_parallel_degree": 2, "ddp": True}).check_world(8)
    with pytest.raises(SMPConfigError, match="needs ddp: True"):
        load({"partitions": 2}).check_world(4)
    load({"partitions": 4}).check_world(4)
    load(SEED_PIPELINE).check_world(8)


def test_check_world_of_sharding() -> None:
    config = load({"sharded_data_parallel_degree": 4, "ddp": True})
    config.check_world(8)
    with pytest.raises(SMPConfigError, match="4 must divide the data parallel degree dp=6"):
        config.check_world(6)
    with_tensor_parallelism = load({"sharded_data_parallel_degree": 4, "tensor_parallel_degree": 2, "ddp": True})
    with_tensor_parallelism.check_world(8)
    with pytest.raises(SMPConfigError, match="4 must divide the 2 ranks that hold the same part of the model"):
        with_tensor_parallelism.check_world(4)


def test_sharding_keys_without_effect_are_noted() -> None:
    text = "\n".join(load({"sharded_data_parallel_degree": 2, "ddp": True, "sdp_reduce_bucket_size": 5}).notices)
    assert "sdp_reduce_bucket_size: no effect" in text
    assert load({"sharded_data_parallel_degree": 2, "ddp": True, "sdp_max_live_parameters": 5}).notices == ()


def test_second_init_adds_new_keys_and_keeps_old_ones() -> None:
    first = load({"microbatches": 4}, {"partitions": 2})
    merged, warnings = merge_second_init(first, {"microbatches": 2, "partitions": "2", "optimize": "speed"})
    assert (merged.microbatches, merged.partitions, merged.optimize, merged.memory_weight) == (4, 2, "speed", 0.2)
    assert len(warnings) == 1
    assert "microbatches stays 4 (from smp.init), 2 is ignored" in warnings[0]
    assert merged.sources["pipeline_parallel_degree"] == "environment"
    with pytest.raises(SMPConfigError, match="unknown parameter"):
        merge_second_init(first, {"mikrobatches": 2})
    # A limit that was applied to the first value must not look like a value that was given.
    clipped = load({"active_microbatches": 3})
    assert merge_second_init(clipped, {"microbatches": 8})[0].active_microbatches == 3


def test_validate_parameters_does_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SM_HP_MP_PARAMETERS", '{"microbatches": 9}')
    assert validate_parameters({"ddp": True}, num_processes=4).microbatches == 1
    assert validate_parameters(None, num_processes=None).microbatches == 1
    with pytest.raises(SMPConfigError, match="needs ddp"):
        validate_parameters({}, num_processes=4)


def test_c096_seed_distributions_validate() -> None:
    # Starting the processes is tested with the launcher.
    for parameters in (SEED_TENSOR, SEED_PIPELINE):
        checked = validate_distribution(distribution(parameters), 1)
        assert (checked.processes_per_host, checked.num_processes) == (8, 8)
        assert checked.custom_mpi_options == MPI["custom_mpi_options"]
        degree = parameters["pipeline_parallel_degree"]
        assert checked.parameters == {**parameters, "partitions": degree}
        json.dumps(checked.parameters)
    assert validate_distribution(distribution(SEED_PIPELINE), 2).num_processes == 16
    with pytest.raises(SMPConfigError, match="requires ddp: True"):
        validate_distribution(distribution({**SEED_TENSOR, "ddp": False}), 1)


def test_published_parameters_fill_both_names() -> None:
    parameters = validate_distribution(distribution({"partitions": "2", "ddp": 1, "_odd": 3})).parameters
    assert parameters == {"partitions": 2, "pipeline_parallel_degree": 2, "ddp": True, "_odd": 3}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "'smdistributed' is missing"),
        ({"smdistributed": {"modelparallel": {}}}, "'mpi' is missing"),
        ({"smdistributed": {"modelparallel": {}}, "mpi": {}, "mpy": {}}, "unknown key 'mpy': did you mean 'mpi'"),
        ({"smdistributed": {"modelparallel": {}, "dataparallel": {}}, "mpi": MPI}, "cannot be used together"),
        ({"smdistributed": {"modelparalel": {}}, "mpi": MPI}, "did you mean 'modelparallel'"),
        ({"smdistributed": {"modelparallel": {"enabled": True}}, "mpi": MPI}, "'parameters' is missing"),
        (
            {"smdistributed": {"modelparallel": {"enabled": False, "parameters": {}}}, "mpi": MPI},
            "enabled must be True",
        ),
        (distribution(mpi={"enabled": False, "processes_per_host": 8}), "modelparallel requires mpi enabled"),
        (distribution(mpi={"enabled": True}), "'processes_per_host' is missing"),
        (distribution(mpi={"enabled": True, "processes_per_host": 0}), "expected int >= 1, got 0"),
        (distribution(mpi={"enabled": True, "processes_per_host": "8"}), "expected int, got str '8'"),
        (distribution(mpi={**MPI, "custom_mpi_options": 5}), "expected str, got int 5"),
        (distribution(mpi={**MPI, "custom_mpi_options": "-x A='b"}), "custom_mpi_options'.: cannot be read"),
        (distribution(mpi={**MPI, "processes_per_host": 6}), r"world size 6 is not divisible"),
        (distribution({**SEED_TENSOR, "microbatchs": 4}), "did you mean 'microbatches'"),
    ],
)
def test_refused_distributions(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(SMPConfigError, match=message):
        validate_distribution(wrong)


def test_distribution_and_hosts() -> None:
    with pytest.raises(SMPConfigError, match="8 processes on 4 devices"):
        validate_distribution(distribution(), devices_per_host=4)
    with pytest.raises(SMPConfigError, match="instance_count: expected int >= 1, got 0"):
        validate_distribution(distribution(), 0)


def test_reference_document_is_up_to_date() -> None:
    document = Path(__file__).parents[1] / "docs" / "configuration.md"
    assert document.read_text(encoding="utf-8") == configuration_markdown()
    for key in CONFIGURATION_KEYS:
        assert f"`{key}`" in configuration_markdown()


def test_timeout_of_the_environment_is_the_default():
    environ = {"SMP_TIMEOUT": "30.5"}
    config = load_config({}, environ)
    assert config.timeout_seconds == 30.5
    assert load_config({"timeout_seconds": 7}, environ).timeout_seconds == 7
    assert merge_second_init(config, {"microbatches": 2})[0].timeout_seconds == 30.5
    assert merge_second_init(config, {"timeout_seconds": 9})[0].timeout_seconds == 9
    assert load_config({}, {}).timeout_seconds == 600


@pytest.mark.parametrize("text", ["", "abc", "0", "-1", "nan", "inf", "10 min"])
def test_timeout_of_the_environment_is_checked(text):
    with pytest.raises(
        SMPConfigError, match=r"environment variable SMP_TIMEOUT: expected a number of seconds > 0, got"
    ):
        load_config({}, {"SMP_TIMEOUT": text})


def test_what_is_opened_can_be_said_in_the_environment():
    environ = {"SMP_TRUST_PICKLES": "1", "SMP_ALLOWED_TYPES": "a.B"}
    config = load_config({}, environ)
    assert config.trust_pickles and config.allowed_types == "a.B"
    assert not load_config({"trust_pickles": False}, environ).trust_pickles
    assert merge_second_init(config, {"microbatches": 2})[0].trust_pickles
    assert not load_config({}, {"SMP_TRUST_PICKLES": "0"}).trust_pickles and not load_config({}, {}).trust_pickles
    with pytest.raises(SMPConfigError, match="SMP_TRUST_PICKLES: expected 1 or 0, got 'all'"):
        load_config({}, {"SMP_TRUST_PICKLES": "all"})
