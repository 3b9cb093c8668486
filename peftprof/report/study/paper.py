"""What the paper prints, for the columns beside ours (tables I to III)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Printed:
    """One row of the paper's tables: accuracy in %, memory in MB, None where it prints none."""

    accuracy: float | None
    trainable: float | None
    peak_mb: float | None
    samples_per_s: float | None


PRINTED = {
    "full": Printed(91.86, 67.0e6, 1305.9, 389.9),
    "lora-r4": Printed(87.84, 0.67e6, 810.0, 1413.6),
    "lora-r8": Printed(87.84, 0.74e6, 811.2, 1411.2),
    "lora-r16": Printed(87.96, 0.89e6, 813.7, 1392.6),
    "lora-r32": Printed(87.96, 1.18e6, 818.6, 1395.9),
    "qlora-r4": Printed(87.73, 1.26e6, 686.95, 1095.1),
    "qlora-r8": Printed(88.07, 1.33e6, 688.18, 1114.9),
    "qlora-r16": Printed(87.96, 1.48e6, 690.64, 1136.2),
    "qlora-r32": Printed(88.19, 1.77e6, 695.56, 1091.2),
}
# Table III: steps a second, peak GB and trainable % of the profiled runs.
PROFILED = {
    "full": (11.78, 2.04, 100.0),
    "lora-r8": (74.11, 2.04, 1.1),
    "qlora-r8": (20.73, 1.4, 1.1),
}
MACHINE = "one A100, DistilBERT on SST-2, batch 8 (full) and 32 (adapters)"
