"""A hub on this machine, which the real client talks to through HF_ENDPOINT: repositories with commits, large files
behind a redirect to another origin, uploads, and the faults that a test asks for."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN, READ_TOKEN = "hf_writesAndMustNeverBePrinted", "hf_readsAndMustNeverBePrinted"
INVALID = {"X-Error-Message": "Invalid credentials in Authorization header"}
LARGE = (".safetensors", ".gguf", ".bin")


def git_sum(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # newest last
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        id = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[id], self.refs[ref] = files, id
        return id

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """What the next requests that fit get instead: a status, or only so many bytes of the body, or wrong bytes."""

    pattern: str  # of "METHOD /path"
    times: int = 1
    after: int = 0  # so many that fit go through before
    status: int | None = None
    headers: dict = field(default_factory=dict)
    cut: int | None = None
    hold: threading.Event | None = None  # after the cut: wait for it, then close
    damage: bool = False
    body: bytes | None = None


class Hub:
    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # uploaded, by sha256
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, dict]] = []
        self.bodies: list[bytes] = []
        self.endpoint = self.cdn = ""

    def seen(self, pattern: str) -> list[dict]:
        """The headers of the requests that fit."""
        return [headers for method, path, headers in self.requests if re.search(pattern, f"{method} {path}")]

    def fault(self, line: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, line):
                if fault.after > 0:
                    fault.after -= 1
                    continue
                fault.times -= 1
                return fault


@contextlib.contextmanager
def running():
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]  # the second is the other origin
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def handle_any(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        self.body = self.read_body()
        self.fault = hub.fault(f"{self.command} {path}")
        if self.fault and self.fault.status:
            return self.send(self.fault.status, self.fault.body or b"{}", self.fault.headers)
        for pattern, action in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return action(self, *found.groups())
        return self.send(404, b"{}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            out = b""
            while size := int(self.rfile.readline(), 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, body: bytes = b"", headers: dict | None = None, length: int | None = None):
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.cut is not None:
            self.wfile.write(body[: self.fault.cut])
            self.wfile.flush()
            if self.fault.hold:
                self.fault.hold.wait(30)
            self.close_connection = True
            return
        self.wfile.write(body)

    def answer(self, value, status: int = 200):
        self.send(status, json.dumps(value).encode())

    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def repo(self, name: str) -> Repo | None:
        """The repository, or None where the answer has been given."""
        found, token = self.hub.repos.get(name), self.token()
        if token not in (None, TOKEN, READ_TOKEN):
            self.send(401, b"{}", INVALID)
        elif found is None or (found.private and not token):
            self.send(404 if token else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif found.gated:
            self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        else:
            return found
        return None

    def at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repo = self.repo(name)
        if repo is None:
            return None
        commit = repo.find(revision)
        if commit is None:
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, repo.commits[commit]

    def info(self, name: str, revision: str = "main"):
        if at := self.at(name, revision):
            siblings = []
            for path, content in at[1].items():
                one = {"rfilename": path, "size": len(content), "blobId": git_sum(content)}
                if path.endswith(LARGE):
                    one["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 130}
                siblings.append(one)
            self.answer({"id": name, "modelId": name, "sha": at[0], "siblings": siblings, "tags": [], "downloads": 0})

    def tree(self, name: str, revision: str):
        if at := self.at(name, revision):
            entries = []
            for path, content in at[1].items():
                one = {"type": "file", "path": path, "size": len(content), "oid": git_sum(content)}
                if path.endswith(LARGE):
                    one["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
                entries.append(one)
            self.answer(entries)

    def resolve(self, name: str, revision: str, path: str):
        if not (at := self.at(name, revision)):
            return
        headers = {"X-Repo-Commit": at[0]}
        if path not in at[1]:
            self.send(404, b"{}", headers | {"X-Error-Code": "EntryNotFound"})
        elif path.endswith(LARGE):
            oid, size = sha256(at[1][path]), len(at[1][path])
            self.hub.blobs[oid] = at[1][path]
            headers |= {
                "X-Linked-Etag": f'"{oid}"',
                "X-Linked-Size": str(size),
                "Location": f"{self.hub.cdn}/cdn/{oid}",
            }
            self.send(302, b"", headers)
        else:
            self.send_content(at[1][path], headers | {"ETag": f'"{git_sum(at[1][path])}"'})

    def large(self, oid: str):
        self.send_content(self.hub.blobs[oid], {"ETag": f'"{oid}"'})

    def send_content(self, content: bytes, headers: dict):
        headers = headers | {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if self.fault and self.fault.damage:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(found[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.send(206, content[start:], headers)
        self.send(200, content, headers)

    def whoami(self):
        if self.token() not in (TOKEN, READ_TOKEN):
            return self.send(
                401, b'{"error": "Invalid"}', {"X-Error-Message": "Invalid credentials in Authorization header"}
            )
        role = "write" if self.token() == TOKEN else "read"
        self.answer({"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": role}}})

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if self.token() != TOKEN:
            return self.send(403, b'{"error": "You may not"}')
        if name in self.hub.repos:
            return self.answer({"error": "exists", "url": f"{self.hub.endpoint}/{name}"}, 409)
        self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or asked.get("private", False))
        self.hub.repos[name].commit({})
        self.answer({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name})

    def yaml(self):
        self.answer({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str):
        if self.repo(name):
            files = [f["path"] for f in json.loads(self.body)["files"]]
            mode = {True: "lfs", False: "regular"}
            answer = [{"path": f, "uploadMode": mode[f.endswith(LARGE)], "shouldIgnore": False} for f in files]
            self.answer({"files": answer})

    def batch(self, name: str):
        if self.repo(name):
            objects = json.loads(self.body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.hub.cdn}/upload/{one['oid']}"}}
            self.answer({"transfer": "basic", "objects": objects})

    def upload(self, oid: str):
        if sha256(self.body) != oid:
            return self.send(400, b"{}")
        self.hub.blobs[oid] = self.body
        self.send(200)

    def commit(self, name: str, revision: str):
        if not (repo := self.repo(name)):
            return
        if self.token() != TOKEN:
            return self.send(403, b'{"error": "You may not"}')
        files = dict(repo.commits[repo.refs[revision]])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        id = repo.commit(files, revision)
        self.answer({"success": True, "commitOid": id, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{id}"})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (rf"GET /api/models/{NAME}", Handler.info),
    (rf"GET /api/models/{NAME}/revision/(.+)", Handler.info),
    (rf"GET /api/models/{NAME}/tree/([^/]+)/?", Handler.tree),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    (r"(?:GET|HEAD) /cdn/(\w+)", Handler.large),
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.yaml),
    (rf"POST /api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /upload/(\w+)", Handler.upload),
    (rf"POST /api/models/{NAME}/commit/(.+)", Handler.commit),
]
