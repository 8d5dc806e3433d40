"""The process that `benchmarks.compare` starts for the old code and for the new: it prepares and times on request.

Requests come as lines of JSON on standard input, {"prepare": NAME} or {"time": CALLS}; each is answered by one line on
standard output. Between requests the process sleeps, so that the other one has the machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from typing import Any

import torch


def main() -> None:
    """Answers until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    # What the code prints must not be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    from benchmarks.measure import Entry, Timer
    from benchmarks.tracked import TRACKED

    timer = Timer(device)
    entry: Entry | None = None
    gc.disable()
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if "prepare" in request:
                # The case before goes first: two at once would share the cache.
                entry = None
                gc.collect()
                torch.manual_seed(0)
                entry = Entry(request["prepare"], TRACKED[request["prepare"]].prepare(device), timer.finish)
                timer.batch(entry, 2)
                answer = {"once": min(timer.batch(entry, 3) for _ in range(2))}
            else:
                assert entry is not None
                answer = {"seconds": timer.batch(entry, request["time"])}
        except Exception as error:
            entry, answer = None, {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
