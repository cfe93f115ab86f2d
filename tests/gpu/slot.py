"""Parts of a slot of fifteen minutes on one GPU, most telling first, each with a limit of its own,
and the page that compares what was measured with the model of ../shared/GPU.md (b).

A part that hangs is killed at its limit. A finding ends in one way or another and fails nothing:
whether the former way of averages hangs on real hardware is a question, not a promise.
"""

import json
import time

SECONDS = 840  # of the slot's 900: the rest is for copying results
WORLD_TIMEOUT = 5  # seconds, in all parts: no hang eats the slot
SMALL = ["-n", "1", "-w", "0"]  # on a simulated device, which is not timed


class Part:
    def __init__(self, name, limit, program, arguments=(), environment=None, **options):
        self.name, self.limit, self.program = name, limit, program
        self.arguments, self.environment = list(arguments), dict(environment or {})
        # scenarios: it says RAN for each one. finding: it may end in any way. bench: it has rows.
        self.scenarios = options.get("scenarios", False)
        self.finding = options.get("finding", False)
        self.bench = options.get("bench", False)


def test(name, limit):
    return Part(f"device {name}", limit, "device", [name, "--exact"], scenarios=True)


def scenario(words, limit=20, former=False):
    """One scenario of tests/device/unkind, by today's way of averages or by the former one."""
    environment = {"PA_PTX_SCENARIO": words, **({"PA_FORMER_WAY": "1"} if former else {})}
    way = "former way, " if former else ""
    return Part(f"{way}{words}", limit, "device", (), environment, finding=former)


def bench(name, limit, ranks, arguments):
    common = ["--backend", "cuda", "-g", str(ranks), "--timeout", str(WORLD_TIMEOUT)]
    return Part(f"bench {name}", limit, "allreduce-bench", common + arguments, bench=True)


def parts():
    ranks = {count: ",".join(["0"] * count) for count in (2, 4, 8)}
    gpt2 = ["--layout", "gpt2", "--baseline=limit"]
    every = [Part("devices", 30, "allreduce-bench", ["--devices"])]
    # 1. Which grids run side by side, and what a late rank's trainer may do.
    for count in (2, 4, 8):
        for algorithm in ("direct", "ring"):
            every.append(scenario(f"threads averages {algorithm} {ranks[count]}"))
    every += [scenario(f"threads resident {algorithm} 0,0") for algorithm in ("direct", "ring")]
    for act in ("alloc", "pinned", "launch", "ahead", "trainers", "late"):
        every.append(scenario(f"threads {act} ring 0,0"))
    # 2. The questions of the model, first those whose answer decides most.
    every += [
        bench("direct-2", 60, 2, [*gpt2, "-d", "f32,bf16", "--algorithm", "direct"]),
        bench("ring-2", 60, 2, [*gpt2, "-d", "f32,bf16", "--algorithm", "ring"]),
        bench("direct-8", 60, 8, [*gpt2, "-d", "bf16", "--algorithm", "direct"]),
        bench("small", 30, 2, ["-b", "4K", "-e", "1M", "-f", "16", "--algorithm", "direct,ring"]),
        bench("host", 60, 2, [*gpt2, "-d", "f32", "--algorithm", "ring", "--link", "host"]),
    ]
    sweep = ["-b", "256M", "-e", "256M", "-n", "5", "-w", "2", "-c", "0", "--algorithm", "ring"]
    for channels, chunk in [(16, "32K"), (33, "32K"), (33, "64K"), (33, "128K"), (66, "32K")]:
        cut = ["--channels", str(channels), "--chunk", chunk]
        every.append(bench(f"sweep-{channels}-{chunk}", 20, 2, [*sweep, *cut]))
    # 3. Processes on one device, graphs, and every scenario of the findings.
    every += [
        test("cuda_processes::processes_share_a_device", 60),
        test("cuda::averages_in_graphs_are_replayed", 60),
        test("cuda::averages_have_the_bits_of_the_cpu", 60),
        test("unkind::launches_that_block", 60),
        test("unkind::streams_that_share_queues", 60),
    ]
    # 4. The former way: where it hangs, and where it does not.
    for count in (2, 4, 8):
        every.append(scenario(f"threads averages direct {ranks[count]}", former=True))
    every += [scenario(f"threads {act} ring 0,0", former=True) for act in ("alloc", "launch")]
    return every


