"""Execute chapters side by side, one per core, into the cache that the build of the book then reads.

    python -m tools.execute_chapters _build/.jupyter_cache book/forward.ipynb ...

A chapter that is in the cache already, with the same code, is not executed again.
"""

import sys

from jupyter_cache import get_cache
from jupyter_cache.cache.db import NbProjectRecord
from jupyter_cache.executors import load_executor

CELL_TIMEOUT = 600


def main(folder: str, *paths: str) -> int:
    cache = get_cache(folder)
    for path in paths:
        cache.add_nb_to_project(path)
    result = load_executor("local-parallel", cache).run_and_cache(timeout=CELL_TIMEOUT)
    for uri in result.excepted:
        print(f"{uri}\n{NbProjectRecord.record_from_uri(uri, cache.db).traceback}", file=sys.stderr)
    for uri in result.errored:
        print(f"{uri} could not be executed", file=sys.stderr)
    return len(result.excepted) + len(result.errored)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
