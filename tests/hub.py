"""A local server that answers like the Hugging Face hub: the model API, and HEAD and GET of a repository's files."""
import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def checksum(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@contextmanager
def local_hub(root: Path):
    """Serve every folder root/owner/name as a model; yields the endpoint and the list of paths that were asked for."""
    asked = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = self.path.partition("?")[0]
            asked.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"] and (root / parts[2] / parts[3]).is_dir():
                folder = root / parts[2] / parts[3]
                name = f"{parts[2]}/{parts[3]}"
                held = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
                about = {"_id": "0", "id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [],
                         "siblings": [{"rfilename": file} for file in held]}
                if "tree" in parts:         # what newer clients list a repository with
                    about = [{"type": "file", "path": file, "size": f.stat().st_size, "oid": checksum(f.read_bytes())}
                             for file, f in held.items()]
                return self.answer(json.dumps(about).encode(), "application/json")
            file = root / "/".join([*parts[:2], *parts[4:]])
            if parts[2:3] == ["resolve"] and file.is_file():
                return self.answer(file.read_bytes(), "application/octet-stream")
            return self.answer(b'{"error": "Repository not found"}', "application/json", 404)

        do_HEAD = do_GET

        def answer(self, body: bytes, kind: str, status: int = 200):
            self.send_response(status)
            sent = {"Content-Type": kind, "Content-Length": str(len(body)), "X-Repo-Commit": COMMIT,
                    "ETag": f'"{checksum(body)}"'}
            if status == 404:
                sent["X-Error-Code"] = "RepoNotFound"
            for header, value in sent.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
