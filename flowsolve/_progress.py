"""The progress bar of long work, by tqdm, which is optional."""

from collections.abc import Callable
from typing import Any


def import_tqdm(who: str) -> Callable[..., Any]:
    """`tqdm.tqdm`; raise one sentence if it is not installed."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            f"{who} shows its progress with tqdm, which is not installed: pip install tqdm, or pass progress=False."
        ) from error
    return tqdm
