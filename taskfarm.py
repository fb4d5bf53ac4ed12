#!/usr/bin/env python3
"""taskfarm: hands out the numbered tasks of a run to loosely coupled workers.

    python3 taskfarm.py --db runs.sqlite

One file, the Python standard library, one SQLite file for the state. It answers the REST API of
the Flask and PostgreSQL "taskfarm" (Hagdorn and Gourmelen 2023), so that the published client
`taskfarm-worker` works against it unchanged.

Words
    run       N tasks, numbered 0 to N-1, under one uuid
    task      one number of a run; it has a status and a percentage
    worker    a process that claims tasks; it registers with a uuid of its own making
    claim     to be given the waiting task with the lowest number
    attempt   a claim of a task, counted: 1 is the first
    hold      what a worker has of a task from its claim until it reports an end, or the task is taken from it
    lease     how long a worker may be silent, in seconds; any request but a GET that names it begins it anew
    lapse     a hold that lapsed lets others claim the task; until one does, its worker may take it back
    report    to tell how far a task is, or that it is done, has failed, or is let go
    failure   an attempt that was reported failed; a loss: one that was started, and whose lease ran out
    fencing   a report that names worker or attempt counts only for the claim that holds the task
    restart   to let tasks of a run wait again
    paused    of a run: no task is handed out, what computes goes on
    cancelled of a run: it is given up, and over; of a task: it was given up, and has failed with this message
    after     the run for which another waits before its first task is handed out
    user      somebody with a password; every user may do everything, unless the farm is private
    private   for a user there are their own runs and workers alone: what others made is answered as what there is not
    token     a signed text that stands for a user until it expires, is revoked, or the password changes
    scope     what a token may do: read, work (read, claim, report, register workers), or full (all that its user may)

States of a task
                  claim              report done
      (waiting) --------> computing ------------> done
          ^                |     |                  |
          |   let go,      |     | report failed,   |
          +-- sign-off, ---+     | lease runs out   |
          |   fewer failures     v  too often       |
          +-- and losses      failed                |
          |                      |                  |
          +----------------------+------------------+
            restart, report waiting

    A report that names no worker and no attempt may also set any state from any other, and ends every
    hold. A restart lets tasks wait again: all of them (at 0 percent); or those that are not done at 100
    percent and that no worker under a lease computes; or the failed ones. The last two keep percentages.
    A cancelled run keeps its tasks: those that compute wait, and none is handed out until it is resumed or
    restarted. Single tasks that are cancelled, and are not done, have failed: no attempt, and no failure counted.
    A run that waits for another begins when all tasks of that one are done (with afterAny when it is over), once for
    all: "after" is null then. While that one is over and not complete, or when it was deleted, it does not begin. A
    claim of a run that is paused or waits gets 204 with Retry-After; of one that is cancelled or does not begin by
    itself, 204 without.

Endpoints (JSON in, JSON out; a login everywhere but where it says open)
    GET    /livez                         open  200 while the server answers
    GET    /readyz                        open  200 when work can be written down, else 503
    GET    /api/token                     a session for the user who asks; who shows a token gets that token
    POST   /api/tokens                    a new token: scope, run, days, label
    GET    /api/tokens                    a page of the user's tokens; for admin, of all users'
    DELETE /api/tokens/<id>               the token is revoked
    POST   /api/run                       a new run of numTasks tasks; name, maxFailures, maxLosses, work, after,
                                                 afterAny
    GET    /api/runs                      all runs, in order of creation, as {"data": [...]}; user: who made it
    GET    /api/runs/<run>                one run, or ?info= one of its figures
    DELETE /api/runs/<run>                the run and its tasks are gone
    GET    /api/runs/<run>/work           the command of its tasks, with folder and parameters, if the run knows it
    POST   /api/runs/<run>/restart        tasks wait again; ?all=True every one, ?status=failed those; a body selects
                                                 some of them: tasks, exitCode, like
    POST   /api/runs/<run>/pause          no task is handed out any more
    POST   /api/runs/<run>/resume         tasks of a paused or cancelled run are handed out again
    POST   /api/runs/<run>/cancel         the run is given up, or only its tasks [[first, last], ...]
    POST   /api/runs/<run>/extend         numTasks more tasks
    POST   /api/runs/<run>/task           claim a task for worker_uuid, or that task; 204 when none waits
    POST   /api/runs/<run>/tasks          claim up to count tasks; of more than 200, as many as there is time for
    GET    /api/runs/<run>/tasks          a page of tasks; ?status=, ?order=task, started or finished, ?tasks=13,17-20,
                                                 ?limit=, ?after=
    PUT    /api/runs/<run>/tasks          report many tasks
    GET    /api/runs/<run>/tasks/<task>   one task, or ?info= one of its figures
    PUT    /api/runs/<run>/tasks/<task>   report percentCompleted, status or both; worker_uuid, attempt, elapsed;
                                                 of an end: memory, cpu; of a failure: exitCode, message, log
    POST   /api/worker                    register a worker: uuid, hostname, pid, lease, job
    GET    /api/worker/<worker>           a worker and a page of what it holds
    PUT    /api/worker/<worker>           a heartbeat
    DELETE /api/worker/<worker>           the worker signs off, its tasks wait; ?why= its batch job failed at once
    GET    /api/workers                   a page of workers; ?all=True, ?order=latest
    GET    /api/users                     admin  names of the users
    POST   /api/users                     admin  a new user, with a password hash
    PUT    /api/users/<user>              admin  another password hash; ends the user's tokens
    DELETE /api/users/<user>              admin  the user is gone, with every token; the runs stay
    GET    /api/audit                     admin  a page of who did what, when and from where
    POST   /api/backup                    admin  begin a consistent copy of the file
    GET    /api/backup                    admin  how far the copy is
    DELETE /api/backup                    admin  nobody waits for the copy any more
    GET    /                              open  what this is, as HTML

    "admin" is whoever can read the lock file beside the database: the verbs of this file.

    One port speaks TLS (1.2 upward) and plain HTTP, as the first byte of the client tells. Plain HTTP is for clients
    on the server's own machine; others get 403 whatever they ask for, unless the keeper allows it (--plain-http).
    A token of scope read may GET, but for tokens. One of scope work may also claim, report, register workers, send
    their heartbeats and sign them off. One for a run reaches that run alone: lists show it nothing else, and to name a
    worker that holds tasks of another run is 403. One that was made with a token lasts no longer than that. A session
    is not in the list of tokens: it is of scope full, ends by itself (--token-days), and with the password.

    A user's POST may bring an Idempotency-Key: when it comes again with the same request, it gets the same answer
    and changes nothing more. Remembered for a day; of claims, the last key of each worker.

Errors common to all (RFC 9457 problem details), judged in this order
    400 malformed request    401 no login             411 chunked body       400 not a JSON object,
    414 request line         404 unknown path         413 body too large         unknown field,
    431 header fields        405 wrong method         415 not declared JSON      wrong type, range
    After the first column, whatever the path: 403 plain HTTP from another machine, 421 a Host that is neither an
    address nor a name that the server knows, 403 an Origin or a Sec-Fetch-Site that tells of a page of another site.
    Also: 403 what is for admin, or beyond the scope or the run of the token, 408 not whole in time, 409 (said below
    each endpoint), 417 another Expect than 100-continue, 422 an Idempotency-Key that came with another request, 429
    too many wrong logins from this address (with Retry-After), 503 a disk that takes no write, or too many passwords
    to be checked at once (with Retry-After), 505 another HTTP, 500 a fault, with an id that is in the log.

Promises
    1. What a client was told is on the disk (SQLite in WAL mode, synchronous=FULL).
    2. A task is given to exactly one worker at a time; the lowest waiting number comes first.
    3. numWaiting + numComputing + numDone + numFailed = numTasks, always.
    4. percentDone is the exact mean of percentCompleted over all tasks.
    5. A refused request has changed nothing; reading never writes (but for the audit, that somebody has logged in).
    6. A run costs the same to create whatever its size, and ids are never used again.
    7. A restart, a deletion or a cancel of a run happens wholly or not at all, as clients see it. A restart with a
       body and a cancel of tasks take these one after another; said again, it does the rest.
    8. The attempt of a task never falls, and no report of a former holder changes anything once somebody else has
       claimed the task. A report that names worker or attempt counts once, however often it comes.
    9. A task of a worker whose lease has run out, or who has signed off, waits again.

Contents
    LIMITS AND ERRORS   constants with units; what can go wrong, by status
    RULES               what may become of a task: pure functions
    SCHEMA              the tables, and their rows as classes
    TRANSACTIONS        what an operation is given, and what is remembered between two
    ROWS                rows found and changed, with the figures that follow
    QUERIES             what is only read: pages of lists, the recount
    OPERATIONS          what can be done to runs, tasks and workers
    FILE                whose the file is
    WRITER              one connection, one thread: all that waits in one transaction
    LOGIN               password hashes, signed tokens, remembered logins
    TLS                 a certificate of the farm's own, and the settings of both ends
    HTTP                requests and replies as bytes; knows no socket, no run and no task
    CONNECTIONS         bytes that came from a client, and bytes that are to go
    SERVER              the thread that serves all connections in turn
    API                 one function for each endpoint
    PAGES               what a person sees in a browser
    SERVICE             lock, store and address made into one server
    TERMINAL            what a person sees on a terminal: tables, bars, rates
    CLIENT              how programs and this file's own verbs talk to a server
    COMMANDS            the command of a task: its arguments, its process, how it ended
    REPORTER            the thread of a worker that claims tasks and sends reports
    WORKER              runs a command for each task that is claimed
    BATCH SYSTEMS       the job that a worker runs in: when it ends, its room and its array; the user's other jobs
    BENCH               how many workers this machine can feed
    FAIR                how long one client waits beside others that do their worst
    DOCTOR              whether a node is fit to serve and to work
    STATUS              how a run gets on, once or until it is over
    VERBS               what users type: runs, tasks, workers, work
    UPKEEP              what keepers type: start and end of the server, users, copies, checks
    SUBMIT              workers of a run as jobs of a batch system
    RUN                 all of it in one line: a farm for as long as one run takes
    COMMAND LINE        options, the parser and main
"""
import sys

if sys.version_info < (3, 9):
    sys.exit("taskfarm needs Python 3.9 or newer and this is %d.%d: clusters keep newer ones in /usr/bin as python3.11 "
             "or python3.9, or behind 'module load python' (see 'module avail python')." % sys.version_info[:2])

import argparse
import array
import base64
import bisect
import contextlib
import csv
import datetime
import difflib
import errno
import fcntl
import functools
import getpass
import glob
import hashlib
import hmac
import heapq
import html
import http.client
import ipaddress
import itertools
import json
import logging
import math
import mmap
import operator
import os
import pickle
import pwd
import queue
import random
import re
import resource
import secrets
import select
import selectors
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import struct
import subprocess
import tempfile
import termios
import textwrap
import threading
import time
import traceback
import unicodedata
import urllib.parse
import uuid
import warnings
import weakref
from collections import Counter, deque
from decimal import Decimal
from email.utils import formatdate, parsedate_to_datetime
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import (
    Any, Callable, Collection, Dict, FrozenSet, Generator, Iterable, Iterator, List, Mapping, NamedTuple, NoReturn,
    Optional, Sequence, Set, Tuple, Type, Union)

__version__ = "1.2.0"
__all__ = ["tfRuns", "TaskFarm", "TaskFarmWorker", "FarmError", "Conflict", "NotFound", "Unreachable"]

log = logging.getLogger("taskfarm")


# ---------------------------------------------------------------- LIMITS AND ERRORS
# Constants with their units, and what can go wrong. Knows nothing of what stands below.
#
# A new limit: a line here with its unit, and one in README's table of limits when users can meet it. A new error: a
# class with its status, and the sentence about it under "Errors common to all" in the head.

MAX_TASKS = 2 ** 31 - 1             # tasks in a run
MAX_PID = 2 ** 31 - 1
FULL = 100 * 10 ** 6                # 100 percent in millionths of a percent: integers, so that sums are exact

LINE_LIMIT = 16 * 1024              # bytes of a request line or header line
HEAD_LIMIT = 32 * 1024              # bytes of a request before its body
FIELD_LIMIT = 100                   # header fields
BODY_LIMIT = 64 * 1024              # bytes of a body
BATCH_BODY_LIMIT = 4 * 1024 * 1024  # bytes of a body that holds a batch
BUFFER_LIMIT = 64 * 1024 * 1024     # bytes in the buffers of all who have logged in; beyond that, reading pauses
REQUEST_S = 30.0                    # for a request to begin, for it to be whole, for a reader to take some bytes
ACCEPT_S = 0.25                     # for this long a new connection is not closed at the descriptor limit
DRAIN_S = 8.0                       # a server that stops waits this long for the requests it has begun
MAX_BATCH = 10000                   # tasks of one batch, and held by one worker with a lease
RETRY_S = 1.0                       # between a write that met a full disk and the next one
LOGIN_MEMORY_S = 300.0              # a login that was verified is remembered this long
REFUSAL_MEMORY_S = 10.0             # a login that was refused is remembered this long
TOKEN_DAYS = 30.0                   # of GET /api/token: the published client fetches one and keeps it, and a job is no
                                    # longer. It cannot be revoked by itself, so it does not last a year
LOGIN_DAYS = 365                    # of the token that the verb login makes
MAX_TOKEN_DAYS = 3650
MAX_TOKENS = 1000                   # of one user
LABEL_LIMIT = 100                   # characters that say what a token is for
MAX_LEASE_S = 86400
CLOCK_CHECK_S = 5.0                 # with leases running, the writer reads the clock at least this often
STOPPED_S = 1.0                     # the writer woke this much too late: the process was stopped
MAX_ELAPSED_S = 10 ** 9             # seconds that a task may have taken
MAX_RETRY_AFTER_S = 60
WITHHELD_S = 30.0                   # after which a worker asks again for tasks of a run that is paused, or waits
MAX_SPANS = 1000                    # ranges of tasks in one request,
MAX_NAMED = 100000                  # and the tasks in them
MAX_TRIES = 1000                    # the largest maxFailures and maxLosses
DEFAULT_PAGE, MAX_PAGE = 100, 1000  # entries of a page
PAGE_CHARS = 250000                 # of messages and logs in a page: as JSON each may be 6 bytes, and 16 MB took 50 ms
PAGE_ROWS = 10000                   # rows read for a page: a rare status makes short pages, not slow ones
MESSAGE_LIMIT = 2000                # characters of a failure's message
WHY_LIMIT = 200                     # characters of why a batch job failed at once
LOG_LIMIT = 1024                    # characters of the path of its log
MAX_MEMORY = 2 ** 53                # bytes that a task may have used
KEY_LIMIT = 128                     # characters of an Idempotency-Key
KEY_MEMORY_S = 86400.0              # an answer is remembered this long,
KEYS_REMEMBERED = 100000            # but no more than so many of them
REPORTS_REMEMBERED = 8              # attempts of a task whose last report is known when it comes again
WORKER_MEMORY_S = 30 * 86400.0      # a worker that holds nothing is forgotten this long after its last request
FORGET_CHECK_S = 3600.0             # between two searches for workers to forget
AUDIT_LINES = 20000                 # of each action, in the audit
FAILED_S = 60.0                     # failed logins are written down so often at most,
FAILED_LINES = 20                   # in so many lines: of one user and address each, and one for all others
LOGINS_REMEMBERED = 20000           # users and addresses whose login of the day is written down
DAY_S = 86400.0


class FarmError(RuntimeError):
    """An error that a client is told: a status, and a sentence that says what was asked and what would do.

    It is a RuntimeError because scripts for the published client catch that.
    """
    status = 500
    headers: Tuple[Tuple[str, str], ...] = ()


class BadRequest(FarmError):
    """400: malformed, or not what the contract asks for."""
    status = 400


class Unauthorized(FarmError):
    """401: no login, or a wrong one. It never says whether user or password was wrong."""
    status = 401
    headers = (("WWW-Authenticate", 'Basic realm="taskfarm", charset="UTF-8"'),)

    def __init__(self) -> None:
        super().__init__("log in with a user and password, or with a token that has not expired or been revoked")


class Forbidden(FarmError):
    """403: for admin, beyond the scope of the token, from a page of another site, or by plain HTTP from elsewhere."""
    status = 403


class NotFound(FarmError):
    """404: no such path, run, task, worker, user, token or figure."""
    status = 404


class MethodNotAllowed(FarmError):
    """405: the path exists, the method does not. Allow names those that do."""
    status = 405

    def __init__(self, method: str, allowed: Sequence[str]) -> None:
        super().__init__("this path does not take %s, only %s" % (method, ", ".join(allowed)))
        self.headers = (("Allow", ", ".join(allowed)),)


class RequestTimeout(FarmError):
    """408: the request took too long to arrive."""
    status = 408


class Conflict(FarmError):
    """409: the request contradicts what the farm knows."""
    status = 409


class LengthRequired(FarmError):
    """411: the body is chunked."""
    status = 411


class TooLarge(FarmError):
    """413: the body is too large."""
    status = 413


class UriTooLong(FarmError):
    """414: the request line is too long."""
    status = 414


class UnsupportedMediaType(FarmError):
    """415: the body is not declared application/json."""
    status = 415


class ExpectationFailed(FarmError):
    """417: an Expect other than 100-continue."""
    status = 417


class Misdirected(FarmError):
    """421: the Host field names another server."""
    status = 421


class Unprocessable(FarmError):
    """422: the Idempotency-Key came with another request before."""
    status = 422


class TooManyRequests(FarmError):
    """429: too many wrong logins. Retry-After says for how long (RFC 6585, section 4)."""
    status = 429

    def __init__(self, wait_s: float) -> None:
        super().__init__("too many wrong logins came from this address: the next one is looked at in %d s. A valid "
                         "token is taken at any time" % math.ceil(wait_s))
        self.headers = (("Retry-After", "%d" % math.ceil(wait_s)),)


class HeadTooLarge(FarmError):
    """431: a header line is too long, or all of them are, or there are too many."""
    status = 431


class Unavailable(FarmError):
    """503: the server cannot do it now. Nothing was changed."""
    status = 503


class VersionNotSupported(FarmError):
    """505: the HTTP version is not 1.x."""
    status = 505


class Refusal(Exception):
    """A server cannot start, or a verb cannot do its work: one sentence for a person, exit status 1."""


class Now(NamedTuple):
    """The time, of both clocks."""
    utc: float      # seconds since 1970, for what is stored and shown
    tick: float     # seconds of a monotonic clock, for what runs out


def system_clock() -> Now:
    """The real time. Tests pass clocks of their own."""
    return Now(time.time(), time.monotonic())


def next_from(waiting: "queue.SimpleQueue[Any]", patience_s: Optional[float]) -> Any:
    """The next entry of a queue that one thread reads. Waits *patience_s* at most, for ever if None.

    Raises queue.Empty. `get(timeout=...)` alone may wait for ever on Python 3.9 and 3.10. After an entry has been
    taken, the queue's lock is free. Then `get` takes the lock and waits again, for what remains of the timeout,
    and a negative timeout means for ever there. It hung within some 100 000 calls at a timeout of 0, and within
    10 000 at 10 microseconds. `get_nowait` has no timeout, and leaves the lock taken.
    """
    try:
        return waiting.get_nowait()
    except queue.Empty:
        if patience_s is not None and patience_s <= 0:
            raise
    return waiting.get(timeout=patience_s)


# ---------------------------------------------------------------- RULES
# What may become of a task: pure functions from a task and an event to a task. Knows no SQL, no clock and no file.
#
# A new state or column of a task begins here: the field of Task and the rules that set it. Then SCHEMA (column,
# CHECK, view), SWEEPS in OPERATIONS (restarts by one statement), task_json in API, and the model in the tests.

WAITING, COMPUTING, DONE, FAILED = range(4)
STATUS = ("waiting", "computing", "done", "failed")

# What became of the last claim of a task; None when there was none, or when somebody who named no claim ended it.
# Held: HELD was claimed in a batch and is not begun, STARTED is being worked on.
# Lapsed, and its worker may take it back until somebody else claims the task: LAPSED and LOST when the lease ran out
# (LOST counted a loss), GIVEN_UP by a sign-off or a partial restart.
# Ended by a report of the holder: kept to know the report when it comes again.
HELD, STARTED, LAPSED, LOST, GIVEN_UP, ENDED_DONE, ENDED_FAILED, ENDED_WAITING = range(1, 9)
ENDED = {DONE: ENDED_DONE, FAILED: ENDED_FAILED, WAITING: ENDED_WAITING}

ALIVE, EXPIRED, SIGNED_OFF = range(3)       # states of a worker


class Task(NamedTuple):
    """A task with every column of its row. One that nothing has happened to is Task(id), and has no row."""
    id: int
    run: Optional[int] = None       # the id of its run; None: no row yet
    status: int = WAITING
    millionths: int = 0             # of a percent, 0 to FULL
    worker: Optional[int] = None    # the id of who claimed it last
    attempt: int = 0                # how often it was claimed
    hold: Optional[int] = None      # what became of the last claim, HELD to ENDED_WAITING
    failures: int = 0               # attempts that were reported failed
    losses: int = 0                 # attempts whose worker was silent for longer than its lease
    started: Optional[int] = None   # milliseconds since 1970: when the last attempt began
    finished: Optional[int] = None  # and when it ended in done or failed
    exit_code: Optional[int] = None     # of the last failure
    message: Optional[str] = None
    memory: Optional[int] = None    # bytes at its peak: of the last attempt that was reported done or failed
    cpu_ms: Optional[int] = None    # milliseconds of all its processors: likewise
    log: Optional[str] = None       # the path of what the last failure wrote


class Report(NamedTuple):
    """What a client says of a task; None where it says nothing."""
    number: int
    attempt: Optional[int] = None
    status: Optional[int] = None
    millionths: Optional[int] = None
    exit_code: Optional[int] = None
    message: Optional[str] = None
    log: Optional[str] = None
    elapsed_ms: Optional[int] = None        # since the attempt was begun, by the worker's clock
    memory: Optional[int] = None            # as in Task
    cpu_ms: Optional[int] = None


class Limits(NamedTuple):
    """After how many failures or losses a task of a run has failed for good; 0 for never."""
    failures: int = 1
    losses: int = 5


class Selection(NamedTuple):
    """Which tasks of a run somebody means. Each field narrows; None does not."""
    spans: Optional[Sequence[Tuple[int, int]]] = None   # first and last numbers, in order, none in two
    exit_code: Optional[int] = None     # of the last failure; like *like*, it selects failed tasks alone
    like: Optional[str] = None          # what the message contains; a * in it stands for anything

    @property
    def failed_only(self) -> bool:
        """Whether it selects no others than failed tasks."""
        return (self.exit_code, self.like) != (None, None)

    def judges(self, task: Task) -> bool:
        """Whether it selects a task within its spans; a message is compared with single blanks, as lists show it."""
        if self.failed_only and task.status != FAILED or self.exit_code not in (None, task.exit_code):
            return False
        message, at = " ".join((task.message or "").split()), 0
        for part in " ".join((self.like or "").split()).split("*"):
            found = message.find(part, at)
            if found < 0:
                return False
            at = found + len(part)
        return True


def is_held(task: Task) -> bool:
    """Whether a worker holds the task."""
    return task.hold is not None and task.hold <= STARTED


def is_complete(task: Task) -> bool:
    """Done at 100 percent: what a partial restart leaves alone."""
    return task.status == DONE and task.millionths == FULL


def claimed(task: Task, worker: int, started: Optional[int]) -> Task:
    """The worker holds the task, in another attempt.

    *started*: milliseconds since 1970; None when it is claimed ahead, and begun later. What the last failure said
    is kept until the task is done, and what the last end used until the next one.
    """
    task_id, run, _, millionths, _, attempt, _, failures, losses, _, _, code, message, memory, cpu_ms, log_path = task
    return Task(task_id, run, COMPUTING, millionths, worker, attempt + 1, HELD if started is None else STARTED,
                failures, losses, started, None, code, message, memory, cpu_ms, log_path)


def is_news(task: Task, report: Report, hold: Optional[int], worker_uuid: Optional[str]) -> bool:
    """Whether a report that names a claim is to be written; False when it has come before.

    *hold*: what became of the claim that it names, None when that is not the last one and no end of it is known.
    *worker_uuid*: the worker that it names. Raises Conflict when the claim does not hold the task and may not take it
    back.
    """
    if hold is None:
        raise Conflict("task %d is not held by %s%s: it is %s, at attempt %d; what was computed is not wanted" % (
            report.number, "anybody" if worker_uuid is None else "worker " + worker_uuid,
            "" if report.attempt is None else " in attempt %d" % report.attempt, STATUS[task.status], task.attempt))
    if hold <= GIVEN_UP:
        return True
    if report.status in (None, COMPUTING) or ENDED[report.status] == hold:
        return False        # late, or the very report that ended the claim
    (before,) = [STATUS[status] for status, ended in ENDED.items() if ended == hold]
    raise Conflict("task %d was reported %s in this attempt, and cannot be %s in it too" % (
        report.number, before, STATUS[report.status]))


def takes_back(task: Task, report: Report) -> bool:
    """Whether a report by who held the task last makes it held again: it tells no result."""
    return task.hold in (LAPSED, LOST, GIVEN_UP) and report.status not in (DONE, FAILED)


def reported(task: Task, report: Report, limits: Limits, now_ms: int) -> Task:
    """The claim that holds the task, or held it until it lapsed, tells how far it is or how it ended."""
    status = COMPUTING if report.status is None else report.status
    begins = status == COMPUTING and task.started is None
    losses = task.losses - 1 if task.hold == LOST and task.losses else task.losses      # it was no loss after all
    return _reported(task, report, limits, now_ms, status, begins, ENDED.get(status, STARTED), losses)


def overruled(task: Task, report: Report, limits: Limits, now_ms: int) -> Task:
    """A report that names neither worker nor attempt: it may set any state from any other, and ends every hold."""
    status = task.status if report.status is None else report.status
    begins = status == COMPUTING and (task.status != COMPUTING or task.started is None)
    hold = None if task.hold is not None and task.hold <= GIVEN_UP else task.hold
    return _reported(task, report, limits, now_ms, status, begins, hold, task.losses)


def _reported(task: Task, report: Report, limits: Limits, now_ms: int, status: int, begins: bool,
              hold: Optional[int], losses: int) -> Task:
    """What all reports have in common: percentage, times, failures, what an end used."""
    (task_id, run, _, millionths, worker, attempt, _, failures, _, started, finished, code, message, memory, cpu_ms,
     log_path) = task
    if report.millionths is not None:
        millionths = report.millionths
    elif status == DONE:
        millionths = FULL
    if begins or report.elapsed_ms is not None and status != WAITING:
        started = now_ms - (report.elapsed_ms or 0)
    if report.status == DONE or report.status == FAILED:    # a percentage alone is no other end of what has ended
        finished, code, message = now_ms, report.exit_code, report.message
        memory, cpu_ms, log_path = report.memory, report.cpu_ms, report.log
    if status == COMPUTING:
        finished = None
    if report.status == FAILED:
        failures += 1
        if not 0 < limits.failures <= failures:
            status = WAITING
    return Task(task_id, run, status, millionths, worker, attempt, hold, failures, losses, started, finished, code,
                message, memory, cpu_ms, log_path)


def lapsed(task: Task, limits: Limits, now_ms: int) -> Task:
    """The lease of the holder ran out: others may claim the task. An attempt that was begun counts a loss."""
    if task.hold == HELD:
        return task._replace(status=WAITING, hold=LAPSED)
    losses = task.losses + 1
    if 0 < limits.losses <= losses:
        return task._replace(status=FAILED, hold=LOST, losses=losses, finished=now_ms)
    return task._replace(status=WAITING, hold=LOST, losses=losses)


def given_up(task: Task) -> Task:
    """The holder has signed off: the task waits again, and it is no loss."""
    return task._replace(status=WAITING, hold=GIVEN_UP)


def taken_back(task: Task) -> Task:
    """The worker whose lease had run out is heard again, and nobody has claimed the task since: it is held again."""
    losses = task.losses - 1 if task.hold == LOST and task.losses else task.losses
    return task._replace(status=COMPUTING, hold=HELD if task.started is None else STARTED, losses=losses, finished=None)


OPEN_RUN, PAUSED, CANCELLED = "open", "paused", "cancelled"        # states of a run; the last is also a task's message


def ended_hold(task: Task) -> Optional[int]:
    """What becomes of the hold of a task that nobody may take back: one that was ended is kept, to know its report."""
    return task.hold if task.hold is not None and task.hold > GIVEN_UP else None


def cancelled(task: Task, now_ms: int) -> Task:
    """Nobody is to work on the task: it has failed. One that is done, or has failed already, stays so."""
    if task.status == DONE:
        return task
    if task.status == FAILED:
        return task._replace(hold=ended_hold(task))
    return task._replace(status=FAILED, hold=ended_hold(task), finished=now_ms, exit_code=None, message=CANCELLED,
                         memory=None, cpu_ms=None, log=None)


RESTART, RESTART_ALL, RESTART_FAILED, DELETE = "restart", "restart all", "restart failed", "delete"
CANCEL = "cancel"


def restarted(task: Task, which: str, spared: bool) -> Task:
    """What a restart makes of a task. Twice the same restart makes of it what once makes.

    *which*: RESTART_ALL takes every task, to 0 percent; RESTART those that are not complete, but not what a worker
    under a running lease holds (*spared*); RESTART_FAILED the failed ones. What a holder reported may still come
    again, so an ended hold is kept; a lapsed one has no loss to undo any more. CANCEL is for a run that is cancelled
    as a whole: what computes waits, and nobody may take a task back.
    """
    if which == RESTART_ALL:
        return Task(task.id, task.run, WAITING, 0, task.worker, task.attempt, ended_hold(task))
    if which == CANCEL:
        return task._replace(status=WAITING if task.status == COMPUTING else task.status, hold=ended_hold(task))
    if which == RESTART_FAILED and task.status != FAILED:
        return task
    if which == RESTART and (is_complete(task) or is_held(task) and spared):
        return task
    hold = GIVEN_UP if is_held(task) else LAPSED if task.hold == LOST else task.hold
    return task._replace(status=WAITING, hold=hold, failures=0, losses=0)


def may_begin(over: bool, complete: bool, whatever: bool) -> Optional[bool]:
    """Whether a run that waits for another may begin; None for not yet, False for not by itself.

    *over*, *complete*: so is that other one. *whatever*: it need not be complete.
    """
    return None if not over else whatever or complete


# ---------------------------------------------------------------- SCHEMA
# The tables, with the reason for each column and index, and their rows as classes: the only place that knows in which
# order columns come.
#
# A new column: the table below, the class of its row, check() in OPERATIONS, the view `tasks` where people should see
# it, run_json, task_json or worker_json in API. Once a version is released, a script of its own at the end of SCHEMA.

APPLICATION_ID = 0x7461736B         # "task", in the header of the file
SQLITE_VERSION = sqlite3.sqlite_version_info

# Append only, once a version is released. PRAGMA user_version counts the scripts that were applied; each runs in one
# transaction with its number.
SCHEMA = ["""
CREATE TABLE farm (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    identity TEXT NOT NULL,                     -- names this farm to clients
    signing_key BLOB NOT NULL,                  -- signs tokens
    tls_key TEXT NOT NULL DEFAULT '',           -- PEM, made at the first start of a server
    tls_certificate TEXT NOT NULL DEFAULT '',   -- by which clients know this farm
    next_task_id INTEGER NOT NULL,              -- ids below are taken, for ever
    probes INTEGER NOT NULL DEFAULT 0,          -- rises to see whether the disk takes writes again
    starts INTEGER NOT NULL DEFAULT 0           -- of servers: revisions begin above those of before
);
CREATE TABLE user (
    id INTEGER PRIMARY KEY AUTOINCREMENT,       -- a name that comes again is another user
    name TEXT NOT NULL UNIQUE,
    password TEXT NOT NULL,                     -- algorithm, parameters, salt and hash
    generation INTEGER NOT NULL DEFAULT 1,      -- rises with each new password; sessions carry it
    created REAL NOT NULL
);
-- What is signed and handed out is the id, so it is never used again. To revoke a token is to delete its row.
CREATE TABLE token (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    user INTEGER NOT NULL,
    scope TEXT NOT NULL CHECK (scope IN ('read', 'work', 'full')),
    run TEXT CHECK (run IS NULL OR scope <> 'full'),            -- the uuid of the only run that it is for
    label TEXT NOT NULL,
    created REAL NOT NULL,
    expires REAL                                -- NULL: never
);
CREATE INDEX token_user ON token (user);
CREATE INDEX token_run ON token (run) WHERE run IS NOT NULL;
CREATE TABLE worker (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    uuid TEXT NOT NULL UNIQUE,
    hostname TEXT NOT NULL,
    pid INTEGER NOT NULL,
    created REAL NOT NULL,
    lease INTEGER CHECK (lease BETWEEN 1 AND 86400),            -- seconds; NULL: never timed out
    state INTEGER NOT NULL DEFAULT 0 CHECK (state BETWEEN 0 AND 2),     -- alive, expired, signed off
    heard REAL NOT NULL,                        -- written once a day at most; memory knows better
    user INTEGER,                               -- the id of who registered it first; NULL: administration
    job TEXT,                                   -- its batch job, as "slurm:1234_7"
    why TEXT                                    -- its batch job ended at once and without a task: the reason
);
CREATE INDEX worker_living ON worker (state) WHERE state = 0;   -- lists the living ones
CREATE INDEX worker_heard ON worker (heard);                    -- finds who was silent for long
CREATE INDEX worker_own ON worker (user, state);                -- lists those of a user
-- A run owns the task ids from first_id to first_id + num_tasks - 1, so a task needs no number. Those up to
-- ids_end - 1 are no other run's, so that it can be extended. Tasks that nothing has happened to are no rows, but the
-- interval from head to head_end - 1 and the intervals of table untouched, all of which lie above it.
CREATE TABLE run (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    uuid TEXT NOT NULL UNIQUE,
    first_id INTEGER NOT NULL,
    num_tasks INTEGER NOT NULL CHECK (num_tasks BETWEEN 1 AND 2147483647),
    created REAL NOT NULL,
    num_waiting INTEGER NOT NULL CHECK (num_waiting >= 0),      -- touched or not
    num_computing INTEGER NOT NULL CHECK (num_computing >= 0),
    num_done INTEGER NOT NULL CHECK (num_done >= 0),
    num_failed INTEGER NOT NULL CHECK (num_failed >= 0),
    num_untouched INTEGER NOT NULL CHECK (num_untouched BETWEEN 0 AND num_waiting),
    num_complete INTEGER NOT NULL CHECK (num_complete BETWEEN 0 AND num_done),  -- done, and at 100 percent
    millionths INTEGER NOT NULL CHECK (millionths >= 0),        -- sum over the tasks, of a percent
    head INTEGER NOT NULL,
    head_end INTEGER NOT NULL CHECK (head_end >= head),
    sweep TEXT CHECK (sweep IN ('restart', 'restart all', 'restart failed', 'cancel', 'delete')),
                                                -- begun, its rows follow
    last_report REAL,
    name TEXT,
    max_failures INTEGER NOT NULL,              -- 0: never too many
    max_losses INTEGER NOT NULL,                -- 0: never too many
    user INTEGER,                               -- the id of who made it; NULL: administration
    user_name TEXT,                             -- kept, since the user may be gone
    state TEXT NOT NULL CHECK (state IN ('open', 'paused', 'cancelled')),
    after TEXT,                                 -- the uuid of the run that it waits for; NULL once it has begun
    after_any INTEGER NOT NULL CHECK (after_any IN (0, 1)),     -- 1: it waits for the end of that, whatever failed
    ids_end INTEGER NOT NULL CHECK (ids_end >= first_id + num_tasks),
    has_work INTEGER NOT NULL CHECK (has_work IN (0, 1)),       -- 1: there is a row in table work
    CHECK (num_waiting + num_computing + num_done + num_failed = num_tasks)
);
CREATE INDEX run_sweep ON run (sweep) WHERE sweep IS NOT NULL;
CREATE INDEX run_own ON run (user);             -- lists those of a user, in order of their ids
-- What the tasks of a run are to do: of its own, since a command may be long and lists of runs are read often.
CREATE TABLE work (
    run INTEGER PRIMARY KEY,
    work TEXT NOT NULL                          -- JSON in ASCII: arguments and paths need not be UTF-8
);
CREATE TABLE untouched (
    last INTEGER PRIMARY KEY,                   -- keyed by the end: claims take from the start, in place
    first INTEGER NOT NULL CHECK (first <= last)
);
CREATE TABLE task (
    id INTEGER PRIMARY KEY,
    run INTEGER NOT NULL,
    status INTEGER NOT NULL DEFAULT 0 CHECK (status BETWEEN 0 AND 3),   -- waiting, computing, done, failed
    millionths INTEGER NOT NULL DEFAULT 0 CHECK (millionths BETWEEN 0 AND 100000000),
    worker INTEGER,                             -- who claimed it last
    attempt INTEGER NOT NULL DEFAULT 0 CHECK (attempt >= 0),    -- rises with each claim
    -- What became of the claim: see RULES in the program. (IN would double the time of each write.)
    hold INTEGER CHECK (hold IS NULL OR hold BETWEEN 1 AND 8 AND worker IS NOT NULL
        AND attempt > 0 AND (hold > 2 OR status = 1) AND (hold < 3 OR hold > 5 OR status = 0 OR status = 3)),
    failures INTEGER NOT NULL DEFAULT 0 CHECK (failures >= 0),  -- reported
    losses INTEGER NOT NULL DEFAULT 0 CHECK (losses >= 0),      -- of workers that were silent
    started INTEGER,                            -- milliseconds since 1970, like finished
    finished INTEGER,
    exit_code INTEGER,                          -- of the last failure
    message TEXT,
    memory INTEGER CHECK (memory >= 0),         -- bytes at its peak: of the last end that was reported
    cpu_ms INTEGER CHECK (cpu_ms >= 0),         -- milliseconds of all its processors: likewise
    log TEXT                                    -- the path of what the last failure wrote
);
CREATE INDEX task_open ON task (status) WHERE status <> 2;                  -- the lowest that waits; pages by status
CREATE INDEX task_held ON task (worker, hold) WHERE hold <= 4;              -- what a worker holds, or may take back
-- Who computes the longest. Of computing tasks alone: the start of each task that is done, in an order that nothing
-- has in common with that of the ends, cost 3 of 7 microseconds a task and 24 of 87 bytes.
CREATE INDEX task_started ON task (run, started) WHERE status = 1 AND started IS NOT NULL;
CREATE INDEX task_finished ON task (run, status, finished) WHERE finished IS NOT NULL;  -- the latest ends of each kind
-- The last report of earlier attempts, so that it is known when it comes again.
CREATE TABLE ended (
    task INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    worker INTEGER NOT NULL,
    hold INTEGER NOT NULL,                      -- 6, 7 or 8
    PRIMARY KEY (task, attempt)
) WITHOUT ROWID;
-- Workers whose tasks a partial restart leaves alone, while its rows follow.
CREATE TABLE spared (
    run INTEGER NOT NULL,
    worker INTEGER NOT NULL,
    PRIMARY KEY (run, worker)
) WITHOUT ROWID;
-- Answers to requests with an Idempotency-Key; keys and requests as hashes.
CREATE TABLE answer (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key BLOB NOT NULL UNIQUE,
    request BLOB NOT NULL,
    at REAL NOT NULL,
    status INTEGER NOT NULL,
    body BLOB NOT NULL
);
-- The last claim of a worker that came with a key. A table of its own: its rows are small, and many to a page.
CREATE TABLE last_claim (
    worker INTEGER PRIMARY KEY,
    key BLOB NOT NULL,
    request BLOB NOT NULL,
    given TEXT NOT NULL                         -- first:last:attempt,... in ids of tasks
);
-- Who did what, written with what it tells of. Bounded by action: what is done often does not push out the rest.
CREATE TABLE audit (
    id INTEGER PRIMARY KEY,
    action TEXT NOT NULL,
    number INTEGER NOT NULL,                    -- of the lines with this action
    utc REAL NOT NULL,
    user TEXT,                                  -- the name; NULL: administration, '': nobody who is known
    object TEXT NOT NULL,                       -- what it was done to
    address TEXT NOT NULL,                      -- of the client; '': a verb that has the file itself
    times INTEGER NOT NULL,                     -- how often
    UNIQUE (action, number)
);
-- For people who look into the file. (For sweep IS NOT 'delete' older SQLite, 3.26, takes the index run_sweep, and
-- there is no run in it.)
CREATE VIEW tasks AS
    SELECT run.uuid AS run, run.name, task.id - run.first_id AS task,
        CASE task.status WHEN 0 THEN 'waiting' WHEN 1 THEN 'computing' WHEN 2 THEN 'done' ELSE 'failed' END AS status,
        task.millionths / 1e6 AS percent, worker.hostname, worker.pid, task.attempt, task.failures, task.losses,
        strftime('%Y-%m-%dT%H:%M:%SZ', task.started / 1000, 'unixepoch') AS started,
        strftime('%Y-%m-%dT%H:%M:%SZ', task.finished / 1000, 'unixepoch') AS finished, task.exit_code, task.message,
        task.memory, task.cpu_ms / 1000.0 AS cpu, task.log
    FROM run
    JOIN task ON task.id >= run.first_id AND task.id < run.first_id + run.num_tasks
    LEFT JOIN worker ON worker.id = task.worker
    WHERE coalesce(run.sweep, '') <> 'delete';
"""]

TASK_COLUMNS = ", ".join(Task._fields)
Row = Tuple[Any, ...]


class Run:
    """A run in the writer's memory: its row, changed here first and written before COMMIT.

    Many tasks of one run change in one batch; its row is then written once.
    """
    __slots__ = ("id", "uuid", "first_id", "num_tasks", "created", "counts", "num_untouched", "num_complete",
                 "millionths", "head", "head_end", "sweep", "last_report", "name", "limits", "user", "user_name",
                 "state", "after", "after_any", "ids_end", "has_work")
    id: int
    first_id: int
    num_tasks: int
    millionths: int

    COLUMNS = """id, uuid, first_id, num_tasks, created, num_waiting, num_computing, num_done, num_failed,
        num_untouched, num_complete, millionths, head, head_end, sweep, last_report, name, max_failures, max_losses,
        user, user_name, state, after, after_any, ids_end, has_work"""
    SAVE = """
        UPDATE run
        SET num_waiting = ?, num_computing = ?, num_done = ?, num_failed = ?, num_untouched = ?, num_complete = ?,
            millionths = ?, head = ?, head_end = ?, sweep = ?, last_report = ?
        WHERE id = ?"""

    def __init__(self, row: Row) -> None:
        (self.id, self.uuid, self.first_id, self.num_tasks, self.created, waiting, computing, done, failed,
         self.num_untouched, self.num_complete, self.millionths, self.head, self.head_end, self.sweep,
         self.last_report, self.name, max_failures, max_losses, self.user, self.user_name, self.state, self.after,
         self.after_any, self.ids_end, self.has_work) = row
        self.counts = [waiting, computing, done, failed]
        self.limits = Limits(max_failures, max_losses)

    def row(self) -> Row:
        """The values of COLUMNS."""
        return (self.id, self.uuid, self.first_id, self.num_tasks, self.created, *self.saved()[:-1], self.name,
                *self.limits, self.user, self.user_name, self.state, self.after, self.after_any,
                self.ids_end, self.has_work)

    def saved(self) -> Row:
        """What SAVE takes."""
        return (*self.counts, self.num_untouched, self.num_complete, self.millionths, self.head, self.head_end,
                self.sweep, self.last_report, self.id)

    def snapshot(self) -> "Run":
        """A copy that later operations do not change."""
        return Run(self.row())

    @property
    def end_id(self) -> int:
        """The id after the last task's."""
        return self.first_id + self.num_tasks

    @property
    def is_over(self) -> bool:
        """Whether no task of it is left to be done."""
        return self.state == CANCELLED or not self.counts[WAITING] + self.counts[COMPUTING]


class Worker:
    """A registered worker in the writer's memory."""
    __slots__ = ("id", "uuid", "hostname", "pid", "lease", "state", "heard", "user", "job", "why", "shown")

    COLUMNS = "id, uuid, hostname, pid, lease, state, heard, user, job, why"

    def __init__(self, row: Row) -> None:
        self.id, self.uuid, self.hostname, self.pid, self.lease, self.state, self.heard, self.user, \
            self.job, self.why = row
        self.shown = ""                 # uuid and hostname as JSON, kept by who shows them

    def snapshot(self) -> "Worker":
        """A copy that later operations do not change."""
        return Worker((self.id, self.uuid, self.hostname, self.pid, self.lease, self.state, self.heard, self.user,
                       self.job, self.why))


class User(NamedTuple):
    """Somebody with a password."""
    id: int
    name: str
    password: str           # the stored hash, see LOGIN
    generation: int


class AuditLine(NamedTuple):
    """Who did what to what, when and from where; see the table."""
    id: int
    utc: float
    user: Optional[str]
    action: str
    object: str
    address: str
    times: int


SCOPES = ("read", "work", "full")       # each may do what those before it may


class Token(NamedTuple):
    """A token that was handed out, with every column of its row."""
    id: int
    user: int                       # its id
    scope: str                      # one of SCOPES
    run: Optional[str]              # the uuid of the only run that it is for
    label: str
    created: float                  # seconds since 1970
    expires: Optional[float]


TOKEN_COLUMNS = ", ".join(Token._fields)


class ShownTask(NamedTuple):
    """A task as it is looked at."""
    task: Task
    number: int                     # in its run, from 0
    worker: Optional[Worker]        # who claimed it last; None also when it was forgotten


class ShownWorker(NamedTuple):
    """A worker as it is looked at."""
    worker: Worker
    heard: float                    # seconds since 1970
    held: int                       # tasks
    revision: int                   # rises whenever a task is taken from it


class NothingWaiting(NamedTuple):
    """No task is handed out. *retry_s*: seconds until there may be one; None where none comes by itself.

    That is when the first lease could end under which a task is held, or when a run that is paused is looked at again.
    """
    retry_s: Optional[float]


class Page(NamedTuple):
    """A part of a list, and where the next one begins: *after* is None at the end."""
    entries: List[Any]
    after: Optional[str]


# ---------------------------------------------------------------- TRANSACTIONS
# What an operation is given as `sql`: the open transaction, and what the writer remembers from one to the next.
# Knows the rows of SCHEMA, and no rule by which they change.
#
# Something new to remember between transactions: a field of Transaction, and what becomes of it in roll_back().

# Tasks that a short operation may change or show; with more it is one that takes long. A request may have to wait for
# some hundred short ones that came before it, but for no more than a slice of one that takes long.
SMALL = 20


class Leases:
    """When workers were heard, and until when their leases run: memory alone, in ticks.

    Nothing of it is written, so a heartbeat costs no disk; and it outlives a transaction that is rolled back: that a
    worker was heard stays true. But a lease begins, changes its length or is dropped only after the commit of what
    asked for it. Revisions need no writing either: those of each start of a server are above all that were before.
    """
    REMEMBERED = 200000     # workers without a lease that runs, then they are forgotten here

    def __init__(self, starts: int) -> None:
        self.heard: Dict[int, float] = {}               # worker id to tick
        self.spans: Dict[int, int] = {}                 # to seconds, of those whose lease runs
        self.ends: Dict[int, float] = {}                # to the tick at which it ends
        self.due: List[Tuple[float, int]] = []          # a heap with an entry for each lease, no later than its end
        self.entries: Dict[int, float] = {}             # to the tick of the entry that counts; others are left over
        self.revisions: Dict[int, int] = {}
        self.base = self.revision = starts << 32        # of workers not named there; the highest of all

    def hear(self, worker: Worker, now: Now) -> bool:
        """The worker was heard: its lease begins anew. False when it has another one to begin."""
        self.heard[worker.id] = now.tick
        if len(self.heard) > self.REMEMBERED + len(self.ends):
            self._forget()
        if self.spans.get(worker.id) != worker.lease:
            return worker.lease is None
        if worker.lease is not None:
            self._end_at(worker.id, now.tick + worker.lease)
        return True

    def begin(self, worker_id: int, span: Optional[int], tick: float) -> None:
        """A lease of *span* seconds begins at that tick, or with None there is none any more."""
        if span is None:
            self.drop(worker_id)
        else:
            self.spans[worker_id] = span
            self._end_at(worker_id, tick + span)

    def _end_at(self, worker_id: int, end: float) -> None:
        self.ends[worker_id] = end
        if end < self.entries.get(worker_id, math.inf):     # none yet, or a shorter lease than before
            self.entries[worker_id] = end
            heapq.heappush(self.due, (end, worker_id))
            if len(self.due) > 2 * len(self.entries) + 64:
                self.due = sorted((tick, worker) for worker, tick in self.entries.items())

    def _forget(self) -> None:
        self.heard = {key: self.heard[key] for key in self.ends if key in self.heard}
        self.revisions = {key: self.revisions[key] for key in self.ends if key in self.revisions}
        self.base = self.revision = self.revision + 1

    def drop(self, worker_id: int) -> None:
        """The worker has no lease that runs."""
        for memory in (self.spans, self.ends, self.entries):
            memory.pop(worker_id, None)

    def runs(self, worker_id: int, now: Now) -> bool:
        """Whether that worker has a lease that runs."""
        return self.ends.get(worker_id, -math.inf) > now.tick

    def next_end(self) -> float:
        """The tick at which one may run out; infinite when none does."""
        return self.due[0][0] if self.due else math.inf

    def run_out(self, tick: float) -> Optional[int]:
        """A worker whose lease has ended by that tick; the same again until it is dropped, heard or postponed."""
        while self.due and self.due[0][0] <= tick:
            entry, worker_id = self.due[0]
            if self.entries.get(worker_id) != entry:
                heapq.heappop(self.due)
            elif self.ends[worker_id] <= tick:
                return worker_id
            else:
                self.entries[worker_id] = end = self.ends[worker_id]
                heapq.heapreplace(self.due, (end, worker_id))
        return None

    def postpone(self, worker_id: int, tick: float) -> None:
        """Let run_out give a worker whose lease has ended again at that tick."""
        self.entries[worker_id] = tick
        heapq.heappush(self.due, (tick, worker_id))

    def renew_all(self, tick: float) -> None:
        """One whole lease for everybody, since nobody could be heard."""
        for worker_id, span in self.spans.items():
            self.ends[worker_id] = tick + span

    def taken_from(self, worker_id: int) -> None:
        """A task was taken from the worker."""
        if worker_id in self.heard:     # of others, the next start or hearing shows a higher one anyway
            self.revision += 1
            self.revisions[worker_id] = self.revision

    def revision_of(self, worker_id: int) -> int:
        """What rises whenever a task is taken from the worker."""
        return self.revisions.get(worker_id, self.base)


class Holds:
    """How many tasks each worker holds, in all and of each run: memory alone, counted at each start.

    To count them in the file took 0.1 s for a worker that holds 2 000 000.
    """

    def __init__(self) -> None:
        self.totals: Dict[int, int] = {}                # worker id to tasks
        self.by_run: Dict[int, Dict[int, int]] = {}     # run id to worker id to tasks, none of them 0
        self.journal: List[Tuple[int, int, int]] = []   # what the open transaction has added

    def add(self, run_id: int, worker_id: int, tasks: int) -> None:
        """The worker holds so many more tasks of the run; fewer where *tasks* is negative."""
        self.journal.append((run_id, worker_id, tasks))
        total = self.totals.get(worker_id, 0) + tasks
        if total:
            self.totals[worker_id] = total
        else:
            del self.totals[worker_id]
        workers = self.by_run.get(run_id)
        if workers is None:
            workers = self.by_run[run_id] = {}
        number = workers.get(worker_id, 0) + tasks
        if number:
            workers[worker_id] = number
            return
        del workers[worker_id]
        if not workers:
            del self.by_run[run_id]

    def number(self, worker_id: int) -> int:
        """How many tasks the worker holds."""
        return self.totals.get(worker_id, 0)

    def workers_of(self, run_id: int) -> Dict[int, int]:
        """The workers that hold tasks of a run, and how many; not to be changed."""
        return self.by_run.get(run_id, {})

    def settle(self) -> None:
        """The transaction is on the disk."""
        self.journal.clear()

    def roll_back(self) -> None:
        """Undo what the transaction has added."""
        for run_id, worker_id, tasks in self.journal[::-1]:
            self.add(run_id, worker_id, -tasks)
        self.journal.clear()


class Copy:
    """A copy of the file in the making; *total* pages, 0 until it has begun. *ended* says how, "" until it has.

    It lies beside the file, under a name of its own, for whoever asked for it to take away: a server
    may see other folders than they do. What nobody took is removed at the next start.
    """
    STEP = 64           # pages between two batches
    SYNC = 1024         # pages between two fsyncs: one for all at the end would hold up every claim
    MARK = ".copy-"     # stands in its name, after that of the file
    DONE = "done"

    def __init__(self, path: str) -> None:
        self.path = path
        self.copied = 0
        self.total = 0
        self.begun = False
        self.unwanted = False   # whoever asked for it has gone
        self.ended = ""


class Stopped(Exception):
    """What was begun is given up."""


class RunBusy(Exception):
    """The run is being restarted: this operation is tried again when that has ended."""


class TakesLong(Exception):
    """The operation has changed nothing, and is run again among those that take long."""


class Continue(NamedTuple):
    """What an operation gives that has done a slice of its work; the writer calls it again with these arguments."""
    args: Tuple[Any, ...]


class Caller(NamedTuple):
    """Who has an operation run, and from where."""
    user: Optional[int] = None      # the id of the user; None: administration
    name: Optional[str] = None      # and the name; None likewise, "" for nobody who is known
    address: str = ""               # of the client; "" for a verb that has the file itself
    owner: Optional[int] = None     # the id of the user whose runs and workers there are for them; None: all there are
    only_run: Optional[str] = None  # the uuid of the only run that their token is for


ADMINISTRATION = Caller()
NOBODY = Caller(0, "", "", 0)       # no user has this id


class Operation:
    """One call of a store operation, named but not yet run.

    *show(result, \\*extra)* turns the result into a reply; *done(operation, outcome)* is called by
    the writer after COMMIT with the result, or with the exception that the operation ended in.
    *caller*: for whom it is run; the I/O thread says so of each.
    """
    __slots__ = ("function", "args", "reads", "show", "extra", "big_answer", "large", "begun", "came", "worker",
                 "caller", "unwanted", "done")

    def __init__(self, function: Callable[..., Any], args: Tuple[Any, ...], reads: bool) -> None:
        self.function = function
        self.args = args
        self.reads = reads
        self.show: Optional[Callable[..., Any]] = None
        self.extra: Tuple[Any, ...] = ()
        self.big_answer = False
        self.large = False              # it takes long, and is run a slice at a time
        self.begun = False              # a slice of its work is on the disk
        self.came = 0.0                 # the tick at which the request came; 0 before that
        self.worker: Optional[int] = None       # the id of the worker that the request has named
        self.caller = ADMINISTRATION
        self.unwanted = False           # its client has gone
        self.done: Optional[Callable[["Operation", Any], None]] = None

    def shown_as(self, show: Callable[..., Any], *extra: Any, big_answer: bool = False) -> "Operation":
        """Say how the result becomes a reply.

        *big_answer*: that may take some milliseconds, and the I/O thread shows one such in a turn.
        """
        self.show = show
        self.extra = extra
        self.big_answer = big_answer
        return self


def operation(function: Callable[..., Any]) -> Callable[..., Operation]:
    """Mark a function (sql, now, ...) as an operation: to call it only names it."""
    return functools.wraps(function)(lambda *args: Operation(function, args, False))


def read_operation(function: Callable[..., Any]) -> Callable[..., Operation]:
    """The same for one that never writes, or does without where it cannot: it is run on a full disk too."""
    return functools.wraps(function)(lambda *args: Operation(function, args, True))


class Transaction:
    """The open transaction, and what the writer remembers of the file from one to the next.

    *clock*: gives a Now. Memory of rows is a copy of them: it is dropped whenever a transaction is rolled back.
    """
    REMEMBERED = 40000      # runs, workers and tasks, then all of them are looked up again

    def __init__(self, connection: sqlite3.Connection, path: str, clock: Callable[[], Now]) -> None:
        self.path = path
        self.clock = clock
        self.execute = connection.execute
        self.execute_many = connection.executemany
        self.runs: Dict[str, Run] = {}
        self.runs_by_id: Dict[int, Run] = {}
        self.workers: Dict[str, Worker] = {}
        self.workers_by_id: Dict[int, Optional[Worker]] = {}    # None: forgotten
        self.held: Dict[int, Task] = {}         # some tasks that are held, as in their rows: reports of them come soon
        self.leases = Leases(0)
        self.holds = Holds()
        self.opened = Now(0.0, 0.0)
        self.claim_keys: Dict[bytes, int] = {}  # of the last claims, to worker ids
        self.old_claim_keys: List[Tuple[bytes, Optional[int]]] = []     # what the open transaction has changed of them
        self.first_ends: Dict[int, Tuple[float, Optional[float]]] = {}  # of leases, by run: see nothing_waiting
        self.changed: Dict[int, Run] = {}
        self.begun: List[Run] = []              # restarts and deletions of this transaction
        self.effects: List[Callable[[], Any]] = []
        self.trouble: Optional[str] = None      # why the last write failed; None when it did not
        self.copy: Optional[Copy] = None        # the newest one
        self.users: Dict[str, User] = {}        # replaced, never changed, so that any thread may read it
        self.tokens: Dict[int, Token] = {}      # by id, as on the disk; the I/O thread looks single ones up
        self.slice_end = 0.0                    # the tick at which the present slice of work is to end
        self.large = False                      # the operation that is running is one that takes long
        self.heard_worker: Optional[int] = None         # whose lease the operation that is running has renewed
        self.caller = ADMINISTRATION            # for whom it is run

    def steady_utc(self, tick: float) -> float:
        """UTC seconds that go on evenly from the start, for what is kept some days: no step of the clock ends it."""
        return self.opened.utc + tick - self.opened.tick

    def one(self, query: str, *values: Any) -> Any:
        """The first row of a query, or None."""
        return self.execute(query, values).fetchone()

    def value(self, query: str, *values: Any) -> Any:
        """The only column of the first row of a query, or None."""
        row = self.execute(query, values).fetchone()
        return None if row is None else row[0]

    def all(self, query: str, *values: Any) -> List[Any]:
        """All rows of a query."""
        return self.execute(query, values).fetchall()

    def tasks(self, query: str, *values: Any) -> List[Task]:
        """The tasks of a query for TASK_COLUMNS."""
        return [Task._make(row) for row in self.execute(query, values)]

    def begin_slice(self, seconds: float, large: bool) -> None:
        """The operations that follow have so long before others have their turn. *large*: they take long."""
        self.slice_end = self.clock().tick + seconds
        self.large = large

    def over(self) -> bool:
        """Whether the present slice of work is to end."""
        return self.clock().tick >= self.slice_end

    def takes_long(self, tasks: int) -> None:
        """Raise TakesLong when an operation that is to change so many tasks is run among those that are short."""
        if tasks > SMALL and not self.large:
            raise TakesLong()

    def after_commit(self, effect: Callable[[], Any]) -> None:
        """Have something changed in memory once the transaction is on the disk, and not otherwise."""
        self.effects.append(effect)

    def begin_sweep(self, run: Run, kind: str) -> None:
        """Mark a run whose rows are to follow; what reads the file from here on sees the mark."""
        run.sweep = kind
        self.held.clear()
        self.changed[run.id] = run
        self.begun.append(run)
        self.flush()

    def set_claim_key(self, key: bytes, worker_id: Optional[int]) -> None:
        """Remember whose last claim came with a key; with None, that it is nobody's any more."""
        self.old_claim_keys.append((key, self.claim_keys.pop(key, None)))
        if worker_id is not None:
            self.claim_keys[key] = worker_id

    def keep_run(self, run: Run) -> Run:
        """Remember a run."""
        self.runs[run.uuid] = self.runs_by_id[run.id] = run
        return run

    def keep_worker(self, worker: Worker) -> Worker:
        """Remember a worker."""
        self.workers[worker.uuid] = self.workers_by_id[worker.id] = worker
        return worker

    def forget_worker(self, worker_id: int) -> None:
        """The worker's row is gone."""
        worker = self.workers_by_id.pop(worker_id, None)
        if worker is not None:
            del self.workers[worker.uuid]

    def flush(self) -> None:
        """Write the runs that have changed."""
        for run in self.changed.values():
            self.execute(Run.SAVE, run.saved())
        self.changed.clear()

    def roll_back(self) -> None:
        """The transaction was rolled back: drop the memory of rows, and undo the rest."""
        self.forget_rows()
        for key, worker_id in self.old_claim_keys[::-1]:
            self.set_claim_key(key, worker_id)
        self.old_claim_keys.clear()
        self.changed.clear()
        self.begun.clear()
        self.effects.clear()
        self.holds.roll_back()

    def settle(self) -> None:
        """The transaction is on the disk: let its effects take place."""
        self.begun.clear()
        self.old_claim_keys.clear()
        self.holds.settle()
        for effect in self.effects:
            effect()
        self.effects.clear()
        if len(self.runs_by_id) + len(self.workers_by_id) + len(self.held) > self.REMEMBERED:
            self.forget_rows()

    def forget_rows(self) -> None:
        """Have runs, workers and tasks looked up again; not within a transaction, which may have changed some."""
        for memory in (self.runs, self.runs_by_id, self.workers, self.workers_by_id, self.held, self.first_ends):
            memory.clear()


# ---------------------------------------------------------------- ROWS
# Rows found and changed, with the figures that follow from them. `change` and `change_many` alone write tasks one by
# one; what writes many by one statement (first claims of a batch, `done` for consecutive tasks, restarts) stands in
# OPERATIONS, and a test holds it to the rules. `find_run` and `find_worker` alone judge whose they are.

def shortened(text: str) -> str:
    """Something a client sent, fit for a sentence."""
    return text if len(text) <= 64 else text[:61] + "..."


def milliseconds(utc: float) -> int:
    """Seconds as tasks keep them."""
    return int(utc * 1000)


def find_run(sql: Transaction, run_uuid: str, reading: bool = False) -> Run:
    """The run of that uuid, if it is one for the caller. Raises NotFound; unless for reading, RunBusy while it is
    being restarted.

    One that is not for the caller is looked for in the file like one that there is not: the same answer, as soon.
    """
    run = found_run(sql, run_uuid, sql.caller.owner)
    if run is None:
        raise NotFound("there is no run %s: GET /api/runs lists them" % shortened(run_uuid))
    if run.sweep and not reading:
        raise RunBusy(run_uuid)
    return run


def found_run(sql: Transaction, run_uuid: str, owner: Optional[int]) -> Optional[Run]:
    """The run of that uuid, if it is that owner's, or whosever it is for None; None when there is none."""
    run = sql.runs.get(run_uuid)
    if run is None or owner is not None and run.user != owner:
        row = sql.one("SELECT " + Run.COLUMNS + """
            FROM run
            WHERE uuid = ? AND (? IS NULL OR user = ?) AND coalesce(sweep, '') <> 'delete'""", run_uuid, owner, owner)
        run = None if row is None else sql.keep_run(Run(row))
    return run


def run_of_task(sql: Transaction, run_id: int) -> Run:
    """The run that a task names, also one that is being swept."""
    run = sql.runs_by_id.get(run_id)
    if run is None:
        run = Run(sql.one("SELECT " + Run.COLUMNS + " FROM run WHERE id = ?", run_id))
        sql.runs_by_id[run_id] = run
        if run.sweep != DELETE:
            sql.keep_run(run)
    return run


def out_of_range(run: Run, number: int) -> str:
    """What is wrong with the number of a task."""
    return "run %s has %d tasks (0 to %d), not %s" % (
        run.uuid, run.num_tasks, run.num_tasks - 1, shortened(str(number)))


TASK_BY_ID = "SELECT " + TASK_COLUMNS + " FROM task WHERE id = ?"


def find_task(sql: Transaction, run: Run, number: int) -> Task:
    """Task *number* of a run. Raises NotFound when it is out of range."""
    if not 0 <= number < run.num_tasks:
        raise NotFound(out_of_range(run, number))
    task_id = run.first_id + number
    task = sql.held.get(task_id)
    if task is not None:
        return task
    row = sql.execute(TASK_BY_ID, (task_id,)).fetchone()
    return Task(task_id) if row is None else Task._make(row)


def as_swept(sql: Transaction, run: Run, task: Task) -> Task:
    """What the restart of a run makes, or has made, of a task."""
    if not run.sweep:
        return task
    spared = run.sweep == RESTART and is_held(task) and bool(sql.one(
        "SELECT 1 FROM spared WHERE run = ? AND worker = ?", run.id, task.worker))
    return restarted(task, run.sweep, spared)


def shown(sql: Transaction, run: Run, task: Task) -> ShownTask:
    """A task as it is looked at."""
    return ShownTask(task, task.id - run.first_id, None if task.worker is None else worker_of_task(sql, task.worker))


def every_token(sql: Transaction, which: str = "", *values: Any) -> List[Token]:
    """The tokens that a condition names, all of them for none."""
    return [Token._make(row) for row in sql.all("SELECT %s FROM token %s" % (TOKEN_COLUMNS, which), *values)]


def find_worker(sql: Transaction, worker_uuid: str) -> Worker:
    """The worker of that uuid, if it is one for the caller, as with runs. Raises NotFound."""
    worker, owner = sql.workers.get(worker_uuid), sql.caller.owner
    if worker is None or owner is not None and worker.user != owner:
        row = sql.one("SELECT " + Worker.COLUMNS + " FROM worker WHERE uuid = ? AND (? IS NULL OR user = ?)",
                      worker_uuid, owner, owner)
        if row is None:
            raise NotFound("there is no worker %s: POST /api/worker registers one" % shortened(worker_uuid))
        worker = sql.keep_worker(Worker(row))
    return worker


def find_own_worker(sql: Transaction, worker_uuid: str) -> Worker:
    """The same for what a caller with one run alone may have nothing to do with. Raises as refuse_others_work too."""
    worker = find_worker(sql, worker_uuid)
    refuse_others_work(sql, worker)
    return worker


def refuse_others_work(sql: Transaction, worker: Worker) -> None:
    """Raise Forbidden when the caller's token is for one run, and the worker holds tasks of others.

    What it does not hold any more, or not yet, is not looked at. Raises NotFound when that run is gone.
    """
    only_run = sql.caller.only_run
    if only_run is not None:
        of_run = sql.holds.workers_of(find_run(sql, only_run, reading=True).id)
        if sql.holds.number(worker.id) != of_run.get(worker.id, 0):
            raise Forbidden("worker %s holds tasks of other runs than %s, and this token is for that run alone"
                            % (shortened(worker.uuid), only_run))


def worker_of_task(sql: Transaction, worker_id: int) -> Optional[Worker]:
    """The worker that a task names; None when it was forgotten."""
    if worker_id not in sql.workers_by_id:
        row = sql.one("SELECT " + Worker.COLUMNS + " FROM worker WHERE id = ?", worker_id)
        if row is None:
            sql.workers_by_id[worker_id] = None
        else:
            sql.keep_worker(Worker(row))
    return sql.workers_by_id[worker_id]


def renew_lease(sql: Transaction, now: Now, worker: Worker) -> None:
    """Renew the worker's lease. An expired worker is alive again; one that has signed off stays so."""
    if worker.state == SIGNED_OFF:
        return
    sql.heard_worker = worker.id
    if not sql.leases.hear(worker, now):
        sql.after_commit(functools.partial(sql.leases.begin, worker.id, worker.lease, now.tick))
    heard = sql.opened.utc + now.tick - sql.opened.tick         # steady_utc, which each claim would have to call
    if worker.state or abs(heard - worker.heard) >= DAY_S:      # the clock of an earlier start may have been ahead
        worker.state, worker.heard = ALIVE, heard
        save_worker(sql, worker)


def save_worker(sql: Transaction, worker: Worker) -> None:
    """Write what changes of a worker."""
    sql.execute("UPDATE worker SET lease = ?, state = ?, heard = ?, why = ? WHERE id = ?",
                (worker.lease, worker.state, worker.heard, worker.why, worker.id))


def refuse_signed_off(worker: Worker) -> None:
    """Raise Conflict for a worker that has signed off."""
    if worker.state == SIGNED_OFF:
        raise Conflict("worker %s has signed off: POST /api/worker registers it again" % worker.uuid)


def shown_worker(sql: Transaction, now: Now, worker: Worker) -> ShownWorker:
    """A worker as it is looked at."""
    tick = sql.leases.heard.get(worker.id)
    heard = worker.heard if tick is None else now.utc - (now.tick - tick)
    return ShownWorker(worker.snapshot(), heard, sql.holds.number(worker.id), sql.leases.revision_of(worker.id))


def audit(sql: Transaction, now: Now, action: str, what: str = "", times: int = 1,
          caller: Optional[Caller] = None) -> None:
    """Write down that the caller has done something, once it is done. *action*: the words of the verb for it.

    *what*: what it was done to, and never a secret. Of each action the latest AUDIT_LINES are kept.
    """
    who = caller or sql.caller
    number = 1 + (sql.value("SELECT max(number) FROM audit WHERE action = ?", action) or 0)
    sql.execute("INSERT INTO audit (action, number, utc, user, object, address, times) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (action, number, now.utc, who.name, what, who.address, times))
    sql.execute("DELETE FROM audit WHERE action = ? AND number <= ?", (action, number - AUDIT_LINES))


def change(sql: Transaction, run: Run, before: Task, after: Task) -> None:
    """Write the columns in which two states of a task differ, and what follows from them (see `tally`)."""
    tally(sql, run, before, after)
    differs = tuple(map(operator.ne, before, after))
    if before.run is None:
        touch(sql, run, before.id, before.id)
        statement, values = insert_statement(differs)
        sql.execute(statement, (run.id, *values(after)))
        after = Task._make((after.id, run.id, *after[2:]))
    elif True in differs:
        statement, values = update_statement(differs)
        sql.execute(statement, values(after))
    if is_held(after):
        sql.held[after.id] = after
    else:
        sql.held.pop(after.id, None)


def change_many(sql: Transaction, run: Run, changes: Sequence[Tuple[Task, Task]]) -> None:
    """The same for many tasks in order of their ids: those that differ in the same columns are written together."""
    updates: Dict[Tuple[bool, ...], List[Task]] = {}
    inserts: Dict[Tuple[bool, ...], List[Task]] = {}
    tally_many(sql, run, changes)
    for before, after in changes:
        sql.held.pop(after.id, None)
        differs = tuple(map(operator.ne, before, after))
        kinds = inserts if before.run is None else updates
        if differs in kinds:
            kinds[differs].append(after)
        else:
            kinds[differs] = [after]
    touch_each(sql, run, [before.id for before, _ in changes if before.run is None])
    for differs, tasks in inserts.items():
        statement, values = insert_statement(differs)
        sql.execute_many(statement, [(run.id, *values(task)) for task in tasks])
    for differs, tasks in updates.items():
        if True in differs:
            statement, values = update_statement(differs)
            sql.execute_many(statement, map(values, tasks))


def tally(sql: Transaction, run: Run, before: Task, after: Task) -> None:
    """Bring the run's figures, and what workers hold, in line with a task that becomes another."""
    sql.changed[run.id] = run
    old, new = before.status, after.status
    if old != new:
        run.counts[old] -= 1
        run.counts[new] += 1
    if before.millionths != after.millionths:
        run.millionths += after.millionths - before.millionths
    if old == DONE:
        run.num_complete -= before.millionths == FULL
    if new == DONE:
        run.num_complete += after.millionths == FULL
    if before.hold != after.hold:
        note_holds(sql, run, before, after, 1)


def note_holds(sql: Transaction, run: Run, before: Task, after: Task, tasks: int) -> None:
    """Bring what workers hold in line with so many tasks that change in this way; another revision if any are lost."""
    if before.hold is not None and before.hold <= STARTED:
        if after.hold is None or after.hold > STARTED:
            sql.holds.add(run.id, before.worker, -tasks)    # type: ignore[arg-type]
            if after.hold is None or after.hold < GIVEN_UP:
                sql.leases.taken_from(before.worker)        # type: ignore[arg-type]
    elif after.hold is not None and after.hold <= STARTED:
        sql.holds.add(run.id, after.worker, tasks)          # type: ignore[arg-type]


def tally_many(sql: Transaction, run: Run, changes: Sequence[Tuple[Task, Task]]) -> None:
    """The same for many tasks, at a third of the cost."""
    sql.changed[run.id] = run
    moves = Counter([(before.status, after.status) for before, after in changes])
    for (old, new), tasks in moves.items():
        run.counts[old] -= tasks
        run.counts[new] += tasks
    run.millionths += sum([after.millionths - before.millionths for before, after in changes])
    run.num_complete += sum([is_complete(after) for _, after in changes if after.status == DONE])
    run.num_complete -= sum([is_complete(before) for before, _ in changes if before.status == DONE])
    ends: Dict[Tuple[Any, ...], List[Tuple[Task, Task]]] = {}
    for before, after in changes:
        if before.hold != after.hold:
            ends.setdefault((before.worker, before.hold, after.worker, after.hold), []).append((before, after))
    for alike in ends.values():
        note_holds(sql, run, *alike[0], len(alike))


Statement = Tuple[str, Callable[[Task], Tuple[Any, ...]]]


@functools.lru_cache(maxsize=None)
def update_statement(differs: Tuple[bool, ...]) -> Statement:
    """The statement that writes some columns of a task, and what takes its values from a Task.

    An index is written whenever a column of it is named, so only those columns are that differ.
    """
    places = [place for place, wanted in enumerate(differs) if wanted]
    return ("UPDATE task SET " + ", ".join(Task._fields[place] + " = ?" for place in places) + " WHERE id = ?",
            operator.itemgetter(*places, 0))


@functools.lru_cache(maxsize=None)
def insert_statement(differs: Tuple[bool, ...]) -> Statement:
    """Likewise for a task that gets a row; the values but for the first, which is the run's id."""
    places = [place for place, wanted in enumerate(differs) if wanted] + [0]
    return ("INSERT INTO task (run, %s) VALUES (?%s)" % (
        ", ".join(Task._fields[place] for place in places), ", ?" * len(places)),
            operator.itemgetter(*places) if len(places) > 1 else lambda task: (task.id,))


def touch_each(sql: Transaction, run: Run, task_ids: Sequence[int]) -> None:
    """Take tasks, in order of their ids, out of the untouched intervals; the caller gives them rows."""
    first = 0
    for at, task_id in enumerate(task_ids, 1):
        if at == len(task_ids) or task_ids[at] != task_id + 1:
            touch(sql, run, task_ids[first], task_id)       # consecutive ones lie in one interval
            first = at


def touch(sql: Transaction, run: Run, first: int, last: int) -> None:
    """Take the tasks with these ids out of the untouched interval that holds them all; the caller gives them rows."""
    run.num_untouched -= last + 1 - first
    if first == run.head:
        run.head = last + 1
    elif first < run.head_end:
        if last + 1 < run.head_end:
            sql.execute("INSERT INTO untouched (last, first) VALUES (?, ?)", (run.head_end - 1, last + 1))
        run.head_end = first
    else:
        end, begin = sql.one(INTERVAL, first)
        if last < end:
            sql.execute("UPDATE untouched SET first = ? WHERE last = ?", (last + 1, end))
        else:
            sql.execute("DELETE FROM untouched WHERE last = ?", (end,))
        if begin < first:
            sql.execute("INSERT INTO untouched (last, first) VALUES (?, ?)", (first - 1, begin))
    if run.head == run.head_end and run.num_untouched:
        end, begin = sql.one(INTERVAL, run.head)
        sql.execute("DELETE FROM untouched WHERE last = ?", (end,))
        run.head, run.head_end = begin, end + 1


INTERVAL = "SELECT last, first FROM untouched WHERE last >= ? ORDER BY last LIMIT 1"


# ---------------------------------------------------------------- QUERIES
# What is only read: a run, a task, pages of lists, and the recount of the file's promises. They never write, so they
# are run also on a full disk.
#
# Another figure to look at: a function here marked @read_operation, which looks at PAGE_ROWS rows at most.

@read_operation
def list_runs(sql: Transaction, now: Now, after: int, limit: int) -> List[Row]:
    """Up to *limit* of the caller's runs with ids above *after*, in order of creation, as rows that Run takes."""
    sql.flush()
    owner = sql.caller.owner
    whose, values = ("WHERE", ()) if owner is None else ("INDEXED BY run_own WHERE user = ? AND", (owner,))
    return sql.all("SELECT " + Run.COLUMNS + " FROM run " + whose + """
        id > ? AND coalesce(sweep, '') <> 'delete'
        ORDER BY id
        LIMIT ?""", *values, after, limit)


@read_operation
def read_run(sql: Transaction, now: Now, run_uuid: str) -> Run:
    """One run. Raises NotFound."""
    return find_run(sql, run_uuid, reading=True).snapshot()


@read_operation
def read_work(sql: Transaction, now: Now, run_uuid: str) -> Tuple[str, Optional[str], bool]:
    """What the tasks of a run are to do, who made the run, and whether the caller did. Raises NotFound."""
    run = find_run(sql, run_uuid, reading=True)
    if not run.has_work:
        raise NotFound("run %s does not know its command" % run_uuid)
    return sql.value("SELECT work FROM work WHERE run = ?", run.id), run.user_name, run.user == sql.caller.user


@read_operation
def read_task(sql: Transaction, now: Now, run_uuid: str, number: int) -> ShownTask:
    """One task. Raises NotFound for the run and the number."""
    run = find_run(sql, run_uuid, reading=True)
    return shown(sql, run, as_swept(sql, run, find_task(sql, run, number)))


@read_operation
def list_workers(sql: Transaction, now: Now, everyone: bool, limit: int, after: Optional[int] = None,
                 latest: bool = False) -> Page:
    """A page of the caller's workers by id: ShownWorker of each. *everyone*: also those that expired or signed off.

    *latest*: from the highest id down. For a caller with one run alone those that hold tasks of it, and no others.
    Raises NotFound for that run.
    """
    sql.takes_long(limit)
    owner, only_run = sql.caller.owner, sql.caller.only_run
    after = after if after is not None else 2 ** 62 if latest else 0
    if only_run is not None:
        holders = sql.holds.workers_of(find_run(sql, only_run, reading=True).id)
        ids = heapq.nsmallest(limit, (worker_id for worker_id in holders if (
            worker_id < after if latest else worker_id > after)), operator.neg if latest else None)
        found = [worker for worker in (worker_of_task(sql, worker_id) for worker_id in ids)
                 if worker is not None and owner in (None, worker.user)]
        return Page([shown_worker(sql, now, worker) for worker in found], str(ids[-1]) if len(ids) == limit else None)
    beyond = "id < ? ORDER BY id DESC LIMIT ?" if latest else "id > ? ORDER BY id LIMIT ?"
    if owner is None:
        rows = sql.all("SELECT " + Worker.COLUMNS + " FROM worker " + (
            "WHERE " if everyone else "INDEXED BY worker_living WHERE state = 0 AND ") + beyond, after, limit)
    else:
        rows = sorted((row for state in ((ALIVE, EXPIRED, SIGNED_OFF) if everyone else (ALIVE,))
                       for row in sql.all("SELECT " + Worker.COLUMNS + """
                           FROM worker INDEXED BY worker_own
                           WHERE user = ? AND state = ? AND """ + beyond, owner, state, after, limit)),
                      reverse=latest)[:limit]
    workers = [Worker(row) for row in rows]
    return Page([shown_worker(sql, now, worker) for worker in workers],
                str(workers[-1].id) if len(workers) == limit else None)


@read_operation
def read_worker(sql: Transaction, now: Now, worker_uuid: str, limit: int, after: int) -> Tuple[ShownWorker, Page]:
    """A worker, and a page of the tasks that it holds by id: (run uuid, ShownTask) of each. Raises NotFound.

    What a restart or a deletion takes from it is not shown, also while rows of that follow, nor tasks of runs that
    are not for the caller: the page may be short.
    """
    worker = find_own_worker(sql, worker_uuid)
    sql.takes_long(limit)
    tasks: List[Task] = []
    for hold in (HELD, STARTED):    # IS: with = newer planners (3.40) walk over all that is held, and sort it
        tasks += sql.tasks("SELECT " + TASK_COLUMNS + """
            FROM task INDEXED BY task_held
            WHERE worker = ? AND hold IS ? AND hold <= 4 AND id > ?
            ORDER BY id
            LIMIT ?""", worker.id, hold, after, limit)
    tasks = sorted(tasks)[:limit]
    entries = []
    for task in tasks:
        run = run_of_task(sql, task.run or 0)
        if sql.caller.owner not in (None, run.user):
            continue
        if run.sweep != DELETE and is_held(as_swept(sql, run, task)):
            entries.append((run.uuid, shown(sql, run, task)))
    return shown_worker(sql, now, worker), Page(entries, str(tasks[-1].id) if len(tasks) == limit else None)


@read_operation
def list_tasks(sql: Transaction, now: Now, run_uuid: str, status: Optional[int], order: str, limit: int,
               after: str, spans: Sequence[Tuple[int, int]] = ()) -> Page:
    """A page of a run's tasks: ShownTask of each. *spans*: first and last numbers of those that are wanted, if not all.

    *order*: "task" by number, "started" those that compute, the longest ago first, "finished" those that are, the
    latest first. *after*: what the page before said, or "". Untouched tasks are listed too, and not written. Raises
    NotFound, and BadRequest for another *after*, a number out of range, spans by time, or for "started" with another
    status than COMPUTING.
    """
    run = find_run(sql, run_uuid)
    sql.takes_long(limit)
    if spans and order != "task":
        raise BadRequest("tasks= lists tasks by number: leave order out")
    whole_spans = spans_of(run, spans)
    if order == "task":
        if after and not (after.isascii() and after.isdigit()) or len(after) > 18:
            raise BadRequest("after must be what the page before gave as next")
        tasks: List[Task] = []
        following, first = None, int(after) + 1 if after else 0
        wanted = [span for span in whole_spans if span[1] >= first]
        for at, (begin, end) in enumerate(wanted, 1):
            found, last = by_number(sql, run, status, limit - len(tasks), run.first_id + max(begin, first),
                                    run.first_id + end + 1)
            tasks += found
            if last is not None or at < len(wanted) and (
                    len(tasks) == limit or at == SPANS_AT_ONCE or status == DONE):     # each of them reads PAGE_ROWS
                following = str(end if last is None else last - run.first_id)
                break
    else:
        if order == "started" and status not in (None, COMPUTING):
            raise BadRequest("order=started lists tasks that compute: leave status out, or say computing")
        tasks, following = by_time(sql, run, status, order, limit, after)
    sizes = itertools.accumulate(len(task.message or "") + len(task.log or "") for task in tasks)
    kept = max(sum(size <= PAGE_CHARS for size in sizes), 1)
    if kept < len(tasks):
        tasks = tasks[:kept]
        following = str(tasks[-1].id - run.first_id) if order == "task" else place_in_time(tasks[-1], order)
    return Page([shown(sql, run, task) for task in tasks], following)


SPANS_AT_ONCE = 200     # that are looked at for a page: then it is short


def spans_of(run: Run, spans: Optional[Sequence[Tuple[int, int]]]) -> Sequence[Tuple[int, int]]:
    """First and last numbers of tasks of the run, all of it for none. Raises BadRequest when one is out of range."""
    if spans and spans[-1][1] >= run.num_tasks:
        raise BadRequest(out_of_range(run, spans[-1][1]))
    return spans or [(0, run.num_tasks - 1)]


def by_number(sql: Transaction, run: Run, status: Optional[int], limit: int, first: int,
              end: int) -> Tuple[List[Task], Optional[int]]:
    """Up to *limit* tasks with ids from *first* on, below *end*, and the last id looked at, None when that is the end.

    Waiting, computing and failed ones are found by an index, untouched ones in their intervals.
    Those that are done, by looking at PAGE_ROWS rows at most.
    """
    select = "SELECT " + TASK_COLUMNS + " FROM task "
    if status is None:
        last = min(first + limit, end) - 1
        touched = {task.id: task for task in sql.tasks(select + "WHERE id BETWEEN ? AND ?", first, last)}
        tasks = [touched.get(task_id) or Task(task_id) for task_id in range(first, last + 1)]
        return tasks, last if last + 1 < end else None
    if status == DONE:
        beyond = sql.value("SELECT id FROM task WHERE id >= ? AND id < ? ORDER BY id LIMIT 1 OFFSET ?",
                           first, end, PAGE_ROWS)
        bound = beyond or end
        tasks = sql.tasks(select + "WHERE id >= ? AND id < ? AND status = 2 ORDER BY id LIMIT ?", first, bound, limit)
        if len(tasks) < limit:
            return tasks, bound - 1 if bound < end else None
        return tasks, tasks[-1].id
    tasks = sql.tasks(select + """
        INDEXED BY task_open
        WHERE status = ? AND status <> 2 AND id >= ? AND id < ?
        ORDER BY id
        LIMIT ?""", status, first, end, limit)
    if status == WAITING:
        tasks = sorted(tasks + untouched_tasks(sql, run, first, limit, end), key=operator.attrgetter("id"))[:limit]
    return tasks, tasks[-1].id if len(tasks) == limit else None


def untouched_tasks(sql: Transaction, run: Run, first: int, limit: int, end: int) -> List[Task]:
    """Up to *limit* untouched tasks with ids from *first* on, below *end*."""
    spans = [(run.head_end - 1, run.head)] if first < run.head_end else []
    spans += sql.all("""
        SELECT last, first FROM untouched
        WHERE last >= ? AND last < ?
        ORDER BY last
        LIMIT ?""", max(first, run.head_end), run.end_id, limit)
    ids = itertools.chain.from_iterable(range(max(begin, first), min(last + 1, end)) for last, begin in spans)
    return [Task(task_id) for task_id in itertools.islice(ids, limit)]


def by_time(sql: Transaction, run: Run, status: Optional[int], order: str, limit: int,
            after: str) -> Tuple[List[Task], Optional[str]]:
    """Up to *limit* tasks in order of time, and where the next page begins: milliseconds.id, None at the end.

    The index of the ends begins with the status, so that each has its own order; without one, the four are merged.
    """
    match = re.fullmatch(r"(-?[0-9]{1,18})\.([0-9]{1,18})", after, re.ASCII)
    if after and not match:
        raise BadRequest("after must be what the page before gave as next")
    backward = order == "finished"
    than, way = ("<", "DESC") if backward else (">", "ASC")
    words = {"columns": TASK_COLUMNS, "order": order, "than": than, "way": way}
    # Those of the very time at which the page before ended, then those beyond: asked for together, they are walked to.
    parts: List[Tuple[str, Tuple[int, ...]]] = [("%(order)s IS NOT NULL", ())]
    if match:
        at, last_id = map(int, match.groups())
        parts = [("%(order)s = ? AND id %(than)s ?", (at, last_id)), ("%(order)s %(than)s ?", (at,))]
    tasks: List[Task] = []
    for each in [COMPUTING] if not backward else range(4) if status is None else [status]:
        wanted = limit
        for where, values in parts:
            found = sql.tasks(("""
                SELECT %(columns)s FROM task INDEXED BY task_%(order)s
                WHERE run = ? AND status = """ + str(each) + """ AND %(order)s IS NOT NULL AND """ + where + """
                ORDER BY %(order)s %(way)s, id %(way)s
                LIMIT ?""") % words, run.id, *values, wanted)
            tasks += found
            wanted -= len(found)
    tasks = sorted(tasks, key=operator.attrgetter(order, "id"), reverse=backward)[:limit]
    return tasks, place_in_time(tasks[-1], order) if len(tasks) == limit else None


def place_in_time(task: Task, order: str) -> str:
    """Where the page after that of the task begins."""
    return "%d.%d" % (getattr(task, order), task.id)


@read_operation
def list_audit(sql: Transaction, now: Now, limit: int, after: int) -> Page:
    """A page of the audit, AuditLine of each, the oldest first."""
    lines = [AuditLine(*row) for row in sql.all("""
        SELECT id, utc, user, action, object, address, times FROM audit
        WHERE id > ?
        ORDER BY id
        LIMIT ?""", after, limit)]
    return Page(lines, str(lines[-1].id) if len(lines) == limit else None)


TASKS_BETWEEN = "SELECT count(*) FROM task WHERE id >= ? AND id < ?"


@read_operation
def check(sql: Transaction, now: Now) -> List[str]:
    """Recount the file's promises: a sentence for each one that does not hold."""
    sql.flush()
    wrong = []
    taken = lost = 0
    next_id = sql.value("SELECT next_task_id FROM farm")
    for row in sql.all("SELECT " + Run.COLUMNS + " FROM run ORDER BY first_id"):
        run = Run(row)
        if run.first_id < taken or run.ids_end > next_id:
            wrong.append("run %s: its task ids are another run's" % run.uuid)
        lost += sql.value(TASKS_BETWEEN, taken, run.first_id) + sql.value(TASKS_BETWEEN, run.end_id, run.ids_end)
        taken = run.ids_end
        if not run.sweep:
            wrong += ["run %s: %s" % (run.uuid, sentence) for sentence in recount(sql, run)]
    lost += sql.value(TASKS_BETWEEN, taken, 2 ** 62)
    if lost:
        wrong.append("%d tasks belong to no run" % lost)
    for count, sentence in (
            (sql.value("""
                SELECT count(*) FROM task INDEXED BY task_held
                WHERE hold <= 4 AND NOT EXISTS (SELECT 1 FROM worker WHERE worker.id = task.worker)"""),
             "%d tasks are held by workers that never registered"),
            (sql.value("""
                SELECT count(*) FROM task
                WHERE NOT EXISTS (SELECT 1 FROM run WHERE run.id = task.run AND task.id >= run.first_id
                    AND task.id < run.first_id + run.num_tasks)"""),
             "%d tasks name a run that they are not of"),
            (sql.value("""
                SELECT count(*) FROM token
                WHERE user NOT IN (SELECT id FROM user) OR run IS NOT NULL AND run NOT IN (SELECT uuid FROM run)"""),
             "%d tokens are of no user, or for no run"),
            (sql.value("SELECT count(*) FROM spared WHERE run NOT IN (SELECT id FROM run WHERE sweep IS NOT NULL)"),
             "%d workers are spared by no restart"),
            (sql.value("""
                SELECT (SELECT count(*) FROM work WHERE run NOT IN (SELECT id FROM run WHERE has_work = 1))
                    + (SELECT count(*) FROM run
                       WHERE has_work = 1 AND coalesce(sweep, '') <> 'delete' AND id NOT IN (SELECT run FROM work))"""),
             "%d commands are of no run, or lacking")):
        if count:
            wrong.append(sentence % count)
    if {token.id: token for token in every_token(sql)} != sql.tokens:
        wrong.append("the server remembers other tokens than the file has")
    if count_holds(sql).by_run != sql.holds.by_run:
        wrong.append("the server remembers that workers hold %s, and the file says %s" % (
            sql.holds.by_run, count_holds(sql).by_run))
    return wrong + [row for row, in sql.all("PRAGMA integrity_check(20)") if row != "ok"]


def count_holds(sql: Transaction) -> Holds:
    """What workers hold, counted in the file; of runs whose rows are to follow, as it is to be."""
    holds = Holds()
    spared = set(sql.all("SELECT run, worker FROM spared"))
    for run_id, worker_id, tasks in sql.all("""
            SELECT run, worker, count(*) FROM task INDEXED BY task_held
            WHERE hold <= 2 AND hold <= 4
            GROUP BY worker, run"""):
        kind = run_of_task(sql, run_id).sweep
        if kind in (None, RESTART_FAILED) or kind == RESTART and (run_id, worker_id) in spared:
            holds.add(run_id, worker_id, tasks)
    holds.settle()
    return holds


def recount(sql: Transaction, run: Run) -> Iterator[str]:
    """What is wrong in the figures of one run."""
    counts, complete, millionths = [0, 0, 0, 0], 0, 0
    for status, number, full, total in sql.all("""
            SELECT status, count(*), sum(millionths = 100000000), sum(millionths)
            FROM task WHERE id >= ? AND id < ? GROUP BY status""", run.first_id, run.end_id):
        counts[status] = number
        millionths += total
        complete += full if status == DONE else 0
    touched = sum(counts)
    spans = [(run.head, run.head_end)] if run.head < run.head_end else []
    spans += [(first, last + 1) for last, first in sql.all(
        "SELECT last, first FROM untouched WHERE last >= ? AND last < ? ORDER BY last", run.first_id, run.end_id)]
    untouched = sum(end - first for first, end in spans)
    counts[WAITING] += untouched
    if counts != run.counts:
        yield "counts %s tasks waiting, computing, done and failed, and has %s" % (run.counts, counts)
    if untouched != run.num_untouched or touched + untouched != run.num_tasks:
        yield "has %d touched and %d untouched tasks of %d" % (touched, untouched, run.num_tasks)
    if (complete, millionths) != (run.num_complete, run.millionths):
        yield "sums up to %d complete tasks and %d millionths, and has %d and %d" % (
            run.num_complete, run.millionths, complete, millionths)
    if run.num_untouched and run.head == run.head_end:
        yield "has untouched tasks but none at hand"
    for (first, end), (following, _) in zip(spans, spans[1:] + [(run.end_id, 0)]):
        if not run.first_id <= first < end <= following:
            yield "the untouched tasks from id %d on overlap" % first
        if sql.one("SELECT 1 FROM task WHERE id >= ? AND id < ? LIMIT 1", first, end):
            yield "tasks from id %d on are both touched and untouched" % first


# ---------------------------------------------------------------- OPERATIONS
# What can be done to runs, tasks and workers: each a plain function (sql, now, ...) that the writer runs inside a
# transaction. Calling one marked @operation only names it. It checks first and writes after: a refused one has
# changed nothing. It asks RULES what a task becomes, and ROWS to write that.
#
# Another operation: a function here, in the order of the contract, and a handler in API that names it. What may
# change more than SMALL tasks says so by `takes_long`, looks at `over` between slices, and gives Continue. What a
# keeper would want to know later calls `audit` at its end.

SLICE = 200                     # tasks between two looks at the clock
Place = Tuple[int, int]         # hold and id: how far a walk over what a worker holds, or held, has come
FIRST_HELD: Place = (HELD, 0)   # where that of what it holds begins
Spans = Tuple[Tuple[int, int], ...]     # ranges of tasks: first and last number of each, in order


@operation
def create_run(sql: Transaction, now: Now, run_uuid: str, num_tasks: int, name: Optional[str] = None,
               max_failures: int = 1, max_losses: int = 5, after: Optional[str] = None,
               after_any: bool = False, work: Optional[str] = None) -> Run:
    """A new run; costs the same for any number of tasks. Raises BadRequest when ids run out.

    *after*: the uuid of a run that is to be over before: complete, or with *after_any* however it ended. Raises
    NotFound for that. *work*: what its tasks are to do, as it is kept.
    """
    if after is not None:
        find_run(sql, after, reading=True)
    first_id = sql.value("SELECT next_task_id FROM farm")
    ids_end = first_id + room_to_grow(num_tasks)
    if ids_end > 2 ** 53:
        raise BadRequest("this farm has given out nearly all ids that JSON can carry: start another with a new file")
    sql.execute("UPDATE farm SET next_task_id = ?", (ids_end,))
    row = (run_uuid, first_id, num_tasks, now.utc, num_tasks, 0, 0, 0, num_tasks, 0, 0,
           first_id, first_id + num_tasks, None, None, name, max_failures, max_losses, sql.caller.user, sql.caller.name,
           OPEN_RUN, after, int(after_any), ids_end, int(work is not None))
    cursor = sql.execute("INSERT INTO run (%s) VALUES (NULL%s)" % (Run.COLUMNS, ", ?" * len(row)), row)
    if work is not None:
        sql.execute("INSERT INTO work (run, work) VALUES (?, ?)", (cursor.lastrowid, work))
    audit(sql, now, "new", titled(run_uuid, name))
    return sql.keep_run(Run((cursor.lastrowid,) + row)).snapshot()


def room_to_grow(num_tasks: int) -> int:
    """How many ids a run of so many tasks gets. MAX_TASKS for each made a file a fifth larger: long ids."""
    return min(10 * num_tasks + 1000, MAX_TASKS)


def titled(run_uuid: str, name: Optional[str]) -> str:
    """A run in the audit, where it should be known when it is gone."""
    return "%s %s" % (run_uuid, name) if name else run_uuid


@operation
def delete_run(sql: Transaction, now: Now, run_uuid: str) -> None:
    """The run is gone at once; its rows follow in slices. Raises NotFound."""
    run = find_run(sql, run_uuid)
    end_holds(sql, run, {})
    end_tokens(sql, "run = ?", run_uuid)
    sql.execute("DELETE FROM work WHERE run = ?", (run.id,))
    sql.begin_sweep(run, DELETE)
    del sql.runs[run_uuid]
    audit(sql, now, DELETE, titled(run_uuid, run.name))


@operation
def restart_run(sql: Transaction, now: Now, run_uuid: str, which: str) -> None:
    """Tasks wait again, and a run that was cancelled is open again. Raises NotFound.

    *which*: RESTART, RESTART_ALL or RESTART_FAILED, see `restarted` in RULES. The run's figures change at once and
    its rows follow in slices; what changes the run waits meanwhile.
    """
    run = find_run(sql, run_uuid, reading=True)
    if run.sweep == which:
        return      # nobody has changed the run since
    if run.sweep:
        raise RunBusy(run_uuid)
    if run.state == CANCELLED:
        set_state(sql, run, OPEN_RUN)
    if which == RESTART_ALL:
        run.counts = [run.num_tasks, 0, 0, 0]
        run.num_complete = run.millionths = 0
        end_holds(sql, run, {})
    elif which == RESTART_FAILED:
        run.counts[WAITING] += run.counts[FAILED]
        run.counts[FAILED] = 0
    else:
        # Written down, so that the sweep spares the same tasks after a crash, when other leases run.
        spared = {worker_id: tasks for worker_id, tasks in sql.holds.workers_of(run.id).items()
                  if sql.leases.runs(worker_id, now)}
        sql.execute_many("INSERT INTO spared (run, worker) VALUES (?, ?)", [(run.id, key) for key in spared])
        computing = sum(spared.values())
        run.counts = [run.num_tasks - run.num_complete - computing, computing, run.num_complete, 0]
        end_holds(sql, run, spared)
    sql.begin_sweep(run, which)
    audit(sql, now, which, titled(run_uuid, run.name))


def set_state(sql: Transaction, run: Run, state: str, waits: bool = True) -> None:
    """Write that a run is open, paused or cancelled; *waits* False: and that it waits for no other any more."""
    run.state = state
    if not waits:
        run.after, run.after_any = None, 0
    sql.execute("UPDATE run SET state = ?, after = ?, after_any = ? WHERE id = ?",
                (run.state, run.after, run.after_any, run.id))


@operation
def pause_run(sql: Transaction, now: Now, run_uuid: str) -> None:
    """No task is handed out until the run is resumed. Raises NotFound, and Conflict for a cancelled one."""
    run = find_run(sql, run_uuid)
    if run.state == CANCELLED:
        raise Conflict("run %s was cancelled, so there is nothing to pause: resume it first" % run_uuid)
    set_state(sql, run, PAUSED)
    audit(sql, now, "pause", titled(run_uuid, run.name))


@operation
def resume_run(sql: Transaction, now: Now, run_uuid: str) -> None:
    """A run that was paused or cancelled is open again. Raises NotFound."""
    run = find_run(sql, run_uuid)
    set_state(sql, run, OPEN_RUN)
    audit(sql, now, "resume", titled(run_uuid, run.name))


@operation
def cancel_run(sql: Transaction, now: Now, run_uuid: str) -> None:
    """No task is handed out any more, and what computes is taken from its worker and waits. Raises NotFound.

    As with a restart, the run's figures change at once, and its rows follow in slices.
    """
    run = find_run(sql, run_uuid, reading=True)
    if run.sweep == CANCEL:
        return
    if run.sweep:
        raise RunBusy(run_uuid)
    set_state(sql, run, CANCELLED)
    run.counts[WAITING] += run.counts[COMPUTING]
    run.counts[COMPUTING] = 0
    end_holds(sql, run, {})
    sql.begin_sweep(run, CANCEL)
    audit(sql, now, CANCEL, titled(run_uuid, run.name))


@operation
def cancel_tasks(sql: Transaction, now: Now, run_uuid: str, spans: Spans, left: Optional[Spans] = None) -> Optional[
        Continue]:
    """Tasks that are not done fail, without an attempt. Raises NotFound, and BadRequest when one is out of range.

    *spans*: first and last number of each range. *left*: those that the slices before have left.
    """
    run = find_run(sql, run_uuid)
    if left is None:
        left = tuple(spans_of(run, spans))
    sql.takes_long(sum(last + 1 - first for first, last in left))
    while left:
        (first, last), left = left[0], left[1:]
        end = min(last, first + SLICE - 1)
        if end < last:
            left = ((end + 1, last), *left)
        tasks = tasks_by_id(sql, range(run.first_id + first, run.first_id + end + 1))
        changes = [(task, cancelled(task, milliseconds(now.utc))) for task in tasks]
        change_many(sql, run, [(before, after) for before, after in changes if before != after])
        if left and sql.over():
            return Continue((run_uuid, spans, left))
    audit(sql, now, CANCEL, "%s %s" % (titled(run_uuid, run.name), shortened(spans_text(spans))))
    return None


def spans_text(spans: Spans) -> str:
    """Ranges of tasks as people write them."""
    return ",".join("%d" % first if first == last else "%d-%d" % (first, last) for first, last in spans)


@operation
def extend_run(sql: Transaction, now: Now, run_uuid: str, num_tasks: int) -> None:
    """The run has so many more tasks, which wait. Raises NotFound; BadRequest when they are too many for any run, and
    Conflict when this one knows a parameter for each task, or the ids that it may still use are too few.
    """
    run = find_run(sql, run_uuid)
    if run.has_work and json.loads(sql.value("SELECT work FROM work WHERE run = ?", run.id)).get("parameters"):
        raise Conflict("run %s knows its parameters, one for each task: make another run of the new ones" % run_uuid)
    if run.num_tasks + num_tasks > MAX_TASKS:
        raise BadRequest("run %s has %d tasks, and no run more than %d: make another one for the rest" % (
            run_uuid, run.num_tasks, MAX_TASKS))
    end = run.end_id
    if end + num_tasks > run.ids_end:
        ids_end = end + room_to_grow(num_tasks)
        if run.ids_end != sql.value("SELECT next_task_id FROM farm") or ids_end > 2 ** 53:
            raise Conflict("run %s can have %d tasks at most, since others were made after it: make another for the "
                           "rest" % (run_uuid, run.ids_end - run.first_id))
        sql.execute("UPDATE farm SET next_task_id = ?", (ids_end,))
        run.ids_end = ids_end
    if not run.num_untouched:
        run.head, run.head_end = end, end + num_tasks
    elif run.head_end == end:
        run.head_end += num_tasks
    elif not sql.execute("UPDATE untouched SET last = last + ? WHERE last = ?", (num_tasks, end - 1)).rowcount:
        sql.execute("INSERT INTO untouched (last, first) VALUES (?, ?)", (end + num_tasks - 1, end))
    run.num_tasks += num_tasks
    run.num_untouched += num_tasks
    run.counts[WAITING] += num_tasks
    # One statement, as the table's CHECK wants it; what else has changed of the run is written with the others.
    sql.execute("UPDATE run SET num_tasks = num_tasks + ?, num_waiting = num_waiting + ?, ids_end = ? WHERE id = ?",
                (num_tasks, num_tasks, run.ids_end, run.id))
    sql.changed[run.id] = run
    audit(sql, now, "extend", titled(run_uuid, run.name))


@operation
def restart_some(sql: Transaction, now: Now, run_uuid: str, which: str, selection: Selection, reached: int = 0,
                 restarted_before: int = 0) -> Union[Continue, int]:
    """Of the tasks that `restart_run` would let wait, only those that are selected, one after another; how many.

    Raises NotFound, and BadRequest for a number out of range. *reached* and *restarted_before*: the number up to which
    the slices before have come, and what they restarted. Others come between slices, so that nobody waits, whatever the
    size of the run; what they do to a task behind that number stays.
    """
    run = find_run(sql, run_uuid)
    spans = spans_of(run, selection.spans)
    if run.state == CANCELLED and not reached:      # later it was cancelled meanwhile, and stays so
        set_state(sql, run, OPEN_RUN)
    sql.takes_long(sum([last + 1 - first for first, last in spans]))
    number, size = restarted_before, SLICE if selection.like is None else -(-SLICE // 8)    # texts may take long
    select = "SELECT " + TASK_COLUMNS + " FROM task " + (
        "INDEXED BY task_open WHERE status = 3 AND status <> 2 AND" if selection.failed_only or which == RESTART_FAILED
        else "WHERE") + " id BETWEEN ? AND ? ORDER BY id LIMIT ?"
    for first, last in spans:
        reached = max(reached, first)
        while reached <= last:
            tasks = sql.tasks(select, run.first_id + reached, run.first_id + last, size)
            changes = []
            for task in filter(selection.judges, tasks):
                held = is_held(task)
                after = restarted(task, which, held and sql.leases.runs(task.worker, now))  # type: ignore[arg-type]
                if after != task:
                    changes.append((task, after))
                    if held:
                        sql.leases.taken_from(task.worker)      # type: ignore[arg-type]
            change_many(sql, run, changes)
            number += len(changes)
            reached = tasks[-1].id + 1 - run.first_id if len(tasks) == size else last + 1
            if sql.over():
                return Continue((run_uuid, which, selection, reached, number))
    audit(sql, now, which, "%s, %d of its tasks" % (titled(run_uuid, run.name), number))
    return number


def end_holds(sql: Transaction, run: Run, spared: Mapping[int, int]) -> None:
    """Every worker but those *spared* loses the tasks of the run that it holds."""
    for worker_id, tasks in list(sql.holds.workers_of(run.id).items()):
        if worker_id not in spared:
            sql.holds.add(run.id, worker_id, -tasks)
            sql.leases.taken_from(worker_id)


@operation
def claim(sql: Transaction, now: Now, run_uuid: str, worker_uuid: str, key: "Optional[IdempotencyKey]" = None,
          number: Optional[int] = None) -> Union[ShownTask, NothingWaiting]:
    """Give the lowest waiting task to the worker, or task *number*, or say that none waits.

    Raises NotFound for worker, run and number; Conflict for a worker that has signed off, or has a lease
    and holds all it may, and for a number that does not wait; Unprocessable for a key that came with another claim.
    """
    worker, run = claimant(sql, now, worker_uuid), find_run(sql, run_uuid)
    before = earlier_claim(sql, now, worker, key) if key else []
    if before:
        return shown(sql, run, before[0])
    task = None
    if number is not None:
        task = find_task(sql, run, number)
        if task.status != WAITING:
            raise Conflict("task %d is %s, and a task that does not wait cannot be claimed" % (
                number, STATUS[task.status]))
    if not run.counts[WAITING]:
        return nothing_waiting(sql, now, run)
    if worker.lease is not None:
        room_for(sql, worker)       # before it is written that the run has begun: what is refused changes nothing
    nothing = withheld(sql, run)
    if nothing is not None:
        return nothing
    if task is not None:
        remember_ends(sql, [task])
    elif run.counts[WAITING] > run.num_untouched:       # some task that waits has a row
        row = sql.execute(LOWEST_WAITING, (run.first_id, run.head if run.num_untouched else run.end_id, 1)).fetchone()
        if row is not None:
            task = Task._make(row)
            remember_ends(sql, [task])
    if task is None:
        task = Task(run.head)
    taken = claimed(task, worker.id, milliseconds(now.utc))
    change(sql, run, task, taken)
    if key:
        remember_claim(sql, worker, key, [(taken.id, taken.attempt)])
    return ShownTask(taken, taken.id - run.first_id, worker)


# Without the hint the planner takes the primary key, and walks over every task that is done.
LOWEST_WAITING = "SELECT " + TASK_COLUMNS + """
    FROM task INDEXED BY task_open
    WHERE status = 0 AND status <> 2 AND id >= ? AND id < ?
    ORDER BY id
    LIMIT ?"""


@operation
def claim_many(sql: Transaction, now: Now, run_uuid: str, worker_uuid: str, count: int,
               key: "Optional[IdempotencyKey]" = None) -> Union[List[Tuple[int, int, int]], NothingWaiting]:
    """Give up to *count* of the lowest waiting tasks: number, attempt and millionths of each. Raises as claim.

    More than SLICE are given only while there is time: fewer than were asked for keep nobody waiting.
    """
    worker, run = claimant(sql, now, worker_uuid), find_run(sql, run_uuid)
    sql.takes_long(count)
    before = earlier_claim(sql, now, worker, key) if key else []
    if before:
        return [(task.id - run.first_id, task.attempt, task.millionths) for task in before]
    if not run.counts[WAITING]:
        return nothing_waiting(sql, now, run)
    count = min(count, room_for(sql, worker), run.counts[WAITING])
    nothing = withheld(sql, run)
    if nothing is not None:
        return nothing
    taken: List[Tuple[int, int, int]] = []
    while len(taken) < count and not (len(taken) >= SLICE and sql.over()):
        part = take_touched(sql, run, worker, min(count - len(taken), SLICE))
        if len(part) < SLICE:       # all that wait below the untouched ones are taken
            part += take_untouched(sql, run, worker, min(count - len(taken) - len(part), 10 * SLICE))
        taken += part
    if key:
        remember_claim(sql, worker, key, [(run.first_id + number, attempt) for number, attempt, _ in taken])
    return taken


def take_touched(sql: Transaction, run: Run, worker: Worker, count: int) -> List[Tuple[int, int, int]]:
    """Let the worker hold up to *count* of the waiting tasks that have a row and lie below all that have none."""
    if run.counts[WAITING] <= run.num_untouched:
        return []
    tasks = sql.tasks(LOWEST_WAITING, run.first_id, run.head if run.num_untouched else run.end_id, count)
    remember_ends(sql, tasks)
    taken = [claimed(task, worker.id, None) for task in tasks]
    change_many(sql, run, list(zip(tasks, taken)))
    return [(task.id - run.first_id, task.attempt, task.millionths) for task in taken]


def take_untouched(sql: Transaction, run: Run, worker: Worker, count: int) -> List[Tuple[int, int, int]]:
    """Let the worker hold up to *count* tasks of the first untouched interval: `claimed`, by one statement."""
    first = run.head
    last = min(first + count, run.head_end) - 1
    if first > last:
        return []
    touch(sql, run, first, last)
    sql.execute("""
        INSERT INTO task (id, run, status, worker, attempt, hold)
        WITH RECURSIVE fresh (id) AS (SELECT ? UNION ALL SELECT id + 1 FROM fresh WHERE id < ?)
        SELECT id, ?, 1, ?, 1, 1 FROM fresh""", (first, last, run.id, worker.id))
    taken = last + 1 - first
    sql.changed[run.id] = run
    run.counts[WAITING] -= taken
    run.counts[COMPUTING] += taken
    sql.holds.add(run.id, worker.id, taken)
    return [(number, 1, 0) for number in range(first - run.first_id, last + 1 - run.first_id)]


def claimant(sql: Transaction, now: Now, worker_uuid: str) -> Worker:
    """The worker who claims, its lease renewed. Raises NotFound, and Conflict when it has signed off."""
    worker = find_own_worker(sql, worker_uuid)
    renew_lease(sql, now, worker)
    refuse_signed_off(worker)
    return worker


def room_for(sql: Transaction, worker: Worker) -> int:
    """How many tasks the worker may still claim. Raises Conflict when none."""
    room = MAX_BATCH - sql.holds.number(worker.id)
    if room <= 0:
        raise Conflict("worker %s holds %d tasks, and no worker more: report some first, or let some go"
                       % (worker.uuid, MAX_BATCH))
    return room


def withheld(sql: Transaction, run: Run) -> Optional[NothingWaiting]:
    """Nothing of a run that is paused, cancelled or waits for another; None when it may begin, and that is written.

    What it waits for is looked at with each claim: to tell all who wait for a run of its end would take long.
    """
    if run.state == OPEN_RUN and not run.after:
        return None
    if run.state == PAUSED:
        return NothingWaiting(WITHHELD_S)
    if run.state == CANCELLED:
        return NothingWaiting(None)
    first = found_run(sql, run.after or "", None)     # a deleted one is over, and was not complete
    begins = may_begin(first is None or first.is_over, first is not None and first.counts[DONE] == first.num_tasks,
                       bool(run.after_any))
    if not begins:
        return NothingWaiting(WITHHELD_S if begins is None else None)
    set_state(sql, run, OPEN_RUN, waits=False)
    return None


def nothing_waiting(sql: Transaction, now: Now, run: Run) -> NothingWaiting:
    """Nothing waits: whether leased tasks compute that may come back, and when a lease of theirs may end.

    The leases of some of the workers tell that well enough. Where those have none, all workers are asked, but only
    once a second: 20 000 of them took 0.5 ms at each claim in vain.
    """
    workers, ends = sql.holds.workers_of(run.id), sql.leases.ends
    found = [ends[worker_id] for worker_id in itertools.islice(workers, 64) if worker_id in ends]
    end = min(found) if found else None
    if not found and len(workers) > 64:
        asked, end = sql.first_ends.get(run.id, (-math.inf, None))
        if now.tick >= asked + 1.0:
            end = min((ends[worker_id] for worker_id in workers if worker_id in ends), default=None)
            sql.first_ends[run.id] = now.tick, end
    return NothingWaiting(None if end is None else max(0.0, end - now.tick))


def remember_ends(sql: Transaction, tasks: Sequence[Task]) -> None:
    """Tasks are claimed again: keep how their holders ended the last attempt, and some before it."""
    ended = [task for task in tasks if task.hold is not None and task.hold > GIVEN_UP]
    sql.execute_many("INSERT OR REPLACE INTO ended (task, attempt, worker, hold) VALUES (?, ?, ?, ?)",
                     [(task.id, task.attempt, task.worker, task.hold) for task in ended])
    sql.execute_many("DELETE FROM ended WHERE task = ? AND attempt <= ?", [
        (task.id, task.attempt - REPORTS_REMEMBERED) for task in ended if task.attempt > REPORTS_REMEMBERED])


class IdempotencyKey(NamedTuple):
    """An Idempotency-Key, and the request that came with it: both as hashes of 16 bytes."""
    key: bytes          # over user and key
    request: bytes      # over method, path and body

    def compare(self, request: bytes) -> None:
        """Raise Unprocessable unless the key came with that request before."""
        if request != self.request:
            raise Unprocessable("this Idempotency-Key came with another request before: use a new key for each")


def earlier_claim(sql: Transaction, now: Now, worker: Worker, key: IdempotencyKey) -> List[Task]:
    """The tasks that the worker was given for a claim with this key, if that was its last one with a key.

    Raises Unprocessable when the key came with another request, whoever claimed with it.
    """
    before = claim_with(sql, key.key)
    if before is None:
        row = sql.one(ANSWER, key.key, sql.steady_utc(now.tick) - KEY_MEMORY_S)
        if row is not None:
            request, _, _ = row
            key.compare(request)
        return []
    request, given = before
    key.compare(request)
    spans = [tuple(map(int, span.split(":"))) for span in given.split(",")]
    attempts = {task_id: attempt for first, last, attempt in spans for task_id in range(first, last + 1)}
    return [task._replace(status=COMPUTING, worker=worker.id, attempt=attempts[task.id])
            for task in tasks_by_id(sql, list(attempts))]


ANSWER = "SELECT request, status, body FROM answer WHERE key = ? AND at > ?"


def claim_with(sql: Transaction, key: bytes) -> Optional[Tuple[bytes, str]]:
    """The request that a key came with, and what was given, if it is the last key of some worker's claims.

    Memory knows which worker's: an index would have another page written with every claim.
    """
    if key not in sql.claim_keys:
        return None
    found: Tuple[bytes, str] = sql.one("SELECT request, given FROM last_claim WHERE worker = ?", sql.claim_keys[key])
    return found


def forget_claim(sql: Transaction, worker_id: int) -> None:
    """The worker's last claim with a key is not to be repeated any more."""
    key = sql.value("SELECT key FROM last_claim WHERE worker = ?", worker_id)
    if key is not None:
        sql.execute("DELETE FROM last_claim WHERE worker = ?", (worker_id,))
        sql.set_claim_key(key, None)


def remember_claim(sql: Transaction, worker: Worker, key: IdempotencyKey, given: Sequence[Tuple[int, int]]) -> None:
    """Note which tasks, by id and attempt, a claim with a key was given, as spans: first:last:attempt,..."""
    spans: List[List[int]] = []
    for task_id, attempt in given:
        if spans and spans[-1][1:] == [task_id - 1, attempt]:
            spans[-1][1] = task_id
        else:
            spans.append([task_id, task_id, attempt])
    forget_claim(sql, worker.id)
    sql.execute("INSERT INTO last_claim (worker, key, request, given) VALUES (?, ?, ?, ?)",
                (worker.id, key.key, key.request, ",".join("%d:%d:%d" % tuple(span) for span in spans)))
    sql.set_claim_key(key.key, worker.id)


@operation
def answer_once(sql: Transaction, now: Now, key: IdempotencyKey, named: Operation,
                render: Callable[[Any], Tuple[int, bytes]]) -> Union[Continue, Tuple[int, bytes]]:
    """Run an operation once for a key: status and body of its answer, or those that were given before.

    *render* turns its result into them. What is refused is not remembered, since it has changed
    nothing. Raises what the operation raises, and Unprocessable for a key that came with another request.
    """
    utc = sql.steady_utc(now.tick)
    row = sql.one(ANSWER, key.key, utc - KEY_MEMORY_S)
    if row is not None:
        request, status, body = row
        key.compare(request)
        return status, body
    before = claim_with(sql, key.key)
    if before is not None:
        request, _ = before
        key.compare(request)
    result = named.function(sql, now, *named.args)
    if type(result) is Continue:
        return Continue((key, Operation(named.function, result.args, named.reads), render))
    status, body = render(result)
    cursor = sql.execute("INSERT OR REPLACE INTO answer (key, request, at, status, body) VALUES (?, ?, ?, ?, ?)",
                         (key.key, key.request, utc, status, body))
    sql.execute("DELETE FROM answer WHERE id <= ?", (int(cursor.lastrowid or 0) - KEYS_REMEMBERED,))
    sql.execute("DELETE FROM answer WHERE id IN (SELECT id FROM answer ORDER BY id LIMIT 4) AND at <= ?",
                (utc - KEY_MEMORY_S,))
    return status, body


@operation
def report(sql: Transaction, now: Now, run_uuid: str, worker_uuid: Optional[str], said: Report) -> None:
    """Set what is named of a task; done alone means 100 percent.

    Somebody who names no worker and no attempt may set anything, and ends every hold. Otherwise the
    claim that is named must hold the task, or have it back. Raises NotFound for the run and the
    number, Conflict when the claim does not hold the task.
    """
    worker = None if worker_uuid is None else reporting_worker(sql, now, worker_uuid)
    run = find_run(sql, run_uuid)
    task = find_task(sql, run, said.number)
    after = after_report(sql, now, run, worker_uuid, worker, task, said)
    if after is not None:
        run.last_report = now.utc
        change(sql, run, task, after)


Refused = Tuple[Tuple[int, str], ...]       # numbers of tasks, and why their reports were not taken


@operation
def report_many(sql: Transaction, now: Now, run_uuid: str, worker_uuid: Optional[str], reports: List[Report],
                at: int = 0, refused: Refused = ()) -> Union[Continue, Tuple[int, Refused]]:
    """Report each of many tasks; gives how many were accepted, and number and sentence of those refused.

    Raises NotFound for the run; BadRequest, having changed nothing, when a number is out of range.
    *at* and *refused* are what the slices before have come to.
    """
    worker = None if worker_uuid is None else reporting_worker(sql, now, worker_uuid)
    run = find_run(sql, run_uuid)
    sql.takes_long(len(reports))
    if at == 0:
        reports = sorted(reports)
        wrong = [said.number for said in reports if said.number >= run.num_tasks]
        if wrong:
            raise BadRequest("; ".join(out_of_range(run, number) for number in wrong[:5]))
    while True:
        refused += report_slice(sql, now, run, worker_uuid, worker, reports[at:at + REPORTS_SLICE])
        at += REPORTS_SLICE
        if at >= len(reports):
            return len(reports) - len(refused), refused
        if sql.over():
            return Continue((run_uuid, worker_uuid, reports, at, refused))


REPORTS_SLICE = 1000    # reports between two looks at the clock: 2 ms when they are alike, 7 when they are not


def report_slice(sql: Transaction, now: Now, run: Run, worker_uuid: Optional[str], worker: Optional[Worker],
                 reports: List[Report]) -> Refused:
    """Judge and write reports in order of their numbers; those that are refused."""
    others: List[Report] = []
    for span in spans_alike(reports):
        if len(span) == 1 or worker is None or not finish_span(sql, now, run, worker, span):
            others += span
    refusals: List[Tuple[int, str]] = []
    changes: List[Tuple[Task, Task]] = []
    for task, said in zip(tasks_by_id(sql, [run.first_id + said.number for said in others]), others):
        try:
            after = after_report(sql, now, run, worker_uuid, worker, task, said)
            if after is not None:
                changes.append((task, after))
        except Conflict as conflict:
            refusals.append((said.number, str(conflict)))
    if changes:
        run.last_report = now.utc
        change_many(sql, run, changes)
    return tuple(refusals)


def spans_alike(reports: List[Report]) -> Iterator[List[Report]]:
    """Reports in order of number, those of consecutive tasks together that say the same.

    Of those that tell how long the attempt has run, this and what it used may differ.
    """
    span: List[Report] = []
    kind: Tuple[Any, ...] = ()
    for said in reports:
        this_kind = (said.attempt, said.status, said.millionths, said.exit_code, said.message, said.log, *(
            ("timed",) if said.elapsed_ms is not None else (said.memory, said.cpu_ms)))
        if span and this_kind == kind and said.number == span[-1].number + 1:
            span.append(said)
        else:
            if span:
                yield span
            span, kind = [said], this_kind
    if span:
        yield span


def tasks_by_id(sql: Transaction, task_ids: Sequence[int]) -> List[Task]:
    """The tasks with these ids, which rise; Task(id) for one that has no row."""
    if not task_ids:
        return []
    if task_ids[-1] - task_ids[0] >= 4 * len(task_ids):
        rows = [sql.one(TASK_BY_ID, task_id) for task_id in task_ids]
        return [Task(task_id) if row is None else Task._make(row) for task_id, row in zip(task_ids, rows)]
    found = sql.tasks("SELECT " + TASK_COLUMNS + " FROM task WHERE id BETWEEN ? AND ? ORDER BY id",
                      task_ids[0], task_ids[-1])
    if len(found) == len(task_ids) == task_ids[-1] + 1 - task_ids[0]:
        return found
    tasks = {task.id: task for task in found}
    return [tasks.get(task_id) or Task(task_id) for task_id in task_ids]


FINISH = """
    UPDATE task
    SET status = 2, hold = 6, exit_code = NULL, message = NULL, log = NULL, millionths = ?, finished = ?, memory = ?,
        cpu_ms = ? """


def finish_span(sql: Transaction, now: Now, run: Run, worker: Worker, reports: List[Report]) -> bool:
    """Take `done` for consecutive tasks that the worker holds: `reported`, by one statement. False if it cannot be."""
    first = reports[0]
    if first.status != DONE or (first.exit_code, first.message, first.log) != (None, None, None):
        return False        # FINISH writes NULL out: bound, it costs more
    millionths, now_ms = FULL if first.millionths is None else first.millionths, milliseconds(now.utc)
    span = run.first_id + first.number, run.first_id + reports[-1].number
    count, before = sql.one("""
        SELECT count(*), sum(millionths) FROM task
        WHERE id BETWEEN ? AND ? AND worker = ? AND hold <= 2 AND attempt = coalesce(?, attempt)""",
                            *span, worker.id, first.attempt)
    if count != len(reports):
        return False
    if first.elapsed_ms is None:
        sql.execute(FINISH + "WHERE id BETWEEN ? AND ?", (millionths, now_ms, first.memory, first.cpu_ms, *span))
    else:
        sql.execute_many(FINISH + ", started = ? WHERE id = ?", [
            (millionths, now_ms, said.memory, said.cpu_ms, now_ms - (said.elapsed_ms or 0), run.first_id + said.number)
            for said in reports])
    for task_id in range(span[0], span[1] + 1):
        sql.held.pop(task_id, None)
    sql.changed[run.id] = run
    run.last_report = now.utc
    run.counts[COMPUTING] -= count
    run.counts[DONE] += count
    run.num_complete += count * (millionths == FULL)
    run.millionths += count * millionths - before
    sql.holds.add(run.id, worker.id, -count)
    return True


def reporting_worker(sql: Transaction, now: Now, worker_uuid: str) -> Optional[Worker]:
    """The worker who reports, its lease renewed; None when it is not known."""
    try:
        worker = find_worker(sql, worker_uuid)
    except NotFound:
        return None
    refuse_others_work(sql, worker)
    renew_lease(sql, now, worker)
    return worker


def after_report(sql: Transaction, now: Now, run: Run, worker_uuid: Optional[str], worker: Optional[Worker],
                 task: Task, said: Report) -> Optional[Task]:
    """What a report makes of a task; None when it has come before. Raises Conflict."""
    now_ms = milliseconds(now.utc)
    if worker_uuid is None and said.attempt is None:
        return overruled(task, said, run.limits, now_ms)
    hold = named_hold(sql, worker_uuid, worker, task, said)
    if hold == HELD or hold == STARTED:
        return reported(task, said, run.limits, now_ms)
    if not is_news(task, said, hold, worker_uuid):
        return None
    if takes_back(task, said):
        revive_holder(sql, now, worker or worker_of_task(sql, task.worker or 0))
    return reported(task, said, run.limits, now_ms)


def named_hold(sql: Transaction, worker_uuid: Optional[str], worker: Optional[Worker], task: Task,
               said: Report) -> Optional[int]:
    """What became of the claim that a report names; None when it is none, or too long ago to be known."""
    ours = worker_uuid is None or worker is not None and task.worker == worker.id
    if ours and said.attempt in (None, task.attempt) and task.hold is not None:
        return task.hold
    if worker is None or said.attempt is None:
        return None
    hold: Optional[int] = sql.value("SELECT hold FROM ended WHERE task = ? AND attempt = ? AND worker = ?",
                                    task.id, said.attempt, worker.id)
    return hold


def revive_holder(sql: Transaction, now: Now, worker: Optional[Worker]) -> None:
    """A lapsed task is to be held again, so its worker must be able to lose it again. Raises Conflict."""
    if worker is None:
        raise Conflict("the worker that held this task is forgotten: only a result of it is wanted")
    refuse_signed_off(worker)
    renew_lease(sql, now, worker)


@operation
def register_worker(sql: Transaction, now: Now, worker_uuid: str, hostname: str, pid: int,
                    lease: Optional[int] = None, job: Optional[str] = None) -> Worker:
    """A new worker, or the same one again, with a lease in seconds or none; Conflict when the uuid is another's.

    *job*: the batch job of a new one.
    """
    heard = sql.steady_utc(now.tick)
    try:
        worker = find_worker(sql, worker_uuid)
    except NotFound:
        if sql.one("SELECT 1 FROM worker WHERE uuid = ?", worker_uuid):
            raise Conflict("worker %s is another's: a new worker needs a uuid of its own" % worker_uuid)
        user = sql.caller.user
        cursor = sql.execute(
            "INSERT INTO worker (uuid, hostname, pid, created, lease, heard, user, job) VALUES (?,?,?,?,?,?,?,?)",
            (worker_uuid, hostname, pid, now.utc, lease, heard, user, job))
        worker = sql.keep_worker(Worker((
            cursor.lastrowid, worker_uuid, hostname, pid, lease, ALIVE, heard, user, job, None)))
    refuse_others_work(sql, worker)
    if (worker.hostname, worker.pid) != (hostname, pid):
        raise Conflict("worker %s is process %d on %s: a new worker needs a uuid of its own"
                       % (worker_uuid, worker.pid, shortened(worker.hostname)))
    if (worker.lease, worker.state) != (lease, ALIVE):
        worker.lease, worker.state, worker.heard, worker.why = lease, ALIVE, heard, None
        save_worker(sql, worker)
    renew_lease(sql, now, worker)
    # Also when its lease is as long as before: a sign-off of this very transaction drops it after the commit.
    sql.after_commit(functools.partial(sql.leases.begin, worker.id, lease, now.tick))
    return worker.snapshot()


@read_operation
def beat(sql: Transaction, now: Now, worker_uuid: str, place: Place = (LAPSED, 0)) -> Union[Continue, ShownWorker]:
    """The worker lives: renew its lease, and give it back what has lapsed and nobody claimed since.

    Writes only if something has, and nothing while the disk takes no writes: the lease is renewed
    all the same. Raises NotFound, and Conflict when it has signed off. *place*: how far the slices before have come.
    """
    worker = find_own_worker(sql, worker_uuid)
    refuse_signed_off(worker)
    if sql.trouble:
        sql.leases.hear(worker, now)
        return shown_worker(sql, now, worker)
    renew_lease(sql, now, worker)
    lapsed_ids = sql.all("""
        SELECT id FROM task INDEXED BY task_held
        WHERE worker = ? AND hold >= 3 AND hold <= 4
        LIMIT ?""", worker.id, SMALL + 1)
    sql.takes_long(len(lapsed_ids))
    reached = take_back(sql, worker, place) if lapsed_ids else None
    return shown_worker(sql, now, worker) if reached is None else Continue((worker_uuid, reached))


def take_back(sql: Transaction, worker: Worker, place: Place) -> Optional[Place]:
    """Let a worker hold again what lapsed, from *place* on, while there is time; how far that came, None if to the end.

    Tasks of a run that is being restarted are passed over.
    """
    return walk_holds(sql, worker.id, place, LOST, lambda _, task: taken_back(task))


def walk_holds(sql: Transaction, worker_id: int, place: Place, last_hold: int,
               rule: Callable[[Run, Task], Task]) -> Optional[Place]:
    """Change the tasks that a worker holds, or held, from *place* to those of *last_hold*, while there is time.

    How far that came, None if to the end. Tasks of a run that is being restarted are passed over.
    """
    hold, last_id = place
    while hold <= last_hold:
        tasks = sql.tasks("SELECT " + TASK_COLUMNS + """
            FROM task INDEXED BY task_held
            WHERE worker = ? AND hold IS ? AND hold <= 4 AND id > ?
            ORDER BY id
            LIMIT ?""", worker_id, hold, last_id, SLICE)
        for run, part in by_run(sql, tasks):
            if not run.sweep:
                change_many(sql, run, [(task, rule(run, task)) for task in part])
        hold, last_id = (hold, tasks[-1].id) if len(tasks) == SLICE else (hold + 1, 0)
        if hold <= last_hold and sql.over():
            return hold, last_id
    return None


def by_run(sql: Transaction, tasks: Sequence[Task]) -> List[Tuple[Run, List[Task]]]:
    """Tasks sorted by their runs."""
    parts: Dict[int, List[Task]] = {}
    for task in tasks:
        parts.setdefault(task.run, []).append(task)     # type: ignore[arg-type]
    return [(run_of_task(sql, run_id), part) for run_id, part in parts.items()]


@operation
def sign_off(sql: Transaction, now: Now, worker_uuid: str, why: Optional[str] = None,
             place: Place = FIRST_HELD) -> Optional[Continue]:
    """The worker ends: its tasks wait again, and it is no loss. Raises NotFound.

    *why* its batch job failed at once, if it did. *place*: see `release`.
    """
    worker = find_own_worker(sql, worker_uuid)
    if worker.state == SIGNED_OFF:
        return None
    sql.takes_long(sql.holds.number(worker.id))
    reached = release(sql, worker.id, lambda _, task: given_up(task), place)
    if reached is not None:
        return Continue((worker_uuid, why, reached))
    worker.state, worker.heard, worker.why = SIGNED_OFF, sql.steady_utc(now.tick), why
    save_worker(sql, worker)
    forget_claim(sql, worker.id)
    sql.after_commit(functools.partial(sql.leases.drop, worker.id))
    return None


def release(sql: Transaction, worker_id: int, rule: Callable[[Run, Task], Task], place: Place) -> Optional[Place]:
    """Take from a worker what it holds from *place* on, while there is time; how far that came, None if to the end.

    Tasks of a run that is being restarted are passed over, and lie behind *place* when the restart is over: so the
    walk begins anew where it has left some. Raises RunBusy when a walk from the beginning finds only such.
    """
    reached = walk_holds(sql, worker_id, place, STARTED, rule)
    if reached is not None:
        return reached
    busy = sql.value("SELECT run FROM task INDEXED BY task_held WHERE worker = ? AND hold <= 2 AND hold <= 4",
                     worker_id)
    if busy is not None and place == FIRST_HELD:
        raise RunBusy(run_of_task(sql, busy).uuid)
    return None if busy is None else FIRST_HELD


def expire(sql: Transaction, now: Now, worker_id: int, place: Place) -> Optional[Place]:
    """The lease of a worker has run out: its tasks wait again; as `release`, whose place and errors these are."""
    reached = release(sql, worker_id, lambda run, task: lapsed(task, run.limits, milliseconds(now.utc)), place)
    if reached is not None:
        return reached
    worker = worker_of_task(sql, worker_id)
    if worker is not None and worker.state == ALIVE:
        heard = sql.leases.heard.get(worker_id)
        worker.state, worker.heard = EXPIRED, worker.heard if heard is None else sql.steady_utc(heard)
        save_worker(sql, worker)
    return None


@operation
def add_user(sql: Transaction, now: Now, name: str, password: str) -> User:
    """A new user with a stored password hash. Raises Conflict when the name is taken."""
    if sql.one("SELECT 1 FROM user WHERE name = ?", name):
        raise Conflict("there is a user %s already: 'python3 taskfarm.py user passwd %s --db FILE' sets another "
                       "password" % (name, name))
    sql.execute("INSERT INTO user (name, password, created) VALUES (?, ?, ?)", (name, password, now.utc))
    audit(sql, now, "user add", name)
    learn_users(sql)
    return find_user(sql, name)


@operation
def set_password(sql: Transaction, now: Now, name: str, password: str) -> User:
    """Another password hash; every token the user had is void. Raises NotFound."""
    end_tokens(sql, "user = ?", find_user(sql, name).id)
    sql.execute("UPDATE user SET password = ?, generation = generation + 1 WHERE name = ?", (password, name))
    audit(sql, now, "user passwd", name)
    learn_users(sql)
    return find_user(sql, name)


@operation
def remove_user(sql: Transaction, now: Now, name: str) -> None:
    """The user is gone, with every token. Raises NotFound."""
    end_tokens(sql, "user = ?", find_user(sql, name).id)
    sql.execute("DELETE FROM user WHERE name = ?", (name,))
    audit(sql, now, "user remove", name)
    learn_users(sql)


@read_operation
def list_users(sql: Transaction, now: Now) -> List[User]:
    """All users, the oldest first."""
    return every_user(sql)


def every_user(sql: Transaction) -> List[User]:
    """All users, the oldest first."""
    return [User(*row) for row in sql.all("SELECT id, name, password, generation FROM user ORDER BY id")]


def find_user(sql: Transaction, name: str) -> User:
    """The user of that name. Raises NotFound."""
    for user in every_user(sql):
        if user.name == name:
            return user
    raise NotFound("there is no user %s: 'python3 taskfarm.py user list --db FILE' shows them" % shortened(name))


def learn_users(sql: Transaction) -> None:
    """Have the users read again into memory, once the transaction is on the disk."""
    users = {user.name: user for user in every_user(sql)}
    sql.after_commit(lambda: setattr(sql, "users", users))


@operation
def keep_certificate(sql: Transaction, now: Now, key: str, certificate: str) -> None:
    """The farm has a key for TLS, and a certificate for it."""
    sql.execute("UPDATE farm SET tls_key = ?, tls_certificate = ?", (key, certificate))


@read_operation
def read_certificate(sql: Transaction, now: Now) -> Tuple[str, str]:
    """Key and certificate for TLS, in PEM. Both are empty before the first start of a server."""
    key, certificate = sql.one("SELECT tls_key, tls_certificate FROM farm")
    return key, certificate


@operation
def note_login(sql: Transaction, now: Now) -> None:
    """The caller has logged in."""
    audit(sql, now, "login")


@operation
def create_token(sql: Transaction, now: Now, user: User, scope: str, run_uuid: Optional[str], label: str,
                 days: Optional[int], made_with: Optional[Token], login_ends: float = 0.0) -> Token:
    """A new token of a user, with no end where *days* is None. It lasts no longer than the login that it is made with.

    *made_with*: the token of that login, if it has one; *login_ends*: seconds since 1970, 0 for never. Raises
    Unauthorized when that token is void by now, NotFound for the run, and as add_token.
    """
    if made_with is not None and not every_token(sql, "WHERE id = ?", made_with.id):
        raise Unauthorized()
    if run_uuid is not None:
        find_run(sql, run_uuid, reading=True)
    ends = [now.utc + days * DAY_S] if days is not None else []
    ends += [login_ends] if login_ends else []
    return add_token(sql, now, user, scope, run_uuid, label, min(ends, default=None))


def add_token(sql: Transaction, now: Now, user: User, scope: str, run_uuid: Optional[str], label: str,
              expires: Optional[float]) -> Token:
    """Write a token; expired ones of the user go. Raises Conflict for one too many, and Unauthorized when the user is
    gone or has another password by now."""
    if not sql.one("SELECT 1 FROM user WHERE id = ? AND generation = ?", user.id, user.generation):
        raise Unauthorized()
    if sql.value("SELECT count(*) FROM token WHERE user = ? AND (expires IS NULL OR expires > ?)",
                 user.id, now.utc) >= MAX_TOKENS:
        raise Conflict("user %s has %d tokens, and nobody may have more: revoke some, 'python3 taskfarm.py token list' "
                       "shows them" % (user.name, MAX_TOKENS))
    end_tokens(sql, "user = ? AND expires <= ?", user.id, now.utc)
    row = (user.id, scope, run_uuid, label, now.utc, expires)
    cursor = sql.execute("INSERT INTO token (%s) VALUES (NULL%s)" % (TOKEN_COLUMNS, ", ?" * len(row)), row)
    token = Token(int(cursor.lastrowid or 0), *row)
    sql.after_commit(functools.partial(sql.tokens.__setitem__, token.id, token))
    audit(sql, now, "token new", "%d of %s, scope %s%s" % (
        token.id, user.name, scope, ", run %s" % run_uuid if run_uuid else ""))
    return token


ACCESS_LABEL = "access file that the server writes"


@read_operation
def access_token(sql: Transaction, now: Now, user: User) -> Token:
    """The user's token for the access file that each start writes: the same one until it is revoked.

    Raises Unavailable when one is to be made and the disk takes no writes, and as add_token.
    """
    for token in every_token(sql, "WHERE user = ? AND label = ? AND scope = 'full' AND expires IS NULL", user.id,
                             ACCESS_LABEL):
        return token
    if sql.trouble:
        raise Unavailable(sql.trouble)
    return add_token(sql, now, user, "full", None, ACCESS_LABEL, None)


@read_operation
def list_tokens(sql: Transaction, now: Now, user_id: Optional[int], limit: int, after: int) -> Page:
    """A page of a user's tokens by id, of all users' for None: (Token, name of its user) of each."""
    sql.takes_long(limit)
    mine, values = ("", ()) if user_id is None else ("user = ? AND ", (user_id,))
    tokens = every_token(sql, "WHERE %s id > ? ORDER BY id LIMIT ?" % mine, *values, after, limit)
    names = {user_id: sql.value("SELECT name FROM user WHERE id = ?", user_id) for user_id in {
        token.user for token in tokens}}
    return Page([(token, names[token.user]) for token in tokens], str(tokens[-1].id) if len(tokens) == limit else None)


@operation
def revoke_token(sql: Transaction, now: Now, user_id: Optional[int], token_id: int) -> None:
    """A token of the user, of any user for None, is void from now on. Raises NotFound."""
    found = every_token(sql, "WHERE id = ?", token_id)
    if not found or user_id not in (None, found[0].user):
        raise NotFound("there is no token %d of yours: 'python3 taskfarm.py token list' or GET /api/tokens shows them"
                       % token_id)
    end_tokens(sql, "id = ?", token_id)
    audit(sql, now, "token revoke", "%d, scope %s" % (token_id, found[0].scope))


def end_tokens(sql: Transaction, which: str, *values: Any) -> None:
    """The tokens that a condition names are void once the transaction is on the disk."""
    gone = sql.all("SELECT id FROM token WHERE " + which, *values)
    sql.execute_many("DELETE FROM token WHERE id = ?", gone)
    sql.after_commit(lambda: [sql.tokens.pop(token_id) for token_id, in gone])


@operation
def probe(sql: Transaction, now: Now) -> None:
    """After a write that failed, write something that means nothing: whether the disk takes it shows at COMMIT."""
    if sql.trouble:
        sql.execute("UPDATE farm SET probes = probes + 1")


@read_operation
def begin_copy(sql: Transaction, now: Now, name: str) -> Copy:
    """Have the writer copy the file, in steps between its batches. Raises Conflict when it does so already."""
    if sql.copy is not None and not sql.copy.ended:
        raise Conflict("a copy is in the making already: try again when it has ended")
    copy = Copy(sql.path + Copy.MARK + name)

    def begin() -> None:
        if sql.copy is None or sql.copy.ended:
            sql.copy = copy
        else:       # two in one batch
            copy.ended = "the copy was not made: another is in the making"
    sql.after_commit(begin)
    return copy


@read_operation
def read_copy(sql: Transaction, now: Now) -> Copy:
    """How far the newest copy is. Raises NotFound when there is none."""
    if sql.copy is None:
        raise NotFound("no copy was begun since this server started")
    return sql.copy


@read_operation
def give_up_copy(sql: Transaction, now: Now, path: str) -> None:
    """Nobody waits for this copy any more."""
    if sql.copy is not None and sql.copy.path == path:
        sql.copy.unwanted = True


def forget_workers(sql: Transaction, now: Now) -> bool:
    """Forget some workers that were not heard for long and hold nothing; True when there may be more.

    Whoever was heard by this server is judged by its ticks, so that no step of the clock forgets a worker.
    """
    silent_since = now.tick - WORKER_MEMORY_S
    gone = [worker_id for worker_id, in sql.all("""
        SELECT id FROM worker INDEXED BY worker_heard
        WHERE heard < ? AND NOT EXISTS (SELECT 1 FROM task INDEXED BY task_held WHERE worker = worker.id AND hold <= 4)
        ORDER BY heard
        LIMIT ?""", sql.steady_utc(silent_since), SLICE)
        if not sql.leases.runs(worker_id, now) and sql.leases.heard.get(worker_id, -math.inf) < silent_since]
    for worker_id in gone:
        forget_claim(sql, worker_id)
        sql.execute("DELETE FROM worker WHERE id = ?", (worker_id,))
        sql.forget_worker(worker_id)
    return len(gone) == SLICE


# `restarted`, or the deletion, for the tasks of a run with ids from :first to :last, by one statement: what it does,
# and to which of them. A test holds it to the rule.
SWEEPS = {
    RESTART: ("""
        UPDATE task
        SET status = 0, failures = 0, losses = 0, hold = CASE WHEN hold <= 2 THEN 5 WHEN hold = 4 THEN 3 ELSE hold END
        WHERE""", """ id BETWEEN :first AND :last AND (status <> 2 OR millionths < 100000000)
            AND NOT (coalesce(hold, 9) <= 2 AND worker IN (SELECT worker FROM spared WHERE run = :run))"""),
    RESTART_ALL: ("""
        UPDATE task
        SET status = 0, millionths = 0, failures = 0, losses = 0, started = NULL, finished = NULL, exit_code = NULL,
            message = NULL, memory = NULL, cpu_ms = NULL, log = NULL, hold = CASE WHEN hold > 5 THEN hold END
        WHERE""", " id BETWEEN :first AND :last"),
    RESTART_FAILED: ("""
        UPDATE task
        SET status = 0, failures = 0, losses = 0, hold = CASE WHEN hold = 4 THEN 3 ELSE hold END
        WHERE""", " id BETWEEN :first AND :last AND status = 3 AND status <> 2"),
    CANCEL: ("""
        UPDATE task
        SET status = CASE WHEN status = 1 THEN 0 ELSE status END, hold = CASE WHEN hold > 5 THEN hold END
        WHERE""", " id BETWEEN :first AND :last AND (status = 1 OR hold <= 5)"),
    DELETE: ("DELETE FROM task WHERE", " id BETWEEN :first AND :last"),
}


class Sweep:
    """The rows of a restarted, cancelled or deleted run follow, a slice at a time.

    The mark in the run's row is written with the run's new figures; it is taken off in the
    transaction of the last slice. A sweep may begin anew after a crash: a slice done twice is
    done once. The place reached is memory only.
    """
    SLICE = 500         # rows between two looks at the clock

    def __init__(self, run: Run) -> None:
        self.run = run                  # as it was marked: never changed, so that nothing need be undone
        self.kind = str(run.sweep)
        self.reached = self.on_disk = run.first_id      # rows with lower ids have followed, and their commit is over

    def settle(self) -> None:
        """The transaction is on the disk."""
        self.on_disk = self.reached

    def roll_back(self) -> None:
        """Go on from what is on the disk."""
        self.reached = self.on_disk

    def step(self, sql: Transaction) -> bool:
        """Do one slice; True when it was the last."""
        run, kind = self.run, self.kind
        if self.reached < run.end_id:
            self.reached = self._rows(sql) + 1
            return False
        if kind == DELETE:
            gone = sql.execute("""
                DELETE FROM untouched
                WHERE last IN (SELECT last FROM untouched WHERE last >= ? AND last < ? LIMIT ?)""",
                               (run.first_id, run.end_id, self.SLICE))
            if gone.rowcount == self.SLICE:
                return False
            sql.execute("DELETE FROM run WHERE id = ?", (run.id,))
            sql.runs_by_id.pop(run.id, None)
        else:
            free = run.snapshot()
            free.sweep = None
            sql.changed[run.id] = sql.keep_run(free)
            sql.execute("DELETE FROM spared WHERE run = ?", (run.id,))
        return True

    def _rows(self, sql: Transaction) -> int:
        """Change the next slice of rows, and give the id of its last."""
        run = self.run
        change_them, which = SWEEPS[self.kind]
        rows = "INDEXED BY task_open WHERE status = 3 AND status <> 2 AND" if self.kind == RESTART_FAILED else "WHERE"
        last = sql.value("SELECT id FROM task " + rows + " id >= ? AND id < ? ORDER BY id LIMIT 1 OFFSET ?",
                         self.reached, run.end_id, self.SLICE - 1) or run.end_id - 1
        values = {"first": self.reached, "last": last, "run": run.id}
        sql.execute(change_them + which, values)
        if self.kind == DELETE:
            sql.execute("DELETE FROM ended WHERE task BETWEEN :first AND :last", values)
        return int(last)


# ---------------------------------------------------------------- FILE
# Whose the file is: its lock, files that are not ours or are damaged, owners and modes, the schema made or brought up
# to date. It must not know what stands in the tables, nor sockets: whether a server still answers is asked in UPKEEP.
# To refuse another kind of file, add a sentence to `refuse_foreign`, which has not touched anything yet. What others
# are told about the server that has the file is the dictionary that SERVICE gives to `Lock.write`.

def prepare(connection: sqlite3.Connection, path: str) -> None:
    """Settings of the connection, and the schema brought up to date in one transaction.

    EXCLUSIVE comes before the first access, so that WAL needs no shared memory, which network
    file systems do not have (https://www.sqlite.org/wal.html#noshm).
    """
    for setting in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL",
                    "temp_store = MEMORY", "cache_size = -32000"):
        connection.execute("PRAGMA " + setting)
    (wrong,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    keep_database_private(path)     # again: only now has SQLite opened the log, by its name, and nothing is in it yet
    if wrong != "ok":
        raise Refusal("%s is damaged (%s): restore it from a backup, or save what can be read by sqlite3 .recover"
                      % (path, wrong.replace("\n", " ")))
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == len(SCHEMA):
        return
    connection.execute("BEGIN IMMEDIATE")
    for script in SCHEMA[version:]:
        for statement in statements(script):
            connection.execute(statement)
    if version == 0:
        connection.execute("PRAGMA application_id = %d" % APPLICATION_ID)
        connection.execute(
            "INSERT INTO farm (id, identity, signing_key, next_task_id) VALUES (1, ?, ?, 1)",
            (secrets.token_hex(16), secrets.token_bytes(32)))
    connection.execute("PRAGMA user_version = %d" % len(SCHEMA))
    connection.execute("COMMIT")


def make_file(path: str) -> bool:
    """Make an empty database file, mode 0600; False when there is a file already. Raises Refusal.

    O_EXCL tells for certain whose work the file is: os.path.exists says False of a file that is there, where a
    network file system fails (ESTALE, EIO) and for a link that leads nowhere.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        return False
    except OSError as error:
        raise Refusal("%s cannot be made: %s" % (path, error.strerror))
    return True


def remove_if_there(path: str) -> None:
    """Remove a file that may have gone already."""
    with contextlib.suppress(OSError):
        os.remove(path)


def remove_database(path: str) -> None:
    """Remove a database that this process has made, and its write-ahead log."""
    remove_if_there(path)
    remove_if_there(path + "-wal")


def sync_folder(path: str) -> None:
    """Have the name of a file on the disk: fsync of the file alone keeps its content, which a crash may leave nameless.

    A folder that one may write to and not read cannot be synced. Raises OSError.
    """
    with contextlib.suppress(PermissionError):
        descriptor = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def owners_of(path: str) -> Set[int]:
    """Who may own the files of a database: us. root may keep the farm of another user: then its owner too."""
    owners = {os.geteuid()}
    with contextlib.suppress(OSError):
        owners |= {os.stat(path).st_uid} if os.geteuid() == 0 else set()
    return owners


def keep_private(file: Union[int, str], name: str, owners: Set[int]) -> None:
    """Have a file that holds secrets closed to others, and say so. *file*: its descriptor, or its name.

    Raises Refusal for a link, for another's file, and where the mode stays as it is. Raises OSError.
    """
    status = os.stat(file) if isinstance(file, int) else os.lstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise Refusal("%s is not a plain file: remove it" % name)
    if status.st_uid not in owners:
        owner = user_name(status.st_uid)
        raise Refusal("%s belongs to user %s, who can read and change what is in it: run this as %s, or have a copy of "
                      "your own" % (name, owner, owner))
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        with contextlib.suppress(OSError):
            os.chmod(file, 0o600)
        if os.stat(file).st_mode & 0o077:
            raise Refusal("%s can be opened by others (mode %03o), and its mode cannot be changed: put it on a file "
                          "system with modes" % (name, mode))
        log.warning("%s could be opened by others (mode %03o): it is closed to them now", name, mode)


def keep_database_private(path: str) -> None:
    """Have the files of a database closed to others: they hold password hashes and the key of all tokens.

    A journal that somebody else has laid beside the database would be read into it. Raises Refusal.
    """
    for name in (path, path + "-wal", path + "-journal"):
        with contextlib.suppress(FileNotFoundError):
            keep_private(name, name, owners_of(path))


def refuse_link(path: str, owners: Set[int]) -> None:
    """Raise Refusal for a link that another user has laid."""
    if os.path.islink(path) and os.lstat(path).st_uid not in owners | {0}:
        raise Refusal("%s is a link of user %s: name the file itself" % (path, user_name(os.lstat(path).st_uid)))


def user_name(uid: int) -> str:
    """The name of a user; the number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def statements(script: str) -> Iterator[str]:
    """The statements of a script one by one: executescript would commit before the first."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def refuse_foreign(path: str) -> None:
    """Raise Refusal for a file that this program must not open; touches nothing.

    Reads the 100 bytes that begin an SQLite file (https://www.sqlite.org/fileformat2.html#the_database_header),
    from the write-ahead log where a newer copy of them lies there.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise Refusal("%s is not a file: --db wants a file that taskfarm made, or a name that is free" % path)
    try:
        with open(path, "rb") as file:
            head = file.read(100)
            size = file.seek(0, os.SEEK_END)
    except FileNotFoundError:
        return
    except OSError as error:
        raise Refusal("%s cannot be read: %s" % (path, error.strerror))
    if not os.access(path, os.W_OK):
        raise Refusal("%s cannot be written: its mode and owner, or a file system mounted read-only, forbid it" % path)
    if size and (size < 512 or not head.startswith(b"SQLite format 3\0")):
        raise Refusal("%s is not an SQLite file: --db wants a file that taskfarm made, or a name that is free" % path)
    newest = first_page_in_log(path + "-wal") or head
    if not newest:
        return
    page_size = struct.unpack(">H", newest[16:18])[0]
    pages, schema_cookie, version, application = (struct.unpack(">I", newest[at:at + 4])[0] for at in (28, 40, 60, 68))
    if application != APPLICATION_ID and schema_cookie:
        raise Refusal("%s belongs to another program: --db wants a file that taskfarm made, or a name that is free"
                      % path)
    if version > len(SCHEMA):
        raise Refusal("%s was written by a newer taskfarm (its schema is %d, this program's %d): use that one"
                      % (path, version, len(SCHEMA)))
    if newest is head and size < pages * (65536 if page_size == 1 else page_size):
        raise Refusal("%s is cut off: it has %d bytes and should have %d pages; restore it from a backup"
                      % (path, size, pages))


def first_page_in_log(path: str) -> bytes:
    """The newest first page that a write-ahead log has committed, or nothing.

    Frames of the present log carry the salts of its header (https://www.sqlite.org/fileformat2.html#the_write_ahead_log).
    """
    newest = candidate = b""
    if not os.path.isfile(path):        # what is no file may never end
        return newest
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(32)
            page_size = struct.unpack(">I", head[8:12])[0] if len(head) == 32 else 0
            while page_size:
                frame = file.read(24)
                if frame[8:16] != head[16:24] or file.tell() + page_size > size:     # of an earlier log, or torn
                    break
                number, committed = struct.unpack(">II", frame[:8])
                page = file.read(100)
                file.seek(page_size - len(page), os.SEEK_CUR)
                candidate = page if number == 1 else candidate
                newest = candidate if committed else newest
    except OSError:
        pass
    return newest


class InUse(Refusal):
    """Another process has the file."""


class Lock:
    """The locked file beside the database: which server has it, and a secret for those who may read the lock file.

    *path*: the database. `left`: what the last server wrote, if it did not end cleanly; else empty. Raises InUse
    when another process has the lock. Raises Refusal when the lock file belongs to another user, or when the file
    system has no locks that work.
    """
    SIZE = 4096     # bytes. It is written in place and never made shorter, so it has its block when the disk is full

    def __init__(self, path: str) -> None:
        self.path = lock_path(path)
        self.written = False
        self.file = open_lock_file(path)
        try:
            was_open = stat.S_IMODE(os.fstat(self.file).st_mode) & 0o077
            if was_open:
                os.fchmod(self.file, 0o600)
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self.file)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                if was_open:
                    log.warning("%s could be read by others, and now by its owner alone: start the server again, so "
                                "that it has another secret", self.path)
                raise InUse("%s is in use: %s" % (path, described(read_holder(path))))
            if error.errno in (errno.EPERM, errno.EROFS):
                raise Refusal("%s can be read by others, and its mode cannot be changed (%s): chmod 600 %s" % (
                    self.path, error.strerror, self.path))
            raise Refusal("the file system of %s has no locks that work (%s), and without them two servers could "
                          "ruin the file: put it on another (on Lustre, one mounted with -o flock)"
                          % (path, error.strerror))
        self.left = read_holder(path)

    def write(self, holder: Dict[str, Any]) -> None:
        """Tell others which server has the file. Raises OSError, and then the lock file tells nothing."""
        self.written = True
        try:
            self._write(json.dumps(holder).encode())
            os.fsync(self.file)     # NFS tells only here that the disk is full, and other machines see it from here on
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self.file, 0)      # neither a half, nor what an earlier server wrote
            raise

    def _write(self, content: bytes) -> None:
        content = content.ljust(self.SIZE)
        if os.pwrite(self.file, content, 0) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(self.file, len(content))

    def close(self) -> None:
        """Let go, and take back what `write` told; what others wrote stays.

        The file stays: to remove it would let two processes lock two files of one name.
        """
        if self.written:
            try:
                self._write(b"")
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self.file, 0)
        os.close(self.file)


def open_lock_file(path: str) -> int:
    """Open the lock file of a database, made 0600 where there is none. Raises Refusal.

    A secret is written into it, so it must belong to who runs this, or to owners_of the database.
    """
    name, own = lock_path(path), owners_of(path)
    flags = os.O_RDWR | os.O_NOFOLLOW       # a service whose users root keeps could have laid a link to any file
    refuse_link(path, own)
    try:
        file = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    except OSError as error:
        raise Refusal("%s cannot be made: %s" % (name, error.strerror))
    else:       # ours, whatever owner the file system shows; where root made it, that of the database must reach it too
        for owner in own - {os.geteuid()}:
            with contextlib.suppress(OSError):
                os.fchown(file, owner, -1)
        return file
    try:
        there = os.lstat(name)
        if stat.S_ISREG(there.st_mode) and there.st_uid not in own:
            owner_name = user_name(there.st_uid)
            raise Refusal("%s belongs to user %s, who could read the secret in it: run this as %s, or remove it when "
                          "no server has %s open" % (name, owner_name, owner_name, path))
        file = os.open(name, flags)
        if not os.path.samestat(there, os.fstat(file)) or not stat.S_ISREG(there.st_mode):
            os.close(file)
            raise Refusal("%s is not a plain file: remove it" % name)
    except OSError as error:
        raise Refusal("%s cannot be opened: %s" % (name, error.strerror))
    return file


def lock_path(path: str) -> str:
    """Where the lock of a database lies, whichever of its names is used."""
    return os.path.realpath(path) + ".lock"


def read_holder(path: str) -> Dict[str, Any]:
    """What the server that has the file wrote, as SERVICE made it; empty when it ended cleanly, or wrote nothing."""
    try:
        with open(lock_path(path), encoding="utf-8") as file:
            holder = json.load(file)
        return holder if isinstance(holder, dict) else {}
    except (OSError, ValueError):
        return {}


def described(holder: Dict[str, Any]) -> str:
    """Which server has the file, in words."""
    if not holder:
        return ("another process has it open and has not said which: it is starting, or is a verb like 'check', or "
                "found the disk full")
    return "process %s on %s serves it at %s" % (holder.get("pid"), holder.get("host"), holder.get("url"))


# ---------------------------------------------------------------- WRITER
# One process owns the file, one connection is open on it, one thread (the writer) uses it. It runs the operations
# that are waiting in one transaction, and answers after COMMIT. A transaction is bounded in time: what takes long is
# run a slice at a time, each in its turn, and others come between.
#
# Something to be done with no request: a function (sql, now) -> whether there is more, among those of `turn`.

BATCH_S = 0.02          # operations that are waiting run so long in one transaction ...
SLICE_S = 0.01          # ... those that take long so long after them, and what is done with no request after that


def disk_trouble(error: BaseException) -> Optional[str]:
    """A sentence when an error of SQLite means that the disk does not take a write, else None.

    Codes: https://www.sqlite.org/rescode.html. A quota (EDQUOT) and a file size limit (EFBIG) come
    as SQLITE_FULL or SQLITE_IOERR. Python 3.9 and 3.10 give the text alone.
    """
    text = str(error)
    if isinstance(error, sqlite3.OperationalError) and any(part in text for part in (
            "is full", "disk I/O error", "readonly database", "unable to open database", "out of memory")):
        return "the server's disk does not take a write just now (%s)" % text
    return None


Outcomes = List[Tuple[Operation, Any]]      # operations that have ended, with their results or errors


def not_taken(named: Operation, why: str) -> Tuple[Operation, Exception]:
    """An operation that is refused, and what its client is told."""
    return named, Unavailable("%s: %s" % ("only a part was done, so send it all again" if named.begun else
                                          "nothing was changed", why))


class Store:
    """The file, and the one connection to it.

    *path*: the database file, made when it is not there. *clock*: gives a Now. *stopwatch*: seconds that pass for
    the writer itself, by which it knows that it was stopped.
    Until `start` the methods are for one thread; from then on others use `submit` and `call`.
    Raises Refusal when the file is not ours to open; nothing has been touched then.
    """
    def __init__(self, path: str, clock: Callable[[], Now] = system_clock,
                 stopwatch: Callable[[], float] = time.monotonic) -> None:
        self.path = path = os.path.realpath(path)       # SQLite keeps the log beside the file, not beside a link to it
        self.clock = clock
        self.stopwatch = stopwatch
        self.short: "deque[Operation]" = deque()        # wait for the next transaction
        self.large: "deque[Operation]" = deque()        # take long: each has a slice in its turn
        self.parked: Dict[str, List[Operation]] = {}    # wait for the sweep of a run, by its uuid
        self.parking = True                             # else nothing is to wait: the server stops
        self.expired_to: Dict[int, Tuple[float, Place]] = {}    # of workers: an end of their lease, and how far they
                                                                # have lost their tasks since
        self.refused: Outcomes = []                     # waited in vain
        self.try_again = 0.0                            # the tick of the next write, after one that failed
        self.chore_at = 0.0                             # the tick of the next look for workers to forget
        self.unsaved_starts = 0                         # the number of this start, where a full disk did not take it
        self.failed: Dict[Tuple[str, str], Tuple[float, int]] = {}  # logins that failed and are not written down yet,
                                                                    # by user and address: time of the last, number
        self.failed_at = -math.inf                      # the tick from which they may be
        self.counting = threading.Lock()                # of them
        self.heard_until = 0.0                          # requests that came by that tick have all been run
        self.awake = stopwatch()                        # when the writer last took operations in
        self.disk_s = 0.0                               # waited for the disk since: a slow one is no stop
        self.queue: "queue.SimpleQueue[Optional[List[Operation]]]" = queue.SimpleQueue()
        self.stopping = False
        self.at_work = threading.Lock()                 # held from BEGIN to COMMIT
        self.writer: Optional[threading.Thread] = None
        refuse_foreign(path)
        keep_database_private(path)
        for name in glob.glob(glob.escape(path) + Copy.MARK + "*"):
            remove_if_there(name)
        self.made = make_file(path)
        self.connection = sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False,
                                          cached_statements=500)
        try:
            prepare(self.connection, path)
            self.sql = Transaction(self.connection, path, clock)
            self.identity, self.signing_key = self.sql.one("SELECT identity, signing_key FROM farm")
            learn_users(self.sql)
            self.sql.settle()
            self.sql.tokens.update((token.id, token) for token in every_token(self.sql))
            self._begin_leases()
            self.sql.holds = count_holds(self.sql)
            self.sql.claim_keys = dict(self.sql.all("SELECT key, worker FROM last_claim"))
            self.sweeps = deque(Sweep(Run(row)) for row in self.sql.all(
                "SELECT " + Run.COLUMNS + " FROM run WHERE sweep IS NOT NULL ORDER BY id"))
        except (sqlite3.Error, Refusal) as error:
            self.connection.close()
            if self.made:
                remove_database(path)
            raise error if isinstance(error, Refusal) else Refusal("%s cannot be opened: %s" % (
                path, "another program has it open, end that first" if "locked" in str(error) else error))

    def _begin_leases(self) -> None:
        """Each worker with a lease has a whole one from here on."""
        starts = self.sql.value("SELECT starts FROM farm") + 1
        try:
            self.sql.execute("UPDATE farm SET starts = ?", (starts,))
        except sqlite3.Error as error:      # a disk that is full should not keep a farm from being looked at
            self.sql.trouble = disk_trouble(error)
            if self.sql.trouble is None:
                raise
            self.unsaved_starts = starts
        self.sql.opened = now = self.clock()
        self.sql.leases = Leases(starts)
        for worker_id, lease in self.sql.all("""
                SELECT id, lease
                FROM worker INDEXED BY worker_living
                WHERE state = 0 AND lease IS NOT NULL"""):
            self.sql.leases.begin(worker_id, lease, now.tick)
        self.chore_at = now.tick + FORGET_CHECK_S  # who is still there has been heard by then, whatever the clock says

    @property
    def users(self) -> Dict[str, User]:
        """Users by name, as they are on the disk; for any thread."""
        return self.sql.users

    @property
    def tokens(self) -> Dict[int, Token]:
        """Tokens by id, as they are on the disk; for any thread, to look single ones up."""
        return self.sql.tokens

    def submit(self, batch: List[Operation]) -> None:
        """Hand operations to the writer; the `done` of each is called after COMMIT. For any thread."""
        tick = self.clock().tick
        for named in batch:
            named.came = named.came or tick
        self.queue.put(batch)

    def wait_for_commit(self, seconds: float) -> None:
        """Wait for the end of the present transaction, so long at most. For a thread that computes without pause.

        SQLite lets other threads run at each row, and a writer beside such a one waits 5 ms for each, until
        the interpreter is its own again.
        """
        if self.at_work.acquire(timeout=seconds):
            self.at_work.release()

    def note_failed(self, name: str, address: str, utc: float) -> None:
        """Have a failed login written down, once for many: a flood costs some lines a minute. For any thread.

        A name that is no user's is not: it may be a password that was typed in the wrong place.
        """
        key = name if name in self.users else "", address
        with self.counting:
            first = not self.failed
            if key not in self.failed and len(self.failed) >= FAILED_LINES:
                key = "", ""
            self.failed[key] = utc, self.failed.get(key, (utc, 0))[1] + 1
        if first:
            self.queue.put([])      # the writer waits no longer than it may be

    def refuse_parked(self) -> None:
        """Answer what waits for a restart, now and from here on: the server stops. For any thread."""
        self.parking = False
        self.queue.put([])

    def call(self, named: Operation) -> Any:
        """Have one operation run, wait for its result and return it. Raises what it raises."""
        outcome, = self.call_all([named])
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def call_all(self, operations: List[Operation]) -> List[Any]:
        """Have operations run, wait for them all, and give the result of each, or the error it ended in."""
        ended: Dict[Operation, Any] = {}
        if self.writer is None:
            ended.update(self.apply(operations))
            wanted = set(operations)
            while not ended.keys() >= wanted:
                self.turn()
                ended.update(self.apply([]))
        else:
            answers: "queue.SimpleQueue[Tuple[Operation, Any]]" = queue.SimpleQueue()
            for named in operations:
                named.done = lambda named, outcome: answers.put((named, outcome))
            self.submit(operations)
            ended.update(answers.get() for _ in operations)
        return [ended[named] for named in operations]

    def start(self) -> None:
        """Start the writer thread."""
        writer = threading.Thread(target=self._write, name="writer", daemon=True)
        writer.start()      # where the system refuses another thread, there is none to be joined
        self.writer = writer

    def _write(self) -> None:
        while not self.stopping or self.short or self.large or self.refused:
            self._round(None)
            if self.sql.copy and not self.sql.copy.begun:
                self.copy(self.sql.copy, lambda: self._round(0.0))

    def _round(self, patience_s: Optional[float]) -> None:
        """Take in what waits, run one transaction of it, answer, and do what is due with no request."""
        self._take_in(patience_s)
        for named, outcome in self.apply([]):
            try:
                if named.done:
                    named.done(named, outcome)
            except Exception:       # whoever is told may fail, and the writer must not end with it
                log.exception("an answer could not be given")
        self.turn(self.heard_until)

    def _take_in(self, patience_s: Optional[float]) -> None:
        """Take in all operations that were submitted; wait for one if there is nothing to do, or patience ends."""
        if self.short or self.large or self.refused:
            patience_s = 0.0
        elif patience_s is None:
            patience_s = self._idle_s()
        began = self.stopwatch()
        try:
            batch = next_from(self.queue, patience_s)
            while batch is not None:
                self.short += batch
                batch = self.queue.get_nowait()
            self.stopping = True
        except queue.Empty:
            pass
        # What came before the oldest that still waits has been run: a heartbeat among it has renewed its lease.
        self.heard_until = self.short[0].came if self.short else self.clock().tick
        self._notice_stop(began, patience_s)

    def _notice_stop(self, began: float, patience_s: Optional[float]) -> None:
        """Renew every lease after the process was stopped, or waited for the disk, and could hear nobody.

        No round of the writer takes STOPPED_S, nor is it woken so late, unless the process does not run.
        """
        woken = self.stopwatch()
        late_s = 0.0 if patience_s is None else woken - began - patience_s
        if max(late_s, began - self.awake - self.disk_s) > STOPPED_S or self.disk_s > CLOCK_CHECK_S:
            self.sql.leases.renew_all(self.clock().tick)
        self.awake, self.disk_s = woken, 0.0

    def _idle_s(self) -> Optional[float]:
        """How long the writer may wait for requests; None for ever."""
        now, wait = self.clock().tick, math.inf
        if self.sweeps:     # the mark of a sweep is on the disk: go on at once
            wait = 0.0
        elif self.sql.leases.next_end() < math.inf:
            wait = min(CLOCK_CHECK_S, max(0.0, self.sql.leases.next_end() - now))
        if self.failed:
            wait = min(wait, max(0.0, self.failed_at - now))
        return None if wait == math.inf else max(wait, self.try_again - now, 0.0)

    def copy(self, copy: Copy, between: Callable[[], None]) -> None:
        """Make a consistent copy of the file in steps, calling *between* after each; a part of one is removed.

        What changes meanwhile goes into the copy too (https://www.sqlite.org/backup.html: the same
        connection writes), so it is the file as it is when the copy ends.
        """
        copy.begun = True
        part, descriptor = copy.path + ".part", -1

        def step(status: int, remaining: int, total: int) -> None:
            copy.copied, copy.total = total - remaining, total
            if copy.copied // Copy.SYNC != (copy.copied - Copy.STEP) // Copy.SYNC:
                os.fsync(descriptor)
            between()
            if self.stopping or copy.unwanted:
                raise Stopped("the server was stopped meanwhile" if self.stopping else "nobody waits for it any more")
        try:
            descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
            with contextlib.closing(sqlite3.connect(part, isolation_level=None)) as target:
                target.execute("PRAGMA synchronous = OFF")      # we do it ourselves
                target.execute("PRAGMA journal_mode = OFF")
                self.connection.backup(target, pages=Copy.STEP, progress=step)
            os.fsync(descriptor)
            os.rename(part, copy.path)
            copy.ended = Copy.DONE
        except Exception as error:
            remove_if_there(part)
            copy.ended = "the copy was not made: %s" % error
            log.error("%s: %s", copy.path, copy.ended)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def close(self) -> None:
        """Run what was submitted, end the writer and close the file."""
        if self.writer is not None:
            self.queue.put(None)
            self.writer.join()
            self.writer = None
        if self.failed:
            self._work_on(deque([self._note_failed]))
        self.connection.close()

    def apply(self, batch: List[Operation]) -> Outcomes:
        """Run operations in one transaction; gives (operation, outcome) for those that have ended, all on the disk.

        What there is no time for waits for the next. A disk that does not take the writes: they end in
        Unavailable, and the reads are run all the same. Another error: everything is rolled back and run
        again one by one, so that only its cause suffers.
        """
        self.short += batch
        if not self.parking:
            self._unpark()
        refused, self.refused = self.refused, []
        if not (self.short or self.large):
            return refused
        taken: List[Operation] = []
        if self.sql.trouble and (self._copying() or self.clock().tick < self.try_again):
            # Each write that is rolled back drops what memory knows of rows, and makes SQLite begin a copy anew.
            taken += [*self.short, *self.large]
            self.short.clear()
            self.large.clear()
            return refused + self._only_read(taken, self.sql.trouble)
        try:
            return refused + self._transact(self._next(taken))
        except Exception as error:
            trouble = disk_trouble(error)
            if trouble is None and len(taken) > 1:
                return refused + self._one_by_one(taken)
            if trouble is None:     # where BEGIN itself fails, nothing was taken
                return refused + [(named, error) for named in taken or [(self.short or self.large).popleft()]]
        self._note_trouble(trouble)
        return refused + self._only_read(taken, trouble)

    def _next(self, taken: List[Operation]) -> Iterator[Operation]:
        """The operations of one transaction, noted in *taken*: short ones, then a slice of those that take long."""
        sql = self.sql
        sql.begin_slice(BATCH_S, large=False)
        while self.short:
            named = self.short.popleft()
            if named.unwanted:
                continue
            taken.append(named)
            yield named
            if named.large:         # it turned out to take long, and has done nothing: its turn comes below
                taken.pop()
            if len(taken) % 8 == 0 and sql.over():
                break
        if self.large:
            sql.begin_slice(SLICE_S, large=True)
            for _ in range(len(self.large)):
                named = self.large.popleft()
                if named.unwanted and not named.begun:
                    continue
                taken.append(named)
                yield named
                if sql.over():
                    break

    def _one_by_one(self, taken: List[Operation]) -> Outcomes:
        """Run operations again, each in a transaction of its own."""
        ended: Outcomes = []
        for at, named in enumerate(taken):
            self.sql.begin_slice(SLICE_S, large=named.large)
            try:
                ended += self._transact([named])
            except Exception as error:
                trouble = disk_trouble(error)
                if trouble:
                    self._note_trouble(trouble)
                    return ended + self._only_read(taken[at:], trouble)
                ended.append((named, error))
        return ended

    def _only_read(self, batch: List[Operation], trouble: str) -> Outcomes:
        """Refuse what writes, and run the rest."""
        reads = [named for named in batch if named.reads]
        refused = [not_taken(named, trouble) for named in batch if not named.reads]
        self.sql.begin_slice(SLICE_S, large=True)
        try:
            return refused + (self._transact(reads, "BEGIN") if reads else [])
        except Exception as error:      # a disk that cannot be read either
            failed: Exception = Unavailable(trouble) if disk_trouble(error) else error
            return refused + [(named, failed) for named in reads]

    def _note_trouble(self, trouble: str) -> None:
        """Say once that the disk takes no writes, and try none for a moment."""
        if not self.sql.trouble:
            log.error("%s; reading goes on, and writing resumes by itself", trouble)
        self.sql.trouble = trouble
        self.try_again = self.clock().tick + RETRY_S

    def _transact(self, batch: Iterable[Operation], begin: str = "BEGIN IMMEDIATE") -> Outcomes:
        ended: Outcomes = []
        parked: List[Tuple[str, Operation]] = []
        self.sql.heard_worker = None
        unfinished: List[Tuple[Operation, Continue]] = []
        with self._transaction(begin) as (sql, now):
            for named in batch:
                sql.caller = named.caller
                try:
                    outcome = named.function(sql, now, *named.args)
                    if type(outcome) is Continue:
                        unfinished.append((named, outcome))
                    else:
                        ended.append((named, outcome))
                except FarmError as refusal:
                    ended.append((named, refusal))
                except RunBusy as busy:
                    parked.append((busy.args[0], named))
                except TakesLong:
                    named.large = True
                    self.large.append(named)
                if sql.heard_worker is not None:
                    named.worker, sql.heard_worker = sql.heard_worker, None
        for named, rest in unfinished:
            named.args, named.begun, named.large = rest.args, True, True
            self.large.append(named)
        for run_uuid, named in parked:
            self.parked.setdefault(run_uuid, []).append(named)
        if self.parked:
            self._unpark()
        return ended

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[Tuple[Transaction, Now]]:
        """BEGIN to COMMIT; what changed in memory takes place after it, or is dropped with the transaction."""
        with self.at_work:
            sql, changes, sweeps = self.sql, self.connection.total_changes, list(self.sweeps)
            sql.execute(begin)
            sql.caller = ADMINISTRATION
            try:
                yield sql, self.clock()
                sql.flush()
                began = self.stopwatch()
                sql.execute("COMMIT")
                self.disk_s += self.stopwatch() - began
            except BaseException:
                sql.roll_back()
                self.sweeps = deque(sweeps)
                for sweep in sweeps:
                    sweep.roll_back()
                if self.connection.in_transaction:      # a full disk has ended it already
                    sql.execute("ROLLBACK")
                raise
            self.sweeps += [Sweep(run) for run in sql.begun]
            sql.settle()
            if sql.trouble and self.connection.total_changes != changes:
                sql.trouble = None
                sql.leases.renew_all(self.clock().tick)     # requests that were refused have renewed none
                log.error("the disk takes writes again")

    def _copying(self) -> bool:
        return self.sql.copy is not None and self.sql.copy.begun and not self.sql.copy.ended

    def turn(self, tick: Optional[float] = None) -> None:
        """What is done with no request, for SLICE_S at most: leases that ended by *tick*, by now if None; rows of
        restarts and deletions, of each run in its turn; a look for workers to forget; logins that failed."""
        now = self.clock()
        if now.tick < self.try_again or self.sql.trouble and self._copying():
            return
        until = now.tick if tick is None else tick
        jobs: "deque[Callable[[Transaction, Now], bool]]" = deque()
        if self.sql.leases.next_end() <= until:
            jobs.append(lambda sql, now: self._expire(sql, now, until))
        if self.sweeps:
            jobs.append(self._sweep)
        if now.tick >= self.chore_at:
            jobs.append(self._forget_workers)
        if self.unsaved_starts and not self.sql.trouble:
            jobs.append(self._save_starts)
        if self.failed and now.tick >= self.failed_at:
            jobs.append(self._note_failed)
        if jobs:
            self._work_on(jobs)

    def _work_on(self, jobs: "deque[Callable[[Transaction, Now], bool]]") -> None:
        """Do a slice of each job in turn, in one transaction; a job says whether there is more."""
        try:
            with self._transaction("BEGIN IMMEDIATE") as (sql, now):
                sql.begin_slice(SLICE_S, large=True)
                while jobs:
                    job = jobs.popleft()
                    if job(sql, now):
                        jobs.append(job)
                    if sql.over():
                        break
        except Exception as error:
            trouble = disk_trouble(error)
            if trouble:
                self._note_trouble(trouble)
            else:
                self.try_again = self.clock().tick + RETRY_S
                log.exception("the tasks of a restart, a deletion or a worker who is gone cannot be changed; tried "
                              "again every %d s: stop the server and run 'check'", RETRY_S)
        if self.parked:
            self._unpark()

    def _sweep(self, sql: Transaction, now: Now) -> bool:
        """A slice of the rows that are to follow, of each run in its turn; True when there are more."""
        sweep = self.sweeps.popleft()
        if not sweep.step(sql):
            self.sweeps.append(sweep)
        sql.after_commit(sweep.settle)
        return bool(self.sweeps)

    def _expire(self, sql: Transaction, now: Now, tick: float) -> bool:
        """The tasks of a worker whose lease had ended by *tick*, while there is time; True when there are more."""
        leases = sql.leases
        worker_id = leases.run_out(tick)
        if worker_id is None:
            return False
        if worker_id in self._waiting_workers():
            leases.begin(worker_id, leases.spans[worker_id], now.tick)
            return True
        end = leases.ends[worker_id]
        leases.postpone(worker_id, now.tick + RETRY_S)      # and tried again then, if this transaction fails
        begun, place = self.expired_to.get(worker_id, (end, FIRST_HELD))
        place = place if begun == end else FIRST_HELD
        try:
            reached = expire(sql, now, worker_id, place)
        except RunBusy:     # what a restart that has begun does with the rest is decided already
            return True
        if reached is None:
            sql.after_commit(functools.partial(leases.drop, worker_id))
            sql.after_commit(functools.partial(self.expired_to.pop, worker_id, None))
        else:
            if reached > place:     # else it begins anew, beside a restart that may go on for long
                leases.postpone(worker_id, end)
            sql.after_commit(functools.partial(self.expired_to.__setitem__, worker_id, (end, reached)))
        return True

    def _waiting_workers(self) -> Set[Optional[int]]:
        """The workers with a request that waits for its turn or for a restart: they cannot be silent."""
        return {named.worker for waiting in (self.large, *self.parked.values()) for named in waiting}

    def _forget_workers(self, sql: Transaction, now: Now) -> bool:
        """Forget some workers; True when there may be more."""
        more = forget_workers(sql, now)
        if not more:
            self.chore_at = now.tick + FORGET_CHECK_S
        return more

    def _save_starts(self, sql: Transaction, now: Now) -> bool:
        """Write the number of this start: revisions of the next one are to be above those of this one."""
        sql.execute("UPDATE farm SET starts = ?", (self.unsaved_starts,))
        sql.after_commit(lambda: setattr(self, "unsaved_starts", 0))
        return False

    def _note_failed(self, sql: Transaction, now: Now) -> bool:
        """Write down the logins that failed; more of them only after FAILED_S."""
        with self.counting:
            failed = dict(self.failed)
        for (name, address), (utc, number) in failed.items():
            audit(sql, Now(utc, now.tick), "login failed", times=number, caller=Caller(0, name, address))

        def noted() -> None:
            with self.counting:
                self.failed = {key: (utc, number - failed.get(key, (utc, 0))[1])
                               for key, (utc, number) in self.failed.items() if number > failed.get(key, (utc, 0))[1]}
            self.failed_at = now.tick + FAILED_S
        sql.after_commit(noted)
        return False

    def _unpark(self) -> None:
        """Run those again that wait for a run whose sweep has ended; refuse those whose sweep cannot go on."""
        swept = {sweep.run.uuid for sweep in self.sweeps}
        stuck = self.clock().tick < self.try_again
        for run_uuid in list(self.parked):
            if not self.parking or run_uuid in swept and stuck:
                why = "the server is stopping" if not self.parking else self.sql.trouble or (
                    "this run is being restarted, and its tasks cannot be changed: the server's log says why")
                self.refused += [not_taken(named, why) for named in self.parked.pop(run_uuid)]
            elif run_uuid not in swept:
                for named in self.parked.pop(run_uuid):
                    (self.large if named.large else self.short).append(named)



# ---------------------------------------------------------------- LOGIN
# Password hashes, signed tokens, and who a request comes from. Knows no SQL and no sockets.
#
# Anybody may send anything here, so before a login is accepted all work and all memory is bounded: a password is
# not looked at beyond PASSWORD_LIMIT bytes, who was wrong too often is refused before a hash is made, and what is
# remembered is small and counted. Another way to log in: read it in read_authorization, judge it in Logins._verify,
# and count what is wrong in Logins._wrong.

PASSWORD_LIMIT = 1000               # bytes of a password: normalizing 12 kB of combining characters took 109 ms
NAME_LIMIT = 256                    # and of a name: 64 characters

TOKEN_MARK = "tf1."
# How tokens, and no user's name and password, begin in a header: dGYxL and one of g to v is tf1. in base64.
TOKEN_SHOWN = re.compile(rb"(?:Bearer tf1\.|Basic dGYxL[g-v])")
SCRYPT = {"n": 2 ** 14, "r": 8, "p": 1}     # 16 MiB and some 50 ms
PBKDF2_ROUNDS = 600000


class Login(NamedTuple):
    """Who asks."""
    user: Optional[User]        # None: a local verb that has read the lock file
    expires: float              # seconds since 1970, of the token that was shown; 0: never, or a password
    token: Optional[Token] = None       # that was shown; None: a session, or a password

    @property
    def name(self) -> str:
        """For the log."""
        return self.user.name if self.user else "-"


class NeedsHash(Exception):
    """A password has to be hashed, which takes some 50 ms.

    Call *work* in another thread, once for all requests with the same *key*, and ask again.
    """

    def __init__(self, key: bytes, work: Callable[[], None]) -> None:
        super().__init__()
        self.key = key
        self.work = work


def normal(text: str) -> str:
    """A name or password as it is compared: NFC, as RFC 8265 wants it."""
    return unicodedata.normalize("NFC", text)


def check_name(name: str) -> str:
    """A user name that will do, normalized. Raises BadRequest."""
    name = normal(name)
    if not 1 <= len(name) <= 64 or not name.isprintable() or name != name.strip() or ":" in name or "/" in name:
        raise BadRequest("a user name has 1 to 64 printable characters, no colon, no slash and no space at its ends")
    if name.startswith(TOKEN_MARK):
        raise BadRequest("a user name cannot begin with %s: tokens do" % TOKEN_MARK)
    return name


def hash_password(password: str, algorithm: str = "scrypt") -> str:
    """A password as it is stored: algorithm, parameters, salt and hash, with $ between.

    scrypt (RFC 7914), or PBKDF2 (RFC 8018) where the system's OpenSSL lacks or forbids it.
    Raises BadRequest for a password that is too long to log in with.
    """
    if len(password.encode("utf-8", "surrogatepass")) > PASSWORD_LIMIT:
        raise BadRequest("a password has at most %d bytes" % PASSWORD_LIMIT)
    salt = secrets.token_bytes(16)
    if algorithm == "scrypt":
        try:
            found = scrypt(password, salt, **SCRYPT)
            return "$".join(["scrypt", "%(n)d,%(r)d,%(p)d" % SCRYPT, salt.hex(), found.hex()])
        except (AttributeError, ValueError):
            pass
    return "$".join(["pbkdf2", str(PBKDF2_ROUNDS), salt.hex(), pbkdf2(password, salt, PBKDF2_ROUNDS).hex()])


def scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    """32 bytes. Raises AttributeError or ValueError where OpenSSL has no scrypt."""
    return hashlib.scrypt(normal(password).encode(), salt=salt, n=n, r=r, p=p, maxmem=64 * 2 ** 20, dklen=32)


def pbkdf2(password: str, salt: bytes, rounds: int) -> bytes:
    """32 bytes."""
    return hashlib.pbkdf2_hmac("sha256", normal(password).encode(), salt, rounds)


def verify_password(password: str, stored: str) -> bool:
    """Whether a password is the one that was stored; takes the same time for any."""
    algorithm, parameters, salt, wanted = stored.split("$")
    if algorithm == "scrypt":
        n, r, p = map(int, parameters.split(","))
        found = scrypt(password, bytes.fromhex(salt), n, r, p)
    else:
        found = pbkdf2(password, bytes.fromhex(salt), int(parameters))
    return hmac.compare_digest(found.hex(), wanted)


def make_token(key: bytes, user: User, expires: float) -> str:
    """A session, a token without a row: tf1.USER.GENERATION.EXPIRY.SIGNATURE.

    *expires*: seconds since 1970; 0 lasts until the password changes.
    """
    return signed_token(key, user.id, user.generation, math.ceil(expires))


def signed_token(key: bytes, *numbers: int) -> str:
    """A token: tf1.ID.SIGNATURE, or a session. The signature is HMAC-SHA-256 (RFC 2104) over what stands before it."""
    body = TOKEN_MARK + ".".join(map(str, numbers))
    return body + "." + signature(key, body)


def signature(key: bytes, text: str) -> str:
    """HMAC-SHA-256 of a text, as 43 URL-safe characters."""
    return base64.urlsafe_b64encode(hmac.digest(key, text.encode("utf-8", "surrogatepass"), "sha256")).decode()[:43]


def digest(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.sha256(text.encode()).digest()[:16]


def read_token(key: bytes, token: str) -> Tuple[int, ...]:
    """The numbers of a token: its id, or of a session user id, generation and expiry.

    Raises Unauthorized when the signature is not ours.
    """
    body, _, signed = token.rpartition(".")
    if not hmac.compare_digest(signature(key, body).encode(), signed.encode("utf-8", "surrogatepass")):
        raise Unauthorized()
    return tuple(map(int, body[len(TOKEN_MARK):].split(".")))


def read_authorization(header: bytes) -> Tuple[str, Optional[str]]:
    """(token, None) or (user, password) of an Authorization field (RFC 7617, RFC 6750). Raises Unauthorized.

    UTF-8, and where it is not, Latin-1, which `requests` sends. A token may come as the user name.
    Name and password are not looked at when they are too long.
    """
    scheme, _, value = header.partition(b" ")
    try:
        if scheme.lower() == b"bearer":
            return value.strip().decode("ascii"), None
        if scheme.lower() != b"basic":
            raise Unauthorized()
        pair = base64.b64decode(value.strip(), validate=True)
    except ValueError:
        raise Unauthorized()
    before, colon, after = pair.partition(b":")
    if not colon or len(before) > NAME_LIMIT or len(after) > PASSWORD_LIMIT:
        raise Unauthorized()
    try:
        user, password = before.decode(), after.decode()
    except UnicodeDecodeError:
        user, password = before.decode("latin-1"), after.decode("latin-1")
    return (user, None) if user.startswith(TOKEN_MARK) else (user, password)


WRONG_PERIOD_S = 60.0
WRONG_OF_USER = 5                   # wrong logins of a user from an address in that time, until the next has to wait;
WRONG_OF_ADDRESS = 10               # hashes of wrong passwords from an address,
WRONG_OF_ALL = 20                   # and from everywhere: more than one address gets
DOUBTFUL_HASH_S = 1.0               # while there are so many, between one and the next for those who were wrong
DOUBT_S = 600.0                     # not longer ago than this
LONGEST_WAIT_S = 60.0


def network_of(address: str) -> str:
    """What is counted as one address, since whoever has one has all of it: 64 bits of IPv6, and the loopback."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is None and not found.is_loopback:
            return str(ipaddress.IPv6Address(int(found) >> 64 << 64))
        found = found.ipv4_mapped or ipaddress.IPv4Address("127.0.0.1")
    return "127.0.0.1" if found.is_loopback else str(found)


class Failures:
    """Wrong logins of one kind. After *most* in a minute, each makes the next one wait: 1, 2, 4 ... 60 s.

    Forgotten a minute after the end of the last wait.
    """
    __slots__ = ("most", "ticks", "waits", "until")

    def __init__(self, most: int) -> None:
        self.most = most
        self.ticks: Tuple[float, ...] = ()      # of the last *most*
        self.waits = 0                          # that there were
        self.until = 0.0                        # the tick at which the present one ends

    def add(self, tick: float) -> None:
        """Count one."""
        if tick >= self.until + WRONG_PERIOD_S:
            self.waits = 0
        self.ticks = (*self.ticks, tick)[-self.most:]
        if self.waits or self.many(tick):
            self.until = tick + min(2.0 ** min(self.waits, 10), LONGEST_WAIT_S)
            self.waits += 1

    def many(self, tick: float) -> bool:
        """Whether there were *most* in the last minute."""
        return len(self.ticks) == self.most and tick - self.ticks[0] < WRONG_PERIOD_S


class Throttle:
    """How long somebody has to wait who has sent wrong logins. *tick*: of a monotonic clock. For any thread.

    Wrong answers are counted by address and user: a wrong password in a script holds up nobody else. Hashes of wrong
    passwords are counted by address, whatever the user. While they are many from everywhere, an address waits the
    longest time from its first one on, and all such addresses share a hash a second: 4 % of a core, however many they
    are. An address with no wrong password never waits, so nobody can keep a user out from elsewhere.
    """
    REMEMBERED = 4096       # addresses, and pairs of address and user; the oldest are forgotten first

    def __init__(self) -> None:
        self.pairs: Dict[Tuple[str, str], Failures] = {}
        self.addresses: Dict[str, Failures] = {}
        self.all = Failures(WRONG_OF_ALL)
        self.network: Callable[[str], str] = network_of
        self.busy = threading.Lock()

    def check(self, address: str, user: str, tick: float, hashing: bool) -> None:
        """Raise TooManyRequests when it is too early for another login of that user. *hashing*: it costs a hash."""
        network = self.network(address)
        with self.busy:
            pair, of_address = self.pairs.get((network, user)), self.addresses.get(network) if hashing else None
            until = max([failures.until for failures in (pair, of_address) if failures], default=0.0)
            if of_address and tick - of_address.ticks[-1] < DOUBT_S and self.all.many(tick):
                until = max(until, self.all.ticks[-1] + DOUBTFUL_HASH_S)
        if until > tick:
            raise TooManyRequests(until - tick)

    def answered(self, address: str, user: str, tick: float) -> None:
        """Count an answer that a login is wrong."""
        with self.busy:
            self._entry(self.pairs, (self.network(address), user), WRONG_OF_USER).add(tick)

    def hashed(self, address: str, tick: float) -> None:
        """Count the hash of a wrong password."""
        with self.busy:
            entry = self._entry(self.addresses, self.network(address), WRONG_OF_ADDRESS)
            entry.add(tick)
            self.all.add(tick)
            if self.all.many(tick):
                entry.until = tick + LONGEST_WAIT_S

    def _entry(self, memory: Dict[Any, Failures], key: Any, most: int) -> Failures:
        entry = memory.pop(key, None) or Failures(most)
        if len(memory) >= self.REMEMBERED:
            del memory[next(iter(memory))]
        memory[key] = entry
        return entry


Memory = Dict[bytes, Tuple[Optional[Login], float]]     # login or refusal, and until which tick


class Logins:
    """Tells who a request comes from, and remembers it for some minutes.

    *users*: gives the users by name. *key*: signs tokens. *clock*: gives a Now. *secret*: what the
    local verbs show. *tokens*: those that are not revoked, by id. A password that was verified is
    remembered by an HMAC of the header under a key of this process, so that it is not kept; all is
    forgotten when the users change. `failed` is called with user, address and the time in seconds
    since 1970 whenever a login was wrong.
    """
    REMEMBERED = 20000

    def __init__(self, users: Callable[[], Dict[str, User]], key: bytes, clock: Callable[[], Now], secret: str,
                 tokens: Mapping[int, Token]) -> None:
        self.users = users
        self.tokens = tokens
        self.key = key
        self.clock = clock
        self.secret = secret.encode()
        self.memory_key = secrets.token_bytes(32)
        self.memory: Memory = {}
        self.known = users()                                            # the users that the memory speaks of
        self.by_id = {user.id: user for user in self.known.values()}
        self.own_kind = hash_password(secrets.token_hex(16))            # where there is no user yet
        self.throttle = Throttle()
        self.failed: Callable[[str, str, float], None] = lambda *_: None

    def who(self, header: bytes, address: str = "127.0.0.1") -> Login:
        """Who sent this Authorization field, from that address.

        Raises Unauthorized, TooManyRequests, or NeedsHash when a password has to be hashed.
        """
        if self.users() is not self.known:
            self.known, self.memory = self.users(), {}
            self.by_id = {user.id: user for user in self.known.values()}
        now, key = self.clock(), header
        if header not in self.memory and not TOKEN_SHOWN.match(header):     # a token need not be hidden from a memory
            key = hmac.digest(self.memory_key, header, "sha256")            # that can sign tokens
        login, until = self.memory.get(key, (None, 0.0))
        if login is None or until <= now.tick:
            login = self._verify(header, key, now, address, refused=until > now.tick)
        self.judge(login, now.utc)
        return login

    def judge(self, login: Login, utc: float) -> None:
        """Raise Unauthorized when a login that was known has expired by now, or its token was revoked."""
        if 0 < login.expires <= utc or login.token and login.token.id not in self.tokens:
            raise Unauthorized()

    def _verify(self, header: bytes, key: bytes, now: Now, address: str, refused: bool) -> Login:
        name, password = read_authorization(header)
        if password is not None:
            self.throttle.check(address, normal(name), now.tick, hashing=not refused)
            if refused:
                raise self._wrong(normal(name), address, now)
            raise NeedsHash(key, functools.partial(
                self._verify_password, self.known, self.memory, key, name, password, address))
        if hmac.compare_digest(name.encode("utf-8", "surrogatepass"), self.secret):
            return Login(None, 0.0)
        try:
            numbers = read_token(self.key, name)
        except Unauthorized:
            self.throttle.check(address, TOKEN_MARK, now.tick, hashing=False)
            raise self._wrong(TOKEN_MARK, address, now)
        login = self._login_with(*numbers)
        # One login, one entry: of the many ways to write a token, with any password beside it, those that
        # clients use are remembered. The others are verified again each time.
        if header in (b"Bearer " + name.encode(), b"Basic " + base64.b64encode(name.encode() + b":")):
            self._remember(self.memory, key, login, now.tick + LOGIN_MEMORY_S)
        return login

    def _login_with(self, *numbers: int) -> Login:
        """The login that the numbers of a token stand for. Raises Unauthorized."""
        token = self.tokens.get(numbers[0]) if len(numbers) == 1 else None
        user = self.by_id.get(token.user if token else numbers[0])
        if user is not None and token is not None:
            return Login(user, token.expires or 0.0, token)
        if user is not None and numbers[1:2] == (user.generation,):
            return Login(user, float(numbers[2]))
        raise Unauthorized()

    def _wrong(self, user: str, address: str, now: Now) -> Unauthorized:
        """Count a wrong login; the error that it ends in. *user*: TOKEN_MARK for a token, which may say anything."""
        self.throttle.answered(address, user, now.tick)
        self.failed(user, address, now.utc)
        return Unauthorized()

    def _verify_password(self, known: Dict[str, User], memory: Memory, key: bytes, name: str, password: str,
                         address: str) -> None:
        """Hash, and remember what comes of it, in the memory of the users it was judged by."""
        try:
            self.throttle.check(address, normal(name), self.clock().tick, hashing=True)
        except TooManyRequests:
            return      # others were wrong since this one came; whoever waits for it asks again, and is told so
        user = known.get(normal(name))
        right = False
        try:
            right = verify_password(password, user.password if user else self._stand_in(known, name))
        finally:        # a hash that cannot be made is a refusal too, or it would be tried again at once, and for ever
            if user is not None and right:
                self._remember(memory, key, Login(user, 0.0), self.clock().tick + LOGIN_MEMORY_S)
            else:
                self.throttle.hashed(address, self.clock().tick)
                self._remember(memory, key, None, self.clock().tick + REFUSAL_MEMORY_S)

    def _stand_in(self, known: Dict[str, User], name: str) -> str:
        """A hash for somebody who is unknown: of the kind of some user's, always the same one's for the same name.

        So it takes as long as a wrong password of a user, also where there are users of both kinds.
        """
        hashes = [user.password for user in known.values()] or [self.own_kind]
        which = int.from_bytes(hmac.digest(self.memory_key, normal(name).encode("utf-8", "surrogatepass"), "sha256"),
                               "big")
        return hashes[which % len(hashes)].rpartition("$")[0] + "$" + "0" * 64

    def _remember(self, memory: Memory, key: bytes, login: Optional[Login], until: float) -> None:
        if len(memory) >= self.REMEMBERED:
            memory.clear()
        memory[key] = login, until


# ---------------------------------------------------------------- TLS
# A certificate of the farm's own, made by the standard library alone, and what `ssl` is told at both ends. Knows no
# sockets and no files but those that it is given.
#
# The certificate is X.509 version 3 (RFC 5280) in DER (ITU-T X.690), with a key on the curve P-256, signed by itself.
# Another extension: a line in `make_certificate`.

# P-256 (SP 800-186): its field, the order of its group, and the point G that makes the group.
P256_FIELD = 2 ** 256 - 2 ** 224 + 2 ** 192 + 2 ** 96 - 1
P256_ORDER = 0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551
P256_G = (0x6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296,
          0x4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5)
CERTIFICATE_YEARS = 20

Point = Optional[Tuple[int, int]]       # of the curve; None: the one at infinity


def add_points(a: Point, b: Point) -> Point:
    """The sum of two points of P-256."""
    if a is None or b is None:
        return a or b
    if a[0] == b[0] and (a[1] + b[1]) % P256_FIELD == 0:
        return None
    rise, run = (3 * a[0] ** 2 - 3, 2 * a[1]) if a == b else (b[1] - a[1], b[0] - a[0])
    slope = rise * pow(run, -1, P256_FIELD)
    x = (slope ** 2 - a[0] - b[0]) % P256_FIELD
    return x, (slope * (a[0] - x) - a[1]) % P256_FIELD


def multiple(factor: int) -> Tuple[int, int]:
    """So many times G, for a factor from 1 to P256_ORDER - 1. It takes some 10 ms, and how long tells about the factor.

    That may be: it is called twice in the life of a farm, before anybody can reach it.
    """
    found, doubled = None, P256_G    # type: Tuple[Point, Point]
    while factor:
        if factor & 1:
            found = add_points(found, doubled)
        doubled, factor = add_points(doubled, doubled), factor >> 1
    assert found is not None
    return found


def der(tag: int, *parts: bytes) -> bytes:
    """A value in DER: tag, length and content."""
    content = b"".join(parts)
    length = len(content)
    if length < 128:
        return bytes([tag, length]) + content
    size = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([tag, 128 + len(size)]) + size + content


def der_integer(number: int) -> bytes:
    """A number that is not negative."""
    return der(0x02, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def der_oid(dotted: str) -> bytes:
    """An object identifier."""
    first, second, *others = map(int, dotted.split("."))
    content = [40 * first + second]
    for number in others:
        digits = [number & 127]
        while number > 127:
            number >>= 7
            digits.insert(0, 128 + (number & 127))
        content += digits
    return der(0x06, bytes(content))


def der_time(utc: float) -> bytes:
    """A time of a certificate: UTCTime, from 2050 on GeneralizedTime."""
    text = time.strftime("%Y%m%d%H%M%SZ", time.gmtime(utc))
    return der(0x18, text.encode()) if text >= "2050" else der(0x17, text[2:].encode())


def sequence(*parts: bytes) -> bytes:
    """A SEQUENCE in DER."""
    return der(0x30, *parts)


def pem(label: str, content: bytes) -> str:
    """A value in DER as text (RFC 7468)."""
    lines = textwrap.wrap(base64.b64encode(content).decode(), 64)
    return "-----BEGIN %s-----\n%s\n-----END %s-----\n" % (label, "\n".join(lines), label)


def make_certificate(names: Sequence[str], addresses: Sequence[str], utc: float) -> Tuple[str, str]:
    """A new key, and a certificate for it that is valid from a day before *utc* on. Both are PEM.

    *names*, *addresses*: by which clients may reach the server.
    """
    secret = 1 + secrets.randbelow(P256_ORDER - 1)
    x, y = multiple(secret)
    point = b"\x04" + x.to_bytes(32, "big") + y.to_bytes(32, "big")
    curve, bits = der_oid("1.2.840.10045.3.1.7"), der(0x03, b"\0", point)
    algorithm = sequence(der_oid("1.2.840.10045.4.3.2"))        # ECDSA with SHA-256
    key_id = hashlib.sha256(point).digest()[:20]                # RFC 7093
    serial = secrets.randbits(126) + 1
    # Each farm has a name of its own: programs look for the signer of a certificate by name.
    name = sequence(der(0x31, sequence(der_oid("2.5.4.3"), der(0x0c, b"taskfarm %x" % serial))))

    def extension(oid: str, value: bytes, critical: bytes = b"") -> bytes:
        return sequence(der_oid("2.5.29." + oid), critical, der(0x04, value))
    critical = der(0x01, b"\xff")
    signed = sequence(
        der(0xa0, der_integer(2)), der_integer(serial), algorithm, name,
        sequence(der_time(utc - DAY_S), der_time(utc + CERTIFICATE_YEARS * 365.25 * DAY_S)), name,
        sequence(sequence(der_oid("1.2.840.10045.2.1"), curve), bits),
        der(0xa3, sequence(
            extension("19", sequence(critical), critical),              # basicConstraints: it may sign, itself
            extension("15", der(0x03, b"\x02\x84"), critical),          # keyUsage: digitalSignature, keyCertSign
            extension("37", sequence(der_oid("1.3.6.1.5.5.7.3.1"))),    # extKeyUsage: serverAuth
            extension("14", der(0x04, key_id)),                         # subjectKeyIdentifier
            extension("35", sequence(der(0x80, key_id))),               # authorityKeyIdentifier
            extension("17", sequence(                                   # subjectAltName
                *(der(0x82, name.encode()) for name in names),
                *(der(0x87, ipaddress.ip_address(address).packed) for address in addresses))))))
    nonce = 1 + secrets.randbelow(P256_ORDER - 1)
    r = multiple(nonce)[0] % P256_ORDER
    s = pow(nonce, -1, P256_ORDER) * (int.from_bytes(hashlib.sha256(signed).digest(), "big") + r * secret) % P256_ORDER
    certificate = sequence(signed, algorithm, der(0x03, b"\0", sequence(der_integer(r), der_integer(s))))
    key = sequence(der_integer(1), der(0x04, secret.to_bytes(32, "big")), der(0xa0, curve), der(0xa1, bits))
    return pem("EC PRIVATE KEY", key), pem("CERTIFICATE", certificate)


def is_address(host: str) -> bool:
    """Whether a host is given by its address, not by a name."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


def certificate_der(certificate_pem: str) -> bytes:
    """The certificate in DER: the first one where others follow, as in the file of a site. Raises ValueError."""
    _, header, content = certificate_pem.partition(ssl.PEM_HEADER)
    return ssl.PEM_cert_to_DER_cert(header + content.partition(ssl.PEM_FOOTER)[0] + ssl.PEM_FOOTER)


def fingerprint(certificate_pem: str) -> str:
    """What names a certificate to people: SHA256:, and the hash of its DER in hex."""
    return "SHA256:" + hashlib.sha256(certificate_der(certificate_pem)).hexdigest()


def server_context(certificate_pem: str, key_pem: str) -> ssl.SSLContext:
    """The server's end of TLS. Raises OSError (ssl.SSLError among them) for a certificate or key that will not do.

    They reach `ssl`, which only reads files, through pipes: no file has the key, and a full disk does not matter.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    with contextlib.ExitStack() as ends:
        paths = []
        for text in (certificate_pem, key_pem):
            reader, writer = os.pipe()
            ends.callback(os.close, reader)
            os.set_blocking(writer, False)
            sent = os.write(writer, text.encode())
            os.close(writer)
            if sent < len(text.encode()):
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            paths.append("/dev/fd/%d" % reader)
        context.load_cert_chain(paths[0], paths[1], password="")        # without one OpenSSL would ask the terminal
    return context


# Bytes of a client until the handshake is over; honest ones send some 2000. OpenSSL compares the curves that a client
# names with each other: 64 KB of them held the interpreter for 90 ms.
HANDSHAKE_LIMIT = 8192


class TlsEnd:
    """The server's end of one TLS connection: bytes as they are sent to bytes as they are meant, and back.

    It works on bytes in memory, so each call ends soon. (A socket of `ssl` reads on for as long as the client sends
    records without content, and holds everybody up.)
    """
    __slots__ = ("context", "incoming", "outgoing", "end", "ended", "room")
    PIECE = 16 * 1024       # bytes at a time: the buffers of OpenSSL keep the size that they have once had

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self.end: Optional[ssl.SSLObject] = None    # from the first bytes on: 40 KiB until the handshake is over
        self.ended = False              # the client has said that it sends no more
        self.room: Optional[int] = HANDSHAKE_LIMIT      # bytes that may come until the handshake is over, then None

    def decrypt(self, data: bytes) -> bytes:
        """What came, at most PIECE bytes, as far as it is whole; all of a handshake is none. Raises ssl.SSLError.

        What is to be sent because of it, an alert too, is in `outgoing`.
        """
        if self.end is None:
            self.end = self.context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        content = b""
        while data:
            part, data = data[:self.room], data[len(data) if self.room is None else self.room:]
            self.incoming.write(part)
            with contextlib.suppress(ssl.SSLWantReadError):
                while self.incoming.pending and not self.ended:
                    piece = self.end.read(self.PIECE)
                    self.ended = not piece
                    content = content + piece if content else piece
            if self.room is not None:
                self.room = None if self.established else self.room - len(part)
                if self.room == 0:
                    raise ssl.SSLError("the handshake is too long")
        return content

    def encrypt(self, content: Union[bytes, memoryview]) -> bytes:
        """Bytes to be sent for these."""
        if len(content) <= self.PIECE:
            assert self.end is not None
            self.end.write(content)
            return self.outgoing.read()
        view = memoryview(content)
        return b"".join(self.encrypt(view[at:at + self.PIECE]) for at in range(0, len(view), self.PIECE))

    def close_notify(self) -> bytes:
        """Bytes that tell the client that nothing more comes."""
        if self.end is not None:
            with contextlib.suppress(ssl.SSLError):     # the client has not said so, or the handshake is not over
                self.end.unwrap()
        return self.outgoing.read()

    @property
    def established(self) -> bool:
        """Whether the handshake is over."""
        return self.end is not None and self.end.version() is not None


def pinned_context(certificate_pem: str) -> ssl.SSLContext:
    """A client's end of TLS, for a farm whose certificate is known, whatever the host is called now.

    It accepts what that certificate has signed, too: the caller compares the DER of the peer's certificate with
    `certificate_der`. Raises ValueError or ssl.SSLError for what is no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_flags |= ssl.VerifyFlags(0x80000)    # VERIFY_X509_PARTIAL_CHAIN of 3.10: a site's need not be a root
    context.load_verify_locations(cadata=certificate_der(certificate_pem))
    return context


# ---------------------------------------------------------------- HTTP
# Requests and replies as bytes (RFC 9110, RFC 9112). Knows no socket, no run and no task.
#
# Whatever stands here may be called for bytes of anybody: it takes time in proportion to them, and what is
# remembered is bounded. A new header: SINGLE where it may come but once, then Request or parse_fields. A new type
# of field in a body or query: a child of Field. A new endpoint: section API, nothing here.

OPEN, USER, ADMIN = "open", "user", "admin"     # who may ask


class Reply:
    """What is sent back: a status, and a body of some type or none.

    *rest*: an operation whose reply is the next piece of the body; it is asked for when the client has taken this
    one. *first*: work that may wait for a disk or a network, done in another thread before this is sent.
    """
    __slots__ = ("status", "body", "content_type", "headers", "rest", "first")

    def __init__(self, status: int, body: bytes = b"", content_type: str = "application/json",
                 headers: Sequence[Tuple[str, str]] = (), rest: Optional[Operation] = None,
                 first: Optional[Callable[[], Any]] = None) -> None:
        self.status = status
        self.body = body
        self.content_type = content_type
        self.headers = headers
        self.rest = rest
        self.first = first


encode_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def json_reply(status: int, content: Any) -> Reply:
    """A reply with a JSON body."""
    return Reply(status, encode_json(content).encode())


def problem(error: FarmError) -> Reply:
    """An error as problem details (RFC 9457)."""
    title = HTTPStatus(error.status).phrase
    body = encode_json({"title": title, "status": error.status, "detail": str(error)}).encode()
    return Reply(error.status, body, "application/problem+json", error.headers)


def failure(error: BaseException) -> Reply:
    """The reply to an error: its own status, or 500 with an id that stands in the log beside the traceback."""
    if isinstance(error, FarmError):
        return problem(error)
    fault = secrets.token_hex(4)
    log.error("fault %s: %s", fault, "".join(traceback.format_exception(type(error), error, error.__traceback__)))
    return problem(FarmError("the server made an error; its log has more under %s" % fault))


STATUS_LINES = {status.value: "HTTP/1.1 %d %s\r\n" % (status.value, status.phrase) for status in HTTPStatus}


@functools.lru_cache(maxsize=64)
def common_head(second: int, status: int, content_type: str, keep: Optional[bool]) -> bytes:
    """What answers of one second have in common, with the Date field (RFC 9110, 6.6.1)."""
    head = STATUS_LINES[status] + "Date: " + formatdate(second, usegmt=True) + "\r\n"
    if status != 204:
        head += "Content-Type: %s\r\n" % content_type
    if keep is not None:
        head += "Connection: keep-alive\r\n" if keep else "Connection: close\r\n"
    return head.encode()


def render(reply: Reply, keep: Optional[bool], bodiless: bool, chunks: bool = True) -> bytes:
    """The bytes of a reply: one piece, since two writes met Nagle and delayed ACK at 44 ms a request.

    *keep*: what is said of the connection; None where nothing need be said. *chunks*: a body that
    comes in pieces is sent in chunks; otherwise it ends with the connection (HTTP/1.0).
    """
    head = common_head(int(time.time()), reply.status, reply.content_type, keep)
    for name, value in reply.headers:
        head += ("%s: %s\r\n" % (name, value)).encode()
    if reply.status == 204:
        return head + b"\r\n"
    if reply.rest is not None:
        head += b"Transfer-Encoding: chunked\r\n\r\n" if chunks else b"\r\n"
        return head if bodiless else head + render_piece(reply, chunks)
    head += b"Content-Length: %d\r\n\r\n" % len(reply.body)
    return head if bodiless else head + reply.body


def render_piece(reply: Reply, chunks: bool) -> bytes:
    """A piece of a body (RFC 9112, section 7.1)."""
    if not chunks:
        return reply.body
    piece = b"%x\r\n%s\r\n" % (len(reply.body), reply.body) if reply.body else b""
    return piece if reply.rest is not None else piece + b"0\r\n\r\n"


class Field:
    """One value that a body or query may name; children say which values will do.

    *refusal*: the error that another value ends in, which does not show it if it is *secret*.
    """
    expected = ""

    def __init__(self, required: bool = True, refusal: Type[FarmError] = BadRequest, secret: bool = False) -> None:
        self.required = required
        self.refusal = refusal
        self.secret = secret

    def check(self, name: str, value: Any) -> Any:
        """The value as handlers want it. Raises the refusal."""
        raise NotImplementedError

    def wrong(self, name: str, value: Any) -> FarmError:
        """The error for a value that will not do."""
        if self.secret:
            return self.refusal("%s must be %s" % (name, self.expected))
        shown = "an array" if isinstance(value, list) else "an object" if isinstance(value, dict) else json.dumps(value)
        return self.refusal("%s must be %s, not %s" % (name, self.expected, shortened(shown)))


class Integer(Field):
    """A JSON integer; true and 1.0 are none."""

    def __init__(self, low: int, high: int, **options: Any) -> None:
        super().__init__(**options)
        self.low, self.high = low, high
        self.expected = "an integer from %d to %d" % (low, high)

    def check(self, name: str, value: Any) -> int:
        """The integer."""
        if type(value) is not int or not self.low <= value <= self.high:
            raise self.wrong(name, value)
        return value


class Percent(Field):
    """A JSON number from 0 to 100, taken in millionths and rounded down below 100."""
    expected = "a number from 0 to 100"

    def check(self, name: str, value: Any) -> int:
        """Millionths: the most whose float is not above the value, so that 33.3 comes back as 33.3."""
        if type(value) not in (int, float) or not 0 <= value <= 100:
            raise self.wrong(name, value)
        millionths = round(float(value) * 1000000)
        return millionths - int(millionths / 1000000 > value)


class Text(Field):
    """A string of printable characters, or one that a pattern matches."""

    def __init__(self, longest: int, pattern: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.longest = longest
        self.pattern = re.compile(pattern) if pattern else None
        self.expected = "a string of 1 to %d %s" % (
            longest, "characters of " + pattern.rstrip("+") if pattern else "printable characters")

    def check(self, name: str, value: Any) -> str:
        """The string."""
        if not isinstance(value, str) or not 1 <= len(value) <= self.longest or not (
                self.pattern.fullmatch(value) if self.pattern else value.isprintable()):
            raise self.wrong(name, value)
        return value


class Seconds(Field):
    """A JSON number of seconds, taken in milliseconds."""

    def __init__(self, most: float, **options: Any) -> None:
        super().__init__(**options)
        self.most = most
        self.expected = "a number of seconds from 0 to %d" % most

    def check(self, name: str, value: Any) -> int:
        """Milliseconds."""
        if type(value) not in (int, float) or not 0 <= value <= self.most:
            raise self.wrong(name, value)
        return int(value * 1000)


class Message(Field):
    """Any text that can be kept, also an empty one and one of many lines."""

    def __init__(self, longest: int, **options: Any) -> None:
        super().__init__(**options)
        self.longest = longest
        self.expected = "a string of at most %d characters" % longest

    def check(self, name: str, value: Any) -> str:
        """The text; half a surrogate pair, which is no character, becomes a question mark."""
        if not isinstance(value, str) or len(value) > self.longest:
            raise self.wrong(name, value)
        return value.encode("utf-8", "replace").decode()


class SystemText(Field):
    """A string that the system takes for an argument or, where it begins with *start*, for a path: any without NUL."""

    def __init__(self, longest: int, start: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.longest, self.start = longest, start
        self.expected = "a string of at most %d characters, without NUL" % longest + (
            ", that begins with " + start if start else "")

    def check(self, name: str, value: Any) -> str:
        """The string."""
        if not isinstance(value, str) or len(value) > self.longest or "\0" in value or not value.startswith(
                self.start):
            raise self.wrong(name, value)
        return value


class Strings(Field):
    """An array of strings, one at least, each as *entry* has it."""
    expected = "an array of strings, one at least"

    def __init__(self, entry: Field, **options: Any) -> None:
        super().__init__(**options)
        self.entry = entry

    def check(self, name: str, value: Any) -> List[str]:
        """The strings."""
        if not isinstance(value, list) or not value:
            raise self.wrong(name, value)
        return [self.entry.check(name, text) for text in value]


class Object(Field):
    """An object with these fields. *judge(object)* gives a sentence when they will not do together, else None."""

    def __init__(self, fields: Dict[str, Field], judge: Callable[[Dict[str, Any]], Optional[str]] = lambda _: None,
                 **options: Any) -> None:
        super().__init__(**options)
        self.fields, self.judge = fields, judge
        self.expected = "an object with %s" % ", ".join(fields) + " or null" * (not self.required)

    def check(self, name: str, value: Any) -> Optional[Dict[str, Any]]:
        """The object, its values checked; None for null, where it need not be there."""
        if value is None and not self.required:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, value)
        content = checked(self.fields, value, "field of " + name)
        sentence = self.judge(content)
        if sentence:
            raise self.refusal("%s: %s" % (name, sentence))
        return content


class Count(Field):
    """An integer in a query: ASCII digits."""

    def __init__(self, low: int, high: int, **options: Any) -> None:
        super().__init__(**options)
        self.low, self.high = low, high
        self.expected = "a number from %d to %d" % (low, high)

    def check(self, name: str, value: Any) -> int:
        """The integer."""
        if not (value.isascii() and value.isdigit() and len(value) < 20 and self.low <= int(value) <= self.high):
            raise self.wrong(name, value)
        return int(value)


class Choice(Field):
    """One of a few words; handlers get what it stands for."""

    def __init__(self, choices: Dict[str, Any], **options: Any) -> None:
        super().__init__(**options)
        self.choices = choices
        self.expected = "one of " + ", ".join(repr(choice) if choice else "nothing" for choice in choices)

    def check(self, name: str, value: Any) -> Any:
        """What the word stands for."""
        if not isinstance(value, str) or value not in self.choices:
            raise self.wrong(name, value)
        return self.choices[value]


class Flag(Field):
    """true or false."""
    expected = "true or false"

    def check(self, name: str, value: Any) -> bool:
        """Which of them."""
        if not isinstance(value, bool):
            raise self.wrong(name, value)
        return value


def parse_span(text: str) -> Tuple[int, int]:
    """The first and the last number of 13 or 17-20. Raises ValueError for another text."""
    match = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", text, re.ASCII)
    if not match:
        raise ValueError(text)
    first, last = match.groups()
    return int(first), int(last or first)


class Ranges(Field):
    """Numbers of tasks, as [[13, 13], [17, 20]] or "13,17-20". With *most* so many at most, in MAX_SPANS ranges."""
    def __init__(self, most: int = MAX_TASKS, **options: Any) -> None:
        super().__init__(**options)
        self.most = most
        self.expected = "numbers of tasks, as [[13, 13], [17, 20]] or '13,17-20'" + (
            "" if most == MAX_TASKS else ", %d of them in %d ranges at most" % (most, MAX_SPANS))

    def check(self, name: str, value: Any) -> Tuple[Tuple[int, int], ...]:
        """First and last numbers, in order, and no number in two of them."""
        spans: List[Tuple[int, int]] = []
        try:
            for first, last in sorted(map(parse_span, value.split(",")) if isinstance(value, str) else value):
                if not (type(first) is type(last) is int and 0 <= first <= last < MAX_TASKS):
                    raise ValueError
                if spans and first <= spans[-1][1] + 1:
                    first, before = spans.pop()
                    last = max(last, before)
                spans.append((first, last))
        except (ValueError, TypeError):
            raise self.wrong(name, value)
        if not spans or self.most < MAX_TASKS and (
                len(spans) > MAX_SPANS or sum(last + 1 - first for first, last in spans) > self.most):
            raise self.wrong(name, value)
        return tuple(spans)


class Entries(Field):
    """An array of objects with these fields, the first of which tells them apart; handlers get *kind* of their values.

    *judge(entry)* gives a sentence when its values will not do together, else None.
    """
    NAMED = 5       # of the entries that are wrong

    def __init__(self, most: int, fields: Dict[str, Field], kind: Callable[..., Any],
                 judge: Callable[[Any], Optional[str]], **options: Any) -> None:
        super().__init__(**options)
        self.most = most
        self.fields = fields
        self.kind = kind
        self.judge = judge
        self.slots = {name: (at, field.check) for at, (name, field) in enumerate(fields.items())}
        self.expected = "an array of 1 to %d objects with %s" % (most, ", ".join(fields))

    def check(self, name: str, value: Any) -> List[Any]:
        """The entries. Raises BadRequest, naming the first that are wrong."""
        if not isinstance(value, list):
            raise self.wrong(name, value)
        reading = EntriesRead(self, name)
        reading.add(value)
        return reading.end()

    def what_is_wrong(self, entry: Any) -> str:
        """A sentence about an entry that cannot be taken."""
        if not isinstance(entry, dict):
            return "it must be an object"
        try:
            checked(self.fields, entry, "field")
        except FarmError as error:
            return str(error)
        return "it is malformed"


class EntriesRead:
    """What has been read of an array of entries. Reading ends with the first few that are wrong."""

    def __init__(self, field: Entries, name: str) -> None:
        self.field = field
        self.name = name
        self.entries: List[Any] = []
        self.wrong: List[str] = []

    def add(self, values: List[Any]) -> None:
        """Check so many more. Raises BadRequest when they are too many, or enough of them are wrong."""
        field, entries = self.field, self.entries
        if len(entries) + len(values) > field.most:
            raise field.wrong(self.name, values)
        slots, judge, kind = field.slots, field.judge, field.kind
        nothing = [None] * len(slots)
        for entry in values:
            found: List[Any] = nothing[:]
            try:
                for key, content in entry.items():
                    at, check = slots[key]
                    found[at] = check(key, content)
            except (FarmError, KeyError, AttributeError):
                self._refuse(field.what_is_wrong(entry))
                continue
            made = kind(*found)
            sentence = "%s is missing" % next(iter(slots)) if made[0] is None else judge(made)
            if sentence:
                self._refuse(sentence)
                continue
            entries.append(made)

    def _refuse(self, sentence: str) -> None:
        self.wrong.append("%s[%d]: %s" % (self.name, len(self.entries) + len(self.wrong), sentence))
        if len(self.wrong) >= self.field.NAMED:
            raise BadRequest("; ".join(self.wrong) + "; and perhaps more")

    def end(self) -> List[Any]:
        """All entries. Raises BadRequest when there are none, or one comes twice, or some were wrong."""
        if not self.entries and not self.wrong:
            raise self.field.wrong(self.name, [])
        if not self.wrong and len({entry[0] for entry in self.entries}) < len(self.entries):
            seen: Set[Any] = set()
            twice = [entry[0] for entry in self.entries
                     if entry[0] in seen or seen.add(entry[0])]     # type: ignore[func-returns-value]
            self.wrong = ["%s: %s %s comes twice" % (self.name, next(iter(self.field.slots)), value)
                          for value in twice[:self.field.NAMED]]
        if self.wrong:
            raise BadRequest("; ".join(self.wrong))
        return self.entries


class Route:
    """A line of the API's table: method, path, who may ask, what the body and the query may name.

    *scope*: that a token must have; by default read for GET and full for the rest. *checks_run*: the handler itself
    sees to it that a token for one run reaches no other; where the path names the run, nothing need be seen to.
    """
    __slots__ = ("method", "path", "handler", "access", "body", "query", "body_limit", "scope", "checks_run")

    def __init__(self, method: str, path: str, handler: Callable[..., Any], access: str,
                 body: Optional[Dict[str, Field]], query: Dict[str, Field], scope: str, checks_run: bool) -> None:
        self.method = method
        self.path = path
        self.handler = handler
        self.access = access
        self.body = body or {}
        self.query = query
        self.body_limit = BATCH_BODY_LIMIT if any(isinstance(field, Entries) for field in self.body.values()) else (
            BODY_LIMIT)
        self.scope = scope or ("read" if method == "GET" else "full")
        self.checks_run = checks_run

    def judge(self, login: Login, variables: List[str]) -> None:
        """Raise Forbidden, with what is missing, when the login is good, but not for this."""
        if self.access == ADMIN and login.user:
            raise Forbidden("this is for the verbs of taskfarm.py, on the server's own machine")
        token = login.token
        if token is None:
            return
        if SCOPES.index(token.scope) < SCOPES.index(self.scope):
            raise Forbidden("this token may only %s: it needs the scope %s" % (token.scope, self.scope))
        if token.run is not None and not self.checks_run and ("<run>" not in self.path or variables[0] != token.run):
            raise Forbidden("this token is for run %s alone" % token.run)


REMEMBERED_PATH = 100           # characters of a path: 4096 of them are 2 MB
LONGEST_SEGMENT = 1000          # characters of a variable part of a path: a user's name, percent-encoded, has 768


class Routes:
    """The API's table. Routing, validation and documentation come from it."""

    def __init__(self) -> None:
        self.table: List[Route] = []
        self.tree: Dict[Optional[str], Any] = {}    # segment, or "/" for any, to the rest; None to routes by method
        self.walked = functools.lru_cache(maxsize=4096)(self._walk)     # to all but the last segment, the same for many

    def route(self, method: str, path: str, access: str = USER, body: Optional[Dict[str, Field]] = None,
              query: Optional[Dict[str, Field]] = None, scope: str = "",
              checks_run: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: the function answers this method and path, whose <names> are its arguments after the request."""
        def enter(handler: Callable[..., Any]) -> Callable[..., Any]:
            self.add(Route(method, path, handler, access, body, query or {}, scope, checks_run))
            return handler
        return enter

    def add(self, route: Route) -> None:
        """Enter a line."""
        self.walked.cache_clear()
        self.table.append(route)
        node = self.tree
        for segment in route.path[1:].split("/"):
            node = node.setdefault("/" if segment.startswith("<") else segment, {})
        node.setdefault(None, {})[route.method] = route

    def find(self, path: str) -> Tuple[Dict[str, Route], List[str]]:
        """The routes of a path by method, none when it is unknown, and its variable segments.

        Only short paths are remembered, since anybody may ask for any.
        """
        before, _, last = path.rpartition("/")
        node, variables = (self.walked if len(before) <= REMEMBERED_PATH else self._walk)(before)
        node, variable = self._step(node, last)
        return node.get(None, {}), variables + variable

    def _walk(self, path: str) -> Tuple[Dict[Optional[str], Any], List[str]]:
        node, variables = self.tree, []
        for segment in path.split("/")[1:]:
            node, variable = self._step(node, segment)
            variables += variable
        return node, variables

    def _step(self, node: Dict[Optional[str], Any], segment: str) -> Tuple[Dict[Optional[str], Any], List[str]]:
        """Where a segment leads, nowhere when it is unknown, and what it holds if it is a variable."""
        if segment in node:
            return node[segment], []
        if "/" in node and 1 <= len(segment) <= LONGEST_SEGMENT:
            return node["/"], [urllib.parse.unquote(segment, errors="replace")]
        return {}, []

    def copy(self) -> "Routes":
        """Another table with the same lines, to add to."""
        other = Routes()
        for route in self.table:
            other.add(route)
        return other


TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/([0-9])\.([0-9])")
FIELD_LINE = re.compile(rb"(" + TOKEN + rb"):([^\x00-\x08\x0a-\x1f\x7f]*)")
TOKEN_FIELD = re.compile(rb"(?:^|\n)Authorization: " + TOKEN_SHOWN.pattern)
KEY_FIELD = re.compile(rb"(?:^|\r\n)[Ii]dempotency-[Kk]ey:([ -~]*)(?=\r\n|$)")
SINGLE = frozenset((b"host", b"content-length", b"content-type", b"authorization", b"transfer-encoding",
                    b"idempotency-key"))


class Request:
    """One request, its head parsed; handlers read *farm*, *login*, *fields*, *query* and nothing else."""
    __slots__ = ("method", "target", "minor", "headers", "length", "keep", "began", "route", "variables",
                 "farm", "login", "fields", "query", "admitted", "expects", "key")
    variables: List[str]
    farm: Any
    fields: Dict[str, Any]
    query: Dict[str, Any]

    def __init__(self, head: bytes) -> None:
        """Parse a head, without the empty line at its end. Raises FarmError (RFC 9112, sections 2 to 6)."""
        line, mark, block = head.partition(b"\r\n")
        match = REQUEST_LINE.fullmatch(line)
        if match is None or len(line) > LINE_LIMIT:
            raise malformed_line(line)
        method, target, major, minor = match.groups()
        self.method = method.decode()
        self.target = target.decode()
        self.minor = int(minor)
        self.began = time.monotonic()
        self.route: Optional[Route] = None
        self.login: Optional[Login] = None
        self.admitted = False
        if not (target.startswith(b"/") or re.match(rb"(?i)https?://", target) or method + target == b"OPTIONS*"):
            raise BadRequest("the target of a request is a path that begins with /, or a whole http:// address")
        if major != b"1":
            raise VersionNotSupported("HTTP/%s is not spoken here, only HTTP/1.1" % major.decode())
        keyed = KEY_FIELD.search(block) if b"dempotency-" in block else None
        if keyed:       # it is another one with each request, and cut out, the rest comes again
            block = block[:keyed.start()] + block[keyed.end():]
            block = block[2:] if block.startswith(b"\r\n") else block
        parsed = PARSED.get((block, self.minor)) or parse_fields(block if block or not keyed and mark else None,
                                                                 self.minor)
        self.headers, self.length, self.keep = parsed
        self.key = self._key(keyed[1] if keyed else None) if self.method == "POST" else ""
        self.expects = b"expect" in self.headers and self.minor > 0     # RFC 9110, 10.1.1: 1.0 knows no 100 Continue

    def _key(self, cut_out: Optional[bytes]) -> str:
        """The Idempotency-Key, "" when there is none. Raises BadRequest."""
        left = self.headers.get(b"idempotency-key")
        value = left if cut_out is None else cut_out
        if value is None:
            return ""
        key = value.strip(b" \t").decode("latin-1")
        if left is not None and cut_out is not None or not 1 <= len(key) <= KEY_LIMIT or not (
                key.isascii() and key.isprintable()):
            raise BadRequest("an Idempotency-Key is one field of 1 to %d printable ASCII characters" % KEY_LIMIT)
        return key


Fields = Tuple[Dict[bytes, bytes], int, bool]
# Workers send the same fields with each request, so they are parsed once; never kept where they may hold a password.
# This happens before anybody has logged in: 512 of 16 fields are some 2 MB.
PARSED: Dict[Tuple[bytes, int], Fields] = {}
MOST_PARSED = 512


def parse_fields(block: Optional[bytes], minor: int) -> Fields:
    """Header fields by name in small letters, the length of the body, and whether the connection is to be kept.

    A length of -1: the body is chunked. Raises FarmError.
    """
    lines = [] if block is None else block.split(b"\r\n")
    if len(lines) > FIELD_LIMIT:
        raise HeadTooLarge("a request has at most %d header fields" % FIELD_LIMIT)
    headers: Dict[bytes, bytes] = {}
    for line in lines:
        if len(line) > LINE_LIMIT:
            raise HeadTooLarge("a header line has at most %d bytes" % LINE_LIMIT)
        match = FIELD_LINE.fullmatch(line)
        if match is None:
            # Its text is not shown: a login that is folded, or has a blank before its colon, would get into logs.
            raise BadRequest("header line %d is malformed" % (lines.index(line) + 1))
        name, value = match[1].lower(), match[2].strip(b" \t")
        if name in headers:
            if name in SINGLE:
                raise BadRequest("the header field %s comes twice" % name.decode())
            value = headers[name] + b", " + value
        headers[name] = value
    if b"host" not in headers and minor:
        raise BadRequest("a request of HTTP/1.1 has a Host field")
    connection = headers.get(b"connection", b"").lower()
    keep = b"close" not in connection and (minor > 0 or b"keep-alive" in connection)
    fields = headers, body_length(headers), keep
    if block and len(block) <= 1024 and len(lines) <= 16 and TOKEN_FIELD.search(block):
        if len(PARSED) >= MOST_PARSED:
            PARSED.clear()
        PARSED[block, minor] = fields
    return fields


def body_length(headers: Dict[bytes, bytes]) -> int:
    """How long a body is (RFC 9112, section 6); -1: chunked. Raises BadRequest."""
    value = headers.get(b"content-length", b"0")
    if b"transfer-encoding" in headers:
        if b"content-length" in headers:
            raise BadRequest("a request has a Content-Length or a Transfer-Encoding, not both")
        return -1
    if not value.isdigit():
        raise BadRequest("Content-Length must be a number of bytes")
    return int(value) if len(value) < 20 else 10 ** 20


def path_of(target: str) -> str:
    """A target without its query, and without scheme and host where it has them (RFC 9112, 3.2.2).

    Slashes that come twice are one: a client that was told http://host//api/ puts its paths behind that.
    """
    path = target.partition("?")[0]
    if not path.startswith("/"):
        path = "/" + path.partition("://")[2].partition("/")[2]
    return re.sub("//+", "/", path) if "//" in path else path


HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*)(?::[0-9]*)?")


def check_host(host: bytes, names: FrozenSet[str]) -> None:
    """Raise Misdirected when a Host field names neither an IP address, nor the loopback, nor one of *names*.

    A page of evil.example may let that name lead to our address, and would then be of the same origin (DNS
    rebinding). No page can do that with an address, or with a name that its maker does not own.
    """
    match = HOST.fullmatch(host.decode("latin-1"))
    if match is None:
        raise BadRequest("the Host field is malformed: it is a name or an address, and perhaps :PORT")
    name = match[1].lower()
    name = name[:-1] if name.endswith(".") else name
    if not (name in names or name == "localhost" or name.endswith(".localhost") or is_address(name.strip("[]"))):
        raise Misdirected("this server does not know itself as %s: where that is its name, start it with --allow-host "
                          "%s" % (shortened(name) or "a host without a name", shortened(name) or "NAME"))


def check_site(target: str, headers: Mapping[bytes, bytes], names: FrozenSet[str]) -> None:
    """Raise Misdirected for another host than ours, Forbidden for what a page of another site has a browser send.

    *names*: of this server. The host of a whole http:// address counts, where the target is one (RFC 9112, 3.2.2).
    Other clients than browsers send neither Origin nor Sec-Fetch-Site (https://www.w3.org/TR/fetch-metadata/).
    """
    host = headers.get(b"host")
    if host is not None:        # HTTP/1.0 may come without
        check_host(host, names)
    if not target.startswith("/"):
        host = re.split("[/?]", target.partition("://")[2], maxsplit=1)[0].encode()
        if target != "*":
            check_host(host, names)
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    origin_host = None if origin is None else re.sub(b"^https?://", b"", origin.lower())
    foreign = origin is not None and (origin_host == origin.lower() or origin_host != (host or b"").lower())
    if foreign or site not in (None, b"same-origin", b"none"):
        raise Forbidden("a page of another site has sent this: type the address of this server into the browser, and "
                        "let a proxy pass the Host field on unchanged")


def malformed_line(line: bytes) -> FarmError:
    """The error for a request line that is none."""
    if len(line) > LINE_LIMIT:
        return UriTooLong("a request line has at most %d bytes" % LINE_LIMIT)
    return BadRequest("this is not a request line of HTTP/1.1: %s" % shortened(ascii(line)[2:-1]))


BARE_LF = re.compile(rb"(?<!\r)\n")


def cut_head(inbox: Any, seen: int = 0) -> Tuple[Optional[bytes], int]:
    """The head that a buffer begins with, None when more must come; and the bytes that are done with. Raises FarmError.

    *seen*: so many bytes were looked at before, in vain; they are not looked at again, so that a head
    that comes byte by byte costs no more than its length. What can never become a request (TLS, lines
    ended by a bare LF, too much of anything) is refused as soon as it shows, not when its time is over.
    """
    start = 0
    while inbox.startswith(b"\r\n", start):     # RFC 9112, 2.2: empty lines before a request are ignored
        start += 2
    seen = max(start, seen - 3)
    end = inbox.find(b"\r\n\r\n", seen, HEAD_LIMIT + start + 4)
    if end >= 0:
        return bytes(inbox[start:end]), end + 4
    if seen == start and inbox[start:] != b"\r":
        if len(inbox) > start and not re.match(TOKEN, inbox[start:start + 1]):
            raise malformed_line(bytes(inbox[start:start + LINE_LIMIT]).partition(b"\n")[0])
    bare = BARE_LF.search(inbox, seen, HEAD_LIMIT + start)
    if bare:
        first, mark, _ = bytes(inbox[start:bare.end()]).partition(b"\r\n")
        raise BadRequest("lines end with CR LF, not with LF alone") if mark else malformed_line(first[:-1])
    line = max(inbox.rfind(b"\n") + 1, start)
    if len(inbox) - line > LINE_LIMIT:
        raise HeadTooLarge("a header line has at most %d bytes" % LINE_LIMIT) if line > start else malformed_line(
            bytes(inbox[line:]))
    if len(inbox) - start >= HEAD_LIMIT:
        raise HeadTooLarge("a request has at most %d bytes before its body" % HEAD_LIMIT)
    return None, start


def no_constant(text: str) -> None:
    """Python reads NaN and Infinity as numbers; JSON has none (RFC 8259, section 6)."""
    raise ValueError("%s is not JSON" % text)


def short_integer(text: str) -> int:
    """An integer of a few digits: Python takes 40 ms to read one of 64 000, before 3.9.14 also longer ones."""
    if len(text) > MOST_DIGITS:
        raise ValueError("a number has %d digits" % len(text))
    return int(text)


MOST_DIGITS = 400
ZEROS = bytes.maketrans(b"123456789", b"000000000")
DECODER = json.JSONDecoder(parse_constant=no_constant)
CAREFUL_DECODER = json.JSONDecoder(parse_constant=no_constant, parse_int=short_integer)     # some 10 % slower


def decoder_for(body: bytes) -> json.JSONDecoder:
    """What reads a body: a decoder that counts digits where many come one after the other."""
    many = len(body) > MOST_DIGITS and b"0" * MOST_DIGITS in body.translate(ZEROS)
    return CAREFUL_DECODER if many else DECODER


def read_body(route: Route, body: bytes) -> Dict[str, Any]:
    """The fields of a JSON body, each checked, not to be changed. Raises BadRequest, naming the field.

    Of a field that comes twice, in an entry too, the last counts. To refuse it needs json's object_pairs_hook: 1 % of
    a single report's time, but 4 to 9 % of that of a large batch.
    Workers say the same with each request, so short bodies are read once: 2 of 5 microseconds.
    """
    if len(body) > BODY_LIMIT:
        slices = read_large_body(route, body)
        while True:
            try:
                next(slices)
            except StopIteration as end:
                fields: Dict[str, Any] = end.value
                return fields
    return read_body_again(route, body) if len(body) <= 200 and route.access == USER else read_new_body(route, body)


def read_new_body(route: Route, body: bytes) -> Dict[str, Any]:
    """The same, of a body that is read for the first time; says what was expected of the field."""
    if not body and not any(field.required for field in route.body.values()):
        return {}
    try:
        content = decoder_for(body).decode(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRequest("the body is not UTF-8")
    except RecursionError:
        raise BadRequest("the body is nested too deep")
    except ValueError as error:
        raise BadRequest("the body is not JSON: %s" % shortened(str(error)) if body else
                         "this request needs a JSON object with %s" % ", ".join(route.body))
    if not isinstance(content, dict):
        raise BadRequest("the body must be a JSON object")
    return checked(route.body, content, "field")


read_body_again = functools.lru_cache(maxsize=4096)(read_new_body)


def read_large_body(route: Route, body: bytes) -> Generator[None, None, Dict[str, Any]]:
    """The same in slices of about a millisecond, so that others' requests come between; a generator that returns it.

    4 MiB of [],[],... held the interpreter for 0.3 s when json read them in one call.
    """
    try:
        text = LargeJson(body.decode("utf-8").rstrip(" \t\n\r"), decoder_for(body))
    except UnicodeDecodeError:
        raise BadRequest("the body is not UTF-8")
    if not text.took("{"):
        raise BadRequest("the body must be a JSON object")
    result: Dict[str, Any] = {}
    closed = text.took("}")
    while not closed:
        name = text.value()
        if not isinstance(name, str) or not text.took(":"):
            raise text.wrong()
        field = route.body.get(name)
        if field is None:
            raise unknown(name, route.body, "field")
        if isinstance(field, Entries) and text.took("["):
            reading = EntriesRead(field, name)
            ended = text.took("]")
            while not ended:
                reading.add(text.values())
                yield
                ended = text.took("]")
                if not ended and not text.took(","):
                    raise text.wrong()
            result[name] = reading.end()
        else:
            result[name] = field.check(name, text.value())
            yield
        closed = text.took("}")
        if not closed and not text.took(","):
            raise text.wrong()
    if not text.ended():
        raise text.wrong()
    for name, field in route.body.items():
        if field.required and name not in result:
            raise missing(name, field, "field")
    return result


class LargeJson:
    """JSON text that is read value by value. Each step looks at a window of the text, however long a value is."""
    WINDOW = 16 * 1024              # characters decoded by one call: a millisecond for any content
    LOOSE_WINDOW = 4 * 1024         # and decoded value by value
    LONGEST = 64 * 1024             # characters of a value, and of blanks between two

    def __init__(self, text: str, decoder: json.JSONDecoder) -> None:
        self.text = text
        self.decoder = decoder
        self.at = 0

    def wrong(self) -> BadRequest:
        """The error for text that is no JSON from here on."""
        return BadRequest("the body is not JSON at character %d" % self.at)

    def took(self, mark: str) -> bool:
        """Whether that mark comes next; if so, it is behind us."""
        self.at = blanks(self.text, self.at, self.at + self.LONGEST).end()
        if not self.text.startswith(mark, self.at):
            return False
        self.at += len(mark)
        return True

    def ended(self) -> bool:
        """Whether nothing comes any more."""
        return self.took("") and self.at == len(self.text)

    def value(self) -> Any:
        """The next value, of any type."""
        self.took("")
        value, length = self._scan(self.text[self.at:self.at + self.LONGEST], 0)
        self.at += length
        return value

    def values(self) -> List[Any]:
        """Some of the values that come next, at least one, with commas between them.

        A window that ends behind a "}" is decoded as an array by one call: that is right whenever it is JSON, since
        it is read from left to right. Otherwise (the "}" stands in a text, or deeper) its values are read one by one.
        """
        window = self.text[self.at:self.at + self.WINDOW]
        cut = max(window.rfind('},{"'), window.rfind('}, {"'))      # stands in hardly any text: its quote would end it
        length = (cut if cut >= 0 else window.rfind("},")) + 1
        if length:
            try:
                values: List[Any] = self.decoder.decode("[%s]" % window[:length])
                self.at += length
                return values
            except (ValueError, RecursionError):
                pass
        self.took("")
        return self._values_one_by_one(self.text[self.at:self.at + self.LONGEST])

    def _values_one_by_one(self, window: str) -> List[Any]:
        value, end = self._scan(window, 0)
        values = [value]
        while True:
            comma = blanks(window, end).end()
            start = blanks(window, comma + 1).end()
            if not window.startswith(",", comma) or start > self.LOOSE_WINDOW:
                self.at += end
                return values
            value, end = self._scan(window, start)
            values.append(value)

    def _scan(self, window: str, at: int) -> Tuple[Any, int]:
        """The value that begins there in a window of the text, and where it ends."""
        try:
            found: Tuple[Any, int] = self.decoder.scan_once(window, at)     # type: ignore[attr-defined]
            return found
        except RecursionError:
            raise BadRequest("the body is nested too deep")
        except (ValueError, StopIteration):
            cut = self.at + len(window) < len(self.text)
            self.at += at
            raise self.wrong() if not cut else BadRequest(
                "the body is not JSON at character %d, or a value there has more than %d characters" % (
                    self.at, self.LONGEST - self.LOOSE_WINDOW))


blanks: Callable[..., Any] = re.compile(r"[ \t\n\r]*").match


def read_query(route: Route, target: str) -> Dict[str, Any]:
    """The parameters of a query, each checked. Raises FarmError."""
    query = target.partition("?")[2]
    try:
        pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=20)
    except ValueError:
        raise BadRequest("the query cannot be read: it is NAME=VALUE&..., percent-encoded UTF-8")
    content = dict(pairs)
    if len(content) < len(pairs):
        raise BadRequest("a query parameter comes twice")
    return checked(route.query, content, "query parameter")


def checked(fields: Dict[str, Field], content: Dict[str, Any], kind: str) -> Dict[str, Any]:
    """What was sent, each value checked. Raises for what is unknown, missing or wrong."""
    result = {}
    for name, value in content.items():
        field = fields.get(name)
        if field is None:
            raise unknown(name, fields, kind)
        result[name] = field.check(name, value)
    for name, field in fields.items():
        if field.required and name not in result:
            raise missing(name, field, kind)
    return result


def unknown(name: str, fields: Dict[str, Field], kind: str) -> BadRequest:
    """The error for a field that is none."""
    return BadRequest("unknown %s %s: %s" % (kind, shortened(ascii(name)[1:-1]), (
        "known here: " + ", ".join(fields) if fields else "none is taken here")))


def missing(name: str, field: Field, kind: str) -> BadRequest:
    """The error for a field that was not sent."""
    return BadRequest("the %s %s is missing: %s" % (kind, name, field.expected))


# ---------------------------------------------------------------- CONNECTIONS
# A client's connection: bytes that came, a request in work, bytes that are to go; and the buffers and the log of them
# all. Knows bytes and times, and not in which order connections are served. All is for the I/O thread but
# Connection.deliver and AccessLog.
#
# Another phase of a connection: the names below; its deadline is set in Server.settle.

TLS_BYTE = b"\x16"                  # the first one of a client that speaks TLS (RFC 8446, section 5.1)
GUEST_PIECE = 16 * 1024             # bytes read at a time from a connection on which nobody has logged in
MOVED_BYTES = 16 * 1024             # fewer than that in STILL_S are as good as none
LOG_BYTES = 1024 * 1024             # of the access log that wait to be written

# What would let its reader in, of a target: a token, and user and password before the host.
SECRET_PART = re.compile(r"(?<=tf1\.)[^&/?]+|(?<=://)[^/?]+(?=@)")

# Phases of a connection; all but the first have a deadline. RENEWED: another deadline begins, whatever the phase.
IDLE, NEW, ARRIVING, ANSWERING, CLOSING, RENEWED = range(6)


class Connection:
    """A client's connection: bytes that came, a request in work, bytes that are to go."""
    __slots__ = ("server", "sock", "peer", "inbox", "seen", "outbox", "request", "skip", "reader", "reading", "working",
                 "rest", "streaming", "body_bytes", "busy", "operation", "in_line", "pending", "known", "paused",
                 "ending", "eof", "gone", "shut", "spoken", "phase", "watching", "held", "moved", "last", "tls",
                 "barred", "login", "caller")

    def __init__(self, server: "Server", sock: socket.socket, peer: str) -> None:
        self.server = server
        self.sock = sock
        self.peer = peer
        self.inbox: Any = b""           # bytes, or a bytearray while a request arrives in pieces
        self.seen = 0                   # bytes of it in which no end of a head was found
        self.outbox: Any = b""          # what the client has not taken yet
        self.request: Optional[Request] = None
        self.skip = 0                   # bytes to come of a body that nobody wants
        self.reader: Optional[Generator[None, None, Dict[str, Any]]] = None     # of a large body, slice by slice
        self.reading = 0                # bytes of that body
        self.working = 0                # bytes of a large body whose work is in hand elsewhere
        self.rest: Optional[Operation] = None       # gives the next piece of the answer
        self.streaming = False          # a piece of an answer was given, and not the last
        self.body_bytes = 0             # of an answer in pieces so far
        self.busy = False               # a request is in work elsewhere
        self.operation: Optional[Operation] = None  # by the store
        self.in_line = False            # it has a step to take
        self.pending: Optional[PendingHash] = None  # what it waits for
        self.known = False              # somebody has logged in on it
        self.paused = False             # not read from, since the buffers are full
        self.ending = False             # the last answer was given
        self.eof = False                # the client has sent all it will
        self.gone = False               # the client is not there any more
        self.shut = False               # we have said that we will send no more
        self.spoken = False
        self.phase = IDLE
        self.watching = 0               # what the selector waits for
        self.held = 0                   # bytes of buffers, as counted by the server
        self.moved = 0                  # bytes that the client sent or took since that was noted
        self.last = time.monotonic()    # when it spoke last
        self.tls: Optional[TlsEnd] = None           # where the client speaks TLS
        self.barred = False             # plain HTTP will not do: it goes from machine to machine
        self.login: Optional[Login] = None      # of its last request that had one,
        self.caller = NOBODY                    # and who that is for the store

    def send(self, reply: Reply) -> None:
        """Answer the request in work, or give the next piece of the answer. What the client does not take waits."""
        request = self.request
        if reply.rest is not None or self.streaming:
            data = self._render_piece(reply)
        else:
            keep = request is not None and request.keep and not self.ending and not self.server.stopping
            data = render(reply, None if keep and request and request.minor else keep,
                          request is not None and request.method == "HEAD")
            if not keep:
                self.ending = True
        self.put(data if self.tls is None else self.tls.encrypt(data))
        if not self.streaming:
            if self.server.access is not None:
                self.server.note_access(self, reply)
            self.request = None

    def put(self, data: bytes) -> None:
        """Send bytes as they are. What the client does not take waits."""
        if self.outbox:     # what TLS has to say of itself: an answer of ours waits until the outbox is empty
            self.outbox = memoryview(bytes(self.outbox) + data)
            return
        try:
            sent = self.sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.gone = True
            return
        if sent < len(data):
            self.outbox = memoryview(data)[sent:]
            self.moved = MOVED_BYTES        # the time to take it begins

    def _render_piece(self, reply: Reply) -> bytes:
        """The bytes of a piece of the answer, before the first of them those of the head."""
        request = self.request
        assert request is not None
        chunks, bodiless = request.minor > 0, request.method == "HEAD"
        if self.streaming:
            data = render_piece(reply, chunks)
        else:
            keep = request.keep and chunks and not self.ending and not self.server.stopping
            data = render(reply, None if keep else False, bodiless, chunks)
            self.ending = not keep
            self.body_bytes = 0
        self.body_bytes += len(reply.body)
        self.rest = None if bodiless else reply.rest
        self.streaming = self.rest is not None
        return data

    def deliver(self, named: Operation, outcome: Any) -> None:
        """Have the outcome of an operation shown and sent. For the writer."""
        self.server.outcomes.append((self, named, outcome))
        self.server.wake()

    def receive(self) -> None:
        """Read what has come."""
        try:
            data = self.sock.recv(65536 if self.known and self.tls is None else GUEST_PIECE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.gone = True
            return
        if data and self.tls is not None:
            data = self._decrypt(self.tls, data)
            if not data:
                return
        if not data:
            self.eof = True
        elif self.ending:
            pass        # it may still be writing what we do not want; closing at once would reset our answer away
        elif self.inbox:
            if isinstance(self.inbox, bytes):
                self.inbox = bytearray(self.inbox)
            self.inbox += data
            self.moved += len(data)
        else:
            self.inbox = data

    def speaks_tls(self) -> bool:
        """Whether the client speaks TLS, as its first byte tells."""
        if self.tls is None and not (self.spoken or self.inbox):
            with contextlib.suppress(OSError):      # what is wrong with it shows when it is read
                if self.sock.recv(1, socket.MSG_PEEK) == TLS_BYTE:
                    self.tls = TlsEnd(self.server.context)
        return self.tls is not None

    def _decrypt(self, tls: TlsEnd, data: bytes) -> bytes:
        """The bytes that are meant by those that came; b"" when there are none."""
        content = b""
        try:
            content = tls.decrypt(data)
            self.eof = tls.ended
        except ssl.SSLError:
            self.gone = True
        answer = tls.outgoing.read()
        if answer:
            self.put(answer)
        return content

    def end_sending(self) -> None:
        """Tell the client that no more comes. Raises OSError when it is not there any more."""
        if self.tls is not None:
            self.sock.send(self.tls.close_notify())
        self.sock.shutdown(socket.SHUT_WR)

    def take(self, count: int) -> bytes:
        """Take bytes from the buffer."""
        inbox = self.inbox
        data = bytes(inbox[:count])
        if count >= len(inbox):
            self.inbox = b""
        elif len(inbox) > 4096:     # each step of many would copy all that is left
            if isinstance(inbox, bytes):
                self.inbox = inbox = bytearray(inbox)
            del inbox[:count]
        else:
            self.inbox = inbox[count:]
        return data

    def flush(self) -> None:
        """Send what the client did not take before."""
        try:
            sent = self.sock.send(self.outbox)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.gone = True
            return
        self.outbox = self.outbox[sent:]
        self.moved += sent
        self.phase = RENEWED


class Buffers:
    """Counts the bytes that connections hold, and knows whose client has moved nothing for the longest time."""

    def __init__(self) -> None:
        self.total = 0
        self.order: Dict[Connection, float] = {}    # to the tick of the last move, the longest ago first

    def hold(self, connection: Connection, held: int, tick: float) -> None:
        """Note how much a connection holds."""
        self.total += held - connection.held
        connection.held = held
        if not held:
            self.order.pop(connection, None)
        elif connection.moved >= MOVED_BYTES or connection not in self.order:
            self.order.pop(connection, None)
            self.order[connection] = tick
            connection.moved = 0


class PendingHash:
    """A password that is to be hashed, and who waits for it."""

    def __init__(self, needs: NeedsHash, network: str) -> None:
        self.network = network      # of who sent it first
        self.key = needs.key
        self.work = needs.work
        self.waiting: Set[Connection] = set()


class AccessLog:
    """Writes lines from a thread of its own, so that a reader that has stopped holds up no request.

    *file*: as open() gives it. Of what waits more than LOG_BYTES is lost; how many lines is said where they lack.
    """
    def __init__(self, file: Any) -> None:
        self.file = file
        self.lines: List[str] = []      # of this turn
        self.lost = 0
        self.handed = self.written = 0  # bytes, each counted by one thread
        self.blocks: Works = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._write, name="access log", daemon=True)
        try:
            # Not through its buffer: a thread that waits there at the end makes Python abort.
            self.descriptor: Optional[int] = file.fileno()
        except (AttributeError, OSError):
            self.descriptor = None

    def note(self, line: str) -> None:
        """Have a line written."""
        if self.handed - self.written >= LOG_BYTES:
            self.lost += 1
            return
        if self.lost:
            line = "# %d lines are lost here: nobody took them in time\n%s" % (self.lost, line)
            self.lost = 0
        self.lines.append(line)
        self.handed += len(line)

    def pass_on(self) -> None:
        """Hand the lines of a turn to the thread."""
        if self.lines:
            self.blocks.put("".join(self.lines))
            self.lines = []

    def _write(self) -> None:
        for block in iter(self.blocks.get, None):
            with contextlib.suppress(OSError, ValueError):      # a log that cannot be written must not stop the farm
                if self.descriptor is None:
                    self.file.write(block)
                    self.file.flush()
                else:
                    left = block.encode("utf-8", "replace")
                    while left:
                        left = left[os.write(self.descriptor, left):]
            self.written += len(block)

    def close(self) -> None:
        """Write what waits, unless nobody takes it."""
        self.pass_on()
        self.blocks.put(None)
        self.thread.join(1.0)


def from_this_machine(peer: str, own: str) -> bool:
    """Whether a connection does not leave the machine, by the addresses of its two ends."""
    address = ipaddress.ip_address(peer)
    return peer == own or (getattr(address, "ipv4_mapped", None) or address).is_loopback


# ---------------------------------------------------------------- SERVER
# The one thread that serves all connections in turn (the I/O thread). Knows bytes and times, no run and no task.
#
# The I/O thread owns the selector and all connections: it accepts, reads, parses, shows and sends. A handler does not
# wait: it gives a reply, or names a store operation, whose outcome the writer hands back after COMMIT. (Previously the
# writer sent the answers itself: each of its system calls passed the interpreter back and forth, and 64 clients got
# 16 000 requests a second, not 23 000.)
#
# Nobody makes others wait. In each turn of the thread a connection takes one step: a request, or a slice of a large
# body. What it has besides waits in a line. Each line, and the outcomes that the writer handed back, have TURN_S in a
# turn; of the big answers one is shown. When a line is not done then, the writer may commit first. What
# may wait for a disk or takes long goes to threads of its own: password hashes, the access log, Reply.first. A new
# limit in time or bytes belongs into the table below.

TURN_S = 0.005                      # for each line, and for outcomes, in each turn
MOST_HANDSHAKES = 2000              # at a time: an honest client answers within the time of some tens of others
DIRECT_BYTES = 4096                 # a request of a user that is no longer is served without waiting in line,
DIRECT_AT_ONCE = 64                 # unless so many come in one turn and TURN_S is over
ACCEPTS = 64                        # new connections in a turn
BIG_AT_ONCE = 4                     # big answers that the store is asked for at a time,
BIG_S = 0.1                         # not counting those that it has not given after so long: a restart may hold them up
GUEST_LIMIT = 4 * 1024 * 1024       # bytes in the buffers of all connections on which nobody has logged in
STILL_S = 0.5                       # when the buffers are full, who has moved fewer than MOVED_BYTES in it is closed
MOST_HASHES = 8                     # passwords that wait to be hashed, by two threads, 50 ms each;
HASHES_OF_ADDRESS = 4               # and of those, from one address
MOST_HOSTS = 64                     # that are remembered
LEFT_S = 1.0                        # who has sent an end, and waits so long for the store, is taken for gone
LINGER_S = 0.05                     # what a client had sent arrives within that; a stopping server waits for it

Works = Any     # a SimpleQueue of functions to call, ended by None; Python 3.9's class takes no parameters


class Server(ThreadingHTTPServer):
    """The HTTP server. `serve_forever` is the I/O thread.

    *address*: (host, port), port 0 picks one. *farm*: what handlers work with; its `who` gives a Login for an
    Authorization field and an address, its `judge` looks at one again, its `admit` tells who that is for the store, its
    `network` what counts as one address; its `submit` takes operations, its `stop_waiting` has those refused that wait
    for others, its `wait_for_commit` waits for its writer.
    *context*: for TLS. *access*: a file that gets a line for each request, or None. *plain_http*: from other machines
    too. *names*: of this server, in small letters, for check_host. Raises OSError when the address cannot be had.
    """
    request_queue_size = 1024           # the default of 5 made a burst of workers wait seconds for a SYN sent again
    allow_reuse_address = True

    def __init__(self, address: Tuple[str, int], farm: Any, routes: Routes, context: ssl.SSLContext,
                 access: Any = None, plain_http: bool = False, names: FrozenSet[str] = frozenset()) -> None:
        self.farm = farm
        self.context = context          # of new connections
        self.plain_http = plain_http
        self.routes = routes
        self.names = names
        self.hosts: Set[Optional[bytes]] = set()        # Host fields that were accepted
        self.access = None if access is None else AccessLog(access)
        self.clock: Callable[[], Now] = farm.clock
        self.selector: selectors.BaseSelector = selectors.DefaultSelector()
        self.connections: Set[Connection] = set()
        self.deadlines: Dict[Connection, float] = {}    # tick by connection; all wait equally long, so in order
        self.left: Dict[Connection, float] = {}         # have sent an end and wait for the store, since that tick
        # Connections with a step to take: of users, a small one or one of a large body; and of those without a login.
        self.small: "deque[Connection]" = deque()
        self.large: "deque[Connection]" = deque()
        self.guest: "deque[Connection]" = deque()
        self.lines = (self.small, self.large, self.guest)
        self.working = 0                # bytes of large bodies whose work is in hand
        self.direct_end = 0.0           # the tick until which this turn serves without the line
        self.outcomes: "deque[Tuple[Connection, Operation, Any]]" = deque()     # from the writer
        self.operations: List[Operation] = []           # named in this turn
        self.big_waiting: "deque[Tuple[Connection, Operation]]" = deque()   # with big answers, not asked for yet
        self.big_asked: Dict[Operation, float] = {}                     # and those that were, with the tick
        self.big_outcomes: "deque[Tuple[Connection, Operation, Any]]" = deque()
        self.users = Buffers()
        self.guests = Buffers()
        self.bodies: Dict[Connection, None] = {}        # arriving, the first one first
        self.paused: Dict[Connection, None] = {}
        self.handshakes: Dict[Connection, None] = {}       # in a TLS handshake that has begun, the oldest first
        self.closed_still = False       # the buffers were full, and it was said
        self.posted: "deque[Callable[[], None]]" = deque()
        self.woken = False
        self.waking = threading.RLock()     # a signal handler may post in the middle of a post
        self.stopping = False
        self.stop_by = math.inf
        self.quiet = False              # nothing came during LINGER_S
        self.listening = True           # the selector watches the listener
        self.listen_again = 0.0         # the tick from which it may, when it does not
        self.full_at = 0                # so many connections when no descriptor was left; 0: there are some
        self.hashes: Dict[bytes, PendingHash] = {}
        self.hashing: Works = queue.SimpleQueue()       # passwords: two threads
        self.firsts: Works = queue.SimpleQueue()        # Reply.first, which may hang with a home directory: one thread
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_read, False)
        os.set_blocking(self.wake_write, False)
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, None)     # type: ignore[arg-type]
        self.socket.setblocking(False)
        # Accepted sockets inherit these, which saves four system calls each.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in (("TCP_KEEPIDLE", 120), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                self.socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)

    def start_threads(self) -> None:
        """Start what may take long: all threads are there before the first request, so none is refused later."""
        for name, works in (("hash", self.hashing), ("hash", self.hashing), ("first", self.firsts)):
            threading.Thread(target=self._work_slowly, args=(works,), name=name, daemon=True).start()
        if self.access is not None:
            self.access.thread.start()

    def server_bind(self) -> None:
        """Bind, without the look-up of the host's name that hangs on a node without DNS."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]    # type: ignore[assignment]

    def serve_forever(self, poll_interval: float = 3600.0) -> None:
        """Serve until `stop`; wakes only when there is something to do."""
        self.selector.register(self.socket, selectors.EVENT_READ, self.accept)
        self.selector.register(self.wake_read, selectors.EVENT_READ, self._on_wake)
        if threading.current_thread() is threading.main_thread():
            # A signal that comes just before the wait for events, or to another thread, must end the wait too.
            signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        while not self._ended():
            self.turn(self._wait_s(poll_interval))
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
        for connection in list(self.connections):
            self.close_connection(connection)
        for works in (self.hashing, self.hashing, self.firsts):
            works.put(None)
        if self.access is not None:
            self.access.close()

    def turn(self, wait_s: float) -> None:
        """One turn of the I/O thread, after waiting so long for something to come."""
        events = self.selector.select(wait_s)
        self.quiet = not events and wait_s >= LINGER_S
        if len(events) > DIRECT_AT_ONCE:
            self.direct_end = self.clock().tick + TURN_S
        for key, mask in events:
            if isinstance(key.data, Connection):
                self._meet(key.data, mask)
            else:
                key.data()
        self.direct_end = 0.0
        if self.outcomes or self.big_outcomes:
            self._show_outcomes()
        if any(self.lines):
            for line in self.lines:
                self._serve_line(line)
            if any(self.lines):
                self.farm.wait_for_commit(TURN_S)
        if self.deadlines:
            self._expire()
        if self.left:
            self._close_those_who_left()
        if self.guests.total > GUEST_LIMIT or self.paused or self.big_waiting or self.users.total > BUFFER_LIMIT // 2:
            self._look_at_buffers()
        if not self.listening and self.clock().tick >= self.listen_again and not self.stopping:
            self._listen(True)
        if self.operations:
            # All at once, and last: a writer that is woken before has to wait for the interpreter again.
            self.farm.submit(self.operations)
            self.operations = []
        if self.access is not None:
            self.access.pass_on()

    def _meet(self, connection: Connection, mask: int) -> None:
        """Something can be read or sent."""
        if not connection.watching:
            return      # closed since the selector looked
        if mask & selectors.EVENT_WRITE:
            connection.flush()
        if mask & selectors.EVENT_READ:
            self._read(connection)
            if connection.eof and connection.operation is not None:
                self.left[connection] = self.clock().tick
        if not (connection.in_line or connection.busy):
            # Small requests of users at once. What may take longer, and who has no login, has the time of a line.
            if connection.known and len(connection.inbox) <= DIRECT_BYTES and self._direct():
                self.advance(connection)
            else:
                self._join(connection)
        self.settle(connection)

    def _read(self, c: Connection) -> None:
        """Read what has come. Of a guest who speaks TLS it is read in line: a handshake takes a millisecond."""
        if not c.known and c.speaks_tls():
            self._join(c)
            self._watch(c)
        else:
            c.receive()

    def _direct(self) -> bool:
        """Whether there is time to serve without the line: always, unless very many come in one turn."""
        return not self.direct_end or self.clock().tick < self.direct_end

    def _join(self, connection: Connection) -> None:
        """Let a connection wait for its next step, in the line of its kind."""
        if not connection.in_line:
            connection.in_line = True
            small = connection.reader is None and len(connection.inbox) <= DIRECT_BYTES
            (self.guest if not connection.known else self.small if small else self.large).append(connection)

    def _serve_line(self, line: "deque[Connection]") -> None:
        """A step for each that waits, the longest waiting first, until the time of this turn is over."""
        end = self.clock().tick + TURN_S
        while line:
            connection = line.popleft()
            connection.in_line = False
            if connection in self.connections:
                self.advance(connection)
                self.settle(connection)
            if self.clock().tick >= end:
                return

    def _show_outcomes(self) -> None:
        """Answer with what the writer handed back, until the time of this turn is over; and give one big answer."""
        end, shown = self.clock().tick + TURN_S, 0
        while self.outcomes:
            connection, named, outcome = self.outcomes.popleft()
            if named.big_answer:
                self.big_asked.pop(named, None)
                self.big_outcomes.append((connection, named, outcome))
            else:
                self._show(connection, named, outcome)
            shown += 1
            if not shown & 3 and self.clock().tick >= end:      # a look at the clock costs one in a hundred answers
                break
        if self.big_outcomes:
            self._show(*self.big_outcomes.popleft())

    def _show(self, connection: Connection, named: Operation, outcome: Any) -> None:
        if connection not in self.connections:
            return
        connection.operation = None
        self.left.pop(connection, None)
        try:
            if isinstance(outcome, BaseException):
                raise outcome
            reply = named.show(outcome, *named.extra)   # type: ignore[misc]
        except Exception as error:
            reply = failure(error)
        if reply.first is not None:
            self.firsts.put(functools.partial(self._do_first, connection, reply))
        else:
            self._give(connection, reply)

    def _do_first(self, connection: Connection, reply: Reply) -> None:
        """Do what is to be done before a reply is sent. In a thread of its own."""
        try:
            reply.first()   # type: ignore[misc]
        except Exception as error:
            reply = failure(error)
        self.post(functools.partial(self._give, connection, reply))

    def _give(self, connection: Connection, reply: Reply) -> None:
        if connection in self.connections:
            if connection.streaming and reply.status >= 300:    # too late to say it: an answer without an end tells
                connection.gone = True
            else:
                connection.send(reply)
            self._resume(connection)

    def _resume(self, connection: Connection) -> None:
        """Go on with what comes after work that was done elsewhere."""
        connection.busy = False
        self._work_is_over(connection)
        if connection.inbox or connection.request is not None:
            self._join(connection)
        self.settle(connection)

    def _work_is_over(self, connection: Connection) -> None:
        """What a large body has become is not in memory any more."""
        self.working -= connection.working
        connection.working = 0

    def _wait_s(self, longest: float) -> float:
        if any(self.lines) or self.outcomes or self.big_outcomes or self.posted:
            return 0.0
        if self.stopping:
            return LINGER_S
        if self.big_waiting or self.paused:
            longest = 0.1
        first = next(iter(self.deadlines.values()), math.inf)
        if not self.listening:
            first = min(first, self.listen_again)
        if self.left:
            first = min(first, next(iter(self.left.values())) + LEFT_S)
        return longest if first == math.inf else max(0.0, min(longest, first - self.clock().tick))

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake_read, 4096)
        self.woken = False
        while self.posted:
            self.posted.popleft()()

    def post(self, what: Callable[[], None]) -> None:
        """Have the I/O thread do something short. For any thread, and for signal handlers."""
        self.posted.append(what)
        self.wake()

    def wake(self) -> None:
        """End the wait for events. For any thread, and for signal handlers."""
        if not self.woken:
            with self.waking:       # or the descriptor might be closed, and another's, by the time of the write
                if not self.woken:
                    self.woken = True
                    with contextlib.suppress(BlockingIOError):
                        os.write(self.wake_write, b"\0")

    def stop(self) -> None:
        """Stop accepting, send the answers in hand, then let `serve_forever` return. For any thread and signal."""
        self.post(self._begin_stop)

    def _begin_stop(self) -> None:
        """What came before is answered, and each connection ends with its answer or without one, but is not reset."""
        if self.stopping:
            return
        self.accept(self.request_queue_size)
        self.stopping = True
        self.stop_by = self.clock().tick + DRAIN_S
        self.farm.stop_waiting()
        self._listen(False)
        self.socket.close()
        for connection in list(self.connections):
            if connection.watching & selectors.EVENT_READ:
                self._read(connection)
            if connection.inbox and not (connection.busy or connection.outbox):
                self._join(connection)
            self.settle(connection)

    def _listen(self, listening: bool) -> None:
        """Watch the listener or not. At the descriptor limit to watch it would be to spin."""
        if listening and not self.listening:
            self.selector.register(self.socket, selectors.EVENT_READ, self.accept)
        elif self.listening and not listening:
            self.selector.unregister(self.socket)
        self.listening = listening

    def _ended(self) -> bool:
        if not self.stopping or self.clock().tick >= self.stop_by:
            return self.stopping
        return (self.quiet or not self.connections) and not any(map(self._at_work, self.connections))

    def _at_work(self, c: Connection) -> bool:
        """Whether a connection waits for us, or has an answer to come."""
        return bool(c.busy or c.outbox or c.in_line or c.rest is not None)

    def server_close(self) -> None:
        """Give back all descriptors, once `serve_forever` has returned."""
        super().server_close()
        self.selector.close()
        with self.waking:
            self.woken = True
            os.close(self.wake_read)
            os.close(self.wake_write)

    def accept(self, most: int = ACCEPTS) -> None:
        """Take connections that wait."""
        for _ in range(most):
            if not self.listening:
                return
            try:
                sock, address = self.socket.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._make_room(error)
                    return
                continue    # another error: the client has given up while it waited
            sock.setblocking(False)
            connection = Connection(self, sock, address[0])
            connection.barred = not (self.plain_http or from_this_machine(address[0], sock.getsockname()[0]))
            self.connections.add(connection)
            self.settle(connection)

    def _make_room(self, error: OSError) -> None:
        """At the descriptor limit: close those that were silent the longest; else do not watch the listener.

        Then those without a login: of half a head, or that wait for a password to be hashed.
        """
        if not select.select([self.socket], [], [], 0)[0]:
            return      # nobody waits: accept takes a descriptor before it looks
        if not self.full_at:
            self.full_at = len(self.connections)
            log.warning("no descriptor is left (%s) at %d connections: the longest idle are closed first; "
                        "raise 'ulimit -n' to keep them", error.strerror, self.full_at)
        now = time.monotonic()
        silent = sorted((c for c in self.connections if not (self._at_work(c) or c.inbox or c.request or c.skip)
                         and (c.spoken or now - c.last > ACCEPT_S)), key=lambda c: c.last)
        if not silent:
            silent = sorted((c for c in self.connections if not c.known and now - c.last > ACCEPT_S and (
                c.pending is not None or not self._at_work(c))), key=lambda c: c.last)
        for connection in silent[:1 + len(silent) // 64]:
            self.close_connection(connection)
        if not silent:
            self._listen(False)
            self.listen_again = self.clock().tick + ACCEPT_S

    def close_connection(self, connection: Connection) -> None:
        """Close and forget."""
        c = connection
        if c.watching:
            self.selector.unregister(c.sock)
            c.watching = 0
        self._work_is_over(c)
        for memory in (self.deadlines, self.left, self.bodies, self.paused, self.handshakes):
            memory.pop(c, None)
        if c.operation is not None:
            c.operation.unwanted = True
        (self.users if c.known else self.guests).hold(c, 0, 0.0)
        if c.pending is not None:
            self._wait_no_more(c)
        self.connections.discard(c)
        c.sock.close()
        if not self.stopping:
            self._listen(True)
        if len(self.connections) < self.full_at * 3 // 4:
            self.full_at = 0
            log.warning("descriptors are free again")

    def settle(self, connection: Connection) -> None:
        """Bring selector, deadline and the sum of buffers in line with the state that a connection is in."""
        c = connection
        if (c.spoken and c.watching == selectors.EVENT_READ and (c.busy or c.request is None) and not (
                c.inbox or c.outbox or c.held or c.phase or c.skip or c.ending or c.eof or c.gone or self.stopping)):
            return      # the common case: between two requests, or one in work
        held = len(c.inbox) + c.reading + (len(c.outbox.obj) if c.outbox else 0)    # all of an answer is kept
        (self.users if c.known else self.guests).hold(c, held, self.clock().tick)
        waiting = not self._at_work(c)
        # One that waits for a hash and sends no more is taken for gone: those who guess do not stay for the answer.
        if c.gone or c.eof and (waiting or c.pending is not None):
            self.close_connection(c)
            return
        if waiting and self.stopping:
            c.ending = True
        if waiting and c.ending and not c.shut:
            c.shut = True
            with contextlib.suppress(OSError):
                c.end_sending()
        self._watch(c)
        if c.in_line and not c.known and c.phase in (NEW, ARRIVING):
            return      # or who sends a byte now and then would begin another deadline with each
        phase = (ANSWERING if c.outbox else IDLE if not waiting or c.paused else CLOSING if c.ending else
                 NEW if not c.spoken and not c.inbox else ARRIVING if c.inbox or c.request or c.skip else IDLE)
        if phase != c.phase:
            c.phase = phase
            self.deadlines.pop(c, None)
            if phase != IDLE:
                self.deadlines[c] = self.clock().tick + REQUEST_S

    def _watch(self, c: Connection) -> None:
        most = HEAD_LIMIT + (BODY_LIMIT if c.known else 0)
        if c.request is not None and c.request.admitted:
            most = max(most, HEAD_LIMIT + c.request.length)
        c.paused = bool(c.known and c.inbox and self.users.total + self.working > BUFFER_LIMIT and (
            self.working > BUFFER_LIMIT // 2 or c is not next(iter(self.bodies), None)))    # so that room comes
        if c.paused:
            self.paused[c] = None
        reading = not (c.eof or c.paused) and len(c.inbox) <= most
        if c.tls is not None and (c.outbox or c.in_line and not c.known):
            reading = False     # what is read may have to be answered at once; of guests it is read in line
        watching = (selectors.EVENT_READ if reading else 0) | (
            selectors.EVENT_WRITE if c.outbox else 0)
        if watching == c.watching:
            return
        if not watching:
            self.selector.unregister(c.sock)
        elif not c.watching:
            self.selector.register(c.sock, watching, c)
        else:
            self.selector.modify(c.sock, watching, c)
        c.watching = watching

    def _look_at_buffers(self) -> None:
        """Make room where buffers are full, let those go on who were paused, ask for big answers.

        Of those without a login, who has moved nothing for the longest time is closed at once. Of the
        others, who has moved nothing for STILL_S: the room goes to those who make progress. Big
        answers fill half of it at most, so that there is always some for requests.
        """
        tick, half = self.clock().tick, BUFFER_LIMIT // 2
        while self.guests.total > GUEST_LIMIT:
            self.close_connection(next(iter(self.guests.order)))
        for connection, moved in list(self.users.order.items()):
            if tick - moved < STILL_S or self.users.total < (half if self.big_waiting else BUFFER_LIMIT):
                break
            if connection.outbox or not (self._at_work(connection) or connection.paused):
                self.close_connection(connection)
                if not self.closed_still:
                    self.closed_still = True
                    log.warning("%d MiB wait in buffers: connections whose client takes or sends nothing are closed",
                                self.users.total >> 20)
        room = self.users.total + self.working < BUFFER_LIMIT * 3 // 4
        for connection in list(self.paused) if room else list(self.bodies)[:1]:
            if connection in self.paused:
                del self.paused[connection]
                connection.moved = MOVED_BYTES
                self.settle(connection)
        self.closed_still = self.closed_still and self.users.total > half // 2
        while self.big_waiting and self.users.total < half and self._may_ask(tick):
            connection, named = self.big_waiting.popleft()
            if connection in self.connections:
                self.big_asked[named] = tick
                self.operations.append(named)

    def _may_ask(self, tick: float) -> bool:
        """Whether the store may be asked for another big answer: few of them lie in memory."""
        asked = self.big_asked
        while asked and tick - next(iter(asked.values())) >= BIG_S:
            del asked[next(iter(asked))]
        return len(asked) + len(self.big_outcomes) < BIG_AT_ONCE

    def _expire(self) -> None:
        now = self.clock().tick
        while self.deadlines:
            connection, deadline = next(iter(self.deadlines.items()))
            if deadline > now:
                return
            del self.deadlines[connection]
            if connection.phase == ARRIVING and not connection.skip:
                connection.ending = True
                self._refuse(connection, RequestTimeout(
                    "the request was not whole %d s after its first byte" % REQUEST_S))
                self.settle(connection)
            else:
                self.close_connection(connection)

    def _close_those_who_left(self) -> None:
        """Close who has sent an end and waits long: what the store has not begun for it is unwanted.

        A client that has gone and one that only sends no more look the same. The one would be given a task that
        nobody computes; the other gets its answer if that comes soon.
        """
        tick = self.clock().tick
        for connection, since in list(self.left.items()):
            if tick - since < LEFT_S:
                return
            if connection.operation is not None and connection.operation.begun:
                del self.left[connection]
            else:
                self.close_connection(connection)

    def advance(self, connection: Connection) -> None:
        """Take one step: ask for the next piece of an answer, or serve a request; join the line if more is there."""
        c = connection
        if c.tls is not None and not (c.known or c.eof or c.outbox) and len(c.inbox) <= HEAD_LIMIT:
            c.receive()
            self._note_handshake(c, c.tls)
        if c.busy or c.outbox:
            return
        if c.rest is not None:
            self._ask(c, c.rest)
            return
        if c.skip:
            c.skip -= len(c.take(c.skip))
        if c.ending or c.skip or not c.inbox and c.request is None:
            return
        try:
            more = self._step(c)
        except Exception as error:
            self._refuse(c, error)
            more = True
        if more and (c.inbox or c.reader is not None or c.rest is not None) and not (c.busy or c.outbox):
            self._join(c)

    def _note_handshake(self, c: Connection, tls: TlsEnd) -> None:
        """End the handshake that is the oldest where there are too many: each has tens of KiB before any login."""
        if tls.established:
            self.handshakes.pop(c, None)
        else:
            self.handshakes[c] = None
            if len(self.handshakes) > MOST_HANDSHAKES:
                oldest = next(iter(self.handshakes))
                oldest.gone = True
                self.settle(oldest)

    def _step(self, c: Connection) -> bool:
        """One request's next step; False when more bytes must come."""
        request = c.request
        if request is None:
            if c.barred and c.tls is None:
                raise Forbidden("plain HTTP is for the server's own machine, since it can be read on the way: use "
                                "https:// in the address")
            head, taken = cut_head(c.inbox, c.seen)
            if taken:
                c.take(taken)
            c.seen = 0
            if head is None:
                c.seen = len(c.inbox)
                return False
            c.spoken = True
            request = c.request = Request(head)
            c.last = request.began
        if not request.admitted:
            try:
                self._admit(c, request)
            except NeedsHash as needs:
                self._await_hash(c, needs)
                return True
        if c.reader is not None:
            return self._read_slice(c, request)
        if len(c.inbox) < request.length:
            if request.expects and not c.inbox:
                request.expects = False
                go_on = b"HTTP/1.1 100 Continue\r\n\r\n"
                c.put(go_on if c.tls is None else c.tls.encrypt(go_on))
            self.bodies[c] = None
            return False
        body = b""
        if request.length:
            body = c.take(request.length)
            if c in self.bodies:        # the head came some time ago
                del self.bodies[c]
                if request.login is not None:
                    self.farm.judge(request.login, self.clock().utc)
        request.length, request.expects = 0, False      # what was read need not be skipped when it is refused
        route = request.route
        assert route is not None
        if len(body) > BODY_LIMIT:
            c.reader, c.reading = read_large_body(route, body), len(body)
        else:
            self._answer(c, request, read_body(route, body) if route.method != "GET" else {})
        return True

    def _read_slice(self, c: Connection, request: Request) -> bool:
        """Read a slice of a large body; after the last answer the request."""
        try:
            next(c.reader)      # type: ignore[arg-type]
        except StopIteration as end:
            c.reader, c.working, c.reading = None, c.reading, 0
            self.working += c.working
            self._answer(c, request, end.value)
        return True

    def _admit(self, c: Connection, request: Request) -> None:
        """Judge the head, in the contract's order. Raises FarmError or NeedsHash."""
        headers = request.headers
        if headers.get(b"host") not in self.hosts or b"origin" in headers or b"sec-fetch-site" in headers or (
                request.target[0] != "/"):
            check_site(request.target, headers, self.names)
            if len(self.hosts) >= MOST_HOSTS:
                self.hosts.clear()
            self.hosts.add(headers.get(b"host"))
        by_method, request.variables = self.routes.find(path_of(request.target))
        route = by_method.get("GET" if request.method == "HEAD" else request.method)
        if route is None or route.access != OPEN:
            authorization = request.headers.get(b"authorization")
            if authorization is None:
                raise Unauthorized()
            request.login = self.farm.who(authorization, c.peer)
            if request.login is not c.login:
                c.login, c.caller = request.login, self.farm.admit(request.login, c.peer)
            if not c.known:
                self.guests.hold(c, 0, 0.0)
                c.known = True
        if route is None:
            if not by_method:
                raise NotFound("there is nothing at %s: GET / says what there is" % shortened(path_of(request.target)))
            raise MethodNotAllowed(request.method, sorted([*by_method, *(["HEAD"] if "GET" in by_method else [])]))
        if request.login is not None:
            route.judge(request.login, request.variables)
        request.route = route
        if request.length < 0:
            raise LengthRequired("a body must come with a Content-Length, not chunked")
        if request.length > route.body_limit:
            raise TooLarge("a body has at most %d bytes here" % route.body_limit)
        if request.length and route.method != "GET":
            content_type = request.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if content_type != b"application/json":
                raise UnsupportedMediaType("a body must be declared 'Content-Type: application/json'")
        if request.expects and request.headers[b"expect"].lower() != b"100-continue":
            raise ExpectationFailed("of Expect, only 100-continue is known")
        request.admitted = True

    def _await_hash(self, c: Connection, needs: NeedsHash) -> None:
        """Let a connection wait until its password has been hashed, once for all that sent it. Raises Unavailable."""
        pending = self.hashes.get(needs.key)
        if pending is None:
            network = self.farm.network(c.peer)
            of_address = sum(pending.network == network for pending in self.hashes.values())
            if len(self.hashes) >= MOST_HASHES or of_address >= HASHES_OF_ADDRESS:
                error = Unavailable("%d other passwords are being checked, and each takes a while: try again in a "
                                    "second, or log in with a token, which takes none" % len(self.hashes))
                error.headers = (("Retry-After", "1"),)
                raise error
            pending = self.hashes[needs.key] = PendingHash(needs, network)
            self.hashing.put(functools.partial(self._hash, pending))
        pending.waiting.add(c)
        c.pending = pending
        c.busy = True

    def _wait_no_more(self, c: Connection) -> None:
        pending, c.pending = c.pending, None
        if pending is not None:
            pending.waiting.discard(c)
            if not pending.waiting and self.hashes.get(pending.key) is pending:
                del self.hashes[pending.key]

    def _hash(self, pending: PendingHash) -> None:
        """Hash a password, unless nobody waits for it any more. In a thread that hashes."""
        try:
            if pending.waiting:
                pending.work()
        finally:
            self.post(lambda: self._hashed(pending))

    def _hashed(self, pending: PendingHash) -> None:
        for connection in list(pending.waiting):
            self._wait_no_more(connection)
            self._resume(connection)

    def _work_slowly(self, works: Works) -> None:
        for work in iter(works.get, None):
            try:
                work()
            except Exception as error:
                failure(error)

    def _answer(self, c: Connection, request: Request, fields: Dict[str, Any]) -> None:
        route = request.route
        assert route is not None
        request.farm = self.farm
        if self.stopping:
            raise Unavailable("the server is stopping")
        request.fields = fields
        request.query = read_query(route, request.target) if "?" in request.target else {}
        answer = route.handler(request, *request.variables)
        if isinstance(answer, Operation):
            self._ask(c, answer)
        else:
            c.send(answer)
            c.phase = c.phase and RENEWED

    def _ask(self, c: Connection, named: Operation) -> None:
        """Have an operation run; its outcome is the answer, or the next piece of it."""
        c.busy = True
        c.operation = named
        if c.eof:
            self.left[c] = self.clock().tick
        named.done = c.deliver
        named.caller = c.caller if c.request and c.request.login else NOBODY
        if named.big_answer:
            named.came = self.clock().tick      # not only when the store is asked: it waits from here on
            self.big_waiting.append((c, named))
        else:
            self.operations.append(named)

    def _refuse(self, c: Connection, error: Exception) -> None:
        """Answer with an error; where the end of the request cannot be told, the connection ends with it."""
        request = c.request
        if request is None or not 0 <= request.length <= BODY_LIMIT or request.expects:
            c.ending = True
            c.inbox = b""
        else:
            c.skip = request.length
        self.bodies.pop(c, None)
        self._work_is_over(c)
        c.reader, c.reading = None, 0
        c.spoken = True
        c.send(failure(error))
        c.phase = c.phase and RENEWED

    def note_access(self, c: Connection, reply: Reply) -> None:
        """A line for the access log: who asked for what, the status, the bytes and the seconds it took."""
        request = c.request
        assert self.access is not None
        self.access.note('%s %s [%s] "%s" %d %d %.6f\n' % (
            c.peer, request.login.name if request and request.login else "-",
            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "%s %s" % (request.method, SECRET_PART.sub("***", request.target).replace('"', "%22")) if request else "-",
            reply.status,
            c.body_bytes or len(reply.body), time.monotonic() - request.began if request else 0.0))
        c.body_bytes = 0


# ---------------------------------------------------------------- API
# One function for each endpoint: take the fields, name one store operation, say how its result is shown. It must not
# know SQL or sockets, and it does not wait.
#
# Another endpoint: a line under "Endpoints" in the head of this file and one in README's table; a function here with
# @route, which says what its body and query may name; an operation in OPERATIONS or QUERIES. An operation of a user's
# POST goes through once(req, ...), or its Idempotency-Key is ignored; claims take the key themselves. It says which
# scope a token needs, and whether it checks the run that a token is for, see class Route. An answer that
# takes some milliseconds to show, of more than BIG_PAGE entries or BIG_BATCH tasks, is a big_answer. Another field of
# a report: in REPORT, which has the order of class Report, and in report_task.

ROUTES = Routes()
route = ROUTES.route


class Farm:
    """What handlers work with: the store, who may log in, the clock and the settings.

    *token_days*: how long a session lasts. *secret*: what local verbs show to log in. *private*: for users there are
    their own runs and workers alone.
    """
    def __init__(self, store: Store, secret: str, token_days: float = TOKEN_DAYS, private: bool = False) -> None:
        self.store = store
        self.clock = store.clock
        self.token_days = token_days
        self.private = private
        self.noted: Dict[Tuple[Optional[int], str], int] = {}       # user and address, to the day of the last login
        self.renewed: Callable[[User], None] = lambda _: None       # told of a user with a new password
        self.logins = Logins(lambda: store.users, store.signing_key, store.clock, secret, store.tokens)
        self.logins.failed = store.note_failed
        self.who, self.judge = self.logins.who, self.logins.judge
        self.submit = store.submit

    def caller(self, login: Login, address: str) -> Caller:
        """Who that is for the store."""
        user = login.user
        if user is None:
            return ADMINISTRATION._replace(address=address)
        return Caller(user.id, user.name, address, user.id if self.private else None,
                      login.token.run if login.token else None)

    def admit(self, login: Login, address: str) -> Caller:
        """The same for a login that a connection has not shown before: the first one of a day is written down."""
        caller, day = self.caller(login, address), int(self.clock().utc // DAY_S)
        key = caller.user, self.network(address)
        if self.noted.get(key) != day:
            if len(self.noted) >= LOGINS_REMEMBERED:
                self.noted.clear()
            self.noted[key] = day
            named = note_login()
            named.caller = caller

            def done(named: Operation, outcome: Any) -> None:
                if isinstance(outcome, Exception):      # a full disk: the next login is written down
                    self.noted.pop(key, None)
            named.done = done
            self.submit([named])
        return caller

    def network(self, address: str) -> str:
        """What is counted as one address: see `network_of`."""
        return self.logins.throttle.network(address)

    def wait_for_commit(self, seconds: float) -> None:
        """See `Store.wait_for_commit`."""
        self.store.wait_for_commit(seconds)

    def stop_waiting(self) -> None:
        """Have what waits for the restart of a run refused: the server stops. For any thread."""
        self.store.refuse_parked()

    def token(self, user: User, expires: float) -> str:
        """A session of a user; *expires* as in make_token."""
        return make_token(self.store.signing_key, user, expires)

    def token_text(self, token_id: int) -> str:
        """The text that stands for a token; always the same, so it is not kept anywhere."""
        return signed_token(self.store.signing_key, token_id)


def once(req: Request, named: Operation, *alike: Any) -> Operation:
    """The operation; with an Idempotency-Key, once for all requests that come with it. *alike*: see there."""
    key = idempotency_key(req, *alike)
    if key is None:
        return named

    def render(result: Any) -> Tuple[int, bytes]:
        assert named.show
        reply = named.show(result, *named.extra)
        return reply.status, reply.body
    return answer_once(key, named, render).shown_as(lambda answer: Reply(*answer))


def idempotency_key(req: Request, *alike: Any) -> Optional[IdempotencyKey]:
    """The Idempotency-Key of a request, which is its user's own, and what came with it; None without one.

    *alike*: what else must be the same when it comes again.
    """
    if not req.key:
        return None
    user_id = req.login.user.id if req.login and req.login.user else 0
    return IdempotencyKey(digest("%d %s" % (user_id, req.key)),
                          digest(encode_json([req.method, req.target, req.fields, *alike])))


@functools.lru_cache(maxsize=256)
def to_the_second(second: int) -> str:
    """A time without its fraction, made once a second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def shown_time(milliseconds: Optional[int]) -> Optional[str]:
    """Milliseconds since 1970 as RFC 3339 in UTC; None for none."""
    if milliseconds is None:
        return None
    second, fraction = divmod(milliseconds, 1000)
    return "%s.%03dZ" % (to_the_second(second), fraction)


def shown_seconds(utc: Optional[float]) -> Optional[str]:
    """Seconds since 1970 likewise."""
    return None if utc is None else shown_time(int(utc * 1000))


def run_json(run: Run) -> Dict[str, Any]:
    """A run as clients see it."""
    waiting, computing, done, failed = run.counts
    return {"id": run.id, "uuid": run.uuid, "numTasks": run.num_tasks, "percentDone": percent_done(run),
            "numWaiting": waiting, "numComputing": computing, "numDone": done, "numFailed": failed,
            "name": run.name, "user": run.user_name, "state": run.state, "after": run.after,
            "afterAny": bool(run.after_any), "maxFailures": run.limits.failures, "maxLosses": run.limits.losses,
            "created": shown_seconds(run.created), "lastReport": shown_seconds(run.last_report),
            "hasWork": bool(run.has_work)}


def percent_done(run: Run) -> float:
    """The mean of percentCompleted over all tasks; two exact integers are divided once."""
    return run.millionths / (run.num_tasks * 1000000)


def task_json(seen: ShownTask) -> Dict[str, Any]:
    """A task as clients see it."""
    task, worker = seen.task, seen.worker
    return {"id": task.id, "task": seen.number, "status": STATUS[task.status],
            "percentCompleted": task.millionths / 1000000, "attempt": task.attempt,
            "worker": worker and worker.uuid, "hostname": worker and worker.hostname,
            "failures": task.failures, "losses": task.losses, "started": shown_time(task.started),
            "finished": shown_time(task.finished), "exitCode": task.exit_code, "message": task.message,
            "memory": task.memory, "cpu": None if task.cpu_ms is None else task.cpu_ms / 1000, "log": task.log}


def worker_json(seen: ShownWorker) -> Dict[str, Any]:
    """A worker as clients see it."""
    worker = seen.worker
    return {"uuid": worker.uuid, "id": worker.id, "hostname": worker.hostname, "pid": worker.pid, "lease": worker.lease,
            "state": WORKER_STATE[worker.state], "heard": shown_seconds(seen.heard), "held": seen.held,
            "job": worker.job, "why": worker.why}


WORKER_STATE = ("alive", "expired", "signed off")


def show_run(run: Run, status: int, info: Optional[str] = None) -> Reply:
    """A run, or one of its figures."""
    shown = run_json(run)
    return json_reply(status, {info: shown[info]} if info else shown)


def show_task(task: ShownTask, status: int, info: Optional[str] = None) -> Reply:
    """A task, or one of its figures."""
    shown = task_json(task)
    if info:
        shown = {info: shown["percentCompleted" if info == "percentDone" else info]}
    return json_reply(status, shown)


def show_claimed(given: Union[ShownTask, NothingWaiting]) -> Reply:
    """The task that was claimed, or that none waits; task_json, at half the cost for the most frequent kind."""
    if isinstance(given, NothingWaiting):
        return show_nothing_waiting(given)
    task, number, worker = given
    used = task.memory, task.cpu_ms
    if worker is None or task.started is None or used != (None, None) or (
            task.finished, task.exit_code, task.message, task.log) != (None,) * 4:
        return show_task(given, 201)
    if not worker.shown:
        worker.shown = '"worker":%s,"hostname":%s' % (encode_json(worker.uuid), encode_json(worker.hostname))
    return Reply(201, (CLAIMED % (task.id, number, task.millionths / 1000000, task.attempt, worker.shown,
                                  task.failures, task.losses, shown_time(task.started))).encode())


CLAIMED = ('{"id":%d,"task":%d,"status":"computing","percentCompleted":%r,"attempt":%d,%s,"failures":%d,"losses":%d,'
           '"started":"%s","finished":null,"exitCode":null,"message":null,"memory":null,'
           '"cpu":null,"log":null}')


def show_batch(given: Union[List[Tuple[int, int, int]], NothingWaiting]) -> Reply:
    """The tasks that were claimed, or that none waits."""
    if isinstance(given, NothingWaiting):
        return show_nothing_waiting(given)
    return Reply(201, ('{"data":[%s]}' % ",".join([
        '{"task":%d,"attempt":%d,"percentCompleted":%r}' % (number, attempt, millionths / 1000000)
        for number, attempt, millionths in given])).encode())


def show_reported(taken: Tuple[int, Sequence[Tuple[int, str]]]) -> Reply:
    """How many reports were accepted, and those that were refused, encoded one by one.

    One call of the encoder for 10 000 took 8 ms, in which no other thread ran; so it takes 4.5, and others do.
    """
    return Reply(200, ('{"accepted":%d,"refused":[%s]}' % (taken[0], ",".join([
        '{"task":%d,"detail":%s}' % (number, encode_json(sentence)) for number, sentence in taken[1]]))).encode())


def show_nothing_waiting(given: NothingWaiting) -> Reply:
    """None waits; when some may come back, the clients are spread over the time after."""
    if given.retry_s is None:
        return Reply(204)
    wait_s = min(max(given.retry_s, 1.0), MAX_RETRY_AFTER_S * 0.75) * random.uniform(1.0, 4 / 3)
    return Reply(204, headers=(("Retry-After", "%d" % min(math.ceil(wait_s), MAX_RETRY_AFTER_S)),))


def show_page(page: Page, shown: Callable[[Any], Dict[str, Any]], head: Optional[Dict[str, Any]] = None) -> Reply:
    """A page of a list, after what *head* says; one call of the encoder for all would hold up every other thread."""
    before = encode_json(head)[:-1] + "," if head else "{"
    return Reply(200, (before + '"data":[' + ",".join([encode_json(shown(entry)) for entry in page.entries])
                       + '],"next":%s}' % encode_json(page.after)).encode())


def show_nothing(result: Any) -> Reply:
    """It is done, and there is nothing to say."""
    return Reply(204)


def task_number(text: str) -> int:
    """The number of a task in a path: ASCII digits. Raises NotFound."""
    if not (text.isascii() and text.isdigit()):
        raise NotFound("a task is named by its number in ASCII digits, not by %s" % shortened(ascii(text)))
    return int(text) if len(text) < 20 else 10 ** 20


PAGE: Dict[str, Field] = {"limit": Count(1, MAX_PAGE, required=False), "after": Count(0, 2 ** 62, required=False)}
BIG_PAGE = 100          # entries: the answers with more are shown one in each turn of the I/O thread
BIG_BATCH = 500         # tasks of a batch: likewise


def choices(*words: str) -> Dict[str, Any]:
    """Words that stand for themselves, and the empty one for none."""
    return dict({"": None}, **{word: word for word in words})


UUID_PATTERN = "[A-Za-z0-9._-]+"
UUID = Text(64, UUID_PATTERN)


@route("GET", "/livez", access=OPEN)
def alive(req: Request) -> Reply:
    """Tell a supervisor that the server answers.

    200: {"status": "alive"}
    """
    return json_reply(200, {"status": "alive"})


@route("GET", "/readyz", access=OPEN)
def ready(req: Request) -> Operation:
    """Tell a supervisor whether work can be written down.

    200: {"status": "ready"}
    errors: 503 the disk does not take a write, or the server is stopping
    """
    return probe().shown_as(lambda _: json_reply(200, {"status": "ready"}))


@route("GET", "/api/token", checks_run=True)
def give_token(req: Request) -> Reply:
    """A session for the user who asks; who shows a token, or a session, is given the same again.

    The published client asks for one at each start. So a session is no row of the file, and nobody gets from a token
    what would outlast it.

    200: {"token", "farm"}; farm is what clients know this farm by, wherever it is served
    """
    login, farm = user_of(req), req.farm
    if login.token:
        token = farm.token_text(login.token.id)
    else:
        days = farm.token_days
        token = farm.token(login.user, login.expires or (farm.clock().utc + days * DAY_S if days else 0))
    return json_reply(200, {"token": token, "farm": farm.store.identity})


def user_of(req: Request) -> Login:
    """The login of a request for what a user alone can have. Raises Forbidden for admin."""
    if req.login is None or req.login.user is None:
        raise Forbidden("a token stands for a user: ask for it as one")
    return req.login


def token_json(token: Token, name: str) -> Dict[str, Any]:
    """A token of the user of that name as clients see it: never the text that stands for it."""
    return {"id": token.id, "user": name, "scope": token.scope, "run": token.run, "label": token.label,
            "created": shown_seconds(token.created), "expires": shown_seconds(token.expires)}


@route("POST", "/api/tokens", body={
    "scope": Choice({scope: scope for scope in SCOPES}), "run": Text(64, UUID_PATTERN, required=False),
    "days": Integer(1, MAX_TOKEN_DAYS, required=False), "label": Text(LABEL_LIMIT, required=False)})
def new_token(req: Request) -> Operation:
    """Make a token: for one run or all, for some days or until it is revoked; label says what it is for.

    One that is made with a token, or in a session, lasts no longer than that.

    201: the token, {"id", "user", "scope", "run", "label", "created", "expires", "token"}; only here is the last shown
    errors: 400 scope full with a run, 404 no such run, 409 the user has all that a user may have
    """
    login, farm, fields = user_of(req), req.farm, req.fields
    if fields["scope"] == "full" and "run" in fields:
        raise BadRequest("a token for one run has the scope read or work: full is for making and deleting runs")
    named = once(req, create_token(
        login.user, fields["scope"], fields.get("run"), fields.get("label", ""), fields.get("days"), login.token,
        login.expires).shown_as(lambda token: json_reply(201, token_json(token, login.name))),
        login.token and login.token.id, login.expires)
    # Added last, so that no text of a token is kept with the answers to Idempotency-Keys.
    show: Callable[..., Reply] = named.show     # type: ignore[assignment]

    def with_text(*outcome: Any) -> Reply:
        reply = show(*outcome)
        shown = json.loads(reply.body)
        return json_reply(reply.status, dict(shown, token=farm.token_text(shown["id"])))
    return named.shown_as(with_text)


@route("GET", "/api/tokens", query=PAGE, scope="full")
def tokens_of_user(req: Request) -> Operation:
    """A page of the user's tokens, for admin of all users', in the order in which they were made. Sessions are none.

    200: {"data": [{"id", "user", "scope", "run", "label", "created", "expires"}, ...], "next"}
    """
    limit, user = req.query.get("limit", DEFAULT_PAGE), req.login and req.login.user
    return list_tokens(user and user.id, limit, req.query.get("after", 0)).shown_as(
        show_page, lambda entry: token_json(*entry), big_answer=limit > BIG_PAGE)


TOKEN_ID = Count(0, 2 ** 62, refusal=NotFound)


@route("DELETE", "/api/tokens/<id>")
def drop_token(req: Request, token_id: str) -> Operation:
    """Revoke a token, one's own; admin those of all users. From the answer on it is void.

    204: it is
    errors: 404 no such token, or somebody else's
    """
    user = req.login and req.login.user
    return revoke_token(user and user.id, TOKEN_ID.check("id", token_id)).shown_as(show_nothing)


FILE_OF_PARAMETERS = {"path", "size", "sha256"}


def parameters_will_not_do(said: Dict[str, Any]) -> Optional[str]:
    """What is wrong with parameters whose fields are right one by one; None when nothing is."""
    wanted = {"grid"} if said["kind"] == "grid" else FILE_OF_PARAMETERS
    return None if said.keys() == wanted | {"kind"} else "those of kind %s have %s" % (
        said["kind"], ", ".join(sorted(wanted)))


ARGUMENT = SystemText(BODY_LIMIT)
WORK = Object({
    "command": Strings(ARGUMENT), "folder": SystemText(4096, "/"),
    "parameters": Object({
        "kind": Choice({kind: kind for kind in ("lines", "table", "grid")}),
        "path": SystemText(4096, "/", required=False),
        "size": Integer(0, 2 ** 62, required=False), "sha256": Text(64, "[0-9a-f]{64}", required=False),
        "grid": Strings(ARGUMENT, required=False)}, parameters_will_not_do, required=False)}, required=False)


@route("POST", "/api/run", body={
    "numTasks": Integer(1, MAX_TASKS), "name": Text(128, required=False),
    "maxFailures": Integer(0, MAX_TRIES, required=False), "maxLosses": Integer(0, MAX_TRIES, required=False),
    "after": Text(64, UUID_PATTERN, required=False), "afterAny": Flag(required=False), "work": WORK})
def new_run(req: Request) -> Operation:
    """Make a run.

    maxFailures: a task fails for good when so many failures of it were reported (1); maxLosses: when it
    has taken so many workers down (5); 0 for never. after: the uuid of a run; no task is handed out before all of its
    tasks are done, with afterAny before it is over. Once one was, the run waits for no other. work: what its tasks
    are to do, {"command": [words], "folder", "parameters"}. parameters: null, {"kind": "lines" or "table", "path",
    "size", "sha256"} or {"kind": "grid", "grid": ["lr=0.1,0.01", ...]}. It is kept as it comes; the farm runs nothing
    and opens no file.

    201: the run; hasWork: whether it knows its work
    errors: 404 no such run to wait for, 400 afterAny without it
    """
    fields = req.fields
    if fields.get("afterAny") and "after" not in fields:
        raise BadRequest("afterAny says how to wait for a run: name it by after")
    work = fields.get("work")
    return once(req, create_run(
        uuid.uuid4().hex, fields["numTasks"], fields.get("name"), fields.get("maxFailures", 1),
        fields.get("maxLosses", 5), fields.get("after"), fields.get("afterAny", False),
        work and encode_json(work)).shown_as(show_run, 201))


RUNS_PIECE = 250        # runs that are read and shown at a time: 3 ms, 90 kB


def runs_after(after: int) -> Operation:
    """The operation that gives the next piece of the list of runs."""
    return list_runs(after, RUNS_PIECE).shown_as(show_runs, after, big_answer=True)


def show_runs(rows: List[Tuple[Any, ...]], after: int) -> Reply:
    """A piece of the list of runs, those above *after*; it ends with a piece that is not full."""
    runs = [Run(row) for row in rows]
    before = b'{"data":[' if not after else b"," if runs else b""
    body = before + b",".join([encode_json(run_json(run)).encode() for run in runs])
    if len(runs) < RUNS_PIECE:
        return Reply(200, body + b"]}")
    return Reply(200, body, rest=runs_after(runs[-1].id))


@route("GET", "/api/runs", checks_run=True)
def all_runs(req: Request) -> Operation:
    """All runs (of a private farm one's own) in order of creation, each once; many come in pieces as they are taken.

    200: {"data": [run, ...]}
    """
    token = req.login.token if req.login else None
    if token and token.run:
        return read_run(token.run).shown_as(lambda run: json_reply(200, {"data": [run_json(run)]}))
    return runs_after(0)


@route("GET", "/api/runs/<run>", query={"info": Choice(
    choices("percentDone", "numWaiting", "numDone", "numComputing"), required=False, refusal=NotFound)})
def run_info(req: Request, run: str) -> Operation:
    """One run, or with ?info= one of its figures.

    200: the run, or {info: value}
    errors: 404 no such run, or another info
    """
    return read_run(run).shown_as(show_run, 200, req.query.get("info"))


@route("DELETE", "/api/runs/<run>")
def drop_run(req: Request, run: str) -> Operation:
    """Delete a run and its tasks.

    204: it is gone
    errors: 404 no such run
    """
    return delete_run(run).shown_as(show_nothing)


@route("GET", "/api/runs/<run>/work")
def work_of_run(req: Request, run: str) -> Operation:
    """What the tasks of a run are to do. A worker must not run it for another user than the one who made the run.

    200: {"command", "folder", "parameters", "user", "own"}; own: whether the user who asks made the run
    errors: 404 no such run, or it does not know its work
    """
    return read_work(run).shown_as(show_work)


def show_work(known: Tuple[str, Optional[str], bool]) -> Reply:
    """The work of a run."""
    work, user, own = known
    return json_reply(200, dict({"parameters": None}, **json.loads(work), user=user, own=own))


@route("POST", "/api/runs/<run>/restart", query={
    "all": Choice({"True": "restart all", "False": "restart"}, required=False, refusal=NotFound),
    "status": Choice({"failed": "restart failed"}, required=False, refusal=NotFound)}, body={
        "tasks": Ranges(required=False), "exitCode": Integer(-2 ** 31, 2 ** 31 - 1, required=False),
        "like": Message(MESSAGE_LIMIT, required=False)})
def begin_again(req: Request, run: str) -> Operation:
    """Let tasks wait again: those not done at 100 percent, or with ?status=failed the failed ones, ?all=True every one.

    A body narrows that, to tasks: [[first, last], ...]; to the failed ones with that exitCode; to those whose message
    contains like, in which * stands for anything. These are restarted one after another, and others come between.

    204: they wait; with a body 200: {"restarted": n}
    errors: 404 no such run, or another value of all or status; 400 both of them, or a number out of range
    """
    if len(req.query) > 1:
        raise BadRequest("all and status do not go together: status=failed restarts the failed tasks alone")
    which = next(iter(req.query.values()), "restart")
    if req.fields:
        selection = Selection(*map(req.fields.get, ("tasks", "exitCode", "like")))
        return once(req, restart_some(run, which, selection).shown_as(
            lambda number: json_reply(200, {"restarted": number})))
    return once(req, restart_run(run, which).shown_as(show_nothing))


@route("POST", "/api/runs/<run>/pause")
def pause(req: Request, run: str) -> Operation:
    """Hand out no task of a run until it is resumed; what is computed goes on, and is reported.

    204: it is paused
    errors: 404 no such run, 409 it was cancelled
    """
    return once(req, pause_run(run).shown_as(show_nothing))


@route("POST", "/api/runs/<run>/resume")
def resume(req: Request, run: str) -> Operation:
    """Hand out tasks of a run that was paused or cancelled again.

    204: it is open
    errors: 404 no such run
    """
    return once(req, resume_run(run).shown_as(show_nothing))


@route("POST", "/api/runs/<run>/cancel", body={"tasks": Ranges(MAX_NAMED, required=False)})
def cancel(req: Request, run: str) -> Operation:
    """Give a run up: none of its tasks is handed out any more, and those that are computed wait. Or some of its tasks:
    those that are not done have failed, with the message "cancelled".

    Workers lose what they hold of it. A restart undoes both, and resume the first.

    204: it is cancelled, or they are
    errors: 404 no such run, 400 a number out of range
    """
    spans = req.fields.get("tasks")
    return once(req, (cancel_tasks(run, spans) if spans else cancel_run(run)).shown_as(show_nothing))


@route("POST", "/api/runs/<run>/extend", body={"numTasks": Integer(1, MAX_TASKS)})
def extend(req: Request, run: str) -> Operation:
    """Give a run so many more tasks; their numbers follow those that it has.

    204: it has them
    errors: 404 no such run, 400 more than a run may have, 409 it knows a parameter for each task, or they are more than
    about ten times those that it began with, and others were made after it
    """
    return once(req, extend_run(run, req.fields["numTasks"]).shown_as(show_nothing))


@route("POST", "/api/runs/<run>/task", scope="work", body={
    "worker_uuid": UUID, "task": Integer(0, MAX_TASKS - 1, required=False)})
def claim_task(req: Request, run: str) -> Operation:
    """Hand out the lowest waiting task, or the one that is named.

    201: the task, now computing
    204: nothing is handed out; with Retry-After when leased tasks may come back, or the run is paused or waits
    errors: 400 worker_uuid missing, 404 no such worker, run or number, 409 the worker has signed off, or holds all it
    may, or the task that is named does not wait
    """
    return claim(run, req.fields["worker_uuid"], idempotency_key(req), req.fields.get("task")).shown_as(show_claimed)


@route("POST", "/api/runs/<run>/tasks", scope="work", body={"worker_uuid": UUID, "count": Integer(1, MAX_BATCH)})
def claim_tasks(req: Request, run: str) -> Operation:
    """Hand out up to count of the lowest waiting tasks; one is started when its worker reports `computing` or progress.

    Of a count above 200, as many as there is time for: others have their turn.

    201: {"data": [{"task", "attempt", "percentCompleted"}, ...]}
    204: as for one
    errors: as for one
    """
    count = req.fields["count"]
    return claim_many(run, req.fields["worker_uuid"], count, idempotency_key(req)).shown_as(
        show_batch, big_answer=count > BIG_BATCH)


REPORT = {
    "attempt": Integer(1, 2 ** 53, required=False),
    "status": Choice(dict(zip(STATUS, range(4))), required=False),
    "percentCompleted": Percent(required=False),
    "exitCode": Integer(-2 ** 31, 2 ** 31 - 1, required=False),
    "message": Message(MESSAGE_LIMIT, required=False),
    "log": Message(LOG_LIMIT, required=False),
    "elapsed": Seconds(MAX_ELAPSED_S, required=False),
    "memory": Integer(0, MAX_MEMORY, required=False),
    "cpu": Seconds(MAX_ELAPSED_S, required=False)}


def will_not_do(said: Report) -> Optional[str]:
    """What is wrong with a report whose fields are right one by one; None when nothing is."""
    if said.status is None and said.millionths is None:
        return "a report names percentCompleted, status or both"
    if said.status == FAILED:
        return None
    if (said.exit_code, said.message, said.log) != (None,) * 3:
        return "exitCode, message and log go with status failed"
    if said.status != DONE and (said.memory, said.cpu_ms) != (None,) * 2:
        return "memory and cpu go with status done or failed"
    return None


@route("GET", "/api/runs/<run>/tasks", query={
    "status": Choice(dict(zip(STATUS, range(4))), required=False),
    "order": Choice({word: word for word in ("task", "started", "finished")}, required=False),
    "limit": PAGE["limit"], "after": Text(40, required=False), "tasks": Ranges(required=False)})
def tasks_page(req: Request, run: str) -> Operation:
    """A page of the tasks of a run by number, or by time those that compute (started) or have ended (finished).

    Pass next as after for more. tasks=13,17-20 lists only these, by number; their pages may be short.

    200: {"data": [task, ...], "next"}; next is null at the end
    errors: 404 no such run; 400 a number out of range, or tasks with an order by time
    """
    query = req.query
    limit = query.get("limit", DEFAULT_PAGE)
    return list_tasks(run, query.get("status"), query.get("order", "task"), limit, query.get("after", ""),
                      query.get("tasks", ())).shown_as(show_page, task_json, big_answer=limit > BIG_PAGE)


@route("PUT", "/api/runs/<run>/tasks", scope="work", body={
    "worker_uuid": Text(64, UUID_PATTERN, required=False),
    "data": Entries(MAX_BATCH, dict({"task": Integer(0, MAX_TASKS - 1)}, **REPORT), Report, will_not_do)})
def report_tasks(req: Request, run: str) -> Operation:
    """Report the states of many tasks, each judged by itself.

    200: {"accepted": n, "refused": [{"task", "detail"}, ...]}
    errors: 400 a malformed entry, a task twice or out of range, and nothing was changed; 404 no such run
    """
    reports = req.fields["data"]
    return report_many(run, req.fields.get("worker_uuid"), reports).shown_as(
        show_reported, big_answer=len(reports) > BIG_BATCH)


@route("GET", "/api/runs/<run>/tasks/<task>", query={"info": Choice(
    choices("status", "percentDone", "percentCompleted"), required=False, refusal=NotFound)})
def task_info(req: Request, run: str, task: str) -> Operation:
    """One task, or with ?info= one of its figures.

    200: the task, or {info: value}
    errors: 404 no such run, number out of range, or another info
    """
    return read_task(run, task_number(task)).shown_as(show_task, 200, req.query.get("info"))


@route("PUT", "/api/runs/<run>/tasks/<task>", scope="work", body=dict(
    {"worker_uuid": Text(64, UUID_PATTERN, required=False)}, **REPORT))
def report_task(req: Request, run: str, task: str) -> Operation:
    """Report the state of a task; who names a worker or an attempt must hold it, who names none ends every hold.

    elapsed: seconds since the attempt was begun. With done or failed also memory: bytes at its peak, and cpu: seconds
    of all its processors; with failed exitCode, message, and log: the path of its output.

    204: noted, or known already
    errors: 400 bad or empty body, 404 no such run, number out of range, 409 the claim that is named does not hold it
    """
    fields = req.fields
    get = fields.get
    said = Report(task_number(task), get("attempt"), get("status"), get("percentCompleted"), get("exitCode"),
                  get("message"), get("log"), get("elapsed"), get("memory"), get("cpu"))
    sentence = will_not_do(said)
    if sentence:
        raise BadRequest(sentence)
    return report(run, fields.get("worker_uuid"), said).shown_as(show_nothing)


@route("POST", "/api/worker", scope="work", checks_run=True, body={
    "uuid": UUID, "hostname": Text(255), "pid": Integer(0, MAX_PID), "lease": Integer(1, MAX_LEASE_S, required=False),
    "job": Text(128, required=False)})
def new_worker(req: Request) -> Operation:
    """Register a worker, with a lease in seconds or none; the same one again is the same, and lives again.

    job: that of a batch system, as "slurm:1234_7"; the first registration says it.

    201: {"uuid", "id", "lease"}
    errors: 409 the uuid belongs to another hostname or pid, or in a private farm to another user
    """
    fields = req.fields
    return once(req, register_worker(
        fields["uuid"], fields["hostname"], fields["pid"], fields.get("lease"), fields.get("job")).shown_as(
            lambda worker: json_reply(201, {"uuid": worker.uuid, "id": worker.id, "lease": worker.lease})))


@route("GET", "/api/worker/<worker>", checks_run=True, query=PAGE)
def worker_info(req: Request, worker: str) -> Operation:
    """A worker and a page of the tasks that it holds.

    200: the worker, "revision", "data": [{"run", task fields but worker and hostname}, ...], "next"
    errors: 404 no such worker
    """
    limit = req.query.get("limit", DEFAULT_PAGE)
    return read_worker(worker, limit, req.query.get("after", 0)).shown_as(show_worker, big_answer=limit > BIG_PAGE)


def show_worker(seen: Tuple[ShownWorker, Page]) -> Reply:
    """A worker and a page of its tasks."""
    def held(entry: Tuple[str, ShownTask]) -> Dict[str, Any]:
        shown = dict({"run": entry[0]}, **task_json(entry[1]))
        del shown["worker"], shown["hostname"]
        return shown
    return show_page(seen[1], held, dict(worker_json(seen[0]), revision=seen[0].revision))


@route("PUT", "/api/worker/<worker>", scope="work", checks_run=True)
def heartbeat(req: Request, worker: str) -> Operation:
    """Tell that a worker lives: its lease is renewed, and what lapsed comes back to it if nobody has claimed it.

    200: {"held": number of tasks, "revision": rises whenever one is taken from it}
    errors: 404 no such worker, 409 it has signed off
    """
    return beat(worker).shown_as(lambda seen: json_reply(200, {"held": seen.held, "revision": seen.revision}))


@route("DELETE", "/api/worker/<worker>", scope="work", checks_run=True, query={
    "why": Text(WHY_LIMIT, required=False)})
def worker_leaves(req: Request, worker: str) -> Operation:
    """Sign a worker off: its tasks wait again. ?why= says why its batch job ended at once, without a task that is done.

    204: it has
    errors: 404 no such worker
    """
    return sign_off(worker, req.query.get("why")).shown_as(show_nothing)


@route("GET", "/api/workers", checks_run=True, query=dict(
    PAGE, all=Choice({"True": True, "False": False}, required=False),
    order=Choice({"latest": True}, required=False)))
def workers_page(req: Request) -> Operation:
    """A page of the workers that live, or with ?all=True of all, in order of registration; pass next as after for more.

    With ?order=latest the latest registration comes first. A token for one run sees those that hold tasks of it.

    200: {"data": [{"uuid", "id", "hostname", "pid", "lease", "state", "heard", "held", "job", "why"}, ...], "next"}
    """
    limit = req.query.get("limit", DEFAULT_PAGE)
    return list_workers(
        req.query.get("all", False), limit, req.query.get("after"), req.query.get("order", False)).shown_as(
            show_page, worker_json, big_answer=limit > BIG_PAGE)


@route("GET", "/api/users", access=ADMIN)
def all_users(req: Request) -> Operation:
    """The names of the users.

    200: {"data": [name, ...]}
    """
    return list_users().shown_as(lambda users: json_reply(200, {"data": [user.name for user in users]}))


PASSWORD = Text(1000, r"(scrypt|pbkdf2)\$[0-9,]+\$[0-9a-f]+\$[0-9a-f]{64}", secret=True)


def show_renewed(user: User, farm: Farm, status: int) -> Reply:
    """A user has a password, a first or another; whoever wrote an access file for that name writes it again."""
    body = b"" if status == 204 else encode_json({"name": user.name}).encode()
    return Reply(status, body, first=functools.partial(farm.renewed, user))     # a home directory may hang


@route("POST", "/api/users", access=ADMIN, body={"name": Text(64), "password": PASSWORD})
def new_user(req: Request) -> Operation:
    """Add a user; the password comes hashed, so that the server need not do it.

    201: {"name"}
    errors: 400 a name that will not do, 409 the name is taken
    """
    return add_user(check_name(req.fields["name"]), req.fields["password"]).shown_as(
        show_renewed, req.farm, 201)


@route("PUT", "/api/users/<user>", access=ADMIN, body={"password": PASSWORD})
def change_password(req: Request, user: str) -> Operation:
    """Set another password; every token the user had is void.

    204: it is set
    errors: 404 no such user
    """
    return set_password(normal(user), req.fields["password"]).shown_as(
        show_renewed, req.farm, 204)


@route("DELETE", "/api/users/<user>", access=ADMIN)
def drop_user(req: Request, user: str) -> Operation:
    """Remove a user and every token.

    204: gone
    errors: 404 no such user
    """
    return remove_user(normal(user)).shown_as(show_nothing)


@route("GET", "/api/audit", access=ADMIN, query=PAGE)
def audit_page(req: Request) -> Operation:
    """A page of who did what, when and from where, the oldest first; pass next as after for more.

    user: null for administration, "" for nobody who is known; address: "" for a verb without a server

    200: {"data": [{"utc", "user", "action", "object", "address", "times"}, ...], "next"}
    """
    limit = req.query.get("limit", DEFAULT_PAGE)
    return list_audit(limit, req.query.get("after", 0)).shown_as(show_page, audit_json, big_answer=limit > BIG_PAGE)


def audit_json(line: AuditLine) -> Dict[str, Any]:
    """A line of the audit as clients see it."""
    return {"utc": shown_seconds(line.utc), "user": line.user, "action": line.action, "object": line.object,
            "address": line.address, "times": line.times}


@route("POST", "/api/backup", access=ADMIN)
def new_backup(req: Request) -> Operation:
    """Begin a consistent copy, beside the file: whoever asked for it takes it away.

    202: {"path"}
    errors: 409 another copy is in the making
    """
    return begin_copy(secrets.token_hex(8)).shown_as(lambda copy: json_reply(202, {"path": copy.path}))


@route("GET", "/api/backup", access=ADMIN)
def backup_progress(req: Request) -> Operation:
    """How far the newest copy is.

    200: {"path", "copied", "total", "ended"}: pages, and how it ended, "" until it has
    """
    return read_copy().shown_as(lambda copy: json_reply(200, {
        "path": copy.path, "copied": copy.copied, "total": copy.total, "ended": copy.ended}))


@route("DELETE", "/api/backup", access=ADMIN, body={"path": Text(4096)})
def drop_backup(req: Request) -> Operation:
    """Say that nobody waits for a copy any more; what there is of it is removed.

    204: noted
    """
    return give_up_copy(req.fields["path"]).shown_as(show_nothing)


# ---------------------------------------------------------------- PAGES
# What a person sees in a browser. Every value goes through html.escape. It knows the table of routes, and no run.
#
# Another page: a function with @route as in API, open to all only if it tells nothing of the farm. It gives page(title,
# body); the style of all is STYLE.

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } td { padding: .15em 1.2em .15em 0; vertical-align: top; }
code, pre { background: #8882; padding: .1em .3em; border-radius: .2em; } pre { padding: .6em; overflow: auto; }
:root { color-scheme: light dark; }"""


def page(title: str, body: str) -> str:
    """A whole HTML page."""
    return ("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>%s</title>"
            "<meta name=\"viewport\" content=\"width=device-width\"><style>%s</style></head>\n<body>%s</body></html>\n"
            % (html.escape(title), STYLE, body))


@route("GET", "/", access=OPEN)
def front(req: Request) -> Reply:
    """Say what this is.

    200: HTML with name, version and where to go
    """
    return front_page()


@functools.lru_cache(maxsize=None)
def front_page() -> Reply:
    """The page, made once: it costs 40 requests."""
    rows = "".join("<tr><td><code>%s</code></td><td><code>%s</code></td><td>%s</td></tr>\n" % (
        html.escape(line.method), html.escape(line.path), html.escape((line.handler.__doc__ or "").split("\n")[0]))
        for line in ROUTES.table if line.access != ADMIN)
    return Reply(200, page("taskfarm", """
<h1>taskfarm %s</h1>
<p>This server hands out the numbered tasks of a run to workers over HTTP and remembers the state of each.</p>
<table>
%s</table>
<p>JSON in, JSON out. All under /api wants a login: <code>curl -u USER https://HOST:PORT/api/runs</code>.</p>
""" % (html.escape(__version__), rows)).encode(), "text/html; charset=utf-8")


# ---------------------------------------------------------------- SERVICE
# Lock, store, farm and address made into one server, and taken apart again. It must not know verbs, options or access
# files. To add a step to the start, give it a line in `Service.__init__` where a refusal of it can still be taken
# back, and the callback that does so. What local verbs must know about the server goes into `Service.holder`.

def url_of(host: str, port: int) -> str:
    """An https URL of a host, which may be an IPv6 address."""
    return "https://%s:%d" % ("[%s]" % host if ":" in host else host, port)


def reachable_as(host: str, advertise: str) -> Tuple[str, str]:
    """The host that clients are told, and the one that local verbs use."""
    everywhere = host in ("", "0.0.0.0", "::")
    local = ("::1" if ":" in host else "127.0.0.1") if everywhere else host
    return advertise or (socket.gethostname() if everywhere else host), local


def names_of_server(*names: str) -> FrozenSet[str]:
    """These names and the machine's, short and as it calls itself: its full one may take a name server minutes."""
    own = socket.gethostname()
    return frozenset(name.lower().rstrip(".") for name in (own, own.partition(".")[0], *names) if name)


def machine_id() -> str:
    """What names the running kernel, within which locks surely work; the host name where it does not say.

    A host name alone will not do: containers and cloned machines share one.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()


class RetriedWrites:
    """The small files that tell others about this server. What cannot be written is tried again until it is.

    A farm on a full disk is still read, and when there is room again its users and verbs must find it.
    """
    EVERY_S = 3.0

    def __init__(self) -> None:
        self.pending: Dict[str, Callable[[], None]] = {}
        self.busy = threading.Lock()
        self.ended = threading.Event()
        self.thread: Optional[threading.Thread] = None

    def write(self, what: str, function: Callable[[], None], trouble: str) -> None:
        """Call *function*, which writes *what*. When it raises OSError: log *trouble*, and call it again later."""
        with self.busy:
            try:
                function()
                self.pending.pop(what, None)
                return
            except OSError as error:
                log.warning("%s cannot be written (%s): %s; tried again every %d s", what, error.strerror, trouble,
                            self.EVERY_S)
            self.pending[what] = function
            if self.thread is None:
                thread = threading.Thread(target=self._retry, name="retry", daemon=True)
                with contextlib.suppress(RuntimeError):     # no more threads: the next start writes it
                    thread.start()
                    self.thread = thread

    def _retry(self) -> None:
        while not self.ended.wait(self.EVERY_S):
            with self.busy:
                for what, function in list(self.pending.items()):
                    with contextlib.suppress(OSError):
                        function()
                        del self.pending[what]
                        log.warning("%s is written now", what)

    def close(self) -> None:
        """Try no more."""
        self.ended.set()
        if self.thread is not None:
            self.thread.join()


class Service:
    """A server: lock, store, address and threads, taken in the order in which each may be refused.

    *take_lock*: gives the lock of the file, or raises Refusal. *tls_files*: certificate and key of the site, where
    the farm's own is not to be served. *allow_hosts*: names by which clients may ask, besides those that the server
    knows itself. `certificate`: the one that is served. `files`: for what tells others about the server.
    Raises Refusal, with everything let go again and a file that was made for it removed.
    """
    def __init__(self, db: str, host: str, port: int, advertise: str = "", token_days: float = TOKEN_DAYS,
                 access_log: Any = None, clock: Callable[[], Now] = system_clock, routes: Routes = ROUTES,
                 take_lock: Callable[[str], Lock] = Lock, plain_http: bool = False,
                 tls_files: Optional[Tuple[str, str]] = None, allow_hosts: Sequence[str] = (),
                 private: bool = False) -> None:
        self.tls_files = tls_files
        self.certificate_renewed: Callable[[], None] = lambda: None
        with contextlib.ExitStack() as undo:
            secret = secrets.token_urlsafe(32)
            self.lock = take_lock(db)
            undo.callback(self.lock.close)
            self.store = Store(db, clock)
            if self.store.made:
                undo.callback(remove_database, self.store.path)     # a start that is refused leaves no empty farm
            undo.callback(self.store.close)
            shown, local = reachable_as(host, advertise)
            self.certificate, context = (
                own_certificate(self.store, shown) if tls_files is None else site_certificate(*tls_files))
            self.farm = Farm(self.store, secret, token_days, private)
            try:
                self.server = Server((host, port), self.farm, routes, context, access_log, plain_http,
                                     names_of_server(host, advertise, *allow_hosts))
            except OSError as error:
                raise Refusal(address_refused(host, port, error))
            undo.callback(self.server.server_close)
            try:
                self.server.start_threads()
                self.store.start()
            except RuntimeError:
                raise Refusal("the system gives this user no more threads (ulimit -u): end some processes first")
            self.url = url_of(shown, self.server.server_port)
            self.holder = {"host": socket.gethostname(), "machine": machine_id(), "pid": os.getpid(), "url": self.url,
                           "admin_url": url_of(local, self.server.server_port), "secret": secret}
            self.files = RetriedWrites()
            self._tell_holder()
            undo.pop_all()

    def _tell_holder(self) -> None:
        self.holder["certificate"] = self.certificate
        self.files.write(self.lock.path, lambda: self.lock.write(self.holder),
                         "'user', 'check' and 'backup' cannot reach this server until it is")

    def read_certificate_again(self) -> None:
        """Serve what the files of the site's certificate hold now; what will not do changes nothing. For any signal."""
        if self.tls_files is not None:
            self.server.firsts.put(self._read_certificate)      # in a thread: the files may hang, as a home folder may

    def _read_certificate(self) -> None:
        assert self.tls_files is not None
        try:
            self.certificate, self.server.context = site_certificate(*self.tls_files)
        except Refusal as error:
            log.error("%s. The certificate of before is served", error)
            return
        log.info("certificate %s is served from now on", fingerprint(self.certificate))
        self._tell_holder()
        self.certificate_renewed()

    def serve(self) -> None:
        """Serve until `stop`, then let everything go."""
        try:
            self.server.serve_forever()
        finally:
            self.close()

    def stop(self) -> None:
        """Have `serve` return, once the answers in hand are sent. For any thread and signal."""
        self.server.stop()

    def close(self) -> None:
        """Write what is in hand and let go of file, address and lock."""
        self.files.close()
        self.server.server_close()
        self.store.close()
        self.lock.close()


def own_certificate(store: Store, shown: str) -> Tuple[str, ssl.SSLContext]:
    """The farm's own certificate, in PEM, and the server's end of TLS with it. It is made where there is none yet.

    *shown*: the host that clients are told. Raises Refusal when it cannot be kept, or not be handed to the system.
    """
    key, certificate = store.call(read_certificate())
    if not certificate:
        # The machine's name as it is: to ask for a longer one may hang without DNS.
        hosts = dict.fromkeys([shown, socket.gethostname(), "localhost", "127.0.0.1", "::1"])
        key, certificate = make_certificate([host for host in hosts if not is_address(host)],
                                            [host for host in hosts if is_address(host)], store.clock().utc)
        try:
            store.call(keep_certificate(key, certificate))
        except FarmError as error:
            raise Refusal("the farm's certificate cannot be kept: %s" % error)
    try:
        return certificate, server_context(certificate, key)
    except OSError as error:
        raise Refusal("the farm's certificate cannot be handed to OpenSSL: %s" % error)


def site_certificate(certificate_path: str, key_path: str) -> Tuple[str, ssl.SSLContext]:
    """The certificate of a site, in PEM, and the server's end of TLS with it. Raises Refusal."""
    try:
        with open(certificate_path, encoding="utf-8") as chain_file, open(key_path, encoding="utf-8") as key_file:
            chain, key = chain_file.read(), key_file.read()
        return ssl.DER_cert_to_PEM_cert(certificate_der(chain)), server_context(chain, key)
    except (OSError, ValueError) as error:
        raise Refusal("%s and %s are no certificate and key that fit, in PEM and without a password (%s)" % (
            certificate_path, key_path, error.strerror if isinstance(error, OSError) and error.strerror else error))


def address_refused(host: str, port: int, error: OSError) -> str:
    """Why the server cannot listen, and what to do."""
    if error.errno == errno.EADDRINUSE:
        return ("port %d is in use on this machine, perhaps by somebody else's server: --port 0 picks one that is "
                "free, and the access file tells your workers which" % port)
    if error.errno == errno.EACCES:
        return "port %d is for the system's own services: choose one above 1023" % port
    return "cannot listen on %s port %d: %s (--host wants an address of this machine, or 0.0.0.0 for all)" % (
        host, port, error.strerror or error)


# ---------------------------------------------------------------- TERMINAL
# What a person sees on a terminal: tables, bars, rates. Plain values in, text out. It knows no server and no verb.
#
# A new figure of status: what can be computed from plain values stands here, beside `estimate_rate`; RunMonitor in
# STATUS asks for the values. A new way to write a value: a function whose name ends in _text.

COLOURS = {"red": "31", "green": "32", "yellow": "33", "bold": "1", "dim": "2"}
MIN_COLUMN = 8                      # a cell that may be cut keeps so many columns


class State(NamedTuple):
    """How a status of tasks is shown."""
    name: str
    field: str          # of a run: how many tasks have it
    colour: str
    ascii: str          # a cell of the bar
    unicode: str        # the same where the encoding has it


# In the order of the bar. The cells differ in shape, so that the bar can be read without colours.
STATES = (State("done", "numDone", "green", "#", "\u2588"), State("failed", "numFailed", "red", "x", "\u2573"),
          State("computing", "numComputing", "yellow", "+", "\u2592"),
          State("waiting", "numWaiting", "dim", ".", "\u00b7"))


class Screen:
    """An output stream: its size, whether it shows colours and more than ASCII, and lines that are redrawn in place.

    A pipe or a file has no limit of width and no colours, and cannot be redrawn. Write lines that stay only
    after `redraw([])`, or they stand behind those that were drawn.
    """
    def __init__(self, stream: Any, environ: Mapping[str, str]) -> None:
        self.stream = stream
        self.terminal = stream.isatty()
        self.can_redraw = self.terminal and environ.get("TERM", "") not in ("", "dumb")
        self.colours = self.can_redraw and not environ.get("NO_COLOR")
        self.drawn: List[str] = []      # the lines that the next `redraw` replaces
        self.write: Callable[[str], Any] = self._write
        try:
            "".join(state.unicode for state in STATES).encode(getattr(stream, "encoding", None) or "ascii")
            self.unicode = True
        except (UnicodeError, LookupError):
            self.unicode = False

    @property
    def size(self) -> os.terminal_size:
        """Columns and lines of the terminal now: a window may be resized at any time."""
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(self.stream.fileno())
            if size.columns and size.lines:
                return size
        size = shutil.get_terminal_size()       # before Python 3.11 a terminal without a size passes through it
        return os.terminal_size((size.columns or 80, size.lines or 24))

    @property
    def columns(self) -> int:
        """How many columns a line may have; 0 for any number."""
        return self.size.columns if self.terminal else 0

    @property
    def may_draw(self) -> bool:
        """Whether lines can be redrawn now. A process in the background leaves the terminal to others."""
        with contextlib.suppress(OSError):      # it is not our controlling terminal: no shell disposes of it
            return self.can_redraw and os.tcgetpgrp(self.stream.fileno()) == os.getpgrp()
        return self.can_redraw

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()

    def paint(self, text: str, colour: str) -> str:
        """The text in one of COLOURS, where colours are shown."""
        return "\x1b[%sm%s\x1b[0m" % (COLOURS[colour], text) if self.colours and text else text

    def print(self, lines: Sequence[str]) -> None:
        """Write lines that stay."""
        self.write("".join(line + "\n" for line in lines))

    def redraw(self, lines: Sequence[str]) -> None:
        """Write lines in the place of those drawn last. Lines that are too many for the height are left out.

        The cursor stays behind the last one. Terminals wrap what was drawn when they become narrower, so the rows
        to go up are counted for the width of now.
        """
        size, old, self.drawn = self.size, self.drawn, []
        if not self.may_draw:
            return

        def rows(drawn: Sequence[str]) -> int:
            return sum(max(-(-display_width(re.sub("\x1b.*?m", "", line)) // size.columns), 1) for line in drawn)
        while lines and rows(lines) > size.lines:
            lines = lines[:-1]
        up = "\x1b[%dA" % (rows(old) - 1) if rows(old) > 1 else ""
        if old or lines:
            self.write((up + "\r\x1b[J" if old else "") + "\n".join(lines))
        self.drawn = list(lines)

    def keep(self) -> None:
        """Let the drawn lines stay: what is written next begins below them."""
        if self.drawn:
            self.print([""])
            self.drawn = []

    def cell(self, state: State) -> str:
        """A cell of the bar, without its colour."""
        return state.unicode if self.unicode else state.ascii


PROGRAM = "python3 taskfarm.py"     # how sentences call this program, also those that come from the server


def started_as() -> str:
    """How this program is started here: python3 and the path of this file as it was typed, or taskfarm."""
    path, python = sys.argv[0], shutil.which("python3") or ""
    if os.path.basename(path) == "taskfarm":        # as pip installs it
        return "taskfarm" if shutil.which("taskfarm") else shlex.quote(path)
    if os.path.basename(path) != "taskfarm.py":     # another program uses this as a library
        return PROGRAM
    same = os.path.realpath(python) == os.path.realpath(sys.executable)     # elsewhere python3 may be too old
    return "%s %s" % ("python3" if same else shlex.quote(sys.executable), shlex.quote(path))


def pasteable(sentence: str) -> str:
    """A sentence whose commands can be pasted into the shell that started this program."""
    return sentence.replace(PROGRAM, started_as())


def typed_line(*more: str) -> str:
    """The line that started this verb, with some words more behind the verb."""
    words = (*sys.argv[1:2], *more, *sys.argv[2:])
    return "%s %s" % (started_as(), " ".join(map(shlex.quote, words)))


def printable(text: Any) -> str:
    """Text that others wrote, in one line: ? for control, invisible and direction characters.

    So nobody's message can send escape sequences to the terminal.
    """
    one_line = " ".join(str(text).split())
    return "".join("?" if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") else character
                   for character in one_line)


def display_width(text: str) -> int:
    """How many columns a text takes: two for a wide character, none for a combining one."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.category(character) in ("Mn", "Me") else
               2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def cut(text: str, width: int) -> str:
    """The text in at most *width* columns. One that is too long ends with ~."""
    if display_width(text) <= width:
        return text
    kept = ""
    for character in text:
        if display_width(kept + character) > width - 1:
            break
        kept += character
    return kept + "~" if width > 0 else ""


def duration_text(seconds: float) -> str:
    """Seconds as a person says them: 0.12 s, 3 min 20 s, 4 h 10 min, 3 d 2 h."""
    if seconds < 100:
        return "%.*f s" % (2 if seconds < 10 else 0, seconds)
    large_s, large, small_s, small = (60, "min", 1, "s") if seconds < 3600 else (
        (3600, "h", 60, "min") if seconds < 86400 else (86400, "d", 3600, "h"))
    return "%d %s %d %s" % (seconds // large_s, large, seconds % large_s // small_s, small)


def size_text(size: float) -> str:
    """Bytes as a person says them: 850 B, 12 kB, 3.9 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return "%.*f %s" % (1 if size < 9.95 and unit != "B" else 0, size, unit)
        size /= 1000
    return "%.1f TB" % size


def share_text(processors: float) -> str:
    """So many busy processors as a share of one: 97 %, 398 %."""
    return "%.0f %%" % (100 * processors)


def grouped(number: int) -> str:
    """A number in groups of three digits: 200 000."""
    return "{:,}".format(number).replace(",", " ")


def count_text(number: int, thing: str) -> str:
    """A number with its noun: 1 task, 200 000 tasks."""
    return "%s %s%s" % (grouped(number), thing, "" if number == 1 else "s")


def rate_text(*per_s: float) -> str:
    """A rate of tasks: 4.0 tasks/min. Of a rate, a low and a high one: the range of these two, 3 to 5 tasks/s.

    The first rate decides the unit.
    """
    unit, unit_s = ("s", 1) if per_s[0] >= 1 else ("min", 60) if per_s[0] * 60 >= 1 else ("h", 3600)
    return "%s tasks/%s" % (" to ".join("%.*f" % (0 if rate * unit_s >= 100 else 1, rate * unit_s)
                                        for rate in per_s[-2:]), unit)


def percent_text(part: float, whole: float) -> str:
    """A share. It is 100 % only for the whole, and 0 % only for nothing."""
    share = 100.0 * part / whole if whole else 0.0
    if 0 < part < whole:
        share = min(max(share, 0.1), 99.9)
    return "%.1f %%" % share


class Column(NamedTuple):
    """A column of a table."""
    title: str
    right: bool = False         # flush right, as numbers stand
    can_shrink: bool = False    # may be cut where the terminal is too narrow
    optional: bool = False      # is left out where cutting is not enough
    text: Callable[[Any], str] = str    # a value for people


def bare_text(value: Any) -> str:
    """A value for programs: 1234, 12.5."""
    return ("%.3f" % value).rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


class Table:
    """Rows under headings, in columns as wide as they need to be. On a terminal the lines fit its width.

    *width*: columns of the terminal, 0 for any number. *bare*: for programs, with tabs between bare numbers. Rows may
    come in several calls of `lines`. A column never becomes narrower then, and the headings come once.
    """
    def __init__(self, columns: Sequence[Column], width: int = 0, bare: bool = False) -> None:
        self.columns, self.width, self.bare = columns, width, bare
        self.widths = [display_width(column.title) for column in columns]
        self.shown = list(range(len(columns)))
        self.has_headings = False

    def lines(self, rows: Sequence[Sequence[Any]]) -> List[str]:
        """The lines of some rows, with the headings before the first of all. An empty cell is shown as -."""
        texts = [[printable("" if cell is None else bare_text(cell) if self.bare else column.text(cell)) or "-"
                  for cell, column in zip(row, self.columns)] for row in rows]
        if not self.has_headings:
            self.has_headings = True
            texts.insert(0, [column.title for column in self.columns])
        if self.bare:
            return ["\t".join(row) for row in texts]
        for row in texts:
            self.widths = [max(width, display_width(cell)) for width, cell in zip(self.widths, row)]
        self._leave_out_columns()
        widths = self._fitting_widths()
        return [self._line(row, widths) for row in texts]

    def _excess(self, widths: Sequence[int]) -> int:
        """By how much the shown columns are wider than the terminal."""
        return sum(widths[number] + 2 for number in self.shown) - 2 - self.width if self.width else 0

    def _leave_out_columns(self) -> None:
        """Leave out optional columns, the last first, until the others can be made to fit. They stay out."""
        least = [min(width, MIN_COLUMN) if column.can_shrink else width
                 for column, width in zip(self.columns, self.widths)]
        for number in reversed(range(len(self.columns))):
            if self.columns[number].optional and self._excess(least) > 0:
                self.shown = [other for other in self.shown if other != number]

    def _fitting_widths(self) -> List[int]:
        widths = list(self.widths)
        while self._excess(widths) > 0:
            shrinkable = [number for number in self.shown
                          if self.columns[number].can_shrink and widths[number] > MIN_COLUMN]
            if not shrinkable:
                break
            widths[max(shrinkable, key=lambda number: widths[number])] -= 1
        return widths

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        cells = []
        for number in self.shown:
            text = cut(row[number], widths[number])
            space = " " * (widths[number] - display_width(text))
            cells.append(space + text if self.columns[number].right else text + space)
        line = "  ".join(cells).rstrip()
        return cut(line, self.width) if self.width else line


def allocate_cells(parts: Sequence[int], cells: int) -> List[int]:
    """How many of so many cells each part gets: in proportion, and at least one where the part is not 0."""
    whole = sum(parts)
    if not whole:
        return [0] * len(parts)
    allocated = [max(part * cells // whole, 1 if part else 0) for part in parts]
    while sum(allocated) != cells:
        step = 1 if sum(allocated) < cells else -1
        # The part that is furthest from its exact share changes. One that has a single cell keeps it.
        candidates = [number for number, part in enumerate(parts) if part and (step > 0 or allocated[number] > 1)]
        if not candidates:
            break
        furthest = max(candidates, key=lambda number: step * (parts[number] * cells / whole - allocated[number]))
        allocated[furthest] += step
    return allocated


def state_bar(run: Mapping[str, Any], cells: int, screen: Screen) -> str:
    """The states of a run's tasks as a bar."""
    allocated = allocate_cells([run[state.field] for state in STATES], cells)
    return "[" + "".join(screen.paint(screen.cell(state) * number, state.colour)
                         for state, number in zip(STATES, allocated)) + "]"


def bar_line(run: Mapping[str, Any], text: str, screen: Screen) -> str:
    """A bar and a text, in one line of a terminal."""
    room = screen.columns - 1       # in the last column some terminals begin a new line
    cells = max(min(24, room // 3), 1)
    return state_bar(run, cells, screen) + cut(" " + text, room - cells - 2)


def state_lines(run: Mapping[str, Any], screen: Screen) -> List[str]:
    """The number of tasks in each state, with the cell that stands for it. A narrow terminal gets several lines."""
    lines, used = [""], 0
    for state in STATES:
        words = " %s %s" % (grouped(run[state.field]), state.name)
        if used and screen.columns and used + 4 + len(words) > screen.columns:
            lines, used = lines + [""], 0
        lines[-1] += "   " * (used > 0) + screen.paint(screen.cell(state), state.colour) + words
        used += 3 * (used > 0) + 1 + len(words)
    return lines


def state_counts(run: Mapping[str, Any]) -> str:
    """The number of tasks in each state, in words."""
    return ", ".join("%d %s" % (run[state.field], state.name) for state in STATES)


class Rate(NamedTuple):
    """How fast tasks end, in tasks per second."""
    per_s: float
    low: float              # the range in which the true rate probably is
    high: float
    ended: int              # tasks that ended in the window
    window_s: float


RATE_SLICES = 10        # of the window: how much they differ tells the error of a rate


def estimate_rate(points: Sequence[Tuple[float, int]]) -> Optional[Rate]:
    """The rate of readings (seconds, tasks ended so far), oldest first. None when nothing ended.

    The range is two standard errors wide on either side. The error comes from how much equal slices of the
    time differ: tasks that end in waves make it wide. It is at least that of tasks that end by chance.
    """
    if len(points) < 2 or points[-1][1] <= points[0][1] or points[-1][0] <= points[0][0]:
        return None
    window_s, ended = points[-1][0] - points[0][0], points[-1][1] - points[0][1]
    counts = slice_counts(points, RATE_SLICES)
    mean = ended / RATE_SLICES
    spread = sum((count - mean) ** 2 for count in counts) * RATE_SLICES / (RATE_SLICES - 1)
    error = math.sqrt(max(spread, ended))
    low, high = max(ended - 2 * error, 0.0), ended + 2 * error
    return Rate(ended / window_s, low / window_s, high / window_s, ended, window_s)


PRESENT_S = 10.0        # the tasks of the last so many seconds are those of the present workers


class Reading(NamedTuple):
    """What was known of a run at a moment."""
    tick: float
    ended: int              # tasks that had ended
    worked_s: float         # seconds that tasks had computed, in all


def present_rate(readings: Sequence[Reading]) -> Optional[Rate]:
    """The rate of the workers of now, from readings of any number of them, oldest first. None when nobody works.

    When twice as many work, a second counts twice: so the tasks that end are set against the seconds that tasks
    computed, and a rate is that of as many tasks at a time as now.
    """
    if len(readings) < 2:
        return None
    first, last = readings[0], readings[-1]
    if last.worked_s <= first.worked_s:         # reports without claims
        return estimate_rate([(reading.tick, reading.ended) for reading in readings])
    since = max(first.tick, last.tick - PRESENT_S)
    at = bisect.bisect_right([reading.tick for reading in readings], since)
    before, after = readings[at - 1], readings[min(at, len(readings) - 1)]
    part = (since - before.tick) / (after.tick - before.tick) if after.tick > before.tick else 0.0
    computed_s = last.worked_s - before.worked_s - part * (after.worked_s - before.worked_s)
    if last.tick <= since or computed_s <= 1e-6:
        return None
    present = computed_s / (last.tick - since)
    rate = estimate_rate([(reading.worked_s / present, reading.ended) for reading in readings])
    return rate and rate._replace(window_s=last.tick - first.tick)


class Readings:
    """The readings of a run that is looked at again and again."""

    def __init__(self) -> None:
        self.latest: "deque[Reading]" = deque()
        self.computing = 0

    def add(self, tick: float, run: Mapping[str, Any], window_s: float) -> None:
        """Read the figures of the run. What is older than the window is forgotten."""
        latest, ended, computing = self.latest, run["numDone"] + run["numFailed"], run["numComputing"]
        if latest and ended < latest[-1].ended:         # the run was restarted
            latest.clear()
        worked_s = latest[-1].worked_s + (tick - latest[-1].tick) * (self.computing + computing) / 2 if latest else 0.0
        if len(latest) > 1 and tick - latest[-2].tick < window_s / 1000:        # so many are enough
            latest.pop()
        latest.append(Reading(tick, ended, worked_s))
        self.computing = computing
        while tick - latest[0].tick > window_s:
            latest.popleft()


def slice_counts(points: Sequence[Tuple[float, int]], number: int) -> List[float]:
    """How many tasks ended in each of so many equal slices of the time of some readings."""
    begin, end = points[0][0], points[-1][0]
    counts, index = [], 0       # at the border of each slice, between two readings by interpolation
    for border in range(number + 1):
        border_s = begin + (end - begin) * border / number
        while index < len(points) - 2 and points[index + 1][0] < border_s:
            index += 1
        (before_s, low), (after_s, high) = points[index], points[index + 1]
        part = (border_s - before_s) / (after_s - before_s) if after_s > before_s else 1.0
        counts.append(low + (high - low) * min(max(part, 0.0), 1.0))
    return [later - earlier for earlier, later in zip(counts, counts[1:])]


def time_for_tasks(remaining: int, rate: Optional[Rate]) -> Tuple[Optional[float], Optional[float]]:
    """The least and the most seconds that so many tasks will take. None where it is not known."""
    if not remaining:
        return 0.0, 0.0
    if rate is None:
        return None, None
    return remaining / rate.high, remaining / rate.low if rate.low > 0 else None


def range_text(least: Optional[float], most: Optional[float]) -> str:
    """A range of time: 2 h 1 min to 2 h 10 min, more than 3 h 0 min, about 2 min 0 s, unknown."""
    if least is None:
        return "unknown"
    if most is None:
        return "more than " + duration_text(least)
    low, high = duration_text(least), duration_text(most)
    return "about " + low if low == high else "%s to %s" % (low, high)


def parse_time(text: Optional[str]) -> Optional[float]:
    """Seconds since 1970 of a time as the API shows it (RFC 3339, UTC). None for None."""
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() if text else None


def seconds_since(text: Optional[str], now_utc: float) -> Optional[float]:
    """How long ago a time of the API was. None for None."""
    utc = parse_time(text)
    return None if utc is None else max(now_utc - utc, 0.0)


class RecentEnds(NamedTuple):
    """The tasks of a run that ended last."""
    readings: List[Reading]
    took_s: List[float]                 # how long the tasks took, ascending; without those where it is not known


RECENT_S = 600.0        # a rate is taken over at least so long,
RECENT_TASKS = 4        # and over as long as so many median tasks take


def recent_ends(tasks: Sequence[Mapping[str, Any]], complete: bool, computing: Sequence[Optional[float]],
                now_utc: float) -> RecentEnds:
    """Readings from the times `started` and `finished` of tasks that have ended.

    *complete*: no earlier tasks were left out. *computing*: when those that compute were started. The window begins
    when the first of its tasks was started, not when it ended: the first wave of long tasks ends all at once, after a
    long time.
    """
    times = sorted((parse_time(task["finished"]) or now_utc, parse_time(task["started"])) for task in tasks)
    took_s = sorted(max(end - start, 0.0) for end, start in times if start is not None)
    window_s = rate_window_s(took_s)
    recent = [(end, start) for end, start in times if end > now_utc - window_s]
    if not recent:
        return RecentEnds([], took_s)
    starts = [start for _, start in recent if start is not None]
    if starts and (complete or len(recent) < len(times)):
        begin = min(max(min(starts), now_utc - window_s), recent[0][0])
    else:
        begin = recent.pop(0)[0]
    known = [start for _, start in recent if start is not None] + [start for start in computing if start is not None]
    # (time, tasks more that have ended, tasks more that compute)
    events = [(start, 0, 1) for start in known] + [(end, 1, 0 if start is None else -1) for end, start in recent]
    readings, number = [Reading(begin, 0, 0.0)], 0
    for utc, ended, more in sorted(events) + [(now_utc, 0, 0)]:
        last = readings[-1]
        if utc > last.tick or ended:
            utc = max(utc, last.tick)
            readings.append(Reading(utc, last.ended + ended, last.worked_s + number * (utc - last.tick)))
        number += more
    return RecentEnds(readings, took_s)


def rate_window_s(took_s: Sequence[float]) -> float:
    """The seconds over which a rate is taken, for tasks that take so long (ascending)."""
    return max(RECENT_S, RECENT_TASKS * quantile(took_s, 0.5)) if took_s else RECENT_S


def quantile(ordered: Sequence[float], part: float) -> float:
    """The quantile of ascending values: so large a part of them lies below."""
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)]


def estimate_time_left(run: Mapping[str, Any], rate: Optional[Rate], ends: RecentEnds,
            longest_s: Optional[float]) -> Tuple[Optional[float], Optional[float], str]:
    """The least and the most seconds a run still takes. Where they are not known: None, None and the reason.

    *longest_s*: how long the task that computes longest has done so. When no task waits any more, workers run out
    of work and the rate says little. Then the estimate comes from how long the tasks before took.
    """
    waiting, computing = run["numWaiting"], run["numComputing"]
    if not waiting + computing:
        return 0.0, 0.0, ""
    if not computing and rate is None:
        return None, None, "nobody works on it"
    if waiting or not ends.took_s or longest_s is None:
        least, most = time_for_tasks(waiting + computing, rate)
        return least, most, "" if rate else "too few tasks have ended lately"
    most_s = quantile(ends.took_s, 0.9)
    if longest_s > most_s:
        return None, None, "the longest has computed for %s, nine in ten of the others took at most %s" % (
            duration_text(longest_s), duration_text(most_s))
    return max(quantile(ends.took_s, 0.1) - longest_s, 0.0), most_s, ""


def forecast_text(rate: Optional[Rate], least_s: Optional[float], most_s: Optional[float], why: str) -> str:
    """A rate and the time left, or why that is not known. *why*: as of `estimate_time_left`."""
    return "%s, time left %s" % (rate_text(rate.per_s) if rate else "rate unknown", time_left_text(
        least_s, most_s, why))


def time_left_text(least_s: Optional[float], most_s: Optional[float], why: str) -> str:
    """The time left as a range, or why it is not known."""
    return "unknown: " + why if least_s is None and why else range_text(least_s, most_s)


class Progress:
    """A bar on a terminal, for work that takes longer than 0.1 s. Without a terminal nothing is shown."""

    def __init__(self, what: str) -> None:
        self.what, self.screen = what, Screen(sys.stderr, os.environ)
        self.drawn_tick = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def show(self, done: float, total: float) -> None:
        """Draw the bar: so much of so much."""
        if total and time.monotonic() - self.drawn_tick > 0.1:
            percent = int(100 * done / total)
            run = {"numDone": percent, "numFailed": 0, "numComputing": 0, "numWaiting": 100 - percent}
            self.screen.redraw([bar_line(run, "%3d %%  %s" % (percent, self.what), self.screen)])
            self.drawn_tick = time.monotonic()

    def __exit__(self, *_: Any) -> None:
        self.screen.redraw([])


# ---------------------------------------------------------------- CLIENT
# How programs and this file's own verbs talk to a server. Knows the contract, and nothing of how a server keeps it.
# For another request: `Client.ask`, which is the same for all. For another method of the library: TaskFarm. For another
# field of the access file: Access and parse_access.

CLIENT_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0             # of the connection alone: where a firewall drops packets, that is soon said
LOGIN_RETRY_S = 60.0                # a login that has worked is retried for so long: NFS may show an old access file
ANSWER_LIMIT = 1 << 28              # bytes: no answer of a farm is longer
RETRY_STATUSES = (408, 429, 500, 502, 503, 504)      # a later try may succeed
RETRY_PAUSES_S = (0.1, 10.0)        # between two tries: at first, and at most
SAY_S = 4.0                         # that a request is tried again is said after the third failure, or so long


class Unreachable(OSError):
    """A server does not answer, or is another farm. The message has its URL and *advice*; `what` is without advice."""

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(what + advice)
        self.what = what


def may_succeed_later(error: Exception) -> bool:
    """Whether the same request may succeed at a later try."""
    return isinstance(error, Unreachable) or isinstance(error, FarmError) and error.status in RETRY_STATUSES


class OtherFarm(Unreachable):
    """What answers at the URL has not proven, by its certificate, that it is the farm of the login."""


class OtherMachine(Unreachable):
    """The URL is a loopback address, and the farm's server runs on another machine."""


class Access(NamedTuple):
    """A farm and a login to it."""
    url: str            # https://host:port, perhaps with a path, without a slash at the end
    user: str
    token: str          # used when there is one, else user and password
    password: str
    certificate: str    # by which the farm is known: in PEM, or its fingerprint; "system": one that the authorities of
                        # this system accept for the host of the URL, as where none is known ("")
    farm: str           # the identity of the farm; "" when it is not known
    source: str         # where this was found, for messages
    url_given: bool = False     # the URL is of --url or TASKFARM_URL, and the certificate of an access file
    host: str = ""      # the machine that wrote the access file: there a loopback address is good
    served: bool = False    # a server of this user has written the access file, and not 'login'

    def __repr__(self) -> str:
        return "Access(%r, %r)" % (self.url, self.source)       # a log or a traceback must not show the login

    @property
    def pinned(self) -> bool:
        """Whether one certificate alone is taken for the farm's."""
        return self.certificate not in ("", "system")


def home_folder() -> str:
    """The home folder; the current one where the system knows none."""
    home = os.path.expanduser("~")
    return "." if home == "~" else home     # nobody wants a folder with the name ~


def access_path(environ: Mapping[str, str]) -> str:
    """The path of the access file: $TASKFARM_ACCESS, else in $XDG_CONFIG_HOME, else in ~/.config."""
    base = environ.get("XDG_CONFIG_HOME") or os.path.join(home_folder(), ".config")
    return environ.get("TASKFARM_ACCESS") or os.path.join(base, "taskfarm", "access.json")


def read_access(path: str) -> Dict[str, Any]:
    """The access file: url, user, token, farm, certificate. Empty when there is none. Raises Refusal if not ours."""
    try:
        with open(path, encoding="utf-8") as file:
            refuse_link(path, {os.geteuid()})
            keep_private(file.fileno(), path, {os.geteuid(), 0})    # root can write all files anyway
            access = json.load(file)
        return access if isinstance(access, dict) else {}
    except (OSError, ValueError):
        return {}


def write_access(path: str, access: Dict[str, Any]) -> None:
    """Write the access file, 0600, whole or not at all. Raises OSError."""
    os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
    descriptor, part = tempfile.mkstemp(dir=os.path.dirname(path) or ".")      # 0600, and nobody can guess its name
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(access, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:       # a full disk: do not leave a file with a token in it
        with contextlib.suppress(OSError):
            os.remove(part)
        raise


def base_url(url: str) -> str:
    """The URL of a farm without a slash or the /api/ of the published client's url_base at its end.

    Of a host with a port alone, the https URL.
    """
    url = url.rstrip("/")
    if re.match(r"[^:/]+:[0-9]+(/|$)|\[[^/]+\]:[0-9]+(/|$)", url):
        url = "https://" + url
    return (url[:-4] if url.endswith("/api") else url).rstrip("/")


def parse_access(entries: Mapping[str, Any], source: str) -> Access:
    """Farm and login from the JSON of an access file or a lock file."""
    url, user, token, certificate, farm, host = (
        str(entries.get(name) or "") for name in ("url", "user", "token", "certificate", "farm", "host"))
    return Access(base_url(url), user, token, "", certificate, farm, source, host=host,
                  served=entries.get("served") is True)


def access_files(path: str) -> List[Access]:
    """Farms and logins of all access files in the folder of *path*, the last written first."""
    found = []
    for other in glob.glob(os.path.join(glob.escape(os.path.dirname(path)), "access*.json")):
        with contextlib.suppress(Refusal, OSError):     # somebody else's, or gone
            found.append((os.stat(other).st_mtime, parse_access(read_access(other), other)))
    return [access for _, access in sorted(found, key=operator.itemgetter(0), reverse=True)]


def find_access_file(path: str, **wanted: str) -> Optional[Access]:
    """Farm and login from the access file with this farm or url in the folder of *path*. None when there is none."""
    return next((access for access in access_files(path) if all(
        getattr(access, field) == value for field, value in wanted.items())), None)


def find_access(environ: Mapping[str, str], url: str = "", user: str = "", password: str = "",
                farm: str = "") -> Access:
    """Farm and login from the arguments, TASKFARM_URL, TASKFARM_TOKEN or TASKFARM_USER, or else the access file.

    The access file gives what is missing. It also has the certificate by which the farm is known: a login from the
    file never goes to another farm, and one that has come without a certificate (TASKFARM_FINGERPRINT) does not
    either. *farm*: the identity of the wanted farm, where it is known, since the file may have become another
    farm's, and a server may have moved. Commands of `work` have it in TASKFARM_FARM; an address that is given goes
    before that. Raises Refusal when no farm or no login is found.
    """
    path = access_path(environ)
    in_file = parse_access(read_access(path), path)
    given_url = base_url(url or environ.get("TASKFARM_URL", ""))
    if not given_url:
        farm = farm or environ.get("TASKFARM_FARM", "")
    if farm and in_file.farm != farm:
        in_file = find_access_file(path, farm=farm) or parse_access({}, path)
    token, source = ("", "the arguments") if user else (environ.get("TASKFARM_TOKEN", ""), "the environment")
    if not user and not token:
        user, password = environ.get("TASKFARM_USER", ""), environ.get("TASKFARM_PASSWORD", "")
        if user and not password:
            raise Refusal("TASKFARM_USER is set and TASKFARM_PASSWORD is not: set both, or TASKFARM_TOKEN, or neither")
    if farm and not (given_url or in_file.url):
        raise Refusal("no access file in %s is of the farm that this command belongs to: start its server again, which "
                      "writes one" % (os.path.dirname(path) or "."))
    if not (given_url or in_file.url):
        raise Refusal("no farm is known here: a server writes its address and a login to %s when it starts. For a "
                      "server elsewhere type 'python3 taskfarm.py login URL', or set TASKFARM_URL, TASKFARM_TOKEN and "
                      "TASKFARM_FINGERPRINT" % path)
    if not (user or token):
        if given_url and not farm and given_url != in_file.url:     # 'login' may have written it beside the first
            in_file = find_access_file(path, url=given_url) or in_file
        # Authorities vouch for the name of a host, so that the same certificate is wanted only of the same host.
        elsewhere = given_url and not in_file.pinned and url_host(given_url) != url_host(in_file.url)
        if elsewhere or not in_file.token:
            raise Refusal("there is no login for {0}: {1} has none, and TASKFARM_TOKEN is not set. 'python3 "
                          "taskfarm.py login {0}' gets one".format(given_url or in_file.url, path))
        return in_file if not given_url else in_file._replace(url=given_url, url_given=True)
    if given_url and given_url != in_file.url:
        in_file = find_access_file(path, url=given_url) or in_file._replace(url=given_url, farm="", url_given=True)
    certificate = environ.get("TASKFARM_FINGERPRINT", "")
    return in_file._replace(user=user, token=token, password=password, source=source,
                            certificate=check_fingerprint(certificate) if certificate else in_file.certificate)


def check_fingerprint(text: str) -> str:
    """A fingerprint as this file or openssl prints it, in the form of the first. Raises Refusal."""
    digits = re.sub("^sha256:|:", "", text.strip().lower())
    if not re.fullmatch("[0-9a-f]{64}", digits):
        raise Refusal("a fingerprint is SHA256: and 64 hexadecimal digits, as the start of the server prints it, not "
                      "%r" % text)
    return "SHA256:" + digits


def url_host(url: str) -> str:
    """The host in a URL, or the URL where there is none."""
    with contextlib.suppress(ValueError):
        return urllib.parse.urlsplit(url).hostname or url
    return url


def error_of_status(status: int, detail: str) -> FarmError:
    """The error of a status, with the server's own sentence."""
    kind = next((kind for kind in FarmError.__subclasses__() if kind.status == status), FarmError)
    error = kind.__new__(kind, detail)      # without __init__: some classes make their own sentence there
    error.status = status
    return error


def refused_login(access: Access) -> FarmError:
    """The error of a login that the farm refuses, with what sets or gets another. The farm's own is for programs."""
    if access.token:
        return error_of_status(Unauthorized.status, (
            "the token of {0.source} is refused: it has expired or been revoked, or its user has another password. "
            "'python3 taskfarm.py login {0.url}' gets another; unset TASKFARM_TOKEN where it is set".format(access)))
    return error_of_status(Unauthorized.status, (
        "user %s or the password is wrong. On the server's machine 'python3 taskfarm.py user passwd %s --db FILE' sets "
        "another password" % (printable(access.user), shlex.quote(printable(access.user)))))


def authorization(access: Access) -> str:
    """The Authorization header. Raises Refusal when a header cannot hold the token."""
    if not access.token:
        pair = "%s:%s" % (access.user, access.password)
        return "Basic " + base64.b64encode(pair.encode("utf-8", "surrogateescape")).decode()
    if not re.fullmatch("[!-~]+", access.token):
        raise Refusal("the token has a space, an end of line or a letter beyond ASCII, which no token has: look at "
                      "TASKFARM_TOKEN, or at %s" % access.source)
    return "Bearer " + access.token


@functools.lru_cache(maxsize=16)
def context_for(certificate: str) -> Tuple[ssl.SSLContext, str]:
    """See `trust`."""
    if certificate in ("", "system"):
        context = ssl.create_default_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context, ""
    if not certificate.startswith("SHA256:"):
        return pinned_context(certificate), fingerprint(certificate)
    return any_context(), certificate


def any_context() -> ssl.SSLContext:
    """A client's end of TLS that takes any certificate: for those who look at it before they send anything."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def trust(access: Access) -> Tuple[ssl.SSLContext, str]:
    """How the certificate of a farm is judged: by a context, and by its fingerprint where that is not "".

    Raises Refusal for what is no certificate.
    """
    try:
        return context_for(access.certificate)
    except (ValueError, ssl.SSLError):
        raise Refusal("the certificate in %s is none: 'python3 taskfarm.py login %s' gets the farm's" % (
            access.source, access.url))


def open_tls(access: Access, context: ssl.SSLContext, timeout_s: float) -> http.client.HTTPSConnection:
    """A connection to the URL whose handshake is done. Nothing has been sent over it. Raises Unreachable, and Refusal
    for what is no address of a farm."""
    try:
        parts = urllib.parse.urlsplit(access.url)
        port = parts.port
    except ValueError:
        parts, port = urllib.parse.urlsplit(""), None
    if parts.scheme != "https" or not parts.hostname or not parts.path.isascii():
        raise Refusal("a farm's address looks like %s, not like %r (%s)" % (
            re.sub("^http:", "https:", access.url) if parts.scheme == "http" and parts.hostname else
            "https://host:5000", access.url, access.source))
    connection = http.client.HTTPSConnection(parts.hostname, port, timeout=timeout_s, context=context)
    connection.auto_open = 0        # a new connection needs a new look at the certificate
    try:
        sock = socket.create_connection((connection.host, connection.port), min(timeout_s, CONNECT_TIMEOUT_S))
        sock.settimeout(timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sock = context.wrap_socket(sock, server_hostname=parts.hostname)     # which closes it on an error
    except ssl.SSLCertVerificationError as error:
        raise OtherFarm(not_trusted(access, error))
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):       # the second before Python 3.10
        raise Unreachable("%s ends the connection in the TLS handshake: the server there is being stopped, or it is no "
                          "taskfarm" % access.url)
    except ssl.SSLError as error:
        raise OtherFarm("what answers at %s does not speak TLS as a taskfarm does (%s), so no login was sent: another "
                        "program has the port, and the farm another, or it does not run" % (
                            access.url, (error.reason or str(error)).lower().replace("_", " ")))
    except (OSError, ValueError) as error:      # ValueError: a host name that cannot be encoded
        why = "timed out" if isinstance(error, socket.timeout) else getattr(error, "strerror", None) or error
        raise Unreachable("no farm answers at %s (%s)" % (access.url, why), "; the address is from %s: %s" % (
            "--url or TASKFARM_URL" if access.url_given else access.source, unreachable_advice(access.url, error)))
    return connection


def unreachable_advice(url: str, error: Exception) -> str:
    """What to do about an address where nothing answers."""
    if isinstance(error, (socket.gaierror, ValueError)):
        return "%s does not know the name %s: start the server with --advertise and a name or address that nodes " \
               "know" % (socket.gethostname(), url_host(url))
    if is_loopback(url):
        return "is the server running on this machine (%s)? For other nodes it is started with --host 0.0.0.0: " \
               "'python3 taskfarm.py --db FILE --host 0.0.0.0'" % socket.gethostname()
    if isinstance(error, ConnectionRefusedError):
        return "is the server running there, and was it started with --host 0.0.0.0? TASKFARM_URL names another"
    return "is the server running there? If it is, a firewall may be between, or it listens on another network " \
           "(--host, --advertise)"


def is_loopback(url: str) -> bool:
    """Whether only programs on the machine of the server can reach this URL."""
    host = url_host(url)
    return host in ("localhost", "::1") or host.startswith("127.")


def shown_certificate(connection: http.client.HTTPSConnection) -> str:
    """The certificate that the server has shown, in PEM."""
    shown = connection.sock.getpeercert(True)
    assert shown, "a server cannot do without one"
    return ssl.DER_cert_to_PEM_cert(shown)


def shown_fingerprint(connection: http.client.HTTPSConnection) -> str:
    """The fingerprint of that certificate."""
    return fingerprint(shown_certificate(connection))


WRONG_TIMES = {10: "has expired", 9: "is not valid yet"}       # codes of OpenSSL: X509_V_ERR_CERT_HAS_EXPIRED ...


def not_trusted(access: Access, error: Optional[ssl.SSLCertVerificationError] = None) -> str:
    """Why the certificate of a server is not taken for the farm's, and what to do."""
    if error and error.verify_code in WRONG_TIMES:
        return ("the certificate of %s %s, so no login was sent: whoever keeps the farm renews it; or the clock of %s, "
                "at %s, is wrong" % (access.url, WRONG_TIMES[error.verify_code], socket.gethostname(),
                                     time.strftime("%F %T")))
    if not access.pinned:
        return ("the certificate of %s is not one that the authorities of this system vouch for (%s), so no login was "
                "sent: 'python3 taskfarm.py login %s' shows it and asks whether it is the farm's" % (
                    access.url, error.verify_message if error else "", access.url))
    return ("what answers at %s is not the farm of %s: it has another certificate, so no login was sent: %s 'python3 "
            "taskfarm.py login %s' for a login to this one" % (
                access.url, access.source, "type" if access.url_given else "start that farm again, or type",
                access.url))


class Client:
    """One connection to a farm, kept open, for one thread at a time.

    *find* gives farm and login, of the farm with an identity where it is given *farm*. It is called again after a
    failed connection and after a 401.
    *retry_s*: a request is repeated for so long while the server does not answer, or answers one of
    RETRY_STATUSES. *timeout_s*: of one answer. `retry_after`: Retry-After of the last answer, seconds.
    """
    def __init__(self, find: Callable[..., Access], retry_s: float = 0.0,
                 timeout_s: float = CLIENT_TIMEOUT_S) -> None:
        self.find = find
        self.retry_s = retry_s
        self.timeout_s = timeout_s
        self.retry_after: Optional[float] = None
        self.server_date, self.answered_utc = "", 0.0       # the Date of the last answer, and our clock then
        self.give_up = threading.Event()    # set by another thread: retry no more
        self.say: Callable[[str], Any] = log.warning    # is called with a sentence when a request takes long
        self.meanwhile = ""                             # what goes on meanwhile, the end of that sentence
        self._access: Optional[Access] = None
        self.connection: Optional[http.client.HTTPSConnection] = None
        self.login_worked = False
        self.was_away = False               # a try failed, or a connection was lost, since this was last cleared
        self.away = False                   # we have said that the farm does not answer
        self.pid = os.getpid()              # the process that made the connection: a fork makes its own

    def ask(self, method: str, path: str, body: Optional[Dict[str, Any]] = None, key: str = "") -> Any:
        """Send one request; the JSON of the answer, None for 204.

        Repeating is safe: a POST has an Idempotency-Key (*key*, else a new one). Raises FarmError with
        the server's own sentence, Unreachable when no try succeeded, Refusal when no farm is known.
        """
        headers = {"User-Agent": "taskfarm/" + __version__}
        if method == "POST":
            headers["Idempotency-Key"] = key or secrets.token_hex(16)
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = json.dumps(body).encode()
        began, pause_s, failures = time.monotonic(), RETRY_PAUSES_S[0], 0
        while True:
            new_connection, retry_s = self.connection is None, self.retry_s
            try:
                answer = self._once(method, path, content, headers)
                if self.away:
                    self.away = False
                    self.say("the farm answers again")
                return answer
            except Unreachable as error:
                self.close()
                self.was_away = True
                if not new_connection:
                    continue        # it was kept open, and may have ended long ago
                failure: Exception = error
                if isinstance(error, OtherMachine) or (
                        isinstance(error, OtherFarm) and self.access.url_given and not self.login_worked):
                    retry_s = 0.0       # the one who gave the URL waits for no start of another server there
            except Unauthorized as error:
                self.close()
                failure, retry_s = error, min(retry_s, LOGIN_RETRY_S) if self.login_worked else 0.0
            except FarmError as error:
                if not may_succeed_later(error):
                    raise
                failure, self.was_away = error, True
            if self._find_again():
                continue
            wait_s = max(random.uniform(pause_s / 2, pause_s), self.retry_after or 0.0)
            pause_s = min(2 * pause_s, RETRY_PAUSES_S[1])
            if time.monotonic() + wait_s > began + retry_s or self.give_up.is_set():
                raise failure
            failures += 1
            if not self.away and (failures == 3 or time.monotonic() > began + SAY_S):
                self.away = True
                what = getattr(failure, "what", failure) if self.login_worked else failure
                self.say("%s; trying again for up to %s%s" % (
                    what, duration_text(retry_s).replace(" 0 s", ""), self.meanwhile))
            self.give_up.wait(wait_s)

    def _find_again(self) -> bool:
        """Read farm and login again; whether they have changed. The new ones are used from now on."""
        with contextlib.suppress(Refusal):
            found = self.find()
            if self.login_worked and self._access and self._access.farm and found.farm not in ("", self._access.farm):
                return False        # the access file is another farm's now, which does not know our run
            if found != self._access:
                self.close()
                self._access = found
                return True
        return False

    def _once(self, method: str, path: str, content: Optional[bytes], headers: Dict[str, str]) -> Any:
        self.retry_after = None
        access = self.connect()
        if access.token or access.user:
            headers["Authorization"] = authorization(access)
        status, answer = self._exchange(access, method, path, content, headers)
        if status == Unauthorized.status and "Authorization" in headers:
            raise refused_login(access)
        if status >= 400:
            raise error_of_status(status, answer)
        self.login_worked = True
        return answer

    @property
    def access(self) -> Access:
        """Farm and login in use. Raises Refusal when no farm is known."""
        if self._access is None:
            self._access = self.find()
        return self._access

    def connect(self) -> Access:
        """Connect, and see by its certificate that this is the farm; farm and login. Raises Unreachable."""
        access = self.access
        if self.pid != os.getpid():
            self.connection, self.pid = None, os.getpid()
        if self.connection is None:
            try:
                self.connection = self._open(access)
            except Unreachable:
                # A tunnel may end here, so it was tried.
                own = socket.gethostname()
                if self.login_worked or not is_loopback(access.url) or access.host in ("", own):
                    raise
                raise OtherMachine("the farm of %s can be reached on %s alone, and this is %s: stop its server there "
                                   "and start it with --host 0.0.0.0" % (access.source, access.host, own))
        return access

    def _open(self, access: Access) -> http.client.HTTPSConnection:
        context, pin = trust(access)
        connection = open_tls(access, context, self.timeout_s)
        if pin and shown_fingerprint(connection) != pin:
            connection.close()
            raise OtherFarm(not_trusted(access))
        return connection

    def stay_with(self, farm: str) -> None:
        """Ask the farm of this identity from now on, where its access file says it is."""
        self.find = functools.partial(self.find, farm=farm)
        if self._access and self._access.farm != farm:
            self.close()
            self._access, self.login_worked = None, False

    def _exchange(self, access: Access, method: str, path: str, content: Optional[bytes],
                  headers: Dict[str, str]) -> Tuple[int, Any]:
        """Status, and the JSON of the answer or the sentence of an error. Raises Unreachable."""
        assert self.connection is not None
        try:
            self.connection.request(method, urllib.parse.urlsplit(access.url).path + path, content, headers)
            response = self.connection.getresponse()
            # In small parts: Python 3.9 allocates as many bytes as it is asked to read.
            parts = iter(functools.partial(response.read, 1 << 16), b"")
            text = b"".join(itertools.islice(parts, ANSWER_LIMIT >> 16))
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable("%s does not answer as a taskfarm (%s)" % (
                access.url, str(error) or type(error).__name__))
        if self.connection.sock is None:        # the server ended the connection after this answer
            self.connection = None
        self.server_date, self.answered_utc = response.getheader("Date", ""), time.time()
        retry_after = response.getheader("Retry-After", "")
        self.retry_after = float(retry_after) if re.fullmatch("[0-9]{1,9}", retry_after) else None
        if response.status == 204:
            return 204, None
        try:
            answer = json.loads(text)
            if isinstance(answer, dict):
                return response.status, str(answer["detail"]) if response.status >= 400 else answer
        except (ValueError, KeyError, RecursionError):
            pass
        if response.status >= 500:
            return response.status, "%s answers %d %s" % (access.url, response.status, response.reason)
        raise Unreachable("%s does not answer as a taskfarm (%d %s)" % (access.url, response.status, response.reason))

    @property
    def peer(self) -> str:
        """Address and port of the server on the open connection. "" when there is none."""
        sock = self.connection and self.connection.sock
        return "%s port %d" % sock.getpeername()[:2] if sock else ""

    @property
    def clock_ahead_s(self) -> float:
        """How far the server's clock was ahead of ours at the last answer. 0 for less than Date's rounding."""
        try:
            clock_ahead_s = parsedate_to_datetime(self.server_date).timestamp() + 0.5 - self.answered_utc
        except (TypeError, ValueError):
            return 0.0
        return clock_ahead_s if abs(clock_ahead_s) > 1.5 else 0.0

    def close(self) -> None:
        """Close the connection. The next request opens another."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def farm_answers(access: Access) -> bool:
    """Whether the farm answers at its URL and shows its certificate."""
    if not access.certificate:
        return False
    with contextlib.closing(Client(lambda: access, timeout_s=2.0)) as client:
        try:
            client.connect()
        except (Unreachable, FarmError, Refusal):
            return False
    return True


MIN_UUID_DIGITS = 8                 # that name a run to a verb that changes it; tables show as many


def find_run_uuid(client: Client, text: str, changes: bool = False) -> str:
    """The uuid of the run with this uuid or name, or with a uuid or name that begins so.

    *changes*: the verb changes the run, so the wrong one must not be taken. Then the text is a whole name
    or at least MIN_UUID_DIGITS of a uuid, and a name has no precedence over a uuid that begins so.
    Another farm may have got the access file, as while a job waits in its queue. So the farms of the files beside it
    are asked too when that one has no such run. From then on the client stays with the farm that has it.
    Raises NotFound when no run matches, Refusal when several do.
    """
    try:
        first = client.access
    except Refusal:
        served = access_files(access_path(os.environ))
        if not served:
            raise
        client.stay_with(served[0].farm)        # no farm that stays is known: one that `run` serves may have it
        first = client.access
    found: Dict[str, str] = {}
    others = {access.farm: access for access in access_files(first.source) if access.farm not in ("", first.farm)} \
        if os.path.isfile(first.source) and not first.url_given else {}

    silent = []

    def look(farms: Iterable[str]) -> Dict[str, str]:
        runs = {}
        for farm in farms:
            with contextlib.closing(Client(functools.partial(client.find, farm=farm))) as other:
                try:
                    runs[farm] = match_run(other, text, changes)
                except Unreachable:
                    silent.append(farm)
                except (FarmError, Refusal):
                    continue
        return runs
    if others and re.fullmatch("[0-9a-f]{32}", text):       # then a farm that is away is not waited for
        found = look([first.farm]) or look(others)
    try:
        found = found or {first.farm: match_run(client, text, changes)}
    except NotFound as error:
        found = found or look(others)
        if not found and silent:
            raise Unreachable("%s. The farm of %s may have it, and does not answer" % (
                error, others[silent[0]].source))
        if not found:
            raise
    if len(found) > 1:
        raise Refusal("the farms of %s have a run %r: type its uuid" % (
            " and ".join(others[farm].source for farm in found), text))
    (farm, run_uuid), = found.items()
    if farm != first.farm:
        client.say("run %s is not in the farm of %s, but in that of %s" % (text, first.source, others[farm].source))
    client.stay_with(farm)
    return run_uuid


class HoldUp(NamedTuple):
    """Why no task of a run is handed out."""
    word: str
    why: str                        # a sentence
    for_good: bool                  # none will be by itself


# One for which another waits, and that is not for us.
UNKNOWN_RUN: Mapping[str, Any] = {"name": None, "state": "open", "numWaiting": 1, "numComputing": 0}


def hold_up(run: Mapping[str, Any], find: Callable[[str], Optional[Mapping[str, Any]]]) -> Optional[HoldUp]:
    """Why no task of a run is handed out, None when some may be. *find* gives the run of a uuid, None for a deleted."""
    verb = "'python3 taskfarm.py %%s %s' lets it go on" % run["uuid"][:8]
    if run["state"] == "cancelled":
        return HoldUp("cancelled", "the run was cancelled: " + verb % "resume", True)
    if run["state"] == "paused":
        return HoldUp("paused", "the run is paused: " + verb % "resume", False)
    if not run["after"]:
        return None
    first, title = find(run["after"]), "run " + run["after"][:8]
    if first is None:
        return None if run["afterAny"] else HoldUp(
            "never begins", "the run never begins: %s, for which it waits, was deleted" % title, True)
    title = printable(first["name"] or title)
    if first["state"] != "cancelled" and first["numWaiting"] + first["numComputing"]:
        return HoldUp("waits", "the run begins when %s is over%s" % (title, "" if first is UNKNOWN_RUN else (
            " (%d of %s are done)" % (first["numDone"], count_text(first["numTasks"], "task")))), False)
    if run["afterAny"] or first["numDone"] == first["numTasks"]:
        return None
    what, verb = ("was cancelled", "resume %s") if first["state"] == "cancelled" else (
        "is over, and %s failed" % count_text(first["numFailed"], "task"), "restart %s --failed")
    return HoldUp("never begins", "the run never begins: %s, for which it waits, %s: 'python3 taskfarm.py %s' "
                  "changes that" % (title, what, verb % first["uuid"][:8]), True)


def ask_hold_up(client: Client, run: Mapping[str, Any]) -> Optional[HoldUp]:
    """The same, asking for the run that it waits for."""
    def find(run_uuid: str) -> Optional[Mapping[str, Any]]:
        try:
            found: Mapping[str, Any] = client.ask("GET", "/api/runs/" + run_uuid)
            return found
        except NotFound:
            return None
        except Forbidden:           # a token for one run alone: we know that it waits, and not for how long
            return UNKNOWN_RUN
    return hold_up(run, find)


def match_run(client: Client, text: str, changes: bool) -> str:
    """The same, of the client's farm alone."""
    if re.fullmatch("[0-9a-f]{32}", text):
        try:
            client.ask("GET", "/api/runs/" + text)
        except NotFound:
            raise NotFound("there is no run %s: 'python3 taskfarm.py list' shows all runs" % text)
        return text
    runs = client.ask("GET", "/api/runs")["data"]
    named = [run for run in runs if run.get("name") == text]
    similar = [run for run in runs if text and run not in named and (
        run["uuid"].startswith(text.lower()) or (run.get("name") or "").startswith(text))]
    matches = named or similar
    if changes:
        matches = named + [run for run in similar
                           if len(text) >= MIN_UUID_DIGITS and run["uuid"].startswith(text.lower())]
    if not matches and similar:
        raise NotFound("no run is called %r, and a verb that changes a run takes a whole name or at least %d digits of "
                       "a uuid. Type one of these: %s" % (text, MIN_UUID_DIGITS, last_runs(similar)))
    if not matches:
        raise NotFound("no run is called %r, and no name or uuid begins so: 'python3 taskfarm.py list' shows all "
                       "runs" % text)
    if len(matches) > 1:
        raise Refusal("%d runs match %r: type the uuid of one, %s" % (len(matches), text, last_runs(matches)))
    if not re.fullmatch("[0-9a-f]{32}", str(matches[0]["uuid"])):       # it becomes a part of paths and command lines
        raise Refusal("the farm at %s says that %s is the uuid of a run, and it is none" % (
            client.access.url, ascii(matches[0]["uuid"])[:80]))
    return str(matches[0]["uuid"])


def last_runs(runs: Sequence[Mapping[str, Any]]) -> str:
    """Uuids and names of the last five of some runs, for a message."""
    return ", ".join(run["uuid"] + (" (%r)" % run["name"] if run.get("name") else "") for run in runs[-5:])


LEASE_S = 120                       # a worker that has sent nothing for so long is taken for dead
HEARTBEAT_S = 30.0                  # between two heartbeats
WORKER_RETRY_S = 900.0              # a worker retries a request for so long,
SCRIPT_RETRY_S = 30.0               # and a script when it starts


def register(client: Client, worker: str, lease_s: int, pid: int = 0, job: str = "") -> None:
    """Register a worker of this process, with a lease. A worker that has expired or signed off is alive again."""
    body = {"uuid": worker, "hostname": socket.gethostname(), "pid": pid or os.getpid(), "lease": lease_s}
    client.ask("POST", "/api/worker", dict(body, job=job) if job else body)


def renew(client: Client, worker: str) -> Tuple[int, float]:
    """A heartbeat: renew the lease. The revision of what the worker holds, and the seconds until the next one."""
    answer = client.ask("PUT", "/api/worker/" + worker)
    return int(answer["revision"]), random.uniform(0.8, 1.0) * HEARTBEAT_S


class Heartbeat:
    """A thread that renews the lease of a worker while this process lives. *find* gives farm and login."""

    def __init__(self, find: Callable[[], Access], worker: str) -> None:
        self.client = Client(find, SCRIPT_RETRY_S)
        self.worker = worker
        self.pid = os.getpid()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        pause_s = HEARTBEAT_S
        while not self.client.give_up.wait(pause_s):
            try:
                _, pause_s = renew(self.client, self.worker)
            except NotFound:        # the server went back to an older file
                with contextlib.suppress(FarmError, Unreachable):
                    register(self.client, self.worker, LEASE_S)
            except Conflict:        # somebody else has signed the worker off
                return
            except (FarmError, Unreachable, Refusal) as error:
                log.warning("the lease of worker %s was not renewed: %s", self.worker, error)

    def sign_off(self, hold: Dict[str, Any]) -> None:
        """Sign the worker off, so that its tasks wait for others, and end the thread.

        *hold*: the task at hand (see TaskFarmWorker). It has failed when an exception is what ends this script.
        """
        if self.pid != os.getpid() or self.client.give_up.is_set():     # in a fork, or the second time
            return
        self.client.give_up.set()
        session = hasattr(sys, "ps1")       # which goes on after an exception
        failure = failure_of(getattr(sys, "last_value", None)) if hold and not session else None
        with contextlib.closing(Client(self.client.find, timeout_s=3.0)) as client:
            with contextlib.suppress(FarmError, Unreachable, Refusal):
                if failure:
                    client.ask("PUT", hold["path"], dict(hold["claim"], **failure))
                client.ask("DELETE", "/api/worker/" + self.worker)


def failure_of(error: Optional[BaseException]) -> Optional[Dict[str, Any]]:
    """The report of a task that has raised an exception. None for one that is not about the task, as Ctrl-C."""
    if not isinstance(error, Exception) or isinstance(error, (FarmError, Unreachable, Refusal)):
        return None
    last_line = traceback.format_exception_only(type(error), error)[-1]
    return {"status": "failed", "message": printable(last_line)[:MESSAGE_LIMIT]}


def script_access(username: Optional[str], password: Optional[str], url_base: Optional[str],
                  farm: str = "") -> Access:
    """Farm and login of a script: its own, else those of `find_access`."""
    known = read_access(access_path(os.environ)).get("url") or os.environ.get("TASKFARM_URL")
    if username and not (url_base or known):
        url_base = "http://localhost:5000/api/"     # the published client's default
    url_base = re.sub("^http:", "https:", url_base or "")       # that one speaks plain HTTP, and the port is the same
    return find_access(os.environ, url_base, username or "", password or "", farm)


def tfRuns(username: Optional[str] = None, password: Optional[str] = None,
           url_base: Optional[str] = None) -> List[Dict[str, Any]]:
    """All runs, as the API shows them. Without arguments, farm and login come from the access file."""
    find = functools.partial(script_access, username, password, url_base)
    with contextlib.closing(Client(find, SCRIPT_RETRY_S)) as client:
        runs: List[Dict[str, Any]] = client.ask("GET", "/api/runs")["data"]
        return runs


class TaskFarm:
    """A run: the one with *uuid*, or a new one of *numTasks* tasks.

    Names, arguments and behaviour are those of the published client. These are the differences: without
    arguments, farm and login come from the access file; *uuid* may be the whole name of a run; a request
    is repeated for 15 minutes while the server does not answer; several threads may use one object.
    A new run has a *name*, and its tasks are tried until they have failed *maxFailures* times. Raises FarmError,
    which is a RuntimeError, with the server's own sentence, and Unreachable, which is an OSError.
    """
    def __init__(self, username: Optional[str] = None, password: Optional[str] = None, uuid: Optional[str] = None,
                 numTasks: Optional[int] = None, url_base: Optional[str] = None, name: Optional[str] = None,
                 maxFailures: Optional[int] = None) -> None:
        self._use(functools.partial(script_access, username, password, url_base), SCRIPT_RETRY_S)
        if uuid is None and numTasks is None:
            raise RuntimeError("numTasks must be set when creating a new task")
        if uuid is None:
            body = {"numTasks": numTasks, "name": name, "maxFailures": maxFailures}
            run = self._ask("POST", "/api/run", {field: value for field, value in body.items() if value is not None})
            self._client.stay_with(self._client.access.farm)
        else:
            run = self._ask("GET", "/api/runs/" + find_run_uuid(self._client, uuid, changes=True))
        self._uuid, self._numTasks = str(run["uuid"]), int(run["numTasks"])
        self._token = str(self._ask("GET", "/api/token")["token"])
        self._client.retry_s = WORKER_RETRY_S

    def _use(self, find: Callable[..., Access], retry_s: float) -> None:
        self._client, self._lock = Client(find, retry_s), threading.Lock()

    def __getstate__(self) -> Dict[str, Any]:
        """What pickle keeps. The copy logs in as this one did, but by the token instead of a password."""
        state = {name: value for name, value in self.__dict__.items() if name not in (
            "_client", "_lock", "_sign_off")}
        username, _, url_base = self._client.find.args      # type: ignore[attr-defined]
        user, password = (self._token, "") if username else (None, None)
        return dict(state, find=functools.partial(
            script_access, user, password, url_base, farm=self._client.access.farm))

    def __setstate__(self, state: Dict[str, Any]) -> None:
        """Made again from what pickle kept, with a connection of its own."""
        self._use(state.pop("find"), WORKER_RETRY_S)
        self.__dict__.update(state)

    def _ask(self, method: str, path: str, body: Optional[Dict[str, Any]] = None, key: str = "") -> Any:
        with self._lock:
            return self._client.ask(method, path, body, key)

    def url(self, url: str) -> str:
        """The URL of an endpoint such as "runs"."""
        return "%s/api/%s" % (self._client.access.url, url)

    @property
    def session(self) -> Client:
        """The client that sends the requests. In the published client it is a session of `requests`."""
        return self._client

    @property
    def token_auth(self) -> Tuple[str, str]:
        """A token as user name, with an empty password: the form that `requests` takes for auth."""
        return self._token, ""

    @property
    def uuid(self) -> str:
        """The uuid of the run."""
        return self._uuid

    @property
    def numTasks(self) -> int:
        """The number of its tasks."""
        return self._numTasks

    def info(self, info: str) -> Any:
        """One figure of the run, or all of them for ""."""
        answer = self._ask("GET", "/api/runs/%s?info=%s" % (self.uuid, urllib.parse.quote(info, safe="")))
        return answer[info] if info else answer

    @property
    def percentDone(self) -> float:
        """The mean percentage of its tasks."""
        return float(self.info("percentDone"))

    @property
    def numDone(self) -> int:
        """How many tasks are done."""
        return int(self.info("numDone"))

    @property
    def numWaiting(self) -> int:
        """How many tasks wait."""
        return int(self.info("numWaiting"))

    @property
    def numComputing(self) -> int:
        """How many tasks are being computed."""
        return int(self.info("numComputing"))

    def _task_path(self, task: int) -> str:
        if task < 0 or task >= self.numTasks:
            raise RuntimeError("task ID outside range 0 %d" % (self.numTasks - 1))
        return "/api/runs/%s/tasks/%d" % (self.uuid, task)

    def getTaskInfo(self, task: int, info: str) -> Any:
        """One figure of a task, or all of them for ""."""
        answer = self._ask("GET", "%s?info=%s" % (self._task_path(task), urllib.parse.quote(info, safe="")))
        return answer[info] if info else answer

    def setTaskInfo(self, task: int, info: str, value: Any) -> None:
        """Set percentCompleted or status of a task, whoever computes it."""
        self._ask("PUT", self._task_path(task), {info: value})

    def restart(self, everything: bool = False) -> None:
        """Restart the tasks that are not done; with *everything*, all tasks."""
        self._ask("POST", "/api/runs/%s/restart?all=%s" % (self.uuid, str(everything)))

    def delete(self) -> None:
        """Delete the run and its tasks."""
        self._ask("DELETE", "/api/runs/" + self.uuid)


class TaskFarmWorker(TaskFarm):
    """A worker of a run, by the published client's names. A thread renews its lease.

    Its reports are fenced: one about a task that another worker has claimed since raises Conflict and
    changes nothing. When the process ends or the object is dropped, its tasks wait for others. But the current one
    has failed when an exception ends the script, or leaves `with worker:`. A copy by pickle works on the same task,
    under the lease of this one.
    """
    def __init__(self, username: Optional[str] = None, password: Optional[str] = None, uuid: Optional[str] = None,
                 url_base: Optional[str] = None) -> None:
        if uuid is None:
            raise RuntimeError("a worker wants a run, by its uuid or name: TaskFarmWorker(uuid=run.uuid)")
        super().__init__(username, password, uuid=uuid, url_base=url_base)
        # The task, its path, and what fences reports about it ("claim"). Empty when there is no current task.
        self._hold: Dict[str, Any] = {}
        self._key = secrets.token_hex(16)       # of the next claim, or of the last one if its answer was lost
        self._percentageDone: Optional[float] = None
        self._worker_uuid = secrets.token_hex(16)
        register(self._client, self._worker_uuid, LEASE_S)       # without the lock: no other thread has this object yet
        heartbeat = Heartbeat(self._client.find, self._worker_uuid)
        self._sign_off = weakref.finalize(self, heartbeat.sign_off, self._hold)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        """Made again from what pickle kept. The process that registered the worker keeps its lease."""
        super().__setstate__(state)
        self._key = secrets.token_hex(16)

    def __enter__(self) -> "TaskFarmWorker":
        return self

    def __exit__(self, kind: Any, error: Optional[BaseException], _: Any) -> None:
        failure = failure_of(error)
        if self._hold and failure:
            with contextlib.suppress(FarmError, Unreachable):       # the exception itself says more
                self._report(failure)
            self._hold.clear()
        self.close()

    @property
    def worker_uuid(self) -> str:
        """The uuid of the worker."""
        return self._worker_uuid

    @property
    def task(self) -> Optional[int]:
        """The current task. When there is none, one is claimed. None when no task waits."""
        if not self._hold:
            self._percentageDone = None
            claimed = self._ask("POST", "/api/runs/%s/task" % self.uuid, {"worker_uuid": self.worker_uuid}, self._key)
            self._key = secrets.token_hex(16)
            if claimed is not None:
                self._hold.update(task=int(claimed["task"]), path=self._task_path(int(claimed["task"])), claim={
                    "worker_uuid": self.worker_uuid, "attempt": int(claimed["attempt"])})
                self._percentageDone = float(claimed["percentCompleted"])
        return self._hold.get("task")

    @property
    def tasks(self) -> Iterator[int]:
        """Tasks, one after the other, until none waits."""
        while True:
            task = self.task
            if task is None:
                return
            yield task

    def setTaskInfo(self, task: int, info: str, value: Any) -> None:
        """Set percentCompleted or status of a task. For the current task this worker must still hold it."""
        if task == self._hold.get("task"):
            self._report({info: value})
        else:
            super().setTaskInfo(task, info, value)

    def _report(self, said: Dict[str, Any]) -> None:
        """Report about the current task, which is no longer that when another worker has claimed it."""
        try:
            self._ask("PUT", self._hold["path"], dict(self._hold["claim"], **said))
        except Conflict:
            self._hold.clear()
            raise

    def update(self, percentage: float) -> None:
        """Report the percentage of the current task, 0 to 100."""
        if not self._hold:
            return
        if percentage < 0 or percentage > 100:
            raise ValueError("percentage {} out of range".format(percentage))
        self._percentageDone = percentage
        self._report({"percentCompleted": percentage})

    def done(self) -> None:
        """Finish with the current task. At 100 percent it is done, else it stays computing.

        When this could not be told the farm, the task is still the current one: call it again.
        """
        if self._hold and self._percentageDone is not None and abs(self._percentageDone - 100) < 1e-6:
            self._report({"status": "done"})
        self._hold.clear()

    def fail(self, message: str = "", exitCode: Optional[int] = None) -> None:
        """Report the current task as failed. It waits again until it has failed as often as its run lets it."""
        if self._hold:
            said = {"status": "failed", "message": printable(message)[:MESSAGE_LIMIT] or None, "exitCode": exitCode}
            self._report({field: value for field, value in said.items() if value is not None})
            self._hold.clear()

    def close(self) -> None:
        """Sign off, so that the worker's tasks wait for others. The end of the process does the same."""
        if hasattr(self, "_sign_off"):      # not in a copy
            self._sign_off()
        self._client.close()


# ---------------------------------------------------------------- COMMANDS
# The command of a task: its arguments, its process, its output and how it ended. Knows no server and no report.
# For another field like {task}: TASK_FIELDS and Template. For another variable of commands: command_environment, or
# Template.variables where tasks differ in it. For another source of parameters: a class like Grid, its option, and a
# kind in WORK of API and in `parameters_again`.

MAX_JOBS = 5000                     # commands that run at the same time, in one worker
TAIL_LIMIT = 8192                   # bytes at the end of a command's output in which its last line is looked for

WATCHDOG_PATIENCE_S = 60            # with commands that SIGKILL does not end, and then with the farm

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1,
                signal.SIGUSR2, signal.SIGXCPU)     # LSF and SGE send these two before a job's end
TIMEOUT_CODE = 124                  # as timeout(1) has it
TEMPORARY_ERRORS = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EIO,
                    errno.ESTALE, errno.ETXTBSY)
GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")     # the first of NVIDIA
TASK_FIELDS = ("task", "run", "attempt", "slot")       # of every command, in braces


class Parameters:
    """What tells the tasks of a run from each other: a value of each name, found by the number of the task.

    Nothing is kept for a task, so a run of a million costs what one of ten does.
    """
    names: Tuple[str, ...] = ()
    options: List[str] = []             # what makes the same again: of `new` and of `work`
    size_text = ""                      # how many tasks there are, in words

    def __len__(self) -> int:
        """For how many tasks there are values."""
        raise NotImplementedError

    def values(self, task: int) -> Dict[str, str]:
        """The values for one task. Raises Refusal when they cannot be known any more."""
        raise NotImplementedError

    def check(self) -> str:
        """Look at the values of all tasks. A sentence for the user where one looks odd; Refusal where one is wrong."""
        return ""

    def kept(self) -> Dict[str, Any]:
        """What a run keeps of them: `parameters_again` finds the same. Refusal where nobody could read them again."""
        raise NotImplementedError

    def text(self, task: int) -> str:
        """The values for one task, for a person."""
        return " ".join("%s=%s" % pair for pair in self.values(task).items() if pair[0])

    def _take_names(self, names: Iterable[str], source: str) -> None:
        for name, times in Counter(names).items():
            if name in TASK_FIELDS:
                raise Refusal("%s: every command has a {%s} of its own, so choose another name than %s" % (
                    source, name, name))
            if times > 1:
                raise Refusal("%s: the name %s comes twice, so nobody could tell which is meant" % (source, name))
            self.names += (name,)


class Lines(Parameters):
    """The lines of a file by number, from 0, without keeping them: 10 million lines take 0.2 MB of memory.

    Only the number of lines before each block is known. A block is read when a line of it is wanted. A pipe is
    read into a temporary file first. The path - is the standard input.
    """
    BLOCK = 65536
    kind = "lines"
    names: Tuple[str, ...] = ("line",)

    def __init__(self, path: str) -> None:
        self.path, self.options = path, ["--" + self.kind, path]
        self.lines_before = array.array("Q", [0])       # lines that end before block n
        self.block, self.lines = -1, [b""]              # of the last line that was looked at: the next is often there
        last, digest = b"", hashlib.sha256()
        try:
            self._open()
            for block in iter(lambda: self.file.read(self.BLOCK), b""):
                self.lines_before.append(self.lines_before[-1] + block.count(b"\n"))
                digest.update(block)
                last = block[-1:]
        except OSError as error:
            raise Refusal("%s cannot be read: %s" % (path, error.strerror))
        self.sha256 = digest.hexdigest()
        self.count = self.lines_before[-1] + (last not in (b"", b"\n"))
        self.size_text = "%s has %d lines" % (path, self.count)

    def _open(self) -> None:
        self.file: Any = open(0 if self.path == "-" else self.path, "rb", closefd=self.path != "-")  # noqa: SIM115
        self.watched: Union[int, str] = 0 if self.path == "-" else self.path      # os.stat shows when it changes
        if not self.file.seekable():
            pipe, self.file = self.file, tempfile.TemporaryFile()       # noqa: SIM115
            shutil.copyfileobj(pipe, self.file)
            self.watched = self.file.fileno()
        self.file.seek(0)
        self.stamp = self._stamp(os.fstat(self.file.fileno()))

    @staticmethod
    def _stamp(status: os.stat_result) -> Tuple[int, int, int]:
        return status.st_size, status.st_mtime_ns, status.st_ino

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> bytes:
        """A line without its end. Raises Refusal when the file has changed."""
        if not 0 <= number < self.count:
            raise IndexError(number)
        # The block in which the line before ends.
        block = bisect.bisect_left(self.lines_before, number, 1) - 1 if number else 0
        skip = number - self.lines_before[block]
        stamp = None
        try:
            if block != self.block or skip + 1 >= len(self.lines):
                self.file.seek(block * self.BLOCK)
                text = self.file.read(self.BLOCK)
                while text.count(b"\n") <= skip:
                    more = self.file.read(self.BLOCK)
                    if not more:
                        break
                    text += more
                self.block, self.lines = block, text.split(b"\n")
            stamp = self._stamp(os.stat(self.watched))      # after the reading: what was read is what was indexed
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):     # both: replaced or removed; ESTALE is NFS's word
                raise
        if stamp != self.stamp:
            self.block = -1
            raise Refusal("%s was changed, replaced or removed since this worker began, so its line %d may be another "
                          "one now: start the worker again when the file is right" % (self.path, number + 1))
        return self.lines[skip].rstrip(b"\r")

    def values(self, task: int) -> Dict[str, str]:
        """The line of the task."""
        return {"line": os.fsdecode(self[task])}

    def check(self) -> str:
        """Count the empty lines."""
        self.file.seek(0)
        empty = sum(not line.strip() for line in self.file)
        return "%d of the %d lines of %s %s empty: each of them is a task as well" % (
            empty, self.count, self.path, "is" if empty == 1 else "are") if empty else ""

    def kept(self) -> Dict[str, Any]:
        """Path, size and digest of the file."""
        path = os.path.normpath(os.path.join(current_folder(), self.path))
        if not isinstance(self.watched, str) or path.startswith("/dev/"):
            raise Refusal("%s cannot be read again by workers: write it into a file, and name that" % self.path)
        return {"kind": self.kind, "path": path, "size": self.stamp[0], "sha256": self.sha256}

    def text(self, task: int) -> str:
        """The line alone."""
        return self.values(task)["line"]


class TableRows(Lines):
    """The rows of a CSV or TSV file below its head: a value for each column. Fields may stand in quotes."""
    kind = "table"
    names: Tuple[str, ...] = ()
    text = Parameters.text

    def __init__(self, path: str) -> None:
        super().__init__(path)
        head = self[0] if self.count else b""
        if head.startswith(b"\xef\xbb\xbf"):       # as spreadsheets begin a file
            head = head[3:]
        text = os.fsdecode(head)
        self.separator = "\t" if path.endswith(".tsv") else max(",\t;", key=text.count)
        self.columns: List[str] = []
        self.columns = [name.strip() for name in self._fields(0, head)]
        self._take_names(filter(None, self.columns), "the head of %s" % path)    # an index may have no name
        if not self.names:
            raise Refusal("%s has no head: the first line of a table has the names of its columns" % path)
        self.size_text = "%s has %d rows" % (path, len(self))

    def __len__(self) -> int:
        return self.count - 1

    def _fields(self, number: int, line: bytes) -> List[str]:
        try:
            fields = next(csv.reader([os.fsdecode(line)], delimiter=self.separator, strict=True), [])
        except csv.Error as error:
            raise Refusal("line %d of %s cannot be read (%s): a row is one line, and a quote that begins a field also "
                          "ends it" % (number + 1, self.path, error))
        if self.columns and len(fields) != len(self.columns):
            raise Refusal("line %d of %s has %s, and the head has %d" % (
                number + 1, self.path, count_text(len(fields), "field"), len(self.columns)))
        return fields

    def values(self, task: int) -> Dict[str, str]:
        """The fields of the task's row."""
        return dict(zip(self.columns, self._fields(task + 1, self[task + 1])))

    def check(self) -> str:
        """Read all rows."""
        self.file.seek(0)
        for number, line in enumerate(self.file):
            if number:
                self._fields(number, line.rstrip(b"\r\n"))
        return ""


class Grid(Parameters):
    """Every combination of some values, numbered so that the last name varies fastest.

    *axes*: as "lr=0.1,0.01" or "seed=0..999". A range is FIRST..LAST or FIRST..LAST..STEP, both ends included.
    """
    RANGE = re.compile(r"({0})\.\.({0})(?:\.\.({0}))?".format(r"-?\d{1,15}(?:\.\d{1,9})?"))

    def __init__(self, axes: Sequence[str]) -> None:
        self.given = list(axes)
        self.options = [word for axis in axes for word in ("--grid", axis)]
        self._take_names([axis.partition("=")[0] for axis in axes], "--grid")
        # For each name: how many values come before each piece (and at last, all), and the pieces as functions.
        self.axes: List[Tuple[List[int], List[Callable[[int], str]]]] = []
        self.size = 1
        for axis in axes:
            name, equals, values = axis.partition("=")
            if not name or not values:
                raise Refusal("--grid %s: an axis looks like lr=0.1,0.01 or seed=0..999" % axis)
            pieces = [self._piece(axis, value) for value in values.split(",")]
            self.axes.append(([0, *itertools.accumulate(count for count, _ in pieces)], [value for _, value in pieces]))
            self.size *= self.axes[-1][0][-1]
        if self.size > MAX_TASKS:
            raise Refusal("the grid has %d combinations, and a run %d tasks at most" % (self.size, MAX_TASKS))
        self.size_text = "the grid has %d combinations" % self.size

    def _piece(self, axis: str, text: str) -> Tuple[int, Callable[[int], str]]:
        """How many values a range or a single value stands for, and the one at an index."""
        match = self.RANGE.fullmatch(text)
        if not match:
            return 1, lambda _: text
        first, last = Decimal(match[1]), Decimal(match[2])
        step = Decimal(match[3] or (1 if first <= last else -1))
        if not step or (last - first) / step < 0:
            raise Refusal("--grid %s: the step of %s does not lead from %s to %s" % (axis, text, match[1], match[2]))
        width = max(map(len, match.group(1, 2))) if re.match(r"-?0\d", match[1]) else 0     # as in 001..100
        return int((last - first) // step) + 1, lambda index: format((first + index * step).normalize(), "f").zfill(
            width)

    def __len__(self) -> int:
        return self.size

    def values(self, task: int) -> Dict[str, str]:
        """The combination of the task: its number, read with a digit for each axis."""
        if task >= self.size:
            raise IndexError(task)
        values = []
        for starts, pieces in reversed(self.axes):
            task, index = divmod(task, starts[-1])
            piece = bisect.bisect_right(starts, index) - 1
            values.append(pieces[piece](index - starts[piece]))
        return dict(zip(self.names, reversed(values)))

    def kept(self) -> Dict[str, Any]:
        """The axes."""
        return {"kind": "grid", "grid": self.given}


def current_folder() -> str:
    """This folder, by the name that the shell has for it: what an automounter calls it need not be there elsewhere."""
    folder = os.environ.get("PWD", "")
    with contextlib.suppress(OSError):
        if os.path.isabs(folder) and os.path.samefile(folder, "."):
            return folder
    return os.getcwd()


def parameters_again(kept: Optional[Mapping[str, Any]]) -> Optional[Parameters]:
    """The parameters of which a run keeps this, None for none. Raises Refusal when their file has changed."""
    if kept is None:
        return None
    if kept["kind"] == "grid":
        return Grid(kept["grid"])
    path, parameters = kept["path"], None
    try:
        status = os.stat(path)
    except OSError as error:
        raise Refusal("%s, which has the parameters of the run, cannot be read: %s" % (path, error.strerror))
    if stat.S_ISREG(status.st_mode) and status.st_size == kept["size"]:     # a pipe would be waited for
        parameters = (TableRows if kept["kind"] == "table" else Lines)(path)
    if parameters is None or parameters.sha256 != kept["sha256"]:
        raise Refusal("%s has changed since the run was made, when it had %d bytes: put back what was in it, or make "
                      "another run: python3 taskfarm.py new --%s %s -- COMMAND" % (
                          path, kept["size"], kept["kind"], shlex.quote(path)))
    return parameters


class Template:
    """A command with fields in its arguments: {task}, {run}, {attempt}, {slot}, and those of the parameters.

    The value of a field stays one argument, and no shell reads it. The exception is a command that is one
    parameter alone, as {line}: each value is then a command for sh. {{task}} stands for the text {task}.
    ${task} is a shell's variable, and {} is {line}, or {task} where there are no lines. In a command that
    has that field, or a parameter, in its long form, {} is left alone: find(1) and awk(1) have uses for it.
    """
    IN_BRACES = re.compile(r"(?<!\$)(\{?)\{([A-Za-z_]\w*)\}")

    def __init__(self, words: Sequence[str], run: str, parameters: Optional[Parameters] = None, typed: str = "--",
                 gpus: Sequence[Dict[str, str]] = (), elsewhere: bool = False) -> None:
        """*typed*: what the user typed before the words; a refusal shows it with a better command.

        *gpus*: for each slot, variables that show its commands their GPUs. *elsewhere*: other machines run the command,
        and may have a program that is not here.
        """
        self.run, self.parameters, self.gpus = run, parameters, gpus
        given = parameters.names if parameters else ()
        self.chief = "line" if "line" in given else "task"
        self.reads_task = any("TASKFARM_" in word for word in words)
        self.unknown: List[str] = []
        self._find_fields(words, TASK_FIELDS + given)
        if not self.used & {self.chief, *given} and not self.reads_task:
            self._find_fields(words, TASK_FIELDS + given + ("",))
        alone = len(words) == 1 and self.field.fullmatch(words[0]) and self.used & set(given)
        self.words = ["/bin/sh", "-c", words[0]] if alone else list(words)
        has_fields = any(self.field.search(word) for word in self.words)
        self.constant = None if has_fields else [os.fsencode(word) for word in self.words]
        self.program, self.is_here = self.words[0], True
        if len(self.program.split()) > 1 and not shutil.which(os.fsdecode(self.arguments(0, 1)[0])):
            raise Refusal("there is no program called '%s'. If that is a whole command, type it like this: %s %s" % (
                self.program, typed, unquoted(self.words)))
        if not self.same_program:
            return
        path = shutil.which(self.program)
        self.is_here = bool(path)
        if not path and elsewhere:
            return
        if not path:
            raise Refusal("there is no program %s that can be run here (chmod +x makes a script one)" % self.program)
        self.words[0] = path
        if self.constant:
            self.constant[0] = os.fsencode(path)

    def _find_fields(self, words: Sequence[str], known: Sequence[str]) -> None:
        """Learn which fields the words have. Refuses a name in braces that is no field, and close to the name of one.

        Other names stay as they are, since programs have uses for braces, as awk '{print}'.
        """
        self.unknown = []
        texts = list(known)
        for match in (match for word in words for match in self.IN_BRACES.finditer(word)):
            brace, name = match.groups()
            if name in known:
                continue
            if not difflib.get_close_matches(name.lower(), [field.lower() for field in (*known, "line")], 1, 0.7):
                if not brace and not re.search(r"\s", match.string):        # a word with blanks is a program's text
                    self.unknown.append(name)
            elif brace:
                texts.append(name)
            elif name == "line":
                raise Refusal("{line} stands for a line of a file: name the file with --lines FILE")
            else:
                raise Refusal("there is no field {%s}, but there are %s ({{%s}} stands for the text {%s})" % (
                    name, ", ".join("{%s}" % field for field in known if field), name, name))
        # {{name}}, which is a text, as group 1, and {name}, which is a field, as group 2
        self.field = re.compile(r"\{\{(%s)\}\}|(?<!\$)\{(%s)\}" % tuple(
            "|".join(map(re.escape, names)) for names in (texts, known)))
        self.used = {name or self.chief for name in self._fields_of(words)}

    def _fields_of(self, words: Sequence[str]) -> Set[str]:
        return {match[2] for word in words for match in self.field.finditer(word) if match[2] is not None}

    def warnings(self, tasks: int) -> List[str]:
        """Sentences about what looks like a mistake in a command for so many tasks."""
        sentences = ["{%s} is no field of a command, and stays as it is" % name for name in self.unknown]
        if not self.is_here:
            sentences.append("there is no program %s that can be run here: those who work on the run need it" % (
                self.program))
        wanted = self.parameters.names if self.parameters else ("task",)
        if tasks > 1 and not self.used & set(wanted) and (self.parameters or not (
                self.reads_task or any(file_mentions(word, b"TASKFARM_") for word in self.words))):
            sentences.append("the command has no %s%s: each of the %d tasks does the same. If your shell took the "
                             "braces off, as csh does, quote them: '{%s}'" % (
                                 " or ".join("{%s}" % name for name in wanted[:3]),
                                 "" if self.parameters else " and does not seem to read TASKFARM_TASK",
                                 tasks, wanted[0]))
        return sentences

    @property
    def same_program(self) -> bool:
        """Whether every task runs the same program."""
        return not self._fields_of(self.words[:1])

    def arguments(self, task: int, attempt: int, slot: int = 0) -> List[bytes]:
        """The program and its arguments for one task."""
        if self.constant:
            return self.constant
        values = {"task": str(task), "run": self.run, "attempt": str(attempt), "slot": str(slot)}
        if self.parameters and self.used & set(self.parameters.names):
            values.update(self.parameters.values(task))
        values[""] = values.get(self.chief, "")

        def fill(match: "re.Match[str]") -> str:
            return "{%s}" % match[1] if match[2] is None else values[match[2]]
        return [os.fsencode(self.field.sub(fill, word)) for word in self.words]

    def variables(self, task: int, attempt: int, slot: int) -> Dict[str, str]:
        """What the environment of a task's command has beside `command_environment`: the same names each time."""
        return dict(self.gpus[slot] if self.gpus else {}, TASKFARM_TASK=str(task), TASKFARM_ATTEMPT=str(attempt),
                    TASKFARM_SLOT=str(slot))

    def shown(self, task: int, slot: int) -> List[str]:
        """The command of a task as lines for a shell: its parameters as a comment, and what can be pasted."""
        values = self.parameters.values(task) if self.parameters else {}
        comment = "# task %d" % task + ": " * bool(values) + " ".join(
            "%s=%s" % (name, printable(values[name])) for name in values if name)
        variables = [] if self.used & {self.chief, *values} else ["TASKFARM_TASK=%d" % task]
        variables += ["%s=%s" % pair for pair in (self.gpus[slot].items() if self.gpus else ())]
        words = [os.fsdecode(word) for word in self.arguments(task, 1, slot)]
        return [comment, " ".join(variables + [shlex.quote(word) for word in words])]


def share_gpus(environ: Mapping[str, str], jobs: int, gpus_per_task: int) -> List[Dict[str, str]]:
    """For each slot the variables that show its commands some of the GPUs that this worker was given."""
    given = {name: environ[name] for name in GPU_VARIABLES if name in environ}
    source = " and ".join("%s=%s" % pair for pair in given.items())
    if not given:
        source = "SLURM_JOB_GPUS" if environ.get("SLURM_JOB_GPUS") else "/dev/nvidia*"
        found = len(glob.glob("/dev/nvidia[0-9]*"))
        given = {GPU_VARIABLES[0]: environ.get("SLURM_JOB_GPUS") or ",".join(map(str, range(found)))}
    gpus = {name: [gpu for gpu in text.split(",") if gpu.strip() not in ("", "-1", "NoDevFiles")]
            for name, text in given.items()}
    count = min(map(len, gpus.values()))
    if count < jobs * gpus_per_task:
        raise Refusal("-j %d with --gpus-per-task %d needs %s, and there %s %d (%s): %s" % (
            jobs, gpus_per_task, count_text(jobs * gpus_per_task, "GPU"), "is" if count == 1 else "are", count, source,
            "use -j %d" % (count // gpus_per_task) if count >= gpus_per_task else
            "use --gpus-per-task %d" % count if count else "ask the batch system for some, as with --gres=gpu:4"))
    slots = [{name: ",".join(ids[slot * gpus_per_task:][:gpus_per_task]) for name, ids in gpus.items()}
             for slot in range(jobs)]
    if "ROCR_VISIBLE_DEVICES" in gpus and len(gpus) > 1:
        # HIP numbers anew what ROCR leaves, and obeys CUDA's variable where it has none of its own.
        for slot_variables in slots:
            slot_variables["HIP_VISIBLE_DEVICES"] = ",".join(map(str, range(gpus_per_task)))
    return slots


def file_mentions(path: str, text: bytes) -> bool:
    """Whether a file, or the program of that name, has the text in its first megabyte."""
    path = shutil.which(path) or path
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            return text in file.read(2 ** 20)
    except (OSError, ValueError):
        return False


def unquoted(words: Sequence[str]) -> str:
    """What to type for a command whose program and arguments were quoted into one word."""
    others = "".join(" " + shlex.quote(word) for word in words[1:])
    if re.search(r"[$`\\\"'|&;<>()*?\[\n]|^\s*\w+=", words[0]):
        return "sh -c %s" % shlex.quote(words[0] + others)
    return " ".join(words[0].split()) + others


def is_script_without_interpreter(program: str) -> bool:
    """Whether a program that the system cannot run is a script without a first line that begins with #!.

    Shells use the same test. It keeps sh from reading the bytes of another machine's program as commands.
    """
    with open(program, "rb") as file:
        first_line = file.read(256).partition(b"\n")[0]
    return b"\0" not in first_line and not first_line.startswith(b"#!")


def write_all(descriptor: int, text: bytes, in_hurry: Callable[[], bool] = lambda: False) -> int:
    """Write the text, in whole lines where they are short; 0, or the errno why not all of it was written.

    A reader that takes nothing (a terminal after Ctrl-S) is waited for until *in_hurry* says yes: EAGAIN.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    done = 0
    try:
        while done < len(text):
            while not poll.poll(0 if in_hurry() else 200):
                if in_hurry():
                    return errno.EAGAIN
            end = done + select.PIPE_BUF        # so much fits, does not block, and is not mixed with others' output
            done += os.write(descriptor, text[done:text.rfind(b"\n", done, end) + 1 or end])
    except OSError as error:
        return error.errno or errno.EIO
    return 0


@functools.lru_cache(maxsize=None)
def memory_events(groups: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> int:
    """The descriptor of the file in which the kernel counts what it did for want of memory; -1 where there is none.

    It is that of our control group, which has the limit of a batch job (or lies in one that has it): cgroups(7).
    """
    with contextlib.suppress(OSError):
        with open(groups) as file:
            for _, kinds, path in (line.rstrip("\n").split(":", 2) for line in file):
                name = "%s/memory.events" if not kinds else "/memory%s/memory.oom_control"
                if kinds in ("", "memory"):
                    with contextlib.suppress(OSError):
                        return os.open(root + name % path, os.O_RDONLY)
    return -1


def count_memory_kills() -> int:
    """How many processes of our control group the kernel has killed for want of memory; 0 where it does not say."""
    with contextlib.suppress(OSError):
        found = re.search(rb"^oom_kill (\d+)", os.pread(memory_events(), 4096, 0), re.MULTILINE)
        return int(found.group(1)) if found else 0
    return 0


def last_line(text: bytes) -> str:
    """The last line that is not empty, without control characters; "" when there is none."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text.decode("utf-8", "replace"))]
    last = next((line for line in reversed(lines) if line), "")
    return "".join(letter if letter.isprintable() else " " for letter in last)


def tail_of(path: str) -> bytes:
    """The last bytes of a file; b"" when it cannot be read, or is no file."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)     # a pipe without a writer would be waited for
        try:
            return os.pread(descriptor, TAIL_LIMIT, max(0, os.fstat(descriptor).st_size - TAIL_LIMIT))
        finally:
            os.close(descriptor)
    return b""


class Command:
    """The command of a task, from its start until its end is reported."""
    def __init__(self, task: int, attempt: int, slot: Optional[int], started: float) -> None:
        self.task, self.attempt = task, attempt
        self.slot = slot            # None once another command may have it
        self.pid = 0                # also the id of its session and of its process group
        self.started = started      # tick
        self.elapsed_s = 0.0        # once it has ended
        self.usage: Optional[resource.struct_rusage] = None     # likewise; None when it could not be started
        self.kills_before = count_memory_kills()
        self.reported = False       # as computing
        self.percent: Optional[float] = None    # of its last progress
        self.pipes: Dict[int, int] = {}         # our ends of its output, each with 1 or 2
        self.watched = False        # whether the selector knows the pipes
        self.tail = b""             # the last bytes of its error output, where that comes through a pipe
        self.log_path = ""          # of the file that has all its output; "" for none
        self.status: Optional[int] = None       # from waitpid, once it has ended
        self.end_reason = ""        # why its status does not count: "timeout", "stopping" or "lost"
        self.kill_at = math.inf     # tick at which SIGKILL ends what is left of its session; inf: nothing is ended

    @property
    def signal_number(self) -> int:
        """The signal that killed the process; 0 when it exited by itself."""
        assert self.status is not None
        return os.WTERMSIG(self.status) if os.WIFSIGNALED(self.status) else 0

    @property
    def exit_code(self) -> int:
        """The exit status, or 128 and the signal that killed it, as a shell has it."""
        assert self.status is not None
        return 128 + self.signal_number if self.signal_number else os.WEXITSTATUS(self.status)

    @property
    def reported_code(self) -> int:
        """The exit code for the report."""
        return TIMEOUT_CODE if self.end_reason == "timeout" else self.exit_code

    @property
    def killed_by_stop_signal(self) -> bool:
        """Whether a signal that ends jobs killed the command, or the child of a shell that is the command."""
        return self.exit_code - 128 in STOP_SIGNALS

    @property
    def memory(self) -> int:
        """Bytes at the peak of its largest process. Of a small one those of the worker, which the kernel counts too."""
        assert self.usage is not None
        return self.usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)     # see getrusage(2)

    @property
    def ran_out_of_memory(self) -> bool:
        """Whether SIGKILL ended it, or the child of a shell, and the kernel says that it kills for want of memory."""
        return self.exit_code - 128 == signal.SIGKILL and count_memory_kills() > self.kills_before

    def figures(self) -> Dict[str, Any]:
        """What a report of its end says beside how it ended; of a failure also where the log is."""
        found: Dict[str, Any] = {"elapsed": round(self.elapsed_s, 3)}
        if self.usage is not None:
            found.update(memory=self.memory, cpu=round(self.usage.ru_utime + self.usage.ru_stime, 3))
        path = os.path.abspath(self.log_path) if self.log_path and self.reported_code else ""
        return dict(found, log=path) if 0 < len(path) <= LOG_LIMIT else found

    def error_line(self) -> str:
        """The last line of its error output, or of its log."""
        return last_line(self.tail or (tail_of(self.log_path) if self.log_path else b""))[:MESSAGE_LIMIT]


def signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; whether the group exists."""
    try:
        os.killpg(group, number)
        return True
    except ProcessLookupError:
        return False
    except PermissionError:     # some of its processes have become another user's
        return True


def signal_commands(pids: Collection[int], number: int) -> Set[int]:
    """Send a signal to all processes of commands, and give those commands that had any; 0 sends none.

    A command is all of its session: timeout(1), mpirun and some shells put their children into process groups of
    their own. One look at all processes of the machine takes 3 ms for each 1000, so it serves all commands.
    """
    if not pids:
        return set()
    groups: Dict[int, int] = {}         # process group: command
    in_proc = os.path.isdir("/proc/self")
    if not in_proc:         # as on macOS: other groups of its session are not found
        groups = {pid: pid for pid in pids if signal_group(pid, 0)}
    for name in os.listdir("/proc") if in_proc else ():
        with contextlib.suppress(ValueError, OSError):      # it is no process, or has ended meanwhile
            pid = int(name)
            session, group = os.getsid(pid), os.getpgid(pid)
            command = session if session in pids else group
            if command in pids and not has_ended(pid):
                groups[group] = command
    for group in groups:
        signal_group(group, number)
        if number == signal.SIGTERM:
            signal_group(group, signal.SIGCONT)     # a stopped process would not get the other
    return set(groups.values())


def has_ended(pid: int) -> bool:
    """Whether a process waits for its parent alone, which in some containers never comes."""
    with contextlib.suppress(FileNotFoundError), open("/proc/%d/stat" % pid, "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] in b"ZX"
    return os.path.isdir("/proc/self")


class Watchdog:
    """A small process that ends the commands when the worker is killed and cannot do so itself.

    It sleeps on a pipe that closes when the worker ends, for whatever reason. It then reads from shared memory which
    commands run, so nothing is sent to it while tasks come and go, and ends them. Then it calls *afterwards*.

    A worker that is killed in the midst of a start leaves that command running: its process id is not noted yet. That
    is half a millisecond of each start, less than the time for which it could be missed. (A search for an environment
    variable would find it, but neither what runs in a container nor what `env -i` has begun. PR_SET_PDEATHSIG needs
    code between fork and exec, which doubles the cost of each start.)
    """
    def __init__(self, jobs: int, grace_s: float, afterwards: Callable[[], None]) -> None:
        self.jobs, self.grace_s, self.afterwards = jobs, grace_s, afterwards
        self.commands = mmap.mmap(-1, 4 * jobs)     # an int for each slot, see `note_group`
        self.start()

    def start(self) -> None:
        """Start the process, or another when it was killed. Raises OSError."""
        self.writer = -1        # that of the one before is closed
        reader, writer = os.pipe()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)     # a later one is forked beside the reporter
                self.pid = os.fork()
        except OSError:
            os.close(reader)
            os.close(writer)
            raise
        self.writer = writer
        if self.pid == 0:
            try:
                self._watch(reader)
            finally:
                os._exit(0)
        os.close(reader)

    def _watch(self, reader: int) -> None:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._name_process("taskfarm-watchdog of %d" % os.getppid())
        null = os.open(os.devnull, os.O_RDWR)       # a reader of the worker's output must see its end
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.dup2(reader, 3)          # all others were the worker's
        os.closerange(4, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 2 ** 20))
        if os.read(3, 1):
            return
        left = set(struct.unpack("%di" % self.jobs, self.commands)) - {0}
        end = time.monotonic() + self.grace_s
        left = signal_commands(left, signal.SIGTERM)
        while left and time.monotonic() < end + WATCHDOG_PATIENCE_S:
            time.sleep(0.05)
            left = signal_commands(left, signal.SIGKILL if time.monotonic() > end else 0)
        signal.alarm(WATCHDOG_PATIENCE_S)
        if not left:
            self.afterwards()

    def _name_process(self, name: str) -> None:
        """Show the name in ps, in place of the worker's: who kills all processes of that name means the worker."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open("/proc/self/comm", "w") as file:
                file.write("taskfarm-watch")
            with open("/proc/self/stat") as file:
                begin, end = (int(field) for field in file.read().rpartition(")")[2].split()[45:47])    # proc(5)
            with open("/proc/self/mem", "r+b", 0) as memory:
                memory.seek(begin)
                memory.write(name.encode()[:end - begin - 1].ljust(end - begin, b"\0"))

    def note_group(self, slot: int, group: int) -> None:
        """A command, whose process id is that of its group and session, runs in the slot; 0: none does."""
        struct.pack_into("i", self.commands, 4 * slot, group)

    def close(self) -> None:
        """End the process. It ends no commands then."""
        with contextlib.suppress(OSError):      # it was killed, or could not be started again
            os.write(self.writer, b"\0")
            os.waitpid(self.pid, 0)


def command_environment(access: Access, run: str, worker: str) -> Dict[bytes, bytes]:
    """The environment that all commands of a worker share. `Template.variables` has the others."""
    environ = dict(os.environ, TASKFARM_RUN=run, TASKFARM_WORKER=worker)
    for name in ("TASKFARM_USER", "TASKFARM_PASSWORD", "TASKFARM_TOKEN"):       # a command may show its environment
        environ.pop(name, None)
    environ["TASKFARM_FARM"] = access.farm      # no address: the server may move while a command runs
    return {os.fsencode(name): os.fsencode(value) for name, value in environ.items()}


def take_log_folder(folder: str, run: str) -> str:
    """Make the folder for the logs of a run, and mark it with the run; its absolute path.

    Raises Refusal when it has logs of another run, since tasks of both have the same numbers.
    """
    mark = os.path.join(folder, ".taskfarm-run")
    try:
        os.makedirs(folder, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.symlink(run, mark)       # in one step: no other worker finds half a mark
        other = os.readlink(mark)
    except OSError as error:
        raise Refusal("the folder %s cannot be made: %s" % (folder, error.strerror))
    if other != run:
        raise Refusal("%s has the logs of run %s: name another folder (or remove %s)" % (folder, other, mark))
    return os.path.abspath(folder)


class Launcher:
    """Starts commands, each in a session of its own: none can stop to ask something at the worker's terminal.

    And batch systems that signal the processes of a session one by one, as PBS does, signal the worker alone.
    """
    def __init__(self, template: Template, environ: Dict[bytes, bytes], watchdog: Watchdog, log_dir: str,
                 progress_folder: str) -> None:
        self.template, self.environ, self.watchdog, self.log_dir = template, environ, watchdog, log_dir
        self.progress_folder = progress_folder      # "" for none
        self.piped = () if log_dir else (1, 2)      # Display passes it on in whole lines
        self.by_shell = False       # every task runs a script without #!
        self.spawn_options: Dict[str, Any] = {"setsigdef": (signal.SIGPIPE, signal.SIGXFSZ)}    # Python ignores them
        try:
            os.posix_spawn("/", ["/"], {}, setsid=True)
        except NotImplementedError:         # a Python that was built for a libc before 2.26, as some of conda's
            self.spawn_options["setpgroup"] = 0
            leave_terminal()
        except OSError:
            self.spawn_options["setsid"] = True

    def start(self, task: int, attempt: int, slot: int) -> Command:
        """Start the command of a task.

        Raises OSError or ValueError when it cannot be started, Refusal when no command of this worker can be.
        """
        command = Command(task, attempt, slot, time.monotonic())
        actions: List[Tuple[Any, ...]] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        write_ends: List[int] = []
        try:
            words = self.template.arguments(task, attempt, slot)
            for name, value in self.template.variables(task, attempt, slot).items():
                self.environ[os.fsencode(name)] = os.fsencode(value)
            self.environ[b"TASKFARM_PROGRESS"] = os.fsencode(self.progress_path(command) or os.devnull)
            if self.log_dir:
                # Both streams go straight into it, in their order. What a command leaves running can still write.
                command.log_path = os.path.join(self.log_dir, "%d%s.log" % (task, ".%d" % attempt * (attempt > 1)))
                write_ends.append(self._open_log(command.log_path))
                actions += [(os.POSIX_SPAWN_DUP2, write_ends[0], target) for target in (1, 2)]
            for target in self.piped:
                read_end, write_end = os.pipe()
                command.pipes[read_end] = target
                write_ends.append(write_end)
                os.set_blocking(read_end, False)
                actions.append((os.POSIX_SPAWN_DUP2, write_end, target))
            command.pid = self._spawn(words, actions)
            self.watchdog.note_group(slot, command.pid)
        except BaseException:
            for read_end in command.pipes:
                os.close(read_end)
            raise
        finally:
            for write_end in write_ends:
                os.close(write_end)
        return command

    def progress_path(self, command: Command) -> str:
        """The file into which the command may write how far it is, in percent; "" for none."""
        return self.progress_folder and "%s/%d.%d" % (self.progress_folder, command.task, command.attempt)

    def _open_log(self, path: str) -> int:
        """Open an empty log. Another user who may write into the folder could have laid a link or a pipe there."""
        try:
            log_file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            there = os.fstat(log_file)
            if stat.S_ISREG(there.st_mode) and there.st_uid == os.geteuid():
                os.ftruncate(log_file, 0)
                os.set_blocking(log_file, True)
                return log_file
            os.close(log_file)
        except OSError as error:
            if error.errno in TEMPORARY_ERRORS:
                raise
            raise Refusal("the log %s cannot be written: %s" % (path, error.strerror))      # no fault of the task
        raise Refusal("the log %s is there already, and is another user's or no plain file: choose another folder"
                      % path)

    def _spawn(self, words: List[bytes], actions: List[Tuple[Any, ...]]) -> int:
        try:
            if not self.by_shell:
                return os.posix_spawnp(words[0], words, self.environ, file_actions=actions, **self.spawn_options)
        except OSError as error:
            if error.errno != errno.ENOEXEC:
                raise
            program = os.fsdecode(words[0])
            if not is_script_without_interpreter(shutil.which(program) or program):
                if self.template.same_program:
                    raise Refusal("%s is no program for this machine (%s, %s): use one that was built for it" % (
                        self.template.program, os.uname().nodename, os.uname().machine))
                raise
            self.by_shell = self.template.same_program
        # Every shell runs a script without #! with sh, and so do we.
        return os.posix_spawnp(b"/bin/sh", [b"/bin/sh"] + words, self.environ, file_actions=actions,
                               **self.spawn_options)


def leave_terminal() -> None:
    """Give up the terminal, for commands as well. It still shows what is written, and Ctrl-C comes through."""
    if os.getsid(0) == os.getpid():
        return              # the whole session would lose it, and be told with SIGHUP
    with contextlib.suppress(OSError):
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
        try:
            fcntl.ioctl(terminal, termios.TIOCNOTTY)
        finally:
            os.close(terminal)


# ---------------------------------------------------------------- REPORTER
# The thread of a worker that claims tasks and sends reports. Reports that it cannot send are saved for a later worker.
# Knows no command. For another field of a report: Reporter.report sends all fields that TaskRunner gives it. For
# something new that the runner must learn: an event here, and its handler in TaskRunner.handlers.

SEND_S = 0.1                        # reports are sent together so often, at most
RUN_FIGURES_S = 2.0                 # between two requests for the figures of the run, for the bar on a terminal
UNSENT_S = 1.0, 10.0                # after an outage, until what others have saved is sent: not by all workers at once
REPORT_BYTES = 500000               # of reports in one request ...
REPORTS_AT_ONCE = 1000              # ... and their number, at most
ALL_CLAIMED = 16                    # a larger claim first asks how many tasks wait

# What the runner is told
TasksClaimed = NamedTuple("TasksClaimed", [("tasks", List[Tuple[int, int]])])       # (task, attempt) of each
# retry_s: until there may be one; None where none comes by itself. computing: tasks of others, when we have none.
# held_up: by what, where tasks wait and none is handed out; it may last, so then computing is infinite.
NoTaskClaimed = NamedTuple("NoTaskClaimed", [("retry_s", Optional[float]), ("computing", float),
                                             ("held_up", Optional[HoldUp])])
TasksHeld = NamedTuple("TasksHeld", [("tasks", Set[Tuple[int, int]])])      # when some may have been taken from us
ReportRefused = NamedTuple("ReportRefused", [("report", Dict[str, Any]), ("why", str)])
RunFigures = NamedTuple("RunFigures", [("run", Dict[str, Any])])        # as the API shows them
Notice = NamedTuple("Notice", [("sentence", str)])                      # for the user
ReporterEnded = NamedTuple("ReporterEnded", [("error", Exception)])     # because of it
ReporterEvent = Union[TasksClaimed, NoTaskClaimed, TasksHeld, ReportRefused, RunFigures, Notice, ReporterEnded]


class Reporter:
    """The thread that talks to the farm: it registers, keeps the lease, sends reports and claims tasks.

    It keeps each report until the farm has judged it. It adds what it learns to `events`, and calls *wake*.
    """
    def __init__(self, client: Client, run: str, worker: str, wake: Callable[[], None], wants_figures: bool,
                 only_task: Optional[int] = None, job: str = "") -> None:
        """*job*: the batch job of this process, for people."""
        self.client, self.run, self.worker, self.wake, self.job = client, run, worker, wake, job
        self.events: "deque[ReporterEvent]" = deque()
        self.changed = threading.Condition()
        self.reports: Dict[int, Dict[str, Any]] = {}        # the latest unsent report of each task
        self.claim_count = 0                # tasks to claim
        self.open_claim: Optional[Tuple[int, str]] = None   # count and key of a claim without an answer
        self.only_task = only_task          # the one to claim, and no other: -1 when it was
        self.closing = False
        self.idle = True                    # no command runs: nothing is lost by giving up
        self.revision: Optional[int] = None         # of the worker's holds; None: not registered
        self.registered_again = False       # the farm did not know the worker, and nothing went well since
        self.sent_at = 0.0                  # ticks
        self.heartbeat_at = 0.0
        self.unsent_at = math.inf           # when to send what other workers have saved
        self.figures_every_s = RUN_FIGURES_S if wants_figures else math.inf
        self.figures_at = 0.0 if wants_figures else math.inf
        self.thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    # For the thread that runs the commands

    def report(self, task: int, attempt: int, **fields: Any) -> None:
        """Send a report of the task soon. It replaces an unsent one."""
        with self.changed:
            if not self.reports:
                self.changed.notify()
            self.reports[task] = dict(fields, task=task, attempt=attempt)

    def claim(self, count: int) -> None:
        """Claim so many tasks, after the reports are sent."""
        with self.changed:
            self.claim_count = count
            self.changed.notify()

    def ask_figures(self) -> None:
        """Ask for the figures of the run now."""
        with self.changed:
            self.figures_at = 0.0
            self.changed.notify()

    def close(self) -> List[Dict[str, Any]]:
        """Stop within half a second; the unsent reports."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.client.give_up.set()
        self.thread.join(0.5)
        with self.changed:
            return list(self.reports.values())

    # The thread itself

    def post(self, event: ReporterEvent) -> None:
        """Tell the runner."""
        self.events.append(event)
        self.wake()

    def _run(self) -> None:
        while not self.closing:
            try:
                if self.revision is None:
                    register(self.client, self.worker, LEASE_S, job=self.job)
                    self._heartbeat()
                self._do_next()
                self.registered_again = False
                if self.client.was_away:        # others may have ended meanwhile, and saved what they could not send
                    self.client.was_away = False
                    self.unsent_at = time.monotonic() + random.uniform(*UNSENT_S)
            except NotFound as error:
                if self.registered_again or not self._run_exists():
                    self.post(ReporterEnded(error))
                    return
                self.registered_again = True    # the server went back to an older file
                self.revision = None
            except Exception as error:
                if not may_succeed_later(error) or self.idle and not self.reports:
                    self.post(ReporterEnded(error))
                    return

    def _run_exists(self) -> bool:
        try:
            self.client.ask("GET", "/api/runs/" + self.run)
        except (FarmError, Unreachable, Refusal) as error:
            return not isinstance(error, NotFound)      # after another error the next request will show
        return True

    def _heartbeat(self) -> None:
        """Renew the lease. A changed revision says that a task may have been taken from us."""
        revision, pause_s = renew(self.client, self.worker)
        self.heartbeat_at = time.monotonic() + pause_s
        if self.revision not in (None, revision):
            self.post(TasksHeld(self._tasks_held()))
        self.revision = revision

    def _tasks_held(self) -> Set[Tuple[int, int]]:
        """The tasks of our run that we still hold, each with its attempt."""
        held: Set[Tuple[int, int]] = set()
        after = ""
        while True:
            page = self.client.ask("GET", "/api/worker/%s?limit=1000%s" % (self.worker, after))
            held.update((entry["task"], entry["attempt"]) for entry in page["data"] if entry["run"] == self.run)
            if not page["next"]:
                return held
            after = "&after=" + urllib.parse.quote(str(page["next"]), safe="")

    def _do_next(self) -> None:
        """Wait until there is something to send, and send it."""
        with self.changed:
            while not self.closing:
                now = time.monotonic()
                next_at = min(self.heartbeat_at, self.figures_at, self.unsent_at, now if self.claim_count else math.inf,
                              self.sent_at + SEND_S if self.reports else math.inf)
                if next_at <= now:
                    break
                self.changed.wait(next_at - now)
            claim_count = self.claim_count
        if self.closing:
            return
        if self.reports:
            self._send()
        if now >= self.heartbeat_at:
            self._heartbeat()
        if claim_count:
            self._claim(claim_count)
        if now >= self.unsent_at:
            self.unsent_at = math.inf
            for sentence in send_all_unsent(self.client):
                self.post(Notice(sentence))
        if now >= self.figures_at:
            figures = self.client.ask("GET", "/api/runs/" + self.run)
            self.figures_at = now + self.figures_every_s        # not before: a request that failed is repeated
            self.post(RunFigures(figures))

    def _claim(self, count: int) -> None:
        """Claim up to *count* tasks. Near the end of a run it is a quarter of those that wait: others get some too.

        A claim whose answer was lost is repeated with its key, however late: the tasks that it was given are ours.
        """
        if self.open_claim is None:
            if count > ALL_CLAIMED:
                count = min(count, max(ALL_CLAIMED, self._figure("numWaiting") // 4))
            self.open_claim = count, secrets.token_hex(16)
        count, key = self.open_claim
        if self.only_task is None:
            answer = self.client.ask("POST", "/api/runs/%s/tasks" % self.run,
                                     {"worker_uuid": self.worker, "count": count}, key)
        elif self.only_task >= 0:
            task = self.client.ask("POST", "/api/runs/%s/task" % self.run,
                                   {"worker_uuid": self.worker, "task": self.only_task}, key)
            answer, self.only_task = task and {"data": [task]}, -1 if task else self.only_task
        else:
            answer = None
        event: Any = None
        if answer is not None:
            event = TasksClaimed([(entry["task"], entry["attempt"]) for entry in answer["data"]])
        else:
            retry_s, computing, held_up = self.client.retry_after, 0.0, None
            if self.idle and retry_s is not None:
                run = self.client.ask("GET", "/api/runs/" + self.run)
                held_up = ask_hold_up(self.client, run) if run["numWaiting"] else None
                computing = math.inf if held_up else run["numComputing"]
            event = NoTaskClaimed(retry_s, computing, held_up)
        with self.changed:      # not before: a claim that ends by an error is repeated
            self.claim_count, self.open_claim = 0, None
        self.post(event)

    def _figure(self, name: str) -> int:
        return int(self.client.ask("GET", "/api/runs/%s?info=%s" % (self.run, name))[name])

    def _send(self) -> None:
        """Send the reports. Each is forgotten when the farm has judged it."""
        with self.changed:
            reports = list(self.reports.values())
        for part, refused in send_reports(self.client, self.run, self.worker, reports):
            for event in refused:
                self.post(event)
            with self.changed:
                for report in part:
                    if self.reports.get(report["task"]) is report:      # not one that replaced it meanwhile
                        del self.reports[report["task"]]
        self.sent_at = time.monotonic()


def in_parts(reports: List[Dict[str, Any]]) -> Iterator[List[Dict[str, Any]]]:
    """Reports in parts that fit a request."""
    part: List[Dict[str, Any]] = []
    size = 0
    for report in reports:
        length = len(json.dumps(report)) + 2
        if part and (size + length > REPORT_BYTES or len(part) >= REPORTS_AT_ONCE):
            yield part
            part, size = [], 0
        part.append(report)
        size += length
    if part:
        yield part


def send_reports(client: Client, run: str, worker: str,
                 reports: List[Dict[str, Any]]) -> Iterator[Tuple[List[Dict[str, Any]], List[ReportRefused]]]:
    """Send reports of a worker in as many requests as they need; the reports of each request, and those refused."""
    for part in in_parts(reports):
        answer = client.ask("PUT", "/api/runs/%s/tasks" % run, {"worker_uuid": worker, "data": part})
        by_task = {report["task"]: report for report in part}
        yield part, [ReportRefused(by_task[entry["task"]], entry["detail"]) for entry in answer["refused"]]


def state_folder(environ: Mapping[str, str]) -> str:
    """The folder of unsent reports: in $XDG_STATE_HOME, else in ~/.local/state."""
    base = environ.get("XDG_STATE_HOME") or os.path.join(home_folder(), ".local", "state")
    return os.path.join(base, "taskfarm")


def save_unsent(access: Access, run: str, worker: str, reports: List[Dict[str, Any]]) -> str:
    """Save reports that could not be sent, for the next worker or verb; the path. Raises OSError."""
    path = os.path.join(state_folder(os.environ), "unsent-%s.json" % worker)
    write_access(path, {"farm": access.farm, "url": access.url, "run": run, "worker": worker, "reports": reports})
    return path


def send_all_unsent(client: Client) -> List[str]:
    """Send what workers have saved for this farm; a sentence for each file.

    Two processes may send the same file: a report that comes again changes nothing. A file that cannot
    be sent stays. When nothing answers, the other files are not tried: each would wait as long.
    """
    sentences = []
    for path in sorted(glob.glob(os.path.join(glob.escape(state_folder(os.environ)), "unsent-*.json"))):
        try:
            saved = read_access(path)
            access = client.connect()
            same_farm = saved["farm"] == access.farm if saved["farm"] and access.farm else saved["url"] == access.url
            if not same_farm:
                continue
            sentences.append(send_unsent(client, saved["run"], saved["worker"], saved["reports"]))
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
        except (KeyError, TypeError):
            sentences.append("%s is not a file of unsent reports: look at it, and remove it" % path)
        except (FarmError, OSError, Refusal) as error:
            sentences.append("the reports in %s could not be sent: %s" % (path, error))
            if isinstance(error, Unreachable):
                break
    return sentences


def send_unsent(client: Client, run: str, worker: str, reports: List[Dict[str, Any]]) -> str:
    """Send what one worker has saved, and sign it off; a sentence for the user."""
    try:
        refused = [event for _, part in send_reports(client, run, worker, reports) for event in part]
        with contextlib.suppress(NotFound):
            client.ask("DELETE", "/api/worker/" + worker)
    except NotFound as error:
        return "%s of worker %s dropped: %s" % (count_text(len(reports), "report"), worker[:8], error)
    sentence = "%s that worker %s had saved: sent" % (count_text(len(reports), "report"), worker[:8])
    return sentence + ("; %d were refused, as of task %d: %s" % (
        len(refused), refused[0].report["task"], refused[0].why) if refused else "")


# ---------------------------------------------------------------- WORKER
# Runs a command for each task that is claimed. One thread starts and ends commands and never waits for the network;
# the reporter claims and reports and never waits for a command. Knows the contract through the client alone.
# For another option of `work`: a field of WorkOptions, its use in TaskRunner, and the option in COMMAND LINE.

CLAIM_AHEAD_S = 0.15, 0.5           # what will be started within so many seconds is claimed ahead: at least, at most,
LATENCIES_AHEAD = 10                # and between them so many times what a claim takes
CLAIM_AHEAD_LIMIT = 4000            # tasks claimed ahead, at most: a worker may hold 10 000
PROGRESS_S = 1.0                    # between two looks at the progress of commands, and at the clock while some run
TIMES_KEPT = 100                    # of the latest tasks, to judge what one takes
FIRST_LOOK_S = 0.25                 # before the second of the claims that a worker makes while no task waits
IDLE_S = 120                        # a worker with nothing to do stays for so long, at most,
IDLE_LEAST_S = 10.0                 # and at least so long where tasks may come back
COMPUTING_S = 1.0                   # a command that runs longer is reported as computing
PIPES_S = 0.05                      # the pipes of a command that runs longer are watched
GRACE_S = 5.0                       # between SIGTERM and SIGKILL to a command: Slurm gives us 10 to 30 s for all
LOOK_S = 2.0                        # between two looks at when the job ends: that may have become known, or another
STOP_EARLY_S = 5.0                  # before the end of the job, beside the grace: to report and sign off
LAST_REPORTS_S = 2.0                # the last reports are tried for so long: PBS may kill after 10 s in all
CONFIRM_S = 0.3                     # an end is reported when it is so old: it may be the first sign that a job ends
CONFIRM_KILLED_S = 1.5              # the same for a command that was killed by a signal that ends jobs
SAME_SIGNAL_S = 1.0                 # a second signal within this time is the first one again: srun sends two at once
FIRST_ENDS = 5                      # so many quick failures before any other end are not the fault of the tasks
QUICK_JOB_S = 60.0                  # a worker that ends within this time and has done no task has failed at once
QUICK_S = 10.0                      # a failure within this time is a quick one
PAUSE_S = 10.0                      # others compute and none is done: for so long, or twice, we wait for one to be
LINE_MEMORY = 2 ** 20               # bytes of a line of output; a longer one is cut

EXIT_DONE, EXIT_TASKS_FAILED, EXIT_RUN_DELETED, EXIT_NO_SERVER = 0, 3, 4, 5
EXIT_NO_LOGIN, EXIT_STOPPED, EXIT_BAD_NODE, EXIT_TOO_MANY_FAILED, EXIT_TOO_SHORT = 6, 7, 8, 9, 10


class WorkOptions(NamedTuple):
    """The options of `work`."""
    jobs: int                       # commands that run at the same time
    timeout_s: float                # of a command; inf for none
    grace_s: float
    drain: bool                     # on a signal, let commands finish
    idle_s: float                   # for so long at most it waits for tasks that may come back
    task_time_s: Optional[float]    # what a task takes, when that is known
    job_end: Callable[[], float]    # UTC seconds since 1970; inf while it is not known
    log_dir: str                    # "" for none
    log_failed: bool                # keep the logs of failed tasks alone
    max_fails: Optional[int] = None     # stop after so many; 0: never. None: the first ends alone are judged
    leave_ok: bool = False          # to leave before the job ends is no failure
    only_task: Optional[int] = None     # run that one, and no other
    job: str = ""                   # the batch job, as "slurm:1234_7"


def times_of_ended(client: Client, run: Mapping[str, Any]) -> List[float]:
    """The seconds that the latest tasks of a run took. Raises FarmError and Unreachable."""
    if not run["numDone"]:
        return []
    tasks = client.ask("GET", "/api/runs/%s/tasks?status=done&order=finished&limit=%d" % (run["uuid"], TIMES_KEPT))
    times = [(parse_time(task["started"]), parse_time(task["finished"])) for task in reversed(tasks["data"])]
    return [finished - started for started, finished in times if started is not None and finished is not None]


def exit_status_of(error: Exception) -> int:
    """The exit status of a worker that the error ends."""
    if may_succeed_later(error):
        return EXIT_NO_SERVER
    return EXIT_RUN_DELETED if isinstance(error, NotFound) else EXIT_NO_LOGIN if isinstance(error, Unauthorized) else 1


class Display:
    """What a user sees of a worker: on the standard output what commands print there, and nothing else.

    On the error output: the commands' own, a line for each task, and on a terminal a bar below them. All comes in
    whole lines, those of each 0.1 s together.
    """
    def __init__(self, quiet: bool, environ: Mapping[str, str], tag: bool = False) -> None:
        self.quiet, self.tag = quiet, tag
        self.screen = Screen(sys.stderr, environ)
        self.screen.write = lambda text: write_all(
            2, text.encode(sys.stderr.encoding or "utf-8", "replace"), self.in_hurry)
        self.terminals = {1: sys.stdout.isatty(), 2: self.screen.terminal}
        self.in_hurry: Callable[[], bool] = lambda: False       # whether there is no time to wait for a reader
        self.pending: List[Tuple[int, bytes]] = []      # whole lines that are not written yet, each with 1 or 2
        self.write_at = math.inf                # tick at which they are to be written
        self.partial: Dict[Tuple[int, int], bytearray] = {}     # lines without their end, by process and 1 or 2
        self.shown_once: Set[str] = set()
        self.output_error = 0                   # errno: the standard output took no more
        self.run: Dict[str, Any] = {}           # its latest figures
        self.ended_since = 0                    # tasks that ended here since then
        self.readings = Readings()
        self.took_s: "deque[float]" = deque(maxlen=TIMES_KEPT)      # seconds that the latest tasks took

    def task_ended(self, task: int, elapsed_s: float, failure: str = "", log_path: str = "") -> None:
        """A task has ended; *failure* says how it failed, *log_path* where its output is."""
        self.ended_since += 1
        self.took_s.append(elapsed_s)
        if failure:
            where = "  (%s)" % printable(os.path.relpath(log_path)) if log_path else ""
            self._add(self.screen.paint("task %d failed: %s%s" % (task, failure, where), "red"))
        elif not self.quiet:
            self._add("task %d done in %s" % (task, duration_text(elapsed_s)))

    def say(self, sentence: str) -> None:
        """Show a line about the work as a whole."""
        self._add(printable(pasteable(sentence)))
        self._write()

    def say_once(self, sentence: str) -> None:
        """The same, the first time only."""
        if sentence not in self.shown_once:
            self.shown_once.add(sentence)
            self.say(sentence)

    def pass_on(self, command: Command, target: int, text: bytes) -> None:
        """Write output of a command in whole lines. *target*: 1 or 2. b"" is its end, and ends its last line."""
        source = command.pid, target
        partial = self.partial.setdefault(source, bytearray())
        partial += text
        end = partial.rfind(b"\n", len(partial) - len(text)) + 1
        if not end and (not text or len(partial) > LINE_MEMORY):
            partial += b"\n" * bool(partial)
            end = len(partial)
        lines = bytes(partial[:end])
        del partial[:end]
        if not text:
            del self.partial[source]
        if self.tag or self.terminals[target]:      # of a line that overwrites itself, what is left in the end
            lines = re.sub(rb"(?m)^.*\r(?=[^\r\n])", b"", lines)
        if self.tag:
            lines = re.sub(rb"[^\n]*\n", rb"%d\t\g<0>" % command.task, lines)
        if lines:
            self._queue(target, lines)

    def show_run(self, run: Dict[str, Any]) -> None:
        """Show new figures of the run."""
        self.run, self.ended_since = run, 0
        self.readings.add(time.monotonic(), run, rate_window_s(sorted(self.took_s)))
        self.write_at = 0.0

    def refresh(self, now: float, running: int) -> float:
        """Write the lines and draw the bar; the tick of the next call where no line comes before."""
        draws = self.screen.can_redraw and bool(self.run)
        if now >= self.write_at or draws:
            self._write()
            self.write_at = math.inf
            if draws:
                self.screen.redraw([self._bar(running)])
        return now + 0.5 if draws and running else math.inf

    def _add(self, line: str) -> None:
        self._queue(2, (line + "\n").encode(sys.stderr.encoding or "utf-8", "replace"))

    def _queue(self, target: int, text: bytes) -> None:
        self.pending.append((target, text))
        self.write_at = min(self.write_at, time.monotonic() + 0.1)
        if len(text) > 65536 or len(self.pending) > 4096:
            self._write()

    def _write(self) -> None:
        """Write the lines that are pending, where the bar was."""
        pending, self.pending = self.pending, []
        if any(self.terminals[target] for target, _ in pending):
            self.screen.redraw([])
        for target, group in itertools.groupby(pending, operator.itemgetter(0)):
            number = write_all(target, b"".join(text for _, text in group), self.in_hurry)
            if number and target == 1 and number != errno.EAGAIN:
                self.output_error = number

    def _bar(self, running: int) -> str:
        run = self._current_run()
        total, ended = run["numTasks"], run["numDone"] + run["numFailed"]
        text = "%s of %s" % (grouped(ended), grouped(total))
        if run["numFailed"]:
            text += ", %s failed" % grouped(run["numFailed"])
        text += ", %d here" % running
        rate = present_rate(list(self.readings.latest))
        if rate:
            text += ", " + forecast_text(rate, *estimate_time_left(run, rate, RecentEnds([], []), None))
        return bar_line(run, text, self.screen)

    def _current_run(self) -> Dict[str, Any]:
        """The latest figures, with the tasks that ended here since then counted as done."""
        run, to_move = dict(self.run), self.ended_since
        for field in ("numComputing", "numWaiting"):
            moved = min(run[field], to_move)
            run[field] -= moved
            run["numDone"] += moved
            to_move -= moved
        return run


class FirstEnds:
    """The first ends of a worker, as long as all of them are quick failures: they say little about the tasks.

    Such failures are held back until a command ends otherwise, or runs for QUICK_S. After that a failure is the
    fault of its task. When FIRST_ENDS of them come first, or no task is left, the run's figures say whose it is.
    """
    def __init__(self, done_before: int, max_fails: Optional[int]) -> None:
        self.done_before = done_before      # done tasks of the run when the worker began
        self.max_fails = max_fails or math.inf
        self.trusted = max_fails == 0       # this node can run the command: nothing is held back
        self.failed = 0                     # failures in all, also those that are not confirmed yet
        self.seen = 0                       # quick failures, also those that are not confirmed yet
        self.hopeful = False                # there is another end, not confirmed yet
        self.held: List[Command] = []       # confirmed quick failures
        self.decide_at = math.inf           # tick: do not wait longer for others to be done

    @property
    def pauses(self) -> bool:
        """Whether to start no more commands: the first ends are to be judged, or there are too many failures."""
        return self.enough or self.failed >= self.max_fails

    @property
    def enough(self) -> bool:
        """Whether there are enough quick failures, and nothing else, to be judged."""
        return self.seen >= FIRST_ENDS and not self.hopeful and not self.trusted

    @staticmethod
    def is_quick_failure(command: Command) -> bool:
        """Whether the command failed within QUICK_S."""
        return command.reported_code != 0 and command.elapsed_s < QUICK_S

    def see(self, command: Command) -> None:
        """A command has ended. It is not confirmed yet."""
        self.failed += command.reported_code != 0
        if self.is_quick_failure(command):
            self.seen += 1
        else:
            self.hopeful = True

    def confirm(self, command: Command) -> List[Command]:
        """The end is confirmed: the ends to report now."""
        self.held.append(command)
        if not self.trusted and self.is_quick_failure(command):
            return []
        return self.release()

    def release(self) -> List[Command]:
        """Hold nothing back any more; the ends that were held."""
        ends, self.held, self.trusted = self.held, [], True
        return ends

    def fault(self, run: Dict[str, Any], claimed: int, now: float) -> str:
        """Whose fault the held failures are, by the run's figures: "node", "command", or "" when that is not clear yet.

        *claimed*: how many tasks this worker has. Workers that begin at the same time with the same wrong command
        wait for each other. They leave one after the other, each for a node that fails, and the last one sees that
        nobody does better.
        """
        others_compute, others_done = run["numComputing"] > claimed, run["numDone"] > self.done_before
        if others_compute and not others_done:
            if self.decide_at == math.inf:
                self.decide_at = now + random.uniform(1, 2) * PAUSE_S
            if now < self.decide_at:
                return ""
        return "node" if others_compute or others_done and self.enough else "command"


class ReadyTask(NamedTuple):
    """A task that was claimed and is not started."""
    task: int
    attempt: int
    claimed_at: float               # tick


class Supply:
    """The tasks that a worker has ready: when to claim how many more, what to give back, and when to leave.

    Nobody knows how long a task will take. So as many are claimed ahead as commands have ended lately: it is not
    their mean that counts, which one long command would spoil for all slots. When long tasks come, none ends any
    more, none is claimed ahead, and what lies ready is given back for others. Ticks are passed in, and so is
    *busy*, the number of commands that keep a slot or whose process group has not ended.
    """
    def __init__(self, jobs: int, idle_s: float, took_s: Iterable[float] = ()) -> None:
        self.jobs, self.idle_s = jobs, idle_s
        self.ready: "deque[ReadyTask]" = deque()
        self.took_s = deque(took_s, maxlen=TIMES_KEPT)      # seconds that the latest commands took, here or elsewhere
        self.short_ends: "deque[float]" = deque()   # ticks of the ends of short commands
        self.latency_s = 0.0                        # moving mean of what a claim takes
        self.asked_at: Optional[float] = None       # tick of the claim that has no answer yet
        self.asked_idle = False                     # nothing was at hand at the last claim
        self.reported = False                       # an end was reported since the last claim
        self.nothing_waits = False                  # the last claim got nothing
        self.nothing_since = 0.0                    # tick of the first of such claims in a row
        self.look_at = 0.0                          # tick of the next one; inf when nothing can come back by itself
        self.idle_since: Optional[float] = None     # tick since which nothing is at hand and nothing waits
        self.leaves = False                         # a worker with nothing at hand need not stay

    @property
    def ahead_s(self) -> float:
        """What will be started within so many seconds is claimed ahead."""
        least_s, most_s = CLAIM_AHEAD_S
        return min(max(LATENCIES_AHEAD * self.latency_s, least_s), most_s)

    @property
    def hold_s(self) -> float:
        """What is not started so many seconds after its claim is given back."""
        return 2 * self.ahead_s

    def likely_s(self, part: float) -> Optional[float]:
        """The seconds that so large a part of the latest commands took at most; None before the first end."""
        return quantile(sorted(self.took_s), part) if self.took_s else None

    # What to do

    def wants(self, now: float, busy: int, unreported: int = 0) -> int:
        """How many tasks to claim now. *unreported*: ends that are not reported yet."""
        at_hand = busy + len(self.ready)
        if self.asked_at is not None:
            return 0
        if self.nothing_waits:
            # When all that we had is reported, the farm knows whether others hold tasks.
            last_look = self.reported and not at_hand and not unreported
            if not last_look and (now < self.look_at or at_hand >= self.jobs):
                return 0
        self.asked_idle = not at_hand and not unreported
        ahead = self._ahead(now)
        return self.jobs + ahead - at_hand if at_hand < self.jobs or 2 * len(self.ready) < ahead else 0

    def _ahead(self, now: float) -> int:
        """How many tasks to have ready: as many short commands as have ended in the last `ahead_s`."""
        while self.short_ends and self.short_ends[0] <= now - self.ahead_s:
            self.short_ends.popleft()
        return min(len(self.short_ends), CLAIM_AHEAD_LIMIT)

    def surplus(self, now: float) -> List[ReadyTask]:
        """Take out the tasks that were claimed long ago. They are to be given back: others may start them at once."""
        old: List[ReadyTask] = []
        while self.ready and self.ready[0].claimed_at + self.hold_s <= now:
            old.append(self.ready.popleft())
        self.nothing_waits = self.nothing_waits and not old
        return old

    def next_look(self, busy: int) -> float:
        """The tick at which `surplus` or `wants` may have something new to say."""
        look_at = self.ready[0].claimed_at + self.hold_s if self.ready else math.inf
        waits = self.nothing_waits and self.asked_at is None and busy + len(self.ready) < self.jobs
        return min(look_at, self.look_at) if waits else look_at

    @property
    def knows_of_none(self) -> bool:
        """Whether nothing is ready, and nothing waited at the last look."""
        return not self.ready and self.nothing_waits and self.asked_at is None

    # What has happened

    def asked(self, now: float) -> None:
        """Tasks are being claimed."""
        self.asked_at, self.reported = now, False

    def _answered(self, now: float) -> None:
        assert self.asked_at is not None
        took_s = min(now - self.asked_at, 1.0)      # more tells of an outage
        self.latency_s += 0.2 * (took_s - self.latency_s)
        self.asked_at = None

    def add(self, now: float, tasks: Iterable[Tuple[int, int]]) -> None:
        """The claim got these tasks, each with its attempt."""
        self._answered(now)
        self.nothing_waits, self.idle_since = False, None
        self.ready.extend(ReadyTask(task, attempt, now) for task, attempt in tasks)

    def none_left(self, now: float, retry_s: Optional[float], computing: float) -> None:
        """The claim got nothing. *retry_s*: until there may be a task; *computing*: tasks that may come back.

        A worker that waits costs as much as one that computes. So it stays no longer than it would need for all that
        may come back. (Others give back within a second what they have claimed ahead.)
        """
        self._answered(now)
        self.nothing_since = self.nothing_since if self.nothing_waits else now
        self.nothing_waits = True
        self.idle_since = (now if self.idle_since is None else self.idle_since) if self.asked_idle else None
        task_s = self.likely_s(0.95)
        worth_s = math.inf if task_s is None else computing * task_s / self.jobs
        stay_s = math.inf if self.idle_s == math.inf else min(self.idle_s, max(IDLE_LEAST_S, worth_s))
        leave_at = (self.idle_since or now) + stay_s
        self.leaves = retry_s is None or self.idle_since is not None and now >= leave_at
        # A lease may end at retry_s, but the others may be done before. Then we need not stay.
        pause_s = random.uniform(0.5, 1.0) * max(FIRST_LOOK_S, (now - (self.idle_since or self.nothing_since)) / 4)
        self.look_at = math.inf if retry_s is None else min(now + min(retry_s, pause_s), max(leave_at, now + 0.01))

    def keep(self, held: Set[Tuple[int, int]]) -> None:
        """Of what is ready only these tasks, each with its attempt, are still held."""
        self.ready = deque(ready for ready in self.ready if (ready.task, ready.attempt) in held)

    def may_wait_again(self) -> None:
        """A task may wait that did not: look at once."""
        self.nothing_waits, self.idle_since = False, None

    def ended(self, now: float, elapsed_s: float) -> None:
        """A command has ended."""
        self.took_s.append(elapsed_s)
        if elapsed_s < self.hold_s:
            self.short_ends.append(now)


class TaskRunner:
    """Runs a command for each claimed task, several at a time, until no task is left or it is told to stop."""

    def __init__(self, client: Client, run: Dict[str, Any], template: Template, options: WorkOptions,
                 display: Display, took_s: Sequence[float] = ()) -> None:
        """*took_s*: seconds that some tasks of the run took, where they are known."""
        self.client, self.run, self.template, self.options, self.display = client, run, template, options, display
        self.uuid, self.pid = secrets.token_hex(16), os.getpid()
        # Tasks and commands, in the order in which they go through these
        self.supply = Supply(options.jobs, options.idle_s, took_s)
        self.slots = list(range(options.jobs - 1, -1, -1))  # free ones
        self.running: Dict[int, Command] = {}               # by process id
        self.ending: List[Command] = []     # the command has ended, others of its process group may not have
        self.unconfirmed: List[Tuple[float, int, Command]] = []     # heap of ends, by the tick when they are confirmed
        self.first_ends = FirstEnds(run["numDone"], options.max_fails)
        self.ask_figures_at = 0.0           # tick: to judge the first ends
        self.held_up: Optional[HoldUp] = None       # why the farm hands out no task though some wait
        self.finished = 0                   # tasks whose end was reported
        self.failed = 0                     # those of them that failed
        # Time and signals
        self.began = time.monotonic()       # tick
        self.to_end: Set[int] = set()       # process ids of commands that get SIGTERM in the next turn
        self.wake_at = 0.0                  # tick of the next call of _do_timed_work
        self.look_at = 0.0                  # tick of the next look at the progress of commands
        self.ignores_progress = False       # some was no number, and the user was told
        self.start_after = 0.0              # tick: the system had no room for another process. inf: see FirstEnds
        self.signals = 0
        self.signals_handled = 0
        self.signal_at = -math.inf          # tick of the last one
        self.signal_name = ""               # of the first
        self.stop_reason = ""               # "" until it is to stop
        self.stop_status = EXIT_STOPPED     # exit status when it is to stop
        self.status: Optional[int] = None   # exit status, once the work has ended
        self.handlers: Dict[type, Callable[[Any], None]] = {
            TasksClaimed: self._on_tasks_claimed, NoTaskClaimed: self._on_no_task_claimed,
            TasksHeld: self._on_tasks_held, ReportRefused: self._on_report_refused,
            RunFigures: self._on_run_figures,
            Notice: lambda event: self.display.say(event.sentence), ReporterEnded: self._on_reporter_ended}

    def work(self) -> int:
        """Run the commands; the exit status."""
        self.selector = selectors.DefaultSelector()
        self.wake_in, self.wake_out = os.pipe()
        for descriptor in (self.wake_in, self.wake_out):
            os.set_blocking(descriptor, False)
        self.selector.register(self.wake_in, selectors.EVENT_READ)
        self.progress_folder = ""
        with contextlib.suppress(OSError):      # a full disk: tasks are done without
            self.progress_folder = tempfile.mkdtemp(prefix="taskfarm-")
        try:
            self.watchdog = Watchdog(self.options.jobs, self.options.grace_s, self._after_death)
        except OSError as error:
            shutil.rmtree(self.progress_folder, ignore_errors=True)
            raise Refusal("no process can be started here (%s; ulimit -u): end some first" % error.strerror)
        environ = command_environment(self.client.access, self.run["uuid"], self.uuid)
        self.launcher = Launcher(self.template, environ, self.watchdog, self.options.log_dir, self.progress_folder)
        self.reporter = Reporter(self.client, self.run["uuid"], self.uuid, self._wake, self.display.screen.can_redraw,
                                 self.options.only_task, self.options.job)
        self.client.say = lambda sentence: self.reporter.post(Notice(sentence))
        self.client.meanwhile = "; commands go on meanwhile"
        self.display.in_hurry = lambda: bool(self.signals) or time.time() > self.stop_at
        signal.set_wakeup_fd(self.wake_out, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:      # nohup ignores one
                signal.signal(number, self._on_signal)
        self.reporter.thread.start()
        try:
            while self.status is None:
                self._turn()
        finally:
            try:
                self._finish(self.reporter.close())
            finally:
                shutil.rmtree(self.progress_folder, ignore_errors=True)
                self.watchdog.close()
                signal.set_wakeup_fd(-1)
                self.selector.close()
                if not self.reporter.thread.is_alive():     # else it may wake us yet
                    os.close(self.wake_in)
                    os.close(self.wake_out)
        return self.status

    def _after_death(self) -> None:
        """Let the tasks of this killed worker wait again. The watchdog calls it, when no command runs any more.

        The lease is shortened. A sign-off would count no loss, and a task that kills its workers would go round
        for ever.
        """
        shutil.rmtree(self.progress_folder, ignore_errors=True)
        with contextlib.closing(Client(self.client.find, WATCHDOG_PATIENCE_S, LAST_REPORTS_S)) as client:
            register(client, self.uuid, 1, self.pid)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):      # a full pipe wakes too
            os.write(self.wake_out, b"\0")

    def _on_signal(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self.signals and now < self.signal_at + SAME_SIGNAL_S:
            return
        self.signals += 1
        self.signal_at = now
        self.signal_name = self.signal_name or signal.Signals(number).name

    def _turn(self) -> None:
        """One turn of the loop: handle events, start commands, claim, and wait for output, ends and signals."""
        while self.reporter.events:
            event = self.reporter.events.popleft()
            self.handlers[type(event)](event)
        now = time.monotonic()
        if now >= min(self.wake_at, self.display.write_at) or self.signals > self.signals_handled:
            self._do_timed_work(now)
        if self.supply.ready and self.slots and not self.stop_reason and now >= self.start_after:
            self._start_commands(now)
        self._claim_more(now)
        if self.first_ends.held:
            self._judge_first_ends(now)
        if not self.running and not self.ending and not self.unconfirmed and self._is_finished():
            return
        before = time.monotonic()
        wait_s = max(0.0, min(self.wake_at, self.display.write_at, now + 3600.0) - before)
        events = self.selector.select(wait_s)
        stopped_s = time.monotonic() - before
        if stopped_s > wait_s + STOPPED_S:
            self._leave_out(stopped_s)
        for key, _ in events:
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    while len(os.read(self.wake_in, 4096)) == 4096:
                        pass
            else:
                self._read_output(key.data, key.fd)
        self._reap()

    def _is_finished(self) -> bool:
        """Whether the work has ended, where no command runs. Sets the exit status then."""
        if self.stop_reason:
            self._give_back_unconfirmed()
            self.status = self.stop_status
            return True
        if not self.supply.knows_of_none or self.reporter.reports:
            return False
        if self.first_ends.held:
            return False
        if self.supply.leaves:      # a run that is held up waits on, and more than that is left to do
            self.status = EXIT_STOPPED if self.held_up and not self.held_up.for_good else EXIT_DONE
            return True
        if self.supply.idle_since is not None and not self.held_up:
            self.display.say_once("no task waits now, but other workers still compute: this one stays%s, since their "
                                  "tasks may come back" % (" for a while" if self.options.idle_s < math.inf else ""))
        return False

    @property
    def failed_at_once(self) -> str:
        """Why this worker has ended so soon, and without a task that is done; "" when it did better."""
        failed = self.status in (1, EXIT_BAD_NODE, EXIT_TOO_MANY_FAILED, EXIT_TOO_SHORT)
        in_vain = self.finished == self.failed and time.monotonic() < self.began + QUICK_JOB_S
        return self.stop_reason if failed and in_vain else ""

    # Claims

    def _claim_more(self, now: float) -> None:
        """Claim what the supply wants, and give back what it has too many."""
        busy, unreported = len(self.running) + len(self.ending), len(self.unconfirmed) + len(self.first_ends.held)
        self.reporter.idle = not (busy or unreported)
        if self.stop_reason:
            return
        self._give_back_ready(self.supply.surplus(now))
        if now < self.start_after:
            return
        count = self.supply.wants(now, busy, unreported)
        if not count:
            self.wake_at = min(self.wake_at, self.supply.next_look(busy))
        elif self._fits():
            self.supply.asked(now)
            self.reporter.claim(count)
        elif not busy and not self.supply.ready:
            self._stop_with_nothing_that_fits()

    def _fits(self) -> bool:
        """Whether a task that starts now is likely to end before the job does."""
        needs_s = self.options.task_time_s
        if needs_s is None:
            needs_s = self.supply.likely_s(0.95) or 0.0
        return time.time() + needs_s < self.stop_at

    def _stop_with_nothing_that_fits(self) -> None:
        """Stop, as no task is likely to end in time. The job is too short where this worker has done none."""
        if self.finished or self.unconfirmed:
            self._leave("no task is likely to fit before the job ends")
            return
        self.stop_status = EXIT_TOO_SHORT
        self._stop("this job is too short: a task takes up to %s, and there are %s until the job ends: choose a longer "
                   "job, or shorter tasks" % (
                       duration_text(self.options.task_time_s or self.supply.likely_s(0.95) or 0.0),
                       duration_text(max(0.0, self.stop_at - time.time()))))

    def _stop_at_job_end(self, now: float) -> None:
        """Stop in time. Say so where no command has ended although one has run nearly all the time."""
        longest_s = max((now - command.started for command in self.running.values()), default=0.0)
        if self.finished or self.unconfirmed or self.stop_reason or longest_s < (now - self.began) / 2:
            self._leave("the job ends soon")
            return
        self.stop_status = EXIT_TOO_SHORT
        self._stop("this job is too short: it ends soon, and no task has ended in %s: choose a longer job, or shorter "
                   "tasks" % duration_text(longest_s))

    @property
    def stop_at(self) -> float:
        """When to stop so that the job's end finds nothing running: UTC seconds."""
        return self.options.job_end() - self.options.grace_s - STOP_EARLY_S

    # Events of the reporter

    def _on_tasks_claimed(self, event: TasksClaimed) -> None:
        self.supply.add(time.monotonic(), [] if self.stop_reason else event.tasks)     # signing off gives them back
        self._pause()

    def _on_no_task_claimed(self, event: NoTaskClaimed) -> None:
        self.supply.none_left(time.monotonic(), event.retry_s, event.computing)
        if event.held_up and (self.held_up is None or event.held_up.word != self.held_up.word):
            self.display.say("%s; this worker stays for a while (with --idle 0 it would leave)" % event.held_up.why)
        self.held_up = event.held_up

    def _on_tasks_held(self, event: TasksHeld) -> None:
        self.supply.keep(event.tasks)
        for command in self.running.values():
            if (command.task, command.attempt) not in event.tasks and not command.end_reason:
                self.display.say("task %d was taken from this worker: its command is ended" % command.task)
                self._terminate(command, "lost")

    def _on_report_refused(self, event: ReportRefused) -> None:
        report = event.report
        self.display.say("task %d: the report '%s' was refused: %s" % (report["task"], report["status"], event.why))
        for command in self.running.values():
            if (command.task, command.attempt) == (report["task"], report["attempt"]) and not command.end_reason:
                self._terminate(command, "lost")

    def _on_run_figures(self, event: RunFigures) -> None:
        """Show the figures. Judge the first ends by them, where there is nothing else to do."""
        self.display.show_run(event.run)
        if not self._may_judge:
            return
        fault = self.first_ends.fault(event.run, len(self.first_ends.held) + len(self.supply.ready), time.monotonic())
        if fault == "node":
            self._leave_bad_node(event.run["numDone"] - self.first_ends.done_before)
        elif fault == "command":
            self._blame_command()
        else:
            self.ask_figures_at = min(self.ask_figures_at, self.first_ends.decide_at)

    def _on_reporter_ended(self, event: ReporterEnded) -> None:
        if not isinstance(event.error, (FarmError, Unreachable, Refusal)):
            raise event.error
        self.stop_status = exit_status_of(event.error)
        self._stop(str(event.error))

    # Start of commands, and their output

    def _start_commands(self, now: float) -> None:
        while self.supply.ready and self.slots:
            if not self._fits():
                self._give_back_ready(self.supply.surplus(math.inf))
                return
            ready = self.supply.ready.popleft()
            slot = self.slots.pop()
            try:
                command = self.launcher.start(ready.task, ready.attempt, slot)
            except (OSError, ValueError, IndexError, Refusal) as error:
                self.slots.append(slot)
                if not self._could_not_start(ready, error, now):
                    return
            else:
                self.running[command.pid] = command
                self.wake_at = min(self.wake_at, command.started + PIPES_S)

    def _could_not_start(self, ready: ReadyTask, error: Exception, now: float) -> bool:
        """Handle a command that did not start, by fault of the task or of this machine; whether to start others."""
        number = getattr(error, "errno", None)
        sentence = getattr(error, "strerror", None) or str(error)
        if number in TEMPORARY_ERRORS:
            self.supply.ready.appendleft(ready)
            self.start_after = now + 1.0
            self.wake_at = min(self.wake_at, self.start_after)
            self.display.say_once("no command can be started now (%s): trying again every second" % sentence)
            return False
        if number in (errno.ENOENT, errno.EACCES) and self.template.same_program:   # it was there when we began
            error = Refusal("%s cannot be started here (%s)" % (self.template.program, sentence))
        if isinstance(error, IndexError):
            error = Refusal("the run was extended, and there are no parameters for task %d: start this worker again "
                            "with more of them" % ready.task)
        if isinstance(error, Refusal):
            self.supply.ready.appendleft(ready)
            self.stop_status = 1
            self._stop(str(error))
            return False
        command = Command(ready.task, ready.attempt, None, now)
        command.status = (127 if number == errno.ENOENT else 126) << 8
        command.tail = ("cannot be started: " + sentence).encode("utf-8", "replace")
        self.first_ends.see(command)
        self._confirm(command)
        return not self._pause()

    def _read_output(self, command: Command, pipe: int) -> bool:
        """Read what a command has written, and pass it on; whether there was anything."""
        try:
            text = os.read(pipe, 65536)
        except BlockingIOError:
            return False
        if not text:
            self._close_pipe(command, pipe)
            return False
        target = command.pipes[pipe]
        if target == 2:
            command.tail = (command.tail + text)[-TAIL_LIMIT:]
        self.display.pass_on(command, target, text)
        return True

    def _on_output_error(self, number: int) -> None:
        """Go on without a reader, but not with a full disk: the output may be the result."""
        if number in (errno.EPIPE, errno.EIO):
            self.display.say_once("nobody reads the standard output any more: the output of commands is dropped")
        elif not self.stop_reason:
            self.stop_status = 1
            self._stop("the standard output cannot be written: %s" % os.strerror(number))
            self._give_back_unconfirmed()

    def _close_pipe(self, command: Command, pipe: int) -> None:
        if command.watched:
            self.selector.unregister(pipe)
        os.close(pipe)
        self.display.pass_on(command, command.pipes.pop(pipe), b"")

    # Ends of commands

    def _reap(self) -> None:
        """Take the ends of all commands that have ended."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            command = self.running.pop(pid, None)
            if command is None:
                if pid == self.watchdog.pid:
                    self._restart_watchdog()
                continue
            command.status, command.usage, command.elapsed_s = status, usage, time.monotonic() - command.started
            for pipe in list(command.pipes):
                # Not to its end: a process that the command left behind may hold it open, or fill it for ever.
                for _ in range(16):
                    if not self._read_output(command, pipe):
                        break
                if pipe in command.pipes:
                    self._close_pipe(command, pipe)
            if self.signals and not command.end_reason and command.killed_by_stop_signal:
                self._terminate(command, "stopping")
            with contextlib.suppress(OSError):      # most have none
                os.unlink(self.launcher.progress_path(command))
            if status and command.kill_at == math.inf:
                self._terminate(command)        # what it has left running would go on beside the next attempt
            if command.kill_at < math.inf:
                self.ending.append(command)
                self.wake_at = 0.0
            else:
                self._take_end(command)

    def _restart_watchdog(self) -> None:
        if self.watchdog.writer >= 0:
            os.close(self.watchdog.writer)
        try:
            self.watchdog.start()
        except OSError as error:
            self.display.say("the watchdog of this worker was killed, and no other can be started (%s): if the worker "
                             "is killed too, its commands go on" % error.strerror)

    def _take_end(self, command: Command) -> None:
        """The command has ended, with what belongs to it: give its task back, or report the end when it is confirmed.

        PBS, and Slurm with proctrack/linuxproc, signal one process at a time, children first. A shell whose
        child was killed goes on, and may exit with 0 before its own signal comes. Ours comes last.
        """
        if command.slot is not None:
            self.watchdog.note_group(command.slot, 0)
            self.slots.append(command.slot)
            command.slot = None
        if command.end_reason in ("stopping", "lost"):
            self._give_back(command)
            return
        self.supply.ended(command.started + command.elapsed_s, command.elapsed_s)
        killed = not command.end_reason and command.killed_by_stop_signal
        confirm_at = command.started + command.elapsed_s + (CONFIRM_KILLED_S if killed else CONFIRM_S)
        heapq.heappush(self.unconfirmed, (confirm_at, command.task, command))
        self.wake_at = min(self.wake_at, confirm_at)
        self.first_ends.see(command)
        self._pause()

    def _give_back(self, command: Command) -> None:
        """Let others run the task of a command whose end says nothing about it."""
        self._drop_log(command)
        if command.end_reason != "lost":
            self.reporter.report(command.task, command.attempt, status="waiting")
        self.supply.may_wait_again()    # this very task does

    def _give_back_unconfirmed(self) -> None:
        """Give back the latest ends, which may be part of the job's end. End what these commands left running."""
        for command in self.first_ends.held:
            self._give_back(command)
        for command in self.ending:
            command.end_reason = command.end_reason or "stopping"
        for _, _, command in self.unconfirmed:
            self._terminate(command, "stopping")
            self.ending.append(command)
        self.first_ends.held.clear()
        self.unconfirmed.clear()
        self.wake_at = 0.0

    def _give_back_ready(self, tasks: Iterable[ReadyTask]) -> None:
        for ready in tasks:
            self.reporter.report(ready.task, ready.attempt, status="waiting")

    def _confirm(self, command: Command) -> None:
        """Report a confirmed end, unless it is held back with the first ends."""
        self.ask_figures_at = 0.0
        self._report_ends(self.first_ends.confirm(command))
        if self.failed + len(self.first_ends.held) >= self.first_ends.max_fails:
            self._report_ends(self.first_ends.release())
            self._stop_after_failures("%s failed on %s (--max-fails), the last one with %s" % (
                count_text(self.failed, "command"), os.uname().nodename, self._failure(command)))

    def _report_ends(self, commands: List[Command]) -> None:
        """Report these ends, and go on when the first ends are judged."""
        for command in commands:
            self._report_end(command)
        if self.start_after == math.inf and not self.first_ends.pauses:
            self.start_after = self.wake_at = 0.0

    # The first ends: is the node at fault, or the command, or each task?

    def _pause(self) -> bool:
        """Start and claim nothing while the failures are to be judged; whether that is so."""
        if self.first_ends.pauses:
            self.start_after = math.inf
            self._give_back_ready(self.supply.surplus(math.inf))
        return self.first_ends.pauses

    @property
    def _may_judge(self) -> bool:
        """Whether nothing else can be done or learned before the first ends are judged."""
        if not self.first_ends.held or self.stop_reason or self.running or self.ending or self.unconfirmed:
            return False
        return self.supply.knows_of_none or self.first_ends.enough and self.supply.asked_at is None

    def _judge_first_ends(self, now: float) -> None:
        """Ask the farm how other workers fare, when it is time for that. A command that runs long answers for all."""
        if self.running:
            slow_at = min(command.started for command in self.running.values()) + QUICK_S
            if now >= slow_at:
                self._report_ends(self.first_ends.release())
            self.wake_at = min(self.wake_at, slow_at)
        elif self._may_judge:
            if now >= self.ask_figures_at:
                self.ask_figures_at = now + RUN_FIGURES_S
                self.reporter.ask_figures()
            self.wake_at = min(self.wake_at, self.ask_figures_at)

    def _first_failures(self) -> str:
        """What the held failures have in common, for a sentence."""
        count = len(self.first_ends.held)
        return "on %s %s failed within %g s (%s)" % (
            os.uname().nodename, "all of the first %d commands" % count if count > 1 else "the first command", QUICK_S,
            self._failure(self.first_ends.held[-1]))

    def _leave_bad_node(self, others_done: int) -> None:
        """Stop, and give the tasks back: other workers do better, or at least have not failed yet."""
        self.stop_status = EXIT_BAD_NODE
        self._stop("%s, and other workers %s: %s given back" % (
            self._first_failures(), "have done %s meanwhile" % count_text(others_done, "task") if others_done > 0 else
            "still compute", "the task is" if len(self.first_ends.held) == 1 else "the tasks are"))
        self._give_back_unconfirmed()

    def _blame_command(self) -> None:
        """Report the held failures, since nobody does better. Stop if there are many of them."""
        stops = self.first_ends.enough and self.options.max_fails is None
        reason = "%s, and no other worker does better: is the command right? --max-fails 0 goes on whatever fails" % (
            self._first_failures())
        self._report_ends(self.first_ends.release())
        if stops:
            self._stop_after_failures(reason)
        self.wake_at = 0.0              # the tasks may wait again

    def _stop_after_failures(self, reason: str) -> None:
        """Stop since too many commands have failed; those that run may finish."""
        if not self.stop_reason:
            self.stop_status = EXIT_TOO_MANY_FAILED
            self._stop(reason, drain=True)

    def _report_end(self, command: Command) -> None:
        """Report that the task is done or has failed."""
        code, elapsed_s = command.reported_code, command.elapsed_s
        self.finished += 1
        self.supply.reported = True
        if code == 0:
            self.display.task_ended(command.task, elapsed_s)
            self.reporter.report(command.task, command.attempt, status="done", **command.figures())
            self._drop_log(command)
            return
        self.failed += 1
        self.supply.may_wait_again()
        failure = self._failure(command)
        shown = command.pid and not command.log_path        # the last line of the error output was
        self.display.task_ended(command.task, elapsed_s, self._way_to_fail(command) if shown else failure,
                                command.log_path)
        ours = command.end_reason or command.signal_number or command.ran_out_of_memory
        message = failure if ours else command.error_line()
        self.reporter.report(command.task, command.attempt, status="failed", exitCode=code,
                             message=message[:MESSAGE_LIMIT], **command.figures())

    def _drop_log(self, command: Command) -> None:
        """Remove the log of an attempt that has not failed, where only those of failed ones are wanted."""
        if command.log_path and self.options.log_failed:
            with contextlib.suppress(OSError):
                os.remove(command.log_path)

    def _failure(self, command: Command) -> str:
        """How a command failed, and the last line of its error output."""
        message = command.error_line()
        return self._way_to_fail(command) + (": " + message if message else "")

    def _way_to_fail(self, command: Command) -> str:
        if command.end_reason == "timeout":
            return "ended after %g s (--timeout)" % self.options.timeout_s
        memory = " (out of memory: peak %s)" % size_text(command.memory) if command.ran_out_of_memory else ""
        if not command.signal_number:
            return "exit status %d" % command.exit_code + memory
        try:
            return "killed by " + signal.Signals(command.signal_number).name + memory
        except ValueError:      # a real-time signal has no name
            return "killed by signal %d" % command.signal_number

    # Time

    def _do_timed_work(self, now: float) -> None:
        """Do what the clock or a signal asks for, and set wake_at."""
        refresh_at = self.display.refresh(now, len(self.running))       # before ends are confirmed whose output it is
        if self.display.output_error:
            self._on_output_error(self.display.output_error)
        if self.signals > self.signals_handled:
            self.signals_handled = self.signals
            self._reap()            # what has ended by now did so before the signal was handled
            self._give_back_unconfirmed()
            if self.stop_reason and not self.options.drain:
                self._terminate_all()       # those that were to finish after too many failures
        if self.signals and not self.stop_reason:
            self._stop(self.signal_name, drain=self.options.drain)
        elif self.signals > 1:
            for command in list(self.running.values()) + self.ending:
                if command.status is None:
                    command.end_reason = command.end_reason or "stopping"
                command.kill_at = min(command.kill_at, now)
        wake_at = math.inf
        left_s = self.stop_at - time.time()
        if left_s > 0:
            wake_at = now + min(left_s, LOOK_S)
        else:
            self._stop_at_job_end(now)
            self._terminate_all()        # also those that were to finish
            self._give_back_unconfirmed()
        while self.unconfirmed and self.unconfirmed[0][0] <= now:
            self._confirm(heapq.heappop(self.unconfirmed)[2])
        for command in list(self.running.values()):
            wake_at = min(wake_at, self._check_running(command, now))
        wake_at = min(wake_at, self._check_ending(now))
        if self.running:
            if now >= self.look_at:
                self._read_progress(now)
                self.look_at = now + PROGRESS_S
            wake_at = min(wake_at, self.look_at)
        if self.unconfirmed:        # while others run we are woken often enough
            wake_at = min(wake_at, max(self.unconfirmed[0][0], now + 0.02 * bool(self.running)))
        if self.start_after > now:
            wake_at = min(wake_at, self.start_after)
        self.wake_at = min(wake_at, refresh_at)

    def _check_running(self, command: Command, now: float) -> float:
        """Watch the pipes, report that it computes, end it after its timeout; the tick of the next call."""
        age_s = now - command.started
        if not command.watched:
            if age_s < PIPES_S:     # most short ones have ended by then, and need no watching
                return now + PIPES_S
            for pipe in command.pipes:
                self.selector.register(pipe, selectors.EVENT_READ, command)
            command.watched = True
        if command.kill_at < math.inf:
            return math.inf         # see _check_ending
        if age_s >= self.options.timeout_s:
            self._terminate(command, "timeout")
            return math.inf
        if not command.reported:
            if age_s < COMPUTING_S:
                return command.started + min(COMPUTING_S, self.options.timeout_s)
            command.reported = True
            self._report_computing(command, now)
        return command.started + self.options.timeout_s

    def _report_computing(self, command: Command, now: float) -> None:
        fields = {} if command.percent is None else {"percentCompleted": command.percent}
        self.reporter.report(command.task, command.attempt, status="computing",
                             elapsed=round(now - command.started, 3), **fields)

    def _read_progress(self, now: float) -> None:
        """Report what running commands have written into their files of progress."""
        files: Set[str] = set()
        with contextlib.suppress(OSError):      # there may be none, or somebody has tidied up
            files.update(os.listdir(self.progress_folder or os.devnull))
        for command in self.running.values() if files else ():
            path = self.launcher.progress_path(command)
            line = last_line(tail_of(path)) if os.path.basename(path) in files else ""
            if not line:
                continue            # it is just being written
            try:
                percent = float(line.rstrip("%"))
                if not 0 <= percent <= 100:
                    raise ValueError
            except ValueError:
                if not self.ignores_progress:
                    self.display.say("no number from 0 to 100 is in $TASKFARM_PROGRESS of a command: such progress is "
                                     "ignored, as that of task %d: %s" % (command.task, cut(line, 40)))
                self.ignores_progress = True
                continue
            if percent != command.percent and command.kill_at == math.inf:
                command.percent, command.reported = percent, True
                self._report_computing(command, now)

    def _check_ending(self, now: float) -> float:
        """End commands that were told to end, and take the ends of those of which nothing is left.

        The tick of the next call.
        """
        told = {command.pid: command for command in itertools.chain(self.running.values(), self.ending)
                if command.kill_at < math.inf}
        if not told:
            return math.inf
        left = signal_commands(self.to_end, signal.SIGTERM) | signal_commands(told.keys() - self.to_end, 0)
        self.to_end.clear()
        due = {pid for pid in left if told[pid].kill_at <= now}
        if due:
            signal_commands(due, signal.SIGKILL)
        for command in [command for command in self.ending if command.pid not in left or command.pid in due]:
            self.ending.remove(command)
            self._take_end(command)
        if self.ending:
            return now + 0.05
        return min((max(told[pid].kill_at, now + 0.5) for pid in left), default=math.inf)

    def _terminate(self, command: Command, reason: str = "") -> None:
        """End what runs of the command, in the next turn: `_check_ending` does so for many at once."""
        command.end_reason = reason or command.end_reason
        command.kill_at = time.monotonic() + self.options.grace_s
        self.to_end.add(command.pid)
        self.wake_at = 0.0

    def _terminate_all(self) -> None:
        for command in self.running.values():
            if command.kill_at == math.inf:
                self._terminate(command, "stopping")

    def _leave_out(self, stopped_s: float) -> None:
        """This process did not run for so long, and its commands neither (a suspended job): count that for nothing."""
        for command in itertools.chain(self.running.values(), self.ending):
            command.started += stopped_s
            command.kill_at += stopped_s
        self.unconfirmed = [(at + stopped_s, task, command) for at, task, command in self.unconfirmed]

    # The end of the work

    def _leave(self, reason: str) -> None:
        """Stop because the job ends."""
        if self.options.leave_ok and not self.stop_reason:
            self.stop_status = EXIT_DONE
        self._stop(reason)

    def _stop(self, reason: str, drain: bool = False) -> None:
        """Start no more commands, and end those that run; *drain* lets them finish."""
        if self.stop_reason:
            return
        self.stop_reason = reason
        count = len(self.running)
        what = "may finish" if drain else "are ended" if count > 1 else "is ended"
        if not drain and self.stop_status not in (EXIT_RUN_DELETED, EXIT_NO_SERVER, EXIT_NO_LOGIN):
            what += ", and their tasks are given back" if count > 1 else ", and its task is given back"
        self.display.say("stopping: %s%s" % (reason, "; %s %s" % (count_text(count, "command"), what) if count else ""))
        self._give_back_ready(self.supply.surplus(math.inf))
        if not drain:
            self._terminate_all()

    def _finish(self, unsent: List[Dict[str, Any]]) -> None:
        """Send the last reports and sign off. Save the reports that cannot be sent."""
        if self.running:        # only after an error of our own
            signal_commands(self.running, signal.SIGKILL)
        if self.stop_status == EXIT_RUN_DELETED:
            unsent = []
        retry_s = LAST_REPORTS_S if self.signals < 2 else 1.0
        with contextlib.closing(Client(self.client.find, retry_s, timeout_s=LAST_REPORTS_S)) as client:
            try:
                for _, refused in send_reports(client, self.run["uuid"], self.uuid, unsent):
                    for event in refused:
                        self._on_report_refused(event)
                client.ask("DELETE", "/api/worker/" + self.uuid)
                run = client.ask("GET", "/api/runs/" + self.run["uuid"])
                held_up = ask_hold_up(client, run) if run["numWaiting"] else None
            except NotFound:
                self.display.say("run %s was deleted" % self.run["uuid"])
                self.status = EXIT_RUN_DELETED
                return
            except (FarmError, Unreachable, Refusal) as error:
                self._save_unsent(unsent, error)
                return
        self.display.show_run(run)
        self.display.say(state_counts(run))
        if held_up:
            self.display.say(held_up.why)
        if self.stop_reason:
            self.status = self.stop_status
        elif self.finished == self.failed if self.options.only_task is not None else (
                run["numFailed"] or held_up and held_up.for_good):
            self.status = EXIT_TASKS_FAILED

    def _save_unsent(self, unsent: List[Dict[str, Any]], error: Exception) -> None:
        results = [report for report in unsent if report["status"] != "computing"]
        if self.stop_reason:
            self.status = self.stop_status
        elif results or self.failed:
            self.status = exit_status_of(error) if results else EXIT_TASKS_FAILED
        if not results:
            self.display.say(str(error))
            return
        try:
            path = save_unsent(self.client.access, self.run["uuid"], self.uuid, results)
            self.display.say("%s; %s saved in %s, and the next worker sends them" % (
                error, count_text(len(results), "report"), path))
        except OSError as trouble:
            self.display.say("%s; %s lost: %s" % (error, count_text(len(results), "report"), trouble))


# ---------------------------------------------------------------- BATCH SYSTEMS
# The batch job of this process: when it ends, how many commands it has room for, and what is wrong with the way in
# which the worker was started; the other jobs of its array, and those that the user has submitted. Asks no farm.
# For another batch system: its variable in batch_system, and a function like pbs_end if it can be asked.

ANSWER_S = 20.0                     # a batch system that has not answered by then is asked again later,
ASK_AGAIN_S = 60.0                  # first after so long, then after twice as long: many workers must not load it
SUSPENDED_S = 10.0                  # nobody looked for so long: this process was suspended


def batch_system(environ: Mapping[str, str]) -> Tuple[str, List[str]]:
    """The batch system whose job we are, "" for none, and the command that tells about the job, [] for none."""
    job = environ.get("SLURM_JOB_ID")
    if job:
        if environ.get("SLURM_ARRAY_JOB_ID"):       # SLURM_JOB_ID of an array's last task is that of the array
            job = "%s_%s" % (environ["SLURM_ARRAY_JOB_ID"], environ.get("SLURM_ARRAY_TASK_ID"))
        return "Slurm", ["scontrol", "show", "job", job]
    if environ.get("PBS_JOBID"):
        return "PBS", ["qstat", "-f", environ["PBS_JOBID"]]
    return "LSF" if environ.get("LSB_JOBID") else "SGE" if environ.get("SGE_TASK_ID") else "", []


def clock_seconds(text: str) -> float:
    """The seconds of a duration like 12:00:00, or of a number of seconds. Raises ValueError."""
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def slurm_end(text: str) -> Optional[float]:
    """When a job ends, from the output of `scontrol show job`: UTC seconds, inf without a limit, None if unknown."""
    end = re.search(r"\bEndTime=(\S+)", text)
    return None if end is None else float(end.group(1)) if end.group(1).isdigit() else math.inf


def pbs_end(text: str, now: float, suspended_s: float) -> Optional[float]:
    """When a job ends, from the output of `qstat -f` of PBS Pro, OpenPBS or Torque: as slurm_end.

    Long values continue in lines that begin with a tab. etime is when the job could begin, not its end. The
    walltime does not go on while the job is suspended. The time that is used is some minutes old.
    """
    fields = dict(re.findall(r"^\s+([A-Za-z_.]+) = (.*)$", text.replace("\n\t", ""), re.M))
    try:
        if "Resource_List.walltime" not in fields:
            return math.inf if fields else None
        walltime_s = clock_seconds(fields["Resource_List.walltime"])
        end = now + walltime_s - clock_seconds(fields.get("resources_used.walltime", "0"))
        started = fields.get("stime") or fields.get("start_time")
        if started:
            started_at = time.mktime(time.strptime(started, "%a %b %d %H:%M:%S %Y"))
            end = min(end, started_at + walltime_s + suspended_s)
        return end
    except (ValueError, OverflowError):
        return None


class BatchJob:
    """When the batch job ends that this process is part of.

    The batch system is asked beside the work, since qstat may hang for minutes. It is asked again while the
    end is unknown, and after the job was suspended, which moves the end. There is no thread: `end` looks.
    """
    def __init__(self, environ: Mapping[str, str], say: Callable[[str], None], until: Optional[float] = None) -> None:
        """*say* is told what was learned. *until*: the end in UTC seconds, where the user has told it."""
        self.say = say
        self.system, self.words = batch_system(environ)
        self.environ = {name: value for name, value in environ.items() if name != "SLURM_CLUSTERS"}     # of sbatch
        self.environ["SLURM_TIME_FORMAT"] = "%s"            # UTC seconds
        self.end_s: Optional[float] = None                  # UTC seconds; inf: it has no end; None: not known
        self.told_s: Optional[float] = None                 # the end that the user was told
        self.process: Optional["subprocess.Popen[bytes]"] = None    # asks the batch system
        self.unanswered = 0                                 # questions
        self.suspended_s = 0.0                              # how long this process was suspended
        self.asked_at = 0.0                                 # ticks
        self.ask_at = math.inf
        self.looked_at = time.monotonic()
        if until is not None or not self.system:
            self.words = []
            self._learn(math.inf if until is None else until, "")
        elif environ.get("SLURM_JOB_END_TIME", "").isdigit():
            self._learn(float(environ["SLURM_JOB_END_TIME"]), "")
        elif self.words:
            self._ask(self.looked_at)
        else:
            say("%s is not asked when this job ends: --until TIME says it" % self.system)

    def end(self) -> float:
        """When the job ends, in UTC seconds: inf when never, or while that is not known. Does not wait."""
        now = time.monotonic()
        if now > self.looked_at + SUSPENDED_S and self.words:
            self.suspended_s += now - self.looked_at
            self.ask_at, self.end_s = now, None
        self.looked_at = now
        if self.process is not None:
            if now > self.asked_at + ANSWER_S or self.process.poll() is not None:
                self._take_answer()
        elif now >= self.ask_at:
            self._ask(now)
        return math.inf if self.end_s is None else self.end_s

    def wait(self, limit_s: float) -> None:
        """Wait for the answer of the batch system, but not for longer than the limit."""
        limit = time.monotonic() + limit_s
        while self.process is not None and time.monotonic() < limit:
            time.sleep(0.01)
            self.end()

    def close(self) -> None:
        """End the program that asks, if one still runs."""
        if self.process is not None:
            self.process.kill()

    def _ask(self, now: float) -> None:
        self.asked_at, self.ask_at = now, now + random.uniform(1.0, 1.5) * ASK_AGAIN_S * 2 ** min(self.unanswered, 4)
        try:
            self.answer = tempfile.TemporaryFile()      # noqa: SIM115 (a pipe may be full before anybody reads it)
            self.process = subprocess.Popen(self.words, stdin=subprocess.DEVNULL, stdout=self.answer,
                                            stderr=subprocess.STDOUT, env=self.environ)
        except OSError as error:
            self._learn(None, "%s: %s" % (self.words[0], error.strerror))

    def _take_answer(self) -> None:
        assert self.process is not None
        why = "%s does not answer" % self.words[0] if self.process.poll() is None else ""
        self.close()
        self.process = None
        with self.answer:       # the exit status says nothing: a worker waits for all of its children, this one too
            self.answer.seek(0)
            text = self.answer.read().decode("utf-8", "replace")
        end = slurm_end(text) if self.system == "Slurm" else pbs_end(text, time.time(), self.suspended_s)
        self._learn(end, why or (text.strip() or self.words[0] + " says nothing").splitlines()[-1])

    def _learn(self, end: Optional[float], why: str) -> None:
        """Take over the end of the job; None: it stays unknown, and *why*. Tell the user what is new."""
        self.unanswered = self.unanswered + 1 if end is None else 0
        if end is None:
            if self.unanswered == 1:
                self.say("%s does not say when this job ends (%s): it is asked again later; --until TIME says it" % (
                    self.system, why))
            return
        self.end_s, self.ask_at = end, math.inf
        if end not in (math.inf, self.told_s):
            self.told_s = end
            self.say("the job ends at " + time.strftime("%F %T", time.localtime(end)))


def default_jobs(environ: Mapping[str, str]) -> int:
    """For how many commands at a time the batch job has cores, as far as its environment says; else 1."""
    cores = environ.get("NCPUS" if environ.get("PBS_JOBID") else "SLURM_CPUS_PER_TASK", "")
    return min(max(int(cores), 1), MAX_JOBS) if cores.isdecimal() else 1


def job_warnings(environ: Mapping[str, str], jobs: int) -> Iterator[str]:
    """What is wrong with how a worker was started in its batch job, each with what to do."""
    system, _ = batch_system(environ)
    if not system:
        return
    nodes = environ.get("SLURM_JOB_NUM_NODES", "1")
    if nodes != "1" and not environ.get("SLURM_STEP_ID"):
        yield "the job has %s nodes, and this worker uses one: start it by 'srun -c %d python3 ...'" % (nodes, jobs)
    elif environ.get("SLURM_TASK_PID") == str(os.getppid()) and not os.isatty(0):
        # Slurm signals this process alone. A shell dies of the signal or waits, and passes nothing on.
        yield ("Slurm signals only the shell that started this worker, which is then killed without warning: write "
               "'exec python3 ...' there")
    cores = len(os.sched_getaffinity(0))
    if cores < jobs:
        yield "%d commands at a time share %s: %s" % (jobs, count_text(cores, "core"), (
            "give -c %d to sbatch, and to srun too, or -j %d here" if system == "Slurm" else
            "ask for %d in the job, or give -j %d here") % (jobs, cores))


def moment_of(text: str, now: float) -> float:
    """The UTC seconds of "+3600" (seconds from now), "17:30" (the next one) or RFC 3339. Raises ValueError."""
    if text.startswith("+"):
        end = now + float(text)
        datetime.datetime.fromtimestamp(end)        # raises for inf, nan and what is after the year 9999
        return end
    clock = re.fullmatch(r"(\d\d?):(\d\d)", text)
    if clock:
        today = datetime.datetime.fromtimestamp(now).replace(
            hour=int(clock.group(1)), minute=int(clock.group(2)), second=0, microsecond=0)
        return today.timestamp() if today.timestamp() > now else (today + datetime.timedelta(days=1)).timestamp()
    return datetime.datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text)).timestamp()


JOBS_KEPT_S = 30 * DAY_S            # what was submitted is known for so long
LOOK_AT_JOBS_S = 60.0               # between two questions of all verbs of a user about their jobs
LOOK_LIMIT_S = 5.0                  # a person waits: what is not answered by then is not shown
SHOWN_JOBS = 3                      # that ended without a task
FAILED_IN_ROW = 3                   # so many jobs of an array that failed at once stop the others
# Pending for these reasons is pending for ever. (For QOSMaxJobsPerUserLimit and its like it is until others end.)
PERMANENT = re.compile(r"Can Never Run|PartitionTimeLimit|PartitionNodeLimit|PartitionConfig|Invalid|BadConstraints|"
                       r"NotAllowed|NeverSatisfied|JobHeld|launch.failed|(QOS|Assoc)\w*(PerJob|PerNode|NotSatisfied)")


class JobCounts(NamedTuple):
    """The jobs of one name that a batch system has."""
    running: int
    ids: List[str]                  # of those that run and have an output already
    reasons: Dict[str, int]         # of the pending ones: how many for each


class BatchTrouble(Exception):
    """A batch system refused, or did not answer: its own sentence. *unclear*: it may have done what it was asked."""

    def __init__(self, sentence: str, unclear: bool = False) -> None:
        super().__init__(sentence)
        self.unclear = unclear


def batch_environ(environ: Mapping[str, str]) -> Dict[str, str]:
    """The environment of a call: without what changes the form of answers, or which jobs are meant."""
    kept = {name: value for name, value in environ.items()
            if not name.startswith(("SQUEUE_", "SACCT_", "SCANCEL_")) and name != "SLURM_TIME_FORMAT"}
    return dict(kept, SLURM_BITSTR_LEN="0")     # all numbers of an array, and not the first few


def call_batch(words: Sequence[str], environ: Mapping[str, str], text: str = "", limit_s: float = ANSWER_S,
               keep_open: Sequence[int] = (), fine: Collection[int] = (0,)) -> str:
    """The output of a program of the batch system that was given a text; its error output if it has no other.

    *keep_open*: descriptors for it. *fine*: exit statuses that are no failure. Raises BatchTrouble.
    """
    try:
        done = subprocess.run(words, input=os.fsencode(text), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env=batch_environ(environ), timeout=limit_s, pass_fds=keep_open)
    except subprocess.TimeoutExpired:
        raise BatchTrouble("%s does not answer" % words[0], unclear=True)
    except OSError as error:
        raise BatchTrouble("%s: %s" % (words[0], error.strerror))
    out, err = (stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr))
    if done.returncode in fine:
        return out or err
    said = printable("; ".join(line.partition("error: ")[2] or line for line in err.splitlines()))
    raise BatchTrouble("%s: %s" % (words[0], said or "exit status %d" % done.returncode),
                       unclear=bool(re.search("timed out|[Cc]onnect|contact|15010", said)))


def job_text(environ: Mapping[str, str]) -> str:
    """The batch job of this process as the farm shows it: slurm:1234_7, pbs:75[1].head; "" where there is none."""
    system, words = batch_system(environ)
    return "%s:%s" % (system.lower(), words[-1]) if words else ""


def array_of(job: str) -> str:
    """The array of a job, in the words of the batch system: 1234, 75[].head. "" where it is of none."""
    found = re.fullmatch(r"slurm:(\d+)_\d+|pbs:(\d+\[)\d+(\].*)", job)
    return "" if found is None else found.group(1) or found.group(2) + found.group(3)


def job_name(run_uuid: str) -> str:
    """The name of the jobs of a run."""
    return "tf-" + run_uuid[:8]


def numbers_in(ranges: str) -> int:
    """How many numbers are in "5-200%50", "1,3-5" or "1-9:2"."""
    count = 0
    for first, last, step in re.findall(r"(\d{1,9})(?:-(\d{1,9}))?(?::(\d{1,9}))?", ranges.partition("%")[0]):
        count += max((int(last or first) - int(first)) // max(int(step or 1), 1) + 1, 0)
    return count


SQUEUE = ["squeue", "--me", "-h", "-o", "%i|%t|%j|%r"]


def read_squeue(text: str) -> Dict[str, JobCounts]:
    """The jobs by name, from what SQUEUE prints. An array's pending jobs are one line."""
    found: Dict[str, JobCounts] = {}
    for line in text.splitlines():
        job, state, name, reason = (line.split("|", 3) + ["", "", ""])[:4]
        ranges = re.search(r"\[(.*)\]", job)
        pending = (numbers_in(ranges.group(1)) if ranges else 1) if state == "PD" else 0
        add_jobs(found, name, int(not pending and state not in ("CG", "CD")), [job], pending, reason)
    return found


def add_jobs(found: Dict[str, JobCounts], name: str, running: int, ids: List[str], pending: int, reason: str) -> None:
    """Count some jobs of a name, which are pending for one reason."""
    counts = found.get(name, JobCounts(0, [], {}))
    reasons = dict(counts.reasons, **{reason: counts.reasons.get(reason, 0) + pending} if pending else {})
    found[name] = JobCounts(counts.running + running, counts.ids + ids, reasons)


def read_qstat(text: str) -> Dict[str, JobCounts]:
    """The same, from `qstat -f -F json` of OpenPBS, which counts the jobs of an array. Raises ValueError.

    There is an output only when a job has ended.
    """
    found: Dict[str, JobCounts] = {}
    for fields in json.loads(text).get("Jobs", {}).values():
        state, counts = fields.get("job_state"), dict(re.findall(r"(\w+):(\d+)", fields.get("array_state_count", "")))
        add_jobs(found, fields.get("Job_Name", ""), int(counts.get("Running", state in "RES")), [],
                 int(counts.get("Queued", state in "QHW")), fields.get("comment") or "queued")
    return found


def submissions_path(environ: Mapping[str, str], run_uuid: str) -> str:
    """The file that holds what was submitted for a run: system, name, folder of the output, arrays."""
    return os.path.join(state_folder(environ), "jobs-%s.json" % run_uuid)


def all_submissions(environ: Mapping[str, str], now: float) -> List[Dict[str, Any]]:
    """What was submitted for all runs, from this user's files. Those that are old are removed."""
    found = []
    for path in glob.glob(os.path.join(glob.escape(state_folder(environ)), "jobs-*.json")):
        record = read_access(path)
        if record.get("utc", 0) < now - JOBS_KEPT_S:
            with contextlib.suppress(OSError):
                os.remove(path)
        elif record.get("arrays"):
            found.append(record)
    return found


def ask_about_jobs(environ: Mapping[str, str], records: Sequence[Mapping[str, Any]]) -> Dict[str, JobCounts]:
    """The jobs by name, in one question to each batch system. Raises BatchTrouble."""
    found: Dict[str, JobCounts] = {}
    names = [record["name"] for record in records if record["system"] == "Slurm"]
    if names:
        found.update(read_squeue(call_batch([*SQUEUE, "--name", ",".join(names)], environ, limit_s=LOOK_LIMIT_S)))
    arrays = [record["arrays"][-1] for record in records if record["system"] == "PBS"]
    if arrays:
        with contextlib.suppress(ValueError):       # where all of them have ended it prints a sentence
            found.update(read_qstat(call_batch(["qstat", "-f", "-F", "json", *arrays], environ, limit_s=LOOK_LIMIT_S,
                                               fine=(0, 35, 153))))
    return found


def look_at_jobs(environ: Mapping[str, str], now: float) -> Optional[Tuple[float, Dict[str, JobCounts]]]:
    """When the batch system was asked last, and the user's jobs by name then. None where it does not answer.

    A file holds its answer, so that all verbs of a user ask once a minute at most.
    """
    path = os.path.join(state_folder(environ), "jobs.json")
    known = read_access(path)
    if not 0 <= now - known.get("utc", -math.inf) < LOOK_AT_JOBS_S:
        write_access(path, dict(known, utc=now))        # before: others need not ask meanwhile
        try:
            known = {"utc": now, "jobs": ask_about_jobs(environ, all_submissions(environ, now))}
        except BatchTrouble:
            known = {"utc": now, "jobs": None}
        write_access(path, known)
    if known.get("jobs") is None:
        return None
    return known["utc"], {name: JobCounts(*counts) for name, counts in known["jobs"].items()}


def forget_look(environ: Mapping[str, str]) -> None:
    """Have the batch system asked anew: jobs are sent or cancelled."""
    with contextlib.suppress(OSError):
        os.remove(os.path.join(state_folder(environ), "jobs.json"))


class RunJobs(NamedTuple):
    """The jobs of a run that were submitted. How they failed is told of the last array alone."""
    running: int
    reasons: Dict[str, int]             # of the pending ones: how many for each
    failed: List[Tuple[str, str]]       # (job, why) of the latest that ended without a task
    stopped: bool                       # several in a row failed at once: what was pending is cancelled


def jobs_of_run(environ: Mapping[str, str], run_uuid: str, now: float,
                ask_workers: Callable[[], List[Dict[str, Any]]]) -> Optional[RunJobs]:
    """The jobs that this user has submitted for a run. None of none, or where the batch system does not answer.

    *ask_workers* gives the latest workers of the farm, the last one first.
    """
    record = read_access(submissions_path(environ, run_uuid))
    look = look_at_jobs(environ, now) if record.get("arrays") else None
    if look is None:
        return None
    asked, by_name = look
    counts = by_name.get(record["name"], JobCounts(0, [], {}))
    last = record["arrays"][-1]
    workers = [worker for worker in ask_workers() if last in (
        array_of(worker["job"] or ""), (worker["job"] or "").partition(":")[2])]
    failed = [(worker["job"].partition(":")[2], worker["why"]) for worker in workers if worker["why"]]
    known = {worker["job"].partition(":")[2] for worker in workers}
    failed += [(job, why) for job, why in silent_jobs(record, asked) if job not in known and job not in counts.ids]
    return RunJobs(counts.running, counts.reasons, failed[:SHOWN_JOBS],
                   any(failed_in_row(workers, worker["uuid"]) >= FAILED_IN_ROW for worker in workers))


def silent_jobs(record: Mapping[str, Any], before: float) -> Iterator[Tuple[str, str]]:
    """The latest jobs of the last array that have left an output, each with its last line, if older than that."""
    pattern = re.compile(r"tf-\w+-(\d+_\d+)\.out|(\d+\[\d+\]\..*)\.OU")
    with contextlib.suppress(OSError):
        jobs = [(found.group(1) or found.group(2), entry) for entry in os.scandir(record["folder"])
                for found in [pattern.fullmatch(entry.name)] if found]
        jobs = [(job, entry) for job, entry in jobs if record["arrays"][-1] == array_of(
            ("pbs:" if "[" in job else "slurm:") + job)]
        jobs.sort(key=lambda pair: int(re.findall(r"\d+", pair[0])[1]), reverse=True)
        for job, entry in jobs[:50]:
            if entry.stat().st_mtime < before:
                yield job, last_line(tail_of(entry.path)) or "no output"


def failed_in_row(workers: Sequence[Mapping[str, Any]], worker_uuid: str) -> int:
    """How many jobs of its array that were started one after the other failed at once, the one of this worker among
    them. *workers*: in the order of their registration."""
    array = next((array_of(worker["job"] or "") for worker in workers if worker["uuid"] == worker_uuid), "")
    own = [worker for worker in workers if array and array_of(worker["job"] or "") == array]
    for fails, group in itertools.groupby(own, lambda worker: worker["why"] is not None):
        row = [worker["uuid"] for worker in group]
        if worker_uuid in row:
            return len(row) * fails
    return 0


def cancel_pending(environ: Mapping[str, str]) -> int:
    """Cancel the jobs of this job's own array that have not begun. How many these were for PBS, and 1 for Slurm if it
    has taken the call; 0 where this is no array. Raises BatchTrouble."""
    array = array_of(job_text(environ))
    if not array or "[" not in array:
        if array:
            call_batch(["scancel", "--state=PENDING", array], environ)
        return int(bool(array))
    try:
        (fields,) = json.loads(call_batch(["qstat", "-f", "-F", "json", array], environ))["Jobs"].values()
        ranges = re.findall(r"\d[-:\d]*", fields["array_indices_remaining"])
    except (ValueError, KeyError):
        raise BatchTrouble("qstat does not say which jobs of %s are queued" % array)
    if ranges:      # an argument for each: qdel takes no list of ranges
        call_batch(["qdel", *(array.replace("[]", "[%s]" % part) for part in ranges)], environ)
    return sum(map(numbers_in, ranges))


# ---------------------------------------------------------------- BENCH
# How many workers this machine can feed: a server in a process of its own, cheap clients in others. It uses the API and
# the operations as they are, and must not know how the store or HTTP work inside.
#
# A new profile of single requests: its steps in `bench_steps`, its name in REQUEST_PROFILES. A profile of another kind:
# a function that returns figures, one that makes a table of them, and an entry of `measure` in UPKEEP.

class Step(NamedTuple):
    """One request of a cycle."""
    name: str
    request: Callable[[Any], bytes]     # from what was claimed last to the bytes to send


Steps = Sequence[Step]


class BenchClient:
    """One connection that sends the requests of a cycle in turn, as cheaply as Python can."""

    def __init__(self, port: int, steps: Steps, context: Optional[ssl.SSLContext] = None) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None:
            self.sock = context.wrap_socket(self.sock)
        self.steps = steps
        self.position = 0               # of the next request in the cycle
        self.last_claim: Any = -1       # number of a task; of a batch a list of number and attempt
        self.sent_tick = 0.0
        self.claimed = array.array("q")
        self.nothing_waits = False

    def send(self) -> None:
        """Send the next request of the cycle."""
        self.sent_tick = time.perf_counter()
        self.sock.sendall(self.steps[self.position].request(self.last_claim))

    def receive(self) -> float:
        """Read the answer, and return the seconds it took. Raises OSError for one that the profile does not expect."""
        data = self.sock.recv(65536)
        took_s = time.perf_counter() - self.sent_tick
        length = re.search(rb"Content-Length: ([0-9]+)", data)
        whole = data.find(b"\r\n\r\n") + 4 + int(length[1] if length else 0)
        while len(data) < whole or not data:
            more = self.sock.recv(1 << 20)
            if not more:
                raise OSError("the server closed a connection")
            data += more
        if data[9:10] != b"2":
            raise OSError("the server answered %s" % ascii(data[:300]))
        name = self.steps[self.position].name
        if name.startswith("claim") and data[9:12] == b"204":
            self.nothing_waits = True
        elif name == "claim":
            self.last_claim = int(data[data.rindex(b'"task":') + 7:].partition(b",")[0])
            self.claimed.append(self.last_claim)
        elif name == "claim many":
            self.last_claim = re.findall(rb'"task":([0-9]+),"attempt":([0-9]+)', data)
            self.claimed.extend([int(number) for number, _ in self.last_claim])
        elif name == "done many" and data[data.index(b"\r\n\r\n"):].count(b'"refused":[]') != 1:
            raise OSError("the server refused results: %s" % ascii(data[:300]))
        self.position = (self.position + 1) % len(self.steps)
        return took_s


def bench_request(token: str, method: str, path: str, body: Any = None) -> bytes:
    """The bytes of one request below /api. *body*: bytes, or a value to be sent as JSON; None for no body."""
    content = b"" if body is None else body if isinstance(body, bytes) else encode_json(body).encode()
    head = ("%s /api/%s HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: taskfarm-bench\r\nAccept: */*\r\n"
            "Authorization: Bearer %s\r\n" % (method, path, token))
    if content:
        head += "Content-Type: application/json\r\nContent-Length: %d\r\n" % len(content)
    return head.encode() + b"\r\n" + content


REPORTS = ("alike", "differing")        # results of a batch: all the same, or as those of `work`: each has used other
                                        # seconds, bytes and seconds of CPU


@functools.lru_cache(maxsize=1)
def used_figures() -> List[bytes]:
    """What tasks used, as JSON without its braces. Made once: making them costs a client as much as sending them."""
    dice = random.Random(1)
    return [b'"elapsed":%d.%03d,"memory":%d,"cpu":%d.%03d' % (
        *divmod(dice.randint(1, 100000), 1000), dice.randint(2 ** 14, 2 ** 22) << 10,
        *divmod(dice.randint(1, 100000), 1000)) for _ in range(99991)]      # a prime: no batch divides it


def done_many(head: bytes, worker: str, reports: str) -> Callable[[List[Tuple[bytes, bytes]]], bytes]:
    """A function from a batch of claims (number and attempt) to the request that reports all of them done."""
    used = itertools.cycle(used_figures() if reports == "differing" else ())

    def request(tasks: List[Tuple[bytes, bytes]]) -> bytes:
        if reports == "alike":
            entries = [b'{"task":%s,"attempt":%s,"status":"done"}' % task for task in tasks]
        else:
            entries = [b'{"task":%s,"attempt":%s,"status":"done",%s}' % (*task, figures)
                       for task, figures in zip(tasks, used)]
        content = b'{"worker_uuid":"%s","data":[%s]}' % (worker.encode(), b",".join(entries))
        return b"%s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
            head[:-4], len(content), content)
    return request


REQUEST_PROFILES = ("constant", "lean", "paper", "tls")


def bench_steps(profile: str, run: str, worker: str, token: str, batch: int = 1000, reports: str = "alike") -> Steps:
    """The cycle of requests of a profile. `paper` is what the published client's stress test does."""
    def fixed(name: str, method: str, path: str, body: Any = None) -> Step:
        content = bench_request(token, method, path, body)
        return Step(name, lambda _: content)

    def on_task(name: str, method: str, tail: str = "", body: Any = None) -> Step:
        before, after = bench_request(token, method, "runs/%s/tasks/@%s" % (run, tail), body).split(b"@")
        return Step(name, lambda task: b"%s%d%s" % (before, task, after))

    claim_one = fixed("claim", "POST", "runs/%s/task" % run, {"worker_uuid": worker})
    done = on_task("done", "PUT", "", {"status": "done"})
    cycles: Dict[str, Steps] = {
        "constant": [fixed("constant", "POST", "constant", {"worker_uuid": worker})],
        "lean": [claim_one, done],
        "tls": [claim_one, done],
        "paper": [claim_one, on_task("read", "GET", "?info=percentCompleted"),
                  *(on_task("update", "PUT", "", {"percentCompleted": 10 * (n + 1)}) for n in range(10)), done],
        "flat": [claim_one, on_task("update", "PUT", "", {"percentCompleted": 50}),
                 fixed("run info", "GET", "runs/%s" % run)],
        "batch": [fixed("claim many", "POST", "runs/%s/tasks" % run, {"worker_uuid": worker, "count": batch}),
                  Step("done many", done_many(bench_request(token, "PUT", "runs/%s/tasks" % run), worker, reports))],
    }
    return cycles[profile]


class Load(NamedTuple):
    """What some clients measured."""
    times_s: Dict[str, "array.array[float]"]    # of the answers, by request
    claimed: "array.array[int]"                 # tasks, in the order of their claims
    cpu_s: float                                # that the clients used themselves


def bench_load(port: int, cycles: Sequence[Steps], seconds: float, context: Optional[ssl.SSLContext] = None) -> Load:
    """Drive one connection for each cycle, for so many seconds; if these are infinite, until no task waits."""
    clients = [BenchClient(port, steps, context) for steps in cycles]
    times_s = {step.name: array.array("d") for step in cycles[0]}
    cpu_s = time.process_time()
    end = time.perf_counter() + seconds
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.sock, selectors.EVENT_READ, client)
            client.send()
        while selector.get_map():
            for key, _ in selector.select():
                client = key.data
                name = client.steps[client.position].name
                times_s[name].append(client.receive())
                if client.nothing_waits and seconds < math.inf:
                    raise OSError("the run has too few tasks for so long a time")
                if not client.nothing_waits and (client.position or time.perf_counter() < end):
                    client.send()
                else:
                    selector.unregister(client.sock)
                    client.sock.close()
    claimed = array.array("q")
    for client in clients:
        claimed.extend(client.claimed)
    return Load(times_s, claimed, time.process_time() - cpu_s)


def fork_call(function: Callable[..., Any], *arguments: Any) -> Tuple[int, Callable[[], Any]]:
    """Call a function in a process of its own. Returns its pid, and what gives its result or raises Refusal."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "wb") as file:
                pickle.dump(function(*arguments), file)
            status = 0
        except Exception as error:
            print("taskfarm: %s" % error, file=sys.stderr)
        finally:
            os._exit(status)
    os.close(writer)

    def result() -> Any:
        with os.fdopen(reader, "rb") as file:
            content = file.read()
        if os.waitpid(pid, 0)[1]:
            raise Refusal("a process of the bench failed")
        return pickle.loads(content)    # from our own child, by a pipe
    return pid, result


def in_own_group(work: Callable[[str], int], parent: Optional[str]) -> int:
    """Run *work* on a temporary folder, in a process of its own, and return its exit status.

    However that process ends, and whatever signal this one gets: all processes that it started are ended, and the
    folder is removed. Raises Refusal when no folder can be made in *parent*, by default the system's for such.

    Signals are blocked and waited for. (Previously a handler raised SystemExit wherever it was. Before it was set
    the folder was left behind. Later the exception was lost in a destructor, or cut short the removal of the folder.)
    """
    ending = {number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
              if signal.getsignal(number) is not signal.SIG_IGN}        # nohup ignores one of them
    signal.signal(signal.SIGCHLD, lambda *_: None)      # sigwait does not see a signal that is ignored
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, ending | {signal.SIGCHLD})
    try:
        folder = tempfile.mkdtemp(prefix="taskfarm-bench-", dir=parent)
    except OSError as error:
        raise Refusal("no folder can be made in %s (%s): --dir names another" % (
            parent or tempfile.gettempdir(), error.strerror))
    all_ended, held_by_all = os.pipe()      # each process of the group has the other end, until it has ended
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)       # the progress bar, where stty says tostop
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            status = work(folder)
            sys.stdout.flush()
        except (Refusal, FarmError, OSError) as error:
            print("taskfarm: %s" % error, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(held_by_all)
    os.setpgid(pid, pid)        # by both: one alone could be too late for killpg, or for the child's own children
    received = signal.sigwait(ending | {signal.SIGCHLD})
    os.killpg(pid, signal.SIGKILL)          # before waitpid, so that the number is still the group's
    status = os.waitpid(pid, 0)[1]
    os.read(all_ended, 1)
    os.close(all_ended)
    shutil.rmtree(folder)
    if received != signal.SIGCHLD:
        return 128 + received
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1


class BenchServer:
    """A server in a process of its own, with two more endpoints: a constant answer, and what it has used."""

    def __init__(self, db: str, token: str = "", access_log: Any = None) -> None:
        """*token*: a login of the file, where it is known; to look for one reads the whole file."""
        if not token:
            with contextlib.closing(Store(db)) as store:
                token = bench_token(store)
        self.token = token
        reader, writer = os.pipe()
        parent_end, self.open_while_alive = os.pipe()       # this end closes with this process, however that ends
        self.pid, self.result = fork_call(self._serve, db, writer, parent_end, access_log)
        os.close(writer)
        os.close(parent_end)
        with os.fdopen(reader, "rb") as file:
            self.port, self.certificate = json.loads(file.read() or b'[0, ""]')
        self.url = url_of("127.0.0.1", self.port)

    def _serve(self, db: str, ready: int, parent_end: int, access_log: Any) -> None:
        os.close(self.open_while_alive)
        routes = ROUTES.copy()
        constant = {"id": 12345, "task": 12344, "status": "computing", "percentCompleted": 0.0}
        routes.route("POST", "/api/constant", body={"worker_uuid": UUID})(lambda _: json_reply(201, constant))
        routes.route("GET", "/api/used")(lambda _: json_reply(200, {
            "cpu_s": time.process_time(), "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
        service = Service(db, "127.0.0.1", 0, access_log=access_log, routes=routes)
        service.farm.logins.throttle.network = str      # loopback addresses stand for those of other machines

        def stop_with_parent() -> None:
            os.read(parent_end, 1)
            service.stop()
        signal.signal(signal.SIGTERM, lambda *_: service.stop())
        threading.Thread(target=stop_with_parent, daemon=True).start()
        os.write(ready, json.dumps([service.server.server_port, service.certificate]).encode())
        os.close(ready)
        service.serve()

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """One request to the server."""
        access = parse_access({"url": self.url, "token": self.token, "certificate": self.certificate}, "bench")
        with contextlib.closing(Client(lambda: access)) as client:
            return client.ask(method, path, body)

    def new_run(self, num_tasks: int = MAX_TASKS, workers: int = 0) -> str:
        """Make a run, and register so many workers w0, w1, ..."""
        for index in range(workers):
            self.ask("POST", "/api/worker", {"uuid": "w%d" % index, "hostname": "bench", "pid": index})
        return str(self.ask("POST", "/api/run", {"numTasks": num_tasks})["uuid"])

    def stop(self) -> None:
        """End it."""
        os.kill(self.pid, signal.SIGTERM)   # closing our end is not enough: servers that were forked later hold it too
        self.result()
        os.close(self.open_while_alive)

    def kill(self) -> None:
        """End it at once, also where it hangs."""
        os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(Refusal):      # it says that the process was killed
            self.result()
        os.close(self.open_while_alive)


def bench_token(store: Store) -> str:
    """A token of the user bench. The user is made where there is none, with a password that nobody knows."""
    user = store.users.get("bench") or store.call(add_user("bench", "pbkdf2$1$00$" + "0" * 64))
    return make_token(store.signing_key, user, 0)


def quantiles_ms(times_s: Iterable[float]) -> List[float]:
    """Median, 95th and 99th percentile and maximum of some times, in milliseconds."""
    ordered = sorted(times_s)
    return [1000 * quantile(ordered, part) for part in (0.5, 0.95, 0.99, 1.0)]


def bench_point(server: BenchServer, profile: str, clients: int, seconds: float, processes: int, batch: int = 1,
                reports: str = "alike", num_tasks: int = MAX_TASKS) -> Dict[str, Any]:
    """Measure a profile with so many clients, in so many processes."""
    run = server.new_run(num_tasks, clients)
    used_figures()      # before the clients are forked: so each has them already
    context = pinned_context(server.certificate) if profile == "tls" else None
    cycles = [bench_steps(profile, run, "w%d" % number, server.token, batch, reports) for number in range(clients)]
    before = server.ask("GET", "/api/used")
    began = time.perf_counter()
    results = [fork_call(bench_load, server.port, cycles[number::processes], seconds, context)[1]
               for number in range(min(clients, processes))]
    loads: List[Load] = [result() for result in results]
    elapsed_s = time.perf_counter() - began
    used = server.ask("GET", "/api/used")
    times_s: Dict[str, "array.array[float]"] = {}
    claimed = array.array("q")
    for load in loads:
        claimed.extend(load.claimed)
        for name, values in load.times_s.items():
            times_s.setdefault(name, array.array("d")).extend(values)
    requests = sum(map(len, times_s.values()))
    cpu_s = used["cpu_s"] - before["cpu_s"]
    seen = bytearray(max(claimed) + 1 if claimed else 0)        # a set of ten million numbers takes half a gigabyte
    for number in claimed:
        seen[number] = 1
    num_done = server.ask("GET", "/api/runs/" + run)["numDone"]
    server.ask("DELETE", "/api/runs/" + run)
    return {"profile": profile, "clients": clients, "seconds": elapsed_s, "requests_per_s": requests / elapsed_s,
            "tasks_per_s": len(claimed) / elapsed_s, "num_done": num_done, "cpu_s": cpu_s,
            "cpu_s_per_1000_requests": 1000 * cpu_s / requests,
            "cpu_s_per_1000_tasks": 1000 * cpu_s / len(claimed) if claimed else None,
            "clients_cpu_s_per_s": sum(load.cpu_s for load in loads) / elapsed_s,
            "peak_mib": used["peak_kib"] / 1024, "twice": len(claimed) - sum(seen), "never": len(seen) - sum(seen),
            "ms": {name: quantiles_ms(values) for name, values in times_s.items()}}


def figures_table(heads: str, cells: str, rows: Iterable[Tuple[Any, ...]]) -> str:
    """Rows in cells of such a format under headings, both with | between. A heading with < stands over words."""
    columns = [Column(head.lstrip("<"), not head.startswith("<")) for head in heads.split("|")]
    return "\n".join(Table(columns).lines([(cells % row).split("|") for row in rows]))


def bench_table(points: List[Dict[str, Any]]) -> str:
    """The figures of REQUEST_PROFILES, a line for each request."""
    return figures_table(
        "<profile|clients|requests/s|tasks/s|<request|p50 ms|p95|p99|max|CPU ms/request|s/1000 tasks|MiB|twice|never",
        "%s|%d|%.0f|%.0f|%s|%.1f|%.1f|%.1f|%.0f|%.3f|%s|%.0f|%d|%d", [
            (point["profile"], point["clients"], point["requests_per_s"], point["tasks_per_s"], name, *times_ms,
             point["cpu_s_per_1000_requests"], "%.3f" % point["cpu_s_per_1000_tasks"] if point["tasks_per_s"] else "-",
             point["peak_mib"], point["twice"], point["never"])
            for point in points for name, times_ms in point["ms"].items()])


BATCHES = (100, 1000, 5000, MAX_BATCH)


def bench_batch(folder: str, server: BenchServer, seconds: float, processes: int,
                progress: Progress) -> Dict[str, Any]:
    """Claims and results in batches: tasks a second in the store alone and over HTTP, and what others wait meanwhile.

    Results that are alike can be written with a few statements. Those of real workers differ.
    """
    result: Dict[str, Any] = {"profile": "batch", "batches": {batch: {} for batch in BATCHES}}
    kinds = [(batch, reports) for batch in BATCHES for reports in REPORTS]
    progress.what = "batch"
    with contextlib.closing(Store(os.path.join(folder, "batch.sqlite"))) as store:
        run = store.call(create_run(uuid.uuid4().hex, MAX_TASKS)).uuid
        store.call(register_worker("w0", "bench", 0))
        in_store = {kind: store_batches(store, run, *kind, seconds / 2) for kind in kinds}
    for number, (batch, reports) in enumerate(kinds):
        progress.show(number, len(kinds))
        other_run = server.new_run(workers=processes + 1)
        lean = bench_steps("lean", other_run, "w%d" % processes, server.token)
        _, others = fork_call(bench_load, server.port, [lean], seconds)
        point = bench_point(server, "batch", processes, seconds, processes, batch, reports)
        others_s = others().times_s
        result["batches"][batch][reports] = {
            "store_tasks_per_s": in_store[batch, reports], "http_tasks_per_s": point["tasks_per_s"],
            "others_ms": quantiles_ms(others_s["claim"] + others_s["done"]),
            **{name: point[name] for name in ("ms", "cpu_s_per_1000_tasks", "clients_cpu_s_per_s", "twice", "never")}}
    return result


def store_batches(store: Store, run: str, batch: int, reports: str, seconds: float) -> float:
    """Tasks a second that are claimed and done in batches, each in a durable transaction of its own."""
    used = [json.loads(b"{%s}" % text) for text in used_figures() if reports == "differing"]
    figures = itertools.cycle([(round(1000 * one["elapsed"]), one["memory"], round(1000 * one["cpu"])) for one in used]
                              or [(None, None, None)])
    began, spent_s, tasks = time.perf_counter(), 0.0, 0
    while time.perf_counter() < began + seconds:
        called = time.perf_counter()
        claims = store.call(claim_many(run, "w0", batch))
        spent_s += time.perf_counter() - called
        done = report_many(run, "w0", [Report(number, attempt, DONE, None, None, None, None, *one)
                                       for (number, attempt, _), one in zip(claims, figures)])
        called = time.perf_counter()
        store.call(done)
        spent_s += time.perf_counter() - called
        tasks += len(claims)
    return tasks / spent_s


def batch_table(result: Dict[str, Any]) -> str:
    """The figures of profile `batch`. Of what others wait: median, 99th percentile and maximum."""
    return figures_table(
        "batch|<results|tasks/s in the store|over HTTP|claim p50 ms|done p50|CPU s/1000 tasks|clients' CPU %|"
        "others wait ms|p99|max", "%s|%s|%.0f|%.0f|%.1f|%.1f|%.4f|%.0f|%.1f|%.1f|%.0f", [
            (batch, reports, point["store_tasks_per_s"], point["http_tasks_per_s"], point["ms"]["claim many"][0],
             point["ms"]["done many"][0], point["cpu_s_per_1000_tasks"], 100 * point["clients_cpu_s_per_s"],
             *(point["others_ms"][at] for at in (0, 2, 3)))
            for batch, by_reports in result["batches"].items() for reports, point in by_reports.items()])


LIFE_CLIENTS, LIFE_BATCH = 3, 5000


def bench_life(folder: str, rows: int) -> Dict[str, Any]:
    """The whole life of a run of so many tasks: claimed and done in batches, with results that differ."""
    db = os.path.join(folder, "life.sqlite")
    server = BenchServer(db)
    point = bench_point(server, "batch", LIFE_CLIENTS, math.inf, LIFE_CLIENTS, LIFE_BATCH, "differing", rows)
    server.stop()
    return dict(point, profile="life", rows=rows, file_bytes=os.path.getsize(db))   # not smaller for rows deleted


def life_table(result: Dict[str, Any]) -> str:
    """The figures of profile `life`."""
    return figures_table(
        "life of one run: tasks|seconds|tasks/s|server CPU s|clients' CPU %|file MB|peak MiB|twice|never",
        "%d|%.1f|%.0f|%.1f|%.0f|%.0f|%.0f|%d|%d", [
            (result["rows"], result["seconds"], result["tasks_per_s"], result["cpu_s"],
             100 * result["clients_cpu_s_per_s"], result["file_bytes"] / 1e6, result["peak_mib"], result["twice"],
             result["rows"] - result["num_done"])])


FLAT = ("1 000 tasks", "rows", "10 000 runs", "random")


def fill_flat(db: str, case: str, rows: int, progress: Progress) -> None:
    """Make the file of one case of profile `flat`: rows in one run, many runs, or tasks done in random order."""
    with contextlib.closing(Store(db)) as store:
        bench_token(store)
        store.call(register_worker("w0", "bench", 0))
        runs = store.call_all([create_run(uuid.uuid4().hex, MAX_TASKS) for _ in range(10000 if case == FLAT[2] else 1)])
        run = runs[-1].uuid
        count = rows if case == "rows" else min(rows, 10 ** 6) if case == "random" else 1000
        numbers = random.Random(1).sample(range(count), count) if case == "random" else range(count)
        for first in range(0, count, MAX_BATCH):
            store.call(report_many(run, None, [Report(number, status=DONE)
                                               for number in numbers[first:first + MAX_BATCH]]))
            progress.show(first, count)


def bench_flat(folder: str, rows: int, seconds: float, progress: Progress) -> Dict[str, Any]:
    """What a claim, an update and a run info cost in files of different content: medians, and ratios to the smallest.

    The four servers take turns, so that whatever else the machine does slows all of them alike.
    """
    servers: Dict[str, BenchServer] = {}
    cycles: Dict[str, Steps] = {}
    times_s: Dict[str, Dict[str, "array.array[float]"]] = {case: {} for case in FLAT}
    for case in FLAT:
        db = os.path.join(folder, "flat-%d.sqlite" % FLAT.index(case))
        progress.what = "filling: " + case
        fill_flat(db, case, rows, progress)
        servers[case] = BenchServer(db)
        run = servers[case].ask("GET", "/api/runs")["data"][-1]["uuid"]
        cycles[case] = bench_steps("flat", run, "w0", servers[case].token)
    progress.what = "flat"
    for turn in range(20):
        for case, server in servers.items():
            for name, values in bench_load(server.port, [cycles[case]], seconds / 20).times_s.items():
                times_s[case].setdefault(name, array.array("d")).extend(values)
        progress.show(turn + 1, 20)
    for server in servers.values():
        server.stop()
    medians = {case: {name: quantiles_ms(values)[0] for name, values in times_s[case].items()} for case in FLAT}
    return {"profile": "flat", "rows": rows, "median_ms": medians, "ratio": {
        case: {name: medians[case][name] / medians[FLAT[0]][name] for name in medians[case]} for case in FLAT}}


def flat_table(result: Dict[str, Any]) -> str:
    """The figures of profile `flat`: medians, and their ratios to those of the first case."""
    shown = {"rows": "%d touched tasks" % result["rows"], "random": "done in random order"}
    return figures_table(
        "<flat, one client|claim ms|ratio|update ms|ratio|run info ms|ratio", "%s" + 3 * "|%.3f|%.2f", [
            (shown.get(case, case), *(result[figure][case][name] for name in ("claim", "update", "run info")
                                      for figure in ("median_ms", "ratio"))) for case in FLAT])


class MakespanCase(NamedTuple):
    """Tasks that real workers compute."""
    workers: int                    # each with two commands at a time
    took_s: List[float]             # of each task
    command: str = "sleep"          # gets the seconds as its argument


MAKESPAN = {
    "short, then 8 long": MakespanCase(2, [0.01] * 200 + [3.0] * 8),
    "the same, shuffled": MakespanCase(2, random.Random(3).sample([0.01] * 200 + [3.0] * 8, 208)),
    "short, then 16 long": MakespanCase(2, [0.01] * 300 + [4.0] * 16),
    "many short, 60 long": MakespanCase(3, [0.005] * 3000 + [2.0] * 60),
    "3 000 times true": MakespanCase(2, [0.0] * 3000, "true")}


def list_schedule(took_s: Iterable[float], slots: int) -> float:
    """The makespan of greedy list scheduling: each task goes to the slot that is free first."""
    free_at = [0.0] * slots
    for task_s in took_s:
        heapq.heapreplace(free_at, free_at[0] + task_s)
    return max(free_at)


def bench_makespan(folder: str, server: BenchServer, progress: Progress) -> Dict[str, Any]:
    """How long real workers take for tasks of mixed length, from the first start to the last end."""
    access, lines = os.path.join(folder, "access.json"), os.path.join(folder, "lines")
    write_access(access, {"url": server.url, "token": server.token, "certificate": server.certificate})
    environ = dict(os.environ, TASKFARM_ACCESS=access, XDG_STATE_HOME=folder)
    for name in ("TASKFARM_URL", "TASKFARM_TOKEN", "TASKFARM_USER", "SLURM_JOB_ID", "PBS_JOBID"):
        environ.pop(name, None)
    result: Dict[str, Any] = {"profile": "makespan", "cases": {}}
    for number, (name, case) in enumerate(MAKESPAN.items()):
        progress.what = "makespan: " + name
        progress.show(number, len(MAKESPAN))
        with open(lines, "w") as file:
            file.writelines("%g\n" % task_s for task_s in case.took_s)
        run = server.new_run(len(case.took_s))
        words = [sys.executable, os.path.abspath(__file__), "work", run, "-j", "2", "--quiet", "--lines", lines, "--",
                 case.command, "{line}"]
        workers = [subprocess.Popen(words, env=environ, stdout=subprocess.DEVNULL) for _ in range(case.workers)]
        statuses = [worker.wait() for worker in workers]
        if any(statuses):
            raise Refusal("a worker of the bench failed")
        path = "/api/runs/%s/tasks?status=done&limit=1000" % run
        began = min(parse_time(task["started"]) or math.inf for task in server.ask("GET", path)["data"])
        (last, *_) = server.ask("GET", path + "&order=finished")["data"]
        seconds = (parse_time(last["finished"]) or math.inf) - began
        best_s = list_schedule(case.took_s, 2 * case.workers)
        result["cases"][name] = {
            "workers": case.workers, "tasks": len(case.took_s), "seconds": seconds, "greedy_s": best_s,
            "ratio": seconds / best_s if best_s else None, "tasks_per_s": len(case.took_s) / seconds}
    return result


def makespan_table(result: Dict[str, Any]) -> str:
    """The figures of profile `makespan`."""
    return figures_table(
        "<makespan|workers, -j 2|tasks|seconds|greedy list scheduling|ratio|tasks/s", "%s|%d|%d|%.1f|%.1f|%s|%.0f", [
            (name, case["workers"], case["tasks"], case["seconds"], case["greedy_s"],
             "%.2f" % case["ratio"] if case["ratio"] else "-", case["tasks_per_s"])
            for name, case in result["cases"].items()])


# ---------------------------------------------------------------- FAIR
# How long one client waits beside others that do their worst. A bystander, in a process of its own, asks for one run
# again and again on one connection; meanwhile a case goes on. It reads /proc, so it wants Linux. It must not know how
# the server keeps its promises: cases know the API alone, and what fills the file names operations.
#
# A new case: an entry of FAIR_CASES, and a function where one expression is not enough. A sentence that it returns is
# shown in the last column of the table.

FAIR_ROWS = 4 * 10 ** 6     # touched tasks
ANSWER_PERIODS = 12           # times --seconds an answer is waited for: by default longer than the server waits
BYSTANDER_PAUSE_S = 0.001   # between two requests: the second core is for those who do their worst


class FairSize:
    """How large the farm is: whole with FAIR_ROWS touched tasks, smaller with fewer."""

    def __init__(self, rows: int) -> None:
        self.half_the_rows = max(10, rows // 2)
        self.scale = min(1.0, rows / FAIR_ROWS)

    def __call__(self, number: int) -> int:
        """So many of something, in proportion; two at least."""
        return max(2, int(number * self.scale))


Fill = Callable[[Store, FairSize], None]


def fill_crowded(store: Store, size: FairSize) -> None:
    """20 000 runs, 20 000 leased workers with 100 tasks, 2 000 000 tasks done, and as many held without a lease."""
    leased = ["leased%d" % number for number in range(size(20000))]
    apply_all(store, [
        add_user("ada", hash_password("right")), *(create_run("run%d" % number, 10) for number in range(size(20000))),
        *(register_worker(name, "bench", 0, MAX_LEASE_S) for name in leased), create_run("leased", MAX_TASKS),
        *(claim_many("leased", name, 100) for name in leased),
        *(register_worker("free%d" % number, "bench", 0) for number in range(6)),
        create_run("lease", 1), create_run("hundred", 100), create_run("ten", 10),
        create_run("done", size.half_the_rows), report_many(
            "ten", None, [Report(number, status=DONE) for number in range(10)])])
    add_holder(store, "held", "holder", size.half_the_rows, None)
    for first in range(0, size.half_the_rows, MAX_BATCH):
        apply_all(store, [report_many("done", None, [Report(number, status=DONE) for number in range(
            first, min(size.half_the_rows, first + MAX_BATCH))])])


def fill_leaving(store: Store, size: FairSize) -> None:
    """100 workers with a lease and 10 000 tasks each."""
    for number in range(size(100)):
        add_holder(store, "leaving%d" % number, "leaving%d" % number, size(10000), MAX_LEASE_S)


SILENT_LEASE_S = 30         # longer than their heartbeats wait in a try, or they would lapse again meanwhile


def fill_silent(store: Store, size: FairSize) -> None:
    """200 workers with 10 000 tasks each, whose leases have run out."""
    for number in range(size(200)):
        add_holder(store, "silent%d" % number, "silent%d" % number, size(10000), SILENT_LEASE_S)


def apply_all(store: Store, operations: List[Operation]) -> None:
    """Run many operations. Raises what one of them raises."""
    for outcome in store.call_all(operations):
        if isinstance(outcome, BaseException):
            raise outcome


def add_holder(store: Store, run: str, worker: str, number: int, lease: Optional[int]) -> None:
    """A run of so many tasks that one worker computes."""
    apply_all(store, [create_run(run, number), register_worker(worker, "bench", 0, lease)])
    if lease:
        apply_all(store, [claim_many(run, worker, min(SMALL, number - first)) for first in range(0, number, SMALL)])
    else:       # only one by one may a worker claim more than MAX_BATCH
        for first in range(0, number, MAX_BATCH):
            apply_all(store, [claim(run, worker) for _ in range(first, min(number, first + MAX_BATCH))])


def let_lapse(path: str, size: FairSize) -> None:
    """Let the leases of the silent workers run out, by a clock that is set ahead."""
    ahead_s = 0.0

    def clock() -> Now:
        now = system_clock()
        return now._replace(tick=now.tick + ahead_s)
    with contextlib.closing(Store(path, clock)) as store:
        ahead_s = 2.0 * SILENT_LEASE_S
        for number in range(size(200)):
            while store.call(read_run("silent%d" % number)).counts[COMPUTING]:
                store.turn()


STATUS_LINE = re.compile(rb"HTTP/1\.1 ([0-9]{3})")


class Dialogue:
    """One connection of a case: the messages it has to send, and the answers as they come.

    An answer counts when its status line is there. Its body is read while the next answer is waited for.
    """

    def __init__(self, port: int, messages: Sequence[bytes], receive_buffer: int = 0, source: str = "127.0.0.1"
                 ) -> None:
        self.sock = socket.socket()
        self.sock.bind((source, 0))
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setblocking(False)
        self.messages = messages
        self.position = 0                   # of the message that is sent next
        self.unsent = memoryview(b"")
        self.awaited = 0                    # answers
        self.tail = b""                     # of what was read: a status line may go on in what comes next
        self.statuses: List[int] = []
        self.began = self.ended = time.perf_counter()

    def advance(self, events: int, repeat: bool) -> int:
        """Send and read what is possible. Returns the events to wait for then, 0 at the end."""
        try:
            if events & selectors.EVENT_READ and not self._read():
                return 0
            if not self.unsent and self.awaited <= 0:
                if self.position == len(self.messages) and not repeat:
                    return 0
                message = self.messages[self.position % len(self.messages)]
                self.position = self.position % len(self.messages) + 1
                self.awaited += message.count(b" HTTP/1.1\r\n")
                self.unsent = memoryview(message)
            if self.unsent:
                self.unsent = self.unsent[self.sock.send(self.unsent):]
        except BlockingIOError:
            pass
        except OSError:         # the server has closed it
            return 0
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self.unsent else 0)

    def _read(self) -> int:
        data = self.sock.recv(1 << 20)
        text = self.tail + data
        last = -1
        for match in STATUS_LINE.finditer(text):
            self.statuses.append(int(match[1]))
            self.ended = time.perf_counter()
            self.awaited -= 1
            last = match.start()
        self.tail = text[max(last + 1, len(text) - 12):]    # without the H of the last one, or it would count again
        return len(data)

    def last_answer(self) -> str:
        """Status of the last answer, and after how long it came."""
        if not self.statuses:
            return "no answer in %.0f s" % (time.perf_counter() - self.began)
        return "%d after %.2f s" % (self.statuses[-1], self.ended - self.began)


class FairFarm:
    """The crowded farm as a case sees it."""

    def __init__(self, server: BenchServer, size: FairSize, seconds: float) -> None:
        self.server, self.size, self.seconds = server, size, seconds
        self.limit_s = ANSWER_PERIODS * seconds

    def request(self, method: str, path: str, body: Any = None) -> bytes:
        """The bytes of a request with a login."""
        return bench_request(self.server.token, method, path, body)

    def reports(self, first: int, count: int) -> bytes:
        """A request of the worker holder: so many of its tasks are done, each with figures of its own."""
        return done_many(self.request("PUT", "runs/held/tasks"), "holder", "differing")([
            (b"%d" % task, b"1") for task in range(first, first + count)])

    def send(self, *messages_of_each: Sequence[bytes], repeat: bool = False, sources: Sequence[str] = ("127.0.0.1",)
             ) -> List[Dialogue]:
        """Hold dialogues at once, each on a connection of its own. A message is sent when the last one was answered.

        *repeat*: each begins anew at its end, for `seconds`. Else all end, or are given up after `limit_s`.
        *sources*: the addresses that they come from, in turns.
        """
        end = time.perf_counter() + (self.seconds if repeat else self.limit_s)
        dialogues = [Dialogue(self.server.port, messages, source=source)
                     for messages, source in zip(messages_of_each, itertools.cycle(sources))]
        with selectors.DefaultSelector() as selector:
            for dialogue in dialogues:
                dialogue.began = time.perf_counter()
                wanted = dialogue.advance(0, repeat)
                if wanted:
                    selector.register(dialogue.sock, wanted, dialogue)
            while selector.get_map() and time.perf_counter() < end:
                for key, events in selector.select(0.1):
                    wanted = key.data.advance(events, repeat)
                    if not wanted:
                        selector.unregister(key.fileobj)
                        key.data.sock.close()
                    elif wanted != key.events:
                        selector.modify(key.fileobj, wanted, key.data)
        for dialogue in dialogues:
            dialogue.sock.close()
        return dialogues

    def send_each(self, requests: Iterable[bytes]) -> str:
        """Send each request at once on its own connection: how many succeed, and after how long the last one."""
        dialogues = self.send(*([request] for request in requests))
        good = sum(dialogue.statuses[:1] in ([200], [204]) for dialogue in dialogues)
        return "%d of %d done, the last after %.1f s" % (
            good, len(dialogues), max(dialogue.ended - dialogue.began for dialogue in dialogues))

    def connect(self, number: int, content: bytes, receive_buffer: int = 0) -> List[socket.socket]:
        """So many connections that have sent something, and read nothing."""
        socks = [Dialogue(self.server.port, [], receive_buffer).sock for _ in range(number)]
        for sock in socks:
            sock.settimeout(1.0)
            with contextlib.suppress(OSError):      # the server reads no more of it, or has closed it
                sock.sendall(content)
        return socks

    def cpu_s(self) -> float:
        """What the server has used, also where it does not answer."""
        with open("/proc/%d/stat" % self.server.pid) as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> float:
        """What the server has in memory now."""
        with open("/proc/%d/statm" % self.server.pid) as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE / 1e6


def burst(method: str, path: str) -> bytes:
    """95 kB of one request without a login, again and again."""
    request = b"%s %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % (method.encode(), path.encode())
    return request * (95000 // len(request))


JUNK = b'{"data":[' + b"{}," * ((BATCH_BODY_LIMIT - 20) // 3) + b"{}]}"


def claims_in_vain(farm: FairFarm, claimers: int) -> List[Dialogue]:
    """Claims, again and again, where many tasks compute without a lease and none waits."""
    return farm.send(*([farm.request("POST", "runs/held/task", {"worker_uuid": "free%d" % number})]
                       for number in range(claimers)), repeat=True)


def claim_in_vain(farm: FairFarm) -> str:
    """Claims in vain, one after the other."""
    (dialogue,) = claims_in_vain(farm, 1)
    return "%.0f ms a claim" % (1000 * farm.seconds / max(1, len(dialogue.statuses)))


def kept_lease(farm: FairFarm) -> str:
    """Whether claims in vain keep the lease of a silent worker from ending."""
    farm.send([farm.request("POST", "worker", {"uuid": "silent", "hostname": "bench", "pid": 0, "lease": 3}),
               farm.request("POST", "runs/lease/task", {"worker_uuid": "silent"})])
    began = time.perf_counter()
    longer = FairFarm(farm.server, farm.size, 4 * farm.seconds)
    _, claimers = fork_call(lambda: len(claims_in_vain(longer, 6)))
    ended_s = None
    while ended_s is None and time.perf_counter() < began + longer.seconds:
        time.sleep(0.05)
        if not farm.server.ask("GET", "/api/runs/lease")["numComputing"]:
            ended_s = time.perf_counter() - began
    claimers()
    return "it ended after %.1f s" % ended_s if ended_s else "it had not ended after %.0f s" % longer.seconds


def large_sign_off(farm: FairFarm) -> str:
    """The sign-off of a worker with many tasks."""
    (dialogue,) = farm.send([farm.request("DELETE", "worker/holder")])
    time.sleep(farm.seconds)
    return dialogue.last_answer()


def deleted_runs(farm: FairFarm) -> str:
    """A small run and its pages, after the deletion of large ones."""
    farm.send([farm.request("DELETE", "runs/done"), farm.request("DELETE", "runs/held"),
               farm.request("POST", "runs/ten/restart?all=True")])
    dialogues = farm.send([farm.request("POST", "runs/ten/task", {"worker_uuid": "free0"})],
                          [farm.request("GET", "runs/ten/tasks?limit=1000")],
                          [farm.request("GET", "runs/run1/tasks?limit=1000")])
    return "claim %s, its page %s, another's large page %s" % tuple(dialogue.last_answer() for dialogue in dialogues)


def slow_readers(farm: FairFarm) -> str:
    """A large answer, beside clients that read none."""
    slow = farm.connect(10, farm.request("GET", "runs"), receive_buffer=4096)
    time.sleep(farm.seconds)
    (dialogue,) = farm.send([farm.request("GET", "runs")])
    for sock in slow:
        sock.close()
    return "GET /api/runs " + dialogue.last_answer()


def half_head(length: int) -> bytes:
    """The beginning of a head, in fewer lines than are too many."""
    line = b"X: " + b"x" * 345 + b"\r\n"
    return (b"GET /livez HTTP/1.1\r\n" + line * (length // len(line) + 1))[:length]


def heads_by_byte(farm: FairFarm) -> str:
    """Heads that go on byte by byte."""
    socks = farm.connect(10, half_head(28000))
    time.sleep(0.2)
    cpu_s, began, sent = farm.cpu_s(), time.perf_counter(), 0
    while time.perf_counter() < began + farm.seconds:
        due = int(6500 * (time.perf_counter() - began))
        while sent < due:
            with contextlib.suppress(OSError):      # its 32 kB are full
                socks[sent % len(socks)].send(b"x")
            sent += 1
        time.sleep(0.001)
    share = (farm.cpu_s() - cpu_s) / (time.perf_counter() - began)
    for sock in socks:
        sock.close()
    return "the server uses %.0f %% of a core" % (100 * share)


def half_heads(farm: FairFarm) -> str:
    """A batch, beside half heads that fill the buffers."""
    number = farm.size(2300)

    def connect_more() -> int:
        time.sleep(farm.seconds / 3)
        socks = farm.connect(number, half_head(30000))
        time.sleep(farm.limit_s)
        return len(socks)
    socks = farm.connect(number, half_head(30000))
    _, others = fork_call(connect_more)
    (dialogue,) = farm.send([farm.reports(0, farm.size(10000))])
    others()
    for sock in socks:
        sock.close()
    return "the batch: " + dialogue.last_answer()


def password_request(name: str, password: str) -> bytes:
    """A request with name and password."""
    return b"GET /api/runs/run0 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Basic %s\r\n\r\n" % base64.b64encode(
        ("%s:%s" % (name, password)).encode())


def wrong_logins(farm: FairFarm) -> str:
    """A right password after many wrong ones."""
    cpu_s = farm.cpu_s()
    for number in range(farm.size(400)):
        for sock in farm.connect(1, password_request("ada", "wrong%d" % number)):
            sock.close()
    (dialogue,) = farm.send([password_request("ada", "right")], sources=["127.0.0.2"])
    return "the right one: %s, %.1f s of CPU" % (dialogue.last_answer(), farm.cpu_s() - cpu_s)


def guessers(farm: FairFarm) -> str:
    """A right password from another address, after wrong ones from many."""
    cpu_s, began, addresses = farm.cpu_s(), time.perf_counter(), farm.size(100)
    dialogues = farm.send(*([password_request("ada", "wrong%d.%d" % (address, number)) for number in range(100)]
                            for address in range(addresses)), sources=["127.0.1.%d" % (address + 1)
                                                                       for address in range(addresses)])
    seconds, cpu_s = time.perf_counter() - began, farm.cpu_s() - cpu_s
    (dialogue,) = farm.send([password_request("ada", "right")], sources=["127.0.0.2"])
    statuses = Counter(status for each in dialogues for status in each.statuses)
    return "%s in %.1f s, %.1f s of CPU: %.0f %% of a core in a minute; the right one: %s" % (
        ", ".join("%d with %d" % (number, status) for status, number in sorted(statuses.items())), seconds, cpu_s,
        cpu_s / 0.6, dialogue.last_answer())


def memory_growth(farm: FairFarm, requests: Sequence[bytes]) -> str:
    """What comes of requests on four connections, and how much the server's memory grows by them."""
    before = farm.memory_mb()
    dialogues = farm.send(*(requests[first::4] for first in range(4)))
    return "%s, memory grows by %.0f MB" % (dialogues[0].last_answer(), farm.memory_mb() - before)


class FairCase(NamedTuple):
    """Something that clients may do."""
    name: str
    sentence: str
    load: Callable[[FairFarm], object]      # does it; a sentence that it returns is shown
    fill: Fill = fill_crowded               # fills the file: fill_crowded, or what is added to that
    unread_log: bool = False                # with an access log that nobody reads


FAIR_CASES = {case.name: case for case in (
    FairCase("nobody", "nobody but the bystander: what this machine does by itself",
             lambda farm: time.sleep(farm.seconds)),
    FairCase("pipelined", "10 connections, each one burst of 95 kB of GET /livez",
             lambda farm: farm.send(*[[burst("GET", "/livez")]] * 10)),
    FairCase("pipelined_heads", "10 connections, each one burst of 95 kB of HEAD /",
             lambda farm: farm.send(*[[burst("HEAD", "/")]] * 10)),
    FairCase("pipelined_on", "32 connections, burst after burst of 95 kB of HEAD /",
             lambda farm: farm.send(*[[burst("HEAD", "/")]] * 32, repeat=True)),
    FairCase("beats", "200 heartbeats at once after an outage, each taking back 10 000 lapsed tasks",
             lambda farm: farm.send_each(
                 farm.request("PUT", "worker/silent%d" % number) for number in range(farm.size(200))),
             fill=fill_silent),
    FairCase("sign_offs", "100 workers with 10 000 tasks each sign off at once",
             lambda farm: farm.send_each(
                 farm.request("DELETE", "worker/leaving%d" % number) for number in range(farm.size(100))),
             fill=fill_leaving),
    FairCase("differing_reports", "400 reports at once of 500 tasks each, all with figures of their own",
             lambda farm: farm.send_each(
                 farm.reports(number * farm.size(500), farm.size(500)) for number in range(farm.size(400)))),
    FairCase("claim_in_vain", "claims in vain, one after the other, where 2 000 000 tasks compute without a lease; "
             "20 000 leased workers", claim_in_vain),
    FairCase("kept_lease", "six claimers in vain, beside a worker that falls silent with a lease of 3 s: when its "
             "task waits again", kept_lease),
    FairCase("partial_restart", "partial restarts of an untouched run of 100 tasks, one after the other; 20 000 "
             "leased workers",
             lambda farm: farm.send([farm.request("POST", "runs/hundred/restart")], repeat=True)),
    FairCase("large_holder", "about a worker that holds 2 000 000 tasks without a lease: a heartbeat, a claim, one "
             "task, a page of workers",
             lambda farm: farm.send([
                 farm.request("PUT", "worker/holder"),
                 farm.request("POST", "runs/held/tasks", {"worker_uuid": "holder", "count": 10}),
                 farm.request("GET", "worker/holder?limit=1"),
                 farm.request("GET", "workers?limit=1000")], repeat=True)),
    FairCase("large_sign_off", "a worker that holds 2 000 000 tasks without a lease signs off", large_sign_off),
    FairCase("all_runs", "GET /api/runs with 20 000 runs, again and again",
             lambda farm: farm.send([farm.request("GET", "runs")], repeat=True)),
    FairCase("junk", "4 MiB of JSON that is no batch, from somebody logged in",
             lambda farm: farm.send([farm.request("PUT", "runs/done/tasks", JUNK)])),
    FairCase("junk_at_once", "the same on eight connections at once",
             lambda farm: farm.send(*[[farm.request("PUT", "runs/done/tasks", JUNK)]] * 8)),
    FairCase("deleted_runs", "two runs of 2 000 000 tasks deleted, a run of 10 restarted: its next claim, a page of "
             "it, another's large page", deleted_runs),
    FairCase("slow_readers", "ten clients ask for all runs, 6 MB, and read nothing; then another one asks for them",
             slow_readers),
    FairCase("heads_by_byte", "ten long heads that go on byte by byte, 6.5 kB/s in all, without a login",
             heads_by_byte),
    FairCase("half_heads", "2 300 half heads without a login fill the buffers; a batch of somebody logged in comes; "
             "then as many again", half_heads),
    FairCase("unread_log", "an access log on the standard output that nobody reads, and 2 000 requests",
             lambda farm: farm.send([b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"] * 2000), unread_log=True),
    FairCase("wrong_logins", "400 wrong passwords on connections that are closed at once, then a right one",
             wrong_logins),
    FairCase("guessers", "10 000 wrong passwords from 100 addresses, as fast as they are answered; then a right one "
             "from another address", guessers),
    FairCase("long_passwords", "20 passwords of 12 kB of combining characters",
             lambda farm: farm.send(
                 [password_request("ada", "%d" % number + "\u0300\u0316" * 2990) for number in range(20)])),
    FairCase("long_paths", "4 200 requests for /api/runs/<16 kB and an emoji>/x without a login: what the server "
             "keeps of it",
             lambda farm: memory_growth(farm, [
                 b"GET /api/runs/%s%d%%F0%%9F%%98%%80/x HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"x" * 16000, number)
                 for number in range(farm.size(4200))])),
    FairCase("token_passwords", "20 000 requests with one token, each with another password of 12 kB beside it: what "
             "the server keeps of it",
             lambda farm: memory_growth(farm, [
                 password_request(farm.server.token, "x" * 11900 + str(number))
                 for number in range(farm.size(20000))])),
)}


def run_bystander(farm: FairFarm, stop: int, held_by_parent: int) -> Tuple["array.array[float]", bool]:
    """Ask for one run until the pipe *stop* ends: the seconds of each answer, and whether the last one came."""
    os.close(held_by_parent)        # its other end: ours would keep it from ending
    times_s = array.array("d")
    request = farm.request("GET", "runs/run0")
    with socket.create_connection(("127.0.0.1", farm.server.port), timeout=farm.limit_s) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while not select.select([stop], [], [], BYSTANDER_PAUSE_S)[0]:
            began = time.perf_counter()
            sock.sendall(request)
            try:
                data = sock.recv(65536)
            except socket.timeout:
                data = b""
            times_s.append(time.perf_counter() - began)
            if not data.startswith(b"HTTP/1.1 200 "):
                return times_s, False
    return times_s, True


def try_case(case: FairCase, db: str, token: str, size: FairSize, seconds: float) -> Dict[str, Any]:
    """One try of a case on a file, which is not used again after it."""
    unread, log_end = os.pipe()
    with open(unread), open(log_end, "w") as access_log:
        server = BenchServer(db, token, access_log if case.unread_log else None)
        try:
            farm = FairFarm(server, size, seconds)
            stop, held = os.pipe()
            _, result = fork_call(run_bystander, farm, stop, held)
            os.close(stop)
            time.sleep(min(0.2, seconds))       # some answers before the case begins
            outcome = case.load(farm)
            os.close(held)
            times_s, last_came = result()
        finally:
            server.kill()
    median, _, _, worst = quantiles_ms(times_s)
    note = outcome if isinstance(outcome, str) else ""
    return {"worst_ms": worst, "median_ms": median, "answers": len(times_s),
            "note": note if last_came else "the bystander got no answer any more. " + note}


def bench_fair(folder: str, cases: Sequence[FairCase], rows: int, seconds: float, tries: int,
               progress: Progress) -> Dict[str, Any]:
    """Each case so many times, on copies of a crowded farm. Of the bystander's worst answers the median counts."""
    size = FairSize(rows)
    result: Dict[str, Any] = {"profile": "fair", "rows": rows, "cases": {}}

    @functools.lru_cache(maxsize=None)
    def filled(fill: Fill) -> Tuple[str, str]:
        """The file that a case begins with, and a token for it."""
        path = os.path.join(folder, fill.__name__ + ".sqlite")
        if fill is not fill_crowded:
            shutil.copy(filled(fill_crowded)[0], path)
        progress.what = "fair: filling"
        progress.show(0, 1)
        with contextlib.closing(Store(path)) as store:
            token = bench_token(store)
            fill(store, size)
        if fill is fill_silent:
            let_lapse(path, size)
        return path, token

    for number, case in enumerate(cases):
        tried = []
        for attempt in range(tries):
            source, token = filled(case.fill)
            progress.what = "fair: " + case.name
            progress.show(number * tries + attempt, len(cases) * tries)
            db = os.path.join(folder, "fair.sqlite")
            for name in glob.glob(glob.escape(db) + "*"):
                os.remove(name)
            shutil.copy(source, db)
            with open(db, "rb+") as copied:     # or the first commit of the server would wait for all of it
                os.fsync(copied.fileno())
            tried.append(try_case(case, db, token, size, seconds))
        middle = {figure: sorted(one[figure] for one in tried)[tries // 2]
                  for figure in ("worst_ms", "median_ms", "answers")}
        note = next(one["note"] for one in tried if one["worst_ms"] == middle["worst_ms"])
        result["cases"][case.name] = {"sentence": case.sentence, "tries": tried, **middle, "note": note}
    return result


def fair_table(result: Dict[str, Any]) -> str:
    """The figures of profile `fair`."""
    return figures_table("<fair, one bystander|worst ms|median ms|answers|<what came of the others",
                         "%s|%.0f|%.2f|%d|%s", [
                             (name, case["worst_ms"], case["median_ms"], case["answers"], case["note"])
                             for name, case in result["cases"].items()])


# ---------------------------------------------------------------- DOCTOR
# Whether this node is fit to serve and to work. What is needed is tried, not guessed, and all ends within seconds, also
# where something hangs. It uses the sections above as a server and a worker do, and changes nothing.
#
# A new check: a function that yields a Finding for each thing it looks at, and its line in `cmd_doctor` in UPKEEP. What
# it says where a thing is not well is what to do, with the command or option to type.

OK, WARN, FAIL = "ok", "warn", "FAIL"
DOCTOR_S = 4.0                      # a check that takes longer hangs
DOCTOR_CONNECT_S = 1.0              # a host that takes longer to answer is of no use to workers
SLOW_WRITE_S, SLOW_ANSWER_S = 0.05, 0.1
OLDEST_SQLITE = (3, 26, 0)
FEW_DESCRIPTORS, FEW_PROCESSES = 4096, 32
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "afs", "pvfs2", "panfs",
                        "fuse.glusterfs", "fuse.sshfs")


class Finding(NamedTuple):
    """What a check found about one thing."""
    verdict: str            # OK, WARN or FAIL
    what: str               # the thing, in a word or two
    says: str               # what was found, and what to do where it is not well


Check = Callable[[], Iterator[Finding]]


def run_checks(checks: Sequence[Tuple[str, Check]], limit_s: float = DOCTOR_S) -> Iterator[Finding]:
    """The findings of some checks, in their order. The checks run at the same time, in threads that may hang."""
    deadline = time.monotonic() + limit_s
    started: List[Tuple[str, "queue.SimpleQueue[Optional[Finding]]"]] = []
    for what, find in checks:
        findings: "queue.SimpleQueue[Optional[Finding]]" = queue.SimpleQueue()
        thread = threading.Thread(target=run_check, args=(what, find, findings.put), daemon=True)
        try:
            thread.start()
        except RuntimeError:
            findings.put(Finding(
                FAIL, what, "the system gives this user no more threads (ulimit -u): end some processes"))
            findings.put(None)
        started.append((what, findings))
    for what, findings in started:
        try:
            finding = next_from(findings, deadline - time.monotonic())
            while finding:
                yield finding
                finding = next_from(findings, deadline - time.monotonic())
        except queue.Empty:
            yield Finding(FAIL, what, "no answer within %s: what it asks hangs" % duration_text(limit_s))


def run_check(what: str, find: Check, report: Callable[[Optional[Finding]], None]) -> None:
    """Report what a check finds, then None. An error that it did not expect is a finding too."""
    try:
        for finding in find():
            report(finding)
    except Exception as error:
        report(Finding(FAIL, what, "%s: %s" % (type(error).__name__, error)))
    report(None)


def check_programs() -> Iterator[Finding]:
    """The versions of Python and SQLite."""
    yield Finding(OK, "Python", "%d.%d.%d (%s)" % (*sys.version_info[:3], sys.executable))
    version = ".".join(map(str, SQLITE_VERSION))
    if SQLITE_VERSION < OLDEST_SQLITE:
        yield Finding(FAIL, "SQLite", "%s is older than 3.26, the oldest that will do: use another Python ('module "
                      "avail python')" % version)
    else:
        yield Finding(OK, "SQLite", version)


def mount_of(folder: str, mountinfo: str) -> Tuple[str, str]:
    """Mount point and type of the file system of a folder, by /proc/self/mountinfo (proc(5)). "" when not known."""
    innermost = ("", "")
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), before.split(" ")[4])
        inside = folder == point or folder.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(innermost[0]):      # of two on one point the later one is seen
            innermost = (point, after.split(" ")[0])
    return innermost


def file_system_of(folder: str) -> str:
    """The type of the file system of a folder, in words."""
    kind = ""
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        kind = mount_of(os.path.realpath(folder), file.read())[1]
    return (kind or "of unknown kind") + ", over the network" * (kind in NETWORK_FILE_SYSTEMS)


def check_home() -> Iterator[Finding]:
    """Whether a server could write the access file, and workers the reports that they could not send."""
    for folder in (os.path.dirname(access_path(os.environ)) or ".", state_folder(os.environ)):
        while not os.path.exists(folder):       # the folder that exists, in which the others would be made
            folder = os.path.dirname(folder) or "."
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
            yield Finding(WARN, "home", "%s cannot be written: set HOME, or XDG_CONFIG_HOME and XDG_STATE_HOME, to "
                          "folders that can" % folder)
            return
    home = home_folder()
    if home == ".":
        yield Finding(WARN, "home", "this user has no home directory, so verbs and workers find server and login in "
                      "this folder alone: set HOME")
        return
    yield Finding(OK, "home", "%s (%s): nodes that share it find server and login there" % (home, file_system_of(home)))


def check_folder(db: Optional[str]) -> Iterator[Finding]:
    """The file system of the farm's file, or of this folder. Locks and SQLite are tried on a file beside it."""
    folder = os.path.dirname(os.path.realpath(db)) if db else os.getcwd()
    kind = file_system_of(folder)
    if kind in ("tmpfs", "ramfs"):
        yield Finding(WARN, "folder", "%s is in memory (%s): a farm there is gone when the node starts again: "
                      "--db names a file on a disk" % (folder, kind))
    else:
        yield Finding(OK, "folder", "%s (%s)" % (folder, kind))
    try:
        with tempfile.TemporaryDirectory(prefix=".taskfarm-doctor-", dir=folder) as trial:
            yield from try_locks(os.path.join(trial, "trial"), kind)
            yield from try_writing(os.path.join(trial, "trial"))
    except OSError as error:
        yield Finding(FAIL, "file system", "nothing can be written in %s (%s): --db names a file elsewhere" % (
            folder, error.strerror))
    if db and read_holder(db):
        yield Finding(OK, "farm", "%s: %s" % (db, described(read_holder(db))))


def try_locks(path: str, kind: str) -> Iterator[Finding]:
    """Whether a file that is locked cannot be locked again."""
    try:
        with contextlib.closing(Lock(path)):
            try:
                Lock(path).close()
                yield Finding(FAIL, "locks", "they do not work on this file system (%s), so two servers could ruin a "
                              "file: put it on another (on Lustre, one mounted with -o flock)" % kind)
            except Refusal:
                yield Finding(OK, "locks", "they work (flock)")
    except Refusal as error:
        yield Finding(FAIL, "locks", str(error))


def try_writing(path: str) -> Iterator[Finding]:
    """Whether SQLite works as the server uses it, and how long a write takes until it is on the disk."""
    try:
        with contextlib.closing(Store(path)) as store:
            took_s = []
            for _ in range(5):
                began = time.perf_counter()
                store.call(create_run(uuid.uuid4().hex, 1))
                took_s.append(time.perf_counter() - began)
    except (Refusal, FarmError) as error:
        yield Finding(FAIL, "SQLite file", str(error))
        return
    median_s = sorted(took_s)[2]
    says = "a write is on the disk after %.1f ms" % (1000 * median_s)
    if median_s > SLOW_WRITE_S:
        yield Finding(WARN, "SQLite file", says + ", and each claim waits for one: a local disk is faster")
    else:
        yield Finding(OK, "SQLite file", says)


def check_port(host: str, port: int) -> Iterator[Finding]:
    """Whether a server could listen there."""
    what = "port %d" % port
    try:
        with contextlib.closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
        yield Finding(OK, what, "free on %s" % host if port else "the system picks one that is free")
    except OSError as error:
        url = url_of(reachable_as(host, "")[1], port)
        if farm_answers(parse_access(dict(read_access(access_path(os.environ)), url=url), "")):
            yield Finding(OK, what, "in use by your own farm")
            return
        owner = port_owner(port) if error.errno == errno.EADDRINUSE else None
        yield Finding(WARN, what, "%s%s" % ("user %s has it. " % owner if owner else "",
                                            address_refused(host, port, error)))


def port_owner(port: int) -> Optional[str]:
    """The user whose program listens on a port of this machine, by /proc/net/tcp (proc(5)). None when not known."""
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError, ValueError, IndexError), open(name, encoding="ascii") as file:
            for line in file.read().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:     # 0A: it listens
                    return user_name(int(fields[7]))
    return None


def check_limits() -> Iterator[Finding]:
    """The limits of this user: descriptors, processes and threads, CPU time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FEW_DESCRIPTORS:
        yield Finding(WARN, "descriptors", "%d at most (ulimit -Hn): a server that has nearly so many connections "
                      "closes the longest idle" % hard)
    else:
        yield Finding(OK, "descriptors", "%s now; a server may raise it to %s" % (limit_text(soft), limit_text(hard)))
    limit, used = process_limit()
    if limit is not None and limit - used < FEW_PROCESSES:
        yield Finding(WARN, "processes", "%d of %d are in use (ulimit -u): a server needs 6 threads, a worker 3 and "
                      "one for each command" % (used, limit))
    else:
        yield Finding(OK, "processes", "%d in use, %s allowed" % (used, "any number" if limit is None else limit))
    cpu_s = resource.getrlimit(resource.RLIMIT_CPU)[0]
    if cpu_s != resource.RLIM_INFINITY:
        yield Finding(WARN, "CPU time", "a program is ended here after %s of it (ulimit -t), and a server uses that up "
                      "in some %s requests" % (duration_text(cpu_s), grouped(int(cpu_s / 0.0001))))


def limit_text(limit: int) -> str:
    """A limit of the system in words."""
    return "any number" if limit == resource.RLIM_INFINITY else str(limit)


def process_limit() -> Tuple[Optional[int], int]:
    """How many processes and threads this user may have (None for any number), and how many there are."""
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    limits = [(soft, own_threads())] if soft != resource.RLIM_INFINITY else []
    with contextlib.suppress(OSError, ValueError):      # a control group's own limit, as login nodes have
        with open("/proc/self/cgroup", encoding="ascii") as file:
            group = file.read().rpartition(":")[2].strip()
        for end in range(len(group.split("/")), 0, -1):
            folder = os.path.join("/sys/fs/cgroup", *group.split("/")[1:end])
            with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, "pids.max")) as most, \
                    open(os.path.join(folder, "pids.current")) as now:
                limits.append((int(most.read()), int(now.read())))      # "max" is no number
    if not limits:
        return None, own_threads()
    return min(limits, key=lambda pair: pair[0] - pair[1])


def own_threads() -> int:
    """How many threads this user has on this machine."""
    threads = 0
    for folder in glob.glob("/proc/[0-9]*"):
        with contextlib.suppress(OSError):
            if os.stat(folder).st_uid == os.getuid():
                threads += len(os.listdir(folder + "/task"))
    return threads


def check_job() -> Iterator[Finding]:
    """Whether a worker knows when the batch job ends, and whether workers left reports that they could not send."""
    now = time.time()
    sentences: List[str] = []
    job = BatchJob(os.environ, sentences.append)
    job.wait(ANSWER_S + 1.0)
    if job.system:
        end = job.end_s
        if end is None:
            yield Finding(WARN, "job", sentences[0])
        elif end == math.inf:
            yield Finding(OK, "job", "has no time limit")
        elif end < now:
            yield Finding(WARN, "job", "it should have ended %s ago, so that workers take no task: look at "
                          "SLURM_JOB_END_TIME, or tell 'work' by --until" % duration_text(now - end))
        else:
            yield Finding(OK, "job", "ends in %s, and workers leave in time" % duration_text(end - now))
    files = glob.glob(os.path.join(glob.escape(state_folder(os.environ)), "unsent-*.json"))
    if files:
        yield Finding(WARN, "leftovers", "%s in %s with reports that workers could not send: the next worker or verb "
                      "that reaches the farm sends them" % (count_text(len(files), "file"), state_folder(os.environ)))


def check_server(url: str) -> Iterator[Finding]:
    """Whether this node reaches the server that verbs and workers use, and whether the login works.

    *url*: of the server, "" for the one in the access file.
    """
    try:
        access = find_access(os.environ, url)
    except Refusal as error:
        yield Finding(WARN, "login" if url else "server", str(error))
        if not url:
            return
        access = Access(base_url(url), "", "", "", "system", "", "the arguments")
    with contextlib.closing(Client(lambda: access, timeout_s=DOCTOR_CONNECT_S)) as client:
        try:
            client.connect()
        except (Unreachable, Refusal, FarmError) as error:
            yield Finding(FAIL, "server", str(error))
            return
        yield from check_path(client, access)
        if access.user or access.token:
            yield from check_login(client, access)


def check_path(client: Client, access: Access) -> Iterator[Finding]:
    """Where the server answers and how fast, and whether its clock agrees with ours."""
    took_s = []
    try:
        for _ in range(7):
            began = time.perf_counter()
            client.ask("GET", "/livez")
            took_s.append(time.perf_counter() - began)
    except (Unreachable, FarmError) as error:
        yield Finding(FAIL, "server", str(error))
        return
    median_s = sorted(took_s)[3]
    peer = client.peer
    alone = " (for this machine alone; --host 0.0.0.0 is for other nodes)" if peer.startswith("127.") else ""
    known = "its certificate is your farm's" if access.pinned else "this system's authorities vouch for its certificate"
    yield Finding(OK, "server", "%s answers at %s%s; %s" % (access.url, peer, alone, known))
    says = "after %.1f ms (median of 7)" % (1000 * median_s)
    if median_s > SLOW_ANSWER_S:
        yield Finding(WARN, "answers", says + ": claim in batches or make longer tasks")
    else:
        yield Finding(OK, "answers", says)
    if abs(client.clock_ahead_s) > 5:
        yield Finding(WARN, "clock", "the server's is %s %s this node's: times in logs do not agree" % (
            duration_text(abs(client.clock_ahead_s)), "ahead of" if client.clock_ahead_s > 0 else "behind"))


def check_login(client: Client, access: Access) -> Iterator[Finding]:
    """Whether the login works, and whether the server takes work."""
    name = access.user or "the token"
    try:
        client.ask("GET", "/api/token")
        yield Finding(OK, "login", "%s, by %s" % (name, access.source))
    except (FarmError, Unreachable, Refusal) as error:
        yield Finding(FAIL, "login", "%s, by %s, does not work: %s" % (name, access.source, error))
    try:
        client.ask("GET", "/readyz")
        yield Finding(OK, "ready", "the server takes work")
    except (FarmError, Unreachable, Refusal) as error:
        yield Finding(FAIL, "ready", str(error))


# ---------------------------------------------------------------- STATUS
# How far a run is, asked for once or until it is over, for persons and for programs. It asks the server by a Client,
# and must not know how the server finds the answers.
#
# A new figure of status: a field of RunStatus, which `RunMonitor.update` fills, a line in `status_lines` and a key in
# `status_json`. What it costs the server decides whether `update` asks for it each time or `_ask_details` does.

SHOWN_TASKS = 5                     # longest computing tasks, and last failures
ROWS_AT_ONCE = 1000                 # entries of a page that is asked for
DETAILS_S = 10.0                    # between two requests for details, which cost the server some milliseconds
LATEST_WORKERS = "/api/workers?all=True&order=latest&limit=%d"
WATCH_S = 2.0                       # between two updates of --watch
WATCH_LINE_S = 30.0                 # between two lines of --watch where it cannot redraw


def run_path(run_uuid: str, tail: str = "") -> str:
    """The path of a run."""
    return "/api/runs/%s%s" % (run_uuid, tail)


def every_page(client: Client, path: str, **query: Any) -> Iterator[List[Dict[str, Any]]]:
    """The rows of a paged list, page by page."""
    while True:
        answer = client.ask("GET", path + "?" + urllib.parse.urlencode(query))
        yield answer["data"]
        if not answer.get("next"):
            return
        query["after"] = answer["next"]


def known_parameters(client: Client, run: Mapping[str, Any]) -> Optional[Parameters]:
    """The parameters that a run knows; None where it knows none, or their file cannot be read here or has changed."""
    if run.get("hasWork"):
        with contextlib.suppress(Refusal, NotFound, OSError):
            return parameters_again(client.ask("GET", run_path(run["uuid"], "/work"))["parameters"])
    return None


def add_parameters(tasks: Sequence[Dict[str, Any]], parameters: Optional[Parameters]) -> None:
    """Give tasks their parameters as text, under "parameters"; None where these are not known."""
    for task in tasks:
        task["parameters"] = None
        with contextlib.suppress(Refusal, OSError, LookupError):    # the file was changed meanwhile
            task["parameters"] = parameters and parameters.text(task["task"])


def is_over(run: Mapping[str, Any]) -> bool:
    """Whether nothing of a run waits and nothing computes, or it was cancelled."""
    return run["state"] == "cancelled" or not run["numWaiting"] + run["numComputing"]


class RunStatus(NamedTuple):
    """How far a run is, at one moment."""
    run: Dict[str, Any]
    workers: List[Dict[str, Any]]       # those alive, in the whole farm
    longest: List[Dict[str, Any]]       # tasks, the one that computes longest first
    failures: List[Dict[str, Any]]      # tasks, the one that failed last first
    rate: Optional[Rate]
    least_s: Optional[float]            # until the run is over
    most_s: Optional[float]
    why: str                            # least_s and most_s are not known
    memory: List[int]                   # bytes that the tasks which ended last had at their peak, ascending
    cpu_shares: List[float]             # how many processors they kept busy, ascending
    held_up: Optional[HoldUp]           # why no task is handed out; None when some may be
    utc: float                          # seconds since 1970, by the server's clock
    jobs: Optional[RunJobs]             # those that this user has submitted

    @property
    def over(self) -> bool:
        """Whether no task is left to be done, or none will be handed out by itself."""
        return is_over(self.run) or self.held_up is not None and self.held_up.for_good

    @property
    def hosts(self) -> int:
        """How many hosts the workers run on."""
        return len({worker["hostname"] for worker in self.workers})

    @property
    def held(self) -> int:
        """How many tasks the workers hold, of all runs."""
        return sum(worker["held"] for worker in self.workers)

    def lines(self, screen: Screen) -> List[str]:
        """For a person."""
        return status_lines(self, screen)

    def line(self) -> str:
        """For a log."""
        return status_line(self)

    def json(self) -> Dict[str, Any]:
        """For programs."""
        return status_json(self)


class RunMonitor:
    """Asks for the status of a run again and again. The longer it does so, the better it knows the rate.

    What costs the server more than a few rows is asked for only every DETAILS_S seconds.
    """
    def __init__(self, client: Client, run_uuid: str) -> None:
        self.client, self.run_uuid = client, run_uuid
        self.readings = Readings()
        self.details_tick = -math.inf
        self.workers: List[Dict[str, Any]] = []                 # as of details_tick
        self.ends = RecentEnds([], [])                          # as of details_tick
        self.used: Tuple[List[int], List[float]] = ([], [])     # as of details_tick
        self.parameters = functools.lru_cache(maxsize=1)(lambda: known_parameters(client, self.run))
        self.run: Dict[str, Any] = {}                           # its latest figures
        self.jobs: Optional[RunJobs] = None                     # as of details_tick

    def update(self) -> RunStatus:
        """Ask the server. Raises FarmError and Unreachable."""
        self.run = run = self.client.ask("GET", run_path(self.run_uuid))
        tick, utc = time.monotonic(), time.time() + self.client.clock_ahead_s
        if tick - self.details_tick >= DETAILS_S:
            self._ask_details(run, utc)
            self.details_tick = tick
        longest, _ = self._tasks("computing", "started", SHOWN_TASKS)
        failures, _ = self._tasks("failed", "finished", SHOWN_TASKS) if run["numFailed"] else ([], True)
        if longest or failures:
            add_parameters(longest + failures, self.parameters())
        self.readings.add(tick, run, rate_window_s(self.ends.took_s))
        rate, watched = present_rate(self.ends.readings), present_rate(list(self.readings.latest))
        if watched and (rate is None or watched.window_s > rate.window_s):
            rate = watched
        started = parse_time(longest[0]["started"]) if longest else None
        least_s, most_s, why = estimate_time_left(run, rate, self.ends, None if started is None else utc - started)
        held_up = ask_hold_up(self.client, run) if run["numWaiting"] else None
        if held_up:
            least_s, most_s, why = None, None, held_up.why
        return RunStatus(run, self.workers, longest, failures, rate, least_s, most_s, why, *self.used, held_up, utc,
                         self.jobs)

    def _ask_details(self, run: Mapping[str, Any], utc: float) -> None:
        with contextlib.suppress(OSError):      # a full disk
            self.jobs = jobs_of_run(os.environ, self.run_uuid, time.time(),
                                    lambda: list(self.client.ask("GET", LATEST_WORKERS % ROWS_AT_ONCE)["data"]))
        self.workers = [worker for rows in every_page(self.client, "/api/workers", limit=ROWS_AT_ONCE)
                        for worker in rows]
        lists = [self._tasks(status, "finished", ROWS_AT_ONCE) for status in ("done", "failed")]
        # A list that is not complete begins at some time. Before it only tasks of the other list would count.
        since = max([parse_time(tasks[-1]["finished"]) or 0.0 for tasks, complete in lists if tasks and not complete],
                    default=0.0)
        ended = [task for tasks, _ in lists for task in tasks if (parse_time(task["finished"]) or 0.0) >= since]
        listed = [parse_time(task["started"]) for task in self._tasks("computing", "started", ROWS_AT_ONCE)[0]]
        if len(listed) == ROWS_AT_ONCE:     # the others were started since the last of these: say, half way
            listed += [((listed[-1] or utc) + utc) / 2] * (run["numComputing"] - len(listed))
        self.ends = recent_ends(ended, not since, listed, utc)
        self.used = (sorted(task["memory"] for task in ended if task["memory"] is not None),
                     sorted(share for share in map(cpu_share, ended) if share is not None))

    def _tasks(self, status: str, order: str, limit: int) -> Tuple[List[Dict[str, Any]], bool]:
        """The first tasks of a status in an order, and whether these are all."""
        answer = self.client.ask("GET", run_path(self.run_uuid, "/tasks?" + urllib.parse.urlencode(
            {"status": status, "order": order, "limit": limit})))
        return answer["data"], not answer["next"]


def cpu_share(task: Mapping[str, Any]) -> Optional[float]:
    """How many processors a task that has ended kept busy. None where it is not known."""
    started, finished = parse_time(task["started"]), parse_time(task["finished"])
    if task["cpu"] is None or started is None or finished is None or finished <= started:
        return None
    return float(task["cpu"] / (finished - started))


def middle_and_most(ordered: Sequence[float]) -> Optional[Dict[str, float]]:
    """Median and largest of ascending values. None of none."""
    return {"median": quantile(ordered, 0.5), "largest": ordered[-1]} if ordered else None


def recent_rate_text(rate: Optional[Rate], why: str) -> str:
    """A rate with its range and its window, or why it is not known."""
    if rate is None:
        return "unknown: " + (why or "too few tasks have ended lately")
    return "%s over the last %s (%s)" % (
        rate_text(rate.per_s), duration_text(rate.window_s), rate_text(rate.per_s, rate.low, rate.high))


def workers_text(status: RunStatus) -> str:
    """How many workers there are, and how many tasks they hold."""
    if not status.workers:
        return "none is alive: 'python3 taskfarm.py work %s%s' starts one" % (
            status.run["uuid"][:8], "" if status.run.get("hasWork") else " -- COMMAND")
    return "%s alive on %s, they hold %s (of all runs)" % (
        grouped(len(status.workers)), count_text(status.hosts, "host"), count_text(status.held, "task"))


def job_facts(jobs: RunJobs, run_uuid: str, screen: Screen) -> Iterator[Tuple[str, str]]:
    """What a status says about the jobs that were submitted."""
    pending = sorted(jobs.reasons.items())
    yield "jobs", "%d running, %d pending%s" % (jobs.running, sum(jobs.reasons.values()), "".join(
        " (%s)" % printable(reason) for reason, _ in pending if reason not in ("None", "")))
    for reason, count in pending:
        if PERMANENT.search(reason):
            yield "", screen.paint("%s will never begin: %s. Ask for something else, after 'python3 taskfarm.py "
                                   "submit %s --cancel'" % (
                                       count_text(count, "job"), printable(reason), run_uuid[:8]), "red")
    for job, why in jobs.failed:
        yield "", screen.paint("%s ended without a task: %s" % (job, printable(why)), "red")
    if jobs.stopped:
        yield "", screen.paint("%d in a row did: the pending ones of their array are cancelled" % FAILED_IN_ROW, "red")


def status_lines(status: RunStatus, screen: Screen) -> List[str]:
    """A status for a person. Each line fits the terminal."""
    run, columns = status.run, screen.columns

    def fitting(line: str) -> str:
        return cut(line, columns) if columns else line
    name = printable(run.get("name") or "run")
    first = fitting("%s  %s   %s, made %s ago%s" % (
        name, run["uuid"], count_text(run["numTasks"], "task"),
        duration_text(seconds_since(run["created"], status.utc) or 0.0),
        " by " + printable(run["user"]) if run.get("user") else ""))
    share = percent_text(run["percentDone"], 100)
    lines = [screen.paint(first[:len(name)], "bold") + first[len(name):],
             "%s %s" % (state_bar(run, max((min(columns, 120) or 80) - len(share) - 3, 10), screen), share),
             *state_lines(run, screen)]
    if status.over:
        facts = [("over", status.why if status.held_up else "all tasks are done" if not run["numFailed"] else
                  "'python3 taskfarm.py restart %s --failed' lets what failed wait again" % run["uuid"][:8])]
    else:
        facts = [("state", status.why)] if status.held_up else [
            ("rate", recent_rate_text(status.rate, status.why)),
            ("time left", time_left_text(status.least_s, status.most_s, status.why))]
        facts.append(("workers", workers_text(status)))
    if status.jobs and (not status.over or status.jobs.running or status.jobs.reasons):
        facts += job_facts(status.jobs, run["uuid"], screen)
    facts += [(title, "median %s, largest %s" % (text(quantile(used, 0.5)), text(used[-1]))) for title, used, text in (
        ("memory", status.memory, size_text), ("CPU", status.cpu_shares, share_text)) if used]
    for line in ("%-11s%s" % fact for fact in facts):       # half a command cannot be pasted
        lines.append(pasteable(line) if PROGRAM in line else fitting(line))
    for title, tasks, columns_shown in (("longest computing", status.longest, LONGEST_COLUMNS),
                                        ("last failures", status.failures, FAILURE_COLUMNS)):
        if tasks:
            titles = used_columns(columns_shown, tasks, "parameters")
            table = task_table(titles, max(columns - 2, 1) if columns else 0)
            rows = task_rows(tasks, titles, status.utc)
            lines += ["", screen.paint(title, "bold"), *("  " + line for line in table.lines(rows))]
    return lines


# The columns of tables of tasks by title, and those of each table.
TASK_TABLE = {column.title: column for column in (
    Column("task", True), Column("status"), Column("percent", True, text="%.1f".__mod__),
    Column("attempt", True, optional=True), Column("failures", True, optional=True),
    Column("losses", True, optional=True), Column("for", True, text=duration_text),
    Column("ago", True, text=duration_text), Column("took", True, optional=True, text=duration_text),
    Column("memory", True, optional=True, text=size_text), Column("CPU", True, optional=True, text=duration_text),
    Column("host", can_shrink=True), Column("exit", True), Column("log", can_shrink=True, optional=True),
    Column("parameters", can_shrink=True, optional=True), Column("message", can_shrink=True))}
LONGEST_COLUMNS = ("task", "for", "percent", "attempt", "host", "parameters")
FAILURE_COLUMNS = ("task", "ago", "attempt", "exit", "host", "parameters", "message")
LISTED_COLUMNS = ("task", "status", "percent", "attempt", "failures", "losses", "took", "memory", "CPU", "host", "exit",
                  "log", "parameters", "message")


def attempt_duration(task: Mapping[str, Any], now_utc: float) -> Optional[float]:
    """The seconds that the last attempt took, or takes so far. None when that is not known."""
    started, finished = parse_time(task["started"]), parse_time(task["finished"])
    if started is None or finished is None and task["status"] != "computing":
        return None
    return max((finished or now_utc) - started, 0.0)


def used_columns(titles: Sequence[str], tasks: Sequence[Mapping[str, Any]], *optional: str) -> List[str]:
    """The columns of a list that begins with these tasks: the *optional* ones only where a task has something there."""
    return [title for title in titles if title not in optional or any(task[title.lower()] is not None
                                                                      for task in tasks)]


def task_table(titles: Sequence[str], width: int, bare: bool = False) -> Table:
    """A table of tasks, with some of TASK_TABLE."""
    return Table([TASK_TABLE[title] for title in titles], width, bare)


def task_rows(tasks: Sequence[Mapping[str, Any]], titles: Sequence[str], now_utc: float) -> List[List[Any]]:
    """The rows of such a table."""
    rows = []
    for task in tasks:
        cells = {"percent": task["percentCompleted"], "for": seconds_since(task["started"], now_utc),
                 "ago": seconds_since(task["finished"], now_utc), "took": attempt_duration(task, now_utc),
                 "CPU": task["cpu"], "host": task["hostname"], "exit": task["exitCode"]}
        rows.append([cells[title] if title in cells else task[title] for title in titles])
    return rows


def status_json(status: RunStatus) -> Dict[str, Any]:
    """A status for programs."""
    rate = status.rate
    return {"run": status.run, "over": status.over,
            "rate": rate and {"perSecond": rate.per_s, "low": rate.low, "high": rate.high, "ended": rate.ended,
                              "seconds": rate.window_s},
            "secondsLeft": {"least": status.least_s, "most": status.most_s},
            "workers": {"alive": len(status.workers), "hosts": status.hosts, "held": status.held},
            "memory": middle_and_most(status.memory), "cpuShare": middle_and_most(status.cpu_shares),
            "jobs": status.jobs and {
                "running": status.jobs.running, "pending": status.jobs.reasons, "stopped": status.jobs.stopped,
                "failed": [{"job": job, "why": why} for job, why in status.jobs.failed]},
            "longest": status.longest, "failures": status.failures}


def status_line(status: RunStatus) -> str:
    """A status in one line, for a log."""
    run = status.run
    forecast = status.why if status.held_up else "over" if status.over else forecast_text(
        status.rate, status.least_s, status.most_s, status.why)
    return "%s, %s, %s" % (percent_text(run["percentDone"], 100), state_counts(run), forecast)


# Ends in groups: which failures are alike, and which hosts are slow or fail.

LATEST_ENDS = 100000                # are looked at, unless the user wants all
FAILURES_SHOWN = 3                  # tasks of each kind of failure
HOSTS_NAMED = 3                     # of each kind of failure; the others are counted
# What differs between messages of one kind: numbers, also hexadecimal ones, with what joins them, and paths, not "I/O".
# A path is looked for only where a word begins: from each of its characters on, a word of 2 000 took 20 ms.
VARYING = re.compile(r"""(?<!IN_WORD)(?:[~.]{0,2}/IN_WORD* | (?:(?!/)IN_WORD)+/IN_WORD*[/.]IN_WORD+)
    | NUMBER(?:[-.:+_,]*NUMBER)*""".replace("IN_WORD", r"""[^\s'"(),:;<=>\[\]{}|`]""").replace("NUMBER", r"""
        (?:0x[0-9a-fA-F]+ | \b(?=[a-f]*[0-9])[0-9a-f]{8,}\b | [0-9]+(?:[eE][-+]?[0-9]+)?)"""), re.VERBOSE)


@functools.lru_cache(maxsize=4096)
def kind_of_message(message: str) -> str:
    """A message with * in place of what differs between those of one kind: what `restart --like` takes."""
    return VARYING.sub("*", printable(message))


class FailureKind:
    """Failures that are alike, in what was looked at."""

    def __init__(self, exit_code: Optional[int], message: str) -> None:
        self.exit_code, self.message = exit_code, message
        self.hosts: "Counter[str]" = Counter()
        self.tasks: List[int] = []          # the latest ones
        self.first = self.last = ""         # times of the API

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(self.hosts.values())

    def hosts_text(self) -> str:
        """The hosts with the most of them."""
        names = [name for name, _ in self.hosts.most_common(HOSTS_NAMED)]
        return ",".join(names + ["+%d" % (len(self.hosts) - HOSTS_NAMED)] * (len(self.hosts) > HOSTS_NAMED))


def group_failures(tasks: Iterable[Mapping[str, Any]]) -> List[FailureKind]:
    """Failed tasks, the latest first, by exit status and kind of message; the most frequent kind first."""
    kinds: Dict[Tuple[Any, str], FailureKind] = {}
    for task in tasks:
        key = task["exitCode"], kind_of_message(task["message"] or "")
        kind = kinds[key] if key in kinds else kinds.setdefault(key, FailureKind(*key))
        kind.hosts[task["hostname"] or "?"] += 1
        kind.first, kind.last = task["finished"], kind.last or task["finished"]
        if len(kind.tasks) < FAILURES_SHOWN:
            kind.tasks.append(task["task"])
    return sorted(kinds.values(), key=lambda kind: -kind.count)


class HostEnds:
    """What ended on a host, in what was looked at."""

    def __init__(self) -> None:
        self.took_s = array.array("d")      # of tasks that are done
        self.ends = self.failed = 0
        self.lost = 0                       # workers whose lease ran out
        self.memory: Optional[int] = None   # bytes: the peak of the largest task

    def add(self, task: Mapping[str, Any], took_s: Optional[float]) -> None:
        """A task has ended here."""
        self.ends += 1
        self.failed += task["status"] != "done"
        if task["status"] == "done" and took_s is not None:
            self.took_s.append(took_s)
        if task["memory"] is not None:
            self.memory = max(self.memory or 0, task["memory"])

    def quantile(self, part: float) -> Optional[float]:
        """The seconds that so large a part of the tasks that are done took at most."""
        return quantile(sorted(self.took_s), part) if self.took_s else None


def group_hosts(tasks: Iterable[Mapping[str, Any]]) -> Tuple[HostEnds, Dict[str, HostEnds]]:
    """The ends of tasks together, and by host."""
    together, hosts = HostEnds(), {}        # type: HostEnds, Dict[str, HostEnds]
    for task in tasks:
        took_s = attempt_duration(task, 0.0)
        together.add(task, took_s)
        hosts.setdefault(task["hostname"] or "?", HostEnds()).add(task, took_s)
    return together, hosts


class Watch:
    """Shows a run until it is over: redrawn in place on a terminal, else as lines. It waits for a server that is away.

    *monitor*: its `update` gives a RunStatus, or what can be shown like one. *interval_s*: between two updates or
    lines; None for WATCH_S or WATCH_LINE_S.
    """
    def __init__(self, monitor: Any, screen: Screen, interval_s: Optional[float], as_json: bool) -> None:
        self.monitor, self.screen, self.interval_s, self.as_json = monitor, screen, interval_s, as_json
        self.status: Any = None
        self.line_tick = -math.inf                      # of the last line
        self.away_since: Optional[float] = None         # tick at which the server did not answer first
        self.trouble = ""                               # why it does not

    @property
    def redraws(self) -> bool:
        """Whether the run is redrawn in place, and not shown as lines."""
        return self.screen.may_draw and not self.as_json

    def run(self) -> int:
        """Watch until the run is over: exit status 0. Raises FarmError when the run is deleted or the login ends."""
        signal.signal(signal.SIGCONT, lambda *_: self.screen.drawn.clear())     # the shell has written below it
        try:
            while True:
                try:
                    self.status = self.monitor.update()
                    self._server_answered()
                except (Unreachable, FarmError) as error:
                    if self.status is None or isinstance(error, FarmError) and error.status < 500:
                        raise
                    self._server_away(error)
                self._show(self.status)
                if self.status.over and self.away_since is None:
                    return 0
                self.monitor.client.retry_s = 0.0        # after the first answer, this loop is what tries again
                time.sleep(min(self.interval_s or WATCH_S, WATCH_S))
        finally:
            self.screen.keep()

    def _log(self, sentence: str) -> None:
        if not self.redraws:
            self.screen.keep()
            print("%s  %s" % (time.strftime("%Y-%m-%d %H:%M:%S"), pasteable(sentence)), flush=True, file=(
                sys.stderr if self.as_json else sys.stdout))

    def _server_away(self, error: Exception) -> None:
        self.trouble = getattr(error, "what", str(error))
        if self.away_since is None:
            self.away_since = time.monotonic()
            self._log("the server is away: %s" % self.trouble)

    def _server_answered(self) -> None:
        if self.away_since is not None:
            self._log("the server is back after %s" % duration_text(time.monotonic() - self.away_since))
            self.away_since = None

    def _show(self, status: Any) -> None:
        tick = time.monotonic()
        if self.redraws:
            lines = status.lines(self.screen)
            if self.away_since is not None:
                sentence = "the server is away, for %s now: %s" % (duration_text(tick - self.away_since), self.trouble)
                lines.insert(0, self.screen.paint(cut(sentence, self.screen.columns), "red"))
            self.screen.redraw(lines)
        elif self.away_since is None and (status.over or tick - self.line_tick >= (self.interval_s or WATCH_LINE_S)):
            self.line_tick = tick
            if self.as_json:
                print(json.dumps(status.json()), flush=True)
            else:
                self._log(status.line())


# ---------------------------------------------------------------- VERBS
# What a user types: runs, tasks, workers, and work itself. A verb asks a server by a Client; it must not open the file.
#
# A new verb: `cmd_x(args)` here, which returns the exit status and whose docstring is its help; a line for it in
# `add_client_verbs` in COMMAND LINE, its name in VERB_GROUPS there, in VERBS of the tests, and in README.

def raise_descriptor_limit() -> None:
    """Raise the limit of descriptors as far as the system allows: login nodes begin with 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard, 65536, 10240):     # macOS says "unlimited" and accepts 10240
        if wanted == hard or wanted > soft:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                return


def default_user_name() -> str:
    """The name of the user who runs this, or "farmer" where that is not known."""
    with contextlib.suppress(Exception):    # getpass raises several where neither environment nor passwd knows it
        return check_name(re.sub(r"[:/]", "_", getpass.getuser()))
    return "farmer"


def read_password(name: str) -> str:
    """A password from the terminal, or one line of standard input. Not from an argument: `ps` shows those."""
    if sys.stdin.isatty():
        return getpass.getpass("password for %s: " % name)
    line = sys.stdin.buffer.readline().rstrip(b"\r\n")
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("latin-1")


def leave_array(find: Callable[..., Access], run: Mapping[str, Any], worker: str, why: str, over: bool,
                say: Callable[[str], None]) -> None:
    """What a job that `submit` sent does at its end: cancel the pending jobs of its array when the run is over, or when
    this job and those beside it failed at once. *why* this one did; "" if it did not."""
    name, job = os.environ.get("SLURM_JOB_NAME") or os.environ.get("PBS_JOBNAME"), job_text(os.environ)
    if not (why or over) or name != job_name(run["uuid"]):
        return
    try:
        if why:
            with contextlib.closing(Client(find, LAST_REPORTS_S, timeout_s=LAST_REPORTS_S)) as client:
                register(client, worker, 1, job=job)
                client.ask("DELETE", "/api/worker/%s?%s" % (worker, urllib.parse.urlencode(
                    {"why": printable(why)[:WHY_LIMIT]})))
                workers = client.ask("GET", LATEST_WORKERS % 200)["data"]
            over = failed_in_row(workers, worker) >= FAILED_IN_ROW
        if over and cancel_pending(os.environ):
            say("%s: the pending jobs of array %s are cancelled" % (
                "%d jobs in a row failed at once" % FAILED_IN_ROW if why else "the run is over", array_of(job)))
    except (FarmError, Unreachable, Refusal, BatchTrouble) as error:
        say(str(error))


def in_job(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """`work`: when it is refused before it is a worker, as without its program, the farm learns that the job failed."""
    @functools.wraps(command)
    def run_in_job(args: argparse.Namespace) -> int:
        try:
            return command(args)
        except Refusal as refusal:
            find = functools.partial(find_access, os.environ)
            with contextlib.suppress(FarmError, Unreachable, Refusal), contextlib.closing(Client(find)) as client:
                for name in args.runs if job_text(os.environ) else []:
                    run = {"uuid": find_run_uuid(client, name, changes=True)}
                    leave_array(client.find, run, secrets.token_hex(16), str(refusal), False, print_notice)
            raise
    return run_in_job


@in_job
def cmd_work(args: argparse.Namespace) -> int:
    """run a command for each task of a run, until none is left

    RUN is the whole name of a run, its uuid, or 8 or more digits that its uuid begins with. Without a
    COMMAND it is the run's own, with its parameters, in its folder ('new' or 'run' has kept them). Only a
    run that you have made yourself is taken so: the user of your login. With several RUNs, and with --any,
    the worker begins with the first that has tasks, and goes on with the next one when that has none; it
    leaves when none has any. --log-dir then has a folder for each run.

    {task}, {run}, {attempt} and {slot} are replaced in the arguments of the command; the result stays
    one argument. {slot} is a number from 0 to N-1 (of -j N) that no other command has at that time. The
    command also finds TASKFARM_TASK, _RUN, _ATTEMPT, _SLOT and _WORKER in its environment. Exit status 0
    means that the task is done. Another status, a signal or --timeout is a failure, and the last line of
    the error output is its message. Peak memory and CPU seconds are kept with the task; with --log-dir
    also where the output of a failed one is ('log' prints it).

    With --lines FILE, {line} is line number {task} of the file, from 0. With --table FILE or --grid, the
    names of columns or axes in braces are replaced. A command that is one of these alone, as {line}, is
    run by sh. {} is {line} with --lines, else {task}, in a command without it. {{task}} stands for the
    text {task}, and ${task} is left to the shell. --dry-run shows what comes out of it.

    --gpus-per-task shares the GPUs in CUDA_VISIBLE_DEVICES (ROCR_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES),
    else those in SLURM_JOB_GPUS, else all that this machine has, among the commands that run at the same
    time.

    Without --log-dir the standard output holds what commands print there, and nothing else. The error
    output holds theirs, and what the worker says. Both are in whole lines (up to 1 MB); a line without
    an end gets one. On a terminal, and with --tag, a line that overwrites itself is shown as it ends.

    Farm and login come from TASKFARM_URL, TASKFARM_FINGERPRINT and TASKFARM_TOKEN (or _USER and
    _PASSWORD), else from the access file; no command is given the login. Where that file has become another
    farm's, a run is looked for in the farms of the files beside it. TASKFARM_FARM, of which farm a command is, is
    for verbs and scripts inside it: they find the server also when it has moved.

    On SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2 or SIGXCPU, and before the batch job ends, the worker
    ends its commands and gives their tasks back. After a second signal it does so at once. Slurm signals
    the worker only when it is started by exec or srun, as below.

    exit status: 0 no task is left, 1 refused, 2 wrong usage, 3 no task is left and some have failed,
    4 there is no such run (any more), 5 the server cannot be reached, 6 the login is refused, 7 stopped
    before the end (0 with --leave-ok, if since the job ends), or left while the run is paused or waits for
    another, 8 its first commands all failed and other
    workers get on: what does this node lack? 9 too many commands failed: the first five, and nobody gets
    on, or as many as --max-fails says, 10 the job is too short: no task has ended in it, or none is
    likely to

    --task N runs that task alone, once, if it waits: to see by hand what fails. Then the exit status is 3
    when it is not done. 'restart RUN N' lets it wait again.

    When no task waits but others compute, the worker stays for --idle seconds at most, since their
    tasks may come back. It does not stay longer than it would need for these tasks itself.

    Failures within 10 s are kept back until a command ends otherwise or runs for 10 s. When the first
    five fail so, or fewer and no task waits, other workers tell why. If they get on, it is this node:
    the tasks are given back, and none has failed. If not, it is the command: the failures are reported,
    and after five the worker stops. --max-fails 0 reports all and never stops.

    examples:
      python3 taskfarm.py work antarctica
      python3 taskfarm.py work ice antarctica -j 16
      python3 taskfarm.py work --any -j 16
      python3 taskfarm.py work 3f2a91c4 -j 16 --timeout 3600 -- ./tile.sh {task}
      python3 taskfarm.py work ice --log-dir logs --log-failed -- ./tile.sh {task}
      python3 taskfarm.py work sweep --lines params.txt -- ./sim {task} {line}
      python3 taskfarm.py work fits --grid lr=0.1,0.01 -- ./fit {lr}
      sbatch --array=1-50 -c 16 --wrap "exec python3 taskfarm.py work antarctica"
    """
    args.jobs = args.jobs or default_jobs(os.environ)
    display = Display(args.quiet, os.environ, args.tag)
    # What was typed is meant in this folder, and the work of a run may be in another.
    args.log_dir = args.log_dir and os.path.abspath(args.log_dir)
    if os.environ.get("TASKFARM_ACCESS"):
        os.environ["TASKFARM_ACCESS"] = os.path.abspath(os.environ["TASKFARM_ACCESS"])
    try:
        clients = [worker_client(display) for _ in args.runs or [""]]
        runs = [(client, find_run_uuid(client, name, changes=True)) for client, name in zip(clients, args.runs)]
        for client in clients:
            for sentence in send_all_unsent(client):
                display.say(sentence)
        if args.any or len(runs) > 1:
            turn = RunsInTurn(args, display, clients[0], runs)
            with contextlib.closing(turn.job):
                return turn.work()
        (client, run_uuid), = runs
        worker = work_on(args, client, client.ask("GET", run_path(run_uuid)), display)
    except (FarmError, Unreachable) as error:
        print_notice(str(error))
        return exit_status_of(error)
    return (worker and worker.status) or EXIT_DONE


def worker_client(display: Display) -> Client:
    """A client for a worker. It waits long for a server that is away, and says so."""
    client = Client(functools.partial(find_access, os.environ), WORKER_RETRY_S)
    client.say = display.say
    return client


def work_on(args: argparse.Namespace, client: Client, run: Dict[str, Any], display: Display,
            job: Optional[BatchJob] = None) -> Optional[TaskRunner]:
    """Be a worker of the run, with the command that was typed or else the run's own; None with --dry-run."""
    if args.task is not None:
        try:
            status = client.ask("GET", run_path(run["uuid"], "/tasks/%d" % args.task))["status"]
        except NotFound as error:       # the number: the run was there
            raise Refusal(str(error))
        if status != "waiting":
            raise Refusal("task %d is %s: 'python3 taskfarm.py restart %s %d%s' lets it wait again" % (
                args.task, status, run["uuid"][:8], args.task, "" if status == "failed" else " --all"))
    words, parameters = args.words, typed_parameters(args, run)
    if not words:
        words, parameters = enter_work(client, run)
    template = make_template(args, words, run["uuid"], parameters)
    for sentence in template.warnings(run["numTasks"] if args.task is None else 1):
        (print_notice if args.dry_run else display.say)(sentence)
    if args.dry_run:
        print_first_commands(template, run["numTasks"], args.jobs, args.task or 0)
        return None
    return run_commands(args, client, run, template, display, times_of_ended(client, run), job)


def typed_parameters(args: argparse.Namespace, run: Mapping[str, Any]) -> Optional[Parameters]:
    """The parameters of the command that was typed for a run, None without any. Raises Refusal when there is no
    command, or when they are not as many as the run has tasks."""
    parameters = open_parameters(args)
    if parameters is not None and not args.words:
        raise Refusal("the run knows its own parameters: type a command after -- too, or leave out %s" % (
            parameters.options[0]))
    if parameters is not None and len(parameters) != run["numTasks"]:
        raise Refusal("%s, and the run %d tasks. A run of it is made by: python3 taskfarm.py new %s" % (
            parameters.size_text, run["numTasks"], " ".join(map(shlex.quote, parameters.options))))
    return parameters


class NotOwnRun(Refusal):
    """Another user has made the run: no worker takes its command out of the farm."""


def enter_work(client: Client, run: Mapping[str, Any]) -> Tuple[List[str], Optional[Parameters]]:
    """The command and the parameters that a run of our own knows, once we are in its folder. Raises Refusal.

    A command of somebody else would be theirs with our rights, and everybody may make runs in a shared farm.
    """
    if not run.get("hasWork"):
        raise Refusal("run %s does not know its command: type it, as in python3 taskfarm.py work %s -- COMMAND" % (
            printable(run.get("name") or run["uuid"]), run["uuid"][:8]))
    work = client.ask("GET", run_path(run["uuid"], "/work"))
    folder, kept = work["folder"], work["parameters"]
    access = client.access
    # The keeper of a farm decides what is whose there, so nobody gets into one of another keeper by a name alone.
    if not access.served and access.farm != find_access(os.environ).farm:
        raise NotOwnRun("run %s is in the farm of %s and not in that of the access file, and its keeper could have "
                        "made its command: TASKFARM_ACCESS=%s chooses that farm" % (
                            printable(run.get("name") or run["uuid"]), access.source, shlex.quote(access.source)))
    if not work["own"]:
        options = [] if kept is None else [word for axis in kept["grid"] for word in ("--grid", axis)] if (
            kept["kind"] == "grid") else ["--" + kept["kind"], kept["path"]]
        typed = [os.path.abspath(sys.argv[0]), "work", run["uuid"], *options, "--", *work["command"]]
        raise NotOwnRun("run %s was made by %s and not by the user of your login, and a worker takes a command out of "
                        "the farm only of a run that its own user made. If you trust this one, type it: cd %s && %s" % (
                            printable(run.get("name") or run["uuid"]), printable(work["user"] or "the keeper"),
                            shlex.quote(folder), "python3 " + " ".join(map(shlex.quote, typed))))
    try:
        os.chdir(folder)
    except OSError as error:
        raise Refusal("the folder of the run, %s, cannot be entered on %s: %s. In another one, type the command: "
                      "python3 taskfarm.py work %s -- COMMAND" % (folder, os.uname().nodename, error.strerror,
                                                                 run["uuid"][:8]))
    os.environ["PWD"] = folder
    return work["command"], parameters_again(kept)


class RunsInTurn:
    """Works on the first of some runs that has tasks, then on the next one, until none has any.

    Each time it begins with the first again, so that a run whose tasks wait again has its turn. *given*: runs and
    their clients; none for all those that the user has made and that know their work.
    """
    LOOK_AGAIN_S = 5.0

    def __init__(self, args: argparse.Namespace, display: Display, client: Client,
                 given: Sequence[Tuple[Client, str]]) -> None:
        self.args, self.display, self.client, self.given = args, display, client, given
        self.idle_s, args.idle = args.idle, 0       # in one run it does not wait for others: there may be another run
        self.log_dir = args.log_dir
        self.job = BatchJob(os.environ, display.say, args.until)
        self.worked_on = {uuid_ for _, uuid_ in given}
        self.left_out: Set[str] = set()             # runs that cannot be worked on here
        self.nothing_at: Dict[str, Tuple[Any, ...]] = {}    # the figures of runs when they had no task for us
        self.status = EXIT_DONE

    def work(self) -> int:
        """Work; the exit status."""
        idle_since = math.inf
        self._end_on_signals()
        while True:
            runs = self._runs()
            ready = next(((client, run) for client, run in runs if run["numWaiting"] and self.nothing_at.get(
                run["uuid"]) != self._figures(run) and not ask_hold_up(client, run)), None)
            if ready:
                worker = self._work_on(*ready)
                if worker and worker.finished:
                    idle_since = math.inf
                if worker and worker.status != EXIT_RUN_DELETED and (
                        worker.stop_reason or worker.signals or worker.status not in (
                            EXIT_DONE, EXIT_TASKS_FAILED, EXIT_STOPPED)):
                    return worker.status or EXIT_DONE
                continue
            now = time.monotonic()
            idle_since = min(idle_since, now)
            held_up = {run["uuid"]: ask_hold_up(client, run) for client, run in runs if run["numWaiting"]}
            lasting = {uuid_ for uuid_, held in held_up.items() if held and held.for_good}
            if now >= idle_since + self.idle_s or not any(
                    run["numWaiting"] + run["numComputing"] for _, run in runs if run["uuid"] not in lasting):
                failed = any(run["numFailed"] or run["uuid"] in lasting for _, run in runs
                             if run["uuid"] in self.worked_on)
                return max(self.status, EXIT_TASKS_FAILED if failed else EXIT_DONE)
            self.display.say_once("no run has a task for this worker now, and one may still have some: it stays for a "
                                  "while (with --idle 0 it would leave)")
            time.sleep(min(self.LOOK_AGAIN_S, self.idle_s))

    @staticmethod
    def _end_on_signals() -> None:
        """Have signals end this process between two runs, when there is nothing to give back."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: sys.exit(EXIT_STOPPED))

    def _runs(self) -> List[Tuple[Client, Dict[str, Any]]]:
        """The runs in order, with their figures now."""
        found = []
        for client, uuid_ in self.given:
            try:
                found.append((client, client.ask("GET", run_path(uuid_))))
            except NotFound:
                self._leave_out(uuid_, "run %s was deleted" % uuid_, EXIT_RUN_DELETED)
        if not self.given:
            found = [(self.client, run) for run in self.client.ask("GET", "/api/runs")["data"] if run.get("hasWork")]
        return [(client, run) for client, run in found if run["uuid"] not in self.left_out]

    def _figures(self, run: Mapping[str, Any]) -> Tuple[Any, ...]:
        return run["numWaiting"], run["numComputing"], run["lastReport"]

    def _leave_out(self, run_uuid: str, why: str = "", status: int = EXIT_DONE) -> None:
        if run_uuid not in self.left_out:
            self.left_out.add(run_uuid)
            self.status = max(self.status, status)
            if why:
                self.display.say(why)

    def _work_on(self, known: Client, run: Dict[str, Any]) -> Optional[TaskRunner]:
        """Be a worker of the run until it has no task for us."""
        # A client of its own: that of a worker is given up at its end.
        with contextlib.closing(Client(known.find, WORKER_RETRY_S)) as client:
            client.say = self.display.say
            self.display.readings = Readings()
            if self.log_dir:        # tasks of all runs have the same numbers
                self.args.log_dir = os.path.join(self.log_dir, run["uuid"])
            try:
                worker = work_on(self.args, client, run, self.display, self.job)
            except NotOwnRun as error:
                self._leave_out(run["uuid"], str(error) if self.given else "", 1 if self.given else EXIT_DONE)
                return None
            except (Refusal, NotFound) as error:
                self._leave_out(run["uuid"], "run %s is left out: %s" % (run.get("name") or run["uuid"], error), 1)
                return None
        if worker is None:          # --dry-run
            self._leave_out(run["uuid"])
            return None
        self._end_on_signals()
        if not worker.finished:
            self.nothing_at[run["uuid"]] = self._figures(run)
        if worker.status == EXIT_RUN_DELETED:
            self._leave_out(run["uuid"], "", EXIT_RUN_DELETED)
        self.worked_on.add(run["uuid"])
        return worker


def typed_before(args: argparse.Namespace) -> str:
    """What the user typed before the command."""
    typed = sys.argv[1:len(sys.argv) - len(args.words)] + ["--"] * ("--" not in sys.argv)
    return " ".join([started_as(), *map(shlex.quote, typed)])


def make_template(args: argparse.Namespace, words: Sequence[str], run_uuid: str,
                  parameters: Optional[Parameters]) -> Template:
    """The command for tasks of a run, with the options of `work`. Raises Refusal where it cannot be meant so."""
    return Template(words, run_uuid, parameters, typed_before(args),
                    share_gpus(os.environ, args.jobs, args.gpus_per_task) if args.gpus_per_task else ())


def run_commands(args: argparse.Namespace, client: Client, run: Dict[str, Any], template: Template, display: Display,
                 took_s: Sequence[float] = (), known_job: Optional[BatchJob] = None) -> TaskRunner:
    """Be a worker of the run, as the options of `work` say; the worker at its end. *took_s*: what tasks of it took."""
    log_dir = take_log_folder(args.log_dir, run["uuid"]) if args.log_dir else ""
    job = known_job or BatchJob(os.environ, display.say, args.until)
    options = WorkOptions(args.jobs, args.timeout or math.inf, args.grace, args.drain, args.idle, args.task_time,
                          job.end, log_dir, args.log_failed, args.max_fails if args.task is None else 0, args.leave_ok,
                          args.task, job_text(os.environ))
    if args.jobs > 400:
        raise_descriptor_limit()    # not otherwise: commands inherit it
    worker = TaskRunner(client, run, template, options, display, took_s)
    display.show_run(run)
    display.say("worker %s on %s: run %s, %d tasks, %d at a time" % (
        worker.uuid[:8], socket.gethostname(), run.get("name") or run["uuid"], run["numTasks"], args.jobs))
    for sentence in job_warnings(os.environ, args.jobs):
        display.say_once("warning: " + sentence)
    with contextlib.ExitStack() as undo:
        if not known_job:
            undo.callback(job.close)
        job.wait(1.0)           # so that no task is begun that does not fit
        worker.work()
    leave_array(client.find, run, worker.uuid, worker.failed_at_once,
                worker.status == EXIT_RUN_DELETED or is_over(display.run), display.say)
    return worker


def open_parameters(args: argparse.Namespace) -> Optional[Parameters]:
    """The parameters that --lines, --table or --grid name; None without these."""
    if args.lines is not None:
        return Lines(args.lines)
    return TableRows(args.table) if args.table is not None else Grid(args.grid) if args.grid else None


def chosen_size(args: argparse.Namespace) -> Tuple[int, Optional[Parameters]]:
    """How many tasks a new run gets, and the parameters that tell them apart, if there are any."""
    parameters = open_parameters(args)
    if parameters is None:
        return int(args.tasks), None
    notice = parameters.check()
    if not len(parameters):
        raise Refusal("%s, and a run needs one task at least" % parameters.size_text)
    if notice:
        print_notice(notice)
    return len(parameters), parameters


WORK_LIMIT = BODY_LIMIT - 4096      # bytes of what a run keeps of its work: with its name it fits a request


def work_to_keep(words: Sequence[str], parameters: Optional[Parameters]) -> Dict[str, Any]:
    """What a run keeps of its work, as the API takes it. Raises Refusal when it cannot be kept."""
    work = {"command": words, "folder": current_folder(), "parameters": parameters and parameters.kept()}
    size = len(json.dumps(work))
    if size > WORK_LIMIT:
        raise Refusal("the command takes %s, and a run keeps %s at most: write it into a script, or into a file of "
                      "--lines" % (size_text(size), size_text(WORK_LIMIT)))
    return work


def print_first_commands(template: Template, tasks: int, jobs: int, first: int = 0) -> None:
    """Print the commands of the first tasks, or of those from *first* on, as they can be pasted into a shell."""
    shown = range(first, min(tasks, first + DRY_RUN_TASKS))
    for task in shown:
        print("\n".join(template.shown(task, task % jobs)))
    if tasks > shown.stop:
        print("# and %d more" % (tasks - shown.stop))


def cmd_progress(args: argparse.Namespace) -> int:
    """write, inside a task's command, how far it is

    For commands that `work` runs. It writes the number into the file $TASKFARM_PROGRESS, as
    'echo 50 > $TASKFARM_PROGRESS' does in a shell; the worker reads it every second. Where that cannot be
    done, it says so, and the exit status is 0.

    example:
      python3 taskfarm.py progress 50
    """
    try:
        with open(os.environ["TASKFARM_PROGRESS"], "w") as file:
            file.write("%r\n" % args.percent)
    except KeyError:
        print_notice("%g percent are not reported: this is not a command of 'work' (TASKFARM_PROGRESS is not set)"
                     % args.percent)
    except OSError as error:
        print_notice("%g percent are not reported: %s" % (args.percent, error))
    return 0


VERB_PATIENCE_S = 5.0               # a verb waits this long for a server that is being started or restarted
TABLE_ROWS = 200                    # of 'tasks' on a terminal, without --limit
DRY_RUN_TASKS = 5                   # whose commands --dry-run prints


@contextlib.contextmanager
def open_client(args: argparse.Namespace) -> Iterator[Client]:
    """A client for a verb. It waits a little for a server: `new` may follow the start of one in a script.

    Reports that workers could not send are sent first.
    """
    find = functools.partial(find_access, os.environ, args.url)
    with contextlib.closing(Client(find, VERB_PATIENCE_S)) as client:
        client.say = print_notice
        for sentence in send_all_unsent(client):
            print_notice(sentence)
        yield client


def print_notice(sentence: str) -> None:
    """Print a sentence for a person on the error output: the standard output is for what a verb prints."""
    print("taskfarm: %s" % printable(pasteable(sentence)), file=sys.stderr)


def wait_for_access(args: argparse.Namespace) -> None:
    """Wait up to VERB_PATIENCE_S for the access file of a server that is being started for the first time."""
    deadline, noticed = time.monotonic() + VERB_PATIENCE_S, False
    while time.monotonic() < deadline:
        try:
            find_access(os.environ, args.url)
            return
        except Refusal:
            if not noticed and time.monotonic() > deadline - VERB_PATIENCE_S / 2:
                print_notice("no farm is known here yet: waiting for one that is being started")
                noticed = True
        time.sleep(0.1)


def print_json(value: Any) -> None:
    """Print a value as one line of JSON."""
    print(json.dumps(value))


def cmd_new(args: argparse.Namespace) -> int:
    """make a run of N tasks, and print its uuid

    The tasks have the numbers 0 to N-1. In place of N there may be a task for each line of a file (of
    parameters, or of whole commands), for each row of a table, or for each combination of a grid.

    With a COMMAND the run knows its work: the command, this folder, and the parameters. Then 'work RUN'
    alone is enough, on any machine that has the folder. Of a file of parameters its size and digest are
    kept: 'work' refuses it when it has changed. All who may see the run may see the command, so write no
    password into it. The command's fields are those of 'work', whose help says more. Without a COMMAND,
    'work' is told it, with the same --lines, --table or --grid.

    examples:
      python3 taskfarm.py new 200000 --name antarctica -- ./tile.sh {task}
      python3 taskfarm.py new --lines params.txt --name ice -- ./sim {line}
      python3 taskfarm.py new --grid lr=0.1,0.01 --grid n=0..999 -- ./fit {lr} {n}
      find . -name '*.nc' | sort > files
      python3 taskfarm.py new --lines files -- ./convert {}
      python3 taskfarm.py new 5000 --max-failures 3    tries each task three times
      python3 taskfarm.py new 1 --after ice            begins when ice is done

    A name that a run has already is refused, since every verb would then want its uuid: --again takes it.
    """
    number, parameters = chosen_size(args)
    body = {"numTasks": number, "name": args.name, "maxFailures": args.max_failures, "maxLosses": args.max_losses}
    if args.words:
        body["work"] = work_to_keep(args.words, parameters)
        template = Template(args.words, "", parameters, typed_before(args), elsewhere=True)
        for sentence in template.warnings(number):
            print_notice(sentence)
    wait_for_access(args)
    with open_client(args) as client:
        if args.name and not args.again:
            refuse_second_run(client, args.name)
        after = args.after or args.after_any
        if after:
            body.update(after=find_run_uuid(client, after, changes=True), afterAny=args.after_any is not None)
        run = client.ask("POST", "/api/run", {name: value for name, value in body.items() if value is not None})
        if is_loopback(client.access.url) and (shutil.which("sbatch") or shutil.which("qsub")):
            print_notice("this farm can be reached from this machine alone: for jobs on other nodes start its server "
                         "with --host 0.0.0.0")
    print(run["uuid"])
    return 0


def refuse_second_run(client: Client, name: str) -> None:
    """Raise Refusal when a run has this name. The API takes it: there a uuid is what tells runs apart."""
    for run in client.ask("GET", "/api/runs")["data"]:
        if run.get("name") == name:
            raise Refusal("a run is called %s already: %s shows it, %s makes another of that name" % (
                name, "'python3 taskfarm.py status %s'" % run["uuid"], "'%s'" % typed_line("--again")))


def short_uuids(runs: Sequence[Mapping[str, Any]], screen: Screen) -> List[str]:
    """The uuids of runs. On a terminal their first digits: 8, or as many as tell them apart."""
    uuids = [run["uuid"] for run in runs]
    for length in range(8, 32) if screen.terminal else ():
        short = [uuid_[:length] for uuid_ in uuids]
        if len(set(short)) == len(uuids):
            return short
    return uuids


class RunList(NamedTuple):
    """All runs, at one moment."""
    runs: List[Dict[str, Any]]
    utc: float                          # seconds since 1970, by the server's clock

    @property
    def over(self) -> bool:
        """Whether all are."""
        return all(map(is_over, self.runs))

    def table(self, screen: Screen) -> List[str]:
        """The runs as a table."""
        by_uuid = {run["uuid"]: run for run in self.runs}
        # One that is not in the list was deleted, or is not for us: that is not asked for each of many.
        held_up = [hold_up(run, lambda uuid_: by_uuid.get(uuid_, UNKNOWN_RUN))
                   if run["numWaiting"] else None for run in self.runs]
        states = [Column("state")] if any(held_up) else []
        table = screen_table(
            screen, Column("run"), Column("tasks", True),
            Column("complete", True, text=lambda percent: percent_text(percent, 100).replace(" ", "")),
            Column("waiting", True, optional=True), Column("computing", True, optional=True),
            Column("done", True, optional=True), Column("failed", True), *states,
            Column("age", True, optional=True, text=duration_text), Column("user", optional=True),
            Column("name", can_shrink=True))
        return table_lines(screen, table, [
            (short, run["numTasks"], run["percentDone"], run["numWaiting"], run["numComputing"], run["numDone"],
             run["numFailed"], *((held.word if held else "") for _ in states), seconds_since(run["created"], self.utc),
             run["user"], run["name"])
            for run, short, held in zip(self.runs, short_uuids(self.runs, screen), held_up)])

    def lines(self, screen: Screen) -> List[str]:
        """The last ones that a terminal has room for."""
        return self._replace(runs=self.runs[-max(screen.size.lines - 1, 1):]).table(screen)

    def line(self) -> str:
        """For a log."""
        going_on = [run for run in self.runs if not is_over(run)]
        return "%d of %s not over: %d tasks waiting, %d computing" % (
            len(going_on), count_text(len(self.runs), "run"), sum(run["numWaiting"] for run in going_on),
            sum(run["numComputing"] for run in going_on))

    def json(self) -> Dict[str, Any]:
        """For programs."""
        return {"data": self.runs}


class RunListMonitor:
    """Asks for all runs again and again."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def update(self) -> RunList:
        """Ask the server. Raises FarmError and Unreachable."""
        return RunList(self.client.ask("GET", "/api/runs")["data"], time.time() + self.client.clock_ahead_s)


def cmd_list(args: argparse.Namespace) -> int:
    """list the runs, the newest last

    Every verb takes a run by its uuid, its whole name, or 8 or more digits that its uuid begins with.
    A verb that only reads also takes any beginning of a uuid or name that no other run has.
    With --watch the list is shown again and again until all runs are over.

    In a pipe there are tabs between the columns, times are seconds, and sizes are bytes.

    examples:
      python3 taskfarm.py list
      python3 taskfarm.py list --watch
      python3 taskfarm.py list | cut -f 1,2
    """
    screen = Screen(sys.stdout, os.environ)
    with open_client(args) as client:
        monitor = RunListMonitor(client)
        if args.watch:
            return Watch(monitor, screen, None, args.json).run()
        shown = monitor.update()
    if args.json:
        print_json(shown.json())
        return 0
    screen.print(shown.table(screen))
    if not shown.runs:
        print_notice("no runs yet: 'python3 taskfarm.py new 1000' makes one")
    return 0


def screen_table(screen: Screen, *columns: Column) -> Table:
    """A table for a terminal, or for the program that reads a pipe."""
    return Table(columns, screen.columns, not screen.terminal)


def table_lines(screen: Screen, table: Table, rows: Sequence[Sequence[Any]]) -> List[str]:
    """The lines of some rows, with the headings in bold."""
    with_headings = not table.has_headings
    lines = table.lines(rows)
    if with_headings:
        lines[0] = screen.paint(lines[0], "bold")
    return lines


def print_table(screen: Screen, table: Table, rows: Sequence[Sequence[Any]]) -> None:
    """Print rows."""
    screen.print(table_lines(screen, table, rows))


def cmd_status(args: argparse.Namespace) -> int:
    """show how far a run is: its tasks by state, rate, time left, workers, failures

    The rate is what the workers of now reach, as a recent window tells: those that have left do not count,
    and those that have come count as the others. The time left is a probable range: it is wide where tasks
    took very different times. With --watch the status is shown again and again until the run is
    over: in place on a terminal, as a line every 30 s in a file or a pipe (see --every). Without
    RUN it is that of the newest run.

    examples:
      python3 taskfarm.py status
      python3 taskfarm.py status antarctica
      python3 taskfarm.py status $run --watch
      python3 taskfarm.py status 3f2a --json
    """
    screen = Screen(sys.stdout, os.environ)
    with open_client(args) as client:
        monitor = RunMonitor(client, find_run_uuid(client, args.run) if args.run else newest_run(client))
        if args.watch:
            return Watch(monitor, screen, args.every, args.json).run()
        status = monitor.update()
    if args.json:
        print_json(status_json(status))
    else:
        screen.print(status_lines(status, screen))
    return 0


def newest_run(client: Client) -> str:
    """The uuid of the run that was made last. Raises Refusal when there is none."""
    runs = client.ask("GET", "/api/runs")["data"]
    if not runs:
        raise Refusal("there are no runs yet: 'python3 taskfarm.py new 1000' makes one")
    return str(runs[-1]["uuid"])


WAIT_S = 0.1, 5.0                   # between two looks of `wait`: at first, and at most


def cmd_wait(args: argparse.Namespace) -> int:
    """wait until a run is over, and print nothing

    What is to be done then stands behind it: a mail, another run, a web hook. With --percent it waits
    until so much of the run is done, or it is over.

    exit status: 0 all tasks are done (with --percent: so much of them), 3 the run is over without that,
    1 refused, 5 the server has not answered for 15 minutes, 6 the login is refused

    examples:
      python3 taskfarm.py wait antarctica && ./collect.sh
      python3 taskfarm.py wait ice; mail -s "ice: $?" me@example.org < /dev/null
      python3 taskfarm.py wait ice --percent 10 && python3 taskfarm.py hosts ice
    """
    pause_s, most_s = WAIT_S
    with open_client(args) as client:
        run_uuid = find_run_uuid(client, args.run)
        client.retry_s = WORKER_RETRY_S
        while True:
            run = client.ask("GET", run_path(run_uuid))
            if run["numDone"] == run["numTasks"] or args.percent is not None and run["percentDone"] >= args.percent:
                return EXIT_DONE
            held_up = ask_hold_up(client, run)
            if is_over(run) or held_up and held_up.for_good:
                return EXIT_TASKS_FAILED
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.2, most_s)


def cmd_tasks(args: argparse.Namespace) -> int:
    """list the tasks of a run, with host, exit code, log and message

    "memory" and "CPU" are what the last attempt used that ended: the peak of its largest process, and
    the seconds of all its processors. "log" is where a failed one left its output. "parameters" are there
    when the run knows its work, and their file can be read here and has not changed.

    On a terminal the first 200, in a file or a pipe all of them, unless --limit says otherwise. In a
    pipe there are tabs between the columns, times are seconds, and sizes are bytes.

    --csv prints all columns for spreadsheets and pandas. --joblog prints those of GNU parallel's
    --joblog, of tasks that have ended; Seq is the number of the task, from 0.

    examples:
      python3 taskfarm.py tasks antarctica 13 17-20
      python3 taskfarm.py tasks antarctica --status failed
      python3 taskfarm.py tasks antarctica --status computing --order started
      python3 taskfarm.py tasks $run --csv > tasks.csv
      python3 taskfarm.py tasks $run --status failed | cut -f 1
    """
    screen = Screen(sys.stdout, os.environ)
    form = "csv" if args.csv else "joblog" if args.joblog else "json" if args.json else ""
    limit = args.limit if args.limit is not None else TABLE_ROWS if screen.terminal and not form else 0
    query: Dict[str, Any] = {name: value for name, value in (("status", args.status), ("order", args.order)) if value}
    with open_client(args) as client:
        run_uuid = find_run_uuid(client, args.run)
        query["limit"] = min(limit + 1, ROWS_AT_ONCE) if limit else ROWS_AT_ONCE
        rows = limit_rows(chosen_pages(client, run_path(run_uuid, "/tasks"), args.numbers, query), limit)
        if form == "json":
            print_json_rows(rows)
            return 0
        parameters = None if form == "joblog" else known_parameters(client, client.ask("GET", run_path(run_uuid)))
        if form:
            head, cells = (CSV_COLUMNS, csv_cells) if args.csv else (JOBLOG_COLUMNS, joblog_cells)
            writer = csv.writer(sys.stdout, "excel" if args.csv else "excel-tab", lineterminator="\n")
            writer.writerow(head)
            for tasks, _ in rows:
                add_parameters(tasks, parameters)
                writer.writerows(cells(task) for task in tasks if args.csv or task["status"] in ("done", "failed"))
            return 0
        columns: List[str] = []
        for tasks, more in rows:
            add_parameters(tasks, parameters)
            if not columns:
                columns = used_columns(LISTED_COLUMNS, tasks, "parameters", *(
                    ("memory", "CPU", "log") if screen.terminal else ()))
                table = task_table(columns, screen.columns, not screen.terminal)
            print_table(screen, table, task_rows(tasks, columns, time.time() + client.clock_ahead_s))
            if not tasks and screen.terminal:
                print("none", file=sys.stderr)
            if more:
                print("... and more: --limit 0 shows all", file=sys.stderr)
    return 0


SPANS_ASKED = 100                   # in a request: its line has a bound


def chosen_pages(client: Client, path: str, spans: Sequence[Tuple[int, int]],
                 query: Dict[str, Any]) -> Iterator[List[Dict[str, Any]]]:
    """The pages of a run's tasks, or of those in the spans."""
    if not spans:
        yield from every_page(client, path, **query)
    for at in range(0, len(spans), SPANS_ASKED):
        wanted = ",".join("%d-%d" % span for span in spans[at:at + SPANS_ASKED])
        yield from every_page(client, path, tasks=wanted, **query)


# Of `tasks --csv`; and of GNU parallel's --joblog.
CSV_COLUMNS = ("task", "status", "percent", "started", "finished", "seconds", "host", "worker", "attempt", "failures",
               "losses", "exit", "message", "memory", "cpu", "log", "parameters")
JOBLOG_COLUMNS = ("Seq", "Host", "Starttime", "JobRuntime", "Send", "Receive", "Exitval", "Signal", "Command")


def csv_cells(task: Mapping[str, Any]) -> List[Any]:
    """A task for CSV_COLUMNS; what is not known is empty."""
    took_s = attempt_duration(task, math.nan)       # that of what still computes is not known
    cells = {"percent": task["percentCompleted"], "host": task["hostname"], "exit": task["exitCode"],
             "seconds": None if took_s is None or task["finished"] is None else bare_text(took_s)}
    return [cells[name] if name in cells else task[name] for name in CSV_COLUMNS]


def joblog_cells(task: Mapping[str, Any]) -> List[Any]:
    """A task that has ended, for JOBLOG_COLUMNS. A shell says 128 and the number of a signal; so does Exitval."""
    return [task["task"], task["hostname"], "%.3f" % (parse_time(task["started"]) or 0.0),
            "%.3f" % (attempt_duration(task, 0.0) or 0.0), 0, 0,
            0 if task["status"] == "done" else task["exitCode"] or 1, 0, "task %d" % task["task"]]


def latest_ends(client: Client, run_uuid: str, everything: bool, **query: Any) -> Iterator[Dict[str, Any]]:
    """The tasks of a run that ended last, the latest first; all of them if *everything*."""
    pages = every_page(client, run_path(run_uuid, "/tasks"), order="finished", limit=ROWS_AT_ONCE, **query)
    tasks = itertools.chain.from_iterable(pages)
    return tasks if everything else itertools.islice(tasks, LATEST_ENDS)


def say_of_how_many(number: int, all_of_them: int, what: str) -> None:
    """Say of how many ends a table tells."""
    print_notice("of %s" % count_text(number, what) if number >= all_of_them else
                 "of the latest %s of %s: --all looks at all" % (grouped(number), count_text(all_of_them, what)))


def cmd_failures(args: argparse.Namespace) -> int:
    """show what kinds of failures a run has: how many, where, since when

    Failed tasks with the same exit status and the same message are of one kind. * stands for what
    differs in the messages: numbers, also hexadecimal ones, and paths. "tasks" are the latest three. It
    looks at the latest 100 000 failed tasks, and says of how many it tells. "restart" lets a kind wait
    again.

    examples:
      python3 taskfarm.py failures antarctica
      python3 taskfarm.py restart antarctica --exit 137
      python3 taskfarm.py restart antarctica --like 'cannot open *: No space left'
    """
    screen = Screen(sys.stdout, os.environ)
    with open_client(args) as client:
        run = client.ask("GET", run_path(find_run_uuid(client, args.run)))
        kinds = group_failures(latest_ends(client, run["uuid"], args.all, status="failed") if run["numFailed"] else [])
        utc = time.time() + client.clock_ahead_s
    told = sum(kind.count for kind in kinds)
    if args.json:
        print_json({"failed": run["numFailed"], "told": told, "data": [
            {"exitCode": kind.exit_code, "message": kind.message, "count": kind.count, "hosts": dict(kind.hosts),
             "first": kind.first, "last": kind.last, "tasks": kind.tasks} for kind in kinds]})
        return 0
    shown = kinds[:KINDS_SHOWN] if screen.terminal else kinds
    print_table(screen, screen_table(
        screen, Column("failed", True), Column("exit", True), Column("first", True, optional=True, text=duration_text),
        Column("last", True, text=duration_text), Column("hosts", can_shrink=True), Column("tasks", optional=True),
        Column("message", can_shrink=True)), [
            (kind.count, kind.exit_code, seconds_since(kind.first, utc), seconds_since(kind.last, utc),
             kind.hosts_text(), ",".join(map(str, kind.tasks)), kind.message) for kind in shown])
    if len(shown) < len(kinds):
        print_notice("and %d more kinds: 'python3 taskfarm.py failures %s | cat' shows all" % (
            len(kinds) - len(shown), run["uuid"][:8]))
    say_of_how_many(told, run["numFailed"], "failed task")
    if kinds and screen.terminal:
        words = [] if kinds[0].exit_code is None else ["--exit", "%d" % kinds[0].exit_code]
        words += ["--like", cut(kinds[0].message, 60).rstrip("~")] if kinds[0].message else []
        print_notice("this lets the first kind wait again: python3 taskfarm.py restart %s %s" % (
            run["uuid"][:8], " ".join(map(shlex.quote, words)) or "--failed"))
    return 0


KINDS_SHOWN = 20                    # of failures, on a terminal


def cmd_hosts(args: argparse.Namespace) -> int:
    """show which hosts are slow, and which fail

    For each host the tasks that ended there, how many of them failed, and of those that are done the
    seconds that half of them and 95 % of them took at most. "times" is its median in medians of the run:
    2 is half as fast. "memory" is the peak of its largest task. "lost" are workers whose lease ran out
    since the run was made, of whatever run. Hosts with the largest share of failures come first, then
    the slowest.

    It looks at the latest 100 000 ends, and says of how many it tells. Of a task that was tried
    several times, the last end counts.

    examples:
      python3 taskfarm.py hosts antarctica
      python3 taskfarm.py hosts antarctica | awk -F '\t' '$3 > 10 {print $1}'
    """
    screen = Screen(sys.stdout, os.environ)
    with open_client(args) as client:
        run = client.ask("GET", run_path(find_run_uuid(client, args.run)))
        together, hosts = group_hosts(latest_ends(client, run["uuid"], args.all))
        for workers in every_page(client, "/api/workers", all=True, limit=ROWS_AT_ONCE):
            for worker in workers:
                if worker["state"] == "expired" and worker["heard"] >= run["created"]:
                    hosts.setdefault(worker["hostname"], HostEnds()).lost += 1
    rows = []
    for name, host in hosts.items():
        median, run_median = host.quantile(0.5), together.quantile(0.5)
        rows.append((name, host.ends, host.failed, host.lost, median, host.quantile(0.95),
                     median / run_median if median is not None and run_median else None, host.memory))
    rows.sort(key=lambda row: (-row[2] / max(row[1], 1), -(row[4] or 0.0), row[0]))
    ended = max(run["numDone"] + run["numFailed"], together.ends)
    if args.json:
        names = ("host", "tasks", "failed", "lost", "median", "p95", "times", "memory")
        print_json({"ended": ended, "told": together.ends, "median": together.quantile(0.5),
                    "p95": together.quantile(0.95), "data": [dict(zip(names, row)) for row in rows]})
        return 0
    print_table(screen, screen_table(
        screen, Column("host", can_shrink=True), Column("tasks", True), Column("failed", True),
        Column("lost", True, optional=True), Column("median", True, text=duration_text),
        Column("95 %", True, optional=True, text=duration_text), Column("times", True, text="%.2f".__mod__),
        Column("memory", True, optional=True, text=size_text)), rows)
    say_of_how_many(together.ends, ended, "end")
    return 0


CONTROLS = re.compile(b"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]")


def cmd_log(args: argparse.Namespace) -> int:
    """print the output of the last failed attempt of a task

    It is there when its worker had --log-dir, and is read where that worker wrote it: a log on the disk
    of another host cannot be seen from here. Then there is a message that names the host and the path.
    On a terminal control characters become question marks.

    examples:
      python3 taskfarm.py log antarctica 4711
      python3 taskfarm.py log $run 0 | less
    """
    with open_client(args) as client:
        task = client.ask("GET", run_path(find_run_uuid(client, args.run), "/tasks/%d" % args.task))
    if args.json:
        print_json(task)
        return 0
    if not task["log"]:
        raise Refusal("no log of task %d is known: workers with --log-dir say where it is when an attempt fails, until "
                      "the task is done" % args.task)
    host = task["hostname"] if task["finished"] else None       # else somebody has claimed it since
    where = "%s on %s" % (task["log"], host or "the host of an earlier attempt")
    if not re.fullmatch(r"%d(\.[0-9]+)?\.log" % args.task, os.path.basename(task["log"])):
        raise Refusal("%s is not the name of a log of task %d: who reported it may want you to show another file" % (
            task["log"], args.task))
    try:
        descriptor = os.open(task["log"], os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)     # a pipe is not waited for
    except (OSError, ValueError) as error:      # ValueError: it is no path
        raise Refusal("the log of task %d is %s, and cannot be read here: %s" % (
            args.task, where, getattr(error, "strerror", error)))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):      # open() of a folder would raise
        os.close(descriptor)
        raise Refusal("the log of task %d, %s, is no plain file" % (args.task, where))
    with open(descriptor, "rb") as file:
        print_notice("task %d: %s" % (args.task, where))
        for part in iter(lambda: file.read(2 ** 16), b""):
            sys.stdout.buffer.write(CONTROLS.sub(b"?", part) if sys.stdout.isatty() else part)
    sys.stdout.buffer.flush()
    return 0


def limit_rows(pages: Iterator[List[Dict[str, Any]]], limit: int) -> Iterator[Tuple[List[Dict[str, Any]], bool]]:
    """Pages with at most *limit* rows in all (0: any number), and of each whether rows after it were left out."""
    count = 0
    for rows in pages:
        if limit and count + len(rows) > limit:
            yield rows[:limit - count], True
            return
        count += len(rows)
        yield rows, False


def print_json_rows(pages: Iterator[Tuple[List[Dict[str, Any]], bool]]) -> None:
    """Print pages of rows as one JSON object {"data": [...]}, a line for each row, without all of them in memory."""
    lines = (json.dumps(row) for rows, _ in pages for row in rows)
    sys.stdout.write('{"data": [' + next(lines, ""))
    for line in lines:
        sys.stdout.write(",\n" + line)
    sys.stdout.write("]}\n")


def cmd_workers(args: argparse.Namespace) -> int:
    """list the workers that are alive, and how many tasks they hold

    "heard" is how long ago the last request of a worker came. After "lease" without a request its tasks
    wait again.

    examples:
      python3 taskfarm.py workers
      python3 taskfarm.py workers --all --json
    """
    screen = Screen(sys.stdout, os.environ)
    query = {"all": True} if args.all else {}
    with open_client(args) as client:
        pages = limit_rows(every_page(client, "/api/workers", limit=ROWS_AT_ONCE, **query), 0)
        if args.json:
            print_json_rows(pages)
            return 0
        table = screen_table(
            screen, Column("host", can_shrink=True), Column("pid", True), Column("state"), Column("holds", True),
            Column("heard", True, text=duration_text), Column("lease", True, optional=True, text=duration_text),
            Column("job", can_shrink=True, optional=True), Column("worker", can_shrink=True, optional=True))
        for workers, _ in pages:
            utc = time.time() + client.clock_ahead_s
            print_table(screen, table, [
                (worker["hostname"], worker["pid"], worker["state"], worker["held"],
                 seconds_since(worker["heard"], utc), worker["lease"], worker["job"], worker["uuid"])
                for worker in workers])
            if not workers and screen.terminal:
                print("none" if args.all else "no worker is alive", file=sys.stderr)
    return 0


def cmd_pause(args: argparse.Namespace) -> int:
    """hand out no task of a run until it is resumed; what computes goes on

    Workers without a task stay for a while (--idle of 'work'). Running commands end as ever, and are reported.
    RUN is the whole name of a run, its uuid, or 8 or more digits that its uuid begins with.

    example:
      python3 taskfarm.py pause antarctica
    """
    return change_run(args, "pause")


def cmd_resume(args: argparse.Namespace) -> int:
    """hand out tasks of a run again that was paused or cancelled

    Tasks that were cancelled by their numbers have failed: 'restart RUN --failed' lets these wait again.
    RUN is the whole name of a run, its uuid, or 8 or more digits that its uuid begins with.

    example:
      python3 taskfarm.py resume antarctica
    """
    return change_run(args, "resume")


def cmd_cancel(args: argparse.Namespace) -> int:
    """give up a run, or some of its tasks; asks first

    Workers end what they compute of it. What is done stays so, and nothing is deleted. A run that was
    cancelled is over: its workers leave. 'resume' or 'restart' lets its other tasks be done all the same.

    Tasks are named by their numbers and ranges of them. They have failed then, with the message
    "cancelled", but for those that are done; 'restart RUN --failed' lets them wait again.
    RUN is the whole name of a run, its uuid, or 8 or more digits that its uuid begins with.

    examples:
      python3 taskfarm.py cancel antarctica
      python3 taskfarm.py cancel antarctica --yes       does not ask: for scripts
      python3 taskfarm.py cancel antarctica 13 17-20
    """
    with open_client(args) as client:
        run_uuid = find_run_uuid(client, args.run, changes=True)
        if not args.yes:
            tasks = sum(last + 1 - first for first, last in args.tasks)
            confirm_change(client, "cancel %s of" % count_text(tasks, "task") if tasks else "cancel", run_uuid,
                           "What workers compute of it is ended.")
        for body in [{"tasks": part} for part in split_ranges(args.tasks)] or [{}]:
            client.ask("POST", run_path(run_uuid, "/cancel"), body)
        print_counts(client, run_uuid)
    return 0


def split_ranges(ranges: Sequence[Tuple[int, int]]) -> List[List[Tuple[int, int]]]:
    """Ranges of tasks in parts that a request may name."""
    parts: List[List[Tuple[int, int]]] = []
    room = 0
    for first, last in sorted(ranges):
        while first <= last:
            if room <= 0 or len(parts[-1]) == MAX_SPANS:
                parts.append([])
                room = MAX_NAMED
            end = min(last, first + room - 1)
            parts[-1].append((first, end))
            room -= end + 1 - first
            first = end + 1
    return parts


def cmd_extend(args: argparse.Namespace) -> int:
    """give a run N more tasks; their numbers follow those that it has

    Workers of the run take them as the others. A run that knows its parameters has one for each task, and
    is not extended. Workers that were given --lines, --table or --grid are started again with more of
    them, and those of the published client are started again as well.
    RUN is the whole name of a run, its uuid, or 8 or more digits that its uuid begins with.

    example:
      python3 taskfarm.py extend antarctica 500
    """
    return change_run(args, "extend", {"numTasks": args.tasks})


def change_run(args: argparse.Namespace, word: str, body: Optional[Dict[str, Any]] = None) -> int:
    """Ask for a change of a run that has no answer, and show its figures."""
    with open_client(args) as client:
        run_uuid = find_run_uuid(client, args.run, changes=True)
        client.ask("POST", run_path(run_uuid, "/" + word), body)
        print_counts(client, run_uuid)
    return 0


def print_counts(client: Client, run_uuid: str) -> None:
    """Print how many tasks of a run are in each state, and what holds it up."""
    run = client.ask("GET", run_path(run_uuid))
    held_up = ask_hold_up(client, run)
    print("run %s: %s" % (run_uuid, state_counts(run) + ("; " + pasteable(held_up.why) if held_up else "")))


def cmd_restart(args: argparse.Namespace) -> int:
    """let tasks of a run wait again: those not done, the failed ones, some, or all

    Without an option, tasks stay as they are that are done, or that a worker alive computes. With --all
    the run begins anew: no task counts as done any more. So --all asks first.

    Numbers of tasks, --exit and --like narrow that: to these tasks, to the failed ones with that exit
    status, to the failed ones whose message contains TEXT, in which * stands for anything ('failures'
    shows such texts). With --all, tasks that are named wait again also when they are done or computed.
    RUN is the whole name of a run, its uuid, or 8 or more digits that its uuid begins with.

    examples:
      python3 taskfarm.py restart antarctica
      python3 taskfarm.py restart antarctica --failed
      python3 taskfarm.py restart antarctica 13 17-20
      python3 taskfarm.py restart antarctica --exit 137
      python3 taskfarm.py restart antarctica --like 'cannot open *: No space left'
      python3 taskfarm.py restart antarctica --all
      python3 taskfarm.py restart antarctica --all --yes    does not ask
    """
    query = "?all=True" if args.all else "?status=failed" if args.failed else ""
    with open_client(args) as client:
        run_uuid = find_run_uuid(client, args.run, changes=True)
        body = {name: value for name, value in (
            ("tasks", args.numbers or None), ("exitCode", args.exit), ("like", args.like)) if value is not None}
        if args.all and not args.yes and not body:
            confirm_change(client, "restart", run_uuid, "No task will count as done any more.")
        parts = [dict(body, tasks=part) for part in split_ranges(args.numbers)] or [body]
        answers = [client.ask("POST", run_path(run_uuid, "/restart" + query), part or None) for part in parts]
        if body:
            restarted = sum(answer["restarted"] for answer in answers)
            print("%s again" % ("1 task waits" if restarted == 1 else "%d tasks wait" % restarted))
            named = sum(last + 1 - first for first, last in args.numbers)
            if restarted < named and not args.all:
                print_notice("what is done, waits already or is being computed stays as it is; --all takes it too")
        print_counts(client, run_uuid)
    return 0


def cmd_delete(args: argparse.Namespace) -> int:
    """delete a run with its tasks; asks first

    Workers that compute for it end their commands. Only a copy of the file ('backup') brings it back.
    RUN is the whole name of a run, its uuid, or 8 or more digits that its uuid begins with.

    examples:
      python3 taskfarm.py delete antarctica
      python3 taskfarm.py delete 3f2a91c4 --yes       does not ask: for scripts
    """
    with open_client(args) as client:
        run_uuid = find_run_uuid(client, args.run, changes=True)
        if not args.yes:
            confirm_change(client, "delete", run_uuid, "Its tasks and results will be gone.")
        client.ask("DELETE", run_path(run_uuid))
    print("run %s is deleted" % run_uuid)
    return 0


def confirm_change(client: Client, what: str, run_uuid: str, loss: str) -> None:
    """Ask whether a run may be changed; *loss* is the sentence that says what is lost. Raises Refusal for no."""
    run = client.ask("GET", run_path(run_uuid))
    name = " (%s)" % printable(run["name"]) if run.get("name") else ""
    if not confirm("%s run %s%s: %s? %s" % (what, run_uuid, name, state_counts(run), loss)):
        raise Refusal("nothing was changed")


def confirm(question: str, otherwise: str = "") -> bool:
    """Ask on the terminal: whether the answer is y or yes. Without one, raises Refusal with what does *otherwise*."""
    if not sys.stdin.isatty():
        raise Refusal("%s This is no terminal to answer on: %s" % (
            question.replace("\n", " "), otherwise or "'%s' answers yes" % typed_line("--yes")))
    print("%s [y/N] " % question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def cmd_token_new(args: argparse.Namespace) -> int:
    """make a token, a login for a program, and print it

    With the scope work it claims and reports tasks, with read it only looks, with full it may do all
    that you may. With --run it reaches that run alone. It is shown this once: give it to a program in
    TASKFARM_TOKEN, or as the user name of the published client. Where there is no access file, verbs and
    workers also need TASKFARM_URL, and TASKFARM_FINGERPRINT as the start of the server prints it.

    examples:
      python3 taskfarm.py token new --run antarctica --days 30 --label "GPU nodes"
      TASKFARM_TOKEN=$(python3 taskfarm.py token new --scope read)
    """
    with open_client(args) as client:
        body = {"scope": args.scope, "days": args.days, "label": args.label,
                "run": find_run_uuid(client, args.run, changes=True) if args.run else None}
        token = client.ask("POST", "/api/tokens", {name: value for name, value in body.items() if value is not None})
    print(token["token"])
    print_notice("token %d, scope %s, %s, %s: 'python3 taskfarm.py token revoke %d' ends it" % (
        token["id"], token["scope"], "run %s alone" % token["run"] if token["run"] else "for all runs",
        "until " + token["expires"] if token["expires"] else "with no end", token["id"]))
    return 0


def cmd_token_list(args: argparse.Namespace) -> int:
    """list your tokens, but not the texts that log in

    The one in the access file is among them. Sessions, which programs with a password get for
    themselves, are not: they end by themselves, and with the password.

    examples:
      python3 taskfarm.py token list
      python3 taskfarm.py token list --json
    """
    screen = Screen(sys.stdout, os.environ)
    with open_client(args) as client:
        pages = limit_rows(every_page(client, "/api/tokens", limit=ROWS_AT_ONCE), 0)
        if args.json:
            print_json_rows(pages)
            return 0
        table = screen_table(
            screen, Column("id", True), Column("scope"), Column("run", can_shrink=True),
            Column("age", True, text=duration_text), Column("ends"), Column("label", can_shrink=True))
        for tokens, _ in pages:
            utc = time.time() + client.clock_ahead_s
            print_table(screen, table, [
                (token["id"], token["scope"], token["run"] or "all", seconds_since(token["created"], utc),
                 token["expires"] and token["expires"][:10], token["label"]) for token in tokens])
    return 0


def cmd_token_revoke(args: argparse.Namespace) -> int:
    """revoke tokens: from now on they log in nobody

    Programs that use them are refused from their next request on. To change the password revokes all.

    example:
      python3 taskfarm.py token revoke 7 8
    """
    with open_client(args) as client:
        own = "tf1.%d."
        for token_id in sorted(args.ids, key=lambda token_id: client.access.token.startswith(own % token_id)):
            client.ask("DELETE", "/api/tokens/%d" % token_id)
            print("token %d is revoked" % token_id)
        if any(client.access.token.startswith(own % token_id) for token_id in args.ids):
            print_notice("one of them was this login, of %s: 'python3 taskfarm.py login %s' makes another, and so does "
                         "the next start of the server" % (client.access.source, client.access.url))
    return 0


def cmd_login(args: argparse.Namespace) -> int:
    """make an access file for a server elsewhere, so that verbs and workers here find it

    It is not needed where the home directory of the server's user is: the start of the server writes the
    access file there. The server must show its certificate first. Its start has printed a fingerprint of
    that, and this shows it again and asks whether they are the same; a script gives it by --fingerprint. From then
    on no other certificate is taken for the farm's. Where the authorities of this system vouch for the
    certificate and the host's name, nothing is asked. The password comes from the terminal, or as one line
    of standard input.

    examples:
      python3 taskfarm.py login login1.cluster:5000
      python3 taskfarm.py login https://localhost:5000 --user alice
      python3 taskfarm.py login login1:5000 --fingerprint SHA256:5f1c... < password

    The second one is for the near end of a tunnel: ssh -L 5000:localhost:5000 login1
    """
    url = base_url(args.url if "://" in args.url else "https://" + args.url)
    user = args.user or default_user_name()
    access = Access(url, user, "", "", "system", "", "the argument")
    certificate = chosen_certificate(access, args.fingerprint and check_fingerprint(args.fingerprint))
    access = access._replace(certificate=certificate, password=read_password(user))
    with contextlib.closing(Client(lambda: access)) as client:
        answer = client.ask("GET", "/api/token")
        answer["token"] = client.ask("POST", "/api/tokens", {
            "scope": "full", "days": LOGIN_DAYS, "label": "login on " + printable(socket.gethostname())[:80]})["token"]
    path = login_path(os.environ, url)
    try:
        write_access(path, {"url": url, "user": user, "token": answer["token"], "farm": answer["farm"],
                            "certificate": access.certificate, "host": socket.gethostname()})
    except OSError as error:
        raise Refusal("the access file %s cannot be written: %s" % (path, error.strerror))
    print("%s now holds address and login of %s, for user %s" % (path, url, user))
    if path != access_path(os.environ):
        print("%s stays as it is, since another farm answers at its address: export TASKFARM_ACCESS=%s chooses this one"
              % (access_path(os.environ), path))
    return 0


def chosen_certificate(access: Access, wanted: str) -> str:
    """The `certificate` of an access file for the server at a URL, which is sent nothing. Raises Refusal for no.

    *wanted*: its fingerprint, where the user has said that.
    """
    if not wanted:
        with contextlib.suppress(OtherFarm), contextlib.closing(Client(lambda: access)) as client:
            client.connect()
            return "system"
    with contextlib.closing(open_tls(access, any_context(), CLIENT_TIMEOUT_S)) as connection:
        certificate = shown_certificate(connection)
    shown = fingerprint(certificate)
    known = find_access_file(access_path(os.environ), url=access.url)
    with contextlib.suppress(Refusal):      # the one that is known may be damaged, which is why somebody logs in again
        wanted = wanted or (shown if known and trust(known)[1] == shown else "")
    if wanted and wanted != shown:
        raise Refusal("%s shows another certificate, %s: no login was sent. Compare with what the server printed when "
                      "it was started; if that is not it, somebody else's program answers there" % (access.url, shown))
    if not wanted and not confirm(
            "%s shows the certificate\n  %s\n%sIs this what the server printed when it was started?" % (
                access.url, shown, "It is not the one that %s holds.\n" % known.source if known else ""),
            "--fingerprint SHA256:... says which certificate is right"):    # no line to paste: they are to compare
        raise Refusal("no login was sent")
    return certificate


def login_path(environ: Mapping[str, str], url: str) -> str:
    """Where `login` writes: the access file, or a file beside it when that is of another farm that answers."""
    path = access_path(environ)
    present = parse_access(read_access(path), path)
    if environ.get("TASKFARM_ACCESS") or present.url == url or not farm_answers(present):
        return path
    return os.path.join(os.path.dirname(path), "access-%s.json" % re.sub(r"[^A-Za-z0-9.-]+", "-", url.split("://")[1]))


# ---------------------------------------------------------------- UPKEEP
# What the keeper of a farm types: the server, users, copies, checks, measurements. It must not use SQL: it names
# operations, and `LocalFarm` sends them to the server where one has the file.
#
# A new verb: `cmd_x(args)` here, which returns the exit status and whose docstring is its help; its options in
# `make_parser` in COMMAND LINE, its name in VERB_GROUPS there, in VERBS of the tests, and in README.

def take_lock(db: str) -> Lock:
    """The lock of a file, for a server or a verb. Raises Refusal, and InUse when a server has the file.

    The locks of some file systems work within one machine only (NFS mounted with nolock or local_lock). So a server
    of another machine that did not end cleanly is asked at its address. If it does not answer, it has ended, as after
    a crash of its machine, and the farm must be able to go on. A loopback address cannot be asked from here. Then a
    person has to look.
    """
    lock = Lock(db)
    last = lock.left
    if not last or last.get("machine") == machine_id():
        return lock
    try:
        elsewhere = last.get("host") != socket.gethostname()    # else our machine has been started again since
        if elsewhere and is_loopback(str(last.get("url"))):
            raise Refusal("process %s on %s served %s last, did not end cleanly and cannot be asked from here. Start "
                          "the server on %s, or see there that the process has ended and remove %s" % (
                              last.get("pid"), last.get("host"), db, last.get("host"), lock.path))
        if farm_answers(parse_access(last, lock.path)):
            raise InUse("%s is in use: %s, and the locks of this file system do not work between machines. If this is "
                        "a copy of that server's file, remove %s" % (db, described(last), lock.path))
    except BaseException:
        lock.close()
        raise
    if elsewhere:
        log.warning("process %s on %s served %s last, did not end cleanly and does not answer at %s: it has probably "
                    "ended. If it runs, end it at once: two servers ruin the file",
                    last.get("pid"), last.get("host"), db, last.get("url"))
    return lock


def farm_access_path(environ: Dict[str, str], identity: str, url: str, db: str,
                     beside: bool = False) -> str:
    """Where this farm writes: the access file, or a file beside it when that is of another farm that answers.

    Another one may be of this identity too: the server of the file that this one is a copy of. *beside*: in any case,
    since this server ends with the command that it serves.
    """
    path = access_path(environ)
    access = parse_access(read_access(path), path)
    if not beside and (not access.farm or access.url == url or not farm_answers(access)):
        return path
    name = re.sub(r"[^A-Za-z0-9._-]", "_", os.path.splitext(os.path.basename(db))[0])
    return os.path.join(os.path.dirname(path), "access-%s-%s.json" % (name, identity[:8]))


def access_entries(service: Service, user: User) -> Dict[str, Any]:
    """What the access file says of this server, with the login of a user. Raises FarmError when that cannot be made."""
    token = service.store.call(access_token(user))
    return {"url": service.url, "user": user.name, "token": service.farm.token_text(token.id),
            "farm": service.store.identity, "certificate": service.certificate, "host": socket.gethostname(),
            "served": True}


def publish_access(service: Service, user: User, db: str, beside: bool = False) -> None:
    """Write the access file, with a token of *user*, the same until it is revoked or the password changes.

    Raises OSError, also when there is no token and the disk takes none.
    """
    environ = dict(os.environ)
    identity = service.store.identity
    try:
        path = farm_access_path(environ, identity, service.url, db, beside)
        access = access_entries(service, user)
    except (Refusal, FarmError) as error:
        raise OSError(errno.EPERM, str(error))
    try:
        write_access(path, access)
    except OSError:
        if read_access(path) != access:     # else the last start wrote the same
            raise
    if path != access_path(environ) and not beside:
        log.warning("another farm, or another copy of this one, answers at the address in %s, so the access file is "
                    "%s: export TASKFARM_ACCESS=%s chooses it", access_path(environ), path, path)


def make_first_user(store: Store, db: str) -> User:
    """Make the first user, and show the password once if there is a terminal. Raises Unavailable on a full disk."""
    name, password = default_user_name(), secrets.token_urlsafe(12)
    user: User = store.call(add_user(name, hash_password(password)))
    if sys.stdout.isatty():
        print(pasteable("user %s, password %s   (shown this once; 'python3 taskfarm.py user passwd %s --db %s' sets "
                        "another)" % (name, password, shlex.quote(name), shlex.quote(db))))
    return user


def notify_systemd(state: str) -> None:
    """Tell systemd our state: one datagram to $NOTIFY_SOCKET (sd_notify(3)), if that is set."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with contextlib.suppress(OSError), contextlib.closing(
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
            sock.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def host_name(text: str) -> str:
    """A host's name without scheme, port and path."""
    if not re.fullmatch("[A-Za-z0-9._-]+", text):
        raise argparse.ArgumentTypeError("a name as farm.example.org is wanted, without http:// and :PORT, not %r"
                                         % text)
    return text


def cmd_serve(args: argparse.Namespace) -> int:
    """serve a farm from one file (the verb that runs when none is given)

    A file that does not exist is made, with a first user. Every start writes the access file
    (~/.config/taskfarm/access.json): there clients and workers find address and login. Without --host
    only programs on this machine reach the server.

    examples:
      python3 taskfarm.py --db runs.sqlite                   for this machine
      python3 taskfarm.py --db runs.sqlite --host 0.0.0.0    for the whole cluster
      python3 taskfarm.py --db runs.sqlite --port 0          on any free port
      python3 taskfarm.py --db runs.sqlite --private         to each user their own
    """
    logging.basicConfig(format="%(asctime)s taskfarm: %(message)s", level=logging.INFO)
    raise_descriptor_limit()
    access_log = open_access_log(args.access_log)
    for name in args.allow_host:        # the variable has not been looked at yet
        try:
            host_name(name)
        except argparse.ArgumentTypeError as error:
            raise Refusal("TASKFARM_ALLOW_HOST: %s" % error)
    if bool(args.tls_cert) != bool(args.tls_key):
        raise Refusal("--tls-cert and --tls-key go together: the certificate, and the key that it is for")
    service = Service(args.db, args.host, args.port, args.advertise, args.token_days, access_log, take_lock=take_lock,
                      plain_http=args.plain_http, tls_files=(args.tls_cert, args.tls_key) if args.tls_cert else None,
                      allow_hosts=args.allow_host, private=args.private)

    def stop(*_: Any) -> None:
        notify_systemd("STOPPING=1")
        service.stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    # The end of the terminal is not the end of the farm either.
    signal.signal(signal.SIGHUP, lambda *_: service.read_certificate_again())
    with contextlib.ExitStack() as undo:
        undo.callback(service.close)
        announce(service, args.db)
        undo.pop_all()
    service.serve()
    return 0


def announce(service: Service, db: str, beside: bool = False) -> User:
    """Tell users, clients and systemd where the server is; whose login the access file has.

    On a full disk that file is written later. *beside*: it is a file beside that of the farms that stay.
    """
    users = service.store.users
    user = users.get(default_user_name()) or next(iter(users.values()), None) or make_first_user(service.store, db)

    def publish(user: User) -> None:
        service.files.write("the access file " + access_path(os.environ),
                            lambda: publish_access(service, user, db, beside),
                            "clients need TASKFARM_URL and a login, or set XDG_CONFIG_HOME to a folder that can be "
                            "written")
    publish(user)
    service.farm.renewed = lambda renewed: publish(renewed) if renewed.name == user.name else None
    service.certificate_renewed = lambda: publish(service.store.users.get(user.name, user))
    host, port = service.server.server_address[:2]
    print_started("taskfarm %s serves %s at %s\ncertificate %s%s%s" % (
        __version__, db, service.url, fingerprint(service.certificate),
        "\nprivate: users see and touch their own runs and workers only" if service.farm.private else "",
        "\nfor this machine alone: workers on other nodes need --host 0.0.0.0" if is_loopback(
            url_of(str(host), port)) else ""))
    notify_systemd("READY=1\nSTATUS=serving %s at %s" % (db, service.url))
    return user


def print_started(sentence: str) -> None:
    """Print the line that tells where the server is. An error of that, as on a full disk, does not end the server."""
    try:
        print(sentence, flush=True)
    except OSError as error:
        log.warning("%s (the standard output does not take this line: %s)", sentence, error.strerror)


def cmd_bench(args: argparse.Namespace) -> int:
    """measure how many workers this machine can feed

    Starts a server of its own on a temporary file (with --dir on the disk that matters) and sends it
    requests from other processes. Tasks given twice or never are counted; both must be 0. Profiles:

      constant  the same parser and login, a fixed answer: to compare others with
      lean      claim, done
      tls       the same over TLS
      paper     as the published client's test: claim, read, ten updates, done
      batch     claims and results of up to 10 000 tasks, in the store and over HTTP
      makespan  tasks of mixed length by real workers, beside greedy list scheduling
      life      one run from its first task to its last, in batches
      flat      whether costs stay the same with many tasks and runs
      fair      how long one client waits beside others that do their worst

    examples:
      python3 taskfarm.py bench
      python3 taskfarm.py bench --profile constant,lean --clients 1,64 --seconds 5
      python3 taskfarm.py bench --profile flat,life --rows 10000000
      python3 taskfarm.py bench --profile fair --case pipelined,beats --tries 1
    """
    profiles = chosen(args.profile, PROFILES, "profile")
    cases = [FAIR_CASES[name] for name in chosen(args.case, FAIR_CASES, "case")]
    raise_descriptor_limit()
    return in_own_group(lambda folder: measure(args, profiles, cases, folder), args.dir)


PROFILES = (*REQUEST_PROFILES, "batch", "makespan", "life", "flat", "fair")


def chosen(names: str, known: Iterable[str], kind: str) -> List[str]:
    """Some names with commas between, each a known one; all that are known for "". Raises Refusal."""
    words = names.split(",") if names else list(known)
    unknown = sorted(set(words) - set(known))
    if unknown:
        raise Refusal("there is no %s %s: %s are" % (kind, ", ".join(unknown), ", ".join(known)))
    return words


def measure(args: argparse.Namespace, profiles: Sequence[str], cases: Sequence[FairCase], folder: str) -> int:
    """Measure profile after profile, and print the figures."""
    points: List[Dict[str, Any]] = []
    pairs = [(profile, clients) for clients in args.clients for profile in profiles if profile in REQUEST_PROFILES]
    rows = args.rows or 10 ** 6
    with Progress("bench") as progress:
        if pairs or {"batch", "makespan"} & set(profiles):
            server = BenchServer(os.path.join(folder, "farm.sqlite"))
            for number, (profile, clients) in enumerate(pairs):
                progress.what = "%s, %s" % (profile, count_text(clients, "client"))
                progress.show(number, len(pairs))
                points.append(bench_point(server, profile, clients, args.seconds, args.processes))
            if "batch" in profiles:
                points.append(bench_batch(folder, server, args.seconds, args.processes, progress))
            if "makespan" in profiles:
                points.append(bench_makespan(folder, server, progress))
            server.stop()
        if "life" in profiles:
            points.append(bench_life(folder, rows))
        if "flat" in profiles:
            points.append(bench_flat(folder, rows, args.seconds, progress))
        if "fair" in profiles:
            points.append(bench_fair(folder, cases, args.rows or FAIR_ROWS, args.seconds, args.tries, progress))
    if args.json:
        print_json(points)
        return 0
    if pairs:
        print(bench_table(points[:len(pairs)]))
    tables = {"batch": batch_table, "makespan": makespan_table, "life": life_table, "flat": flat_table,
              "fair": fair_table}
    for point in points[len(pairs):]:
        print(tables[point["profile"]](point))
    return 0


def open_access_log(name: str) -> Any:
    """The access log: a file to append to, or the standard output for "-", or None for "". Raises Refusal."""
    if name in ("", "-"):
        return sys.stdout if name else None
    refuse_link(name, {os.geteuid()})
    follow = 0 if os.path.islink(name) else os.O_NOFOLLOW
    try:
        descriptor = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | follow, 0o600)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            keep_private(descriptor, name, {os.geteuid()})
        return os.fdopen(descriptor, "a", encoding="utf-8")
    except OSError as error:
        raise Refusal("the access log %s cannot be opened: %s" % (name, error.strerror))


class LocalFarm:
    """The farm in a file, for verbs on its machine: through the server that has the file, or directly if none has."""

    def __init__(self, db: str) -> None:
        try:
            os.stat(db)
        except FileNotFoundError:
            raise Refusal("there is no %s: 'python3 taskfarm.py --db %s' makes it and serves it" % (
                db, shlex.quote(db)))
        except OSError as error:
            raise Refusal("%s cannot be read: %s" % (db, error.strerror))
        self.db = db

    @contextlib.contextmanager
    def store(self) -> Iterator[Optional[Store]]:
        """The open store, or None when a server has the file: then `ask_server` asks that."""
        try:
            lock = take_lock(self.db)
        except InUse as in_use:
            self.holder = read_holder(self.db)
            self.in_use = in_use
            if "secret" not in self.holder:
                raise
            yield None
            return
        try:
            with contextlib.closing(Store(self.db)) as store:
                yield store
        finally:
            lock.close()

    def ask_server(self, method: str, path: str, body: Optional[Dict[str, Any]] = None) -> Any:
        """Ask the server that has the file. Raises FarmError, and Refusal when it does not answer."""
        access = parse_access(dict(self.holder, url=self.holder["admin_url"], token=self.holder["secret"]), self.db)
        with contextlib.closing(Client(lambda: access)) as client:
            try:
                return client.ask(method, path, body)
            except OtherFarm:
                raise Refusal("%s, but what answers at %s has another certificate than %s says: the secret was not "
                              "sent" % (self.in_use, access.url, lock_path(self.db)))
            except Unreachable:
                host = self.holder.get("host")
                raise Refusal("%s, but it does not answer here: %s" % (self.in_use, (
                    "it may be starting or stopping, try again" if host == socket.gethostname()
                    else "run this on %s" % host)))

    def ask(self, method: str, path: str, named: Operation, body: Optional[Dict[str, Any]] = None) -> Any:
        """Send a request to the server that has the file, or run the operation here if none has."""
        with self.store() as store:
            return store.call(named) if store else self.ask_server(method, path, body)

    @contextlib.contextmanager
    def copy(self) -> Iterator[str]:
        """Make a consistent copy beside the file, with a progress bar. It is removed at the end. Raises Refusal."""
        with self.store() as store, Progress("copying") as progress:
            if store:
                copy = store.call(begin_copy(secrets.token_hex(8)))
                store.copy(copy, lambda: progress.show(copy.copied, copy.total))
                path, ended = copy.path, copy.ended
            else:
                path, ended = self._copy_by_server(progress)
        if ended != Copy.DONE:
            raise Refusal(ended)
        try:
            yield path
        finally:
            remove_database(path)

    def _copy_by_server(self, progress: Progress) -> Tuple[str, str]:
        path = str(self.ask_server("POST", "/api/backup")["path"])
        try:
            while True:
                time.sleep(0.1)
                state = self.ask_server("GET", "/api/backup")
                if state["path"] != path:       # another was begun since
                    return path, Copy.DONE if os.path.exists(path) else "the copy was not made: the log says why"
                progress.show(state["copied"], state["total"])
                if state["ended"]:
                    return path, state["ended"]
        except KeyboardInterrupt:
            self.ask_server("DELETE", "/api/backup", {"path": path})
            raise


def place_copy(path: str, target: str) -> None:
    """Give a copy the name *target*, also on another file system. It is durable, and its mode is 0600.

    Raises Refusal, also when there is a file of that name. Then *target* is as it was.
    """
    made = False
    try:
        try:
            os.link(path, target)
            made = True
        except FileExistsError:
            raise
        except OSError:     # another file system, or one without links
            descriptor = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
            made = True
            with open(path, "rb") as source, os.fdopen(descriptor, "wb") as file:
                shutil.copyfileobj(source, file, 2 ** 20)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(target)
    except FileExistsError:
        raise Refusal("%s is there already: name a file that is not" % target)
    except OSError as error:
        if made:
            remove_if_there(target)
        raise Refusal("%s cannot be made: %s" % (target, error.strerror))


def cmd_check(args: argparse.Namespace) -> int:
    """check that the file keeps its promises: counters, intervals, ranges, and SQLite's own integrity

    Prints a line for each thing that is wrong, and exits with 1 if there is any. While the farm is
    served, the server makes a copy beside the file; the copy is checked and removed.

    example:
      python3 taskfarm.py check --db runs.sqlite
    """
    local = LocalFarm(args.db)
    with local.store() as store:
        wrong = store.call(check()) if store else None
    if wrong is None:
        with local.copy() as copy, contextlib.closing(Store(copy)) as store:
            wrong = store.call(check())
    for sentence in wrong:
        print(sentence)
    if not wrong:
        print("%s is sound" % args.db)
    return 1 if wrong else 0


def cmd_backup(args: argparse.Namespace) -> int:
    """make a consistent copy of the file, also while the farm is served

    The copy is the file as it is when the copying ends. It holds the users and the key of their tokens
    too. It is made beside the file, where there must be room for it, and then moved.

    example:
      python3 taskfarm.py backup --db runs.sqlite runs-monday.sqlite
    """
    if os.path.lexists(args.copy):
        raise Refusal("%s is there already: name a file that is not" % args.copy)
    with LocalFarm(args.db).copy() as copy:
        place_copy(copy, args.copy)
    print("%s is a copy of %s" % (args.copy, args.db))
    return 0


def ask_new_password(name: str) -> str:
    """A new password. On the terminal it is typed twice. Raises Refusal."""
    password = read_password(name)
    if sys.stdin.isatty() and getpass.getpass("once more: ") != password:
        raise Refusal("the two passwords differ: nothing was changed")
    if not password:
        raise Refusal("the password is empty: nothing was changed")
    return password


def cmd_user_add(args: argparse.Namespace) -> int:
    """add a user; the password comes from the terminal, or as one line of standard input

    example:
      python3 taskfarm.py user add alice --db runs.sqlite
    """
    local, name = LocalFarm(args.db), check_name(args.name)
    password = hash_password(ask_new_password(name))
    local.ask("POST", "/api/users", add_user(name, password), {"name": name, "password": password})
    print("user %s is added" % name)
    return 0


def cmd_user_list(args: argparse.Namespace) -> int:
    """list the users

    example:
      python3 taskfarm.py user list --db runs.sqlite
    """
    answer = LocalFarm(args.db).ask("GET", "/api/users", list_users())
    for name in answer["data"] if isinstance(answer, dict) else [user.name for user in answer]:
        print(name)
    return 0


def cmd_user_passwd(args: argparse.Namespace) -> int:
    """set another password; every token of the user becomes invalid

    example:
      python3 taskfarm.py user passwd alice --db runs.sqlite
    """
    local, name = LocalFarm(args.db), normal(args.name)
    password = hash_password(ask_new_password(name))
    local.ask("PUT", "/api/users/" + urllib.parse.quote(name, safe=""), set_password(name, password),
              {"password": password})
    print("user %s has another password" % name)
    return 0


def cmd_user_remove(args: argparse.Namespace) -> int:
    """remove a user; every token of the user becomes invalid

    example:
      python3 taskfarm.py user remove alice --db runs.sqlite
    """
    name = normal(args.name)
    LocalFarm(args.db).ask("DELETE", "/api/users/" + urllib.parse.quote(name, safe=""), remove_user(name))
    print("user %s is removed" % name)
    return 0


def cmd_audit(args: argparse.Namespace) -> int:
    """tell who logged in, failed to, and made, restarted, deleted or revoked what, the newest last

    A login is listed the first time a day for each user and address; those that failed, once a minute at
    most, with their number. "(administration)" is whoever can read the lock file: the verbs with --db.

    examples:
      python3 taskfarm.py audit --db runs.sqlite | tail
      python3 taskfarm.py audit --db runs.sqlite --json
    """
    local, screen = LocalFarm(args.db), Screen(sys.stdout, os.environ)

    def pages() -> Iterator[List[Dict[str, Any]]]:
        after: Any = 0
        with local.store() as store:
            while after is not None:
                if store:
                    page = store.call(list_audit(ROWS_AT_ONCE, int(after)))
                    lines, after = [audit_json(line) for line in page.entries], page.after
                else:
                    answer = local.ask_server("GET", "/api/audit?limit=%d&after=%s" % (ROWS_AT_ONCE, after))
                    lines, after = answer["data"], answer["next"]
                yield lines
    if args.json:
        print_json_rows(limit_rows(pages(), 0))
        return 0
    table = screen_table(screen, Column("when"), Column("user"), Column("from", optional=True),
                         Column("times", True, optional=True), Column("action"), Column("what", can_shrink=True))
    for lines in pages():
        print_table(screen, table, [
            (line["utc"], "(administration)" if line["user"] is None else line["user"] or "(unknown)", line["address"],
             line["times"], line["action"], line["object"]) for line in lines])
    return 0


def cmd_doctor(args: argparse.Namespace) -> int:
    """say whether this node is fit to serve and to work, and what to do where it is not

    Tries Python, SQLite, the folder of --db (or this one), its locks, the port and the limits of this
    user. Then it tries whether this node reaches the server that verbs and workers use, and whether the
    login works. It prints a line for each, with ok, warn or FAIL. Exit status 1 when something fails.

    examples:
      python3 taskfarm.py doctor --db runs.sqlite    before a server is started
      srun python3 taskfarm.py doctor                before workers are started
    """
    screen = Screen(sys.stdout, os.environ)
    findings = []
    checks: List[Tuple[str, Check]] = [
        ("programs", check_programs), ("folder", lambda: check_folder(args.db)),
        ("port %d" % args.port, lambda: check_port(args.host, args.port)), ("limits", check_limits),
        ("job", check_job), ("home", check_home), ("server", lambda: check_server(args.url))]
    for finding in run_checks(checks):
        findings.append(finding)
        if not args.json:
            screen.print(finding_lines(finding, screen))
    failed = any(finding.verdict == FAIL for finding in findings)
    if args.json:
        print_json({"fit": not failed, "data": [finding._asdict() for finding in findings]})
    sys.stdout.flush()
    return 1 if failed else 0


def finding_lines(finding: Finding, screen: Screen) -> List[str]:
    """A finding as a line. On a terminal a long sentence is wrapped, and goes on below its first words."""
    head = "%-4s  %-12s" % (finding.verdict, finding.what)
    colour = {OK: "green", WARN: "yellow", FAIL: "red"}[finding.verdict]
    says = printable(finding.says)
    first, *others = textwrap.wrap(says, max(screen.columns - len(head) - 1, 20)) if screen.columns else [says]
    return [screen.paint(head[:4], colour) + head[4:] + first] + [" " * len(head) + line for line in others]


# ---------------------------------------------------------------- SUBMIT
# Workers by a batch system: one array of jobs for a run, sized by the farm's own figures. What is asked for is made by
# plain functions, and sent in one place. Another option: a field of JobPlan, its words for both systems in
# `submit_words`, and the option in COMMAND LINE.

PLANNED_ARRAY = 1000                # jobs that any Slurm takes as one array; for more it is asked
LARGEST_PBS_ARRAY = 10000           # as long as nobody has told the server otherwise
SEND_LIMIT_S = 60.0                 # sbatch and qsub may wait for a busy controller
SEND_AGAIN_S = (5.0, 20.0, 40.0)    # a call without an answer is looked up after so long; all but the last time it is
                                    # made again if it was lost
NOT_SHARED = ("/tmp", "/var/tmp", "/dev/shm", "/run")       # folders that each node has for itself


class JobPlan(NamedTuple):
    """What a batch system is asked for."""
    system: str
    name: str
    width: int                      # jobs at a time
    total: int                      # jobs in all
    walltime_s: int                 # of each
    jobs: Optional[int]             # commands at a time in each; None: the user's options say
    folder: str                     # of the output, a whole path
    extra: List[str]                # options of the user for sbatch or qsub
    setup: List[str]                # lines of shell before the worker
    exports: Dict[str, str]         # variables of the job
    words: List[str]                # the worker


def submit_words(plan: JobPlan) -> List[str]:
    """The call that sends an array. The script is its standard input. The user's options come last, so they count."""
    if plan.system == "Slurm":
        return ["sbatch", "--parsable", "-J", plan.name, "--array=1-%d%%%d" % (plan.total, plan.width),
                "-t", clock_text(plan.walltime_s), *(["-c", str(plan.jobs)] if plan.jobs else []), "--requeue",
                "--open-mode=append", "-o", "%s/%s-%%A_%%a.out" % (plan.folder.replace("%", "%%"), plan.name),
                *plan.extra]
    sized = any(re.search(r"\b(select|nodes|ncpus)=", word) for word in plan.extra)
    return ["qsub", "-N", plan.name, *(["-J", "1-%d%%%d" % (plan.total, plan.width)] if plan.total > 1 else []),
            *([] if sized else ["-l", "select=1:ncpus=%d" % (plan.jobs or 1)]),
            "-l", "walltime=" + clock_text(plan.walltime_s), "-j", "oe", "-o", plan.folder + "/",
            "-S", shell_for(plan).split()[0], *plan.extra]


def shell_for(plan: JobPlan) -> str:
    """Who reads the script: `module` and its like are functions of a login shell."""
    return "/bin/bash -l" if plan.setup else "/bin/sh"


def job_script(plan: JobPlan) -> str:
    """The script of each job. Without exec Slurm would signal the shell alone."""
    lines = ["#!" + shell_for(plan), "cd %s || exit" % shlex.quote(os.path.dirname(plan.folder))]
    lines += ["export %s=%s" % (name, shlex.quote(value)) for name, value in plan.exports.items()]
    lines += ["{ %s\n} || exit" % line for line in plan.setup]
    return "\n".join([*lines, "exec " + " ".join(map(shlex.quote, plan.words)), ""])


def clock_text(seconds: int) -> str:
    """Seconds as batch systems write them: 4:00:00."""
    return "%d:%02d:%02d" % (seconds // 3600, seconds // 60 % 60, seconds % 60)


def walltime_seconds(text: str) -> int:
    """The seconds of a time limit as Slurm writes it: 90 (minutes), 90:00, 4:00:00, 1-12 or 1-12:00:00. ValueError."""
    found = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?|(\d+)(?::(\d\d?))?(?::(\d\d?))?)", text)
    if not found:
        raise ValueError(text)
    if found.group(1):
        parts = [int(part or 0) for part in found.groups()[:4]]
    else:
        clock = [int(part) for part in found.groups()[4:] if part]
        parts = [0, *([0] * (3 - len(clock)) + clock if len(clock) > 1 else [0, clock[0], 0])]
    days, hours, minutes, seconds = parts
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise ValueError(text)
    return total


def generations_needed(left: int, mean_s: float, at_once: int, walltime_s: float) -> int:
    """How many jobs one after the other it takes, for as many tasks as *at_once* commands do in each. The last task of
    each command is not begun when it would not end in time, so that the walltime counts for less."""
    return max(1, math.ceil(left * mean_s / (at_once * max(walltime_s - mean_s, walltime_s / 10))))


def cores_asked(system: str, jobs: Optional[int], extra: Sequence[str]) -> int:
    """How many commands each job runs at a time, as far as options say; else 1."""
    text = " ".join(extra)
    found = re.findall(r"(?:^| )(?:-c ?|--cpus-per-task[= ])(\d+)" if system == "Slurm" else r"\bncpus=(\d+)", text)
    return jobs or (int(found[-1]) if found else 1)


def refuse_submission(access: Access, run: Mapping[str, Any], took_s: Sequence[float], walltime_s: float,
                      needs_access_file: bool, held_up: Optional[HoldUp] = None) -> None:
    """Refuse jobs that could do nothing. Raises Refusal with what to do."""
    if is_loopback(access.url):
        raise Refusal("the farm at %s can be reached from its own machine alone, and jobs run elsewhere: stop its "
                      "server, and start it with --host 0.0.0.0" % access.url)
    name = run["uuid"][:8]
    if not run["numWaiting"]:
        raise Refusal("no task of run %s waits (%s)%s" % (name, state_counts(run), (
            ": 'python3 taskfarm.py restart %s --failed' lets what failed wait again" % name) * bool(run["numFailed"])))
    if held_up:
        raise Refusal("jobs would find nothing to do: " + held_up.why)
    likely_s = quantile(sorted(took_s), 0.95) + GRACE_S + STOP_EARLY_S if took_s else 0.0
    if likely_s > walltime_s:
        raise Refusal("5 in 100 tasks of run %s took %s or more, and a job would end before them: ask for more than "
                      "-t %s" % (name, duration_text(likely_s), clock_text(int(likely_s) + 1)))
    if not os.path.isfile(access.source):
        if needs_access_file:
            raise Refusal("the login is from %s, which jobs will not have: 'python3 taskfarm.py login %s' makes an "
                          "access file" % (access.source, access.url))
    elif os.path.realpath(access.source).startswith(tuple(folder + "/" for folder in NOT_SHARED)):
        raise Refusal("the access file %s is on this machine alone, and jobs would find no login: set TASKFARM_ACCESS "
                      "to a path that nodes see too, and start the server again or 'login'" % access.source)


def batch_system_here(wanted: str, environ: Mapping[str, str]) -> str:
    """Slurm or PBS, whose programs are here. *wanted*: "slurm", "pbs" or "". Raises Refusal."""
    for system, program in (("Slurm", "sbatch"), ("PBS", "qsub")):
        if wanted in ("", system.lower()) and shutil.which(program, path=environ.get("PATH")):
            return system
    raise Refusal("there is no %s here: type this on a machine from which jobs are submitted" % (
        {"slurm": "sbatch", "pbs": "qsub"}.get(wanted, "sbatch or qsub")))


def largest_array(system: str, count: int, environ: Mapping[str, str]) -> int:
    """How many jobs an array may have, where it is to have so many."""
    if system == "PBS" or count <= PLANNED_ARRAY:
        return LARGEST_PBS_ARRAY
    with contextlib.suppress(BatchTrouble):
        found = re.search(r"MaxArraySize\s*=\s*(\d+)", call_batch(["scontrol", "show", "config"], environ))
        return int(found.group(1)) - 1 if found else PLANNED_ARRAY
    return PLANNED_ARRAY


def arrays_named(plan: JobPlan, environ: Mapping[str, str]) -> Set[str]:
    """The arrays, and jobs of none, of that name that the batch system has. Raises BatchTrouble."""
    return set(call_batch(["squeue", "--me", "-h", "-o", "%F", "--name", plan.name] if plan.system == "Slurm" else
                          ["qselect", "-N", plan.name], environ).split())


def send_jobs(plan: JobPlan, environ: Mapping[str, str], path: str) -> Tuple[str, bool]:
    """Send an array: its id, and whether it was an earlier call that had sent it. Raises Refusal.

    The file at *path* says before each call that one is being made. So a call is looked up by name, and not simply
    made again, where nobody knows whether it was taken: after "Socket timed out", and when this was killed in between.
    """
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with open(os.path.join(os.path.dirname(path), "jobs.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)        # sbatch holds it too: it may outlive a call that was killed
        record = dict({"arrays": [], "sending": False}, **read_access(path))

        def note(sending: bool, array: str = "") -> None:
            record.update(system=plan.system, name=plan.name, folder=plan.folder, utc=time.time(), sending=sending,
                          arrays=record["arrays"] + [array] * bool(array))
            write_access(path, record)

        def look_up() -> str:
            return max(arrays_named(plan, environ) - set(record["arrays"]), default="")
        earlier = lost = record["sending"]
        trouble = BatchTrouble("")
        for pause_s in (0.0, *SEND_AGAIN_S):
            if pause_s:
                print_notice("%s: in %d s this looks whether the jobs were taken" % (trouble, pause_s))
            time.sleep(pause_s)
            try:
                array = look_up() if lost else ""
                if not array and pause_s != SEND_AGAIN_S[-1]:
                    note(True)
                    lost, earlier = True, False
                    array = call_batch(submit_words(plan), environ, job_script(plan), SEND_LIMIT_S,
                                       [lock.fileno()]).strip().partition(";")[0]
                if array:
                    note(False, array)
                    return array, earlier
            except BatchTrouble as error:
                trouble = error
                if not trouble.unclear:
                    note(False)
                    break
        raise Refusal(str(trouble))


def judge_jobs(plan: JobPlan, environ: Mapping[str, str]) -> str:
    """What the batch system says about the plan, without running it. Raises BatchTrouble."""
    words = submit_words(plan)
    if plan.system == "Slurm":
        return call_batch([words[0], "--test-only", *words[1:]], environ, job_script(plan)).strip()
    job = call_batch([words[0], "-h", *words[1:]], environ, job_script(plan)).strip()
    call_batch(["qdel", job], environ)
    return "qsub takes it"


def cancel_jobs(system: str, run_uuid: str, environ: Mapping[str, str]) -> str:
    """Cancel all jobs of a run by their name; a sentence. Raises BatchTrouble."""
    name = job_name(run_uuid)
    if system == "Slurm":
        call_batch(["scancel", "--user", pwd.getpwuid(os.geteuid()).pw_name, "--name", name], environ)
    else:
        jobs = call_batch(["qselect", "-N", name], environ).split()
        if jobs:
            call_batch(["qdel", *jobs], environ)
    return "the jobs called %s are cancelled; workers give their tasks back" % name


def cmd_submit(args: argparse.Namespace) -> int:
    """have Slurm or PBS start workers of a run

    Sends one array of jobs that run 'work' here, W at a time, each for the time of -t. As many follow
    one after the other as the run will need by the times of its tasks so far (--generations says it
    otherwise). Those that are too many are cancelled when the run is over. Each has -j cores. Its output
    is in a folder with the name of the jobs, tf- and the first digits of the run. 'status' shows them.

    --with gives sbatch or qsub more options; the batch system's own variables count as always. --setup is
    a line of shell that comes before the worker. --dry-run prints the call and the script and sends
    nothing; --test has the batch system judge them. Options of 'work' are handed on to it.

    Three jobs of an array that start one after the other and end within a minute without a task stop the rest.

    examples:
      python3 taskfarm.py submit ice -n 50 -t 4:00:00 -j 16 -- ./tile.sh {task}
      python3 taskfarm.py submit ice -n 50 -t 4:00:00 -j 16 --dry-run \\
        --with "-p low -A abc" --setup "module load gdal" -- ./tile.sh {task}
      python3 taskfarm.py submit ice --cancel
    """
    if args.cancel and (args.dry_run or args.test or args.words):
        raise Refusal("--cancel sends nothing: leave out --dry-run, --test and the command")
    if not args.cancel and not (args.width and args.walltime):
        raise Refusal("how many jobs at a time, and how long each? As in: python3 taskfarm.py submit %s -n 50 "
                      "-t 4:00:00 -j 16" % shlex.quote(args.run))
    system = batch_system_here(args.batch, os.environ)
    with open_client(args) as client:
        run = client.ask("GET", run_path(find_run_uuid(client, args.run, changes=True)))
        access, held_up = client.access, ask_hold_up(client, run)
        took_s = [] if args.cancel else times_of_ended(client, run)
    try:
        if args.cancel:
            forget_look(os.environ)
            print(cancel_jobs(system, run["uuid"], os.environ))
            return 0
        extra = [word for words in args.extra for word in shlex.split(words)]
        if not args.words and not run.get("hasWork", True):
            raise Refusal("which command? This run knows none: it goes at the end, after --")
        passes_all = system == "Slurm" and not any("--export" in word for word in extra) and \
            "SBATCH_EXPORT" not in os.environ
        refuse_submission(access, run, took_s, args.walltime, not passes_all, held_up)
        parameters = typed_parameters(args, run)
        if parameters is not None:
            parameters.kept()       # or jobs could not read them
        plan, sentence = plan_jobs(args, system, run, took_s, extra)
        if args.dry_run:
            print("%s <<'EOF'\n%sEOF" % (" ".join(map(shlex.quote, submit_words(plan))), job_script(plan)))
        elif args.test:
            print(judge_jobs(plan, os.environ))
        else:
            os.makedirs(plan.folder, exist_ok=True)     # Slurm makes no folder, and the job would fail
            forget_look(os.environ)
            array, earlier = send_jobs(plan, os.environ, submissions_path(os.environ, run["uuid"]))
            if earlier:
                print("%s was sent by a call before this one, which did not end: nothing more is sent" % array)
                return 0
            print("%s: %s called %s, %d at a time; their output is in %s" % (
                array, count_text(plan.total, "job"), plan.name, plan.width, plan.folder))
    except BatchTrouble as trouble:
        raise Refusal(str(trouble))
    print_notice(sentence)
    return 0


def plan_jobs(args: argparse.Namespace, system: str, run: Mapping[str, Any], took_s: Sequence[float],
              extra: List[str]) -> Tuple[JobPlan, str]:
    """What to ask for, and a sentence that says why so much."""
    at_once = args.width * cores_asked(system, args.jobs, extra)
    left = run["numWaiting"] + run["numComputing"]
    generations = args.generations or 1
    sentence = "how long a task takes is not known yet: submit again when it is, or say --generations"
    if took_s:
        mean_s = sum(took_s) / len(took_s)
        generations = args.generations or generations_needed(left, mean_s, at_once, args.walltime)
        sentence = "%s of %s each for %d commands at a time: about %s once all jobs run" % (
            count_text(left, "task"), duration_text(mean_s), at_once,
            duration_text(max(mean_s, left * mean_s / at_once)))
    total = args.width * generations
    largest = largest_array(system, total, os.environ)
    if total > largest >= args.width:
        total = largest
        sentence += "; the batch system takes %d jobs in one array, so submit again later" % largest
    paths = "TASKFARM_ACCESS", "XDG_CONFIG_HOME", "XDG_STATE_HOME"
    exports = {name: os.path.abspath(os.environ[name]) for name in paths if os.environ.get(name)}
    exports.update({name: value for name, value in (
        ("TASKFARM_URL", args.url), ("TASKFARM_FINGERPRINT", os.environ.get("TASKFARM_FINGERPRINT"))) if value})
    name = job_name(run["uuid"])
    worker = [sys.executable or "python3", os.path.abspath(__file__), "work", run["uuid"], *args.work_words]
    return JobPlan(system, name, args.width, total, args.walltime, args.jobs, os.path.join(os.getcwd(), name), extra,
                   args.setup, exports, worker + (["--", *args.words] if args.words else [])), sentence


# ---------------------------------------------------------------- RUN
# All of it in one line: a farm for as long as one run takes, where there is none yet. It uses what VERBS and UPKEEP
# have. Another thing that a person would type before or after 'work' every time belongs here.

OWN_FILE = "taskfarm.sqlite"        # in the current folder
OTHERS_HEARD_S = 45.0               # a worker that was heard within that time lives: it beats every 24 to 30 s
KEEPER_PAUSE_S = 1.0                # between two tries to serve
AGAIN = {EXIT_TASKS_FAILED: "; with --retry the failed tasks run again", EXIT_STOPPED: "", EXIT_BAD_NODE: "",
         EXIT_TOO_MANY_FAILED: "; with --retry the failed tasks run again"}


class OwnServer:
    """Has a file served as long as this process lives. Raises Refusal.

    A child, the keeper, starts a server, and another when that was killed. Where another process serves the file
    already, the keeper tries again every second: so of several lines that work on one file, any may end.
    Both have a session of their own and ignore the signals that end jobs: this process still reports then.
    """
    def __init__(self, db: str, host: str = "127.0.0.1", advertise: str = "") -> None:
        self.db, self.host, self.advertise = db, host, advertise
        self.server_pid = mmap.mmap(-1, 4)      # an int, 0 while our keeper does not serve
        answer_in, self.answer_out = os.pipe()
        self.parent_in, self.parent_out = os.pipe()     # closes when this process has ended
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(answer_in)
                os.close(self.parent_out)
                self._keep()
            finally:
                os._exit(0)
        os.close(self.answer_out)
        os.close(self.parent_in)
        with open(answer_in, "rb") as file:
            answer = json.loads(file.readline() or b'{"refused": "the server was killed while it started"}')
        self.in_use = answer.get("in_use", "")      # who else serves the file, in words
        if "refused" in answer:
            self.close()
            raise Refusal(answer["refused"])
        self.access = parse_access(answer, db) if "url" in answer else self._find_other()

    def _find_other(self) -> Access:
        """How to reach the process that serves our file. It may be starting, or stopping."""
        deadline = time.monotonic() + VERB_PATIENCE_S
        while time.monotonic() < deadline:
            holder = read_holder(self.db)
            known = find_access_file(access_path(os.environ), url=str(holder.get("url")),
                                     certificate=str(holder.get("certificate")))
            if known and farm_answers(known):
                return known
            time.sleep(0.2)
        self.close()
        there = ", for its own machine alone: with --host 0.0.0.0 there, others can join" if is_loopback(
            str(read_holder(self.db).get("url"))) else ""
        raise Refusal(self.in_use + there)

    @property
    def serves(self) -> bool:
        """Whether the file is served by our own keeper."""
        return bool(struct.unpack("i", self.server_pid)[0])

    def _keep(self) -> None:
        os.setsid()
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        logging.basicConfig(format="%(asctime)s taskfarm: %(message)s", level=logging.WARNING)
        sys.stdout = open(os.devnull, "w")      # noqa: SIM115
        parent_ended = False
        while not parent_ended:
            server = os.fork()
            if server == 0:
                try:
                    self._serve()
                except BaseException:
                    log.critical("the server of %s ended", self.db, exc_info=True)
                    self._answer({"refused": "the server of %s could not start" % self.db})     # if it had not
                finally:
                    os._exit(0)
            os.waitpid(server, 0)
            struct.pack_into("i", self.server_pid, 0, 0)
            parent_ended = bool(select.select([self.parent_in], [], [], KEEPER_PAUSE_S)[0])

    def _serve(self) -> None:
        raise_descriptor_limit()
        try:
            service = Service(self.db, self.host, 0, self.advertise, take_lock=take_lock)
            with contextlib.ExitStack() as undo:
                undo.callback(service.close)
                user = announce(service, self.db, beside=True)
                answer = access_entries(service, user)
                undo.pop_all()
        except (Refusal, FarmError, OSError) as error:
            self._answer({"in_use" if isinstance(error, InUse) else "refused": str(error)})
            return
        struct.pack_into("i", self.server_pid, 0, os.getpid())
        self._answer(answer)

        def wait_for_parent() -> None:
            os.read(self.parent_in, 1)
            service.stop()
        threading.Thread(target=wait_for_parent, name="parent", daemon=True).start()
        service.serve()
        path = farm_access_path(dict(os.environ), service.store.identity, service.url, self.db, beside=True)
        with contextlib.suppress(OSError):      # what leads nowhere would be tried by every verb
            if read_access(path).get("url") == service.url:
                os.remove(path)

    def _answer(self, answer: Dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):      # only the first one is waited for
            os.write(self.answer_out, json.dumps(answer).encode() + b"\n")

    def close(self) -> None:
        """Let it write what is in hand, and end."""
        os.close(self.parent_out)
        with contextlib.suppress(ChildProcessError):        # the worker has waited for all its children
            os.waitpid(self.pid, 0)

    def find(self, farm: str = "") -> Access:
        """How to reach the file's farm now: its server may have been killed, and another started."""
        if self.serves:     # then neither the name of this host nor the home directory is needed
            return self.access._replace(url=str(read_holder(self.db).get("admin_url") or self.access.url))
        return find_access_file(access_path(os.environ), farm=self.access.farm) or self.access


@contextlib.contextmanager
def served_for_call(db: str) -> Iterator[None]:
    """Have a file served during a verb that asks a server, which finds it by the environment. Raises Refusal."""
    if not os.path.exists(db):
        raise Refusal("there is no file %s" % db)
    own = OwnServer(db)
    access = own.find()
    os.environ.update(TASKFARM_URL=access.url, TASKFARM_TOKEN=access.token,
                      TASKFARM_FINGERPRINT=fingerprint(access.certificate))
    try:
        yield
    finally:
        own.close()


def name_of_line(args: argparse.Namespace, number: int, parameters: Optional[Parameters], folder: str) -> str:
    """A name for a run that the same line gets again, as long as its parameters are the same.

    *folder*: the current one, where the farm has runs of other folders too; else "", since a folder may be moved.
    """
    line = [folder, number, args.grid, args.words, getattr(parameters, "sha256", "")]
    digest = hashlib.sha256(json.dumps(line).encode())
    program = os.path.basename(args.words[0].split()[0] if args.words[0].split() else "run")
    return "%s-%s" % (printable(program)[:40], digest.hexdigest()[:8])


def open_farm(args: argparse.Namespace,
              say: Callable[[str], None]) -> Tuple[Callable[..., Access], Optional[OwnServer]]:
    """The farm for `run`: how to find it, and what serves it if it is our own.

    It is the farm in the file of --db, else that in this folder, else the one of the access file where it answers,
    else a new one in this folder. Raises Refusal.
    """
    db = args.db or (OWN_FILE if os.path.exists(OWN_FILE) else "")
    if not db:
        with contextlib.suppress(Refusal):
            access = find_access(os.environ)
            if access.url_given or farm_answers(access):
                say("the farm at %s has the run (%s)" % (access.url, access.source))
                return functools.partial(find_access, os.environ), None
            say("the farm of %s does not answer: if it has a run of this line, that one does not go on here"
                % access.source)
    elif not args.db and os.stat(db).st_uid != os.geteuid():
        raise Refusal("%s in this folder is another user's: --db FILE says which file is meant" % db)
    db = db or OWN_FILE
    own = OwnServer(db, args.host or ("0.0.0.0" if batch_system(os.environ)[0] else "127.0.0.1"), args.advertise)
    say("%s is served at %s already: this line joins, and serves it when that ends" % (db, own.access.url)
        if own.in_use else "this serves %s at %s until it ends" % (db, own.access.url))
    return own.find, own


def find_or_make_run(client: Client, name: str, number: int, args: argparse.Namespace,
                     work: Optional[Dict[str, Any]], where: str) -> Dict[str, Any]:
    """The run of that name, made if there is none. Raises Refusal when it has another number of tasks.

    *work*: what it keeps, so that others join by `work NAME` alone; None where it cannot be kept. *where*: the option
    by which other verbs find the farm, after a blank.
    """
    runs = [run for run in client.ask("GET", "/api/runs")["data"] if run.get("name") == name]
    if len(runs) > 1:
        raise Refusal("%d runs are called %s: choose another by --name, or delete one of them: 'python3 "
                      "taskfarm.py delete %s%s'" % (len(runs), name, runs[-1]["uuid"], where))
    if not runs:
        more = {"maxFailures": args.max_failures, "maxLosses": args.max_losses, "work": work}
        body = {"numTasks": number, "name": name, **{key: value for key, value in more.items() if value is not None}}
        # Several of the same line may start at the same time: one key lets them make one run.
        key = hashlib.sha256(json.dumps(body).encode()).hexdigest()[:32]
        run_uuid = client.ask("POST", "/api/run", body, key)["uuid"]
        try:
            runs = [client.ask("GET", run_path(run_uuid))]
        except NotFound:        # the answer of before, to a run that was deleted since
            runs = [client.ask("GET", run_path(client.ask("POST", "/api/run", body)["uuid"]))]
    run: Dict[str, Any] = client.ask("GET", run_path(runs[0]["uuid"]))
    if run["numTasks"] != number:
        raise Refusal("run %s has %s, and this would be %d: choose another name by --name, or delete it: 'python3 "
                      "taskfarm.py delete %s%s'" % (name, count_text(run["numTasks"], "task"), number, run["uuid"],
                                                    where))
    if work and run.get("hasWork"):
        known = client.ask("GET", run_path(run["uuid"], "/work"))
        if any(known[part] != work[part] for part in work):
            client.say("run %s goes on knowing the command, folder and parameters that it was made with: who joins by "
                       "'work %s' alone runs these, and not the command of this line" % (name, shlex.quote(name)))
    return run


def wait_for_others(client: Client, say: Callable[[str], None]) -> None:
    """The run is over: serve on until other workers have left, since they would lose their farm. A signal ends it.

    Workers without a lease, and those that were not heard for a while, are not waited for: they may be dead.
    """
    noticed = False
    with contextlib.suppress(KeyboardInterrupt, Unreachable, FarmError):
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
        while True:
            pages = list(every_page(client, "/api/workers", limit=ROWS_AT_ONCE))
            utc = time.time() + client.clock_ahead_s
            if not any(worker["lease"] and (parse_time(worker["heard"]) or 0.0) > utc - OTHERS_HEARD_S
                       for page in pages for worker in page):
                return
            if not noticed:
                say("other workers still use this farm: it is served until they have left (Ctrl-C ends it)")
                noticed = True
            time.sleep(0.5)


def cmd_run(args: argparse.Namespace) -> int:
    """run a command for each of N tasks, in one line: serve, new and work

    It serves a farm of its own for as long as it runs: the file of --db, else taskfarm.sqlite in this
    folder. Where neither is there and the farm of the access file answers, the run is made in that one.
    The same line may run several times, also in jobs on other nodes: one serves, all work, and when that
    one ends another serves. 'work UUID' joins too, with the uuid that is shown at the start.

    The same line again, in the same folder, goes on where it was, however it ended: what is done is not run
    again. --retry lets failed tasks run again. Another command, or changed parameters, are another run,
    unless --name says which it is. It ends when the whole run is over, also what others compute of it; with
    --idle SECONDS sooner.

    In place of N there may be --lines, --table or --grid. These and the other options are those of 'work',
    whose help says more, also of the fields {task}, {slot} and others, and of the exit status.

    examples:
      python3 taskfarm.py run 200 -j 4 -- ./tile.sh {task}
      python3 taskfarm.py run 200 -j 4 --retry -- ./tile.sh {task}
      python3 taskfarm.py run --lines params.txt -j 8 --log-dir logs -- ./sim {line}
      python3 taskfarm.py run --grid lr=0.1,0.01 --grid n=0..9 -- ./fit {lr} {n}
      sbatch -c 16 --wrap "exec python3 taskfarm.py run 5000 -- ./tile.sh {task}"
      sbatch --array=1-9 -c 16 --wrap \\
        "exec python3 taskfarm.py run 5000 -- ./tile.sh {task}"
    """
    args.jobs = args.jobs or default_jobs(os.environ)
    display = Display(args.quiet, os.environ, args.tag)
    number, parameters = chosen_size(args)
    template = make_template(args, args.words, "", parameters)      # before anything is made
    for sentence in template.warnings(number):
        (print_notice if args.dry_run else display.say)(sentence)
    if args.dry_run:
        print_first_commands(template, number, args.jobs)
        return 0
    find, own = open_farm(args, display.say)
    with contextlib.ExitStack() as undo:
        if own:
            undo.callback(own.close)
        if args.idle is None:
            args.idle = math.inf        # what comes after this line wants all of the run
        client = undo.enter_context(contextlib.closing(Client(find, WORKER_RETRY_S)))
        client.say = display.say
        work = None
        try:
            work = work_to_keep(args.words, parameters)
        except Refusal as error:
            display.say("%s. Until then others who join must type the command too" % error)
        folder = "" if own and not args.db else current_folder()
        where = " --db " + shlex.quote(own.db) if own else ""
        name = args.name or name_of_line(args, number, parameters, folder)
        run = find_or_make_run(client, name, number, args, work, where)
        client.stay_with(client.access.farm)
        for sentence in send_all_unsent(client):
            display.say(sentence)
        if args.retry:
            client.ask("POST", run_path(run["uuid"], "/restart?status=failed"))
        took_s = times_of_ended(client, run)
        template = make_template(args, args.words, run["uuid"], parameters)
        status = run_commands(args, client, run, template, display, took_s).status or EXIT_DONE
        if status in AGAIN and display.run.get("state") != "cancelled":
            display.say("the same line again goes on where it was%s" % AGAIN[status])
        if status in (EXIT_TASKS_FAILED, EXIT_TOO_MANY_FAILED):
            display.say("what failed: python3 taskfarm.py failures %s%s" % (shlex.quote(run["name"]), where))
        if own and own.serves and status in (EXIT_DONE, EXIT_TASKS_FAILED):
            wait_for_others(client, display.say)
    return status


# ---------------------------------------------------------------- COMMAND LINE
# Options and the parser, and `main`. It must not know what a verb does.
#
# A new option: a line with the others of its verb here, `args.x` in its `cmd_x`; its help says the default. A new verb:
# see the head of VERBS or of UPKEEP.

# The types of arguments. Each raises ArgumentTypeError, whose sentence argparse prints.

def time_argument(text: str) -> float:
    """A time, as UTC seconds."""
    try:
        return moment_of(text, time.time())
    except (ValueError, OverflowError, OSError):
        raise argparse.ArgumentTypeError("a time looks like 17:30, 2026-11-24T17:30:00 or +3600 (seconds from now), "
                                         "not like %r" % text)


def number_type(kind: Callable[[str], float], least: float, most: float, wanted: str) -> Callable[[str], Any]:
    """The type of numbers in a range. *wanted*: what they are, in words."""
    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise argparse.ArgumentTypeError("%s is wanted, not %r" % (wanted, text))
        return number
    return parse


some_seconds = number_type(float, 1e-6, 1e12, "a number of seconds above 0")
positive_number = number_type(int, 1, 1e18, "a whole number from 1 on")
whole_number = number_type(int, 0, 1e18, "a whole number from 0 on")        # the server refuses what is too large
port_number = number_type(int, 0, 65535, "a port from 0 to 65535")


def numbers_of_clients(text: str) -> List[int]:
    """Whole numbers from 1 on, with commas between."""
    return [positive_number(word) for word in text.split(",")]


def task_numbers(text: str) -> Tuple[int, int]:
    """A number of a task, or a range of them."""
    try:
        first, last = parse_span(text)
        if first > last:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError("numbers of tasks look like 13 or 17-20, not like %r" % text)
    return first, last


class Parser(argparse.ArgumentParser):
    """A parser that shows its `verbs`, and says commands as they can be pasted."""
    verbs: Any = None

    def add_subparsers(self, **settings: Any) -> Any:
        """See argparse."""
        self.verbs = super().add_subparsers(**settings)
        return self.verbs

    def format_help(self) -> str:
        """The help, whose first lines to type are those of this place."""
        return pasteable(super().format_help())

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit."""
        super().error(pasteable(message))


class TrialParser(Parser):
    """A parser for words that may be no whole command line. It raises Refusal, and says nothing."""

    def error(self, message: str) -> NoReturn:
        """Raise Refusal."""
        raise Refusal(message)


READ_RUN = "its uuid or name, or the beginning of one"
CHANGED_RUN = "its whole name, its uuid, or the first %d or more digits of its uuid" % MIN_UUID_DIGITS


def add_parameter_options(group: Any, what: str) -> None:
    """The options that name parameters. *what* there is for each of them."""
    group.add_argument("--lines", metavar="FILE", help="%s for each line of a file, called {line}; - is the standard "
                       "input" % what)
    group.add_argument("--table", metavar="FILE", help="%s for each row of a CSV or TSV file below its head, called "
                       "as the columns" % what)
    group.add_argument("--grid", metavar="NAME=A,B", action="append", help="%s for each combination of the values of "
                       "all --grid; A..B and A..B..STEP are ranges, and the last name varies fastest" % what)


def add_work_options(parser: argparse.ArgumentParser) -> None:
    """The options of `work`, but for the run and its parameters."""
    parser.add_argument("-j", "--jobs", type=number_type(int, 1, MAX_JOBS, (
        "a number from 1 to %d (for more commands at a time, start more workers)" % MAX_JOBS)), metavar="N",
                        help="how many commands run at a time; by default what the batch job has cores for "
                        "(SLURM_CPUS_PER_TASK, NCPUS of PBS), else 1")
    parser.add_argument("--gpus-per-task", type=positive_number, metavar="K", help="show each command K GPUs of its "
                        "own, of those in CUDA_VISIBLE_DEVICES")
    parser.add_argument("--timeout", type=some_seconds, metavar="SECONDS", help="a command that runs longer is ended, "
                        "and has failed")
    parser.add_argument("--grace", type=some_seconds, default=GRACE_S, metavar="SECONDS", help="between SIGTERM and "
                        "SIGKILL to a command; by default 5. Choose less than the batch system gives")
    parser.add_argument("--log-dir", metavar="DIR", help="keep the output of task N in DIR/N.log, of its "
                        "second attempt in DIR/N.2.log")
    parser.add_argument("--log-failed", action="store_true", help="keep the output of failed attempts alone")
    parser.add_argument("--until", type=time_argument, metavar="TIME", help="leave before 17:30, "
                        "2026-11-24T17:30:00 or +3600 (seconds from now); by default before the batch job ends")
    parser.add_argument("--task-time", type=some_seconds, metavar="SECONDS", help="how long a task takes: the worker "
                        "begins none that would not end in time; by default it learns that from earlier tasks")
    parser.add_argument("--leave-ok", action="store_true", help="exit with 0, not 7, when the worker leaves since its "
                        "batch job ends: jobs that wait by afterok then start")
    parser.add_argument("--drain", action="store_true", help="on a signal, let the running commands finish")
    parser.add_argument("--max-fails", type=whole_number, metavar="N", help="stop when N commands of this worker have "
                        "failed, and let those that run finish; 0: never stop for failures. By default it stops "
                        "where the first %d all fail within %g s" % (FIRST_ENDS, QUICK_S))
    parser.add_argument("--idle", type=whole_number, default=IDLE_S, metavar="SECONDS", help="with nothing to do, "
                        "stay for so long at most while tasks of others may come back; by default %d" % IDLE_S)
    parser.add_argument("--quiet", action="store_true", help="print no line for a task that is done")
    parser.add_argument("--dry-run", action="store_true", help="only print the first commands, or what "
                        "would be submitted")
    parser.add_argument("--tag", action="store_true", help="begin each line that a command prints with the number of "
                        "its task and a tab")
    parser.add_argument("words", nargs="*", metavar="COMMAND ...", help="what to run for each task; for 'work', by "
                        "default what the run knows")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of a new run: of `new` and of `run`."""
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("tasks", metavar="N", nargs="?", type=positive_number, help="how many tasks")
    add_parameter_options(size, "a task")
    parser.add_argument("--name", help="a name for people")
    parser.add_argument("--max-failures", type=whole_number, metavar="M",
                     help="a task that has failed M times is not tried again; by default 1, 0 for no limit")
    parser.add_argument("--max-losses", type=whole_number, metavar="M",
                     help="nor a task that M workers were lost with; by default 5, 0 for no limit")


def walltime_argument(text: str) -> int:
    """A time limit of a job, in seconds."""
    try:
        return walltime_seconds(text)
    except ValueError:
        raise argparse.ArgumentTypeError("a time limit looks like 4:00:00, 1-12:00:00 or 90 (minutes), not like %r"
                                         % text)


def add_submit_options(parser: argparse.ArgumentParser) -> None:
    """The options of `submit`."""
    parser.usage = "taskfarm.py submit RUN -n W -t TIME [-j N] [options] [-- COMMAND ...]"
    parser.add_argument("-n", dest="width", type=positive_number, metavar="W", help="how many jobs at a time")
    parser.add_argument("-t", dest="walltime", type=walltime_argument, metavar="TIME", help="how long each may take: "
                        "4:00:00, 1-12:00:00, or minutes")
    parser.add_argument("--generations", type=positive_number, metavar="G", help="W*G jobs in all; by default as many "
                        "as the tasks need by the times of those before")
    parser.add_argument("--with", dest="extra", action="append", default=[], metavar="OPTIONS", help="more options for "
                        "sbatch or qsub, as \"-p low -A abc\"; may come again")
    parser.add_argument("--setup", action="append", default=[], metavar="LINE", help="shell before the worker, as "
                        "\"module load gdal\"; may come again")
    parser.add_argument("--batch", choices=("slurm", "pbs"), default="", help="by default the one that is here")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--test", action="store_true", help="have the batch system judge it, and send nothing")
    what.add_argument("--cancel", action="store_true", help="cancel all jobs of the run that this verb has sent")
    add_parameter_options(parser.add_mutually_exclusive_group(), "values")
    add_work_options(parser)


def words_for_work(args: argparse.Namespace) -> List[str]:
    """The options of `work` that were given to `submit`, as they are given to the worker of each job."""
    options = argparse.ArgumentParser(add_help=False)
    add_parameter_options(options, "")
    add_work_options(options)
    words = ["--leave-ok"]      # a job that leaves in time, for another to go on, has not failed
    for action in options._actions:
        value = getattr(args, action.dest)
        if not action.option_strings or value == action.default or action.dest in ("dry_run", "leave_ok"):
            continue
        if action.dest == "until":
            value = datetime.datetime.fromtimestamp(value, datetime.timezone.utc).isoformat()
        for each in value if isinstance(value, list) else [value]:
            words += [action.option_strings[-1]] + ([] if action.nargs == 0 else [str(each)])
    return words


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """The options of `bench`."""
    parser.add_argument("--profile", default="constant,lean,paper", help="profiles, with commas between; by "
                        "default constant,lean,paper")
    parser.add_argument("--clients", type=numbers_of_clients, default=[1, 16, 64, 256], metavar="N,...",
                        help="connections at a time; by default 1,16,64,256")
    parser.add_argument("--seconds", type=some_seconds, default=3.0, help="for each line; by default 3")
    parser.add_argument("--processes", type=positive_number, default=2, help="that send requests; by default 2")
    parser.add_argument("--rows", type=positive_number, help="touched tasks of the profiles flat, life and fair; by "
                        "default 1000000, of fair %d. With fewer the whole farm of fair is smaller" % FAIR_ROWS)
    parser.add_argument("--case", default="", help="cases of profile fair, with commas between; by default all")
    parser.add_argument("--tries", type=positive_number, default=3, help="of each case of profile fair; by default 3")
    parser.add_argument("--dir", help="the folder for the temporary file")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_env_option(parser: argparse.ArgumentParser, option: str, default: Any, text: str,
             kind: Callable[[str], Any] = str) -> None:
    """An option, as "--name VALUE", whose default an environment variable may set."""
    name, metavar = option.split()
    variable = "TASKFARM_" + name.strip("-").upper().replace("-", "_")
    parser.add_argument(name, type=kind, default=os.environ.get(variable, default), metavar=metavar,
                        help="%s (%s)" % (text, variable))


HELP_WIDTH = 79
MOST_OPTION_WORDS = 200             # before a command without --: thousands of files may follow it


def wrapped(text: str) -> str:
    """A docstring for a terminal of 80 columns. Paragraphs with indented lines, as examples, stay as they are."""
    return "\n\n".join(paragraph if "\n " in paragraph else textwrap.fill(paragraph, HELP_WIDTH)
                       for paragraph in text.split("\n\n"))


def add_verb(verbs: Any, name: str, command: Callable[[argparse.Namespace], int],
             needs_db: bool = True) -> argparse.ArgumentParser:
    """Add a verb. The docstring of its command is its help."""
    first, _, others = (command.__doc__ or "").partition("\n")
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=first, description=wrapped(first + "\n" + textwrap.dedent(others)),
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.set_defaults(command=command, needs_db=needs_db, asks_server=False)
    if needs_db:
        add_env_option(parser, "--db FILE", None, "the farm's file")
    return parser


# 'taskfarm.py --help' shows the verbs in this order, and those without a group at the end.
VERB_GROUPS = (
    ("work on tasks", ("run", "new", "submit", "work", "status", "wait")),
    ("look and keep", ("list", "tasks", "failures", "hosts", "log", "workers", "pause", "resume", "cancel", "extend",
                       "restart", "delete", "progress")),
    ("serve and set up", ("serve", "login", "token", "doctor", "user", "audit", "check", "backup", "bench",
                          "completion")),
)


def verb_summary(verbs: Mapping[str, argparse.ArgumentParser]) -> str:
    """The verbs in their groups, each with the first line of its help."""
    others = tuple(name for name in verbs if not any(name in names for _, names in VERB_GROUPS))
    lines = []
    for title, names in (*VERB_GROUPS, ("also", others)):
        lines += ["", title + ":"] if names else []
        for name in names:
            first = (verbs[name].description or "").partition("\n")[0]
            lines += textwrap.wrap("  %-11s %s" % (name, first), HELP_WIDTH, subsequent_indent=" " * 14)
    return "\n".join(lines)


def add_client_verb(verbs: Any, name: str, command: Callable[[argparse.Namespace], int], run: bool = False,
                reads: bool = False) -> argparse.ArgumentParser:
    """Add a verb that asks a server. *run*: it takes a run; *reads*: it changes nothing, and can print JSON."""
    parser = add_verb(verbs, name, command, needs_db=False)
    if run:
        parser.add_argument("run", metavar="RUN", nargs=None if name != "status" else "?",
                            help=READ_RUN if reads else CHANGED_RUN)
    add_env_option(parser, "--url URL", "", "the server, where it is not the one of the access file")
    if command is not cmd_doctor:       # whose --db is the file of a server
        parser.set_defaults(asks_server=True)
        parser.add_argument("--db", metavar="FILE", default="", help="the farm in this file, as 'run' leaves it: "
                            "served for this call alone, where no server has it")
    if reads:
        parser.add_argument("--json", action="store_true", help="print JSON, as the server sends it")
    return parser


def add_client_verbs(verbs: Any) -> None:
    """Add the verbs that ask a server, but for `work`."""
    new = add_client_verb(verbs, "new", cmd_new)
    new.usage = "taskfarm.py new N [options] [-- COMMAND ...]"
    new.set_defaults(words=[])
    add_run_options(new)
    after = new.add_mutually_exclusive_group()
    after.add_argument("--after", metavar="RUN", help="hand out no task before all tasks of that run are done")
    after.add_argument("--after-any", metavar="RUN", help="nor before that run is over, also if tasks of it failed")
    new.add_argument("--again", action="store_true", help="also where a run has this name already")
    add_submit_options(add_client_verb(verbs, "submit", cmd_submit, run=True))
    status = add_client_verb(verbs, "status", cmd_status, run=True, reads=True)
    status.add_argument("--watch", action="store_true", help="show it again and again until the run is over")
    status.add_argument("--every", type=some_seconds, metavar="S", help="seconds between two updates "
                        "of --watch; by default 2, and 30 where it prints lines")
    wait = add_client_verb(verbs, "wait", cmd_wait)
    wait.add_argument("run", metavar="RUN", help=READ_RUN)
    wait.add_argument("--percent", metavar="P", help="wait until so much of the run is done",
                      type=number_type(float, 0, 100, "a percentage from 0 to 100"))
    add_client_verb(verbs, "list", cmd_list, reads=True).add_argument(
        "--watch", action="store_true", help="show it again and again until all runs are over")
    tasks = add_client_verb(verbs, "tasks", cmd_tasks, run=True, reads=True)
    tasks.add_argument("--status", choices=STATUS, help="only tasks of this status")
    tasks.add_argument("--order", choices=("task", "started", "finished"),
                       help="by number; or the longest computing first; or the last to end first")
    tasks.add_argument("--limit", type=whole_number, metavar="N", help="at most so many; 0 for all")
    form = tasks.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print all columns, with commas between")
    form.add_argument("--joblog", action="store_true", help="print the columns of GNU parallel's --joblog")
    for name, command in (("failures", cmd_failures), ("hosts", cmd_hosts)):
        add_client_verb(verbs, name, command, run=True, reads=True).add_argument(
            "--all", action="store_true", help="look at all ends, not only at the latest %d" % LATEST_ENDS)
    add_client_verb(verbs, "log", cmd_log, run=True, reads=True).add_argument(
        "task", metavar="TASK", type=whole_number, help="its number")
    add_client_verb(verbs, "workers", cmd_workers, reads=True).add_argument(
        "--all", action="store_true", help="also those that have signed off or whose lease has run out")
    add_client_verb(verbs, "pause", cmd_pause, run=True)
    add_client_verb(verbs, "resume", cmd_resume, run=True)
    cancel = add_client_verb(verbs, "cancel", cmd_cancel, run=True)
    cancel.add_argument("tasks", metavar="TASKS", nargs="*", type=task_numbers, help="some of them, as 13 17-20")
    cancel.add_argument("--yes", action="store_true", help="do not ask")
    add_client_verb(verbs, "extend", cmd_extend, run=True).add_argument(
        "tasks", metavar="N", type=positive_number, help="how many more")
    restart = add_client_verb(verbs, "restart", cmd_restart, run=True)
    for parser in (tasks, restart):
        parser.add_argument("numbers", metavar="TASK", nargs="*", type=task_numbers, help="only these, as 13 17-20")
    restart.add_argument("--exit", type=int, metavar="N", help="only the failed tasks with this exit status")
    restart.add_argument("--like", metavar="TEXT", help="only the failed tasks whose message contains this; a * in it "
                         "stands for anything")
    restart.add_argument("--yes", action="store_true", help="do not ask")
    which = restart.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="all tasks, also those that are done; asks first")
    which.add_argument("--failed", action="store_true", help="the failed tasks alone")
    add_client_verb(verbs, "delete", cmd_delete, run=True).add_argument("--yes", action="store_true", help="do not ask")
    token = verbs.add_parser("token", description="make, list and revoke tokens: logins for programs; 'token VERB "
                             "--help' says more, with an example", allow_abbrev=False)
    tokens = token.add_subparsers(title="verbs", metavar="VERB", required=True)
    new_token = add_client_verb(tokens, "new", cmd_token_new)
    new_token.add_argument("--run", metavar="RUN", help="for this run alone: " + CHANGED_RUN)
    new_token.add_argument("--scope", choices=SCOPES, default="work", help="what it may do; by default work")
    new_token.add_argument("--days", type=positive_number, metavar="N", help="how long it lasts; by default until it "
                           "is revoked")
    new_token.add_argument("--label", metavar="TEXT", help="what it is for")
    add_client_verb(tokens, "list", cmd_token_list, reads=True)
    add_client_verb(tokens, "revoke", cmd_token_revoke).add_argument(
        "ids", metavar="ID", nargs="+", type=positive_number, help="of a token, as 'token list' shows it")
    doctor = add_client_verb(verbs, "doctor", cmd_doctor, reads=True)
    add_env_option(doctor, "--db FILE", None, "the farm's file, which need not exist; by default one in this folder")
    add_env_option(doctor, "--host ADDRESS", "127.0.0.1", "the address that a server would listen on")
    add_env_option(doctor, "--port PORT", "5000", "the port that it would listen on; by default 5000", port_number)
    login = add_verb(verbs, "login", cmd_login, needs_db=False)
    login.add_argument("url", metavar="URL", help="HOST:PORT, or https://HOST:PORT")
    login.add_argument("--fingerprint", default="", metavar="SHA256:...",
                       help="of the certificate that the server must show; without it there is a question")
    login.add_argument("--user", metavar="NAME", help="by default your name on this machine")


def make_parser(kind: Type[Parser] = Parser) -> Parser:
    """The parser of the command line."""
    parser = kind(
        prog="taskfarm.py", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="taskfarm.py VERB ...      or, to serve: taskfarm.py --db FILE",
        epilog="""three lines to start with:
  python3 taskfarm.py --db runs.sqlite --host 0.0.0.0 &
  python3 taskfarm.py new 1000 --name first -- echo tile {task}
  python3 taskfarm.py work first -j 4
and 'python3 taskfarm.py status first --watch' shows how far it is.
'python3 taskfarm.py VERB --help' says more, with examples.""")
    parser.add_argument("--version", action="version", version="taskfarm " + __version__)
    verbs = parser.add_subparsers(metavar="VERB", required=True, prog="taskfarm.py", help=argparse.SUPPRESS)
    add_client_verbs(verbs)
    serve = add_verb(verbs, "serve", cmd_serve)
    add_env_option(serve, "--host ADDRESS", "127.0.0.1", "the address to listen on, 0.0.0.0 for all of them; by "
                   "default 127.0.0.1, for this machine alone")
    add_env_option(serve, "--port PORT", "5000", "the port to listen on, 0 for any free one; by default 5000",
                   port_number)
    add_env_option(serve, "--advertise NAME", "", "the host name for clients, where it is not the address to listen on")
    serve.add_argument("--allow-host", action="append", metavar="NAME", type=host_name,
                       default=os.environ.get("TASKFARM_ALLOW_HOST", "").split(),
                       help="another name by which clients reach it, as an alias or that of a proxy; may come again "
                       "(TASKFARM_ALLOW_HOST, with blanks between)")
    add_env_option(serve, "--access-log FILE", "", "a file that gets a line for each request, - for standard output")
    add_env_option(serve, "--token-days DAYS", str(TOKEN_DAYS), "how long the session of a program that logs in with a "
                   "password lasts, 0 until the password changes; by default 30",
                   number_type(float, 0, 36500, "a number of days from 0 to 36500"))
    add_env_option(serve, "--tls-cert FILE", "", "the site's certificate in place of the farm's own: PEM, with those "
                   "that signed it; read again on SIGHUP")
    add_env_option(serve, "--tls-key FILE", "", "its key: PEM, without a password")
    serve.add_argument("--plain-http", action="store_true", help="take plain HTTP from other machines too, where "
                       "nobody can listen on the way")
    serve.add_argument("--private", action="store_true",
                       default=os.environ.get("TASKFARM_PRIVATE", "0") not in ("", "0"),
                       help="users see and touch their own runs and workers only (TASKFARM_PRIVATE=1)")
    add_verb(verbs, "audit", cmd_audit).add_argument("--json", action="store_true", help="print JSON")
    add_verb(verbs, "check", cmd_check)
    work = add_verb(verbs, "work", cmd_work, needs_db=False)
    work.usage = "taskfarm.py work RUN ...|--any [-j N] [options] [-- COMMAND ...]"
    work.add_argument("runs", metavar="RUN", nargs="*", help=CHANGED_RUN + "; of several, the first that has tasks. "
                      "Where one is called like a program, end them with --")
    work.add_argument("--any", action="store_true", help="all runs that you have made and that know their command, the "
                      "oldest first")
    add_parameter_options(work.add_mutually_exclusive_group(), "values")
    work.add_argument("--task", type=whole_number, metavar="N", help="run this task alone, once")
    add_work_options(work)
    run = add_verb(verbs, "run", cmd_run, needs_db=False)
    run.usage = "taskfarm.py run N [-j N] [options] -- COMMAND ..."
    add_run_options(run)
    run.set_defaults(task=None)
    run.add_argument("--retry", action="store_true", help="let the failed tasks run again")
    add_env_option(run, "--db FILE", None, "the farm's file; by default %s in this folder, if it is there or no farm "
                   "answers" % OWN_FILE)
    add_env_option(run, "--host ADDRESS", None, "the address to listen on; by default 127.0.0.1, for this machine "
                   "alone, and in a batch job 0.0.0.0, so that others may join")
    add_env_option(run, "--advertise NAME", "", "the host name for other nodes, where it is not the address to listen "
                   "on")
    add_work_options(run)
    run.set_defaults(idle=None)
    add_verb(verbs, "progress", cmd_progress, needs_db=False).add_argument(
        "percent", metavar="PERCENT", help="0 to 100",
        type=number_type(lambda text: float(text.rstrip("%")), 0, 100, "a percentage from 0 to 100"))
    add_bench_options(add_verb(verbs, "bench", cmd_bench, needs_db=False))
    add_verb(verbs, "backup", cmd_backup).add_argument("copy", metavar="COPY", help="the file to make")

    add_verb(verbs, "completion", cmd_completion, needs_db=False).add_argument(
        "shell", choices=("bash", "zsh", "fish", "runs"), help="for which shell; 'runs' prints the names of runs alone")

    user = verbs.add_parser("user", description="add, list, change and remove users; 'user VERB --help' says more, "
                            "with an example", allow_abbrev=False)
    users = user.add_subparsers(title="verbs", metavar="VERB", required=True)
    add_verb(users, "list", cmd_user_list)
    for name, command in (("add", cmd_user_add), ("passwd", cmd_user_passwd), ("remove", cmd_user_remove)):
        add_verb(users, name, command).add_argument("name", metavar="NAME", help="of the user")
    parser.description = ("Hands out numbered tasks to workers over HTTP; one SQLite file has the state.\n" +
                          verb_summary(verbs.choices))
    return parser


COMPLETION_S = 1.5                  # a TAB waits for so long at most for the names of runs
COMPLETED_RUNS = 500                # the newest

# Bash and zsh. What is typed is compared, and never run or expanded. `python3 taskfarm.py` is completed too, so the
# function stands before that of python3, and hands on to it every other script.
BASH_COMPLETION = """
_taskfarm() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} at=1 verb= words= runs= files= word
    COMPREPLY=()
    if [[ ${COMP_WORDS[0]##*/} == python* ]]; then
        if [[ ${COMP_WORDS[1]##*/} != taskfarm.py ]]; then
            [[ -z ${_taskfarm_python-} ]] || $_taskfarm_python "$@"
            return
        fi
        at=2
    fi
    (( COMP_CWORD >= at )) || return 0
    for word in "${COMP_WORDS[@]:$at:$((COMP_CWORD - at))}"; do
        [[ $word != -- ]] || return 0       # a command follows: files
        case $verb in
            %(parents)s) [[ $word == -* ]] || verb+="${verb:+ }$word" ;;
        esac
    done
    case $verb in
%(verbs)s
    esac
    case "$verb $prev" in
%(values)s
    esac
    [[ $files != *" $prev "* ]] || return 0
    [[ -z $runs || $cur == -* ]] || words=$(%(program)s completion runs 2>/dev/null)
    for word in $(printf '%%s ' $words); do
        [[ $word != "$cur"* || $word == -* && $cur != -* ]] || COMPREPLY+=("$word")
    done
}
"""
BASH_START = """
_comp_load python3 2>/dev/null || __load_completion python3 2>/dev/null
if [[ "$(complete -p python3 2>/dev/null)" =~ -F\\ ([^ ]+) && ${BASH_REMATCH[1]} != _taskfarm ]]; then
    _taskfarm_python=${BASH_REMATCH[1]}
fi
complete -o default -F _taskfarm taskfarm.py taskfarm python3
"""
ZSH_START = """
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
autoload -Uz bashcompinit && bashcompinit
_taskfarm_or_python() {
    if [[ ${words[2]:t} == taskfarm.py ]]; then _bash_complete -o default -F _taskfarm; else _python "$@"; fi
}
complete -o default -F _taskfarm taskfarm.py taskfarm
compdef _taskfarm_or_python python3
"""
FISH_START = """
function __taskfarm_at    # whether the words so far name this verb
    set -l words (commandline -opc)
    set -l verb
    if string match -qr '(^|/)python[0-9.]*$' -- $words[1]
        set -e words[1]
        string match -qr '(^|/)taskfarm\\.py$' -- $words[1]; or return 1
    end
    contains -- -- $words; and return 1
    for word in $words[2..-1]
        if not string match -q -- '-*' $word; and contains -- "$verb" %(parents)s
            set verb (string trim "$verb $word")
        end
    end
    test "$verb" = "$argv"
end
for program in taskfarm.py taskfarm python3
%(lines)s
end
"""


class Completion(NamedTuple):
    """What can follow the words of a verb."""
    verb: str
    words: List[str]                # verbs below it
    options: Dict[str, List[str]]   # each with the choices for its value; RUN among them where it takes a run
    takes_value: List[str]          # options
    takes_run: bool


def completions(parser: Parser, verb: str = "") -> Iterator[Completion]:
    """What can follow each verb, as its help says it: argparse does not tell what it has been told."""
    options, takes_value = {}, []
    text = parser.format_help()
    for head in re.findall(r"^  (-.*?)(?:  |$)", text, re.M):
        names = [word.strip(",") for word in head.split() if word.startswith("-")]
        value = re.sub(r"--?[a-z][-\w]*,?", "", head).strip()
        options.update({name: value.strip("{}").split(",") if value[:1] == "{" or value == "RUN" else []
                        for name in names})
        takes_value += names if value else []
    below = parser.verbs.choices if parser.verbs else {}
    choices = re.findall(r"^  \{(.*)\}", text, re.M)
    words = [*below, *(choices[0].split(",") if choices else [])]
    yield Completion(verb, words, options, takes_value, bool(re.search("^  RUN ", text, re.M)))
    for name, parser_below in below.items():
        yield from completions(parser_below, (verb + " " + name).strip())


def bash_completion(found: Sequence[Completion], program: str) -> str:
    """The functions that bash and zsh call at a TAB."""
    verbs, values = [], []
    for entry in found:
        files = [option for option in entry.takes_value if not entry.options[option]]
        verbs.append("        '%s') words='%s' files=' %s '%s ;;" % (
            entry.verb, " ".join([*entry.words, *entry.options]), " ".join(files), " runs=1" * entry.takes_run))
        values += ["        '%s %s') %s ;;" % (entry.verb, option, "words= runs=1" if choices == ["RUN"] else
                                               "words='%s' runs=" % " ".join(choices))
                   for option, choices in entry.options.items() if choices]
    return BASH_COMPLETION % {"verbs": "\n".join(verbs), "values": "\n".join(values), "program": program,
                              "parents": parents(found, "|")}


def parents(found: Sequence[Completion], between: str) -> str:
    """The verbs that have verbs below them, quoted for a shell."""
    return between.join("'%s'" % entry.verb for entry in found
                        if any(other.verb.startswith((entry.verb + " ").lstrip()) for other in found if other != entry))


def fish_completion(found: Sequence[Completion], program: str) -> str:
    """The script for fish."""
    lines, names = [], "'(%s completion runs 2>/dev/null)'" % program.replace("'", "\\'")
    for entry in found:
        start = "    complete -c $program -n '__taskfarm_at %s' " % entry.verb
        if entry.words:
            lines.append(start + "-f -a '%s'" % " ".join(entry.words))
        if entry.takes_run:
            lines.append(start + "-f -a " + names)
        for option, choices in entry.options.items():
            kind = "-l " if option[:2] == "--" else "-s "
            lines.append(start + kind + option.lstrip("-") + " -r" * (option in entry.takes_value) + (
                " -f -a " + (names if choices == ["RUN"] else "'%s'" % " ".join(choices)) if choices else ""))
    return FISH_START % {"lines": "\n".join(lines), "parents": parents(found, " ")}


def cmd_completion(args: argparse.Namespace) -> int:
    """print a script that lets a TAB complete verbs, options and runs

    It goes into the file that the shell reads at its start. The names of runs are those of the farm that
    verbs ask; where it does not answer within 1.5 s, a TAB shows none.

    examples:
      python3 taskfarm.py completion bash >> ~/.bashrc
      python3 taskfarm.py completion zsh >> ~/.zshrc
      python3 taskfarm.py completion fish > ~/.config/fish/conf.d/taskfarm.fish
    """
    if args.shell == "runs":
        patience = threading.Timer(COMPLETION_S, os._exit, [0])       # whatever it waits for, as the name of a host
        patience.daemon = True
        patience.start()
        with contextlib.suppress(Refusal, FarmError, Unreachable), \
                contextlib.closing(Client(functools.partial(find_access, os.environ))) as client:
            runs = client.ask("GET", "/api/runs")["data"][-COMPLETED_RUNS:]
            # A name that a shell would take for more than a word is left out: anybody may give a run a name.
            print("\n".join(run["name"] if re.fullmatch(r"\w[\w.+-]*", run.get("name") or "") else run["uuid"][:8]
                            for run in runs if re.fullmatch("[0-9a-f]{32}", str(run["uuid"]))))
        return 0
    found = list(completions(make_parser()))
    program = "%s %s" % (shlex.quote(sys.executable), shlex.quote(os.path.abspath(__file__)))
    if args.shell == "fish":
        print(fish_completion(found, program))
    else:
        print(bash_completion(found, program) + (BASH_START if args.shell == "bash" else ZSH_START))
    return 0


def check_verb(parser: Parser, words: Sequence[str]) -> None:
    """Exit with the nearest verb where a word is in the place of a verb and is none."""
    for number, word in enumerate(words):
        if not parser.verbs or word.startswith("-"):
            return
        if word not in parser.verbs.choices:
            near = difflib.get_close_matches(word.lower(), parser.verbs.choices, 1)
            parser.error("there is no verb %s: %s" % (shlex.quote(word), (
                "did you mean '%s %s'?" if near else "'%s %s' shows all") % (PROGRAM, " ".join(map(shlex.quote, [
                    *words[:number], *(near + [*words[number + 1:]] if near else ["--help"])])))))
        parser = parser.verbs.choices[word]


def parse_words(parser: Parser, words: List[str]) -> argparse.Namespace:
    """Parse the words of a command line. What follows the first -- of `new`, `work` or `run` is the command, as it is.

    argparse of some versions of Python would remove a second -- from the command.
    """
    verb = words[0]
    check_verb(parser, words)
    if verb == "submit":
        at = words.index("--") if "--" in words else len(words)
        # argparse would take a value like -plow for an option of our own.
        typed = re.sub(r"(\0--(?:with|setup))\0", r"\1=", "\0".join(words[:at])).split("\0")
        args = parser.parse_args(typed)
        args.words, args.work_words = words[at + 1:], words_for_work(args)
        return args
    if verb not in ("work", "run", "new"):
        return parser.parse_args(words)
    at = words.index("--") if "--" in words else len(words) if verb == "new" else find_command(words)
    command = words[at:]
    if command[:1] == ["--"]:
        del command[0]
    elif any(word.startswith("-") for word in command):
        parser.error("a -- belongs before the command, to tell its options from those of %s: python3 taskfarm.py "
                     "%s -- %s" % (verb, *(" ".join(map(shlex.quote, part)) for part in (words[:at], command))))
    args = parser.parse_args(words[:at])
    args.words += command
    if verb == "run" and not args.words:
        parser.error("which command? python3 taskfarm.py run N -- COMMAND ...")
    if verb == "work" and bool(args.runs) == args.any:
        parser.error("work takes the name of a run, or of several, or --any for all of yours" if not args.any else
                     "--any means all of your runs: leave out %s" % " ".join(args.runs))
    if verb == "work" and (args.words or args.task is not None) and (args.any or len(args.runs) > 1):
        parser.error("several runs have a command each, and tasks of the same numbers: leave %s out, or name one run"
                     % ("it" if args.words else "--task"))
    return args


def find_command(words: Sequence[str]) -> int:
    """Where the command begins in words of `work` or `run` without --: behind the first that are a whole line.

    Words after the run of `work` that look like names, the first of which is no program, are further runs.
    """
    parser = make_parser(TrialParser)
    for at in range(2, min(len(words), MOST_OPTION_WORDS)):
        if not words[at].startswith("-"):
            with contextlib.suppress(Refusal):
                args = parser.parse_args(words[:at])
                if words[0] == "work" and not (args.runs or args.any):
                    continue
                names = words[0] == "work" and all(re.fullmatch(r"[^\s/{]+", word) for word in words[at:])
                return len(words) if names and not shutil.which(words[at]) else at
    return len(words)


def open_standard_streams() -> None:
    """Open those of the descriptors 0, 1 and 2 that are closed, on /dev/null.

    Otherwise the database or a connection could get such a number, and messages would be written into it.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor < 3:       # the system gives the lowest that is free
        os.set_inheritable(descriptor, True)
        descriptor = os.dup(descriptor)
    os.close(descriptor)
    sys.stdin = sys.stdin or open(0, closefd=False)     # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)     # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)     # noqa: SIM115


def lack_of(error: Exception) -> str:
    """What the machine, or a limit (ulimit), lacks by an error that it raised; "" for another error."""
    if isinstance(error, MemoryError):
        return "no memory is left"
    if isinstance(error, OSError) and error.errno in TEMPORARY_ERRORS:
        return (error.strerror or str(error)) + (" (%s)" % error.filename if error.filename else "")
    return str(error) if isinstance(error, RuntimeError) and "start new thread" in str(error) else ""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a verb and return the exit status: 0, 1 refused, 2 wrong usage, 5 no server, 6 no login, 130 Ctrl-C.

    `work` has more.
    """
    open_standard_streams()
    with contextlib.suppress(AttributeError):       # for names and messages that the terminal's encoding does not have
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    words = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    if not words and not os.environ.get("TASKFARM_DB"):
        parser.print_help()
        return 0
    if not words or words[0].startswith("-") and words[0] not in ("-h", "--help", "--version"):
        words.insert(0, "serve")
    args = parse_words(parser, words)
    if args.needs_db and not args.db:
        parser.error("which file? --db names it (or TASKFARM_DB), as in '%s %s --db runs.sqlite'" % (
            PROGRAM, " ".join(map(shlex.quote, words))))
    try:
        with contextlib.ExitStack() as undo:
            if args.asks_server and args.db:
                undo.enter_context(served_for_call(args.db))
                args.url = ""       # its default is the TASKFARM_URL of before
            status = int(args.command(args))
        sys.stdout.flush()
        return status
    except (Refusal, FarmError, Unreachable) as error:
        print_notice(str(error).replace("--db FILE'", "--db %s'" % shlex.quote(getattr(args, "db", None) or "FILE")))
        return EXIT_NO_SERVER if isinstance(error, Unreachable) else (
            EXIT_NO_LOGIN if isinstance(error, Unauthorized) else 1)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (OSError, MemoryError, RuntimeError) as error:
        if not isinstance(error, BrokenPipeError):      # that is, when the reader of our output has ended
            if not lack_of(error):
                raise
            print_notice("cannot go on here: %s ('ulimit -a' and 'df' show the limits)" % lack_of(error))
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # for what the interpreter still holds
        return 1


if __name__ == "__main__":
    sys.exit(main())
