"""The report: a table to read and a JSON document."""

import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import turns
import peers

MEMORY = (
    "peak of VmHWM, reset through /proc/self/clear_refs before each average, "
    "less VmRSS with the model filled"
)
BUSY = 0.5  # limit on the mean load of the minute before the first turn


@dataclass
class Row:
    key: str
    title: str
    ranks: int
    samples: list = field(default_factory=list)  # turns.Sample, in order
    note: str | None = None  # missing requirement or failure

    def times(self):
        return [sample.ms for sample in self.samples]

    def median(self):
        return statistics.median(self.times()) if self.samples else None

    def extra(self):
        return max(
            (sample.extra_mib for sample in self.samples if sample.extra_mib is not None),
            default=None,
        )

    def wrong(self):
        """Number of wrong elements. None: some were not checked."""
        known = [sample.wrong for sample in self.samples]
        return sum(known) if known and None not in known else None

    def fields(self):
        times = self.times()
        return {
            "peer": self.key,
            "title": self.title,
            "ranks": self.ranks,
            "median_ms": self.median(),
            "min_ms": min(times, default=None),
            "max_ms": max(times, default=None),
            "extra_mib": self.extra(),
            "wrong": self.wrong(),
            "note": self.note,
            "samples_ms": times,
            "samples_extra_mib": [sample.extra_mib for sample in self.samples],
            "threads": self.samples[0].threads if self.samples else None,
        }


def table(rows):
    lines = []
    for ranks in sorted({row.ranks for row in rows}):
        of = {row.key: row for row in rows if row.ranks == ranks}
        lines += [
            "",
            f"{f'{ranks} ranks':40}   median      min      max   /ours  /limit   extra       wrong",
            f"{'':40}       ms       ms       ms                     MiB",
        ]
        for row in of.values():
            line = f"{row.title:40}"
            if row.samples:
                times = row.times()
                line += "".join(f"{time:9.1f}" for time in [row.median(), min(times), max(times)])
                line += "".join(f"{ratio(row, of.get(key)):>8}" for key in ["ours", "limit"])
                line += f"{'-' if row.extra() is None else round(row.extra()):>8}"
                line += f"{'-' if row.wrong() is None else row.wrong():>12}"
            lines.append(f"{line}  {row.note or ''}".rstrip())
    return "\n".join(lines) + "\n"


def ratio(row, to):
    return f"{row.median() / to.median():.2f}" if to and to.samples else "-"


def heading(about):
    found, names = about["versions"], ["torch", "accelerate", "openmpi"]
    versions = ", ".join(f"{name} {found.get(name) or '-'}" for name in names)
    before, after = about["load"][0], about["load_at_end"][0]
    lines = [
        f"# {about['date']}, commit {about['commit']}",
        f"# {about['command']}",
        f"# machine  {about['cores']} cores, {about['cpu']}, {about['memory_gib']} GiB, "
        f"Linux {about['kernel']}, load {before:.1f} before and {after:.1f} after",
    ]
    if before > BUSY:
        lines.append("# BUSY     load in the minute before: no record unless that load has ended")
    lines += [
        f"# peers    {versions}",
        "# model    GPT-2: 148 tensors, 124,439,808 parameters in f32, one replica per rank",
        f"# turns    {about['repetitions']} of every peer, round-robin: new processes, "
        f"{turns.WARM_UPS} warm-ups, one timed average",
        "# time     from the start of the first rank, behind a barrier, to the end of the last",
        "# /limit   ratio to the one-pass limit: all cores of one process read all replicas once "
        "and write the mean to all",
        "# extra    maximum over ranks: " + MEMORY,
        "# wrong    elements that are not the mean, of all ranks and averages, with warm-ups",
    ]
    return "\n".join(lines) + "\n"


def about(setup, repetitions, load):
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(sys.argv),
        "commit": try_output(
            ["git", "-C", peers.ROOT, "describe", "--always", "--dirty", "--abbrev=7"]
        )
        or "unknown",
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": turns.cores(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "huge_pages": pages.read_text().strip() if pages.exists() else None,
        "load": load,
        "load_at_end": os.getloadavg(),
        "repetitions": repetitions,
        "warm_ups": turns.WARM_UPS,
        "memory": MEMORY,
        "mpirun": peers.Mpi.OPTIONS,
        "versions": versions(setup),
    }


def versions(setup):
    found = {"python": platform.python_version()}
    if isinstance(setup.answers.get("venv"), Path):
        frozen = try_output([setup.answers["venv"], "-m", "pip", "list", "--format=freeze"]) or ""
        found |= dict(line.split("==", 1) for line in frozen.splitlines() if "==" in line)
    for name, program in {"openmpi": "mpirun", "mpicc": "mpicc", "ours": setup.bench}.items():
        argv = [program, "--version"]
        found[name] = (try_output(argv) or "").partition("\n")[0].removeprefix(
            "mpirun (Open MPI) "
        ) or None
    return found


def try_output(argv):
    try:
        return peers.output(argv)
    except (turns.Failed, subprocess.SubprocessError):
        return None


def write(folder, about, rows):
    document = about | {"rows": [row.fields() for row in rows]}
    (folder / "peers.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "peers.txt").write_text(heading(about) + table(rows))
