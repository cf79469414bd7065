"""What is sent to SageMaker: equal to what the cloud's own SDK sends; what cannot work is said before it is sent."""

import dataclasses
import json
import re

import pytest
from typer.testing import CliRunner

from modelparallel.errors import LaunchError, SMPConfigError
from modelparallel.launch.clusters.cluster_file import make_cluster
from modelparallel.launch.clusters.description import DataChannel
from modelparallel.launch.clusters.sagemaker import checks
from modelparallel.launch.clusters.sagemaker.cluster import SageMaker
from modelparallel.launch.clusters.sagemaker.options import SERVICE_ARGUMENTS
from modelparallel.launch.command_line import app
from sagemaker_cases import CASES, IMAGE, ROLE, estimator_of, job_of, request_of, sdk_inputs, small_job
from scripts import load_script

KEYS = {"role": ROLE, "image": IMAGE, "region": "us-west-2"}
INPUT = {"DataSource": {"S3DataSource": {"S3DataType": "Files", "S3Uri": "s3://bkt/x"}}}
CHANNEL = {"a": DataChannel("s3://bkt/x")}
PARAMETERS = {"pipeline_parallel_degree": 2, "partitions": 2, "tensor_parallel_degree": 2, "ddp": True}


@pytest.fixture(autouse=True)
def no_region(monkeypatch):
    """No region of this machine's own."""
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")


def asked(folder, keys=None, **changes):
    """The request of a small job."""
    return request_of(small_job(folder, **changes), **{**KEYS, **(keys or {})})


def refused(folder, pattern, keys=None, **changes):
    with pytest.raises((LaunchError, SMPConfigError), match=pattern):
        SageMaker(**{**KEYS, **(keys or {})}).check(small_job(folder, **changes))


@pytest.mark.parametrize("name", CASES)
def test_request_is_that_of_the_sdk(name, tmp_path):
    expected = CASES[name]["request"]
    if name == "pytorchddp":
        # The SDK starts this one by a program of the original library; ours is started as torch_distributed is.
        hyperparameters = expected["HyperParameters"] | {"sagemaker_torch_distributed_enabled": "true"}
        for key in ("enabled", "custom_mpi_options"):
            del hyperparameters[f"sagemaker_distributed_dataparallel_{key}"]
        expected = {**expected, "HyperParameters": hyperparameters}
    assert request_of(job_of(CASES[name], tmp_path)) == expected


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("both", "pytorchddp")])
def test_launch_file_renders_to_the_request_of_the_sdk(name, tmp_path):
    """`both`, with two distributions at once, is none that the estimator takes."""
    case = CASES[name]
    expected = {key: value for key, value in case["request"].items() if key != "ExperimentConfig"}  # of fit
    rendered = estimator_of(case, tmp_path).render(sdk_inputs(case), job_name=case["request"]["TrainingJobName"])
    assert dict(rendered.requests) == {"create_training_job": expected}


@pytest.mark.parametrize("name", ["tensor", "tensor_pipeline"])
def test_golden_launch_files_are_the_examples(name):
    launch = load_script(f"examples/mnist/launch_{name}_parallel.py")
    expected = {"smdistributed": {"modelparallel": launch.smp_options}, "mpi": launch.mpi_options}
    assert CASES[name]["arguments"]["distribution"] == expected


def test_job_of_the_command_line(tmp_path):
    (tmp_path / "train.py").touch()
    (tmp_path / "clusters.toml").write_text(
        f'[clusters.aws]\nkind = "sagemaker"\nrole = "{ROLE}"\nregion = "us-west-2"\n'
        'instance_type = "ml.p4d.24xlarge"\n'
    )
    command = ["submit", "--cluster", "aws", "--clusters", str(tmp_path / "clusters.toml"), "--nodes", "2", "--dry-run"]
    command += ["--name", "job-1", "--image", IMAGE, "--parameters", json.dumps(PARAMETERS), "--time", "4h"]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "train.py"), "--epochs", "3"])
    assert result.exit_code == 0, result.output
    request = json.loads(result.output.partition("\n")[2])
    assert request["ResourceConfig"]["InstanceCount"] == 2
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 4 * 3600}
    assert request["AlgorithmSpecification"]["TrainingImage"] == IMAGE
    assert request["HyperParameters"]["epochs"] == '"3"'
    assert request["HyperParameters"]["sagemaker_mpi_num_of_processes_per_host"] == "8"
    result = CliRunner().invoke(app, [*command, str(tmp_path / "train.py"), "--flag"])
    assert result.exit_code == 2 and "argument '--flag' of the script" in result.output.replace("\n", " ")


