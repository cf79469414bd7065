"""Jobs of SageMaker from submitting to their end, against moto; botocore's stub answers what moto does not do."""

import io
import json
import logging
import tarfile
from datetime import datetime, timezone
from types import SimpleNamespace

import pytest

pytest.importorskip("boto3", reason="boto3 is not installed (extra sagemaker)")
pytest.importorskip("moto", reason="moto is not installed (extra test)")

import boto3
import moto
from botocore.stub import Stubber

from modelparallel.errors import LaunchError
from modelparallel.launch import PyTorch
from modelparallel.launch.clusters.description import DataChannel
from modelparallel.launch.clusters.sagemaker import logs as sagemaker_logs
from modelparallel.launch.clusters.sagemaker.cluster import SageMaker, status_of
from modelparallel.launch.clusters.sagemaker.logs import line_of, log_lines
from modelparallel.launch.clusters.sagemaker.service import Service
from sagemaker_cases import IMAGE, ROLE, request_of, small_job

KEYS = {"role": ROLE, "image": IMAGE, "region": "us-west-2"}
DEFAULT_BUCKET = "sagemaker-us-west-2-123456789012"
TIME = datetime(2026, 1, 31, 12, 0, 0, tzinfo=timezone.utc)


@pytest.fixture(autouse=True)
def credentials(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cloud():
    with moto.mock_aws():
        yield boto3.Session(region_name="us-west-2")


@pytest.fixture
def code(tmp_path):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "train.py").write_text("print('train')\n")
    return folder


def stored(session, bucket):
    """key -> content."""
    client = session.client("s3")
    found = client.list_objects_v2(Bucket=bucket).get("Contents", ())
    return {each["Key"]: client.get_object(Bucket=bucket, Key=each["Key"])["Body"].read() for each in found}


def stubbed(operation, answer=None, error=None, name="sagemaker"):
    """A session whose client of a service gives one answer."""
    session = boto3.Session(region_name="us-west-2")
    client = session.client(name)
    stub = Stubber(client)
    if error is None:
        stub.add_response(operation, answer or {})
    else:
        stub.add_client_error(operation, *error)
    stub.activate()

    class OneClient:
        region_name = "us-west-2"

        def client(self, asked, **_):
            assert asked == name
            return client

    return OneClient()


