"""Run the benchmarks: `python -m bench.run [ONLY=name] [QUICK=1]`; both are read from the environment, too.

Writes the results file, keeping the lines of benchmarks that did not run, and the table in the documents.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from bench.cases import CASES
from bench.harness import merge_results
from bench.report import format_result, write_report

NUM_PAIRS = 30
NUM_QUICK_PAIRS = 3


def settings(arguments: Sequence[str]) -> dict[str, str]:
    """KEY=value arguments over the environment."""
    values = {key: os.environ[key] for key in ("ONLY", "QUICK", "PAIRS") if os.environ.get(key)}
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if not separator or key not in ("ONLY", "QUICK", "PAIRS"):
            raise SystemExit(f"unknown argument {argument!r}: use ONLY=name, QUICK=1 or PAIRS=number")
        values[key] = value
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when all ran, whatever the figures."""
    chosen = settings(sys.argv[1:] if arguments is None else arguments)
    only = chosen.get("ONLY")
    if only is not None and only not in CASES:
        raise SystemExit(f"no benchmark is called {only!r}; there are: {', '.join(CASES)}")
    is_quick = chosen.get("QUICK", "0") not in ("", "0")
    os.environ["QUICK"] = "1" if is_quick else ""  # some cases take smaller models
    num_pairs = int(chosen.get("PAIRS", NUM_QUICK_PAIRS if is_quick else NUM_PAIRS))
    failed = []
    for case in CASES.values():
        if only is not None and case.name != only:
            continue
        start = time.monotonic()
        print(f"{case.name}: {case.description}", flush=True)
        try:
            results = case.measure(num_pairs)
        except RuntimeError as error:
            failed.append(case.name)
            print(f"  FAILED: {error}", flush=True)
            continue
        merge_results(results)
        write_report()
        for result in results:
            print(f"  {format_result(result)}", flush=True)
        print(f"  ({time.monotonic() - start:.0f} s)", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
