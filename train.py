"""Train one point: `python train.py --pair tiny --lmbda 0.5`, or `accelerate launch train.py …`."""

import sys

from stillhouse.errors import explained_imports

with explained_imports():
    from stillhouse.entrypoints import train_main

if __name__ == "__main__":
    sys.exit(train_main(sys.argv[1:]))
