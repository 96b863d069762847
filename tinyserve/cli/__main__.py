import sys

from tinyserve.cli import main

if __name__ == "__main__":
    sys.exit(main())
