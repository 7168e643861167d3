"""`streaming: true` over HTTP: a server of the standard library in a thread, whole and broken off."""

import http.server
import io
import json
import re
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import prepare
from data.document import Image, Text
from data.source.prepared import Prepared

pytest.importorskip("aiohttp")  # the extra hf

PICTURES = [Path("tests/data/samples/pictures", name).read_bytes() for name in ("0.png", "1.jpg", "2.png")]
ROWS: list[dict[str, Any]] = [{"n": str(k), "txt": f"text {k}", "png": PICTURES[k % 3]} for k in range(5)]


class Server(http.server.ThreadingHTTPServer):
    """Files by name. When `dead` it hangs up on everyone, when `cut` in the middle of a content."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ranges: list[str] = []
        self.dead = self.cut = False
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        if self.server.dead:
            self.close_connection = True
            return
        content = self.server.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        size, start = len(content), int(asked[1]) if asked else 0
        content = content[start : int(asked[2]) + 1 if asked and asked[2] else size]
        self.send_response(206 if asked else 200)
        if asked:
            self.server.ranges.append(self.path)
            self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and self.server.cut:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # the tests' environment says True
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 1)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    table = pa.Table.from_pylist([{**row, "png": {"bytes": row["png"]}} for row in rows])
    pq.write_table(table, file, row_group_size=2)
    return file.getvalue()


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps({"n": row["n"], "txt": row["txt"]}) + "\n" for row in rows).encode()


def tar(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for row in rows:
            for suffix, content in (("png", row["png"]), ("txt", row["txt"].encode())):
                member = tarfile.TarInfo(f"{row['n']}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def options(folder: Path, server: Server, builder: str, names: list[str], columns: str) -> list[str]:
    urls = json.dumps([f"{server.url}/{name}" for name in names])
    (folder / "a.yaml").write_text(f"dataset: {{path: {builder}, data_files: {urls}, streaming: true}}\n"
                                   f"segments: {columns}\n")  # fmt: skip
    return ["--input", str(folder / "a.yaml"), "--out", str(folder / "out"), "--workers=0"]


@pytest.mark.parametrize(
    ("builder", "make", "columns"),
    [
        ("parquet", parquet, "[{text: txt}, {image: png}]"),
        ("json", jsonl, "[{text: txt}]"),
        ("webdataset", tar, "[{text: txt}, {image: png}]"),
    ],
)
def test_files_behind_urls(tmp_path: Path, server: Server, builder: str, make: Any, columns: str) -> None:
    """Two files become two shards, whose documents hold the texts and the very bytes of the images."""
    server.files = {"0": make(ROWS[:3]), "1": make(ROWS[3:])}
    prepare.main(options(tmp_path, server, builder, ["0", "1"], columns))
    prepared = Prepared(tmp_path / "out")
    paths = sorted((tmp_path / "out/shards").iterdir())
    shards = [pa.ipc.open_file(str(path)).read_all().to_pylist() for path in paths]
    assert [[row["segments"][0]["text"] for row in rows] for rows in shards] == [
        ["text 0", "text 1", "text 2"], ["text 3", "text 4"]
    ]  # fmt: skip
    kinds = [tuple(map(type, prepared.document(k).segments)) for k in range(5)]
    if builder == "json":
        assert kinds == [(Text,)] * 5
    else:
        assert kinds == [(Text, Image)] * 5
        found = [row["segments"][1]["image"] for rows in shards for row in rows]
        assert found == [row["png"] for row in ROWS]
    assert (builder == "webdataset") or server.ranges  # parquet is read from its end


def test_a_server_that_is_not_there_or_has_no_such_file(tmp_path: Path, server: Server, capsys) -> None:
    for dead in (False, True):
        server.dead = dead
        with pytest.raises(SystemExit) as exit:
            prepare.main(options(tmp_path, server, "parquet", ["nothing"], "[{text: txt}]"))
        assert exit.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {tmp_path}/a.yaml: the dataset cannot be loaded: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["dead", "cut"])
@pytest.mark.parametrize("make", [parquet, jsonl, tar])
def test_a_stream_that_breaks_off_ends_the_run_and_the_same_command_goes_on(
    tmp_path: Path, server: Server, capsys, monkeypatch: pytest.MonkeyPatch, make: Any, how: str
) -> None:
    """What the server did not deliver is not taken for rejected."""
    server.files = {"0": make(ROWS[:3]), "1": make(ROWS[3:])}
    builder = {parquet: "parquet", jsonl: "json", tar: "webdataset"}[make]
    arguments = options(tmp_path, server, builder, ["0", "1"], "[{text: txt}]")
    make_shard = prepare.make_shard

    def dies(job, unit, number, *rest) -> None:
        setattr(server, how, number == 1)
        make_shard(job, unit, number, *rest)

    monkeypatch.setattr(prepare, "make_shard", dies)
    with pytest.raises(SystemExit) as exit:
        prepare.main(arguments)
    assert exit.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/a.yaml: the stream broke off behind its start: ")
    setattr(server, how, False)
    monkeypatch.setattr(prepare, "make_shard", make_shard)
    prepare.main(arguments)
    prepared = Prepared(tmp_path / "out")
    assert [prepared.document(k, pixels=False).segments[0] for k in range(5)] == [Text(row["txt"]) for row in ROWS]
    assert (tmp_path / "out/quarantine.jsonl").read_bytes() == b""
