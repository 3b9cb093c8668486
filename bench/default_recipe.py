"""The search behind the default recipe: accuracy by method, rate, epochs and seed.

    python -m bench.default_recipe --method qlora --lr 1e-3 --lr 2e-3 --seed 42 --seed 1

Trains on the embedded model and data, without a profiler, and prints one JSON line a run.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path

from rich.console import Console

from peftprof.config import METHODS, make_config
from peftprof.report.progress import LineWatcher
from peftprof.run import runner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--lr", action="append", type=float)
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--epochs", type=float)
    given = parser.parse_args()
    methods, rates = given.method or METHODS, given.lr or [None]
    watcher = LineWatcher(Console(stderr=True))
    for method, rate, seed in itertools.product(methods, rates, given.seed or [42]):
        config = make_config(
            method,
            learning_rate=rate,
            seed=seed,
            epochs=given.epochs,
            batch_size=given.batch_size,
            profiler="none",
        )
        with tempfile.TemporaryDirectory() as folder:
            record = runner.train(config, Path(folder) / "run", [], watcher).read_record()
        assert record.accuracy is not None
        result = {
            "method": method,
            "lr": record.config["learning_rate"],
            "epochs": record.config["epochs"],
            "batch_size": record.config["batch_size"],
            "seed": seed,
            "precision": record.config["precision"],
            "accuracy": record.accuracy.accuracy,
            "interval": [record.accuracy.low, record.accuracy.high],
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
