"""The demo page from a checkout: ``python app.py``, then open the address that it prints."""

import sys

from tinyserve.demo import main

if __name__ == "__main__":
    sys.exit(main())
