"""A cloud on one host: moto serves S3 and SageMaker, and a job is submitted to it. Run by test_sagemaker_toolkit.py.

    python sagemaker_cloud.py ADDRESS FOLDER

Reads FOLDER/job.json (fields of a `ClusterJob`, keys of a `SageMaker`), copies what was uploaded to FOLDER/bkt, writes
FOLDER/request.json, what the service was sent, and then serves until it is killed.
"""

import dataclasses
import json
import os
import sys
import threading
from pathlib import Path

PORT = 5000


def main():
    address, folder = sys.argv[1], Path(sys.argv[2])
    from moto.server import ThreadedMotoServer

    ThreadedMotoServer(address, PORT).start()
    os.environ["AWS_ENDPOINT_URL"] = f"http://{address}:{PORT}"
    import boto3

    from modelparallel.launch.clusters.description import ClusterJob, DataChannel
    from modelparallel.launch.clusters.sagemaker.cluster import SageMaker

    given = json.loads((folder / "job.json").read_text())
    fields = dict(given["job"], source_dir=Path(given["job"]["source_dir"]))
    fields["channels"] = {name: DataChannel(location) for name, location in fields.get("channels", {}).items()}
    fields["arguments"] = tuple(fields.get("arguments", ()))
    fields["dependencies"] = tuple(map(Path, fields.get("dependencies", ())))
    boto3.client("s3").create_bucket(Bucket="bkt", CreateBucketConfiguration={"LocationConstraint": "us-west-2"})
    session = boto3.Session()
    sent = []
    cluster = SageMaker(bucket="bkt", boto_session=session, **given["cluster"])
    session.events.register(
        "provide-client-params.sagemaker.CreateTrainingJob", lambda params, **_: sent.append(params)
    )
    job = ClusterJob(**fields)
    cluster.check(job)
    cluster.check_access(job)
    record = cluster.submit(job)
    (request,) = sent
    store = session.client("s3")
    for found in store.list_objects_v2(Bucket="bkt", Prefix=f"{job.name}/").get("Contents", ()):
        path = folder / "bkt" / found["Key"]
        path.parent.mkdir(parents=True, exist_ok=True)
        store.download_file("bkt", found["Key"], str(path))
    answer = {"request": request, "record": dataclasses.asdict(record)}
    (folder / "request.json.partial").write_text(json.dumps(answer))
    (folder / "request.json.partial").rename(folder / "request.json")
    threading.Event().wait()


if __name__ == "__main__":
    main()
