"""Compare two runs' `metrics.jsonl` by exact value: see `eagle3fn.specforge.compare_runs`.

python scripts/compare_runs.py LEFT RIGHT
"""

import sys

from eagle3fn.specforge.compare_runs import main

if __name__ == "__main__":
    sys.exit(main())
