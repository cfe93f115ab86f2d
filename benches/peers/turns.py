"""A turn of a peer: start its ranks, average WARM_UPS times, average once with a clock, end."""

import json
import math
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

WARM_UPS = 2
TURN_S = 300  # limit on a turn


class Failed(Exception):
    """The reason why a peer can't be measured, in one line."""


@dataclass
class Sample:
    ms: float  # from the start of the first rank, behind a barrier, to the end of the last
    extra_mib: float | None  # maximum over ranks; None: not measured
    wrong: int | None  # elements of all ranks, warm-ups included
    threads: int | None  # of torch, per rank


def gpt2():
    """The shapes of GPT-2's 148 tensors, as allreduce-bench has them in models.rs."""
    width = 768
    shapes = [[50257, width], [1024, width]]
    for _ in range(12):
        for shape in [
            [width],
            [width, 3 * width],
            [width, width],
            [width],
            [width, 4 * width],
            [4 * width, width],
        ]:
            shapes += [shape, shape[-1:]]
    return shapes + [[width], [width]]


def sizes():
    """Number of elements of each tensor."""
    return [math.prod(shape) for shape in gpt2()]


def run(commands, folder):
    """Runs commands side by side, each as (argv, additional environment). One failure ends all."""
    processes = []
    try:
        for number, (argv, environment) in enumerate(commands):
            with open(folder / f"stdout-{number}", "w") as out, open(
                folder / f"stderr-{number}", "w"
            ) as err:
                processes.append(
                    subprocess.Popen(
                        argv,
                        env=os.environ | environment,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=err,
                        start_new_session=True,
                    )
                )
        end = time.monotonic() + TURN_S
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                time.sleep(1)  # the process at fault may not have reported yet
                break
            if time.monotonic() > end:
                raise Failed(f"not done in {TURN_S} s")
            time.sleep(0.02)
    finally:
        stop(processes)
    codes = [process.returncode for process in processes]
    if any(codes):
        # A process that ended by itself reports more than its peers.
        number = min(range(len(codes)), key=lambda i: (codes[i] == 0, codes[i] < 0))
        raise Failed(
            last_line(folder / f"stderr-{number}") or f"process {number} ended with {codes[number]}"
        )


def stop(processes):
    for how in [signal.SIGTERM, signal.SIGKILL]:  # mpirun ends its ranks on SIGTERM
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, how)
        for process in processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                pass


def last_line(file):
    lines = [line.strip() for line in Path(file).read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line.strip("-")]  # mpirun prints rules
    return lines[-1] if lines else ""


def ranks_sample(folder, ranks):
    """Reads the files that rank_torch.py and rank_mpi.c write."""
    seen = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    if any(rank["ranks"] != ranks for rank in seen):
        raise Failed(f"world sizes {[rank['ranks'] for rank in seen]} instead of {ranks}")
    (times,) = zip(*(rank["samples"] for rank in seen))
    first, last = min(start for start, _ in times), max(end for _, end in times)
    extra = max(rank["peak"] - rank["before"] for rank in seen) / 1024
    return Sample(
        (last - first) / 1e6, extra, sum(rank["wrong"] for rank in seen), seen[0].get("threads")
    )


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def cores():
    return len(os.sched_getaffinity(0))
