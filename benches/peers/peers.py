"""The peers: the rows of each, its requirements, and its turn."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import turns
from turns import WARM_UPS, Failed, Sample

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


class Torch:
    """A method of rank_torch.py."""

    def __init__(self, key, method, title):
        self.key, self.method, self.rows = key, method, {key: title}

    def prepare(self, setup):
        self.python = setup.venv()

    def turn(self, ranks, folder):
        (folder / "layout.json").write_text(json.dumps(turns.gpt2()))
        common = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(turns.free_port()),
            "GLOO_SOCKET_IFNAME": "lo",
            "CUDA_VISIBLE_DEVICES": "",
            # More threads than cores are slower for every method: 2 threads per rank on 2 cores
            # took 1.2 to 1.9 times as long.
            "OMP_NUM_THREADS": str(max(1, turns.cores() // ranks)),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        argv = [
            self.python,
            HERE / "rank_torch.py",
            self.method,
            folder / "layout.json",
            str(WARM_UPS),
            "1",
            folder,
        ]
        turns.run(
            [
                (argv, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                for rank in range(ranks)
            ],
            folder,
        )
        return {self.key: turns.ranks_sample(folder, ranks)}


class Mpi:
    """A method of rank_mpi.c."""

    # Binding to cores makes no difference. With more ranks than cores Open MPI yields by
    # default; without yielding it takes 5 times as long.
    OPTIONS = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]

    def __init__(self, key, method, title):
        self.key, self.method, self.rows = key, method, {key: title}

    def prepare(self, setup):
        self.program = setup.rank_mpi()

    def turn(self, ranks, folder):
        (folder / "sizes").write_text("".join(f"{size}\n" for size in turns.sizes()))
        argv = [
            "mpirun",
            "-np",
            str(ranks),
            *self.OPTIONS,
            self.program,
            self.method,
            folder / "sizes",
            str(WARM_UPS),
            "1",
            str(ranks),
            folder,
        ]
        turns.run([(argv, {})], folder)
        return {self.key: turns.ranks_sample(folder, ranks)}


class Ours:
    """allreduce-bench with flags. Each row is the record of a (method, algorithm); None is any."""

    def __init__(self, key, flags, rows, ranks_are=None):
        self.key, self.flags, self.ranks_are = key, flags, ranks_are
        self.rows = {row: title for row, (title, _) in rows.items()}
        self.records = {row: record for row, (_, record) in rows.items()}

    def prepare(self, setup):
        self.bench = setup.bench
        if not self.bench.is_file():
            raise Failed(
                f"not available: no {self.bench}: cargo build --release --bin allreduce-bench"
            )
        known = subprocess.run([self.bench, "--help"], text=True, capture_output=True).stdout
        for flag in self.flags:
            if flag.split("=")[0] not in known:
                raise Failed(f"not available: this allreduce-bench has no {flag}")

    def turn(self, ranks, folder):
        argv = [
            self.bench,
            "--layout",
            "gpt2",
            *self.flags,
            "-g",
            str(ranks),
            "-w",
            str(WARM_UPS),
            "-n",
            "1",
            "--json",
            folder / "rows.json",
        ]
        turns.run([(argv, {})], folder)
        found = json.loads((folder / "rows.json").read_text())
        samples = {}
        for row, (method, algorithm) in self.records.items():
            mine = [
                one
                for one in found
                if one["method"] == method
                and algorithm in (None, one["algorithm"])
                and one.get("ranks_are") == self.ranks_are
            ]
            if len(mine) != 1:
                raise Failed(f"allreduce-bench wrote {len(mine)} records of {method}")
            asked = {
                "ranks": ranks,
                "tensors": len(turns.sizes()),
                "bytes": 4 * sum(turns.sizes()),
                "dtype": "f32",
            }
            if got := {
                name: mine[0][name] for name, value in asked.items() if mine[0][name] != value
            }:
                raise Failed(f"allreduce-bench measured {got} instead of {asked}")
            extra = mine[0].get("extra_rss_bytes")  # maximum over ranks; none for threads
            samples[row] = Sample(
                mine[0]["time_us"] / 1e3,
                None if extra is None else extra / 2**20,
                mine[0]["wrong"],
                None,
            )
        return samples


PEERS = [
    Ours(
        "ours",
        ["--processes"],
        {"ours": ("param-averager, processes", ("average", None))},
        "processes",
    ),
    Torch("gloo", "per_tensor", "torch + gloo, all_reduce per tensor"),
    Torch("gloo-async", "overlapped", "torch + gloo, all tensors at once"),
    Torch("gloo-flat", "flattened", "torch + gloo, flattened"),
    Torch("periodic", "periodic", "torch PeriodicModelAverager"),
    Torch("localsgd", "local_sgd", "Accelerate LocalSGD"),
    Mpi("mpi", "per_tensor", "Open MPI, MPI_Allreduce per tensor"),
    Mpi("mpi-flat", "flattened", "Open MPI, flattened"),
    Ours(
        "threads",
        ["--algorithm=ring,direct", "--baseline=limit"],
        {
            "threads-ring": ("for reference: ours, ring, threads", ("average", "ring")),
            "threads-direct": ("for reference: ours, direct, threads", ("average", "direct")),
            "limit": ("for reference: one-pass limit, threads", ("one_pass_limit", None)),
        },
    ),
]


class Setup:
    """Installs and builds the requirements of peers, each once."""

    def __init__(self, venv, bench, work):
        self.folder, self.bench, self.work = venv, bench, work
        self.answers = {}

    def once(self, name, make):
        if name not in self.answers:
            try:
                self.answers[name] = make()
            except Failed as failed:
                self.answers[name] = failed
        if isinstance(self.answers[name], Failed):
            raise self.answers[name]
        return self.answers[name]

    def venv(self):
        return self.once("venv", self.make_venv)

    def make_venv(self):
        wanted, have = HERE / "requirements.txt", self.folder / "requirements.txt"
        python = self.folder / "bin" / "python"
        if not (have.is_file() and have.read_text() == wanted.read_text()):
            if (
                self.folder.is_dir()
                and any(self.folder.iterdir())
                and not (self.folder / "pyvenv.cfg").is_file()
            ):
                raise Failed(f"{self.folder} exists and is not a virtual environment")
            if shutil.disk_usage(existing(self.folder)).free < 8 << 30:
                raise Failed(
                    f"torch and its installation need 8 GiB, and {self.folder} has less free"
                )
            print(
                f"# installing torch and accelerate into {self.folder}, 2 GiB to fetch",
                file=sys.stderr,
            )
            output([sys.executable, "-m", "venv", self.folder])
            output([python, "-m", "pip", "install", "--quiet", "--no-deps", "-r", wanted])
        output(
            [
                python,
                "-c",
                "import accelerate.local_sgd, torch.distributed as d; "
                "assert d.is_gloo_available(), 'no gloo'",
            ]
        )
        have.write_text(wanted.read_text())  # last, when the environment is complete
        return python

    def rank_mpi(self):
        return self.once("mpi", self.make_rank_mpi)

    def make_rank_mpi(self):
        missing = [tool for tool in ["mpicc", "mpirun"] if not shutil.which(tool)]
        if missing:
            raise Failed(
                f"missing: {' and '.join(missing)} "
                "(Debian: apt-get install openmpi-bin libopenmpi-dev)"
            )
        output(["mpicc", "-O3", "-march=native", "-o", self.work / "rank_mpi", HERE / "rank_mpi.c"])
        return self.work / "rank_mpi"


def existing(folder):
    return folder if folder.exists() else existing(folder.parent)


def output(argv):
    """Output of a command. A failure carries its last line."""
    try:
        return subprocess.run(argv, check=True, text=True, capture_output=True).stdout.strip()
    except OSError as error:
        raise Failed(f"{argv[0]}: {error.strerror}") from None
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout).strip().splitlines()
        raise Failed(
            f"{Path(argv[0]).name} failed: {lines[-1] if lines else error.returncode}"
        ) from None


def default_bench():
    return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "allreduce-bench"
