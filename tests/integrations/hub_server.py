"""A hub on loopback, as small as the real client needs it: create, preupload, LFS, commit, tree, resolve, branches.

It can also be a bad one: connections that break half-way, answers that get lost, servers that are busy.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class Hub:
    """Repositories in memory.

    Attributes:
        files: repository → path → content, of the main branch.
        branches: (repository, branch) → path → content, of the others; pull requests are branches `refs/pr/1`….
        private: repositories that are.
        blobs: large files that were uploaded, by their SHA-256.
        requests: (method, path) of all.
        commits: repository and branch of each.
        troubles: what to do to the next request whose method and path begin with this: "cut" the connection in the
            middle of its body, "lose" the answer after it was served, or answer with a status. Used up one by one.
        tokens: that may write.
        bad_words: that no card's metadata may have.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits: list[tuple[str, str]] = []
        self.troubles: list[tuple[str, str, str | int]] = []
        self.tokens = {"hf_test"}
        self.bad_words: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args) -> None:
                pass

            def _handle(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                path, _, query = self.path.partition("?")
                trouble = hub.trouble(self.command, path)
                if trouble == "cut":
                    self.rfile.read(length // 2)
                    hub.requests.append((self.command, path))
                    self.close_connection = True
                    return self.connection.close()
                if self.headers.get("Transfer-Encoding") == "chunked":
                    parts = []
                    while size := int(self.rfile.readline(), 16):
                        parts.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    body = b"".join(parts)
                else:
                    body = self.rfile.read(length)
                hub.requests.append((self.command, path))
                if isinstance(trouble, int):
                    status, headers, content = trouble, {}, b""
                elif not path.startswith("/lfs/") and not hub.allows(self.headers.get("Authorization")):
                    status, headers, content = 401, {}, b"{}"
                else:
                    status, headers, content = hub.answer(self.command, path, body, query)
                if trouble == "lose":
                    self.close_connection = True
                    return self.connection.close()
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_HEAD = _handle

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def environment(self, home: str) -> dict[str, str]:
        """Variables of a process that takes this for the hub, with its cache in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": home,
            "HF_TOKEN": "hf_test",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self.server.shutdown()
        self.server.server_close()

    def trouble(self, method: str, path: str) -> str | int | None:
        """What is to go wrong with a request."""
        for number, (wanted, prefix, what) in enumerate(self.troubles):
            if method == wanted and path.startswith(prefix):
                del self.troubles[number]
                return what
        return None

    def allows(self, authorization: str | None) -> bool:
        return authorization is not None and authorization.removeprefix("Bearer ") in self.tokens

    @staticmethod
    def commit(files: dict[str, bytes]) -> str:
        """A hash of a branch's content, as its head."""
        digest = hashlib.sha1()
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        return digest.hexdigest()

    def branch(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files of a branch, or of the commit at its head; None if there is none."""
        others = [files for (name, _), files in self.branches.items() if name == repo]
        if revision == "main":
            return self.files[repo]
        if (repo, revision) in self.branches:
            return self.branches[repo, revision]
        return next((files for files in (self.files[repo], *others) if self.commit(files) == revision), None)

    def answer(self, method: str, path: str, body: bytes, query: str = "") -> tuple[int, dict[str, str], bytes]:
        def as_json(value, status=200, **headers):
            return status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode()

        def missing(code: str):
            return as_json({"error": code}, 404, **{"X-Error-Code": code})

        if path == "/api/whoami-v2":
            return as_json({"name": "user", "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            refused = [
                {"message": f'"{word}" must be one of [...]'} for word in self.bad_words if word in body.decode()
            ]
            return as_json({"errors": refused, "warnings": []}, 400 if refused else 200)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
            if repo in self.files:
                return as_json({"error": "exists", "url": f"{self.url}/{repo}", "id": repo}, 409)
            self.files[repo] = {}
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.private.add(repo)
            return as_json({"url": f"{self.url}/{repo}", "id": repo})
        if path.startswith("/lfs/"):
            if hashlib.sha256(body).hexdigest() != path.removeprefix("/lfs/"):
                return as_json({"error": "not the file that was announced"}, 422)
            self.blobs[path.removeprefix("/lfs/")] = body
            return 200, {}, b""
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                o if o["oid"] in self.blobs else {**o, "actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return as_json(
                {"transfer": "basic", "objects": objects}, **{"Content-Type": "application/vnd.git-lfs+json"}
            )
        if not (found := re.fullmatch(r"(/api/models)?/([^/]+/[^/]+?)(/.*)?", path)):
            return missing("EntryNotFound")
        api, repo, rest = found[1], found[2], found[3] or ""
        if repo not in self.files:
            return missing("RepoNotFound")
        revision = "main"
        if found := re.match(r"/(preupload|commit|tree|revision|resolve|branch)/([^/]+)", rest):
            revision = unquote(found[2])
        if api and rest.startswith("/branch/"):
            if (repo, revision) in self.branches:
                return as_json({"error": "exists"}, 409)
            self.branches[repo, revision] = dict(self.files[repo])
            return as_json({})
        files = self.branch(repo, revision)
        if files is None:
            return missing("RevisionNotFound")
        if api and rest.startswith("/preupload/"):
            return as_json({"files": [self.mode(f["path"], files) for f in json.loads(body)["files"]]})
        if api and rest.startswith("/commit/"):
            parent = json.loads(body.split(b"\n")[0])["value"].get("parentCommit")
            if parent not in (None, self.commit(files)) and "create_pr=1" not in query:
                return as_json({"error": "A commit has happened since. Please refresh and try again."}, 412)
            return as_json(self.take_commit(repo, revision, files, body, "create_pr=1" in query))
        if api and rest.startswith("/tree/"):
            return as_json(
                [
                    {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for p, c in files.items()
                ]
            )
        if api:
            about = {"id": repo, "modelId": repo, "sha": self.commit(files), "private": repo in self.private}
            return as_json(about | {"siblings": [{"rfilename": p} for p in files]})
        if found := re.fullmatch(r"/resolve/[^/]+/(.+)", rest):
            if found[1] not in files:
                return missing("EntryNotFound")
            content = files[found[1]]
            tag = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{tag}"', "X-Repo-Commit": self.commit(files), "Content-Length": str(len(content))}
            return 200, headers, content
        return missing("EntryNotFound")

    @staticmethod
    def mode(path: str, files: dict[str, bytes]) -> dict:
        """How to upload a file, and what of it is there already."""
        large = path.endswith(".safetensors")
        oid = None
        if path in files:
            content = files[path]
            blob = b"blob %d\0" % len(content) + content
            oid = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(blob).hexdigest()
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def take_commit(self, repo: str, revision: str, files: dict[str, bytes], body: bytes, create_pr: bool) -> dict:
        """All of a commit, or an error and nothing of it."""
        changed = dict(files)
        for line in filter(None, body.split(b"\n")):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                changed[value["path"]] = self.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del changed[value["path"]]
        extra = {}
        if create_pr:
            number = 1 + sum(name == repo and branch.startswith("refs/pr/") for name, branch in self.branches)
            revision = f"refs/pr/{number}"
            self.branches[repo, revision] = changed
            extra = {"pullRequestUrl": f"{self.url}/{repo}/discussions/{number}"}
        else:
            files.clear()
            files.update(changed)
        self.commits.append((repo, revision))
        oid = self.commit(changed)
        return {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid, "hookOutput": "", **extra}
