"""The experiment: python -m tests.experiment. Trains, merges, scores; writes the tables of merger/methods/README.md.

What is there already is kept: adapters, measurements. `--tables` writes the tables from the committed results alone.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Final

from tests.experiment.tables import RESULTS, Results, read_results, with_tables, write_results

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "merger" / "methods" / "README.md"


def measure(out: Path, processes: int) -> None:
    """Train and measure what the folder lacks, and write the results."""
    from jobs.demo.base import prepare_base
    from tests.experiment.adapters import folder_of, train_all
    from tests.experiment.measure import Places, all_jobs, digest, read_lines, run
    from tests.experiment.scoring import prepare_tail
    from tests.experiment.tasks import SEEDS, TRAININGS

    started = time.monotonic()
    base = prepare_base(out / "base", print)
    places = Places(base, prepare_tail(base, out / "tail"), out / "adapters")
    train_all(base, places.adapters, processes=processes)
    print(f"adapters: {time.monotonic() - started:.0f} s", flush=True)
    log, jobs = out / "run.jsonl", all_jobs()
    for job in run(places, log, jobs, processes=processes):
        print(f"{time.monotonic() - started:.0f} s: {job.arm}, seed {job.seed}: {job.row}", flush=True)
    found = {(entry["arm"], entry["seed"], entry["row"]): entry["lines"] for entry in read_lines(log)}
    adapters = [
        {"what": "adapter", "seed": seed, "name": name, "sha256": digest(folder_of(places.adapters, name, seed))}
        for seed in SEEDS
        for name in TRAININGS
    ]
    write_results([*adapters, *(line for job in jobs for line in found.get(job.key, ()))])


def main() -> None:
    """Run the experiment, or write its tables again."""
    parser = argparse.ArgumentParser(prog="python -m tests.experiment", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "experiment", help="adapters and measurements")
    parser.add_argument("--processes", type=int, default=2, help="one thread each (default: %(default)s)")
    parser.add_argument("--tables", action="store_true", help="write the tables from the committed results, and stop")
    options = parser.parse_args()
    if not options.tables:
        measure(options.out, options.processes)
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), Results(read_results())), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: tables from {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
