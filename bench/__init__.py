"""Benchmarks. OpenMP's threads spin as briefly as they do under `python -m peftprof`.

With libgomp's default, threads that share a core with another process wait out its time
slice at every barrier, and so steadily that no self-pair can tell: forward and backward of
a 768 x 768 NF4 LoRA layer, 512 tokens, stock PEFT, two threads beside another job, 160.0 ms
in every round; with this 19.0 ms, 18.9 to 22.5 (2026-11-24, AMD EPYC Zen 4, 2 cores,
torch 2.13.0).
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch is imported
