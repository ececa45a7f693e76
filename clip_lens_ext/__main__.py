"""`python -m clip_lens_ext` is `clip-lens`."""

import sys

from clip_lens_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
