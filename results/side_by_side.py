"""Several runs at a time on each GPU: a pool of processes, each of which starts CUDA once and then takes job after job."""
import contextlib
import json
import multiprocessing
import sys
import time

import torch


def divided():
    """The command line -> the words before --, which are a script's own, and those after it, which it hands on."""
    argv = sys.argv[1:]
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def worker(jobs, work, gpu):
    if torch.cuda.is_available():
        torch.cuda.set_device(gpu)
    while job := jobs.get():
        name, log, *rest = job
        with open(log, "w", buffering=1) as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
            code = work(name, *rest)
        if code:
            print(f"{name}: exit code {code}, see {log}", flush=True)


def logged(log):
    """The entries of a run's log, as far as there are any; the last line of a running one may be torn."""
    for line in log.read_text().splitlines() if log.exists() else []:
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def side_by_side(work, jobs, processes, limit, gather, table):
    """work(name, ..) of every job (name, file for its output, ..), `processes` at a time on each GPU, for `limit` seconds.

    gather() is called every 20 seconds, table() every 60, both at the end: a set that is cut off leaves what it had.
    """
    context = multiprocessing.get_context("spawn")
    began = time.time()
    queue = context.SimpleQueue()
    workers = processes * max(1, torch.cuda.device_count())
    running = [context.Process(target=worker, args=(queue, work, n // processes), daemon=True) for n in range(workers)]
    for p in running:
        p.start()
    for job in [*jobs, *[None] * workers]:
        queue.put(job)
    said = shown = time.time()
    while any(p.is_alive() for p in running) and time.time() - began < limit:
        time.sleep(1)
        if time.time() - said > 20:
            said = time.time()
            gather()
            print(f"{time.time() - began:.0f} s: {sum(log.exists() for _, log, *_ in jobs)} of {len(jobs)} runs begun", flush=True)
        if time.time() - shown > 60:
            shown = time.time()
            table()
    for p in running:
        p.kill()
    gather()
    print(f"{time.time() - began:.0f} s in all")
    table()
