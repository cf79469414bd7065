"""An API server of Kubernetes, as far as a submitted job needs one: it keeps objects, lists pods, streams logs, and
writes down every request. The controllers are the test: it adds pods and changes what objects say of themselves.
"""

import json
import threading
import time
import uuid
from contextlib import contextmanager
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

TOKEN = "a-token-of-the-kubeconfig"
NODE = "node"


class KubernetesServer:
    """The objects by (plural, namespace, name), and the requests as (method, path, query, body)."""

    def __init__(self):
        self.objects = {}
        self.requests = []
        self.logs = {}
        self.refusals = []
        self.connections_of_logs = 0
        self.break_logs_after = None
        self.lock = threading.Condition()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self):
        return f"http://127.0.0.1:{self._http.server_port}"

    @contextmanager
    def running(self):
        self._thread.start()
        try:
            yield self
        finally:
            with self.lock:
                for log in self.logs.values():
                    log["ended"] = True
                self.lock.notify_all()
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()

    def write_kubeconfig(self, path, namespace="team-a", context="test"):
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": context,
                    "clusters": [{"name": "c", "cluster": {"server": self.url}}],
                    "users": [{"name": "u", "user": {"token": TOKEN}}],
                    "contexts": [{"name": context, "context": {"cluster": "c", "user": "u", "namespace": namespace}}],
                }
            )
        )

    def refuse(self, method, path_end, code, message):
        """Answer such requests with this error from now on."""
        self.refusals.append((method, path_end, code, message))

    def made(self, plural, namespace="team-a"):
        return {key[2]: found for key, found in self.objects.items() if key[:2] == (plural, namespace)}

    def put(self, plural, namespace, made):
        with self.lock:
            self.objects[plural, namespace, made["metadata"]["name"]] = made

    def add_pod(self, name, labels, index, *, namespace="team-a", state="running", **status):
        """A pod of a job; with a log that goes on until `end_log`."""
        container = {"name": NODE, "state": {state: {}}, "restartCount": 0}
        metadata = {
            "name": name,
            "uid": str(uuid.uuid4()),
            "creationTimestamp": _now(),
            "labels": {**labels, "batch.kubernetes.io/job-completion-index": str(index)},
        }
        phase = {"running": "Running", "waiting": "Pending", "terminated": "Succeeded"}[state]
        said = {"phase": phase, "containerStatuses": [container], **status}
        self.put("pods", namespace, {"metadata": metadata, "status": said})
        self.logs[name] = {"lines": [], "ended": False}

    def log(self, pod, *texts):
        with self.lock:
            for text in texts:
                moment = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%S.%f}".rstrip("0") + "Z"
                self.logs[pod]["lines"].append((time.time(), f"{moment} {text}\n".encode()))
                time.sleep(0.001)  # so that each has a time of its own
            self.lock.notify_all()

    def end_pod(self, name, code=0, *, namespace="team-a", reason=""):
        with self.lock:
            status = self.objects["pods", namespace, name]["status"]
            status["phase"] = "Succeeded" if code == 0 else "Failed"
            ended = {"exitCode": code, "finishedAt": _now(), "reason": reason or ("Error" if code else "Completed")}
            status["containerStatuses"][0]["state"] = {"terminated": ended}
            self.logs[name]["ended"] = True
            self.lock.notify_all()

    def set_condition(self, plural, name, kind, reason="", message="", *, namespace="team-a"):
        with self.lock:
            found = self.objects[plural, namespace, name]
            condition = {"type": kind, "status": "True", "reason": reason, "message": message}
            condition["lastTransitionTime"] = _now()
            found.setdefault("status", {}).setdefault("conditions", []).append(condition)

    def answer(self, method, path, query, body):
        """(code, object) of a request that is not for a log."""
        for refused, path_end, code, message in self.refusals:
            if refused == method and path.endswith(path_end):
                return code, _status(code, message)
        _, _, rest = path.partition("/namespaces/")
        namespace, plural, *more = rest.split("/")
        name = more[0] if more else None
        if method == "POST":
            return self._create(plural, namespace, query, body)
        if name is None:
            return 200, {"kind": "List", "items": self._listed(plural, namespace, query.get("labelSelector", ""))}
        found = self.objects.get((plural, namespace, name))
        if found is None:
            return 404, _status(404, f'{plural} "{name}" not found')
        if method == "PATCH":
            _merge(found, body)
        if method == "DELETE":
            self._delete(plural, namespace, name, found)
        return 200, found

    def _create(self, plural, namespace, query, body):
        name = body["metadata"]["name"]
        if (plural, namespace, name) in self.objects:
            return 409, _status(409, f'{plural} "{name}" already exists')
        if body["metadata"].get("namespace", namespace) != namespace:
            return 400, _status(400, "the namespace of the provided object does not match that of the request")
        made = json.loads(json.dumps(body))
        made["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": _now(), "namespace": namespace}
        if query.get("dryRun") != "All":
            self.objects[plural, namespace, name] = made
        return 201, made

    def _delete(self, plural, namespace, name, found):
        del self.objects[plural, namespace, name]
        # The garbage collector: what the deleted one owned.
        for key, other in list(self.objects.items()):
            owners = other["metadata"].get("ownerReferences", [])
            if any(owner["uid"] == found["metadata"].get("uid") for owner in owners):
                del self.objects[key]

    def _listed(self, plural, namespace, selector):
        wanted = dict(part.split("=") for part in filter(None, selector.split(",")))
        found = self.made(plural, namespace).values()
        return [each for each in found if wanted.items() <= each["metadata"].get("labels", {}).items()]


def _handler_of(server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self):
            parts = urlsplit(self.path)
            query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(text) if text else None
            with server.lock:
                server.requests.append((self.command, parts.path, query, body))
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    code, answer = 401, _status(401, "Unauthorized")
                elif parts.path.endswith("/log"):
                    code, answer = 200, None
                else:
                    code, answer = server.answer(self.command, parts.path, query, body)
            if answer is None:
                self._stream(parts.path.split("/")[-2], query)
                return
            content = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = do_DELETE = _serve

        def _stream(self, pod, query):
            log = server.logs[pod]
            since = time.time() - float(query["sinceSeconds"]) if "sinceSeconds" in query else 0.0
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            server.connections_of_logs += 1
            number = num_sent = 0
            while True:
                with server.lock:
                    while query.get("follow") == "true" and number == len(log["lines"]) and not log["ended"]:
                        server.lock.wait()
                    lines = log["lines"][number:]
                number += len(lines)
                for moment, line in lines:
                    if moment >= since:
                        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                        self.wfile.flush()
                        num_sent += 1
                    if num_sent == server.break_logs_after:
                        server.break_logs_after = None
                        self.close_connection = True
                        return  # in the middle of a chunked answer
                if not lines:
                    self.wfile.write(b"0\r\n\r\n")
                    return

        def log_message(self, *arguments):
            pass

    return Handler


def _status(code, message):
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message}


def _now():
    return f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"


def _merge(found, change):
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(found.get(key), dict):
            _merge(found[key], value)
        else:
            found[key] = value
