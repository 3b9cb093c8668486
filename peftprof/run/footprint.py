"""What a process takes of memory before it has a model: a child that does what a run does.

`process_bytes` starts this module as a process of its own, for what one process has imported
it cannot forget again. The child imports all that a run imports, tokenises a few texts, and
says how much of it is resident.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from peftprof.errors import DeviceError

_MODULE: Final = "peftprof.run.footprint"
_TIMEOUT_S: Final = 300


def process_bytes() -> int:
    """Resident bytes of a process that is about to build a model. Takes about ten seconds.

    Raises DeviceError where the child cannot do its work.
    """
    command = [sys.executable, "-m", _MODULE]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # the context is told apart
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=os.environ | hidden
        )
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"the imports of a run took more than {_TIMEOUT_S} s") from error
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode != 0 or not last.isdecimal():
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise DeviceError(f"a process with the imports of a run could not be measured: {said}")
    return int(last)


def _main() -> None:
    import bitsandbytes
    import datasets
    import peft
    import tokenizers
    import transformers

    from peftprof.run import runner

    # transformers imports a model's code when it is first asked for.
    used = (
        bitsandbytes.nn.Linear4bit,
        peft.get_peft_model,
        transformers.AutoModelForSequenceClassification,
        transformers.BertForSequenceClassification,
        transformers.BitsAndBytesConfig,
        runner.train,
    )
    assert all(used)
    texts = [f"A text of a few words, the {i}th." for i in range(2000)]
    data = datasets.Dataset.from_dict({"text": texts, "label": [0, 1] * 1000})
    model = tokenizers.models.WordPiece(unk_token="[UNK]")
    plain = tokenizers.Tokenizer(model)
    trainer = tokenizers.trainers.WordPieceTrainer(special_tokens=["[UNK]", "[PAD]"])
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]")
    tokenizer(data["text"][:], truncation=True, max_length=128)
    print(_resident())


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the peak, which imports end near
        import resource

        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024


if __name__ == "__main__":
    _main()
