"""`python -m peftprof`."""

from peftprof.cli import main

if __name__ == "__main__":
    main()
