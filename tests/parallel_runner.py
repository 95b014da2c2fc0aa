"""One of several processes that test_parallel.py starts: runs train.py for each command line of a JSON file, one after
another, and writes what it has counted: python -m tests.parallel_runner COMMANDS.json PORT…, with torchrun's
variables and a store on each command's port.

One start serves many runs, since the imports take longer than a tiny run.
"""

import json
import os
import sys
from pathlib import Path

import train
from parallel import sharding

COUNTED = {"reductions": 0}  # buckets of gradients that DDP has added up


def count_reductions() -> None:
    add_up = sharding._add_up

    def counted(bucket):
        COUNTED["reductions"] += 1
        return add_up(bucket)

    sharding._add_up = counted


def main() -> None:
    commands, ports = json.loads(Path(sys.argv[1]).read_text("utf-8")), sys.argv[2:]
    count_reductions()
    local_world_size, results = os.environ["LOCAL_WORLD_SIZE"], []
    for argv, port in zip(commands, ports, strict=True):
        machines = 2 if "--parallel=hsdp" in argv else 1  # as if half of the processes were on another one
        size = int(local_world_size) // machines
        os.environ |= {"LOCAL_WORLD_SIZE": str(size), "LOCAL_RANK": str(int(os.environ["RANK"]) % size)}
        os.environ["MASTER_PORT"] = port
        COUNTED["reductions"] = 0
        results.append({"code": train.main(argv), **COUNTED})
    Path(f"{sys.argv[1]}.{os.environ['RANK']}").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
