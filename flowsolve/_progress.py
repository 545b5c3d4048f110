"""The progress bars of long work, by tqdm, which is optional."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int


def import_tqdm(who: str) -> Callable[..., Any]:
    """`tqdm.tqdm`; raise one sentence if it is not installed."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            f"{who} shows its progress with tqdm, which is not installed: pip install tqdm, or pass progress=False."
        ) from error
    return tqdm


@dataclasses.dataclass(frozen=True)
class ChunkBar:
    """The bar of a batch in chunks, which the compiled program itself moves on, as the callback of its chunks.

    It is equal to any other for a batch of this shape, so that a jit traces no bar anew; what it shows lives in
    `_RUNNING`. With several processes the first of them shows its own part.
    """

    samples: int
    chunks: int

    def __call__(self, number: Int[Array | np.ndarray, ""]) -> None:
        """Chunk `number` is done."""
        if jax.process_index() != 0:
            return
        with _LOCK:
            bar, done = _RUNNING.pop(self, (None, set()))
            if bar is None or int(number) in done:
                # A number that comes again is of a new run: the last one was stopped.
                bar, done = self._begun(bar), set()
            done.add(int(number))
            chunks = self._here(self.chunks)
            bar.set_postfix_str(f"chunk {len(done)}/{chunks}", refresh=False)
            bar.update(bar.total - bar.n if len(done) == chunks else round(bar.total / chunks))
            if len(done) < chunks:
                _RUNNING[self] = bar, done
            else:
                bar.close()

    def _begun(self, stopped: Any) -> Any:
        if stopped is not None:
            stopped.close()
        return import_tqdm("batched")(total=self._here(self.samples), unit=" samples")

    def _here(self, count: int) -> int:
        return count * jax.local_device_count() // jax.device_count()


_RUNNING: dict[ChunkBar, tuple[Any, set[int]]] = {}
_LOCK = threading.Lock()