def test_submitting_uploads_and_sends_what_was_rendered(cloud, code, tmp_path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "a.txt").write_text("a")
    (tmp_path / "data" / "deep" / "b.txt").write_text("b")
    (tmp_path / "one.csv").write_text("1")
    channels = {"train": DataChannel(str(tmp_path / "data")), "one": DataChannel(str(tmp_path / "one.csv"))}
    job = small_job(code, channels=channels | {"far": DataChannel("s3://elsewhere/x")})
    cluster = SageMaker(**KEYS, boto_session=cloud)
    cluster.check_access(job)
    sent = []
    cloud.events.register("provide-client-params.sagemaker.CreateTrainingJob", lambda params, **_: sent.append(params))
    record = cluster.submit(job)
    (request,) = sent
    assert request == request_of(job, **KEYS)
    files = stored(cloud, DEFAULT_BUCKET)
    archive = files.pop("job-1/source/sourcedir.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        assert packed.getnames() == ["train.py"]
    assert files == {
        "job-1/input/train/a.txt": b"a",
        "job-1/input/train/deep/b.txt": b"b",
        "job-1/input/one/one.csv": b"1",
    }
    assert record.engine_id == "job-1" and record.folder == f"s3://{DEFAULT_BUCKET}/job-1/output"
    assert record.model == f"{record.folder}/model.tar.gz" and record.kind == record.cluster == "sagemaker"
    # Another process finds it by the record alone.
    assert SageMaker(**record.settings).status(record).state == "succeeded"
    with pytest.raises(LaunchError, match="training job 'job-1' exists in us-west-2"):
        cluster.check_access(job)


def test_job_of_an_own_image_brings_its_description(cloud, code):
    cloud.client("s3").create_bucket(Bucket="team", CreateBucketConfiguration={"LocationConstraint": "us-west-2"})
    cluster = SageMaker(**KEYS, boto_session=cloud, bucket="s3://team/jobs", container="own", library="image")
    job = small_job(code, arguments=("--flag",))
    cluster.submit(job)
    files = stored(cloud, "team")
    assert sorted(files) == ["jobs/job-1/source/job.json", "jobs/job-1/source/sourcedir.tar.gz"]
    (expected,) = cluster.render(job).files.values()
    assert files["jobs/job-1/source/job.json"].decode() == expected
    assert json.loads(expected)["arguments"] == ["--flag"]


def test_role_that_is_only_named_is_looked_up(cloud, code):
    cloud.client("iam").create_role(RoleName="Training", Path="/team/", AssumeRolePolicyDocument="{}")
    cluster = SageMaker(**{**KEYS, "role": "Training"}, boto_session=cloud)
    cluster.submit(small_job(code))
    described = cloud.client("sagemaker").describe_training_job(TrainingJobName="job-1")
    assert described["RoleArn"] == "arn:aws:iam::123456789012:role/team/Training"
    assert described["OutputDataConfig"]["S3OutputPath"] == f"s3://{DEFAULT_BUCKET}/"
    with pytest.raises(LaunchError, match=r"role 'Nobody'.*NoSuchEntity"):
        SageMaker(**{**KEYS, "role": "Nobody"}, boto_session=cloud).check_access(small_job(code))


def test_bucket_that_was_named_has_to_be_there(cloud, code):
    cluster = SageMaker(**KEYS, boto_session=cloud, bucket="nowhere-at-all")
    with pytest.raises(LaunchError, match="bucket nowhere-at-all: missing: name one"):
        cluster.check_access(small_job(code))
    other = ROLE.replace("123456789012", "210987654321")
    with pytest.raises(LaunchError, match="is of account 210987654321, and the credentials are of 123456789012"):
        SageMaker(**{**KEYS, "role": other}, boto_session=cloud).check_access(small_job(code))


def test_region_of_the_session(cloud, code):
    cluster = SageMaker(role=ROLE, image=IMAGE, boto_session=cloud)
    record = cluster.submit(small_job(code))
    assert record.settings["region"] == "us-west-2" and "boto_session" not in record.settings


def test_job_that_was_submitted_elsewhere(cloud, code):
    cloud.client("s3").create_bucket(Bucket="out", CreateBucketConfiguration={"LocationConstraint": "us-west-2"})
    SageMaker(**KEYS, boto_session=cloud).submit(small_job(code, output="s3://out/x"))
    found = SageMaker(region="us-west-2").adopt("job-1")
    assert found.folder == "s3://out/x/job-1/output" and found.engine_id == "job-1"
    assert SageMaker(**found.settings).status(found).state == "succeeded"
    with pytest.raises(LaunchError, match="sagemaker:job-2: the service knows no such training job in us-west-2"):
        SageMaker(region="us-west-2").adopt("job-2")


def test_job_that_the_service_has_forgotten(cloud, code):
    cluster = SageMaker(**KEYS, boto_session=cloud)
    record = cluster.submit(small_job(code))
    gone = type(record)(**{**vars(record), "engine_id": "job-9"})
    status = cluster.status(gone)
    assert status.state == "unknown" and "job-9" in status.reason


def test_stopping():
    session = stubbed("stop_training_job")
    record = record_of(session)
    SageMaker(**KEYS, boto_session=session).stop(record)
    session = stubbed("stop_training_job", error=("ValidationException", "The request was rejected: it has ended"))
    with pytest.raises(LaunchError, match=r"job-1 cannot be stopped.*The request was rejected: it has ended"):
        SageMaker(**KEYS, boto_session=session).stop(record)


def test_launch_file_from_fit_to_attach(cloud, code, caplog, capsys, monkeypatch):
    """What users of the SDK write, with a session of their own: no other credentials are used, nor another region."""
    session = SimpleNamespace(boto_session=cloud, _default_bucket_name_override="team")
    cloud.client("s3").create_bucket(Bucket="team", CreateBucketConfiguration={"LocationConstraint": "us-west-2"})
    estimator = PyTorch(
        entry_point="train.py",
        source_dir=str(code),
        role=ROLE,
        image_uri=IMAGE,
        instance_type="ml.p3.16xlarge",
        instance_count=2,
        sagemaker_session=session,
        base_job_name="SMD-MP-demo",
        distribution={"torch_distributed": {"enabled": True}},
        compiler_config="x",
    )
    with caplog.at_level(logging.INFO, "modelparallel.launch"):
        estimator.fit({"train": str(code)}, logs=False, experiment_config={"ExperimentName": "e"})
    assert "accepted without effect on sagemaker: compiler_config" in caplog.messages
    assert any(text.startswith("uploading channel train: 15 B in 1 files") for text in caplog.messages)
    job = estimator.latest_training_job
    assert job.name.startswith("SMD-MP-demo-") and job.status().state == "succeeded"
    assert f"sagemaker/{job.name}: succeeded" in capsys.readouterr().out
    assert sorted(stored(cloud, "team")) == [f"{job.name}/input/train/train.py", f"{job.name}/source/sourcedir.tar.gz"]
    assert estimator.model_data == f"s3://team/{job.name}/output/model.tar.gz"
    assert PyTorch.attach(job.name, wait=False).latest_training_job.record == job.record
    # On another machine, as users of the SDK do it: the name alone, and a session.
    monkeypatch.setenv("XDG_STATE_HOME", str(code))
    found = PyTorch.attach(job.name, sagemaker_session=session, wait=False).latest_training_job
    assert found.name == job.name and found.status().state == "succeeded" and found.cluster.boto_session is cloud
    with pytest.raises(LaunchError, match=r"no job was submitted from here.*sagemaker:nobody: the service knows no"):
        PyTorch.attach("nobody", sagemaker_session=session)


def record_of(session):
    request = {"OutputDataConfig": {"S3OutputPath": "s3://bkt/"}}
    return SageMaker(**KEYS)._record(Service("us-west-2", session=session), "job-1", request, 0.0, "")


def test_refusal_of_the_service_is_quoted(code):
    session = stubbed("create_training_job", error=("ResourceLimitExceeded", "The account-level service limit is 0"))
    with pytest.raises(LaunchError, match=r"job-1 was not accepted.*The account-level service limit is 0"):
        Service("us-west-2", session=session).create(request_of(small_job(code), **KEYS))
    session = stubbed("describe_training_job", error=("AccessDeniedException", "You shall not pass"))
    with pytest.raises(LaunchError, match="You shall not pass"):
        SageMaker(**KEYS, boto_session=session).status(record_of(session))


def test_missing_credentials(code, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(LaunchError, match="Unable to locate credentials: run `aws configure`"):
        SageMaker(**KEYS).check_access(small_job(code))
    with pytest.raises(LaunchError, match="profile 'nobody'"):
        SageMaker(**KEYS, profile="nobody").check_access(small_job(code))


def described(status, secondary, *transitions, **others):
    return {
        "TrainingJobStatus": status,
        "SecondaryStatus": secondary,
        "SecondaryStatusTransitions": [
            {"Status": name, "StartTime": TIME, "StatusMessage": message} for name, message in transitions
        ],
        **others,
    }


def test_status_in_the_words_of_the_service():
    starting = ("Starting", "Insufficient capacity error from EC2 while launching instances, retrying!")
    status = status_of(described("InProgress", "Starting", starting))
    assert (status.state, status.reason) == ("pending", ": ".join(starting))
    loading = ("Downloading", "Downloading the training image")
    status = status_of(described("InProgress", "Training", starting, loading, ("Training", "Training in progress")))
    assert status.state == "running" and status.reason == "Training: Training in progress" and status.exit_code is None
    assert status.history[1] == "2026-01-31 12:00:00 Downloading Downloading the training image"
    status = status_of(described("Completed", "Completed"))
    assert (status.state, status.exit_code) == ("succeeded", 0)
    why = 'AlgorithmError: ExecuteUserScriptError:\nExitCode 3\nErrorMessage "ValueError: no", exit code: 3'
    status = status_of(described("Failed", "Failed", FailureReason=why))
    assert (status.state, status.reason, status.exit_code) == ("failed", why, 3)
    status = status_of(described("Stopped", "MaxRuntimeExceeded"))
    assert (status.state, status.reason, status.exit_code) == ("stopped", "MaxRuntimeExceeded", 124)
    assert status_of(described("Stopping", "Stopping")).state == "running"
    assert status_of(described("InProgress", "Interrupted")).state == "pending"  # spot: waits for other machines


@pytest.mark.parametrize(
    ("text", "rank", "line"),
    [
        ("[1,mpirank:3,algo-1]<stdout>:step 1", 3, "[rank 3] step 1"),
        ("[1,12]<stderr>:ValueError: x", 12, "[rank 12] ValueError: x"),
        ("[prterun-algo-1-77@1,0]<stdout>: step 1", 0, "[rank 0] step 1"),
        ("[algo-2 rank 5] step 1", 5, "[rank 5] step 1"),
        ("[rank 5] step 1", 5, "[rank 5] step 1"),
        ("2026 sagemaker-training-toolkit INFO [1,2]", None, "[algo-2] 2026 sagemaker-training-toolkit INFO [1,2]"),
    ],
)
def test_rank_in_front_of_a_line(text, rank, line):
    assert line_of(text, 1) == (rank, line)


def test_logs_of_all_nodes_in_the_order_of_time(cloud):
    client = cloud.client("logs")
    assert list(log_lines(client, "job-1", lambda: True)) == []  # no group yet: the account has never had a job
    client.create_log_group(logGroupName=sagemaker_logs.GROUP)
    base = int(datetime.now(timezone.utc).timestamp() * 1000) - 1000
    write(client, "job-1/algo-2-99", base, ["[1,mpirank:8,algo-2]<stdout>:b"], 1)
    write(client, "job-1/algo-1-99", base, ["[1,mpirank:0,algo-1]<stdout>:a", "[1,mpirank:1,algo-1]<stdout>:c"], 2)
    write(client, "job-10/algo-1-99", base, ["another job's"], 0)
    assert list(log_lines(client, "job-1", lambda: True)) == ["[rank 0] a", "[rank 8] b", "[rank 1] c"]
    assert list(log_lines(client, "job-1", lambda: True, rank=1)) == ["[rank 1] c"]
    assert list(log_lines(client, "job-1", lambda: True, node=1)) == ["[rank 8] b"]


def write(client, stream, base, messages, step):
    client.create_log_stream(logGroupName=sagemaker_logs.GROUP, logStreamName=stream)
    events = [{"timestamp": base + number * step, "message": text} for number, text in enumerate(messages)]
    for event in events:
        event["timestamp"] += 1 if "algo-2" in stream else 0
    client.put_log_events(logGroupName=sagemaker_logs.GROUP, logStreamName=stream, logEvents=events)


class Tail:
    """CloudWatch, as it is seen while a job writes: each reading finds what came in between."""

    def __init__(self, readings):
        self.readings = list(readings)
        self.tokens = []

    def get_paginator(self, name):
        assert name == "describe_log_streams"
        return self

    def paginate(self, logGroupName, logStreamNamePrefix):
        return [{"logStreams": [{"logStreamName": f"{logStreamNamePrefix}algo-1-1"}]}]

    def get_log_events(self, logGroupName, logStreamName, startFromHead, nextToken="0"):
        self.tokens.append(nextToken)
        lines = self.readings.pop(0) if self.readings else []
        events = [{"timestamp": 1, "message": line} for line in lines]
        return {"events": events, "nextForwardToken": str(int(nextToken) + len(lines))}


def test_following_ends_after_the_last_lines(monkeypatch):
    monkeypatch.setattr(sagemaker_logs, "POLL_SECONDS", 0.0)
    # An empty reading ends each look; the last lines come two looks after the job has ended.
    tail = Tail([["a", "b"], [], [], ["c"], [], [], [], ["d"], []])
    ended = iter([False, False, False, True])
    found = list(log_lines(tail, "job-1", lambda: next(ended, True), follow=True))
    assert found == [f"[algo-1] {line}" for line in "abcd"]
    assert tail.tokens[:5] == ["0", "2", "2", "2", "3"]
    assert not tail.readings
