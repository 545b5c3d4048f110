"""Images cut into square patches, a token each, and back.

The patch in row r and column c of an image of shape (channels, height, width) is the token r (width/p) + c, its
elements in the order of (channels, p, p). The sizes of transformers on patches are here too.
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from .._checks import check_type, describe

__all__ = ["TransformerSize"]


class TransformerSize(NamedTuple):
    """What a transformer on patches costs.

    **Arguments:** `patch`: height and width of a patch in pixels; `width`: of a token; `depth`: number of blocks;
    `heads`: of attention, which divide the width; `mlp_ratio`: width of an MLP's hidden layer in widths of a token.
    """

    patch: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0

    @property
    def hidden(self) -> int:
        """Width of an MLP's hidden layer."""
        return round(self.mlp_ratio * self.width)


def check_size(size: TransformerSize, owner: str) -> None:
    """Raise unless the sizes fit together."""
    check_type(size, TransformerSize, f"{owner}'s size", f'a fs.nn.TransformerSize, such as {owner}.SIZES["S/2"]')
    if min(size.patch, size.width, size.depth, size.heads, size.hidden) < 1 or size.width % size.heads:
        raise ValueError(
            f"{owner} got {size}, but wants sizes >= 1 and a number of heads that divides the width: see {owner}.SIZES."
        )


def check_image(
    x: Float[Array, "..."] | jax.ShapeDtypeStruct, channels: int, patch: int, owner: str
) -> tuple[int, int]:
    """The grid of patches, (rows, columns); raise unless x is one image that the patches cover."""
    if x.ndim != 3 or x.shape[0] != channels:
        raise ValueError(
            f"{owner} got x of {describe(x)}, but was built for ONE image of shape ({channels}, height, width): batch "
            "with jax.vmap, and put the channels first."
        )
    _, height, width = x.shape
    if not height or not width or height % patch or width % patch:
        raise ValueError(
            f"{owner} got an image of {height} x {width}, which patches of {patch} x {patch} do not cover: pad or crop "
            f"it to multiples of {patch}, or build it with another patch."
        )
    return height // patch, width // patch


def to_patches(x: Float[Array, "channels height width"], patch: int) -> Float[Array, "tokens elements"]:
    """One token a patch."""
    channels, height, width = x.shape
    rows, columns = height // patch, width // patch
    grid = x.reshape(channels, rows, patch, columns, patch)
    return grid.transpose(1, 3, 0, 2, 4).reshape(rows * columns, channels * patch * patch)


def from_patches(
    tokens: Float[Array, "tokens elements"], rows: int, columns: int, patch: int
) -> Float[Array, "channels height width"]:
    """The image of these patches."""
    grid = tokens.reshape(rows, columns, -1, patch, patch)
    return grid.transpose(2, 0, 3, 1, 4).reshape(-1, rows * patch, columns * patch)
