"""Mutation testing: finds small mistakes in the library that the tests would not notice.

Each mutant is written into a copy of the tree. The tests that judge its module run there until one
fails. `survivors.toml` has the reason why a mutant may live if no test kills it.

    python tests/mutation/run.py --modules norms scaling --workers 2
    python tests/mutation/run.py --resume           # without those that the last run has killed

A worker is forked for each mutant from a process that has imported JAX, but neither compiled
anything nor imported the library. Programs that a mistake does not change are read from disk. The
others are compiled again.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import queue
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mutants import Mutant, find_mutants

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGE = "optax_smartclip"
TARGET = 0.9

FOLDERS = ("histories", "clippers", "engine", "checkpoints")
PATHS = {
    path.stem: f"{folder}/{path.name}"
    for folder in FOLDERS
    for path in sorted((ROOT / PACKAGE / folder).glob("*.py"))
}
# The test file of its name judges a module, except for these.
OTHER_TESTS = {
    "adagc": ["clippers/test_adagc.py", "test_filled_states.py"],
    "autoclip": ["clippers/test_autoclip.py", "test_filled_states.py"],
    "checks": ["engine/test_checks.py", "test_masks.py", "clippers/test_skip_spikes.py"],
    "clip_micro_batches": [
        "clippers/test_clip_micro_batches.py",
        "integration/test_micro_batches.py",
    ],
    "dtypes": ["engine/test_norms.py", "engine/test_scaling.py"],
    "flax_states": [
        "engine/test_states.py",
        "test_stored_states.py",
        "integration/test_checkpoints.py",
    ],
    "groups": ["engine/test_groups.py", "engine/test_rule.py", "test_stacked.py"],
    "history": ["histories/test_ring_buffer.py"],
    "known_norms": [
        "clippers/test_skip_spikes.py",
        "integration/test_skip_spikes_wrappers.py",
        "test_cost.py",
    ],
    "learning": ["engine/test_rule.py", "clippers/test_skip_spikes.py"],
    "matrices": ["clippers/test_spectral_clip.py"],
    "meshes": [
        "integration/test_shard_map.py",
        "integration/test_meshes.py",
        "clippers/test_spectral_clip.py",
    ],
    "metrics": [
        "engine/test_metrics.py",
        "clippers/test_agc.py",
        "clippers/test_where_skipped.py",
    ],
    "moments": ["histories/test_moments.py", "clippers/test_zclip.py", "test_filled_states.py"],
    "norms": [
        "engine/test_norms.py",
        "clippers/test_observe_norms.py",
        "engine/test_culprits.py",
    ],
    "partitions": [
        "engine/test_partitions.py",
        "engine/test_norms.py",
        "clippers/test_skip_spikes.py",
        "clippers/test_clip_micro_batches.py",
        "clippers/test_agc.py",
        "test_stacked.py",
    ],
    "regroup": [
        "checkpoints/test_graft.py",
        "clippers/test_observe_norms.py",
        "clippers/test_keep_last_good.py",
    ],
    "rule": [
        "engine/test_rule.py",
        "clippers/test_clip_micro_batches.py",
        "integration/test_micro_batches.py",
    ],
    "scaling": ["engine/test_scaling.py", "test_min_scale.py", "clippers/test_agc.py"],
    "skip_spikes": ["clippers/test_skip_spikes.py", "test_filled_states.py"],
    "singular_values": ["clippers/test_spectral_clip.py"],
    "stacks": ["test_stacked.py"],
    "trees": ["engine/test_groups.py", "engine/test_rule.py"],
    "units": ["engine/test_units.py", "clippers/test_agc.py"],
    "zscore_clip": ["clippers/test_zscore_clip.py", "test_filled_states.py"],
}


def tests_of(path: str) -> list[str]:
    """The test files that judge a module; the one of the same name comes first."""
    folder, name = path.removesuffix(".py").split("/")
    own = OTHER_TESTS.get(name, [f"{folder}/test_{name}.py"])
    # One file checks the defaults and the ranges of arguments of all factories.
    has_arguments = folder in ("clippers", "histories") or name == "rule"
    shared = ["engine/test_checks.py"] if has_arguments else []
    return [f"tests/{file}" for file in [*own, *shared]]


# Set before JAX is imported, as tests/conftest.py does.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
}
PRELOADED = [
    "beartype",
    "hypothesis",
    "jax",
    "jax.export",
    "jaxtyping",
    "optax",
    "pytest",
]
MAX_MEMORY = 12 * 2**30
MAX_WAIT = 3600.0


class Judge:
    """A pytest plugin that uses few examples and compiled programs from disk.

    With a mutant, it stops at the first failure. Without one, it runs every test and stores the
    compiled programs.
    """

    def __init__(self, root: str, compiled: str, is_mutant: bool, verdict: Any) -> None:
        self.root, self.compiled, self.is_mutant = root, compiled, is_mutant
        self.verdict = verdict

    def pytest_sessionstart(self) -> None:
        import hypothesis
        import jax

        hypothesis.settings.register_profile(
            "mutation", hypothesis.settings.default, max_examples=10, database=None
        )
        hypothesis.settings.load_profile("mutation")
        jax.config.update("jax_compilation_cache_dir", self.compiled)
        least = 1e9 if self.is_mutant else 0.0  # No other mutant needs the programs of this one.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.is_mutant:
            self.verdict.send((False, report.nodeid.removeprefix("tests/"), time.process_time()))
            os._exit(0)

    pytest_collectreport = pytest_runtest_logreport

    def pytest_sessionfinish(self) -> None:
        loaded = sys.modules[PACKAGE].__file__ or ""
        if not loaded.startswith(self.root):
            raise RuntimeError(f"The tests ran with {loaded}.")


def judge(
    root: str, files: list[str], compiled: str, max_seconds: int | None, verdict: Any
) -> None:
    """Runs tests in a copy of the tree.

    Sends whether they pass, which one failed if not, and the CPU seconds.
    """
    import pytest

    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY, MAX_MEMORY))
    if max_seconds is not None:
        # Processor time, so that no mutant looks dead because the machine is busy.
        resource.setrlimit(resource.RLIMIT_CPU, (max_seconds, max_seconds))
    with open(Path(root, "output.txt"), "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(root)
    sys.path.insert(0, root)
    sys.dont_write_bytecode = False  # The copy is ours.
    plugin = Judge(root, compiled, max_seconds is not None, verdict)
    options = [
        "-x",
        "-q",
        "--tb=native",
        "--assert=plain",
        *(f"-pno:{name}" for name in ("cacheprovider", "cov", "xdist")),
    ]
    status = pytest.main([*options, *files], plugins=[plugin])
    verdict.send((status == 0, f"exit status {int(status)}", time.process_time()))
    sys.stdout.flush()
    os._exit(0)


def run_tests(context: Any, *args: Any) -> tuple[bool, str, float]:
    """The result that `judge` sends. If it dies or hangs, the tests have failed."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=judge, args=(*args, sender))
    process.start()
    sender.close()
    process.join(MAX_WAIT)
    if process.is_alive():
        process.kill()
        return False, "hangs", MAX_WAIT
    try:
        return receiver.recv()
    except EOFError:
        return False, f"dies of signal {-process.exitcode}", 0.0