def test_keys_of_the_cluster_file_say_what_the_arguments_say(tmp_path):
    case = CASES["everything"]
    given = {"framework_version", "sagemaker_session", "inputs", "experiment_config", "enable_sagemaker_metrics"}
    given |= {"model_uri", "model_channel_name", "code_location", "disable_output_compression", "container_log_level"}
    given |= {"checkpoint_local_path", "input_mode", "enable_remote_debug", "enable_infra_check"}
    given |= {"enable_session_tag_chaining", "training_repository_access_mode"}
    given |= {"training_repository_credentials_provider_arn"}
    job = job_of(case, tmp_path)
    options = {name: value for name, value in job.service_options.items() if name in given}
    arguments = case["arguments"]
    row = {
        "kind": "sagemaker",
        "role": arguments["role"],
        "image": arguments["image_uri"],
        "instance_type": arguments["instance_type"],
        "output": arguments["output_path"],
        "output_kms_key": arguments["output_kms_key"],
        "volume_size": arguments["volume_size"],
        "volume_kms_key": arguments["volume_kms_key"],
        "subnets": arguments["subnets"],
        "security_groups": arguments["security_group_ids"],
        "tags": {"team": "x"},
        "metrics": {"loss": "loss ([0-9.]+)"},
        "encrypt_traffic": True,
        "spot": True,
        "max_wait": "2h",
        "retries": 2,
        "debugger": False,
        "profiler": False,
        "env": arguments["environment"],
    }
    cluster = make_cluster("aws", row, "here")
    job = dataclasses.replace(job, service_options=options, instance_type=None, output=None, environment={})
    assert dict(cluster.render(job).requests)["create_training_job"] == case["request"]


def test_arguments_come_before_keys(tmp_path):
    keys = {"volume_size": 10, "spot": True, "tags": {"a": "b"}, "env": {"A": "1", "B": "2"}}
    request = asked(tmp_path, keys, service_options={"volume_size": 20, "tags": {"c": "d"}}, environment={"B": "3"})
    assert request["ResourceConfig"]["VolumeSizeInGB"] == 20
    assert request["Tags"] == [{"Key": "c", "Value": "d"}] and request["Environment"] == {"A": "1", "B": "3"}


