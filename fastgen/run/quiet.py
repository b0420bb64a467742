"""What libraries say to programmers is kept from the user of a command."""

import logging
import os
import sys
import warnings


def quiet_libraries() -> None:
    """Only commands call this, and first of all: a program that imports fastgen sees what the libraries print.

    A library's progress bar appears only when its work takes over five seconds: tqdm reads the default of its `delay`
    from the environment when it is imported. Unless Python is asked for warnings (-W or PYTHONWARNINGS), those of
    future changes do not appear, nor that a long prompt "will result in indexing errors": it is cut, as diffusers says
    in its own words."""
    os.environ.setdefault("TQDM_DELAY", "5")
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.filterwarnings("ignore", category=category)
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is where one process trains
        logging.getLogger("transformers.tokenization_utils_base").addFilter(is_no_length)


def is_no_length(record: logging.LogRecord) -> bool:
    return "sequence length is longer than" not in str(record.msg)
