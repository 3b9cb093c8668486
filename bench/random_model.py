"""A DistilBERT classifier of any size with random weights, to measure sizes no package has.

    python -m bench.random_model /tmp/distilbert-768 --hidden 768 --layers 6

Speed does not depend on the weights' values. The vocabulary is the embedded model's, so the
folder works as --model of `train` and of `bench.train_vs_stock`; its accuracy means nothing.
"""

import argparse
import shutil
from pathlib import Path

import torch
import transformers

from peftprof.run.source import load_tokenizer, locate


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.random_model", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="to make")
    parser.add_argument("--hidden", type=int, default=768, help="a multiple of 64 (768)")
    parser.add_argument("--layers", type=int, default=6, help="how many (6)")
    given = parser.parse_args()
    if given.hidden < 64 or given.hidden % 64 or given.layers < 1:
        parser.error("--hidden must be a multiple of 64, --layers 1 or more")
    if given.folder.exists():
        parser.error(f"{given.folder} already exists; name another folder")
    source = locate("minilm")
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=source.vocabulary,
        dim=given.hidden,
        hidden_dim=4 * given.hidden,
        n_heads=given.hidden // 64,
        n_layers=given.layers,
    )
    given.folder.mkdir(parents=True)
    try:
        model = transformers.DistilBertForSequenceClassification(config)
        model.save_pretrained(given.folder)
        load_tokenizer(source).save_pretrained(given.folder)
    except BaseException:
        shutil.rmtree(given.folder)
        raise


if __name__ == "__main__":
    main()
