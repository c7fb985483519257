#!/usr/bin/env bash
# A watch of the Kubernetes client that makes no model objects cannot say that its history is gone (410).
#
# Expected: watch.Watch().stream(..., deserialize=False) raises ApiException(410) where the server sends an ERROR
#   event of code 410, as it does with deserialize=True; the caller then lists again.
# Happens: it reads event["raw_object"], which only the deserializing half sets: KeyError: 'raw_object'. Every
#   other ERROR event, as 500, is the same KeyError.
# Versions: kubernetes 37.0.2.
# Matters: whoever follows thousands of Jobs wants no model objects, and has to tell a 410 from a mistake.
# Do: read the lines of the response, or catch KeyError and list again whatever it was.
#
# Seen on 2026-11-30:
#   kubernetes 37.0.2
#   deserialize=True: ApiException 410
#   deserialize=False: KeyError 'raw_object'
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
pins=('kubernetes==37.0.2')
if command -v uv >/dev/null; then
  uv venv --quiet venv && uv pip install --quiet --python venv/bin/python "${pins[@]}"
else
  python3 -m venv venv && venv/bin/python -m pip install --quiet "${pins[@]}"
fi

venv/bin/python - <<'PY'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import kubernetes
from kubernetes import client, watch

GONE = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}


class Server(BaseHTTPRequestHandler):
    """An API server whose watch has no history left."""

    def do_GET(self):
        line = json.dumps({"type": "ERROR", "object": GONE}).encode() + b"\n"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(line)))
        self.end_headers()
        self.wfile.write(line)

    def log_message(self, *_):
        pass


def said(deserialize):
    jobs = client.BatchV1Api(client.ApiClient(configuration))
    events = watch.Watch().stream(
        jobs.list_namespaced_job, "default", resource_version="1", timeout_seconds=5, deserialize=deserialize
    )
    try:
        return f"{len(list(events))} events"
    except client.ApiException as error:
        return f"ApiException {error.status}"
    except KeyError as error:
        return f"KeyError {error}"


print(f"kubernetes {kubernetes.__version__}")
server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
configuration = client.Configuration(host=f"http://127.0.0.1:{server.server_port}")
found = {how: said(how) for how in (True, False)}
for how, what in found.items():
    print(f"deserialize={how}: {what}")
assert found == {True: "ApiException 410", False: "KeyError 'raw_object'"}, "the behavior has changed"
PY
