"""The errors a user sees: one line on stderr, exit code 2, no traceback.

    PeftprofError
    ├── ConfigError     a setting that cannot be: rank 0, an unknown method
    ├── InputError      a model or dataset that cannot be found, read or used
    ├── FetchError      a pinned file that could not be fetched or is not the pinned one
    ├── DeviceError     a device or kernel backend that this machine does not have
    ├── FolderError     a run folder that is missing, foreign, incomplete or unwritable
    │   └── BusyError   a folder that another process is at work in
    ├── TraceError      a trace that is missing, truncated, empty or not a trace
    ├── TrainingError   a run that must stop: no gradient, changed base weights, a loss of nan
    ├── InferenceError  variants of one model that do not compute the same, or do not fit
    ├── StudyError      a study that cannot go on as it is asked to
    └── LimitError      a breakdown over a limit of --fail-if; exit code 1

The message is one sentence that says what is wrong and what to do about it.
Anything else that escapes is a bug and keeps its traceback.
"""


class PeftprofError(Exception):
    """Base of every error meant for the user; `exit_code` is the process's.

    Whatever names of files and values of traces bring into a message, it stays one line.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """`text` without line breaks, control characters and the like, a space between words."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


class ConfigError(PeftprofError):
    """A setting, or a combination of settings, that cannot be."""


class InputError(PeftprofError):
    """A model or a dataset that cannot be found, read or used."""


class FetchError(PeftprofError):
    """A pinned file that could not be fetched, or is not the pinned one."""


class DeviceError(PeftprofError):
    """A device or a kernel backend that this machine does not have."""


class FolderError(PeftprofError):
    """A run folder that is missing, foreign, incomplete or unwritable."""


class BusyError(FolderError):
    """A folder that another process is at work in."""


class TraceError(PeftprofError):
    """A trace that is missing, truncated, empty or not a trace."""


class TrainingError(PeftprofError):
    """A run that must stop because going on would give a wrong result."""


class InferenceError(PeftprofError):
    """Variants of a served model that do not compute the same, or find no memory."""


class StudyError(PeftprofError):
    """A study that cannot go on as it is asked to."""


class LimitError(PeftprofError):
    """A breakdown that breaks a limit which was set for it."""

    exit_code = 1
