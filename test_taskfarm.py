"""Tests of taskfarm.py, in its order. Run them with the command in README.md, or `pytest` where the extra `test` is.

    Helpers             a farm on port 0 in a temporary directory, one line to call it, a plain model of it
    Contract            documentation, layers and the standard-library rule hold
    Rules               what may become of a task, by itself (hypothesis)
    Store               the model against the store (hypothesis), statements over many tasks against the rules, memory
                        after a rollback, large runs in slices, files that are refused
    Login               passwords, tokens, what is remembered and what is revoked
    HTTP                refusals as a table, what is one request and what the next, bodies in slices
    Server              raw sockets: turns, pipelines, resets, silence, buffers, the access log
    API                 the model against the live server (hypothesis), many at once, the published client
    Crash               kill -9 under load, a disk that is full, descriptors that run out
    Client              logins that go to the right farm, patience, lost answers, the published client's scripts
    Commands            real commands: what they are given, how they fail, what ends them when the worker is killed
    Reporter            lost answers, a server that goes and comes, tasks that were taken away
    Worker              signals, the end of the job, what is given back, a terminal
    Batch systems       the end of a job, as Slurm and PBS tell it, and what was forgotten at its start
    Submit              what Slurm and PBS are asked and what they answer, with stand-ins; a real Slurm: .ci/slurm
    Terminal            tables that fit, bars, rates with their range
    Doctor              what it finds fit, and what not
    Command line        start, stop, users, access file, README as printed

No test sleeps, asks for rights or looks at a clock to judge (but that a real lease did not end before its time).
`QUICK=1` in the environment leaves out what needs the published client and lowers the number of examples; CI runs
that part on other Pythons: the oldest, 3.10 and the newest.
"""
import ast
import base64
import contextlib
import csv
import decimal
import errno
import fcntl
import fnmatch
import functools
import hashlib
import heapq
import http.client
import io
import ipaddress
import itertools
import json
import math
import os
import pickle
import pwd
import random
import re
import resource
import select
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import types
import urllib.parse
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

import taskfarm
from taskfarm import (
    Farm, FarmError, Limits, Now, Operation, Refusal, Report, Service, Store, Task, User, is_complete, is_held)

MODULE = Path(taskfarm.__file__)
HERE = MODULE.parent
QUICK = bool(os.environ.get("QUICK"))
Answer = Tuple[int, Any]


# ---------------------------------------------------------------- HELPERS

class FakeClock:
    """A clock that stands still, or moves by *step_s* whenever it is read."""

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
        self.user: Optional[User] = User(1, "ada", "", 1)       # who asks; None: administration
        self.start()

    def start(self) -> None:
        self.store = Store(self.path, self.clock)
        self.farm = Farm(self.store, "the secret")

    def restart_server(self) -> None:
        self.store.close()
        self.start()

    def ask(self, method: str, path: str, body: Any = None, key: str = "") -> Answer:
        """One request. *key*: its Idempotency-Key. The Retry-After of the answer is kept in retry_after."""
        request = taskfarm.Request.__new__(taskfarm.Request)
        request.farm, request.method, request.target, request.key = self.farm, method, path, key
        request.login = taskfarm.Login(self.user, 0.0)
        self.retry_after: Optional[str] = None
        try:
            by_method, request.variables = taskfarm.ROUTES.find(path.partition("?")[0])
            route = by_method[method]
            text = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
            request.fields, request.query = taskfarm.read_body(route, text), taskfarm.read_query(route, path)
            answer = route.handler(request, *request.variables)
            if isinstance(answer, Operation):
                assert answer.show
                answer.caller = self.farm.caller(request.login, "192.0.2.1")
                answer = answer.show(self.store.call(answer), *answer.extra)
        except FarmError as error:
            return error.status, None
        self.retry_after = dict(answer.headers).get("Retry-After")
        return answer.status, json.loads(answer.body) if answer.body else None

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and let happen what depends on it."""
        assert isinstance(self.clock, FakeClock)
        for more in (seconds, 1.5 * taskfarm.RETRY_S if seconds > 50 and self.store.sweeps else 0):
            self.clock.pass_time(more)      # what has to wait for a restart is tried again
            for _ in range(20):     # in slices
                self.store.turn()

    def settle(self) -> None:
        """Let the rows of restarts and deletions follow."""
        while self.store.sweeps:
            self.store.turn()

    def wrong(self) -> List[str]:
        return list(self.store.call(taskfarm.check()))

    def close(self) -> None:
        assert self.wrong() == []
        self.store.close()


class Caller:
    """A client of a server on a port, with a token, or the secret of the lock file."""
    port: int
    token: str

    def __init__(self) -> None:
        self.local = threading.local()

    def ask(self, method: str, path: str, body: Any = None, key: str = "") -> Answer:
        """One request on this thread's connection. The Retry-After of the answer is kept in retry_after."""
        if not hasattr(self.local, "connection"):
            self.local.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = {"Authorization": self.authorization}
        if key:
            headers["Idempotency-Key"] = key
        if body is not None:
            headers["Content-Type"] = "application/json"
            body = body if isinstance(body, bytes) else json.dumps(body)
        self.local.connection.request(method, path, body, headers)
        response = self.local.connection.getresponse()
        content = response.read()
        self.local.retry_after = response.headers["Retry-After"]
        return response.status, json.loads(content) if content and "json" in response.headers["Content-Type"] else None

    @property
    def authorization(self) -> str:
        return basic(self.token, "") if self.token.startswith(taskfarm.TOKEN_MARK) else "Bearer " + self.token

    @property
    def retry_after(self) -> Optional[str]:
        """The Retry-After of this thread's last answer."""
        return self.local.retry_after

    def raw(self, data: bytes, ended: bool = False, context: Optional[ssl.SSLContext] = None,
            source: str = "127.0.0.1") -> "Raw":
        return Raw(self.port, data, ended, context, source)


class Live(Caller):
    """A farm that is served on port 0 from a thread, with a user ada whose password is "enchantress"."""
    PASSWORD = "enchantress"

    def __init__(self, path: str, clock: Callable[[], Now] = taskfarm.system_clock, private: bool = False) -> None:
        super().__init__()
        self.path, self.clock, self.private = path, clock, private
        self.start()

    def start(self) -> None:
        self.service = Service(self.path, "127.0.0.1", 0, clock=self.clock, private=self.private)
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

    def pass_time(self, seconds: float) -> None:
        """Let time pass. The writer reads the clock after a request, so the second request sees what happened."""
        assert isinstance(self.clock, FakeClock)
        for more in (seconds, 1.5 * taskfarm.RETRY_S if seconds > 50 else 0):
            self.clock.pass_time(more)      # what has to wait for a restart is tried again
            for _ in range(2):
                assert self.ask("GET", "/readyz")[0] == 200

    def settle(self) -> None:
        """Let the rows of restarts and deletions follow."""
        wait_until(lambda: not self.service.store.sweeps)

    def wrong(self) -> List[str]:
        return list(self.service.store.call(taskfarm.check()))


class Stepped(Caller):
    """A farm whose I/O thread is the test: it serves when told to `turn`. Each look at its clock moves that."""

    def __init__(self, path: str, step_s: float = 0.0) -> None:
        super().__init__()
        self.service = Service(path, "127.0.0.1", 0)
        self.server = self.service.server
        self.port = self.server.server_port
        self.service.store.call(taskfarm.add_user("ada", ADAS_HASH))
        self.token = self.service.farm.token(self.service.store.users["ada"], 0)
        self.service.farm.admit(self.service.farm.who(b"Bearer " + self.token.encode()), "127.0.0.1")   # noted
        self.clock = FakeClock(step_s)
        self.server.clock = self.clock
        self.server.selector.register(self.server.socket, selectors.EVENT_READ, self.server.accept)
        self.server.selector.register(self.server.wake_read, selectors.EVENT_READ, self.server._on_wake)

    def turn(self, number: int = 1) -> None:
        for _ in range(number):
            self.server.turn(0.0)

    def turn_until(self, what: Callable[[], Any]) -> Any:
        return wait_until(lambda: self.turn() or what())    # type: ignore[func-returns-value]

    def new(self, data: bytes, number: int = 1) -> Any:
        """Connections that were accepted, and have sent something that was not read yet."""
        raws = []
        for _ in range(number):
            before = set(self.server.connections)
            raw = self.raw(b"")
            self.turn_until(lambda before=before: self.server.connections - before)     # type: ignore[misc]
            (raw.served,) = self.server.connections - before
            raws.append(raw)
        for raw in raws:
            raw.sock.sendall(data)
        return raws if number > 1 else raws[0]

    def login(self) -> Dict[str, str]:
        return {"Authorization": basic(self.token, "")}

    def close(self) -> None:
        for connection in list(self.server.connections):
            self.server.close_connection(connection)
        self.service.close()


@pytest.fixture
def stepped(tmp_path: Path) -> Iterator[Stepped]:
    live = Stepped(str(tmp_path / "farm.sqlite"), step_s=taskfarm.TURN_S / 10)
    yield live
    live.close()


class Raw:
    """A socket that has sent some bytes; with a *context* under TLS."""

    def __init__(self, port: int, data: bytes, ended: bool = False, context: Optional[ssl.SSLContext] = None,
                 source: str = "127.0.0.1") -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=20, source_address=(source, 0))
        if context is not None:
            self.sock = context.wrap_socket(self.sock, suppress_ragged_eofs=False)
        if data:
            self.sock.sendall(data)
        if ended:
            socket.socket.shutdown(self.sock, socket.SHUT_WR)      # that of an SSLSocket reads on without TLS
        self.file = self.sock.makefile("rb")
        self.served: Any = None     # the server's end, where a test has it

    def answer(self, head_only: bool = False) -> Tuple[int, Dict[str, str], bytes]:
        """Status, headers and body of the next answer; status 0 when the connection has ended."""
        line = self.file.readline()
        if not line:
            return 0, {}, b""
        headers = {}
        for field in iter(self.file.readline, b"\r\n"):
            name, _, value = field.decode().partition(": ")
            headers[name.lower()] = value.rstrip()
        if head_only or "transfer-encoding" not in headers:
            length = 0 if head_only else int(headers.get("content-length", 0))
            return int(line.split()[1]), headers, self.file.read(length)
        body = b""
        for size in iter(lambda: int(self.file.readline() or b"0", 16), 0):
            body += self.file.read(size)
            assert self.file.readline() == b"\r\n"
        assert self.file.readline() == b"\r\n", "an answer that was broken off"
        return int(line.split()[1]), headers, body

    def close(self) -> None:
        self.file.close()
        self.sock.close()


def basic(user: str, password: str, encoding: str = "utf-8") -> str:
    return "Basic " + base64.b64encode(("%s:%s" % (user, password)).encode(encoding)).decode()


def request_bytes(method: str, path: str, body: Any = b"", **headers: str) -> bytes:
    """A request as bytes; header names have _ for -."""
    lines = ["%s %s HTTP/1.1" % (method, path), "Host: localhost"]
    lines += ["%s: %s" % (name.replace("_", "-"), value) for name, value in headers.items()]
    if body:
        lines += ["Content-Length: %d" % len(body), "Content-Type: application/json"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def wait_until(what: Callable[[], Any], limit_s: float = 20.0) -> Any:
    """Ask again until the answer is true, and return it. A failure shows the last answer."""
    end = time.monotonic() + limit_s
    while True:
        seen = what()
        if seen:
            return seen
        assert time.monotonic() < end, "still %r" % (seen,)
        threading.Event().wait(0.01)


def in_threads(number: int, work: Callable[[int], Any]) -> List[Any]:
    """The results of *work* in so many threads at once. Raises the first error."""
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
    """What tests write to a home directory goes to a temporary one."""
    folder = str(tmp_path_factory.mktemp("home"))
    kept = {name: os.environ.pop(name, None) for name in list(os.environ)
            if name.startswith(("TASKFARM_", "XDG_")) or name in ("COLUMNS", "LINES")}      # pytest -n sets these
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


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file of this process grows beyond *room* bytes: the system refuses that as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def begin_on_a_full_disk(room: int) -> Callable[[], None]:
    """What a process calls at its start to be on a full disk, until the test calls make_room."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))


def make_room(pid: int) -> None:
    """End the full disk of a process."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


RUNNING: List["subprocess.Popen[str]"] = []     # servers and workers of the present test


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    """A test that fails leaves no process behind."""
    yield
    for process in RUNNING:
        if process.poll() is None:
            process.kill()
            process.wait()
    RUNNING.clear()


ADAS_HASH = taskfarm.hash_password(Live.PASSWORD)


# The model: a farm in plain dicts, with which the store and the live server are compared.

FULL = 100000000        # 100 percent, as the model keeps it
UNKNOWN = "?"           # in the model: the contract leaves open what a field shows
FRESH: Dict[str, Any] = {
    "status": "waiting", "millionths": 0, "attempt": 0, "worker": None, "failures": 0, "losses": 0, "exitCode": None,
    "message": None, "memory": None, "cpu": None, "log": None, "started": False, "finished": False,
    "hold": "",             # or "active"; lapsed: "expired", "signed off", "restarted"
    "begun": False,         # the attempt was started: by a single claim, or by a report of who holds it
    "lost": False,          # the lapse counted a loss
}


class Model:
    """What a farm does by the contract, as simply as possible."""

    def __init__(self) -> None:
        self.runs: Dict[str, Dict[str, Any]] = {}       # by uuid, in order of creation
        self.workers: Dict[str, Dict[str, Any]] = {}
        self.task_ids: Dict[int, Tuple[str, int]] = {}
        self.now = 0.0

    def add_run(self, run: Dict[str, Any], name: Optional[str] = None, most_failures: int = 1,
                most_losses: int = 5, work: Optional[Dict[str, Any]] = None) -> None:
        assert run["uuid"] not in self.runs
        assert re.fullmatch("[0-9a-f]{32}", run["uuid"])
        self.runs[run["uuid"]] = {"id": run["id"], "n": run["numTasks"], "tasks": {}, "name": name, "reported": False,
                                  "failures": most_failures, "losses": most_losses, "work": work,
                                  "state": "open", "after": run["after"], "any": run["afterAny"]}

    def task(self, run: str, number: int) -> Dict[str, Any]:
        """A copy of a task. `touch` gives the task itself, to be changed."""
        return dict(self.runs[run]["tasks"].get(number, FRESH))

    def touch(self, run: str, number: int) -> Dict[str, Any]:
        return self.runs[run]["tasks"].setdefault(number, dict(FRESH, ends={}))

    def held(self, worker: str, *holds: str) -> List[Tuple[str, int]]:
        """What the worker holds, or held until its hold lapsed in one of these ways."""
        return [(run, number) for run, entry in self.runs.items() for number, task in sorted(entry["tasks"].items())
                if task["worker"] == worker and task["hold"] in (holds or ("active",))]

    def run_json(self, run: str) -> Dict[str, Any]:
        entry = self.runs[run]
        states = [(task["status"], task["millionths"]) for task in entry["tasks"].values()]
        counts = {state: sum(1 for status, _ in states if status == state)
                  for state in ("waiting", "computing", "done", "failed")}
        counts["waiting"] += entry["n"] - len(states)
        return {"id": entry["id"], "uuid": run, "numTasks": entry["n"],
                "percentDone": sum(millionths for _, millionths in states) / (entry["n"] * 1000000),
                "numWaiting": counts["waiting"], "numComputing": counts["computing"],
                "numDone": counts["done"], "numFailed": counts["failed"], "name": entry["name"],
                "maxFailures": entry["failures"], "maxLosses": entry["losses"], "user": "ada",
                "state": entry["state"], "after": entry["after"], "afterAny": entry["any"],
                "hasWork": entry["work"] is not None}

    def task_json(self, run: str, number: int) -> Dict[str, Any]:
        """A task as it is shown, without its id. Instead of times: whether there is one."""
        task = self.task(run, number)
        worker = self.workers.get(task["worker"])
        return {"task": number, "status": task["status"], "percentCompleted": task["millionths"] / 1000000,
                "hostname": worker and worker["hostname"],
                **{name: task[name] for name in ("attempt", "worker", "failures", "losses", "exitCode", "message",
                                                 "memory", "cpu", "log", "started", "finished")}}

    def renew_lease(self, worker: Optional[str]) -> None:
        """Renew the worker's lease: a request named it, or a task was taken back for it."""
        if worker in self.workers:
            self.workers[worker].update(heard=self.now, expired=False)

    def note_taken(self, task: Dict[str, Any]) -> None:
        """A task is taken from its holder, if it has one: the revision of that worker must rise."""
        if task["hold"] == "active":
            self.workers[task["worker"]]["taken"] = True

    def has_running_lease(self, worker: str) -> bool:
        """Whether the worker has a lease that is running."""
        entry = self.workers[worker]
        return entry["lease"] is not None and not entry["expired"] and not entry["signed off"]

    def pass_time(self, seconds: float) -> None:
        """Time passes, and leases run out."""
        self.now += seconds
        for name, worker in self.workers.items():
            if self.has_running_lease(name) and self.now - worker["heard"] > worker["lease"]:
                worker["expired"] = True
                for run, number in self.held(name):
                    self.lapse(run, number, "expired")

    def lapse(self, run: str, number: int, how: str) -> None:
        task, most = self.touch(run, number), self.runs[run]["losses"]
        self.note_taken(task)
        task.update(hold=how, status="waiting", lost=how == "expired" and task["begun"])
        task["losses"] += task["lost"]
        if task["lost"] and 0 < most <= task["losses"]:
            task.update(status="failed", finished=True)

    def take_back(self, task: Dict[str, Any]) -> None:
        if task["status"] == "failed":
            task["finished"] = UNKNOWN
        task["losses"] -= task["lost"]
        task.update(hold="active", status="computing", lost=False)

    def claim_refusal(self, worker: str, run: str) -> int:
        """The status with which a claim is refused, or 0."""
        self.renew_lease(worker)
        if worker not in self.workers or run not in self.runs:
            return 404
        return 409 if self.workers[worker]["signed off"] else 0

    def withheld(self, run: str) -> str:
        """Why a run hands out nothing though tasks wait: "for now", "for good", or "" if it does hand out some."""
        entry = self.runs[run]
        if not self.run_json(run)["numWaiting"]:
            return ""
        if entry["state"] != "open":
            return "for now" if entry["state"] == "paused" else "for good"
        if entry["after"] is None:
            return ""
        if entry["after"] not in self.runs:
            return "" if entry["any"] else "for good"
        first = self.run_json(entry["after"])
        if first["state"] != "cancelled" and first["numWaiting"] + first["numComputing"]:
            return "for now"
        return "" if entry["any"] or first["numDone"] == first["numTasks"] else "for good"

    def assign(self, run: str, worker: str, count: int, begun: bool, only: Optional[int] = None) -> List[int]:
        """Give the lowest tasks that wait to the worker, or only that one."""
        given: List[int] = []
        if self.withheld(run) or not self.run_json(run)["numWaiting"]:
            return given
        self.runs[run].update(after=None, any=False)
        lowest = range(min(self.runs[run]["n"], len(self.runs[run]["tasks"]) + count))
        for number in lowest if only is None else [only]:
            if len(given) < count and self.task(run, number)["status"] == "waiting":
                given.append(number)
                task = self.touch(run, number)
                task.update(status="computing", attempt=task["attempt"] + 1, worker=worker, hold="active", begun=begun,
                            lost=False, started=begun, finished=False)
        return given

    def claim(self, run: str, worker: str, number: Optional[int] = None) -> Answer:
        status = self.claim_refusal(worker, run)
        if status:
            return status, None
        if number is not None and number >= self.runs[run]["n"]:
            return 404, None
        if number is not None and self.task(run, number)["status"] != "waiting":
            return 409, None
        given = self.assign(run, worker, 1, True, number)
        return (201, self.task_json(run, given[0])) if given else (204, None)

    def claim_batch(self, run: str, worker: str, count: int) -> Answer:
        status = self.claim_refusal(worker, run)
        if status:
            return status, None
        given = self.assign(run, worker, count, False)
        return (201, {"data": [{name: self.task_json(run, number)[name] for name in (
            "task", "attempt", "percentCompleted")} for number in given]}) if given else (204, None)

    def may_come_back(self, run: str) -> bool:
        """Whether the 204 of a claim says when to ask again."""
        if self.withheld(run):
            return self.withheld(run) == "for now"
        return any(task["hold"] == "active" and self.has_running_lease(task["worker"])
                   for task in self.runs[run]["tasks"].values())

    def report(self, run: str, number: int, body: Dict[str, Any]) -> Answer:
        self.renew_lease(body.get("worker_uuid"))
        if run not in self.runs or not 0 <= number < self.runs[run]["n"]:
            return 404, None
        return self.apply_report(run, number, body), None

    def report_batch(self, run: str, worker: Optional[str], entries: List[Dict[str, Any]]) -> Answer:
        """The answer. Of entries that are refused, only the numbers of their tasks."""
        self.renew_lease(worker)
        if run not in self.runs:
            return 404, None
        if not all(0 <= entry["task"] < self.runs[run]["n"] for entry in entries):
            return 400, None
        name = {} if worker is None else {"worker_uuid": worker}
        refused = [entry["task"] for entry in entries
                   if self.apply_report(run, entry["task"], dict(entry, **name)) != 204]
        return 200, {"accepted": len(entries) - len(refused), "refused": sorted(refused)}

    def apply_report(self, run: str, number: int, body: Dict[str, Any]) -> int:
        """Accept one report and apply it, or refuse it: 204 or 409."""
        worker, attempt, status = body.get("worker_uuid"), body.get("attempt"), body.get("status")
        task = self.task(run, number)
        if worker is None and attempt is None:
            self.note_taken(task)
            self.touch(run, number)["hold"] = ""
            self.set_fields(run, number, body, False)
            return 204
        present = worker in (None, task["worker"]) and attempt in (None, task["attempt"])
        if worker is not None and worker not in self.workers:
            return 409
        if present and task["hold"]:
            task = self.touch(run, number)
            if task["hold"] != "active":
                if self.workers[task["worker"]]["signed off"] and status not in ("done", "failed"):
                    return 409
                self.take_back(task)
                if status not in ("done", "failed"):
                    self.renew_lease(task["worker"])      # also if the attempt alone was named: it can be lost again
            self.set_fields(run, number, body, True)
            return 204
        ended = task.get("ends", {}).get(task["attempt"] if attempt is None else attempt, (None, None))
        if ended[0] is not None and (present or worker == ended[0] and attempt is not None):
            return 204 if status in (None, "computing", ended[1]) else 409
        return 409

    def set_fields(self, run: str, number: int, body: Dict[str, Any], by_holder: bool) -> None:
        """Set the fields that a report names."""
        self.runs[run]["reported"] = True
        task, most = self.touch(run, number), self.runs[run]["failures"]
        status = body.get("status")
        if status == "done":
            task["millionths"] = FULL
        if "percentCompleted" in body:
            exact = decimal.Decimal(repr(body["percentCompleted"])) * 1000000
            task["millionths"] = int(exact.to_integral_value(decimal.ROUND_FLOOR))
        if by_holder and status in (None, "computing"):
            task.update(status="computing", begun=True, started=True)
            return
        if by_holder:
            task.update(hold="")
            task["ends"][task["attempt"]] = (task["worker"], status)
        if not task["started"]:
            task["started"] = UNKNOWN
        if status in ("done", "failed"):
            task.update({name: body.get(name) for name in ("exitCode", "message", "memory", "cpu", "log")},
                        status=status, finished=True)
        if status == "failed":
            task["failures"] += 1
            task["status"] = "failed" if 0 < most <= task["failures"] else "waiting"
        elif status in ("waiting", "computing"):
            task["status"] = status
            task["finished"] = task["finished"] and UNKNOWN

    def selects(self, body: Dict[str, Any], number: int, task: Dict[str, Any]) -> bool:
        """Whether a restart with this body is meant for a task."""
        message = " ".join((task["message"] or "").split())
        return any(first <= number <= last for first, last in body.get("tasks", [(number, number)])) and (
            task["status"] == "failed" or not {"exitCode", "like"} & set(body)) and (
            task["exitCode"] == body.get("exitCode", task["exitCode"])) and (
            "like" not in body or fnmatch.fnmatchcase(message, "*%s*" % body["like"]))

    def restart(self, run: str, everything: Any, body: Optional[Dict[str, Any]] = None) -> Answer:
        """*everything*: True, False, or "failed" for the failed ones alone. How many it restarts is left open."""
        if run not in self.runs:
            return 404, None
        if any(last >= self.runs[run]["n"] for _, last in (body or {}).get("tasks", [])):
            return 400, None
        if self.runs[run]["state"] == "cancelled":
            self.runs[run]["state"] = "open"
        for number, task in self.runs[run]["tasks"].items():
            if not self.selects(body or {}, number, task):
                continue
            if everything is True:
                self.note_taken(task)
                task.update(status="waiting", millionths=0, failures=0, losses=0, exitCode=None, message=None, hold="",
                            memory=None, cpu=None, log=None, lost=False, finished=False,
                            started=task["started"] and UNKNOWN)
            elif everything == "failed" and task["status"] != "failed":
                continue
            elif task["hold"] == "active" and self.has_running_lease(task["worker"]):
                continue
            elif (task["status"], task["millionths"]) != ("done", FULL):
                if task["hold"] == "active":
                    self.lapse(run, number, "restarted")
                task.update(status="waiting", failures=0, losses=0, lost=False,
                            finished=task["finished"] and UNKNOWN)
        return 200 if body else 204, None

    def set_state(self, run: str, word: str) -> int:
        """Pause or resume a run: the status of the answer."""
        if run not in self.runs:
            return 404
        if word == "pause" and self.runs[run]["state"] == "cancelled":
            return 409
        self.runs[run]["state"] = "paused" if word == "pause" else "open"
        return 204

    def cancel(self, run: str, numbers: Optional[List[int]]) -> int:
        """Cancel these tasks of a run, all of it for None: the status of the answer."""
        if run not in self.runs:
            return 404
        entry = self.runs[run]
        if numbers is None:
            entry["state"] = "cancelled"
        elif max(numbers) >= entry["n"]:
            return 400
        for number in entry["tasks"] if numbers is None else numbers:
            task = self.touch(run, number)
            self.note_taken(task)
            task["hold"] = ""
            if numbers is None:
                task["status"] = "waiting" if task["status"] == "computing" else task["status"]
            elif task["status"] in ("waiting", "computing"):
                task.update(dict.fromkeys(("exitCode", "memory", "cpu", "log")), status="failed", message="cancelled",
                            finished=True)
        return 204

    def extend(self, run: str, more: int) -> int:
        """Give a run more tasks: the status of the answer."""
        if run not in self.runs:
            return 404
        if (self.runs[run]["work"] or {}).get("parameters"):
            return 409
        if self.runs[run]["n"] + more > 2 ** 31 - 1:
            return 400
        self.runs[run]["n"] += more
        return 204

    def register(self, worker: str, hostname: str, pid: int, lease: Optional[int] = None) -> int:
        entry = self.workers.setdefault(worker, {"hostname": hostname, "pid": pid, "revision": 0, "taken": False})
        if (entry["hostname"], entry["pid"]) != (hostname, pid):
            return 409
        entry.update({"lease": lease, "signed off": False})
        self.renew_lease(worker)
        return 201

    def beat(self, worker: str) -> Answer:
        """The answer, but for the revision."""
        if worker not in self.workers:
            return 404, None
        if self.workers[worker]["signed off"]:
            return 409, None
        self.renew_lease(worker)
        for run, number in self.held(worker, "expired"):
            self.take_back(self.touch(run, number))
        return 200, {"held": len(self.held(worker))}

    def sign_off(self, worker: str) -> Answer:
        if worker not in self.workers:
            return 404, None
        self.workers[worker]["signed off"] = True
        taken = self.workers[worker]["taken"]
        for run, number in self.held(worker):
            self.lapse(run, number, "signed off")
        self.workers[worker]["taken"] = taken       # it gave them itself
        return 204, None

    def state(self, worker: str) -> str:
        entry = self.workers[worker]
        return "signed off" if entry["signed off"] else "expired" if entry["expired"] else "alive"

    def delete(self, run: str) -> Answer:
        for task in self.runs.get(run, {"tasks": {}})["tasks"].values():
            self.note_taken(task)
        return (204, None) if self.runs.pop(run, None) else (404, None)

    def server_restarts(self) -> None:
        """Every lease begins anew."""
        for worker in self.workers.values():
            worker["heard"] = self.now
            worker["expired"] = worker["expired"] and UNKNOWN


def plain_task(task: Dict[str, Any]) -> Dict[str, Any]:
    """A task as the model shows it: without its id, and instead of times whether there is one."""
    shown = {name: value for name, value in task.items() if name != "id"}
    for name in ("started", "finished"):
        assert task[name] is None or re.fullmatch(TIME, task[name])
        shown[name] = task[name] is not None
    return shown


def plain_run(run: Dict[str, Any]) -> Dict[str, Any]:
    """A run as the model shows it, without its times."""
    assert re.fullmatch(TIME, run["created"]) and (run["lastReport"] is None or re.fullmatch(TIME, run["lastReport"]))
    return {name: value for name, value in run.items() if name not in ("created", "lastReport")}


TIME = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
GRID_WORK = {"command": ["./fit", "{lr}"], "folder": "/work", "parameters": {"kind": "grid", "grid": ["lr=0.1,0.01"]}}
BAD_NUMBERS = [-1, 0, "abc", "10", 1.5, True, None, 2 ** 31, 10 ** 30, [], {}]
BAD_PERCENTS = [-0.001, 100.001, "50", True, None, b'{"percentCompleted": NaN}', b'{"percentCompleted": Infinity}',
                b'{"percentCompleted": 1e999}', 10 ** 400]
BAD_BODIES = [b"", b"{", b"[]", b"3", b'"x"', b"null", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 60000,
              b'{"a":' * 9000 + b"1" + b"}" * 9000, b'{"unknown": 1}', b'{"worker_uuid": "\\ud800"}', b"9" * 60000]
# Entries of a batch that refuse all of it, beside one for task 0 that would do.
BAD_ENTRIES = [{"task": 0, "status": "done"}, {"task": 1}, {"task": -1, "status": "done"}, {"status": "done"}, 7, None,
               {"task": 2 ** 31, "status": "done"}, {"task": "1", "status": "done"}, {"task": 1, "status": "Done"},
               {"task": 1, "status": "done", "exitCode": 0}, {"task": 1, "status": "waiting", "message": ""},
               {"task": 1, "status": "done", "log": ""}, {"task": 1, "percentCompleted": 1, "memory": 1},
               {"task": 1, "percentCompleted": 101}, {"task": 1, "status": "done", "more": 1},
               {"task": 1, "attempt": 1}, {"task": 1, "status": "done", "attempt": "1"},
               {"task": 1, "status": "done", "worker_uuid": "first"}]
percents = st.one_of(st.integers(0, 100), st.floats(0, 100), st.sampled_from([33.3, 99.9999999, 1e-7, 0.1, 100.0]))
numbers = st.sampled_from([0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 999, 2 ** 31 - 2])      # few, so that rules meet on the same
statuses = st.sampled_from([None, "waiting", "computing", "done", "failed"])
names = st.sampled_from(["a", "a", "a", "b", "b", "b", "first", "D" * 64])      # all but the last register first
dices = st.randoms(use_true_random=True)    # more even than draws, which like to repeat themselves
ends = st.fixed_dictionaries({}, optional={     # what a report says of an end; the first three of a failure alone
    "exitCode": st.sampled_from([0, 1, -9, 2 ** 31 - 1]), "log": st.sampled_from(["", "/logs/7.log"]),
    "message": st.sampled_from(["", "no space left\non device", "\0ü"]),
    "memory": st.sampled_from([0, 1, 2 ** 53]), "cpu": st.sampled_from([0, 0.5, 1000000000])})
selections = st.fixed_dictionaries({}, optional={       # what the body of a restart says
    "tasks": st.lists(st.sampled_from([[0, 0], [1, 1], [1, 2], [0, 3], [2, 5]]), min_size=1, max_size=3),
    "exitCode": st.sampled_from([0, 1]), "like": st.sampled_from(["", "no space left on", "n*left*dev", "left*no"])})


class Machine(RuleBasedStateMachine):
    """Drives a farm and the model alike, and compares every answer."""
    farm: Any
    runs = Bundle("runs")

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.keys = 0
        self.remembered: List[Tuple[str, Any, str, str, Answer]] = []    # path, body, key, worker who claimed, answer
        self.folder = tempfile.mkdtemp()
        self.open(os.path.join(self.folder, "farm.sqlite"))

    def open(self, path: str) -> None:
        raise NotImplementedError

    def teardown(self) -> None:
        self.farm.close()
        shutil.rmtree(self.folder)

    def task_path(self, run: str, number: int) -> str:
        return "/api/runs/%s/tasks/%d" % (run, number)

    def post(self, path: str, body: Any, keyed: bool, worker: str = "") -> Answer:
        """A POST, perhaps with a new key; then it is kept for repeat_key, if the server is to remember it."""
        if not keyed:
            return self.farm.ask("POST", path, body)
        self.keys += 1
        key = "key %d" % self.keys
        answer = self.farm.ask("POST", path, body, key)
        if answer[0] in (200, 201, 204) and not (worker and answer[0] == 204):
            self.remembered = [entry for entry in self.remembered if not worker or entry[3] != worker][-5:]
            self.remembered.append((path, body, key, worker, answer))
        return answer

    @precondition(lambda self: len(self.model.runs) < 3)    # few, so that rules meet on the same tasks
    @rule(target=runs, waits=st.sampled_from(["", "", "after", "any", "nowhere"]), dice=dices,
          n=st.sampled_from([4, 3, 2, 5, 6, 1, 1000, 2 ** 31 - 1]), keyed=st.booleans(),
          more=st.fixed_dictionaries({}, optional={"name": st.sampled_from(["antarctica", "Ä b"]),
                                                   "maxFailures": st.sampled_from([0, 2, 1000]),
                                                   "maxLosses": st.sampled_from([0, 1, 2]),
                                                   "work": st.sampled_from([None, GRID_WORK])}))
    def create(self, n: int, keyed: bool, more: Dict[str, Any], waits: str = "",
               dice: random.Random = random.Random(0)) -> str:     # noqa: B008
        if waits == "nowhere":
            assert self.farm.ask("POST", "/api/run", {"numTasks": n, "after": "f" * 32})[0] == 404
        elif waits and self.model.runs:
            more = dict(more, after=dice.choice(list(self.model.runs)), afterAny=waits == "any")
        status, run = self.post("/api/run", dict(more, numTasks=n), keyed)
        assert status == 201
        self.model.add_run(run, more.get("name"), more.get("maxFailures", 1), more.get("maxLosses", 5),
                           more.get("work"))
        assert plain_run(run) == self.model.run_json(run["uuid"]) and run["lastReport"] is None
        return str(run["uuid"])

    @rule(name=names, pid=st.sampled_from([7, 7, 7, 8]), lease=st.sampled_from([150, 150, 150, 950, 86400, None]))
    def register(self, name: str, pid: int, lease: Optional[int]) -> None:
        known = self.model.workers.get(name)
        if known and known["pid"] != pid and known["lease"]:
            pid = known["pid"]      # whether an impostor renews the lease is left open
        body = {"uuid": name, "hostname": "n1", "pid": pid}
        status, answer = self.farm.ask("POST", "/api/worker", body if lease is None else dict(body, lease=lease))
        assert status == self.model.register(name, "n1", pid, lease)
        if status == 201:
            assert (answer["uuid"], answer["lease"], set(answer)) == (name, lease, {"uuid", "lease", "id"})

    @initialize(target=runs, n=st.sampled_from([1, 2, 3, 4]), most=st.sampled_from([1, 2]))
    def begin(self, n: int, most: int) -> str:
        for name, lease in (("first", None), ("a", 150), ("b", 150)):
            self.register(name, 7, lease)
        return str(self.create(n, False, {"maxFailures": 2, "maxLosses": most}))

    @rule(run=runs, worker=names, keyed=st.booleans(), again=st.booleans(), number=st.none() | st.none() | numbers)
    def claim(self, run: str, worker: str, keyed: bool, again: bool, number: Optional[int] = None) -> None:
        body = {"worker_uuid": worker} if number is None else {"worker_uuid": worker, "task": number}
        answer = self.post("/api/runs/%s/task" % run, body, keyed, worker)
        self.check_retry_after(run, answer[0])
        self.compare_task(run, answer, self.model.claim(run, worker, number))
        if again:
            self.claim(run, worker, False, False)

    @rule(run=runs, worker=names, count=st.sampled_from([1, 2, 3, 10000]), keyed=st.booleans())
    def claim_batch(self, run: str, worker: str, count: int, keyed: bool) -> None:
        entry = self.model.runs.get(run)
        if entry and entry["n"] > 6:
            count = min(count, 3)
        answer = self.post("/api/runs/%s/tasks" % run, {"worker_uuid": worker, "count": count}, keyed, worker)
        self.check_retry_after(run, answer[0])
        if answer[0] == 201 and count > taskfarm.SMALL:      # as many as there was time for
            assert 1 <= len(answer[1]["data"]) <= count
            count = len(answer[1]["data"])
        status, content = self.model.claim_batch(run, worker, count)
        assert answer[0] == status and (content is None or answer[1] == content)

    def check_retry_after(self, run: str, status: int) -> None:
        """Retry-After stands in a 204 when leased tasks may come back, or the run is held up, and only then."""
        pause = self.farm.retry_after
        assert (pause is not None) == (status == 204 and self.model.may_come_back(run))
        assert pause is None or 1 <= int(pause) <= 60

    @rule(dice=dices, again=st.sampled_from([True, True, True, False]))
    def repeat_key(self, dice: random.Random, again: bool) -> None:
        """The same request gets the same answer, and changes nothing. Another request with the key is refused."""
        known = [entry for entry in self.remembered
                 if entry[0] == "/api/run" or entry[0].split("/")[3] in self.model.runs]
        if not known:
            return
        path, body, key, worker, answer = dice.choice(known)
        if not again:
            run = dice.choice(list(self.model.runs))
            path, body = dice.choice([other for other in (
                ("/api/run", {"numTasks": 78}), ("/api/runs/%s/restart?status=failed" % run, None),
                ("/api/runs/%s/task" % run, {"worker_uuid": "first" if worker != "first" else "a"}),
                ("/api/runs/%s/tasks" % run, {"worker_uuid": worker or "first", "count": 9})) if other != (path, body)])
        status, content = self.farm.ask("POST", path, body, key)
        self.model.renew_lease((body or {}).get("worker_uuid"))
        if any(entry["signed off"] for entry in self.model.workers.values()):
            assert status in (answer[0], 409, 422)      # whether a claim of theirs is told again is left open
        elif not again:
            assert status == 422
        elif worker:
            assert status == 201
            for shown, given in zip(*(each.get("data", [each]) for each in (content, answer[1]))):
                assert (shown["task"], shown["attempt"]) == (given["task"], given["attempt"])
            assert len(content.get("data", [])) == len(answer[1].get("data", []))
        else:
            assert (status, content) == answer

    @rule(run=runs, number=numbers, info=st.sampled_from(["percentDone", "numWaiting", "numDone", "numComputing", ""]))
    def read(self, run: str, number: int, info: str) -> None:
        entry = self.model.runs.get(run)
        expected = (200, self.model.task_json(run, number)) if entry and number < entry["n"] else (404, None)
        self.compare_task(run, self.farm.ask("GET", self.task_path(run, number)), expected)
        status, answer = self.farm.ask("GET", "/api/runs/%s?info=%s" % (run, info))
        if entry is None:
            assert status == 404
        else:
            shown = self.model.run_json(run)
            assert (status, answer if info else plain_run(answer)) == (200, {info: shown[info]} if info else shown)

    def compare_task(self, run: str, answer: Answer, expected: Answer) -> None:
        status, task = answer
        assert status == expected[0]
        if expected[1] is not None:
            owner = self.model.task_ids.setdefault(task["id"], (run, task["task"]))
            assert owner == (run, task["task"]), "an id was used twice"
            shown = plain_task(task)
            assert shown == {name: shown[name] if value == UNKNOWN else value for name, value in expected[1].items()}

    @rule(run=runs, number=numbers, percent=st.none() | percents, status=statuses, more=ends)
    def report(self, run: str, number: int, percent: Optional[float], status: Optional[str],
               more: Dict[str, Any]) -> None:
        """A report that names no worker."""
        body = self.body_of(percent, status, more)
        got = self.farm.ask("PUT", self.task_path(run, number), body)[0]
        assert got == (self.model.report(run, number, body)[0] if body else 400)

    def body_of(self, percent: Optional[float], status: Optional[str], more: Dict[str, Any],
                **names: Any) -> Dict[str, Any]:
        """A report without what is None; exit code, message and log only of a failure."""
        body = {name: value for name, value in (("percentCompleted", percent), ("status", status)) if value is not None}
        body.update({name: value for name, value in more.items() if status == "failed" or (
            status == "done" and name in ("memory", "cpu"))})
        body.update({name: value for name, value in names.items() if value is not None and body})
        return body

    def choose_task(self, dice: random.Random) -> Optional[Tuple[str, int]]:
        """A task that was claimed once. One that is or was held is more likely."""
        known = [(run, number) for run, entry in self.model.runs.items() for number in sorted(entry["tasks"])
                 if entry["tasks"][number]["worker"]]
        rather = [(run, number) for run, number in known if self.model.task(run, number)["hold"]]
        return dice.choice(rather * 3 + known) if known else None

    def choose_claim(self, dice: random.Random, run: str, number: int) -> Tuple[Optional[str], Optional[int]]:
        """A worker and an attempt to be named: mostly those of the last claim or of an earlier one."""
        task = self.model.task(run, number)
        ends = task.get("ends", {})
        earlier = [attempt for attempt in ends if attempt > task["attempt"] - 8]
        kind = dice.choice(["both", "both", "both", "worker", "attempt", "ended", "ended", "wrong"])
        if kind == "ended" and earlier:
            attempt = dice.choice(earlier)
            return ends[attempt][0], attempt
        if kind == "wrong":
            return dice.choice([None, "nobody", *self.model.workers]), max(1, task["attempt"] + dice.choice([-1, 0, 1]))
        return (task["worker"] if kind != "attempt" else None), (task["attempt"] if kind != "worker" else None)

    @rule(dice=dices, percent=st.none() | percents, status=statuses, more=ends)
    def report_fenced(self, dice: random.Random, percent: Optional[float], status: Optional[str],
                      more: Dict[str, Any]) -> None:
        """A report of a worker that holds the task, held it, or never did."""
        task = self.choose_task(dice)
        if task:
            worker, attempt = self.choose_claim(dice, *task)
            body = self.body_of(percent, status, more, worker_uuid=worker, attempt=attempt)
            if body:
                got = self.farm.ask("PUT", self.task_path(*task), body)[0]
                assert got == self.model.report(*task, body)[0]

    @rule(dice=dices, named=st.booleans(), more=ends, percent=st.none() | percents)
    def report_batch(self, dice: random.Random, named: bool, more: Dict[str, Any], percent: Optional[float]) -> None:
        task = self.choose_task(dice)
        if not task:
            return
        run, worker = task[0], self.model.task(*task)["worker"] if named else None
        entries, known = [], list(range(min(6, self.model.runs[run]["n"])))
        for number in dice.sample(known, dice.randint(1, len(known))):
            attempt = self.choose_claim(dice, run, number)[1] or None
            status = dice.choice([None, "waiting", "computing", "done", "failed"])
            body = self.body_of(percent, status, more, task=number, attempt=attempt)
            entries.append(body or {"task": number, "status": "computing"})
        body = {"data": entries} if worker is None else {"data": entries, "worker_uuid": worker}
        status, answer = self.farm.ask("PUT", "/api/runs/%s/tasks" % run, body)
        if answer:
            assert all(len(entry["detail"]) > 10 for entry in answer["refused"])
            answer["refused"] = sorted(entry["task"] for entry in answer["refused"])
        assert (status, answer) == self.model.report_batch(run, worker, entries)

    @rule(run=runs, bad=st.sampled_from(BAD_ENTRIES), first=st.booleans())
    def bad_batch(self, run: str, bad: Any, first: bool) -> None:
        """One bad entry refuses the whole batch."""
        good = {"task": 0, "status": "done"}
        body = {"data": [bad, good] if first else [good, bad]}
        if run in self.model.runs:
            assert self.farm.ask("PUT", "/api/runs/%s/tasks" % run, body)[0] == 400

    @rule(run=runs, word=st.sampled_from(["", "", "?all=True", "?all=False", "?status=failed"]), keyed=st.booleans(),
          body=st.none() | selections)
    def restart(self, run: str, word: str, keyed: bool, body: Optional[Dict[str, Any]] = None) -> None:
        got = self.post("/api/runs/%s/restart%s" % (run, word), body, keyed)[0]
        assert got == self.model.restart(run, "failed" if "failed" in word else word == "?all=True", body)[0]

    @rule(run=runs, word=st.sampled_from(["pause", "pause", "resume", "resume", "cancel"]), keyed=st.booleans())
    def set_state(self, run: str, word: str, keyed: bool) -> None:
        got = self.post("/api/runs/%s/%s" % (run, word), {} if keyed else None, keyed)[0]
        assert got == (self.model.cancel(run, None) if word == "cancel" else self.model.set_state(run, word))

    @rule(run=runs, numbers=st.sets(st.integers(0, 6), min_size=1), keyed=st.booleans())
    def cancel_tasks(self, run: str, numbers: Set[int], keyed: bool) -> None:
        wanted, ranges = sorted(numbers), []        # type: Tuple[List[int], List[List[int]]]
        for number in wanted:
            if ranges and ranges[-1][1] == number - 1 and number != 3:
                ranges[-1][1] = number
            else:
                ranges.append([number, number])
        got = self.post("/api/runs/%s/cancel" % run, {"tasks": ranges[::-1]}, keyed)[0]
        assert got == self.model.cancel(run, wanted)

    @rule(run=runs, more=st.sampled_from([1, 1, 2, 3, 2 ** 31 - 1]), keyed=st.booleans())
    def extend(self, run: str, more: int, keyed: bool) -> None:
        entry = self.model.runs.get(run)
        if entry is None or not 6 - more < entry["n"] < 1000 or more > 6:      # few tasks, or very many
            got = self.post("/api/runs/%s/extend" % run, {"numTasks": more}, keyed)[0]
            assert got == self.model.extend(run, more)

    @precondition(lambda self: len(self.model.runs) >= 2)
    @rule(run=consumes(runs))
    def delete(self, run: str) -> None:
        assert self.farm.ask("DELETE", "/api/runs/" + run)[0] == self.model.delete(run)[0]
        assert self.farm.ask("DELETE", "/api/runs/" + run)[0] == 404

    @rule(worker=names, settled=st.booleans())
    def beat(self, worker: str, settled: bool) -> None:
        """While the rows of a restart or a deletion follow, the number held may be behind; nothing is taken back."""
        if settled or self.model.held(worker, "expired"):
            settled = True
            self.farm.settle()
        status, answer = self.farm.ask("PUT", "/api/worker/" + worker)
        assert status == self.model.beat(worker)[0]
        if status == 200:
            entry, held = self.model.workers[worker], len(self.model.held(worker))
            assert set(answer) == {"held", "revision"} and answer["revision"] >= entry["revision"]
            if settled:
                assert answer["held"] == held and answer["revision"] >= entry["revision"] + entry["taken"]
                entry.update(revision=answer["revision"], taken=False)

    @rule(worker=names)
    def sign_off(self, worker: str) -> None:
        assert self.farm.ask("DELETE", "/api/worker/" + worker)[0] == self.model.sign_off(worker)[0]
        self.farm.settle()      # the tasks follow in slices
        self.remembered = [entry for entry in self.remembered if entry[3] != worker]

    @rule(steps=st.sampled_from([1, 2, 9]), beating=st.sets(names))
    def time_passes(self, steps: int, beating: Set[str]) -> None:
        """Some workers send heartbeats meanwhile, others are silent. No step ends near the end of a lease."""
        for _ in range(steps):
            self.farm.pass_time(100)
            self.model.pass_time(100)
            for worker in sorted(beating):
                self.beat(worker, True)

    @rule(run=runs, worker=names, rival=names, dice=dices)
    def one_workers_life(self, run: str, worker: str, rival: str, dice: random.Random) -> None:
        """Some of the other rules in a row, on one worker: so they meet more often."""
        for _ in range(dice.randrange(4, 12)):
            seldom = dice.choice(["sign off", "register", "restart", "put", "server", "cancel", "cancel tasks", "pause",
                                  "resume", "resume", "resume", "extend"])
            act = dice.choice(["claim", "claim", "ahead", "rival", "rival", "report", "report", "end", "end", "silence",
                               "silence", "silence", "beat", "restart", seldom])
            if act == "claim":
                self.claim(run, worker, dice.random() < 0.5, False)
            elif act == "ahead":
                self.claim_batch(run, worker, dice.choice([1, 2]), dice.random() < 0.5)
            elif act == "rival":
                self.claim(run, rival, False, False)
            elif act == "report":
                self.report_fenced(dice, 50, None, {})
            elif act == "end":
                self.report_fenced(dice, None, dice.choice(["done", "done", "failed", "waiting"]), {
                    "exitCode": 1, "log": "l", "memory": 1})
            elif act == "silence":
                self.time_passes(dice.choice([1, 2]), dice.choice([{"a", "b"} - {worker}, set(), {rival}]))
            elif act == "beat":
                self.beat(worker, dice.random() < 0.5)
            elif act == "sign off":
                self.sign_off(worker)
            elif act == "register":
                self.register(worker, 7, 150)
            elif act == "restart":
                self.restart(run, dice.choice(["", "?status=failed", "?all=True"]), False, dice.choice(
                    [None, {"tasks": [[0, 0]]}, {"exitCode": 1}]))
            elif act in ("pause", "resume", "cancel"):
                self.set_state(run, act, False)
            elif act == "cancel tasks":
                self.cancel_tasks(run, {dice.randrange(4) for _ in range(dice.choice([1, 2, 9]))}, dice.random() < 0.5)
            elif act == "extend":
                self.extend(run, 1, False)
            elif act == "put":
                self.report(run, dice.randrange(3), None, dice.choice(["done", "waiting", "computing", "failed"]), {})
            else:
                self.server_restarts()

    @rule(run=runs, status=statuses, limit=st.integers(1, 4), wanted=st.sets(st.integers(0, 5), min_size=1))
    def list_some_tasks(self, run: str, status: Optional[str], limit: int, wanted: Set[int]) -> None:
        """Those with these numbers, some pages of which are short."""
        if run in self.model.runs:
            path, words = "/api/runs/%s/tasks" % run, ["limit=%d" % limit, "tasks=" + ",".join(map(str, wanted))]
            words += ["status=" + status] if status else []
            if max(wanted) >= self.model.runs[run]["n"]:
                assert self.farm.ask("GET", path + "?" + "&".join(words))[0] == 400
                return
            assert [task["task"] for task in walk(self.farm, path, *words)] == [
                number for number in sorted(wanted) if status in (None, self.model.task(run, number)["status"])]

    @rule(run=runs, status=st.sampled_from([None, "waiting", "computing", "done", "failed"]), limit=st.integers(1, 4))
    def list_tasks(self, run: str, status: Optional[str], limit: int) -> None:
        """All pages of each order agree with the model; of an endless list the first."""
        entry = self.model.runs.get(run)
        if entry is None:
            assert self.farm.ask("GET", "/api/runs/%s/tasks" % run)[0] == 404
            return
        endless = entry["n"] > 6 and status in (None, "waiting")
        known = range(20) if endless else range(entry["n"]) if entry["n"] <= 6 else sorted(entry["tasks"])
        for order in ("", "task", "started", "finished"):
            wanted = "computing" if order == "started" else status
            expected = [number for number in known if wanted in (None, self.model.task(run, number)["status"])]
            words = ["%s=%s" % (name, value) for name, value in (
                ("limit", limit), ("status", status), ("order", order)) if value]
            by_time = order in ("started", "finished")
            if order == "started" and status not in (None, "computing"):
                assert self.farm.ask("GET", "/api/runs/%s/tasks?%s" % (run, "&".join(words)))[0] == 400
                continue
            most = len(expected) if endless and not by_time else None
            tasks = walk(self.farm, "/api/runs/%s/tasks" % run, *words, most=most)
            if by_time:
                times = [task[order] for task in tasks]
                assert times == sorted(times, reverse=order == "finished")
                shown = sorted(task["task"] for task in tasks if task["task"] in known)     # known: of an endless list
                flags = {number: self.model.task(run, number)[order] for number in expected}
                assert [number for number in shown if flags[number] != UNKNOWN] == [
                    number for number in expected if flags[number] is True]
            else:
                assert [task["task"] for task in tasks] == expected
            for task in tasks:
                self.compare_task(run, (200, task), (200, self.model.task_json(run, task["task"])))

    @rule(worker=names, limit=st.integers(1, 3))
    def list_worker(self, worker: str, limit: int) -> None:
        self.farm.settle()
        entry, path = self.model.workers.get(worker), "/api/worker/" + worker
        status, answer = self.farm.ask("GET", path)
        assert status == (200 if entry else 404)
        if entry is None:
            return
        state = self.model.state(worker)
        assert (answer["state"] == state or UNKNOWN in (entry["expired"], state))
        assert {name: answer[name] for name in ("uuid", "hostname", "pid", "lease", "held")} == {
            "uuid": worker, "held": len(self.model.held(worker)),
            **{name: entry[name] for name in ("hostname", "pid", "lease")}}
        assert answer["revision"] >= entry["revision"] and re.fullmatch(TIME, answer["heard"])
        tasks = walk(self.farm, path, "limit=%d" % limit)
        assert sorted((task["run"], task["task"]) for task in tasks) == sorted(self.model.held(worker))
        for task in tasks:
            shown, number = plain_task(task), task["task"]
            expected = self.model.task_json(task["run"], number)
            assert shown == dict({name: value if value != UNKNOWN else shown[name] for name, value in expected.items()
                                  if name not in ("worker", "hostname")}, run=task["run"])

    @rule(everything=st.booleans(), limit=st.integers(1, 3))
    def list_workers(self, everything: bool, limit: int) -> None:
        self.farm.settle()
        listed = walk(self.farm, "/api/workers", "limit=%d" % limit, "all=%s" % everything)
        shown = {worker["uuid"]: (worker["state"], worker["held"], worker["lease"]) for worker in listed}
        assert len(shown) == len(listed)
        for name, entry in self.model.workers.items():
            state = self.model.state(name)
            if entry["expired"] == UNKNOWN and state != "signed off":
                state = "alive" if name in shown else "expired"
                if everything:
                    state = shown[name][0]
            if everything or state == "alive":
                assert shown.pop(name) == (state, len(self.model.held(name)), entry["lease"])
        assert shown == {}

    @rule(run=runs, data=st.data())
    def bad_input(self, run: str, data: st.DataObject) -> None:
        method, path, body = data.draw(st.one_of(
            st.tuples(st.just("POST"), st.just("/api/run"), st.sampled_from([{"numTasks": n} for n in BAD_NUMBERS])),
            st.tuples(st.just("POST"), st.sampled_from(["/api/runs/%s/%s" % (run, word) for word in ("task", "tasks")]),
                      st.sampled_from(BAD_BODIES)),
            st.tuples(st.just("PUT"), st.just("/api/runs/%s/tasks" % run), st.sampled_from(BAD_BODIES)),
            st.tuples(st.just("PUT"), st.just(self.task_path(run, 0)), st.sampled_from(
                [p if isinstance(p, bytes) else {"percentCompleted": p} for p in BAD_PERCENTS]
                + [{"status": s} for s in ("Done", "", 1, None)] + [{}, {"worker_uuid": "first"}, {"attempt": 1}]))))
        assert self.farm.ask(method, path, body)[0] == 400

    @rule()
    def server_restarts(self) -> None:
        self.farm.restart_server()
        self.model.server_restarts()

    @invariant()
    def figures_agree(self) -> None:
        status, answer = self.farm.ask("GET", "/api/runs")
        assert (status, [plain_run(run) for run in answer["data"]]) == (
            200, [self.model.run_json(run) for run in self.model.runs])
        for run in answer["data"]:
            work = self.model.runs[run["uuid"]]["work"]
            status, known = self.farm.ask("GET", "/api/runs/%s/work" % run["uuid"])
            assert (status, known) == (200, dict(work, user="ada", own=True)) if work else status == 404
            parts = run["numWaiting"] + run["numComputing"] + run["numDone"] + run["numFailed"]
            assert parts == run["numTasks"]
            assert (run["lastReport"] is not None) == self.model.runs[run["uuid"]]["reported"]

    @invariant()
    def promises_hold(self) -> None:
        assert self.farm.wrong() == []


def walk(farm: Any, path: str, *words: str, most: Optional[int] = None) -> List[Dict[str, Any]]:
    """The entries of all pages of a list, or the first *most*."""
    entries: List[Dict[str, Any]] = []
    after: List[str] = []
    while True:
        status, page = farm.ask("GET", path + "?" + "&".join([*words, *after]))
        assert status == 200
        entries += page["data"]
        if page["next"] is None or most is not None and len(entries) >= most:
            return entries[:most]
        assert after != ["after=" + page["next"]], "it goes on"
        after = ["after=" + page["next"]]


machine_settings = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


# ---------------------------------------------------------------- CONTRACT

VERBS = [["serve"], ["audit"], ["check"], ["backup"], ["run"], ["work"], ["progress"], ["bench"], ["user", "add"],
         ["user", "list"], ["user", "passwd"], ["user", "remove"], ["new"], ["submit"], ["list"], ["status"],
         ["wait"], ["tasks"], ["failures"], ["hosts"], ["log"], ["workers"], ["pause"], ["resume"], ["cancel"],
         ["extend"], ["restart"], ["delete"], ["login"], ["token", "new"], ["token", "list"], ["token", "revoke"],
         ["doctor"], ["completion"]]
SOURCE = MODULE.read_text()
TREE = ast.parse(SOURCE)


def sections() -> Dict[str, Tuple[int, int]]:
    """First and last line of each section, by its banner."""
    lines = SOURCE.splitlines()
    starts = [(line[67:].strip(), number) for number, line in enumerate(lines, 1) if line.startswith("# " + "-" * 64)]
    ends = [start - 1 for _, start in starts[1:]] + [len(lines)]
    return {name: (start, end) for (name, start), end in zip(starts, ends)}


SECTIONS = sections()


def section_of(node: ast.AST) -> str:
    return next((name for name, (first, last) in SECTIONS.items() if first <= node.lineno <= last),
                "CONTRACT")


def test_sections_stand_in_the_order_of_the_contents() -> None:
    contents = (taskfarm.__doc__ or "").partition("\nContents\n")[2]
    assert re.findall(r"^    ([A-Z][A-Z ]+[A-Z]) {2,}", contents, re.M) == list(SECTIONS)


def test_the_docstring_names_every_endpoint_and_no_other() -> None:
    named = re.findall(r"^    (GET|POST|PUT|DELETE) +(/\S*) +(open|admin|)", taskfarm.__doc__ or "", re.M)
    assert named == [(route.method, route.path, "" if route.access == "user" else route.access)
                     for route in taskfarm.ROUTES.table]


@pytest.mark.parametrize("words", [[], ["user"], ["token"], *VERBS], ids=" ".join)
def test_help_fits_80_columns(words: List[str]) -> None:
    shown = run_verb(*words, "--help", COLUMNS="80").stdout
    assert shown and [line for line in shown.splitlines() if len(line) > 80] == []


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


def test_a_queue_is_waited_on_in_one_place() -> None:
    def waits(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get" and any(
            word.arg == "timeout" for word in node.keywords)

    assert {getattr(outer, "name", "") for outer in TREE.body for node in ast.walk(outer) if waits(node)} == {
        "next_from"}, "SimpleQueue.get(timeout=...) may wait for ever on Python 3.9 and 3.10; next_from says how not"


WORK = {"CLIENT", "COMMANDS", "REPORTER", "WORKER"}       # sections that could be cut out into a file of their own
STORE = {"SCHEMA", "TRANSACTIONS", "ROWS", "QUERIES", "OPERATIONS", "FILE", "WRITER"}  # sections that speak SQL


def test_only_the_store_speaks_sql() -> None:
    words = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE FROM|CREATE|PRAGMA|BEGIN|COMMIT|ROLLBACK)\b")
    for node in ast.walk(TREE):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and words.match(node.value):
            assert section_of(node) in STORE, node.value


@pytest.mark.parametrize("name, allowed", [
    ("sqlite3", STORE), ("selectors", {"SERVER", "WORKER", "BENCH", "FAIR"}),
    ("socketserver", {"SERVER"}), ("argparse", {"VERBS", "UPKEEP", "SUBMIT", "RUN", "COMMAND LINE"}),
    ("socket", {"CONNECTIONS", "SERVER", "SERVICE", "CLIENT", "BENCH", "FAIR", "DOCTOR", "VERBS", "UPKEEP",
                "RUN"}),
    ("hashlib", {"LOGIN", "TLS", "COMMANDS", "RUN"}),
    ("ssl", {"TLS", "CONNECTIONS", "SERVER", "SERVICE", "CLIENT", "BENCH"}),
    ("fcntl", {"FILE", "COMMANDS", "SUBMIT"}),
    ("ROUTES", {"API", "PAGES", "SERVICE", "BENCH"}), ("Request", {"HTTP", "CONNECTIONS", "SERVER", "API", "PAGES"}),
    ("Store", {"WRITER", "API", "SERVICE", "BENCH", "FAIR", "DOCTOR", "UPKEEP"}), ("Run", {*STORE, "API"}),
])
def test_a_name_is_used_only_in_its_sections(name: str, allowed: set) -> None:
    used = {section_of(node) for node in ast.walk(TREE) if isinstance(node, ast.Name) and node.id == name}
    assert used and used <= allowed


def test_no_name_of_the_module_is_given_twice() -> None:
    """A second SLICE_S would make the writer's slices as long as nobody meant."""
    names = [node.name for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    for outer in TREE.body:
        targets = outer.targets if isinstance(outer, ast.Assign) else []
        names += [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    assert sorted(names) == sorted(set(names))


def uses() -> Set[Tuple[str, str, str]]:
    """(section, section used, name) of each function or class used, unless a local variable has the same name."""
    defined = {node.name: section_of(node) for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert len(defined) > 150
    found = set()
    for outer in TREE.body:
        names = [node for node in ast.walk(outer) if isinstance(node, ast.Name)]
        own = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        own |= {node.arg for node in ast.walk(outer) if isinstance(node, ast.arg)}
        found |= {(section_of(node), defined[node.id], node.id) for node in names
                  if node.id in defined and node.id not in own}
    return found


def test_a_section_uses_those_above_it_and_none_below() -> None:
    order = ["CONTRACT", *SECTIONS]
    assert [use for use in uses() if order.index(use[1]) > order.index(use[0])] == []


def test_the_client_knows_neither_store_nor_login_nor_http() -> None:
    of_files = ("keep_private", "refuse_link")      # the same for the access file as for the farm's own
    assert {used for section, used, name in uses() if section in WORK and name not in of_files} <= {
        "LIMITS AND ERRORS", "TLS", "TERMINAL", *WORK}


def test_every_public_function_and_class_says_what_it_gives() -> None:
    nodes = [node for outer in [TREE, *(node for node in TREE.body if isinstance(node, ast.ClassDef))]
             for node in outer.body
             if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(nodes) > 200
    assert [node.name for node in nodes if not node.name.startswith("_") and not ast.get_docstring(node)] == []


def test_the_readme_names_every_route_and_verb() -> None:
    readme = (HERE / "README.md").read_text()
    for route in taskfarm.ROUTES.table:
        if route.access != taskfarm.ADMIN:
            path = re.sub("<(run|worker|id)>", lambda match: match[1].upper(), route.path).replace("<task>", "N")
            assert "| `%s %s`" % (route.method, path) in readme, path
    for verb in VERBS:
        assert "taskfarm.py %s" % " ".join(verb) in readme, verb


def test_python_3_6_gets_one_sentence() -> None:
    head = SOURCE[:SOURCE.index("import argparse")]
    patched = head.replace("< (3, 9)", "< (99, 0)")
    done = subprocess.run([sys.executable, "-c", patched], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "needs Python 3.9" in done.stderr


# ---------------------------------------------------------------- RULES
# The rules by themselves: what may become of a task, against the contract's promises and the CHECKs of the table.

RESTARTS = [taskfarm.RESTART, taskfarm.RESTART_ALL, taskfarm.RESTART_FAILED]


def some_report(dice: random.Random, number: int = 0) -> Report:
    """What a client might say of a task."""
    status = dice.choice([None, taskfarm.WAITING, taskfarm.COMPUTING, taskfarm.DONE, taskfarm.FAILED])
    exit_code, message, log = ((dice.choice([None, 1]), dice.choice([None, "why"]), dice.choice([None, "/l"]))
                               if status == taskfarm.FAILED else (None, None, None))
    memory, cpu = ((dice.choice([None, 5]), dice.choice([None, 6])) if status in (taskfarm.DONE, taskfarm.FAILED) else
                   (None, None))
    return Report(number, None, status, dice.choice([None, None, 0, FULL // 3, FULL]), exit_code, message,
                  log, dice.choice([None, None, 700]), memory, cpu)


class Life:
    """One task to which one thing after another happens, and what must hold of it each time."""

    def __init__(self, seed: int) -> None:
        self.dice = dice = random.Random(seed)
        self.limits = Limits(dice.randint(0, 3), dice.randint(0, 3))
        self.by_claims = dice.random() < 0.5        # nobody reports without naming a claim
        self.task = Task(5)
        self.now_ms = 10 ** 12
        self.table = sqlite3.connect(":memory:", isolation_level=None)
        for statement in taskfarm.statements(taskfarm.SCHEMA[0]):
            self.table.execute(statement)

    def go_on(self) -> None:
        """Let one thing happen that may happen to the task as it is."""
        task, dice = self.task, self.dice
        self.now_ms += dice.randint(0, 5)
        events = [self.restart, self.cancel]
        if task.status == taskfarm.WAITING:
            events += [self.claim] * 8
        if task.hold is not None:
            events += [self.report] * 4
        if is_held(task):
            events += [self.lapse] * 3 + [self.give_up]
        if task.hold in (taskfarm.LAPSED, taskfarm.LOST):
            events += [self.take_back] * 3
        if not self.by_claims:
            events += [self.overrule] * 2
        self.task = after = dice.choice(events)()
        assert after.id == task.id and after.attempt >= task.attempt, "the attempt of a task never falls"
        self.promises_hold()

    def claim(self) -> Task:
        worker, started = self.dice.randint(1, 3), self.dice.choice([None, self.now_ms])
        after = taskfarm.claimed(self.task, worker, started)
        assert (is_held(after), after.worker, after.attempt) == (True, worker, self.task.attempt + 1)
        return after

    def report(self) -> Task:
        report, task = some_report(self.dice), self.task
        late = report.status in (None, taskfarm.COMPUTING)
        if task.hold not in (taskfarm.ENDED_DONE, taskfarm.ENDED_FAILED, taskfarm.ENDED_WAITING):
            assert taskfarm.is_news(task, report, task.hold, "w")
            after = taskfarm.reported(task, report, self.limits, self.now_ms)
            assert after.status == taskfarm.COMPUTING if late else not is_held(after)
        elif late or taskfarm.ENDED[report.status or 0] == task.hold:
            assert not taskfarm.is_news(task, report, task.hold, "w"), "a report that comes again counts once"
            return task
        else:
            with pytest.raises(taskfarm.Conflict):
                taskfarm.is_news(task, report, task.hold, "w")
            return task
        assert late or not taskfarm.is_news(after, report, after.hold, "w"), "the very report that has ended the claim"
        assert (after.worker, after.attempt) == (task.worker, task.attempt)
        return after

    def overrule(self) -> Task:
        after = taskfarm.overruled(self.task, some_report(self.dice), self.limits, self.now_ms)
        assert not is_held(after)
        return after

    def lapse(self) -> Task:
        after = taskfarm.lapsed(self.task, self.limits, self.now_ms)
        assert not is_held(after) and taskfarm.taken_back(after) == self.task, "the worker has it back as it was"
        assert after.losses == self.task.losses + (self.task.hold == taskfarm.STARTED)
        return after

    def give_up(self) -> Task:
        after = taskfarm.given_up(self.task)
        assert after == self.task._replace(status=taskfarm.WAITING, hold=taskfarm.GIVEN_UP), "and it is no loss"
        return after

    def take_back(self) -> Task:
        after = taskfarm.taken_back(self.task)
        assert is_held(after) and self.task.losses - after.losses in (0, 1)
        return after

    def restart(self) -> Task:
        which, spared = self.dice.choice(RESTARTS), self.dice.random() < 0.5
        return taskfarm.restarted(self.task, which, spared)

    def cancel(self) -> Task:
        task = self.task
        after = taskfarm.cancelled(task, self.now_ms)
        assert not is_held(after) and taskfarm.cancelled(after, self.now_ms + 1) == after, "twice is once"
        assert (after.failures, after.losses, after.attempt, after.millionths) == (
            task.failures, task.losses, task.attempt, task.millionths)
        if task.status in (taskfarm.DONE, taskfarm.FAILED):
            assert after._replace(hold=task.hold) == task, "what has ended stays as it is"
        else:
            assert (after.status, after.message) == (taskfarm.FAILED, "cancelled")
            for which in RESTARTS:
                assert taskfarm.restarted(after, which, False).status == taskfarm.WAITING, "every restart undoes it"
        return after

    def promises_hold(self) -> None:
        task, limits = self.task, self.limits
        whole = taskfarm.restarted(task, taskfarm.CANCEL, True)
        assert whole == task._replace(status=task.status if task.status != taskfarm.COMPUTING else taskfarm.WAITING,
                                      hold=task.hold if (task.hold or 0) > taskfarm.GIVEN_UP else None)
        row = task._replace(run=1)
        self.table.execute("INSERT OR REPLACE INTO task (%s) VALUES (%s)" % (
            taskfarm.TASK_COLUMNS, ", ".join("?" * len(row))), row)     # raises where a CHECK does not hold
        assert Task._make(self.table.execute(taskfarm.TASK_BY_ID, (task.id,)).fetchone()) == row
        if is_held(task):
            assert task.status == taskfarm.COMPUTING and task.worker
            assert (task.hold == taskfarm.STARTED) == (task.started is not None)
        if task.status == taskfarm.COMPUTING:
            assert task.finished is None and (is_held(task) or not self.by_claims), "somebody computes it"
        if task.status in (taskfarm.DONE, taskfarm.FAILED):
            assert task.finished is not None
        if self.by_claims:
            for number, most in ((task.failures, limits.failures), (task.losses, limits.losses)):
                assert not most or number < most or number == most and task.status == taskfarm.FAILED
        for which in RESTARTS:
            for spared in (False, True):
                once = taskfarm.restarted(task, which, spared)
                assert taskfarm.restarted(once, which, spared) == once, "twice is once"
                assert once == task or once.status == taskfarm.WAITING and not once.failures and not once.losses
        assert not is_complete(task) or taskfarm.restarted(task, taskfarm.RESTART, False) == task
        assert taskfarm.restarted(task, taskfarm.RESTART_ALL, True) == Task(
            task.id, task.run, worker=task.worker, attempt=task.attempt,
            hold=None if (task.hold or 0) <= taskfarm.GIVEN_UP else task.hold), "every task, to 0 percent"


@given(seed=st.integers(0, 2 ** 32), events=st.integers(500, 1500))
@settings(max_examples=5 if QUICK else 30, deadline=None, database=None)
def test_whatever_happens_to_a_task_the_promises_hold(seed: int, events: int) -> None:
    life = Life(seed)
    for _ in range(events):
        life.go_on()
    life.table.close()


@pytest.mark.parametrize("over, complete, whatever, begins", [
    (False, False, False, None), (False, False, True, None), (True, False, False, False), (True, False, True, True),
    (True, True, False, True), (True, True, True, True)])
def test_when_a_run_that_waits_for_another_may_begin(
        over: bool, complete: bool, whatever: bool, begins: Optional[bool]) -> None:
    assert taskfarm.may_begin(over, complete, whatever) is begins


def every_task() -> Iterator[Task]:
    """A task in each state that the table allows, of workers 1 and 2, with and without what may be NULL."""
    for status, hold in itertools.product(range(4), [None, *range(1, 9)]):
        allowed = range(4) if hold is None or hold > 5 else [1] if hold <= 2 else [0, 3]
        if status in allowed:
            said: Any
            for millionths, blame, started, finished, said, worker in itertools.product(
                    [0, FULL // 3, FULL], [(0, 0), (1, 0), (0, 1), (2, 2)], [None, 10 ** 12], [None, 10 ** 12 + 5],
                    [(None,) * 5, (3, "why", 7, 8, "/log")], [1, 2]):
                yield Task(0, 1, status, millionths, worker, 3, hold, *blame, started, finished, *said)


def test_every_task_stands_for_all_that_the_table_allows() -> None:
    table, seen = sqlite3.connect(":memory:"), set()
    table.executescript(taskfarm.SCHEMA[0])
    for status, hold in itertools.product(range(-1, 6), [None, *range(10)]):
        with contextlib.suppress(sqlite3.IntegrityError):
            table.execute("INSERT INTO task (run, worker, attempt, status, hold) VALUES (1, 1, 1, ?, ?)",
                          (status, hold))
            seen.add((status, hold))
    assert seen == {(task.status, task.hold) for task in every_task()}
    table.close()


# ---------------------------------------------------------------- STORE

class StoreMachine(Machine):
    """The model against the store, in slices so small, and with a clock so fast, that everything takes several."""

    def open(self, path: str) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(taskfarm.Sweep, "SLICE", 2)
        for name in ("SMALL", "SLICE", "REPORTS_SLICE", "SPANS_AT_ONCE"):
            self.patch.setattr(taskfarm, name, 2)
        self.farm = Direct(path, FakeClock(step_s=taskfarm.BATCH_S * 0.6))

    def teardown(self) -> None:
        self.patch.undo()
        super().teardown()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=8 if QUICK else 25, stateful_step_count=30, **machine_settings)   # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3 if QUICK else 40))
def test_long_lives_agree_with_the_model(seed: int) -> None:
    """The same rules with plain dice, which meet the same few tasks far more often than a search for small failures."""
    dice, machine = random.Random(seed), StoreMachine()
    try:
        run = machine.begin(dice.randint(1, 4), dice.randint(1, 2))
        for _ in range(25):
            machine.one_workers_life(run, dice.choice("aab"), dice.choice(["a", "b", "b", "first"]), dice)
            machine.report_batch(dice, dice.random() < 0.7, {"exitCode": 2, "cpu": 1.5},
                                 dice.choice([None, 50, 100]))
            machine.list_tasks(run, dice.choice([None, "waiting", "computing", "done", "failed"]), 2)
            machine.repeat_key(dice, dice.random() < 0.8)
            machine.figures_agree()
            if dice.random() < 0.1:
                machine.delete(run)
                run = machine.create(dice.randint(1, 4), True, {"maxFailures": dice.randint(0, 3)})
        machine.list_workers(True, 2)
        machine.promises_hold()
    finally:
        machine.teardown()


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


def test_the_view_for_people_shows_tasks_that_were_touched(store: Direct) -> None:
    run = make_run(store, 3)
    claim(store, run)
    report(store, run, 1, status="done")
    assert store.store.connection.execute("SELECT run, task, status, percent, hostname FROM tasks").fetchall() == [
        (run, 0, "computing", 0.0, "node1"), (run, 1, "done", 100.0, None)]
    store.ask("DELETE", "/api/runs/" + run)
    assert store.store.connection.execute("SELECT count(*) FROM tasks").fetchone() == (0,)


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
    direct.store.call_all([done_by_nobody(run, number) for number in range(3000)])
    store = direct.store
    read, claim_other = taskfarm.read_run(run), taskfarm.claim(other, "w")
    ended = store.apply([taskfarm.restart_run(run, "restart all"), read, claim_other])
    assert [named.function.__name__ for named, _ in ended] == ["restart_run", "read_run", "claim"]
    assert ended[1][1].counts == [3000, 0, 0, 0], "the figures change at once, and reading does not wait"
    assert direct.ask("GET", "/api/runs/%s/tasks/2999" % run)[1]["status"] == "waiting"
    writing = taskfarm.claim(run, "w")
    ended, rounds = store.apply([writing]), 0
    while not ended:
        store.turn()
        ended = store.apply([])
        rounds += 1
    assert rounds >= 3000 // taskfarm.Sweep.SLICE and ended[0][0] is writing and ended[0][1].number == 0
    direct.close()


@pytest.mark.parametrize("method, path", [("POST", "/restart?all=True"), ("POST", "/restart"), ("DELETE", "")])
def test_a_sweep_that_a_crash_cut_short_is_ended_at_the_next_start(tmp_path: Path, method: str, path: str) -> None:
    direct = Direct(str(tmp_path / "f"), FakeClock(step_s=1.0))
    run = make_run(direct, 1200)
    direct.store.call_all([taskfarm.report(run, None, Report(number, None, taskfarm.COMPUTING, FULL // 2))
                           for number in range(0, 1200, 2)])
    assert direct.ask(method, "/api/runs/" + run + path)[0] == 204
    assert direct.store.sweeps, "some rows are still to follow"
    direct.restart_server()
    if method == "DELETE":
        assert direct.ask("GET", "/api/runs/" + run)[0] == 404
    else:
        assert figures(direct, run) == (1200, 0, 0, 0.0 if "all" in path else 25.0)
        assert [claim(direct, run)[1] for _ in range(1200)] == list(range(1200))
    while direct.store.sweeps:
        direct.store.turn()
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
    outcomes = store.store.call_all(batch)
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
    report(store, run, 2, worker_uuid="w", attempt=1, status="done")
    report(store, run, 2, worker_uuid="w", attempt=1, status="done")
    tell_batch(store, run, {"task": 1, "status": "done"}, {"task": 2, "status": "done"}, worker_uuid="w")
    take_batch(store, run, "w", 3)
    for _ in range(2):
        claim(store, run)
    store.ask("PUT", "/api/worker/w")
    store.ask("GET", "/api/worker/w?limit=1&after=1")
    store.ask("GET", "/api/workers?limit=1&after=1")
    for query in ("", "&status=waiting", "&status=done", "&order=started&status=computing", "&order=finished"):
        after = store.ask("GET", "/api/runs/%s/tasks?limit=1%s" % (run, query))[1]["next"]
        assert store.ask("GET", "/api/runs/%s/tasks?limit=1%s&after=%s" % (run, query, after))[0] == 200
    store.ask("GET", "/api/runs/" + run)
    store.ask("GET", "/api/runs/%s/tasks/1" % run)
    store.ask("POST", "/api/worker", {"uuid": "w2", "hostname": "node1", "pid": 1})
    store.restart_server()
    store.store.connection.set_trace_callback(seen.append)
    claim(store, run)
    store.farm.private = True
    claim(store, run)
    for path in ("/runs", "/workers?limit=1&after=1", "/workers?all=True&limit=1", "/worker/w", "/worker/x", "/runs/x",
                 "/audit?after=1"):
        store.ask("GET", "/api" + path)
    store.store.connection.set_trace_callback(None)
    plans: Dict[str, List[str]] = {}
    for statement in seen:
        if re.match(r"\s*(SELECT|UPDATE|DELETE)", statement):
            plans[statement] = [row[3] for row in store.store.connection.execute("EXPLAIN QUERY PLAN " + statement)]
    assert len(plans) > 8
    assert not [plan for plan in plans.items() if any("SCAN" in step or "TEMP B-TREE" in step for step in plan[1])]


def test_lists_of_a_private_farm_walk_over_nothing_of_others(store: Direct) -> None:
    sql = store.store.connection
    sql.executescript("""
        WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 5000)
        INSERT INTO worker (uuid, hostname, pid, created, state, heard, user)
        SELECT 'w' || n, 'h', 1, 0, n % 3, 1.7e9, CASE n % 2500 WHEN 0 THEN 1 ELSE n % 9 + 2 END FROM n;
        WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 5000)
        INSERT INTO run (uuid, first_id, num_tasks, created, num_waiting, num_computing, num_done, num_failed,
            num_untouched, num_complete, millionths, head, head_end, max_failures, max_losses, state, after_any,
            ids_end, has_work, user)
        SELECT 'r' || n, n, 1, 0, 1, 0, 0, 0, 1, 0, 0, n, n + 1, 1, 5, 'open', 0, n + 1, 0,
            CASE n % 2500 WHEN 0 THEN 1 ELSE n % 9 + 2 END
        FROM n;
        UPDATE farm SET next_task_id = 5001;""")
    store.farm.private = True
    steps: List[int] = []
    sql.set_progress_handler(lambda: steps.append(1), 10)
    for path, wanted in (("/runs", "r"), ("/workers?all=True", "w")):
        steps.clear()
        assert [entry["uuid"] for entry in store.ask("GET", "/api" + path)[1]["data"]] == [wanted + "2500",
                                                                                           wanted + "5000"]
        assert len(steps) < 100, path
    sql.set_progress_handler(None, 0)


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


def test_a_file_of_an_older_schema_gets_what_has_come_since_or_stays_as_it_was(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "f")
    direct = Direct(path, FakeClock())
    run = make_run(direct, 3)
    claim(direct, run)
    direct.close()
    later = "ALTER TABLE run ADD COLUMN colour TEXT;\nCREATE INDEX run_colour ON run (colour);\n"
    monkeypatch.setattr(taskfarm, "SCHEMA", taskfarm.SCHEMA + [later + "SELECT no_such_column FROM run;\n"])
    with pytest.raises(Refusal, match="no_such_column"):
        Store(path)
    with contextlib.closing(sqlite3.connect(path)) as file:
        assert file.execute("PRAGMA user_version").fetchone() == (1,), "a script that fails has changed nothing"
    monkeypatch.setattr(taskfarm, "SCHEMA", taskfarm.SCHEMA[:1] + [later])
    direct.start()
    assert direct.store.sql.one("SELECT colour FROM run") == (None,) and figures(direct, run)[:3] == (2, 1, 0)
    direct.close()


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


@pytest.mark.parametrize("owner, database, taken", [
    ("ours", None, True), ("another's", None, False), ("another's", "another's", False),
    ("root and another's", "another's", True), ("root and another's", None, False)])
def test_a_lock_file_is_taken_from_nobody_but_us(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str, database: Optional[str], taken: bool) -> None:
    db, lock = tmp_path / "f", tmp_path / "f.lock"
    lock.write_text("left")
    lock.chmod(0o666)
    us = os.geteuid()
    if us == 0:
        us = 12345
        os.chown(str(lock), us, -1)
    if database:
        db.write_text("")
        os.chown(str(db), us, -1)
    monkeypatch.setattr(os, "geteuid", lambda: {"ours": us, "another's": us + 1}.get(owner, 0))
    if taken:
        with contextlib.closing(taskfarm.Lock(str(db))) as held:
            assert stat.S_IMODE(lock.stat().st_mode) == 0o600
            held.write({"secret": "x"})
        return
    with pytest.raises(Refusal, match="belongs to user .* run this as "):
        taskfarm.Lock(str(db))
    assert lock.read_text() == "left" and stat.S_IMODE(lock.stat().st_mode) == 0o666


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("name", ["f", "f-wal", "f.lock"])
def test_a_file_with_secrets_that_others_could_open_is_closed_to_them(
        tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path, file = str(tmp_path / "f"), tmp_path / name
    Store(path).close()
    taskfarm.Lock(path).close()
    file.touch()
    file.chmod(0o644)
    with contextlib.closing(taskfarm.Lock(path)), contextlib.closing(Store(path)):
        assert {mode_of(each) for each in tmp_path.iterdir()} == {0o600}
    assert ("%s could be opened by others (mode 644)" % file in caplog.text) == (name != "f.lock")
    if name == "f":
        file.chmod(0o640)
        monkeypatch.setattr(os, "chmod", lambda *_: None)
        assert "can be opened by others (mode 640), and its mode cannot be changed" in refused(file)


@pytest.mark.parametrize("name", ["f", "f-wal", "f-journal"])
def test_a_file_of_another_user_is_not_opened_as_a_database_or_its_log(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    (tmp_path / name).chmod(0o666)
    us = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: us + 1)
    with pytest.raises(Refusal, match="belongs to user "):
        Store(str(tmp_path / "f"))
    assert [(each.name, each.read_bytes(), mode_of(each)) for each in tmp_path.iterdir()] == [(name, b"", 0o666)]


def test_what_lies_beside_a_database_must_be_a_plain_file(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("f-wal", "f-journal"):
        for lay in (lambda path: path.symlink_to(victim), os.mkfifo):
            lay(tmp_path / name)
            with pytest.raises(Refusal, match="not a plain file"):
                Store(str(tmp_path / "f"))
            (tmp_path / name).unlink()
    assert victim.read_text() == "precious" and list(tmp_path.iterdir()) == [victim]


def test_a_link_is_followed_when_its_owner_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "f")
    taskfarm.Lock(str(tmp_path / "link")).close()
    assert (tmp_path / "f.lock").exists()
    (tmp_path / "f.lock").unlink()
    os.lchown(tmp_path / "link", 12345 if os.geteuid() == 0 else os.geteuid(), -1)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    for use in (taskfarm.Lock, taskfarm.open_access_log):
        with pytest.raises(Refusal, match="is a link of user "):
            use(str(tmp_path / "link"))
    assert [each.name for each in tmp_path.iterdir()] == ["link"]


def test_who_is_refused_the_lock_changes_nothing_in_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(tmp_path / "f")
    with contextlib.closing(taskfarm.Lock(path)) as first:
        first.write({"host": "login1", "pid": 7, "url": "http://login1:5000"})
        before = (tmp_path / "f.lock").read_bytes()
        os.chmod(path + ".lock", 0o644)
        with pytest.raises(taskfarm.InUse, match="process 7 on login1 serves it at http://login1:5000"):
            taskfarm.Lock(path)
        assert (tmp_path / "f.lock").read_bytes() == before
        assert stat.S_IMODE(os.stat(path + ".lock").st_mode) == 0o600
    assert "could be read by others" in caplog.text
    assert taskfarm.read_holder(path) == {}, "whoever ends cleanly leaves nothing"
    taskfarm.Lock(path).close()


def test_the_lock_file_has_its_block_on_a_full_disk_and_tells_no_half_of_it(tmp_path: Path) -> None:
    path, holder = str(tmp_path / "f"), {"secret": "x" * 300}
    with contextlib.closing(taskfarm.Lock(path)) as lock:
        lock.write(dict(holder, url="an earlier one"))
        blocks = os.stat(path + ".lock").st_blocks
    assert os.stat(path + ".lock").st_blocks == blocks
    with contextlib.closing(taskfarm.Lock(path)) as lock:
        with full_disk(taskfarm.Lock.SIZE):
            lock.write(holder)
        assert taskfarm.read_holder(path) == holder
        with full_disk(100), pytest.raises(OSError):
            lock.write(dict(holder, url="another"))
        assert taskfarm.read_holder(path) == {}
        lock.write(holder)
        assert taskfarm.read_holder(path) == holder


def test_a_start_that_fails_removes_the_file_that_it_made_and_no_other(tmp_path: Path) -> None:
    path = str(tmp_path / "f")
    with full_disk(4096), pytest.raises(Refusal, match="cannot be opened"):
        Store(path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "f").write_bytes(b"")       # as mktemp makes it
    with full_disk(4096), pytest.raises(Refusal, match="cannot be opened"):
        Store(path)
    assert os.path.exists(path)


def test_check_finds_what_is_wrong(store: Direct) -> None:
    run = make_run(store, 5)
    claim(store, run)
    execute = store.store.connection.execute
    for breaking, mending, sentence in [
            ("UPDATE task SET millionths = 7", "UPDATE task SET millionths = 0", "millionths"),
            ("UPDATE task SET status = 0, hold = NULL", "UPDATE task SET status = 1, hold = 2", "waiting, computing"),
            ("UPDATE task SET worker = 77", "UPDATE task SET worker = 1", "never registered"),
            ("UPDATE run SET head = head + 1", "UPDATE run SET head = head - 1", "untouched"),
            ("UPDATE task SET id = 900", "UPDATE task SET id = 1", "belong to no run")]:
        execute(breaking)
        assert any(sentence in wrong for wrong in store.wrong()), sentence
        execute(mending)
    assert store.wrong() == []


def test_a_writer_that_was_told_to_stop_does_not_wait_for_what_never_comes(store: Direct) -> None:
    """The round after the None of `close`, many times: only Python 3.9 and 3.10 hung there, and seldom."""
    def stop_and_look() -> None:
        for _ in range(200000):
            store.store.queue.put(None)
            store.store._take_in(None)
            store.store._take_in(0.0)

    thread = threading.Thread(target=stop_and_look, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


def test_a_read_that_fails_does_not_end_the_writer(farm: Live) -> None:
    @taskfarm.read_operation
    def unreadable(sql: Any, now: Now) -> None:
        raise sqlite3.OperationalError("disk I/O error")
    with pytest.raises(taskfarm.Unavailable):
        farm.service.store.call(unreadable())
    wait_until(lambda: farm.ask("POST", "/api/run", {"numTasks": 1})[0] == 201)


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
    direct.store.call_all([done_by_nobody(run, number) for number in range(2000)])
    direct.ask("POST", "/api/runs/%s/restart?all=True" % run)
    direct.store._note_trouble("the disk is full")
    direct.store.try_again = 1e9
    assert figures(direct, run) == (2000, 0, 0, 0.0)
    assert direct.ask("GET", "/api/runs/%s/tasks/1999" % run)[1]["status"] == "waiting"
    assert claim(direct, run)[0] == 503
    direct.store.try_again = 0.0
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
        assert done.returncode == 0 and "is sound" in done.stdout, done.stderr
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
    store.pass_time(taskfarm.RETRY_S)
    assert report(store, run, 5, status="waiting") == 204
    os.remove(copy.path)


def done_by_nobody(run: str, number: int) -> Operation:
    return taskfarm.report(run, None, taskfarm.Report(number, None, taskfarm.DONE, None))


def test_a_copy_that_nobody_waits_for_is_given_up(store: Direct) -> None:
    run = make_run(store, 10 ** 6)
    store.store.apply([done_by_nobody(run, number) for number in range(40000)])
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


@pytest.mark.parametrize("links", [True, False])
def test_a_backup_is_on_the_disk_under_its_name_or_not_there_at_all(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    Store(str(tmp_path / "f")).close()
    (tmp_path / "safe").mkdir()
    target, real, synced = tmp_path / "safe/copy", os.fsync, []

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            synced.append((os.fstat(descriptor).st_ino, target.exists()))
        real(descriptor)

    def no_links(*_: str) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    monkeypatch.setattr(os, "fsync", fsync)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
        with full_disk(1000), pytest.raises(Refusal, match="cannot be made"):
            taskfarm.place_copy(str(tmp_path / "f"), str(target))
        assert not target.exists(), "no part of a copy under the name of a whole one"
    assert taskfarm.main(["backup", "--db", str(tmp_path / "f"), str(target)]) == 0
    assert (os.stat(str(tmp_path / "safe")).st_ino, True) in synced


def test_a_copy_made_under_load_holds_what_changed_meanwhile(tmp_path: Path) -> None:
    direct = Direct(str(tmp_path / "f"), FakeClock())
    run = make_run(direct, 10 ** 6)
    for first in range(0, 100000, 1000):
        direct.store.apply([done_by_nobody(run, number) for number in range(first, first + 1000)])
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


# Statements over many tasks make of each what the rule makes of it. Rows are written straight into the file, inside a
# transaction that is rolled back.

class Undone(Exception):
    """A trial is over."""


class Trial:
    """An open transaction in which a run is made as a test wants it. The farm has workers 1 (leased), 2 and 3 (not)."""

    def __init__(self, sql: taskfarm.Transaction, now: Now) -> None:
        self.sql, self.now = sql, now

    def do(self, named: Operation) -> Any:
        """Run an operation until it has ended."""
        outcome = named.function(self.sql, self.now, *named.args)
        while isinstance(outcome, taskfarm.Continue):
            outcome = named.function(self.sql, self.now, *outcome.args)
        return outcome

    def plant(self, tasks: List[Optional[Task]], limits: Limits = Limits()) -> List[Task]:  # noqa: B008
        """A run of these tasks; None is one never touched. Gives them with their ids."""
        self.do(taskfarm.create_run("r", len(tasks), None, *limits))
        self.run = run = self.sql.runs["r"]
        planted = [Task(run.first_id + number) if task is None else task._replace(id=run.first_id + number, run=run.id)
                   for number, task in enumerate(tasks)]
        touched = [task for task in planted if task.run]
        taskfarm.touch_each(self.sql, run, [task.id for task in touched])
        self.sql.execute_many("INSERT INTO task (%s) VALUES (%s)" % (
            taskfarm.TASK_COLUMNS, ", ".join("?" * len(Task._fields))), touched)
        run.counts = [sum(task.status == status for task in planted) for status in range(4)]
        run.millionths = sum(task.millionths for task in planted)
        run.num_complete = sum(map(is_complete, planted))
        for task in touched:
            if is_held(task):
                self.sql.holds.add(run.id, task.worker or 0, 1)
        self.sql.changed[run.id] = run
        self.promises_hold()
        return planted

    def rows(self) -> List[Task]:
        """All tasks of the run."""
        found = {task.id: task for task in self.sql.tasks("SELECT " + taskfarm.TASK_COLUMNS + " FROM task")}
        return [found.get(task_id) or Task(task_id) for task_id in range(self.run.first_id, self.run.end_id)]

    def promises_hold(self) -> None:
        assert taskfarm.check().function(self.sql, self.now) == []

    def sweep(self) -> None:
        """Let the rows of a restart follow."""
        sweep = taskfarm.Sweep(self.run)
        while not sweep.step(self.sql):
            pass
        self.run = self.sql.runs["r"]


@contextlib.contextmanager
def trial_of(store: Direct) -> Iterator[Trial]:
    with contextlib.suppress(Undone), store.store._transaction("BEGIN IMMEDIATE") as (sql, now):
        sql.begin_slice(taskfarm.BATCH_S, large=True)
        yield Trial(sql, now)
        raise Undone


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Direct]:
    """A farm for trials."""
    direct = Direct(str(tmp_path_factory.mktemp("trials") / "farm.sqlite"), FakeClock())
    enlist(direct, "a", lease=100)
    enlist(direct, "b", "c")
    yield direct
    direct.close()


WORKERS = {1: "a", 2: "b", 3: "c"}
NOW_MS = int(1.7e12)
HELD_BY = {worker: [task for task in every_task() if is_held(task) and task.worker == worker] for worker in (1, 2)}
a_task = st.one_of(st.none(), st.sampled_from(list(every_task())))
some_tasks = st.lists(a_task, min_size=1, max_size=12)
some_limits = st.builds(Limits, st.integers(0, 3), st.integers(0, 3))
many_trials = settings(max_examples=20 if QUICK else 150, deadline=None, database=None,
                       suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("which", [*RESTARTS, taskfarm.CANCEL])
def test_a_sweep_makes_of_each_task_what_the_rule_makes_of_it(trials: Direct, which: str) -> None:
    with trial_of(trials) as trial:
        planted = trial.plant([None, *every_task(), None])
        expected = [taskfarm.restarted(task, which, task.worker == 1) for task in planted]
        trial.do(taskfarm.cancel_run("r") if which == taskfarm.CANCEL else taskfarm.restart_run("r", which))
        seen = [trial.do(taskfarm.read_task("r", number)).task for number in range(len(planted))]
        assert seen == expected, "at once"
        assert trial.sql.holds.number(1) == sum(is_held(task) and task.worker == 1 for task in expected)
        trial.sweep()
        assert trial.rows() == expected
        trial.promises_hold()


def test_cancelling_tasks_makes_of_each_what_the_rule_makes_of_it(trials: Direct) -> None:
    with trial_of(trials) as trial:
        planted = trial.plant([None, *every_task(), None, None])
        first, last = 1, len(planted) - 2
        trial.do(taskfarm.cancel_tasks("r", ((first, 700), (702, last))))
        trial.promises_hold()
        assert trial.rows() == [
            taskfarm.cancelled(task, NOW_MS)._replace(run=trial.run.id) if number in range(first, last + 1)
            and number != 701 else task for number, task in enumerate(planted)]


@given(tasks=some_tasks, more=st.integers(1, 5), touched=st.sets(st.integers(0, 16), max_size=4), claimed=st.booleans())
@many_trials
def test_tasks_that_a_run_is_extended_by_are_as_those_of_a_new_one(
        trials: Direct, tasks: List[Optional[Task]], more: int, touched: Set[int], claimed: bool) -> None:
    with trial_of(trials) as trial:
        planted = trial.plant(tasks)
        trial.do(taskfarm.extend_run("r", more))
        trial.promises_hold()
        assert trial.rows() == planted + [Task(planted[-1].id + number) for number in range(1, more + 1)]
        assert trial.run.row() == trial.sql.one("SELECT " + taskfarm.Run.COLUMNS + " FROM run WHERE uuid = 'r'")
        for number in sorted(touched):
            if number < trial.run.num_tasks:
                trial.do(taskfarm.report("r", None, Report(number, None, taskfarm.DONE)))
        trial.do(taskfarm.extend_run("r", 2))
        trial.promises_hold()
        waiting = sum(task.status == taskfarm.WAITING for task in trial.rows())
        if claimed:
            assert waiting and len(trial.do(taskfarm.claim_many("r", "c", 100))) == waiting
        else:
            trial.do(taskfarm.cancel_tasks("r", ((0, trial.run.num_tasks - 1),)))
        trial.promises_hold()


@pytest.mark.parametrize("many", [False, True])
def test_a_claim_that_is_refused_begins_no_run(store: Direct, monkeypatch: pytest.MonkeyPatch, many: bool) -> None:
    monkeypatch.setattr(taskfarm, "MAX_BATCH", 2)
    first, second = a_run(store, 2), a_run(store, 1)
    enlist(store, "w", lease=60)
    assert store.ask("POST", "/api/runs/%s/tasks" % first, {"worker_uuid": "w", "count": 2})[0] == 201
    waits = store.ask("POST", "/api/run", {"numTasks": 1, "after": second})[1]["uuid"]
    assert store.ask("PUT", "/api/runs/%s/tasks/0" % second, {"status": "done"})[0] == 204
    body = {"worker_uuid": "w", "count": 1} if many else {"worker_uuid": "w"}
    assert store.ask("POST", "/api/runs/%s/task%s" % (waits, "s" * many), body)[0] == 409
    assert store.ask("GET", "/api/runs/" + waits)[1]["after"] == second


def test_a_run_is_extended_ten_times_and_the_newest_without_end(store: Direct) -> None:
    old, new = make_run(store, 5), make_run(store, 5)
    for run, more, status in ((old, 1045, 204), (old, 1, 409), (new, 1045, 204), (new, 1, 204), (new, 10 ** 7, 204),
                              (new, 2 ** 31 - 1, 400), (old, 1, 409)):
        assert store.ask("POST", "/api/runs/%s/extend" % run, {"numTasks": more})[0] == status
    later = make_run(store, 5)
    assert store.ask("POST", "/api/runs/%s/extend" % new, {"numTasks": 10 ** 8 + 1000})[0] == 409
    enlist(store, "c")
    for run, number in ((old, 1049), (new, 10 ** 7 + 1050), (later, 0)):
        assert report(store, run, number, status="done") == 204
    assert store.wrong() == []


def test_a_cancel_between_two_slices_of_a_restart_stays(store: Direct) -> None:
    run = a_run(store, 3000)
    assert store.ask("PUT", "/api/runs/%s/tasks" % run, {"data": [
        {"task": number, "status": "failed", "message": "no space left"} for number in range(3000)]})[0] == 200
    assert isinstance(store.clock, FakeClock)
    store.clock.step_s = taskfarm.BATCH_S
    store.store.call_all([taskfarm.restart_some(run, taskfarm.RESTART, taskfarm.Selection(like="no * left")),
                          taskfarm.cancel_run(run)])
    store.clock.step_s = 0.0
    assert store.ask("GET", "/api/runs/" + run)[1]["state"] == "cancelled"
    assert store.ask("POST", "/api/runs/%s/restart" % run, {"like": "no * left"})[0] == 200
    assert store.ask("GET", "/api/runs/" + run)[1]["state"] == "open" and store.wrong() == []


def test_a_page_reads_so_many_rows_however_many_ranges_are_asked_for(store: Direct) -> None:
    run = a_run(store, 600)
    assert store.ask("PUT", "/api/runs/%s/tasks" % run, {"data": [
        {"task": number, "status": "failed"} for number in range(600)]})[0] == 200
    spans = ",".join("%d-%d" % (number, number + 1) for number in range(0, 600, 3))
    page = store.ask("GET", "/api/runs/%s/tasks?status=done&tasks=%s" % (run, spans))[1]
    assert page == {"data": [], "next": "1"}, "one range of done tasks may be all of PAGE_ROWS"


def test_many_tasks_are_cancelled_with_a_key_in_slices(store: Direct) -> None:
    run = a_run(store, 5000)
    assert isinstance(store.clock, FakeClock)
    store.clock.step_s = taskfarm.BATCH_S
    for _ in range(2):
        assert store.ask("POST", "/api/runs/%s/cancel" % run, {"tasks": [[0, 3999]]}, "key") == (204, None)
        assert store.ask("GET", "/api/runs/" + run)[1]["numFailed"] == 4000
    store.clock.step_s = 0.0


@pytest.mark.parametrize("selection", [
    taskfarm.Selection([(3, 9), (12, 12), (400, 900)]), taskfarm.Selection(exit_code=3), taskfarm.Selection(like="w*y"),
    taskfarm.Selection([(0, 700)], 3, "why"), taskfarm.Selection(exit_code=4), taskfarm.Selection(like="y*w")], ids=str)
@pytest.mark.parametrize("which", RESTARTS)
def test_a_restart_of_some_makes_of_those_what_the_rule_makes_of_each(
        trials: Direct, which: str, selection: taskfarm.Selection) -> None:
    with trial_of(trials) as trial:
        planted = trial.plant([None, *every_task(), None])
        expected = [taskfarm.restarted(task, which, task.worker == 1) if selection.judges(task) and any(
            first <= number <= last for first, last in selection.spans or [(0, len(planted))]) else task
            for number, task in enumerate(planted)]
        revision = trial.sql.leases.revision_of(1)
        assert trial.do(taskfarm.restart_some("r", which, selection)) == sum(
            before != after for before, after in zip(planted, expected))
        assert trial.rows() == expected
        taken = any(is_held(task) and not is_held(after) and task.worker == 1
                    for task, after in zip(planted, expected))
        assert (trial.sql.leases.revision_of(1) > revision) == taken, "its worker learns that a task was taken from it"
        trial.promises_hold()
        assert trial.do(taskfarm.restart_some("r", which, selection)) == 0, "twice is once"


def test_batches_of_claims_and_single_ones_make_of_each_task_what_the_rule_makes_of_it(trials: Direct) -> None:
    tasks = [*every_task(), None, None, None, Task(0, 1, taskfarm.DONE), None]
    for count, singly in ((5000, False), (700, False), (700, True)):
        with trial_of(trials) as trial:
            planted = trial.plant(tasks)
            waiting = [task for task in planted if task.status == taskfarm.WAITING][:count]
            started = NOW_MS if singly else None
            expected = {task.id: taskfarm.claimed(task, 3, started)._replace(run=trial.run.id) for task in waiting}
            given = ([trial.do(taskfarm.claim("r", "c")) for _ in range(count)] if singly else
                     trial.do(taskfarm.claim_many("r", "c", count)))
            assert trial.rows() == [expected.get(task.id, task) for task in planted]
            assert [(shown.task.id, shown.task.attempt) if singly else (trial.run.first_id + shown[0], shown[1])
                    for shown in given] == [(task.id, task.attempt) for task in expected.values()], "the lowest first"
            assert trial.sql.holds.number(3) == len(expected)
            trial.promises_hold()


@pytest.mark.parametrize("limits", [Limits(1, 0), Limits(0, 1), Limits(0, 3)], ids=str)
def test_what_becomes_of_all_that_a_worker_holds_is_what_the_rule_makes_of_each(trials: Direct, limits: Limits) -> None:
    def ours(task: Task) -> bool:
        return is_held(task) and task.worker == 1

    for ending, becomes in [
            (lambda trial: taskfarm.expire(trial.sql, trial.now, 1, (taskfarm.HELD, 0)),
             lambda task: taskfarm.lapsed(task, limits, NOW_MS)),
            (lambda trial: trial.do(taskfarm.sign_off("a")), taskfarm.given_up)]:
        with trial_of(trials) as trial:
            planted = trial.plant([None, *every_task()], limits)
            ending(trial)
            assert trial.rows() == [becomes(task) if ours(task) else task for task in planted]
            assert trial.sql.holds.number(1) == 0 and trial.sql.holds.number(2) > 0
            trial.promises_hold()
    with trial_of(trials) as trial:
        planted = trial.plant([None, *every_task()], limits)
        trial.do(taskfarm.beat("a"))
        assert trial.rows() == [
            taskfarm.taken_back(task) if task.worker == 1 and task.hold in (taskfarm.LAPSED, taskfarm.LOST) else task
            for task in planted]
        trial.promises_hold()


@given(tasks=some_tasks, limits=some_limits, dice=dices, percent=st.sampled_from([None, 0, 7, FULL]),
       attempt=st.sampled_from([None, 3, 3, 2]), told=st.booleans(),
       said=st.sampled_from([(None, None, None), (0, "m", "l")]))
@many_trials
def test_done_for_consecutive_tasks_is_what_the_rule_makes_of_each(
        trials: Direct, tasks: List[Optional[Task]], limits: Limits, dice: random.Random, percent: Optional[int],
        attempt: Optional[int], told: bool, said: Tuple[Optional[int], Optional[str], Optional[str]]) -> None:
    with trial_of(trials) as trial:
        planted = trial.plant([
            dice.choice(HELD_BY[1] if dice.random() < 0.95 else [task, *HELD_BY[2]]) for task in tasks], limits)
        reports = [Report(number, attempt, taskfarm.DONE, percent, *said, *(
            [dice.randrange(9), dice.choice([None, 7]), dice.choice([None, 8])] if told else [None, 7, 8]))
                   for number in range(len(tasks))]
        all_held = attempt != 2 and said[0] is None and all(is_held(task) and task.worker == 1 for task in planted)
        worker = taskfarm.find_worker(trial.sql, "a")
        assert all_held == taskfarm.finish_span(trial.sql, trial.now, trial.run, worker, reports)
        assert trial.rows() == [taskfarm.reported(task, report, limits, NOW_MS) if all_held else task
                                for task, report in zip(planted, reports)]
        trial.promises_hold()


@given(tasks=some_tasks, limits=some_limits, dice=dices, by=st.sampled_from([None, "a", "b", "unknown"]))
@many_trials
def test_a_batch_of_reports_comes_to_what_single_ones_come_to(
        trials: Direct, tasks: List[Optional[Task]], limits: Limits, dice: random.Random, by: Optional[str]) -> None:
    reports = [some_report(dice, number)._replace(attempt=dice.choice([None, None, 3, 2]))
               for number in range(len(tasks)) if dice.random() < 0.9]
    if reports and dice.random() < 0.5:     # alike, as those of a batch mostly are, and of tasks that the worker holds
        status = dice.choice([reports[0].status, taskfarm.DONE])
        reports = [reports[0]._replace(number=said.number, status=status, exit_code=None,
                                       message=dice.choice([None] * 9 + ["m"]), log=None,
                                       elapsed_ms=dice.choice([None, said.elapsed_ms]),
                                       memory=dice.choice([None, said.memory])) for said in reports]
        tasks = [task if dice.random() < 0.05 else dice.choice(HELD_BY[2 if by == "b" else 1]) for task in tasks]
    ends: List[Any] = []
    for batched in (True, False):
        with trial_of(trials) as trial:
            trial.plant(tasks, limits)
            if batched:
                accepted, refused = trial.do(taskfarm.report_many("r", by, list(reports)))
            else:
                refused = []
                for said in reports:
                    try:
                        trial.do(taskfarm.report("r", by, said))
                    except FarmError as error:
                        refused.append((said.number, str(error)))
                accepted = len(reports) - len(refused)
            trial.promises_hold()
            ends.append((accepted, sorted(refused), trial.rows(), trial.run.row(), dict(trial.sql.holds.totals)))
    assert ends[0] == ends[1]


@given(befores=st.lists(a_task, min_size=1, max_size=12), dice=dices)
@many_trials
def test_many_changes_at_once_come_to_what_single_ones_come_to(
        trials: Direct, befores: List[Optional[Task]], dice: random.Random) -> None:
    possible = list(every_task())
    ends: List[Any] = []
    afters = [dice.choice([*possible[:1], task, dice.choice(possible)]) for task in befores]
    for batched in (True, False):
        with trial_of(trials) as trial:
            planted = trial.plant(befores)
            changes = [(before, before if after is None else after._replace(id=before.id, run=before.run))
                       for before, after in zip(planted, afters)]
            changes = [(before, after._replace(worker=before.worker) if is_held(before) and is_held(after) else after)
                       for before, after in changes]    # nobody claims what another holds
            revisions = {key: trial.sql.leases.revision_of(key) for key in WORKERS}
            if batched:
                taskfarm.change_many(trial.sql, trial.run, changes)
            for before, after in [] if batched else changes:
                taskfarm.change(trial.sql, trial.run, before, after)
            assert trial.rows() == [after._replace(run=trial.run.id) for _, after in changes]
            trial.promises_hold()
            taken = {before.worker for before, after in changes if is_held(before) and not is_held(after)
                     and (after.hold is None or after.hold < taskfarm.GIVEN_UP)}
            risen = {key for key, old in revisions.items() if trial.sql.leases.revision_of(key) > old}
            assert risen == taken
            ends.append((trial.run.row(), trial.sql.holds.by_run, dict(trial.sql.holds.totals)))
    assert ends[0] == ends[1]


# What is remembered between transactions, and what becomes of it when one is rolled back.

def remembered(store: Store) -> Dict[str, Any]:
    """What the writer remembers, but for copies of rows and for when workers were heard."""
    sql = store.sql
    return {"spans": dict(sql.leases.spans), "holds": {run: dict(workers) for run, workers in sql.holds.by_run.items()},
            "totals": dict(sql.holds.totals), "users": dict(sql.users), "copy": sql.copy,
            "sweeps": sorted((sweep.run.row(), sweep.reached) for sweep in store.sweeps)}


def memory_agrees_with_the_file(store: Store) -> None:
    sql = store.sql
    assert not (sql.changed or sql.begun or sql.effects or sql.holds.journal)
    for kind, rows in ((taskfarm.Run, [*sql.runs.values(), *sql.runs_by_id.values()]),
                       (taskfarm.Worker, [*sql.workers.values(), *filter(None, sql.workers_by_id.values())])):
        table = kind.__name__.lower()
        for row in rows:
            stored = kind(sql.one("SELECT %s FROM %s WHERE id = ?" % (kind.COLUMNS, table), row.id))
            for name in kind.__slots__:
                assert getattr(row, name) == getattr(stored, name) or name == "shown", (table, name)
    for task in sql.held.values():
        assert task == taskfarm.Task._make(sql.one(taskfarm.TASK_BY_ID, task.id))
    leased = dict(sql.all("SELECT id, lease FROM worker WHERE state = 0 AND lease IS NOT NULL"))
    assert sql.leases.spans == leased
    assert set(sql.leases.ends) == set(sql.leases.entries) == set(leased)
    assert taskfarm.count_holds(sql).by_run == sql.holds.by_run
    assert sql.holds.totals == taskfarm.count_holds(sql).totals
    assert sql.claim_keys == dict(sql.all("SELECT key, worker FROM last_claim"))
    assert list(sql.users.values()) == taskfarm.every_user(sql)
    assert sorted((sweep.run.id, sweep.kind) for sweep in store.sweeps) == sql.all(
        "SELECT id, sweep FROM run WHERE sweep IS NOT NULL ORDER BY id")


def some_operation(dice: random.Random, runs: List[str]) -> Operation:
    """Something that a client or a keeper may ask for."""
    run, worker, new = dice.choice(runs[-4:]), dice.choice("abcd"), "%x" % dice.getrandbits(64)
    if dice.random() < 0.03:
        runs.append(new)
        return taskfarm.create_run(new, 9, None, 1, 5, dice.choice([None, run]), dice.random() < 0.5)
    key = dice.choice([None, taskfarm.IdempotencyKey(bytes([dice.randrange(6)]) * 16, (worker + run).encode())])
    reports = [some_report(dice, number)._replace(attempt=None) for number in range(4)]
    return dice.choice([
        lambda: taskfarm.register_worker(worker, "node", 1, dice.choice([None, 5, 5, 100])),
        lambda: taskfarm.sign_off(worker),
        lambda: taskfarm.beat(worker),
        lambda: taskfarm.claim(run, worker, key),
        lambda: taskfarm.claim_many(run, worker, dice.randint(1, 5), key),
        lambda: taskfarm.report(run, dice.choice([None, worker, worker]), reports[dice.randrange(4)]),
        lambda: taskfarm.report_many(run, dice.choice([None, worker, worker]), reports),
        lambda: taskfarm.restart_run(run, dice.choice(RESTARTS)),
        lambda: dice.choice([taskfarm.pause_run, taskfarm.resume_run, taskfarm.resume_run, taskfarm.cancel_run])(run),
        lambda: taskfarm.cancel_tasks(run, ((0, 0), (2, 6))), lambda: taskfarm.extend_run(run, 2),
        lambda: taskfarm.answer_once(taskfarm.IdempotencyKey(bytes([dice.randrange(9, 12)]) * 16, run.encode()),
                                     taskfarm.cancel_tasks(run, ((1, 5),)), lambda _: (204, b"")),
        lambda: taskfarm.delete_run(run) if dice.random() < 0.3 else taskfarm.read_run(run),
        lambda: taskfarm.list_runs(0, 10),
        lambda: taskfarm.answer_once(taskfarm.IdempotencyKey(bytes([dice.randrange(6, 9)]) * 16, b"r"),
                                     taskfarm.create_run(new, 9), lambda _: (201, b"")),
        lambda: taskfarm.add_user("eve", "hash"), lambda: taskfarm.set_password("eve", "other"),
        lambda: taskfarm.remove_user("eve"), lambda: taskfarm.begin_copy("1"), taskfarm.probe])()


def failing(named: Operation, error: Exception) -> Operation:
    """The operation, and an error when it has done all."""
    def function(sql: Any, now: Now) -> None:
        named.function(sql, now, *named.args)
        raise error
    return Operation(function, (), named.reads)


@pytest.mark.parametrize("seed", range(3 if QUICK else 30))
def test_memory_is_what_it_was_when_a_transaction_is_rolled_back(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(taskfarm.Sweep, "SLICE", 2)
    for name in ("SMALL", "SLICE", "REPORTS_SLICE", "SPANS_AT_ONCE"):
        monkeypatch.setattr(taskfarm, name, 2)
    dice, clock = random.Random(seed), FakeClock(step_s=taskfarm.BATCH_S * 0.3)
    direct = Direct(str(tmp_path / "f"), clock)
    store, runs = direct.store, ["first", "second", "third"]
    pending: Set[Operation] = set()
    store.apply([taskfarm.create_run(run, 12) for run in runs])
    for _ in range(150):
        clock.pass_time(dice.choice([0, 0, 0, 1, 3, 6]))
        batch = [some_operation(dice, runs) for _ in range(dice.randint(1, 3))]
        before, ends = remembered(store), dict(store.sql.leases.ends)
        alone = not (store.short or store.large or store.refused)
        failure = dice.choice(["", "", "", "fault", "full disk", "full disk in a turn"])
        if failure == "fault":
            batch = [failing(batch[0], ZeroDivisionError())]
        with full_disk(1000) if failure.startswith("full disk") else contextlib.nullcontext():
            if failure == "full disk in a turn":
                batch = []
                store.turn()
                before = before if store.sql.trouble else remembered(store)     # a slice that changes no row succeeds
            ended = store.apply(batch)
        failed = alone and [type(outcome) for _, outcome in ended] == [ZeroDivisionError]
        if failed or store.sql.trouble:
            copies = [outcome for _, outcome in ended if isinstance(outcome, taskfarm.Copy)]    # needs no write
            assert remembered(store) == dict(before, copy=[*copies, before["copy"]][0])
            assert all(store.sql.leases.ends[worker] >= end for worker, end in ends.items())
        memory_agrees_with_the_file(store)
        if store.sql.trouble:
            clock.pass_time(taskfarm.RETRY_S)
            batch.append(taskfarm.probe())
            ended += store.apply(batch[-1:])
            assert not store.sql.trouble
        pending |= set(batch)
        for named, outcome in ended:
            pending.remove(named)
            assert not isinstance(outcome, Exception) or isinstance(outcome, (FarmError, ZeroDivisionError)), outcome
        if dice.random() < 0.3:
            store.turn()
            memory_agrees_with_the_file(store)
        parked = {named for waiting in store.parked.values() for named in waiting}
        assert pending == {*store.short, *store.large, *parked, *(named for named, _ in store.refused)}, (
            "each is answered, and once")
    clock.step_s = 0
    direct.settle()
    direct.close()


# Whose runs and workers are, and who did what.

class Lives:
    """What several users of a private farm do, and what ada is told, with names for all that differs by chance."""

    def __init__(self, path: str, without: str) -> None:
        self.direct, self.without = Direct(path, FakeClock()), without
        self.direct.farm.private = True
        self.runs: List[str] = []
        self.told: List[Tuple[str, Answer]] = []

    def do(self, dice: random.Random) -> None:
        who = dice.choice(["ada", "ada", "bob"])
        run = dice.choice(self.runs) if self.runs else "none"
        worker, mine = dice.choice(["ada-1", "ada-2", "bob-1", "bob-2"]), who + dice.choice(["-1", "-2"])
        path, task = "/api/runs/" + run, {"status": dice.choice(taskfarm.STATUS)}
        if dice.random() < 0.6:
            task["worker_uuid"] = worker
        method, path, body = dice.choice([
            ("POST", "/api/run", {"numTasks": 3}), ("POST", path + "/task", {"worker_uuid": worker}),
            ("POST", path + "/tasks", {"worker_uuid": worker, "count": 2}), ("GET", path, None),
            ("PUT", path + "/tasks/%d" % dice.randrange(3), task), ("DELETE", path, None),
            ("PUT", path + "/tasks", {"worker_uuid": worker, "data": [{"task": 1, "status": "done"}]}),
            ("POST", path + "/restart" + dice.choice(["", "?all=True", "?status=failed"]), None),
            ("POST", path + "/" + dice.choice(["pause", "resume", "resume", "cancel"]), None),
            ("POST", path + "/cancel", {"tasks": [[1, 2]]}), ("POST", path + "/extend", {"numTasks": 1}),
            ("POST", "/api/worker", {"uuid": mine, "hostname": "h", "pid": 1, "lease": dice.choice([1, 5])}),
            ("POST", "/api/worker", {"uuid": mine, "hostname": "h", "pid": 1}), ("GET", path + "/tasks", None),
            ("GET", "/api/worker/" + worker, None), ("PUT", "/api/worker/" + worker, None),
            ("DELETE", "/api/worker/" + worker, None), ("GET", "/api/workers?all=True", None),
            ("GET", "/api/workers", None), ("GET", "/api/runs", None), ("GET", path + "/tasks/2", None)])
        key, later = dice.choice(["", "", "k1", "k2"]), dice.choice([0, 0, 0, 2])
        if path == "/api/run" and who == "bob":
            key = ""        # each such request is a run, and the numbers of runs are the same in both lives
        if who == self.without:
            if path == "/api/run":
                self.runs.append("%032d" % len(self.runs))
        else:
            self.direct.user = User(1 if who == "ada" else 2, who, "", 1)
            answer = self.direct.ask(method, path, body, key)
            if path == "/api/run" and answer[0] == 201:     # or a key brought an earlier one again
                self.runs.append(answer[1]["uuid"])
            if who == "ada":
                self.told.append(("%s %s %s" % (method, self.named(path), body), (answer[0], self.named(
                    re.sub('"(id|revision)": [0-9]+', "", json.dumps(answer[1]))))))
        if later:
            self.direct.pass_time(later)

    def named(self, text: str) -> str:
        for number, run in enumerate(self.runs):
            text = text.replace(run, "run %d" % number)
        return text


@given(seed=st.integers(0, 2 ** 32))
@settings(max_examples=5 if QUICK else 25, deadline=None, database=None)
def test_what_a_user_of_a_private_farm_is_told_does_not_depend_on_others(seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lives = []
        for without in ("", "bob"):
            life, dice = Lives(os.path.join(folder, "f" + without), without), random.Random(seed)
            for _ in range(60):
                life.do(dice)
            life.direct.close()
            lives.append(life.told)
        assert lives[0] == lives[1]


def test_nobody_waits_for_a_run_of_another_user_in_a_private_farm(store: Direct) -> None:
    store.farm.private = True
    run = a_run(store, 2)
    store.user = User(2, "bob", "", 1)
    assert store.ask("POST", "/api/run", {"numTasks": 1, "after": run})[0] == 404
    assert store.ask("POST", "/api/runs/%s/cancel" % run)[0] == 404


def audit_of(farm: Any) -> List[Tuple[Any, ...]]:
    """User, action, object, address and times of each line."""
    store = farm.store if isinstance(farm, Direct) else farm.service.store
    return [line[2:] for line in store.call(taskfarm.list_audit(1000, 0)).entries]


def test_what_is_made_changed_and_removed_is_in_the_audit_and_what_is_refused_is_not(store: Direct) -> None:
    run = store.ask("POST", "/api/run", {"numTasks": 3, "name": "tiles"}, "key")[1]["uuid"]
    store.ask("POST", "/api/run", {"numTasks": 3, "name": "tiles"}, "key")
    enlist(store, "w")
    take(store, run, "w")
    for word in ("?status=failed", "", "?all=True"):
        assert store.ask("POST", "/api/runs/%s/restart%s" % (run, word))[0] == 204
        store.settle()
    for word, body in (("pause", {}), ("resume", {}), ("cancel", {"tasks": [[1, 2], [0, 0]]}), ("cancel", {}),
                       ("extend", {"numTasks": 2})):
        assert store.ask("POST", "/api/runs/%s/%s" % (run, word), body)[0] == 204
        store.settle()
    assert store.ask("DELETE", "/api/runs/" + run)[0] == 204
    for method, path, status in (("DELETE", "", 404), ("POST", "/restart", 404), ("POST", "/restart?all=1", 404)):
        assert store.ask(method, "/api/runs/" + run + path)[0] == status
    store.user = None
    assert store.ask("POST", "/api/users", {"name": "eve", "password": ADAS_HASH})[0] == 201
    assert store.ask("POST", "/api/users", {"name": "eve", "password": ADAS_HASH})[0] == 409
    assert store.ask("PUT", "/api/users/eve", {"password": ADAS_HASH})[0] == 204
    assert store.ask("DELETE", "/api/users/eve")[0] == 204
    store.store.call(taskfarm.add_user("ann", ADAS_HASH))
    lines = audit_of(store)
    assert lines == [("ada", action, run + " tiles" + tasks, "192.0.2.1", 1) for action, tasks in (
        ("new", ""), ("restart failed", ""), ("restart", ""), ("restart all", ""), ("pause", ""), ("resume", ""),
        ("cancel", " 0-2"), ("cancel", ""), ("extend", ""), ("delete", ""))] + [
        (None, "user " + action, "eve", "192.0.2.1", 1) for action in ("add", "passwd", "remove")] + [
        (None, "user add", "ann", "", 1)]
    answers = [store.ask("GET", "/api/audit?limit=6&after=%d" % after)[1] for after in (0, 6, 12)]
    assert [(len(answer["data"]), answer["next"]) for answer in answers] == [(6, "6"), (6, "12"), (2, None)]
    assert answers[0]["data"][0] == {"utc": "2023-11-14T22:13:20.000Z", "user": "ada", "action": "new", "times": 1,
                                     "object": run + " tiles", "address": "192.0.2.1"}


def test_what_was_rolled_back_is_not_in_the_audit(store: Direct) -> None:
    good, bad = taskfarm.create_run("1", 9), failing(taskfarm.create_run("2", 9), ZeroDivisionError())
    assert [type(outcome) for outcome in store.store.call_all([bad, good])] == [ZeroDivisionError, taskfarm.Run]
    assert [line[2] for line in audit_of(store)] == ["1"]


def test_the_audit_keeps_the_latest_of_each_action(store: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskfarm, "AUDIT_LINES", 5)
    store.store.call(taskfarm.add_user("eve", ADAS_HASH))
    for number in range(20):
        store.store.call(taskfarm.create_run(str(number), 9))
    assert [line[1:3] for line in audit_of(store)] == [("user add", "eve")] + [
        ("new", str(number)) for number in range(15, 20)], "what is done often does not push out the rest"


def test_failed_logins_are_a_few_lines_a_minute(store: Direct) -> None:
    store.store.call(taskfarm.add_user("eve", ADAS_HASH))
    failed, written = store.store.note_failed, rows_changed(store)

    def lines() -> List[Tuple[Any, ...]]:
        return [(line[0], line[3], line[4]) for line in audit_of(store) if line[1] == "login failed"]
    failed("eve", "192.0.2.1", 1.7e9)
    store.pass_time(0)
    assert lines() == [("eve", "192.0.2.1", 1)], "the first one at once"
    for number in range(10000):
        failed("eve", "192.0.2.%d" % (number % 100), 1.7e9 + number / 1000)
        failed("hunter%d" % number, "192.0.2.1", 1.7e9)
        store.store.turn()
    assert rows_changed(store) - written < 3 and len(store.store.failed) <= taskfarm.FAILED_LINES + 1
    store.pass_time(taskfarm.FAILED_S)
    assert len(lines()) == taskfarm.FAILED_LINES + 2
    assert lines()[1:3] == [("eve", "192.0.2.0", 100), ("", "192.0.2.1", 10000)], "a name may be a password"
    assert lines()[-1] == ("", "", 20000 - 10000 - (taskfarm.FAILED_LINES - 1) * 100) and sum(
        times for _, _, times in lines()) == 20001
    store.pass_time(taskfarm.FAILED_S)
    assert len(lines()) == taskfarm.FAILED_LINES + 2
    failed("eve", "192.0.2.1", 1.7e9)
    store.restart_server()
    assert len(lines()) == taskfarm.FAILED_LINES + 3, "the end of the server loses none"


def test_failed_logins_that_a_full_disk_did_not_take_are_counted_on(store: Direct) -> None:
    store.store.note_failed("eve", "192.0.2.1", 1.7e9)
    with full_disk(1000):
        store.pass_time(0)
        assert store.store.sql.trouble
    store.store.note_failed("eve", "192.0.2.1", 1.7e9)
    store.pass_time(taskfarm.RETRY_S)
    assert audit_of(store) == [("", "login failed", "", "192.0.2.1", 2)]


# Section 3 of the contract, sentence by sentence, on the store with a clock that stands still.

def enlist(farm: Any, *names: str, lease: Optional[int] = None) -> None:
    """Register workers."""
    for name in names:
        body = {"uuid": name, "hostname": "node-" + name, "pid": 1}
        assert farm.ask("POST", "/api/worker", body if lease is None else dict(body, lease=lease))[0] == 201


def a_run(farm: Any, n: int, **more: Any) -> str:
    """A new run, with workers a and b under leases of 100 s and c without one."""
    status, run = farm.ask("POST", "/api/run", dict(more, numTasks=n))
    assert status == 201
    enlist(farm, "a", "b", lease=100)
    enlist(farm, "c")
    return str(run["uuid"])


def take(farm: Any, run: str, worker: str, key: str = "") -> Any:
    """One claim: the task, or the status when there is none."""
    status, task = farm.ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": worker}, key)
    return task if status == 201 else status


def take_batch(farm: Any, run: str, worker: str, count: int, key: str = "") -> Any:
    """The numbers of the tasks of a batch claim, or the status when there is none."""
    status, answer = farm.ask("POST", "/api/runs/%s/tasks" % run, {"worker_uuid": worker, "count": count}, key)
    return [task["task"] for task in answer["data"]] if status == 201 else status


def tell_batch(farm: Any, run: str, *entries: Dict[str, Any], **more: Any) -> Any:
    """How many reports of a batch were accepted and which tasks were refused, or the status."""
    status, answer = farm.ask("PUT", "/api/runs/%s/tasks" % run, dict(more, data=list(entries)))
    return (answer["accepted"], sorted(entry["task"] for entry in answer["refused"])) if status == 200 else status


def look(farm: Any, run: str, number: int = 0, *names: str) -> Any:
    """Some fields of a task; unless said otherwise its status and attempt."""
    task = farm.ask("GET", "/api/runs/%s/tasks/%d" % (run, number))[1]
    return tuple(task[name] for name in names or ("status", "attempt"))


def blame(farm: Any, run: str, number: int = 0) -> Tuple[str, int, int]:
    """Status, failures and losses of a task."""
    return look(farm, run, number, "status", "failures", "losses")


def beat(farm: Any, worker: str) -> Tuple[int, int]:
    """How many tasks the worker holds, and its revision."""
    status, answer = farm.ask("PUT", "/api/worker/" + worker)
    assert status == 200
    return answer["held"], answer["revision"]


def worker_state(farm: Any, worker: str) -> str:
    return str(farm.ask("GET", "/api/worker/" + worker)[1]["state"])


def test_a_registration_says_the_lease_and_the_last_one_decides(store: Direct) -> None:
    body = {"uuid": "a", "hostname": "n", "pid": 1}
    for lease in (1, 86400, 100):
        status, answer = store.ask("POST", "/api/worker", dict(body, lease=lease))
        assert (status, answer["lease"]) == (201, lease)
    store.pass_time(99)
    assert worker_state(store, "a") == "alive"
    assert store.ask("POST", "/api/worker", body)[1]["lease"] is None
    store.pass_time(1e6)
    assert worker_state(store, "a") == "alive", "it has no lease any more"


@pytest.mark.parametrize("method, path, body, status", [
    ("POST", "/api/runs/{run}/task", {"worker_uuid": "a"}, 201),
    ("POST", "/api/runs/{run}/tasks", {"worker_uuid": "a", "count": 1}, 201),
    ("POST", "/api/runs/none/task", {"worker_uuid": "a"}, 404),
    ("PUT", "/api/runs/{run}/tasks/0", {"worker_uuid": "a", "percentCompleted": 5}, 204),
    ("PUT", "/api/runs/{run}/tasks/1", {"worker_uuid": "a", "percentCompleted": 5}, 409),
    ("PUT", "/api/runs/{run}/tasks", {"worker_uuid": "a", "data": [{"task": 0, "percentCompleted": 5}]}, 200),
    ("PUT", "/api/runs/{run}/tasks", {"worker_uuid": "a", "data": [{"task": 1, "percentCompleted": 5}]}, 200),
    ("PUT", "/api/worker/a", None, 200),
    ("PUT", "/api/worker/a", {}, 200),
    ("POST", "/api/worker", {"uuid": "a", "hostname": "node-a", "pid": 1, "lease": 100}, 201),
], ids=lambda value: str(value))
def test_each_request_that_names_a_worker_renews_its_lease(
        store: Direct, method: str, path: str, body: Any, status: int) -> None:
    run = a_run(store, 5)
    take(store, run, "a")
    store.pass_time(60)
    assert store.ask(method, path.replace("{run}", run), body)[0] == status
    store.pass_time(60)
    assert worker_state(store, "a") == "alive" and look(store, run)[0] == "computing"
    store.pass_time(41)
    assert worker_state(store, "a") == "expired" and look(store, run)[0] == "waiting"


def test_reading_renews_no_lease(store: Direct) -> None:
    run = a_run(store, 5)
    take(store, run, "a")
    store.pass_time(60)
    for path in ("/api/worker/a", "/api/workers", "/api/runs/%s/tasks" % run, "/api/runs/%s/tasks/0" % run):
        assert store.ask("GET", path)[0] == 200
    store.pass_time(41)
    assert worker_state(store, "a") == "expired" and worker_state(store, "b") == "expired"


def test_a_beat_costs_no_write(store: Direct) -> None:
    run = a_run(store, 5)
    take(store, run, "a")
    before = store.store.connection.total_changes
    for _ in range(10):
        store.pass_time(20)
        assert (beat(store, "a")[0], beat(store, "b")[0]) == (1, 0)
    assert store.store.connection.total_changes == before


TAKERS: List[Tuple[str, str, str, Any]] = [     # who loses the task, and what takes it
    ("a", "expiry", "", None),
    ("a", "PUT", "/api/runs/{run}/tasks/0", {"percentCompleted": 3}),
    ("a", "PUT", "/api/runs/{run}/tasks/0", {"status": "computing"}),
    ("a", "PUT", "/api/runs/{run}/tasks", {"data": [{"task": 0, "status": "waiting"}]}),
    ("a", "POST", "/api/runs/{run}/restart?all=True", None),
    ("c", "POST", "/api/runs/{run}/restart", None),
    ("a", "DELETE", "/api/runs/{run}", None),
]


@pytest.mark.parametrize("worker, method, path, body", TAKERS, ids=lambda value: str(value))
def test_a_revision_rises_when_a_task_is_taken(store: Direct, worker: str, method: str, path: str, body: Any) -> None:
    run = a_run(store, 5)
    take(store, run, worker)
    take(store, run, worker)
    held, before = beat(store, worker)
    assert held == 2
    store.restart_server()
    held, after = beat(store, worker)
    assert held == 2 and after >= before
    other = beat(store, "b")[1]
    if method == "expiry":
        store.pass_time(60)
        beat(store, "b")
        store.pass_time(60)
        shown = store.ask("GET", "/api/worker/" + worker)[1]
        assert (shown["held"], shown["state"]) == (0, "expired") and shown["revision"] > after
        assert beat(store, worker)[0] == 2, "all that nobody has claimed since is taken back"
    else:
        assert store.ask(method, path.replace("{run}", run), body)[0] in (200, 204)
        store.settle()
        assert beat(store, worker)[0] == (1 if method == "PUT" else 0)
    assert beat(store, worker)[1] > after
    assert beat(store, "b")[1] == other


def test_a_revision_stays_while_a_worker_claims_reports_and_gives_back(store: Direct) -> None:
    run = a_run(store, 9)
    before = beat(store, "a")[1]
    for number in range(3):
        take(store, run, "a")
        assert report(store, run, number, worker_uuid="a", percentCompleted=3) == 204
    take_batch(store, run, "a", 3)
    for number, status in enumerate(["done", "failed", "waiting"]):
        assert report(store, run, number, worker_uuid="a", status=status) == 204
    assert beat(store, "a") == (3, before)


def test_a_worker_shows_what_it_holds_in_pages(store: Direct) -> None:
    run, other = a_run(store, 9), a_run(store, 2)
    take_batch(store, run, "a", 4)
    take(store, other, "a")
    take(store, other, "b")
    report(store, run, 1, worker_uuid="a", status="done")
    tasks = walk(store, "/api/worker/a", "limit=2")
    assert sorted((task["run"], task["task"]) for task in tasks) == sorted(
        [(run, 0), (run, 2), (run, 3), (other, 0)])
    assert all(task["attempt"] == 1 and task["status"] == "computing" for task in tasks)
    status, shown = store.ask("GET", "/api/worker/a?limit=1")
    assert len(shown["data"]) == 1 and shown["next"]
    assert set(shown) == {"uuid", "id", "hostname", "pid", "lease", "heard", "held", "revision", "state", "data",
                          "next", "job", "why"}
    assert (shown["uuid"], shown["hostname"], shown["pid"], shown["lease"], shown["held"], shown["state"]) == (
        "a", "node-a", 1, 100, 4, "alive")
    assert [store.ask(method, "/api/worker/none")[0] for method in ("GET", "PUT", "DELETE")] == [404] * 3


def test_a_sign_off_lets_tasks_wait_and_blames_nobody(store: Direct) -> None:
    run = a_run(store, 5, maxLosses=1)
    take(store, run, "a")
    take_batch(store, run, "a", 2)
    assert [store.ask("DELETE", "/api/worker/a")[0] for _ in range(2)] == [204, 204]
    assert [blame(store, run, number) for number in range(3)] == [("waiting", 0, 0)] * 3
    assert worker_state(store, "a") == "signed off"
    assert (take(store, run, "a"), take_batch(store, run, "a", 2), store.ask("PUT", "/api/worker/a")[0]) == (409,) * 3
    store.restart_server()
    assert take(store, run, "a") == 409, "also after a restart of the server"
    enlist(store, "a", lease=100)
    assert worker_state(store, "a") == "alive" and take(store, run, "a")["attempt"] == 2


def test_what_is_claimed_after_a_large_sign_off_is_kept(store: Direct) -> None:
    run = a_run(store, taskfarm.MAX_BATCH + 2)
    assert len(take_batch(store, run, "c", taskfarm.MAX_BATCH)) == taskfarm.MAX_BATCH
    take(store, run, "c")
    assert store.ask("DELETE", "/api/worker/c")[0] == 204
    enlist(store, "c")
    assert take(store, run, "c")["task"] == 0
    store.pass_time(1)
    assert beat(store, "c")[0] == 1 and figures(store, run)[1] == 1


@pytest.mark.parametrize("body, status", [
    ({"percentCompleted": 7}, 409), ({"status": "computing"}, 409), ({"status": "waiting"}, 409),
    ({"status": "done"}, 204), ({"status": "failed"}, 204)], ids=str)
def test_who_has_signed_off_can_bring_a_result_and_nothing_else(store: Direct, body: Any, status: int) -> None:
    run = a_run(store, 1)
    take(store, run, "a")
    store.ask("DELETE", "/api/worker/a")
    assert report(store, run, 0, worker_uuid="a", attempt=1, **body) == status
    assert look(store, run) == (body["status"] if status == 204 else "waiting", 1)
    if status == 409:
        assert take(store, run, "b")["attempt"] == 2


def test_a_lease_that_runs_out_lets_tasks_wait(store: Direct) -> None:
    run = a_run(store, 3)
    take(store, run, "a")
    report(store, run, 0, worker_uuid="a", percentCompleted=40)
    take_batch(store, run, "a", 1)
    store.pass_time(99)
    assert look(store, run) == ("computing", 1)
    store.pass_time(2)
    assert blame(store, run, 0) == ("waiting", 0, 1), "it was started"
    assert blame(store, run, 1) == ("waiting", 0, 0), "it was not"
    task = take(store, run, "b")
    assert (task["task"], task["attempt"], task["percentCompleted"], task["losses"]) == (0, 2, 40.0, 1)


@pytest.mark.parametrize("ending", [taskfarm.sign_off("a"), taskfarm.register_worker("a", "node-a", 1, None)],
                         ids=["sign off", "register without a lease"])
def test_a_lease_runs_on_when_its_end_met_a_full_disk(store: Direct, ending: Operation) -> None:
    @taskfarm.operation
    def fill(sql: Any, now: Now) -> None:
        raise sqlite3.OperationalError("database or disk is full")
    run = a_run(store, 1)
    take(store, run, "a")
    outcomes = [outcome for _, outcome in store.store.apply([ending, fill()])]
    assert [type(outcome) for outcome in outcomes] == [taskfarm.Unavailable] * 2
    store.pass_time(101)
    assert look(store, run) == ("waiting", 1) and worker_state(store, "a") == "expired"


def test_who_lives_again_in_the_first_write_after_a_full_disk_can_expire_again(store: Direct) -> None:
    run = a_run(store, 1)
    store.pass_time(101)
    store.store._note_trouble("the disk is full")
    assert beat(store, "a")[0] == 0 and worker_state(store, "a") == "expired", "it is answered, and nothing is written"
    store.pass_time(taskfarm.RETRY_S)
    assert take(store, run, "a")["attempt"] == 1
    store.restart_server()
    assert worker_state(store, "a") == "alive"
    store.pass_time(101)
    assert look(store, run) == ("waiting", 1)


@pytest.mark.parametrize("lease", [None, 1])
def test_of_workers_that_went_memory_is_bounded(
        store: Direct, monkeypatch: pytest.MonkeyPatch, lease: Optional[int]) -> None:
    monkeypatch.setattr(taskfarm.Leases, "REMEMBERED", 5)
    run = a_run(store, 5)
    take(store, run, "a")
    report(store, run, 0, status="computing")
    revisions = [beat(store, worker)[1] for worker in "abc"]
    for number in range(20):
        enlist(store, "w%d" % number, lease=lease)
        store.pass_time(2)
        beat(store, "a")
    assert len(store.store.sql.leases.heard) <= 5 + 3
    assert all(beat(store, worker)[1] >= revision for worker, revision in zip("abc", revisions))


def test_no_lease_is_never_timed_out(store: Direct) -> None:
    run = a_run(store, 2)
    take(store, run, "c")
    store.pass_time(1e7)
    assert look(store, run) == ("computing", 1) and worker_state(store, "c") == "alive"
    assert report(store, run, 0, worker_uuid="c", attempt=1, status="done") == 204


@pytest.mark.parametrize("body, after", [
    (None, ("computing", 1)), ({"percentCompleted": 7}, ("computing", 1)), ({"status": "computing"}, ("computing", 1)),
    ({"status": "done"}, ("done", 1)), ({"status": "failed"}, ("failed", 1)), ({"status": "waiting"}, ("waiting", 1))],
    ids=str)
@pytest.mark.parametrize("names", [{"worker_uuid": "a"}, {"attempt": 1}, {"worker_uuid": "a", "attempt": 1}], ids=str)
def test_the_last_holder_takes_it_back_until_somebody_else_claims(
        store: Direct, body: Any, after: Any, names: Any) -> None:
    run = a_run(store, 1)
    take(store, run, "a")
    store.pass_time(101)
    assert blame(store, run) == ("waiting", 0, 1)
    if body is None:
        assert beat(store, "a")[0] == 1
    else:
        assert report(store, run, 0, **body, **names) == 204
    assert look(store, run) == after and blame(store, run)[2] == 0, "the loss is undone"
    assert worker_state(store, "a") == "alive" or "worker_uuid" not in names and after[0] in ("done", "failed")
    store.pass_time(101)
    assert blame(store, run) == (("waiting", 0, 1) if after[0] == "computing" else (after[0], after[0] == "failed", 0))


def test_who_comes_back_after_somebody_elses_claim_spoils_nothing(store: Direct) -> None:
    run = a_run(store, 1)
    take(store, run, "a")
    store.pass_time(60)
    beat(store, "b")
    store.pass_time(60)
    assert take(store, run, "b")["attempt"] == 2
    before = store.ask("GET", "/api/runs/%s/tasks/0" % run)[1]
    assert beat(store, "a")[0] == 0
    for names in ({"worker_uuid": "a"}, {"attempt": 1}, {"worker_uuid": "a", "attempt": 1},
                  {"worker_uuid": "a", "attempt": 2}):
        for body in ({"percentCompleted": 7}, {"status": "done"}, {"status": "failed"}, {"status": "waiting"}):
            assert report(store, run, 0, **body, **names) == 409
            assert tell_batch(store, run, dict(body, task=0, **{name: value for name, value in names.items()
                                                                if name == "attempt"}), worker_uuid="a") == (0, [0])
    assert store.ask("GET", "/api/runs/%s/tasks/0" % run)[1] == before
    assert report(store, run, 0, worker_uuid="b", attempt=2, status="done") == 204


def test_the_same_worker_that_claims_again_ends_its_earlier_hold(store: Direct) -> None:
    run = a_run(store, 1)
    take(store, run, "a")
    store.pass_time(101)
    assert take(store, run, "a")["attempt"] == 2
    assert report(store, run, 0, worker_uuid="a", attempt=1, status="done") == 409
    assert blame(store, run) == ("computing", 0, 1) and beat(store, "a")[0] == 1


@pytest.mark.parametrize("word", ["", "?status=failed", "?all=True"])
def test_a_beat_while_the_rows_of_a_restart_follow_spoils_no_figure(store: Direct, word: str) -> None:
    run = a_run(store, 3, maxLosses=1)
    for _ in range(2):
        take(store, run, "a")
    take_batch(store, run, "a", 1)
    store.pass_time(101)
    assert figures(store, run)[:3] == (1, 0, 0)
    assert store.ask("POST", "/api/runs/%s/restart%s" % (run, word))[0] == 204
    beat(store, "a")
    store.settle()
    assert store.wrong() == []
    assert beat(store, "a")[0] == (0 if "all" in word else 3), "what has only lapsed is had back"
    assert figures(store, run)[:3] == ((3, 0, 0) if "all" in word else (0, 3, 0))


def test_a_server_that_starts_gives_everybody_a_whole_lease(store: Direct) -> None:
    run = a_run(store, 1)
    take(store, run, "a")
    store.pass_time(60)
    store.restart_server()
    store.pass_time(60)
    assert look(store, run)[0] == "computing"
    store.pass_time(41)
    assert look(store, run)[0] == "waiting"


def test_the_lapse_is_remembered_over_a_restart_of_the_server(store: Direct) -> None:
    run = a_run(store, 2)
    take(store, run, "a")
    take(store, run, "a")
    store.pass_time(101)
    store.restart_server()
    assert blame(store, run) == ("waiting", 0, 1)
    assert report(store, run, 0, worker_uuid="a", attempt=1, status="done") == 204
    assert beat(store, "a")[0] == 1 and blame(store, run, 1) == ("computing", 0, 0)


def test_a_worker_holds_at_most_10000_tasks(store: Direct) -> None:
    run = a_run(store, 30000)
    assert take_batch(store, run, "a", 9000) == list(range(9000))
    assert take_batch(store, run, "a", 9000) == list(range(9000, 10000)), "fewer, as there is room"
    assert (take(store, run, "a"), take_batch(store, run, "a", 1)) == (409, 409)
    assert report(store, run, 5, worker_uuid="a", status="waiting") == 204
    assert take(store, run, "a")["task"] == 5
    assert take_batch(store, run, "c", 10000) == list(range(10000, 20000))
    assert take_batch(store, run, "c", 1) == 409, "batches are for any worker the same"
    assert beat(store, "a")[0] == 10000
    store.pass_time(101)
    store.pass_time(0)
    assert figures(store, run)[:2] == (20000, 10000)
    assert beat(store, "a")[0] == 10000 and blame(store, run, 9999) == ("computing", 0, 0)


def test_workers_are_listed_with_what_they_hold(store: Direct) -> None:
    run = a_run(store, 9)
    take_batch(store, run, "a", 3)
    enlist(store, "d", lease=1000)
    store.pass_time(60)
    take(store, run, "a")
    store.ask("DELETE", "/api/worker/c")
    store.pass_time(60)
    listed = {worker["uuid"]: worker for worker in walk(store, "/api/workers", "all=True", "limit=1")}
    assert {name: (worker["held"], worker["state"]) for name, worker in listed.items()} == {
        "a": (4, "alive"), "b": (0, "expired"), "c": (0, "signed off"), "d": (0, "alive")}
    assert set(listed["a"]) == {"uuid", "id", "hostname", "pid", "lease", "heard", "held", "state", "job", "why"}
    assert listed["a"]["heard"] > listed["d"]["heard"], "times of one form sort as texts"
    living = store.ask("GET", "/api/workers")[1]
    assert sorted(worker["uuid"] for worker in living["data"]) == ["a", "d"] and living["next"] is None
    assert store.ask("GET", "/api/workers?all=False") == (200, living)


def test_a_worker_tells_its_job_and_why_that_failed_until_it_lives_again(store: Direct) -> None:
    body = {"uuid": "a", "hostname": "node-a", "pid": 1, "lease": 5}
    assert store.ask("POST", "/api/worker", dict(body, job="slurm:7_1"))[0] == 201
    enlist(store, "b", lease=5)
    assert store.ask("DELETE", "/api/worker/a?why=no%20licence")[0] == 204
    store.restart_server()

    def latest(*query: str) -> List[Tuple[str, Optional[str], Optional[str]]]:
        return [(worker["uuid"], worker["job"], worker["why"])
                for worker in walk(store, "/api/workers", "order=latest", "limit=1", *query)]
    assert latest("all=True") == [("b", None, None), ("a", "slurm:7_1", "no licence")]
    assert latest() == [("b", None, None)]
    assert store.ask("POST", "/api/worker", body)[0] == 201
    assert latest("all=True") == [("b", None, None), ("a", "slurm:7_1", None)]
    assert latest("all=False") == [("b", None, None), ("a", "slurm:7_1", None)]


def test_workers_are_forgotten_30_days_after_the_last_hold(store: Direct) -> None:
    run = a_run(store, 3)
    for worker in ("a", "b", "c"):
        take(store, run, worker)
    for number, worker in enumerate(["a", "b"]):
        assert report(store, run, number, worker_uuid=worker, status="done") == 204
    for _ in range(28):
        store.pass_time(86400)
    assert look(store, run, 0, "worker", "hostname") == ("a", "node-a")
    beat(store, "b")
    for _ in range(4):
        store.pass_time(86400)
        store.pass_time(0)
    known = {worker["uuid"] for worker in walk(store, "/api/workers", "all=True")}
    assert "a" not in known and "c" in known, "who holds a task is not forgotten"
    assert look(store, run, 0, "status", "worker", "hostname") == ("done", None, None)
    assert store.ask("PUT", "/api/worker/a")[0] == 404 and store.wrong() == []
    enlist(store, "a", lease=100)
    assert report(store, run, 0, worker_uuid="a", attempt=1, status="failed") == 409, "it is another one"


def test_a_leased_task_behind_a_thousand_without_a_lease_may_come_back_too(store: Direct) -> None:
    run = a_run(store, 1101)
    assert len(take_batch(store, run, "c", 1100)) == 1100
    assert take(store, run, "a")["task"] == 1100
    assert (take(store, run, "c"), store.retry_after is not None) == (204, True)
    report(store, run, 1100, worker_uuid="a", status="done")
    assert (take(store, run, "c"), store.retry_after) == (204, None)


def test_no_step_of_the_clock_forgets_a_worker_or_a_key(store: Direct) -> None:
    assert isinstance(store.farm.clock, FakeClock)
    status, run = store.ask("POST", "/api/run", {"numTasks": 3}, "key")
    enlist(store, "c")
    for step_s in (40 * 86400, -90 * 86400):
        store.farm.clock.utc += step_s
        store.pass_time(2 * taskfarm.FORGET_CHECK_S)
        assert store.ask("POST", "/api/run", {"numTasks": 3}, "key") == (201, run)
        assert store.ask("PUT", "/api/worker/c")[0] == 200
    store.pass_time(86400)
    assert store.ask("POST", "/api/run", {"numTasks": 3}, "key")[1]["uuid"] != run["uuid"], "time that passes does"


def test_a_claim_in_vain_says_when_to_ask_again(store: Direct) -> None:
    run = a_run(store, 2, maxLosses=1)

    def pause(worker: str = "c") -> Optional[int]:
        statuses = take(store, run, worker), store.retry_after, take_batch(store, run, worker, 1), store.retry_after
        assert statuses[0::2] == (204, 204) and (statuses[1] is None) == (statuses[3] is None)
        return int(statuses[1]) if statuses[1] else None
    assert (take(store, run, "a")["task"], store.retry_after) == (0, None), "only when nothing was given"
    take(store, run, "c")
    enlist(store, "a", lease=86400)
    pauses = [pause() for _ in range(30)]
    assert all(seconds is not None and 1 <= seconds <= 60 for seconds in pauses)
    enlist(store, "a", lease=30)
    pauses = [pause() for _ in range(60)]
    assert all(seconds is not None and 1 <= seconds <= 60 for seconds in pauses) and len(set(pauses)) > 3
    enlist(store, "a", lease=1)
    assert pause() is not None
    report(store, run, 0, worker_uuid="a", status="done")
    assert pause() is None, "a worker without a lease may compute for ever"
    report(store, run, 0, status="waiting")
    take(store, run, "a")
    assert pause() is not None
    report(store, run, 0, status="computing")
    assert pause() is None, "nobody holds it"
    report(store, run, 0, status="waiting")
    take(store, run, "a")
    store.pass_time(2)
    assert look(store, run)[0] == "failed" and pause() is None
    store.ask("POST", "/api/runs/%s/restart?all=True" % run)
    assert take_batch(store, run, "b", 2) == [0, 1] and pause() is not None
    store.restart_server()
    assert pause() is not None


def register(farm: Any, worker: str, lease: Optional[int]) -> int:
    """The status of a registration."""
    body = {"uuid": worker, "hostname": "node-" + worker, "pid": 1}
    return int(farm.ask("POST", "/api/worker", body if lease is None else dict(body, lease=lease))[0])


@pytest.mark.parametrize("lease_s, wanted_s", [(None, 5), (100, 5), (5, 100), (100, None)])
def test_a_registration_that_a_full_disk_refuses_changes_no_lease(
        store: Direct, lease_s: Optional[int], wanted_s: Optional[int]) -> None:
    run = a_run(store, 1)
    assert register(store, "a", lease_s) == 201
    take(store, run, "a")
    with full_disk(1000):
        assert register(store, "a", wanted_s) == 503
    store.pass_time((lease_s or 1000) - 1)
    assert look(store, run) == ("computing", 1)
    store.pass_time(2)
    assert look(store, run)[0] == ("computing" if lease_s is None else "waiting")


@pytest.mark.parametrize("first", [taskfarm.sign_off("a"), taskfarm.register_worker("a", "node-a", 1, None)],
                         ids=["sign off", "no lease"])
def test_a_registration_in_the_transaction_that_ended_the_lease_begins_another(store: Direct, first: Operation) -> None:
    run = a_run(store, 1)
    again = Operation(first.function, first.args, False), taskfarm.register_worker("a", "node-a", 1, 100)
    store.store.call_all([*again, taskfarm.claim(run, "a")])
    store.pass_time(99)
    assert look(store, run) == ("computing", 1)
    store.pass_time(2)
    assert look(store, run) == ("waiting", 1) and worker_state(store, "a") == "expired"


def test_a_clock_that_was_a_year_ahead_and_is_set_right_forgets_nobody(tmp_path: Path) -> None:
    clock, year_s = FakeClock(), 365 * 86400.0
    direct = Direct(str(tmp_path / "f"), clock)
    enlist(direct, "before")
    clock.utc += year_s
    direct.restart_server()
    enlist(direct, "ahead")
    assert direct.ask("PUT", "/api/worker/before")[0] == 200
    clock.utc -= year_s
    enlist(direct, "after")
    for restarted in (False, True):
        if restarted:
            direct.restart_server()
        for _ in range(3):
            for worker in ("before", "ahead", "after"):
                assert direct.ask("PUT", "/api/worker/" + worker)[0] == 200
            clock.pass_time(taskfarm.FORGET_CHECK_S)
            direct.pass_time(1)
    direct.close()


def test_workers_are_forgotten_beside_tasks_that_come_back(tmp_path: Path) -> None:
    """One transaction of the writer: two leases end, and somebody is forgotten between them."""
    clock = FakeClock(step_s=1e-4)
    direct = Direct(str(tmp_path / "f"), clock)
    run = a_run(direct, 4)
    for worker in "ab":
        enlist(direct, worker, lease=86400)
        take(direct, run, worker)
    enlist(direct, "silent")
    for _ in range(30):
        clock.pass_time(86000)
        assert beat(direct, "a")[0] == beat(direct, "b")[0] == 1
    clock.pass_time(2 * 86400)
    direct.store.turn()
    assert figures(direct, run)[:3] == (4, 0, 0)
    assert direct.ask("PUT", "/api/worker/silent")[0] == 404 and direct.ask("PUT", "/api/worker/a")[0] == 200
    direct.close()


def test_a_sweep_that_ended_in_a_transaction_that_was_rolled_back_spoils_no_figure(tmp_path: Path) -> None:
    """Between the end of the sweep and the rollback a lease ends, and changes the figures of the same run."""
    clock = FakeClock(step_s=1e-4)
    direct = Direct(str(tmp_path / "f"), clock)
    run = a_run(direct, 9)
    enlist(direct, "d", lease=105)
    take(direct, run, "a"), take(direct, run, "d")
    clock.pass_time(90)
    assert direct.store.apply([taskfarm.restart_run(run, taskfarm.RESTART)])[0][1] is None
    for _ in range(2):      # the second time nothing is left to be swept but the mark
        clock.pass_time(20)
        with full_disk(1000):
            direct.store.turn()
        assert direct.store.sql.trouble
    for _ in range(3):      # with the disk, everybody gets a whole lease again
        direct.pass_time(60)
    assert figures(direct, run)[:3] == (9, 0, 0)
    direct.close()


def swept_run(direct: Direct) -> str:
    """A run whose rows follow a restart, and go on following for many turns."""
    run = make_run(direct, 3000)
    while figures(direct, run)[0]:
        take_batch(direct, run, "w", 3000)
    assert direct.ask("POST", "/api/runs/%s/restart?all=True" % run)[0] == 204 and direct.store.sweeps
    return run


def test_what_waits_for_a_restart_is_dropped_with_its_client_and_refused_at_a_stop(tmp_path: Path) -> None:
    direct = Direct(str(tmp_path / "f"), FakeClock(step_s=1.0))
    run, store = swept_run(direct), direct.store
    claims = [taskfarm.claim(run, "w") for _ in range(3)]
    assert store.apply(claims) == [] and len(store.parked[run]) == 3
    claims[0].unwanted = True
    direct.settle()
    assert {named for named, _ in store.apply([])} == set(claims[1:]) and figures(direct, run)[1] == 2
    run = swept_run(direct)
    claims = [taskfarm.claim(run, "w") for _ in range(2)]
    claims[1].begun = True
    assert store.apply(claims) == []
    store.refuse_parked()
    refused = dict(store.apply([]))
    assert [str(refused[named]).partition(":")[0] for named in claims] == [
        "nothing was changed", "only a part was done, so send it all again"]
    direct.settle()
    direct.close()


def test_the_same_restart_again_while_its_rows_follow_waits_for_nothing(tmp_path: Path) -> None:
    direct = Direct(str(tmp_path / "f"), FakeClock(step_s=1.0))
    run = swept_run(direct)
    assert [outcome for _, outcome in direct.store.apply([taskfarm.restart_run(run, taskfarm.RESTART_ALL)])] == [None]
    assert direct.store.apply([taskfarm.restart_run(run, taskfarm.RESTART)]) == [] and direct.store.parked
    direct.settle()
    direct.close()


def test_a_worker_whose_request_waits_is_not_silent_and_one_in_a_swept_run_loses_the_rest(tmp_path: Path) -> None:
    direct = Direct(str(tmp_path / "f"), FakeClock())
    run = a_run(direct, 5)
    other, store, clock = make_run(direct, 3000), direct.store, direct.clock
    assert isinstance(clock, FakeClock)
    for worker in ("c", "d"):
        enlist(direct, worker, lease=10)
        take(direct, run, worker)
        take(direct, other, worker)
    assert direct.ask("POST", "/api/runs/%s/restart?all=True" % other)[0] == 204
    assert store.apply([taskfarm.claim(other, "c")]) == [] and store.parked
    clock.pass_time(10.5)
    clock.step_s = 1.0          # so that the rows of the restart do not follow in one turn
    sweeps, store.sweeps = store.sweeps, type(store.sweeps)()
    for _ in range(4):
        store.turn()
    store.sweeps = sweeps
    clock.step_s = 0.0
    assert look(direct, run, 0) == ("computing", 1), "the request of c waits in the server"
    assert look(direct, run, 1) == ("waiting", 1), "d is silent; what it holds of another run is not kept back"
    direct.settle()
    store.apply([])
    direct.close()


def test_a_rollback_of_others_sends_no_sweep_back(tmp_path: Path) -> None:
    direct = Direct(str(tmp_path / "f"), FakeClock(step_s=1.0))
    run, other = make_run(direct, 3000), make_run(direct, 1)
    while figures(direct, run)[0]:
        take_batch(direct, run, "w", 3000)
    direct.ask("POST", "/api/runs/%s/restart?all=True" % run)
    direct.store.turn()
    (sweep,) = direct.store.sweeps
    reached = sweep.reached
    assert reached > sweep.run.first_id
    with full_disk(1000):
        assert report(direct, other, 0, status="done") == 503
    assert sweep.reached == reached
    direct.clock.pass_time(taskfarm.RETRY_S)
    direct.close()


def test_an_operation_is_answered_also_where_no_transaction_can_begin(store: Direct) -> None:
    run = make_run(store, 1)
    store.store.connection.execute("BEGIN")     # so that another is refused
    (_, outcome), = store.store.apply([taskfarm.claim(run, "w")])
    assert isinstance(outcome, sqlite3.Error)
    store.store.connection.execute("ROLLBACK")
    assert claim(store, run) == (201, 0)


def begun_writes(store: Direct) -> List[str]:
    """The transactions that are begun for writing from here on."""
    begun: List[str] = []
    store.store.connection.set_trace_callback(
        lambda statement: begun.append(statement) if statement == "BEGIN IMMEDIATE" else None)
    return begun


def test_on_a_full_disk_one_write_a_second_is_tried_and_memory_is_kept(store: Direct) -> None:
    run = a_run(store, 200)
    take_batch(store, run, "a", 100)
    begun = begun_writes(store)
    with full_disk(1000):
        for second in range(1, 4):
            known = set()
            for number in range(20):
                assert report(store, run, number, worker_uuid="a", status="done") == 503
                assert store.ask("GET", "/readyz")[0] == 503 and figures(store, run)[1] == 100
                assert beat(store, "a")[0] == 100
                store.store.turn()
                known.add((store.store.sql.runs[run], store.store.sql.workers["a"]))
            assert (len(begun), len(known)) == (second, 1), "looked up again once a second"
            assert isinstance(store.clock, FakeClock)
            store.clock.pass_time(taskfarm.RETRY_S)
    assert report(store, run, 0, worker_uuid="a", status="done") == 204


def test_after_a_fault_the_rest_of_the_batch_tries_a_full_disk_once(store: Direct) -> None:
    run = make_run(store, 9)
    begun = begun_writes(store)
    batch = [*(done_by_nobody(run, number) for number in range(5)), taskfarm.read_run(run)]
    with full_disk(1000):
        ended = store.store.apply([*batch, failing(taskfarm.probe(), ZeroDivisionError())])
    assert [type(outcome).__name__ for _, outcome in ended] == ["Unavailable"] * 6 + ["Run"]
    assert len(begun) == 2 and store.store.sql.trouble, "all together, then the first alone"


def test_a_lease_of_changing_length_leaves_few_entries(store: Direct) -> None:
    run = a_run(store, 1)
    take(store, run, "b")
    for number in range(1000):
        register(store, "a", (5, 86400, 300, 7)[number % 4])
        store.pass_time(0.01)
    for number in range(300):
        enlist(store, "w%d" % number, lease=86400)
        assert store.ask("DELETE", "/api/worker/w%d" % number)[0] == 204
    leases = store.store.sql.leases
    assert len(leases.due) <= 2 * len(leases.entries) + 65 and len(leases.entries) == 2
    register(store, "a", 7)
    store.pass_time(8)
    assert worker_state(store, "a") == "expired" and worker_state(store, "b") == "alive"
    store.pass_time(100)
    assert worker_state(store, "b") == "expired" and not leases.entries


class Timed:
    """A store whose writer's stopwatch is the fake clock, run a round at a time. Worker a has a lease of *lease_s*."""

    def __init__(self, path: str, lease_s: int) -> None:
        self.clock = FakeClock()
        self.commit_s = 0.0
        self.store = Store(path, self.clock, lambda: self.clock.tick)
        self.store.call(taskfarm.register_worker("a", "node", 1, lease_s))
        self.store.connection.set_trace_callback(self.wait_for_the_disk)
        self.store.awake = self.clock.tick

    def wait_for_the_disk(self, statement: str) -> None:
        if statement == "COMMIT":
            self.clock.pass_time(self.commit_s)

    def round(self, *operations: Operation) -> None:
        for named in operations:
            named.came = 0.0        # it may be the same as in the round before
        self.store.submit(list(operations))
        self.store._round(0.0)

    def passing(self, seconds: float) -> Operation:
        """An operation that takes so long."""
        return Operation(lambda *_: self.clock.pass_time(seconds), (), True)

    def rounds_until_it_expires(self, *operations: Operation) -> int:
        for number in range(30):
            if self.store.sql.workers_by_id[1].state == taskfarm.EXPIRED:   # type: ignore[union-attr]
                return number
            self.round(*operations)
        return 30


@pytest.fixture
def timed(tmp_path: Path) -> Iterator[Timed]:
    timed = Timed(str(tmp_path / "f"), 10)
    yield timed
    assert timed.store.call(taskfarm.check()) == []
    timed.store.close()


def test_long_batches_are_not_taken_for_a_process_that_was_stopped(timed: Timed) -> None:
    timed.store.call(taskfarm.register_worker("b", "node", 1, 3))
    for _ in range(40):     # of six at a time, each of which takes as much as a transaction may
        timed.round(*[timed.passing(taskfarm.BATCH_S)] * 6, taskfarm.beat("a"))
    assert timed.store.sql.workers["b"].state == taskfarm.EXPIRED
    assert timed.store.sql.workers["a"].state == taskfarm.ALIVE


def test_a_process_that_was_stopped_gives_everybody_a_whole_lease(timed: Timed) -> None:
    for _ in range(5):
        timed.clock.pass_time(6)    # between two rounds, when nobody can be heard
        timed.round(timed.passing(0.0))
    assert timed.store.sql.workers["a"].state == taskfarm.ALIVE
    timed.clock.pass_time(0.5)
    assert timed.rounds_until_it_expires(timed.passing(0.5)) in range(18, 23), "10 s later"


def test_a_writer_that_was_woken_late_gives_everybody_a_whole_lease(timed: Timed) -> None:
    began = timed.clock.tick
    timed.store.awake = timed.clock.tick = began + 9.0
    timed.store._notice_stop(began + 4.0, patience_s=4.5)
    assert timed.store.sql.leases.ends[1] == began + 10, "half a second is not late"
    timed.store._notice_stop(began + 4.0, patience_s=3.5)
    assert timed.store.sql.leases.ends[1] == began + 19


def test_a_disk_that_is_slow_is_not_taken_for_a_process_that_was_stopped(timed: Timed) -> None:
    timed.commit_s = 2.0
    assert timed.rounds_until_it_expires(timed.passing(0.01)) in (5, 6, 7), "the lease of 10 s ends all the same"


def test_a_disk_that_hangs_for_long_ends_no_lease(timed: Timed) -> None:
    timed.commit_s = taskfarm.CLOCK_CHECK_S + 1
    assert timed.rounds_until_it_expires(timed.passing(0.01)) == 30


# Nobody holds up anybody: in counts, with a clock that moves whenever it is looked at.

def test_a_transaction_ends_when_its_time_is_over_and_the_rest_follows_in_order(store: Direct) -> None:
    run = make_run(store, 200)
    assert isinstance(store.clock, FakeClock)
    store.clock.step_s = taskfarm.BATCH_S / 2
    operations = [taskfarm.claim(run, "w") for _ in range(100)]
    ended, transactions = store.store.apply(operations), 1
    while len(ended) < 100:
        assert len(ended) in range(8 * transactions, 16 * transactions + 1)
        ended += store.store.apply([])
        transactions += 1
    assert transactions >= 100 // 16 and [named for named, _ in ended] == operations
    assert [shown.number for _, shown in ended] == list(range(100))


@pytest.mark.parametrize("what", ["claim", "beat", "sign off", "report"])
def test_what_takes_long_is_done_in_slices_and_short_ones_that_came_later_are_answered_first(
        store: Direct, what: str) -> None:
    run, other = a_run(store, 20000), make_run(store, 100)
    take_batch(store, run, "a", taskfarm.MAX_BATCH)
    if what == "beat":
        store.pass_time(101)
    reports = [Report(number, None, taskfarm.DONE, elapsed_ms=number) for number in range(5000)]
    long, rounds_wanted = {
        "claim": (taskfarm.claim_many(run, "b", 10000), range(0, 1)), "beat": (taskfarm.beat("a"), range(50, 60)),
        "sign off": (taskfarm.sign_off("a"), range(50, 60)),
        "report": (taskfarm.report_many(run, "a", reports), range(4, 9))}[what]
    assert isinstance(store.clock, FakeClock)
    store.clock.step_s = taskfarm.BATCH_S       # each look at the clock ends a slice
    ended, rounds = store.store.apply([long]), 0
    while long not in [named for named, _ in ended]:
        short = taskfarm.claim(other, "w")
        before, ended = rows_changed(store), store.store.apply([short])
        assert ended[0][0] is short, "it came later"
        assert rows_changed(store) - before <= max(taskfarm.REPORTS_SLICE, 11 * taskfarm.SLICE) + 10
        rounds += 1
    assert rounds in rounds_wanted
    store.clock.step_s = 0
    held = store.ask("GET", "/api/worker/a")[1]["held"]
    assert held == {"claim": 10000, "beat": 10000, "sign off": 0, "report": 5000}[what]


def rows_changed(store: Direct) -> int:
    return int(store.store.connection.total_changes)


@pytest.mark.parametrize("method, path", [("POST", "/restart?all=True"), ("DELETE", "")])
def test_a_small_restart_ends_beside_large_ones(store: Direct, method: str, path: str) -> None:
    large, small = [make_run(store, 9000) for _ in range(2)], a_run(store, 10)
    for run, worker in zip(large, "ab"):
        take_batch(store, run, worker, 9000)
    take_batch(store, small, "c", 10)
    assert isinstance(store.clock, FakeClock)
    store.clock.step_s = 1.0
    for run in [*large, small]:
        assert store.ask(method if run != small else "POST", "/api/runs/" + run + (
            path if run != small else "/restart?all=True"))[0] == 204
    claiming = taskfarm.claim(small, "w")
    ended, turns = store.store.apply([claiming]), 0
    while not ended:
        store.store.turn()
        ended = store.store.apply([])
        turns += 1
    assert turns <= 9 and ended[0][1].number == 0
    assert len(store.store.sweeps) == 2, "the large ones go on"
    store.clock.step_s = 0.0
    store.settle()


def test_a_heartbeat_is_answered_before_the_restart_of_a_run_in_which_tasks_lapsed(store: Direct) -> None:
    run, other = a_run(store, 4000), make_run(store, 4000)
    for each in (run, other):
        take_batch(store, each, "a", 4000)
    store.pass_time(101)
    assert isinstance(store.clock, FakeClock)
    store.clock.step_s = taskfarm.BATCH_S
    assert store.ask("POST", "/api/runs/%s/restart" % run)[0] == 204
    beating = taskfarm.beat("a")
    ended, rounds = store.store.apply([beating]), 0
    while not ended:
        ended = store.store.apply([])
        rounds += 1
    assert store.store.sweeps and ended[0][1].held == 4000 and rounds < 50
    store.clock.step_s = 0.0
    store.settle()


class Cost(NamedTuple):
    statements: int
    steps: int          # of SQLite's machine, in tens
    calls: int          # of Python functions


def cost_of(store: Direct, named: Callable[[], Operation]) -> Cost:
    """What an operation costs, the second time: the first one looks rows up."""
    counts = Counter()      # type: Counter[str]

    def step() -> int:
        counts["steps"] += 1
        return 0
    store.store.call(named())
    again, connection = named(), store.store.connection
    connection.set_trace_callback(lambda _: counts.update(["statements"]))
    connection.set_progress_handler(step, 10)
    sys.setprofile(lambda *_: counts.update(["calls"]))
    try:
        store.store.call(again)
    finally:
        sys.setprofile(None)
        connection.set_progress_handler(None, 0)
        connection.set_trace_callback(None)
    return Cost(counts["statements"], counts["steps"], counts["calls"])


def enlarge(store: Direct, workers: int, run: str) -> None:
    """So many more workers with a lease, each with a task of that run."""
    store.store.connection.executemany(
        "INSERT INTO worker (uuid, hostname, pid, created, lease, heard) VALUES (?, 'node', 1, 0, 86400, 1.7e9)",
        [("more-%d-%d" % (workers, number),) for number in range(workers)])
    store.restart_server()
    claims = [taskfarm.claim(run, "more-%d-%d" % (workers, number)) for number in range(workers)]
    assert all(isinstance(outcome, taskfarm.ShownTask) for outcome in store.store.call_all(claims))


def test_no_request_costs_more_in_a_large_farm(store: Direct) -> None:
    other, run, empty = make_run(store, 30000), a_run(store, 1200), a_run(store, 1200)
    take_batch(store, empty, "c", 1100)
    take_batch(store, empty, "a", 100)
    take(store, run, "a")
    cases: Dict[str, Callable[[], Operation]] = {
        "partial restart": lambda: taskfarm.restart_run(run, taskfarm.RESTART),
        "full restart": lambda: taskfarm.restart_run(run, taskfarm.RESTART_ALL),
        "claim in vain": lambda: taskfarm.claim(empty, "a"),
        "batch in vain": lambda: taskfarm.claim_many(empty, "a", 5),
        "heartbeat": lambda: taskfarm.beat("a"), "workers": lambda: taskfarm.list_workers(False, 10, 0),
        "registration": lambda: taskfarm.register_worker("a", "node-a", 1, 100)}
    costs: List[Dict[str, Cost]] = []
    for size in (20, 20000):
        enlarge(store, size, other)
        costs.append({name: cost_of(store, named) for name, named in cases.items()})
        store.settle()
    for name in cases:
        small, large = costs[0][name], costs[1][name]
        assert large.statements <= small.statements, name
        assert large.steps <= small.steps * 1.2 + 10 and large.calls <= small.calls * 1.2 + 10, (name, small, large)


def test_runs_that_are_held_up_cost_no_more_in_a_farm_of_many(store: Direct) -> None:
    first, paused, given_up = (a_run(store, 1200) for _ in range(3))
    assert store.ask("POST", "/api/runs/%s/pause" % paused)[0] == store.ask("POST", "/api/runs/%s/cancel" % given_up)[0]
    waits = a_run(store, 1200, after=first)
    held = {"paused": paused, "cancelled": given_up, "waits": waits}
    cases: Dict[str, Callable[[], Operation]] = {
        "claim": lambda: taskfarm.claim(first, "c"),
        "end": lambda: taskfarm.report(first, "c", Report(0, None, taskfarm.DONE)),
        "open claim in vain": lambda: taskfarm.claim("empty", "c"),
        **{"claim of " + name: lambda run=run: taskfarm.claim(run, "c")     # type: ignore[misc]
           for name, run in held.items()},
        **{"batch of " + name: lambda run=run: taskfarm.claim_many(run, "c", 5)     # type: ignore[misc]
           for name, run in held.items()},
        **{"look at " + name: lambda run=run: taskfarm.read_run(run) for name, run in held.items()}}    # type: ignore[misc]
    store.store.call(taskfarm.create_run("empty", 1))
    assert isinstance(store.store.call(taskfarm.claim("empty", "c")), taskfarm.ShownTask)
    costs: List[Dict[str, Cost]] = []
    for size in (20, 20000):
        store.store.call_all([taskfarm.create_run("%d-%d" % (size, number), 1, None, 1, 5, first)
                              for number in range(size)])
        costs.append({name: cost_of(store, named) for name, named in cases.items()})
        store.settle()
    for name in cases:
        small, large = costs[0][name], costs[1][name]
        assert large.statements <= small.statements and large.calls <= small.calls * 1.2 + 10, (name, small, large)
        assert large.steps <= small.steps * 1.2 + 10, (name, small, large)
    for name in held:
        assert costs[1]["claim of " + name].calls <= costs[1]["open claim in vain"].calls + 25, name


def test_no_request_about_a_worker_costs_more_when_it_holds_much(store: Direct) -> None:
    run = a_run(store, 200000)
    enlist(store, *("w%d" % number for number in range(200)))
    cases: Dict[str, Callable[[], Operation]] = {
        "heartbeat": lambda: taskfarm.beat("c"), "worker": lambda: taskfarm.read_worker("c", 1, 0),
        "workers": lambda: taskfarm.list_workers(True, 1000, 0), "claim": lambda: taskfarm.claim(run, "c")}
    costs: List[Dict[str, Cost]] = []
    for tasks in (10, 100000):
        with store.store._transaction("BEGIN IMMEDIATE") as (sql, now):
            worker = taskfarm.find_worker(sql, "c")
            taskfarm.take_untouched(sql, taskfarm.find_run(sql, run), worker, tasks)
        costs.append({name: cost_of(store, named) for name, named in cases.items()})
    assert beat(store, "c")[0] == 100014
    for name in cases:
        small, large = costs[0][name], costs[1][name]
        assert large.statements == small.statements and abs(large.steps - small.steps) <= 3, (name, small, large)
        assert abs(large.calls - small.calls) <= 10, (name, small, large)


@pytest.mark.parametrize("method, path, left", [
    ("POST", "/restart?all=True", 0), ("POST", "/restart", 0), ("DELETE", "", 0),
    ("POST", "/restart?status=failed", 3000)])
def test_a_worker_shows_at_once_what_a_restart_or_a_deletion_takes_from_it(
        store: Direct, method: str, path: str, left: int) -> None:
    run, other = a_run(store, 3000), make_run(store, 2)
    take_batch(store, run, "c", 3000)
    take(store, other, "c")
    assert isinstance(store.clock, FakeClock)
    store.clock.step_s = 1.0
    assert store.ask(method, "/api/runs/" + run + path)[0] == 204
    assert store.store.sweeps, "rows are still to follow"
    status, shown = store.ask("GET", "/api/worker/c?limit=1000")
    listed, after = shown["data"], shown["next"]
    while after:
        page = store.ask("GET", "/api/worker/c?limit=1000&after=" + after)[1]
        listed, after = listed + page["data"], page["next"]
    assert shown["held"] == len(listed) == left + 1
    assert {task["run"] for task in listed} == ({run, other} if left else {other})
    assert [worker["held"] for worker in walk(store, "/api/workers") if worker["uuid"] == "c"] == [left + 1]
    store.clock.step_s = 0.0
    store.settle()
    assert len(walk(store, "/api/worker/c", "limit=1000")) == left + 1


# Failures

def test_a_failure_is_final_unless_said_otherwise(store: Direct) -> None:
    run = a_run(store, 2)
    take(store, run, "a")
    report(store, run, 0, worker_uuid="a", percentCompleted=30)
    assert report(store, run, 0, worker_uuid="a", attempt=1, status="failed", exitCode=-9,
                  message="no space\nleft") == 204
    assert look(store, run, 0, "status", "failures", "losses", "exitCode", "message", "percentCompleted") == (
        "failed", 1, 0, -9, "no space\nleft", 30.0)
    assert store.ask("GET", "/api/runs/" + run)[1]["numFailed"] == 1
    assert [take(store, run, "b")["task"], take(store, run, "b")] == [1, 204]
    assert report(store, run, 0, status="done") == 204
    assert look(store, run, 0, "status", "exitCode", "message") == ("done", None, None)


@pytest.mark.parametrize("most, expected", [(2, ["waiting", "failed"]), (3, ["waiting", "waiting", "failed"]),
                                            (0, ["waiting"] * 4)])
def test_below_max_failures_a_failed_task_waits_again(store: Direct, most: int, expected: List[str]) -> None:
    run = a_run(store, 1, maxFailures=most)
    for number, status in enumerate(expected, 1):
        take(store, run, "a")
        assert report(store, run, 0, worker_uuid="a", attempt=number, status="failed", exitCode=number) == 204
        assert look(store, run, 0, "status", "failures", "exitCode") == (status, number, number)
    assert look(store, run, 0, "losses") == (0,)


@pytest.mark.parametrize("most, expected", [
    (None, ["waiting"] * 4 + ["failed"]), (1, ["failed"]), (0, ["waiting"] * 7)])
def test_a_task_that_took_workers_down_is_given_up(store: Direct, most: Optional[int], expected: List[str]) -> None:
    run = a_run(store, 1, **({} if most is None else {"maxLosses": most}))
    for number, status in enumerate(expected, 1):
        take(store, run, "a")
        store.pass_time(101)
        assert blame(store, run) == (status, 0, number)
    if expected[-1] == "failed":
        assert take(store, run, "b") == 204 and look(store, run, 0, "finished") != (None,)
        assert report(store, run, 0, worker_uuid="a", attempt=number, status="done") == 204, "late is better than never"
        assert blame(store, run) == ("done", 0, number - 1)


def test_given_up_by_losses_it_is_also_taken_back_by_a_beat(store: Direct) -> None:
    run = a_run(store, 1, maxLosses=1)
    take(store, run, "a")
    store.pass_time(101)
    assert blame(store, run) == ("failed", 0, 1)
    assert beat(store, "a")[0] == 1 and blame(store, run) == ("computing", 0, 0)
    assert figures(store, run)[:3] == (0, 1, 0)


def test_a_claim_in_a_batch_is_no_start_until_it_is_reported(store: Direct) -> None:
    run = a_run(store, 4, maxLosses=1)
    take_batch(store, run, "a", 4)
    assert look(store, run, 0, "started") == (None,)
    report(store, run, 1, worker_uuid="a", status="computing")
    report(store, run, 2, worker_uuid="a", attempt=1, percentCompleted=0)
    tell_batch(store, run, {"task": 3, "percentCompleted": 1}, worker_uuid="a")
    assert all(look(store, run, number, "started") != (None,) for number in (1, 2, 3))
    store.pass_time(101)
    assert [blame(store, run, number) for number in range(4)] == [("waiting", 0, 0)] + [("failed", 0, 1)] * 3


def test_giving_a_task_back_blames_nobody(store: Direct) -> None:
    run = a_run(store, 1, maxLosses=1)
    take(store, run, "a")
    assert report(store, run, 0, worker_uuid="a", attempt=1, percentCompleted=60, status="waiting") == 204
    assert blame(store, run) == ("waiting", 0, 0)
    assert take(store, run, "b")["percentCompleted"] == 60.0


def test_restarts_take_failed_tasks_in_and_set_the_counters_back(store: Direct) -> None:
    run = a_run(store, 6, maxFailures=2, maxLosses=1)

    def shown() -> List[Tuple[str, int, int]]:
        """Of all tasks, and the same before and after the rows of a restart have followed."""
        before = [blame(store, run, number) for number in range(6)]
        store.settle()
        assert [blame(store, run, number) for number in range(6)] == before
        return before
    for _ in range(5):
        take(store, run, "a")
    for number in range(4):
        report(store, run, number, worker_uuid="a", percentCompleted=50, status="failed", exitCode=3)
    # 0 to 3 wait with one failure, and a holds 4
    assert take(store, run, "b")["task"] == 0
    report(store, run, 0, worker_uuid="b", status="failed", exitCode=4, message="again")
    store.pass_time(60)
    assert take(store, run, "b")["task"] == 1
    store.pass_time(60)
    assert shown() == [("failed", 2, 0), ("computing", 1, 0), ("waiting", 1, 0), ("waiting", 1, 0), ("failed", 0, 1),
                       ("waiting", 0, 0)]
    assert store.ask("POST", "/api/runs/%s/restart?status=failed" % run)[0] == 204
    assert shown() == [("waiting", 0, 0), ("computing", 1, 0), ("waiting", 1, 0), ("waiting", 1, 0), ("waiting", 0, 0),
                       ("waiting", 0, 0)]
    assert look(store, run, 0, "percentCompleted", "exitCode", "message") == (50.0, 4, "again")
    assert beat(store, "b")[0] == 1
    report(store, run, 3, status="done")
    take(store, run, "c")
    assert store.ask("POST", "/api/runs/%s/restart" % run)[0] == 204
    assert shown()[:4] == [("waiting", 0, 0), ("computing", 1, 0), ("waiting", 0, 0), ("done", 1, 0)]
    assert beat(store, "b")[0] == 1, "who computes under a running lease is left alone"
    assert beat(store, "c")[0] == 0, "who has none is not"
    assert store.ask("POST", "/api/runs/%s/restart?all=True" % run)[0] == 204
    assert shown() == [("waiting", 0, 0)] * 6
    assert look(store, run, 0, "percentCompleted", "exitCode", "message", "finished") == (0.0, None, None, None)
    assert beat(store, "b")[0] == 0


def test_a_restart_takes_the_tasks_that_its_body_selects(store: Direct) -> None:
    run = a_run(store, 9)
    for number, (code, message) in enumerate([(137, "killed"), (1, "no /a/b:\n  7"), (1, "no /c: 9"), (1, "")]):
        assert report(store, run, number, status="failed", exitCode=code, message=message) == 204
    report(store, run, 8, status="done")

    def restart(query: str = "", **body: Any) -> List[int]:
        """How many were restarted, and the numbers of those that have still failed, or are done."""
        status, answer = store.ask("POST", "/api/runs/%s/restart%s" % (run, query), body)
        return [answer["restarted"] if status == 200 else status] + [
            number for number in range(9) if look(store, run, number)[0] in ("failed", "done")]
    assert restart(exitCode=7) == [0, 0, 1, 2, 3, 8]
    assert restart(exitCode=137) == [1, 1, 2, 3, 8]
    assert restart(like="no *: *", tasks=[[2, 8]]) == [1, 1, 3, 8]
    assert restart(like="no /a/b: 7") == [1, 3, 8], "a message is compared as lists show it"
    assert restart(tasks=[[8, 8], [3, 3], [0, 0]]) == [1, 8], "what is done stays"
    assert restart("?all=True", tasks=[[7, 8]]) == [1]
    assert restart(tasks=[[3, 9]]) == [400]
    store.ask("DELETE", "/api/runs/" + run)
    assert store.ask("POST", "/api/runs/%s/restart" % run, {"exitCode": 1})[0] == 404


def test_who_computes_a_task_that_is_restarted_learns_it(store: Direct) -> None:
    run = a_run(store, 4)
    assert [take(store, run, worker)["task"] for worker in "abc"] == [0, 1, 2]
    before = [beat(store, worker) for worker in "abc"]
    assert store.ask("POST", "/api/runs/%s/restart" % run, {"tasks": [[0, 2]]}) == (200, {"restarted": 1})
    assert [beat(store, worker) for worker in "ab"] == before[:2], "a lease runs: left alone"
    assert beat(store, "c")[0] == 0 and beat(store, "c")[1] > before[2][1]
    assert store.ask("POST", "/api/runs/%s/restart?all=True" % run, {"tasks": [[1, 3]]}) == (200, {"restarted": 2})
    assert beat(store, "a") == before[0] and beat(store, "b")[0] == 0 and beat(store, "b")[1] > before[1][1]


@pytest.mark.parametrize("body", [{"like": ""}, {"tasks": [[0, 8999]]}], ids=str)
def test_a_large_restart_of_some_lets_others_come_between_and_happens_once_for_a_key(
        store: Direct, body: Dict[str, Any]) -> None:
    run = a_run(store, 9000)
    for first in range(0, 9000, 3000):
        assert tell_batch(store, run, *({"task": number, "status": "failed"} for number in range(first, first + 3000)))
    selection = taskfarm.Selection(body.get("tasks"), None, body.get("like"))
    key, asking = taskfarm.IdempotencyKey(b"k" * 16, b"r" * 16), taskfarm.restart_some(run, "restart", selection)
    slow = taskfarm.answer_once(key, asking, lambda number: (200, b"%d" % number))
    assert isinstance(store.clock, FakeClock)
    store.clock.step_s = taskfarm.SLICE_S
    ended, claimed = store.store.apply([slow]), []
    while not ended:
        ended = store.store.apply([taskfarm.claim(run, "c")])
        claimed += [outcome.number for named, outcome in ended if named is not slow]
        ended = [entry for entry in ended if entry[0] is slow]
    store.clock.step_s = 0.0
    assert ended[0][1] == (200, b"9000") and len(claimed) > 10, "each as soon as a task waits"
    assert figures(store, run)[0] == 9000 - len(claimed)
    report(store, run, 8999, status="failed")
    assert store.store.call(taskfarm.answer_once(key, asking, lambda _: (200, b""))) == (200, b"9000")
    assert look(store, run, 8999)[0] == "failed", "it was done already"


def test_a_single_task_is_claimed_by_its_number(store: Direct) -> None:
    run = a_run(store, 9)

    def take_one(number: int, worker: str = "a", key: str = "") -> Any:
        status, task = store.ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": worker, "task": number}, key)
        return task["attempt"] if status == 201 and task["task"] == number else status
    assert take_one(5, key="k") == take_one(5, key="k") == 1
    assert take_one(5, "b") == 409 and take_one(9) == 404
    assert take_batch(store, run, "b", 9) == [0, 1, 2, 3, 4, 6, 7, 8]
    report(store, run, 5, worker_uuid="a", attempt=1, status="waiting")
    assert take_one(5, "b") == 2
    assert report(store, run, 5, worker_uuid="a", attempt=1, status="waiting") == 204, "known, when it comes again"
    report(store, run, 5, worker_uuid="b", attempt=2, status="done")
    assert take_one(5) == 409 and take_one(0) == 409


def test_a_loss_that_a_restart_forgot_is_not_undone_once_more(store: Direct) -> None:
    run = a_run(store, 1)
    take(store, run, "a")
    store.pass_time(101)
    store.ask("POST", "/api/runs/%s/restart" % run)
    assert blame(store, run) == ("waiting", 0, 0)
    assert report(store, run, 0, worker_uuid="a", attempt=1, percentCompleted=9) == 204
    assert blame(store, run) == ("computing", 0, 0)


BAD_LEASES: List[Any] = [0, -1, 86401, 1.5, "60", True, []]
BAD_BATCHES: List[Any] = [
    None, {}, {"data": []}, {"data": {}}, {"data": 5}, {"worker_uuid": "a"},
    {"data": [{"task": 0, "status": "done"}], "more": 1},
    {"data": [{"task": number, "status": "done"} for number in range(10001)]}]


@pytest.mark.parametrize("method, path, body, status", [
    ("POST", "/api/run", {"numTasks": 1, "maxFailures": -1}, 400),
    ("POST", "/api/run", {"numTasks": 1, "maxFailures": 1001}, 400),
    ("POST", "/api/run", {"numTasks": 1, "maxLosses": 1001}, 400),
    ("POST", "/api/run", {"numTasks": 1, "maxLosses": "5"}, 400),
    ("POST", "/api/run", {"numTasks": 1, "name": ""}, 400),
    ("POST", "/api/run", {"numTasks": 1, "name": "x" * 129}, 400),
    ("POST", "/api/run", {"numTasks": 1, "name": "two\nlines"}, 400),
    ("POST", "/api/run", {"numTasks": 1, "name": 5}, 400),
    ("POST", "/api/runs/{run}/restart?all=True&status=failed", None, 400),
    ("POST", "/api/runs/{run}/restart?all=False&status=failed", None, 400),
    ("POST", "/api/runs/{run}/restart?status=done", None, 404),
    ("POST", "/api/runs/none/restart?status=failed", None, 404),
    *[("POST", "/api/runs/none/" + word, None, 404) for word in ("pause", "resume", "cancel")],
    ("POST", "/api/runs/none/extend", {"numTasks": 1}, 404),
    *[("POST", "/api/runs/{run}/extend", {"numTasks": number}, 400) for number in (0, -1, "1", 2 ** 31 - 1)],
    ("POST", "/api/runs/{run}/extend", None, 400),
    *[("POST", "/api/runs/{run}/cancel", {"tasks": ranges}, 400) for ranges in (
        [], 5, [1], [[1]], [[2, 1]], [[-1, 1]], [[1, 2, 3]], [["1", 2]], [[True, 2]], [[0, 20000]],
        [[0, 1], [20000, 20000]], [[0, 2 ** 40]], [[0, 100000]],
        [[2 * number, 2 * number] for number in range(1001)], None)],
    ("POST", "/api/run", {"numTasks": 1, "after": "none"}, 404), ("POST", "/api/run", {"numTasks": 1, "after": 7}, 400),
    ("POST", "/api/run", {"numTasks": 1, "afterAny": True}, 400),
    ("POST", "/api/run", {"numTasks": 1, "after": "none", "afterAny": 1}, 400),
    *[("POST", "/api/runs/{run}/restart", {"tasks": spans}, 400) for spans in (
        [], None, 5, "", "1,", "2-1", "-1", "1-2-3", [[1]], [[1, 2, 3]], [["1", "2"]], [1], [[2, 1]], [[-1, 0]],
        [[0, 1.0]], [[True, 1]], [[0, 2 ** 31]], {"0": 1}, "\u0661")],
    ("POST", "/api/runs/{run}/restart", {"exitCode": "1"}, 400),
    ("POST", "/api/runs/{run}/restart", {"like": "x" * 2001}, 400),
    ("POST", "/api/runs/{run}/task", {"worker_uuid": "a", "task": -1}, 400),
    ("POST", "/api/runs/{run}/task", {"worker_uuid": "a", "task": None}, 400),
    ("GET", "/api/runs/{run}/tasks?tasks=0&order=finished", None, 400),
    ("GET", "/api/runs/{run}/tasks?tasks=0-2147483646", None, 400),
    *[("POST", "/api/worker", {"uuid": "z", "hostname": "n", "pid": 1, "lease": lease}, 400)
      for lease in BAD_LEASES],
    ("PUT", "/api/worker/a", {"held": 1}, 400),
    *[("PUT", "/api/runs/{run}/tasks/0", body, 400) for body in (
        {"status": "done", "exitCode": 0}, {"status": "done", "message": "x"}, {"exitCode": 0}, {"percentCompleted": 1,
                                                                                           "message": "x"},
        {"status": "failed", "exitCode": 2 ** 31}, {"status": "failed", "exitCode": -2 ** 31 - 1},
        {"status": "failed", "exitCode": "1"}, {"status": "failed", "exitCode": 1.5},
        {"status": "failed", "message": "x" * 2001}, {"status": "failed", "message": 5},
        {"status": "done", "log": "x"}, {"status": "failed", "log": "x" * 1025}, {"status": "failed", "log": 5},
        {"status": "waiting", "memory": 1}, {"percentCompleted": 1, "cpu": 1}, {"memory": 1, "cpu": 1},
        {"status": "done", "memory": -1}, {"status": "done", "memory": 2 ** 53 + 1}, {"status": "done", "memory": 1.5},
        {"status": "done", "cpu": -0.1}, {"status": "done", "cpu": 1e9 + 1}, {"status": "done", "cpu": "1"},
        {"status": "lost"}, {"worker_uuid": "a"}, {"attempt": 1}, {"worker_uuid": "a", "attempt": 1},
        {"status": "done", "attempt": "1"}, {"status": "done", "attempt": -1}, {"status": "done", "attempt": 1.5},
        {"status": "done", "worker_uuid": ""}, {"status": "done", "worker_uuid": "a b"}, {"status": "done",
                                                                                    "worker_uuid": 7})],
    *[("POST", "/api/runs/{run}/tasks", body, 400) for body in (
        None, {"worker_uuid": "a"}, {"count": 1}, {"worker_uuid": "a", "count": 0},
        {"worker_uuid": "a", "count": 10001}, {"worker_uuid": "a", "count": "1"}, {"worker_uuid": "a", "count": True})],
    ("POST", "/api/runs/{run}/tasks", {"worker_uuid": "nobody", "count": 1}, 404),
    ("POST", "/api/runs/none/tasks", {"worker_uuid": "a", "count": 1}, 404),
    *[("PUT", "/api/runs/{run}/tasks", body, 400) for body in BAD_BATCHES],
    ("PUT", "/api/runs/none/tasks", {"data": [{"task": 0, "status": "done"}]}, 404),
    *[("GET", "/api/runs/{run}/tasks?" + query, None, 400) for query in (
        "limit=0", "limit=1001", "limit=x", "limit=", "limit=-1", "status=lost", "order=size", "after=x", "after=-1",
        "more=1", "order=started&after=5",
        "order=finished&status=done&after=zzz", "limit=1.0", "limit=%D9%A1")],
    ("GET", "/api/runs/none/tasks", None, 404),
    *[("GET", "/api/worker/a?" + query, None, 400) for query in ("limit=0", "limit=1001", "after=zzz", "more=1")],
    *[("GET", "/api/workers?" + query, None, 400) for query in ("limit=0", "limit=1001", "after=zzz")],
], ids=lambda value: str(value)[:60])
def test_refused_beyond_the_documented(store: Direct, method: str, path: str, body: Any, status: int) -> None:
    run = a_run(store, 20000)
    before = store.store.connection.total_changes
    assert store.ask(method, path.replace("{run}", run), body)[0] == status
    assert store.store.connection.total_changes == before


WORDS = st.lists(st.text(max_size=9).map(lambda text: text.replace("\0", "")) | st.sampled_from(
    ["\udcff", "{task}", "\n", "é"]), min_size=1, max_size=4)
PATHS = st.text(max_size=20).map(lambda text: "/" + text.replace("\0", ""))
FILES = st.fixed_dictionaries({"kind": st.sampled_from(["lines", "table"]), "path": PATHS,
                               "size": st.integers(0, 2 ** 62), "sha256": st.text("0123456789abcdef", min_size=64,
                                                                                  max_size=64)})
WORKS_OF_RUNS = st.fixed_dictionaries({
    "command": WORDS, "folder": PATHS,
    "parameters": st.none() | FILES | st.fixed_dictionaries({"kind": st.just("grid"), "grid": WORDS})})
WRONG_PARTS: Dict[str, List[Any]] = {
    "command": [None, "x", [], [5], [None], ["a\0b"], {}], "folder": [None, "x", "", 5, "/a\0b", "/" * 4097],
    "parameters": [5, [], {}, {"kind": "lines"}, {"kind": "grid"}, {"kind": "table", "grid": ["a=1"]}], "more": [None],
    "kind": [None, "file", 5, ["grid"]], "path": [None, "x", "/a\0b"], "size": [None, -1, 1.5, True, "1", 2 ** 63],
    "sha256": [None, "g" * 64, "a" * 63, 5], "grid": [None, "a=1", [], [5]]}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(work=WORKS_OF_RUNS, data=st.data())
def test_the_work_of_a_run_comes_back_as_it_went_and_another_shape_changes_nothing(
        store: Direct, work: Dict[str, Any], data: st.DataObject) -> None:
    broken = json.loads(json.dumps(work))
    place = data.draw(st.sampled_from([place for place in (broken, broken["parameters"]) if place]))
    name = data.draw(st.sampled_from([*place, "more"]))
    lacks = name not in ("more", "parameters") and data.draw(st.booleans())
    place[name] = data.draw(st.sampled_from(WRONG_PARTS[name]))
    if lacks:
        del place[name]
    before = store.store.connection.total_changes
    assert store.ask("POST", "/api/run", {"numTasks": 1, "work": broken})[0] == 400, broken
    assert store.store.connection.total_changes == before
    status, run = store.ask("POST", "/api/run", {"numTasks": 1, "work": work})
    assert status == 201 and run["hasWork"]
    assert store.ask("GET", "/api/runs/%s/work" % run["uuid"]) == (200, dict(work, user="ada", own=True))


def test_the_work_of_a_run_goes_with_it_and_is_somebodys(store: Direct) -> None:
    run = a_run(store, 3, work=GRID_WORK)
    path = "/api/runs/%s/work" % run
    ada = store.user
    store.user = User(2, "ada", "", 1)      # another one, who came later
    assert store.ask("GET", path) == (200, dict(GRID_WORK, user="ada", own=False))
    store.user = ada
    large = dict(GRID_WORK, command=["x" * 65000])
    kept = store.ask("POST", "/api/run", {"numTasks": 1, "work": large})[1]["uuid"]
    assert store.ask("GET", "/api/runs/%s/work" % kept)[1]["command"] == large["command"]
    store.restart_server()
    assert store.ask("GET", path)[1]["own"] is True and store.ask("GET", "/api/runs/" + run)[1]["hasWork"] is True
    for gone in (run, kept):
        assert store.ask("DELETE", "/api/runs/" + gone)[0] == 204
    assert store.store.connection.execute("SELECT count(*) FROM work").fetchone() == (0,)
    other = a_run(store, 3, work=GRID_WORK)
    store.store.connection.execute("DELETE FROM work")
    assert store.store.call(taskfarm.check()) == ["1 commands are of no run, or lacking"]
    store.store.connection.execute("INSERT INTO work (run, work) SELECT id, '' FROM run WHERE uuid = ?", (other,))
    assert store.store.call(taskfarm.check()) == []


def test_limits_that_are_just_kept(store: Direct) -> None:
    run = a_run(store, 10000, name="x" * 128, maxFailures=1000, maxLosses=1000)
    shown = store.ask("GET", "/api/runs/" + run)[1]
    assert (shown["name"], shown["maxFailures"], shown["maxLosses"]) == ("x" * 128, 1000, 1000)
    for code in (2 ** 31 - 1, -2 ** 31):
        assert report(store, run, 0, status="failed", exitCode=code, message="ü" * 2000) == 204
        assert look(store, run, 0, "exitCode", "message") == (code, "ü" * 2000)
    assert report(store, run, 1, status="failed", message="") == 204
    assert look(store, run, 1, "exitCode", "message") == (None, "")
    assert len(take_batch(store, run, "a", 10000)) == 10000
    assert tell_batch(store, run, *[{"task": number, "status": "done"} for number in range(10000)]) == (10000, [])
    assert figures(store, run) == (0, 0, 10000, 100.0)


# Fencing

def test_the_attempt_rises_with_each_claim_and_never_falls(store: Direct) -> None:
    run, seen = a_run(store, 1), []
    for ending in ("waiting", "failed", "done", "", "?all=True", "?status=failed"):
        task = take(store, run, "a")
        seen.append(task["attempt"])
        assert look(store, run) == ("computing", task["attempt"])
        if ending in ("waiting", "failed", "done"):
            report(store, run, 0, worker_uuid="a", status=ending)
        store.ask("POST", "/api/runs/%s/restart%s" % (run, "?all=True" if ending != "failed" else "?status=failed"))
        store.restart_server()
        assert look(store, run) == ("waiting", task["attempt"])
    assert seen == [1, 2, 3, 4, 5, 6]
    assert take_batch(store, run, "b", 1) == [0] and look(store, run) == ("computing", 7)


@pytest.mark.parametrize("names, status", [
    ({}, 204), ({"worker_uuid": "a"}, 204), ({"attempt": 2}, 204), ({"worker_uuid": "a", "attempt": 2}, 204),
    ({"worker_uuid": "b"}, 409), ({"worker_uuid": "c"}, 409), ({"worker_uuid": "nobody"}, 409), ({"attempt": 1}, 409),
    ({"attempt": 3}, 409), ({"worker_uuid": "b", "attempt": 2}, 409), ({"worker_uuid": "a", "attempt": 1}, 409),
    ({"worker_uuid": "b", "attempt": 1}, 409), ({"worker_uuid": "nobody", "attempt": 2}, 409),
    ({"attempt": 2 ** 31 - 1}, 409)], ids=str)
@pytest.mark.parametrize("body", [{"percentCompleted": 9}, {"status": "computing"}, {"status": "done"},
                                  {"status": "failed"}, {"status": "waiting"}], ids=str)
def test_a_report_is_taken_from_who_holds_the_task(store: Direct, names: Any, status: int, body: Any) -> None:
    run = a_run(store, 2)
    take(store, run, "b")
    store.pass_time(101)
    take(store, run, "a")
    before = store.ask("GET", "/api/runs/%s/tasks/0" % run)[1]
    assert report(store, run, 0, **names, **body) == status
    after = store.ask("GET", "/api/runs/%s/tasks/0" % run)[1]
    assert (after == before) == (status == 409 or body == {"status": "computing"})
    assert after["status"] == (body.get("status", "computing") if status == 204 else "computing")
    assert after["attempt"] == 2


def test_a_report_for_a_task_that_nobody_has_is_refused(store: Direct) -> None:
    run = a_run(store, 2)
    assert report(store, run, 0, worker_uuid="a", status="done") == 409
    assert report(store, run, 0, attempt=1, status="done") == 409
    assert report(store, run, 7, worker_uuid="a", status="done") == 404
    assert look(store, run) == ("waiting", 0) and figures(store, run)[0] == 2


@pytest.mark.parametrize("lapsed", [False, True])
@pytest.mark.parametrize("method, path, body", [
    ("PUT", "/tasks/0", {"percentCompleted": 9}), ("PUT", "/tasks/0", {"status": "computing"}),
    ("PUT", "/tasks", {"data": [{"task": 0, "status": "waiting"}]}), ("POST", "/restart?all=True", None)], ids=str)
def test_a_full_restart_or_a_put_without_a_worker_ends_every_hold(
        store: Direct, lapsed: bool, method: str, path: str, body: Any) -> None:
    run = a_run(store, 2)
    take(store, run, "a")
    if lapsed:
        store.pass_time(101)
    assert store.ask(method, "/api/runs/" + run + path, body)[0] in (200, 204)
    before = store.ask("GET", "/api/runs/%s/tasks/0" % run)[1]
    store.settle()
    assert beat(store, "a")[0] == 0
    for names in ({"worker_uuid": "a"}, {"attempt": 1}, {"worker_uuid": "a", "attempt": 1}):
        for status in ("done", "computing", "failed", "waiting"):
            assert report(store, run, 0, status=status, **names) == 409
    assert store.ask("GET", "/api/runs/%s/tasks/0" % run)[1] == before
    store.pass_time(101)
    assert store.ask("GET", "/api/runs/%s/tasks/0" % run)[1] == before, "nobody holds it, so nothing runs out"


@pytest.mark.parametrize("ending", ["done", "failed", "waiting"])
@pytest.mark.parametrize("names", [{"worker_uuid": "a"}, {"worker_uuid": "a", "attempt": 1}, {"attempt": 1}], ids=str)
def test_a_report_that_is_repeated_counts_once(store: Direct, ending: str, names: Any) -> None:
    run = a_run(store, 1, maxFailures=9)
    take(store, run, "a")
    assert report(store, run, 0, status=ending, **names) == 204
    before = store.ask("GET", "/api/runs/%s/tasks/0" % run)[1], store.ask("GET", "/api/runs/" + run)[1]
    for restarted in (False, True):
        assert report(store, run, 0, status=ending, **names) == 204
        assert report(store, run, 0, status=ending, percentCompleted=3, **names) == 204
        assert report(store, run, 0, percentCompleted=3, **names) == 204, "late progress"
        assert report(store, run, 0, status="computing", **names) == 204
        for other in {"done", "failed", "waiting"} - {ending}:
            assert report(store, run, 0, status=other, **names) == 409
        after = store.ask("GET", "/api/runs/%s/tasks/0" % run)[1], store.ask("GET", "/api/runs/" + run)[1]
        assert after[0] == before[0] and dict(after[1], lastReport=0) == dict(before[1], lastReport=0)
        if not restarted:
            store.restart_server()


def test_failures_that_name_nobody_count_each_time(store: Direct) -> None:
    run = a_run(store, 1, maxFailures=3)
    for number, status in enumerate(["waiting", "waiting", "failed"], 1):
        assert report(store, run, 0, status="failed", exitCode=number) == 204
        assert look(store, run, 0, "status", "failures", "exitCode") == (status, number, number)


def test_a_percentage_on_a_failed_task_or_a_done_one_is_no_other_failure_or_end(store: Direct) -> None:
    run = a_run(store, 2, maxFailures=2, maxLosses=1)
    take(store, run, "a")
    store.pass_time(101)
    report(store, run, 1, status="done")
    before = [store.ask("GET", "/api/runs/%s/tasks/%d" % (run, number))[1] for number in (0, 1)]
    store.pass_time(5)
    for number in (0, 1):
        assert report(store, run, number, percentCompleted=50) == 204
        after = store.ask("GET", "/api/runs/%s/tasks/%d" % (run, number))[1]
        assert after == dict(before[number], percentCompleted=50.0)


@pytest.mark.parametrize("how, losses", [("sign off", 0), ("lease", 1)])
def test_who_leaves_in_slices_leaves_no_task_behind_that_a_restart_held_up(
        store: Direct, monkeypatch: pytest.MonkeyPatch, how: str, losses: int) -> None:
    for name in ("SMALL", "SLICE"):
        monkeypatch.setattr(taskfarm, name, 1)
    monkeypatch.setattr(taskfarm.Sweep, "SLICE", 1)
    run = make_run(store, 4)
    enlist(store, "leaver", lease=60)
    for _ in range(3):
        take(store, run, "leaver")
    store.clock.step_s = taskfarm.SLICE_S     # each slice is over at its first look
    assert store.ask("POST", "/api/runs/%s/restart" % run)[0] == 204 and store.store.sweeps
    if how == "sign off":
        assert store.ask("DELETE", "/api/worker/leaver")[0] == 204
    else:
        for _ in range(3):
            store.pass_time(61)
        assert store.ask("GET", "/api/worker/leaver")[1]["state"] == "expired"
    tasks = store.ask("GET", "/api/runs/%s/tasks" % run)[1]["data"]
    assert [(task["status"], task["losses"]) for task in tasks] == [("waiting", losses)] * 3 + [("waiting", 0)]


def test_whoever_waits_for_the_commit_waits_for_the_end_of_the_transaction(store: Direct) -> None:
    began, may_end = threading.Event(), threading.Event()

    @taskfarm.operation
    def long(sql: taskfarm.Transaction, now: taskfarm.Now) -> None:
        began.set()
        may_end.wait(20)
    store.store.start()
    store.store.submit([long()])
    assert began.wait(20)
    ended: List[bool] = []

    def wait() -> None:
        store.store.wait_for_commit(0.0)       # for no time at all
        store.store.wait_for_commit(20.0)
        ended.append(may_end.is_set())
    waiting = threading.Thread(target=wait)
    waiting.start()
    waiting.join(0.05)
    may_end.set()
    waiting.join(20)
    assert ended == [True]


def test_a_large_batch_of_reports_is_done_in_slices_and_ended_before_the_file_is_closed(store: Direct) -> None:
    size = 4 * taskfarm.REPORTS_SLICE
    run = a_run(store, size)
    assert len(take_batch(store, run, "a", size)) == size
    report(store, run, size - 1, status="done")
    assert isinstance(store.clock, FakeClock)
    store.clock.step_s = taskfarm.BATCH_S
    reports = [taskfarm.Report(number, status=2, millionths=number) for number in range(size)]
    named, seen = taskfarm.report_many(run, "a", reports), []
    named.done = lambda _, outcome: seen.append(outcome)
    for _ in range(3):
        assert store.store.apply([named] if not named.large else []) == [], "others have their turn"
    store.store.start()
    store.store.close()
    assert [(accepted, [number for number, _ in refused]) for accepted, refused in seen] == [(size - 1, [size - 1])]
    store.start()
    assert figures(store, run)[:3] == (0, 0, size)


def test_a_batch_that_a_full_disk_cuts_short_says_that_a_part_was_done(store: Direct) -> None:
    run = a_run(store, 2 * taskfarm.REPORTS_SLICE)
    assert isinstance(store.clock, FakeClock)
    store.clock.step_s = taskfarm.BATCH_S
    reports = [taskfarm.Report(number, status=2) for number in range(2 * taskfarm.REPORTS_SLICE)]
    named = taskfarm.report_many(run, None, reports)
    for begun, sentence in ((False, "nothing was changed: "), (True, "only a part was done")):
        assert named.begun is begun
        (_, refusal), = store.store._only_read([named], "the disk is full")
        assert refusal.status == 503 and str(refusal).startswith(sentence)
        assert begun or store.store.apply([named]) == []
    assert len(store.store.apply([])) == 1 and figures(store, run)[2] == len(reports)


def test_a_long_page_is_shown_at_once_while_the_disk_takes_no_writes(store: Direct) -> None:
    run = a_run(store, 3)
    store.store.apply([taskfarm.claim(run, "w")])       # the last slice was one of short operations
    store.store._note_trouble("the disk is full")
    page = taskfarm.list_tasks(run, None, "task", 1000, None)
    assert [named for named, _ in store.store.apply([page])] == [page]


def test_a_repeat_is_known_for_8_attempts_and_over_restarts(store: Direct) -> None:
    run = a_run(store, 1, maxFailures=0)
    endings = ["failed", "waiting", "done", "failed", "waiting", "failed", "done", "failed", "waiting", "done"]
    for attempt, ending in enumerate(endings, 1):
        worker = "ab"[attempt % 2]
        assert take(store, run, worker)["attempt"] == attempt
        assert report(store, run, 0, worker_uuid=worker, attempt=attempt, status=ending) == 204
        before = store.ask("GET", "/api/runs/%s/tasks/0" % run)[1]
        for earlier in range(max(1, attempt - 7), attempt + 1):
            name = "ab"[earlier % 2]
            assert report(store, run, 0, worker_uuid=name, attempt=earlier, status=endings[earlier - 1]) == 204
            assert report(store, run, 0, worker_uuid=name, attempt=earlier, percentCompleted=1) == 204
            other = "done" if endings[earlier - 1] != "done" else "failed"
            assert report(store, run, 0, worker_uuid=name, attempt=earlier, status=other) == 409
            assert report(store, run, 0, worker_uuid="c", attempt=earlier, status=endings[earlier - 1]) == 409
        assert store.ask("GET", "/api/runs/%s/tasks/0" % run)[1] == before
        if ending == "done":
            store.ask("POST", "/api/runs/%s/restart?all=True" % run)
            store.restart_server()


def test_a_repeat_while_somebody_else_computes_disturbs_nobody(store: Direct) -> None:
    run = a_run(store, 1, maxFailures=2)
    take(store, run, "a")
    report(store, run, 0, worker_uuid="a", attempt=1, status="failed", exitCode=1)
    take(store, run, "b")
    report(store, run, 0, worker_uuid="b", attempt=2, percentCompleted=50)
    before = store.ask("GET", "/api/runs/%s/tasks/0" % run)[1]
    assert report(store, run, 0, worker_uuid="a", attempt=1, status="failed", exitCode=1) == 204
    assert report(store, run, 0, worker_uuid="a", attempt=1, percentCompleted=80) == 204
    assert report(store, run, 0, worker_uuid="a", attempt=1, status="done") == 409
    assert store.ask("GET", "/api/runs/%s/tasks/0" % run)[1] == before and beat(store, "b")[0] == 1


def test_a_report_may_say_how_long_the_attempt_has_run(store: Direct) -> None:
    run = a_run(store, 6)
    take_batch(store, run, "a", 5)
    take(store, run, "a")
    store.pass_time(60)
    assert report(store, run, 0, worker_uuid="a", status="done", elapsed=59.5) == 204
    assert look(store, run, 0, "started", "finished") == ("2023-11-14T22:13:20.500Z", "2023-11-14T22:14:20.000Z")
    assert tell_batch(store, run, {"task": 1, "percentCompleted": 5, "elapsed": 10}, {"task": 2, "status": "failed",
                                                                                     "elapsed": 0},
                      {"task": 3, "status": "waiting", "elapsed": 9}, {"task": 5, "status": "computing"},
                      worker_uuid="a") == (4, [])
    assert [look(store, run, number, "started")[0] for number in (1, 2, 3, 4, 5)] == [
        "2023-11-14T22:14:10.000Z", "2023-11-14T22:14:20.000Z", None, None, "2023-11-14T22:13:20.000Z"]
    for elapsed in (-1, 1e9 + 1, "5", True, None):
        assert report(store, run, 4, worker_uuid="a", status="done", elapsed=elapsed) == 400
    assert report(store, run, 4, worker_uuid="a", elapsed=5) == 400, "it says nothing of the task"


def test_an_end_says_what_the_attempt_used_and_a_failure_where_its_log_is(store: Direct) -> None:
    def used(number: int = 0) -> Tuple[Any, ...]:
        return look(store, run, number, "memory", "cpu", "log")
    run = a_run(store, 4, maxFailures=9)
    take(store, run, "a")
    assert report(store, run, 0, worker_uuid="a", status="failed", memory=2 ** 53, cpu=1.2345, log="/logs/" + "x" * 1018
                  ) == 204
    failed = (2 ** 53, 1.234, "/logs/" + "x" * 1018)
    assert used() == failed
    for happens in (lambda: take(store, run, "b"), lambda: report(store, run, 0, worker_uuid="b", percentCompleted=50),
                    lambda: report(store, run, 0, worker_uuid="b", status="waiting"), lambda: take(store, run, "b"),
                    lambda: store.ask("POST", "/api/runs/%s/restart" % run)):
        happens()
        assert used() == failed, "kept until the next end"
    assert report(store, run, 0, worker_uuid="b", status="done", cpu=7) == 204
    assert used() == (None, 7.0, None), "and what another end does not say is not that of the one before"
    take_batch(store, run, "a", 3)
    assert tell_batch(store, run, {"task": 1, "status": "done", "memory": 4096, "cpu": 0.5},
                      {"task": 2, "status": "done"}, {"task": 3, "status": "failed", "memory": 5, "log": ""},
                      worker_uuid="a") == (3, [])
    assert [used(number) for number in (1, 2, 3)] == [(4096, 0.5, None), (None, None, None), (5, None, "")]
    assert store.store.connection.execute("SELECT task, memory, cpu, log FROM tasks ORDER BY task").fetchall() == [
        (0, None, 7.0, None), (1, 4096, 0.5, None), (2, None, None, None), (3, 5, None, "")]
    store.ask("POST", "/api/runs/%s/restart?all=True" % run)
    assert {used(number) for number in range(4)} == {(None, None, None)}


def test_a_report_without_a_status_keeps_a_held_task_computing(store: Direct) -> None:
    run = a_run(store, 1)
    take(store, run, "a")
    assert report(store, run, 0, worker_uuid="a", attempt=1, percentCompleted=100) == 204
    assert look(store, run) == ("computing", 1)
    assert report(store, run, 0, worker_uuid="a", attempt=1, percentCompleted=100, status="done") == 204
    assert figures(store, run) == (0, 0, 1, 100.0)


# Safe retries

KEYED: List[Tuple[str, Any, Any]] = [
    ("/api/run", {"numTasks": 4, "name": "x"}, {"numTasks": 5, "name": "x"}),
    ("/api/runs/{run}/task", {"worker_uuid": "a"}, {"worker_uuid": "b"}),
    ("/api/runs/{run}/tasks", {"worker_uuid": "a", "count": 2}, {"worker_uuid": "a", "count": 3}),
    ("/api/worker", {"uuid": "z", "hostname": "n", "pid": 1}, {"uuid": "z", "hostname": "n", "pid": 1, "lease": 3}),
]


@pytest.mark.parametrize("path, body, other", KEYED, ids=lambda value: str(value)[:30])
def test_the_same_key_gets_the_same_answer(store: Direct, path: str, body: Any, other: Any) -> None:
    run = a_run(store, 9)
    path = path.replace("{run}", run)
    first = store.ask("POST", path, body, "k")
    assert first[0] == 201
    before = store.ask("GET", "/api/runs")[1], store.ask("GET", "/api/runs/%s/tasks" % run)[1]
    for _ in range(2):
        assert store.ask("POST", path, body, "k") == first
        assert store.ask("POST", path, other, "k")[0] == 422
        assert store.ask("POST", "/api/runs/%s/restart?all=True" % run, None, "k")[0] == 422
        assert (store.ask("GET", "/api/runs")[1], store.ask("GET", "/api/runs/%s/tasks" % run)[1]) == before
        store.restart_server()
    assert store.ask("POST", path, body, "k2")[1] != first[1] or path == "/api/worker"


def test_a_restart_with_a_key_happens_once(store: Direct) -> None:
    run = a_run(store, 3)
    for path in ("/restart", "/restart?all=True", "/restart?status=failed"):
        report(store, run, 0, status="failed")
        assert store.ask("POST", "/api/runs/" + run + path, None, path)[0] == 204
        assert look(store, run)[0] == "waiting"
        report(store, run, 0, status="failed")
        store.restart_server()
        assert store.ask("POST", "/api/runs/" + run + path, None, path)[0] == 204
        assert look(store, run)[0] == "failed", "it was done already"
        assert store.ask("POST", "/api/runs/" + run + "/restart?all=False", None, path)[0] == 422
        store.ask("POST", "/api/runs/" + run + "/restart?all=True")


def test_of_claims_the_last_key_of_each_worker_is_remembered(store: Direct) -> None:
    run = a_run(store, 9)
    first, others = take(store, run, "a", "1"), take(store, run, "b", "2")
    assert take(store, run, "a", "1")["task"] == first["task"] == 0
    assert take(store, run, "b", "2")["task"] == others["task"] == 1
    report(store, run, 0, worker_uuid="a", attempt=1, status="done")
    again = take(store, run, "a", "1")
    assert (again["task"], again["attempt"]) == (0, 1), "it was given, whatever became of it"
    assert take_batch(store, run, "a", 3, "3") == [2, 3, 4] == take_batch(store, run, "a", 3, "3")
    assert take(store, run, "b", "2")["task"] == 1, "of each worker"
    enlist(store, "a", "b", lease=86400)
    for _ in range(3):
        store.pass_time(43200)
        assert take_batch(store, run, "a", 3, "3") == [2, 3, 4]
        beat(store, "b")
    assert figures(store, run)[:3] == (4, 4, 1)


def test_an_earlier_key_of_a_worker_is_not_answered_with_what_a_later_one_was_given(store: Direct) -> None:
    run = a_run(store, 9)
    assert [take(store, run, "a", key)["task"] for key in ("1", "2", "2", "1", "1", "2")] == [0, 1, 1, 2, 2, 3]
    assert [take_batch(store, run, "b", 1, key) for key in ("3", "4", "3")] == [[4], [5], [6]]
    store.ask("DELETE", "/api/worker/a")
    enlist(store, "a", lease=100)
    assert take(store, run, "a", "2")["attempt"] == 2, "who has signed off begins anew"
    store.restart_server()
    assert take_batch(store, run, "b", 1, "3") == [6] and take_batch(store, run, "b", 1, "4") != [5]


def test_claims_that_gave_nothing_and_refusals_are_not_remembered(store: Direct) -> None:
    run = a_run(store, 1)
    task = take(store, run, "a")
    assert take(store, run, "b", "1") == 204 and take_batch(store, run, "b", 2, "2") == 204
    report(store, run, 0, worker_uuid="a", attempt=task["attempt"], status="waiting")
    assert take(store, run, "b", "1")["attempt"] == 2
    assert take(store, run, "nobody", "3") == 404
    enlist(store, "nobody")
    assert take(store, run, "nobody", "3") == 204
    assert store.ask("POST", "/api/run", {"numTasks": 0}, "4")[0] == 400
    assert store.ask("POST", "/api/run", {"numTasks": 1}, "4")[0] == 201
    assert store.ask("POST", "/api/runs/none/restart", None, "5")[0] == 404
    assert store.ask("POST", "/api/runs/%s/restart" % run, None, "5")[0] == 204


def test_keys_are_forgotten_after_a_day(store: Direct) -> None:
    a_run(store, 1)
    first = store.ask("POST", "/api/run", {"numTasks": 4}, "k")
    store.pass_time(86000)
    assert store.ask("POST", "/api/run", {"numTasks": 4}, "k") == first
    store.pass_time(500)
    second = store.ask("POST", "/api/run", {"numTasks": 4}, "k")
    assert second[0] == 201 and second[1]["uuid"] != first[1]["uuid"]
    assert store.ask("POST", "/api/run", {"numTasks": 4}, "k") == second


def test_keys_are_kept_in_bounded_number(store: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskfarm, "KEYS_REMEMBERED", 20)
    monkeypatch.setattr(taskfarm, "AUDIT_LINES", 5)
    run = a_run(store, 9)
    for number in range(100):
        assert store.ask("POST", "/api/runs/%s/restart" % run, None, "key %d" % number)[0] == 204
        take(store, run, "a", "claim %d" % number)
        report(store, run, 0, worker_uuid="a", status="waiting")
    store.pass_time(1)
    rows = {table: store.store.sql.one("SELECT count(*) FROM " + table)[0] for (table,) in store.store.sql.all(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'")}
    assert 15 <= rows.pop("answer") <= 40 and max(rows.values()) < 15, rows
    report(store, run, 0, status="failed")
    assert store.ask("POST", "/api/runs/%s/restart" % run, None, "key 99")[0] == 204
    assert look(store, run)[0] == "failed", "the newest is known"


def test_a_claim_that_was_rolled_back_is_not_remembered(store: Direct) -> None:
    run = a_run(store, 5)

    @taskfarm.operation
    def broken(sql: Any, now: Now) -> None:
        raise ZeroDivisionError

    keys = [taskfarm.IdempotencyKey(letter.encode() * 16, b"r" * 16) for letter in "klm"]
    store.store.call(taskfarm.claim(run, "a", keys[0]))
    for batch in ([taskfarm.claim(run, "a", keys[1]), broken()], [broken(), taskfarm.claim(run, "a", keys[2])]):
        outcomes = {named.function.__name__: outcome for named, outcome in zip(batch, store.store.call_all(batch))}
        again, = store.store.call_all([named for named in batch if named.args])
        assert again.number == outcomes["claim"].number and isinstance(outcomes["broken"], ZeroDivisionError)
    assert figures(store, run)[1] == 3


# Batches

def test_a_batch_gives_the_lowest_and_says_no_more_than_is_wanted(store: Direct) -> None:
    run = a_run(store, 9)
    for _ in range(2):
        take(store, run, "b")
        report(store, run, 1, status="done", percentCompleted=50)
    assert look(store, run, 2)[0] == "computing"
    report(store, run, 0, worker_uuid="b", percentCompleted=20, status="waiting")
    status, answer = store.ask("POST", "/api/runs/%s/tasks" % run, {"worker_uuid": "a", "count": 3})
    assert (status, answer) == (201, {"data": [{"task": 0, "attempt": 2, "percentCompleted": 20.0},
                                               {"task": 3, "attempt": 1, "percentCompleted": 0.0},
                                               {"task": 4, "attempt": 1, "percentCompleted": 0.0}]})
    assert beat(store, "a")[0] == 3 and figures(store, run)[:3] == (4, 4, 1)
    assert take_batch(store, run, "a", 10000) == [5, 6, 7, 8]
    assert take_batch(store, run, "a", 10000) == 204


def test_reports_of_a_batch_are_judged_one_by_one(store: Direct) -> None:
    run = a_run(store, 9)
    take_batch(store, run, "a", 4)
    take(store, run, "b")
    assert tell_batch(store, run, {"task": 0, "status": "done"}, {"task": 1, "attempt": 2, "status": "done"},
                      {"task": 4, "status": "done"}, {"task": 2, "attempt": 1, "percentCompleted": 30},
                      {"task": 3, "status": "failed", "exitCode": 1, "message": "m"}, worker_uuid="a") == (3, [1, 4])
    assert [look(store, run, number)[0] for number in range(5)] == [
        "done", "computing", "computing", "failed", "computing"]
    assert look(store, run, 3, "exitCode", "message") == (1, "m")
    assert tell_batch(store, run, {"task": 0, "status": "done"}, {"task": 3, "status": "failed"},
                      {"task": 2, "status": "waiting"}, worker_uuid="a") == (3, []), "repeats are accepted"
    assert blame(store, run, 3) == ("failed", 1, 0)
    assert tell_batch(store, run, {"task": 4, "percentCompleted": 9}, {"task": 8, "status": "done"},
                      {"task": 1, "attempt": 1, "percentCompleted": 9}) == (3, [])
    assert beat(store, "b")[0] == 0 and beat(store, "a")[0] == 1, "named by attempt, task 1 is still held"


@pytest.mark.parametrize("bad", BAD_ENTRIES, ids=lambda entry: str(entry)[:50])
def test_an_entry_that_will_not_do_refuses_the_batch_and_is_named(farm: Live, bad: Any) -> None:
    run = a_run(farm, 5)
    entries = [{"task": 3, "status": "done"}, {"task": 0, "status": "done"}, bad, {"task": 4, "status": "done"}]
    status, problem = farm.ask("PUT", "/api/runs/%s/tasks" % run, {"data": entries})
    assert status == 400 and re.search(r"\b[0-3]\b", problem["detail"]), problem
    assert figures(farm, run) == (5, 0, 0, 0.0)


# Looking

def test_a_run_says_its_name_and_its_times(store: Direct) -> None:
    run = a_run(store, 2, name="antarctica 2", maxFailures=3, maxLosses=0)
    other = a_run(store, 2, name="antarctica 2")
    shown = store.ask("GET", "/api/runs/" + run)[1]
    assert store.ask("GET", "/api/runs")[1]["data"] == [shown, store.ask("GET", "/api/runs/" + other)[1]]
    assert (shown["name"], shown["maxFailures"], shown["maxLosses"]) == ("antarctica 2", 3, 0)
    assert shown["created"] == "2023-11-14T22:13:20.000Z" and shown["lastReport"] is None
    store.pass_time(1.5)
    take(store, run, "a")
    assert report(store, run, 0, worker_uuid="b", status="done") == 409
    assert store.ask("GET", "/api/runs/" + run)[1]["lastReport"] is None, "none was taken"
    report(store, run, 0, worker_uuid="a", percentCompleted=1)
    assert store.ask("GET", "/api/runs/" + run)[1]["lastReport"] == "2023-11-14T22:13:21.500Z"
    store.pass_time(1)
    tell_batch(store, run, {"task": 0, "status": "done"})
    store.restart_server()
    assert store.ask("GET", "/api/runs/" + run)[1]["lastReport"] == "2023-11-14T22:13:22.500Z"
    plain = store.ask("POST", "/api/run", {"numTasks": 1})[1]
    assert (plain["name"], plain["maxFailures"], plain["maxLosses"]) == (None, 1, 5)


TASK_FIELDS = {"id", "task", "status", "percentCompleted", "attempt", "worker", "hostname", "failures", "losses",
               "started", "finished", "exitCode", "message", "memory", "cpu", "log"}


def test_a_task_says_the_same_everywhere(store: Direct) -> None:
    run = a_run(store, 3)
    fresh = store.ask("GET", "/api/runs/%s/tasks/0" % run)[1]
    assert fresh == {"id": 1, "task": 0, "status": "waiting", "percentCompleted": 0.0, "attempt": 0, "worker": None,
                     "hostname": None, "failures": 0, "losses": 0, "started": None, "finished": None, "exitCode": None,
                     "message": None, "memory": None, "cpu": None, "log": None}
    store.pass_time(1)
    task = take(store, run, "a")
    assert task == store.ask("GET", "/api/runs/%s/tasks/0" % run)[1]
    assert task == store.ask("GET", "/api/runs/%s/tasks" % run)[1]["data"][0]
    (held,) = store.ask("GET", "/api/worker/a")[1]["data"]
    assert held == dict({name: value for name, value in task.items() if name not in ("worker", "hostname")}, run=run)
    assert (task["worker"], task["hostname"], task["started"], task["finished"]) == (
        "a", "node-a", "2023-11-14T22:13:21.000Z", None)
    store.pass_time(1)
    report(store, run, 0, worker_uuid="a", status="failed", exitCode=2)
    assert look(store, run, 0, "worker", "started", "finished") == (
        "a", "2023-11-14T22:13:21.000Z", "2023-11-14T22:13:22.000Z")
    store.ask("POST", "/api/runs/%s/restart" % run)
    store.pass_time(1)
    take_batch(store, run, "b", 1)
    assert look(store, run, 0, "worker", "attempt", "started", "finished") == ("b", 2, None, None)


def test_tasks_are_listed_in_pages(store: Direct) -> None:
    run = a_run(store, 2500)
    for number in range(0, 300, 2):
        report(store, run, number, status="done")
    before = store.store.connection.total_changes
    page = store.ask("GET", "/api/runs/%s/tasks" % run)[1]
    assert [task["task"] for task in page["data"]] == list(range(100)) and set(page) == {"data", "next"}
    assert all(set(task) == TASK_FIELDS for task in page["data"])
    page = store.ask("GET", "/api/runs/%s/tasks?limit=3&after=98" % run)[1]
    assert [task["task"] for task in page["data"]] == [99, 100, 101] and page["next"] == "101"
    page = store.ask("GET", "/api/runs/%s/tasks?limit=1000&after=%s" % (run, 1999))[1]
    assert [task["task"] for task in page["data"]] == list(range(2000, 2500)) and page["next"] is None
    for limit in (1, 7, 1000):
        tasks = walk(store, "/api/runs/%s/tasks" % run, "status=done", "limit=%d" % limit)
        assert [task["task"] for task in tasks] == list(range(0, 300, 2))
    tasks = walk(store, "/api/runs/%s/tasks" % run, "status=waiting", "limit=1000")
    assert [task["task"] for task in tasks] == [n for n in range(2500) if n >= 300 or n % 2]
    some = walk(store, "/api/runs/%s/tasks" % run, "tasks=2499,17-20,13,18", "limit=2")
    assert [task["task"] for task in some] == [13, 17, 18, 19, 20, 2499]
    odd = ",".join(map(str, range(1, 600, 2)))      # more spans than are looked at for a page
    assert walk(store, "/api/runs/%s/tasks" % run, "status=done", "tasks=%s,298" % odd)[0]["task"] == 298
    assert store.store.connection.total_changes == before, "untouched tasks are listed without being written"


def test_tasks_are_listed_by_their_times(store: Direct) -> None:
    run, dice = a_run(store, 60, maxFailures=1), random.Random(5)
    for _ in range(60):
        take(store, run, "c")
        store.pass_time(dice.choice([0, 1, 2]))
    order = list(range(60))
    dice.shuffle(order)
    for number in order[:20]:
        report(store, run, number, worker_uuid="c", status=dice.choice(["done", "failed"]))
        store.pass_time(dice.choice([0, 1, 2]))
    for number in order[20:30]:
        report(store, run, number, status="waiting")
    take_batch(store, run, "c", 5)
    everything = walk(store, "/api/runs/%s/tasks" % run)
    for by, statuses in (("started", ["", "computing"]), ("finished", ["", "waiting", "computing", "done", "failed"])):
        for status in statuses:
            words = ["order=" + by, "limit=3"] + (["status=" + status] if status else [])
            tasks = walk(store, "/api/runs/%s/tasks" % run, *words)
            times = [task[by] for task in tasks]
            assert times == sorted(times, reverse=by == "finished")
            expected = [task for task in everything if task[by] and task["status"] in (
                status or ("computing" if by == "started" else task["status"]))]
            assert sorted(tasks, key=lambda task: int(task["task"])) == expected
    assert len(walk(store, "/api/runs/%s/tasks" % run, "order=started")) > 20
    assert len(walk(store, "/api/runs/%s/tasks" % run, "order=finished")) > 15


def test_each_page_costs_the_same(store: Direct) -> None:
    run, count = a_run(store, 10 ** 6), 4000
    assert len(take_batch(store, run, "c", count)) == count
    for first in range(0, count, 1000):
        tell_batch(store, run, *[{"task": number, "status": ["computing", "done", "failed", "waiting"][number % 4]}
                                 for number in range(first, first + 1000)], worker_uuid="c")
    steps = [0]

    def step() -> int:
        steps[0] += 1
        return 0
    for words in ("", "status=waiting", "status=computing", "status=done", "status=failed",
                  "tasks=0-999999", "tasks=0-999999&status=failed",
                  "status=computing&order=started", "status=done&order=finished", "status=failed&order=finished"):
        costs, after = [], ""
        store.store.connection.set_progress_handler(step, 20)
        for _ in range(40):
            steps[0] = 0
            page = store.ask("GET", "/api/runs/%s/tasks?limit=20&%s%s" % (run, words, after))[1]
            costs.append(steps[0])
            assert len(page["data"]) == 20
            after = "&after=" + page["next"]
        store.store.connection.set_progress_handler(None, 0)
        assert max(costs[10:]) <= 2 * max(costs[:3]) + 20, (words, costs)


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
        farm.service.farm.logins.throttle = taskfarm.Throttle()
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
    clock.pass_time(20 * 86400)
    second = token_of(live, "Bearer " + token)
    clock.pass_time(11 * 86400)
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


def new_token(farm: Any, scope: str = "full", **more: Any) -> Dict[str, Any]:
    status, token = farm.ask("POST", "/api/tokens", dict(more, scope=scope))
    assert status == 201
    return dict(token)


@contextlib.contextmanager
def asking_with(farm: Any, token: str) -> Iterator[None]:
    """Requests show another token meanwhile."""
    kept, farm.token = farm.token, token
    yield
    farm.token = kept


def test_a_token_is_void_at_once_when_it_is_revoked_also_where_it_is_remembered(farm: Live) -> None:
    token = new_token(farm)
    headers = ["Bearer " + token["token"], basic(token["token"], ""), basic(token["token"], "any password")]
    assert [get_with(farm, header)[0] for header in headers * 2] == [200] * 6
    assert headers[0].encode() in farm.service.farm.logins.memory
    assert farm.ask("DELETE", "/api/tokens/%d" % token["id"]) == (204, None)
    assert headers[0].encode() in farm.service.farm.logins.memory, "it is judged each time, not only forgotten"
    assert [get_with(farm, header)[0] for header in headers * 2] == [401] * 6
    assert farm.ask("DELETE", "/api/tokens/%d" % token["id"])[0] == 404
    farm.restart_server()
    assert get_with(farm, headers[0])[0] == 401 and new_token(farm)["id"] > token["id"], "ids are never used again"


def test_the_days_of_a_token_end_also_where_it_is_remembered(tmp_path: Path) -> None:
    clock = FakeClock()
    live = Live(str(tmp_path / "f"), clock)
    token = "Bearer " + new_token(live, "read", days=1)["token"]
    clock.pass_time(86399)
    assert get_with(live, token)[0] == 200
    clock.pass_time(1)
    assert get_with(live, token)[0] == 401
    live.close()


@pytest.mark.parametrize("end", ["password", "removal", "run"])
def test_tokens_end_with_the_password_the_user_and_the_run(farm: Live, end: str) -> None:
    run, store = make_run(farm, 3), farm.service.store
    farm.service.store.call(taskfarm.add_user("bob", ADAS_HASH))
    with asking_with(farm, farm.service.farm.token(farm.user("bob"), 0)):
        bobs = new_token(farm, "read")["token"]
    tokens = [new_token(farm, "work", run=run)["token"], new_token(farm)["token"]]
    assert [get_with(farm, "Bearer " + token)[0] for token in [*tokens, bobs]] == [200] * 3
    if end == "run":
        assert farm.ask("DELETE", "/api/runs/" + run)[0] == 204
    else:
        store.call(taskfarm.set_password("ada", ADAS_HASH) if end == "password" else taskfarm.remove_user("ada"))
    full = 200 if end == "run" else 401
    assert [get_with(farm, "Bearer " + token)[0] for token in [*tokens, bobs]] == [401, full, 200]
    assert len(store.tokens) == (2 if end == "run" else 1)
    if end == "removal":
        store.call(taskfarm.add_user("ada", ADAS_HASH))


def test_a_token_shows_itself_to_those_who_ask_for_one_and_begets_none_that_lasts_longer(tmp_path: Path) -> None:
    clock = FakeClock()
    live = Live(str(tmp_path / "f"), clock)
    mother = new_token(live, days=10)
    with asking_with(live, mother["token"]):
        assert live.ask("GET", "/api/token") == (
        200, {"token": mother["token"], "farm": live.service.store.identity})
        children = [new_token(live), new_token(live, days=30), new_token(live, days=3)]
        assert [child["expires"] for child in children[:2]] == [mother["expires"]] * 2
        assert children[2]["expires"] < mother["expires"]
    looks = new_token(live, "read")
    with asking_with(live, looks["token"]):
        assert live.ask("GET", "/api/token") == (
        200, {"token": looks["token"], "farm": live.service.store.identity})
    live.close()


def test_what_was_revoked_or_renewed_meanwhile_makes_no_token(store: Direct) -> None:
    user = store.store.call(taskfarm.add_user("ada", ADAS_HASH))
    mother = store.store.call(taskfarm.create_token(user, "full", None, "", None, None))
    child = taskfarm.create_token(user, "full", None, "", None, mother)
    outcomes = store.store.call_all([taskfarm.revoke_token(user.id, mother.id), child])     # in one transaction
    assert isinstance(outcomes[1], taskfarm.Unauthorized)
    outcomes = store.store.call_all([taskfarm.set_password("ada", ADAS_HASH),
                                     taskfarm.create_token(user, "full", None, "", None, None)])
    assert isinstance(outcomes[1], taskfarm.Unauthorized) and store.store.tokens == {}


def test_a_user_has_a_thousand_tokens_at_most_and_expired_ones_make_room(store: Direct) -> None:
    user = store.store.call(taskfarm.add_user("ada", ADAS_HASH))
    bob = store.store.call(taskfarm.add_user("bob", ADAS_HASH))

    def make(user: User, days: Optional[int]) -> Operation:
        return taskfarm.create_token(user, "read", None, "", days, None)
    made = store.store.call_all([make(user, 2 if number < 10 else None) for number in range(1000)])
    with pytest.raises(taskfarm.Conflict, match="revoke some"):
        store.store.call(make(user, None))
    store.store.call(make(bob, None))
    store.store.call(taskfarm.revoke_token(user.id, made[-1].id))
    store.store.call(make(user, None))
    with pytest.raises(taskfarm.Conflict):
        store.store.call(make(user, None))
    store.pass_time(2 * 86400)
    store.store.call(make(user, None))
    assert len(store.store.tokens) == 992, "and they are gone"


def test_the_text_of_a_token_is_kept_nowhere_and_its_key_gives_it_again(farm: Live, tmp_path: Path) -> None:
    body = {"scope": "work", "label": "twice"}
    first = farm.ask("POST", "/api/tokens", body, "k")
    assert first[0] == 201 and farm.ask("POST", "/api/tokens", body, "k") == first
    assert farm.ask("POST", "/api/tokens", dict(body, scope="full"), "k")[0] == 422
    listed = farm.ask("GET", "/api/tokens")[1]["data"]
    assert [dict(token, token=first[1]["token"]) for token in listed] == [first[1]]
    signature = first[1]["token"].rpartition(".")[2]
    farm.stop()
    assert not [name for name in tmp_path.iterdir() if signature.encode() in name.read_bytes()]
    farm.local = threading.local()
    farm.start()
    assert farm.ask("POST", "/api/tokens", body, "k") == first


@pytest.mark.parametrize("body, status", [
    ({"scope": "read", "label": "x" * 100, "days": 3650}, 201), ({"scope": "all"}, 400), ({}, 400),
    ({"scope": "read", "label": "x" * 101}, 400), ({"scope": "read", "label": "a\x1b[31m"}, 400),
    ({"scope": "read", "days": 3651}, 400), ({"scope": "read", "days": 0}, 400), ({"scope": "work", "run": "x"}, 404),
    ({"scope": "full", "run": "x"}, 400), ({"scope": "read", "user": "bob"}, 400)])
def test_what_a_token_may_be(shared_farm: Live, body: Any, status: int) -> None:
    assert shared_farm.ask("POST", "/api/tokens", body)[0] == status


def test_a_number_that_is_no_tokens_is_404(shared_farm: Live) -> None:
    for text in ("0", "999999", "-1", "x", "1.5", "9" * 30):
        assert shared_farm.ask("DELETE", "/api/tokens/" + text)[0] == 404, text


def test_the_list_of_tokens_has_pages_and_shows_others_to_admin_alone(farm: Live) -> None:
    farm.service.store.call(taskfarm.add_user("bob", ADAS_HASH))
    ids = [new_token(farm, "read")["id"] for _ in range(3)]
    with asking_with(farm, farm.service.farm.token(farm.user("bob"), 0)):
        bobs = new_token(farm, "work")["id"]
        assert [token["id"] for token in farm.ask("GET", "/api/tokens")[1]["data"]] == [bobs]
        assert farm.ask("DELETE", "/api/tokens/%d" % ids[0])[0] == 404
    page = farm.ask("GET", "/api/tokens?limit=2")[1]
    assert [token["id"] for token in page["data"]] == ids[:2] and page["next"] == str(ids[1])
    assert farm.ask("GET", "/api/tokens?limit=2&after=" + page["next"])[1]["data"][0]["id"] == ids[2]
    admin = "Bearer " + taskfarm.read_holder(farm.path)["secret"]
    status, _, body = get_with(farm, admin, "/api/tokens")
    shown = [(token["id"], token["user"]) for token in json.loads(body)["data"]]
    assert status == 200 and shown == [(each, "ada") for each in ids] + [(bobs, "bob")]


def test_a_token_of_a_transaction_that_fails_is_not_known(store: Direct) -> None:
    user = store.store.call(taskfarm.add_user("ada", ADAS_HASH))
    with pytest.raises(RuntimeError), store.store._transaction("BEGIN IMMEDIATE") as (sql, now):
        taskfarm.add_token(sql, now, user, "full", None, "", None)
        raise RuntimeError()
    assert store.store.tokens == {}


def test_a_thousand_logins_with_one_password_cost_one_hash(farm: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = []
    verify = taskfarm.verify_password
    monkeypatch.setattr(taskfarm, "verify_password", lambda *args: hashes.append(1) or verify(*args))   # type: ignore
    raws = [farm.raw(request_bytes("GET", "/api/token", Authorization=basic("ada", Live.PASSWORD))) for _ in range(300)]
    assert {raw.answer()[0] for raw in raws} == {200}
    assert {get_with(farm, basic("ada", "wrong"))[0] for _ in range(taskfarm.WRONG_OF_USER)} == {401}
    assert len(hashes) == 2
    for raw in raws:
        raw.close()


def test_an_unknown_user_costs_a_hash_like_a_wrong_password(farm: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    stored: List[str] = []
    verify = taskfarm.verify_password
    monkeypatch.setattr(taskfarm, "verify_password", lambda p, s: stored.append(s) or verify(p, s))     # type: ignore
    assert get_with(farm, basic("nobody", "x"))[0] == get_with(farm, basic("ada", "x"))[0] == 401
    assert [text.rsplit("$", 2)[0] for text in stored] == [ADAS_HASH.rsplit("$", 2)[0]] * 2


def test_an_unknown_user_costs_what_users_cost_also_where_their_hashes_are_of_another_kind(
        store: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    users = {name: User(number, name, taskfarm.hash_password("x", kind), 1) for number, name, kind in (
        (1, "ada", "pbkdf2"), (2, "ann", "pbkdf2"), (3, "bob", "scrypt"))}
    logins = taskfarm.Logins(lambda: users, b"k" * 32, store.clock, "secret", {})
    stand_ins = {name: logins._stand_in(users, name) for name in ("nobody%d" % n for n in range(50))}
    assert {text.split("$")[0] for text in stand_ins.values()} == {"pbkdf2", "scrypt"}
    assert all(logins._stand_in(users, name) == text for name, text in stand_ins.items()), "and is the same each time"
    assert {logins._stand_in({"ada": users["ada"]}, name).rsplit("$", 2)[0] for name in stand_ins} == {"pbkdf2$600000"}
    assert not taskfarm.verify_password("x", stand_ins["nobody1"])
    stored: List[str] = []
    monkeypatch.setattr(taskfarm, "verify_password", lambda _, text: stored.append(text))
    with pytest.raises(taskfarm.NeedsHash) as needed:
        logins.who(basic("nobody1", "x").encode())
    needed.value.work()
    assert stored == [stand_ins["nobody1"]]


def test_a_password_that_is_too_long_is_not_looked_at(store: Direct) -> None:
    logins = store.farm.logins
    with pytest.raises(taskfarm.NeedsHash):
        logins.who(basic("ada", "x" * 1000).encode())
    for name, password in (("ada", "x" * 1001), ("ada", "e" + "\u0301" * 500), ("a" * 257, "x")):
        with pytest.raises(taskfarm.Unauthorized):
            logins.who(basic(name, password).encode())
    with pytest.raises(taskfarm.BadRequest, match="1000 bytes"):
        taskfarm.hash_password("x" * 1001)


def test_a_token_is_one_login_whatever_password_stands_beside_it(store: Direct) -> None:
    store.store.call(taskfarm.add_user("ada", ADAS_HASH))
    logins, token = store.farm.logins, store.farm.token(store.store.users["ada"], 0)
    for number in range(100):
        for header in (basic(token, str(number)), "Bearer  " + token, "bearer " + token, basic(token, ""),
                       "Bearer " + token):
            assert logins.who(header.encode()).name == "ada"
    assert len(logins.memory) == 2


class Guesser:
    """Somebody at an address, whose passwords are checked at once; `status` is what the last one ended in."""

    def __init__(self, logins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logins, self.hashes, self.wait_s = logins, 0, 0
        monkeypatch.setattr(taskfarm, "verify_password", self.verify)

    def verify(self, password: str, stored: str) -> bool:
        self.hashes += 1
        return password == Live.PASSWORD and stored == ADAS_HASH

    def status(self, header: str, address: str = "10.0.0.1") -> int:
        for _ in range(2):
            try:
                self.logins.who(header.encode(), address)
                return 200
            except taskfarm.NeedsHash as needed:
                needed.work()
            except FarmError as error:
                self.wait_s = int(dict(error.headers).get("Retry-After", 0))
                return error.status
        raise AssertionError("it is to be hashed again")

    def guess(self, number: int, user: str = "ada", address: str = "10.0.0.1") -> int:
        return self.status(basic(user, "wrong %d" % number), address)


@pytest.fixture
def guesser(store: Direct, monkeypatch: pytest.MonkeyPatch) -> Guesser:
    store.store.call(taskfarm.add_user("ada", ADAS_HASH))
    return Guesser(store.farm.logins, monkeypatch)


RIGHT = basic("ada", Live.PASSWORD)


@pytest.mark.parametrize("same", [False, True], ids=["many passwords", "one password"])
def test_after_five_wrong_logins_each_one_waits_twice_as_long(guesser: Guesser, store: Direct, same: bool) -> None:
    clock: Any = store.clock
    assert [guesser.guess(0 if same else number) for number in range(7)] == [401] * 5 + [429] * 2
    waits = []
    for number in range(10, 20):
        waits.append(guesser.wait_s)
        clock.pass_time(guesser.wait_s - 0.01)
        assert guesser.guess(0 if same else number) == 429, "nor does asking make the wait longer"
        assert guesser.status(RIGHT) == 429 and guesser.wait_s == 1
        clock.pass_time(0.01)
        assert [guesser.guess(0 if same else number), guesser.guess(0 if same else 99)] == [401, 429]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert guesser.hashes <= 15, "who has to wait costs no hash"
    clock.pass_time(60)
    assert guesser.status(RIGHT) == 200
    clock.pass_time(60)
    assert [guesser.guess(number) for number in range(6)] == [401] * 5 + [429], "a minute later all is forgotten"


def test_wrong_logins_that_are_rare_cost_nothing(guesser: Guesser, store: Direct) -> None:
    clock: Any = store.clock
    for number in range(20):
        clock.pass_time(15)
        assert guesser.guess(number) == 401


def test_wrong_logins_hold_up_their_address_and_user_alone(guesser: Guesser, store: Direct) -> None:
    token = "Bearer " + store.farm.token(store.store.users["ada"], 0)
    for number in range(6):
        last = guesser.guess(number)
    assert last == 429
    assert guesser.status(RIGHT, "10.0.0.2") == 200, "elsewhere"
    assert guesser.guess(0, "ann") == 401, "another user at the same address"
    assert guesser.status(token) == 200
    assert guesser.status(RIGHT) == 200, "what was right a short while ago is remembered"


def test_one_address_gets_few_hashes_whatever_users_it_names(guesser: Guesser) -> None:
    most = taskfarm.WRONG_OF_ADDRESS
    assert [guesser.guess(0, "user%d" % number) for number in range(200)] == [401] * most + [429] * (200 - most)
    assert guesser.hashes == most
    assert guesser.status(RIGHT) == 429
    assert [guesser.guess(number, "ada", "10.0.0.2") for number in range(3)] == [401] * 3, "elsewhere nothing changes"
    assert guesser.status(RIGHT, "10.0.0.2") == 200


def test_while_many_guess_those_who_were_wrong_share_a_hash_a_second(guesser: Guesser, store: Direct) -> None:
    clock: Any = store.clock
    assert guesser.guess(0, "ann", "10.0.0.2") == 401
    clock.pass_time(taskfarm.DOUBT_S)
    for most in (100 + taskfarm.WRONG_OF_ALL, 61, 61):
        before = guesser.hashes
        for number in range(10000):
            assert guesser.guess(number + before * 10000, "ada", "10.0.1.%d" % (number % 100)) in (401, 429)
            clock.pass_time(0.006)
        assert guesser.hashes - before <= most
        assert guesser.guess(before, "eve", "10.0.2.%d" % (before % 256)) == 401    # the next hash has to wait
        assert guesser.status(RIGHT, "10.0.0.2") == 200, "who was wrong long ago, or never, is not held up"
    clock.pass_time(61)
    assert [guesser.guess(number, "ann", "10.0.0.3") for number in range(3)] == [401] * 3, "it ends when they do"


def test_wrong_tokens_wait_and_hold_up_no_password(guesser: Guesser, store: Direct) -> None:
    token = store.farm.token(store.store.users["ada"], 0)
    assert [guesser.status("Bearer tf1.1.1.0.%d" % number) for number in range(6)] == [401] * 5 + [429]
    assert guesser.status(basic(token, "")) == guesser.status(RIGHT) == 200
    expired = "Bearer " + taskfarm.make_token(store.store.signing_key, store.store.users["ada"], 1.0)
    assert guesser.status(expired) == 401, "a worker whose token has expired is told so"


@pytest.mark.parametrize("address, network", [
    ("10.0.0.1", "10.0.0.1"), ("::ffff:10.0.0.1", "10.0.0.1"), ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
    ("fe80::1%eth0", "fe80::"), ("127.7.8.9", "127.0.0.1"), ("::ffff:127.2.0.1", "127.0.0.1"), ("::1", "127.0.0.1")])
def test_what_counts_as_one_address(address: str, network: str) -> None:
    assert taskfarm.network_of(address) == network


def test_the_memory_of_wrong_logins_is_bounded_and_its_oldest_go_first() -> None:
    throttle = taskfarm.Throttle()
    for number in range(20000):
        throttle.answered("10.1.%d.%d" % divmod(number, 256), "ada", 0.0)
        throttle.hashed("10.1.%d.%d" % divmod(number, 256), 0.0)
    assert len(throttle.pairs) == len(throttle.addresses) == throttle.REMEMBERED
    throttle.check("10.1.0.1", "ada", 0.0, hashing=True)
    with pytest.raises(taskfarm.TooManyRequests):
        throttle.check("10.1.78.31", "ada", 0.0, hashing=True)


def test_a_hash_is_not_made_for_who_was_wrong_too_often_since_it_came(guesser: Guesser) -> None:
    works = []
    for number in range(8):
        with pytest.raises(taskfarm.NeedsHash) as needed:
            guesser.logins.who(basic("ada", "wrong %d" % number).encode(), "10.0.0.1")
        works.append(needed.value.work)
    assert [guesser.guess(number) for number in range(10, 15)] == [401] * 5
    for work in works:
        work()
    assert guesser.hashes == 5


def test_each_wrong_login_is_told(guesser: Guesser, store: Direct) -> None:
    told: List[Any] = []
    guesser.logins.failed = lambda *words: told.append(words)
    guesser.guess(1)
    guesser.status("Bearer tf1.1.1.0.x")
    guesser.status(RIGHT)
    assert told == [("ada", "10.0.0.1", 1.7e9), ("tf1.", "10.0.0.1", 1.7e9)]


def test_a_wrong_login_is_counted_at_the_address_it_comes_from(farm: Live) -> None:
    def status(password: str, source: str) -> Tuple[int, Dict[str, str], bytes]:
        raw = farm.raw(token_request(password), source=source)
        answer = raw.answer()
        raw.close()
        return answer
    farm.service.farm.logins.throttle.network = str     # loopback addresses stand for those of other machines
    assert [status("wrong", "127.0.0.3")[0] for _ in range(5)] == [401] * 5
    code, headers, body = status(Live.PASSWORD, "127.0.0.3")
    assert (code, headers["content-type"], json.loads(body)["status"]) == (429, "application/problem+json", 429)
    assert 1 <= int(headers["retry-after"]) <= 60
    assert status(Live.PASSWORD, "127.0.0.4")[0] == 200


class SlowHash:
    """Password checks that wait for `let`; each is noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: List[str] = []
        self.let = threading.Event()
        verify = taskfarm.verify_password

        def wait(password: str, stored: str) -> bool:
            self.begun.append(password)
            assert self.let.wait(20)
            return verify(password, stored)
        monkeypatch.setattr(taskfarm, "verify_password", wait)


def token_request(password: str, user: str = "ada") -> bytes:
    return request_bytes("GET", "/api/token", Authorization=basic(user, password))


def test_few_passwords_wait_to_be_hashed_and_others_are_told_so(farm: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes, server = SlowHash(monkeypatch), farm.service.server
    farm.service.farm.logins.throttle.network = str
    raws = [farm.raw(token_request("wrong", "ada%d" % number)) for number in range(taskfarm.HASHES_OF_ADDRESS)]
    wait_until(lambda: len(server.hashes) == taskfarm.HASHES_OF_ADDRESS)
    more = farm.raw(token_request("another"))
    assert more.answer()[0] == 503, "one address cannot take all places"
    raws += [farm.raw(token_request("wrong", "ada%d" % number), source="127.0.0.2")
             for number in range(taskfarm.HASHES_OF_ADDRESS, taskfarm.MOST_HASHES)]
    wait_until(lambda: len(server.hashes) == taskfarm.MOST_HASHES)
    third = farm.raw(token_request("another"), source="127.0.0.3")
    status, headers, body = third.answer()
    assert (status, headers["retry-after"]) == (503, "1") and b"8 other passwords" in body
    third.close()
    same = farm.raw(token_request("wrong", "ada7"))
    wait_until(lambda: 2 in [len(pending.waiting) for pending in list(server.hashes.values())])
    hashes.let.set()
    assert [raw.answer()[0] for raw in [*raws, same]] == [401] * (taskfarm.MOST_HASHES + 1)
    more.sock.sendall(token_request(Live.PASSWORD))
    assert more.answer()[0] == 200
    for raw in [*raws, more, same]:
        raw.close()


def test_a_hash_that_nobody_waits_for_is_not_made(stepped: Stepped, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes, server = SlowHash(monkeypatch), stepped.server
    first = [stepped.new(token_request("first %d" % number)) for number in range(2)]
    stepped.turn_until(lambda: len(hashes.begun) == 2)
    for number in range(40):
        gone = stepped.new(token_request("wrong %d" % number))
        stepped.turn_until(lambda gone=gone: gone.served.pending)   # type: ignore[misc]
        gone.close()
        stepped.turn_until(lambda: len(server.connections) == len(server.hashes) == 2)
    right = stepped.new(token_request(Live.PASSWORD))
    stepped.turn_until(lambda: right.served.pending)
    hashes.let.set()
    stepped.turn_until(lambda: not server.hashes and right.served.request is None)
    assert right.answer()[0] == 200
    assert hashes.begun[2:] == [Live.PASSWORD], "the others had gone"
    for raw in (right, *first):
        raw.close()


def test_passwords_are_not_kept_in_memory(farm: Live) -> None:
    assert get_with(farm, basic("ada", Live.PASSWORD))[0] == 200
    logins = farm.service.farm.logins
    assert len(logins.memory) == 1 and Live.PASSWORD not in repr(logins.memory)
    assert base64.b64encode(b"ada:" + Live.PASSWORD.encode()) not in next(iter(logins.memory))


def test_a_hash_that_cannot_be_made_is_a_refusal_and_not_tried_for_ever(
        farm: Live, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delattr(taskfarm.hashlib, "scrypt")
    assert get_with(farm, basic("ada", Live.PASSWORD))[0] == 401
    wait_until(lambda: "Traceback" in caplog.text)      # it is logged after the answer
    assert caplog.text.count("Traceback") == 1


def test_what_a_hash_found_is_not_remembered_for_users_who_have_changed(store: Direct) -> None:
    logins, header = store.farm.logins, basic("ann", "secret").encode()
    with pytest.raises(taskfarm.NeedsHash) as needed:
        logins.who(header)
    store.store.call(taskfarm.add_user("ann", taskfarm.hash_password("secret", "pbkdf2")))
    with pytest.raises(taskfarm.Unauthorized):
        logins.who(b"Bearer anything")      # forgets what was remembered of the users before
    needed.value.work()
    with pytest.raises(taskfarm.NeedsHash) as needed:
        logins.who(header)
    needed.value.work()
    assert logins.who(header).name == "ann"


def test_a_name_that_looks_like_a_token_has_its_password_hidden_too(farm: Live) -> None:
    farm.service.store.call(taskfarm.add_user("tf1-ann", ADAS_HASH))
    header = basic("tf1-ann", Live.PASSWORD)
    assert get_with(farm, header)[0] == 200
    assert header.encode() not in farm.service.farm.logins.memory
    assert not taskfarm.TOKEN_FIELD.search(b"Authorization: " + header.encode())
    assert taskfarm.TOKEN_FIELD.search(b"Host: localhost\r\nAuthorization: " + basic(farm.token, "").encode())


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


# ---------------------------------------------------------------- TLS
# The certificate is judged by OpenSSL: by `ssl` as strictly as Python 3.13 does, and by its own program where it is.

def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, host: Optional[str] = None) -> ssl.SSLObject:
    """A handshake in memory; the client's end."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(to_client, to_server, server_hostname=host),
            server.wrap_bio(to_server, to_client, server_side=True)]
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ends[0]


@pytest.fixture(scope="module")
def own() -> Tuple[str, str]:
    """Key and certificate of some farm."""
    return taskfarm.make_certificate(["login1", "localhost"], ["127.0.0.1", "::1", "10.1.2.3"], time.time())


@pytest.mark.parametrize("host, accepted", [
    ("login1", True), ("localhost", True), ("127.0.0.1", True), ("::1", True), ("10.1.2.3", True),
    ("login2", False), ("10.1.2.4", False)])
def test_the_certificate_is_accepted_where_it_is_trusted(own: Tuple[str, str], host: str, accepted: bool) -> None:
    client = ssl.create_default_context(cadata=own[1])
    client.verify_flags |= ssl.VERIFY_X509_STRICT       # as Python 3.13
    with contextlib.nullcontext() if accepted else pytest.raises(ssl.SSLCertVerificationError):
        end = shake_hands(client, taskfarm.server_context(own[1], own[0]), host)
        assert end.getpeercert(binary_form=True) == taskfarm.certificate_der(own[1])


@pytest.mark.parametrize("extension", [
    "300f0603551d130101ff040530030101ff", "300e0603551d0f0101ff040403020284",
    "30130603551d25040c300a06082b06010505070301", "301d0603551d0e04160414", "301f0603551d23041830168014"],
    ids=["basicConstraints", "keyUsage", "extKeyUsage", "subjectKeyIdentifier", "authorityKeyIdentifier"])
def test_the_certificate_has_each_extension_that_strict_programs_ask_for(own: Tuple[str, str], extension: str) -> None:
    assert bytes.fromhex(extension) in taskfarm.certificate_der(own[1])


def test_a_pin_accepts_its_certificate_under_any_name_and_no_other(own: Tuple[str, str]) -> None:
    key, other = taskfarm.make_certificate(["login1"], [], time.time())
    pinned = taskfarm.pinned_context(own[1])
    server = taskfarm.server_context(own[1], own[0])
    assert shake_hands(pinned, server).version() in ("TLSv1.2", "TLSv1.3")
    assert pinned.minimum_version == server.minimum_version == ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(pinned, taskfarm.server_context(other, key))
    with pytest.raises(OSError):
        taskfarm.server_context(other, own[0])      # a key that is not the certificate's


def test_a_fingerprint_is_the_hash_of_the_first_certificate(own: Tuple[str, str]) -> None:
    hashed = hashlib.sha256(ssl.PEM_cert_to_DER_cert(own[1])).hexdigest()
    chain = "a comment\n" + own[1] + taskfarm.make_certificate(["ca"], [], time.time())[1]
    assert taskfarm.fingerprint(own[1]) == taskfarm.fingerprint(chain) == "SHA256:" + hashed


@pytest.mark.parametrize("utc, shown", [
    (0, b"\x17\x0d700101000000Z"), (2524607999, b"\x17\x0d491231235959Z"), (2524608000, b"\x18\x0f20500101000000Z")])
def test_times_of_certificates_from_2050_on_have_four_digits(utc: int, shown: bytes) -> None:
    assert taskfarm.der_time(utc) == shown


@given(st.integers(0, 2 ** 300))
def test_numbers_in_der_are_as_short_as_can_be_and_not_negative(number: int) -> None:
    content = taskfarm.der_integer(number)
    assert content[0] == 2 and content[1] == len(content) - 2
    assert int.from_bytes(content[2:], "big", signed=True) == number
    assert len(content) == 3 or content[2] or content[3] >= 128


def test_no_two_farms_have_the_same_key(own: Tuple[str, str]) -> None:
    key, certificate = taskfarm.make_certificate(["login1", "localhost"], ["127.0.0.1"], time.time())
    assert key != own[0] and certificate != own[1]


def test_a_farm_makes_its_certificate_once(tmp_path: Path) -> None:
    def certificate() -> Tuple[str, Tuple[str, str]]:
        service = taskfarm.Service(str(tmp_path / "farm.sqlite"), "127.0.0.1", 0)
        try:
            return service.certificate, service.store.call(taskfarm.read_certificate())
        finally:
            service.close()
    first, (key, kept) = certificate()
    assert first == kept and taskfarm.server_context(kept, key) and certificate() == (first, (key, kept))
    for address in ("127.0.0.1", "::1"):
        assert ipaddress.ip_address(address).packed in taskfarm.certificate_der(first)
    assert all(name.encode() in taskfarm.certificate_der(first) for name in (socket.gethostname(), "localhost"))


# ---------------------------------------------------------------- HTTP

RUN_BODY = b'{"numTasks": 3}'
REFUSALS = [
    # what, the request ({auth} is replaced), the status
    ("no login", request_bytes("GET", "/api/runs"), 401),
    ("no login comes before an unknown path", request_bytes("GET", "/nothing"), 401),
    ("no login comes before a wrong method", request_bytes("POST", "/livez"), 401),
    ("no login comes before the body",
     b"POST /api/run HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n", 401),
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
    ("no content type", b"POST /api/run HTTP/1.1\r\nHost: localhost\r\nAuthorization: {auth}\r\n"
     b"Content-Length: 15\r\n\r\n" + RUN_BODY, 415),
    ("another content type", request_bytes("POST", "/api/run", Authorization="{auth}", Content_Type="text/plain",
                                           Content_Length="15") + RUN_BODY, 415),
    ("no body", request_bytes("POST", "/api/run", Authorization="{auth}"), 400),
    ("a field where none is taken", request_bytes("DELETE", "/api/runs/x", b'{"all": true}', Authorization="{auth}"),
     400),
    ("no Host", b"GET /livez HTTP/1.1\r\n\r\n", 400),
    ("two Hosts", request_bytes("GET", "/livez", Host="again"), 400),
    ("a space before the colon", request_bytes("GET", "/livez", X__="1").replace(b"X--:", b"X :"), 400),
    ("a folded line", b"GET /livez HTTP/1.1\r\nHost: localhost\r\n folded\r\n\r\n", 400),
    ("a bare LF", b"GET /livez HTTP/1.1\nHost: localhost\n\n", 400),
    ("a NUL in a header", b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n", 400),
    ("a bare CR in a header", b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: a\rb\r\n\r\n", 400),
    ("no version", b"GET /livez\r\n\r\n", 400),
    ("another version", b"GET /livez HTTP/2.0\r\n\r\n", 505),
    ("bytes that are not ASCII", b"GET /liv\xe9z HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
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
    pytest.param(request_bytes("GET", "http://localhost/readyz?"), [200, 200], id="an absolute target"),
    pytest.param(request_bytes("GET", "/api/%72uns", Authorization="{auth}"), [404, 200], id="fixed words as they are"),
    pytest.param(request_bytes("GET", "/readyz", Connection="close"), [200], id="close is respected"),
    pytest.param(b"GET /readyz HTTP/1.0\r\n\r\n", [200], id="HTTP/1.0 closes"),
    pytest.param(b"GET /readyz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", [200, 200], id="unless asked"),
    pytest.param(request_bytes("GET", "/readyz") * 50, [200] * 51, id="pipelined"),
])
def test_what_follows_on_the_connection(shared_farm: Live, first: bytes, statuses: List[int]) -> None:
    assert exchange(shared_farm, first + CLOSE) == statuses


OWN = socket.gethostname()
HOSTS = [
    # a Host field, and what becomes of a request with it
    ("localhost", 200), ("LOCALHOST.", 200), ("localhost:1", 200), ("farm.localhost:5000", 200),
    ("127.0.0.1:{port}", 200), ("10.1.2.3", 200), ("[::1]:5000", 200), ("[2001:db8::1]", 200),
    (OWN, 200), (OWN.upper() + ":5000", 200),
    (OWN.partition(".")[0], 200),
    ("evil.example", 421), ("evil.example:5000", 421), ("localhost.evil.example", 421), ("127.0.0.1.evil.example", 421),
    (OWN + ".evil.example", 421), ("", 421), (":5000", 421), ("127.1", 421), ("2130706433", 421), ("0x7f.0.0.1", 421),
    ("[::g]", 400), ("[1]", 421), ("::1", 400), ("localhost@evil.example", 400), ("evil.example/localhost", 400),
    ("localhost, evil.example", 400), ("evil.example#localhost", 400), ("localhost\xe9", 400), ("local host", 400)]


@pytest.mark.parametrize("host, status", HOSTS)
def test_a_request_is_for_this_server_or_refused(shared_farm: Live, host: str, status: int) -> None:
    named = host.replace("{port}", str(shared_farm.port)).encode("latin-1")
    for method, path in (("GET", "/livez"), ("GET", "/"), ("GET", "/api/runs"), ("OPTIONS", "*"), ("BREW", "/nothing")):
        raw = shared_farm.raw(request_bytes(method, path, Authorization=basic(shared_farm.token, "")).replace(
            b"Host: localhost", b"Host: " + named))
        got, _, body = raw.answer()
        assert got == (status if status != 200 or method == "GET" else 405 if path == "*" else 404), (method, path)
        assert status != 421 or b"--allow-host" in body
        raw.close()


def test_few_hosts_are_remembered(shared_farm: Live) -> None:
    hosts = [b"127.0.0.%d" % number for number in range(200)]
    data = b"".join(request_bytes("GET", "/livez").replace(b"localhost", host) for host in hosts)
    assert exchange(shared_farm, data + CLOSE) == [200] * 201
    assert 0 < len(shared_farm.service.server.hosts) <= taskfarm.MOST_HOSTS
    evil = request_bytes("GET", "/livez").replace(b"localhost", b"evil.example")
    assert exchange(shared_farm, evil * 2 + CLOSE) == [421, 421, 200], "what was refused is not remembered"


def test_more_names_of_a_server_are_told_by_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKFARM_ALLOW_HOST", "One.example two.example")
    args = taskfarm.make_parser().parse_args(["serve", "--db", "f", "--allow-host", "three", "--allow-host", "four."])
    service = Service(str(tmp_path / "f"), "localhost", 0, advertise="Front", allow_hosts=args.allow_host)
    for host in (b"one.example", b"TWO.example:5000", b"three", b"four", b"front", b"localhost"):
        taskfarm.check_host(host, service.server.names)
    with pytest.raises(taskfarm.Misdirected):
        taskfarm.check_host(b"five", service.server.names)
    service.close()


@pytest.mark.parametrize("target, statuses", [
    ("http://evil.example/livez", [421]), ("http://evil.example", [421]), ("http://evil.example?/localhost/", [421]),
    ("HTTPS://evil.example:5000//livez", [421]), ("http://localhost@evil.example/livez", [400]),
    ("http:///livez", [421]), ("http://localhost%2f@evil.example/livez", [400]),
    ("http://localhost/livez", [200]), ("//evil.example/livez", [401]), ("/%2e%2e/livez", [401]), ("/../livez", [401]),
    ("/api/runs/%2e%2e%2flivez", [401]), ("/livez%0d%0aX:1", [401]), ("/livez%00", [401]), ("/./livez", [401])])
def test_the_host_of_a_target_counts_and_a_path_is_taken_as_it_is(
        shared_farm: Live, target: str, statuses: List[int]) -> None:
    assert exchange(shared_farm, request_bytes("GET", target) + CLOSE) == [*statuses, 200]


def test_an_absolute_target_excuses_no_wrong_host(shared_farm: Live) -> None:
    wrong = request_bytes("GET", "http://localhost/livez").replace(b"Host: localhost", b"Host: evil.example")
    assert exchange(shared_farm, wrong + CLOSE) == [421, 200]
    assert exchange(shared_farm, b"GET http://evil.example/livez HTTP/1.0\r\n\r\n") == [421]
    assert exchange(shared_farm, b"GET /livez HTTP/1.0\r\n\r\n") == [200]


@pytest.mark.parametrize("site, refused", [
    ({}, False), ({"Origin": "http://localhost"}, False), ({"Origin": "https://LOCALHOST"}, False),
    ({"Sec_Fetch_Site": "same-origin"}, False), ({"Sec_Fetch_Site": "none"}, False),
    ({"Origin": "http://localhost", "Sec_Fetch_Site": "same-origin"}, False),
    ({"Origin": "http://evil.example"}, True), ({"Origin": "null"}, True), ({"Origin": ""}, True),
    ({"Origin": "http://localhost:81"}, True), ({"Origin": "http://localhost.evil.example"}, True),
    ({"Origin": "ftp://localhost"}, True), ({"Origin": "localhost"}, True), ({"Origin": "http://localhost/"}, True),
    ({"Origin": "http://localhost", "ORIGIN": "http://evil.example"}, True),
    ({"Sec_Fetch_Site": "cross-site"}, True), ({"Sec_Fetch_Site": "same-site"}, True), ({"Sec_Fetch_Site": ""}, True),
    ({"Origin": "http://localhost", "Sec_Fetch_Site": "cross-site"}, True)])
def test_a_page_of_another_site_can_do_nothing(farm: Live, site: Dict[str, str], refused: bool) -> None:
    run = farm.ask("POST", "/api/run", {"numTasks": 3})[1]["uuid"]
    farm.ask("PUT", "/api/runs/%s/tasks/0" % run, {"status": "done"})
    login = {"Authorization": basic(farm.token, "")}
    for method, path, body in (("GET", "/livez", b""), ("OPTIONS", "/api/run", b""), ("GET", "/api/runs", b""),
                               ("PUT", "/api/runs/%s/tasks/1" % run, b'{"status": "done"}')):
        raw = farm.raw(request_bytes(method, path, body, **login, **site))
        assert (raw.answer()[0] == 403) == refused, (method, path)
        raw.close()
    # What a form can send: no type that has to be allowed first.
    raw = farm.raw(request_bytes("POST", "/api/runs/%s/restart?all=True" % run, **login, **site,
                                 **{"Content_Type": "application/x-www-form-urlencoded", "Content_Length": "0"}))
    assert raw.answer()[0] == (403 if refused else 204)
    raw.close()
    assert farm.ask("GET", "/api/runs/%s?info=numDone" % run) == (200, {"numDone": 1 if refused else 0})


def test_another_origin_is_refused_before_anybody_is_asked_for_a_login(shared_farm: Live) -> None:
    assert exchange(shared_farm, request_bytes("GET", "/api/runs", Origin="http://evil.example") + CLOSE) == [403, 200]


def test_a_header_line_that_is_malformed_is_not_shown(shared_farm: Live) -> None:
    for line in (b"Authorization : Basic c2VjcmV0", b"Authorization: Basic\r\n c2VjcmV0",
                 b"Authorization Basic c2VjcmV0"):
        raw = shared_farm.raw(b"GET /api/runs HTTP/1.1\r\nHost: localhost\r\n" + line + b"\r\n\r\n")
        status, _, body = raw.answer()
        assert status == 400 and b"c2VjcmV0" not in body and b"header line" in body
        raw.close()


def test_a_head_that_comes_byte_by_byte_is_looked_at_once() -> None:
    head = request_bytes("GET", "/livez", X="y" * 10000)
    assert taskfarm.cut_head(b"\n" * 1000 + head, 1003) == (b"\n" * 1000 + head[:-4], 1000 + len(head))
    assert taskfarm.cut_head(bytearray(b"\n" * 1000 + head[:-4]), 1003) == (None, 0), "what was seen is left alone"
    seen = 0
    for end in range(1, len(head)):
        assert taskfarm.cut_head(head[:end], seen) == (None, 0)
        seen = end
    assert taskfarm.cut_head(head + b"next", seen) == (head[:-4], len(head))


@pytest.mark.parametrize("data, kind", [
    (b"GET /livez HTTP/1.1\n", taskfarm.BadRequest), (b"GET /livez HTTP/1.1\r\nHost: a\n", taskfarm.BadRequest),
    (b"\r\n\x16", taskfarm.BadRequest), (b"{", taskfarm.BadRequest), (b"G" * 17000, taskfarm.UriTooLong),
    (b"GET / HTTP/1.1\r\nX: " + b"x" * 17000, taskfarm.HeadTooLarge),
    (b"GET / HTTP/1.1\r\n" + b"X: 1234567890\r\n" * 3000, taskfarm.HeadTooLarge)])
def test_what_can_become_no_request_is_refused_as_soon_as_it_shows(data: bytes, kind: type) -> None:
    for step in (1, 7, 4096):
        inbox = b""
        with pytest.raises(kind):
            for at in range(0, len(data), step):
                seen, inbox = len(inbox), inbox + data[at:at + step]
                taskfarm.cut_head(inbox, seen)


def test_a_token_that_is_revoked_while_its_body_comes_is_refused(farm: Live) -> None:
    token = new_token(farm)
    raw = farm.raw(request_bytes("POST", "/api/run", RUN_BODY, Authorization=basic(token["token"], ""))[:-5])
    wait_until(lambda: farm.service.server.bodies)
    assert farm.ask("DELETE", "/api/tokens/%d" % token["id"])[0] == 204
    raw.sock.sendall(RUN_BODY[-5:])
    assert raw.answer()[0] == 401 and farm.ask("GET", "/api/runs")[1]["data"] == []
    raw.close()


@pytest.mark.parametrize("query", ["", "order=finished&", "status=failed&", "order=finished&status=failed&"])
def test_a_page_of_long_messages_is_a_short_one(store: Direct, query: str) -> None:
    run = a_run(store, 400)
    for number in range(400):
        assert report(store, run, number, status="failed", message="\x01" * 2000) == 204
    after, found, pages = "", [], 0
    while after is not None:
        page = store.ask("GET", "/api/runs/%s/tasks?%slimit=1000%s" % (run, query, after and "&after=" + after))[1]
        found += [task["task"] for task in page["data"]]
        after, pages = page["next"], pages + 1
        assert sum(len(task["message"]) for task in page["data"]) <= taskfarm.PAGE_CHARS
    assert sorted(found) == list(range(400)) and pages >= 4


def test_slashes_that_come_twice_are_one(farm: Live) -> None:
    for path in ("//api/runs", "/api//runs", "//api///runs", "http://localhost//api//runs"):
        assert exchange(farm, request_bytes("GET", path, Authorization="{auth}") + CLOSE) == [200, 200], path
    assert exchange(farm, request_bytes("GET", "/api/runs//", Authorization="{auth}") + CLOSE) == [404, 200]


def test_nothing_large_is_remembered_of_those_who_have_no_login(shared_farm: Live) -> None:
    routes, parsed = shared_farm.service.server.routes, taskfarm.PARSED
    paths, before = routes.walked.cache_info().currsize, len(parsed)
    for number in range(50):
        path = "/api/runs/%s%d/x" % ("%F0%9F%98%80" * 1000, number)
        assert exchange(shared_farm, request_bytes("GET", path, Connection="close")) == [401]
        fields = {"X%d" % n: "" for n in range(20)}
        assert exchange(shared_farm, request_bytes("GET", "/nothing", Connection="close", **fields,
                                                   Authorization="Bearer tf1.%d" % number)) in ([401], [429])
    assert routes.walked.cache_info().currsize - paths <= 2 and len(parsed) == before


def task_route() -> Any:
    return next(route for route in taskfarm.ROUTES.table if (route.method, route.path) == (
        "PUT", "/api/runs/<run>/tasks"))


def read_in_slices(body: bytes) -> Tuple[Any, int]:
    """The fields of a body or the class of its refusal, and in how many slices it was read."""
    reading, slices = taskfarm.read_large_body(task_route(), body), 0
    while True:
        try:
            next(reading)
            slices += 1
        except StopIteration as end:
            return end.value, slices
        except taskfarm.BadRequest as refusal:
            return type(refusal), slices


ENTRY = st.fixed_dictionaries({"task": st.integers(0, 10 ** 6)}, optional={
    "status": st.sampled_from(taskfarm.STATUS), "message": st.text(st.sampled_from('{}[],:"\\ a\u00e9\U0001f600\n')),
    "elapsed": st.floats(0, 10 ** 6), "attempt": st.one_of(st.integers(-1, 9), st.just([{}, {}]), st.just({"a": {}}))})


@given(st.lists(ENTRY, max_size=12), st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " :\t")]), st.booleans(),
       st.one_of(st.none(), st.tuples(st.integers(0, 600), st.sampled_from(["", "]", "}", ",", '"', "1", "\\"]))))
@settings(max_examples=100 if QUICK else 1000, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_body_in_slices_is_read_like_one_at_once(entries: List[Any], marks: Tuple[str, str], ascii_only: bool,
                                                   damage: Optional[Tuple[int, str]]) -> None:
    text = json.dumps({"worker_uuid": "w", "data": entries}, separators=marks, ensure_ascii=ascii_only)
    if damage:
        text = text[:damage[0]] + damage[1] + text[damage[0] + 1:]
    body = text.encode()
    try:
        whole: Any = taskfarm.read_new_body(task_route(), body)
    except taskfarm.BadRequest as refusal:
        whole = type(refusal)
    window, loose = taskfarm.LargeJson.WINDOW, taskfarm.LargeJson.LOOSE_WINDOW
    try:
        for taskfarm.LargeJson.WINDOW, taskfarm.LargeJson.LOOSE_WINDOW in ((window, loose), (60, 20), (200, 0)):
            if text.count('"data"') < 2 and text.count('"worker_uuid"') < 2:
                assert read_in_slices(body)[0] == whole
    finally:
        taskfarm.LargeJson.WINDOW, taskfarm.LargeJson.LOOSE_WINDOW = window, loose


def test_entries_that_are_wrong_are_named_by_their_place() -> None:
    bad: List[Any] = [{"task": 0, "exitCode": 1}, {"status": "done"}, 7, {"task": 3}]
    good = [{"task": number, "status": "done"} for number in range(4, 8)]
    with pytest.raises(taskfarm.BadRequest) as refusal:
        taskfarm.read_body(task_route(), json.dumps({"data": [*bad, *good, {}]}).encode())
    assert re.findall(r"data\[(\d+)\]", str(refusal.value)) == ["0", "1", "2", "3", "8"]


LARGE = taskfarm.BATCH_BODY_LIMIT


@pytest.mark.parametrize("body, most", [
    pytest.param(b'{"data": [' + b"[]," * (LARGE // 3) + b"[]]}", 1, id="small junk"),
    pytest.param(b'{"data": [' + b"{}," * (LARGE // 3) + b"{}]}", 1, id="empty objects"),
    pytest.param(b'{"data": [' + b"[" * (LARGE // 2) + b"]" * (LARGE // 2) + b"]}", 1, id="deep"),
    pytest.param(b"[" * LARGE, 1, id="no object"),
    pytest.param(b'{"data": [{"task": ' + b"9" * LARGE + b"}]}", 1, id="a long number"),
    pytest.param(b'{"data": [{"task": 1, "message": "' + b"x" * LARGE + b'"}]}', 1, id="a long text"),
    pytest.param(b'{"data": [{"task": 1' + b" " * LARGE + b"}]}", 1, id="blanks"),
    pytest.param(b'{"data": ' + b" " * LARGE + b"[]}", 1, id="blanks before"),
    pytest.param(b'{"data": [' + b",".join(b'{"task": %d, "status": "done"}' % n for n in range(10 ** 5)) + b"]}", 30,
                 id="many entries"),
    pytest.param(b"{" + b'"x": 1,' * 10 ** 5 + b'"x": 1}', 1, id="unknown fields"),
])
def test_a_large_body_that_is_none_is_given_up_early(body: bytes, most: int) -> None:
    fields, slices = read_in_slices(body)
    assert fields is taskfarm.BadRequest and slices <= most


def test_each_slice_of_a_large_body_is_small() -> None:
    entries = [{"task": number, "attempt": 1, "status": "failed", "message": 'the "}, {" of C' * 4} for number in range(
        10000)]
    lengths = []

    class Measured(json.JSONDecoder):
        def decode(self, text: str) -> Any:     # type: ignore[override]
            lengths.append(len(text))
            return super().decode(text)
    decoder, taskfarm.DECODER = taskfarm.DECODER, Measured()
    try:
        fields, slices = read_in_slices(json.dumps({"data": entries}).encode())
    finally:
        taskfarm.DECODER = decoder
    assert len(fields["data"]) == 10000 and slices > 50
    assert max(lengths) <= taskfarm.LargeJson.WINDOW + 2


@pytest.mark.parametrize("length", [0, taskfarm.BODY_LIMIT + 1], ids=["small", "large"])
def test_of_fields_that_come_twice_the_last_counts_however_large_the_body(length: int) -> None:
    def said(entry: str) -> bytes:
        return b'"data": [{"task": 1, "task": 3, "status": "failed", "status": "%s"}]' % entry.encode()
    blanks = b" " * (length // 2 + 1)
    body = b'{"worker_uuid": "v", %s,%s "worker_uuid": "w", %s%s}' % (said("waiting"), blanks, said("done"), blanks)
    fields = taskfarm.read_body(task_route(), body)
    assert fields == {"worker_uuid": "w", "data": [taskfarm.Report(3, None, taskfarm.DONE)]}


def test_a_field_that_comes_again_and_again_is_read_in_slices() -> None:
    again = b'"worker_uuid": "w",' * 10 ** 4
    fields, slices = read_in_slices(b"{" + again + b'"data": [{"task": 1, "status": "done"}]}')
    assert fields["worker_uuid"] == "w" and len(fields["data"]) == 1 and slices > 10 ** 4


def test_a_number_of_very_many_digits_is_not_read() -> None:
    for digits in (401, 60000):
        with pytest.raises(taskfarm.BadRequest, match="digits"):
            taskfarm.read_new_body(task_route(), b'{"data": [{"task": %s}]}' % (b"7" * digits))
    digits_in_text = {"data": [{"task": 1, "status": "failed", "message": "7" * 1000}]}
    assert taskfarm.read_new_body(task_route(), json.dumps(digits_in_text).encode())["data"][0].message == "7" * 1000


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


def test_what_follows_a_refused_body_that_was_not_waited_for_is_answered(farm: Live) -> None:
    one = request_bytes("POST", "/api/run", b"{}", Authorization="{auth}", Expect="100-continue")
    assert exchange(farm, one + CLOSE) == [400, 200]


def test_a_client_of_http_1_0_is_not_told_to_go_on(farm: Live) -> None:
    one = request_bytes("POST", "/api/run", Authorization=basic(farm.token, ""), Expect="100-continue",
                        Content_Length="15", Content_Type="application/json").replace(b"HTTP/1.1", b"HTTP/1.0")
    raw = farm.raw(one)
    wait_until(lambda: farm.service.server.bodies)
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
    assert taskfarm.front_page() is taskfarm.front_page(), "it is made once"


# ---------------------------------------------------------------- SERVER

def test_a_handshake_that_goes_on_and_on_is_not_kept_until_it_is_whole(farm: Live) -> None:
    hello = b"\x16\x03\x01\x40\x00\x01\x01\x00\x00\x03\x03" + b"x" * 16378        # announces 64 KiB
    end = taskfarm.TlsEnd(farm.service.server.context)
    assert end.decrypt(hello[:taskfarm.HANDSHAKE_LIMIT - 1]) == b""
    with pytest.raises(ssl.SSLError, match="too long"):
        end.decrypt(hello[taskfarm.HANDSHAKE_LIMIT - 1:])


def test_a_burst_of_requests_is_served_in_turns_that_others_come_between(stepped: Stepped) -> None:
    one = request_bytes("GET", "/livez")
    other, *bursts = stepped.new(b"", 6)
    for raw in bursts:
        raw.sock.sendall(one * 200)
    stepped.turn()

    def to_come() -> List[int]:
        return [len(raw.served.inbox) // len(one) for raw in bursts]
    left, turns = to_come(), 0
    while any(left):
        other.sock.sendall(one)
        stepped.turn()
        now = to_come()
        assert 0 < sum(left) - sum(now) <= 10, "as many as fit the time of a turn"
        assert max(now) - min(now) <= 1, "and as many of each"
        left, turns = now, turns + 1
    assert turns > 50
    assert [other.answer()[0] for _ in range(turns - 1)] == [200] * (turns - 1), "another has its answer in each"
    for raw in bursts:
        assert [raw.answer()[0] for _ in range(200)] == [200] * 200
    for raw in (other, *bursts):
        raw.close()


def test_who_has_logged_in_is_served_before_a_crowd_that_has_not(stepped: Stepped) -> None:
    own = request_bytes("GET", "/api/token", **stepped.login())
    user = stepped.new(own)
    stepped.turn_until(lambda: user.served.known)
    crowd = stepped.new(request_bytes("GET", "/livez"), 60)
    user.sock.sendall(own)
    stepped.turn()
    assert [user.answer()[0], user.answer()[0]] == [200, 200]
    assert sum(raw.served.spoken for raw in crowd) < 20
    stepped.turn_until(lambda: all(raw.served.spoken for raw in crowd))
    for raw in [user, *crowd]:
        raw.close()


def test_outcomes_are_shown_in_turns_and_one_big_answer_in_each(stepped: Stepped) -> None:
    raws = stepped.new(b"", 40)
    shown: List[int] = []

    def show(number: int) -> taskfarm.Reply:
        shown.append(number)
        return taskfarm.Reply(204)
    for number, raw in enumerate(raws):
        raw.served.deliver(taskfarm.list_users().shown_as(show, big_answer=number >= 30), number)
    stepped.turn()
    assert 0 < len(shown) <= 12 and shown == list(range(len(shown)))
    for _ in range(40):
        before = len(shown)
        stepped.turn()
        assert len(shown) - before <= 13 and sum(number >= 30 for number in shown[before:]) <= 1
    assert sorted(shown) == list(range(40))
    for raw in raws:
        raw.close()


def test_a_big_answer_that_waits_for_a_restart_holds_up_no_other(stepped: Stepped) -> None:
    asked: List[Operation] = []
    stepped.service.farm.submit = asked.extend      # type: ignore[assignment]      # and nothing answers
    page = request_bytes("GET", "/api/workers?limit=1000", **stepped.login())
    raws = stepped.new(page, taskfarm.BIG_AT_ONCE + 2)
    stepped.turn_until(lambda: asked and all(raw.served.busy for raw in raws))
    assert (len(asked), len(stepped.server.big_waiting)) == (taskfarm.BIG_AT_ONCE, 2), "few of them lie in memory"
    before = stepped.clock().tick
    assert all(0 < named.came <= before for _, named in stepped.server.big_waiting), "that it waits here counts"
    stepped.clock.pass_time(taskfarm.BIG_S)
    stepped.turn(2)
    assert len(asked) == len(raws) and not stepped.server.big_waiting
    for raw in raws:
        raw.close()


def waiting_claim(stepped: Stepped) -> Tuple[Raw, Operation]:
    """A connection whose claim was handed to a store that does not answer, and the operation."""
    asked: List[Operation] = []
    stepped.service.farm.submit = asked.extend      # type: ignore[assignment]
    raw = stepped.new(request_bytes("POST", "/api/runs/x/task", b'{"worker_uuid": "w"}', **stepped.login()))
    stepped.turn_until(lambda: asked)
    assert not asked[0].unwanted
    return raw, asked[0]


def test_what_nobody_waits_for_any_more_is_unwanted(stepped: Stepped) -> None:
    raw, named = waiting_claim(stepped)
    raw.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()     # sends a reset
    stepped.turn_until(lambda: named.unwanted)
    assert raw.served not in stepped.server.connections


@pytest.mark.parametrize("begun", [False, True])
def test_who_has_sent_an_end_and_waits_long_is_taken_for_gone(stepped: Stepped, begun: bool) -> None:
    stepped.clock.step_s = 0.0
    raw, named = waiting_claim(stepped)
    named.begun = begun
    raw.sock.shutdown(socket.SHUT_WR)       # a close looks the same from here
    stepped.turn_until(lambda: raw.served.eof)
    stepped.clock.pass_time(taskfarm.LEFT_S * 0.9)
    stepped.turn()
    assert not named.unwanted and 0 < stepped.server._wait_s(60.0) < taskfarm.LEFT_S * 0.2
    stepped.clock.pass_time(taskfarm.LEFT_S * 0.2)
    stepped.turn()
    assert named.unwanted is not begun, "what has begun is ended, and answered"
    if begun:
        raw.served.deliver(named, taskfarm.NothingWaiting(None))
        stepped.turn_until(lambda: not raw.served.busy)
        assert raw.answer()[0] == 204 and not named.unwanted
    assert raw.answer()[0] == 0
    assert not stepped.server.left
    raw.close()


def test_who_has_sent_an_end_is_answered_when_the_answer_comes_soon(stepped: Stepped) -> None:
    stepped.clock.step_s = 0.0
    submit = stepped.service.farm.submit
    one = request_bytes("GET", "/readyz")
    raw = stepped.new(one * 3)
    raw.sock.shutdown(socket.SHUT_WR)
    held: List[Operation] = []
    stepped.service.farm.submit = held.extend       # type: ignore[assignment]
    for _ in range(3):
        stepped.turn_until(lambda: held)
        stepped.clock.pass_time(taskfarm.LEFT_S * 0.9)      # longer than that all together
        stepped.turn()
        assert raw.served in stepped.server.left
        submit([held.pop()])
        stepped.turn_until(lambda: not raw.served.busy or held)
    assert [raw.answer()[0] for _ in range(4)] == [200, 200, 200, 0]
    raw.close()


def test_a_large_body_is_read_in_slices_that_others_come_between(stepped: Stepped) -> None:
    body = json.dumps({"data": [{"task": number, "status": "done"} for number in range(10000)]}).encode()
    stepped.clock.step_s = taskfarm.TURN_S      # a step in each turn
    large = stepped.new(request_bytes("PUT", "/api/runs/none/tasks", body, **stepped.login()))
    other = stepped.new(request_bytes("GET", "/livez"))
    stepped.turn_until(lambda: large.served.reader is not None)
    for _ in range(5):
        assert other.answer()[0] == 200 and large.served.reader is not None
        other.sock.sendall(request_bytes("GET", "/livez"))
        stepped.turn(2)
    assert stepped.server.users.total >= len(body), "it is counted until it has been read"
    stepped.turn_until(lambda: large.served.request is None)
    assert large.answer()[0] == 404
    large.close()
    other.close()


def test_a_small_request_of_a_user_does_not_wait_behind_large_bodies(stepped: Stepped,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"data": [{"task": number, "status": "done"} for number in range(10000)]}).encode()
    small = request_bytes("GET", "/api/token", **stepped.login())
    user, *crowd = stepped.new(small, 7)
    stepped.turn_until(lambda: all(raw.served.known for raw in (user, *crowd)))
    assert [raw.answer()[0] for raw in (user, *crowd)] == [200] * 7
    for raw in crowd:
        raw.sock.sendall(request_bytes("PUT", "/api/runs/none/tasks", body, **stepped.login()))
    stepped.turn_until(lambda: len(stepped.server.large) >= 6)
    monkeypatch.setattr(taskfarm, "DIRECT_AT_ONCE", -1)     # as if very many came in each turn
    stepped.clock.step_s = taskfarm.TURN_S                  # a step of each line in a turn
    for _ in range(3):
        user.sock.sendall(small)
        stepped.turn(2)
        assert user.answer()[0] == 200 and len(stepped.server.large) >= 6
    for raw in (user, *crowd):
        raw.close()


def test_a_thread_that_has_more_to_do_lets_the_writer_end_its_transaction(stepped: Stepped,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    ways: List[float] = []
    monkeypatch.setattr(stepped.service.farm, "wait_for_commit", ways.append)
    raw = stepped.new(request_bytes("GET", "/livez"))
    stepped.turn(2)
    assert raw.answer()[0] == 200 and not ways
    raw.sock.sendall(request_bytes("GET", "/livez") * 50)
    stepped.turn_until(lambda: ways)
    assert ways == [taskfarm.TURN_S] and len(stepped.server.guest) == 1
    raw.close()


@pytest.mark.parametrize("number", [0, 2, 3, 4, 6, 7])
def test_a_list_of_runs_in_pieces_is_one_list(farm: Live, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(taskfarm, "RUNS_PIECE", 3)
    runs = [make_run(farm, 5) for _ in range(number + 1)]
    assert farm.ask("DELETE", "/api/runs/" + runs.pop(number // 2))[0] == 204
    assert [run["uuid"] for run in farm.ask("GET", "/api/runs")[1]["data"]] == runs
    client = taskfarm.Client(lambda: access_of(farm))
    assert [run["uuid"] for run in client.ask("GET", "/api/runs")["data"]] == runs
    client.close()
    raw = farm.raw(request_bytes("HEAD", "/api/runs", Authorization=basic(farm.token, "")) + request_bytes(
        "GET", "/api/runs", Authorization=basic(farm.token, "")) * 2 + CLOSE)
    assert raw.answer(head_only=True)[0] == 200, "HEAD has no body, and what follows is the next answer"
    assert [[run["uuid"] for run in json.loads(raw.answer()[2])["data"]] for _ in range(2)] == [runs, runs]
    assert raw.answer()[0] == 200
    raw.close()
    old = farm.raw(request_bytes("GET", "/api/runs", Authorization=basic(farm.token, ""), Connection="keep-alive")
                   .replace(b"HTTP/1.1", b"HTTP/1.0"))
    head, _, body = (old.file.readline() if number < 3 else old.file.read()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and b"chunked" not in head
    assert number < 3 or [run["uuid"] for run in json.loads(body)["data"]] == runs
    old.close()


def test_a_list_that_breaks_off_has_no_end(farm: Live, monkeypatch: pytest.MonkeyPatch,
                                           caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(taskfarm, "RUNS_PIECE", 2)
    for _ in range(5):
        make_run(farm, 1)
    shown = taskfarm.run_json
    monkeypatch.setattr(taskfarm, "run_json", lambda run: shown(run) if run.id < 4 else 1 / 0)
    with pytest.raises(http.client.IncompleteRead):
        farm.ask("GET", "/api/runs")
    assert "ZeroDivisionError" in caplog.text
    farm.local = threading.local()


def test_a_list_that_nobody_reads_costs_the_piece_in_hand(farm: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskfarm, "RUNS_PIECE", 1)
    monkeypatch.setattr(taskfarm, "run_json", lambda _: "x" * 2 ** 20)
    for _ in range(40):
        farm.service.store.call(taskfarm.create_run(os.urandom(8).hex(), 1))
    deaf = farm.raw(request_bytes("GET", "/api/runs", Authorization=basic(farm.token, "")))
    wait_until(lambda: any(c.outbox for c in list(farm.service.server.connections)))
    assert farm.ask("GET", "/livez")[0] == 200
    assert farm.service.server.users.total < 2 ** 20 + 100
    assert len(deaf.answer()[2]) > 40 * 2 ** 20
    deaf.close()


def test_half_heads_without_a_login_keep_nobody_out(stepped: Stepped, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskfarm, "GUEST_LIMIT", 100000)
    user = stepped.new(request_bytes("GET", "/api/token", **stepped.login()))
    stepped.turn_until(lambda: user.served.known)
    assert user.answer()[0] == 200
    body = b'{"numTasks": 1' + b" " * 50000 + b"}"
    whole = request_bytes("POST", "/api/run", body, **stepped.login())
    user.sock.sendall(whole[:20000])
    halves = []
    for _ in range(30):
        halves.append(stepped.new(request_bytes("GET", "/livez", X="x" * 9000)[:-1]))
        stepped.turn_until(lambda: halves[-1].served.inbox)
        assert stepped.server.guests.total <= 100000
    assert [raw.served in stepped.server.connections for raw in halves] == [False] * 19 + [True] * 11
    user.sock.sendall(whole[20000:])
    stepped.turn_until(lambda: user.served.request is None)
    assert user.answer()[0] == 201
    for raw in [user, *halves]:
        raw.close()


def test_when_the_buffers_are_full_those_who_take_nothing_are_closed(
        stepped: Stepped, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped.clock.step_s = 0.0
    size = 8 * 2 ** 20      # more than the sockets of both ends take
    monkeypatch.setattr(taskfarm, "BUFFER_LIMIT", 2 * size)
    monkeypatch.setattr(taskfarm, "show_page", lambda *_: taskfarm.Reply(200, b"x" * size))
    page = request_bytes("GET", "/api/workers?limit=1000", **stepped.login())
    deaf, slow = stepped.new(page, 2)
    stepped.turn_until(lambda: deaf.served.outbox and slow.served.outbox)
    assert stepped.server.users.total >= 2 * size

    def read_some(raw: Raw) -> None:
        left = len(raw.served.outbox)
        while raw.served.outbox and len(raw.served.outbox) > left - 50000:
            assert raw.sock.recv(65536)
            stepped.turn()
    third = stepped.new(page)
    stepped.turn_until(lambda: stepped.server.big_waiting)
    stepped.clock.pass_time(taskfarm.STILL_S * 0.7)
    read_some(slow)
    assert deaf.served in stepped.server.connections
    stepped.clock.pass_time(taskfarm.STILL_S * 0.7)
    stepped.turn(3)
    assert deaf.served not in stepped.server.connections and slow.served in stepped.server.connections
    assert stepped.server.big_waiting, "there is no room yet"
    while slow.served.outbox:
        read_some(slow)
    stepped.turn_until(lambda: third.served.outbox)
    for raw in (deaf, slow, third):
        raw.close()


def test_the_first_body_goes_on_when_the_buffers_are_full(stepped: Stepped, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped.clock.step_s = 0.0
    monkeypatch.setattr(taskfarm, "BUFFER_LIMIT", 60000)
    body = b'{"numTasks": 1' + b" " * 60000 + b"}"
    whole = request_bytes("POST", "/api/run", body, **stepped.login())
    raws = []
    for _ in range(3):
        raws.append(stepped.new(whole[:30000]))
        stepped.turn_until(lambda: raws[-1].served.paused or len(raws[-1].served.inbox) > 29000)
    assert [raw.served.paused for raw in raws] == [False, False, True]
    raws[0].sock.sendall(whole[30000:50000])
    stepped.turn_until(lambda: len(raws[0].served.inbox) > 49000)
    for raw in raws:        # a pause is not the fault of those who send, and does not count as silence
        stepped.clock.pass_time(taskfarm.STILL_S * 0.9)
        raw.sock.sendall(whole[30000 if raw is not raws[0] else 50000:])
        stepped.turn_until(lambda raw=raw: raw.served.spoken and raw.served.request is None)     # type: ignore[misc]
        assert raw.answer()[0] == 201
    for raw in raws:
        raw.close()


def test_what_came_before_a_stop_is_answered_and_nobody_is_reset(stepped: Stepped) -> None:
    one = request_bytes("GET", "/livez")
    raws = stepped.new(one, 3)
    stepped.turn_until(lambda: all(raw.served.spoken for raw in raws))
    assert [raw.answer()[0] for raw in raws] == [200] * 3
    asking, pipelining, idle = raws
    asking.sock.sendall(one)
    pipelining.sock.sendall(one * 3)
    unseen = stepped.raw(one)       # not accepted yet
    stepped.server._begin_stop()
    while not stepped.server._ended():
        stepped.server.turn(stepped.server._wait_s(1.0))
    for connection in list(stepped.server.connections):
        stepped.server.close_connection(connection)
    for raw in (asking, pipelining, unseen):
        status, headers, _ = raw.answer()
        assert status == 503 and headers["connection"] == "close"
        assert raw.answer()[0] == 0, "the end, and no reset"
        raw.close()
    assert idle.answer()[0] == 0
    idle.close()


def test_a_stop_tells_the_store_to_wait_no_more(stepped: Stepped, monkeypatch: pytest.MonkeyPatch) -> None:
    told: List[bool] = []
    monkeypatch.setattr(stepped.service.store, "refuse_parked", lambda: told.append(stepped.server.stopping))
    stepped.server._begin_stop()
    stepped.server._begin_stop()
    assert told == [True], "once, when nothing more is taken"


def test_who_waits_for_a_hash_may_be_closed_at_the_descriptor_limit(stepped: Stepped,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = SlowHash(monkeypatch)
    waiting = stepped.new(token_request("wrong"))
    stepped.turn_until(lambda: waiting.served.pending)
    waiting.served.last -= 1.0      # it has waited a second
    new = stepped.raw(b"")
    stepped.server._make_room(OSError(24, "Too many open files"))
    assert waiting.served not in stepped.server.connections and not stepped.server.hashes
    assert waiting.answer()[0] == 0
    hashes.let.set()
    for raw in (waiting, new):
        raw.close()


def test_hung_home_directories_hold_up_no_login(farm: Live) -> None:
    let, hung = threading.Event(), []

    def hang(user: taskfarm.User) -> None:
        hung.append(user.name)
        assert let.wait(20)
    farm.service.farm.renewed = hang
    new = [farm.raw(request_bytes("POST", "/api/users", json.dumps({"name": name, "password": ADAS_HASH}).encode(),
                                  Authorization="Bearer " + taskfarm.read_holder(farm.path)["secret"]))
           for name in ("bob", "eve")]
    wait_until(lambda: hung and len(farm.service.store.users) == 3)
    raw = farm.raw(token_request(Live.PASSWORD))
    assert raw.answer()[0] == 200
    let.set()
    assert [raw.answer()[0] for raw in new] == [201, 201]
    for connection in [raw, *new]:
        connection.close()


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


@pytest.mark.parametrize("began", [b"GET /li", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"], ids=["plain", "TLS"])
def test_a_byte_now_and_then_begins_no_other_deadline(tmp_path: Path, began: bytes) -> None:
    clock = FakeClock()
    live = Live(str(tmp_path / "f"), clock)
    server = live.service.server
    slow, silent = live.raw(began), live.raw(b"")
    wait_until(lambda: len(server.deadlines) == 2 and any(c.inbox or c.tls and c.tls.end for c in server.connections))
    clock.pass_time(taskfarm.REQUEST_S * 0.6)
    slow.sock.sendall(b"v")
    assert live.ask("GET", "/livez")[0] == live.ask("GET", "/livez")[0] == 200      # the byte has been read
    clock.pass_time(taskfarm.REQUEST_S * 0.6)
    server.post(lambda: None)
    assert silent.answer()[0] == 0 and slow.answer()[0] == (408 if began[0] == 71 else 0)
    for raw in (silent, slow):
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


def pinned(farm: Any) -> ssl.SSLContext:
    """A client's end of TLS for a farm."""
    return taskfarm.pinned_context(farm.service.certificate)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_one_port_answers_alike_with_tls_and_without(shared_farm: Live, version: str) -> None:
    context = pinned(shared_farm)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    auth = basic(shared_farm.token, "")
    data = (request_bytes("GET", "/livez") + request_bytes("GET", "/api/nothing", Authorization=auth) +
            request_bytes("POST", "/api/run", b'{"numTasks": 0}', Authorization=auth) +
            request_bytes("GET", "/api/runs", Authorization=auth) * 30 +
            request_bytes("POST", "/api/run", b"{", Authorization=auth) + CLOSE)
    answers = []
    for raw in (shared_farm.raw(data), shared_farm.raw(data, context=context)):
        answers.append([(status, body) for status, _, body in iter(raw.answer, (0, {}, b""))])  # a clean end, too
        raw.close()
    assert answers[0] == answers[1] and [status for status, _ in answers[0]] == [200, 404, 400, *[200] * 30, 400, 200]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_versions_of_tls_are_refused(shared_farm: Live) -> None:
    context = pinned(shared_farm)
    context.minimum_version, context.maximum_version = ssl.TLSVersion.MINIMUM_SUPPORTED, ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")      # that this end would still speak it
    with pytest.raises(ssl.SSLError, match="(?i)alert.protocol.version"):
        shared_farm.raw(b"", context=context)


def test_large_bodies_and_answers_go_over_tls_to_a_slow_reader(farm: Live) -> None:
    run = make_run(farm, 10000)
    auth = basic(farm.token, "")
    raw = farm.raw(request_bytes("POST", "/api/runs/%s/tasks" % run, b'{"worker_uuid": "w", "count": 10000}',
                                 Authorization=auth), context=pinned(farm))
    tasks = json.loads(raw.answer()[2])["data"]
    reports = [{"task": task["task"], "attempt": 1, "status": "failed", "message": "m" * 300} for task in tasks]
    body = json.dumps({"worker_uuid": "w", "data": reports}).encode()
    assert len(body) > 2 ** 20
    raw.sock.sendall(request_bytes("PUT", "/api/runs/%s/tasks" % run, body, Authorization=auth))
    assert json.loads(raw.answer()[2]) == {"accepted": len(tasks), "refused": []}
    page = request_bytes("GET", "/api/runs/%s/tasks?limit=1000" % run, Authorization=auth)
    raw.sock.sendall(page * 20)
    wait_until(lambda: any(c.outbox for c in list(farm.service.server.connections)))
    assert farm.ask("GET", "/api/runs")[0] == 200, "others are answered while it does not read"
    bodies = [raw.answer()[2] for _ in range(20)]
    assert len(bodies[0]) > 300000 and set(bodies) == {farm_page(farm, run)}
    raw.close()


def farm_page(farm: Live, run: str) -> bytes:
    """The same page over plain HTTP."""
    raw = farm.raw(request_bytes("GET", "/api/runs/%s/tasks?limit=1000" % run, Authorization=basic(farm.token, "")))
    body = raw.answer()[2]
    raw.close()
    return body


def test_a_body_that_is_waited_for_is_asked_for_over_tls(shared_farm: Live) -> None:
    raw = shared_farm.raw(request_bytes("POST", "/api/run", Authorization=basic(shared_farm.token, ""),
                                        Expect="100-continue", Content_Type="application/json", Content_Length="15"),
                          context=pinned(shared_farm))
    assert raw.answer(head_only=True)[0] == 100
    raw.sock.sendall(b'{"numTasks": 0}')
    assert raw.answer()[0] == 400
    raw.close()


def test_a_handshake_and_a_request_may_come_byte_by_byte(shared_farm: Live) -> None:
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    end = pinned(shared_farm).wrap_bio(to_client, to_server)
    raw = shared_farm.raw(b"")
    raw.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def until_done(step: Callable[[], Any]) -> Any:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                pass
            finally:
                for byte in to_server.read():
                    raw.sock.sendall(bytes([byte]))
            to_client.write(raw.sock.recv(65536))
    until_done(end.do_handshake)
    end.write(request_bytes("GET", "/api/runs", Authorization=basic(shared_farm.token, "")))
    assert until_done(lambda: end.read(65536)).startswith(b"HTTP/1.1 200 OK")
    raw.close()


@pytest.mark.parametrize("garbage", [
    b"\x16" * 2000, b"\x16\x03\x01\x00\x05hello", b"\x16\x03\x03\xff\xff" + b"\0" * 99999])
def test_garbage_instead_of_a_handshake_ends_that_connection_alone(shared_farm: Live, garbage: bytes) -> None:
    other = shared_farm.raw(b"", context=pinned(shared_farm))
    raw = shared_farm.raw(b"")
    with contextlib.suppress(ConnectionError):
        raw.sock.sendall(garbage)
        while raw.sock.recv(4096):      # an alert perhaps, then the end
            pass
    other.sock.sendall(CLOSE)
    assert other.answer()[0] == 200 and other.answer()[0] == 0
    raw.close()
    other.close()


def test_a_record_that_was_changed_on_its_way_ends_the_connection(shared_farm: Live) -> None:
    raw = shared_farm.raw(b"", context=pinned(shared_farm))
    with socket.socket(fileno=os.dup(raw.sock.fileno())) as beneath:
        beneath.sendall(b"\x17\x03\x03\x00\x20" + b"x" * 32)
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        assert raw.answer()[0] == 0
    raw.close()


def test_who_ends_their_half_of_a_tls_connection_gets_what_they_asked_for(shared_farm: Live) -> None:
    data = request_bytes("GET", "/api/runs", Authorization=basic(shared_farm.token, "")) * 5
    raw = shared_farm.raw(data, ended=True, context=pinned(shared_farm))
    assert [raw.answer()[0] for _ in range(5)] == [200] * 5
    raw.close()


def test_who_says_by_tls_that_no_more_comes_is_let_go(farm: Live) -> None:
    raw = farm.raw(request_bytes("GET", "/livez"), context=pinned(farm))
    assert raw.answer()[0] == 200
    raw.sock.settimeout(0.2)
    with contextlib.suppress(OSError):
        raw.sock.unwrap()
    wait_until(lambda: not farm.service.server.connections)
    raw.close()


def test_handshakes_wait_in_line_and_users_do_not_wait_for_them(tmp_path: Path) -> None:
    farm = Stepped(str(tmp_path / "f"), taskfarm.TURN_S)        # time for one step of each line in a turn
    user = farm.raw(request_bytes("GET", "/api/token", Authorization=basic(farm.token, "")))
    farm.turn_until(lambda: any(c.known for c in farm.server.connections))
    context = pinned(farm)
    clients = []
    for _ in range(20):
        hello = ssl.MemoryBIO()
        end = context.wrap_bio(ssl.MemoryBIO(), hello)
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
        clients.append(farm.raw(hello.read()))
    farm.turn_until(lambda: len(farm.server.guest) == 20 - 1)

    def shaken() -> int:
        return sum(bool(select.select([raw.sock], [], [], 0)[0]) for raw in clients)
    before = shaken()
    assert before < 3 and len(farm.server.selector.select(0)) == 0, "those that wait in line cost nothing in a turn"
    user.answer()
    user.sock.sendall(request_bytes("GET", "/api/token", Authorization=basic(farm.token, "")))
    farm.turn()
    assert user.answer()[0] == 200 and shaken() <= before + 1
    farm.turn_until(lambda: shaken() == 20)
    for raw in [user, *clients]:
        raw.close()
    farm.close()


def test_many_half_handshakes_do_not_fill_the_memory(farm: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskfarm, "MOST_HANDSHAKES", 5)
    kept = [farm.raw(request_bytes("GET", "/livez"), context=pinned(farm)) for _ in range(10)]
    half = []
    for number in range(8):
        half.append(farm.raw(b"\x16\x03\x01\x02\x00\x01"))
        wait_until(lambda number=number: len(farm.service.server.handshakes) == min(5, number + 1))    # type: ignore[misc]
    assert [raw.answer()[0] for raw in half[:3]] == [0] * 3, "the oldest are ended"
    for raw in kept:
        raw.sock.sendall(CLOSE)
        assert [raw.answer()[0], raw.answer()[0]] == [200, 200], "and nobody else"
    for raw in [*kept, *half]:
        raw.close()
    wait_until(lambda: not farm.service.server.handshakes)


def test_1000_handshakes_at_once(farm: Live) -> None:
    taskfarm.raise_descriptor_limit()
    context = pinned(farm)
    clients = []
    for _ in range(1000):
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        end = context.wrap_bio(to_client, to_server)
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
        clients.append((farm.raw(to_server.read()), end, to_client, to_server))
    assert farm.ask("GET", "/api/runs")[0] == 200
    for raw, end, to_client, to_server in clients:
        while to_client.pending == 0 or not end.version():
            to_client.write(raw.sock.recv(65536))
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
                break
        end.write(CLOSE)
        raw.sock.sendall(to_server.read())
    for raw, end, to_client, _ in clients:
        while True:
            to_client.write(raw.sock.recv(65536))
            with contextlib.suppress(ssl.SSLWantReadError):
                assert end.read(65536).startswith(b"HTTP/1.1 200 OK")
                break
        raw.close()


@pytest.mark.parametrize("peer, own, here", [
    ("127.0.0.1", "127.0.0.1", True), ("127.0.0.2", "127.0.0.1", True), ("10.1.2.3", "10.1.2.3", True),
    ("::1", "::1", True), ("::ffff:127.0.0.1", "::ffff:127.0.0.1", True), ("fe80::1%eth0", "fe80::1%eth0", True),
    ("::ffff:127.0.0.9", "::ffff:10.1.2.3", True), ("10.1.2.4", "10.1.2.3", False), ("10.1.2.3", "127.0.0.1", False),
    ("::ffff:10.1.2.4", "::ffff:10.1.2.3", False), ("fe80::2%eth0", "fe80::1%eth0", False)])
def test_what_comes_from_this_machine(peer: str, own: str, here: bool) -> None:
    assert taskfarm.from_this_machine(peer, own) is here


@pytest.mark.parametrize("data", [
    CLOSE, b"\x01", request_bytes("GET", "/api/runs", Authorization="{auth}"), request_bytes("POST", "/api/run", b"{"),
    request_bytes("GET", "/api/runs", Authorization=basic("ada", Live.PASSWORD))],
    ids=["open", "garbage", "token", "post", "password"])
def test_plain_http_from_another_machine_is_refused_unread(farm: Live, data: bytes,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskfarm, "from_this_machine", lambda *_: False)
    for seen in ("Request", "cut_head"):        # of plain HTTP nothing is parsed
        monkeypatch.setattr(taskfarm, seen, None)
    raw = farm.raw(data.replace(b"{auth}", basic(farm.token, "").encode()))
    status, headers, body = raw.answer()
    assert status == 403 and headers["connection"] == "close" and "use https://" in json.loads(body)["detail"]
    assert raw.answer()[0] == 0
    raw.close()
    monkeypatch.undo()
    monkeypatch.setattr(taskfarm, "from_this_machine", lambda *_: False)
    raw = farm.raw(CLOSE, context=pinned(farm))
    assert raw.answer()[0] == 200, "TLS will do"
    raw.close()
    farm.service.server.plain_http = True
    assert exchange(farm, CLOSE) == [200], "and plain HTTP where the keeper says so"


def test_keep_alive_is_said_to_a_client_of_http_1_0(shared_farm: Live) -> None:
    raw = shared_farm.raw(b"GET /livez HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert raw.answer()[1]["connection"] == "keep-alive"
    raw.close()


def test_big_answers_that_nobody_reads_do_not_fill_the_memory(farm: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskfarm, "BUFFER_LIMIT", 2 * 2 ** 20)
    monkeypatch.setattr(taskfarm, "show_page", lambda *_: taskfarm.Reply(200, b"x" * 2 ** 20))
    monkeypatch.setattr(taskfarm, "STILL_S", 60.0)
    page = request_bytes("GET", "/api/workers?limit=1000", Authorization=basic(farm.token, ""))
    deaf = [farm.raw(page) for _ in range(40)]
    server = farm.service.server
    wait_until(lambda: server.users.total >= taskfarm.BUFFER_LIMIT // 2 or not server.big_waiting)
    assert farm.ask("GET", "/readyz")[0] == 200
    assert server.users.total < (1 + taskfarm.BIG_AT_ONCE) * 2 ** 20 + taskfarm.BUFFER_LIMIT // 2
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
    wait_until(lambda: server.users.total > 200000)
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
    assert farm.service.server.users.total == farm.service.server.guests.total == 0


def test_a_client_that_never_reads_is_not_waited_for(farm: Live) -> None:
    for _ in range(300):
        farm.ask("POST", "/api/run", {"numTasks": 1})
    deaf = farm.raw(request_bytes("GET", "/api/runs", Authorization=basic(farm.token, "")) * 400)
    wait_until(lambda: any(c.outbox for c in list(farm.service.server.connections)))
    assert farm.ask("GET", "/api/runs")[0] == 200
    assert farm.service.server.users.total < 2 * 2 ** 20
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


def test_an_access_log_is_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    for mode in (None, 0o644):
        if mode:
            log.chmod(mode)
        with taskfarm.open_access_log(str(log)) as file:
            file.write("a line\n")
        assert mode_of(log) == 0o600
    assert log.read_text() == "a line\n" * 2
    taskfarm.open_access_log("/dev/stdout").close()     # a link of root, to what is no file
    us = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: us + 1)
    with pytest.raises(Refusal, match="log belongs to user"):
        taskfarm.open_access_log(str(log))


def test_no_secret_gets_into_a_log_or_an_error(farm: Live, caplog: pytest.LogCaptureFixture,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """What everybody sends goes wrong in every way; only the sender of a wrong login knows what was in it."""
    server, log = farm.service.server, io.StringIO()
    server.access = taskfarm.AccessLog(log)
    server.access.thread.start()
    secret = farm.service.farm.logins.secret.decode()
    password, hashed = "pa55word", taskfarm.hash_password("pa55word")
    monkeypatch.setattr(taskfarm, "verify_password", lambda *_: 1 / 0)
    answers = []
    for data in (
            request_bytes("GET", "/api/runs", Authorization=basic("ada", password)),
            request_bytes("GET", "/api/runs?token=" + farm.token), request_bytes("GET", "/api/" + farm.token),
            request_bytes("GET", "/livez?x=1&t=" + farm.token + "&u=2"),
            request_bytes("GET", "http://ada:%s@localhost/livez" % password),
            request_bytes("GET", "/nothing", Authorization="Bearer " + farm.token),
            request_bytes("GET", "/api/runs", Authorization="Basic :" + password),
            request_bytes("GET", "/api/runs", Authorization="\x01" + farm.token),
            request_bytes("POST", "/api/users", json.dumps({"name": "x", "password": hashed + "x"}).encode(),
                          Authorization="Bearer " + secret),
            request_bytes("PUT", "/api/users/x", json.dumps({"password": password}).encode(),
                          Authorization="Bearer " + secret)):
        raw = farm.raw(data)
        answers.append(raw.answer())
        raw.close()
    assert [status for status, _, _ in answers] == [401, 401, 401, 400, 400, 404, 401, 400, 400, 400]
    wait_until(lambda: log.getvalue().count("\n") == len(answers) and "ZeroDivisionError" in caplog.text)
    text = caplog.text + log.getvalue() + "".join(str(answer) for at, answer in enumerate(answers) if at != 3)
    for each in (password, hashed, hashed[-20:], secret, farm.token, farm.token[4:]):
        assert each not in text


def test_a_quote_in_a_target_does_not_end_it_in_the_access_log(tmp_path: Path) -> None:
    log = io.StringIO()
    service = Service(str(tmp_path / "f"), "127.0.0.1", 0, access_log=log)
    thread = threading.Thread(target=service.serve)
    thread.start()
    raw = Raw(service.server.server_port, request_bytes("GET", '/livez?x="_200_7_0.1'))
    assert raw.answer()[0] == 400
    raw.close()
    service.stop()
    thread.join()
    assert re.fullmatch(r'[^"]+ "GET /livez\?x=%22_200_7_0.1" 400 [0-9]+ [0-9.]+\n', log.getvalue())


def test_a_reader_of_the_access_log_that_has_stopped_holds_up_nobody(tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskfarm, "LOG_BYTES", 10000)
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as read_end, os.fdopen(writer, "wb") as log:
        service = Service(str(tmp_path / "f"), "127.0.0.1", 0, access_log=log)
        thread = threading.Thread(target=service.serve)
        thread.start()
        raw = Raw(service.server.server_port, b"")
        for _ in range(3000):       # twice what the pipe takes
            raw.sock.sendall(request_bytes("GET", "/livez"))
            assert raw.answer()[0] == 200
        assert service.server.access is not None and service.server.access.lost
        lines: List[bytes] = []
        while not any(b"lost" in line for line in lines):       # it is read again, and the next line follows
            lines.append(read_end.readline())
            if len(lines) % 100 == 0:
                raw.sock.sendall(request_bytes("GET", "/livez"))
                assert raw.answer()[0] == 200
        (gap,) = re.findall(rb"# ([0-9]+) lines are lost here", lines[-1])
        assert 2990 <= len(lines) - 1 + int(gap) <= 3000 + len(lines) // 100
        raw.close()
        service.stop()
        thread.join()


# ---------------------------------------------------------------- API

class LiveMachine(Machine):
    """The same machine through HTTP."""

    def open(self, path: str) -> None:
        self.farm = Live(path, FakeClock())


TestLiveMachine = LiveMachine.TestCase
TestLiveMachine.settings = settings(
    max_examples=3 if QUICK else 12, stateful_step_count=20, **machine_settings)    # type: ignore[arg-type]


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
            answer: Any
            for _ in range(5):
                kind, number = dice.choice(["claim", "report", "fenced", "read", "restart"]), dice.randrange(4)
                sent = time.monotonic()
                call: Tuple[Any, ...]
                if kind == "claim":
                    call = ("claim", "w")
                    status, task = farm.ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": "w"})
                    answer = status, task and plain_task(task)
                elif kind == "fenced":
                    said = {"status": "failed", "worker_uuid": "w", "attempt": dice.choice([1, 1, 2])}
                    call = ("report", number, said)
                    answer = farm.ask("PUT", "/api/runs/%s/tasks/%d" % (run, number), said)[0], None
                elif kind == "report":
                    call = ("report", number, {"status": "done"})
                    answer = farm.ask("PUT", "/api/runs/%s/tasks/%d" % (run, number), {"status": "done"})
                elif kind == "restart":
                    call = ("restart", True)
                    answer = farm.ask("POST", "/api/runs/%s/restart?all=True" % run)
                else:
                    call = ("run_json",)
                    answer = plain_run(farm.ask("GET", "/api/runs/" + run)[1])
                calls.append((sent, time.monotonic(), call, answer))
            return calls

        history = [call for calls in in_threads(4, work) for call in calls]

        def fresh(run: str = run, entry: Dict[str, Any] = entry) -> Model:
            model = Model()
            model.add_run(entry)
            model.register("w", "node1", 1)
            return model
        assert fits_some_order(history, run, fresh)
        wrong_history = [(sent, got, call, (204, None) if call[0] == "claim" and answer[0] == 201 else answer)
                         for sent, got, call, answer in history]
        if wrong_history != history:
            assert not fits_some_order(wrong_history, run, fresh), "the check can fail"


KEY_REFUSALS = [b"x" * 129, b"\xc3\xbc", b"a\tb", b""]


@pytest.mark.parametrize("key", KEY_REFUSALS, ids=lambda key: repr(key)[:20])
def test_a_key_that_will_not_do_is_refused(shared_farm: Live, key: bytes) -> None:
    raw = shared_farm.raw(request_bytes("POST", "/api/run", RUN_BODY, Authorization=basic(shared_farm.token, ""),
                                        Idempotency_Key="{key}").replace(b"{key}", key))
    assert raw.answer()[0] == 400
    raw.close()


def test_keys_are_each_users_own_and_may_be_long(farm: Live) -> None:
    farm.service.store.call(taskfarm.add_user("bob", ADAS_HASH))
    key = " !~".join("k" * 31 for _ in range(4))[:128].strip()
    first = farm.ask("POST", "/api/run", {"numTasks": 3}, key)
    assert first[0] == 201 and farm.ask("POST", "/api/run", {"numTasks": 3}, key) == first
    token, farm.token = farm.token, farm.service.farm.token(farm.user("bob"), 0)
    same = farm.ask("POST", "/api/run", {"numTasks": 3}, key[:-1] + "2")
    assert same[1]["user"] == "bob" and same != first
    second = farm.ask("POST", "/api/run", {"numTasks": 4}, key)
    assert second[0] == 201 and farm.ask("POST", "/api/run", {"numTasks": 4}, key) == second
    farm.token = token
    assert farm.ask("POST", "/api/run", {"numTasks": 3}, key) == first
    assert len(farm.ask("GET", "/api/runs")[1]["data"]) == 3


@pytest.fixture
def private(tmp_path: Path) -> Iterator[Live]:
    live = Live(str(tmp_path / "farm.sqlite"), private=True)
    live.service.store.call(taskfarm.add_user("bob", ADAS_HASH))
    yield live
    live.close()


def as_user(farm: Live, name: str) -> None:
    """From here on that user asks; "" for administration."""
    farm.token = farm.service.farm.token(farm.user(name), 0) if name else str(farm.service.holder["secret"])


# What a body may name, for requests that are right but for whose run and worker they name.
SAMPLES: Dict[str, Any] = {"worker_uuid": "adas-worker", "count": 2, "data": [{"task": 0, "status": "done"}],
                           "status": "done", "scope": "work", "numTasks": 1}


def exact(farm: Live, method: str, path: str, body: Any) -> Tuple[int, Dict[str, str], bytes]:
    """Everything that is answered."""
    raw = farm.raw(request_bytes(method, path, json.dumps(body).encode() if body else b"",
                                 Authorization=farm.authorization))
    status, headers, answer = raw.answer()
    raw.close()
    headers.pop("date", None)
    return status, headers, answer


@pytest.mark.parametrize("line", [line for line in taskfarm.ROUTES.table if line.access == taskfarm.USER and (
    "<" in line.path or {"run", "worker_uuid"} & {*line.body})], ids=lambda line: "%s %s" % (line.method, line.path))
def test_a_run_or_worker_of_another_user_is_answered_as_one_that_there_is_not(private: Live, line: Any) -> None:
    as_user(private, "ada")
    run = new_run(private, 3, name="tiles")
    enlist(private, "adas-worker", lease=60)
    take(private, run, "adas-worker")
    before = [private.ask("GET", path) for path in ("/api/runs/" + run, "/api/worker/adas-worker")]
    as_user(private, "bob")
    enlist(private, "bobs-worker")
    own = new_run(private, 3)
    cases = [(run, "adas-worker"), ("0" * 32, "nobody-here")]
    if "worker_uuid" in line.body and "<run>" in line.path:
        cases += [(own, "adas-worker"), (own, "nobody-here"), (run, "bobs-worker"), ("0" * 32, "bobs-worker")]
    answers = []
    for case_run, worker in cases:
        path = line.path.replace("<run>", case_run).replace("<worker>", worker).replace("<task>", "1")
        body = {name: SAMPLES[name] for name in line.body if name in SAMPLES or line.body[name].required}
        body.update({name: value for name, value in (("worker_uuid", worker), ("run", case_run)) if name in line.body})
        status, headers, answer = exact(private, line.method, path, body)
        answers.append((status, headers, answer.replace(run.encode(), b"0" * 32).replace(
            b"adas-worker", b"nobody-here")))
    for others, missing in zip(answers[::2], answers[1::2]):
        assert others == missing
    assert answers[0][0] == 404
    as_user(private, "ada")
    assert [private.ask("GET", path) for path in ("/api/runs/" + run, "/api/worker/adas-worker")] == before
    as_user(private, "")
    assert exact(private, "GET", "/api/runs/" + run, None)[0] == 200


def test_each_user_of_a_private_farm_has_lists_of_their_own(private: Live) -> None:
    def seen() -> Tuple[List[str], List[str], List[str]]:
        runs = private.ask("GET", "/api/runs")[1]["data"]
        return ([run["uuid"] for run in runs], [run["user"] for run in runs],
                [worker["uuid"] for worker in private.ask("GET", "/api/workers?all=True")[1]["data"]])
    runs = {}
    for name in ("ada", "bob"):
        as_user(private, name)
        enlist(private, name + "-1", name + "-2")
        runs[name] = [new_run(private, 3) for _ in range(taskfarm.RUNS_PIECE // 2 + 1)]
    uuid = {"uuid": "ada-1", "hostname": "node-ada-1", "pid": 1}
    status, _, answer = exact(private, "POST", "/api/worker", uuid)
    assert status == 409 and b"is another's" in answer and b"node" not in answer.replace(b"node-ada-1", b"")
    assert private.ask("DELETE", "/api/worker/bob-1")[0] == 204
    for name in ("ada", "bob"):
        as_user(private, name)
        assert seen() == (runs[name], [name] * len(runs[name]), [name + "-1", name + "-2"])
    as_user(private, "")
    everything = seen()
    assert everything[0] == runs["ada"] + runs["bob"] and len(everything[2]) == 4
    private.service.store.call(taskfarm.remove_user("bob"))
    private.service.store.call(taskfarm.add_user("bob", ADAS_HASH))
    assert seen() == everything
    as_user(private, "bob")
    assert seen() == ([], [], []), "another bob"


def test_who_is_on_a_connection_is_judged_anew_for_each_request(private: Live) -> None:
    as_user(private, "ada")
    run = new_run(private, 3)
    headers = {}
    for name in ("ada", "bob"):
        as_user(private, name)
        headers[name] = private.authorization
    raw = private.raw(b"".join(request_bytes("GET", "/api/runs/" + run, Authorization=headers[name])
                               for name in ("ada", "bob", "ada", "bob")))
    assert [raw.answer()[0] for _ in range(4)] == [200, 404, 200, 404]
    raw.close()


def test_without_private_every_user_may_do_everything(farm: Live) -> None:
    farm.service.store.call(taskfarm.add_user("bob", ADAS_HASH))
    run = a_run(farm, 3)
    enlist(farm, "w")
    as_user(farm, "bob")
    enlist(farm, "w")
    assert take(farm, run, "w")["task"] == 0
    assert farm.ask("GET", "/api/runs/" + run)[1]["user"] == "ada"
    farm.private = True
    farm.restart_server()
    assert farm.ask("GET", "/api/worker/w")[0] == 200 and farm.ask("GET", "/api/runs/" + run)[0] == 200
    as_user(farm, "bob")
    assert farm.ask("GET", "/api/worker/w")[0] == 404 and farm.ask("DELETE", "/api/runs/" + run)[0] == 404


def test_a_worker_shows_no_task_of_a_run_that_is_not_for_its_user(farm: Live) -> None:
    run = a_run(farm, 3)
    farm.service.store.call(taskfarm.add_user("bob", ADAS_HASH))
    as_user(farm, "bob")
    own = a_run(farm, 3)
    enlist(farm, "w")
    take(farm, run, "w")
    take(farm, own, "w")
    assert [task["run"] for task in farm.ask("GET", "/api/worker/w")[1]["data"]] == [run, own]
    farm.private = True
    farm.restart_server()
    as_user(farm, "bob")
    assert [task["run"] for task in farm.ask("GET", "/api/worker/w")[1]["data"]] == [own]


def test_the_first_login_of_a_day_is_in_the_audit(tmp_path: Path) -> None:
    clock = FakeClock()
    live = Live(str(tmp_path / "f"), clock)
    live.service.store.call(taskfarm.add_user("bob", ADAS_HASH))

    def logins() -> List[Tuple[Any, ...]]:
        return [line for line in audit_of(live) if line[1] == "login"]
    ada, bob = ("ada", "login", "", "127.0.0.1", 1), ("bob", "login", "", "127.0.0.1", 1)
    for _ in range(5):
        assert get_with(live, basic("ada", Live.PASSWORD))[0] == 200
        assert get_with(live, basic("bob", Live.PASSWORD))[0] == 200
        assert get_with(live, basic(live.token, ""))[0] == 200
        assert get_with(live, basic("bob", "wrong"))[0] == 401
    assert logins() == [ada, bob]
    clock.pass_time(86400)
    assert get_with(live, basic(live.token, ""))[0] == 200
    as_user(live, "")
    assert live.ask("GET", "/api/users")[0] == 200
    assert logins() == [ada, bob, ada, (None, "login", "", "127.0.0.1", 1)]
    live.close()


def test_a_login_that_a_full_disk_did_not_take_is_in_the_audit_later(store: Direct) -> None:
    def admit() -> None:
        store.farm.admit(taskfarm.Login(User(1, "ada", "", 1), 0.0), "192.0.2.1")
        store.store._round(0.0)
    with full_disk(1000):
        admit()
        assert store.store.sql.trouble
    store.pass_time(taskfarm.RETRY_S)
    for _ in range(3):
        admit()
    assert audit_of(store) == [("ada", "login", "", "192.0.2.1", 1)]


def test_no_secret_is_in_the_audit(farm: Live) -> None:
    secrets = [Live.PASSWORD, ADAS_HASH, farm.token, farm.service.holder["secret"], "hunter2"]
    for header in (basic("ada", Live.PASSWORD), basic("hunter2", "x"), basic(farm.token, "hunter2")):
        get_with(farm, header)
    farm.service.store.note_failed("hunter2", "192.0.2.1", 1.7e9)
    as_user(farm, "")
    assert farm.ask("POST", "/api/users", {"name": "eve", "password": ADAS_HASH})[0] == 201
    assert farm.ask("PUT", "/api/users/eve", {"password": ADAS_HASH})[0] == 204
    as_user(farm, "ada")
    a_run(farm, 3)
    shown = wait_until(lambda: "login failed" in json.dumps(audit_of(farm)) and json.dumps(audit_of(farm)))
    assert [secret for secret in secrets if secret in shown] == [] and "user passwd" in shown
    assert farm.ask("GET", "/api/audit")[0] == 403


def test_a_key_on_another_method_than_post_means_nothing(farm: Live) -> None:
    run = make_run(farm, 3)
    for status in ("done", "waiting"):
        assert farm.ask("PUT", "/api/runs/%s/tasks/0" % run, {"status": status}, "k")[0] == 204
    assert figures(farm, run)[:3] == (3, 0, 0)


@pytest.mark.parametrize("path, body", [("/api/run", {"numTasks": 7}), ("/api/runs/{run}/task", {"worker_uuid": "w"}),
                                        ("/api/runs/{run}/tasks", {"worker_uuid": "w", "count": 3})])
def test_the_same_key_sent_at_the_same_time_counts_once(farm: Live, path: str, body: Any) -> None:
    run = make_run(farm, 1000)
    path = path.replace("{run}", run)
    for number in range(5 if QUICK else 20):
        def send(_: int, number: int = number) -> Any:
            return farm.ask("POST", path, body, "key %d" % number)
        answers = in_threads(4, send)
        assert [answer[0] for answer in answers] == [201] * 4
        assert all(answer == answers[0] for answer in answers)
    given = {"/api/run": 0, "/api/runs/%s/task" % run: 1}.get(path, 3)
    assert figures(farm, run)[1] == (5 if QUICK else 20) * given
    assert len(farm.ask("GET", "/api/runs")[1]["data"]) == (1 if given else 1 + (5 if QUICK else 20))


def test_a_batch_may_be_4_mib_and_others_64_kib(farm: Live) -> None:
    run = make_run(farm, 10000)
    entries = [{"task": number, "status": "failed", "message": "x" * 300} for number in range(10000)]
    assert 3 * 2 ** 20 < len(json.dumps({"data": entries})) < 4 * 2 ** 20
    assert farm.ask("PUT", "/api/runs/%s/tasks" % run, {"data": entries}) == (200, {"accepted": 10000, "refused": []})
    assert farm.ask("GET", "/api/runs/" + run)[1]["numFailed"] == 10000
    assert farm.ask("PUT", "/api/runs/%s/tasks" % run, b" " * (4 * 2 ** 20 + 1))[0] == 413
    farm.local = threading.local()
    assert farm.ask("PUT", "/api/runs/%s/tasks/0" % run, b" " * 65537)[0] == 413


def test_refusals_of_many_reports_are_encoded_one_by_one(farm: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    run, lengths, encode = make_run(farm, 1000), [], taskfarm.encode_json
    assert farm.ask("POST", "/api/runs/%s/tasks" % run, {"worker_uuid": "w", "count": 1000})[0] == 201

    def measured(content: Any) -> str:
        lengths.append(len(encode(content)))
        return encode(content)
    monkeypatch.setattr(taskfarm, "encode_json", measured)
    entries = [{"task": number, "attempt": 2 - (number == 7), "status": "done"} for number in range(1000)]
    status, answer = farm.ask("PUT", "/api/runs/%s/tasks" % run, {"data": entries})
    assert status == 200 and answer["accepted"] == 1 and len(answer["refused"]) == 999
    assert answer["refused"][7]["task"] == 8 and "attempt" in answer["refused"][7]["detail"]
    assert max(lengths) < 200, "one call for all would hold up every other thread"
    assert farm.ask("PUT", "/api/runs/%s/tasks" % run, {"data": entries[7:8]}) == (200, {"accepted": 1, "refused": []})


# Who may do what: for each endpoint a letter for each of these, L 401, F 403, N 404 and . success.
CREDENTIALS = ("none", "wrong", "expired", "revoked", "read", "work", "here", "elsewhere", "other", "full", "admin")
ANYBODY, LOGINS = "...........", "LLLL......."
READS, WORKS, FULLS, ADMINS = "LLLL...F...", "LLLLF..F...", "LLLLFFFF...", "LLLLFFFFFF."
WHO_MAY: Dict[Tuple[str, str], Tuple[str, Any]] = {
    ("GET", "/"): (ANYBODY, None),
    ("GET", "/livez"): (ANYBODY, None),
    ("GET", "/readyz"): (ANYBODY, None),
    ("GET", "/api/token"): ("LLLL......F", None),
    ("POST", "/api/tokens"): ("LLLLFFFF..F", {"scope": "read"}),
    ("GET", "/api/tokens"): (FULLS, None),
    ("DELETE", "/api/tokens/<id>"): ("LLLLFFFFN..", None),
    ("POST", "/api/run"): (FULLS, {"numTasks": 3}),
    ("GET", "/api/runs"): (LOGINS, None),
    ("GET", "/api/runs/<run>"): (READS, None),
    ("DELETE", "/api/runs/<run>"): (FULLS, None),
    ("GET", "/api/runs/<run>/work"): ("LLLLNNNFNNN", None),     # these runs know none
    ("POST", "/api/runs/<run>/restart"): (FULLS, None),
    **{("POST", "/api/runs/<run>/" + word): (FULLS, None) for word in ("pause", "resume", "cancel")},
    ("POST", "/api/runs/<run>/extend"): (FULLS, {"numTasks": 1}),
    ("POST", "/api/runs/<run>/task"): (WORKS, {"worker_uuid": "{worker}"}),
    ("POST", "/api/runs/<run>/tasks"): (WORKS, {"worker_uuid": "{worker}", "count": 1}),
    ("GET", "/api/runs/<run>/tasks"): (READS, None),
    ("PUT", "/api/runs/<run>/tasks"): (WORKS, {"data": [{"task": 0, "status": "done"}]}),
    ("GET", "/api/runs/<run>/tasks/<task>"): (READS, None),
    ("PUT", "/api/runs/<run>/tasks/<task>"): (WORKS, {"status": "done"}),
    ("POST", "/api/worker"): ("LLLLF......", {"uuid": "{new}", "hostname": "node1", "pid": 1}),
    ("GET", "/api/worker/<worker>"): (READS, None),
    ("PUT", "/api/worker/<worker>"): (WORKS, None),
    ("DELETE", "/api/worker/<worker>"): (WORKS, None),
    ("GET", "/api/workers"): (LOGINS, None),
    ("GET", "/api/users"): (ADMINS, None),
    ("POST", "/api/users"): (ADMINS, {"name": "{new}", "password": "{hash}"}),
    ("PUT", "/api/users/<user>"): (ADMINS, {"password": "{hash}"}),
    ("DELETE", "/api/users/<user>"): (ADMINS, None),
    ("GET", "/api/audit"): (ADMINS, None),
    ("POST", "/api/backup"): (ADMINS, None),
    ("GET", "/api/backup"): (ADMINS, None),
    ("DELETE", "/api/backup"): (ADMINS, {"path": "nowhere"}),
}
SHOWN = {401: "L", 403: "F", 404: "N"}


def credentials(farm: Live, run: str, other_run: str) -> Dict[str, Optional[str]]:
    """What a client may show, by its name in CREDENTIALS."""
    assert isinstance(farm.clock, FakeClock)
    if "bob" not in farm.service.store.users:
        farm.service.store.call(taskfarm.add_user("bob", ADAS_HASH))
    expired, revoked, full = new_token(farm, days=1), new_token(farm), new_token(farm)["token"]
    farm.clock.pass_time(86400)
    assert farm.ask("DELETE", "/api/tokens/%d" % revoked["id"])[0] == 204
    made = {"none": None, "expired": expired["token"], "revoked": revoked["token"], "full": full,
            "wrong": full[:-4] + ("AAAA" if full[-4:] != "AAAA" else "BBBB"), "read": new_token(farm, "read")["token"],
            "work": new_token(farm, "work")["token"], "here": new_token(farm, "work", run=run)["token"],
            "elsewhere": new_token(farm, "work", run=other_run)["token"],
            "admin": taskfarm.read_holder(farm.path)["secret"]}
    with asking_with(farm, farm.service.farm.token(farm.user("bob"), 0)):
        made["other"] = new_token(farm)["token"]
    return made


@pytest.mark.parametrize("method, path", [(route.method, route.path) for route in taskfarm.ROUTES.table],
                         ids=lambda word: word)
def test_every_endpoint_with_every_kind_of_credential(tmp_path: Path, method: str, path: str) -> None:
    assert (method, path) in WHO_MAY, "a new endpoint: say here who may use it"
    expected, body = WHO_MAY[method, path]
    farm = Live(str(tmp_path / "farm.sqlite"), FakeClock())
    if (method, path) == ("GET", "/api/backup"):
        farm.service.store.call(taskfarm.begin_copy("copy"))
    other_run, shown = make_run(farm, 3), ""
    for kind in CREDENTIALS:
        run = make_run(farm, 3)
        shows = credentials(farm, run, other_run)[kind]
        name, worker_uuid = "new-" + kind, "worker-" + kind
        farm.ask("POST", "/api/worker", {"uuid": worker_uuid, "hostname": "node1", "pid": 1})
        assert farm.ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": worker_uuid})[0] == 201
        if "<user>" in path:
            farm.service.store.call(taskfarm.add_user(name, ADAS_HASH))
        asked = path.replace("<run>", run).replace("<task>", "1").replace("<worker>", worker_uuid).replace(
            "<user>", name).replace("<id>", str(new_token(farm, "read")["id"]))
        text = json.dumps(body).replace("{worker}", worker_uuid).replace("{new}", name).replace("{hash}", ADAS_HASH)
        header = {"Authorization": "Bearer " + shows} if shows else {}
        raw = farm.raw(request_bytes(method, asked, text.encode() if body is not None else b"", **header))
        status, _, answer = raw.answer()
        raw.close()
        shown += "." if 200 <= status < 300 else SHOWN.get(status, str(status))
        if status == 403:
            assert re.search(r"needs the scope|is for run|holds tasks of other runs|the verbs of taskfarm|as one",
                             json.loads(answer)["detail"]), answer
    farm.close()
    assert shown == expected, dict(zip(CREDENTIALS, shown))


def test_a_token_for_a_run_touches_no_worker_of_others(farm: Live) -> None:
    run, other = new_run(farm, 3), new_run(farm, 3)
    enlist(farm, "w", "v", lease=3600)
    take(farm, run, "w")
    take(farm, other, "w")
    take(farm, run, "v")
    with asking_with(farm, new_token(farm, "work", run=run)["token"]):
        same = {"uuid": "w", "hostname": "node-w", "pid": 1, "lease": 1}
        for method, path, body in (
                ("POST", "/api/worker", same), ("GET", "/api/worker/w", None), ("PUT", "/api/worker/w", None),
                ("DELETE", "/api/worker/w", None), ("POST", "/api/runs/%s/task" % run, {"worker_uuid": "w"}),
                ("POST", "/api/runs/%s/tasks" % run, {"worker_uuid": "w", "count": 1}),
                ("PUT", "/api/runs/%s/tasks/0" % run, {"worker_uuid": "w", "status": "done"})):
            status, answer = farm.ask(method, path, body)
            assert status == 403 and "holds tasks of other runs" in answer["detail"], (method, path)
        assert take(farm, run, "v")["task"] == 2
    assert farm.service.store.sql.leases.spans[1] == 3600 and figures(farm, other)[1] == 1


def test_a_token_that_is_made_in_a_session_ends_with_it(store: Direct) -> None:
    ada = store.store.call(taskfarm.add_user("eve", ADAS_HASH))
    session = store.farm.logins.who(b"Bearer " + store.farm.token(ada, store.clock().utc + 60).encode())
    token = store.store.call(taskfarm.create_token(ada, "full", None, "", 3650, None, session.expires))
    assert token.expires == session.expires
    assert store.store.call(taskfarm.create_token(ada, "full", None, "", None, None, 0.0)).expires is None


def test_a_key_gives_the_token_again_to_the_login_alone_that_made_it(farm: Live) -> None:
    body, short = {"scope": "read"}, new_token(farm, days=1)["token"]
    status, made = farm.ask("POST", "/api/tokens", body, "once")
    assert status == 201 and farm.ask("POST", "/api/tokens", body, "once") == (201, made)
    with asking_with(farm, short):
        assert farm.ask("POST", "/api/tokens", body, "once")[0] == 422


def test_a_token_for_a_run_sees_nothing_of_others(farm: Live) -> None:
    mine, other = make_run(farm, 3), make_run(farm, 3)
    for name in ("here", "both", "there", "idle"):
        farm.ask("POST", "/api/worker", {"uuid": name, "hostname": "node1", "pid": 1})
    for run, name in ((mine, "here"), (mine, "both"), (other, "both"), (other, "there")):
        assert farm.ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": name})[0] == 201
    with asking_with(farm, new_token(farm, "work", run=mine)["token"]):
        assert [run["uuid"] for run in farm.ask("GET", "/api/runs")[1]["data"]] == [mine]
        page = farm.ask("GET", "/api/workers?limit=1")[1]
        rest = farm.ask("GET", "/api/workers?limit=1000&after=" + page["next"])[1]
        assert [worker["uuid"] for worker in page["data"] + rest["data"]] == ["here", "both"] and rest["next"] is None
        for name, status in (("here", 200), ("both", 403), ("there", 403), ("idle", 200)):
            assert farm.ask("GET", "/api/worker/" + name)[0] == farm.ask("PUT", "/api/worker/" + name)[0] == status
        assert farm.ask("DELETE", "/api/worker/both")[0] == 403 and farm.ask("DELETE", "/api/worker/here")[0] == 204
        assert farm.ask("GET", "/api/runs/%s/../%s" % (mine, other))[0] == 404
        assert farm.ask("GET", "/api/runs/" + "0" * 32)[0] == 403, "whether there is one is not said either"


def test_each_post_of_a_user_minds_its_idempotency_key() -> None:
    for route in taskfarm.ROUTES.table:
        if (route.method, route.access) == ("POST", taskfarm.USER):
            assert {"once", "idempotency_key"} & {*route.handler.__code__.co_names}, route.path


def test_the_fields_of_a_report_come_in_the_order_of_its_class() -> None:
    body = {"task": 7, "elapsed": 1.5, "message": "m", "exitCode": 2, "percentCompleted": 3, "status": "failed",
            "attempt": 4, "log": "l", "cpu": 0.25, "memory": 9}
    (said,) = taskfarm.read_body(task_route(), json.dumps({"data": [body]}).encode())["data"]
    assert said == taskfarm.Report(number=7, attempt=4, status=taskfarm.FAILED, millionths=3000000, exit_code=2,
                                   message="m", elapsed_ms=1500, memory=9, cpu_ms=250, log="l")


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

    PLAIN_API = "http://127.0.0.1:%d/api/"      # it speaks plain HTTP unless told otherwise

    def published_run(farm: Live, **options: Any) -> Any:
        return taskfarm_worker.TaskFarm("ada", Live.PASSWORD, url_base=PLAIN_API % farm.port, **options)

    def test_the_published_client_unchanged_with_8_processes(farm: Live) -> None:
        run = published_run(farm, numTasks=64)
        listed = taskfarm_worker.tfRuns("ada", Live.PASSWORD, url_base=PLAIN_API % farm.port)
        assert [entry["uuid"] for entry in listed] == [run.uuid]
        assert (run.numWaiting, run.percentDone, run.info("")["numTasks"]) == (64, 0, 64)
        command = [sys.executable, "-c", PUBLISHED_WORKER, Live.PASSWORD, PLAIN_API % farm.port, run.uuid]
        workers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                   for _ in range(8)]
        outputs = [worker.communicate() for worker in workers]
        assert [error for _, error in outputs if error] == []
        assert sorted(int(task) for output, _ in outputs for task in output.split()) == list(range(64))
        assert (run.numDone, run.numComputing, run.percentDone) == (64, 0, 100)
        assert run.getTaskInfo(3, "status") == "done" and run.getTaskInfo(3, "percentCompleted") == 100
        run.restart(everything=True)
        assert (run.numWaiting, run.percentDone) == (64, 0)

    def test_the_published_client_at_a_run_that_is_paused_cancelled_extended_or_waits(farm: Live) -> None:
        run = published_run(farm, numTasks=3)
        second = farm.ask("POST", "/api/run", {"numTasks": 1, "after": run.uuid})[1]["uuid"]
        worker, waits = (taskfarm_worker.TaskFarmWorker("ada", Live.PASSWORD, uuid, url_base=PLAIN_API % farm.port)
                         for uuid in (run.uuid, second))
        assert worker.task == 0 and waits.task is None

        def change(word: str, **body: Any) -> None:
            assert farm.ask("POST", "/api/runs/%s/%s" % (run.uuid, word), body)[0] == 204

        def end_task() -> None:
            worker.update(100)
            worker.done()
        change("pause")
        end_task()
        assert worker.task is None and run.numDone == 1
        change("resume")
        assert worker.task == 1
        change("cancel", tasks=[[1, 1]])
        worker.update(50)
        assert run.getTaskInfo(1, "status") == "failed"
        end_task()          # a result is taken from whoever names no claim
        assert run.getTaskInfo(1, "status") == "done" and worker.task == 2
        change("cancel")
        worker.update(10)
        assert (run.numWaiting, run.numComputing) == (1, 0)
        end_task()
        change("extend", numTasks=1)
        assert worker.task is None and waits.task is None and run.info("")["numTasks"] == 4
        change("resume")
        worker = taskfarm_worker.TaskFarmWorker(        # one that is older knows no more tasks than there were
            "ada", Live.PASSWORD, run.uuid, url_base=PLAIN_API % farm.port)
        assert worker.task == 3
        end_task()
        assert waits.task == 0
        assert len(taskfarm_worker.tfRuns("ada", Live.PASSWORD, url_base=PLAIN_API % farm.port)) == 2

    def test_the_published_command_line(farm: Live) -> None:
        def manage(*words: str) -> str:
            done = subprocess.run([sys.executable, "-m", "taskfarm_worker.manage", "-u", "ada", "-p", Live.PASSWORD,
                                   "-b", PLAIN_API % farm.port, *words], capture_output=True, text=True)
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
    """A server in a process of its own, started by the command line. The token is that of the access file."""

    def __init__(self, db: str, *words: str, prepare: Optional[Callable[[], None]] = None, home: str = "",
                 port: int = 0) -> None:
        super().__init__()
        self.home = home or tempfile.mkdtemp()
        environ = dict(os.environ, HOME=self.home, PYTHONFAULTHANDLER="1")
        self.errors = tempfile.TemporaryFile("w+")      # noqa: SIM115
        self.process = subprocess.Popen([sys.executable, str(MODULE), "--db", db, "--port", str(port), *words],
                                        text=True, stdout=subprocess.PIPE, stderr=self.errors, env=environ,
                                        preexec_fn=prepare)
        RUNNING.append(self.process)
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


def fingerprint_of(server: Any) -> str:
    """Of the certificate that a port shows."""
    return taskfarm.fingerprint(ssl.get_server_certificate(("127.0.0.1", server.port)))


def test_a_site_has_its_own_certificate_served_and_read_again(tmp_path: Path) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"

    def renew() -> str:
        made = taskfarm.make_certificate(["localhost"], ["127.0.0.1"], time.time())
        key.write_text(made[0])
        certificate.write_text("the site's\n" + made[1] + taskfarm.make_certificate(["ca"], [], time.time())[1])
        return taskfarm.fingerprint(made[1])
    first = renew()
    server = Process(str(tmp_path / "f"), "--tls-cert", str(certificate), "--tls-key", str(key))

    def known() -> Set[str]:
        """What the port shows, and what the lock file and the access file say."""
        access = json.loads(Path(server.home, ".config/taskfarm/access.json").read_text())
        return {fingerprint_of(server), taskfarm.fingerprint(access["certificate"]),
                taskfarm.fingerprint(taskfarm.read_holder(str(tmp_path / "f"))["certificate"])}
    assert known() == {first}
    kept = server.raw(b"", context=taskfarm.pinned_context(certificate.read_text()))
    second = renew()
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: known() == {second})
    key.write_text("nothing")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "The certificate of before is served" in server.log())
    assert known() == {second}
    kept.sock.sendall(CLOSE)
    assert kept.answer()[0] == 200, "connections go on under the certificate that they began with"
    kept.close()
    assert server.end(signal.SIGTERM) == 0


@pytest.mark.parametrize("words, why", [
    (["--tls-cert", "{dir}/c.pem"], "go together"), (["--tls-key", "{dir}/k.pem"], "go together"),
    (["--tls-cert", "{dir}/c.pem", "--tls-key", "{dir}/no.pem"], "No such file"),
    (["--tls-cert", "{dir}/k.pem", "--tls-key", "{dir}/k.pem"], "no certificate and key that fit"),
    (["--tls-cert", "{dir}/c.pem", "--tls-key", "{dir}/other.pem"], "no certificate and key that fit")])
def test_a_certificate_of_the_site_that_will_not_do_is_refused(tmp_path: Path, words: List[str], why: str) -> None:
    key, certificate = taskfarm.make_certificate(["localhost"], [], time.time())
    (tmp_path / "c.pem").write_text(certificate)
    (tmp_path / "k.pem").write_text(key)
    (tmp_path / "other.pem").write_text(taskfarm.make_certificate(["localhost"], [], time.time())[0])
    words = [word.replace("{dir}", str(tmp_path)) for word in words]
    done = run_verb("--db", str(tmp_path / "f"), "--port", "0", *words, HOME=str(tmp_path))
    assert done.returncode == 1 and why in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "f").exists()


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
            store.call(taskfarm.report_many(run, None, [taskfarm.Report(
                number, None, taskfarm.COMPUTING, taskfarm.FULL // 2) for number in range(first, first + 1000)]))
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
        direct.store.turn()
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
    wait_until(lambda: server.ask("GET", "/readyz")[0] == 200)
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


def test_half_heads_at_the_descriptor_limit_do_not_keep_others_out(tmp_path: Path) -> None:
    server = Process(str(tmp_path / "f"), prepare=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    halves = [server.raw(b"GET /livez HT") for _ in range(100)]
    raw = server.raw(request_bytes("GET", "/livez"))
    assert raw.answer()[0] == 200
    for each in [raw, *halves]:
        each.close()
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


@pytest.mark.parametrize("number", range(4))
def test_a_start_that_gets_too_few_threads_leaves_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    start = threading.Thread.start
    started: List[threading.Thread] = []

    def refuse_more(thread: threading.Thread) -> None:
        if len(started) == number:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)
    monkeypatch.setattr(threading.Thread, "start", refuse_more)
    with pytest.raises(Refusal, match="no more threads"):
        Service(str(tmp_path / "f"), "127.0.0.1", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["f.lock"] and taskfarm.read_holder(str(tmp_path / "f")) == {}


def test_a_start_on_a_full_disk_is_looked_at_and_reached_by_verbs_and_no_second_start_disturbs_it(
        tmp_path: Path) -> None:
    db, lock = str(tmp_path / "f"), tmp_path / "f.lock"
    server = Process(db)
    run = make_run(server, 5)
    assert server.end(signal.SIGTERM) == 0
    server = Process(db, prepare=begin_on_a_full_disk(4096))        # a block that is there may be written again
    assert figures(server, run) == (5, 0, 0, 0.0) and claim(server, run)[0] == 503
    before = lock.read_bytes()
    for _ in range(2):
        listed = run_verb("user", "list", "--db", db)
        assert listed.returncode == 0 and len(listed.stdout.split()) == 1, listed.stderr
        refused = run_verb("user", "add", "bob", "--db", db, stdin="x\n")
        assert refused.returncode == 1 and "does not take a write" in refused.stderr
        second = run_verb("--db", db, "--port", "0")
        assert second.returncode == 1 and "process %d on" % server.process.pid in second.stderr
    assert lock.read_bytes() == before and figures(server, run) == (5, 0, 0, 0.0)
    make_room(server.process.pid)
    wait_until(lambda: server.ask("GET", "/readyz")[0] == 200)
    assert claim(server, run) == (201, 0)
    assert run_verb("user", "add", "bob", "--db", db, stdin="x\n").returncode == 0
    assert "Traceback" not in server.log() and server.end(signal.SIGTERM) == 0
    assert run_verb("check", "--db", db).returncode == 0


def test_address_and_login_that_a_full_disk_did_not_take_are_written_when_there_is_room(tmp_path: Path) -> None:
    db = str(tmp_path / "f")
    assert Process(db).end(signal.SIGTERM) == 0
    os.remove(db + ".lock")
    process = subprocess.Popen([sys.executable, str(MODULE), "--db", db, "--port", "0"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=dict(os.environ, HOME=str(tmp_path)),
                               preexec_fn=begin_on_a_full_disk(100))
    RUNNING.append(process)
    assert process.stdout and "serves" in process.stdout.readline()
    refused = run_verb("user", "list", "--db", db)
    assert refused.returncode == 1 and "has not said which" in refused.stderr and "disk full" in refused.stderr
    folder = tmp_path / ".config/taskfarm"
    assert list(folder.iterdir()) == [], "no half of an access file, nor a part of another name"
    make_room(process.pid)
    wait_until(lambda: (folder / "access.json").exists())
    listed = run_verb("list", HOME=str(tmp_path))
    assert listed.returncode == 0 and run_verb("user", "list", "--db", db).returncode == 0
    process.terminate()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0 and "Traceback" not in errors
    assert errors.count("cannot be written") == errors.count("is written now") == 2


def test_a_full_disk_behind_the_standard_output_ends_no_start(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.Popen([sys.executable, str(MODULE), "--db", str(tmp_path / "f"), "--port", "0"],
                                   stdout=full, stderr=subprocess.PIPE, text=True,
                                   env=dict(os.environ, HOME=str(tmp_path)))
    RUNNING.append(process)
    assert process.stderr and "serves" in process.stderr.readline()
    assert run_verb("list", HOME=str(tmp_path)).returncode == 0
    process.terminate()
    assert "Traceback" not in process.communicate(timeout=20)[1]


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


@pytest.mark.parametrize("path, body", [
    ("/api/run", {"numTasks": 7}), ("/api/runs/{run}/task", {"worker_uuid": "w"}),
    ("/api/runs/{run}/tasks", {"worker_uuid": "w", "count": 3}), ("/api/runs/{run}/restart?all=True", None)])
def test_a_key_holds_over_kill_9(tmp_path: Path, path: str, body: Any) -> None:
    db, given = str(tmp_path / "f"), {"/api/runs/{run}/task": 1, "/api/runs/{run}/tasks": 3}.get(path, 0)
    server = Process(db)
    run = make_run(server, 50)
    for number, answered in enumerate([True, False] if QUICK else [True, False, False]):
        key, where = "key %d" % number, path.replace("{run}", run)
        before = figures(server, run)[1], len(server.ask("GET", "/api/runs")[1]["data"])
        headers = {"Authorization": basic(server.token, ""), "Idempotency_Key": key}
        raw = server.raw(request_bytes("POST", where, b"" if body is None else json.dumps(body).encode(), **headers))
        first = raw.answer() if answered else None
        server.end(signal.SIGKILL)
        raw.close()
        server = Process(db)
        if "restart" in path and answered:
            report(server, run, 0, status="done")
        again = [server.ask("POST", where, body, key) for _ in range(2)]
        assert again[0] == again[1] and again[0][0] == (204 if "restart" in path else 201)
        if first:
            assert first[0] == again[0][0] and (json.loads(first[2]) if first[2] else None) == again[0][1]
        after = figures(server, run)[1], len(server.ask("GET", "/api/runs")[1]["data"])
        assert after == (before[0] + given, before[1] + (path == "/api/run"))
        if "restart" in path and answered:
            assert figures(server, run)[2] == 1, "it was not restarted once more"
    assert server.end(signal.SIGTERM) == 0
    with contextlib.closing(Store(db)) as store:
        assert store.call(taskfarm.check()) == []


def test_a_server_that_was_stopped_or_restarted_gives_a_whole_lease(tmp_path: Path) -> None:
    db = str(tmp_path / "f")
    server = Process(db)
    run = make_run(server, 10)
    enlist(server, "a", lease=2)
    assert take(server, run, "a")["task"] == 0
    began = time.monotonic()
    server.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: time.monotonic() > began + 3.5)
    server.process.send_signal(signal.SIGCONT)
    woken = time.monotonic()
    assert look(server, run) == ("computing", 1) or time.monotonic() > woken + 2
    wait_until(lambda: look(server, run) == ("waiting", 1))
    assert time.monotonic() > woken + 2, "a whole lease after the stop"
    assert beat(server, "a")[0] == 1
    killed = time.monotonic()
    server.end(signal.SIGKILL)
    wait_until(lambda: time.monotonic() > killed + 2.1)
    started = time.monotonic()
    server = Process(db)
    assert look(server, run) == ("computing", 1) or time.monotonic() > started + 2
    wait_until(lambda: look(server, run) == ("waiting", 1))
    assert time.monotonic() > started + 2, "a whole lease after the start"
    assert report(server, run, 0, worker_uuid="a", attempt=1, status="done") == 204
    assert server.end(signal.SIGTERM) == 0


def test_a_lease_that_runs_out_while_nobody_speaks_is_noticed(tmp_path: Path) -> None:
    server = Process(str(tmp_path / "f"))
    run = make_run(server, 10)
    enlist(server, "a", lease=1)
    assert take(server, run, "a")["task"] == 0
    began = time.monotonic()
    wait_until(lambda: time.monotonic() > began + 2)
    assert look(server, run) == ("waiting", 1)
    assert server.end(signal.SIGTERM) == 0


RETRYING_WORKER = """
import http.client, json, os, random, sys, time
port, run, token, name, seed, file = sys.argv[1:]
dice = random.Random(int(seed))
connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=5)
headers = {"Authorization": "Bearer " + token, "Content-Type": "application/json"}
log = open(file, "a", buffering=1)

def ask(method, path, body=None, key=""):
    while True:
        try:
            connection.request(method, path, None if body is None else json.dumps(body),
                               dict(headers, **({"Idempotency-Key": key} if key else {})))
            response = connection.getresponse()
            content = response.read()
            if response.status != 503:
                return response.status, json.loads(content) if content else None, response.headers["Retry-After"]
        except (OSError, http.client.HTTPException):
            connection.close()
        time.sleep(0.05 + dice.random() * 0.1)

registration = {"uuid": name, "hostname": "n", "pid": 1, "lease": 1}
ask("POST", "/api/worker", registration, "start " + name)
number = 0
while True:
    number += 1
    key, many = "%s %d" % (name, number), dice.random() < 0.3
    if many:
        status, content, pause = ask("POST", "/api/runs/%s/tasks" % run, {"worker_uuid": name, "count": 5}, key)
    else:
        status, content, pause = ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": name}, key)
    if status == 204:
        if pause is None:
            break
        time.sleep(0.2)
        continue
    assert status == 201, (status, content)
    tasks = content["data"] if many else [content]
    for task in tasks:
        log.write("claimed %d %d\\n" % (task["task"], task["attempt"]))
    if dice.random() < 0.5:
        time.sleep(dice.random() * 0.1 if dice.random() < 0.95 else 1.3)     # longer than the lease
    if dice.random() < 0.1:
        ask("PUT", "/api/worker/" + name)
    verdicts = [dice.choice(["done"] * 9 + ["failed", "waiting"]) for _ in tasks]
    if many and dice.random() < 0.5:
        entries = [{"task": task["task"], "attempt": task["attempt"], "status": verdict}
                   for task, verdict in zip(tasks, verdicts)]
        status, content, _ = ask("PUT", "/api/runs/%s/tasks" % run, {"worker_uuid": name, "data": entries})
        assert status == 200, (status, content)
        refused = {entry["task"] for entry in content["refused"]}
        assert content["accepted"] + len(refused) == len(tasks)
    else:
        refused = set()
        for task, verdict in zip(tasks, verdicts):
            status, content, _ = ask("PUT", "/api/runs/%s/tasks/%d" % (run, task["task"]), {
                "worker_uuid": name, "attempt": task["attempt"], "status": verdict})
            assert status in (204, 409), (status, content)
            if status == 409:
                refused.add(task["task"])
    for task, verdict in zip(tasks, verdicts):
        if task["task"] not in refused:
            log.write("%s %d %d\\n" % (verdict, task["task"], task["attempt"]))
print("ended")
"""


def test_workers_and_the_server_are_killed_and_stopped_and_each_task_is_done_once(tmp_path: Path) -> None:
    """Workers are killed and replaced, stopped and continued, the server is killed and started again on its port."""
    number_workers, number_tasks = (6, 400) if QUICK else (20, 8000)
    db, dice = str(tmp_path / "f"), random.Random(11)
    server = Process(db)
    status, shown = server.ask("POST", "/api/run", {"numTasks": number_tasks, "maxFailures": 0, "maxLosses": 0})
    run, port, token, started = str(shown["uuid"]), server.port, server.token, 0
    workers: Dict[int, "subprocess.Popen[str]"] = {}

    def start_worker(slot: int) -> None:
        nonlocal started
        started += 1
        words = [str(port), run, token, "w%d" % started, str(started), str(tmp_path / ("log%d" % started))]
        workers[slot] = subprocess.Popen([sys.executable, "-c", RETRYING_WORKER, *words], stdout=subprocess.PIPE,
                                         stderr=subprocess.PIPE, text=True)
        RUNNING.append(workers[slot])
    for slot in range(number_workers):
        start_worker(slot)
    stopped: List[int] = []
    beats, server_kills = 0, 0
    began = time.monotonic()
    while figures(server, run)[2] < number_tasks:
        assert time.monotonic() < began + 100, figures(server, run)
        threading.Event().wait(0.05)
        beats += 1
        if time.monotonic() > began + (6 if QUICK else 15):     # let it end
            for slot in stopped:
                workers[slot].send_signal(signal.SIGCONT)
            stopped.clear()
            continue
        for slot in list(stopped):
            if dice.random() < 0.05:
                workers[slot].send_signal(signal.SIGCONT)
                stopped.remove(slot)
        slot = dice.randrange(number_workers)
        if dice.random() < 0.3 and slot not in stopped and workers[slot].poll() is None:
            workers[slot].send_signal(signal.SIGSTOP)
            stopped.append(slot)
        elif dice.random() < 0.2 and slot not in stopped and workers[slot].poll() is None:
            workers[slot].kill()
            workers[slot].communicate()
            start_worker(slot)
        if beats % (15 if QUICK else 40) == 0:
            server_kills += 1
            server.end(signal.SIGKILL)
            server = Process(db, port=port)
    for slot in stopped:
        workers[slot].send_signal(signal.SIGCONT)
    for worker in workers.values():
        output, errors = worker.communicate(timeout=60)
        assert (output, errors) == ("ended\n", "")
    assert figures(server, run) == (0, 0, number_tasks, 100.0)
    tasks = {task["task"]: task for task in walk(server, "/api/runs/%s/tasks" % run, "limit=1000")}
    holders: Dict[Tuple[str, str], List[str]] = {}
    taken: Dict[Tuple[str, str], List[Tuple[str, str]]] = {}
    for name in ("w%d" % index for index in range(1, started + 1)):
        for line in (tmp_path / ("log" + name[1:])).read_text().splitlines() if (
                tmp_path / ("log" + name[1:])).exists() else []:
            verdict, number, attempt = line.split()
            if verdict == "claimed":
                holders.setdefault((number, attempt), []).append(name)
            else:
                taken.setdefault((number, attempt), []).append((verdict, name))
    assert all(len(names) == 1 for names in holders.values()), "an attempt was given twice"
    assert all(len(entries) == 1 for entries in taken.values()), "two results for one attempt were taken"
    finished = {(number, attempt): name for (number, attempt), ((verdict, name),) in taken.items() if verdict == "done"}
    assert len({number for number, _ in finished}) == len(finished), "done twice"
    assert all((tasks[int(number)]["worker"], str(tasks[int(number)]["attempt"])) == (name, attempt)
               for (number, attempt), name in finished.items()), "another result stands than the one that was taken"
    assert server_kills > 0 and started > number_workers and max(task["attempt"] for task in tasks.values()) > 1
    assert server.end(signal.SIGTERM) == 0
    with contextlib.closing(Store(db)) as store:
        assert store.call(taskfarm.check()) == []


# ---------------------------------------------------------------- TERMINAL

class Stream(io.StringIO):
    """A stream that is a terminal or not, with an encoding."""

    def __init__(self, terminal: bool, encoding: str = "utf-8") -> None:
        super().__init__()
        self.terminal, self.called = terminal, encoding

    def isatty(self) -> bool:
        return self.terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.called


def test_a_share_is_whole_only_when_all_is_done() -> None:
    assert [taskfarm.percent_text(part, 10 ** 6) for part in (0, 1, 532000, 999999, 10 ** 6)] == [
        "0.0 %", "0.1 %", "53.2 %", "99.9 %", "100.0 %"]


def test_rates_have_the_unit_that_can_be_read() -> None:
    assert [taskfarm.rate_text(rate) for rate in (745.2, 12.34, 0.5, 0.002)] == [
        "745 tasks/s", "12.3 tasks/s", "30.0 tasks/min", "7.2 tasks/h"]


@given(parts=st.lists(st.integers(0, 10 ** 9), min_size=4, max_size=4), cells=st.integers(4, 200))
def test_a_bar_is_full_and_shows_whatever_there_is(parts: List[int], cells: int) -> None:
    allocated = taskfarm.allocate_cells(parts, cells)
    assert sum(allocated) == (cells if sum(parts) else 0)
    assert all(bool(part) == bool(number) for part, number in zip(parts, allocated))
    for part, number in zip(parts, allocated):
        assert abs(number - part * cells / (sum(parts) or 1)) < 4, "a part is off by no more than what others need"


@pytest.mark.parametrize("width", [0, 20, 33, 60, 200])
def test_tables_fit_the_terminal_and_are_whole_in_a_pipe(width: int) -> None:
    rows = [(7, "node17.cluster.example.org", "out of memory: the tile is larger than\nexpected"), (123456, None, "x")]
    table = taskfarm.Table([taskfarm.Column("task", True), taskfarm.Column("host", can_shrink=True),
                            taskfarm.Column("message", can_shrink=True)], width)
    lines = table.lines(rows) + table.lines([(8, "a", "b")])
    assert len(lines) == 4 and "\t" not in "".join(lines)
    assert lines[0].split()[0] == "task" and [line[:6].strip() for line in lines[1:]] == ["7", "123456", "8"]
    if width in (0, 200):
        assert lines[1].endswith("node17.cluster.example.org  out of memory: the tile is larger than expected")
        assert lines[2].split() == ["123456", "-", "x"]
    else:
        assert max(map(len, lines)) <= width and "~" in lines[1]


def test_where_a_table_is_too_wide_spare_columns_are_left_out_and_stay_so() -> None:
    table = taskfarm.Table([taskfarm.Column("task"), taskfarm.Column("losses", optional=True),
                            taskfarm.Column("took", optional=True), taskfarm.Column("host", can_shrink=True)], 24)
    assert table.lines([(1, 2, 3, "n1")]) == ["task  losses  took  host", "1     2       3     n1"]
    assert table.lines([(1, 2, 3, "node1234")]) == ["1     2       node1234"]
    assert table.lines([(1, 2, 3, "n1")]) == ["1     2       n1"]


def test_wide_and_combining_characters_are_counted_as_they_are_shown() -> None:
    table = taskfarm.Table([taskfarm.Column("name", can_shrink=True), taskfarm.Column("n", True)], 14)
    lines = table.lines([("\u6771\u4eac", 1), ("e\u0301e\u0301", 22), ("\u6771\u4eac\u6771\u4eac\u6771\u4eac", 333)])
    assert {taskfarm.display_width(line) for line in lines} == {14}, lines
    assert taskfarm.cut("\u6771\u4eac", 3) == "\u6771~" and taskfarm.cut("abc", 3) == "abc"


def test_what_others_wrote_cannot_steer_the_terminal() -> None:
    hostile = "a\x1b]0;title\x07b\x9b2J\u202ec\nd\te\u2028\udc80"
    assert taskfarm.printable(hostile) == "a?]0;title?b?2J?c d e ?"
    (_, line) = taskfarm.Table([taskfarm.Column("message")]).lines([(hostile,)])
    assert "\x1b" not in line and "\n" not in line


@pytest.mark.parametrize("terminal, environ, colours, can_redraw", [
    (True, {"TERM": "xterm"}, True, True), (False, {"TERM": "xterm"}, False, False),
    (True, {"TERM": "xterm", "NO_COLOR": "1"}, False, True), (True, {"TERM": "xterm", "NO_COLOR": ""}, True, True),
    (True, {"TERM": "dumb"}, False, False), (True, {}, False, False)])
def test_colours_are_for_terminals_that_want_them(
        terminal: bool, environ: Dict[str, str], colours: bool, can_redraw: bool) -> None:
    screen = taskfarm.Screen(Stream(terminal), environ)
    assert (screen.colours, screen.can_redraw) == (colours, can_redraw)
    assert (screen.paint("x", "red") == "x") is not colours


def test_the_bar_is_ascii_where_the_encoding_is() -> None:
    run = {"numDone": 5, "numFailed": 1, "numComputing": 2, "numWaiting": 2}
    plain = taskfarm.Screen(Stream(False, "ascii"), {})
    assert taskfarm.state_bar(run, 10, plain) == "[#####x++..]"
    assert taskfarm.state_lines(run, plain) == ["# 5 done   x 1 failed   + 2 computing   . 2 waiting"]
    rich = taskfarm.state_bar(run, 10, taskfarm.Screen(Stream(False), {}))
    assert len(rich) == 12 and not rich.isascii()


def test_what_the_bar_means_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"numDone": 5 * 10 ** 6, "numFailed": 1, "numComputing": 2, "numWaiting": 2}
    monkeypatch.setenv("COLUMNS", "32")
    lines = taskfarm.state_lines(run, taskfarm.Screen(Stream(True, "ascii"), {}))
    assert lines == ["# 5 000 000 done   x 1 failed", "+ 2 computing   . 2 waiting"]


def test_a_picture_is_redrawn_over_the_last_one_and_never_higher_than_the_terminal(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "4")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Stream(True)
    screen = taskfarm.Screen(stream, {"TERM": "xterm"})
    screen.redraw(["1", "2"])
    screen.redraw(["a", "b", "c", "d", "e"])
    screen.redraw([screen.paint("z" * 79, "red")])
    monkeypatch.setenv("COLUMNS", "20")         # which wraps it into four rows
    screen.redraw(["y"])
    screen.redraw(["x" * 41, "w", "v"])
    screen.redraw([])
    screen.redraw([])
    screen.redraw(["u"])
    screen.keep()
    screen.redraw(["t"])
    assert stream.getvalue() == (
        "1\n2" "\x1b[1A\r\x1b[J" "a\nb\nc\nd" "\x1b[3A\r\x1b[J" "\x1b[31m" + "z" * 79 + "\x1b[0m"
        "\x1b[3A\r\x1b[J" "y" "\r\x1b[J" + "x" * 41 + "\nw" "\x1b[3A\r\x1b[J" "u\n" "t")


def test_a_screen_asks_its_own_terminal_for_the_size_whenever_it_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    outside, inside = os.openpty()
    with os.fdopen(inside, "w") as stream:
        screen = taskfarm.Screen(stream, {"TERM": "xterm"})
        assert screen.columns == 90, "this one does not know"
        for columns in (33, 20):
            fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 10, columns, 0, 0))
            assert screen.columns == columns and screen.size.lines == 10
    os.close(outside)


@pytest.mark.parametrize("terminal, shown", [
    ("xterm", "[#########.........]  50 %  filling: a case that has a~" "\r\x1b[J"), ("dumb", "")])
def test_progress_is_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch, terminal: str, shown: str) -> None:
    stream = Stream(True, "ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    for name, value in (("TERM", terminal), ("COLUMNS", "56"), ("LINES", "5"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    with taskfarm.Progress("filling: a case that has a long name") as progress:
        progress.show(1, 4)
        assert not stream.getvalue(), "it takes no longer than 0.1 s"
        progress.drawn_tick -= 1
        progress.show(2, 4)
        progress.show(3, 4)
    assert stream.getvalue() == shown


def test_a_steady_rate_has_a_narrow_range_and_waves_a_wide_one() -> None:
    steady = taskfarm.estimate_rate([(float(second), 10 * second) for second in range(101)])
    waves = taskfarm.estimate_rate([(0.0, 0), (49.0, 0), (50.0, 500), (99.0, 500), (100.0, 1000)])
    assert steady and waves and steady.per_s == waves.per_s == 10.0
    assert 9 < steady.low < 10 < steady.high < 11, "a thousand tasks give a rate to some percent"
    assert waves.high - waves.low > 5 * (steady.high - steady.low)
    few = taskfarm.estimate_rate([(0.0, 0), (100.0, 2)])
    assert few and few.low == 0 and taskfarm.time_for_tasks(100, few)[1] is None, "two tasks say little"
    for nothing in ([], [(0.0, 5)], [(0.0, 5), (9.0, 5)], [(1.0, 0), (1.0, 3)]):
        assert taskfarm.estimate_rate(nothing) is None


@pytest.mark.parametrize("least, most, words", [
    (None, None, "unknown"), (7200, None, "more than 2 h 0 min"), (7260, 7800, "2 h 1 min to 2 h 10 min"),
    (120.1, 120.2, "about 2 min 0 s"), (0, 0, "about 0.00 s")])
def test_the_time_left_is_a_range(least: Optional[float], most: Optional[float], words: str) -> None:
    assert taskfarm.range_text(least, most) == words


def ended_task(start: Optional[float], end: float) -> Dict[str, Any]:
    """A task that was started and that ended so many seconds after 1970."""
    def shown(seconds: Optional[float]) -> Optional[str]:
        return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc).strftime(
            "%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
    return {"started": shown(start), "finished": shown(end)}


def per_hour(ends: "taskfarm.RecentEnds") -> float:
    rate = taskfarm.present_rate(ends.readings)
    return round(3600 * rate.per_s, 1) if rate else 0.0


def test_the_rate_of_tasks_that_ended() -> None:
    now = 1.7e9
    wave = [ended_task(now - 3700, now - 100 + number) for number in range(16)]
    second = [now - 100.0 + number for number in range(16)]
    assert 15 < per_hour(taskfarm.recent_ends(wave, True, second, now)) < 16, "a first wave took as long as its tasks"
    old = [ended_task(now - 90000, now - 86400) for _ in range(50)]
    assert 15 < per_hour(taskfarm.recent_ends(wave + old, True, second, now)) < 16, "what was yesterday does not count"
    assert per_hour(taskfarm.recent_ends(old, True, second, now)) == 0, "nor is there a rate when nothing ended lately"
    quick = [ended_task(now - 10 - 0.1 * number, now - 0.1 * number) for number in range(100)]
    then = [now - 0.1 * number for number in range(100)]
    assert 34000 < per_hour(taskfarm.recent_ends(quick, False, then, now)) < 37000, (
        "a list that is cut off tells of its own time")
    batch = [ended_task(None, now - 50 - number) for number in range(10)]
    assert 500 < per_hour(taskfarm.recent_ends(batch, True, [], now)) < 700, "without starts from the first end on"
    assert taskfarm.recent_ends(batch, True, [], now).took_s == []
    assert taskfarm.recent_ends(wave, True, [], now).took_s[0] == 3600
    stopped = [ended_task(now - 600, now - 500 + number) for number in range(100)]
    then = [now - 400] * 100
    assert 500 < per_hour(taskfarm.recent_ends(stopped, True, then, now)) < 700, "time in which nothing ends counts too"


@pytest.mark.parametrize("before, now_at_work, per_hour_now", [
    (10, 10, 600), (10, 20, 1200), (20, 5, 300), (10, 1, 60), (0, 10, 600), (10, 0, 0)])
def test_the_rate_is_that_of_the_workers_of_now(before: int, now_at_work: int, per_hour_now: int) -> None:
    """Each takes 60 s for a task. At work were some for nine minutes, others since three."""
    now, ended, computing = 1.7e9, [], []
    for number in range(max(before, now_at_work)):
        start = now - (540 if number < before else 180) - number
        leaves = now - 180 if number >= now_at_work else now
        while start < leaves:
            if start + 60 < leaves:
                ended.append(ended_task(start, start + 60))
            elif number < now_at_work:
                computing.append(start)
            start += 60
    ends = taskfarm.recent_ends(ended, True, computing, now)
    assert 0.8 * per_hour_now <= per_hour(ends) <= 1.25 * per_hour_now
    readings = taskfarm.Readings()
    for second in range(480 + 60):
        at_work = before if second < 480 else now_at_work
        done = before * second // 60 if second < 480 else before * 8 + now_at_work * (second - 480) // 60
        readings.add(float(second), {"numDone": done, "numFailed": 0, "numComputing": at_work}, 600.0)
    rate = taskfarm.present_rate(list(readings.latest))
    assert 0.8 * per_hour_now <= (3600 * rate.per_s if rate else 0) <= 1.25 * per_hour_now


def test_readings_are_those_of_the_window_and_not_too_many() -> None:
    readings = taskfarm.Readings()
    for number in range(200000):
        readings.add(number / 100, {"numDone": number, "numFailed": 0, "numComputing": 4}, 600.0)
    assert 900 < len(readings.latest) < 1100 and readings.latest[-1].tick - readings.latest[0].tick > 599
    rate = taskfarm.present_rate(list(readings.latest))
    assert rate and rate.per_s == pytest.approx(100, rel=0.01)
    readings.add(2001.0, {"numDone": 0, "numFailed": 0, "numComputing": 4}, 600.0)
    assert len(readings.latest) == 1, "what was before a restart says nothing"


def test_the_time_left_is_estimated_only_where_something_is_known() -> None:
    rate = taskfarm.Rate(1.0, 0.5, 2.0, 100, 100.0)
    ends = taskfarm.RecentEnds([], [float(seconds) for seconds in range(60, 160)])

    def estimate(waiting: int, computing: int, rate: Optional[taskfarm.Rate], longest_s: Optional[float]) -> Any:
        return taskfarm.estimate_time_left({"numWaiting": waiting, "numComputing": computing}, rate, ends, longest_s)
    assert estimate(0, 0, rate, None) == (0.0, 0.0, "")
    assert estimate(90, 10, rate, 5.0) == (50.0, 200.0, "")
    assert estimate(90, 10, None, 5.0)[:2] == (None, None) and "too few" in estimate(90, 10, None, 5.0)[2]
    assert estimate(90, 0, None, None)[2] == "nobody works on it"
    assert taskfarm.forecast_text(None, *estimate(90, 0, None, None)) == (
        "rate unknown, time left unknown: nobody works on it")
    assert taskfarm.forecast_text(rate, *estimate(90, 10, rate, 5.0)) == "1.0 tasks/s, time left 50 s to 3 min 20 s"
    assert estimate(0, 10, rate, 20.0) == (50.0, 150.0, ""), "at the end the durations of tasks say more than the rate"
    assert "1 h 0 min" in estimate(0, 10, rate, 3600.0)[2], "a task that hangs is named"


# ---------------------------------------------------------------- CLIENT

def access_of(farm: Any, **changes: Any) -> taskfarm.Access:
    """Farm and login of a live farm."""
    access = taskfarm.Access(farm.url, "ada", farm.token, "", farm.service.certificate, farm.service.store.identity,
                             "the test")
    return access._replace(**changes)


@functools.lru_cache(maxsize=None)
def anothers() -> Tuple[str, ssl.SSLContext]:
    """A certificate that is no farm's, and the server's end of TLS with it."""
    key, certificate = taskfarm.make_certificate(["localhost"], ["127.0.0.1"], time.time())
    return certificate, taskfarm.server_context(certificate, key)


class LossyRelay:
    """A port in front of a farm, with a certificate of its own, that swallows answers to requests that reached it."""

    def __init__(self, port: int) -> None:
        self.port_behind = port
        self.certificate, self.context = anothers()
        self.swallow: Callable[[], bool] = lambda: False     # the next answer
        self.seen: List[bytes] = []     # heads of requests
        self.lost = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = "https://127.0.0.1:%d" % self.port
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError), self.context.wrap_socket(sock, server_side=True) as client, \
                socket.create_connection(("127.0.0.1", self.port_behind)) as behind:
            while True:
                request = self._message(client)
                self.seen.append(request.partition(b"\r\n\r\n")[0])
                behind.sendall(request)
                answer = self._message(behind)
                if self.swallow():
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


class Squatter:
    """Somebody else's port: it keeps all that comes, in the clear, and answers as a farm would, or by one *behind*."""

    def __init__(self, context: Optional[ssl.SSLContext] = None, behind: int = 0) -> None:
        self.context, self.behind = context, behind
        self.heard, self.connections = b"", 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = "https://127.0.0.1:%d" % self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as undo:
            undo.callback(sock.close)
            sock = undo.enter_context(self.context.wrap_socket(sock, server_side=True) if self.context else sock)
            behind = undo.enter_context(socket.create_connection(("127.0.0.1", self.behind))) if self.behind else None
            if behind:
                threading.Thread(target=self._pass, args=(behind, sock), daemon=True).start()
            for data in iter(lambda: sock.recv(65536), b""):
                self.heard += data
                if behind:
                    behind.sendall(data)
                else:
                    sock.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"token": 1}')

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65536), b""):
                target.sendall(data)

    def close(self) -> None:
        self.listener.close()


@pytest.fixture(params=["plain", "TLS", "relay"])
def squatter(request: Any, farm: Live) -> Iterator[Squatter]:
    context = None if request.param == "plain" else anothers()[1]
    with contextlib.closing(Squatter(context, farm.port if request.param == "relay" else 0)) as squatting:
        yield squatting


def test_a_login_goes_to_nobody_who_has_not_the_farms_certificate(farm: Live, squatter: Squatter) -> None:
    for pin in (farm.service.certificate, taskfarm.fingerprint(farm.service.certificate), "system", ""):
        for login in ({"token": "tf1.secret"}, {"token": "", "password": "secret"}):
            access = access_of(farm, url=squatter.url, certificate=pin, **login)
            with contextlib.closing(taskfarm.Client(lambda: access)) as client:    # noqa: B023
                for path in ("/api/runs", "/api/token"):
                    with pytest.raises(taskfarm.OtherFarm, match="no login was sent"):
                        client.ask("GET", path)
    assert squatter.connections == 16
    assert not re.search(rb"(?i)authorization|secret|HTTP/1", squatter.heard), "not even a request"


def test_verbs_and_workers_send_a_squatter_nothing(farm: Live, squatter: Squatter, tmp_path: Path) -> None:
    run = make_run(farm, 2)
    mine = tmp_path / ".config/taskfarm/access.json"
    script = "import taskfarm; taskfarm.SCRIPT_RETRY_S = 0.1; taskfarm.TaskFarm(%snumTasks=3)"
    moved, given = dict(file_of(farm), url=squatter.url), file_of(farm)
    for content, environ in ((moved, {}), (given, {"TASKFARM_URL": squatter.url}),
                             (given, {"TASKFARM_URL": squatter.url, "TASKFARM_TOKEN": farm.token}),
                             (given, {"TASKFARM_URL": squatter.url, "TASKFARM_TOKEN": farm.token,
                                      "TASKFARM_FINGERPRINT": as_ada(farm)["TASKFARM_FINGERPRINT"]})):
        taskfarm.write_access(str(mine), content)
        tried = squatter.connections
        work = [sys.executable, "-c", "import taskfarm; taskfarm.WORKER_RETRY_S = 0.1; taskfarm.VERB_PATIENCE_S = 0.1; "
                "import sys; sys.exit(taskfarm.main())"]
        for words in (["list"], ["work", run, "--", "true"]):
            done = subprocess.run([*work, *words], capture_output=True, text=True, timeout=60, cwd=str(HERE),
                                  env=dict(os.environ, HOME=str(tmp_path), **environ))
            assert done.returncode == 5 and "no login was sent" in done.stderr and farm.token not in done.stderr
            assert "login %s" % squatter.url in done.stderr or "does not speak TLS" in done.stderr
            assert "Traceback" not in done.stderr
        base = squatter.url.replace("https", "http") + "/api/"
        for login in ("", "'ada', %r, url_base=%r, " % (Live.PASSWORD, base)):
            done = subprocess.run([sys.executable, "-c", script % login], capture_output=True, text=True, timeout=60,
                                  cwd=str(HERE), env=dict(os.environ, HOME=str(tmp_path), **environ))
            assert done.returncode == 1 and "no login was sent" in done.stderr
            assert farm.token not in done.stderr and (Live.PASSWORD not in done.stderr or login in done.stderr)
        assert squatter.connections - tried >= 4
    assert not re.search(rb"(?i)authorization|HTTP/1", squatter.heard)
    assert farm.ask("GET", "/api/runs")[1]["data"][-1]["uuid"] == run


def test_who_passes_the_bytes_on_reads_nothing(farm: Live) -> None:
    with contextlib.closing(Squatter(behind=urllib.parse.urlsplit(farm.url).port or 0)) as wire, contextlib.closing(
            taskfarm.Client(lambda: access_of(farm, url=wire.url))) as client:
        assert client.ask("GET", "/api/runs") == {"data": []}
        assert wire.heard and not re.search(rb"(?i)authorization|HTTP/1", wire.heard)


def test_a_farm_that_has_moved_is_found_by_its_identity(farm: Live, tmp_path: Path) -> None:
    path = str(tmp_path / "access.json")
    taskfarm.write_access(path, file_of(farm))
    environ = {"TASKFARM_ACCESS": path}
    find = functools.partial(taskfarm.find_access, environ, farm=farm.service.store.identity)
    with contextlib.closing(taskfarm.Client(find, 30.0)) as client, contextlib.closing(
            Squatter(anothers()[1])) as squatting:
        client.ask("GET", "/api/runs")
        before = farm.url
        farm.stop()
        farm.local = threading.local()
        farm.start()
        taskfarm.write_access(path, dict(file_of(farm), url=squatting.url, farm="0" * 32,
                                         certificate=anothers()[0]))        # another's farm
        taskfarm.write_access(str(tmp_path / "access-ice.json"), file_of(farm))
        assert client.ask("GET", "/api/runs") == {"data": []} and farm.url != before
        assert squatting.connections == 0


def test_a_verb_inside_a_command_finds_its_farm_by_identity(farm: Live, tmp_path: Path) -> None:
    environ = {"TASKFARM_ACCESS": str(tmp_path / "access.json"), "TASKFARM_FARM": farm.service.store.identity}
    anothers_file = {"url": "https://b:1", "user": "eve", "token": "t", "farm": "0" * 32, "certificate": anothers()[0]}
    taskfarm.write_access(environ["TASKFARM_ACCESS"], anothers_file)
    with pytest.raises(Refusal, match="the farm that this command belongs to"):
        taskfarm.find_access(environ)
    for number, url in enumerate(("https://a:2", "https://a:1", farm.url)):
        path = tmp_path / ("access-%d.json" % number)
        taskfarm.write_access(str(path), dict(file_of(farm), url=url))
        os.utime(path, (1000 + number, 1000 + number))
    assert taskfarm.find_access(environ).url == farm.url, "the last one that was written"
    assert taskfarm.find_access(dict(environ, TASKFARM_URL="https://b:1")).user == "eve", "an address goes before"
    assert taskfarm.find_access(environ, "https://b:1").user == "eve"


def test_a_run_is_found_in_its_farm_when_another_has_got_the_access_file(farm: Live, tmp_path: Path) -> None:
    other, path = Live(str(tmp_path / "other")), str(tmp_path / "access.json")
    find = functools.partial(taskfarm.find_access, {"TASKFARM_ACCESS": path})
    beside = str(tmp_path / "access-ice.json")
    taskfarm.write_access(path, file_of(other))
    taskfarm.write_access(beside, file_of(farm))
    ice, both = (farm.ask("POST", "/api/run", {"numTasks": 1, "name": name})[1]["uuid"] for name in ("ice", "both"))
    theirs = other.ask("POST", "/api/run", {"numTasks": 1, "name": "both"})[1]["uuid"]
    for text, run, said in ((ice, ice, beside), ("ice", ice, beside), ("both", theirs, ""), (both, both, beside)):
        with contextlib.closing(taskfarm.Client(find)) as client:
            notices: List[str] = []
            client.say = notices.append
            assert taskfarm.find_run_uuid(client, text, changes=True) == run
            assert client.ask("GET", "/api/runs/" + run)["uuid"] == run and client.access.source == (said or path)
            assert [said in notice for notice in notices] == [True] * bool(said)
    assert run_verb("work", ice, "--", "true", TASKFARM_ACCESS=path).returncode == 0
    assert farm.ask("GET", "/api/runs/" + ice)[1]["numDone"] == 1
    work = ("work", "sea", "--", "true")
    assert run_verb(*work, TASKFARM_ACCESS=path).returncode == 4
    third = Live(str(tmp_path / "third"))
    taskfarm.write_access(str(tmp_path / "access-third.json"), file_of(third))
    third.ask("POST", "/api/run", {"numTasks": 1, "name": "ice"})
    with contextlib.closing(taskfarm.Client(find)) as client:
        with pytest.raises(Refusal, match="access-.* and .*access-.* have a run 'ice'"):
            taskfarm.find_run_uuid(client, "ice")
    third.close()
    with contextlib.closing(taskfarm.Client(find)) as client:
        with pytest.raises(taskfarm.Unreachable, match="access-third.json may have it, and does not answer"):
            taskfarm.find_run_uuid(client, "sea")
    assert run_verb(*work, TASKFARM_ACCESS=path).returncode == 5
    other.close()
    for text, answers in ((ice, True), ("ice", False)):         # a name may be that of a run in each farm
        with contextlib.closing(taskfarm.Client(find)) as client:
            if answers:
                assert taskfarm.find_run_uuid(client, text) == ice
            else:
                with pytest.raises(taskfarm.Unreachable):
                    taskfarm.find_run_uuid(client, text)


def test_a_loopback_address_of_another_machine_is_told_at_once(farm: Live, tmp_path: Path) -> None:
    path = str(tmp_path / "access.json")
    sentence = "of %s can be reached on login1 alone, and this is .*--host 0.0.0.0" % re.escape(path)
    find = functools.partial(taskfarm.find_access, {"TASKFARM_ACCESS": path})
    with contextlib.closing(Squatter(anothers()[1])) as squatting:
        for url in ("https://127.0.0.1:1", "https://localhost:1", squatting.url):
            taskfarm.write_access(path, dict(file_of(farm), url=url, host="login1"))
            for words in (["work", "ice", "--", "true"], ["new", "5"], ["list"]):
                done = run_verb(*words, TASKFARM_ACCESS=path)
                assert done.returncode == 5 and re.search(sentence, done.stderr), done
                assert done.stderr.count("\n") == 1, "nothing was tried again"
            status, found = doctor(TASKFARM_ACCESS=path)
            assert status == 1 and re.match("the farm " + sentence, found["server"][1])
    taskfarm.write_access(path, dict(file_of(farm), host="login1"))
    with contextlib.closing(taskfarm.Client(find, 60.0)) as client:
        assert client.ask("GET", "/api/runs") == {"data": []}, "a tunnel"
        client.say = lambda _: client.give_up.set()
        farm.stop()
        with pytest.raises(taskfarm.Unreachable, match="is the server running"):
            client.ask("GET", "/api/runs")
        assert client.give_up.is_set(), "it was tried again: the server was here a moment ago"
    farm.start()


def test_new_says_what_jobs_on_other_nodes_need_where_there_is_a_batch_system(farm: Live, tmp_path: Path) -> None:
    for expected in (False, True):
        done = run_verb("new", "1", PATH=str(tmp_path), **as_ada(farm))
        assert done.returncode == 0 and ("--host 0.0.0.0" in done.stderr) is expected
        (tmp_path / "sbatch").write_text("#!/bin/sh\n")
        (tmp_path / "sbatch").chmod(0o755)


def test_a_server_that_does_not_answer_soon_is_told_after_the_first_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskfarm, "CONNECT_TIMEOUT_S", 0.1)
    monkeypatch.setattr(taskfarm, "SAY_S", 0.05)
    with contextlib.ExitStack() as undo:
        full = undo.enter_context(socket.socket())          # as behind a firewall: the system drops what comes
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(8):
            sock = undo.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        access = taskfarm.parse_access({"url": "https://127.0.0.1:%d" % full.getsockname()[1], "token": "t"}, "x")
        tries: List[taskfarm.Access] = []
        client = taskfarm.Client(lambda: tries.append(access) or access, 60.0)      # type: ignore[func-returns-value]
        client.say = lambda _: client.give_up.set()
        with pytest.raises(taskfarm.Unreachable, match="timed out"):
            client.ask("GET", "/api/runs")
        assert client.give_up.is_set() and len(tries) <= 3, "the first look, and one after each of two tries"


@pytest.mark.parametrize("url, error, advice", [
    ("https://login1:5000", socket.gaierror(-2, "Name or service not known"), "does not know the name login1.*--adv"),
    ("https://10.0.0.5:5000", socket.timeout(), "a firewall may be between"),
    ("https://10.0.0.5:5000", OSError(errno.EHOSTUNREACH, "No route to host"), "a firewall may be between"),
    ("https://login1:5000", ConnectionRefusedError(), "--host 0.0.0.0"),
    ("https://[::1]:5000", ConnectionRefusedError(), "on this machine .*--host 0.0.0.0"),
])
def test_where_nothing_answers_the_reason_decides_what_to_do(url: str, error: Exception, advice: str) -> None:
    assert re.search(advice, taskfarm.unreachable_advice(url, error))


def test_a_login_in_the_environment_goes_where_the_certificate_is_the_known_one(farm: Live, tmp_path: Path) -> None:
    path = str(tmp_path / "access.json")
    environ = {"TASKFARM_ACCESS": path, "TASKFARM_URL": "https://elsewhere:1", "TASKFARM_TOKEN": "t"}
    ours, other = taskfarm.fingerprint(farm.service.certificate), taskfarm.fingerprint(anothers()[0])
    assert taskfarm.find_access(environ).certificate == "", "the system's authorities decide"
    taskfarm.write_access(path, file_of(farm))
    assert taskfarm.find_access(environ).certificate == farm.service.certificate
    taskfarm.write_access(str(tmp_path / "access-b.json"), {"url": "https://elsewhere:1", "certificate": other})
    assert taskfarm.find_access(environ).certificate == other
    openssl = ours[7:].upper()
    assert taskfarm.find_access(dict(environ, TASKFARM_FINGERPRINT=":".join(
        openssl[at:at + 2] for at in range(0, 64, 2)))).certificate == ours
    with pytest.raises(Refusal, match="64 hexadecimal digits"):
        taskfarm.find_access(dict(environ, TASKFARM_FINGERPRINT="SHA256:00"))
    del environ["TASKFARM_TOKEN"]
    taskfarm.write_access(path, dict(file_of(farm), url="https://login1:5000", certificate="system"))
    os.remove(str(tmp_path / "access-b.json"))
    for url, found in (("https://elsewhere:5000", False), ("https://login1:6000", True), ("https://login1.org", False)):
        environ["TASKFARM_URL"] = url
        if found:
            assert taskfarm.find_access(environ).token == farm.token
        else:
            with pytest.raises(Refusal, match="there is no login for " + url):
                taskfarm.find_access(environ)


def test_a_certificate_that_will_not_do_is_told_in_a_sentence(farm: Live) -> None:
    key, expired = taskfarm.make_certificate(["localhost"], ["127.0.0.1"], time.time() - 21 * 366 * 86400)
    key_2, early = taskfarm.make_certificate(["localhost"], ["127.0.0.1"], time.time() + 3 * 86400)
    for certificate, its_key, sentence in ((expired, key, "has expired"), (early, key_2, "is not valid yet")):
        with contextlib.closing(Squatter(taskfarm.server_context(certificate, its_key))) as old:
            access = access_of(farm, url=old.url, certificate=certificate)
            with contextlib.closing(taskfarm.Client(lambda: access)) as client:    # noqa: B023
                with pytest.raises(taskfarm.OtherFarm, match=sentence + ", so no login was sent"):
                    client.ask("GET", "/api/runs")
            assert old.heard == b""
    for nonsense in ("x", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        with contextlib.closing(taskfarm.Client(lambda: access_of(farm, certificate=nonsense))) as client:  # noqa: B023
            with pytest.raises(Refusal, match="certificate in the test is none"):
                client.ask("GET", "/api/runs")


def test_a_server_that_is_silent_or_ends_in_the_handshake_is_told_as_such(farm: Live) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        access = access_of(farm, url="https://127.0.0.1:%d" % silent.getsockname()[1])
        with pytest.raises(taskfarm.Unreachable, match="timed out"):
            taskfarm.Client(lambda: access, timeout_s=0.1).ask("GET", "/api/runs")

        def end() -> None:
            for _ in range(2):
                sock, _ = silent.accept()
                sock.recv(1000)
                sock.close()
        threading.Thread(target=end, daemon=True).start()
        with pytest.raises(taskfarm.Unreachable, match="ends the connection in the TLS handshake"):
            for _ in range(2):          # the first is the one that has given up
                taskfarm.Client(lambda: access, timeout_s=5).ask("GET", "/api/runs")


def test_no_login_is_shown_by_what_a_traceback_shows(farm: Live) -> None:
    access = access_of(farm, token="tf1.secret", password="sesame")
    shown = repr(access) + repr(taskfarm.Client(lambda: access)) + str(access) + "%s" % ([access],)
    assert "secret" not in shown and "sesame" not in shown and farm.url in shown


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o604])
def test_an_access_file_that_others_can_open_is_closed_to_them(
        tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int) -> None:
    path = tmp_path / "access.json"
    taskfarm.write_access(str(path), {"url": "https://a:1"})
    path.chmod(mode)
    assert taskfarm.read_access(str(path)) == {"url": "https://a:1"} and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "could be opened by others (mode %03o)" % mode in caplog.text and caplog.text.count("\n") == 1
    taskfarm.read_access(str(path))
    assert caplog.text.count("\n") == 1


@pytest.mark.parametrize("of_link", [False, True])
def test_an_access_file_of_another_user_is_refused(farm: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   of_link: bool) -> None:
    path, mine = tmp_path / "access.json", tmp_path / "mine.json"
    taskfarm.write_access(str(mine), file_of(farm))
    if of_link:
        path.symlink_to(mine)
    else:
        mine.rename(path)
    os.lchown(path, 12345 if os.geteuid() == 0 else os.geteuid(), -1)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    monkeypatch.setenv("TASKFARM_ACCESS", str(path))
    sentence = "is a link of user " if of_link else "belongs to user "
    with pytest.raises(Refusal, match=sentence):
        taskfarm.find_access({"TASKFARM_ACCESS": str(path)})
    with pytest.raises(OSError, match=sentence):             # which the server logs, and serves on
        taskfarm.publish_access(farm.service, farm.user("ada"), farm.path)


def test_a_lost_answer_costs_nothing_and_nothing_is_given_twice(farm: Live) -> None:
    relay = LossyRelay(farm.port)
    access, swallow = access_of(farm, url=relay.url, certificate=relay.certificate), [False]
    relay.swallow = lambda: bool(swallow) and swallow.pop()
    with contextlib.closing(taskfarm.Client(lambda: access, retry_s=20)) as client:
        swallow[:] = [True]
        run = client.ask("POST", "/api/run", {"numTasks": 5})["uuid"]
        assert len(client.ask("GET", "/api/runs")["data"]) == 1
        taskfarm.register(client, "w", 60)
        for number in range(5):
            swallow[:] = [True, True]
            assert client.ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": "w"})["task"] == number
        assert client.ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": "w"}) is None
        assert client.retry_after is not None, "its own lease may end"
    assert relay.lost == 11
    relay.close()


def test_a_client_waits_for_a_server_and_follows_it_to_another_port(farm: Live) -> None:
    notices: List[str] = []
    with contextlib.closing(taskfarm.Client(lambda: access_of(farm), retry_s=60)) as client:
        client.say, url = notices.append, farm.url
        client.ask("GET", "/api/runs")
        farm.stop()
        answers = []
        thread = threading.Thread(target=lambda: answers.append(client.ask("POST", "/api/run", {"numTasks": 1})))
        thread.start()
        wait_until(lambda: notices)
        farm.local = threading.local()
        farm.start()
        thread.join(30)
        assert answers[0]["numTasks"] == 1
        assert notices == ["no farm answers at %s (Connection refused); trying again for up to 60 s" % url,
                           "the farm answers again"], "short, and once: the login has worked before"
    with contextlib.closing(taskfarm.Client(lambda: access_of(farm, url="https://127.0.0.1:1"))) as client:
        with pytest.raises(taskfarm.Unreachable, match="started with --host 0.0.0.0"):
            client.ask("GET", "/api/runs")


def test_a_login_that_was_renewed_is_read_again(farm: Live) -> None:
    tokens = ["tf1.old", farm.token]
    with contextlib.closing(taskfarm.Client(lambda: access_of(farm, token=tokens.pop(0)))) as client:
        assert client.ask("GET", "/api/runs") == {"data": []}


def test_a_copy_that_is_served_beside_the_original_leaves_its_access_file_alone(farm: Live, tmp_path: Path) -> None:
    path, identity = str(tmp_path / "access.json"), farm.service.store.identity
    environ = {"TASKFARM_ACCESS": path}
    taskfarm.write_access(path, file_of(farm))
    beside = str(tmp_path / ("access-copy-%s.json" % identity[:8]))
    assert taskfarm.farm_access_path(environ, identity, "https://127.0.0.1:1", "/x/copy.sqlite") == beside
    assert taskfarm.farm_access_path(environ, identity, farm.url, "/x/f") == path
    farm.stop()
    assert taskfarm.farm_access_path(environ, identity, "https://127.0.0.1:1", "/x/copy.sqlite") == path


def test_an_access_file_that_cannot_be_written_leaves_no_token_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "access.json"
    taskfarm.write_access(str(path), {"token": "tf1.before"})
    for _ in range(2):
        with full_disk(10), pytest.raises(OSError):
            taskfarm.write_access(str(path), {"token": "tf1.secret"})
    assert list(tmp_path.iterdir()) == [path] and taskfarm.read_access(str(path)) == {"token": "tf1.before"}


def test_farm_and_login_are_found_where_they_are(tmp_path: Path) -> None:
    environ, pin = {"TASKFARM_ACCESS": str(tmp_path / "access.json")}, "SHA256:" + "0" * 64
    with pytest.raises(Refusal, match="TASKFARM_URL"):
        taskfarm.find_access(environ)
    with pytest.raises(Refusal, match="there is no login"):
        taskfarm.find_access(dict(environ, TASKFARM_URL="https://a:1"))
    taskfarm.write_access(environ["TASKFARM_ACCESS"], {"url": "https://home:5000", "user": "ada", "token": "t",
                                                       "farm": "f", "certificate": pin})

    def found(**more: str) -> Tuple[str, str, str, str, str]:
        access = taskfarm.find_access(dict(environ, **more))
        return access.url, access.user, access.token, access.password, access.certificate

    assert found() == ("https://home:5000", "ada", "t", "", pin)
    assert found(TASKFARM_URL="https://[::1]:6000/api/") == ("https://[::1]:6000", "ada", "t", "", pin), \
        "a tunnel: the login goes only where the certificate is shown"
    assert found(TASKFARM_TOKEN="u") == ("https://home:5000", "", "u", "", pin)
    assert found(TASKFARM_URL="https://b:1/", TASKFARM_USER="eve", TASKFARM_PASSWORD="p") == (
        "https://b:1", "eve", "", "p", pin)
    with pytest.raises(Refusal, match="TASKFARM_PASSWORD"):
        found(TASKFARM_USER="eve")
    assert taskfarm.find_access(environ, "https://c:2", "bob", "pw")[:4] == ("https://c:2", "bob", "", "pw")
    for url in ("https://", "ftp://x", "https://x:port", "https://[::1", "http://home:5000"):
        with pytest.raises(Refusal, match="looks like"):
            taskfarm.Client(lambda: taskfarm.find_access(environ, url)).ask("GET", "/livez")   # noqa: B023
    with pytest.raises(Refusal, match="looks like https://home:5000, not like 'http://home:5000'"):
        taskfarm.Client(lambda: taskfarm.find_access(environ, "http://home:5000")).ask("GET", "/livez")


@pytest.mark.parametrize("environ, sentence", [
    ({"TASKFARM_TOKEN": "tf1.x\r"}, "look at TASKFARM_TOKEN"),
    ({"TASKFARM_TOKEN": "tf1.\u20ac"}, "look at TASKFARM_TOKEN"),
    ({"TASKFARM_TOKEN": "tf1.x", "TASKFARM_URL": "{url}/\u00e9"}, "looks like https://host:5000"),
    ({"TASKFARM_USER": "ad\udcff", "TASKFARM_PASSWORD": "\udcff"}, "or the password is wrong"),
])
def test_what_cannot_be_sent_as_a_login_is_refused_in_a_sentence(shared_farm: Live, environ: Dict[str, str],
                                                                  sentence: str) -> None:
    known = dict({"TASKFARM_URL": "{url}", "TASKFARM_FINGERPRINT": as_ada(shared_farm)["TASKFARM_FINGERPRINT"]},
                 **environ)
    known = {name: value.replace("{url}", shared_farm.url) for name, value in known.items()}
    with contextlib.closing(taskfarm.Client(lambda: taskfarm.find_access(known))) as client:
        with pytest.raises((Refusal, FarmError), match=sentence):
            client.ask("GET", "/api/runs")


@pytest.mark.parametrize("answer", [
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[1]", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull",
    b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + b"[" * 99999, b"\0\xff\r\n\r\n", b"",
    b"HTTP/1.1 302 Found\r\nLocation: http://x/\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 404 No\r\nRetry-After: \xb2\r\nContent-Length: 4\r\n\r\nnull",
    b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 200000])
def test_what_is_no_answer_of_a_taskfarm_is_refused_as_such(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskfarm, "ANSWER_LIMIT", 1 << 17)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        def serve() -> None:
            client, context = listener.accept()[0], anothers()[1]
            with contextlib.suppress(OSError), context.wrap_socket(client, server_side=True) as sock:
                sock.recv(65536)
                sock.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        access = taskfarm.Access("https://127.0.0.1:%d" % listener.getsockname()[1], "", "tf1.x", "", anothers()[0], "",
                                 "the test")
        with contextlib.closing(taskfarm.Client(lambda: access)) as client:
            with pytest.raises(taskfarm.Unreachable, match="does not answer as a taskfarm"):
                client.ask("GET", "/api/runs")
        thread.join()


def test_an_ipv6_address_and_a_host_name_work(tmp_path: Path) -> None:
    for host in ("::1", "localhost") if os.path.exists("/proc/net/if_inet6") else ("localhost",):
        service = Service(str(tmp_path / "f"), host, 0)
        thread = threading.Thread(target=service.serve)
        thread.start()
        access = taskfarm.Access(service.url, "", "", "", service.certificate, "", "the test")
        assert taskfarm.farm_answers(access)
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
            with pytest.raises((Refusal, taskfarm.NotFound), match=sentence):
                taskfarm.find_run_uuid(client, text)


def test_a_run_is_changed_by_its_whole_name_or_eight_digits_alone(farm: Live) -> None:
    with contextlib.closing(taskfarm.Client(lambda: access_of(farm))) as client:
        def make(name: str) -> str:
            return str(client.ask("POST", "/api/run", {"numTasks": 1, "name": name})["uuid"])

        ice, final, *seas = make("ice"), make("ice-final"), make("sea"), make("sea")
        hidden = make(ice[:8])      # a name that another run's uuid begins with
        for text, meant in (("ice", ice), ("ice-final", final), (final, final), (final[:8].upper(), final)):
            assert taskfarm.find_run_uuid(client, text, changes=True) == meant
        for text, sentence in (("ice-", final), ("ice-fina", "'ice-final'"), (final[:7], final), ("land", "no run")):
            with pytest.raises(taskfarm.NotFound, match=sentence):
                taskfarm.find_run_uuid(client, text, changes=True)
        for text, several in (("sea", seas), (ice[:8], [hidden, ice])):
            with pytest.raises(Refusal, match="2 runs match.*type the uuid.*%s.*%s" % tuple(several)):
                taskfarm.find_run_uuid(client, text, changes=True)


@pytest.fixture
def library(farm: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The access file by which scripts find the farm."""
    path = tmp_path / "access.json"
    taskfarm.write_access(str(path), file_of(farm))
    monkeypatch.setenv("TASKFARM_ACCESS", str(path))
    return path


@pytest.mark.parametrize("published", [False] if QUICK else [True, False])
def test_a_script_for_the_published_client_runs_with_ours(farm: Live, published: bool, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    if published:
        import taskfarm_worker as module
    else:
        module = taskfarm
    login = ("ada", Live.PASSWORD)
    base = "http://127.0.0.1:%d/api/" % farm.port       # ours asks the same port by TLS
    taskfarm.write_access(str(tmp_path / "access.json"), file_of(farm))
    monkeypatch.setenv("TASKFARM_ACCESS", str(tmp_path / "access.json"))
    with pytest.raises(RuntimeError):
        module.TaskFarm("ada", "wrong", numTasks=1, url_base=base)
    with pytest.raises(RuntimeError):
        module.TaskFarm(*login, url_base=base)
    with pytest.raises(RuntimeError):
        module.TaskFarm(*login, "0" * 32, url_base=base)
    run = module.TaskFarm(*login, None, 4, base)
    assert (run.numTasks, run.numWaiting, run.numDone, run.numComputing, run.percentDone) == (4, 4, 0, 0, 0)
    assert [entry["uuid"] for entry in module.tfRuns(*login, base)] == [run.uuid]
    assert run.url("runs") == (base if published else farm.url + "/api/") + "runs" and run.info("")["uuid"] == run.uuid
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
    monkeypatch.setattr(taskfarm, "HEARTBEAT_S", 0.02)
    taskfarm.write_access(str(tmp_path / "access.json"), file_of(farm))
    run = taskfarm.TaskFarm(numTasks=3)
    worker = taskfarm.TaskFarmWorker(uuid=run.uuid)
    assert worker.task == 0
    path = "/api/worker/" + worker.worker_uuid
    first = farm.ask("GET", path)[1]
    assert first["lease"] == taskfarm.LEASE_S and first["held"] == 1
    wait_until(lambda: farm.ask("GET", path)[1]["heard"] > first["heard"])
    run.restart(everything=True)
    with pytest.raises(taskfarm.Conflict):
        worker.update(100)
    worker.done()           # of nothing: the task is not this worker's any more
    assert worker.task == 0
    worker.close()
    assert farm.ask("GET", path)[1]["state"] == "signed off" and run.numWaiting == 3
    second = taskfarm.TaskFarmWorker(uuid=run.uuid)
    assert second.task == 0
    path = "/api/worker/" + second.worker_uuid
    del second
    assert wait_until(lambda: farm.ask("GET", path)[1]["state"]) == "signed off"


def test_a_result_is_not_lost_in_an_outage(farm: Live, library: Path) -> None:
    worker = taskfarm.TaskFarmWorker(uuid=taskfarm.TaskFarm(numTasks=2).uuid)
    assert worker.task == 0
    worker.update(100)
    farm.stop()
    worker._client.retry_s = 0.1
    with pytest.raises(taskfarm.Unreachable):
        worker.done()
    farm.local = threading.local()
    farm.start()
    taskfarm.write_access(str(library), file_of(farm))
    assert worker.task == 0
    worker.done()
    assert worker.numDone == 1 and worker.task == 1
    worker.close()


def test_a_task_can_be_reported_failed(farm: Live, library: Path) -> None:
    run = taskfarm.TaskFarm(numTasks=1, name="ice", maxFailures=2)
    assert (run.info("")["name"], run.info("")["maxFailures"]) == ("ice", 2)
    worker = taskfarm.TaskFarmWorker(uuid="ice")
    worker.fail("there is no task yet")
    assert worker.uuid == run.uuid and worker.task == 0
    worker.fail("all clouds\x1b", exitCode=3)
    assert run.getTaskInfo(0, "status") == "waiting" and worker.task == 0
    assert [run.getTaskInfo(0, "")[field] for field in ("exitCode", "message")] == [3, "all clouds?"]
    worker.fail()
    assert worker.task is None and run.getTaskInfo(0, "status") == "failed"
    worker.close()
    with pytest.raises(RuntimeError, match=r"TaskFarmWorker\(uuid=run.uuid\)"):
        taskfarm.TaskFarmWorker()


@pytest.mark.parametrize("error, message", [
    (ValueError("all clouds"), "ValueError: all clouds"), (KeyboardInterrupt(), None), (SystemExit(1), None),
    (taskfarm.Unreachable("it is away"), None)])
def test_an_exception_fails_the_task(farm: Live, library: Path, tmp_path: Path, error: BaseException,
                                     message: Optional[str]) -> None:
    run = taskfarm.TaskFarm(numTasks=2)
    script = tmp_path / "script.py"
    script.write_text("import taskfarm\nworker = taskfarm.TaskFarmWorker(uuid=%r)\nfor task in worker.tasks:\n"
                      "    raise %s%r\n" % (run.uuid, "taskfarm." * isinstance(error, taskfarm.Unreachable), error))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60,
                          env=dict(os.environ, PYTHONPATH=str(HERE)))
    assert done.returncode and run.numComputing == 0
    with pytest.raises(type(error)), taskfarm.TaskFarmWorker(uuid=run.uuid) as worker:
        assert worker.task == (0 if message is None else 1)
        raise error
    assert farm.ask("GET", "/api/worker/" + worker.worker_uuid)[1]["state"] == "signed off"
    assert run.numWaiting == (2 if message is None else 0)
    assert [run.getTaskInfo(task, "")["message"] for task in (0, 1)] == [message] * 2


@pytest.mark.parametrize("published, login", [
    *([] if QUICK else [(True, ("ada", Live.PASSWORD))]), (False, ("ada", Live.PASSWORD)), (False, (None, None))])
def test_a_worker_can_be_pickled(farm: Live, library: Path, published: bool, login: Any) -> None:
    if published:
        import taskfarm_worker as module
    else:
        module = taskfarm
    base = None if login[0] is None else "http://127.0.0.1:%d/api/" % farm.port
    worker = module.TaskFarmWorker(*login, module.TaskFarm(*login, None, 2, base).uuid, base)
    assert worker.task == 0
    content = pickle.dumps(worker)
    assert Live.PASSWORD.encode() not in content
    copy = pickle.loads(content)
    assert (copy.worker_uuid, copy.uuid, copy.numTasks, copy.task) == (worker.worker_uuid, worker.uuid, 2, 0)
    copy.update(100)
    copy.done()
    assert worker.numDone == 1 and copy.task == 1
    if not published:
        copy.close()
        assert worker.numComputing == 1, "the lease is of the first"
        worker.close()
        assert copy.numWaiting == 1


def test_a_star_imports_the_names_of_the_published_client_and_what_they_raise() -> None:
    assert {"tfRuns", "TaskFarm", "TaskFarmWorker", "Conflict", "Unreachable"} < set(taskfarm.__all__)
    assert all(isinstance(getattr(taskfarm, name), (type, types.FunctionType)) for name in taskfarm.__all__)


# ---------------------------------------------------------------- COMMANDS

class Work:
    """`work` as a process of its own, on a farm that is a process too; what it writes comes from files."""
    all: List["Work"] = []

    def __init__(self, server: Process, *words: str, tweak: str = "", **environ: str) -> None:
        self.server = server
        self.output_file = tempfile.TemporaryFile("w+")      # noqa: SIM115
        self.error_file = tempfile.TemporaryFile("w+")      # noqa: SIM115
        start = [str(MODULE)] if not tweak else [
            "-c", "import sys; sys.path.insert(0, %r); import taskfarm; %s; sys.exit(taskfarm.main())" % (
                str(HERE), tweak)]
        self.process = subprocess.Popen(
            [sys.executable, *start, "work", *words], text=True, stdout=self.output_file, stderr=self.error_file,
            stdin=subprocess.DEVNULL, env=dict(os.environ, HOME=server.home, **environ),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # a shell's background ignores it
        self.all.append(self)

    def shown(self) -> str:
        """Its own lines, and the error output of its commands."""
        self.error_file.seek(0)
        return as_in_readme(self.error_file.read())

    def printed(self) -> str:
        """What its commands printed."""
        self.output_file.seek(0)
        return as_in_readme(self.output_file.read())

    def end(self, status: int, number: int = 0) -> str:
        """Its lines, once it has ended, by a signal or of its own; with that status."""
        if number:
            self.process.send_signal(number)
        try:
            assert self.process.wait(40) == status, self.shown() + self.printed()
        finally:
            self.process.kill()
            self.process.wait()
        return self.shown()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    served = Process(str(tmp_path / "f"))
    yield served
    while Work.all:
        work = Work.all.pop()
        work.process.kill()         # with its commands
        work.process.wait()
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


def stubborn(folder: Path) -> Tuple[str, ...]:
    """A command that leaves its process ids in a folder, and that only SIGKILL ends."""
    return "sh", "-c", "trap '' TERM; sleep 1000 & touch %s/$$ %s/$!; wait; sleep 1000" % (folder, folder)


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


@given(st.lists(st.lists(st.text(st.characters(blacklist_characters="\r\n\0", max_codepoint=0xd7ff)),
                         min_size=3, max_size=3), max_size=9), st.sampled_from(",\t;"), st.booleans())
def test_rows_of_a_table_are_what_a_spreadsheet_wrote(rows: List[List[str]], separator: str, mark: bool) -> None:
    with tempfile.NamedTemporaryFile("w", encoding="utf-8-sig" if mark else "utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([["learning rate", "seed", ""], *rows])
        file.flush()
        table = taskfarm.TableRows(file.name)
        assert table.names == ("learning rate", "seed") and len(table) == len(rows) and table.check() == ""
        assert [list(table.values(task).values()) for task in range(len(rows))] == rows


@pytest.mark.parametrize("text, sentence", [
    ("", "has no head"), ("\n1\n", "has no head"), ("a,a\n", "name a comes twice"),
    ("a,task\n", "has a {task} of its own"),
    ("a,b\n1\n", "line 2 of .* has 1 field, and the head has 2"), ("a,b\n1,2\n\n", "line 3 of .* has 0 fields"),
    ('a,b\n1,"x\ny"\n', "line 2 of .* cannot be read"), ('a,b\n1,"x"y\n', "line 2 of .* cannot be read")])
def test_a_table_that_is_none_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(taskfarm.Refusal, match=sentence):
        taskfarm.TableRows(str(tmp_path / "t.csv")).check()


@pytest.mark.parametrize("text, values", [
    ("a,b", "a b"), ("5", "5"), ("0..3", "0 1 2 3"), ("3..1", "3 2 1"), ("-1..1", "-1 0 1"), ("0..7..3", "0 3 6"),
    ("9..0..-4", "9 5 1"), ("0..1..0.25", "0 0.25 0.5 0.75 1"), ("0.1..0.3..0.1", "0.1 0.2 0.3"),
    ("90..110..10", "90 100 110"), ("008..011", "008 009 010 011"), ("x,1..2,7,../data,a..c", "x 1 2 7 ../data a..c")])
def test_values_of_an_axis(text: str, values: str) -> None:
    grid = taskfarm.Grid(["x=" + text])
    assert [grid.values(task)["x"] for task in range(len(grid))] == values.split()


def test_a_grid_is_the_product_of_its_axes_and_the_last_varies_fastest() -> None:
    grid = taskfarm.Grid(["lr=0.1,0.01", "model=a=b,", "seed=0..4,10..19"])
    wanted = itertools.product(("0.1", "0.01"), ("a=b", ""), map(str, [*range(5), *range(10, 20)]))
    assert [tuple(grid.values(task).values()) for task in range(len(grid))] == list(wanted)
    large = taskfarm.Grid(["a=0..1999999999"])
    assert len(large) == 2 * 10 ** 9 and large.values(1999999999) == {"a": "1999999999"}


@pytest.mark.parametrize("axes, sentence", [
    (["lr"], "looks like"), (["lr="], "looks like"), (["=1"], "looks like"), (["a=1", "a=2"], "name a comes twice"),
    (["slot=1"], "a {slot} of its own"), (["a=1..3..0"], "does not lead"), (["a=1..3..-1"], "does not lead"),
    (["a=0..99999", "b=0..99999"], "10000000000 combinations")])
def test_a_grid_that_is_none_is_refused(axes: List[str], sentence: str) -> None:
    with pytest.raises(taskfarm.Refusal, match=sentence):
        taskfarm.Grid(axes)


LR = taskfarm.Grid(["lr=1,2", "seed=7"])


@pytest.mark.parametrize("words, parameters, filled", [
    ("{task}|{run}|{attempt}|{slot}|-{task}{task}-", None, "1|r|2|3|-11-"),
    ("{lr}|{seed}|{task}", LR, "2|7|1"),
    ("{}|--seed={}", None, "1|--seed=1"),
    ("{}|{task}", None, "{}|1"), ("{}|{lr}", LR, "{}|2"), ("{}", LR, "1"),
    ("TASKFARM_TASK {}", None, "TASKFARM_TASK {}"),
    ("{{task}}|{{}}|{}", None, "{task}|{}|1"), ("{{taks}}|{task}", None, "{taks}|1"), ("{{json}}", None, "{{json}}"),
    ("${task}|${x}|{task}", None, "${task}|${x}|1"), ("{print $1}|{a: {}}|{task:3}", LR, "{print $1}|{a: 1}|{task:3}"),
    ("{{line}}", None, "{line}")])
def test_fields_of_a_command(words: str, parameters: Any, filled: str) -> None:
    template = taskfarm.Template(["echo", *words.split("|")], "r", parameters)
    assert [word.decode() for word in template.arguments(1, 2, 3)[1:]] == filled.split("|")


def test_a_command_that_is_one_parameter_is_run_by_sh(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("echo a b\n")
    lines = taskfarm.Lines(str(tmp_path / "lines"))
    for word, parameters in (("{line}", lines), ("{}", lines), ("{do}", taskfarm.Grid(["do=echo a b"]))):
        assert taskfarm.Template([word], "r", parameters).arguments(0, 1) == [b"/bin/sh", b"-c", b"echo a b"]


@pytest.mark.parametrize("words, parameters, sentence", [
    ("{taks}", None, "no field {taks}, but there are {task}, {run}, {attempt}, {slot} .*{{taks}} stands for"),
    ("x{TASK}", None, "no field {TASK}"), ("sh -c {lines}", None, "no field {lines}"), ("{line}", None, "--lines FILE"),
    ("{sed}", LR, "no field {sed}, but there are .*{seed}")])
def test_a_misspelt_field_is_refused(words: str, parameters: Any, sentence: str) -> None:
    with pytest.raises(taskfarm.Refusal, match=sentence):
        taskfarm.Template(["echo", *words.split()], "r", parameters)


def test_a_command_that_is_the_same_for_every_task_is_warned_of(tmp_path: Path) -> None:
    for name, text in (("reads", "echo $TASKFARM_TASK"), ("does_not", "echo task")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for words, parameters, warned in (
            (["echo", "{task}"], None, ""), (["echo", "{}"], None, ""), (["echo", "{slot}"], None, "has no {task}"),
            (["echo", "task"], None, "has no {task} and does not seem to read TASKFARM_TASK: each of the 9 tasks"),
            (["sh", "-c", "echo $TASKFARM_TASK"], None, ""), ([str(tmp_path / "reads")], None, ""),
            (["sh", str(tmp_path / "reads")], None, ""), ([str(tmp_path / "does_not")], None, "has no {task}"),
            (["echo", "{task}"], LR, "has no {lr} or {seed}: "), (["echo", "{lr}"], LR, ""),
            (["echo", "{other}", "{task}"], None, "{other} is no field"),
            (["awk", "{ print; } {other}", "{task}"], None, "")):
        template = taskfarm.Template(words, "r", parameters)
        sentences = template.warnings(9)
        assert warned in "".join(sentences) and bool(warned) == bool(sentences), words
        assert parameters or not template.warnings(1) or "other" in warned
    assert "csh" in taskfarm.Template(["echo", "task"], "r").warnings(2)[0]


@pytest.mark.parametrize("environ, jobs, each, slots", [
    ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4, 1, ["0", "1", "2", "3"]),
    ({"CUDA_VISIBLE_DEVICES": "4,GPU-a,6,7,-1"}, 2, 2, ["4,GPU-a", "6,7"]),
    ({"SLURM_JOB_GPUS": "2,5"}, 2, 1, ["2", "5"]),
    ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_JOB_GPUS": "2,5"}, 1, 1, ["0"]),
    ({"CUDA_VISIBLE_DEVICES": "0,1"}, 3, 1, "-j 3 with --gpus-per-task 1 needs 3 GPUs, and there are 2 .*: use -j 2"),
    ({"CUDA_VISIBLE_DEVICES": "0"}, 1, 2, "use --gpus-per-task 1"),
    ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 1, 1, "there are 0 .*NoDevFiles.*--gres"),
    ({"CUDA_VISIBLE_DEVICES": "0,1", "ROCR_VISIBLE_DEVICES": "0"}, 2, 1, "use -j 1")])
def test_gpus_are_shared_out_among_the_slots(environ: Dict[str, str], jobs: int, each: int, slots: Any) -> None:
    if isinstance(slots, str):
        with pytest.raises(taskfarm.Refusal, match=slots):
            taskfarm.share_gpus(environ, jobs, each)
    else:
        assert taskfarm.share_gpus(environ, jobs, each) == [{"CUDA_VISIBLE_DEVICES": gpus} for gpus in slots]


def test_gpus_of_hip_are_numbered_among_those_that_rocr_leaves() -> None:
    amd = {"ROCR_VISIBLE_DEVICES": "4,5,6,7"}
    assert taskfarm.share_gpus(amd, 2, 2)[1] == {"ROCR_VISIBLE_DEVICES": "6,7"}
    assert taskfarm.share_gpus({"HIP_VISIBLE_DEVICES": "4,5"}, 2, 1)[1] == {"HIP_VISIBLE_DEVICES": "5"}
    assert taskfarm.share_gpus(dict(amd, CUDA_VISIBLE_DEVICES="0,1,2,3"), 2, 2)[1] == {
        "ROCR_VISIBLE_DEVICES": "6,7", "CUDA_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "0,1"}


def test_commands_of_a_grid_have_a_slot_and_gpus_of_their_own(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 6)
    grid = ("--grid", "lr=0.1,0.01", "--grid", "seed=1..3")
    began = tmp_path / "began"
    began.mkdir()
    show = ("echo {lr} {seed} {slot} $TASKFARM_SLOT $CUDA_VISIBLE_DEVICES; : > %s/{task}; "
            "until [ -e %s/1 ]; do sleep 0.05; done" % (began, began))      # the first two run at the same time
    Work(server, run, "-j", "2", "--gpus-per-task", "2", *grid, "--log-dir", str(tmp_path / "logs"), "--", "sh", "-c",
         show, CUDA_VISIBLE_DEVICES="3,2,1,0").end(0)
    shown = [(tmp_path / "logs" / ("%d.log" % task)).read_text().split() for task in range(6)]
    assert [" ".join(words[:2]) for words in shown] == ["0.1 1", "0.1 2", "0.1 3", "0.01 1", "0.01 2", "0.01 3"]
    assert {tuple(words[2:]) for words in shown} == {("0", "0", "3,2"), ("1", "1", "1,0")}


def test_a_dry_run_prints_what_can_be_pasted_and_claims_nothing(server: Process, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("name,n\n\"it's, a\",1\n" + "b,2\n" * 6)
    run, words = new_run(server, 7), ("--table", str(tmp_path / "t.csv"), "--", "echo", "{name}", "<{n}>")
    done = run_verb("work", run, "--dry-run", *words, HOME=server.home)
    assert done.returncode == 0 and counts(server, run) == (7, 0, 0, 0) and done.stderr == ""
    assert done.stdout.splitlines()[0] == "# task 0: name=it's, a n=1" and done.stdout.endswith("# and 2 more\n")
    assert subprocess.check_output(["sh"], input=done.stdout, text=True) == "it's, a <1>\n" + "b <2>\n" * 4
    done = run_verb("work", run, "--dry-run", "-j", "2", "--gpus-per-task", "1", "--", "sh", "-c",
                    "echo $TASKFARM_TASK $CUDA_VISIBLE_DEVICES", HOME=server.home, CUDA_VISIBLE_DEVICES="4,5")
    assert subprocess.check_output(["sh"], input=done.stdout, text=True) == "0 4\n1 5\n2 4\n3 5\n4 4\n"


def test_without_two_dashes_options_of_the_command_are_refused_with_what_to_type(server: Process) -> None:
    run = new_run(server, 2)
    for words in (["-j", "2", "sh", "-c", "exit 0 {task}"], ["--lines", "-", "sh", "-c", ": {line}", "-j", "2"]):
        done = run_verb("work", run, *words, HOME=server.home)
        assert done.returncode == 2 and counts(server, run) == (2, 0, 0, 0)
        better = done.stderr.strip().rpartition("of work: ")[2].replace("taskfarm.py", str(MODULE))
        assert subprocess.run(["sh", "-c", better], env=dict(os.environ, HOME=server.home), input=b"1\n2\n"
                              ).returncode == 0
        assert counts(server, run) == (0, 0, 2, 0)
        server.ask("POST", "/api/runs/%s/restart?all=True" % run)
    Work(server, run, "-j", "2", "sleep", "0.{task}").end(0)


def test_what_a_command_is_given(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 3)
    lines = tmp_path / "lines"
    lines.write_bytes(b"a b; exit 1\r\n'\"$HOME {task}\n\xff")
    show = tmp_path / "show.py"
    show.write_text("import json, os, sys\nprint(json.dumps([sys.argv[1:], {n: v for n, v in os.environ.items() if "
                    "n.startswith('TASKFARM')}, sys.stdin.read(), os.getsid(0) == os.getpgid(0) == os.getpid()]))\n")
    Work(server, run[:8], "--lines", str(lines), "--log-dir", str(tmp_path / "logs"), "--", sys.executable, str(show),
         "{task}/{attempt}", "--", "{run}", "<{line}>", "{other}", "--jobs").end(0)
    words = ["a b; exit 1", "'\"$HOME {task}", "\udcff"]
    for task in range(3):
        argv, environ, stdin, leads = json.loads((tmp_path / "logs" / ("%d.log" % task)).read_text())
        assert argv == ["%d/1" % task, "--", run, "<%s>" % words[task], "{other}", "--jobs"] and stdin == "" and leads
        assert environ.pop("TASKFARM_WORKER") == task_of(server, run, task)["worker"]
        progress = Path(environ.pop("TASKFARM_PROGRESS"))
        assert progress.name == "%d.1" % task and not progress.parent.exists(), "removed at the end"
        assert environ.pop("TASKFARM_FARM") and environ == {
            "TASKFARM_TASK": str(task), "TASKFARM_RUN": run, "TASKFARM_ATTEMPT": "1",
            "TASKFARM_SLOT": "0"}, "no secret, and no address"


def test_a_login_of_the_workers_environment_is_not_handed_on_to_commands(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 1)
    access = json.loads(Path(server.home, ".config/taskfarm/access.json").read_text())
    command = "env > %s/env; %s %s list 2> %s/said; true" % (tmp_path, sys.executable, MODULE, tmp_path)
    Work(server, run, "--", "sh", "-c", command, TASKFARM_ACCESS=str(tmp_path / "none"), TASKFARM_URL=access["url"],
         TASKFARM_TOKEN=access["token"], TASKFARM_FINGERPRINT=taskfarm.fingerprint(access["certificate"])).end(0)
    environ = (tmp_path / "env").read_text()
    assert "TASKFARM_RUN=" + run in environ and "TASKFARM_TOKEN" not in environ and access["token"] not in environ
    assert "there is no login" in (tmp_path / "said").read_text()
    known = {"TASKFARM_TOKEN": "tf1.x", "TASKFARM_USER": "ada", "TASKFARM_PASSWORD": "sesame", "TASKFARM_DB": "f"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in known.items():
            patch.setenv(name, value)
        given = taskfarm.command_environment(taskfarm.parse_access({}, ""), run, "w")
    assert given[b"TASKFARM_DB"] == b"f" and not set(given) & {name.encode() for name in list(known)[:3]}


def test_a_file_of_commands_is_a_run(server: Process, tmp_path: Path) -> None:
    (tmp_path / "commands").write_text("echo one > %s/1 && true\n\nexit 4\n" % tmp_path)
    run = new_run(server, 3)
    Work(server, run, "--lines", str(tmp_path / "commands"), "--", "{line}").end(3)
    assert (tmp_path / "1").read_text() == "one\n"
    assert [task_of(server, run, task)["status"] for task in range(3)] == ["done", "done", "failed"]
    assert task_of(server, run, 2)["exitCode"] == 4


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_worker_whose_standard_streams_are_closed_works(server: Process, tmp_path: Path, closed: str) -> None:
    run = new_run(server, 2)
    done = subprocess.run(
        ["sh", "-c", '"$@" ' + closed, "sh", sys.executable, str(MODULE), "work", run, "--log-dir", str(tmp_path / "l"),
         "--", "sh", "-c", "cat; echo out; echo {task} >&2; exit {task}"], env=dict(os.environ, HOME=server.home),
        stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 3 and counts(server, run) == (0, 0, 1, 1)
    assert task_of(server, run, 1)["message"] == "1"
    assert sorted((tmp_path / "l" / "1.log").read_text().split()) == ["1", "out"]


@pytest.mark.parametrize("words, sentence", [
    (["{run}", "--", "no-such-program"], "there is no program no-such-program"),
    (["{run}", "-j", "2", "--", "./tile.sh {task}"], " work {run} -j 2 -- ./tile.sh {task}\n"),
    (["{run}", "./tile.sh  -v {task}"], " work {run} -- ./tile.sh -v {task}\n"),
    (["{run}", "--", "./tile.sh -v", "a b"], " work {run} -- ./tile.sh -v 'a b'\n"),
    (["{run}", "--", "cd {dir} && ./tile.sh '{task}'"], """ -- sh -c 'cd {dir} && ./tile.sh '"'"'{task}'"'"''\n"""),
    (["{run}", "--", "A=1 ./tile.sh {task}"], " -- sh -c 'A=1 ./tile.sh {task}'\n"),
    (["{run}", "--", "echo", "{line}"], "--lines FILE"),
    (["{run}", "--lines", "{dir}/two", "--", "echo", "{line}"], "has 2 lines, and the run 3 tasks"),
    (["{run}", "--lines", "{dir}/none", "--", "echo", "{line}"], "cannot be read"),
    (["{run}", "--grid", "a=1 2,3", "--", "echo", "{a}"], "taskfarm.py new --grid 'a=1 2,3'\n"),
    (["{run}", "--", "echo", "{taks}"], "there is no field {taks}"),
    (["{run}", "-j", "2", "--gpus-per-task", "8192", "--", "echo", "{task}"], "needs 16 384 GPUs"),
    (["{run}", "--log-dir", "{dir}/two/logs", "--", "true"], "cannot be made"),
])
def test_a_worker_that_cannot_work_says_so_and_takes_nothing(server: Process, tmp_path: Path, words: List[str],
                                                             sentence: str) -> None:
    (tmp_path / "two").write_text("1\n2\n")
    run = new_run(server, 3)
    work = Work(server, *(word.replace("{run}", run).replace("{dir}", str(tmp_path)) for word in words))
    work.end(1)
    sentence = sentence.replace("{run}", run).replace("{dir}", str(tmp_path))
    *before, last = work.shown().splitlines()
    assert sentence in last + "\n" and len(before) == ("each of the 3" in work.shown())
    assert counts(server, run) == (3, 0, 0, 0)


def test_what_to_type_instead_can_be_typed(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 2)
    script = tmp_path / "tile.sh"
    script.write_text("echo $1 >> %s/ran\n" % tmp_path)
    script.chmod(0o755)
    for quoted in ("%s {task}" % script, "%s {task} > %s/out; exit 0" % (script, tmp_path)):
        refused = run_verb("work", run, "--", quoted, HOME=server.home)
        assert refused.returncode == 1 and counts(server, run) == (2, 0, 0, 0)
        better = refused.stderr.strip().partition("type it like this: ")[2]
        assert subprocess.run(["sh", "-c", better], env=dict(os.environ, HOME=server.home)).returncode == 0
        assert counts(server, run) == (0, 0, 2, 0) and (tmp_path / "ran").read_text() == "0\n1\n"
        (tmp_path / "ran").unlink()
        server.ask("POST", "/api/runs/%s/restart?all=True" % run)


def test_a_program_may_have_a_space_in_its_name(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 3)
    for task in range(3):
        (tmp_path / ("my tile %d" % task)).write_text("exit %d\n" % (task == 2))
        (tmp_path / ("my tile %d" % task)).chmod(0o755)
    Work(server, run, "--", str(tmp_path / "my tile {task}")).end(3)
    assert counts(server, run) == (0, 0, 2, 1)


@pytest.mark.parametrize("content", [
    b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xff\xff" + bytes(100),         # of no machine there is
    b"MZ\x90\0echo\nexit 0\n"])
def test_a_program_of_another_machine_fails_no_task(server: Process, tmp_path: Path, content: bytes) -> None:
    run = new_run(server, 50)
    program = tmp_path / "simulate"
    program.write_bytes(content)
    program.chmod(0o755)
    output = Work(server, run, "-j", "4", "--", str(program), "{task}").end(1)
    assert "simulate is no program for this machine (%s, " % socket.gethostname() in output
    assert counts(server, run) == (50, 0, 0, 0)
    script = tmp_path / "script"        # its interpreter is such a program, and sh must not read it either
    script.write_text("#!%s\nexit 0\n" % program)
    script.chmod(0o755)
    Work(server, run, "-j", "4", "--", str(script), "{task}").end(1)
    assert counts(server, run) == (50, 0, 0, 0)
    (tmp_path / "lines").write_text(str(program) + "\n" + "true\n" * 49)
    Work(server, run, "--lines", str(tmp_path / "lines"), "--", "{line}", "x").end(3)
    assert counts(server, run) == (0, 0, 49, 1) and task_of(server, run, 0)["exitCode"] == 126


def test_a_file_of_lines_that_changes_fails_no_task(server: Process, tmp_path: Path) -> None:
    run, lines = new_run(server, 3), tmp_path / "lines"
    for change in ("printf 'c\nb\na\n' > {0}", "cp -p {0} {0}.new; mv {0}.new {0}", "rm {0}", "truncate -s 3 {0}"):
        lines.write_text("a\nb\nc\n")
        work = Work(server, run, "--lines", str(lines), "--", "sh", "-c", change.format(lines) + "; : {line}")
        assert "lines was changed, replaced or removed" in work.end(1) and work.printed() == "", change
        assert counts(server, run) == (2, 0, 1, 0)
        server.ask("POST", "/api/runs/%s/restart?all=True" % run)


def test_parameters_are_found_again_until_their_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.setenv("PWD", str(link))
    Path("t.csv").write_text("a,b\n1,2\n3,4\n")
    for parameters, text in ((taskfarm.Lines("./t.csv"), "1,2"), (taskfarm.TableRows("t.csv"), "a=3 b=4"),
                             (taskfarm.Grid(["x=1,2", "y=a"]), "x=2 y=a")):
        kept = json.loads(json.dumps(parameters.kept()))
        assert kept.get("path", str(link / "t.csv")) == str(link / "t.csv"), "the shell's name of this folder"
        again = taskfarm.parameters_again(kept)
        assert again and type(again) is type(parameters) and again.text(1) == text
    kept = taskfarm.Lines("t.csv").kept()
    for change in ("a,b\n1,2\n3,5\n", "a,b\n1,2\n3,4\n\n", ""):
        Path("t.csv").write_text(change)
        with pytest.raises(Refusal, match="t.csv has changed .* had 12 bytes"):
            taskfarm.parameters_again(kept)
    Path("t.csv").unlink()
    with pytest.raises(Refusal, match="t.csv, which has .* cannot be read"):
        taskfarm.parameters_again(kept)
    os.mkfifo("t.csv")
    with pytest.raises(Refusal, match="has changed"):
        taskfarm.parameters_again(dict(kept, size=0))
    monkeypatch.setenv("PWD", "/")
    assert taskfarm.current_folder() == os.path.realpath(tmp_path), "a PWD that is not true is not believed"
    reader, writer = os.pipe()
    os.write(writer, b"x\n")
    os.close(writer)
    for path in ("/dev/fd/%d" % reader, "/dev/null"):
        with pytest.raises(Refusal, match="cannot be read again by workers"):
            taskfarm.Lines(path).kept()
    os.close(reader)


def test_lines_whose_file_handle_is_stale_are_refused_and_others_errors_are_for_later(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("a\n")
    lines = taskfarm.Lines(str(tmp_path / "lines"))

    class Broken:
        error = errno.ESTALE        # as on NFS, where another node has replaced the file

        def seek(self, _: int) -> None:
            raise OSError(self.error, "")
    lines.file = Broken()
    with pytest.raises(taskfarm.Refusal, match="replaced"):
        lines[0]
    Broken.error = errno.EIO
    with pytest.raises(OSError):
        lines[0]


def test_a_log_that_cannot_be_written_fails_no_task(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 3)
    (tmp_path / "logs" / "1.log").mkdir(parents=True)
    assert "1.log cannot be written" in Work(server, run, "--log-dir", str(tmp_path / "logs"), "--", "true").end(1)
    assert counts(server, run) == (2, 0, 1, 0)
    (tmp_path / "logs" / "1.log").rmdir()
    other = tmp_path / "other"
    other.write_text("precious")
    for attempt, lay in enumerate((lambda log: log.symlink_to(other), os.mkfifo), 2):      # as somebody else could have
        lay(tmp_path / "logs" / ("1.%d.log" % attempt))
        Work(server, run, "--log-dir", str(tmp_path / "logs"), "--", "echo", "{task}").end(1)
        assert other.read_text() == "precious" and task_of(server, run, 1)["status"] == "waiting"


def test_both_streams_go_into_one_file_for_each_attempt(server: Process, tmp_path: Path) -> None:
    run, logs = new_run(server, 2, maxFailures=2), tmp_path / "logs"
    Work(server, run, "--log-dir", str(logs), "--", "sh", "-c", "echo a{attempt}; echo b >&2; echo c; "
         "printf '\\033d\\n\\n'; [ {task} = 0 ] || exit {attempt}; "
         "(until [ -e %s/go ]; do sleep 0.01; done; echo late; echo later) &" % tmp_path).end(3)
    (tmp_path / "go").touch()       # what was left behind is not killed by SIGPIPE
    wait_until(lambda: (logs / "0.log").read_text() == "a1\nb\nc\n\033d\n\nlate\nlater\n")
    assert [(logs / name).read_text() for name in ("1.log", "1.2.log")] == [
        "a%d\nb\nc\n\033d\n\n" % attempt for attempt in (1, 2)]
    assert task_of(server, run, 1)["message"] == " d", "the last line of the file"


def test_two_runs_do_not_share_a_folder_of_logs(server: Process, tmp_path: Path) -> None:
    one, two, logs = new_run(server, 1), new_run(server, 1), str(tmp_path / "logs")
    for _ in range(2):
        Work(server, one, "--log-dir", logs, "--", "true").end(0)
    refused = Work(server, two, "--log-dir", logs, "--", "true")
    refused.end(1)
    assert "has the logs of run " + one in refused.shown() and counts(server, two) == (1, 0, 0, 0)


def test_what_each_command_used_is_reported_with_its_end(server: Process, tmp_path: Path) -> None:
    (tmp_path / "commands").write_text("\n".join([
        "%s -c 'x = bytearray(150 << 20)'; exit 4" % sys.executable,
        "%s -c 'while __import__(\"time\").process_time() < 0.3: pass' & wait $!" % sys.executable, "true"]))
    run = new_run(server, 3)
    Work(server, run, "-j", "3", "--lines", str(tmp_path / "commands"), "--log-dir", str(tmp_path / "logs"), "--",
         "{line}").end(3)
    large, busy, small = (task_of(server, run, number) for number in range(3))
    assert 150 << 20 <= large["memory"] < 300 << 20 and large["log"] == str(tmp_path / "logs" / "0.log")
    assert 0.3 <= busy["cpu"] < 3 and busy["log"] is None, "also of the child that a shell has waited for"
    assert small["memory"] < 150 << 20 and small["cpu"] < 0.3


def test_a_command_that_was_killed_for_want_of_memory_is_told_apart(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's files, of both versions of control groups, as cgroups(7) and the kernel's memory.txt have them."""
    (tmp_path / "memory" / "job").mkdir(parents=True)
    (tmp_path / "job").mkdir()
    find = taskfarm.memory_events.__wrapped__
    old, new = tmp_path / "memory/job/memory.oom_control", tmp_path / "job/memory.events"
    new.write_text("low 0\nhigh 0\nmax 31\noom 4\noom_kill 7\noom_group_kill 0\n")
    groups = tmp_path / "cgroup"
    for text, file in (("0::/job\n", new), ("4:memory:/job\n1:cpu:/\n0::/\n", old)):
        groups.write_text(text)
        old.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n")
        with open(find(str(groups), str(tmp_path)), "rb") as events:
            monkeypatch.setattr(taskfarm, "memory_events", events.fileno)
            command = taskfarm.Command(0, 1, 0, 0.0)
            assert command.kills_before == 7
            for kills in (7, 8):
                file.write_text(file.read_text().replace("oom_kill 7", "oom_kill %d" % kills))
                for status, killed in ((signal.SIGKILL, True), (137 << 8, True), (1 << 8, False),
                                       (signal.SIGTERM, False)):
                    command.status = int(status)
                    assert command.ran_out_of_memory == (killed and kills == 8), "else somebody else killed it"
    assert find(str(tmp_path / "none")) == -1
    monkeypatch.setattr(taskfarm, "memory_events", lambda: -1)
    assert taskfarm.count_memory_kills() == 0


def test_a_failure_for_want_of_memory_says_so(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 2)
    (tmp_path / "commands").write_text("kill -KILL $$\nsh -c 'kill -KILL $$'; exit $?\n")
    work = Work(server, run, "--lines", str(tmp_path / "commands"), "--", "{line}", tweak="kills = iter(range(99)); "
                "taskfarm.count_memory_kills = lambda: next(kills)")
    work.end(3)
    for number, beginning in ((0, "killed by SIGKILL"), (1, "exit status 137")):
        found = task_of(server, run, number)
        assert found["exitCode"] == 137 and re.fullmatch(
            re.escape(beginning) + r" \(out of memory: peak [0-9.]+ MB\)(: Killed)?", found["message"]), found


def test_each_way_to_fail_is_kept(server: Process, tmp_path: Path) -> None:
    (tmp_path / "commands").write_text("\n".join([
        "printf 'first\\nlast \\033[1mline\\n\\n' >&2; exit 200", "kill -SEGV $$", "echo before >&2; sleep 1000",
        "sh -c 'trap \"\" TERM; timeout 1000 sleep 1000' & echo $! > %s/left; echo short >&2; exit 5" % tmp_path,
        "sleep 1000 & echo $! > %s/daemon" % tmp_path]))
    run = new_run(server, 5)
    work = Work(server, run, "-j", "4", "--timeout", "1", "--grace", "0.1", "--lines", str(tmp_path / "commands"),
                "--", "{line}")
    work.end(3)
    shown = [(task["exitCode"], task["message"]) for task in (task_of(server, run, number) for number in range(4))]
    assert shown == [(200, "last  [1mline"), (139, "killed by SIGSEGV"), (124, "ended after 1 s (--timeout): before"),
                     (5, "short")]
    assert "first\nlast" in work.shown(), "the error output is passed on"
    assert not alive(int((tmp_path / "left").read_text())), "what a failed command leaves behind is ended"
    os.kill(int((tmp_path / "daemon").read_text()), signal.SIGKILL)     # the daemon of one that did well is not ours


def session_of(pid: int) -> List[int]:
    """The processes of its session that run."""
    found = []
    for path in Path("/proc").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):    # it has ended meanwhile
            if path.name.isdigit() and alive(int(path.name)) and os.getsid(int(path.name)) == pid:
                found.append(int(path.name))
    return found


@pytest.mark.parametrize("words", [
    None, ["env", "-i", "/bin/sh", "-c", "touch {dir}/$$; sleep 1000"],     # a container has another environment, too
    ["sh", "-c", "timeout 1000 sh -c 'touch {dir}/$$; sleep 1000'; :"]])    # timeout(1) makes a group of its own
def test_a_worker_that_is_killed_takes_its_commands_with_it(server: Process, tmp_path: Path,
                                                            words: Optional[List[str]]) -> None:
    run = new_run(server, 10)
    (tmp_path / "pids").mkdir()
    words = [word.replace("{dir}", str(tmp_path / "pids")) for word in words or stubborn(tmp_path / "pids")]
    work = Work(server, run, "-j", "2", "--grace", "0.1", "--", *words, TMPDIR=str(tmp_path),
                tweak="taskfarm.COMPUTING_S = 0; taskfarm.os.setsid()")
    wait_until(lambda: len(pids_in(tmp_path / "pids")) >= 2 and counts(server, run) == (8, 2, 0, 0) and
               all(task_of(server, run, number)["started"] for number in (0, 1)))
    assert session_of(work.process.pid) == [work.process.pid] and list(tmp_path.glob("taskfarm-*"))
    work.end(-signal.SIGKILL, signal.SIGKILL)       # and so its whole session, as PBS ends a job
    wait_until(lambda: counts(server, run) == (10, 0, 0, 0))
    assert not any(map(alive, pids_in(tmp_path / "pids"))), "and before others may claim the tasks"
    assert [task_of(server, run, number)["losses"] for number in (0, 1, 2)] == [1, 1, 0]
    assert not list(tmp_path.glob("taskfarm-*"))


def test_a_watchdog_that_is_killed_is_replaced(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 1)
    (tmp_path / "pids").mkdir()
    work = Work(server, run, "--grace", "0.1", "--", *stubborn(tmp_path / "pids"))
    name = "taskfarm-watchdog of %d" % work.process.pid

    def watchdogs() -> List[int]:
        return [pid for pid in children_of(work.process.pid)
                if Path("/proc/%d/cmdline" % pid).read_bytes().rstrip(b"\0").decode() == name]

    wait_until(lambda: len(pids_in(tmp_path / "pids")) == 2)
    (first,) = watchdogs()
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: len(watchdogs()) == 1 and first not in watchdogs())
    work.end(-signal.SIGKILL, signal.SIGKILL)
    wait_until(lambda: counts(server, run) == (1, 0, 0, 0))
    assert not any(map(alive, pids_in(tmp_path / "pids"))) and "watchdog" not in work.shown()


def test_who_reads_the_output_of_a_killed_worker_sees_its_end_at_once(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 1)
    process = subprocess.Popen(
        [sys.executable, str(MODULE), "work", run, "--grace", "1000", "--log-dir", str(tmp_path / "logs"), "--",
         *stubborn(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ, HOME=server.home))
    assert process.stdout and process.stderr
    pids = wait_until(lambda: pids_in(tmp_path) if len(pids_in(tmp_path)) == 2 else [])
    process.kill()
    for stream in (process.stdout, process.stderr):
        while True:         # poll(2) is ready at the end too
            assert select.select([stream], [], [], 20)[0], "the watchdog keeps it open"
            if not os.read(stream.fileno(), 65536):
                break
        stream.close()
    assert any(map(alive, pids)), "while the watchdog still gives the commands their grace"
    process.wait()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


NO_SETSID = """
spawn = taskfarm.os.posix_spawn
def without(*words, **options):
    if "setsid" in options:
        raise NotImplementedError
    return spawn(*words, **options)
taskfarm.os.posix_spawn = without
"""


@pytest.mark.parametrize("tweak", ["", NO_SETSID])
def test_a_command_cannot_ask_at_the_terminal(server: Process, tmp_path: Path, tweak: str) -> None:
    """Also where Python cannot start a process in a session of its own."""
    run = new_run(server, 1)
    screen, inside = os.openpty()
    script = "import sys; sys.path.insert(0, %r); import taskfarm\n%s\nsys.exit(taskfarm.main())" % (str(HERE), tweak)
    process = subprocess.Popen(
        ["sh", "-c", 'trap : INT; "$@"; exit $?', "sh", sys.executable, "-c", script, "work", run, "--", "sh", "-c",
         "read answer < /dev/tty; sleep 1000"], stdin=inside, stdout=inside, stderr=inside,
        env=dict(os.environ, HOME=server.home), start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    try:
        wait_until(lambda: task_of(server, run, 0)["attempt"])
        wait_until(lambda: b"/dev/tty" in os.read(screen, 65536))
        os.write(screen, b"\x03")       # Ctrl-C still ends the worker
        assert process.wait(20) == 7
    finally:
        process.kill()
        os.close(inside)
        os.close(screen)


# ---------------------------------------------------------------- REPORTER

@contextlib.contextmanager
def no_more_room(server: Process) -> Iterator[None]:
    """The disk takes nothing more from the server."""
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)


def test_a_claim_is_the_same_one_however_often_it_is_tried(farm: Live) -> None:
    relay, swallow = LossyRelay(farm.port), [True] * 3
    relay.swallow = lambda: b"/tasks" in relay.seen[-1] and bool(swallow) and swallow.pop()
    run = new_run(farm, 20)
    access = access_of(farm, url=relay.url, certificate=relay.certificate)
    client = taskfarm.Client(lambda: access)        # without patience: each try is another
    reporter = taskfarm.Reporter(client, run, "w", lambda: None, False)
    reporter.idle = False
    reporter.thread.start()
    reporter.claim(5)
    assert wait_until(lambda: list(reporter.events)) == [taskfarm.TasksClaimed([(number, 1) for number in range(5)])]
    assert counts(farm, run) == (15, 5, 0, 0) and relay.lost == 3
    reporter.report(0, 1, status="computing")
    reporter.report(0, 1, status="done")
    wait_until(lambda: counts(farm, run) == (15, 4, 1, 0))
    assert reporter.close() == []
    client.close()
    relay.close()


def test_what_cannot_be_sent_is_left_for_the_next(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 40)
    work = Work(server, run, "-j", "2", "--", "sh", "-c", "touch %s/ran-{task}; sleep 0.05" % tmp_path)
    wait_until(lambda: counts(server, run)[2] > 4)
    server.process.kill()
    server.process.wait()
    wait_until(lambda: "no farm answers" in work.shown())
    output = work.end(7, signal.SIGTERM)
    (left,) = Path(server.home, ".local/state/taskfarm").iterdir()
    assert str(left) in output and stat.S_IMODE(left.stat().st_mode) == 0o600
    again = Process(str(tmp_path / "f"), home=server.home)
    before, reports = counts(again, run)[2], json.loads(left.read_text())["reports"]
    output = Work(again, run, "-j", "2", "--", "touch", str(tmp_path) + "/ran-{task}").end(0)
    assert "that worker" in output and "had saved: sent" in output and not left.exists()
    assert before < 40 and any(report["status"] == "done" for report in reports)
    assert counts(again, run) == (0, 0, 40, 0)
    for report in reports:
        if report["status"] == "done":
            assert task_of(again, run, report["task"])["attempt"] == report["attempt"], "it was not done again"
    assert again.end(signal.SIGTERM) == 0


def test_a_result_that_is_refused_at_the_very_end_is_told(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 1)
    work = Work(server, run, "--drain", "--", "sh", "-c", "touch %s/on; until [ -e %s/go ]; do sleep 0.01; done" % (
        tmp_path, tmp_path), tweak="taskfarm.SEND_S = taskfarm.HEARTBEAT_S = taskfarm.COMPUTING_S = 1e9")
    wait_until((tmp_path / "on").exists)
    work.process.terminate()
    wait_until(lambda: "may finish" in work.shown())
    assert server.ask("POST", "/api/runs/%s/restart?all=True" % run)[0] == 204
    (tmp_path / "go").touch()
    assert "task 0: the report 'done' was refused: " in work.end(7) and counts(server, run) == (1, 0, 0, 0)


def test_each_report_says_how_long_the_task_has_run(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 9)
    work = Work(server, run, "-j", "3", "--", "sh", "-c", "sleep 0.3; [ {task} != 4 ] || exit 1; [ {task} != 7 ] || "
                "until [ -e %s/go ]; do sleep 0.01; done" % tmp_path, tweak="taskfarm.COMPUTING_S = 0.5")
    started = wait_until(lambda: taskfarm.parse_time(task_of(server, run, 7)["started"]))
    assert started <= time.time() - 0.49, "begun before the first report"
    (tmp_path / "go").touch()
    work.end(3)
    tasks = server.ask("GET", "/api/runs/%s/tasks" % run)[1]["data"]
    times = [(taskfarm.parse_time(task["started"]) or 0.0, taskfarm.parse_time(task["finished"]) or 0.0)
             for task in tasks]
    assert [0.3 <= round(finished - started, 3) for started, finished in times] == [True] * 9


def test_a_living_worker_sends_what_another_has_left_when_the_server_is_back(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 2)
    command = ("--", "sh", "-c", "touch %s/on-{task}; until [ -e %s/go-{task} ]; do sleep 0.01; done" % (
        tmp_path, tmp_path))
    quick = "taskfarm.UNSENT_S = 0, 0; taskfarm.RETRY_PAUSES_S = 0.1, 0.1; taskfarm.HEARTBEAT_S = 0.05"
    stays, leaves = [Work(server, run, *command, tweak=quick) for _ in range(2)]
    wait_until(lambda: len(list(tmp_path.glob("on-*"))) == 2)
    server.process.kill()
    server.process.wait()
    wait_until(lambda: all("no farm answers" in work.shown() for work in (stays, leaves)))
    (tmp_path / "go-1").touch()
    wait_until(lambda: "task 1 done" in stays.shown() + leaves.shown())
    if "task 1 done" in stays.shown():
        stays, leaves = leaves, stays
    leaves.end(7, signal.SIGTERM)
    (left,) = Path(server.home, ".local/state/taskfarm").iterdir()
    again = Process(str(tmp_path / "f"), home=server.home)
    wait_until(lambda: task_of(again, run, 1)["status"] == "done")
    wait_until(lambda: not left.exists())
    wait_until(lambda: "1 report that worker %s had saved: sent" % leaves.shown()[7:15] in stays.shown())
    assert task_of(again, run, 1)["attempt"] == 1
    (tmp_path / "go-0").touch()
    stays.end(0)
    assert again.end(signal.SIGTERM) == 0


def test_a_server_that_is_killed_and_comes_back_costs_nothing(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 60)
    work = Work(server, run, "-j", "2", "--", "sh", "-c", "echo x >> %s/ran-{task}; sleep 0.02" % tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("ran-*"))) > 10)
    server.process.kill()
    server.process.wait()
    ran = len(list(tmp_path.glob("ran-*")))
    wait_until(lambda: "no farm answers" in work.shown())
    again = Process(str(tmp_path / "f"), home=server.home)
    assert again.port != server.port, "the access file tells where it is now"
    work.end(0)
    assert counts(again, run) == (0, 0, 60, 0) and ran < 60
    assert all(path.read_text() == "x\n" for path in tmp_path.glob("ran-*"))
    assert again.end(signal.SIGTERM) == 0


def test_a_server_whose_disk_is_full_costs_nothing(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 2)
    work = Work(server, run, "-j", "2", "--", "sh", "-c", "touch %s/$$; until [ -e %s/{task} ]; do sleep 0.01; done" % (
        tmp_path, tmp_path),
                tweak="taskfarm.WORKER_RETRY_S = 0.2; taskfarm.RETRY_PAUSES_S = 0.01, 0.02; taskfarm.COMPUTING_S = 0")
    wait_until(lambda: len(pids_in(tmp_path)) == 2 and counts(server, run)[1] == 2)
    with no_more_room(server):
        (tmp_path / "0").touch()
        wait_until(lambda: len([pid for pid in pids_in(tmp_path) if alive(pid)]) == 1)
        wait_until(lambda: "commands go on meanwhile" in work.shown())
        ends = time.monotonic() + 1.0
        wait_until(lambda: time.monotonic() > ends)         # its patience ends several times
    (tmp_path / "1").touch()
    output = work.end(0)
    assert output.count("trying again") == output.count("the farm answers again") == 1
    assert counts(server, run) == (0, 0, 2, 0)


def test_lost_answers_cost_a_worker_nothing(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 400)
    relay, generator = LossyRelay(server.port), random.Random(1)
    relay.swallow = lambda: generator.random() < 0.3
    taskfarm.write_access(str(tmp_path / "access.json"), {
        "url": relay.url, "token": server.token, "certificate": relay.certificate})
    work = Work(server, run, "-j", "4", "--quiet", "--", "sh", "-c", "echo x >> %s/ran-{task}" % tmp_path,
                tweak="taskfarm.SEND_S = taskfarm.LOOK_S = 0.01; taskfarm.RETRY_PAUSES_S = (0.01, 0.02)",
                TASKFARM_ACCESS=str(tmp_path / "access.json"))
    work.end(0)
    relay.close()
    assert relay.lost > 5
    assert counts(server, run) == (0, 0, 400, 0)
    assert all(path.read_text() == "x\n" for path in tmp_path.glob("ran-*"))
    assert {task_of(server, run, number)["attempt"] for number in range(400)} == {1}


def test_a_worker_stays_with_its_farm_when_another_gets_the_access_file(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 40)
    work = Work(server, run, "-j", "2", "--quiet", "--", "sh", "-c", "echo x >> %s/ran-{task}; sleep 0.02; %s %s "
                "progress 50" % (tmp_path, sys.executable, MODULE))
    wait_until(lambda: list(tmp_path.glob("ran-*")))
    server.process.kill()
    server.process.wait()
    other = Process(str(tmp_path / "other"), home=server.home)
    wait_until(lambda: "no farm answers" in work.shown())
    again = Process(str(tmp_path / "f"), home=server.home)
    again.token = server.token      # the file is the other's
    work.end(0)
    assert counts(again, run) == (0, 0, 40, 0)
    assert all(path.read_text() == "x\n" for path in tmp_path.glob("ran-*"))
    other.process.kill()
    other.process.wait()
    assert again.end(signal.SIGTERM) == 0


def test_short_tasks_are_claimed_and_reported_together(tmp_path: Path) -> None:
    log = tmp_path / "log"
    logged = Process(str(tmp_path / "g"), "--access-log", str(log))
    run = new_run(logged, 1500)
    Work(logged, run, "-j", "4", "--quiet", "--", "true").end(0)
    assert counts(logged, run) == (0, 0, 1500, 0)
    assert len(log.read_text().splitlines()) < 300, "requests for 1500 tasks"
    assert logged.end(signal.SIGTERM) == 0


def test_a_run_that_is_deleted_ends_its_commands(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 10)
    (tmp_path / "pids").mkdir()
    work = Work(server, run, "-j", "2", "--grace", "0.1", "--", *stubborn(tmp_path / "pids"),
                tweak="taskfarm.HEARTBEAT_S = 0.05")
    wait_until(lambda: len(pids_in(tmp_path / "pids")) == 4)
    assert server.ask("DELETE", "/api/runs/" + run)[0] == 204
    assert "was deleted" in work.end(4)
    assert not any(map(alive, pids_in(tmp_path / "pids")))


def test_a_worker_stays_at_a_paused_run_and_leaves_a_cancelled_one(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 10)
    assert server.ask("POST", "/api/runs/%s/pause" % run)[0] == 204
    assert "the run is paused: 'python3 taskfarm.py resume %s'" % run[:8] in Work(
        server, run, "--idle", "0", "--", "true").end(7)
    (tmp_path / "pids").mkdir()
    work = Work(server, run, "-j", "2", "--grace", "0.1", "--", *stubborn(tmp_path / "pids"),
                tweak="taskfarm.HEARTBEAT_S = 0.05; taskfarm.IDLE_LEAST_S = 0")
    wait_until(lambda: "this worker stays for a while" in work.shown())
    time.sleep(0.6)
    assert work.shown().count("the run is paused") == 1 and work.process.poll() is None
    assert server.ask("POST", "/api/runs/%s/resume" % run)[0] == 204
    wait_until(lambda: len(pids_in(tmp_path / "pids")) == 4)
    assert server.ask("POST", "/api/runs/%s/cancel" % run, {"tasks": [[0, 0]]})[0] == 204
    wait_until(lambda: len(pids_in(tmp_path / "pids")) == 6)
    assert "task 0 was taken from this worker: its command is ended" in work.shown()
    assert server.ask("POST", "/api/runs/%s/cancel" % run)[0] == 204
    shown = work.end(3)
    assert "the run was cancelled: 'python3 taskfarm.py resume %s' lets it go on" % run[:8] in shown
    assert not any(map(alive, pids_in(tmp_path / "pids")))
    assert counts(server, run) == (9, 0, 0, 1)


def test_a_worker_begins_when_the_run_before_is_over_and_leaves_where_that_does_not_help(server: Process) -> None:
    first = new_run(server, 2, name="first")
    second, third = (new_run(server, 1, after=first, afterAny=any_end) for any_end in (False, True))
    works = [Work(server, run, "--", "echo", "begun") for run in (second, third)]
    for work in works:
        wait_until(lambda work=work: "the run begins when first is over (0 of 2 tasks are done)" in work.shown())  # type: ignore[misc]
    assert server.ask("PUT", "/api/runs/%s/tasks/0" % first, {"status": "failed"})[0] == 204
    assert server.ask("PUT", "/api/runs/%s/tasks/1" % first, {"status": "done"})[0] == 204
    why = "the run never begins: first, for which it waits, is over, and 1 task failed: 'python3 taskfarm.py restart %s"
    assert why % first[:8] in works[0].end(3) and works[0].printed() == ""
    works[1].end(0)
    assert works[1].printed() == "begun\n"
    assert server.ask("GET", "/api/runs/" + third)[1]["after"] is None
    assert server.ask("DELETE", "/api/runs/" + first)[0] == 204
    assert "never begins: run %s, for which it waits, was deleted" % first[:8] in Work(
        server, second, "--", "echo", "begun").end(3)


def test_a_worker_without_parameters_for_tasks_that_came_later_says_so(server: Process, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("a\nb\n")
    run = new_run(server, 2)
    script = "[ {task} = 0 ] || { touch %s/on; while [ ! -e %s/go ]; do sleep 0.02; done; }; echo {line}" % (
        tmp_path, tmp_path)
    work = Work(server, run, "--lines", str(tmp_path / "lines"), "--", "sh", "-c", script)
    wait_until((tmp_path / "on").exists)
    assert server.ask("POST", "/api/runs/%s/extend" % run, {"numTasks": 1})[0] == 204
    (tmp_path / "go").touch()
    with pytest.raises(IndexError):
        taskfarm.Grid(["a=1,2", "b=1..3"]).values(6)
    assert "there are no parameters for task 2: start this worker again with more" in work.end(1)
    assert counts(server, run) == (1, 0, 2, 0) and work.printed() == "a\nb\n"


def test_a_task_that_was_taken_away_is_given_up(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 2)
    work = Work(server, run, "--grace", "0.1", "--", "sh", "-c", "touch %s/on-{task}-{attempt}; [ {attempt} = 2 ] || "
                "[ {task} = 1 ] || sleep 1000" % tmp_path, tweak="taskfarm.HEARTBEAT_S = 0.05")
    wait_until((tmp_path / "on-0-1").exists)
    assert server.ask("POST", "/api/runs/%s/restart?all=True" % run)[0] == 204
    output = work.end(0)
    assert "task 0 was taken from this worker" in output and (tmp_path / "on-0-2").exists()
    assert counts(server, run) == (0, 0, 2, 0)


@pytest.mark.parametrize("taken", [False, True])
def test_a_worker_that_was_asleep_for_longer_than_its_lease(server: Process, tmp_path: Path, taken: bool) -> None:
    run = new_run(server, 1)
    work = Work(server, run, "--grace", "0.1", "--", "sh", "-c", "until [ -e %s/go ]; do touch %s/on-{attempt}; "
                "sleep 0.01; done" % (tmp_path, tmp_path),
                tweak="taskfarm.LEASE_S, taskfarm.HEARTBEAT_S, taskfarm.COMPUTING_S = 1, 0.2, 0.01")
    wait_until(lambda: task_of(server, run, 0)["started"])
    work.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: counts(server, run) == (1, 0, 0, 0))
    assert task_of(server, run, 0)["losses"] == 1
    if taken:
        server.ask("POST", "/api/worker", {"uuid": "other", "hostname": "h", "pid": 1})
        assert server.ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": "other"})[1]["attempt"] == 2
    work.process.send_signal(signal.SIGCONT)
    if taken:
        wait_until(lambda: "task 0 was taken from this worker" in work.shown())
        work.end(0)
        assert counts(server, run) == (0, 1, 0, 0), "the other one computes it"
    else:
        wait_until(lambda: counts(server, run) == (0, 1, 0, 0))
        (tmp_path / "go").touch()
        work.end(0)
        task = task_of(server, run, 0)
        assert (task["status"], task["attempt"], task["losses"]) == ("done", 1, 0)


# ---------------------------------------------------------------- WORKER

def test_every_task_is_run_once_and_reported(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 300, name="tiles")
    script = tmp_path / "tile.sh"
    script.write_text("echo x >> %s/ran-$1\n[ $1 != 7 ] || { echo so it goes >&2; exit 3; }\n" % tmp_path)
    script.chmod(0o755)         # and it has no first line with #!
    both = [Work(server, "tiles", "-j", "3", "--", str(script), "{task}") for _ in range(2)]
    outputs = [work.end(3) for work in both]
    assert counts(server, run) == (0, 0, 299, 1)
    assert {path.name: path.read_text() for path in tmp_path.glob("ran-*")} == {"ran-%d" % n: "x\n" for n in range(300)}
    failed = task_of(server, run, 7)
    assert (failed["exitCode"], failed["message"], failed["failures"]) == (3, "so it goes", 1)
    assert sum(output.count(" done in ") for output in outputs) == 299
    assert sum(output.count("task 7 failed: exit status 3\n") for output in outputs) == 1
    assert sum(output.count("so it goes") for output in outputs) == 1, "what it said is shown once"
    assert all(entry["state"] == "signed off" for entry in server.ask("GET", "/api/workers?all=True")[1]["data"])


def ended(code: int, elapsed_s: float) -> taskfarm.Command:
    """A command that has ended with an exit status after so many seconds."""
    command = taskfarm.Command(0, 1, None, 0.0)
    command.status, command.elapsed_s = code << 8, elapsed_s
    return command


@pytest.mark.parametrize("others", [(0, 0.1), (1, 9.9), (0, 100.0), (1, 10.0)])
def test_first_failures_are_held_until_a_command_does_better(others: Tuple[int, float]) -> None:
    first = taskfarm.FirstEnds(0, None)
    quick, better = [ended(1, 0.1), ended(127, 9.9), ended(1, 0.0)], ended(*others)
    for command in quick:
        first.see(command)
        assert first.confirm(command) == []
    first.see(better)
    if others == (1, 9.9):
        assert first.confirm(better) == [] and len(first.held) == 4
    else:
        assert first.confirm(better) == [*quick, better] and first.held == []
        assert first.confirm(quick[0]) == [quick[0]], "from now on a failure is the fault of its task"
    assert taskfarm.FirstEnds(0, 0).confirm(quick[0]) == [quick[0]]


def test_a_worker_pauses_when_its_first_ends_are_failures() -> None:
    first = taskfarm.FirstEnds(0, None)
    for _ in range(taskfarm.FIRST_ENDS):
        assert not first.pauses
        first.see(ended(1, 0.1))
    assert first.pauses, "also while none is confirmed"
    first.see(ended(0, 0.1))
    assert not first.pauses, "a success goes on"
    first = taskfarm.FirstEnds(0, 2)
    for code in (0, 1, 0, 1):
        assert not first.pauses
        first.see(ended(code, 100.0))
    assert first.pauses


@pytest.mark.parametrize("computing, done, ends, fault", [
    (5, 10, 5, "command"),      # nobody else computes, and nobody has done anything since this worker began
    (5, 11, 5, "node"),         # somebody has
    (9, 10, 5, ""),             # somebody computes: wait, but not for ever
    (9, 11, 5, "node"),
    (3, 10, 3, "command"),      # no task is left
    (3, 99, 3, "command"),      # the others are gone, and nobody would take these
    (4, 10, 3, ""), (4, 11, 3, "node"),
])
def test_the_figures_tell_whose_fault_the_first_failures_are(computing: int, done: int, ends: int, fault: str) -> None:
    first = taskfarm.FirstEnds(10, None)
    for _ in range(ends):
        first.see(ended(1, 0.1))
    run = {"numComputing": computing, "numDone": done}
    assert first.fault(run, ends, 1000.0) == fault
    assert first.fault(run, ends, 1000.0 + 2 * taskfarm.PAUSE_S) == (fault or "node")


@pytest.mark.parametrize("words", [["sh", "-c", "nosuch {task}"], ["env", "./{task}"], ["./{task}"],
                                   ["sh", "-c", "sleep 0.01; echo no licence >&2; exit 3"]])
@pytest.mark.parametrize("jobs", ["1", "16"])
def test_a_node_that_fails_everything_fails_no_task(server: Process, words: List[str], jobs: str) -> None:
    run = new_run(server, 300)
    server.ask("POST", "/api/worker", {"uuid": "other", "hostname": "h", "pid": 1, "lease": 600})
    assert server.ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": "other"})[1]["task"] == 0
    work = Work(server, run, "-j", jobs, "--", *words, tweak="taskfarm.PAUSE_S = 0")
    sentence = next(line for line in work.end(8).splitlines() if line.startswith("stopping"))
    assert "on %s all of the first " % socket.gethostname() in sentence
    assert "other workers still compute: the tasks are given back" in sentence
    for reason, known in (("nosuch", "nosuch {task}" in words), ("no licence", "exit 3" in words[-1])):
        assert (reason in sentence) is known
    assert int(sentence.split("of the first ")[1].split()[0]) < 5 + int(jobs), "it does not go on until all are spoilt"
    assert counts(server, run) == (299, 1, 0, 0)


def test_a_node_that_fails_everything_leaves_as_soon_as_another_does_better(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 40)
    work = Work(server, run, "--", "sh", "-c", "touch %s/{task}; until [ -e %s/go ]; do sleep 0.01; done; exit 1" % (
        tmp_path, tmp_path), tweak="taskfarm.PAUSE_S = 1000")
    wait_until((tmp_path / "0").exists)
    assert report(server, run, 39, status="done") == 204
    (tmp_path / "go").touch()
    assert "other workers have done 1 task meanwhile" in work.end(8)
    assert counts(server, run) == (39, 0, 1, 0)


def test_a_command_that_nobody_can_run_stops_the_worker(server: Process) -> None:
    run = new_run(server, 40)
    output = Work(server, run, "--", "sh", "-c", "echo wrong >&2; exit 127").end(9)
    assert "all of the first 5 commands failed within 10 s (exit status 127: wrong)" in output
    assert "--max-fails 0" in output and counts(server, run) == (35, 0, 0, 5)
    assert task_of(server, run, 4)["message"] == "wrong"
    Work(server, run, "--max-fails", "7", "--", "false").end(9)
    assert counts(server, run) == (28, 0, 0, 12)
    Work(server, run, "--max-fails", "0", "--", "sh", "-c", "[ {task} = 39 ] || exit 1").end(3)
    assert counts(server, run) == (0, 0, 1, 39)


def test_workers_that_begin_with_a_wrong_command_fail_few_tasks(server: Process) -> None:
    run = new_run(server, 100)
    many = [Work(server, run, "-j", "2", "--", "false", tweak="taskfarm.PAUSE_S, taskfarm.RUN_FIGURES_S = 1, 1000; "
                 "taskfarm.random.uniform = lambda a, b: %f" % pause) for pause in (1, 2, 4)]
    statuses = [work.process.wait(40) for work in many]
    assert statuses == [8, 8, 9], "the last one sees that nobody does better"
    assert counts(server, run)[1:3] == (0, 0) and 5 <= counts(server, run)[3] <= 6


def test_tasks_that_fail_quickly_are_failed_once_a_command_did_better(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 20)
    Work(server, run, "--", "sh", "-c", "[ {task} = 4 ] || exit 5").end(3)
    assert counts(server, run) == (0, 0, 1, 19)
    run = new_run(server, 1)        # the only task of a run
    Work(server, run, "--", "false").end(3)
    assert counts(server, run) == (0, 0, 0, 1)
    run = new_run(server, 4, maxFailures=3)
    Work(server, run, "--", "false").end(3)
    assert counts(server, run) == (0, 0, 0, 4) and task_of(server, run, 3)["attempt"] == 3
    run = new_run(server, 7)
    work = Work(server, run, "-j", "6", "--", "sh", "-c", "[ {task} = 5 ] || exit 1; until [ -e %s/go ]; do sleep "
                "0.01; done" % tmp_path, tweak="taskfarm.QUICK_S = 1")
    wait_until(lambda: counts(server, run) == (0, 1, 0, 6))     # a command that runs for long is as good as a success
    (tmp_path / "go").touch()
    work.end(3)


@pytest.mark.parametrize("drain", [(), ("--drain",)])
def test_a_worker_that_is_stopped_gives_back_its_first_failures(server: Process, tmp_path: Path,
                                                                drain: Tuple[str, ...]) -> None:
    run = new_run(server, 10)
    work = Work(server, run, "--grace", "0.1", *drain, "--", "sh", "-c", "[ {task} = 3 ] || exit 1; touch %s/on; until "
                "[ -e %s/go ]; do sleep 0.01; done; exit 1" % (tmp_path, tmp_path), tweak="taskfarm.CONFIRM_S = 0")
    wait_until((tmp_path / "on").exists)
    work.process.terminate()
    wait_until(lambda: "stopping" in work.shown())
    (tmp_path / "go").touch()
    work.end(7)
    assert counts(server, run) == (10, 0, 0, 0) and task_of(server, run, 0)["failures"] == 0


def test_first_failures_outlive_the_server(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 1)
    work = Work(server, run, "--", "sh", "-c", "touch %s/ran; exit 3" % tmp_path,
                tweak="taskfarm.WORKER_RETRY_S, taskfarm.RETRY_PAUSES_S, taskfarm.CONFIRM_S = 0.2, (0.01, 0.02), 1")
    wait_until((tmp_path / "ran").exists)
    server.process.kill()
    server.process.wait()
    wait_until(lambda: "no farm answers" in work.shown())       # its patience ends before another server answers
    again = Process(str(tmp_path / "f"), home=server.home)
    work.end(3)
    assert counts(again, run) == (0, 0, 0, 1)
    assert again.end(signal.SIGTERM) == 0


@pytest.mark.parametrize("number", [0, signal.SIGTERM])
def test_a_worker_stops_after_so_many_failures(server: Process, tmp_path: Path, number: int) -> None:
    run = new_run(server, 20)
    work = Work(server, run, "-j", "2", "--max-fails", "3", "--", "sh", "-c", "[ {task} != 0 ] || exit 0; [ {task} "
                "= 1 ] || exit 4; until [ -e %s/go ]; do sleep 0.01; done" % tmp_path)
    wait_until(lambda: "may finish" in work.shown())
    assert "failed on %s (--max-fails), the last one with exit status 4" % socket.gethostname() in work.shown()
    if not number:
        (tmp_path / "go").touch()
    work.end(9, number)
    waiting, computing, done, failed = counts(server, run)
    assert (waiting, computing, done, failed) == (16 if number else 15, 0, 1 if number else 2, 3)
    assert task_of(server, run, 1)["status"] == ("waiting" if number else "done")


@pytest.mark.parametrize("wait", [(), ("--idle", "0")])
def test_a_node_that_fails_everything_fails_none_of_the_last_tasks(server: Process, tmp_path: Path,
                                                                   wait: Tuple[str, ...]) -> None:
    run = new_run(server, 12)
    good = Work(server, run, "-j", "8", "--", "sh", "-c", "until [ -e %s/go ]; do sleep 0.01; done" % tmp_path)
    wait_until(lambda: counts(server, run) == (4, 8, 0, 0))
    output = Work(server, run, "-j", "4", *wait, "--", "sh", "-c", "nosuch {task}",
                  tweak="taskfarm.PAUSE_S = 0.1").end(8)
    sentence = next(line for line in output.splitlines() if line.startswith("stopping"))
    assert "on %s all of the first 4 commands failed" % socket.gethostname() in sentence and "nosuch" in sentence
    assert " failed: " not in output
    assert counts(server, run) == (4, 8, 0, 0)
    (tmp_path / "go").touch()
    good.end(0)
    assert counts(server, run) == (0, 0, 12, 0)


def test_a_worker_that_is_alone_at_the_end_reports_its_failures(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 12)
    assert report(server, run, 11, status="done") == 204
    server.ask("POST", "/api/worker", {"uuid": "other", "hostname": "h", "pid": 1, "lease": 600})
    assert server.ask("POST", "/api/runs/%s/tasks" % run, {"worker_uuid": "other", "count": 8})[0] == 201
    work = Work(server, run, "-j", "3", "--", "sh", "-c", "touch %s/{task}; until [ -e %s/go ]; do sleep 0.01; done; "
                "exit 127" % (tmp_path, tmp_path))
    wait_until(lambda: len(list(tmp_path.glob("[89]"))) + len(list(tmp_path.glob("10"))) == 3)
    for number in range(8):
        assert report(server, run, number, status="done", worker_uuid="other") == 204
    (tmp_path / "go").touch()
    work.end(3)
    assert counts(server, run) == (0, 0, 9, 3)


def test_a_node_where_the_command_is_gone_fails_no_task(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 10)
    script = tmp_path / "tile.sh"
    script.write_text("#!/bin/sh\n[ $1 != 3 ] || rm %s\n" % script)
    script.chmod(0o755)
    assert "tile.sh cannot be started here" in Work(server, run, "--", str(script), "{task}").end(1)
    assert counts(server, run) == (6, 0, 4, 0)
    (tmp_path / "lines").write_text("true\n" * 4 + "/no/such/program\n" * 2 + "true\n" * 4)
    Work(server, run, "--lines", str(tmp_path / "lines"), "--", "env", "{line}").end(3)
    assert counts(server, run) == (0, 0, 8, 2)
    run = new_run(server, 2)
    (tmp_path / "lines").write_text("/no/such/program\nnul\0\n")
    Work(server, run, "--lines", str(tmp_path / "lines"), "--", "{line}", "{task}").end(3)
    assert [task_of(server, run, number)["exitCode"] for number in range(2)] == [127, 126]


def test_a_system_that_is_full_is_waited_for(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 6)
    logs = tmp_path / "logs"
    work = Work(server, run, "--log-dir", str(logs), "--", "sh", "-c", "[ {task} != 2 ] || [ -e %s/full ] || { touch "
                "%s/full; mv %s %s; }" % (tmp_path, tmp_path, logs, tmp_path / "away"),
                tweak="taskfarm.TEMPORARY_ERRORS += (taskfarm.errno.ENOENT,)")
    wait_until(lambda: "trying again" in work.shown())
    (tmp_path / "away").rename(logs)
    work.end(0)
    assert counts(server, run) == (0, 0, 6, 0)


def test_what_failed_may_be_tried_again(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 5, maxFailures=3)
    Work(server, run, "-j", "2", "--log-dir", str(tmp_path / "logs"), "--log-failed", "--max-fails", "0", "--",
         "sh", "-c", 'echo why >&2; sleep 0.1; echo {attempt}; [ {task} != 4 ] && [ {attempt} != 1 ]').end(3)
    assert counts(server, run) == (0, 0, 4, 1)
    assert task_of(server, run, 4)["attempt"] == 3
    kept = {name: "why\n%d\n" % attempt for task in range(5) for attempt, name in (
        (1, "%d.log" % task), (2, "%d.2.log" % task), (3, "%d.3.log" % task)) if task == 4 or attempt == 1}
    assert {path.name: path.read_text() for path in (tmp_path / "logs").glob("*.log")} == kept
    assert task_of(server, run, 4)["message"] == "3"


def test_progress_is_reported_from_inside(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 1)
    work = Work(server, run, "--", "sh", "-c", "for word in none 12.5 x 200 nan 50%% ''; do until [ -e %s/go$word ]; "
                "do sleep 0.01; done; echo $word > $TASKFARM_PROGRESS; done" % tmp_path,
                tweak="taskfarm.PROGRESS_S = 0.01")
    for word, percent in (("none", 0), ("12.5", 12.5), ("x", 12.5), ("200", 12.5), ("nan", 12.5), ("50%", 50)):
        (tmp_path / ("go" + word)).touch()
        if word == "none":
            wait_until(lambda: "as that of task 0: none" in work.shown())
        wait_until(lambda: task_of(server, run, 0)["percentCompleted"] == percent)      # noqa: B023
    (tmp_path / "go").touch()
    work.end(0)
    assert work.shown().count("no number from 0 to 100") == 1
    no_folder = {"TASKFARM_PROGRESS": str(tmp_path / "none" / "0")}
    for environ, sentence in (({}, "is not set"), (no_folder, "No such file")):
        alone = run_verb("progress", "90", **environ)
        assert alone.returncode == 0 and "not reported" in alone.stderr and sentence in alone.stderr
    assert run_verb("progress", "101").returncode == 2


def test_progress_is_a_file_that_the_verb_writes(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 1)
    work = Work(server, run, "--", "sh", "-c", "%s %s progress 37.5%%; mode=$(stat -c %%a $(dirname "
                "$TASKFARM_PROGRESS)); until [ -e %s/go ]; do sleep 0.01; done; [ $mode = 700 ]"
                % (sys.executable, MODULE, tmp_path))
    wait_until(lambda: task_of(server, run, 0)["percentCompleted"] == 37.5)
    task = task_of(server, run, 0)
    assert task["status"] == "computing" and task["started"]
    (tmp_path / "go").touch()
    work.end(0)
    assert task_of(server, run, 0)["percentCompleted"] == 100


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_the_commands_and_gives_the_tasks_back(server: Process, tmp_path: Path, number: int) -> None:
    run = new_run(server, 10)
    (tmp_path / "pids").mkdir()
    work = Work(server, run, "-j", "2", "--grace", "0.3", "--", *stubborn(tmp_path / "pids"))
    wait_until(lambda: len(pids_in(tmp_path / "pids")) == 4)
    output = work.end(7, number)
    assert signal.Signals(number).name in output
    assert not any(map(alive, pids_in(tmp_path / "pids"))), "the whole groups are gone"
    assert counts(server, run) == (10, 0, 0, 0)
    task = task_of(server, run, 0)
    assert (task["failures"], task["losses"]) == (0, 0)
    (worker,) = server.ask("GET", "/api/workers?all=True")[1]["data"]
    assert worker["state"] == "signed off"


def test_a_reader_that_takes_nothing_keeps_no_worker_from_leaving(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 10000)
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, str(MODULE), "work", run, "--", "true"], stdout=writer,
                               env=dict(os.environ, HOME=server.home))
    wait_until(lambda: counts(server, run)[2])
    filler = os.open("/proc/self/fd/%d" % writer, os.O_WRONLY | os.O_NONBLOCK)      # the worker's own end must block
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(filler, b"x")
    process.terminate()
    try:
        assert process.wait(20) == 7 and counts(server, run)[1] == 0
    finally:
        process.kill()
    for descriptor in (reader, writer, filler):
        os.close(descriptor)


def test_a_reader_that_has_ended_fails_no_task(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 20)
    words = [sys.executable, str(MODULE), "work", run, "-j", "2", "--", "sh", "-c", "sleep 0.05; echo x"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, env=dict(os.environ, HOME=server.home))
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    try:
        assert process.wait(20) == 0 and counts(server, run) == (0, 0, 20, 0)
    finally:
        process.kill()


def test_a_second_signal_does_not_wait(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 10)
    (tmp_path / "pids").mkdir()
    work = Work(server, run, "--grace", "1000", "--", *stubborn(tmp_path / "pids"), tweak="taskfarm.SAME_SIGNAL_S = 0")
    wait_until(lambda: len(pids_in(tmp_path / "pids")) == 2)
    work.process.terminate()
    wait_until(lambda: "stopping" in work.shown())
    work.end(7, signal.SIGTERM)
    assert not any(map(alive, pids_in(tmp_path / "pids"))) and counts(server, run) == (10, 0, 0, 0)


def test_two_signals_at_once_are_one(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 10)
    work = Work(server, run, "--grace", "20", "--", "sh", "-c", "trap 'sleep 0.3; touch %s/saved; exit 0' TERM; "
                "touch %s/on; while :; do sleep 0.01; done" % (tmp_path, tmp_path),
                tweak="taskfarm.SAME_SIGNAL_S = 1000")
    wait_until((tmp_path / "on").exists)
    work.process.terminate()            # srun sends it twice
    wait_until(lambda: "stopping" in work.shown())
    work.end(7, signal.SIGTERM)
    assert (tmp_path / "saved").exists(), "the command had its grace"
    assert counts(server, run) == (10, 0, 0, 0), "a command that was ended has not done its task"


@pytest.mark.parametrize("trap", ["", "trap 'exit 143' TERM; "])
def test_a_batch_system_may_signal_the_commands_first(server: Process, tmp_path: Path, trap: str) -> None:
    run = new_run(server, 10)
    command = "%stouch %s/$$; while :; do sleep 0.01; done" % (trap, tmp_path)
    work = Work(server, run, "-j", "2", "--", "sh", "-c", command, tweak="taskfarm.CONFIRM_KILLED_S = 1000")
    pids = wait_until(lambda: pids_in(tmp_path) if len(pids_in(tmp_path)) == 2 else [])
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not any(map(alive, pids)))
    work.end(7, signal.SIGTERM)
    assert counts(server, run) == (10, 0, 0, 0), "none has failed"
    alone = Work(server, run, "--", "sh", "-c", "[ {task} != 3 ] || kill -TERM $$",
                 tweak="taskfarm.CONFIRM_KILLED_S = 0.01")
    alone.end(3)
    assert counts(server, run) == (0, 0, 9, 1)
    assert (task_of(server, run, 3)["exitCode"], task_of(server, run, 3)["message"]) == (143, "killed by SIGTERM")


def children_of(pid: int) -> List[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path("/proc/%d/task/%d/children" % (pid, pid)).read_text().split()]
    return []


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 7), (signal.SIGUSR1, 7), (signal.SIGKILL, -9)])
@pytest.mark.parametrize("command", ["sleep 1000; echo x", "sleep 1000 || exit 5", "sleep 1000; sleep 1000"])
def test_what_is_killed_children_first_is_not_done(server: Process, number: signal.Signals, status: int,
                                                   command: str) -> None:
    run = new_run(server, 20)
    work = Work(server, run, "-j", "8", "--max-fails", "0", "--", "sh", "-c", command,
                tweak="taskfarm.CONFIRM_S = taskfarm.CONFIRM_KILLED_S = 100")
    shells = wait_until(lambda: [pid for pid in children_of(work.process.pid) if children_of(pid)][7:] and
                        [pid for pid in children_of(work.process.pid) if children_of(pid)])
    for shell in shells:        # one process at a time, as PBS does it
        for child in children_of(shell):
            os.kill(child, number)
        if command.endswith("sleep 1000"):
            os.kill(shell, number)
    wait_until(lambda: not any(map(alive, shells)))     # or they have gone on, and ended of their own
    wait_until(lambda: [pid for pid in children_of(work.process.pid) if pid not in shells and children_of(pid)][7:])
    work.end(status, number)
    if status == 7:
        assert counts(server, run) == (20, 0, 0, 0)
        assert {task["failures"] for task in server.ask("GET", "/api/runs/%s/tasks" % run)[1]["data"]} == {0}
    else:
        assert counts(server, run)[2:] == (0, 0), "what is left comes back with the lease"


def test_the_end_of_the_job_gives_back_what_has_just_ended(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 1)
    work = Work(server, run, "--until", "+4", "--grace", "0.5", "--", "touch", str(tmp_path / "ran"),
                tweak="taskfarm.CONFIRM_S = 1000; taskfarm.STOP_EARLY_S = 0.5")
    assert "the job ends soon" in work.end(7) and (tmp_path / "ran").exists()
    assert counts(server, run) == (1, 0, 0, 0)


def test_what_a_given_back_command_has_left_running_is_ended(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 1)
    work = Work(server, run, "--", "sh", "-c", "sleep 1000 & echo $! > %s/new; mv %s/new %s/left" % ((tmp_path,) * 3),
                tweak="taskfarm.CONFIRM_S = 1000")
    wait_until((tmp_path / "left").exists)
    work.end(7, signal.SIGTERM)
    assert not alive(int((tmp_path / "left").read_text())) and counts(server, run) == (1, 0, 0, 0)


def test_a_failure_of_which_something_still_runs_is_given_back(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 1)
    work = Work(server, run, "--grace", "1000", "--", "sh", "-c", "trap '' TERM; sleep 1000 & echo $$ > %s/new; "
                "mv %s/new %s/shell; exit 5" % ((tmp_path,) * 3), tweak="taskfarm.SAME_SIGNAL_S = 0")
    wait_until(lambda: (tmp_path / "shell").exists() and not alive(int((tmp_path / "shell").read_text())))
    time.sleep(taskfarm.CONFIRM_S)      # by its age alone it would be confirmed
    work.process.terminate()
    wait_until(lambda: "stopping" in work.shown())
    work.end(7, signal.SIGTERM)
    assert counts(server, run) == (1, 0, 0, 0)


def test_an_end_that_is_not_confirmed_yet_keeps_no_slot(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 30)
    work = Work(server, run, "--log-dir", str(tmp_path), "--", "true", tweak="taskfarm.CONFIRM_S = 1000")
    wait_until(lambda: len(list(tmp_path.glob("*.log"))) == 30)
    logs = {os.readlink(path) for path in Path("/proc/%d/fd" % work.process.pid).iterdir() if path.exists()}
    assert len([name for name in logs if name.endswith(".log")]) < 2, "nor an open file"
    work.end(7, signal.SIGTERM)
    assert counts(server, run) == (30, 0, 0, 0)


def test_time_in_which_a_worker_was_stopped_counts_for_nothing(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 1)
    work = Work(server, run, "--timeout", "1", "--", "sh", "-c", "echo $$ > %s/new; mv %s/new %s/pid; until [ -e "
                "%s/go ]; do sleep 0.01; done" % ((tmp_path,) * 4),
                tweak="taskfarm.STOPPED_S = taskfarm.PROGRESS_S = 0.1")
    wait_until((tmp_path / "pid").exists)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        os.killpg(int((tmp_path / "pid").read_text()), number)
        work.process.send_signal(number)
        if number == signal.SIGSTOP:
            time.sleep(1.3)         # the clock of another process
    (tmp_path / "go").touch()
    work.end(0)
    assert counts(server, run) == (0, 0, 1, 0)


def test_drain_lets_commands_finish(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 10)
    work = Work(server, run, "-j", "2", "--drain", "--", "sh", "-c", "touch %s/on-{task}; until [ -e %s/go ]; do "
                "sleep 0.01; done" % (tmp_path, tmp_path))
    wait_until(lambda: len(list(tmp_path.glob("on-*"))) == 2)
    work.process.terminate()
    wait_until(lambda: "may finish" in work.shown())
    (tmp_path / "go").touch()
    work.end(7)
    assert counts(server, run) == (8, 0, 2, 0)
    work = Work(server, run, "--drain", "--until", "+3", "--grace", "0.1", "--", "sh", "-c",
                "touch %s/last; sleep 1000" % tmp_path, tweak="taskfarm.STOP_EARLY_S = 0.5")
    wait_until((tmp_path / "last").exists)
    work.end(7, signal.SIGTERM)     # the end of the job
    assert counts(server, run) == (8, 0, 2, 0)


def test_a_task_that_runs_longer_than_a_second_is_computing(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 2)
    work = Work(server, run, "-j", "2", "--", "sh", "-c", "until [ -e %s/go ]; do sleep 0.01; done" % tmp_path,
                tweak="taskfarm.COMPUTING_S = 0.01")
    wait_until(lambda: task_of(server, run, 0)["started"] and task_of(server, run, 1)["started"])
    assert counts(server, run) == (0, 2, 0, 0)
    (tmp_path / "go").touch()
    work.end(0)
    assert counts(server, run) == (0, 0, 2, 0)


def test_the_wait_for_a_confirmed_end_is_no_time_of_the_task(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 1)
    Work(server, run, "--", "sh", "-c", "kill -TERM $$", tweak="taskfarm.CONFIRM_KILLED_S = 3").end(3)
    task = task_of(server, run, 0)
    assert (taskfarm.parse_time(task["finished"]) or 0.0) - (taskfarm.parse_time(task["started"]) or 0.0) < 3


def test_a_worker_stays_while_tasks_may_come_back(server: Process) -> None:
    run = new_run(server, 2)
    other = {"uuid": "other", "hostname": "h", "pid": 1, "lease": 600}
    server.ask("POST", "/api/worker", other)
    assert server.ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": "other"})[1]["task"] == 0
    Work(server, run, "--idle", "0", "--", "true").end(0)
    assert counts(server, run) == (0, 1, 1, 0)
    work = Work(server, run, "--", "true")
    wait_until(lambda: "their tasks may come back" in work.shown())
    assert server.ask("DELETE", "/api/worker/other")[0] == 204
    work.end(0)
    assert counts(server, run) == (0, 0, 2, 0)


def test_each_end_has_its_status(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 3)
    Work(server, "0" * 32, "--", "true").end(4)
    nobody = Work(server, "harvest", "--", "true")
    assert "no run is called 'harvest'" in nobody.end(4) and nobody.printed() == ""
    Work(server, run, "-j", "5001", "--", "true").end(2)
    Work(server, run, "--", "true", TASKFARM_TOKEN="tf1.x").end(6)
    Work(server, run, "--", "true", TASKFARM_URL="https://127.0.0.1:1", tweak="taskfarm.WORKER_RETRY_S = 0.5").end(5)
    assert counts(server, run) == (3, 0, 0, 0)
    user = run_verb("user", "list", "--db", str(tmp_path / "f")).stdout.strip()
    assert run_verb("user", "passwd", user, "--db", str(tmp_path / "f"), stdin="sesame\n").returncode == 0
    Work(server, run, "--", "true", TASKFARM_USER=user, TASKFARM_PASSWORD="sesame").end(0)
    server.token = json.loads(Path(server.home, ".config/taskfarm/access.json").read_text())["token"]
    assert counts(server, run) == (0, 0, 3, 0)


# It has found nothing to do for most of the time.
LONG_BEGUN = "taskfarm.TaskRunner.began = property(lambda _: -1e9, lambda *_: None); "


def test_a_worker_leaves_before_its_job_ends(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 50)
    end, soon = str(int(time.time()) + 5), "taskfarm.STOP_EARLY_S = 0.5"
    output = Work(server, run, "-j", "2", "--grace", "1", "--", "sleep", "0.2", SLURM_JOB_END_TIME=end,
                SLURM_JOB_ID="1", tweak=soon).end(7)
    assert "fit" in output or "the job ends" in output
    waiting, computing, done, failed = counts(server, run)
    assert computing == failed == 0 < done
    Work(server, run, "--until", "+60", "--task-time", "100", "--", "true").end(10)
    assert counts(server, run) == (waiting, 0, done, 0)
    for option, status in ((), 7), (("--leave-ok",), 0):
        output = Work(server, run, "--until", "+2", "--grace", "0.5", *option, "--", "sleep", "1000",
                      tweak=LONG_BEGUN + soon).end(status)
        assert "the job ends soon" in output and counts(server, run) == (waiting, 0, done, 0)
    work = Work(server, run, "--until", "+4", "--grace", "0.5", "--drain", "--leave-ok", "--",
                "sh", "-c", "touch '%s'; exec sleep 1000" % (tmp_path / "runs"), tweak=soon)
    wait_until((tmp_path / "runs").exists)
    work.end(7, signal.SIGUSR2)         # which is no planned end, although the job's end comes next


def test_a_worker_does_not_wait_for_the_batch_system(server: Process, tmp_path: Path) -> None:
    (tmp_path / "qstat").write_text("#!/bin/sh\nuntil [ -e '%s/go' ]; do sleep 0.1; done\n"
                                    "echo '  Resource_List.walltime = 1'\n" % tmp_path)
    (tmp_path / "qstat").chmod(0o755)
    run = new_run(server, 3)
    environ = {"PBS_JOBID": "7", "NCPUS": "2", "PATH": str(tmp_path) + ":" + os.environ["PATH"]}
    command = "[ {task} = 0 ] || { sleep 0.5; touch '%s/go'; exec sleep 1000; }" % tmp_path
    output = Work(server, run, "--", "sh", "-c", command, tweak="taskfarm.COMPUTING_S = 0.1", **environ).end(7)
    assert "2 at a time" in output and "the job ends at" in output and counts(server, run) == (2, 0, 1, 0)


@pytest.mark.parametrize("tweak, status, sentence", [
    ("", 10, "no task has ended in"), (LONG_BEGUN, 7, "the job ends soon")
])
def test_a_job_that_is_too_short_for_a_task_says_so(server: Process, tweak: str, status: int, sentence: str) -> None:
    run = new_run(server, 9)
    work = Work(server, run, "--until", "+2", "--grace", "0.5", "--", "sleep", "1000",
                tweak=tweak + "taskfarm.STOP_EARLY_S = 0.5")
    assert sentence in work.end(status)
    assert counts(server, run) == (9, 0, 0, 0)


def test_a_run_is_not_begun_whose_tasks_do_not_fit(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 9)
    for number in range(3):
        assert report(server, run, number, status="done", elapsed=80 if number else 1) == 204
    output = Work(server, run, "--until", "+60", "--", "touch", str(tmp_path / "ran")).end(10)
    assert "too short: a task takes up to 80 s" in output and not (tmp_path / "ran").exists()
    assert counts(server, run) == (6, 0, 3, 0)
    Work(server, run, "--until", "+60", "--task-time", "1", "--", "true").end(0)


class SimulatedFarm:
    """Workers that share a run, on a clock of its own: all of a farm but processes, requests and leases."""
    SEND_S, START_S = taskfarm.SEND_S, 0.002

    def __init__(self, took_s: Sequence[float], workers: int, jobs: int, latency_s: float, idle_s: float = 120) -> None:
        self.took_s, self.jobs, self.latency_s = took_s, jobs, latency_s
        self.waiting, self.held, self.ended = list(range(len(took_s))), 0, 0
        self.supplies = [taskfarm.Supply(jobs, idle_s) for _ in range(workers)]
        self.busy = [0] * workers
        self.now, self.makespan = 0.0, 0.0
        self.left: Dict[int, float] = {}            # when each worker left
        self.claims = self.given_back = 0
        self.events: List[Tuple[float, int, Callable[..., None], Tuple[Any, ...]]] = []
        self.number = itertools.count()
        for worker in range(workers):
            self.after(0.0, self.turn, worker)

    def after(self, wait_s: float, what: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self.events, (self.now + wait_s, next(self.number), what, arguments))

    def run(self) -> float:
        """Work until all workers have left; when the last task ended."""
        for _ in range(200000):
            if not self.events:
                break
            self.now, _, what, arguments = heapq.heappop(self.events)
            what(*arguments)
        assert len(self.left) == len(self.supplies)
        return self.makespan

    def turn(self, worker: int) -> None:
        supply = self.supplies[worker]
        while supply.ready and self.busy[worker] < self.jobs:
            self.busy[worker] += 1
            took_s = self.START_S + self.took_s[supply.ready.popleft().task]
            self.after(took_s, self.end, worker, took_s)
        old = [ready.task for ready in supply.surplus(self.now)]
        if old:
            self.after(self.SEND_S + self.latency_s / 2, self.give_back, old)
        count = supply.wants(self.now, self.busy[worker])
        if count:
            supply.asked(self.now)
            self.after(self.latency_s / 2, self.claim, worker, count)
        elif supply.knows_of_none and supply.leaves and not self.busy[worker]:
            self.left.setdefault(worker, self.now)
        elif supply.next_look(self.busy[worker]) < math.inf:
            self.after(max(supply.next_look(self.busy[worker]) - self.now, 1e-6), self.turn, worker)

    def end(self, worker: int, took_s: float) -> None:
        self.busy[worker] -= 1
        self.held -= 1
        self.ended += 1
        self.makespan = self.now
        self.supplies[worker].ended(self.now, took_s)
        self.supplies[worker].reported = True
        self.turn(worker)

    def give_back(self, tasks: List[int]) -> None:
        self.given_back += len(tasks)
        self.held -= len(tasks)
        self.waiting = sorted(self.waiting + tasks)

    def claim(self, worker: int, count: int) -> None:
        self.claims += 1
        if count > taskfarm.ALL_CLAIMED:
            count = min(count, max(taskfarm.ALL_CLAIMED, len(self.waiting) // 4))
        tasks, self.waiting = self.waiting[:count], self.waiting[count:]
        self.held += len(tasks)
        self.after(self.latency_s / 2, self.answer, worker, tasks, 60.0 if self.held else None, self.held)

    def answer(self, worker: int, tasks: List[int], retry_s: Optional[float], computing: int) -> None:
        if tasks:
            self.supplies[worker].add(self.now, [(task, 1) for task in tasks])
        else:
            self.supplies[worker].none_left(self.now, retry_s, computing)
        self.turn(worker)


@pytest.mark.parametrize("latency_s", [0.001, 0.003, 0.02])
@pytest.mark.parametrize("workers, took_s", [
    *((case.workers, case.took_s) for case in taskfarm.MAKESPAN.values()),
    (20, [0.01] * 4000 + [5.0] * 80), (3, [0.2] * 300), (3, [0.4] * 300), (3, [0.6] * 300), (2, [0.1, 2.0] * 40)])
def test_no_long_task_waits_behind_others_while_a_worker_is_idle(workers: int, took_s: List[float],
                                                                 latency_s: float) -> None:
    random.seed(1)
    farm = SimulatedFarm(took_s, workers, 2, latency_s)
    best_s = taskfarm.list_schedule([farm.START_S + task_s for task_s in took_s], 2 * workers)
    assert farm.run() < 1.15 * best_s
    assert farm.ended == len(took_s) and not farm.waiting


def test_short_tasks_are_claimed_many_at_once_and_kept() -> None:
    farm = SimulatedFarm([0.001] * 5000, 1, 4, 0.003)
    farm.run()
    assert farm.claims < 100 and farm.given_back == 0
    for task_s in (0.2, 0.28, 0.35, 1.0, 60.0):
        farm = SimulatedFarm([task_s] * 400, 1, 4, 0.003)
        farm.run()
        assert farm.given_back <= 4, "nothing is claimed that would not be started soon"


def test_a_slow_claim_is_made_earlier() -> None:
    supply = taskfarm.Supply(1, 120)
    quick = supply.hold_s
    for now in range(50):
        supply.asked(now)
        supply.add(now + 0.04, [])
    assert quick < supply.hold_s < 2 * taskfarm.CLAIM_AHEAD_S[1]
    supply.asked(0)
    supply.add(900, [(1, 1)])       # an outage
    assert supply.hold_s == 2 * taskfarm.CLAIM_AHEAD_S[1]


def test_what_is_not_started_soon_is_given_back_counted_from_its_claim() -> None:
    supply = taskfarm.Supply(2, 120)
    assert supply.wants(0.0, 0) == 2
    supply.asked(0.0)
    assert supply.wants(0.0, 0) == 0, "one claim at a time"
    supply.add(0.0, [(task, 1) for task in range(5)])
    supply.ready.popleft()          # a start does not let the others begin anew
    assert supply.surplus(0.9 * supply.hold_s) == [] and supply.next_look(2) == supply.hold_s
    assert [ready.task for ready in supply.surplus(supply.hold_s)] == [1, 2, 3, 4] and not supply.ready
    assert supply.wants(supply.hold_s, 2) == 0 and supply.wants(supply.hold_s, 1) == 1


@pytest.mark.parametrize("took_s, jobs, computing, idle_s, stays_s", [
    ([], 4, 1, 120, 120),               # nothing is known of the tasks
    ([75.0], 1, 1, 120, 75),            # what may come back takes 75 s
    ([75.0], 4, 2, 120, 75 * 2 / 4),    # the same, for a worker that would do two in that time
    ([75.0], 1, 9, 120, 120), ([0.01], 4, 1, 120, taskfarm.IDLE_LEAST_S), ([0.01], 4, 1, 3, 3), ([75.0], 1, 1, 0, 0)])
def test_a_worker_stays_no_longer_than_what_may_come_back_is_worth(
        took_s: List[float], jobs: int, computing: int, idle_s: float, stays_s: float) -> None:
    supply, now, looks = taskfarm.Supply(jobs, idle_s, took_s), 100.0, 0
    while not supply.leaves:
        assert supply.wants(now, 0) == jobs and looks < 60
        looks += 1
        supply.asked(now)
        supply.none_left(now, 60.0, computing)
        now = max(supply.next_look(0), now)
    assert now - 100 == pytest.approx(stays_s, abs=0.02)


def test_a_worker_leaves_at_once_when_nothing_can_come_back() -> None:
    supply = taskfarm.Supply(2, 120)
    supply.asked(1.0)
    supply.none_left(1.0, 60.0, 0)
    assert supply.knows_of_none and not supply.leaves and supply.wants(1.1, 0) == 0
    supply.reported = True              # what the farm took for computing was ours
    assert supply.wants(1.1, 1) == supply.wants(1.1, 0, 1) == 0 and supply.wants(1.1, 0) == 2
    supply.asked(1.1)
    assert not supply.knows_of_none
    supply.none_left(1.1, None, 0)
    assert supply.knows_of_none and supply.leaves


def test_nothing_falls_due_while_a_worker_is_stopped() -> None:
    options = taskfarm.WorkOptions(1, 60.0, 5.0, False, True, None, lambda: math.inf, "", False)
    work = taskfarm.TaskRunner(taskfarm.Client(lambda: taskfarm.find_access({})), {"uuid": "x", "numDone": 0},
                             taskfarm.Template(["true"], "x"), options, taskfarm.Display(False, {}))
    running, ended = taskfarm.Command(0, 1, 0, 1000.0), taskfarm.Command(1, 1, 0, 1000.0)
    ended.kill_at = 1010.0
    work.running, work.ending, work.unconfirmed = {1: running}, [ended], [(1020.0, 2, ended)]
    work._leave_out(3600.0)
    assert (running.started, running.kill_at, ended.kill_at) == (4600.0, float("inf"), 4610.0)
    assert work.unconfirmed[0][0] == 4620.0


def test_what_was_claimed_ahead_and_cannot_be_started_is_given_back(server: Process, tmp_path: Path) -> None:
    run = new_run(server, 200)
    work = Work(server, run, "--grace", "0.1", "--", "sh", "-c", "[ {task} -lt 20 ] || sleep 1000")
    wait_until(lambda: counts(server, run)[:3] == (179, 1, 20))
    work.end(7, signal.SIGTERM)
    assert counts(server, run) == (180, 0, 20, 0)


def test_the_standard_output_is_what_commands_print_in_whole_lines(server: Process) -> None:
    run = new_run(server, 6)
    script = "for part in a b c; do printf %s- $part; sleep 0.02; done; echo {task}; echo why {task} >&2; printf end"
    expected = [line for task in range(6) for line in ("a-b-c-%d" % task, "end")]
    work = Work(server, run, "-j", "6", "--", "sh", "-c", script)
    shown = work.end(0)
    assert sorted(work.printed().splitlines()) == sorted(expected)
    assert shown.count("why ") == shown.count(" done in ") == 6 and "a-" not in shown and "6 done, 0 failed" in shown
    server.ask("POST", "/api/runs/%s/restart?all=True" % run)
    work = Work(server, run, "-j", "6", "--quiet", "--tag", "--", "sh", "-c", script)
    assert re.findall(r"(?m)^(\d)\twhy \1$", work.end(0)) and "done in" not in work.shown()
    assert sorted(work.printed().splitlines()) == sorted(
        "%d\t%s" % (number // 2, line) for number, line in enumerate(expected))


def test_lines_are_put_together_of_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskfarm, "LINE_MEMORY", 10)
    one, two = taskfarm.Command(1, 1, 0, 0.0), taskfarm.Command(22, 1, 1, 0.0)
    one.pid, two.pid = 100, 200

    def passed_on(tag: bool, *parts: Tuple[taskfarm.Command, bytes]) -> bytes:
        display = taskfarm.Display(False, {}, tag)
        display.terminals[1] = False
        for command, text in parts:
            display.pass_on(command, 1, text)
        assert not any(display.partial.values())
        return b"".join(text for _, text in display.pending)

    mixed = (one, b"a"), (two, b"b\n\nc"), (one, b"d\n"), (two, b""), (one, b"")
    assert passed_on(False, *mixed) == b"b\n\nad\nc\n"
    assert passed_on(True, *mixed) == b"22\tb\n22\t\n1\tad\n22\tc\n"
    bar = (one, b"\r 1%\r 2%"), (one, b"\r99%\nx\r\n"), (one, b"")
    assert passed_on(True, *bar) == b"1\t99%\n1\tx\r\n", "what would be left on a terminal"
    assert passed_on(False, *bar) == b"\r 1%\r 2%\r99%\nx\r\n", "and every byte in a file"
    assert passed_on(False, (one, b"x" * 10), (one, b"y"), (one, b"z\n"), (one, b"")) == b"x" * 10 + b"y\nz\n"


def test_a_full_disk_behind_the_standard_output_is_no_task_done(server: Process) -> None:
    run = new_run(server, 20)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(MODULE), "work", run, "-j", "2", "--", "echo", "{task}"], stdout=full,
            stderr=subprocess.PIPE, text=True, timeout=60, env=dict(os.environ, HOME=server.home))
    assert done.returncode == 1 and counts(server, run) == (20, 0, 0, 0)
    assert done.stderr.count("the standard output cannot be written: No space left") == 1


def test_a_worker_in_the_background_draws_no_bar(server: Process) -> None:
    run = new_run(server, 3)
    words = " ".join([sys.executable, str(MODULE), "work", run, "--", "sleep", "0.1"])
    for script, drawn in (("%s & wait $!" % words, False), (words, True)):
        outside, inside = os.openpty()
        shell = subprocess.Popen(
            ["sh", "-mc", script], stdin=inside, stdout=inside, stderr=inside, start_new_session=True,
            env=dict(os.environ, HOME=server.home, TERM="xterm"),
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(inside)
        shown = b""
        with contextlib.suppress(OSError):      # EIO at the end
            for part in iter(lambda: os.read(outside, 65536), b""):     # noqa: B023
                shown += part
        os.close(outside)
        assert shell.wait(20) == 0 and b"3 done, 0 failed" in shown
        assert (b"\x1b[J" in shown) is drawn, shown
        server.ask("POST", "/api/runs/%s/restart?all=True" % run)


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
        assert "of 4" in text and "\x1b[J[" in text and text.count("from the command\r\n") == 4
        assert ("\x1b[31mtask 2 failed" in text) is coloured
        assert re.search(r"(\n|\x1b\[J)task 1 done in", text)
        bars = re.findall(r"\[[^\r\n]* here[^\r\n]*", re.sub(r"\x1b\[[0-9]*[mJ]", "", text))
        assert bars and all(len(line) < 60 for line in bars)
        assert text.endswith("0 computing, 0 waiting\r\n"), "the bar is gone at the end"
        server.ask("POST", "/api/runs/%s/restart?all=True" % run)


# ---------------------------------------------------------------- BATCH SYSTEMS

def test_the_end_of_a_job_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path) + ":" + os.environ["PATH"])
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        def program(name: str, text: str) -> None:
            (tmp_path / name).write_text("#!/bin/sh\n%s\n" % text)
            (tmp_path / name).chmod(0o755)

        def end(**environ: str) -> Optional[float]:
            said.clear()
            job = taskfarm.BatchJob(dict(environ, PATH=os.environ["PATH"]), said.append)
            job.wait(20)
            return job.end_s

        said: List[str] = []
        assert end() == math.inf and not said
        assert end(SLURM_JOB_ID="7", SLURM_JOB_END_TIME="1800000000") == 1800000000 and "the job ends at" in said[0]
        program("scontrol", 'echo "$@" > %s/asked; date -d @1795431543 "+   EndTime=${SLURM_TIME_FORMAT:-%%c} x=1"'
                % tmp_path)
        local = 1795431543.0        # 2026-11-23T10:59:03Z
        assert end(SLURM_JOB_ID="7", SLURM_TIME_FORMAT="relative") == local
        assert said == ["the job ends at 2026-11-23 19:59:03"]
        assert end(SLURM_JOB_ID="7", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3") == local
        assert (tmp_path / "asked").read_text() == "show job 7_3\n"
        program("scontrol", "echo EndTime=Unknown")
        assert end(SLURM_JOB_ID="7") == math.inf and not said
        program("scontrol", "echo 'slurm_load_jobs error: Socket timed out' >&2; exit 1")
        assert end(SLURM_JOB_ID="7") is None and "timed out" in said[0] and "--until" in said[0]
        assert end(LSB_JOBID="7") is None and "--until" in said[0] and end(SGE_TASK_ID="undefined") is None
        for text, expected in (
                ("    Resource_List.walltime = 02:00:00\n    stime = Mon Nov 23 17:59:03 2026\n    etime = x\n", local),
                ("    Resource_List.walltime = 02:00:00\n    start_time = Mon Nov 23 17:59:03 2026\n", local),
                ("    resources_used.walltime = 00:30:00\n    Resource_List.walltime = 02:00:00\n", 1000 + 5400.0),
                ("    Resource_List.ncpus = 2\n", math.inf), ("qstat: cannot connect to server head", None),
                ("    Resource_List.walltime = soon\n", None)):
            assert taskfarm.pbs_end("Job Id: 1.host\n" + text, 1000.0 if "used" in text else local, 0.0) == expected
        program("qstat", "echo qstat: cannot connect to server head >&2; exit 1")
        assert end(PBS_JOBID="1.host") is None and "cannot connect" in said[0]
        now = local - 3600
        for text, moment in (("+90", now + 90), ("19:59", local - 3), ("18:59", local - 3603 + 86400),
                             ("2026-11-23T19:59:03", local), ("2026-11-23T10:59:03Z", local)):
            assert taskfarm.moment_of(text, now) == moment
        for text in ("25:00", "tomorrow", "+x", "", "+nan", "+inf", "+1e15"):
            with pytest.raises((ValueError, OverflowError)):
                taskfarm.moment_of(text, now)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_the_end_of_a_job_is_asked_again(tmp_path: Path) -> None:
    def answer(text: str) -> None:
        (tmp_path / "qstat").write_text("#!/bin/sh\n%s\n" % text)
        (tmp_path / "qstat").chmod(0o755)

    def end_after(seconds: float, suspended: bool = False) -> float:
        job.asked_at -= seconds
        job.ask_at -= seconds
        job.looked_at -= seconds * suspended
        job.end()
        if job.process is not None:
            job.process.wait(20)
        return job.end()

    said: List[str] = []
    answer("exec sleep 1000")
    job = taskfarm.BatchJob({"PBS_JOBID": "7", "PATH": str(tmp_path) + ":" + os.environ["PATH"]}, said.append)
    hanging = job.process
    job.asked_at -= taskfarm.ANSWER_S
    assert job.end() == math.inf and len(said) == 1 and "qstat does not answer" in said[0]
    assert hanging is not None and hanging.wait(20) == -signal.SIGKILL
    started = time.time() // 1 - 7000
    shown = "echo '  stime = %s\n  Resource_List.walltime = 1:00:00'\n" % time.strftime(
        "%a %b %d %H:%M:%S %Y", time.localtime(started))
    answer(shown)
    assert end_after(30) == math.inf
    assert end_after(70) == started + 3600 and len(said) == 2 and "the job ends at" in said[1]
    assert end_after(7000) == started + 3600 and len(said) == 2
    answer(shown + "echo '  resources_used.walltime = 0'")
    assert abs(end_after(7000, suspended=True) - started - 7000 - 3600) < 60, "all of its time is left"
    answer("exit 1")
    assert end_after(7000, suspended=True) == math.inf, "the former end has passed, and a worker would leave"
    job.close()


def test_what_was_forgotten_at_the_start_of_a_job_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def warnings(jobs: int = 1, **environ: str) -> List[str]:
        return list(taskfarm.job_warnings(environ, jobs))

    cores, parent = len(os.sched_getaffinity(0)), str(os.getppid())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    assert warnings(cores + 1, SLURM_TASK_PID=parent) == [], "this is no job"
    assert warnings(cores, SLURM_JOB_ID="1", SLURM_JOB_NUM_NODES="1", SLURM_TASK_PID=str(os.getpid())) == []
    assert warnings(cores, SLURM_JOB_ID="1", SLURM_JOB_NUM_NODES="2", SLURM_STEP_ID="0") == []
    (exec_,) = warnings(SLURM_JOB_ID="1", SLURM_JOB_NUM_NODES="1", SLURM_TASK_PID=parent)
    (srun,) = warnings(SLURM_JOB_ID="1", SLURM_JOB_NUM_NODES="2", SLURM_TASK_PID=parent)
    (slurm,) = warnings(cores + 1, SLURM_JOB_ID="1")
    (pbs,) = warnings(cores + 1, PBS_JOBID="1")
    assert "'exec python3" in exec_ and "'srun -c 1" in srun
    assert "-c %d" % (cores + 1) in slurm and "-c" not in pbs and "-j %d" % cores in pbs
    for environ, jobs in (({}, 1), ({"SLURM_CPUS_PER_TASK": "16"}, 16), ({"PBS_JOBID": "1", "NCPUS": "3"}, 3),
                          ({"NCPUS": "3"}, 1)):
        assert taskfarm.default_jobs(environ) == jobs


# ---------------------------------------------------------------- DOCTOR

def doctor(*words: str, **environ: str) -> Tuple[int, Dict[str, Tuple[str, str]]]:
    """Exit status of doctor, and verdict and sentence of each thing."""
    done = run_verb("doctor", "--json", *words, **environ)
    assert done.stderr == "", done.stderr
    found = json.loads(done.stdout)
    assert found["fit"] is (done.returncode == 0)
    return done.returncode, {line["what"]: (line["verdict"], line["says"]) for line in found["data"]}


def test_doctor_finds_a_node_fit_and_leaves_nothing_behind(tmp_path: Path) -> None:
    server = Process(str(tmp_path / "f"))
    before = sorted(tmp_path.iterdir())
    status, found = doctor("--db", str(tmp_path / "f"), "--port", str(server.port), HOME=server.home)
    assert status == 0 and {verdict for verdict, _ in found.values()} == {"ok"}, found
    assert found["port %d" % server.port] == ("ok", "in use by your own farm")
    assert "127.0.0.1 port %d" % server.port in found["server"][1] and "--host 0.0.0.0" in found["server"][1]
    assert "median" in found["answers"][1] and "access.json" in found["login"][1]
    assert "process %d on" % server.process.pid in found["farm"][1]
    assert sorted(tmp_path.iterdir()) == before
    assert server.ask("GET", "/api/runs") == (200, {"data": []})
    plain = run_verb("doctor", "--db", str(tmp_path / "f"), HOME=server.home)
    assert re.match(r"ok    Python       ?3", plain.stdout) and "\x1b" not in plain.stdout
    assert len(plain.stdout.splitlines()) == len(found), "a finding is a line"
    assert server.end(signal.SIGTERM) == 0


def test_doctor_before_anything_is_there_warns_and_says_what_to_do(tmp_path: Path) -> None:
    status, found = doctor("--port", "0", HOME=str(tmp_path))
    assert status == 0 and found["port 0"][0] == "ok"
    assert found["server"][0] == "warn" and "login URL" in found["server"][1]


def test_doctor_says_what_does_not_work(tmp_path: Path) -> None:
    server = Process(str(tmp_path / "f"))
    access = Path(server.home, ".config/taskfarm/access.json")
    good = json.loads(access.read_text())
    access.write_text(json.dumps(dict(good, token=good["token"][:-1] + "?")))
    status, found = doctor(HOME=server.home)
    assert status == 1 and found["login"][0] == "FAIL" and "taskfarm.py login" in found["login"][1]
    access.write_text(json.dumps(dict(good, certificate=anothers()[0])))
    status, found = doctor(HOME=server.home)
    assert status == 1 and "is not the farm" in found["server"][1] and "login" not in found
    assert "--advertise" not in found["server"][1], "it does answer"
    assert server.end(signal.SIGTERM) == 0
    status, found = doctor("--db", "/nowhere/at/all/f", "--url", "https://no.such.host.invalid", HOME=str(tmp_path))
    assert status == 1 and found["file system"][0] == "FAIL" and "--advertise" in found["server"][1]


def test_doctor_says_where_nothing_can_be_written_for_workers(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for environ in ({"XDG_CONFIG_HOME": str(tmp_path / "file")}, {"XDG_STATE_HOME": str(tmp_path / "file")}):
        _, found = doctor(HOME=str(tmp_path), **environ)
        assert found["home"][0] == "warn" and "XDG_" in found["home"][1], environ


def test_a_user_without_a_home_gets_no_folder_called_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> Any:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "TASKFARM_ACCESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert taskfarm.access_path(os.environ) == "./.config/taskfarm/access.json"
    assert taskfarm.state_folder(os.environ) == "./.local/state/taskfarm"
    assert [finding.verdict for finding in taskfarm.check_home()] == ["warn"]


def test_doctor_says_who_has_the_port(tmp_path: Path) -> None:
    with contextlib.closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        _, found = doctor("--port", str(port), HOME=str(tmp_path))
        assert found["port %d" % port][0] == "warn" and "--port 0" in found["port %d" % port][1]
        assert "user %s has it" % pwd.getpwuid(os.getuid()).pw_name in found["port %d" % port][1]


def test_doctor_takes_a_farm_for_yours_when_it_can_prove_it(farm: Live, tmp_path: Path) -> None:
    path = tmp_path / "access.json"
    for certificate, verdict in ((anothers()[0], "warn"), (farm.service.certificate, "ok")):
        taskfarm.write_access(str(path), dict(file_of(farm), certificate=certificate))
        _, found = doctor("--port", str(farm.port), TASKFARM_ACCESS=str(path))
        assert found["port %d" % farm.port][0] == verdict


def test_doctor_does_not_wait_for_what_hangs(tmp_path: Path) -> None:
    silent = threading.Event()

    def hangs() -> Iterator[taskfarm.Finding]:
        yield taskfarm.Finding("ok", "first", "this came")
        silent.wait(60)

    def fails() -> Iterator[taskfarm.Finding]:
        raise ZeroDivisionError("oh")
        yield
    found = list(taskfarm.run_checks([("slow", hangs), ("broken", fails), ("programs", taskfarm.check_programs)], 0.2))
    silent.set()
    assert [(finding.what, finding.verdict) for finding in found] == [
        ("first", "ok"), ("slow", "FAIL"), ("broken", "FAIL"), ("Python", "ok"), ("SQLite", "ok")]
    with contextlib.closing(socket.socket()) as mute:       # it takes connections and never says a word
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        status, found_ = doctor("--url", "http://127.0.0.1:%d" % mute.getsockname()[1], HOME=str(tmp_path))
    assert status == 1 and found_["server"][0] == "FAIL" and found_["Python"][0] == "ok"


def test_doctor_says_when_the_job_ends_and_what_workers_left(tmp_path: Path) -> None:
    _, found = doctor(HOME=str(tmp_path), SLURM_JOB_ID="1", SLURM_JOB_END_TIME=str(int(time.time()) + 7250))
    assert found["job"][0] == "ok" and "2 h" in found["job"][1]
    _, found = doctor(HOME=str(tmp_path), SLURM_JOB_ID="1", SLURM_JOB_END_TIME=str(int(time.time()) - 7250))
    assert found["job"][0] == "warn" and "2 h 0 min ago" in found["job"][1]
    _, found = doctor(HOME=str(tmp_path), PBS_JOBID="1", PATH="")
    assert found["job"][0] == "warn" and "--until" in found["job"][1] and "leftovers" not in found
    taskfarm.write_access(str(tmp_path / ".local/state/taskfarm/unsent-w.json"), {})
    _, found = doctor(HOME=str(tmp_path))
    assert found["leftovers"][0] == "warn" and "1 file" in found["leftovers"][1] and "job" not in found


def test_doctor_knows_the_file_system_of_a_folder() -> None:
    mounts = ("22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n30 22 0:40 / /home rw - nfs4 server:/home rw,vers=4.2\n"
              "31 22 0:41 / /scratch\\040two rw - lustre mds@tcp:/s rw\n32 22 0:42 / /home rw - tmpfs x rw\n")
    assert taskfarm.mount_of("/home/ada/x", mounts) == ("/home", "tmpfs"), "the later mount is the one that is seen"
    assert taskfarm.mount_of("/scratch two/f", mounts) == ("/scratch two", "lustre")
    assert taskfarm.mount_of("/homes/ada", mounts) == ("/", "ext4")


def test_doctor_finds_locks_that_keep_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [finding.verdict for finding in taskfarm.try_locks(str(tmp_path / "f"), "ext4")] == ["ok"]
    monkeypatch.setattr(taskfarm.fcntl, "flock", lambda *_: None)       # as where they are mounted away
    assert [finding.verdict for finding in taskfarm.try_locks(str(tmp_path / "f"), "ext4")] == ["FAIL"]

    def refuse(*_: Any) -> None:
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(taskfarm.fcntl, "flock", refuse)
    (found,) = taskfarm.try_locks(str(tmp_path / "f"), "lustre")
    assert found.verdict == "FAIL" and "-o flock" in found.says


# ---------------------------------------------------------------- SUBMIT

def a_plan(**more: Any) -> taskfarm.JobPlan:
    plan = taskfarm.JobPlan("Slurm", "tf-3f2a91c4", 50, 150, 14400, 16, "/work/a 100%/tf-3f2a91c4", [], [], {},
                            ["/usr/bin/python3", "/work/taskfarm.py", "work", "3f2a", "--", "./a b", "{task}"])
    return plan._replace(**more)


def test_what_slurm_and_pbs_are_asked() -> None:
    slurm = taskfarm.submit_words(a_plan(extra=["-p", "low"]))
    assert slurm == ["sbatch", "--parsable", "-J", "tf-3f2a91c4", "--array=1-150%50", "-t", "4:00:00", "-c", "16",
                     "--requeue", "--open-mode=append", "-o", "/work/a 100%%/tf-3f2a91c4/tf-3f2a91c4-%A_%a.out",
                     "-p", "low"]
    pbs = taskfarm.submit_words(a_plan(system="PBS"))
    assert pbs == ["qsub", "-N", "tf-3f2a91c4", "-J", "1-150%50", "-l", "select=1:ncpus=16", "-l", "walltime=4:00:00",
                   "-j", "oe", "-o", "/work/a 100%/tf-3f2a91c4/", "-S", "/bin/sh"]
    one = taskfarm.submit_words(a_plan(system="PBS", width=1, total=1, jobs=None, extra=["-l", "nodes=1:ppn=4"]))
    assert "-J" not in one and "select=1:ncpus=16" not in one, "PBS refuses an array of one, and nodes beside select"
    assert "-c" not in taskfarm.submit_words(a_plan(jobs=None))
    script = taskfarm.job_script(a_plan(setup=["module load gdal"], exports={"TASKFARM_URL": "https://a:5"}))
    assert script.splitlines() == [
        "#!/bin/bash -l", "cd '/work/a 100%' || exit", "export TASKFARM_URL=https://a:5", "{ module load gdal",
        "} || exit",
        "exec /usr/bin/python3 /work/taskfarm.py work 3f2a -- './a b' '{task}'"]
    for text, seconds in (("90", 5400), ("1:30", 90), ("4:00:00", 14400), ("1-12", 129600), ("1-00:00:01", 86401)):
        assert taskfarm.walltime_seconds(text) == seconds
    for text in ("4h", "", "0", "1:2:3:4", "-5"):
        with pytest.raises(ValueError):
            taskfarm.walltime_seconds(text)


def test_as_many_jobs_follow_as_the_run_needs() -> None:
    assert taskfarm.generations_needed(1000, 60.0, 100, 14400) == 1
    assert taskfarm.generations_needed(200000, 240.0, 800, 14400) == 5      # 60 000 s of work in 14 160 s each
    assert taskfarm.generations_needed(10, 14400.0, 10, 14400) > 1, "no division by zero"
    assert taskfarm.generations_needed(0, 60.0, 1, 60) == 1
    assert [taskfarm.cores_asked("Slurm", jobs, extra) for jobs, extra in (
        (4, ["-c", "8"]), (None, ["-c", "8"]), (None, ["--cpus-per-task=3"]), (None, []))] == [4, 8, 3, 1]
    assert taskfarm.cores_asked("PBS", None, ["-l", "select=1:ncpus=6:mem=4gb"]) == 6


def test_jobs_that_could_do_nothing_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskfarm, "NOT_SHARED", ())
    path = tmp_path / "access.json"
    path.write_text("{}")
    run = {"uuid": "3f2a91c4" * 4, "numWaiting": 5, "numComputing": 0, "numDone": 9, "numFailed": 1}

    def refusal(url: str = "https://login1:5000", source: str = str(path), needs_file: bool = True,
                took_s: Sequence[float] = (10.0,), **more: Any) -> str:
        access = taskfarm.Access(url, "", "t", "", "", "", source)
        try:
            taskfarm.refuse_submission(access, dict(run, **more), took_s, 3600, needs_file)
        except Refusal as error:
            return str(error)
        return ""
    assert refusal() == refusal(took_s=()) == ""
    assert "--host 0.0.0.0" in refusal(url="https://127.0.0.1:5000")
    assert "restart 3f2a91c4 --failed" in refusal(numWaiting=0) and "restart" not in refusal(numWaiting=0, numFailed=0)
    assert "-t 1:06:51" in refusal(took_s=[10.0, 4000.0])
    assert "login https://login1:5000" in refusal(source="TASKFARM_TOKEN")
    assert refusal(source="TASKFARM_TOKEN", needs_file=False) == "", "Slurm hands the environment on"
    monkeypatch.setattr(taskfarm, "NOT_SHARED", (str(tmp_path),))
    assert "this machine alone" in refusal()


SQUEUE_LINES = """\
1234_[5-7,9-200%50]|PD|tf-a|JobArrayTaskLimit
1234_3|R|tf-a|None
1234_4|CG|tf-a|None
99_[1-4]|PD|tf-b|PartitionTimeLimit
99_[6,8-9]|PD|tf-b|Nodes required for job are DOWN, DRAINED or reserved
"""
QSTAT_JSON = json.dumps({"Jobs": {
    "75[].head": {"Job_Name": "tf-a", "job_state": "B", "array_state_count": "Queued:3 Running:2 Exiting:0 Expired:4 ",
                  "array_indices_remaining": "3-4,8", "comment": "Job Array Began"},
    "76.head": {"Job_Name": "tf-b", "job_state": "Q",
                "comment": "Can Never Run: Insufficient amount of resource: ncpus (R: 64 A: 32 T: 32)"}}})


def test_what_squeue_and_qstat_say_is_read() -> None:
    assert taskfarm.read_squeue(SQUEUE_LINES) == {
        "tf-a": (1, ["1234_[5-7,9-200%50]", "1234_3", "1234_4"], {"JobArrayTaskLimit": 195}),
        "tf-b": (0, ["99_[1-4]", "99_[6,8-9]"],
                 {"PartitionTimeLimit": 4, "Nodes required for job are DOWN, DRAINED or reserved": 3})}
    assert taskfarm.read_squeue("") == {} and taskfarm.read_squeue("nonsense\n") == {"": (1, ["nonsense"], {})}
    found = taskfarm.read_qstat(QSTAT_JSON)
    assert found["tf-a"] == (2, [], {"Job Array Began": 3})
    ((reason, number),) = found["tf-b"].reasons.items()
    assert number == 1 and taskfarm.PERMANENT.search(reason)
    for reason, permanent in (("PartitionTimeLimit", True), ("Priority", False), ("QOSMaxJobsPerUserLimit", False),
                              ("QOSMaxWallDurationPerJobLimit", True), ("InvalidAccount", True), ("Resources", False)):
        assert bool(taskfarm.PERMANENT.search(reason)) is permanent
    assert [taskfarm.numbers_in(text) for text in ("5-200%50", "1,3-5", "1-9:2", "-")] == [196, 4, 5, 0]


def test_jobs_in_a_row_that_failed_at_once_are_counted() -> None:
    def row(*reasons: Optional[str], array: str = "slurm:7_%d") -> List[Dict[str, Any]]:
        return [{"uuid": array % number, "job": array % number, "why": why} for number, why in enumerate(reasons)]
    fails = row("x", None, "x", "x", "x", None)
    assert [taskfarm.failed_in_row(fails, "slurm:7_%d" % number) for number in range(6)] == [1, 0, 3, 3, 3, 0]
    others = row("x", "x", array="slurm:8_%d")
    assert taskfarm.failed_in_row([fails[2], *others, fails[3]], "slurm:7_2") == 2, "others' arrays count for nothing"
    assert taskfarm.failed_in_row([{"uuid": "a", "job": "slurm:7", "why": "x"}], "a") == 0
    assert [taskfarm.array_of(job) for job in ("slurm:12_3", "slurm:12", "pbs:75[1].head", "pbs:76.head", "")] == [
        "12", "", "75[].head", "", ""]


class Batch:
    """Programs of a batch system in a folder, which print what real ones do. `asked` is how they were called."""

    def __init__(self, folder: Path, **texts: str) -> None:
        self.folder = folder / "bin"
        self.folder.mkdir(parents=True)
        for name, text in texts.items():
            self.answer(name, text)

    def answer(self, name: str, text: str) -> None:
        (self.folder / name).write_text('#!/bin/sh\necho %s "$@" >> %s\n%s\n' % (name, self.folder / "asked", text))
        (self.folder / name).chmod(0o755)

    def asked(self, name: str = "") -> List[str]:
        path = self.folder / "asked"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(name)]


@pytest.fixture
def submit(server: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
           capsys: pytest.CaptureFixture) -> Iterator[Callable[..., Tuple[int, str]]]:
    """`submit` in this process, for a farm that other nodes could reach: its status and all that it said."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "PBS_", "SBATCH_", "TASKFARM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", server.home)
    monkeypatch.setenv("PATH", "%s:%s" % (tmp_path / "bin", os.environ["PATH"]))
    monkeypatch.setenv("TASKFARM_URL", "https://0.0.0.0:%d" % server.port)      # the machine itself, by another name
    monkeypatch.setattr(taskfarm, "NOT_SHARED", ())
    monkeypatch.setattr(taskfarm, "SEND_AGAIN_S", (0.01, 0.02, 0.03))
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> Tuple[int, str]:
        status = taskfarm.main(["submit", *words])
        return status, "".join(capsys.readouterr())
    yield call


SOME = "-n", "2", "-t", "1:00:00"


def test_an_array_is_sent_and_found_again(server: Process, tmp_path: Path, submit: Any) -> None:
    run = make_run(server, 5)
    name = "tf-" + run[:8]
    slurm = Batch(tmp_path, sbatch="cat > %s; echo 1234" % (tmp_path / "script"),
                  squeue="[ -z $SQUEUE_FORMAT ] || exit 1; echo '1234_[2-4%%2]|PD|%s|PartitionTimeLimit'; "
                  "echo '1234_1|R|%s|None'" % (name, name), scancel="")
    status, said = submit(run, *SOME, "-j", "3", "--with", "-plow", "--idle", "7", "--dry-run", "--", "./x", "{task}")
    assert status == 0 and "sbatch --parsable" in said and "exec " in said and slurm.asked() == []
    status, said = submit(run, *SOME, "-j", "3", "--with", "-plow", "--idle", "7", "--", "./x", "{task}")
    assert status == 0 and "1234: 2 jobs called tf-%s" % run[:8] in said and "not known yet" in said
    (call,) = slurm.asked("sbatch")
    assert "-c 3" in call and call.endswith(" -plow") and (tmp_path / ("tf-" + run[:8])).is_dir()
    script = (tmp_path / "script").read_text()
    assert script.endswith("exec %s %s work %s --leave-ok --jobs 3 --idle 7 -- ./x '{task}'\n" % (
        sys.executable, MODULE, run)) and "TASKFARM_URL" in script
    token = json.loads(Path(server.home, ".config/taskfarm/access.json").read_text())["token"]
    assert token not in script + call, "no secret"
    for _ in range(2):
        jobs = json.loads(run_verb("status", run, "--json", SQUEUE_FORMAT="%i").stdout)["jobs"]
        assert jobs == {"running": 1, "pending": {"PartitionTimeLimit": 3}, "failed": [], "stopped": False}
    assert "will never begin: PartitionTimeLimit" in run_verb("status", run).stdout
    assert len(slurm.asked("squeue")) == 1, "once a minute"
    assert submit(run, "--cancel")[0] == 0 and slurm.asked("scancel") == [
        "scancel --user %s --name tf-%s" % (pwd.getpwuid(os.geteuid()).pw_name, run[:8])]


def test_no_answer_of_the_batch_system_is_no_line(server: Process, tmp_path: Path, submit: Any) -> None:
    run = make_run(server, 5)
    slurm = Batch(tmp_path, sbatch="echo 1234", squeue="echo 'slurm_load_jobs error: Socket timed out' >&2; exit 1")
    submit(run, *SOME, "--", "./x")
    for _ in range(2):
        shown = run_verb("status", run)
        assert shown.returncode == 0 and "jobs" not in shown.stdout
    assert len(slurm.asked("squeue")) == 1
    assert run_verb("status", make_run(server, 5)).returncode == 0 and len(slurm.asked("squeue")) == 1


def test_a_refusal_is_the_batch_systems_own_sentence_and_nothing_is_tried_again(
        server: Process, tmp_path: Path, submit: Any) -> None:
    run = make_run(server, 5)
    slurm = Batch(tmp_path, sbatch="echo 'sbatch: error: invalid partition specified: x' >&2; "
                  "echo 'sbatch: error: Batch job submission failed: Invalid partition name specified' >&2; exit 1")
    status, said = submit(run, *SOME, "--", "./x")
    assert status == 1 and "Batch job submission failed: Invalid partition name specified" in said
    assert len(slurm.asked()) == 1
    status, said = submit(run, *SOME, "--", "./x")
    assert len(slurm.asked()) == 2 and slurm.asked("squeue") == [], "it is known that nothing was taken"
    assert "how many jobs" in submit(run)[1] and "no qsub here" in submit(run, *SOME, "--batch", "pbs")[1]


TIMED_OUT = "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1"


@pytest.mark.parametrize("found, sent", [("1234", 1), ("", 3)], ids=["taken", "lost"])
def test_a_call_without_an_answer_is_looked_up_before_it_is_made_again(
        server: Process, tmp_path: Path, submit: Any, found: str, sent: int) -> None:
    run = make_run(server, 5)
    slurm = Batch(tmp_path, sbatch=TIMED_OUT, squeue="echo " + found)
    status, said = submit(run, *SOME, "--", "./x")
    assert len(slurm.asked("sbatch")) == sent and "timed out" in said
    assert (status, "1234: 2 jobs" in said) == ((0, True) if found else (1, False))
    assert len(slurm.asked("squeue")) == sent
    slurm.answer("sbatch", "echo 1235")
    assert "1235: 2 jobs" in submit(run, *SOME, "--", "./x")[1]


def test_a_submission_that_was_killed_and_is_said_again_sends_nothing_twice(
        server: Process, tmp_path: Path, submit: Any) -> None:
    run = make_run(server, 5)
    slurm = Batch(tmp_path, sbatch="touch %s/begun; read x < %s/go; touch %s/taken; echo 1234" % ((tmp_path,) * 3),
                  squeue="[ ! -e %s/taken ] || echo 1234" % tmp_path)
    os.mkfifo(tmp_path / "go")
    command = [sys.executable, "-c", "import sys; sys.path.insert(0, %r); import taskfarm; taskfarm.NOT_SHARED = (); "
               "sys.exit(taskfarm.main())" % str(HERE), "submit", run, *SOME, "--", "./x"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: (tmp_path / "begun").exists())
    killed.kill()
    killed.wait()
    again = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    RUNNING.append(again)
    waits = re.compile("-> FLOCK .* %d " % again.pid)
    wait_until(lambda: waits.search(Path("/proc/locks").read_text()) or slurm.asked("squeue"))
    (tmp_path / "go").write_text("\n")          # sbatch goes on, and the second call has waited for it
    said = again.communicate(timeout=20)[0]
    assert again.returncode == 0 and "1234 was sent" in said and len(slurm.asked("sbatch")) == 1


def work_in_job(run: str, *words: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    """`work` as a job that `submit` has sent for the run."""
    return run_verb("work", run, *words, SLURM_JOB_NAME="tf-" + run[:8], SLURM_JOB_END_TIME="4000000000", **environ)


def test_the_worker_that_learns_that_the_run_is_over_cancels_what_is_pending_of_its_array(
        server: Process, tmp_path: Path, submit: Any) -> None:
    run = make_run(server, 2)
    slurm = Batch(tmp_path, scancel="")
    environ = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    enlist(server, "other")
    take(server, run, "other")
    assert work_in_job(run, "--idle", "0", "--", "true", **environ).returncode == 0
    assert slurm.asked() == [], "another worker computes yet"
    assert report(server, run, 0, status="done") == 204
    assert run_verb("work", run, "--", "true", SLURM_JOB_NAME="mine", **environ).returncode == 0
    assert slurm.asked() == [], "this array is not of 'submit'"
    done = work_in_job(run, "--", "true", **environ)
    assert slurm.asked() == ["scancel --state=PENDING 7"] and "array 7 are cancelled" in done.stderr
    job = [worker["job"] for worker in walk(server, "/api/workers", "all=True") if worker["job"]]
    assert job == ["slurm:7_2"] * 3


def test_three_jobs_in_a_row_that_fail_at_once_stop_their_array(server: Process, tmp_path: Path, submit: Any) -> None:
    run = make_run(server, 9)
    slurm = Batch(tmp_path, scancel="", sbatch="echo 7", squeue="")
    submit(run, *SOME, "--", "./x")
    for number in range(1, 4):
        assert slurm.asked("scancel") == []
        job = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(number)}
        # The second one is refused before it is a worker.
        words = ["./missing"] if number == 2 else ["sh", "-c", "echo no licence >&2; exit 3"]
        assert work_in_job(run, "--", *words, **job).returncode in (1, 9)
        server.ask("POST", "/api/runs/%s/restart" % run)
    assert slurm.asked("scancel") == ["scancel --state=PENDING 7"]
    shown = run_verb("status", run).stdout
    assert "7_3 ended without a task: on " in shown and "no licence" in shown and "7_2 ended" in shown
    assert "3 in a row did" in shown


def test_jobs_that_ended_before_they_were_workers_are_shown(server: Process, tmp_path: Path, submit: Any) -> None:
    run = make_run(server, 9)
    Batch(tmp_path, sbatch="echo 7", squeue="echo '7_2|R|tf-%s|None'" % run[:8])
    submit(run, *SOME, "--", "./x")
    for job, text in (("7_1", "module: gdal is not there\n"), ("7_2", "starts\n"), ("71_1", "of another array\n")):
        path = tmp_path / ("tf-" + run[:8]) / ("tf-%s-%s.out" % (run[:8], job))
        path.write_text(text)
        os.utime(path, (0, 0))
    assert json.loads(run_verb("status", run, "--json").stdout)["jobs"]["failed"] == [
        {"job": "7_1", "why": "module: gdal is not there"}]


def test_pbs_gets_and_says_what_a_real_one_does(
        server: Process, tmp_path: Path, submit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "%s:/bin:/usr/bin" % (tmp_path / "bin"))
    run = make_run(server, 1)
    qstat = QSTAT_JSON.replace("tf-a", "tf-" + run[:8])
    pbs = Batch(tmp_path, qsub="cat > /dev/null; echo '75[].head'", qstat="cat <<'EOF'\n%s\nEOF\nexit 35" % qstat,
                qselect="echo '75[].head'; echo '76.head'", qdel="")
    assert "75[].head: 4 jobs" in submit(run, *SOME, "--generations", "2", "--batch", "pbs", "--", "./x")[1]
    assert "-J 1-4%2 -l select=1:ncpus=1 -l walltime=1:00:00 -j oe -o" in pbs.asked("qsub")[0]
    jobs = json.loads(run_verb("status", run, "--json").stdout)["jobs"]
    assert (jobs["running"], jobs["pending"]) == (2, {"Job Array Began": 3})
    pbs.answer("qstat", "cat <<'EOF'\n%s\nEOF" % json.dumps({"Jobs": {
        "75[].head": json.loads(qstat)["Jobs"]["75[].head"]}}))
    done = run_verb("work", run, "--until", "+3600", "--", "true", PBS_JOBID="75[1].head",
                    PBS_JOBNAME="tf-" + run[:8])
    assert done.returncode == 0 and pbs.asked("qdel") == ["qdel 75[3-4].head 75[8].head"], "one argument a range"
    assert submit(run, "--cancel", "--batch", "pbs")[0] == 0 and pbs.asked("qdel")[-1] == "qdel 75[].head 76.head"
    run = make_run(server, 1)
    for sentence, status in (("qsub: Unknown queue", 170), ("qsub: illegal -J value", 2),
                             ("qsub: Job violates queue and/or server resource limits", 188)):
        pbs.answer("qsub", "echo '%s' >&2; exit %d" % (sentence, status))
        assert sentence in submit(run, *SOME, "--batch", "pbs", "--", "./x")[1]
    before = len(pbs.asked("qsub"))
    pbs.answer("qsub", "echo 'qsub: cannot connect to server head (errno=15010)' >&2; exit 162")
    pbs.answer("qselect", "echo '80[].head'")
    assert "80[].head: 2 jobs" in submit(run, *SOME, "--batch", "pbs", "--", "./x")[1]
    assert len(pbs.asked("qsub")) == before + 1
    pbs.answer("qsub", "echo '81[].head'")
    assert "qsub takes it" in submit(run, *SOME, "--batch", "pbs", "--test", "--", "./x")[1]
    assert pbs.asked("qsub")[-1].startswith("qsub -h ") and pbs.asked("qdel")[-1] == "qdel 81[].head"


# ---------------------------------------------------------------- RUN

def run_line(folder: Path, *words: str, status: int = 0, home: Optional[Path] = None) -> str:
    """The error output of `run` in a folder, with a home of its own."""
    (home or folder).mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, str(MODULE), "run", *words], cwd=folder, text=True, capture_output=True,
                          timeout=60, stdin=subprocess.DEVNULL, env=own_home(home or folder))
    assert done.returncode == status, done.stderr + done.stdout
    return done.stderr


def own_home(home: Path) -> Dict[str, str]:
    """An environment in which no farm is known but those of this home."""
    return dict({name: value for name, value in os.environ.items()
                 if not name.startswith(("TASKFARM_", "XDG_", "SLURM_", "PBS_"))}, HOME=str(home))


FAILS_ONCE = ["sh", "-c", "echo {task} >> ran; [ {task} != 2 ] || [ -e mended ]"]


def test_one_line_serves_works_ends_and_goes_on(tmp_path: Path) -> None:
    said = run_line(tmp_path, "5", "-j", "2", "--", *FAILS_ONCE, status=3)
    assert "4 done, 1 failed" in said and "--retry" in said
    typed = said.partition("what failed: ")[2].split()[1:]
    shown = subprocess.run([sys.executable, *typed], cwd=tmp_path, env=own_home(tmp_path), text=True,
                           capture_output=True)
    assert "exit status 1" in shown.stdout or "1" in shown.stdout.splitlines()[-1].split(), shown
    assert "4 done, 1 failed" in run_line(tmp_path, "5", "-j", "2", "--", *FAILS_ONCE, status=3)
    (tmp_path / "mended").touch()
    assert "5 done, 0 failed" in run_line(tmp_path, "5", "-j", "2", "--retry", "--", *FAILS_ONCE)
    assert sorted((tmp_path / "ran").read_text().split()) == ["0", "1", "2", "2", "3", "4"]
    assert "would be 6" in run_line(tmp_path, "6", "--name", name_of_run(tmp_path), "--", "true", status=1)
    assert [path.name for path in (tmp_path / ".config/taskfarm").iterdir()] == [], "what leads nowhere is removed"


def name_of_run(folder: Path) -> str:
    """The name of the only run in the file that `run` made."""
    with contextlib.closing(sqlite3.connect(str(folder / "taskfarm.sqlite"))) as connection:
        (name,), = connection.execute("SELECT name FROM run").fetchall()
    return str(name)


def test_changed_parameters_are_another_run(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    for text in ("a\nb\n", "a\nc\n", "a\nb\n"):
        lines.write_text(text)
        run_line(tmp_path, "--lines", "lines", "--", "sh", "-c", "echo {line} >> ran")
    assert sorted((tmp_path / "ran").read_text().split()) == ["a", "a", "b", "c"]


def test_a_line_that_was_killed_goes_on_at_once(tmp_path: Path) -> None:
    words = ["3", "--name", "x", "--grace", "0.1", "--",
             "sh", "-c", "echo {task} >> ran; [ {task} != 1 ] || [ -e go ] || sleep 1000"]
    first = subprocess.Popen([sys.executable, str(MODULE), "run", *words], cwd=tmp_path, env=own_home(tmp_path),
                             stderr=subprocess.PIPE, text=True)
    assert first.stderr
    wait_until(lambda: (tmp_path / "ran").exists() and "1" in (tmp_path / "ran").read_text())
    first.kill()
    said = first.stderr.read()
    assert "this serves taskfarm.sqlite at https://127.0.0.1:" in said
    first.wait()
    (tmp_path / "go").touch()
    assert "3 done, 0 failed" in run_line(tmp_path, *words)
    assert (tmp_path / "ran").read_text().count("1") == 2


class Line:
    """A `run` that goes on beside the test; its commands wait until a file `go` is there."""
    def __init__(self, folder: Path, *words: str) -> None:
        self.folder = folder
        self.error_file = tempfile.TemporaryFile("w+")      # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(MODULE), "run", *words, "--", "sh", "-c",
             "echo {task} >> ran; until [ -e go ]; do sleep 0.02; done"],
            cwd=folder, env=own_home(folder), stderr=self.error_file, text=True)
        RUNNING.append(self.process)

    def started(self) -> List[str]:
        ran = self.folder / "ran"
        return ran.read_text().split() if ran.exists() else []

    def shown(self) -> str:
        self.error_file.seek(0)
        return self.error_file.read()

    def end(self, status: int = 0) -> str:
        """What it has said, once it has ended with that status."""
        assert self.process.wait(60) == status, self.shown()
        return self.shown()


def pid_of_server(folder: Path) -> int:
    return int(json.loads((folder / "taskfarm.sqlite.lock").read_text())["pid"])


def test_a_line_whose_server_was_killed_has_another(tmp_path: Path) -> None:
    line = Line(tmp_path, "3", "-j", "2")
    wait_until(lambda: len(line.started()) == 2)
    os.kill(pid_of_server(tmp_path), signal.SIGKILL)
    (tmp_path / "go").touch()
    assert "3 done, 0 failed" in line.end() and sorted(line.started()) == ["0", "1", "2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_of_two_lines_the_second_serves_when_the_first_has_ended(tmp_path: Path, number: int) -> None:
    first = Line(tmp_path, "3", "--name", "x", "--grace", "0.1")
    wait_until(lambda: len(first.started()) == 1)
    second = Line(tmp_path, "3", "--name", "x")
    wait_until(lambda: len(first.started()) == 2)
    assert re.match(r"taskfarm.sqlite is served at https://127.0.0.1:\d+ already: this line joins", second.shown())
    first.process.send_signal(number)
    first.process.wait(30)
    assert ("the same line again goes on where it was" in first.shown()) == (number == signal.SIGTERM)
    (tmp_path / "go").touch()
    assert "3 done, 0 failed" in second.end()
    assert sorted(first.started()) == ["0", "0", "1", "2"], "that of the first line again, and no other"


def test_a_line_leaves_the_access_file_to_farms_that_stay(tmp_path: Path) -> None:
    access = tmp_path / ".config/taskfarm/access.json"
    taskfarm.write_access(str(access), {"url": "https://127.0.0.1:1", "token": "t", "farm": "f",
                                        "certificate": "system"})
    before = access.read_text()
    line = Line(tmp_path, "1")
    wait_until(lambda: len(line.started()) == 1)
    first, second = line.shown().splitlines()[:2]
    assert "does not answer: if it has a run of this line" in first
    beside, = (path for path in access.parent.iterdir() if path != access)
    assert json.loads(beside.read_text())["url"] in second
    (tmp_path / "go").touch()
    line.end()
    assert access.read_text() == before and list(access.parent.iterdir()) == [access]


def test_lines_in_two_folders_have_a_farm_each(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    line = Line(tmp_path, "1")
    wait_until(lambda: len(line.started()) == 1)
    assert "1 done" in run_line(tmp_path / "other", "1", "--", "true", home=tmp_path)
    assert (tmp_path / "other" / "taskfarm.sqlite").exists(), "not in the farm of the other line, which ends before"
    assert "no farm is known here" in run_verb("new", "3", HOME=str(tmp_path)).stderr
    (tmp_path / "go").touch()
    line.end()


def test_a_line_says_so_when_its_server_cannot_start(tmp_path: Path) -> None:
    script = ("import sys; sys.path.insert(0, %r); import taskfarm\n"
              "def fails(*_, **__): raise ZeroDivisionError('as a fault would')\n"
              "taskfarm.Service = fails\nsys.exit(taskfarm.main())" % str(HERE))
    done = subprocess.run([sys.executable, "-c", script, "run", "1", "--", "true"], cwd=tmp_path, text=True, timeout=60,
                          capture_output=True, env=own_home(tmp_path))
    assert done.returncode == 1 and "as a fault would" in done.stderr and "could not start" in done.stderr


def helper_of(folder: Path, run: str) -> "subprocess.Popen[str]":
    """A `work` in the farm of a line. Its command makes a file `helps`, and waits for `go2`."""
    helper = subprocess.Popen(
        [sys.executable, str(MODULE), "work", run, "--", "sh", "-c",
         "touch helps; until [ -e go2 ]; do sleep 0.02; done"],
        cwd=folder, env=own_home(folder), stderr=subprocess.DEVNULL, text=True)
    RUNNING.append(helper)
    wait_until(lambda: (folder / "helps").exists())
    return helper


def test_a_line_ends_when_its_run_is_over_also_what_others_compute(tmp_path: Path) -> None:
    line = Line(tmp_path, "2", "--name", "x")
    wait_until(lambda: len(line.started()) == 1)
    helper = helper_of(tmp_path, "x")
    (tmp_path / "go").touch()
    wait_until(lambda: "other workers still compute: this one stays, since" in line.shown())
    (tmp_path / "go2").touch()
    assert "2 done, 0 failed" in line.end() and helper.wait(30) == 0


def test_a_line_serves_on_while_others_use_its_farm(tmp_path: Path) -> None:
    line = Line(tmp_path, "1", "--name", "x")
    wait_until(lambda: len(line.started()) == 1)
    made = subprocess.run([sys.executable, str(MODULE), "new", "1", "--name", "y", "--db", "taskfarm.sqlite"],
                          cwd=tmp_path, env=own_home(tmp_path), capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    helper = helper_of(tmp_path, "y")
    (tmp_path / "go").touch()
    wait_until(lambda: "other workers still use this farm" in line.shown())
    (tmp_path / "go2").touch()
    assert "1 done, 0 failed" in line.end() and helper.wait(30) == 0


def test_another_command_is_another_run(tmp_path: Path) -> None:
    for words in (["1", "--", "touch", "one"], ["1", "--", "touch", "two"],
                  ["--grid", "a=1", "--", "touch", "three"], ["--grid", "a=2", "--", "touch", "three"]):
        run_line(tmp_path, *words)
    with contextlib.closing(sqlite3.connect(str(tmp_path / "taskfarm.sqlite"))) as connection:
        assert connection.execute("SELECT count(*), count(DISTINCT name) FROM run").fetchone() == (4, 4)


def test_a_line_in_a_moved_folder_goes_on_and_parameters_may_come_through_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    words = ["run", "--lines", "-", "--", "sh", "-c", "echo {line} >> ran"]
    for text, folder, runs in (("a\nb\n", "one", True), ("c\nd\n", "one", True), ("c\nd\n", "two", False)):
        if not (tmp_path / folder).exists():
            (tmp_path / "one").rename(tmp_path / folder)
        (tmp_path / folder / "ran").touch()
        before = (tmp_path / folder / "ran").read_text()
        done = subprocess.run([sys.executable, str(MODULE), *words], cwd=tmp_path / folder, input=text, text=True,
                              env=own_home(tmp_path), stderr=subprocess.PIPE)
        assert done.returncode == 0 and "2 done" in done.stderr, done.stderr
        assert sorted((tmp_path / folder / "ran").read_text()[len(before):].split()) == (text.split() if runs else [])


def test_a_farm_that_answers_gets_the_run(server: Process, tmp_path: Path) -> None:
    assert "2 done" in run_line(tmp_path, "2", "--name", "there", "--", "true", home=Path(server.home))
    assert not (tmp_path / "taskfarm.sqlite").exists()
    (run,) = server.ask("GET", "/api/runs")[1]["data"]
    assert run["name"] == "there" and counts(server, run["uuid"]) == (0, 0, 2, 0)
    run_line(tmp_path, "2", "--name", "there", "--db", str(tmp_path / "f"), "--", "true", home=Path(server.home))
    assert len(server.ask("GET", "/api/runs")[1]["data"]) == 1, "also when its server has the file"


def test_others_join_a_line_by_its_name_alone(server: Process, tmp_path: Path) -> None:
    line = [sys.executable, str(MODULE), "run", "4", "--name", "x", "--", "sh", "-c", "touch {task}; sleep 0.{task}"]
    with subprocess.Popen(line, cwd=tmp_path, env=own_home(Path(server.home)), stderr=subprocess.PIPE) as first:
        wait_until(lambda: (tmp_path / "0").exists())
        assert "run x, 4 tasks" in Work(server, "x").end(0)
        first.communicate()
    assert first.returncode == 0 and all((tmp_path / str(task)).exists() for task in range(4))
    said = run_line(tmp_path, "4", "--name", "x", "--", "true", "{task}", home=Path(server.home))
    assert "who joins by 'work x' alone runs these" in said
    said = run_line(tmp_path, "1", "--name", "y", "--", "true", "{task}" * 12000, home=Path(server.home))
    assert "others who join must type the command too" in said and "1 done" in said


def test_a_wrong_line_makes_nothing(tmp_path: Path) -> None:
    assert "there is no program" in run_line(tmp_path, "3", "--", "./missing", "{task}", status=1)
    assert "which command" in run_line(tmp_path, "3", status=2)
    assert "there is no file f" in run_verb("list", "--db", "f", HOME=str(tmp_path)).stderr
    assert "required" in run_line(tmp_path, "--", "x", status=2)
    run_line(tmp_path, "3", "--dry-run", "--", "true", "{task}")
    assert list(tmp_path.iterdir()) == []
    run_line(tmp_path, "1", "--name", "x", "--", "true")
    elsewhere = run_verb("list", "--db", str(tmp_path / "taskfarm.sqlite"), HOME=str(tmp_path),
                         TASKFARM_URL="https://127.0.0.1:1")
    assert elsewhere.stdout.splitlines()[-1].split()[-1] == "x", elsewhere.stderr


# ---------------------------------------------------------------- COMMAND LINE

def test_bench_measures_and_counts(tmp_path: Path) -> None:
    done = run_verb("bench", "--profile", "constant,lean,paper,batch,life,flat", "--clients", "3", "--seconds", "0.05",
                    "--rows", "3000", "--json", "--dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    *points, batch, life, flat = json.loads(done.stdout)
    assert [point["profile"] for point in points] == ["constant", "lean", "paper"]
    assert all(point["twice"] == point["never"] == 0 for point in points)
    assert all(point["requests_per_s"] > 0 for point in points) and set(points[1]["ms"]) == {"claim", "done"}
    for size in taskfarm.BATCHES:
        for reports in taskfarm.REPORTS:
            point = batch["batches"][str(size)][reports]
            assert point["store_tasks_per_s"] > 0 and point["http_tasks_per_s"] > 0
            assert point["twice"] == point["never"] == 0 and point["clients_cpu_s_per_s"] > 0
    assert life["num_done"] == 3000 and life["twice"] == 0 and life["file_bytes"] > 0
    assert set(flat["ratio"]) == set(taskfarm.FLAT)
    shown = [line.split() for line in taskfarm.bench_table(points).splitlines()]
    assert [line[0] for line in shown] == ["profile", "constant", "lean", "lean", *["paper"] * 4]
    assert "\n 1000  differing " in taskfarm.batch_table(batch)
    assert taskfarm.life_table(life).splitlines()[1].split()[0] == "3000"
    assert "\n3000 touched tasks  " in taskfarm.flat_table(flat)


def test_bench_measures_the_makespan_of_real_workers(tmp_path: Path) -> None:
    case = 'taskfarm.MAKESPAN = {"few": taskfarm.MakespanCase(2, [0.01] * 20 + [0.3] * 4)}'
    done = subprocess.run([
        sys.executable, "-c", "import sys; sys.path.insert(0, %r); import taskfarm; %s; sys.exit(taskfarm.main())" % (
            str(HERE), case), "bench", "--profile", "makespan", "--json", "--dir", str(tmp_path)],
        capture_output=True, text=True, env=dict(os.environ, HOME=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    (point,) = json.loads(done.stdout)
    few = point["cases"]["few"]
    assert few["tasks"] == 24 and few["greedy_s"] == pytest.approx(0.35) and few["seconds"] > 0.35
    assert few["ratio"] == pytest.approx(few["seconds"] / 0.35)
    assert taskfarm.makespan_table(point).splitlines()[1].startswith("few")
    assert not list(tmp_path.glob("taskfarm-bench-*"))


def test_bench_prints_tables_and_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    shown = run_verb("bench", "--profile", "lean,life,fair", "--case", "nobody,heads_by_byte", "--clients", "2",
                     "--seconds", "0.05", "--rows", "9", "--tries", "1", "--dir", str(tmp_path))
    assert shown.returncode == 0 and [line.split()[0] for line in shown.stdout.splitlines()] == [
        "profile", "lean", "lean", "life", "9", "fair,", "nobody", "heads_by_byte"], shown
    assert "% of a core" in shown.stdout and list(tmp_path.iterdir()) == [], "nothing is left behind"
    for words, sentence in ((["--dir", "/proc"], "no folder can be made in /proc"),
                            (["--dir", str(tmp_path / "none")], "no folder can be made in %s" % (tmp_path / "none")),
                            (["--profile", "lean,thin"], "there is no profile thin: constant, lean,"),
                            (["--case", "nobody,nothing"], "there is no case nothing: nobody, pipelined,")):
        refused = run_verb("bench", *words)
        assert refused.returncode == 1 and sentence in refused.stderr


def test_results_that_differ_are_told_apart() -> None:
    tasks = [(b"%d" % number, b"1") for number in range(1000)]
    sent = {reports: json.loads(taskfarm.done_many(b"\r\n\r\n", "w0", reports)(tasks).partition(b"\r\n\r\n")[2])
            for reports in taskfarm.REPORTS}
    plain = [{"task": number, "attempt": 1, "status": "done"} for number in range(1000)]
    assert sent["alike"] == {"worker_uuid": "w0", "data": plain}
    for name, most in (("elapsed", 100), ("memory", 2 ** 32), ("cpu", 100)):
        figures = [entry.pop(name) for entry in sent["differing"]["data"]]
        assert len(set(figures)) > 900 and 0 < min(figures) < max(figures) <= most
    assert sent["differing"] == sent["alike"]


def test_workers_that_are_back_after_an_outage_stay_alive_while_their_heartbeats_wait(tmp_path: Path) -> None:
    path, size, clock = str(tmp_path / "f"), taskfarm.FairSize(4000), FakeClock()
    with contextlib.closing(Store(path)) as store:
        taskfarm.fill_silent(store, size)
    taskfarm.let_lapse(path, size)
    with contextlib.closing(Store(path, clock)) as store:
        assert store.call(taskfarm.read_run("silent0")).counts == [size(10000), 0, 0, 0]
        store.call(taskfarm.beat("silent0"))
        clock.pass_time(20)
        store.turn()
        assert store.call(taskfarm.read_run("silent0")).counts == [0, size(10000), 0, 0]


def test_the_fair_profile_runs_every_case(tmp_path: Path) -> None:
    done = run_verb("bench", "--profile", "fair", "--rows", "400", "--seconds", "0.05", "--tries", "1", "--json",
                    "--dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (fair,) = json.loads(done.stdout)
    assert list(fair["cases"]) == list(taskfarm.FAIR_CASES)
    assert all(case["answers"] > 0 and case["worst_ms"] >= case["median_ms"] > 0 for case in fair["cases"].values())
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


BENCH_ENDED_AT_EACH_STEP = """
import os, signal, sys, taskfarm

def steps_counted(last, own):
    counted = -1
    def count(frame, event, _):
        nonlocal counted
        if counted < 0 and frame.f_code.co_name == "in_own_group":
            counted = 0
        if counted >= 0 and event in ("call", "c_call") and os.getpid() == own:
            counted += 1
            if counted == last:
                os.kill(own, signal.SIGTERM)
    return count

step = blocked = 0
while step < 1000:
    step += 1 if blocked < 10 else 4        # once signals are blocked, the steps are much alike
    all_ended, held = os.pipe()         # each process that comes of it holds the other end
    pid = os.fork()
    if pid == 0:
        sys.setprofile(steps_counted(step, os.getpid()))
        words = "bench --profile lean --clients 1 --seconds 0.02 --json --dir"
        sys.exit(taskfarm.main([*words.split(), sys.argv[1]]))
    os.close(held)
    status = os.waitpid(pid, 0)[1]
    left = os.listdir(sys.argv[1])
    os.read(all_ended, 1)
    print(step, -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), left, flush=True)
    blocked += not os.WIFSIGNALED(status)
    if left or status == 0:
        break
"""


def test_a_bench_that_is_ended_leaves_nothing_at_whatever_step(tmp_path: Path) -> None:
    """SIGTERM at the first call in `in_own_group`, in another bench at the second, and so on until one ends well."""
    done = subprocess.run([sys.executable, "-c", BENCH_ENDED_AT_EACH_STEP, str(tmp_path)], cwd=str(HERE),
                          capture_output=True, text=True, timeout=100)
    ends = [line.split(" ", 2) for line in done.stdout.splitlines() if not line.startswith("[{")]
    assert {left for _, _, left in ends} == {"[]"}, ends[-1]
    assert "Traceback" not in done.stderr
    statuses = [int(status) for _, status, _ in ends]
    killed = statuses.count(-signal.SIGTERM)        # before there is anything to remove
    assert statuses == [-signal.SIGTERM] * killed + [143] * (len(ends) - killed - 1) + [0] and len(ends) > 20 + killed


def run_verb(*words: str, stdin: str = "", **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run a verb. Commands in what it says are shown as in README, and not with the paths of this place."""
    done = subprocess.run([sys.executable, str(MODULE), *words], input=stdin, capture_output=True, text=True,
                          env=dict(os.environ, **environ), timeout=60)
    done.stdout, done.stderr = map(as_in_readme, (done.stdout, done.stderr))
    return done


def as_in_readme(text: str) -> str:
    """A text whose commands have not the paths of this place."""
    return re.sub(r"[^\s']*python\S* %s" % re.escape(str(MODULE)), taskfarm.PROGRAM, text)


class Terminal:
    """A verb on a terminal of so many columns. `shown` is what it has printed."""

    def __init__(self, words: List[str], environ: Dict[str, str], columns: int = 100) -> None:
        self.screen, inside = os.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        environ = dict(os.environ, TERM="xterm", **environ)
        self.process = subprocess.Popen(
            [sys.executable, str(MODULE), *words], stdin=inside, stdout=inside, stderr=inside, env=environ,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(inside)
        self.shown = ""
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self) -> None:
        with contextlib.suppress(OSError):      # EIO: the verb has ended
            for data in iter(lambda: os.read(self.screen, 65536), b""):
                self.shown += data.decode(errors="replace")

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.shown)

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def end(self) -> int:
        status = self.process.wait(20)
        self.thread.join(20)
        os.close(self.screen)
        return status


def as_ada(farm: Live) -> Dict[str, str]:
    """The environment in which verbs ask this farm."""
    return {"TASKFARM_URL": farm.url, "TASKFARM_TOKEN": farm.token,
            "TASKFARM_FINGERPRINT": taskfarm.fingerprint(farm.service.certificate)}


def verb(farm: Live, *words: str, stdin: str = "", status: int = 0) -> str:
    """What a verb prints that asks this farm: on the error output if *status* is not 0."""
    done = run_verb(*words, stdin=stdin, **as_ada(farm))
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    if status:
        assert done.stdout == "" and "Traceback" not in done.stderr
    return done.stderr if status else done.stdout


def fail(farm: Live, run: str, number: int, message: str) -> None:
    assert farm.ask("PUT", "/api/runs/%s/tasks/%d" % (run, number),
                    {"status": "failed", "exitCode": 3, "message": message})[0] == 204


def worker(farm: Live, name: str, lease: Optional[int] = None) -> None:
    body = {"uuid": name, "hostname": "node-" + name, "pid": 7}
    assert farm.ask("POST", "/api/worker", dict(body, lease=lease) if lease else body)[0] == 201


def start_task(farm: Live, run: str, name: str) -> int:
    status, task = farm.ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": name})
    assert status == 201
    return int(task["task"])


def test_new_prints_the_uuid_alone_and_makes_what_was_asked_for(farm: Live, tmp_path: Path) -> None:
    shown = verb(farm, "new", "70", "--name", "ant arctica", "--max-failures", "3", "--max-losses", "0")
    assert re.fullmatch("[0-9a-f]{32}\n", shown)
    _, run = farm.ask("GET", "/api/runs/" + shown.strip())
    assert (run["numTasks"], run["name"], run["maxFailures"], run["maxLosses"]) == (70, "ant arctica", 3, 0)
    for text, lines in (("a b\n\nc\n", 3), ("a\nb", 2), ("x", 1)):
        (tmp_path / "lines").write_text(text)
        uuid_ = verb(farm, "new", "--lines", str(tmp_path / "lines")).strip()
        assert farm.ask("GET", "/api/runs/" + uuid_)[1]["numTasks"] == lines, text
    (tmp_path / "lines").write_text("")
    before = farm.ask("GET", "/api/runs")
    assert "has 0 lines, and a run needs" in verb(farm, "new", "--lines", str(tmp_path / "lines"), status=1)
    assert "cannot be read" in verb(farm, "new", "--lines", str(tmp_path / "missing"), status=1)
    detail = farm.ask("POST", "/api/run", {"numTasks": 9999999999})[1]["detail"]
    assert verb(farm, "new", "9999999999", status=1) == "taskfarm: %s\n" % detail, "refusals are the server's own"
    assert verb(farm, "new", "5", "--name", "\udcff", status=1).count("\n") == 1
    (tmp_path / "t.csv").write_text("a,b\n1,2\n1\n")
    assert "line 3 of" in verb(farm, "new", "--table", str(tmp_path / "t.csv"), status=1)
    for words in (["new"], ["new", "many"], ["new", "5", "--lines", "x"], ["new", "-5"],
                  ["new", "--table", "t", "--grid", "a=1"]):
        verb(farm, *words, status=2)
    assert farm.ask("GET", "/api/runs") == before


def make_known_run(server: Process, folder: Path, *words: str) -> str:
    """A run that `new` has made in a folder."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, str(MODULE), "new", *words], cwd=folder, capture_output=True, text=True,
                          env=dict(os.environ, HOME=server.home, PWD=str(folder)))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_run_that_knows_its_work_needs_no_command(server: Process, tmp_path: Path) -> None:
    folder, logs = tmp_path / "project", tmp_path / "logs"
    folder.mkdir()
    (folder / "params").write_text("a b\nc\n'd'\n")
    (folder / "tile.sh").write_text("#!/bin/sh\necho \"$1\" in $PWD\n[ $2 != 1 ]\n")
    (folder / "tile.sh").chmod(0o755)
    run = make_known_run(server, folder, "--lines", "params", "--name", "ice", "--", "./tile.sh", "{line}", "{task}")
    shown = run_verb("work", "ice", "--dry-run", HOME=server.home).stdout
    assert "task 0: line=a b\n./tile.sh 'a b' 0\n" in shown
    access = os.path.relpath(os.path.join(server.home, ".config/taskfarm/access.json"))
    Work(server, "ice", "--log-dir", os.path.relpath(logs), TASKFARM_ACCESS=access).end(3)
    assert [(logs / ("%d.log" % task)).read_text() for task in range(3)] == [
        "%s in %s\n" % (line, folder) for line in ("a b", "c", "'d'")]
    for words in (["tasks", "ice", "--status", "failed"], ["status", "ice"]):
        assert re.search(r"parameters\s+message\n.*\sc\s.*\n", run_verb(*words, HOME=server.home).stdout), words
    assert json.loads(run_verb("status", run, "--json", HOME=server.home).stdout)["failures"][0]["parameters"] == "c"
    server.ask("POST", "/api/runs/%s/restart?all=True" % run)
    (folder / "params").write_text("a b\nc\n'e'\n")
    assert "params has changed since the run was made" in Work(server, "ice").end(1)
    assert "parameters" not in run_verb("tasks", "ice", HOME=server.home).stdout, "rather none than wrong ones"
    assert "type a command after -- too" in Work(server, "ice", "--lines", str(folder / "params")).end(1)
    folder.rename(tmp_path / "moved")
    assert "project, cannot be entered on %s: No such file" % os.uname().nodename in Work(server, "ice").end(1)
    assert counts(server, run) == (3, 0, 0, 0)
    Work(server, "ice", "--", "true", "{task}").end(0)
    assert "does not know its command: type it" in Work(server, new_run(server, 1)).end(1)


def test_new_judges_a_command_before_the_run_is_made(farm: Live, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("a\nb\n")
    lines = ["--lines", str(tmp_path / "lines")]
    for words, sentence in (
            (["5", "--", "./tile {task}"], "type it like this: python3 taskfarm.py new 5 -- ./tile {task}\n"),
            (["5", "--", "echo", "{tasl}"], "there is no field {tasl}"),
            (["5", "--", "echo", "{line}"], "--lines FILE"),
            (["--lines", "/dev/fd/0", "--", "echo", "{line}"], "cannot be read again by workers"),
            (["5", "--", "echo", "{task}" * 12000], "and a run keeps 61 kB at most")):
        assert sentence in verb(farm, "new", *words, stdin="a\n", status=1), words
    assert farm.ask("GET", "/api/runs") == (200, {"data": []})
    for words, sentence in (([*lines, "--", "true"], "each of the 2 tasks does the same"),
                            (["5", "--", "echo", "{other}{task}"], "{other} is no field"),
                            (["5", "--", "no-such-program", "{task}"], "no program no-such-program that can be run")):
        done = run_verb("new", *words, **as_ada(farm))
        assert done.returncode == 0 and sentence in done.stderr, words
        work = farm.ask("GET", "/api/runs/%s/work" % done.stdout.strip())[1]
        assert (work["command"], work["folder"]) == (words[words.index("--") + 1:], os.getcwd())


def test_no_worker_takes_the_command_of_another_user_out_of_the_farm(farm: Live, tmp_path: Path) -> None:
    run = verb(farm, "new", "2", "--name", "adas", "--", "touch", str(tmp_path / "ran")).strip()
    user = farm.service.store.call(taskfarm.add_user("bob", ADAS_HASH))
    as_bob = dict(as_ada(farm), TASKFARM_TOKEN=farm.service.farm.token(user, 0))
    for words in (["work", run], ["work", run, "adas"]):
        done = run_verb(*words, **as_bob)
        assert done.returncode == 1 and "was made by ada and not by the user of your login" in done.stderr
    everything = run_verb("work", "--any", **as_bob)
    assert everything.returncode == 0 and "ada" not in everything.stderr, "not one of his"
    assert not (tmp_path / "ran").exists() and farm.ask("GET", "/api/runs/" + run)[1]["numWaiting"] == 2
    better = done.stderr.partition("type it: ")[2].splitlines()[0]
    assert subprocess.run(["sh", "-c", better], env=dict(os.environ, **as_bob)).returncode == 0
    assert (tmp_path / "ran").exists() and farm.ask("GET", "/api/runs/" + run)[1]["numDone"] == 2


def test_a_worker_goes_from_run_to_run_and_looks_at_earlier_ones_again(server: Process, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # The last task of the second run lets the failed one of the first wait again.
    again = "%s %s restart one --failed" % (sys.executable, MODULE)
    one = make_known_run(server, tmp_path / "1", "2", "--name", "one", "--", "sh", "-c",
                         "echo one {task} >> %s; [ {task} = 0 ] || [ -e mended ]" % out)
    two = make_known_run(server, tmp_path / "2", "2", "--name", "two", "--", "sh", "-c",
                         "echo two {task} $PWD >> %s; [ {task} = 0 ] || { touch ../1/mended; %s; }" % (out, again))
    unknown, empty = new_run(server, 1), make_known_run(server, tmp_path / "3", "1", "--", "true")
    server.ask("PUT", "/api/runs/%s/tasks/0" % empty, {"status": "done"})
    shutil.rmtree(tmp_path / "3")       # nothing is to be done there
    said = Work(server, "one", "two").end(0)
    here = " %s" % (tmp_path / "2")
    assert out.read_text().split("\n") == ["one 0", "one 1", "two 0" + here, "two 1" + here, "one 1", ""]
    assert counts(server, one) == counts(server, two) == (0, 0, 2, 0)
    assert said.count(": run one, 2 tasks") == 2 and said.count(": run two, 2 tasks") == 1
    out.unlink()
    for run in (one, two):
        server.ask("POST", "/api/runs/%s/restart?all=True" % run)
    Work(server, "--any", "--log-dir", str(tmp_path / "logs")).end(0)
    assert out.read_text().split("\n")[:4] == ["one 0", "one 1", "two 0" + here, "two 1" + here]
    assert sorted(os.listdir(tmp_path / "logs")) == sorted([one, two]) and counts(server, unknown) == (1, 0, 0, 0)
    server.ask("PUT", "/api/runs/%s/tasks/0" % one, {"status": "failed"})
    Work(server, "one", "two").end(3)
    Work(server, "--any").end(0)        # it has worked on none of them


def test_several_runs_wait_for_one_another_and_none_is_waited_for_that_was_cancelled(server: Process,
                                                                                    tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_known_run(server, tmp_path, "1", "--name", name, "--", "true", "{task}")
    later = make_known_run(server, tmp_path, "1", "--name", "later", "--after", "one", "--", "touch", "later-{task}")
    Work(server, "later", "one").end(0)
    assert counts(server, later) == (0, 0, 1, 0) and (tmp_path / "later-0").exists()
    for name in ("three", "four"):
        run = make_known_run(server, tmp_path, "1", "--name", name, "--", "true", "{task}")
        assert server.ask("POST", "/api/runs/%s/cancel" % run)[0] == 204
    Work(server, "three", "four").end(3)
    assert server.ask("POST", "/api/runs/%s/pause" % later)[0] == 204
    assert server.ask("POST", "/api/runs/%s/restart?all=True" % later)[0] == 204
    Work(server, "later", "--task", "0", "--idle", "0").end(3)


def test_a_token_from_the_environment_takes_the_command_of_a_run(server: Process, tmp_path: Path) -> None:
    run = make_known_run(server, tmp_path, "1", "--", "touch", "ran-{task}")
    Work(server, run, TASKFARM_TOKEN=server.token).end(0)
    assert (tmp_path / "ran-0").exists()


def test_no_command_comes_from_the_farm_of_another_keeper_by_a_name_alone(server: Process, tmp_path: Path) -> None:
    """A farm to which one has once logged in stays beside the access file."""
    theirs = Process(str(tmp_path / "theirs"))
    make_known_run(theirs, tmp_path, "1", "--name", "tiles", "--", "touch", "ran-{task}")
    access = json.loads(Path(theirs.home, ".config/taskfarm/access.json").read_text())
    del access["served"]                # as `login` writes it
    taskfarm.write_access(str(Path(server.home, ".config/taskfarm/access-theirs.json")), access)
    assert "its keeper could have made its command" in Work(server, "tiles").end(1)
    assert not (tmp_path / "ran-0").exists()
    Work(server, "tiles", "--", "touch", str(tmp_path / "ran-{task}")).end(0)
    assert (tmp_path / "ran-0").exists()
    theirs.end(signal.SIGTERM)


def test_a_run_that_knows_a_parameter_for_each_task_has_no_more_tasks(server: Process, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("a\nb\n")
    knows = make_known_run(server, tmp_path, "--lines", "lines", "--", "echo", "{line}")
    assert server.ask("POST", "/api/runs/%s/extend" % knows, {"numTasks": 1})[0] == 409
    counts_ = make_known_run(server, tmp_path, "2", "--", "echo", "{task}")
    assert server.ask("POST", "/api/runs/%s/extend" % counts_, {"numTasks": 1})[0] == 204


def test_a_signal_ends_the_work_on_several_runs(server: Process, tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_known_run(server, tmp_path, "1", "--name", name, "--", "sh", "-c", "touch %s; sleep 100" % name)
    work = Work(server, "two", "one")
    wait_until(lambda: (tmp_path / "two").exists())
    assert "stopping: SIGTERM" in work.end(7, signal.SIGTERM) and not (tmp_path / "one").exists()
    said = Work(server, "two", "one", "--until", "+1", "--leave-ok").end(0)
    assert said.count("the job ends soon") == 1 and not (tmp_path / "one").exists()


def test_a_worker_of_several_runs_waits_for_tasks_that_others_compute(server: Process, tmp_path: Path) -> None:
    run = make_known_run(server, tmp_path, "1", "--name", "one", "--", "true", "{task}")
    two = make_known_run(server, tmp_path, "1", "--name", "two", "--", "true", "{task}")
    server.ask("POST", "/api/worker", {"uuid": "other", "hostname": "n", "pid": 1})
    assert server.ask("POST", "/api/runs/%s/task" % run, {"worker_uuid": "other"})[0] == 201
    assert "no run has a task for this worker" not in Work(server, "one", "two", "--idle", "0").end(0)
    def wait_with_nothing_to_do() -> Work:
        server.ask("POST", "/api/runs/%s/restart?all=True" % two)
        work = Work(server, "one", "two", tweak="taskfarm.RunsInTurn.LOOK_AGAIN_S = 0.1")
        wait_until(lambda: "no run has a task for this worker now" in work.shown())
        return work
    wait_with_nothing_to_do().end(7, signal.SIGTERM)
    work = wait_with_nothing_to_do()
    assert server.ask("DELETE", "/api/worker/other")[0] == 204
    work.end(0)
    assert counts(server, run) == (0, 0, 1, 0)


def test_nobody_waits_for_a_run_that_never_begins(farm: Live) -> None:
    first = make_run(farm, 1)
    waits = farm.ask("POST", "/api/run", {"numTasks": 1, "after": first})[1]["uuid"]
    assert farm.ask("PUT", "/api/runs/%s/tasks/0" % first, {"status": "failed"})[0] == 204
    assert run_verb("wait", waits, **as_ada(farm)).returncode == 3
    watched = run_verb("status", waits, "--watch", "--every", "0.01", **as_ada(farm)).stdout.splitlines()
    assert len(watched) == 1 and "the run never begins" in watched[0]


def test_a_second_run_of_one_name_is_refused_but_by_the_api(farm: Live) -> None:
    first = verb(farm, "new", "7", "--name", "sweep").strip()
    refused = verb(farm, "new", "3", "--name", "sweep", status=1)
    assert "'python3 taskfarm.py status %s' shows it" % first in refused
    assert "'python3 taskfarm.py new --again 3 --name sweep' makes another" in refused
    verb(farm, "new", "3", "--name", "swee")
    for words in (["new", "3"], ["new", "3"], ["new", "3", "--name", "sweep", "--again"]):
        verb(farm, *words)
    assert farm.ask("POST", "/api/run", {"numTasks": 3, "name": "sweep"})[0] == 201
    assert len(farm.ask("GET", "/api/runs")[1]["data"]) == 6


def test_new_counts_lines_of_a_pipe_rows_and_combinations(farm: Live, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("lr;seed\n1;2\n3;4\n")
    for words, stdin, tasks, said in (
            (["--lines", "-"], "a\n\n \nb\n", 4, "2 of the 4 lines of - are empty"),
            (["--table", "-"], "x\n1\n", 1, ""),
            (["--table", str(tmp_path / "t")], "", 2, ""), (["--grid", "a=1..3", "--grid", "b=x,y"], "", 6, "")):
        done = run_verb("new", *words, stdin=stdin, **as_ada(farm), PATH="/nowhere")      # there is no batch system
        assert farm.ask("GET", "/api/runs/" + done.stdout.strip())[1]["numTasks"] == tasks, words
        assert said in done.stderr and bool(said) == bool(done.stderr)


def test_new_may_stand_right_behind_the_first_start_of_a_server(tmp_path: Path) -> None:
    environ = dict(os.environ, HOME=str(tmp_path))
    new = subprocess.Popen([sys.executable, str(MODULE), "new", "5"], stdout=subprocess.PIPE, text=True, env=environ)
    server = subprocess.Popen([sys.executable, str(MODULE), "--db", str(tmp_path / "f"), "--port", "0"], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ)
    shown, _ = new.communicate(timeout=20)
    assert new.returncode == 0 and len(shown) == 33
    server.terminate()
    assert server.communicate(timeout=20) and server.returncode == 0


def test_a_verb_sends_what_workers_left(farm: Live, tmp_path: Path) -> None:
    run = make_run(farm, 4)
    worker(farm, "w1")
    number = start_task(farm, run, "w1")
    left = tmp_path / "taskfarm/unsent-w1.json"
    taskfarm.write_access(str(left), {"farm": "", "url": farm.url, "run": run, "worker": "w1", "reports": [
        {"task": number, "attempt": 1, "status": "done"}]})
    done = run_verb("list", "--json", XDG_STATE_HOME=str(tmp_path), **as_ada(farm))
    assert json.loads(done.stdout)["data"][0]["numDone"] == 1
    assert " had saved: sent" in done.stderr and not left.exists()


def test_what_workers_left_keeps_nobody_waiting_where_nothing_answers(tmp_path: Path) -> None:
    for number in range(20):
        taskfarm.write_access(str(tmp_path / ("taskfarm/unsent-%d.json" % number)), {
            "farm": "", "url": "http://127.0.0.1:1", "run": "r", "worker": "w", "reports": []})
    done = run_verb("list", XDG_STATE_HOME=str(tmp_path), TASKFARM_URL="https://127.0.0.1:1", TASKFARM_TOKEN="tf1.x")
    assert done.returncode == 5 and done.stderr.count("could not be sent") == 1 and done.stderr.count("\n") < 5
    assert len(list((tmp_path / "taskfarm").iterdir())) == 20


def test_a_run_is_paused_resumed_extended_and_cancelled(farm: Live) -> None:
    run = verb(farm, "new", "4", "--name", "tiles").strip()
    second, third = (verb(farm, "new", "1", word, "tiles").strip() for word in ("--after", "--after-any"))
    assert "0 done" in verb(farm, "pause", "tiles") and "state      the run is paused: " in verb(farm, "status", run)
    listed = [line.split()[7] for line in verb(farm, "list").splitlines()]
    assert listed == ["state", "paused", "waits", "waits"]
    assert "paused" not in verb(farm, "resume", "tiles")
    assert "6 waiting" in verb(farm, "extend", "tiles", "2")
    assert "2 failed, 0 computing, 4 waiting" in verb(farm, "cancel", "tiles", "0", "3-3", "--yes")
    assert [task["message"] for task in farm.ask("GET", "/api/runs/%s/tasks?status=failed" % run)[1]["data"]] == [
        "cancelled"] * 2
    assert "(0 to 5), not 6" in verb(farm, "cancel", "tiles", "0-6", "--yes", status=1)
    assert "cancel 2 tasks of run" in verb(farm, "cancel", "tiles", "1-2", stdin="y\n", status=1), "a pipe cannot agree"
    terminal = Terminal(["cancel", "tiles"], as_ada(farm))
    terminal.wait_for("[y/N]")
    terminal.type("y\r")
    assert terminal.end() == 0 and "the run was cancelled" in terminal.shown
    assert "was cancelled, so there is nothing to pause: resume it first" in verb(farm, "pause", "tiles", status=1)
    assert "over       the run was cancelled: " in verb(farm, "status", run)
    assert json.loads(verb(farm, "status", run, "--json"))["over"] and "was cancelled" in verb(farm, "status", second)
    listed = [line.split()[7] for line in verb(farm, "list").splitlines()]
    assert listed == ["state", "cancelled", "never", "-"]
    assert "cancelled" not in verb(farm, "restart", "tiles", "--failed")
    assert farm.ask("GET", "/api/runs/" + run)[1]["state"] == "open"
    verb(farm, "delete", "tiles", "--yes")
    assert "never begins: run %s, for which it waits, was deleted" % run[:8] in verb(farm, "status", second)
    assert "unknown" in verb(farm, "status", third)
    verb(farm, "new", "1", "--after", "tile", status=1)
    verb(farm, "cancel", second, "5-2", status=2)


def test_ranges_are_split_into_what_a_request_may_name() -> None:
    most = taskfarm.MAX_NAMED
    assert taskfarm.split_ranges([]) == []
    assert taskfarm.split_ranges([(5, 6), (1, 1)]) == [[(1, 1), (5, 6)]]
    assert taskfarm.split_ranges([(0, 9), (20, 2 * most)]) == [
        [(0, 9), (20, most + 9)], [(most + 10, 2 * most)]]
    parts = taskfarm.split_ranges([(2 * number, 2 * number) for number in range(2500)])
    assert list(map(len, parts)) == [1000, 1000, 500]


def test_list_shows_runs_as_columns_and_as_json(farm: Live) -> None:
    assert verb(farm, "list").split()[:2] == ["run", "tasks"]
    first, second = verb(farm, "new", "4", "--name", "one").strip(), make_run(farm, 10)
    assert report(farm, second, 3, status="done") == 204
    lines = verb(farm, "list").splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [[first, "4"], [second, "10"]] and "\x1b" not in "".join(lines)
    assert lines[1].endswith("\tone") and lines[2].split("\t")[2] == "10", "with tabs, and bare numbers"
    verb(farm, "new", "5", "--name", "\u00e9tude")
    ascii_ = run_verb("list", PYTHONIOENCODING="ascii", **as_ada(farm))
    assert ascii_.returncode == 0 and ascii_.stdout.endswith("\\xe9tude\n"), "what the terminal cannot show is spelt"
    assert json.loads(verb(farm, "list", "--json")) == farm.ask("GET", "/api/runs")[1]
    terminal = Terminal(["list"], as_ada(farm), columns=60)
    assert terminal.end() == 0
    shown = terminal.shown.replace("\x1b[1m", "").replace("\x1b[0m", "").split("\r\n")
    assert max(map(len, shown)) <= 60 and shown[1].split()[0] == first[:8] and "10.0%" in terminal.shown
    assert "\x1b[1m" in terminal.shown
    plain = Terminal(["list"], dict(as_ada(farm), NO_COLOR="1"))
    assert plain.end() == 0 and "\x1b" not in plain.shown and "one" in plain.shown


def test_a_run_is_found_by_the_beginning_of_its_uuid_or_name(farm: Live) -> None:
    one, two = (verb(farm, "new", "4", "--name", name).strip() for name in ("antarctica", "arctic"))
    for text, expected in ((one, one), ("antarctica", one), ("ar", two), (two[:20], two)):
        assert json.loads(verb(farm, "status", text, "--json"))["run"]["uuid"] == expected, text
    several = verb(farm, "status", "a", status=1)
    assert "type the uuid of one" in several and one in several and two in several
    for gone in ("greenland", "0" * 32):
        refused = verb(farm, "status", gone, status=1)
        assert "'python3 taskfarm.py list' shows all runs" in refused and gone in refused and "GET" not in refused


@pytest.mark.parametrize("words", [("delete", "--yes"), ("restart", "--all", "--yes"), ("work", "--", "true")])
def test_a_verb_that_changes_a_run_never_hits_one_of_a_longer_name(farm: Live, words: Tuple[str, ...]) -> None:
    first, final = (verb(farm, "new", "3", "--name", name).strip() for name in ("sweep", "sweep-final"))
    assert report(farm, final, 1, status="done") == 204
    before = farm.ask("GET", "/api/runs/" + final)[1]
    verb(farm, "delete", "sweep", "--yes")
    no_such_run = 4 if words[0] == "work" else 1
    for text in ("sweep", final[:7]):
        refused = verb(farm, words[0], text, *words[1:], status=no_such_run)
        assert final in refused and "'sweep-final'" in refused and first not in refused
    twin = verb(farm, "new", "3", "--name", "sweep-final", "--again").strip()
    refused = verb(farm, words[0], "sweep-final", *words[1:], status=1)
    assert final in refused and twin in refused
    assert farm.ask("GET", "/api/runs/" + final)[1] == before
    verb(farm, words[0], final[:8], *words[1:])
    assert farm.ask("GET", "/api/runs/" + final)[1] != before


def test_status_shows_states_rate_workers_and_what_failed(farm: Live) -> None:
    run = verb(farm, "new", "200", "--name", "antarctica").strip()
    shown = verb(farm, "status", run)
    assert "200 waiting" in shown and "time left  unknown: nobody works on it" in shown and "none is alive" in shown
    worker(farm, "w1", 120)
    for _ in range(60):
        assert report(farm, run, start_task(farm, run, "w1"), status="done", worker_uuid="w1") == 204
    fail(farm, run, start_task(farm, run, "w1"), "Segmentation fault\nin \x1b[2Jtile.sh")
    longest = start_task(farm, run, "w1")
    found = json.loads(verb(farm, "status", run, "--json"))
    assert found["run"] == farm.ask("GET", "/api/runs/" + run)[1] and found["over"] is False
    assert found["workers"] == {"alive": 1, "hosts": 1, "held": 1}
    assert [task["task"] for task in found["longest"]] == [longest]
    assert [(task["task"], task["exitCode"]) for task in found["failures"]] == [(60, 3)]
    rate, left = found["rate"], found["secondsLeft"]
    assert rate["ended"] in (60, 61) and rate["low"] < rate["perSecond"] < rate["high"]
    assert left["least"] == pytest.approx(139 / rate["high"]) and (
        left["most"] == (pytest.approx(139 / rate["low"]) if rate["low"] else None))
    shown = verb(farm, "status", "antarctica")
    assert "30.0 %" in shown and "\n[" in shown and "60 done" in shown and "1 failed" in shown
    assert re.search(r"rate +[0-9.]+ tasks/s over the last [0-9.]+ s \([0-9.]+ to [0-9.]+ tasks/s\)\n", shown)
    assert re.search(r"last failures\n +task .*\n +60 .* 3  node-w1  Segmentation fault in \?\[2Jtile.sh\n", shown)
    assert re.search(r"longest computing\n +task .*\n +%d .* node-w1\n" % longest, shown)


def test_a_run_that_is_over_says_what_is_to_do(farm: Live) -> None:
    run = make_run(farm, 2)
    assert report(farm, run, 0, status="done") == 204
    fail(farm, run, 1, "")
    shown = verb(farm, "status", run)
    assert "restart %s --failed" % run[:8] in shown and "time left" not in shown
    terminal = Terminal(["status", run], as_ada(farm), columns=40)
    assert terminal.end() == 0 and "restart %s --failed' lets" % run[:8] in terminal.shown, "a command is not cut"
    assert json.loads(verb(farm, "status", run, "--json"))["over"] is True
    watched = run_verb("status", run, "--watch", **as_ada(farm))
    assert watched.returncode == 0 and watched.stdout.count("\n") == 1 and "over" in watched.stdout


def test_tasks_are_listed_whole_in_a_pipe(farm: Live) -> None:
    run = make_run(farm, 2500)
    worker(farm, "w1")
    start_task(farm, run, "w1")
    for number in (7, 8):
        fail(farm, run, number, "message %d" % number)
    lines = verb(farm, "tasks", run).splitlines()
    assert len(lines) == 2501 and [int(line.split()[0]) for line in lines[1:]] == list(range(2500))
    lines = verb(farm, "tasks", run, "--status", "failed").splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["7", "failed"], ["8", "failed"]]
    assert lines[1].endswith("message 7")
    last_first = json.loads(verb(farm, "tasks", run, "--status", "failed", "--order", "finished", "--json"))["data"]
    assert [task["task"] for task in last_first] == [8, 7]
    assert last_first[0] == farm.ask("GET", "/api/runs/%s/tasks?status=failed&order=finished" % run)[1]["data"][0]
    assert len(json.loads(verb(farm, "tasks", run, "--json"))["data"]) == 2500
    assert json.loads(verb(farm, "tasks", run, "--status", "done", "--json")) == {"data": []}
    assert len(verb(farm, "tasks", run, "--limit", "1200").splitlines()) == 1201
    terminal = Terminal(["tasks", run, "--limit", "3"], as_ada(farm), columns=50)
    assert terminal.end() == 0
    assert terminal.shown.count("waiting") == 2 and "--limit 0" in terminal.shown and "losses" not in terminal.shown


def test_some_tasks_are_listed_by_their_numbers(farm: Live) -> None:
    run = make_run(farm, 1000)
    assert [line.split("\t")[0] for line in verb(farm, "tasks", run, "17-20", "13", "18").splitlines()[1:]] == [
        "13", "17", "18", "19", "20"]
    many = [str(number) for number in range(0, 1000, 2)]        # more than a request asks for
    assert [str(task["task"]) for task in json.loads(verb(farm, "tasks", run, *many, "--json"))["data"]] == many
    assert "has 1000 tasks" in verb(farm, "tasks", run, "990-1000", status=1)
    for wrong in ("20-17", "-3", "x", "1,2"):
        verb(farm, "tasks", run, wrong, status=2)


def test_tasks_are_written_for_spreadsheets_and_as_a_joblog(farm: Live) -> None:
    run = make_run(farm, 5)
    worker(farm, "w1")
    started = [start_task(farm, run, "w1") for _ in range(4)]
    assert report(farm, run, started[0], status="done", worker_uuid="w1", elapsed=1.5, memory=7, cpu=0.25) == 204
    assert report(farm, run, started[1], status="failed", worker_uuid="w1", elapsed=2, exitCode=137,
                  message='no "space",\nleft') == 204
    assert report(farm, run, started[2], status="failed", worker_uuid="w1", elapsed=2) == 204
    rows = list(csv.DictReader(io.StringIO(verb(farm, "tasks", run, "--csv"))))
    assert tuple(rows[0]) == taskfarm.CSV_COLUMNS and [row["task"] for row in rows] == list("01234")
    assert [(row["status"], row["seconds"], row["host"], row["worker"], row["attempt"], row["exit"], row["message"],
             row["memory"], row["cpu"]) for row in rows] == [
        ("done", "1.5", "node-w1", "w1", "1", "", "", "7", "0.25"),
        ("failed", "2", "node-w1", "w1", "1", "137", 'no "space",\nleft', "", ""),
        ("failed", "2", "node-w1", "w1", "1", "", "", "", ""),
        ("computing", "", "node-w1", "w1", "1", "", "", "", ""), ("waiting", "", "", "", "0", "", "", "", "")]
    assert len(verb(farm, "tasks", run, "1-2", "--csv", "--limit", "1").splitlines()) == 3, "a message has two lines"
    log = verb(farm, "tasks", run, "--joblog").splitlines()
    assert log[0].split("\t") == ["Seq", "Host", "Starttime", "JobRuntime", "Send", "Receive", "Exitval", "Signal",
                                  "Command"]
    cells = [line.split("\t") for line in log[1:]]
    assert [(cell[0], cell[1], cell[3], cell[6]) for cell in cells] == [
        ("0", "node-w1", "1.500", "0"), ("1", "node-w1", "2.000", "137"), ("2", "node-w1", "2.000", "1")]
    assert abs(float(cells[0][2]) - time.time()) < 100
    verb(farm, "tasks", run, "--csv", "--joblog", status=2)


@pytest.mark.parametrize("message, kind", [
    ("cannot open /data/17.nc: No space left on device", "cannot open *: No space left on device"),
    ("step 3 of 1_000 at 12:31:07.5, lr=1e-05", "step * of * at *, lr=*"), ("~/x and ./y/ and C:/z", "* and * and C:*"),
    ("segfault at 0x7ffe12ab, id 3f2a91c4d0", "segfault at *, id *"), ("deadbeef faded", "deadbeef faded"),
    ("File \"/a b/c.py\", line 7", "File \"* *\", line *"), ("two\nlines  of node7", "two lines of node*"),
    ("I/O error and/or data/x.nc", "I/O error and/or *"), ("", ""), ("x" * 2000 + "/", "x" * 2000 + "/"),
    ("a/" * 1000, "*")])
def test_messages_that_differ_in_numbers_and_paths_are_of_one_kind(message: str, kind: str) -> None:
    assert taskfarm.kind_of_message(message) == kind
    judged = Task(0, 1, taskfarm.FAILED, message=message)
    assert taskfarm.Selection(like=kind).judges(judged), "what failures shows is what restart takes"
    assert not taskfarm.Selection(like=kind + "?").judges(judged)


@given(message=st.text(max_size=60) | st.from_regex(r"([a-z]+|[0-9]+|[/.:,x=-]| )*", fullmatch=True))
@settings(max_examples=50 if QUICK else 300, deadline=None, database=None)
def test_the_kind_of_any_message_selects_it(message: str) -> None:
    kind = taskfarm.kind_of_message(message)
    assert taskfarm.Selection(like=kind.replace("?", "*")).judges(Task(0, 1, taskfarm.FAILED, message=message))


def test_failures_are_grouped_by_exit_status_and_message(farm: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(farm, 30)
    assert verb(farm, "failures", run).split() == ["failed", "exit", "first", "last", "hosts", "tasks", "message"]
    for name in ("w1", "w2", "w3", "w4", "w5"):
        worker(farm, name)
    for number in range(12):
        holder = "w%d" % (1 + number % 5)
        start_task(farm, run, holder)
        said = {"exitCode": 137, "message": "killed"} if number in (3, 4) else {
            "exitCode": 1, "message": "no file /data/%d in step %d" % (number, number)} if number != 7 else {}
        assert report(farm, run, number, status="failed", worker_uuid=holder, **said) == 204
    done = run_verb("failures", run, **as_ada(farm))
    rows = [line.split("\t") for line in done.stdout.splitlines()[1:]]
    assert [(row[0], row[1], row[4], row[5], row[6]) for row in rows] == [
        ("9", "1", "node-w2,node-w1,node-w5,+2", "11,10,9", "no file * in step *"),
        ("2", "137", "node-w5,node-w4", "4,3", "killed"), ("1", "-", "node-w3", "7", "-")]
    assert done.stderr == "taskfarm: of 12 failed tasks\n" and float(rows[0][2]) >= float(rows[0][3]) >= 0
    found = json.loads(verb(farm, "failures", run, "--json"))
    assert (found["failed"], found["told"], found["data"][1]["hosts"]) == (12, 12, {"node-w5": 1, "node-w4": 1})
    terminal = Terminal(["failures", run], as_ada(farm))
    assert terminal.end() == 0
    (line,) = [line for line in terminal.shown.splitlines() if "wait again" in line]
    assert as_in_readme(line).endswith("python3 taskfarm.py restart %s --exit 1 --like 'no file * in step *'" % run[:8])
    assert verb(farm, *shlex.split(line)[-6:]).startswith("9 tasks wait again"), "it can be pasted"
    monkeypatch.setattr(taskfarm, "LATEST_ENDS", 2)
    with contextlib.closing(taskfarm.Client(lambda: access_of(farm))) as client:
        for everything, number in ((False, 2), (True, 3)):
            tasks = list(taskfarm.latest_ends(client, run, everything, status="failed"))
            assert len(tasks) == number and tasks[0]["task"] == 7


def test_hosts_shows_which_are_slow_and_which_fail(farm: Live) -> None:
    run = make_run(farm, 40)
    assert report(farm, make_run(farm, 1), 0, status="done") == 204     # of another run
    for name in ("w1", "w2", "w3"):
        worker(farm, name, 60)
    for took_s, name in [(1, "w1")] * 10 + [(2, "w2")] * 10:
        assert report(farm, run, start_task(farm, run, name), status="done", worker_uuid=name, elapsed=took_s,
                      memory=5 * took_s) == 204
    assert report(farm, run, start_task(farm, run, "w1"), status="done", worker_uuid="w1", elapsed=9) == 204
    assert report(farm, run, start_task(farm, run, "w3"), status="failed", worker_uuid="w3", elapsed=0.1) == 204
    done = run_verb("hosts", run, **as_ada(farm))
    assert [line.split("\t") for line in done.stdout.splitlines()] == [
        ["host", "tasks", "failed", "lost", "median", "95 %", "times", "memory"],
        ["node-w3", "1", "1", "0", "-", "-", "-", "-"],
        ["node-w2", "10", "0", "0", "2", "2", "1", "10"],
        ["node-w1", "11", "0", "0", "1", done.stdout.splitlines()[3].split("\t")[5], "0.5", "5"]]
    assert done.stderr == "taskfarm: of 22 ends\n"
    found = json.loads(verb(farm, "hosts", run, "--json"))
    assert (found["told"], found["ended"], found["median"]) == (22, 22, 2.0)
    assert set(found["data"][0]) == {"host", "tasks", "failed", "lost", "median", "p95", "times", "memory"}


def test_hosts_counts_workers_that_were_lost_since_the_run_was_made(tmp_path: Path) -> None:
    farm = Live(str(tmp_path / "farm.sqlite"), FakeClock())
    try:
        worker(farm, "w1", 60)
        farm.pass_time(100)
        run = make_run(farm, 3)
        worker(farm, "w2", 60)
        start_task(farm, run, "w2")
        farm.pass_time(100)
        assert verb(farm, "hosts", run).splitlines()[1:] == ["node-w2\t0\t0\t1\t-\t-\t-\t-"]
    finally:
        farm.close()


def test_wait_is_silent_and_tells_by_its_status(farm: Live) -> None:
    run = make_run(farm, 4)
    waiting: Dict[Tuple[str, ...], Any] = {
        words: subprocess.Popen([sys.executable, str(MODULE), "wait", run, *words], stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, env=dict(os.environ, **as_ada(farm)))
        for words in ((), ("--percent", "50"), ("--percent", "90"))}

    def end(words: Tuple[str, ...]) -> Tuple[bytes, int]:
        process = waiting.pop(words)
        return process.communicate(timeout=30)[0], process.returncode
    assert report(farm, run, 0, percentCompleted=99) == 204 and report(farm, run, 1, status="done") == 204
    assert report(farm, run, 2, percentCompleted=1) == 204
    assert end(("--percent", "50")) == (b"", 0)
    assert all(process.poll() is None for process in waiting.values())
    assert report(farm, run, 0, status="failed") == report(farm, run, 2, status="done") == 204
    assert report(farm, run, 3, status="done") == 204
    assert end(("--percent", "90")) == (b"", 0), "99, 100, 100 and 100 percent"
    assert end(()) == (b"", 3)
    assert verb(farm, "restart", run, "--failed") and report(farm, run, 0, status="done") == 204
    assert run_verb("wait", run, **as_ada(farm)).returncode == 0
    assert report(farm, run, 0, status="failed", percentCompleted=0) == 204
    assert run_verb("wait", run, "--percent", "90", **as_ada(farm)).returncode == 3, "over without that"
    verb(farm, "wait", "greenland", status=1)


def test_status_without_a_run_shows_the_newest_one(farm: Live) -> None:
    assert "'python3 taskfarm.py new 1000' makes one" in verb(farm, "status", status=1)
    make_run(farm, 4)
    newest = make_run(farm, 5)
    assert newest in verb(farm, "status")


def test_the_list_of_runs_is_watched_until_all_are_over(farm: Live) -> None:
    runs = [make_run(farm, 1) for _ in range(2)]
    terminal = Terminal(["list", "--watch"], as_ada(farm))
    terminal.wait_for(runs[1][:8])
    for run in runs:
        assert report(farm, run, 0, status="done") == 204
    assert terminal.end() == 0 and terminal.shown.count(runs[0][:8]) > 1 and "100.0%" in terminal.shown
    line = run_verb("list", "--watch", **as_ada(farm)).stdout
    assert re.fullmatch("20.*  0 of 2 runs not over: 0 tasks waiting, 0 computing\n", line)
    assert [run["uuid"] for run in json.loads(verb(farm, "list", "--watch", "--json"))["data"]] == runs


def test_one_task_is_worked_on_by_hand(farm: Live) -> None:
    run = verb(farm, "new", "20", "--max-failures", "2").strip()
    one = ["work", run, "--task", "13", "--", "sh", "-c", "exit $((TASKFARM_TASK - TASKFARM_ATTEMPT - 11))"]
    for status in (3, 0):       # it fails in the first attempt, and waits again
        done = run_verb(*one, **as_ada(farm))
        assert done.returncode == status and "does the same" not in done.stderr, done.stderr
    assert look(farm, run, 13) == ("done", 2) and figures(farm, run)[:3] == (19, 0, 1)
    refused = verb(farm, *one, status=1)
    assert "task 13 is done: 'python3 taskfarm.py restart %s 13 --all' lets it wait again" % run[:8] in refused
    assert "has 20 tasks (0 to 19), not 20" in verb(farm, "work", run, "--task", "20", "--", "true", status=1)
    shown = verb(farm, "work", run, "--task", "7", "--dry-run", "--", "echo", "{task}")
    assert shown.splitlines()[1].endswith("echo 7")
    assert verb(farm, "work", run, "--task", "3", "echo", "{task}") == "3\n"


def test_what_tasks_used_is_shown_where_it_is_known(farm: Live) -> None:
    run = make_run(farm, 4)
    worker(farm, "w1")
    assert "memory" not in verb(farm, "status", run)
    for number in range(3):
        assert report(farm, run, start_task(farm, run, "w1"), status="done", worker_uuid="w1", elapsed=100,
                      memory=(number + 1) * 10 ** 9, cpu=50 * (number + 1)) == 204
    shown = verb(farm, "status", run)
    assert "\nmemory     median 2.0 GB, largest 3.0 GB\nCPU        median 100 %, largest 150 %\n" in shown
    found = json.loads(verb(farm, "status", run, "--json"))
    assert found["memory"] == {"median": 2 * 10 ** 9, "largest": 3 * 10 ** 9}
    assert found["cpuShare"] == {"median": 1.0, "largest": 1.5}
    assert verb(farm, "tasks", run).splitlines()[3].split("\t")[6:9] == ["100", "3000000000", "150"]
    for words, known in (([], True), (["--status", "waiting"], False)):
        terminal = Terminal(["tasks", run, *words], as_ada(farm), columns=150)
        assert terminal.end() == 0
        assert ("memory" in terminal.shown, "2 min 30 s" in terminal.shown, "log" in terminal.shown) == (
            known, known, False)


def test_the_log_of_a_failed_task_is_printed_where_it_can_be_seen(farm: Live, tmp_path: Path) -> None:
    run = verb(farm, "new", "3", "--max-failures", "2").strip()
    worker(farm, "w1")
    path = tmp_path / "0.log"
    path.write_bytes(b"first\n\x1b[2Jlast\xff\n")
    assert "no log of task 0 is known" in verb(farm, "log", run, "0", status=1)
    assert "has 3 tasks" in verb(farm, "log", run, "3", status=1)
    assert report(farm, run, start_task(farm, run, "w1"), status="failed", worker_uuid="w1", log=str(path)) == 204
    assert str(path) in verb(farm, "tasks", run, "--status", "waiting")
    command = [sys.executable, str(MODULE), "log", run, "0"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ, **as_ada(farm)))
    assert done.returncode == 0 and done.stdout == path.read_bytes()
    assert done.stderr.decode() == "taskfarm: task 0: %s on node-w1\n" % path
    terminal = Terminal(["log", run, "0"], as_ada(farm))
    assert terminal.end() == 0 and "?[2Jlast" in terminal.shown, "no log can send sequences to the terminal"
    path.unlink()
    assert "is %s on node-w1, and cannot be read here: No such file" % path in verb(farm, "log", run, "0", status=1)
    start_task(farm, run, "w1")
    assert "on the host of an earlier attempt, and cannot" in verb(farm, "log", run, "0", status=1)
    os.mkfifo(str(path))
    assert "is no plain file" in verb(farm, "log", run, "0", status=1)
    assert json.loads(verb(farm, "log", run, "0", "--json"))["log"] == str(path)
    assert report(farm, run, 0, status="done") == 204
    assert "no log of task 0 is known" in verb(farm, "log", run, "0", status=1)


def test_an_empty_table_says_so_on_a_terminal(farm: Live) -> None:
    run = make_run(farm, 1)
    assert farm.ask("DELETE", "/api/worker/w")[0] == 204
    for words, sentence in ((["workers"], "no worker is alive"), (["tasks", run, "--status", "done"], "none")):
        terminal = Terminal(words, as_ada(farm))
        assert terminal.end() == 0 and terminal.shown.endswith(sentence + "\r\n"), terminal.shown
        piped = run_verb(*words, **as_ada(farm))
        assert piped.stdout.count("\n") == 1 and piped.stderr == ""


def test_a_reader_that_ends_early_ends_a_long_list(farm: Live) -> None:
    run = make_run(farm, 100000)
    process = subprocess.Popen([sys.executable, str(MODULE), "tasks", run], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, env=dict(os.environ, **as_ada(farm)))
    assert process.stdout and process.stderr
    assert process.stdout.readline().startswith("task\t")
    process.stdout.close()
    assert process.wait(20) == 1 and process.stderr.read() == ""
    process.stderr.close()


def test_a_full_disk_behind_the_standard_output_is_one_sentence(farm: Live) -> None:
    for unbuffered in ("", "1"):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, str(MODULE), "list"], stdout=full, stderr=subprocess.PIPE, text=True,
                                  timeout=60, env=dict(os.environ, PYTHONUNBUFFERED=unbuffered, **as_ada(farm)))
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left on device" in done.stderr


def test_workers_are_listed_alive_or_all(farm: Live) -> None:
    worker(farm, "w1", 120)
    worker(farm, "w2")
    assert farm.ask("DELETE", "/api/worker/w1")[0] == 204
    (line,) = verb(farm, "workers").splitlines()[1:]
    assert line.split()[:4] == ["node-w2", "7", "alive", "0"] and line.endswith("w2")
    assert len(verb(farm, "workers", "--all").splitlines()) == 3
    listed = json.loads(verb(farm, "workers", "--all", "--json"))["data"]
    assert listed == farm.ask("GET", "/api/workers?all=True")[1]["data"] and len(listed) == 2


@pytest.mark.parametrize("words, counts", [
    ([], (3, 1, 0)), (["--failed"], (2, 1, 0)), (["--all", "--yes"], (4, 0, 0)), (["0-2"], (3, 1, 0)),
    (["0-2", "--all"], (4, 0, 0)), (["--exit", "3"], (2, 1, 0)), (["--exit", "1"], (1, 1, 1)),
    (["--like", "m*"], (1, 1, 1)), (["3", "--like", ""], (1, 1, 1))])
def test_restart_lets_wait_what_was_asked_for(farm: Live, words: List[str], counts: Tuple[int, int, int]) -> None:
    run = make_run(farm, 4)
    worker(farm, "w1")
    assert start_task(farm, run, "w1") == 0
    assert report(farm, run, 1, status="done") == 204
    fail(farm, run, 2, "")
    shown = verb(farm, "restart", run, *words)
    _, after = farm.ask("GET", "/api/runs/" + run)
    assert (after["numWaiting"], after["numDone"], after["numFailed"]) == counts
    assert "%d waiting" % counts[0] in shown
    verb(farm, "restart", run, "--all", "--failed", status=2)


def test_a_restart_of_all_tasks_asks_and_takes_only_yes_for_an_answer(farm: Live) -> None:
    run = verb(farm, "new", "4", "--name", "antarctica").strip()
    assert report(farm, run, 1, status="done") == 204
    before = farm.ask("GET", "/api/runs/" + run)[1]
    assert "--yes" in verb(farm, "restart", run, "--all", stdin="y\n", status=1), "a pipe cannot agree"
    for answer, kept in (("n\r", True), ("\r", True), ("y\r", False)):
        terminal = Terminal(["restart", "antarctica", "--all"], as_ada(farm))
        terminal.wait_for("[y/N]")
        assert "antarctica" in terminal.shown and "1 done" in terminal.shown and "No task will count" in terminal.shown
        terminal.type(answer)
        assert terminal.end() == int(kept)
        assert (farm.ask("GET", "/api/runs/" + run)[1] == before) is kept, answer


@pytest.mark.parametrize("words", [
    ("restart", "{run}", "--al", "--yes"), ("delete", "{run}", "--ye"), ("list", "--js"), ("--versio",),
    ("user", "list", "--d", "runs.sqlite"), ("work", "{run}", "--job", "2", "--", "true")])
def test_an_option_is_taken_only_when_it_is_written_out(farm: Live, words: Tuple[str, ...]) -> None:
    run = make_run(farm, 4)
    before = farm.ask("GET", "/api/runs/" + run)
    verb(farm, *(word.replace("{run}", run) for word in words), status=2)
    assert farm.ask("GET", "/api/runs/" + run) == before


def test_delete_asks_and_takes_only_yes_for_an_answer(farm: Live) -> None:
    run = verb(farm, "new", "4", "--name", "antarctica").strip()
    assert "--yes" in verb(farm, "delete", run, stdin="y\n", status=1), "a pipe cannot agree"
    for answer, kept in (("n\r", True), ("\r", True), ("yesterday\r", True), ("y\r", False)):
        terminal = Terminal(["delete", "antarctica"], as_ada(farm))
        terminal.wait_for("[y/N]")
        assert "antarctica" in terminal.shown and "4 waiting" in terminal.shown
        terminal.type(answer)
        assert terminal.end() == int(kept)
        assert farm.ask("GET", "/api/runs/" + run)[0] == (200 if kept else 404), answer
    other = make_run(farm, 4)
    assert other in verb(farm, "delete", other[:12], "--yes")
    assert farm.ask("GET", "/api/runs")[1] == {"data": []}
    assert "there is no run" in verb(farm, "delete", other, "--yes", status=1)


def file_of(farm: Live) -> Dict[str, str]:
    """What this farm's access file says, for ada."""
    return {"url": farm.url, "user": "ada", "token": farm.token, "farm": farm.service.store.identity,
            "certificate": farm.service.certificate}


def test_tokens_from_the_command_line(farm: Live) -> None:
    run, other = make_run(farm, 4), make_run(farm, 4)
    done = run_verb("token", "new", "--run", run[:12], "--days", "3", "--label", "GPU nodes", **as_ada(farm))
    token, = done.stdout.splitlines()
    assert done.returncode == 0 and "token 1, scope work, run %s alone, until 20" % run in done.stderr
    assert token not in done.stderr
    environ = dict(as_ada(farm), TASKFARM_TOKEN=token)
    assert run_verb("work", run, "-j", "2", "--", "true", **environ).returncode == 0
    assert farm.ask("GET", "/api/runs/" + run)[1]["numDone"] == 4
    for words in (["status", run], ["list"], ["workers"], ["tasks", run, "--json"]):
        shown = run_verb(*words, **environ)
        assert shown.returncode == 0 and other[:8] not in shown.stdout, shown.stderr
    refused = run_verb("work", other, "--", "true", **environ)
    assert refused.returncode == 1 and "this token is for run %s alone" % run in refused.stderr
    assert "needs the scope full" in run_verb("token", "new", **environ).stderr
    farm.service.store.call(taskfarm.create_token(farm.user("ada"), "read", None, "a\x1b]0;x\x07\u202e", None, None))
    table = verb(farm, "token", "list")
    assert [line.split()[:2] for line in table.splitlines()] == [["id", "scope"], ["1", "work"], ["2", "read"]]
    assert "GPU nodes" in table and token not in table and "\x1b" not in table and "\u202e" not in table
    assert [entry["run"] for entry in json.loads(verb(farm, "token", "list", "--json"))["data"]] == [run, None]
    own = verb(farm, "token", "new", "--scope", "full").strip()
    done = run_verb("token", "revoke", "3", "1", **dict(as_ada(farm), TASKFARM_TOKEN=own))
    assert done.stdout == "token 1 is revoked\ntoken 3 is revoked\n" and "login %s" % farm.url in done.stderr
    assert run_verb("list", **environ).returncode == 6
    assert "no token 1 of yours" in verb(farm, "token", "revoke", "1", status=1)


def test_the_token_of_the_access_file_is_listed_and_stays_until_it_is_revoked(tmp_path: Path) -> None:
    db, home = str(tmp_path / "f"), str(tmp_path / "home")
    tokens = []
    for _ in range(3):
        server = Process(db, home=home)
        tokens.append(server.token)
        (listed,) = server.ask("GET", "/api/tokens")[1]["data"]
        assert (listed["scope"], listed["run"], listed["expires"]) == ("full", None, None)
        assert "access file" in listed["label"]
        if len(tokens) == 2:
            done = run_verb("token", "revoke", str(listed["id"]), HOME=home)
            assert done.returncode == 0 and "next start of the server" in done.stderr
            assert server.ask("GET", "/api/runs")[0] == 401
        server.end(signal.SIGTERM)
    assert tokens[0] == tokens[1] != tokens[2]


def test_login_makes_an_access_file(farm: Live, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "access.json"
    environ = {"TASKFARM_ACCESS": str(path)}
    words = ["login", farm.url + "/api/", "--user", "ada", "--fingerprint", as_ada(farm)["TASKFARM_FINGERPRINT"]]
    done = run_verb(*words, stdin="wrong\n", **environ)
    assert done.returncode == 6 and "user ada or the password is wrong" in done.stderr and not path.exists()
    assert "'python3 taskfarm.py user passwd ada --db FILE'" in done.stderr and "GET" not in done.stderr
    done = run_verb("list", **dict(as_ada(farm), TASKFARM_TOKEN="tf1.x"))
    assert done.returncode == 6 and "'python3 taskfarm.py login %s' gets another" % farm.url in done.stderr
    assert "GET" not in done.stderr
    assert run_verb(*words, stdin=Live.PASSWORD + "\n", **environ).returncode == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    access = json.loads(path.read_text())
    assert dict(access, token=farm.token) == dict(file_of(farm), host=socket.gethostname())
    assert Live.PASSWORD not in path.read_text()
    (listed,) = farm.ask("GET", "/api/tokens")[1]["data"]
    assert listed["scope"] == "full" and listed["label"].startswith("login on ")
    assert farm.service.farm.token_text(listed["id"]) == access["token"]
    assert taskfarm.farm_answers(taskfarm.parse_access(access, "")), "it can know the farm again"
    assert run_verb("new", "5", **environ).returncode == 0
    assert len(farm.ask("GET", "/api/runs")[1]["data"]) == 1
    path.unlink()
    for known in (False, True):         # the second time nothing need be asked
        terminal = Terminal(words[:4], environ)
        if not known:
            terminal.wait_for("[y/N] ")
            assert re.search(r"\s%s\s" % words[-1], terminal.shown) and "printed when it was started" in terminal.shown
            terminal.type("y\r")
        terminal.wait_for("password for ada: ")
        terminal.type(Live.PASSWORD + "\r")
        assert terminal.end() == 0 and Live.PASSWORD not in terminal.shown and ("[y/N]" in terminal.shown) is not known
        assert json.loads(path.read_text())["certificate"] == farm.service.certificate


def test_login_asks_for_no_password_before_the_certificate_is_the_right_one(farm: Live, tmp_path: Path) -> None:
    folder, secret = tmp_path / "config", Live.PASSWORD + "\n"
    environ = {"TASKFARM_ACCESS": str(folder / "access.json")}
    with contextlib.closing(Squatter(anothers()[1], farm.port)) as relay, contextlib.closing(Squatter()) as plain:
        fingerprint = as_ada(farm)["TASKFARM_FINGERPRINT"]
        for words, status, sentence in (
                ([relay.url, "--fingerprint", fingerprint], 1, "shows another certificate, SHA256:"),
                ([relay.url], 1, "no terminal to answer on: --fingerprint SHA256:"),
                ([farm.url], 1, "no terminal to answer on: --fingerprint SHA256:"),
                ([farm.url, "--fingerprint", "SHA256:00"], 1, "64 hexadecimal digits"),
                ([plain.url, "--fingerprint", fingerprint], 5, "does not speak TLS"), ([plain.url], 5, "not speak TLS"),
                (["http://127.0.0.1:%d" % farm.port], 1, "looks like https://127.0.0.1:%d, not like" % farm.port)):
            done = run_verb("login", "--user", "ada", *words, stdin=secret, **environ)
            assert done.returncode == status and sentence in done.stderr, done.stderr
            assert done.stdout == "" and done.stderr.count("\n") == 1 and not folder.exists()
        terminal = Terminal(["login", relay.url, "--user", "ada"], environ)
        terminal.wait_for("[y/N] ")
        assert taskfarm.fingerprint(anothers()[0]) in terminal.shown and "password" not in terminal.shown
        terminal.type("\r")
        assert terminal.end() == 1 and "no login was sent" in terminal.shown and not folder.exists()
        taskfarm.write_access(environ["TASKFARM_ACCESS"], dict(file_of(farm), url=relay.url))
        terminal = Terminal(["login", relay.url, "--user", "ada"], environ)
        terminal.wait_for("[y/N] ")
        assert "It is not the one that %s holds" % environ["TASKFARM_ACCESS"] in terminal.shown
        terminal.type("n\r")
        assert terminal.end() == 1
        assert not re.search(rb"(?i)authorization|HTTP/1", relay.heard + plain.heard)


def test_a_certificate_that_the_authorities_of_the_system_vouch_for_needs_no_question(farm: Live, tmp_path: Path
                                                                                      ) -> None:
    environ = {"TASKFARM_ACCESS": str(tmp_path / "access.json"), "SSL_CERT_FILE": str(tmp_path / "authorities")}
    (tmp_path / "authorities").write_text(farm.service.certificate)
    done = run_verb("login", "https://localhost:%d" % farm.port, "--user", "ada", stdin=Live.PASSWORD + "\n", **environ)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "access.json").read_text())["certificate"] == "system"
    assert run_verb("list", **environ).returncode == 0
    (tmp_path / "authorities").write_text(anothers()[0])
    done = run_verb("list", **environ)
    assert done.returncode == 5 and "authorities of this system" in done.stderr and "no login was sent" in done.stderr


def test_login_asks_for_no_password_where_nothing_answers_and_spares_the_file_of_a_living_farm(
        farm: Live, tmp_path: Path) -> None:
    with contextlib.closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        done = run_verb("login", "127.0.0.1:%d" % unused.getsockname()[1], stdin="", HOME=str(tmp_path))
    assert done.returncode == 5 and "no farm answers" in done.stderr
    assert not (tmp_path / ".config").exists()
    mine = tmp_path / ".config/taskfarm/access.json"
    taskfarm.write_access(str(mine), file_of(farm))
    with contextlib.closing(Live(str(tmp_path / "other.sqlite"))) as other:
        done = run_verb("login", other.url, "--user", "ada", "--fingerprint", as_ada(other)["TASKFARM_FINGERPRINT"],
                        stdin=Live.PASSWORD + "\n", HOME=str(tmp_path))
        assert done.returncode == 0 and json.loads(mine.read_text()) == file_of(farm)
        (beside,) = (path for path in mine.parent.iterdir() if path != mine)
        assert json.loads(beside.read_text())["url"] == other.url and "TASKFARM_ACCESS=%s" % beside in done.stdout
        found = run_verb("list", "--url", other.url, HOME=str(tmp_path))
        assert found.returncode == 0, found.stderr
        beside.unlink()
        refused = run_verb("list", "--url", other.url, HOME=str(tmp_path))
        assert refused.returncode == 5 and "TASKFARM_URL" not in refused.stderr
        assert "is not the farm of %s" % mine in refused.stderr and "trying again" not in refused.stderr
        assert "'python3 taskfarm.py login %s'" % other.url in refused.stderr


def test_a_farm_that_is_not_the_one_of_the_given_url_is_not_waited_for(farm: Live, monkeypatch: pytest.MonkeyPatch
                                                                       ) -> None:
    monkeypatch.setattr(threading.Event, "wait", lambda *_: pytest.fail("it waits"))
    access = access_of(farm, certificate=anothers()[0])._replace(url_given=True)
    with contextlib.closing(taskfarm.Client(lambda: access, retry_s=60)) as client:
        with pytest.raises(taskfarm.OtherFarm, match="no login was sent: type 'python3 taskfarm.py login"):
            client.ask("GET", "/api/runs")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_watch_lives_through_a_restart_of_the_server_and_ends_with_the_run(
        farm: Live, tmp_path: Path, terminal: bool) -> None:
    path = tmp_path / "access.json"
    taskfarm.write_access(str(path), file_of(farm))
    run = make_run(farm, 3)
    words = ["status", run, "--watch", "--every", "0.1"]
    if terminal:
        watch = Terminal(words, {"TASKFARM_ACCESS": str(path)})
        shown, process = (lambda: watch.shown), watch.process
    else:
        log = (tmp_path / "log").open("w+")
        process = subprocess.Popen([sys.executable, str(MODULE), *words], stdout=log,
                                   env=dict(os.environ, TASKFARM_ACCESS=str(path)))
        shown = (tmp_path / "log").read_text
    try:
        wait_until(lambda: "3 waiting" in shown())
        farm.stop()
        wait_until(lambda: "the server is away" in shown())
        farm.local = threading.local()
        farm.start()
        taskfarm.write_access(str(path), file_of(farm))       # as a server that starts does: it has another port now
        assert report(farm, run, 0, status="done") == 204
        wait_until(lambda: "2 waiting" in shown())
        for number in (1, 2):
            assert report(farm, run, number, status="done") == 204
        if terminal:
            assert watch.end() == 0
            before, _, last = watch.shown.rpartition("\x1b[J")
            assert "all tasks are done" in last and "away" not in last, "the last picture stays"
            assert re.search(r"\x1b\[[0-9]+A\r$", before), "and stands in the place of the one before"
        else:
            assert process.wait(20) == 0
            log.close()
            assert "the server is back" in shown() and "\x1b" not in shown()
            assert "over" in shown().splitlines()[-1] and "100.0 %" in shown().splitlines()[-1]
    finally:
        process.kill()


def test_ctrl_c_ends_a_watch_below_the_picture(farm: Live) -> None:
    terminal = Terminal(["status", make_run(farm, 3), "--watch"], as_ada(farm))
    terminal.wait_for("time left")
    terminal.type("\x03")
    assert terminal.end() == 130 and "Traceback" not in terminal.shown and terminal.shown.endswith("^C\r\n")


def test_a_watch_of_a_run_that_is_deleted_ends_with_the_sentence_of_the_server(farm: Live) -> None:
    run = make_run(farm, 3)
    process = subprocess.Popen([sys.executable, str(MODULE), "status", run, "--watch", "--every", "0.1", "--json"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=dict(os.environ, **as_ada(farm)))
    assert process.stdout
    assert json.loads(process.stdout.readline())["run"]["numWaiting"] == 3
    assert farm.ask("DELETE", "/api/runs/" + run)[0] == 204
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1 and "there is no run" in errors and errors.count("\n") == 1


def test_the_rate_of_a_watch_comes_from_its_own_readings_once_they_are_longer(farm: Live) -> None:
    run = make_run(farm, 5000)
    for first in (0, 1000):
        farm.ask("PUT", "/api/runs/%s/tasks" % run, {"data": [
            {"task": number, "status": "done"} for number in range(first, first + 1000)]})
    with contextlib.closing(taskfarm.Client(lambda: taskfarm.parse_access(file_of(farm), "test"))) as client:
        monitor = taskfarm.RunMonitor(client, run)
        assert monitor.update().rate is None or monitor.ends.readings, "a list that is cut off tells of its own time"
        monitor.readings.latest.appendleft(taskfarm.Reading(time.monotonic() - 100.0, 0, 0.0))
        rate = monitor.update().rate
        assert rate and rate.ended == 2000 and rate.window_s > 99
        assert farm.ask("POST", "/api/runs/%s/restart?all=True" % run)[0] == 204
        monitor.update()
        assert len(monitor.readings.latest) == 1, "what was before a restart says nothing"


def test_verbs_say_in_a_sentence_that_no_server_answers(monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(taskfarm, "VERB_PATIENCE_S", 0.2)
    monkeypatch.setenv("TASKFARM_TOKEN", "tf1.x")
    with contextlib.closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        url = "https://127.0.0.1:%d" % unused.getsockname()[1]
        for words in (["list"], ["new", "5"], ["status", "x", "--watch"], ["workers"], ["delete", "x", "--yes"]):
            assert taskfarm.main([*words, "--url", url]) == 5
            shown = capsys.readouterr()
            assert shown.out == "" and shown.err.count("\n") == 1 and url in shown.err


def test_the_help_shows_every_verb_and_the_first_ones_first() -> None:
    shown = run_verb("--help").stdout
    listed = re.findall(r"^  ([a-z]+)  +\S", shown.partition("options:")[0], re.M)
    assert [name for name in listed if name in ("run", "new", "submit", "work", "status")] == listed[:sum(
        name in listed for name in ("run", "new", "submit", "work", "status"))]
    assert set(listed) == {words[0] for words in VERBS} and len(listed) == len(set(listed))
    assert max(map(len, shown.splitlines())) <= 120


def test_a_start_prints_one_line_and_writes_the_access_file(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        server = Process(str(tmp_path / "f"))
    finally:
        os.umask(old)
    assert re.fullmatch(r"taskfarm [0-9.]+ serves \S+ at https://127\.0\.0\.1:[0-9]+\n", server.line)
    assert server.process.stdout and server.process.stdout.readline() == "certificate %s\n" % fingerprint_of(server)
    access = Path(server.home, ".config/taskfarm/access.json")
    content = json.loads(access.read_text())
    assert server.process.stdout.readline() == "for this machine alone: workers on other nodes need --host 0.0.0.0\n"
    assert set(content) == {"url", "user", "token", "farm", "certificate", "host", "served"}
    assert content["url"] == server.line.split()[-1]
    assert server.ask("GET", "/api/runs")[0] == 200
    for pin, answers in ((content["certificate"], True), (anothers()[0], False), ("", False), ("system", False)):
        assert taskfarm.farm_answers(taskfarm.parse_access(dict(content, certificate=pin), "")) is answers
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


def test_a_start_that_is_refused_leaves_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "f")
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run_verb("--db", str(link), "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1 and "--port 0" in done.stderr
    assert os.readlink(str(link)) == str(tmp_path / "f") and not (tmp_path / "f").exists()
    server = Process(str(link))
    assert (tmp_path / "f").exists() and server.end(signal.SIGTERM) == 0


def on_another_machine(farm: Live, **changes: Any) -> bytes:
    """Make the lock of a farm look as from another machine, in a file system whose locks do not reach that far."""
    path = taskfarm.lock_path(farm.path)
    content = json.dumps(dict(taskfarm.read_holder(farm.path), machine="another", **changes))
    os.remove(path)
    Path(path).write_text(content)
    os.chmod(path, 0o600)
    return content.encode()


@pytest.mark.parametrize("host, url, sentence", [
    (None, "https://127.0.0.1:%d", "do not work between machines"),      # a name that two machines share
    ("login2", "https://0.0.0.0:%d", "do not work between machines"),    # 0.0.0.0: it answers, and is no loopback name
    ("login2", "https://127.0.0.1:%d", "cannot be asked from here")])
def test_a_server_of_another_machine_keeps_its_file_where_locks_do_not_reach_that_far(
        farm: Live, host: Optional[str], url: str, sentence: str) -> None:
    host = host or socket.gethostname()
    before = on_another_machine(farm, host=host, url=url % farm.port)
    for words in (["--db", farm.path, "--port", "0"], ["check", "--db", farm.path]):
        done = run_verb(*words)
        if words[0] == "check" and "cannot" not in sentence:
            assert done.returncode == 0, "it is asked, as the server of any other file in use"
        else:
            assert done.returncode == 1 and sentence in done.stderr and done.stderr.count("\n") == 1
            assert host in done.stderr and "Traceback" not in done.stderr
        assert Path(farm.path + ".lock").read_bytes() == before, "nothing of the first is forgotten"
    assert farm.ask("GET", "/api/runs")[0] == 200


def test_the_secret_of_the_lock_file_goes_to_no_process_without_its_certificate(farm: Live, squatter: Squatter) -> None:
    holder = taskfarm.read_holder(farm.path)
    assert run_verb("user", "list", "--db", farm.path).stdout == "ada\n"
    farm.service.lock.write(dict(holder, admin_url=squatter.url))
    for words in (["user", "list"], ["user", "passwd", "ada"], ["check"]):
        done = run_verb(*words, "--db", farm.path, stdin="new\n")
        assert done.returncode == 1 and "the secret was not sent" in done.stderr and done.stderr.count("\n") == 1
    assert squatter.connections >= 3 and not re.search(rb"(?i)authorization|HTTP/1", squatter.heard)


@pytest.mark.parametrize("changes, warned", [
    ({"host": "login2", "url": "https://0.0.0.0:1"}, True),             # nothing listens there
    ({"host": "login2", "certificate": anothers()[0]}, True),           # another farm has the address
    ({"host": socket.gethostname(), "url": "https://127.0.0.1:1"}, False),     # ours, before it was started again
    ({"machine": taskfarm.machine_id()}, False), ({}, False)])
def test_the_file_of_a_server_that_has_gone_is_taken_over(
        farm: Live, caplog: pytest.LogCaptureFixture, changes: Dict[str, Any], warned: bool) -> None:
    left = dict({**taskfarm.read_holder(farm.path), "url": "https://0.0.0.0:%d" % farm.port, "machine": "another"},
                **changes) \
        if changes else {}
    path = farm.path + "-elsewhere"
    Path(path + ".lock").write_text(json.dumps(left))
    taskfarm.take_lock(path).close()
    assert ("does not answer at" in caplog.text and "login2" in caplog.text) is warned
    assert caplog.text.count("\n") == int(warned)


def test_a_second_farm_leaves_the_access_file_of_one_that_answers(farm: Live, tmp_path: Path) -> None:
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path)
    try:
        taskfarm.publish_access(farm.service, farm.user("ada"), farm.path)
        first = (tmp_path / "taskfarm/access.json").read_text()
        other = Live(str(tmp_path / "other.sqlite"))
        taskfarm.publish_access(other.service, other.user("ada"), other.path)
        assert (tmp_path / "taskfarm/access.json").read_text() == first
        (beside,) = (tmp_path / "taskfarm").glob("access-other-*.json")
        assert json.loads(beside.read_text())["url"] == other.url
        farm.stop()
        taskfarm.publish_access(other.service, other.user("ada"), other.path)
        assert json.loads((tmp_path / "taskfarm/access.json").read_text())["url"] == other.url
        other.close()
        farm.start()
    finally:
        del os.environ["XDG_CONFIG_HOME"]


def test_a_new_farm_at_the_address_of_one_that_is_gone_is_found_by_who_waits_for_it(farm: Live, tmp_path: Path) -> None:
    path = str(tmp_path / "access.json")
    gone = dict(file_of(farm), farm="0" * 32, certificate=anothers()[0])
    taskfarm.write_access(path, gone)
    environ = {"TASKFARM_ACCESS": path}
    with contextlib.closing(taskfarm.Client(lambda: taskfarm.find_access(environ), 20.0)) as client:
        client.say = lambda _: taskfarm.write_access(path, file_of(farm))      # while it already waits
        assert client.ask("GET", "/api/runs") == {"data": []}
        client.say = print
        taskfarm.write_access(path, dict(gone, url="https://127.0.0.1:1"))
        assert client.ask("GET", "/api/runs") == {"data": []} and not client._find_again(), "it stays with its farm"
    taskfarm.write_access(path, gone)
    assert taskfarm.farm_access_path(environ, "1" * 32, farm.url, farm.path) == path, "at our address only we answer"


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


@pytest.mark.parametrize("running", [False, True])
def test_the_audit_is_shown_with_and_without_a_server_and_steers_no_terminal(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: bool) -> None:
    db = str(tmp_path / "f")
    with contextlib.closing(Store(db)) as store:
        for number in range(3):
            store.call(taskfarm.create_run("r%d" % number, 9, "\x1b[2J\u202e tiles"))
    server = Process(db) if running else None
    monkeypatch.setattr(taskfarm, "ROWS_AT_ONCE", 2)
    shown, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert taskfarm.main(["audit", "--db", db]) == 0
    with contextlib.redirect_stdout(printed):
        assert taskfarm.main(["audit", "--db", db, "--json"]) == 0
    lines = json.loads(printed.getvalue())["data"]
    assert [line["object"][:2] for line in lines[:3]] == ["r0", "r1", "r2"]
    assert lines[0]["user"] is None and (lines[-1]["action"] == "login") is running
    assert shown.getvalue().count("(administration)") >= 3 and "tiles" in shown.getvalue()
    assert "\x1b" not in shown.getvalue() and "\u202e" not in shown.getvalue()
    assert shown.getvalue().splitlines()[0].split() == ["when", "user", "from", "times", "action", "what"]
    if server:
        assert server.end(signal.SIGTERM) == 0


def test_serve_private_gives_each_user_names_of_their_own(tmp_path: Path) -> None:
    server = Process(str(tmp_path / "f"), "--private")
    users = {}
    for name in ("ann", "bob"):
        assert run_verb("user", "add", name, "--db", str(tmp_path / "f"), stdin="secret\n").returncode == 0
        users[name] = {"TASKFARM_URL": "https://127.0.0.1:%d" % server.port, "TASKFARM_USER": name,
                       "TASKFARM_FINGERPRINT": fingerprint_of(server), "TASKFARM_PASSWORD": "secret",
                       "HOME": server.home}
        assert run_verb("new", "3", "--name", "tiles", **users[name]).returncode == 0
    run = run_verb("new", "2", "--name", "bobs", **users["bob"]).stdout.strip()
    for name, runs in (("ann", 1), ("bob", 2)):
        listed = json.loads(run_verb("list", "--json", **users[name]).stdout)["data"]
        assert [entry["user"] for entry in listed] == [name] * runs
        assert " by %s\n" % name in run_verb("status", "tiles", **users[name]).stdout
        assert "\t%s\t" % name in run_verb("list", **users[name]).stdout
    assert run_verb("status", "tiles", **users["bob"]).returncode == 0, "of two with that name, one is for bob"
    for words in (("status", "bobs"), ("status", run), ("delete", run, "--yes"), ("restart", run)):
        done, other = run_verb(*words, **users["ann"]), run_verb(words[0], "0" * 32, *words[2:], **users["ann"])
        assert done.returncode == other.returncode == 1
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
    (["--port", "0"], 2, "as in 'python3 taskfarm.py serve --port 0 --db runs.sqlite'"),
    (["harvest"], 2, "there is no verb harvest: 'python3 taskfarm.py --help' shows all"),
    (["Statsu", "an ice", "--json"], 2, "did you mean 'python3 taskfarm.py status 'an ice' --json'?"),
    (["token", "lst"], 2, "did you mean 'python3 taskfarm.py token list'?"),
    (["user", "list", "--db", "{dir}/missing"], 1, "there is no"),
    (["work"], 2, "takes the name of a run"),
    (["work", "antarctica", "--any"], 2, "--any means all of your runs: leave out antarctica"),
    (["work", "--any", "--", "true"], 2, "several runs have a command each"),
    (["work", "a", "b", "--", "true"], 2, "several runs have a command each"),
    (["run", "3"], 2, "which command?"),
    (["work", "antarctica", "--until", "later", "--", "true"], 2, "17:30"),
])
def test_a_wrong_start_gets_a_sentence(tmp_path: Path, words: List[str], status: int, sentence: str) -> None:
    (tmp_path / "text").write_text("some text\n" * 200)
    done = run_verb(*(word.replace("{dir}", str(tmp_path)) for word in words))
    assert done.returncode == status and sentence in done.stderr and "Traceback" not in done.stderr


def test_without_a_word_the_overview_is_shown(tmp_path: Path) -> None:
    shown = run_verb()
    assert shown.returncode == 0 and shown.stdout == run_verb("--help").stdout and "to start with" in shown.stdout
    assert "No such file" in run_verb(TASKFARM_DB="/nowhere/at/all/f").stderr, "this serves the file"


def test_commands_in_sentences_can_be_pasted_wherever_the_file_is(farm: Live, tmp_path: Path) -> None:
    (tmp_path / "my bin").mkdir()
    shutil.copy(str(MODULE), str(tmp_path / "my bin/taskfarm.py"))
    verb(farm, "new", "5", "--name", "an ice")
    for words, kind in ((["new", "5", "--name", "an ice"], "status"), (["stats", "an ice"], "status"),
                        (["status", "arctic"], "list"), (["new", "5", "--name", "an ice"], "--again")):
        done = subprocess.run([sys.executable, "my bin/taskfarm.py", *words], cwd=str(tmp_path), capture_output=True,
                              text=True, env=dict(os.environ, **as_ada(farm)))
        (line,) = [line for line in re.findall(r"'(\S+ 'my bin/.*?)'(?= shows| makes|\?)", done.stderr) if kind in line]
        pasted = subprocess.run(line, shell=True, cwd=str(tmp_path), capture_output=True, text=True,
                                env=dict(os.environ, **as_ada(farm)))
        assert done.returncode in (1, 2) and pasted.returncode == 0 and pasted.stdout, (line, pasted.stderr)
    assert len(farm.ask("GET", "/api/runs")[1]["data"]) == 2


TABS = {
    "taskfarm.py sta": "status", "python3 taskfarm.py sta": "status", "python3 ./taskfarm.py tok": "token",
    "taskfarm.py token ": "list new revoke", "taskfarm.py status ar": "ar-2 arctic", "taskfarm.py list ar": "",
    "taskfarm.py work -j 4 arc": "arctic", "taskfarm.py token new --run arc": "arctic",
    "taskfarm.py tasks arctic --status d": "done", "taskfarm.py tasks arctic --ord": "--order",
    "taskfarm.py work arctic -- sta": "", "taskfarm.py status --every ": "", "taskfarm.py user add --d": "--db",
    "python3 other.py sta": "", "taskfarm.py completion z": "zsh"}


@pytest.mark.parametrize("shell, asked", [
    ("bash", "COMP_WORDS=(%s); COMP_CWORD=$((${#COMP_WORDS[@]}-1)); _taskfarm; echo ${COMPREPLY[*]}"),
    ("fish", "echo (complete -C \"%s\" | string replace -r '\\t.*' '')")])
def test_a_tab_completes_verbs_options_and_runs(farm: Live, tmp_path: Path, shell: str, asked: str) -> None:
    if not shutil.which(shell):
        pytest.skip("there is no %s" % shell)
    for name in ("arctic", "ar-2", "ar $(touch x)"):
        assert farm.ask("POST", "/api/run", {"numTasks": 1, "name": name})[0] == 201
    environ, folder = dict(os.environ, HOME=str(tmp_path), **as_ada(farm)), tmp_path / "empty"
    folder.mkdir()
    script = subprocess.check_output([sys.executable, str(MODULE), "completion", shell], text=True)
    script += "".join(asked % (re.sub(" $", " ''", line) if shell == "bash" else line) + "\n" for line in TABS)
    done = subprocess.run([shell, "/dev/stdin"], input=script, capture_output=True, text=True, cwd=str(folder),
                          env=environ, timeout=60)
    shown = [" ".join(sorted(line.split())) for line in done.stdout.splitlines()]
    assert dict(zip(TABS, shown)) == TABS and done.stderr == "" and not list(folder.iterdir())


def test_the_names_for_a_tab_are_quick_and_silent_where_no_farm_answers(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "TASKFARM_TOKEN": "tf1.x"}
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as deaf:        # it takes connections, and no more
        for url in ("", "https://127.0.0.1:%d" % deaf.getsockname()[1], "https://127.0.0.1:1"):
            done = run_verb("completion", "runs", TASKFARM_URL=url, **environ)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), url


@pytest.mark.parametrize("words, at", [
    ("work ice ./tile.sh 5", 2), ("work ice -j 4 ./tile.sh", 4), ("work -j4 ice ./tile.sh", 3), ("run 5 ./tile.sh", 2),
    ("run --lines p ./sim {line}", 3), ("run --grid a=1 --retry --db x --grid b=2 ./sim", 8), ("work ice", 2),
    ("work ice -j", 3), ("run ./tile.sh 5", 3), ("run 5 --lines p ./tile.sh", 5), ("work ice --job 4 ./tile.sh", 5)])
def test_a_command_without_dashes_begins_behind_the_options(words: str, at: int) -> None:
    assert taskfarm.find_command(words.split()) == at
    assert taskfarm.find_command(["run", "x", *["file"] * 100000]) == 100002


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
    assert "199 done, 1 failed, 0 computing, 0 waiting" in output and "exit status 3: some tasks failed" in output
    assert "tile 13 is all clouds" in output and "200 done, 0 failed, 0 computing, 0 waiting" in output
    assert '"numWaiting":2,"numComputing":0,"numDone":1' in output
