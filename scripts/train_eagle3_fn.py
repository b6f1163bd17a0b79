"""Train with the arguments of SpecForge's `train_eagle3.py`: see `eagle3fn.specforge.script`.

torchrun --nproc-per-node N scripts/train_eagle3_fn.py $ARGS
"""

import sys

from eagle3fn.specforge.script import main

if __name__ == "__main__":
    sys.exit(main())
