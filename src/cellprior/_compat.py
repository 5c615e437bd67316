"""What differs between the supported versions of other packages."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any


def without_pulled_columns() -> AbstractContextManager[Any]:
    """For a while, a new MuData does not copy the columns of its modalities; mudata 0.4 does not by default."""
    import mudata

    if hasattr(mudata, "set_options"):  # until mudata 0.3
        return mudata.set_options(pull_on_update=False)
    return mudata.settings.override(pull_on_update=False)
