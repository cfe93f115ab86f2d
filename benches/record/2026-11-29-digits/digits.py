"""Runs the trainers of the digits with 5 seeds and all settings, or makes tables of what they printed.

    python3 digits.py run target/release/examples/digits > plain.txt
    python3 digits.py table plain.txt burn.txt
"""
import re
import subprocess
import sys

SEEDS = range(1, 6)
SETTINGS = ["--ranks 1", "--ranks 1 --batch 32", "--ranks 1 --batch 64"]
for how in ["", " --processes", " --sorted"]:
    SETTINGS += [f"--ranks {n} --every {h}{how}" for n in (2, 4) for h in (1, 8, 64)]


def run(program):
    for setting in SETTINGS:
        for seed in SEEDS:
            arguments = f"{setting} --seed {seed}"
            said = subprocess.check_output([program, *arguments.split()], text=True)
            print(f"{arguments} | {said.strip()}", flush=True)


def cell(found):
    accuracies, losses = zip(*found)
    mean = sum(accuracies) / len(accuracies)
    loss = sum(losses) / len(losses)
    return f"{mean:.1f} ({min(accuracies):.1f}..{max(accuracies):.1f}) {loss:.3f}"


def table(path):
    found = {}
    for line in open(path, encoding="utf-8"):
        setting = line.split(" --seed")[0]
        numbers = re.search(r"accuracy ([\d.]+) %, train loss ([\d.]+)", line).groups()
        found.setdefault(setting, []).append(tuple(map(float, numbers)))
    print(f"| {path} | H = 1 | H = 8 | H = 64 |\n|---|---|---|---|")
    for batch in ("", " --batch 32", " --batch 64"):
        print(f"| 1 rank{batch.replace(' --', ', ')} | {cell(found['--ranks 1' + batch])} | | |")
    for how in ("", " --processes", " --sorted"):
        for n in (2, 4):
            row = [cell(found[f"--ranks {n} --every {h}{how}"]) for h in (1, 8, 64)]
            print(f"| {n} ranks{how.replace(' --', ', ')} | {' | '.join(row)} |")
    print()


if sys.argv[1] == "run":
    run(sys.argv[2])
else:
    for each in sys.argv[2:]:
        table(each)
