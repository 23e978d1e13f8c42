"""Real processes of one group on this machine: jobs are done on every rank, and the answers come back here."""

import datetime
import multiprocessing
import queue
import time
import traceback
from multiprocessing import forkserver

import torch
from torch import distributed

SECONDS = 60
# what every rank needs is imported once, by a process that does nothing else; DistributedDataParallel needs dynamo
PRELOADED = ["torch._dynamo", "torch.distributed.fsdp", "batchnorm.torch"]


def warm():
    """Return a context whose processes are forked from one that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # before someone else starts it with a list of his own
    forkserver.ensure_running()
    return context


def _enter(rank, ranks, meeting, jobs, answers, seconds):
    """Join the group, do the jobs, and send what each returns or how it failed."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=seconds)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=timeout)
    for name, (job, *arguments) in jobs.items():
        torch.manual_seed(rank)
        try:
            answers.put((name, rank, None, job(rank, *arguments)))
        except Exception:
            answers.put((name, rank, traceback.format_exc(), None))
    distributed.barrier()
    distributed.destroy_process_group()


def on_ranks(folder, ranks, jobs, seconds=SECONDS):
    """Do the jobs in some processes; return the answers of each rank, by job, and the errors, by job and rank.

    A rank that dies gives no more answers; the others are waited for until all have gone.
    """
    context = warm()
    answers = context.Queue()
    meeting = f"file://{folder / f'meeting of {ranks}'}"
    processes = [
        context.Process(target=_enter, args=(rank, ranks, meeting, jobs, answers, seconds), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        received = _received(answers, processes, ranks * len(jobs))
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    returned = {name: [None] * ranks for name in jobs}
    for name, rank, _, answer in received:
        returned[name][rank] = answer
    return returned, {(name, rank): error for name, rank, error, _ in received if error}


def _received(answers, processes, expected):
    received, end = [], time.monotonic() + 2 * SECONDS
    while len(received) < expected and time.monotonic() < end:
        gone = not any(process.is_alive() for process in processes)
        try:
            received.append(answers.get(timeout=1))
        except queue.Empty:
            if gone:
                break
    return received
