"""A download ends with the whole file under its name or with a DataError, whatever the server does.

All servers here run in this process; no test touches the network.
"""

import hashlib
import http.server
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ddpm_lib import download as module
from ddpm_lib.download import DataError, download

CONTENT = random.Random(0).randbytes(300_000)
MD5, SIZE = hashlib.md5(CONTENT).hexdigest(), len(CONTENT)
HALF = SIZE // 2


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT at every path; ``behave(handler, start)`` decides how, ``log`` holds where each request began."""

    daemon_threads = True

    def __init__(self, behave: Callable):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.log = behave, []
        self.stopping = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-")
        self.server.log.append(int(wanted))
        self.server.behave(self, int(wanted))

    def answer(self, start: int, content: bytes = CONTENT, stop: int | None = None, length: bool = True) -> None:
        """Send content[start:stop] while promising content[start:]."""
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:stop])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[[Callable], Server]]:
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(behave: Callable) -> Server:
        servers.append(Server(behave))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.stopping.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "cache" / "file"


@pytest.fixture
def part(path) -> Path:
    path.parent.mkdir()
    return path.with_name("file.part")


def get(path: Path, *servers: Server | str, timeout: float = 20.0) -> None:
    addresses = [server if isinstance(server, str) else server.address for server in servers]
    download(addresses, path, MD5, SIZE, timeout)


def assert_whole(path: Path) -> None:
    assert path.read_bytes() == CONTENT
    assert not path.with_name("file.part").exists()


def honest(handler: Handler, start: int) -> None:
    handler.answer(start)


def deaf(handler: Handler, start: int) -> None:
    """Knows no ranges."""
    handler.answer(0)


def missing(handler: Handler, start: int) -> None:
    handler.send_error(404)


def liar(handler: Handler, start: int) -> None:
    """Other bytes, of the right number."""
    handler.answer(start, bytes(SIZE))


def silent(handler: Handler, start: int) -> None:
    handler.server.stopping.wait()


def stalls(handler: Handler, start: int) -> None:
    """Goes silent in the middle of the first answer."""
    handler.answer(start, stop=None if start else HALF)
    if not start:
        handler.wfile.flush()
        handler.server.stopping.wait()


def cuts_at(*places: int) -> Callable:
    """Answers break off at these places, one after the other; then all is well."""

    def behave(handler: Handler, start: int) -> None:
        i = len(handler.server.log) - 1
        handler.answer(start, stop=places[i] if i < len(places) else None)

    return behave


def test_a_file_comes_whole(serve, path):
    server = serve(honest)
    get(path, server)
    assert_whole(path)
    assert server.log == [0]


def test_a_file_that_is_there_is_not_asked_for(serve, path):
    server = serve(honest)
    get(path, server)
    get(path, server)
    assert server.log == [0]


def test_broken_connections_are_resumed_where_they_broke(serve, path):
    server = serve(cuts_at(1000, HALF, SIZE - 1))
    get(path, server)
    assert_whole(path)
    assert server.log == [0, 1000, HALF, SIZE - 1]


def test_another_address_goes_on_where_the_first_stopped(serve, path):
    first, second = serve(cuts_at(HALF, HALF)), serve(honest)
    get(path, first, second)
    assert_whole(path)
    assert (first.log, second.log) == ([0, HALF], [HALF])


def test_a_part_of_an_earlier_call_is_continued(serve, path, part):
    part.write_bytes(CONTENT[:12345])
    server = serve(honest)
    get(path, server)
    assert_whole(path)
    assert server.log == [12345]


def test_a_server_without_ranges_sends_all_again(serve, path, part):
    part.write_bytes(CONTENT[:HALF])
    server = serve(deaf)
    get(path, server)
    assert_whole(path)
    assert server.log == [HALF]


def test_a_server_that_always_breaks_off_and_knows_no_ranges_is_given_up(serve, path):
    server = serve(lambda handler, start: handler.answer(0, stop=HALF))
    with pytest.raises(DataError, match=f"broke off after {HALF:,} of {SIZE:,} bytes"):
        get(path, server)
    assert server.log == [0, HALF]
    assert not path.exists()


@pytest.mark.parametrize(
    ("content", "asked"),
    [
        (CONTENT, []),
        (CONTENT + b"more", [0]),
        (bytes(SIZE), [0]),
        (b"<html>Please log in</html>", [26, 0]),
        (bytes(HALF), [HALF, 0]),
        (b"", [0]),
    ],
    ids=["whole", "too long", "wrong", "a page", "wrong half", "empty"],
)
def test_whatever_an_old_part_holds_the_file_comes_right(serve, path, part, content, asked):
    part.write_bytes(content)
    server = serve(honest)
    get(path, server)
    assert_whole(path)
    assert server.log == asked


def test_wrong_bytes_are_removed_and_the_next_address_asked(serve, path):
    first, second = serve(liar), serve(honest)
    get(path, first, second)
    assert_whole(path)
    assert (first.log, second.log) == ([0], [0])


def test_wrong_bytes_everywhere_are_an_error_that_says_so(serve, path):
    with pytest.raises(DataError, match=f"sent another content, of md5 [0-9a-f]{{32}} instead of {MD5}, which was"):
        get(path, serve(liar))
    assert [file.name for file in path.parent.iterdir()] == [".file.lock"]


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", b"<html>Please log in</html>", b""], ids=len)
def test_a_file_of_another_length_is_not_even_fetched(serve, path, part, content):
    part.write_bytes(CONTENT[:10])
    with pytest.raises(DataError, match=f"offers {len(content):,} bytes, but the file has {SIZE:,}"):
        get(path, serve(lambda handler, start: handler.answer(0, content)))
    assert part.read_bytes() == CONTENT[:10]


def test_an_answer_without_a_length(serve, path):
    get(path, serve(lambda handler, start: handler.answer(start, length=False)))
    assert_whole(path)


def test_an_answer_without_end_is_read_to_the_size_only(serve, path):
    def endless(handler: Handler, start: int) -> None:
        handler.answer(0, length=False)
        while not handler.server.stopping.is_set():
            handler.wfile.write(bytes(1000))

    get(path, serve(endless))
    assert_whole(path)


def test_an_answer_with_another_range_than_asked_for(serve, path, part):
    part.write_bytes(CONTENT[:1000])
    with pytest.raises(DataError, match="another range than the one asked for"):
        get(path, serve(lambda handler, start: handler.answer(start - 1)))
    assert part.read_bytes() == CONTENT[:1000]


def test_a_server_that_says_nothing_is_left_after_the_timeout(serve, path):
    started = time.monotonic()
    with pytest.raises(DataError, match="timed out"):
        get(path, serve(silent), timeout=0.3)
    assert time.monotonic() - started < 10


def test_a_server_that_falls_silent_is_asked_again_for_the_rest(serve, path):
    server = serve(stalls)
    get(path, server, timeout=0.5)
    assert_whole(path)
    assert server.log == [0, HALF]


def test_every_failure_is_told_with_its_address(serve, path):
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unheard.getsockname()[1]}/file"
        gone, lying = serve(missing), serve(liar)
        with pytest.raises(DataError) as caught:
            get(path, closed, gone, lying)
    lines = str(caught.value).splitlines()
    assert [line.strip().startswith(address) for line, address in zip(lines, (closed, gone.address, lying.address))]
    assert "refused" in lines[0]
    assert "404" in lines[1]
    assert "another content" in lines[2]
    assert len(lines) == 3


def test_garbage_instead_of_http(path, serve):
    def garbage(handler: Handler, start: int) -> None:
        handler.wfile.write(b"\0\1\2 nonsense\r\n\r\n")

    with pytest.raises(DataError, match="http://127"):
        get(path, serve(garbage))


def test_a_folder_that_cannot_be_written(serve, tmp_path):
    (tmp_path / "cache").write_text("a file, where a folder should be")
    with pytest.raises(DataError, match="cannot be written"):
        get(tmp_path / "cache" / "file", serve(honest))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk(serve, path, part):
    part.symlink_to("/dev/full")
    with pytest.raises(DataError, match="No space left"):
        get(path, serve(honest))
    assert not path.exists()


def test_the_final_name_appears_once_all_is_verified_and_on_disk(serve, path, monkeypatch):
    calls, replace, fsync = [], os.replace, os.fsync

    def watched(source, destination):
        assert not path.exists()
        assert Path(source).read_bytes() == CONTENT
        calls.append("replace")
        replace(source, destination)

    monkeypatch.setattr(module.os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    monkeypatch.setattr(module.os, "replace", watched)
    get(path, serve(honest))
    assert calls == ["fsync", "replace"]


# Several processes. They load the module alone, which is quick; its folder's package would bring torch.

CHILD = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("download", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print("started", flush=True)
module.download([sys.argv[2]], Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
"""


def start_process(server: Server, path: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, module.__file__, server.address, path, MD5, str(SIZE)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_want_the_same_file_share_one_download(serve, path):
    def slow(handler: Handler, start: int) -> None:
        time.sleep(1)
        handler.answer(start)

    server = serve(slow)
    processes = [start_process(server, path) for _ in range(4)]
    ends = [(process.communicate(timeout=60)[1], process.returncode) for process in processes]
    assert ends == [("", 0)] * 4
    assert_whole(path)
    assert server.log == [0]


def test_a_killed_download_leaves_a_part_and_no_lock(serve, path):
    server = serve(stalls)
    process = start_process(server, path)
    part = path.with_name("file.part")
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 0):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    held = part.stat().st_size
    assert not path.exists()
    get(path, server)
    assert_whole(path)
    assert server.log == [0, held]