def test_rendering_needs_neither_boto3_nor_the_cloud(tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] in ("boto3", "botocore"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(checks, "_request_shape", checks._request_shape.__wrapped__)
    cluster = SageMaker(**KEYS)
    text = cluster.render(small_job(tmp_path)).text()
    assert text.startswith("# create_training_job") and '"TrainingJobName": "job-1"' in text
    with pytest.raises(LaunchError, match=re.escape("pip install 'modelparallel[sagemaker]'")):
        cluster.check_access(small_job(tmp_path))


def test_bucket_of_the_account_is_known_from_the_role(tmp_path):
    request = asked(tmp_path)
    assert request["OutputDataConfig"]["S3OutputPath"] == "s3://sagemaker-us-west-2-123456789012/"
    code = json.loads(request["HyperParameters"]["sagemaker_submit_directory"])
    assert code == "s3://sagemaker-us-west-2-123456789012/job-1/source/sourcedir.tar.gz"
    # Of a role that is only named, nothing is known before the account is asked.
    request = asked(tmp_path, {"role": "Training"})
    assert request["RoleArn"] == "arn:aws:iam::ACCOUNT:role/Training"
    assert request["OutputDataConfig"]["S3OutputPath"] == "s3://sagemaker-us-west-2-ACCOUNT/"


def test_bucket_and_prefix(tmp_path):
    request = asked(tmp_path, {"bucket": "s3://team/jobs/"}, channels={"train": DataChannel(str(tmp_path))})
    code = json.loads(request["HyperParameters"]["sagemaker_submit_directory"])
    assert code == "s3://team/jobs/job-1/source/sourcedir.tar.gz"
    (channel,) = request["InputDataConfig"]
    assert channel["DataSource"]["S3DataSource"]["S3Uri"] == "s3://team/jobs/job-1/input/train"
    assert request["OutputDataConfig"]["S3OutputPath"] == "s3://team/jobs/"


def test_image_by_framework_version(tmp_path):
    keys = {"image": "", "images": {"2.3": IMAGE}}
    options = {"framework_version": "2.3"}
    assert asked(tmp_path, keys, service_options=options)["AlgorithmSpecification"]["TrainingImage"] == IMAGE
    refused(
        tmp_path, "no image of framework_version '1.8.1'.*has 2.3", keys, service_options={"framework_version": "1.8.1"}
    )
    refused(tmp_path, "there is no image: give image_uri", {"image": ""})


def test_image_of_ones_own_is_started_by_the_node_command(tmp_path):
    channels = {"train": DataChannel("s3://bkt/train"), "web": DataChannel("https://example.com/x.tar")}
    job = small_job(
        tmp_path,
        channels=channels,
        arguments=("--flag", "-lr=1", "name"),
        secrets={"HF_TOKEN": "aws-secretsmanager:arn:aws:secretsmanager:us-west-2:123456789012:secret:hf"},
        parameters=PARAMETERS,
        checkpoints="s3://bkt/ck",
        service_options={"input_mode": "FastFile"},
    )
    rendered = SageMaker(**KEYS, container="own", python="python3").render(job)
    request = dict(rendered.requests)["create_training_job"]
    assert request["AlgorithmSpecification"]["ContainerEntrypoint"] == [
        "python3", "-m", "modelparallel", "node", "/opt/ml/input/data/code/job.json"
    ]  # fmt: skip
    assert not any(name.startswith("sagemaker_") for name in request["HyperParameters"])
    train, code = request["InputDataConfig"]
    assert train["ChannelName"] == "train" and "InputMode" not in train
    assert code["ChannelName"] == "code" and code["InputMode"] == "File"
    assert code["DataSource"]["S3DataSource"]["S3Uri"] == "s3://sagemaker-us-west-2-123456789012/job-1/source/"
    ((path, text),) = rendered.files.items()
    assert path == "s3://sagemaker-us-west-2-123456789012/job-1/source/job.json"
    described = json.loads(text)
    assert described["arguments"] == ["--flag", "-lr=1", "name"] and described["checkpoints"] == "/opt/ml/checkpoints"
    assert described["folder"] == "/opt/ml/job" and described["output"] == "/opt/ml" and described["code"] == ""
    assert described["channels"]["train"]["location"] == "/opt/ml/input/data/train"
    assert described["channels"]["web"]["location"] == "https://example.com/x.tar"


def test_command_line_becomes_hyperparameters(tmp_path):
    request = asked(tmp_path, arguments=("--lr", "0.1", "--name=a b", "-n", "-3", "--mp_parameters", "a=1"))
    own = {name: value for name, value in request["HyperParameters"].items() if not name.startswith("sagemaker_")}
    assert own == {"lr": '"0.1"', "name": '"a b"', "n": '"-3"'}
    for arguments in (("--flag", "--lr", "1"), ("--last",), ("train",), ("-lr", "1")):
        refused(tmp_path, 'passes `--key value` alone.*container = "own"', arguments=arguments)


def test_processes_of_a_job_from_the_command_line(tmp_path):
    hyperparameters = asked(tmp_path, parameters=PARAMETERS)["HyperParameters"]
    assert hyperparameters["sagemaker_mpi_num_of_processes_per_host"] == "8"
    assert json.loads(hyperparameters["mp_parameters"]) == PARAMETERS
    hyperparameters = asked(tmp_path, num_nodes=1, processes_per_node=1)["HyperParameters"]
    assert not any("mpi" in name for name in hyperparameters)


def test_spot_checkpoints_and_retries(tmp_path):
    keys = {"spot": True, "max_wait": "48h"}
    request = asked(tmp_path, keys, checkpoints="s3://bkt/ck", max_restarts=3, max_seconds=3600)
    assert request["EnableManagedSpotTraining"] is True
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 48 * 3600}
    assert request["CheckpointConfig"] == {"S3Uri": "s3://bkt/ck"}
    assert request["RetryStrategy"] == {"MaximumRetryAttempts": 3}
    # The service wants a time to wait; without one, spot instances are given no more time than the job itself.
    assert asked(tmp_path, {"spot": True})["StoppingCondition"]["MaxWaitTimeInSeconds"] == 24 * 3600


