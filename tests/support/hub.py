"""A stand-in of the hub's HTTP interface on loopback: it takes a repository and a commit, and keeps what it got."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = 10_000
"""Bytes from which a file goes the way of large ones."""


class Hub:
    """What was received.

    Attributes:
        files: path in the repository -> bytes, of every commit.
        repos: names that were created.
        refuse: status with which commits are answered, instead of being taken.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.repos: list[str] = []
        self.refuse = 0
        self.objects: dict[str, bytes] = {}
        self.endpoint = ""


@contextmanager
def stand_in() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, document, status=200):
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def body(self):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_PUT(self):
            hub.objects[self.path.rsplit("/", 1)[1]] = self.body()
            self.answer({})

        def do_GET(self):
            self.body()
            self.answer({"error": "not here"}, 404)

        def do_POST(self):
            data, path = self.body(), self.path.partition("?")[0]
            if path == "/api/repos/create":
                asked = json.loads(data)
                name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
                hub.repos.append(name)
                self.answer({"url": f"{hub.endpoint}/{name}", "name": name, "id": name})
            elif path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                files = json.loads(data)["files"]
                modes = [{**file, "mode": "lfs" if file["size"] > LARGE else "regular"} for file in files]
                self.answer(
                    {"files": [{"path": f["path"], "uploadMode": f["mode"], "shouldIgnore": False} for f in modes]}
                )
            elif path.endswith("/info/lfs/objects/batch"):
                objects = json.loads(data)["objects"]
                there = [{**of, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{of['oid']}"}}} for of in objects]
                self.answer({"transfer": "basic", "objects": there})
            elif "/commit/" in path and hub.refuse:
                self.answer({"error": "you may not write here"}, hub.refuse)
            elif "/commit/" in path:
                for line in data.decode().splitlines():
                    item = json.loads(line)
                    value = item["value"]
                    if item["key"] == "file":
                        hub.files[value["path"]] = base64.b64decode(value["content"])
                    elif item["key"] == "lfsFile":
                        hub.files[value["path"]] = hub.objects[value["oid"]]
                self.answer({"commitUrl": f"{hub.endpoint}/a/b/commit/1", "commitOid": "1" * 40, "success": True})
            else:
                self.answer({"error": f"no {path}"}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
