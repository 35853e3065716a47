"""`python -m jax_sft` is `jax-sft`."""

import sys

from jax_sft.cli import main

if __name__ == "__main__":
    sys.exit(main())