def copy_tree(target: Path) -> None:
    """Copies the working tree without ignored files."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def run_mutants(mutants: Sequence[Mutant], workers: int, compiled: str, done: Any) -> None:
    """Runs the mutants, and calls `done(mutant, passed, killer, seconds)` for each."""
    os.environ.update(ENVIRONMENT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    copies: queue.Queue[Path] = queue.Queue()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        # Also for what a worker leaves that ends at the first failure.
        os.environ["TMPDIR"] = folder
        for worker in range(workers):
            copies.put(Path(folder, f"copy{worker}"))
            copy_tree(copies.queue[-1])

        duration = {}
        ages = itertools.count(10**9)

        def run_original(file: str) -> None:
            copy = copies.get()
            passed, what, duration[file] = run_tests(context, str(copy), [file], compiled, None)
            print(f"{duration[file]:6.1f} s  {file}", flush=True)
            if not passed:
                raise SystemExit(f"{what} of {file}:\n{(copy / 'output.txt').read_text()}")
            copies.put(copy)

        def run(mutant: Mutant) -> None:
            files = tests_of(mutant.path)
            max_seconds = 30 + 5 * round(sum(duration[file] for file in files))
            copy = copies.get()
            target = copy / PACKAGE / mutant.path
            source = target.read_text()
            target.write_text(mutant.mutate(source))
            # Otherwise Python might reuse the bytecode of the last mutant, if it is as long.
            os.utime(target, (next(ages), next(ages)))
            done(mutant, *run_tests(context, str(copy), files, compiled, max_seconds))
            target.write_text(source)
            copies.put(copy)

        with ThreadPoolExecutor(workers) as pool:
            files = {file: None for mutant in mutants for file in tests_of(mutant.path)}
            list(pool.map(run_original, files))
            list(pool.map(run, mutants))


def report(results: Iterable[dict[str, Any]]) -> bool:
    """Prints the table and the survivors; returns whether they are few and all have a reason."""
    total, killed = Counter[str](), Counter[str]()
    known = tomllib.loads((HERE / "survivors.toml").read_text()).get("survivors", [])
    reasons = {tuple(key): group["reason"] for group in known for key in group["mutants"]}
    survivors = []
    for result in results:
        total[result["path"]] += 1
        killed[result["path"]] += result["killed"]
        if not result["killed"]:
            survivors.append(result)

    unexplained, alive = 0, set()
    for result in survivors:
        key = (result["path"], result["before"], result["after"])
        alive.add(key)
        reason = reasons.get(key)
        unexplained += reason is None
        print(f"\n{PACKAGE}/{result['path']}:{result['line']} {result['operator']}")
        print(f"  - {result['before']}\n  + {result['after']}\n  {reason or 'NO REASON GIVEN'}")

    print("\n| module | mutants | killed | % |\n| --- | ---: | ---: | ---: |")
    rows = [(path, total[path], killed[path]) for path in sorted(total)]
    for name, num, dead in [*rows, ("all", total.total(), killed.total())]:
        print(f"| {name} | {num} | {dead} | {100 * dead / num:.1f} |")
    print(f"\n{len(survivors)} survive, {unexplained} of them without a reason.")
    for path, before, after in reasons.keys() - alive:
        if path in total:
            print(f"\nNo survivor, but in survivors.toml: {path}\n  - {before}\n  + {after}")
    return killed.total() >= TARGET * total.total() and not unexplained


def main() -> None:
    """Runs the chosen mutants. The exit status is 1 if too many survive, or one has no reason."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sample", type=float, default=1.0, help="share of each module's mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="keep what was killed last time")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "mutation.json")
    args = parser.parse_args()

    chooser = random.Random(args.seed)
    mutants: list[Mutant] = []
    for name in args.modules:
        source = (ROOT / PACKAGE / PATHS[name]).read_text()
        found = list(find_mutants(PATHS[name], source))
        chosen = chooser.sample(range(len(found)), round(args.sample * len(found)))
        mutants += [found[index] for index in sorted(chosen)]

    crc = {path: zlib.crc32((ROOT / PACKAGE / path).read_bytes()) for path in PATHS.values()}

    def identity(mutant: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(mutant[name] for name in Mutant._fields)

    saved = json.loads(args.output.read_text()) if args.resume and args.output.exists() else []
    results = {identity(item): item for item in saved if item["crc"] == crc[item["path"]]}
    args.output.parent.mkdir(exist_ok=True)

    def done(mutant: Mutant, passed: bool, what: str, seconds: float) -> None:
        outcome = {
            "killed": not passed,
            "by": what,
            "seconds": seconds,
            "crc": crc[mutant.path],
        }
        results[mutant] = mutant._asdict() | outcome
        args.output.write_text(json.dumps(list(results.values()), indent=1))
        print(
            f"{seconds:6.1f} s  {mutant.path}:{mutant.line} {'SURVIVES' if passed else what}",
            flush=True,
        )

    wanted = [mutant for mutant in mutants if not results.get(mutant, {}).get("killed")]
    run_mutants(wanted, args.workers, str(args.output.parent / "compiled"), done)
    sys.exit(not report(results[mutant] for mutant in mutants))


if __name__ == "__main__":
    main()
