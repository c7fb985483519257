"""Score adapters and baselines: `python eval.py --pair tiny --suite tiny --lora-paths runs/`."""

import sys

from stillhouse.errors import explained_imports

with explained_imports():
    from stillhouse.entrypoints import eval_main

if __name__ == "__main__":
    sys.exit(eval_main(sys.argv[1:]))
