"""A hub on loopback, as small as the real client needs it: create, preupload, LFS, commit, tree, resolve."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """Repositories in memory. `files[repo]` maps a path to its content; `requests` lists (method, path)."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args) -> None:
                pass

            def _handle(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                if self.headers.get("Transfer-Encoding") == "chunked":
                    parts = []
                    while size := int(self.rfile.readline(), 16):
                        parts.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    body = b"".join(parts)
                else:
                    body = self.rfile.read(length)
                path = self.path.split("?")[0]
                hub.requests.append((self.command, path))
                status, headers, content = hub.answer(self.command, path, body)
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

    def commit(self, repo: str) -> str:
        """A hash of the repository's content, as its head."""
        digest = hashlib.sha1()
        for path, content in sorted(self.files[repo].items()):
            digest.update(path.encode() + content)
        return digest.hexdigest()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        def as_json(value, status=200, **headers):
            return status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode()

        def missing(code: str):
            return as_json({"error": code}, 404, **{"X-Error-Code": code})

        if path == "/api/whoami-v2":
            return as_json({"name": "user", "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return as_json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
            self.files.setdefault(repo, {})
            return as_json({"url": f"{self.url}/{repo}", "id": repo})
        if path.startswith("/lfs/"):
            self.blobs[path.removeprefix("/lfs/")] = body
            return 200, {}, b""
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}}
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
        files = self.files[repo]
        if api and rest.startswith("/preupload/"):
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return as_json({"files": modes})
        if api and rest.startswith("/commit/"):
            for line in filter(None, body.split(b"\n")):
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.blobs[value["oid"]]
            return as_json(
                {"commitUrl": f"{self.url}/{repo}/commit/x", "commitOid": self.commit(repo), "hookOutput": ""}
            )
        if api and rest.startswith("/tree/"):
            return as_json(
                [
                    {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for p, c in files.items()
                ]
            )
        if api:
            return as_json(
                {"id": repo, "modelId": repo, "sha": self.commit(repo), "siblings": [{"rfilename": p} for p in files]}
            )
        if found := re.fullmatch(r"/resolve/[^/]+/(.+)", rest):
            if found[1] not in files:
                return missing("EntryNotFound")
            content = files[found[1]]
            tag = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{tag}"', "X-Repo-Commit": self.commit(repo), "Content-Length": str(len(content))}
            return 200, headers, content
        return missing("EntryNotFound")
