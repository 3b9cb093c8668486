"""What each process does that tests start through torchrun: a start is dear, so one does much.

torchrun ... -m tests.run.ranks runs REQUESTS.json     runs, one after the other, in one world
torchrun ... -m tests.run.ranks fails RANK train ...   the command line; that rank runs out of
                                                       memory in step 6
"""

import dataclasses
import json
import sys
from pathlib import Path
from unittest import mock

import torch

from peftprof import cli
from peftprof.config import RunConfig
from peftprof.errors import PeftprofError
from peftprof.run import distributed, loop, runner
from tests.conftest import Quiet


class Killed(Exception):
    pass


def dying(kill_at):
    real = loop.Trainee.step

    def step(self, number, **how):
        if number == kill_at:
            raise Killed
        return real(self, number, **how)

    return mock.patch.object(loop.Trainee, "step", step)


def make(request):
    """The run of one request, with whatever is to be wrong with it."""
    config = RunConfig.from_json(request["config"])
    if request.get("own_seeds"):
        config = dataclasses.replace(config, seed=config.seed + distributed.rank())
    out = Path(request["out"])
    if request.get("no_sum"):
        with mock.patch.object(distributed, "add_up_gradients", return_value=None):
            runner.train(config, out, [], Quiet())
    elif "kill_at" in request:
        with dying(request["kill_at"]):
            try:
                runner.train(config, out, [], Quiet())
            except Killed:
                pass
            else:
                raise AssertionError("it should have been killed")
        if request.get("resume"):
            runner.resume(out, Quiet())
    else:
        runner.train(config, out, [], Quiet())


def runs(path):
    with distributed.joined():
        for request in json.loads(path.read_text()):
            told = ""
            try:
                make(request)
            except PeftprofError as error:
                told = f"{type(error).__name__}: {error}"
            every = distributed.gathered(told)
            if distributed.first():
                Path(request["out"]).with_suffix(".told").write_text(json.dumps(every))


def fails(rank, arguments):
    real = loop.Trainee.step

    def step(self, number, **how):
        if number == 6 and distributed.rank() == rank:
            raise torch.OutOfMemoryError("no more of it")
        return real(self, number, **how)

    loop.Trainee.step = step
    sys.argv = ["peftprof", *arguments]
    cli.main()


if __name__ == "__main__":
    what, argument, *rest = sys.argv[1:]
    if what == "runs":
        runs(Path(argument))
    else:
        fails(int(argument), rest)
