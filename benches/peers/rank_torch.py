"""One rank of a torch peer: averages GPT-2's tensors and writes its measurements.

    rank_torch.py METHOD LAYOUT WARM-UPS REPETITIONS DIR

RANK, WORLD_SIZE, ... are set as by torchrun. The measurements go to DIR/rank-R.json.

Element j of tensor i on rank r is (31 i + j) mod 61 + 8 r. All sums are integers that f32 holds
exactly, so the mean does not depend on the order of summation. The tensors are filled before and
checked after every average, outside of the measured time.
"""

import json
import os
import sys
import time

import torch
import torch.distributed as dist

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
PERIOD = 61
STEP = PERIOD << 14  # elements checked at once, so that the check needs little memory
PATTERN = torch.arange(PERIOD, dtype=torch.float32).repeat(STEP // PERIOD + 1)


def join():
    dist.init_process_group("gloo")


def per_tensor(params):
    """One all-reduce per tensor, then a division."""
    join()

    def average():
        for param in params:
            dist.all_reduce(param.data)
            param.data /= RANKS

    return average


def overlapped(params):
    """All all-reduces started at once. gloo runs them on two threads."""
    join()

    def average():
        works = [dist.all_reduce(param.data, async_op=True) for param in params]
        for work, param in zip(works, params):
            work.wait()
            param.data /= RANKS

    return average


def flattened(params):
    """Through a flat buffer that is reused: a new one would cost a page fault every 4 KiB."""
    join()
    flat = torch.zeros(sum(param.numel() for param in params))
    parts = [
        part.view_as(param) for part, param in zip(flat.split([p.numel() for p in params]), params)
    ]

    def average():
        for part, param in zip(parts, params):
            part.copy_(param.data)
        dist.all_reduce(flat)
        flat.div_(RANKS)
        for part, param in zip(parts, params):
            param.data.copy_(part)

    return average


def periodic(params):
    """PyTorch's averager. It flattens into a new buffer, and the parameters become views of it."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    join()
    for param in params:  # parameters without a gradient would be skipped
        param.grad = torch.zeros(1).expand_as(param)
    averager = PeriodicModelAverager(period=1)
    return lambda: averager.average_parameters(params)


def local_sgd(params):
    """Accelerate's LocalSGD, with the barrier of its average."""
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD
    from accelerate.utils import DistributedType

    accelerator = Accelerator(cpu=True)  # without cpu=True each rank is a world of one
    assert (
        accelerator.num_processes == RANKS
    ), f"Accelerate has {accelerator.num_processes} ranks instead of {RANKS}"
    assert accelerator.distributed_type == DistributedType.MULTI_CPU, accelerator.distributed_type
    sgd = LocalSGD(accelerator=accelerator, model=torch.nn.ParameterList(params), local_sgd_steps=1)
    return sgd.step  # the further average on leaving the context is not timed


def fill(params):
    for i, param in enumerate(params):
        for part, base in pieces(i, param):
            torch.add(base, 8 * RANK, out=part)


def wrong(params):
    """Number of elements that are not the mean."""
    mean = 4 * (RANKS - 1)
    return sum(
        int((part - mean != base).sum())
        for i, param in enumerate(params)
        for part, base in pieces(i, param)
    )


def pieces(i, param):
    start = 31 * i % PERIOD
    for part in param.data.view(-1).split(STEP):
        yield part, PATTERN[start : start + part.numel()]


def memory(field):
    """A field of /proc/self/status, in KiB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))


def main():
    method, layout, warmups, repetitions, directory = sys.argv[1:]
    with open(layout) as file:
        shapes = json.load(file)
    params = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]
    fill(params)
    wrong(params)  # before memory is read, so that the memory of the check itself is included
    before = memory("VmRSS")
    average = globals()[method](params)
    assert (
        dist.get_backend() == "gloo" and dist.get_world_size() == RANKS and dist.get_rank() == RANK
    )
    dist.barrier()
    samples, peak, bad = [], 0, 0
    for _ in range(int(warmups) + int(repetitions)):
        fill(params)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets VmHWM to the resident size
        dist.barrier()
        start = time.monotonic_ns()
        average()
        end = time.monotonic_ns()
        peak = max(peak, memory("VmHWM"))
        bad += wrong(params)
        samples.append([start, end])
    with open(os.path.join(directory, f"rank-{RANK}.json"), "w") as file:
        json.dump(
            {
                "ranks": dist.get_world_size(),
                "threads": torch.get_num_threads(),
                "samples": samples[int(warmups) :],
                "wrong": bad,
                "before": before,
                "peak": peak,
            },
            file,
        )
    dist.barrier()


if __name__ == "__main__":
    main()