def test_extra_is_laid_over_the_request(tmp_path):
    extra = {"ResourceConfig": {"InstanceCount": 3}, "RemoteDebugConfig": {"EnableRemoteDebug": True}}
    request = asked(tmp_path, {"extra": extra})
    assert request["ResourceConfig"]["InstanceCount"] == 3 and request["ResourceConfig"]["VolumeSizeInGB"] == 30
    assert request["RemoteDebugConfig"] == {"EnableRemoteDebug": True}


def test_device_reaches_the_processes(tmp_path):
    assert asked(tmp_path, device="cpu")["Environment"] == {"MODELPARALLEL_DEVICE": "cpu"}


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        ("job name 'a_b': the service takes letters", {"name": "a_b"}),
        ("job name 'aaa", {"name": "a" * 64}),
        ("job name '-a'", {"name": "-a"}),
        ("instance_type is missing", {"instance_type": None}),
        ("instance_type 'p4d.24xlarge': expected a training instance", {"instance_type": "p4d.24xlarge"}),
        ("9 processes on a node with 8 devices", {"processes_per_node": 9}),
        ("the number of nodes is 0", {"num_nodes": 0}),
        ("max_run=0", {"max_seconds": 0.5}),
        ("max_run=2592000: expected 1 to 2419200 seconds", {"max_seconds": 30 * 86400}),
        ("max_restarts=31: the service retries at most 30", {"max_restarts": 31}),
        ("output_path: '/tmp/x' is no location in S3", {"output": "/tmp/x"}),
        ("checkpoint_s3_uri: '/ck' is no location in S3", {"checkpoints": "/ck"}),
        ("channel 'train': 's3:///x' is no location in S3", {"channels": {"train": DataChannel("s3:///x")}}),
        ("channel 'train': gs://b/x: the service reads s3:// alone", {"channels": {"train": DataChannel("gs://b/x")}}),
        ("channel 'train': /nowhere does not exist", {"channels": {"train": DataChannel("/nowhere")}}),
        ("21 channels", {"channels": {f"c{i}": DataChannel("s3://bkt/x") for i in range(21)}}),
        ("secrets HF: the training toolkit has no place", {"secrets": {"HF": "aws-secretsmanager:arn:aws:x"}}),
        ("secret HF: 'env' is no reference of this cluster", {"secrets": {"HF": "env:HF"}}),
        ("hyperparameter 'x' has 2502 characters as JSON", {"hyperparameters": {"x": "a" * 2500}}),
        (
            r"101 hyperparameters, 8 of them the toolkit's",
            {"hyperparameters": {f"k{i}": 1 for i in range(93)}},
        ),
        (
            "mp_parameters' has .* which smp.init reads by its path",
            {"parameters": {**PARAMETERS, "_note": "a" * 2500}},
        ),
        ("not divisible|world|processes", {"parameters": {**PARAMETERS, "tensor_parallel_degree": 3}}),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_sent(pattern, changes, tmp_path):
    refused(tmp_path, pattern, **changes)


