"""`python -m peftprof`, and `peftprof`."""

import os

from peftprof import cli, cli_advise


def command() -> None:
    """The command in a process of its own, which may fork: nothing has computed in it."""
    cli_advise.PROCESSES = os.cpu_count() or 1
    cli.main()


if __name__ == "__main__":
    command()