# Bench, dtype, algorithm: milliseconds today by the model, and after its changes.
MODEL = [
    ("direct-2", "f32", "direct", "0.52", "0.49"),
    ("direct-2", "bf16", "direct", "0.30 to 0.36", "0.25"),
    ("ring-2", "f32", "ring", "2.0", "0.9 to 1.2"),
    ("direct-8", "bf16", "direct", "1.4 to 1.6", "1.0"),
]


def run(suite, here, seconds, hangs):
    """Runs the parts in order. `hangs`: the rehearsal of a part that does not end."""
    start = time.monotonic()
    every = parts()
    if hangs:
        every.insert(2, Part("a part that hangs", 2, "/bin/sleep", ["600"], finding=True))
    suite.environment["PA_UNKIND_TIMEOUT_S"] = str(WORLD_TIMEOUT)
    tables = {}
    for part in every:
        left = seconds - (time.monotonic() - start)
        if left < 5:
            suite.skip(part.name, "the time of the slot is over")
            continue
        arguments = list(part.arguments)
        if part.bench:
            tables[part.name] = suite.out / f"{part.name.replace(' ', '-')}.json"
            arguments += ["--json", tables[part.name]]
            if suite.simulated:
                arguments = small(arguments)
        program = part.program if part.program.startswith("/") else here / part.program
        suite.entry(
            part.name,
            [program, *arguments],
            part.environment,
            scenarios=part.scenarios,
            limit=min(part.limit, left),
            finding=part.finding,
        )
    page = suite.out / "page.md"
    page.write_text(text(suite.results, {name: rows(file) for name, file in tables.items()}))
    print(f"{page}")


def small(arguments):
    """The same bench on a simulated device: less data, once, and blocks that fit."""
    changed, before = [], ""
    for argument in map(str, arguments):
        changed.append({"-b": "64K", "-e": "64K", "--channels": "2"}.get(before, argument))
        before = argument
    scale = ["--scale", "0.001"] if "--layout" in changed else []
    counts = [] if "-n" in changed else SMALL
    return changed + scale + counts


def rows(file):
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return []


def text(results, tables):
    devices = ", ".join(device["name"] for device in results["driver"]["devices"])
    lines = [f"# {devices}", ""]
    if results["simulated"]:
        lines += ["**Simulated: nothing here says anything about a GPU.**", ""]
    lines += [f"Commit {results['bundle']['commit']}, CUDA {results['driver']['cuda']}.", ""]
    lines += ["| part | ended | seconds | |", "|---|---|---|---|"]
    for entry in results["entries"]:
        reason = entry["reason"].replace("|", "/")
        lines.append(f"| {entry['name']} | {entry['status']} | {entry['seconds']} | {reason} |")
    lines += ["", "Milliseconds for GPT-2, beside the model (GPU.md (b)):", ""]
    lines.append("| ranks on one device | measured | model, before | model, after |")
    lines.append("|---|---|---|---|")
    for name, dtype, algorithm, before, after in MODEL:
        found = [
            row
            for row in tables.get(f"bench {name}", [])
            if row["dtype"] == dtype and row["algorithm"] == algorithm and row["time_us"]
        ]
        measured = f"{found[0]['time_us'] / 1e3:.2f}" if found else "none"
        label = f"{name.split('-')[1]}, {algorithm}, {dtype}"
        lines.append(f"| {label} | {measured} | {before} | {after} |")
    return "\n".join(lines) + "\n"
