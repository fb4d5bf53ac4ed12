"""Tests of taskfarm.py, in its order. Run them with the command in README.md, or `pytest` where the extra `test` is.

    Helpers             a farm on port 0 in a temporary directory, one line to call it, a plain model of it
    Contract            documentation, layers and the standard-library rule hold
    Store               the model against the store (hypothesis), large runs in slices, files that are refused
    Login               passwords, tokens, what is remembered and what is revoked
    HTTP                refusals as a table, raw sockets: pipelines, resets, silence, limits
    API                 the model against the live server (hypothesis), many at once, the published client
    Crash               kill -9 under load, a disk that is full, descriptors that run out
    Client              logins that go to the right farm, patience, lost answers, the published client's scripts
    Worker              real commands and signals, a server that goes and comes, the end of a job, a terminal
    Command line        start, stop, users, access file, README as printed

No test sleeps, asks for rights or looks at a clock to judge. `QUICK=1` in the environment leaves out what needs the
published client and lowers the number of examples; the oldest and newest Python run that part.
"""
import ast
import base64
import contextlib
import decimal
import http.client
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

import taskfarm
from taskfarm import Farm, FarmError, Now, Operation, Refusal, Service, Store, User

MODULE = Path(taskfarm.__file__)
HERE = MODULE.parent
QUICK = bool(os.environ.get("QUICK"))
Answer = Tuple[int, Any]


# ---------------------------------------------------------------- HELPERS

class FakeClock:
    """A clock that stands still, or moves by *step_s* whenever it is looked at."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.utc = 1.7e9
        self.tick = 1000.0
        self.step_s = step_s

    def __call__(self) -> Now:
        self.pass_time(self.step_s)
        return Now(self.utc, self.tick)

    def pass_time(self, seconds: float) -> None:
        self.utc += seconds
        self.tick += seconds


class Direct:
    """A farm without sockets: requests go through the route table to the store, one at a time."""

    def __init__(self, path: str, clock: Callable[[], Now]) -> None:
        self.path, self.clock = path, clock
        self.start()

    def start(self) -> None:
        self.store = Store(self.path, self.clock)
        self.farm = Farm(self.store, "the secret")

    def restart_server(self) -> None:
        self.store.close()
        self.start()

    def ask(self, method: str, path: str, body: Any = None) -> Answer:
        request = taskfarm.Request.__new__(taskfarm.Request)
        request.farm, request.method, request.target, request.key = self.farm, method, path, ""
        try:
            by_method, request.variables = taskfarm.ROUTES.find(path.partition("?")[0])
            route = by_method[method]
            text = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
            request.fields, request.query = taskfarm.read_body(route, text), taskfarm.read_query(route, path)
            answer = route.handler(request, *request.variables)
            if isinstance(answer, Operation):
                assert answer.show
                answer = answer.show(self.store.call(answer), *answer.extra)
        except FarmError as error:
            return error.status, None
        return answer.status, json.loads(answer.body) if answer.body else None

    def wrong(self) -> List[str]:
        return list(self.store.call(taskfarm.check()))

    def close(self) -> None:
        assert self.wrong() == []
        self.store.close()


class Caller:
    """Who calls a server on a port with a token."""
    port: int
    token: str

    def __init__(self) -> None:
        self.local = threading.local()

    def ask(self, method: str, path: str, body: Any = None) -> Answer:
        """One request on this thread's connection, with a token."""
        if not hasattr(self.local, "connection"):
            self.local.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = {"Authorization": basic(self.token, "")}
        if body is not None:
            headers["Content-Type"] = "application/json"
            body = body if isinstance(body, bytes) else json.dumps(body)
        self.local.connection.request(method, path, body, headers)
        response = self.local.connection.getresponse()
        content = response.read()
        return response.status, json.loads(content) if content and "json" in response.headers["Content-Type"] else None

    def raw(self, data: bytes, ended: bool = False) -> "Raw":
        return Raw(self.port, data, ended)


class Live(Caller):
    """A farm that is served on port 0 from a thread, with a user ada whose password is "enchantress"."""
    PASSWORD = "enchantress"

    def __init__(self, path: str, clock: Callable[[], Now] = taskfarm.system_clock) -> None:
        super().__init__()
        self.path, self.clock = path, clock
        self.start()

    def start(self) -> None:
        self.service = Service(self.path, "127.0.0.1", 0, clock=self.clock)
        self.port = self.service.server.server_port
        self.url = self.service.url
        if "ada" not in self.service.store.users:
            self.service.store.call(taskfarm.add_user("ada", ADAS_HASH))
        self.token = self.service.farm.token(self.user("ada"), 0)
        self.thread = threading.Thread(target=self.service.serve)
        self.thread.start()

    def user(self, name: str) -> User:
        return self.service.store.users[name]

    def stop(self) -> None:
        self.service.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()

    def restart_server(self) -> None:
        self.stop()
        self.local = threading.local()
        self.start()

    def close(self) -> None:
        self.stop()
        store = Store(self.path)
        assert store.call(taskfarm.check()) == []
        store.close()

    def wrong(self) -> List[str]:
        return list(self.service.store.call(taskfarm.check()))


class Raw:
    """A socket that has sent some bytes."""

    def __init__(self, port: int, data: bytes, ended: bool = False) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=20)
        if data:
            self.sock.sendall(data)
        if ended:
            self.sock.shutdown(socket.SHUT_WR)
        self.file = self.sock.makefile("rb")

    def answer(self, head_only: bool = False) -> Tuple[int, Dict[str, str], bytes]:
        """Status, headers and body of the next answer; status 0 when the connection has ended."""
        line = self.file.readline()
        if not line:
            return 0, {}, b""
        headers = {}
        for field in iter(self.file.readline, b"\r\n"):
            name, _, value = field.decode().partition(": ")
            headers[name.lower()] = value.rstrip()
        length = 0 if head_only else int(headers.get("content-length", 0))
        return int(line.split()[1]), headers, self.file.read(length)

    def close(self) -> None:
        self.file.close()
        self.sock.close()


def basic(user: str, password: str, encoding: str = "utf-8") -> str:
    return "Basic " + base64.b64encode(("%s:%s" % (user, password)).encode(encoding)).decode()


