"""A hub for tests: the part of its HTTP interface that the client uses to create, upload (git LFS) and download.

Accounts, rights and private repositories are real; `fail` breaks connections; `calls` says who asked for what.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKENS = {"hf_owner": "me", "hf_stranger": "stranger"}


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories = {}  # id -> {"private": bool, "commits": [{path: bytes}, ...]}
        self.objects = {}  # sha256 -> bytes, of git LFS
        self.calls = []  # "METHOD /path" of every request
        self.fail = {}  # pattern of a call -> how many more times its connection is cut in the middle
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def files(self, repository):
        return self.repositories[repository]["commits"][-1]

    def handle_error(self, request, client_address):
        """A connection that was cut is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        self.answer(self.post)

    def do_PUT(self):
        self.answer(self.put)

    def do_GET(self):
        self.answer(self.get)

    do_HEAD = do_GET

    def answer(self, how):
        path = self.path.partition("?")[0]
        call = f"{self.command} {path}"
        self.server.calls.append(call)
        size = int(self.headers.get("Content-Length") or 0)
        for pattern, left in self.server.fail.items():
            if left and re.search(pattern, call):
                self.server.fail[pattern] -= 1
                self.rfile.read(size // 2)
                self.close_connection = True
                self.connection.close()
                return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user = TOKENS.get(token)
        body = self.rfile.read(size)
        if token and self.user is None:
            self.send(401, {"error": "Invalid user token."})
        else:
            how(path, body)

    def send(self, code, content=b"", **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        if code >= 400 and content:
            headers["X-Error-Message"] = json.loads(content).get("error", "")
        self.send_response(code)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def post(self, path, body):
        hub = self.server
        if path == "/api/repos/create":
            wanted = json.loads(body)
            owner = wanted["organization"] or self.user
            name = f"{owner}/{wanted['name']}"
            if owner != self.user:
                return self.send(403, {"error": f"You don't have the rights to create a model under {owner}"})
            if name in hub.repositories:
                return self.send(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
            hub.repositories[name] = {"private": wanted.get("visibility") == "private", "commits": [{}]}
            return self.send(200, {"url": f"{hub.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = []
            for wanted in json.loads(body)["objects"]:
                upload = {"actions": {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}}
                objects.append({**wanted, **({} if wanted["oid"] in hub.objects else upload)})
            return self.send(200, {"transfer": "basic", "objects": objects})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if not match or match[1] not in hub.repositories:
            return self.send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if match[1].split("/")[0] != self.user:
            return self.send(403, {"error": "Forbidden: you must use a write token"})
        if match[2] == "preupload":
            made = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            return self.send(200, {"files": made})
        files = dict(hub.files(match[1]))
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        hub.repositories[match[1]]["commits"].append(files)
        address = f"{hub.url}/{match[1]}/commit/{oid(files)}"
        return self.send(200, {"success": True, "commitOid": oid(files), "commitUrl": address})

    def put(self, path, body):
        digest = path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != digest:
            return self.send(400, {"error": "the content is not what was announced"})
        self.server.objects[digest] = body
        return self.send(200)

    def get(self, path, body):
        if path == "/api/whoami-v2":
            return self.send(200, {"name": self.user, "type": "user", "orgs": [], "auth": {}})
        match = re.match(r"(/api/models)?/([^/]+/[^/]+)(?:/(\w+)/([^/]+))?(?:/(.+))?$", path)
        repository = self.server.repositories.get(match and match[2])
        if repository is None or (repository["private"] and match[2].split("/")[0] != self.user):
            return self.send(404 if self.user else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        files = next((c for c in repository["commits"] if oid(c) == match[4]), repository["commits"][-1])
        if match[1] and match[3] == "tree":
            return self.send(
                200, [{"type": "file", "path": p, "size": len(b), "oid": sha1(b)} for p, b in files.items()]
            )
        if match[1]:
            about = {"id": match[2], "sha": oid(files), "private": repository["private"], "tags": []}
            return self.send(200, {**about, "siblings": [{"rfilename": p} for p in files]})
        if match[5] not in files:
            return self.send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid(files))
        content = files[match[5]]
        return self.send(200, content, ETag=f'"{sha1(content)}"', X_Repo_Commit=oid(files))


def sha1(content):
    return hashlib.sha1(content).hexdigest()


def oid(files):
    return sha1(repr(sorted((path, sha1(content)) for path, content in files.items())).encode())
