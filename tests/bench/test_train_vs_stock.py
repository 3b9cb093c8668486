"""The comparison with the stock Trainer: its arithmetic, and once small from end to end."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import results, stock_trainer, train_vs_stock
from bench import train_vs_stock_child as child_program
from bench.train_vs_stock_figures import (
    OURS,
    STOCK,
    Cell,
    LossDifference,
    Ratio,
    Run,
    UnequalError,
    across,
    check_pair,
    order,
    summary,
)
from bench.train_vs_stock_flops import ModelFlops
from peftprof.run import runner
from tests.tolerances import tolerance_of_step_losses  # placeholder

LORA, QLORA = Cell("lora", "fp32"), Cell("qlora", "fp32")