def request_bytes(method: str, path: str, body: Any = b"", **headers: str) -> bytes:
    """A request as bytes; header names have _ for -."""
    lines = ["%s %s HTTP/1.1" % (method, path), "Host: farm"]
    lines += ["%s: %s" % (name.replace("_", "-"), value) for name, value in headers.items()]
    if body:
        lines += ["Content-Length: %d" % len(body), "Content-Type: application/json"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def wait_until(what: Callable[[], Any], limit_s: float = 20.0) -> Any:
    """Ask again until something true comes; shows what came last."""
    end = time.monotonic() + limit_s
    while True:
        seen = what()
        if seen:
            return seen
        assert time.monotonic() < end, "still %r" % (seen,)
        threading.Event().wait(0.01)


def in_threads(number: int, work: Callable[[int], Any]) -> List[Any]:
    """What *work* gives for each of so many threads at once; the first error is raised."""
    results: List[Any] = [None] * number
    errors: List[BaseException] = []
    barrier = threading.Barrier(number)

    def run(index: int) -> None:
        try:
            barrier.wait(20)
            results[index] = work(index)
        except BaseException as error:
            errors.append(error)
    threads = [threading.Thread(target=run, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Everything that is written to a home directory goes to a temporary one."""
    folder = str(tmp_path_factory.mktemp("home"))
    kept = {name: os.environ.pop(name, None) for name in list(os.environ)
            if name.startswith(("TASKFARM_", "XDG_"))}
    kept["HOME"] = os.environ.get("HOME")
    os.environ["HOME"] = folder
    yield
    os.environ.update({name: value for name, value in kept.items() if value is not None})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Direct]:
    direct = Direct(str(tmp_path / "farm.sqlite"), FakeClock())
    yield direct
    direct.close()


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Live]:
    live = Live(str(tmp_path / "farm.sqlite"))
    yield live
    live.close()


ADAS_HASH = taskfarm.hash_password(Live.PASSWORD)


# The model: a farm in plain dicts, against which the store and the live server are held.

class Model:
    """What the contract says a farm does, without a thought for speed."""

    def __init__(self) -> None:
        self.runs: Dict[str, Dict[str, Any]] = {}       # by uuid, in order of creation
        self.workers: Dict[str, Tuple[str, int]] = {}
        self.task_ids: Dict[int, Tuple[str, int]] = {}

    def created(self, run: Dict[str, Any]) -> None:
        assert run["uuid"] not in self.runs
        assert re.fullmatch("[0-9a-f]{32}", run["uuid"])
        self.runs[run["uuid"]] = {"id": run["id"], "n": run["numTasks"], "tasks": {}, "ids": {}}

    def task(self, run: str, number: int) -> List[Any]:
        return list(self.runs[run]["tasks"].get(number, ["waiting", 0]))

    def run_json(self, run: str) -> Dict[str, Any]:
        entry = self.runs[run]
        states = [self.task(run, number) for number in entry["tasks"]]
        counts = {state: sum(1 for status, _ in states if status == state)
                  for state in ("waiting", "computing", "done", "failed")}
        counts["waiting"] += entry["n"] - len(states)
        return {"id": entry["id"], "uuid": run, "numTasks": entry["n"],
                "percentDone": sum(millionths for _, millionths in states) / (entry["n"] * 1000000),
                "numWaiting": counts["waiting"], "numComputing": counts["computing"],
                "numDone": counts["done"], "numFailed": counts["failed"]}

    def task_json(self, run: str, number: int) -> Dict[str, Any]:
        status, millionths = self.task(run, number)
        return {"task": number, "status": status, "percentCompleted": millionths / 1000000}

    def claim(self, run: str, worker: str) -> Answer:
        if worker not in self.workers or run not in self.runs:
            return 404, None
        entry = self.runs[run]
        for number in range(entry["n"]):
            status, millionths = self.task(run, number)
            if status == "waiting":
                entry["tasks"][number] = ["computing", millionths]
                return 201, self.task_json(run, number)
        return 204, None

    def report(self, run: str, number: int, body: Dict[str, Any]) -> Answer:
        if run not in self.runs or not 0 <= number < self.runs[run]["n"]:
            return 404, None
        status, millionths = self.task(run, number)
        if body.get("status") == "done":
            millionths = 100000000
        if "percentCompleted" in body:
            exact = decimal.Decimal(repr(body["percentCompleted"])) * 1000000
            millionths = int(exact.to_integral_value(decimal.ROUND_FLOOR))
        self.runs[run]["tasks"][number] = [body.get("status", status), millionths]
        return 204, None

    def restart(self, run: str, everything: bool) -> Answer:
        if run not in self.runs:
            return 404, None
        for task in self.runs[run]["tasks"].values():
            if everything:
                task[:] = ["waiting", 0]
            elif task != ["done", 100000000]:
                task[0] = "waiting"
        return 204, None

    def register(self, worker: str, hostname: str, pid: int) -> int:
        return 201 if self.workers.setdefault(worker, (hostname, pid)) == (hostname, pid) else 409

    def delete(self, run: str) -> Answer:
        return (204, None) if self.runs.pop(run, None) else (404, None)


BAD_NUMBERS = [-1, 0, "abc", "10", 1.5, True, None, 2 ** 31, 10 ** 30, [], {}]
BAD_PERCENTS = [-0.001, 100.001, "50", True, None, b'{"percentCompleted": NaN}', b'{"percentCompleted": Infinity}',
                b'{"percentCompleted": 1e999}', 10 ** 400]
BAD_BODIES = [b"", b"{", b"[]", b"3", b'"x"', b"null", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 60000,
              b'{"a":' * 9000 + b"1" + b"}" * 9000, b'{"unknown": 1}', b'{"worker_uuid": "\\ud800"}', b"9" * 60000]
percents = st.one_of(st.integers(0, 100), st.floats(0, 100), st.sampled_from([33.3, 99.9999999, 1e-7, 0.1, 100.0]))


numbers = st.sampled_from([0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 999, 2 ** 31 - 2])      # few, so that rules meet on the same


class Machine(RuleBasedStateMachine):
    """Drives a farm and the model alike, and compares every answer."""
    farm: Any
    runs = Bundle("runs")
    workers = Bundle("workers")

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.folder = tempfile.mkdtemp()
        self.open(os.path.join(self.folder, "farm.sqlite"))

    def open(self, path: str) -> None:
        raise NotImplementedError

    def teardown(self) -> None:
        self.farm.close()
        shutil.rmtree(self.folder)

    def task_path(self, run: str, number: int) -> str:
        return "/api/runs/%s/tasks/%d" % (run, number)

    @precondition(lambda self: len(self.model.runs) < 2)    # few, so that rules meet on the same tasks
    @rule(target=runs, n=st.sampled_from([4, 5, 6, 1, 3, 1000, 2 ** 31 - 1]))
    def create(self, n: int) -> str:
        status, run = self.farm.ask("POST", "/api/run", {"numTasks": n})
        assert status == 201
        self.model.created(run)
        assert run == self.model.run_json(run["uuid"])
        return str(run["uuid"])

    @rule(target=workers, name=st.sampled_from(["a", "b", "c-1._", "D" * 64]), pid=st.integers(0, 1))
    def register(self, name: str, pid: int) -> str:
        status, answer = self.farm.ask("POST", "/api/worker", {"uuid": name, "hostname": "n1", "pid": pid})
        assert status == self.model.register(name, "n1", pid)
        return name

    @initialize(target=workers)
    def first_worker(self) -> str:
        return str(self.register("first", 7))

    @rule(run=runs, worker=st.one_of(workers, st.just("nobody")))
    def claim(self, run: str, worker: str) -> None:
        status, task = self.farm.ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": worker})
        expected = self.model.claim(run, worker)
        self.compare_task(run, (status, task), expected)

    @rule(run=runs, number=numbers)
    def read(self, run: str, number: int) -> None:
        entry = self.model.runs.get(run)
        expected = (200, self.model.task_json(run, number)) if entry and number < entry["n"] else (404, None)
        self.compare_task(run, self.farm.ask("GET", self.task_path(run, number)), expected)

    def compare_task(self, run: str, answer: Answer, expected: Answer) -> None:
        status, task = answer
        assert status == expected[0]
        if expected[1] is not None:
            owner = self.model.task_ids.setdefault(task.pop("id"), (run, task["task"]))
            assert owner == (run, task["task"]), "an id was used twice"
            assert task == expected[1]

    @rule(run=runs, number=numbers, percent=percents)
    def progress(self, run: str, number: int, percent: float) -> None:
        self.report(run, number, percent, None)

    @rule(run=runs, number=numbers)
    def finish(self, run: str, number: int) -> None:
        self.report(run, number, None, "done")

    @rule(run=runs, number=numbers, percent=st.none() | percents,
          status=st.sampled_from([None, "waiting", "computing", "done"]))
    def report(self, run: str, number: int, percent: Optional[float], status: Optional[str]) -> None:
        body = {name: value for name, value in (("percentCompleted", percent), ("status", status)) if value is not None}
        got = self.farm.ask("PUT", self.task_path(run, number), body)[0]
        assert got == (self.model.report(run, number, body)[0] if body else 400)

    @rule(run=runs, word=st.sampled_from(["", "?all=True", "?all=False"]))
    def restart(self, run: str, word: str) -> None:
        got = self.farm.ask("POST", "/api/runs/%s/restart%s" % (run, word))[0]
        assert got == self.model.restart(run, word == "?all=True")[0]

    @rule(run=consumes(runs))
    def delete(self, run: str) -> None:
        assert self.farm.ask("DELETE", "/api/runs/" + run)[0] == self.model.delete(run)[0]
        assert self.farm.ask("DELETE", "/api/runs/" + run)[0] == 404

    @rule(run=runs, info=st.sampled_from(["percentDone", "numWaiting", "numDone", "numComputing", ""]))
    def read_run(self, run: str, info: str) -> None:
        status, answer = self.farm.ask("GET", "/api/runs/%s?info=%s" % (run, info))
        if run not in self.model.runs:
            assert status == 404
        else:
            shown = self.model.run_json(run)
            assert (status, answer) == (200, {info: shown[info]} if info else shown)

    @rule(run=runs, data=st.data())
    def bad_input(self, run: str, data: st.DataObject) -> None:
        method, path, body = data.draw(st.one_of(
            st.tuples(st.just("POST"), st.just("/api/run"), st.sampled_from([{"numTasks": n} for n in BAD_NUMBERS])),
            st.tuples(st.just("POST"), st.just("/api/runs/%s/task" % run), st.sampled_from(BAD_BODIES)),
            st.tuples(st.just("PUT"), st.just(self.task_path(run, 0)), st.sampled_from(
                [p if isinstance(p, bytes) else {"percentCompleted": p} for p in BAD_PERCENTS]
                + [{"status": s} for s in ("Done", "failed", "", 1, None)] + [{}]))))
        assert self.farm.ask(method, path, body)[0] == 400

    @rule()
    def server_restarts(self) -> None:
        self.farm.restart_server()

    @invariant()
    def figures_agree(self) -> None:
        status, answer = self.farm.ask("GET", "/api/runs")
        assert (status, answer["data"]) == (200, [self.model.run_json(run) for run in self.model.runs])
        for run in answer["data"]:
            parts = run["numWaiting"] + run["numComputing"] + run["numDone"] + run["numFailed"]
            assert parts == run["numTasks"]

    @invariant()
    def promises_hold(self) -> None:
        assert self.farm.wrong() == []


machine_settings = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


# ---------------------------------------------------------------- CONTRACT

VERBS = [["serve"], ["check"], ["backup"], ["work"], ["progress"], ["bench"],
         ["user", "add"], ["user", "list"], ["user", "passwd"], ["user", "remove"]]
SOURCE = MODULE.read_text()
TREE = ast.parse(SOURCE)


def sections() -> Dict[str, Tuple[int, int]]:
    """First and last line of each section, by its banner."""
    lines = SOURCE.splitlines()
    starts = [(line[67:].strip(), number) for number, line in enumerate(lines, 1) if line.startswith("# " + "-" * 64)]
    ends = [start - 1 for _, start in starts[1:]] + [len(lines)]
    return {name: (start, end) for (name, start), end in zip(starts, ends)}


def section_of(node: ast.AST) -> str:
    return next((name for name, (first, last) in sections().items() if first <= node.lineno <= last),  # type: ignore
                "CONTRACT")


def test_sections_stand_in_the_order_of_the_contents() -> None:
    contents = (taskfarm.__doc__ or "").partition("\nContents\n")[2]
    assert re.findall(r"^    ([A-Z][A-Z ]+[A-Z]) {2,}", contents, re.M) == list(sections())


def test_the_docstring_names_every_endpoint_and_no_other() -> None:
    named = re.findall(r"^    (GET|POST|PUT|DELETE) +(/\S*) +(open|admin|)", taskfarm.__doc__ or "", re.M)
    assert named == [(route.method, route.path, "" if route.access == "user" else route.access)
                     for route in taskfarm.ROUTES.table]


def test_the_module_imports_the_standard_library_alone() -> None:
    imported = {name.name.split(".")[0] for node in ast.walk(TREE) if isinstance(node, ast.Import)
                for name in node.names}
    imported |= {str(node.module).split(".")[0] for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)}
    known = getattr(sys, "stdlib_module_names", None)      # 3.10
    if known is None:
        known = {path.stem for path in Path(os.__file__).parent.iterdir()} | set(sys.builtin_module_names)
        known |= {path.name.split(".")[0] for path in (Path(os.__file__).parent / "lib-dynload").iterdir()}
    assert imported <= set(known)
    assert re.search(r"^dependencies = \[\]$", (HERE / "pyproject.toml").read_text(), re.M)


def test_only_the_store_speaks_sql() -> None:
    words = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE FROM|CREATE|PRAGMA|BEGIN|COMMIT|ROLLBACK)\b")
    for node in ast.walk(TREE):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and words.match(node.value):
            assert section_of(node) == "STORE", node.value


@pytest.mark.parametrize("name, allowed", [
    ("sqlite3", {"STORE"}), ("selectors", {"HTTP", "WORKER", "BENCH"}), ("socketserver", {"HTTP"}),
    ("argparse", {"COMMAND LINE"}),
    ("socket", {"HTTP", "SERVICE", "CLIENT", "BENCH", "COMMAND LINE"}), ("hashlib", {"LOGIN"}), ("fcntl", {"STORE"}),
    ("ROUTES", {"API", "PAGES", "SERVICE", "BENCH"}), ("Request", {"HTTP", "API", "PAGES"}),
    ("Store", {"STORE", "API", "SERVICE", "BENCH", "COMMAND LINE"}), ("Run", {"STORE", "API"}),
])
def test_a_name_is_used_only_in_its_sections(name: str, allowed: set) -> None:
    used = {section_of(node) for node in ast.walk(TREE) if isinstance(node, ast.Name) and node.id == name}
    assert used and used <= allowed


def test_a_section_uses_those_above_it_and_none_below() -> None:
    order = ["CONTRACT", *sections()]
    defined = {node.name: section_of(node) for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert len(defined) > 150
    below = set()
    for outer in TREE.body:
        names = [node for node in ast.walk(outer) if isinstance(node, ast.Name)]
        own = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        own |= {node.arg for node in ast.walk(outer) if isinstance(node, ast.arg)}
        below |= {(section_of(node), node.id) for node in names if node.id in defined and node.id not in own
                  and order.index(defined[node.id]) > order.index(section_of(node))}
    assert below == set()


def test_the_client_knows_neither_store_nor_login_nor_http() -> None:
    defined = {node.name: section_of(node) for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    used = {defined[node.id] for node in ast.walk(TREE) if isinstance(node, ast.Name) and node.id in defined
            and section_of(node) in ("CLIENT", "WORKER")}
    assert used <= {"LIMITS AND ERRORS", "CLIENT", "WORKER"}


def test_every_public_function_and_class_says_what_it_gives() -> None:
    nodes = [node for outer in [TREE, *(node for node in TREE.body if isinstance(node, ast.ClassDef))]
             for node in outer.body  # type: ignore[attr-defined]
             if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(nodes) > 200
    assert [node.name for node in nodes if not node.name.startswith("_") and not ast.get_docstring(node)] == []


def test_the_readme_names_every_route_and_verb() -> None:
    readme = (HERE / "README.md").read_text()
    for route in taskfarm.ROUTES.table:
        if route.access != taskfarm.ADMIN:
            path = route.path.replace("<run>", "RUN").replace("<task>", "N").replace("<worker>", "WORKER")
            assert "| `%s %s`" % (route.method, path) in readme, path
    for verb in VERBS:
        assert "taskfarm.py %s" % " ".join(verb) in readme, verb


def test_python_3_6_gets_one_sentence() -> None:
    head = SOURCE[:SOURCE.index("import argparse")]
    patched = head.replace("< (3, 9)", "< (99, 0)")
    done = subprocess.run([sys.executable, "-c", patched], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "needs Python 3.9" in done.stderr


# ---------------------------------------------------------------- STORE

class StoreMachine(Machine):
    """The model against the store, with a clock that moves on at each look, so that sweeps take several slices."""

    def open(self, path: str) -> None:
        self.slice, taskfarm.Sweep.SLICE = taskfarm.Sweep.SLICE, 2
        self.farm = Direct(path, FakeClock(step_s=taskfarm.SWEEP_S * 0.6))

    def teardown(self) -> None:
        taskfarm.Sweep.SLICE = self.slice
        super().teardown()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=15 if QUICK else 60, stateful_step_count=50, **machine_settings)   # type: ignore[arg-type]


def make_run(farm: Any, n: int) -> str:
    status, run = farm.ask("POST", "/api/run", {"numTasks": n})
    assert status == 201
    farm.ask("POST", "/api/worker", {"uuid": "w", "hostname": "node1", "pid": 1})
    return str(run["uuid"])


def claim(farm: Any, run: str) -> Answer:
    status, task = farm.ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": "w"})
    return status, task and task.get("task")


def report(farm: Any, run: str, number: int, **body: Any) -> int:
    return int(farm.ask("PUT", "/api/runs/%s/tasks/%d" % (run, number), body)[0])


def figures(farm: Any, run: str) -> Tuple[int, int, int, float]:
    shown = farm.ask("GET", "/api/runs/" + run)[1]
    return shown["numWaiting"], shown["numComputing"], shown["numDone"], shown["percentDone"]


def test_a_task_that_was_read_or_written_first_does_not_disturb_claims(store: Direct) -> None:
    run = make_run(store, 4)
    assert store.ask("GET", "/api/runs/%s/tasks/2" % run)[0] == 200
    assert report(store, run, 1, status="done") == 204
    assert [claim(store, run) for _ in range(4)] == [(201, 0), (201, 2), (201, 3), (204, None)]


def test_what_was_told_is_on_the_disk_of_one_process(store: Direct) -> None:
    names = ("journal_mode", "synchronous", "locking_mode")
    pragmas = {name: store.store.sql.one("PRAGMA " + name)[0] for name in names}
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "locking_mode": "exclusive"}


def test_reading_writes_nothing(store: Direct) -> None:
    run = make_run(store, 4)
    before = store.store.connection.total_changes
    for path in ("/api/runs", "/api/runs/" + run, "/api/runs/%s/tasks/3" % run):
        assert store.ask("GET", path)[0] == 200
    assert store.store.connection.total_changes == before


def test_a_task_at_100_percent_whose_worker_died_comes_back(store: Direct) -> None:
    run = make_run(store, 1)
    claim(store, run)
    report(store, run, 0, percentCompleted=100)
    assert store.ask("POST", "/api/runs/%s/restart" % run)[0] == 204
    assert store.ask("GET", "/api/runs/%s/tasks/0" % run)[1]["percentCompleted"] == 100.0
    assert claim(store, run) == (201, 0)


def test_a_task_that_is_done_below_100_percent_is_taken_into_a_restart(store: Direct) -> None:
    run = make_run(store, 2)
    report(store, run, 0, status="done", percentCompleted=50)
    report(store, run, 1, status="done")
    store.ask("POST", "/api/runs/%s/restart" % run)
    assert figures(store, run) == (1, 0, 1, 75.0)
    assert [claim(store, run), claim(store, run)] == [(201, 0), (204, None)]


def test_the_mean_stays_exact_after_many_updates(store: Direct) -> None:
    run, dice = make_run(store, 3), random.Random(1)
    for _ in range(2000):
        report(store, run, dice.randrange(3), percentCompleted=dice.random() * 100)
    for number in range(3):
        report(store, run, number, percentCompleted=33.3)
    assert figures(store, run)[3] == 33.3


def test_task_ids_are_never_used_again(store: Direct) -> None:
    first = make_run(store, 3)
    seen = {store.ask("GET", "/api/runs/%s/tasks/%d" % (first, n))[1]["id"] for n in range(3)}
    store.ask("DELETE", "/api/runs/" + first)
    store.restart_server()
    second = make_run(store, 3)
    assert seen.isdisjoint({store.ask("GET", "/api/runs/%s/tasks/%d" % (second, n))[1]["id"] for n in range(3)})


def test_requests_for_a_run_wait_while_it_is_swept_and_others_do_not(tmp_path: Path) -> None:
    direct = Direct(str(tmp_path / "f"), FakeClock(step_s=1.0))    # each slice uses up its time
    run, other = make_run(direct, 3000), make_run(direct, 10)
    for number in range(3000):
        report(direct, run, number, status="done")
    store = direct.store
    read, claim_other = taskfarm.read_run(run), taskfarm.claim(other, "w")
    ended = store.apply([taskfarm.restart_run(run, "restart all"), read, claim_other])
    assert [named.function.__name__ for named, _ in ended] == ["restart_run", "read_run", "claim"]
    assert ended[1][1].counts == [3000, 0, 0, 0], "the figures change at once, and reading does not wait"
    assert direct.ask("GET", "/api/runs/%s/tasks/2999" % run)[1]["status"] == "waiting"
    writing = taskfarm.claim(run, "w")
    ended, rounds = store.apply([writing]), 0
    while not ended:
        store.sweep()
        ended = store.apply([])
        rounds += 1
    assert rounds >= 3000 // taskfarm.Sweep.SLICE and ended[0][0] is writing and ended[0][1].number == 0
    direct.close()


@pytest.mark.parametrize("method, path", [("POST", "/restart?all=True"), ("POST", "/restart"), ("DELETE", "")])
def test_a_sweep_that_a_crash_cut_short_is_ended_at_the_next_start(tmp_path: Path, method: str, path: str) -> None:
    direct = Direct(str(tmp_path / "f"), FakeClock(step_s=1.0))
    run = make_run(direct, 1200)
    for number in range(0, 1200, 2):
        report(direct, run, number, status="computing", percentCompleted=50)
    assert direct.ask(method, "/api/runs/" + run + path)[0] == 204
    assert direct.store.sweeps, "some rows are still to follow"
    direct.restart_server()
    if method == "DELETE":
        assert direct.ask("GET", "/api/runs/" + run)[0] == 404
    else:
        assert figures(direct, run) == (1200, 0, 0, 0.0 if "all" in path else 25.0)
        assert [claim(direct, run)[1] for _ in range(1200)] == list(range(1200))
    while direct.store.sweeps:
        direct.store.sweep()
    if method == "DELETE":
        assert direct.store.sql.one("SELECT (SELECT count(*) FROM task), (SELECT count(*) FROM untouched)") == (0, 0)
    direct.close()


def test_an_operation_that_fails_unexpectedly_takes_no_other_with_it(store: Direct) -> None:
    run = make_run(store, 5)

    @taskfarm.operation
    def broken(sql: Any, now: Now) -> None:
        sql.execute("UPDATE run SET millionths = 7")
        raise ZeroDivisionError

    batch = [taskfarm.claim(run, "w"), broken(), taskfarm.claim(run, "w")]
    outcomes = [outcome for _, outcome in store.store.apply(batch)]
    assert [outcomes[0].number, type(outcomes[1]), outcomes[2].number] == [0, ZeroDivisionError, 1]
    assert figures(store, run) == (3, 2, 0, 0.0)


def test_hot_statements_search_by_key_and_never_scan(store: Direct) -> None:
    run = make_run(store, 50)
    seen: List[str] = []
    store.store.connection.set_trace_callback(seen.append)
    for _ in range(3):
        claim(store, run)
    report(store, run, 0, status="done")
    report(store, run, 30, percentCompleted=5)
    report(store, run, 1, status="waiting")
    claim(store, run)
    store.ask("GET", "/api/runs/" + run)
    store.ask("GET", "/api/runs/%s/tasks/1" % run)
    store.ask("POST", "/api/worker", {"uuid": "w2", "hostname": "node1", "pid": 1})
    store.restart_server()
    store.store.connection.set_trace_callback(seen.append)
    claim(store, run)
    store.store.connection.set_trace_callback(None)
    plans: Dict[str, List[str]] = {}
    for statement in seen:
        if re.match(r"\s*(SELECT|UPDATE|DELETE)", statement):
            plans[statement] = [row[3] for row in store.store.connection.execute("EXPLAIN QUERY PLAN " + statement)]
    assert len(plans) > 8
    assert not [plan for plan in plans.items() if any("SCAN" in step or "TEMP B-TREE" in step for step in plan[1])]


def refused(path: Path) -> str:
    before = path.read_bytes()
    with pytest.raises(Refusal) as refusal:
        Store(str(path))
    assert path.read_bytes() == before and "\n" not in str(refusal.value)
    return str(refusal.value)


def test_files_of_others_are_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"not a database" * 100)
    assert "not an SQLite file" in refused(path)
    path.unlink()
    with contextlib.closing(sqlite3.connect(str(path))) as other:
        other.execute("CREATE TABLE mine (x)")
    assert "another program" in refused(path)


def test_a_file_of_a_newer_version_is_refused_also_when_only_its_log_says_so(tmp_path: Path) -> None:
    path = tmp_path / "f"
    store = Store(str(path))
    store.connection.execute("PRAGMA user_version = %d" % (len(taskfarm.SCHEMA) + 1))
    copy = tmp_path / "copy"
    shutil.copy(str(path), str(copy))
    shutil.copy(str(path) + "-wal", str(copy) + "-wal")
    store.connection.close()
    assert struct.unpack(">I", copy.read_bytes()[60:64])[0] != len(taskfarm.SCHEMA) + 1 or not copy.stat().st_size
    assert "newer taskfarm" in refused(copy)
    assert "newer taskfarm" in refused(path)


def test_a_file_that_another_program_has_open_is_refused(tmp_path: Path) -> None:
    Store(str(tmp_path / "f")).close()
    with contextlib.closing(sqlite3.connect(str(tmp_path / "f"), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Refusal, match="another program has it open"):
            Store(str(tmp_path / "f"))


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    Store(str(path)).close()
    path.write_bytes(path.read_bytes()[:-4096])
    assert "cut off" in refused(path)


def test_check_finds_what_is_wrong(store: Direct) -> None:
    run = make_run(store, 5)
    claim(store, run)
    execute = store.store.connection.execute
    for breaking, mending, sentence in [
            ("UPDATE task SET millionths = 7", "UPDATE task SET millionths = 0", "millionths"),
            ("UPDATE task SET status = 0", "UPDATE task SET status = 1", "waiting, computing"),
            ("UPDATE task SET worker = 77", "UPDATE task SET worker = 1", "never registered"),
            ("UPDATE run SET head = head + 1", "UPDATE run SET head = head - 1", "untouched"),
            ("UPDATE task SET id = 900", "UPDATE task SET id = 1", "belong to no run")]:
        execute(breaking)
        assert any(sentence in wrong for wrong in store.wrong()), sentence
        execute(mending)
    assert store.wrong() == []


def test_a_read_that_fails_does_not_end_the_writer(farm: Live) -> None:
    @taskfarm.operation(reads=True)
    def unreadable(sql: Any, now: Now) -> None:
        raise sqlite3.OperationalError("disk I/O error")
    with pytest.raises(taskfarm.Unavailable):
        farm.service.store.call(unreadable())
    assert make_run(farm, 1)


def test_a_sweep_that_fails_is_said_and_refuses_its_run_alone(store: Direct, caplog: pytest.LogCaptureFixture) -> None:
    run, other = make_run(store, 5), make_run(store, 5)
    claim(store, run)
    assert isinstance(store.farm.clock, FakeClock)
    store.store.connection.execute("""
        CREATE TEMP TRIGGER broken BEFORE UPDATE ON task BEGIN SELECT RAISE(ABORT, 'a broken page'); END""")
    assert store.ask("POST", "/api/runs/%s/restart" % run)[0] == 204
    assert claim(store, run)[0] == 503 and claim(store, run)[0] == 503
    assert claim(store, other) == (201, 0)
    assert figures(store, run) == (5, 0, 0, 0.0), "reading is answered"
    assert "a broken page" in caplog.text
    store.store.connection.execute("DROP TRIGGER broken")
    store.farm.clock.pass_time(taskfarm.RETRY_S)
    assert claim(store, run) == (201, 0)


def test_a_full_disk_does_not_park_readers_of_a_run_that_is_being_restarted(tmp_path: Path) -> None:
    direct = Direct(str(tmp_path / "f"), FakeClock(step_s=1.0))
    run = make_run(direct, 2000)
    for number in range(2000):
        report(direct, run, number, status="done")
    direct.ask("POST", "/api/runs/%s/restart?all=True" % run)
    direct.store._note_trouble("the disk is full")
    direct.store.sweep_again = 1e9
    assert figures(direct, run) == (2000, 0, 0, 0.0)
    assert direct.ask("GET", "/api/runs/%s/tasks/1999" % run)[1]["status"] == "waiting"
    assert claim(direct, run)[0] == 503
    direct.store.sweep_again = 0.0
    direct.close()


def test_a_log_whose_last_frame_is_torn_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "f"
    store = Store(str(path))
    for name in ("f", "f-wal"):
        shutil.copy(str(tmp_path / name), str(tmp_path / ("copy" + name[1:])))
    store.close()
    log = tmp_path / "copy-wal"
    salts = log.read_bytes()[16:24]
    log.write_bytes(log.read_bytes() + struct.pack(">II", 1, 9) + salts + bytes(8) + b"torn" * 10)
    Store(str(tmp_path / "copy")).close()


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    direct = Direct(str(tmp_path / "f"), FakeClock())
    run = make_run(direct, 3000)
    for number in range(3000):
        report(direct, run, number, status="computing")
    direct.close()
    data = bytearray((tmp_path / "f").read_bytes())
    data[-4096:] = b"\x55" * 4096
    (tmp_path / "f").write_bytes(bytes(data))
    with pytest.raises(Refusal, match="damaged"):
        Store(str(tmp_path / "f"))


@pytest.mark.parametrize("running", [False, True])
def test_backup_copies_and_check_recounts_also_while_the_farm_is_served(tmp_path: Path, running: bool) -> None:
    live = Live(str(tmp_path / "f"))
    run = make_run(live, 10 ** 6)
    for number in range(300):
        report(live, run, number * 7, status="done")
    if not running:
        live.stop()
    for _ in range(2):
        done = run_verb("check", "--db", live.path)
        assert done.returncode == 0 and "keeps all its promises" in done.stdout, done.stderr
    copy = str(tmp_path / "copy")
    assert run_verb("backup", "--db", live.path, copy).returncode == 0
    again = run_verb("backup", "--db", live.path, copy)
    assert again.returncode == 1 and "there already" in again.stderr
    assert stat.S_IMODE(os.stat(copy).st_mode) == 0o600
    with contextlib.closing(Direct(copy, FakeClock())) as direct:
        assert figures(direct, run)[2] == 300
        direct.store.connection.execute("UPDATE task SET status = 1 WHERE id = 1")
        direct.store.connection.execute("UPDATE run SET millionths = millionths + 1")
        direct.store.close()
        done = run_verb("check", "--db", copy)
        assert done.returncode == 1 and done.stdout.count("\n") == 2
        direct.start()
        direct.store.connection.execute("UPDATE task SET status = 2 WHERE id = 1")
        direct.store.connection.execute("UPDATE run SET millionths = millionths - 1")
    assert sorted(path.name for path in tmp_path.iterdir() if "check" in path.name or "part" in path.name) == []
    if running:
        live.stop()


def test_what_a_crash_left_of_a_copy_is_removed_at_the_next_start(tmp_path: Path) -> None:
    Store(str(tmp_path / "f")).close()
    for name in ("f.copy-00", "f.copy-00.part", "f.copied"):
        (tmp_path / name).write_text("left")
    Store(str(tmp_path / "f")).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "f.copied"]


def test_two_copies_at_once_are_not_mixed_up(farm: Live) -> None:
    store = farm.service.store
    first = store.call(taskfarm.begin_copy("1"))
    with pytest.raises(taskfarm.Conflict):
        while True:     # until the first has ended, if it has at all
            store.call(taskfarm.begin_copy("2"))
            store.call(taskfarm.begin_copy("3"))
    wait_until(lambda: store.call(taskfarm.read_copy()).ended)
    assert first.ended == taskfarm.Copy.DONE and os.path.exists(first.path)


def test_a_copy_on_a_full_disk_is_not_begun_anew_by_writes_that_fail(store: Direct) -> None:
    run = make_run(store, 1000)
    for number in range(1000):
        report(store, run, number, status="done")
    copy = store.store.call(taskfarm.begin_copy("1"))
    store.store._note_trouble("the disk is full")

    def between() -> None:
        assert report(store, run, 5, status="waiting") == 503 and figures(store, run)[2] == 1000
    store.store.copy(copy, between)
    assert copy.ended == copy.DONE
    assert report(store, run, 5, status="waiting") == 204
    os.remove(copy.path)


def test_a_copy_that_nobody_waits_for_is_given_up(store: Direct) -> None:
    run = make_run(store, 10 ** 6)
    store.store.apply([taskfarm.report(run, None, taskfarm.Report(number, None, taskfarm.DONE, None)) for number in range(40000)])
    copy = store.store.call(taskfarm.begin_copy("1"))
    store.store.copy(copy, lambda: store.store.call(taskfarm.give_up_copy(copy.path)))
    assert "nobody waits" in copy.ended
    assert not [name for name in os.listdir(os.path.dirname(copy.path)) if taskfarm.Copy.MARK in name]


def test_a_copy_that_cannot_be_put_where_it_is_wanted_is_refused(tmp_path: Path) -> None:
    Store(str(tmp_path / "f")).close()
    for target in ("no/such/folder", "f"):
        done = run_verb("backup", "--db", str(tmp_path / "f"), str(tmp_path / target))
        assert done.returncode == 1 and "is a copy" not in done.stdout and done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "f.lock"]


def test_a_copy_made_under_load_holds_what_changed_meanwhile(tmp_path: Path) -> None:
    direct = Direct(str(tmp_path / "f"), FakeClock())
    run = make_run(direct, 10 ** 6)
    for first in range(0, 100000, 1000):
        direct.store.apply([taskfarm.report(run, None, taskfarm.Report(number, None, taskfarm.DONE, None)) for number in range(first, first + 1000)])
    copy, steps = taskfarm.Copy(str(tmp_path / "copy")), []

    def between() -> None:
        steps.append(copy.copied)
        if copy.copied < copy.total:
            assert claim(direct, run)[0] == 201
    direct.store.copy(copy, between)
    assert copy.ended == copy.DONE and len(steps) > 3
    with contextlib.closing(Direct(copy.path, FakeClock())) as copied:
        assert copied.wrong() == [] and figures(copied, run) == figures(direct, run)
    direct.close()


# ---------------------------------------------------------------- LOGIN

def get_with(farm: Caller, authorization: Optional[str], path: str = "/api/token") -> Tuple[int, Dict[str, str], bytes]:
    headers = {"Connection": "close"}
    if authorization is not None:
        headers["Authorization"] = authorization
    raw = farm.raw(request_bytes("GET", path, **headers))
    answer = raw.answer()
    raw.close()
    return answer


def token_of(farm: Live, authorization: str) -> str:
    status, _, body = get_with(farm, authorization)
    assert status == 200
    return str(json.loads(body)["token"])


def test_all_kinds_of_login(farm: Live) -> None:
    token = token_of(farm, basic("ada", Live.PASSWORD))
    assert token.startswith("tf1.")
    for header in (basic(token, ""), basic(token, "anything"), "Bearer " + token, "bearer " + token,
                   basic("ada", Live.PASSWORD).replace("Basic", "bASIC")):
        assert get_with(farm, header)[0] == 200, header


def test_logins_that_are_refused_alike(farm: Live) -> None:
    token = token_of(farm, basic("ada", Live.PASSWORD))
    other = taskfarm.make_token(b"x" * 32, farm.user("ada"), 0)
    bodies = set()
    for header in (None, "", "Basic", "Basic !!!", "Basic " + base64.b64encode(b"nocolon").decode(), "Digest x",
                   basic("ada", "wrong"), basic("nobody", Live.PASSWORD), basic("", ""), "Bearer", "Bearer x",
                   "Bearer tf1.", "Bearer tf1.1.1.0.", "Bearer " + token[:-1], "Bearer " + token + "A",
                   "Bearer " + token.replace("tf1.1", "tf1.2"), "Bearer " + other, basic(other, "")):
        status, headers, body = get_with(farm, header)
        assert status == 401, header
        assert headers["www-authenticate"] == 'Basic realm="taskfarm", charset="UTF-8"'
        bodies.add(body)
    assert len(bodies) == 1, "never says which half was wrong"


def test_names_and_passwords_that_are_not_ascii(farm: Live) -> None:
    farm.service.store.call(taskfarm.add_user("jürgen", taskfarm.hash_password("grüße")))
    for encoding in ("utf-8", "latin-1"):
        assert get_with(farm, basic("jürgen", "grüße", encoding))[0] == 200
    decomposed = "ju\u0308rgen"
    assert get_with(farm, basic(decomposed, "gru\u0308ße"))[0] == 200
    assert get_with(farm, basic("jürgen", "grusse"))[0] == 401


def test_tokens_expire_and_beget_none_that_last_longer(tmp_path: Path) -> None:
    clock = FakeClock()
    live = Live(str(tmp_path / "f"), clock)
    token = token_of(live, basic("ada", Live.PASSWORD))
    clock.pass_time(100 * 86400)
    second = token_of(live, "Bearer " + token)
    clock.pass_time(266 * 86400)
    assert [get_with(live, "Bearer " + each)[0] for each in (token, second)] == [401, 401]
    assert get_with(live, basic("ada", Live.PASSWORD))[0] == 200
    live.close()


def test_a_new_password_or_a_removal_ends_every_token_and_remembered_login(farm: Live) -> None:
    store, password = farm.service.store, basic("ada", Live.PASSWORD)
    token = "Bearer " + token_of(farm, password)
    store.call(taskfarm.set_password("ada", taskfarm.hash_password("another")))
    assert [get_with(farm, each)[0] for each in (token, password)] == [401, 401]
    token = "Bearer " + token_of(farm, basic("ada", "another"))
    store.call(taskfarm.remove_user("ada"))
    store.call(taskfarm.add_user("ada", taskfarm.hash_password("another")))
    assert get_with(farm, token)[0] == 401, "a user who is added again is a new one"
    assert get_with(farm, basic("ada", "another"))[0] == 200


def test_a_thousand_logins_with_one_password_cost_one_hash(farm: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = []
    verify = taskfarm.verify_password
    monkeypatch.setattr(taskfarm, "verify_password", lambda *args: hashes.append(1) or verify(*args))   # type: ignore
    raws = [farm.raw(request_bytes("GET", "/api/token", Authorization=basic("ada", Live.PASSWORD))) for _ in range(300)]
    assert {raw.answer()[0] for raw in raws} == {200}
    assert {get_with(farm, basic("ada", "wrong"))[0] for _ in range(20)} == {401}
    assert len(hashes) == 2
    for raw in raws:
        raw.close()


def test_an_unknown_user_costs_a_hash_like_a_wrong_password(farm: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    stored: List[str] = []
    verify = taskfarm.verify_password
    monkeypatch.setattr(taskfarm, "verify_password", lambda p, s: stored.append(s) or verify(p, s))     # type: ignore
    assert get_with(farm, basic("nobody", "x"))[0] == get_with(farm, basic("ada", "x"))[0] == 401
    assert [text.rsplit("$", 2)[0] for text in stored] == [ADAS_HASH.rsplit("$", 2)[0]] * 2


def test_passwords_are_not_kept_in_memory(farm: Live) -> None:
    assert get_with(farm, basic("ada", Live.PASSWORD))[0] == 200
    logins = farm.service.farm.logins
    assert len(logins.memory) == 1 and Live.PASSWORD not in repr(logins.memory)
    assert base64.b64encode(b"ada:" + Live.PASSWORD.encode()) not in next(iter(logins.memory))


def test_a_hash_that_cannot_be_made_is_a_refusal_and_not_tried_for_ever(
        farm: Live, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delattr(taskfarm.hashlib, "scrypt")
    assert get_with(farm, basic("ada", Live.PASSWORD))[0] == 401
    assert caplog.text.count("Traceback") == 1


def test_what_a_hash_found_is_not_remembered_for_users_who_have_changed(store: Direct) -> None:
    logins, header = store.farm.logins, basic("ann", "secret").encode()
    with pytest.raises(taskfarm.Later) as later:
        logins.who(header)
    store.store.call(taskfarm.add_user("ann", taskfarm.hash_password("secret", "pbkdf2")))
    with pytest.raises(taskfarm.Unauthorized):
        logins.who(b"Bearer anything")      # forgets what was remembered of the users before
    later.value.work()
    with pytest.raises(taskfarm.Later) as later:
        logins.who(header)
    later.value.work()
    assert logins.who(header).name == "ann"


def test_a_name_that_looks_like_a_token_has_its_password_hidden_too(farm: Live) -> None:
    farm.service.store.call(taskfarm.add_user("tf1-ann", ADAS_HASH))
    header = basic("tf1-ann", Live.PASSWORD)
    assert get_with(farm, header)[0] == 200
    assert header.encode() not in farm.service.farm.logins.memory
    assert not taskfarm.TOKEN_FIELD.search(b"Authorization: " + header.encode())
    assert taskfarm.TOKEN_FIELD.search(b"Host: f\r\nAuthorization: " + basic(farm.token, "").encode())


@pytest.mark.parametrize("algorithm", ["scrypt", "pbkdf2"])
def test_a_hash_says_how_it_was_made(algorithm: str) -> None:
    stored = taskfarm.hash_password("secret", algorithm)
    assert stored.startswith(algorithm + "$") and "secret" not in stored
    assert taskfarm.verify_password("secret", stored) and not taskfarm.verify_password("Secret", stored)


def test_the_lock_is_not_opened_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "f.lock").symlink_to(victim)
    with pytest.raises(Refusal):
        taskfarm.Lock(str(tmp_path / "f"))
    assert victim.read_text() == "precious"


def test_where_openssl_refuses_scrypt_pbkdf2_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> bytes:
        raise ValueError("disabled for FIPS")
    monkeypatch.setattr(taskfarm.hashlib, "scrypt", refuse)
    stored = taskfarm.hash_password("secret")
    assert stored.startswith("pbkdf2$600000$") and taskfarm.verify_password("secret", stored)


@pytest.mark.parametrize("name", ["", "a:b", "tf1.x", "a/b", " a", "a\n", "x" * 65, "\ud800"])
def test_user_names_that_will_not_do(name: str) -> None:
    with pytest.raises(taskfarm.BadRequest):
        taskfarm.check_name(name)


# ---------------------------------------------------------------- HTTP

RUN_BODY = b'{"numTasks": 3}'
REFUSALS = [
    # what, the request ({auth} is replaced), the status
    ("no login", request_bytes("GET", "/api/runs"), 401),
    ("no login comes before an unknown path", request_bytes("GET", "/nothing"), 401),
    ("no login comes before a wrong method", request_bytes("POST", "/livez"), 401),
    ("no login comes before the body", b"POST /api/run HTTP/1.1\r\nHost: f\r\nContent-Length: 99999999\r\n\r\n", 401),
    ("unknown path", request_bytes("GET", "/api/nothing", Authorization="{auth}"), 404),
    ("a path below a path", request_bytes("GET", "/api/runs/x/y/z", Authorization="{auth}"), 404),
    ("an empty segment", request_bytes("GET", "/api/runs/", Authorization="{auth}"), 404),
    ("unknown run", request_bytes("GET", "/api/runs/none", Authorization="{auth}"), 404),
    ("wrong method", request_bytes("PUT", "/api/run", Authorization="{auth}"), 405),
    ("unknown method", request_bytes("BREW", "/api/run", Authorization="{auth}"), 405),
    ("admin's path", request_bytes("GET", "/api/users", Authorization="{auth}"), 403),
    ("chunked", request_bytes("POST", "/api/run", Authorization="{auth}", Transfer_Encoding="chunked"), 411),
    ("length and coding", request_bytes("POST", "/api/run", RUN_BODY, Authorization="{auth}",
                                        Transfer_Encoding="chunked"), 400),
    ("body too large", request_bytes("POST", "/api/run", b"x" * 65537, Authorization="{auth}"), 413),
    ("huge length", request_bytes("POST", "/api/run", Authorization="{auth}", Content_Length="9" * 30), 413),
    ("two lengths", request_bytes("POST", "/api/run", RUN_BODY, Authorization="{auth}", Content_Length="15"), 400),
    ("negative length", request_bytes("POST", "/api/run", Authorization="{auth}", Content_Length="-1"), 400),
    ("length that is none", request_bytes("POST", "/api/run", Authorization="{auth}", Content_Length="0x5"), 400),
    ("no content type", b"POST /api/run HTTP/1.1\r\nHost: f\r\nAuthorization: {auth}\r\nContent-Length: 15\r\n\r\n"
     + RUN_BODY, 415),
    ("another content type", request_bytes("POST", "/api/run", Authorization="{auth}", Content_Type="text/plain",
                                           Content_Length="15") + RUN_BODY, 415),
    ("no body", request_bytes("POST", "/api/run", Authorization="{auth}"), 400),
    ("a field where none is taken", request_bytes("DELETE", "/api/runs/x", b'{"all": true}', Authorization="{auth}"),
     400),
    ("no Host", b"GET /livez HTTP/1.1\r\n\r\n", 400),
    ("two Hosts", request_bytes("GET", "/livez", Host="again"), 400),
    ("a space before the colon", request_bytes("GET", "/livez", X__="1").replace(b"X--:", b"X :"), 400),
    ("a folded line", b"GET /livez HTTP/1.1\r\nHost: f\r\n folded\r\n\r\n", 400),
    ("a bare LF", b"GET /livez HTTP/1.1\nHost: f\n\n", 400),
    ("a NUL in a header", b"GET /livez HTTP/1.1\r\nHost: f\r\nX: a\0b\r\n\r\n", 400),
    ("a bare CR in a header", b"GET /livez HTTP/1.1\r\nHost: f\r\nX: a\rb\r\n\r\n", 400),
    ("no version", b"GET /livez\r\n\r\n", 400),
    ("another version", b"GET /livez HTTP/2.0\r\n\r\n", 505),
    ("bytes that are not ASCII", b"GET /liv\xe9z HTTP/1.1\r\nHost: f\r\n\r\n", 400),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ("noise", b"\x00\xff\x17", 400),
    ("a long request line", b"GET /" + b"x" * 17000, 414),
    ("a long request line, whole", request_bytes("GET", "/" + "x" * 17000), 414),
    ("a long header line", request_bytes("GET", "/livez", X="x" * 17000), 431),
    ("a long head", request_bytes("GET", "/livez", **dict.fromkeys(["X%d" % n for n in range(40)], "x" * 1000)), 431),
    ("many fields", request_bytes("GET", "/livez", **{"X%d" % n: "x" for n in range(101)}), 431),
    ("another expectation", request_bytes("POST", "/api/run", Authorization="{auth}", Expect="more"), 417),
    ("a query that comes twice", request_bytes("GET", "/api/runs/x?info=&info=", Authorization="{auth}"), 400),
    ("a target without a slash", request_bytes("GET", "Xapi/runs", Authorization="{auth}"), 400),
    ("a star in a path", request_bytes("GET", "/api/runs/*", Authorization="{auth}"), 404),
    ("a star for a target", request_bytes("GET", "*"), 400),
    ("nested to the brim", request_bytes("POST", "/api/run", b'{"numTasks":' + b"[" * 985 + b"]" * 985 + b"}",
                                         Authorization="{auth}"), 400),
    ("many blanks in a header", request_bytes("GET", "/livez", X=" " * 15000 + "\x01"), 400),
    ("an unknown query", request_bytes("GET", "/api/runs?x=1", Authorization="{auth}"), 400),
    ("a query that is not UTF-8", request_bytes("GET", "/api/runs/x?info=%ff", Authorization="{auth}"), 400),
]


@pytest.fixture(scope="module")
def shared_farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A live farm for tests that change nothing."""
    live = Live(str(tmp_path_factory.mktemp("farm") / "farm.sqlite"))
    yield live
    assert live.ask("GET", "/api/runs") == (200, {"data": []}), "something that was refused has changed something"
    live.close()


@pytest.mark.parametrize("data, status", [pytest.param(data, status, id=what) for what, data, status in REFUSALS])
def test_refused(shared_farm: Live, data: bytes, status: int) -> None:
    raw = shared_farm.raw(data.replace(b"{auth}", basic(shared_farm.token, "").encode()))
    got, headers, body = raw.answer()
    assert (got, headers["content-type"]) == (status, "application/problem+json")
    content = json.loads(body)
    assert content["status"] == status and content["title"] and len(content["detail"]) > 10
    if got == 405:
        assert headers["allow"] == "POST"
    raw.close()


def exchange(farm: Live, data: bytes, ended: bool = False) -> List[int]:
    """The statuses of all answers until the connection ends."""
    raw = farm.raw(data.replace(b"{auth}", basic(farm.token, "").encode()), ended)
    statuses: List[int] = []
    while True:
        status = raw.answer()[0]
        if not status:
            raw.close()
            return statuses
        statuses.append(status)


CLOSE = request_bytes("GET", "/livez", Connection="close")


@pytest.mark.parametrize("first, statuses", [
    pytest.param(request_bytes("POST", "/api/run", b"{}"), [401, 200], id="a refused body is skipped"),
    pytest.param(request_bytes("PUT", "/nothing", b"{}" * 999, Authorization="{auth}"), [404, 200], id="404"),
    pytest.param(request_bytes("POST", "/api/run", b"[" * 60000, Authorization="{auth}"), [400, 200], id="400"),
    pytest.param(request_bytes("POST", "/api/run", Authorization="{auth}", Transfer_Encoding="chunked"), [411],
                 id="where the request ends cannot be told"),
    pytest.param(b"\r\n\r\n" + request_bytes("GET", "/readyz"), [200, 200], id="empty lines before a request"),
    pytest.param(request_bytes("POST", "/api/run", b"{}", Authorization="{auth}") + b"\r\n", [400, 200],
                 id="an empty line after a body"),
    pytest.param(request_bytes("GET", "http://elsewhere/readyz?"), [200, 200], id="an absolute target"),
    pytest.param(request_bytes("GET", "/api/%72uns", Authorization="{auth}"), [404, 200], id="fixed words as they are"),
    pytest.param(request_bytes("GET", "/readyz", Connection="close"), [200], id="close is respected"),
    pytest.param(b"GET /readyz HTTP/1.0\r\n\r\n", [200], id="HTTP/1.0 closes"),
    pytest.param(b"GET /readyz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", [200, 200], id="unless asked"),
    pytest.param(request_bytes("GET", "/readyz") * 50, [200] * 51, id="pipelined"),
])
def test_what_follows_on_the_connection(shared_farm: Live, first: bytes, statuses: List[int]) -> None:
    assert exchange(shared_farm, first + CLOSE) == statuses


def test_pipelined_claims_are_answered_in_order(farm: Live) -> None:
    run = make_run(farm, 100)
    one = request_bytes("POST", "/api/runs/%s/task" % run, b'{"worker_uuid": "w"}', Authorization=basic(farm.token, ""))
    raw = farm.raw(one * 101)
    assert [json.loads(raw.answer()[2])["task"] for _ in range(100)] == list(range(100))
    assert raw.answer()[0] == 204
    raw.close()


def test_a_request_may_come_byte_by_byte(shared_farm: Live) -> None:
    raw = shared_farm.raw(b"")
    for byte in request_bytes("GET", "/api/runs", Authorization=basic(shared_farm.token, "")):
        raw.sock.sendall(bytes([byte]))
    assert raw.answer()[0] == 200
    raw.close()


def test_a_client_that_ends_its_half_is_answered(shared_farm: Live) -> None:
    assert exchange(shared_farm, request_bytes("GET", "/readyz") * 3, ended=True) == [200, 200, 200]
    assert exchange(shared_farm, b"GET /re", ended=True) == []


def test_expect_100_continue(farm: Live) -> None:
    raw = farm.raw(request_bytes("POST", "/api/run", Authorization=basic(farm.token, ""), Expect="100-continue",
                                 Content_Length="15", Content_Type="application/json"))
    assert raw.answer()[0] == 100
    raw.sock.sendall(RUN_BODY)
    assert raw.answer()[0] == 201
    raw.close()


def test_head_answers_like_get_without_the_body(shared_farm: Live) -> None:
    raw = shared_farm.raw(request_bytes("HEAD", "/") + CLOSE)
    status, headers, _ = raw.answer(head_only=True)
    assert status == 200 and int(headers["content-length"]) > 100
    assert raw.answer()[0] == 200
    raw.close()


def test_the_front_page_says_what_this_is(shared_farm: Live) -> None:
    raw = shared_farm.raw(request_bytes("GET", "/"))
    status, headers, body = raw.answer()
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert taskfarm.__version__.encode() in body and b"/api/runs" in body
    raw.close()


def test_a_server_answers_while_hundreds_are_silent_or_trickle(farm: Live) -> None:
    silent = [farm.raw(b"GET /livez HT" if n % 2 else b"") for n in range(300)]
    assert farm.ask("GET", "/api/runs")[0] == 200
    assert len(farm.service.server.connections) >= 300
    for raw in silent:
        raw.close()
    wait_until(lambda: len(farm.service.server.connections) <= 1)


def test_silence_and_slowness_end_after_their_time(tmp_path: Path) -> None:
    clock = FakeClock()
    live = Live(str(tmp_path / "f"), clock)
    server = live.service.server
    silent, slow, spoken = live.raw(b""), live.raw(b"GET /livez"), live.raw(request_bytes("GET", "/livez"))
    assert spoken.answer()[0] == 200
    wait_until(lambda: len(server.deadlines) == 2 and len(server.connections) == 3)
    clock.pass_time(taskfarm.REQUEST_S + 1)
    server.post(lambda: None)
    assert silent.answer()[0] == 0 and slow.answer()[0] == 408
    spoken.sock.sendall(request_bytes("GET", "/livez"))
    assert spoken.answer()[0] == 200, "one that has spoken is kept"
    for raw in (silent, slow, spoken):
        raw.close()
    live.close()


def test_an_empty_line_that_is_cut_in_two_is_no_request(tmp_path: Path) -> None:
    clock = FakeClock()
    live = Live(str(tmp_path / "f"), clock)
    raw = live.raw(request_bytes("GET", "/readyz") + b"\r\n\r")
    assert raw.answer()[0] == 200
    raw.sock.sendall(b"\n")
    wait_until(lambda: not live.service.server.deadlines)
    raw.sock.sendall(request_bytes("GET", "/readyz"))
    assert raw.answer()[0] == 200
    raw.close()
    live.close()


def test_keep_alive_is_said_to_a_client_of_http_1_0(shared_farm: Live) -> None:
    raw = shared_farm.raw(b"GET /livez HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert raw.answer()[1]["connection"] == "keep-alive"
    raw.close()


def test_large_answers_that_nobody_reads_do_not_fill_the_memory(farm: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskfarm, "BUFFER_LIMIT", 2 * 2 ** 20)
    monkeypatch.setattr(taskfarm, "show_runs", lambda _: taskfarm.Reply(200, b"x" * 2 ** 20))
    deaf = [farm.raw(request_bytes("GET", "/api/runs", Authorization=basic(farm.token, ""))) for _ in range(40)]
    server = farm.service.server
    wait_until(lambda: server.buffered >= taskfarm.BUFFER_LIMIT // 2 or not server.long)
    assert farm.ask("GET", "/readyz")[0] == 200
    assert server.buffered < 4 * 2 ** 20
    assert [len(raw.answer()[2]) for raw in deaf] == [2 ** 20] * 40, "each gets its answer when there is room"
    for raw in deaf:
        raw.close()


def test_reading_goes_on_for_those_who_were_paused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskfarm, "BUFFER_LIMIT", 200000)
    live = Live(str(tmp_path / "f"))
    body = b'{"numTasks": 1' + b" " * 60000
    head = request_bytes("POST", "/api/run", Authorization=basic(live.token, ""), Content_Type="application/json",
                         Content_Length=str(len(body) + 1))
    hogs = [live.raw(head + body) for _ in range(4)]
    server = live.service.server
    wait_until(lambda: server.buffered > 200000)
    victim = live.raw(head + body[:100])
    wait_until(lambda: len(server.connections) == 5)
    victim.sock.sendall(body[100:] + b"}")
    for hog in hogs:
        hog.close()
    assert victim.answer()[0] == 201
    victim.close()
    live.close()


def test_resets_disturb_nobody(farm: Live) -> None:
    run = make_run(farm, 5000)
    one = request_bytes("POST", "/api/runs/%s/task" % run, b'{"worker_uuid": "w"}', Authorization=basic(farm.token, ""))
    for part in (one[:40], one, one * 20, one * 20 + one[:50]):
        for _ in range(5):
            raw = farm.raw(part)
            raw.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raw.close()     # sends a reset
    assert farm.ask("GET", "/api/runs/" + run)[0] == 200
    wait_until(lambda: len(farm.service.server.connections) == 1)
    assert farm.service.server.buffered == 0


def test_a_client_that_never_reads_is_not_waited_for(farm: Live) -> None:
    for _ in range(300):
        farm.ask("POST", "/api/run", {"numTasks": 1})
    deaf = farm.raw(request_bytes("GET", "/api/runs", Authorization=basic(farm.token, "")) * 400)
    wait_until(lambda: any(c.outbox for c in list(farm.service.server.connections)))
    assert farm.ask("GET", "/api/runs")[0] == 200
    assert farm.service.server.buffered < 2 * 2 ** 20
    assert [deaf.answer()[0] for _ in range(400)] == [200] * 400, "and gets all its answers when it reads at last"
    deaf.close()


def test_a_reader_that_is_slow_but_reads_keeps_its_connection(tmp_path: Path) -> None:
    clock = FakeClock()
    live = Live(str(tmp_path / "f"), clock)
    for _ in range(300):
        live.ask("POST", "/api/run", {"numTasks": 1})
    slow = live.raw(request_bytes("GET", "/api/runs", Authorization=basic(live.token, "")) * 200)
    for _ in range(199):
        clock.pass_time(taskfarm.REQUEST_S / 3)
        assert slow.answer()[0] == 200
    slow.close()
    live.close()


def test_sockets_are_set_for_small_answers_and_long_silence(farm: Live) -> None:
    farm.ask("GET", "/api/runs")
    (connection,) = farm.service.server.connections
    assert connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_an_error_of_the_server_has_an_id_and_no_traceback(farm: Live, caplog: pytest.LogCaptureFixture,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskfarm, "run_json", lambda _: 1 / 0)
    status, problem = farm.ask("POST", "/api/run", {"numTasks": 1})
    fault = problem["detail"].split()[-1]
    assert status == 500 and "Zero" not in str(problem) and fault in caplog.text and "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    assert farm.ask("GET", "/api/runs")[0] == 200


def test_the_access_log_has_a_line_for_each_request(tmp_path: Path) -> None:
    log = io.StringIO()
    service = Service(str(tmp_path / "f"), "127.0.0.1", 0, access_log=log)
    thread = threading.Thread(target=service.serve)
    thread.start()
    raw = Raw(service.server.server_port, request_bytes("GET", "/livez") + request_bytes("GET", "/api/runs"))
    assert [raw.answer()[0] for _ in range(2)] == [200, 401]
    raw.close()
    service.stop()
    thread.join()
    lines = log.getvalue().splitlines()
    assert [line.split('"')[1:3][0] for line in lines] == ["GET /livez", "GET /api/runs"]
    assert re.fullmatch(r'127\.0\.0\.1 - \[[0-9T:Z-]+\] "GET /livez" 200 18 [0-9.]+', lines[0])


# ---------------------------------------------------------------- API

class LiveMachine(Machine):
    """The same machine through HTTP."""

    def open(self, path: str) -> None:
        self.farm = Live(path)


TestLiveMachine = LiveMachine.TestCase
TestLiveMachine.settings = settings(
    max_examples=5 if QUICK else 12, stateful_step_count=30, **machine_settings)    # type: ignore[arg-type]


def test_every_task_is_claimed_exactly_once_by_processes(farm: Live) -> None:
    run = make_run(farm, 600)
    script = """
import http.client, json, sys
port, run, token = sys.argv[1:]
connection = http.client.HTTPConnection("127.0.0.1", int(port))
while True:
    connection.request("POST", "/api/runs/%s/task" % run, '{"worker_uuid": "w"}',
                       {"Authorization": "Bearer " + token, "Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    if response.status == 204:
        break
    print(json.loads(content)["task"])
"""
    workers = [subprocess.Popen([sys.executable, "-c", script, str(farm.port), run, farm.token],
                                stdout=subprocess.PIPE, text=True) for _ in range(6)]
    taken = [int(number) for worker in workers for number in worker.communicate()[0].split()]
    assert sorted(taken) == list(range(600))


Call = Tuple[float, float, Tuple[Any, ...], Any]       # sent, answered, the call, its answer


def fits_some_order(history: List[Call], run: str, fresh: Callable[[], Model]) -> bool:
    """Whether calls with their times (sent, answered, call, answer) have an order that time and the model allow."""
    def play(order: Tuple[int, ...]) -> Tuple[Model, bool]:
        model, right = fresh(), True
        for index in order:
            _, _, (name, *args), answer = history[index]
            right = getattr(model, name)(run, *args) == answer
        return model, right

    seen = set()
    stack: List[Tuple[int, ...]] = [()]
    while stack:
        order = stack.pop()
        if len(order) == len(history):
            return True
        left = [index for index in range(len(history)) if index not in order]
        horizon = min(history[index][1] for index in left)
        for index in left:
            if history[index][0] <= horizon:
                model, right = play((*order, index))
                key = (frozenset((*order, index)), str(model.runs))
                if right and key not in seen:
                    seen.add(key)
                    stack.append((*order, index))
    return False


def test_histories_of_concurrent_calls_fit_an_order(farm: Live) -> None:
    for seed in range(3 if QUICK else 10):
        run = make_run(farm, 4)
        entry = farm.ask("GET", "/api/runs/" + run)[1]

        def work(index: int, run: str = run, seed: int = seed) -> List[Call]:
            dice = random.Random(100 * seed + index)
            calls: List[Call] = []
            for _ in range(5):
                kind, number = dice.choice(["claim", "report", "read", "restart"]), dice.randrange(4)
                sent = time.monotonic()
                call: Tuple[Any, ...]
                if kind == "claim":
                    call = ("claim", "w")
                    status, task = farm.ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": "w"})
                    answer = status, task and {k: v for k, v in task.items() if k != "id"}
                elif kind == "report":
                    call = ("report", number, {"status": "done"})
                    answer = farm.ask("PUT", "/api/runs/%s/tasks/%d" % (run, number), {"status": "done"})
                elif kind == "restart":
                    call = ("restart", True)
                    answer = farm.ask("POST", "/api/runs/%s/restart?all=True" % run)
                else:
                    call = ("run_json",)
                    answer = farm.ask("GET", "/api/runs/" + run)[1]
                calls.append((sent, time.monotonic(), call, answer))
            return calls

        history = [call for calls in in_threads(4, work) for call in calls]

        def fresh(run: str = run, entry: Dict[str, Any] = entry) -> Model:
            model = Model()
            model.created(entry)
            model.register("w", "node1", 1)
            return model
        assert fits_some_order(history, run, fresh)
        wrong_history = [(sent, got, call, (204, None) if call[0] == "claim" and answer[0] == 201 else answer)
                         for sent, got, call, answer in history]
        if wrong_history != history:
            assert not fits_some_order(wrong_history, run, fresh), "the check can fail"


PUBLISHED_WORKER = """
import sys
from taskfarm_worker import TaskFarmWorker
worker = TaskFarmWorker("ada", sys.argv[1], sys.argv[3], url_base=sys.argv[2])
for task in worker.tasks:
    print(task)
    for step in range(1, 11):
        worker.update(step * 10)
    worker.done()
"""

if not QUICK:
    import taskfarm_worker  # type: ignore[import-untyped]

    def published_run(farm: Live, **options: Any) -> Any:
        return taskfarm_worker.TaskFarm("ada", Live.PASSWORD, url_base=farm.url + "/api/", **options)

    def test_the_published_client_unchanged_with_8_processes(farm: Live) -> None:
        run = published_run(farm, numTasks=64)
        listed = taskfarm_worker.tfRuns("ada", Live.PASSWORD, url_base=farm.url + "/api/")
        assert [entry["uuid"] for entry in listed] == [run.uuid]
        assert (run.numWaiting, run.percentDone, run.info("")["numTasks"]) == (64, 0, 64)
        command = [sys.executable, "-c", PUBLISHED_WORKER, Live.PASSWORD, farm.url + "/api/", run.uuid]
        workers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                   for _ in range(8)]
        outputs = [worker.communicate() for worker in workers]
        assert [error for _, error in outputs if error] == []
        assert sorted(int(task) for output, _ in outputs for task in output.split()) == list(range(64))
        assert (run.numDone, run.numComputing, run.percentDone) == (64, 0, 100)
        assert run.getTaskInfo(3, "status") == "done" and run.getTaskInfo(3, "percentCompleted") == 100
        run.restart(everything=True)
        assert (run.numWaiting, run.percentDone) == (64, 0)

    def test_the_published_command_line(farm: Live) -> None:
        def manage(*words: str) -> str:
            done = subprocess.run([sys.executable, "-m", "taskfarm_worker.manage", "-u", "ada", "-p", Live.PASSWORD,
                                   "-b", farm.url + "/api/", *words], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()
        run = published_run(farm, numTasks=3)
        run.setTaskInfo(0, "status", "done")
        run.setTaskInfo(1, "status", "computing")
        assert manage("-l") == "1 %s 3" % run.uuid
        assert manage("-i", run.uuid) == "1 %s 3 (1,1,1) %s" % (run.uuid, 100 / 3)
        assert manage("-r", run.uuid) == "" and manage("-i", run.uuid).startswith("1 %s 3 (2,0,1)" % run.uuid)
        assert manage("-R", run.uuid) == "" and manage("-i", run.uuid) == "1 %s 3 (3,0,0) 0.0" % run.uuid
        assert manage("-d", run.uuid) == "" and manage("-l") == ""


# ---------------------------------------------------------------- CRASH

class Process(Caller):
    """A server as a process of its own, from the command line; its user's token comes from the access file."""

    def __init__(self, db: str, *words: str, prepare: Optional[Callable[[], None]] = None, home: str = "") -> None:
        super().__init__()
        self.home = home or tempfile.mkdtemp()
        environ = dict(os.environ, HOME=self.home, PYTHONFAULTHANDLER="1")
        self.errors = tempfile.TemporaryFile("w+")      # noqa: SIM115
        self.process = subprocess.Popen([sys.executable, str(MODULE), "--db", db, "--port", "0", *words], text=True,
                                        stdout=subprocess.PIPE, stderr=self.errors, env=environ, preexec_fn=prepare)
        assert self.process.stdout
        self.line = self.process.stdout.readline()
        assert self.line, self.log()
        self.port = int(self.line.rsplit(":", 1)[1])
        self.token = json.loads(Path(self.home, ".config/taskfarm/access.json").read_text())["token"]

    def log(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        try:
            status = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)    # has it write where each thread is
            self.process.wait()
            raise AssertionError("it does not end: " + self.log())
        assert self.process.stdout
        self.process.stdout.close()
        self.errors.close()
        shutil.rmtree(self.home)
        return status


def test_kill_9_under_load_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    db = str(tmp_path / "f")
    claimed: List[int] = []
    done: List[int] = []
    run = ""
    dice = random.Random(2)
    for _ in range(3 if QUICK else 20):
        server = Process(db)
        run = run or make_run(server, 10 ** 6)
        enough = threading.Event()
        goal = len(done) + dice.randrange(5, 400)

        def work(index: int, server: Process = server, run: str = run, enough: threading.Event = enough,
                 goal: int = goal) -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                while True:
                    status, number = claim(server, run)
                    assert status == 201
                    claimed.append(number)
                    assert report(server, run, number, status="done") == 204
                    done.append(number)
                    if len(done) > goal:
                        enough.set()

        loads = threading.Thread(target=in_threads, args=(16, work))
        loads.start()
        assert enough.wait(20)
        server.end(signal.SIGKILL)
        loads.join()
        store = Store(db)
        assert store.call(taskfarm.check()) == []
        states = dict(store.connection.execute("SELECT id - 1, status FROM task"))
        assert len(set(claimed)) == len(claimed), "given twice"
        assert all(states[number] in (taskfarm.COMPUTING, taskfarm.DONE) for number in claimed)
        assert all(states[number] == taskfarm.DONE for number in done)
        store.close()


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize("method, path, after", [
    ("POST", "/restart?all=True", (20000, 0, 0, 0.0)), ("POST", "/restart", (20000, 0, 0, 50.0)), ("DELETE", "", None)])
def test_kill_9_leaves_a_large_restart_or_deletion_whole_or_undone(
        tmp_path: Path, method: str, path: str, after: Optional[Tuple[int, int, int, float]], answered: bool) -> None:
    db, count = str(tmp_path / "f"), 20000
    with contextlib.closing(Store(db)) as store:
        run = store.call(taskfarm.create_run("a" * 32, count)).uuid
        for first in range(0, count, 1000):
            store.apply([taskfarm.report(run, None, taskfarm.Report(number, None, taskfarm.COMPUTING, taskfarm.FULL // 2))
                         for number in range(first, first + 1000)])
    server = Process(db)
    raw = server.raw(request_bytes(method, "/api/runs/" + run + path, Authorization=basic(server.token, "")))
    if answered:
        assert raw.answer()[0] == 204
    server.end(signal.SIGKILL)
    raw.close()
    direct = Direct(db, FakeClock())
    seen = figures(direct, run) if direct.ask("GET", "/api/runs/" + run)[0] == 200 else None
    assert seen == after or not answered and seen == (0, count, 0, 50.0)
    while direct.store.sweeps:
        direct.store.sweep()
    if after:
        assert figures(direct, run) == seen
    direct.close()


def test_sigterm_under_load_sends_what_is_in_hand_and_ends_with_0(tmp_path: Path) -> None:
    server = Process(str(tmp_path / "f"))
    run = make_run(server, 10 ** 6)
    claimed: List[int] = []

    def work(index: int) -> None:
        with contextlib.suppress(ConnectionError, http.client.RemoteDisconnected):
            while True:
                status, number = claim(server, run)
                if status == 503:
                    return
                claimed.append(number)

    loads = threading.Thread(target=in_threads, args=(8, work))
    loads.start()
    wait_until(lambda: len(claimed) > 200)
    assert server.end(signal.SIGTERM) == 0
    loads.join()
    store = Store(str(tmp_path / "f"))
    (touched,) = store.connection.execute("SELECT count(*) FROM task").fetchone()
    assert sorted(claimed) == list(range(touched)), "each claim that was done was also answered"
    assert store.call(taskfarm.check()) == []
    store.close()


def test_a_full_disk_refuses_writes_answers_reads_and_recovers(tmp_path: Path) -> None:
    server = Process(str(tmp_path / "f"))
    run, dice = make_run(server, 10 ** 6), random.Random(3)
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    assert resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (300000, limits[1])) == limits
    done = []
    while True:
        number = dice.randrange(10 ** 6)
        status, problem = server.ask("PUT", "/api/runs/%s/tasks/%d" % (run, number), {"status": "done"})
        if status != 204:
            break
        done.append(number)
    assert status == 503 and "disk" in problem["detail"]
    assert figures(server, run)[2] == len(set(done))
    while server.ask("GET", "/readyz")[0] == 200:       # one page may still have fitted
        report(server, run, 5, status="done")
    assert server.ask("GET", "/livez")[0] == 200
    assert report(server, run, 5, status="done") == 503
    number_done = figures(server, run)[2]
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)
    assert server.ask("GET", "/readyz")[0] == 200
    assert report(server, run, 6, status="done") == 204
    assert figures(server, run)[2] == number_done + (6 not in done)
    log = server.log()
    assert 1 <= log.count("resumes by itself") == log.count("takes writes again") < 10
    assert server.end(signal.SIGTERM) == 0
    with contextlib.closing(Store(str(tmp_path / "f"))) as store:
        assert store.call(taskfarm.check()) == []


def test_out_of_descriptors_the_longest_idle_go_and_new_ones_are_served(tmp_path: Path) -> None:
    server = Process(str(tmp_path / "f"), prepare=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    raws = []
    for _ in range(150):
        raws.append(Raw(server.port, request_bytes("GET", "/livez")))
        assert raws[-1].answer()[0] == 200
    raws[-1].sock.sendall(request_bytes("GET", "/livez"))
    assert raws[-1].answer()[0] == 200
    assert raws[0].answer()[0] == 0, "the longest idle was closed"
    assert server.log().count("no descriptor is left") == 1
    for raw in raws:
        raw.close()
    assert server.end(signal.SIGTERM) == 0


def test_half_a_request_is_not_closed_at_the_descriptor_limit(tmp_path: Path) -> None:
    server = Process(str(tmp_path / "f"), prepare=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    half = server.raw(request_bytes("GET", "/livez"))
    assert half.answer()[0] == 200
    half.sock.sendall(request_bytes("POST", "/api/run", Authorization=basic(server.token, ""), Content_Length="15",
                                    Content_Type="application/json"))
    raws = [server.raw(request_bytes("GET", "/livez")) for _ in range(90)]
    assert raws[-1].answer()[0] == 200
    half.sock.sendall(RUN_BODY)
    assert half.answer()[0] == 201
    for raw in [half, *raws]:
        raw.close()
    assert server.end(signal.SIGTERM) == 0


def test_500_silent_clients_at_the_descriptor_limit_do_not_keep_others_out(tmp_path: Path) -> None:
    server = Process(str(tmp_path / "f"), prepare=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    silent = [server.raw(b"") for _ in range(500)]
    assert wait_until(lambda: server.ask("GET", "/readyz")[0] == 200)
    for raw in silent:
        raw.close()
    assert server.end(signal.SIGTERM) == 0


def test_no_thread_is_wanted_after_the_start(farm: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    run = make_run(farm, 5)
    assert claim(farm, run) == (201, 0)
    assert get_with(farm, basic("ada", Live.PASSWORD), "/api/runs")[0] == 200
    with pytest.raises(Refusal, match="no more threads"):
        Service(farm.path + "2", "127.0.0.1", 0)


def test_steps_of_the_clock_do_not_matter(tmp_path: Path) -> None:
    clock = FakeClock()
    live = Live(str(tmp_path / "f"), clock)
    run = make_run(live, 5)
    token = token_of(live, basic("ada", Live.PASSWORD))
    for step_s in (-10 ** 6, 10 ** 6, 86400):
        clock.utc += step_s
        assert claim(live, run)[0] == 201 and get_with(live, "Bearer " + token)[0] == 200
    live.close()


def test_a_process_that_was_stopped_goes_on(tmp_path: Path) -> None:
    server = Process(str(tmp_path / "f"))
    run = make_run(server, 10)
    server.process.send_signal(signal.SIGSTOP)
    raw = server.raw(request_bytes("POST", "/api/runs/%s/task" % run, b'{"worker_uuid": "w"}',
                                   Authorization=basic(server.token, "")))
    server.process.send_signal(signal.SIGCONT)
    assert raw.answer()[0] == 201
    raw.close()
    assert server.end(signal.SIGTERM) == 0


# ---------------------------------------------------------------- CLIENT

def access_of(farm: Any, **changes: str) -> taskfarm.Access:
    """Farm and login of a live farm."""
    proof = farm.service.store.proof_key.hex()
    access = taskfarm.Access(farm.url, "ada", farm.token, "", proof, farm.service.store.identity, "the test")
    return access._replace(**changes)


class Flaky:
    """A port in front of a farm that swallows answers to requests that have reached the farm."""

    def __init__(self, port: int) -> None:
        self.port_behind = port
        self.swallow: Callable[[], bool] = lambda: False     # the next answer
        self.seen: List[bytes] = []     # heads of requests
        self.lost = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = "http://127.0.0.1:%d" % self.port
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError), contextlib.closing(client), contextlib.closing(
                socket.create_connection(("127.0.0.1", self.port_behind))) as behind:
            while True:
                request = self._message(client)
                self.seen.append(request.partition(b"\r\n\r\n")[0])
                behind.sendall(request)
                answer = self._message(behind)
                if b"GET /livez" not in request and self.swallow():
                    self.lost += 1
                    return
                client.sendall(answer)

    @staticmethod
    def _message(sock: socket.socket) -> bytes:
        """A whole request or answer. Raises EOFError at the end of the connection."""
        def more() -> bytes:
            received = sock.recv(65536)
            if not received:
                raise EOFError
            return received
        data = b""
        while b"\r\n\r\n" not in data:
            data += more()
        head, _, body = data.partition(b"\r\n\r\n")
        length = int((re.findall(rb"(?i)\r\ncontent-length: (\d+)", head) or [b"0"])[0])
        while len(body) < length:
            body += more()
        return head + b"\r\n\r\n" + body

    def close(self) -> None:
        self.listener.close()


def test_a_refusal_has_the_class_of_its_status_and_the_servers_sentence(farm: Live) -> None:
    with contextlib.closing(taskfarm.Client(lambda: access_of(farm))) as client:
        for path, kind, sentence in (("/api/runs/" + "0" * 32, taskfarm.NotFound, "run"),
                                     ("/api/users", taskfarm.Forbidden, "")):
            with pytest.raises(kind) as refused:
                client.ask("GET", path)
            assert sentence in str(refused.value) and isinstance(refused.value, RuntimeError)
        assert client.ask("GET", "/api/runs") == {"data": []}
    wrong = taskfarm.Client(lambda: access_of(farm, token="tf1.wrong"))
    with pytest.raises(taskfarm.Unauthorized):
        wrong.ask("GET", "/api/runs")
    wrong.close()


def test_a_login_goes_to_no_other_farm(farm: Live) -> None:
    relay = Flaky(farm.port)
    for proof in ("00" * 32, "no hex"):
        client = taskfarm.Client(lambda: access_of(farm, proof=proof, url=relay.url))  # noqa: B023
        with pytest.raises(taskfarm.Unreachable, match="no login was sent"):
            client.ask("GET", "/api/runs")
        client.close()
    assert relay.seen and not any(b"authorization" in head.lower() for head in relay.seen)
    good = taskfarm.Client(lambda: access_of(farm, url=relay.url))
    good.ask("GET", "/api/runs")
    good.ask("GET", "/api/runs")
    good.close()
    assert sum(b"authorization" in head.lower() for head in relay.seen) == 2
    assert sum(b"/livez" in head for head in relay.seen) == 3, "one proof a connection"
    relay.close()


def test_an_answer_that_is_lost_costs_nothing_and_gives_nothing_twice(farm: Live) -> None:
    relay = Flaky(farm.port)
    access, swallow = access_of(farm, url=relay.url), [False]
    relay.swallow = lambda: bool(swallow) and swallow.pop()
    with contextlib.closing(taskfarm.Client(lambda: access, patience_s=20)) as client:
        swallow[:] = [True]
        run = client.ask("POST", "/api/run", {"numTasks": 5})["uuid"]
        assert len(client.ask("GET", "/api/runs")["data"]) == 1
        taskfarm.register(client, "w")
        for number in range(5):
            swallow[:] = [True, True]
            assert client.ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": "w"})["task"] == number
        assert client.ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": "w"}) is None
        assert client.retry_after is not None, "its own lease may end"
    assert relay.lost == 11
    relay.close()


def test_a_client_waits_for_a_server_and_follows_it_to_another_port(farm: Live) -> None:
    said: List[str] = []
    with contextlib.closing(taskfarm.Client(lambda: access_of(farm), patience_s=60)) as client:
        client.say = said.append
        client.ask("GET", "/api/runs")
        farm.stop()
        answers = []
        thread = threading.Thread(target=lambda: answers.append(client.ask("POST", "/api/run", {"numTasks": 1})))
        thread.start()
        wait_until(lambda: said)
        farm.local = threading.local()
        farm.start()
        thread.join(30)
        assert answers[0]["numTasks"] == 1
        assert "is the server running" in said[0] and said[-1] == "the farm answers again"
    with contextlib.closing(taskfarm.Client(lambda: access_of(farm, url="http://127.0.0.1:1"))) as client:
        with pytest.raises(taskfarm.Unreachable, match="TASKFARM_URL"):
            client.ask("GET", "/api/runs")


def test_a_login_that_was_renewed_is_read_again(farm: Live) -> None:
    tokens = ["tf1.old", farm.token]
    with contextlib.closing(taskfarm.Client(lambda: access_of(farm, token=tokens.pop(0)))) as client:
        assert client.ask("GET", "/api/runs") == {"data": []}


def test_farm_and_login_are_found_where_they_are(tmp_path: Path) -> None:
    environ = {"TASKFARM_ACCESS": str(tmp_path / "access.json")}
    with pytest.raises(Refusal, match="TASKFARM_URL"):
        taskfarm.find_access(environ)
    with pytest.raises(Refusal, match="there is no login"):
        taskfarm.find_access(dict(environ, TASKFARM_URL="http://a:1"))
    taskfarm.write_access(environ["TASKFARM_ACCESS"], {"url": "http://home:5000", "user": "ada", "token": "t",
                                                       "farm": "f", "proof": "aa"})

    def found(**more: str) -> Tuple[str, str, str, str, str]:
        access = taskfarm.find_access(dict(environ, **more))
        return access.url, access.user, access.token, access.password, access.proof

    assert found() == ("http://home:5000", "ada", "t", "", "aa")
    assert found(TASKFARM_URL="http://[::1]:6000/api/") == ("http://[::1]:6000", "ada", "t", "", "aa"), \
        "a tunnel: the login goes only where the proof is given"
    assert found(TASKFARM_TOKEN="u") == ("http://home:5000", "", "u", "", "aa")
    assert found(TASKFARM_URL="http://b:1/", TASKFARM_USER="eve", TASKFARM_PASSWORD="p") == (
        "http://b:1", "eve", "", "p", "")
    with pytest.raises(Refusal, match="TASKFARM_PASSWORD"):
        found(TASKFARM_USER="eve")
    assert taskfarm.find_access(environ, "http://c:2", "bob", "pw")[:4] == ("http://c:2", "bob", "", "pw")
    for url in ("home:5000", "http://", "ftp://x", "http://x:port", "http://[::1"):
        with pytest.raises(Refusal, match="looks like"):
            taskfarm.Client(lambda: taskfarm.find_access(environ, url)).ask("GET", "/livez")   # noqa: B023


def test_an_ipv6_address_and_a_host_name_work(tmp_path: Path) -> None:
    for host in ("::1", "localhost") if os.path.exists("/proc/net/if_inet6") else ("localhost",):
        service = Service(str(tmp_path / "f"), host, 0)
        thread = threading.Thread(target=service.serve)
        thread.start()
        access = taskfarm.Access(service.url, "", "", "", service.store.proof_key.hex(), "", "the test")
        assert taskfarm.still_answers(access)
        service.stop()
        thread.join(20)


def test_a_run_is_found_by_uuid_beginning_or_name(farm: Live) -> None:
    with contextlib.closing(taskfarm.Client(lambda: access_of(farm))) as client:
        runs = [client.ask("POST", "/api/run", {"numTasks": 1, "name": name})["uuid"] for name in ("ice", "sea", "sea")]
        assert taskfarm.find_run_uuid(client, "ice") == runs[0]
        assert taskfarm.find_run_uuid(client, runs[1]) == runs[1]
        length = next(n for n in range(1, 32) if len({run[:n] for run in runs}) == 3)
        assert taskfarm.find_run_uuid(client, runs[2][:length].upper()) == runs[2]
        for text, sentence in (("sea", "2 runs"), ("", "no run"), ("land", "no run")):
            with pytest.raises(Refusal, match=sentence):
                taskfarm.find_run_uuid(client, text)


@pytest.mark.parametrize("published", [pytest.param(True, marks=pytest.mark.skipif(QUICK, reason="wants it")), False])
def test_a_script_for_the_published_client_runs_with_ours(farm: Live, published: bool) -> None:
    if published:
        import taskfarm_worker as module
    else:
        module = taskfarm
    login = ("ada", Live.PASSWORD)
    base = farm.url + "/api/"
    with pytest.raises(RuntimeError):
        module.TaskFarm("ada", "wrong", numTasks=1, url_base=base)
    with pytest.raises(RuntimeError):
        module.TaskFarm(*login, url_base=base)
    with pytest.raises(RuntimeError):
        module.TaskFarm(*login, "0" * 32, url_base=base)
    run = module.TaskFarm(*login, None, 4, base)
    assert (run.numTasks, run.numWaiting, run.numDone, run.numComputing, run.percentDone) == (4, 4, 0, 0, 0)
    assert [entry["uuid"] for entry in module.tfRuns(*login, base)] == [run.uuid]
    assert run.url("runs") == base + "runs" and run.info("")["uuid"] == run.uuid
    worker = module.TaskFarmWorker(*login, run.uuid, base)
    done = []
    for task in worker.tasks:
        assert worker.task == task
        worker.update(50)
        assert run.getTaskInfo(task, "percentCompleted") == 50
        with pytest.raises(ValueError):
            worker.update(101)
        if task != 2:
            worker.update(100)
        worker.done()
        done.append(task)
    assert done == [0, 1, 2, 3] and worker.task is None
    assert (run.numDone, run.numComputing) == (3, 1)
    assert run.getTaskInfo(3, "")["status"] == "done"
    for task in (-1, 4):
        with pytest.raises(RuntimeError):
            run.getTaskInfo(task, "")
    assert module.TaskFarm(farm.token, "", run.uuid, url_base=base).numDone == 3, "a token is a user name too"
    run.setTaskInfo(2, "status", "waiting")
    run.restart(True)
    assert run.numWaiting == 4
    run.delete()
    with pytest.raises(RuntimeError):
        run.info("")


def test_our_worker_keeps_a_lease_and_lets_go_at_the_end(farm: Live, monkeypatch: pytest.MonkeyPatch,
                                                         tmp_path: Path) -> None:
    monkeypatch.setenv("TASKFARM_ACCESS", str(tmp_path / "access.json"))
    monkeypatch.setattr(taskfarm, "BEAT_S", 0.02)
    taskfarm.write_access(str(tmp_path / "access.json"), dict(zip(
        ("url", "user", "token", "password", "proof", "farm"), access_of(farm))))
    run = taskfarm.TaskFarm(numTasks=3)
    worker = taskfarm.TaskFarmWorker(uuid=run.uuid)
    assert worker.task == 0
    path = "/api/worker/" + worker.worker_uuid
    first = farm.ask("GET", path)[1]
    assert first["lease"] == taskfarm.LEASE_S and first["held"] == 1
    wait_until(lambda: farm.ask("GET", path)[1]["heard"] > first["heard"])
    run.restart(everything=True)
    with pytest.raises(taskfarm.Conflict):
        worker.update(50)
    worker.done()
    assert worker.task == 0
    worker.close()
    assert farm.ask("GET", path)[1]["state"] == "signed off" and run.numWaiting == 3
    second = taskfarm.TaskFarmWorker(uuid=run.uuid)
    assert second.task == 0
    path = "/api/worker/" + second.worker_uuid
    del second
    assert wait_until(lambda: farm.ask("GET", path)[1]["state"]) == "signed off"


# ---------------------------------------------------------------- WORKER

class Hand:
    """`work` as a process of its own, on a farm that is a process too; its lines come from a file."""
    all: List["Hand"] = []

    def __init__(self, server: Process, *words: str, tweak: str = "", **environ: str) -> None:
        self.server = server
        self.output = tempfile.TemporaryFile("w+")      # noqa: SIM115
        self.errors = tempfile.TemporaryFile("w+")      # noqa: SIM115
        start = [str(MODULE)] if not tweak else [
            "-c", "import sys; sys.path.insert(0, %r); import taskfarm; %s; sys.exit(taskfarm.main())" % (
                str(HERE), tweak)]
        self.process = subprocess.Popen(
            [sys.executable, *start, "work", *words], text=True, stdout=self.output, stderr=self.errors,
            stdin=subprocess.DEVNULL, env=dict(os.environ, HOME=server.home, **environ))
        self.all.append(self)

    def said(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def erred(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def end(self, status: int, number: int = 0) -> str:
        """Its lines, once it has ended, by a signal or of its own; with that status."""
        if number:
            self.process.send_signal(number)
        try:
            assert self.process.wait(40) == status, self.said() + self.erred()
        finally:
            self.process.kill()
            self.process.wait()
        return self.said()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    served = Process(str(tmp_path / "f"))
    yield served
    while Hand.all:
        hand = Hand.all.pop()
        hand.process.kill()         # with its commands
        hand.process.wait()
    if served.process.poll() is None:
        served.end(signal.SIGTERM)
    with contextlib.closing(Store(str(tmp_path / "f"))) as store:
        assert store.call(taskfarm.check()) == []


def new_run(server: Caller, tasks: int, **more: Any) -> str:
    return str(server.ask("POST", "/api/run", dict(more, numTasks=tasks))[1]["uuid"])


def counts(server: Caller, run: str) -> Tuple[int, int, int, int]:
    entry = server.ask("GET", "/api/runs/" + run)[1]
    return entry["numWaiting"], entry["numComputing"], entry["numDone"], entry["numFailed"]


def task_of(server: Caller, run: str, number: int) -> Dict[str, Any]:
    answer: Dict[str, Any] = server.ask("GET", "/api/runs/%s/tasks/%d" % (run, number))[1]
    return answer


def alive(pid: int) -> bool:
    """Whether a process runs: one that has ended and was not reaped does not."""
    try:
        return Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids_in(folder: Path) -> List[int]:
    """The processes that wrote a file of their number."""
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]


def test_every_task_is_run_once_and_told_about(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 300, name="tiles")
    script = tmp_path / "tile.sh"
    script.write_text("echo x >> %s/ran-$1\n[ $1 != 7 ] || { echo so it goes >&2; exit 3; }\n" % tmp_path)
    script.chmod(0o755)         # and it has no first line with #!
    hands = [Hand(server, "tiles", "-j", "3", "--", str(script), "{task}") for _ in range(2)]
    outputs = [hand.end(3) for hand in hands]
    assert counts(server, run) == (0, 0, 299, 1)
    assert {path.name: path.read_text() for path in tmp_path.glob("ran-*")} == {"ran-%d" % n: "x\n" for n in range(300)}
    failed = task_of(server, run, 7)
    assert (failed["exitCode"], failed["message"], failed["failures"]) == (3, "so it goes", 1)
    assert sum(output.count(" done in ") for output in outputs) == 299
    assert sum(output.count("task 7 failed: exit status 3: so it goes\n") for output in outputs) == 1
    assert all(entry["state"] == "signed off" for entry in server.ask("GET", "/api/workers?all=True")[1]["data"])


def test_what_a_command_is_given(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 3)
    lines = tmp_path / "lines"
    lines.write_bytes(b"a b; exit 1\r\n'\"$HOME {task}\n\xff")
    show = tmp_path / "show.py"
    show.write_text("import json, os, sys\nprint(json.dumps([sys.argv[1:], {n: v for n, v in os.environ.items() if "
                    "n.startswith('TASKFARM')}, sys.stdin.read(), os.getpgid(0) == os.getpid()]))\n")
    Hand(server, run[:8], "--lines", str(lines), "--log-dir", str(tmp_path / "logs"), "--", sys.executable, str(show),
         "{task}/{attempt}", "--", "{run}", "<{line}>", "{other}", "--jobs").end(0)
    words = ["a b; exit 1", "'\"$HOME {task}", "\udcff"]
    for task in range(3):
        argv, environ, stdin, leads = json.loads((tmp_path / "logs" / ("%d.log" % task)).read_text())
        assert argv == ["%d/1" % task, "--", run, "<%s>" % words[task], "{other}", "--jobs"] and stdin == "" and leads
        assert environ.pop("TASKFARM_WORKER") == task_of(server, run, task)["worker"]
        assert environ.pop("TASKFARM_FARM") and environ == {
            "TASKFARM_TASK": str(task), "TASKFARM_RUN": run, "TASKFARM_ATTEMPT": "1",
            "TASKFARM_URL": "http://127.0.0.1:%d" % server.port}, "and no secret"


def test_a_file_of_commands_is_a_run(server: Process, tmp_path: Path) -> None:
    (tmp_path / "commands").write_text("echo one > %s/1 && true\n\nexit 4\n" % tmp_path)
    run = new_run(server, 3)
    Hand(server, run, "--lines", str(tmp_path / "commands"), "--", "{line}").end(3)
    assert (tmp_path / "1").read_text() == "one\n"
    assert [task_of(server, run, task)["status"] for task in range(3)] == ["done", "done", "failed"]
    assert task_of(server, run, 2)["exitCode"] == 4


def test_lines_are_found_wherever_they_lie(tmp_path: Path) -> None:
    generator = random.Random(5)
    for ended in (b"", b"\n"):
        content = [b"%d " % number + b"x" * generator.choice([0, 1, 200, 70000 if number % 97 == 0 else 3])
                   for number in range(3000)]
        (tmp_path / "lines").write_bytes(b"\n".join(content) + ended)
        lines = taskfarm.Lines(str(tmp_path / "lines"))
        assert len(lines) == 3000 and [lines[number] for number in range(3000)] == content
        for number in (-1, 3000):
            with pytest.raises(IndexError):
                lines[number]
    (tmp_path / "lines").write_bytes(b"")
    assert len(taskfarm.Lines(str(tmp_path / "lines"))) == 0


@pytest.mark.parametrize("words, sentence", [
    (["{run}", "--", "no-such-program"], "there is no program no-such-program"),
    (["{run}", "--", "echo", "{line}"], "--lines FILE"),
    (["{run}", "--lines", "{dir}/two", "--", "echo", "{line}"], "has 2 lines, and the run 3 tasks"),
    (["{run}", "--lines", "{dir}/none", "--", "echo", "{line}"], "cannot be read"),
    (["{run}", "--log-dir", "{dir}/two/logs", "--", "true"], "cannot be made"),
    (["harvest", "--", "true"], "no run is called 'harvest'"),
])
def test_a_worker_that_cannot_work_says_so_and_takes_nothing(server: Process, tmp_path: Path, words: List[str],
                                                             sentence: str) -> None:
    (tmp_path / "two").write_text("1\n2\n")
    run = new_run(server, 3)
    hand = Hand(server, *(word.replace("{run}", run).replace("{dir}", str(tmp_path)) for word in words))
    hand.end(1)
    assert sentence in hand.erred() and hand.erred().count("\n") == 1
    assert counts(server, run) == (3, 0, 0, 0)


def test_each_way_to_fail_is_kept(server: Process, tmp_path: Path) -> None:
    (tmp_path / "commands").write_text("\n".join([
        "printf 'first\\nlast \\033[1mline\\n\\n' >&2; exit 200", "kill -SEGV $$", "echo before >&2; sleep 1000",
        "sleep 1000 & echo $! > %s/left; echo short >&2; exit 5" % tmp_path]))
    run = new_run(server, 4)
    hand = Hand(server, run, "-j", "4", "--timeout", "1", "--grace", "0.1", "--lines", str(tmp_path / "commands"),
                "--", "{line}")
    hand.end(3)
    shown = [(task["exitCode"], task["message"]) for task in (task_of(server, run, number) for number in range(4))]
    assert shown == [(200, "last  [1mline"), (139, "killed by SIGSEGV"), (124, "ended after 1 s: before"), (5, "short")]
    assert "first\nlast" in hand.erred(), "the error output is passed on"
    os.kill(int((tmp_path / "left").read_text()), signal.SIGKILL)       # what a command left behind is not ours to end


def test_a_node_where_the_command_is_gone_fails_no_task(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 10)
    script = tmp_path / "tile.sh"
    script.write_text("#!/bin/sh\n[ $1 != 3 ] || rm %s\n" % script)
    script.chmod(0o755)
    assert "tile.sh cannot be started here" in Hand(server, run, "--", str(script), "{task}").end(1)
    assert counts(server, run) == (6, 0, 4, 0)
    (tmp_path / "lines").write_text("true\n" * 4 + "/no/such/program\n" * 2 + "true\n" * 4)
    Hand(server, run, "--lines", str(tmp_path / "lines"), "--", "env", "{line}").end(3)
    assert counts(server, run) == (0, 0, 8, 2)
    run = new_run(server, 2)
    (tmp_path / "lines").write_text("/no/such/program\nnul\0\n")
    Hand(server, run, "--lines", str(tmp_path / "lines"), "--", "{line}", "{task}").end(3)
    assert [task_of(server, run, number)["exitCode"] for number in range(2)] == [127, 126]


def test_a_system_that_is_full_is_waited_for(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 6)
    logs = tmp_path / "logs"
    hand = Hand(server, run, "--log-dir", str(logs), "--", "sh", "-c", "[ {task} != 2 ] || [ -e %s/full ] || { touch "
                "%s/full; mv %s %s; }" % (tmp_path, tmp_path, logs, tmp_path / "away"),
                tweak="taskfarm.TEMPORARY += (taskfarm.errno.ENOENT,)")
    wait_until(lambda: "trying again" in hand.said())
    (tmp_path / "away").rename(logs)
    hand.end(0)
    assert counts(server, run) == (0, 0, 6, 0)


def test_what_failed_may_be_tried_again(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 5, maxFailures=3)
    Hand(server, run, "-j", "2", "--log-dir", str(tmp_path / "logs"), "--log-failed", "--", "sh", "-c",
         'echo why >&2; sleep 0.1; echo {attempt}; [ {task} != 4 ] && [ {attempt} != 1 ]').end(3)
    assert counts(server, run) == (0, 0, 4, 1)
    assert task_of(server, run, 4)["attempt"] == 3
    assert {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()} == {"4.log": "why\n3\n"}
    assert task_of(server, run, 4)["message"] == "why"


def test_progress_is_reported_from_inside(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 1)
    hand = Hand(server, run, "--", "sh", "-c", "%s %s progress 37.5%%; touch %s/told; until [ -e %s/go ]; do "
                "sleep 0.01; done" % (sys.executable, MODULE, tmp_path, tmp_path))
    wait_until((tmp_path / "told").exists)
    task = task_of(server, run, 0)
    assert (task["percentCompleted"], task["status"]) == (37.5, "computing") and task["started"]
    mine = {"TASKFARM_RUN": run, "TASKFARM_TASK": "0", "TASKFARM_WORKER": task["worker"], "HOME": server.home}
    stranger = run_verb("progress", "90", TASKFARM_ATTEMPT="2", **mine)
    assert stranger.returncode == 1 and task_of(server, run, 0)["percentCompleted"] == 37.5
    alone = run_verb("progress", "90", HOME=server.home)
    assert alone.returncode == 0 and "not reported" in alone.stderr
    away = run_verb("progress", "90", TASKFARM_ATTEMPT="1", **dict(mine, TASKFARM_URL="http://127.0.0.1:1"))
    assert away.returncode == 0 and "not reported" in away.stderr
    assert run_verb("progress", "101").returncode == 2
    (tmp_path / "go").touch()
    hand.end(0)
    assert task_of(server, run, 0)["percentCompleted"] == 100


def stubborn(folder: Path) -> Tuple[str, ...]:
    """A command that leaves its process ids in a folder, and that only SIGKILL ends."""
    return "sh", "-c", "trap '' TERM; sleep 1000 & touch %s/$$ %s/$!; wait; sleep 1000" % (folder, folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_the_commands_and_gives_the_tasks_back(server: Process, tmp_path: Path, number: int) -> None:
    run = new_run(server, 10)
    (tmp_path / "pids").mkdir()
    hand = Hand(server, run, "-j", "2", "--grace", "0.3", "--", *stubborn(tmp_path / "pids"))
    wait_until(lambda: len(pids_in(tmp_path / "pids")) == 4)
    said = hand.end(7, number)
    assert signal.Signals(number).name in said
    assert not any(map(alive, pids_in(tmp_path / "pids"))), "the whole groups are gone"
    assert counts(server, run) == (10, 0, 0, 0)
    task = task_of(server, run, 0)
    assert (task["failures"], task["losses"]) == (0, 0)
    (worker,) = server.ask("GET", "/api/workers?all=True")[1]["data"]
    assert worker["state"] == "signed off"


def test_a_second_signal_does_not_wait(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 10)
    (tmp_path / "pids").mkdir()
    hand = Hand(server, run, "--grace", "1000", "--", *stubborn(tmp_path / "pids"), tweak="taskfarm.AGAIN_S = 0")
    wait_until(lambda: len(pids_in(tmp_path / "pids")) == 2)
    hand.process.terminate()
    wait_until(lambda: "stopping" in hand.said())
    hand.end(7, signal.SIGTERM)
    assert not any(map(alive, pids_in(tmp_path / "pids"))) and counts(server, run) == (10, 0, 0, 0)


def test_two_signals_at_once_are_one(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 10)
    hand = Hand(server, run, "--grace", "20", "--", "sh", "-c", "trap 'sleep 0.3; touch %s/saved; exit 0' TERM; "
                "touch %s/on; while :; do sleep 0.01; done" % (tmp_path, tmp_path), tweak="taskfarm.AGAIN_S = 1000")
    wait_until((tmp_path / "on").exists)
    hand.process.terminate()            # srun sends it twice
    wait_until(lambda: "stopping" in hand.said())
    hand.end(7, signal.SIGTERM)
    assert (tmp_path / "saved").exists(), "the command had its grace"
    assert counts(server, run) == (10, 0, 0, 0), "a command that was ended has not done its task"


@pytest.mark.parametrize("trap", ["", "trap 'exit 143' TERM; "])
def test_a_batch_system_may_signal_the_commands_first(server: Process, tmp_path: Path, trap: str) -> None:
    run = new_run(server, 10)
    command = "%stouch %s/$$; while :; do sleep 0.01; done" % (trap, tmp_path)
    hand = Hand(server, run, "-j", "2", "--", "sh", "-c", command, tweak="taskfarm.SUSPECT_S = 1000")
    pids = wait_until(lambda: pids_in(tmp_path) if len(pids_in(tmp_path)) == 2 else [])
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not any(map(alive, pids)))
    hand.end(7, signal.SIGTERM)
    assert counts(server, run) == (10, 0, 0, 0), "none has failed"
    alone = Hand(server, run, "--", "sh", "-c", "[ {task} != 3 ] || kill -TERM $$", tweak="taskfarm.SUSPECT_S = 0.01")
    alone.end(3)
    assert counts(server, run) == (0, 0, 9, 1)
    assert (task_of(server, run, 3)["exitCode"], task_of(server, run, 3)["message"]) == (143, "killed by SIGTERM")


def test_drain_lets_commands_finish(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 10)
    hand = Hand(server, run, "-j", "2", "--drain", "--", "sh", "-c", "touch %s/on-{task}; until [ -e %s/go ]; do "
                "sleep 0.01; done" % (tmp_path, tmp_path))
    wait_until(lambda: len(list(tmp_path.glob("on-*"))) == 2)
    hand.process.terminate()
    wait_until(lambda: "may finish" in hand.said())
    (tmp_path / "go").touch()
    hand.end(7)
    assert counts(server, run) == (8, 0, 2, 0)
    hand = Hand(server, run, "--drain", "--until", "+3", "--grace", "0.1", "--", "sh", "-c", "touch %s/last; sleep 1000" %
                tmp_path, tweak="taskfarm.LEAVE_S = 0.5")
    wait_until((tmp_path / "last").exists)
    hand.end(7, signal.SIGTERM)     # the end of the job
    assert counts(server, run) == (8, 0, 2, 0)


def test_a_worker_that_is_killed_takes_its_commands_with_it(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 10)
    (tmp_path / "pids").mkdir()
    hand = Hand(server, run, "-j", "2", "--grace", "0.1", "--", *stubborn(tmp_path / "pids"))
    wait_until(lambda: len(pids_in(tmp_path / "pids")) == 4)
    hand.end(-signal.SIGKILL, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, pids_in(tmp_path / "pids"))))


def test_a_task_that_runs_longer_than_a_moment_is_computing(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 2)
    hand = Hand(server, run, "-j", "2", "--", "sh", "-c", "until [ -e %s/go ]; do sleep 0.01; done" % tmp_path,
                tweak="taskfarm.MOMENT_S = 0.01")
    wait_until(lambda: task_of(server, run, 0)["started"] and task_of(server, run, 1)["started"])
    assert counts(server, run) == (0, 2, 0, 0)
    (tmp_path / "go").touch()
    hand.end(0)
    assert counts(server, run) == (0, 0, 2, 0)


def test_a_server_that_is_killed_and_comes_back_costs_nothing(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 60)
    hand = Hand(server, run, "-j", "2", "--", "sh", "-c", "echo x >> %s/ran-{task}; sleep 0.02" % tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("ran-*"))) > 10)
    server.process.kill()
    server.process.wait()
    ran = len(list(tmp_path.glob("ran-*")))
    wait_until(lambda: "is the server running" in hand.said())
    again = Process(str(tmp_path / "f"), home=server.home)
    assert again.port != server.port, "the access file tells where it is now"
    hand.end(0)
    assert counts(again, run) == (0, 0, 60, 0) and ran < 60
    assert all(path.read_text() == "x\n" for path in tmp_path.glob("ran-*"))
    assert again.end(signal.SIGTERM) == 0


def test_lost_answers_cost_a_worker_nothing(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 400)
    relay, generator = Flaky(server.port), random.Random(1)
    relay.swallow = lambda: generator.random() < 0.3
    hand = Hand(server, run, "-j", "4", "--quiet", "--", "sh", "-c", "echo x >> %s/ran-{task}" % tmp_path,
                tweak="taskfarm.FLUSH_S = 0.01; taskfarm.AHEAD_S = 0.05; taskfarm.PAUSES_S = (0.01, 0.02)",
                TASKFARM_URL=relay.url)
    hand.end(0)
    relay.close()
    assert relay.lost > 5
    assert counts(server, run) == (0, 0, 400, 0)
    assert all(path.read_text() == "x\n" for path in tmp_path.glob("ran-*"))
    assert {task_of(server, run, number)["attempt"] for number in range(400)} == {1}


def test_a_worker_stays_with_its_farm_when_another_gets_the_access_file(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 40)
    hand = Hand(server, run, "-j", "2", "--quiet", "--", "sh", "-c", "echo x >> %s/ran-{task}; sleep 0.02; %s %s "
                "progress 50" % (tmp_path, sys.executable, MODULE))
    wait_until(lambda: list(tmp_path.glob("ran-*")))
    server.process.kill()
    server.process.wait()
    other = Process(str(tmp_path / "other"), home=server.home)
    wait_until(lambda: "is the server running" in hand.said())
    again = Process(str(tmp_path / "f"), home=server.home)
    again.token = server.token      # the file is the other's
    hand.end(0)
    assert counts(again, run) == (0, 0, 40, 0)
    assert all(path.read_text() == "x\n" for path in tmp_path.glob("ran-*"))
    other.process.kill()
    other.process.wait()
    assert again.end(signal.SIGTERM) == 0


def test_a_claim_is_the_same_one_however_often_it_is_tried(farm: Live) -> None:
    relay, swallow = Flaky(farm.port), [True] * 3
    relay.swallow = lambda: b"/tasks" in relay.seen[-1] and bool(swallow) and swallow.pop()
    run = new_run(farm, 20)
    client = taskfarm.Client(lambda: access_of(farm, url=relay.url))        # without patience: each try is another
    courier = taskfarm.Courier(client, run, "w", lambda: None, False)
    courier.idle = False
    courier.thread.start()
    courier.want(5)
    assert wait_until(lambda: list(courier.news)) == [("claimed", [(number, 1) for number in range(5)])]
    assert counts(farm, run) == (15, 5, 0, 0) and relay.lost == 3
    courier.report(0, 1, status="computing")
    courier.report(0, 1, status="done")
    wait_until(lambda: counts(farm, run) == (15, 4, 1, 0))
    assert courier.close() == []
    client.close()
    relay.close()


def test_what_cannot_be_sent_is_left_for_the_next(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 40)
    hand = Hand(server, run, "-j", "2", "--", "sh", "-c", "touch %s/ran-{task}; sleep 0.05" % tmp_path)
    wait_until(lambda: counts(server, run)[2] > 4)
    server.process.kill()
    server.process.wait()
    wait_until(lambda: "is the server running" in hand.said())
    said = hand.end(7, signal.SIGTERM)
    (left,) = Path(server.home, ".local/state/taskfarm").iterdir()
    assert str(left) in said and stat.S_IMODE(left.stat().st_mode) == 0o600
    again = Process(str(tmp_path / "f"), home=server.home)
    before, reports = counts(again, run)[2], json.loads(left.read_text())["reports"]
    said = Hand(again, run, "-j", "2", "--", "touch", str(tmp_path) + "/ran-{task}").end(0)
    assert "%d reports" % len(reports) in said and not left.exists()
    assert before < 40 and any(report["status"] == "done" for report in reports)
    assert counts(again, run) == (0, 0, 40, 0)
    for report in reports:
        if report["status"] == "done":
            assert task_of(again, run, report["task"])["attempt"] == report["attempt"], "it was not done again"
    assert again.end(signal.SIGTERM) == 0


def test_a_run_that_is_deleted_ends_its_commands(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 10)
    (tmp_path / "pids").mkdir()
    hand = Hand(server, run, "-j", "2", "--grace", "0.1", "--", *stubborn(tmp_path / "pids"),
                tweak="taskfarm.BEAT_S = 0.05")
    wait_until(lambda: len(pids_in(tmp_path / "pids")) == 4)
    assert server.ask("DELETE", "/api/runs/" + run)[0] == 204
    assert "was deleted" in hand.end(4)
    assert not any(map(alive, pids_in(tmp_path / "pids")))


def test_a_task_that_was_taken_away_is_given_up(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 2)
    hand = Hand(server, run, "--grace", "0.1", "--", "sh", "-c", "touch %s/on-{task}-{attempt}; [ {attempt} = 2 ] || "
                "[ {task} = 1 ] || sleep 1000" % tmp_path, tweak="taskfarm.BEAT_S = 0.05")
    wait_until((tmp_path / "on-0-1").exists)
    assert server.ask("POST", "/api/runs/%s/restart?all=True" % run)[0] == 204
    said = hand.end(0)
    assert "task 0 is not ours any more" in said and (tmp_path / "on-0-2").exists()
    assert counts(server, run) == (0, 0, 2, 0)


@pytest.mark.parametrize("taken", [False, True])
def test_a_worker_that_was_asleep_for_longer_than_its_lease(server: Process, tmp_path: Path, taken: bool) -> None:
    run = new_run(server, 1)
    hand = Hand(server, run, "--grace", "0.1", "--", "sh", "-c", "until [ -e %s/go ]; do touch %s/on-{attempt}; "
                "sleep 0.01; done" % (tmp_path, tmp_path),
                tweak="taskfarm.LEASE_S, taskfarm.BEAT_S, taskfarm.MOMENT_S = 1, 0.2, 0.01")
    wait_until(lambda: task_of(server, run, 0)["started"])
    hand.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: counts(server, run) == (1, 0, 0, 0))
    assert task_of(server, run, 0)["losses"] == 1
    if taken:
        server.ask("POST", "/api/worker", {"uuid": "other", "hostname": "h", "pid": 1})
        assert server.ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": "other"})[1]["attempt"] == 2
    hand.process.send_signal(signal.SIGCONT)
    if taken:
        wait_until(lambda: "task 0 is not ours any more" in hand.said())
        hand.end(0)
        assert counts(server, run) == (0, 1, 0, 0), "the other one computes it"
    else:
        wait_until(lambda: counts(server, run) == (0, 1, 0, 0))
        (tmp_path / "go").touch()
        hand.end(0)
        task = task_of(server, run, 0)
        assert (task["status"], task["attempt"], task["losses"]) == ("done", 1, 0)


def test_a_worker_stays_while_tasks_may_come_back(server: Process) -> None:
    run = new_run(server, 2)
    other = {"uuid": "other", "hostname": "h", "pid": 1, "lease": 600}
    server.ask("POST", "/api/worker", other)
    assert server.ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": "other"})[1]["task"] == 0
    Hand(server, run, "--no-wait", "--", "true").end(0)
    assert counts(server, run) == (0, 1, 1, 0)
    hand = Hand(server, run, "--", "true")
    wait_until(lambda: "waiting for that" in hand.said())
    assert server.ask("DELETE", "/api/worker/other")[0] == 204
    hand.end(0)
    assert counts(server, run) == (0, 0, 2, 0)


def test_each_end_has_its_status(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 3)
    Hand(server, "0" * 32, "--", "true").end(4)
    Hand(server, run, "--", "true", TASKFARM_URL="http://127.0.0.1:%d" % server.port, TASKFARM_TOKEN="tf1.x").end(6)
    Hand(server, run, "--", "true", TASKFARM_URL="http://127.0.0.1:1", tweak="taskfarm.PATIENCE_S = 0.5").end(5)
    assert counts(server, run) == (3, 0, 0, 0)
    user = run_verb("user", "list", "--db", str(tmp_path / "f")).stdout.strip()
    assert run_verb("user", "passwd", user, "--db", str(tmp_path / "f"), stdin="sesame\n").returncode == 0
    Hand(server, run, "--", "true", TASKFARM_USER=user, TASKFARM_PASSWORD="sesame").end(0)
    server.token = json.loads(Path(server.home, ".config/taskfarm/access.json").read_text())["token"]
    assert counts(server, run) == (0, 0, 3, 0)


def test_a_worker_leaves_before_its_job_ends(server: Process) -> None:
    run = new_run(server, 50)
    end, soon = str(int(time.time()) + 5), "taskfarm.LEAVE_S = 0.5"
    said = Hand(server, run, "-j", "2", "--grace", "1", "--", "sleep", "0.2", SLURM_JOB_END_TIME=end,
                SLURM_JOB_ID="1", tweak=soon).end(7)
    assert "fit" in said or "the job ends" in said
    waiting, computing, done, failed = counts(server, run)
    assert computing == failed == 0 < done
    Hand(server, run, "--until", "+60", "--task-time", "100", "--", "true").end(7)
    assert counts(server, run) == (waiting, 0, done, 0)
    said = Hand(server, run, "--until", "+2", "--grace", "0.5", "--", "sleep", "1000", tweak=soon).end(7)
    assert "the job ends soon" in said and counts(server, run) == (waiting, 0, done, 0)


def test_the_end_of_a_job_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path) + ":" + os.environ["PATH"])
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        def program(name: str, text: str) -> None:
            (tmp_path / name).write_text("#!/bin/sh\n%s\n" % text)
            (tmp_path / name).chmod(0o755)

        def end(**environ: str) -> Optional[float]:
            return taskfarm.job_end(environ, 1000.0)

        assert end() is None and end(SLURM_JOB_END_TIME="1800000000") == 1800000000
        program("squeue", 'echo "$@" > %s/asked; echo 2026-11-23T19:59:03' % tmp_path)
        local = 1795431543.0        # 2026-11-23T10:59:03Z
        assert end(SLURM_JOB_ID="7") == local
        assert end(SLURM_JOB_ID="7", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3") == local
        assert "-j 7_3 " in (tmp_path / "asked").read_text()
        program("squeue", "exit 1")
        program("scontrol", "echo '   StartTime=2026-11-23T18:00:00 EndTime=2026-11-23T19:59:03 Deadline=N/A'")
        assert end(SLURM_JOB_ID="7") == local
        program("scontrol", "echo EndTime=Unknown")
        assert end(SLURM_JOB_ID="7") is None
        for text, expected in (
                ("    Resource_List.walltime = 02:00:00\n    stime = Mon Nov 23 17:59:03 2026\n    etime = x\n", local),
                ("    Resource_List.walltime = 02:00:00\n    start_time = Mon Nov 23 17:59:03 2026\n", local),
                ("    resources_used.walltime = 00:30:00\n    Resource_List.walltime = 02:00:00\n", 1000 + 5400.0),
                ("    Resource_List.ncpus = 2\n", None), ("", None)):
            program("qstat", "cat <<'END'\nJob Id: 1.host\n%sEND" % text)
            assert end(PBS_JOBID="1.host") == expected
        now = local - 3600
        for text, moment in (("+90", now + 90), ("19:59", local - 3), ("18:59", local - 3603 + 86400),
                             ("2026-11-23T19:59:03", local), ("2026-11-23T10:59:03Z", local)):
            assert taskfarm.moment_of(text, now) == moment
        for text in ("25:00", "tomorrow", "+x", ""):
            with pytest.raises(ValueError):
                taskfarm.moment_of(text, now)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_short_tasks_are_claimed_and_reported_together(tmp_path: Path) -> None:
    log = tmp_path / "log"
    logged = Process(str(tmp_path / "g"), "--access-log", str(log))
    run = new_run(logged, 1500)
    Hand(logged, run, "-j", "4", "--quiet", "--", "true").end(0)
    assert counts(logged, run) == (0, 0, 1500, 0)
    assert len(log.read_text().splitlines()) < 300, "requests for 1500 tasks"
    assert logged.end(signal.SIGTERM) == 0


@pytest.mark.parametrize("mean_s, finished, longest_s, ahead", [
    (None, 0, 0, 0),            # nothing is known yet
    (0.01, 10, 0, 20),          # it begins with few, and doubles
    (0.01, 10 ** 6, 0, 2400),   # 16 at a time for 1.5 s
    (0.0001, 10 ** 6, 0, taskfarm.AHEAD_LIMIT),
    (1.0, 10 ** 6, 0, 24), (60.0, 10 ** 6, 0, 0),
    (0.01, 10 ** 6, 60.0, 0),   # they have become longer
])
def test_what_is_claimed_ahead_follows_what_tasks_take(mean_s: Optional[float], finished: int, longest_s: float,
                                                       ahead: int) -> None:
    orders = taskfarm.Orders(16, 1e9, 5.0, False, True, None, None, "", False)
    hand = taskfarm.Farmhand(taskfarm.Client(lambda: taskfarm.find_access({})), {"uuid": "x"},
                             taskfarm.Template(["true"], "x"), orders, taskfarm.Display(False, {}))
    hand.mean_s, hand.finished = mean_s, finished
    if longest_s:
        hand.running[1] = taskfarm.Command(0, 1, 0, 1000.0 - longest_s)
    assert hand._ahead(1000.0) == ahead


def test_what_was_claimed_ahead_and_cannot_be_started_is_given_back(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 200)
    hand = Hand(server, run, "--grace", "0.1", "--", "sh", "-c", "[ {task} -lt 20 ] || sleep 1000",
                tweak="taskfarm.UNUSED_S = 0.1")
    wait_until(lambda: counts(server, run)[:3] == (179, 1, 20))
    hand.end(7, signal.SIGTERM)
    assert counts(server, run) == (180, 0, 20, 0)


def test_a_terminal_shows_a_bar_below_the_lines(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 4)
    for environ, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        screen, inside = os.openpty()
        process = subprocess.Popen(
            [sys.executable, str(MODULE), "work", run, "--", "sh", "-c", "echo from the command; [ {task} != 2 ]"],
            stdin=subprocess.DEVNULL, stdout=inside, stderr=inside,
            env=dict(os.environ, HOME=server.home, TERM="xterm", COLUMNS="60", **environ))
        os.close(inside)
        shown = b""
        with contextlib.suppress(OSError):      # EIO at the end
            for part in iter(lambda: os.read(screen, 65536), b""):      # noqa: B023
                shown += part
        os.close(screen)
        assert process.wait(20) == 3
        text = shown.decode()
        assert "of 4" in text and "\r[" in text and text.count("from the command\r\n") == 4
        assert ("\x1b[31mtask 2 failed" in text) is coloured and "\r\ntask 1 done in" in text.replace("\x1b[K", "\r\n")
        assert all(len(line) < 60 for line in re.findall(r"\r(\[[^\x1b]*)\x1b\[K", text))
        assert text.endswith("0 computing\r\n"), "the bar is gone at the end"
        server.ask("POST", "/api/runs/%s/restart?all=True" % run)


# ---------------------------------------------------------------- COMMAND LINE

def test_bench_measures_and_counts(tmp_path: Path) -> None:
    done = run_verb("bench", "--profile", "constant,lean,paper,flat", "--clients", "3", "--seconds", "0.2", "--rows",
                    "3000", "--json", "--dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    *points, flat = json.loads(done.stdout)
    assert [point["profile"] for point in points] == ["constant", "lean", "paper"]
    assert all(point["twice"] == point["never"] == 0 for point in points)
    assert all(point["requests_per_s"] > 0 for point in points) and set(points[1]["ms"]) == {"claim", "done"}
    assert set(flat["ratio"]) == set(taskfarm.FLAT)
    killed = subprocess.Popen([sys.executable, str(MODULE), "bench", "--seconds", "60", "--dir", str(tmp_path)])
    wait_until(lambda: list(tmp_path.glob("*/farm.sqlite.lock")))
    killed.terminate()
    assert killed.wait(20) == 143
    wait_until(lambda: not list(tmp_path.iterdir()))
    shown = run_verb("bench", "--profile", "lean", "--clients", "2", "--seconds", "0.1", "--dir", str(tmp_path))
    assert shown.returncode == 0 and "\nprofile " in shown.stdout and shown.stdout.count("\n") == 4
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def run_verb(*words: str, stdin: str = "", **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, str(MODULE), *words], input=stdin, capture_output=True, text=True,
                          env=dict(os.environ, **environ), timeout=60)


def test_a_start_prints_one_line_and_writes_the_access_file(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        server = Process(str(tmp_path / "f"))
    finally:
        os.umask(old)
    assert re.fullmatch(r"taskfarm [0-9.]+ serves \S+ at http://127\.0\.0\.1:[0-9]+\n", server.line)
    access = Path(server.home, ".config/taskfarm/access.json")
    content = json.loads(access.read_text())
    assert set(content) == {"url", "user", "token", "farm", "proof"}
    assert content["url"] == server.line.split()[-1]
    assert server.ask("GET", "/api/runs")[0] == 200
    for proof, answers in ((content["proof"], True), ("00", False), ("", False)):
        assert taskfarm.still_answers(taskfarm.as_access(dict(content, proof=proof), "")) is answers
    for path in [access, *(tmp_path / name for name in ("f", "f-wal", "f.lock"))]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert "password" not in server.log() + server.line, "it is shown on a terminal only"
    assert server.end(signal.SIGINT) == 0


def test_the_first_password_is_shown_on_a_terminal_and_works(tmp_path: Path) -> None:
    terminal, inside = os.openpty()
    process = subprocess.Popen([sys.executable, str(MODULE), "--db", str(tmp_path / "f"), "--port", "0"],
                               stdout=inside, stderr=subprocess.DEVNULL, env=dict(os.environ, HOME=str(tmp_path)))
    os.close(inside)
    with os.fdopen(terminal, "rb", buffering=0) as screen:
        shown = b""
        while shown.count(b"\n") < 2:
            shown += screen.read(1000)
        match = re.match(r"user (\S+), password (\S+)   \(shown this once.*:([0-9]+)\s", shown.decode(), re.S)
        assert match
        caller = Caller()
        caller.port = int(match[3])
        assert get_with(caller, basic(match[1], match[2]))[0] == 200
        process.terminate()
        assert process.wait(20) == 0


def test_a_second_server_on_the_same_file_or_port_gets_one_sentence(tmp_path: Path) -> None:
    server = Process(str(tmp_path / "f"))
    for words, sentence in (((str(tmp_path / "f"), "0"), "process %d on" % server.process.pid),
                            ((str(tmp_path / "g"), str(server.port)), "--port 0")):
        done = run_verb("--db", words[0], "--port", words[1])
        assert not (tmp_path / "g").exists(), "a refused start leaves no farm"
        assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1 and sentence in done.stderr
    assert server.ask("GET", "/api/runs")[0] == 200
    assert server.end(signal.SIGTERM) == 0


def test_a_second_farm_leaves_the_access_file_of_one_that_answers(farm: Live, tmp_path: Path) -> None:
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path)
    try:
        taskfarm.publish_access(farm.service.farm, farm.user("ada"), farm.url, farm.path)
        first = (tmp_path / "taskfarm/access.json").read_text()
        other = Live(str(tmp_path / "other.sqlite"))
        taskfarm.publish_access(other.service.farm, other.user("ada"), other.url, other.path)
        assert (tmp_path / "taskfarm/access.json").read_text() == first
        (beside,) = (tmp_path / "taskfarm").glob("access-other-*.json")
        assert json.loads(beside.read_text())["url"] == other.url
        farm.stop()
        taskfarm.publish_access(other.service.farm, other.user("ada"), other.url, other.path)
        assert json.loads((tmp_path / "taskfarm/access.json").read_text())["url"] == other.url
        other.close()
        farm.start()
    finally:
        del os.environ["XDG_CONFIG_HOME"]


@pytest.mark.parametrize("running", [False, True])
def test_users_are_kept_by_verbs_with_and_without_a_server(tmp_path: Path, running: bool) -> None:
    db = str(tmp_path / "f")
    if running:
        server = Process(db)
    else:
        Store(db).close()

    def user(*words: str, stdin: str = "") -> Tuple[int, List[str], str]:
        done = run_verb("user", *words, "--db", db, stdin=stdin)
        return done.returncode, done.stdout.split(), done.stderr

    first = user("list")[1]
    assert user("add", "jürgen", stdin="secret\n")[0] == 0
    assert user("add", "jürgen", stdin="secret\n")[2].count("already") == 1
    assert user("list")[1] == [*first, "jürgen"]
    for wrong in ("a:b", "tf1.x"):
        assert user("add", wrong, stdin="x\n")[0] == 1
    assert user("add", "empty", stdin="\n")[0] == 1
    if running:
        header = basic("jürgen", "secret")
        assert get_with(server, header)[0] == 200
        assert user("passwd", "jürgen", stdin="other\n")[0] == 0
        assert get_with(server, header)[0] == 401
        assert get_with(server, basic("jürgen", "other"))[0] == 200
    assert user("passwd", "nobody", stdin="x\n")[:2] == (1, [])
    assert user("remove", "jürgen")[0] == 0
    assert user("list")[1] == first
    assert user("remove", "jürgen")[0] == 1
    if running:
        assert server.end(signal.SIGTERM) == 0


def test_a_removed_user_is_out_at_once_and_passwd_renews_the_access_file(tmp_path: Path) -> None:
    db = str(tmp_path / "f")
    server = Process(db)
    name = run_verb("user", "list", "--db", db).stdout.strip()
    old = server.token
    assert run_verb("user", "passwd", name, "--db", db, stdin="new\n").returncode == 0
    assert server.ask("GET", "/api/runs")[0] == 401
    server.token = json.loads(Path(server.home, ".config/taskfarm/access.json").read_text())["token"]
    assert server.token != old and server.ask("GET", "/api/runs")[0] == 200
    assert run_verb("user", "remove", name, "--db", db).returncode == 0
    assert server.ask("GET", "/api/runs")[0] == 401
    assert run_verb("user", "add", name, "--db", db, stdin="newer\n").returncode == 0
    server.token = json.loads(Path(server.home, ".config/taskfarm/access.json").read_text())["token"]
    assert server.ask("GET", "/api/runs")[0] == 200
    assert server.end(signal.SIGTERM) == 0


@pytest.mark.parametrize("words, status, sentence", [
    (["--db", "/nowhere/at/all/f"], 1, "cannot be made"),
    (["--db", "{dir}"], 1, "is not a file"),
    (["--db", "{dir}/text"], 1, "not an SQLite file"),
    (["--db", "{dir}/f", "--host", "no.such.address.invalid", "--port", "0"], 1, "--host wants"),
    (["--db", "{dir}/f", "--port", "99999"], 2, "--port"),
    (["--db", "{dir}/f", "--access-log", "{dir}/no/log"], 1, "access log"),
    ([], 2, "--db runs.sqlite"),
    (["harvest"], 2, "invalid choice"),
    (["user", "list", "--db", "{dir}/missing"], 1, "there is no"),
    (["work", "antarctica"], 2, "which command?"),
    (["work", "antarctica", "--until", "later", "--", "true"], 2, "17:30"),
])
def test_a_wrong_start_gets_a_sentence(tmp_path: Path, words: List[str], status: int, sentence: str) -> None:
    (tmp_path / "text").write_text("some text\n" * 200)
    done = run_verb(*(word.replace("{dir}", str(tmp_path)) for word in words))
    assert done.returncode == status and sentence in done.stderr and "Traceback" not in done.stderr


def test_every_verb_has_a_help_with_an_example() -> None:
    for words in VERBS:
        done = run_verb(*words, "--help")
        assert done.returncode == 0 and "python3 taskfarm.py" in done.stdout, words
    assert run_verb("--version").stdout == "taskfarm %s\n" % taskfarm.__version__


def test_systemd_is_told_when_the_server_is_ready(tmp_path: Path) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(20)
        os.environ["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        try:
            server = Process(str(tmp_path / "f"))
        finally:
            del os.environ["NOTIFY_SOCKET"]
        assert sock.recv(1000).startswith(b"READY=1\n")
        assert server.end(signal.SIGTERM) == 0
        assert sock.recv(1000) == b"STOPPING=1"


def test_the_first_commands_of_the_readme_run_as_printed(tmp_path: Path) -> None:
    text = (HERE / "README.md").read_text()
    blocks = re.findall(r"```sh tour\n(.*?)```", text, re.S)
    assert blocks
    shutil.copy(str(MODULE), str(tmp_path))
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = "set -e\ntrap 'kill $!' EXIT\n" + "".join(blocks).replace("5000", port).replace("python3", sys.executable)
    assert shutil.which("curl"), "the tour wants curl"
    process = subprocess.Popen(["bash", "-c", script], cwd=str(tmp_path), stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.STDOUT, start_new_session=True,
                               env=dict(os.environ, HOME=str(tmp_path), TASKFARM_PORT=port))
    try:
        output, _ = process.communicate(timeout=100)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    assert '"numDone":3' in output and '"percentDone":100.0' in output
