"""What libraries say to programmers is kept from the user of a command."""

import os
import sys
import warnings


def quiet_libraries() -> None:
    """Only commands call this, and first of all: a program that imports fastgen sees what the libraries print.

    A library's progress bar appears only when its work takes over five seconds: tqdm reads the default of its `delay`
    from the environment when it is imported. Warnings of future changes do not appear, unless Python is asked for
    warnings (-W or PYTHONWARNINGS)."""
    os.environ.setdefault("TQDM_DELAY", "5")
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.filterwarnings("ignore", category=category)
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is where one process trains
