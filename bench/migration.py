"""How much longer than its guest a client is without an answer: `python -m bench.migration [--runs N] [--out DIR]`.

Real migrations in the lab, the cases in turn: a bridged guest with phases, a routed one with the agent, and a routed
one whose manager calls post one second after the guest has arrived.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import picture, results
from lab import cases, guest, hooks
from lab.cases import Case
from lab.style import EMULATED

REPOSITORY = Path(__file__).resolve().parents[1]
BRIDGED, AGENT = (next(case for case in cases.CASES if case.key == key) for key in ("bridged", "routed-agent"))
LATE = Case("routed-late", "routed, post one second late", "routed", "kvm-ifup-pre", True, 1.0)


def main(argv: Sequence[str]) -> int:
    """Measures, prints and draws."""
    options = results.parser("migration", __doc__, runs=3).parse_args(argv)
    image = guest.build(print)
    rows: dict[str, list[float]] = {case.title: [] for case in (BRIDGED, AGENT, LATE)}
    garps: list[float] = []
    contested = 0
    with tempfile.TemporaryDirectory(prefix="kvm-ifup-hooks-") as scratch:
        scripts = hooks.hooks(REPOSITORY / "scripts", None, Path(scratch))
        for run in range(options.runs):
            for case in (BRIDGED, AGENT, LATE):
                result = cases.run(case, scripts, image, lambda _line: None)
                rows[case.title].append(max(result.difference_ms, 0.1))
                print(
                    f"{run + 1}: {case.title}: guest down {result.downtime_ms:.0f} ms, "
                    f"client's silence {result.silence_ms:.0f} ms (IPv6: {result.silence6_ms:.0f} ms)",
                    flush=True,
                )
                if case is AGENT:
                    contested += len(result.contested)
                    first = min(f.at for f in result.announcements if f.seen.kind == "garp")
                    garps.append((first - result.resumed) * 1000)
    print("\nclient's silence minus the guest's own downtime:")
    print(picture.table("ms", rows, BRIDGED.title))
    print(f"\nfrom the guest's arrival to the gratuitous ARP at the client, median: {statistics.median(garps):.1f} ms")
    print(
        f"ARP probes answered by two nodes, the first {1000 * cases.HANDOVER:.0f} ms of the arrival aside: {contested}"
    )
    results.write(options.json, rows)
    title = "Client's silence minus the guest's own downtime, in live migrations"
    for path in picture.save("bench-migration", title, "ms", rows, options.out, EMULATED):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