@pytest.mark.parametrize(
    ("pattern", "keys", "options"),
    [
        ("role is missing", {"role": ""}, {}),
        ("role 'arn:aws:iam::1:role/x': expected", {"role": "arn:aws:iam::1:role/x"}, {}),
        ("region is missing: give region", {"region": ""}, {}),
        ("region 'oregon'", {"region": "oregon"}, {}),
        ("bucket: 's3://B_' is no location", {"bucket": "B_"}, {}),
        ("max_wait=3600 is less than max_run=86400", {"spot": True, "max_wait": 3600}, {}),
        ("max_wait=90000 is how long spot instances are waited for", {"max_wait": "25h"}, {}),
        ("spot instances are not kept alive", {"spot": True, "keep_alive": 60}, {}),
        ("security_group_ids: subnets and security groups", {"subnets": ["subnet-1"]}, {}),
        ("Vpc.*fetched through subnets", {}, {"training_repository_access_mode": "Vpc"}),
        ("container_entry_point: container = \"own\"", {"container": "own"}, {"container_entry_point": ["x"]}),
        ("library = 'wheel'.*node command is in the image", {"container": "own", "library": "wheel"}, {}),
        ("volume_size: Input should be greater", {}, {"volume_size": 0}),
        ("input_mode: Input should be 'File' or 'FastFile', got 'Pipe'", {}, {"input_mode": "Pipe"}),
        ("instance_groups have 3 instances together, and the job 2", {}, {"instance_groups": [{"InstanceCount": 3}]}),
        ("debugger_hook_config: expected a dict", {}, {"debugger_hook_config": 3}),
        ("code_location: 'x' is no location", {}, {"code_location": "x"}),
    ],
)  # fmt: skip
def test_what_the_options_say_is_checked(pattern, keys, options, tmp_path):
    refused(tmp_path, pattern, keys, service_options=options)


def test_unknown_key_of_the_cluster_file():
    with pytest.raises(SMPConfigError, match="unknown key 'subnet': did you mean 'subnets'"):
        make_cluster("aws", {"kind": "sagemaker", "subnet": []}, "here")
    with pytest.raises(LaunchError, match="max_wait: 'soon' is no time"):
        make_cluster("aws", {"kind": "sagemaker", "max_wait": "soon"}, "here")


def test_torch_distributed_starts_a_process_for_each_accelerator(tmp_path):
    distribution = {"torch_distributed": {"enabled": True}}
    hyperparameters = asked(tmp_path, distribution=distribution)["HyperParameters"]
    assert not any("mpi" in name for name in hyperparameters)
    hyperparameters = asked(tmp_path, distribution=distribution, processes_per_node=4)["HyperParameters"]
    assert hyperparameters["sagemaker_mpi_num_of_processes_per_host"] == "4"
    assert "sagemaker_mpi_enabled" not in hyperparameters


def test_channel_named_as_the_code(tmp_path):
    channels = {"code": DataChannel("s3://bkt/x")}
    refused(tmp_path, "channel 'code': the name is in use", {"network_isolation": True}, channels=channels)
    assert asked(tmp_path, channels=channels)["InputDataConfig"][0]["ChannelName"] == "code"


def test_limits_of_the_services_own_description(tmp_path):
    pytest.importorskip("botocore", reason="boto3 is not installed (extra sagemaker)")
    refused(tmp_path, "create_training_job: Tags.*'Value'|Missing required", service_options={"tags": [{"Key": "a"}]})
    refused(tmp_path, r"VpcConfig.Subnets\[0\]: 'sub net' is not of the form",
            {"subnets": ["sub net"], "security_groups": ["sg-1"]})  # fmt: skip
    refused(tmp_path, r"Environment: the name: '1A' is not of the form", environment={"1A": "x"})
    refused(tmp_path, "Tags: 51 is more than 50", {"tags": {str(i): "x" for i in range(51)}})
    refused(tmp_path, "S3DataType: 'Files' is none of", service_options={"inputs": {"a": INPUT}}, channels=CHANNEL)
    refused(tmp_path, 'Unknown parameter in input: "Nonsense"', {"extra": {"Nonsense": 1}})
    asked(tmp_path, instance_type="ml.p9.96xlarge")  # new types come faster than boto3


def test_every_argument_is_one_that_the_record_has():
    assert set(SERVICE_ARGUMENTS) == set(SageMaker.service_arguments)
