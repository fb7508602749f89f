"""Fake Hub on loopback, with the endpoints that `huggingface_hub` needs to create, write and read repositories."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

USER = "tester"
REGULAR_SIZE = 1_000  # longer files and binary files are uploaded through Git LFS
CREATED = "2024-01-01T00:00:00.000Z"


class Repository:
    def __init__(self, name, kind, private):
        self.name, self.kind, self.private = name, kind, private
        self.files = {}
        self.commits = [hashlib.sha1(name.encode()).hexdigest()]
        self.messages = []


class StandInHub:
    """Repositories, named "models/user/name" or "datasets/user/name". Only writes need the token."""

    def __init__(self, token):
        self.token = token
        self.repositories = {}
        self.large_files = {}
        self.unknown = []  # requests without a route
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repository):
        return self.repositories[repository].files

    def create(self, name, organization, kind, private):
        key = f"{kind}s/{organization or USER}/{name}"
        existed = key in self.repositories
        self.repositories.setdefault(key, Repository(key.split("/", 1)[1], kind, private))
        prefix = "" if kind == "model" else f"{kind}s/"
        return (409 if existed else 200), {"url": f"{self.url}/{prefix}{self.repositories[key].name}"}

    def commit(self, repository, lines):
        for line in map(json.loads, lines.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.large_files[value["oid"]]
        state = sorted((path, hashlib.sha1(content).hexdigest()) for path, content in repository.files.items())
        repository.commits.append(hashlib.sha1(repr(state).encode()).hexdigest())
        commit = repository.commits[-1]
        return {"commitUrl": f"{self.url}/{repository.name}/commit/{commit}", "commitOid": commit}


def is_large(content):
    return len(content) > REGULAR_SIZE or b"\0" in content


def entry(path, content):
    described = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if is_large(content):
        described["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
    return described


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.do_GET()

    def do_PUT(self):
        self.do_GET()

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        writes = self.command == "POST" and "/paths-info/" not in path
        if writes and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._send(401, {"error": "Invalid token"})
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                with self.hub.lock:
                    return answer(self, body, **match.groupdict())
        self.hub.unknown.append(f"{self.command} {self.path}")
        return self._send(404, {"error": f"No route for {self.command} {self.path}"})

    def _send(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repository(self, kind, repo):
        repository = self.hub.repositories.get(f"{kind or 'models'}/{repo}")
        if repository is None:
            self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return repository

    # Accounts and repositories

    def whoami(self, body):
        self._send(200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, body):
        wanted = json.loads(body)
        private = wanted.get("visibility") == "private"
        status, answer = self.hub.create(
            wanted["name"], wanted.get("organization"), wanted.get("type", "model"), private
        )
        self._send(status, answer)

    def validate(self, body):
        self._send(200, {"errors": [], "warnings": []})

    def info(self, body, kind, repo, revision="main"):
        if repository := self._repository(kind, repo):
            self._send(
                200,
                {
                    "_id": repository.commits[0][:24],
                    "id": repo,
                    "sha": repository.commits[-1],
                    "private": repository.private,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "createdAt": CREATED,
                    "lastModified": CREATED,
                    "siblings": [{"rfilename": path} for path in repository.files],
                },
            )

    # Writing

    def preupload(self, body, kind, repo, revision):
        files = []
        for file in json.loads(body)["files"]:
            large = file["size"] > REGULAR_SIZE or b"\0" in base64.b64decode(file["sample"])
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        self._send(200, {"files": files})

    def batch(self, body, repo):
        objects = []
        for wanted in json.loads(body)["objects"]:
            href = f"{self.hub.url}/storage/{wanted['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{self.hub.url}/api/verify"}}
            objects.append({**wanted, **({} if wanted["oid"] in self.hub.large_files else {"actions": actions})})
        self._send(200, {"transfer": "basic", "objects": objects})

    def store(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400)
        self.hub.large_files[oid] = body
        return self._send(200)

    def verify(self, body):
        self._send(200 if json.loads(body)["oid"] in self.hub.large_files else 404)

    def commit(self, body, kind, repo, revision):
        if repository := self._repository(kind, repo):
            self._send(200, self.hub.commit(repository, body))

    # Reading

    def tree(self, body, kind, repo, revision, folder=""):
        if repository := self._repository(kind, repo):
            prefix = f"{folder}/" if folder else ""
            below = [path for path in repository.files if path.startswith(prefix)]
            if folder and not below:
                return self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("1", "true")
            entries = {}
            for path in below:
                first, slash, _ = path[len(prefix) :].partition("/")
                if recursive or not slash:
                    entries[path] = entry(path, repository.files[path])
                if slash:
                    entries[prefix + first] = {"type": "directory", "path": prefix + first, "oid": "0" * 40, "size": 0}
            return self._send(200, list(entries.values()))
        return None

    def paths_info(self, body, kind, repo, revision):
        if repository := self._repository(kind, repo):
            if self.headers["Content-Type"] == "application/json":
                paths = json.loads(body)["paths"]
            else:
                paths = parse_qs(body.decode())["paths"]
            answer = [entry(path, repository.files[path]) for path in paths if path in repository.files]
            folders = [path for path in paths if any(file.startswith(f"{path}/") for file in repository.files)]
            answer += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
            self._send(200, answer)

    def resolve(self, body, kind, repo, revision, path):
        if repository := self._repository(kind, repo):
            content = repository.files.get(path)
            if content is None:
                return self._send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=repository.commits[-1])
            digest = hashlib.sha256(content).hexdigest()
            return self._send(200, content, ETag=f'"{digest}"', X_Repo_Commit=repository.commits[-1])
        return None


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_REPO}"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", _API, _Handler.info),
    ("GET", rf"{_API}/revision/{_REVISION}", _Handler.info),
    ("POST", rf"{_API}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"/(datasets/)?{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/storage/(?P<oid>[0-9a-f]+)", _Handler.store),
    ("POST", "/api/verify", _Handler.verify),
    ("POST", rf"{_API}/commit/{_REVISION}", _Handler.commit),
    ("GET", rf"{_API}/tree/{_REVISION}(/(?P<folder>.+))?", _Handler.tree),
    ("POST", rf"{_API}/paths-info/{_REVISION}", _Handler.paths_info),
    ("GET HEAD", rf"/((?P<kind>datasets)/)?{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
