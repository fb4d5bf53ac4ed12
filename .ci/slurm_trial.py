"""`submit` on a real Slurm: nodes tfci1 and tfci2 in the partition long, tfci3 and tfci4 in hole, where tfci4 fails.

Run by .ci/slurm. Each step says what it has seen; the first that does not come true ends the trial.
"""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

LAB = Path(sys.argv[1])
TASKFARM = Path(__file__).resolve().parents[1] / "taskfarm.py"
STARTED = time.monotonic()


def seen(what):
    print("%4.0f s  %s" % (time.monotonic() - STARTED, what), flush=True)


def run(*words, status=0, **environ):
    """All that a verb says."""
    done = subprocess.run([sys.executable, str(TASKFARM), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          cwd=LAB, env=dict(os.environ, **environ), timeout=120, stdin=subprocess.DEVNULL, text=True)
    assert done.returncode == status, (words, done.returncode, done.stdout)
    return done.stdout


def submit(uuid, *words, partition="hole", width=2, **more):
    return run("submit", uuid, "-n", str(width), "-t", "1", "-j", "2", "--with=-p " + partition, *words,
               "--", "./tile.sh", "{task}", **more)


def new(number, name):
    return run("new", str(number), "--name", name).split()[-1]


def status(uuid, look=False):
    if look:        # before the minute is over
        with contextlib.suppress(FileNotFoundError):
            (LAB / "home/.local/state/taskfarm/jobs.json").unlink()
    return json.loads(run("status", uuid, "--json").splitlines()[-1])


def jobs(uuid):
    """What Slurm has of a run: lines of state and id."""
    done = subprocess.run(["squeue", "-h", "-o", "%t %i %r", "--name", "tf-" + uuid[:8]], stdout=subprocess.PIPE,
                          text=True)
    return done.stdout.splitlines()


def until(what, limit_s):
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        value = what()
        if value:
            return value
        time.sleep(0.5)
    raise AssertionError("not within %d s; the last was %r" % (limit_s, value))


def log_of(uuid):
    return "\n".join(path.read_text() for path in (LAB / ("tf-" + uuid[:8])).glob("*.out"))


def trial():
    # Over walltimes. A worker here does some first, so that the times of tasks are known.
    (LAB / "tile.sh").write_text("#!/bin/sh\n[ $(hostname) != tfci4 ] || { echo no licence >&2; exit 3; }\nsleep 2\n")
    (LAB / "tile.sh").chmod(0o755)
    long = new(200, "long")
    run("work", long, "-j", "20", "--quiet", "--until", "+15", "--leave-ok", "--", "./tile.sh", "{task}")
    left = status(long)["run"]["numWaiting"]
    plan = submit(long, "--dry-run", partition="long")
    assert "--array=1-%d%%2" % (4 if left * 2 > 58 * 4 else 2) in plan, (left, plan)
    said = submit(long, "--generations", "4", partition="long")
    assert "8 jobs" in said, said
    seen("%d tasks are left for arrays of jobs of a minute; %s" % (left, said.splitlines()[0]))

    refused = submit(new(5, "refused"), partition="nosuch", status=1)
    assert "nvalid partition" in refused and len(refused.splitlines()) == 1, refused
    seen(refused.strip())
    late = new(5, "late")
    run("submit", late, "-n", "2", "-t", "2:00:00", "--with=-p hole", "--", "./tile.sh", "{task}")
    until(lambda: any("PartitionTimeLimit" in line for line in jobs(late)), 20)
    status(late, look=True)
    assert "will never begin: PartitionTimeLimit" in run("status", late)
    run("submit", late, "--cancel")
    assert until(lambda: not jobs(late), 10)
    seen("a walltime beyond the partition's is pending for ever, status says so, and --cancel ends it")

    hole = new(30, "hole")
    submit(hole, "--generations", "20")
    until(lambda: not any(line.startswith("PD") for line in jobs(hole)), 60)
    shown = status(hole, look=True)
    assert shown["jobs"]["stopped"] and "no licence" in shown["jobs"]["failed"][0]["why"], shown["jobs"]
    assert "jobs in a row failed at once" in log_of(hole)
    assert len(list((LAB / ("tf-" + hole[:8])).iterdir())) < 20
    seen("a node that fails everything took %d jobs, then the pending ones were cancelled" % sum(
        "no licence" in path.read_text() for path in (LAB / ("tf-" + hole[:8])).iterdir()))
    until(lambda: status(hole)["over"], 60)
    assert status(hole)["run"]["numFailed"] == 0

    # Killed when Slurm has taken the array and the verb does not know it yet; said again.
    twice = new(500, "twice")
    (LAB / "bin").mkdir()
    (LAB / "bin/sbatch").write_text("#!/bin/sh\n%s \"$@\"\ntouch taken\nexec sleep 3\n" % shutil.which("sbatch"))
    (LAB / "bin/sbatch").chmod(0o755)
    words = ["submit", twice, "-n", "2", "-t", "2", "--with=-p hole", "--", "sleep", "1"]
    killed = subprocess.Popen([sys.executable, str(TASKFARM), *words], cwd=LAB,
                              env=dict(os.environ, PATH="%s/bin:%s" % (LAB, os.environ["PATH"])))
    until((LAB / "taken").exists, 20)
    killed.kill()
    killed.wait()
    said = run(*words)
    assert "nothing more is sent" in said, said
    assert len({line.split()[1].partition("_")[0] for line in jobs(twice)}) == 1, jobs(twice)
    seen("killed and said again: " + said.strip())
    until(lambda: status(twice)["run"]["numComputing"] == 2 or status(twice)["run"]["numDone"], 20)
    run("submit", twice, "--cancel")
    until(lambda: not jobs(twice), 30)
    after = until(lambda: (lambda now: now["numComputing"] == 0 and now)(status(twice)["run"]), 10)
    assert after["numFailed"] == 0 and after["numWaiting"] > 400, after
    seen("cancelled: %d tasks wait, none has failed" % after["numWaiting"])

    # The controller is away when jobs are submitted, and when a worker ends.
    away = new(4, "away")
    controller = int((LAB / "ctld.pid").read_text())
    os.kill(controller, signal.SIGTERM)
    until(lambda: not Path("/proc/%d" % controller).exists(), 20)
    waiting = subprocess.Popen([sys.executable, str(TASKFARM), "submit", away, "-n", "1", "-t", "1", "--with=-p hole",
                                "--", "true"], cwd=LAB, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert status(long, look=True)["jobs"] is None
    time.sleep(20)
    subprocess.run(["slurmctld", "-f", os.environ["SLURM_CONF"]], check=True)
    said = waiting.communicate(timeout=90)[0]
    assert waiting.returncode == 0 and "1 job called" in said, said
    until(lambda: status(away)["over"], 60)
    assert len(list((LAB / ("tf-" + away[:8])).iterdir())) == 1
    seen("the controller was away: %s" % said.splitlines()[0])

    until(lambda: status(long)["over"], 120)
    until(lambda: not jobs(long), 40)
    done = status(long)["run"]
    outputs = sorted((LAB / ("tf-" + long[:8])).iterdir())
    assert done["numDone"] == 200 and "the run is over" in log_of(long) and 2 < len(outputs) < 8, (done, outputs)
    seen("200 tasks over %d jobs of a minute each; the other %d of 8 were cancelled" % (len(outputs), 8 - len(outputs)))


if __name__ == "__main__":
    server = subprocess.Popen([sys.executable, str(TASKFARM), "--db", str(LAB / "farm.sqlite"), "--host", "0.0.0.0",
                               "--port", "0"], stdout=subprocess.DEVNULL)
    try:
        trial()
    finally:
        server.terminate()
        server.wait()
